"""The watchdog names who stands still, in time, once, and nobody else. The clock is a virtual one: silence_s is 30."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.calls import CallFailed
from actors.generator import GeneratorActor
from actors.transports import Offer
from hapo_async import metrics
from hapo_async.driver import fleet as fleets
from hapo_async.types import GroupRequest, Sampling, Version
from hapo_async.weights import Manifest, TransferError
from tests.driver.frozen import SILENCE_S, Freezer, Scene
from tests.virtual_time import Clock

pytestmark = pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # calls that the end of a scene cuts off


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())
    return Clock(monkeypatch)


async def minute() -> None:
    await asyncio.sleep(60.0)


def stopped_for_a_minute(
    clock: Clock, path: Path, stop: Callable[[Scene], Callable[[], None]], after_s: float = 47.3, **more: Any
) -> tuple[Scene, float]:
    """Lets a scene run, stops something in it for a minute, lets it go on. Returns the scene and when it was stopped."""

    async def play() -> tuple[Scene, float]:
        scene = Scene(path, **more)
        async with scene.running():
            await asyncio.sleep(after_s)
            begun = time.monotonic() - scene.began
            release = stop(scene)
            await minute()
            steps = len(scene.loop.steps)
            release()
            await minute()
            assert len(scene.loop.steps) > steps, "the run goes on"
        return scene, begun

    return clock.run(play())


def freeze(process: Freezer) -> Callable[[], None]:
    process.awake.clear()
    return process.awake.set


def stall(process: Freezer) -> Callable[[], None]:
    process.stuck = True

    def release() -> None:
        process.stuck = False

    return release


WORKED_S = 5.0  # what was under way when something stopped may still have been done


def named_in_time(scene: Scene, begun: float, who: str, state: str) -> dict[str, Any]:
    """The one alarm of the scene, which is over when it should be."""
    assert scene.alarms == [(who, state)]
    alarm, over = scene.rows
    at = scene.said[0][0]
    late_s = 0.5 if state == "frozen" else WORKED_S + 0.5
    assert begun < at <= begun + SILENCE_S + late_s and who in scene.said[0][1] and state in scene.said[0][1]
    assert (over["event"], over["who"]) == ("over", who)
    assert begun + 60.0 <= scene.said[1][0] <= begun + 60.0 + SILENCE_S / 2
    assert SILENCE_S / 2 < alarm["silent_s"] <= SILENCE_S + 0.5 < over["silent_s"]
    assert scene.watchdog.take() == {"watchdog/alarms": 1.0} and scene.watchdog.take() == {"watchdog/alarms": 0.0}
    return alarm


@pytest.mark.parametrize("after_s", [41.0, 43.6, 47.3, 49.9])
def test_a_frozen_generator_is_named_with_what_it_was_doing_and_where_everything_waits(clock, tmp_path, after_s):
    scene, begun = stopped_for_a_minute(clock, tmp_path, lambda s: freeze(s.generators[1].process), after_s)
    alarm = named_in_time(scene, begun, "generator-1", "frozen")
    assert "collect of group " in alarm["doing"] and "groups running, version 1." in alarm["doing"]
    queues = alarm["queues"]
    assert queues["generators"]["generator-1"]["groups"] >= 1
    assert queues["generators"]["generator-1"]["oldest_s"] > SILENCE_S / 2
    assert queues["flights"]["generating"]["groups"] == queues["ledger"]["in_flight"] >= 1
    assert queues["pending"]["generator-1"]["calls"]["collect"] >= 1
    assert alarm["actors"]["generator-1"]["answered_s"] > SILENCE_S / 2
    assert alarm["actors"]["generator-0"]["answered_s"] < SILENCE_S / 2
    metrics.lookup("watchdog/alarms")


def test_a_generator_that_answers_but_samples_nothing_is_stalled(clock, tmp_path):
    def stop(scene):
        generator = scene.generators[0]
        generator.latency_s = 1e5
        release = stall(generator.process)

        def go_on():
            release()
            generator.latency_s = 4.7
            for key in list(generator._slots):
                generator._finish(key, generator._header(GroupRequest(key, None, Sampling(2, 8)), generator.version))

        return go_on

    scene, begun = stopped_for_a_minute(clock, tmp_path, stop)
    alarm = named_in_time(scene, begun, "generator-0", "stalled")
    assert alarm["pid"] == 1


def test_a_frozen_verifier_is_named(clock, tmp_path):
    scene, begun = stopped_for_a_minute(clock, tmp_path, lambda s: freeze(s.verifier.process))
    alarm = named_in_time(scene, begun, "verifier-0", "frozen")
    assert "judge of group " in alarm["doing"] and "its answers are on generator-" in alarm["doing"]


def test_a_verifier_that_never_answers_is_stalled(clock, tmp_path):
    def stop(scene):
        scene.verifier.answered.clear()
        return scene.verifier.answered.set

    scene, begun = stopped_for_a_minute(clock, tmp_path, stop)
    alarm = named_in_time(scene, begun, "verifier-0", "stalled")
    assert "judging" in alarm["doing"] and alarm["queues"]["flights"]["verifying"]["groups"] >= 1


def test_a_learner_that_stalls_is_named_with_its_call(clock, tmp_path):
    scene, begun = stopped_for_a_minute(clock, tmp_path, lambda s: stall(s.learner.ranks[0]))
    alarm = named_in_time(scene, begun, "learner rank 0", "stalled")
    assert alarm["doing"].startswith("calls pending: 1, the oldest: step for") and "in step" in alarm["doing"]
    assert alarm["queues"]["buffer"]["groups"] == sum(alarm["queues"]["buffer"]["ages"].values()) > 0


def test_a_stalled_actor_that_freezes_is_named_again(clock, tmp_path):
    async def scenario():
        scene = Scene(tmp_path)
        async with scene.running():
            await asyncio.sleep(20.0)
            scene.learner.ranks[0].stuck = True
            await minute()
            scene.learner.ranks[0].awake.clear()
            await minute()
            scene.learner.ranks[0].stuck = False
            scene.learner.ranks[0].awake.set()
            await minute()
        return scene

    scene = clock.run(scenario())
    assert scene.alarms == [("learner rank 0", "stalled"), ("learner rank 0", "frozen")]
    assert [row["event"] for row in scene.rows] == ["alarm", "alarm", "over"] and scene.watchdog.alarms == 2


def test_of_ranks_that_wait_for_a_frozen_one_only_that_is_named(clock, tmp_path):
    scene, begun = stopped_for_a_minute(clock, tmp_path, lambda s: freeze(s.learner.ranks[1]), ranks=2)
    assert named_in_time(scene, begun, "learner rank 1", "frozen")["pid"] == 101


def quiet(clock: Clock, path: Path, play: Callable[[Scene], Awaitable[None]], **more: Any) -> Scene:
    """A scene in which nothing is to blame."""

    async def scenario() -> Scene:
        scene = Scene(path, **more)
        async with scene.running():
            await play(scene)
        return scene

    scene = clock.run(scenario())
    assert scene.said == [] and scene.rows == [] and scene.watchdog.alarms == 0
    return scene


def test_long_answers_a_long_step_and_a_long_save_are_work(clock, tmp_path):
    async def play(scene):
        for generator in scene.generators:
            generator.latency_s = 200.0
        await asyncio.sleep(500.0)
        for generator in scene.generators:
            generator.latency_s = 4.7
        scene.learner.busy_s = 150.0  # meanwhile the buffer is full and the generators are idle
        await asyncio.sleep(450.0)
        scene.learner.busy_s = 1.6
        await asyncio.sleep(200.0)
        await scene.learner.busy("save", 100.0)

    quiet(clock, tmp_path, play)


def test_nobody_without_work_is_named_though_it_is_frozen(clock, tmp_path):
    async def play(scene):
        await asyncio.sleep(20.0)
        lent = scene.loop.fleet.generators[0]
        lent.detached = True  # and nothing is asked of it
        await asyncio.sleep(10.0)
        assert not lent.outstanding
        scene.generators[0].process.awake.clear()
        await asyncio.sleep(100.0)

    quiet(clock, tmp_path, play)


@pytest.mark.parametrize("moves", ["buckets", "the engine", None])
def test_an_install_that_takes_long_is_work_while_buckets_arrive_or_the_engine_copies_them(clock, tmp_path, moves):
    async def scenario():
        scene = Scene(tmp_path, generators=1)
        generator, fleet = scene.generators[0], scene.loop.fleet
        generator.install_s, generator.applying = 200.0, moves == "the engine"
        watching = asyncio.create_task(scene.watchdog.run())
        fleet.weights.publish(Offer("ray", Version(1, 0)))
        waiting = asyncio.create_task(fleet.wait_installed(Version(1, 0), 1000.0))
        while not waiting.done():
            await asyncio.sleep(5.0)
            generator.received += moves == "buckets"
        await asyncio.sleep(12.0)
        watching.cancel()
        return scene

    scene = clock.run(scenario())
    assert scene.alarms == ([] if moves else [("generator-0", "stalled")])
    assert len(scene.said) == (0 if moves else 2)


def test_a_generator_says_while_its_engine_copies_weights_in():
    class Installing(GeneratorActor):
        """One whose version has arrived, and whose engine takes its time."""

        def __init__(self) -> None:
            self.name, self._received, self._applying, self._arrivals = "g", 3, 0, {}
            self.done, self._installing = asyncio.Event(), asyncio.Lock()
            self._engine: Any = SimpleNamespace(version=Version(1, 0), stats=lambda: {"tokens": 5}, install=self._copy)

        async def _receiving(self, offer: Offer) -> Any:
            return SimpleNamespace(
                manifest=Manifest(offer.version, ()), tensors=[], seconds=0.1, pause_s=None, in_workers=False
            )

        async def _copy(self, manifest: Manifest, tensors: list[Any]) -> float:
            await self.done.wait()
            raise TransferError("too late")

    async def scenario() -> list[bool]:
        actor, seen = Installing(), []
        seen.append((await actor.stats())["applying"])
        installing = asyncio.create_task(actor.install(Offer("ray", Version(1, 1))))
        await asyncio.sleep(0.01)
        seen.append((await actor.stats())["applying"])
        actor.done.set()
        with pytest.raises(TransferError):
            await installing
        return [*seen, (await actor.stats())["applying"]]

    assert asyncio.run(scenario()) == [False, True, False]


def test_an_install_that_outlives_its_deadline_is_named(clock, tmp_path):
    """The call has failed by then; an engine that says that it still copies has no excuse."""

    async def scenario():
        scene = Scene(tmp_path, generators=1, weights={"deadline_s": 60.0})
        generator = scene.generators[0]
        async with scene.running():
            await asyncio.sleep(20.0)
            generator.latency_s, generator.process.stuck, generator.applying = 1e6, True, True
            await asyncio.sleep(60.0)
            assert not scene.alarms, "30 s are too short for this"
            await asyncio.sleep(60.0)
        return scene

    assert clock.run(scenario()).alarms == [("generator-0", "stalled")]


def idle(scene: Scene) -> Callable[[], None]:
    """Prompts are left, the buffer runs dry, and nobody is asked for anything."""
    for generator in scene.loop.fleet.generators:
        generator.detached = True
    scene.loop.config.generator.deadline_s = 1e6

    def release() -> None:
        for generator in scene.loop.fleet.generators:
            scene.loop.fleet.attach(generator)

    return release


def test_a_run_in_which_nobody_has_anything_to_do_is_blocked(clock, tmp_path):
    scene, begun = stopped_for_a_minute(clock, tmp_path, idle)
    assert scene.alarms == [("the run", "blocked")] and begun < scene.said[0][0] < begun + SILENCE_S + 2 * WORKED_S
    alarm, over = scene.rows
    assert "no call is pending" in alarm["doing"] and alarm["queues"]["pending"] == {}
    assert alarm["queues"]["buffer"]["groups"] < 4 and over["who"] == "the run"


def test_what_the_driver_does_by_itself_blocks_nothing_for_a_while(clock, tmp_path):
    async def scenario():
        scene = Scene(tmp_path)
        async with scene.running():
            await asyncio.sleep(20.0)
            release = idle(scene)
            with scene.watchdog.during("seals a checkpoint"):
                await asyncio.sleep(9 * SILENCE_S)
                assert scene.said == []
                await asyncio.sleep(2 * SILENCE_S)
            release()
            await minute()
        return scene

    scene = clock.run(scenario())
    assert scene.alarms == [("the run", "blocked")] and scene.rows[0]["doing"] == "seals a checkpoint"


def test_a_driver_that_stood_still_blames_itself_and_nobody_else(clock, tmp_path):
    async def scenario():
        scene = Scene(tmp_path)
        async with scene.running():
            await asyncio.sleep(45.0)
            clock.now += 100.0  # stopped, or its loop blocked
            await minute()
        return scene

    scene = clock.run(scenario())
    assert scene.alarms == [("the driver", "stalled")]
    assert [row["event"] for row in scene.rows] == ["alarm", "over"]


def test_an_actor_that_is_taken_out_of_service_is_watched_no_longer(clock, tmp_path):
    async def scenario():
        scene = Scene(tmp_path)
        async with scene.running():
            await asyncio.sleep(20.0)
            scene.generators[0].process.awake.clear()
            await asyncio.sleep(40.0)
            fleet = scene.loop.fleet
            fleet.mark_failed(fleet.generators[0], CallFailed("generator-0", "no answer", gone=True))
            await asyncio.sleep(100.0)
        return scene

    scene = clock.run(scenario())
    assert [(row["event"], row["who"]) for row in scene.rows] == [("alarm", "generator-0"), ("over", "generator-0")]
    assert "out of service" in scene.said[1][1]


def test_it_asks_64_generators_rarely_and_a_frozen_one_not_twice_at_once(clock, tmp_path):
    async def play(scene):
        for generator in scene.generators:
            generator.latency_s = 100.0
        await asyncio.sleep(1.0)
        scene.generators[5].process.awake.clear()
        await asyncio.sleep(200.0)

    async def scenario():
        scene = Scene(tmp_path, generators=64, max_staleness=20)
        async with scene.running():
            await play(scene)
        return scene

    scene = clock.run(scenario())
    assert scene.alarms == [("generator-5", "frozen")]
    asked = [generator.process.asked for i, generator in enumerate(scene.generators) if i != 5]
    assert 18 <= min(asked) <= max(asked) <= 200 / (SILENCE_S / 3) + 1
    assert scene.generators[5].process.asked == 0
    assert sum(call.method == "stats" for call in scene.loop.fleet.calls()) <= 64


def test_a_dump_that_cannot_be_written_and_a_bug_of_its_own_end_no_run(clock, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.CRITICAL)

    async def scenario():
        scene = Scene(tmp_path / "missing")
        async with scene.running():
            await asyncio.sleep(5.0)
            scene.generators[0].process.awake.clear()
            await minute()
            assert len(scene.said) == 1 and scene.rows == []
        monkeypatch.setattr(scene.watchdog, "_actors", lambda: 1 / 0)
        await asyncio.wait_for(scene.watchdog.run(), SILENCE_S)
        return scene

    assert "it failed and watches no longer (ZeroDivisionError" in clock.run(scenario()).said[-1][1]


def test_a_judgement_that_may_take_longer_than_silence_is_no_silence(clock, tmp_path):
    async def play() -> Scene:
        scene = Scene(tmp_path, verifier={"timeout_s": 60.0})
        scene.verifier.judgement_s = 50.0
        async with scene.running():
            await asyncio.sleep(600.0)
            assert scene.rows == [] and len(scene.loop.steps) > 5
            scene.verifier.answered.clear()
            await asyncio.sleep(130.0)
        return scene

    assert clock.run(play()).alarms == [("verifier-0", "stalled")]
