"""HAPO's gate: exact comparison, what is replaced, and why not."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from hapo_async import algorithms, gate
from hapo_async import config as configs
from hapo_async.config import GateConfig
from hapo_async.errors import ConfigError
from hapo_async.types import GroupKey, Teacher


def teacher(length=3, rejected=None):
    return Teacher("t", np.arange(length, dtype=np.int32), rejected)


def decide(rewards, judged=None, teachers=None, lengths=None, versions=None, seed=0, **config):
    judged = [True] * len(rewards) if judged is None else judged
    teachers = [teacher()] if teachers is None else teachers
    return gate.decide(
        rewards,
        judged,
        teachers,
        lengths or [5] * len(rewards),
        versions or [0] * len(rewards),
        config=GateConfig(**config),
        rng_seed=seed,
    )


def group(successes, n=8):
    return [1.0] * successes + [0.0] * (n - successes)


def test_the_gate_is_open_up_to_six_of_eight_and_closed_at_seven_where_the_confidence_is_exactly_the_threshold():
    for successes in range(9):
        decision = decide(group(successes), gamma=0.8)
        assert decision.is_open == (successes <= 6)
        assert decision.confidence == pytest.approx((1 + successes) / 10)
        assert (decision.successes, decision.judged) == (successes, 8)
    assert decide(group(7)).reason.startswith("closed") and decide(group(7)).replaced is None


def test_every_decimal_threshold_is_compared_as_the_rational_that_was_written():
    ties = 0
    for n in range(2, 40):
        for successes in range(n + 1):
            for thousandths in range(0, 1001, 5):
                want = Fraction(1 + successes, 2 + n) < Fraction(thousandths, 1000)
                assert gate.is_open(successes, n, thousandths / 1000) == want
                ties += Fraction(1 + successes, 2 + n) == Fraction(thousandths, 1000)
    assert ties > 100  # cases where floats could go wrong


def test_only_judged_answers_count_and_an_unjudged_one_is_replaced_first():
    decision = decide([1.0, 0.0, 1.0, 9.0], judged=[True, True, True, False])
    assert (decision.successes, decision.judged, decision.replaced) == (2, 3, 3)
    assert decision.confidence == pytest.approx(0.6)
    closed = decide([*group(8), 0.0], judged=[True] * 8 + [False])
    assert not closed.is_open and closed.replaced is None
    rescued = decide([1.0, 1.0, 0.0], judged=[True, True, False])  # (1+2)/(2+2) = .75 < .8
    assert rescued.is_open and rescued.replaced == 2


def test_a_correct_answer_is_replaced_by_always_alone():
    blocked = decide([1.0, 1.0], gamma=0.8)
    assert not blocked.is_open and blocked.reason.startswith("blocked") and blocked.replaced is None
    assert decide([1.0, 1.0], mode="always").replaced == 0
    assert decide([1.0, 0.5], mode="always").replaced == 1


def test_never_and_a_threshold_of_zero_inject_nothing():
    for config in ({"mode": "never"}, {"gamma": 0.0}):
        decision = decide(group(0), **config)
        assert not decision.is_open and decision.replaced is None and decision.teacher is None


def test_fewer_than_two_verdicts_decide_nothing():
    for judged in ([True, False, False], [False] * 3):
        decision = decide([0.0] * 3, judged=judged, mode="always")
        assert not decision.is_open and decision.reason.startswith("unverified")


def test_a_teacher_that_may_not_be_injected_never_is_and_its_reason_is_told():
    decision = decide(group(0), teachers=[teacher(rejected="too_long"), teacher(rejected="wrong")])
    assert decision.is_open and decision.replaced is None and decision.teacher is None
    assert decision.reason == "no teacher: too_long, wrong"
    assert decide(group(0), teachers=[]).reason == "no teacher"
    for seed in range(20):
        assert decide(group(0), teachers=[teacher(rejected="wrong"), teacher(), teacher(0)], seed=seed).teacher == 1


def test_ties_of_the_lowest_reward_follow_the_rule():
    rewards, lengths, versions = [0.5, 0.0, 1.0, 0.0, 0.0], [9, 3, 9, 7, 7], [1, 5, 0, 4, 4]
    pick = lambda ties, seed=0: decide(rewards, None, None, lengths, versions, seed, ties=ties).replaced  # noqa: E731
    assert pick("first") == 1 and pick("longest") == 3 and pick("stalest") == 3
    drawn = [pick("random", seed) for seed in range(60)]
    assert set(drawn) == {1, 3, 4} and drawn == [pick("random", seed) for seed in range(60)]
    assert decide([0.2, 0.1, 0.1, 1.0], ties="first").replaced == 1


def test_the_teacher_is_seeded_or_the_shortest():
    teachers = [teacher(9), teacher(4), teacher(6)]
    assert {decide(group(0), teachers=teachers, seed=s).teacher for s in range(40)} == {0, 1, 2}
    assert decide(group(0), teachers=teachers, seed=7) == decide(group(0), teachers=teachers, seed=7)
    assert decide(group(0), teachers=teachers, teacher="shortest").teacher == 1


def test_the_seed_of_a_prompt_depends_on_its_epoch_but_not_on_the_attempt():
    first = gate.seed_of(GroupKey(0, "a", 0))
    assert first == gate.seed_of(GroupKey(0, "a", 3))
    assert (
        len(
            {
                first,
                gate.seed_of(GroupKey(1, "a", 0)),
                gate.seed_of(GroupKey(0, "b", 0)),
                gate.seed_of(GroupKey(0, "a", 0), 1),
            }
        )
        == 4
    )


def test_inputs_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 rewards"):
        gate.decide([0.0, 1.0], [True], [], [1, 1], [0, 0], config=GateConfig())


# --------------------------------------------------------------------------------------------------------------------
# Refused before anything starts


def check(*overrides: str) -> None:
    c = configs.load(None, overrides)
    algorithms.get(c.algorithm).check_config(c)


def test_a_gamma_that_never_closes_the_gate_is_refused_with_the_largest_one_that_does():
    with pytest.raises(ConfigError, match=r"never close.*9/10.*gate\.mode=always"):
        check("gate.gamma=0.91", "sampling.n=8")


@pytest.mark.parametrize("gamma", ["0.9", "0", "0.8"])
def test_gamma_up_to_the_largest_reachable_confidence_is_fine(gamma):
    check(f"gate.gamma={gamma}", "sampling.n=8")


def test_an_algorithm_without_a_gate_does_not_care_about_gamma():
    check("algorithm=grpo", "gate.gamma=0.8", "sampling.n=2")


def test_a_gate_that_is_always_open_may_have_any_gamma():
    check("gate.gamma=1", "gate.mode=always")
