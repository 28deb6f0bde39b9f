"""Inside the driver of a case of ``chaos.py``: waits for the moment of each fault, commits it, and watches how it is got over.

A stage is a remote call that is pending: what a signal is to meet is met, and not nearly. Nothing of the product knows this.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import chaos_arms
import psutil
from chaos_plan import Case, Fault

from actors.calls import CallFailed, Pending
from hapo_async import guardian
from hapo_async.errors import RunError

LOOK_S = 0.004
ASK_S = 5.0
STAGE_S = 30.0  # until a stage comes round, else the fault comes without it
CLAIM_S = 40.0  # until somebody has committed an armed fault
HEALTHY_S = 120.0  # until all is well again; more is a hang
WORN_S = 0.25  # the longest wait inside a stage; halved each time that the stage was over before
METHODS = {
    "generating": ("sample", "collect", "submit"),
    "verifying": ("judge",),
    "broadcasting": ("publish", "install", "receive", "announce"),
    "stepping": ("step",),
    "saving": ("capture", "write"),
}
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
CONTINUE = "import os, signal, sys, time; time.sleep(float(sys.argv[1])); os.kill(int(sys.argv[2]), signal.SIGCONT)"


class Injector:
    """run: the product's ``_Run``. fired: ids of faults that earlier starts of the command have seen."""

    def __init__(self, run: Any, case: Case, folder: Path, fired: set[str]) -> None:
        self.run, self.case, self.folder, self.fired = run, case, folder, fired
        self.rng = random.Random(f"{case.name}/{len(fired)}")
        self.committed = 0  # steps since this driver began
        self.last = (0, 0)  # incarnation and step of the newest
        self.ending: Fault | None = None  # what is to happen while the run shuts down

    def note_step(self, incarnation: int, step: int) -> None:
        self.committed, self.last = self.committed + 1, (incarnation, step)

    @property
    def step(self) -> int:
        return int(self.run.trainer.version.step)

    async def play(self) -> None:
        """All faults that have not happened yet; then the end of the run, where it has no number of steps."""
        beside = asyncio.create_task(self._arm_those_beside())
        try:
            for fault in self.case.main:
                if fault.id not in self.fired:
                    await self._one(fault)
            await beside
            await self._until(lambda: self.step >= self.case.least, 3600.0)
            if not self.case.steps:
                self._stop()
        except Exception as error:
            self._tell("trouble", text=f"{type(error).__name__}: {error}")
            self._stop()
        finally:
            beside.cancel()

    def _stop(self) -> None:
        self._tell("stopping")
        os.kill(os.getpid(), signal.SIGTERM)

    def _tell(self, kind: str, **more: Any) -> None:
        chaos_arms.append(self.folder / chaos_arms.TIMELINE, {"t": time.time(), "kind": kind, **more})

    # ---------------------------------------------------------------- beside

    async def _arm_those_beside(self) -> None:
        waiting = [fault for fault in self.case.beside if fault.id not in self.fired]
        for fault in sorted(waiting, key=lambda f: f.step):
            await self._until(lambda step=fault.step: self.step >= step, 3600.0)  # type: ignore[misc]
            chaos_arms.arm(self.folder, fault.who, fault.what, fault.id, **fault.args)
        await self._until(lambda: not any((self.folder / "arms").glob("[!.]*")), CLAIM_S)
        for fault in waiting:
            chaos_arms.disarm(self.folder, fault.id)

    # ---------------------------------------------------------------- one after the other

    async def _one(self, fault: Fault) -> None:
        await self._until(lambda: self.committed > 0 and self.step >= fault.step, 3600.0)
        if gap := fault.args.get("after_manifest"):
            await self._until(lambda: self.step - self._newest() == gap, 60.0)
        commit: dict[str, Callable[[Fault], Awaitable[None]]] = {
            "driver": self._driver,
            "checkpoint": self._checkpoint,
            "disk": self._disk,
            "node": self._node,
            "driver-save": self._trap,
            "rank-save": self._trap,
        }
        if fault.who == "learner" and fault.stage == "saving":
            await self._trap(fault)
        else:
            await commit.get(fault.who, self._signal)(fault)

    async def _signal(self, fault: Fault) -> None:
        """To a process of an actor, while the stage is in progress."""
        began = time.monotonic()
        while time.monotonic() - began < HEALTHY_S:
            try:
                name = self._victim(fault.who)
                actor, pid = await self._pid(fault.who, name)
                process = psutil.Process(pid)
            except (CallFailed, LookupError, psutil.NoSuchProcess):
                await asyncio.sleep(0.2)  # it is being replaced
                continue
            met = await self._meet(fault.stage, name if fault.stage in ("generating", "verifying") else "")
            is_early = self.step - self._newest() < fault.args.get("after_manifest", 0)
            if process.is_running() and not (is_early and time.monotonic() - began < STAGE_S):
                break
        else:
            return
        before = (self._incarnation, self.committed)
        self._strike(fault, name=name, victim=pid, met=met is not None)
        process.send_signal(SIGNALS[fault.what])
        await self._over(fault, lambda: self._is_healthy(fault.who, name, actor, process, before))

    def _victim(self, who: str) -> str:
        """A name. Raises LookupError where there is nobody."""
        if who in ("generator", "engine"):
            return str(self.rng.choice([g.name for g in self.run.fleet.serving]))
        if who == "learner":
            return f"learner rank {self.rng.randrange(len(self.run.learner.ranks))}"
        return str(self.rng.choice(self.run.judges.names))

    @property
    def _incarnation(self) -> int:
        return int(self.run.trainer.version.incarnation)

    async def _pid(self, who: str, name: str) -> tuple[int, int]:
        """(the actor's, the victim's). Raises CallFailed, LookupError."""
        if who == "learner":
            pid = int((await self.run.learner.ping(int(name.rpartition(" ")[2]), ASK_S))["pid"])
            return pid, pid
        if who in ("verifier", "worker"):
            stats = await self.run.judges.stats(name, ASK_S)
            return stats["pid"], stats["pid"] if who == "verifier" else self.rng.choice(stats["worker_pids"])
        member = {g.name: g for g in self.run.fleet.serving}[name]
        stats = await self.run.fleet.stats(member, ASK_S)
        return stats["pid"], stats["pid"] if who == "generator" else self.rng.choice(stats["engine_pids"])

    async def _is_healthy(
        self, who: str, name: str, actor: int, victim: psutil.Process, before: tuple[int, int]
    ) -> bool:
        """Its replacement does what it did, and it is gone itself. before: incarnation, and steps committed."""
        if victim.is_running() and victim.status() != psutil.STATUS_ZOMBIE:
            return False
        if who == "learner":
            return self.last[0] > before[0] and self.committed > before[1]
        if who == "worker":
            return len((await self.run.judges.stats(name, ASK_S))["worker_pids"]) >= self.run.config.verifier.workers
        return (await self._pid(who, name))[0] != actor

    # ---------------------------------------------------------------- the driver itself

    async def _driver(self, fault: Fault) -> None:
        if fault.stage == "ending":
            self.ending = fault
            await asyncio.Event().wait()
        if "n" in fault.args:
            chaos_arms.arm(self.folder, "driver-save", fault.what, fault.id, **fault.args)
            await asyncio.Event().wait()
        await self._meet(fault.stage, "")
        committed = self.committed
        self._strike(fault)
        if fault.what == "stop":
            subprocess.Popen([sys.executable, "-S", "-c", CONTINUE, str(fault.args["seconds"]), str(os.getpid())])
        os.kill(os.getpid(), SIGNALS[fault.what])
        if fault.what == "term":
            if "again_s" in fault.args:
                again = threading.Timer(fault.args["again_s"], os.kill, (os.getpid(), signal.SIGTERM))
                again.daemon = True
                again.start()
            await asyncio.Event().wait()

        async def goes_on() -> bool:
            return self.committed > committed + 1

        await self._over(fault, goes_on)

    # ---------------------------------------------------------------- files

    async def _trap(self, fault: Fault) -> None:
        """Something happens in the middle of the next checkpoint."""
        where = {"learner": "rank-save"}.get(fault.who, fault.who)
        before, newest = (self._incarnation, self.committed), self._newest()
        chaos_arms.arm(self.folder, where, fault.what, fault.id, **fault.args)
        struck = await self._until(lambda: fault.id in self._struck(), CLAIM_S)
        if not struck and chaos_arms.disarm(self.folder, fault.id):
            return

        async def is_over() -> bool:
            is_back = fault.what == "error" or self.last[0] > before[0]
            return is_back and self.committed > before[1] and self._newest() > newest

        await self._over(fault, is_over)

    async def _checkpoint(self, fault: Fault) -> None:
        """The newest checkpoint is damaged, and then the learner needs one."""
        await self._until(lambda: self._newest() > 0 and len(list(self._root.glob("step-[0-9]*"))) > 1, 60.0)
        path = self._root / f"step-{self._newest()}"
        name = damage(path, fault.what, self.rng)
        rank = self._victim("learner")
        _, pid = await self._pid("learner", rank)
        before, process = (self._incarnation, self.committed), psutil.Process(pid)
        self._strike(fault, at=f"{path.name}/{name}")
        process.kill()
        await self._over(fault, lambda: self._is_healthy("learner", rank, pid, process, before))

    async def _disk(self, fault: Fault) -> None:
        """No space is left while ``saves`` checkpoints are to be written."""
        every = self.run.config.train.checkpoint_every
        await self._until(lambda: self.step % every == 1, 60.0)
        newest, began, balloon = self._newest(), self.step, self._root / ".balloon"
        room = self.rng.randrange(0, 400_000)
        with balloon.open("wb") as file:
            space = os.statvfs(self._root)
            os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_frsize - room))
        self._strike(fault, room=room)
        await self._until(lambda: self.step >= began + every * fault.args["saves"] + 1, 90.0)
        balloon.unlink()

        async def is_over() -> bool:
            return self._newest() > newest

        await self._over(fault, is_over)

    async def _node(self, fault: Fault) -> None:
        """The raylet of another node, which the command around this has started. It starts another one."""
        told = json.loads((self.folder / "node.json").read_text())
        await self._meet(fault.stage, "")
        process = psutil.Process(told["pid"])
        self._strike(fault, victim=told["pid"])
        process.kill()
        names, before = {g.name for g in self.run.fleet.generators}, self._incarnation
        await self._until(
            lambda: self._incarnation > before or {g.name for g in self.run.fleet.serving} < names, HEALTHY_S
        )
        committed = self.committed

        async def is_over() -> bool:
            return self.committed > committed and {g.name for g in self.run.fleet.serving} >= names

        await self._over(fault, is_over)

    # ---------------------------------------------------------------- moments

    @property
    def _root(self) -> Path:
        return Path(self.run.folder.checkpoints)

    def _newest(self) -> int:
        """Step of the newest checkpoint."""
        return max((int(p.name[5:]) for p in self._root.glob("step-*") if p.name[5:].isdigit()), default=0)

    def _calls(self) -> list[Pending]:
        run = self.run
        return [*run.fleet.calls(), *run.judges.calls(), *run.learner.calls()]

    async def _meet(self, stage: str, name: str) -> Pending | None:
        """A call of this stage that has been pending for a moment, drawn anew each time that it was too short. None where the
        stage is no call, or did not come."""
        methods, worn = METHODS.get(stage, ()), WORN_S
        began = time.monotonic()
        while methods and time.monotonic() - began < STAGE_S:
            if stage == "saving" and any(self._root.glob(".step-*.writing")):
                return None
            found = [c for c in self._calls() if c.method in methods and (not name or c.actor == name)]
            if not found:
                await asyncio.sleep(LOOK_S)
                continue
            call = max(found, key=lambda c: c.since)
            await asyncio.sleep(self.rng.uniform(0, worn))
            if call in self._calls():
                return call
            worn /= 2
        return None

    async def _until(self, holds: Callable[[], bool], limit_s: float) -> bool:
        """False when it never did."""
        began = time.monotonic()
        while not holds():
            if time.monotonic() - began > limit_s:
                return False
            await asyncio.sleep(0.02)
        return True

    async def _over(self, fault: Fault, is_over: Callable[[], Awaitable[bool]]) -> None:
        """Notes how long it took."""
        began, seconds = time.monotonic(), None
        while time.monotonic() - began < HEALTHY_S:
            try:
                if await is_over():
                    seconds = time.monotonic() - began
                    break
            except (RunError, LookupError, psutil.Error):
                pass  # whoever is asked is not there yet
            await asyncio.sleep(0.1)
        path = self.folder / chaos_arms.STRIKES
        chaos_arms.append(path, {"id": fault.id, "t": time.time(), "healthy_s": seconds})

    def _strike(self, fault: Fault, **more: Any) -> None:
        chaos_arms.strike(fault.id, self.folder, step=self.step, **more)

    def _struck(self) -> set[str]:
        return {row["id"] for row in chaos_arms.rows(self.folder / chaos_arms.STRIKES)}


