"""Repeats the quickstart over seeds and algorithms and prints the README's table. Resumable: finished runs are kept.

    python tools/quickstart_table.py --seeds 0 1 2 --algorithms hapo grpo sft
    python tools/quickstart_table.py --seeds 0 --algorithms hapo --also generator.engine=vllm generator.count=2 learner.ranks=2

Writes benchmarks/results/<name>.json: every evaluation of every run, injected teachers at the start and at the end, seconds,
versions and the date.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--algorithms", nargs="+", default=["hapo", "grpo", "sft"])
    parser.add_argument("--also", nargs="*", default=[], help="further key=value overrides")
    parser.add_argument("--name", default="quickstart")
    parser.add_argument("--runs", type=Path, default=Path("runs/table"))
    args = parser.parse_args()
    rows = []
    for algorithm in args.algorithms:
        for seed in args.seeds:
            folder = args.runs / f"{args.name}-{algorithm}-{seed}"
            overrides = [f"algorithm={algorithm}", f"seed={seed}", *args.also]
            measured.train(folder, "configs/quickstart.yaml", "run.resume=never", *overrides)
            rows.append({"algorithm": algorithm, "seed": seed, **read(folder)})
            print(line(rows[-1]), flush=True)
    target = measured.write(args.name, {"overrides": args.also, "runs": rows})
    print(f"\nwritten to {target}")


def read(folder: Path) -> dict[str, Any]:
    rows = measured.rows(folder)
    injected = [r["gate/injected"] for r in rows if "gate/injected" in r]
    share = max(1, len(injected) // 5)
    last = rows[-1]
    return {
        "curve": measured.curve(rows, measured.EVAL),
        "standard_error": round(last[f"{measured.EVAL}/se"], 4),
        "injected_first_fifth": round(fmean(injected[:share]), 3),
        "injected_last_fifth": round(fmean(injected[-share:]), 3),
        "staleness_max": max(r.get("staleness/max", 0) for r in rows),
        "training_s": round(last["time"] - rows[0]["time"], 1),
        "step_s_mean": round(fmean(r["time/step_s"] for r in rows if "time/step_s" in r), 3),
    }


def line(row: dict[str, Any]) -> str:
    curve = " ".join(f"{step}:{value:.2f}" for step, value in row["curve"].items())
    return (
        f"{row['algorithm']:>8} seed {row['seed']}  {curve}  injected {row['injected_first_fifth']:.2f} -> "
        f"{row['injected_last_fifth']:.2f}  {row['training_s']:.0f} s"
    )


if __name__ == "__main__":
    main()
