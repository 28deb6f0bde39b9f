"""The collective transport between real processes: every byte, membership epochs, and what each kind of failure costs."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import re
import signal
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import xxhash

from actors.transports.base import Member
from actors.transports.collective import LAST_WORDS_S, CollectiveReceiver, CollectiveSender
from hapo_async import config
from hapo_async.driver.setup import check_transport
from hapo_async.errors import ConfigError
from hapo_async.types import Version
from hapo_async.weights import Manifest, TransferError, pack
from tests.actors import collective_member
from tools import gpu_check

DEADLINE_S = 3.0
PATIENCE_S = 20.0
PROMPT_S = 2.5  # what is noticed "at once" on a busy machine


class Process:
    """A member's process, from outside. pending: what it has said and nobody has asked for."""

    def __init__(self, context: Any, name: str) -> None:
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=collective_member.main, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.pending: list[tuple[str, Any]] = []
        self.member = Member(name, "")

    def tell(self, what: str, *arguments: Any) -> None:
        self.pipe.send((what, arguments))

    def hear(self, what: str) -> Any:
        """The answer to ``what``."""
        until = time.monotonic() + PATIENCE_S
        while True:
            for i, (name, answer) in enumerate(self.pending):
                if name == what:
                    del self.pending[i]
                    return answer
            assert self.pipe.poll(max(0.0, until - time.monotonic())), f"{self.name} said nothing about {what}"
            self.pending.append(self.pipe.recv())

    def ask(self, what: str, *arguments: Any) -> Any:
        self.tell(what, *arguments)
        return self.hear(what)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(PATIENCE_S)


@pytest.fixture(scope="module")
def started():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.actors.collective_member"])
    processes: list[Process] = []

    def start(name: str) -> Process:
        processes.append(Process(context, name))
        return processes[-1]

    made = {name: start(name) for name in ("g0", "g1", "g2")}
    yield SimpleNamespace(start=start, made=made)
    for one in processes:
        one.kill()


@pytest.fixture
def crew(started):
    """g0, g1 and g2, none of them in an epoch; one that died in the test before is a new process."""
    for name, one in started.made.items():
        if not one.process.is_alive():
            started.made[name] = one = started.start(name)
        one.pending.clear()
        one.member = Member(name, one.ask("renew"))
    yield list(started.made.values())
    for one in started.made.values():
        if one.process.is_alive():
            one.ask("close")


@pytest.fixture
def sender():
    made = CollectiveSender("gloo", "127.0.0.1", "cpu", DEADLINE_S)
    yield made
    made.close()


def weights(seed: int, megabytes: float = 0.01) -> dict[str, torch.Tensor]:
    """Four tensors, the large ones of this size."""
    torch.manual_seed(seed)
    count = int(megabytes * 250_000)
    return {
        "a": torch.randn(count),
        "b": torch.randn(7).bfloat16(),
        "c": torch.randn(count, 1),
        "d": torch.randint(9, (count,), dtype=torch.int32),
    }


