"""The vLLM engine: one request per answer, weights swapped by vLLM's own pause, update and resume.

vLLM is imported only when this engine is started: the driver runs without it.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import ray
import torch

from actors.transports import Offer
from actors.vllm_args import all_args, engine_args, is_installed, set_environment
from actors.vllm_device import WorkerReceiver
from actors.vllm_groups import Groups, final
from actors.vllm_weights import Weights, failure, sweep
from hapo_async.config import Config
from hapo_async.engine import SCORE_S, EngineError, Lengths, stop_ids
from hapo_async.in_place import Source, Tensors
from hapo_async.rows import Sampled
from hapo_async.scoring import Pair
from hapo_async.types import GroupKey, GroupRequest, Version
from hapo_async.weights import Manifest, TransferError

__all__ = ["VllmEngine", "engine_args", "is_installed", "start"]

# vLLM's processes die with the thread that started them (see vllm_lifeline), so that is one that stays.
_STARTER = ThreadPoolExecutor(1, thread_name_prefix="vllm-start")


async def start(config: Config, model_path: str, tokenizer: Any, device: str, name: str) -> VllmEngine:
    """Starts vLLM and its processes: seconds on a small model, minutes on a large one."""
    set_environment(device)
    await asyncio.to_thread(sweep)
    # vLLM binds its sockets to this address: loopback under a Ray that stays on loopback, never a wildcard.
    os.environ.setdefault("VLLM_HOST_IP", ray.util.get_node_ip_address())
    loop = asyncio.get_running_loop()
    engine = await loop.run_in_executor(_STARTER, _build, config, model_path, tokenizer, device, name)
    await engine.prepare()
    return engine


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
    size = model_config.get_text_config().vocab_size
    # A tokenizer may name one that the model cannot sample; vLLM would refuse it.
    stop = [token for token in stop_ids(tokenizer, model_config, generation) if token < size]
    return VllmEngine(llm, skeleton, stop, config.generator.kv_cache == "recompute", _processes(llm))


def _processes(llm: Any) -> list[int]:
    """Pids of vLLM's core and of the ranks that it started on this node, in this order."""
    cores = [psutil.Process(p.pid) for p in llm.engine_core.resources.engine_manager.processes]
    ranks = [p for core in cores for p in core.children() if "resource_tracker" not in " ".join(p.cmdline())]
    return [p.pid for p in (*cores, *ranks)]


