"""The arithmetic of the output head: how a call is cut into chunks, the three matrix products, and the scores and
gradients of a few rows of logits.

A chunk's logits [c, V] are one reused buffer, in which the backward overwrites logits by their gradient. Softmaxes run
over blocks of r rows into two small scratch buffers, which on a CPU stay in its cache.

Legend: n tokens, H hidden, V vocabulary, K top-K, c tokens of a chunk, r rows of a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WORKSPACE_BYTES = {"cpu": 256 << 20, "cuda": 320 << 20}
"""Buffers with a vocabulary axis take no more in one call, a few tokens' rows excepted. More on a GPU, where each chunk
reads and writes the weight's gradient once: 1.7% of fp32 logits [32768, 152064]."""

_SCRATCH_BYTES = {"cpu": 2 << 20, "cuda": 32 << 20}  # one of two buffers: a CPU's cache; rows enough to occupy a GPU
_BLOCK_BYTES = {"cpu": 16 << 20, "cuda": 64 << 20}  # a block of the weight, or of its gradient, at full precision
_FLOOR = -1e4
"""Stands in for log-probs below it, -inf included: exp(-1e4) is 0 even in fp64, and 0 * -1e4 is 0, not NaN."""


class Cut(NamedTuple):
    """chunk: tokens whose logits exist at one time. rows: tokens whose softmax exists at one time."""

    chunk: int
    rows: int

    @classmethod
    def of(cls, n: int, vocab: int, chunk_tokens: int, itemsize: int, buffers: int, device: str) -> Cut:
        """Even chunks of at most ``chunk_tokens`` that keep ``buffers`` logits buffers and the scratch within
        WORKSPACE_BYTES."""
        row = max(1, vocab) * itemsize
        rows = max(1, min(_by_device(_SCRATCH_BYTES, device) // row, chunk_tokens, n))
        most = max(1, min(chunk_tokens, (_by_device(WORKSPACE_BYTES, device) - 2 * rows * row) // (row * buffers)))
        chunks = max(1, -(-n // most))
        chunk = max(1, -(-n // chunks))
        return cls(chunk, min(rows, chunk))

    def chunks(self, n: int) -> list[slice]:
        return [slice(start, min(start + self.chunk, n)) for start in range(0, n, self.chunk)]

    def blocks(self, part: slice) -> Iterator[tuple[slice, slice]]:
        """(rows within the chunk ``part``, the same tokens within the whole call)."""
        for start in range(part.start, part.stop, self.rows):
            stop = min(start + self.rows, part.stop)
            yield slice(start - part.start, stop - part.start), slice(start, stop)


def _by_device(table: dict[str, int], device: str) -> int:
    return table["cuda" if device == "cuda" else "cpu"]


def block_rows(hidden: int, itemsize: int, device: str) -> int:
    """Vocabulary rows of the weight that are widened, or whose gradient is made, at one time."""
    return max(1, _by_device(_BLOCK_BYTES, device) // (max(1, hidden) * itemsize))


class Workspace:
    """The buffers of one call. reference: whether a second logits buffer exists, for the reference's."""

    def __init__(self, cut: Cut, vocab: int, reference: bool, dtype: torch.dtype, device: torch.device) -> None:
        self.cut = cut
        self.logits = torch.empty((cut.chunk, vocab), dtype=dtype, device=device)
        self.reference = torch.empty_like(self.logits) if reference else None
        self.scratch = [torch.empty((cut.rows, vocab), dtype=dtype, device=device) for _ in range(2)]

    def held(self, m: int, reference: bool) -> tuple[Tensor, Tensor | None]:
        """The logits [m, V] that were written last, and the reference's where asked for."""
        return self.logits[:m], self.reference[:m] if reference and self.reference is not None else None

    def pair(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Two scratch buffers [r, V]."""
        r = rows.stop - rows.start
        return self.scratch[0][:r], self.scratch[1][:r]


class Projection:
    """logits = hidden @ weight.T + bias with fp32 results (fp64 for fp64), and the products that the backward needs.

    Low-precision inputs multiply as they are on GPUs (``out_dtype`` keeps the fp32 accumulator). The CPU has no such
    kernel: there the weight is widened block by block, never as a whole.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.detach()
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.dtype = dtype
        self.native = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16) and dtype == torch.float32
        self.grad_dtype = weight.dtype if self.native else dtype

    def logits(self, hidden: Tensor, out: Tensor) -> Tensor:
        """[m, H] -> [m, V], in ``out``."""
        if self.native:
            _mm_fp32(hidden.to(self.weight.dtype), self.weight.t(), out)
        else:
            wide = hidden.to(self.dtype)
            for block in self._widened():
                torch.mm(wide, self.weight[block].to(self.dtype).t(), out=out[:, block])
        return out if self.bias is None else out.add_(self.bias)

    def hidden_grad(self, grad: Tensor, out: Tensor) -> None:
        """[m, V] -> [m, H], in ``out``."""
        if not self.native and out.dtype == self.dtype == self.weight.dtype:
            torch.mm(grad, self.weight, out=out)
            return
        total = torch.empty(out.shape, dtype=self.dtype, device=out.device)
        if self.native:
            _mm_fp32(grad, self.weight, total)
        else:
            for block in self._widened():
                total.addmm_(grad[:, block], self.weight[block].to(self.dtype), beta=float(block.start > 0))
        out.copy_(total)

    def weight_grad(self, grad: Tensor, hidden: Tensor, buffer: Tensor, first: bool) -> None:
        """buffer [V, H] += grad [m, V].T @ hidden [m, H]; ``first`` overwrites what is in the buffer."""
        if not self.native and buffer.dtype == self.dtype:
            buffer.addmm_(grad.t(), hidden.to(self.dtype), beta=float(not first))
            return
        factor = hidden.to(self.grad_dtype)
        for block in self._blocks():
            piece = torch.empty((block.stop - block.start, hidden.shape[1]), dtype=self.dtype, device=hidden.device)
            if self.native:
                _mm_fp32(grad[:, block].t(), factor, piece)
            else:
                torch.mm(grad[:, block].t(), factor, out=piece)
            if first:
                buffer[block].copy_(piece)
            else:
                buffer[block].add_(piece)

    def grad_of(self, logits: Tensor) -> Tensor:
        """Room for the gradient of ``logits`` [m, V] on top of them, in the type that the products take. Row i lies
        within the first i + 1 rows of logits, so rows written in order never meet logits that are still to be read."""
        if self.grad_dtype == logits.dtype:
            return logits
        return logits.view(-1).view(self.grad_dtype)[: logits.numel()].view(logits.shape)

    def _widened(self) -> Iterator[slice]:
        return iter([slice(0, len(self.weight))]) if self.weight.dtype == self.dtype else self._blocks()

    def _blocks(self) -> Iterator[slice]:
        vocab, hidden = self.weight.shape
        size = block_rows(hidden, self.dtype.itemsize, self.weight.device.type)
        return (slice(start, min(start + size, vocab)) for start in range(0, vocab, size))


def _mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> None:
    """fp32 product of two low-precision matrices (CUDA only)."""
    torch.mm(a, b, out_dtype=torch.float32, out=out)


class Tokens(NamedTuple):
    """What is asked of each token. targets [n], temperature [n] or None, topk_ids [n, K] or None."""

    targets: Tensor
    temperature: Tensor | None
    topk_ids: Tensor | None

    def at(self, part: slice) -> Tokens:
        return Tokens(*(None if x is None else x[part] for x in self))  # type: ignore[arg-type]


class Scores(NamedTuple):
    """One number per token [n] (topk_logp [n, K]); also the shape of their gradients. None: not asked for."""

    logp: Tensor | None
    entropy: Tensor | None
    topk_logp: Tensor | None
    ref_kl: Tensor | None
    future_logp: Tensor | None

    def at(self, part: slice) -> Scores:
        return Scores(*(None if x is None else x[part] for x in self))


def score(x: Tensor, y: Tensor | None, t: Tokens, out: Scores, lam: float, scratch: tuple[Tensor, Tensor]) -> None:
    """Fills ``out`` for r rows of logits x and the reference's y [r, V] or None; both are kept."""
    a, b = scratch
    if out.ref_kl is not None and y is not None:
        out.ref_kl.copy_(_forward_kl(x, y, a, b))
    if out.future_logp is not None:
        z = x if lam == 0 or y is None else _extrapolated(x, y, lam, a, b)
        future = _gather(torch.log_softmax(z, -1, out=b), t.targets)
        nothing_left = future.isnan() & (z.sum(-1) == -torch.inf)  # NaN logits would make the sum NaN as well
        out.future_logp.copy_(future.masked_fill_(nothing_left, -torch.inf))
    if out.topk_logp is not None and t.topk_ids is not None:
        out.topk_logp.copy_(torch.log_softmax(x, -1, out=a).gather(-1, t.topk_ids))
    if out.logp is None:
        return
    if t.temperature is not None or out.topk_logp is None:
        torch.log_softmax(x if t.temperature is None else torch.div(x, t.temperature[:, None], out=b), -1, out=a)
    out.logp.copy_(_gather(a, t.targets))
    if out.entropy is not None:
        p = torch.exp(a, out=b)
        out.entropy.copy_(a.clamp_(min=_FLOOR).mul_(p).sum(-1).neg_())


def score_grad(
    x: Tensor, y: Tensor | None, t: Tokens, grad: Scores, entropy: Tensor | None, scratch: tuple[Tensor, Tensor]
) -> Tensor:
    """Gradient of the scores with respect to r rows of logits x [r, V], in one of the scratch buffers; x and y are kept.

    With z = x / T and p = softmax(z):  d logp / dx = (1[target] - p) / T,  d entropy / dx = -p (log p + entropy) / T,
    and at temperature 1  d topk_k / dx = 1[id_k] - softmax(x),  d KL(ref || theta) / dx = softmax(x) - softmax(y).
    entropy [r]: its value, where its gradient is asked for.
    """
    a, b = scratch
    scaled = grad.logp is not None or grad.entropy is not None
    temperature = t.temperature if scaled else None
    at_one = _at_one(grad)
    at_temperature = torch.zeros_like(a[:, 0]) if grad.logp is None else -grad.logp
    if temperature is None and at_one is not None:
        at_temperature += at_one
    z = x if temperature is None else torch.div(x, temperature[:, None], out=b)
    if grad.entropy is None or entropy is None:
        torch.softmax(z, -1, out=a).mul_(at_temperature[:, None])
    else:
        p = torch.exp(torch.log_softmax(z, -1, out=a), out=b)
        a.clamp_(min=_FLOOR).add_(entropy[:, None]).mul_(-grad.entropy[:, None]).add_(at_temperature[:, None]).mul_(p)
    if grad.logp is not None:
        a.scatter_add_(-1, t.targets[:, None], grad.logp[:, None])
    if temperature is not None:
        a.div_(temperature[:, None])
        if at_one is not None:
            a.addcmul_(torch.softmax(x, -1, out=b), at_one[:, None])
    if grad.topk_logp is not None and t.topk_ids is not None:
        a.scatter_add_(-1, t.topk_ids, grad.topk_logp)
    if grad.ref_kl is not None and y is not None:
        a.addcmul_(torch.softmax(y, -1, out=b), grad.ref_kl[:, None], value=-1)
    return a


def _at_one(grad: Scores) -> Tensor | None:
    """[r]: what softmax(x) at temperature 1 is multiplied by."""
    if grad.topk_logp is None:
        return grad.ref_kl
    pulled = grad.topk_logp.sum(-1)
    return -pulled if grad.ref_kl is None else grad.ref_kl - pulled


def _gather(log_p: Tensor, ids: Tensor) -> Tensor:
    return log_p.gather(-1, ids[:, None]).squeeze(-1)


def _forward_kl(x: Tensor, y: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """[r]: sum of p_ref (log p_ref - log p) of logits x and reference logits y [r, V]. An id that the reference never
    takes adds 0; one that the reference takes and theta never does makes the sum +inf. NaN logits stay NaN."""
    torch.log_softmax(x, -1, out=a)
    torch.log_softmax(y, -1, out=b)
    broken = torch.isnan(a[:, 0]) | torch.isnan(b[:, 0])
    b.sub_(a)
    b.mul_(torch.softmax(y, -1, out=a)).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return b.sum(-1).masked_fill_(broken, torch.nan)


def _extrapolated(x: Tensor, y: Tensor, lam: float, a: Tensor, b: Tensor) -> Tensor:
    """(1 + lam) x - lam y in ``a``; -inf where either is -inf."""
    torch.mul(x, 1 + lam, out=a)
    a.sub_(torch.clamp(y, min=-1e30, out=b), alpha=lam)
    return torch.minimum(a, torch.minimum(x, y, out=b).add_(1e30), out=a)
