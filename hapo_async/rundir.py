"""The run folder: one driver at a time, and the files that others read while the run goes on."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import yaml

from hapo_async.config import Config, to_yaml
from hapo_async.errors import ConfigError, RunError
from hapo_async.files import replace_whole
from hapo_async.secrets import redact

log = logging.getLogger(__name__)

LOCK = ".lock"
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
LOCK_TRIES = 20  # another driver, whose run is refused, may remove the folder while this one enters it


class RunDir:
    """Owns ``run.dir`` while open: a lock file keeps a second driver out.

    Use as a context manager. Raises ConfigError when another driver holds the folder. A folder that it made and that nothing
    was written to is removed again.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.dir or "runs/run").resolve()
        self._config = config
        self._lock: IO[str] | None = None
        self._made = False
        self._status_fails = False
        self.seen_incarnation = 0  # of the checkpoint that the run goes on from

    def __enter__(self) -> RunDir:
        self._made = not self.path.exists()
        self._lock = _lock(self.path)
        if self._config.run.resume == "never" and any(p.name != LOCK for p in self.path.iterdir()):
            # Moved while its lock is held: never the folder of a run that goes on.
            with self._lock:
                _set_aside(self.path)
            self._lock = _lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock:
            with contextlib.suppress(OSError):
                self._lock.truncate(0)
            if self._made and [p.name for p in self.path.iterdir()] == [LOCK]:  # a run that was refused
                (self.path / LOCK).unlink()
                with contextlib.suppress(OSError):  # somebody else begins there at this moment
                    self.path.rmdir()
            self._lock.close()

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def has_metrics(self) -> bool:
        metrics = self.path / "metrics.jsonl"
        return metrics.exists() and metrics.stat().st_size > 0

    def next_incarnation(self) -> int:
        """Counts the starts of this run, durably: a restart never reuses a version, whatever it resumes from."""
        path = self.path / "incarnation"
        last = int(path.read_text()) if path.exists() else 0
        number = max(last, self.seen_incarnation) + 1
        replace_whole(path, str(number))
        return number

    def write_config(self) -> None:
        replace_whole(self.path / "config.yaml", to_yaml(self._config), durable=False)

    def read_config(self) -> dict[str, Any]:
        """The configuration of the run that the folder holds, as plain data; empty where there is none to read."""
        try:
            tree = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, yaml.YAMLError):
            return {}
        return tree if isinstance(tree, dict) else {}

    def write_status(self, status: dict[str, Any]) -> None:
        """What ``hapo-async status`` prints; replaced whole, so that a reader never sees half of it. A disk that is full costs
        the reader news and not the run: that is said once."""
        try:
            text = json.dumps({"time": time.time(), "pid": os.getpid(), **status})
            replace_whole(self.path / "status.json", redact(text), durable=False)
            self._status_fails = False
        except OSError as error:
            if not self._status_fails:
                log.error("%s cannot be written: %s", self.path / "status.json", error.strerror)
            self._status_fails = True


@contextlib.contextmanager
def in_words(path: Path) -> Iterator[None]:
    """Inside, a disk that takes nothing is a RunError that says so, wherever nothing else can be done about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise RunError(
            f"run.dir={str(path)!r} cannot be written: {error.strerror} ({error.filename}). Make room or make it writable, then "
            "the same command continues."
        ) from error


def _lock(path: Path) -> IO[str]:
    """Opens and locks the folder's lock file. Raises ConfigError when another driver holds it."""
    for _ in range(LOCK_TRIES):
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / LOCK).open("a+")
        except OSError as error:
            if path.is_dir() or not isinstance(error, FileNotFoundError):
                raise ConfigError(
                    f"run.dir={str(path)!r} cannot be used: {error.strerror}. Give another run.dir."
                ) from None
            continue
        _own(lock, path)
        if _is_at(lock, path / LOCK):
            return lock
        lock.close()
    raise ConfigError(
        f"run.dir={str(path)!r} cannot be used: it cannot be made, or is removed again. Give another run.dir."
    )


def _own(lock: IO[str], path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise ConfigError(
            f"run.dir={str(path)!r} is in use by the driver with pid {holder}. Wait for it, or give another run.dir."
        ) from None
    with contextlib.suppress(OSError):  # on a full disk nobody learns the pid; the lock holds all the same
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), str(os.getpid()).encode())


def _is_at(file: IO[str], path: Path) -> bool:
    """Whether the open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _set_aside(path: Path) -> None:
    """Moves a run folder to the next free name.N; nothing is ever deleted."""
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(target)
