"""The versions that the zmq sender keeps in host memory for receivers to fetch: two at most.

They are the newest committed one and beside it either the one that is filling up or, while somebody still reads it, the
one before.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors.transports import wire, zmq_wire
from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest, TransferError, digest

MAX_GONE = 16


@dataclass(eq=False)
class Transfer:
    """One version, sent once. header_bytes: how long each bucket's header is."""

    version: Version
    kind: str
    token: str = field(default_factory=lambda: secrets.token_hex(16))
    buckets: list[Bucket] = field(default_factory=list)
    header_bytes: list[int] = field(default_factory=list)
    data: list[np.ndarray] = field(default_factory=list)
    manifest: np.ndarray | None = None
    digest: str = ""

    def add(self, bucket: Bucket, data: np.ndarray) -> None:
        if bucket.index != len(self.data) or bucket.nbytes != data.nbytes:
            raise TransferError(f"bucket {bucket.index} with {data.nbytes} bytes is not the next one of {self.version}")
        self.header_bytes.append(len(wire.encode_bucket(bucket)))
        self.buckets.append(bucket)
        self.data.append(data)

    def commit(self, manifest: Manifest, raw: bytes) -> None:
        if (manifest.version, manifest.kind) != (self.version, self.kind):
            raise TransferError(
                f"the manifest is of {manifest.kind} {manifest.version}; {self.kind} {self.version} was sent"
            )
        if list(manifest.buckets) != self.buckets:
            raise TransferError(f"the manifest of {self.version} does not list the buckets that were sent")
        self.manifest = np.frombuffer(raw, np.uint8)
        self.digest = digest(self.manifest)

    def page(self, after: int) -> list[list[Any]]:
        """Headers of buckets from number ``after`` on, as many as one answer holds."""
        size, end = 0, after
        while end < len(self.buckets):
            size += self.header_bytes[end]
            if size > zmq_wire.MAX_HEADER - zmq_wire.MAX_REQUEST:
                break
            end += 1
        return [wire.bucket_row(bucket) for bucket in self.buckets[after:end]]

    def chunk(self, index: int, offset: int) -> np.ndarray:
        """uint8 [<= zmq_wire.CHUNK], not copied."""
        data = self.manifest if index == zmq_wire.MANIFEST else self.data[index] if index < len(self.data) else None
        if data is None or offset >= data.nbytes or offset % zmq_wire.CHUNK:
            raise TransferError(f"bucket {index} of {self.version} has nothing at byte {offset}")
        return data[offset : offset + zmq_wire.CHUNK]


class Shelf:
    """is_read: whether anybody is in the middle of fetching the transfer with this token."""

    def __init__(self, is_read: Callable[[str], bool]) -> None:
        self._is_read = is_read
        self._open: Transfer | None = None
        self._newest: Transfer | None = None
        self._older: Transfer | None = None
        self._gone: dict[str, str] = {}

    def open(self, version: Version, kind: str) -> Transfer:
        self.fail(f"{version} came in its place")
        self._open = Transfer(version, kind)
        return self._open

    def begin(self, version: Version, kind: str) -> None:
        """Makes room: only the newest version stays beside the one that is now to be filled."""
        transfer = self._open
        if transfer is None or (transfer.version, transfer.kind) != (version, kind) or transfer.data:
            self.open(version, kind)
        self._drop_older(f"the learner sends {version} now")

    def filling(self) -> Transfer:
        if self._open is None:
            raise TransferError("no transfer is open")
        return self._open

    def commit(self, manifest: Manifest, raw: bytes) -> Transfer:
        transfer = self.filling()
        transfer.commit(manifest, raw)
        self._older, self._newest, self._open = self._newest, transfer, None
        self.tidy()
        return transfer

    def fail(self, why: str) -> None:
        """Ends the open transfer, if there is one."""
        transfer, self._open = self._open, None
        if transfer is not None:
            self._note(transfer, f"the learner gave up sending {transfer.version}: {why}")

    def tidy(self) -> None:
        """Lets the version before the newest go when nobody reads it any more."""
        if self._older and self._newest and not self._is_read(self._older.token):
            self._drop_older(f"{self._newest.version} is the newest")

    def find(self, token: str) -> Transfer:
        """Raises TransferError that says why the transfer is gone."""
        for transfer in self._kept():
            if transfer.token == token:
                return transfer
        raise TransferError(self._gone.get(token, "the learner knows no such transfer"))

    def held(self) -> tuple[int, int]:
        """(versions, bytes) in memory."""
        sizes = [sum(d.nbytes for d in t.data) for t in self._kept() if t.data]
        return len(sizes), sum(sizes)

    def _kept(self) -> list[Transfer]:
        return [t for t in (self._open, self._newest, self._older) if t is not None]

    def _drop_older(self, why: str) -> None:
        transfer, self._older = self._older, None
        if transfer is not None:
            self._note(transfer, f"{transfer.version} is no longer kept: {why}")

    def _note(self, transfer: Transfer, why: str) -> None:
        self._gone[transfer.token] = why[:900]
        while len(self._gone) > MAX_GONE:
            del self._gone[next(iter(self._gone))]
