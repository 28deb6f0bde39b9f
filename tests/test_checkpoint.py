"""A checkpoint is whole or it is not there."""

import pytest

from hapo_async import checkpoint
from hapo_async.errors import RunError


def write(root, step):
    folder = checkpoint.begin(root, step)
    (folder / "model").mkdir()
    (folder / "model" / "weights.bin").write_bytes(bytes([step]) * 1000)
    return checkpoint.seal(folder, root, step, {"step": step})


def test_the_newest_one_is_found_with_its_driver_state(tmp_path):
    write(tmp_path, 3)
    write(tmp_path, 12)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 12
    assert found.driver == {"step": 12}


def test_an_unsealed_folder_does_not_count(tmp_path):
    write(tmp_path, 1)
    checkpoint.begin(tmp_path, 2)
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "manifest"])
def test_a_damaged_one_is_set_aside_and_the_one_before_is_used(tmp_path, damage):
    write(tmp_path, 1)
    file = write(tmp_path, 2) / "model" / "weights.bin"
    if damage == "flip":
        file.write_bytes(b"\xff" + file.read_bytes()[1:])
    elif damage == "truncate":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "delete":
        file.unlink()
    else:
        (tmp_path / "step-2" / checkpoint.MANIFEST).write_text("{")
    found = checkpoint.newest(tmp_path)
    assert found is not None and found.step == 1
    assert (tmp_path / "step-2.corrupt").is_dir()


def test_only_damaged_ones_are_an_error_never_a_fresh_start(tmp_path):
    path = write(tmp_path, 1)
    (path / "driver.json").unlink()
    for _ in range(2):  # asking again does not make it a fresh start either
        with pytest.raises(RunError, match="none of the checkpoints"):
            checkpoint.newest(tmp_path)


def test_nothing_at_all_is_none(tmp_path):
    assert checkpoint.newest(tmp_path / "missing") is None


def test_pruning_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path, step)
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-10", "step-2"]
