"""Online RL, APO and the signed-capacity reconstruction, token by token (ALGORITHMS: 1, 2, 3, 5)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tests.oracles.corrections import CORRECTION, log_ref, weight
from tests.oracles.plain import (
    INF,
    NAN,
    Answer,
    Oracle,
    Plain,
    Sequence,
    Term,
    add_up,
    bounded_ratio,
    clamp,
    shares,
)

Options = dict[str, Any]
Rule = Callable[[Plain, Sequence, int, Options], Term]

PENALTY: Options = {"kl_coef": 0.0, "kl": "k3", "kl_where": "all"}
COMMON: Options = {"entropy_coef": 0.0, "l_max": 1024.0} | CORRECTION | PENALTY


# ------------------------------------------------------------------------------------------------------------ token rules


def clipped(x: float, dx: float, a: float, low: float, high: float) -> tuple[float, float]:
    """min(x a, clip(x, low, high) a) and its slope: the unclipped branch moves, the clipped one does not."""
    moving, held = x * a, clamp(x, low, high) * a
    return (moving, dx * a) if moving <= held else (held, 0.0)


def ppo_with(b: Plain, s: Sequence, i: int, o: Options, a: float) -> Term:
    rho, slope = bounded_ratio(b.logp[i] - log_ref(b, i, o, "clipped"))
    w = weight(b, s, i, o, "clipped")
    if not o.get("clip", True):
        return Term(rho * a, slope * a).times(w)
    low, high = 1 - o["eps"], 1 + (o["eps"] if o["eps_high"] is None else o["eps_high"])
    return Term(*clipped(rho, slope, a, low, high)).times(w)


def ppo_token(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    return ppo_with(b, s, i, o, b.advantage[i])


def reinforce_token(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    """A l; a correction weighs by the ratio to the behaviour policy, detached."""
    a, w = b.advantage[i], weight(b, s, i, o, "score")
    return Term(w * a * b.logp[i], w * a)


def cispo_token(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    """sg(clip(rho)) A l with one bound, on the log-ratio."""
    gap = b.logp[i] - log_ref(b, i, o, "bounded")
    held = math.exp(clamp(gap, -20, math.log(o["c"]))) * weight(b, s, i, o, "bounded")
    return Term(held * b.advantage[i] * b.logp[i], held * b.advantage[i])


def gspo_token(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    """min(s A, clip(s) A); s moves with every token of the response by s/|y|, which the reduction sums up to s here."""
    gap = sum(b.logp[t] - log_ref(b, t, o, "sequence") for t in s.tokens) / len(s.tokens)
    ratio, slope = bounded_ratio(gap)
    a, w = b.advantage[i], weight(b, s, i, o, "sequence")
    if not o.get("clip", True):
        return Term(ratio * a, slope * a).times(w)
    return Term(*clipped(ratio, slope, a, 1 - o["eps"], 1 + o["eps_high"])).times(w)


def anchored_with(b: Plain, s: Sequence, i: int, o: Options, a: float) -> Term:
    """APO: r = lam rho - beta r_a where A < 0, r_a = sum_k pi(k) / sum_k ref(k) over the kept ids."""
    if a >= 0:
        return ppo_with(b, s, i, o, a)
    rho, slope = bounded_ratio(b.logp[i] - log_ref(b, i, o, "clipped"))
    r_a, by_id = (0.0, []) if o["beta"] == 0 or b.topk_logp is None else pull(b, i, o)
    lam, beta, low, high = o["lam"], o["beta"], 1 - o["eps"], 1 + (o["eps"] if o["eps_high"] is None else o["eps_high"])
    if not o.get("clip", True):
        j, moves, pulls = lam * rho * a - beta * a * r_a, True, True
    elif o["anchor_clip"] == "push_only":
        push = min(lam * rho * a, clamp(lam * rho, low, high) * a)
        j, moves, pulls = push - beta * a * r_a, lam * rho >= low, True
    else:
        r = lam * rho - beta * r_a
        j = min(r * a, clamp(r, low, high) * a)
        moves = pulls = r >= low
    more = {"topk_logp": [-beta * a * d if pulls else 0.0 for d in by_id]} if by_id else {}
    return Term(j, lam * slope * a if moves else 0.0, more).times(weight(b, s, i, o, "clipped"))


def pull(b: Plain, i: int, o: Options) -> tuple[float, list[float]]:
    """r_a and its slopes by log pi(k); no pull where no id is left or Z < 1e-4."""
    ids = [k for k in range(len(b.topk_logp[i])) if b.topk_keep is None or b.topk_keep[i][k]]
    none = 0.0, [0.0] * len(b.topk_logp[i])
    z = sum(math.exp(b.topk_ref_logp[i][k]) for k in ids)
    if not ids or z < 1e-4:
        return none
    parts = {k: math.exp(b.topk_logp[i][k]) / z for k in ids}
    r_a, top = sum(parts.values()), INF if o["r_anchor_max"] is None else o["r_anchor_max"]
    if r_a > top or r_a < math.exp(-20):
        return clamp(r_a, math.exp(-20), top), none[1]
    return r_a, [parts.get(k, 0.0) for k in range(len(b.topk_logp[i]))]


def anchored_token(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    return anchored_with(b, s, i, o, b.advantage[i])


def kl_token(b: Plain, i: int, o: Options) -> Term:
    """The penalty -coef * KL: k3 (default), k2, or k1's value with k2's gradient (straight through)."""
    raw = b.logp_ref[i] - b.logp[i]
    d, inside = clamp(raw, -20, 20), -20 <= raw <= 20
    value = {"k3": math.exp(d) - d - 1, "k2": d * d / 2, "k1": -d}[o["kl"]]
    slope = {"k3": 1 - math.exp(d), "k2": -d, "k1": -d}[o["kl"]] if inside else 0.0
    return Term(-o["kl_coef"] * value, -o["kl_coef"] * slope)


def value_token(b: Plain, i: int, o: Options) -> Term:
    """-coef * max((v - R)^2, (clip(v, v_old +- eps) - R)^2), with the critic's value moving."""
    v, old, target, e = b.value[i], b.value_old[i], b.returns[i], o["value_clip"]
    inside = clamp(v, old - e, old + e)
    plain, held = (v - target) ** 2, (inside - target) ** 2
    slope = 2 * (v - target) if plain >= held else (2 * (inside - target) if inside == v else 0.0)
    return Term(-o["value_coef"] * max(plain, held), 0.0, {"value": -o["value_coef"] * slope})


