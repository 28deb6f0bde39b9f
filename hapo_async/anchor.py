"""APO's term (seed 004): failures push their token down and pull towards the reference's other likely tokens.

Legend: N packed tokens, K top-K. S is the reference's top-K without y_t, Z the reference's mass on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hapo_async.upge import OLD, Contribution, Mean, Options, Tokens, clip_range, clipped, log_ratio, wide

MIN_ANCHOR_MASS = 1e-4
"""APO's pull is skipped where the reference's mass Z on the anchor set is smaller: r_a is unbounded as Z -> 0."""

_NEVER = -1e4  # log-prob of an id that is not there; finite, because log-sum-exp of -inf alone has a NaN gradient


def anchored(t: Tokens, options: Options) -> Contribution:
    """APO (seed 004): where A < 0 the ratio becomes r = lam * rho - beta * r_a, whose pull is towards the reference's
    top-K other than y_t; the gradient vanishes only where r < 1 - eps. Plain clipped ratio where A >= 0.

    anchor_clip ``joint``: min(r A, clip(r) A). ``push_only``: min(lam rho A, clip(lam rho) A) - beta A r_a.
    """
    plain = clipped(t, options)
    failing = t.selected & (t.advantage < 0)
    if options["beta"] == 0 and options["lam"] == 1:
        return plain
    anchor, usable = anchor_ratio(t, failing, options)
    low, _ = clip_range(options)
    push = options["lam"] * OLD.gain(t.logp, t.logp_prox)
    pull = options["beta"] * anchor
    clip_on = push if options["anchor_clip"] == "push_only" else push - pull
    keep = clip_on >= low
    kept = torch.where(keep, clip_on, 0.0)
    at_bound = torch.where(keep, clip_on, low).detach()
    outside = pull if options["anchor_clip"] == "push_only" else torch.zeros_like(pull)
    value = torch.where(failing, t.advantage * (at_bound - outside), plain.value)
    surrogate = torch.where(failing, t.advantage * (kept - outside), plain.surrogate)
    alive = torch.where(failing, keep, plain.keep)
    return Contribution(value.detach(), surrogate, alive, _anchor_stats(anchor.detach(), failing, usable, keep))


def anchor_ratio(t: Tokens, failing: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(r_a [N] = sum of pi_theta over S divided by Z, usable [N] bool). r_a is 0, without gradient, where the pull is
    skipped: where A >= 0, S is empty, or the reference's mass Z on S is below 1e-4."""
    if options["beta"] == 0:
        return torch.zeros_like(t.logp), torch.zeros_like(failing)
    if t.topk_logp is None or t.topk_ref_logp is None:
        raise ValueError("APO needs topk_logp and topk_ref_logp [N, K] (or beta=0)")
    in_set = torch.ones_like(t.topk_logp, dtype=torch.bool) if t.topk_keep is None else t.topk_keep.bool()
    in_set = in_set & failing[:, None]
    mass = torch.where(in_set, wide(t.topk_ref_logp), -math.inf).exp().sum(-1)
    usable = failing & (mass >= MIN_ANCHOR_MASS)
    present = in_set & usable[:, None] & torch.isfinite(t.topk_logp.detach())
    if present.shape[-1] == 0:
        return torch.zeros_like(t.logp), torch.zeros_like(failing)
    log_mass = torch.logsumexp(torch.where(present, wide(t.topk_logp), _NEVER), -1)
    log_r = log_ratio(log_mass, torch.where(usable, mass, 1.0).log().detach())
    anchor = torch.where(usable, log_r.to(t.logp.dtype).exp(), 0.0)
    limit = options.get("r_anchor_max")
    return (anchor if limit is None else anchor.clamp(max=limit)), usable


def _anchor_stats(anchor: Tensor, failing: Tensor, usable: Tensor, keep: Tensor) -> dict[str, Mean]:
    """The 95th percentile is a micro-batch's own; over several it becomes their mean, weighted by tokens."""
    count, used = failing.sum(), usable.sum()
    ratios = anchor[usable].double()
    p95 = ratios.sort().values[(95 * (len(ratios) - 1)) // 100] if len(ratios) else ratios.sum()
    return {
        "apo/dead_frac": Mean((failing & ~keep).sum(), count),
        "apo/skipped_frac": Mean((failing & ~usable).sum(), count),
        "apo/r_anchor_mean": Mean(ratios.sum(), used),
        "apo/r_anchor_p95": Mean(p95 * used, used),
    }
