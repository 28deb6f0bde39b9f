"""What the tests of the zmq transport share: weights, a sender and receivers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import zmq

from actors.transports import zmq_wire
from actors.transports.base import Member, Offer
from actors.transports.zmq_stream import ZmqReceiver, ZmqSender
from hapo_async.types import Version
from hapo_async.weights import Bucket, Intake, Manifest, pack

HOST = "127.0.0.1"
BUCKET_BYTES = 200_000
Pieces = tuple[list[tuple[Bucket, np.ndarray]], Manifest]


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    """Eleven buckets: many dtypes, an empty tensor, a scalar, and one of more than two chunks in a bucket of its own."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {f"layer.{i}": torch.randn(200, 200, generator=generator) for i in range(8)}
    tensors["large"] = torch.randn(2 * zmq_wire.CHUNK // 4 + 1000, generator=generator)
    tensors["half"] = torch.randn(301, generator=generator).bfloat16()
    tensors["scalar"] = torch.tensor(2.5 + seed)
    tensors["none"] = torch.empty(0)
    tensors["small"] = torch.randn(7, generator=generator).to(torch.float8_e4m3fn)
    tensors["mask"] = torch.tensor([True, False])
    return tensors


def pieces(version: Version, tensors: dict[str, torch.Tensor]) -> Pieces:
    packed = list(pack(tensors.items(), BUCKET_BYTES))
    return packed, Manifest(version, tuple(bucket for bucket, _ in packed))


def publish(sender: ZmqSender, version: Version, tensors: dict[str, torch.Tensor]) -> Offer:
    packed, manifest = pieces(version, tensors)
    sender.begin(version, "full")
    for bucket, data in packed:
        sender.send(bucket, data)
    return sender.commit(manifest)


def fetch(receiver: ZmqReceiver, offer: Offer, seconds: float = 30.0) -> dict[str, torch.Tensor]:
    intake = Intake(offer.version, offer.kind)
    return dict(intake.commit(receiver.receive(offer, time.monotonic() + seconds, intake.put)))


def same(received: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return list(received) == list(sent) and all(
        received[n].dtype == t.dtype and received[n].shape == t.shape and torch.equal(raw(received[n]), raw(t))
        for n, t in sent.items()
    )


def eventually(true: Callable[[], object], seconds: float = 30.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def sender():
    with contextlib.closing(ZmqSender(HOST, 20.0)) as sender:
        yield sender


@pytest.fixture
def context():
    with zmq.Context() as context:
        context.blocky = False
        yield context
        context.destroy(linger=0)


@pytest.fixture
def crew() -> Iterator[tuple[list[ZmqReceiver], ThreadPoolExecutor]]:
    """And the threads that they fetch in."""
    receivers = [ZmqReceiver() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        yield receivers, pool
        for receiver in receivers:
            receiver.close()


def members(receivers: list[ZmqReceiver]) -> list[Member]:
    return [Member(f"g{i}", r.key) for i, r in enumerate(receivers)]
