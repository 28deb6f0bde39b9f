"""A learner rank, a generator and their buckets that commit the faults which a case of ``chaos.py`` has armed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import chaos_arms
import numpy as np
import torch
from weight_faults import Fault, FaultyGenerator, FaultyRank, Tamper

from hapo_async.rows import Sampled
from hapo_async.sequences import Sequence
from hapo_async.types import Answer, Group, Segment, Source
from hapo_async.weights import Bucket, TransferError

_BAD = {"nan": float("nan"), "inf": float("inf")}


class ClaimingTamper(Tamper):
    """Damages the next transfer when that is asked for. where: "rank" or "generator"."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self._claimed: chaos_arms.Armed | None = None

    def begin(self) -> None:
        super().begin()
        if self._claimed is None and (armed := chaos_arms.claim(f"{self.where}-weights")):
            self._claimed = armed
            self.armed = Fault(armed.what, armed.args.get("after", 1))

    def _do(self, fault: Fault, forward: Any, bucket: Bucket, data: Any) -> None:
        armed, self._claimed = self._claimed, None
        assert armed is not None
        chaos_arms.strike(armed.id, bucket=bucket.index)
        if fault.what == "vanish":
            raise TransferError("the connection was cut")
        super()._do(fault, forward, bucket, data)


class ChaosRank(FaultyRank):
    """Breaks numbers, buckets, and itself in the middle of a checkpoint."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tamper = ClaimingTamper("rank")
        self.trap = chaos_arms.FileTrap("rank-save")

    def _sequences(self, plan: Any) -> tuple[list[list[Sequence]], Any]:
        minis, blames = super()._sequences(plan)
        if any(minis) and (armed := chaos_arms.claim("rank-number")):
            chaos_arms.strike(armed.id)
            bad, _, where = armed.what.partition("-")
            if where == "gradient":
                self._spoil_gradient(_BAD[bad])
            else:  # the loss of one answer
                mini = next(mini for mini in minis if mini)
                mini[0] = replace(mini[0], advantage=_BAD[bad])
        return minis, blames

    def _spoil_gradient(self, bad: float) -> None:
        """Of one parameter, in the next backward pass."""
        parameter = next(p for p in self.backend.policy.model.parameters() if p.requires_grad)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            handle.remove()
            return gradient * bad

        handle = parameter.register_hook(spoil)


class ChaosGenerator(FaultyGenerator):
    """Breaks buckets and log-probs. A poisoned prompt breaks each time that it is sampled."""

    def _wrap(self) -> None:
        self.tamper = ClaimingTamper("generator")
        super()._wrap()

    def _group(self, sampled: Sampled) -> Group:
        group = super()._group(sampled)
        prompt = group.prompt_tokens.tolist()
        kind = chaos_arms.curse_of(prompt)
        if not kind and (armed := chaos_arms.claim("generator-number")):
            kind = armed.what
            chaos_arms.strike(armed.id, key=list(group.key))
            if armed.args.get("always"):
                chaos_arms.curse(kind, prompt)
        return replace(group, answers=_spoilt(group.answers, kind)) if kind else group


def _spoilt(answers: tuple[Answer, ...], kind: str) -> tuple[Answer, ...]:
    """The first answer's first log-prob is no number."""

    def spoil(segment: Segment) -> Segment:
        if segment.source is not Source.POLICY or segment.logp_behave is None:
            return segment
        logp = np.array(segment.logp_behave)
        logp[:1] = _BAD[kind.partition("-")[0]]
        return replace(segment, logp_behave=logp)

    first = replace(answers[0], segments=tuple(spoil(s) for s in answers[0].segments))
    return first, *answers[1:]
