"""The zmq transport over real sockets: what arrives is what was sent, members alone get it, and in their own time."""

from __future__ import annotations

import dataclasses
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch
import zmq

from actors.transports.base import Member
from actors.transports.zmq_client import Link, Patience
from actors.transports.zmq_stream import ZmqSender
from hapo_async.types import Version
from hapo_async.weights import Intake, Manifest, TransferError, pack
from tests.actors.zmq_rig import HOST, eventually, fetch, members, pieces, publish, same, weights

pytest_plugins = ["tests.actors.zmq_rig"]


@pytest.mark.parametrize("count", [1, 3])
def test_weights_arrive_bit_for_bit(sender, crew, count):
    receivers, pool = crew
    for step in (1, 2):
        tensors = weights(step)
        offer = sender.announce(Version(1, step), "full", members(receivers[:count]))
        assert offer.members is None and offer.manifest is None
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
    manifest = pool.submit(receivers[0].receive, offer, time.monotonic() + 30, put)
    tensors = weights()
    packed, expected = pieces(Version(1, 1), tensors)
    sender.begin(Version(1, 1), "full")
    for bucket, data in packed:
        sender.send(bucket, data)
        assert bucket.index or arrived.wait(30)
    assert not manifest.done()
    sender.commit(expected)
    assert manifest.result() == expected and same(dict(intake.commit(expected)), tensors)


def test_headers_of_many_tensors_come_in_pages(sender, crew):
    receivers, _ = crew
    tensors = {f"{'layer' * 100}.{i}": torch.full((1,), float(i)) for i in range(10_000)}
    packed = list(pack(tensors.items(), 4 * 1000))
    manifest = Manifest(Version(1, 1), tuple(bucket for bucket, _ in packed))
    sender.announce(Version(1, 1), "full", members(receivers))
    sender.begin(Version(1, 1), "full")
    for bucket, data in packed:
        sender.send(bucket, data)
    offer = sender.commit(manifest)
    transfer = sender._server._shelf.find(offer.detail["token"])
    assert 0 < len(transfer.page(0)) < len(packed) == 10
    assert same(fetch(receivers[0], offer), tensors)


def test_what_put_gets_is_writable_and_its_own(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    kept = {}
    receivers[0].receive(offer, time.monotonic() + 30, lambda bucket, data: kept.update({bucket.index: data}))
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
    assert time.monotonic() - started < 15
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


def test_a_members_socket_lets_nobody_else_in(sender, crew, context):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers[:2]))
    endpoint = f"tcp://{HOST}:{sender._server._seats['g0'].port}"
    link = Link(context, endpoint, offer.detail["server_key"], receivers[1]._keys, Patience(time.monotonic() + 5))
    link.ask("more", token=offer.detail["token"], after=0)
    with pytest.raises(TransferError, match="not a member's"):
        link.hear()


def test_a_wrong_server_key_is_noticed(sender, crew):
    receivers, _ = crew
    sender.announce(Version(1, 1), "full", members(receivers[:1]))
    offer = publish(sender, Version(1, 1), weights())
    other = dataclasses.replace(offer, detail={**offer.detail, "server_key": receivers[1].key})
    started = time.monotonic()
    with pytest.raises(TransferError, match="learner's key"):
        fetch(receivers[0], other)
    assert time.monotonic() - started < 15


@pytest.mark.parametrize("curve", [True, False])
def test_an_impostor_who_lets_everybody_in_is_noticed(sender, crew, context, curve):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers[:1]))
    impostor = context.socket(zmq.ROUTER)
    if curve:
        impostor.curve_server = True
        impostor.curve_secretkey = zmq.curve_keypair()[1]
    port = impostor.bind_to_random_port(f"tcp://{HOST}")
    detail = {**offer.detail, "door": f"tcp://{HOST}:{port}"}
    with pytest.raises(TransferError, match="learner's key"):
        fetch(receivers[0], dataclasses.replace(offer, detail=detail))


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


# ---------------------------------------------------------------- the slow, and the end of the learner


def test_a_slow_one_holds_up_nobody_and_gets_everything_later(sender, crew):
    receivers, pool = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers[:2]))
    intake, go_on = Intake(Version(1, 1)), threading.Event()

    def slowly(bucket, data):
        assert go_on.wait(60)
        intake.put(bucket, data)

    slow = pool.submit(receivers[0].receive, offer, time.monotonic() + 60, slowly)
    quick = pool.submit(fetch, receivers[1], offer)
    publish(sender, Version(1, 1), weights())
    assert same(quick.result(), weights()) and not slow.done()
    go_on.set()
    assert same(dict(intake.commit(slow.result())), weights())


def test_a_fetch_after_the_learner_is_gone_fails_at_once(crew):
    receivers, pool = crew
    sender = ZmqSender(HOST, 20.0)
    offer = sender.announce(Version(1, 1), "full", members(receivers[:1]))
    waiting = pool.submit(fetch, receivers[0], offer)
    assert eventually(lambda: sender._server._seats["g0"].parked)
    sender.close()
    with pytest.raises(TransferError, match="was lost"):
        waiting.result(timeout=30)
    with pytest.raises(TransferError, match="nobody listens"):
        fetch(receivers[0], offer)
    with pytest.raises(TransferError, match="has ended"):
        sender.begin(Version(1, 2), "full")
