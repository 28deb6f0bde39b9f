"""A process that holds a lifeline dies with its parent, even while it stands still; one without it does not. So nothing is left
of a killed generator: the last test of those that share generators, since it ends them."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from actors.vllm_lifeline import Lifeline
from tests.actors.serving import KINDS

KILLED_S = 15
PARENT = """
import multiprocessing, os, sys, time
from actors.vllm_lifeline import Lifeline

def child(held):
    print(os.getpid(), flush=True)
    time.sleep(30)

if __name__ == "__main__":
    held = Lifeline("x") if sys.argv[1] == "held" else "x"
    multiprocessing.get_context("spawn").Process(target=child, args=(held,)).start()
    time.sleep(30)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
@pytest.mark.parametrize("holds", [True, False])
def test_a_stopped_child_dies_with_its_parent(tmp_path, holds: bool):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    command = [sys.executable, str(script), "held" if holds else "loose"]
    here = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=here)
    child = psutil.Process(int(parent.stdout.readline()))
    try:
        os.kill(child.pid, signal.SIGSTOP)
        parent.kill()
        parent.wait(10)
        _, alive = psutil.wait_procs([child], timeout=10 if holds else 1)
        assert bool([p for p in alive if p.status() != psutil.STATUS_ZOMBIE]) is not holds
    finally:
        parent.kill()
        if child.is_running():
            child.kill()


def test_in_any_other_process_it_is_a_text():
    again = pickle.loads(pickle.dumps(Lifeline("held")))  # lint: allow unpickle because it was pickled in this line
    assert again == "held" and type(again) is Lifeline


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_generator_leaves_no_process_even_where_its_engine_stands_still(generators, kind: str):
    served = generators.served(kind)
    family = [psutil.Process(served.pid), *psutil.Process(served.pid).children(recursive=True)]
    expected = {"transformers": 0, "vllm": 1, "vllm of two ranks": 3}  # the engine's core, and ranks of their own
    assert len(served.engine_pids) == expected[kind] and {*served.engine_pids} <= {p.pid for p in family}
    generators.gone(kind)
    for pid in served.engine_pids:
        os.kill(pid, signal.SIGSTOP)
    os.kill(served.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=KILLED_S)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []
