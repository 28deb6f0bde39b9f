"""Ends what a run has started, when its driver dies without a word: killed, out of memory, crashed.

    driver ── lines ──► guardian      a small process in a session of its own, started before Ray, deaf to the terminal
                           │          waits for a line, for the end of the pipe, and for the end of the driver
                           ▼
    Ray, actors, engines, workers     SIGKILL (to stopped ones too), where no ``bye`` came before the end

Its prey on this node: processes that the driver named with their start times; those whose environment holds the driver's
marker ``HAPO_RUN``, whoever their parent is by now; and the descendants of both, at that moment or when it looked before.
Ray passes the marker on, from the Ray that the driver starts to all that it starts, or to the actors of a job on a cluster
that was there before. So other runs and another one's Ray are never touched. Two exceptions: whoever joins the Ray of another
driver goes down with it, and a process that only tidies up (multiprocessing's resource tracker) has ``TIDY_S`` to do so by
itself.

Only the standard library is imported here: ``python -I -S hapo_async/guardian.py`` is up in a few hundredths of a second.
It needs Linux (``/proc``); elsewhere nothing is started, and Ray's own supervision has to do.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

MARKER = "HAPO_RUN"
LIMIT_S = 15.0
"""The cleaning takes no longer, whatever is left."""
QUIET_S = 1.0  # as long as nothing new turns up: one that was just being forked does by then
ROUND_S = 0.05
TIDY_S = 2.0
TIDIES = b"from multiprocessing.resource_tracker import main"
BYE = b"bye\n"
CENSUS_S = 0.5
"""How often it looks who belongs to the run while the driver lives. Ray's processes write their titles over their environments,
and the one that started them may die together with the driver: afterwards neither would tell."""
SHARE = 50
"""A node may have very many processes: a look is followed by so many times as long without one."""
_GONE_S = 5.0


class Process(NamedTuple):
    """As it was seen. started: clock ticks since the machine came up; with the pid it is unique."""

    pid: int
    parent: int
    state: str
    started: int


def look(pid: int) -> Process | None:
    """None where there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  (pathlib takes as long to import as all the rest)
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return Process(pid, int(fields[1]), fields[0].decode(), int(fields[19]))


