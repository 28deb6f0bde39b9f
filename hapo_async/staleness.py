"""Old tokens: the importance weight and the proximal policy that an objective uses for them (ALGORITHMS: staleness).

Per token the loss is w * Loss(rho = pi_theta / pi_prox) with a detached weight w; ``hapo_async.corrections`` lists what w
can be. How a term meets it (``terms.Ratio``):

- proximal (clipped objectives, APO): w of lp - lb multiplies the whole term; clip puts lb in the place of lp, without w.
- sequence (GSPO): the same with the mean of lp - lb over the response in the place of each token's, always.
- weight (REINFORCE, RLOO): no ratio of its own; w is of l - lb, now, and clip is tis.
- behaviour (CISPO): the term bounds pi_theta / pi_behave itself, so w only filters: 1, or 0 where a mask on l - lb, a
  veto or M2PO says so.
- none (offline, SFT): no ratio; nothing here is called upon.

M2PO (Zheng et al., 2025) masks the tokens with the largest squared log-ratio until the mean square of the others is at
most tau. Here the log-ratio is lp - lb, measured once per update over the mini-batch of all ranks, and the kept tokens keep
w = exp(lp - lb), so that w * rho is the paper's pi_theta / pi_behave. What differs from the paper: the current policy's
movement within a step is left to the clip of Loss(rho), where the paper has no clip; and tokens count and are masked
whatever the sign of their advantage, where the paper looks only at those that the clip could reach (A > 0 and ratio > 1,
or A < 0 and ratio < 1). Tokens of equal size are kept or masked together, and where even the smallest square is above
tau, all are masked.

Legend: N packed tokens, l = log pi_theta now, lp proximal, lb behaviour log-prob. Teacher tokens have w = 1 and no ratio,
and are in none of the statistics.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hapo_async.corrections import OFF, Settings
from hapo_async.terms import Ratio
from hapo_async.upge import MAX_LOG_RATIO, Mean, Segments, TokenBatch, log_ratio, wide


class Weights(NamedTuple):
    """weight [N], detached, 1 outside the policy's tokens; logp_prox [N], detached: the denominator of the ratio. kl [N]:
    estimate (k3) of KL(behaviour || proximal), 0 where not ``usable`` [N] bool. stats."""

    weight: Tensor
    logp_prox: Tensor
    kl: Tensor
    usable: Tensor
    stats: dict[str, Mean]


class _Gaps(NamedTuple):
    """log-ratios to the behaviour policy, 0 where it is not known. prox, behave [N]: lp and lb, the latter lp where it is
    not known. proximal [N]: lp - lb. own [N]: what the weight is made of. usable [N] bool: policy tokens with a lb."""

    prox: Tensor
    behave: Tensor
    proximal: Tensor
    own: Tensor
    usable: Tensor


def weights(
    batch: TokenBatch,
    correction: Settings = OFF,
    ratio: Ratio = "proximal",
    *,
    moved: float = 0.0,
    threshold: float | None = None,
) -> Weights:
    """The weight and the proximal log-probs of each token, for a term with this kind of ``ratio``.

    moved: updates since the step began, over the updates of a step (what log-linear proximal policies need). threshold:
    M2PO's, see ``m2_threshold``. A behaviour log-prob that is not finite gives a token w = 1 and the proximal policy as
    denominator, counts as 0 in its response's sum and mean, and is counted. A proximal log-prob that is missing or not
    finite is the policy's own, detached. Raises ValueError when the correction needs what the batch lacks.
    """
    policy = batch.policy
    if batch.logp_behave is None:
        if correction.kind != "none" and bool(policy.any()):
            raise ValueError(f"correction={correction.name!r} needs logp_behave [N]")
        one = torch.ones_like(wide(batch.logp.detach()))
        return Weights(one, _proximal(batch), torch.zeros_like(one), torch.zeros_like(policy), {})
    gaps = _gaps(batch, correction, ratio, moved)
    weight, capped = _weight(batch, policy, gaps, correction, ratio, threshold)
    vetoed = _vetoed(batch, policy, gaps, correction)
    weight = torch.where(vetoed, 0.0, weight)
    bypass = correction.kind != "none" and (ratio == "behaviour" or (correction.kind == "bypass" and ratio != "weight"))
    kl = torch.where(gaps.usable, (torch.expm1(gaps.proximal) - gaps.proximal).clamp(min=0), 0.0)
    stats = _stats(batch, policy, gaps.usable, kl, weight, capped & ~vetoed, moved)
    if correction.filters:
        stats["policy/masked_frac"] = Mean((policy & (weight == 0)).sum(), policy.sum())
    if correction.veto > 0:
        stats["policy/veto_frac"] = Mean(vetoed.sum(), policy.sum())
    return Weights(weight, torch.where(policy & bypass, gaps.behave, gaps.prox), kl, gaps.usable, stats)


def _gaps(batch: TokenBatch, correction: Settings, ratio: Ratio, moved: float) -> _Gaps:
    assert batch.logp_behave is not None
    logp, behave = wide(batch.logp.detach()), batch.logp_behave.detach().to(wide(batch.logp).dtype)
    usable = batch.policy & torch.isfinite(behave)
    prox = _proximal(batch)
    if correction.prox == "loglinear":
        prox = torch.where(usable, torch.lerp(behave, logp, _alpha(batch, moved)), logp)
    behave = torch.where(usable, behave, prox)
    proximal = torch.where(usable, log_ratio(prox, behave), 0.0)
    own = proximal
    if ratio in ("weight", "behaviour"):
        own = torch.where(usable, log_ratio(logp, behave), 0.0)
    return _Gaps(prox, behave, proximal, own, usable)


def _proximal(batch: TokenBatch) -> Tensor:
    logp = wide(batch.logp.detach())
    if batch.logp_prox is None:
        return logp
    prox = batch.logp_prox.detach().to(logp.dtype)
    return torch.where(torch.isfinite(prox), prox, logp)


def _alpha(batch: TokenBatch, moved: float) -> Tensor:
    """[N]: how far from the behaviour to the current policy the proximal one lies: (v_prox - v_t) / (v_theta - v_t) =
    age / (age + moved), and 1 where both are 0."""
    if moved == 0:
        return torch.ones_like(wide(batch.logp.detach()))
    if batch.age is None:
        raise ValueError("prox=loglinear needs age [N] once the policy has moved within the step")
    age = batch.age.to(wide(batch.logp).dtype).clamp(min=0)
    return age / (age + moved)


# --------------------------------------------------------------------------------------------------------------------
# Weights


def _weight(
    batch: TokenBatch, policy: Tensor, gaps: _Gaps, correction: Settings, ratio: Ratio, threshold: float | None
) -> tuple[Tensor, Tensor]:
    """(weight [N], bool [N]: the cap bounded it), without the veto."""
    kind, none = correction.kind, torch.zeros_like(policy)
    if kind == "bypass" and ratio == "weight":
        kind = "cap"
    filters_only = ratio == "behaviour"
    if kind in ("none", "bypass") or (kind == "cap" and filters_only):
        return torch.ones_like(gaps.own), none
    level = "geometric" if ratio == "sequence" else correction.level
    gap = _at_level(batch, policy, gaps.own, level)
    raw = gap.exp()
    if kind == "cap":
        weight = torch.minimum(raw, _bounds(batch, policy, correction, level)[1])
        return torch.where(policy, weight, 1.0), policy & (weight < raw)
    if kind == "moment":
        if threshold is None:
            raise ValueError("m2po needs Normaliser.m2_threshold: a number over the whole mini-batch")
        keep = gap.abs() <= threshold
    else:
        low, high = _bounds(batch, policy, correction, level)
        keep = (raw >= low) & (raw <= high)
    kept = torch.ones_like(raw) if filters_only else raw
    return torch.where(policy, torch.where(keep, kept, 0.0), 1.0), none


def _at_level(batch: TokenBatch, policy: Tensor, gap: Tensor, level: str) -> Tensor:
    """[N]: the token's log-ratio, or its response's sum (within the range of exp) or mean, at all tokens of the
    response."""
    if level == "token":
        return gap
    segments = Segments.of(batch, policy)
    whole = segments.mean(gap) if level == "geometric" else segments.sum(gap).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(policy, segments.spread(whole), 0.0)


def _bounds(batch: TokenBatch, policy: Tensor, correction: Settings, level: str) -> tuple[Tensor, Tensor]:
    """(floor, cap), each [N], at the token's age; a response has the age of its oldest token."""
    one, floor = torch.ones_like(wide(batch.logp.detach())), correction.floor
    if correction.decay == 1:
        return floor * one, correction.cap * one
    if batch.age is None:
        raise ValueError(f"decay={correction.decay} needs age [N]: bounds shrink with it")
    age = torch.where(policy, batch.age, 0)
    if level != "token":
        segments = Segments.of(batch, policy)
        age = segments.spread(torch.zeros_like(segments.ids).scatter_reduce(0, segments.places, age.long(), "amax"))
    shrink = (correction.decay ** age.to(one.dtype)).clamp(min=1e-30)
    return floor / (floor + (1 - floor) * shrink), 1 + (correction.cap - 1) * shrink


