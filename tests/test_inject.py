"""Composition of groups: which rows train, with which advantage, and their tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from hapo_async import advantage, gate
from hapo_async.config import GateConfig
from hapo_async.inject import compose, feedback_weight, why_nothing
from hapo_async.reduction import Normaliser
from hapo_async.sequences import demonstration, materialise, with_teacher
from hapo_async.types import (
    Answer,
    GatedGroup,
    Group,
    GroupHeader,
    GroupKey,
    Judgement,
    Prompt,
    Sampling,
    Segment,
    Source,
    Teacher,
    Verdict,
    Version,
    VersionSpan,
)

KEY = GroupKey(0, "p", 0)
OPTIONS = {"gamma": 0}


def answer(index, length, step=3):
    tokens = np.arange(length, dtype=np.int32) + 10 * index
    logp = -np.ones(length, np.float32) * (index + 1)
    spans = (VersionSpan(Version(0, step), 0, length),)
    return Answer(index, (Segment(Source.POLICY, tokens, logp, spans),), "stop")


def make(rewards, teachers=1, rejected=None, temperature=0.7, **gate_config):
    """A gated group of answers of lengths 2, 3, 4...; a reward of None is a verifier's failure."""
    answers = tuple(answer(i, 2 + i) for i in range(len(rewards)))
    group = Group(KEY, np.array([7, 8, 9], np.int32), answers, temperature, "g0", 1)
    teach = tuple(Teacher("t", np.array([50, 51, 52, 53, 1 + i], np.int32), rejected) for i in range(teachers))
    prompt = Prompt("p", (), group.prompt_tokens, "1", teachers=teach, sampling=Sampling(len(rewards), 64, temperature))
    judged = tuple(
        Judgement(Verdict.CRASH, None) if r is None else Judgement(Verdict.CORRECT if r == 1 else Verdict.WRONG, r)
        for r in rewards
    )
    header = GroupHeader.of(group, 1.0)
    decision = gate.decide(
        [r or 0.0 for r in rewards],
        [r is not None for r in rewards],
        teach,
        header.lengths,
        header.answer_steps,
        config=GateConfig(**gate_config),
    )
    return GatedGroup(header, "ref", prompt, judged, decision), group


def rows(train, source):
    return [r for r in train.rows if r.source is source]


def test_rollouts_train_every_answer_with_the_group_advantage():
    gated, _ = make([1.0, 0.0, 0.0, 1.0])
    train = compose("rollouts", gated, "grpo", options={})
    assert [r.index for r in train.rows] == [0, 1, 2, 3] and train.teacher is None and train.payload == "ref"
    assert [r.advantage for r in train.rows] == advantage.compute("grpo", [1.0, 0.0, 0.0, 1.0]).tolist()
    assert train.mask_tokens == 2 + 3 + 4 + 5 and train.tokens == train.mask_tokens + 4 * 3
    assert train.confidence == pytest.approx(0.5) and train.temperature == 0.7


def test_ssi_puts_the_teacher_in_the_place_of_the_lowest_reward():
    gated, _ = make([1.0, 0.5, 0.0, 0.0])
    train = compose("ssi", gated, "grpo", options={})
    assert [r.index for r in rows(train, Source.POLICY)] == [0, 1, 3]
    (teacher,) = rows(train, Source.TEACHER)
    assert (teacher.reward, teacher.length, len(train.rows)) == (1.0, 5, 4)
    after = advantage.compute("grpo", [1.0, 0.5, 0.0, 1.0])
    assert [r.advantage for r in train.rows] == after.tolist()


def test_the_advantage_may_be_that_of_the_rollouts_before_injection():
    gated, _ = make([1.0, 0.5, 0.0, 0.0])
    train = compose("ssi", gated, "grpo", advantage_group="rollouts", options={})
    before = advantage.compute("grpo", [1.0, 0.5, 0.0, 0.0])
    assert [r.advantage for r in rows(train, Source.POLICY)] == before[[0, 1, 3]].tolist()
    injected = compose("ssi", gated, "grpo", options={})
    assert rows(train, Source.TEACHER) == rows(injected, Source.TEACHER)


def test_a_closed_gate_or_a_rejected_teacher_leaves_the_rollouts():
    for gated, _ in (make([1.0] * 4), make([0.0] * 4, rejected="too_long"), make([0.0] * 4, mode="never")):
        train = compose("ssi", gated, "grpo", options={})
        assert train == compose("rollouts", gated, "grpo", options={}) and train.teacher is None


