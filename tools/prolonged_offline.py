"""Off-RL and FPA, trained far beyond the point where Off-RL stops gaining, on the same cached answers. Resumable.

    python tools/prolonged_offline.py                 # 400 steps each: about five minutes on two cores
    python tools/prolonged_offline.py --steps 1500 --seeds 0 1 2

The paper of FPA says that under Off-RL the log-probs of correct answers fall in the long run (the weights of wrong ones
drag shared tokens down) and that FPA prevents it. This run shows what happens on the built-in task, whatever it is: mean
token log-prob of correct and incorrect training answers, and held-out pass@1 at temperature 1.

Writes benchmarks/results/prolonged_offline.json and .svg.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import measured

from hapo_async.report import charts
from hapo_async.report.charts import Line

CONFIG = "configs/quickstart.yaml"
BASE = ["algorithm=sft", "train.steps=14", "learner.lr=1e-4", "eval.every=0"]
ALGORITHMS = {"off_rl": "Off-RL", "fpa": "FPA (λ=1)"}
STYLE = (
    "<style>:root{--c0:#2f56c9;--c1:#c5415c;--c2:#0b8f7a;--c3:#d07d12}text{font:11px sans-serif;fill:#555}"
    ".grid{stroke:#ddd}.curve{fill:none;stroke-width:1.8}.raw{fill:none;stroke-width:1;opacity:.25}.dashed{stroke-dasharray:5 4}"
    ".cursor{display:none}.head{font:600 12px sans-serif;fill:#222}</style>"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--lr", default="1e-5")
    parser.add_argument("--also", nargs="*", default=[], help="further key=value overrides")
    parser.add_argument("--runs", type=Path, default=Path("runs/learning"))
    args = parser.parse_args()
    found = []
    for seed in args.seeds:
        base = args.runs / f"base-{seed}"
        measured.train(base, CONFIG, f"seed={seed}", *BASE)
        for name in ALGORITHMS:
            folder = args.runs / f"prolonged-{name}-{args.steps}-{args.lr}-{seed}"
            overrides = [f"algorithm={name}", f"seed={seed}", f"model={base / 'model'}", f"train.steps={args.steps}"]
            overrides += [f"data.answers={args.runs / f'answers-{seed}'}", "data.limit=512", f"learner.lr={args.lr}"]
            overrides += ["learner.warmup_steps=5", "eval.every=20", "eval.sampling.temperature=1.0", *args.also]
            measured.train(folder, CONFIG, *overrides)
            found.append({"algorithm": name, "seed": seed, **read(folder)})
            print(line(found[-1]), flush=True)
    target = measured.write("prolonged_offline", {"steps": args.steps, "lr": args.lr, "also": args.also, "runs": found})
    target.with_suffix(".svg").write_text(plot([r for r in found if r["seed"] == args.seeds[0]]))
    print(f"\nwritten to {target} and {target.with_suffix('.svg')}")


def read(folder: Path) -> dict[str, Any]:
    rows = measured.rows(folder)
    return {
        "correct": measured.curve(rows, "policy/logp/correct"),
        "incorrect": measured.curve(rows, "policy/logp/incorrect"),
        "pass@1": measured.curve(rows, measured.EVAL),
        "pass@1_se": measured.curve(rows, f"{measured.EVAL}/se"),
    }


def line(row: dict[str, Any]) -> str:
    def ends(curve: dict[int, float]) -> str:
        values = list(curve.values())
        share = max(1, len(values) // 20)
        return f"{sum(values[:share]) / share:.3f} -> {sum(values[-share:]) / share:.3f}"

    return (
        f"{row['algorithm']:<8} seed {row['seed']}  log-prob of correct {ends(row['correct'])}, of incorrect "
        f"{ends(row['incorrect'])}, held-out pass@1 {ends(row['pass@1'])}"
    )


def plot(runs: list[dict[str, Any]]) -> str:
    """Two panels as one picture: log-probs of correct (full) and incorrect (dashed) answers; pass@1."""
    lines, accuracy = [], []
    for color, run in enumerate(runs):
        label = ALGORITHMS[run["algorithm"]]
        for which, dashed in (("correct", False), ("incorrect", True)):
            curve = run[which]
            lines.append(
                Line(f"{label}, {which}", list(curve), list(curve.values()), color, smooth=True, dashed=dashed)
            )
        accuracy.append(Line(label, list(run["pass@1"]), list(run["pass@1"].values()), color))
    panels = [charts.line_chart(lines), charts.line_chart(accuracy, "share", floor=0.0, ceiling=1.0)]
    titles = [
        "mean token log-prob of training answers (dashed: incorrect)",
        "held-out pass@1, sampled at temperature 1",
    ]
    legend = "".join(
        f'<text x="{46 + 120 * i}" y="296" style="fill:var(--c{i})">{ALGORITHMS[run["algorithm"]]}</text>'
        for i, run in enumerate(runs)
    )
    body = "".join(
        f'<text class="head" x="{46 + 560 * i}" y="16">{title}</text><svg x="{560 * i}" y="24" width="560" height="260" '
        f"{panel.removeprefix('<svg ')}"
        for i, (title, panel) in enumerate(zip(titles, panels, strict=True))
    )
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1120 304" width="1120" height="304">'
        f'{STYLE}<rect width="1120" height="304" fill="white"/>{body}{legend}</svg>\n'
    )


if __name__ == "__main__":
    main()
