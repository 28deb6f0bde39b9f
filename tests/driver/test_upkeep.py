"""Generators that do not start, die, and are replaced."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest

from actors.calls import CallFailed
from actors.transports import Member, Offer, Published
from hapo_async.driver.evaluation import Evaluator
from hapo_async.driver.generators import Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.watchdog import Watchdog
from hapo_async.errors import RunError
from hapo_async.types import Version
from tests.driver.living import Live, Places, Resuming, check, played
from tests.driver.stand_ins import StandInLearner


def test_no_place_is_an_error_to_whoever_asked_and_the_run_goes_on(clock):
    async def play(loop):
        await loop.at_step(3)
        assert await loop.scale(generators=4) == "failed"
        assert "no place within" in loop.told[-1]["line"] and "3 generators" in loop.told[-1]["line"]
        assert len(loop.names) == 3

    loop = played(clock, lambda: Live(1, Places(free=2), steps=20), play)
    check(loop)


def test_one_that_does_not_start_leaves_nothing_behind(clock):
    def make(name):
        actor = Resuming(name)
        actor.broken = True
        return actor

    async def play(loop):
        await loop.at_step(3)
        assert await loop.scale(generators=2) == "failed" and "no engine" in loop.told[-1]["line"]
        assert loop.names == ["generator-0"] and len(loop.fleet.generators) == 1

    loop = played(clock, lambda: Live(1, Places(make), steps=12), play)
    check(loop)
    assert loop.places.actors[0]._dead.done() and loop.places.slots[0].released == 1


def test_one_that_dies_before_its_first_install_is_started_again(clock):
    made: list[Resuming] = []

    def make(name):
        made.append(Resuming(name))
        made[-1].install_s = 1e6 if len(made) == 1 else 0.0
        return made[-1]

    async def play(loop):
        await loop.at_step(3)
        scaling = asyncio.create_task(loop.scale(generators=2))
        await loop.until(lambda: len(loop.fleet.generators) == 2)
        assert loop.names == ["generator-0"], "it serves without weights"
        made[0].die()
        assert await scaling == "done" and loop.names == ["generator-0", "generator-1"]

    loop = played(clock, lambda: Live(1, Places(make), steps=30), play)
    check(loop)
    assert not made[0].issued and made[1].issued and len(loop.places.slots) == 1, "it lost its place"


def test_one_that_gets_no_weights_in_time_is_no_member(clock):
    def make(name):
        actor = Resuming(name)
        actor.install_s = 1e6
        return actor

    async def play(loop):
        await loop.at_step(3)
        assert await loop.scale(generators=2, wait=30.0) == "failed" and "newest weights" in loop.told[-1]["line"]
        assert [g.name for g in loop.fleet.generators] == ["generator-0"]

    tree = {"weights": {"deadline_s": 500.0}}
    loop = played(clock, lambda: Live(1, Places(make), steps=60, **tree), play)
    check(loop)
    assert loop.places.actors[0]._dead.done() and loop.places.slots[0].released == 1


def test_a_run_that_ends_gives_up_what_is_being_started(clock):
    async def go() -> Live:
        loop = Live(1, steps=4)
        loop.places.make = lambda name: _slow(name)

        async def play(loop):
            await loop.at_step(2)
            await loop.scale(generators=3)

        playing = asyncio.create_task(play(loop))
        await loop.run(1000.0)
        assert not playing.done()
        playing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await playing
        await loop.upkeep.close()
        return loop

    def _slow(name):
        actor = Resuming(name)
        actor.ready_s = 1e5
        return actor

    loop = clock.run(go())
    check(loop)
    assert loop.told[-1]["state"] == "failed" and loop.told[-1]["line"] == "the run ends"
    assert len(loop.places.actors) == 2 and all(a._dead.done() for a in loop.places.actors)
    assert [slot.released for slot in loop.places.slots] == [1, 1]


def test_a_dead_one_comes_back_in_its_place_and_serves_the_newest_version(clock):
    async def play(loop):
        await loop.at_step(3)
        dead, slot = loop.member("generator-1"), loop.member("generator-1").slot
        loop.actors["generator-1"].die()
        await loop.until(lambda: not dead.alive)
        assert loop.names == ["generator-0"] and loop.upkeep.replacing == ["generator-1"]
        await loop.until(lambda: len(loop.names) == 2)
        back = loop.member("generator-1")
        assert back is not dead and back.slot is slot and back.installed == loop.fleet.weights.newest
        loop.fleet.mark_failed(dead, CallFailed("generator-1", "a call of long ago", gone=True))
        assert back.alive, "a failure of the dead one hit its replacement"

    loop = played(clock, lambda: Live(2, steps=30), play)
    check(loop)
    assert loop.upkeep.take() == 1 and loop.upkeep.take() == 0
    assert loop.places.actors[0].issued and not loop.places.slots
    assert [note[0] for note in loop.notes] == ["lost", "replaced"]


def test_the_only_one_dies_and_the_run_waits_for_the_next(clock):
    async def play(loop):
        await loop.at_step(3)
        loop.actors["generator-0"].die()
        await loop.until(lambda: not loop.fleet.alive)
        await loop.fleet.wait_installed(loop.trainer.version, 1.0)
        assert loop.names == ["generator-0"]

    loop = played(clock, lambda: Live(1, steps=20), play)
    check(loop)


def test_one_that_dies_again_and_again_is_given_up_and_the_last_ends_the_run(clock):
    def make(name):
        actor = Resuming(name, lambda key: 1e6)
        asyncio.get_running_loop().call_later(10.0, actor.die)
        return actor

    async def play(loop):
        await loop.at_step(3)
        loop.actors["generator-1"].die()
        slot = loop.member("generator-1").slot
        await loop.until(lambda: any(note[0] == "given_up" for note in loop.notes))
        assert slot.released == 1, "its place is nobody else's"
        assert loop.names == ["generator-0"] and len(loop.places.actors) == 3, "not three tries"
        loop.places.make = _broken
        loop.actors["generator-0"].die()

    def _broken(name):
        actor = Resuming(name)
        actor.broken = True
        return actor

    with pytest.raises(RunError, match="no generator is left; generator-0 could not be started again"):
        played(clock, lambda: Live(2, Places(make), steps=400, prompts=2000), play)


def test_a_lost_node_means_another_place_or_a_smaller_fleet(clock):
    async def play(loop):
        await loop.at_step(3)
        for name in ("generator-1", "generator-2"):
            loop.member(name).slot.whole = False
            loop.actors[name].die()
            await loop.until(lambda name=name: loop.notes and loop.notes[-1][0] in ("replaced", "given_up"))
            loop.outcomes.append((loop.notes.pop()[0], len(loop.fleet.alive)))

    def make() -> Live:
        loop = Live(3, Places(free=1), steps=40)
        loop.outcomes = []
        return loop

    loop = played(clock, make, play)
    check(loop)
    assert loop.outcomes == [("replaced", 3), ("given_up", 2)]
    assert loop.fleet.generators[1].slot is loop.places.slots[0]


def test_after_the_end_nothing_is_started(clock):
    async def go() -> Live:
        loop = Live(3, steps=3)
        await loop.run(500.0)
        loop.fleet.mark_failed(loop.fleet.generators[0], CallFailed("generator-0", "died", gone=True))
        await loop.upkeep.close()
        loop.fleet.mark_failed(loop.fleet.generators[1], CallFailed("generator-1", "died", gone=True))
        await asyncio.sleep(100.0)
        return loop

    loop = clock.run(go())
    assert not loop.places.actors and not loop.upkeep.replacing


class Lockstep(StandInLearner):
    """Its versions reach only those that were there when they left; snapshots reach anybody."""

    def __init__(self) -> None:
        super().__init__()
        self.members: tuple[str, ...] = ()
        self.snapshots: list[Version] = []

    async def announce(self, version: Version, members: list[Member]) -> Offer:
        self.members = tuple(f"{m.name} {m.key}" for m in members)
        return Offer("gloo", version, members=tuple(m.name for m in members))

    async def publish(self, version: Version, transport: str = "") -> Published:
        if transport == "ray":
            self.snapshots.append(version)
            return Published(Offer("ray", version))
        return Published(Offer("gloo", version, members=tuple(m.partition(" ")[0] for m in self.members)))


def test_in_lockstep_one_that_comes_back_gets_a_snapshot_even_while_the_learner_waits(clock):
    async def play(loop):
        await loop.at_step(3)
        loop.actors["generator-0"].die()
        await loop.until(lambda: not loop.fleet.alive)
        (back,) = await loop.trainer.attended(loop.fleet.someone())
        assert back.installed == loop.learner.snapshots[-1] == loop.trainer.version
        await loop.at_step(6)
        assert loop.learner.members == ("generator-0 key of generator-0",)
        assert loop.fleet.weights.failed == 0, "it was asked to install what it could not have"

    loop = played(clock, lambda: Live(1, steps=20, trains=Lockstep()), play)
    check(loop)
    assert len(loop.learner.snapshots) == 1


def test_a_barrier_evaluation_waits_for_the_only_generator_to_come_back(clock):
    async def go():
        loop = Live(1)
        await loop.trainer.publish()
        await loop.trainer.everywhere()
        questions = {"set": list(loop.sampler.prompts.values())[:6]}
        evaluator = Evaluator(loop.config, questions, loop.fleet, loop.judges)  # type: ignore[arg-type]
        asking = asyncio.create_task(evaluator.run(0, version=loop.trainer.version))
        await loop.until(lambda: loop.actors["generator-0"].issued)
        loop.actors["generator-0"].die()
        values = await asking
        await loop.upkeep.close()
        return values, loop.places.actors[0]

    values, second = clock.run(go())
    assert values["eval/set/prompts"] == 6 and second.issued


def test_the_watchdog_asks_the_replacement_and_not_the_dead_one(clock):
    async def go():
        loop = Live(1)
        loop.learner.ranks = []
        parts = (loop.fleet, Judges(loop.config, {}), loop.learner, loop.sampler, loop.buffer, loop.ledger)
        dog = Watchdog(loop.config, *parts, Path("/nowhere"), print)  # type: ignore[arg-type]
        dog._know(clock.now)
        (dead,) = loop.fleet.generators
        dead.alive, loop.fleet.generators[0] = (
            False,
            Generator("generator-0", loop.places.make("generator-0"), dead.slot),
        )
        dog._know(clock.now)
        reading = await dog._pulses["generator-0"].actor.ask(1.0)
        loop.actors["generator-0"].die()
        assert await dog._pulses["generator-0"].actor.ask(1.0) == reading

    clock.run(go())
