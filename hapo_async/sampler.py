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
from typing import Any

import numpy as np
import torch

from hapo_async.draw import draw, noise_key, uniforms
from hapo_async.limits import Limits
from hapo_async.rows import Columns, Job, Row, Sampled, continued
from hapo_async.scoring import Pair, score
from hapo_async.slot_cache import SlotCache, kv_bytes_per_token, prefill_batches
from hapo_async.types import GroupKey, GroupRequest, Segment, Source, Version, VersionSpan
from hapo_async.weights import match_parameters

PREFILL_TOKENS = 16384  # padded tokens of one prefill forward
KV_BYTES = {"cpu": 2 << 30, "cuda": 16 << 30}  # answers wait while their keys and values might not fit into this
_SAMPLE_ELEMENTS = 1 << 24  # float64 logits that exist at one time


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
        self._waiting: deque[Job] = deque()
        self._jobs: dict[GroupKey, Job] = {}
        self._rows: list[Row] = []
        self._columns = Columns()
        self._complete: list[Sampled] = []
        text = model.config.get_text_config()
        self._layers = text.num_hidden_layers
        self._cache = SlotCache(self._layers, model.device, model.dtype)
        self._asleep = False
        self.is_torn = False  # neither the old version's weights nor a new one's
        self._is_stale = False  # keys and values of running answers are an older version's
        self._token_bytes = kv_bytes_per_token(text, model.dtype)
        self._limits = Limits.of(text)

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

    @property
    def can_step(self) -> bool:
        """Whether ``step`` has anything to do: with torn weights requests are kept, and nothing is sampled."""
        return bool(self._complete or (self._jobs and not self.is_torn))

    # ---------------------------------------------------------------- requests

    def add(self, requests: Sequence[GroupRequest]) -> None:
        """Queues groups; all of them or, when one is refused (ValueError), none."""
        self._check_awake()
        for request in requests:
            self._check(request)
        for request in requests:
            job = Job(request, [None] * request.sampling.n, time.monotonic())
            self._jobs[request.key] = job
            self._waiting.append(job)

    def lengths(self, keys: Iterable[GroupKey]) -> dict[GroupKey, tuple[int, ...]]:
        """Tokens so far of each answer, resumed prefixes included, of those groups that are in work."""
        found = {k: self._jobs[k].lengths for k in keys if k in self._jobs}
        for row, state in enumerate(self._rows):
            if state.job.request.key in found:
                found[state.job.request.key][state.index] += int(self._columns.done[row])
        return {key: tuple(lengths) for key, lengths in found.items()}

    @torch.inference_mode()
    def truncate(self, keys: Sequence[GroupKey]) -> dict[GroupKey, tuple[int, ...]]:
        """Running answers of these groups end where they are ("length"), each with at least one token. Groups that have
        not started yet are left alone: cut to nothing they would teach nothing. Returns ``lengths``."""
        found = self.lengths(keys)
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
        return found

    @torch.inference_mode()
    def abort(self, keys: Sequence[GroupKey]) -> dict[GroupKey, tuple[int, ...]]:
        """Forgets these groups. Returns ``lengths``."""
        found = self.lengths(keys)
        jobs = [self._jobs.pop(k) for k in keys if k in self._jobs]
        self._waiting = deque(j for j in self._waiting if j not in jobs)
        self._drop([r for r, state in enumerate(self._rows) if any(state.job is j for j in jobs)])
        return found

    @torch.inference_mode()
    def hand_over(self, keys: Sequence[GroupKey]) -> list[Sampled]:
        """Takes these groups out as they are: unfinished answers end with "abort", even without a token, and can be resumed.
        Unknown keys are ignored."""
        jobs = [self._jobs[k] for k in keys if k in self._jobs]
        for job in jobs:
            if job in self._waiting:
                self._waiting.remove(job)
                job.answers = job.resumed()
                for index in job.unfinished:
                    job.answers[index] = continued(index, job.prefix(index), None, "abort")
        self._finish([r for r, state in enumerate(self._rows) if any(state.job is j for j in jobs)], "abort")
        for job in jobs:
            self._settle(job)
        out = [s for s in self._complete if s.request.key in keys]
        self._complete = [s for s in self._complete if s.request.key not in keys]
        return out

    def score(self, sequences: Sequence[Pair]) -> list[np.ndarray]:
        """float32 [T] each: log-probs at temperature 1 of ``tokens`` after ``prompt_tokens``, under the current weights.
        Running answers stay as they are. Raises ValueError for an empty prompt or one that does not fit."""
        self._check_awake()
        if self.is_torn:
            raise ValueError("nothing can be scored: the weights are torn until a full update succeeds")
        for prompt, tokens in sequences:
            self._limits.check("a sequence to be scored", len(prompt), len(tokens))
        return score(self.model, sequences)

    def _check(self, request: GroupRequest) -> None:
        if request.key in self._jobs:
            raise ValueError(f"group {request.key} is already being sampled")
        self._limits.check(f"group {request.key}", len(request.prompt_tokens), request.sampling.max_tokens)

    def _check_awake(self) -> None:
        if self._asleep:
            raise ValueError("the engine is asleep; wake it first")

    # ---------------------------------------------------------------- decoding

    @torch.inference_mode()
    def step(self) -> list[Sampled]:
        """Admits waiting groups, samples one token of every running answer, returns the groups that became complete."""
        if not self.is_torn:
            if self._is_stale:
                self._fill([(self._history(r), r, r + 1) for r in range(self.running)])
                self._is_stale = False
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

    def _start(self, job: Job) -> list[tuple[np.ndarray, int, int]]:
        """Gives each unfinished answer of a group a row. Returns (cached tokens, first row, end row) per prefill."""
        request, sampling = job.request, job.request.sampling
        limit = sampling.max_tokens if job.cap is None else min(job.cap, sampling.max_tokens)
        fills: list[tuple[np.ndarray, int, int]] = []
        prompt = np.asarray(request.prompt_tokens, np.int64)
        job.answers = job.resumed()
        for index in job.unfinished:
            prefix = job.prefix(index)
            offset = prefix.length if prefix else 0
            history = np.concatenate([prompt, prefix.tokens]) if prefix else prompt
            row = self.running
            self._rows.append(Row(job, index, history, prefix))
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
            for batch in prefill_batches(sorted(fills, key=lambda f: len(f[0])), PREFILL_TOKENS):
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
            reason = str(reasons[i] if len(reasons) > 1 else reasons[0])
            state.job.answers[state.index] = continued(state.index, state.prefix, segment, reason)
            jobs.append(state.job)
        self._drop(rows)
        for job in jobs:
            self._settle(job)

    def _settle(self, job: Job) -> None:
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

    def install(self, version: Version, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Swaps the weights; running answers go on under them. Raises ValueError, with nothing changed, when the tensors
        are not exactly this model's parameters."""
        match_parameters(self.model, tensors)
        self.write(tensors)
        self.finish_install(version)

    @torch.inference_mode()
    def write(self, tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
        """Copies some of a version's tensors into the model. From now on, whatever happens, the weights are torn: nothing is
        sampled or scored until ``finish_install``, which the caller owes once every parameter was written."""
        self.is_torn = True
        for row in range(self.running):
            self._close_span(row)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        for name, tensor in tensors:
            parameters[name].copy_(tensor)

    @torch.inference_mode()
    def finish_install(self, version: Version) -> None:
        """All weights are ``version``'s: running answers go on under them. The next step computes what ``recompute`` asks."""
        self.version, self.is_torn, self._is_stale = version, False, self.recompute

    # ---------------------------------------------------------------- taking turns

    def sleep(self) -> None:
        """Gives the cache back and, on an accelerator, moves the weights to host memory. Raises ValueError while groups
        are in work."""
        if self.has_work:
            raise ValueError(f"{self.groups} groups are in work; an engine sleeps when nothing is")
        self._asleep = True
        self._cache = SlotCache(self._layers, self.device, self.model.dtype)
        if self.device.type != "cpu":
            self.model.to("cpu")
            torch.accelerator.empty_cache()

    def wake(self) -> None:
        self.model.to(self.device)
        self._asleep = False
