"""Metrics are declared once, written as one row a step, survive a crash, and name the bottleneck."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hapo_async import metrics


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- the registry

# The names that others script against.
PROMISED = re.split(
    r"\s+",
    """reward/mean gate/open_frac gate/injected gate/confidence staleness/mean staleness/max staleness/dropped
throughput/generate_tokens_per_s throughput/learn_tokens_per_s throughput/generate_tokens_per_s/g0 time/step_s
time/wait_for_batch_s time/wait_for_weights_s time/wait_for_stale_s time/sync_s time/eval_s buffer/fill buffer/blocked_s
weights/version weights/lag weights/bytes_per_s policy/entropy policy/clip_frac policy/mismatch_kl policy/ess perf/mfu
scale/generators scale/verifiers verify/p50_s verify/timeout eval/aime24/pass@1 eval/aime24/pass@1/se eval/aime24/pass@8
eval/aime24/pass@8/se eval/aime24/avg@32 eval/aime24/avg@32/se""",
)


@pytest.mark.parametrize("name", PROMISED)
def test_every_promised_name_is_declared(name: str) -> None:
    assert metrics.lookup(name).meaning


def test_every_declaration_says_what_it_means_in_a_sentence() -> None:
    for metric in metrics.REGISTRY.values():
        assert metric.meaning.endswith("."), metric.name
        assert metric.name.endswith("_s") <= (metric.unit in ("s", "tokens/s", "groups/s", "bytes/s")), metric.name
        assert metric.name.endswith("_frac") <= (metric.unit == "share"), metric.name


@pytest.mark.parametrize(
    "name", ["reward/meen", "eval/aime24/pass@x", "eval/a/b/pass@1", "eval/{set}/pass@1", "", "reward"]
)
def test_an_undeclared_name_is_refused(name: str) -> None:
    with pytest.raises(LookupError, match="not declared"):
        metrics.lookup(name)


def test_the_refusal_names_the_nearest_metric() -> None:
    with pytest.raises(LookupError, match="reward/mean"):
        metrics.lookup("reward/meen")


def test_an_exact_declaration_wins_over_a_family() -> None:
    assert metrics.lookup("weights/version").name == "weights/version"
    assert metrics.lookup("weights/version/g1").name == "weights/version/{generator}"
    assert metrics.lookup("eval/x/pass@1").name == "eval/{set}/pass@1"


# ---------------------------------------------------------------- writing


def test_a_row_reaches_the_file_and_tensorboard(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        for step in (1, 2):
            writer.write(step, {"reward/mean": step / 4, "time/step_s": 2.0, "time/learn_s": 1.5})
    first, second = lines(tmp_path)
    assert (first["step"], second["step"]) == (1, 2)
    assert second["reward/mean"] == 0.5
    assert second["time"] >= first["time"] > 1e9
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward/mean")] == [(1, 0.25), (2, 0.5)]


def test_a_row_names_its_bottleneck(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        row = writer.write(1, {"time/step_s": 2.0, "time/learn_s": 1.5})
        assert "bottleneck" not in writer.write(2, {"reward/mean": 1.0})
    assert row["bottleneck"] == "learner"
    assert "75%" in row["advice"]
    assert lines(tmp_path)[0] == row


def test_a_step_after_an_evaluation_is_not_held_against_the_learner(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"time/step_s": 9.0, "time/learn_s": 1.0, "time/eval_s": 8.0})
        after = writer.write(2, {"time/step_s": 1.0, "time/learn_s": 1.0})
        later = writer.write(3, {"time/step_s": 1.0, "time/learn_s": 1.0})
    assert "add ranks" not in after["advice"] and "evaluation" in after["advice"]
    assert "add ranks" in later["advice"]


def test_the_row_of_an_evaluation_beside_training_does_not_hide_that_the_learner_was_held(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(2, {"time/step_s": 9.0, "time/learn_s": 1.0, "time/checkpoint_s": 8.0})
        writer.write(1, {"eval/a/pass@1": 0.5, "time/run_s": 20.0})
        after = writer.write(3, {"time/step_s": 1.0, "time/learn_s": 1.0})
    assert "add ranks" not in after["advice"]


def test_a_row_can_be_read_as_soon_as_it_is_written(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.0})
        assert metrics.read(tmp_path)[0]["reward/mean"] == 0.0


def test_nothing_is_written_when_one_name_is_undeclared(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer, pytest.raises(LookupError):
        writer.write(1, {"reward/mean": 0.5, "reward/unheard_of": 1.0})
    assert lines(tmp_path) == []


def test_what_was_not_measured_is_left_out_and_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"reward/mean": None, "loss/value": math.nan, "policy/grad_norm": math.inf, "policy/lr": 1e-6})
    row = lines(tmp_path)[0]
    assert "reward/mean" not in row
    assert row["loss/value"] is None and row["policy/grad_norm"] is None
    assert row["policy/lr"] == 1e-6


def test_a_new_row_does_not_grow_out_of_one_that_a_crash_cut(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time": 1.0, "reward/mean": 0.5}\n{"step": 2, "rewa')
    with metrics.Writer(tmp_path) as writer:
        writer.write(2, {"reward/mean": 0.75})
    assert [(r["step"], r["reward/mean"]) for r in lines(tmp_path)] == [(1, 0.5), (2, 0.75)]


def test_a_resume_moves_later_rows_aside_and_hides_them_in_tensorboard(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, {"reward/mean": step})
    with metrics.Writer(tmp_path, purge_step=4) as writer:
        writer.write(4, {"reward/mean": 40})
    assert [(r["step"], r["reward/mean"]) for r in lines(tmp_path)] == [(1, 1), (2, 2), (3, 3), (4, 40)]
    assert [r["step"] for r in lines(tmp_path / "discarded")] == [4, 5]
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("reward/mean")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


# ---------------------------------------------------------------- reading


def test_reading_skips_what_is_not_a_whole_row(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(
        b'{"step": 1, "reward/mean": 1}\nnot json\n[1]\n{"time": 1}\n\xff\xfe\n{"step": 2'
    )
    assert [r["step"] for r in metrics.read(tmp_path)] == [1]
    assert metrics.read(tmp_path / "nowhere") == []


def test_a_series_is_ordered_and_keeps_the_last_row_of_a_step() -> None:
    rows = [{"step": 2, "x": 5}, {"step": 1, "x": 1}, {"step": 2, "x": 7.5}, {"step": 3, "x": None}, {"step": 4}]
    assert metrics.series(rows, "x") == ([1, 2], [1.0, 7.5])
