"""Ends the processes of a vLLM engine together with the generator that started them, however it went.

vLLM pickles its configuration into each process that it starts. A ``Lifeline`` inside runs ``hold_on`` where it is
unpickled, before anything else of vLLM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 1.0


class Lifeline(str):
    """A text, for what else is done with a configuration. The process that unpickles it, if it is a child of the one that
    pickled it, dies with its parent: with the thread that started it, to be exact."""

    __slots__ = ()

    def __reduce__(self) -> tuple[Callable[[str, int], Any], tuple[str, int]]:
        return hold_on, (str(self), os.getpid())


def hold_on(text: str, parent: int = 0) -> Lifeline:
    """Ties this process to ``parent``, where that is its parent: on Linux by the kernel, so that it dies even while it is
    stopped. Must be called in the main thread."""
    if os.getppid() == parent:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:  # it died meanwhile, and the kernel was not asked yet
                os.kill(os.getpid(), signal.SIGKILL)
        else:
            threading.Thread(target=_follow, args=(parent,), name="die-with-parent", daemon=True).start()
    return Lifeline(text)


def _follow(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os.kill(os.getpid(), signal.SIGKILL)
