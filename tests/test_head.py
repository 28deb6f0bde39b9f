"""The chunked head against the naive one: values, gradients, precision, memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hapo_async.head import ChunkedHead, reference_topk, token_logprobs

N, H, V, K = 23, 6, 11, 3


def make(dtype=torch.float64, n=N, v=V, seed=0):
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    hidden, weight, bias = rand(n, H), rand(v, H), rand(v)
    targets = torch.randint(v, (n,), generator=g)
    ids = torch.rand(n, v, generator=g).argsort(-1)[:, :K].clone()
    temperature = 0.5 + torch.rand(n, generator=g, dtype=torch.float64)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight, bias)]
    return *leaves, targets, ids, temperature


def naive(hidden, weight, bias, targets, ids, temperature):
    logits = hidden @ weight.t() + bias
    log_p = torch.log_softmax(logits / temperature[:, None], -1)
    logp = log_p.gather(-1, targets[:, None]).squeeze(-1)
    return logp, -(log_p.exp() * log_p).sum(-1), torch.log_softmax(logits, -1).gather(-1, ids)


@pytest.mark.parametrize("chunk", [1, 5, 23, 1000])
def test_values_and_all_gradients_equal_the_naive_head_in_chunks_of_any_size(chunk):
    *leaves, targets, ids, temperature = make()
    hidden, weight, bias = leaves
    out = token_logprobs(
        hidden, weight, targets, temperature=temperature, chunk_tokens=chunk, entropy_grad=True, topk_ids=ids, bias=bias
    )
    want = naive(hidden, weight, bias, targets, ids, temperature)
    g = torch.Generator().manual_seed(1)
    pulls = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in want]
    for got, expected in zip(out, want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-13, atol=1e-13)
    for used in ([0], [1], [2], [0, 1], [0, 2], [0, 1, 2]):
        got = torch.autograd.grad(sum((out[i] * pulls[i]).sum() for i in used), leaves, retain_graph=True)
        expected = torch.autograd.grad(sum((want[i] * pulls[i]).sum() for i in used), leaves, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_gradients_pass_gradcheck():
    hidden, weight, bias, targets, ids, temperature = make(n=5)

    def scores(h, w, b):
        out = token_logprobs(
            h, w, targets, temperature=temperature, chunk_tokens=2, entropy_grad=True, topk_ids=ids, bias=b
        )
        return out.logp, out.entropy, out.topk_logp

    assert torch.autograd.gradcheck(scores, (hidden, weight, bias))


def test_a_number_as_temperature_divides_logp_and_entropy_but_never_the_top_k():
    hidden, weight, _, targets, ids, _ = make()
    hot = token_logprobs(hidden, weight, targets, temperature=0.7, entropy=True, topk_ids=ids)
    same = token_logprobs(hidden / 0.7, weight, targets, entropy=True)
    assert torch.allclose(hot.logp, same.logp) and torch.allclose(hot.entropy, same.entropy)
    assert torch.allclose(hot.topk_logp, token_logprobs(hidden, weight, targets, topk_ids=ids).topk_logp)


def test_entropy_is_detached_unless_its_gradient_is_asked_for_and_nothing_unasked_is_returned():
    hidden, weight, _, targets, _, _ = make()
    out = token_logprobs(hidden, weight, targets, entropy=True)
    assert not out.entropy.requires_grad and out.logp.requires_grad
    assert token_logprobs(hidden, weight, targets)[1:] == (None, None)


def test_bf16_weights_give_fp32_scores_and_gradients_of_the_widened_product():
    hidden, weight, _, targets, _, _ = make(torch.bfloat16, n=64)
    out = token_logprobs(hidden, weight, targets, chunk_tokens=16, entropy=True)
    wide = [x.detach().float().requires_grad_() for x in (hidden, weight)]
    want = torch.log_softmax(wide[0] @ wide[1].t(), -1).gather(-1, targets[:, None]).squeeze(-1)
    assert out.logp.dtype == out.entropy.dtype == torch.float32
    assert torch.allclose(out.logp, want, atol=1e-5)
    got = torch.autograd.grad(out.logp.sum(), [hidden, weight])
    for a, b in zip(got, torch.autograd.grad(want.sum(), wide), strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.allclose(a.float(), b, rtol=1e-2, atol=1e-2 * b.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the native low-precision product needs a GPU")
def test_bf16_on_a_gpu_keeps_the_fp32_accumulator():
    hidden, weight, _, targets, ids, _ = (x.detach().cuda() for x in make(torch.bfloat16, n=64))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = token_logprobs(*leaves, targets, chunk_tokens=16, entropy_grad=True, topk_ids=ids)
    on_cpu = [x.detach().cpu().requires_grad_() for x in leaves]
    want = token_logprobs(*on_cpu, targets.cpu(), entropy_grad=True, topk_ids=ids.cpu())
    for got, expected in zip(out, want, strict=True):
        assert torch.allclose(got.cpu(), expected, atol=1e-5)
    pull = lambda o: o.logp.sum() + o.entropy.sum() + o.topk_logp.sum()  # noqa: E731
    for got, expected in zip(
        torch.autograd.grad(pull(out), leaves), torch.autograd.grad(pull(want), on_cpu), strict=True
    ):
        assert torch.allclose(got.cpu().float(), expected.float(), rtol=2e-2, atol=2e-2 * expected.abs().max().item())


def test_frozen_inputs_and_empty_batches_work():
    hidden, weight, bias, targets, ids, _ = make()
    (grad,) = torch.autograd.grad(token_logprobs(hidden.detach(), weight, targets).logp.sum(), [weight])
    assert grad.abs().sum() > 0
    (grad,) = torch.autograd.grad(token_logprobs(hidden, weight.detach(), targets).logp.sum(), [hidden])
    assert grad.abs().sum() > 0
    with torch.no_grad():
        assert not token_logprobs(hidden, weight, targets).logp.requires_grad
    out = token_logprobs(hidden[:0], weight, targets[:0], topk_ids=ids[:0], entropy=True, bias=bias)
    assert out.logp.shape == (0,) and out.topk_logp.shape == (0, K)
    out.logp.sum().backward()
    assert weight.grad is not None and not weight.grad.any() and hidden.grad is not None


def test_a_token_that_cannot_occur_has_no_nan():
    hidden, weight, bias, targets, _, _ = make()
    bias = bias.detach().clone()
    bias[3] = -float("inf")
    targets = targets.masked_fill(targets == 3, 4)
    out = token_logprobs(hidden, weight, targets, entropy_grad=True, bias=bias)
    grads = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), [hidden, weight])
    assert torch.isfinite(out.entropy).all() and all(torch.isfinite(g).all() for g in grads)


def test_reference_top_k_is_the_best_first_and_never_wider_than_the_vocabulary():
    hidden, weight, bias, *_ = make()
    log_p = torch.log_softmax(hidden @ weight.t() + bias, -1)
    ids, logp = reference_topk(hidden, weight, K, chunk_tokens=4, bias=bias)
    assert torch.equal(ids, log_p.topk(K).indices) and torch.allclose(logp, log_p.topk(K).values)
    assert not logp.requires_grad and ids.dtype == torch.long
    everything, all_logp = reference_topk(hidden, weight, 100, chunk_tokens=4)
    assert everything.shape == (N, V) and torch.allclose(all_logp.exp().sum(-1), torch.ones(N, dtype=torch.float64))


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


def test_the_module_shares_its_parameters_with_the_projection_that_it_wraps():
    projection = nn.Linear(H, V).double()
    head = ChunkedHead(projection, chunk_tokens=4)
    hidden, _, _, targets, ids, _ = make()
    assert head.weight is projection.weight and head.bias is projection.bias
    out = head(hidden, targets, temperature=1.0, entropy=True, topk_ids=ids)
    want = torch.log_softmax(projection(hidden), -1).gather(-1, targets[:, None]).squeeze(-1)
    assert torch.allclose(out.logp, want)
    out.logp.sum().backward()
    assert projection.weight.grad is not None
    assert ChunkedHead(nn.Linear(H, V, bias=False)).bias is None


def test_shapes_that_do_not_fit_are_refused():
    hidden, weight, _, targets, _, _ = make()
    with pytest.raises(ValueError, match=r"\[N, H\]"):
        token_logprobs(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="at least 1"):
        token_logprobs(hidden, weight, targets, chunk_tokens=0)
