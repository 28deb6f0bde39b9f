"""Generators and verifiers that come, leave, die and are replaced while the loop goes on: nothing is lost or trained twice."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray

from actors.calls import CallFailed
from hapo_async import control, events
from hapo_async.control import Request
from hapo_async.driver import fleet as fleets
from hapo_async.driver.flights import MOVING
from hapo_async.driver.generators import Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.scaling import Scaler
from hapo_async.driver.training import StepTimes, Trained
from hapo_async.driver.upkeep import Upkeep
from hapo_async.errors import ConfigError, RunError
from hapo_async.types import Answer, Group, GroupHeader, GroupRequest, Segment, Source, Version, VersionSpan
from tests.driver.stand_ins import Loop, Method, StandInGenerator, StandInLearner, raised
from tests.virtual_time import Clock


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


class Slot:
    """A place; ``released`` counts how often it was given back."""

    is_part = False

    def __init__(self) -> None:
        self.released, self.whole = 0, True

    def release(self) -> None:
        self.released += 1


class Resuming(StandInGenerator):
    """Samples a token a second under the version that it serves; hands over what it has, and goes on from prefixes."""

    def __init__(self, name: str, latency: Callable[[Any], float] = lambda key: 2.0) -> None:
        super().__init__(name, latency)
        self.ready_s, self.broken = 3.0, False
        self.requests: dict[Any, tuple[GroupRequest, float, Version]] = {}
        self.resumed: list[GroupRequest] = []
        self.closed = False
        self.ready, self.close = self._method(self._ready), self._method(self._close)
        self.hand_over, self.hand_over_s = self._method(self._hand_over), 0.0

    async def _ready(self) -> dict[str, Any]:
        await asyncio.sleep(self.ready_s)
        if self.broken:
            raise raised("no engine")
        return {"member_key": f"key of {self.name}"}

    async def _close(self) -> None:
        self.closed = True

    async def _submit(self, requests: list[GroupRequest]) -> None:
        assert self.installs, f"{self.name} was given groups before it had weights"
        for request in requests:
            self.requests[request.key] = (request, asyncio.get_running_loop().time(), self.version)
            if request.prefixes:
                self.resumed.append(request)
        await super()._submit(requests)

    def _header(self, request: GroupRequest, version: Version, reason: str = "stop") -> GroupHeader:
        header = super()._header(request, version, reason)
        oldest = min([version, *(s.version for a in request.prefixes for s in a.spans)])
        return GroupHeader(**{**header.__dict__, "oldest": oldest, "newest": max(version, oldest)})

    async def _hand_over(self, keys: list[Any]) -> list[tuple[None, Group]]:
        await asyncio.sleep(self.hand_over_s)
        out = []
        for key in keys:
            future = self._slots.pop(key, None)
            if future is None or future.done():
                continue
            future.set_exception(raised(f"{key} was handed over"))
            request, since, version = self.requests[key]
            spans = [s for a in request.prefixes[:1] for s in a.spans]
            done = sum(s.end - s.start for s in spans)
            new = int(asyncio.get_running_loop().time() - since)
            spans += [VersionSpan(version, done, done + new)] if new else []
            tokens, logp = np.ones(done + new, np.int32), np.zeros(done + new, np.float32)
            segment = Segment(Source.POLICY, tokens, logp, tuple(spans))
            answers = tuple(Answer(i, (segment,), "abort") for i in range(request.sampling.n))
            out.append((None, Group(key, request.prompt_tokens, answers, 1.0, self.name, 1)))
        return out


class Places:
    """A cluster with ``free`` places, where actors are made by ``make``."""

    def __init__(self, make: Callable[[str], Resuming] = Resuming, free: int = 100) -> None:
        self.make, self.free = make, free
        self.place_s = 1.0
        self.slots: list[Slot] = []
        self.actors: list[Resuming] = []

    async def place(self, name: str, timeout_s: float) -> Slot:
        await asyncio.sleep(self.place_s)
        if self.free < 1:
            raise RunError(f"{name}: no place within {timeout_s:.0f} s")
        self.free -= 1
        self.slots.append(Slot())
        return self.slots[-1]

    def is_whole(self, slot: Slot) -> bool:
        return slot.whole

    def spawn(self, name: str, slot: Slot) -> Resuming:
        self.actors.append(self.make(name))
        return self.actors[-1]


class Live(Loop):
    """A loop with upkeep. ``play`` runs beside it, and the run goes on until it is over and ``steps`` are done."""

    def __init__(
        self, count: int, places: Places | None = None, latency: Callable[[Any], float] = lambda key: 2.0, **more: Any
    ) -> None:
        actors = [Resuming(f"generator-{i}", latency) for i in range(count)]
        tree = {
            "max_staleness": 2,
            "generator": {"max_concurrent": 4, "deadline_s": 500.0},
            "weights": {"deadline_s": 20.0},
        }
        train = {"batch_prompts": 4, "steps": more.pop("steps", 60)}
        super().__init__(actors, prompts=more.pop("prompts", 400), train=train, **{**tree, **more})  # type: ignore[arg-type]
        self.actors = {a.name: a for a in actors}
        for generator in self.fleet.generators:
            generator.slot = Slot()  # type: ignore[assignment]
        self.places = places or Places(lambda name: Resuming(name, latency))
        self.notes: list[tuple[str, str, str]] = []
        self.told: list[dict[str, Any]] = []
        self.upkeep = Upkeep(self.fleet, self.places, lambda *note: self.notes.append(note))  # type: ignore[arg-type]
        self.most: dict[str, int] = {}

    def scaler(self, folder: Path = Path("/nowhere")) -> Scaler:
        spare = Judges(self.config, {"verifier-0": Verifier()}, lambda _: Verifier())
        return Scaler(
            self.config,
            folder,
            self.upkeep,
            spare,
            lambda g: self.sampler.handover.take_from(self.fleet, g),
            lambda *note: self.notes.append(note),
            self.told.append,
        )

    async def scale(self, drain: float = 30.0, wait: float = 300.0, **wanted: int) -> str:
        """The outcome."""
        await self.scaler().meet(Request(id="0" * 16, drain_deadline_s=drain, wait_s=wait, **wanted))
        return self.told[-1]["state"]

    async def until(self, condition: Callable[[], Any]) -> None:
        while not condition():
            await asyncio.sleep(0.1)

    async def at_step(self, step: int) -> None:
        await self.until(lambda: self.trainer.version.step >= step)

    def member(self, name: str) -> Generator:
        return next(g for g in self.fleet.generators if g.name == name)

    @property
    def names(self) -> list[str]:
        return sorted(g.name for g in self.fleet.serving)

    async def _committed(self, trained: Trained) -> StepTimes:
        for generator in self.fleet.alive:
            busy = len(generator.outstanding)
            self.most[generator.name] = max(self.most.get(generator.name, 0), busy)
        return await super()._committed(trained)

    async def played(self, play: Callable[[Live], Coroutine[Any, Any, None]], limit_s: float = 5000.0) -> Live:
        playing = asyncio.create_task(play(self))
        try:
            await self.run(limit_s)
            await playing
        finally:
            playing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await playing
            await self.upkeep.close()
        return self


class Verifier:
    """Judges after ``judge_s``."""

    def __init__(self, judge_s: float = 1.0) -> None:
        self.judge_s, self.judged, self.closed = judge_s, 0, False
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ready, self.judge = Method(lambda: self._call(0.5)), Method(lambda *a: self._call(self.judge_s, True))
        self.close = Method(lambda: self._call(0.0))

    def die(self) -> None:
        if not self._dead.done():
            self._dead.set_result(None)

    def _call(self, seconds: float, judges: bool = False) -> asyncio.Task[Any]:
        async def run() -> Any:
            await asyncio.wait({self._dead}, timeout=seconds)
            if self._dead.done():
                raise ray.exceptions.ActorDiedError()
            self.judged += judges
            return []

        return asyncio.ensure_future(run())


def check(loop: Live) -> None:
    """Each prompt is in one place, and trained at most once; no token was too old."""
    trained = Counter((k.epoch, k.uid) for keys in loop.learner.trained for k in keys)
    assert max(trained.values()) == 1, "a prompt was trained twice"
    assert len(trained) == loop.ledger.counts()["trained"]
    counts = loop.ledger.counts()
    assert counts["dropped"] == 0 and counts["issued"] == sum(n for place, n in counts.items() if place != "issued")
    assert max(loop.ages) <= loop.config.max_staleness


# ---------------------------------------------------------------- more and fewer


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

    loop = clock.run(_go(lambda: Live(1), play))
    check(loop)
    assert all(0 < most <= 4 for most in loop.most.values()) and len(loop.most) == 5
    assert [slot.released for slot in loop.places.slots] == [0, 1, 1, 0]
    gone = [a for a in loop.places.actors if a.name in ("generator-2", "generator-3")]
    assert all(a.closed and a.issued for a in gone) and not any(g.joining for g in loop.fleet.generators)
    assert [note[1] for note in loop.notes] == ["generators 1 → 4", "generators 4 → 2", "generators 2 → 3"]


async def _go(make: Callable[[], Live], play: Callable[[Live], Coroutine[Any, Any, None]], **more: Any) -> Live:
    return await make().played(play, **more)


def test_what_is_not_finished_in_time_is_continued_elsewhere_at_its_age(clock):
    async def play(loop):
        await loop.at_step(3)
        leaving = loop.actors["generator-1"]
        await loop.until(lambda: len(loop.member("generator-1").outstanding) >= 2)
        held = set(loop.member("generator-1").outstanding)
        assert await loop.scale(generators=1, drain=3.0) == "done"
        assert leaving.closed and loop.names == ["generator-0"]
        loop.resumed = loop.actors["generator-0"].resumed
        assert {(r.key.epoch, r.key.uid) for r in loop.resumed} <= {(k.epoch, k.uid) for k in held}

    def latency(key):
        return 15.0

    loop = clock.run(_go(lambda: Live(2, latency=latency, steps=12), play))
    check(loop)
    assert loop.resumed, "nothing was handed over"
    for request in loop.resumed:
        assert request.key.attempt == 1 and len(request.prefixes) == 2 and request.prefixes[0].length >= 3
    trained = {k for keys in loop.learner.trained for k in keys}
    assert trained >= {r.key for r in loop.resumed}, "a group that was continued never arrived"
    tries = json.loads(json.dumps(loop.ledger.state_dict()))["entries"]
    assert sum(row[5].get("handed over", 0) for row in tries) == len(loop.resumed)
    assert not any("refused" in row[5] or "lost" in row[5] for row in tries), "a prompt was charged for a hand-over"


def test_a_group_that_nobody_has_room_for_is_sampled_from_scratch(clock):
    async def play(loop):
        await loop.at_step(2)
        await loop.until(lambda: len(loop.member("generator-1").outstanding) == 4)
        await loop.until(lambda: len(loop.member("generator-0").outstanding) == 4)
        assert await loop.scale(generators=1, drain=1.0) == "done"
        assert {f.stage for f in loop.sampler.flights.values()} == {"generating", MOVING}

    loop = clock.run(_go(lambda: Live(2, latency=lambda key: 100.0, steps=8), play))
    check(loop)
    rows = loop.ledger.state_dict()["entries"]
    assert sum(row[5].get("recalled", 0) for row in rows) >= 1, "all were taken though there was no room"


def test_a_hand_over_that_is_not_answered_costs_the_answers_and_no_prompt(clock):
    async def play(loop):
        loop.actors["generator-1"].hand_over_s = 1e6
        await loop.at_step(2)
        await loop.until(lambda: loop.member("generator-1").outstanding)
        assert await loop.scale(generators=1, drain=1.0) == "done"

    loop = clock.run(_go(lambda: Live(2, latency=lambda key: 20.0, steps=8), play))
    check(loop)
    assert loop.fleet.generators[0].name == "generator-0" and len(loop.fleet.generators) == 1


def test_scaling_down_while_a_publish_is_under_way(clock):
    async def play(loop):
        for actor in loop.actors.values():
            actor.install_s = 6.0
        await loop.at_step(4)
        await loop.until(lambda: any(c.method == "install" and c.actor == "generator-2" for c in loop.fleet.calls()))
        assert await loop.scale(generators=1, drain=30.0) == "done"
        assert loop.actors["generator-2"].closed
        version = loop.trainer.version
        await loop.fleet.wait_installed(version, 20.0)

    loop = clock.run(_go(lambda: Live(3, steps=20), play))
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

    loop = clock.run(_go(lambda: Live(2, latency=lambda key: 10.0, steps=12), play))
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

    check(clock.run(_go(lambda: Live(2, latency=lambda key: 5.0, steps=12), play)))


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

    check(clock.run(_go(lambda: Live(3, steps=40), play)))


# ---------------------------------------------------------------- what goes wrong on the way up


def test_no_place_is_an_error_to_whoever_asked_and_the_run_goes_on(clock):
    async def play(loop):
        await loop.at_step(3)
        assert await loop.scale(generators=4) == "failed"
        assert "no place within" in loop.told[-1]["line"] and "3 generators" in loop.told[-1]["line"]
        assert len(loop.names) == 3

    loop = clock.run(_go(lambda: Live(1, Places(free=2), steps=20), play))
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

    loop = clock.run(_go(lambda: Live(1, Places(make), steps=12), play))
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

    loop = clock.run(_go(lambda: Live(1, Places(make), steps=30), play))
    check(loop)
    assert not made[0].issued and made[1].issued and len(loop.places.slots) == 1, "it lost its place"


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


# ---------------------------------------------------------------- replacements


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

    loop = clock.run(_go(lambda: Live(2, steps=30), play))
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

    loop = clock.run(_go(lambda: Live(1, steps=20), play))
    check(loop)


def test_one_that_dies_again_and_again_is_given_up_and_the_last_ends_the_run(clock):
    def make(name):
        actor = Resuming(name, lambda key: 1e6)
        asyncio.get_running_loop().call_later(10.0, actor.die)
        return actor

    async def play(loop):
        await loop.at_step(3)
        loop.actors["generator-1"].die()
        await loop.until(lambda: any(note[0] == "given_up" for note in loop.notes))
        assert loop.names == ["generator-0"] and len(loop.places.actors) == 3, "not three tries"
        loop.places.make = _broken
        loop.actors["generator-0"].die()

    def _broken(name):
        actor = Resuming(name)
        actor.broken = True
        return actor

    with pytest.raises(RunError, match="no generator is left; generator-0 could not be started again"):
        clock.run(_go(lambda: Live(2, Places(make), steps=400, prompts=2000), play))


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

    loop = clock.run(_go(make, play))
    check(loop)
    assert loop.outcomes == [("replaced", 3), ("given_up", 2)]
    assert loop.fleet.generators[1].slot is loop.places.slots[0]


def test_after_the_end_nothing_is_started(clock):
    async def go() -> Live:
        loop = Live(2, steps=3)
        await loop.run(500.0)
        loop.fleet.generators[0].slot.whole = True
        loop.actors["generator-0"].die()
        loop.fleet.mark_failed(loop.fleet.generators[0], CallFailed("generator-0", "died", gone=True))
        await loop.upkeep.close()
        loop.fleet.mark_failed(loop.fleet.generators[0], CallFailed("generator-0", "died", gone=True))
        await asyncio.sleep(100.0)
        return loop

    loop = clock.run(go())
    assert not loop.places.actors and not loop.upkeep.replacing


# ---------------------------------------------------------------- requests


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

    check(clock.run(_go(lambda: Live(1, steps=60), play)))
    assert outcomes == ["done", "done"] and (tmp_path / "control").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generator=2"], "Did you mean generators=N"),
        (["generators=0"], "whole number from 1"),
        (["generators=-1"], "whole number from 1"),
        (["generators=two"], "whole number from 1"),
        (["learners=2"], "Give generators=N"),
        (["generators"], "cannot be scaled"),
        (["generators=1", "generators=2"], "given twice"),
        ([], "nothing to change"),
    ],
)
def test_what_cannot_be_asked_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        control.new_request(words)


def test_a_request_needs_a_live_run_that_can_be_scaled(tmp_path, monkeypatch):
    request = control.new_request(["generators=2"])
    with pytest.raises(ConfigError, match="not the folder of a run"):
        control.submit(tmp_path, request)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="not live"):
        control.submit(tmp_path, request)
    monkeypatch.setattr(control, "driver_of", lambda run_dir: 1)
    control.Desk(tmp_path, "generator.placement=colocated: no")
    with pytest.raises(ConfigError, match=r"placement=colocated"):
        control.submit(tmp_path, request)


def test_a_driver_that_dies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "driver_of", lambda run_dir: 1)
    (tmp_path / "config.yaml").touch()
    control.Desk(tmp_path)
    request = control.new_request(["generators=2"])
    control.submit(tmp_path, request)
    monkeypatch.setattr(control, "driver_of", lambda run_dir: None)
    with pytest.raises(RunError, match="driver ended"):
        control.follow(tmp_path, request, print)
    assert not (tmp_path / "control" / "request.json").exists()


def test_events_are_said_and_read_again_but_for_broken_lines(tmp_path):
    said: list[str] = []
    written = events.Events(tmp_path, lambda: 7, said.append)
    written.add("scaled", "generators 1 → 4", "scaled: generators 1 → 4")
    with (tmp_path / events.EVENTS_FILE).open("a") as file:
        file.write('{"step": 8, "time"')
    (event,) = events.read(tmp_path)
    assert (event.step, event.kind, event.label) == (7, "scaled", "generators 1 → 4")
    assert said == ["step 7: scaled: generators 1 → 4"] and events.read(tmp_path / "none") == []


# ---------------------------------------------------------------- verifiers


def judging(clock: Clock, body: Callable[[Judges, list[Verifier]], Coroutine[Any, Any, Any]]) -> Any:
    async def go() -> Any:
        made = [Verifier(), Verifier()]

        def spawn(_: Any) -> Verifier:
            made.append(Verifier())
            return made[-1]

        judges = Judges(Loop([], prompts=1).config, {f"verifier-{i}": v for i, v in enumerate(made)}, spawn)
        judges.prompt = next(iter(Loop([], prompts=1).sampler.prompts.values()))  # type: ignore[attr-defined]
        try:
            return await body(judges, made)
        finally:
            await judges.close()

    return clock.run(go())


def test_verifiers_come_and_leave_and_what_they_had_goes_to_others(clock):
    async def body(judges, made):
        assert await judges.grow() == "verifier-2"
        made[2].judge_s = 1e5
        slow = [asyncio.create_task(judges.judge("group", judges.prompt, 2)) for _ in range(3)]
        await asyncio.sleep(5.0)
        assert await judges.retire("verifier-2", 10.0) and judges.names == ["verifier-0", "verifier-1"]
        await asyncio.gather(*slow)
        assert await judges.retire("verifier-1", 1.0) and not await judges.retire("verifier-0", 1.0)
        assert await judges.grow() == "verifier-3"
        return made

    made = judging(clock, body)
    assert made[2].judged == 0 and sum(v.judged for v in made) == 3 and made[2]._dead.done()


def test_a_dead_verifier_is_replaced_and_the_last_death_of_too_many_is_an_error(clock):
    async def body(judges, made):
        for victim in made[:2]:
            victim.die()
        await judges.judge("group", judges.prompt, 2)
        assert judges.take() >= 1
        with pytest.raises(RunError, match="no verifier is left"):
            while True:
                for victim in made:
                    victim.die()
                await judges.judge("group", judges.prompt, 2)
        return len(made)

    assert judging(clock, body) == 2 + 2 * 3
