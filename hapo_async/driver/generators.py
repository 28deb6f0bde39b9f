"""What the driver knows of one generator."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from actors import placement
from actors.calls import CallFailed
from hapo_async.types import GroupKey, Version


@dataclass(eq=False)
class Generator:
    """One member of the fleet. Its name is never another one's; a replacement of a dead member has its name and its slot.

    key: what the weights' transport knows it by. outstanding: estimated tokens still to come, by group in flight on it; load:
    their sum. joining: it has started, and serves after its first install. detached: it gets no groups, and keeps its version
    whatever is published. leaving: it gets neither groups nor versions any more. suspect: it has been silent for a while.
    """

    name: str
    actor: Any
    slot: placement.Slot
    key: str = ""
    installed: Version | None = None
    outstanding: dict[GroupKey, int] = field(default_factory=dict)
    load: int = 0
    alive: bool = True
    joining: bool = False
    detached: bool = False
    leaving: bool = False
    suspect: bool = False
    failures: int = 0
    last_install: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    idle_since: float | None = field(default_factory=time.monotonic)
    idle_s: float = 0.0

    @property
    def serves(self) -> bool:
        """Whether training's groups are issued to it."""
        return self.takes_weights and not self.joining

    @property
    def takes_weights(self) -> bool:
        """Whether it is to have the newest version."""
        return self.alive and not self.detached and not self.leaving

    @property
    def state(self) -> str:
        """For people."""
        if not self.alive:
            return "dead"
        flags = (
            ("suspect", self.suspect),
            ("leaving", self.leaving),
            ("lent", self.detached),
            ("joining", self.joining),
        )
        return next((name for name, is_so in flags if is_so), "healthy")

    def assign(self, key: GroupKey, tokens: int) -> None:
        self.outstanding[key] = tokens
        self.load += tokens
        if self.idle_since is not None:
            self.idle_s += time.monotonic() - self.idle_since
            self.idle_since = None

    def unassign(self, key: GroupKey) -> None:
        self.load -= self.outstanding.pop(key, 0)
        if not self.outstanding and self.idle_since is None:
            self.idle_since = time.monotonic()

    def take_idle_s(self) -> float:
        """Seconds without work since the last call."""
        now = time.monotonic()
        if self.idle_since is not None:
            self.idle_s += now - self.idle_since
            self.idle_since = now
        idle, self.idle_s = self.idle_s, 0.0
        return idle


class Replacements(Protocol):
    """Who replaces dead generators."""

    @property
    def expected(self) -> bool:
        """Whether one is on its way."""

    @property
    def replacing(self) -> list[str]:
        """Names of dead ones that are being replaced."""

    def replace(self, dead: Generator, error: CallFailed) -> None:
        """Starts another one in its place, unless that has happened too often."""
