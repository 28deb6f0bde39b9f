"""A reward function that does to its worker what an answer tells it: for ``tools/hostile_corpus.py``."""

from __future__ import annotations

import ctypes
import os
import signal
import time

WORKER_MEMORY_BYTES = 512 << 20
DEEDS = ("spin", "busy", "bomb", "segfault", "exit", "abort", "stop", "fork")


def verify(prompt: str, response: str, truth: str) -> float:
    """1 for an answer that is no deed."""
    if response == "spin":
        ctypes.CDLL(None).sleep(3600)
    while response == "busy":
        pass
    if response == "bomb":
        held = []
        while True:
            held.append(bytearray(64 << 20))
    if response == "segfault":
        ctypes.string_at(0)
    if response == "exit":
        os._exit(0)
    if response == "abort":
        os.abort()
    if response == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if response == "fork":
        for _ in range(8):
            if not os.fork():
                time.sleep(3600)
        time.sleep(3600)
    return 1.0
