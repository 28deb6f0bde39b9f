"""One worker process as its pool sees it: frames in both directions, each with a deadline, and an end that is certain."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from hapo_async.errors import ConfigError, RunError
from hapo_async.types import Fault, Judgement, Verdict
from hapo_async.verify import fences, is_plugin, wire

START_DEADLINE_S = 120.0  # start of a process and slow imports; a busy machine needs long
_SLICE_S = 0.25  # how often a waiting thread looks at the process, at its children and at ``close``
_numbers = itertools.count()


class WorkerDied(Exception):
    """The worker process ended by itself; ``code`` is its exit status, negative for a signal."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the worker process ended with status {code}")
        self.code = code


class TooManyProcesses(Exception):
    """The worker and its children are too many."""


class DeadlinePassed(Exception):
    """No answer by ``deadline`` [monotonic seconds]."""

    def __init__(self, deadline: float) -> None:
        super().__init__("no answer in time")
        self.deadline = deadline


LOST = (DeadlinePassed, WorkerDied, TooManyProcesses, ValueError)
"""What costs a worker: ValueError is a frame that is no judgement."""


def verdict_on(error: Exception, timeout_s: float) -> Judgement:
    """What one of ``LOST`` means for the judgement that was due."""
    if isinstance(error, DeadlinePassed):
        return Judgement(Verdict.TIMEOUT, None, {}, timeout_s, f"no judgement within {timeout_s:g} s")
    if isinstance(error, WorkerDied):
        verdict = {-signal.SIGKILL: Verdict.OOM, -signal.SIGXCPU: Verdict.TIMEOUT}.get(error.code or 0, Verdict.CRASH)
        return Judgement(verdict, None, {}, 0.0, str(error))
    detail = str(error) if isinstance(error, TooManyProcesses) else f"unreadable judgement: {error}"[:500]
    return Judgement(Verdict.CRASH, None, {}, 0.0, detail)


def _judgement(message: dict[str, Any]) -> Judgement:
    """The judgement that a frame holds. Raises ValueError where it holds none, whatever is wrong with it."""
    try:
        reward, components = message.get("reward"), message.get("components") or {}
        if not (reward is None or type(reward) in (int, float)) or not isinstance(components, dict):
            raise ValueError(f"a reward of type {type(reward).__name__}")
        return Judgement(
            Verdict(str(message.get("verdict"))),
            reward,
            components,
            float(message.get("seconds") or 0.0),
            str(message.get("detail") or ""),
            Fault(str(message.get("fault") or "")),
        )
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__}: {error}"[:300]) from None


class Worker:
    """One worker process, in its own process group. used: it has been sent something to judge."""

    def __init__(self, closing: threading.Event) -> None:
        self._closing = closing
        self._token = f"{os.getpid()}-{next(_numbers)}-{time.monotonic_ns()}"
        self._watched = False
        self.used = False
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hapo_async.verify.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            env={**os.environ, **environment, fences.MARK: self._token},
        )
        assert self._process.stdin and self._process.stdout
        self.pid = self._process.pid
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._decoder = wire.Decoder()
        self._messages: deque[dict[str, Any]] = deque()

    def start(self, name: str, timeout_s: float) -> None:
        """Raises ConfigError when the verifier cannot be loaded, RunError when the process does not come up."""
        hello = {"name": name, "path": [p for p in sys.path if p], "timeout_s": timeout_s, "token": self._token}
        try:
            self._send(hello, START_DEADLINE_S)
            message = self._receive(time.monotonic() + START_DEADLINE_S)
        except LOST as error:
            raise RunError(f"a verifier worker for {name!r} did not start: {error}") from None
        if not message.get("ready"):
            raise ConfigError(str(message.get("detail")))
        self._watched = is_plugin(name)

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, items: Sequence[Any], timeout_s: float) -> None:
        """Items in the order in which their judgements will come. Raises one of ``LOST``."""
        self.used = True
        self._send({"items": list(items)}, timeout_s)

    def receive_judgement(self, timeout_s: float) -> Judgement:
        """The next judgement; the clock stops while the worker imports. Raises one of ``LOST``."""
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._receive(deadline)
            if "loading" in message:
                deadline = time.monotonic() + (START_DEADLINE_S if message["loading"] else timeout_s)
                continue
            return _judgement(message)

    def kill(self) -> None:
        """SIGKILL to the whole group, then reap. What has left the group is killed by the process that watches over it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    # ---------------------------------------------------------------- pipes

    def _send(self, message: Any, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        view = memoryview(wire.encode(message))
        while view:
            self._wait(self._in, deadline, for_write=True)
            try:
                view = view[os.write(self._in, view) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise WorkerDied(self._exit_code()) from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        while not self._messages:
            self._wait(self._out, deadline, for_write=False)
            try:
                data = os.read(self._out, 1 << 20)
            except BlockingIOError:
                continue
            if not data:
                raise WorkerDied(self._exit_code())
            try:
                self._messages.extend(self._decoder.feed(data))
            except RecursionError:
                raise ValueError("a frame nested too deep") from None
        message = self._messages.popleft()
        if not isinstance(message, dict):
            raise ValueError("a frame that is no object")
        return message

    def _wait(self, descriptor: int, deadline: float, for_write: bool) -> None:
        """Returns when the descriptor is ready; sees a worker that is gone while a child of it holds the pipe."""
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT if for_write else select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlinePassed(deadline)
            if poller.poll(1000 * min(left, _SLICE_S) + 1):
                return
            if self._closing.is_set():
                raise RunError("the verifier pool was closed.")
            if not self.is_alive():
                raise WorkerDied(self._exit_code())
            if self._watched and left > 2 * _SLICE_S and fences.has_children(self.pid):  # a look must not delay the end
                size = fences.session_size(self.pid)
                if size > fences.MOST_PROCESSES:
                    raise TooManyProcesses(f"the worker has started {size} processes; at most {fences.MOST_PROCESSES}")

    def _exit_code(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=5)
        return None
