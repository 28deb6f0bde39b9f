"""Sequence-level terms of the offline algorithms (seed 003): likelihood ratios of whole answers, in pairs or alone.

The answers were sampled once from the reference policy; no ratio to a behaviour policy is ever formed. Every term is
the UPGE form sg(l) with a coefficient per response: J of a response is spread evenly over its tokens, so that the
reduction's sum over tokens gives it back. A > 0 marks a correct answer, A < 0 a wrong one, 0 one without a verdict.

Legend: N packed tokens, S responses; Delta = sum_t (l - lr) of a response.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hapo_async import upge
from hapo_async.reduction import match_pairs
from hapo_async.terms import Term
from hapo_async.upge import Contribution, Options, Segments, TokenBatch, Tokens, contribution

_FAR = 1e4
"""A reference log-prob of -inf gives a log-ratio this large instead of an infinite one."""


def off_rl(t: Tokens, options: Options) -> Contribution:
    """R exp(mean_t l)."""
    segments = t.segments
    weight = segments.spread(segments.mean(t.logp.detach()).exp())
    return _weighted(t, t.advantage * weight)


def fpa(t: Tokens, options: Options) -> Contribution:
    """R sg(exp(mean_t log pi^)) exp(mean_t l - sg(mean_t l)): Off-RL with the weight of the extrapolated policy pi^."""
    if options["lam"] == 0:
        return off_rl(t, options)
    segments = t.segments
    now = segments.mean(t.logp.detach()).exp()
    future = segments.mean(t.safe("future_logp", "FPA weighs by the extrapolated policy (or lam=0)").detach()).exp()
    side = {"both": t.selected, "correct": t.advantage > 0, "incorrect": t.advantage < 0}[options["apply_to"]]
    return _weighted(t, t.advantage * torch.where(side, segments.spread(future), segments.spread(now)))


def simper(t: Tokens, options: Options) -> Contribution:
    """Pairwise Off-RL: exp(mean_t l_w) - exp(mean_t l_l)."""
    segments = t.segments
    likelihood = segments.mean(t.logp.detach()).exp()
    sign = torch.zeros_like(likelihood)
    for winner, loser in _pairs(t, segments, options):
        sign[winner] += 1
        sign[loser] -= 1
    return _per_response(t, segments, sign * likelihood, sign * likelihood / _counts(segments, t))


def dpo(t: Tokens, options: Options) -> Contribution:
    """log sigma(beta (Delta_w - Delta_l)); with the option ``alpha`` (RPO) + alpha mean_t l_w."""
    segments, beta = t.segments, options["beta"]
    delta = log_ratio_sums(t, segments)
    value, coefficient, wins = (torch.zeros_like(delta) for _ in range(3))
    for winner, loser in _pairs(t, segments, options):
        margin = beta * (delta[winner] - delta[loser])
        value[winner] += logsigmoid(margin)
        slope = beta * torch.sigmoid(-margin)
        coefficient[winner] += slope
        coefficient[loser] -= slope
        wins[winner] += 1
    alpha = options.get("alpha", 0.0)
    value = value + alpha * wins * segments.mean(t.logp.detach())
    return _per_response(t, segments, value, coefficient + alpha * wins / _counts(segments, t))


def kto(t: Tokens, options: Options) -> Contribution:
    """lam_y v - lam_y with v = sigma(+-beta (Delta - z0)), z0 the mini-batch's mean Delta, detached."""
    segments, beta = t.segments, options["beta"]
    side = segments.mean(t.advantage).sign()
    baseline = options["log_ratio_mean"]
    if baseline is None:
        raise ValueError("KTO needs Normaliser.log_ratio_mean: the mini-batch's mean of sum_t (l - lr)")
    baseline = max(0.0, baseline) if options["clamp0"] else baseline
    v = torch.sigmoid(side * beta * (log_ratio_sums(t, segments) - baseline))
    scale = options["lam_correct"] * (side > 0).to(side) + options["lam_incorrect"] * (side < 0).to(side)
    return _per_response(t, segments, scale * v - scale, side * scale * beta * v * (1 - v))


def a_star_po(t: Tokens, options: Options) -> Contribution:
    """-(beta2 Delta - (r - V*))^2; the advantage is r - V*."""
    segments = t.segments
    error = options["beta2"] * log_ratio_sums(t, segments) - segments.mean(t.advantage)
    return _per_response(t, segments, -(error**2), -2 * options["beta2"] * error)


