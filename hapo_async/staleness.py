"""Old tokens: the importance weight and the proximal policy that an objective uses for them (ALGORITHMS: staleness).

Per token the loss is w * Loss(rho = pi_theta / pi_prox) with a detached weight w = min(pi_prox / pi_behave, C). Terms
that clip per sequence take the geometric mean of a response as its weight; terms that form no ratio of their own
(REINFORCE) weigh by min(pi_theta / pi_behave, C); CISPO bounds pi_theta / pi_behave itself. Teacher tokens have w = 1 and
no ratio, and are in none of the statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hapo_async.terms import Ratio
from hapo_async.upge import Mean, Segments, TokenBatch, log_ratio, wide

CORRECTIONS = {
    "off": "ratio against the proximal policy, no weight",
    "clip": "ratio against the behaviour policy, no weight (it would count twice)",
    "tis": "ratio against the proximal policy, weight min(exp(lp - lb), cap)",
}


class Weights(NamedTuple):
    """weight [N], detached, 1 outside the policy's tokens; logp_prox [N], detached: the denominator of the ratio;
    stats."""

    weight: Tensor
    logp_prox: Tensor
    stats: dict[str, Mean]


def weights(batch: TokenBatch, correction: str = "off", cap: float = 2.0, ratio: Ratio = "proximal") -> Weights:
    """The weight and the proximal log-probs of each token, for a term with this kind of ``ratio``.

    A behaviour log-prob that is not finite gives w = 1 (tis) or falls back to the proximal policy (clip), and is
    counted. A proximal log-prob that is missing or not finite is the policy's own, detached. Raises ValueError for an
    unknown correction, a cap that is not positive, and when a correction needs behaviour log-probs that the batch
    lacks.
    """
    if correction not in CORRECTIONS:
        raise ValueError(f"correction={correction!r} must be one of {', '.join(CORRECTIONS)}")
    if not cap > 0:
        raise ValueError(f"cap={cap} must be positive: it bounds the importance weight")
    policy, logp = batch.policy, wide(batch.logp.detach())
    prox = logp if batch.logp_prox is None else batch.logp_prox.detach().to(logp.dtype)
    prox = torch.where(torch.isfinite(prox), prox, logp)
    if batch.logp_behave is None:
        if correction != "off" and bool(policy.any()):
            raise ValueError(f"correction={correction!r} needs logp_behave [N]")
        return Weights(torch.ones_like(prox), prox, {})
    behave = batch.logp_behave.detach().to(prox.dtype)
    usable = policy & torch.isfinite(behave)
    behave = torch.where(usable, behave, prox)
    gap = torch.where(usable, log_ratio(prox, behave), 0.0)
    raw, denominator = torch.ones_like(prox), prox
    if correction != "off" and ratio == "weight":
        raw = torch.where(usable, log_ratio(logp, behave), 0.0).exp()
    elif correction == "tis" and ratio == "sequence":
        segments = Segments.of(batch, policy)
        raw = torch.where(policy, segments.spread(segments.mean(gap)), 0.0).exp()
    elif correction == "tis" and ratio == "proximal":
        raw = gap.exp()
    elif correction != "off":  # clip, or a term that bounds its own ratio to the behaviour policy
        denominator = torch.where(policy, behave, prox)
    weight = raw.clamp(max=cap)
    return Weights(weight, denominator, _stats(policy, usable, gap, weight, weight < raw))


def effective_sample_size(weight: Tensor) -> Tensor:
    """(sum w)^2 / (n sum w^2), between 1/n and 1; 1 for no weights."""
    weight = weight.double()
    square = (weight**2).sum()
    return torch.where(square > 0, weight.sum() ** 2 / (max(1, len(weight)) * square.clamp(min=1e-300)), 1.0)


def _stats(policy: Tensor, usable: Tensor, gap: Tensor, weight: Tensor, capped: Tensor) -> dict[str, Mean]:
    """The sample size is a micro-batch's own; over several it becomes their mean, weighted by tokens."""
    count = policy.sum()
    kl = torch.where(usable, gap.exp() - 1 - gap, 0.0).sum()
    return {
        "policy/mismatch_kl": Mean(kl, usable.sum()),
        "policy/ess": Mean(effective_sample_size(weight[policy]) * count, count),
        "policy/weight_mean": Mean(torch.where(policy, weight, 0.0).sum(), count),
        "policy/weight_capped_frac": Mean(capped.sum(), count),
        "policy/bad_logp": Mean((policy & ~usable).sum(), torch.ones_like(count)),
    }
