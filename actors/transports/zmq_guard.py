"""Bounds what the peers of a listening socket cost while no message comes of it.

libzmq hands a message over when its last frame is there, counts queues in whole messages and limits the size of a frame, not
their number: a peer that is let in could send frames of one message for ever, and they would all be kept. So the bytes that
the kernel received on each connection are compared with what the messages that came of it may have taken; who is far ahead
loses its connection, and libzmq frees what was kept. Connections of one socket are bounded too: strangers who open them and
say nothing would use up this process's descriptors until libzmq's handshake gives up on them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
import time
from dataclasses import dataclass
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

log = logging.getLogger(__name__)

SLACK = 1 << 20
"""Bytes that a connection may be ahead: more than a full queue of honest requests."""
PER_MESSAGE = 8192
PER_SECOND = 4096
"""Bytes that a message may have taken, and that heartbeats may take."""
MOST_CONNECTIONS = 64
LOOK_S = 0.1
"""How soon after the last look the next one is due: what comes in between is what an endless message can cost."""

_TCP_INFO, _RECEIVED_AT = getattr(socket, "TCP_INFO", 11), 128
_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED


@dataclass
class _Peer:
    """A connection: since when (``time.monotonic``), and messages that came of it."""

    since: float
    messages: int = 0


class Guard:
    """Watches one socket from before it listens, in the thread that it belongs to. monitor: readable when somebody came or
    left; ``follow`` takes that in. port: the one that it listens on, once it does."""

    def __init__(self, bound: zmq.Socket[bytes]) -> None:
        self._bound = bound
        self.port = 0
        self.monitor: zmq.Socket[Any] = bound.get_monitor_socket(_EVENTS)
        self._peers: dict[int, _Peer] = {}  # by descriptor, oldest first
        self._next = 0.0

    @property
    def connections(self) -> int:
        return len(self._peers)

    def heard(self, frame: zmq.Frame) -> None:
        """A message came that this frame belongs to."""
        peer = self._peers.get(int(frame.get(zmq.SRCFD)))
        if peer is not None:
            peer.messages += 1

    def look(self) -> None:
        """Ends connections that are far ahead, and the least talkative ones where there are too many."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK_S
        received: dict[int, int] = {}
        for number, peer in list(self._peers.items()):
            nbytes = self._ask(number, end=False)
            if nbytes is None:
                del self._peers[number]
                continue
            received[number] = nbytes
            if nbytes > SLACK + PER_MESSAGE * peer.messages + PER_SECOND * (now - peer.since):
                log.warning("a receiver of weights sent %d bytes without a request in them: it is cut off", nbytes)
                self._end(number)
        silent = sorted(self._peers, key=lambda number: received[number])
        for number in silent[: max(0, len(self._peers) - MOST_CONNECTIONS)]:
            self._end(number)

    def close(self) -> None:
        """Before the socket is closed."""
        with contextlib.suppress(zmq.ZMQError):
            self._bound.disable_monitor()
        self.monitor.close(linger=0)

    def follow(self) -> None:
        """Takes in who came and who left."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            self._peers.pop(event["value"], None)
            if event["event"] == zmq.EVENT_ACCEPTED:
                self._peers[event["value"]] = _Peer(time.monotonic())

    def _end(self, number: int) -> None:
        self._ask(number, end=True)
        self._peers.pop(number, None)

    def _ask(self, number: int, end: bool) -> int | None:
        """Bytes received on a connection, None where the descriptor is none of this socket's any more. end: it is shut down."""
        copy = -1
        try:
            copy = os.dup(number)  # libzmq's thread may close it at any moment: what is looked at and ended is this one
            connection = socket.socket(fileno=copy)
        except OSError:  # closed, or somebody else's by now: a file, a pipe
            if copy >= 0:
                os.close(copy)
            return None
        with connection:
            try:
                if connection.getsockname()[1] != self.port or not connection.getpeername():
                    return None
                about = connection.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _RECEIVED_AT + 8)
                if end:
                    connection.shutdown(socket.SHUT_RDWR)
            except (OSError, IndexError, TypeError):
                return None
            return int(struct.unpack_from("Q", about, _RECEIVED_AT)[0]) if len(about) >= _RECEIVED_AT + 8 else 0
