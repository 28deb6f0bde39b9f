"""Weights through Ray's object store: rank 0 puts the buckets there, and whoever holds the offer fetches them.

The store keeps a version for as long as an offer of it is held, on the learner's node and on those that have fetched it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import numpy as np
import ray

from actors.transports.base import Data, Member, Offer, Put
from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest, TransferError

POLL_S = 0.5  # how soon a cancelled fetch ends


class RaySender:
    """Rank 0's end."""

    is_broken = False
    on_device = False

    def __init__(self) -> None:
        self._refs: list[ray.ObjectRef] = []

    def announce(self, version: Version, kind: str, members: Sequence[Member]) -> Offer | None:
        return None

    def admit(self, members: Sequence[Member]) -> None:
        pass  # an offer is all that it takes

    def begin(self, version: Version, kind: str) -> None:
        self._refs = []

    def send(self, bucket: Bucket, data: Data) -> None:
        assert isinstance(data, np.ndarray)
        try:
            self._refs.append(ray.put(data))
        except ray.exceptions.RayError as error:  # no memory, no disk to spill to
            raise TransferError(f"bucket {bucket.index} does not go into the object store: {error}") from error

    def commit(self, manifest: Manifest) -> Offer:
        refs, self._refs = self._refs, []
        return Offer("ray", manifest.version, manifest.kind, None, manifest, {"refs": refs})

    def abort(self, why: str) -> None:
        self._refs = []

    def close(self) -> None:
        self._refs = []


class RayReceiver:
    """A generator's end."""

    key = ""

    def __init__(self) -> None:
        self._cancelled = threading.Event()

    def receive(self, offer: Offer, deadline: float, put: Put) -> Manifest:
        """One bucket at a time, so that this node's memory holds one more than what has been staged. Raises TransferError,
        also for a bucket that died with the learner."""
        assert offer.manifest is not None
        self._cancelled.clear()
        for bucket, ref in zip(offer.manifest.buckets, offer.detail["refs"], strict=False):
            put(bucket, self._get(offer.version, bucket, ref, deadline))
        return offer.manifest

    def _get(self, version: Version, bucket: Bucket, ref: ray.ObjectRef, deadline: float) -> np.ndarray:
        while not self._cancelled.is_set():
            left = deadline - time.monotonic()
            try:
                data: np.ndarray = ray.get(ref, timeout=max(0.01, min(POLL_S, left)))
                return data
            except ray.exceptions.GetTimeoutError:
                if left <= POLL_S:
                    raise TransferError(f"version {version}: bucket {bucket.index} was not there in time") from None
            except ray.exceptions.RayError as error:
                raise TransferError(f"version {version}: bucket {bucket.index} is lost: {error}") from error
        raise TransferError(f"version {version}: fetching it was cancelled")

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self.cancel()
