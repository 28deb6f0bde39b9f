"""Who works when: groups of a forced age, two sides that share devices, and payloads that travel beside a step."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest

from hapo_async.driver import fleet as fleets
from hapo_async.types import Teacher
from tests.driver.stand_ins import Loop, StandInGenerator, StandInLearner


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


def lagged(lag: int, seed: int = 0, skip_share: float = 0.0, steps: int = 12) -> Loop:
    async def scenario() -> Loop:
        rng = random.Random(seed)
        generators = [
            StandInGenerator(f"g{i}", lambda key, s=s: rng.expovariate(1 / s)) for i, s in enumerate((0.0005, 0.004))
        ]
        generators[1].install_s = 0.004
        tree = {
            "max_staleness": lag,
            "staleness": {"force_lag": lag},
            "train": {"steps": steps, "batch_prompts": 6},
            "generator": {"count": 2, "max_concurrent": 4},
        }
        loop = Loop(generators, prompts=200, trains=StandInLearner(skip_share), **tree)
        await loop.run()
        return loop

    return asyncio.run(scenario())


@pytest.mark.parametrize("lag", [1, 3])
def test_a_forced_lag_is_the_age_of_every_group_once_there_are_versions_that_old(lag):
    loop = lagged(lag)
    assert [[step - g.header.oldest.step for g in groups] for step, groups in enumerate(loop.steps)] == [
        [min(step, lag)] * 6 for step in range(12)
    ]
    assert all(g.header.oldest == g.header.newest for groups in loop.steps for g in groups)


def test_batches_under_a_forced_lag_do_not_depend_on_timing():
    trained = [[sorted(k.uid for k in batch) for batch in lagged(2, seed).learner.trained] for seed in (0, 1)]
    assert trained[0] == trained[1]


def test_a_skipped_step_under_a_forced_lag_makes_the_next_groups_younger_and_never_older():
    loop = lagged(2, skip_share=0.3, steps=20)
    assert loop.ledger.dropped_reasons["skipped_step"] > 0
    assert max(loop.ages) == 2 and min(loop.ages[12:]) >= 1


def test_two_sides_that_share_devices_never_work_at_the_same_time():
    seen: list[str] = []

    class Generator(StandInGenerator):
        async def _submit(self, requests: list[Any]) -> None:
            assert not self.asleep and learner.asleep
            seen.append("sampled")
            await super()._submit(requests)

        async def _install(self, offer: Any) -> dict[str, Any]:
            assert not self.asleep and learner.asleep
            return await super()._install(offer)

    class Learner(StandInLearner):
        async def step(self, plans: list[Any]) -> dict[str, float]:
            assert not self.asleep and all(g.asleep for g in generators)
            seen.append("learned")
            return await super().step(plans)

        async def publish(self, version: Any, transport: str = "") -> Any:
            assert not self.asleep and all(g.asleep for g in generators)
            return await super().publish(version, transport)

    async def scenario() -> Loop:
        nonlocal learner
        learner = Learner()
        generators[:] = [Generator("g0"), Generator("g1")]
        tree = {
            "max_staleness": 0,
            "train": {"steps": 5, "batch_prompts": 4},
            "generator": {"count": 2, "placement": "colocated"},
        }
        loop = Loop(generators, prompts=40, trains=learner, **tree)
        await loop.run()
        return loop

    learner: Any = None
    generators: list[Any] = []
    loop = asyncio.run(scenario())
    assert loop.trainer.version.step == 5 and set(loop.ages) == {0}
    assert seen.count("learned") == 5 and seen[0] == "sampled"
    assert learner.asleep and not any(g.asleep for g in generators)


def test_demonstrations_before_a_forced_lag_have_no_age_to_wait_for():
    async def scenario() -> Loop:
        loop = Loop(
            [StandInGenerator("g0")],
            prompts=100,
            teachers=lambda number: (Teacher("solution", np.arange(3, dtype=np.int32)),),
            algorithm="hpt",
            options={"sft_steps": 3},
            max_staleness=2,
            staleness={"force_lag": 2},
            train={"steps": 8, "batch_prompts": 4},
        )
        await loop.run(limit_s=10.0)
        return loop

    loop = asyncio.run(scenario())
    assert [len(batch) for batch in loop.learner.trained] == [4] * 8
    assert loop.ages == [0] * 4 + [1] * 4 + [2] * 12


def test_a_skipped_step_hands_shared_devices_back():
    async def scenario() -> Loop:
        loop = Loop(
            [StandInGenerator("g0")],
            prompts=100,
            trains=StandInLearner(skip_share=0.4),
            max_staleness=0,
            generator={"placement": "colocated"},
            train={"steps": 8, "batch_prompts": 4},
        )
        await loop.run(limit_s=10.0)
        return loop

    loop = asyncio.run(scenario())
    assert loop.trainer.version.step == 8 and loop.ledger.dropped_reasons["skipped_step"] > 0


def test_what_arrives_beside_a_step_is_sent_ahead_once():
    async def scenario() -> Loop:
        loop = Loop(
            [StandInGenerator("g", lambda key: 0.004)],
            prompts=60,
            trains=StandInLearner(step_s=0.02),
            max_staleness=2,
            train={"steps": 6, "batch_prompts": 4},
        )
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    sent = loop.learner.prefetched
    later = {("payload", key) for batch in loop.learner.trained[1:] for key in batch}
    assert len(set(sent)) > 0 and set(sent) & later
    assert max(sent.count(ref) for ref in set(sent)) <= 3  # at most once per step that it waits


@pytest.mark.parametrize("late", ["wait", "truncate"])
def test_a_late_group_is_waited_for_where_nothing_may_be_cut(late):
    async def scenario() -> Loop:
        loop = Loop(
            [StandInGenerator("g", lambda key: 0.3 if key.uid == "p007" else 0.001)],
            prompts=40,
            max_staleness=1,
            staleness={"late": late, "late_deadline_s": 0.02},
            train={"steps": 6, "batch_prompts": 4},
            generator={"deadline_s": 5.0},
            data={"shuffle": False, "epochs": 1},
        )
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    assert max(loop.ages) <= 1
    assert loop.trainer.truncated == (0 if late == "wait" else 1)
    (group,) = [g for groups in loop.steps for g in groups if g.key.uid == "p007"]
    assert set(group.header.finish_reasons) == {"stop" if late == "wait" else "length"}


def test_what_is_in_flight_when_a_run_stops_is_recalled_for_the_last_turn():
    async def scenario() -> Loop:
        generator = StandInGenerator("g", lambda key: 5.0 if key.uid > "p004" else 0.001)
        loop = Loop(
            [generator],
            prompts=12,
            max_staleness=0,
            generator={"placement": "colocated"},
            train={"steps": 5, "batch_prompts": 4},
            data={"shuffle": False, "epochs": 1},
        )

        async def stop_in_the_second_step() -> None:
            while loop.trainer.version.step < 1 or not loop.sampler.flights:
                await asyncio.sleep(0.002)
            loop.trainer.stopping = True
            loop.sampler.wake()

        stopper = asyncio.create_task(stop_in_the_second_step())
        await loop.run()
        await stopper
        in_flight = loop.ledger.counts()["in_flight"]
        assert in_flight > 0
        async with loop.trainer.turn():
            assert generator.asleep and not loop.sampler.flights
        assert loop.ledger.counts()["in_flight"] == 0 and loop.ledger.to_retry >= in_flight
        assert loop.ledger.untrained == loop.ledger.counts()["buffered"] + loop.ledger.to_retry
        return loop

    asyncio.run(scenario()).ledger.check()


def test_time_that_the_bound_holds_generators_back_is_measured_while_the_learner_is_the_slow_side():
    async def scenario(step_s: float, sample_s: float) -> float:
        loop = Loop(
            [StandInGenerator("g", lambda key: sample_s)],
            prompts=60,
            trains=StandInLearner(step_s=step_s),
            max_staleness=1,
            train={"steps": 6, "batch_prompts": 4},
        )
        await loop.run()
        return loop.sampler.take_tally().blocked_s

    slow_learner = asyncio.run(scenario(0.05, 0.001))
    slow_generator = asyncio.run(scenario(0.0, 0.05))
    assert slow_learner > 0.1 > slow_generator
