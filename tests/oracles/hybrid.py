"""SFT and the algorithms that mix rollouts with a teacher's tokens (ALGORITHMS: 2)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tests.oracles.online import ANCHOR, CLIP, COMMON, Options, added, anchored_token, ppo_token
from tests.oracles.plain import Answer, Oracle, Plain, Sequence, Term, add_up, shares


def shaped(b: Plain, i: int, o: Options) -> Term:
    """F(pi): pi/(pi+gamma), pi itself, or log pi; and its slope by log pi."""
    pi = math.exp(b.logp[i])
    if o["shaping"] == "logp":
        return Term(b.logp[i], 1.0)
    if o["shaping"] == "identity":
        return Term(pi, pi)
    g = o["shaping_gamma"]
    return Term(pi / (pi + g), g * pi / (pi + g) ** 2)


def likelihood(b: Plain, i: int) -> Term:
    return Term(b.logp[i], 1.0)


def confidence_factor(b: Plain, s: Sequence, o: Options) -> float:
    """c inside F: 1 (the gate only), 1 - c, or (1 - c/gamma)+; c = (1 + S) / (2 + N) of the group's judged rollouts."""
    if o["confidence"] == "gate":
        return 1.0
    if b.confidence is not None:
        c = b.confidence[s.group]
    else:
        rollouts = {b.sequence[i] for i in range(b.n) if b.group[i] == s.group and not b.is_teacher[i]}
        judged = [r for r in (b.reward[q] for q in rollouts) if not math.isnan(r)]
        everyone = {b.sequence[i] for i in range(b.n) if b.group[i] == s.group}
        count = len([q for q in everyone if not math.isnan(b.reward[q])])
        c = (1 + sum(r == 1 for r in judged)) / (2 + count)
    return 1 - c if o["confidence"] == "1-c" else max(0.0, 1 - c / o["gamma"])


def hapo_teacher(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    times_a = b.advantage[i] if o["teacher_weight"] == "advantage" else 1.0
    return shaped(b, i, o).times(times_a * confidence_factor(b, s, o))


def luffy_teacher(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    return shaped(b, i, o).times(b.advantage[i] if o["teacher_weight"] == "advantage" else 1.0)


def hpt_sft_teacher(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    return likelihood(b, i).times(o["sft_coef"])


def hpt_off_teacher(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    """LUFFY's off-policy term in the place of SFT; the batch carries A = 1 for a lone demonstration."""
    return shaped(b, i, o).times(b.advantage[i])


def hpt_mix_teacher(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    return likelihood(b, i).times(o["sft_coef"]).plus(shaped(b, i, o).times(o["off_coef"] * b.advantage[i]))


def mean_entropy(b: Plain, s: Sequence) -> float:
    return sum(b.entropy[i] for i in s.tokens) / len(s.tokens)


def srft_teacher(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    sft = likelihood(b, i).times(o["sft_coef"] * math.exp(-mean_entropy(b, s)))
    return sft.plus(shaped(b, i, o).times(b.advantage[i]))


def srft_rollout(b: Plain, s: Sequence, i: int, o: Options) -> Term:
    if not s.judged:
        return Term()
    return likelihood(b, i).times(o["own_coef"] * math.exp(mean_entropy(b, s)) if s.correct else -1.0)


Rule = Callable[[Plain, Sequence, int, Options], Term]


def mixed(rollout: Rule, teacher: Rule, reduction: str, **defaults: Any) -> Oracle:
    """Rollout tokens by one rule, teacher tokens by another, one reduction over both (or one each, if separate)."""

    def oracle(batch: Any, **options: Any) -> Answer:
        b, o = Plain(batch), COMMON | {"reduction": reduction, "normaliser": "shared"} | defaults | options
        kept = b.sequences()
        if o["normaliser"] == "separate":
            share = {}
            for side in (True, False):
                share |= shares([s for s in kept if s.teacher is side], o["reduction"], o["l_max"])
        else:
            share = shares(kept, o["reduction"], o["l_max"])
        return add_up(b, ((i, share[i], one(b, s, i, o)) for s in kept for i in s.tokens))

    def one(b: Plain, s: Sequence, i: int, o: Options) -> Term:
        term = (teacher if s.teacher else rollout)(b, s, i, o).times(b.weight[i])
        return term.plus(added(b, i, o, rollout=not s.teacher))

    return oracle


def sft(keep: Callable[[Sequence], bool]) -> Oracle:
    """J = l on the tokens of the sequences kept."""

    def oracle(batch: Any, **options: Any) -> Answer:
        b, o = Plain(batch), COMMON | {"reduction": "TM"} | options
        kept = [s for s in b.sequences() if keep(s)]
        share = shares(kept, o["reduction"], o["l_max"])
        one = lambda i: likelihood(b, i).times(b.weight[i]).plus(added(b, i, o, rollout=False))  # noqa: E731
        return add_up(b, ((i, share[i], one(i)) for s in kept for i in s.tokens))

    return oracle


SHAPED: Options = {"shaping": "f", "shaping_gamma": 0.1}
HAPO: Options = SHAPED | {"teacher_weight": "one", "confidence": "gate", "gamma": 0.8}

HYBRID: dict[str, Oracle] = {
    "sft": sft(lambda s: True),
    "rft": sft(lambda s: s.correct and not s.teacher),
    "luffy": mixed(ppo_token, luffy_teacher, "TM", **CLIP, **SHAPED, teacher_weight="advantage"),
    "srft": mixed(srft_rollout, srft_teacher, "TM", shaping="identity", shaping_gamma=0.1, sft_coef=0.5, own_coef=0.1),
    "hpt": mixed(ppo_token, hpt_sft_teacher, "PN", **CLIP, sft_coef=1.0),
    "hpt_off_on": mixed(ppo_token, hpt_off_teacher, "PN", **CLIP, **SHAPED),
    "hpt_mix_on": mixed(ppo_token, hpt_mix_teacher, "PN", **CLIP, **SHAPED, sft_coef=0.1, off_coef=1.0),
    "hapo": mixed(ppo_token, hapo_teacher, "TM", **CLIP, **HAPO),
    "hapo_apo": mixed(anchored_token, hapo_teacher, "TM", **ANCHOR, **HAPO),
}
