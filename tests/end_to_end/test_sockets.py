"""A real run, seen from outside: where it listens, and that the secrets of its environment are nowhere in what it leaves."""

from __future__ import annotations

import os
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from tests import listening
from tests.end_to_end.helpers import hapo, hapo_here, json_lines

CANARY = "canary" + secrets.token_hex(10)
SECRETS = {
    "WANDB_API_KEY": f"{CANARY}1",
    "AWS_SECRET_ACCESS_KEY": f"{CANARY}2/+=x",
    "HF_TOKEN": f"hf_{CANARY}3",
    "DB_PASSWORD": f'{CANARY}4"\\é',
    "MY_SERVICE_TOKEN": f"{CANARY}5",
    "DATABASE_URL": f"postgres://somebody:{CANARY}6@db.example/x",
}
URL = f"https://somebody:{CANARY}7@example.org/x?token={CANARY}8"
SMALL = {
    "train": {"steps": 4, "batch_prompts": 8, "checkpoint_every": 2},
    "data": {"train": "builtin:chain/train", "eval": [], "demonstrations": 32, "max_prompt_tokens": 32},
    "sampling": {"n": 4, "max_tokens": 32},
    "generator": {"engine": "transformers", "count": 2},
    "learner": {"ranks": 2, "lr": 3e-4},
    "verifier": {"name": "boxed"},
    "rollouts": {"sample": 1.0},
}
DEADLINE_S = 280


def write_config(path: Path, **more: object) -> Path:
    path.write_text(yaml.safe_dump(SMALL | more))
    return path


class Run:
    """A training run in a process of its own, on its own Ray, or on the one at ``address``. listens: everything that was seen
    listening. sessions: Ray's folders."""

    def __init__(self, config: Path, run_dir: Path, *overrides: str, address: str = "") -> None:
        command = [sys.executable, "-m", "hapo_async", "train", str(config), f"run.dir={run_dir}", *overrides]
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | SECRETS
        environment |= {"HAPO_LOG": "DEBUG", "COLUMNS": "200", "NO_COLOR": "1"}
        environment |= {"RAY_ADDRESS": address} if address else {}
        self.dir = run_dir
        self.listens: set[listening.Listening] = set()
        self.sessions: set[Path] = set()
        with (run_dir.parent / "out").open("wb") as out, (run_dir.parent / "err").open("wb") as err:
            self.process = subprocess.Popen(command, env=environment, stdout=out, stderr=err)
        deadline = time.monotonic() + DEADLINE_S
        try:
            while self.process.poll() is None:
                assert time.monotonic() < deadline, "the run did not end"
                self._look()
                time.sleep(0.3)
        finally:
            if self.process.poll() is None:
                self.process.kill()

    def _look(self) -> None:
        self.listens |= listening.of_tree(self.process.pid)
        if not self.sessions:
            for child in psutil.Process(self.process.pid).children(recursive=True):
                try:
                    named = re.findall(r"/[^\s=:,]*/session_\d[^/\s:,]*", " ".join(child.cmdline()))
                except psutil.Error:
                    continue
                self.sessions |= {Path(name) for name in named}

    @property
    def said(self) -> str:
        return "".join((self.dir.parent / name).read_text(errors="replace") for name in ("out", "err"))

    def leaks(self) -> list[str]:
        """Files that hold the canary: of the run folder, of Ray's folders, and what was printed."""
        roots = [self.dir, *self.sessions]
        files = [f for root in roots for f in root.rglob("*") if f.is_file() and not f.is_symlink()]
        files += [self.dir.parent / "out", self.dir.parent / "err"]
        assert len(files) > 20
        return [str(f) for f in files if CANARY.encode() in f.read_bytes()]


@pytest.fixture(scope="module")
def zmq_run(tmp_path_factory) -> Run:
    """Two generators, two learner ranks, weights by zmq; a secret in every variable and in the configuration."""
    folder = tmp_path_factory.mktemp("zmq")
    config = write_config(
        folder / "config.yaml", weights={"transport": "zmq"}, deepspeed={"wandb": {"enabled": False, "group": URL}}
    )
    return Run(config, folder / "run")


