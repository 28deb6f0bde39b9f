"""The chunked head against the naive one: values, gradients, precision."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import nn

from hapo_async.learner.head import ChunkedHead, reference_topk, token_logprobs

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


def make_reference(dtype=torch.float64, n=N, v=V, h=4):
    g = torch.Generator().manual_seed(7)
    return tuple(torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype) for shape in ((n, h), (v, h), (v,)))


def naive_with_reference(hidden, weight, bias, targets, reference, lam):
    """(KL(reference || theta), extrapolated log-prob) by way of all logits."""
    logits, ref = hidden @ weight.t() + bias, reference[0] @ reference[1].t() + reference[2]
    log_p, log_ref = torch.log_softmax(logits, -1), torch.log_softmax(ref, -1)
    future = torch.log_softmax((1 + lam) * log_p - lam * log_ref, -1)
    return (log_ref.exp() * (log_ref - log_p)).sum(-1), future.gather(-1, targets[:, None]).squeeze(-1).detach()


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
    for got, expected in zip(out[:3], want, strict=True):
        assert torch.allclose(got, expected, rtol=1e-13, atol=1e-13)
    for used in ([0], [1], [2], [0, 1], [0, 2], [0, 1, 2]):
        got = torch.autograd.grad(sum((out[i] * pulls[i]).sum() for i in used), leaves, retain_graph=True)
        expected = torch.autograd.grad(sum((want[i] * pulls[i]).sum() for i in used), leaves, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 6, 1000])
def test_every_combination_of_outputs_has_the_naive_heads_values_and_gradients(chunk):
    *leaves, targets, ids, temperature = make()
    reference, lam = make_reference(), 1.5
    want = (*naive(*leaves, targets, ids, temperature), *naive_with_reference(*leaves, targets, reference, lam))
    plain = naive(*leaves, targets, ids, torch.ones(N, dtype=torch.float64))
    g = torch.Generator().manual_seed(1)
    pulls = [torch.randn(x.shape, generator=g, dtype=torch.float64) for x in want[:4]]
    for scaled, entropy, topk, kl, future in product((False, True), repeat=5):
        expected = list(want if scaled else (*plain, *want[3:]))
        out = token_logprobs(
            *leaves[:2],
            targets,
            temperature=temperature if scaled else 1.0,
            chunk_tokens=chunk,
            entropy_grad=entropy,
            topk_ids=ids if topk else None,
            bias=leaves[2],
            reference=reference if kl or future else None,
            forward_kl=kl,
            future_lam=lam if future else None,
        )
        assert [x is not None for x in out] == [True, entropy, topk, kl, future]
        for got, value in zip(out, expected, strict=True):
            assert got is None or torch.allclose(got, value, rtol=1e-12, atol=1e-12)
        assert out.future_logp is None or not out.future_logp.requires_grad
        loss = sum((x * p).sum() for x, p in zip(out[:4], pulls, strict=True) if x is not None)
        naive_loss = sum((y * p).sum() for x, y, p in zip(out[:4], expected[:4], pulls, strict=True) if x is not None)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        again = torch.autograd.grad(loss, leaves)  # the logits that forward kept are used up
        exact = torch.autograd.grad(naive_loss, leaves, retain_graph=True)
        for a, b, c in zip(first, again, exact, strict=True):
            assert torch.allclose(a, c, rtol=1e-11, atol=1e-12) and torch.allclose(b, c, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("scaled", [True, False])
def test_gradients_pass_gradcheck(scaled):
    hidden, weight, bias, targets, ids, temperature = make(n=5)
    reference = make_reference(n=5)

    def scores(h, w, b):
        out = token_logprobs(
            h,
            w,
            targets,
            temperature=temperature if scaled else 1.0,
            chunk_tokens=2,
            entropy_grad=True,
            topk_ids=ids,
            bias=b,
            reference=reference,
            forward_kl=True,
        )
        return out[:4]

    assert torch.autograd.gradcheck(scores, (hidden, weight, bias))


def test_without_extrapolation_the_future_is_the_log_prob_at_temperature_one():
    hidden, weight, bias, targets, _, _ = make(torch.float32)
    out = token_logprobs(
        hidden, weight, targets, temperature=0.6, bias=bias, reference=make_reference(torch.float32), future_lam=0.0
    )
    assert torch.equal(out.future_logp, token_logprobs(hidden, weight, targets, bias=bias).logp)


def test_a_model_that_is_its_own_reference_has_no_divergence_and_its_own_future():
    hidden, weight, bias, targets, _, _ = make(torch.float32)
    out = token_logprobs(
        hidden, weight, targets, bias=bias, reference=(hidden, weight, bias), forward_kl=True, future_lam=2.0
    )
    assert torch.equal(out.ref_kl, torch.zeros(N)) and torch.allclose(out.future_logp, out.logp, atol=1e-5)
    for grad in torch.autograd.grad(out.ref_kl.sum(), (hidden, weight)):
        assert grad.abs().max() < 1e-5


def test_no_gradient_reaches_the_reference():
    hidden, weight, _, targets, _, _ = make()
    frozen = [x.requires_grad_() for x in make_reference()]
    out = token_logprobs(hidden, weight, targets, reference=tuple(frozen), forward_kl=True)
    out.ref_kl.sum().backward()
    assert all(x.grad is None for x in frozen) and hidden.grad.abs().sum() > 0 and weight.grad.abs().sum() > 0


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
    assert token_logprobs(hidden, weight, targets)[1:] == (None, None, None, None)


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


def test_bf16_with_every_output_gives_the_scores_and_gradients_of_the_widened_model():
    *leaves, targets, ids, temperature = make(torch.bfloat16, n=40)
    reference = make_reference(torch.bfloat16, n=40)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    wide_reference = tuple(x.double() for x in reference)
    want = (*naive(*wide, targets, ids, temperature), *naive_with_reference(*wide, targets, wide_reference, 1.0))
    for chunk in (16, 1000):
        out = token_logprobs(
            *leaves[:2],
            targets,
            temperature=temperature,
            chunk_tokens=chunk,
            entropy_grad=True,
            topk_ids=ids,
            bias=leaves[2],
            reference=reference,
            forward_kl=True,
            future_lam=1.0,
        )
        for got, expected in zip(out, want, strict=True):
            assert got.dtype == torch.float32 and torch.allclose(got.double(), expected, atol=1e-5)
        got = torch.autograd.grad(sum(x.sum() for x in out[:4]), leaves)
        expected = torch.autograd.grad(sum(x.sum() for x in want[:4]), wide, retain_graph=True)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.bfloat16
            assert torch.allclose(a.double(), b, rtol=5e-3, atol=5e-3 * b.abs().max().item())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the native low-precision product needs a GPU")
def test_bf16_on_a_gpu_keeps_the_fp32_accumulator():
    hidden, weight, _, targets, ids, _ = (x.detach().cuda() for x in make(torch.bfloat16, n=64))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    out = token_logprobs(*leaves, targets, chunk_tokens=16, entropy_grad=True, topk_ids=ids)
    on_cpu = [x.detach().cpu().requires_grad_() for x in leaves]
    want = token_logprobs(*on_cpu, targets.cpu(), entropy_grad=True, topk_ids=ids.cpu())
    for got, expected in zip(out[:3], want[:3], strict=True):
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
    large = torch.autograd.grad(
        token_logprobs(hidden, weight, targets, entropy_grad=True, bias=bias).entropy.sum() * 9, [weight]
    )
    assert torch.isfinite(large[0]).all()


def test_ids_that_a_model_excludes_give_no_nan_next_to_a_reference():
    hidden, weight, bias, targets, ids, _ = make()
    theta, (ref_hidden, ref_weight, ref_bias) = bias.detach().clone(), make_reference()
    theta[[3, 5]], ref_bias[[4, 5]] = -float("inf"), -float("inf")
    targets = torch.arange(N) % V
    options = {"bias": theta, "topk_ids": ids, "forward_kl": True, "future_lam": 1.0, "entropy_grad": True}
    out = token_logprobs(hidden, weight, targets, reference=(ref_hidden, ref_weight, ref_bias), **options)
    excluded = (targets == 3) | (targets == 4) | (targets == 5)
    assert torch.equal(out.future_logp == -float("inf"), excluded)
    kept = [i for i in range(V) if i not in (3, 4, 5)]
    narrow = (ref_hidden, ref_weight[kept], ref_bias[kept])
    _, future = naive_with_reference(
        hidden,
        weight[kept],
        theta[kept],
        torch.tensor([kept.index(t) if t in kept else 0 for t in targets]),
        narrow,
        1.0,
    )
    assert torch.allclose(out.future_logp[~excluded], future[~excluded])
    assert torch.equal(out.ref_kl, torch.full((N,), float("inf"), dtype=torch.float64))  # id 3: the reference takes it
    for grad in torch.autograd.grad((out.ref_kl + out.entropy).sum(), (hidden, weight)):
        assert torch.isfinite(grad).all()
    theta[3] = 0.0
    kl = token_logprobs(hidden, weight, targets, reference=(ref_hidden, ref_weight, ref_bias), **options).ref_kl
    log_p = torch.log_softmax(hidden @ weight.t() + theta, -1)[:, [*kept, 3]]
    log_ref = torch.log_softmax(ref_hidden @ ref_weight.t() + ref_bias, -1)[:, [*kept, 3]]
    assert torch.allclose(kl, (log_ref.exp() * (log_ref - log_p)).sum(-1))


def test_where_the_models_share_no_id_the_future_is_impossible_and_broken_logits_stay_visible():
    hidden, weight, bias, targets, _, _ = make()
    theta, (ref_hidden, ref_weight, ref_bias) = bias.detach().clone(), make_reference()
    theta[:5], ref_bias[5:] = -float("inf"), -float("inf")
    reference = (ref_hidden, ref_weight, ref_bias)
    out = token_logprobs(hidden, weight, targets, bias=theta, reference=reference, future_lam=1.0)
    assert (out.future_logp == -float("inf")).all()
    theta[7] = float("nan")
    broken = token_logprobs(hidden, weight, targets, bias=theta, reference=reference, future_lam=1.0, forward_kl=True)
    assert broken.future_logp.isnan().all() and broken.ref_kl.isnan().all()


def test_more_ids_than_the_vocabulary_and_repeated_ids_are_gathered_with_their_gradient():
    *leaves, targets, _, temperature = make()
    ids = torch.arange(V + 4).remainder(V).repeat(N, 1)
    out = token_logprobs(*leaves[:2], targets, topk_ids=ids, bias=leaves[2], chunk_tokens=9)
    want = naive(*leaves, targets, ids, temperature)[2]
    assert torch.allclose(out.topk_logp, want)
    pull = torch.linspace(-1, 1, want.numel(), dtype=torch.float64).reshape(want.shape)
    for a, b in zip(
        torch.autograd.grad((out.topk_logp * pull).sum(), leaves),
        torch.autograd.grad((want * pull).sum(), leaves),
        strict=True,
    ):
        assert torch.allclose(a, b)


def test_a_weight_that_is_also_the_embedding_gets_both_gradients():
    _, weight, _, targets, _, _ = make()
    tokens = torch.arange(N) % V
    (got,) = torch.autograd.grad(token_logprobs(weight[tokens] * 2, weight, targets, chunk_tokens=5).logp.sum(), weight)
    logits = (weight[tokens] * 2) @ weight.t()
    want = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).sum()
    assert torch.allclose(got, torch.autograd.grad(want, weight)[0])


def test_reference_top_k_is_the_best_first_and_never_wider_than_the_vocabulary():
    hidden, weight, bias, *_ = make()
    log_p = torch.log_softmax(hidden @ weight.t() + bias, -1)
    ids, logp = reference_topk(hidden, weight, K, chunk_tokens=4, bias=bias)
    assert torch.equal(ids, log_p.topk(K).indices) and torch.allclose(logp, log_p.topk(K).values)
    assert not logp.requires_grad and ids.dtype == torch.long
    everything, all_logp = reference_topk(hidden, weight, 100, chunk_tokens=4)
    assert everything.shape == (N, V) and torch.allclose(all_logp.exp().sum(-1), torch.ones(N, dtype=torch.float64))


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
    with pytest.raises(ValueError, match="need reference"):
        token_logprobs(hidden, weight, targets, forward_kl=True)
    with pytest.raises(ValueError, match="at least 0"):
        token_logprobs(hidden, weight, targets, reference=make_reference(), future_lam=-0.5)
    with pytest.raises(ValueError, match="the reference's hidden"):
        token_logprobs(hidden, weight, targets, reference=make_reference(v=V + 1), future_lam=1.0)
    with pytest.raises(ValueError, match=r"\[N, H\]"):
        token_logprobs(hidden, weight, targets[:3])
    with pytest.raises(ValueError, match="at least 1"):
        token_logprobs(hidden, weight, targets, chunk_tokens=0)