def log_ratio_sums(t: Tokens, segments: Segments) -> Tensor:
    """[S]: Delta = sum_t (l - lr), detached."""
    reference = t.safe("logp_ref", "log-probs of the sampled tokens under the reference").detach()
    return segments.sum(torch.nan_to_num(t.logp.detach() - reference, nan=0.0, posinf=_FAR, neginf=-_FAR))


def _pairs(t: Tokens, segments: Segments, options: Options) -> list[tuple[int, int]]:
    """(winner, loser) places in ``segments``, matched within each prompt in the order of sequence ids."""
    side = segments.mean(t.advantage)
    group = torch.zeros_like(segments.ids)
    group[segments.places[t.selected]] = t.batch.groups[t.selected]
    present = (segments.lengths > 0) & (side != 0)
    out = []
    for prompt in torch.unique(group[present]).tolist():
        places = (present & (group == prompt)).nonzero().squeeze(-1).tolist()
        for winner, loser in match_pairs([1.0 if side[i] > 0 else 0.0 for i in places], options["pairs"]):
            out.append((places[winner], places[loser]))
    return out


def _weighted(t: Tokens, coefficient: Tensor) -> Contribution:
    """J = coefficient per token, its gradient coefficient times that of l; for reductions that average over tokens."""
    gain = coefficient * upge.THETA.gain(t.logp, t.logp_prox)
    return contribution(t, coefficient, gain, torch.ones_like(t.selected))


def _per_response(t: Tokens, segments: Segments, value: Tensor, coefficient: Tensor) -> Contribution:
    """J [S] of whole responses, and what each of their tokens' gradients weighs [S]; for reductions that sum tokens."""
    gain = segments.spread(coefficient) * upge.THETA.gain(t.logp, t.logp_prox)
    spread = segments.spread(value / _counts(segments, t))
    return contribution(t, spread, gain, torch.ones_like(t.selected))


def _counts(segments: Segments, t: Tokens) -> Tensor:
    return segments.lengths.clamp(min=1).to(t.logp.dtype)


def _term(equation: str, weight: str, apply: Callable[[Tokens, Options], Contribution], *needs: str) -> Term:
    return Term(equation, upge.THETA.symbol, "1", weight, apply, needs=frozenset(needs))


OFF_RL = _term("R·exp(mean_t ℓ)", "sg(exp mean_t ℓ)", off_rl)
FPA = _term(
    "R·sg(exp(mean_t log π̂))·exp(mean_t ℓ − sg(mean_t ℓ)), log π̂(y) = z_y − LSE(z), z = (1+λ)h − λ·h_ref",
    "sg(exp mean_t log π̂)",
    fpa,
    "future",
)
SIMPER = _term("exp(mean_t ℓ_w) − exp(mean_t ℓ_l)", "sg(exp mean_t ℓ)/|y|", simper, "groups")
DPO = _term("log σ(β(Δ_w − Δ_l)), Δ = Σ_t(ℓ−ℓr)", "β·σ(−margin)", dpo, "ref_logp", "groups")
RPO = _term("log σ(β(Δ_w − Δ_l)) + α·mean_t ℓ_w", "β·σ(−margin); winners + α/|y_w|", dpo, "ref_logp", "groups")
KTO = _term("λ_y·σ(±β(Δ−z0)) − λ_y, z0 = mean Δ", "λ_y·β·v(1−v)", kto, "ref_logp", "log_ratio_mean")
A_STAR_PO = _term("−(β₂Δ − A)²", "−2β₂(β₂Δ − A)", a_star_po, "ref_logp")


# --------------------------------------------------------------------------------------------------------------------
# Over a whole mini-batch


def count_pairs(batch: TokenBatch, options: Options) -> int:
    """Preference pairs of a batch that is whole, from the signs of its advantages."""
    t = upge.select(batch, batch.policy, batch.advantage)
    return len(_pairs(t, t.segments, options))


def log_ratio_mean(batch: TokenBatch) -> float:
    """KTO's z0 of a batch that is whole: mean over responses of Delta; 0 without any."""
    total, count = log_ratio_total(batch)
    return total / count if count else 0.0


def log_ratio_total(batch: TokenBatch) -> tuple[float, int]:
    """(sum over responses of Delta, responses): adds up over micro-batches and ranks."""
    t = upge.select(batch, batch.policy)
    segments = t.segments
    return float(log_ratio_sums(t, segments).double().sum()), int((segments.lengths > 0).sum())
