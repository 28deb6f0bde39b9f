"""The Unified Policy Gradient Estimator (UPGE): the parts that every objective is composed of, on packed tokens.

A token's gradient is  mask * (1 / pi_ref) * A * grad pi_theta,  that is, the weight on grad l is mask * A * pi_theta /
pi_ref (seed 002, equation of the unified estimator). A *term* names its reference denominator, stabilisation mask and
weight, and turns tokens into a ``Contribution``: J per token, and a surrogate whose gradient is J's. A *reduction*
(``hapo_async.reduction``) gives each token its share of the loss. ``hapo_async.algorithms`` composes terms into
algorithms; ``hapo_async.staleness`` gives the weight of old tokens.

Legend: N packed tokens, K top-K, l = log pi_theta now (with gradient), lp proximal, lb behaviour log-prob.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Options = Mapping[str, Any]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 (no gradient outside), so that no ratio overflows in fp32."""


# --------------------------------------------------------------------------------------------------------------------
# What travels into an objective


@dataclass(frozen=True)
class TokenBatch:
    """N packed response tokens. Only ``logp`` carries a gradient, and entropy, topk_logp, ref_kl and value where used.

    logp, logp_prox, logp_behave, logp_ref, entropy, advantage [N]: log-probs of the sampled token (None logp_prox: the
    policy is its own proximal policy); advantage of the token's sequence, spread over its tokens. topk_logp,
    topk_ref_logp [N, K]: log-probs of the reference's top-K ids under policy and reference, both at T=1; topk_keep
    [N, K]: False where the id is y_t. future_logp [N]: log-prob under FPA's extrapolated policy. ref_kl [N]: KL(ref |
    theta) over the whole vocabulary. mask, is_teacher [N] bool (None: all True, all False): trained or not, written by
    a teacher or by the policy. sequence, group [N] int: ids of the token's response and prompt, any integers (where
    reward or confidence are read: indices into them). age [N]: learner steps between the token's version and now.
    weight [N]: learner-side weight of the token's row (None: 1). entropy_prox [N]: entropy of the proximal policy
    (None: the policy's own). value, value_old, returns [N]: the critic's value now (with gradient) and before the
    step, and its target. reward [sequences]: NaN where unjudged. confidence [groups]: posterior mean of the gate.
    group_size [groups]: rollouts of the group in the *whole* mini-batch (HPT's mean over a prompt's rollouts).
    """

    logp: Tensor
    logp_prox: Tensor | None = None
    logp_behave: Tensor | None = None
    logp_ref: Tensor | None = None
    entropy: Tensor | None = None
    advantage: Tensor | None = None
    topk_logp: Tensor | None = None
    topk_ref_logp: Tensor | None = None
    topk_keep: Tensor | None = None
    future_logp: Tensor | None = None
    ref_kl: Tensor | None = None
    mask: Tensor | None = None
    is_teacher: Tensor | None = None
    sequence: Tensor | None = None
    group: Tensor | None = None
    age: Tensor | None = None
    weight: Tensor | None = None
    entropy_prox: Tensor | None = None
    value: Tensor | None = None
    value_old: Tensor | None = None
    returns: Tensor | None = None
    reward: Tensor | None = None
    confidence: Tensor | None = None
    group_size: Tensor | None = None

    @property
    def trained(self) -> Tensor:
        """bool [N]: the mask, all True where none is given."""
        return torch.ones_like(self.logp, dtype=torch.bool) if self.mask is None else self.mask.bool()

    @property
    def teachers(self) -> Tensor:
        """bool [N]: trained tokens of a teacher."""
        if self.is_teacher is None:
            return torch.zeros_like(self.logp, dtype=torch.bool)
        return self.is_teacher.bool() & self.trained

    @property
    def policy(self) -> Tensor:
        """bool [N]: trained tokens of the policy."""
        return self.trained & ~self.teachers

    @property
    def sequences(self) -> Tensor:
        """int [N]: ids of responses; one response where none is given."""
        return torch.zeros_like(self.logp, dtype=torch.long) if self.sequence is None else self.sequence.long()

    @property
    def groups(self) -> Tensor:
        """int [N]: ids of prompts; one prompt where none is given."""
        return torch.zeros_like(self.logp, dtype=torch.long) if self.group is None else self.group.long()

    def rewards(self, selected: Tensor) -> Tensor:
        """[N]: reward of each token's sequence; NaN where unjudged or not ``selected`` [N]. Raises ValueError without
        reward."""
        if self.reward is None:
            raise ValueError("reward [sequences] is needed: it tells correct answers from wrong ones")
        if not len(self.logp):
            return wide(self.logp.detach())
        ids = torch.where(selected, self.sequences, 0)
        return torch.where(selected, self.reward.to(wide(self.logp.detach()))[ids], math.nan)


