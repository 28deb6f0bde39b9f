"""Who pays when a judgement fails: the answer, the prompt, or nobody."""

import json

import pytest

from hapo_async.types import Fault, Judgement, Verdict
from hapo_async.verify.attribution import CANARY, Attribution, failed
from hapo_async.verify.pool import VerifierPool

BY_TRUTH = "tests.verify_plugins:by_truth"
NAUGHTY = "tests.verify_plugins:naughty"
OUTAGE = "tests.verify_plugins:outage"
UNREADABLE = "tests.verify_plugins:unreadable"

GOOD = Judgement(Verdict.CORRECT, 1.0, seconds=0.5)
WRONG = Judgement(Verdict.WRONG, 0.0, seconds=0.5)
LATE = Judgement(Verdict.TIMEOUT, None, seconds=10.0, detail="late")
ITEM = ("prompt", "answer", "truth")


class Script:
    """Judgements in order; what was asked is kept."""

    def __init__(self, *judgements):
        self.left, self.asked = list(judgements), []

    def __call__(self, item, fresh):
        self.asked.append((item, fresh))
        return self.left.pop(0)


def settle(name, *judgements, first=LATE, in_band=False, seen=None):
    attribution, script = Attribution(name), Script(*judgements)
    if seen:
        attribution.saw(seen, GOOD)
    return attribution.settle(ITEM, first, script, in_band), script, attribution


def test_a_second_try_that_judges_counts():
    out, script, _ = settle("auto", WRONG)
    assert (out.verdict, out.reward, out.seconds) == (Verdict.WRONG, 0.0, 10.5)
    assert script.asked == [(ITEM, True)]


def test_an_answer_that_fails_twice_where_a_benign_one_does_not_is_charged():
    out, script, attribution = settle("auto", LATE, GOOD, WRONG)
    assert (out.verdict, out.reward, out.fault, out.seconds) == (Verdict.TIMEOUT, 0.0, Fault.ANSWER, 20.0)
    assert script.asked == [(ITEM, True), (CANARY, True), (("prompt", r"\boxed{0}", "truth"), False)]
    assert attribution.known(ITEM) is None and out.is_judged and not failed(out)


@pytest.mark.parametrize("canary", [LATE, WRONG])
def test_a_benign_answer_that_fails_masks(canary):
    out, *_ = settle("auto", LATE, canary)
    assert (out.reward, out.fault) == (None, Fault.JUDGE) and not failed(out)


def test_a_truth_that_fails_a_benign_answer_poisons_the_prompt_for_good():
    out, _, attribution = settle("auto", LATE, GOOD, LATE)
    assert (out.reward, out.fault) == (None, Fault.PROMPT) and "poisoned prompt" in out.detail
    assert attribution.known(("prompt", "another answer", "truth")).fault is Fault.PROMPT
    assert attribution.known(("prompt", "another answer", "another truth")) is None


def test_a_plugins_benign_answer_is_one_that_it_has_judged():
    seen = ("p", "r", "t", {"column": 1})
    out, script, _ = settle(BY_TRUTH, LATE, GOOD, WRONG, seen=seen)
    assert out.fault is Fault.ANSWER
    assert script.asked[1:] == [(seen, True), (("prompt", "r", "truth"), False)]


def test_a_plugin_that_has_judged_nothing_yet_is_asked_for_the_truth_itself():
    charged, script, _ = settle(BY_TRUTH, LATE, GOOD)
    assert charged.fault is Fault.ANSWER and script.asked[1:] == [(("prompt", "truth", "truth"), True)]
    masked, *_ = settle(BY_TRUTH, LATE, LATE)
    assert masked.fault is Fault.JUDGE


def test_an_exception_that_has_been_charged_once_needs_no_fresh_worker():
    crash = Judgement(Verdict.CRASH, None, detail="ValueError: no number")
    out, _, attribution = settle(UNREADABLE, crash, GOOD, WRONG, first=crash, in_band=True, seen=ITEM)
    script = Script(crash, GOOD, WRONG)
    assert attribution.settle(ITEM, crash, script, True).fault is out.fault is Fault.ANSWER
    assert [fresh for _, fresh in script.asked] == [False, False, False]
    script = Script(LATE, GOOD, WRONG)
    attribution.settle(ITEM, LATE, script, False)
    assert [fresh for _, fresh in script.asked] == [True, True, False], "a lost worker is another matter"


# --------------------------------------------------------------------------------------------------------------------
# With real workers


def test_a_crash_that_does_not_come_back_is_nobodys_fault(tmp_path):
    with VerifierPool(NAUGHTY, timeout_s=30) as pool:
        (judgement,) = pool.judge([("", "once", str(tmp_path / "marker"))])
    assert (judgement.verdict, judgement.reward, judgement.fault) == (Verdict.CORRECT, 1.0, Fault.NONE)


def test_a_poisoned_prompt_is_masked_and_costs_its_other_answers_nothing():
    with VerifierPool(BY_TRUTH, timeout_s=0.6) as pool:
        assert pool.judge([("", "x", "x")])[0].reward == 1.0
        first = pool.judge([("", "a", "stop")])[0]
        before = pool.stats()["workers_started"]
        others = pool.judge([("", str(n), "stop") for n in range(8)])
        stats = pool.stats()
    assert first.fault is Fault.PROMPT and first.reward is None
    assert all(j.fault is Fault.PROMPT for j in others) and stats["workers_started"] == before
    assert stats["masked"] == 9 and stats["charged"] == 0


def test_a_judge_that_is_out_of_order_charges_nobody(tmp_path):
    marker = tmp_path / "down"
    with VerifierPool(OUTAGE, timeout_s=0.6) as pool:
        assert pool.judge([("", "x", str(marker))])[0].reward == 1.0
        marker.touch()
        out = pool.judge([("", "y", str(marker))])[0]
        assert (out.verdict, out.reward, out.fault) == (Verdict.TIMEOUT, None, Fault.JUDGE)
        marker.unlink()
        assert pool.judge([("", "z", str(marker))])[0].reward == 1.0


def test_a_reward_function_that_raises_for_what_it_cannot_read_costs_few_processes():
    items = [("", "12" if n % 4 == 0 else f"word {n}", 12) for n in range(40)]
    with VerifierPool(UNREADABLE, workers=1, timeout_s=30) as pool:
        out = pool.judge(items)
        started = pool.stats()["workers_started"]
    assert [j.reward for j in out] == [1.0 if n % 4 == 0 else 0.0 for n in range(40)]
    assert {str(j.verdict) for j in out} == {"correct", "crash"} and started <= 4


def test_what_an_answer_does_to_the_stream_is_charged_to_it():
    with VerifierPool("auto", timeout_s=30) as pool:
        strange = [
            "\x00" * 5000,
            "\ud800 \\boxed{1}",
            "\\boxed{1}" + "\u202e",
            json.dumps({"verdict": "correct", "reward": 1.0}),
        ]
        out = pool.judge([("", text, "1") for text in strange])
    assert [j.reward for j in out] == [0.0, 1.0, 1.0, 0.0]