# --------------------------------------------------------------------------------- signed capacity: our reconstruction


def capacities(b: Plain, s: Sequence, o: Options) -> list[float]:
    """The bounded, renormalised weights of one response's tokens, by position in ``s.tokens``."""
    c = [b.entropy_at_prox(i) for i in s.tokens]
    mean = sum(c) / len(c)
    if mean < 1e-8:
        return [1.0] * len(c)
    w = [clamp((1 - o["kappa"]) + o["kappa"] * x / mean, 0.1, 5.0) for x in c]
    return [x * len(w) / sum(w) for x in w]


def quantile(values: list[float], q: float) -> float:
    """Linear between the two nearest order statistics."""
    values, at = sorted(values), q * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def hindsight_rule(b: Plain, kept: list[Sequence], o: Options) -> Rule:
    entropies = [b.entropy_at_prox(i) for s in kept for i in s.tokens]
    threshold = quantile(entropies, o["quantile"]) if entropies and o["quadrants"] != 15 else NAN
    weight = {i: w for s in kept for i, w in zip(s.tokens, capacities(b, s, o), strict=True)}

    def rule(b: Plain, s: Sequence, i: int, o: Options) -> Term:
        a, h = b.advantage[i], b.entropy_at_prox(i)
        if o["capacity"] == "weights":
            shaped = a * weight[i]
        elif o["capacity"] == "entropy_advantage":
            shaped = a + min(o["alpha"] * h, abs(a) / o["kappa_e"])
        else:
            shaped = a
        if o["quadrants"] != 15:
            bit = (0 if a > 0 else 2) + (0 if h >= threshold else 1)
            if not o["quadrants"] >> bit & 1:
                shaped = 0.0
        return ppo_with(b, s, i, o, shaped)

    return rule


