"""Groups that would grow too old: what is thrown away is counted by length, issued again with a bound, and written down."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter

import pytest

from actors.calls import CallFailed
from hapo_async import metrics
from hapo_async.driver import fleet as fleets
from hapo_async.driver.flights import Flight
from hapo_async.driver.retries import MAX_LATE, Retries
from hapo_async.errors import RunError
from hapo_async.group_stats import length_bucket, length_histogram
from hapo_async.ledger import Ledger
from hapo_async.quarantine import QUARANTINE_FILE, Quarantine
from tests.driver.stand_ins import Loop, StandInGenerator, StandInJudges
from tests.virtual_time import Clock

DROP = {
    "generator": {"deadline_s": 5.0},
    "staleness": {"late_deadline_s": 0.05, "late": "drop"},
    "train": {"steps": 12, "batch_prompts": 8},
}


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


def is_slow(uid: str) -> bool:
    return int(uid[1:]) % 8 == 0


def run_with_slow_prompts(folder, so_far, **tree) -> tuple[Loop, Counter[str], Counter[str]]:
    """The loop, tries of each slow prompt, answers thrown away by bucket."""

    async def scenario():
        generators = [StandInGenerator(n, lambda key: 30.0 if is_slow(key.uid) else 0.002) for n in ("a", "b")]
        for generator in generators:
            generator.so_far = so_far
        loop = Loop(generators, prompts=200, **{**DROP, **tree})
        loop.sampler.retries.quarantine = Quarantine(folder)
        await loop.run()
        await asyncio.sleep(0)
        return loop, Counter(k.uid for g in generators for k in g.issued if is_slow(k.uid))

    loop, tries = asyncio.run(scenario())
    return loop, tries, loop.sampler.take_tally().late_lengths


def test_what_is_dropped_is_counted_by_length_and_the_starving_prompts_are_named(tmp_path):
    loop, tries, lengths = run_with_slow_prompts(tmp_path, lambda key: (5, 900))
    late = loop.sampler.returns.given_up + loop.ledger.dropped_reasons["late"]
    assert late > 0 and set(loop.ledger.dropped_reasons) == {"late"}
    assert set(lengths) == {"4", "512"} and lengths["4"] == lengths["512"] >= 2 * loop.ledger.dropped_reasons["late"]
    rows = metrics.read(tmp_path / QUARANTINE_FILE)
    assert len(rows) == loop.ledger.dropped_reasons["late"]
    for row in rows:
        assert is_slow(row["uid"]) and tries[row["uid"]] == row["tries"] == MAX_LATE
        assert (row["reason"], row["tokens"], row["epoch"]) == ("late", [5, 900], 0)
        assert 1 <= row["step"] <= 12


def test_a_generator_that_does_not_tell_leaves_the_length_unknown(tmp_path):
    loop, _, lengths = run_with_slow_prompts(tmp_path, None)
    assert set(lengths) == {"unknown"} and loop.ledger.dropped_reasons["late"]
    assert {row["tokens"] for row in metrics.read(tmp_path / QUARANTINE_FILE)} == {None}


def test_answers_that_were_complete_but_not_judged_count_with_their_lengths(tmp_path):
    class Slow(StandInJudges):
        async def judge(self, payload, prompt, answers, key=None):
            await asyncio.sleep(30.0 if is_slow(prompt.uid) else 0.0)
            return await super().judge(payload, prompt, answers, key)

    async def scenario():
        loop = Loop([StandInGenerator("a")], prompts=200, judges=Slow(), **DROP)
        loop.sampler.retries.quarantine = Quarantine(tmp_path)
        await loop.run()
        await asyncio.sleep(0)
        return loop

    loop = asyncio.run(scenario())
    assert set(loop.sampler.take_tally().late_lengths) == {"4"}
    assert {tuple(row["tokens"]) for row in metrics.read(tmp_path / QUARANTINE_FILE)} == {(4, 4)}


def test_no_more_is_given_up_than_holds_the_learner_up():
    """Batches of 2 and a bound of 1: of three groups of step 0 in flight two may stay, and the one that takes longest goes."""

    async def scenario():
        loop = Loop([StandInGenerator("a", lambda key: 30.0)], prompts=20, max_staleness=1, **DROP)
        loop.config.train.batch_prompts = 2
        keys = [loop.ledger.issue(0, f"p{i:03}") for i in range(3)]
        for key, since in zip(keys, (2.0, 1.0, 3.0), strict=True):
            loop.fleet.generators[0].assign(key, 8)
            loop.sampler.flights[key] = Flight(loop.sampler.prompts[key.uid], "a", 0, since)
        assert loop.trainer._late(0, 1) == keys
        await loop.sampler.returns.late(loop.fleet, keys, loop.sampler.step)
        assert not loop.trainer._late(0, 1) and list(loop.sampler.flights) == [keys[0], keys[2]]
        await loop.sampler.close()
        return loop

    assert asyncio.run(scenario()).sampler.returns.given_up == 1


def test_a_silent_generator_does_not_hold_up_the_learner_when_its_groups_are_given_up():
    async def scenario():
        silent, living = StandInGenerator("a", lambda key: 30.0), StandInGenerator("b")
        silent.abort = silent._method(lambda keys: asyncio.sleep(30.0))
        loop = Loop([silent, living], prompts=400, max_staleness=1, **DROP)
        await loop.run(limit_s=10.0)
        return loop

    loop = asyncio.run(scenario())
    assert loop.trainer.version.step == 12 and loop.sampler.take_tally().late > 0


def test_a_silent_generator_does_not_hold_up_the_learner_when_its_groups_are_cut(monkeypatch):
    async def scenario():
        silent, living = StandInGenerator("a", lambda key: 4000.0), StandInGenerator("b")
        silent.truncate = silent.abort = silent._method(lambda keys: asyncio.sleep(4000.0))
        staleness = {"late": "truncate", "late_deadline_s": 1.0}
        tree = {**DROP, "staleness": staleness, "generator": {"deadline_s": 5000.0, "max_concurrent": 8}}
        loop = Loop([silent, living], prompts=400, max_staleness=1, **tree)
        began = time.monotonic()
        await loop.run(limit_s=1000.0)
        return loop, time.monotonic() - began, loop.sampler.take_tally().late

    loop, seconds, late = Clock(monkeypatch).run(scenario())
    assert loop.trainer.version.step == 12 and late > 0
    assert 2.0 <= seconds < 5.0  # late_deadline_s until they are cut, and again until they are dropped


def test_waiting_throws_nothing_away():
    async def scenario():
        slow = StandInGenerator("a", lambda key: 0.15 if is_slow(key.uid) else 0.002)
        staleness = {"late_deadline_s": 0.02, "late": "wait"}
        loop = Loop([slow], prompts=200, **{**DROP, "staleness": staleness, "train": {"steps": 6, "batch_prompts": 8}})
        await loop.run()
        return loop

    loop = asyncio.run(scenario())
    assert loop.trainer.version.step == 6 and max(loop.ages) <= 1
    assert not loop.ledger.dropped_reasons and not loop.sampler.take_tally().late
    trained = [k.uid for batch in loop.learner.trained for k in batch]
    assert any(map(is_slow, trained))


def test_each_kind_of_failure_has_its_own_bound(tmp_path):
    ledger = Ledger()
    retries = Retries(ledger, most_failures=1)
    retries.quarantine = Quarantine(tmp_path)
    gone, refused = CallFailed("g", "died", gone=True), CallFailed("g", "no", gone=False)

    def issue(uid):
        epoch, uid = retries.pop() if retries else (0, uid)
        return ledger.issue(epoch, uid)

    for _ in range(20):
        retries.failed(issue("a"), 3, gone)
    for _ in range(2):
        retries.failed(issue("a"), 3, refused)
    assert retries.late(issue("a"), "late") == 1
    assert len(retries) == 1 and not ledger.dropped_reasons
    retries.failed(issue("a"), 4, refused)
    assert not len(retries) and ledger.dropped_reasons == {"failed": 1}
    (row,) = metrics.read(tmp_path / QUARANTINE_FILE)
    assert (row["step"], row["uid"], row["tries"], row["tokens"]) == (4, "a", 3, None)
    assert row["reason"].startswith("failed: g: no")
    for _ in range(2):
        retries.failed(issue("b"), 5, refused)
    with pytest.raises(RunError, match="2 prompts failed 3 times each; the last: g: no"):
        retries.failed(issue("b"), 5, refused)
    ledger.check(recount=True)


def test_lines_past_a_resumed_checkpoint_are_set_aside(tmp_path):
    quarantine, key = Quarantine(tmp_path), Ledger().issue(0, "a")
    for step in (1, 2, 3):
        quarantine.add(key, step, "late", 2, (step,))
    metrics.discard(quarantine.path, 3)
    assert [r["step"] for r in metrics.read(quarantine.path)] == [1, 2]
    gone = (tmp_path / "discarded" / QUARANTINE_FILE).read_text().splitlines()
    assert [json.loads(line)["tokens"] for line in gone] == [[3]]


def test_a_full_disk_costs_a_line_and_not_the_run(tmp_path):
    quarantine = Quarantine(tmp_path / "missing")
    quarantine.add(Ledger().issue(0, "a"), 1, "late", 2)
    assert not quarantine.path.exists()


def test_buckets_are_powers_of_two():
    assert [length_bucket(n) for n in (0, 1, 2, 3, 4, 1023, 1024)] == [0, 1, 2, 2, 4, 512, 1024]
    histogram = length_histogram("response/length_hist", [1, 2, 3, 700])
    assert histogram == {"response/length_hist/1": 1, "response/length_hist/2": 2, "response/length_hist/512": 1}
    assert all(metrics.find(name) for name in histogram)
    assert metrics.find("staleness/dropped_length/unknown")
