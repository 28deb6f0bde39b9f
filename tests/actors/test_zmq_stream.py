"""The zmq transport over real sockets: what arrives is what was sent, and nobody holds up anybody else."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgpack
import numpy as np
import psutil
import pytest
import torch
import zmq

from actors.transports import wire, zmq_server, zmq_wire
from actors.transports.base import Member, Offer
from actors.transports.zmq_client import Link, Patience
from actors.transports.zmq_server import Server
from actors.transports.zmq_shelf import Shelf
from actors.transports.zmq_stream import ZmqReceiver, ZmqSender
from hapo_async.types import Version
from hapo_async.weights import Bucket, Intake, Manifest, TensorMeta, TransferError, digest, pack

HOST = "127.0.0.1"
BUCKET_BYTES = 200_000
PIECES = tuple[list[tuple[Bucket, np.ndarray]], Manifest]


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


def pieces(version: Version, tensors: dict[str, torch.Tensor]) -> PIECES:
    packed = list(pack(tensors.items(), BUCKET_BYTES))
    return packed, Manifest(version, tuple(bucket for bucket, _ in packed))


def publish(sender: ZmqSender, version: Version, tensors: dict[str, torch.Tensor]) -> Offer:
    packed, manifest = pieces(version, tensors)
    sender.begin(version, "full")
    for bucket, data in packed:
        sender.send(bucket, data)
    return sender.commit(manifest)


def fetch(receiver: ZmqReceiver, offer: Offer, seconds: float = 10.0) -> dict[str, torch.Tensor]:
    intake = Intake(offer.version, offer.kind)
    return dict(intake.commit(receiver.receive(offer, time.monotonic() + seconds, intake.put)))


def same(received: dict[str, torch.Tensor], sent: dict[str, torch.Tensor]) -> bool:
    def raw(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous().reshape(-1).view(torch.uint8)

    return list(received) == list(sent) and all(
        received[n].dtype == t.dtype and received[n].shape == t.shape and torch.equal(raw(received[n]), raw(t))
        for n, t in sent.items()
    )


def eventually(true: object, seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def sender():
    sender = ZmqSender(HOST, 20.0)
    yield sender
    sender.close()


@pytest.fixture
def crew():
    """Three receivers, and the threads that they fetch in."""
    receivers = [ZmqReceiver() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        yield receivers, pool
        for receiver in receivers:
            receiver.close()


def members(receivers: list[ZmqReceiver]) -> list[Member]:
    return [Member(f"g{i}", r.key) for i, r in enumerate(receivers)]


@pytest.mark.parametrize("count", [1, 3])
def test_weights_arrive_bit_for_bit(sender, crew, count):
    receivers, pool = crew
    for step in (1, 2):
        tensors = weights(step)
        offer = sender.announce(Version(1, step), "full", members(receivers[:count]))
        assert offer.members == tuple(f"g{i}" for i in range(count)) and offer.manifest is None
        fetches = [pool.submit(fetch, r, offer) for r in receivers[:count]]
        committed = publish(sender, Version(1, step), tensors)
        assert committed.members is None and len(committed.manifest.buckets) > 8
        assert all(same(f.result(), tensors) for f in fetches)
        assert same(fetch(receivers[0], committed), tensors)


def test_a_bucket_can_be_fetched_while_the_walk_goes_on(sender, crew):
    receivers, pool = crew
    arrived = threading.Event()
    intake = Intake(Version(1, 1))

    def put(bucket, data):
        intake.put(bucket, data)
        arrived.set()

    offer = sender.announce(Version(1, 1), "full", members(receivers[:1]))
    manifest = pool.submit(receivers[0].receive, offer, time.monotonic() + 10, put)
    tensors = weights()
    packed, expected = pieces(Version(1, 1), tensors)
    sender.begin(Version(1, 1), "full")
    for bucket, data in packed:
        sender.send(bucket, data)
        assert bucket.index or arrived.wait(5)
    assert not manifest.done()
    sender.commit(expected)
    assert manifest.result() == expected and same(dict(intake.commit(expected)), tensors)


def test_what_put_gets_is_writable_and_its_own(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    kept = {}
    receivers[0].receive(offer, time.monotonic() + 10, lambda bucket, data: kept.update({bucket.index: data}))
    assert all(data.flags.writeable and data.flags.owndata for data in kept.values())
    for data in kept.values():
        data[:] = 0
    assert same(fetch(receivers[0], offer), weights())


# ---------------------------------------------------------------- who may


def test_one_who_comes_late_is_admitted(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    started = time.monotonic()
    with pytest.raises(TransferError, match="not a member's"):
        fetch(receivers[1], offer)
    assert time.monotonic() - started < 5
    with ThreadPoolExecutor(1) as elsewhere:
        elsewhere.submit(sender.admit, [Member("late", receivers[1].key)]).result()
    assert same(fetch(receivers[1], offer), weights()) and same(fetch(receivers[0], offer), weights())


def test_a_new_process_under_an_old_name_takes_the_old_ones_place(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    sender.admit([Member("g0", receivers[1].key)])
    assert same(fetch(receivers[1], offer), weights())
    with pytest.raises(TransferError, match="not a member's"):
        fetch(receivers[0], offer)


def test_one_who_is_no_member_any_more_is_refused(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:2]))
    sender.announce(Version(1, 2), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 2), weights())
    with pytest.raises(TransferError, match="not a member's"):
        fetch(receivers[1], offer)


def test_a_members_socket_lets_nobody_else_in(sender, crew):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers[:2]))
    endpoint = f"tcp://{HOST}:{sender._server._seats['g0'].port}"
    context = zmq.Context()
    link = Link(context, endpoint, offer.detail["server_key"], receivers[1]._keys, Patience(time.monotonic() + 5))
    link.ask("more", token=offer.detail["token"], after=0)
    with pytest.raises(TransferError, match="not a member's"):
        link.hear()
    context.destroy(linger=0)


def test_a_wrong_server_key_is_noticed(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    other = dataclasses.replace(offer, detail={**offer.detail, "server_key": receivers[1].key})
    started = time.monotonic()
    with pytest.raises(TransferError, match="learner's key"):
        fetch(receivers[0], other)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("curve", [True, False])
def test_an_impostor_who_lets_everybody_in_is_noticed(sender, crew, curve):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers[:1]))
    context = zmq.Context()
    impostor = context.socket(zmq.ROUTER)
    if curve:
        impostor.curve_server = True
        impostor.curve_secretkey = zmq.curve_keypair()[1]
    port = impostor.bind_to_random_port(f"tcp://{HOST}")
    detail = {**offer.detail, "door": f"tcp://{HOST}:{port}"}
    with pytest.raises(TransferError, match="learner's key"):
        fetch(receivers[0], dataclasses.replace(offer, detail=detail))
    context.destroy(linger=0)


@pytest.mark.parametrize(
    "detail",
    [{}, {"door": "ipc:///tmp/x"}, {"door": 3}, {"server_key": "\0" * 40}, {"token": "x"}, {"more": 1}],
)
def test_an_offer_that_is_none_of_ours_is_refused(sender, crew, detail):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers[:1]))
    with pytest.raises(TransferError):
        fetch(receivers[0], dataclasses.replace(offer, detail={**offer.detail, **detail} if detail else {}))
    with pytest.raises(TransferError, match="offer for ray"):
        fetch(receivers[0], dataclasses.replace(offer, transport="ray"))


def test_only_the_given_address_is_listened_on(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers))
    listening = [c.laddr for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
    ours = {sender._server._seats[f"g{i}"].port for i in range(3)}
    assert len(ours) == 3 and ours <= {address.port for address in listening}
    assert {address.ip for address in listening if address.port in ours} == {HOST}


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "*", "example.org"])
def test_a_wildcard_or_a_name_is_no_address(address):
    with pytest.raises(ValueError):
        ZmqSender(address, 5.0)


def test_an_address_of_another_node_is_an_error():
    with pytest.raises(TransferError, match="has ended"):
        ZmqSender("192.0.2.1", 5.0)


# ---------------------------------------------------------------- the dead, the frozen and the slow

CHILD = """
import json, sys, time
from actors.transports.base import Offer
from actors.transports.zmq_stream import ZmqReceiver
from hapo_async.types import Version

