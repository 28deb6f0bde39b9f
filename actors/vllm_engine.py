"""The vLLM engine: one request per answer, weights swapped by vLLM's own pause, update and resume.

vLLM is imported only when this engine is started or its arguments are checked: the driver runs without it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import importlib.util
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from safetensors.torch import save_file

from hapo_async.config import Config
from hapo_async.engine import EngineDead, EngineError, Mailbox, check_manifest, stop_ids
from hapo_async.errors import ConfigError
from hapo_async.sampler import Sampled, match_parameters
from hapo_async.types import Answer, GroupKey, GroupRequest, Segment, Source, Version, VersionSpan
from hapo_async.weights import Manifest, TransferError

# Set by us, because the recorded log-probs, the weight stream or the placement depend on them.
OWNED = {
    "model": "model",
    "tokenizer": "model",
    "dtype": "generator.dtype",
    "seed": "seed",
    "tensor_parallel_size": "generator.tensor_parallel",
    "pipeline_parallel_size": "generator.pipeline_parallel",
    "distributed_executor_backend": "generator.tensor_parallel",
    "logprobs_mode": "",
    "generation_config": "",
    "skip_tokenizer_init": "",
    "weight_transfer_config": "",
    "worker_extension_cls": "",
    "trust_remote_code": "",
}
CPU_KV_BYTES = 256 << 20
CPU_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",  # beside a busy neighbour, more threads are many times slower
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the worker lives in the engine's process, instead of one more of 900 MB
}
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING", "TOKENIZERS_PARALLELISM": "false"}


def is_installed() -> bool:
    """Whether vLLM can be imported; it is not imported here."""
    return importlib.util.find_spec("vllm") is not None


# --------------------------------------------------------------------------------------------------------------------
# Arguments


def engine_args(config: Config) -> dict[str, Any]:
    """The ``vllm:`` section, checked against vLLM's AsyncEngineArgs. Raises ConfigError with the nearest name."""
    given = dict(config.vllm)
    if not given:
        return {}
    for key in given:
        if key in OWNED:
            instead = f" Set {OWNED[key]} instead." if OWNED[key] else ""
            raise ConfigError(f"vllm.{key} is set by hapo_async itself and cannot be given.{instead}")
    os.environ.update({k: v for k, v in ENVIRONMENT.items() if k not in os.environ})
    from vllm.engine.arg_utils import AsyncEngineArgs

    known = [f.name for f in dataclasses.fields(AsyncEngineArgs)]
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else " vLLM's AsyncEngineArgs lists all."
            raise ConfigError(f"vllm.{key} is not an argument of vLLM's engine.{hint}")
    return given


def _all_args(config: Config, model_path: str, device: str, name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    g = config.generator
    width = g.tensor_parallel * g.pipeline_parallel
    limit = AutoConfig.from_pretrained(model_path, trust_remote_code=False).get_text_config().max_position_embeddings
    needed = config.data.max_prompt_tokens + max(config.sampling.max_tokens, config.eval.max_tokens)
    args = {
        "max_model_len": min(limit, needed),
        "disable_log_stats": True,
        **({"enforce_eager": True, "kv_cache_memory_bytes": CPU_KV_BYTES} if device == "cpu" else {}),
        **engine_args(config),
    }
    dtype = ("bfloat16" if device == "cuda" else "float32") if g.dtype == "auto" else g.dtype
    return args | {
        "model": model_path,
        "dtype": dtype,
        # vLLM draws from one stream per engine; each generator gets its own.
        "seed": zlib.crc32(f"{config.seed}/{name}".encode()) & 0x7FFFFFFF,
        "tensor_parallel_size": g.tensor_parallel,
        "pipeline_parallel_size": g.pipeline_parallel,
        # Several ranks: vLLM's Ray workers take the bundles of this actor's placement group.
        "distributed_executor_backend": "ray" if width > 1 else None,
        "logprobs_mode": "processed_logprobs",  # the distribution that was sampled from, after temperature
        "generation_config": "vllm",  # no sampling defaults from the model's folder
        "skip_tokenizer_init": True,
        "weight_transfer_config": {"backend": "hapo_file"},
        "worker_extension_cls": "actors.vllm_transfer.WorkerExtension",
    }


async def start(config: Config, model_path: str, tokenizer: Any, device: str, name: str) -> VllmEngine:
    """Starts vLLM and its processes: seconds on a small model, minutes on a large one."""
    defaults = ENVIRONMENT | (CPU_ENVIRONMENT if device == "cpu" else {})
    os.environ.update({k: v for k, v in defaults.items() if k not in os.environ})
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
    llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**_all_args(config, model_path, device, name)))
    return VllmEngine(
        llm, skeleton, stop_ids(tokenizer, model_config, generation), config.generator.kv_cache == "recompute"
    )


