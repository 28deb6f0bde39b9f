"""A step that cannot be made names the groups that are to blame, and changes no weight."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from hapo_async.learner import tally
from hapo_async.learner.blame import LOST, Blame
from hapo_async.types import Source, Version
from tests import learners, samples_learn

pytest_plugins = ["tests.learner_fixtures"]


@pytest.fixture
def scene(model):
    """A learner, the plan of a step in two mini-batches, its sequences, and the weights before it."""
    learner = learners.make(model, "grpo", torch.float32, lr=1e-2, micro_batch_tokens=200)
    version = Version(0, 0)
    tasks = samples_learn.tasks(8, 4, seed=3)
    (plan,) = samples_learn.plans(samples_learn.groups(tasks, learner.config, version), learner.config, version)
    before = [p.detach().clone() for p in learner.backend.policy.parameters()]
    return learner, plan, samples_learn.sequences(plan), before


def unchanged(learner, before) -> bool:
    return all(torch.equal(a, b) for a, b in zip(learner.backend.policy.parameters(), before, strict=True))


def spoil(minis, mini: int, index: int, **fields):
    """The sequences with one of them changed; ``fields`` take the sequence."""
    old = minis[mini][index]
    changed = replace(old, **{name: make(old) for name, make in fields.items()})
    return [[changed if s is old else s for s in part] for part in minis]


def with_value(array: np.ndarray, value: float) -> np.ndarray:
    out = array.copy()
    out[len(out) // 2] = value
    return out


SPOILT = {
    "advantage": (lambda s: math.nan, "its advantage is nan"),
    "reward": (lambda s: math.inf, "its reward is inf"),
    "weight": (lambda s: -math.inf, "its weight is -inf"),
    "logp_behave": (lambda s: with_value(s.logp_behave, math.nan), "a behaviour log-prob is not finite"),
    "version_steps": (lambda s: s.version_steps[:-1], "of different lengths"),
    "tokens": (lambda s: with_value(s.tokens, 10**6), "a token id of its answer is outside"),
    "prompt_tokens": (lambda s: with_value(s.prompt_tokens, -1), "a token id of its prompt is outside"),
}


@pytest.mark.parametrize("field", SPOILT)
def test_a_row_that_is_unsound_is_named_before_anything_is_computed(scene, field):
    learner, plan, minis, before = scene
    index = next(
        i for i, s in enumerate(minis[1]) if (s.sources == Source.POLICY).all() and s.judged and len(s.tokens) > 2
    )
    make, reason = SPOILT[field]
    report = learner.step(plan, spoil(minis, 1, index, **{field: make}))
    (blame,) = report.blamed
    assert blame.key == plan.minis[1][minis[1][index].group].key and reason in blame.reason
    assert tally.merge([report]) == {"train/updates": 0.0, "train/skipped": 1.0}
    assert not learner.backend.seen and unchanged(learner, before)
    assert not learner.step(plan, minis).blamed and not unchanged(learner, before)


def test_lost_groups_stop_the_step_before_anything_is_computed(scene):
    learner, plan, minis, before = scene
    key = plan.minis[0][0].key
    report = learner.step(plan, [[s for s in minis[0] if s.group != 0], minis[1]], [Blame(key, LOST)])
    assert report.blamed == (Blame(key, LOST),) and report.blamed[0].is_lost and unchanged(learner, before)


def test_log_probs_that_come_out_not_finite_name_their_group(scene):
    """A weight that is not finite, of a token that one group alone holds."""
    learner, plan, minis, _ = scene
    model = learner.backend.policy.model
    used = {i for mini in minis for s in mini for ids in (s.prompt_tokens, s.tokens) for i in ids.tolist()}
    rare = max(set(range(1, model.config.vocab_size)) - used)
    minis = spoil(minis, 0, 5, tokens=lambda s: with_value(s.tokens, rare))
    embedding = model.get_input_embeddings()
    hook = embedding.register_forward_hook(
        lambda module, inputs, out: torch.where((inputs[0] == rare)[..., None], math.nan, out)
    )
    report = learner.step(plan, minis)
    hook.remove()
    key = plan.minis[0][minis[0][5].group].key
    assert report.blamed == (Blame(key, "a log-prob of the policy is not finite"),)
    assert report.shared["train/updates"] == 1.0 and report.shared["train/skipped"] == 1.0


def test_a_loss_that_is_not_finite_by_itself_names_the_groups_of_its_micro_batch(scene, monkeypatch):
    from hapo_async.learner import learn

    objective, calls = learn.objective, []

    def second_is_infinite(*arguments, **more):
        loss, stats = objective(*arguments, **more)
        calls.append(loss)
        return (loss * math.inf if len(calls) == 2 else loss), stats

    monkeypatch.setattr(learn, "objective", second_is_infinite)
    learner, plan, minis, _ = scene
    report = learner.step(plan, minis)
    keys = {g.key for g in plan.minis[0]}
    assert report.blamed and {b.key for b in report.blamed} < keys
    assert {b.reason for b in report.blamed} == {"the loss of its micro-batch is not finite"}
