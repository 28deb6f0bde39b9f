"""The one loss path: terms, additive terms and shares into a scalar and its statistics, for every algorithm alike."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hapo_async import diagnostics, reduction, staleness, upge
from hapo_async.corrections import OFF, Settings
from hapo_async.reduction import Normaliser
from hapo_async.upge import Contribution, Mean, Options, TokenBatch, Tokens, log_ratio

if TYPE_CHECKING:
    from hapo_async.algorithms.base import Algorithm


def objective(
    algorithm: Algorithm,
    options: Options,
    batch: TokenBatch,
    norm: Normaliser,
    *,
    correction: Settings = OFF,
    moved: float = 0.0,
) -> tuple[Tensor, dict[str, Mean]]:
    """The loss of a micro-batch, already divided by the global normaliser: losses of micro-batches and ranks add up.

    options: as ``resolve`` returns them. correction: how tokens of older policies are weighted. moved: optimizer updates
    since the step began, over the updates of a step. Sequences must be whole within ``batch``, and groups where the
    algorithm requires "groups". The loss is a scalar whose value is -J and whose gradient is the algorithm's; an empty
    batch gives 0 with a graph. stats: detached ``Mean``s named as metrics; those of the loss are sums over the mini-batch,
    and ``staleness.MOMENTS`` is a table that ``staleness.metrics`` makes numbers of.
    Raises ValueError when the batch or ``norm`` lacks what the algorithm needs.
    """
    batch = trainable(algorithm, batch)
    options = {**options, "entropy_threshold": norm.entropy_threshold, "log_ratio_mean": norm.log_ratio_mean}
    ratio = algorithm.rollout.ratio
    correction = OFF if ratio == "none" else correction
    old = staleness.weights(batch, correction, ratio, moved=moved, threshold=norm.m2_threshold)
    rollouts = upge.select(
        batch,
        batch.policy,
        _advantage(algorithm, batch) if algorithm.rollout.uses_advantage else None,
        old.weight if batch.weight is None else old.weight * batch.weight,
        old.logp_prox,
    )
    policy = algorithm.rollout.apply(rollouts, options)
    parts = [(batch.policy, False, _with_additive(rollouts, policy, options))]
    if algorithm.teacher is not None:
        uses_advantage = algorithm.teacher.uses_advantage or options.get("teacher_weight") == "advantage"
        demonstrations = upge.select(
            batch,
            batch.teachers,
            _advantage(algorithm, batch) if uses_advantage else None,
            _teacher_weight(algorithm, batch, options),
        )
        made = algorithm.teacher.apply(demonstrations, options)
        parts.append((batch.teachers, True, _with_entropy(demonstrations, made, options)))
    surrogate, values = torch.zeros((), dtype=rollouts.logp.dtype, device=batch.logp.device), []
    for _, is_teacher, part in parts:
        share = reduction.shares(
            options["reduction"],
            batch,
            is_teacher,
            norm,
            l_max=options["l_max"],
            separate=options.get("normaliser") == "separate",
        )
        surrogate = surrogate + (share * part.surrogate).sum()
        values.append(-(share * part.value).sum())
    value = sum(values, torch.zeros_like(surrogate.detach()))
    loss = value + (surrogate.detach() - surrogate)
    stats = diagnostics.of_loss(batch, norm, rollouts, parts[0][2], values) | policy.stats
    if ratio != "none" and old.stats:
        stats |= old.stats | {staleness.MOMENTS: staleness.moments(batch, old, policy.keep)}
        # A count: over the mini-batch it adds up.
        stats["policy/bad_logp"] = Mean(stats["policy/bad_logp"].sum, stats["loss/value"].weight)
    return loss, stats | diagnostics.of_tokens(batch, rollouts, norm)


def trainable(algorithm: Algorithm, batch: TokenBatch) -> TokenBatch:
    """The batch without teacher tokens where the algorithm has no term for them: no ratio is ever formed for a
    teacher."""
    if algorithm.teacher is not None or batch.is_teacher is None:
        return batch
    return replace(batch, mask=batch.trained & ~batch.is_teacher.bool(), is_teacher=None)


def _teacher_weight(algorithm: Algorithm, batch: TokenBatch, options: Options) -> Tensor | None:
    """[N]: what multiplies a teacher token's term besides the advantage: its row's weight and HAPO's factor of c."""
    how = options.get("confidence", "gate")
    if how == "gate":
        return batch.weight
    if batch.confidence is None:
        raise ValueError(f"{algorithm.name} with confidence={how!r} needs confidence [groups]")
    ids = torch.where(batch.teachers, batch.groups, 0)
    c = batch.confidence.to(batch.logp.device)[ids] if len(ids) else batch.logp.detach()
    factor = 1 - c if how == "1-c" else (1 - c / max(options["gamma"], 1e-12)).clamp(min=0)
    return factor if batch.weight is None else factor * batch.weight


