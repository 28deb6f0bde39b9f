"""A checkpoint is whole or it is not there, whatever dies, breaks or fills up on the way."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hapo_async import checkpoint, driver_state
from hapo_async.append import Appender
from hapo_async.errors import RunError
from hapo_async.ledger import Ledger
from tests import crashes


def write(root, step):
    folder = checkpoint.begin(root, step)
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_bytes(bytes([step]) * 1000)
    return checkpoint.seal(folder, root, step, {"step": step})


def names(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_the_newest_one_is_found_with_its_driver_state(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 12)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 12
    assert found.driver == {"step": 12}


def test_an_unsealed_folder_does_not_count_and_is_tidied_away(tmp_path):
    write(tmp_path, 1)
    checkpoint.begin(tmp_path, 2)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    checkpoint.tidy(tmp_path)
    assert names(tmp_path) == ["step-1"]


DAMAGES = {
    "flip": lambda folder: flip(folder / "model" / "weights.bin"),
    "truncate": lambda folder: (folder / "model" / "weights.bin").write_bytes(b"\2" * 999),
    "delete": lambda folder: (folder / "model" / "weights.bin").unlink(),
    "a folder in its place": lambda folder: replace_by_folder(folder / "model" / "weights.bin"),
    "driver.json flipped": lambda folder: flip(folder / "driver.json"),
    "manifest cut": lambda folder: (folder / checkpoint.MANIFEST).write_text("{"),
    "manifest missing": lambda folder: (folder / checkpoint.MANIFEST).unlink(),
    "manifest no object": lambda folder: (folder / checkpoint.MANIFEST).write_text("[]"),
    "manifest of strings": lambda folder: (folder / checkpoint.MANIFEST).write_text('{"step": 2, "files": {"a": "b"}}'),
    "manifest of nothing": lambda folder: (folder / checkpoint.MANIFEST).write_text('{"step": 2, "files": {}}'),
    "manifest of elsewhere": lambda folder: rename_in_manifest(
        folder, "model/weights.bin", "../step-1/model/weights.bin"
    ),
    "manifest of another step": lambda folder: edit_manifest(folder, lambda m: m.update(step=1)),
}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def edit_manifest(folder: Path, change) -> None:
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    change(manifest)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest))


def rename_in_manifest(folder: Path, old: str, new: str) -> None:
    edit_manifest(folder, lambda m: m["files"].update({new: m["files"].pop(old)}))


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    write(tmp_path, 1)
    DAMAGES[damage](write(tmp_path, 2))
    told: list[str] = []
    found = checkpoint.newest(tmp_path, tell=told.append)
    assert found is not None and found.step == 1
    assert (tmp_path / "step-2.corrupt").is_dir()
    assert len(told) == 1 and "step-2" in told[0] and "set aside" in told[0]


def test_only_damaged_ones_are_an_error_never_a_fresh_start(tmp_path):
    path = write(tmp_path, 1)
    (path / "driver.json").unlink()
    for _ in range(2):  # asking again does not make it a fresh start either
        with pytest.raises(RunError, match="none of the checkpoints"):
            checkpoint.newest(tmp_path)


def test_nothing_at_all_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "missing") is None
    checkpoint.tidy(tmp_path / "missing")


def test_pruning_keeps_the_newest_and_the_one_that_is_needed(tmp_path):
    for step in (1, 2, 3, 10):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2, spare=tmp_path / "step-1")
    assert names(tmp_path) == ["step-1", "step-10", "step-3"]


# --------------------------------------------------------------------------------------------------------------------
# What the driver wrote


def driver(**changes) -> dict:
    ledger = Ledger()
    key = ledger.issue(0, "a")
    ledger.retry(key, "lost")
    ledger.issue(0, "b")
    cursor = {"epoch": 0, "position": 2, "seed": 0, "shuffle": True, "exhausted": False, "prompts": 9, "digest": "d"}
    state = {"step": 2, "incarnation": 1, "cursor": cursor, "ledger": ledger.state_dict(), "config_digest": "c"}
    return {**state, "gate": {"a": [0, 0.0, 0.0, 3.0, 5]}, "unknown": None, **changes}


WRONG = [
    {"step": "2"},
    {"step": 3},
    {"incarnation": None},
    {"cursor": []},
    {"cursor": {"epoch": -1}},
    {"ledger": {}},
    {"ledger": {"entries": [[0, "a", "nowhere", 0, "", {}]], "dropped_reasons": {}}},
    {"ledger": {"entries": [["0", "a", "trained", 0, "", {}]], "dropped_reasons": {}}},
    {"ledger": {"entries": [[0, "a", "trained"]], "dropped_reasons": {}}},
    {"gate": {"a": [1, 2]}},
    {"config_digest": 7},
]


def test_a_driver_state_that_is_what_it_should_be_passes():
    assert driver_state.problem(json.dumps(driver()).encode(), 2) is None


@pytest.mark.parametrize("changes", WRONG, ids=str)
def test_one_of_wrong_types_is_as_damaged_as_one_of_wrong_bytes(tmp_path, changes):
    write(tmp_path, 1)
    for step, state in ((1, driver(step=1)), (2, driver(**changes))):
        checkpoint.seal(checkpoint.begin(tmp_path, step), tmp_path, step, state)
    told: list[str] = []
    found = checkpoint.newest(tmp_path, driver_state.problem, told.append)
    assert found is not None and found.step == 1
    assert "driver.json" in told[0] and next(iter(changes)) in told[0]


# --------------------------------------------------------------------------------------------------------------------
# Crashes


@pytest.mark.parametrize("scenario", crashes.SCENARIOS)
def test_a_crash_at_any_file_operation_leaves_what_the_same_command_goes_on_from(scenario):
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # where syncing costs nothing
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        done = subprocess.run(
            [sys.executable, "-m", "tests.crashes", scenario, folder],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    before, step = crashes.SCENARIOS[scenario]
    assert len(rows) > 12 and [r["finished"] for r in rows] == [False] * (len(rows) - 1) + [True]
    old = [before[-1], "old"] if before else None
    outcomes = [r["found"] for r in rows]
    turn = outcomes.index([step, "new"])  # from the rename on, and never before
    assert outcomes == [old] * turn + [[step, "new"]] * (len(rows) - turn) and turn > 8
    for row in rows:
        assert all(name.startswith("step-") and not name.endswith(".corrupt") for name in row["tidied"])
        assert row["again"] == [step, "again"]
        assert row["kept"] == [f"step-{s}" for s in sorted({*before, step})[-crashes.KEEP :]]
    between = [r for r in rows if f".step-{step}.replaced" in r["left"] and f"step-{step}" not in r["left"]]
    assert bool(between) == (step in before), "the old one was renamed, the new one was not"
    assert all("takes its place again" in r["told"][0] for r in between)


# --------------------------------------------------------------------------------------------------------------------
# Full disks


def can_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return (
        subprocess.run(
            ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], check=False, capture_output=True
        ).returncode
        == 0
    )


def test_a_disk_that_is_really_full_costs_this_checkpoint_and_no_other(tmp_path):
    if not can_mount():
        pytest.skip("this machine lets nobody mount a file system")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", "tests.full_disk", str(tmp_path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["told"][-1] == "sealed" and len(told["told"]) > 4
    assert set(told["told"][:-1]) == {errno.ENOSPC} and told["newest"] == 2
    rows = told["rows"]
    assert rows[0] == ["before"] and rows[-1] == ["after"]
    assert [r[1] for r in rows[1:-1]] == [str(4096 * i) for i in range(len(told["told"]))], "no line is lost or torn"


@pytest.mark.parametrize("name", ["driver.json", checkpoint.MANIFEST])
def test_a_file_that_the_disk_does_not_take_seals_nothing(tmp_path, name):
    write(tmp_path, 1)
    folder = checkpoint.begin(tmp_path, 2)
    (folder / name).symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        checkpoint.seal(folder, tmp_path, 2, {"step": 2})
    checkpoint.abandon(folder)
    assert names(tmp_path) == ["step-1"] and checkpoint.newest(tmp_path).step == 1


def test_what_a_rank_wrote_and_the_driver_does_not_see_seals_nothing(tmp_path):
    folder = checkpoint.begin(tmp_path, 2)
    with pytest.raises(OSError, match="all nodes share"):
        checkpoint.seal(folder, tmp_path, 2, {"step": 2}, {"state/shard": {"bytes": 3, "sha256": "x"}})


def test_one_that_nobody_wants_any_more_is_not_sealed(tmp_path):
    write(tmp_path, 2)
    folder = checkpoint.begin(tmp_path, 2)
    (folder / "weights").write_text("other")
    answers = iter([True, True, False])
    with pytest.raises(checkpoint.Abandoned):
        checkpoint.seal(folder, tmp_path, 2, {"step": 2}, wanted=lambda: next(answers))
    assert checkpoint.newest(tmp_path).driver == {"step": 2} and (tmp_path / "step-2" / "model").is_dir()


def test_lines_that_the_disk_does_not_take_wait_in_memory(tmp_path, caplog):
    (tmp_path / "rows").symlink_to("/dev/full")
    rows = Appender(tmp_path / "rows")
    for number in range(3):
        rows.add(f"row {number}")
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    with pytest.raises(OSError, match="cannot be written"):
        rows.sync()
    caplog.clear()
    rows.close()
    assert "without its last lines: 3" in caplog.text
    with (tmp_path / "other").open("wb", buffering=0) as other:  # has the descriptor that was closed
        rows.add("row 3")
        rows.sync()
        assert other.tell() == 0 and (tmp_path / "other").stat().st_size == 0
