"""What happens to tokens of an older policy, token by token (ALGORITHMS: 5): a weight and the ratio's denominator.

``kind`` is how an objective meets them: "clipped" (PPO, APO), "sequence" (GSPO), "score" (REINFORCE) or "bounded" (CISPO).
"""

from __future__ import annotations

import math
from typing import Any

from tests.oracles.plain import BOUND, NAN, Plain, Sequence, clamp

Options = dict[str, Any]

CORRECTION: Options = {
    "correction": "off", "cap": None, "floor": None, "decay": 1.0, "veto": 0.0, "prox": "recompute",
    "moved": 0.0,
}  # fmt: skip
CAPS = {"clip": 2.0, "tis": 2.0, "mask": 5.0, "sequence_tis": 2.0, "sequence_mask": 2.0} | dict.fromkeys(
    ("geometric_tis", "geometric_mask"), 1.05
)
FLOORS = {"mask": 0.5, "sequence_mask": 0.5, "geometric_mask": 0.95}


def behave(b: Plain, i: int) -> float:
    """The behaviour log-prob, NaN where it is missing or no number."""
    x = NAN if b.logp_behave is None else b.logp_behave[i]
    return x if math.isfinite(x) else NAN


def prox(b: Plain, i: int, o: Options) -> float:
    """The proximal log-prob: as given, or on the line between behaviour and current policy, by versions."""
    if o["prox"] == "recompute":
        return b.prox(i)
    lb, then, now, start = behave(b, i), 0 if b.age is None else -b.age[i], o["moved"], 0.0
    if math.isnan(lb):
        return b.logp[i]
    alpha = 1.0 if now == then else clamp((start - then) / (now - then), 0.0, 1.0)
    return lb + alpha * (b.logp[i] - lb)


def log_ref(b: Plain, i: int, o: Options, kind: str) -> float:
    """log of the ratio's denominator: the proximal policy, or the behaviour policy under bypass and for CISPO's bound."""
    bypass = o["correction"] == "clip" or (kind == "bounded" and o["correction"] != "off")
    return behave(b, i) if bypass and not math.isnan(behave(b, i)) else prox(b, i, o)


def gap(b: Plain, i: int, o: Options, kind: str) -> float:
    """What w is the exponential of: lp - lb, and l - lb where there is no clipped ratio; 0 where lb is no number."""
    if math.isnan(behave(b, i)):
        return 0.0
    top = b.logp[i] if kind in ("score", "bounded") else prox(b, i, o)
    return clamp(top - behave(b, i), -BOUND, BOUND)


def levelled(b: Plain, s: Sequence, i: int, o: Options, kind: str) -> float:
    """The gap of the token, or of its response: the sum (a product of ratios) or the mean; the mean for GSPO, always."""
    name = o["correction"]
    if kind == "sequence" or name.startswith("geometric"):
        return sum(gap(b, t, o, kind) for t in s.tokens) / len(s.tokens)
    if name.startswith("sequence"):
        return clamp(sum(gap(b, t, o, kind) for t in s.tokens), -BOUND, BOUND)
    return gap(b, i, o, kind)


def weight(b: Plain, s: Sequence, i: int, o: Options, kind: str) -> float:
    """w of a policy token, in an objective of this kind."""
    name = o["correction"]
    if name == "off" or (name == "clip" and kind != "score"):
        return 1.0
    if o["veto"] and any(not math.isnan(behave(b, t)) and math.exp(gap(b, t, o, kind)) < o["veto"] for t in s.tokens):
        return 0.0
    w = math.exp(levelled(b, s, i, o, kind))
    if name == "m2po":
        return (1.0 if kind == "bounded" else w) if abs(math.log(w)) <= largest_kept(b, o, kind) + 1e-13 else 0.0
    low, high = bounds(b, s, i, o, kind)
    if name.endswith("mask"):
        return (1.0 if kind == "bounded" else w) if low <= w <= high else 0.0
    return 1.0 if kind == "bounded" else min(w, high)


def bounds(b: Plain, s: Sequence, i: int, o: Options, kind: str) -> tuple[float, float]:
    """(floor, cap); both come closer to 1 with age, that of the token or of the response's oldest."""
    name = o["correction"]
    floor = FLOORS.get(name, 0.0) if o["floor"] is None else o["floor"]
    cap = CAPS[name] if o["cap"] is None else o["cap"]
    if o["decay"] == 1:
        return floor, cap
    whole = kind == "sequence" or "_" in name
    age = max(b.age[t] for t in s.tokens) if whole else b.age[i]
    shrink = o["decay"] ** age
    return (1 / (1 + (1 / floor - 1) * shrink) if floor else 0.0), 1 + (cap - 1) * shrink


def largest_kept(b: Plain, o: Options, kind: str) -> float:
    """M2PO over the whole batch: throw out the largest, equals together, until the mean square of the rest is at most
    tau."""
    tau = o.get("tau", 0.04)
    known = b.__dict__.setdefault("largest_kept", {})
    key = (kind, *o.items())
    if key in known:
        return known[key]
    sizes = [
        abs(levelled(b, s, i, o, kind))
        for s in b.sequences()
        if not s.teacher
        for i in s.tokens
        if not math.isnan(behave(b, i))
    ]
    while sizes and sum(x * x for x in sizes) / len(sizes) > tau:
        top = max(sizes)
        sizes = [x for x in sizes if x < top - 1e-12]
    known[key] = max(sizes, default=0.0)
    return known[key]
