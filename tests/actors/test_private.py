"""What a Ray of our own keeps to the user who started it: its folder, its token, and what its processes log."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from actors import placement


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def base(tmp_path, monkeypatch) -> Path:
    """Where temporary files go; its name is short."""
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp") as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


@pytest.mark.parametrize("before", ["nothing", "open to all", "a link", "a file"])
def test_rays_folder_lies_in_one_that_nobody_else_enters(base, tmp_path, before):
    name = base / f"hapo-{os.getuid()}"
    if before == "open to all":
        name.mkdir()
        name.chmod(0o777)
    elif before == "a link":
        (tmp_path / "elsewhere").mkdir()
        name.symlink_to(tmp_path / "elsewhere")
    elif before == "a file":
        name.touch()
    folder = placement._short_temp_dir()
    assert mode(folder.parent) == 0o700 and not folder.parent.is_symlink() and folder.parent.parent == base
    assert (folder.parent == name) == (before in ("nothing", "open to all"))
    assert len(str(folder)) + 62 <= 107, "a session's sockets have no room"


def test_a_long_name_for_temporary_files_leaves_room_for_sockets(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / ("x" * 40)))
    assert len(str(placement._short_temp_dir())) + 62 <= 107


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_rays_token_is_readable_by_its_owner_alone(home):
    placement._protect_token()
    path = home / ".ray" / "auth_token"
    first = path.read_text()
    assert mode(path) == 0o600 and len(first) == 64 and [p.name for p in path.parent.iterdir()] == ["auth_token"]
    path.chmod(0o644)  # as Ray writes it
    placement._protect_token()
    assert mode(path) == 0o600 and path.read_text() == first


def test_without_a_home_the_token_is_this_runs_own(home, monkeypatch, caplog):
    (home / ".ray").touch()
    monkeypatch.setitem(os.environ, "RAY_AUTH_TOKEN", "")
    placement._protect_token()
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64 and os.environ["RAY_AUTH_TOKEN"] not in caplog.text


def test_who_switched_the_token_off_is_warned(home, monkeypatch, caplog):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    placement._protect_token()
    assert not (home / ".ray").exists() and "every user of this node can run code" in caplog.text


def test_processes_of_ray_redact_what_they_write(ray_session):
    """What one prints, logs and raises, as Ray keeps it."""

    @ray_session.remote(num_cpus=0)
    class Talker:
        def talk(self) -> bool:
            import logging
            import sys

            import actors  # noqa: F401 (as every actor of ours does)

            url = "https://somebody:" + "pass" + "word1@host/x"
            print("printed", url, flush=True)
            print("written", url, file=sys.stderr, flush=True)
            logging.getLogger("x").error("logged %s", url)
            return getattr(logging.getLogRecordFactory(), "redacts", False)

    talker = Talker.remote()
    redacts = ray_session.get(talker.talk.remote(), timeout=120)
    ray_session.kill(talker)
    logs = Path(ray_session._private.worker._global_node.get_logs_dir_path()).glob("worker-*")
    text = "".join(path.read_text(errors="replace") for path in logs)
    assert redacts and "printed https://somebody:(secret)@host/x" in text and "written https" in text
    assert "logged https://somebody:(secret)@host/x" in text and "pass" + "word1" not in text
