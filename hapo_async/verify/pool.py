"""Worker processes that judge, with a deadline that holds whatever the verifier does.

        judge(items) ──► chunks ──► queue ──► one thread per worker ──pipe──► worker process
             ▲                                       │   ◄──── one frame per judgement
             └────────────── futures ◄───────────────┘

The deadline of a judgement runs from the frame before it. When it passes, the thread kills the worker's process group
(SIGKILL: neither C code nor signal handlers delay it), answers that one item with verdict ``timeout``, puts the rest of
the chunk back into the queue and starts a fresh worker. A worker that dies by itself costs its current item only:
``oom`` when it was killed by signal 9, else ``crash``.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| thread per worker | chunks | a chunk; then frames | ``judge``; the worker, its death, the deadline, ``close`` |
| caller of ``judge`` | futures | all its items | the threads; ``close`` fails what is left |
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from hapo_async.errors import ConfigError, RunError
from hapo_async.types import Judgement, Verdict
from hapo_async.verify import wire

# (prompt text, response, truth) or (prompt text, response, truth, further columns for plug-ins)
Item = Sequence[Any]

_START_DEADLINE_S = 120.0  # start of a process and slow imports; a busy machine needs long
_SLICE_S = 0.25  # how often a waiting thread looks at the process and at ``close``
_MAX_CHUNK = 64


@dataclass
class _Job:
    item: Item
    future: Future[Judgement] = field(default_factory=Future)


class WorkerDied(Exception):
    """The worker process ended by itself; ``code`` is its exit status, negative for a signal."""

    def __init__(self, code: int | None) -> None:
        super().__init__(f"the worker process ended with status {code}")
        self.code = code


class DeadlinePassed(Exception):
    """No answer in time."""


class VerifierPool:
    """Judges in ``workers`` processes. Thread-safe; close it, or use it as a context manager.

    timeout_s: wall-clock seconds that one judgement may take (starting a worker and importing sympy excluded).
    """

    def __init__(self, name: str, workers: int = 1, timeout_s: float = 10.0) -> None:
        assert workers >= 1 and timeout_s > 0
        self.name = name
        self.timeout_s = timeout_s
        self._queue: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._verdicts: Counter[str] = Counter()
        self._seconds: deque[float] = deque(maxlen=1000)
        self._started = 0
        self._pids: dict[int, int] = {}
        self._up: list[Future[None]] = [Future() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._serve, args=(slot,), name=f"verifier-{slot}", daemon=True)
            for slot in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def judge(self, items: Sequence[Item], progress: Callable[[int, int], None] | None = None) -> list[Judgement]:
        """Judges all items and returns their judgements in order. ``progress(done, total)`` is called as they finish.

        Raises ConfigError when a plug-in cannot be loaded, RunError when the pool is closed or cannot start a process.
        """
        out = []
        for future in self.submit(items):
            out.append(future.result())
            if progress:
                progress(len(out), len(items))
        return out

    async def judge_async(self, items: Sequence[Item]) -> list[Judgement]:
        """As ``judge``, without blocking the event loop."""
        return list(await asyncio.gather(*(asyncio.wrap_future(f) for f in self.submit(items))))

    async def start_async(self) -> None:
        """Waits until every worker process has loaded the verifier. Raises ConfigError, RunError."""
        await asyncio.gather(*(asyncio.wrap_future(f) for f in self._up))

    def submit(self, items: Sequence[Item]) -> list[Future[Judgement]]:
        """Enqueues items; one future each."""
        if self._closing.is_set():
            raise RunError("the verifier pool is closed.")
        jobs = [_Job(item) for item in items]
        size = max(1, min(_MAX_CHUNK, -(-len(jobs) // (4 * len(self._threads)))))
        for start in range(0, len(jobs), size):
            self._queue.put(jobs[start : start + size])
        return [job.future for job in jobs]

    def stats(self) -> dict[str, Any]:
        """Judgements by verdict, median seconds of the last 1000, processes started and alive."""
        with self._lock:
            seconds = sorted(self._seconds)
            return {
                "judged": sum(self._verdicts.values()),
                "verdicts": dict(self._verdicts),
                "p50_s": seconds[len(seconds) // 2] if seconds else 0.0,
                "workers_started": self._started,
                "worker_pids": sorted(self._pids.values()),
            }

    def close(self) -> None:
        """Kills the workers. Items not judged by then fail with RunError. May be called again."""
        self._closing.set()
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(timeout=10)
        with contextlib.suppress(queue.Empty):
            while True:
                _fail(self._queue.get_nowait() or [], RunError("the verifier pool was closed."))

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ----------------------------------------------------------------------------------------------------------------
    # One thread per worker

    def _serve(self, slot: int) -> None:
        worker = self._first(slot)
        while (chunk := self._queue.get()) is not None:
            if self._closing.is_set():
                _fail(chunk, RunError("the verifier pool was closed."))
                continue
            try:
                if worker is None or not worker.is_alive():
                    worker = self._replace(slot, worker)
                worker = self._judge_chunk(slot, worker, chunk)
            except (ConfigError, RunError, OSError) as error:
                _fail(chunk, error if isinstance(error, ConfigError) else RunError(f"verifier worker: {error}"))
                self._drop(slot, worker)
                worker = None
        self._drop(slot, worker)

    def _first(self, slot: int) -> _Worker | None:
        """Starts the slot's worker ahead of the first chunk, and tells ``start_async`` how that went."""
        try:
            worker = self._replace(slot, None)
        except (ConfigError, RunError, OSError) as error:
            self._up[slot].set_exception(error)
            return None
        self._up[slot].set_result(None)
        return worker

    def _judge_chunk(self, slot: int, worker: _Worker, chunk: list[_Job]) -> _Worker | None:
        """Judges until the chunk is done or the worker is lost; then the rest goes back into the queue."""
        done = 0
        try:
            worker.send({"items": [_wire_item(job.item) for job in chunk]}, self.timeout_s)
            for job in chunk:
                self._finish(job, worker.receive_judgement(self.timeout_s))
                done += 1
            return worker
        except DeadlinePassed:
            lost = Judgement(Verdict.TIMEOUT, None, {}, self.timeout_s, f"no judgement within {self.timeout_s:g} s")
        except WorkerDied as error:
            verdict = Verdict.OOM if error.code == -signal.SIGKILL else Verdict.CRASH
            lost = Judgement(verdict, None, {}, 0.0, str(error))
        except ValueError as error:  # a frame that is no judgement
            lost = Judgement(Verdict.CRASH, None, {}, 0.0, f"unreadable judgement: {error}"[:500])
        self._drop(slot, worker)
        if done < len(chunk):
            self._finish(chunk[done], lost)
        if rest := chunk[done + 1 :]:
            self._queue.put(rest)
        return None

    def _finish(self, job: _Job, judgement: Judgement) -> None:
        with self._lock:
            self._verdicts[str(judgement.verdict)] += 1
            self._seconds.append(judgement.seconds)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(judgement)

    def _replace(self, slot: int, old: _Worker | None) -> _Worker:
        self._drop(slot, old)
        worker = _Worker(self._closing)
        with self._lock:
            self._started += 1
            self._pids[slot] = worker.pid
        try:
            worker.start(self.name)
        except BaseException:
            self._drop(slot, worker)
            raise
        return worker

    def _drop(self, slot: int, worker: _Worker | None) -> None:
        if worker is not None:
            worker.kill()
            with self._lock:
                self._pids.pop(slot, None)


