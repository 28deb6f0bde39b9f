"""Evaluation asks each set in its own way, records every question, and survives a generator's death."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.calls import CallFailed
from hapo_async import config, metrics
from hapo_async.config import EvalConfig
from hapo_async.driver import fleet as fleets
from hapo_async.driver.beside import BesideTraining
from hapo_async.driver.evaluation import Evaluator, Scored
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.measuring import Measuring
from hapo_async.driver.training import StepTimes, Trained
from hapo_async.errors import RunError
from hapo_async.evaluation import verdicts
from hapo_async.types import GroupKey, Prompt, Version
from tests.driver.stand_ins import Loop, StandInGenerator, StandInJudges, StandInLearner
from tests.virtual_time import Clock


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


def prompts(count: int, prefix: str) -> list[Prompt]:
    message = ({"role": "user", "content": "x"},)
    return [
        Prompt(f"{prefix}{i}", message, np.arange(3, dtype=np.int32), "1", extra={"level": "2"}) for i in range(count)
    ]


def evaluator(actors: list[StandInGenerator], sets: dict[str, list[Prompt]], **more) -> Evaluator:
    c = config.parse(
        {
            "eval": {"n": 2, "sampling": {"temperature": 1.0}},
            "generator": {"deadline_s": 5.0, "max_concurrent": 4},
        }
    )
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
    settings = {"a": EvalConfig(n=4, sampling={"temperature": 0.6, "top_p": 0.95, "max_tokens": 9}), "b": EvalConfig()}

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


# -------------------------------------------------------------------------------------------------------------------
# Beside training


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


class Training(Loop):
    """A loop that evaluates beside its steps. At ``steps`` an evaluation is due; answered: (generator, version) of every
    evaluated answer, as ``keep`` saw them."""

    def __init__(self, actors: list[StandInGenerator], due: Sequence[int], count: int = 8, **tree: Any) -> None:
        base: dict[str, Any] = {
            "train": {"batch_prompts": 2, "steps": 60},
            "max_staleness": 2,
            "generator": {"count": len(actors), "max_concurrent": 4, "deadline_s": 50.0},
            "eval": {"n": 2, "sampling": {"temperature": 1.0}, "every": 1},
        }
        for actor in actors:
            actor.latency = lambda key: 5.0 if key.epoch < 0 else 1.0
        super().__init__(actors, prompts=16, trains=StandInLearner(step_s=0.5), **(base | tree))
        self.actors, self.due = actors, due
        self.answered: list[tuple[str, Version, Version]] = []
        sets = {"a": prompts(count, "a")}
        evaluator = Evaluator(self.config, sets, self.fleet, self.judges, keep=self._keep)  # type: ignore[arg-type]
        self.beside = BesideTraining(self.config, evaluator, self.fleet)
        self.rows: list[tuple[int, dict[str, float]]] = []

    async def _keep(self, name: str, scored: Scored, payload: object) -> None:
        assert scored.header.oldest and scored.header.newest
        self.answered.append((scored.header.generator, scored.header.oldest, scored.header.newest))

    async def _committed(self, trained: Trained) -> StepTimes:
        if trained.step in self.due and self.beside.possible:
            self.beside.start(trained.step, self.trainer.version)
        self.rows += [(trained.step, *row) for row in self.beside.take()]  # type: ignore[misc]
        return await super()._committed(trained)

    def issued(self) -> dict[str, int]:
        """Training's groups by generator so far."""
        return {a.name: sum(key.epoch >= 0 for key in a.issued) for a in self.actors}

    async def until(self, what: Callable[[], Any]) -> None:
        while not what():
            await asyncio.sleep(0.25)


def trained(clock: Clock, generators: int, play: Callable[[Training], Any], **tree: Any) -> Training:
    """``play`` beside a whole run of so many generators."""

    async def scenario() -> Training:
        loop = Training([StandInGenerator(f"g{i}") for i in range(generators)], **tree)
        playing = asyncio.create_task(play(loop))
        await loop.run(1000.0)
        await loop.beside.drain()
        await playing
        loop.rows += [(loop.trainer.version.step, *row) for row in loop.beside.take()]  # type: ignore[misc]
        return loop

    loop = clock.run(scenario())
    assert loop.trainer.version.step == 60 and max(loop.ages) <= 2
    # Evaluation leaves no trace in the books.
    counts = loop.ledger.counts()
    assert counts["trained"] == 120
    assert not loop.fleet.calls() or all(c.key is None or c.key.epoch >= 0 for c in loop.fleet.calls())
    return loop


