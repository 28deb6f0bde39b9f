"""The learner's end of the zmq transport: a thread that answers receivers, so that none of them can hold up the walk.

Each member has a ROUTER socket of its own on a random port, beside one that only tells a member its port (the door). A
member's socket has its own queue, lets in its own CURVE key and no other, and closing it ends that member's connection and
frees what was queued for it. It is a ROUTER because that refuses to queue more where other sockets would wait. Receivers
ask for every chunk, a few ahead: a request acknowledges what came before it, and one who stops asking costs its queue.
"""

from __future__ import annotations

import contextlib
import ipaddress
import itertools
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import zmq
from zmq.utils import z85

from actors.transports import zmq_wire
from actors.transports.base import Member
from actors.transports.zmq_guard import LOOK_S, Guard
from actors.transports.zmq_shelf import Shelf, Transfer
from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest, TransferError

log = logging.getLogger(__name__)
T = TypeVar("T")

ZAP = "inproc://zeromq.zap.01"
DOOR = "door"
TICK_S = 0.5
HANDSHAKE_S = 10.0
"""Until then a connection has shown its key."""
HEARTBEAT_S, SILENCE_S = 2.0, 20.0
"""A ping this often; a peer that is silent for that long has lost its connection, which frees what was queued for it."""
MAX_PARKED = 4
MAX_IO_THREADS = 4


@dataclass(eq=False)
class Seat:
    """A member and its socket. parked: peers that wait for more buckets, each with its token and how many it has."""

    member: Member
    socket: zmq.Socket[bytes]
    guard: Guard
    domain: str
    port: int
    fetching: str = ""
    seen: float = 0.0
    parked: dict[bytes, tuple[str, int]] = field(default_factory=dict)


