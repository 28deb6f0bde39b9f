"""The report of a run: one self-contained HTML file from what the run folder holds.

It reads ``config.yaml``, ``metrics.jsonl`` and ``rollouts/``, each of which may be missing or cut short by a crash, and
draws what there is: a section without data says why or is left out. Nothing is fetched when the page is opened.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from hapo_async import metrics
from hapo_async.charts import LARGE, SMALL, Line, format_value, line_chart, sparkline, stack_chart
from hapo_async.errors import UserError
from hapo_async.samples import pick as pick_samples

Rows = Sequence[dict[str, Any]]

REPORT_FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"

# What the learner's time is made of, from the bottom of the stack up: (time/<name>_s, label, colour).
_STAGES = (
    ("learn", "learning", 0),
    ("wait_for_batch", "waiting for a batch", 2),
    ("wait_for_stale", "waiting for late groups", 3),
    ("sync", "weight sync", 1),
    ("eval", "evaluation", 4),
    ("checkpoint", "checkpoint", 5),
)

# Small charts: (title, metric, lower end of the y axis or None).
_DETAILS = (
    ("Entropy of the policy", "policy/entropy", 0.0),
    ("Gradient norm", "policy/grad_norm", 0.0),
    ("Clipped tokens", "policy/clip_frac", 0.0),
    ("Behaviour mismatch (KL)", "policy/mismatch_kl", 0.0),
    ("Effective sample size", "policy/ess", None),
    ("Learning rate", "policy/lr", 0.0),
    ("Loss value, -J", "loss/value", None),
    ("Answer length", "response/length_mean", None),
    ("Answers cut at the token limit", "response/truncated_frac", 0.0),
    ("Groups without variance", "groups/zero_variance_frac", 0.0),
    ("Answers across weight versions", "response/multi_version_frac", 0.0),
    ("Buffer fill", "buffer/fill", 0.0),
    ("Sampling pause per update", "weights/pause_s", 0.0),
    ("APO anchor ratio, p95", "apo/r_anchor_p95", None),
    ("APO dead tokens", "apo/dead_frac", 0.0),
    ("Model FLOPs utilisation", "perf/mfu", 0.0),
)


@dataclass(frozen=True)
class Panel:
    """A chart with its heading. ``legend``: (label, colour). Without ``svg``, ``note`` says why there is nothing."""

    title: str
    svg: Markup | str = ""
    legend: Sequence[tuple[str, int]] = ()
    note: str = ""


@dataclass(frozen=True)
class Tile:
    """One number of the headline. ``before`` -> ``value``, or ``value`` alone."""

    label: str
    value: str
    before: str = ""
    note: str = ""


def write(run_dir: str | Path) -> Path:
    """Writes ``report.html`` into the run folder and returns its path.

    Raises UserError when the folder does not exist.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise UserError(f"run folder {str(run_dir)!r} does not exist. Give the folder that `train` printed as run.dir.")
    target = folder / REPORT_FILE
    fresh = target.with_suffix(".tmp")
    fresh.write_text(render(folder), encoding="utf-8")
    fresh.replace(target)
    return target


def render(folder: Path) -> str:
    """The report as HTML text."""
    config, config_text = _read_config(folder)
    rows = metrics.read(folder)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    limits = _limits(rows)
    return environment.get_template("report.html.j2").render(
        name=folder.resolve().name,
        facts=_facts(rows, config),
        state=_state(rows, config, _read_status(folder)),
        tiles=_tiles(rows, config),
        limits=limits,
        panels=_panels(rows, config),
        details=[p for title, name, floor in _DETAILS if (p := _detail(rows, title, name, floor))],
        samples=pick_samples(folder / "rollouts"),
        glossary=_glossary(rows),
        config_text=config_text,
    )


# --------------------------------------------------------------------------------------------------------------------
# Head of the page


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        tree = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return {}, ""
    return (tree, text) if isinstance(tree, dict) else ({}, text)