def test_luffy_appends_the_teacher_whatever_the_gate_says_and_normalises_over_the_union():
    gated, _ = make([1.0, 1.0, 1.0, 0.0], mode="never")
    train = compose("append", gated, "grpo", options={})
    assert len(train.rows) == 5 and train.rows[-1].source is Source.TEACHER
    assert [r.advantage for r in train.rows] == advantage.compute("grpo", [1.0, 1.0, 1.0, 0.0, 1.0]).tolist()
    without_std = compose("append", gated, "grpo", options={"std": False})
    assert [r.advantage for r in without_std.rows] == advantage.compute("dr_grpo", [1, 1, 1, 0, 1]).tolist()


def test_hpt_switches_on_the_count_of_successes():
    for rewards, gamma, alone in (
        ([0.0] * 4, 0, True),
        ([1.0, 0.0, 0.0, 0.0], 0, False),
        ([1.0, 0.0, 0.0, 0.0], 1, True),
        ([0.0] * 4, -1, False),
        ([1.0] * 4, 4, True),
    ):
        gated, _ = make(rewards)
        train = compose("switch", gated, "dr_grpo", options={"gamma": gamma})
        assert (len(rows(train, Source.POLICY)), len(rows(train, Source.TEACHER))) == ((0, 1) if alone else (4, 0))
        assert (train.payload is None) == alone and (train.prompt_tokens is not None) == alone
        assert not alone or train.rows[0].advantage == 1.0
    gated, _ = make([0.0] * 4, teachers=0)
    assert len(compose("switch", gated, "dr_grpo", options={"gamma": 0}).rows) == 4


def weights(train):
    """(weight of the rollouts, of the demonstration); None where there is none."""
    found = [{r.weight for r in rows(train, source)} for source in (Source.POLICY, Source.TEACHER)]
    assert all(len(w) <= 1 for w in found)
    return tuple(w.pop() if w else None for w in found)


def test_linear_feedback_weighs_both_by_the_success_rate_of_the_judged_answers():
    options = {"gamma": 0, "feedback": "linear"}
    for rewards, alpha, beta in (
        ([0.0, 0.0, 0.0, 0.0], None, 1.0),
        ([1.0, 0.0, 0.0, 0.0], 0.25, 0.75),
        ([1.0, 1.0, 1.0, 0.0], 0.75, 0.25),
        ([1.0, 0.0, None, None], 0.5, 0.5),
        ([1.0, 1.0, 1.0, 1.0], 1.0, None),
    ):
        gated, _ = make(rewards)
        train = compose("switch", gated, "dr_grpo", options=options)
        assert weights(train) == (alpha, beta)
        assert len(rows(train, Source.POLICY)) == (0 if alpha is None else 4)
        assert (train.payload is None) == (alpha is None) and (train.teacher is None) == (beta is None)
        known = [r for r in rewards if r is not None]
        judged = [r.advantage for r in rows(train, Source.POLICY) if r.judged]
        assert alpha is None or judged == advantage.compute("dr_grpo", known).tolist()  # without the teacher
        assert all(r.advantage == 1 for r in rows(train, Source.TEACHER))


def test_sigmoid_feedback_is_half_and_half_at_gamma():
    for successes in range(5):
        gated, _ = make([1.0] * successes + [0.0] * (4 - successes))
        train = compose("switch", gated, "dr_grpo", options={"gamma": 1, "feedback": "sigmoid"})
        alpha = 1 / (1 + math.exp(-10 * (successes / 4 - 1 / 4)))
        assert weights(train) == pytest.approx((alpha, 1 - alpha)) and len(train.rows) == 5
    assert feedback_weight(make([1.0, 0.0, 0.0, 0.0])[0], {"gamma": 1, "feedback": "sigmoid"}) == 0.5
    switch = [feedback_weight(make([1.0] * s + [0.0] * (4 - s))[0], {"gamma": 1}) for s in range(5)]
    assert switch == [0, 0, 1, 1, 1]


