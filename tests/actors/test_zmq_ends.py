"""How a transfer by zmq ends: whole, given up, cancelled, with a receiver dead or frozen; and what it leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from actors.transports import zmq_server
from actors.transports.base import Member, Offer
from actors.transports.zmq_server import Server
from actors.transports.zmq_shelf import Shelf
from actors.transports.zmq_stream import ZmqReceiver, ZmqSender
from hapo_async.types import Version
from hapo_async.weights import Intake, TransferError
from tests.actors.zmq_rig import HOST, eventually, fetch, members, pieces, publish, same, weights

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

pytest_plugins = ["tests.actors.zmq_rig"]


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


@pytest.fixture(scope="module", autouse=True)
def children():
    """Two, which start while other tests run."""
    children = [Child(), Child()]
    yield children
    for child in children:
        child.process.kill()
        child.process.wait()


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
    assert time.monotonic() - started < 10 and sender.held() == (0, 0)
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
    assert 0.4 < time.monotonic() - started < 5


def test_a_fetch_of_somebody_who_never_answers_gives_up_at_its_deadline(sender, crew):
    receivers, _ = crew
    offer = sender.announce(Version(1, 1), "full", members(receivers))
    with socket.create_server((HOST, 0)) as mute:
        detail = {**offer.detail, "door": f"tcp://{HOST}:{mute.getsockname()[1]}"}
        started = time.monotonic()
        with pytest.raises(TransferError, match="deadline"):
            fetch(receivers[0], dataclasses.replace(offer, detail=detail), 0.5)
        assert time.monotonic() - started < 5


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
    assert time.monotonic() - started < 3
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
        process = psutil.Process()
        return process.num_threads(), process.num_fds()

    ZmqSender(HOST, 5.0).close()  # what libraries open once
    time.sleep(0.3)  # threads of other tests end
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
    assert eventually(lambda: all(now <= then for now, then in zip(held(), before, strict=True))), (held(), before)
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
        go_on.wait(60)

    offer = sender.announce(Version(1, 1), "full", members(receivers))
    stuck = pool.submit(receivers[0].receive, offer, time.monotonic() + 60, put)
    nbytes = publish(sender, Version(1, 1), weights()).manifest.nbytes
    assert first.wait(30) and sender.held() == (1, nbytes)
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
        go_on.wait(60)

    offer = sender.announce(Version(1, 1), "full", members(receivers))
    reader = pool.submit(receivers[0].receive, offer, time.monotonic() + 60, put)
    publish(sender, Version(1, 1), weights(1))
    assert first.wait(30)
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
    assert eventually(lambda: sender.held()[0] == 1)
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


# ---------------------------------------------------------------- the dead and the frozen


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
    assert time.monotonic() - started < 5
    assert all(same(f.result(), weights()) for f in fetches)
    sender.announce(Version(1, 2), "full", members(receivers[:2]))
    started = time.monotonic()
    publish(sender, Version(1, 2), weights(1))
    assert time.monotonic() - started < 5 and sender.held()[0] <= 2

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
