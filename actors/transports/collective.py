"""Weights by broadcast: rank 0 of the learner and the generators of one membership epoch go through a version in lockstep.

    rank 0 (CollectiveSender)                        member (CollectiveReceiver)
    announce: another member list, or a failure
      before, makes a new epoch: number, token,
      and where to meet, on the node's address
    begin: waits for all lines, says "go" <--------  a line to the learner, waits for "go"
    BEGIN version, kind -------------------------->  skips what is left of an earlier version
    (BUCKET header, then the bucket's bytes) ... ->  put(bucket, data)
    COMMIT manifest, or ABORT reason ------------->  the manifest, or TransferError

While bucket i travels, the learner gathers i + 1. Each end has one deadline per version. The first error on either end ends
the epoch: a process that died or gave up is noticed by its line at once, one that is frozen at the deadline.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from actors.transports import group, lines, wire
from actors.transports.base import Data, Member, Offer, Put
from actors.transports.frames import ABORT, BEGIN, BUCKET, COMMIT, Seat, head, title
from hapo_async.types import Version
from hapo_async.weights import Bucket, Manifest, TransferError

log = logging.getLogger(__name__)

CONNECT_S = 20.0  # once all are there, connecting them takes no longer
LAST_WORDS_S = 2.0  # how long the sender of a broken epoch listens to find out who is frozen


def width_of(key: str) -> int:
    """How many processes receive behind a member; their ranks follow one another."""
    return int(key.partition("x")[2] or 1)


@dataclass
class _Epoch:
    """A member list and where it meets; group: once all were there. ranks: of each key's first process. sent: works that
    may not be through, with their tensors. broken: why nothing more can be sent."""

    number: int
    members: tuple[Member, ...]
    token: str
    ranks: dict[str, int]
    size: int
    exchange: lines.Exchange
    store: dist.TCPStore
    group: group.Group | None = None
    sent: list[tuple[Any, torch.Tensor]] = field(default_factory=list)
    broken: str = ""

    def names(self, ranks: Iterable[int]) -> str:
        return ", ".join(self._name(rank) for rank in sorted(ranks))

    def _name(self, rank: int) -> str:
        member = max((m for m in self.members if self.ranks[m.key] <= rank), key=lambda m: self.ranks[m.key])
        return member.name if width_of(member.key) == 1 else f"{member.name}/{rank - self.ranks[member.key]}"

    def leave(self) -> None:
        self.sent.clear()
        if self.group is not None:
            self.group.leave()
            self.group = None


class CollectiveSender:
    """Rank 0's end. backend: "gloo" | "nccl". address: of this node. device: nccl: where buckets are sent from."""

    is_broken = False

    def __init__(self, backend: str, address: str, device: str, deadline_s: float) -> None:
        self._backend, self._address, self._deadline_s = backend, address, deadline_s
        self._device = _device(backend, device)
        self.on_device = self._device.type != "cpu"
        self._numbers = itertools.count(1)
        self._epoch: _Epoch | None = None
        self._gone: set[str] = set()  # keys of processes that ended; a new process has a new key
        self._deadline = 0.0

    def announce(self, version: Version, kind: str, members: Sequence[Member]) -> Offer:
        """An offer for those of ``members`` whose process is not known to be gone."""
        if self._epoch is not None and not self._epoch.broken and (lost := self._epoch.exchange.lost(0.0)):
            self._epoch.leave()
            self._break(self._epoch, "members left", lost)
        wanted = tuple(member for member in members if member.key not in self._gone)
        if self._epoch is None or self._epoch.broken or self._epoch.members != wanted:
            self.close()
            self._epoch = self._open(wanted)
        return self._offer(version, kind)

    def admit(self, members: Sequence[Member]) -> None:
        pass  # they are members of the next version

    def begin(self, version: Version, kind: str) -> None:
        """Raises TransferError that names the members that did not come."""
        epoch = self._whole()
        self._deadline = time.monotonic() + self._deadline_s
        if epoch.group is None and epoch.size > 1:
            self._meet(epoch)
        self._send(epoch, f"version {version}", BEGIN, title(version, kind))

    def send(self, bucket: Bucket, data: Data) -> None:
        raw = data if isinstance(data, torch.Tensor) else torch.from_numpy(data)
        if raw.nbytes != bucket.nbytes:  # gloo ends the process of a member that expects another size
            raise TransferError(f"bucket {bucket.index} is to have {bucket.nbytes} bytes, but has {raw.nbytes}")
        self._send(self._whole(), f"bucket {bucket.index}", BUCKET, wire.encode_bucket(bucket), raw)

    def commit(self, manifest: Manifest) -> Offer:
        epoch = self._whole()
        self._send(epoch, "the manifest", COMMIT, wire.encode_manifest(manifest))
        self._flush(epoch, "the end of the manifest", is_last=True)
        return self._offer(manifest.version, manifest.kind, manifest)

    def abort(self, why: str) -> None:
        epoch = self._epoch
        if epoch is None or epoch.group is None:
            return
        try:
            self._send(epoch, "the end", ABORT, why.encode()[: lines.REASON_BYTES] or b"no reason")
            self._flush(epoch, "the end", is_last=True)
        except TransferError as error:
            log.warning("%s", error)

    def close(self) -> None:
        epoch, self._epoch = self._epoch, None
        if epoch is not None:
            epoch.leave()
            epoch.exchange.close()

    # ---------------------------------------------------------------- epochs

    def _open(self, members: tuple[Member, ...]) -> _Epoch:
        ranks: dict[str, int] = {}
        size = 1
        for member in members:
            if not member.key or member.key in ranks:
                raise TransferError(f"{member.name} has no key of its own: {self._backend} needs its receiver's")
            ranks[member.key] = size
            size += width_of(member.key)
        token = lines.new_token()
        try:
            exchange = lines.Exchange(self._address, token, range(1, size))
            store = group.serve(self._address, time.monotonic() + CONNECT_S)
        except (OSError, RuntimeError) as error:
            raise TransferError(f"{self._backend}: cannot listen on {self._address}: {error}") from error
        return _Epoch(next(self._numbers), members, token, ranks, size, exchange, store)

    def _offer(self, version: Version, kind: str, manifest: Manifest | None = None) -> Offer:
        epoch = self._whole()
        detail = {
            "address": self._address,
            "port": epoch.exchange.port,
            "store_port": epoch.store.port,
            "epoch": epoch.number,
            "token": epoch.token,
            "ranks": epoch.ranks,
            "size": epoch.size,
        }
        return Offer(self._backend, version, kind, tuple(m.name for m in epoch.members), manifest, detail)

    def _whole(self) -> _Epoch:
        if self._epoch is None:
            raise TransferError(f"{self._backend}: nothing was announced")
        if self._epoch.broken:
            raise TransferError(self._epoch.broken)
        return self._epoch

    def _meet(self, epoch: _Epoch) -> None:
        missing = epoch.exchange.gather(self._deadline)
        lost = epoch.exchange.lost(0.0)
        if missing or lost:
            came = f"{epoch.size - 1 - len(missing)} of {epoch.size - 1} came"
            raise self._break(epoch, came + (f", {epoch.names(missing)} did not" if missing else ""), lost)
        epoch.exchange.go()
        try:
            store = dist.PrefixStore(epoch.token, epoch.store)
            deadline = min(self._deadline, time.monotonic() + CONNECT_S)
            epoch.group = group.Group(self._backend, store, 0, epoch.size, self._address, deadline)
        except RuntimeError as error:
            raise self._break(epoch, f"no group: {_first_line(error)}", epoch.exchange.lost(0.0)) from error

    def _break(self, epoch: _Epoch, what: str, lost: dict[int, str]) -> TransferError:
        """Ends the epoch, and finds out whose fault it was. lost: members whose lines have closed, and what they said."""
        silent: set[int] = set()
        if epoch.group is not None:
            epoch.leave()
            words = epoch.exchange.hang_up(LAST_WORDS_S)
            silent = set(range(1, epoch.size)) - words.keys()
            lost = lost | {rank: said for rank, said in words.items() if said == lines.GONE}
        dead = {rank for rank, said in lost.items() if said == lines.GONE}
        self._gone |= {m.key for m in epoch.members if dead & set(_ranks(epoch, m))}
        parts = [f"{self._backend}, epoch {epoch.number}: {what}"]
        if dead or silent:  # the others complain of what these did
            lost = {rank: lines.GONE for rank in dead}
        parts += [f"{epoch.names([rank])}: {said}" for rank, said in sorted(lost.items())]
        if silent:
            parts.append(f"no word from {epoch.names(silent)}")
        epoch.exchange.close()
        epoch.broken = "; ".join(parts)
        return TransferError(epoch.broken)

    # ---------------------------------------------------------------- frames

    def _send(self, epoch: _Epoch, what: str, kind: int, body: bytes, data: torch.Tensor | None = None) -> None:
        """Hands a frame, and a bucket, to the group when all before them are through."""
        if epoch.size == 1:
            return
        self._flush(epoch, what)
        parts = [head(kind, body), torch.frombuffer(bytearray(body), dtype=torch.uint8)]
        if data is not None and len(data):
            parts.append(data)
        assert epoch.group is not None
        try:
            for part in parts:
                moved = part.to(self._device)
                epoch.sent.append((epoch.group.broadcast(moved, self._deadline), moved))
        except RuntimeError as error:
            raise self._break(epoch, f"{what}: {_first_line(error)}", {}) from error

    def _flush(self, epoch: _Epoch, what: str, is_last: bool = False) -> None:
        """Waits until all that was sent is through. Who leaves after the last of a version has missed nothing of it."""

        def trouble(nap: float) -> str:
            return "a member left" if epoch.exchange.lost(nap) else ""

        for work, _ in epoch.sent:
            why = lines.settle(work.is_completed, self._deadline, trouble)
            if why:
                raise self._break(epoch, f"stuck before {what}: {why}", epoch.exchange.lost(0.0))
            try:
                work.wait()
            except RuntimeError as error:
                lost = epoch.exchange.lost(lines.NAP_S)
                raise self._break(epoch, f"stuck before {what}: {_first_line(error)}", lost) from error
        epoch.sent.clear()
        if not is_last and (lost := epoch.exchange.lost(0.0)):
            raise self._break(epoch, f"stopped before {what}", lost)


