"""Workers keep their deadline and their limits, and what one answer does to its worker costs no other one anything."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hapo_async.errors import ConfigError, RunError
from hapo_async.types import Fault, Verdict
from hapo_async.verify import fences, wire
from hapo_async.verify.pool import VerifierPool
from hapo_async.verify.process import Worker

NAUGHTY = "tests.verify_plugins:naughty"
LOUD = "tests.verify_plugins:loud"


def is_running(pid: int) -> bool:
    """Alive and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def eventually(condition, seconds=20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.02)
    return False


def test_frames_survive_any_cut():
    messages = [{"a": "x" * 1000}, {"b": [1, 2.5, None, "\ud800"]}, {}]
    stream = b"".join(wire.encode(m) for m in messages)
    for step in (1, 3, 1000, len(stream)):
        decoder = wire.Decoder()
        out = [m for at in range(0, len(stream), step) for m in decoder.feed(stream[at : at + step])]
        assert out == messages


def test_an_oversized_frame_is_refused():
    with pytest.raises(ValueError, match="exceeds the limit"):
        wire.Decoder().feed(b"\xff\xff\xff\xff")


def test_a_pool_judges_in_order_and_reports_progress():
    seen = []
    items = [("", rf"\boxed{{{n % 7}}}", n % 5) for n in range(300)]
    with VerifierPool("auto", workers=2, timeout_s=30) as pool:
        out = pool.judge(items, lambda done, total: seen.append((done, total)))
        stats = pool.stats()
    assert [j.reward for j in out] == [float(n % 7 == n % 5) for n in range(300)]
    assert seen == [(n + 1, 300) for n in range(300)]
    assert stats["judged"] == 300 and stats["workers_started"] <= 2


def test_a_pool_judges_nothing_and_huge_answers():
    with VerifierPool("auto", timeout_s=30) as pool:
        assert pool.judge([]) == []
        (judgement,) = pool.judge([("", "word " * 400_000 + r"\boxed{3}", "3")])
    assert judgement.verdict is Verdict.CORRECT


def test_a_spinning_verifier_is_killed_at_its_deadline_and_its_neighbours_finish():
    with VerifierPool(NAUGHTY, workers=2, timeout_s=1.0) as pool:
        out = pool.judge([("", "spin" if n in (3, 20) else "fine", "") for n in range(40)])
        stats = pool.stats()
        assert [str(j.verdict) for j in out] == ["timeout" if n in (3, 20) else "correct" for n in range(40)]
        assert [j.reward for j in out] == [0.0 if n in (3, 20) else 1.0 for n in range(40)]
        assert stats["workers_started"] >= 5, "each killed worker was replaced, twice"
        assert stats["overstay_s"] < 1.0 and stats["charged"] == 2 and stats["masked"] == 0
        assert [j.reward for j in pool.judge([("", "fine", "")])] == [1.0], "and the pool still works"


def test_children_of_a_killed_verifier_die_with_it(tmp_path):
    marker = tmp_path / "marker"
    with VerifierPool(NAUGHTY, timeout_s=2.0) as pool:
        asyncio.run(pool.start_async())
        (pid,) = pool.stats()["worker_pids"]
        future = pool.submit([("", "child", str(marker))])[0]
        assert eventually(lambda: marker.exists() and marker.read_text())
        child = int(marker.read_text())
        assert is_running(child) and is_running(pid)
        assert eventually(lambda: not is_running(child) and not is_running(pid))
        assert future.result(timeout=60).verdict is Verdict.TIMEOUT
        last = int(marker.read_text())
    assert last != child and eventually(lambda: not is_running(last)), "that of the second try as well"


def test_what_leaves_a_workers_group_dies_with_it_too(tmp_path):
    marker = tmp_path / "marker"
    with VerifierPool(NAUGHTY, timeout_s=30.0) as pool:
        assert pool.judge([("", "runaway", str(marker))])[0].verdict is Verdict.CRASH
    assert eventually(lambda: not is_running(int(marker.read_text())))


def test_a_worker_that_starts_too_many_processes_is_ended(monkeypatch):
    monkeypatch.setattr(fences, "MOST_PROCESSES", 20)
    with VerifierPool(NAUGHTY, timeout_s=30.0) as pool:
        began = time.monotonic()
        (judgement,) = pool.judge([("", "fork", "")])
    assert judgement.verdict is Verdict.CRASH and "at most 20" in judgement.detail
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("raise", "crash"),
        ("exit", "crash"),
        ("_exit", "crash"),
        ("abort", "crash"),
        ("segfault", "crash"),
        ("killed", "oom"),
        ("memory", "oom"),
        ("bomb", "oom"),
        ("write", "crash"),
        ("files", "crash"),
    ],
)
def test_an_answer_that_fells_its_worker_pays_and_its_neighbours_do_not(response, expected, tmp_path):
    with VerifierPool(NAUGHTY, workers=1, timeout_s=30) as pool:
        out = pool.judge([("", response if n == 1 else "fine", str(tmp_path / "file")) for n in range(6)])
    assert [str(j.verdict) for j in out] == [expected if n == 1 else "correct" for n in range(6)]
    assert [j.reward for j in out] == [0.0 if n == 1 else 1.0 for n in range(6)]
    assert out[1].fault is Fault.ANSWER and "charged to the answer" in out[1].detail


