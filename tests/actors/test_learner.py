"""The DeepSpeed learner on Ray: equal to a plain loop on one rank and on two, resumable, and never hanging."""

from __future__ import annotations

import asyncio
import os
import signal
import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from actors import placement
from actors.learner import LearnerGroup, LearnerRank, check_overrides
from hapo_async import batch
from hapo_async.errors import ConfigError, RunError
from hapo_async.types import Version
from hapo_async.weights import Staging
from tests import reference_loop, samples_learn

STEPS = 5


class SpyRank(LearnerRank):
    """A rank that remembers whole gradients, as DeepSpeed holds them before each update."""

    def start(self, ip: str, port: int) -> int:
        from deepspeed.utils import safe_get_full_grad

        pid = super().start(ip, port)
        self.seen: list[dict[str, torch.Tensor]] = []
        update = self.backend.update

        def spy():
            self.seen.append({n: safe_get_full_grad(p).clone() for n, p in self.backend.named_parameters()})
            return update()

        self.backend.update = spy
        return pid

    def gradients(self) -> list[dict[str, torch.Tensor]]:
        return self.seen

    def die_in_step(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


async def _start(ray, config, model, rank_class=LearnerRank) -> LearnerGroup:
    resources = ray.cluster_resources()
    cluster = placement.Cluster(resources["CPU"], 0.0, None)
    slot = await asyncio.to_thread(placement.reserve, cluster, config.learner.ranks, 0.5, "learner", 60.0)
    return await LearnerGroup.start(config, model, cluster, slot, rank_class)


def _plans(ray, config, tasks, step: int):
    version = Version(0, step)
    groups = samples_learn.groups(tasks, config, version, store=ray.put)
    return batch.plan_step(groups, config.learner.ranks, config.learner.mini_batches, version)


async def _weights(ray, learner: LearnerGroup, version: Version) -> dict[str, torch.Tensor]:
    manifest, refs = await learner.publish(version)
    staging = Staging(manifest)
    for bucket, ref in zip(manifest.buckets, refs, strict=True):
        staging.put(bucket.index, np.array(await ref))
    return {name: tensor.clone() for name, tensor in staging.commit()}


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def steps():
    return [samples_learn.tasks(8, 4, seed=step) for step in range(STEPS)]


@pytest.fixture(scope="module", params=["grpo", "hapo"])
def reference(request, steps, chain_model):
    """(algorithm, trace of the plain loop over the five steps)."""
    model = AutoModelForCausalLM.from_pretrained(chain_model, dtype=torch.float32, attn_implementation="eager")
    return request.param, reference_loop.train(model, steps, reference_loop.Recipe(request.param))


@pytest.mark.parametrize("ranks", [1, 2])
def test_synchronous_training_equals_the_plain_loop(ray_session, chain_model, steps, reference, ranks):
    algorithm, trace = reference
    config = samples_learn.config(chain_model, algorithm, ranks=ranks)

    async def run():
        learner = await _start(ray_session, config, chain_model, SpyRank)
        try:
            metrics = [await learner.step(_plans(ray_session, config, tasks, i)) for i, tasks in enumerate(steps)]
            weights = await _weights(ray_session, learner, Version(0, STEPS))
            gradients = [await rank.gradients.remote() for rank in learner.ranks]
            return metrics, weights, gradients
        finally:
            await learner.close()

    metrics, weights, gradients = asyncio.run(run())
    assert len(trace.gradients) == 2 * STEPS
    for seen in gradients:
        assert len(seen) == 2 * STEPS
        for i, (mine, theirs) in enumerate(zip(seen, trace.gradients, strict=True)):
            assert _flat(theirs).norm() > 1e-3, "a vanishing gradient would compare as equal"
            # Later updates start from weights that already differ by rounding.
            assert _relative(_flat(mine), _flat(theirs)) < 1e-6 * (1 + i), f"update {i}"
    assert weights.keys() == trace.weights.keys()
    moved = 0.0
    start = AutoModelForCausalLM.from_pretrained(chain_model, dtype=torch.float32).state_dict()
    for name, tensor in trace.weights.items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=0)
        moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-3, "five steps must move the weights, or the comparison shows nothing"
    recipe = reference_loop.Recipe(algorithm)
    expected = sum(len(row.tokens) for task in steps[-1] for row in reference_loop.rows(task, recipe))
    assert metrics[-1]["train/tokens"] == expected
    assert all(m["skipped"] == 0 and m["train/updates"] == 2 for m in metrics)