@pytest.mark.parametrize("feedback", ["switch", "linear", "sigmoid"])
def test_a_prompt_without_a_demonstration_trains_its_answers_in_full_whatever_the_feedback(feedback):
    for gated, _ in (make([1.0, 0.0, 0.0], teachers=0), make([0.0] * 3, rejected="wrong")):
        train = compose("switch", gated, "dr_grpo", options={"gamma": 0, "feedback": feedback})
        assert weights(train) == (1.0, None) and len(train.rows) == 3
    unverified, _ = make([0.0, None, None])
    assert compose("switch", unverified, "dr_grpo", options={"gamma": 3, "feedback": feedback}) is None


def test_the_first_steps_of_a_schedule_train_demonstrations_alone():
    options = {"gamma": -1, "sft_steps": 3}
    gated, _ = make([1.0, 0.0, 1.0])
    for step in (0, 2):
        train = compose("switch", gated, "dr_grpo", options=options, step=step)
        assert [r.source for r in train.rows] == [Source.TEACHER] and train.rows[0].advantage == 1.0
        assert compose("switch", make([1.0, 0.0], teachers=0)[0], "dr_grpo", options=options, step=step) is None
    assert len(rows(compose("switch", gated, "dr_grpo", options=options, step=3), Source.POLICY)) == 3
    bare = GatedGroup(GroupHeader(KEY, (), (), (), None, None, 3, "", 0.0), None, gated.prompt, (), gated.gate)
    assert len(compose("switch", bare, "dr_grpo", options=options, step=2).rows) == 1
    assert compose("switch", bare, "dr_grpo", options=options, step=3) is None


@pytest.mark.parametrize(
    ("keep", "name", "kept"),
    [
        ("all", "grpo", [0, 1, 2, 3, 4]),
        ("judged", "grpo", [0, 1, 3, 4]),
        ("nonzero", "psr", [0, 4]),
        ("nonzero", "nsr", [1, 3]),
    ],
)
def test_kept_rows_are_what_trains_and_what_normalisers_count(keep, name, kept):
    gated, group = make([1.0, 0.0, None, 0.5, 1.0])
    train = compose("rollouts", gated, name, options={}, keep=keep)
    assert [r.index for r in train.rows] == kept
    everything = compose("rollouts", gated, name, options={})
    assert [r.advantage for r in train.rows] == [everything.rows[i].advantage for i in kept]
    norm = Normaliser.of_groups([train])
    assert (norm.tokens, norm.sequences) == (sum(2 + i for i in kept), len(kept))
    assert [len(s.tokens) for s in materialise(train, group)] == [2 + i for i in kept]


def test_a_group_without_a_row_to_keep_is_not_trained_and_teachers_stay():
    right, wrong = make([1.0] * 3)[0], make([0.0] * 3)[0]
    assert compose("rollouts", wrong, "psr", options={}, keep="nonzero") is None
    assert compose("rollouts", right, "nsr", options={}, keep="nonzero") is None
    for keep in ("nonzero",):
        train = compose("append", wrong, "psr", options={}, keep=keep)
        assert [r.source for r in train.rows] == [Source.TEACHER] and train.payload is None
    with pytest.raises(KeyError):
        compose("rollouts", right, "grpo", options={}, keep="some")


@pytest.mark.parametrize(
    ("how", "kept", "pairs"), [("zip", [0, 1, 2, 4], 2), ("all", [0, 1, 2, 4, 5], 6), ("one", [0, 1], 1)]
)
def test_answers_in_no_pair_are_left_out(how, kept, pairs):
    gated, _ = make([0.0, 1.0, 1.0, None, 0.0, 0.0], mode="never")
    train = compose("rollouts", gated, "reinforce", options={"pairs": how}, keep="paired")
    assert [r.index for r in train.rows] == kept
    assert Normaliser.of_groups([train], how).pairs == pairs
    for rewards in ([1.0, 1.0, None], [0.0, 0.0, 0.5]):
        assert compose("rollouts", make(rewards)[0], "reinforce", options={"pairs": how}, keep="paired") is None


def test_a_filter_drops_groups_of_equal_rewards_and_says_so():
    options = {"filter": "zero_variance"}
    for rewards in ([1.0] * 4, [0.0] * 4, [0.5] * 4, [1.0, 1.0, None, 1.0]):
        gated, _ = make(rewards, teachers=0)
        assert compose("rollouts", gated, "grpo", options=options) is None
        assert why_nothing(gated, options) == "zero_variance"
        assert compose("rollouts", gated, "grpo", options={"filter": "none"}) is not None
    assert compose("rollouts", make([1.0, 1.0, 0.0])[0], "grpo", options=options) is not None
    # A teacher beside the answers, or alone, is something to learn from.
    for kind in ("ssi", "append", "switch"):
        assert compose(kind, make([0.0] * 4)[0], "grpo", options=options | {"gamma": 0}) is not None
    assert compose("ssi", make([1.0] * 4)[0], "grpo", options=options) is None


