"""Cached answers reach the learner without a generator: each prompt once an epoch, the left-out ones never."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from hapo_async.driver.offline import CachedGroup
from hapo_async.types import GroupHeader, GroupKey, Judgement, Prompt, Verdict
from tests.driver.stand_ins import Loop, StandInGenerator, StandInLearner

SCORES = (np.full(4, -0.5, np.float32), np.full(4, -1.5, np.float32))


class StandInAnswers:
    """Two answers to every prompt, the second one right; prompts with an even number train."""

    def trains(self, uid: str) -> bool:
        return int(uid[1:]) % 2 == 0

    def take(self, key: GroupKey, prompt: Prompt) -> CachedGroup:
        header = GroupHeader(key, (4, 4), ("stop",) * 2, (-1,) * 2, None, None, 3, "g", 0.0)
        judgements = [Judgement(Verdict.WRONG, 0.0), Judgement(Verdict.CORRECT, 1.0)]
        return CachedGroup(header, ("payload", key), judgements, SCORES)


class Watcher(StandInLearner):
    """Also keeps what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.groups = []

    async def step(self, plans):
        self.groups += [g for plan in plans for mini in plan.minis for g in mini]
        return await super().step(plans)


def run(prompts: int, *, enough_at: int = 99, **tree) -> tuple[Loop, StandInGenerator, Watcher]:
    async def scenario():
        generator, learner = StandInGenerator("g"), Watcher()
        loop = Loop([generator], prompts=prompts, trains=learner, **{"algorithm": "dpo", **tree})
        loop.sampler.offline = StandInAnswers()
        committed = loop._committed

        async def watched(trained):
            loop.trainer.enough = trained.step >= enough_at
            return await committed(trained)

        loop._committed = watched
        await loop.run()
        return loop, generator, learner

    return asyncio.run(scenario())


@pytest.mark.parametrize("eta", [0, 1])
def test_every_training_prompt_is_trained_once_an_epoch(eta):
    loop, generator, learner = run(42, max_staleness=eta, train={"steps": 50, "batch_prompts": 8}, data={"epochs": 2})
    keys = [k for batch in learner.trained for k in batch]
    assert sorted((k.epoch, k.uid) for k in keys) == [(e, f"p{i:03}") for e in (0, 1) for i in range(0, 42, 2)]
    assert [len(batch) for batch in learner.trained] == [8, 8, 8, 8, 8, 2]
    assert [k.epoch for k in keys] == sorted(k.epoch for k in keys), "batches follow the order of issue"
    assert generator.issued == []
    assert loop.ledger.counts()["trained"] == loop.ledger.counts()["issued"] == 42


def test_groups_come_with_payload_advantage_and_the_references_log_probs():
    _, _, learner = run(4, train={"steps": 1, "batch_prompts": 2}, data={"epochs": 1})
    for group in learner.groups:
        assert group.payload == ("payload", group.key)
        assert [(r.index, r.advantage) for r in group.rows] == [(0, -1.0), (1, 1.0)]
        assert group.logp_ref is SCORES


def test_a_run_that_has_enough_ends_at_that_step():
    loop, _, learner = run(80, enough_at=3, train={"steps": 50, "batch_prompts": 4})
    assert loop.trainer.version.step == len(learner.trained) == 3
