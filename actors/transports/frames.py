"""What travels through a group: frames of four int64 (magic, kind, length, checksum) and a body, and buckets' bytes."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
import xxhash

from actors.transports import group, lines, wire
from hapo_async.types import Version
from hapo_async.weights import TransferError

BEGIN, BUCKET, COMMIT, ABORT = 1, 2, 3, 4
MAGIC = 0x6861706F


def title(version: Version, kind: str) -> bytes:
    """The body of BEGIN."""
    return f"{version} {kind}".encode()


def head(kind: int, body: bytes) -> torch.Tensor:
    return torch.tensor([MAGIC, kind, len(body), checksum(body)], dtype=torch.int64)


def checksum(body: bytes) -> int:
    """xxh3-64, as a signed number."""
    return int.from_bytes(xxhash.xxh3_64_digest(body), "big", signed=True)


@dataclass
class Seat:
    """A place in one epoch, kept from version to version."""

    token: str
    line: lines.Line
    cancelled: threading.Event
    device: torch.device
    group: group.Group | None = None

    @property
    def on_device(self) -> bool:
        return self.device.type != "cpu"

    def frame(self, deadline: float) -> tuple[int, bytes]:
        """The next frame's kind and body. Raises TransferError for one that is damaged."""
        if self.cancelled.is_set():
            raise TransferError("cancelled")
        head = torch.empty(4, dtype=torch.int64, device=self.device)
        magic, kind, length, expected = self._fill(head, deadline).tolist()
        if magic != MAGIC or kind not in (BEGIN, BUCKET, COMMIT, ABORT) or not 0 < length <= wire.MAX_MANIFEST:
            raise TransferError("what arrived is no frame")
        body = bytes(self.take(length, deadline).cpu().numpy())
        if checksum(body) != expected:
            raise TransferError("a header was damaged on the way")
        return kind, body

    def take(self, nbytes: int, deadline: float) -> torch.Tensor:
        """uint8 [nbytes] on this seat's device."""
        data = torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        return self._fill(data, deadline) if nbytes else data

    def _fill(self, data: torch.Tensor, deadline: float) -> torch.Tensor:
        assert self.group is not None
        work = self.group.broadcast(data, deadline)
        why = lines.settle(work.is_completed, deadline, self._trouble)
        if why:
            raise TransferError(why)
        work.wait()
        return data

    def _trouble(self, nap: float) -> str:
        if self.cancelled.is_set():
            raise TransferError("cancelled")
        return "" if self.line.is_up(nap) else "the learner gave up, or is gone"

    def leave(self, why: str) -> None:
        self.line.close(why)
        if self.group is not None:
            self.group.leave()
            self.group = None
