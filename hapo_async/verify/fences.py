"""What a worker process may use, set by itself once its verifier is loaded: memory, processor time, files, processes.

The wall-clock deadline of ``verify.process`` is the first line; these are the second. Memory counts from what the worker
holds after its imports, so that a plug-in that loads a lot there still works. A limit that the platform does not know is
left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import resource
import signal
import time
from pathlib import Path

GIB = 1 << 30
BUILTIN_MEMORY_BYTES = GIB  # sympy and its caches take a fifth of it
PLUGIN_MEMORY_BYTES = 4 * GIB
MOST_FILE_BYTES = GIB
MOST_FILES = 1024
MOST_PROCESSES = 256
"""Of a plug-in's worker, its children included. The kernel enforces it except for root; the pool looks as well."""


def confine(memory_bytes: int | None, processes: int) -> None:
    """memory_bytes: beyond what is held now, None for no limit; processes: that may be started."""
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_FSIZE, MOST_FILE_BYTES)
    _limit(resource.RLIMIT_NOFILE, MOST_FILES)
    if memory_bytes is not None and (held := _held_bytes()):
        _limit(resource.RLIMIT_AS, held + memory_bytes)
    if os.geteuid():
        _limit(resource.RLIMIT_NPROC, _own_tasks() + processes if processes else 0)


def allow_cpu(seconds: float) -> None:
    """From now on the process may use about that much processor time; then SIGXCPU ends it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _limit(kind: int, value: int) -> None:
    """Lowers soft and hard limit; never raises one."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value, value))


def _held_bytes() -> int:
    """Address space of this process; 0 where that cannot be read."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (OSError, ValueError, IndexError):
        return 0


def _own_tasks() -> int:
    """Threads of this user on the machine: what RLIMIT_NPROC counts."""
    count = 0
    for entry in _processes():
        with contextlib.suppress(OSError):
            if entry.stat().st_uid == os.geteuid():
                count += sum(1 for _ in (entry / "task").iterdir())
    return count


# --------------------------------------------------------------------------------------------------------------------
# Children

MARK = "HAPO_VERIFIER_WORKER"
"""Environment variable that a worker's children inherit, whatever process group they move to."""
_SWEEP_S = 5.0
_LOOK_S = 1.0
_PR_SET_PDEATHSIG = 1


def watch_over(token: str) -> None:
    """Starts a small process that outlives this one by a moment and kills whatever it has started: however this one ends,
    SIGKILL included. To be called before anything large is imported and before any thread is started."""
    worker = os.getpid()
    if os.fork():
        return
    try:
        os.setsid()
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        os.closerange(0, 256)  # the pool must see the end of the worker's pipes
        _signal_at_parents_end()
        while os.getppid() == worker:
            signal.sigtimedwait([signal.SIGTERM], _LOOK_S)
        sweep(worker, token)
    finally:
        os._exit(0)


def _signal_at_parents_end() -> None:
    """SIGTERM, blocked so that it can be waited for; where there is no such thing, looking now and then must do."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def sweep(group: int, token: str) -> None:
    """Kills a process group and every process that carries the token."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(group, signal.SIGKILL)
    end = time.monotonic() + _SWEEP_S
    while (found := _carriers(token)) and time.monotonic() < end:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def _carriers(token: str) -> list[int]:
    """Live processes with the token in their environment, this one aside."""
    wanted, found = f"{MARK}={token}".encode(), []
    for entry in _processes():
        with contextlib.suppress(OSError), (entry / "environ").open("rb") as file:
            if entry.name != str(os.getpid()) and wanted in file.read(1 << 17).split(b"\0"):
                found.append(int(entry.name))
    return found


def session_size(leader: int) -> int:
    """Processes in the session that ``leader`` leads; 0 where that cannot be read."""
    count = 0
    for entry in _processes():
        with contextlib.suppress(OSError, ValueError, IndexError):
            count += int((entry / "stat").read_bytes().rsplit(b")", 1)[1].split()[3]) == leader
    return count


def has_children(pid: int) -> bool:
    """Whether a process has any besides the one that watches over it."""
    try:
        return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()) > 1
    except OSError:
        return False


def _processes() -> list[Path]:
    try:
        return [entry for entry in Path("/proc").iterdir() if entry.name.isdigit()]
    except OSError:
        return []