# --------------------------------------------------------------------------------------------------------------------
# The engine


@dataclasses.dataclass
class _Job:
    """One group in work. running: vLLM's request id of each unfinished answer, by index."""

    request: GroupRequest
    since: float
    running: dict[int, str] = dataclasses.field(default_factory=dict)
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
        self._is_labelled = False
        self._is_torn = False

    async def submit(self, requests: Sequence[GroupRequest]) -> None:
        for request in requests:
            self._check(request)
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

    async def truncate(self, keys: Sequence[GroupKey]) -> None:
        for job in [self._jobs[k] for k in keys if k in self._jobs]:
            job.is_truncated = True
            await self._llm.abort(list(job.running.values()))

    async def abort(self, keys: Sequence[GroupKey]) -> None:
        await self._forget(keys, EngineError(f"groups {', '.join(map(str, keys))} were aborted"))

    def stats(self) -> dict[str, Any]:
        return {
            "running_groups": len(self._jobs),
            "running_sequences": sum(len(j.running) for j in self._jobs.values()),
            "waiting_sequences": 0,
            "tokens": self._tokens,
            "version": str(self.version),
        }

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
            return await self._swap(manifest.version, str(path))

    async def _swap(self, version: Version, path: str) -> float:
        """Pauses, loads, resumes. From the first write on a failure leaves the engine torn: it keeps its requests, paused,
        until a later version was loaded whole."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        start = time.perf_counter()
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
            if not self._is_torn and not self._llm.errored:
                await self._llm.resume_generation()
        self.version = version
        return time.perf_counter() - start

    async def _label(self) -> None:
        """vLLM calls the weights it started with "default"."""
        if not self._is_labelled:
            self._is_labelled = True
            await self._llm.update_weight_version(str(self.version))

    # ---------------------------------------------------------------- answers

    def _check(self, request: GroupRequest) -> None:
        longest = self._llm.model_config.max_model_len
        length = len(request.prompt_tokens) + request.sampling.max_tokens
        if length > longest:
            raise EngineError(
                f"group {request.key}: {len(request.prompt_tokens)} prompt tokens and {request.sampling.max_tokens} new ones "
                f"exceed vLLM's {longest}. Raise vllm.max_model_len, or lower data.max_prompt_tokens or sampling.max_tokens."
            )

    async def _start(self, request: GroupRequest) -> None:
        """Hands all answers to vLLM before returning, so that truncate and abort always find them."""
        job = self._jobs[request.key] = _Job(request, time.monotonic())
        prefixes = {a.index: a for a in request.prefixes}
        answers = []
        for index in range(request.sampling.n):
            prefix = prefixes.get(index)
            left = request.sampling.max_tokens - (prefix.length if prefix else 0)
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
        prompt: dict[str, Any] = {"prompt_token_ids": np.concatenate(tokens).tolist()}
        if not self._recompute:
            # Kept caches outlive an update: a prompt must not find the blocks of an older version.
            prompt["cache_salt"] = str(self.version)
        request_id = f"{job.request.key}#{index}{again}"
        collector = await self._llm.add_request(request_id, prompt, params)
        job.running[index] = request_id
        return collector

    async def _answer(self, job: _Job, index: int, prefix: Answer | None, left: int, collector: Any) -> Answer:
        output = await _final(collector)
        if job.is_truncated and not output.token_ids:
            # Truncated before its first token: an answer has at least one.
            output = await _final(await self._request(job, index, prefix, 1, again="#1"))
        job.running.pop(index, None)
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
        ids = [request_id for job in jobs for request_id in job.running.values()]
        if ids and not self._llm.errored:
            await self._llm.abort(ids)


async def _done(answer: Answer) -> Answer:
    return answer


async def _final(collector: Any) -> Any:
    """The CompletionOutput of one request. Raises what vLLM put into its queue (EngineDeadError when it died)."""
    try:
        while not (output := collector.get_nowait() or await collector.get()).finished:
            pass
    finally:
        collector.close()
    return output.outputs[0]


def _segment(output: Any) -> Segment:
    tokens = np.asarray(output.token_ids, np.int32)
    logp = [entry[token].logprob for entry, token in zip(output.logprobs or [], output.token_ids, strict=True)]
    spans = tuple(VersionSpan(Version.parse(s.version), s.start, s.end) for s in output.weight_versions or ())
    return Segment(Source.POLICY, tokens, np.asarray(logp, np.float32), spans)


def _shared_memory() -> str | None:
    """A memory file system where there is one; None is the usual temporary folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108