def _advantage(algorithm: Algorithm, batch: TokenBatch) -> Tensor:
    if batch.advantage is None:
        raise ValueError(f"{algorithm.name} needs advantage [N]")
    return batch.advantage.detach()


# --------------------------------------------------------------------------------------------------------------------
# Additive terms


def _with_additive(t: Tokens, made: Contribution, options: Options) -> Contribution:
    """J of the rollouts with the KL to the reference, the critic's loss and the entropy bonus, where switched on."""
    made = _with_entropy(t, made, options)
    penalties = {}
    if options.get("kl_coef", 0) > 0:
        penalties["loss/kl"] = options["kl_coef"] * kl_to_reference(t, options)
    if options.get("tau", 0) > 0:
        penalties["loss/kl"] = options["tau"] * forward_kl(t, options)
    if options.get("critic") and t.batch.value is not None:
        penalties["loss/value_function"] = options["value_coef"] * value_loss(t, options)
    for name, penalty in penalties.items():
        value, count = penalty.detach(), t.selected.sum()
        made = made._replace(
            value=made.value - value,
            surrogate=made.surrogate - penalty,
            stats=made.stats | {name: Mean(value.sum(), count)},
        )
    return made


def kl_to_reference(t: Tokens, options: Options) -> Tensor:
    """[N]: estimate of KL(theta || ref) from the sampled token, with gradient, 0 where not selected.

    k3: exp(lr - l) - (lr - l) - 1. k2: (l - lr)^2 / 2, whose expected gradient is the KL's. k1: the value l - lr with
    k2's gradient (its own has expectation 0). ``kl_where=errors`` keeps it where the advantage is negative.
    """
    gap = log_ratio(t.safe("logp_ref", "the KL to the reference").detach(), t.logp)
    estimates = {"k3": gap.exp() - gap - 1, "k2": gap**2 / 2}
    if options["kl"] == "k1":
        estimates["k1"] = estimates["k2"] + (-gap - estimates["k2"]).detach()
    on = t.selected
    if options["kl_where"] == "errors":
        on = on & (t.advantage < 0)
    return torch.where(on, estimates[options["kl"]], 0.0)


def forward_kl(t: Tokens, options: Options) -> Tensor:
    """[N]: KL(ref || theta) with gradient; by ``kl_estimator`` over the whole vocabulary (full: ``ref_kl``), or from
    tokens that the reference sampled (k3: exp(l - lr) - (l - lr) - 1)."""
    if options["kl_estimator"] == "full":
        return t.safe("ref_kl", "KL(ref || theta) over the vocabulary (or kl_estimator=k3, from logp_ref)")
    gap = log_ratio(t.logp, t.safe("logp_ref", "the KL to the reference").detach())
    return torch.where(t.selected, gap.exp() - gap - 1, 0.0)


def value_loss(t: Tokens, options: Options) -> Tensor:
    """[N]: max((V - R)^2, (clip(V, V_old +- value_clip) - R)^2), with gradient to V."""
    value, returns = t.safe("value", "the critic"), t.safe("returns", "the critic's target").detach()
    old = value.detach() if t.batch.value_old is None else t.safe("value_old", "value clipping").detach()
    clipped = old + (value - old).clamp(-options["value_clip"], options["value_clip"])
    return torch.maximum((value - returns) ** 2, (clipped - returns) ** 2)


def _with_entropy(t: Tokens, made: Contribution, options: Options) -> Contribution:
    coefficient = options["entropy_coef"]
    if coefficient == 0:
        return made
    bonus = coefficient * t.safe("entropy", "the entropy bonus")
    return made._replace(value=made.value + bonus.detach(), surrogate=made.surrogate + bonus)
