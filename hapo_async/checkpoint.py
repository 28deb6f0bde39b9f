"""Checkpoints that are either whole or not there: written beside, synced, sealed by a manifest, renamed into place.

``checkpoints/step-N/`` holds model/ (HF safetensors and tokenizer), state/ (the learner's own files), groups.* (what waited
in the buffer), driver.json (data cursor, ledger, version, gate state) and, written last, MANIFEST.json with the size and
sha256 of every other file. What a crash leaves beside it has a name of its own:

    .step-N.*.writing   begun, not sealed                     removed at the next start
    .step-N.replaced    gave way to another one of its step   takes its place again if that never came, else removed
    .step-N.removed     was pruned                            removed
    step-N.corrupt      did not verify                        kept for people to look at
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hapo_async.errors import RunError
from hapo_async.files import sync
from hapo_async.threads import DaemonThreads

log = logging.getLogger(__name__)
MANIFEST, DRIVER = "MANIFEST.json", "driver.json"
READERS = 4  # files that are hashed at a time

Described = Mapping[str, Mapping[str, Any]]
"""Files below a folder by their relative name: {"bytes": size, "sha256": hex digest}."""


@dataclass(frozen=True)
class Checkpoint:
    """One sealed checkpoint. driver: what driver.json holds."""

    path: Path
    step: int
    driver: dict[str, Any]


class Abandoned(Exception):
    """A checkpoint that nobody wants any more was not sealed."""


def begin(root: Path, step: int) -> Path:
    """An empty folder, of a name that was never used, to write step ``step`` into; ``seal`` makes it a checkpoint. Raises
    OSError."""
    folder = root / f".step-{step}.{secrets.token_hex(4)}.writing"
    folder.mkdir(parents=True)
    return folder


def abandon(folder: Path) -> None:
    """Removes what was begun; what cannot be removed now is removed at the next start."""
    shutil.rmtree(folder, ignore_errors=True)


def seal(
    folder: Path,
    root: Path,
    step: int,
    driver: Mapping[str, Any],
    described: Described | None = None,
    wanted: Callable[[], bool] = lambda: True,
) -> Path:
    """Writes driver.json and the manifest, syncs everything, renames. An older checkpoint of the same step gives way.

    described: files that whoever wrote them has synced and hashed already. wanted: asked before the rename; where it says
    no, Abandoned is raised and nothing has changed. Raises OSError; then the older one is still there.
    """
    (folder / DRIVER).write_text(json.dumps(driver))
    known = dict(described or {})
    for name, told in known.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != told["bytes"]:
            raise OSError(
                errno.ENOENT,
                "a learner rank wrote it, but the driver does not see it: run.dir must lie on a file system that all nodes share",
                str(folder / name),
            )
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not wanted():
            raise Abandoned(str(folder))
        path.chmod(0o644)  # safetensors are written for their owner alone; a shared run folder is for colleagues too
        name = path.relative_to(folder).as_posix()
        if name not in known:
            sync(path)
            known[name] = describe(path)
    (folder / MANIFEST).write_text(json.dumps({"step": step, "files": dict(sorted(known.items()))}, indent=1))
    sync(folder / MANIFEST)
    for sub in [p for p in folder.rglob("*") if p.is_dir()] + [folder]:
        sync(sub)
    if not wanted():
        raise Abandoned(str(folder))
    return _put_in_place(folder, root, step)


def _put_in_place(folder: Path, root: Path, step: int) -> Path:
    target, replaced = root / f"step-{step}", root / f".step-{step}.replaced"
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        folder.rename(target)
    except OSError:
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    sync(root)
    sync(root.parent)  # the first one of a run made the folder
    shutil.rmtree(replaced, ignore_errors=True)
    return target


def prune(root: Path, keep: int, spare: Path | None = None) -> None:
    """Removes all but the newest ``keep`` checkpoints, and never ``spare``. Raises OSError where one cannot be removed."""
    for path in _candidates(root)[keep:]:
        if path != spare:
            # Renamed first: half a checkpoint must not look like a damaged one.
            removed = path.with_name(f".{path.name}.removed")
            shutil.rmtree(removed, ignore_errors=True)
            path.rename(removed)
            shutil.rmtree(removed)


def tidy(root: Path, tell: Callable[[str], None] = log.warning) -> None:
    """Puts in order what a crash has left. For the one driver that owns the folder, before it writes anything there."""
    for replaced in sorted(root.glob(".step-*.replaced")):
        target = root / replaced.name.removeprefix(".").removesuffix(".replaced")
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            replaced.rename(target)
            sync(root)
            tell(f"{target} takes its place again: a crash came before the one that was to replace it")
    for pattern in (".step-*.writing", ".step-*.removed", ".step-*-universal"):
        for left in root.glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------------------
# Reading


def newest(
    root: Path,
    check: Callable[[bytes, int], str | None] = lambda text, step: None,
    tell: Callable[[str], None] = log.error,
) -> Checkpoint | None:
    """The newest checkpoint whose manifest verifies; None when there is none at all.

    check: what else is wrong with the bytes of driver.json, for that step. One that does not verify is set aside as
    ``.corrupt``, and ``tell`` is told. Raises RunError when checkpoints exist but none of them verifies (that is never a
    reason to start afresh), and when one cannot be read for want of a permission.
    """
    candidates = _candidates(root)
    for path in candidates:
        step = _step_of(path)
        try:
            problem = _problem(path, step, check)
            if problem is None:
                return Checkpoint(path, step, json.loads((path / DRIVER).read_bytes()))
            aside = path.with_name(path.name + ".corrupt")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        except OSError as error:
            raise RunError(
                f"the checkpoint {path} cannot be read or set aside: {error.strerror} ({error.filename}). Make it readable "
                "and writable, then the same command continues."
            ) from None
        tell(f"the checkpoint {path} does not verify ({problem}): set aside as {aside.name}")
    if candidates or list(root.glob("step-*.corrupt")):
        raise RunError(f"none of the checkpoints in {root} verifies; see the .corrupt folders there")
    return None


def _problem(path: Path, step: int, check: Callable[[bytes, int], str | None]) -> str | None:
    problem = verify(path)
    if problem is not None:
        return problem
    manifest = json.loads((path / MANIFEST).read_bytes())
    if manifest.get("step") != step:
        return f"{MANIFEST} is of step {manifest.get('step')!r}"
    if DRIVER not in manifest["files"]:
        return f"{MANIFEST} does not name {DRIVER}"
    text = (path / DRIVER).read_bytes()
    try:
        if not isinstance(json.loads(text), dict):
            return f"{DRIVER} holds no object"
    except (ValueError, RecursionError) as error:
        return f"{DRIVER} is no JSON: {error}"
    return check(text, step)


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None. Raises PermissionError."""
    try:
        files = json.loads((path / MANIFEST).read_bytes())["files"]
        for name, expected in files.items():
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                return f"{MANIFEST} names {name!r}, which lies elsewhere"
            if {type(expected["bytes"]), type(expected["sha256"])} != {int, str}:
                return f"{MANIFEST} does not describe {name!r}"
    except PermissionError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        return f"no readable {MANIFEST}: {error}"
    return _any_differs(path, files)


def is_copied(path: Path, part: str, copy: Path) -> bool:
    """Whether ``copy`` holds every file that a sealed checkpoint has below ``part``."""
    files = json.loads((path / MANIFEST).read_bytes())["files"]
    wanted = {name.removeprefix(f"{part}/"): told for name, told in files.items() if name.startswith(f"{part}/")}
    return bool(wanted) and _any_differs(copy, wanted) is None


def _any_differs(folder: Path, files: Described) -> str | None:
    problems = list(DaemonThreads(READERS).map(lambda item: _differs(folder, *item), files.items()))
    return next((problem for problem in problems if problem), None)


def _differs(folder: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    file = folder / name
    try:
        if not file.is_file():
            return f"{name} is missing"
        same = file.stat().st_size == expected["bytes"] and describe(file)["sha256"] == expected["sha256"]
    except PermissionError:
        raise
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None if same else f"{name} differs from the manifest"


def _candidates(root: Path) -> list[Path]:
    """step-N folders, newest first."""
    found = [p for p in root.glob("step-*") if p.is_dir() and p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def describe(path: Path) -> dict[str, Any]:
    """Size [bytes] and sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