def test_a_detached_evaluation_is_of_one_version_while_the_others_sample_and_the_learner_trains(clock):
    seen: dict[str, Any] = {}

    async def play(loop: Training) -> None:
        await loop.until(lambda: [g for g in loop.fleet.generators if g.detached and not g.outstanding])
        seen["lent"] = next(g for g in loop.fleet.generators if g.detached)
        seen["before"], seen["step"] = loop.issued(), loop.trainer.version.step
        await loop.until(lambda: not seen["lent"].detached)
        seen["after"], seen["end"] = loop.issued(), loop.trainer.version.step

    loop = trained(clock, 3, play, due=[4])
    assert set(loop.answered) == {(seen["lent"].name, Version(1, 4), Version(1, 4))} and len(loop.answered) == 8
    (row,) = loop.rows
    assert row[0] > 4 and row[1] == 4 and row[2]["eval/a/version"] == 4 and row[2]["eval/a/pass@1"] == 0.5
    assert "eval/a/version_max" not in row[2]
    sampled = {name: seen["after"][name] - seen["before"][name] for name in seen["before"]}
    assert sampled.pop(seen["lent"].name) == 0 and min(sampled.values()) > 3
    assert seen["end"] > seen["step"] + 5, "the learner went on"
    # It came back: newer weights, and groups again.
    lent = next(a for a in loop.actors if a.name == seen["lent"].name)
    assert lent.installs[-1].step > seen["end"] - 1 and loop.issued()[lent.name] > seen["after"][lent.name]


def test_the_generator_with_the_least_to_do_is_lent(clock):
    async def scenario():
        actors = [StandInGenerator(f"g{i}") for i in range(3)]
        loop = Training(actors, due=[])
        await loop.trainer.publish()
        await loop.fleet.wait_installed(Version(1, 0), 5.0)
        for generator, tokens in zip(loop.fleet.generators, (50, 20, 30), strict=True):
            generator.assign(GroupKey(0, "x", 0), tokens)
        asyncio.get_running_loop().call_later(3.0, loop.fleet.release, loop.fleet.generators[1], GroupKey(0, "x", 0))
        loop.beside.start(0, Version(1, 0))
        await loop.beside.drain()
        return loop

    assert {name for name, *_ in clock.run(scenario()).answered} == {"g1"}


def test_when_the_lent_generator_dies_another_one_goes_on_with_the_same_version(clock):
    async def scenario():
        actors = [StandInGenerator(f"g{i}") for i in range(3)]
        loop = Training(actors, due=[])
        await loop.trainer.publish()
        await loop.fleet.wait_installed(Version(1, 0), 5.0)
        loop.beside.start(0, Version(1, 0))
        asyncio.get_running_loop().call_later(7.0, actors[0].die)  # four questions are answered, four are not
        await loop.beside.drain()
        return loop

    loop = clock.run(scenario())
    ((step, values),) = loop.beside.take()
    assert step == 0 and values["eval/a/prompts"] == 8 and values["eval/a/version"] == 0
    assert [name for name, *_ in loop.answered] == ["g0"] * 4 + ["g1"] * 4
    assert [g.name for g in loop.fleet.serving] == ["g1", "g2"] and not loop.fleet.generators[1].outstanding


def test_an_evaluation_whose_version_nobody_can_serve_any_more_is_given_up_and_training_goes_on(clock, caplog):
    async def play(loop: Training) -> None:
        await loop.until(lambda: len(loop.answered) == 4)  # by now newer versions are out
        next(a for a, g in zip(loop.actors, loop.fleet.generators, strict=True) if g.detached).die()

    loop = trained(clock, 3, play, due=[4])
    assert [(step, values) for _, step, values in loop.rows] == [(4, {"eval/given_up": 1.0})]
    assert len(loop.fleet.serving) == len(loop.fleet.alive) == 2
    assert "the evaluation of step 4 is given up" in caplog.text and "cannot be detached at version 1.4" in caplog.text


def test_answers_of_another_version_are_refused(clock, caplog):
    async def play(loop: Training) -> None:
        await loop.until(lambda: [g for g in loop.fleet.generators if g.detached and not g.outstanding])
        lent = next(a for a, g in zip(loop.actors, loop.fleet.generators, strict=True) if g.detached)
        await loop.until(lambda: len(loop.answered) == 4)
        lent.version = Version(1, 5)

    loop = trained(clock, 2, play, due=[4], count=12)
    assert [(step, values) for _, step, values in loop.rows] == [(4, {"eval/given_up": 1.0})]
    assert "not with 1.4" in caplog.text and len(loop.fleet.serving) == 2

    async def barrier() -> None:
        actor = StandInGenerator("g")
        actor.version = Version(1, 3)
        await evaluator([actor], {"a": prompts(2, "a")}).run(4, version=Version(1, 4))

    with pytest.raises(RunError, match=r"with versions 1\.3 to 1\.3, not with 1\.4"):
        clock.run(barrier())


