"""Which versions belong to the history that a run goes on with.

A resume and a restart of the learner go back to the step of a checkpoint. What was learned after it is gone, and with it
the right to train on what those weights sampled: such tokens have behaviour log-probs of a policy that never was.
"""

from __future__ import annotations

from hapo_async.types import GroupHeader, Version


class Lineage:
    """Knows the versions that were discarded: each cut names an incarnation and a step; of that incarnation and older ones
    the versions past the step are gone."""

    def __init__(self) -> None:
        self._cuts: list[Version] = []

    def cut(self, last: Version) -> None:
        """From now on ``last`` is the newest version of its incarnation, and of older ones, that counts."""
        self._cuts.append(last)

    def is_discarded(self, version: Version) -> bool:
        return any(version.incarnation <= cut.incarnation and version.step > cut.step for cut in self._cuts)

    def discards(self, header: GroupHeader) -> bool:
        """Whether a group holds a policy token of a discarded version."""
        return bool(self._cuts) and any(self.is_discarded(version) for version in header.versions)
