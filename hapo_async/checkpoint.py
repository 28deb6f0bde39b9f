"""Checkpoints that are either whole or not there: written beside, synced, sealed by a manifest, renamed into place.

``checkpoints/step-N/`` holds model/ (HF safetensors and tokenizer), state/ (the learner's own files), driver.json (data
cursor, ledger, version, gate state) and, written last, MANIFEST.json with the size and sha256 of every other file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hapo_async.errors import RunError

log = logging.getLogger(__name__)
MANIFEST = "MANIFEST.json"


@dataclass(frozen=True)
class Checkpoint:
    """One sealed checkpoint. driver: what driver.json holds."""

    path: Path
    step: int
    driver: dict[str, Any]


def begin(root: Path, step: int) -> Path:
    """An empty folder to write step ``step`` into; ``seal`` makes it a checkpoint."""
    folder = root / f".step-{step}.writing"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def seal(folder: Path, root: Path, step: int, driver: dict[str, Any]) -> Path:
    """Writes driver.json and the manifest, syncs everything, renames. An older checkpoint of the same step gives way."""
    (folder / "driver.json").write_text(json.dumps(driver))
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    manifest = {"step": step, "files": {str(p.relative_to(folder)): _describe(p) for p in files}}
    for path in files:
        path.chmod(0o644)  # safetensors are written for their owner alone; a shared run folder is for colleagues too
        sync(path)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    sync(folder / MANIFEST)
    for sub in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        sync(sub)
    target = root / f"step-{step}"
    replaced = root / f".step-{step}.replaced"
    if target.exists():
        target.rename(replaced)
    folder.rename(target)
    sync(root)
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def prune(root: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints."""
    for path in _candidates(root)[keep:]:
        shutil.rmtree(path)


def newest(root: Path) -> Checkpoint | None:
    """The newest checkpoint whose manifest verifies; None when there is none at all.

    One that does not verify is set aside as ``.corrupt``, loudly. Raises RunError when checkpoints exist but none of them
    verifies: that is never a reason to start afresh.
    """
    candidates = _candidates(root)
    for path in candidates:
        problem = verify(path)
        if problem is None:
            driver = json.loads((path / "driver.json").read_text())
            return Checkpoint(path, int(path.name.removeprefix("step-")), driver)
        aside = path.with_name(path.name + ".corrupt")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
        log.error("checkpoint %s does not verify (%s): set aside as %s", path, problem, aside.name)
    if candidates or list(root.glob("step-*.corrupt")):
        raise RunError(f"none of the checkpoints in {root} verifies; see the .corrupt folders there")
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None."""
    try:
        files = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no readable {MANIFEST}: {error}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if _describe(file) != expected:
            return f"{name} differs from the manifest"
    return None


def _candidates(root: Path) -> list[Path]:
    """step-N folders, newest first."""
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")), reverse=True)


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def sync(path: Path) -> None:
    """fsync of a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
