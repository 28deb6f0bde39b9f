"""Sampling with a Hugging Face model: continuous batching, and weights that change between two tokens.

``Sampler`` is synchronous and knows no threads: ``add`` queues groups, ``step`` decodes one token of every running
answer and returns the groups that became complete, ``install`` swaps the weights between two steps. The noise of a
token derives from (seed, group key, answer, position) alone, so an answer does not depend on who else was in the batch
(up to the rounding of the logits).

Shapes: R running rows (one row is one answer), V vocabulary, T tokens.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hapo_async.draw import draw, noise_key, uniforms
from hapo_async.slot_cache import SlotCache
from hapo_async.types import Answer, GroupKey, GroupRequest, Segment, Source, Version, VersionSpan

PREFILL_TOKENS = 16384  # padded tokens of one prefill forward
KV_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}  # answers wait while their keys and values might not fit into this
_SAMPLE_ELEMENTS = 1 << 24  # float64 logits that exist at one time


# --------------------------------------------------------------------------------------------------------------------
# Rows


@dataclass(eq=False)
class _Job:
    """One group in work. answers: by index, None while unfinished. cap: tokens that an answer may have, if truncated."""

    request: GroupRequest
    answers: list[Answer | None]
    since: float
    cap: int | None = None

    @property
    def is_complete(self) -> bool:
        return all(a is not None for a in self.answers)


@dataclass(eq=False)
class _Row:
    """One running answer. history: prompt and resumed prefix. span_start: where the current version's tokens begin."""

    job: _Job
    index: int
    history: np.ndarray
    prefix: Answer | None = None
    spans: list[VersionSpan] = field(default_factory=list)
    span_start: int = 0


@dataclass(frozen=True)
class Sampled:
    """A complete group: its answers by index (without text) and the seconds since it was added."""

    request: GroupRequest
    answers: tuple[Answer, ...]
    seconds: float


class _Columns:
    """Numbers per running row, as arrays that grow by doubling: [capacity] and, for what was sampled, [capacity, T]."""

    def __init__(self) -> None:
        self.feed = np.zeros(16, np.int64)  # the token that the next step reads
        self.done = np.zeros(16, np.int64)  # tokens sampled so far
        self.position = np.zeros(16, np.int64)  # of `feed` in the whole sequence
        self.offset = np.zeros(16, np.int64)  # length of the resumed prefix
        self.limit = np.zeros(16, np.int64)  # sampled tokens at which the answer ends
        self.noise = np.zeros(16, np.uint64)
        self.temperature = np.zeros(16, np.float64)
        self.top_p = np.zeros(16, np.float64)
        self.top_k = np.zeros(16, np.int64)
        self.tokens = np.zeros((16, 64), np.int32)
        self.logp = np.zeros((16, 64), np.float32)

    def grow(self, rows: int, width: int) -> None:
        for name, old in vars(self).items():
            shape = tuple(_doubled(size, needed) for size, needed in zip(old.shape, (rows, width), strict=False))
            if shape != old.shape:
                new = np.zeros(shape, old.dtype)
                new[tuple(slice(n) for n in old.shape)] = old
                setattr(self, name, new)

    def move(self, source: int, target: int) -> None:
        for array in vars(self).values():
            array[target] = array[source]


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size


# --------------------------------------------------------------------------------------------------------------------
# The sampler


