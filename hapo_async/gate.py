"""HAPO's gate (seed 000): does this group get the teacher's solution, and in whose place?

With S successes among N judged answers the posterior of the policy's success rate is Beta(1+S, 1+N-S) with mean
c = (1+S)/(2+N). The gate is open iff c < gamma, that is S < gamma (2+N) - 1. Both sides are compared as exact
rationals: at gamma = .8, N = 8, S = 7 the confidence *is* .8 and the gate is closed, whatever floats say.

Variants, ours where the paper only names them. The threshold may move with the share of training steps done
(``hapo_async.schedule``). What is compared with it (``gate.decision``): the mean; a Thompson draw theta ~ Beta(1+S,
1+N-S); the mean with the evidence of the prompt's earlier visits (``hapo_async.posterior``).

What follows at a fixed N: with binary rewards an injected group keeps a failure beside the teacher iff gamma <= N/(N+2);
above, S = N-1 may inject and leave nothing but ones. And the gate goes on opening by chance for a policy that is good
enough: at gamma = .8 and N = 8 for .437, .343, .187, .057, .003 of the groups at success rates .82, .85, .90, .95, .99.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hapo_async import schedule
from hapo_async.config import Config, GateConfig
from hapo_async.errors import ConfigError
from hapo_async.posterior import Evidence
from hapo_async.schedule import exact
from hapo_async.types import SUCCESS, GateDecision, GroupKey, Teacher


def decide(
    rewards_G: Sequence[float] | np.ndarray,
    judged_G: Sequence[bool] | np.ndarray,
    teachers: Sequence[Teacher],
    lengths_G: Sequence[int],
    versions_G: Sequence[int],
    *,
    config: GateConfig,
    rng_seed: int = 0,
    progress: float | Fraction = 0.0,
    past: Evidence | None = None,
) -> GateDecision:
    """Evaluates the gate once, on a complete group of G sampled answers.

    rewards_G, judged_G: rewards (ignored where unjudged). teachers: only those with ``rejected`` None are ever
    injected. lengths_G [tokens], versions_G [learner step of the oldest token, -1 none]: for the tie rules. rng_seed:
    seeds the Thompson draw, the choice of a teacher and random ties. progress: share of the training steps done. past:
    evidence of the prompt's earlier visits, for ``decision=pooled``. An unjudged answer is replaced first; an answer
    with R = 1 only by ``mode=always``. ``reason`` is "" when a teacher is injected. Raises ValueError when the lengths
    of the inputs differ.
    """
    rewards, judged = np.asarray(rewards_G, np.float64), np.asarray(judged_G, bool)
    if not len(rewards) == len(judged) == len(lengths_G) == len(versions_G):
        raise ValueError(
            f"{len(rewards)} rewards, {len(judged)} judged, {len(lengths_G)} lengths, {len(versions_G)} versions"
        )
    total, successes = int(judged.sum()), count_successes(rewards, judged)
    mean = confidence(successes, total, past if config.decision == "pooled" else None)
    gamma = threshold(config, progress)
    draw = thompson(successes, total, rng_seed) if config.decision == "thompson" else None

    def decision(is_open: bool, reason: str, replaced: int | None = None, teacher: int | None = None) -> GateDecision:
        return GateDecision(
            is_open, successes, total, float(mean), replaced, teacher, reason, threshold=float(gamma), draw=draw
        )

    if total < min(2, len(rewards)) or total == 0:
        return decision(False, "unverified: fewer than two answers were judged")
    if config.mode == "never":
        return decision(False, "closed: gate.mode=never")
    if config.mode == "bayes" and (mean if draw is None else Fraction(draw)) >= gamma:
        return decision(False, "closed: confident enough")
    teacher = choose_teacher(teachers, config.teacher, rng_seed)
    if teacher is None:
        return decision(True, no_teacher_reason(teachers))
    replaced = choose_replaced(rewards, judged, lengths_G, versions_G, config.ties, rng_seed)
    if config.mode != "always" and judged[replaced] and rewards[replaced] >= SUCCESS:
        return decision(False, "blocked: only correct answers could be replaced")
    return decision(True, "", replaced, teacher)


def confidence(successes: int, judged: int, past: Evidence | None = None) -> Fraction:
    """Posterior mean (1+S)/(2+N), exact; ``past`` counts to both."""
    earlier = past or Evidence()
    right, wrong = Fraction(earlier.successes), Fraction(earlier.failures)
    return (1 + successes + right) / (2 + judged + right + wrong)


def thompson(successes: int, judged: int, rng_seed: int) -> float:
    """A draw from the posterior Beta(1+S, 1+N-S), the same for the same seed."""
    return random.Random(f"theta/{rng_seed}").betavariate(1 + successes, 1 + judged - successes)


def threshold(config: GateConfig, progress: float | Fraction) -> Fraction:
    """gamma when the share ``progress`` of the training steps is done."""
    return schedule.value(config.gamma, config.schedule, progress)


def count_successes(rewards_G: np.ndarray, judged_G: np.ndarray) -> int:
    """S: judged answers with R = 1."""
    return int(((np.asarray(rewards_G) >= SUCCESS) & np.asarray(judged_G, bool)).sum())


def usable_teachers(teachers: Sequence[Teacher]) -> list[int]:
    """Indices of the demonstrations that may be injected."""
    return [i for i, t in enumerate(teachers) if t.rejected is None and len(t.tokens)]


def choose_teacher(teachers: Sequence[Teacher], how: str, rng_seed: int) -> int | None:
    """Index of the demonstration to use, None when none may be injected.

    how: ``seeded`` | ``shortest`` | ``likeliest``, of which the learner decides when it trains the group; until then it
    is the seeded one.
    """
    usable = usable_teachers(teachers)
    if not usable:
        return None
    if how == "shortest":
        return min(usable, key=lambda i: len(teachers[i].tokens))
    assert how in ("seeded", "likeliest"), how
    return usable[random.Random(rng_seed).randrange(len(usable))]


def no_teacher_reason(teachers: Sequence[Teacher]) -> str:
    """Why none of the demonstrations may be injected."""
    reasons = sorted({t.rejected or "empty" for t in teachers})
    return "no teacher" + (f": {', '.join(reasons)}" if reasons else "")


def choose_replaced(
    rewards_G: np.ndarray,
    judged_G: np.ndarray,
    lengths_G: Sequence[int],
    versions_G: Sequence[int],
    ties: str,
    rng_seed: int,
) -> int:
    """j*: an unjudged answer where there is one, else the lowest reward. Ties: first | random | longest | stalest (then
    the lowest index)."""
    if not judged_G.all():
        candidates = [int(i) for i in np.flatnonzero(~judged_G)]
    else:
        candidates = [int(i) for i in np.flatnonzero(rewards_G == rewards_G.min())]
    if ties == "first":
        return candidates[0]
    if ties == "random":
        return random.Random(f"ties/{rng_seed}").choice(candidates)
    if ties == "longest":
        return max(candidates, key=lambda i: (lengths_G[i], -i))
    assert ties == "stalest", ties
    return min(candidates, key=lambda i: (versions_G[i], i))


def check_config(config: Config) -> None:
    """Refuses a gate that could not close at some time of the run, with the bound of a threshold that can, and a teacher
    weight that needs one threshold where that moves. Raises ConfigError."""
    gate, n = config.gate, config.sampling.n
    if gate.schedule and config.options.get("confidence") == "1-c/gamma":
        raise ConfigError(
            "options.confidence=1-c/gamma measures the confidence against one gamma, but gate.schedule moves it. Use "
            "options.confidence=1-c, or remove gate.schedule."
        )
    if gate.mode != "bayes":
        return
    highest = max(threshold(gate, 0), threshold(gate, 1))
    reach, attained, why = _reach(gate, n)
    if highest < reach or (attained and highest == reach):
        return
    end = gate.schedule.get("end", 0.0)
    where, value = ("gate.gamma", gate.gamma) if gate.gamma >= end else ("gate.schedule.end", end)
    fix = "to that or less" if attained else "below that"
    raise ConfigError(f"{where}={value} can never close the gate: {why}. Set {where} {fix}, or say gate.mode=always.")


def _reach(gate: GateConfig, n: int) -> tuple[Fraction, bool, str]:
    """The highest value that is ever compared with the threshold, whether it is attained, and both in words."""
    if gate.decision == "thompson":
        return Fraction(1), False, "a Thompson draw lies below 1"
    if gate.decision == "mean" or gate.decay == 0:
        words = f"with sampling.n={n} the confidence (1+S)/(2+N) is at most {n + 1}/{n + 2}={(n + 1) / (n + 2):.3f}"
        return confidence(n, n), True, words
    # All visits right: n (1 + decay + decay^2 + ...) successes, which is never quite reached.
    reach = 1 - 1 / (2 + n / (1 - exact(gate.decay))) if gate.decay < 1 else Fraction(1)
    words = f"with sampling.n={n} and gate.decay={gate.decay:g} the pooled confidence stays below {float(reach):.3f}"
    return reach, False, words


def seed_of(key: GroupKey, seed: int = 0) -> int:
    """A stable seed for the choices of one (prompt, epoch): the same in every attempt and every process."""
    digest = hashlib.blake2b(f"{seed}/{key.epoch}/{key.uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
