"""Requests to a live run, as files: ``hapo-async scale`` writes one, the driver answers it.

    control/            0700, made by the driver
      driver.json       while the driver takes requests: its pid, and why it would refuse all of them, if it would
      request.json      the one request, linked into place whole, gone when it has its outcome
      answer.json       replaced whole: the request's id, what has been done so far, and in the end the outcome

Both sides read regular files of at most ``MAX_BYTES`` and check them against a schema; what does not fit is not obeyed. A
pipe, a link, a folder or a device in their place is set aside and never waited for.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import logging
import os
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import psutil
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hapo_async.errors import ConfigError, RunError
from hapo_async.files import open_regular, parse_json, read_regular
from hapo_async.rundir import LOCK
from hapo_async.secrets import redact

log = logging.getLogger(__name__)

FOLDER, DRIVER, REQUEST, ANSWER = "control", "driver.json", "request.json", "answer.json"
MAX_BYTES = 1 << 18
MAX_LINES, MAX_LINE = 200, 500
POLL_S = 0.25
GRACE_S = 15.0  # the driver notices a request, and writes its outcome, in less

M = TypeVar("M", bound=BaseModel)


class _Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Driver(_Message):
    """Who takes requests. refuses: why none can be met, "" when they can."""

    pid: int
    refuses: str = ""


class Request(_Message):
    """How many of each are wanted, None where it does not matter. drain_deadline_s: how long one that leaves may finish what
    it has. wait_s: when the driver gives up what it has not achieved."""

    id: str = Field(pattern="^[0-9a-f]{16}$")
    generators: int | None = Field(None, ge=1, le=4096)
    verifiers: int | None = Field(None, ge=1, le=4096)
    drain_deadline_s: float = Field(60.0, ge=0, le=1e6, allow_inf_nan=False)
    wait_s: float = Field(600.0, gt=0, le=1e6, allow_inf_nan=False)


class Answer(_Message):
    """What has become of a request so far; "" while it is under way."""

    id: str
    lines: tuple[str, ...] = Field((), strict=False)
    outcome: Literal["", "done", "failed"] = ""


# --------------------------------------------------------------------------------------------------------------------
# The driver's side


class Desk:
    """Where the driver takes requests, one at a time. refuses: see ``Driver``."""

    def __init__(self, run_dir: Path, refuses: str = "") -> None:
        self._refused = ""  # why the last thing in a request's place was none
        self.folder = run_dir / FOLDER
        if self.folder.is_symlink() or not self.folder.is_dir():
            _clear(self.folder)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)
        for name in (REQUEST, ANSWER, DRIVER):  # to a driver that is no more
            _clear(self.folder / name)
        _replace(self.folder / DRIVER, Driver(pid=os.getpid(), refuses=refuses))

    def take(self) -> Request | None:
        """The request that waits, if it is one. Anything else is set aside, with a word in the log."""
        path = self.folder / REQUEST
        try:
            request = _read(path, Request)
        except FileNotFoundError:
            self._refused = ""
            return None
        except (OSError, ValueError) as error:
            if (why := str(error)[:MAX_LINE]) != self._refused:  # else it cannot be set aside, and that has been said
                log.error("%s is no request and is set aside: %s", path, why)
            self._refused = why
            _clear(path)
            return None
        self._refused = ""
        return request

    def answer(self, request: Request, lines: Sequence[str], outcome: Literal["", "done", "failed"] = "") -> None:
        """Says how far the request is; with an outcome it is over. A disk that is full costs the answer and not the run."""
        try:
            kept = [*lines[: MAX_LINES - 1], lines[-1]] if len(lines) > MAX_LINES else lines
            short = tuple(redact(line)[:MAX_LINE] for line in kept)
            _replace(self.folder / ANSWER, Answer(id=request.id, lines=short, outcome=outcome))
            if outcome:
                _clear(self.folder / REQUEST)
        except OSError as error:
            log.error("request %s cannot be answered: %s", request.id, error)

    def close(self) -> None:
        """No request is taken from now on; one that waits is told so."""
        _clear(self.folder / DRIVER)
        if request := self.take():
            self.answer(request, ["the run ends: nothing is changed any more"], "failed")


# --------------------------------------------------------------------------------------------------------------------
# The command's side


def parse(wanted: Sequence[str]) -> dict[str, int]:
    """{"generators": N, "verifiers": M} of ``key=value`` words. Raises ConfigError."""
    known = ("generators", "verifiers")
    out: dict[str, int] = {}
    for word in wanted:
        key, found, value = word.partition("=")
        if key not in known or not found:
            near = difflib.get_close_matches(key, known, 1, 0.7)
            hint = f" Did you mean {near[0]}=N?" if near else " Give generators=N, verifiers=M or both."
            raise ConfigError(f"{word!r} cannot be scaled.{hint}")
        if not value.isascii() or not value.isdigit() or not 1 <= int(value) <= 4096:
            raise ConfigError(f"{key}={value!r} must be a whole number from 1 to 4096.")
        if key in out:
            raise ConfigError(f"{key} is given twice.")
        out[key] = int(value)
    if not out:
        raise ConfigError("nothing to change: give generators=N, verifiers=M or both.")
    return out


def new_request(wanted: Sequence[str], drain_deadline_s: float = 60.0, wait_s: float = 600.0) -> Request:
    """Raises ConfigError for what cannot be asked."""
    counts = parse(wanted)
    try:
        return Request(id=secrets.token_hex(8), drain_deadline_s=drain_deadline_s, wait_s=wait_s, **counts)
    except ValidationError as error:
        first = error.errors()[0]
        raise ConfigError(f"--{str(first['loc'][0]).removesuffix('_s').replace('_', '-')}: {first['msg']}.") from None


def driver_of(run_dir: Path) -> int | None:
    """The pid of the driver that owns the run folder now, None when there is none on this machine."""
    try:
        with open_regular(run_dir / LOCK) as lock:
            pid = int(lock.read(32).strip() or 0)
            if not pid or not psutil.pid_exists(pid):
                return None
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return pid
            return None  # a pid that somebody else has by now
    except (OSError, ValueError, OverflowError):
        return None


def submit(run_dir: Path, request: Request) -> None:
    """Puts the request before the driver of a live run. Raises ConfigError when nobody would take it."""
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"{str(run_dir)!r} is not the folder of a run that has started.")
    if driver_of(run_dir) is None:
        raise ConfigError(
            f"the run in {str(run_dir)!r} is not live on this machine: it has ended, or its driver is elsewhere. Start it "
            "with generator.count and verifier.count instead."
        )
    folder = run_dir / FOLDER
    try:
        driver = _read(folder / DRIVER, Driver)
    except (OSError, ValueError):
        raise ConfigError(f"the run in {str(run_dir)!r} is starting or ending: it takes no requests now.") from None
    if driver.refuses:
        raise ConfigError(driver.refuses)
    fresh = folder / f".{REQUEST}.{request.id}"
    _write(fresh, request)
    try:
        os.link(fresh, folder / REQUEST)
    except FileExistsError:
        raise ConfigError("another request is being met: wait for its outcome (`hapo-async status`).") from None
    finally:
        fresh.unlink(missing_ok=True)


def follow(run_dir: Path, request: Request, say: Callable[[str], None]) -> None:
    """Says what is done until the outcome is there. Raises RunError when that is a failure, when the driver ends, or when
    there is none ``GRACE_S`` after ``wait_s``."""
    told, deadline = 0, time.monotonic() + request.wait_s + GRACE_S
    while True:
        live = driver_of(run_dir) is not None  # before the answer: it may have answered and ended since
        answer = _answer(run_dir, request)
        for line in answer.lines[told:]:
            say(line)
        told = max(told, len(answer.lines))
        if answer.outcome == "done":
            return
        if answer.outcome == "failed":
            raise RunError("the request was not met" + (f": {answer.lines[-1]}" if answer.lines else ""))
        if not live:
            _withdraw(run_dir, request)
            raise RunError("the run's driver ended before it was done")
        if time.monotonic() > deadline:
            raise RunError(
                f"no outcome after {request.wait_s + GRACE_S:.0f} s; `hapo-async status` tells what became of it"
            )
        time.sleep(POLL_S)


def _answer(run_dir: Path, request: Request) -> Answer:
    with contextlib.suppress(OSError, ValueError):
        answer = _read(run_dir / FOLDER / ANSWER, Answer)
        if answer.id == request.id:
            return answer
    return Answer(id=request.id)


def _withdraw(run_dir: Path, request: Request) -> None:
    path = run_dir / FOLDER / REQUEST
    with contextlib.suppress(OSError, ValueError):
        if _read(path, Request).id == request.id:
            path.unlink()


# --------------------------------------------------------------------------------------------------------------------
# Files


def _read(path: Path, kind: type[M]) -> M:
    """Raises OSError, or ValueError for what does not fit."""
    return kind.model_validate(parse_json(read_regular(path, MAX_BYTES, follow=False)))


def _write(path: Path, message: BaseModel) -> None:
    """A file that was not there before: whatever has its name already is not opened."""
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(number, "w", encoding="utf-8") as file:
        file.write(message.model_dump_json())


def _replace(path: Path, message: BaseModel) -> None:
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        _write(fresh, message)
        fresh.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise


def _clear(path: Path) -> None:
    """Makes a name free: what has it is removed, and a folder is moved beside it."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            path.rename(path.with_name(f".{path.name}.{secrets.token_hex(8)}"))
        else:
            path.unlink(missing_ok=True)
