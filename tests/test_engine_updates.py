"""Weights that are written into the transformers engine as they arrive, torn ones, and groups that are handed over."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from hapo_async.engine import EngineError, TransformersEngine
from hapo_async.rows import Sampled
from hapo_async.sampler import Sampler
from hapo_async.types import GroupKey, GroupRequest, Version
from hapo_async.weights import Manifest, TransferError
from tests.test_engine import manifest, with_engine
from tests.test_sampler import STOP, request, run, tiny, worst

MODELS = {step: tiny(step) for step in range(4)}
LONG = {"max_tokens": 100}


def buckets(step: int, size: int = 6):
    named = list(MODELS[step].named_parameters())
    return [named[i : i + size] for i in range(0, len(named), size)]


def source(step: int, pieces=None, fail_at: int | None = None, between=lambda i: None):
    """Delivers ``pieces`` and calls ``between(i)`` before each; ``fail_at`` is where the line goes dead."""

    def deliver(write) -> Manifest:
        for i, tensors in enumerate(buckets(step) if pieces is None else pieces):
            between(i)
            if i == fail_at:
                raise TransferError("the line went dead")
            write(tensors)
        return manifest(step)

    return deliver


def errors(found: list[Sampled]) -> float:
    return worst({s.request.key: s for s in found}, MODELS)


async def some_tokens(engine, more: int = 8) -> None:
    goal = engine.stats()["tokens"] + more
    while engine.stats()["tokens"] < goal:
        await asyncio.sleep(0.001)


# ---------------------------------------------------------------- in place


def test_weights_written_in_place_serve_requests_that_were_running_and_those_that_came_meanwhile():
    arrived, go_on = threading.Event(), threading.Event()

    def between(i: int) -> None:
        if i == 1:
            arrived.set()
            assert go_on.wait(20)

    async def scenario(engine, _):
        asked = [request(i, **LONG) for i in range(3)]
        await engine.submit(asked)
        await some_tokens(engine)
        update = asyncio.create_task(engine.install_in_place(Version(0, 1), source(1, between=between)))
        await asyncio.to_thread(arrived.wait, 20)
        await asyncio.sleep(0.01)
        before = engine.stats()
        late = [request(i, **LONG) for i in (7, 8)]
        await engine.submit(late)
        await engine.abort([late[1].key])
        await asyncio.sleep(0.03)
        assert engine.stats()["tokens"] == before["tokens"] and before["torn"] == 1.0
        scored = asyncio.create_task(engine.score([(asked[0].prompt_tokens, np.arange(5))]))
        go_on.set()
        assert await update > 0.03
        assert (await scored)[0] == Version(0, 1)
        assert engine.stats()["torn"] == 0.0 and engine.version == Version(0, 1)
        return [await engine.collect(r.key) for r in (*asked, late[0])]

    found = with_engine(scenario)
    assert any(len(a.spans) == 2 for s in found[:3] for a in s.answers)
    assert {span.version for a in found[3].answers for span in a.spans} == {Version(0, 1)}
    assert errors(found) < 1e-4


def test_a_failure_before_the_first_write_changes_nothing():
    async def scenario(engine, _):
        for bad in (source(1, fail_at=0), source(1, pieces=[[("model.nothing", torch.zeros(1))]])):
            with pytest.raises(TransferError, match=r"dead|has no parameter"):
                await engine.install_in_place(Version(0, 1), bad)
            assert engine.stats()["torn"] == 0.0
        with pytest.raises(TransferError, match="older"):
            await engine.install_in_place(Version(-1, 0), source(1))
        await engine.submit([request(0)])
        return [await engine.collect(request(0).key)]

    found = with_engine(scenario)
    assert {s.version for a in found[0].answers for s in a.spans} == {Version(0, 0)} and errors(found) < 1e-4


def reshaped() -> list:
    pieces = buckets(1)
    name, tensor = pieces[2][0]
    return [*pieces[:2], [(name, tensor[None]), *pieces[2][1:]], *pieces[3:]]


FAILURES = {
    "the line goes dead": (source(1, fail_at=2), "dead", "in place"),
    "a parameter never comes": (source(1, pieces=buckets(1)[:-1]), "never arrived", "staged"),
    "a shape is wrong": (source(1, pieces=reshaped()), "shape", "in place"),
    "a bucket comes twice": (source(1, pieces=[*buckets(1)[:2], buckets(1)[1]]), "came twice", "staged"),
    "the manifest is another version's": (source(2, pieces=buckets(2)), "0.1 was expected", "in place"),
}


@pytest.mark.parametrize("how", FAILURES)
def test_torn_weights_serve_nothing_until_a_full_update(how: str):
    bad, message, heals = FAILURES[how]

    async def scenario(engine, _):
        kept, dropped, cut, late = (request(i, **LONG) for i in range(4))
        await engine.submit([kept, dropped, cut])
        await some_tokens(engine)
        with pytest.raises(TransferError, match=rf"{message}.*; the weights are torn"):
            await engine.install_in_place(Version(0, 1), bad)
        await engine.submit([late])
        await engine.abort([dropped.key])
        await engine.truncate([cut.key])
        ended = await engine.collect(cut.key)  # what it had before
        tokens = engine.stats()["tokens"]
        with pytest.raises(EngineError, match="torn"):
            await engine.score([(kept.prompt_tokens, np.arange(5))])
        await asyncio.sleep(0.03)
        stats = engine.stats()
        assert (stats["tokens"], stats["torn"], stats["version"]) == (tokens, 1.0, "0.0")
        if heals == "staged":
            await engine.install(manifest(3), list(MODELS[3].named_parameters()))
        else:
            await engine.install_in_place(Version(0, 3), source(3))
        assert engine.stats()["torn"] == 0.0
        return ended, [await engine.collect(r.key) for r in (kept, late)]

    ended, found = with_engine(scenario)
    assert errors([ended, *found]) < 1e-4
    assert {s.version for s in found[1].answers[0].spans} == {Version(0, 3)}
    assert {s.version for a in found[0].answers for s in a.spans} == {Version(0, 0), Version(0, 3)}


def test_a_staged_install_that_breaks_while_it_copies_is_torn_and_can_be_closed():
    async def scenario(engine, _):
        weights = list(MODELS[1].named_parameters())
        weights[-1] = (weights[-1][0], torch.empty_like(weights[-1][1], device="meta"))  # nothing to copy from
        await engine.submit([request(0, **LONG)])
        with pytest.raises(TransferError, match=r"meta.*; the weights are torn"):
            await engine.install(manifest(1), weights)
        assert engine.stats()["torn"] == 1.0
        waiting = asyncio.create_task(engine.collect(request(0).key))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await waiting

    with_engine(scenario)


# ---------------------------------------------------------------- hand over


def resumed(found: Sampled, attempt: int = 1) -> GroupRequest:
    old = found.request
    return replace(old, key=old.key._replace(attempt=attempt), prefixes=found.answers)


def test_groups_are_handed_over_as_they_are_and_go_on_in_another_engine():
    """One that is complete, one that is running, one that has not started."""

    async def scenario(engine, sampler):
        short, long, late = request(0, max_tokens=2), request(1, **LONG), request(2, **LONG)
        await engine.submit([short, long])
        await some_tokens(engine, 20)
        await engine._between_steps(lambda: sampler.add([late]))
        engine._mailbox.open([late.key])
        taken = [asyncio.create_task(engine.collect(r.key)) for r in (long, late)]
        await asyncio.sleep(0)
        keys = [late.key, GroupKey(9, "unknown", 0), short.key, long.key]
        found = await engine.hand_over(keys)
        for task in taken:
            with pytest.raises(EngineError, match="handed over"):
                await task
        for key in (short.key, long.key, late.key):
            with pytest.raises(EngineError, match="is not here"):
                await engine.collect(key)
        assert engine.stats()["running_groups"] == engine.stats()["running_sequences"] == 0
        assert await engine.hand_over(keys) == []
        return found

    late, short, long = with_engine(scenario)
    assert [s.request.key.uid for s in (late, short, long)] == ["2", "0", "1"]
    assert {a.finish_reason for a in short.answers} <= {"stop", "length"}
    assert {a.finish_reason for a in long.answers} <= {"stop", "abort"} and min(long.lengths) > 0
    assert {a.finish_reason for a in late.answers} == {"abort"}

    async def go_on(engine, _):
        asked = [resumed(s) for s in (late, short, long)]
        await engine.install(manifest(1), list(MODELS[1].named_parameters()))
        await engine.submit(asked)
        return [await engine.collect(r.key) for r in asked]

    ended = with_engine(go_on)
    assert errors(ended) < 1e-4
    assert not {"abort"} & {a.finish_reason for s in ended for a in s.answers}
    for before, after in zip(long.answers, ended[2].answers, strict=True):
        assert np.array_equal(before.tokens, after.tokens[: before.length])
        assert before.spans == after.spans[: len(before.spans)] and after.length <= 100
        if before.finish_reason == "abort":
            assert after.spans[-1].version == Version(0, 1) and after.length > before.length
    assert [a.tokens.tolist() for a in ended[1].answers] == [a.tokens.tolist() for a in short.answers]


def test_an_answer_that_was_handed_over_is_the_one_that_it_would_have_become():
    """Noise comes from (seed, group, answer, position): under the same weights a move changes nothing."""
    asked = request(5, **LONG)

    (whole,) = run(Sampler(tiny(), [STOP]), [asked]).values()
    sampler = Sampler(tiny(), [STOP])
    sampler.add([asked])
    for _ in range(7):
        sampler.step()
    (half,) = sampler.hand_over([asked.key])
    assert not sampler.has_work and set(half.lengths) <= set(range(1, 8))
    (ended,) = run(Sampler(tiny(), [STOP]), [replace(asked, prefixes=half.answers)]).values()
    for one, other in zip(whole.answers, ended.answers, strict=True):
        assert np.array_equal(one.tokens, other.tokens) and one.finish_reason == other.finish_reason
        assert np.abs(one.logp_behave - other.logp_behave).max() < 1e-4
    assert worst({asked.key: ended}, {0: MODELS[0]}) < 1e-4


def test_torn_weights_do_not_keep_groups_from_being_handed_over():
    async def scenario(engine, _):
        asked = [request(i, **LONG) for i in range(2)]
        await engine.submit(asked[:1])
        await some_tokens(engine)
        with pytest.raises(TransferError):
            await engine.install_in_place(Version(0, 1), source(1, fail_at=1))
        await engine.submit(asked[1:])
        return await engine.hand_over([r.key for r in asked])

    started, fresh = with_engine(scenario)
    assert max(started.lengths) > 0 == max(fresh.lengths) and errors([started]) < 1e-4
    assert all(len(a.segments) == 1 and a.tokens.dtype == np.int32 for a in fresh.answers)


def test_two_collectors_of_one_group_get_it_once():
    async def scenario(engine: TransformersEngine, _):
        await engine.submit([request(0)])
        both = await asyncio.gather(*(engine.collect(request(0).key) for _ in range(2)), return_exceptions=True)
        return sorted(type(b).__name__ for b in both)

    assert with_engine(scenario) == ["EngineError", "Sampled"]
