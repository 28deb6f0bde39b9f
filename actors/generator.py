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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import torch

from actors import transports, vllm_engine
from actors.transports import Data, Offer, Receiver
from actors.vllm_device import WorkerReceiver
from hapo_async import engine as engines
from hapo_async import secrets
from hapo_async.config import Config
from hapo_async.lora import Lora, Merger
from hapo_async.rows import Sampled
from hapo_async.sampler import Sampler
from hapo_async.scoring import Pair
from hapo_async.types import Answer, Group, GroupHeader, GroupKey, GroupRequest, Source, Version
from hapo_async.weights import Bucket, Intake, Manifest, TransferError

log = logging.getLogger(__name__)

Tensors = list[tuple[str, torch.Tensor]]

_LAST_WORDS_S = 1.0  # an actor with a dead engine answers those who wait, then ends


@dataclass(frozen=True)
class _Fetched:
    """A version that has arrived whole. tensors: staged ones. pause_s: set when it is in the model already. in_workers: it
    is staged in vLLM's own processes."""

    manifest: Manifest
    tensors: list[tuple[str, torch.Tensor]]
    seconds: float
    pause_s: float | None = None
    in_workers: bool = False


def _key(offer: Offer) -> tuple[str, Version]:
    """One version may be offered twice: in lockstep, and as a snapshot to those who missed it."""
    return offer.transport, offer.version