# --------------------------------------------------------------------------------------------------------------------
# Checkpoints, looked at without the product's own eyes


def damage(checkpoint: Path, what: str, rng: random.Random) -> str:
    """Cuts a file of a checkpoint short, turns a bit of it, or deletes it. Returns its name."""
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.stat().st_size)
    path = rng.choice(files)
    if what == "delete":
        path.unlink()
    elif what == "truncate":
        os.truncate(path, rng.randrange(path.stat().st_size))
    else:
        data = bytearray(path.read_bytes())
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
        path.write_bytes(data)
    return str(path.relative_to(checkpoint))


def problem_of(checkpoint: Path) -> str:
    """What is wrong with one that is about to be used: "" for nothing."""
    try:
        files: dict[str, Any] = json.loads((checkpoint / "MANIFEST.json").read_text())["files"]
        for name, told in files.items():
            data = (checkpoint / name).read_bytes()
            if (len(data), hashlib.sha256(data).hexdigest()) != (told["bytes"], told["sha256"]):
                return f"{name} is not what the manifest says"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def marked(value: str) -> list[int]:
    """Pids of all processes whose environment says that they belong to a case."""
    entry = f"{chaos_arms.CASE}={value}".encode()
    found = []
    for pid in itertools.chain(guardian.everyone()):
        try:
            if entry in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found