def say(text):
    print(text, flush=True)

receiver = ZmqReceiver()
say(receiver.key)
detail = json.loads(sys.stdin.readline())

def put(bucket, data):
    say(f"bucket {bucket.index}")
    time.sleep(0.5 if bucket.index == 0 else 0)

try:
    receiver.receive(Offer("zmq", Version(1, 1), detail=detail), time.monotonic() + 30, put)
    say("whole")
except Exception as error:
    say(f"failed: {error}")
"""


class Child:
    """A receiver in a process of its own, which says what happens to it."""

    def __init__(self) -> None:
        root = Path(__file__).parents[2]
        self.process = subprocess.Popen(
            [sys.executable, "-c", CHILD], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> str:
        return self.process.stdout.readline().strip()

    def tell(self, offer: Offer) -> None:
        self.process.stdin.write(json.dumps(dict(offer.detail)) + "\n")
        self.process.stdin.flush()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def connections(self) -> list[str]:
        return [c.status for c in psutil.Process(self.process.pid).net_connections()]


@pytest.fixture(scope="module")
def children():
    """Two, which take a few seconds to start."""
    children = [Child(), Child()]
    yield children
    for child in children:
        child.process.kill()
        child.process.wait()


def test_the_dead_and_the_frozen_hold_up_nobody(children, crew, monkeypatch):
    monkeypatch.setattr(zmq_server, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(zmq_server, "SILENCE_S", 1.0)
    receivers, pool = crew
    doomed, frozen = children
    sender = ZmqSender(HOST, 20.0)
    names = [Member("doomed", doomed.hear()), Member("frozen", frozen.hear()), Member("never asks", receivers[2].key)]
    offer = sender.announce(Version(1, 1), "full", [*names, *members(receivers[:2])])
    for child in children:
        child.tell(offer)
    packed, manifest = pieces(Version(1, 1), weights())
    sender.begin(Version(1, 1), "full")
    sender.send(*packed[0])
    assert [child.hear() for child in children] == ["bucket 0", "bucket 0"]
    doomed.send(signal.SIGKILL)
    frozen.send(signal.SIGSTOP)

    fetches = [pool.submit(fetch, r, offer) for r in receivers[:2]]
    started = time.monotonic()
    for bucket, data in packed[1:]:
        sender.send(bucket, data)
    committed = sender.commit(manifest)
    assert time.monotonic() - started < 2
    assert all(same(f.result(), weights()) for f in fetches)
    sender.announce(Version(1, 2), "full", members(receivers[:2]))
    started = time.monotonic()
    publish(sender, Version(1, 2), weights(1))
    assert time.monotonic() - started < 2 and sender.held()[0] <= 2

    # What was queued for the frozen one is freed with its connection, and it notices when it wakes up.
    ports = {seat.port for seat in sender._server._seats.values()} | {int(sender._server.door.rpartition(":")[2])}

    def connected() -> int:
        found = psutil.Process().net_connections()
        return sum(c.status == psutil.CONN_ESTABLISHED and c.laddr.port in ports for c in found)

    assert eventually(lambda: connected() == 0)
    frozen.send(signal.SIGCONT)
    assert "failed: the connection to the learner was lost" in [frozen.hear() for _ in range(2 + len(packed))]
    assert committed.manifest == manifest
    sender.close()


def test_a_slow_one_gets_everything_in_its_own_time(sender, crew):
    receivers, pool = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers[:2]))
    intake = Intake(Version(1, 1))

    def slowly(bucket, data):
        time.sleep(0.1)
        intake.put(bucket, data)

    slow = pool.submit(receivers[0].receive, offer, time.monotonic() + 20, slowly)
    quick = pool.submit(fetch, receivers[1], offer)
    started = time.monotonic()
    publish(sender, Version(1, 1), weights())
    assert time.monotonic() - started < 0.9
    assert same(quick.result(), weights()) and not slow.done()
    assert same(dict(intake.commit(slow.result())), weights())


def test_a_fetch_after_the_learner_is_gone_fails_at_once(crew):
    receivers, pool = crew
    sender = ZmqSender(HOST, 20.0)
    offer = sender.announce(Version(1, 1), "full", members(receivers[:1]))
    waiting = pool.submit(fetch, receivers[0], offer)
    assert eventually(lambda: sender._server._seats["g0"].parked)
    sender.close()
    with pytest.raises(TransferError, match="was lost"):
        waiting.result(timeout=5)
    with pytest.raises(TransferError, match="nobody listens"):
        fetch(receivers[0], offer)
    with pytest.raises(TransferError, match="has ended"):
        sender.begin(Version(1, 2), "full")


# ---------------------------------------------------------------- damage


def tamper(sender: ZmqSender, monkeypatch: pytest.MonkeyPatch, change: object) -> None:
    """``change(header, data)`` returns the (header, data) pairs that are sent in place of each answer with data."""
    reply = sender._server._reply

    def tampered(source, peer, header, data=None):
        message = msgpack.unpackb(header)
        pairs = [(message, data)] if data is None else change(message, data)
        for changed, body in pairs:
            reply(source, peer, msgpack.packb(changed), body)

    monkeypatch.setattr(sender._server, "_reply", tampered)


def only(index: int, change: object) -> object:
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
            fetch(receivers[0], offer, 1.0 if "deadline" in message else 10.0)
    assert same(fetch(receivers[0], offer), weights())


def test_a_header_that_is_not_the_manifests_is_noticed(sender, crew, monkeypatch):
    """A renamed tensor: the bytes are right, and only the committed manifest tells."""
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = dataclasses.replace(publish(sender, Version(1, 1), weights()), manifest=None)
    transfer = sender._server._shelf.find(offer.detail["token"])
    monkeypatch.setitem(transfer.rows[2][3][0], 0, "layer.renamed")
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


def test_odd_requests_harm_nobody(sender, crew, tmp_path):
    receivers, _ = crew
    rng = random.Random(7)
    sender.announce(Version(1, 1), "full", members(receivers[:2]))
    offer = publish(sender, Version(1, 1), weights())
    context = zmq.Context()
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
        assert raw.poll(2000) and b"one frame" in raw.recv()
        raw.send(b"x" * 1_000_000)  # more than a request may have: the connection ends
        with contextlib.suppress(zmq.ZMQError):
            raw.send(zmq_wire.encode("where"))
    assert refused > 700
    assert same(fetch(receivers[1], offer), weights()) and same(fetch(receivers[0], offer), weights())
    assert not (tmp_path / "executed").exists()
    context.destroy(linger=0)


def test_strangers_on_the_ports_harm_nobody(sender, crew):
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
    context = zmq.Context()
    for endpoint in (offer.detail["door"], f"tcp://{HOST}:{ports[1]}"):  # without any key
        unknown = context.socket(zmq.DEALER)
        unknown.connect(endpoint)
        unknown.send(zmq_wire.encode("where"))
        assert not unknown.poll(200)
    assert same(fetch(receivers[0], offer), weights())
    context.destroy(linger=0)
    for stranger in silent:
        stranger.close()


def test_one_who_asks_without_reading_is_not_queued_for_without_bound(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:2]))
    offer = publish(sender, Version(1, 1), weights())
    large = next(b.index for b in offer.manifest.buckets if b.nbytes > 2 * zmq_wire.CHUNK)
    context = zmq.Context()
    raw = raw_socket(context, sender, receivers[0], f"tcp://{HOST}:{sender._server._seats['g0'].port}")
    raw.rcvhwm = 1
    before = psutil.Process().memory_info().rss
    for _ in range(400):
        raw.send(zmq_wire.encode("chunk", token=offer.detail["token"], index=large, offset=0))
    assert same(fetch(receivers[1], offer), weights())
    assert psutil.Process().memory_info().rss - before < 400 * zmq_wire.CHUNK / 2
    context.destroy(linger=0)


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


# ---------------------------------------------------------------- ends


def test_an_abort_wakes_up_those_who_wait(sender, crew):
    receivers, pool = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers))
    packed, _ = pieces(Version(1, 1), weights())
    sender.begin(Version(1, 1), "full")
    sender.send(*packed[0])
    waiting = [pool.submit(fetch, r, offer) for r in receivers[:2]]
    assert eventually(lambda: sum(len(s.parked) for s in list(sender._server._seats.values())) == 2)
    started = time.monotonic()
    sender.abort("the gather failed")
    for future in waiting:
        with pytest.raises(TransferError, match="the gather failed"):
            future.result()
    with pytest.raises(TransferError, match="the gather failed"):
        fetch(receivers[2], offer)
    assert time.monotonic() - started < 3 and sender.held() == (0, 0)
    sender.abort("again")
    sender.announce(Version(1, 2), "full", members(receivers))
    assert same(fetch(receivers[0], publish(sender, Version(1, 2), weights())), weights())


def test_an_aborted_version_leaves_the_one_before_it(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers))
    offer = publish(sender, Version(1, 1), weights())
    sender.announce(Version(1, 2), "full", members(receivers))
    sender.begin(Version(1, 2), "full")
    sender.abort("no")
    assert same(fetch(receivers[0], offer), weights())


def test_a_version_can_be_sent_again(sender, crew):
    receivers, pool = crew
    first = sender.announce(Version(1, 1), "full", members(receivers))
    waiting = pool.submit(fetch, receivers[0], first)
    assert eventually(lambda: sender._server._seats["g0"].parked)
    second = sender.announce(Version(1, 1), "full", members(receivers))
    with pytest.raises(TransferError, match="in its place"):
        waiting.result()
    waiting = pool.submit(fetch, receivers[0], second)
    publish(sender, Version(1, 1), weights(3))
    assert same(waiting.result(), weights(3))


def test_a_fetch_gives_up_at_its_deadline(sender, crew):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers))
    started = time.monotonic()
    with pytest.raises(TransferError, match="deadline"):
        fetch(receivers[0], offer, 0.5)
    assert 0.4 < time.monotonic() - started < 2


def test_a_fetch_of_somebody_who_never_answers_gives_up_at_its_deadline(sender, crew):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers))
    with socket.create_server((HOST, 0)) as mute:
        detail = {**offer.detail, "door": f"tcp://{HOST}:{mute.getsockname()[1]}"}
        started = time.monotonic()
        with pytest.raises(TransferError, match="deadline"):
            fetch(receivers[0], dataclasses.replace(offer, detail=detail), 0.5)
        assert time.monotonic() - started < 2


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_fetch_can_be_ended_from_another_thread(sender, crew, end):
    receivers, pool = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers))
    waiting = pool.submit(fetch, receivers[0], offer)
    assert eventually(lambda: sender._server._seats["g0"].parked)
    started = time.monotonic()
    getattr(receivers[0], end)()
    with pytest.raises(TransferError, match="cancelled"):
        waiting.result()
    assert time.monotonic() - started < 1
    committed = publish(sender, Version(1, 1), weights())
    if end == "cancel":
        assert same(fetch(receivers[0], committed), weights())
    else:
        with pytest.raises(TransferError, match="closed"):
            fetch(receivers[0], committed)


def test_a_refusal_by_put_ends_the_fetch(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers))
    offer = publish(sender, Version(1, 1), weights())

    def put(bucket, data):
        raise TransferError("no room")

    with pytest.raises(TransferError, match="no room"):
        receivers[0].receive(offer, time.monotonic() + 5, put)
    assert same(fetch(receivers[0], offer), weights())


def test_nothing_is_left_after_close():
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), psutil.Process().num_fds()

    ZmqSender(HOST, 5.0).close()  # what libraries open once
    before = held()
    sender, receivers = ZmqSender(HOST, 5.0), [ZmqReceiver() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        offer = sender.announce(Version(1, 1), "full", members(receivers))
        waiting = [pool.submit(fetch, r, offer) for r in receivers]
        publish(sender, Version(1, 1), weights())
        assert all(same(w.result(), weights()) for w in waiting)
        offer = sender.announce(Version(1, 2), "full", members(receivers))
        waiting = [pool.submit(fetch, r, offer) for r in receivers[:2]]
        assert eventually(lambda: all(sender._server._seats[f"g{i}"].parked for i in (0, 1)))
        assert held()[0] > before[0]
        started = time.monotonic()
        receivers[0].close()
        sender.close()
        assert time.monotonic() - started < 3
        assert all(isinstance(w.exception(), TransferError) for w in waiting)
    assert eventually(lambda: held() == before), (held(), before)
    sender.close()


def test_a_forked_child_cannot_use_the_sender(sender):
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                sender.begin(Version(1, 1), "full")
            except TransferError:
                sender.close()
                code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert sender.held() == (0, 0)


# ---------------------------------------------------------------- memory


def test_two_versions_are_kept_at_most(sender, crew):
    receivers, pool = crew
    go_on, first = threading.Event(), threading.Event()

    def put(bucket, data):
        first.set()
        go_on.wait(20)

    offer = sender.announce(Version(1, 1), "full", members(receivers))
    stuck = pool.submit(receivers[0].receive, offer, time.monotonic() + 20, put)
    nbytes = publish(sender, Version(1, 1), weights()).manifest.nbytes
    assert first.wait(5) and sender.held() == (1, nbytes)
    for step in (2, 3, 4):
        packed, manifest = pieces(Version(1, step), weights(step))
        newer = sender.announce(Version(1, step), "full", members(receivers))
        sender.begin(Version(1, step), "full")
        for bucket, data in packed:
            sender.send(bucket, data)
            assert sender.held()[0] == 2
        sender.commit(manifest)
        # 1.1 stays while it is being read, until there is another.
        assert sender.held() == ((2, 2 * nbytes) if step == 2 else (1, nbytes))
    go_on.set()
    with pytest.raises(TransferError, match=r"1\.1 is no longer kept"):
        stuck.result()
    assert same(fetch(receivers[1], newer), weights(4))


def test_an_older_version_goes_when_its_last_reader_is_done(sender, crew):
    receivers, pool = crew
    go_on, first = threading.Event(), threading.Event()
    intake = Intake(Version(1, 1))

    def put(bucket, data):
        intake.put(bucket, data)
        first.set()
        go_on.wait(20)

    offer = sender.announce(Version(1, 1), "full", members(receivers))
    reader = pool.submit(receivers[0].receive, offer, time.monotonic() + 20, put)
    publish(sender, Version(1, 1), weights(1))
    assert first.wait(5)
    sender.announce(Version(1, 2), "full", members(receivers))
    publish(sender, Version(1, 2), weights(2))
    assert sender.held()[0] == 2
    go_on.set()
    assert same(dict(intake.commit(reader.result())), weights(1))
    assert eventually(lambda: sender.held()[0] == 1)


def test_one_who_stopped_asking_keeps_no_older_version(crew):
    receivers, _ = crew
    sender = ZmqSender(HOST, 0.5)
    sender.announce(Version(1, 1), "full", members(receivers))
    offer = publish(sender, Version(1, 1), weights())

    def put(bucket, data):
        raise TransferError("it dies here")

    with pytest.raises(TransferError):
        receivers[0].receive(offer, time.monotonic() + 5, put)
    sender.announce(Version(1, 2), "full", members(receivers))
    publish(sender, Version(1, 2), weights())
    assert eventually(lambda: sender.held()[0] == 1, 3)
    sender.close()


def test_the_shelf_says_why_a_version_is_gone():
    shelf = Shelf(lambda token: False)
    tokens = []
    for step in range(1, 40):
        tokens.append(shelf.open(Version(1, step), "full").token)
        shelf.begin(Version(1, step), "full")
    with pytest.raises(TransferError, match=r"gave up sending 1\.38: 1\.39 came"):
        shelf.find(tokens[-2])
    with pytest.raises(TransferError, match="no such transfer"):
        shelf.find(tokens[0])
    assert shelf.find(tokens[-1]).version == Version(1, 39)
    with pytest.raises(TransferError, match="no transfer is open"):
        Shelf(lambda token: False).filling()


def test_headers_of_many_tensors_come_in_pages(sender, crew):
    receivers, _ = crew
    tensors = {f"{'layer' * 80}.{i}": torch.full((1,), float(i)) for i in range(30_000)}
    packed = list(pack(tensors.items(), 4 * 3000))
    manifest = Manifest(Version(1, 1), tuple(bucket for bucket, _ in packed))
    sender.announce(Version(1, 1), "full", members(receivers))
    sender.begin(Version(1, 1), "full")
    for bucket, data in packed:
        sender.send(bucket, data)
    offer = sender.commit(manifest)
    transfer = sender._server._shelf.find(offer.detail["token"])
    assert 0 < len(transfer.page(0)) < len(packed) == 10
    assert same(fetch(receivers[0], offer), tensors)


def test_the_server_dies_of_a_defect_loudly_and_not_silently(crew, monkeypatch, caplog):
    receivers, pool = crew
    sender = ZmqSender(HOST, 5.0)
    offer = sender.announce(Version(1, 1), "full", members(receivers))
    waiting = pool.submit(fetch, receivers[0], offer)
    assert eventually(lambda: sender._server._seats["g0"].parked)

    def defect(self):
        raise RuntimeError("a defect")

    monkeypatch.setattr(Server, "_turn", defect)
    sender._server._ring()
    with pytest.raises(TransferError, match="was lost"):
        waiting.result()
    with pytest.raises(TransferError, match="has ended: a defect"):
        sender.begin(Version(1, 1), "full")
    assert "a defect" in caplog.text
    sender.close()
