"""Weights between processes that share a GPU: the learner keeps the newest version in its device memory, and receivers read it
through CUDA IPC handles, each bucket into memory of their own.

The buffers live as long as the sender and are written again by the next version, so a bucket is checked after it was
copied: who comes too late finds a digest that does not match. A receiver on another GPU cannot open the handles.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from actors.transports.base import Data, Member, Offer, Put
from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest, TransferError

Handle = list[Any]
"""What ``torch.UntypedStorage._new_shared_cuda`` takes after the device: integers, bytes and a boolean."""


@dataclass
class _Buffer:
    """data: uint8 [N]. handle: of the memory it lies in. None of both: nothing yet."""

    data: torch.Tensor
    handle: Handle


class IpcSender:
    """Rank 0's end. It holds one version in device memory, from the first one on."""

    is_broken = False
    on_device = True

    def __init__(self, address: str, deadline_s: float) -> None:
        self._buffers: dict[int, _Buffer] = {}
        self._sent: list[Bucket] = []

    def announce(self, version: Version, kind: str, members: Sequence[Member]) -> Offer | None:
        return None

    def admit(self, members: Sequence[Member]) -> None:
        pass  # an offer is all that it takes

    def begin(self, version: Version, kind: str) -> None:
        self._sent = []

    def send(self, bucket: Bucket, data: Data) -> None:
        if not isinstance(data, torch.Tensor) or data.device.type != "cuda":
            raise TransferError("ipc sends what lies on a GPU; this learner's weights do not")
        buffer = self._buffers.get(bucket.index)
        if buffer is None or len(buffer.data) != bucket.nbytes:
            copy = torch.empty_like(data)
            self._buffers[bucket.index] = buffer = _Buffer(copy, _export(copy))
        buffer.data.copy_(data)
        self._sent.append(bucket)

    def commit(self, manifest: Manifest) -> Offer:
        torch.cuda.synchronize()
        index = torch.cuda.current_device()
        handles = {str(bucket.index): self._buffers[bucket.index].handle for bucket in self._sent}
        detail = {"gpu": _uuid(index), "handles": handles}
        return Offer("ipc", manifest.version, manifest.kind, None, manifest, detail)

    def abort(self, why: str) -> None:
        self._sent = []

    def close(self) -> None:
        self._buffers.clear()


class IpcReceiver:
    """A generator's end. device: the GPU's name in this process."""

    key = ""

    def __init__(self, device: str = "cuda") -> None:
        self._device = device
        self._mapped: dict[bytes, torch.Tensor] = {}  # by handle; a mapping is opened once
        self._cancelled = threading.Event()

    def receive(self, offer: Offer, deadline: float, put: Put) -> Manifest:
        assert offer.manifest is not None
        self._cancelled.clear()
        index = torch.device(self._device).index or 0
        torch.cuda.set_device(index)
        if _uuid(index) != offer.detail["gpu"]:
            raise TransferError(f"ipc: the learner's weights are on GPU {offer.detail['gpu']}, this is {_uuid(index)}")
        handles: dict[str, Handle] = offer.detail["handles"]
        used = {_name(handle) for handle in handles.values()}
        self._mapped = {name: data for name, data in self._mapped.items() if name in used}
        for bucket in offer.manifest.buckets:
            if self._cancelled.is_set() or time.monotonic() >= deadline:
                raise TransferError(f"version {offer.version}: bucket {bucket.index} was not there in time")
            data = self._map(handles[str(bucket.index)], index)[: bucket.nbytes].clone()
            torch.cuda.current_stream().synchronize()
            put(bucket, data)
        return offer.manifest

    def _map(self, handle: Handle, index: int) -> torch.Tensor:
        name = _name(handle)
        if name not in self._mapped:
            try:
                storage = torch.UntypedStorage._new_shared_cuda(index, *handle)
            except RuntimeError as error:
                raise TransferError(f"ipc: the learner's memory cannot be opened: {error}") from error
            self._mapped[name] = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return self._mapped[name]

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self.cancel()


def _export(data: torch.Tensor) -> Handle:
    """Plain data that another process opens ``data``'s storage with."""
    return list(data.untyped_storage()._share_cuda_())[1:]


def _name(handle: Handle) -> bytes:
    """The memory, and where in it the storage starts."""
    return bytes(handle[0]) + int(handle[2]).to_bytes(8, "big")


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
