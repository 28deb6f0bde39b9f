"""Groups that are taken back, from wherever they are, and why: late, unwanted, lost, poisoned, of a discarded lineage."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

from hapo_async.admission import excess
from hapo_async.buffer import Buffer, Ready
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.flights import GENERATING, MOVING, Flight
from hapo_async.driver.retries import Retries
from hapo_async.learner.blame import Blame
from hapo_async.ledger import Ledger
from hapo_async.lineage import Lineage
from hapo_async.types import GroupHeader, GroupKey, Version

_Late = list[tuple[GroupKey, int, tuple[int, ...] | None]]
"""Key, tries, and the answers' lengths where they are complete already."""


class Returns:
    """Keeps ledger, flights, buffer and retries in agreement whenever a group does not go the usual way.

    given_up: groups given up as late, since the sampler's tally was taken. start: runs a coroutine beside the loop. wake:
    called when something changed.
    """

    def __init__(
        self,
        config: Config,
        ledger: Ledger,
        buffer: Buffer,
        flights: dict[GroupKey, Flight],
        retries: Retries,
        start: Callable[[Coroutine[Any, Any, None]], None],
        wake: Callable[[], None],
    ) -> None:
        self.lineage = Lineage()
        self.given_up = 0
        self._config, self._ledger, self._buffer = config, ledger, buffer
        self._flights, self._retries = flights, retries
        self._start, self._wake = start, wake

    # ---------------------------------------------------------------- too old

    async def late(self, fleet: Fleet, keys: list[GroupKey], step: int) -> None:
        """Of groups that would grow too old, drops as many as hold the learner up, the oldest first: aborted, issued again
        once, then quarantined (``dropped(late)``). What a doubted generator holds up is not charged to the prompt. step:
        the learner's.

        A generator counts as busy with them until it answers: one that is silent is not the first to get others.
        """
        keys = self._excess(keys, step)
        owners = fleet.owners(keys)
        doubted = {key for g in fleet.alive if g.suspect for key in owners.get(g.name, ())}
        # The books first: whatever an aborted call brings then belongs to an attempt that is over.
        late: _Late = []
        for key in keys:
            flight = self._flights.pop(key, None)
            if not flight or not self._ledger.is_current(key):
                continue
            if key in doubted:
                self._retries.recalled(key, "lost")
                late.append((key, 0, flight.lengths))
            else:
                late.append((key, self._retries.late(key, "late"), flight.lengths))
        self.given_up += len(late)
        self._wake()
        # A generator that is silent must not hold up the learner as well.
        self._start(self._abort(fleet, owners, late, step + 1))

    def _excess(self, keys: list[GroupKey], step: int) -> list[GroupKey]:
        """The oldest of ``keys``, as few as let the learner pass; of equally old ones those that have taken longest."""
        flights = {key: self._flights[key] for key in keys if key in self._flights}
        count = excess(
            [f.step for f in self._flights.values()],
            self._buffer.oldest_steps(),
            step=step,
            max_staleness=self._config.max_staleness,
            batch_prompts=self._config.train.batch_prompts,
        )
        return sorted(flights, key=lambda key: (flights[key].step, flights[key].started))[:count]

    async def _abort(self, fleet: Fleet, owners: dict[str, list[GroupKey]], late: _Late, step: int) -> None:
        lengths: Mapping[GroupKey, tuple[int, ...]] = {}
        try:
            lengths = await fleet.abort(owners)
        finally:
            for key, tries, complete in late:
                self._retries.record_late(key, step, tries, complete or lengths.get(key))

    def expired(self, groups: list[Ready], step: int) -> None:
        """Buffered groups that can no longer be trained on are sampled anew, once. step: the learner's."""
        for group in groups:
            tries = self._retries.late(group.key, "too old")
            self._retries.record_late(group.key, step + 1, tries, group.header.lengths)
        self._wake()

    # ---------------------------------------------------------------- not wanted

    async def recall(self, fleet: Fleet) -> None:
        """Takes back whatever is in flight; it will be issued again."""
        owners = fleet.owners(list(self._flights))
        for key in list(self._flights):
            del self._flights[key]
            self._retries.recalled(key)
        if owners:
            await fleet.abort(owners)

    # ---------------------------------------------------------------- no step could be made of them

    def unmade(self, groups: list[Ready], blamed: Sequence[Blame], step: int) -> None:
        """Of a step that could not be made: groups that died on the way are sampled anew, those that spoilt it are dropped and
        quarantined, and the others wait for the next step; where nobody is to blame, all are dropped. step: the learner's."""
        reasons = {blame.key: blame for blame in blamed}
        for group in groups:
            blame = reasons.get(group.key)
            if blame is None and reasons:
                self._buffer.add(group)
            elif blame is None:
                self._ledger.drop(group.key, "skipped_step")
            elif blame.is_lost:
                self._retries.recalled(group.key, "lost")
            else:
                self._ledger.drop(group.key, "poisoned")
                self.note_poisoned(blame, step, group.header.lengths)
        self._wake()

    def note_poisoned(self, blame: Blame, step: int, lengths: Sequence[int] | None = None) -> None:
        """For people. lengths: tokens of each answer."""
        self._retries.quarantine.add(blame.key, step + 1, f"poisoned: {blame.reason}", 1, lengths)

    # ---------------------------------------------------------------- of a discarded lineage

    def is_discarded(self, header: GroupHeader) -> bool:
        """True for a group in flight that a discarded version had a part in; it is then issued again."""
        if not self.lineage.discards(header):
            return False
        self._ledger.discarded_lineage += 1
        self._retries.recalled(header.key)
        self._wake()
        return True

    async def roll_back(
        self, fleet: Fleet, last: Version, state: Mapping[str, Any], taken: Sequence[Ready]
    ) -> dict[str, int]:
        """Goes back to a checkpoint. last: the newest version that counts; state: the ledger's there; taken: groups that had
        left the buffer for a step that was not made. Groups that discarded versions had no part in stay where they are.
        Returns how many trained, buffered and running groups that undid."""
        self.lineage.cut(last)
        for group in taken:
            self._buffer.add(group)
        gone = self._buffer.take_discarded(self.lineage)
        ahead = {g.name for g in fleet.generators if g.installed is not None and g.installed.step > last.step}
        doomed = [
            key
            for key, flight in self._flights.items()
            if flight.stage == MOVING or (flight.stage == GENERATING and flight.generator in ahead)
        ]
        owners = fleet.owners(doomed)
        for key in doomed:
            del self._flights[key]
        undone = self._ledger.roll_back(state, {*self._buffer.keys, *self._flights})
        self._ledger.discarded_lineage += undone + len(gone) + len(doomed)
        self._retries.look_again()
        if owners:
            await fleet.abort(owners)
        return {"trained": undone, "buffered": len(gone), "running": len(doomed)}