class Sampler:
    """Continuous batching over one model.

    model: a Hugging Face causal LM, loaded with ``slot_cache.ATTENTION``. stop: ids that end an answer. recompute: what
    ``install`` does with keys and values of running answers, compute them again under the new weights or keep them.
    Not thread-safe: one thread calls everything.
    """

    def __init__(
        self, model: Any, stop: Iterable[int], *, recompute: bool = True, version: Version | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.stop = np.array(sorted(stop), np.int64)
        self.recompute = recompute
        self.version = version or Version(0, 0)
        self.tokens = 0
        self.device = model.device
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[GroupKey, _Job] = {}
        self._rows: list[_Row] = []
        self._columns = _Columns()
        self._complete: list[Sampled] = []
        text = model.config.get_text_config()
        self._cache = SlotCache(text.num_hidden_layers, model.device, model.dtype)
        self._token_bytes = _kv_bytes_per_token(text, model.dtype)
        self._window = _sliding_window(text)
        self._longest = getattr(text, "max_position_embeddings", None)

    @property
    def running(self) -> int:
        return len(self._rows)

    @property
    def waiting(self) -> int:
        return sum(job.request.sampling.n for job in self._waiting)

    @property
    def groups(self) -> int:
        return len(self._jobs)

    @property
    def has_work(self) -> bool:
        return bool(self._jobs or self._complete)

    # ---------------------------------------------------------------- requests

    def add(self, requests: Sequence[GroupRequest]) -> None:
        """Queues groups; all of them or, when one is refused (ValueError), none."""
        for request in requests:
            self._check(request)
        for request in requests:
            job = _Job(request, [None] * request.sampling.n, time.monotonic())
            self._jobs[request.key] = job
            self._waiting.append(job)

    @torch.inference_mode()
    def truncate(self, keys: Iterable[GroupKey]) -> None:
        """Running answers of these groups end where they are ("length"), each with at least one token. Groups that have
        not started yet are left alone: cut to nothing they would teach nothing."""
        started = {id(state.job) for state in self._rows}
        for job in (self._jobs[k] for k in keys if k in self._jobs):
            if id(job) not in started:
                continue
            job.cap = 1
            for row, state in enumerate(self._rows):
                if state.job is job:
                    self._columns.limit[row] = max(1, self._columns.done[row])
        ended = [r for r in range(self.running) if 0 < self._columns.limit[r] <= self._columns.done[r]]
        self._finish(ended, "length")

    @torch.inference_mode()
    def abort(self, keys: Iterable[GroupKey]) -> None:
        """Forgets these groups."""
        jobs = [self._jobs.pop(k) for k in keys if k in self._jobs]
        self._waiting = deque(j for j in self._waiting if j not in jobs)
        self._drop([r for r, state in enumerate(self._rows) if any(state.job is j for j in jobs)])

    def _check(self, request: GroupRequest) -> None:
        length = len(request.prompt_tokens) + request.sampling.max_tokens
        if not len(request.prompt_tokens):
            raise ValueError(f"group {request.key}: the prompt is empty; the first token needs something to follow")
        if request.key in self._jobs:
            raise ValueError(f"group {request.key} is already being sampled")
        if self._longest and length > self._longest:
            raise ValueError(
                f"group {request.key}: {len(request.prompt_tokens)} prompt tokens and {request.sampling.max_tokens} new ones "
                f"exceed the model's {self._longest} positions. Lower data.max_prompt_tokens or sampling.max_tokens."
            )
        if self._window and length > self._window:
            raise ValueError(
                f"group {request.key}: {length} tokens exceed the model's sliding attention window of {self._window}, which "
                "the transformers engine does not implement. Use generator.engine=vllm or fewer sampling.max_tokens."
            )

    # ---------------------------------------------------------------- decoding

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """Admits waiting groups, samples one token of every running answer, returns the groups that became complete."""
        self._admit()
        if self.running:
            self._decode()
        complete, self._complete = self._complete, []
        return complete

    def _decode(self) -> None:
        count, c = self.running, self._columns
        self._cache.reserve(count, 0)
        logits = self.model(
            input_ids=torch.from_numpy(c.feed[:count, None]).to(self.device),
            position_ids=torch.from_numpy(c.position[:count, None]).to(self.device),
            attention_mask=self._cache.window(count),
            past_key_values=self._cache,
            use_cache=True,
        ).logits[:, -1]
        self._cache.cursor += 1
        tokens, logp = self._draw(logits)
        rows, at = np.arange(count), c.done[:count]
        c.grow(count, int(at.max()) + 1)
        c.tokens[rows, at], c.logp[rows, at] = tokens, logp
        c.feed[:count] = tokens
        c.position[:count] += 1
        c.done[:count] += 1
        self.tokens += count
        stopped = np.isin(tokens, self.stop)
        full = c.done[:count] >= c.limit[:count]
        if stopped.any() or full.any():
            reasons = np.where(stopped, "stop", "length")
            ended = np.flatnonzero(stopped | full)
            self._finish(ended.tolist(), *reasons[ended])

    def _draw(self, logits_RV: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        count, c = len(logits_RV), self._columns
        uniform = torch.from_numpy(uniforms(c.noise[:count], c.offset[:count] + c.done[:count])).to(self.device)
        temperature = torch.from_numpy(c.temperature[:count]).to(self.device)
        filters: list[torch.Tensor | None] = [None, None]
        if (c.top_p[:count] < 1).any() or (c.top_k[:count] > 0).any():
            filters = [torch.from_numpy(a[:count]).to(self.device) for a in (c.top_p, c.top_k)]
        size = max(1, _SAMPLE_ELEMENTS // logits_RV.shape[-1])
        parts = []
        for start in range(0, count, size):
            cut = slice(start, start + size)
            parts.append(
                draw(logits_RV[cut], temperature[cut], uniform[cut], *(f if f is None else f[cut] for f in filters))
            )
        tokens, logp = (torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True))
        return tokens, logp

    def _admit(self) -> None:
        """Waiting groups join, first come first served, while their keys and values fit."""
        budget = KV_BYTES[self.device.type]
        joined: list[tuple[np.ndarray, int, int]] = []
        while self._waiting:
            job = self._waiting[0]
            rows = self.running + job.request.sampling.n
            width = (
                max(self._cache.cursor - self._cache.first, len(job.request.prompt_tokens))
                + job.request.sampling.max_tokens
            )
            if self.running and rows * width * self._token_bytes > budget:
                break
            joined += self._start(self._waiting.popleft())
        self._fill(joined)

    def _start(self, job: _Job) -> list[tuple[np.ndarray, int, int]]:
        """Gives each unfinished answer of a group a row. Returns (cached tokens, first row, end row) per prefill."""
        request, sampling = job.request, job.request.sampling
        prefixes = {a.index: a for a in request.prefixes}
        limit = sampling.max_tokens if job.cap is None else min(job.cap, sampling.max_tokens)
        fills: list[tuple[np.ndarray, int, int]] = []
        prompt = np.asarray(request.prompt_tokens, np.int64)
        for index in range(sampling.n):
            prefix = prefixes.get(index)
            offset = prefix.length if prefix else 0
            if prefix and (prefix.finish_reason != "abort" or offset >= sampling.max_tokens):
                reason = "length" if prefix.finish_reason == "abort" else prefix.finish_reason
                job.answers[index] = Answer(index, prefix.segments, reason)
                continue
            history = np.concatenate([prompt, prefix.tokens]) if prefix else prompt
            row = self.running
            self._rows.append(_Row(job, index, history, prefix))
            self._set_row(
                row, history, offset, max(1, limit - offset), noise_key(sampling.seed, request.key, index), request
            )
            if fills and not prefix and len(fills[-1][0]) == len(prompt) - 1:
                fills[-1] = (fills[-1][0], fills[-1][1], row + 1)
            else:
                fills.append((history[:-1], row, row + 1))
        self._settle(job)
        return fills

    def _set_row(
        self, row: int, history: np.ndarray, offset: int, limit: int, noise: int, request: GroupRequest
    ) -> None:
        c = self._columns
        c.grow(row + 1, 1)
        c.feed[row], c.position[row] = history[-1], len(history) - 1
        c.done[row], c.offset[row], c.limit[row], c.noise[row] = 0, offset, limit, np.uint64(noise)
        c.temperature[row] = request.sampling.temperature
        c.top_p[row], c.top_k[row] = request.sampling.top_p, request.sampling.top_k

    def _history(self, row: int) -> np.ndarray:
        """All tokens of a row but the one that the next step reads."""
        done = self._columns.done[row]
        return np.concatenate([self._rows[row].history, self._columns.tokens[row, :done]])[:-1]

    def _fill(self, fills: list[tuple[np.ndarray, int, int]]) -> None:
        """Computes keys and values of token sequences and places each into its rows. Padding is on the right, where
        causal attention never sees it."""
        if not fills:
            return
        self._cache.reserve(self.running, max(len(tokens) for tokens, _, _ in fills))
        self._cache.first = min(self._cache.first, self._cache.cursor - max(len(tokens) for tokens, _, _ in fills))
        self._cache.filling = True
        try:
            for batch in _chunks(sorted(fills, key=lambda f: len(f[0])), PREFILL_TOKENS):
                self._fill_batch(batch)
        finally:
            self._cache.filling = False
        self._cache.forget_prefill()

    def _fill_batch(self, batch: list[tuple[np.ndarray, int, int]]) -> None:
        width = len(batch[-1][0])
        padded = np.zeros((len(batch), width), np.int64)
        for i, (tokens, _, _) in enumerate(batch):
            padded[i, : len(tokens)] = tokens
        if width:
            self.model(
                input_ids=torch.from_numpy(padded).to(self.device),
                position_ids=torch.arange(width, device=self.device)[None],
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        for i, (tokens, row, end) in enumerate(batch):
            self._cache.place(row, end, i, len(tokens))

    # ---------------------------------------------------------------- endings

    def _finish(self, rows: Sequence[int], *reasons: str) -> None:
        """Rows become answers. reasons: one per row, or one for all."""
        jobs = []
        for i, row in enumerate(rows):
            state, done = self._rows[row], int(self._columns.done[row])
            self._close_span(row)
            segment = Segment(
                Source.POLICY,
                self._columns.tokens[row, :done].copy(),
                self._columns.logp[row, :done].copy(),
                tuple(state.spans),
            )
            before = state.prefix.segments if state.prefix else ()
            reason = str(reasons[i] if len(reasons) > 1 else reasons[0])
            state.job.answers[state.index] = Answer(state.index, (*before, segment), reason)
            jobs.append(state.job)
        self._drop(rows)
        for job in jobs:
            self._settle(job)

    def _settle(self, job: _Job) -> None:
        if job.is_complete and self._jobs.pop(job.request.key, None) is not None:
            answers = tuple(a for a in job.answers if a is not None)
            self._complete.append(Sampled(job.request, answers, time.monotonic() - job.since))

    def _drop(self, rows: Sequence[int]) -> None:
        """Takes rows out; the last rows fill the gaps."""
        if not rows:
            return
        for row in sorted(rows, reverse=True):
            last = self._rows.pop()
            if row < len(self._rows):
                self._rows[row] = last
                self._columns.move(len(self._rows), row)
                self._cache.move_row(len(self._rows), row)
        lengths = self._columns.position[: self.running]
        self._cache.trim(int(lengths.max()) if len(lengths) else 0)

    def _close_span(self, row: int) -> None:
        state, done = self._rows[row], int(self._columns.done[row])
        if done > state.span_start:
            state.spans.append(VersionSpan(self.version, state.span_start, done))
            state.span_start = done

    # ---------------------------------------------------------------- weights

    @torch.inference_mode()
    def install(self, version: Version, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Swaps the weights; running answers go on under them. Raises ValueError, with nothing changed, when the tensors
        are not exactly this model's parameters."""
        targets = match_parameters(self.model, tensors)
        for row in range(self.running):
            self._close_span(row)
        for parameter, tensor in targets:
            parameter.copy_(tensor)
        self.version = version
        if self.recompute:
            self._fill([(self._history(r), r, r + 1) for r in range(self.running)])


def match_parameters(
    model: Any, tensors: Sequence[tuple[str, torch.Tensor]]
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Pairs each tensor with its parameter. Raises ValueError for unknown or missing names and wrong shapes; a tied
    parameter may come under any of its names."""
    known = dict(model.named_parameters(remove_duplicate=False))
    pairs = []
    for name, tensor in tensors:
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}")
        if known[name].shape != tensor.shape:
            raise ValueError(f"parameter {name!r} has shape {tuple(known[name].shape)}; {tuple(tensor.shape)} arrived")
        pairs.append((known[name], tensor))
    given = {id(parameter) for parameter, _ in pairs}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in given]
    if missing:
        raise ValueError(f"{len(missing)} parameters never arrived: {', '.join(missing[:5])}")
    return pairs


def _chunks(fills: list[tuple[np.ndarray, int, int]], tokens: int) -> Iterable[list[tuple[np.ndarray, int, int]]]:
    """Consecutive runs of length-sorted sequences whose padded size stays within ``tokens``."""
    batch: list[tuple[np.ndarray, int, int]] = []
    for fill in fills:
        if batch and (len(batch) + 1) * len(fill[0]) > tokens:
            yield batch
            batch = []
        batch.append(fill)
    yield batch


def _kv_bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * size * dtype.itemsize


def _sliding_window(config: Any) -> int | None:
    """The attention window, when some layer has one."""
    types = getattr(config, "layer_types", None) or []
    window = getattr(config, "sliding_window", None)
    return window if window and (not types or any("sliding" in t for t in types)) else None
