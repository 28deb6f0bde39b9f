"""The run folder: one driver at a time, and none left behind by a run that never began."""

from __future__ import annotations

import fcntl
from pathlib import Path

import pytest

from hapo_async import config, rundir
from hapo_async.errors import ConfigError
from hapo_async.rundir import LOCK, RunDir


def of(path: Path) -> RunDir:
    return RunDir(config.parse({"run": {"dir": str(path)}}))


def test_a_run_that_is_refused_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="refused"), of(tmp_path / "run"):
        raise ConfigError("refused")
    assert not (tmp_path / "run").exists()


def test_what_was_there_before_or_was_written_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with of(tmp_path / "mine"):
        pass
    assert (tmp_path / "mine").is_dir()
    with of(tmp_path / "run") as folder:
        folder.write_config()
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [LOCK, "config.yaml"]
    with of(tmp_path / "run"):
        pass
    assert (tmp_path / "run" / "config.yaml").exists()


def test_a_second_driver_is_kept_out(tmp_path: Path) -> None:
    with of(tmp_path / "run") as folder:
        folder.write_config()
        with pytest.raises(ConfigError, match="in use by the driver with pid"), of(tmp_path / "run"):
            pass
    with of(tmp_path / "run"):
        pass


def test_a_folder_that_vanishes_while_it_is_locked_is_made_again(tmp_path: Path, monkeypatch) -> None:
    """Its former driver was refused at that moment."""
    path, lock, calls = tmp_path / "run", fcntl.flock, []

    def flock(file, how) -> None:
        if not calls:
            (path / LOCK).unlink()
            path.rmdir()
        calls.append(how)
        lock(file, how)

    monkeypatch.setattr(rundir.fcntl, "flock", flock)
    with of(path) as folder:
        folder.write_config()
        assert len(calls) == 2
        with pytest.raises(ConfigError, match="in use"), of(path):
            pass


@pytest.mark.parametrize("place", ["/proc/run", "/dev/null/run"])
def test_a_folder_that_cannot_be_made_is_refused(place: str) -> None:
    with pytest.raises(ConfigError, match="cannot be used"), of(Path(place)):
        pass
