"""Evaluations that training does not wait for: ``eval.mode`` detached and floating.

One at a time. One that is due while another still runs is skipped and counted, in a row of its step: a queue of them would
hold the weights of every version in it, and fall behind for good where an evaluation takes longer than ``eval.every``
steps. One that fails is given up, with an error in the log and a count in its row; training goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging

from hapo_async import algorithms
from hapo_async.config import Config
from hapo_async.driver.evaluation import Evaluator
from hapo_async.driver.fleet import Fleet
from hapo_async.types import Version

log = logging.getLogger(__name__)

Row = tuple[int, dict[str, float]]
"""A step, and the metrics of its evaluation: accuracies, or that it was skipped or given up."""


class BesideTraining:
    """Starts evaluations and keeps what they bring until it is taken."""

    def __init__(self, config: Config, evaluator: Evaluator, fleet: Fleet) -> None:
        self.config = config
        self.evaluator = evaluator
        self.fleet = fleet
        self._rows: list[Row] = []
        self._running: asyncio.Task[None] | None = None
        self._step = 0  # the one that is being evaluated

    @property
    def possible(self) -> bool:
        """False where an evaluation has to be a barrier: so configured, batches that must not depend on timing, cached
        answers (early stopping looks at the result), or no second generator left that could train meanwhile."""
        mode, c = self.config.evaluation_mode, self.config
        if mode == "barrier" or c.is_timing_free or algorithms.get(c.algorithm).offline or not self.evaluator.sets:
            return False
        return mode == "floating" or len(self.fleet.alive) > 1

    def start(self, step: int, version: Version) -> None:
        """Evaluates ``version``, which is the newest one, beside the steps that follow ``step``."""
        if self._running is not None and not self._running.done():
            log.warning("the evaluation of step %d is skipped: the one before is still running", step)
            self._rows.append((step, {"eval/skipped": 1.0}))
            return
        self._step, self._running = step, asyncio.create_task(self._evaluate(step, version))

    async def _evaluate(self, step: int, version: Version) -> None:
        try:
            values = await self.evaluator.run(step, self.config.evaluation_mode, version)
        except Exception:
            log.exception("the evaluation of step %d is given up; training goes on", step)
            self._rows.append((step, {"eval/given_up": 1.0}))
        else:
            self._rows.append((step, values))

    def take(self) -> list[Row]:
        """What has been finished, skipped or given up since the last call."""
        rows, self._rows = self._rows, []
        return rows

    async def forget(self, step: int) -> None:
        """Evaluations of later steps are given up: those steps are made anew."""
        if self._step > step:
            await self.close()
        self._rows = [row for row in self._rows if row[0] <= step]

    async def drain(self) -> None:
        """Waits for the evaluation that is running: before a barrier, and before the run ends. Every call that it waits for
        has a deadline."""
        if self._running is not None:
            await asyncio.wait({self._running})

    async def close(self) -> None:
        """Gives up what is running; its generator trains again. ``take`` brings the row that says so."""
        if self._running is None or self._running.done():
            return
        self._running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._running
        if self._running.cancelled():
            log.warning("the evaluation of step %d is given up", self._step)
            self._rows.append((self._step, {"eval/given_up": 1.0}))
