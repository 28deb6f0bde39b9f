"""A process group of torch's own, beside whatever default group the process has: built, used and left without hanging.

The members meet in a store that the learner serves on its node's address, and nowhere else. What a group that is left was
still waiting for ends with the deadline that it got.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import psutil
import torch
import torch.distributed as dist


def serve(address: str, deadline: float) -> dist.TCPStore:
    """A store that listens on ``address`` alone. Raises OSError, RuntimeError."""
    from actors.zero import listen  # not at the top: generators need nothing else of it

    listener, port = listen(address)
    fd = listener.detach()
    try:
        return dist.TCPStore(
            address, port, is_master=True, wait_for_workers=False, master_listen_fd=fd, timeout=_left(deadline)
        )
    except RuntimeError:
        os.close(fd)
        raise


def visit(address: str, port: int, deadline: float) -> dist.TCPStore:
    """The learner's store, from another process. Raises RuntimeError."""
    return dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_left(deadline))


class Group:
    """One member's end of a group of ``size``; rank 0 sends. Raises RuntimeError when not all are there by the deadline."""

    def __init__(self, backend: str, store: dist.Store, rank: int, size: int, address: str, deadline: float) -> None:
        make = _nccl if backend == "nccl" else _gloo
        self._backend: Any = make(store, rank, size, address, _left(deadline))
        self._is_nccl = backend == "nccl"

    def broadcast(self, data: torch.Tensor, deadline: float) -> Any:
        """From rank 0 to all, in the order of the calls. Returns the work: ``is_completed()``, and ``wait()`` raises what went
        wrong."""
        options = dist.distributed_c10d.BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        options.timeout = _left(deadline)
        options.asyncOp = True
        return self._backend.broadcast([data], options)

    def leave(self) -> None:
        """Gives the group up without waiting: a thread frees it as soon as the group's own threads have ended."""
        holder, self._backend = [self._backend], None
        threading.Thread(target=_free, args=(holder, self._is_nccl), name="leave-group", daemon=True).start()


def _free(holder: list[Any], is_nccl: bool) -> None:
    if is_nccl:
        holder[0].abort()
    holder.clear()


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.01, deadline - time.monotonic()))


def _gloo(store: dist.Store, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = [gloo.create_device(hostname=address)]
    options._timeout = timeout
    options._threads = 1  # broadcasts are carried out one after the other
    return gloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, address: str, timeout: timedelta) -> Any:
    nccl: Any = dist.ProcessGroupNCCL  # type: ignore[attr-defined]
    options = nccl.Options()
    options._timeout = timeout
    _name_interface(address)
    with _blocking_wait():
        return nccl(store, rank, size, options)


@contextlib.contextmanager
def _blocking_wait() -> Iterator[None]:
    """A group made in here has no watchdog thread, which would end this process when another member dies; its works raise
    instead."""
    before = os.environ.get("TORCH_NCCL_BLOCKING_WAIT")
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TORCH_NCCL_BLOCKING_WAIT"]
        else:
            os.environ["TORCH_NCCL_BLOCKING_WAIT"] = before


def _name_interface(address: str) -> None:
    """NCCL is told interfaces, not addresses. What a user has set stays."""
    if "NCCL_SOCKET_IFNAME" in os.environ:
        return
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ["NCCL_SOCKET_IFNAME"] = f"={name}"
