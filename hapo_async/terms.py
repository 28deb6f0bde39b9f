"""Terms of the online algorithms and of their teachers: each names its UPGE parts and holds the function.

A term is what one kind of token contributes. The parts are words for ``hapo-async explain``; the function is what runs.
Sequence-level terms of the offline algorithms are in ``hapo_async.preference``, APO's in ``hapo_async.anchor``.

Legend: N packed tokens, S responses.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hapo_async import upge
from hapo_async.anchor import anchored
from hapo_async.types import SUCCESS
from hapo_async.upge import Contribution, Mean, Options, Tokens, clip_range, clipped, contribution, log_ratio

Ratio = Literal["none", "proximal", "sequence", "behaviour", "weight"]
"""How a term meets tokens of an older policy: not at all; by its ratio to the proximal policy, with an importance
weight per token or per sequence; by its ratio to the behaviour policy itself; by an importance weight alone."""


@dataclass(frozen=True)
class Term:
    """J per token in words, its UPGE parts in words, and the function.

    ratio: see ``Ratio``. uses_advantage: False where the term has a factor of its own. needs: what the learner must
    supply for it (``Algorithm.requires``).
    """

    equation: str
    reference: str
    mask: str
    weight: str
    apply: Callable[[Tokens, Options], Contribution]
    ratio: Ratio = "none"
    uses_advantage: bool = True
    needs: frozenset[str] = frozenset()


# --------------------------------------------------------------------------------------------------------------------
# Rollouts


def cispo(t: Tokens, options: Options) -> Contribution:
    """CISPO: sg(min(rho, C)) A l; the bound is on the ratio, no token's gradient is dropped."""
    gap = log_ratio(t.logp.detach(), t.logp_prox)
    bounded = gap > math.log(options["c"])
    ratio = gap.clamp(max=math.log(options["c"])).exp()
    surrogate = t.advantage * ratio * upge.THETA.gain(t.logp, t.logp_prox)
    stats = {"policy/ratio_bounded_frac": Mean((t.selected & bounded).sum(), t.selected.sum())}
    return contribution(t, t.advantage * ratio * t.logp, surrogate, torch.ones_like(t.selected), stats)


def gspo(t: Tokens, options: Options) -> Contribution:
    """GSPO: min(s A, clip(s) A) with s = exp(mean_t (l - lp)), the same for all tokens of a response."""
    segments = t.segments
    mean = segments.spread(segments.mean(torch.nan_to_num(t.logp.detach() - t.logp_prox, nan=0.0)))
    s = log_ratio(mean, torch.zeros_like(mean)).exp()
    low, high = clip_range(options)
    keep = torch.where(t.advantage > 0, s <= high, (t.advantage == 0) | (s >= low))
    value = t.advantage * torch.where(keep, s, s.clamp(low, high))
    moves = torch.where(mean.abs() <= upge.MAX_LOG_RATIO, s, 0.0)
    return contribution(t, value, t.advantage * moves * upge.THETA.gain(t.logp, t.logp_prox), keep)


def srft_rollouts(t: Tokens, options: Options) -> Contribution:
    """SRFT's own answers: own_coef e^H l where correct, -l where wrong, nothing where unjudged."""
    reward = t.batch.rewards(t.selected)
    correct = options["own_coef"] * _sequence_entropy(t).exp()
    factor = torch.where(reward >= SUCCESS, correct, torch.where(torch.isnan(reward), 0.0, -1.0))
    return contribution(t, factor * t.logp, factor * upge.THETA.gain(t.logp, t.logp_prox), torch.ones_like(t.selected))


def hindsight(t: Tokens, options: Options) -> Contribution:
    """Clipped PPO on an advantage that is redistributed within each response by token entropy; see ``redistribute``."""
    made = clipped(t._replace(advantage=redistribute(t, options)), options)
    if options["quadrants"] == 15:
        return made
    on = quadrant_mask(t, options)
    return made._replace(
        value=torch.where(on, made.value, 0.0), surrogate=torch.where(on, made.surrogate, 0.0), keep=made.keep & on
    )


