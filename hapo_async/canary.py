"""Train-inference mismatch, told from staleness: fixed sequences, scored by learner and generator at equal weights.

Whatever differs then is numerics (kernels, precision, a weight that never arrived), never age. With d = log q - log p
(p learner, q generator) the estimate is the k3 mean of exp(d) - 1 - d over tokens: close to d^2 / 2 where engines agree,
so that bfloat16 (|d| < .075) stays below .003, and about -d where the generator has lost a token that the learner expects.
Tokens that neither would sample are left out: their log-probs are large, and rounded coarsely.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hapo_async import sequences
from hapo_async.scoring import Pair
from hapo_async.types import Prompt

PROMPTS = 8
LONGEST = 512  # tokens of one sequence, prompt included
NEVER = np.log(1e-4)  # below this log-prob a token is hardly ever sampled
_WIDEST = 20.0  # exp of more is no number that anybody can read


@dataclass(frozen=True)
class Gap:
    """How far two scorers are apart. kl in nats per token; max_diff: largest |log q - log p| of any token. Both are
    infinite where a log-prob is not a number."""

    kl: float
    max_diff: float


def choose(prompts: Sequence[Prompt], max_tokens: int) -> list[Pair]:
    """Up to ``PROMPTS`` sequences, spread evenly over the prompts that have a teacher solution, else over all.

    Of a solution the first ``max_tokens`` tokens are scored, after the end of its prompt; without one, the prompt's own
    tokens after the first. Prompts of a single token give nothing.
    """
    taught = [p for p in prompts if max_tokens > 0 and any(len(t.tokens) for t in p.teachers)]
    usable = taught or [p for p in prompts if len(p.tokens) > 1]
    count = min(PROMPTS, len(usable))
    return [_pair(usable[i * len(usable) // count], bool(taught), max_tokens) for i in range(count)]


def _pair(prompt: Prompt, with_teacher: bool, max_tokens: int) -> Pair:
    if not with_teacher:
        return prompt.tokens[:1], prompt.tokens[1:LONGEST]
    context = prompt.tokens[-LONGEST // 2 :]
    solution = next(t.tokens for t in prompt.teachers if len(t.tokens))
    return context, solution[: min(max_tokens, LONGEST - len(context))]


def sequence(pair: Pair) -> sequences.Sequence:
    """The same tokens as the learner scores them."""
    return sequences.to_score(*pair)


def compare(learner: Sequence[np.ndarray], generator: Sequence[np.ndarray]) -> Gap:
    """Log-probs [T] of the same sequences by both. Raises ValueError when their shapes differ or there are none."""
    if [a.shape for a in learner] != [a.shape for a in generator] or not any(len(a) for a in learner):
        raise ValueError(f"{len(learner)} scored sequences do not match {len(generator)}, or hold no token")
    log_p, log_q = (np.concatenate(list(part)).astype(np.float64) for part in (learner, generator))
    if np.isnan(log_p).any() or np.isnan(log_q).any():
        return Gap(np.inf, np.inf)
    with np.errstate(invalid="ignore"):
        difference = np.where(log_p == log_q, 0.0, log_q - log_p)
    expected = np.maximum(log_p, log_q) > NEVER
    d = difference[expected] if expected.any() else difference
    d = np.clip(d, -_WIDEST, _WIDEST)
    return Gap(float(np.mean(np.expm1(d) - d)), float(np.abs(difference).max()))
