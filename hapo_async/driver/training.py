"""From buffer to published weights: the learner's side of the loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from actors.learner import LearnerGroup
from actors.transports import Offer
from hapo_async import advantage, batch
from hapo_async.admission import overdue
from hapo_async.buffer import Buffer, Ready
from hapo_async.config import Config
from hapo_async.driver import tasks
from hapo_async.driver.distribution import GRACE_S, SNAPSHOT
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.likeliest import choose_likeliest
from hapo_async.driver.sampling import Sampler
from hapo_async.errors import RunError
from hapo_async.learner.blame import Blame
from hapo_async.ledger import Ledger
from hapo_async.types import GroupKey, Version
from hapo_async.words import plural

log = logging.getLogger(__name__)

T = TypeVar("T")

WANTING_S = 0.5
ANNOUNCE_TRIES = 5


@dataclass
class StepTimes:
    """Seconds of one step, by the names of the metric registry without prefix and suffix."""

    began: float = field(default_factory=time.monotonic)
    wait_for_batch: float = 0.0
    wait_for_stale: float = 0.0
    learn: float = 0.0
    sync: float = 0.0
    eval: float = 0.0
    checkpoint: float = 0.0

    def metrics(self) -> dict[str, float]:
        names = ("wait_for_batch", "wait_for_stale", "learn", "sync", "eval", "checkpoint")
        return {"time/step_s": time.monotonic() - self.began, **{f"time/{n}_s": getattr(self, n) for n in names}}


@dataclass(frozen=True)
class Trained:
    """One committed step: what was trained, the learner's metrics, seconds."""

    step: int
    groups: list[Ready]
    learner: dict[str, float]
    times: StepTimes


async def _nothing(version: Version) -> None:
    pass