def test_a_band_keeps_groups_by_their_mean_reward_whatever_teacher_joins_them():
    half, third, none = make([1.0, 0.0, None])[0], make([1.0, 0.0, 0.0])[0], make([0.0] * 4)[0]
    for options, kept in (
        ({"band_low": 0.5}, [half]),
        ({"band_low": 0.1, "band_high": 0.4}, [third]),
        ({"band_high": 1 / 3}, [third, none]),  # a bound belongs to the band
        ({"band_low": 0.0, "band_high": 1.0}, [half, third, none]),
        ({"band_low": None, "band_high": None}, [half, third, none]),
    ):
        for gated in (half, third, none):
            train = compose("ssi", gated, "grpo", options=options)
            assert (train is not None) == any(gated is k for k in kept)
            if train is None:
                assert why_nothing(gated, options) == "outside_band"
    negative, _ = make([-1.0, -3.0], mode="never")
    assert compose("rollouts", negative, "grpo", options={"band_low": -2.0}) is not None
    assert compose("rollouts", negative, "grpo", options={"band_low": -1.0}) is None
    unjudged, _ = make([1.0, None, None])
    assert why_nothing(unjudged, {"band_high": 0.5}) == "unverified"
    demonstrated = replace(make([0.0, 0.0])[0], judgements=())
    assert compose("demonstrations", demonstrated, "grpo", options={"band_low": 0.5}) is not None


def test_the_reason_why_nothing_trains():
    assert why_nothing(make([1.0, None, None])[0], {"filter": "zero_variance"}) == "unverified"
    for rewards in ([0.0, 0.0], [1.0, 1.0, None]):  # of NSR and PSR, too, which filter nothing
        assert why_nothing(make(rewards)[0], {}) == "zero_variance"
    assert why_nothing(make([0.0, 1.0])[0], {}) == "nothing_to_train"
    assert why_nothing(replace(make([0.0, 0.0])[0], judgements=()), {}) == "nothing_to_train"
    assert why_nothing(replace(make([0.0], rejected="wrong")[0], judgements=()), {}) == "no_teacher"


def test_one_verdict_among_many_is_too_few_for_every_advantage():
    for name in ("grpo", "reinforce", "psr", "return"):
        assert compose("rollouts", make([1.0, None, None])[0], name, options={}) is None
        assert compose("rollouts", make([None, None, None])[0], name, options={}) is None
    assert len(compose("rollouts", make([1.0])[0], "reinforce", options={}).rows) == 1
    assert compose("rollouts", make([None])[0], "reinforce", options={}) is None


def test_over_long_answers_lose_reward_linearly_and_only_in_the_advantage():
    options = {"overlong": 0.5, "l_max": 4.0}  # lengths 2, 3, 4, 5: penalties 0, -.5, -1, -1
    gated, _ = make([1.0, 1.0, 0.0, 0.0], mode="never")
    train = compose("rollouts", gated, "grpo", options=options)
    assert [r.advantage for r in train.rows] == advantage.compute("grpo", [1.0, 0.5, -1.0, -1.0]).tolist()
    assert [r.reward for r in train.rows] == [1.0, 1.0, 0.0, 0.0]
    assert compose("rollouts", gated, "grpo", options=options | {"overlong": 0.0}) == compose(
        "rollouts", gated, "grpo", options={}
    )
    # The filter looks at the rewards themselves: these differ by their penalties alone.
    assert compose("rollouts", make([1.0] * 4)[0], "grpo", options=options | {"filter": "zero_variance"}) is None
    varied = compose("rollouts", make([1.0] * 4)[0], "grpo", options=options)
    assert varied.rows[0].advantage > varied.rows[1].advantage > varied.rows[2].advantage == varied.rows[3].advantage


