"""A line from each member of an epoch to the learner: a socket that says nothing while all is well.

A collective alone notices a process that died only at its deadline. The kernel closes a dead process's line at once, and
whoever leaves for a reason says it on the line first. What travels: the hello (token and rank, of fixed length), one byte
back for "go", and at most the reason.
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable

REASON_BYTES = 500
GRACE_S = 0.5  # how long what was sent before the other end hung up may take to arrive
NAP_S = 0.2  # how long a wait lasts that somebody may want to end early
TOKEN_CHARS = 32
HELLO_BYTES = TOKEN_CHARS + 8
GONE = "its process is gone"
_GO = b"+"


def new_token() -> str:
    return secrets.token_hex(TOKEN_CHARS // 2)


class Exchange:
    """The learner's ends. It listens on ``address`` alone."""

    def __init__(self, address: str, token: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._token = token
        self._listener = socket.create_server((address, 0), family=family)
        self._callers: dict[socket.socket, bytes] = {}  # and what they have said of their hello
        self._lines: dict[int, socket.socket] = {}
        self.port: int = self._listener.getsockname()[1]

    def gather(self, ranks: Iterable[int], deadline: float) -> set[int]:
        """Waits for the hellos of ``ranks``: those that did not come by the deadline. Ends at once when a line is lost."""
        missing = set(ranks)
        while missing and (left := deadline - time.monotonic()) > 0 and not self.lost(0.0):
            for one in _readable([self._listener, *self._callers], min(NAP_S, left)):
                if one is self._listener:
                    with contextlib.suppress(OSError):
                        self._callers[self._listener.accept()[0]] = b""
                else:
                    self._hear(one, missing)
        return missing

    def _hear(self, caller: socket.socket, missing: set[int]) -> None:
        said = self._callers.pop(caller)
        more = _read(caller, HELLO_BYTES - len(said))
        said += more
        if more and len(said) < HELLO_BYTES:
            self._callers[caller] = said
            return
        token, rank = said[:TOKEN_CHARS], said[TOKEN_CHARS:]
        if hmac.compare_digest(token, self._token.encode()) and rank.isdigit() and int(rank) in missing:
            missing.remove(int(rank))
            self._lines[int(rank)] = caller
        else:
            caller.close()

    def go(self) -> None:
        """All are there: nobody else is let in."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send(_GO)
        for one in (self._listener, *self._callers):
            one.close()

    def lost(self, nap: float) -> dict[int, str]:
        """Members whose line closed within ``nap`` seconds, and what they said."""
        if not self._lines:
            time.sleep(nap)
            return {}
        ready = _readable(self._lines.values(), nap)
        return {rank: _words(line) for rank, line in self._lines.items() if line in ready}

    def hang_up(self, within_s: float) -> dict[int, str]:
        """Tells the members that it is over, and listens for their last words; frozen ones say nothing."""
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.shutdown(socket.SHUT_WR)
        until = time.monotonic() + within_s
        while len(words := self.lost(0.0)) < len(self._lines) and time.monotonic() < until:
            time.sleep(0.01)
        return words

    def close(self) -> None:
        for one in (self._listener, *self._callers, *self._lines.values()):
            one.close()


class Line:
    """A member's end. Raises OSError when nobody listens."""

    def __init__(self, address: str, port: int, token: str, rank: int, timeout_s: float) -> None:
        self._socket = socket.create_connection((address, port), timeout=timeout_s)
        self._socket.sendall(f"{token}{rank:08d}".encode())
        self._socket.setblocking(False)
        self.address: str = self._socket.getsockname()[0]  # of this node, as the learner's sees it

    def wait_for_go(self, deadline: float, cancelled: threading.Event) -> bool:
        """False when the line closed, or the deadline or ``cancelled`` came first."""
        while not cancelled.is_set() and (left := deadline - time.monotonic()) > 0:
            if _readable([self._socket], min(NAP_S, left)):
                return _read(self._socket, 1) == _GO
        return False

    def is_up(self, nap: float) -> bool:
        """Whether the learner was still there after ``nap`` seconds."""
        return not _readable([self._socket], nap)

    def close(self, why: str) -> None:
        with contextlib.suppress(OSError):
            self._socket.send(why.encode()[:REASON_BYTES])
            _read(self._socket, 1)  # what is unread when a socket closes costs the other end our words
        self._socket.close()


def settle(is_done: Callable[[], bool], deadline: float, trouble: Callable[[float], str]) -> str:
    """Waits until something is done: "" then, else why it will not be.

    trouble: waits the seconds that it is given at most, and says what is wrong by now. What was done just before the trouble
    came has GRACE_S to arrive.
    """
    nap, why = 0.0005, ""
    while not is_done():
        if time.monotonic() >= deadline:
            return why or "the deadline passed"
        if why:
            time.sleep(nap)
        else:
            why = trouble(nap)
            if why:
                deadline = min(deadline, time.monotonic() + GRACE_S)
        nap = min(0.02, 1.5 * nap)
    return ""


def _read(line: socket.socket, limit: int) -> bytes:
    """What is there, at most ``limit`` bytes; nothing when the other end is gone."""
    try:
        return line.recv(limit, socket.MSG_DONTWAIT)
    except OSError:
        return b""


def _words(line: socket.socket) -> str:
    """What the other end said before it closed; it can be asked again."""
    try:
        words = line.recv(REASON_BYTES, socket.MSG_DONTWAIT | socket.MSG_PEEK)
    except OSError as error:  # it may be alive: closing with something unread looks like this too
        return f"its line broke ({error.strerror})"
    return words.decode("utf-8", "replace") or GONE


def _readable(sockets: Iterable[socket.socket], timeout_s: float) -> list[socket.socket]:
    """Those with something to read, or with nobody at the other end, within ``timeout_s``. (select() takes no descriptor
    above 1023.)"""
    known = {one.fileno(): one for one in sockets}
    poller = select.poll()
    for number in known:
        poller.register(number, select.POLLIN)
    return [known[number] for number, _ in poller.poll(1000 * timeout_s)]
