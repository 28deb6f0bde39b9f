"""Composition of groups: which rows train, with which advantage, and their tokens."""

from __future__ import annotations

import numpy as np
import pytest

from hapo_async import advantage, gate
from hapo_async.config import GateConfig
from hapo_async.inject import compose, materialise
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
from hapo_async.upge import Normaliser

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
