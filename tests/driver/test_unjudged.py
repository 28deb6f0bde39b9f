"""Answers that are not judged: poisoned prompts leave the run with a reason, and a judge that is broken ends it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from hapo_async import metrics
from hapo_async.driver.judges import MOST_FAILURES, Judges
from hapo_async.errors import RunError
from hapo_async.quarantine import QUARANTINE_FILE, Quarantine
from hapo_async.types import Fault, Judgement, Verdict
from tests.driver.stand_ins import Loop, StandInGenerator, StandInJudges

POISONED = Judgement(Verdict.TIMEOUT, None, detail="poisoned prompt: its truth is hostile", fault=Fault.PROMPT)
CHARGED = Judgement(Verdict.TIMEOUT, 0.0, detail="late, twice", fault=Fault.ANSWER)
BROKEN = Judgement(Verdict.CRASH, None, detail="no connection", fault=Fault.JUDGE)
WRONG = Judgement(Verdict.WRONG, 0.0)


class Replaced(StandInJudges):
    """Every answer with index 0 of some prompts gets another judgement."""

    def __init__(self, judgement: Judgement, every: int) -> None:
        super().__init__()
        self.judgement, self.every = judgement, every

    async def judge(self, payload: Any, prompt: Any, answers: int, key: Any = None) -> list[Judgement]:
        out = await super().judge(payload, prompt, answers, key)
        return [self.judgement, *out[1:]] if int(prompt.uid[1:]) % self.every == 0 else out


def run(judges: StandInJudges, folder: Any = None) -> Loop:
    async def scenario() -> Loop:
        tree = {"train": {"steps": 8, "batch_prompts": 4}, "data": {"epochs": 1}}
        loop = Loop([StandInGenerator("a")], prompts=40, judges=judges, **tree)
        if folder:
            loop.sampler.retries.quarantine = Quarantine(folder)
        await loop.run()
        return loop

    return asyncio.run(scenario())


def test_a_poisoned_prompt_is_dropped_and_quarantined_with_its_reason_and_not_tried_again(tmp_path):
    loop = run(Replaced(POISONED, 5), tmp_path)
    rows = metrics.read(tmp_path / QUARANTINE_FILE)
    assert len(rows) == loop.ledger.dropped_reasons["unjudgeable"] == len({r["uid"] for r in rows}) > 0
    assert all(int(r["uid"][1:]) % 5 == 0 and "its truth is hostile" in r["reason"] for r in rows)
    trained = {k.uid for batch in loop.learner.trained for k in batch}
    assert not trained & {r["uid"] for r in rows} and len(trained) == 32
    assert loop.ledger.counts()["to_retry"] == 0


def test_a_charged_answer_trains_as_a_wrong_one_and_is_counted():
    judges = Replaced(CHARGED, 1)
    loop = run(judges)
    assert len(loop.learner.trained) == 8 and not loop.ledger.dropped_reasons
    groups = [g for step in loop.steps for g in step]
    assert all(g.gated.judged.all() and list(g.gated.rewards) == [0.0, 1.0] for g in groups)
    assert CHARGED.tally == ("timeout", "charged")


def judging(*rounds: list[Judgement]) -> Judges:
    judges = Judges(Loop([], prompts=1).config, {})
    for judgements in rounds:
        judges._check(judgements)
    return judges


def test_judges_that_fail_by_their_own_fault_end_the_run_with_the_reason():
    async def scenario():
        judging(*[[BROKEN, BROKEN]] * (MOST_FAILURES // 2 - 1), [WRONG, BROKEN], [BROKEN] * (MOST_FAILURES - 2))
        judging(*[[CHARGED, BROKEN]] * MOST_FAILURES, *[[POISONED, POISONED]] * MOST_FAILURES)
        with pytest.raises(RunError, match=r"20 judgements in a row failed.*no connection.*check-verifier"):
            judging(*[[BROKEN, BROKEN]] * (MOST_FAILURES // 2))
        judging([BROKEN] * (MOST_FAILURES + 4))
        with pytest.raises(RunError, match="48 judgements"):
            judging(*[[BROKEN] * (MOST_FAILURES + 4)] * 2)

    asyncio.run(scenario())