def _get(config: dict[str, Any], key: str) -> Any:
    """A dotted key of the config, None where it is missing."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, dict) else None
    return node


def _facts(rows: Rows, config: dict[str, Any]) -> list[tuple[str, str]]:
    keys = (
        ("algorithm", "algorithm"),
        ("model", "model"),
        ("data", "data.train"),
        ("answers per prompt", "sampling.n"),
        ("prompts per step", "train.batch_prompts"),
        ("gate threshold γ", "gate.gamma"),
        ("max staleness", "max_staleness"),
        ("learning rate", "learner.lr"),
        ("generators", "generator.count"),
        ("learner ranks", "learner.ranks"),
        ("seed", "seed"),
    )
    gated = any(metrics.series(rows, "gate/injected")[1])
    shown = [item for item in keys if gated or item[1] != "gate.gamma"]
    return [(label, str(value)) for label, key in shown if (value := _get(config, key)) not in (None, "")]


def _last_step(rows: Rows) -> int:
    return max((row["step"] for row in rows), default=0)


def _read_status(folder: Path) -> str:
    """What the driver last said of the run: running | done | stopped | failed, "" when it said nothing."""
    try:
        status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return str(status.get("state", "")) if isinstance(status, dict) else ""


def _state(rows: Rows, config: dict[str, Any], status: str) -> tuple[str, str]:
    """(kind, sentence) of how far the run came: done | partial | failed."""
    step, planned = _last_step(rows), _get(config, "train.steps")
    of = f"{step} of {planned} steps" if isinstance(planned, int) else _plural(step, "step")
    if status == "failed":
        return "failed", f"failed after {of}"
    if not rows:
        return "partial", "no step recorded yet"
    if isinstance(planned, int) and step < planned and status != "done":
        return "partial", f"stopped after {of}" if status == "stopped" else f"{of} recorded"
    return "done", f"{of}, complete"


def _tiles(rows: Rows, config: dict[str, Any]) -> list[Tile]:
    tiles = [*_accuracy_tiles(rows)]
    _, reward = metrics.series(rows, "reward/mean")
    if reward and not tiles:
        tiles.append(Tile("Reward", _tenth(reward[-10:]), _tenth(reward[:10]), "mean of the first and last ten steps"))
    if steps := _last_step(rows):
        tiles.append(Tile("Wall time", _duration(_wall_s(rows)), note=_plural(steps, "learner step")))
    _, injected = metrics.series(rows, "gate/injected")
    if any(injected):
        ends = _mean(injected[:5]), _mean(injected[-5:])
        prompts = _get(config, "train.batch_prompts")
        note = f"of {prompts} groups, first and last 5 steps" if prompts else "first and last 5 steps"
        tiles.append(Tile("Injected teachers per step", f"{ends[1]:.1f}", f"{ends[0]:.1f}", note))
    for label, name in (
        ("Sampling", "throughput/generate_tokens_per_s"),
        ("Learning", "throughput/learn_tokens_per_s"),
    ):
        _, values = metrics.series(rows, name)
        if values:
            tiles.append(Tile(label, format_value(_mean(values)), note="tokens per second"))
    _, oldest = metrics.series(rows, "staleness/max")
    if oldest:
        bound = _get(config, "max_staleness")
        tiles.append(
            Tile("Oldest data", _plural(int(max(oldest)), "step"), note=f"bound {bound}" if bound is not None else "")
        )
    return tiles


def _accuracy_tiles(rows: Rows) -> list[Tile]:
    tiles = []
    for name in _recorded(rows, r"eval/[^/]+/pass@1"):
        steps, values = metrics.series(rows, name)
        _, errors = metrics.series(rows, f"{name}/se")
        label = f"Held-out accuracy, {name.split('/')[1]}"
        error = f" ± {100 * errors[-1]:.1f}" if errors else ""
        if len(values) == 1:
            tiles.append(Tile(label, format_value(values[0], "share"), note=f"at step {steps[0]}{error}"))
        else:
            note = f"{100 * (values[-1] - values[0]):+.1f} points{error}, steps {steps[0]} to {steps[-1]}"
            tiles.append(Tile(label, format_value(values[-1], "share"), format_value(values[0], "share"), note))
    return tiles[:3]


def _limits(rows: Rows) -> dict[str, Any]:
    """What limited the run: the verdict over mean times, how often each component limited a step, shares of time."""
    timed = [row for row in rows if row.get("time/step_s")]
    if not timed:
        return {}
    names = {name for row in timed for name in row if name.startswith("time/")}
    mean = {name: _mean([float(row.get(name) or 0) for row in timed]) for name in names}
    verdict = metrics.bottleneck(mean)
    if not verdict.component:
        return {}
    counts = Counter(row["bottleneck"] for row in timed if isinstance(row.get("bottleneck"), str))
    total = max(mean["time/step_s"], sum(mean.get(f"time/{name}_s", 0) for name, _, _ in _STAGES))
    shares = [(label, color, mean.get(f"time/{name}_s", 0) / total) for name, label, color in _STAGES]
    shares.append(("other", 6, max(1 - sum(share for *_, share in shares), 0)))
    component, _, advice = verdict.advice.partition(": ")
    return {
        "component": component,
        "advice": advice,
        "counts": [(name, count / sum(counts.values())) for name, count in counts.most_common()],
        "shares": [item for item in shares if item[2] >= 0.005],
    }


# --------------------------------------------------------------------------------------------------------------------
# Charts


def _panels(rows: Rows, config: dict[str, Any]) -> list[Panel]:
    bound = _get(config, "max_staleness")
    limit = (float(bound), f"max_staleness = {bound}") if isinstance(bound, int) else None
    return [
        _curves(rows, "Reward", [("reward/mean", "mean reward of the sampled answers", 0)], floor=0.0, smooth=True),
        _accuracy(rows),
        _gate(rows),
        _curves(
            rows,
            "Staleness",
            [("staleness/max", "oldest token", 3), ("staleness/mean", "mean", 0)],
            floor=0.0,
            limit=limit,
        ),
        _curves(
            rows,
            "Throughput, tokens per second",
            [("throughput/generate_tokens_per_s", "sampling", 0), ("throughput/learn_tokens_per_s", "learning", 1)],
            floor=0.0,
            smooth=True,
        ),
        _stages(rows),
    ]


def _curves(
    rows: Rows,
    title: str,
    wanted: Sequence[tuple[str, str, int]],
    floor: float | None = None,
    ceiling: float | None = None,
    smooth: bool = False,
    limit: tuple[float, str] | None = None,
    size: tuple[int, int] = LARGE,
) -> Panel:
    """A panel of the metrics (name, label, colour) that were recorded."""
    lines = []
    for name, label, color in wanted:
        steps, values = metrics.series(rows, name)
        if values:
            lines.append(Line(label, steps, values, color, smooth=smooth, dots=name == "staleness/max"))
    if not lines:
        return Panel(title, note=f"Nothing recorded: no row holds {' or '.join(name for name, _, _ in wanted)}.")
    unit = metrics.lookup(wanted[0][0]).unit
    svg = Markup(line_chart(lines, unit, floor, ceiling, limit, size))  # noqa: S704 - drawn here from numbers, labels escaped
    return Panel(title, svg, [(line.label, line.color) for line in lines])


def _accuracy(rows: Rows) -> Panel:
    title = "Held-out accuracy"
    lines = []
    for color, name in enumerate(_recorded(rows, r"eval/[^/]+/pass@1")[:5]):
        steps, values = metrics.series(rows, name)
        _, errors = metrics.series(rows, f"{name}/se")
        band = errors if len(errors) == len(values) else ()
        label = f"{name.split('/')[1]} pass@1" + (" ± standard error" if band else "")
        lines.append(Line(label, steps, values, (1, 0, 2, 3, 4)[color], band, points=True))
        for other in _recorded(rows, re.escape(name.removesuffix("1")) + r"\d+"):
            if other != name:
                other_steps, other_values = metrics.series(rows, other)
                label = f"{name.split('/')[1]} {other.rsplit('/', 1)[1]}"
                lines.append(Line(label, other_steps, other_values, 4, points=True, dashed=True))
    if not lines:
        return Panel(title, note="No evaluation recorded: data.eval names no held-out set, or none was reached.")
    svg = Markup(line_chart(lines, "share", floor=0.0, ceiling=1.0))  # noqa: S704 - see _curves
    return Panel(title, svg, [(line.label, line.color) for line in lines])


def _gate(rows: Rows) -> Panel:
    wanted = [("gate/injected_frac", "groups with an injected teacher", 2), ("gate/confidence", "mean confidence", 4)]
    derived = [
        {**row, "gate/injected_frac": row["gate/injected"] / row["train/prompts"]}
        if row.get("gate/injected") is not None and row.get("train/prompts") and "gate/injected_frac" not in row
        else row
        for row in rows
    ]
    title = "Injected teachers and confidence"
    if not any(row.get(name) is not None for row in derived for name, _, _ in wanted):
        return Panel(title, note="The gate recorded nothing: this algorithm injects no teacher.")
    return _curves(derived, title, wanted, floor=0.0, ceiling=1.0, smooth=True)


def _stages(rows: Rows) -> Panel:
    title = "Where the time of a step goes, in seconds"
    timed = {row["step"]: row for row in rows if row.get("time/step_s")}
    if not timed:
        return Panel(title, note="No step was timed.")
    steps = sorted(timed)
    layers = [
        (label, [float(timed[s].get(f"time/{name}_s") or 0) for s in steps], color) for name, label, color in _STAGES
    ]
    rest = [max(timed[s]["time/step_s"] - sum(values[i] for _, values, _ in layers), 0) for i, s in enumerate(steps)]
    least = 0.003 * sum(float(timed[s]["time/step_s"]) for s in steps)
    layers = [layer for layer in [*layers, ("other", rest, 6)] if sum(layer[1]) > least]
    svg = Markup(stack_chart(steps, layers))  # noqa: S704 - see _curves
    return Panel(title, svg, [(label, color) for label, _, color in layers])


def _detail(rows: Rows, title: str, name: str, floor: float | None) -> Panel | None:
    _, values = metrics.series(rows, name)
    if not values or (floor == 0.0 and not any(values)):
        return None
    return _curves(rows, title, [(name, name, 0)], floor, smooth=True, size=SMALL)


# --------------------------------------------------------------------------------------------------------------------
# Tables


def _glossary(rows: Rows) -> list[dict[str, Any]]:
    """Every recorded metric with its declaration, ends and a sparkline, then the declared ones not recorded."""
    recorded = _recorded(rows, r".*")
    order = {name: i for i, name in enumerate(metrics.REGISTRY)}
    out = []
    for name in sorted(recorded, key=lambda n: (order[metrics.lookup(n).name], n)):
        declared = metrics.lookup(name)
        _, values = metrics.series(rows, name)
        first, last = format_value(values[0], declared.unit), format_value(values[-1], declared.unit)
        spark = Markup(sparkline(values))  # noqa: S704 - drawn here from numbers
        out.append(
            {
                "name": name,
                "unit": declared.unit,
                "meaning": declared.meaning,
                "spark": spark,
                "first": first,
                "last": last,
            }
        )
    covered = {metrics.lookup(name).name for name in recorded}
    out += [
        {"name": m.name, "unit": m.unit, "meaning": m.meaning, "spark": "", "first": "", "last": ""}
        for m in metrics.REGISTRY.values()
        if m.name not in covered
    ]
    return out


def _recorded(rows: Rows, pattern: str) -> list[str]:
    """Declared metric names matching ``pattern`` that hold a number in some row, in order of appearance."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    return [name for name in names if re.fullmatch(pattern, name) and metrics.find(name)]


def _wall_s(rows: Rows) -> float:
    """Seconds from the first to the last row; gaps between the sittings of a resumed run are not told apart."""
    times = [float(row["time"]) for row in rows if isinstance(row.get("time"), (int, float))]
    if not times:
        return 0.0
    first = min(rows, key=lambda row: row["step"])
    return max(times) - min(times) + float(first.get("time/step_s") or 0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tenth(values: Sequence[float]) -> str:
    return f"{_mean(values):.2f}"
