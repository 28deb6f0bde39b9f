"""Where actors live: joining or starting Ray, and one placement group per learner and per generator.

A generator is a placement group of tensor_parallel x pipeline_parallel bundles; the learner is one of ``ranks`` bundles.
On a cluster without GPUs the actors share the CPUs that are there.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import secrets
import signal
import stat
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from hapo_async import guardian
from hapo_async.errors import RunError
from hapo_async.secrets import learn_environment

log = logging.getLogger(__name__)

# Inherited by every actor: one thread per process (two threads beside a busy neighbour are many times slower).
ACTOR_ENV = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


SPARE, SPARES = "spare", 64
"""A resource of a Ray that is started here, without an autoscaler: places for generators that are added to a run on CPUs. They
compete with the others for the cores that there are. GPUs are never made up."""

_LOOK_S = 1.0  # how long a thread waits for a placement group before it looks whether anybody still wants it


class LocalRay:
    """A Ray head on 127.0.0.1 that this process starts and ends itself.

    ``stop`` shuts Ray down and then ends, by pid, whatever of this head is still alive; it touches nothing else.
    """

    def __init__(self, num_cpus: int) -> None:
        for key, value in ACTOR_ENV.items():
            os.environ.setdefault(key, value)
        _protect_token()
        self._before = {p.pid for p in psutil.Process().children(recursive=True)}
        try:
            with guardian.marked():
                ray.init(
                    address="local",
                    num_cpus=num_cpus,
                    resources={SPARE: SPARES},
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    _node_ip_address="127.0.0.1",
                    _temp_dir=str(_short_temp_dir()),
                    object_store_memory=_object_store_bytes(),
                )
        except BaseException:
            end_processes(self._started())
            raise

    def stop(self) -> None:
        started = self._started()
        _leave()
        end_processes(started)

    @property
    def pids(self) -> list[int]:
        """What it consists of now."""
        return [p.pid for p in self._started()]

    def _started(self) -> list[psutil.Process]:
        return [p for p in psutil.Process().children(recursive=True) if p.pid not in self._before]


def _leave() -> None:
    """Ray takes SIGTERM's handler away when it goes: it is put back. (A signal that comes just in between ends this process.)"""
    handler = signal.getsignal(signal.SIGTERM)
    ray.shutdown()
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, handler)


