"""An algorithm on a batch that is the whole mini-batch: what the driver would have done, then the objective."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hapo_async import advantage as advantages
from hapo_async import corrections, preference, reduction, staleness
from hapo_async.algorithms.base import Algorithm
from hapo_async.corrections import OFF, Settings
from hapo_async.objective import objective, trainable
from hapo_async.reduction import Normaliser
from hapo_async.upge import Options, Segments, TokenBatch, wide


def loss(algorithm: Algorithm, batch: TokenBatch, options: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
    """See ``hapo_async.algorithms.loss``."""
    correction, moved, options = split(algorithm, options)
    resolved = algorithm.resolve(options)
    batch, norm = prepare(algorithm, batch, resolved, correction)
    total, stats = objective(algorithm, resolved, batch, norm, correction=correction, moved=moved)
    table = stats.pop(staleness.MOMENTS, None)
    numbers = {key: mean.value for key, mean in stats.items()}
    if table is not None:
        numbers |= staleness.metrics(table.sum.flatten().tolist())
    return total, numbers | {"value": float(total.detach())}


def split(algorithm: Algorithm, options: dict[str, Any]) -> tuple[Settings, float, dict[str, Any]]:
    """(correction, moved, the algorithm's own options). Raises ValueError for a correction that there is not."""
    rest = dict(options)
    name, moved = rest.pop("correction", "off"), float(rest.pop("moved", 0.0))
    if not 0 <= moved < 1:
        raise ValueError(f"moved={moved} must be at least 0 and below 1: updates made in this step over its updates")
    # An algorithm without ratios may have an option of the same name.
    mine = [key for key in corrections.OPTIONS if key in rest and key not in algorithm.all_options]
    return corrections.resolve(name, {key: rest.pop(key) for key in mine}), moved, rest


def prepare(
    algorithm: Algorithm, batch: TokenBatch, options: Options, correction: Settings = OFF
) -> tuple[TokenBatch, Normaliser]:
    """The batch with what the driver would have added and left out, and its normaliser. options: resolved."""
    batch = trainable(algorithm, batch)
    if batch.reward is not None and (batch.advantage is None or algorithm.offline):
        batch = replace(batch, advantage=_advantages(algorithm, batch, options))
    batch = replace(batch, mask=_kept(algorithm, batch))
    if batch.confidence is None and options.get("confidence", "gate") != "gate":
        batch = replace(batch, confidence=reduction.group_confidence(batch))
    if batch.group_size is None and options["reduction"] == "PN":
        batch = replace(batch, group=batch.groups, group_size=reduction.group_sizes(batch))
    return batch, _measured(algorithm, batch, options, correction)


def _advantages(algorithm: Algorithm, batch: TokenBatch, options: Options) -> Tensor:
    """[N]: the algorithm's advantage from reward [sequences], group by group."""
    name = algorithm.advantage_for(options)
    known = {k: v for k, v in options.items() if k in advantages.options(name)}
    segments = Segments.of(batch, batch.trained)
    out = torch.zeros(len(segments.ids), dtype=torch.float64)
    group = torch.zeros_like(segments.ids)
    group[segments.places[batch.trained]] = batch.groups[batch.trained]
    rewards = torch.full((len(segments.ids),), float("nan"), dtype=torch.float64)
    assert batch.reward is not None
    present = segments.lengths > 0
    rewards[present] = batch.reward.double().cpu()[segments.ids[present].cpu()]
    if "lengths_PG" in advantages.options(name):  # over the batch, not by group
        out[present] = advantages.compute(name, rewards[present], lengths_PG=segments.lengths[present], **known)
    else:
        for prompt in torch.unique(group[present]).tolist():
            rows = present & (group == prompt)
            out[rows] = advantages.compute(name, rewards[rows], **known)
    return segments.spread(out.to(batch.logp.device, wide(batch.logp).dtype))


def _kept(algorithm: Algorithm, batch: TokenBatch) -> Tensor:
    """[N] bool: trained tokens of the rows that the algorithm keeps (``Algorithm.keep``; unpaired rows weigh nothing
    anyway)."""
    trained = batch.trained
    if algorithm.keep == "nonzero" and batch.advantage is not None:
        return trained & (batch.teachers | (batch.advantage != 0))
    if algorithm.keep in ("judged", "paired") and batch.reward is not None:
        return trained & ~torch.isnan(batch.rewards(trained))
    return trained


def _measured(algorithm: Algorithm, batch: TokenBatch, options: Options, correction: Settings) -> Normaliser:
    """The normaliser with what the algorithm and its correction measure over the mini-batch."""
    norm, requires = Normaliser.of(batch), algorithm.requires(options)
    if algorithm.keep == "paired":
        norm = replace(norm, pairs=preference.count_pairs(batch, options))
    if "log_ratio_mean" in requires:
        norm = replace(norm, log_ratio_mean=preference.log_ratio_mean(batch))
    if "entropy_threshold" in requires:
        entropy = batch.entropy if batch.entropy_prox is None else batch.entropy_prox
        if entropy is None:
            raise ValueError("quadrants need entropy [N]")
        chosen = wide(entropy.detach())[batch.policy]
        norm = replace(norm, entropy_threshold=reduction.quantile(chosen, options["quantile"]))
    if correction.kind == "moment" and algorithm.rollout.ratio != "none":
        sizes = staleness.log_ratios(batch, algorithm.rollout.ratio)
        norm = replace(norm, m2_threshold=staleness.m2_threshold(sizes, correction.tau))
    return norm
