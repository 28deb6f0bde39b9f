"""Imports run one way, and the check that says so does see what runs the wrong way."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TOOL = ROOT / "tools" / "check_imports.py"

_spec = importlib.util.spec_from_file_location("check_imports", TOOL)
assert _spec and _spec.loader
check_imports = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(check_imports)


def tree(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_this_repository_imports_one_way() -> None:
    assert check_imports.problems(ROOT) == []


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("hapo_async/gate.py", "import ray"),
        ("hapo_async/gate.py", "from vllm import LLM"),
        ("hapo_async/gate.py", "def f():\n    import deepspeed.comm"),
        ("hapo_async/verify/pool.py", "import zmq.asyncio"),
        ("hapo_async/gate.py", "from actors.generator import GeneratorActor"),
        ("hapo_async/gate.py", "from hapo_async import driver"),
        ("hapo_async/gate.py", "from . import driver"),
        ("hapo_async/verify/pool.py", "from ..driver import run"),
        ("hapo_async/verify/__init__.py", "from ..driver import run"),
        ("hapo_async/gate.py", "from hapo_async.cli import main"),
        ("hapo_async/driver/run.py", "import vllm"),
        ("hapo_async/driver/run.py", "from hapo_async.cli import main"),
        ("actors/generator.py", "from hapo_async.driver.run import go"),
    ],
)
def test_an_import_that_runs_the_wrong_way_is_found(tmp_path: Path, file: str, text: str) -> None:
    found = check_imports.problems(tree(tmp_path, {file: text}))
    assert len(found) == 1
    assert found[0].startswith(file)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("hapo_async/cli.py", "import ray\nfrom actors import learner\nfrom hapo_async.driver.run import go"),
        (
            "hapo_async/driver/run.py",
            "import ray\nimport actors.learner\nfrom . import loops\nfrom hapo_async.driver import x",
        ),
        ("actors/generator.py", "import ray, vllm, deepspeed, zmq\nfrom hapo_async import types"),
        (
            "hapo_async/gate.py",
            "import rayleigh\nimport numpy\nfrom hapo_async.types import Group\nfrom . import types",
        ),
    ],
)
def test_an_import_that_runs_the_right_way_passes(tmp_path: Path, file: str, text: str) -> None:
    assert check_imports.problems(tree(tmp_path, {file: text})) == []


def test_the_command_exits_with_1_and_says_where(tmp_path: Path) -> None:
    root = tree(tmp_path, {"hapo_async/gate.py": "\nimport ray\n"})
    done = subprocess.run([sys.executable, TOOL, root], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "hapo_async/gate.py:2" in done.stdout