def test_a_floating_evaluation_says_which_versions_answered(clock):
    async def play(loop: Training) -> None:
        await loop.until(lambda: loop.answered)
        assert not any(g.detached for g in loop.fleet.generators)

    asked = {"n": 2, "sampling": {"temperature": 1.0}, "every": 1, "mode": "floating"}
    loop = trained(clock, 2, play, due=[4], eval=asked)
    ((_, step, values),) = loop.rows
    versions = [v.step for _, oldest, newest in loop.answered for v in (oldest, newest)]
    assert step == 4 and {name for name, *_ in loop.answered} == {"g0", "g1"}
    assert values["eval/a/version"] == min(versions) >= 3
    assert values["eval/a/version_max"] == max(versions) > values["eval/a/version"]
    for name in values:
        metrics.lookup(name)


def test_an_evaluation_that_is_due_while_another_runs_is_skipped_and_counted(clock):
    async def play(loop: Training) -> None:
        await loop.until(lambda: len(loop.rows) >= 3)

    loop = trained(clock, 3, play, due=[4, 5, 6, 40])
    rows = {step: values for _, step, values in loop.rows}
    assert rows[5] == rows[6] == {"eval/skipped": 1.0}
    assert rows[4]["eval/a/version"] == 4 and rows[40]["eval/a/version"] == 40
    metrics.lookup("eval/skipped")
    metrics.lookup("eval/given_up")


def test_a_run_that_ends_takes_its_generator_back_and_leaves_nothing_running(clock):
    async def scenario():
        actors = [StandInGenerator(f"g{i}") for i in range(2)]
        loop = Training(actors, due=[])
        await loop.trainer.publish()
        await loop.fleet.wait_installed(Version(1, 0), 5.0)
        loop.beside.start(0, Version(1, 0))
        await asyncio.sleep(2.0)
        assert [g.detached for g in loop.fleet.generators] == [True, False] and len(actors[0]._slots) == 4
        await loop.beside.close()
        assert loop.fleet.serving == loop.fleet.generators and not actors[0]._slots
        return loop

    assert clock.run(scenario()).beside.take() == [(0, {"eval/given_up": 1.0})]


def test_a_run_that_fails_writes_down_what_ran_beside_it(clock):
    """That of step 0 has just begun and that of step 2 was skipped, when something else ends the run."""

    async def scenario():
        loop = Training([StandInGenerator(f"g{i}") for i in range(2)], due=[])
        await loop.trainer.publish()
        await loop.fleet.wait_installed(Version(1, 0), 5.0)
        run = Ending("detached", 4, [], loop.beside)
        loop.beside.start(0, Version(1, 0))
        loop.beside.start(2, Version(1, 0))
        await run.measuring.give_up()
        return run.written, loop.fleet

    written, fleet = clock.run(scenario())
    assert sorted(written) == [(0, {"eval/given_up": 1.0}), (2, {"eval/skipped": 1.0})]
    assert fleet.serving == fleet.generators


@pytest.mark.parametrize(
    ("tree", "possible"),
    [
        ({}, True),
        ({"eval": {"mode": "floating"}}, True),
        ({"eval": {"mode": "barrier"}}, False),
        ({"max_staleness": 0}, False),
        ({"algorithm": "dpo"}, False),
    ],
)
def test_what_must_not_run_beside_training_is_a_barrier(clock, tree, possible):
    async def scenario() -> None:
        loop = Training([StandInGenerator("g0"), StandInGenerator("g1")], due=[], **tree)
        assert loop.beside.possible is possible
        loop.fleet.generators[0].alive = False  # with one generator left, none can be lent
        assert loop.beside.possible is (loop.config.evaluation_mode == "floating")

    clock.run(scenario())


