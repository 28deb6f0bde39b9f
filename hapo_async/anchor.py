"""APO's term (seed 004): failures push their token down and pull towards the reference's other likely tokens.

Legend: N packed tokens, K top-K. S is the reference's top-K without y_t, Z the reference's mass on it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hapo_async.upge import (
    OLD,
    Contribution,
    Mean,
    Options,
    Tokens,
    clip_range,
    clipped,
    contribution,
    log_ratio,
    wide,
)

MIN_ANCHOR_MASS = 1e-4
"""APO's pull is skipped where the reference's mass Z on the anchor set is smaller: r_a is unbounded as Z -> 0."""

_NEVER = -1e4  # log-prob of an id that is not there; finite, because log-sum-exp of -inf alone has a NaN gradient


def anchored(t: Tokens, options: Options) -> Contribution:
    """APO (seed 004): where A < 0 the ratio becomes r = lam * rho - beta * r_a, whose pull is towards the reference's
    top-K other than y_t; the gradient vanishes only where r < 1 - eps. Plain clipped ratio where A >= 0.

    anchor_clip ``joint``: min(r A, clip(r) A). ``push_only``: min(lam rho A, clip(lam rho) A) - beta A r_a.
    """
    if options["beta"] == 0 and options["lam"] == 1:
        return clipped(t, options)
    failing = t.selected & (t.advantage < 0)
    anchor, usable = anchor_ratio(t, failing, options)
    ratio = OLD.gain(t.logp, t.logp_prox)
    low, high = clip_range(options)
    push, pull = options["lam"] * ratio, options["beta"] * anchor
    clip_on = push if options["anchor_clip"] == "push_only" else push - pull
    outside = pull if options["anchor_clip"] == "push_only" else torch.zeros_like(pull)
    alive = torch.where(failing, clip_on >= low, (t.advantage == 0) | (ratio <= high))
    bounded = torch.where(failing, torch.full_like(ratio.detach(), low), high)
    moving = torch.where(alive, torch.where(failing, clip_on, ratio), 0.0)
    value = t.advantage * (torch.where(alive, moving, bounded) - outside)
    # The pull outside the clip goes on where the push has stopped, so the mask is applied here.
    made = contribution(t, value, t.advantage * (moving - outside), torch.ones_like(alive))
    stats = _anchor_stats(anchor.detach(), failing, usable, alive)
    return made._replace(keep=alive | ~t.selected, stats=stats)


def anchor_ratio(t: Tokens, failing: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(r_a [N] = sum of pi_theta over S divided by Z, usable [N] bool). r_a is 0, without gradient, where the pull is
    skipped: where A >= 0, S is empty, or the reference's mass Z on S is below 1e-4."""
    if options["beta"] == 0:
        return torch.zeros_like(t.logp), torch.zeros_like(failing)
    topk_logp, topk_ref_logp, keep = t.batch.topk_logp, t.batch.topk_ref_logp, t.batch.topk_keep
    if topk_logp is None or topk_ref_logp is None:
        raise ValueError("APO needs topk_logp and topk_ref_logp [N, K] (or beta=0)")
    in_set = torch.ones_like(topk_logp, dtype=torch.bool) if keep is None else keep.bool()
    in_set = in_set & failing[:, None]
    mass = torch.where(in_set, wide(topk_ref_logp), -math.inf).exp().sum(-1)
    usable = failing & (mass >= MIN_ANCHOR_MASS)
    present = in_set & usable[:, None] & torch.isfinite(topk_logp.detach())
    if present.shape[-1] == 0:
        return torch.zeros_like(t.logp), torch.zeros_like(failing)
    log_mass = torch.logsumexp(torch.where(present, wide(topk_logp), _NEVER), -1)
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
