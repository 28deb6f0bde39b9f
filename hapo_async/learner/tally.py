"""What a learner step measured: sums on each rank, merged into metrics over all of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

import torch

from hapo_async import staleness
from hapo_async.batch import MicroBatch
from hapo_async.learner.blame import Blame, Suspects
from hapo_async.types import SUCCESS
from hapo_async.upge import Mean, TokenBatch

# Counts, reported as (count, any weight): over micro-batches and ranks they add up.
_COUNTS = frozenset({"policy/bad_logp", "train/teacher_tokens"})

# Moments of a step that ``_derive`` makes metrics of.
_HIDDEN = {"correct": "squares/correct", "incorrect": "squares/incorrect"}
_RETURNS = ("returns/count", "returns/sum", "returns/squares", "errors/sum", "errors/squares")


@dataclass(frozen=True)
class RankReport:
    """What one rank has to say of a step; ``merge`` makes metrics of all of them. means: name -> (sum, weight).
    shared: what every rank agrees on. moments: sums that are no metrics yet. blamed: groups that made the step
    impossible."""

    means: dict[str, tuple[float, float]]
    sums: dict[str, float]
    maxima: dict[str, float]
    shared: dict[str, float]
    moments: dict[str, float] = field(default_factory=dict)
    blamed: tuple[Blame, ...] = ()


class Tally:
    """Sums of a step on one rank, kept on the device until the end: reading a number early would stall a GPU."""

    def __init__(self) -> None:
        self._parts: dict[str, list[torch.Tensor]] = {}  # pairs of (sum, weight), flat
        self._maxima: dict[str, list[torch.Tensor]] = {}
        self._moments: dict[str, list[torch.Tensor]] = {}
        self._tables: list[torch.Tensor] = []
        self.suspects = Suspects()
        self.reference_bytes = 0

    def add(self, stats: Mapping[str, Mean]) -> None:
        """Adds an objective's stats."""
        for name, mean in stats.items():
            if name == staleness.MOMENTS:
                self._tables.append(mean.sum)
                continue
            self._parts.setdefault(name, []).extend(mean)

    def add_batch(self, batch: TokenBatch, micro: MicroBatch) -> None:
        """Adds what is measured for every algorithm alike. Tokens that no recorded version wrote have no age."""
        assert batch.age is not None
        policy = batch.policy
        count = policy.sum()
        versioned = policy & (micro.version_step >= 0)
        self.add({"staleness/mean": Mean(torch.where(versioned, batch.age, 0).sum(), versioned.sum())})
        self.add({"train/teacher_tokens": Mean(batch.teachers.sum(), count)})
        self._maxima.setdefault("staleness/max", []).append(torch.where(versioned, batch.age, -torch.inf).max())
        if batch.entropy is not None:
            self.add({"policy/entropy": Mean(torch.where(policy, batch.entropy.detach(), 0.0).sum(), count)})
        if batch.returns is not None and batch.value_old is not None:
            self._add_returns(batch, policy & ~torch.isnan(micro.reward[micro.sequence]))

    def _add_returns(self, batch: TokenBatch, chosen: torch.Tensor) -> None:
        assert batch.returns is not None and batch.value_old is not None
        returns = batch.returns[chosen].double()
        errors = returns - batch.value_old[chosen].double()
        sums = (chosen.sum(), returns.sum(), returns.square().sum(), errors.sum(), errors.square().sum())
        for name, value in zip(_RETURNS, sums, strict=True):
            self._moments.setdefault(name, []).append(value)

    def add_hidden_gradients(self, micro: MicroBatch, squares: torch.Tensor | None, scale: float) -> None:
        """Adds the squared gradient norms [N] of tokens of right (R = 1) and of other judged answers; ``scale`` is what
        the loss was multiplied by."""
        if squares is None or not micro.is_real:
            return
        reward = micro.reward[micro.sequence]
        right, judged = reward >= SUCCESS, ~torch.isnan(reward)
        for which, chosen in (("correct", right), ("incorrect", judged & ~right)):
            total = torch.where(chosen & ~micro.is_teacher, squares, 0.0).sum().double() / scale**2
            self._moments.setdefault(_HIDDEN[which], []).append(total)

    def report(self, sums: Mapping[str, float], maxima: Mapping[str, float], shared: Mapping[str, float]) -> RankReport:
        """Everything that was added, read from the device in one go, with the given numbers beside it."""
        flat = [x.double() for parts in self._parts.values() for x in parts]
        flat += [torch.stack(values).max().double() for values in self._maxima.values()]
        flat += [torch.stack([v.double() for v in values]).sum() for values in self._moments.values()]
        if self._tables:
            flat += torch.stack(self._tables).sum(0).flatten().unbind()
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        means = {}
        for name, parts in self._parts.items():
            pairs = [(next(numbers), next(numbers)) for _ in range(len(parts) // 2)]
            means[name] = (math.fsum(p[0] for p in pairs), math.fsum(p[1] for p in pairs))
        tops = {name: next(numbers) for name in self._maxima}
        moments = {name: next(numbers) for name in self._moments}
        moments |= {f"{staleness.MOMENTS}/{i}": number for i, number in enumerate(numbers)}
        return RankReport(means, dict(sums), {**tops, **maxima}, dict(shared), moments)


def merge(reports: Seq[RankReport]) -> dict[str, float]:
    """Metrics of a step over all ranks: weighted means, sums, maxima, and what every rank agrees on. A mean or maximum over
    nothing is left out."""
    means: dict[str, list[float]] = {}
    moments: dict[str, float] = {}
    out: dict[str, float] = dict(reports[0].shared)
    for report in reports:
        for name, (total, weight) in report.means.items():
            entry = means.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += weight
        for name, value in report.sums.items():
            out[name] = out.get(name, 0.0) + value
        for name, value in report.maxima.items():
            if value > -math.inf:
                out[name] = max(out.get(name, value), value)
        for name, value in report.moments.items():
            moments[name] = moments.get(name, 0.0) + value
    for name, (total, weight) in means.items():
        if name in _COUNTS:
            out[name] = total
        elif weight:
            out[name] = total / weight
    return out | _derive(moments)


def _derive(moments: Mapping[str, float]) -> dict[str, float]:
    out = {
        f"policy/hidden_grad_norm/{which}": math.sqrt(moments[name])
        for which, name in _HIDDEN.items()
        if moments.get(name, -1.0) >= 0
    }
    n, total, squares, errors, error_squares = (moments.get(name, 0.0) for name in _RETURNS)
    variance = squares / n - (total / n) ** 2 if n else 0.0
    if variance > 1e-12:
        out["critic/explained_variance"] = 1 - (error_squares / n - (errors / n) ** 2) / variance
    tables = [value for name, value in moments.items() if name.startswith(staleness.MOMENTS)]
    return out | staleness.metrics(tables)
