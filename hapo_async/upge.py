"""The Unified Policy Gradient Estimator (UPGE): the parts that every objective is composed of, on packed tokens.

A token's gradient is  mask * (1 / pi_ref) * A * grad pi_theta,  that is, the weight on grad l is mask * A * pi_theta /
pi_ref (seed 002, equation of the unified estimator). A *term* names its reference denominator, stabilisation mask and
weight, and turns tokens into a ``Contribution``: J per token, and a surrogate whose gradient is J's. A *reduction*
gives each token its share of the loss. ``hapo_async.algorithms`` composes terms into algorithms;
``hapo_async.staleness`` gives the weight of old tokens.

Legend: N packed tokens, K top-K, l = log pi_theta now (with gradient), lp proximal, lb behaviour log-prob.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hapo_async.types import Source

if TYPE_CHECKING:
    from hapo_async.inject import TrainGroup

Options = Mapping[str, Any]

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 (no gradient outside), so that no ratio overflows in fp32."""


# --------------------------------------------------------------------------------------------------------------------
# What travels into an objective


@dataclass(frozen=True)
class TokenBatch:
    """N packed response tokens. Only ``logp`` carries a gradient, and ``entropy`` and ``topk_logp`` where used.

    logp, logp_prox, logp_behave, logp_ref, entropy, advantage [N]: log-probs of the sampled token (None logp_prox: the
    policy is its own proximal policy); advantage of the token's sequence, spread over its tokens. topk_logp,
    topk_ref_logp [N, K]: log-probs of the reference's top-K ids under policy and reference, both at T=1; topk_keep
    [N, K]: False where the id is y_t. future_logp [N]: log-prob under FPA's extrapolated policy. mask, is_teacher [N]
    bool (None: all True, all False): trained or not, written by a teacher or by the policy. sequence, group [N] int:
    ids of the token's response and prompt, any integers (where reward or confidence are read: indices into them). age
    [N]: learner steps between the token's version and now. reward [sequences]. confidence [groups]: posterior mean of
    the gate. group_size [groups]: rollouts of the group in the *whole* mini-batch (HPT's mean over a prompt's
    rollouts).
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
    mask: Tensor | None = None
    is_teacher: Tensor | None = None
    sequence: Tensor | None = None
    group: Tensor | None = None
    age: Tensor | None = None
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


@dataclass(frozen=True)
class Normaliser:
    """Counts over the *global* batch of one optimizer update, so that losses of micro-batches and ranks add up.

    tokens: trained tokens. sequences: responses with at least one. groups: prompts with at least one. teacher_tokens,
    teacher_sequences: those of teachers among them (None: not counted, and then only a shared normaliser is possible).
    """

    tokens: int
    sequences: int
    groups: int
    teacher_tokens: int | None = None
    teacher_sequences: int | None = None

    @classmethod
    def of(cls, batch: TokenBatch) -> Normaliser:
        """The counts of a batch that is the whole mini-batch."""
        trained, teachers = batch.trained, batch.teachers
        return cls(
            tokens=int(trained.sum()),
            sequences=_distinct(batch.sequences[trained]),
            groups=_distinct(batch.groups[trained]),
            teacher_tokens=int(teachers.sum()),
            teacher_sequences=_distinct(batch.sequences[teachers]),
        )

    @classmethod
    def of_groups(cls, groups: Iterable[TrainGroup]) -> Normaliser:
        """The same counts from the driver's composed groups (``hapo_async.inject``): no token is needed for them."""
        kept = [g for g in groups if g.mask_tokens]
        rows = [row for g in kept for row in g.rows if row.length]
        teachers = [row for row in rows if row.source is Source.TEACHER]
        return cls(
            tokens=sum(row.length for row in rows),
            sequences=len(rows),
            groups=len(kept),
            teacher_tokens=sum(row.length for row in teachers),
            teacher_sequences=len(teachers),
        )

    def split(self, teacher: bool) -> tuple[int, int]:
        """(tokens, sequences) of one source alone. Raises ValueError where the teacher's were not counted."""
        if self.teacher_tokens is None or self.teacher_sequences is None:
            raise ValueError("normaliser=separate needs teacher_tokens and teacher_sequences: use Normaliser.of_groups")
        if teacher:
            return self.teacher_tokens, self.teacher_sequences
        return self.tokens - self.teacher_tokens, self.sequences - self.teacher_sequences


# --------------------------------------------------------------------------------------------------------------------
# What a term sees and gives


class Tokens(NamedTuple):
    """The tokens of one term, all [N] (top-K: [N, K]), in fp32 or fp64, made safe: unselected entries hold zeros, so
    that no NaN of theirs reaches a gradient. Only logp and topk_logp carry gradients. advantage: the UPGE advantage."""

    selected: Tensor
    logp: Tensor
    logp_prox: Tensor
    advantage: Tensor
    topk_logp: Tensor | None = None
    topk_ref_logp: Tensor | None = None
    topk_keep: Tensor | None = None


class Contribution(NamedTuple):
    """What a term makes of its tokens. value [N]: J, detached. surrogate [N]: its gradient is J's. keep [N] bool: False
    where the stabilisation mask removed the gradient. stats: what only this term can say."""

    value: Tensor
    surrogate: Tensor
    keep: Tensor
    stats: dict[str, Mean]


