"""Ends the processes of a vLLM engine together with the generator that started them, however it went.

vLLM pickles its configuration into each process that it starts. A ``Lifeline`` inside runs ``hold_on`` where it is
unpickled, before anything else of vLLM.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_held: list[threading.Thread] = []


class Lifeline(str):
    """A text, for what else is done with a configuration, that ties the process that unpickles it to its parent."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return hold_on, (str(self),)


def hold_on(text: str = "") -> Lifeline:
    """In a process that ``multiprocessing`` started: it dies with its parent, even while it is stopped (on Linux; elsewhere
    as soon as it runs). In any other process this does nothing. Must be called in the main thread."""
    parent = multiprocessing.parent_process()
    if parent is not None and not _held:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        _held.append(threading.Thread(target=_follow, args=(parent,), name="die-with-parent", daemon=True))
        _held[0].start()
    return Lifeline(text)


def _follow(parent: Any) -> None:
    """Also where the parent was gone before this process asked the kernel to be told."""
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
