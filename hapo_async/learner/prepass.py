"""What a learner step measures before its updates: under the policy that the step starts from, or an update starts from.

Per step, one pass without gradient over the second and later mini-batches gives what the objective compares with: the
proximal policy's log-probs and entropies, and the critic's values. The first mini-batch is trained at that policy
itself, so there the training pass's own scores serve, unless a number over the whole mini-batch is needed first.
Legend: N tokens.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch

from hapo_async import preference, reduction, staleness
from hapo_async.batch import MicroBatch
from hapo_async.corrections import Settings
from hapo_async.learner import critic
from hapo_async.learner.backend import Backend
from hapo_async.learner.policy import Scores, split
from hapo_async.reduction import Normaliser
from hapo_async.terms import Ratio
from hapo_async.upge import Options, TokenBatch


@dataclass(frozen=True)
class Before:
    """What the step's first policy said of a micro-batch, each [N], detached. None: not needed, or the training pass's
    own scores."""

    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    estimate: critic.Estimate | None = None


def measure(
    backend: Backend, batches: Seq[Seq[MicroBatch]], needs: frozenset[str], options: Options, correction: Settings
) -> list[list[Before]]:
    """One ``Before`` per micro-batch of each mini-batch."""
    proximal = "prox" in needs and correction.recomputes
    entropy = bool(needs & {"capacity", "entropy_threshold"})
    first_too = "entropy_threshold" in needs or {"value", "topk"} <= needs
    start = (0 if first_too else 1) if proximal or entropy or "value" in needs else len(batches)
    out: list[list[Before]] = []
    with torch.no_grad():
        for index, micros in enumerate(batches):
            if index < start:
                out.append([Before() for _ in micros])
                continue
            scored = [score(backend, micro, entropy=entropy) for micro in micros]
            out.append(
                [
                    Before(
                        s.logp if proximal and index else None,
                        s.entropy,
                        estimate(m, s, options) if "value" in needs else None,
                    )
                    for m, s in zip(micros, scored, strict=True)
                ]
            )
    return out


def score(backend: Backend, micro: MicroBatch, entropy: bool = False) -> Scores:
    """Scores of a micro-batch, to be called without gradient."""
    return split(backend.forward(micro, entropy=entropy), backend.policy.value_head is not None, entropy=entropy)


def estimate(micro: MicroBatch, scores: Scores, options: Options) -> critic.Estimate:
    assert scores.value is not None, "the learner was started without a critic"
    return critic.estimate(micro, scores.value, options["discount"], options["gae_lambda"])


def complete(
    backend: Backend,
    norm: Normaliser,
    micros: Seq[MicroBatch],
    before: Seq[Before],
    needs: frozenset[str],
    options: Options,
) -> Normaliser:
    """The normaliser with what is measured over a whole mini-batch on all ranks, right before its update."""
    if "entropy_threshold" in needs:
        parts = [
            b.entropy[~m.is_teacher] for m, b in zip(micros, before, strict=True) if m.is_real and b.entropy is not None
        ]
        mine = torch.cat(parts) if parts else torch.zeros(0, device=backend.device)
        everyone = backend.gather(mine.to(micros[0].advantage.dtype))
        norm = replace(norm, entropy_threshold=reduction.quantile(everyone, options["quantile"]))
    if "log_ratio_mean" in needs:
        norm = replace(norm, log_ratio_mean=_log_ratio_mean(backend, micros))
    return norm


@torch.no_grad()
def m2_threshold(backend: Backend, micros: Seq[MicroBatch], before: Seq[Before], ratio: Ratio, tau: float) -> float:
    """M2PO's threshold over a mini-batch on all ranks, right before its update: from the proximal policy's log-probs,
    scored now where the step starts with this mini-batch; from the policy's own, scored now, where the term forms no
    ratio to the proximal policy."""
    sizes = []
    for micro, known in zip(micros, before, strict=True):
        scored = known.logp is None or ratio in ("weight", "behaviour")
        logp = score(backend, micro).logp if scored else known.logp
        if micro.is_real:
            assert logp is not None
            batch = TokenBatch(
                logp=logp, logp_behave=micro.logp_behave, is_teacher=micro.is_teacher, sequence=micro.sequence
            )
            sizes.append(staleness.log_ratios(batch, ratio))
    mine = torch.cat(sizes) if sizes else torch.zeros(0, device=backend.device)
    return staleness.m2_threshold(backend.gather(mine.to(micros[0].advantage.dtype)), tau)


@torch.no_grad()
def _log_ratio_mean(backend: Backend, micros: Seq[MicroBatch]) -> float:
    """Mean of sum_t (l - lr) over the mini-batch's sequences on all ranks, under the policy as it is now."""
    total, count = 0.0, 0
    for micro in micros:
        logp = score(backend, micro).logp
        if micro.is_real:
            batch = TokenBatch(logp=logp, logp_ref=micro.logp_ref, is_teacher=micro.is_teacher, sequence=micro.sequence)
            part, sequences = preference.log_ratio_total(batch)
            total, count = total + part, count + sequences
    total, everyone = backend.agree_sum([total, float(count)])
    return total / everyone if everyone else 0.0
