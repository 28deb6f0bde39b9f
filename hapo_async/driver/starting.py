"""Bringing up learner, generators and verifiers, side by side, each in its reserved place."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

from actors import placement
from actors.learner import LearnerGroup
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges


async def start(
    config: Config,
    model_path: str,
    cluster: placement.Cluster,
    changed: Callable[[], None],
    stack: contextlib.AsyncExitStack,
) -> tuple[LearnerGroup, Fleet, Judges]:
    """All actors, ready. ``stack`` will close them. changed: see ``Fleet``. Raises the first error when one fails; those
    that have started are closed by ``stack`` all the same."""
    c = config
    sampling = c.generator.count * c.generator.width
    shared = c.generator.placement == "colocated"
    bundles = max(sampling, c.learner.ranks) if shared else sampling + c.learner.ranks
    share = placement.cpu_share(cluster, bundles)
    slot = placement.reserve(cluster, bundles if shared else c.learner.ranks, share, "learner")
    parts: list[placement.Slot] = []
    if shared:
        slot, parts = placement.share(slot, c.generator.count, c.generator.width)

    learner = asyncio.ensure_future(LearnerGroup.start(c, model_path, cluster, slot))

    async def fleet() -> Fleet:
        if parts:  # the learner leaves the devices first
            await (await asyncio.shield(learner)).sleep()
        return await Fleet.start(c, model_path, cluster, share, changed, parts)

    started: Any = await asyncio.gather(learner, fleet(), Judges.start(c), return_exceptions=True)
    failed = [part for part in started if isinstance(part, BaseException)]
    for part in started:
        if part not in failed:
            stack.push_async_callback(part.close)
    if failed:
        raise failed[0]
    return started[0], started[1], started[2]
