"""Faults in the middle of a weight transfer, for tests and for ``weights_chaos.py``: a learner rank and a generator that,
when they are armed, damage a bucket that passes through them, or end or stop a process of their own at that moment.

Nothing of this is in the product: both are subclasses, and what they wrap is what every transport has, ``Sender.send`` and
the ``put`` of ``Receiver.receive``.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray
import torch

from actors import transports
from actors.generator import GeneratorActor
from actors.learner import LearnerRank
from actors.transports import Data, Member, Offer, Put, Receiver, Sender
from actors.vllm_device import WorkerReceiver
from hapo_async.config import Config
from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest

DAMAGE = ("flip", "drop", "duplicate", "reorder", "swap")
"""flip: one bit. drop: a bucket never arrives. duplicate: it comes twice. reorder: it comes after the next one. swap: two
buckets change places under their headers."""

SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(frozen=True)
class Fault:
    """what: one of DAMAGE, or "kill" or "stop", with "-engine" behind it where the engine's process is meant. after: buckets
    of one transfer that pass untouched before. It happens once."""

    what: str
    after: int = 1


class Tamper:
    """What buckets pass through. armed: what is to happen. fired: what has. pace_s: seconds that each bucket is held up."""

    def __init__(self) -> None:
        self.armed: Fault | None = None
        self.fired: list[Fault] = []
        self.pace_s = 0.0
        self.passed = 0
        self._held: tuple[Fault, Bucket, Data] | None = None

    def begin(self) -> None:
        """A transfer begins."""
        self.passed, self._held = 0, None

    def pass_on(self, forward: Put, bucket: Bucket, data: Data) -> None:
        time.sleep(self.pace_s)
        if self._held is not None:
            (fault, first, kept), self._held = self._held, None
            pairs = [(bucket, data), (first, kept)] if fault.what == "reorder" else [(first, data), (bucket, kept)]
            for one, its in pairs:
                forward(one, its)
            return
        fault, self.passed = self.armed, self.passed + 1
        if fault is None or self.passed <= fault.after:
            forward(bucket, data)
            return
        self.armed = None
        self.fired.append(fault)
        self._do(fault, forward, bucket, data)

    def _do(self, fault: Fault, forward: Put, bucket: Bucket, data: Data) -> None:
        if fault.what in ("reorder", "swap"):
            self._held = fault, bucket, data
        elif fault.what == "flip":
            forward(bucket, _flipped(data))
        elif fault.what == "duplicate":
            forward(bucket, data)
            forward(bucket, data)
        elif fault.what != "drop":
            what, _, where = fault.what.partition("-")
            os.kill(engine_pid() if where else os.getpid(), SIGNALS[what])
            forward(bucket, data)


def _flipped(data: Data) -> Data:
    out = data.clone() if isinstance(data, torch.Tensor) else np.array(data)
    out[len(out) // 2] ^= 1
    return out


def engine_pid() -> int:
    """The process of this actor's vLLM engine: the largest of its children."""
    children = psutil.Process().children(recursive=True)
    if not children:
        raise RuntimeError("this generator's engine has no process of its own")
    return int(max(children, key=lambda p: p.memory_info().rss).pid)


class TamperedSender:
    """A Sender, and what its buckets pass through."""

    def __init__(self, inner: Sender, tamper: Tamper) -> None:
        self._inner, self._tamper = inner, tamper
        self.on_device = inner.on_device

    @property
    def is_broken(self) -> bool:
        return self._inner.is_broken

    def announce(self, version: Version, kind: str, members: Sequence[Member]) -> Offer | None:
        return self._inner.announce(version, kind, members)

    def admit(self, members: Sequence[Member]) -> None:
        self._inner.admit(members)

    def begin(self, version: Version, kind: str) -> None:
        self._tamper.begin()
        self._inner.begin(version, kind)

    def send(self, bucket: Bucket, data: Data) -> None:
        self._tamper.pass_on(self._inner.send, bucket, data)

    def commit(self, manifest: Manifest) -> Offer:
        return self._inner.commit(manifest)

    def abort(self, why: str) -> None:
        self._inner.abort(why)

    def close(self) -> None:
        self._inner.close()


class TamperedReceiver:
    """A Receiver, and what its buckets pass through."""

    def __init__(self, inner: Receiver, tamper: Tamper) -> None:
        self._inner, self._tamper = inner, tamper
        self.key = inner.key

    def receive(self, offer: Offer, deadline: float, put: Put) -> Manifest:
        self._tamper.begin()
        return self._inner.receive(offer, deadline, lambda bucket, data: self._tamper.pass_on(put, bucket, data))

    def cancel(self) -> None:
        self._inner.cancel()

    def close(self) -> None:
        self._inner.close()


class FaultyRank(LearnerRank):
    """A learner rank whose senders can be armed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tamper = Tamper()

    def _sender(self, transport: str) -> Sender:
        known = transport in self._senders
        inner = super()._sender(transport)
        if not known:
            self._senders[transport] = TamperedSender(inner, self.tamper)
        return self._senders[transport]

    @ray.method(concurrency_group="control")
    def arm(self, fault: Fault | None, pace_s: float = 0.0) -> None:
        """What is to happen in a next transfer, and how long each bucket is held up from now on."""
        self.tamper.armed, self.tamper.pace_s = fault, pace_s

    @ray.method(concurrency_group="control")
    def fired(self) -> list[Fault]:
        """What has happened since the last call."""
        return _taken(self.tamper)

    @ray.method(concurrency_group="control")
    def passed(self) -> int:
        """Buckets of the transfer that is under way, or of the last one."""
        return self.tamper.passed


class FaultyGenerator(GeneratorActor):
    """A generator whose receivers can be armed."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.tamper = Tamper()
        self._wrap()

    def _wrap(self) -> None:
        if not isinstance(
            self._receiver, WorkerReceiver
        ):  # vLLM's own processes receive: there is nothing to pass through
            self._receiver = TamperedReceiver(self._receiver, self.tamper)
        self._snapshots = TamperedReceiver(self._snapshots, self.tamper)

    async def arm(self, fault: Fault | None, pace_s: float = 0.0) -> None:
        """What is to happen in a next transfer, and how long each bucket is held up from now on."""
        self.tamper.armed, self.tamper.pace_s = fault, pace_s

    async def fired(self) -> list[Fault]:
        """What has happened since the last call."""
        return _taken(self.tamper)

    async def engine_pid(self) -> int:
        return engine_pid()

    async def become(self, config: dict[str, Any]) -> str:
        """Another transport or staging on the same engine, which takes long to start. Returns the new member key."""
        await self._give_up_arrivals()
        self._receiver.close()
        self.config = Config.model_validate(config)
        self._transport = self.config.transport(self.device == "cuda")
        self._receiver = self._new_receiver()
        self._snapshots = transports.receiver("ray", self.device, "")
        self._wrap()
        return self._receiver.key


def _taken(tamper: Tamper) -> list[Fault]:
    fired, tamper.fired = tamper.fired, []
    return fired
