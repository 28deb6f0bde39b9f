"""What the trained groups of a step say: rewards, lengths, the gate's decisions, where the samples come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from hapo_async.algorithms import Algorithm
from hapo_async.buffer import Ready
from hapo_async.types import SUCCESS, GateDecision, Judgement, Source

CONFIDENCE_BINS = 10


def of_groups(groups: Sequence[Ready], algorithm: Algorithm) -> dict[str, float]:
    """Rewards, lengths, gate and composition of the trained groups, under the names of the registry. What the gate decided
    is left out for algorithms without it, and all of ``gate/`` for cached answers, which never meet it."""
    sampled = [g for g in groups if g.gated.judgements]
    injected = [g for g in groups if any(r.source is Source.TEACHER for r in g.train.rows)]
    rows, cached = [r for g in groups for r in g.train.rows], algorithm.offline
    out: dict[str, float] = {
        "train/offline_frac": sum(cached or r.source is Source.TEACHER for r in rows) / max(1, len(rows)),
        "train/prompts": len(groups),
        "train/epoch": max(g.key.epoch for g in groups),
    }
    if not cached:
        out |= {"gate/injected": len(injected), "gate/injected_frac": len(injected) / len(groups)}
    if not sampled:
        return out
    rewards = [r for g in sampled if len(r := g.gated.rewards[g.gated.judged])]
    lengths = [n for g in sampled for n in g.header.lengths]
    reasons = [r for g in sampled for r in g.header.finish_reasons]
    gates = [g.gated.gate for g in sampled]
    seconds = [j.seconds for g in sampled for j in g.gated.judgements]
    if rewards:
        out |= {
            "reward/mean": float(np.concatenate(rewards).mean()),
            "reward/std": float(np.mean([r.std() for r in rewards])),
            "groups/zero_variance_frac": float(np.mean([r.max() == r.min() for r in rewards])),
            "groups/solved_frac": float(np.mean([r.max() >= SUCCESS for r in rewards])),
            "groups/all_correct_frac": float(np.mean([r.min() >= SUCCESS for r in rewards])),
        }
    out |= {
        "response/length_mean": float(np.mean(lengths)),
        "response/length_max": float(max(lengths)),
        "response/truncated_frac": float(np.mean([r == "length" for r in reasons])),
        "response/multi_version_frac": float(np.mean([g.header.oldest != g.header.newest for g in sampled])),
        **length_histogram("response/length_hist", lengths),
        **_components([j for g in sampled for j in g.gated.judgements]),
        **(decisions(gates) if algorithm.uses_gate else {}),
        "verify/p50_s": float(np.median(seconds)),
        "verify/p99_s": float(np.percentile(seconds, 99)),
    }
    if not cached:
        right = [g.train.rollouts > 0 and all(r.reward >= SUCCESS for r in g.train.rows) for g in injected]
        out["gate/degenerate"] = sum(right)
        out["gate/confidence"] = float(np.mean([d.confidence for d in gates]))
        out |= histogram(gates)
    return out


def length_bucket(tokens: int) -> int:
    """The largest power of two that is not above ``tokens``; 0 for none."""
    return 1 << (tokens.bit_length() - 1) if tokens > 0 else 0


def length_histogram(family: str, lengths: Sequence[int]) -> dict[str, float]:
    """Counts of answers by ``length_bucket``, as ``family/{tokens}``; empty buckets are left out."""
    return {f"{family}/{edge}": count for edge, count in sorted(Counter(map(length_bucket, lengths)).items())}


def _components(judgements: Sequence[Judgement]) -> dict[str, float]:
    """Means of the rewards' named components, over the answers that have them."""
    found: dict[str, list[float]] = {}
    for judgement in judgements:
        for name, value in judgement.components.items():
            found.setdefault(re.sub(r"[^\w.-]+", "_", name), []).append(float(value))
    return {f"reward/component/{name}": float(np.mean(values)) for name, values in found.items()}


def decisions(gates: Sequence[GateDecision]) -> dict[str, float]:
    """What the gate decided, and why it did not inject."""
    return {
        "gate/open_frac": float(np.mean([d.is_open for d in gates])),
        "gate/threshold": float(np.mean([d.threshold for d in gates])),
        "gate/no_teacher": sum(d.reason.startswith("no teacher") for d in gates),
        "gate/blocked": sum(d.reason.startswith("blocked") for d in gates),
    }


def histogram(gates: Sequence[GateDecision]) -> dict[str, float]:
    """Shares of groups by tenth of confidence: summed below a threshold of whole tenths they are the groups whose gate it
    would open."""
    # Confidences are ratios of small integers; the margin keeps 3/10 in the bin that starts there, whatever floats say.
    bins = Counter(min(int(d.confidence * CONFIDENCE_BINS + 1e-9), CONFIDENCE_BINS - 1) for d in gates)
    return {f"gate/confidence_hist/{b}": bins[b] / len(gates) for b in range(CONFIDENCE_BINS)}
