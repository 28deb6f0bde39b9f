"""The output head without its [N, V] logits: log-probs, entropy and gathered top-K in chunks, recomputed in the
backward.

Peak extra memory is O(chunk_tokens * V), flat in N. Sums over the vocabulary are made in fp32 (fp64 for fp64 inputs),
also for bf16 weights; the weight's gradient is accumulated in one buffer.

Legend: N tokens, H hidden, V vocabulary, K top-K, c tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_TOKENS = 1024


class HeadOut(NamedTuple):
    """logp [N]: log-prob of the target at ``temperature``. entropy [N] or None: in nats, at ``temperature``. topk_logp
    [N, K] or None: log-probs of the given ids at temperature 1. fp32, or fp64 for fp64 inputs."""

    logp: Tensor
    entropy: Tensor | None
    topk_logp: Tensor | None


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    entropy: bool = False,
    entropy_grad: bool = False,
    topk_ids: Tensor | None = None,
    bias: Tensor | None = None,
) -> HeadOut:
    """Scores targets [N] int under softmax(hidden [N, H] @ weight [V, H].T + bias [V]).

    temperature [N] or number divides the logits of logp and entropy. entropy: also return it (detached unless
    ``entropy_grad``). topk_ids [N, K] int: also return their log-probs, at temperature 1, with gradient. Gradients
    reach hidden, weight and bias. Raises ValueError for shapes that do not fit and for a chunk below 1 token.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} "
            "must be [N, H], [V, H] and [N]"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    temperatures = None if isinstance(temperature, float | int) and temperature == 1 else temperature
    if temperatures is not None and not isinstance(temperatures, Tensor):
        temperatures = torch.full((len(hidden),), float(temperatures), device=hidden.device)
    inputs = (hidden, weight, bias, targets, temperatures, topk_ids)
    logp, entropies, topk_logp = _Head.apply(*inputs, chunk_tokens, entropy or entropy_grad, entropy_grad)
    return HeadOut(logp, entropies, topk_logp)


