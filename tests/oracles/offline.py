"""Offline algorithms, sequence by sequence and pair by pair (ALGORITHMS: 4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tests.oracles.online import COMMON, Options, added
from tests.oracles.plain import Answer, Oracle, Plain, Sequence, Term, add_up, clamp, log_sigmoid, shares, sigmoid

Rows = list[tuple[int, float, Term]]


def sign(s: Sequence) -> float:
    return 1.0 if s.correct else -1.0


def likelihood(b: Plain, s: Sequence) -> float:
    """exp of the mean log-prob."""
    return math.exp(sum(b.logp[i] for i in s.tokens) / len(s.tokens))


def forgetting(b: Plain, s: Sequence) -> float:
    """exp of the mean log-prob under the extrapolated policy: no gradient."""
    return math.exp(sum(b.future_logp[i] for i in s.tokens) / len(s.tokens))


FAR = 1e4  # our decision: the log-ratio to a reference that gives a token no probability at all


def gap(b: Plain, s: Sequence) -> float:
    """Delta = sum_t (l - lr). No exponential is taken of it, so it needs no bound where it is finite."""
    return sum(clamp(d, -FAR, FAR) if math.isinf(d := b.logp[i] - b.logp_ref[i]) else d for i in s.tokens)


def spread(s: Sequence, j: float, slope: float) -> Rows:
    """A sequence's J and its slope by every one of its log-probs: J sits on the first token, the slope on each."""
    return [(i, 1.0, Term(j if i == s.tokens[0] else 0.0, slope)) for i in s.tokens]


def pairs(sequences: list[Sequence], how: str) -> list[tuple[Sequence, Sequence]]:
    """(correct, wrong) inside each group: in order (zip), every combination (all), or the first of each (one)."""
    out = []
    for g in sorted({s.group for s in sequences}):
        wins = [s for s in sequences if s.group == g and s.judged and s.correct]
        losses = [s for s in sequences if s.group == g and s.judged and not s.correct]
        if how == "all":
            out += [(w, x) for w in wins for x in losses]
        else:
            out += list(zip(wins, losses, strict=False))[: 1 if how == "one" else None]
    return out


# ------------------------------------------------------------------------------------------------------- per sequence


def off_rl(b: Plain, s: Sequence, o: Options) -> Term:
    """J of each token of the response, and the weight on its gradient; under SM the two make R exp(mean l)."""
    p = sign(s) * likelihood(b, s)
    return Term(p, p)


def fpa(b: Plain, s: Sequence, o: Options) -> Term:
    """The weight is the extrapolated policy's likelihood; the moving factor exp(m - sg(m)) is 1."""
    side = {"both": True, "correct": s.correct, "incorrect": not s.correct}[o["apply_to"]]
    p = sign(s) * (forgetting(b, s) if side and o["lam"] != 0 else likelihood(b, s))
    return Term(p, p)


def forward_kl(b: Plain, i: int, o: Options) -> Term:
    """-tau KL(ref | theta) of a token: over the vocabulary, or k3 for an answer that the reference sampled."""
    if o["kl_estimator"] == "full":
        return Term(-o["tau"] * b.ref_kl[i], 0.0, {"ref_kl": -o["tau"]})
    raw = b.logp[i] - b.logp_ref[i]
    d = clamp(raw, -20, 20)
    return Term(-o["tau"] * (math.exp(d) - d - 1), -o["tau"] * (math.exp(d) - 1) if d == raw else 0.0)


def a_star_po(b: Plain, s: Sequence, o: Options, group: list[Sequence]) -> Rows:
    value = lambda q: sign(q) if o["rewards"] == "signed" else float(q.correct)  # noqa: E731
    mean = sum(math.exp(value(q) / o["beta1"]) for q in group) / len(group)
    residual = o["beta2"] * gap(b, s) - (value(s) - o["beta1"] * math.log(mean))
    return spread(s, -(residual**2), -2 * o["beta2"] * residual)