class GeneratorActor:
    """Samples groups. name: how metrics and rollouts call it. config: ``Config.model_dump()``. device_info:
    {"device": "cpu" | "cuda"}. It serves the weights of ``model_path`` as version 0.0 until the first install."""

    def __init__(self, name: str, model_path: str, config: dict[str, Any], device_info: dict[str, Any]) -> None:
        self.name = name
        self.model_path = model_path
        secrets.learn(config)
        self.config = Config.model_validate(config)
        self.device = device_info.get("device", "cpu")
        if self.device == "cpu":
            torch.set_num_threads(1)
        self._engine: engines.Engine | None = None
        self._starting = asyncio.Lock()
        self._installing = asyncio.Lock()
        self._tokenizer: Any = None
        self._merger: Merger | None = None  # of adapters
        self._received = 0  # buckets
        self._applying = 0  # versions that the engine takes in, which shows in nothing that is counted
        self._transport = self.config.transport(self.device == "cuda")
        self._receiver = self._new_receiver()
        self._snapshots = transports.receiver("ray", self.device, "")
        self._arrivals: dict[tuple[str, Version], asyncio.Task[_Fetched]] = {}  # at most one that has not ended

    @property
    def engine(self) -> engines.Engine:
        if self._engine is None:
            raise engines.EngineError(f"{self.name} has not been started: call ready() first")
        return self._engine

    async def ready(self) -> dict[str, Any]:
        """Starts the engine, once. Returns pid, engine, engine_pids, device, version, member_key
        (``transports.Member.key``)."""
        async with self._starting:
            if self._engine is None:
                self._engine = await self._start()
        return {
            "pid": os.getpid(),
            "engine": self._kind,
            "engine_pids": self._engine.stats()["engine_pids"],
            "device": self.device,
            "version": str(self._engine.version),
            "member_key": self._receiver.key,
        }

    @property
    def _kind(self) -> str:
        wanted = self.config.generator.engine
        return wanted if wanted != "auto" else "vllm" if self.device == "cuda" else "transformers"

    @property
    def _dtype(self) -> torch.dtype:
        name = self.config.generator.dtype
        return getattr(torch, ("bfloat16" if self.device == "cuda" else "float32") if name == "auto" else name)

    async def _start(self) -> engines.Engine:
        from transformers import AutoTokenizer

        self._tokenizer = await asyncio.to_thread(
            AutoTokenizer.from_pretrained, self.model_path, trust_remote_code=False
        )
        if lora := Lora.of(self.config):
            self._merger = await asyncio.to_thread(Merger, self.model_path, lora, self._dtype)
        if self._kind == "vllm":
            engine = await vllm_engine.start(self.config, self.model_path, self._tokenizer, self.device, self.name)
            return engine
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

    async def hand_over(self, keys: list[GroupKey]) -> list[tuple[GroupHeader, Group]]:
        """Ends groups now and gives them out as they are. Unfinished answers ("abort") may be empty; as ``prefixes`` of a
        request they are resumed by any generator. Unknown keys are ignored."""
        with self._exit_when_dead():
            found = await self.engine.hand_over([GroupKey(*k) for k in keys])
        groups = await asyncio.to_thread(lambda: [self._group(sampled) for sampled in found])
        return [(GroupHeader.of(g, s.seconds), g) for g, s in zip(groups, found, strict=True)]

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

    async def receive(self, offer: Offer) -> None:
        """Fetches a version beside serving, for ``install``. In place there is no second copy: a version that travels in
        lockstep is then installed at once, and one that can be fetched at any time is left to ``install``. Raises
        TransferError."""
        if not self._is_staged(offer) and offer.members is None:
            return
        await self._receiving(offer)

    async def install(self, offer: Offer) -> dict[str, Any]:
        """Swaps the weights between two tokens: what ``receive`` has fetched, or fetches it now.

        Raises TransferError or ray's own errors; the old version then serves on (in place: none, until an install
        succeeds). Returns version, fetch_s, pause_s, bytes.
        """
        async with self._installing:
            kind = "full" if offer.kind == "adapter" else offer.kind  # merged, it is a full version
            engines.check_manifest(Manifest(offer.version, (), kind), self.engine.version)
            fetched = await self._receiving(offer)
            self._arrivals.pop(_key(offer), None)
            if fetched.pause_s is not None:
                pause_s = fetched.pause_s
            else:
                with self._exit_when_dead(), self._uncounted():
                    pause_s = await self._apply(fetched)
        return {
            "version": str(offer.version),
            "fetch_s": fetched.seconds,
            "pause_s": pause_s,
            "bytes": fetched.manifest.nbytes,
        }

    async def _apply(self, fetched: _Fetched) -> float:
        if fetched.in_workers:
            return await self._vllm.install_received(fetched.manifest)
        return await self.engine.install(fetched.manifest, fetched.tensors)

    def _is_staged(self, offer: Offer) -> bool:
        return offer.kind == "adapter" or self.config.staging(self.device == "cuda") != "none"

    async def _receiving(self, offer: Offer) -> _Fetched:
        """The one fetch of this offer, begun by whoever asks first; older ones are given up. A failed one may be begun again
        where buckets can be fetched at any time."""
        key = _key(offer)
        if key not in self._arrivals:
            await self._give_up_arrivals()
            if isinstance(self._receiver, WorkerReceiver) and offer.transport == self._transport:
                fetch = self._receive_in_workers(offer, self._receiver)
            else:
                fetch = self._stage(offer) if self._is_staged(offer) else self._write(offer)
            self._arrivals[key] = asyncio.create_task(fetch)
        task = self._arrivals[key]
        try:
            return await asyncio.shield(task)
        except Exception:
            if offer.members is None:
                self._arrivals.pop(key, None)
            raise

    async def _give_up_arrivals(self) -> None:
        arrivals = [task for task in self._arrivals.values() if not task.done()]
        self._arrivals.clear()
        while arrivals:  # one that was just about to begin takes the second word
            self._receiver.cancel()
            self._snapshots.cancel()
            _, pending = await asyncio.wait(arrivals, timeout=0.2)
            arrivals = list(pending)

    async def _stage(self, offer: Offer) -> _Fetched:
        """A second copy, verified; of an adapter, that of the model with it merged in."""
        began = time.perf_counter()
        intake = Intake(offer.version, offer.kind)
        manifest = await asyncio.to_thread(self._fetch, offer, intake)
        tensors = intake.commit(manifest)
        if offer.kind == "adapter":
            manifest, tensors = await asyncio.to_thread(self._merge, manifest, tensors)
        return _Fetched(manifest, tensors, time.perf_counter() - began)

    def _merge(self, manifest: Manifest, adapter: Tensors) -> tuple[Manifest, Tensors]:
        """A full version of an adapter. Raises TransferError."""
        if self._merger is None:
            raise TransferError(
                f"version {manifest.version} is an adapter; {self.name} was started without learner.lora"
            )
        if self._kind == "vllm":  # its device is its own processes'
            adapter = [(name, tensor.cpu()) for name, tensor in adapter]
        try:
            return replace(manifest, kind="full"), self._merger.full(adapter)
        except ValueError as error:
            raise TransferError(f"version {manifest.version}: {error}") from error

    async def _write(self, offer: Offer) -> _Fetched:
        """Straight into the model, which pauses meanwhile."""
        began = time.perf_counter()
        arrived: list[Manifest] = []

        def source(write: Callable[[list[tuple[str, torch.Tensor]]], None]) -> Manifest:
            intake = Intake(offer.version, offer.kind, write=write)
            manifest = self._fetch(offer, intake)
            intake.commit(manifest)
            arrived.append(manifest)
            return manifest

        with self._exit_when_dead():
            pause_s = await self.engine.install_in_place(offer.version, source)
        return _Fetched(arrived[0], [], time.perf_counter() - began, pause_s)

    async def _receive_in_workers(self, offer: Offer, receiver: WorkerReceiver) -> _Fetched:
        """Into memory of vLLM's own processes: a second copy, or the model, which pauses meanwhile."""
        began = time.perf_counter()
        deadline = time.monotonic() + self.config.weights.deadline_s
        pause_s = None
        with self._exit_when_dead(), self._uncounted():
            if self._is_staged(offer):
                manifest = await self._vllm.receive_on_device(receiver, offer, deadline)
            else:
                manifest, pause_s = await self._vllm.receive_in_place(receiver, offer, deadline)
        self._received += len(manifest.buckets)
        return _Fetched(manifest, [], time.perf_counter() - began, pause_s, in_workers=True)

    @property
    def _vllm(self) -> vllm_engine.VllmEngine:
        assert isinstance(self.engine, vllm_engine.VllmEngine)
        return self.engine

    def _new_receiver(self) -> Receiver | WorkerReceiver:
        """What lies on a device arrives in the process that has the model there, which with vLLM is not this one; an adapter
        comes here, to be merged."""
        on_device = self.config.staging(self.device == "cuda") == "device" or self._transport in ("nccl", "ipc")
        direct = on_device and self._transport in ("gloo", "nccl", "ipc") and not self.config.learner.lora
        if self._kind == "vllm" and direct:
            return WorkerReceiver(self.config.generator.width)
        return transports.receiver(self._transport, self.device, ray.util.get_node_ip_address())

    def _fetch(self, offer: Offer, intake: Intake) -> Manifest:
        """All buckets of a version, into ``intake``. Runs in a thread."""

        def put(bucket: Bucket, data: Data) -> None:
            intake.put(bucket, data)
            self._received += 1

        return self._receiver_of(offer).receive(offer, time.monotonic() + self.config.weights.deadline_s, put)

    def _receiver_of(self, offer: Offer) -> Receiver:
        """A snapshot comes through the object store whatever the transport."""
        if offer.transport != self._transport or isinstance(self._receiver, WorkerReceiver):
            return self._snapshots
        return self._receiver

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

    @contextlib.contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Inside, the engine takes a version in: it has a deadline, and shows no progress until it is done."""
        self._applying += 1
        try:
            yield
        finally:
            self._applying -= 1

    async def stats(self) -> dict[str, Any]:
        """``Engine.stats``, and received (buckets of weights), applying (whether the engine takes a version in), pid."""
        return {
            **self.engine.stats(),
            "received": self._received,
            "applying": self._applying > 0,
            "pid": os.getpid(),
        }

    async def close(self) -> None:
        """Stops the engine and its processes."""
        self._receiver.close()
        if self._engine is not None:
            await self._engine.close()
            self._engine = None
