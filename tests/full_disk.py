"""A checkpoint on a file system that is really full: a tmpfs of a megabyte in a mount namespace of its own. Prints JSON.
Usage: unshare -rm python -m tests.full_disk FOLDER"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from hapo_async import checkpoint
from hapo_async.append import Appender
from tests.crashes import save


def main(folder: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], check=True)
    root, told = folder / "checkpoints", []
    rows = Appender(folder / "rows")
    rows.add("before")
    save(root, 1, "old")
    ballast = folder / "ballast"
    for fill in range(1 << 20, 0, -4096):  # until so many more bytes are the last that fit
        try:
            ballast.write_bytes(bytes(fill))
            break
        except OSError:
            ballast.unlink()
    full = ballast.stat().st_size
    for room in range(0, 128 << 10, 4096):  # it is full a little later each time
        ballast.write_bytes(bytes(full - room))
        part = checkpoint.begin(root, 2) if room else None
        try:
            rows.add(f"during {room}" + " " * 1000)
            if part is None:
                part = checkpoint.begin(root, 2)
            (part / "weights").write_bytes(bytes(20 << 10))
            checkpoint.seal(part, root, 2, {"step": 2})
            told.append("sealed")
        except OSError as error:
            told.append(error.errno)
            if part is not None:
                checkpoint.abandon(part)
        found = checkpoint.newest(root)
        assert found is not None
        if found.step == 2:
            break
        assert [p.name for p in root.iterdir()] == ["step-1"]
    ballast.unlink()
    rows.add("after")
    rows.close()
    lines = [line.split() for line in (folder / "rows").read_text().splitlines()]
    print(json.dumps({"told": told, "newest": found.step, "rows": lines}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
