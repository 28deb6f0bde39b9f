"""The output head without its [N, V] logits: log-probs, entropy, gathered top-K, forward KL and FPA's extrapolated
log-probs in chunks, recomputed in the backward.

Peak extra memory is flat in N, apart from the outputs and the gradient of hidden: ``peak_extra_bytes`` computes it.
Sums over the vocabulary are made in fp32 (fp64 for fp64 inputs), also for bf16 weights; the weight's gradient is
accumulated in one buffer. The last chunk's logits are kept for the backward, so a call of one chunk recomputes nothing.

Legend: N tokens, H hidden, V vocabulary, K top-K, c tokens of a chunk.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hapo_async.learner.head_kernels import Cut, Projection, Scores, Tokens, Workspace, block_rows, score, score_grad

DEFAULT_CHUNK_TOKENS = 8192
"""At most so many tokens' logits exist at one time; fewer where they would take more than WORKSPACE_BYTES."""

Reference = tuple[Tensor, Tensor, Tensor | None]
"""(hidden [N, H2], weight [V, H2], bias [V] or None) of a frozen model; no gradient reaches it."""


class HeadOut(NamedTuple):
    """logp [N]: log-prob of the target at ``temperature``. entropy [N] or None: in nats, at ``temperature``.

    At temperature 1: topk_logp [N, K] or None, log-probs of the given ids; ref_kl [N] or None, KL(reference || theta)
    over the vocabulary; future_logp [N] or None, detached, log-prob of the target under softmax((1 + lam) h - lam h_ref).
    fp32, or fp64 for fp64 weights.
    """

    logp: Tensor
    entropy: Tensor | None
    topk_logp: Tensor | None
    ref_kl: Tensor | None = None
    future_logp: Tensor | None = None


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
    reference: Reference | None = None,
    forward_kl: bool = False,
    future_lam: float | None = None,
) -> HeadOut:
    """Scores targets [N] int under softmax(hidden [N, H] @ weight [V, H].T + bias [V]).

    temperature [N] or number divides the logits of logp and entropy. entropy: also return it (detached unless
    ``entropy_grad``). topk_ids [N, K] int: also return their log-probs, at temperature 1, with gradient. forward_kl,
    future_lam >= 0: also return ref_kl, with gradient, and future_logp; both need ``reference``. Gradients reach
    hidden, weight and bias; the reference's weight must still be there in the backward of ref_kl.

    An id whose logit is -inf cannot occur: log-prob -inf, no share in the entropy or in any gradient. In future_logp it
    is enough that one of the models excludes it (lam = 0 leaves the reference out); where no id remains the log-prob is
    -inf. An id that the reference takes and theta excludes makes ref_kl +inf, with a finite gradient.

    Raises ValueError for shapes that do not fit, a chunk below 1 token, lam < 0, and a missing reference.
    """
    _check(hidden, weight, targets, chunk_tokens, reference, forward_kl, future_lam)
    temperatures = None if isinstance(temperature, float | int) and temperature == 1 else temperature
    if temperatures is not None and not isinstance(temperatures, Tensor):
        temperatures = torch.full((len(hidden),), float(temperatures), device=hidden.device, dtype=_wide(weight))
    wanted = _Wanted(chunk_tokens, entropy or entropy_grad, entropy_grad, forward_kl, future_lam)
    used = reference if reference is not None and (forward_kl or future_lam) else (None, None, None)
    return HeadOut(*_Head.apply(hidden, weight, bias, targets, temperatures, topk_ids, *used, wanted))