class Server:
    """Owns the sockets and the versions; only its thread touches them. Others use ``call``, with a method of the middle part.

    address: IP of this node. lease_s: how long a receiver that asks for nothing still counts as one that fetches.
    Raises ValueError for a wildcard address, TransferError where it cannot listen.
    """

    def __init__(self, address: str, lease_s: float) -> None:
        if ipaddress.ip_address(address).is_unspecified:
            raise ValueError(f"weights are served on one address of this node, not on the wildcard {address}")
        self._host = f"[{address}]" if ":" in address else address
        self._lease_s = lease_s
        self.public_key, self._secret_key = zmq.curve_keypair()
        self.door = ""
        self._pid = os.getpid()
        self._seats: dict[str, Seat] = {}
        self._numbers = itertools.count()
        self._shelf = Shelf(self._is_read)
        self._calls: queue.Queue[tuple[Callable[[], Any], Future[Any]]] = queue.Queue(64)
        self._bell, self._ear = socket.socketpair()
        self._bell.setblocking(False)
        self._stopping = self._ended = False
        self._failure = ""
        self._thread = threading.Thread(target=self._run, name="weights-zmq", daemon=True)
        self._thread.start()
        try:
            self.call(lambda: None, 10.0)
        except TransferError:
            self.close()
            raise

    # For other threads

    def call(self, function: Callable[[], T], timeout_s: float) -> T:
        """Runs ``function`` in the server's thread. Raises what it raises; TransferError where that thread is gone or slow."""
        if os.getpid() != self._pid:
            raise TransferError("this zmq sender belongs to the process that it was forked from")
        result: Future[T] = Future()
        try:
            self._calls.put((function, result), timeout=timeout_s)
            self._ring()
            if self._ended:
                self._refuse_calls()
            return result.result(timeout_s)
        except (queue.Full, TimeoutError) as error:
            raise TransferError(f"the zmq server did not answer within {timeout_s:.0f} s") from error
        except zmq.ZMQError as error:
            raise TransferError(f"the zmq server: {error}") from error

    @property
    def has_ended(self) -> bool:
        return self._ended

    def close(self, timeout_s: float = 5.0) -> None:
        """Ends the thread and its sockets."""
        if os.getpid() != self._pid:
            return
        self._stopping = True
        self._ring()
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            log.error("the zmq server's thread did not end within %.0f s", timeout_s)
            return
        self._bell.close()
        self._ear.close()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # it rings already, or is closed
            self._bell.send(b"\0")

    # What the sender asks for, in the server's thread

    def announce(self, version: Version, kind: str, members: Sequence[Member]) -> Transfer:
        """Opens a transfer for these members; others lose their sockets, but for those in the middle of a fetch."""
        names = {m.name for m in members}
        for seat in list(self._seats.values()):
            if seat.member.name not in names and not self._reads(seat, seat.fetching):
                self._leave(seat)
        self.admit(members)
        transfer = self._shelf.open(version, kind)
        self._answer_parked()
        return transfer

    def admit(self, members: Sequence[Member]) -> None:
        for member in members:
            seat = self._seats.get(member.name)
            if seat is not None and seat.member == member:
                continue
            if seat is not None:
                self._leave(seat)
            domain = f"seat-{next(self._numbers)}"
            # libzmq counts what a peer has taken in halves of the queue: this many never refuses an honest window.
            bound, guard, port = self._bind(domain, queued=4 * (zmq_wire.WINDOW + 2))
            self._seats[member.name] = Seat(member, bound, guard, domain, port)

    def begin(self, version: Version, kind: str) -> None:
        self._shelf.begin(version, kind)
        self._answer_parked()

    def add(self, bucket: Bucket, data: np.ndarray) -> None:
        self._shelf.filling().add(bucket, data)
        self._answer_parked()

    def commit(self, manifest: Manifest, raw: bytes) -> Transfer:
        transfer = self._shelf.commit(manifest, raw)
        self._answer_parked()
        return transfer

    def fail(self, why: str) -> None:
        self._shelf.fail(why)
        self._answer_parked()

    def held(self) -> tuple[int, int]:
        return self._shelf.held()

    def _leave(self, seat: Seat) -> None:
        del self._seats[seat.member.name]
        self._poller.unregister(seat.socket)
        self._poller.unregister(seat.guard.monitor)
        seat.guard.close()
        seat.socket.close(linger=0)

    def _is_read(self, token: str) -> bool:
        return any(self._reads(seat, token) for seat in self._seats.values())

    def _reads(self, seat: Seat, token: str) -> bool:
        return token != "" and seat.fetching == token and time.monotonic() - seat.seen < self._lease_s

    # The loop

    def _run(self) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(min(MAX_IO_THREADS, os.cpu_count() or 1))
        try:
            self._poller = zmq.Poller()
            self._poller.register(self._ear, zmq.POLLIN)
            self._zap = self._context.socket(zmq.REP)
            self._zap.bind(ZAP)
            self._poller.register(self._zap, zmq.POLLIN)
            self._door, self._door_guard, port = self._bind(DOOR, queued=64)
            self.door = f"tcp://{self._host}:{port}"
            while not self._stopping:
                self._turn()
        except Exception as error:
            self._failure = f": {error}"
            log.exception("the zmq server has ended")
        finally:
            self._ended = True
            self._context.destroy(linger=0)
            self._refuse_calls()
            self._shelf = Shelf(self._is_read)

    def _turn(self) -> None:
        guards = self._guards()
        connected = any(guard.connections for guard in guards.values())
        for source, _ in self._poller.poll(int(1000 * (LOOK_S if connected else TICK_S))):
            if source == self._ear.fileno():
                self._ear.recv(4096)
                self._run_calls()
            elif source is self._zap:
                self._authorise()
            elif source.closed:
                continue
            elif source in guards:
                guards[source].follow()
            else:
                self._take(source)
        for guard in self._guards().values():
            guard.look()
        self._shelf.tidy()

    def _guards(self) -> dict[Any, Guard]:
        """By their monitors."""
        return {guard.monitor: guard for guard in (self._door_guard, *(seat.guard for seat in self._seats.values()))}

    def _run_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                function, result = self._calls.get_nowait()
                try:
                    result.set_result(function())
                except Exception as error:  # the caller's
                    result.set_exception(error)

    def _refuse_calls(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                self._calls.get_nowait()[1].set_exception(TransferError(f"the zmq server has ended{self._failure}"))

    def _bind(self, domain: str, queued: int) -> tuple[zmq.Socket[bytes], Guard, int]:
        """A listening socket, who watches it, and its port. queued: answers that may wait for one peer."""
        bound = self._context.socket(zmq.ROUTER)
        bound.setsockopt(zmq.LINGER, 0)
        bound.setsockopt(zmq.IPV6, int(":" in self._host))
        bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
        bound.setsockopt(zmq.SNDHWM, queued)
        bound.setsockopt(zmq.RCVHWM, 8 * zmq_wire.WINDOW)
        bound.setsockopt(zmq.MAXMSGSIZE, zmq_wire.MAX_REQUEST)
        bound.setsockopt(zmq.HANDSHAKE_IVL, int(1000 * HANDSHAKE_S))
        bound.setsockopt(zmq.HEARTBEAT_IVL, int(1000 * HEARTBEAT_S))
        bound.setsockopt(zmq.HEARTBEAT_TIMEOUT, int(1000 * SILENCE_S))
        bound.setsockopt(zmq.CURVE_SERVER, 1)
        bound.setsockopt(zmq.CURVE_SECRETKEY, self._secret_key)
        bound.setsockopt(zmq.ZAP_DOMAIN, domain.encode())
        bound.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
        guard = Guard(bound)
        bound.bind(f"tcp://{self._host}:*")
        guard.port = int(bound.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])
        self._poller.register(bound, zmq.POLLIN)
        self._poller.register(guard.monitor, zmq.POLLIN)
        return bound, guard, guard.port

    def _authorise(self) -> None:
        """Answers a question of libzmq (ZeroMQ RFC 27): may the owner of this key talk to this socket?"""
        version, request, domain, address, _, mechanism, *credentials = self._zap.recv_multipart()
        keys = {s.member.key for s in self._seats.values() if domain.decode() in (DOOR, s.domain)} - {""}
        key = z85.encode(credentials[0]).decode() if mechanism == b"CURVE" else ""
        if key in keys:
            self._zap.send_multipart([version, request, b"200", b"OK", key.encode(), b""])
            return
        log.warning("weights were asked for from %s with a key that is not a member's", address.decode())
        self._zap.send_multipart([version, request, b"400", b"not a member", b"", b""])

    # What receivers ask for

    def _take(self, source: zmq.Socket[bytes]) -> None:
        """Answers a few requests that came in on one socket."""
        seat = next((s for s in self._seats.values() if s.socket is source), None)
        guard = self._door_guard if seat is None else seat.guard
        for _ in range(2 * zmq_wire.WINDOW):
            try:
                peer, frames = _receive(source)
            except zmq.Again:
                return
            if frames:
                guard.heard(frames[0])
            try:
                if len(frames) != 1:
                    raise TransferError("a request has one frame")
                request = zmq_wire.decode(frames[0].bytes, zmq_wire.REQUESTS)
                if seat is None:
                    self._tell_port(peer, request, str(frames[0].get("User-Id")))
                else:
                    self._serve(seat, peer, request)
            except TransferError as error:
                self._reply(source, peer, zmq_wire.refusal(error))

    def _tell_port(self, peer: bytes, request: zmq_wire.Message, key: str) -> None:
        port = next((s.port for s in self._seats.values() if s.member.key == key), None)
        if request["op"] != "where" or port is None:
            raise TransferError("this is where members learn their port")
        self._reply(self._door, peer, zmq_wire.encode("port", port=port))

    def _serve(self, seat: Seat, peer: bytes, request: zmq_wire.Message) -> None:
        op, token = request["op"], request.get("token", "")
        if op == "done":
            seat.fetching = "" if seat.fetching == token else seat.fetching
            return
        transfer = self._shelf.find(token)
        seat.fetching, seat.seen = token, time.monotonic()
        if op == "chunk":
            place = {"token": token, "index": request["index"], "offset": request["offset"]}
            data = transfer.chunk(place["index"], place["offset"])
            self._reply(seat.socket, peer, zmq_wire.encode("chunk", **place), data)
        elif op == "more":
            seat.parked.pop(peer, None)
            if not self._answer_more(seat, peer, transfer, request["after"]):
                seat.parked[peer] = (token, request["after"])
                while len(seat.parked) > MAX_PARKED:
                    del seat.parked[next(iter(seat.parked))]
        else:
            raise TransferError(f"{op} is not asked here")

    def _answer_more(self, seat: Seat, peer: bytes, transfer: Transfer, after: int) -> bool:
        token, count = transfer.token, len(transfer.data)
        if after > count:
            raise TransferError(f"{after} buckets of {transfer.version}? There are {count}")
        if after < count:
            header = zmq_wire.encode("buckets", token=token, after=after, buckets=transfer.page(after))
        elif transfer.manifest is not None:
            size = transfer.manifest.nbytes
            header = zmq_wire.encode("end", token=token, count=count, nbytes=size, digest=transfer.digest)
        else:
            return False
        self._reply(seat.socket, peer, header)
        return True

    def _answer_parked(self) -> None:
        for seat in self._seats.values():
            for peer, (token, after) in list(seat.parked.items()):
                try:
                    answered = self._answer_more(seat, peer, self._shelf.find(token), after)
                except TransferError as error:
                    answered = True
                    self._reply(seat.socket, peer, zmq_wire.refusal(error))
                if answered:
                    del seat.parked[peer]

    def _reply(self, source: zmq.Socket[bytes], peer: bytes, header: bytes, data: np.ndarray | None = None) -> None:
        """Queues an answer; drops it where the peer is gone, or asks for more than it takes.

        The chunk is copied: what waits in queues then pins no bucket, and is freed with the socket.
        """
        parts: list[Any] = [peer, header] if data is None else [peer, header, data]
        try:
            source.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.debug("an answer was dropped: %s", error)


def _receive(source: zmq.Socket[bytes]) -> tuple[bytes, list[zmq.Frame]]:
    """One message: who sent it, and its first frames. Raises zmq.Again."""
    peer = source.recv(zmq.NOBLOCK)
    frames: list[zmq.Frame] = []
    while source.getsockopt(zmq.RCVMORE):
        frame = source.recv(zmq.NOBLOCK, copy=False)
        if len(frames) < 2:
            frames.append(frame)
    return peer, frames