def redistribute(t: Tokens, options: Options) -> Tensor:
    """[N]: the advantage by the option ``capacity``, with the capacity C_t the proximal policy's token entropy.

    weights: A w, w = (1 - kappa) + kappa C_t / mean C, bounded to [.1, 5], then brought to mean 1 per response (w = 1
    where mean C < 1e-8). entropy_advantage: A + min(alpha C_t, |A| / kappa_e). none: A.
    """
    if options["capacity"] == "none" or (options["capacity"] == "weights" and options["kappa"] == 0):
        return t.advantage
    if options["capacity"] == "entropy_advantage":
        bonus = torch.minimum(options["alpha"] * t.capacity, t.advantage.abs() / options["kappa_e"])
        return t.advantage + bonus
    segments, capacity = t.segments, t.capacity
    mean = segments.spread(segments.mean(capacity))
    flat = mean < 1e-8
    raw = (1 - options["kappa"]) + options["kappa"] * capacity / torch.where(flat, 1.0, mean)
    bounded = torch.where(t.selected, raw.clamp(0.1, 5.0), 0.0)
    weight = bounded / segments.spread(segments.mean(bounded)).clamp(min=1e-30)
    return t.advantage * torch.where(flat, 1.0, weight)


QUADRANTS = {"pos_high": 1, "pos_low": 2, "neg_high": 4, "neg_low": 8}
"""Bits of the option ``quadrants``: sign of A x entropy at or above the mini-batch's quantile."""


def quadrant_mask(t: Tokens, options: Options) -> Tensor:
    """[N] bool: tokens whose quadrant is switched on; tokens with A = 0 are in none and stay."""
    threshold = options["entropy_threshold"]
    if threshold is None:
        raise ValueError("quadrants need Normaliser.entropy_threshold: the quantile of the mini-batch's entropies")
    on = t.advantage == 0
    for name, inside in quadrants(t.advantage, t.capacity, threshold).items():
        if int(options["quadrants"]) & QUADRANTS[name]:
            on = on | inside
    return on


def quadrants(advantage: Tensor, entropy: Tensor, threshold: float | Tensor) -> dict[str, Tensor]:
    """Which tokens [N] lie in each quadrant, by name."""
    high, positive, negative = entropy >= threshold, advantage > 0, advantage < 0
    return {
        "pos_high": positive & high,
        "pos_low": positive & ~high,
        "neg_high": negative & high,
        "neg_low": negative & ~high,
    }


CLIPPED = Term(
    "min(ρA, clip(ρ, 1−ε, 1+ε)·A)",
    upge.OLD.symbol,
    "clip: 0 where ρ left [1−ε, 1+ε] in A's direction",
    "1",
    clipped,
    ratio="proximal",
)
CISPO = Term(
    "sg(min(ρ, C))·A·ℓ",
    "log_ref = sg(ℓ) − min(ℓ−ℓp, log C)",
    "1 (no token is dropped)",
    "1",
    cispo,
    ratio="behaviour",
)
GSPO = Term(
    "min(sA, clip(s, 1−ε, 1+ε_high)·A), s = exp(mean_t(ℓ−ℓp))",
    "log_ref = sg(ℓ) − log s",
    "sequence clip: 0 where s left [1−ε, 1+ε_high] in A's direction",
    "1",
    gspo,
    ratio="sequence",
)
SCORE = Term("A·ℓ", upge.THETA.symbol, "1", "1", upge.unmasked(upge.THETA), ratio="weight")
ANCHORED = Term(
    "A ≥ 0: min(ρA, clip(ρ)·A); A < 0: min(r̃A, clip(r̃)·A), r̃ = λρ − β·r_a, r_a = Σ_{k∈S} π_θ(k)/Z",
    "A ≥ 0: π_old; A < 0: two terms, λAρ − βA·r_a with r_a differentiable",
    "clip; A < 0: 0 where r̃ < 1−ε",
    "1",
    anchored,
    ratio="proximal",
    needs=frozenset({"topk"}),
)
HINDSIGHT = Term(
    "min(ρA', clip(ρ)·A'), A'_t = A·w_t, w ∝ clip((1−κ) + κ·C_t/mean C, .1, 5), C_t = sg(H_t)",
    upge.OLD.symbol,
    "clip; quadrants sign(A') × (H ≥ quantile) that are switched off",
    "1 (w redistributes A within a response, mean 1)",
    hindsight,
    ratio="proximal",
    needs=frozenset({"capacity"}),
)
SRFT_ROLLOUTS = Term(
    "correct: own_coef·e^H·ℓ; wrong: −ℓ; H = mean_t entropy, detached",
    upge.THETA.symbol,
    "1",
    "own_coef·e^H | −1",
    srft_rollouts,
    ratio="weight",
    uses_advantage=False,
)

