"""A verifier worker process: ``python -m hapo_async.verify.worker PARENT_PID``, started and killed by ``verify.process``.

Frames in: ``{"name", "path", "timeout_s", "token"}`` once, then ``{"items": [[prompt, response, truth, extra], ...]}``.
Frames out: ``{"ready": true}``; ``{"loading": bool}`` around slow imports, which do not count against a judgement's
deadline; one ``{"verdict", "reward", "components", "seconds", "detail", "fault"}`` per item, in order.

The pipes are moved to private descriptors before any plug-in is imported, and descriptor 1 is pointed at standard
error: whatever a plug-in prints cannot corrupt the stream. The process dies with its parent, its children with it; its
limits (``verify.fences``) hold from the moment it is ready.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
from typing import Any

from hapo_async.errors import ConfigError
from hapo_async.verify import fences, is_plugin, judge_text, plugin, resolve, symbolic, wire

_PR_SET_PDEATHSIG = 1
_CPU_SHARE = 2.0  # processor seconds per second of the deadline: a plug-in may have threads


def main(parent_pid: int) -> None:
    _die_with(parent_pid)
    source, sink = _private_pipes()
    decoder = wire.Decoder()
    name, cpu_s = "", 0.0

    def loading(starts: bool) -> None:
        wire.write_all(sink, wire.encode({"loading": starts}))
        fences.allow_cpu(cpu_s + (600.0 if starts else 0.0))

    symbolic.loading_hook = loading
    while data := os.read(source, 1 << 20):
        for message in decoder.feed(data):
            if "items" not in message:
                name, cpu_s = message["name"], _CPU_SHARE * message["timeout_s"]
                _start(name, message["path"], message["token"], sink)
            for prompt, response, truth, extra in message.get("items", ()):
                fences.allow_cpu(cpu_s)
                wire.write_all(sink, wire.encode(_judge(name, prompt, response, truth, extra)))


def _start(name: str, path: list[str], token: str, sink: int) -> None:
    sys.path += [entry for entry in path if entry not in sys.path]
    if is_plugin(name):
        fences.watch_over(token)
    try:
        resolve(name)
    except ConfigError as error:
        wire.write_all(sink, wire.encode({"ready": False, "detail": str(error)}))
        return
    if is_plugin(name):
        fences.confine(plugin.memory_bytes(name, fences.PLUGIN_MEMORY_BYTES), fences.MOST_PROCESSES)
    else:
        fences.confine(fences.BUILTIN_MEMORY_BYTES, 0)
    wire.write_all(sink, wire.encode({"ready": True}))


def _judge(name: str, prompt: str, response: str, truth: Any, extra: Any) -> dict[str, Any]:
    try:
        judgement = judge_text(name, prompt, response, truth, extra)
    except BaseException as error:  # SystemExit and Math-Verify's TimeoutException too: the judge crashed
        return {"verdict": "crash", "detail": f"{type(error).__name__}: {error}"[:500]}
    return {
        "verdict": str(judgement.verdict),
        "reward": judgement.reward,
        "components": dict(judgement.components),
        "seconds": judgement.seconds,
        "detail": judgement.detail,
        "fault": str(judgement.fault),
    }


def _die_with(parent_pid: int) -> None:
    """Linux kills this process when the thread that started it ends; elsewhere end-of-file on the pipe does it."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _private_pipes() -> tuple[int, int]:
    source, sink = os.dup(0), os.dup(1)  # not inherited by children of a plug-in
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    os.dup2(2, 1)
    return source, sink


if __name__ == "__main__":
    main(int(sys.argv[1]))
