"""HAPO's gate: exact comparison, what is replaced, and why not."""

from __future__ import annotations

import math
import statistics
from fractions import Fraction

import numpy as np
import pytest

from hapo_async import advantage, algorithms, gate, reduction
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
    for thousandths in range(0, 1001, 5):
        config = GateConfig(gamma=thousandths / 1000)
        for n in (2, 3, 6, 8, 14, 18, 23, 38):
            for successes in range(n + 1):
                decision = gate.decide(group(successes, n), [True] * n, [], [1] * n, [0] * n, config=config)
                want = Fraction(1 + successes, 2 + n) < Fraction(thousandths, 1000)
                assert decision.is_open == want
                ties += Fraction(1 + successes, 2 + n) == Fraction(thousandths, 1000)
    assert ties > 80  # cases where floats could go wrong


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


def test_the_likeliest_teacher_is_the_seeded_one_until_the_learner_has_scored_them():
    teachers = [teacher(9), teacher(4, rejected="wrong"), teacher(0), teacher(6)]
    for seed in range(20):
        first = decide(group(0), teachers=teachers, teacher="likeliest", seed=seed)
        assert first.teacher == decide(group(0), teachers=teachers, seed=seed).teacher
    assert gate.usable_teachers(teachers) == [0, 3]


def opens(successes, n, gamma):
    return decide(group(successes, n), gamma=gamma).is_open


def binomial(mu, n, successes):
    return math.comb(n, successes) * mu**successes * (1 - mu) ** (n - successes)


def test_the_gate_keeps_opening_by_chance_at_a_fixed_group_size():
    want = {0.82: 0.437, 0.85: 0.343, 0.90: 0.187, 0.95: 0.057, 0.99: 0.003}
    for mu, share in want.items():
        chance = sum(binomial(mu, 8, s) for s in range(9) if decide(group(s)).is_open)
        assert chance == pytest.approx(share, abs=5e-4)


def test_where_the_open_event_is_centred():
    """Eq. 11: the largest S with an open gate is ceil(gamma (2+N) - 1) - 1."""
    for n, centre in ((8, 0.75), (16, 0.8125)):
        most = max(s for s in range(n + 1) if opens(s, n, 0.8))
        assert most == math.ceil(Fraction(4, 5) * (2 + n) - 1) - 1
        assert most / n == centre
    assert 0.8125 > 0.8  # so that at N = 16 nothing follows about the threshold


def test_an_injected_group_keeps_a_failure_up_to_n_over_n_plus_2():
    for n in range(2, 33):
        # S = N-1 opens it only above: there the teacher takes the place of the only failure.
        assert not opens(n - 1, n, n / (n + 2) - 1e-9) and opens(n - 1, n, n / (n + 2) + 1e-9)
    assert not opens(7, 8, 0.8)


# --------------------------------------------------------------------------------------------------------------------
# Thompson draws


def beta_below(successes, n, x):
    """P(theta < x) for theta ~ Beta(1+S, 1+N-S): at least S+1 of N+1 uniform numbers lie below x."""
    return sum(math.comb(n + 1, k) * x**k * (1 - x) ** (n + 1 - k) for k in range(successes + 1, n + 2))


@pytest.mark.parametrize(("successes", "gamma"), [(0, 0.1), (4, 0.5), (6, 0.8), (7, 0.8), (8, 0.9)])
def test_a_thompson_gate_opens_as_often_as_the_posterior_says(successes, gamma):
    draws = 3000
    opened = sum(
        decide(group(successes), decision="thompson", gamma=gamma, seed=s).reason != "closed: confident enough"
        for s in range(draws)
    )
    share = beta_below(successes, 8, gamma)
    assert 0.02 < share < 0.98
    assert abs(opened / draws - share) < 4 * math.sqrt(share * (1 - share) / draws)


