"""The learner starts again after a rank died or froze; the generators live on.

    newest checkpoint -> other ranks -> ledger, gate, rows and rollouts back to its step -> weights loaded -> published anew

Everything learned after the checkpoint is learned again. The incarnation grows, so no version has two meanings, and no
generator gets a group before it has installed a version of the new one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from actors import placement
from actors.learner import LearnerGone, LearnerGroup
from hapo_async import checkpoint
from hapo_async.config import Config
from hapo_async.driver import tasks
from hapo_async.driver.checkpoints import Checkpoints
from hapo_async.driver.journal import Journal
from hapo_async.driver.measuring import Measuring
from hapo_async.driver.offline import Offline
from hapo_async.driver.restarts import Budget
from hapo_async.driver.training import Trainer
from hapo_async.errors import RunError
from hapo_async.ledger import Ledger
from hapo_async.types import Version
from hapo_async.words import plural

log = logging.getLogger(__name__)

EMPTY = Ledger().state_dict()

Note = Callable[[str, str, str], None]
"""Takes kind, label and text of an event: see ``hapo_async.events``."""


class Recovery:
    """Owns the learner's restarts. next_incarnation: ``RunDir.next_incarnation``."""

    def __init__(
        self,
        config: Config,
        cluster: placement.Cluster,
        trainer: Trainer,
        checkpoints: Checkpoints,
        journal: Journal,
        measuring: Measuring,
        note: Note,
        next_incarnation: Callable[[], int],
        offline: Offline | None = None,
    ) -> None:
        self.restarts = 0  # since the journal last looked
        self.restarting = False
        self._config, self._cluster, self._trainer, self._checkpoints = config, cluster, trainer, checkpoints
        self._journal, self._measuring, self._note, self._offline = journal, measuring, note, offline
        self._next_incarnation = next_incarnation
        self._budget = Budget()

    def take(self) -> int:
        """Restarts since the last call."""
        restarts, self.restarts = self.restarts, 0
        return restarts

    async def recover(self, error: LearnerGone) -> None:
        """Back to the newest checkpoint, with its weights published. Raises RunError when that has happened too often, or when
        the learner does not come up."""
        self.restarting = True
        try:
            await self._recover(error)
        finally:
            self.restarting = False

    async def _recover(self, error: LearnerGone) -> None:
        lost_at, began, last = self._trainer.version, time.monotonic(), error
        while (wait_s := self._budget.take(time.monotonic())) is not None:
            self._note("lost", "learner lost", f"the learner is lost: {last}; it is started again in {wait_s:g} s")
            await self._checkpoints.settle()
            await asyncio.sleep(wait_s)
            if self._trainer.stopping:
                raise last
            found = await self._newest()
            if found is None and lost_at.step:
                raise error
            step = found.step if found else 0
            try:
                await self._bring_up(step, found)
            except LearnerGone as again:
                last = again
                continue
            self.restarts += 1
            steps = plural(lost_at.step - step, "step")
            text = f"the learner has been started again from step {step}, in {time.monotonic() - began:.0f} s"
            self._note("replaced", "learner back", f"{text}: {steps} of version {lost_at} are made anew")
            return
        self._note("given_up", "learner given up", f"the learner is lost too often: {last}")
        raise RunError(f"the learner was lost too often within ten minutes; the last time: {last}") from last

    async def _newest(self) -> checkpoint.Checkpoint | None:
        late = "the newest checkpoint could not be read"
        return await tasks.in_time(self._config.learner.deadline_s, late, self._checkpoints.newest)

    async def _bring_up(self, step: int, found: checkpoint.Checkpoint | None) -> None:
        """found: None where there is no checkpoint yet: nothing has been trained."""
        trainer, learner = self._trainer, self._trainer.learner
        if self._config.generator.placement == "colocated":
            await trainer.sampler.returns.recall(trainer.fleet)
            await trainer.fleet.sleep()
        await learner.restart(await self._place(learner))
        await self._roll_back(Version(self._next_incarnation(), step), found.driver if found else {})
        if self._config.generator.placement == "colocated":
            await learner.sleep()
        if found is not None:
            async with trainer.turn():
                await learner.load(found.path)
        await trainer.publish()

    async def _place(self, learner: LearnerGroup) -> placement.Slot | None:
        """Another place where a node of its own is lost; None where its own is whole. Raises RunError."""
        slot = learner.slot
        if slot is None or await asyncio.to_thread(placement.is_whole, slot):
            return None
        if self._config.generator.placement == "colocated":
            raise RunError("a node that learner and generators share is lost")
        ranks = self._config.learner.ranks
        return await asyncio.to_thread(placement.reserve, self._cluster, ranks, slot.cpus, "learner")

    async def _roll_back(self, version: Version, state: Mapping[str, Any]) -> None:
        """state: the driver's part of the checkpoint."""
        trainer, sampler = self._trainer, self._trainer.sampler
        last = Version(version.incarnation - 1, version.step)
        undone = await sampler.returns.roll_back(trainer.fleet, last, state.get("ledger", EMPTY), trainer.in_step)
        log.warning("back to step %d: groups undone: %s", version.step, undone)
        sampler.posteriors.restore(state.get("gate", {}))
        trainer.roll_back(version)
        if self._offline:
            self._offline.early.restore(state.get("offline", {}))
        await self._measuring.forget(version.step)
        await self._journal.roll_back(version.step + 1)
