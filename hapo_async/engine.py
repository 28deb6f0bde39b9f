"""What a generator runs: the Engine protocol, and the transformers engine, a decode thread behind an async surface.

A group is enqueued by ``submit``, kept when complete, and handed out once by ``collect``. Weights are swapped between
two tokens; no request is ever dropped by it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from hapo_async.errors import RunError
from hapo_async.in_place import Source, Tensors, pour
from hapo_async.rows import Sampled
from hapo_async.sampler import Sampler
from hapo_async.scoring import Pair
from hapo_async.slot_cache import ATTENTION
from hapo_async.types import GroupKey, GroupRequest, Version
from hapo_async.weights import Manifest, TransferError

__all__ = ["Engine", "EngineDead", "EngineError", "Lengths", "Source", "TransformersEngine"]

log = logging.getLogger(__name__)

T = TypeVar("T")

SCORE_S = 30.0  # weights wait for what is being scored, and scores for weights that arrive, so both have an end

Lengths = dict[GroupKey, tuple[int, ...]]
"""Tokens so far of each answer, resumed prefixes included, by group."""


class EngineError(RunError):
    """A request that the engine does not know or cannot serve, or an engine that died."""


class EngineDead(EngineError):
    """The engine is gone and with it everything that it was sampling; only a new generator helps."""


class Engine(Protocol):
    """What both engines do. All coroutines belong to one event loop, which they never block.

    An update that fails after its first write leaves the weights torn: requests are taken and kept, nothing is sampled or
    scored, until a full update succeeds.
    """

    @property
    def version(self) -> Version:
        """The version that was installed last."""

    async def submit(self, requests: Sequence[GroupRequest]) -> None:
        """Enqueues groups, all or none (the transformers engine: in one step). Raises EngineError."""

    async def collect(self, key: GroupKey) -> Sampled:
        """Waits for a group and hands it out, once. Raises EngineError when the key is unknown, aborted or lost."""

    async def install(self, manifest: Manifest, staged: Sequence[tuple[str, torch.Tensor]]) -> float:
        """Pauses, swaps the weights, resumes; returns the seconds of the pause. Raises TransferError: the old version serves
        on, unless the weights are torn."""

    async def install_in_place(self, version: Version, source: Source) -> float:
        """Writes a full version as ``source`` delivers it: pauses at its first bucket, resumes after the last; returns the
        seconds of the pause. Raises what ``source`` raises, and TransferError for what does not fit the model. From the
        first write on a failure leaves the weights torn."""

    async def truncate(self, keys: Sequence[GroupKey]) -> Lengths:
        """Ends running answers now, with finish_reason "length" and at least one token each. Unknown keys are ignored.
        Returns how long the answers of the others were at that moment."""

    async def abort(self, keys: Sequence[GroupKey]) -> Lengths:
        """Forgets groups; whoever collects them gets an EngineError. Unknown keys are ignored. Returns how long the
        answers of the others were."""

    async def hand_over(self, keys: Sequence[GroupKey]) -> list[Sampled]:
        """Ends groups now and gives them out as they are, in the order of ``keys``, to be resumed as ``prefixes`` elsewhere:
        unfinished answers have finish_reason "abort" and may be empty. Whoever collects these groups gets an EngineError.
        Unknown keys are ignored."""

    async def score(self, sequences: Sequence[Pair]) -> tuple[Version, list[np.ndarray]]:
        """(version, float32 [T] per sequence): log-probs at temperature 1 of its tokens after its prompt tokens, all under
        that one version, while sampling goes on. Raises EngineError for what does not fit, while the engine sleeps, and for
        torn weights."""

    async def sleep(self) -> None:
        """Frees what it can for somebody else on the same device, until ``wake``. Raises EngineError while groups are in
        flight. Weights can be installed meanwhile; nothing can be sampled or scored."""

    async def wake(self) -> None:
        """Undoes ``sleep``."""

    def stats(self) -> dict[str, Any]:
        """running_groups, running_sequences, waiting_sequences, tokens (sampled since the start, running answers and
        those that were aborted included: it moves with every decode step), version, torn (1.0 or 0.0), engine_pids
        (processes of the engine besides this one, the one that others depend on first)."""

    async def close(self) -> None:
        """Stops the engine and everything it started."""


class Mailbox:
    """Results by group key: opened at submit, filled by the engine, taken once by collect. Belongs to one event loop."""

    def __init__(self) -> None:
        self._slots: dict[GroupKey, asyncio.Future[Sampled]] = {}

    def open(self, keys: Sequence[GroupKey]) -> None:
        """Raises EngineError, with nothing opened, when a key is in use."""
        taken = [k for k in keys if k in self._slots]
        if taken or len(set(keys)) < len(keys):
            raise EngineError(
                f"groups {', '.join(map(str, taken or keys))} were submitted twice; use a new attempt number"
            )
        loop = asyncio.get_running_loop()
        for key in keys:
            slot = loop.create_future()
            # Marks the exception as seen: a group that is aborted before anybody asks for it is no event-loop error.
            slot.add_done_callback(lambda f: f.cancelled() or f.exception())
            self._slots[key] = slot

    async def take(self, key: GroupKey) -> Sampled:
        if key not in self._slots:
            raise EngineError(f"group {key} is not here: never submitted, already collected, or aborted")
        slot = self._slots[key]
        # Shielded: a collector that gives up does not destroy the result.
        result = await asyncio.shield(slot)
        if self._slots.get(key) is not slot:
            raise EngineError(f"group {key} is not here any more: collected, aborted or handed over meanwhile")
        del self._slots[key]
        return result

    def withdraw(self, keys: Sequence[GroupKey], error: Exception) -> list[Sampled]:
        """``close``, which returns the results that were there."""
        slots = [self._slots[k] for k in keys if k in self._slots]
        found = [s.result() for s in slots if s.done() and not s.exception()]
        self.close(keys, error)
        return found

    def lengths(self, keys: Sequence[GroupKey]) -> Lengths:
        """Of those groups that are complete and wait to be taken."""
        slots = {k: self._slots[k] for k in keys if k in self._slots}
        return {k: s.result().lengths for k, s in slots.items() if s.done() and not s.exception()}

    def fill(self, result: Sampled) -> None:
        slot = self._slots.get(result.request.key)
        if slot and not slot.done():
            slot.set_result(result)

    def close(self, keys: Sequence[GroupKey], error: Exception) -> None:
        """Forgets these groups; waiting collectors get ``error``."""
        for key in keys:
            slot = self._slots.pop(key, None)
            if slot and not slot.done():
                slot.set_exception(error)

    def close_all(self, error: Exception) -> None:
        self.close(list(self._slots), error)


def check_manifest(manifest: Manifest, installed: Version) -> None:
    """Raises TransferError for what an engine cannot apply: another kind than full, or an older version."""
    if manifest.kind != "full":
        raise TransferError(f"version {manifest.version} is a {manifest.kind}; engines install full versions")
    check_version(manifest.version, installed)


def check_version(version: Version, installed: Version) -> None:
    """Raises TransferError for an older version."""
    if version < installed:
        raise TransferError(f"version {version} is older than the installed {installed}; versions never go back")


def stop_ids(tokenizer: Any, model_config: Any, generation_config: Any = None) -> tuple[int, ...]:
    """Ids that end an answer: the tokenizer's end-of-text and those that the model's own configurations name."""
    found: set[int] = set()
    for holder in (tokenizer, model_config, generation_config):
        ids = getattr(holder, "eos_token_id", None)
        found.update(ids if isinstance(ids, (list, tuple)) else [] if ids is None else [ids])
    if not found:
        raise EngineError("the model names no end-of-text token (eos_token_id); answers could never end by themselves")
    return tuple(sorted(found))


def load_model(path: str, device: str, dtype: str) -> Any:
    """A causal LM for the sampler. dtype: auto means bfloat16 on cuda, else float32."""
    from transformers import AutoModelForCausalLM

    name = ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype
    model: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=getattr(torch, name),
        attn_implementation=ATTENTION,
        trust_remote_code=False,
        use_safetensors=True,
    )
    return model.to(device)


class TransformersEngine:
    """A Sampler in a thread of its own. Commands are carried out between two decode steps, in the order they came."""

    def __init__(self, sampler: Sampler) -> None:
        self.version = sampler.version
        self._sampler = sampler
        self._mailbox = Mailbox()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._failure: EngineDead | None = None
        self._still = asyncio.Lock()  # whoever holds it changes the weights
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    async def submit(self, requests: Sequence[GroupRequest]) -> None:
        keys = [r.key for r in requests]
        self._mailbox.open(keys)
        try:
            await self._between_steps(lambda: self._sampler.add(requests))
        except ValueError as error:
            refused = EngineError(str(error))
            self._mailbox.close(keys, refused)
            raise refused from error

    async def collect(self, key: GroupKey) -> Sampled:
        return await self._mailbox.take(key)

    async def install(self, manifest: Manifest, staged: Sequence[tuple[str, torch.Tensor]]) -> float:
        check_manifest(manifest, self.version)

        def swap() -> float:
            start = time.perf_counter()
            try:
                self._sampler.install(manifest.version, staged)
            except Exception as error:
                raise TransferError(f"version {manifest.version}: {error}{self._torn()}") from error
            self.version = manifest.version
            return time.perf_counter() - start

        async with self._still:
            return await self._between_steps(swap)

    async def install_in_place(self, version: Version, source: Source) -> float:
        check_version(version, self.version)
        began: list[float] = []

        def write(tensors: Tensors) -> None:
            began.append(time.perf_counter())
            self._sampler.write(tensors)

        def finish() -> float:
            self._sampler.finish_install(version)
            self.version = version
            return time.perf_counter() - began[0]

        async with self._still:
            try:
                await pour(version, source, self._sampler.model, lambda t: self._between_steps(lambda: write(t)))
            except TransferError as error:
                raise TransferError(f"version {version}: {error}{self._torn()}") from error
            return await self._between_steps(finish)

    def _torn(self) -> str:
        return "; the weights are torn until a full update succeeds" if self._sampler.is_torn else ""

    async def truncate(self, keys: Sequence[GroupKey]) -> Lengths:
        found = await self._between_steps(lambda: self._sampler.truncate(keys))
        return self._mailbox.lengths(keys) | found

    async def abort(self, keys: Sequence[GroupKey]) -> Lengths:
        found = await self._between_steps(lambda: self._sampler.abort(keys))
        found = self._mailbox.lengths(keys) | found
        self._mailbox.close(keys, EngineError(f"groups {', '.join(map(str, keys))} were aborted"))
        return found

    async def hand_over(self, keys: Sequence[GroupKey]) -> list[Sampled]:
        moved = await self._between_steps(lambda: self._sampler.hand_over(keys))
        error = EngineError(f"groups {', '.join(map(str, keys))} were handed over")
        found = {s.request.key: s for s in [*self._mailbox.withdraw(keys, error), *moved]}
        return [found[k] for k in keys if k in found]

    async def score(self, sequences: Sequence[Pair]) -> tuple[Version, list[np.ndarray]]:
        def score() -> tuple[Version, list[np.ndarray]]:
            return self._sampler.version, self._sampler.score(sequences)

        try:
            async with asyncio.timeout(SCORE_S), self._still:
                pass  # what arrives in place is whole or torn after that
        except TimeoutError:
            raise EngineError(f"weights were still arriving after {SCORE_S:.0f} s; nothing was scored") from None
        return await self._refusing(score)

    async def sleep(self) -> None:
        await self._refusing(self._sampler.sleep)

    async def wake(self) -> None:
        await self._between_steps(self._sampler.wake)

    def stats(self) -> dict[str, Any]:
        s = self._sampler
        return {
            "running_groups": s.groups,
            "running_sequences": s.running,
            "waiting_sequences": s.waiting,
            "tokens": s.tokens,
            "version": str(self.version),
            "torn": float(s.is_torn),
            "engine_pids": [],
        }

    async def close(self) -> None:
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _refusing(self, action: Callable[[], T]) -> T:
        """``_between_steps``, whose ValueErrors are EngineErrors."""
        try:
            return await self._between_steps(action)
        except ValueError as error:
            raise EngineError(str(error)) from error

    async def _between_steps(self, action: Callable[[], T]) -> T:
        """Runs ``action`` in the decode thread. Raises what it raises, or EngineDead when the thread is gone."""
        if self._failure:
            raise self._failure
        command = _Command(action)
        self._commands.put(command)
        return await asyncio.wrap_future(command.done)

    def _run(self) -> None:
        if self._sampler.device.type == "cpu":
            torch.set_num_threads(1)  # OpenMP keeps the number per thread
        failure = EngineDead("the engine was closed")
        try:
            while self._obey():
                for result in self._sampler.step():
                    self._loop.call_soon_threadsafe(self._mailbox.fill, result)
        except Exception as error:
            log.exception("the decode thread died")
            failure = EngineDead(f"the decode thread died: {type(error).__name__}: {error}")
            failure.__cause__ = error
        self._failure = failure
        self._loop.call_soon_threadsafe(self._die, failure)

    def _obey(self) -> bool:
        """Carries out what is queued, waiting while there is nothing to decode. False: close."""
        while True:
            try:
                command = self._commands.get(block=not self._sampler.can_step)
            except queue.Empty:
                return True
            if command is None:
                return False
            command.carry_out()

    def _die(self, failure: EngineDead) -> None:
        """In the event loop, after the thread: nobody may go on waiting for it."""
        self._mailbox.close_all(failure)
        while not self._commands.empty():
            command = self._commands.get_nowait()
            if command:
                command.done.set_exception(failure)


class _Command:
    """Something to do between two steps, and a future of its result."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self.action = action
        self.done: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def carry_out(self) -> None:
        if not self.done.set_running_or_notify_cancel():
            return  # whoever asked has given up
        try:
            self.done.set_result(self.action())
        except Exception as error:
            self.done.set_exception(error)
