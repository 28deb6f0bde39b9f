"""Frames between the pool and its workers: four bytes of length, then JSON. Nothing is ever unpickled."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

MAX_FRAME_BYTES = 256 << 20
_HEADER = struct.Struct(">I")


def encode(message: Any) -> bytes:
    """One frame. What JSON does not know (dates, decimals, numpy numbers) travels as text."""
    body = json.dumps(message, default=str).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes exceeds the limit of {MAX_FRAME_BYTES}")
    return _HEADER.pack(len(body)) + body


class Decoder:
    """Collects bytes and gives back whole messages."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that ``data`` completes. Raises ValueError for a frame that is too large or not JSON."""
        self._buffer += data
        out = []
        offset = 0
        while len(self._buffer) - offset >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer, offset)
            if length > MAX_FRAME_BYTES:
                raise ValueError(f"a frame of {length} bytes exceeds the limit of {MAX_FRAME_BYTES}")
            end = offset + _HEADER.size + length
            if len(self._buffer) < end:
                break
            out.append(json.loads(self._buffer[offset + _HEADER.size : end]))
            offset = end
        del self._buffer[:offset]
        return out


def write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