def prints(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {n: xxhash.xxh3_64_hexdigest(t.view(torch.uint8).numpy()) for n, t in tensors.items()}


def publish(sender: CollectiveSender, version: Version, tensors: dict[str, torch.Tensor]) -> Any:
    """What ``actors.weights.publish`` does without a model."""
    sender.begin(version, "full")
    buckets = []
    for bucket, data in pack(tensors.items(), max(t.nbytes for t in tensors.values())):
        sender.send(bucket, data)
        buckets.append(bucket)
    return sender.commit(Manifest(version, tuple(buckets)))


def begin(sender: CollectiveSender, crew: list[Process], step: int, **faults: str) -> Any:
    """Announces a version to all and lets them receive; faults: by name, the signal that one sends itself."""
    offer = sender.announce(Version(1, step), "full", [one.member for one in crew])
    for one in crew:
        one.tell("receive", offer, DEADLINE_S + 1.0, faults.get(one.name, ""))
    return offer


def whole(sender: CollectiveSender, crew: list[Process], step: int) -> Any:
    """Publishes a version that must reach everybody; its offer."""
    tensors = weights(step)
    offer = begin(sender, crew, step)
    publish(sender, offer.version, tensors)
    assert [one.hear("received") for one in crew] == [prints(tensors)] * len(crew)
    return offer


def error_of(one: Process) -> str:
    answer = one.hear("received")
    assert "error" in answer, f"{one.name} received a version that was not whole"
    return answer["error"]


# ---------------------------------------------------------------- as it should be


def test_versions_arrive_bit_for_bit_and_an_epoch_lasts_until_its_members_change(sender, crew):
    epochs = [whole(sender, crew[:1], step).detail["epoch"] for step in (1, 2)]
    epochs += [whole(sender, crew, step).detail["epoch"] for step in (3, 4, 5)]  # two join
    epochs += [whole(sender, crew[1:], step).detail["epoch"] for step in (6, 7)]  # one leaves
    assert epochs == [1, 1, 2, 2, 2, 3, 3]
    for state in (collective_member.process_state(), *(one.ask("state") for one in crew)):
        assert set(state["listens"]) <= {"127.0.0.1"}
    assert crew[1].ask("state")["listens"], "a member of a gloo group listens somewhere: the check above saw nothing"


def test_a_new_process_under_an_old_name_makes_a_new_epoch(sender, crew):
    before = whole(sender, crew[:2], 1)
    crew[0].ask("close")
    crew[0].member = Member("g0", crew[0].ask("renew"))
    after = whole(sender, crew[:2], 2)
    assert after.members == before.members and after.detail["epoch"] == before.detail["epoch"] + 1


def test_without_members_nothing_waits(sender):
    offer = sender.announce(Version(1, 1), "full", [])
    assert publish(sender, offer.version, weights(1)).members == ()


def test_many_epochs_leave_no_threads_and_no_descriptors_behind(sender, crew):
    whole(sender, crew[:2], 1)
    whole(sender, crew[:1], 2)
    before = [collective_member.process_state(), crew[0].ask("state")]
    for step in range(3, 23, 2):
        whole(sender, crew[:2], step)
        whole(sender, crew[:1], step + 1)
    until = time.monotonic() + PATIENCE_S
    while True:  # an epoch that was left ends in a thread of its own
        after = [collective_member.process_state(), crew[0].ask("state")]
        if all(a[k] <= b[k] for a, b in zip(after, before, strict=True) for k in ("threads", "files")):
            return
        assert time.monotonic() < until, f"{before} became {after}"
        time.sleep(0.05)


# ---------------------------------------------------------------- damage on the way


def damaged(sender: CollectiveSender, part: int) -> Any:
    """From now on byte 3 of this part of a bucket's three (head, header, bytes) is changed, once."""
    group, calls = sender._epoch.group, []
    inner = group.broadcast

    def broadcast(data: torch.Tensor, deadline: float) -> Any:
        calls.append(data)
        if len(calls) == part:
            data = data.clone()
            data.view(torch.uint8)[3] ^= 4
        return inner(data, deadline)

    group.broadcast = broadcast
    return calls


def test_a_damaged_bucket_is_refused_and_the_epoch_goes_on(sender, crew):
    first = whole(sender, crew[:2], 1)
    offer = begin(sender, crew[:2], 2)
    damaged(sender, 2 + 3)  # BEGIN has two parts
    publish(sender, offer.version, weights(2))
    for one in crew[:2]:
        assert "bucket 0: the digest does not match" in error_of(one)
    assert whole(sender, crew[:2], 3).detail["epoch"] == first.detail["epoch"]


@pytest.mark.parametrize("part", [1, 2])
def test_a_damaged_header_ends_the_epoch_and_the_next_is_whole(sender, crew, part):
    first = whole(sender, crew[:2], 1)
    offer = begin(sender, crew[:2], 2)
    damaged(sender, 2 + part)
    began = time.monotonic()
    with pytest.raises(TransferError, match=r"epoch 1: .*g[01]: .*(no frame|damaged)"):
        publish(sender, offer.version, weights(2))
    assert time.monotonic() - began < PROMPT_S
    for one in crew[:2]:
        assert re.search("no frame|header was damaged", error_of(one))
    assert whole(sender, crew[:2], 3).detail["epoch"] == first.detail["epoch"] + 1


def test_a_version_that_the_learner_gives_up_is_no_failure_of_the_epoch(sender, crew):
    first = whole(sender, crew[:2], 1)
    begin(sender, crew[:2], 2)
    sender.begin(Version(1, 2), "full")
    sender.send(*next(iter(pack(weights(2).items(), 1000))))
    sender.abort("the disk is full")
    for one in crew[:2]:
        assert "given up: the disk is full" in error_of(one)
    assert whole(sender, crew[:2], 3).detail["epoch"] == first.detail["epoch"]


# ---------------------------------------------------------------- members that fail


def test_a_killed_member_is_noticed_at_once_and_the_others_miss_one_version(sender, crew):
    whole(sender, crew, 1)
    offer = begin(sender, crew, 2, g1="SIGKILL")
    began = time.monotonic()
    with pytest.raises(TransferError, match=r"epoch 1: .*g1: its process is gone"):
        publish(sender, offer.version, weights(2, megabytes=8))
    for one in (crew[0], crew[2]):
        error_of(one)
    assert time.monotonic() - began < PROMPT_S
    with pytest.raises(TransferError, match="g1: its process is gone"):
        sender.commit(Manifest(offer.version, ()))
    # The dead one is not waited for, whatever list it is still on.
    offer = sender.announce(Version(1, 3), "full", [one.member for one in crew])
    assert offer.members == ("g0", "g2") and offer.detail["epoch"] == 2
    whole(sender, [crew[0], crew[2]], 4)


def test_a_frozen_member_costs_one_deadline_and_is_named(sender, crew):
    whole(sender, crew, 1)
    offer = begin(sender, crew, 2, g1="SIGSTOP")
    began = time.monotonic()
    try:
        with pytest.raises(TransferError, match=r"epoch 1: stuck before bucket \d.*; no word from g1$"):
            publish(sender, offer.version, weights(2, megabytes=8))
        assert DEADLINE_S - 0.1 < time.monotonic() - began < DEADLINE_S + LAST_WORDS_S + PROMPT_S
        for one in (crew[0], crew[2]):
            error_of(one)
        whole(sender, [crew[0], crew[2]], 3)
    finally:
        os.kill(crew[1].process.pid, signal.SIGCONT)
    assert "version 1.2" in error_of(crew[1])  # it comes to, and finds itself alone
    whole(sender, crew, 4)


def test_a_member_that_never_comes_costs_one_deadline_and_is_named(sender, crew):
    offer = sender.announce(Version(1, 1), "full", [one.member for one in crew])
    for one in crew[:2]:
        one.tell("receive", offer, PATIENCE_S)
    began = time.monotonic()
    with pytest.raises(TransferError, match="2 of 3 came, g2 did not"):
        sender.begin(offer.version, "full")
    assert DEADLINE_S - 0.1 < time.monotonic() - began < DEADLINE_S + 1.0
    for one in crew[:2]:
        assert "not all members came" in error_of(one)
    whole(sender, crew, 2)


def test_a_member_that_stops_receiving_says_so_and_frees_the_others(sender, crew):
    whole(sender, crew, 1)
    begin(sender, crew, 2)
    sender.begin(Version(1, 2), "full")
    crew[2].ask("cancel")
    assert "cancelled" in error_of(crew[2])
    with pytest.raises(TransferError, match=r"g2: .*cancelled"):
        for bucket, data in pack(weights(2, megabytes=8).items(), 1):
            sender.send(bucket, data)
    for one in crew[:2]:
        error_of(one)
    whole(sender, crew, 3)


def test_a_learner_that_is_gone_ends_a_receive_at_once(crew):
    sender = CollectiveSender("gloo", "127.0.0.1", "cpu", DEADLINE_S)
    offer = sender.announce(Version(1, 1), "full", [one.member for one in crew[:1]])
    crew[0].tell("receive", offer, PATIENCE_S)
    sender.begin(offer.version, "full")
    began = time.monotonic()
    sender.close()
    assert time.monotonic() - began < 1.0
    error_of(crew[0])
    assert time.monotonic() - began < PROMPT_S
    crew[0].tell("receive", offer, PATIENCE_S)  # nobody listens there any more
    error_of(crew[0])


def test_only_who_has_the_token_is_let_in(crew):
    sender = CollectiveSender("gloo", "127.0.0.1", "cpu", 0.5)
    offer = sender.announce(Version(1, 1), "full", [crew[0].member])
    with contextlib.ExitStack() as stack:
        for hello in (b"0" * 32 + b"00000001", b"short", bytes(40)):
            caller = stack.enter_context(socket.create_connection(("127.0.0.1", offer.detail["port"])))
            caller.sendall(hello)
        with pytest.raises(TransferError, match="0 of 1 came, g0 did not"):
            sender.begin(offer.version, "full")
    sender.close()


def test_who_is_no_member_is_told_so(sender):
    offer = sender.announce(Version(1, 1), "full", [])
    with pytest.raises(TransferError, match="no member"):
        CollectiveReceiver("gloo", "127.0.0.1", "cpu").receive(offer, time.monotonic() + 1, lambda bucket, data: None)
    with pytest.raises(TransferError, match="g0 has no key"):
        sender.announce(Version(1, 2), "full", [Member("g0")])


# ---------------------------------------------------------------- before anything starts


@pytest.mark.parametrize(
    ("tree", "gpus", "message"),
    [
        ({"weights": {"transport": "nccl"}}, False, r"moves weights between GPUs, and there are none.*gloo"),
        ({"weights": {"transport": "nccl"}}, None, r"none\. Use weights\.transport=auto"),
        ({"weights": {"transport": "nccl", "staging": "host"}}, True, r"Use weights\.staging=device"),
        ({"weights": {"transport": "nccl"}, "learner": {"lora": {"rank": 8}}}, True, "sends full models"),
        ({"weights": {"transport": "ipc"}}, True, r"needs generator\.placement=colocated"),
    ],
)
def test_transports_of_gpus_are_refused_where_they_cannot_work(tree, gpus, message):
    if gpus is None and torch.cuda.is_available():
        pytest.skip("this machine has GPUs")
    with pytest.raises(ConfigError, match=message):
        check_transport(config.parse(tree), gpus)


def test_they_pass_where_they_can():
    check_transport(config.parse({"weights": {"transport": "nccl"}}), True)
    shared = {"weights": {"transport": "ipc"}, "generator": {"placement": "colocated"}, "max_staleness": 0}
    check_transport(config.parse(shared), True)
    check_transport(config.parse({"weights": {"transport": "gloo"}}), False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has GPUs")
def test_the_check_of_a_machine_with_gpus_says_that_this_one_has_none(capsys):
    found = gpu_check.run(list(gpu_check.CHECKS))
    assert found["device"] is None and len(found["checks"]) == len(gpu_check.CHECKS)
    assert {tuple(check.values()) for check in found["checks"].values()} == {("skipped", "no CUDA device")}
    capsys.readouterr()
