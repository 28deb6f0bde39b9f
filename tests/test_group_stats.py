"""What a step's row says of its groups: rewards before injection, where samples come from, what the gate saw."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest

from hapo_async import algorithms, inject, metrics
from hapo_async.buffer import Ready
from hapo_async.gate import confidence
from hapo_async.group_stats import histogram, of_groups
from hapo_async.types import (
    GateDecision,
    GatedGroup,
    GroupHeader,
    GroupKey,
    Judgement,
    Prompt,
    Teacher,
    Verdict,
    Version,
)


@pytest.mark.parametrize("judged", range(1, 17))
def test_the_histogram_below_a_threshold_is_what_the_gate_opens_there(judged: int):
    """For every number of successes, also where the confidence lies on a bin's edge: .3 belongs to the bin above."""
    for successes in range(judged + 1):
        shares = histogram([GateDecision(False, successes, judged, float(confidence(successes, judged)))])
        assert sum(shares.values()) == 1.0
        for tenths in range(1, 11):
            below = sum(shares[f"gate/confidence_hist/{b}"] for b in range(tenths))
            assert below == (confidence(successes, judged) < Fraction(tenths, 10)), (successes, judged, tenths)


def test_the_histogram_counts_shares_under_declared_names():
    decisions = [GateDecision(True, 0, 8, 0.1), GateDecision(True, 0, 8, 0.1), GateDecision(False, 8, 8, 1.0)]
    shares = histogram(decisions)
    assert all(metrics.find(name) for name in shares)
    assert shares["gate/confidence_hist/1"] == pytest.approx(2 / 3)
    assert shares["gate/confidence_hist/9"] == pytest.approx(1 / 3), "a confidence of 1 is in the last bin"


def ready(rewards: list[float], teacher: bool, algorithm: str) -> Ready:
    """A judged group; with ``teacher`` the gate puts the demonstration in the place of the first answer."""
    key = GroupKey(3, "u", 0)
    n, version = len(rewards), Version(1, 4)
    demonstration = Teacher("solution", np.arange(5, dtype=np.int32))
    prompt = Prompt(
        "u", ({"role": "user", "content": "x"},), np.arange(3, dtype=np.int32), "1", teachers=(demonstration,)
    )
    header = GroupHeader(key, (4,) * n, ("stop",) * (n - 1) + ("length",), (4,) * n, version, version, 3, "g", 0.1)
    judged = tuple(Judgement(Verdict.CORRECT if r else Verdict.WRONG, r, seconds=0.5) for r in rewards)
    successes = int(sum(rewards))
    where = (0, 0, "") if teacher else (None, None, "no teacher")
    gate = GateDecision(True, successes, n, (1 + successes) / (2 + n), *where, threshold=0.75)
    gated = GatedGroup(header, "payload", prompt, judged, gate)
    chosen = algorithms.get(algorithm)
    train = inject.compose(chosen.composition, gated, chosen.advantage_for({}), options=chosen.defaults)
    assert train is not None
    return Ready(gated, train)


def test_rewards_and_lengths_are_of_the_sampled_answers_and_teachers_are_counted_apart():
    groups = [ready([0, 0, 1, 1], True, "hapo"), ready([0, 1, 1, 1], False, "hapo"), ready([1, 1, 1, 1], False, "hapo")]
    row = of_groups(groups, algorithms.get("hapo"))
    assert all(metrics.find(name) for name in row)
    assert row["reward/mean"] == pytest.approx(9 / 12) and row["response/length_mean"] == 4
    assert row["gate/injected"] == 1 and row["train/offline_frac"] == pytest.approx(1 / 12)
    assert row["gate/no_teacher"] == 2 and row["gate/open_frac"] == 1 and row["gate/threshold"] == 0.75
    assert row["groups/zero_variance_frac"] == row["groups/all_correct_frac"] == pytest.approx(1 / 3)
    assert row["response/truncated_frac"] == 0.25 and row["train/epoch"] == 3


def test_an_algorithm_without_a_gate_says_nothing_of_its_decisions():
    row = of_groups([ready([0, 1, 1, 1], False, "grpo")], algorithms.get("grpo"))
    assert not {"gate/open_frac", "gate/no_teacher", "gate/blocked", "gate/threshold"} & row.keys()
    assert row["gate/confidence"] == pytest.approx(4 / 6) and row["train/offline_frac"] == 0


def test_cached_answers_are_offline_samples_that_never_met_the_gate():
    row = of_groups([ready([0, 1], False, "dpo")], algorithms.get("dpo"))
    assert row["train/offline_frac"] == 1 and row["reward/mean"] == 0.5
    assert not [name for name in row if name.startswith("gate/")]


def test_named_components_of_the_reward_are_averaged_over_the_answers_that_have_them():
    group = ready([0, 1, 1, 1], False, "grpo")
    parts = [{"format": 1.0, "a/b c": 0.5}, {"format": 0.0}, {}, {"format": 0.5}]
    judged = [replace(j, components=part) for j, part in zip(group.gated.judgements, parts, strict=True)]
    row = of_groups([Ready(replace(group.gated, judgements=tuple(judged)), group.train)], algorithms.get("grpo"))
    assert row["reward/component/format"] == 0.5 and row["reward/component/a_b_c"] == 0.5
    assert all(metrics.find(name) for name in row)
