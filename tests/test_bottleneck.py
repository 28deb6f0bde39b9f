"""The sentence that a step's times become: who limits it, by how much, and what to change."""

from __future__ import annotations

import math
import re

import pytest

from hapo_async.bottleneck import bottleneck
from hapo_async.config import known_keys


def times(**seconds: float) -> dict[str, float]:
    return {f"time/{name}_s": value for name, value in seconds.items()}


@pytest.mark.parametrize(
    ("expected", "timings"),
    [
        ("generator", times(step=10, learn=3, wait_for_batch=6.2, sync=0.5, generate=9, verify=0.1)),
        ("verifier", times(step=10, learn=3, wait_for_batch=6.2, sync=0.5, generate=2, verify=7)),
        ("learner", times(step=10, learn=8, wait_for_batch=1, sync=0.5, wait_for_weights=6)),
        ("sync", times(step=10, learn=3, wait_for_batch=1, sync=5)),
        ("staleness", times(step=10, learn=3, wait_for_batch=1, wait_for_stale=5, sync=1)),
        # Both sides idle for much of the step: with max_staleness 0 they can only take turns.
        ("staleness", times(step=10, learn=4, wait_for_batch=5, wait_for_weights=5, generate=5, verify=0.1)),
        # An evaluation is asked for: however long it takes, it is not what limits training.
        ("generator", times(step=100, learn=2, wait_for_batch=4, eval=90)),
    ],
)
def test_the_largest_wait_decides_what_limits_a_step(expected: str, timings: dict[str, float]) -> None:
    component, advice = bottleneck(timings)
    assert component == expected
    assert advice.startswith(f"{expected}: ")
    assert advice.endswith(".")


def test_the_advice_says_how_much_and_what_to_change() -> None:
    advice = bottleneck(times(step=10, learn=3, wait_for_batch=6.2)).advice
    assert "62% of the step" in advice
    assert "generator.count" in advice and "generator.max_concurrent" in advice


def test_advice_names_only_keys_of_the_config() -> None:
    cases = [
        times(step=1, wait_for_batch=1),
        times(step=1, wait_for_batch=1, verify=2, generate=1),
        times(step=2, wait_for_batch=1, wait_for_weights=1),
        times(step=1, learn=1),
        times(step=1, sync=1),
        times(step=1, wait_for_stale=1),
    ]
    named = {key for case in cases for key in re.findall(r"\b[a-z]+\.[a-z_]+\b", bottleneck(case).advice)}
    assert len(named) >= 8
    assert named <= set(known_keys())


@pytest.mark.parametrize("timings", [{}, times(step=3), times(step=math.nan, learn=math.nan), times(learn=-1)])
def test_without_timings_nothing_is_blamed(timings: dict[str, float]) -> None:
    assert bottleneck(timings).component == ""


@pytest.mark.parametrize("eval_s", [0.0, 1.0, 90.0])
def test_shares_are_of_the_step_without_its_evaluation(eval_s: float) -> None:
    verdict = bottleneck(times(step=10 + eval_s, learn=8, wait_for_batch=1, eval=eval_s))
    assert verdict.component == "learner" and "computed 80% of the step" in verdict.advice
    assert ("without its evaluation" in verdict.advice) == (eval_s > 0)


def test_what_generators_waited_during_an_evaluation_is_not_blamed_on_the_bound() -> None:
    during = times(step=20, learn=4, wait_for_batch=5, wait_for_weights=10, eval=10, generate=5, verify=0.1)
    assert bottleneck(during).component == "generator"
    assert bottleneck(during | times(step=10, eval=0)).component == "staleness"


def test_a_learner_that_found_its_batch_ready_after_an_evaluation_is_not_told_to_grow() -> None:
    timings = times(step=1, learn=0.97)
    assert "learner.ranks" in bottleneck(timings).advice
    assert "learner.ranks" in bottleneck(timings, head_start_s=0.1).advice
    ahead = bottleneck(timings, head_start_s=5.0)
    assert ahead.component == "learner" and "learner.ranks" not in ahead.advice
    waiting = times(step=10, learn=3, wait_for_batch=6)
    assert bottleneck(waiting, head_start_s=5.0) == bottleneck(waiting)
