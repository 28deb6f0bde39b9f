"""The DeepSpeed learner on Ray: equal to a plain loop on one rank and on two, resumable, and never hanging."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from actors import placement, weights
from actors.learner import LearnerGone, LearnerGroup, LearnerRank, check_overrides
from actors.reference import FrozenReference
from hapo_async import metrics
from hapo_async.errors import ConfigError
from hapo_async.learner import learn
from hapo_async.learner.backend import TorchBackend
from hapo_async.learner.policy import load_policy
from hapo_async.types import Version
from hapo_async.weights import Intake
from tests import reference_loop, samples_learn

pytest_plugins = ["tests.learner_fixtures"]

STEPS, SAVED = 5, 3
PARTITION_ALL = {"stage3_param_persistence_threshold": 0}


class SpyRank(LearnerRank):
    """A rank that remembers whole gradients, as DeepSpeed holds them before each update."""

    def start(self, ip: str, port: int) -> int:
        from deepspeed.utils import safe_get_full_grad

        pid = super().start(ip, port)
        self.seen: list[dict[str, torch.Tensor]] = []
        update = self.backend.update

        def spy(max_norm=None):
            self.seen.append({n: safe_get_full_grad(p).clone() for n, p in self.backend.policy.named_parameters()})
            return update(max_norm)

        self.backend.update = spy
        return pid

    def gradients(self) -> list[dict[str, torch.Tensor]]:
        """Those of the updates since the last call."""
        seen, self.seen = self.seen, []
        return seen

    def critic(self) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return torch.cat([safe_get_full_fp32_param(p).reshape(-1) for p in self.backend.policy.value_head.parameters()])

    def skip_above(self, limit: float) -> None:
        self.learner.options["skip_grad_norm"] = limit

    def poison(self) -> None:
        """From now on this rank's losses are NaN, though their gradients are not."""
        objective = learn.objective

        def poisoned(*args, **kwargs):
            loss, stats = objective(*args, **kwargs)
            return loss + (float("nan") - loss).detach(), stats

        learn.objective = poisoned


async def _start(config, model, rank_class=LearnerRank, needs=None) -> LearnerGroup:
    cluster = placement.join(config.learner.ranks)
    name = f"learner-{uuid.uuid4().hex}"
    slot = await asyncio.to_thread(placement.reserve, cluster, config.learner.ranks, 0.5, name)
    return await LearnerGroup.start(config, model, cluster, slot, rank_class, needs)


def _plans(ray, config, tasks, step: int):
    version = Version(0, step)
    return samples_learn.plans(samples_learn.groups(tasks, config, version, store=ray.put), config, version)


async def _weights(learner: LearnerGroup, version: Version) -> dict[str, torch.Tensor]:
    published = await learner.publish(version)
    manifest = published.offer.manifest
    assert published.nbytes == manifest.nbytes
    intake = Intake(version)
    for bucket, ref in zip(manifest.buckets, published.offer.detail["refs"], strict=True):
        intake.put(bucket, np.array(await ref))
    return {name: tensor.clone() for name, tensor in intake.commit(manifest)}


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def _flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])


def _train(ray, learner, config, steps, first: int, last: int) -> list[dict[str, float]]:
    async def run():
        return [await learner.step(_plans(ray, config, steps[i], i)) for i in range(first, last)]

    return asyncio.run(run())


@dataclass(frozen=True)
class Run:
    """A learner that trained all steps, what was seen on the way, and the learner itself, still alive."""

    learner: LearnerGroup
    metrics: list[dict[str, float]]
    gradients: list[list[dict[str, torch.Tensor]]]  # by rank, by update
    saved: dict[str, torch.Tensor]  # weights after SAVED steps
    weights: dict[str, torch.Tensor]
    folder: Path


