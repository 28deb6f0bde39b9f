"""The critic: advantages sequence by sequence, and values that are learnt."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hapo_async import batch
from hapo_async.learner import critic
from hapo_async.types import Source, Version
from tests import learners, samples_learn

pytest_plugins = ["tests.learner_fixtures"]


def test_estimates_are_made_sequence_by_sequence(many_tasks):
    config = samples_learn.config("", "ppo")
    (plan,) = samples_learn.plans(samples_learn.groups(many_tasks, config, Version(0, 0)), config, Version(0, 0))
    sequences = samples_learn.sequences(plan)[0]
    teacher = replace(sequences[0], is_teacher=True, sources=np.full_like(sequences[0].sources, Source.TEACHER))
    sequences = [*sequences[1:], replace(teacher, advantage=0.3)]
    for micro in batch.pack(sequences, 300, dtype=torch.float64):
        value = torch.rand(micro.trained_tokens, dtype=torch.float64)
        made = critic.estimate(micro, value, discount=0.9, lam=0.8)
        for i in micro.sequence_ids:
            s, mine = sequences[i], micro.sequence == i
            v = value[mine].tolist()
            expected = [0.0] * len(v)
            ahead = 0.0
            for t in reversed(range(len(v))):
                reward = s.reward if t == len(v) - 1 else 0.0
                later = v[t + 1] if t + 1 < len(v) else 0.0
                ahead = expected[t] = reward + 0.9 * later - v[t] + 0.9 * 0.8 * ahead
            if s.is_teacher:
                expected, returns = [0.3] * len(v), v
            elif not s.judged:
                expected, returns = [0.0] * len(v), v
            else:
                returns = [a + b for a, b in zip(expected, v, strict=True)]
            assert made.advantage[mine].tolist() == pytest.approx(expected)
            assert made.returns[mine].tolist() == pytest.approx(returns)
    assert not all(s.judged for s in sequences)


def test_the_critic_learns_to_tell_right_from_wrong(model, many_tasks):
    """Answers whose reward their first token gives away."""
    tasks = [
        replace(t, answers=[[3 if r == 1 else 4, *ids] for ids, r in zip(t.answers, t.rewards, strict=True)])
        for t in many_tasks[2:10]
    ]
    learner = learners.make(model, "ppo", torch.float32, lr=3e-3, mini_batches=1, lr_schedule="constant")
    torch.nn.init.zeros_(learner.backend.policy.value_head.weight)
    reports = samples_learn.train_alone(learner, [tasks] * 20)
    assert reports[0]["critic/value_mean"] == 0
    assert reports[-1]["critic/explained_variance"] > 0.5 > 0.1 > reports[0].get("critic/explained_variance", 0)
    assert reports[-1]["loss/value_function"] < reports[0]["loss/value_function"] / 2
