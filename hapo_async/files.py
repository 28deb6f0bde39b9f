"""Reading files of which somebody else may have decided what they are and what is in them, and writing them whole."""

from __future__ import annotations

import errno
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)


def open_regular(path: Path, follow: bool = True) -> IO[bytes]:
    """A regular file, for reading. follow: also behind a symbolic link. Never waits: a pipe, a socket, a device or a folder is
    an OSError."""
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | (0 if follow else os.O_NOFOLLOW)
    number = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(number, "rb")


def read_regular(path: Path, most: int, follow: bool = True) -> bytes:
    """The whole file. Raises OSError, and ValueError where it is larger than ``most`` bytes."""
    with open_regular(path, follow) as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise ValueError(f"it is larger than {most} bytes")
    return data


def parse_json(data: bytes | str) -> Any:
    """Plain data. Raises ValueError, whatever is wrong: also for what is nested too deeply."""
    try:
        return json.loads(data)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def json_line(row: Any, default: Callable[[Any], Any] | None = None) -> str:
    """One line of JSON that can be written as UTF-8, whatever texts are in it. default: of ``json.dumps``."""
    line = json.dumps(row, ensure_ascii=False, default=default)
    try:
        line.encode("utf-8")
    except UnicodeEncodeError:  # halves of characters, which JSON can spell and UTF-8 cannot
        line = json.dumps(row, default=default)
    return line + "\n"


def append_row(path: Path, row: Any) -> None:
    """One more line of JSON. A disk that is full costs that line, which is logged, and nothing else; what another one has cut
    short before is a line of its own."""
    try:
        with path.open("a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            is_torn = bool(size) and file.read(1) != b"\n"
            file.write(b"\n" * is_torn + json_line(row).encode())
    except OSError as error:
        log.error("%s cannot be written: %s", path, error.strerror)


def replace_whole(path: Path, content: str | bytes, durable: bool = True, apart: str = "") -> None:
    """Replaces a file, or leaves it as it is and raises OSError. durable: on disk for good when this returns. apart: tells the
    new file from those of others who may replace the same one."""
    beside = path.with_name(f".{path.name}{apart}.writing")
    with beside.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    beside.replace(path)
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """fsync of a file or folder. Folders of file systems that cannot do it are passed over."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):
            raise
    finally:
        os.close(handle)
