"""A judge that misbehaves when a case of ``chaos.py`` asks for it: the built-in exact match else."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

if str(Path(__file__).parent) not in sys.path:
    sys.path.append(str(Path(__file__).parent))

import chaos_arms

from hapo_async.types import Verdict
from hapo_async.verify import boxed

NAME = "tools.chaos_verifier:verify"
WORKER_MEMORY_BYTES = 512 << 20
"""A worker's limit beyond its import: four bombs at once must fit into a small machine."""
PIECE, MOST = 64 << 20, 4 << 30
"""Bytes that a memory bomb takes at once, and where it gives up: a limit that fails is seen as a judgement too late."""


def verify(prompt: str, response: str, truth: object) -> float:
    """1 or 0. An answer that an armed fault has met misbehaves each time that it is judged, except where the fault says
    ``once``."""
    kind = chaos_arms.curse_of(prompt, response)
    if not kind and (armed := chaos_arms.claim("verdict")):
        kind = armed.what
        if not armed.args.get("once"):
            chaos_arms.curse(kind, prompt, response)
        chaos_arms.strike(armed.id, once=bool(armed.args.get("once")))
    return misbehave(kind) if kind else float(boxed.verdict(response, truth) is Verdict.CORRECT)


def misbehave(kind: str) -> float:
    if kind == "exit":
        os._exit(3)
    if kind == "segv":
        ctypes.string_at(0)
    if kind == "bomb":
        held = []
        while len(held) * PIECE < MOST:
            held.append(bytearray(os.urandom(1) * PIECE))
    if kind in ("nan", "inf"):
        return float(kind)
    while kind == "spin":
        pass
    time.sleep(1e6)
    return 0.0
