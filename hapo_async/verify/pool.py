"""Worker processes that judge, with a deadline that holds whatever the verifier does.

        judge(items) ──► chunks ──► queue ──► one thread per worker ──pipe──► worker process
             ▲                                       │   ◄──── one frame per judgement
             └────────────── futures ◄───────────────┘

The deadline of a judgement runs from the frame before it. When it passes, the thread kills the worker's process group
(SIGKILL: neither C code nor signal handlers delay it), puts the rest of the chunk back into the queue and finds out who
pays for that one item (``verify.attribution``), in fresh workers. A worker that dies by itself costs its current item
the same way: ``oom`` when it was killed by signal 9, ``timeout`` by its processor limit, else ``crash``.

| loop | consumes | waits for | unblocked by |
|---|---|---|---|
| thread per worker | chunks | a chunk; then frames | ``judge``; the worker, its death, the deadline, ``close`` |
| caller of ``judge`` | futures | all its items | the threads; ``close`` fails what is left |
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from hapo_async.errors import ConfigError, RunError
from hapo_async.types import Fault, Judgement, Verdict
from hapo_async.verify import is_plugin, process, wire
from hapo_async.verify.attribution import Attribution, Item, failed
from hapo_async.verify.final import TAIL
from hapo_async.verify.process import Worker

_MAX_CHUNK = 64
_Doubt = tuple["_Job", Judgement, bool]
"""(a job, how its first try failed, whether its worker lives on)."""


@dataclass
class _Job:
    item: Item
    future: Future[Judgement] = field(default_factory=Future)


class VerifierPool:
    """Judges in ``workers`` processes. Thread-safe; close it, or use it as a context manager.

    timeout_s: wall-clock seconds that one judgement may take (starting a worker and importing sympy excluded). An answer
    that fells its judge takes up to two of them, one that is poisoned or meets a broken judge up to four.
    """

    def __init__(self, name: str, workers: int = 1, timeout_s: float = 10.0) -> None:
        assert workers >= 1 and timeout_s > 0
        self.name = name
        self.timeout_s = timeout_s
        self._queue: queue.SimpleQueue[list[_Job] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._attribution = Attribution(name)
        self._verdicts: Counter[str] = Counter()
        self._paid: Counter[str] = Counter()
        self._overstay_s = 0.0
        self._seconds: deque[float] = deque(maxlen=1000)
        self._started = 0
        self._workers: dict[int, Worker] = {}
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
        """Judgements by verdict, charged to answers and masked; median and 99th percentile of the last 1000 [s]; the longest
        life of a worker past a deadline [s]; processes started and alive."""
        with self._lock:
            seconds = sorted(self._seconds)
            return {
                "judged": sum(self._verdicts.values()),
                "verdicts": dict(self._verdicts),
                "charged": self._paid["charged"],
                "masked": self._paid["masked"],
                "p50_s": seconds[len(seconds) // 2] if seconds else 0.0,
                "p99_s": seconds[len(seconds) * 99 // 100] if seconds else 0.0,
                "overstay_s": self._overstay_s,
                "workers_started": self._started,
                "worker_pids": sorted(worker.pid for worker in self._workers.values()),
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
        self._first(slot)
        while (chunk := self._queue.get()) is not None:
            if self._closing.is_set():
                _fail(chunk, RunError("the verifier pool was closed."))
                continue
            try:
                self._judge_chunk(slot, chunk)
            except Exception as error:  # whatever it is, the thread lives on and nobody waits for ever
                _fail(chunk, error if isinstance(error, ConfigError) else RunError(f"verifier worker: {error}"))
                self._drop(slot)
        self._drop(slot)

    def _first(self, slot: int) -> None:
        """Starts the slot's worker ahead of the first chunk, and tells ``start_async`` how that went."""
        try:
            self._worker(slot)
        except (ConfigError, RunError, OSError) as error:
            self._up[slot].set_exception(error)
        else:
            self._up[slot].set_result(None)

    def _judge_chunk(self, slot: int, chunk: list[_Job]) -> None:
        """Judges until the chunk is done or the worker is lost; then the rest goes back into the queue. What failed is
        settled last: its neighbours need not wait for that."""
        jobs = self._sendable(chunk)
        if not jobs:
            return
        worker = self._worker(slot)
        doubts: list[_Doubt] = []
        done = 0
        try:
            worker.send([self._wire_item(job.item) for job in jobs], self.timeout_s)
            while done < len(jobs) and worker is self._workers.get(slot):
                judgement = worker.receive_judgement(self.timeout_s)
                done += 1
                if not failed(judgement):
                    self._finish(jobs[done - 1], judgement)
                    continue
                doubts.append((jobs[done - 1], judgement, judgement.verdict is Verdict.CRASH))
                if judgement.verdict is Verdict.OOM:  # what it still holds would fell its next answer
                    self._drop(slot)
        except process.LOST as error:
            doubts.append((jobs[done], self._lose(slot, error), False))
            done += 1
        self._requeue(jobs[done:])
        self._settle(slot, doubts)

    def _requeue(self, jobs: list[_Job]) -> None:
        """In as many parts as there are workers: others should not wait behind the next one that fails."""
        size = max(1, -(-len(jobs) // len(self._threads)))
        for start in range(0, len(jobs), size):
            self._queue.put(jobs[start : start + size])

    def _settle(self, slot: int, doubts: list[_Doubt]) -> None:
        for number, (job, first, in_band) in enumerate(doubts):
            try:
                judgement = self._attribution.known(job.item) or self._attribution.settle(
                    job.item, first, lambda item, fresh: self._once(slot, item, fresh), in_band
                )
            except Exception as error:
                _fail([d[0] for d in doubts[number:]], RunError(f"verifier worker: {error}"))
                raise
            self._finish(job, judgement)

    def _once(self, slot: int, item: Item, fresh: bool) -> Judgement:
        """Judges one item; the worker's loss is its judgement. fresh: by a worker that has judged nothing before."""
        if fresh and (worker := self._workers.get(slot)) and worker.used:
            self._drop(slot)
        worker = self._worker(slot)
        try:
            worker.send([self._wire_item(item)], self.timeout_s)
            judgement = worker.receive_judgement(self.timeout_s)
        except process.LOST as error:
            return self._lose(slot, error)
        if judgement.verdict is Verdict.OOM:
            self._drop(slot)
        return judgement

    def _sendable(self, chunk: list[_Job]) -> list[_Job]:
        """The jobs that need judging and can be sent; the others are finished here."""
        jobs = []
        for job in chunk:
            if judgement := self._attribution.known(job.item):
                self._finish(job, judgement)
                continue
            try:
                wire.encode(self._wire_item(job.item)[2:])
            except (ValueError, TypeError, RecursionError) as error:
                detail = f"poisoned prompt: its truth cannot be sent to a worker: {error}"[:500]
                self._finish(job, Judgement(Verdict.CRASH, None, {}, 0.0, detail, Fault.PROMPT))
                continue
            jobs.append(job)
        return jobs

    def _wire_item(self, item: Item) -> list[Any]:
        prompt, response, truth, *extra = item
        if not is_plugin(self.name):
            return ["", response[-TAIL:], truth, {}]
        return [prompt, response, truth, dict(extra[0]) if extra else {}]

    def _finish(self, job: _Job, judgement: Judgement) -> None:
        self._attribution.saw(job.item, judgement)
        with self._lock:
            self._verdicts[str(judgement.verdict)] += 1
            self._paid.update(judgement.tally[1:])
            self._seconds.append(judgement.seconds)
        if job.future.set_running_or_notify_cancel():
            job.future.set_result(judgement)

    def _worker(self, slot: int) -> Worker:
        """The slot's worker, a new one where there is none that lives. Raises ConfigError, RunError, OSError."""
        if (worker := self._workers.get(slot)) and worker.is_alive():
            return worker
        self._drop(slot)
        worker = Worker(self._closing)
        with self._lock:
            self._started += 1
            self._workers[slot] = worker
        try:
            worker.start(self.name, self.timeout_s)
        except BaseException:
            self._drop(slot)
            raise
        return worker

    def _lose(self, slot: int, error: Exception) -> Judgement:
        self._drop(slot)
        if isinstance(error, process.DeadlinePassed):
            with self._lock:
                self._overstay_s = max(self._overstay_s, time.monotonic() - error.deadline)
        return process.verdict_on(error, self.timeout_s)

    def _drop(self, slot: int) -> None:
        if worker := self._workers.get(slot):
            worker.kill()
            with self._lock:
                self._workers.pop(slot, None)


def _fail(jobs: Sequence[_Job], error: Exception) -> None:
    for job in jobs:
        if not job.future.done() and job.future.set_running_or_notify_cancel():
            job.future.set_exception(error)
