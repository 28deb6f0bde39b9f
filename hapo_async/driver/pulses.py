"""What is known of an actor from its answers: when it answered last, when it got on last, and what is wrong with it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Reading:
    """What an actor says of itself. progress: changes when it gets on. doing: for people. patience_s: what it does now may
    take so long without anything that it counts, since it has a deadline of its own. children: pids of its processes."""

    progress: Any
    doing: str
    pid: int
    patience_s: float = 0.0
    children: tuple[int, ...] = ()


@dataclass(frozen=True)
class Actor:
    """Someone to ask, with a deadline. Of a team that waits for a silent member, only that one is named. patience_s: it may
    work for so long without anything that it counts."""

    name: str
    ask: Callable[[float], Awaitable[Reading]]
    team: str = ""
    patience_s: float = 0.0


@dataclass(frozen=True)
class Incident:
    """Something that stands still. since: ``time.monotonic`` of the last sign of life."""

    who: str
    state: str
    since: float


class Pulse:
    """What is known of one actor; times are ``time.monotonic``.

    seen: its last progress was seen then. moved: the answer before that; it may have stopped right after it, and no
    silence shall be taken for shorter than it is. unmoved: answers since ``seen``.
    """

    def __init__(self, actor: Actor, now: float) -> None:
        self.actor = actor
        self.asked = -1e9
        self.answered = self.moved = self.seen = now
        self.unmoved = 0
        self.reading: Reading | None = None
        self.incident: Incident | None = None
        self.call: asyncio.Task[None] | None = None

    @property
    def patience_s(self) -> float:
        """How long it may go without progress that shows."""
        return max(self.actor.patience_s, self.reading.patience_s if self.reading else 0.0)

    def hear(self, reading: Reading, now: float) -> None:
        if self.reading is None or reading.progress != self.reading.progress:
            self.moved, self.seen, self.unmoved = self.answered, now, 0
        else:
            self.unmoved += 1
        self.reading, self.answered = reading, now

    def shift(self, seconds: float) -> None:
        """Nobody listened for so long."""
        self.answered, self.moved, self.seen = self.answered + seconds, self.moved + seconds, self.seen + seconds
