"""A generator's end of a collective in a process of its own, told what to do over a pipe; see test_collective.py."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

import psutil
import torch
import xxhash

from actors.transports.collective import CollectiveReceiver
from hapo_async.weights import Intake, TransferError

torch.set_num_threads(1)


class Member:
    """What a process holds. ``receive`` reports later, everything else at once."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.sending = threading.Lock()
        self.renew()

    def renew(self) -> str:
        self.receiver = CollectiveReceiver("gloo", "127.0.0.1", "cpu")
        return self.receiver.key

    def receive(self, offer: Any, deadline_s: float, fault: str = "", at: int = 1) -> None:
        threading.Thread(target=self._receive, args=(offer, deadline_s, fault, at), daemon=True).start()

    def _receive(self, offer: Any, deadline_s: float, fault: str, at: int) -> None:
        intake, began = Intake(offer.version, offer.kind), time.monotonic()

        def put(bucket: Any, data: Any) -> None:
            intake.put(bucket, data)
            if fault and bucket.index == at:
                os.kill(os.getpid(), getattr(signal, fault))

        try:
            manifest = self.receiver.receive(offer, time.monotonic() + deadline_s, put)
            tensors = intake.commit(manifest)
            answer = {name: xxhash.xxh3_64_hexdigest(t.view(torch.uint8).numpy()) for name, t in tensors}
        except TransferError as error:
            answer = {"error": str(error), "seconds": time.monotonic() - began}
        self.tell("received", answer)

    def cancel(self) -> None:
        self.receiver.cancel()

    def close(self) -> None:
        self.receiver.close()

    def state(self) -> dict[str, Any]:
        return process_state()

    def tell(self, what: str, answer: Any) -> None:
        with self.sending:
            self.pipe.send((what, answer))


def process_state() -> dict[str, Any]:
    """threads, files: how many. listens: addresses."""
    process = psutil.Process()
    listens = [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    return {"threads": process.num_threads(), "files": process.num_fds(), "listens": listens}


def main(pipe: Any) -> None:
    member = Member(pipe)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            os._exit(0)
        answer = getattr(member, name)(*arguments)
        if name != "receive":
            member.tell(name, answer)
