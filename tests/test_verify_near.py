"""Answers that almost are the truth earn nothing; honest spellings of it are right."""

import os
import random
import sys
from collections import deque
from itertools import islice
from pathlib import Path

import pytest

from hapo_async.types import Verdict
from hapo_async.verify import context, intervals, judge_text, process, symbolic, units, wire

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import honest_answers
import hostile_near


def judge(response, truth, prompt=""):
    return judge_text("auto", prompt, response, truth)


def rewards(pairs):
    """What came out, per pair, for those that earned something and those that did not."""
    judged = [(response, truth, judge(response, truth)) for response, truth in pairs]
    earned = [(response, truth) for response, truth, j in judged if j.reward]
    return earned, [(response, truth, j.detail) for response, truth, j in judged if not j.reward]


@pytest.mark.parametrize("maker", [hostile_near.surroundings, hostile_near.leftovers])
def test_the_truth_with_something_about_it_earns_nothing(maker):
    assert not rewards(islice(maker(random.Random(7)), 300))[0]


@pytest.mark.parametrize(("truth", "answers"), [(truth, answers) for truth, *answers in hostile_near.PAIRS])
def test_a_neighbour_of_the_truth_earns_nothing(truth, answers):
    assert not rewards((rf"\boxed{{{answer}}}", truth) for answer in answers)[0]


@pytest.mark.parametrize("truth", hostile_near.TRUTHS)
def test_no_truth_counts_where_it_is_denied_or_works_in_a_formula(truth):
    assert not rewards((p.format(rf"\boxed{{{truth}}}"), truth) for p in hostile_near.AROUND)[0]


@pytest.mark.parametrize(("truth", "answers"), [(truth, answers) for truth, *answers in honest_answers.SPELLINGS])
def test_a_truth_may_be_spelt_differently(truth, answers):
    assert not rewards((rf"\boxed{{{answer}}}", truth) for answer in (truth, *answers))[1]


def test_a_number_may_have_a_name_and_a_unit():
    assert not rewards((rf"\boxed{{{p.format(5)}}}", "5") for p in honest_answers.NUMBER_SPELLINGS)[1]


@pytest.mark.parametrize("truth", hostile_near.TRUTHS)
def test_an_honest_sentence_about_a_box_does_no_harm(truth):
    assert not rewards((p.format(rf"\boxed{{{truth}}}"), truth) for p in honest_answers.AROUND)[1]


@pytest.mark.parametrize(
    ("response", "truth"),
    [
        ("The answer is $5$ or $6$.", "5"),
        ("$5$ and $6$", "5"),
        ("The answer is $x=5$ or $x=6$.", "5"),
        ("Answer: less than 5", "5"),
        ("The answer is 5 or 6, because it is.", "5"),
        (r"\boxed{5} = 6", "5"),
        *((rf"{sign}\boxed{{5}}", "5") for sign in "√½−–٥𝟓×±"),
        *((rf"\boxed{{5}}{sign}", "5") for sign in ("√2", "⁴", "½", "×2", "𝟓", "−1")),
        (r"\text{not } \boxed{5}", "5"),
        (r"\boxed{5} (wrong)", "5"),
        ("\\boxed{5}\n\nOr 6.", "5"),
        (r"\boxed{5},000", "5"),
        (r"\boxed{\frac{10.0000001}{2}}", "5"),
        (r"\boxed{2.0000001, 3}", "2, 3"),
        (r"\boxed{500\%}", "5"),
    ],
)
def test_a_sentence_that_says_more_earns_nothing(response, truth):
    assert judge(response, truth).reward == 0.0


@pytest.mark.parametrize(
    "response",
    [
        "The answer is 2 + 3 = 5.\n" + r"\boxed{5}",
        "The answer is the value of $x$ here.\n" + r"\boxed{5}",
        "It is not hard to see that " + r"$x = \boxed{5}$.",
        r"We cannot have x = 6, so \boxed{5}",
        r"$12 - 7 = \boxed{5}$",
        r"$\boxed{5}\text{ apples}$",
        r"\begin{align*} a &= b \\ &= \boxed{5} \end{align*}",
        "The answer is $5$, because 6 is not prime.",
        "The answer is 5, since 2 + 3 = 5.",
        "Answer: x = 5",
    ],
)
def test_a_sentence_that_says_nothing_else_is_right(response):
    assert judge(response, "5").reward == 1.0