@pytest.fixture(scope="module")
def steps():
    return [samples_learn.tasks(8, 4, seed=step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def plain_loop(steps, model):
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    return reference_loop.train(policy, steps, reference_loop.Recipe("hapo"))


@pytest.fixture(scope="module", params=[1, 2], ids=["one rank", "two ranks"])
def run(request, ray_session, model, steps, tmp_path_factory):
    """HAPO on one rank (whole parameters) and on two (every parameter partitioned), saved on the way."""
    config = _config(model, request.param)
    folder = tmp_path_factory.mktemp("checkpoint")
    learner = asyncio.run(_start(config, model, SpyRank))
    metrics = _train(ray_session, learner, config, steps, 0, SAVED)
    asyncio.run(learner.save(folder))
    saved = asyncio.run(_weights(learner, Version(0, SAVED)))
    metrics += _train(ray_session, learner, config, steps, SAVED, STEPS)
    weights = asyncio.run(_weights(learner, Version(0, STEPS)))
    yield Run(learner, metrics, ray_session.get([r.gradients.remote() for r in learner.ranks]), saved, weights, folder)
    asyncio.run(learner.close())


def _config(model: str, ranks: int, algorithm: str = "hapo", **more):
    return samples_learn.config(model, algorithm, ranks=ranks, zero={} if ranks == 1 else PARTITION_ALL, **more)


def test_synchronous_training_equals_the_plain_loop(run, model, steps, plain_loop):
    for seen in run.gradients:
        assert len(seen) == len(plain_loop.gradients) == 2 * STEPS
        for i, (mine, theirs) in enumerate(zip(seen, plain_loop.gradients, strict=True)):
            assert _flat(theirs).norm() > 0.1, "a vanishing gradient would compare as equal"
            assert _relative(_flat(mine), _flat(theirs)) < 1e-6, f"update {i}"
    assert run.weights.keys() == plain_loop.weights.keys()
    start = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).state_dict()
    for name, tensor in plain_loop.weights.items():
        torch.testing.assert_close(run.weights[name], tensor, atol=1e-5, rtol=0)
    assert max(float((tensor - start[name]).abs().max()) for name, tensor in plain_loop.weights.items()) > 1e-3
    recipe = reference_loop.Recipe("hapo")
    assert run.metrics[-1]["train/tokens"] == sum(
        len(row.tokens) for task in steps[-1] for row in reference_loop.rows(task, recipe)
    )
    assert all(m["skipped"] == 0 and m["train/updates"] == 2 for m in run.metrics)
    assert [m for m in run.metrics[-1] if m != "skipped" and metrics.find(m) is None] == []


def test_the_saved_model_is_loaded_by_transformers_alone(run):
    loaded = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    assert all(torch.equal(parameter, run.saved[name]) for name, parameter in loaded.named_parameters())
    assert AutoTokenizer.from_pretrained(run.folder / "model").eos_token_id == loaded.config.eos_token_id
    assert list((run.folder / "model").glob("*.safetensors"))
    assert not list((run.folder / "model").glob("*.bin"))


def test_a_killed_rank_is_named_and_two_new_ones_resume_of_which_a_frozen_one_is_named(run, ray_session, model, steps):
    """To the bit where two ranks wrote the state, in the place of the dead; to rounding where one did (its shards are cut
    anew)."""
    config, learner = _config(model, 2), run.learner
    _lose(ray_session, learner, _config(model, len(learner.ranks)), steps, signal.SIGKILL, "died")
    if len(learner.ranks) == 2:
        asyncio.run(learner.restart())
    else:
        learner = asyncio.run(_start(config, model))
    try:
        asyncio.run(learner.load(run.folder))
        resumed = _train(ray_session, learner, config, steps, SAVED, STEPS)
        weights = asyncio.run(_weights(learner, Version(0, STEPS)))
        if learner is run.learner:
            assert all(torch.equal(weights[name], run.weights[name]) for name in weights)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, run.weights[name], atol=1e-5, rtol=0)
        assert max(float((weights[name] - run.saved[name]).abs().max()) for name in weights) > 1e-4
        rates = [m["policy/lr"] for m in run.metrics]
        assert [m["policy/lr"] for m in resumed] == rates[SAVED:]
        assert len(set(rates)) == STEPS, "a constant rate would resume by itself"
        _lose(ray_session, learner, _config(model, 2, deadline_s=4), steps, signal.SIGSTOP, "does not answer")
    finally:
        asyncio.run(learner.close())


def _lose(ray, learner, config, steps, number: int, says: str) -> None:
    """Sends the last rank a signal: the learner is gone at the next step, in time, and at every later call."""
    last = len(learner.ranks) - 1
    learner.config = config
    os.kill(ray.get(learner.ranks[last].ping.remote())["pid"], number)
    began = time.monotonic()
    with pytest.raises(LearnerGone, match=f"learner rank {last}.*{says}"):
        _train(ray, learner, config, steps, 0, 1)
    assert time.monotonic() - began < config.learner.deadline_s + 15
    with pytest.raises(LearnerGone, match=f"rank {last}"):
        asyncio.run(learner.publish(Version(0, 1)))


