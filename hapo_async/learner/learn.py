"""The learner's step: micro-batches in lockstep, one loss path, one optimizer update per mini-batch.

The same code runs under DeepSpeed (``actors.zero``) and in a single plain process (``backend.TorchBackend``): a
*backend* owns the module, the optimizer and the collectives, and this module owns what is computed and in which order.
Per step:

    sequences of each mini-batch -> micro-batches, padded with dummies to the maximum over ranks
    scores under the policy that the step starts from, where something is compared with them (``hapo_async.learner.prepass``)
    per mini-batch: forward, objective, backward per micro-batch -> clipped update, or none when anything is not finite

Losses are divided by global counts (``batch.plan_step``), so micro-batches and ranks simply add up.
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hapo_async import algorithms
from hapo_async.batch import MicroBatch, StepPlan, dummy, pack, trained_positions
from hapo_async.config import Config
from hapo_async.errors import ConfigError
from hapo_async.learner import perf, prepass
from hapo_async.learner.backend import Anchors, Backend, Reference, Update, nbytes
from hapo_async.learner.blame import Blame, unsound
from hapo_async.learner.policy import Scores, layout_for, schedule, split
from hapo_async.learner.prepass import Before
from hapo_async.learner.tally import RankReport, Tally
from hapo_async.objective import objective
from hapo_async.reduction import Normaliser
from hapo_async.upge import TokenBatch

if TYPE_CHECKING:
    from hapo_async.sequences import Sequence

log = logging.getLogger(__name__)

REFERENCE_NEEDS = frozenset({"topk", "ref_kl", "future"})
"""What only a loaded reference can give; log-probs of sampled tokens (``ref_logp``) may also be cached."""


def needs_of(config: Config) -> frozenset[str]:
    """What the algorithm of ``config`` needs: ``Algorithm.requires``, and "reference" where it must be loaded. Cached
    answers of offline algorithms carry the reference's log-probs with them."""
    algorithm = algorithms.get(config.algorithm)
    needs = algorithm.requires(algorithm.resolve(dict(config.options), config))
    loaded = needs & REFERENCE_NEEDS or ("ref_logp" in needs and not algorithm.offline)
    return needs | {"reference"} if loaded else needs


def check_needs(config: Config, with_reference: bool, with_value: bool) -> None:
    """Raises ConfigError when a learner that was started without a reference or critic cannot run ``config``."""
    needs = needs_of(config)
    for name, present, what in (("reference", with_reference, "a reference model"), ("value", with_value, "a critic")):
        if name in needs and not present:
            raise ConfigError(
                f"algorithm={config.algorithm!r} needs {what}, and this learner was started without one. Start it with "
                f"this algorithm, or with needs={{'{name}'}}."
            )