class _Worker:
    """One worker process, in its own process group."""

    def __init__(self, closing: threading.Event) -> None:
        self._closing = closing
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hapo_async.verify.worker", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        assert self._process.stdin and self._process.stdout
        self.pid = self._process.pid
        self._in, self._out = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._in, False)
        os.set_blocking(self._out, False)
        self._decoder = wire.Decoder()
        self._messages: deque[dict[str, Any]] = deque()

    def start(self, name: str) -> None:
        """Raises ConfigError when the verifier cannot be loaded, RunError when the process does not come up."""
        try:
            self.send({"name": name, "path": [p for p in sys.path if p]}, _START_DEADLINE_S)
            message = self._receive(time.monotonic() + _START_DEADLINE_S)
        except (DeadlinePassed, WorkerDied) as error:
            raise RunError(f"a verifier worker for {name!r} did not start: {error}") from None
        if not message.get("ready"):
            raise ConfigError(str(message.get("detail")))

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Any, timeout_s: float) -> None:
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

    def receive_judgement(self, timeout_s: float) -> Judgement:
        """The next judgement; the clock stops while the worker imports.

        Raises DeadlinePassed, WorkerDied, ValueError.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            message = self._receive(deadline)
            if "loading" in message:
                deadline = time.monotonic() + (_START_DEADLINE_S if message["loading"] else timeout_s)
                continue
            return Judgement(
                Verdict(str(message.get("verdict"))),
                message.get("reward"),
                message.get("components") or {},
                float(message.get("seconds") or 0.0),
                str(message.get("detail") or ""),
            )

    def kill(self) -> None:
        """SIGKILL to the whole group, then reap."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()

    def _receive(self, deadline: float) -> dict[str, Any]:
        while not self._messages:
            self._wait(self._out, deadline, for_write=False)
            try:
                data = os.read(self._out, 1 << 20)
            except BlockingIOError:
                continue
            if not data:
                raise WorkerDied(self._exit_code())
            self._messages.extend(self._decoder.feed(data))
        return self._messages.popleft()

    def _wait(self, descriptor: int, deadline: float, for_write: bool) -> None:
        """Returns when the descriptor is ready; sees a worker that is gone while a child of it holds the pipe."""
        poller = select.poll()
        poller.register(descriptor, select.POLLOUT if for_write else select.POLLIN)
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlinePassed("no answer in time")
            if poller.poll(1000 * min(left, _SLICE_S) + 1):
                return
            if self._closing.is_set():
                raise RunError("the verifier pool was closed.")
            if not self.is_alive():
                raise WorkerDied(self._exit_code())

    def _exit_code(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout=5)
        return None


def _wire_item(item: Item) -> list[Any]:
    prompt, response, truth, *extra = item
    return [prompt, response, truth, dict(extra[0]) if extra else {}]


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for job in jobs:
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)