def kto(b: Plain, s: Sequence, o: Options, z0: float) -> Rows:
    weight = o["lam_correct"] if s.correct else o["lam_incorrect"]
    v = sigmoid(sign(s) * o["beta"] * (gap(b, s) - z0))
    return spread(s, -weight * (1 - v), weight * sign(s) * o["beta"] * v * (1 - v))


# ------------------------------------------------------------------------------------------------------------ per pair


def dpo_pair(b: Plain, w: Sequence, x: Sequence, o: Options) -> Rows:
    margin = o["beta"] * (gap(b, w) - gap(b, x))
    pull = o["beta"] * sigmoid(-margin)
    return spread(w, log_sigmoid(margin), pull) + spread(x, 0.0, -pull)


def rpo_pair(b: Plain, w: Sequence, x: Sequence, o: Options) -> Rows:
    n = len(w.tokens)
    return dpo_pair(b, w, x, o) + [(i, o["alpha"] / n, Term(b.logp[i], 1.0)) for i in w.tokens]


def simper_pair(b: Plain, w: Sequence, x: Sequence, o: Options) -> Rows:
    return [(i, 1 / len(s.tokens), off_rl(b, s, o)) for s in (w, x) for i in s.tokens]


# ---------------------------------------------------------------------------------------------------------- algorithms


def scaled(rows: Rows, by: float, b: Plain) -> Rows:
    return [(i, share * by * b.weight[i], term) for i, share, term in rows]


def answers(b: Plain) -> list[Sequence]:
    return [s for s in b.sequences() if s.judged and not s.teacher]


def per_token(rule: Callable[[Plain, Sequence, Options], Term], **defaults: Any) -> Oracle:
    def oracle(batch: Any, **options: Any) -> Answer:
        b, o = Plain(batch), COMMON | {"reduction": "SM"} | defaults | options
        kept = answers(b)
        share = shares(kept, o["reduction"], o["l_max"])
        extra = lambda i: forward_kl(b, i, o) if o.get("tau") else Term()  # noqa: E731
        one = lambda s, i: rule(b, s, o).times(b.weight[i]).plus(extra(i)).plus(added(b, i, o, rollout=False))  # noqa: E731
        return add_up(b, ((i, share[i], one(s, i)) for s in kept for i in s.tokens))

    return oracle


def per_group(batch: Any, **options: Any) -> Answer:
    b, o = Plain(batch), COMMON | {"beta1": 0.5, "beta2": 1e-3, "rewards": "signed"} | options
    kept = answers(b)
    rows: Rows = []
    for s in kept:
        rows += scaled(a_star_po(b, s, o, [q for q in kept if q.group == s.group]), 1 / len(kept), b)
    return add_up(b, rows)


def against_the_mean(batch: Any, **options: Any) -> Answer:
    defaults = {"beta": 0.1, "lam_correct": 1.0, "lam_incorrect": 1.0, "clamp0": False}
    b, o = Plain(batch), COMMON | defaults | options
    kept = answers(b)
    z0 = sum(gap(b, s) for s in kept) / len(kept) if kept else 0.0
    z0 = max(z0, 0.0) if o["clamp0"] else z0
    return add_up(b, (row for s in kept for row in scaled(kto(b, s, o, z0), 1 / len(kept), b)))


def per_pair(rule: Callable[[Plain, Sequence, Sequence, Options], Rows], **defaults: Any) -> Oracle:
    def oracle(batch: Any, **options: Any) -> Answer:
        b, o = Plain(batch), COMMON | {"pairs": "zip"} | defaults | options
        found = pairs(answers(b), o["pairs"])
        return add_up(b, (row for w, x in found for row in scaled(rule(b, w, x, o), 1 / len(found), b)))

    return oracle


OFFLINE: dict[str, Oracle] = {
    "off_rl": per_token(off_rl),
    "simper": per_pair(simper_pair),
    "fpa": per_token(fpa, lam=1.0, apply_to="both"),
    "dpo": per_pair(dpo_pair, beta=0.1),
    "rpo": per_pair(rpo_pair, beta=0.1, alpha=1.0),
    "kto": against_the_mean,
    "a_star_po": per_group,
    "off_rl_kl": per_token(off_rl, tau=0.04, kl_estimator="full"),
}
