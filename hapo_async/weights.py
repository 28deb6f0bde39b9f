"""The weight stream: one sequence of buckets, a manifest with a digest per bucket, and a staging area that commits whole.

A transfer is a transaction: buckets, each with its header, then the manifest that commits them. A receiver takes buckets in
any order, each checked against its digest, and hands out tensors only when every bucket of the manifest is there. On any
failure the old version goes on serving. Nothing here knows how bytes travel; ``actors/transports`` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from hapo_async.checksum import METHOD, checksum
from hapo_async.types import Version

Data = np.ndarray | torch.Tensor
"""The bytes of a bucket: uint8 [nbytes] in host memory, or on a device where the transport moves those."""


class TransferError(RuntimeError):
    """A weight transfer that must not be applied: wrong digest, missing bucket, foreign manifest."""


@dataclass(frozen=True)
class TensorMeta:
    """One tensor inside a bucket. dtype: torch's name without the prefix, such as "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * getattr(torch, self.dtype).itemsize


@dataclass(frozen=True)
class Bucket:
    """A piece of the stream: tensors laid end to end as raw bytes, with the ``digest`` of those bytes."""

    index: int
    tensors: tuple[TensorMeta, ...]
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """What a version consists of. kind: full | delta | adapter; a delta names the version it is based on."""

    version: Version
    buckets: tuple[Bucket, ...]
    kind: str = "full"
    base: Version | None = None

    @property
    def nbytes(self) -> int:
        return sum(b.nbytes for b in self.buckets)


def pack(
    named: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int, on_device: bool = False
) -> Iterator[tuple[Bucket, Data]]:
    """Groups tensors into buckets of about ``bucket_bytes`` (a larger tensor gets a bucket of its own).

    Yields (bucket, uint8 [nbytes]); tensors are copied to host memory, or ``on_device`` stay where they are.
    """
    pending: list[tuple[TensorMeta, torch.Tensor]] = []
    size = index = 0
    for name, tensor in named:
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        raw = raw if on_device else raw.cpu()
        if pending and size + raw.nbytes > bucket_bytes:
            yield _seal(index, pending, on_device)
            pending, size, index = [], 0, index + 1
        pending.append((TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), raw))
        size += raw.nbytes
    if pending:
        yield _seal(index, pending, on_device)


def _seal(index: int, pending: list[tuple[TensorMeta, torch.Tensor]], on_device: bool) -> tuple[Bucket, Data]:
    joined = torch.cat([raw for _, raw in pending])
    data = joined if on_device else joined.numpy()
    return Bucket(index, tuple(meta for meta, _ in pending), data.nbytes, digest(data)), data


def digest(data: Data) -> str:
    """xxh3-128 of bytes in host memory, hexadecimal; of a tensor ``checksum``, with its method before it. It guards against
    corruption, not against an adversary."""
    if isinstance(data, torch.Tensor):
        return checksum(data)
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(data).data)


def _digest_like(data: Data, method: str) -> str:
    """The digest by a given method, wherever the bytes are."""
    if method == METHOD:
        return checksum(data if isinstance(data, torch.Tensor) else torch.from_numpy(_writable(data)))
    return digest(data.cpu().numpy() if isinstance(data, torch.Tensor) else data)


def _writable(data: np.ndarray) -> np.ndarray:
    return data if data.flags.writeable else data.copy()


def unpack(bucket: Bucket, data: Data) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one bucket, sharing memory with ``data`` where alignment allows it. Checks size and digest."""
    if data.nbytes != bucket.nbytes:
        raise TransferError(f"bucket {bucket.index}: {data.nbytes} bytes arrived, the manifest says {bucket.nbytes}")
    if (content := sum(meta.nbytes for meta in bucket.tensors)) != bucket.nbytes:
        raise TransferError(f"bucket {bucket.index}: its tensors take {content} bytes, its header says {bucket.nbytes}")
    if _digest_like(data, bucket.digest.rpartition(":")[0]) != bucket.digest:
        raise TransferError(f"bucket {bucket.index}: the digest does not match; the bytes were damaged on the way")
    flat = data if isinstance(data, torch.Tensor) else torch.from_numpy(_writable(data))
    offset = 0
    for meta in bucket.tensors:
        dtype = getattr(torch, meta.dtype)
        piece = flat[offset : offset + meta.nbytes]
        if piece.storage_offset() % dtype.itemsize:
            piece = piece.clone()
        yield meta.name, piece.view(dtype).reshape(meta.shape)
        offset += meta.nbytes


class Intake:
    """The receiving end of one version: every bucket is checked against its header, and the version is whole when what
    arrived is what the manifest says. Buckets may come in any order; a repeat must equal the first.

    write: gets the tensors of each bucket as it arrives (in place); without it they are kept until ``commit`` (staging).
    installed: what a delta would be applied to.
    """

    def __init__(
        self,
        version: Version,
        kind: str = "full",
        base: Version | None = None,
        installed: Version | None = None,
        write: Callable[[list[tuple[str, torch.Tensor]]], None] | None = None,
    ) -> None:
        if kind == "delta" and base != installed:
            raise TransferError(f"delta {version} is based on {base}, but {installed} is installed")
        self.version, self.kind = version, kind
        self._write = write
        self._headers: dict[int, Bucket] = {}
        self._tensors: dict[int, list[tuple[str, torch.Tensor]]] = {}

    def put(self, bucket: Bucket, data: Data) -> None:
        """Checks one bucket, then keeps or writes it. Raises TransferError."""
        tensors = list(unpack(bucket, data))
        known = self._headers.get(bucket.index)
        if known not in (None, bucket):
            raise TransferError(f"bucket {bucket.index} of {self.version} came twice, and not the same")
        if known is not None:
            return
        self._headers[bucket.index] = bucket
        if self._write is None:
            self._tensors[bucket.index] = tensors
        else:
            self._write(tensors)

    def commit(self, manifest: Manifest) -> list[tuple[str, torch.Tensor]]:
        """All staged tensors in stream order. Raises TransferError when anything is missing, extra or not what the manifest
        says."""
        if (manifest.version, manifest.kind) != (self.version, self.kind):
            raise TransferError(
                f"the manifest is of {manifest.kind} {manifest.version}; {self.kind} {self.version} was expected"
            )
        missing = [b.index for b in manifest.buckets if b.index not in self._headers]
        if missing:
            raise TransferError(f"version {manifest.version}: buckets {missing} never arrived")
        if [self._headers[i] for i in sorted(self._headers)] != list(manifest.buckets):
            raise TransferError(f"version {manifest.version}: the buckets that arrived are not those of the manifest")
        return [pair for index in sorted(self._tensors) for pair in self._tensors[index]]


def match_parameters(
    model: Any, tensors: Sequence[tuple[str, torch.Tensor]]
) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Pairs each tensor with its parameter. Raises ValueError for unknown or missing names and wrong shapes; a tied
    parameter may come under any of its names."""
    known = dict(model.named_parameters(remove_duplicate=False))
    pairs = []
    for name, tensor in tensors:
        if name not in known:
            raise ValueError(f"the model has no parameter {name!r}")
        if known[name].shape != tensor.shape:
            raise ValueError(f"parameter {name!r} has shape {tuple(known[name].shape)}; {tuple(tensor.shape)} arrived")
        pairs.append((known[name], tensor))
    given = {id(parameter) for parameter, _ in pairs}
    missing = [name for name, parameter in model.named_parameters() if id(parameter) not in given]
    if missing:
        raise ValueError(f"{len(missing)} parameters never arrived: {', '.join(missing[:5])}")
    return pairs