class Mean(NamedTuple):
    """A weighted mean in two parts that add up over micro-batches, mini-batches and ranks. Detached scalars."""

    sum: Tensor
    weight: Tensor

    def __add__(self, other: object) -> Mean:
        assert isinstance(other, Mean)
        return Mean(self.sum + other.sum, self.weight + other.weight)

    @property
    def value(self) -> float:
        """The mean; 0 where nothing was counted."""
        weight = float(self.weight)
        return float(self.sum) / weight if weight else 0.0


# --------------------------------------------------------------------------------------------------------------------
# What a term sees and gives


class Segments(NamedTuple):
    """The responses among N tokens. ids [S]: sequence ids, ascending. places [N]: each token's place in ids. lengths
    [S]: selected tokens."""

    ids: Tensor
    places: Tensor
    lengths: Tensor

    @classmethod
    def of(cls, batch: TokenBatch, selected: Tensor) -> Segments:
        """Responses with tokens that are not ``selected`` [N] bool are there too, with a smaller count."""
        ids, index = torch.unique(batch.sequences, return_inverse=True)
        return cls(ids, index, torch.zeros_like(ids).index_add_(0, index, selected.long()))

    def sum(self, x: Tensor) -> Tensor:
        """[N], 0 where not selected -> [S]"""
        return torch.zeros(len(self.ids), dtype=x.dtype, device=x.device).index_add(0, self.places, x)

    def mean(self, x: Tensor) -> Tensor:
        """[N], 0 where not selected -> [S]: mean over the selected tokens; 0 where there is none."""
        return self.sum(x) / self.lengths.clamp(min=1).to(x.dtype)

    def spread(self, x: Tensor) -> Tensor:
        """[S] -> [N]"""
        return x[self.places]


class Tokens(NamedTuple):
    """The tokens of one term, all [N], in fp32 or fp64, made safe: unselected entries hold zeros, so that no NaN of
    theirs reaches a gradient. Only logp carries a gradient. advantage: 1 where the term has none. weight: importance,
    row and confidence weights; ``contribution`` applies them. batch: everything else; ``safe`` reads from it."""

    selected: Tensor
    logp: Tensor
    logp_prox: Tensor
    advantage: Tensor
    weight: Tensor
    batch: TokenBatch

    def safe(self, name: str, why: str) -> Tensor:
        """A field of the batch [N] in logp's dtype, 0 where not selected. Raises ValueError, saying ``why``, when
        missing."""
        value = getattr(self.batch, name)
        if value is None:
            raise ValueError(f"{name} [N] is needed: {why}")
        return torch.where(self.selected, wide(value), 0.0).to(self.logp.dtype)

    @property
    def segments(self) -> Segments:
        """The responses, counting selected tokens."""
        return Segments.of(self.batch, self.selected)

    @property
    def capacity(self) -> Tensor:
        """[N]: entropy of the proximal policy, detached."""
        name = "entropy" if self.batch.entropy_prox is None else "entropy_prox"
        return self.safe(name, "token entropies").detach()


class Contribution(NamedTuple):
    """What a term makes of its tokens. value [N]: J, detached. surrogate [N]: its gradient is J's. keep [N] bool: False
    where the stabilisation mask removed the gradient. stats: what only this term can say."""

    value: Tensor
    surrogate: Tensor
    keep: Tensor
    stats: dict[str, Mean]


def select(
    batch: TokenBatch,
    selected: Tensor,
    advantage: Tensor | None = None,
    weight: Tensor | None = None,
    logp_prox: Tensor | None = None,
) -> Tokens:
    """The tokens of ``batch`` where ``selected`` [N], safe to compute with. advantage, weight None mean 1."""
    logp = _safe(batch.logp, selected)
    one = selected.to(logp.dtype)
    return Tokens(
        selected=selected,
        logp=logp,
        logp_prox=logp.detach() if logp_prox is None else _safe(logp_prox, selected).to(logp.dtype).detach(),
        advantage=one if advantage is None else _safe(advantage, selected).to(logp.dtype).detach(),
        weight=one if weight is None else _safe(weight, selected).to(logp.dtype).detach(),
        batch=batch,
    )


