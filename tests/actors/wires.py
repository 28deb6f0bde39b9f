"""A wire between two ends of a TCP connection that can be listened to, changed and slowed down, for tests of transports."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator

HOST = "127.0.0.1"

Change = Callable[[bytes, int], bytes]
"""What becomes of a piece of the stream that begins at this byte of its direction."""


class Wire:
    """Listens on a port of its own and passes on what comes to ``port``. upstream, downstream: change what the one who
    connected says, and what it is told. rate: bytes per second upstream. heard: all that connections said, oldest first."""

    def __init__(
        self, host: str, port: int, upstream: Change | None = None, downstream: Change | None = None, rate: float = 0.0
    ) -> None:
        self._target = (host, port)
        self._changes, self._rate = (upstream, downstream), rate
        self._listener = socket.create_server((host, 0))
        self.port: int = self._listener.getsockname()[1]
        self.heard: list[bytearray] = []
        self._open: list[socket.socket] = [self._listener]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(self._target)
                said = bytearray()
                self.heard.append(said)
                self._open += [near, far]
                threading.Thread(target=self._carry, args=(near, far, said), daemon=True).start()

    def _carry(self, near: socket.socket, far: socket.socket, said: bytearray) -> None:
        passed = [0, 0]
        with contextlib.suppress(OSError):
            while True:
                ready, _, _ = select.select([near, far], [], [], 1.0)
                for one in ready:
                    way = int(one is far)
                    data = one.recv(65536)
                    if not data:
                        return self._end(near, far)
                    if way == 0:
                        said += data
                        time.sleep(len(data) / self._rate if self._rate else 0.0)
                    change = self._changes[way]
                    changed = change(data, passed[way]) if change else data
                    passed[way] += len(data)
                    (near if one is far else far).sendall(changed)
        return self._end(near, far)

    def _end(self, *ends: socket.socket) -> None:
        for end in ends:
            end.close()

    def close(self) -> None:
        for one in self._open:
            one.close()


def talk(port: int, *pieces: bytes, pause_s: float = 0.0) -> socket.socket:
    """A stranger who has connected and said this."""
    stranger = socket.create_connection((HOST, port), timeout=5)
    with contextlib.suppress(OSError):
        for piece in pieces:
            stranger.sendall(piece)
            time.sleep(pause_s)
    return stranger


@contextlib.contextmanager
def crowd(port: int, count: int, *pieces: bytes) -> Iterator[list[socket.socket]]:
    """Many of them, who stay."""
    strangers = [talk(port, *pieces) for _ in range(count)]
    try:
        yield strangers
    finally:
        for stranger in strangers:
            stranger.close()
