"""Strangers at the sockets of collectives, of Ray and of vLLM: they hold up nobody, and end nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from actors.transports import group, lines
from actors.transports.base import Member
from actors.transports.collective import CollectiveReceiver, CollectiveSender
from hapo_async.types import Version
from hapo_async.weights import Intake, Manifest, TransferError, pack
from tests import listening
from tests.actors.wires import HOST, crowd, talk

TOKEN = lines.new_token()


@pytest.fixture
def exchange():
    """Waits for two members, of whom the second has come."""
    made = lines.Exchange(HOST, TOKEN, (1, 2))
    with contextlib.closing(made):
        second = lines.Line(HOST, made.port, TOKEN, 2, 5.0)
        assert made.gather(time.monotonic() + 0.3) == {1}
        yield made
        second.close("done")


HELLOS = {
    "nothing": (),
    "half a hello": (b"0" * 20,),
    "a wrong token": (b"0" * 32 + b"00000001",),
    "garbage": (random.Random(1).randbytes(100_000),),
    "no number": (b"0" * 32 + b"-0000001",),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",),
}


@pytest.mark.parametrize("kind", list(HELLOS))
def test_strangers_hold_up_no_member(exchange, kind):
    joined: list[lines.Line] = []

    def join() -> None:
        joined.append(lines.Line(HOST, exchange.port, TOKEN, 1, 5.0))

    with crowd(exchange.port, 200, *HELLOS[kind]):
        threading.Timer(0.3, join).start()
        began = time.monotonic()
        assert exchange.gather(began + 10) == set()
        assert time.monotonic() - began < 2.0
        assert len(exchange._callers) <= lines.MOST_CALLERS and exchange.lost(0.0) == {}
        exchange.go()
        assert joined[0].wait_for_go(time.monotonic() + 5, threading.Event())
        joined[0].close("done")


def test_the_right_token_lets_each_rank_in_once(exchange):
    token = TOKEN.encode()
    hellos = [b"00000002", b"00000007", b"00000000", "²".encode() * 4]
    strangers = [talk(exchange.port, token + rank) for rank in hellos]
    assert exchange.gather(time.monotonic() + 0.3) == {1}
    for stranger in strangers:
        assert stranger.recv(1) == b"", "it was let in"
    one = lines.Line(HOST, exchange.port, TOKEN, 1, 5.0)
    assert exchange.gather(time.monotonic() + 5) == set() and exchange.lost(0.0) == {}
    one.close("done")


def test_one_who_says_a_byte_now_and_then_is_sent_away(exchange, monkeypatch):
    monkeypatch.setattr(lines, "HELLO_S", 0.4)
    slow = talk(exchange.port, b"0")
    stop = threading.Event()

    def drip() -> None:
        with contextlib.suppress(OSError):
            while not stop.wait(0.1):
                slow.sendall(b"0")

    threading.Thread(target=drip, daemon=True).start()
    exchange.gather(time.monotonic() + 1.2)
    assert not exchange._callers
    stop.set()
    slow.close()


def test_strangers_who_come_without_end_hold_up_no_member(exchange):
    stop = threading.Event()

    def come() -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError):
                talk(exchange.port, b"x" * 50).close()

    comers = [threading.Thread(target=come, daemon=True) for _ in range(2)]
    for comer in comers:
        comer.start()
    time.sleep(0.3)
    began = time.monotonic()
    line = lines.Line(HOST, exchange.port, TOKEN, 1, 5.0)
    assert exchange.gather(time.monotonic() + 8) == set()
    assert time.monotonic() - began < 5
    stop.set()
    for comer in comers:
        comer.join()
    line.close("done")


@pytest.mark.parametrize("address", ["0.0.0.0", "::", ""])
def test_members_meet_on_no_wildcard(address):
    with pytest.raises(ValueError):
        lines.Exchange(address, TOKEN, (1,))


# ---------------------------------------------------------------- the collective and its store


def store_frames() -> list[bytes]:
    """What torch's store does not expect: no magic number, sizes that nobody has, queries that were cut."""
    rng, magic = random.Random(2), struct.pack("<BI", 0, 0x3C85F7CE)
    sizes = [struct.pack("<BQ", query, size) for query in range(16) for size in (0, 2**31, 2**63, 2**64 - 1)]
    queries = [magic + rng.randbytes(rng.randint(1, 300)) for _ in range(100)]
    return [b"", b"GET / HTTP/1.1\r\n\r\n", rng.randbytes(10_000), magic, *(magic + s for s in sizes), *queries]


