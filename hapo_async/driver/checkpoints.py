"""When a run writes a checkpoint, and what the driver puts into it."""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path
from typing import Any

from actors.learner import LearnerGroup
from hapo_async import checkpoint
from hapo_async.config import Config
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.watchdog import Watchdog
from hapo_async.rundir import RunDir
from hapo_async.types import Version

log = logging.getLogger(__name__)


class Checkpoints:
    """Writes the checkpoints of one run folder and keeps the newest ``train.keep_checkpoints``."""

    def __init__(
        self, config: Config, folder: RunDir, learner: LearnerGroup, sampler: Sampler, watchdog: Watchdog
    ) -> None:
        self._config, self._folder = config, folder
        self._learner, self._sampler, self._watchdog = learner, sampler, watchdog

    async def save(self, version: Version, more: dict[str, Any]) -> Path:
        """The step boundary that ``version`` ended, with ``more`` of the driver's state. Returns its folder."""
        began, step = time.monotonic(), version.step
        root = self._folder.checkpoints
        folder = checkpoint.begin(root, step)
        await self._learner.save(folder)
        driver = {"step": step, "incarnation": version.incarnation, **self._driver_state(), **more}
        with self._watchdog.during("seals a checkpoint"):
            path = await asyncio.to_thread(checkpoint.seal, folder, root, step, driver)
        checkpoint.prune(root, self._config.train.keep_checkpoints)
        log.info("checkpoint of step %d written in %.1f s", step, time.monotonic() - began)
        return path

    def _driver_state(self) -> dict[str, Any]:
        sampler = self._sampler
        return {
            "cursor": sampler.stream.cursor(),
            "ledger": sampler.ledger.state_dict(),
            "gate": sampler.posteriors.state_dict(),
            "config_digest": self._config.digest(),
        }
