"""On a cluster: ``ray start --head``, then ``ray job submit`` of the command that the README gives."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.helpers import json_lines

AUTHENTICATED = {"RAY_AUTH_MODE": "token"}
RAY = str(Path(sys.executable).with_name("ray"))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture
def head(tmp_path_factory):
    """A Ray head on loopback with a job server; ended by the pids that it started."""
    gcs, dashboard = free_port(), free_port()
    environment = {**os.environ, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", **AUTHENTICATED}
    subprocess.run([RAY, "get-auth-token", "--generate"], env=environment, check=True, capture_output=True, timeout=60)
    temp = Path("/tmp") / f"rj{os.getpid()}"
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={gcs}", "--include-dashboard=true",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=4", f"--temp-dir={temp}",
        "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}",
    ]  # fmt: skip
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 90
        while True:
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", dashboard)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, "the Ray head did not come up"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        from actors.placement import end_processes

        tree = psutil.Process(process.pid)
        end_processes([*tree.children(recursive=True), tree])
        import shutil

        shutil.rmtree(temp, ignore_errors=True)


def test_a_submitted_job_trains(head, tmp_path):
    run_dir = tmp_path / "run"
    command = [
        RAY, "job", "submit", f"--address={head}", "--working-dir", ".", "--",
        sys.executable, "-m", "hapo_async", "train", "configs/quickstart.yaml", "train.steps=3", "eval.limit=8",
        "eval.every=0", f"run.dir={run_dir}",
    ]  # fmt: skip
    environment = {**os.environ, "RAY_ADDRESS": "", **AUTHENTICATED}
    deadline = time.monotonic() + 60
    while True:
        result = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=280, check=False)
        # The job server answers a little before the agent that starts jobs is there.
        if "No available agent" not in result.stderr or time.monotonic() > deadline:
            break
        time.sleep(1)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "succeeded" in result.stdout.lower()
    assert [r["step"] for r in json_lines(run_dir / "metrics.jsonl")] == [0, 1, 2, 3]
    assert (run_dir / "report.html").exists() and (run_dir / "model" / "model.safetensors").exists()
