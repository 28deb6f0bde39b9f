"""The vLLM engine: one request per answer, weights swapped by vLLM's own pause, update and resume.

vLLM is imported only when this engine is started: the driver runs without it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import save_file

from actors.vllm_args import all_args, engine_args, is_installed, set_environment
from hapo_async.config import Config
from hapo_async.engine import EngineDead, EngineError, Lengths, Mailbox, check_manifest, stop_ids
from hapo_async.rows import Sampled
from hapo_async.scoring import Pair
from hapo_async.types import Answer, GroupKey, GroupRequest, Segment, Source, Version, VersionSpan
from hapo_async.weights import Manifest, TransferError, match_parameters

__all__ = ["VllmEngine", "engine_args", "is_installed", "start"]

SCORE_S = 30.0  # weights wait for what is being scored, so that has a deadline of its own


async def start(config: Config, model_path: str, tokenizer: Any, device: str, name: str) -> VllmEngine:
    """Starts vLLM and its processes: seconds on a small model, minutes on a large one."""
    set_environment(device)
    # vLLM binds its sockets to this address: loopback under a Ray that stays on loopback, never a wildcard.
    os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
    return await asyncio.to_thread(_build, config, model_path, tokenizer, device, name)


def _build(config: Config, model_path: str, tokenizer: Any, device: str, name: str) -> VllmEngine:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    model_config = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model_config)
    try:
        generation = GenerationConfig.from_pretrained(model_path)
    except OSError:
        generation = None
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**all_args(config, model_path, device, name)))
    return VllmEngine(
        llm, skeleton, stop_ids(tokenizer, model_config, generation), config.generator.kv_cache == "recompute"
    )


@dataclasses.dataclass
class _Job:
    """One group in work. running: what collects each unfinished answer, by index. lengths: tokens of each answer; of a
    running one those of its resumed prefix."""

    request: GroupRequest
    since: float
    running: dict[int, Any] = dataclasses.field(default_factory=dict)
    lengths: dict[int, int] = dataclasses.field(default_factory=dict)
    is_truncated: bool = False
    task: asyncio.Task[None] | None = None


class VllmEngine:
    """An ``hapo_async.engine.Engine`` over AsyncLLM. skeleton: the model without storage, for checking names and shapes."""

    def __init__(self, llm: Any, skeleton: Any, stop: Sequence[int], recompute: bool) -> None:
        self.version = Version(0, 0)
        self._llm = llm
        self._skeleton = skeleton
        self._stop = list(stop)
        self._recompute = recompute
        self._mailbox = Mailbox()
        self._jobs: dict[GroupKey, _Job] = {}
        self._tokens = 0
        self._numbers = itertools.count()
        self._still = asyncio.Lock()  # whoever holds it changes the weights, or needs them not to change
        self._is_labelled = False
        self._is_torn = False
        self._is_asleep = False
        self._can_sleep = bool(llm.model_config.enable_sleep_mode)

    async def submit(self, requests: Sequence[GroupRequest]) -> None:
        self._check_awake()
        for request in requests:
            n, sampling = len(request.prompt_tokens), request.sampling
            self._check_length(f"group {request.key}", n, sampling.max_tokens)
        await self._label()
        keys = [r.key for r in requests]
        self._mailbox.open(keys)
        try:
            for request in requests:
                await self._start(request)
        except Exception as error:
            failure = self._failure("vLLM refused a group", error)
            await self._forget(keys, failure)
            raise failure from error

    async def collect(self, key: GroupKey) -> Sampled:
        return await self._mailbox.take(key)

    async def truncate(self, keys: Sequence[GroupKey]) -> Lengths:
        found = self._lengths(keys)
        jobs = [self._jobs[k] for k in keys if k in self._jobs]
        for job in jobs:
            job.is_truncated = True
        await self._stop_requests([collector for job in jobs for collector in job.running.values()])
        return found

    async def abort(self, keys: Sequence[GroupKey]) -> Lengths:
        found = self._lengths(keys)
        await self._forget(keys, EngineError(f"groups {', '.join(map(str, keys))} were aborted"))
        return found

    def stats(self) -> dict[str, Any]:
        running = [collector for job in self._jobs.values() for collector in job.running.values()]
        return {
            "running_groups": len(self._jobs),
            "running_sequences": len(running),
            "waiting_sequences": 0,
            "tokens": self._tokens + sum(map(self._sampled, running)),
            "version": str(self.version),
        }

    def _lengths(self, keys: Sequence[GroupKey]) -> Lengths:
        found = self._mailbox.lengths(keys)
        for key, job in ((k, self._jobs[k]) for k in keys if k in self._jobs):
            running = {i: self._sampled(collector) for i, collector in job.running.items()}
            found[key] = tuple(n + running.get(i, 0) for i, n in sorted(job.lengths.items()))
        return found

    def _sampled(self, collector: Any) -> int:
        """Tokens of a running answer, where vLLM gathers them: asking costs its sampling nothing."""
        state = self._llm.output_processor.request_states.get(collector.request_id)
        if state is not None:
            return int(state.detokenizer.num_output_tokens())
        output = collector.output  # finished, or an exception, and not taken yet
        return len(output.outputs[0].token_ids) if hasattr(output, "outputs") else 0

    async def _stop_requests(self, collectors: Iterable[Any]) -> None:
        """Ends requests now; what they have comes out of their collectors. Those that have ended are ignored."""
        ids = [collector.request_id for collector in collectors]
        if ids and not self._llm.errored:
            await self._llm.abort(ids, internal=True)

    async def close(self) -> None:
        await self._forget(list(self._jobs), EngineError("the engine was closed"))
        self._mailbox.close_all(EngineError("the engine was closed"))
        await asyncio.to_thread(self._llm.shutdown)

    # ---------------------------------------------------------------- weights

    async def install(self, manifest: Manifest, staged: Sequence[tuple[str, torch.Tensor]]) -> float:
        check_manifest(manifest, self.version)
        try:
            match_parameters(self._skeleton, staged)
        except ValueError as error:
            raise TransferError(f"version {manifest.version}: {error}") from error
        with tempfile.TemporaryDirectory(prefix="hapo-", dir=_shared_memory()) as folder:
            path = Path(folder) / "weights.safetensors"
            await asyncio.to_thread(save_file, dict(staged), path)
            async with self._still:
                return await self._swap(manifest.version, str(path))

    async def _swap(self, version: Version, path: str) -> float:
        """Pauses, loads, resumes. From the first write on a failure leaves the engine torn: it keeps its requests, paused,
        until a later version was loaded whole. An engine that sleeps on a GPU is paused already, without a cache, and goes on
        sleeping."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        start = time.perf_counter()
        sleeps = self._is_asleep and self._can_sleep
        if sleeps:
            await self._llm.wake_up(tags=["weights"])
        else:
            await self._llm.pause_generation(mode="keep", clear_cache=self._recompute)
        try:
            await self._llm.start_weight_update()
            self._is_torn = True
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info={"path": path}))
            await self._llm.finish_weight_update(weight_version=str(version))
            self._is_torn = False
        except Exception as error:
            state = (
                "it is torn and stays paused until a full update succeeds" if self._is_torn else "the old one serves on"
            )
            if self._llm.errored:
                raise self._failure(f"vLLM died while it loaded version {version}", error) from error
            raise TransferError(f"vLLM could not load version {version} ({error}); {state}") from error
        finally:
            if not self._is_torn and not self._llm.errored and not sleeps:
                await self._llm.resume_generation()
        self.version = version
        return time.perf_counter() - start

    async def sleep(self) -> None:
        """On GPUs weights go to host memory and the KV cache is dropped. On CPUs vLLM cannot sleep: nothing is freed."""
        async with self._still:
            if self._jobs:
                raise EngineError(f"{len(self._jobs)} groups are in flight; an engine sleeps when none is")
            if self._can_sleep and not self._is_asleep:
                await self._llm.sleep(level=1, mode="keep")
            self._is_asleep = True

    async def wake(self) -> None:
        async with self._still:
            if self._can_sleep and self._is_asleep:
                await self._llm.wake_up()
                if self._is_torn:  # waking resumes, but nothing may be sampled from these weights
                    await self._llm.pause_generation(mode="keep", clear_cache=True)
            self._is_asleep = False

    async def _label(self) -> None:
        """vLLM calls the weights it started with "default"."""
        if not self._is_labelled:
            self._is_labelled = True
            await self._llm.update_weight_version(str(self.version))

    # ---------------------------------------------------------------- scoring

    async def score(self, sequences: Sequence[Pair]) -> tuple[Version, list[np.ndarray]]:
        """Each sequence is the prompt of a request for one token: vLLM then tells the log-probs of the prompt, reads no
        cached prefix for it, and takes it before those that wait to be sampled. Weights stay as they are meanwhile."""
        self._check_awake()
        for prompt, tokens in sequences:
            self._check_length("a sequence to be scored", len(prompt), len(tokens) + 1)
        collectors: list[Any] = []
        try:
            async with asyncio.timeout(SCORE_S), self._still:
                if self._is_torn:
                    raise EngineError("nothing can be scored: the weights are torn until a full update succeeds")
                for prompt, tokens in sequences:
                    collectors.append(await self._request_score(np.concatenate([prompt, tokens])))
                outputs = [await _final(collector) for collector in collectors]
                return self.version, [_prompt_logp(o, len(s[0])) for o, s in zip(outputs, sequences, strict=True)]
        except TimeoutError:
            raise EngineError(f"{len(sequences)} sequences were not scored within {SCORE_S:.0f} s") from None
        except EngineError:
            raise
        except Exception as error:
            raise self._failure("vLLM could not score", error) from error
        finally:
            await self._stop_requests(collectors)

    async def _request_score(self, tokens: np.ndarray) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            max_tokens=1,
            prompt_logprobs=0,  # of the prompt's own tokens alone; at temperature 1 whatever the request's
            skip_reading_prefix_cache=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        return await self._llm.add_request(f"score#{next(self._numbers)}", self._prompt(tokens), params, priority=-1)

    # ---------------------------------------------------------------- answers

    def _check_awake(self) -> None:
        if self._is_asleep:
            raise EngineError("the engine is asleep; wake it first")

    def _check_length(self, what: str, prompt: int, tokens: int) -> None:
        longest = self._llm.model_config.max_model_len
        if prompt + tokens > longest:
            raise EngineError(
                f"{what}: {prompt} prompt tokens and {tokens} new ones exceed vLLM's {longest}. Raise vllm.max_model_len, or "
                "lower data.max_prompt_tokens or sampling.max_tokens."
            )
        if not prompt:
            raise EngineError(f"{what}: the prompt is empty; the first token needs something to follow")

    def _prompt(self, tokens: np.ndarray) -> dict[str, Any]:
        prompt: dict[str, Any] = {"prompt_token_ids": tokens.tolist()}
        if not self._recompute:
            # Kept caches outlive an update: a prompt must not find the blocks of an older version.
            prompt["cache_salt"] = str(self.version)
        return prompt

    async def _start(self, request: GroupRequest) -> None:
        """Hands all answers to vLLM before returning, so that truncate and abort always find them."""
        job = self._jobs[request.key] = _Job(request, time.monotonic())
        prefixes = {a.index: a for a in request.prefixes}
        answers = []
        for index in range(request.sampling.n):
            prefix = prefixes.get(index)
            job.lengths[index] = prefix.length if prefix else 0
            left = request.sampling.max_tokens - job.lengths[index]
            if prefix and (prefix.finish_reason != "abort" or left <= 0):
                reason = "length" if prefix.finish_reason == "abort" else prefix.finish_reason
                answers.append(_done(dataclasses.replace(prefix, finish_reason=reason)))
            else:
                answers.append(self._answer(job, index, prefix, left, await self._request(job, index, prefix, left)))
        job.task = asyncio.create_task(self._gather(job, answers))

    async def _request(self, job: _Job, index: int, prefix: Answer | None, left: int, again: str = "") -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        sampling = job.request.sampling
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            max_tokens=left,
            logprobs=0,  # of the sampled token alone
            stop_token_ids=self._stop,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        tokens = [job.request.prompt_tokens] + ([prefix.tokens] if prefix else [])
        prompt = self._prompt(np.concatenate(tokens))
        collector = await self._llm.add_request(f"{job.request.key}#{index}{again}", prompt, params)
        job.running[index] = collector
        return collector

    async def _answer(self, job: _Job, index: int, prefix: Answer | None, left: int, collector: Any) -> Answer:
        output = (await _final(collector)).outputs[0]
        if job.is_truncated and not output.token_ids:
            # Truncated before its first token: an answer has at least one.
            output = (await _final(await self._request(job, index, prefix, 1, again="#1"))).outputs[0]
        job.running.pop(index, None)
        job.lengths[index] += len(output.token_ids)
        self._tokens += len(output.token_ids)
        before = prefix.segments if prefix else ()
        reason = {"abort": "length"}.get(output.finish_reason, output.finish_reason)
        return Answer(index, (*before, _segment(output)), reason)

    async def _gather(self, job: _Job, answers: list[Any]) -> None:
        key = job.request.key
        try:
            found = await asyncio.gather(*answers)
        except Exception as error:
            self._jobs.pop(key, None)
            self._mailbox.close([key], self._failure(f"vLLM lost group {key}", error))
            return
        self._jobs.pop(key, None)
        self._mailbox.fill(Sampled(job.request, tuple(found), time.monotonic() - job.since))

    def _failure(self, what: str, error: Exception) -> EngineError:
        kind = EngineDead if self._llm.errored else EngineError
        failure = kind(f"{what}: {type(error).__name__}: {error}")
        failure.__cause__ = error
        return failure

    async def _forget(self, keys: Sequence[GroupKey], error: EngineError) -> None:
        jobs = [self._jobs.pop(k) for k in keys if k in self._jobs]
        for job in jobs:
            if job.task:
                job.task.cancel()
        self._mailbox.close(keys, error)
        collectors = [collector for job in jobs for collector in job.running.values()]
        self._tokens += sum(map(self._sampled, collectors))
        await self._stop_requests(collectors)


async def _done(answer: Answer) -> Answer:
    return answer


async def _final(collector: Any) -> Any:
    """The last RequestOutput of one request. Raises what vLLM put into its queue (EngineDeadError when it died)."""
    try:
        while not (output := collector.get_nowait() or await collector.get()).finished:
            pass
    finally:
        collector.close()
    return output


def _prompt_logp(output: Any, start: int) -> np.ndarray:
    """float32 [T]: log-probs of a prompt's tokens from position ``start`` on."""
    entries = zip(output.prompt_logprobs[start:], output.prompt_token_ids[start:], strict=True)
    return np.array([entry[token].logprob for entry, token in entries], np.float32)


def _segment(output: Any) -> Segment:
    tokens = np.asarray(output.token_ids, np.int32)
    logp = [entry[token].logprob for entry, token in zip(output.logprobs or [], output.token_ids, strict=True)]
    spans = tuple(VersionSpan(Version.parse(s.version), s.start, s.end) for s in output.weight_versions or ())
    return Segment(Source.POLICY, tokens, np.asarray(logp, np.float32), spans)


def _shared_memory() -> str | None:
    """A memory file system where there is one; None is the usual temporary folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
