"""What the zmq transport puts on a socket: a checked msgpack header, and after that of a chunk a raw frame.

A receiver asks, the learner's server answers:

    where                       -> port: of this receiver's own socket; asked at the door
    more(token, after)          -> buckets: headers from number ``after`` on, once there is one; or end
    chunk(token, index, offset) -> chunk, and a frame of CHUNK bytes or what is left; index MANIFEST: of the manifest
    done(token)                 -> nothing
                                   refused(why), in place of any answer

``token`` names one transfer of one version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgpack

from actors.transports.wire import (
    HEX,
    MAX_BUCKET,
    MAX_BUCKETS,
    MAX_MANIFEST,
    Check,
    array,
    check_bucket,
    check_fields,
    integer,
    show,
    text,
    unpack,
)
from actors.transports.wire import MAX_HEADER as MAX_BUCKET_HEADER
from hapo_async.weights import TransferError

CHUNK = 2 << 20
"""Bytes of a raw frame, at most: a large bucket travels in pieces, so that no frame needs much memory or time."""
WINDOW = 8
"""Chunks that a receiver asks for ahead."""
MANIFEST = -1

MAX_REQUEST = 4096
MAX_HEADER = 2 * MAX_BUCKET_HEADER
MAX_FRAME = max(MAX_HEADER, CHUNK) + 4096
"""CURVE adds a few bytes to each frame."""

Message = dict[str, Any]
"""``op``, and its fields as REQUESTS and REPLIES list them."""

_count = integer(0, MAX_BUCKETS)
_place: Mapping[str, Check] = {
    "token": HEX,
    "index": integer(MANIFEST, MAX_BUCKETS - 1),
    "offset": integer(0, MAX_BUCKET),
}
REQUESTS: Mapping[str, Mapping[str, Check]] = {
    "where": {},
    "more": {"token": HEX, "after": _count},
    "chunk": _place,
    "done": {"token": HEX},
}
REPLIES: Mapping[str, Mapping[str, Check]] = {
    "port": {"port": integer(1, 65535)},
    "buckets": {"token": HEX, "after": _count, "buckets": array(check_bucket, MAX_BUCKETS)},
    "chunk": _place,
    "end": {"token": HEX, "count": _count, "nbytes": integer(1, MAX_MANIFEST), "digest": HEX},
    "refused": {"why": text(".{0,1000}")},
}


def encode(op: str, **fields: Any) -> bytes:
    """One header."""
    return bytes(msgpack.packb({"op": op, **fields}))


def refusal(why: object) -> bytes:
    return encode("refused", why=str(why)[:1000])


def decode(raw: bytes, known: Mapping[str, Mapping[str, Check]]) -> Message:
    """A header as one of the ``known`` ops (REQUESTS, REPLIES). Raises TransferError for anything else."""
    fields = unpack(raw, MAX_HEADER)
    op = fields.pop("op", None) if isinstance(fields, dict) else None
    if not isinstance(op, str) or op not in known:
        raise TransferError(f"unknown message {show(op)}")
    return {"op": op, **check_fields(fields, known[op])}
