"""Who stands still for long is given up as if it had died, and everybody's state can be read. silence_s is 30."""

from __future__ import annotations

import asyncio
import os
from typing import Any

import pytest

from actors.calls import CallFailed
from actors.learner import LearnerGone
from hapo_async import metrics
from hapo_async.driver.supervision import FROZEN, STALLED, STATES, Supervision
from hapo_async.types import Version
from tests.driver.frozen import SILENCE_S, Scene

pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # calls that the end of a scene cuts off


class Replaced:
    """Takes note of who is to be replaced."""

    def __init__(self) -> None:
        self.replacing: list[str] = []
        self.why: list[str] = []
        self.expected = False

    def replace(self, dead: Any, error: CallFailed) -> None:
        self.replacing.append(dead.name)
        self.why.append(str(error))


def supervised(path, **more: Any) -> tuple[Scene, Supervision]:
    scene = Scene(path, **more)
    loop = scene.loop
    scene.watchdog.supervision = Supervision(loop.config, loop.fleet, loop.judges, scene.learner)  # type: ignore[arg-type]
    loop.fleet.upkeep = Replaced()
    return scene, scene.watchdog.supervision


def state(scene: Scene, name: str) -> str:
    rows = scene.watchdog.supervision.actors(scene.loop.trainer.version, scene.watchdog.reading)
    return next(row["state"] for row in rows if row["name"] == name)


def test_a_frozen_generator_is_doubted_then_replaced_and_its_groups_go_to_others(clock, tmp_path):
    async def play():
        scene, _ = supervised(tmp_path)
        async with scene.running():
            await asyncio.sleep(47.3)
            scene.generators[1].process.awake.clear()
            await asyncio.sleep(SILENCE_S + 1.0)
            assert state(scene, "generator-1") == "suspect" and not scene.loop.fleet.upkeep.replacing
            given = len(scene.generators[1].issued)
            await asyncio.sleep((FROZEN - 1) * SILENCE_S)
            assert len(scene.generators[1].issued) == given, "a suspect gets nothing new"
            assert state(scene, "generator-1") == "restarting"
            steps = len(scene.loop.steps)
            await asyncio.sleep(60.0)
            assert len(scene.loop.steps) > steps + 5
        return scene

    scene = clock.run(play())
    (why,) = scene.loop.fleet.upkeep.why
    assert "gave no sign of life for 9" in why
    assert not scene.loop.ledger.dropped_reasons, "nobody pays for a frozen generator"


def test_one_that_comes_to_in_time_is_trusted_again(clock, tmp_path):
    async def play():
        scene, _ = supervised(tmp_path)
        async with scene.running():
            await asyncio.sleep(47.3)
            scene.generators[1].process.awake.clear()
            await asyncio.sleep(SILENCE_S + 10.0)
            assert state(scene, "generator-1") == "suspect"
            scene.generators[1].process.awake.set()
            await asyncio.sleep(SILENCE_S)
            assert state(scene, "generator-1") == "healthy"
            given = len(scene.generators[1].issued)
            await asyncio.sleep(30.0)
            assert len(scene.generators[1].issued) > given and not scene.loop.fleet.upkeep.replacing

    clock.run(play())


def test_a_generator_whose_engine_stands_still_is_replaced_later(clock, tmp_path):
    async def play():
        scene, _ = supervised(tmp_path)
        async with scene.running():
            await asyncio.sleep(47.3)
            scene.generators[0].latency_s, scene.generators[0].process.stuck = 1e5, True
            await asyncio.sleep((STALLED - 1) * SILENCE_S)
            assert state(scene, "generator-0") == "suspect"
            await asyncio.sleep(2 * SILENCE_S)
            assert state(scene, "generator-0") == "restarting"
        return scene.loop.fleet.upkeep.why

    (why,) = clock.run(play())
    assert "answered without getting on for 1" in why


def test_the_last_generator_that_freezes_ends_a_run_that_cannot_replace_it(clock, tmp_path):
    async def play():
        scene, _ = supervised(tmp_path, generators=1)
        scene.loop.fleet.upkeep = None
        with pytest.raises((AssertionError, Exception), match="no generator is left"):
            async with scene.running():
                await asyncio.sleep(47.3)
                scene.generators[0].process.awake.clear()
                await asyncio.sleep((FROZEN + 1) * SILENCE_S)

    clock.run(play())


def test_a_frozen_verifier_is_replaced(clock, tmp_path):
    async def play():
        scene, _ = supervised(tmp_path)
        lost: list[tuple[str, str]] = []
        scene.loop.judges.lose = lambda name, error: lost.append((name, str(error)))  # type: ignore[method-assign]
        async with scene.running():
            await asyncio.sleep(47.3)
            scene.verifier.process.awake.clear()
            await asyncio.sleep((FROZEN + 1) * SILENCE_S)
            scene.verifier.process.awake.set()
            await asyncio.sleep(SILENCE_S)
        return lost

    ((name, why),) = clock.run(play())
    assert name == "verifier-0" and "gave no sign of life" in why


def test_a_frozen_learner_rank_loses_the_group(clock, tmp_path):
    async def play():
        scene, _ = supervised(tmp_path, ranks=2)
        given_up: list[str] = []
        scene.learner.give_up = given_up.append  # type: ignore[attr-defined]
        async with scene.running():
            await asyncio.sleep(47.3)
            scene.learner.ranks[1].awake.clear()
            await asyncio.sleep((FROZEN + 1) * SILENCE_S)
            scene.learner.ranks[1].awake.set()
            await asyncio.sleep(SILENCE_S)
        return given_up

    (why,) = clock.run(play())
    assert why.startswith("learner rank 1: gave no sign of life")
    assert issubclass(LearnerGone, RuntimeError)


def test_everybody_has_a_state(clock, tmp_path):
    async def play():
        scene, supervision = supervised(tmp_path, generators=4)
        fleet = scene.loop.fleet
        async with scene.running():
            await asyncio.sleep(47.3)
            fleet.generators[1].installed = Version(0, 99)
            fleet.generators[2].alive = False
            fleet.upkeep.replacing.append("generator-2")
            fleet.generators[3].alive = False
            fleet.retired.append("generator-7")
            supervision.restarting = lambda: True
            rows = supervision.actors(scene.loop.trainer.version, scene.watchdog.reading)
            counts = supervision.metrics(scene.loop.trainer.version)
            fleet.generators[2].alive = fleet.generators[3].alive = True
        return rows, counts

    rows, counts = clock.run(play())
    told = {row["name"]: (row["role"], row["state"]) for row in rows}
    assert told == {
        "driver": ("driver", "healthy"),
        "generator-0": ("generator", "healthy"),
        "generator-1": ("generator", "stale"),
        "generator-2": ("generator", "restarting"),
        "generator-3": ("generator", "dead"),
        "verifier-0": ("verifier", "healthy"),
        "learner rank 0": ("learner", "restarting"),
        "generator-7": ("generator", "retired"),
    }
    assert next(row["pid"] for row in rows if row["name"] == "driver") == os.getpid()
    assert next(row["pid"] for row in rows if row["name"] == "verifier-0") == 7
    assert sum(counts.values()) == len(rows) and set(counts) == {f"actors/{name}" for name in STATES}
    for name in counts:
        metrics.lookup(name)
