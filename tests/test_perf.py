"""Model FLOPs are counted from the model's own parameters, and only where the device's peak is known."""

from __future__ import annotations

import pytest
import torch

from hapo_async.learner import perf


@pytest.fixture(scope="module")
def model(tiny_model: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model)


def test_operations_are_six_per_parameter_and_token_and_the_table_counts_where_it_multiplies(
    model: torch.nn.Module,
) -> None:
    table = model.get_input_embeddings().weight.numel()  # tied: the head
    body = sum(p.numel() for p in model.parameters()) - table
    assert perf.training_flops(model, 100, 40) == 6 * (body * 100 + table * 40)


def test_a_frozen_parameter_has_no_gradient_of_its_own(model: torch.nn.Module) -> None:
    whole = perf.training_flops(model, 100, 40)
    frozen = next(p for n, p in model.named_parameters() if "q_proj.weight" in n)
    frozen.requires_grad_(False)
    try:
        assert whole - perf.training_flops(model, 100, 40) == 2 * frozen.numel() * 100
    finally:
        frozen.requires_grad_(True)


def test_sizes_are_the_whole_models_where_zero_keeps_a_part(model: torch.nn.Module, monkeypatch) -> None:
    whole = perf.training_flops(model, 10, 10)
    for p in model.parameters():
        monkeypatch.setattr(p, "ds_numel", p.numel(), raising=False)
        monkeypatch.setattr(p, "data", torch.empty(0))
    assert perf.training_flops(model, 10, 10) == whole


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("Some GPU", None),
    ],
)
def test_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert perf.peak_flops(name) == peak


def test_a_machine_without_a_gpu_reports_memory_alone(model: torch.nn.Module) -> None:
    found = perf.measure(model, torch.device("cpu"), 10, 10, 1.0)
    assert found.mfu is None and found.memory_bytes > 50e6
