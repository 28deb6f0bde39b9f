"""Groups that a leaving generator has not finished are continued on another one, or sampled from scratch."""

from __future__ import annotations

import asyncio

import numpy as np

from hapo_async.driver.flights import MOVING, Flight
from hapo_async.driver.generators import Generator
from hapo_async.driver.handover import WAIT_S, HandOver
from hapo_async.driver.retries import Retries
from hapo_async.ledger import Ledger
from hapo_async.types import Answer, Group, GroupKey, Prompt, Sampling, Segment, Source, Version, VersionSpan
from tests.driver.living import Live, check, played
from tests.virtual_time import Clock


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


class Leaving:
    """As much of a fleet as a hand-over needs. knows: what the generator that leaves hands over."""

    def __init__(self, knows: list[GroupKey], *others: Generator) -> None:
        self.knows, self.serving = knows, list(others)

    async def hand_over(self, generator: Generator, keys: list[GroupKey]) -> list[tuple[None, Group]]:
        segment = Segment(
            Source.POLICY, np.ones(2, np.int32), np.zeros(2, np.float32), (VersionSpan(Version(1, 5), 0, 2),)
        )
        empty = Segment(Source.POLICY, np.zeros(0, np.int32), np.zeros(0, np.float32), ())
        answers = (Answer(0, (segment,), "abort"), Answer(1, (empty,), "abort"))
        return [(None, Group(key, np.arange(3), answers, 1.0, "g", 1)) for key in keys if key in self.knows]


def serving(name: str, step: int, load: int) -> Generator:
    generator = Generator(name, None, None, installed=Version(1, step))  # type: ignore[arg-type]
    generator.assign(GroupKey(0, f"of {name}", 0), load)
    return generator


def moved(clock: Clock, knows: int, *others: Generator) -> tuple[HandOver, Ledger, Retries, Leaving, list[float]]:
    """Three groups of step 5 leave a generator, which knows the first ``knows`` of them."""
    ledger, woken = Ledger(), list[float]()
    retries = Retries(ledger, 9)
    prompt = Prompt("p", (), np.arange(3, dtype=np.int32), "1")
    keys = [ledger.issue(0, f"p{i}") for i in range(3)]
    flights = {key: Flight(prompt, "leaving", 5, clock.now) for key in keys}
    leaving = Generator("leaving", None, None)  # type: ignore[arg-type]
    for key in keys:
        leaving.assign(key, 10)
    handover = HandOver(flights, ledger, retries, lambda _: Sampling(2, 8), lambda: woken.append(clock.now))
    fleet = Leaving(keys[:knows], *others)

    async def go() -> None:
        assert await handover.take_from(fleet, leaving) == (knows, 3 - knows)  # type: ignore[arg-type]
        await asyncio.sleep(WAIT_S + 1.0)

    clock.run(go())
    return handover, ledger, retries, fleet, woken


def test_nothing_is_continued_by_a_generator_that_serves_an_older_version(clock):
    behind, current, full = serving("behind", 4, 0), serving("current", 5, 50), serving("full", 6, 0)
    for n in range(4):
        full.assign(GroupKey(0, f"more {n}", 0), 0)
    handover, ledger, _, fleet, _ = moved(clock, 3, behind, current, full)
    issued = handover.place(fleet, 4, 10.0)  # type: ignore[arg-type]
    assert [(g.name, r.key.attempt, len(r.prefixes)) for g, r in issued] == [("current", 1, 1)] * 3
    assert ledger.counts()["in_flight"] == 3 and handover.place(fleet, 4, 10.0) == []  # type: ignore[arg-type]


def test_what_the_generator_does_not_know_and_what_nobody_takes_in_time_starts_again(clock):
    began = clock.now
    handover, ledger, retries, fleet, woken = moved(clock, 2, serving("behind", 4, 0))
    assert len(retries) == 1 and ledger.counts()["to_retry"] == 1
    assert max(woken) >= began + WAIT_S, "nobody looks when the time is over"
    assert handover.place(fleet, 4, 10.0) == [] and len(retries) == 3  # type: ignore[arg-type]
