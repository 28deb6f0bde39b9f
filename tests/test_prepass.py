"""What is measured before an update: under which policy, and over the whole mini-batch."""

from __future__ import annotations

import pytest
import torch

from hapo_async.learner import learn
from hapo_async.objective import objective
from tests import learners, samples_learn

pytest_plugins = ["tests.learner_fixtures"]


def test_later_mini_batches_are_compared_with_the_policy_at_the_start_of_the_step(model, steps):
    """With a large step the second mini-batch's ratios leave 1; against its own policy they never would."""
    report = samples_learn.train_alone(learners.make(model, lr=3e-2), steps[:1])[0]
    assert abs(report["policy/ratio_mean"] - 1) > 1e-3
    single = samples_learn.train_alone(learners.make(model, lr=3e-2, mini_batches=1), steps[:1])[0]
    assert single["policy/ratio_mean"] == 1


def test_baseline_of_kto_is_the_mean_over_the_mini_batch_at_its_update(model, many_tasks, monkeypatch):
    """By hand, from scores of the same weights: before the first update and before the second."""
    learner = learners.make(model, "kto", lr=3e-2, micro_batch_tokens=200)
    plan, minis = learners.plan_of(learner, many_tasks)
    expected, seen = [], []
    monkeypatch.setattr(
        learn, "objective", lambda a, o, b, norm, **k: seen.append(norm.log_ratio_mean) or objective(a, o, b, norm, **k)
    )

    def by_hand(index):
        scores = learner.score(minis[index])
        gaps = [(a.astype(float) - s.logp_ref).sum() for a, s in zip(scores, minis[index], strict=True)]
        return sum(gaps) / len(gaps)

    expected.append(by_hand(0))
    start = by_hand(1)
    update = learner.backend.update

    def after(max_norm=None):
        out = update(max_norm)
        expected.append(by_hand(1))
        return out

    learner.backend.update = after
    learner.step(plan, minis)
    values = list(dict.fromkeys(seen))
    assert values == pytest.approx(expected[:2], rel=1e-4)
    assert abs(values[1] - start) > 1e-3, "the second baseline must be that of the updated policy"


def test_the_entropy_threshold_is_the_quantile_of_the_mini_batch_before_the_step(model, many_tasks, monkeypatch):
    def thresholds(lr):
        options = {"quadrants": 5, "quantile": 0.6}
        learner = learners.make(model, "hindsight_aware_hapo", options=options, micro_batch_tokens=200, lr=lr)
        seen = {}

        def spy(a, o, b, norm, **k):
            seen.setdefault(norm.entropy_threshold, []).append(b.entropy_prox[~b.is_teacher])
            return objective(a, o, b, norm, **k)

        monkeypatch.setattr(learn, "objective", spy)
        learner.step(*learners.plan_of(learner, many_tasks))
        return seen

    seen = thresholds(lr=3e-2)
    assert len(seen) == 2
    for threshold, parts in seen.items():
        entropies = torch.cat(parts)
        assert (entropies <= threshold).double().mean() == pytest.approx(0.6, abs=1.5 / len(entropies))
    assert list(thresholds(lr=1e-12)) == pytest.approx(list(seen), rel=1e-12)


def test_later_mini_batches_meet_the_first_policys_values_and_scores(model, many_tasks, monkeypatch):
    """Whatever the first update did: large and vanishing updates leave the second mini-batch the same to compare with."""

    def second(lr):
        learner = learners.make(model, "ppo", mini_batches=2, micro_batch_tokens=100_000, lr=lr)
        batches = []

        def spy(a, o, b, norm, **k):
            batches.append(b)
            return objective(a, o, b, norm, **k)

        monkeypatch.setattr(learn, "objective", spy)
        learner.step(*learners.plan_of(learner, many_tasks))
        return batches[1]

    far, near = second(3e-2), second(1e-12)
    for name in ("logp_prox", "value_old", "returns", "advantage"):
        torch.testing.assert_close(getattr(far, name), getattr(near, name), rtol=0, atol=1e-9)
    assert (far.value - near.value).abs().max() > 1e-2
    torch.testing.assert_close(near.value.detach(), near.value_old, rtol=0, atol=1e-5)
