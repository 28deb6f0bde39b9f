"""How the gate's threshold moves over training: ``gate.schedule``.

With p the share of the training steps done, g0 = gate.gamma and g1 = end: ``linear`` g0 + (g1 - g0) p; ``step`` g0
before p = at, g1 from there on; ``sigmoid`` g0 + (g1 - g0) / (1 + exp(-slope (p - at))). No schedule is a constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

KINDS: dict[str, dict[str, float | None]] = {
    "linear": {"end": None},
    "step": {"end": None, "at": 0.5},
    "sigmoid": {"end": None, "at": 0.5, "slope": 10.0},
}
"""Keys of each kind of gate.schedule with their defaults; None has to be given."""


def complete(given: dict[str, Any]) -> dict[str, Any]:
    """The schedule with its defaults. Raises ValueError with the rule and the fix."""
    if not given:
        return {}
    kind = given.get("kind")
    if kind not in tuple(KINDS):
        raise ValueError(f"kind is one of {', '.join(KINDS)}. Give kind and end, or {{}} for a constant gamma")
    known = KINDS[kind]
    unknown = sorted(set(given) - {"kind", *known})
    if unknown:
        raise ValueError(f"a {kind} schedule has no {unknown[0]!r}; its keys are {', '.join(known)}. Remove it")
    out = {"kind": kind, **known, **given}
    for key in known:
        low, high = (0.0, 1.0) if key != "slope" else (1e-6, 1e6)
        number = out[key]
        if isinstance(number, bool) or not isinstance(number, int | float) or not low <= number <= high:
            raise ValueError(
                f"{key} of a {kind} schedule is a number from {low:g} to {high:g}. Set gate.schedule.{key}"
            )
    return out


def value(start: float, schedule: Mapping[str, Any], progress: float | Fraction) -> Fraction:
    """The threshold when the share ``progress`` of the steps is done (before 0 and after 1 as there). start: g0. Exact,
    but for the value of the exponential."""
    first = exact(start)
    if not schedule:
        return first
    p = min(max(Fraction(progress), Fraction(0)), Fraction(1))
    move = exact(schedule["end"]) - first
    if schedule["kind"] == "linear":
        return first + move * p
    at = exact(schedule["at"])
    if schedule["kind"] == "step":
        return first + move if p >= at else first
    assert schedule["kind"] == "sigmoid", schedule
    x = float(schedule["slope"] * (p - at))
    share = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    return first + move * Fraction(share)


def exact(x: float) -> Fraction:
    """The rational that a person meant by a decimal: 0.8 is 4/5, not the nearest double."""
    return Fraction(repr(float(x)))
