"""For how long training stands still for a checkpoint, and for how long its writing goes on beside it.

    python tools/bench_checkpoint.py                        # about two minutes
    python tools/bench_checkpoint.py --ranks 2 --rounds 5

A random model of 300 MB (float32) and its AdamW state (three times that), on real DeepSpeed ranks that have made a step.
Everything shares the cores of one machine: a step beside the writing is slower here than where a rank has cores to spare.

- capture: what training waits for; host copies of each rank's shard and of the whole policy on rank 0
- written: from then until all files are synced, hashed, sealed and renamed, with learner steps going on beside it
- waited: the same without steps beside it, which is what training would stand still for if it waited
- step, step beside: a learner step alone, and while a checkpoint is written
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import measured
import random_model
import weight_rig

from actors import placement
from actors.learner import LearnerGroup
from hapo_async import batch, checkpoint
from hapo_async.types import Version

SHAPE = {"hidden": 1024, "layers": 8, "head": 64}
"""75.8 million parameters, 303 MB."""
RESULT = "checkpoint"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="where to write, instead of a temporary folder: the disk to measure"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        ray = placement.LocalRay(num_cpus=4)
        try:
            found = asyncio.run(measure(Path(folder), arguments.ranks, arguments.rounds))
        finally:
            ray.stop()
    print(json.dumps(found, indent=1))
    print(measured.write(RESULT, found))


async def measure(folder: Path, ranks: int, rounds: int) -> dict[str, Any]:
    """Seconds of each part: the median over the rounds, and all of them."""
    model = random_model.make(folder / "model", **SHAPE)
    learner = await weight_rig.start_learner(
        weight_rig.settings("ray", learner={**weight_rig.LEARNS, "ranks": ranks, "deadline_s": 600.0}), model
    )
    times: dict[str, list[float]] = {"capture": [], "written": [], "waited": [], "step": [], "step_beside": []}
    size = 0
    try:
        await step(learner, 0)
        for number in range(1, rounds + 1):
            times["step"].append(await step(learner, number))
            _, capture_s, written_s = await save(learner, folder / "alone", number)
            times["waited"].append(capture_s + written_s)
            path, capture_s, written_s = await save(learner, folder / "beside", number, times["step_beside"])
            times["capture"].append(capture_s)
            times["written"].append(written_s)
            size = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
            for root in ("alone", "beside"):
                shutil.rmtree(folder / root)
    finally:
        await learner.close()
    medians = {name: round(statistics.median(values), 3) for name, values in times.items() if values}
    rounded = {name: [round(v, 3) for v in values] for name, values in times.items()}
    return {"ranks": ranks, "rounds": rounds, "bytes": size, "median_s": medians, "s": rounded}


async def step(learner: LearnerGroup, number: int) -> float:
    """Seconds of a learner step."""
    began = time.monotonic()
    await learner.step(batch.plan_step(weight_rig.demonstrations(number), len(learner.ranks), 1, Version(1, number)))
    return time.monotonic() - began


async def save(
    learner: LearnerGroup, root: Path, number: int, beside: list[float] | None = None
) -> tuple[Path, float, float]:
    """Its folder, seconds of the capture and seconds until it is sealed. beside: takes the seconds of steps that are made
    meanwhile; without it none is."""
    began = time.monotonic()
    folder = checkpoint.begin(root, number)
    await learner.capture(folder)
    captured = time.monotonic()

    async def write() -> Path:
        described = await learner.write()
        return await asyncio.to_thread(checkpoint.seal, folder, root, number, {"step": number}, described)

    writing = asyncio.create_task(write())
    while beside is not None and not writing.done():
        took = await step(learner, number)
        if not writing.done():
            beside.append(took)
    path = await writing
    return path, captured - began, time.monotonic() - captured


if __name__ == "__main__":
    main()
