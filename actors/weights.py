"""How weights leave the learner: one walk over all parameters in buckets, taken by every rank, and a sink on rank 0.

Under ZeRO-3 each stretch of the walk is a collective. A rank that left it early would leave the others waiting in an
all-gather for ever, so a failing sink is remembered and the walk goes on to its end; only then is the failure raised.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch

from actors.transports import Published, Sender
from hapo_async import lora
from hapo_async.types import Version
from hapo_async.weights import Bucket, Data, Manifest, TransferError, pack


class Gatherer(Protocol):
    """The side of a training backend that the walk needs; see ``actors.zero.ZeroBackend``."""

    rank: int

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]: ...

    def gathered(self, parameters: list[torch.nn.Parameter]) -> contextlib.AbstractContextManager[None]: ...


class AdapterView:
    """The LoRA adapter of a backend without its frozen weights, under the names that peft saves it by."""

    def __init__(self, backend: Gatherer) -> None:
        self._backend, self.rank, self.gathered = backend, backend.rank, backend.gathered

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return lora.streamed(self._backend.named_parameters())


Sink = Callable[[Bucket, Data], None]


def publish(
    gatherer: Gatherer, version: Version, bucket_bytes: int, sender: Sender | None, kind: str = "full"
) -> Published | None:
    """Walks the weights and sends them. A collective; sender: on rank 0, None elsewhere. None on the other ranks.

    A transfer that fails is a result: the learner is as well as before.
    """
    began = time.monotonic()

    def send(bucket: Bucket, data: Data) -> None:
        assert sender is not None
        if bucket.index == 0:  # here, so that a failure does not keep this rank from the walk
            sender.begin(version, kind)
        sender.send(bucket, data)

    try:
        buckets = stream(gatherer, bucket_bytes, send, sender is not None and sender.on_device)
        if buckets is None or sender is None:
            return None
        manifest = Manifest(version, tuple(buckets), kind)
        return Published(sender.commit(manifest), "", manifest.nbytes, time.monotonic() - began)
    except TransferError as error:
        assert sender is not None
        with contextlib.suppress(TransferError):  # it may be what has failed
            sender.abort(str(error))
        return Published(None, str(error), 0, time.monotonic() - began)


def stream(gatherer: Gatherer, bucket_bytes: int, sink: Sink, on_device: bool = False) -> list[Bucket] | None:
    """Walks all weights; on rank 0 hands every bucket to ``sink``, in host memory or ``on_device`` where the parameters are,
    and returns what the buckets hold, elsewhere None.

    Raises what the sink raised, after the walk's end.
    """
    tensors = walk(gatherer, bucket_bytes)
    if gatherer.rank != 0:
        _drain(tensors)
        return None
    buckets = []
    try:
        for bucket, data in pack(tensors, bucket_bytes, on_device):
            sink(bucket, data)
            buckets.append(bucket)
    finally:
        _drain(tensors)
    return buckets


def walk(gatherer: Gatherer, stretch_bytes: int) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, whole tensor) of every parameter, tied ones once, gathered a stretch at a time. A collective.

    A tensor may be freed once the walk has passed on: copy what must last (``weights.pack`` does).
    """
    for part in stretches(gatherer.named_parameters(), stretch_bytes):
        with gatherer.gathered([parameter for _, parameter in part]):
            for name, parameter in part:
                yield name, parameter.detach()


def stretches(
    named: Iterable[tuple[str, torch.nn.Parameter]], stretch_bytes: int
) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
    """Parameters in runs of about ``stretch_bytes``; the same cuts on every rank, partitioned or not."""
    part: list[tuple[str, torch.nn.Parameter]] = []
    size = 0
    for name, parameter in named:
        nbytes = whole_numel(parameter) * parameter.element_size()
        if part and size + nbytes > stretch_bytes:
            yield part
            part, size = [], 0
        part.append((name, parameter))
        size += nbytes
    if part:
        yield part


def whole_numel(parameter: torch.nn.Parameter) -> int:
    """Elements of the whole parameter: under ZeRO-3 a rank's own share is smaller."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _drain(tensors: Iterator[tuple[str, torch.Tensor]]) -> None:
    for _ in tensors:
        pass