def everyone() -> dict[int, Process]:
    """All processes of this node that are there, dead ones that nobody has waited for left out."""
    found = (look(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    return {p.pid: p for p in found if p is not None and p.state not in "ZX"}


def carries(pid: int, marker: str) -> bool:
    """Whether a process was started with this marker in its environment."""
    return f"{MARKER}={marker}".encode() in _read(pid, "environ").split(b"\0")


def _read(pid: int, name: str) -> bytes:
    try:
        with open(f"/proc/{pid}/{name}", "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:  # gone, or another user's
        return b""


def prey(marker: str, told: Mapping[int, int], spared: Iterable[int]) -> list[Process]:
    """Who is to end now. told: start time by pid."""
    there = everyone()
    children: dict[int, list[int]] = {}
    for p in there.values():
        children.setdefault(p.parent, []).append(p.pid)
    found, left = set(spared), []
    stack = [pid for pid, p in there.items() if told.get(pid) == p.started or carries(pid, marker)]
    while stack:
        pid = stack.pop()
        if pid not in found:
            found.add(pid)
            left.append(there[pid])
            stack += children.get(pid, ())
    return left


def end(process: Process) -> bool:
    """SIGKILL to exactly this process and to none that has its pid by now. Returns whether it was there."""
    try:
        handle = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return False
    except (OSError, AttributeError):  # an old kernel: there is a moment between the look and the signal
        if not _is_same(process):
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)
        return True
    try:
        if not _is_same(process):
            return False
        with contextlib.suppress(ProcessLookupError, PermissionError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        return True
    finally:
        os.close(handle)


def _is_same(process: Process) -> bool:
    now = look(process.pid)
    return now is not None and now.started == process.started


# ----------------------------------------------------------------------------------------------------------------------
# The driver's side


def marker() -> str:
    """This process's own. A fork has another one."""
    return _marker_of(os.getpid())


@functools.cache
def _marker_of(pid: int) -> str:
    return f"{pid}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def marked() -> Iterator[None]:
    """What is started inside carries this process's marker, and passes it on."""
    before = os.environ.get(MARKER)
    os.environ[MARKER] = marker()
    try:
        yield
    finally:
        del os.environ[MARKER]
        if before is not None:
            os.environ[MARKER] = before


class Guardian:
    """The driver's handle: a guardian process lives as long as this is open, and acts when the driver ends before it is
    closed. run_dir: where it leaves a line in ``events.jsonl``."""

    def __init__(self, run_dir: str | os.PathLike[str] | None = None) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe = -1
        me = look(os.getpid())
        if me is None:
            return
        folder = os.path.abspath(run_dir) if run_dir is not None else ""  # noqa: PTH100
        command = [sys.executable, "-I", "-S", __file__, str(me.pid), str(me.started), marker(), folder]
        ear, self._pipe = os.pipe()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=ear,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={key: value for key, value in os.environ.items() if key != MARKER},
                start_new_session=True,
            )
        except BaseException:
            os.close(self._pipe)
            raise
        finally:
            os.close(ear)

    @property
    def pid(self) -> int | None:
        """Of its process, where there is one."""
        return self._process.pid if self._process else None

    def tell(self, pids: Iterable[int]) -> None:
        """These belong to the run, marked or not."""
        there = [p for p in map(look, pids) if p is not None]
        self._say(b"".join(b"pid %d %d\n" % (p.pid, p.started) for p in there))

    def close(self) -> None:
        """All is well: it ends, and touches nothing. May be called again."""
        if self._process is None:
            return
        self._say(BYE)
        os.close(self._pipe)
        process, self._process = self._process, None
        try:
            process.wait(_GONE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _say(self, text: bytes) -> None:
        if self._process is not None and text:
            with contextlib.suppress(BrokenPipeError):  # somebody has ended it
                os.write(self._pipe, text)

    def __enter__(self) -> Guardian:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ----------------------------------------------------------------------------------------------------------------------
# Its own side


def main(driver: int, started: int, mark: str, folder: str) -> None:
    """Until the driver says ``bye`` or ends."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    told: dict[int, int] = {}
    spared = (os.getpid(), driver, 1)
    if _listen(0, driver, started, told, lambda: _remember(mark, told, spared)):
        return
    began = time.monotonic()
    ended, left = clean(mark, told, spared)
    if folder and (ended or left):
        _leave_word(folder, driver, ended, left, time.monotonic() - began)


def _remember(mark: str, told: dict[int, int], spared: Iterable[int]) -> None:
    """Whoever belongs to the run now, and nobody who has ended."""
    there = {p.pid: p.started for p in prey(mark, told, spared)}
    told.clear()
    told.update(there)


def _listen(pipe: int, driver: int, started: int, told: dict[int, int], census: Callable[[], None]) -> bool:
    """Whether the driver has said goodbye. told: gets start times by pid, as they come. census: called now and then."""
    poller = select.poll()
    poller.register(pipe, select.POLLIN)
    death = _death(driver)
    if death is not None:
        poller.register(death, select.POLLIN)
    heard, due = b"", 0.0
    while True:
        ready = {handle for handle, _ in poller.poll(1000 * CENSUS_S)}
        there = look(driver)
        is_dead = death in ready or there is None or there.started != started or there.state in "ZX"
        if pipe in ready:
            new = os.read(pipe, 1 << 16)
            *lines, heard = (heard + new).split(b"\n")
            if any(_take(line, told) for line in lines):
                return True
            if not new:
                return False
        elif is_dead:  # whoever holds the pipe still is not the driver
            return False
        if not is_dead and (began := time.monotonic()) >= due:
            census()
            ended = time.monotonic()
            due = ended + max(CENSUS_S / 2, SHARE * (ended - began))


def _death(pid: int) -> int | None:
    """Something to poll that becomes readable when the process ends."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def _take(line: bytes, told: dict[int, int]) -> bool:
    """One line of the driver; True where it is the last one."""
    if match := re.fullmatch(rb"pid (\d{1,10}) (\d{1,20})", line):
        told[int(match[1])] = int(match[2])
    return line == BYE.strip()


def clean(mark: str, told: Mapping[int, int], spared: Iterable[int]) -> tuple[int, list[int]]:
    """Ends them all. Returns how many were ended, and the pids that are still there after ``LIMIT_S``."""
    began = quiet = time.monotonic()
    ended: set[Process] = set()
    while True:
        found, now = prey(mark, told, spared), time.monotonic()
        if not found and now - quiet >= QUIET_S:
            return len(ended), []
        if now - began >= LIMIT_S:
            return len(ended), [p.pid for p in found]
        if found:
            quiet = now
        due = [p for p in found if now - began >= TIDY_S or TIDIES not in _read(p.pid, "cmdline")]
        ended |= {Process(p.pid, 0, "", p.started) for p in due if end(p)}
        time.sleep(ROUND_S)


def _leave_word(folder: str, driver: int, ended: int, left: list[int], seconds: float) -> None:
    """A line in the run's events, at the step that the same command will go on from."""
    text = f"the driver (pid {driver}) died; its guardian ended {ended} processes of the run within {seconds:.1f} s"
    text += f", and could not end {left}" if left else ""
    with contextlib.suppress(OSError):  # a full disk, a folder that is gone
        saved = [name[5:] for name in os.listdir(os.path.join(folder, "checkpoints")) if name.startswith("step-")]  # noqa: PTH118, PTH208
        row = {
            "step": max((int(number) for number in saved if number.isdigit()), default=0),
            "time": time.time(),
            "kind": "cleaned",
            "label": "driver died",
            "text": text,
        }
        with open(os.path.join(folder, "events.jsonl"), "a+b") as file:  # noqa: PTH118, PTH123
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = size and file.read(1) != b"\n"  # the driver's last line
            file.write((b"\n" if torn else b"") + json.dumps(row).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
