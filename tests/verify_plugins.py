"""Reward functions that tests plug into worker processes: well-behaved ones in every signature, and hostile ones."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WORKER_MEMORY_BYTES = 512 << 20
SLEEPER = [sys.executable, "-c", "import time; time.sleep(3600)"]


def ours(prompt, response, truth):
    return 1.0 if response == truth else 0.0


def positional(a, b, c):
    return float(b == c)


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "has_source": float(data_source == "aime")}


def trl(completions, answer, **columns):
    return [float(c == a) for c, a in zip(completions, answer, strict=True)]


def odd(x):
    return 1.0


def loud(prompt, response, truth):
    print("noise on standard output", flush=True)
    os.write(1, b"\x00\x00\x00\x05trash")
    return 1.0


def undecided(prompt, response, truth):
    return None


def not_a_number(prompt, response, truth):
    return float("nan")


def unreadable(prompt, response, truth):
    """Raises for every answer that is no number."""
    return float(float(response) == float(truth))


def naughty(prompt, response, truth):
    """Does what the answer says; an answer that says nothing is right. ``truth`` names a file where one is needed."""
    deed = DEEDS.get(str(response).partition(" ")[0])
    if deed:
        deed(truth)
    return 1.0


def by_truth(prompt, response, truth):
    """Does what the prompt's truth says, whatever the answer."""
    return naughty(prompt, truth, "") if truth in DEEDS else float(response == truth)


def outage(prompt, response, truth):
    """Works until the file that ``truth`` names is there."""
    if Path(truth).exists():
        time.sleep(3600)
    return 1.0


def _spin(_):
    for number in range(1, 32):
        try:
            signal.signal(number, signal.SIG_IGN)
        except OSError:
            continue
    ctypes.CDLL(None).sleep(3600)  # in C: no Python signal handler would ever run


def _busy(_):
    while True:
        pass


def _child(marker):
    child = subprocess.Popen(SLEEPER)
    Path(marker).write_text(str(child.pid))
    time.sleep(3600)


def _runaway(marker):
    """A child that has left the process group, then the worker's own end."""
    child = subprocess.Popen(SLEEPER, start_new_session=True)
    Path(marker).write_text(str(child.pid))
    os._exit(0)


def _fork(_):
    for _ in range(40):
        if not os.fork():
            time.sleep(3600)
    time.sleep(3600)


def _once(marker):
    """Fails the first time only."""
    if not Path(marker).exists():
        Path(marker).touch()
        os.abort()


def _raise(_):
    raise KeyError("no such thing")


def _bomb(_):
    held = []
    while True:
        held.append(bytearray(64 << 20))


def _memory_error(_):
    raise MemoryError


def _write(marker):
    with Path(marker).open("wb") as file:
        file.truncate(2 << 30)


def _files(_):
    kept = []
    while True:
        kept.append(Path(os.devnull).open())  # noqa: SIM115


DEEDS = {
    "spin": _spin,
    "busy": _busy,
    "child": _child,
    "runaway": _runaway,
    "fork": _fork,
    "once": _once,
    "raise": _raise,
    "bomb": _bomb,
    "memory": _memory_error,
    "write": _write,
    "files": _files,
    "exit": lambda _: sys.exit(3),
    "_exit": lambda _: os._exit(0),
    "abort": lambda _: os.abort(),
    "segfault": lambda _: ctypes.string_at(0),
    "killed": lambda _: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda _: os.kill(os.getpid(), signal.SIGSTOP),
}
