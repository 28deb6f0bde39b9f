"""The frozen reference: what it scores, at which temperature, and how little it hands over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hapo_async import batch
from hapo_async.learner import tally
from hapo_async.types import Source, Version
from tests import learners, samples_learn

pytest_plugins = ["tests.learner_fixtures"]


def test_the_reference_hands_over_what_anchored_tokens_need_and_nothing_else(model, reference, many_tasks):
    """K ids and K log-probs, and which token they are for, where a sampled answer that trains has A < 0."""
    learner = learners.make(model, "hapo_apo", reference=reference, options={"k": 5})
    plan, minis = learners.plan_of(learner, many_tasks)
    minis = [[replace(s, advantage=-1.0) if s.is_teacher else s for s in mini] for mini in minis]
    report = tally.merge([learner.step(plan, minis)])
    rows = [row for mini in plan.minis for group in mini for row in group.rows]
    assert any(row.source is Source.TEACHER for row in rows), "teachers are there, and must not be scored"
    anchored = sum(row.length for row in rows if row.source is Source.POLICY and row.advantage < 0)
    assert 0 < anchored < sum(row.length for row in rows)
    assert report["reference/bytes"] == anchored * (4 + 5 * (4 + 8))  # int32 position, int32 ids, fp64 log-probs
    (report,) = samples_learn.train_alone(learners.make(model, "grpo"), [many_tasks])
    assert "reference/bytes" not in report


def test_the_reference_scores_sampled_tokens_at_the_rollouts_temperature(reference, steps):
    learner_config = samples_learn.config("", "grpo_kl")
    (plan,) = samples_learn.plans(
        samples_learn.groups(steps[0], learner_config, Version(0, 0)), learner_config, Version(0, 0)
    )
    sequences = [replace(s, temperature=0.7) for s in samples_learn.sequences(plan)[0]]
    micro = batch.pack(sequences, 100_000, dtype=torch.float64)[0]
    scored = reference.logp(micro)
    states, (weight, bias) = reference.states(micro), reference.head()
    logits = states @ weight.T + (0 if bias is None else bias)
    by_hand = (logits / 0.7).log_softmax(-1).gather(1, micro.targets[:, None])[:, 0]
    torch.testing.assert_close(scored, by_hand, rtol=0, atol=1e-12)


def test_cached_scores_take_the_place_of_a_reference(model, reference, many_tasks):
    report = samples_learn.train_alone(learners.make(model, "dpo", reference=reference), [many_tasks])[0]
    assert report["reference/bytes"] == 0
    alone = samples_learn.train_alone(learners.make(model, "dpo"), [many_tasks])[0]
    assert alone["loss/value"] == report["loss/value"]
    learner = learners.make(model, "dpo")
    plan, minis = learners.plan_of(learner, many_tasks)
    minis[1][0] = replace(minis[1][0], logp_ref=None)
    with pytest.raises(ValueError, match="without cached scores"):
        learner.step(plan, minis)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_top_tokens_are_those_of_the_whole_distribution(reference, steps, layout):
    config = samples_learn.config("", "apo")
    (plan,) = samples_learn.plans(samples_learn.groups(steps[0], config, Version(0, 0)), config, Version(0, 0))
    micro = batch.pack(samples_learn.sequences(plan)[0], 100_000, layout, dtype=torch.float64)[0]
    positions = (micro.advantage < 0).nonzero()[::3, 0]
    anchors = reference.topk(micro, positions, 4)
    weight, bias = reference.head()
    logits = reference.states(micro)[positions] @ weight.T + (0 if bias is None else bias)
    top = logits.log_softmax(-1).topk(4)
    torch.testing.assert_close(anchors.logp, top.values, rtol=0, atol=1e-12)
    assert anchors.ids.dtype == anchors.positions.dtype == torch.int32
    assert anchors.ids.long().equal(top.indices) and anchors.positions.long().equal(positions)
