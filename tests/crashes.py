"""Runs one piece of saving again and again, killed one file operation later each time, and tells what is left: a JSON line per
crash. Usage: python -m tests.crashes SCENARIO FOLDER. Every child is a process that dies by SIGKILL, among real files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

from hapo_async import checkpoint

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")
KEEP = 2


def save(root: Path, step: int, mark: str) -> None:
    """As ``hapo_async.driver.checkpoints`` does it, with small files in the learner's place."""
    folder = checkpoint.begin(root, step)
    for name in ("model/model.safetensors", "model/config.json", "state/zero/shard.pt", "state/rank0.pt"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{mark} {name} " * 50)
    checkpoint.seal(folder, root, step, {"step": step, "mark": mark})
    checkpoint.prune(root, KEEP)


SCENARIOS = {
    "another step": ((1, 2), 3),
    "the same step": ((1, 2), 2),
    "the first": ((), 0),
}


def crash_after(operations: int) -> None:
    """From now on this process kills itself before the file operation that follows so many."""
    seen = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal seen
        writes = event == "open" and (
            (isinstance(arguments[1], str) and "w" in arguments[1]) or arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes or event in CHANGES:
            seen += 1
            if seen > operations:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def main(scenario: str, base: Path) -> None:
    before, step = SCENARIOS[scenario]
    operations, finished = 0, False
    for old in before:
        save(base / "before", old, "old")
    while not finished:
        root = base / f"{operations}"
        if before:
            shutil.copytree(base / "before", root)
        child = os.fork()
        if child == 0:
            crash_after(operations)
            save(root, step, "new")
            os._exit(0)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        left = sorted(p.name for p in root.iterdir()) if root.exists() else []
        told: list[str] = []
        checkpoint.tidy(root, told.append)
        found = checkpoint.newest(root, tell=told.append)
        tidied = sorted(p.name for p in root.iterdir()) if root.exists() else []
        save(root, step, "again")
        after = checkpoint.newest(root)
        assert after is not None
        line = {
            "operations": operations,
            "finished": finished,
            "left": left,
            "tidied": tidied,
            "told": told,
            "found": found and [found.step, found.driver["mark"]],
            "again": [after.step, after.driver["mark"]],
            "kept": sorted(p.name for p in root.iterdir()),
        }
        print(json.dumps(line))
        shutil.rmtree(root)
        operations += 1


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