class CollectiveReceiver:
    """A member's end. device: "cpu" or a CUDA device; with gloo buckets arrive in host memory whatever it is.

    width: how many processes receive under this key, each through a receiver of its own, made by ``part``.
    """

    def __init__(self, backend: str, address: str, device: str, width: int = 1) -> None:
        self.key = secrets.token_hex(8) + (f"x{width}" if width > 1 else "")
        self._backend, self._address, self._where = backend, address, device
        self._index = 0
        self._seat: Seat | None = None
        self._cancelled = threading.Event()
        self._receiving = threading.Lock()
        self._is_closed = False

    @classmethod
    def part(cls, key: str, index: int, backend: str, device: str) -> CollectiveReceiver:
        """The receiver of process ``index`` of those behind ``key``. Its address is the one it reaches the learner from."""
        receiver = cls(backend, "", device)
        receiver.key, receiver._index = key, index
        return receiver

    def receive(self, offer: Offer, deadline: float, put: Put) -> Manifest:
        """Goes on to the end when ``put`` fails, so that the others keep their epoch, and raises it then."""
        with self._receiving:
            self._cancelled.clear()
            end = self._receive(offer, deadline, put)
        if isinstance(end, Exception):
            raise end
        return end

    def _receive(self, offer: Offer, deadline: float, put: Put) -> Manifest | Exception:
        why = "it was left in the middle"
        is_whole = False
        try:
            seat = self._sit(offer, deadline)
            if seat.on_device:  # every thread starts out on GPU 0
                torch.cuda.set_device(seat.device)
            end = self._follow(seat, offer, deadline, put)
            is_whole = not self._is_closed
            return end
        except (RuntimeError, OSError) as error:  # TransferError is a RuntimeError
            why = f"{self._backend}: version {offer.version}: {_first_line(error)}"
            raise TransferError(why) from error
        finally:
            if not is_whole:
                self._leave(why)

    def _sit(self, offer: Offer, deadline: float) -> Seat:
        """The place in the offer's epoch: the one of the version before, or a new one."""
        d = offer.detail
        if self.key not in d["ranks"]:
            raise TransferError("this generator is no member of the epoch")
        if self._seat is None or self._seat.token != d["token"]:
            self._leave("another epoch begins")
            rank = int(d["ranks"][self.key]) + self._index
            line = lines.Line(d["address"], d["port"], d["token"], rank, min(CONNECT_S, _left(deadline)))
            self._seat = Seat(d["token"], line, self._cancelled, _device(self._backend, self._where))
            if not line.wait_for_go(deadline, self._cancelled):
                raise TransferError("cancelled" if self._cancelled.is_set() else "not all members came")
            connected = min(deadline, time.monotonic() + CONNECT_S)
            store = dist.PrefixStore(d["token"], group.visit(d["address"], d["store_port"], connected))
            address = self._address or line.address
            self._seat.group = group.Group(self._backend, store, rank, d["size"], address, connected)
        return self._seat

    def _follow(self, seat: Seat, offer: Offer, deadline: float, put: Put) -> Manifest | Exception:
        """What the version came to."""
        wanted = title(offer.version, offer.kind)
        begun, failure = False, None
        while True:
            kind, body = seat.frame(deadline)
            if kind == BEGIN:
                begun = body == wanted
            elif kind == BUCKET:
                bucket = wire.decode_bucket(body)
                data = seat.take(bucket.nbytes, deadline)
                if begun and failure is None:
                    try:
                        put(bucket, data if seat.on_device else data.numpy())
                    except Exception as error:
                        failure = error
            elif begun and kind == COMMIT:
                return failure or wire.decode_manifest(body)
            elif begun and kind == ABORT:
                return failure or TransferError(f"version {offer.version}: given up: {body.decode('utf-8', 'replace')}")

    def cancel(self) -> None:
        self._cancelled.set()

    def close(self) -> None:
        self._is_closed = True
        self.cancel()
        if self._receiving.acquire(blocking=False):  # else whoever receives leaves
            self._leave("the generator left")
            self._receiving.release()

    def _leave(self, why: str) -> None:
        seat, self._seat = self._seat, None
        if seat is not None:
            seat.leave(why)


def _device(backend: str, device: str) -> torch.device:
    """Where buckets lie; a CUDA device with its number."""
    where = torch.device(device if backend == "nccl" else "cpu")
    return torch.device("cuda", torch.cuda.current_device()) if where.type == "cuda" and where.index is None else where


def _ranks(epoch: _Epoch, member: Member) -> range:
    first = epoch.ranks[member.key]
    return range(first, first + width_of(member.key))


def _left(deadline: float) -> float:
    return max(0.01, deadline - time.monotonic())


def _first_line(error: BaseException) -> str:
    first = (str(error) or type(error).__name__).splitlines()[0]
    return first.partition(" This is typically caused by")[0][:300]  # gloo's advice
