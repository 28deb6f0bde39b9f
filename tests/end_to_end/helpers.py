"""Running the command line as a user does, in a process of its own, with a deadline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from hapo_async import cli


def hapo(
    *arguments: str, timeout_s: float = 240, address: str = "", cwd: Path | None = None
) -> subprocess.CompletedProcess:
    """Runs ``hapo-async ...``; ``address`` joins a running Ray, else the command starts its own."""
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    environment.pop("RAY_ADDRESS", None)
    if address:
        environment["RAY_ADDRESS"] = address
    return subprocess.run(
        [sys.executable, "-m", "hapo_async", *arguments],
        env=environment,
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout_s,
        check=False,
    )


def hapo_here(*arguments: str) -> int:
    """The command line in this process: its exit code. Much faster; uses the Ray of this process."""
    argv, sys.argv = sys.argv, ["hapo-async", *arguments]
    try:
        cli.main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = argv
    return 0


def succeeded(result: subprocess.CompletedProcess) -> str:
    assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout


def json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def rollouts(run_dir: Path) -> list[dict[str, Any]]:
    return [row for file in sorted((run_dir / "rollouts").glob("*.jsonl")) for row in json_lines(file)]
