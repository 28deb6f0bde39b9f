"""Reductions: how the J of tokens becomes one number, whatever the number of micro-batches and ranks.

A reduction gives each token its share; shares divide by counts over the *global* mini-batch (``Normaliser``), so that
losses of micro-batches and ranks add up.

Legend: N packed tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hapo_async.types import SUCCESS, Source
from hapo_async.upge import Segments, TokenBatch, wide

if TYPE_CHECKING:
    from hapo_async.sequences import TrainGroup


@dataclass(frozen=True)
class Normaliser:
    """Counts over the *global* batch of one optimizer update, so that losses of micro-batches and ranks add up.

    tokens: trained tokens. sequences: responses with at least one. groups: prompts with at least one. teacher_tokens,
    teacher_sequences: those of teachers among them (None: not counted, and then only a shared normaliser is possible).
    pairs: preference pairs. log_ratio_mean: mean over sequences of sum_t (l - lr), KTO's z0. entropy_threshold: the
    quantile of the policy tokens' entropies that parts high from low. m2_threshold: the largest log-ratio that M2PO keeps
    (``staleness.m2_threshold``). None: not measured.
    """

    tokens: int
    sequences: int
    groups: int
    teacher_tokens: int | None = None
    teacher_sequences: int | None = None
    pairs: int | None = None
    log_ratio_mean: float | None = None
    entropy_threshold: float | None = None
    m2_threshold: float | None = None

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
    def of_groups(cls, groups: Iterable[TrainGroup], pairs: str | None = None) -> Normaliser:
        """The same counts from the driver's composed groups (``hapo_async.inject``): no token is needed for them.

        pairs: how winners and losers meet (``match_pairs``), where pairs are to be counted.
        """
        kept = [g for g in groups if g.mask_tokens]
        rows = [row for g in kept for row in g.rows if row.length]
        teachers = [row for row in rows if row.source is Source.TEACHER]
        return cls(
            tokens=sum(row.length for row in rows),
            sequences=len(rows),
            groups=len(kept),
            teacher_tokens=sum(row.length for row in teachers),
            teacher_sequences=len(teachers),
            pairs=None if pairs is None else sum(len(match_pairs([r.reward for r in g.rows], pairs)) for g in kept),
        )

    def split(self, teacher: bool) -> tuple[int, int]:
        """(tokens, sequences) of one source alone. Raises ValueError where the teacher's were not counted."""
        if self.teacher_tokens is None or self.teacher_sequences is None:
            raise ValueError("normaliser=separate needs teacher_tokens and teacher_sequences: use Normaliser.of_groups")
        if teacher:
            return self.teacher_tokens, self.teacher_sequences
        return self.tokens - self.teacher_tokens, self.sequences - self.teacher_sequences


# --------------------------------------------------------------------------------------------------------------------
# Shares

REDUCTIONS = {
    "TM": "mean over the trained tokens of the global batch",
    "SM": "mean over sequences of the token mean",
    "SN": "mean over sequences of the token sum divided by the constant l_max",
    "SEQ": "mean over sequences of the token sum",
    "PN": "mean over prompts: the mean over a prompt's rollouts of the token sum divided by l_max, plus the token mean "
    "of its demonstration",
    "PAIRS": "sum over the sequences of a pair, mean over pairs",
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
    if reduction == "PAIRS":
        if norm.pairs is None:
            raise ValueError("a mean over pairs needs Normaliser.pairs: use Normaliser.of_groups(groups, pairs=...)")
        return one / max(1, norm.pairs)
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
    right = (batch.reward.to(group.device)[sequence] >= SUCCESS) & (is_teacher == 0)
    top = int(group.max()) + 1 if len(group) else 1
    judged = torch.bincount(group, minlength=top)
    successes = torch.bincount(group, weights=right.double(), minlength=top)
    return (1 + successes) / (2 + judged)


def match_pairs(rewards: Sequence[float], how: str) -> list[tuple[int, int]]:
    """(winner, loser) indices within a group: R = 1 wins against any other judged answer; NaN takes no part.

    how: ``zip`` pairs them in order until one side runs out, ``all`` pairs each with each, ``one`` the first of both.
    """
    winners = [i for i, r in enumerate(rewards) if r >= SUCCESS]
    losers = [i for i, r in enumerate(rewards) if r < SUCCESS]
    if how == "all":
        return [(w, l) for w in winners for l in losers]  # noqa: E741
    pairs = list(zip(winners, losers, strict=False))
    assert how in ("zip", "one"), how
    return pairs[:1] if how == "one" else pairs


def _lengths(batch: TokenBatch) -> Tensor:
    """[N]: trained tokens of each token's sequence, at least 1."""
    segments = Segments.of(batch, batch.trained)
    return segments.spread(segments.lengths).clamp(min=1).to(wide(batch.logp).dtype)


def _distinct(ids: Tensor) -> int:
    return int(torch.unique(ids).numel())


def quantile(values: Tensor, q: float) -> float:
    """The q-quantile of values [n], interpolated linearly between neighbours; 0 for none."""
    if not len(values):
        return 0.0
    ordered = values.double().sort().values
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return float(ordered[low] + (place - low) * (ordered[high] - ordered[low]))