def reference_topk(
    hidden: Tensor, weight: Tensor, k: int, chunk_tokens: int = DEFAULT_CHUNK_TOKENS, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(ids int64 [N, K], log-probs [N, K]) of the K most likely tokens at temperature 1, best first; K = min(k, V).

    No gradient. Log-probs are fp32, or fp64 for fp64 inputs.
    """
    k = min(k, len(weight))
    with torch.no_grad():
        product = _Projection(weight, bias)
        ids = torch.empty((len(hidden), k), dtype=torch.long, device=hidden.device)
        logp = torch.empty((len(hidden), k), dtype=product.dtype, device=hidden.device)
        for part in _chunks(len(hidden), chunk_tokens):
            logits = product(hidden[part])
            top = logits.topk(k, dim=-1)
            ids[part] = top.indices
            logp[part] = top.values - torch.logsumexp(logits, -1, keepdim=True)
    return ids, logp


class ChunkedHead(nn.Module):
    """A head that owns its projection, so that ZeRO-3 gathers the weight exactly around its passes.

    ``projection`` is any module with ``weight`` [V, H] and maybe ``bias`` [V], such as an ``nn.Linear``; the parameters
    are shared with it, not copied.
    """

    def __init__(self, projection: nn.Module, chunk_tokens: int = DEFAULT_CHUNK_TOKENS) -> None:
        super().__init__()
        self.weight = projection.weight
        self.bias = getattr(projection, "bias", None)
        self.chunk_tokens = chunk_tokens

    def forward(self, hidden: Tensor, targets: Tensor, **options: Any) -> HeadOut:
        """``token_logprobs`` with the module's own weight; ``options`` are its keyword arguments."""
        weight: Tensor = self.weight  # type: ignore[assignment]
        return token_logprobs(hidden, weight, targets, chunk_tokens=self.chunk_tokens, bias=self.bias, **options)


# --------------------------------------------------------------------------------------------------------------------
# Inside


def _chunks(n: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


class _Projection:
    """Logits of a chunk in fp32 (fp64 for fp64), and the products that the backward needs.

    Low-precision inputs multiply as they are on GPUs (``out_dtype`` keeps the fp32 accumulator); the CPU has no such
    kernel, so there the weight is widened once.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.native = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        self.weight = weight.detach() if self.native else weight.detach().to(self.dtype)
        self.bias = None if bias is None else bias.detach().to(self.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """[c, H] -> [c, V]"""
        logits = self._mm(hidden, self.weight.t())
        return logits if self.bias is None else logits.add_(self.bias)

    def hidden_grad(self, grad_logits: Tensor) -> Tensor:
        """[c, V] -> [c, H]"""
        return self._mm(grad_logits, self.weight)

    def add_weight_grad(self, buffer: Tensor, grad_logits: Tensor, hidden: Tensor) -> None:
        """buffer [V, H] += grad_logits.T @ hidden"""
        if self.native:
            buffer.add_(self._mm(grad_logits.t(), hidden))
        else:
            buffer.addmm_(grad_logits.t(), hidden.to(self.dtype))

    def _mm(self, a: Tensor, b: Tensor) -> Tensor:
        if self.native:
            return torch.mm(a.to(self.weight.dtype), b.to(self.weight.dtype), out_dtype=torch.float32)
        return a.to(self.dtype) @ b


class _Head(torch.autograd.Function):
    """forward keeps per-token scalars alone; backward recomputes each chunk's logits.

    With z = logits / T and p = softmax(z):  d logp / d logits = (1[target] - p) / T,
    d entropy / d logits = -p (log p + entropy) / T,  d topk_k / d logits = 1[id_k] - softmax(logits).
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        topk_ids: Tensor | None,
        chunk_tokens: int,
        want_entropy: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        product = _Projection(weight, bias)
        n = len(hidden)
        like: dict[str, Any] = {"dtype": product.dtype, "device": hidden.device}
        temperature = None if temperature is None else temperature.to(**like)
        logp, log_z = torch.empty(n, **like), torch.empty(n, **like)
        entropy = torch.empty(n, **like) if want_entropy else None
        topk = None if topk_ids is None else torch.empty(topk_ids.shape, **like)
        log_z1 = log_z if topk is None or temperature is None else torch.empty(n, **like)
        for part in _chunks(n, chunk_tokens):
            logits = product(hidden[part])
            if topk is not None and topk_ids is not None:
                log_z1[part] = torch.logsumexp(logits, -1)
                topk[part] = logits.gather(-1, topk_ids[part]) - log_z1[part, None]
            if temperature is not None:
                logits /= temperature[part, None]
            log_z[part] = torch.logsumexp(logits, -1)
            logp[part] = logits.gather(-1, targets[part, None]).squeeze(-1) - log_z[part]
            if entropy is not None:
                entropy[part] = _entropy(logits, log_z[part, None])
        ctx.save_for_backward(hidden, weight, bias, targets, temperature, topk_ids, log_z, log_z1, entropy)
        ctx.chunk_tokens = chunk_tokens
        ctx.set_materialize_grads(False)
        if entropy is not None and not entropy_grad:
            ctx.mark_non_differentiable(entropy)
        return logp, entropy, topk

    @staticmethod
    @once_differentiable
    def backward(  # type: ignore[override]
        ctx: Any, grad_logp: Tensor | None, grad_entropy: Tensor | None, grad_topk: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, temperature, topk_ids, log_z, log_z1, entropy = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        product = _Projection(weight, bias)
        hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
        weight_grad = torch.zeros(weight.shape, dtype=product.dtype, device=weight.device) if needs_weight else None
        bias_grad = torch.zeros(len(weight), dtype=product.dtype, device=weight.device) if needs_bias else None
        for part in _chunks(len(hidden), ctx.chunk_tokens):
            logits = product(hidden[part])
            grad = None
            if grad_topk is not None:
                grad = _topk_grad(logits, topk_ids[part], log_z1[part, None], grad_topk[part])
            if grad_logp is not None or grad_entropy is not None:
                if temperature is not None:
                    logits /= temperature[part, None]
                scaled = _scaled_grad(
                    logits,
                    targets[part],
                    log_z[part, None],
                    None if grad_logp is None else grad_logp[part],
                    None if grad_entropy is None else (grad_entropy[part], entropy[part]),
                )
                if temperature is not None:
                    scaled /= temperature[part, None]
                grad = scaled if grad is None else grad.add_(scaled)
            if grad is None:
                continue
            if hidden_grad is not None:
                hidden_grad[part] = product.hidden_grad(grad).to(hidden.dtype)
            if weight_grad is not None:
                product.add_weight_grad(weight_grad, grad, hidden[part])
            if bias_grad is not None:
                bias_grad += grad.sum(0)
        grads = (hidden_grad, weight_grad, bias_grad)
        cast = [None if g is None else g.to(x.dtype) for g, x in zip(grads, (hidden, weight, bias), strict=True)]
        return (*cast, None, None, None, None, None, None)


def _entropy(scaled: Tensor, log_z: Tensor) -> Tensor:
    """[c, V] scaled logits (destroyed) -> [c]: -sum p log p. An impossible token (logit -inf) contributes 0."""
    log_p = scaled.sub_(log_z)
    p = log_p.exp()
    return -(p * log_p.clamp_(min=torch.finfo(log_p.dtype).min)).sum(-1)


def _scaled_grad(
    scaled: Tensor, targets: Tensor, log_z: Tensor, grad_logp: Tensor | None, entropy: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Gradient of logp (and entropy) with respect to the scaled logits [c, V], which are destroyed."""
    log_p = scaled.sub_(log_z)
    if entropy is None:
        assert grad_logp is not None
        return log_p.exp_().mul_(-grad_logp[:, None]).scatter_add_(-1, targets[:, None], grad_logp[:, None])
    grad_entropy, value = entropy
    p = log_p.exp()
    coefficient = log_p.clamp_(min=torch.finfo(log_p.dtype).min).add_(value[:, None]).mul_(-grad_entropy[:, None])
    if grad_logp is not None:
        coefficient -= grad_logp[:, None]
    grad = coefficient.mul_(p)
    return grad if grad_logp is None else grad.scatter_add_(-1, targets[:, None], grad_logp[:, None])


def _topk_grad(logits: Tensor, ids: Tensor, log_z: Tensor, grad: Tensor) -> Tensor:
    """Gradient of the gathered log-probs at temperature 1 with respect to the logits [c, V], which are kept."""
    p = (logits - log_z).exp_()
    return p.mul_(-grad.sum(-1, keepdim=True)).scatter_add_(-1, ids, grad)
