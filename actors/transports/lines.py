"""A line from each member of an epoch to the learner: a socket that says nothing while all is well.

A collective alone notices a process that died only at its deadline. The kernel closes a dead process's line at once, and
whoever leaves for a reason says it on the line first. What travels: the hello (token and rank, of fixed length), one byte
back for "go", and at most the reason.

Strangers can connect until "go". They are told nothing, sent away when they have not said the hello within HELLO_S, and the
oldest of them when there are more than MOST_CALLERS; members say theirs as they connect, and wait behind nobody.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

REASON_BYTES = 500
GRACE_S = 0.5  # how long what was sent before the other end hung up may take to arrive
NAP_S = 0.2  # how long a wait lasts that somebody may want to end early
TOKEN_CHARS = 32
HELLO_BYTES = TOKEN_CHARS + 8
HELLO_S = 5.0
MOST_CALLERS = 64  # that have not said their hello
BACKLOG = 512
GONE = "its process is gone"
_GO = b"+"


def new_token() -> str:
    return secrets.token_hex(TOKEN_CHARS // 2)


@dataclass
class _Caller:
    """Somebody who has not said the whole hello. since: ``time.monotonic``."""

    since: float
    said: bytes = b""


class Exchange:
    """The learner's ends: a line from each of ``ranks``. It listens on ``address`` alone, and a thread lets members in from the
    first moment on, so that strangers cannot fill the queue at the door."""

    def __init__(self, address: str, token: str, ranks: Iterable[int]) -> None:
        if ipaddress.ip_address(address).is_unspecified:
            raise ValueError(f"members meet on one address of this node, not on the wildcard {address}")
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._token, self._ranks = token.encode(), frozenset(ranks)
        self._listener = socket.create_server((address, 0), family=family, backlog=BACKLOG)
        self._listener.setblocking(False)
        self.port: int = self._listener.getsockname()[1]
        self._callers: dict[socket.socket, _Caller] = {}  # oldest first; the thread's
        self._lines: dict[int, socket.socket] = {}
        self._came = threading.Condition()
        self._bell, self._ear = socket.socketpair()
        self._door = threading.Thread(target=self._keep_door, name="weights-door", daemon=True)
        self._door.start()

    def gather(self, deadline: float) -> set[int]:
        """Waits for all ranks: those that did not come by the deadline. Ends at once when a line is lost."""
        while True:
            with self._came:
                missing = set(self._ranks - self._lines.keys())
                left = deadline - time.monotonic()
                if not missing or left <= 0 or self.lost(0.0):
                    return missing
                self._came.wait(min(NAP_S, left))

    def _keep_door(self) -> None:
        try:
            while self._ear not in (ready := _readable([self._ear, self._listener, *self._callers], HELLO_S)):
                for one in ready:
                    if one is self._listener:
                        self._let_in()
                    elif one in self._callers:
                        self._hear(one)
                self._send_away()
        finally:
            for one in (self._listener, self._ear, *self._callers):
                one.close()

    def _let_in(self) -> None:
        """Everybody who waits at the door; what a member has said came with it."""
        for _ in range(BACKLOG):
            try:
                caller = self._listener.accept()[0]
            except BlockingIOError:
                return
            except OSError:  # they left, or this process has no descriptor for them
                time.sleep(0.01)
                return
            self._callers[caller] = _Caller(time.monotonic())
            self._hear(caller)
            self._send_away()

    def _send_away(self) -> None:
        now = time.monotonic()
        surplus = len(self._callers) - MOST_CALLERS
        for number, (caller, about) in enumerate(list(self._callers.items())):
            if number >= surplus and now - about.since < HELLO_S:
                return  # the rest came later
            del self._callers[caller]
            caller.close()

    def _hear(self, caller: socket.socket) -> None:
        about = self._callers[caller]
        try:
            more = caller.recv(HELLO_BYTES - len(about.said), socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            more = b""
        said = about.said = about.said + more
        if more and len(said) < HELLO_BYTES:
            return
        del self._callers[caller]
        token, rank = said[:TOKEN_CHARS], said[TOKEN_CHARS:]
        with self._came:
            if (
                hmac.compare_digest(token, self._token)
                and rank.isdigit()
                and int(rank) in self._ranks - self._lines.keys()
            ):
                self._lines[int(rank)] = caller
                self._came.notify_all()
            else:
                caller.close()

    def go(self) -> None:
        """All are there: nobody else is let in."""
        self._shut()
        for line in self._lines.values():
            with contextlib.suppress(OSError):
                line.send(_GO)

    def _shut(self) -> None:
        """The door closes; the thread is gone when this returns."""
        with contextlib.suppress(OSError):
            self._bell.send(b"\0")
        self._door.join()
        self._bell.close()

    def lost(self, nap: float) -> dict[int, str]:
        """Members whose line closed within ``nap`` seconds, and what they said."""
        with self._came:
            known = dict(self._lines)
        if not known:
            time.sleep(nap)
            return {}
        ready = _readable(known.values(), nap)
        return {rank: _words(line) for rank, line in known.items() if line in ready}

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
        self._shut()
        for line in self._lines.values():
            line.close()


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
