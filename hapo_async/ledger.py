"""The ledger: where each issued prompt is, and the identity that nothing is lost.

A prompt is keyed (epoch, uid) and is in exactly one place; an attempt number fences late answers:

    in_flight (issued, generated, verified) -> buffered (admitted) -> trained(step)
                     |                             |
                     +--> to_retry <---------------+   or dropped(reason)

At every moment: issued = trained + dropped + in flight + buffered + to retry. One writer: the driver.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from hapo_async.types import GroupKey


class Place(enum.StrEnum):
    IN_FLIGHT = "in_flight"
    BUFFERED = "buffered"
    TO_RETRY = "to_retry"
    TRAINED = "trained"
    DROPPED = "dropped"


_ENDED = (Place.TRAINED, Place.DROPPED)


@dataclass
class _Entry:
    place: Place
    attempt: int
    order: int
    detail: str = ""
    tries: Counter[str] = field(default_factory=Counter)


class LedgerError(AssertionError):
    """A move that would break the ledger's rules: a bug, never a user's mistake."""


RECOUNT_GROWTH = 1.25  # a full recount each time that there are so many times as many entries


class Ledger:
    """Counts are kept as entries move, so ``counts`` and ``untrained`` cost nothing."""

    def __init__(self) -> None:
        self._recount_at = 0
        self._entries: dict[tuple[int, str], _Entry] = {}
        self._counts: Counter[Place] = Counter()
        self.dropped_reasons: Counter[str] = Counter()
        self.discarded_lineage = 0  # groups of versions that a restart gave up, so far

    def issue(self, epoch: int, uid: str) -> GroupKey:
        """A new attempt: the first one of a prompt, or the next one of a prompt that waits to be retried."""
        entry = self._entries.get((epoch, uid))
        if entry is None:
            entry = _Entry(Place.IN_FLIGHT, 0, len(self._entries))
            self._entries[epoch, uid] = entry
            self._counts[Place.IN_FLIGHT] += 1
        else:
            self._require(entry, (epoch, uid), Place.TO_RETRY)
            entry.attempt += 1
            self._move(entry, Place.IN_FLIGHT)
        return GroupKey(epoch, uid, entry.attempt)

    def is_current(self, key: GroupKey) -> bool:
        """False for an answer of an attempt that was given up: it must be ignored."""
        entry = self._entries.get((key.epoch, key.uid))
        return entry is not None and entry.attempt == key.attempt and entry.place is Place.IN_FLIGHT

    def admit(self, key: GroupKey) -> None:
        self._move(self._current(key, Place.IN_FLIGHT), Place.BUFFERED)

    def retry(self, key: GroupKey, reason: str) -> int:
        """Takes an attempt back; the prompt waits to be issued again. Returns how often this has happened to it for
        this reason: a prompt is not charged for one kind of failure with another's."""
        entry = self._current(key, Place.IN_FLIGHT, Place.BUFFERED)
        entry.detail = reason
        entry.tries[reason] += 1
        self._move(entry, Place.TO_RETRY)
        return entry.tries[reason]

    def drop(self, key: GroupKey, reason: str) -> None:
        entry = self._current(key, Place.IN_FLIGHT, Place.BUFFERED, Place.TO_RETRY)
        entry.detail = reason
        self.dropped_reasons[reason] += 1
        self._move(entry, Place.DROPPED)

    def train(self, key: GroupKey, step: int) -> None:
        """The group is part of the published step."""
        entry = self._current(key, Place.BUFFERED)
        entry.detail = str(step)
        self._move(entry, Place.TRAINED)

    def is_buffered(self, key: GroupKey) -> bool:
        """Whether this attempt waits in the buffer."""
        entry = self._entries.get((key.epoch, key.uid))
        return entry is not None and entry.attempt == key.attempt and entry.place is Place.BUFFERED

    def order(self, key: GroupKey) -> int:
        """Position in the order of first issue."""
        return self._entries[key.epoch, key.uid].order

    @property
    def untrained(self) -> int:
        """Issued and neither dropped nor in a published step: what the admission rule counts."""
        return self._counts[Place.IN_FLIGHT] + self._counts[Place.BUFFERED] + self._counts[Place.TO_RETRY]

    @property
    def to_retry(self) -> int:
        return self._counts[Place.TO_RETRY]

    def counts(self) -> dict[str, int]:
        return {"issued": len(self._entries), **{str(place): self._counts[place] for place in Place}}

    def check(self, recount: bool = False) -> None:
        """The identity: each issued prompt is in one place. Raises LedgerError when it does not hold.

        It costs nothing but additions, except that every entry is recounted where ``recount`` asks for it, and each time
        that entries have grown by a quarter: a run that goes on for long must not pay for all of its past at each step.
        """
        if min(self._counts.values(), default=0) < 0 or sum(self._counts.values()) != len(self._entries):
            raise LedgerError(f"ledger identity broken: {len(self._entries)} entries, counts {dict(self._counts)}")
        if not recount and len(self._entries) < self._recount_at:
            return
        self._recount_at = int(RECOUNT_GROWTH * len(self._entries)) + 1
        seen = Counter(entry.place for entry in self._entries.values())
        if seen != +self._counts:
            raise LedgerError(f"ledger identity broken: entries {dict(seen)}, counts {dict(self._counts)}")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds. Raises LedgerError rather than commit counts that are wrong."""
        self.check(recount=True)
        rows = [[e, u, str(x.place), x.attempt, x.detail, dict(x.tries)] for (e, u), x in self._entries.items()]
        return {
            "entries": rows,
            "dropped_reasons": dict(self.dropped_reasons),
            "discarded_lineage": self.discarded_lineage,
        }

    @classmethod
    def resumed(cls, state: dict[str, Any], buffered: Collection[GroupKey] = ()) -> Ledger:
        """The ledger after a restart: what was in flight or buffered waits to be issued again, but for groups of ``buffered``
        that were so: they are there again."""
        ledger = cls()
        for order, (epoch, uid, place, attempt, detail, tries) in enumerate(state["entries"]):
            where = Place(place)
            kept = where is Place.BUFFERED and GroupKey(epoch, uid, attempt) in buffered
            if where in (Place.IN_FLIGHT, Place.BUFFERED) and not kept:
                where = Place.TO_RETRY
            ledger._entries[epoch, uid] = _Entry(where, attempt, order, detail, Counter(tries))
            ledger._counts[where] += 1
        ledger.dropped_reasons.update(state["dropped_reasons"])
        ledger.discarded_lineage = int(state.get("discarded_lineage", 0))
        return ledger

    def roll_back(self, state: Mapping[str, Any], keep: Collection[GroupKey]) -> int:
        """Goes back to what ``state_dict`` said, while attempts go on counting, so that whatever is still on its way stays
        fenced: what was trained or dropped then is so again, groups of ``keep`` stay in flight or buffered, and
        everything else that has been issued waits to be issued again. Returns how many trained groups that undid."""
        ended = {(e, u): (Place(place), detail) for e, u, place, _, detail, _ in state["entries"]}
        undone = 0
        for where, entry in self._entries.items():
            place, detail = ended.get(where, (Place.TO_RETRY, ""))
            if place in _ENDED:
                self._move(entry, place)
                entry.detail = detail
            elif entry.place in _ENDED or GroupKey(*where, entry.attempt) not in keep:
                undone += entry.place is Place.TRAINED
                self._move(entry, Place.TO_RETRY)
        self.dropped_reasons = Counter(state["dropped_reasons"])
        self.check(recount=True)
        return undone

    def waiting(self) -> list[tuple[int, str]]:
        """(epoch, uid) of the prompts that wait to be issued again, oldest first."""
        return [where for where, entry in self._entries.items() if entry.place is Place.TO_RETRY]

    def _current(self, key: GroupKey, *places: Place) -> _Entry:
        entry = self._entries.get((key.epoch, key.uid))
        if entry is None or entry.attempt != key.attempt:
            raise LedgerError(f"{key} is not the current attempt ({entry})")
        self._require(entry, key, *places)
        return entry

    @staticmethod
    def _require(entry: _Entry, key: object, *places: Place) -> None:
        if entry.place not in places:
            raise LedgerError(f"{key} is {entry.place}, expected {' or '.join(places)}")

    def _move(self, entry: _Entry, place: Place) -> None:
        self._counts[entry.place] -= 1
        self._counts[place] += 1
        entry.place = place
