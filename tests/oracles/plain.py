"""What every oracle shares: a batch as plain Python lists, the answer that is compared, and the reductions as shares.

Nothing here comes from the package under test: an oracle reads the fields of a batch as floats and works in Python
loops. Its answer is the value -J and the gradient that a step takes, written out by hand, for every input that
carries one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

NAN, INF = math.nan, math.inf
BOUND = 20.0  # log-ratios are clamped to this


@dataclass
class Sequence:
    """The tokens (indices into the batch) of one response that may train, in order."""

    id: int
    group: int
    teacher: bool
    reward: float
    tokens: list[int]

    @property
    def judged(self) -> bool:
        return not math.isnan(self.reward)

    @property
    def correct(self) -> bool:
        return self.reward == 1


class Plain:
    """A token batch as lists: ``b.logp[i]``, ``b.topk_logp[i][k]``; a field that the batch lacks is None."""

    logp: list[float]

    def __init__(self, batch: Any):
        for name in batch.__dataclass_fields__:
            value = getattr(batch, name)
            setattr(self, name, value.detach().tolist() if hasattr(value, "detach") else value)
        n = len(self.logp)
        for name, default in {"mask": True, "is_teacher": False, "sequence": 0, "group": 0, "weight": 1.0}.items():
            if getattr(self, name, None) is None:
                setattr(self, name, [default] * n)
        self.n = n

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None

    def sequences(self) -> list[Sequence]:
        """The sequences that have a token in the mask, by their id."""
        found: dict[int, Sequence] = {}
        for i in range(self.n):
            if self.mask[i]:
                s = self.sequence[i]
                reward = NAN if self.reward is None else float(self.reward[s])
                found.setdefault(s, Sequence(s, self.group[i], self.is_teacher[i], reward, [])).tokens.append(i)
        return [found[s] for s in sorted(found)]

    def prox(self, i: int) -> float:
        """The proximal log-prob; the policy's own where there is none."""
        if self.logp_prox is None or not math.isfinite(self.logp_prox[i]):
            return self.logp[i]
        return self.logp_prox[i]

    def entropy_at_prox(self, i: int) -> float:
        return (self.entropy if self.entropy_prox is None else self.entropy_prox)[i]


@dataclass
class Answer:
    """value = -J; grads[field][i] (or [i][k]) = the derivative of the loss, 0 where nothing flows."""

    value: float
    grads: dict[str, Any] = field(default_factory=dict)


@dataclass
class Term:
    """One token's J and what a step climbs: dJ/dlogp, and for other inputs ``more[field] = slope`` or list of slopes."""

    j: float = 0.0
    slope: float = 0.0
    more: dict[str, float | list[float]] = field(default_factory=dict)

    def times(self, w: float) -> Term:
        scale = lambda d: [w * x for x in d] if isinstance(d, list) else w * d  # noqa: E731
        return Term(w * self.j, w * self.slope, {k: scale(d) for k, d in self.more.items()})

    def plus(self, other: Term) -> Term:
        more = dict(self.more)
        for name, d in other.more.items():
            assert name not in more
            more[name] = d
        return Term(self.j + other.j, self.slope + other.slope, more)


def clamp(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x >= 0 else x - math.log1p(math.exp(x))


def bounded_ratio(gap: float) -> tuple[float, float]:
    """exp of a log-ratio clamped to +-20, and its derivative by the log-ratio (0 where clamped)."""
    ratio = math.exp(clamp(gap, -BOUND, BOUND))
    return ratio, ratio if -BOUND <= gap <= BOUND else 0.0


def shares(sequences: list[Sequence], how: str, l_max: float = 1024.0) -> dict[int, float]:
    """The factor that each token's J has in the batch's J. ``sequences`` holds exactly the tokens that count.

    TM 1/all tokens; SM 1/(sequences * own length); SN 1/(sequences * l_max); SEQ 1/sequences; PN (HPT) per prompt: its
    rollouts' sums over l_max averaged, its demonstrations' token means added, all over the number of prompts.
    """
    sequences = [s for s in sequences if s.tokens]
    count, total = len(sequences), sum(len(s.tokens) for s in sequences)
    prompts = {s.group for s in sequences}
    out: dict[int, float] = {}
    for s in sequences:
        rollouts = sum(1 for o in sequences if o.group == s.group and not o.teacher)
        share = {
            "TM": lambda: 1 / total,
            "SM": lambda s=s: 1 / (count * len(s.tokens)),
            "SN": lambda: 1 / (count * l_max),
            "SEQ": lambda: 1 / count,
            "PN": lambda s=s, r=rollouts: (1 / len(s.tokens) if s.teacher else 1 / (l_max * r)) / len(prompts),
        }[how]()
        out.update(dict.fromkeys(s.tokens, share))
    return out


def add_up(b: Plain, terms: Iterable[tuple[int, float, Term]]) -> Answer:
    """The answer from (token, share, term): -sum(share * J), and its gradients."""
    value, grads = 0.0, {"logp": [0.0] * b.n}
    for i, share, term in terms:
        value -= share * term.j
        grads["logp"][i] -= share * term.slope
        for name, d in term.more.items():
            width = len(d) if isinstance(d, list) else None
            rows = grads.setdefault(name, [[0.0] * width for _ in range(b.n)] if width else [0.0] * b.n)
            rows[i] = [x - share * y for x, y in zip(rows[i], d, strict=True)] if width else rows[i] - share * d
    return Answer(value, grads)


Oracle = Callable[..., Answer]