# -------------------------------------------------------------------------------------------------------------- algorithms


def online(rule: Rule, reduction: str, keep: Callable[[Plain, int], bool] | None = None, **defaults: Any) -> Oracle:
    """An algorithm whose policy tokens follow one rule; teacher tokens are no part of it."""
    return online_by_batch(lambda *_: rule, reduction, keep, **defaults)


def online_by_batch(
    rule_of: Callable[[Plain, list[Sequence], Options], Rule],
    reduction: str,
    keep: Callable[[Plain, int], bool] | None = None,
    **defaults: Any,
) -> Oracle:
    """The same for a rule that looks at the whole batch first."""

    def oracle(batch: Any, **options: Any) -> Answer:
        b, o = Plain(batch), COMMON | {"reduction": reduction} | defaults | options
        kept = [s for s in b.sequences() if not s.teacher]
        for s in kept:
            s.tokens = [i for i in s.tokens if keep is None or keep(b, i)]
        kept = [s for s in kept if s.tokens]
        rule = rule_of(b, kept, o)
        share = shares(kept, o["reduction"], o["l_max"])
        return add_up(b, ((i, share[i], whole(b, s, i, o, rule)) for s in kept for i in s.tokens))

    return oracle


def whole(b: Plain, s: Sequence, i: int, o: Options, rule: Rule) -> Term:
    """The policy term times the learner's weight, and what is added to it."""
    term = rule(b, s, i, o).times(b.weight[i]).plus(added(b, i, o))
    return term.plus(value_token(b, i, o)) if o.get("critic") else term


def added(b: Plain, i: int, o: Options, rollout: bool = True) -> Term:
    """The entropy bonus, and on rollouts the KL penalty: not weighed, with the shares of the policy term."""
    term = Term(o["entropy_coef"] * b.entropy[i], 0.0, {"entropy": o["entropy_coef"]}) if o["entropy_coef"] else Term()
    if rollout and o["kl_coef"] and (o["kl_where"] == "all" or b.advantage[i] < 0):
        term = term.plus(kl_token(b, i, o))
    return term


def has_advantage(b: Plain, i: int) -> bool:
    return b.advantage[i] != 0


CLIP: Options = {"eps": 0.2, "eps_high": None}
CRITIC: Options = {"value_clip": 0.2, "value_coef": 0.5}
ANCHOR: Options = CLIP | {"lam": 1.05, "beta": 0.1, "anchor_clip": "joint", "r_anchor_max": None}
CAPACITY: Options = {
    "kappa": 0.5,
    "quadrants": 15,
    "quantile": 0.8,
    "capacity": "weights",
    "alpha": 0.4,
    "kappa_e": 2.0,
}

ONLINE: dict[str, Oracle] = {
    "ppo": online(ppo_token, "TM", **CLIP, **CRITIC, critic=True),
    "grpo": online(ppo_token, "TM", **CLIP),
    "dr_grpo": online(ppo_token, "SN", **CLIP),
    "dapo": online(ppo_token, "TM", eps=0.2, eps_high=0.28),
    "reinforce": online(reinforce_token, "SEQ"),
    "rloo": online(reinforce_token, "SEQ"),
    "reinforce_pp": online(ppo_token, "TM", **CLIP),
    "cispo": online(cispo_token, "TM", c=5.0),
    "gspo": online(gspo_token, "SM", eps=3e-4, eps_high=4e-4),
    "psr": online(ppo_token, "TM", has_advantage, **CLIP),
    "nsr": online(ppo_token, "TM", has_advantage, **CLIP),
    "w_reinforce": online(ppo_token, "TM", has_advantage, **CLIP),
    "grpo_kl": online(ppo_token, "TM", **CLIP, kl_coef=0.01),
    "grpo_kl_error_only": online(ppo_token, "TM", **CLIP, kl_coef=0.01, kl_where="errors"),
    "apo": online(anchored_token, "TM", **ANCHOR, **CRITIC, critic=False),
    "hindsight_aware_hapo": online_by_batch(hindsight_rule, "TM", **CLIP, **CAPACITY),
}