# --------------------------------------------------------------------------------------------------------------------
# Teachers


def shaped_likelihood(t: Tokens, options: Options) -> Contribution:
    """A F(pi) by the option ``shaping``: f | logp | identity."""
    shapings = {"f": upge.shaped(options["shaping_gamma"]), "logp": upge.THETA, "identity": upge.ONE}
    return upge.unmasked(shapings[options["shaping"]])(t, options)


def scaled_likelihood(t: Tokens, options: Options) -> Contribution:
    """sft_coef l."""
    return upge.unmasked(upge.THETA)(t._replace(advantage=options["sft_coef"] * torch.ones_like(t.logp)), options)


def mixed(t: Tokens, options: Options) -> Contribution:
    """sft_coef l + off_coef A F(pi)."""
    return _sum(t, options["sft_coef"] * torch.ones_like(t.logp), options["off_coef"], options)


def srft_teacher(t: Tokens, options: Options) -> Contribution:
    """sft_coef e^-H l + A F(pi)."""
    return _sum(t, options["sft_coef"] * (-_sequence_entropy(t)).exp(), 1.0, options)


def _sum(t: Tokens, supervised: Tensor, off_policy: float, options: Options) -> Contribution:
    one = t._replace(advantage=supervised)
    sft = upge.unmasked(upge.THETA)(one, options)
    off = shaped_likelihood(t._replace(advantage=off_policy * t.advantage), options)
    return off._replace(value=sft.value + off.value, surrogate=sft.surrogate + off.surrogate)


def _sequence_entropy(t: Tokens) -> Tensor:
    """[N]: mean entropy of the token's response, detached."""
    segments = t.segments
    return segments.spread(segments.mean(t.safe("entropy", "the entropy of a response weighs it").detach()))


LIKELIHOOD = Term("ℓ", upge.THETA.symbol, "1", "1", upge.unmasked(upge.THETA), uses_advantage=False)
SCALED_LIKELIHOOD = Term("sft_coef·ℓ", upge.THETA.symbol, "1", "sft_coef", scaled_likelihood, uses_advantage=False)
SHAPED = Term(
    "F(π), F = f(π) = π/(π+γ_F) | ℓ | π",
    upge.shaped(0.1).symbol + " (f) | sg(ℓ) (logp) | 0 (identity)",
    "1",
    "1",
    shaped_likelihood,
    uses_advantage=False,
)
WEIGHED_SHAPED = Term("A·F(π)", SHAPED.reference, "1", "1", shaped_likelihood)
MIXED = Term("sft_coef·ℓ + off_coef·A·F(π)", f"two terms: {upge.THETA.symbol}; {SHAPED.reference}", "1", "1", mixed)
SRFT_TEACHER = Term(
    "sft_coef·e^{−H}·ℓ + A·F(π), H = mean_t entropy, detached",
    f"two terms: {upge.THETA.symbol}; {SHAPED.reference}",
    "1",
    "sft_coef·e^{−H} | 1",
    srft_teacher,
)
