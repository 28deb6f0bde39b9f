"""The canary: every so many publishes, learner and generators score the same tokens under the same weights.

The learner scores between two steps, which is all the time that training gives. Each generator is asked as soon as it has
installed exactly that version, beside its sampling and beside training; one that has skipped the version, fails, or does
not answer in time is left out and counted. Staleness can raise no alarm here: both sides speak of one version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.learner import LearnerGroup
from hapo_async import canary
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.types import Prompt, Version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Round:
    """One comparison. expected: names of generators that have not been asked yet. deadline: ``time.monotonic``."""

    version: Version
    deadline: float
    reference: asyncio.Future[list[np.ndarray]]
    expected: set[str] = field(default_factory=set)


class Canary:
    """Compares and warns, once until a generator agrees again; no failure of a generator leaves it. say: prints a line for
    people."""

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], learner: LearnerGroup, fleet: Fleet, say: Callable[[str], None]
    ) -> None:
        self._every = config.run.alarms["canary_every"]
        self._limit = config.run.alarms["mismatch_kl"]
        self._deadline_s = config.weights.deadline_s
        self._learner, self._fleet, self._say = learner, fleet, say
        self._pairs = canary.choose(prompts, config.sampling.max_tokens - 1) if self._every else []
        self._round: _Round | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._gaps: list[canary.Gap] = []
        self._skipped = 0
        self._disagreeing: set[str] = set()  # generators that an alarm has named
        self._seconds: float | None = None
        fleet.weights.on_installed.append(self._installed)

    async def at_publish(self, version: Version) -> None:
        """To be called right after a publish, before the next step changes the weights. Returns when the learner has
        scored; raises what the learner raises."""
        if not self._pairs or version.step % self._every:
            return
        began = time.monotonic()
        self._end_round()
        reference: asyncio.Future[list[np.ndarray]] = asyncio.get_running_loop().create_future()
        self._round = _Round(version, began + self._deadline_s, reference, {g.name for g in self._fleet.serving})
        for generator in self._fleet.alive:
            if generator.installed is not None:
                self._installed(generator, generator.installed)
        try:
            reference.set_result(await self._learner.score([canary.sequence(pair) for pair in self._pairs]))
        except BaseException:
            reference.cancel()
            self._round = None
            raise
        self._seconds = (self._seconds or 0.0) + time.monotonic() - began

    def take(self) -> dict[str, float]:
        """Metrics of the comparisons that ended since the last call; the worst generator counts."""
        if self._round and time.monotonic() > self._round.deadline:
            self._end_round()
        out: dict[str, float] = {}
        if self._gaps:
            out["canary/kl"] = max(g.kl for g in self._gaps)
            out["canary/max_diff"] = max(g.max_diff for g in self._gaps)
        if self._gaps or self._skipped:
            out |= {"canary/compared": float(len(self._gaps)), "canary/skipped": float(self._skipped)}
        if self._seconds is not None:
            out["time/canary_s"] = self._seconds
        self._gaps, self._skipped, self._seconds = [], 0, None
        return out

    async def close(self) -> None:
        """Gives up what has not been answered."""
        self._round = None
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _end_round(self) -> None:
        if self._round:
            self._skipped += len(self._round.expected)
            self._round = None

    def _installed(self, generator: Generator, version: Version) -> None:
        """A generator serves ``version`` from now on: the time to ask it, or to give it up."""
        current = self._round
        if current is None or version < current.version:
            return
        is_expected = generator.name in current.expected
        current.expected.discard(generator.name)
        if version != current.version or time.monotonic() > current.deadline:
            self._skipped += is_expected
            return
        task = asyncio.create_task(self._compare(generator, current))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self, generator: Generator, current: _Round) -> None:
        try:
            async with asyncio.timeout(self._deadline_s):
                version, scored = await self._fleet.score(generator, self._pairs)
                reference = await asyncio.shield(current.reference)
            if version != current.version:
                raise ValueError(f"it serves {version} by now")
            gap = canary.compare(reference, scored)
        except Exception as error:
            self._skipped += 1
            log.warning("%s was not compared at version %s: %s", generator.name, current.version, error or "no answer")
            return
        self._gaps.append(gap)
        if gap.kl <= self._limit:
            if generator.name in self._disagreeing:
                self._disagreeing.discard(generator.name)
                self._say(f"{generator.name} and the learner agree again at equal weights (version {current.version}).")
        elif generator.name not in self._disagreeing:
            self._disagreeing.add(generator.name)
            self._alarm(generator, current.version, gap)

    def _alarm(self, generator: Generator, version: Version, gap: canary.Gap) -> None:
        text = (
            f"{generator.name} and the learner disagree at equal weights (version {version}): KL {gap.kl:.3g} nats per token, "
            f"limit {self._limit:g} (run.alarms.mismatch_kl); largest difference of a log-prob {gap.max_diff:.3g}. This is "
            "numerics, not staleness: compare generator.dtype with learner.dtype, the vllm: section, and whether every weight "
            "arrived; a smaller max_staleness does not help."
        )
        log.error(text)
        self._say(text)
