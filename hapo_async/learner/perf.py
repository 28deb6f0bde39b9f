"""What a learner rank got out of its device: model FLOPs utilisation and peak memory."""

from __future__ import annotations

import resource
from typing import NamedTuple

import torch
from torch import nn

# Dense bf16 operations per second, from the vendors' data sheets. The first name found in the device's counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "4090": 165e12,
    "3090": 71e12,
}


def peak_flops(device_name: str) -> float | None:
    """bf16 operations per second of a device, None where they are not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def training_flops(model: nn.Module, tokens: int, trained_tokens: int) -> float:
    """Operations of one forward and backward pass of a Hugging Face causal LM: 6 per parameter and token, 4 where it is
    frozen, the head on trained tokens alone. Attention scores, recomputation and scoring passes do not count: a lower
    bound.

    tokens: without padding. Sizes are the whole model's, also where ZeRO-3 leaves a rank only a part.
    """
    head = model.get_output_embeddings().weight  # type: ignore[operator]
    lookup = model.get_input_embeddings().weight  # type: ignore[operator]
    body = sum(_flops(p) for p in model.parameters() if p is not head and p is not lookup)
    return body * tokens + _flops(head) * trained_tokens


class Used(NamedTuple):
    """memory_bytes: peak since the last measurement (CPU: since the process started). mfu: None where it is not known."""

    memory_bytes: float
    mfu: float | None


def measure(model: nn.Module, device: torch.device, tokens: int, trained_tokens: int, seconds: float) -> Used:
    """What a step used. Utilisation is of the bf16 peak, so that it is known for low precision alone."""
    if device.type != "cuda":
        return Used(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, None)
    memory = float(torch.cuda.max_memory_allocated(device))
    torch.cuda.reset_peak_memory_stats(device)
    peak = peak_flops(torch.cuda.get_device_name(device))
    if not peak or seconds <= 0 or next(model.parameters()).dtype not in (torch.bfloat16, torch.float16):
        return Used(memory, None)
    return Used(memory, training_flops(model, tokens, trained_tokens) / (seconds * peak))


def _flops(parameter: nn.Parameter) -> float:
    """For one token."""
    return (6.0 if parameter.requires_grad else 4.0) * _size(parameter)


def _size(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", None) or parameter.numel())
