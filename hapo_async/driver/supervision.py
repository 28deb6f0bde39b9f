"""What is done about actors that stand still, and which state each one is in.

| state | of an actor that |
|---|---|
| healthy | answers, or has nothing to do |
| suspect | has been frozen or stalled for ``run.alarms.silence_s`` |
| dead | is gone, and is not replaced |
| restarting | is gone, and another one is on its way |
| stale | serves weights too old to be given groups, or none yet |
| retired | left because fewer were wanted |

A suspect gets no new groups while others can take them. One that stays frozen is ended as if it had died: nothing else
would bring its groups back before their own deadlines.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

from actors.calls import CallFailed
from actors.learner import LearnerGroup, rank_name
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.pulses import Incident, Reading
from hapo_async.types import Version

FROZEN, STALLED = 3.0, 6.0
"""Times silence_s after which an actor without a sign of life, and a generator that answers without getting on, are given up."""
STATES = ("healthy", "suspect", "dead", "restarting", "stale", "retired")


class Supervision:
    """restarting: whether the learner is being started again."""

    def __init__(self, config: Config, fleet: Fleet, judges: Judges, learner: LearnerGroup) -> None:
        self.restarting: Callable[[], bool] = lambda: False
        self._config, self._fleet, self._judges, self._learner = config, fleet, judges, learner
        self._silence_s = float(config.run.alarms["silence_s"])
        self._doubted: set[str] = set()
        self._given_up: set[Incident] = set()

    # ---------------------------------------------------------------- what the watchdog tells

    def doubt(self, incident: Incident) -> None:
        """An actor stands still."""
        self._doubted.add(incident.who)
        if generator := self._generator(incident.who):
            generator.suspect = True

    def trust(self, name: str) -> None:
        """An actor gets on again, or is out of service."""
        self._doubted.discard(name)
        self._given_up = {incident for incident in self._given_up if incident.who != name}
        if generator := self._generator(name):
            generator.suspect = False
            self._fleet.changed()

    def lasting(self, incident: Incident, now: float) -> None:
        """It still stands still. Gives it up when that has lasted, once. now: ``time.monotonic``."""
        generator = self._generator(incident.who)
        is_rank = incident.who in [rank_name(i) for i in range(len(self._learner.ranks))]
        if not generator and not is_rank and incident.who not in self._judges.names:
            return
        limit = {"frozen": FROZEN, "stalled": STALLED if generator else 0.0}.get(incident.state, 0.0)
        silent_s = now - incident.since
        if not limit or silent_s < limit * self._silence_s or incident in self._given_up:
            return
        if is_rank and self.restarting():
            return
        self._given_up.add(incident)
        how = "gave no sign of life" if incident.state == "frozen" else "answered without getting on"
        error = CallFailed(incident.who, f"{how} for {silent_s:.0f} s", gone=True)
        if generator:
            self._fleet.lose(generator, error)
        elif incident.who in self._judges.names:
            self._judges.lose(incident.who, error)
        else:
            self._learner.give_up(str(error))

    def _generator(self, name: str) -> Generator | None:
        return next((g for g in self._fleet.alive if g.name == name), None)

    # ---------------------------------------------------------------- what people see

    def actors(self, version: Version, reading: Callable[[str], Reading | None]) -> list[dict[str, Any]]:
        """name, role, state, pid, children and version of everybody. version: the learner's. reading: an actor's last
        answer."""

        def row(name: str, role: str, state: str, serves: str = "") -> dict[str, Any]:
            told = reading(name) if state not in ("dead", "restarting", "retired") else None
            pid, children = (told.pid, list(told.children)) if told else (None, [])
            return {"name": name, "role": role, "state": state, "pid": pid, "children": children, "version": serves}

        rows = [row("driver", "driver", "healthy") | {"pid": os.getpid()}]
        for generator in self._fleet.generators:
            serves = str(generator.installed) if generator.installed else ""
            rows.append(row(generator.name, "generator", self._generator_state(generator, version), serves))
        for name in self._judges.members:
            gone = name not in self._judges.names
            rows.append(row(name, "verifier", "restarting" if gone else self._doubt(name)))
        for index in range(len(self._learner.ranks)):
            state = "restarting" if self.restarting() else self._doubt(rank_name(index))
            rows.append(row(rank_name(index), "learner", state, str(version)))
        rows += [row(name, "generator", "retired") for name in self._fleet.retired]
        return rows + [row(name, "verifier", "retired") for name in self._judges.retired]

    def metrics(self, version: Version) -> dict[str, float]:
        """How many actors are in each state."""
        counts = Counter(actor["state"] for actor in self.actors(version, lambda name: None))
        return {f"actors/{state}": float(counts[state]) for state in STATES}

    def _doubt(self, name: str) -> str:
        return "suspect" if name in self._doubted else "healthy"

    def _generator_state(self, generator: Generator, version: Version) -> str:
        if not generator.alive:
            upkeep = self._fleet.upkeep
            return "restarting" if upkeep is not None and generator.name in upkeep.replacing else "dead"
        if generator.suspect:
            return "suspect"
        serves = generator.installed
        if serves is None or serves.incarnation < version.incarnation:
            return "stale"
        return "stale" if version.step - serves.step > self._config.max_staleness else "healthy"
