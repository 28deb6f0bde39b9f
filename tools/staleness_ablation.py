"""What staleness costs and what each correction repairs, on the built-in task. Resumable: finished runs are kept.

    python tools/staleness_ablation.py --workers 2            # 75 runs: about an hour on two quiet cores
    python tools/staleness_ablation.py --seeds 0 --only tis/8 off/8
    python tools/staleness_ablation.py --summary              # table and plot from what is finished
    python tools/staleness_ablation.py --plot-only            # both again from staleness.json, without the runs

Every batch is exactly ``lag`` learner steps old (``staleness.force_lag``), whatever the timing; lag 0 is synchronous and
run once per seed. All runs of a seed start from the same half-skilled model (the shipped one after 14 steps of SFT) and
train it with GRPO in two mini-batches a step, so that even at lag 0 the ratio moves. The learning rate is the
quickstart's, 3e-4, for a model of 80,000 parameters. That is large and exaggerates staleness: one step here moves the
policy as far as many do at the 1e-6 of a large model.

Writes benchmarks/results/staleness.json and .svg, and prints the table of docs/staleness.md. Held-out pass@1 is
sampled at temperature 1; the table's number for a run is its mean over the last three evaluations. A run has
*collapsed* when it ends below half of its own best, or could not go on at all; it has *dipped* when that happened at
any evaluation.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measured
import psutil

from hapo_async.report import charts
from hapo_async.report.charts import Line

CONFIG = "configs/quickstart.yaml"
BASE = ["algorithm=sft", "train.steps=14", "learner.lr=1e-4", "eval.every=0", "data.eval=[]"]
COMMON = [
    *("algorithm=grpo", "data.demonstrations=0", "learner.mini_batches=2", "learner.lr=3e-4", "train.batch_prompts=8"),
    *("eval.every=20", "eval.sampling.temperature=1.0", "train.checkpoint_every=0", "rollouts.sample=0"),
    "run.alarms={canary_every: 0}",
]
LAGS = (1, 2, 4, 8)
CORRECTIONS: dict[str, tuple[str, list[str]]] = {
    "off": ("uncorrected", ["staleness.correction=off"]),
    "clip": ("behaviour clip", ["staleness.correction=clip"]),
    "tis": ("decoupled + TIS", ["staleness.correction=tis"]),
    "loglinear": ("log-linear", ["staleness.correction=tis", "staleness.options={prox: loglinear}"]),
    "m2po": ("M2PO", ["staleness.correction=m2po"]),
    "decay": ("age-dependent caps", ["staleness.correction=tis", "staleness.options={decay: 0.7}"]),
}
SYNCHRONOUS = "sync"
FAILED = "failed.txt"
LATE = 40  # steps at the end that "late" means
STYLE = (
    "<style>:root{--c0:#c5415c;--c1:#d07d12;--c2:#2f56c9;--c3:#0b8f7a;--c4:#7a4fc0;--c5:#557a1e;--c6:#888}"
    "text{font:11px sans-serif;fill:#555}.grid{stroke:#ddd}.curve{fill:none;stroke-width:1.8}.band{opacity:.10}"
    ".raw{fill:none;stroke-width:1;opacity:.25}.dashed{stroke-dasharray:5 4}.cursor{display:none}"
    ".head{font:600 12px sans-serif;fill:#222}</style>"
)


@dataclass(frozen=True)
class Cell:
    """One run of the table. lag 0 has no correction."""

    correction: str
    lag: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.correction}-{self.lag}-{self.seed}"

    @property
    def overrides(self) -> list[str]:
        if not self.lag:
            return ["max_staleness=0"]
        return [f"max_staleness={self.lag}", f"staleness.force_lag={self.lag}", *CORRECTIONS[self.correction][1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="correction, or correction/lag; sync is lag 0")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--workers", type=int, default=1, help="runs side by side, of about one core each")
    parser.add_argument("--runs", type=Path, default=Path("runs/staleness"))
    parser.add_argument("--summary", action="store_true", help="train nothing")
    parser.add_argument("--plot-only", action="store_true", help="train and read nothing: redraw what was measured")
    args = parser.parse_args()
    if args.plot_only:
        redraw(measured.RESULTS / "staleness.json")
        return
    wanted = cells(args.seeds, args.only)
    if not args.summary:
        train_all(wanted, args.runs, args.steps, args.workers)
    found = [read(args.runs, cell) for cell in wanted if is_finished(args.runs / cell.name)]
    if not found:
        raise SystemExit("no run is finished")
    settings = {"base": BASE, "common": COMMON, "steps": args.steps, "corrections": CORRECTIONS}
    target = measured.write("staleness", {**settings, "runs": found})
    target.with_suffix(".svg").write_text(plot(found))
    print(f"\n{table(found)}\n\nwritten to {target} and {target.with_suffix('.svg')}")


def redraw(source: Path) -> None:
    """The plot beside a file of results, from that file alone."""
    runs = json.loads(source.read_text())["runs"]
    for run in runs:
        run["curve"] = {int(step): value for step, value in run["curve"].items()}
    target = source.with_suffix(".svg")
    target.write_text(plot(runs))
    print(f"{table(runs)}\n\n{target} is drawn again from {source}")


def cells(seeds: Sequence[int], only: Sequence[str] | None) -> list[Cell]:
    """All of a seed before the next one; the longest lags first, where there is most to see."""
    every = [
        Cell(correction, lag, seed)
        for seed in seeds
        for lag in (0, *sorted(LAGS, reverse=True))
        for correction in (CORRECTIONS if lag else [SYNCHRONOUS])
    ]
    return [c for c in every if not only or c.correction in only or f"{c.correction}/{c.lag}" in only]


# --------------------------------------------------------------------------------------------------------------------
# Training


def train_all(wanted: Sequence[Cell], root: Path, steps: int, workers: int) -> None:
    """Trains what is not finished, ``workers`` runs at a time. Each worker keeps one Ray for all of its runs. A run that
    fails for another reason than its training is reported; the same command tries it again."""
    root.mkdir(parents=True, exist_ok=True)
    began, done = time.monotonic(), 0
    todo = [cell for cell in wanted if not is_finished(root / cell.name)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_start_ray) as pool:
        for future in [pool.submit(_base, root, seed) for seed in sorted({c.seed for c in todo})]:
            future.result()
        for future in as_completed([pool.submit(_run, root, cell, steps) for cell in todo]):
            done += 1
            left_s = (time.monotonic() - began) / done * (len(todo) - done)
            error = future.exception()
            said = f"FAILED: {type(error).__name__}: {error}" if error else future.result()
            print(f"{said}  ({done}/{len(todo)}, {left_s / 60:.0f} min left)", flush=True)


def is_finished(folder: Path) -> bool:
    return (folder / "model").is_dir() or (folder / FAILED).exists()


def _start_ray() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from actors.placement import LocalRay

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    atexit.register(LocalRay(num_cpus=4).stop)


def _end_with(parent: int) -> None:
    """Ends this worker and all that it started once the command that started it is gone, however it went."""
    from actors.placement import end_processes

    while os.getppid() == parent:
        time.sleep(1.0)
    end_processes(psutil.Process().children(recursive=True))
    os._exit(1)


def _base(root: Path, seed: int) -> None:
    """The half-skilled model that every run of a seed starts from."""
    folder = root / f"base-{seed}"
    if not is_finished(folder):
        _train(folder, [f"seed={seed}", *BASE])


def _run(root: Path, cell: Cell, steps: int) -> str:
    start = [f"model={root / f'base-{cell.seed}' / 'model'}", f"seed={cell.seed}", f"train.steps={steps}"]
    _train(root / cell.name, [*start, *COMMON, *cell.overrides])
    return line(read(root, cell))


def _train(folder: Path, overrides: list[str]) -> None:
    """One run, from its start. One that training itself ended (non-finite steps) is a result; other errors are raised."""
    from hapo_async import config as configs
    from hapo_async.driver import run, setup
    from hapo_async.errors import RunError

    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    with folder.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        prepared = setup.prepare(configs.load(CONFIG, [f"run.dir={folder}", *overrides]))
        try:
            outcome = run.train(prepared)
        except RunError as error:
            if "learner.max_bad_steps" not in str(error):
                raise
            (folder / FAILED).write_text(str(error))
            return
    if not outcome.finished:
        shutil.rmtree(folder / "model", ignore_errors=True)
        sys.exit(f"{folder.name} was stopped by a signal")


# --------------------------------------------------------------------------------------------------------------------
# Results


def read(root: Path, cell: Cell) -> dict[str, Any]:
    """Curves and ends of a finished run."""
    rows = measured.rows(root / cell.name)
    curve = measured.curve(rows, measured.EVAL)
    steps = [row for row in rows if row.get("reward/mean") is not None]
    late = steps[-LATE:]
    failed = (root / cell.name / FAILED).exists()
    final = 0.0 if failed else curve[max(curve)]
    late_curve = [0.0] if failed else list(curve.values())[-3:]
    return {
        "correction": cell.correction,
        "lag": cell.lag,
        "seed": cell.seed,
        "overrides": cell.overrides,
        "curve": curve,
        "final": final,
        "late": round(statistics.fmean(late_curve), 4),
        "best": max(curve.values()),
        "collapsed": failed or final < max(curve.values()) / 2,
        "dipped": failed or _dipped(list(curve.values())),
        "reward": {
            steps[i]["step"]: _mean(steps[max(0, i - 4) : i + 1], "reward/mean") for i in range(4, len(steps), 5)
        },
        "reward_late": _mean(late, "reward/mean"),
        "ess": _mean(late, "policy/ess"),
        "mismatch_kl": _mean(late, "policy/mismatch_kl"),
        "grad_norm": _mean(late, "policy/grad_norm"),
        "grad_norm_max": max((row["policy/grad_norm"] for row in steps if row.get("policy/grad_norm")), default=None),
        "clip_frac": _mean(late, "policy/clip_frac"),
        "entropy": _mean(late, "policy/entropy"),
        "staleness": _mean(late, "staleness/mean"),
        "skipped_groups": sum(rows[-1].get(f"ledger/dropped/{why}", 0) for why in ("skipped_step", "poisoned")),
        "start_s": rows[0].get("time/run_s"),
        "seconds": rows[-1].get("time/run_s"),
    }


def _dipped(values: Sequence[float]) -> bool:
    return any(value < best / 2 for value, best in zip(values, itertools.accumulate(values, max), strict=True))


def _mean(rows: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row.get(name) is not None and math.isfinite(row[name])]
    return round(statistics.fmean(values), 5) if values else None


def line(run: dict[str, Any]) -> str:
    def number(name: str) -> str:
        return "-" if run[name] is None else f"{run[name]:.3f}"

    return (
        f"{run['correction']:<10} lag {run['lag']}  seed {run['seed']}  pass@1 {run['curve'][min(run['curve'])]:.2f} -> "
        f"{run['final']:.2f} (best {run['best']:.2f}{', COLLAPSED' if run['collapsed'] else ''})  ess {number('ess')}  "
        f"kl {number('mismatch_kl')}  {run['seconds']:.0f} s, of these {run['start_s']:.0f} to start"
    )


def table(runs: Sequence[dict[str, Any]]) -> str:
    """Markdown: rows are corrections, columns lags; late pass@1, mean ± standard deviation over seeds."""
    seeds = sorted({run["seed"] for run in runs})
    head = [
        f"| correction | {' | '.join(f'lag {lag}' for lag in LAGS)} | mean of lags | worst run | dipped | collapsed |"
    ]
    head.append("|---" * (len(LAGS) + 5) + "|")
    base = [run["late"] for run in runs if run["lag"] == 0]
    out = [f"Lag 0 (synchronous): {_spread(base)} ({len(seeds)} seeds).", "", *head]
    for name, (title, _) in CORRECTIONS.items():
        mine = [run for run in runs if run["correction"] == name]
        if not mine:
            continue
        by_lag = [[run["late"] for run in mine if run["lag"] == lag] for lag in LAGS]
        means = [statistics.fmean(values) for values in by_lag if values]
        dipped, collapsed = (sum(run[word] for run in mine) for word in ("dipped", "collapsed"))
        out.append(
            f"| {title} | {' | '.join(_spread(values) for values in by_lag)} | {statistics.fmean(means):.3f} | "
            f"{min(run['late'] for run in mine):.2f} | {dipped} | {collapsed} of {len(mine)} |"
        )
    return "\n".join(out)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "–"
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


# --------------------------------------------------------------------------------------------------------------------
# The plot


def plot(runs: Sequence[dict[str, Any]]) -> str:
    """One panel per lag: held-out pass@1 over steps, mean over seeds with one standard deviation; lag 0 dashed."""
    lags = [lag for lag in LAGS if any(run["lag"] == lag for run in runs)] or [0]
    titles = [f"lag {lag}: held-out pass@1, sampled at temperature 1" for lag in lags]
    panels = [charts.line_chart(_lines(runs, lag), "share", floor=0.0, ceiling=1.0) for lag in lags]
    body = "".join(
        f'<text class="head" x="{46 + 560 * (i % 2)}" y="{16 + 270 * (i // 2)}">{title}</text>'
        f'<svg x="{560 * (i % 2)}" y="{24 + 270 * (i // 2)}" width="560" height="240" {panel.removeprefix("<svg ")}'
        for i, (title, panel) in enumerate(zip(titles, panels, strict=True))
    )
    height = 270 * math.ceil(len(lags) / 2) + 24
    names = [title for title, _ in CORRECTIONS.values()] + ["lag 0"]
    legend = "".join(
        f'<text x="{46 + 150 * i}" y="{height - 8}" style="fill:var(--c{i})">{name}</text>'
        for i, name in enumerate(names)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1120 {height}" width="1120" height="{height}">'
        f'{STYLE}<rect width="1120" height="{height}" fill="white"/>{body}{legend}</svg>\n'
    )


def _lines(runs: Sequence[dict[str, Any]], lag: int) -> list[Line]:
    out = []
    for color, (name, (title, _)) in enumerate([*CORRECTIONS.items(), (SYNCHRONOUS, ("lag 0", []))]):
        curves = [r["curve"] for r in runs if r["correction"] == name and r["lag"] in (lag, 0)]
        if not curves:
            continue
        steps = sorted(set.intersection(*(set(curve) for curve in curves)))
        columns = [[curve[step] for curve in curves] for step in steps]
        means = [statistics.fmean(column) for column in columns]
        bands = [statistics.stdev(column) for column in columns] if len(curves) > 1 else []
        out.append(Line(title, steps, means, color, band=bands, dashed=name == SYNCHRONOUS))
    return out


if __name__ == "__main__":
    main()
