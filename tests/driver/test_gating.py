"""What the driver does between a judged group and a learner step: schedules, evidence, filters, choices of teachers."""

from __future__ import annotations

import asyncio
import contextlib
import json
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from hapo_async import advantage, algorithms, gate
from hapo_async.driver import barren as barrens
from hapo_async.driver.barren import Barren
from hapo_async.driver.checkpoints import Checkpoints
from hapo_async.driver.likeliest import choose_likeliest
from hapo_async.driver.run import _Run
from hapo_async.driver.setup import Prepared
from hapo_async.errors import ConfigError, RunError
from hapo_async.group_stats import of_groups
from hapo_async.rollouts import describe
from hapo_async.types import Answer, Group, GroupKey, Judgement, Segment, Source, Teacher, Verdict, Version, VersionSpan
from tests.driver.stand_ins import Loop, StandInGenerator, StandInJudges

CORRECT, WRONG = Judgement(Verdict.CORRECT, 1.0), Judgement(Verdict.WRONG, 0.0)


def run(**arguments) -> Loop:
    async def scenario():
        loop = Loop([StandInGenerator("g")], **arguments)
        await loop.run()
        return loop

    return asyncio.run(scenario())


def teacher(*tokens):
    return Teacher("t", np.array(tokens, np.int32))


def groups_of(loop):
    return [g for step in loop.steps for g in step]


# --------------------------------------------------------------------------------------------------------------------
# The gate over a run


def test_the_threshold_follows_the_learners_steps():
    loop = run(
        prompts=64,
        algorithm="hapo",
        teachers=lambda number: (teacher(1, 2),),
        max_staleness=0,
        train={"steps": 8, "batch_prompts": 4},
        gate={"gamma": 0.2, "schedule": {"kind": "linear", "end": 0.75}},
    )
    for step, groups in enumerate(loop.steps):
        want = Fraction(1, 5) + (Fraction(3, 4) - Fraction(1, 5)) * Fraction(step, 8)
        assert {g.gated.gate.threshold for g in groups} == {float(want)}
        assert {g.gated.gate.is_open for g in groups} == {want > Fraction(1, 2)}  # one of two is right: c = 1/2
        injected = [any(r.source is Source.TEACHER for r in g.train.rows) for g in groups]
        assert all(injected) if want > Fraction(1, 2) else not any(injected)


@pytest.mark.parametrize("eta", [0, 2])
def test_the_pooled_gate_adds_up_a_prompts_visits(eta):
    loop = run(
        prompts=6,
        max_staleness=eta,
        train={"steps": 9, "batch_prompts": 2},
        gate={"decision": "pooled", "decay": 0.5},
        sampling={"n": 4, "max_tokens": 8},
        judges=StandInJudges(right=lambda uid, index: index < int(uid[1:]) % 4),
    )
    assert len(loop.sampler.posteriors) == 6
    for group in groups_of(loop):
        # Three epochs of the same result: S (1 + 1/2 + 1/4 ...) successes among as many times 4.
        visits = sum(0.5**age for age in range(group.key.epoch + 1))
        successes = int(group.key.uid[1:]) % 4
        assert group.gated.gate.confidence == pytest.approx((1 + visits * successes) / (2 + visits * 4))
        assert group.train.confidence == group.gated.gate.confidence
    assert {g.key.epoch for g in groups_of(loop)} == {0, 1, 2}


def test_evidence_is_kept_for_the_pooled_gate_alone_and_never_of_unjudged_groups():
    assert len(run(prompts=8, train={"steps": 2, "batch_prompts": 4}).sampler.posteriors) == 0

    async def scenario():
        loop = Loop(
            [StandInGenerator("g")],
            prompts=50,
            judges=StandInJudges(always=Verdict.TIMEOUT),
            gate={"decision": "pooled"},
            train={"steps": 5, "batch_prompts": 8},
        )
        with pytest.raises(RunError, match="unverified"):
            await loop.run()
        return loop

    assert len(asyncio.run(scenario()).sampler.posteriors) == 0