def select(
    batch: TokenBatch, selected: Tensor, advantage: Tensor | None, logp_prox: Tensor | None = None, topk: bool = False
) -> Tokens:
    """The tokens of ``batch`` where ``selected`` [N], safe to compute with. advantage None means 1."""
    logp = _safe(batch.logp, selected)
    return Tokens(
        selected=selected,
        logp=logp,
        logp_prox=logp.detach() if logp_prox is None else _safe(logp_prox, selected).to(logp.dtype).detach(),
        advantage=selected.to(logp.dtype) if advantage is None else _safe(advantage, selected).to(logp.dtype).detach(),
        topk_logp=batch.topk_logp if topk else None,
        topk_ref_logp=batch.topk_ref_logp if topk else None,
        topk_keep=batch.topk_keep if topk else None,
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
    gain=lambda logp, prox: (logp - logp.detach()).exp(),
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


def contribution(t: Tokens, value: Tensor, surrogate: Tensor, keep: Tensor) -> Contribution:
    """J, its surrogate and its mask of the selected tokens; zeros elsewhere."""
    return Contribution(
        value=torch.where(t.selected, value.detach(), 0.0),
        surrogate=torch.where(t.selected & keep, surrogate, 0.0),
        keep=keep | ~t.selected,
        stats={},
    )


# --------------------------------------------------------------------------------------------------------------------
# Reductions

REDUCTIONS = {
    "TM": "mean over the trained tokens of the global batch",
    "SM": "mean over sequences of the token mean",
    "SN": "mean over sequences of the token sum divided by the constant l_max",
    "SEQ": "mean over sequences of the token sum",
    "PN": "mean over prompts: the mean over a prompt's rollouts of the token sum divided by l_max, plus the token mean "
    "of its demonstration",
}


def shares(
    reduction: str, batch: TokenBatch, teacher: bool, norm: Normaliser, *, l_max: float, separate: bool = False
) -> Tensor:
    """[N]: what each token's J is multiplied by, so that the sum over the global batch is the reduced J.

    ``teacher`` picks whose tokens get a share. ``separate`` divides each source by its own counts (TM, SM, SN, SEQ).
    Sequences must be whole within ``batch``; groups need not. Raises ValueError where PN misses group_size.
    """
    tokens, sequences = norm.split(teacher) if separate else (norm.tokens, norm.sequences)
    one = torch.ones_like(wide(batch.logp.detach()))
    if reduction == "TM":
        return one / max(1, tokens)
    if reduction == "SEQ":
        return one / max(1, sequences)
    if reduction == "SN":
        return one / (l_max * max(1, sequences))
    if reduction == "SM":
        return one / (_lengths(batch) * max(1, sequences))
    assert reduction == "PN", reduction
    if teacher:
        return one / (_lengths(batch) * max(1, norm.groups))
    if batch.group_size is None or batch.group is None:
        raise ValueError(
            "a mean over prompts needs group [N] and group_size [groups]: rollouts in the whole mini-batch"
        )
    # Tokens outside the mask may carry any group id; their share is never used.
    ids = torch.where(batch.trained, batch.groups, 0)
    rollouts = batch.group_size.to(one)[ids] if len(ids) else one
    return one / (l_max * rollouts.clamp(min=1) * max(1, norm.groups))


def group_sizes(batch: TokenBatch) -> Tensor:
    """[groups]: rollouts (sequences of the policy with a trained token) by group id, for a batch that is whole."""
    pairs = torch.stack([batch.groups[batch.policy], batch.sequences[batch.policy]])
    distinct = torch.unique(pairs, dim=1)[0]
    top = int(batch.groups[batch.trained].max()) + 1 if bool(batch.trained.any()) else 1
    return torch.bincount(distinct, minlength=top)


def group_confidence(batch: TokenBatch) -> Tensor:
    """[groups]: the gate's (1+S)/(2+N) by group id, from reward [sequences] of a batch that is whole *after* injection:
    N responses, of which the teacher's took the place of a failure, so that S counts rollouts with R = 1 alone.

    Raises ValueError without reward.
    """
    if batch.reward is None:
        raise ValueError("the confidence of a group needs confidence [groups] or reward [sequences]")
    trained = batch.trained
    rows = torch.stack([batch.groups[trained], batch.sequences[trained], batch.teachers[trained].long()])
    group, sequence, is_teacher = torch.unique(rows, dim=1)
    right = (batch.reward.to(group.device)[sequence] == 1) & (is_teacher == 0)
    top = int(group.max()) + 1 if len(group) else 1
    judged = torch.bincount(group, minlength=top)
    successes = torch.bincount(group, weights=right.double(), minlength=top)
    return (1 + successes) / (2 + judged)


def _lengths(batch: TokenBatch) -> Tensor:
    """[N]: trained tokens of each token's sequence, at least 1."""
    if len(batch.logp) == 0:
        return torch.ones_like(wide(batch.logp.detach()))
    _, index = torch.unique(batch.sequences, return_inverse=True)
    count = torch.zeros_like(index).index_add_(0, index, batch.trained.long())
    return count[index].clamp(min=1).to(wide(batch.logp).dtype)


def _distinct(ids: Tensor) -> int:
    return int(torch.unique(ids).numel())
