"""A LoRA policy under DeepSpeed: equal to one process that trains adapters, streamed, saved and resumed as an adapter."""

from __future__ import annotations

import asyncio
import json
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors import placement, zero_files
from actors.learner import LearnerGroup, LearnerRank
from actors.reference import FrozenReference
from hapo_async import lora
from hapo_async.errors import ConfigError, RunError
from hapo_async.learner import learn
from hapo_async.learner.backend import TorchBackend
from hapo_async.learner.policy import load_policy
from hapo_async.lora import Lora
from hapo_async.types import Version
from hapo_async.weights import Intake
from tests import samples_learn

STEPS, SAVED = 3, 2
TABLE = {"rank": 4, "alpha": 12.0}


class SpyRank(LearnerRank):
    """A rank that remembers the gradients of what is trained, as DeepSpeed holds them before each update."""

    def start(self, ip: str, port: int) -> int:
        from deepspeed.utils import safe_get_full_grad

        pid = super().start(ip, port)
        self.seen: list[dict[str, torch.Tensor]] = []
        update = self.backend.update

        def spy(max_norm=None):
            named = self.backend.policy.named_parameters()
            self.seen.append({n: safe_get_full_grad(p).clone() for n, p in named if p.requires_grad})
            return update(max_norm)

        self.backend.update = spy
        return pid

    def move_away_and_back(self) -> int:
        """How many frozen weights were elsewhere meanwhile, and are as before; another type stands for another device."""
        named = self.backend.policy.named_parameters()
        held = [getattr(p, "ds_tensor", p) for _, p in named if not p.requires_grad]
        before = [t.data.clone() for t in held]
        self.backend._move_frozen(torch.float64)
        away = [t.data.dtype == torch.float64 for t in held]
        self.backend._move_frozen(torch.float32)
        assert all(torch.equal(t.data, b) for t, b in zip(held, before, strict=True))
        return sum(away)

    def gradients(self) -> list[dict[str, torch.Tensor]]:
        return self.seen


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return samples_learn.random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def steps():
    return [samples_learn.tasks(8, 4, seed=step) for step in range(STEPS)]


@pytest.fixture(scope="module")
def config(model):
    """Two ranks of ZeRO-3 that train APO with a critic and a reference, and recompute activations."""
    return samples_learn.config(
        model,
        "apo",
        {"stage3_param_persistence_threshold": 0},
        options={"critic": True},
        ranks=2,
        gradient_checkpointing=True,
        lora=TABLE,
    )


async def _start(config, model: str, rank_class=LearnerRank) -> LearnerGroup:
    cluster = placement.join(config.learner.ranks)
    name = f"learner-{uuid.uuid4().hex}"
    slot = await asyncio.to_thread(placement.reserve, cluster, config.learner.ranks, 0.5, name)
    return await LearnerGroup.start(config, model, cluster, slot, rank_class)


def _train(ray, learner, config, steps, first: int, last: int) -> list[dict[str, float]]:
    async def run():
        out = []
        for i in range(first, last):
            version = Version(0, i)
            groups = samples_learn.groups(steps[i], config, version, store=ray.put)
            out.append(await learner.step(samples_learn.plans(groups, config, version)))
        return out

    return asyncio.run(run())


async def _published(learner: LearnerGroup, version: Version):
    """(manifest, tensors) of what generators are sent."""
    published = await learner.publish(version)
    manifest = published.offer.manifest
    intake = Intake(version, manifest.kind)
    for bucket, ref in zip(manifest.buckets, published.offer.detail["refs"], strict=True):
        intake.put(bucket, np.array(await ref))
    assert published.nbytes == manifest.nbytes
    return manifest, {name: tensor.clone() for name, tensor in intake.commit(manifest)}


