"""The gate's threshold over a run: each kind at its marks, exactness, and what is refused."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from hapo_async import config, gate, schedule
from hapo_async.config import GateConfig
from hapo_async.errors import ConfigError


def threshold(progress, gamma=0.5, **given):
    return gate.threshold(GateConfig(gamma=gamma, schedule=given), progress)


def test_without_a_schedule_the_threshold_is_the_decimal_that_was_written():
    for progress in (0, 0.3, 1):
        assert threshold(progress, gamma=0.8) == Fraction(4, 5)
    assert GateConfig().schedule == {}


def test_linear_goes_straight_from_gamma_to_end_without_a_rounding_error():
    at = lambda p: threshold(p, kind="linear", end=0.9)  # noqa: E731
    assert (at(0), at(Fraction(3, 4)), at(1)) == (Fraction(1, 2), Fraction(4, 5), Fraction(9, 10))
    assert threshold(Fraction(1, 10), gamma=1.0, kind="linear", end=0.0) == Fraction(9, 10)
    # 4/5 at three quarters, where S = 7 of 8 has a confidence of exactly 4/5: closed.
    moving = GateConfig(gamma=0.5, schedule={"kind": "linear", "end": 0.9})
    rewards = [1.0] * 7 + [0.0]
    decide = lambda p: gate.decide(rewards, [True] * 8, [], [1] * 8, [0] * 8, config=moving, progress=p)  # noqa: E731
    assert not decide(Fraction(75, 100)).is_open and decide(Fraction(76, 100)).is_open
    assert decide(Fraction(1, 4)).threshold == pytest.approx(0.6)


def test_step_changes_at_its_mark_and_not_before():
    at = lambda p: threshold(p, kind="step", end=0.2, at=0.3)  # noqa: E731
    assert at(0) == at(Fraction(29, 100)) == Fraction(1, 2)
    assert at(Fraction(3, 10)) == at(1) == Fraction(1, 5)
    assert threshold(Fraction(49, 100), kind="step", end=0.2) == Fraction(1, 2)
    assert threshold(Fraction(1, 2), kind="step", end=0.2) == Fraction(1, 5)


def test_sigmoid_is_half_way_at_its_mark_and_symmetric_around_it():
    at = lambda p: float(threshold(p, gamma=0.2, kind="sigmoid", end=0.8, at=0.4, slope=20.0))  # noqa: E731
    for p in (0.0, 0.1, 0.4, 0.75, 1.0):
        assert at(p) == pytest.approx(0.2 + 0.6 / (1 + math.exp(-20 * (p - 0.4))), abs=1e-15)
    assert at(0.4) == pytest.approx(0.5, abs=1e-15)
    assert at(0.3) - 0.2 == pytest.approx(0.8 - at(0.5), abs=1e-12)
    assert float(threshold(0, kind="sigmoid", end=1.0, slope=1e6)) == 0.5  # nothing overflows
    assert float(threshold(1, kind="sigmoid", end=1.0, slope=1e6)) == 1.0


def test_progress_outside_of_the_run_counts_as_its_ends():
    for given in ({"kind": "linear", "end": 0.9}, {"kind": "sigmoid", "end": 0.9}, {"kind": "step", "end": 0.9}):
        assert threshold(-1, **given) == threshold(0, **given) and threshold(7, **given) == threshold(1, **given)


def test_defaults_are_filled_in():
    assert schedule.complete({"kind": "sigmoid", "end": 0.4}) == {
        "kind": "sigmoid",
        "end": 0.4,
        "at": 0.5,
        "slope": 10.0,
    }
    assert schedule.complete({}) == {}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["gate.schedule.end=.5"], r"kind is one of linear, step, sigmoid"),
        (["gate.schedule={kind: [1], end: .5}"], r"kind is one of"),
        (["gate.schedule={kind: linear}"], r"end of a linear schedule is a number from 0 to 1.*gate\.schedule\.end"),
        (["gate.schedule={kind: linear, end: 1.5}"], r"end of a linear schedule"),
        (["gate.schedule={kind: linear, end: true}"], r"end of a linear schedule"),
        (["gate.schedule={kind: linear, end: .5, slope: 3}"], r"linear schedule has no 'slope'.*Remove it"),
        (["gate.schedule={kind: step, end: .5, at: -1}"], r"at of a step schedule"),
        (["gate.schedule={kind: sigmoid, end: .5, slope: 0}"], r"slope of a sigmoid schedule"),
        (["gate.schedule=linear"], r"gate\.schedule"),
    ],
)
def test_a_bad_schedule_is_refused_with_the_rule(overrides, says):
    with pytest.raises(ConfigError, match=says):
        config.load(None, overrides)
