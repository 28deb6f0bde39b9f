"""All generators at once, where they share devices with the learner."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from actors.calls import CallFailed

if TYPE_CHECKING:
    from hapo_async.driver.fleet import Fleet
    from hapo_async.driver.generators import Generator

log = logging.getLogger(__name__)

PATIENCE_S = 30.0
REFUSED_S = 0.2  # between two tries of something that a generator refuses


async def everyone(fleet: Fleet, method: str) -> None:
    """Calls ``method`` (sleep | wake) of all that serve. One that refuses (a group that is still in flight) is asked again for
    a while; then it is out of service, since it would be in the way. Raises RunError when no generator is left."""
    until = time.monotonic() + PATIENCE_S

    async def one(generator: Generator) -> None:
        while generator.alive:
            try:
                await fleet.ask(generator, method, fleet.config.weights.deadline_s)
                return
            except CallFailed as error:
                log.warning("%s failed: %s", method, error)
                if error.gone or time.monotonic() >= until:
                    fleet.mark_failed(generator, CallFailed(generator.name, str(error), gone=True))
            await asyncio.sleep(REFUSED_S)

    await asyncio.gather(*(one(g) for g in fleet.serving))