def test_a_checkpoint_carries_the_gates_evidence(tmp_path):
    class Learner:
        is_writing = False

        async def capture(self, folder):
            (folder / "weights").write_text("w")

        async def write(self):
            return {}

    def fresh(resumed):
        loop = Loop([], prompts=4, gate={"decision": "pooled"}, run={"dir": str(tmp_path)})
        items = list(loop.sampler.prompts.values())
        prepared = Prepared(loop.config, loop.sampler.algorithm, loop.sampler.options, "", None, items, {}, {})
        run = _Run(prepared, folder, SimpleNamespace(), resumed, loop.sampler.stream)
        run._build_flow()
        return run

    async def scenario():
        first = fresh(None)
        first.sampler.posteriors.record(GroupKey(0, "p001", 0), 3, 5)
        first.sampler.posteriors.record(GroupKey(1, "p001", 0), 8, 0)
        watchdog = SimpleNamespace(during=contextlib.nullcontext)
        kept = Checkpoints(first.config, folder, Learner(), first.sampler, watchdog)
        await kept.save(Version(1, 3), {})
        await kept.written()
        second = fresh(kept.newest())
        assert second.sampler.step == 3
        return first.sampler.posteriors, second.sampler.posteriors

    folder = SimpleNamespace(checkpoints=tmp_path / "checkpoints", next_incarnation=lambda: 1)
    before, after = asyncio.run(scenario())
    assert after.state_dict() == before.state_dict() != {}
    assert after.before(GroupKey(2, "p001", 0)) == (4.75, 1.25)


# --------------------------------------------------------------------------------------------------------------------
# Groups that are not trained on


@pytest.mark.parametrize("eta", [0, 2])
def test_groups_without_variance_are_refilled_with_other_prompts(eta):
    one_sided = lambda uid: int(uid[1:]) % 3 != 0  # noqa: E731
    loop = run(
        prompts=200,
        algorithm="dapo",
        judges=StandInJudges(right=lambda uid, i: int(uid[1:]) % 3 == 1 if one_sided(uid) else i == 0),
        max_staleness=eta,
        train={"steps": 6, "batch_prompts": 5},
    )
    assert [len(step) for step in loop.steps] == [5] * 6
    assert not any(one_sided(g.key.uid) for g in groups_of(loop))
    assert set(loop.ledger.dropped_reasons) == {"zero_variance"}
    assert loop.ledger.dropped_reasons["zero_variance"] > 20
    assert loop.ledger.counts()["trained"] == 30


def test_the_last_batch_is_what_the_filter_left():
    loop = run(
        prompts=20,
        algorithm="dapo",
        judges=StandInJudges(right=lambda uid, i: int(uid[1:]) < 15 or i == 0),
        data={"epochs": 1},
        train={"steps": 9, "batch_prompts": 3},
    )
    assert sum(len(step) for step in loop.steps) == 5
    assert loop.ledger.dropped_reasons == {"zero_variance": 15}


def test_data_without_any_variance_stop_the_run_and_say_why(monkeypatch):
    monkeypatch.setattr(barrens, "ONE_SIDED", (8, 64))
    with pytest.raises(RunError, match=r"'zero_variance'.*all right or all wrong.*larger sampling\.n"):
        run(
            prompts=50,
            algorithm="dapo",
            judges=StandInJudges(right=lambda uid, i: False),
            train={"steps": 5, "batch_prompts": 8},
        )


def test_groups_outside_the_band_are_refilled_and_a_band_without_any_group_stops_the_run(monkeypatch):
    monkeypatch.setattr(barrens, "ONE_SIDED", (8, 64))
    # The number of right answers among four is that of the prompt, from 0 to 4.
    judges = StandInJudges(right=lambda uid, i: i < int(uid[1:]) % 5)
    tree = {
        "prompts": 200,
        "judges": judges,
        "sampling": {"n": 4, "max_tokens": 8},
        "train": {"steps": 5, "batch_prompts": 4},
    }
    loop = run(options={"band_low": 0.25, "band_high": 0.5}, **tree)
    assert [len(step) for step in loop.steps] == [4] * 5
    assert {int(g.key.uid[1:]) % 5 for g in groups_of(loop)} == {1, 2}
    assert set(loop.ledger.dropped_reasons) == {"outside_band"}
    assert loop.ledger.dropped_reasons["outside_band"] > 20
    with pytest.raises(RunError, match=r"'outside_band'.*options\.band_low.*Widen"):
        run(options={"band_low": 1.5}, **{**tree, "prompts": 50})
    with pytest.raises(ConfigError, match=r"options\.band_low=0\.8 is above options\.band_high=0\.2"):
        run(options={"band_low": 0.8, "band_high": 0.2}, **tree)


