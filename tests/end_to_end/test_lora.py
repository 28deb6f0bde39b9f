"""A LoRA run from the command line: the adapter alone travels, the saved model is base plus adapter, and a run goes on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hapo_async import metrics, toy
from tests.end_to_end.helpers import hapo_here, json_lines

SMALL = [
    "configs/quickstart_lora.yaml",
    "learner.lora.rank=4",
    "learner.zero_stage=2",
    "train.batch_prompts=8",
    "train.checkpoint_every=1",
    "sampling.max_tokens=48",
    "data.demonstrations=512",
    "run.alarms={canary_every: 1}",
    "eval.limit=8",
    "eval.every=0",
]

pytestmark = pytest.mark.usefixtures("ray_session")


def train(run_dir: Path, *overrides: str) -> int:
    return hapo_here("train", *SMALL, f"run.dir={run_dir}", *overrides)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert train(folder, "train.steps=3") == 0
    return folder


def adapter_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "adapter" / "adapter_model.safetensors")


def test_the_stream_carries_the_adapters_bytes_and_generators_sample_from_it(run_dir):
    rows = [r for r in json_lines(run_dir / "metrics.jsonl") if r["step"] > 0]
    size = sum(t.nbytes for t in adapter_of(run_dir / "model").values())
    assert [r["weights/bytes"] for r in rows] == [size] * 3 and size == 34816
    assert size < 0.15 * (run_dir / "model" / "model.safetensors").stat().st_size
    assert [r["weights/version"] for r in rows] == [1, 2, 3]
    compared = [r["canary/kl"] for r in rows if "canary/kl" in r]
    assert compared and max(compared) < 1e-7, "generators and learner agree at equal weights"
    assert all(
        metrics.find(name) for row in rows for name in row if name not in ("step", "time", "bottleneck", "advice")
    )


def test_what_it_learns_is_the_adapter(run_dir):
    rows = [r for r in json_lines(run_dir / "metrics.jsonl") if r["step"] > 0]
    assert all(math.isfinite(r["loss/value"]) and r["policy/grad_norm"] > 0 for r in rows)
    assert len({r["loss/value"] for r in rows}) == 3
    first, last = adapter_of(run_dir / "checkpoints" / "step-2" / "model"), adapter_of(run_dir / "model")
    assert first.keys() == last.keys() and len(last) == 28
    assert all(not torch.equal(first[name], tensor) for name, tensor in last.items())
    assert max(float(t.abs().max()) for name, t in last.items() if "lora_B" in name) > 1e-3


def test_the_model_is_base_plus_adapter(run_dir):
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "model", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(toy.MODEL_DIR, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, run_dir / "model" / "adapter").merge_and_unload()
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(dict(merged.named_parameters())[name], weight, atol=1e-6, rtol=0)


def test_it_continues_with_the_same_adapter_and_no_other(run_dir, capsys):
    for table in ("{}", "{rank: 8}", "{rank: 4, targets: [q_proj]}"):
        assert train(run_dir, "train.steps=4", f"learner.lora={table}") == 2
        assert "learner.lora" in capsys.readouterr().err
    assert train(run_dir, "train.steps=4") == 0
    rows = json_lines(run_dir / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4] and rows[-1]["weights/bytes"] == 34816


def test_unknown_targets_are_refused_before_anything_starts(tmp_path, capsys):
    assert train(tmp_path / "run", "learner.lora.targets=[q_proj, qkv]") == 2
    told = capsys.readouterr().err
    assert "'qkv'" in told and "q_proj" in told and "auto" in told
    assert not (tmp_path / "run").exists()
