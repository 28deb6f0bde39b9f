"""Which prompts of a cache train, which are held out, and when the held-out loss says that it is enough."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hapo_async.answers import MIXED, Entry
from hapo_async.data.stream import keyed_order
from hapo_async.words import plural


@dataclass(frozen=True)
class Split:
    """Prompts by uid: those that train, those held out for early stopping, and how many are left out, by reason."""

    train: frozenset[str]
    held_out: tuple[str, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, entries: Mapping[str, Entry], share: float, seed: int) -> Split:
        """Prompts whose answers are all right, all wrong or unjudged teach nothing. Of the others a seeded ``share``, at
        least one, is held out (none where share is 0 or there is only one)."""
        counts = Counter(entry.outcome for entry in entries.values())
        mixed = sorted(uid for uid, entry in entries.items() if entry.outcome == MIXED)
        count = min(len(mixed) - 1, max(1, round(share * len(mixed)))) if share > 0 and mixed else 0
        order = [mixed[i] for i in keyed_order(mixed, f"holdout/{seed}")]
        left_out = {outcome: n for outcome, n in sorted(counts.items()) if outcome != MIXED}
        return cls(frozenset(order[count:]), tuple(sorted(order[:count])), left_out)

    def text(self) -> str:
        """One line for people."""
        left = ", ".join(f"{n} {reason}" for reason, n in self.left_out.items())
        train, held_out = len(self.train), len(self.held_out)
        verbs = "trains" if train == 1 else "train", "is" if held_out == 1 else "are"
        return f"{plural(train, 'prompt')} {verbs[0]}, {held_out} {verbs[1]} held out; left out: {left or 'none'}"


@dataclass
class EarlyStop:
    """Counts evaluations without a better held-out loss. patience: how many end the run; 0 never does."""

    patience: int
    best: float | None = None
    best_step: int = 0
    waited: int = 0

    def see(self, step: int, loss: float) -> None:
        """Takes the loss of an evaluation; one that is not a number is no improvement."""
        if not math.isnan(loss) and (self.best is None or loss < self.best):
            self.best, self.best_step, self.waited = loss, step, 0
        else:
            self.waited += 1

    @property
    def due(self) -> bool:
        return 0 < self.patience <= self.waited

    def text(self) -> str:
        """Why the run ends, for people."""
        best = "none was a number" if self.best is None else f"its best, {self.best:.4g}, was at step {self.best_step}"
        return f"the held-out loss has not improved for {plural(self.waited, 'evaluation')}; {best}"

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint; the patience is the configuration's."""
        return {k: v for k, v in asdict(self).items() if k != "patience"}

    def restore(self, state: Mapping[str, Any]) -> None:
        """What ``state`` told; nothing of it: as before the first evaluation."""
        fresh = EarlyStop(self.patience, **state)
        self.best, self.best_step, self.waited = fresh.best, fresh.best_step, fresh.waited
