"""A run whose driver is killed goes on by the same command, as if nothing had happened."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ray
import torch
from safetensors.torch import load_file

from hapo_async import metrics
from tests.end_to_end.helpers import hapo_here, json_lines, rollouts

COMMON = [
    "configs/quickstart.yaml", "train.batch_prompts=8", "sampling.n=4", "sampling.max_tokens=32", "data.eval=[]",
    "eval.every=0", "rollouts.sample=1.0", "sampling.temperature=2.0", "data.demonstrations=512",
]  # fmt: skip
SYNCHRONOUS = [*COMMON, "max_staleness=0", "train.steps=20", "train.checkpoint_every=5"]
ASYNCHRONOUS = [*COMMON, "max_staleness=2", "train.steps=13", "train.checkpoint_every=3"]
DETERMINISTIC = (
    "reward/",
    "groups/",
    "response/",
    "gate/",
    "staleness/",
    "policy/",
    "loss/",
    "train/",
    "ledger/trained",
)

pytestmark = pytest.mark.usefixtures("ray_session")


class Life:
    """One driver in a process of its own, on this session's Ray, which ends its actors when it is gone."""

    def __init__(self, run_dir: Path, command: list[str]) -> None:
        self.rows = run_dir / "metrics.jsonl"
        environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
        self.driver = subprocess.Popen(
            [sys.executable, "-m", "hapo_async", "train", *command, f"run.dir={run_dir}"],
            env=environment, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self) -> Life:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.driver.communicate()

    def reach(self, step: int, *files: Path) -> None:
        """Until the step is committed and the files are there; then nothing moves any more."""
        deadline = time.monotonic() + 120
        while not all(f.exists() for f in files) or max((r["step"] for r in metrics.read(self.rows)), default=0) < step:
            assert self.driver.poll() is None, self.driver.communicate()[1]
            assert time.monotonic() < deadline, "the run did not get going"
            time.sleep(0.02)
        self.driver.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        self.driver.kill()


def test_a_synchronous_run_that_was_killed_gives_the_same_weights_bit_for_bit(tmp_path, capsys):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    with Life(broken, SYNCHRONOUS) as life:
        # Rollouts are written beside the next step.
        life.reach(11, broken / "checkpoints" / "step-10", broken / "rollouts" / "step-000011.jsonl")
        before = metrics.read(life.rows)
        shutil.copy(broken / "checkpoints" / "step-10" / "model" / "model.safetensors", broken / "at-10.safetensors")
        assert not (broken / "checkpoints" / "step-15").exists(), "it went on for too long"
        assert hapo_here("train", *SYNCHRONOUS, f"run.dir={broken}") == 2, "one driver at a time"
        assert f"in use by the driver with pid {life.driver.pid}" in capsys.readouterr().err
        life.kill()
    assert hapo_here("train", *SYNCHRONOUS, f"run.dir={broken}") == 0
    assert "continuing from the checkpoint of step 10" in capsys.readouterr().out
    assert hapo_here("train", *SYNCHRONOUS, f"run.dir={whole}") == 0

    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (whole, broken))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    at_10 = load_file(broken / "at-10.safetensors")
    assert all(not torch.equal(a[name], at_10[name]) for name in a), "weights that do not move are equal anyway"
    one, other = (json_lines(folder / "metrics.jsonl") for folder in (whole, broken))
    assert [r["step"] for r in other] == [r["step"] for r in one] == list(range(1, 21))
    compared = [name for name in one[-1] if name.startswith(DETERMINISTIC)]
    assert len(compared) > 30
    assert [(r["step"], n) for r, s in zip(one, other, strict=True) for n in compared if r.get(n) != s.get(n)] == []
    assert other[-1]["ledger/trained"] == other[-1]["ledger/issued"] == 160

    discarded = json_lines(broken / "discarded" / "metrics.jsonl")
    assert discarded == [r for r in before if r["step"] > 10] and discarded[0]["step"] == 11
    assert (broken / "discarded" / "rollouts" / "step-000011.jsonl").exists()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(broken / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward/mean")] == [
        (r["step"], pytest.approx(r["reward/mean"])) for r in other
    ]


def waiting(run_dir: Path) -> list[tuple[int, str, int]]:
    """Keys of the groups that the newest checkpoint holds, in the order in which the learner takes them."""
    newest = max((run_dir / "checkpoints").glob("step-*"), key=lambda p: int(p.name.removeprefix("step-")))
    path = newest / "groups.jsonl"
    return [tuple(row["key"]) for row in json_lines(path)] if path.exists() else []


def test_an_asynchronous_run_trains_every_prompt_once_whatever_ends_its_driver(tmp_path, capsys):
    run_dir = tmp_path / "run"
    with Life(run_dir, ASYNCHRONOUS) as life:
        life.reach(5, run_dir / "checkpoints" / "step-3")
        life.kill()
    waited = waiting(run_dir)
    with Life(run_dir, ASYNCHRONOUS) as life:
        life.reach(8, run_dir / "checkpoints" / "step-6")
        for _ in range(2):  # pending both: the second one comes before the first has had its checkpoint
            life.driver.send_signal(signal.SIGTERM)
            life.driver.send_signal(signal.SIGCONT)
            time.sleep(0.05)
        began = time.monotonic()
        _, errors = life.driver.communicate(timeout=60)
        assert life.driver.returncode == 1 and time.monotonic() - began < 30
        assert "the same command continues" in errors and "Traceback" not in errors
    assert hapo_here("train", *ASYNCHRONOUS, f"run.dir={run_dir}") == 0
    rows, kept = json_lines(run_dir / "metrics.jsonl"), rollouts(run_dir)
    assert [r["step"] for r in rows] == list(range(1, 14))
    places = ("trained", "dropped", "in_flight", "buffered", "to_retry")
    for row in rows:
        assert row["ledger/issued"] == sum(row[f"ledger/{place}"] for place in places)
        assert row["ledger/trained"] == 8 * row["step"] and 0 <= row["staleness/max"] <= 2
    assert len(kept) == 104 and len({tuple(r["key"][:2]) for r in kept}) == 104, "a prompt was lost or trained twice"
    assert json_lines(run_dir / "discarded" / "metrics.jsonl")
    assert set(waited[:8]) <= {tuple(r["key"]) for r in kept}, "groups of the buffer are trained as they were"
    incarnations = {s[0].split(".")[0] for r in kept for a in r["answers"] for s in a.get("spans", [])}
    assert {"1", "3"} <= incarnations <= {"1", "2", "3"}
