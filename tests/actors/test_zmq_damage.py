"""The zmq transport notices what is not as it was sent, and messages that make no sense harm nobody."""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path

import msgpack
import numpy as np
import psutil
import pytest
import torch
import zmq

from actors.transports import wire, zmq_wire
from actors.transports.zmq_stream import ZmqSender
from hapo_async.types import Version
from hapo_async.weights import Bucket, TensorMeta, TransferError, digest
from tests.actors.zmq_rig import HOST, eventually, fetch, members, pieces, publish, same, weights

pytest_plugins = ["tests.actors.zmq_rig"]


def tamper(sender: ZmqSender, monkeypatch: pytest.MonkeyPatch, change: Callable) -> None:
    """``change(header, data)`` returns the (header, data) pairs that are sent in place of each answer with data."""
    reply = sender._server._reply

    def tampered(source, peer, header, data=None):
        message = msgpack.unpackb(header)
        pairs = [(message, data)] if data is None else change(message, data)
        for changed, body in pairs:
            reply(source, peer, msgpack.packb(changed), body)

    monkeypatch.setattr(sender._server, "_reply", tampered)


def only(index: int, change: Callable) -> Callable:
    return lambda header, data: change(header, data) if header["index"] == index else [(header, data)]


def flip(header, data):
    damaged = data.copy()
    damaged[len(damaged) // 2] ^= 0x10
    return [(header, damaged)]


class Swap:
    """Sends bucket 3 in place of 4 and the other way round; ``headers``: each with its own header, out of turn."""

    def __init__(self, headers: bool) -> None:
        self.headers = headers
        self.first: tuple[dict, np.ndarray] | None = None

    def __call__(self, header, data):
        if header["index"] == 3:
            self.first = (header, data)
            return []
        if header["index"] != 4:
            return [(header, data)]
        first, held = self.first
        return [(header, data), (first, held)] if self.headers else [(first, data), (header, held)]


DAMAGE = {
    "flipped": (lambda: only(3, flip), "digest"),
    "flipped manifest": (lambda: only(zmq_wire.MANIFEST, flip), "manifest was damaged"),
    "dropped": (lambda: only(3, lambda header, data: []), "lost, repeated or moved"),
    "the last dropped": (lambda: only(zmq_wire.MANIFEST, lambda header, data: []), "before the deadline"),
    "duplicated": (lambda: only(3, lambda header, data: [(header, data)] * 2), "lost, repeated or moved"),
    "reordered": (lambda: Swap(headers=True), "lost, repeated or moved"),
    "exchanged": (lambda: Swap(headers=False), "digest"),
    "cut": (lambda: only(3, lambda header, data: [(header, data[:-1])]), "chunk of"),
    "too long": (lambda: only(3, lambda header, data: [(header, np.append(data, data[:1]))]), "chunk of"),
    "no data": (lambda: only(3, lambda header, data: [(header, None)]), "number of frames"),
    "of another transfer": (lambda: only(3, lambda h, d: [({**h, "token": "0" * 32}, d)]), "another transfer"),
    "elsewhere": (lambda: only(3, lambda h, d: [({**h, "offset": zmq_wire.CHUNK}, d)]), "lost, repeated or moved"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_noticed_and_never_committed(sender, crew, monkeypatch, kind):
    receivers, _ = crew
    make, message = DAMAGE[kind]
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    with monkeypatch.context() as patch:
        tamper(sender, patch, make())
        with pytest.raises(TransferError, match=message):
            fetch(receivers[0], offer, 1.0 if "deadline" in message else 30.0)
    assert same(fetch(receivers[0], offer), weights())


def test_a_header_that_is_not_the_manifests_is_noticed(sender, crew):
    """A renamed tensor: the bytes are right, and only the committed manifest tells."""
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = dataclasses.replace(publish(sender, Version(1, 1), weights()), manifest=None)
    transfer = sender._server._shelf.find(offer.detail["token"])
    renamed = (dataclasses.replace(transfer.buckets[2].tensors[0], name="layer.renamed"),)
    transfer.buckets[2] = dataclasses.replace(transfer.buckets[2], tensors=renamed)
    with pytest.raises(TransferError, match="not that of the buckets"):
        fetch(receivers[0], offer)


def test_a_version_that_was_not_offered_is_refused(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    for wrong in ({"version": Version(1, 2)}, {"kind": "adapter"}):
        with pytest.raises(TransferError, match="manifest"):
            fetch(receivers[0], dataclasses.replace(offer, **wrong))


def test_a_manifest_of_other_buckets_is_not_committed(sender, crew):
    receivers, _ = crew
    packed, manifest = pieces(Version(1, 1), weights())
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    sender.begin(Version(1, 1), "full")
    for bucket, data in packed[:-1]:
        sender.send(bucket, data)
    with pytest.raises(TransferError, match="does not list"):
        sender.commit(manifest)
    with pytest.raises(TransferError, match="not the next one"):
        sender.send(*packed[0])
    with pytest.raises(TransferError, match=r"the manifest is of full 1\.9"):
        sender.commit(dataclasses.replace(manifest, version=Version(1, 9)))


# ---------------------------------------------------------------- messages that make no sense


class Boom:
    """Would leave a mark if anybody unpickled it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


def mutated(rng: random.Random, raw: bytes) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        kind, at = rng.randrange(4), rng.randrange(len(changed) + 1)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del changed[at : at + rng.randint(1, 8)]
        elif kind == 2:
            changed[at:at] = rng.randbytes(rng.randint(1, 8))
        else:
            changed = changed[: max(1, at)]
        changed = changed or bytearray(b"\xc0")
    return bytes(changed)


def odd_values(rng: random.Random) -> object:
    return rng.choice(
        [None, True, -1, -2, 2**63, 2**64 - 1, 1.5, float("nan"), "", "x" * 3000, b"\xff", [], {}, [[[]]], {"op": 1}]
    )


def odd_requests(rng: random.Random, token: str) -> list[bytes]:
    good = [
        {"op": "where"},
        {"op": "more", "token": token, "after": 0},
        {"op": "chunk", "token": token, "index": 0, "offset": 0},
        {"op": "done", "token": token},
    ]
    requests = []
    for _ in range(500):
        message = dict(rng.choice(good))
        kind = rng.randrange(4)
        if kind == 0:
            requests.append(rng.randbytes(rng.randint(0, 200)))
        elif kind == 1:
            requests.append(mutated(rng, msgpack.packb(message)))
        elif kind == 2:
            message[rng.choice([*message, "extra"])] = odd_values(rng)
            requests.append(msgpack.packb(message))
        else:
            message.update(token="f" * 32, index=rng.randrange(9), offset=rng.randrange(2**40))
            requests.append(msgpack.packb({k: v for k, v in message.items() if rng.random() < 0.9}))
    return requests


def raw_socket(context, sender, receiver, endpoint):
    raw = context.socket(zmq.DEALER)
    raw.linger = 0
    raw.curve_serverkey = sender._server.public_key
    raw.curve_publickey, raw.curve_secretkey = receiver._keys
    raw.connect(endpoint)
    return raw


def test_odd_requests_harm_nobody(sender, crew, context, tmp_path):
    receivers, _ = crew
    rng = random.Random(7)
    sender.announce(Version(1, 1), "full", members(receivers[:2]))
    offer = publish(sender, Version(1, 1), weights())
    seat = f"tcp://{HOST}:{sender._server._seats['g0'].port}"
    requests = odd_requests(rng, offer.detail["token"])
    requests += [pickle.dumps(Boom(tmp_path / "executed"))] * 2
    refused = 0
    for endpoint in (offer.detail["door"], seat):
        raw = raw_socket(context, sender, receivers[0], endpoint)
        for request in requests:
            raw.send(request)
            if raw.poll(20 if b"more" in request or b"done" in request else 2000):
                refused += msgpack.unpackb(raw.recv_multipart()[0])["op"] == "refused"
        raw.send_multipart([b"x"] * 50)
        assert eventually(lambda raw=raw: raw.poll(100) and b"one frame" in raw.recv_multipart()[0])
        raw.send(b"x" * 1_000_000)  # more than a request may have: the connection ends
        with contextlib.suppress(zmq.ZMQError):
            raw.send(zmq_wire.encode("where"))
    assert refused > 700
    assert same(fetch(receivers[1], offer), weights()) and same(fetch(receivers[0], offer), weights())
    assert not (tmp_path / "executed").exists()


def test_strangers_on_the_ports_harm_nobody(sender, crew, context):
    receivers, _ = crew
    rng = random.Random(8)
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    ports = [int(offer.detail["door"].rpartition(":")[2]), sender._server._seats["g0"].port]
    silent = [socket.create_connection((HOST, port)) for port in ports * 10]
    for turn in range(60):
        with socket.create_connection((HOST, ports[turn % 2])) as stranger, contextlib.suppress(OSError):
            greeting = b"\xff\0\0\0\0\0\0\0\1\x7f\3\1CURVE" if turn % 3 else b"GET / HTTP/1.1\r\n\r\n"
            stranger.sendall(greeting + rng.randbytes(rng.randint(0, 500)))
    for endpoint in (offer.detail["door"], f"tcp://{HOST}:{ports[1]}"):  # without any key
        unknown = context.socket(zmq.DEALER)
        unknown.linger = 0
        unknown.connect(endpoint)
        unknown.send(zmq_wire.encode("where"))
        assert not unknown.poll(200)
    assert same(fetch(receivers[0], offer), weights())
    for stranger in silent:
        stranger.close()


def test_one_who_asks_without_reading_is_not_queued_for_without_bound(sender, crew, context):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:2]))
    offer = publish(sender, Version(1, 1), weights())
    large = next(b.index for b in offer.manifest.buckets if b.nbytes > 2 * zmq_wire.CHUNK)
    raw = raw_socket(context, sender, receivers[0], f"tcp://{HOST}:{sender._server._seats['g0'].port}")
    raw.rcvhwm = 1
    before = psutil.Process().memory_info().rss
    for _ in range(400):
        raw.send(zmq_wire.encode("chunk", token=offer.detail["token"], index=large, offset=0))
    assert same(fetch(receivers[1], offer), weights())
    assert psutil.Process().memory_info().rss - before < 400 * zmq_wire.CHUNK / 2


def test_odd_answers_end_a_fetch_and_nothing_else(sender, crew, monkeypatch, tmp_path):
    """Headers are mutated on their way: a fetch then fails with TransferError, or has the right weights all the same."""
    receivers, _ = crew
    rng = random.Random(9)
    tensors = {f"t{i}": torch.arange(20 * i, dtype=torch.float32) for i in range(20)}
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), tensors)
    reply, left = sender._server._reply, [0]
    boom = pickle.dumps(Boom(tmp_path / "executed"))

    def odd(source, peer, header, data=None):
        left[0] -= 1
        if left[0] == 0:
            message = msgpack.unpackb(header)
            if rng.random() < 0.4:
                message[rng.choice([*message, "extra"])] = odd_values(rng)
                header = msgpack.packb(message)
            else:
                header = boom if rng.random() < 0.1 else mutated(rng, header)
        reply(source, peer, header, data)

    monkeypatch.setattr(sender._server, "_reply", odd)
    failed = 0
    for _ in range(150):
        left[0] = rng.randint(1, 5)
        try:
            assert same(fetch(receivers[0], offer, 2.0), tensors)
        except TransferError:
            failed += 1
    assert failed > 120 and not (tmp_path / "executed").exists()
    monkeypatch.undo()
    assert same(fetch(receivers[0], offer), tensors)


def test_headers_decode_to_what_they_were_or_not_at_all():
    rng = random.Random(10)
    _, manifest = pieces(Version(1, 2), weights())
    raw = wire.encode_manifest(manifest)
    assert wire.decode_manifest(raw) == manifest
    other = 0
    for _ in range(1500):
        changed = mutated(rng, raw)
        try:
            found = wire.decode_manifest(changed)
        except TransferError:
            continue
        other += found != manifest
        assert all(sum(t.nbytes for t in b.tensors) == b.nbytes for b in found.buckets)
        assert all(t.dtype in wire.DTYPES for b in found.buckets for t in b.tensors)
    assert other < 300  # letters of names and digests; the digest of the whole manifest covers those


BUCKET = Bucket(0, (TensorMeta("a", "float32", (2, 3)),), 24, digest(np.zeros(24, np.uint8)))


@pytest.mark.parametrize(
    "wrong",
    [
        {"nbytes": 20},
        {"nbytes": -1},
        {"nbytes": wire.MAX_BUCKET + 1},
        {"index": -1},
        {"index": True},
        {"digest": "x"},
        {"tensors": (TensorMeta("a", "float32", (-2, -3)),)},
        {"tensors": (TensorMeta("a", "float32", (2.0, 3)),)},
        {"tensors": (TensorMeta("a", "nn", (2, 3)),)},
        {"tensors": (TensorMeta("a", "complex64", (1, 3)),)},
        {"tensors": (TensorMeta("", "float32", (2, 3)),)},
        {"tensors": (TensorMeta("a" * 513, "float32", (2, 3)),)},
        {"tensors": (TensorMeta("a", "float32", (1,) * 9),), "nbytes": 4},
        {"tensors": (TensorMeta("a", "float32", (2**48, 2**48, 2**48, 0)),), "nbytes": 24},
        {"tensors": (TensorMeta("a", "float32", (0,)),) * (wire.MAX_TENSORS + 1), "nbytes": 0},
        {"tensors": (TensorMeta("a" * 500, "float32", (0,)),) * 5000, "nbytes": 0},
    ],
)
def test_a_header_outside_the_schema_is_refused(wrong):
    assert wire.decode_bucket(wire.encode_bucket(BUCKET)) == BUCKET
    with pytest.raises(TransferError):
        wire.decode_bucket(msgpack.packb(wire.bucket_row(dataclasses.replace(BUCKET, **wrong))))
    with pytest.raises((TransferError, AttributeError)):
        wire.encode_bucket(dataclasses.replace(BUCKET, **wrong))
