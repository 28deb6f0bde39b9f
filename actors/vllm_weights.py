"""The weights of a vLLM engine: one version, or torn ones until a full update succeeds.

Tensors travel to vLLM's processes as a file in shared memory, for which ``actors.vllm_transfer`` is the receiving end, unless
those processes have received them themselves (``vllm_device``).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from actors import vllm_device
from hapo_async.engine import EngineDead, EngineError, check_manifest, check_version
from hapo_async.in_place import Source, Tensors, pour
from hapo_async.types import Version
from hapo_async.weights import Manifest, TransferError, match_parameters


def failure(llm: Any, what: str, error: BaseException) -> EngineError:
    """The error to raise for one of vLLM's: EngineDead once its processes are gone."""
    made = (EngineDead if llm.errored else EngineError)(f"{what}: {type(error).__name__}: {error}")
    made.__cause__ = error
    return made


class Weights:
    """llm: an AsyncLLM. skeleton: the model without storage, for checking names and shapes. recompute: what an update does
    with keys and values of running answers.

    still: whoever holds it changes the weights, or needs them not to change.
    """

    def __init__(self, llm: Any, skeleton: Any, recompute: bool) -> None:
        self.version = Version(0, 0)
        self.is_torn = False
        self.is_asleep = False
        self.recompute = recompute
        self.still = asyncio.Lock()
        self._llm = llm
        self._skeleton = skeleton
        self._is_labelled = False
        self._is_paused = False
        self._can_sleep = bool(llm.model_config.enable_sleep_mode)

    async def label(self) -> None:
        """vLLM calls the weights it started with "default"."""
        if not self._is_labelled:
            self._is_labelled = True
            await self._llm.update_weight_version(str(self.version))

    async def install(self, manifest: Manifest, staged: Tensors) -> float:
        """See ``Engine.install``."""
        check_manifest(manifest, self.version)
        try:
            match_parameters(self._skeleton, staged)
        except ValueError as error:
            raise TransferError(f"version {manifest.version}: {error}") from error
        with _folder() as folder:
            path = await asyncio.to_thread(_save, folder, staged)
            async with self.still, self._update(manifest.version):
                start = time.perf_counter()
                await self._begin()
                await self._load({"path": path})
                await self._finish(manifest.version)
        return time.perf_counter() - start

    async def install_in_place(self, version: Version, source: Source) -> float:
        """See ``Engine.install_in_place``. Each bucket has a file of its own, which goes as soon as it was read."""
        check_version(version, self.version)
        began: list[float] = []

        async def write(tensors: Tensors) -> None:
            if not began:
                began.append(time.perf_counter())
                await self._begin()
            with _folder() as folder:
                await self._load({"path": await asyncio.to_thread(_save, folder, tensors)})

        async with self.still, self._update(version):
            await pour(version, source, self._skeleton, write)
            await self._finish(version)
        return time.perf_counter() - began[0]

    async def install_received(self, manifest: Manifest) -> float:
        """Like ``install``, of a version that vLLM's processes have received themselves."""
        check_manifest(manifest, self.version)
        self._check_names(manifest)
        async with self.still, self._update(manifest.version):
            start = time.perf_counter()
            await self._begin()
            await self._load({"staged": str(manifest.version)})
            await self._finish(manifest.version)
        return time.perf_counter() - start

    async def receive_in_place(self, version: Version, request: dict[str, Any]) -> tuple[Manifest, float]:
        """Like ``install_in_place``, but vLLM's processes receive themselves; paused from the start, since they do nothing
        else meanwhile. request: see ``vllm_device.WorkerReceiver``."""
        check_version(version, self.version)
        async with self.still, self._update(version):
            start = time.perf_counter()
            await self._begin()
            await self._load({"offer": request})
            manifest = await vllm_device.arrived(self._llm)
            assert manifest is not None
            self._check_names(manifest)
            await self._finish(version)
        return manifest, time.perf_counter() - start

    def _check_names(self, manifest: Manifest) -> None:
        shapes = [(t.name, torch.empty(t.shape, device="meta")) for b in manifest.buckets for t in b.tensors]
        try:
            match_parameters(self._skeleton, shapes)
        except ValueError as error:
            raise TransferError(f"version {manifest.version}: {error}") from error

    @contextlib.asynccontextmanager
    async def _update(self, version: Version) -> AsyncIterator[None]:
        """Whatever happens inside, vLLM goes on sampling after it, or is torn and stays paused."""
        try:
            yield
        except Exception as error:
            state = "they are torn until a full update succeeds" if self.is_torn else "the old ones serve on"
            if self._llm.errored:
                raise failure(self._llm, f"vLLM died while it loaded version {version}", error) from error
            raise TransferError(f"vLLM could not load the weights of version {version} ({error}); {state}") from error
        finally:
            if self._is_paused and not self.is_torn and not self._llm.errored:
                self._is_paused = False
                await self._llm.resume_generation()

    async def _begin(self) -> None:
        """An engine that sleeps on a GPU is paused already, without a cache, and goes on sleeping."""
        if self.is_asleep and self._can_sleep:
            await self._llm.wake_up(tags=["weights"])
        else:
            self._is_paused = True
            await self._llm.pause_generation(mode="keep", clear_cache=self.recompute)
        if self.is_torn:
            await self._llm.collective_rpc("abandon_weight_update")
        self.is_torn = True
        await self._llm.start_weight_update()

    async def _load(self, update: dict[str, Any]) -> None:
        """update: see ``actors.vllm_transfer.FileUpdate``."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=update))

    async def _finish(self, version: Version) -> None:
        await self._llm.finish_weight_update(weight_version=str(version))
        self.version, self.is_torn = version, False

    async def sleep(self) -> None:
        """On GPUs weights go to host memory and the KV cache is dropped. On CPUs vLLM cannot sleep: nothing is freed. The
        caller holds ``still``."""
        if self._can_sleep and not self.is_asleep:
            await self._llm.sleep(level=1, mode="keep")
        self.is_asleep = True

    async def wake(self) -> None:
        """The caller holds ``still``."""
        if self._can_sleep and self.is_asleep:
            await self._llm.wake_up()
            if self.is_torn:  # waking resumes, but nothing may be sampled from these weights
                self._is_paused = True
                await self._llm.pause_generation(mode="keep", clear_cache=True)
        self.is_asleep = False


def _save(folder: str, tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    path = str(Path(folder) / "weights.safetensors")
    save_file(dict(tensors), path)
    return path


def _memory() -> str | None:
    """A memory file system where there is one; None is the usual temporary folder."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # noqa: S108


def _prefix() -> str:
    """Of this host's folders, as far as process ids are told apart: containers may share a memory file system."""
    namespace = Path("/proc/self/ns/pid")
    return f"hapo-{namespace.stat().st_ino if namespace.exists() else 0}-"


@contextlib.contextmanager
def _folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix=f"{_prefix()}{os.getpid()}-", dir=_memory()) as folder:
        yield folder


def sweep() -> None:
    """Removes what generators left in memory that were killed while they installed."""
    for folder in Path(_memory() or tempfile.gettempdir()).glob(f"{_prefix()}*-*"):
        owner = folder.name.removeprefix(_prefix()).partition("-")[0]
        if owner.isdigit() and not psutil.pid_exists(int(owner)):
            shutil.rmtree(folder, ignore_errors=True)
