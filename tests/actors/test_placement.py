"""Places that are reserved while a run goes on, and used again after whoever was there died or froze."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from actors import placement
from actors.calls import CallFailed, answer
from hapo_async.errors import RunError


class Sleeper:
    async def pid(self) -> int:
        return os.getpid()

    async def sleep(self) -> None:
        await asyncio.sleep(600)


def spawn(ray, slot):
    return ray.remote(Sleeper).options(**slot.options(0, max_concurrency=10, max_restarts=0)).remote()


def test_the_place_of_a_frozen_actor_can_be_used_again(ray_session):
    async def go() -> None:
        slot = await placement.reserve_beside(placement.join(1), 1, 1.0, "frozen", 20.0)
        actor = spawn(ray_session, slot)
        pid = await answer(actor.pid.remote(), 180.0, "first")
        sleeping = asyncio.create_task(answer(actor.sleep.remote(), 600.0, "first"))
        await asyncio.sleep(0.1)
        os.kill(pid, signal.SIGSTOP)
        ray_session.kill(actor)
        with pytest.raises(CallFailed) as caught:
            await asyncio.wait_for(sleeping, 60.0)
        assert caught.value.gone and placement.is_whole(slot)
        again = spawn(ray_session, slot)
        assert await answer(again.pid.remote(), 180.0, "second") != pid
        slot.release()
        assert not placement.is_whole(slot)
        slot.release()  # twice is once

    asyncio.run(go())


def test_nothing_stays_reserved_of_what_was_not_given_in_time_or_not_wanted_any_more(ray_session):
    cluster = placement.Cluster(8.0, 0.0, None, False)

    def waiting() -> int:
        table = ray_session.util.placement_group_table()
        return sum(group["state"] == "PENDING" for group in table.values())

    async def go() -> None:
        with pytest.raises(RunError, match=r"1000 x .* not available within 0 s"):
            await placement.reserve_beside(cluster, 1000, 1.0, "large", 0.0)
        reserving = asyncio.create_task(placement.reserve_beside(cluster, 1000, 1.0, "large", 60.0))
        while not waiting():
            await asyncio.sleep(0.05)
        reserving.cancel()
        await asyncio.wait({reserving})
        assert reserving.cancelled() and not waiting()

    asyncio.run(go())
