"""Prompts that a run gave up after several tries: ``quarantine.jsonl`` in its folder, for people to see which ones starve.

A line holds step (the learner step that was being made), epoch, uid, reason (``late``: its answers took longer than
``max_staleness`` allows; ``failed``: engines or verifiers refused it;
``unjudgeable``: no answer can be judged by its truth), tries, and tokens: what each answer of the last
try had by then, null where that is not known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hapo_async.files import append_row
from hapo_async.types import GroupKey

log = logging.getLogger(__name__)

QUARANTINE_FILE = "quarantine.jsonl"


class Quarantine:
    """Appends to the file of a run folder; without a folder it only logs."""

    def __init__(self, run_dir: Path | None = None) -> None:
        self.path = run_dir / QUARANTINE_FILE if run_dir else None

    def add(self, key: GroupKey, step: int, reason: str, tries: int, tokens: Sequence[int] | None = None) -> None:
        """One prompt. A disk that is full costs the line and not the run."""
        log.error("prompt %s is given up after %d tries: %s", key.uid, tries, reason)
        if self.path is None:
            return
        row = {"step": step, "epoch": key.epoch, "uid": key.uid, "reason": reason, "tries": tries}
        append_row(self.path, row | {"tokens": None if tokens is None else list(tokens)})
