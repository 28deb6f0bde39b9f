"""Which groups made a step impossible: lost on the way, unsound before anything was computed, or not finite in the result."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from hapo_async.batch import MicroBatch, StepPlan, trained_positions
from hapo_async.types import GroupKey, Source

if TYPE_CHECKING:
    from hapo_async.sequences import Sequence

LOST = "lost"
"""The reason of a group whose answers died with the node that held them: nobody's fault."""


@dataclass(frozen=True)
class Blame:
    """A group that a step could not be made with."""

    key: GroupKey
    reason: str

    @property
    def is_lost(self) -> bool:
        return self.reason == LOST


def unsound(plan: StepPlan, minis: Seq[Seq[Sequence]], vocabulary: int) -> list[Blame]:
    """The groups that would poison a step, each once. minis: this rank's sequences of each mini-batch of ``plan``; those without
    a token to train do no harm."""
    found: dict[GroupKey, str] = {}
    for groups, mini in zip(plan.minis, minis, strict=True):
        for sequence in mini:
            key = groups[sequence.group].key
            trains = len(trained_positions(sequence.sources)) > 0
            if trains and key not in found and (reason := _unsound(sequence, vocabulary)):
                found[key] = reason
    return [Blame(key, reason) for key, reason in found.items()]


def _unsound(s: Sequence, vocabulary: int) -> str:
    for name, ids in (("prompt", s.prompt_tokens), ("answer", s.tokens)):
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            return f"a token id of its {name} is outside 0..{vocabulary - 1}"
    for name, value in (("advantage", s.advantage), ("weight", s.weight), ("reward", s.reward if s.judged else 0.0)):
        if not np.isfinite(value):
            return f"its {name} is {value}"
    if not len(s.tokens) == len(s.sources) == len(s.logp_behave) == len(s.version_steps):
        return "its tokens, sources, log-probs and versions are of different lengths"
    policy = s.sources == Source.POLICY
    if not np.isfinite(s.logp_behave[policy & (s.version_steps >= 0)]).all():
        return "a behaviour log-prob is not finite"
    if np.isinf(s.logp_behave[policy]).any():
        return "a behaviour log-prob is infinite"
    if s.logp_ref is not None and np.isinf(s.logp_ref).any():
        return "a log-prob of the reference is infinite"
    return ""


class Suspects:
    """What of a step came out not finite, kept on the device: it is read only where an update was not applied. mini: the
    mini-batch that is being computed."""

    def __init__(self) -> None:
        self.mini = 0
        self._seen: list[tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def see(self, micro: MicroBatch, logp: torch.Tensor, loss: torch.Tensor) -> None:
        """A micro-batch with its log-probs [N] and its loss."""
        bad = ~torch.isfinite(logp.detach())
        self._seen.append((self.mini, micro.group, bad, ~torch.isfinite(loss.detach())))

    def blame(self, plan: StepPlan) -> list[Blame]:
        """The groups of tokens without a finite log-prob; where a loss is not finite though all of them are, all groups of that
        micro-batch."""
        found: dict[GroupKey, str] = {}
        for mini, group, bad, loss in self._seen:
            of_tokens = bool(bad.any())
            if not of_tokens and not bool(loss):
                continue
            what = "a log-prob of the policy" if of_tokens else "the loss of its micro-batch"
            for index in (group[bad] if of_tokens else group).unique().tolist():
                found.setdefault(plan.minis[mini][index].key, f"{what} is not finite")
        return [Blame(key, reason) for key, reason in found.items()]
