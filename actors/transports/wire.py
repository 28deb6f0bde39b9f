"""Headers of buckets and manifests as msgpack, every field of them checked before anybody uses it. Nothing is unpickled."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgpack
import torch

from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest, TensorMeta, TransferError

MAX_HEADER = 2 << 20
"""Bytes of a bucket's header."""
MAX_MANIFEST = 64 << 20
MAX_BUCKET = 16 << 30
MAX_BUCKETS = 1 << 20
MAX_TENSORS = 1 << 16
MAX_DIMENSIONS = 8
MAX_SIZE = 1 << 48
MAX_NAME = 512

KINDS = ("full", "delta", "adapter")
_FLOATS = (
    "float64",
    "float32",
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
)
_INTEGERS = ("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool")
DTYPES = frozenset(name for name in _FLOATS + _INTEGERS if isinstance(getattr(torch, name, None), torch.dtype))
"""What a tensor of the stream may be made of."""

Check = Callable[[Any], Any]
"""Returns a field as it is used. Raises TransferError."""


def encode_bucket(bucket: Bucket) -> bytes:
    """Raises TransferError for a header that no receiver would take."""
    raw = bytes(msgpack.packb(bucket_row(bucket)))
    if len(raw) > MAX_HEADER or decode_bucket(raw) != bucket:
        raise TransferError(f"the header of bucket {bucket.index}, {len(raw)} bytes, cannot be sent")
    return raw


def decode_bucket(raw: bytes | memoryview) -> Bucket:
    """Raises TransferError for bytes that are no header, or one whose sizes contradict each other."""
    return check_bucket(unpack(raw, MAX_HEADER))


def encode_manifest(manifest: Manifest) -> bytes:
    """Of buckets that ``encode_bucket`` took. Raises TransferError for a manifest that no receiver would take."""
    base = None if manifest.base is None else list(manifest.base)
    fields: dict[str, Any] = {"version": list(manifest.version), "kind": manifest.kind, "base": base, "buckets": []}
    check_fields(fields, _MANIFEST)
    raw = bytes(msgpack.packb({**fields, "buckets": [bucket_row(b) for b in manifest.buckets]}))
    if len(raw) > MAX_MANIFEST or len(manifest.buckets) > MAX_BUCKETS:
        raise TransferError(f"the manifest of {manifest.version}, {len(raw)} bytes, cannot be sent")
    return raw


def decode_manifest(raw: bytes | memoryview) -> Manifest:
    """Raises TransferError for bytes that are no manifest, or one whose buckets are not numbered 0, 1, 2 and so on."""
    fields = check_fields(unpack(raw, MAX_MANIFEST), _MANIFEST)
    buckets = tuple(fields.pop("buckets"))
    if [b.index for b in buckets] != list(range(len(buckets))):
        raise TransferError("the manifest's buckets are not in order")
    return Manifest(buckets=buckets, **fields)


def unpack(raw: bytes | memoryview, limit: int) -> Any:
    """Plain data. Raises TransferError for more than ``limit`` bytes, or what is not msgpack."""
    if len(raw) > limit:
        raise TransferError(f"{len(raw)} bytes where {limit} are allowed")
    try:
        return msgpack.unpackb(raw)
    except Exception as error:  # msgpack's own errors share no base class
        raise TransferError(f"not msgpack: {error}"[:200]) from error


def check_fields(fields: Any, checks: Mapping[str, Check]) -> dict[str, Any]:
    """Exactly the fields that ``checks`` names, each as its check returns it. Raises TransferError."""
    if not isinstance(fields, dict) or fields.keys() != checks.keys():
        raise TransferError(f"a map of {', '.join(sorted(checks))} was expected")
    return {name: check(fields[name]) for name, check in checks.items()}


def integer(low: int, high: int) -> Check:
    def check(value: Any) -> int:
        if type(value) is not int or not low <= value <= high:
            raise TransferError(f"{show(value)} is not an integer in [{low}, {high}]")
        return value

    return check


def text(pattern: str) -> Check:
    """For text that the whole pattern matches."""
    compiled = re.compile(pattern, re.DOTALL)

    def check(value: Any) -> str:
        if not isinstance(value, str) or not compiled.fullmatch(value):
            raise TransferError(f"{show(value)} is not a text like {pattern}")
        return value

    return check


def array(item: Check, at_most: int) -> Check:
    def check(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) > at_most:
            raise TransferError(f"{show(value)} is not a list of at most {at_most}")
        return [item(x) for x in value]

    return check


def row(*items: Check) -> Check:
    def check(value: Any) -> list[Any]:
        if not isinstance(value, list) or len(value) != len(items):
            raise TransferError(f"{show(value)} is not a list of {len(items)}")
        return [item(x) for item, x in zip(items, value, strict=True)]

    return check


def show(value: Any) -> str:
    """For messages; bounded, however large the value is."""
    return repr(value)[:60] if isinstance(value, str | int | float | bytes | None) else f"a {type(value).__name__}"


def bucket_row(bucket: Bucket) -> list[Any]:
    """A bucket's header as plain data, which ``check_bucket`` takes."""
    return [bucket.index, bucket.nbytes, bucket.digest, [[t.name, t.dtype, list(t.shape)] for t in bucket.tensors]]


def check_bucket(value: Any) -> Bucket:
    """Raises TransferError."""
    index, nbytes, digest, tensors = _BUCKET(value)
    bucket = Bucket(index, tuple(TensorMeta(n, d, tuple(s)) for n, d, s in tensors), nbytes, digest)
    inside = sum(t.nbytes for t in bucket.tensors)
    if inside != nbytes:
        raise TransferError(f"bucket {index} has {nbytes} bytes, but its tensors have {inside}")
    return bucket


def _dtype(value: Any) -> str:
    if not isinstance(value, str) or value not in DTYPES:
        raise TransferError(f"{show(value)} is not a dtype that weights may have")
    return value


def _version(value: Any) -> Version:
    return Version(*_VERSION(value))


def _base(value: Any) -> Version | None:
    return None if value is None else _version(value)


HEX = text("[0-9a-f]{32}")
_DIGEST = text("([a-z0-9]{1,16}:)?[0-9a-f]{32}")
_TENSOR = row(text(f".{{1,{MAX_NAME}}}"), _dtype, array(integer(0, MAX_SIZE), MAX_DIMENSIONS))
_BUCKET = row(integer(0, MAX_BUCKETS - 1), integer(0, MAX_BUCKET), _DIGEST, array(_TENSOR, MAX_TENSORS))
_VERSION = row(integer(0, MAX_SIZE), integer(0, MAX_SIZE))
_MANIFEST: Mapping[str, Check] = {
    "version": _version,
    "kind": text("|".join(KINDS)),
    "base": _base,
    "buckets": array(check_bucket, MAX_BUCKETS),
}
