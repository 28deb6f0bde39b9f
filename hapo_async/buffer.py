"""The buffer between gate and learner: bounded, oldest first, and never handing out a group that is too old."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hapo_async.errors import RunError
from hapo_async.lineage import Lineage
from hapo_async.sequences import TrainGroup
from hapo_async.types import GatedGroup, GroupHeader, GroupKey


@dataclass(frozen=True)
class Ready:
    """A gated group together with what the learner will train on."""

    gated: GatedGroup
    train: TrainGroup

    @property
    def key(self) -> GroupKey:
        return self.gated.header.key

    @property
    def header(self) -> GroupHeader:
        return self.gated.header


@dataclass
class Buffer:
    """Groups that wait for the learner.

    order: the ledger's position of a key; it breaks ties between groups of the same age, so that a synchronous run
    takes its groups in the order of issue whatever order they finished in. Admission bounds the fill; ``capacity`` only
    asserts it.
    """

    capacity: int
    order: Callable[[GroupKey], int]
    _groups: list[Ready] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self._groups)

    def add(self, group: Ready) -> None:
        assert len(self._groups) < self.capacity, f"buffer of {self.capacity} overflows: admission is broken"
        self._groups.append(group)

    def take(self, count: int, step: int, max_staleness: int) -> list[Ready]:
        """The ``count`` oldest groups (fewer when there are fewer), checked against the bound.

        Raises RunError for a group older than ``max_staleness`` learner steps or newer than the learner: both mean that
        admission is broken, and training on them would break the promise.
        """
        self._groups.sort(key=self._age_key)
        taken, self._groups = self._groups[:count], self._groups[count:]
        for group in taken:
            staleness = self.staleness(group, step)
            if not 0 <= staleness <= max_staleness:
                raise RunError(
                    f"group {group.key} has staleness {staleness} at step {step}; allowed is 0..{max_staleness}"
                )
        return taken

    def oldest(self, count: int) -> list[Ready]:
        """What ``take`` would hand out now; nothing is removed."""
        return sorted(self._groups, key=self._age_key)[:count]

    def take_expired(self, step: int, max_staleness: int) -> list[Ready]:
        """Removes and returns the groups that are already too old at ``step``."""
        expired = [g for g in self._groups if self.staleness(g, step) > max_staleness]
        self._groups = [g for g in self._groups if self.staleness(g, step) <= max_staleness]
        return expired

    def take_discarded(self, lineage: Lineage) -> list[Ready]:
        """Removes and returns the groups that a discarded version had a part in."""
        gone = [g for g in self._groups if lineage.discards(g.header)]
        self._groups = [g for g in self._groups if not lineage.discards(g.header)]
        return gone

    @property
    def keys(self) -> list[GroupKey]:
        """Of all groups that wait."""
        return [g.key for g in self._groups]

    def oldest_steps(self) -> list[int]:
        """The version step of each waiting group's oldest token (demonstrations have none)."""
        return [g.header.oldest.step for g in self._groups if g.header.oldest is not None]

    @staticmethod
    def staleness(group: Ready, step: int) -> int:
        """Learner steps between the learner's version and the group's oldest policy token; 0 without policy tokens."""
        return step - group.header.oldest.step if group.header.oldest is not None else 0

    def _age_key(self, group: Ready) -> tuple[int, int]:
        oldest = group.header.oldest
        return (oldest.step if oldest is not None else -1, self.order(group.key))
