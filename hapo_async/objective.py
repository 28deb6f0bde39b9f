"""The one loss path: terms, coefficients and shares into a scalar and its statistics, for every algorithm alike."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hapo_async import staleness, upge
from hapo_async.upge import Contribution, Mean, Normaliser, Options, TokenBatch, Tokens

if TYPE_CHECKING:
    from hapo_async.algorithms import Algorithm


def objective(
    algorithm: Algorithm,
    options: Options,
    batch: TokenBatch,
    norm: Normaliser,
    *,
    correction: str = "off",
    cap: float = 2.0,
) -> tuple[Tensor, dict[str, Mean]]:
    """The loss of a micro-batch, already divided by the global normaliser: losses of micro-batches and ranks add up.

    options: as ``resolve`` returns them. Sequences must be whole within ``batch``. The loss is a scalar whose value is
    -J and whose gradient is the algorithm's; an empty batch gives 0 with a graph. stats: detached ``Mean``s named as
    metrics; those of the loss are sums over the mini-batch. Raises ValueError when the batch lacks what the algorithm
    needs.
    """
    batch = trainable(algorithm, batch)
    old = staleness.weights(batch, correction if algorithm.rollout.ratio else "off", cap)
    rollouts = upge.select(
        batch,
        batch.policy,
        rollout_coefficient(algorithm, batch, old.weight),
        old.logp_prox,
        topk=algorithm.rollout.topk,
    )
    policy = algorithm.rollout.apply(rollouts, options)
    parts = [(batch.policy, False, policy)]
    if algorithm.teacher is not None:
        demonstrations = upge.select(batch, batch.teachers, teacher_coefficient(algorithm, batch, options))
        parts.append((batch.teachers, True, algorithm.teacher.apply(demonstrations, options)))
    surrogate, values = torch.zeros((), dtype=rollouts.logp.dtype, device=batch.logp.device), []
    for selected, is_teacher, part in parts:
        share = upge.shares(
            options["reduction"],
            batch,
            is_teacher,
            norm,
            l_max=options["l_max"],
            separate=options.get("normaliser") == "separate",
        )
        bonus = _entropy_bonus(batch, selected, options["entropy_coef"])
        surrogate = surrogate + (share * (part.surrogate + bonus)).sum()
        values.append(-(share * (part.value + bonus.detach())).sum())
    value = sum(values, torch.zeros_like(surrogate.detach()))
    loss = value + (surrogate.detach() - surrogate)
    stats = _stats(batch, norm, rollouts, policy, values)
    if algorithm.rollout.ratio:
        stats |= old.stats | policy.stats
        if "policy/bad_logp" in stats:  # a count: over the mini-batch it adds up
            stats["policy/bad_logp"] = Mean(stats["policy/bad_logp"].sum, stats["loss/value"].weight)
    return loss, stats


def trainable(algorithm: Algorithm, batch: TokenBatch) -> TokenBatch:
    """The batch without teacher tokens where the algorithm has no term for them: no ratio is ever formed for a
    teacher."""
    if algorithm.teacher is not None or batch.is_teacher is None:
        return batch
    return replace(batch, mask=batch.trained & ~batch.is_teacher.bool(), is_teacher=None)


def rollout_coefficient(algorithm: Algorithm, batch: TokenBatch, weight: Tensor) -> Tensor | None:
    """[N]: what multiplies a rollout token's J, A * w; None for 1. An importance weight is positive: it changes no
    mask."""
    if algorithm.advantage == "none":
        return None
    return _advantage(algorithm, batch) * weight


def teacher_coefficient(algorithm: Algorithm, batch: TokenBatch, options: Options) -> Tensor | None:
    """[N]: what multiplies a teacher token's F; None for 1."""
    out = None
    if options.get("teacher_weight") == "advantage":
        out = _advantage(algorithm, batch)
    if "sft_coef" in options:
        out = torch.full_like(batch.logp.detach(), options["sft_coef"])
    how = options.get("confidence", "gate")
    if how == "gate":
        return out
    if batch.confidence is None:
        raise ValueError(f"{algorithm.name} with confidence={how!r} needs confidence [groups]")
    ids = torch.where(batch.teachers, batch.groups, 0)
    c = batch.confidence.to(batch.logp.device)[ids] if len(ids) else batch.logp.detach()
    factor = 1 - c if how == "1-c" else (1 - c / max(options["gamma"], 1e-12)).clamp(min=0)
    return factor if out is None else out * factor


def _advantage(algorithm: Algorithm, batch: TokenBatch) -> Tensor:
    if batch.advantage is None:
        raise ValueError(f"{algorithm.name} needs advantage [N]")
    return batch.advantage.detach()


def _entropy_bonus(batch: TokenBatch, selected: Tensor, coefficient: float) -> Tensor:
    if coefficient == 0:
        return torch.zeros((), device=batch.logp.device)
    if batch.entropy is None:
        raise ValueError(f"entropy_coef={coefficient} needs entropy [N], with its gradient")
    return coefficient * torch.where(selected, upge.wide(batch.entropy), 0.0)


def _stats(
    batch: TokenBatch, norm: Normaliser, rollouts: Tokens, policy: Contribution, values: list[Tensor]
) -> dict[str, Mean]:
    """Detached means. Those of the loss weigh by this micro-batch's part of the mini-batch, so that they add up to
    it."""
    count = batch.policy.sum()
    part = batch.trained.sum().double() / max(1, norm.tokens)
    gap = upge.log_ratio(rollouts.logp.detach(), rollouts.logp_prox)
    out = {
        "loss/value": Mean(torch.stack(values).double().sum(), part),
        "loss/policy": Mean(values[0].double(), part),
        "policy/clip_frac": Mean((batch.policy & ~policy.keep).sum(), count),
        "policy/ratio_mean": Mean(torch.where(batch.policy, gap.exp(), 0.0).sum(), count),
        "policy/kl": Mean(torch.where(batch.policy, (-gap).exp() - 1 + gap, 0.0).sum(), count),
    }
    if len(values) > 1:
        out["loss/teacher"] = Mean(values[1].double(), part)
        logp = torch.where(batch.teachers, upge.wide(batch.logp.detach()), 0.0)
        out["policy/teacher_logp"] = Mean(logp.sum(), batch.teachers.sum())
    return out
