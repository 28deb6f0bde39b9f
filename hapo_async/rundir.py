"""The run folder: one driver at a time, and the files that others read while the run goes on."""

from __future__ import annotations

import fcntl
import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from hapo_async.config import Config, to_yaml
from hapo_async.errors import ConfigError


class RunDir:
    """Owns ``run.dir`` while open: a lock file keeps a second driver out.

    Use as a context manager. Raises ConfigError when another driver holds the folder.
    """

    def __init__(self, config: Config) -> None:
        self.path = Path(config.run.dir or "runs/run").resolve()
        self._config = config
        self._lock: IO[str] | None = None

    def __enter__(self) -> RunDir:
        if self._config.run.resume == "never":
            _set_aside(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise ConfigError(
                f"run.dir={str(self.path)!r} is in use by the driver with pid {holder}. Wait for it, or give another run.dir."
            ) from None
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock:
            self._lock.truncate(0)
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

    def write_config(self) -> None:
        _replace(self.path / "config.yaml", to_yaml(self._config))

    def write_status(self, status: dict[str, Any]) -> None:
        """What ``hapo-async status`` prints; replaced whole, so that a reader never sees half of it."""
        _replace(self.path / "status.json", json.dumps({"time": time.time(), "pid": os.getpid(), **status}))


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.writing")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _set_aside(path: Path) -> None:
    """Moves an existing run folder to the next free name.N; nothing is ever deleted."""
    if not path.exists() or not any(path.iterdir()):
        return
    number = 1
    while (target := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(target)
