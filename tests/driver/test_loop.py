"""The driver's loops under deaths, delays, refusals and odd ends: nothing is lost, trained twice, too old, or waited for
without end."""

from __future__ import annotations

import asyncio
import random
from dataclasses import replace

import pytest
from scipy import stats

from actors.calls import CallFailed
from hapo_async.driver import fleet as fleets
from hapo_async.errors import RunError
from hapo_async.types import Verdict
from tests.driver.stand_ins import Loop, StandInGenerator, StandInJudges, StandInLearner
from tests.virtual_time import Clock

FAST = {"generator": {"deadline_s": 5.0}, "staleness": {"late_deadline_s": 0.05}, "weights": {"deadline_s": 2.0}}


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


def trained_once(loop: Loop) -> int:
    """How many prompts were trained; none twice."""
    keys = [(k.epoch, k.uid) for batch in loop.learner.trained for k in batch]
    assert len(keys) == len(set(keys)), "a prompt was trained twice"
    return len(keys)


class HeavyTailed(StandInGenerator):
    """Answers whose lengths belong to the prompt, Pareto distributed; ``token_s`` seconds for each of their tokens."""

    def __init__(self, name: str, token_s: float) -> None:
        super().__init__(name, lambda key: token_s * self.tokens(key.uid))
        self.install_s = 0.02

    @staticmethod
    def tokens(uid: str) -> int:
        return min(400, int(4 / random.Random(uid).random() ** (1 / 1.2)))

    def _header(self, request, version, reason="stop"):
        return replace(super()._header(request, version, reason), lengths=(self.tokens(request.key.uid),) * 2)


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_slow_generators_heavy_tails_skipped_steps_and_lagging_installs_keep_the_bound(eta, monkeypatch):
    steps, size = 500, 3

    async def scenario():
        generators = [HeavyTailed(f"g{factor}", 0.001 * factor) for factor in (1, 2, 5)]
        tree = {**FAST, "staleness": {"late": "wait"}, "max_staleness": eta, "learner": {"max_bad_steps": 50}}
        tree |= {"generator": {"deadline_s": 60.0}, "train": {"steps": steps, "batch_prompts": size}}
        loop = Loop(generators, prompts=1700, trains=StandInLearner(0.05, step_s=0.02), **tree)
        await loop.run(limit_s=3600.0)
        return loop, generators

    loop, generators = Clock(monkeypatch).run(scenario())
    assert loop.trainer.version.step == steps
    assert min(loop.ages) >= 0 and max(loop.ages) <= eta
    assert eta == 0 or max(loop.ages) == eta, "nothing was ever as old as it may be: the bound was not tried"
    assert trained_once(loop) == steps * size
    skipped = loop.ledger.dropped_reasons["skipped_step"]
    assert 10 * size < skipped < 45 * size
    assert all(len(g.issued) > 100 for g in generators), "a generator was hardly used"
    issued = [HeavyTailed.tokens(key.uid) for g in generators for key in g.issued]
    trained = [group.header.lengths[0] for groups in loop.steps for group in groups]
    assert len(issued) == len(trained) + skipped + loop.ledger.counts()["in_flight"] + len(loop.buffer)
    assert stats.ks_2samp(issued, trained).pvalue > 0.5, "long answers were trained less often than short ones"
    long = [sum(length > 64 for length in lengths) / len(lengths) for lengths in (issued, trained)]
    assert long[1] == pytest.approx(long[0], rel=0.15)


def test_the_rest_of_the_data_is_trained_as_a_partial_batch():
    async def scenario():
        loop = Loop([StandInGenerator("g")], prompts=21, train={"steps": 50, "batch_prompts": 8}, data={"epochs": 1})
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    assert [len(b) for b in loop.learner.trained] == [8, 8, 5]
    assert trained_once(loop) == 21


def test_fewer_prompts_than_a_batch_make_one_small_step():
    async def scenario():
        loop = Loop([StandInGenerator("g")], prompts=3, train={"steps": 50, "batch_prompts": 8}, data={"epochs": 1})
        await loop.run()
        return loop

    assert [len(b) for b in asyncio.run(scenario()).learner.trained] == [3]


def test_a_generator_that_dies_gives_its_prompts_to_the_others():
    async def scenario():
        dying, living = StandInGenerator("a", lambda key: 0.05), StandInGenerator("b")
        loop = Loop([dying, living], prompts=200, train={"steps": 20, "batch_prompts": 8}, **FAST)
        asyncio.get_running_loop().call_later(0.02, dying.die)
        await loop.run()
        return loop, dying

    loop, dying = asyncio.run(scenario())
    assert dying.issued, "the generator died before it had any work"
    assert trained_once(loop) == 160
    assert [g.alive for g in loop.fleet.generators] == [False, True]
    assert not loop.ledger.dropped_reasons, "a generator's death must not cost a prompt"


@pytest.mark.parametrize("eta", [0, 1])
def test_the_death_of_the_last_generator_ends_the_run_at_once(eta):
    async def scenario():
        only = StandInGenerator("a", lambda key: 0.03)
        loop = Loop([only], prompts=200, max_staleness=eta, train={"steps": 20, "batch_prompts": 8}, **FAST)
        asyncio.get_running_loop().call_later(0.1, only.die)
        await loop.run(limit_s=4.0)

    with pytest.raises(RunError, match="no generator is left"):
        asyncio.run(scenario())