def test_filters_share_their_bound():
    barren = Barren(batch_prompts=4, prompts=10)
    for number in range(4096):
        barren.dropped("zero_variance" if number % 2 else "outside_band", [WRONG])
    with pytest.raises(RunError, match="4097 groups in a row"):
        barren.dropped("outside_band", [WRONG])


def test_groups_without_variance_do_not_count_as_a_failing_verifier():
    barren = Barren(batch_prompts=4, prompts=10)
    for _ in range(300):
        barren.dropped("zero_variance", [WRONG, WRONG])
        barren.dropped("unverified", [Judgement(Verdict.TIMEOUT, None)])
    for _ in range(63):
        barren.dropped("unverified", [Judgement(Verdict.TIMEOUT, None)])
    with pytest.raises(RunError, match=r"65 groups in a row.*unverified.*timeout.*check-verifier"):
        barren.dropped("unverified", [Judgement(Verdict.TIMEOUT, None)])


def test_an_admitted_group_ends_every_row_and_rows_grow_with_the_batch():
    barren = Barren(batch_prompts=100, prompts=10)
    for _ in range(3):
        for _ in range(800):
            barren.dropped("nothing_to_train", [WRONG])
        barren.admitted()
        for _ in range(3200):
            barren.dropped("zero_variance", [CORRECT])
        barren.admitted()


# --------------------------------------------------------------------------------------------------------------------
# SFT, then RL


@pytest.mark.parametrize("eta", [0, 1, 4])
def test_the_first_steps_train_demonstrations_and_sample_nothing(eta):
    loop = run(
        prompts=60,
        algorithm="hpt",
        options={"gamma": -1, "sft_steps": 3},
        teachers=lambda number: (teacher(1, 2, 3),) if number % 2 else (),
        max_staleness=eta,
        train={"steps": 7, "batch_prompts": 4},
    )
    kinds = [{r.source for g in groups for r in g.train.rows} for groups in loop.steps]
    assert kinds == [{Source.TEACHER}] * 3 + [{Source.POLICY}] * 4
    assert [len(groups) for groups in loop.steps] == [4] * 7
    assert set(loop.ledger.dropped_reasons) == {"no_teacher"}
    trained = [(g.key.epoch, g.key.uid) for g in groups_of(loop)]
    assert len(set(trained)) == len(trained) and max(loop.ages) <= eta


def test_a_schedule_without_a_demonstration_stops_the_run_and_a_rare_one_does_not():
    tree = {"algorithm": "hpt", "options": {"sft_steps": 2}, "train": {"steps": 3, "batch_prompts": 1}}
    with pytest.raises(RunError, match=r"no_teacher.*data\.columns.*options\.sft_steps=0"):
        run(prompts=100, **tree)
    loop = run(prompts=300, teachers=lambda number: (teacher(1),) if number == 7 else (), **tree)
    assert [g.key.uid for g in groups_of(loop)][:2] == ["p007"] * 2


# --------------------------------------------------------------------------------------------------------------------
# What is decided when the batch is known


def test_a_batch_is_whitened_over_all_its_tokens():
    loop = run(
        prompts=40,
        algorithm="reinforce_pp",
        judges=StandInJudges(right=lambda uid, i: int(uid[1:]) % 3 == 0),
        train={"steps": 4, "batch_prompts": 8},
    )
    for groups in loop.steps:
        rows = [r for g in groups for r in g.train.rows]
        want = advantage.compute("reinforce_pp", [r.reward for r in rows], lengths_PG=[r.length for r in rows])
        assert [r.advantage for r in rows] == want.tolist() and want.any()


TEACHERS = (teacher(5, 5), teacher(3, 1, 2), Teacher("t", np.array([0], np.int32), "wrong"), teacher(2, 2, 2, 2))


def test_the_likeliest_of_several_teachers_is_trained():
    loop = run(
        prompts=40,
        algorithm="hapo",
        judges=StandInJudges(right=lambda uid, i: int(uid[1:]) % 2 == 0),
        gate={"teacher": "likeliest", "gamma": 0.75},
        teachers=lambda number: TEACHERS if number % 4 == 1 else (teacher(9, 9, 9),),
        train={"steps": 5, "batch_prompts": 8},
    )
    injected = [g for g in groups_of(loop) if g.train.teacher is not None]
    for group in injected:
        (row,) = [r for r in group.train.rows if r.source is Source.TEACHER]
        several = int(group.key.uid[1:]) % 4 == 1
        assert (row.index, row.length) == (
            (1, 3) if several else (0, 3)
        )  # mean log-probs -5, -2, -2: the first of equals
        assert group.train.teacher.tokens.tolist() == ([3, 1, 2] if several else [9, 9, 9])
        assert group.gated.gate.teacher == row.index
    assert {int(g.key.uid[1:]) % 4 for g in injected} == {1, 3}
    counts = [sum(g.train.teacher is not None and int(g.key.uid[1:]) % 4 == 1 for g in s) for s in loop.steps]
    assert [len(s) for s in loop.learner.scored] == [3 * n for n in counts if n], (
        "asked once, about those with a choice"
    )


