"""Faults of every kind, injected into real runs: is anything lost, trained twice, taken in corrupt, or left behind?

    make chaos                                     # the whole schedule, about an hour and a half on two cores
    python tools/chaos.py --seed 1                 # another one; the same command goes on where it was killed
    python tools/chaos.py --only learner-2 disk    # some of its runs
    python tools/chaos.py --again vllm             # a run that is there already
    python tools/chaos.py --list                   # what there is
    python tools/chaos.py --table                  # from the journal into docs/faults.md and benchmarks/results/chaos.json

The schedule is ``chaos_plan``; ``chaos_play`` plays one run of it, in which ``chaos_driver`` is `hapo-async train` with
``chaos_inject`` inside, and ``chaos_checks`` looks at what is left. runs/chaos/journal-SEED.jsonl gets a line for each fault as
soon as its run has ended, and one for the run. A run whose line is there is not played again.

Deadlines are shorter than a user's (``chaos_plan.COMMON``), and deaths are not rationed. Only processes that were started here
are ended. The run "disk" mounts a small file system in a mount namespace of its own, which needs `unshare`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(1, str(Path(__file__).resolve().parent.parent))

import chaos_arms
import chaos_plan
import chaos_table
from chaos_inject import damage, problem_of
from chaos_play import Player

from hapo_async import checkpoint

FILES, FILE_TRIALS = "checkpoint-files", 150


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/chaos"))
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--again", nargs="+", default=[], metavar="NAME")
    parser.add_argument("--short", action="store_true", help="what `make test` runs")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # of a mount namespace
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))  # so that no run outlives this command
    args.runs.mkdir(parents=True, exist_ok=True)
    journal = args.runs / f"journal-{'short-' if args.short else ''}{args.seed}.jsonl"
    cases = chaos_plan.short(args.seed) if args.short else chaos_plan.schedule(args.seed)
    wanted = [case for case in cases if case.name in (args.only or args.again or [c.name for c in cases])]
    if args.list:
        for case in cases:
            print(f"{case.name:<18} {len(case.faults):>4} faults, {case.steps or case.least:>4} steps")
    elif args.table:
        print(chaos_table.write(journal))
    else:
        for case in wanted:
            if case.name in args.again or args.inside or case.name not in ended(journal):
                play(case, args.runs / f"{args.seed}", journal, args)
        if not (args.short or args.only or args.again) and FILES not in ended(journal):
            break_files(args.runs / f"{args.seed}", journal, args.seed)
        if not args.inside:
            print(chaos_table.text(journal))
            sys.exit(1 if any(row["problems"] for row in chaos_table.rows(journal)) else 0)


def ended(journal: Path) -> set[str]:
    """Names of the runs that are there."""
    return {row["case"] for row in chaos_arms.rows(journal) if row.get("end")}


def play(case: chaos_plan.Case, folder: Path, journal: Path, args: argparse.Namespace) -> None:
    if case.needs == "disk" and not args.inside:
        _play_inside(case, args)
        return
    print(f"{case.name}: {len(case.faults)} faults", flush=True)
    try:
        lines = Player(case, folder / case.name).play()
    except Exception as error:  # a run that cannot be looked at is a finding, and no reason to play no others
        text = f"{type(error).__name__}: {error}"
        lines = [{"case": case.name, "end": True, "seconds": 0.0, "problems": [text]}]
    _write(journal, lines)


def _play_inside(case: chaos_plan.Case, args: argparse.Namespace) -> None:
    """In a mount namespace of its own."""
    unshare = ["unshare", "-m"] if os.geteuid() == 0 else ["unshare", "-Urm"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        print(f"{case.name}: left out, since this machine allows no mount namespace", flush=True)
        return
    command = [sys.executable, __file__, "--seed", str(args.seed), "--runs", str(args.runs), "--only", case.name]
    subprocess.run([*unshare, *command, "--inside"], check=False)


def break_files(folder: Path, journal: Path, seed: int) -> None:
    """Real checkpoints, each with one file cut short, with a flipped bit, or without a file: the newest is to be refused and the
    one before it taken."""
    source = sorted(
        (folder / "driver-random-0" / "run" / "checkpoints").glob("step-[0-9]*"), key=lambda p: int(p.name[5:])
    )[-2:]
    rng, began, lines = random.Random(f"files/{seed}"), time.time(), []
    for number in range(FILE_TRIALS):
        root = folder / FILES
        shutil.rmtree(root, ignore_errors=True)
        for path in source:
            shutil.copytree(path, root / path.name)
        what = chaos_plan.CHECKPOINT_DAMAGE[number % 3]
        newest = root / source[1].name
        at = damage(newest, what, rng)
        is_harmless, t = not problem_of(newest), time.monotonic()
        found = checkpoint.newest(root)
        seconds = time.monotonic() - t
        wrong = found is None or problem_of(found.path) or (found.path == newest and not is_harmless)
        lines.append(
            {
                "case": FILES,
                "id": f"{FILES}-{number:03d}",
                "kind": f"checkpoint {what}",
                "who": "checkpoint",
                "what": what,
                "stage": "loading",
                "t": round(time.time(), 3),
                "at": at,
                "healthy_s": round(seconds, 3),
                "problems": ["a corrupt checkpoint was taken"] if wrong else [],
            }
        )
    taken = sum(bool(line["problems"]) for line in lines)
    end = {
        "case": FILES,
        "end": True,
        "seconds": round(time.time() - began, 1),
        "corrupt_accepted": taken,
        "problems": [],
    }
    _write(journal, [*lines, end])


def _write(journal: Path, lines: Sequence[dict[str, Any]]) -> None:
    """All lines of a run, with the number of the try that they are of."""
    tries = sum(row["case"] == lines[-1]["case"] for row in chaos_arms.rows(journal) if row.get("end"))
    with journal.open("a") as file:
        file.writelines(json.dumps({**line, "try": tries}) + "\n" for line in lines)
    end = lines[-1]
    print(
        f"{end['case']}: {len(lines) - 1} faults in {end['seconds']} s, problems: {end['problems'] or 'none'}",
        flush=True,
    )
    for line in lines[:-1]:
        if line["problems"]:
            print(f"  {line['id']} {line['kind']} {line['stage']}: {'; '.join(line['problems'])}", flush=True)


if __name__ == "__main__":
    main()
