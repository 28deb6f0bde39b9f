"""How far a process has got, for a thread that asks while another one works."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import psutil
from torch import nn

_IO_UNIT = 1 << 20  # bytes; what a process says to others while it waits stays below it
_FILES = ("load",)  # what is done with files, and is seen by nothing else


class Progress:
    """One thread works (``during``, ``move``), others ``read``. ``moves`` only grows."""

    def __init__(self) -> None:
        self.doing = ""
        self.moves = 0
        self._since = time.monotonic()
        self._writers = 0
        self._process = psutil.Process()

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Inside, the process is doing ``what``."""
        before, self.doing, self._since = self.doing, what, time.monotonic()
        self.moves += 1
        try:
            yield
        finally:
            self.moves += 1
            self.doing, self._since = before, time.monotonic()

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        """Inside, another thread of the process writes files."""
        self._writers += 1
        try:
            yield
        finally:
            self._writers -= 1
            self.moves += 1

    def move(self, *_: Any) -> None:
        """Something was done: a part of a micro-batch, an update, a stretch of weights."""
        self.moves += 1

    def watch(self, model: nn.Module) -> None:
        """Counts every layer that a Hugging Face model computes, so that even one long micro-batch is seen to move."""
        names = set(getattr(model, "_no_split_modules", None) or ())
        for module in model.modules():
            if type(module).__name__ in names:
                module.register_forward_hook(self.move)

    def read(self) -> dict[str, Any]:
        """pid; doing, "" when idle, and for how many seconds; moved: what changes while the process gets on, the
        files that it saves or loads included."""
        return {
            "pid": os.getpid(),
            "doing": self.doing,
            "doing_s": time.monotonic() - self._since,
            "moved": (self.moves, self._io()),
        }

    def _io(self) -> int:
        if self.doing not in _FILES and not self._writers:
            return 0
        try:
            counters: Any = self._process.io_counters()
            return (counters.read_chars + counters.write_chars) // _IO_UNIT
        except (AttributeError, psutil.Error, OSError):  # not on every system
            return 0