def test_without_the_option_or_a_choice_nobody_is_asked():
    async def never(sequences):
        raise AssertionError("asked")

    loop = run(
        prompts=16,
        algorithm="luffy",
        sampling={"n": 3, "max_tokens": 8},
        teachers=lambda number: TEACHERS[:1],
        train={"steps": 2, "batch_prompts": 8},
    )
    assert not loop.learner.scored
    groups = groups_of(loop)
    assert asyncio.run(choose_likeliest(groups, never)) is groups


def test_a_score_that_is_no_number_never_wins():
    async def score(sequences):
        return [np.array([np.nan] if s.tokens[0] == 5 else [-float(s.tokens[0])], np.float32) for s in sequences]

    loop = run(
        prompts=8,
        algorithm="sft",
        teachers=lambda number: TEACHERS,
        train={"steps": 1, "batch_prompts": 8},
    )
    chosen = asyncio.run(choose_likeliest(loop.steps[0], score))
    assert {g.train.rows[0].index for g in chosen} == {3} and {g.train.tokens for g in chosen} == {3 + 4}


# --------------------------------------------------------------------------------------------------------------------
# What is written down


def test_the_row_of_a_step_tells_threshold_open_share_and_degenerate_groups():
    loop = run(
        prompts=16,
        algorithm="hapo",
        sampling={"n": 4, "max_tokens": 8},
        gate={"gamma": 0.7},
        teachers=lambda number: (teacher(1, 2),),
        judges=StandInJudges(right=lambda uid, i: i < (3 if int(uid[1:]) % 2 else 4)),
        train={"steps": 1, "batch_prompts": 16},
    )
    row = of_groups(loop.steps[0], algorithms.get("hapo"))
    assert row["gate/threshold"] == pytest.approx(0.7) and row["gate/open_frac"] == 0.5
    assert row["gate/injected"] == row["gate/degenerate"] == 8  # three of four right, and the teacher for the fourth
    alone = run(
        prompts=8,
        algorithm="hpt",
        options={"gamma": 2},
        teachers=lambda number: (teacher(1),),
        train={"steps": 1, "batch_prompts": 8},
    )
    row = of_groups(alone.steps[0], algorithms.get("hpt"))
    assert row["gate/injected"] == 8 and row["gate/degenerate"] == 0  # there is no rollout beside it


def test_a_rollout_tells_what_was_compared_and_who_was_replaced():
    def record(**tree):
        loop = run(prompts=4, train={"steps": 1, "batch_prompts": 4}, **tree)
        ready = loop.steps[0][0]
        span = VersionSpan(Version(1, 0), 0, 4)
        segment = Segment(Source.POLICY, np.arange(4, dtype=np.int32), np.zeros(4, np.float32), (span,))
        answers = tuple(Answer(i, (segment,), "stop") for i in range(2))
        group = Group(ready.key, ready.gated.prompt.tokens, answers, 1.0, "g", 1)
        return ready, json.loads(json.dumps(describe(ready.gated, group, ready.train, 0)))

    ready, row = record(
        algorithm="hapo", gate={"decision": "thompson", "gamma": 0.7}, teachers=lambda number: (teacher(1),)
    )
    decision = ready.gated.gate
    assert row["gate"]["threshold"] == 0.7 and row["gate"]["draw"] == decision.draw
    assert decision.is_open == (decision.draw < 0.7)
    assert decision.draw == gate.thompson(1, 2, gate.seed_of(ready.key, 0))
    assert [a["replaced"] for a in row["answers"][:2]] == [i == decision.replaced for i in range(2)]
    _, row = record(algorithm="psr")
    assert [a["advantage"] for a in row["answers"]] == [None, 1.0]
    assert not any(a["replaced"] for a in row["answers"]), "an answer that is not kept was replaced by nobody"
