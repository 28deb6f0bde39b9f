"""A live run is scaled up and down while the loop goes on: nothing is lost or trained twice."""

from __future__ import annotations

import asyncio

import pytest

from hapo_async import control
from hapo_async.errors import ConfigError
from tests.driver.living import Live, check, played


def test_one_becomes_four_becomes_two_and_nothing_is_lost_or_trained_twice(clock):
    async def play(loop):
        await loop.at_step(5)
        assert await loop.scale(generators=4) == "done"
        assert loop.names == [f"generator-{i}" for i in range(4)]
        await loop.at_step(30)
        assert await loop.scale(generators=2) == "done"
        assert loop.names == ["generator-0", "generator-1"]
        await loop.at_step(40)
        assert await loop.scale(generators=3) == "done"
        assert loop.names[-1] == "generator-4", "a name was used again"

    loop = played(clock, lambda: Live(1), play)
    check(loop)
    assert all(0 < most <= 4 for most in loop.most.values()) and len(loop.most) == 5
    assert [slot.released for slot in loop.places.slots] == [0, 1, 1, 0]
    gone = [a for a in loop.places.actors if a.name in ("generator-2", "generator-3")]
    assert all(a.closed and a.issued for a in gone) and not any(g.joining for g in loop.fleet.generators)
    assert [note[1] for note in loop.notes] == ["generators 1 → 4", "generators 4 → 2", "generators 2 → 3"]


def test_scaling_down_while_a_publish_is_under_way(clock):
    async def play(loop):
        await loop.at_step(4)
        for actor in loop.actors.values():
            actor.install_s = 6.0
        await loop.until(lambda: any(c.method == "install" and c.actor == "generator-2" for c in loop.fleet.calls()))
        assert await loop.scale(generators=1, drain=30.0) == "done"
        assert loop.actors["generator-2"].closed
        version = loop.trainer.version
        await loop.fleet.wait_installed(version, 20.0)
        assert await loop.scale(generators=2) == "done" and loop.names == ["generator-0", "generator-3"]

    loop = played(clock, lambda: Live(3, steps=40), play)
    check(loop)
    assert loop.fleet.weights.failed == 0, "a generator was closed in the middle of an install"


def test_one_that_dies_while_it_leaves_is_not_replaced(clock):
    async def play(loop):
        await loop.at_step(3)
        scaling = asyncio.create_task(loop.scale(generators=1, drain=20.0))
        await loop.until(lambda: loop.member("generator-1").leaving)
        loop.actors["generator-1"].die()
        assert await scaling == "done"
        assert loop.names == ["generator-0"] and not loop.upkeep.replacing

    loop = played(clock, lambda: Live(2, latency=lambda key: 10.0, steps=12), play)
    check(loop)
    assert not loop.places.actors


def test_the_other_one_dies_while_the_last_leaves_and_it_stays(clock):
    async def play(loop):
        await loop.at_step(3)
        scaling = asyncio.create_task(loop.scale(generators=1, drain=50.0))
        await loop.until(lambda: loop.member("generator-1").leaving)
        loop.places.free = 0
        loop.member("generator-0").slot.whole = False
        loop.actors["generator-0"].die()
        assert await scaling == "failed" and "generator-1 stays" in loop.told[-1]["line"]
        assert loop.names == ["generator-1"]

    check(played(clock, lambda: Live(2, latency=lambda key: 5.0, steps=12), play))


def test_one_that_is_lent_to_an_evaluation_is_no_victim_and_the_last_that_serves_waits_for_it(clock):
    async def play(loop):
        await loop.at_step(3)
        newest = loop.fleet.generators[2]
        await loop.fleet.detach(newest, loop.trainer.version, 60.0)
        assert await loop.scale(generators=2) == "done"
        assert [g.name for g in loop.fleet.alive] == ["generator-0", "generator-2"]
        scaling = asyncio.create_task(loop.scale(generators=1, wait=200.0))
        await asyncio.sleep(20.0)
        assert loop.names == ["generator-0"] and not scaling.done(), "training was left alone"
        loop.fleet.attach(newest)
        assert await scaling == "done" and len(loop.fleet.alive) == 1

    check(played(clock, lambda: Live(3, steps=40), play))


def test_requests_are_met_one_after_the_other_and_answered(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(control, "driver_of", lambda run_dir: 1)
    (tmp_path / "config.yaml").touch()
    outcomes = []

    async def asked(*words: str) -> list[str]:
        request = control.new_request(words, 5.0, 100.0)
        control.submit(tmp_path, request)
        with pytest.raises(ConfigError, match="another request is being met"):
            control.submit(tmp_path, control.new_request(["generators=7"]))
        while not (answer := control._answer(tmp_path, request)).outcome:
            await asyncio.sleep(0.5)
        outcomes.append(answer.outcome)
        return list(answer.lines)

    async def play(loop):
        with pytest.raises(ConfigError, match="starting or ending"):
            control.submit(tmp_path, control.new_request(["generators=2"]))
        serving = asyncio.create_task(loop.scaler(tmp_path).run())
        await loop.at_step(2)
        lines = await asked("generators=3", "verifiers=2")
        assert {"generator-1 serves", "generator-2 serves", "verifier-1 serves"} < set(lines)
        assert lines[-1] == "3 generators, 2 verifiers"
        lines = await asked("generators=1", "verifiers=1")
        assert {"generator-1 has left", "verifier-1 has left"} <= {line.partition(";")[0] for line in lines}
        waiting = control.new_request(["generators=2"])
        (tmp_path / "control" / "request.json").write_text("{" * 10)
        await asyncio.sleep(3.0)
        assert not (tmp_path / "control" / "request.json").exists(), "what is no request stayed"
        serving.cancel()
        control.submit(tmp_path, waiting)
        await asyncio.wait({serving})
        assert control._answer(tmp_path, waiting).outcome == "failed"
        assert not (tmp_path / "control" / "driver.json").exists()

    check(played(clock, lambda: Live(1, steps=60), play))
    assert outcomes == ["done", "done"] and (tmp_path / "control").stat().st_mode & 0o777 == 0o700
