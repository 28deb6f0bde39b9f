"""HAPO's gate (seed 000): does this group get the teacher's solution, and in whose place?

With S successes among N judged answers the posterior of the policy's success rate is Beta(1+S, 1+N-S) with mean
c = (1+S)/(2+N). The gate is open iff c < gamma, that is S < gamma (2+N) - 1. Both sides are compared as exact
rationals: at gamma = .8, N = 8, S = 7 the confidence *is* .8 and the gate is closed, whatever floats say.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from hapo_async.config import Config, GateConfig, exact
from hapo_async.errors import ConfigError
from hapo_async.types import GateDecision, GroupKey, Teacher


def decide(
    rewards_G: Sequence[float] | np.ndarray,
    judged_G: Sequence[bool] | np.ndarray,
    teachers: Sequence[Teacher],
    lengths_G: Sequence[int],
    versions_G: Sequence[int],
    *,
    config: GateConfig,
    rng_seed: int = 0,
) -> GateDecision:
    """Evaluates the gate once, on a complete group of G sampled answers.

    rewards_G, judged_G: rewards (ignored where unjudged). teachers: only those with ``rejected`` None are ever
    injected. lengths_G [tokens], versions_G [learner step of the oldest token, -1 none]: for the tie rules. rng_seed:
    seeds the choice of a teacher and random ties. An unjudged answer is replaced first; an answer with R = 1 only by
    ``mode=always``. ``reason`` is "" when a teacher is injected. Raises ValueError when the lengths of the inputs
    differ.
    """
    rewards, judged = np.asarray(rewards_G, np.float64), np.asarray(judged_G, bool)
    if not len(rewards) == len(judged) == len(lengths_G) == len(versions_G):
        raise ValueError(
            f"{len(rewards)} rewards, {len(judged)} judged, {len(lengths_G)} lengths, {len(versions_G)} versions"
        )
    total, successes = int(judged.sum()), count_successes(rewards, judged)
    mean = confidence(successes, total)

    def decision(is_open: bool, reason: str, replaced: int | None = None, teacher: int | None = None) -> GateDecision:
        return GateDecision(is_open, successes, total, float(mean), replaced, teacher, reason)

    if total < min(2, len(rewards)) or total == 0:
        return decision(False, "unverified: fewer than two answers were judged")
    if config.mode == "never":
        return decision(False, "closed: gate.mode=never")
    if config.mode == "bayes" and not is_open(successes, total, config.gamma):
        return decision(False, "closed: confident enough")
    teacher = choose_teacher(teachers, config.teacher, rng_seed)
    if teacher is None:
        return decision(True, no_teacher_reason(teachers))
    replaced = choose_replaced(rewards, judged, lengths_G, versions_G, config.ties, rng_seed)
    if config.mode != "always" and judged[replaced] and rewards[replaced] == 1.0:
        return decision(False, "blocked: only correct answers could be replaced")
    return decision(True, "", replaced, teacher)


def confidence(successes: int, judged: int) -> Fraction:
    """Posterior mean (1+S)/(2+N), exact."""
    return Fraction(1 + successes, 2 + judged)


def is_open(successes: int, judged: int, gamma: float) -> bool:
    """(1+S)/(2+N) < gamma, compared exactly; gamma is the decimal that a person wrote."""
    return confidence(successes, judged) < exact(gamma)


def count_successes(rewards_G: np.ndarray, judged_G: np.ndarray) -> int:
    """S: judged answers with R = 1."""
    return int(((np.asarray(rewards_G) == 1.0) & np.asarray(judged_G, bool)).sum())


def choose_teacher(teachers: Sequence[Teacher], how: str, rng_seed: int) -> int | None:
    """Index of the demonstration to use (``seeded`` | ``shortest``), None when none may be injected."""
    usable = [i for i, t in enumerate(teachers) if t.rejected is None and len(t.tokens)]
    if not usable:
        return None
    if how == "shortest":
        return min(usable, key=lambda i: len(teachers[i].tokens))
    assert how == "seeded", how
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
    """Refuses a gate that could never close. Raises ConfigError with the largest threshold that can."""
    n, gamma = config.sampling.n, config.gate.gamma
    if config.gate.mode == "bayes" and exact(gamma) > confidence(n, n):
        raise ConfigError(
            f"gate.gamma={gamma} can never close the gate: with sampling.n={n} the confidence (1+S)/(2+N) is at most "
            f"{n + 1}/{n + 2}={(n + 1) / (n + 2):.3f}. Set gate.gamma to that or less, or say gate.mode=always."
        )


def seed_of(key: GroupKey, seed: int = 0) -> int:
    """A stable seed for the choices of one (prompt, epoch): the same in every attempt and every process."""
    digest = hashlib.blake2b(f"{seed}/{key.epoch}/{key.uid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")
