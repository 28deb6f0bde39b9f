"""A live run that grows, loses a generator, gets it back, and shrinks: by the command that a user gives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from hapo_async import events
from hapo_async.report import page
from tests.end_to_end.helpers import hapo_here, json_lines, rollouts

STEPS, PROMPTS = 400, 4


def wait_for(what: str, condition: Callable[[], Any], process: subprocess.Popen[str], limit_s: float = 120.0) -> Any:
    deadline = time.monotonic() + limit_s
    while not (found := condition()):
        assert process.poll() is None, f"the run ended before {what}"
        assert time.monotonic() < deadline, f"{what}: not within {limit_s:.0f} s"
        time.sleep(0.1)
    return found


def newest(run_dir: Path) -> dict[str, Any]:
    rows = json_lines(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    return rows[-1] if rows else {}


def told(run_dir: Path) -> list[dict[str, Any]]:
    """The actors, by status.json."""
    actors: list[dict[str, Any]] = json.loads((run_dir / "status.json").read_text())["actors"]
    return actors


def lines_of(capfd: Any) -> list[str]:
    return capfd.readouterr().out.splitlines()


def test_one_generator_becomes_two_one_dies_and_comes_back_and_one_leaves(tmp_path, capfd):
    run_dir = tmp_path / "run"
    command = [
        "train", "configs/quickstart.yaml", f"run.dir={run_dir}", f"train.steps={STEPS}", f"train.batch_prompts={PROMPTS}",
        "data.eval=[]", "rollouts.sample=1.0", "max_staleness=2", "sampling.n=4", "train.checkpoint_every=0",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hapo_async", *command],
        env=environment,
        text=True,
        stdout=(tmp_path / "out").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        wait_for("the first step", lambda: newest(run_dir).get("step", 0) >= 2, process)
        assert hapo_here("scale", str(run_dir), "generators=2", "verifiers=2", "--wait", "120") == 0
        assert {"generator-1 serves", "verifier-1 serves"} < set(lines_of(capfd))
        samples = "throughput/generate_tokens_per_s/generator-1"
        wait_for("work for the new one", lambda: newest(run_dir).get(samples, 0) > 0, process)

        actors = [p for p in psutil.Process(process.pid).children(recursive=True) if "GeneratorActor" in p.name()]
        assert len(actors) == 2
        max(actors, key=lambda p: p.create_time()).send_signal(signal.SIGKILL)
        wait_for("the death", lambda: any(e.kind == "lost" for e in events.read(run_dir)), process)
        wait_for("the replacement", lambda: any(e.kind == "replaced" for e in events.read(run_dir)), process)
        replaced = newest(run_dir)["step"]
        wait_for("its work", lambda: newest(run_dir)["step"] > replaced + 1 and newest(run_dir).get(samples), process)
        wait_for("everybody's pid", lambda: all(a["pid"] for a in told(run_dir)), process)
        assert {(a["role"], a["state"]) for a in told(run_dir)} == {
            (role, "healthy") for role in ("driver", "generator", "verifier", "learner")
        }
        assert all(psutil.pid_exists(pid) for a in told(run_dir) for pid in (a["pid"], *a["children"]))

        assert hapo_here("scale", str(run_dir), "generators=1", "verifiers=1", "--drain-deadline", "0") == 0
        assert "generator-1 has left" in {line.partition(";")[0] for line in lines_of(capfd)}
        assert hapo_here("status", str(run_dir)) == 0
        status = lines_of(capfd)
        assert any(line.startswith("scale generators=1, verifiers=1: done") for line in status)
        assert sum(line.startswith("generator-") for line in status) == 1
        left = newest(run_dir)["step"]
        wait_for("a step without it", lambda: newest(run_dir)["step"] > left + 1, process)
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 1 and "Traceback" not in (tmp_path / "out").read_text()
    assert hapo_here("scale", str(run_dir), "generators=2") == 2, "a run that has ended took a request"

    rows, kept = json_lines(run_dir / "metrics.jsonl"), rollouts(run_dir)
    keys = [(r["key"][0], r["key"][1]) for r in kept]
    assert len(keys) == len(set(keys)) == rows[-1]["ledger/trained"] == rows[-1]["step"] * PROMPTS
    assert max(r["staleness/max"] for r in rows) <= 2 and sum(r["scale/restarts"] for r in rows) == 1
    assert [r["scale/generators"] for r in rows][-1] == 1 and max(r["scale/generators"] for r in rows) == 2
    pids = {r["generator_pid"] for r in kept}
    assert len(pids) == 3, "three processes sampled: the first, the second, and its replacement"
    labels = [e.label for e in events.read(run_dir)]
    assert "generators 1 → 2, verifiers 1 → 2" in labels and "generators 2 → 1, verifiers 2 → 1" in labels
    report = page.render(run_dir)
    assert all(f">{label}<" in report or f"</title>{label}</text>" in report for label in labels)
