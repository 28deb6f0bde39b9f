"""One generator: an engine (vLLM or transformers) in an async Ray actor, and the receiving end of the weight stream.

The event loop only moves messages: decoding runs in a thread or a child process, buckets are fetched and checked in an
executor. New weights are staged as a second copy; until every bucket is there and verified, nothing of them is used.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import torch

from actors import vllm_engine
from hapo_async import engine as engines
from hapo_async.config import Config
from hapo_async.rows import Sampled
from hapo_async.sampler import Sampler
from hapo_async.scoring import Pair
from hapo_async.types import Answer, Group, GroupHeader, GroupKey, GroupRequest, Source, Version
from hapo_async.weights import Manifest, Staging

log = logging.getLogger(__name__)

_LAST_WORDS_S = 1.0  # an actor with a dead engine answers those who wait, then ends


class GeneratorActor:
    """Samples groups. name: how metrics and rollouts call it. config: ``Config.model_dump()``. device_info:
    {"device": "cpu" | "cuda"}. It serves the weights of ``model_path`` as version 0.0 until the first install."""

    def __init__(self, name: str, model_path: str, config: dict[str, Any], device_info: dict[str, Any]) -> None:
        self.name = name
        self.model_path = model_path
        self.config = Config.model_validate(config)
        self.device = device_info.get("device", "cpu")
        if self.device == "cpu":
            torch.set_num_threads(1)
        self._engine: engines.Engine | None = None
        self._starting = asyncio.Lock()
        self._installing = asyncio.Lock()
        self._tokenizer: Any = None
        self._received = 0  # buckets

    @property
    def engine(self) -> engines.Engine:
        if self._engine is None:
            raise engines.EngineError(f"{self.name} has not been started: call ready() first")
        return self._engine

    async def ready(self) -> dict[str, Any]:
        """Starts the engine, once. Returns pid, engine, device, version."""
        async with self._starting:
            if self._engine is None:
                self._engine = await self._start()
        return {"pid": os.getpid(), "engine": self._kind, "device": self.device, "version": str(self._engine.version)}

    @property
    def _kind(self) -> str:
        wanted = self.config.generator.engine
        return wanted if wanted != "auto" else "vllm" if self.device == "cuda" else "transformers"

    async def _start(self) -> engines.Engine:
        from transformers import AutoTokenizer

        self._tokenizer = await asyncio.to_thread(
            AutoTokenizer.from_pretrained, self.model_path, trust_remote_code=False
        )
        if self._kind == "vllm":
            return await vllm_engine.start(self.config, self.model_path, self._tokenizer, self.device, self.name)
        dtype = self.config.generator.dtype
        model = await asyncio.to_thread(engines.load_model, self.model_path, self.device, dtype)
        stop = engines.stop_ids(self._tokenizer, model.config, model.generation_config)
        sampler = Sampler(model, stop, recompute=self.config.generator.kv_cache == "recompute")
        return engines.TransformersEngine(sampler)

    # ---------------------------------------------------------------- requests

    async def submit(self, requests: list[GroupRequest]) -> None:
        """Enqueues groups, all or none. Raises EngineError."""
        with self._exit_when_dead():
            await self.engine.submit(requests)

    @ray.method(num_returns=2)
    async def collect(self, key: GroupKey) -> tuple[GroupHeader, Group]:
        """Waits for a group and hands it out, once: (header, payload). Raises EngineError for an unknown key."""
        return await self._hand_out(GroupKey(*key))

    @ray.method(num_returns=2)
    async def sample(self, request: GroupRequest) -> tuple[GroupHeader, Group]:
        """``submit`` and ``collect`` of one group in one call, since calls are what a group costs the driver."""
        await self.submit([request])
        return await self._hand_out(request.key)

    async def _hand_out(self, key: GroupKey) -> tuple[GroupHeader, Group]:
        with self._exit_when_dead():
            sampled = await self.engine.collect(key)
        group = await asyncio.to_thread(self._group, sampled)
        return GroupHeader.of(group, sampled.seconds), group

    def _group(self, sampled: Sampled) -> Group:
        request = sampled.request
        policy = [
            np.concatenate([s.tokens for s in a.segments if s.source is not Source.PROMPT]) for a in sampled.answers
        ]
        texts = self._tokenizer.batch_decode(policy, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        answers = tuple(
            Answer(a.index, a.segments, a.finish_reason, text) for a, text in zip(sampled.answers, texts, strict=True)
        )
        # A greedy answer's log-probs are those of temperature 1.
        temperature = request.sampling.temperature or 1.0
        return Group(request.key, request.prompt_tokens, answers, temperature, self.name, os.getpid())

    async def truncate(self, keys: list[GroupKey]) -> engines.Lengths:
        """Ends running answers now ("length"); what was sampled is kept. Returns the lengths at that moment."""
        with self._exit_when_dead():
            return await self.engine.truncate([GroupKey(*k) for k in keys])

    async def abort(self, keys: list[GroupKey]) -> engines.Lengths:
        """Forgets groups. Returns how long their answers were."""
        with self._exit_when_dead():
            return await self.engine.abort([GroupKey(*k) for k in keys])

    async def score(self, sequences: list[Pair]) -> tuple[Version, list[np.ndarray]]:
        """(version, log-probs float32 [T] of each sequence at temperature 1), all under that one version. Raises
        EngineError."""
        with self._exit_when_dead():
            return await self.engine.score(sequences)

    # ---------------------------------------------------------------- taking turns

    async def sleep(self) -> None:
        """Frees memory for a learner on the same device: on GPUs keys, values and weights, on CPUs what the engine can give
        back (transformers: keys and values; vLLM: nothing, it cannot sleep there). Raises EngineError while groups are in
        flight."""
        with self._exit_when_dead():
            await self.engine.sleep()

    async def wake(self) -> None:
        """Undoes ``sleep``."""
        with self._exit_when_dead():
            await self.engine.wake()

    # ---------------------------------------------------------------- weights

    async def install(self, manifest: Manifest, refs: list[ray.ObjectRef]) -> dict[str, Any]:
        """Fetches and verifies every bucket, then swaps the weights between two tokens.

        Raises TransferError or ray's own errors; the old version then serves on. Returns version, fetch_s, pause_s, bytes.
        """
        async with self._installing:
            start = time.perf_counter()
            engines.check_manifest(manifest, self.engine.version)
            deadline = time.monotonic() + self.config.weights.deadline_s
            tensors = await asyncio.to_thread(self._receive, manifest, refs, deadline)
            fetch_s = time.perf_counter() - start
            with self._exit_when_dead():
                pause_s = await self.engine.install(manifest, tensors)
        return {"version": str(manifest.version), "fetch_s": fetch_s, "pause_s": pause_s, "bytes": manifest.nbytes}

    def _receive(
        self, manifest: Manifest, refs: list[ray.ObjectRef], deadline: float
    ) -> list[tuple[str, torch.Tensor]]:
        """All tensors of a version, verified. One bucket is fetched at a time, so that staging holds one copy and no more."""
        staging = Staging(manifest)
        for index, ref in enumerate(refs):
            staging.put(index, ray.get(ref, timeout=max(0.1, deadline - time.monotonic())))
            self._received += 1
        return staging.commit()

    # ---------------------------------------------------------------- the rest

    @contextlib.contextmanager
    def _exit_when_dead(self) -> Iterator[None]:
        """An actor without its engine would only refuse everything: it reports why and ends, so that others see a death."""
        try:
            yield
        except engines.EngineDead:
            log.exception("%s ends because its engine is gone", self.name)
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
            raise

    async def stats(self) -> dict[str, Any]:
        """running_groups, running_sequences, waiting_sequences, tokens, version, received (buckets of weights), pid."""
        return {**self.engine.stats(), "received": self._received, "pid": os.getpid()}

    async def close(self) -> None:
        """Stops the engine and its processes."""
        if self._engine is not None:
            await self._engine.close()
            self._engine = None
