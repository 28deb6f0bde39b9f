"""The order in which prompts are used, and a cursor that survives a restart."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from hapo_async.errors import DataError
from hapo_async.types import Prompt


class PromptStream:
    """Walks the prompts epoch by epoch.

    The order depends on (seed, epoch) and on the uids alone: each epoch sorts the prompts by a keyed hash, so it does
    not change with library versions or with the order of the file's rows. epochs: 0 means endless.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True, epochs: int = 0) -> None:
        if not prompts:
            raise DataError("there are no prompts to train on. Give data.train at least one usable row.")
        assert len({p.uid for p in prompts}) == len(prompts), "uids are unique"
        self._prompts = tuple(prompts)
        self._seed, self._shuffle, self._epochs = seed, shuffle, epochs
        self._epoch = self._position = 0
        self._order = self._order_of(0)

    def __len__(self) -> int:
        """Prompts per epoch."""
        return len(self._prompts)

    def next(self) -> tuple[int, Prompt] | None:
        """The epoch and the next prompt; None once all epochs are used."""
        if self.exhausted:
            return None
        item = self._epoch, self._prompts[self._order[self._position]]
        self._position += 1
        if self._position == len(self._prompts):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._order_of(self._epoch)
        return item

    @property
    def exhausted(self) -> bool:
        return bool(self._epochs) and self._epoch >= self._epochs

    def by_uid(self) -> dict[str, Prompt]:
        """All prompts by uid: a checkpoint names in-flight prompts only."""
        return {p.uid: p for p in self._prompts}

    def cursor(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        return {
            "epoch": self._epoch,
            "position": self._position,
            "seed": self._seed,
            "shuffle": self._shuffle,
            "exhausted": self.exhausted,
            "prompts": len(self._prompts),
            "digest": self._digest(),
        }

    def restore(self, cursor: Mapping[str, Any]) -> None:
        """Continues at a cursor. Raises DataError when the data, the seed or the shuffling have changed since."""
        for key, now in (
            ("prompts", len(self._prompts)),
            ("digest", self._digest()),
            ("seed", self._seed),
            ("shuffle", self._shuffle),
        ):
            if cursor[key] != now:
                raise DataError(
                    f"the checkpoint's data cursor was made with {key}={cursor[key]!r}, now it is {now!r}: the run "
                    "would not continue where it stopped. Use the same data and seed, or a new run.dir."
                )
        self._epoch, self._position = int(cursor["epoch"]), int(cursor["position"])
        self._order = self._order_of(self._epoch)

    def _order_of(self, epoch: int) -> list[int]:
        if not self._shuffle:
            return list(range(len(self._prompts)))
        return keyed_order([p.uid for p in self._prompts], f"{self._seed}/{epoch}")

    def _digest(self) -> str:
        uids = [p.uid for p in self._prompts]
        return hashlib.sha256("\n".join(sorted(uids) if self._shuffle else uids).encode()).hexdigest()[:16]


def keyed_order(uids: Sequence[str], key: str) -> list[int]:
    """Indices of ``uids`` in a pseudo-random order that depends on the key and the uids alone."""
    secret = hashlib.sha256(key.encode()).digest()
    return sorted(
        range(len(uids)),
        key=lambda i: (hashlib.blake2b(uids[i].encode(), key=secret, digest_size=16).digest(), uids[i]),
    )
