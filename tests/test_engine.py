"""The async surface of the transformers engine: results are handed out once, errors reach those who wait."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
import torch

from hapo_async.engine import EngineDead, EngineError, Mailbox, TransformersEngine, check_manifest, stop_ids
from hapo_async.rows import Sampled
from hapo_async.sampler import Sampler
from hapo_async.scoring import score
from hapo_async.types import GroupKey, Version
from hapo_async.weights import Manifest, TransferError
from tests.test_sampler import STOP, request, tiny


def manifest(step: int, kind: str = "full") -> Manifest:
    return Manifest(Version(0, step), (), kind)


def with_engine(scenario):
    """Runs ``scenario(engine, sampler)`` in an event loop and closes the engine."""

    async def main():
        sampler = Sampler(tiny(), [STOP])
        engine = TransformersEngine(sampler)
        try:
            return await asyncio.wait_for(scenario(engine, sampler), 30)
        finally:
            await engine.close()

    return asyncio.run(main())


def test_groups_are_collected_in_any_order_and_once():
    async def scenario(engine, _):
        await engine.submit([request(0), request(1)])
        found = [await engine.collect(request(i).key) for i in (1, 0)]
        with pytest.raises(EngineError, match="already collected"):
            await engine.collect(request(0).key)
        return found

    assert [s.request.key.uid for s in with_engine(scenario)] == ["1", "0"]


def test_a_collector_that_gives_up_does_not_destroy_the_result():
    async def scenario(engine, _):
        await engine.submit([request(0, max_tokens=200)])
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(engine.collect(request(0).key), 0.001)
        return await engine.collect(request(0).key)

    assert len(with_engine(scenario).answers) == 4


def test_a_refused_submission_leaves_no_trace():
    async def scenario(engine, _):
        with pytest.raises(EngineError, match="positions"):
            await engine.submit([request(0), request(1, max_tokens=1000)])
        assert engine.stats()["running_groups"] == 0
        with pytest.raises(EngineError, match="twice"):
            await engine.submit([request(0), request(0)])
        await engine.submit([request(0)])
        return await engine.collect(request(0).key)

    assert isinstance(with_engine(scenario), Sampled)


def test_truncating_everything_still_delivers_it():
    async def scenario(engine, _):
        asked = [request(i, max_tokens=200) for i in range(3)]
        await engine.submit(asked)
        await asyncio.sleep(0.02)
        await engine.truncate([r.key for r in asked])
        return await asyncio.gather(*(engine.collect(r.key) for r in asked))

    assert all(1 <= a.length < 200 for s in with_engine(scenario) for a in s.answers)


def test_truncate_and_abort_tell_lengths_of_finished_groups_too():
    async def scenario(engine, _):
        short, long = request(0, max_tokens=2), request(1, max_tokens=200)
        await engine.submit([short, long])
        while engine.stats()["running_groups"] > 1:
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)
        cut = await engine.truncate([short.key, long.key, GroupKey(9, "unknown", 0)])
        found = {key: (await engine.collect(key)).lengths for key in (short.key, long.key)}
        assert cut == found
        assert await engine.abort([short.key, long.key]) == {}
        return max(found[short.key]), max(found[long.key])

    short, long = with_engine(scenario)
    assert short == 2 < long < 200


def test_scores_carry_the_version_that_they_were_made_under():
    async def scenario(engine, _):
        asked, pair = request(0, max_tokens=200), (request(1).prompt_tokens, np.arange(9, dtype=np.int32))
        await engine.submit([asked])
        calls = [
            engine.score([pair]),
            engine.install(manifest(3), list(tiny(1).named_parameters())),
            engine.score([pair]),
        ]
        (old, before), _, (new, after) = await asyncio.gather(*calls)
        assert (old, new) == (Version(0, 0), Version(0, 3))
        with pytest.raises(EngineError, match="positions"):
            await engine.score([(np.zeros(300, np.int32), pair[1])])
        assert len((await engine.collect(asked.key)).answers) == 4
        return pair, before[0], after[0]

    pair, before, after = with_engine(scenario)
    for seed, found in ((0, before), (1, after)):
        assert np.abs(score(tiny(seed), [pair])[0] - found).max() < 1e-5


def test_tokens_move_while_answers_are_being_made():
    async def scenario(engine, _):
        await engine.submit([request(0, max_tokens=200)])
        seen = set()
        while engine.stats()["running_groups"]:
            seen.add(engine.stats()["tokens"])
            await asyncio.sleep(0)
        made = (await engine.collect(request(0).key)).lengths
        assert engine.stats()["tokens"] == sum(made)
        return seen

    assert len(with_engine(scenario)) > 5


def test_a_sleeping_engine_refuses_work_until_it_is_woken():
    async def scenario(engine, _):
        await engine.submit([request(0, max_tokens=200)])
        with pytest.raises(EngineError, match="groups are in work"):
            await engine.sleep()
        await engine.abort([request(0).key])
        await engine.sleep()
        for call in (engine.submit([request(1)]), engine.score([])):
            with pytest.raises(EngineError, match="asleep"):
                await call
        await engine.wake()
        await engine.submit([request(1)])
        return await engine.collect(request(1).key)

    assert len(with_engine(scenario).answers) == 4


def test_installs_report_their_version_and_refuse_what_does_not_fit():
    async def scenario(engine, _):
        assert await engine.install(manifest(3), list(tiny(1).named_parameters())) > 0
        for bad in (manifest(2), manifest(4, "delta")):
            with pytest.raises(TransferError):
                await engine.install(bad, list(tiny(2).named_parameters()))
        with pytest.raises(TransferError, match="never arrived"):
            await engine.install(manifest(4), [])
        return engine.stats()["version"]

    assert with_engine(scenario) == "0.3"


def test_a_dying_decode_thread_fails_those_who_wait_and_those_who_come():
    async def scenario(engine, sampler):
        await engine.submit([request(0, max_tokens=200)])

        def broken():
            raise MemoryError("no more")

        sampler.step = broken
        for call in (engine.collect(request(0).key), engine.submit([request(1)]), engine.abort([request(0).key])):
            with pytest.raises(EngineDead, match="MemoryError: no more"):
                await call

    with_engine(scenario)


def test_closing_releases_those_who_wait():
    async def scenario(engine, _):
        await engine.submit([request(0, max_tokens=200)])
        waiting = asyncio.create_task(engine.collect(request(0).key))
        await asyncio.sleep(0)
        await engine.close()
        with pytest.raises(EngineError, match="closed"):
            await waiting

    with_engine(scenario)


def test_an_error_that_nobody_collects_is_silent():
    problems = []

    async def main():
        asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
        mailbox = Mailbox()
        mailbox.open([GroupKey(0, "a", 0)])
        mailbox.close([GroupKey(0, "a", 0)], EngineError("aborted"))
        await asyncio.sleep(0)

    asyncio.run(main())
    assert problems == []


def test_manifests_are_full_and_never_older():
    check_manifest(manifest(5), Version(0, 5))
    with pytest.raises(TransferError, match="older"):
        check_manifest(manifest(5), Version(1, 0))
    with pytest.raises(TransferError, match="adapter"):
        check_manifest(manifest(9, "adapter"), Version(0, 5))


def test_every_end_of_text_that_the_model_names_stops_an_answer():
    class Names:
        def __init__(self, eos_token_id):
            self.eos_token_id = eos_token_id

    assert stop_ids(Names(7), Names(None), Names([3, 7])) == (3, 7)
    with pytest.raises(EngineError, match="end-of-text"):
        stop_ids(Names(None), Names(None), None)


def test_the_engine_decodes_with_one_thread_on_a_cpu():
    async def scenario(engine, sampler):
        await engine.submit([request(0)])
        await engine.collect(request(0).key)
        return await engine._between_steps(torch.get_num_threads)

    assert with_engine(scenario) == 1