def test_a_percentage_is_a_number_only_where_the_prompt_asks_for_one():
    assert judge(r"\boxed{5\%}", "5").reward == 0.0
    assert judge(r"\boxed{5\%}", "5", "What percent of them is red?").reward == 1.0
    assert judge(r"\boxed{25\%}", "0.25").reward == 1.0 and judge(r"\boxed{2.5\%}", "0.25").reward == 0.0


@pytest.mark.parametrize(
    "prompt", ["Write 10 in base 2.", "What is 10 in binary?", "Find $101_2 + 101_2$.", "Give octal digits."]
)
def test_digits_are_a_numeral_to_a_base_only_where_the_prompt_speaks_of_one(prompt):
    assert judge(r"\boxed{1010}", "1010_2").reward == 0.0
    assert judge(r"\boxed{1010}", "1010_2", prompt).reward == judge(r"\boxed{1010_2}", "1010_2").reward == 1.0
    for wrong in (r"1010_3", r"1010_{10}", "10", "1011", "01010", r"-1010"):
        assert judge(rf"\boxed{{{wrong}}}", "1010_2", prompt).reward == 0.0, wrong


def test_units_are_known_or_counted():
    for unit in ("cm", "km/h", "m/s^2", "square feet", "marbles", "more apples", "in all", "in", "dollars per hour"):
        assert units.is_unit(unit), unit
    for unit in ("fails", "sixths", "squared", "k", "nope", "apples^2", "is", "times six", "or more", "", "thing"):
        assert not units.is_unit(unit), unit
    assert units.differ("cm", "m") and units.differ("cm^2", "cm^3") and not units.differ("inches", "in")
    assert not units.differ("square cm", "cm^2") and not units.differ("apples", "cm")


def test_inequalities_are_intervals():
    assert intervals.notation(r"2 \le x < 5") == ("x", "[2,5)")
    assert intervals.notation("5>x") == ("x", r"(-\infty,5)")
    assert intervals.notation(r"x<2 \text{ or } x>3") == ("x", r"(-\infty,2)\cup(3,\infty)")
    assert intervals.notation("x<y") is intervals.notation("x<2, x>3") is intervals.notation("2<x>3") is None


def test_all_of_a_text_is_parsed_or_nothing():
    for text in ("2x+1 | 3x", r"2x+1 \foo", "9 +", "2x+1}"):
        assert symbolic.equal(text, "2x+1") is None
    assert symbolic.equal("2x+1 t", "2x+1") is False and symbolic.equal("1+2x", "2x+1") is True


def test_what_is_far_from_a_box_is_not_read():
    text = "It is not " + "x" * context.NEAR
    assert context.objection(text + r"\boxed{5}", len(text), len(text) + 9, True) in ("", f"{text[-8:]!r} before a box")


@pytest.mark.parametrize(
    "frame",
    [
        {"verdict": "correct", "reward": 1.0, "seconds": [1]},
        {"verdict": "correct", "reward": 1.0, "seconds": "soon"},
        {"verdict": "correct", "reward": "1.0"},
        {"verdict": "correct", "reward": True},
        {"verdict": "correct", "reward": [1.0]},
        {"verdict": "correct", "reward": 1.0, "components": [1]},
        {"verdict": "correct", "reward": None},
        {"verdict": ["correct"], "reward": 1.0},
        {"verdict": "correct", "reward": 1.0, "fault": "nobody"},
    ],
)
def test_a_frame_that_is_no_judgement_costs_the_worker_only(frame):
    with pytest.raises(ValueError) as raised:
        process._judgement(frame)
    assert isinstance(raised.value, process.LOST)
    assert process.verdict_on(raised.value, 1.0).verdict is Verdict.CRASH


def test_a_frame_that_is_nested_too_deep_costs_the_worker_only():
    class Piped(process.Worker):
        def __init__(self, descriptor):
            """No process: what it would write is in a pipe."""
            self._out, self._decoder, self._messages = descriptor, wire.Decoder(), deque()

        def _wait(self, descriptor, deadline, for_write):
            """It is there."""

    source, sink = os.pipe()
    body = b"[" * 30_000 + b"]" * 30_000
    os.write(sink, len(body).to_bytes(4, "big") + body)
    with pytest.raises(ValueError, match="nested too deep"):
        Piped(source).receive_judgement(1.0)
    os.close(source)
    os.close(sink)