class Trainer:
    """Takes batches oldest first, steps, publishes, commits to the ledger. It owns the version. at_publish: awaited with
    each version after the learner has given it out, before generators get it and before the next step changes it."""

    def __init__(
        self,
        config: Config,
        learner: LearnerGroup,
        fleet: Fleet,
        sampler: Sampler,
        ledger: Ledger,
        buffer: Buffer,
        version: Version,
    ) -> None:
        self.config = config
        self.learner = learner
        self.fleet = fleet
        self.sampler = sampler
        self.ledger = ledger
        self.buffer = buffer
        self.version = version
        self.stopping = False
        self.enough = False  # the run is to end after this step, as if its data had
        self.expired = self.late = self.truncated = 0  # groups, since the journal last looked
        fleet.weights.admit = learner.admit
        self.at_publish: Callable[[Version], Awaitable[None]] = _nothing
        self.failed_transfers = 0  # versions, since the journal last looked
        self.in_step: list[Ready] = []  # taken from the buffer, and not in the ledger's history yet
        self.poisoned = 0  # groups, since the journal last looked
        self._bad_steps = 0
        self._in_turn = False

    def roll_back(self, version: Version) -> None:
        """The learner was loaded from a checkpoint: it goes on from there as ``version``."""
        self.version, self.in_step, self._bad_steps, self.enough = version, [], 0, False
        self.sampler.step, self.sampler.incarnation, self.sampler.hold = version.step, version.incarnation, False
        self.sampler.wake()

    async def publish(self) -> None:
        """Hands the learner's weights to the fleet under the current version."""
        self.fleet.weights.publish(await self._gather(StepTimes()))

    async def everywhere(self) -> None:
        """Until every serving generator has the current version; one that takes longer than two tries serves no more. Raises
        RunError when nobody is left."""
        deadline_s = 2 * (self.config.weights.deadline_s + GRACE_S)
        await self.attended(self.fleet.wait_installed(self.version, deadline_s))

    async def attended(self, work: Coroutine[Any, Any, T]) -> T:
        """What the work brings, for which the learner waits: generators that come meanwhile get the current version."""
        working = asyncio.create_task(work)
        try:
            while not working.done():
                await self._serve_wanting()
                await asyncio.wait({working}, timeout=WANTING_S)
            return working.result()
        finally:
            await tasks.end(working)

    async def _gather(self, times: StepTimes) -> Offer:
        """The current version on its way, and measured by ``at_publish``."""
        async with self.turn():
            began = time.monotonic()
            offer = await self._send()
            times.sync += time.monotonic() - began
            await self.at_publish(self.version)
        return offer

    async def _send(self) -> Offer:
        """The current version, gathered and on its way. What could not be sent to several at once is sent once more as a
        snapshot, after those that are dead or frozen were found. Raises RunError when that fails too."""
        weights = self.fleet.weights
        announced = await self._announce()
        if announced is not None:
            weights.announce(announced)
        published = await self.learner.publish(self.version)
        if published.offer is not None:
            if published.offer.members is not None:
                await weights.fetched()
            return published.offer
        self.failed_transfers += 1
        log.error("version %s did not reach the generators: %s", self.version, published.error)
        await self.fleet.probe()
        return await self._snapshot()

    async def _announce(self) -> Offer | None:
        """Where all take part in lockstep, nobody may be a member who left or was lent while the learner got ready."""
        for _ in range(ANNOUNCE_TRIES):
            members = self.fleet.members
            announced = await self.learner.announce(self.version, members)
            self.fleet.weights.invited(members)
            if announced is None or announced.members is None:
                return announced
            if set(announced.members) <= {m.name for m in self.fleet.members}:
                return announced
        return announced

    async def _snapshot(self) -> Offer:
        """The current version for anybody who asks, through the object store."""
        published = await self.learner.publish(self.version, SNAPSHOT)
        if published.offer is None:
            raise RunError(f"version {self.version} could not be published: {published.error}")
        return published.offer

    async def _serve_wanting(self) -> None:
        """Generators that came after the newest version, or missed it, and have no other way to get it."""
        if self.fleet.weights.wanting and self.fleet.weights.newest == self.version:
            async with self.turn():
                offer = await self._snapshot()
            self.fleet.weights.publish(offer)

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The learner's turn on devices that it shares with the generators (``generator.placement=colocated``): they sleep
        meanwhile. What is still in flight then (a run that ends early) is recalled. Elsewhere, and inside another turn, this
        does nothing."""
        if self._in_turn or self.config.generator.placement != "colocated":
            yield
            return
        self._in_turn, held, self.sampler.hold = True, self.sampler.hold, True
        try:
            await self.sampler.returns.recall(self.fleet)
            await self.fleet.sleep()
            await self.learner.wake()
            yield
            await self.learner.sleep()
            await self.fleet.wake()
        finally:
            self._in_turn, self.sampler.hold = False, held
            self.sampler.wake()

    async def run(self, committed: Callable[[Trained], Awaitable[StepTimes]]) -> None:
        """Steps until train.steps, until the data end, or until ``stopping`` or ``enough``. ``committed`` is awaited after
        each step: evaluation, metrics and checkpoint happen there, at the step boundary. It returns the next step's clock,
        which holds what came after the row was written."""
        times = StepTimes()
        while self.version.step < self.config.train.steps and not self.stopping and not self.enough:
            self.in_step = groups = await self._next_batch(times)
            if not groups:
                return
            async with self.turn():
                completed = await self._complete(groups, times)
                learned = await self._step(completed, times)
                if learned is None:
                    continue
                offer = await self._gather(times)
            groups = completed
            began = time.monotonic()
            # Such a run samples nothing beside an evaluation: its batches then never depend on timing.
            self.sampler.hold = self.config.is_timing_free
            self.fleet.weights.publish(offer)
            for group in groups:
                self.ledger.train(group.key, self.version.step)
            self.in_step = []
            self.ledger.check()
            self.sampler.step = self.version.step
            self.sampler.wake()
            times.sync += time.monotonic() - began
            times = await committed(Trained(self.version.step, groups, learned, times))
            self.sampler.hold = False
            self.sampler.wake()
            del groups, completed  # their payloads may leave the object store

    # ---------------------------------------------------------------- batches

    async def _next_batch(self, times: StepTimes) -> list[Ready]:
        """A full batch, or what is left at the end of the data, or [] when nothing is left or the run is stopping."""
        step, eta, wanted = self.version.step, self.config.max_staleness, self.config.train.batch_prompts
        await self._wait_for_fill(wanted, times)
        if self.stopping:
            return []
        await self._wait_for_overdue(step, eta, times)
        if self.stopping:
            return []
        expired = self.buffer.take_expired(step, eta)
        self.expired += len(expired)
        self.sampler.returns.expired(expired, step)
        if len(self.buffer) < wanted and not self.sampler.drained:
            return await self._next_batch(times)
        return self.buffer.take(wanted, step, eta)

    async def _wait_for_fill(self, wanted: int, times: StepTimes) -> None:
        began = time.monotonic()
        limit_s = self.config.generator.deadline_s + 60.0
        while True:
            await self._serve_wanting()
            if self._filled(wanted) or self.sampler.drained or self.stopping:
                break
            try:
                await self._arrival(limit_s)
            except TimeoutError:
                raise RunError(f"no group arrived for {limit_s:.0f} s: {self.sampler.oldest_call()}") from None
        times.wait_for_batch += time.monotonic() - began

    def _filled(self, wanted: int) -> bool:
        """Enough groups wait. Under a forced lag: as many batches as it takes for the oldest to have that age, and nothing
        in flight, so that no group is sampled across an update. Demonstrations have no age."""
        lag = self.config.staleness.force_lag
        if not lag or self.sampler.demonstrations_ahead:
            return len(self.buffer) >= wanted
        return len(self.buffer) >= (lag + 1) * wanted and not self.sampler.flights

    async def _wait_for_overdue(self, step: int, eta: int, times: StepTimes) -> None:
        """Waits for groups that would be too old at step + 1; past the deadline they are cut short or dropped."""
        began = time.monotonic()
        truncated = False
        deadline = began + self.config.staleness.late_deadline_s
        self.late += len(self._late(step, eta))
        while not self.stopping and (late := self._late(step, eta)):
            try:
                await self._arrival(max(0.01, deadline - time.monotonic()))
            except TimeoutError:
                if self.config.staleness.late == "wait":
                    # A group that never comes fails at generator.deadline_s, and is then issued again.
                    deadline = time.monotonic() + self.config.generator.deadline_s
                elif self.config.staleness.late == "truncate" and not truncated:
                    truncated = True
                    deadline = time.monotonic() + self.config.staleness.late_deadline_s
                    self.truncated += len(late)
                    # A generator that is silent must not hold up the learner for longer.
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(self.config.staleness.late_deadline_s):
                            await self.fleet.truncate(self.fleet.owners(late))
                else:
                    await self.sampler.returns.late(self.fleet, late, step)
        times.wait_for_stale += time.monotonic() - began

    def _late(self, step: int, eta: int) -> list[GroupKey]:
        flights = self.sampler.flights
        newest = overdue(
            [f.step for f in flights.values()],
            self.buffer.oldest_steps(),
            step=step,
            max_staleness=eta,
            batch_prompts=self.config.train.batch_prompts,
        )
        return [] if newest is None else [k for k, f in flights.items() if f.step <= newest]

    async def _arrival(self, timeout_s: float) -> None:
        """Until something arrives or changes. Raises TimeoutError, or what a follower raised.

        Callers test their condition before and after; no other coroutine runs between the test and ``clear``.
        """
        self.sampler.arrived.clear()
        self.sampler.check()
        self.fleet.check()
        try:
            async with asyncio.timeout(timeout_s):  # wait_for of Python 3.11 may lose a cancellation
                await self.sampler.arrived.wait()
        finally:
            self.sampler.check()
            self.fleet.check()

    # ---------------------------------------------------------------- the step

    async def _complete(self, groups: list[Ready], times: StepTimes) -> list[Ready]:
        """What the composition left open until the batch and the policy are known: the likeliest teacher, and advantages
        that are made over the whole batch."""
        if self.config.gate.teacher == "likeliest":
            began = time.monotonic()
            groups = await choose_likeliest(groups, self.learner.score)
            times.learn += time.monotonic() - began
        if advantage.of(self.sampler.algorithm.advantage_for(self.sampler.options)).whole_batch:
            whitened = advantage.whiten_batch([g.train for g in groups])
            groups = [replace(g, train=train) for g, train in zip(groups, whitened, strict=True)]
        return groups

    async def _step(self, groups: list[Ready], times: StepTimes) -> dict[str, float] | None:
        """The learner's metrics; None when the step was skipped on all ranks. Raises RunError after too many of those."""
        c = self.config
        trains, pairs = [g.train for g in groups], self.sampler.options.get("pairs")
        plans = batch.plan_step(trains, c.learner.ranks, c.learner.mini_batches, self.version, seed=c.seed, pairs=pairs)
        began = time.monotonic()
        learned = await self._while_prefetching(self.learner.step(plans))
        times.learn += time.monotonic() - began
        skipped = learned.pop("skipped", False)
        if skipped:  # they go back as they came: what was made of the whole batch belongs to that batch alone
            taken, self.in_step = self.in_step, []
            self.sampler.returns.unmade(taken, self.learner.blamed, self.version.step)
        else:
            self._bad_steps = 0
            self.version = Version(self.version.incarnation, self.version.step + 1)
        blamed = [blame for blame in self.learner.blamed if not blame.is_lost]
        self.poisoned += len(blamed)
        if not skipped:
            for blame in blamed:  # of a mini-batch whose update was not made
                self.sampler.returns.note_poisoned(blame, self.version.step - 1)
            return learned
        if blamed or not self.learner.blamed:
            self._count_bad_step(blamed)
        return None

    def _count_bad_step(self, blamed: list[Blame]) -> None:
        """Raises RunError after too many in a row."""
        self._bad_steps += 1
        why = "; ".join(f"group {blame.key}: {blame.reason}" for blame in blamed[:3]) or "loss or gradient not finite"
        log.error("step skipped: %s (%d in a row)", why, self._bad_steps)
        if self._bad_steps >= self.config.learner.max_bad_steps:
            raise RunError(
                f"{plural(self._bad_steps, 'step')} in a row could not be made (learner.max_bad_steps); the last: {why}. Lower "
                "learner.lr, or look at quarantine.jsonl and the last groups in rollouts/."
            )

    async def _while_prefetching(self, step: Awaitable[dict[str, float]]) -> dict[str, float]:
        """The step's result. While it computes, what will probably be the next batch is brought to the learner's nodes."""
        stepping, sent = asyncio.ensure_future(step), set[GroupKey]()
        try:
            while not stepping.done() and self.learner.is_remote:
                soon = self.buffer.oldest(self.config.train.batch_prompts)
                new = [g for g in soon if g.key not in sent and g.gated.payload is not None]
                sent.update(g.key for g in new)
                if new:
                    self.learner.prefetch([g.gated.payload for g in new])
                self.sampler.arrived.clear()
                arrival = asyncio.ensure_future(self.sampler.arrived.wait())
                try:
                    await asyncio.wait({stepping, arrival}, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    arrival.cancel()
            return await stepping
        finally:
            stepping.cancel()