class VllmEngine:
    """An ``hapo_async.engine.Engine`` over AsyncLLM. skeleton: the model without storage, for checking names and shapes.
    pids: of vLLM's processes."""

    def __init__(self, llm: Any, skeleton: Any, stop: Sequence[int], recompute: bool, pids: Sequence[int] = ()) -> None:
        self._llm = llm
        self._pids = list(pids)
        self._weights = Weights(llm, skeleton, recompute)
        self._groups = Groups(llm, self._weights, stop)
        self._numbers = itertools.count()

    async def prepare(self) -> None:
        """Once, before anything else."""
        if self._llm.vllm_config.parallel_config.pipeline_parallel_size > 1:
            await self._llm.collective_rpc("allocate_stage_inputs")

    @property
    def version(self) -> Version:
        return self._weights.version

    async def submit(self, requests: Sequence[GroupRequest]) -> None:
        self._check_awake()
        for request in requests:
            n, sampling = len(request.prompt_tokens), request.sampling
            self._check_length(f"group {request.key}", n, sampling.max_tokens)
        await self._groups.submit(requests)

    async def collect(self, key: GroupKey) -> Sampled:
        return await self._groups.collect(key)

    async def truncate(self, keys: Sequence[GroupKey]) -> Lengths:
        return await self._groups.truncate(keys)

    async def abort(self, keys: Sequence[GroupKey]) -> Lengths:
        return await self._groups.abort(keys, EngineError(f"groups {', '.join(map(str, keys))} were aborted"))

    async def hand_over(self, keys: Sequence[GroupKey]) -> list[Sampled]:
        return await self._groups.hand_over(keys)

    def stats(self) -> dict[str, Any]:
        return {
            "running_groups": len(self._groups),
            "running_sequences": self._groups.running,
            "waiting_sequences": 0,
            "tokens": self._groups.tokens,
            "version": str(self.version),
            "torn": float(self._weights.is_torn),
            "engine_pids": self._pids,
        }

    async def close(self) -> None:
        await self._groups.close(EngineError("the engine was closed"))
        await asyncio.to_thread(self._llm.shutdown)

    # ---------------------------------------------------------------- weights

    async def install(self, manifest: Manifest, staged: Tensors) -> float:
        return await self._weights.install(manifest, staged)

    async def install_in_place(self, version: Version, source: Source) -> float:
        return await self._weights.install_in_place(version, source)

    async def receive_on_device(self, receiver: WorkerReceiver, offer: Offer, deadline: float) -> Manifest:
        """vLLM's processes fetch a version beside serving, for ``install_received``. Raises TransferError."""
        try:
            return await receiver.stage(self._llm, offer, deadline)
        except TransferError:
            raise
        except Exception as error:
            raise failure(self._llm, f"vLLM could not receive version {offer.version}", error) from error

    async def install_received(self, manifest: Manifest) -> float:
        """Like ``install``."""
        return await self._weights.install_received(manifest)

    async def receive_in_place(self, receiver: WorkerReceiver, offer: Offer, deadline: float) -> tuple[Manifest, float]:
        """Like ``install_in_place``; also returns the manifest."""
        return await self._weights.receive_in_place(offer.version, receiver.request(offer, deadline))

    async def sleep(self) -> None:
        async with self._weights.still:
            if len(self._groups):
                raise EngineError(f"{len(self._groups)} groups are in flight; an engine sleeps when none is")
            await self._weights.sleep()

    async def wake(self) -> None:
        async with self._weights.still:
            await self._weights.wake()

    # ---------------------------------------------------------------- scoring

    async def score(self, sequences: Sequence[Pair]) -> tuple[Version, list[np.ndarray]]:
        """Each sequence is the prompt of a request for one token: vLLM then tells the log-probs of the prompt, reads no
        cached prefix for it, and takes it before those that wait to be sampled. Weights stay as they are meanwhile."""
        self._check_awake()
        for prompt, tokens in sequences:
            self._check_length("a sequence to be scored", len(prompt), len(tokens) + 1)
        collectors: list[Any] = []
        try:
            async with asyncio.timeout(SCORE_S), self._weights.still:
                if self._weights.is_torn:
                    raise EngineError("nothing can be scored: the weights are torn until a full update succeeds")
                for prompt, tokens in sequences:
                    collectors.append(await self._request_score(np.concatenate([prompt, tokens])))
                outputs = [await final(collector) for collector in collectors]
                return self.version, [_prompt_logp(o, len(s[0])) for o, s in zip(outputs, sequences, strict=True)]
        except TimeoutError:
            raise EngineError(f"{len(sequences)} sequences were not scored within {SCORE_S:.0f} s") from None
        except EngineError:
            raise
        except Exception as error:
            raise failure(self._llm, "vLLM could not score", error) from error
        finally:
            await self._groups.stop(collectors)

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
        return await self._llm.add_request(
            f"score#{next(self._numbers)}", self._groups.prompt(tokens), params, priority=-1
        )

    def _check_awake(self) -> None:
        if self._weights.is_asleep:
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


def _prompt_logp(output: Any, start: int) -> np.ndarray:
    """float32 [T]: log-probs of a prompt's tokens from position ``start`` on."""
    entries = zip(output.prompt_logprobs[start:], output.prompt_token_ids[start:], strict=True)
    return np.array([entry[token].logprob for entry, token in entries], np.float32)
