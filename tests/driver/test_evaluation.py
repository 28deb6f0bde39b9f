"""Evaluation asks each set in its own way, records every question, and survives a generator's death."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
import pytest

from actors.calls import CallFailed
from hapo_async import config, metrics
from hapo_async.config import EvalConfig
from hapo_async.driver import fleet as fleets
from hapo_async.driver.evaluation import Evaluator, Scored
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.evaluation import verdicts
from hapo_async.types import Prompt
from tests.driver.stand_ins import StandInGenerator, StandInJudges


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


def prompts(count: int, prefix: str) -> list[Prompt]:
    message = ({"role": "user", "content": "x"},)
    return [
        Prompt(f"{prefix}{i}", message, np.arange(3, dtype=np.int32), "1", extra={"level": "2"}) for i in range(count)
    ]


def evaluator(actors: list[StandInGenerator], sets: dict[str, list[Prompt]], **more) -> Evaluator:
    c = config.parse({"eval": {"n": 2, "temperature": 1.0}, "generator": {"deadline_s": 5.0, "max_concurrent": 4}})
    fleet = Fleet(c, [Generator(a.name, a, None) for a in actors], lambda: None)  # type: ignore[arg-type]
    return Evaluator(c, sets, fleet, StandInJudges(), **more)  # type: ignore[arg-type]


def test_every_question_is_recorded_and_the_sets_are_averaged(tmp_path: Path):
    async def scenario():
        sets = {"a": prompts(5, "a"), "b": prompts(3, "b")}
        return await evaluator([StandInGenerator("g0"), StandInGenerator("g1")], sets, run_dir=tmp_path).run(7)

    values = asyncio.run(scenario())
    for name in values:
        metrics.lookup(name)
    assert values["eval/a/avg@2"] == values["eval/macro/pass@1"] == 0.5  # every second answer is right
    found = verdicts.read(tmp_path)
    assert found["a"].accuracy == {7: {f"a{i}": 0.5 for i in range(5)}}
    assert found["b"].levels == {f"b{i}": "2" for i in range(3)}


def test_each_set_is_asked_in_its_own_way():
    settings = {"a": EvalConfig(n=4, temperature=0.6, top_p=0.95, max_tokens=9), "b": EvalConfig()}

    async def scenario():
        asking = evaluator([StandInGenerator("g")], {"a": prompts(2, "a"), "b": prompts(1, "b")}, settings=settings)
        scored = await asking.score_all(0)
        return asking, scored

    asking, scored = asyncio.run(scenario())
    assert [len(s.judgements) for s in scored["a"]] == [4, 4] and [len(s.judgements) for s in scored["b"]] == [1]
    sampling = asking._sampling("a")
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.top_p) == (4, 9, 0.6, 0.95)
    assert asking._sampling("b").max_tokens == asking.config.sampling.max_tokens


def test_the_answers_are_handed_over_once_each_though_a_generator_dies():
    kept: list[tuple[str, str]] = []

    async def keep(name: str, scored: Scored, payload: object) -> None:
        assert payload == ("payload", scored.header.key)
        kept.append((name, scored.prompt.uid))

    async def scenario():
        first, second = StandInGenerator("g0", lambda key: 0.01), StandInGenerator("g1", lambda key: 0.01)
        asking = evaluator([first, second], {"a": prompts(12, "a")}, keep=keep)
        asyncio.get_running_loop().call_later(0.015, first.die)
        return await asking.run(0)

    values = asyncio.run(scenario())
    assert values["eval/a/prompts"] == 12
    assert sorted(kept) == sorted(("a", f"a{i}") for i in range(12))


def test_answers_that_cannot_be_kept_are_asked_for_again():
    calls = []

    async def keep(name: str, scored: Scored, payload: object) -> None:
        calls.append(scored.prompt.uid)
        if len(calls) == 1:
            raise CallFailed("g0", "an object is lost", gone=False)

    async def scenario():
        return await evaluator([StandInGenerator("g0"), StandInGenerator("g1")], {"a": prompts(4, "a")}, keep=keep).run(
            0
        )

    assert asyncio.run(scenario())["eval/a/prompts"] == 4
    assert len(calls) == 5 and len(set(calls)) == 4
