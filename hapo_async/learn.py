"""The learner's step: micro-batches in lockstep, one loss path, one optimizer update per mini-batch.

The same code runs under DeepSpeed (``actors.zero``) and in a single plain process (``TorchBackend``): a *backend* owns
the module, the optimizer and the collectives, and this module owns what is computed and in which order. Per step:

    sequences of each mini-batch -> micro-batches, padded with dummies to the maximum over ranks
    proximal log-probs of the second and later mini-batches (no gradient), before the first update
    per mini-batch: forward, objective, backward per micro-batch -> clipped update, or none when anything is not finite

Losses are divided by global counts (``batch.plan_step``), so micro-batches and ranks simply add up.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import nn

from hapo_async import algorithms
from hapo_async.batch import MicroBatch, StepPlan, dummy, pack
from hapo_async.config import Config
from hapo_async.head import HeadOut
from hapo_async.objective import objective
from hapo_async.policy import PolicyModel, adamw, layout_for, schedule, split
from hapo_async.upge import Mean, Normaliser, TokenBatch

if TYPE_CHECKING:
    from hapo_async.inject import Sequence

log = logging.getLogger(__name__)


# --------------------------------------------------------------------------------------------------------------------
# Backends


@dataclass(frozen=True)
class Update:
    """The outcome of one optimizer update. grad_norm: global, before clipping; not finite when nothing was applied."""

    grad_norm: float
    applied: bool


class Backend(Protocol):
    """What a learner needs from whoever owns module and optimizer. All methods but ``forward`` are collective."""

    policy: PolicyModel
    torch_optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    world_size: int

    def forward(self, micro: MicroBatch, **wanted: Any) -> torch.Tensor:
        """The policy's forward pass."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of ``loss``, summed over ranks; ``last`` marks the update's last micro-batch."""

    def update(self) -> Update:
        """Clips, steps and clears the gradients; steps nothing, on any rank, when their global norm is not finite."""

    def agree_max(self, values: list[int]) -> list[int]:
        """Elementwise maximum over ranks."""


class TorchBackend:
    """One plain process, no DeepSpeed: for tests, for notebooks, and as the reading version of ``actors.zero``."""

    def __init__(self, policy: PolicyModel, config: Config) -> None:
        self.policy = policy
        self.torch_optimizer: torch.optim.Optimizer = adamw(policy.parameters(), config)
        self.device = next(policy.parameters()).device
        self.rank, self.world_size = 0, 1
        self._clip = config.learner.grad_clip

    def forward(self, micro: MicroBatch, **wanted: Any) -> torch.Tensor:
        return self.policy(micro, **wanted)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def update(self) -> Update:
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), self._clip))
        applied = math.isfinite(norm)
        if applied:
            self.torch_optimizer.step()
        self.torch_optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def agree_max(self, values: list[int]) -> list[int]:
        return values


class Reference(Protocol):
    """A frozen model that scores after the gate (``actors.reference``)."""

    def topk(self, micro: MicroBatch, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids, logp, keep), each [N, K]: its most likely tokens at T = 1 where the algorithm needs them, keep False
        elsewhere and where an id is the sampled token. Called by all ranks alike."""


# --------------------------------------------------------------------------------------------------------------------
# The step


@dataclass(frozen=True)
class RankReport:
    """What one rank has to say of a step; ``merge`` makes metrics of all of them. means: name -> (sum, weight)."""

    means: dict[str, tuple[float, float]]
    sums: dict[str, float]
    maxima: dict[str, float]
    shared: dict[str, float]


