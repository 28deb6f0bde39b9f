"""What a driver has started ends soon after it, however it died; nothing else does. Every process here is a real one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hapo_async import guardian
from hapo_async.guardian import MARKER, Guardian

pytestmark = pytest.mark.skipif(guardian.look(os.getpid()) is None, reason="needs /proc")

WITHIN_S = 3.0
SLEEP = "import time; time.sleep(300)"
DRIVER = f"""
import json, os, subprocess, sys, time
from hapo_async import guardian
from hapo_async.guardian import Guardian

def start(code={SLEEP!r}, **more):
    return subprocess.Popen([sys.executable, "-S", "-c", code], **more)

PARENT = "import json, subprocess, sys, time; more = json.loads(sys.argv[1]); "
PARENT += "print(subprocess.Popen("
PARENT += "[sys.executable, '-S', '-c', {SLEEP!r}], stdout=subprocess.DEVNULL, **more).pid, flush=True); "
PARENT += "time.sleep(float(sys.argv[2]))"

def parent(seconds, **more):
    command = [sys.executable, "-S", "-c", PARENT, json.dumps(more), str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())

g = Guardian(sys.argv[1] or None)
stranger = start()  # neither marked nor told of
with guardian.marked():
    marked = start()
    stopped = start("import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
    deaf = start("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)", start_new_session=True)
    gone, orphan = parent(0, start_new_session=True)
    gone.wait()
    bare, grandchild = parent(300, env={{}})  # its child has another environment
told = start()
g.tell([told.pid])
held = os.fork()  # has the guardian's pipe, for ever
if not held:
    time.sleep(300)
pids = (g.pid, stranger.pid, marked.pid, stopped.pid, deaf.pid, orphan, bare.pid, grandchild, told.pid, held)
print(*pids, flush=True)
word = sys.stdin.readline().strip()
if word == "bye":
    g.close()
print("over", flush=True)
if word == "crash":
    os.abort()
time.sleep(300)
"""
NAMES = ("guardian", "stranger", "marked", "stopped", "deaf", "orphan", "bare", "grandchild", "told", "held")
OF_THE_RUN = ("marked", "stopped", "deaf", "orphan", "bare", "grandchild", "told")


class Driver:
    """A process that has started others. pids, started: of them, by ``NAMES``."""

    def __init__(self, run_dir: Path | str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(run_dir)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.pids = dict(zip(NAMES, map(int, self.process.stdout.readline().split()), strict=True))
        self.seen = {name: guardian.look(pid) for name, pid in self.pids.items()}

    def say(self, word: str) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        self.process.stdout.readline()

    def alive(self, *names: str) -> list[str]:
        now = guardian.everyone()
        return [n for n in names if (p := self.seen[n]) and p.pid in now and now[p.pid].started == p.started]

    def gone_within(self, seconds: float, *names: str) -> float:
        """How long until none of them was left."""
        began = time.monotonic()
        while left := self.alive(*names):
            assert time.monotonic() - began < seconds, f"{left} live on"
            time.sleep(0.02)
        return time.monotonic() - began

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for name in self.alive(*NAMES):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[name], signal.SIGKILL)


@pytest.fixture
def start():
    drivers: list[Driver] = []

    def begin(run_dir: Path | str = "") -> Driver:
        drivers.append(Driver(run_dir))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.close()


def test_nothing_of_a_killed_driver_is_left_whatever_state_it_is_in(start, tmp_path):
    (tmp_path / "checkpoints" / "step-40").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-5").mkdir()
    (tmp_path / "checkpoints" / ".step-45.writing").mkdir()
    (tmp_path / "events.jsonl").write_text('{"step": 41, "ti')  # the driver died while it wrote
    driver, neighbour = start(tmp_path), start()
    assert driver.alive(*NAMES) == list(NAMES) == neighbour.alive(*NAMES)
    driver.process.kill()
    driver.gone_within(WITHIN_S, *OF_THE_RUN)
    driver.gone_within(WITHIN_S, "guardian")  # which does not outlive its work
    assert driver.alive("stranger", "held") == ["stranger", "held"], "it ended what it did not know"
    assert neighbour.alive(*NAMES) == list(NAMES), "another run was touched"
    (_, line) = (tmp_path / "events.jsonl").read_text().splitlines()
    told = json.loads(line)
    assert (told["step"], told["kind"]) == (40, "cleaned")
    assert str(driver.process.pid) in told["text"] and f"ended {len(OF_THE_RUN)} processes" in told["text"]


def test_who_was_of_the_run_is_so_still_when_nothing_shows_it_any_more(start):
    """Ray's workers write their titles over their environments, and its raylet dies together with the driver."""
    driver = start()
    time.sleep(2 * guardian.CENSUS_S + 0.5)
    driver.process.send_signal(signal.SIGSTOP)
    os.kill(driver.pids["grandchild"], signal.SIGSTOP)
    os.kill(driver.pids["bare"], signal.SIGKILL)  # the only one that the grandchild can be known by
    driver.process.kill()
    driver.gone_within(WITHIN_S, *OF_THE_RUN, "guardian")


def test_a_crash_is_an_end_as_well(start):
    driver = start()
    driver.say("crash")
    driver.gone_within(WITHIN_S, *OF_THE_RUN, "guardian")


def test_after_a_goodbye_nothing_is_touched(start, tmp_path):
    driver = start(tmp_path)
    driver.say("bye")
    driver.gone_within(WITHIN_S, "guardian")
    driver.process.kill()
    time.sleep(0.5)
    assert driver.alive(*OF_THE_RUN) == list(OF_THE_RUN)
    assert not (tmp_path / "events.jsonl").exists()


def test_a_stopped_driver_is_not_dead(start):
    driver = start()
    driver.process.send_signal(signal.SIGSTOP)
    time.sleep(0.7)
    assert driver.alive(*NAMES) == list(NAMES)
    driver.process.kill()
    driver.gone_within(WITHIN_S, *OF_THE_RUN, "guardian")


def test_the_guardian_is_deaf_and_holds_nothing(start):
    driver = start()
    pid = driver.pids["guardian"]
    time.sleep(0.3)  # until it has told the kernel
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        os.kill(pid, number)
    time.sleep(0.2)
    assert driver.alive("guardian") == ["guardian"]
    assert os.getsid(pid) == pid
    held = {int(f.name): str(f.readlink()) for f in Path(f"/proc/{pid}/fd").iterdir()}
    assert held.pop(0).startswith("pipe:") and held.pop(1) == held.pop(2) == os.devnull
    assert not [target for target in held.values() if "pidfd" not in target], held
    assert MARKER.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
    assert not set(Path(f"/proc/{pid}/maps").read_text().split()) & {"torch", "ray"}
    driver.process.kill()
    driver.gone_within(WITHIN_S, *OF_THE_RUN, "guardian")


def test_it_imports_the_standard_library_alone():
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); print(*{m.partition('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, guardian.__file__], capture_output=True, text=True, check=True
    )
    assert not set(done.stdout.split()) & {"ray", "torch", "psutil", "numpy", "hapo_async"}
    began = time.monotonic()
    with Guardian():
        pass
    assert time.monotonic() - began < 2.0


def test_a_reused_pid_is_somebody_elses():
    sleeper = subprocess.Popen([sys.executable, "-S", "-c", SLEEP])
    try:
        seen = guardian.look(sleeper.pid)
        assert seen is not None
        other = seen._replace(started=seen.started - 1)
        assert guardian.prey("nobody", {seen.pid: other.started}, ()) == []
        assert not guardian.end(other)
        assert sleeper.poll() is None
        assert [p.pid for p in guardian.prey("nobody", {seen.pid: seen.started}, ())] == [seen.pid]
        assert guardian.prey("nobody", {seen.pid: seen.started}, (seen.pid,)) == []
        assert guardian.clean("nobody", {seen.pid: seen.started}, ()) == (1, [])
        assert sleeper.wait(1) == -signal.SIGKILL
        assert guardian.look(sleeper.pid) is None and not guardian.end(seen)
    finally:
        sleeper.kill()
        sleeper.wait()


def test_who_tidies_up_has_a_moment():
    code = "import multiprocessing.resource_tracker as t, time; t.ensure_running(); print(t._resource_tracker._pid, flush=True)"
    mark = f"tidies-{os.getpid()}"  # not this process's own, which other tests' Ray carries
    command = [sys.executable, "-c", f"{code}; time.sleep(300)"]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, MARKER: mark})
    try:
        assert child.stdout is not None
        tracker = guardian.look(int(child.stdout.readline()))
        assert tracker is not None
        began = time.monotonic()
        assert guardian.clean(mark, {}, ()) == (1, [])  # the tracker ended by itself
        assert time.monotonic() - began < guardian.TIDY_S
        assert tracker.pid not in guardian.everyone()
    finally:
        child.kill()
        child.wait()


def test_the_marker_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv(MARKER, "the parent's")
    with guardian.marked():
        assert os.environ[MARKER] == guardian.marker() != "the parent's"
    assert os.environ[MARKER] == "the parent's"
    monkeypatch.delenv(MARKER)
    with guardian.marked():
        pass
    assert MARKER not in os.environ