def ports() -> set[int]:
    """Where this process listens."""
    found = psutil.Process().net_connections("inet")
    return {c.laddr.port for c in found if c.status == psutil.CONN_LISTEN}


def test_strangers_end_no_epoch(caplog):
    """They talk to the line, to the store and to gloo's own listeners, before an epoch meets and while weights travel."""
    sender, receiver = CollectiveSender("gloo", HOST, "cpu", 15.0), CollectiveReceiver("gloo", HOST, "cpu")
    tensors = {"a": torch.randn(300_000), "b": torch.randn(10)}
    before = ports()
    with contextlib.ExitStack() as stack:
        stack.callback(sender.close)
        stack.callback(receiver.close)
        pool = stack.enter_context(ThreadPoolExecutor(1))
        for step in (1, 2, 3):
            version = Version(1, step)
            offer = sender.announce(version, "full", [Member("g0", receiver.key)])
            for port in ports() - before:
                frames = store_frames() if port == offer.detail["store_port"] else [b"", b"\0" * 8, b"x" * 1000]
                for frame in frames:
                    stack.enter_context(contextlib.closing(talk(port, frame)))
            intake = Intake(version)
            manifest = pool.submit(receiver.receive, offer, time.monotonic() + 15, intake.put)
            sender.begin(version, "full")
            for port in ports() - before:
                stack.enter_context(contextlib.closing(talk(port, b"\0" * 8)))
            buckets = []
            for bucket, data in pack(tensors.items(), 1 << 20):
                sender.send(bucket, data)
                buckets.append(bucket)
            sender.commit(Manifest(version, tuple(buckets)))
            assert all(torch.equal(t, tensors[n]) for n, t in intake.commit(manifest.result(15)))
        assert offer.detail["epoch"] == 1
    assert "broken" not in caplog.text


def test_a_store_lives_on_after_what_strangers_say():
    store = group.serve(HOST, time.monotonic() + 20)
    with contextlib.ExitStack() as stack:
        before = psutil.Process().memory_info().rss
        for frame in store_frames():
            stack.enter_context(contextlib.closing(talk(store.port, frame)))
        visitor = dist.PrefixStore("x", group.visit(HOST, store.port, time.monotonic() + 10))
        visitor.set("key", "value")
        assert dist.PrefixStore("x", store).get("key") == b"value"
        assert psutil.Process().memory_info().rss - before < 100e6


def test_an_offer_of_another_epoch_is_no_place_in_this_one():
    """A token that is not the epoch's: its line is closed, and the receiver says so long before its deadline."""
    sender, receiver = CollectiveSender("gloo", HOST, "cpu", 1.0), CollectiveReceiver("gloo", HOST, "cpu")
    offer = sender.announce(Version(1, 1), "full", [Member("g0", receiver.key)])
    other = dataclasses.replace(offer, detail={**offer.detail, "token": lines.new_token()})
    began = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        beginning = pool.submit(sender.begin, Version(1, 1), "full")
        with pytest.raises(TransferError):
            receiver.receive(other, time.monotonic() + 10, lambda bucket, data: None)
        assert isinstance(beginning.exception(10), TransferError)
    assert time.monotonic() - began < 5
    sender.close()
    receiver.close()


# ---------------------------------------------------------------- Ray and vLLM


def test_ray_refuses_whoever_has_not_its_token(ray_session):
    import grpc

    address = ray_session.get_runtime_context().gcs_address
    token = (Path.home() / ".ray" / "auth_token").read_text().strip()
    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")
        for word in (None, "Bearer wrong", f"Bearer {token}x", f"Bearer {token[:-1]}", token):
            with pytest.raises(grpc.RpcError) as refused:
                ask(b"", timeout=10, metadata=[("authorization", word)] if word else None)
            assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED, word
        assert len(ask(b"", timeout=10, metadata=[("authorization", f"Bearer {token}")])) > 10


@pytest.mark.parametrize("kind", ["vllm", "vllm of two ranks"])
def test_vllm_listens_on_no_wildcard(generators, kind):
    served = generators.served(kind)
    tree = listening.of_tree(served.pid)
    assert not {x for x in tree if x.is_open_to_all}, listening.told(x for x in tree if x.is_open_to_all)
    assert {x.where for x in tree if x.kind != "abstract"} <= listening.LOOPBACK
    assert served.engine_pids
