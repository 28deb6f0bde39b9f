"""The weight stream: one sequence of buckets, a manifest with a digest per bucket, and a staging area that commits whole.

A transfer is a transaction: manifest -> buckets -> commit. A receiver stages buckets in any order, each checked against
its digest, and hands out tensors only when every bucket is there. On any failure the old version goes on serving.
Nothing here knows how bytes travel; ``actors/weights.py`` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xxhash

from hapo_async.types import Version


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
    """A piece of the stream: tensors laid end to end as raw bytes, with the xxh3-128 digest of those bytes."""

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


def pack(named: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int) -> Iterator[tuple[Bucket, np.ndarray]]:
    """Groups tensors into buckets of about ``bucket_bytes`` (a larger tensor gets a bucket of its own).

    Yields (bucket, uint8 [nbytes]); tensors are copied to host memory.
    """
    pending: list[tuple[TensorMeta, np.ndarray]] = []
    size = index = 0
    for name, tensor in named:
        raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        if pending and size + raw.nbytes > bucket_bytes:
            yield _seal(index, pending)
            pending, size, index = [], 0, index + 1
        pending.append((TensorMeta(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)), raw))
        size += raw.nbytes
    if pending:
        yield _seal(index, pending)


def _seal(index: int, pending: list[tuple[TensorMeta, np.ndarray]]) -> tuple[Bucket, np.ndarray]:
    data = np.concatenate([raw for _, raw in pending])
    return Bucket(index, tuple(meta for meta, _ in pending), data.nbytes, digest(data)), data


def digest(data: np.ndarray) -> str:
    """xxh3-128 of the bytes, hexadecimal. It guards against corruption, not against an adversary."""
    return xxhash.xxh3_128_hexdigest(np.ascontiguousarray(data).data)


def unpack(bucket: Bucket, data: np.ndarray) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of one bucket, sharing memory with ``data`` where alignment allows it. Checks size and digest."""
    if data.nbytes != bucket.nbytes:
        raise TransferError(f"bucket {bucket.index}: {data.nbytes} bytes arrived, the manifest says {bucket.nbytes}")
    if digest(data) != bucket.digest:
        raise TransferError(f"bucket {bucket.index}: the digest does not match; the bytes were damaged on the way")
    flat = torch.from_numpy(data if data.flags.writeable else data.copy())
    offset = 0
    for meta in bucket.tensors:
        dtype = getattr(torch, meta.dtype)
        piece = flat[offset : offset + meta.nbytes]
        if piece.storage_offset() % dtype.itemsize:
            piece = piece.clone()
        yield meta.name, piece.view(dtype).reshape(meta.shape)
        offset += meta.nbytes


class Staging:
    """A receiver's second copy. Buckets may arrive in any order; a repeat must equal the first."""

    def __init__(self, manifest: Manifest, installed: Version | None = None) -> None:
        if manifest.kind == "delta" and manifest.base != installed:
            raise TransferError(f"delta {manifest.version} is based on {manifest.base}, but {installed} is installed")
        self.manifest = manifest
        self._tensors: dict[int, list[tuple[str, torch.Tensor]]] = {}

    def put(self, index: int, data: np.ndarray) -> None:
        """Checks and keeps one bucket. Raises TransferError."""
        if not 0 <= index < len(self.manifest.buckets):
            raise TransferError(f"bucket {index} is not in the manifest of {self.manifest.version}")
        self._tensors[index] = list(unpack(self.manifest.buckets[index], data))

    def commit(self) -> list[tuple[str, torch.Tensor]]:
        """All tensors in stream order. Raises TransferError when a bucket is missing."""
        missing = [b.index for b in self.manifest.buckets if b.index not in self._tensors]
        if missing:
            raise TransferError(f"version {self.manifest.version}: buckets {missing} never arrived")
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
