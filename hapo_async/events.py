"""What happened to a run besides its steps: ``events.jsonl`` in its folder, drawn as marks in the report's charts.

A line holds step (the learner's version at that moment), time (Unix), kind (``scaled``, ``refused``, ``lost``, ``replaced``,
``given_up``), label (a few words, for a mark) and text (a sentence).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hapo_async.files import append_row, open_regular, parse_json
from hapo_async.secrets import redact

EVENTS_FILE = "events.jsonl"


@dataclass(frozen=True)
class Event:
    """See above."""

    step: int
    time: float
    kind: str
    label: str
    text: str


class Events:
    """Appends to the file of a run folder, and says each event. step: the learner's step now. A disk that is full costs the
    line and not the run."""

    def __init__(self, run_dir: Path, step: Callable[[], int], say: Callable[[str], None]) -> None:
        self.path = run_dir / EVENTS_FILE
        self._step, self._say = step, say

    def add(self, kind: str, label: str, text: str) -> None:
        event = Event(self._step(), time.time(), kind, redact(label), redact(text))
        self._say(f"step {event.step}: {event.text}")
        append_row(self.path, asdict(event))


def read(run_dir: Path) -> list[Event]:
    """All events of a run folder, oldest first. Lines that are not whole are left out."""
    try:
        with open_regular(run_dir / EVENTS_FILE) as file:
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    out = []
    for line in lines:
        try:
            row = parse_json(line)
            out.append(Event(int(row["step"]), float(row["time"]), *(str(row[k]) for k in ("kind", "label", "text"))))
        except (ValueError, KeyError, TypeError):
            continue
    return out
