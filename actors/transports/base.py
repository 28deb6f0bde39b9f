"""What every transport of weights does, on both ends. Bytes travel as the buckets of ``hapo_async.weights``.

    learner, rank 0                                   generator
    announce -> Offer ------- by way of the driver -> receive(offer, put)
    begin, send(bucket, data) ..., commit ---------->   put(bucket, data) ..., then the manifest
    abort, when the walk over the weights failed        TransferError; the old version serves on

A sender never blocks longer than the deadline for a receiver that died or stands still, and the others get everything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hapo_async.types import Version
from hapo_async.weights import Bucket, Data, Manifest

__all__ = ["Data", "Member", "Offer", "Published", "Put", "Receiver", "Sender"]

Put = Callable[[Bucket, Data], None]
"""Takes a bucket that has arrived: checks it, and stages it or writes it into the model. Raises TransferError. It may keep
``data``, which is never written to again."""


@dataclass(frozen=True)
class Member:
    """A generator that weights are sent to. name: the generator's. key: what the transport knows its receiver by (zmq: its
    public key); "" where it needs none."""

    name: str
    key: str = ""


@dataclass(frozen=True)
class Offer:
    """What a generator needs to fetch one version; the driver hands it on and looks at nothing else.

    members: names of those that it is meant for; None: anybody, at any time until the next versions came. manifest: where
    it is known before the buckets travel. detail: the transport's own, plain data and Ray references.
    """

    transport: str
    version: Version
    kind: str = "full"
    members: tuple[str, ...] | None = None
    manifest: Manifest | None = None
    detail: Mapping[str, Any] = field(default_factory=dict)

    def is_for(self, name: str) -> bool:
        return self.members is None or name in self.members


class Sender(Protocol):
    """The learner's end, on rank 0. Called from one thread, for one version at a time. is_broken: nothing can be sent by it
    any more; another one takes its place."""

    @property
    def is_broken(self) -> bool: ...

    on_device: bool
    """Whether buckets are sent from the device that the parameters are on; else from host memory."""

    def announce(self, version: Version, kind: str, members: Sequence[Member]) -> Offer | None:
        """Before the walk: what receivers need to take part. None: there is
        nothing to fetch before ``commit``. Raises TransferError."""

    def admit(self, members: Sequence[Member]) -> None:
        """Lets generators that came after ``announce`` fetch what is there. Called from any thread; where all take part in
        lockstep it does nothing: newcomers are members of the next version."""

    def begin(self, version: Version, kind: str) -> None:
        """Right before the first bucket."""

    def send(self, bucket: Bucket, data: Data) -> None:
        """One bucket. Waits where memory is bounded, at most until the deadline. Raises TransferError only when nobody can
        get this version any more."""

    def commit(self, manifest: Manifest) -> Offer:
        """After the last bucket: from now on a version may be installed. Raises TransferError."""

    def abort(self, why: str) -> None:
        """Instead of ``commit``: nobody must go on waiting for the rest."""

    def close(self) -> None:
        """Ends threads and sockets."""


class Receiver(Protocol):
    """A generator's end. ``receive`` runs in an executor thread; everything else must not block."""

    key: str
    """``Member.key`` of this receiver."""

    def receive(self, offer: Offer, deadline: float, put: Put) -> Manifest:
        """Fetches all buckets, in any order, each handed to ``put``, then returns the manifest that the learner committed.
        deadline: ``time.monotonic`` after which it gives up. Raises TransferError."""

    def cancel(self) -> None:
        """From another thread: a ``receive`` that is under way raises TransferError soon."""

    def close(self) -> None:
        """Ends threads and sockets."""


@dataclass(frozen=True)
class Published:
    """What became of one walk over the weights. offer: for generators; None when nobody can get this version, and then
    ``error`` says why. nbytes, seconds: what travelled and how long the walk took."""

    offer: Offer | None
    error: str = ""
    nbytes: int = 0
    seconds: float = 0.0
