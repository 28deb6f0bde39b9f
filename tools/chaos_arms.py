"""Faults that wait for whoever can commit them: files in a folder of the case, since those survive every death.

    arm     the one who injects puts <folder>/arms/<where>.<what>.<id> there
    claim   the process that is asked for such a fault takes it, exactly one does, and says so in strikes.jsonl
    curse   what must go wrong again when it is tried again (an answer that no judge survives) is remembered under its hash

``CHAOS_CASE`` names the folder in the environment of everything that belongs to a case. It is also how what is left of a case
is found afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

CASE = "CHAOS_CASE"
STRIKES, TIMELINE = "strikes.jsonl", "timeline.jsonl"


class Armed(NamedTuple):
    """A fault that this process has to commit now. what: the last part of its class, such as "flip"."""

    id: str
    what: str
    args: dict[str, Any]


def case() -> Path | None:
    """The folder, from this process's environment or its parent's: a judge may have been given a clean one."""
    if CASE in os.environ:
        return Path(os.environ[CASE])
    with contextlib.suppress(OSError):
        for entry in Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0"):
            if entry.startswith(CASE.encode() + b"="):
                return Path(entry.partition(b"=")[2].decode())
    return None


def arm(folder: Path, where: str, what: str, id: str, **args: Any) -> None:
    target = folder / "arms" / f"{where}.{what}.{id}"
    target.parent.mkdir(exist_ok=True)
    beside = folder / f".{target.name}"
    beside.write_text(json.dumps(args))
    beside.rename(target)


def disarm(folder: Path, id: str) -> bool:
    """Whether it was still waiting."""
    for path in (folder / "arms").glob(f"*.{id}"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
            return True
    return False


def claim(where: str) -> Armed | None:
    """The first fault for ``where``, for this process alone."""
    folder = case()
    if folder is None:
        return None
    try:
        names = sorted(n for n in os.listdir(folder / "arms") if n.startswith(f"{where}."))  # noqa: PTH208
    except OSError:
        return None
    for name in names:
        taken = folder / "arms" / f".taken.{name}"
        with contextlib.suppress(FileNotFoundError):
            (folder / "arms" / name).rename(taken)
            _, what, id = name.split(".", 2)
            return Armed(id, what, json.loads(taken.read_text()))
    return None


def append(path: Path, row: dict[str, Any]) -> None:
    """One line, in one write, on disk before this returns: the writer may be about to die."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(row) + "\n").encode())
        os.fsync(handle)
    finally:
        os.close(handle)


def strike(id: str, folder: Path | None = None, **more: Any) -> None:
    """The fault happens now."""
    folder = folder or case()
    assert folder is not None
    append(folder / STRIKES, {"id": id, "t": time.time(), "pid": os.getpid(), **more})


def rows(path: Path) -> list[dict[str, Any]]:
    """Whole lines."""
    out = []
    with contextlib.suppress(FileNotFoundError):
        for text in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                out.append(json.loads(text))
    return out


# --------------------------------------------------------------------------------------------------------------------
# Curses


def curse(kind: str, *of: Any) -> None:
    folder = case()
    assert folder is not None
    (folder / "cursed").mkdir(exist_ok=True)
    (folder / "cursed" / _hash(*of)).write_text(kind)


def curse_of(*of: Any) -> str:
    folder = case()
    try:
        return (folder / "cursed" / _hash(*of)).read_text() if folder else ""
    except OSError:
        return ""


def _hash(*of: Any) -> str:
    return hashlib.sha256(repr(of).encode()).hexdigest()[:24]


# --------------------------------------------------------------------------------------------------------------------
# In the middle of a checkpoint


class FileTrap:
    """Strikes at the n-th time that this process opens, renames, makes or removes something below a folder ``checkpoints``:
    SIGKILL to itself, or an error as of a full disk. where: what it claims."""

    _EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "shutil.copytree")

    def __init__(self, where: str) -> None:
        self.where = where
        self._armed: Armed | None = None
        self._left = 0
        self._inside = False
        sys.addaudithook(self._see)

    def _see(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in self._EVENTS or self._inside or not arguments:
            return
        path = arguments[0]
        if not isinstance(path, str | bytes | os.PathLike) or "/checkpoints/" not in os.fsdecode(path):
            return
        if event == "open" and not _writes(arguments):
            return
        self._inside = True
        try:
            self._count(event, os.fsdecode(path))
        finally:
            self._inside = False

    def _count(self, event: str, path: str) -> None:
        if self._armed is None:
            self._armed = claim(self.where)
            self._left = self._armed.args.get("n", 0) if self._armed else 0
        if self._armed is None:
            return
        self._left -= 1
        if self._left >= 0:
            return
        armed, self._armed = self._armed, None
        strike(armed.id, at=f"{event} {path.rpartition('/checkpoints/')[2]}")
        if armed.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)


def _writes(arguments: tuple[Any, ...]) -> bool:
    """Whether an ``open`` is for writing, or of a folder or file that is about to be synced."""
    mode, flags = arguments[1], arguments[2] if len(arguments) > 2 else 0
    if isinstance(mode, str):
        return any(letter in mode for letter in "wax+")
    return isinstance(flags, int) and (flags & os.O_ACCMODE != os.O_RDONLY or mode is None)