def _vetoed(batch: TokenBatch, policy: Tensor, gaps: _Gaps, correction: Settings) -> Tensor:
    """[N] bool: policy tokens of responses that have a token whose probability ratio is below the veto."""
    if correction.veto == 0:
        return torch.zeros_like(policy)
    segments = Segments.of(batch, policy)
    broken = gaps.usable & (gaps.own < math.log(correction.veto))
    return policy & (segments.spread(segments.sum(broken.to(gaps.own.dtype))) > 0)


# --------------------------------------------------------------------------------------------------------------------
# M2PO's threshold


def log_ratios(batch: TokenBatch, ratio: Ratio) -> Tensor:
    """[n]: |log-ratio to the behaviour policy| of the policy's tokens whose behaviour log-prob is known, as M2PO takes
    them for a term with this kind of ratio."""
    if batch.logp_behave is None:
        return wide(batch.logp.detach())[:0]
    gaps = _gaps(batch, OFF, ratio, 0.0)
    level = "geometric" if ratio == "sequence" else "token"
    return _at_level(batch, batch.policy, gaps.own, level).abs()[gaps.usable]


def m2_threshold(sizes: Tensor, tau: float) -> float:
    """The largest size of a log-ratio that is kept, from all of a mini-batch's ``sizes`` [n]: as many of the smallest as
    have a mean square of at most tau. It lies between two sizes, so that rounding decides nothing; inf where all are
    kept, half the smallest where none is."""
    ordered = sizes.double().sort().values
    count = torch.arange(1, len(ordered) + 1, device=ordered.device)
    fits = ordered.square().cumsum(0) / count <= tau
    # A cut between equals would depend on their order.
    apart = torch.ones_like(fits)
    apart[:-1] = ordered[1:] - ordered[:-1] > 1e-12
    cuts = (fits & apart).nonzero()
    if not len(ordered):
        return math.inf
    if not len(cuts):
        return float(ordered[0]) / 2
    last = int(cuts[-1])
    return math.inf if last == len(ordered) - 1 else float(ordered[last] + ordered[last + 1]) / 2


