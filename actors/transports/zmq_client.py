"""A generator's end of the zmq transport: one fetch of one version, over connections that are never rebuilt.

Whatever is not as it should be, a wrong key, a lost connection, a message that was not asked for, ends the fetch with
TransferError; whoever wants the version asks for it again, from the beginning.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zmq
from zmq.utils.monitor import recv_monitor_message

from actors.transports import wire, zmq_wire
from actors.transports.base import Offer, Put
from hapo_async.weights import Bucket, Manifest, TransferError, digest

STEP_S = 0.1
"""How soon a fetch that waits sees that it was cancelled."""
HANDSHAKE_S = 30.0
HEARTBEAT_S, SILENCE_S = 2.0, 20.0
FAREWELL_S = 0.5
"""How long a finished fetch may take to say so; the learner then knows at once that the version can go."""

_DETAIL: Mapping[str, wire.Check] = {
    "door": wire.text(r"tcp://[0-9a-fA-F.:\[\]]+:[0-9]{1,5}"),
    "server_key": wire.text(r"[\x21-\x7e]{40}"),
    "token": wire.HEX,
}
_TROUBLE = {
    zmq.EVENT_HANDSHAKE_FAILED_AUTH: "the learner refuses this receiver's key: it is not a member's",
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: "who answers does not have the learner's key",
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: "who answers does not have the learner's key, or refuses this receiver's",
    zmq.EVENT_DISCONNECTED: "the connection to the learner was lost",
    zmq.EVENT_CLOSED: "nobody listens at the learner's address",
}


class Chunk(NamedTuple):
    bucket: int
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Address:
    """Where a transfer is fetched and with which keys (z85)."""

    door: str
    server_key: str
    token: str

    @classmethod
    def of(cls, offer: Offer) -> Address:
        if offer.transport != "zmq":
            raise TransferError(f"an offer for {offer.transport} reached the zmq receiver")
        return cls(**wire.check_fields(offer.detail, _DETAIL))


class Patience:
    """Until when a fetch waits."""

    def __init__(self, deadline: float) -> None:
        self._deadline = deadline
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def step_ms(self) -> int:
        """How long to wait before asking again. Raises TransferError when it is over."""
        left_s = self._deadline - time.monotonic()
        if self._cancelled.is_set():
            raise TransferError("the fetch was cancelled")
        if left_s <= 0:
            raise TransferError("the version did not arrive before the deadline")
        return int(1000 * min(left_s, STEP_S)) + 1


class Link:
    """One connection to one socket of the learner. keys: (public, secret) of this receiver, z85."""

    def __init__(
        self, context: zmq.Context[Any], endpoint: str, server_key: str, keys: tuple[bytes, bytes], patience: Patience
    ) -> None:
        self._patience = patience
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IPV6, int("[" in endpoint))
        self._socket.setsockopt(zmq.MAXMSGSIZE, zmq_wire.MAX_FRAME)
        # Room for all that is asked for: a full queue would stop heartbeats from being seen.
        self._socket.setsockopt(zmq.RCVHWM, 4 * (zmq_wire.WINDOW + 2))
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.CONNECT_TIMEOUT, int(1000 * HANDSHAKE_S))
        self._socket.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * HANDSHAKE_S))
        self._socket.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * HEARTBEAT_S))
        self._socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * SILENCE_S))
        self._socket.curve_serverkey = server_key.encode()
        self._socket.curve_publickey, self._socket.curve_secretkey = keys
        self._monitor = self._socket.get_monitor_socket(sum(_TROUBLE))
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._socket.connect(endpoint)

    def ask(self, op: str, **fields: Any) -> None:
        try:
            self._socket.send(zmq_wire.encode(op, **fields), zmq.NOBLOCK)
        except zmq.Again as error:
            raise TransferError(self._trouble()) from error

    def hear(self) -> zmq_wire.Message:
        """The next answer; that of a chunk is followed by ``read``. Raises TransferError: cancelled, too late, refused, lost."""
        while True:
            ready = dict(self._poller.poll(self._patience.step_ms()))
            if self._socket in ready:
                break
            if self._monitor in ready:
                raise TransferError(self._trouble())
        message = zmq_wire.decode(self._socket.recv(zmq.NOBLOCK), zmq_wire.REPLIES)
        if message["op"] == "refused":
            raise TransferError(f"the learner refuses: {message['why']}")
        if self._socket.getsockopt(zmq.RCVMORE) != (message["op"] == "chunk"):
            raise TransferError(f"{message['op']} came with the wrong number of frames")
        return message

    def _trouble(self) -> str:
        """What became of the connection."""
        known = self._monitor.poll(int(1000 * STEP_S))
        return _TROUBLE[recv_monitor_message(self._monitor)["event"] if known else zmq.EVENT_DISCONNECTED]

    def read(self, into: memoryview) -> None:
        """The frame of a chunk, straight into its place."""
        size = self._socket.recv_into(into, flags=zmq.NOBLOCK)
        if size != len(into) or self._socket.getsockopt(zmq.RCVMORE):
            raise TransferError(f"a chunk of {size} bytes came; {len(into)} were asked for")

    def close(self, linger_ms: int = 0) -> None:
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=linger_ms)


class Fetch:
    """One version on its way. ``run`` is called once; ``cancel`` from any thread."""

    def __init__(self, offer: Offer, deadline: float, put: Put, keys: tuple[bytes, bytes]) -> None:
        self._offer, self._put, self._keys = offer, put, keys
        self._address = Address.of(offer)
        self._patience = Patience(deadline)
        self._buckets: list[Bucket] = []
        self._manifest: Manifest | None = None
        self._wanted: deque[Chunk] = deque()
        self._asked: deque[Chunk] = deque()
        self._buffers: dict[int, np.ndarray] = {}
        self._end: zmq_wire.Message | None = None

    def cancel(self) -> None:
        self._patience.cancel()

    def run(self) -> Manifest:
        """Raises TransferError."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            link = self._link(context, self._endpoint(context))
            manifest = self._collect(link)
            link.ask("done", token=self._address.token)
            link.close(int(1000 * FAREWELL_S))
            return manifest
        except zmq.ZMQError as error:
            raise TransferError(f"the connection to the learner failed: {error}") from error
        finally:
            context.destroy(linger=0)

    def _link(self, context: zmq.Context[Any], endpoint: str) -> Link:
        return Link(context, endpoint, self._address.server_key, self._keys, self._patience)

    def _endpoint(self, context: zmq.Context[Any]) -> str:
        """Asks at the door for this receiver's own port."""
        door = self._link(context, self._address.door)
        door.ask("where")
        answer = door.hear()
        door.close()
        if answer["op"] != "port":
            raise TransferError(f"{answer['op']} came where a port was asked for")
        return f"{self._address.door.rpartition(':')[0]}:{answer['port']}"

    def _collect(self, link: Link) -> Manifest:
        token = self._address.token
        link.ask("more", token=token, after=0)
        while self._manifest is None:
            while self._wanted and len(self._asked) < zmq_wire.WINDOW:
                chunk = self._wanted.popleft()
                self._asked.append(chunk)
                link.ask("chunk", token=token, index=chunk.bucket, offset=chunk.offset)
            answer = link.hear()
            if answer.get("token") != token:
                raise TransferError(f"{answer['op']} came that is of another transfer")
            if answer["op"] == "chunk":
                self._take_chunk(link, answer)
            elif self._end is not None:
                raise TransferError(f"{answer['op']} came after the end")
            elif answer["op"] == "buckets":
                self._take_headers(answer)
                link.ask("more", token=token, after=len(self._buckets))
            else:
                self._take_end(answer)
        return self._manifest

    def _take_headers(self, answer: zmq_wire.Message) -> None:
        first, new = answer["after"], answer["buckets"]
        indices = list(range(len(self._buckets), len(self._buckets) + len(new)))
        if not new or first != len(self._buckets) or [b.index for b in new] != indices:
            raise TransferError(
                f"headers of buckets {[b.index for b in new][:8]} came; number {len(self._buckets)} is next"
            )
        self._buckets += new
        for bucket in new:
            self._want(bucket.index, bucket.nbytes)

    def _take_end(self, answer: zmq_wire.Message) -> None:
        if answer["count"] != len(self._buckets):
            raise TransferError(f"there are {answer['count']} buckets, but headers of {len(self._buckets)} came")
        self._end = answer
        self._want(zmq_wire.MANIFEST, answer["nbytes"])

    def _want(self, index: int, nbytes: int) -> None:
        offsets = range(0, nbytes, zmq_wire.CHUNK)
        self._wanted += [Chunk(index, at, min(zmq_wire.CHUNK, nbytes - at)) for at in offsets]
        if not nbytes:
            self._complete(index, np.empty(0, np.uint8))

    def _take_chunk(self, link: Link, answer: zmq_wire.Message) -> None:
        """Answers come in the order of the questions, so one that does not fit means that another was lost."""
        chunk = self._asked.popleft() if self._asked else None
        if chunk is None or (chunk.bucket, chunk.offset) != (answer["index"], answer["offset"]):
            raise TransferError(
                f"bucket {answer['index']} came where {chunk} was due: a chunk was lost, repeated or moved"
            )
        if chunk.offset == 0:
            self._buffers[chunk.bucket] = np.empty(self._size(chunk.bucket), np.uint8)
        buffer = self._buffers[chunk.bucket]
        end = chunk.offset + chunk.nbytes
        link.read(buffer[chunk.offset : end].data)
        if end == buffer.nbytes:
            self._complete(chunk.bucket, self._buffers.pop(chunk.bucket))

    def _size(self, index: int) -> int:
        if index == zmq_wire.MANIFEST:
            assert self._end is not None
            return int(self._end["nbytes"])
        return self._buckets[index].nbytes

    def _complete(self, index: int, data: np.ndarray) -> None:
        if index != zmq_wire.MANIFEST:
            self._put(self._buckets[index], data)
            return
        assert self._end is not None
        if digest(data) != self._end["digest"]:
            raise TransferError("the manifest was damaged on the way")
        manifest = wire.decode_manifest(data.data)
        if (manifest.version, manifest.kind) != (self._offer.version, self._offer.kind):
            raise TransferError(
                f"the manifest is of {manifest.kind} {manifest.version}; {self._offer.version} was offered"
            )
        if manifest.buckets != tuple(self._buckets) or self._offer.manifest not in (None, manifest):
            raise TransferError(f"the manifest of {manifest.version} is not that of the buckets that came")
        self._manifest = manifest