def reference_topk(
    hidden: Tensor, weight: Tensor, k: int, chunk_tokens: int = DEFAULT_CHUNK_TOKENS, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(ids int64 [N, K], log-probs [N, K]) of the K most likely tokens at temperature 1, best first; K = min(k, V).

    No gradient. Log-probs are fp32, or fp64 for fp64 inputs.
    """
    n, vocab, dtype = len(hidden), len(weight), _wide(weight)
    k = min(k, vocab)
    with torch.no_grad():
        product = Projection(weight, bias, dtype)
        ids = torch.empty((n, k), dtype=torch.long, device=hidden.device)
        logp = torch.empty((n, k), dtype=dtype, device=hidden.device)
        cut = Cut.of(n, vocab, chunk_tokens, dtype.itemsize, 1, hidden.device.type)
        space = Workspace(cut, vocab, False, dtype, hidden.device)
        for part in cut.chunks(n):
            logits = product.logits(hidden[part], space.logits[: part.stop - part.start])
            for rows, tokens in cut.blocks(part):
                log_p = torch.log_softmax(logits[rows], -1, out=space.pair(rows)[0])
                logp[tokens], ids[tokens] = log_p.topk(k, dim=-1)
    return ids, logp


def peak_extra_bytes(
    n: int,
    vocab: int,
    hidden: int,
    chunk_tokens: int = DEFAULT_CHUNK_TOKENS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    topk: int = 0,
    reference_hidden: int = 0,
    backward: bool = True,
) -> int:
    """Upper bound of what ``token_logprobs`` allocates at one time, in bytes, with every output that does not depend on
    an argument here: the chunk's buffers, widened blocks, the outputs and their gradients, and the gradient of hidden.

    Not counted: its arguments, and the gradients of weight and bias (the weight's is accumulated in fp32 where there
    are several chunks). reference_hidden is 0 without a reference. ``dtype`` is that of hidden and weight.
    """
    wide = _wide_dtype(dtype).itemsize
    cut = Cut.of(n, vocab, chunk_tokens, wide, 2 if reference_hidden else 1, device)
    logits = cut.chunk * vocab * wide * (2 if reference_hidden else 1)
    scratch = 2 * cut.rows * vocab * wide
    widest = max(hidden, reference_hidden)
    block = min(vocab, block_rows(widest, wide, device)) * widest * wide if dtype.itemsize < wide else 0
    chunk_hidden = 2 * cut.chunk * widest * wide
    biases = 3 * vocab * wide
    per_token = n * (12 + 2 * topk) * wide
    small = 4 * cut.rows * (4 + topk) * 8
    hidden_grad = n * hidden * dtype.itemsize if backward else 0
    return logits + scratch + block + chunk_hidden + biases + per_token + small + hidden_grad


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


class _Wanted(NamedTuple):
    chunk_tokens: int
    entropy: bool
    entropy_grad: bool
    forward_kl: bool
    future_lam: float | None


def _wide_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _wide(weight: Tensor) -> torch.dtype:
    return _wide_dtype(weight.dtype)


def _check(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    chunk_tokens: int,
    reference: Reference | None,
    forward_kl: bool,
    lam: float | None,
) -> None:
    if hidden.ndim != 2 or weight.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)} "
            "must be [N, H], [V, H] and [N]"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens={chunk_tokens} must be at least 1")
    if lam is not None and not (lam >= 0 and math.isfinite(lam)):
        raise ValueError(f"future_lam={lam} must be at least 0")
    if (forward_kl or lam is not None) and reference is None:
        raise ValueError("forward_kl and future_lam need reference=(hidden [N, H2], weight [V, H2], bias or None)")
    if reference is not None:
        states, table, _ = reference
        if states.ndim != 2 or table.shape != (len(weight), states.shape[1]) or len(states) != len(hidden):
            raise ValueError(
                f"the reference's hidden {tuple(states.shape)} and weight {tuple(table.shape)} must be "
                f"[{len(hidden)}, H2] and [{len(weight)}, H2]"
            )


class _Head(torch.autograd.Function):
    """forward keeps the last chunk's logits, which the first backward uses up; the others, and those of a second
    backward, are recomputed. The reference's are needed in the backward of ref_kl alone."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        topk_ids: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
        wanted: _Wanted,
    ) -> tuple[Tensor | None, ...]:
        dtype = _wide(weight)
        if temperature is not None:
            temperature = temperature.to(device=hidden.device, dtype=dtype)
        out = _empty_scores(hidden, topk_ids, dtype, wanted)
        tensors = (hidden, weight, bias, targets, temperature, topk_ids, ref_hidden, ref_weight, ref_bias)
        head = _Call(*tensors)
        space = head.workspace(dtype, wanted)
        for part in space.cut.chunks(len(hidden)):
            x, y = head.logits(part, space)
            for rows, tokens in space.cut.blocks(part):
                y_rows = None if y is None else y[rows]
                lam = wanted.future_lam or 0.0
                score(x[rows], y_rows, head.tokens.at(tokens), out.at(tokens), lam, space.pair(rows))
        if any(ctx.needs_input_grad):
            if not wanted.forward_kl:
                space.reference = None
            ctx.kept = space
        later = tensors if wanted.forward_kl else (*tensors[:6], None, None, None)
        ctx.save_for_backward(*later, out.entropy if wanted.entropy_grad else None)
        ctx.wanted = wanted
        ctx.set_materialize_grads(False)
        fixed = (None if wanted.entropy_grad else out.entropy, out.future_logp)
        ctx.mark_non_differentiable(*(x for x in fixed if x is not None))
        return tuple(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad = Scores(*grads)
        *tensors, entropy = ctx.saved_tensors
        kept, ctx.kept = [ctx.kept], None
        if all(x is None for x in grad):
            return (None,) * 10
        if grad.ref_kl is None:
            tensors[6:] = (None, None, None)
        head = _Call(*tensors)
        made = _walk_back(head, grad, entropy, kept, ctx.wanted, ctx.needs_input_grad)
        return (*made.cast(), None, None, None, None, None, None, None)


class _Call:
    """The inputs of one call, theta's and the reference's."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: Tensor | None,
        topk_ids: Tensor | None,
        ref_hidden: Tensor | None,
        ref_weight: Tensor | None,
        ref_bias: Tensor | None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.ref_hidden = hidden, weight, bias, ref_hidden
        self.theta = Projection(weight, bias, _wide(weight))
        self.tokens = Tokens(targets, temperature, topk_ids)
        self.reference = None if ref_weight is None else Projection(ref_weight, ref_bias, _wide(weight))

    def workspace(self, dtype: torch.dtype, wanted: _Wanted) -> Workspace:
        n, vocab = len(self.hidden), len(self.weight)
        two = self.reference is not None
        device = self.hidden.device
        cut = Cut.of(n, vocab, wanted.chunk_tokens, dtype.itemsize, 1 + two, device.type)
        return Workspace(cut, vocab, two, dtype, device)

    def logits(self, part: slice, space: Workspace) -> tuple[Tensor, Tensor | None]:
        """Logits [m, V] of a chunk and the reference's, in the workspace."""
        m = part.stop - part.start
        x = self.theta.logits(self.hidden[part], space.logits[:m])
        if self.reference is None or self.ref_hidden is None or space.reference is None:
            return x, None
        return x, self.reference.logits(self.ref_hidden[part], space.reference[:m])


class _InputGrads:
    """The gradients of hidden, weight and bias, where needed. The weight's is accumulated in fp32 over several chunks."""

    def __init__(self, head: _Call, needed: tuple[bool, ...], chunks: int) -> None:
        self.head, self.first = head, True
        weight, dtype = head.weight, head.theta.dtype
        new = torch.zeros if chunks == 0 else torch.empty
        kept = weight.dtype if chunks <= 1 else dtype
        self.hidden = torch.empty_like(head.hidden) if needed[0] else None
        self.weight = new(weight.shape, dtype=kept, device=weight.device) if needed[1] else None
        self.bias = torch.zeros(len(weight), dtype=dtype, device=weight.device) if needed[2] else None

    def add(self, part: slice, grad: Tensor) -> None:
        """The share of the chunk ``part``, whose logits have the gradient ``grad`` [m, V]."""
        if self.hidden is not None:
            self.head.theta.hidden_grad(grad, self.hidden[part])
        if self.weight is not None:
            self.head.theta.weight_grad(grad, self.head.hidden[part], self.weight, self.first)
        if self.bias is not None:
            self.bias += grad.sum(0, dtype=self.bias.dtype)
        self.first = False

    def cast(self) -> tuple[Tensor | None, ...]:
        head = self.head
        pairs = zip((self.hidden, self.weight, self.bias), (head.hidden, head.weight, head.bias), strict=True)
        return tuple(None if g is None or x is None else g.to(x.dtype) for g, x in pairs)


def _walk_back(
    head: _Call,
    grad: Scores,
    entropy: Tensor | None,
    kept: list[Workspace | None],
    wanted: _Wanted,
    needed: tuple[bool, ...],
) -> _InputGrads:
    """Gradients of the inputs, from the last chunk to the first. ``kept`` holds the workspace with the last chunk's
    logits, or None; it is emptied, so that the buffers are gone when this returns."""
    space = kept.pop()
    fresh = space is not None
    space = space or head.workspace(head.theta.dtype, wanted)
    chunks = space.cut.chunks(len(head.hidden))
    made = _InputGrads(head, needed, len(chunks))
    for part in reversed(chunks):
        m = part.stop - part.start
        x, y = space.held(m, grad.ref_kl is not None) if fresh else head.logits(part, space)
        fresh = False
        grad_x = head.theta.grad_of(x)
        for rows, tokens in space.cut.blocks(part):
            y_rows = None if y is None else y[rows]
            value = None if entropy is None else entropy[tokens]
            at = (head.tokens.at(tokens), grad.at(tokens), value, space.pair(rows))
            grad_x[rows].copy_(score_grad(x[rows], y_rows, *at))
        made.add(part, grad_x)
    return made


def _empty_scores(hidden: Tensor, topk_ids: Tensor | None, dtype: torch.dtype, wanted: _Wanted) -> Scores:
    n, like = len(hidden), {"dtype": dtype, "device": hidden.device}
    return Scores(
        logp=torch.empty(n, **like),  # type: ignore[call-overload]
        entropy=torch.empty(n, **like) if wanted.entropy else None,  # type: ignore[call-overload]
        topk_logp=None if topk_ids is None else torch.empty(topk_ids.shape, **like),  # type: ignore[call-overload]
        ref_kl=torch.empty(n, **like) if wanted.forward_kl else None,  # type: ignore[call-overload]
        future_logp=None if wanted.future_lam is None else torch.empty(n, **like),  # type: ignore[call-overload]
    )