def test_the_penalty_of_an_advantage_that_asks_for_success_is_added_to_it():
    options = {"overlong": 0.5, "l_max": 4.0}
    gated, _ = make([1.0, 1.0, 0.0, None], mode="never")
    values = lambda name: [r.advantage for r in compose("rollouts", gated, name, options=options).rows]  # noqa: E731
    assert values("reinforce") == [1.0, 0.5, -2.0, 0.0]
    assert values("psr") == [1.0, 0.5, 0.0, 0.0] and values("nsr") == [0.0, 0.0, -2.0, 0.0]
    assert values("reinforce_pp") == [1.0, 0.5, -1.0, 0.0]
    teacher = rows(compose("append", gated, "reinforce", options=options), Source.TEACHER)
    assert [r.advantage for r in teacher] == [1.0]


def test_returns_stand_in_for_advantages_that_are_made_over_a_batch():
    gated, _ = make([1.0, 0.0, None, 0.5])
    train = compose("rollouts", gated, "reinforce_pp", options={})
    assert [r.advantage for r in train.rows] == [1.0, 0.0, 0.0, 0.5]
    (whitened,) = advantage.whiten_batch([train])
    want = advantage.compute("reinforce_pp", gated.rewards, gated.judged, lengths_PG=[2, 3, 4, 5])
    assert [r.advantage for r in whitened.rows] == want.tolist()


def test_an_injected_group_of_ones_is_possible_only_above_n_over_n_plus_2():
    for n, gamma, degenerate in ((8, 0.8, False), (4, 0.66, False), (4, 0.67, True), (8, 0.81, True)):
        train = compose("ssi", make([1.0] * (n - 1) + [0.0], gamma=gamma)[0], "grpo", options={})
        assert all(r.reward == 1 for r in train.rows) == degenerate
        assert any(r.advantage for r in train.rows) != degenerate


def test_where_the_gate_named_no_teacher_the_configured_choice_holds():
    teachers = tuple(Teacher("t", np.arange(n, dtype=np.int32), r) for n, r in ((9, None), (4, None), (2, "wrong")))
    gated, _ = make([1.0] * 4)
    gated = replace(gated, prompt=replace(gated.prompt, teachers=teachers))
    assert gated.gate.teacher is None
    chosen = lambda **how: compose("append", gated, "grpo", options={}, **how).rows[-1]  # noqa: E731
    assert (chosen(teacher="shortest").index, chosen(teacher="shortest").length) == (1, 4)
    seeded = {seed: chosen(seed=seed).index for seed in range(20)}
    assert set(seeded.values()) == {0, 1}
    for seed, index in seeded.items():
        assert index == gate.choose_teacher(teachers, "seeded", gate.seed_of(KEY, seed))


def test_another_teacher_takes_the_place_of_the_first_with_its_own_length():
    gated, group = make([1.0, 0.0, 0.0], teachers=1)
    teachers = (*gated.prompt.teachers, Teacher("u", np.arange(60, 69, dtype=np.int32)))
    train = compose("ssi", gated, "grpo", options={})
    other = with_teacher(train, teachers, 1)
    assert other.tokens - train.tokens == 9 - 5 and other.teacher is teachers[1]
    assert [r for r in other.rows if r.source is Source.POLICY] == rows(train, Source.POLICY)
    assert [(r.index, r.length) for r in rows(other, Source.TEACHER)] == [(1, 9)]
    assert materialise(other, group)[-1].tokens.tolist() == list(range(60, 69))
    alone = demonstration(other, gated.prompt.tokens)
    assert alone.tokens.tolist() == list(range(60, 69)) and alone.prompt_tokens.tolist() == [7, 8, 9]
    assert alone.is_teacher and alone.temperature == 1.0
    with pytest.raises(ValueError, match="no teacher"):
        demonstration(compose("rollouts", gated, "grpo", options={}), gated.prompt.tokens)


def test_cached_answers_compose_like_sampled_ones_without_an_age():
    gated, group = make([1.0, 0.0, None, 0.0], mode="never")
    header = replace(gated.header, oldest=None, newest=None, answer_steps=(-1,) * 4)
    cached = replace(gated, header=header, payload=group)
    train = compose("rollouts", cached, "reinforce", options={"pairs": "zip"}, keep="paired")
    assert [(r.index, r.advantage) for r in train.rows] == [(0, 1.0), (1, -1.0)] and train.payload is group
    scores = tuple(np.full(2 + i, -0.5 * i, np.float32) for i in range(4))
    first, second = materialise(replace(train, logp_ref=scores), group)
    assert first.logp_ref is scores[0] and second.logp_ref is scores[1]
    assert all(s.logp_ref is None and s.weight == 1.0 for s in materialise(train, group))