class Learner:
    """Runs learner steps on a backend. Holds no weights itself: module and optimizer are the backend's."""

    def __init__(self, backend: Backend, config: Config, reference: Reference | None = None) -> None:
        self.backend = backend
        self.config = config
        self.algorithm = algorithms.get(config.algorithm)
        self.options = self.algorithm.resolve(dict(config.options), config)
        self.needs = self.algorithm.requires(self.options)
        self.reference = reference
        self.schedule = schedule(backend.torch_optimizer, config)
        self._layout, _ = layout_for(backend.device.type)
        weights = next(backend.policy.parameters()).dtype
        self._dtype = torch.float64 if weights == torch.float64 else torch.float32
        if "topk" in self.needs and reference is None:
            raise ValueError(f"{config.algorithm} needs a reference model for its top-K")

    def step(self, plan: StepPlan, minis: Seq[Seq[Sequence]]) -> RankReport:
        """Trains on one step: ``minis`` are this rank's sequences of each mini-batch of ``plan``."""
        started = time.perf_counter()
        tally = Tally()
        batches = self._pack(minis, plan)
        proximal = self._proximal(batches)
        updates = []
        for index, (micros, norm) in enumerate(zip(batches, plan.normalisers, strict=True)):
            for i, micro in enumerate(micros):
                loss = self._loss(micro, plan, norm, proximal.get((index, i)), tally)
                self.backend.backward(loss, last=i == len(micros) - 1)
            update = self.backend.update()
            updates.append(update)
            lr = self.schedule.get_last_lr()[0]
            if update.applied:
                self.schedule.step()
            else:
                log.warning("update %d of step %s skipped: the loss or its gradient is not finite", index, plan.version)
        return self._report(batches, minis, updates, lr, tally, time.perf_counter() - started)

    def _pack(self, minis: Seq[Seq[Sequence]], plan: StepPlan) -> list[list[MicroBatch]]:
        """Micro-batches of every mini-batch, as many on every rank: ZeRO-3's collectives pair up or hang."""
        budget = self.config.learner.micro_batch_tokens
        batches = [
            pack([s for s in mini if len(s.tokens)], budget, self._layout, dtype=self._dtype, groups=len(groups))
            for mini, groups in zip(minis, plan.minis, strict=True)
        ]
        counts = self.backend.agree_max([max(1, len(micros)) for micros in batches])
        idle = dummy(self._dtype)
        return [
            [micro.to(self.backend.device) for micro in micros + [idle] * (count - len(micros))]
            for micros, count in zip(batches, counts, strict=True)
        ]

    def _proximal(self, batches: list[list[MicroBatch]]) -> dict[tuple[int, int], torch.Tensor]:
        """log-probs of the step's proximal policy, by (mini-batch, micro-batch), where they must be recomputed.

        The first mini-batch is trained at the proximal policy itself: its log-probs are the forward pass's own.
        """
        out: dict[tuple[int, int], torch.Tensor] = {}
        if not self._needs_proximal():
            return out
        with torch.no_grad():
            for index, micros in enumerate(batches[1:], start=1):
                for i, micro in enumerate(micros):
                    out[index, i] = self.backend.forward(micro)[:, 0]
        return out

    def _needs_proximal(self) -> bool:
        if self.config.correction == "clip":
            return False  # the behaviour policy takes its place
        return "prox" in self.needs

    def _loss(
        self, micro: MicroBatch, plan: StepPlan, norm: Normaliser, logp_prox: torch.Tensor | None, tally: Tally
    ) -> torch.Tensor:
        topk = None
        if self.reference is not None and "topk" in self.needs:
            topk = self.reference.topk(micro, int(self.options["k"]))
        bonus = "entropy" in self.needs
        columns = self.backend.forward(micro, entropy=True, entropy_grad=bonus, topk_ids=topk[0] if topk else None)
        if not micro.is_real:
            return columns.sum() * 0.0
        scores = split(columns, entropy=True, entropy_grad=bonus, topk=topk is not None)
        batch = token_batch(micro, scores, plan.version.step, logp_prox, topk)
        loss, stats = objective(
            self.algorithm, self.options, batch, norm, correction=self.config.correction, cap=self.config.staleness.cap
        )
        tally.add(stats)
        tally.add_batch(batch)
        # A loss that is not finite poisons the gradient, whose norm is agreed on by all ranks anyway: no rank steps.
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def _report(
        self,
        batches: list[list[MicroBatch]],
        minis: Seq[Seq[Sequence]],
        updates: list[Update],
        lr: float,
        tally: Tally,
        seconds: float,
    ) -> RankReport:
        micros = [m for part in batches for m in part]
        applied = [u.grad_norm for u in updates if u.applied]
        means, maxima = tally.finish()
        computed = sum(m.computed_tokens for m in micros)
        real = sum(m.real_tokens for m in micros)
        means["train/padding_frac"] = (float(computed - real), float(computed))
        shared = {
            "policy/lr": lr,
            "train/updates": float(len(applied)),
            "train/skipped": float(len(updates) - len(applied)),
            "train/micro_batches": float(len(micros)),
        }
        if applied:
            shared["policy/grad_norm"] = sum(applied) / len(applied)
        sums = {
            "train/samples": float(sum(len(mini) for mini in minis)),
            "train/tokens": float(sum(m.trained_tokens for m in micros if m.is_real)),
        }
        return RankReport(means, sums, {**maxima, "time/learn_s": seconds}, shared)

    def state(self) -> dict[str, Any]:
        """What resuming needs besides weights and optimizer: schedule and random states of this rank."""
        return {"schedule": self.schedule.state_dict(), "rng": rng_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(dict(state["schedule"]))
        for group, lr in zip(self.backend.torch_optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        set_rng_state(state["rng"])


def token_batch(
    micro: MicroBatch,
    scores: HeadOut,
    step: int,
    logp_prox: torch.Tensor | None = None,
    topk: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
) -> TokenBatch:
    """The objective's view of a scored micro-batch. Without ``logp_prox`` the policy is its own proximal policy."""
    return TokenBatch(
        logp=scores.logp,
        logp_prox=scores.logp.detach() if logp_prox is None else logp_prox,
        logp_behave=micro.logp_behave,
        entropy=scores.entropy,
        advantage=micro.advantage,
        topk_logp=scores.topk_logp,
        topk_ref_logp=topk[1] if topk else None,
        topk_keep=topk[2] if topk else None,
        mask=torch.ones_like(micro.is_teacher),
        is_teacher=micro.is_teacher,
        sequence=micro.sequence,
        group=micro.group,
        age=torch.where(micro.is_teacher, 0, step - micro.version_step),
        reward=micro.reward,
        confidence=micro.confidence,
        group_size=micro.group_size,
    )


# --------------------------------------------------------------------------------------------------------------------
# Metrics


# Counts, reported as (count, any weight): over micro-batches and ranks they add up.
_COUNTS = frozenset({"policy/bad_logp", "train/teacher_tokens"})


class Tally:
    """Sums of a step on one rank, kept on the device until the end: reading a number early would stall a GPU."""

    def __init__(self) -> None:
        self._parts: dict[str, list[torch.Tensor]] = {}  # pairs of (sum, weight), flat
        self._maxima: dict[str, list[torch.Tensor]] = {}

    def add(self, stats: Mapping[str, Mean]) -> None:
        """Adds an objective's stats."""
        for name, mean in stats.items():
            self._parts.setdefault(name, []).extend(mean)

    def add_batch(self, batch: TokenBatch) -> None:
        """Adds what is measured for every algorithm alike."""
        assert batch.age is not None
        policy = batch.policy
        count = policy.sum()
        age = torch.where(policy, batch.age, 0)
        self.add({"staleness/mean": Mean(age.sum(), count), "train/teacher_tokens": Mean(batch.teachers.sum(), count)})
        self._maxima.setdefault("staleness/max", []).append(age.max())
        if batch.entropy is not None:
            self.add({"policy/entropy": Mean(torch.where(policy, batch.entropy.detach(), 0.0).sum(), count)})

    def finish(self) -> tuple[dict[str, tuple[float, float]], dict[str, float]]:
        """(name -> (sum, weight), name -> maximum), read from the device in one go."""
        flat = [x.double() for parts in self._parts.values() for x in parts]
        flat += [torch.stack(values).max().double() for values in self._maxima.values()]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        means = {}
        for name, parts in self._parts.items():
            pairs = [(next(numbers), next(numbers)) for _ in range(len(parts) // 2)]
            means[name] = (math.fsum(p[0] for p in pairs), math.fsum(p[1] for p in pairs))
        return means, {name: next(numbers) for name in self._maxima}


def merge(reports: Seq[RankReport]) -> dict[str, float]:
    """Metrics of a step over all ranks: weighted means, sums, maxima, and what every rank agrees on."""
    means: dict[str, list[float]] = {}
    out: dict[str, float] = dict(reports[0].shared)
    for report in reports:
        for name, (total, weight) in report.means.items():
            entry = means.setdefault(name, [0.0, 0.0])
            entry[0] += total
            entry[1] += weight
        for name, value in report.sums.items():
            out[name] = out.get(name, 0.0) + value
        for name, value in report.maxima.items():
            out[name] = max(out.get(name, value), value)
    for name, (total, weight) in means.items():
        if name in _COUNTS:
            out[name] = total
        elif weight:
            out[name] = total / weight
    return out


# --------------------------------------------------------------------------------------------------------------------
# Random states and files


def rng_state() -> dict[str, Any]:
    """The random states of this process, as plain data and tensors."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys, np.int64)), *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
