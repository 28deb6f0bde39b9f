"""Two Ray nodes on this machine, of which the second dies and comes again: ``ray start`` in processes of our own."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import chaos_arms
import psutil

RAY = str(Path(sys.executable).with_name("ray"))
UP_S = 90.0
SEVERAL = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
"""Without it some of Ray's listeners would be on loopback alone, and it would refuse a second node."""


class Nodes:
    """A head that holds all but one generator, and a node with room for that one. environment: joins it. node.json in ``folder``
    names the raylet of the second node."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._port = folder, _free_port()
        self._temp = Path("/tmp") / f"chaos{os.getpid()}"
        self._started: list[subprocess.Popen[bytes]] = []
        self._shared = {**SEVERAL, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**self._shared, "RAY_ADDRESS": f"127.0.0.1:{self._port}"}

    def __enter__(self) -> Nodes:
        try:
            self._launch(
                "--head", f"--port={self._port}", "--include-dashboard=false", f"--temp-dir={self._temp}", cpus=2
            )
            deadline = time.monotonic() + UP_S
            while not _listens(self._port):
                if self._started[0].poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("the Ray head did not come up")
                time.sleep(0.2)
            self._second()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        gone = []
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                mine = psutil.Process(process.pid)
                gone += [*mine.children(recursive=True), mine]
        for process in gone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(gone, timeout=5)
        for started in self._started:
            started.wait(5)
        shutil.rmtree(self._temp, ignore_errors=True)

    def keep(self) -> None:
        """Another second node, where the last one has died."""
        if self._raylet is None or not self._raylet.is_running() or self._raylet.status() == psutil.STATUS_ZOMBIE:
            self._second()

    def pids(self) -> set[int]:
        """Everything that is not an actor's."""
        out: set[int] = set()
        for process in self._started:
            with contextlib.suppress(psutil.NoSuchProcess):
                mine = psutil.Process(process.pid)
                out |= {mine.pid, *(p.pid for p in mine.children(recursive=True) if not _is_worker(p))}
        return out

    def _second(self) -> None:
        self._raylet: psutil.Process | None = None
        process = self._launch(f"--address=127.0.0.1:{self._port}", cpus=1)
        deadline = time.monotonic() + UP_S
        while self._raylet is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError("the second Ray node did not come up")
            with contextlib.suppress(psutil.Error):
                children = psutil.Process(process.pid).children(recursive=True)
                self._raylet = next((p for p in children if p.name() == "raylet"), None)
            time.sleep(0.2)
        (self._folder / "node.json").write_text(json.dumps({"pid": self._raylet.pid}))

    def _launch(self, *arguments: str, cpus: int) -> subprocess.Popen[bytes]:
        command = [
            RAY, "start", "--block", "--node-ip-address=127.0.0.1", f"--num-cpus={cpus}", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={_free_port()}", *arguments,
        ]  # fmt: skip
        environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
        environment |= {**self._shared, chaos_arms.CASE: str(self._folder)}
        with (self._folder / f"node-{len(self._started)}.log").open("wb") as log:
            self._started.append(subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT))
        return self._started[-1]


def _is_worker(process: psutil.Process) -> bool:
    """An actor's process, or one of its children."""
    with contextlib.suppress(psutil.Error):
        return "HAPO_RUN" in process.environ()
    return False


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _listens(port: int) -> bool:
    with socket.socket() as s:
        return s.connect_ex(("127.0.0.1", port)) == 0
