"""Strangers, impostors and members that misbehave at the zmq transport's sockets: they cost little and end nothing."""

from __future__ import annotations

import contextlib
import logging
import os
import socket

import psutil
import pytest
import zmq

from actors.transports import zmq_guard, zmq_server, zmq_wire
from actors.transports.zmq_stream import ZmqSender
from hapo_async.types import Version
from hapo_async.weights import TransferError
from tests.actors.test_zmq_damage import raw_socket
from tests.actors.wires import Wire, crowd, talk
from tests.actors.zmq_rig import HOST, eventually, fetch, members, publish, same, weights

pytest_plugins = ["tests.actors.zmq_rig"]


def seat_port(sender: ZmqSender) -> int:
    return sender._server._seats["g0"].port


def through(sender: ZmqSender, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """The door tells members this port in place of their own."""
    encode = zmq_wire.encode

    def misled(op, **fields):
        return encode(op, **({"port": port} if op == "port" else fields))

    monkeypatch.setattr(zmq_server.zmq_wire, "encode", misled)


def test_what_was_recorded_of_a_member_opens_nothing_again(sender, crew, monkeypatch):
    """Every byte that a member said is said once more: each connection has keys of its own."""
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    wire = Wire(HOST, seat_port(sender))
    with monkeypatch.context() as patch:
        through(sender, patch, wire.port)
        assert same(fetch(receivers[0], offer), weights())
    assert len(wire.heard) == 1 and len(wire.heard[0]) > 2000
    served: list[object] = []
    serve = sender._server._serve
    monkeypatch.setattr(sender._server, "_serve", lambda *a: (served.append(a), serve(*a)))
    again = talk(seat_port(sender), bytes(wire.heard[0]))
    again.settimeout(10)
    told = b""
    with contextlib.suppress(OSError):
        while more := again.recv(65536):
            told += more
    assert len(told) < 2000 and not served, "a recording was answered"
    assert same(fetch(receivers[0], offer), weights()) and served
    wire.close()


@pytest.mark.parametrize("way", ["upstream", "downstream"])
def test_a_byte_that_is_changed_on_the_wire_ends_a_fetch_and_nothing_else(sender, crew, monkeypatch, way):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    for at in (3, 40, 300, 700, 1500):  # greeting, handshake, messages

        def change(data: bytes, begin: int, at: int = at) -> bytes:
            if not begin <= at < begin + len(data):
                return data
            return data[: at - begin] + bytes([data[at - begin] ^ 0x10]) + data[at - begin + 1 :]

        wire = Wire(HOST, seat_port(sender), **{way: change})
        with monkeypatch.context() as patch:
            through(sender, patch, wire.port)
            try:
                assert same(fetch(receivers[0], offer, 3.0), weights())
                assert at < 64, "only unused bytes of the greeting may be changed and not noticed"
            except TransferError:
                pass
        wire.close()
    assert same(fetch(receivers[0], offer), weights())


def test_endless_frames_of_a_member_are_cut_off(sender, crew, context, monkeypatch, caplog):
    """One message of very many frames, which libzmq would keep until the last one is there."""
    receivers, pool = crew
    sender.announce(Version(1, 1), "full", members(receivers[:2]))
    offer = publish(sender, Version(1, 1), weights())
    wire = Wire(HOST, seat_port(sender), rate=40e6)
    raw = raw_socket(context, sender, receivers[0], f"tcp://{HOST}:{wire.port}")
    raw.send(zmq_wire.encode("more", token=offer.detail["token"], after=0))
    assert raw.poll(10_000)
    with caplog.at_level(logging.WARNING):
        raw.send_multipart([b"x" * 4000] * 20_000, zmq.NOBLOCK)
        quick = pool.submit(fetch, receivers[1], offer)
        assert eventually(lambda: "it is cut off" in caplog.text, 20)
    assert same(quick.result(), weights())
    assert len(wire.heard[0]) < zmq_guard.SLACK + 16e6, "much more came than one look lets pass"
    raw.close()
    wire.close()
    assert same(fetch(receivers[0], offer), weights())


def test_an_honest_member_is_never_cut_off(sender, crew, caplog, monkeypatch):
    """However long it stays and however often it asks."""
    monkeypatch.setattr(zmq_guard, "SLACK", 3 * zmq_guard.PER_MESSAGE)
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    for _ in range(20):
        assert same(fetch(receivers[0], offer), weights())
    assert "cut off" not in caplog.text


def test_silent_strangers_are_sent_away_and_use_up_no_descriptors(crew, monkeypatch):
    monkeypatch.setattr(zmq_server, "HANDSHAKE_S", 1.0)
    receivers, pool = crew
    sender = ZmqSender(HOST, 20.0)
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    door = int(offer.detail["door"].rpartition(":")[2])
    with crowd(seat_port(sender), 200) as some, crowd(door, 200, b"\xff") as others:
        before = psutil.Process().num_fds() - 400  # the strangers' own ends are in this process too
        fetching = pool.submit(fetch, receivers[0], offer)
        assert same(fetching.result(timeout=20), weights())
        guards = [sender._server._door_guard, sender._server._seats["g0"].guard]
        assert eventually(lambda: all(g.connections <= zmq_guard.MOST_CONNECTIONS for g in guards), 10)
        assert eventually(lambda: all(g.connections == 0 for g in guards), 10), "they are never sent away"
        assert psutil.Process().num_fds() - 400 <= before
        for one in (some[0], others[0]):
            one.settimeout(5)
            with contextlib.suppress(ConnectionError):
                while one.recv(1000):
                    pass
    sender.close()


@pytest.mark.parametrize("kind", [zmq.REQ, zmq.ROUTER, zmq.PUB, zmq.PUSH, zmq.PAIR, zmq.SUB])
def test_the_right_key_in_another_kind_of_socket_harms_nobody(sender, crew, context, kind):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    raw = context.socket(kind)
    raw.linger = 0
    raw.curve_serverkey = sender._server.public_key
    raw.curve_publickey, raw.curve_secretkey = receivers[0]._keys
    if kind == zmq.SUB:
        raw.subscribe(b"")
    raw.connect(f"tcp://{HOST}:{seat_port(sender)}")
    with contextlib.suppress(zmq.ZMQError):
        raw.send(zmq_wire.encode("more", token=offer.detail["token"], after=0), zmq.NOBLOCK)
    if kind == zmq.REQ:
        assert not raw.poll(300) or b"one frame" in raw.recv()
    assert same(fetch(receivers[0], offer), weights())


def test_keys_are_in_no_offer_and_no_log(sender, crew, caplog):
    receivers, _ = crew
    with caplog.at_level(logging.DEBUG):
        sender.announce(Version(1, 1), "full", members(receivers[:1]))
        offer = publish(sender, Version(1, 1), weights())
        fetch(receivers[0], offer)
        with pytest.raises(TransferError):
            fetch(receivers[1], offer, 5.0)
    said = repr(offer) + repr(sender) + repr(receivers[0]) + caplog.text + repr(vars(offer))
    for secret in (sender._server._secret_key, receivers[0]._keys[1]):
        assert secret.decode() not in said


def test_a_descriptor_that_is_somebody_elses_by_now_is_left_alone(context):
    """A connection ended, its number was given out again, and the guard looks before it has heard of either."""
    bound = context.socket(zmq.ROUTER)
    guard = zmq_guard.Guard(bound)
    guard.port = bound.bind_to_random_port(f"tcp://{HOST}")
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    before = psutil.Process().num_fds()
    with contextlib.closing(ours), contextlib.closing(theirs):
        for number in (reader, ours.fileno(), 1 << 20):
            guard._peers[number] = zmq_guard._Peer(0.0)
        guard.look()
        assert guard.connections == 0 and psutil.Process().num_fds() == before
        assert os.write(writer, b"x") == 1 and os.read(reader, 1) == b"x"
        assert ours.send(b"y") == 1 and theirs.recv(1) == b"y"
    guard.close()
    bound.close(linger=0)
    os.close(reader)
    os.close(writer)