@pytest.fixture(scope="module")
def failed_run(tmp_path_factory, ray_session) -> Run:
    """Weights by gloo, on this session's Ray; it fails in the learner, over the section that holds the secret."""
    folder = tmp_path_factory.mktemp("gloo")
    config = write_config(folder / "config.yaml", weights={"transport": "gloo"})
    override = f"deepspeed={{wandb: {{enabled: true, group: '{URL}', team: {{}}}}}}"
    run = Run(config, folder / "run", override, address=ray_session.get_runtime_context().gcs_address)
    run.sessions.add(Path(ray_session._private.worker.global_worker.node.get_session_dir_path()))
    return run


def test_a_run_listens_on_no_wildcard(zmq_run):
    assert zmq_run.process.returncode == 0, zmq_run.said[-4000:]
    open_to_all = {x for x in zmq_run.listens if x.is_open_to_all}
    assert not open_to_all, f"these can be reached from outside:\n{listening.told(open_to_all)}"
    assert {x.where for x in zmq_run.listens if x.kind == "tcp"} <= listening.LOOPBACK
    by_process = {x.process for x in zmq_run.listens}
    for part in ("gcs_server", "raylet", "LearnerRank", "hapo_async"):
        assert any(part in name for name in by_process), f"{part} was not seen: {sorted(by_process)}"


def test_nothing_of_ray_can_be_entered_by_other_users(zmq_run):
    assert zmq_run.sessions
    for session in zmq_run.sessions:
        private = [p for p in session.parents if p.name.startswith("hapo-")]
        assert private and private[0].stat().st_mode & 0o777 == 0o700 and private[0].stat().st_uid == os.getuid()
    assert (Path.home() / ".ray" / "auth_token").stat().st_mode & 0o077 == 0


def test_secrets_are_nowhere_in_what_a_run_leaves(zmq_run):
    assert zmq_run.leaks() == []
    assert json_lines(zmq_run.dir / "metrics.jsonl")[-1]["step"] == 4
    config = (zmq_run.dir / "config.yaml").read_text()
    assert "https://somebody:(secret)@example.org/x" in config
    token = (Path.home() / ".ray" / "auth_token").read_text()
    assert token not in zmq_run.said and token not in (zmq_run.dir / "report.html").read_text()


def test_secrets_are_nowhere_in_what_a_failed_run_leaves(failed_run):
    assert failed_run.process.returncode != 0 and "wandb" in failed_run.said.lower()
    assert failed_run.leaks() == []


def test_a_folders_config_without_its_secret_is_refused(zmq_run):
    done = hapo("train", str(zmq_run.dir / "config.yaml"), "--dry-run", timeout_s=60)
    assert done.returncode == 2 and "deepspeed.wandb.group" in done.stderr and "Give it again" in done.stderr


def test_a_dry_run_prints_no_secret(tmp_path, monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    config = write_config(tmp_path / "config.yaml", deepspeed={"wandb": {"group": URL}})
    done = hapo("train", str(config), "--dry-run", timeout_s=60)
    assert done.returncode == 0 and "somebody:(secret)@example.org" in done.stdout, done.stderr[-3000:]
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "override",
    [
        f"data.train={URL}",
        f"vllm={{hf_token: {CANARY}x, max_model_length: 1}}",
        f"model={URL}",
        f"sampling.n={URL}",
        f"x={URL}",
    ],
)
def test_errors_print_no_secret(tmp_path, capsys, override):
    config = write_config(tmp_path / "config.yaml", generator={"engine": "vllm"} if "vllm" in override else {})
    assert hapo_here("train", str(config), override) == 2
    said = capsys.readouterr()
    assert CANARY not in said.out + said.err and said.err.startswith("error: ")