class Ending:
    """A run at ``step`` of 100 with evaluations every 4 steps, as far as ``measuring`` sees it; rows: what ended beside
    training. final: the steps of its barriers."""

    def __init__(self, mode: str, step: int, rows: list[tuple[int, dict[str, float]]], beside: Any = None) -> None:
        self.config = config.parse({"eval": {"every": 4, "mode": mode}, "generator": {"count": 2}, "max_staleness": 1})
        self.stopped, self.final, self.written = asyncio.Event(), list[int](), list[tuple[int, dict[str, float]]]()
        self.evaluator = SimpleNamespace(sets={"a": []}, run=self._answer)
        trainer = SimpleNamespace(
            config=self.config,
            version=Version(1, step),
            stopping=False,
            everywhere=self._nothing,
            attended=lambda work: work,
        )
        beside = beside or SimpleNamespace(drain=self._nothing, take=lambda: [rows.pop() for _ in list(rows)])
        journal = SimpleNamespace(beside=lambda *row: self.written.append(row), evaluation=lambda *row: None)
        self.measuring = Measuring(trainer, self.evaluator, beside, journal, self.stopped)  # type: ignore[arg-type]

    async def _nothing(self, *_: object) -> None:
        pass

    async def _answer(self, step: int, version: Version) -> dict[str, float]:
        self.final.append(step)
        return {"eval/a/pass@1": 0.9}

    async def at(self, step: int) -> dict[str, float]:
        """What the row of a step gets."""
        return await self.measuring.at(Trained(step, [], {}, StepTimes()))


@pytest.mark.parametrize(
    ("mode", "rows", "again"),
    [
        ("detached", [(8, {"eval/a/pass@1": 0.5})], False),
        ("detached", [(8, {"eval/skipped": 1.0})], True),
        ("detached", [(8, {"eval/given_up": 1.0})], True),
        ("floating", [(8, {"eval/a/pass@1": 0.5})], True),
        ("detached", [(4, {"eval/a/pass@1": 0.5})], True),
    ],
)
def test_where_the_data_end_early_the_last_weights_are_evaluated_under_one_version(mode, rows, again):
    run = Ending(mode, 8, list(rows))
    asyncio.run(run.measuring.at_the_end(ended_early=True))
    assert run.final == ([8] if again else [])
    assert run.measuring.last == {"eval/a/pass@1": 0.9 if again else 0.5}


def test_an_older_evaluation_that_ends_before_the_final_one_is_not_taken_for_it():
    run = Ending("detached", 100, [(96, {"eval/a/pass@1": 0.5})])
    asyncio.run(run.at(100))
    asyncio.run(run.measuring.at_the_end(ended_early=True))
    assert run.measuring.last == {"eval/a/pass@1": 0.9} and run.final == [100]


def test_what_was_evaluated_past_a_checkpoint_is_evaluated_anew_after_a_restart():
    """The learner goes back from step 8 to 6."""
    run = Ending("detached", 8, [])
    run.config.train.steps = 8
    asyncio.run(run.at(8))
    run.measuring._beside.forget = run._nothing  # type: ignore[method-assign]
    asyncio.run(run.measuring.forget(6))
    asyncio.run(run.measuring.at_the_end(ended_early=True))
    assert run.final == [8, 8]


@pytest.mark.parametrize("dies_s", [0.2, 7.0])
def test_training_takes_the_last_generator_back_from_an_evaluation(clock, dies_s):
    """7 s: in the middle of the answers; 0.2 s: while the lent one finishes its groups."""

    async def play(loop: Training) -> None:
        await loop.until(lambda: [g for g in loop.fleet.generators if g.detached])
        other = next(g for g in loop.fleet.generators if not g.detached)
        await asyncio.sleep(dies_s)
        other.actor.die()

    loop = trained(clock, 2, play, due=[4], count=400)
    assert loop.rows[0][1:] == (4, {"eval/given_up": 1.0})
    assert not any(g.detached for g in loop.fleet.generators)


def test_a_signal_does_not_wait_for_an_evaluation():
    async def scenario() -> tuple[Ending, dict[str, float], float]:
        run = Ending("barrier", 100, [])
        run.config.train.steps = 100
        given_back: list[str] = []

        async def forever(step: int, version: Version) -> dict[str, float]:
            try:
                await asyncio.sleep(3600)
            finally:
                given_back.append("a generator")
            return {}

        run.evaluator.run = forever
        evaluating = asyncio.create_task(run.at(100))
        await asyncio.sleep(0.01)
        began = asyncio.get_running_loop().time()
        run.stopped.set()
        values = await evaluating
        assert given_back
        return run, values, asyncio.get_running_loop().time() - began

    run, values, seconds = asyncio.run(scenario())
    assert values == {"eval/given_up": 1.0} and not run.measuring.last and seconds < 2.0
