"""The groups that a vLLM engine samples: one request per answer, from submission until a group is handed out."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from actors.vllm_weights import Weights, failure
from hapo_async.engine import EngineDead, EngineError, Lengths, Mailbox
from hapo_async.rows import Job, Sampled, continued
from hapo_async.types import GroupKey, GroupRequest, Segment, Source, Version, VersionSpan


class _End(enum.Enum):
    """How a group was ended before its answers ended by themselves."""

    TRUNCATED = "length"
    HANDED_OVER = "abort"
    FORGOTTEN = ""


class _Group(Job):
    """One group in work. running: what collects each unfinished answer, by index. done: the whole group."""

    def __init__(self, request: GroupRequest) -> None:
        super().__init__(request, [None] * request.sampling.n, time.monotonic())
        self.answers = self.resumed()
        self.running: dict[int, Any] = {}
        self.end: _End | None = None
        self.task: asyncio.Task[None] | None = None
        self.done: asyncio.Future[Sampled] = asyncio.get_running_loop().create_future()
        self.done.add_done_callback(lambda f: f.cancelled() or f.exception())  # nobody may be waiting

    def fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)


class Groups:
    """llm: an AsyncLLM. stop: ids that end an answer. Belongs to one event loop."""

    def __init__(self, llm: Any, weights: Weights, stop: Sequence[int]) -> None:
        self._llm = llm
        self._weights = weights
        self._stop = list(stop)
        self._mailbox = Mailbox()
        self._groups: dict[GroupKey, _Group] = {}
        self._tokens = 0

    async def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Hands all answers to vLLM before returning. What truncates, aborts or hands over a group meanwhile finds it."""
        self._mailbox.open([r.key for r in requests])
        groups = {r.key: _Group(r) for r in requests}
        self._groups |= groups
        try:
            await self._weights.label()
            for group in groups.values():
                await self._start(group)
        except BaseException as error:
            refused = failure(self._llm, "vLLM refused a group", error)
            await self._forget({k: g for k, g in groups.items() if self._groups.get(k) is g}, refused)
            if isinstance(error, Exception):
                raise refused from error
            raise

    async def collect(self, key: GroupKey) -> Sampled:
        return await self._mailbox.take(key)

    async def truncate(self, keys: Sequence[GroupKey]) -> Lengths:
        found = self._lengths(keys)
        groups = [self._groups[k] for k in keys if k in self._groups]
        for group in groups:
            group.end = group.end or _End.TRUNCATED
        await self.stop(collector for group in groups for collector in group.running.values())
        return found

    async def abort(self, keys: Sequence[GroupKey], error: EngineError) -> Lengths:
        """Whoever collects these groups gets ``error``."""
        found = self._lengths(keys)
        self._mailbox.close(keys, error)
        await self._forget({k: self._groups[k] for k in keys if k in self._groups}, error)
        return found

    async def hand_over(self, keys: Sequence[GroupKey]) -> list[Sampled]:
        error = EngineError(f"groups {', '.join(map(str, keys))} were handed over")
        found = {s.request.key: s for s in self._mailbox.withdraw(keys, error)}
        groups = {k: self._groups[k] for k in keys if k in self._groups}
        for group in groups.values():
            group.end = _End.HANDED_OVER
        await self.stop(collector for group in groups.values() for collector in group.running.values())
        for key, group in groups.items():
            try:
                found[key] = await group.done
            except EngineDead:
                raise
            except EngineError:
                continue  # aborted meanwhile
        return [found[k] for k in keys if k in found]

    async def close(self, error: EngineError) -> None:
        await self.abort(list(self._groups), error)
        self._mailbox.close_all(error)

    def __len__(self) -> int:
        return len(self._groups)

    @property
    def running(self) -> int:
        """Answers that vLLM has not finished."""
        return sum(len(group.running) for group in self._groups.values())

    @property
    def tokens(self) -> int:
        """Sampled so far, by all groups that there ever were."""
        running = [collector for group in self._groups.values() for collector in group.running.values()]
        return self._tokens + sum(map(self._sampled, running))

    def _lengths(self, keys: Sequence[GroupKey]) -> Lengths:
        found = self._mailbox.lengths(keys)
        for key, group in ((k, self._groups[k]) for k in keys if k in self._groups):
            running = {i: self._sampled(collector) for i, collector in group.running.items()}
            found[key] = tuple(n + running.get(i, 0) for i, n in enumerate(group.lengths))
        return found

    def _sampled(self, collector: Any) -> int:
        """Tokens of a running answer, where vLLM gathers them: asking costs its sampling nothing."""
        state = self._llm.output_processor.request_states.get(collector.request_id)
        if state is not None:
            return int(state.detokenizer.num_output_tokens())
        output = collector.output  # finished, or an exception, and not taken yet
        return len(output.outputs[0].token_ids) if hasattr(output, "outputs") else 0

    async def stop(self, collectors: Iterable[Any]) -> None:
        """Ends requests now; what they have comes out of their collectors. Those that have ended are ignored."""
        ids = [collector.request_id for collector in collectors]
        if ids and not self._llm.errored:
            await self._llm.abort(ids, internal=True)

    async def _forget(self, groups: dict[GroupKey, _Group], error: EngineError) -> None:
        for key, group in groups.items():
            group.end = _End.FORGOTTEN
            self._groups.pop(key, None)
            if group.task:
                group.task.cancel()
            group.fail(error)
        self._mailbox.close(list(groups), error)
        collectors = [collector for group in groups.values() for collector in group.running.values()]
        self._tokens += sum(map(self._sampled, collectors))
        await self.stop(collectors)

    # ---------------------------------------------------------------- answers

    async def _start(self, group: _Group) -> None:
        for index in group.unfinished:
            if group.end in (_End.HANDED_OVER, _End.FORGOTTEN):
                break
            prefix = group.prefix(index)
            left = group.request.sampling.max_tokens - (prefix.length if prefix else 0)
            await self._request(group, index, 1 if group.end is _End.TRUNCATED else left)
        if group.end is not _End.FORGOTTEN:
            group.task = asyncio.create_task(self._gather(group))

    async def _request(self, group: _Group, index: int, tokens: int, again: str = "") -> Any:
        """Asks vLLM for one answer, of at most ``tokens`` more. If the group is ended meanwhile, so is the request."""
        request, prefix, end = group.request, group.prefix(index), group.end
        name = f"{request.key}#{index}{again}"
        history = [request.prompt_tokens] + ([prefix.tokens] if prefix else [])
        try:
            collector = await self._llm.add_request(
                name, self.prompt(np.concatenate(history)), self._params(request, tokens)
            )
        except asyncio.CancelledError:
            await self._llm.abort(name)  # vLLM may have it already
            raise
        group.running[index] = collector
        if group.end is not end:
            await self.stop([collector])
        return collector

    def _params(self, request: GroupRequest, tokens: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k,
            max_tokens=tokens,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=self._stop,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def prompt(self, tokens: np.ndarray) -> dict[str, Any]:
        """As vLLM takes it. Caches that are kept outlive an update: a prompt must not find blocks of an older version."""
        salt = {} if self._weights.recompute else {"cache_salt": str(self._weights.version)}
        return {"prompt_token_ids": tokens.tolist(), **salt}

    async def _answer(self, group: _Group, index: int) -> None:
        prefix = group.prefix(index)
        if index not in group.running:  # handed over before vLLM had it
            group.answers[index] = continued(index, prefix, None, _End.HANDED_OVER.value)
            return
        output = (await final(group.running[index])).outputs[0]
        if group.end is _End.TRUNCATED and not output.token_ids:
            # Truncated before its first token: an answer has at least one.
            output = (await final(await self._request(group, index, 1, again="#1"))).outputs[0]
        group.running.pop(index, None)
        self._tokens += len(output.token_ids)
        reason = output.finish_reason
        if reason == "abort":
            reason = (group.end or _End.TRUNCATED).value
        group.answers[index] = continued(index, prefix, _segment(output), reason)

    async def _gather(self, group: _Group) -> None:
        key = group.request.key
        try:
            await asyncio.gather(*(self._answer(group, index) for index in group.unfinished))
        except Exception as error:
            lost = failure(self._llm, f"vLLM lost group {key}", error)
            self._groups.pop(key, None)
            self._mailbox.close([key], lost)
            group.fail(lost)
            return
        self._groups.pop(key, None)
        answers = tuple(a for a in group.answers if a is not None)
        sampled = Sampled(group.request, answers, time.monotonic() - group.since)
        self._mailbox.fill(sampled)
        group.done.set_result(sampled)


async def final(collector: Any) -> Any:
    """The last RequestOutput of one request. Raises what vLLM put into its queue (EngineDeadError when it died)."""
    try:
        while not (output := collector.get_nowait() or await collector.get()).finished:
            pass
    finally:
        collector.close()
    return output


def _segment(output: Any) -> Segment:
    tokens = np.asarray(output.token_ids, np.int32)
    logp = [entry[token].logprob for entry, token in zip(output.logprobs or [], output.token_ids, strict=True)]
    spans = tuple(VersionSpan(Version.parse(s.version), s.start, s.end) for s in output.weight_versions or ())
    return Segment(Source.POLICY, tokens, np.asarray(logp, np.float32), spans)
