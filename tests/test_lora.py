"""LoRA without a cluster: targets and errors, gradients against closed forms, merging against peft, files."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hapo_async import lora, toy
from hapo_async.config import parse
from hapo_async.errors import ConfigError
from hapo_async.learner import learn
from hapo_async.learner.backend import TorchBackend
from hapo_async.learner.policy import load_policy
from hapo_async.lora import Lora
from tests import learners, samples_learn

MODEL = str(toy.MODEL_DIR)


def config(algorithm: str = "hapo", **table):
    return parse({"algorithm": algorithm, "learner": {"lora": {"rank": 4, **table}}})


def adapted(dtype=torch.float32, seed: int = 0, **table):
    """(model with adapters that do something, its LoRA settings, targets)."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype, attn_implementation="eager")
    settings = Lora.of(config(**table))
    targets = lora.attach(model, settings, seed)
    stir(model)
    return model, settings, targets


def stir(model) -> None:
    """B is 0 at the start; this gives it values, so that merging changes something."""
    source = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=source)


def state_of(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


# --------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"targets": ["q_proj", "qproj"]}, r"'qproj'.*no linear layer.*q_proj.*auto"),
        ({"targets": ["lm_head"]}, r"'lm_head'.*head cannot be adapted"),
        ({"targets": ["embed_tokens"]}, "'embed_tokens'"),
        ({"dropout": 0.1}, r"dropout=0.1 with algorithm='hapo'.*Set learner.lora.dropout=0"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_starts(table, says):
    with pytest.raises(ConfigError, match=says):
        lora.check(config(**table), MODEL)


def test_what_can_be_trained_is_accepted():
    for table in ({}, {"targets": ["q_proj", "mlp.down_proj"]}, {"targets": ["layers.1.self_attn.v_proj"]}):
        lora.check(config(**table), MODEL)
    lora.check(config("sft", dropout=0.1), MODEL)
    lora.check(parse({}), "/no/such/model")
    assert lora.size(parse({}), "/no/such/model") == 0


def test_a_model_whose_files_name_a_layer_otherwise_is_refused(tmp_path):
    tensors = load_file(Path(MODEL) / "model.safetensors")
    tensors["model.layers.0.self_attn.qkv_proj.weight"] = tensors.pop("model.layers.0.self_attn.q_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((Path(MODEL) / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"no tensor 'model.layers.0.self_attn.q_proj.weight'.*learner.lora"):
        lora.check(config(), str(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="safetensors"):
        lora.check(config(), str(tmp_path))


def test_adapters_alone_are_trainable_and_start_from_the_seed():
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    first, again, other = (copy.deepcopy(plain) for _ in range(3))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    names = ("down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj")
    assert lora.attach(first, Lora.of(config()), 0) == names
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    lora.attach(again, Lora.of(config()), 0)
    lora.attach(other, Lora.of(config()), 1)
    trained = {n for n, p in first.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in first.parameters() if p.requires_grad) == lora.size(config(), MODEL) > 0
    assert len(trained) == 2 * 7 * 2 and all(".lora_" in name for name in trained)
    assert all(torch.equal(p, dict(again.named_parameters())[n]) for n, p in first.named_parameters())
    assert not torch.equal(*(next(p for n, p in m.named_parameters() if ".lora_A." in n) for m in (first, other)))
    ids = torch.arange(3, 40)[None]
    assert torch.equal(first(ids).logits, plain(ids).logits), "an adapter changes nothing at the start"


# --------------------------------------------------------------------------------------------------------------------
# Gradients


def test_gradients_are_the_closed_form_of_those_of_the_merged_weights(tmp_path):
    """dL/dB = s dL/dW A^T and dL/dA = s B^T dL/dW, with dL/dW from a learner that trains the merged weights, in fp64. The
    frozen weights get none, and the step moves the adapter alone."""
    base = samples_learn.random_model(tmp_path / "base")
    settings = samples_learn.config(base, "hapo", lora={"rank": 4, "alpha": 6.0}, mini_batches=1, lr=1e-2)
    policy = load_policy(base, settings, dtype=torch.float64, device="cpu")
    lora.attach(policy.model, Lora.of(settings), 0)
    stir(policy.model)
    before = state_of(policy.model)
    backend = TorchBackend(policy, settings)
    seen = []
    update = backend.update
    backend.update = lambda limit=None: (seen.append(_gradients(policy)), update(limit))[1]
    learner = learn.Learner(backend, settings)

    merged, adapter = lora.taken_apart(before, Lora.of(settings).scale)
    whole = samples_learn.random_model(tmp_path / "whole")
    model = AutoModelForCausalLM.from_pretrained(whole, dtype=torch.float64)
    model.load_state_dict(merged, strict=False)
    model.save_pretrained(whole)
    plain = learners.make(whole, "hapo", mini_batches=1)

    tasks = samples_learn.tasks(8, 4, seed=0)
    for one in (learner, plain):
        one.step(*learners.plan_of(one, tasks))
    (mine,), (theirs,) = seen, plain.backend.seen
    pairs = lora.pairs(adapter.items())
    assert len(mine) == 2 * len(pairs) == 28
    for layer, (a, b) in pairs.items():
        d_weight = 1.5 * theirs[f"model.{layer}.weight"]
        assert d_weight.norm() > 1e-4, "a vanishing gradient would compare as equal"
        for side, expected in (("A", b.T @ d_weight), ("B", d_weight @ a.T)):
            got = mine[f"model.{layer}.lora_{side}.default.weight"]
            assert float((got - expected).norm() / expected.norm()) < 1e-8, (layer, side)
    after = state_of(policy.model)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    assert moved == {name for name in after if ".lora_" in name}


def _gradients(policy) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


# --------------------------------------------------------------------------------------------------------------------
# Merging and files


def test_what_is_written_is_what_peft_reads_and_equals_the_merged_model(tmp_path):
    from peft import PeftModel

    model, settings, targets = adapted(targets=["q_proj", "mlp.down_proj"], alpha=10)
    merged, adapter = lora.taken_apart(state_of(model), settings.scale)
    lora.write(tmp_path, adapter, settings, targets, MODEL)
    plain = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, attn_implementation="eager")
    assert merged.keys() == dict(plain.named_parameters()).keys()
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, merged[n])}
    assert changed == {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")}
    theirs = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    ids = torch.randint(3, 90, (4, 40), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-6, rtol=0)
    for name, weight in theirs.merge_and_unload().named_parameters():
        torch.testing.assert_close(merged[name], weight, atol=1e-6, rtol=0)


def test_a_generator_merges_what_the_learner_merges():
    model, settings, _ = adapted(alpha=10)
    merged, adapter = lora.taken_apart(state_of(model), settings.scale)
    sent = {name: p.detach() for name, p in lora.streamed(model.named_parameters())}
    assert sent.keys() == adapter.keys()
    assert sum(t.nbytes for t in sent.values()) == 4 * 4 * 2 * (4 * (64 + 64) + 3 * (64 + 128))
    full = lora.Merger(MODEL, settings, torch.float32).full(sent.items())
    assert len(full) == len(merged) and dict(full).keys() == merged.keys()
    assert all(torch.equal(tensor, merged[name]) for name, tensor in full)


def test_merging_is_made_in_fp32_of_the_weights_that_the_learner_holds():
    generator = torch.Generator().manual_seed(0)
    weight, a, b = (torch.randn(*s, generator=generator) for s in ((8, 6), (2, 6), (8, 2)))
    low = [t.bfloat16() for t in (weight, a, b)]
    expected = low[0].double() + 0.5 * low[2].double() @ low[1].double()
    got = lora.merge(weight, low[1], low[2], 0.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=1e-6, rtol=1e-6)


def test_half_an_adapter_and_one_of_other_layers_are_refused():
    model, settings, _ = adapted(targets=["q_proj"])
    merger = lora.Merger(MODEL, settings, torch.float32)
    sent = [(name, p.detach()) for name, p in lora.streamed(model.named_parameters())]
    foreign = [(name.replace("q_proj", "k_proj"), tensor) for name, tensor in sent]
    wide = [(name, torch.cat([t, t])) for name, t in sent]
    assert len(merger.full(sent)) == len(merger.full(sent[::-1])) == 26
    for tensors, says in (
        (sent[:-1], "half an adapter"),
        (sent[:-2], "is missing"),
        (sent + foreign, "is not expected"),
        (wide, "arrived"),
        ([("model.norm.weight", sent[0][1]), *sent], "not a tensor of an adapter"),
    ):
        with pytest.raises(ValueError, match=says):
            merger.full(tensors)