def test_a_generator_that_dies_while_installing_does_not_hold_up_the_others():
    async def scenario():
        dying, living = StandInGenerator("a"), StandInGenerator("b")
        dying.install_s = 10.0
        loop = Loop([dying, living], prompts=40, train={"steps": 3, "batch_prompts": 8}, **FAST)
        asyncio.get_running_loop().call_later(0.05, dying.die)
        await loop.run()
        return loop

    assert asyncio.run(scenario()).trainer.version.step == 3


def test_a_prompt_that_engines_refuse_is_dropped_alone():
    async def scenario():
        generators = [StandInGenerator("a"), StandInGenerator("b")]
        for generator in generators:
            generator.refused = {"p004"}
        loop = Loop(generators, prompts=32, train={"steps": 50, "batch_prompts": 8}, data={"epochs": 1}, **FAST)
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    assert trained_once(loop) == 31
    assert loop.ledger.dropped_reasons == {"failed": 1}


def test_late_groups_are_cut_short_and_trained():
    async def scenario():
        slow = StandInGenerator("a", lambda key: 30.0 if int(key.uid[1:]) % 8 == 0 else 0.002)
        loop = Loop([slow], prompts=200, train={"steps": 15, "batch_prompts": 8}, **FAST)
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    assert loop.trainer.version.step == 15 and loop.trainer.truncated > 0
    assert max(loop.ages) <= 1
    assert not loop.ledger.dropped_reasons


def test_late_groups_that_are_dropped_are_issued_again_and_then_quarantined():
    async def scenario():
        generators = [StandInGenerator(n, lambda key: 30.0 if int(key.uid[1:]) % 8 == 0 else 0.002) for n in ("a", "b")]
        tree = {**FAST, "staleness": {"late_deadline_s": 0.05, "late": "drop"}}
        loop = Loop(generators, prompts=200, train={"steps": 15, "batch_prompts": 8}, **tree)
        await loop.run()
        return loop, [k for g in generators for k in g.issued]

    loop, issued = asyncio.run(scenario())
    assert loop.trainer.version.step == 15 and max(loop.ages) <= 1
    late = {k.uid for k in issued if int(k.uid[1:]) % 8 == 0}
    attempts = [sum(k.uid == uid for k in issued) for uid in late]
    assert late and max(attempts) <= 2
    assert set(loop.ledger.dropped_reasons) == {"late"}
    assert not {k.uid for batch in loop.learner.trained for k in batch} & late


def test_groups_given_up_while_they_are_still_being_submitted_do_no_harm():
    async def scenario():
        slow, fast = StandInGenerator("a"), StandInGenerator("b")
        slow.submit_s = 0.3
        tree = {**FAST, "staleness": {"late_deadline_s": 0.05, "late": "drop"}}
        loop = Loop([slow, fast], prompts=300, train={"steps": 10, "batch_prompts": 8}, **tree)
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    assert loop.trainer.version.step == 10
    trained_once(loop)


def test_a_verifier_that_judges_nothing_stops_the_run_with_its_reason():
    async def scenario():
        loop = Loop(
            [StandInGenerator("a")],
            prompts=50,
            judges=StandInJudges(always=Verdict.TIMEOUT),
            train={"steps": 5, "batch_prompts": 8},
        )
        await loop.run()

    with pytest.raises(RunError, match=r"unverified.*timeout.*check-verifier"):
        asyncio.run(scenario())


def test_a_lost_payload_is_sampled_again_and_blames_nobody():
    class Losing(StandInJudges):
        lost = 0

        async def judge(self, payload, prompt, answers, key=None):
            if self.lost < 5:
                self.lost += 1
                raise CallFailed("verifier-0", "an object that it needs is lost", gone=False, lost=True)
            return await super().judge(payload, prompt, answers, key)

    async def scenario():
        loop = Loop(
            [StandInGenerator("a")],
            prompts=16,
            judges=Losing(),
            train={"steps": 9, "batch_prompts": 8},
            data={"epochs": 1},
        )
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    assert trained_once(loop) == 16
    assert not loop.ledger.dropped_reasons


def test_steps_that_are_never_finite_stop_the_run():
    async def scenario():
        loop = Loop(
            [StandInGenerator("a")],
            prompts=99,
            trains=StandInLearner(skip_share=1.0),
            train={"steps": 9, "batch_prompts": 8},
        )
        await loop.run()

    with pytest.raises(RunError, match=r"5 steps in a row could not be made.*not finite"):
        asyncio.run(scenario())


def test_stopping_while_the_learner_waits_for_a_late_group_is_prompt():
    async def scenario():
        slow = StandInGenerator("a", lambda key: 30.0 if int(key.uid[1:]) % 4 == 0 else 0.002)
        tree = {**FAST, "staleness": {"late_deadline_s": 60.0}, "max_staleness": 0}
        loop = Loop([slow], prompts=64, train={"steps": 9, "batch_prompts": 8}, **tree)

        def stop():
            loop.trainer.stopping = True
            loop.sampler.wake()

        asyncio.get_running_loop().call_later(0.2, stop)
        await loop.run(limit_s=3.0)

    asyncio.run(scenario())
