"""The table of staleness corrections: what each does with tokens of an older policy, and its options. No torch here.

``resolve`` checks a name with its options and gives ``Settings``; ``hapo_async.staleness`` computes weights from them.
Legend: l = log pi_theta now, lp proximal, lb behaviour log-prob of a token; w its importance weight.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hapo_async.options import Option

AUTO = "clip"
"""What ``auto`` means where tokens may be older than the weights that learn from them; otherwise it means off. Chosen by
``benchmarks/results/staleness.json``."""

Kind = Literal["none", "bypass", "cap", "mask", "moment"]
Level = Literal["token", "sequence", "geometric"]


@dataclass(frozen=True)
class Correction:
    """One row of the table. kind: none (no weight), bypass (another denominator), cap (bounded weight), mask (0 outside
    bounds), moment (0 for the largest). level: whether w is of a token, the product over a response, or its geometric
    mean."""

    meaning: str
    kind: Kind
    level: Level = "token"
    options: dict[str, Option] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """A correction with its options; those that it does not have are at values that change nothing."""

    name: str = "off"
    kind: Kind = "none"
    level: Level = "token"
    cap: float = 2.0
    floor: float = 0.0
    decay: float = 1.0
    veto: float = 0.0
    tau: float = 0.04
    prox: str = "recompute"

    @property
    def recomputes(self) -> bool:
        """Whether the proximal policy's log-probs must be scored by the learner."""
        return self.kind != "bypass" and self.prox == "recompute"

    @property
    def filters(self) -> bool:
        """Whether it may give a token the weight 0."""
        return self.kind in ("mask", "moment") or self.veto > 0


OFF = Settings()

# --------------------------------------------------------------------------------------------------------------------
# Options and rows

_DECAY = Option(
    1.0,
    "how bounds shrink with age: cap(age) = 1 + (cap - 1) decay^age, and 1/floor the same; 1: not at all",
    low=0.0,
    low_open=True,
    high=1.0,
)
_VETO = Option(
    0.0, "a response with a token whose exp(lp - lb) is below it is masked whole; 0: never", low=0.0, high=1.0
)
_PROX = Option(
    "recompute",
    "the proximal policy of later mini-batches: scored before the step (recompute), or lb + alpha (l - lb) by the "
    "versions of the token, without that pass (loglinear)",
    ("recompute", "loglinear"),
)
_TAU = Option(0.04, "second moment that the kept tokens of a mini-batch may have", low=0.0, low_open=True)


def _cap(default: float) -> Option:
    return Option(default, "largest weight", low=1.0)


def _capped(cap: float) -> dict[str, Option]:
    return {"cap": _cap(cap), "decay": _DECAY, "veto": _VETO, "prox": _PROX}


def _masked(cap: float, floor: float) -> dict[str, Option]:
    low = Option(floor, "smallest weight that is kept; 0: any", low=0.0, high=1.0)
    return {"cap": _cap(cap), "floor": low, "decay": _DECAY, "veto": _VETO, "prox": _PROX}


CORRECTIONS: dict[str, Correction] = {
    "off": Correction("ratio against the proximal policy, no weight", "none"),
    "clip": Correction(
        "ratio against the behaviour policy, no weight (it would count twice); an objective without a ratio weighs by "
        "min(exp(l - lb), cap)",
        "bypass",
        options={"cap": _cap(2.0)},
    ),
    "tis": Correction("w = min(exp(lp - lb), cap) per token", "cap", options=_capped(2.0)),
    "mask": Correction(
        "w = exp(lp - lb) per token where it lies in [floor, cap], else 0 (IcePop)", "mask", options=_masked(5.0, 0.5)
    ),
    "sequence_tis": Correction(
        "w = min(exp(sum over the response of lp - lb), cap)", "cap", "sequence", options=_capped(2.0)
    ),
    "sequence_mask": Correction(
        "w = exp(sum over the response of lp - lb) where it lies in [floor, cap], else 0",
        "mask",
        "sequence",
        options=_masked(2.0, 0.5),
    ),
    "geometric_tis": Correction(
        "w = min(exp(mean over the response of lp - lb), cap)", "cap", "geometric", options=_capped(1.05)
    ),
    "geometric_mask": Correction(
        "w = exp(mean over the response of lp - lb) where it lies in [floor, cap], else 0",
        "mask",
        "geometric",
        options=_masked(1.05, 0.95),
    ),
    "m2po": Correction(
        "w = exp(lp - lb) per token; 0 for those with the largest (lp - lb)^2, until its mean over the mini-batch's other "
        "tokens is at most tau",
        "moment",
        options={"tau": _TAU, "veto": _VETO},
    ),
}


def resolve(name: Any, given: Mapping[str, Any], asynchronous: bool = True) -> Settings:
    """The settings of the correction ``name`` (or auto) with the options ``given``.

    asynchronous: whether tokens may be older than the weights; only ``auto`` looks at it, and its options are those of
    ``AUTO`` either way. ``off`` takes the options of any other, which are then unused. A bare YAML ``off``, which reads
    as False, is the word off. Raises ValueError with the value, the rule and the fix.
    """
    name = "off" if name is False else name
    if name is None:
        raise ValueError(
            f"correction=null names none. Old tokens are only ever trained on without one when that is asked for: write "
            f"off. Leave it out for auto, which is {AUTO} when max_staleness > 0"
        )
    if name == "auto":
        checked = _settings(AUTO, given)
        return checked if asynchronous else OFF
    if not isinstance(name, str) or name not in CORRECTIONS:
        near = difflib.get_close_matches(str(name).lower(), CORRECTIONS, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"correction={name!r} must be one of auto, {', '.join(CORRECTIONS)}{hint}")
    return _settings(name, given)


def _settings(name: str, given: Mapping[str, Any]) -> Settings:
    row = CORRECTIONS[name]
    known = row.options if name != "off" else _EVERY
    values = {key: option.default for key, option in known.items()}
    for key, value in given.items():
        if key not in known:
            raise ValueError(_unknown(name, str(key), known))
        option = known[key]
        if not option.accepts(value):
            raise ValueError(f"{key}={value!r} of correction {name!r} must be {option.rule}: {option.help}")
        values[key] = option.convert(value)
    return OFF if name == "off" else Settings(name, row.kind, row.level, **values)


_EVERY = {key: option for row in CORRECTIONS.values() for key, option in row.options.items()}
OPTIONS = tuple(_EVERY)
"""The names of all options."""


def _unknown(name: str, key: str, known: Mapping[str, Option]) -> str:
    owners = [n for n, row in CORRECTIONS.items() if key in row.options]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else f" It is one of {', '.join(owners)}." if owners else ""
    return f"{key!r} is no option of correction {name!r}.{hint} Its options: {', '.join(known)}"
