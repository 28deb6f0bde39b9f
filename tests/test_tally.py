"""Metrics of a step: declared, exact, and added up over micro-batches and ranks."""

from __future__ import annotations

import math

import pytest
import torch

from hapo_async import batch, metrics
from hapo_async.learner import learn, tally
from hapo_async.learner.policy import Scores
from hapo_async.types import Version
from tests import learners, samples_learn

pytest_plugins = ["tests.learner_fixtures"]


@pytest.mark.parametrize("algorithm", ["hapo", "ppo", "kto", "apo"])
def test_metrics_are_declared(model, reference, steps, algorithm):
    (report,) = samples_learn.train_alone(learners.make(model, algorithm, reference=reference), steps[:1])
    assert [name for name in report if metrics.find(name) is None] == []


def test_metrics_are_measured(model, steps):
    (report,) = samples_learn.train_alone(learners.make(model), steps[:1])
    assert 0 < report["policy/entropy"] <= math.log(100) + 1e-9
    assert report["staleness/max"] == 0
    assert report["train/teacher_tokens"] > 0
    assert 0 <= report["train/padding_frac"] < 1
    assert report["policy/lr"] > 0


def test_the_age_of_tokens_counts_from_the_learners_version(model, steps):
    learner = learners.make(model)
    groups = samples_learn.groups(steps[0], learner.config, Version(0, 2))
    (plan,) = batch.plan_step(groups, 1, 1, Version(0, 5))
    report = tally.merge([learner.step(plan, samples_learn.sequences(plan))])
    assert report["staleness/mean"] == report["staleness/max"] == 3


def test_merge_weighs_means_and_adds_counts():
    def report(value, weight, top):
        return tally.RankReport(
            {"a": (value, weight), "train/teacher_tokens": (3, 1)}, {"n": 2}, {"m": top}, {"lr": 0.1}
        )

    assert tally.merge([report(1.0, 1.0, 5), report(0.0, 3.0, 4)]) == {
        "a": 0.25,
        "train/teacher_tokens": 6,
        "n": 4,
        "m": 5,
        "lr": 0.1,
    }


def test_hidden_gradients_of_right_and_wrong_answers(model, many_tasks, monkeypatch):
    """Against autograd's own gradients of the hidden states."""
    learner = learners.make(model, "grpo", mini_batches=1, micro_batch_tokens=300)
    kept = []
    hidden = type(learner.backend.policy).hidden

    def keep(policy, micro):
        out = hidden(policy, micro)
        out.retain_grad()
        kept.append((micro, out))
        return out

    monkeypatch.setattr(type(learner.backend.policy), "hidden", keep)
    (report,) = samples_learn.train_alone(learner, [many_tasks])
    for which, value in (("correct", 1.0), ("incorrect", 0.0)):
        squares = [(h.grad[m.reward[m.sequence] == value] ** 2).sum() for m, h in kept]
        assert len(squares) > 1 and sum(squares) > 0
        assert report[f"policy/hidden_grad_norm/{which}"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-12)


def test_cached_answers_have_no_age(model, many_tasks):
    learner = learners.make(model, "off_rl")
    plan, minis = learners.plan_of(learner, many_tasks, step=7)
    report = tally.merge([learner.step(plan, minis)])
    assert "staleness/mean" not in report and "staleness/max" not in report
    (micro,) = batch.pack(minis[0], 100_000)
    logp = torch.zeros(micro.trained_tokens)
    assert (learn.token_batch(micro, Scores(logp), step=7).age == 0).all()