@pytest.fixture(scope="module")
def anchored(ray_session, model, tmp_path_factory):
    """Two ranks with a partitioned reference and a partitioned critic; its state before any step in ``folder``."""
    learner = asyncio.run(_start(_config(model, 2, "hapo_apo"), model, SpyRank, needs=frozenset({"value"})))
    folder = tmp_path_factory.mktemp("start")
    asyncio.run(learner.save(folder))
    yield learner, folder
    asyncio.run(learner.close())


ALGORITHMS = [
    ("hapo_apo", {}),
    ("ppo", {}),
    ("grpo", {"kl_coef": 0.1, "entropy_coef": 0.01}),
    ("gspo", {}),
    ("kto", {}),
    ("dpo", {}),
    ("fpa", {}),
    ("off_rl_kl", {}),
    ("hpt", {}),
    ("reinforce_pp", {}),
    ("hindsight_aware_hapo", {"quadrants": 5}),
    ("apo", {"critic": True}),
]


def test_one_group_trains_every_kind_of_algorithm_as_one_process_does(anchored, ray_session, model, steps, tmp_path):
    """One after the other on the same weights: two ranks that share parameters, reference and critic, against one
    process that holds them whole. The first step starts from the policy that is its own reference."""
    learner, _ = anchored
    config = learner.config
    policy = load_policy(model, config, dtype=torch.float32, device="cpu", with_value=True)
    whole = FrozenReference(model, config, dtype=torch.float32, device="cpu", engine_config=None)
    backend = TorchBackend(policy, config)
    alone, expected = learn.Learner(backend, config, whole), []
    update = backend.update

    def spy(max_norm=None):
        expected.append({n: p.grad.clone() for n, p in policy.named_parameters()})
        return update(max_norm)

    backend.update = spy
    far = {}
    for step, (name, options) in enumerate(ALGORITHMS):
        config = _config(model, 2, name, options=options)
        asyncio.run(learner.configure(config))
        alone.configure(_config(model, 1, name, options=options))
        (two,) = _train(ray_session, learner, config, [steps[step % STEPS]], 0, 1)
        (one,) = samples_learn.train_alone(alone, [steps[step % STEPS]])
        seen = ray_session.get([rank.gradients.remote() for rank in learner.ranks])
        assert len(seen[0]) == len(seen[1]) == len(expected) == 2
        pairs = [(a, b) for rank in seen for a, b in zip(rank, expected, strict=True)]
        assert min(_flat(b).norm() for _, b in pairs) > 1e-6, "a vanishing gradient would compare as equal"
        far[name] = max(_relative(_flat(a), _flat(b)) for a, b in pairs)
        expected.clear()
        measured = {n for n in one if n.startswith(("loss/", "critic/", "offline/", "policy/hidden", "reference/"))}
        assert [n for n in measured if two[n] != pytest.approx(one[n], rel=1e-4, abs=1e-6)] == [], name
    assert max(far.values()) < 2e-6, far
    critic = torch.cat([p.detach().reshape(-1) for p in policy.value_head.parameters()])
    trained = _critic(ray_session, learner)
    assert trained.abs().max() > 1e-4
    torch.testing.assert_close(trained, critic, atol=1e-5, rtol=0)
    asyncio.run(learner.save(tmp_path))
    _train(ray_session, learner, config, steps, 0, 1)
    assert not torch.equal(_critic(ray_session, learner), trained)
    asyncio.run(learner.load(tmp_path))
    assert torch.equal(_critic(ray_session, learner), trained), "the critic is resumed with the rest"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    published = asyncio.run(_weights(learner, Version(0, 1)))
    assert published.keys() == dict(saved.named_parameters()).keys(), "no critic among them"


def _critic(ray, learner) -> torch.Tensor:
    return ray.get([rank.critic.remote() for rank in learner.ranks])[0]


def test_answers_are_scored_by_all_ranks_in_the_order_given(anchored, model, steps):
    learner, start = anchored
    asyncio.run(learner.load(start))
    config = _config(model, 1)
    (plan,) = samples_learn.plans(samples_learn.groups(steps[0], config, Version(0, 0)), config, Version(0, 0))
    sequences = [s for mini in samples_learn.sequences(plan) for s in mini][:7]
    scored = asyncio.run(learner.score(sequences))
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    for s, scores in zip(sequences, scored, strict=True):
        ids = torch.tensor([[*s.prompt_tokens.tolist(), *s.tokens.tolist()]])
        logp = policy(input_ids=ids).logits[0, len(s.prompt_tokens) - 1 : -1].log_softmax(-1)
        expected = logp.gather(1, ids[0, len(s.prompt_tokens) :, None])[:, 0]
        np.testing.assert_allclose(scores, expected.detach().numpy(), atol=1e-5)
    assert len(asyncio.run(learner.score(sequences[:1]))) == 1, "a rank without a sequence stays in step"