def _flat(tensors) -> torch.Tensor:
    return torch.cat([tensors[name].reshape(-1).double() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def run(ray_session, config, model, steps, tmp_path_factory):
    """A learner that trained all steps, saved on the way."""
    folder = tmp_path_factory.mktemp("checkpoint")
    learner = asyncio.run(_start(config, model, SpyRank))
    measured = _train(ray_session, learner, config, steps, 0, SAVED)
    asyncio.run(learner.save(folder))
    manifest, sent = asyncio.run(_published(learner, Version(0, SAVED)))
    measured += _train(ray_session, learner, config, steps, SAVED, STEPS)
    _, last = asyncio.run(_published(learner, Version(0, STEPS)))
    seen = ray_session.get([rank.gradients.remote() for rank in learner.ranks])
    yield SimpleNamespace(
        learner=learner,
        folder=folder,
        measured=measured,
        gradients=seen,
        manifest=manifest,
        sent=sent,
        last=last,
    )
    asyncio.run(learner.close())


def _alone(config, model: str, steps):
    """(gradients of each update, the policy afterwards, metrics) of one plain process that trains the same adapters."""
    needs = learn.needs_of(config)
    policy = load_policy(model, config, dtype=torch.float32, device="cpu", with_value="value" in needs)
    lora.attach(policy.model, Lora.of(config), config.seed)
    backend, seen = TorchBackend(policy, config), []
    update = backend.update

    def spy(max_norm=None):
        seen.append({n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
        return update(max_norm)

    backend.update = spy
    reference = None
    if "reference" in needs:
        reference = FrozenReference(model, config, dtype=torch.float32, device="cpu", engine_config=None)
    return seen, policy, samples_learn.train_alone(learn.Learner(backend, config, reference), steps)


def test_training_equals_one_plain_process(run, config, model, steps):
    whole = config.model_copy(update={"learner": config.learner.model_copy(update={"ranks": 1})})
    expected, policy, measured = _alone(whole, model, steps)
    critic = {"value_head.weight", "value_head.bias"}
    for seen in run.gradients:
        assert len(seen) == len(expected) == 2 * STEPS
        for mine, theirs in zip(seen, expected, strict=True):
            assert mine.keys() == theirs.keys() and len(mine) == 28 + 2 and critic <= mine.keys()
            assert _flat(theirs).norm() > 0.01, "a vanishing gradient would compare as equal"
            assert float((_flat(mine) - _flat(theirs)).norm() / _flat(theirs).norm()) < 2e-6
    trained = {name: p.detach() for name, p in lora.streamed(policy.model.named_parameters())}
    assert run.last.keys() == trained.keys()
    for name, tensor in trained.items():
        torch.testing.assert_close(run.last[name], tensor, atol=1e-5, rtol=0)
    assert min(float((run.last[name] - run.sent[name]).abs().max()) for name in trained) > 1e-6, "all of it moves"
    assert [m["loss/value"] for m in run.measured] == pytest.approx([m["loss/value"] for m in measured], rel=1e-4)


def test_the_stream_carries_the_adapter_alone(run):
    saved = load_file(run.folder / "model" / "adapter" / "adapter_model.safetensors")
    assert run.manifest.kind == "adapter" and run.manifest.base is None
    assert run.sent.keys() == saved.keys() and len(saved) == 28
    assert all(torch.equal(run.sent[name], tensor) for name, tensor in saved.items())
    size = 4 * 4 * 2 * (4 * (64 + 64) + 3 * (64 + 128))  # fp32, rank 4, two layers: attention, then the MLP
    assert run.manifest.nbytes == size == sum(t.nbytes for t in saved.values())


def test_the_saved_model_is_base_plus_adapter(run, model):
    loaded = AutoModelForCausalLM.from_pretrained(run.folder / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    changed = {n for n, p in loaded.named_parameters() if not torch.equal(p, dict(base.named_parameters())[n])}
    assert len(changed) == 14
    settings = json.loads((run.folder / "model" / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["base_model_name_or_path"]) == (4, 12.0, model)
    theirs = PeftModel.from_pretrained(base, run.folder / "model" / "adapter").merge_and_unload()
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(dict(loaded.named_parameters())[name], weight, atol=1e-6, rtol=0)
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(loaded(ids).logits, theirs(ids).logits, atol=1e-5, rtol=0)


def test_a_saved_state_goes_on_to_the_bit_and_holds_no_frozen_weights(run, ray_session, config, steps):
    files = list((run.folder / "state" / "zero").glob("*.pt"))
    trained = sum(t.nbytes for t in run.sent.values()) + 4 * 65
    assert len(files) == 4 and sum(f.stat().st_size for f in files) < 3 * trained + 4 * 60_000
    asyncio.run(run.learner.load(run.folder))
    _, sent = asyncio.run(_published(run.learner, Version(1, SAVED)))
    assert all(torch.equal(sent[name], tensor) for name, tensor in run.sent.items())
    assert ray_session.get([rank.move_away_and_back.remote() for rank in run.learner.ranks]) == [26, 26]
    _train(ray_session, run.learner, config, steps, SAVED, STEPS)
    _, sent = asyncio.run(_published(run.learner, Version(1, STEPS)))
    assert all(torch.equal(sent[name], tensor) for name, tensor in run.last.items())


def test_another_adapter_needs_another_learner(run, config):
    changed = config.learner.model_copy(update={"lora": {}})
    with pytest.raises(ConfigError, match=r"learner.lora cannot change"):
        asyncio.run(run.learner.configure(config.model_copy(update={"learner": changed})))


@pytest.mark.parametrize("table", [{}, {**TABLE, "rank": 8}, {**TABLE, "alpha": 4.0}, {**TABLE, "targets": ["q_proj"]}])
def test_a_state_of_another_adapter_is_refused(run, config, model, table):
    settings = Lora.of(samples_learn.config(model, lora=table))
    other = SimpleNamespace(
        stage=config.learner.zero_stage,
        policy=SimpleNamespace(value_head=object()),
        lora=settings,
        targets=lora.resolve(settings, lora.skeleton(model)) if settings else (),
    )
    with pytest.raises(RunError, match=r"learner.lora=\{'rank': 4, 'alpha': 12.0, .*start a new run with model="):
        zero_files.load_state(other, run.folder / "state")
