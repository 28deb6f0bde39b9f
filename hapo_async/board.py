"""TensorBoard's copy of the metrics: a disk that is full costs points on a curve and not the run."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

AGAIN_S = 60.0  # after something went wrong


class Board:
    """Writes scalars to a folder. purge_step: TensorBoard hides what it holds of that step and later ones."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        self._folder, self._purge_step = folder, purge_step
        self._writer: Any = None
        self._again = 0.0  # time.monotonic
        self._try(self._open)

    def write(self, step: int, numbers: Mapping[str, float], advice: str = "") -> None:
        """One step. advice: what the bottleneck is, "" where nothing is known of it."""
        if self._writer is None and time.monotonic() >= self._again:
            self._try(self._open)
        if self._writer is not None:
            self._try(self._add, step, numbers, advice)

    def close(self) -> None:
        if self._writer is not None:
            self._try(self._writer.close)
            self._writer = None

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        self._purge_step = None

    def _add(self, step: int, numbers: Mapping[str, float], advice: str) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        if advice:
            self._writer.add_text("bottleneck", advice, step)
        self._writer.flush()

    def _try(self, write: Any, *arguments: Any) -> None:
        """Its writer is a thread that raises whatever it ran into, at any later call."""
        try:
            write(*arguments)
        except Exception as error:
            self._writer, self._again = None, time.monotonic() + AGAIN_S
            log.error("%s cannot be written for now: %s", self._folder, error)