def test_thompson_draws_have_the_posteriors_mean_and_spread():
    draws = [gate.thompson(6, 8, seed) for seed in range(4000)]
    variance = 7 * 3 / (10**2 * 11)
    assert statistics.fmean(draws) == pytest.approx(0.7, abs=4 * math.sqrt(variance / 4000))
    assert statistics.variance(draws) == pytest.approx(variance, rel=0.1)


def test_a_draw_is_the_same_for_the_same_prompt_and_epoch_and_is_recorded():
    seeds = [gate.seed_of(GroupKey(epoch, "a", attempt), 5) for epoch in (0, 1) for attempt in (0, 1)]
    draws = [decide(group(6), decision="thompson", seed=s).draw for s in seeds]
    assert draws[0] == draws[1] != draws[2] == draws[3]
    for seed in range(50):
        decision = decide(group(7), decision="thompson", seed=seed)
        assert decision.is_open == (decision.draw < 0.8) and decision.confidence == pytest.approx(0.8)
    assert decide(group(7)).draw is None and decide(group(7), gamma=0.35).threshold == 0.35


def test_a_threshold_of_zero_never_opens_whatever_decides():
    for decision in ("mean", "thompson", "pooled"):
        assert not any(decide(group(0), gamma=0, decision=decision, seed=s).is_open for s in range(50))


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


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["gate.schedule={kind: linear, end: .95}"], r"gate\.schedule\.end=0\.95 can never close.*9/10"),
        (["gate.schedule={kind: step, end: .95, at: .9}"], r"gate\.schedule\.end=0\.95 can never close"),
        (["gate.gamma=.95", "gate.schedule={kind: sigmoid, end: .2}"], r"gate\.gamma=0\.9\d* can never close"),
        (["gate.gamma=1", "gate.decision=thompson"], r"draw lies below 1.*Set gate\.gamma below that"),
        (["gate.gamma=.95", "gate.decision=pooled"], r"gate\.decay=0\.5 the pooled confidence stays below 0\.944"),
        (["gate.gamma=1", "gate.decision=pooled", "gate.decay=1"], r"stays below 1\.000"),
        (["gate.gamma=.91", "gate.decision=pooled", "gate.decay=0"], r"never close"),
        (["gate.schedule={kind: linear, end: .5}", "options.confidence=1-c/gamma"], r"one gamma.*confidence=1-c,"),
    ],
)
def test_every_variant_of_a_gate_that_cannot_work_is_refused(overrides, says):
    with pytest.raises(ConfigError, match=says):
        check("sampling.n=8", *overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["gate.schedule={kind: linear, end: .9}"],
        ["gate.schedule={kind: sigmoid, end: .1}"],
        ["gate.gamma=.99", "gate.decision=thompson"],
        ["gate.gamma=.94", "gate.decision=pooled"],
        ["gate.gamma=.999", "gate.decision=pooled", "gate.decay=1"],
        ["gate.gamma=.9", "gate.decision=pooled", "gate.decay=0"],
        ["gate.gamma=1", "gate.schedule={kind: linear, end: 1}", "gate.mode=never"],
    ],
)
def test_a_gate_that_can_close_is_fine(overrides):
    check("sampling.n=8", *overrides)


def test_a_reward_above_one_is_a_success_everywhere():
    """A plug-in may add a bonus to a correct answer: the judge calls it correct, and so does everything that trains."""
    rewards = [1.1, 0.0, 1.1, 0.0]
    assert gate.count_successes(np.array(rewards), np.ones(4, bool)) == 2
    decision = decide([1.1] * 8, gamma=0.8)
    assert decision.successes == 8 and not decision.is_open
    for name, wrong in (("reinforce", -1), ("psr", 0)):
        assert advantage.compute(name, rewards).tolist() == [1, wrong, 1, wrong]
    assert advantage.compute("nsr", rewards).tolist() == [0, -1, 0, -1]
    assert reduction.match_pairs([1.1, 0.0, 1.0], "all") == [(0, 1), (2, 1)]
