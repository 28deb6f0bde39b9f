"""The command of one case of ``chaos.py``: `hapo-async train`, with actors that can fail and somebody who makes them.

    python tools/chaos_driver.py FOLDER [key=value ...]

FOLDER holds case.json; the run itself is FOLDER/run. What happens when is written to FOLDER/timeline.jsonl.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).parent.parent))

import chaos_arms
from chaos_actors import ChaosGenerator, ChaosRank
from chaos_inject import Injector, problem_of
from chaos_plan import Case

from actors import placement
from actors.learner import LearnerGroup
from hapo_async import cli
from hapo_async.driver import journal, restarts, run, starter, starting, tasks

FOLDER = Path(sys.argv[1]).resolve()
WANTED = Case.of(json.loads((FOLDER / "case.json").read_text()))
FINISHING = len(sys.argv) > 2  # it has been told how many steps there are still to be
ENDING_S = 1.5


def tell(kind: str, **more: Any) -> None:
    chaos_arms.append(FOLDER / chaos_arms.TIMELINE, {"t": time.time(), "kind": kind, **more})


class TellingGroup(LearnerGroup):
    """Says which versions it gives out and which checkpoints it takes in, and starts ranks that can fail."""

    @classmethod
    async def start(
        cls, config: Any, model_path: str, cluster: Any, slot: Any, rank_class: Any = ChaosRank, needs: Any = None
    ) -> Any:
        return await super().start(config, model_path, cluster, slot, rank_class, needs)

    async def publish(self, version: Any, *more: Any) -> Any:
        tell("publish", incarnation=version.incarnation, step=version.step)
        return await super().publish(version, *more)

    async def load(self, folder: Path | str) -> None:
        tell("load", path=str(folder), problem=await asyncio.to_thread(problem_of, Path(folder)))
        await super().load(folder)


class TellingJournal(journal.Journal):
    """Says which steps are committed."""

    injector: Injector | None = None

    async def step(self, trained: Any, trainer: Any, extra: Any) -> None:
        await super().step(trained, trainer, extra)
        tell("step", incarnation=trainer.version.incarnation, step=trained.step)
        if TellingJournal.injector:
            TellingJournal.injector.note_step(trainer.version.incarnation, trained.step)


def patch() -> None:
    restarts.MOST, restarts.BACKOFF_S = 10_000, (0.2,) * 10_000  # many deaths, and few of them in a circle
    starter.GeneratorActor = ChaosGenerator  # type: ignore[misc]
    starting.LearnerGroup = TellingGroup  # type: ignore[misc]
    run.Journal = TellingJournal  # type: ignore[misc]
    train, stop = run._Run._train, placement.Cluster.stop

    async def train_with_faults(self: Any) -> None:
        if FINISHING:
            await train(self)
            return
        fired = {row["id"] for row in chaos_arms.rows(FOLDER / chaos_arms.STRIKES)}
        TellingJournal.injector = Injector(self, WANTED, FOLDER, fired)
        tell("training", incarnation=self.trainer.version.incarnation, step=self.trainer.version.step)
        playing = asyncio.create_task(TellingJournal.injector.play())
        try:
            await train(self)
        finally:
            await tasks.end(playing)

    def stop_and_die(self: Any) -> None:
        tell("ending")
        injector = TellingJournal.injector
        if injector and (fault := injector.ending):
            chaos_arms.strike(fault.id, FOLDER)
            threading.Timer(injector.rng.uniform(0, ENDING_S), os.kill, (os.getpid(), signal.SIGKILL)).start()
        stop(self)

    run._Run._train = train_with_faults  # type: ignore[method-assign]
    placement.Cluster.stop = stop_and_die  # type: ignore[method-assign]


def main() -> None:
    chaos_arms.FileTrap("driver-save")
    patch()
    steps = WANTED.steps or 1_000_000
    empty = FOLDER / "empty.yaml"
    empty.write_text("{}\n")
    sys.argv = [
        __file__,  # Ray looks for modules beside it
        "train",
        str(empty),
        *WANTED.settings,
        f"train.steps={steps}",
        f"run.dir={FOLDER / 'run'}",
        *sys.argv[2:],
    ]
    cli.main()


if __name__ == "__main__":
    main()
