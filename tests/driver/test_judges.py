"""Verifiers come, leave, die and are replaced; what they had before them goes to others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import ray

from actors.calls import CallFailed
from hapo_async.driver.judges import Judges
from hapo_async.errors import RunError
from tests.driver.living import Verifier
from tests.driver.stand_ins import Loop
from tests.virtual_time import Clock


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(ray, "kill", lambda actor: actor.die())


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def judging(clock: Clock, body: Callable[[Judges, list[Verifier]], Coroutine[Any, Any, Any]]) -> Any:
    async def go() -> Any:
        made = [Verifier(), Verifier()]

        def spawn(_: Any) -> Verifier:
            made.append(Verifier())
            return made[-1]

        judges = Judges(Loop([], prompts=1).config, {f"verifier-{i}": v for i, v in enumerate(made)}, spawn)
        judges.prompt = next(iter(Loop([], prompts=1).sampler.prompts.values()))  # type: ignore[attr-defined]
        try:
            return await body(judges, made)
        finally:
            await judges.close()

    return clock.run(go())


def test_verifiers_come_and_leave_and_what_they_had_goes_to_others(clock):
    async def body(judges, made):
        assert await judges.grow() == "verifier-2"
        made[2].judge_s = 1e5
        slow = [asyncio.create_task(judges.judge("group", judges.prompt, 2)) for _ in range(3)]
        await asyncio.sleep(5.0)
        assert await judges.retire("verifier-2", 10.0) and judges.names == ["verifier-0", "verifier-1"]
        await asyncio.gather(*slow)
        assert await judges.retire("verifier-1", 1.0) and not await judges.retire("verifier-0", 1.0)
        assert await judges.grow() == "verifier-3"
        return made

    made = judging(clock, body)
    assert made[2].judged == 0 and sum(v.judged for v in made) == 3 and made[2]._dead.done()


def test_a_dead_verifier_is_replaced_and_the_last_death_of_too_many_is_an_error(clock):
    async def body(judges, made):
        for victim in made[:2]:
            victim.die()
        await judges.judge("group", judges.prompt, 2)
        assert judges.take() >= 1
        with pytest.raises(RunError, match="no verifier is left"):
            while True:
                for victim in made:
                    victim.die()
                await judges.judge("group", judges.prompt, 2)
        return len(made)

    assert judging(clock, body) == 2 + 2 * 3


def test_a_late_failure_of_a_dead_verifier_does_not_hit_its_replacement(clock):
    async def body(judges, made):
        dead = judges._judges["verifier-0"]
        made[0].die()
        await asyncio.gather(*(judges.judge("group", judges.prompt, 2) for _ in range(4)))
        while judges.count < 2:
            await asyncio.sleep(0.5)
        judges._lose(dead, CallFailed("verifier-0", "a call of long ago", gone=True))
        assert judges.count == 2 and not made[2]._dead.done()
        return judges.take()

    assert judging(clock, body) == 1
