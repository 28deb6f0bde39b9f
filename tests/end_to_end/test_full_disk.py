"""A run folder on a disk that fills up while the run goes on: a tmpfs in a mount namespace of the driver's own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hapo_async import metrics

SIZE = 24 << 20
COMMAND = [
    "configs/quickstart.yaml", "train.batch_prompts=8", "sampling.n=4", "sampling.max_tokens=32", "data.eval=[]",
    "eval.every=0", "rollouts.sample=1.0", "train.steps=14", "train.checkpoint_every=2",
]  # fmt: skip


def can_mount() -> bool:
    probe = ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return (
        shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True, check=False).returncode == 0
    )


def fill(folder: Path) -> None:
    """Takes every byte that is left."""
    with (folder / "ballast").open("ab", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while file.write(bytes(size)) == size:
                    pass
            except OSError:
                continue


def test_a_disk_that_fills_up_and_is_freed_costs_a_checkpoint_and_no_row(tmp_path):
    if not can_mount():
        pytest.skip("this machine lets nobody mount a file system")
    said, mounted = tmp_path / "said", tmp_path / "disk"
    mounted.mkdir()
    train = [sys.executable, "-m", "hapo_async", "train", *COMMAND, f"run.dir={mounted / 'run'}"]
    shell = f'mount -t tmpfs -o size={SIZE} tmpfs "{mounted}" && "$@"; code=$?; cp -r "{mounted}" "{tmp_path}/kept"; exit $code'
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with said.open("w") as out:
        process = subprocess.Popen(
            ["unshare", "-rm", "--propagation", "private", "sh", "-c", shell, "sh", *train],
            env=environment, stdout=out, stderr=subprocess.STDOUT,  # lint: allow shell because it mounts a disk of its own first
        )  # fmt: skip
        disk = Path(f"/proc/{process.pid}/root{mounted}")
        rows = disk / "run" / "metrics.jsonl"

        def until(holds, what: str) -> None:
            deadline = time.monotonic() + 150
            while not holds():
                assert process.poll() is None and time.monotonic() < deadline, f"{what}:\n{said.read_text()[-4000:]}"
                time.sleep(0.02)

        until(lambda: rows.exists() and len(metrics.read(rows)) >= 3, "the run did not get going")
        fill(disk)
        for text in ("metrics.jsonl cannot be written", "could not be written to"):
            until(lambda text=text: text in said.read_text(), "nobody noticed")
        (disk / "ballast").unlink()
        assert process.wait(timeout=150) == 0, said.read_text()[-4000:]
    text = said.read_text()
    assert "No space left" in text and "Training goes on; the newest one is step-" in text
    assert "metrics.jsonl is written again; lines lost: 0" in text
    kept = metrics.read(tmp_path / "kept" / "run")
    assert [r["step"] for r in kept] == list(range(1, 15))
    assert 1 <= sum(r.get("checkpoint/failed", 0) for r in kept) <= 2
    checkpoints = sorted(p.name for p in (tmp_path / "kept" / "run" / "checkpoints").iterdir())
    assert "step-14" in checkpoints and len(checkpoints) == 2, "nothing half written is left"
    assert (tmp_path / "kept" / "run" / "model" / "model.safetensors").exists()