# --------------------------------------------------------------------------------------------------------------------
# Statistics


def _stats(
    batch: TokenBatch, policy: Tensor, usable: Tensor, kl: Tensor, weight: Tensor, capped: Tensor, moved: float
) -> dict[str, Mean]:
    count = policy.sum()
    out = {
        "policy/mismatch_kl": Mean(kl.sum(), usable.sum()),
        "policy/weight_mean": Mean(torch.where(policy, weight, 0.0).sum(), count),
        "policy/weight_capped_frac": Mean(capped.sum(), count),
        "policy/bad_logp": Mean((policy & ~usable).sum(), torch.ones_like(count)),
    }
    if moved == 0 and batch.age is not None:
        equal = usable & (batch.age == 0)
        out["policy/mismatch_kl_equal"] = Mean(torch.where(equal, kl, 0.0).sum(), equal.sum())
    return out


BUCKETS = ("0", "1", "2", "3", "4-7", "8+")
"""Ages in learner steps that metrics are told apart by."""

MOMENTS = "staleness/moments"
"""Name of ``moments`` among an objective's statistics."""

_COLUMNS = 6


def moments(batch: TokenBatch, old: Weights, keep: Tensor) -> Mean:
    """Sums over the policy's tokens by age, which ``metrics`` makes numbers of: sum [buckets + 1, 6], the last row for
    tokens without an age. keep [N] bool: False where the term's clip removed the gradient."""
    policy = batch.policy
    rows = torch.arange(len(BUCKETS) + 1, device=policy.device)
    if batch.age is None:
        bucket = torch.full_like(policy, len(BUCKETS), dtype=torch.long)
    else:
        bucket = batch.age.clamp(0, 3) + (batch.age >= 4) + (batch.age >= 8)
    weight = torch.where(policy, old.weight, 0.0)
    columns = (policy, weight, weight.square(), policy & ~keep, old.kl, old.usable)
    chosen = ((bucket == rows[:, None]) & policy).double()
    return Mean(chosen @ torch.stack([c.double() for c in columns], -1), policy.sum())


def metrics(sums: Sequence[float]) -> dict[str, float]:
    """Of ``moments``, flat and added up over micro-batches and ranks: the effective sample size (sum w)^2 / (n sum w^2)
    over all tokens; by age it, the share of clipped tokens, the KL estimate and the share of all tokens."""
    rows = [sums[i : i + _COLUMNS] for i in range(0, len(sums), _COLUMNS)]
    total = sum(row[0] for row in rows)
    if not total:
        return {}
    out = {"policy/ess": _ess(*(sum(row[i] for row in rows) for i in range(3)))}
    for bucket, (count, weight, square, clipped, kl, usable) in zip(BUCKETS, rows, strict=False):
        if count:
            out[f"staleness/{bucket}/frac"] = count / total
            out[f"staleness/{bucket}/ess"] = _ess(count, weight, square)
            out[f"staleness/{bucket}/clip_frac"] = clipped / count
        if usable:
            out[f"staleness/{bucket}/kl"] = kl / usable
    return out


def _ess(count: float, total: float, squares: float) -> float:
    """Between 0 (all weights are 0) and 1."""
    return total**2 / (count * squares) if squares else 0.0
