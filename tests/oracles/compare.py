"""The package's own loss as an answer, and how far two answers are apart."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from hapo_async.algorithms import loss
from hapo_async.upge import TokenBatch
from tests.oracles import oracle
from tests.oracles.batches import BATCHES, LEAVES, random
from tests.oracles.peers import PEERS
from tests.oracles.plain import Answer

CLOSE = 1e-9  # what every comparison asks for, of values and of gradients
PEER_BATCHES = ("random", "large without teachers", "equal policies", "responses of one token")


def package(name: str, batch: TokenBatch, **options: Any) -> Answer:
    total, stats = loss(name, batch, **options)
    assert total.item() == stats["value"] or math.isclose(total.item(), stats["value"], rel_tol=1e-12)
    inputs = {f: x for f in LEAVES if (x := getattr(batch, f)) is not None}
    grads = torch.autograd.grad(total, list(inputs.values()), allow_unused=True)
    return Answer(stats["value"], {f: g for f, g in zip(inputs, grads, strict=True) if g is not None})


def apart(got: Answer, want: Answer) -> tuple[float, float]:
    """(value, gradient): the difference of the values over the larger of 1 and |value|; the largest difference of a
    gradient's entries, each over its own size, not below a millionth of that input's largest entry."""
    value = abs(got.value - want.value) / max(1.0, abs(want.value))
    gradient = 0.0
    for name in got.grads.keys() | want.grads.keys():
        a, b = as_tensor(got.grads.get(name)), as_tensor(want.grads.get(name))
        a, b = (torch.zeros_like(b) if a is None else a), (torch.zeros_like(a) if b is None else b)
        if b.numel():
            scale = b.abs().clamp(min=1e-6 * float(b.abs().max())).clamp(min=1e-15)
            gradient = max(gradient, float(((a - b.reshape(a.shape)).abs() / scale.reshape(a.shape)).max()))
    return (value, gradient) if math.isfinite(value + gradient) else (math.inf, math.inf)


def as_tensor(x: Any) -> Tensor | None:
    return x if x is None or isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64)


@functools.cache
def batch_named(name: str) -> TokenBatch:
    if name == "large without teachers":
        return random(
            3, [3 + 7 * i % 23 for i in range(48)], [i // 8 for i in range(48)], [float(i % 3 == 0) for i in range(48)]
        )
    return BATCHES[name]()


@functools.cache
def against_oracle(name: str) -> dict[str, tuple[float, float]]:
    """How far the algorithm with its defaults is from its oracle, by batch."""
    batches = {b: batch_named(b) for b in BATCHES}
    return {b: apart(package(name, batch), oracle(name)(batch)) for b, batch in batches.items()}


@functools.cache
def against_peers(name: str) -> dict[str, tuple[float, float]]:
    """How far the algorithm is from each peer that has it: the largest over batches and over options."""
    out: dict[str, tuple[float, float]] = {}
    for title, peer, options in PEERS.get(name, []):
        for b in PEER_BATCHES:
            new = apart(package(name, batch_named(b), **options), peer(batch_named(b), **options))
            old = out.get(title, (0.0, 0.0))
            out[title] = (max(old[0], new[0]), max(old[1], new[1]))
    return out
