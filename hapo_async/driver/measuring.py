"""When a run evaluates, and what came of it: before training, at barriers, beside training, at the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any, TypeVar

from hapo_async.driver import tasks
from hapo_async.driver.beside import BesideTraining
from hapo_async.driver.evaluation import Evaluator
from hapo_async.driver.journal import Journal
from hapo_async.driver.offline import Offline
from hapo_async.driver.training import Trained, Trainer

T = TypeVar("T")


class Measuring:
    """first, last: values of the run's first and newest evaluation. stopped: set when a signal ends the run."""

    def __init__(
        self,
        trainer: Trainer,
        evaluator: Evaluator,
        beside: BesideTraining,
        journal: Journal,
        stopped: asyncio.Event,
        offline: Offline | None = None,
    ) -> None:
        self.first: dict[str, float] = {}
        self.last: dict[str, float] = {}
        self._trainer, self._evaluator, self._beside, self._journal = trainer, evaluator, beside, journal
        self._stopped, self._offline = stopped, offline
        self._evaluated: int | None = None  # the newest step that was evaluated under one version

    async def before(self) -> None:
        """Of the initial policy."""
        if values := await self._barrier(0):
            self.first = self.last
            self._journal.evaluation(0, values | (self._offline.counts() if self._offline else {}))

    async def at(self, trained: Trained) -> dict[str, float]:
        """What belongs into the row of a step at which an evaluation is due."""
        config, extra = self._trainer.config, {}
        last = trained.step == config.train.steps
        if last or (config.eval.every and trained.step % config.eval.every == 0):
            if last or not self._beside.possible:
                began = time.monotonic()
                extra = await self._barrier(trained.step)
                trained.times.eval += time.monotonic() - began
            else:
                self._beside.start(trained.step, self._trainer.version)
        self.take()
        return extra

    async def at_the_end(self, ended_early: bool) -> None:
        """Of the final policy, where the data ended before train.steps; evaluations that still run are waited for."""
        if self._trainer.stopping:
            await self._beside.close()
        await self._beside.drain()
        self.take()
        step = self._trainer.version.step
        if ended_early and self._evaluated != step and (values := await self._barrier(step)):
            self._journal.evaluation(step, values)

    async def give_up(self) -> None:
        """The run fails: what still runs is given up, what has ended is written down."""
        await self._beside.close()
        self.take()

    async def forget(self, step: int) -> None:
        """Later steps are made anew."""
        await self._beside.forget(step)
        if self._evaluated is not None and self._evaluated > step:
            self._evaluated = None

    def take(self) -> None:
        """Rows of the evaluations that ended beside training."""
        for step, values in self._beside.take():
            self._journal.beside(step, values)
            if any(name.endswith("/pass@1") for name in values):
                self.last = values
                if self._trainer.config.evaluation_mode == "detached":
                    self._evaluated = step

    async def _barrier(self, step: int) -> dict[str, float]:
        """The learner waits, and every generator serves its version. With what is held out of cached answers. Given up when a
        signal ends the run: a grace period is short."""
        values = await self._unless_stopped(self._answers(step))
        if values is None:
            return {"eval/given_up": 1.0}
        self._evaluated = step
        if self._offline:
            async with self._trainer.turn():
                values |= await self._offline.measure(self._trainer.learner, self._trainer.version)
        return values

    async def _answers(self, step: int) -> dict[str, float]:
        await self._beside.drain()
        self.take()  # older ones first: the last evaluation is the newest
        if not self._evaluator.sets:
            return {}
        await self._trainer.everywhere()
        asking = self._evaluator.run(step, version=self._trainer.version)
        self.last = await self._trainer.attended(asking)
        return dict(self.last)

    async def _unless_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """What the work brings, or None where a signal came before its end."""
        working, stopped = asyncio.create_task(work), asyncio.create_task(self._stopped.wait())
        try:
            await asyncio.wait({working, stopped}, return_when=asyncio.FIRST_COMPLETED)
            return working.result() if working.done() else None
        finally:
            await tasks.end(working, stopped)
