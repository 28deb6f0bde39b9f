"""A run that is told to stop ends with a checkpoint, and the same command finishes it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from tests.end_to_end.helpers import hapo_here, json_lines, rollouts


def test_sigterm_ends_at_a_step_boundary_and_the_same_command_continues(tmp_path, ray_session):
    run_dir = tmp_path / "run"
    command = [
        "train", "configs/quickstart.yaml", f"run.dir={run_dir}", "train.steps=30", "train.batch_prompts=8",
        "sampling.n=4", "sampling.max_tokens=32", "data.eval=[]", "eval.every=0", "rollouts.sample=1.0",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "hapo_async", *command],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    metrics = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    try:
        while not metrics.exists() or len(json_lines(metrics)) < 3:
            assert process.poll() is None and time.monotonic() < deadline, "the run did not get going"
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        while json.loads((run_dir / "status.json").read_text())["state"] != "stopped":
            assert process.poll() is None and time.monotonic() < deadline, "it did not stop"
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)  # while everything is being closed
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    assert process.returncode == 1
    assert "the same command continues" in errors and "Traceback" not in errors
    stopped = json_lines(metrics)[-1]["step"]
    assert 3 <= stopped < 30, "it was over before it was told to stop"

    assert hapo_here(*command) == 0
    rows = json_lines(metrics)
    assert [r["step"] for r in rows] == list(range(1, 31))
    assert rows[-1]["ledger/trained"] == 30 * 8
    kept = rollouts(run_dir)
    assert len(kept) == 240 and len({tuple(r["key"][:2]) for r in kept}) == 240, "a prompt was lost or trained twice"
    assert {
        s[0].split(".")[0] for r in kept if r["step"] > stopped for a in r["answers"] for s in a.get("spans", [])
    } == {"2"}