def test_held_out_loss_and_skipped_updates_on_two_ranks(anchored, ray_session, model, steps):
    learner, start = anchored
    config = _config(model, 2, "hpt", mini_batches=1)
    asyncio.run(learner.load(start))
    asyncio.run(learner.configure(config))
    before = asyncio.run(_weights(learner, Version(0, 0)))
    held_out = asyncio.run(learner.holdout(_plans(ray_session, config, steps[0], 0)))
    ray_session.get([rank.skip_above.remote(1e-3) for rank in learner.ranks])
    (skipped,) = _train(ray_session, learner, config, steps, 0, 1)
    assert skipped["loss/value"] == pytest.approx(held_out, rel=1e-6)
    assert skipped["train/skipped_norm"] == 1 and skipped["train/updates"] == skipped["skipped"] == 0
    after = asyncio.run(_weights(learner, Version(0, 0)))
    assert all(torch.equal(before[name], after[name]) for name in before)
    ray_session.get([rank.skip_above.remote(1e3) for rank in learner.ranks])
    (applied,) = _train(ray_session, learner, config, steps, 0, 1)
    assert applied["train/updates"] == 1 and applied["loss/value"] == pytest.approx(held_out, rel=1e-6)
    assert 1e-3 < applied["policy/grad_norm"] < 1e3


def test_configure_refuses_what_cannot_change(anchored, model):
    with pytest.raises(ConfigError, match="zero_stage"):
        asyncio.run(anchored[0].configure(_config(model, 2, zero_stage=2)))


def test_a_loss_that_is_not_finite_on_one_rank_is_skipped_by_all(anchored, ray_session, steps):
    anchored, _ = anchored
    before = asyncio.run(_weights(anchored, Version(0, 0)))
    ray_session.get(anchored.ranks[1].poison.remote())
    (measured,) = _train(ray_session, anchored, anchored.config, steps, 2, 3)
    assert measured["skipped"] == 1
    assert measured["train/skipped"] == anchored.config.learner.mini_batches
    after = asyncio.run(_weights(anchored, Version(0, 0)))
    assert all(torch.equal(before[name], after[name]) for name in before)


# --------------------------------------------------------------------------------------------------------------------
# Without Ray


class _Whole:
    """A gatherer whose parameters are never partitioned; it counts the collectives it was asked for."""

    def __init__(self, rank: int) -> None:
        self.rank, self.gathers = rank, 0
        self.model = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(6)))

    def named_parameters(self):
        return self.model.named_parameters()

    @contextlib.contextmanager
    def gathered(self, parameters):
        self.gathers += 1
        yield


def test_a_failing_sink_still_walks_all_weights():
    """256 bytes each, two to a stretch: the other ranks expect three collectives, whatever the sink does."""
    well, ill, other = _Whole(0), _Whole(0), _Whole(1)
    assert [len(b.tensors) for b in weights.stream(well, 512, lambda bucket, data: None)] == [2, 2, 2]

    def fail(bucket, data):
        raise OSError("the store is full")

    with pytest.raises(OSError, match="full"):
        weights.stream(ill, 512, fail)
    assert weights.stream(other, 512, fail) is None
    assert well.gathers == ill.gathers == other.gathers == 3


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"zero_optimisation": {}}, "zero_optimization"),
        ({"gradient_clipping": 1.0}, "learner.grad_clip"),
        ({"zero_optimization": {"stage": 2}}, "learner.zero_stage"),
        ({"zero_optimization": {"overlap_com": True}}, "overlap_comm"),
        ({"zero_optimization": {"reduce_bucket_size": "many"}}, "reduce_bucket_size"),
    ],
)
def test_the_pass_through_section_is_checked_against_deepspeed(section, message):
    with pytest.raises(ConfigError, match=message):
        check_overrides(section)


def test_a_valid_pass_through_section_is_accepted():
    check_overrides({"zero_optimization": {"overlap_comm": True}, "wall_clock_breakdown": False})