def test_weights_and_reference_scores_reach_the_sequences_of_their_rows():
    gated, group = make([1.0, 0.0, 0.0, 0.0])
    train = compose("switch", gated, "dr_grpo", options={"gamma": 0, "feedback": "linear"})
    scores = tuple(np.zeros(2 + i, np.float32) for i in range(4))
    sequences = materialise(replace(train, logp_ref=scores), group)
    assert [s.weight for s in sequences] == [0.25] * 4 + [0.75]
    assert [s.logp_ref is None for s in sequences] == [False] * 4 + [True]


def test_sft_trains_the_demonstration_alone_or_nothing():
    gated, _ = make([0.0] * 4)
    train = compose("demonstrations", gated, "none", options={})
    assert [r.source for r in train.rows] == [Source.TEACHER] and train.payload is None and train.temperature == 1.0
    assert compose("demonstrations", make([0.0] * 4, teachers=0)[0], "none", options={}) is None
    bare = GatedGroup(GroupHeader(KEY, (), (), (), None, None, 3, "", 0.0), None, gated.prompt, (), gated.gate)
    assert len(compose("demonstrations", bare, "none", options={}).rows) == 1


def test_an_unjudged_answer_keeps_its_tokens_without_an_advantage_and_too_few_verdicts_train_nothing():
    gated, _ = make([1.0, 0.0, None, 0.0], mode="never")
    train = compose("rollouts", gated, "grpo", options={})
    assert train.rows[2].advantage == 0 and not train.rows[2].judged and train.rows[2].length == 4
    assert [train.rows[i].advantage for i in (0, 1, 3)] == advantage.compute("grpo", [1.0, 0.0, 0.0]).tolist()
    for kind in ("rollouts", "append", "ssi"):
        assert compose(kind, make([1.0, None, None])[0], "grpo", options={}) is None


def test_materialised_rows_carry_their_own_tokens_versions_and_temperature():
    gated, group = make([1.0, 0.0, 0.0])
    train = compose("ssi", gated, "grpo", options={})
    first, second, teacher = materialise(train, group, index=4)
    assert first.tokens.tolist() == [0, 1] and second.tokens.tolist() == [20, 21, 22, 23]
    assert second.logp_behave.tolist() == [-3.0] * 4 and second.version_steps.tolist() == [3] * 4
    assert teacher.tokens.tolist() == [50, 51, 52, 53, 1] and teacher.is_teacher and teacher.temperature == 1.0
    assert np.isnan(teacher.logp_behave).all() and (teacher.version_steps == -1).all()
    assert set(teacher.sources) == {Source.TEACHER} and set(first.sources) == {Source.POLICY}
    for sequence, row in zip((first, second, teacher), train.rows, strict=True):
        assert (sequence.advantage, sequence.reward, sequence.group) == (row.advantage, row.reward, 4)
        assert sequence.prompt_tokens.tolist() == [7, 8, 9] and sequence.tokens.dtype == np.int32
        assert sequence.group_size == train.rollouts == 2
    assert first.temperature == 0.7


def test_a_lone_demonstration_needs_no_payload_and_a_wrong_payload_is_refused():
    gated, group = make([0.0, 0.0])
    (alone,) = materialise(compose("demonstrations", gated, "none", options={}), None)
    assert alone.prompt_tokens.tolist() == [7, 8, 9] and alone.advantage == 1.0
    train = compose("ssi", gated, "grpo", options={})
    with pytest.raises(ValueError, match="without its payload"):
        materialise(train, None)
    other = Group(GroupKey(0, "p", 1), group.prompt_tokens, group.answers, 1.0, "g", 1)
    with pytest.raises(ValueError, match="payload of"):
        materialise(train, other)


def test_the_normaliser_of_groups_counts_what_their_rows_hold():
    gated, _ = make([1.0, 0.0, 0.0])
    groups = [compose(kind, gated, "grpo", options={}) for kind in ("ssi", "rollouts", "demonstrations")]
    norm = Normaliser.of_groups(groups)
    assert norm == Normaliser(
        tokens=(2 + 4 + 5) + (2 + 3 + 4) + 5, sequences=7, groups=3, teacher_tokens=10, teacher_sequences=2
    )
    assert norm.split(teacher=False) == (15, 5)
    with pytest.raises(ValueError, match="separate"):
        Normaliser(1, 1, 1).split(teacher=True)