def _safe(x: Tensor, selected: Tensor) -> Tensor:
    """where() before any exp: multiplying by a mask afterwards does not stop NaN gradients."""
    return torch.where(selected, wide(x), 0.0)


def wide(x: Tensor) -> Tensor:
    """fp64 stays fp64, everything else is computed in fp32."""
    return x if x.dtype == torch.float64 else x.float()


def log_ratio(logp: Tensor, reference: Tensor) -> Tensor:
    """l - l_ref in +-20, with no gradient outside; 0 where it is not a number (-inf against -inf)."""
    difference = logp - reference
    difference = torch.where(torch.isnan(difference), 0.0, difference)
    return difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


# --------------------------------------------------------------------------------------------------------------------
# Reference denominators


class Reference(NamedTuple):
    """A reference denominator pi_ref. gain [N]: pi_theta / pi_ref = exp(l - log_ref) with log_ref detached, the weight
    on grad l. primitive [N]: J / A, the function of l whose derivative the gain is."""

    symbol: str
    gain: Callable[[Tensor, Tensor], Tensor]
    primitive: Callable[[Tensor, Tensor], Tensor]


OLD = Reference(
    "π_old: log_ref = ℓp",
    gain=lambda logp, prox: log_ratio(logp, prox).exp(),
    primitive=lambda logp, prox: log_ratio(logp, prox).exp(),
)
THETA = Reference(
    "π_θ: log_ref = sg(ℓ)",
    gain=lambda logp, prox: log_ratio(logp, logp.detach()).exp(),
    primitive=lambda logp, prox: logp,
)
ONE = Reference(
    "1: log_ref = 0",
    gain=lambda logp, prox: logp.exp(),
    primitive=lambda logp, prox: logp.exp(),
)


def shaped(gamma: float) -> Reference:
    """LUFFY's f(pi) = pi / (pi + gamma): the gain gamma pi / (pi + gamma)^2 peaks at .25, at pi = gamma (seed 002)."""
    log_gamma = math.log(gamma)

    def gain(logp: Tensor, prox: Tensor) -> Tensor:
        log_sum = torch.logaddexp(logp.detach(), torch.full_like(logp, log_gamma))
        return (logp - (2 * log_sum - log_gamma)).exp()

    return Reference("(π+γ)²/γ: log_ref = 2·log(π+γ) − log γ", gain, lambda logp, prox: torch.sigmoid(logp - log_gamma))


# --------------------------------------------------------------------------------------------------------------------
# Terms


def unmasked(reference: Reference) -> Callable[[Tokens, Options], Contribution]:
    """J = A * primitive(l), no token is masked."""

    def term(t: Tokens, options: Options) -> Contribution:
        gain = reference.gain(t.logp, t.logp_prox)
        value = t.advantage * reference.primitive(t.logp, t.logp_prox)
        return contribution(t, value, t.advantage * gain, t.selected)

    return term


def clipped(t: Tokens, options: Options) -> Contribution:
    """PPO's J = min(rho A, clip(rho, 1 - eps, 1 + eps_high) A); A * rho where the option ``clip`` is off."""
    ratio = OLD.gain(t.logp, t.logp_prox)
    low, high = clip_range(options)
    bounded = ratio.detach().clamp(low, high)
    keep = torch.where(t.advantage > 0, ratio <= high, (t.advantage == 0) | (ratio >= low))
    return contribution(t, t.advantage * torch.where(keep, ratio, bounded), t.advantage * ratio, keep)


def clip_range(options: Options) -> tuple[float, float]:
    """(1 - eps, 1 + eps_high), without bounds where clipping is off."""
    if not options.get("clip", True):
        return -math.inf, math.inf
    eps = options["eps"]
    high = options.get("eps_high")
    return 1.0 - eps, 1.0 + (eps if high is None else high)


def contribution(
    t: Tokens, value: Tensor, surrogate: Tensor, keep: Tensor, stats: dict[str, Mean] | None = None
) -> Contribution:
    """Weighted J, its surrogate and its mask of the selected tokens; zeros elsewhere."""
    return Contribution(
        value=torch.where(t.selected, t.weight * value.detach(), 0.0),
        surrogate=torch.where(t.selected & keep, t.weight * surrogate, 0.0),
        keep=keep | ~t.selected,
        stats=stats or {},
    )
