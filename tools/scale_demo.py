"""A live run on the built-in task scaled 1 -> 4 -> 2 generators: `python tools/scale_demo.py [--folder F] [--phase-s S]`.

Each generator is limited to a fifth of a core: this process stops it (SIGSTOP) whenever it has used more CPU time than that
since it began to serve, and lets it go on (SIGCONT) when it has not. So more generators mean more sampling, on a machine
with few cores. Every generator may have few groups at a time, so that its batches are equally large in all phases.

Writes benchmarks/results/scaling.json and leaves report.html in the folder. A command that was killed can be given again: a
finished run is not made anew.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import measured
import psutil

SHARE = 0.2  # of a core, for each generator
TICK_S, BURST_S = 0.01, 0.01
PHASES = (1, 4, 2)
PROMPTS, STALENESS, ANSWERS, CONCURRENT = 8, 3, 8, 4
DRAIN_S = 0.0  # what is being sampled is handed over at once
SETTLE_S = 10.0  # after a change, before a phase is measured
START_S = 300.0


class Throttle(threading.Thread):
    """Holds processes to ``SHARE`` of a core, from ``adopt`` on."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._held: dict[psutil.Process, tuple[float, float]] = {}  # process: when it was adopted, its CPU seconds then
        self._stopped: set[psutil.Process] = set()
        self._lock = threading.Lock()
        self._over = threading.Event()

    def adopt(self, processes: list[psutil.Process]) -> None:
        with self._lock:
            for process in processes:
                if process not in self._held:
                    self._held[process] = (time.monotonic(), _cpu_s(process))

    def shares(self) -> list[float]:
        """Cores that each of them has used since it was adopted."""
        with self._lock, contextlib.suppress(psutil.NoSuchProcess):
            now = time.monotonic()
            return [
                round((_cpu_s(p) - used) / (now - since), 3) for p, (since, used) in self._held.items() if _alive(p)
            ]
        return []

    def run(self) -> None:
        while not self._over.wait(TICK_S):
            with self._lock:
                for process, (since, used) in list(self._held.items()):
                    try:
                        self._hold(process, _cpu_s(process) - used - SHARE * (time.monotonic() - since))
                    except psutil.NoSuchProcess:
                        del self._held[process]

    def _hold(self, process: psutil.Process, ahead_s: float) -> None:
        if ahead_s > BURST_S and process not in self._stopped:
            process.suspend()
            self._stopped.add(process)
        elif ahead_s <= 0 and process in self._stopped:
            process.resume()
            self._stopped.discard(process)

    def close(self) -> None:
        """Lets all of them go."""
        self._over.set()
        self.join()
        for process in self._stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.resume()
        self._stopped.clear()


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _alive(process: psutil.Process) -> bool:
    return bool(process.is_running()) and process.status() != psutil.STATUS_ZOMBIE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--phase-s", type=float, default=90.0, help="Seconds of each measured phase.")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that the run does not outlive this command
    told = given.folder / "demo.json"
    if not told.exists():
        play(given.folder, given.phase_s)
    target = measured.write("scaling", summary(given.folder, json.loads(told.read_text())))
    sys.stdout.write(f"{target}\n{given.folder / 'report.html'}\n")


def play(folder: Path, phase_s: float) -> None:
    """The run with its changes; what was done when goes into demo.json."""
    command = [
        sys.executable, "-m", "hapo_async", "train", "configs/quickstart.yaml", f"run.dir={folder}", "run.resume=never",
        "train.steps=1000000", f"train.batch_prompts={PROMPTS}", f"sampling.n={ANSWERS}", f"max_staleness={STALENESS}",
        "generator.count=1", f"generator.max_concurrent={CONCURRENT}", "data.eval=[]", "rollouts.sample=1.0",
        "train.checkpoint_every=0", "learner.lr=1e-5", "learner.mini_batches=1",
    ]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    throttle = Throttle()
    throttle.start()
    phases: list[dict[str, Any]] = []
    try:
        _wait_for_step(folder, 3, process)
        for index, count in enumerate(PHASES):
            lines = _scale(folder, count) if index else []
            throttle.adopt(_generators(process))
            time.sleep(SETTLE_S)
            began = time.time()
            time.sleep(phase_s)
            phases.append(
                {"generators": count, "from": began, "to": time.time(), "said": lines, "cores": throttle.shares()}
            )
        throttle.close()
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)
    finally:
        throttle.close()
        process.kill()
    (folder / "demo.json").write_text(json.dumps(phases))


def _wait_for_step(folder: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_S
    while not (folder / "metrics.jsonl").exists() or len(measured.rows(folder)) < step:
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit("the run did not get going")
        time.sleep(0.5)


def _scale(folder: Path, count: int) -> list[str]:
    arguments = ["scale", str(folder), f"generators={count}", "--drain-deadline", str(DRAIN_S)]
    done = subprocess.run([sys.executable, "-m", "hapo_async", *arguments], text=True, capture_output=True, check=True)
    sys.stdout.write(done.stdout)
    return done.stdout.splitlines()


def _generators(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "GeneratorActor" in p.name()]


def summary(folder: Path, phases: list[dict[str, Any]]) -> dict[str, Any]:
    rows = measured.rows(folder)
    files = sorted((folder / "rollouts").glob("step-*.jsonl"))
    kept = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    trained = Counter((row["key"][0], row["key"][1]) for row in kept)
    last = rows[-1]
    return {
        "what": "the built-in task, transformers engines, each generator held to a fifth of a core (SIGSTOP, SIGCONT)",
        "settings": {"batch_prompts": PROMPTS, "n": ANSWERS, "max_staleness": STALENESS, "max_concurrent": CONCURRENT},
        "phases": [_phase(phase, rows) for phase in phases],
        "steps": last["step"],
        "groups": {
            "trained": int(last["ledger/trained"]),
            "in_rollouts": len(kept),
            "trained_twice": sum(n > 1 for n in trained.values()),
            "dropped": int(sum(v for k, v in last.items() if k.startswith("ledger/dropped/"))),
            "issued": int(last["ledger/issued"]),
            "elsewhere": int(sum(last[f"ledger/{place}"] for place in ("in_flight", "buffered", "to_retry"))),
            "continued_by_another": sum(row["key"][2] > 0 for row in kept),
        },
        "oldest_token_steps": max(row.get("staleness/max") or 0 for row in rows),
    }


def _phase(phase: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates over the steps that lie within a phase."""
    inside = [row for row in rows if phase["from"] <= row["time"] - row["time/step_s"] and row["time"] <= phase["to"]]
    seconds = sum(row["time/step_s"] for row in inside)
    tokens = sum(row["throughput/generate_tokens_per_s"] * row["time/step_s"] for row in inside)
    return {
        "generators": phase["generators"],
        "cores_of_each": phase["cores"],
        "steps": len(inside),
        "seconds": round(seconds, 1),
        "generate_tokens_per_s": round(tokens / max(seconds, 1e-9)),
        "groups_per_s": round(len(inside) * PROMPTS / max(seconds, 1e-9), 2),
        "learner_waits_share": round(sum(row["time/wait_for_batch_s"] for row in inside) / max(seconds, 1e-9), 3),
        "said": phase["said"],
    }


if __name__ == "__main__":
    main()