def _short_temp_dir() -> Path:
    """Ray's sockets live below its temp folder and their paths may not exceed 107 bytes. Ray opens its folders, with its logs
    and sockets in them, to every user of the node: they lie in one that nobody else enters."""
    base = Path(tempfile.gettempdir())
    base = base if len(str(base)) < 28 else Path("/tmp")  # noqa: S108
    folder = base / f"hapo-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.getuid():  # somebody else took the name
        return Path(tempfile.mkdtemp(prefix="hapo-", dir=base)) / "r"
    if stat.S_IMODE(about.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder / "r"


def _protect_token() -> None:
    """Whoever has Ray's token may run code in the cluster. Ray would write it readable for everybody: it is made here, for its
    owner alone. A user who switched the token off, or gave another one, is left alone."""
    if os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        log.warning("RAY_AUTH_MODE=%s: every user of this node can run code in this Ray", os.environ["RAY_AUTH_MODE"])
        return
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = Path.home() / ".ray" / "auth_token"
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            _write_once(path, secrets.token_hex(32))
        elif path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o077:
            path.chmod(0o600)
    except OSError as error:
        log.warning("Ray's token is kept in this run's environment: %s cannot be written: %s", path, error.strerror)
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    learn_environment()


def _write_once(path: Path, text: str) -> None:
    """Whole, for its owner alone, and only where nothing has the name yet."""
    handle, fresh = tempfile.mkstemp(dir=path.parent)  # 0600
    with os.fdopen(handle, "w") as file:
        file.write(text)
    try:
        with contextlib.suppress(FileExistsError):
            os.link(fresh, path)
    finally:
        Path(fresh).unlink()


def _object_store_bytes() -> int:
    """A tenth of the free memory, between 200 MB and 4 GB: the shared-memory file system must hold it."""
    shm = psutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 1 << 30  # noqa: S108, PTH112
    return int(min(max(200e6, psutil.virtual_memory().available / 10), 4e9, 0.8 * shm))


def end_processes(processes: list[psutil.Process], grace_s: float = 5.0) -> None:
    """SIGTERM, then SIGKILL for those that stay. psutil compares creation times, so a reused pid is never hit."""
    alive = [p for p in processes if p.is_running()]
    for process in alive:
        _signal(process, signal.SIGTERM)
    _, alive = psutil.wait_procs(alive, timeout=grace_s)
    for process in alive:
        _signal(process, signal.SIGKILL)
    psutil.wait_procs(alive, timeout=grace_s)


def _signal(process: psutil.Process, number: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.send_signal(number)


@dataclass(frozen=True)
class Cluster:
    """What Ray offers. gpus / cpus: totals. ``local`` is set when this call started Ray, ``joined`` when it joined one."""

    cpus: float
    gpus: float
    local: LocalRay | None
    joined: bool

    @property
    def device(self) -> str:
        return "cuda" if self.gpus >= 1 else "cpu"

    @property
    def pids(self) -> list[int]:
        """Processes of a Ray that this call started."""
        return self.local.pids if self.local else []

    def stop(self) -> None:
        """Leaves things as they were: a Ray that was there before goes on."""
        if self.local:
            self.local.stop()
        elif self.joined:
            _leave()


def join(actors: int) -> Cluster:
    """Uses the Ray of this process if there is one; else joins the cluster that RAY_ADDRESS names (as ``ray job submit``
    sets it); else starts a local Ray.

    actors: how many actors will run; a local Ray declares at least that many CPUs, so that nothing waits for ever.
    """
    local = None
    joined = False
    if ray.is_initialized():
        log.info("using the Ray that this process is connected to")
    elif os.environ.get("RAY_ADDRESS"):
        joined = True
        environment = {"env_vars": {**ACTOR_ENV, guardian.MARKER: guardian.marker()}}
        ray.init(address="auto", log_to_driver=False, logging_level=logging.WARNING, runtime_env=environment)
    else:
        local = LocalRay(num_cpus=max(actors, os.cpu_count() or 1))
    resources = ray.cluster_resources()
    return Cluster(resources.get("CPU", 1.0), resources.get("GPU", 0.0), local, joined)


@dataclass(frozen=True)
class Slot:
    """A reserved placement group, or a part of one. ``options(i)`` are the actor options that pin an actor to bundle i of
    it; an actor that only coordinates workers in the bundles (a vLLM engine over several GPUs) must leave the GPUs to
    them: ``gpus=0``.

    cpus, gpus: of each actor. first: the part's first bundle. is_part: another slot owns the group. environment: what
    an engine that starts workers in the bundles has to be told.
    """

    group: PlacementGroup
    cpus: float
    gpus: float
    first: int = 0
    is_part: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)

    def options(self, bundle: int, gpus: float | None = None, **more: Any) -> dict[str, Any]:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self.group,
            placement_group_bundle_index=self.first + bundle,
            placement_group_capture_child_tasks=True,
        )
        gpus = self.gpus if gpus is None else gpus
        if self.environment:
            more["runtime_env"] = {"env_vars": {**ACTOR_ENV, **self.environment}}
        return {"num_cpus": self.cpus, "num_gpus": gpus, "scheduling_strategy": strategy, **more}

    def release(self) -> None:
        if not self.is_part:
            remove_placement_group(self.group)


def share(slot: Slot, generators: int, width: int) -> tuple[Slot, list[Slot]]:
    """A slot that a learner and ``generators`` of ``width`` bundles each take turns on: the learner's view of it and the
    generators'. Every bundle's devices are halved, in the books only: one side sleeps while the other works."""
    half = dataclasses.replace(slot, cpus=slot.cpus / 2, gpus=slot.gpus / 2)
    parts = []
    for first in range(0, generators * width, width):
        told = {}
        if width > 1 and slot.gpus:
            bundles = ",".join(str(first + i) for i in range(width))
            told = {"VLLM_RAY_BUNDLE_INDICES": bundles, "VLLM_RAY_PER_WORKER_GPUS": f"{half.gpus:g}"}
        parts.append(dataclasses.replace(half, first=first, is_part=True, environment=told))
    return half, parts


