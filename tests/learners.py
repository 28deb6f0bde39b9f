"""Learners on plain torch for tests: one process, no DeepSpeed, every update's gradients kept."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import torch

from actors.reference import FrozenReference
from hapo_async.batch import StepPlan
from hapo_async.learner import learn
from hapo_async.learner.backend import TorchBackend
from hapo_async.learner.policy import load_policy
from hapo_async.types import Version
from tests import samples_learn
from tests.reference_loop import Task


def make(model: str, algorithm: str = "hapo", dtype=torch.float64, reference=None, **settings) -> learn.Learner:
    """A learner on plain torch that keeps every update's gradients in ``learner.backend.seen``."""
    config = samples_learn.config(model, algorithm, **settings)
    needs = learn.needs_of(config)
    policy = load_policy(model, config, dtype=dtype, device="cpu", with_value="value" in needs)
    if "value" in needs:  # a critic that has learnt something already
        torch.nn.init.normal_(policy.value_head.weight, std=0.1, generator=torch.Generator().manual_seed(3))
    backend = TorchBackend(policy, config)
    backend.seen = []
    update = backend.update

    def spy(max_norm=None):
        backend.seen.append({n: p.grad.clone() for n, p in backend.policy.named_parameters()})
        return update(max_norm)

    backend.update = spy
    return learn.Learner(backend, config, reference)


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradients[name].reshape(-1).double() for name in sorted(gradients)])


def relative(a, b) -> float:
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def plan_of(learner, tasks, step=0) -> tuple[StepPlan, list]:
    version = Version(0, step)
    (plan,) = samples_learn.plans(samples_learn.groups(tasks, learner.config, version), learner.config, version)
    return plan, samples_learn.sequences(plan)


def many_tasks() -> list[Task]:
    """16 prompts with 4 answers each, one without a verdict, all with a teacher."""
    out = samples_learn.tasks(16, 4, seed=9)
    out[1].rewards[2] = math.nan
    return [replace(t, teacher=t.teacher or t.prompt * 2) for t in out]


def other_reference(folder: Path) -> FrozenReference:
    """Another random model, in fp64: a policy is never its own reference."""
    path = samples_learn.random_model(folder, seed=1)
    return FrozenReference(path, samples_learn.config(), dtype=torch.float64, device="cpu", engine_config=None)
