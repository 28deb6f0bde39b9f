"""What a loss can say about itself: detached means over tokens and responses, named as metrics.

All are ``Mean``s, which add up over micro-batches, mini-batches and ranks. Legend: N packed tokens, S responses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hapo_async import terms
from hapo_async.reduction import Normaliser
from hapo_async.types import SUCCESS
from hapo_async.upge import Contribution, Mean, Segments, TokenBatch, Tokens, log_ratio, wide


def of_loss(
    batch: TokenBatch, norm: Normaliser, rollouts: Tokens, policy: Contribution, values: Sequence[Tensor]
) -> dict[str, Mean]:
    """Loss and ratios. Those of the loss weigh by this micro-batch's part of the mini-batch, so that they add up to
    it."""
    count = batch.policy.sum()
    part = batch.trained.sum().double() / max(1, norm.tokens)
    gap = log_ratio(rollouts.logp.detach(), rollouts.logp_prox)
    out = {
        "loss/value": Mean(torch.stack(list(values)).double().sum(), part),
        "loss/policy": Mean(values[0].double(), part),
        "policy/clip_frac": Mean((batch.policy & ~policy.keep).sum(), count),
        "policy/ratio_mean": Mean(torch.where(batch.policy, gap.exp(), 0.0).sum(), count),
        "policy/kl": Mean(torch.where(batch.policy, (-gap).exp() - 1 + gap, 0.0).sum(), count),
    }
    out |= {name: policy.stats[name] for name in ("loss/kl", "loss/value_function") if name in policy.stats}
    if len(values) > 1:
        out["loss/teacher"] = Mean(values[1].double(), part)
        logp = torch.where(batch.teachers, wide(batch.logp.detach()), 0.0)
        out["policy/teacher_logp"] = Mean(logp.sum(), batch.teachers.sum())
    return out


def of_tokens(batch: TokenBatch, t: Tokens, norm: Normaliser) -> dict[str, Mean]:
    """What the papers plot of sampled answers, as far as the batch holds it."""
    with torch.no_grad():
        out: dict[str, Mean] = {}
        if batch.entropy is not None and batch.advantage is not None:
            out |= _quadrants(t, norm)
        if batch.reward is not None:
            out |= _by_outcome(batch, t)
        if batch.logp_ref is not None:
            gap = log_ratio(t.safe("logp_ref", "the distance to the reference"), t.logp)
            out["policy/ref_kl"] = Mean(torch.where(t.selected, gap.exp() - gap - 1, 0.0).sum(), t.selected.sum())
        if batch.value is not None:
            value = t.safe("value", "the critic").detach()
            out["critic/value_mean"] = Mean(value.sum(), t.selected.sum())
        return out


def _quadrants(t: Tokens, norm: Normaliser) -> dict[str, Mean]:
    """Entropy and share of sign(A) x (entropy at or above the 80% quantile). Without the mini-batch's quantile the
    micro-batch's own takes its place."""
    entropy, count = t.capacity, t.selected.sum()
    if not len(entropy):
        return {}
    threshold: float | Tensor | None = norm.entropy_threshold
    if threshold is None:
        ordered = torch.where(t.selected, entropy, math.inf).sort().values
        threshold = ordered[(0.8 * count).long().clamp(max=len(ordered) - 1)]
    out = {}
    for name, inside in terms.quadrants(t.advantage, entropy, threshold).items():
        inside = inside & t.selected
        out[f"policy/entropy/{name}"] = Mean(torch.where(inside, entropy, 0.0).sum(), inside.sum())
        out[f"policy/quadrant_frac/{name}"] = Mean(inside.sum(), count)
    return out


def _by_outcome(batch: TokenBatch, t: Tokens) -> dict[str, Mean]:
    """Log-probs, drift from the reference and sequence weights of correct (R = 1) and incorrect answers."""
    segments = t.segments
    reward = batch.rewards(t.selected)
    out: dict[str, Mean] = {}
    for which, tokens in (("correct", reward >= SUCCESS), ("incorrect", reward < SUCCESS)):
        tokens = tokens & t.selected
        chosen = _any(segments, tokens)
        answers = chosen.sum()
        out[f"policy/logp/{which}"] = Mean(torch.where(tokens, t.logp.detach(), 0.0).sum(), tokens.sum())
        if batch.logp_ref is not None:
            gap = torch.nan_to_num(t.logp.detach() - t.safe("logp_ref", "drift"), nan=0.0)
            drift = torch.where(tokens, gap, 0.0)
            out[f"policy/drift/{which}"] = Mean(drift.sum(), answers)
        if batch.future_logp is not None:
            out |= _future(t, segments, chosen, which)
    return out


def _future(t: Tokens, segments: Segments, chosen: Tensor, which: str) -> dict[str, Mean]:
    """pi and pi^ as sequence weights exp(mean_t log p), their quotient, and how many weights are below .2."""
    now = segments.mean(t.logp.detach()).exp()
    future = segments.mean(t.safe("future_logp", "FPA")).exp()
    answers = chosen.sum()

    def mean(x: Tensor) -> Mean:
        return Mean(torch.where(chosen, x, 0.0).sum(), answers)

    return {
        f"offline/weight/{which}": mean(now),
        f"offline/future_weight/{which}": mean(future),
        f"offline/future_ratio/{which}": mean(future / now.clamp(min=1e-30)),
        f"offline/small_weight_frac/{which}": mean((future < 0.2).to(now.dtype)),
    }


def _any(segments: Segments, tokens: Tensor) -> Tensor:
    """[S] bool: responses with one of the tokens."""
    return torch.zeros_like(segments.ids).index_add_(0, segments.places, tokens.long()) > 0