def test_a_worker_that_stops_itself_is_timed_out():
    with VerifierPool(NAUGHTY, timeout_s=0.7) as pool:
        pool.judge([("", "fine", "")])
        began = time.monotonic()
        (judgement,) = pool.judge([("", "stop", "")])
    assert (judgement.verdict, judgement.reward) == (Verdict.TIMEOUT, 0.0)
    assert judgement.seconds >= 1.4 and time.monotonic() - began < 20


def test_a_worker_whose_pool_is_frozen_ends_itself_when_its_processor_time_is_up():
    worker = Worker(threading.Event())
    try:
        worker.start(NAUGHTY, timeout_s=0.05)
        worker.send([["", "busy", "", {}]], 60.0)
        assert eventually(lambda: not worker.is_alive())
        assert worker._exit_code() == -signal.SIGXCPU
    finally:
        worker.kill()


def test_the_limits_of_a_worker_can_be_read_from_outside():
    with VerifierPool("auto", timeout_s=30) as pool:
        pool.judge([("", r"\boxed{1}", "1")])
        (pid,) = pool.stats()["worker_pids"]
        limits = Path(f"/proc/{pid}/limits").read_text()
        held = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    soft = {line[:25].strip(): line[26:].split()[0] for line in limits.splitlines()[1:]}
    assert soft["Max core file size"] == "0" and soft["Max file size"] == str(fences.MOST_FILE_BYTES)
    assert 0 < int(soft["Max address space"]) - fences.BUILTIN_MEMORY_BYTES <= held
    assert int(soft["Max cpu time"]) < 100 and int(soft["Max open files"]) <= fences.MOST_FILES


def test_what_a_plugin_prints_does_not_corrupt_the_stream():
    with VerifierPool(LOUD, timeout_s=30) as pool:
        assert [j.reward for j in pool.judge([("", "x", "")] * 5)] == [1.0] * 5


def test_the_deadline_clock_stops_while_a_worker_imports():
    verdict_frame = {"verdict": "correct", "reward": 1.0}
    frames = [{"loading": True}, {"loading": False}, verdict_frame]
    deadlines = []

    class Scripted(Worker):
        def __init__(self):
            """No process: the frames are given."""

        def _receive(self, deadline):
            deadlines.append(deadline - time.monotonic())
            return frames.pop(0)

    assert Scripted().receive_judgement(1.0).reward == 1.0
    before, loading, after = deadlines
    assert before <= 1.0 and after <= 1.0 and loading > 60


def test_a_worker_says_when_it_imports():
    code = (
        "from hapo_async.verify import math, symbolic; events = []; symbolic.loading_hook = events.append\n"
        "math.verdict('A: 1', '1'); assert events == []\n"
        "math.verdict('A: x+1', '1+x'); assert events == [True, False], events"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_plugin_that_is_not_there_fails_loudly():
    with VerifierPool("nowhere_module:f") as pool, pytest.raises(ConfigError, match="no module named"):
        pool.judge([("", "x", "")])
    with VerifierPool("nowhere_module:f") as pool, pytest.raises(ConfigError, match="no module named"):
        asyncio.run(pool.start_async())


def test_what_a_frozen_worker_had_before_it_is_judged_by_another():
    with VerifierPool("auto", timeout_s=1.0) as pool:
        asyncio.run(pool.start_async())
        (pid,) = pool.stats()["worker_pids"]
        os.kill(pid, signal.SIGSTOP)
        judgements = pool.judge([("", rf"\boxed{{{n}}}", "1") for n in range(3)])
        assert [j.reward for j in judgements] == [0.0, 1.0, 0.0] and judgements[0].verdict is Verdict.WRONG
        assert not is_running(pid) and pool.stats()["workers_started"] == 2


def test_a_truth_that_cannot_be_sent_poisons_its_prompt_alone():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with VerifierPool("auto", timeout_s=30) as pool:
        judgements = pool.judge([("", r"\boxed{1}", truth) for truth in (1, deep, 10**5000, 1)])
    assert [j.reward for j in judgements] == [1.0, None, None, 1.0]
    assert {j.fault for j in judgements[1:3]} == {Fault.PROMPT}


def test_closing_ends_workers_and_fails_what_is_left():
    pool = VerifierPool(NAUGHTY, timeout_s=600)
    asyncio.run(pool.start_async())
    (pid,) = pool.stats()["worker_pids"]
    futures = pool.submit([("", "spin", "")] * 3)
    pool.close()
    assert not is_running(pid)
    for future in futures:
        with pytest.raises(RunError, match="closed"):
            future.result(timeout=10)
    with pytest.raises(RunError, match="closed"):
        pool.judge([("", "x", "")])


def test_workers_die_with_a_killed_parent():
    code = (
        "import asyncio, sys, time; from hapo_async.verify.pool import VerifierPool\n"
        f"pool = VerifierPool('{NAUGHTY}', 2, 600); asyncio.run(pool.start_async())\n"
        "pool.submit([('', 'spin', '')]); print(*pool.stats()['worker_pids'], flush=True); time.sleep(600)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(is_running(p) for p in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not any(is_running(p) for p in pids))


def test_judging_asynchronously_leaves_the_event_loop_free():
    async def both():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticker = asyncio.create_task(tick())
        with VerifierPool("auto", timeout_s=30) as pool:
            out = await pool.judge_async([("", r"\boxed{1}", 1)] * 20)
            ticker.cancel()
        return out, ticks

    out, ticks = asyncio.run(both())
    assert [j.reward for j in out] == [1.0] * 20 and ticks > 3
