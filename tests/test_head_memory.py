"""What the chunked head allocates: measured, computed, and where its buffers lie."""

from __future__ import annotations

import importlib.util
from itertools import product
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hapo_async.learner import head_kernels
from hapo_async.learner.head import peak_extra_bytes, reference_topk, token_logprobs
from tests.test_head import H, K, V, make, make_reference, naive


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, in forward or backward."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.untyped_storage().nbytes() // x.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_ever_exceeds_a_chunk_of_logits_forward_or_backward(dtype):
    v, chunk = 1000, 16
    for n in (256, 4096):
        hidden, weight, _, targets, ids, temperature = make(dtype, n=n, v=v)
        with Largest() as largest:
            out = token_logprobs(
                hidden, weight, targets, temperature=temperature, chunk_tokens=chunk, entropy_grad=True, topk_ids=ids
            )
            (out.logp.sum() + out.entropy.sum() + out.topk_logp.sum()).backward()
            reference_topk(hidden, weight, K, chunk)
        assert largest.elements <= max(chunk * v, n * H, v * H)
    with Largest() as largest:
        naive(hidden, weight, torch.zeros(v), targets, ids, temperature.to(dtype))
    assert largest.elements >= 4096 * v  # the measure sees what it must


def combinations():
    for entropy, topk, kl, future in product((False, True), repeat=4):
        yield {"entropy_grad": entropy, "topk": 8 * topk, "forward_kl": kl, "future_lam": 1.0 if future else None}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_head", Path(__file__).parents[1] / "tools" / "bench_head.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_memory(bench, monkeypatch, dtype, wanted):
    n, v, h, chunk = 300, 1500, 16, 50
    monkeypatch.setattr(head_kernels, "_BLOCK_BYTES", {"cpu": 100 * h * 4})
    monkeypatch.setattr(head_kernels, "_SCRATCH_BYTES", {"cpu": 4 * v * 4})
    got = bench.measured(n, v, h, dtype=dtype, chunk_tokens=chunk, **wanted)
    assert got["peak_without_weight_gradient"] <= got["computed_bytes"] < 0.6 * n * v * 4
    assert got["peak_bytes"] > chunk * v * 4  # the measure sees the chunk


@pytest.mark.parametrize("wanted", combinations(), ids=lambda w: "-".join(k for k, x in w.items() if x) or "logp")
def test_the_allocator_never_hands_out_more_than_is_computed(wanted, bench, monkeypatch):
    check_memory(bench, monkeypatch, torch.bfloat16, wanted)


@pytest.mark.parametrize("wanted", [*combinations()][::15], ids=["logp", "everything"])
def test_fp32_heads_keep_to_the_computed_memory(wanted, bench, monkeypatch):
    check_memory(bench, monkeypatch, torch.float32, wanted)


def test_the_measure_of_memory_sees_what_an_operation_allocates_inside(bench):
    logits = torch.randn(64, 1000)
    assert bench.peak_bytes(lambda: torch.logsumexp(logits, -1), "cpu") >= logits.numel() * 4


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("hidden", [64, 896, 3584, 8192])
def test_at_32768_tokens_and_152064_ids_the_head_takes_at_most_a_twentieth_of_the_logits(device, hidden):
    n, v = 32_768, 152_064
    logits = n * v * 4
    for wanted in combinations():
        uses_reference = wanted["forward_kl"] or wanted["future_lam"] is not None
        size = {"device": device, "topk": wanted["topk"], "reference_hidden": hidden if uses_reference else 0}
        for chunk in ({}, {"chunk_tokens": 1024}, {"chunk_tokens": 10**6}):
            assert peak_extra_bytes(n, v, hidden, **chunk, **size) <= 0.05 * logits
    flat = peak_extra_bytes(8 * n, v, hidden, backward=False) - peak_extra_bytes(n, v, hidden, backward=False)
    assert flat < 0.001 * logits


def test_a_chunk_of_a_large_vocabulary_is_cut_to_the_workspace_and_its_chunks_are_even():
    cut = head_kernels.Cut.of(10_000, 152_064, 4096, 4, 1, "cpu")
    assert cut.chunk * 152_064 * 4 <= head_kernels.WORKSPACE_BYTES["cpu"] and cut.chunk > 400
    parts = head_kernels.Cut.of(1100, 48, 1024, 4, 1, "cpu").chunks(1100)
    assert [(p.start, p.stop) for p in parts] == [(0, 550), (550, 1100)]


@pytest.mark.parametrize("chunk", [7, 1000])
def test_the_gradient_of_a_low_precision_head_fits_on_top_of_its_logits(chunk, monkeypatch):
    """The products of the GPU path, emulated: what is left is how it lays out its buffers."""
    monkeypatch.setattr(head_kernels, "_mm_fp32", lambda a, b, out: torch.mm(a.float(), b.float(), out=out))
    monkeypatch.setattr(head_kernels, "_SCRATCH_BYTES", {"cpu": 3 * V * 4})
    monkeypatch.setattr(head_kernels, "_BLOCK_BYTES", {"cpu": 4 * H * 4})
    usual = head_kernels.Projection.__init__

    def native(self, weight, bias, dtype):
        usual(self, weight, bias, dtype)
        self.native, self.grad_dtype = True, weight.dtype

    hidden, weight, bias, targets, ids, temperature = make(torch.bfloat16)
    options = {"temperature": temperature, "chunk_tokens": chunk, "entropy_grad": True, "topk_ids": ids, "bias": bias}
    options |= {"reference": make_reference(torch.bfloat16), "forward_kl": True, "future_lam": 1.0}
    want = token_logprobs(hidden, weight, targets, **options)
    expected = torch.autograd.grad(sum(x.sum() for x in want[:4]), (hidden, weight, bias))
    monkeypatch.setattr(head_kernels.Projection, "__init__", native)
    out = token_logprobs(hidden, weight, targets, **options)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(out, want, strict=True))
    got = torch.autograd.grad(sum(x.sum() for x in out[:4]), (hidden, weight, bias))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2e-2, atol=2e-2 * b.float().abs().max().item())
