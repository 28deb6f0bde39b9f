"""What every algorithm learns on the built-in task, measured. Resumable: finished runs are kept.

    python tools/learning_results.py                          # everything: about half an hour on two cores
    python tools/learning_results.py --parts offline --seeds 0 1 2
    python tools/learning_results.py --only fpa dpo

Three parts. ``demonstrations``: algorithms that meet demonstrations start from the shipped model, with 32 solutions among
1,024 prompts, as in the quickstart. ``rewards``: algorithms that learn from their own answers alone start from a model
with half the skill (the shipped one after 14 steps of SFT), because they meet no success otherwise. ``offline``:
the same half-skilled model answers 512 prompts eight times, once, and every algorithm trains on these answers.

Writes benchmarks/results/algorithms.json: held-out pass@1 before and after, its standard error and its curve; greedy in the
first part, sampled at temperature 1 in the others (greedily, half a skill already looks like nine tenths of one).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measured

from hapo_async import algorithms

CONFIG = "configs/quickstart.yaml"
BASE = ["algorithm=sft", "train.steps=14", "learner.lr=1e-4", "eval.every=0"]
DEMONSTRATIONS: dict[str, list[str]] = {
    **{name: [] for name in ("sft", "luffy", "hpt", "hpt_off_on", "hpt_mix_on", "hapo", "hapo_apo")},
    "srft": ["learner.lr=5e-5"],  # at the others' 3e-4 its unbounded −ℓ of wrong answers ends at 0
    "hapo, gate.decision=thompson": ["gate.decision=thompson"],
    "hapo, gate.decision=pooled": ["gate.decision=pooled", "gate.decay=0.5"],
    "hapo, threshold .8 to .2 (sigmoid)": ["gate.schedule={kind: sigmoid, end: 0.2}"],
    "hapo, advantage over rollouts": ["gate.advantage_group=rollouts"],
    "hpt, SFT for 40 steps, then RL": ["options.sft_steps=40", "options.gamma=-1"],
}
REWARDS = ["eval.sampling.temperature=1.0", "train.steps=60", "data.demonstrations=0", "learner.lr=2e-4"]
FEWER = {"nsr": ["train.steps=30"]}  # soon there is hardly a wrong answer left
OFFLINE = [
    *("eval.sampling.temperature=1.0", "eval.every=10", "data.limit=512"),
    *("train.steps=40", "learner.lr=1e-5", "learner.warmup_steps=5"),  # at 1e-4 most of them lose what they had
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", help="names of rows")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    found = []
    for part in args.parts:
        for name, overrides in PARTS[part].items():
            if args.only and name not in args.only:
                continue
            for seed in args.seeds:
                folder = run(args.runs, part, name, overrides, seed)
                found.append({"part": part, "name": name, "seed": seed, "overrides": overrides, **read(folder)})
                print(line(found[-1]), flush=True)
    if not args.only:
        print(f"\nwritten to {measured.write('algorithms', {'base': BASE, 'runs': found})}")


def run(root: Path, part: str, name: str, overrides: list[str], seed: int) -> Path:
    """Trains one row; returns its folder."""
    algorithm = name.split(",")[0]
    start = []
    if part != "demonstrations":
        base = root / f"base-{seed}"
        measured.train(base, CONFIG, f"seed={seed}", *BASE)
        start = [f"model={base / 'model'}"]
    if part == "offline":
        start.append(f"data.answers={root / f'answers-{seed}'}")
    folder = root / f"{part}-{''.join(c if c.isalnum() else '_' for c in name)}-{seed}"
    measured.train(folder, CONFIG, f"algorithm={algorithm}", f"seed={seed}", *start, *overrides)
    return folder


def read(folder: Path) -> dict[str, Any]:
    """Before, after and the curve of a run."""
    rows = measured.rows(folder)
    curve = measured.curve(rows, measured.EVAL)
    error = measured.curve(rows, f"{measured.EVAL}/se")
    first, last = min(curve), max(curve)
    return {
        "before": curve[first],
        "after": curve[last],
        "after_se": error[last],
        "curve": curve,
        "steps": rows[-1]["step"],
        "training_s": round(rows[-1]["time"] - rows[0]["time"], 1),
    }


def line(row: dict[str, Any]) -> str:
    return (
        f"{row['part']:<15}{row['name']:<40} seed {row['seed']}  {row['before']:.2f} -> {row['after']:.2f} "
        f"± {row['after_se']:.2f}  {row['steps']} steps  {row['training_s']:.0f} s"
    )


def parts() -> dict[str, dict[str, list[str]]]:
    """Every algorithm of the table, in the part that it can be measured in."""
    rest = [algorithms.get(n) for n in algorithms.names() if n not in DEMONSTRATIONS]
    return {
        "demonstrations": {name: ["train.steps=100", *more] for name, more in DEMONSTRATIONS.items()},
        "rewards": {a.name: REWARDS + FEWER.get(a.name, []) for a in rest if not a.offline},
        "offline": {a.name: OFFLINE for a in rest if a.offline},
    }


PARTS = parts()

if __name__ == "__main__":
    main()
