"""Groups that leave a generator in the middle of their answers and are continued on another one.

    moving      ended on the old generator, asked for what they are so far; the attempt is the old one
    waiting     for a generator with room; still in flight, at the age of their oldest token
    issued      a new attempt with those answers as prefixes: whatever the old one still brings is fenced by its number

Nothing of this needs capacity from the admission rule: the number of untrained groups stays, and so does each one's step,
since only a generator that serves that step or a newer one may continue it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.calls import CallFailed
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.flights import GENERATING, MOVING, Flight
from hapo_async.driver.generators import Generator
from hapo_async.driver.retries import Retries
from hapo_async.ledger import Ledger
from hapo_async.types import Answer, GroupKey, GroupRequest, Prompt, Sampling

log = logging.getLogger(__name__)

WAIT_S = 30.0  # for a generator with room; then the group is sampled from scratch
ARRIVE_S = 5.0  # for answers that were complete already and are on their way to the driver


@dataclass(frozen=True)
class _Waiting:
    """deadline: ``time.monotonic`` at which it is given back."""

    key: GroupKey
    prefixes: tuple[Answer, ...]
    deadline: float


class HandOver:
    """flights, ledger, retries: the sampler's. sampling: the parameters of a prompt. wake: called when there may be something
    to place."""

    def __init__(
        self,
        flights: dict[GroupKey, Flight],
        ledger: Ledger,
        retries: Retries,
        sampling: Callable[[Prompt], Sampling],
        wake: Callable[[], None],
    ) -> None:
        self._flights, self._ledger, self._retries = flights, ledger, retries
        self._sampling, self._wake = sampling, wake
        self._queue: list[_Waiting] = []

    async def take_from(self, fleet: Fleet, generator: Generator) -> tuple[int, int]:
        """Ends what a generator is sampling. Returns how many groups will be continued elsewhere, and how many are sampled
        from scratch."""
        keys = [k for k in generator.outstanding if (f := self._flights.get(k)) and f.stage == GENERATING]
        for key in keys:
            self._flights[key].stage = MOVING
        try:
            found = await fleet.hand_over(generator, keys) if keys else []
        except CallFailed as error:
            log.warning("%s handed nothing over: %s", generator.name, error)
            fleet.mark_failed(generator, error)
            found = []
        deadline = time.monotonic() + WAIT_S
        for _, group in found:
            if self._is_moving(group.key):
                self._queue.append(_Waiting(group.key, tuple(a for a in group.answers if a.length), deadline))
        told = {group.key for _, group in found}
        lost = await self._arrived([key for key in keys if key not in told], generator)
        for key in lost:
            self._from_scratch(key)
        asyncio.get_running_loop().call_later(WAIT_S, self._wake)
        self._wake()
        return len(told), len(lost)

    async def _arrived(self, keys: list[GroupKey], generator: Generator) -> list[GroupKey]:
        """Those that nobody knows: neither ended nor, a moment later, complete."""
        deadline = time.monotonic() + ARRIVE_S
        while any(k in generator.outstanding for k in keys) and generator.alive and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        return [key for key in keys if self._is_moving(key)]

    def place(self, fleet: Fleet, max_concurrent: int, tokens: float) -> list[tuple[Generator, GroupRequest]]:
        """New attempts of those that a generator has room for now, each on the one with the fewest tokens outstanding.
        tokens: estimate of an answer's length."""
        issued, now = [], time.monotonic()
        for waiting in list(self._queue):
            if not self._is_moving(waiting.key):  # given up as too late, or recalled
                self._queue.remove(waiting)
                continue
            old = self._flights[waiting.key]
            roomy = [
                g
                for g in fleet.serving
                if g.installed is not None and g.installed.step >= old.step and len(g.outstanding) < max_concurrent
            ]
            if roomy:
                self._queue.remove(waiting)
                target = min(roomy, key=lambda g: g.load)
                issued.append((target, self._issue(waiting, old, target, tokens)))
            elif now >= waiting.deadline:
                self._queue.remove(waiting)
                self._from_scratch(waiting.key)
        return issued

    def _issue(self, waiting: _Waiting, old: Flight, target: Generator, tokens: float) -> GroupRequest:
        del self._flights[waiting.key]
        self._ledger.retry(waiting.key, "handed over")
        key = self._ledger.issue(waiting.key.epoch, waiting.key.uid)
        sampling = self._sampling(old.prompt)
        done = sum(a.length for a in waiting.prefixes)
        target.assign(key, max(sampling.n, int(sampling.n * (len(old.prompt.tokens) + tokens)) - done))
        self._flights[key] = Flight(old.prompt, target.name, old.step, time.monotonic())
        return GroupRequest(key, old.prompt.tokens, sampling, waiting.prefixes)

    def _from_scratch(self, key: GroupKey) -> None:
        del self._flights[key]
        self._retries.recalled(key)

    def _is_moving(self, key: GroupKey) -> bool:
        flight = self._flights.get(key)
        return flight is not None and flight.stage == MOVING and self._ledger.is_current(key)
