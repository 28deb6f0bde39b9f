"""Generators come and go while a run goes on: more of them, fewer, and another one for each that dies.

A newcomer gets a place of its own (what waits for one wakes Ray's autoscaler), starts beside the running loop, installs the
newest version and only then gets groups. One that leaves gets no groups and no versions any more, finishes what it has until
its deadline, and hands the rest over. One that died is started again in its place under its name, a few times.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import ray

from actors import placement
from actors.calls import CallFailed
from hapo_async.driver import tasks
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.generators import Generator
from hapo_async.driver.restarts import Budget
from hapo_async.driver.starter import Starter
from hapo_async.errors import RunError

log = logging.getLogger(__name__)

PLACE_S = 120.0  # until a replacement has a place, where its own is lost
LOOK_S = 0.2
PASSED_ON_S = 5.0  # until everybody has noticed that groups were handed over

Note = Callable[[str, str, str], None]
"""Takes kind, label and text of an event: see ``hapo_async.events``."""
HandOver = Callable[[Generator], Awaitable[tuple[int, int]]]
"""Ends what a generator is sampling; groups that will be continued elsewhere, groups that start from scratch."""


@dataclass(frozen=True)
class Left:
    """How a generator left. stays: why it did not."""

    name: str
    continued: int = 0
    again: int = 0
    stays: str = ""


class Upkeep:
    """Owns the fleet's coming and going. note: takes events."""

    def __init__(self, fleet: Fleet, starter: Starter, note: Note) -> None:
        self._restarts = 0
        self._fleet, self._starter, self._note = fleet, starter, note
        self._budgets: dict[str, Budget] = {}
        self._expected: dict[str, asyncio.Task[None]] = {}  # replacements
        self._newcomers = 0
        self._numbers = itertools.count(len(fleet.generators))
        self._closed = False
        fleet.upkeep = self

    def take(self) -> int:
        """Replacements that have started since the last call."""
        restarts, self._restarts = self._restarts, 0
        return restarts

    @property
    def expected(self) -> bool:
        """Whether a generator is on its way."""
        return bool(self._expected) or self._newcomers > 0

    @property
    def replacing(self) -> list[str]:
        """Names of dead members that are being replaced."""
        return list(self._expected)

    @property
    def count(self) -> int:
        """Members that stay: alive, or being replaced."""
        return sum(not g.leaving for g in self._fleet.alive) + len(self._expected)

    # ---------------------------------------------------------------- coming

    async def grow(self, deadline_s: float) -> str:
        """One more, from its place to its first install. Returns its name. Raises RunError; nothing of it is then left."""
        name, deadline = f"generator-{next(self._numbers)}", time.monotonic() + deadline_s
        self._newcomers += 1
        try:
            async with asyncio.timeout(deadline_s):
                generator = await self._bring_up(name, None, deadline_s)
        except TimeoutError:
            raise RunError(f"{name} was not ready within {deadline_s:.0f} s") from None
        finally:
            self._newcomers -= 1
            self._fleet.look_again(f"{name} did not start")
        await self._serving(name, deadline)
        member = self._current(name)
        if member is not None and member.serves:
            return name
        why = "did not install the newest weights in time" if generator.alive else "died, and was not back in time"
        if member is not None:
            await self._forget(member)
        raise RunError(f"{name} {why}")

    async def _serving(self, name: str, deadline: float) -> None:
        """Until the member of that name serves, is given up, or the deadline has passed."""
        while time.monotonic() < deadline:
            member = self._current(name)
            if member is None or member.serves or (not member.alive and name not in self._expected):
                return
            await asyncio.sleep(LOOK_S)

    def _current(self, name: str) -> Generator | None:
        return next((g for g in self._fleet.generators if g.name == name), None)

    async def _bring_up(self, name: str, slot: placement.Slot | None, place_s: float) -> Generator:
        """A member that has joined, in ``slot`` or in a place of its own. Raises RunError or CallFailed; its actor and its
        place are then given up."""
        slot = slot or await self._starter.place(name, place_s)
        actor = None
        try:
            actor = self._starter.spawn(name, slot)
            generator = Generator(name, actor, slot, await self._fleet.ready(name, actor))
            await self._fleet.join(generator)
        except BaseException:
            if actor is not None:
                ray.kill(actor)
            slot.release()
            raise
        return generator

    # ---------------------------------------------------------------- replacing

    def replace(self, dead: Generator, error: CallFailed) -> None:
        """Starts another one in the place of a dead one, unless that has happened too often. Generators that share a place
        with the learner are not replaced: a new engine needs the memory that the learner may be using."""
        wait_s = None if self._closed or dead.slot.is_part else self._wait_s(dead.name)
        if wait_s is None:
            dead.slot.release()  # somebody else may have it
            self._note("given_up", f"{dead.name} lost", f"{dead.name} is lost and not replaced: {error}")
            return
        text = f"{dead.name} is lost: {error}; another one is started in {wait_s:g} s"
        self._note("lost", f"{dead.name} lost", text)
        task = self._expected[dead.name] = asyncio.create_task(self._replace(dead, wait_s))
        task.add_done_callback(lambda t: self._replaced(dead.name, t))

    def _wait_s(self, name: str) -> float | None:
        return self._budgets.setdefault(name, Budget()).take(time.monotonic())

    async def _replace(self, dead: Generator, wait_s: float | None) -> None:
        slot: placement.Slot | None = dead.slot
        why = ""
        while wait_s is not None:
            await asyncio.sleep(wait_s)
            if slot is not None and not self._starter.is_whole(slot):
                slot.release()
                slot = None
            try:
                if slot is None:
                    slot = await self._starter.place(dead.name, PLACE_S)
            except RunError as error:
                why = str(error)  # a node is lost, and nothing takes its place: the fleet shrinks
                break
            try:
                await self._restart(dead, slot)
                return
            except (RunError, ray.exceptions.RayError) as error:
                log.error("%s could not be started again: %s", dead.name, error)
                slot, why = None, str(error)
            wait_s = self._wait_s(dead.name)
        raise RunError(why)

    async def _restart(self, dead: Generator, slot: placement.Slot) -> None:
        await self._fleet.weights.idle(dead)
        await self._bring_up(dead.name, slot, PLACE_S)
        self._restarts += 1
        self._note("replaced", f"{dead.name} back", f"{dead.name} has been started again")

    def _replaced(self, name: str, task: asyncio.Task[None]) -> None:
        """The task has ended. A member that died again meanwhile has another one."""
        if self._expected.get(name) is task:
            del self._expected[name]
        if task.cancelled() or self._closed:
            return
        why = ""
        if error := task.exception():
            if not isinstance(error, RunError):
                log.error("replacing %s failed", name, exc_info=error)
            why = f"{name} could not be started again: {error}"
            count = len(self._fleet.alive)
            self._note("given_up", f"{name} given up", f"{why}; {count} generators go on without it")
        self._fleet.look_again(why)

    # ---------------------------------------------------------------- leaving

    def victims(self, count: int) -> list[Generator]:
        """Those that leave first: dead ones that are being replaced, then the newest; none that is lent to an evaluation, and
        never the last that serves."""
        members = sorted(self._fleet.generators, key=lambda g: int(g.name.rpartition("-")[2]), reverse=True)
        dead = [g for g in members if not g.alive and g.name in self._expected][:count]
        free, wanted = [g for g in members if g.takes_weights], count - len(dead)
        if not any(g.serves for g in free[wanted:]):
            free = sorted(free, key=lambda g: g.serves)[:-1]  # newcomers first, and one stays
        return dead + free[:wanted]

    async def retire(self, generator: Generator, drain_s: float, hand_over: HandOver) -> Left:
        """Lets one go. What it has not finished after ``drain_s`` is handed over."""
        if not generator.alive:
            return await self._forget(generator)
        generator.leaving = True
        self._fleet.changed()
        continued = again = 0
        if not await self._drained(generator, drain_s):
            continued, again = await hand_over(generator)
            await self._drained(generator, PASSED_ON_S)
        if not generator.leaving:
            return Left(generator.name, continued, again, "no other one was left to training")
        await self._fleet.dismiss(generator)
        return Left(generator.name, continued, again)

    async def _drained(self, generator: Generator, deadline_s: float) -> bool:
        """Waits until nothing is in flight on one that leaves, or until it need not leave any more. False after the deadline."""
        deadline = time.monotonic() + deadline_s
        while generator.alive and generator.leaving and self._fleet.is_busy(generator):
            if time.monotonic() >= deadline:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    async def _forget(self, dead: Generator) -> Left:
        """One that is not wanted any more: neither it stays, nor what replaces it."""
        if task := self._expected.pop(dead.name, None):
            await tasks.end(task)
        if (member := self._current(dead.name)) is not None:  # by now it may have been replaced
            member.leaving = True
            await self._fleet.dismiss(member)
        return Left(dead.name)

    async def close(self) -> None:
        """Nothing is started from now on."""
        self._closed = True
        await tasks.end(*self._expected.values())
        self._expected.clear()
