"""Groups that a leaving generator has not finished are continued on another one, or sampled from scratch."""

from __future__ import annotations

import pytest
import ray

from hapo_async.driver.flights import MOVING
from tests.driver.living import Live, check, played
from tests.virtual_time import Clock


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(ray, "kill", lambda actor: actor.die())


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


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

    loop = played(clock, lambda: Live(2, latency=latency, steps=12), play)
    check(loop)
    assert loop.resumed, "nothing was handed over"
    for request in loop.resumed:
        assert request.key.attempt == 1 and len(request.prefixes) == 2 and request.prefixes[0].length >= 3
    trained = {k for keys in loop.learner.trained for k in keys}
    assert trained >= {r.key for r in loop.resumed}, "a group that was continued never arrived"
    tries = loop.ledger.state_dict()["entries"]
    assert sum(row[5].get("handed over", 0) for row in tries) == len(loop.resumed)
    assert not any("refused" in row[5] or "lost" in row[5] for row in tries), "a prompt was charged for a hand-over"


def test_a_group_that_nobody_has_room_for_is_sampled_from_scratch(clock):
    async def play(loop):
        await loop.at_step(2)
        await loop.until(lambda: len(loop.member("generator-1").outstanding) == 4)
        await loop.until(lambda: len(loop.member("generator-0").outstanding) == 4)
        assert await loop.scale(generators=1, drain=1.0) == "done"
        assert {f.stage for f in loop.sampler.flights.values()} == {"generating", MOVING}

    loop = played(clock, lambda: Live(2, latency=lambda key: 100.0, steps=8), play)
    check(loop)
    rows = loop.ledger.state_dict()["entries"]
    assert sum(row[5].get("recalled", 0) for row in rows) >= 1, "all were taken though there was no room"


def test_a_hand_over_that_is_not_answered_costs_the_answers_and_no_prompt(clock):
    async def play(loop):
        loop.actors["generator-1"].hand_over_s = 1e6
        await loop.at_step(2)
        await loop.until(lambda: loop.member("generator-1").outstanding)
        assert await loop.scale(generators=1, drain=1.0) == "done"

    loop = played(clock, lambda: Live(2, latency=lambda key: 20.0, steps=8), play)
    check(loop)
    assert loop.fleet.generators[0].name == "generator-0" and len(loop.fleet.generators) == 1


def test_nothing_is_continued_by_a_generator_that_serves_an_older_version(clock):
    async def play(loop):
        await loop.at_step(3)
        lagging = loop.actors["generator-0"]
        lagging.install_s = 1e6
        await loop.until(lambda: not loop.member("generator-0").outstanding)
        behind = loop.member("generator-0").installed.step
        await loop.until(lambda: loop.member("generator-2").outstanding and loop.trainer.version.step > behind + 2)
        assert all(loop.sampler.flights[key].step > behind for key in loop.member("generator-2").outstanding)
        assert await loop.scale(generators=2, drain=0.0) == "done"
        await loop.until(lambda: loop.actors["generator-1"].resumed)
        assert not lagging.resumed, "tokens older than the group's oldest were sampled"

    tree = {"weights": {"deadline_s": 500.0}, "generator": {"max_concurrent": 12, "deadline_s": 500.0}}
    check(played(clock, lambda: Live(3, latency=lambda key: 4.0, steps=20, **tree), play))
