"""The fleet: generators that leave training and come back, take turns with the learner, and are asked about themselves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from actors.calls import CallFailed
from actors.transports import Offer
from hapo_async import config
from hapo_async.driver import fleet as fleets
from hapo_async.driver import turns
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.errors import RunError
from hapo_async.types import GroupKey, GroupRequest, Sampling, Version
from tests.driver.stand_ins import Loop, StandInGenerator, StandInJudges, raised

FIRST, SECOND, THIRD = Version(1, 0), Version(1, 1), Version(1, 2)


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


def scenario(count: int, body: Callable[..., Any], **tree: Any) -> Any:
    """``body(fleet, actors)`` on a fleet of stand-ins that serve FIRST."""

    async def go() -> Any:
        actors = [StandInGenerator(f"g{i}") for i in range(count)]
        c = config.parse({"weights": {"deadline_s": 2.0}, **tree})
        fleet = Fleet(c, [Generator(a.name, a, None) for a in actors], lambda: None)  # type: ignore[arg-type]
        fleet.weights.publish(Offer("ray", FIRST))
        await fleet.wait_installed(FIRST, 2.0)
        return await body(fleet, actors)

    return asyncio.run(go())


async def give(fleet: Fleet, generator: Generator, uid: str) -> GroupKey:
    key = GroupKey(0, uid, 0)
    generator.assign(key, 8)
    await fleet.submit(generator, [GroupRequest(key, np.arange(3, dtype=np.int32), Sampling(2, 8))])
    return key


def test_a_detached_generator_finishes_first_and_keeps_its_version():
    async def body(fleet, actors):
        lent, other = fleet.generators
        actors[0].latency = lambda key: 0.05
        key = await give(fleet, lent, "a")
        detaching = asyncio.create_task(fleet.detach(lent, FIRST, 2.0))
        await asyncio.sleep(0)
        assert fleet.serving == [other] and fleet.alive == [lent, other]
        fleet.weights.publish(Offer("ray", SECOND))
        await fleet.collect(lent, key, 2.0)
        await asyncio.sleep(0.01)
        assert not detaching.done(), "its group has not been released"
        fleet.release(lent, key)
        await detaching
        fleet.weights.publish(Offer("ray", THIRD))
        await fleet.wait_installed(THIRD, 2.0)  # of those that serve
        assert (lent.installed, other.installed) == (FIRST, THIRD)
        fleet.attach(lent)
        assert fleet.serving == [lent, other]
        await fleet.wait_installed(THIRD, 2.0)
        return [a.installs for a in actors]

    assert scenario(2, body) == [[FIRST, THIRD], [FIRST, SECOND, THIRD]]


def test_what_is_installed_is_what_was_newest_when_it_was_detached():
    async def body(fleet, actors):
        lent = fleet.generators[0]
        actors[0].latency = lambda key: 0.02
        key = await give(fleet, lent, "a")
        actors[0].install_s = 0.02
        fleet.weights.publish(Offer("ray", SECOND))
        detaching = asyncio.create_task(fleet.detach(lent, SECOND, 2.0))
        await asyncio.sleep(0)
        fleet.weights.publish(Offer("ray", THIRD))
        await fleet.collect(lent, key, 2.0)
        fleet.release(lent, key)
        await detaching
        return lent.installed, actors[0].installs

    assert scenario(2, body) == (SECOND, [FIRST, SECOND])


def test_a_version_that_is_not_the_newest_or_the_last_generator_cannot_be_detached():
    async def body(fleet, actors):
        with pytest.raises(RunError, match=r"version 1\.1: the newest is 1\.0"):
            await fleet.detach(fleet.generators[0], SECOND, 1.0)
        await fleet.detach(fleet.generators[0], FIRST, 1.0)
        for generator in fleet.generators:  # one is lent already, the other is the last
            with pytest.raises(RunError, match="does not serve, or no other one does"):
                await fleet.detach(generator, FIRST, 1.0)

    scenario(2, body)


def test_a_generator_that_is_not_free_in_time_serves_on():
    async def body(fleet, actors):
        actors[0].latency = lambda key: 30.0
        await give(fleet, fleet.generators[0], "a")
        with pytest.raises(RunError, match="g0 was not free within"):
            await fleet.detach(fleet.generators[0], FIRST, 0.05)
        assert len(fleet.serving) == 2

    scenario(2, body)


@pytest.mark.parametrize("when", ["draining", "installing"])
def test_a_generator_that_dies_while_it_is_detached_is_out_of_service(when):
    async def body(fleet, actors):
        lent, dying = fleet.generators[0], actors[0]
        if when == "draining":
            dying.latency = lambda key: 30.0
            collecting = asyncio.create_task(fleet.collect(lent, await give(fleet, lent, "a"), 5.0))
        else:
            dying.install_s = 30.0
            fleet.weights.publish(Offer("ray", SECOND))
        version = FIRST if when == "draining" else SECOND
        detaching = asyncio.create_task(fleet.detach(lent, version, 5.0))
        await asyncio.sleep(0.01)
        dying.die()
        if when == "draining":
            with pytest.raises(CallFailed) as caught:
                await collecting
            fleet.mark_failed(lent, caught.value)  # what a follower does
        with pytest.raises(CallFailed, match="g0"):
            await detaching
        assert not lent.alive and fleet.serving == fleet.alive == fleet.generators[1:]

    scenario(2, body)


def test_training_goes_on_without_the_detached_generator():
    async def go():
        actors = [StandInGenerator("a"), StandInGenerator("b")]
        loop = Loop(actors, prompts=400, train={"steps": 40, "batch_prompts": 4}, max_staleness=2)
        lent = loop.fleet.generators[0]
        seen: dict[str, Any] = {}

        async def borrow():
            while loop.trainer.version.step < 5:
                await asyncio.sleep(0.001)
            seen["version"] = loop.trainer.version
            await loop.fleet.detach(lent, loop.trainer.version, 2.0)
            seen["issued"] = len(actors[0].issued)
            while loop.trainer.version.step < seen["version"].step + 10:
                await asyncio.sleep(0.001)
            seen["kept"] = lent.installed == seen["version"] and len(actors[0].issued) == seen["issued"]
            loop.fleet.attach(lent)

        borrowing = asyncio.create_task(borrow())
        await loop.run()
        await borrowing
        return loop, seen, len(actors[0].issued)

    loop, seen, issued = asyncio.run(go())
    assert seen["kept"], "a lent generator was given work, or another version"
    assert issued > seen["issued"], "it was never given work again"
    assert loop.trainer.version.step == 40 and max(loop.ages) <= 2


def test_one_that_refuses_to_sleep_for_a_while_stays_in_service(monkeypatch):
    """A group may still be in flight when its turn is over."""
    monkeypatch.setattr(turns, "REFUSED_S", 0.01)

    async def body(fleet, actors):
        refusals = iter([True, True, False])

        async def sleep() -> None:
            if next(refusals):
                raise raised("EngineError: 1 group is in flight")
            actors[0].asleep = True

        actors[0].sleep = actors[0]._method(sleep)
        await fleet.sleep()
        assert [a.asleep for a in actors] == [True, True] and fleet.serving == fleet.generators

    scenario(2, body)


def test_one_that_never_sleeps_is_out_of_service(monkeypatch):
    monkeypatch.setattr(turns, "REFUSED_S", 0.01)
    monkeypatch.setattr(turns, "PATIENCE_S", 0.1)

    async def body(fleet, actors):
        async def sleep() -> None:
            raise raised("EngineError: 1 group is in flight")

        actors[0].sleep = actors[0]._method(sleep)
        await fleet.sleep()
        assert fleet.serving == fleet.generators[1:] and actors[1].asleep

    scenario(2, body)


def test_all_that_serve_sleep_and_wake_and_a_silent_one_is_out_of_service():
    async def body(fleet, actors):
        await fleet.sleep()
        assert [a.asleep for a in actors] == [True, True]
        actors[1].die()
        await fleet.wake()
        assert [a.asleep for a in actors] == [False, True]
        assert fleet.serving == fleet.generators[:1]

    scenario(2, body)


def test_a_generator_scores_and_tells_about_itself():
    async def body(fleet, actors):
        prompt, tokens = np.arange(2, dtype=np.int32), np.array([3, 1], np.int32)
        version, (logp,) = await fleet.score(fleet.generators[0], [(prompt, tokens)])
        assert version == FIRST and logp.tolist() == [-3.0, -1.0]
        await give(fleet, fleet.generators[0], "a")
        stats = await fleet.stats(fleet.generators[0], 1.0)
        assert stats["running_groups"] == 1 and stats["version"] == str(FIRST)
        actors[0].die()
        with pytest.raises(CallFailed, match="g0"):
            await fleet.stats(fleet.generators[0], 1.0)

    scenario(1, body)


def test_installs_are_told_and_calls_are_seen_until_they_are_answered():
    async def body(fleet, actors):
        told = []
        fleet.weights.on_installed.append(lambda generator, version: told.append((generator.name, version)))
        actors[0].install_s = 0.02
        assert fleet.calls() == []
        fleet.weights.publish(Offer("ray", SECOND))
        actors[1].latency = lambda key: 30.0
        key = await give(fleet, fleet.generators[1], "a")
        collecting = asyncio.create_task(fleet.collect(fleet.generators[1], key, 5.0))
        await asyncio.sleep(0.005)
        assert {(c.actor, c.method, c.key) for c in fleet.calls()} == {("g0", "install", None), ("g1", "collect", key)}
        await fleet.wait_installed(SECOND, 2.0)
        assert sorted(told) == [("g0", SECOND), ("g1", SECOND)]
        collecting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await collecting
        assert fleet.calls() == []

    scenario(2, body)


def test_a_judgement_that_does_not_come_is_seen():
    from hapo_async.driver.judges import Judges
    from tests.driver.stand_ins import Method

    async def go():
        loop = asyncio.get_running_loop()
        silent = loop.create_future()
        actor = type("Actor", (), {"judge": Method(lambda *_: silent)})()
        judges = Judges(config.parse({}), {"verifier-0": actor})
        prompt = next(iter(Loop([], prompts=1).sampler.prompts.values()))
        key = GroupKey(0, "a", 0)
        judging = asyncio.create_task(judges.judge("payload", prompt, 2, key))
        await asyncio.sleep(0)
        (call,) = judges.calls()
        assert (call.actor, call.method, call.key) == ("verifier-0", "judge", key)
        silent.set_result(await StandInJudges().judge("payload", prompt, 2))
        assert len(await judging) == 2 and judges.calls() == []

    asyncio.run(go())
