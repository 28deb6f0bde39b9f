"""Lines for a file that others read while it grows, on a disk that may be full for a while."""

from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path

log = logging.getLogger(__name__)

MOST_WAITING = 16 << 20  # bytes


class Appender:
    """Appends whole lines to a file. While the disk takes none they wait in memory, at most MOST_WAITING bytes of them, and
    are written with the first one that it takes again; it is said once when that begins and once when it is over. Threads
    may share it."""

    def __init__(self, path: Path) -> None:
        """Raises OSError when the file cannot be opened."""
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self._waiting = b""
        self._lock = threading.Lock()
        self._lost = 0
        self._failing = False
        self.closed = False

    def add(self, line: str) -> None:
        """A line without its end."""
        data = line.encode("utf-8", "surrogatepass") + b"\n"
        with self._lock:
            if len(self._waiting) + len(data) > MOST_WAITING:
                self._lost += 1
            else:
                self._waiting += data
            self._write()

    def sync(self) -> None:
        """Everything that was added is on disk for good, or OSError is raised."""
        with self._lock:
            if self.closed:
                return
            self._write()
            if self._waiting:
                raise OSError(errno.ENOSPC, "it cannot be written", str(self.path))
            handle = os.dup(self._file)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def close(self) -> None:
        with self._lock:
            if self.closed:
                return
            self._write()
            self.closed = True
            if self._waiting:
                log.error("%s ends without its last lines: %d", self.path, self._waiting.count(b"\n") + self._lost)
            try:
                os.fsync(self._file)
            except OSError as error:
                log.error("%s: %s", self.path, error.strerror)
            os.close(self._file)

    def _write(self) -> None:
        if self.closed:  # the descriptor is somebody else's by now
            return
        try:
            while self._waiting:
                self._waiting = self._waiting[os.write(self._file, self._waiting) :]
        except OSError as error:
            if not self._failing:
                self._failing = True
                log.error("%s cannot be written: %s; its lines wait in memory", self.path, error.strerror)
            return
        if self._failing:
            self._failing = False
            log.error("%s is written again; lines lost: %d", self.path, self._lost)
