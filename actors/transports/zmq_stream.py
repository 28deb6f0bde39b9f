"""The ``zmq`` transport: rank 0 keeps versions in host memory, and generators fetch them over encrypted sockets.

    learner, rank 0                                          generator
    announce -> Offer(door, server key, token) -----------> receive: asks for headers, then for chunks, a window ahead
    send(bucket): in memory, and at once there to fetch ---> put(bucket), as soon as it is whole
    commit: the manifest can be fetched too ----------------> returns it; says that it is done

Nothing the learner calls waits for a receiver. A version can be fetched until the next one is committed and nobody reads it
any more; two are kept at most. Both ends know each other by CURVE keys: the learner's comes with the offer, a member's by
way of ``announce`` and ``admit``. Keys live as long as their objects and are written nowhere.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import torch
import zmq

from actors.transports import wire
from actors.transports.base import Data, Member, Offer, Put
from actors.transports.zmq_client import Fetch
from actors.transports.zmq_server import Server
from actors.transports.zmq_shelf import Transfer
from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest, TransferError

CLOSE_S = 2.0


class ZmqSender:
    """Rank 0's end. address: IP of this node. deadline_s: how long anything may take; a receiver that has asked for nothing
    for so long does not keep an older version in memory."""

    on_device = False

    def __init__(self, address: str, deadline_s: float) -> None:
        self._deadline_s = deadline_s
        self._server = Server(address, lease_s=deadline_s)

    def announce(self, version: Version, kind: str, members: Sequence[Member]) -> Offer | None:
        server = self._server
        transfer = server.call(lambda: server.announce(version, kind, members), self._deadline_s)
        return self._offer(transfer, None)

    def admit(self, members: Sequence[Member]) -> None:
        self._server.call(lambda: self._server.admit(members), self._deadline_s)

    def begin(self, version: Version, kind: str) -> None:
        self._server.call(lambda: self._server.begin(version, kind), self._deadline_s)

    def send(self, bucket: Bucket, data: Data) -> None:
        """Keeps ``data`` where it is host memory: it must not be written to any more."""
        raw = _host(data)
        self._server.call(lambda: self._server.add(bucket, raw), self._deadline_s)

    def commit(self, manifest: Manifest) -> Offer:
        raw = wire.encode_manifest(manifest)
        transfer = self._server.call(lambda: self._server.commit(manifest, raw), self._deadline_s)
        return self._offer(transfer, manifest)

    def abort(self, why: str) -> None:
        self._server.call(lambda: self._server.fail(why), self._deadline_s)

    @property
    def is_broken(self) -> bool:
        return self._server.has_ended

    def held(self) -> tuple[int, int]:
        """(versions, bytes) in host memory."""
        return self._server.call(self._server.held, self._deadline_s)

    def close(self) -> None:
        self._server.close()

    def _offer(self, transfer: Transfer, manifest: Manifest | None) -> Offer:
        """For anybody: whom the learner does not know has no key to fetch it with."""
        server_key = self._server.public_key.decode()
        detail = {"door": self._server.door, "server_key": server_key, "token": transfer.token}
        return Offer("zmq", transfer.version, transfer.kind, None, manifest, detail)


class ZmqReceiver:
    """A generator's end; its keys last as long as it does. Every fetch has its own context, threads and sockets."""

    def __init__(self) -> None:
        self._keys = zmq.curve_keypair()
        self.key = self._keys[0].decode()
        self._running: set[Fetch] = set()
        self._changed = threading.Condition()
        self._closed = False

    def receive(self, offer: Offer, deadline: float, put: Put) -> Manifest:
        fetch = Fetch(offer, deadline, put, self._keys)
        with self._changed:
            if self._closed:
                raise TransferError("this receiver is closed")
            self._running.add(fetch)
        try:
            return fetch.run()
        finally:
            with self._changed:
                self._running.discard(fetch)
                self._changed.notify_all()

    def cancel(self) -> None:
        with self._changed:
            for fetch in self._running:
                fetch.cancel()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            for fetch in self._running:
                fetch.cancel()
            self._changed.wait_for(lambda: not self._running, CLOSE_S)


def _host(data: Data) -> np.ndarray:
    """uint8 [nbytes] in host memory."""
    if isinstance(data, torch.Tensor):
        data = data.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