def reserve(
    cluster: Cluster, bundles: int, cpu_share: float, name: str, *, one_node: bool = False, timeout_s: float = 120.0
) -> Slot:
    """Reserves ``bundles`` equal bundles on few nodes, or on one. Raises RunError when the cluster cannot give them in time."""
    slot = _ask(cluster, bundles, cpu_share, name, one_node)
    if not slot.group.wait(timeout_s):
        slot.release()
        raise RunError(
            f"{_shortage(cluster, slot, bundles, name, timeout_s)} Lower generator.count or learner.ranks, or add nodes."
        )
    return slot


async def reserve_beside(cluster: Cluster, bundles: int, cpu_share: float, name: str, timeout_s: float) -> Slot:
    """``reserve`` on one node while other things go on: what waits makes an autoscaler add nodes. On CPUs of a Ray that was
    started here it takes spare places. Nothing stays reserved when this is cancelled. Raises RunError."""
    spare = cluster.device == "cpu" and SPARE in ray.cluster_resources()
    slot = _ask(cluster, bundles, 0.0 if spare else cpu_share, name, one_node=True)
    deadline = time.monotonic() + timeout_s
    try:
        while not await asyncio.to_thread(slot.group.wait, _LOOK_S):
            if time.monotonic() > deadline:
                raise RunError(_shortage(cluster, slot, bundles, name, timeout_s))
    except BaseException:
        slot.release()
        raise
    return slot


def _ask(cluster: Cluster, bundles: int, cpu_share: float, name: str, one_node: bool) -> Slot:
    gpus = 1.0 if cluster.device == "cuda" else 0.0
    strategy = "STRICT_PACK" if one_node else "PACK"
    shapes = [_shape(cpu_share, gpus)] * bundles
    return Slot(placement_group(shapes, strategy=strategy, name=f"{name}-{os.getpid()}"), cpu_share, gpus)


def _shape(cpus: float, gpus: float) -> dict[str, float]:
    """Of a bundle."""
    if not cpus:
        return {SPARE: 1.0}
    return {"CPU": cpus, **({"GPU": gpus} if gpus else {})}


def _shortage(cluster: Cluster, slot: Slot, bundles: int, name: str, waited_s: float) -> str:
    return (
        f"{name}: {bundles} x {_shape(slot.cpus, slot.gpus)} not available within {waited_s:.0f} s on a cluster of "
        f"{cluster.cpus:g} CPUs and {cluster.gpus:g} GPUs."
    )


def is_whole(slot: Slot) -> bool:
    """Whether all bundles of a slot are there: False once a node of it is lost."""
    try:
        return bool(placement_group_table(slot.group)["state"] == "CREATED")
    except (KeyError, ray.exceptions.RayError):
        return False


def cpu_share(cluster: Cluster, actors: int) -> float:
    """CPUs per actor: one where they suffice, else an equal share in hundredths (logged: the actors will compete)."""
    if actors <= cluster.cpus:
        return 1.0
    share = max(0.01, int(100 * cluster.cpus / actors) / 100)
    log.warning("%d actors share %g CPUs (%g each): they will compete for cores", actors, cluster.cpus, share)
    return share


def wait_ready(named: dict[str, Any], timeout_s: float = 300.0) -> dict[str, Any]:
    """Waits for ``ready()`` results {name: ref}. Raises RunError that names whoever is missing or failed."""
    deadline = time.monotonic() + timeout_s
    out = {}
    for name, ref in named.items():
        try:
            out[name] = ray.get(ref, timeout=max(0.1, deadline - time.monotonic()))
        except ray.exceptions.GetTimeoutError:
            raise RunError(f"{name} was not ready within {timeout_s:.0f} s") from None
        except ray.exceptions.RayError as error:
            raise RunError(f"{name} failed to start: {error}") from error
    return out
