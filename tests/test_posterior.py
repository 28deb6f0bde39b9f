"""Evidence of earlier visits: decay, one count for each visit, and a state that survives a restart."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest

from hapo_async import gate
from hapo_async.config import GateConfig
from hapo_async.posterior import Evidence, Posteriors
from hapo_async.types import GroupKey


def key(epoch, uid="a", attempt=0):
    return GroupKey(epoch, uid, attempt)


def test_each_visit_counts_decay_times_what_the_next_one_counts():
    posteriors = Posteriors(0.5)
    assert posteriors.before(key(0)) == (0, 0)
    for epoch, (successes, failures) in enumerate([(4, 4), (8, 0), (2, 6)]):
        posteriors.record(key(epoch), successes, failures)
    # 2 + 8/2 + 4/4 and 6 + 0/2 + 4/4, which the next visit counts by half
    assert posteriors.before(key(3)) == (3.5, 3.5)
    assert posteriors.before(key(3, "b")) == (0, 0)


def test_no_decay_counts_all_visits_alike_and_full_decay_only_the_present_one():
    for decay, left in ((1.0, (9, 7)), (0.0, (0, 0))):
        posteriors = Posteriors(decay)
        posteriors.record(key(0), 8, 0)
        posteriors.record(key(1), 1, 7)
        assert posteriors.before(key(2)) == left


def test_another_attempt_at_a_visit_takes_the_place_of_the_first():
    posteriors = Posteriors(0.5)
    posteriors.record(key(0), 8, 0)
    posteriors.record(key(1), 0, 8)
    assert posteriors.before(key(1, attempt=1)) == (4, 0)
    posteriors.record(key(1, attempt=1), 2, 6)
    assert posteriors.before(key(2)) == (3, 3)  # (2 + 8/2) / 2 and 6 / 2: the lost attempt left nothing


def test_the_state_is_json_and_goes_on_as_if_nothing_had_happened():
    decay = 0.9
    one = Posteriors(decay)
    for epoch in range(3):
        for uid in "abc":
            one.record(key(epoch, uid), epoch + 1, 7 - epoch)
    other = Posteriors(decay)
    other.restore(json.loads(json.dumps(one.state_dict())))
    for posteriors in (one, other):
        posteriors.record(key(3, "b"), 5, 3)
    for uid in "abcd":
        assert one.before(key(3, uid)) == other.before(key(3, uid))
        assert one.before(key(4, uid)) == other.before(key(4, uid))
    assert len(other) == 3


def test_there_is_one_entry_for_each_prompt_whatever_the_number_of_visits():
    posteriors = Posteriors(0.5)
    for epoch in range(50):
        posteriors.record(key(epoch, f"p{epoch % 7}"), 1, 1)
    assert len(posteriors) == len(posteriors.state_dict()) == 7


def pooled(successes, past, decision="pooled", gamma=0.8):
    config = GateConfig(decision=decision, gamma=gamma)
    rewards = [1.0] * successes + [0.0] * (8 - successes)
    return gate.decide(rewards, [True] * 8, [], [1] * 8, [0] * 8, config=config, past=past)


def test_the_pooled_confidence_counts_past_and_present_and_decides():
    decision = pooled(4, Evidence(8.0, 0.0))
    assert decision.confidence == pytest.approx((1 + 4 + 8) / (2 + 8 + 8)) and (
        decision.successes,
        decision.judged,
    ) == (
        4,
        8,
    )
    assert pooled(8, Evidence(0.0, 8.0)).is_open and not pooled(8, Evidence()).is_open
    assert not pooled(6, Evidence(8.0, 0.0)).is_open and pooled(6, Evidence()).is_open
    # (1 + 7 + 8) / (2 + 8 + 10) is exactly 4/5: closed
    assert not pooled(7, Evidence(8.0, 2.0)).is_open and pooled(7, Evidence(8.0, 2.125)).is_open


def test_without_a_past_pooling_is_the_mean_and_other_decisions_ignore_the_past():
    for successes in range(9):
        assert pooled(successes, None) == pooled(successes, Evidence()) == pooled(successes, None, "mean")
        assert pooled(successes, Evidence(0.0, 99.0), "mean") == pooled(successes, None, "mean")
    assert gate.confidence(7, 8, Evidence(8.0, 2.0)) == Fraction(4, 5)


def test_a_visit_that_is_sampled_again_after_a_later_one_still_counts_once():
    past = Posteriors(decay=1.0)
    past.record(GroupKey(0, "a", 0), 0, 8)
    past.record(GroupKey(1, "a", 0), 8, 0)
    past.record(GroupKey(0, "a", 1), 0, 8)
    assert past.before(GroupKey(2, "a", 0)) == (8, 8)
    assert past.before(GroupKey(0, "a", 2)) == (0, 8)  # what is there, when that of its own time is gone
