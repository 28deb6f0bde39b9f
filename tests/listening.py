"""Which sockets a tree of processes listens on."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import NamedTuple

import psutil

LOOPBACK = frozenset({"127.0.0.1", "::1", "::ffff:127.0.0.1"})
WILDCARDS = frozenset({"0.0.0.0", "::", "*", "", "::ffff:0.0.0.0"})


class Listening(NamedTuple):
    """kind: tcp | udp | abstract, a Unix socket without a file. where: the address, or an abstract socket's name."""

    pid: int
    process: str
    kind: str
    where: str
    port: int

    @property
    def is_open_to_all(self) -> bool:
        return self.kind != "abstract" and self.where in WILDCARDS


def of_tree(pid: int) -> set[Listening]:
    """Of a process and all its descendants now."""
    try:
        top = psutil.Process(pid)
        return of([top, *top.children(recursive=True)])
    except psutil.NoSuchProcess:
        return set()


def of(processes: Iterable[psutil.Process]) -> set[Listening]:
    """TCP sockets that listen, UDP sockets that anybody can send to, and abstract Unix sockets."""
    found: set[Listening] = set()
    for process in processes:
        try:
            name = " ".join(process.cmdline()[:4])[:120] or process.name()
            for c in process.net_connections("all"):
                if c.family == socket.AF_UNIX:
                    if str(c.laddr).startswith(("@", "\0")):
                        found.add(Listening(process.pid, name, "abstract", str(c.laddr), 0))
                elif c.status == psutil.CONN_LISTEN:
                    found.add(Listening(process.pid, name, "tcp", c.laddr.ip, c.laddr.port))
                elif c.type == socket.SOCK_DGRAM and not c.raddr and c.laddr:
                    found.add(Listening(process.pid, name, "udp", c.laddr.ip, c.laddr.port))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def told(found: Iterable[Listening]) -> str:
    return "\n".join(f"{x.kind} {x.where}:{x.port} of pid {x.pid} ({x.process})" for x in sorted(found))
