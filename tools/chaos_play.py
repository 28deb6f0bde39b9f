"""One case of ``chaos.py`` from start to end: the command, again and again, and whatever happens to it from outside."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chaos_arms
import psutil
from chaos_checks import Story, problems
from chaos_inject import damage, marked
from chaos_nodes import Nodes
from chaos_plan import Case, Fault

HERE = Path(__file__).parent
ORPHANS_S = 15.0  # that nothing of a run may outlive its driver by
GRACE_S = 30.0  # until a run that was told to stop has
START_S = 900.0  # until a start of the command has come to something
TRIES = 3  # starts that end as they must not, before the case is given up
ROOM = "24m"  # of the small disk


class Player:
    """folder: of the case; what is in it is removed. ``play`` returns a line for the journal for each fault, and one for the
    case."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder.resolve()
        self.rng = random.Random(f"outside/{case.name}")
        self.outside = list(case.outside)
        self.trouble: list[str] = []
        self.gone: list[tuple[float, float]] = []  # when a driver ended, and how long until nothing of it was left
        self.starts = 0
        self.nodes: Nodes | None = None

    def play(self) -> list[dict[str, Any]]:
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.folder / "run" / "checkpoints").mkdir(parents=True)
        (self.folder / "case.json").write_text(json.dumps(self.case.as_dict()))
        began = time.time()
        with self._surroundings():
            self._until_done()
            rows = self._faults()
            found, counts = problems(self.folder, self.case)
        end = {
            "case": self.case.name,
            "end": True,
            "seconds": round(time.time() - began, 1),
            "starts": self.starts,
            "orphans_s": [round(seconds, 2) for _, seconds in self.gone],
            "missed": sorted({f.id for f in self.case.faults} - {row["id"] for row in rows}),
            **counts,
            "problems": [*self.trouble, *found],
        }
        return [*rows, end]

    # ---------------------------------------------------------------- the command

    def _until_done(self) -> None:
        more: list[str] = []
        while True:
            code = self._start(more)
            if code == 0:
                return
            if not self._was_meant(code):
                self.trouble.append(f"start {self.starts} ended with status {code}: {self._last_words()}")
                if len(self.trouble) >= TRIES:
                    return
            story = Story(self.folder)
            if not self.case.steps and (story.of("stopping") or len(self.trouble) >= TRIES - 1):
                more = [f"train.steps={story.step_at(time.time()) + 3}"]
            self._damage_checkpoint()

    def _start(self, more: list[str]) -> int:
        """One start of the command, to its end; its status."""
        self.starts += 1
        chaos_arms.append(self.folder / chaos_arms.TIMELINE, {"t": time.time(), "kind": "begin"})
        environment = {**os.environ, chaos_arms.CASE: str(self.folder), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        environment.pop("RAY_ADDRESS", None)
        if self.nodes:
            environment |= self.nodes.environment
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, str(HERE / "chaos_driver.py"), str(self.folder), *more],
                env=environment,
                cwd=HERE.parent,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._attend(process)
        finally:
            process.kill()
            process.wait()
        self.gone.append((time.time(), self._wait_for_nothing()))
        return int(process.returncode)

    def _attend(self, process: subprocess.Popen[bytes]) -> None:
        """Until it has ended; kills it where that is the next fault from outside."""
        began, kill = time.monotonic(), None
        if self.outside and self.outside[0].what == "kill":
            kill = self.outside.pop(0)
        seen, last = 0, began
        while process.poll() is None:
            now = time.monotonic()
            if kill and self._is_moment(kill, now - began):
                chaos_arms.strike(kill.id, self.folder, step=Story(self.folder).step_at(time.time()))
                process.kill()
                kill = None
            size = sum(path.stat().st_size for path in self.folder.glob("*.jsonl"))
            if size != seen:
                seen, last = size, now
            if now - last > START_S / 3 or now - began > 4 * START_S:
                self.trouble.append(f"start {self.starts} hung: nothing happened for {now - last:.0f} s")
                return
            if self.nodes:
                self.nodes.keep()
            time.sleep(0.05)

    def _is_moment(self, kill: Fault, age_s: float) -> bool:
        if kill.args.get("at") == "ray":
            return any("gcs_server" in _name(pid) for pid in marked(str(self.folder)))
        if "after_s" in kill.args:
            return bool(age_s >= kill.args["after_s"])
        story = Story(self.folder)
        ready = [row for row in story.of("training") if row["t"] > time.time() - age_s]
        return bool(ready) and story.step_at(time.time()) >= kill.args["at_step"]

    def _wait_for_nothing(self) -> float:
        """Seconds until no process of the run was left."""
        began = time.monotonic()
        while left := self._left():
            seconds = time.monotonic() - began
            if seconds > ORPHANS_S:
                names = [_name(pid) for pid in left]
                self.trouble.append(f"start {self.starts}: {seconds:.0f} s after its end there are still {names[:6]}")
                for pid in left:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                return seconds
            time.sleep(0.05)
        return time.monotonic() - began

    def _left(self) -> list[int]:
        mine = self.nodes.pids() if self.nodes else set()
        return [pid for pid in marked(str(self.folder)) if pid not in mine]

    def _was_meant(self, code: int) -> bool:
        """Whether a fault of this start explains its end."""
        since = max(row["t"] for row in Story(self.folder).of("begin"))
        struck = {row["id"] for row in self._strikes() if "healthy_s" not in row and row["t"] >= since}
        mine = [f for f in self.case.faults if f.id in struck]
        if any(f.who in ("driver", "driver-save") and f.what == "kill" for f in mine) and code == -signal.SIGKILL:
            return True
        stopped = [row for row in Story(self.folder).of("stopping") if row["t"] >= since]
        return bool(stopped or any(f.what == "term" for f in mine)) and code in (1, -signal.SIGTERM)

    def _damage_checkpoint(self) -> None:
        """Between two starts, where that is the next fault from outside and there is an older one to fall back to."""
        root = self.folder / "run" / "checkpoints"
        whole = sorted((p for p in root.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))
        if not self.outside or self.outside[0].who != "checkpoint" or len(whole) < 2:
            return
        fault = self.outside.pop(0)
        at = damage(whole[-1], fault.what, self.rng)
        chaos_arms.strike(fault.id, self.folder, at=f"{whole[-1].name}/{at}")

    # ---------------------------------------------------------------- surroundings

    @contextlib.contextmanager
    def _surroundings(self) -> Iterator[None]:
        """What the case needs around it."""
        with contextlib.ExitStack() as stack:
            if self.case.needs == "disk":
                where = str(self.folder / "run" / "checkpoints")
                subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", where], check=True)
                stack.callback(subprocess.run, ["umount", where], check=True)
            if self.case.needs == "ports":
                for fault in self.outside:
                    listener = stack.enter_context(socket.socket())
                    with contextlib.suppress(OSError):  # somebody else occupies it
                        listener.bind(("127.0.0.1", fault.args["port"]))
                        listener.listen()
                    chaos_arms.strike(fault.id, self.folder)
                self.outside = []
            if self.case.needs == "nodes":
                self.nodes = stack.enter_context(Nodes(self.folder))
            yield

    # ---------------------------------------------------------------- what came of it

    @property
    def _log(self) -> Path:
        return self.folder / "command.log"

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-3:])[-600:]

    def _strikes(self) -> list[dict[str, Any]]:
        return chaos_arms.rows(self.folder / chaos_arms.STRIKES)

    def _faults(self) -> list[dict[str, Any]]:
        """A line for each fault that happened."""
        story = Story(self.folder)
        known = {fault.id: fault for fault in self.case.faults}
        healthy = {row["id"]: row["healthy_s"] for row in self._strikes() if "healthy_s" in row}
        struck: dict[str, dict[str, Any]] = {}
        for row in self._strikes():
            if "healthy_s" not in row:
                struck.setdefault(row["id"], row)
        return [self._line(known[id], row, healthy, story) for id, row in struck.items()]

    def _line(
        self, fault: Fault, row: dict[str, Any], healthy: dict[str, float | None], story: Story
    ) -> dict[str, Any]:
        t = row["t"]
        ended = next((end for end in self.gone if end[0] >= t), None) if fault.who == "driver" else None
        is_end = ended is not None and fault.what in ("kill", "term")
        later = story.next_step_s(t, others=1 if is_end and fault.what == "term" else 0)
        recovered = healthy.get(fault.id, later)
        trouble = []
        if fault.id in healthy and recovered is None:
            trouble.append("never got over")
        if is_end and ended and ended[1] > ORPHANS_S:
            trouble.append(f"orphans after {ended[1]:.0f} s")
        if fault.what == "term" and ended and ended[0] - t > GRACE_S:
            trouble.append(f"went on for {ended[0] - t:.0f} s")
        until = t + recovered if recovered is not None else time.time()
        return {
            "case": self.case.name,
            "id": fault.id,
            "kind": fault.kind,
            "who": fault.who,
            "what": fault.what,
            "stage": fault.stage,
            "t": round(t, 3),
            "step": row.get("step", story.step_at(t)),
            **{k: v for k, v in row.items() if k in ("name", "at", "met", "bucket", "key", "once", "victim")},
            "next_step_s": None if later is None else round(later, 3),
            "healthy_s": None if recovered is None else round(recovered, 3),
            "ended_s": round(ended[0] - t, 3) if is_end and ended else None,
            "orphans_s": round(ended[1], 3) if is_end and ended else None,
            "rolled_back": story.rolled_back(t, until + 0.5) if fault.who in ROLLS_BACK else 0,
            "problems": trouble,
        }


ROLLS_BACK = ("learner", "driver", "checkpoint")


def _name(pid: int) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{pid} {psutil.Process(pid).name()}"
    return str(pid)
