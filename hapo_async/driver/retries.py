"""Prompts that are issued again, and those that are given up: each kind of failure has its own bound."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

from actors.calls import CallFailed
from hapo_async.errors import RunError
from hapo_async.group_stats import length_bucket
from hapo_async.ledger import Ledger
from hapo_async.quarantine import Quarantine
from hapo_async.types import GroupKey

MAX_REFUSALS = 3  # a prompt that engines or verifiers refuse this often is dropped
MAX_LATE = 2  # ... and one that is too late this often
UNKNOWN = "unknown"


class Retries:
    """The queue of prompts that wait to be issued again.

    most_failures: so many prompts may fail for good; one more ends the run. late_lengths: answers that were thrown away
    because they had grown too old, by ``length_bucket`` of their tokens so far.
    """

    def __init__(self, ledger: Ledger, most_failures: int) -> None:
        self.quarantine = Quarantine()
        self.late_lengths: Counter[str] = Counter()
        self._ledger = ledger
        self._most_failures = most_failures
        self._queue: deque[tuple[int, str]] = deque(ledger.waiting())

    def __len__(self) -> int:
        return len(self._queue)

    def pop(self) -> tuple[int, str]:
        """(epoch, uid) of the one that waits longest."""
        return self._queue.popleft()

    def failed(self, key: GroupKey, step: int, error: CallFailed) -> None:
        """Infrastructure failed. What died with a generator is never charged to the prompt; one that is refused again and
        again is dropped. step: the learner step that is being made. Raises RunError when that happens to too many."""
        blameless = error.gone or error.lost
        tries = self._ledger.retry(key, "lost" if blameless else "refused")
        if blameless or tries < MAX_REFUSALS:
            self._queue.append((key.epoch, key.uid))
            return
        self._ledger.drop(key, "failed")
        self.quarantine.add(key, step, f"failed: {error}", tries)
        count = self._ledger.dropped_reasons["failed"]
        if count > self._most_failures:
            raise RunError(f"{count} prompts failed {MAX_REFUSALS} times each; the last: {error}")

    def hopeless(self, key: GroupKey, step: int, why: str, lengths: Sequence[int]) -> None:
        """The prompt's own truth fells every judge: whatever is sampled for it, nothing will come of it."""
        self._ledger.drop(key, "unjudgeable")
        self.quarantine.add(key, step, f"unjudgeable: {why}", 1, lengths)

    def recalled(self, key: GroupKey, reason: str = "recalled") -> None:
        """A group that is not wanted now, or that died with who held it. Nobody is to blame."""
        self._ledger.retry(key, reason)
        self._queue.append((key.epoch, key.uid))

    def look_again(self) -> None:
        """The ledger went back to a checkpoint: what waits to be issued is what it says."""
        self._queue = deque(self._ledger.waiting())

    def late(self, key: GroupKey, reason: str) -> int:
        """A group would grow, or has grown, too old. Returns how often this prompt was; at MAX_LATE it is dropped."""
        tries = self._ledger.retry(key, reason)
        if tries >= MAX_LATE:
            self._ledger.drop(key, "late")
        else:
            self._queue.append((key.epoch, key.uid))
        return tries

    def record_late(self, key: GroupKey, step: int, tries: int, lengths: Sequence[int] | None) -> None:
        """What was thrown away with a late group, once that is known. lengths: tokens so far of each answer."""
        self.late_lengths.update([UNKNOWN] if lengths is None else [str(length_bucket(n)) for n in lengths])
        if tries >= MAX_LATE:
            self.quarantine.add(key, step, "late", tries, lengths)
