"""What earlier visits to a prompt say about it: the evidence of the pooled gate (``gate.decision: pooled``).

A visit is one epoch's complete, judged group. Its S successes and N - S failures join those of the visits before, which
count ``decay`` times what they counted then:

    s_v = S_v + decay * s_(v-1),   f_v = (N_v - S_v) + decay * f_(v-1),   c_v = (1 + s_v) / (2 + s_v + f_v)

decay 0 is the group alone (the plain posterior mean), decay 1 counts all visits alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from hapo_async.types import GroupKey


class Evidence(NamedTuple):
    """Successes and failures; not whole numbers once they have decayed."""

    successes: float = 0.0
    failures: float = 0.0


@dataclass(frozen=True)
class _Visit:
    epoch: int
    before: Evidence
    now: Evidence


class Posteriors:
    """Evidence by prompt: one entry for each prompt that was ever judged.

    Another attempt at the same visit (a group that grew too old, or was lost in a restart) takes the earlier one's
    place: a visit counts once.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._visits: dict[str, _Visit] = {}

    def __len__(self) -> int:
        return len(self._visits)

    def before(self, key: GroupKey) -> Evidence:
        """What the visits before this one left, decayed."""
        last = self._visits.get(key.uid)
        if last is None:
            return Evidence()
        if key.epoch <= last.epoch:
            return last.before
        return Evidence(self.decay * last.now.successes, self.decay * last.now.failures)

    def record(self, key: GroupKey, successes: int, failures: int) -> None:
        """Adds the visit's own group; one that comes after a later visit's is left out: that one stands for it."""
        last = self._visits.get(key.uid)
        if last is not None and key.epoch < last.epoch:
            return
        before = self.before(key)
        now = Evidence(before.successes + successes, before.failures + failures)
        self._visits[key.uid] = _Visit(key.epoch, before, now)

    def state_dict(self) -> dict[str, list[float]]:
        """As JSON: uid -> [epoch, successes and failures before, successes and failures now]."""
        return {uid: [v.epoch, *v.before, *v.now] for uid, v in self._visits.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._visits = {
            uid: _Visit(int(epoch), Evidence(s0, f0), Evidence(s1, f1))
            for uid, (epoch, s0, f0, s1, f1) in state.items()
        }