class Learner:
    """Runs learner steps on a backend. Holds no weights itself: module and optimizer are the backend's."""

    def __init__(self, backend: Backend, config: Config, reference: Reference | None = None) -> None:
        self.backend = backend
        self.reference = reference
        weights = next(backend.policy.parameters()).dtype
        self._layout, _ = layout_for(backend.device.type, weights)
        self._dtype = torch.float64 if weights == torch.float64 else torch.float32
        self._set(config)
        self.schedule = schedule(backend.torch_optimizer, config)

    def configure(self, config: Config) -> None:
        """Another algorithm, other options, another optimizer setting and schedule on the same weights. Raises
        ConfigError for what the learner was not started with."""
        self._set(config)
        self.backend.configure(config)
        self.schedule = schedule(self.backend.torch_optimizer, config)

    def _set(self, config: Config) -> None:
        check_needs(config, self.reference is not None, self._with_value)
        self.config = config
        self.algorithm = algorithms.get(config.algorithm)
        self.options = self.algorithm.resolve(dict(config.options), config)
        self.needs = self.algorithm.requires(self.options)
        self.correction = config.correction

    @property
    def _with_value(self) -> bool:
        return self.backend.policy.value_head is not None

    # ---------------------------------------------------------------- what the driver asks for

    def step(self, plan: StepPlan, minis: Seq[Seq[Sequence]], lost: Seq[Blame] = ()) -> RankReport:
        """Trains on one step: ``minis`` are this rank's sequences of each mini-batch of ``plan``, without those of ``lost``
        groups. Where a group of any rank is lost or unsound, no rank computes anything."""
        started = time.perf_counter()
        vocabulary = self.backend.policy.model.config.get_text_config().vocab_size
        blamed = [*lost, *unsound(plan, minis, vocabulary)]
        if self.backend.agree_max([len(blamed)])[0]:
            return RankReport({}, {}, {}, {"train/updates": 0.0, "train/skipped": 1.0}, blamed=tuple(blamed))
        tally = Tally()
        updates: list[Update] = []
        micros: list[MicroBatch] = []
        for index, part in enumerate(self._mini_batches(plan, minis, tally)):
            tally.suspects.mini = index
            for i, (micro, before) in enumerate(zip(part.micros, part.before, strict=True)):
                moved = sum(u.applied for u in updates) / len(plan.minis)
                loss = self._loss(micro, plan.version.step, part.norm, before, tally, moved)
                self.backend.backward(loss, last=i == len(part.micros) - 1)
                tally.add_hidden_gradients(micro, self.backend.policy.hidden_grad_squares, self.backend.loss_scale)
            micros += part.micros
            update = self.backend.update(self.options.get("skip_grad_norm"))
            updates.append(update)
            lr = self.schedule.get_last_lr()[0]
            if update.applied:
                self.schedule.step()
            else:
                why = f"its gradient norm is {update.grad_norm:.4g}" if update.over_bound else "not finite"
                log.warning("update %d of step %s skipped: %s", index, plan.version, why)
        report = self._report(micros, minis, updates, lr, tally, time.perf_counter() - started)
        if all(u.applied or u.over_bound for u in updates):
            return report
        return replace(report, blamed=tuple(tally.suspects.blame(plan)))

    @torch.no_grad()
    def holdout(self, plan: StepPlan, minis: Seq[Seq[Sequence]]) -> RankReport:
        """The objective on held-out groups, without gradient: ``loss/value`` is -J."""
        tally = Tally()
        for part in self._mini_batches(plan, minis, tally):
            for micro, before in zip(part.micros, part.before, strict=True):
                self._loss(micro, plan.version.step, part.norm, before, tally)
        return tally.report({}, {}, {})

    @torch.no_grad()
    def score(self, sequences: Seq[Sequence]) -> list[np.ndarray]:
        """float32 [T] per sequence, in their order: log-probs of its trained tokens at temperature 1 under the weights
        as they are, NaN for tokens that are not trained. All ranks call it alike, with different sequences."""
        out = [np.full(len(s.tokens), np.nan, np.float32) for s in sequences]
        chosen = [i for i, s in enumerate(sequences) if len(trained_positions(s.sources))]
        # One group each: a packer only asks for groups that stay together.
        alone = [replace(sequences[i], group=n) for n, i in enumerate(chosen)]
        for micro in self._in_lockstep([self._packed(alone, len(alone))])[0]:
            cold = replace(micro, temperature=torch.ones_like(micro.temperature))
            logp = prepass.score(self.backend, cold).logp.float().cpu().numpy()
            if micro.is_real:
                where = micro.sequence.cpu().numpy()
                for n in micro.sequence_ids:
                    s = sequences[chosen[n]]
                    out[chosen[n]][trained_positions(s.sources)] = logp[where == n]
        return out

    # ---------------------------------------------------------------- inside a step

    def _mini_batches(self, plan: StepPlan, minis: Seq[Seq[Sequence]], tally: Tally) -> Iterator[MiniBatch]:
        """Each mini-batch with what must be known before its update; made when it is asked for, since later ones look
        at the policy that earlier ones left."""
        batches = self._in_lockstep(
            [
                self._packed([s for s in mini if len(trained_positions(s.sources))], len(groups))
                for mini, groups in zip(minis, plan.minis, strict=True)
            ]
        )
        if "ref_logp" in self.needs:
            batches = self._with_reference_logp(batches, tally)
        ratio = self.algorithm.rollout.ratio
        known = prepass.measure(self.backend, batches, self.needs, self.options, self.correction)
        for micros, before, norm in zip(batches, known, plan.normalisers, strict=True):
            full = prepass.complete(self.backend, norm, micros, before, self.needs, self.options)
            if self.correction.kind == "moment" and ratio != "none":
                threshold = prepass.m2_threshold(self.backend, micros, before, ratio, self.correction.tau)
                full = replace(full, m2_threshold=threshold)
            yield MiniBatch(micros, before, full)

    def _packed(self, sequences: Seq[Sequence], groups: int) -> list[MicroBatch]:
        budget, whole = self.config.learner.micro_batch_tokens, "groups" in self.needs
        return pack(sequences, budget, self._layout, dtype=self._dtype, groups=groups, whole_groups=whole)

    def _in_lockstep(self, batches: Seq[list[MicroBatch]]) -> list[list[MicroBatch]]:
        """As many micro-batches on every rank: ZeRO-3's collectives pair up or hang."""
        counts = self.backend.agree_max([max(1, len(micros)) for micros in batches])
        idle = dummy(self._dtype)
        return [
            [micro.to(self.backend.device) for micro in micros + [idle] * (count - len(micros))]
            for micros, count in zip(batches, counts, strict=True)
        ]

    def _with_reference_logp(self, batches: list[list[MicroBatch]], tally: Tally) -> list[list[MicroBatch]]:
        """Micro-batches with the reference's log-probs: cached ones as they came, on all ranks, or scored now."""
        missing = any(m.is_real and not m.has_ref for micros in batches for m in micros)
        if not self.backend.agree_max([int(missing)])[0]:
            return batches
        if self.reference is None:
            raise ValueError(
                f"{self.algorithm.name} needs log-probs of the reference: answers without cached scores, no reference"
            )
        out = []
        for micros in batches:
            scored = [(micro, self.reference.logp(micro)) for micro in micros]
            tally.reference_bytes += sum(nbytes(logp) for micro, logp in scored if micro.is_real)
            out.append([replace(micro, logp_ref=logp, has_ref=True) for micro, logp in scored])
        return out

    def _loss(
        self, micro: MicroBatch, step: int, norm: Normaliser, before: Before, tally: Tally, moved: float = 0.0
    ) -> torch.Tensor:
        anchors = self._anchors(micro, before, tally)
        wanted = {"entropy": True, "entropy_grad": "entropy" in self.needs, **self._reference_states(micro, tally)}
        topk = None
        if anchors is not None:
            topk = expand(anchors, micro)
            wanted["topk_ids"] = topk[0]
        columns = self.backend.forward(micro, **wanted)
        if not micro.is_real:
            return columns.sum() * 0.0
        scores = split(columns, self._with_value, **wanted)
        if "value" in self.needs and before.estimate is None:
            before = replace(before, estimate=prepass.estimate(micro, scores, self.options))
        batch = token_batch(micro, scores, step, before, topk)
        loss, stats = objective(self.algorithm, self.options, batch, norm, correction=self.correction, moved=moved)
        tally.add(stats)
        tally.add_batch(batch, micro)
        tally.suspects.see(micro, batch.logp, loss)
        # A loss that is not finite poisons the gradient, whose norm is agreed on by all ranks anyway: no rank steps.
        return loss * torch.where(torch.isfinite(loss.detach()), 1.0, math.nan)

    def _anchors(self, micro: MicroBatch, before: Before, tally: Tally) -> Anchors | None:
        """APO's top-K, for the policy's tokens with a negative advantage."""
        if "topk" not in self.needs or self.reference is None:
            return None
        advantage = micro.advantage if before.estimate is None else before.estimate.advantage
        positions = ((advantage < 0) & ~micro.is_teacher).nonzero().squeeze(-1)
        anchors = self.reference.topk(micro, positions, int(self.options["k"]))
        tally.reference_bytes += nbytes(*anchors)
        return anchors

    def _reference_states(self, micro: MicroBatch, tally: Tally) -> dict[str, Any]:
        """What the head needs to compare whole distributions with the reference's."""
        if not self.needs & {"ref_kl", "future"} or self.reference is None:
            return {}
        states = self.reference.states(micro)
        if micro.is_real:
            tally.reference_bytes += nbytes(states)
        wanted: dict[str, Any] = {"reference": (states, *self.reference.head())}
        if "future" in self.needs:
            wanted["future_lam"] = float(self.options["lam"])
        if "ref_kl" in self.needs:
            wanted["forward_kl"] = True
        return wanted

    def _report(
        self,
        micros: Seq[MicroBatch],
        minis: Seq[Seq[Sequence]],
        updates: Seq[Update],
        lr: float,
        tally: Tally,
        seconds: float,
    ) -> RankReport:
        applied = [u.grad_norm for u in updates if u.applied]
        shared = {
            "policy/lr": lr,
            "train/updates": float(len(applied)),
            "train/skipped": float(sum(not u.applied and not u.over_bound for u in updates)),
            "train/micro_batches": float(len(micros)),
        }
        if self.options.get("skip_grad_norm") is not None:
            shared["train/skipped_norm"] = float(sum(u.over_bound for u in updates))
        if applied:
            shared["policy/grad_norm"] = sum(applied) / len(applied)
        sums = {
            "train/samples": float(sum(len(mini) for mini in minis)),
            "train/tokens": float(sum(m.trained_tokens for m in micros if m.is_real)),
        }
        if self.needs & REFERENCE_NEEDS or "ref_logp" in self.needs:
            sums["reference/bytes"] = float(tally.reference_bytes)
        computed = sum(m.computed_tokens for m in micros)
        real = sum(m.real_tokens for m in micros)
        used = perf.measure(self.backend.policy.model, self.backend.device, real, int(sums["train/tokens"]), seconds)
        report = tally.report(sums, {"time/learn_s": seconds, "perf/memory_bytes": used.memory_bytes}, shared)
        report.means["train/padding_frac"] = (float(computed - real), float(computed))
        if used.mfu is not None:
            report.means["perf/mfu"] = (used.mfu, 1.0)
        return report

    # ---------------------------------------------------------------- resuming

    def state(self) -> dict[str, Any]:
        """What resuming needs besides weights and optimizer: schedule and random states of this rank."""
        return {"schedule": self.schedule.state_dict(), "rng": rng_state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.schedule.load_state_dict(dict(state["schedule"]))
        for group, lr in zip(self.backend.torch_optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = lr
        set_rng_state(state["rng"])


@dataclass(frozen=True)
class MiniBatch:
    """This rank's part of one optimizer update."""

    micros: list[MicroBatch]
    before: list[Before]
    norm: Normaliser


TopK = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def expand(anchors: Anchors, micro: MicroBatch) -> TopK:
    """(ids int64, logp, keep bool), each [N, K]: keep is False outside the anchored positions and where an id is the
    sampled token."""
    positions, ids = anchors.positions.long(), anchors.ids.long()
    shape, device = (micro.trained_tokens, ids.shape[-1]), ids.device
    keep = torch.zeros(shape, dtype=torch.bool, device=device)
    keep[positions] = ids != micro.targets[positions, None]
    return (
        torch.zeros(shape, dtype=torch.long, device=device).index_copy_(0, positions, ids),
        torch.zeros(shape, dtype=anchors.logp.dtype, device=device).index_copy_(0, positions, anchors.logp),
        keep,
    )


def token_batch(
    micro: MicroBatch, scores: Scores, step: int, before: Before | None = None, topk: TopK | None = None
) -> TokenBatch:
    """The objective's view of a scored micro-batch. Without ``before.logp`` the policy is its own proximal policy."""
    before = before or Before()
    estimate = before.estimate
    return TokenBatch(
        logp=scores.logp,
        logp_prox=scores.logp.detach() if before.logp is None else before.logp,
        logp_behave=micro.logp_behave,
        logp_ref=micro.logp_ref if micro.has_ref else None,
        entropy=scores.entropy,
        entropy_prox=before.entropy,
        advantage=micro.advantage if estimate is None else estimate.advantage,
        value=None if estimate is None else scores.value,
        value_old=None if estimate is None else estimate.value,
        returns=None if estimate is None else estimate.returns,
        topk_logp=scores.topk_logp,
        topk_ref_logp=topk[1] if topk else None,
        topk_keep=topk[2] if topk else None,
        future_logp=scores.future_logp,
        ref_kl=scores.ref_kl,
        mask=torch.ones_like(micro.is_teacher),
        is_teacher=micro.is_teacher,
        weight=micro.weight,
        sequence=micro.sequence,
        group=micro.group,
        age=torch.where(micro.is_teacher | (micro.version_step < 0), 0, step - micro.version_step),
        reward=micro.reward,
        confidence=micro.confidence,
        group_size=micro.group_size,
    )


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
