"""The report's charts of metrics: what is drawn, from which metrics, under which heading.

A chart is drawn when one of its metrics was recorded, and a section appears when one of its charts does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from hapo_async import metrics
from hapo_async.report.charts import LARGE, SMALL, Line, line_chart, stack_chart
from hapo_async.report.heatmap import Heat, heat_map

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """A chart with its heading. ``legend``: (label, colour). Without ``svg``, ``note`` says why there is nothing; with it,
    ``note`` is a sentence below the heading. ``wide``: over the whole page."""

    title: str
    svg: Markup | str = ""
    legend: Sequence[tuple[str, int]] = ()
    note: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """Panels under a heading; ``small`` ones stand three in a row."""

    title: str
    panels: Sequence[Panel]
    small: bool = False


@dataclass(frozen=True)
class Chart:
    """A small chart: (metric, label, colour) of each curve, and the lower end of its axis or None. It is left out when
    fewer than ``least`` curves were recorded, and when all values are 0 and the axis begins there."""

    title: str
    curves: tuple[tuple[str, str, int], ...]
    floor: float | None = 0.0
    least: int = 1


# What the learner's time is made of, from the bottom of the stack up: (time/<name>_s, label, colour).
STAGES = (
    ("learn", "learning", 0),
    ("wait_for_batch", "waiting for a batch", 2),
    ("wait_for_stale", "waiting for late groups", 3),
    ("sync", "weight sync", 1),
    ("eval", "evaluation", 4),
    ("checkpoint", "checkpoint", 5),
)


def _one(title: str, name: str, floor: float | None = 0.0) -> Chart:
    return Chart(title, ((name, name, 0),), floor)


def _by_outcome(title: str, family: str, floor: float | None = None) -> Chart:
    return Chart(title, ((f"{family}/correct", "correct", 1), (f"{family}/incorrect", "incorrect", 3)), floor)


def _quadrants(title: str, family: str) -> Chart:
    names = (("pos_high", "A+ high", 1), ("pos_low", "A+ low", 5), ("neg_high", "A− high", 3), ("neg_low", "A− low", 2))
    return Chart(title, tuple((f"{family}/{quadrant}", label, color) for quadrant, label, color in names))


def _by_age(title: str, family: str, floor: float | None = 0.0) -> Chart:
    ages = ("0", "1", "2", "3", "4-7", "8+")
    return Chart(title, tuple((f"staleness/{a}/{family}", f"age {a}", i) for i, a in enumerate(ages)), floor)


THEMES: tuple[tuple[str, tuple[Chart, ...]], ...] = (
    (
        "Groups and answers",
        (
            Chart(
                "Groups by outcome",
                (
                    ("groups/zero_variance_frac", "no variance", 3),
                    ("groups/solved_frac", "solved", 0),
                    ("groups/all_correct_frac", "all correct", 1),
                ),
            ),
            Chart(
                "Length of sampled answers",
                (("response/length_mean", "mean", 0), ("response/length_max", "longest", 5)),
            ),
            _one("Answers cut at the token limit", "response/truncated_frac"),
        ),
    ),
    (
        "Teachers and offline data",
        (
            _one("Offline share of the samples", "train/offline_frac"),
            _one("Trained tokens by teachers", "train/teacher_tokens"),
            _one("Log-prob of teacher tokens", "policy/teacher_logp", None),
            Chart(
                "Open gates that injected nothing",
                (("gate/no_teacher", "no teacher", 2), ("gate/blocked", "blocked", 3)),
            ),
            _one("Groups all correct after injection", "gate/degenerate"),
        ),
    ),
    (
        "Correct and incorrect answers",
        (
            _by_outcome("Log-prob per token", "policy/logp"),
            _by_outcome("Drift from the reference, Σ(log π − log π_ref)", "policy/drift"),
            _by_outcome("Gradient norm at the hidden states", "policy/hidden_grad_norm", 0.0),
            _by_outcome("Weight π of an answer", "offline/weight", 0.0),
            _by_outcome("Weight π̂ under the future policy", "offline/future_weight", 0.0),
            _by_outcome("Quotient π̂ / π", "offline/future_ratio", 0.0),
            _by_outcome("Answers with a weight below 0.2", "offline/small_weight_frac", 0.0),
        ),
    ),
    (
        "Loss and policy",
        (
            _one("Entropy of the policy", "policy/entropy"),
            _quadrants("Entropy by sign of advantage and entropy", "policy/entropy"),
            _quadrants("Tokens by sign of advantage and entropy", "policy/quadrant_frac"),
            _one("Objective, −J", "loss/value", None),
            _one("Objective, −J, on held-out prompts", "offline/holdout_loss", None),
            Chart(
                "Parts of the objective",
                (
                    ("loss/policy", "rollouts", 0),
                    ("loss/teacher", "teacher", 2),
                    ("loss/kl", "divergence", 3),
                    ("loss/value_function", "critic", 5),
                ),
                None,
                least=2,
            ),
            _one("Gradient norm", "policy/grad_norm"),
            _one("Clipped tokens", "policy/clip_frac"),
            _one("Divergence from the reference", "policy/ref_kl"),
            _one("Value of the critic", "critic/value_mean", None),
            _one("Variance that the critic explains", "critic/explained_variance", None),
            _one("Learning rate", "policy/lr"),
        ),
    ),
    (
        "Old tokens",
        (
            _by_age("Policy tokens by age", "frac"),
            _by_age("KL, behaviour to proximal policy", "kl"),
            _by_age("Effective sample size of the weights", "ess", None),
            _by_age("Clipped tokens by age", "clip_frac"),
            Chart(
                "KL at all ages, and at equal weights",
                (
                    ("policy/mismatch_kl", "all ages", 0),
                    ("policy/mismatch_kl_equal", "sampled by these weights", 1),
                    ("canary/kl", "canary", 3),
                ),
            ),
            _one("Tokens with weight 0", "policy/masked_frac"),
            Chart(
                "Groups too old, and waited for",
                (
                    ("staleness/late", "waited for", 0),
                    ("staleness/truncated", "cut", 2),
                    ("staleness/dropped", "dropped", 3),
                ),
            ),
        ),
    ),
    (
        "Anchor",
        (
            Chart(
                "Anchor ratio r_a", (("apo/r_anchor_mean", "mean", 0), ("apo/r_anchor_p95", "95th percentile", 3)), None
            ),
            _one("Dead tokens, r < 1 − ε", "apo/dead_frac"),
            _one("Tokens without an anchor set", "apo/skipped_frac"),
        ),
    ),
    (
        "The machine",
        (
            _one("Buffer fill", "buffer/fill"),
            _one("Answers across weight versions", "response/multi_version_frac"),
            _one("Sampling pause per update", "weights/pause_s"),
            _one("Model FLOPs utilisation", "perf/mfu"),
            Chart(
                "Tokens per second and GPU",
                (
                    ("throughput/generate_tokens_per_gpu_s", "sampling", 0),
                    ("throughput/learn_tokens_per_gpu_s", "learning", 1),
                ),
            ),
            _one("Peak memory of a learner rank", "perf/memory_bytes"),
        ),
    ),
)


def themes(rows: Rows) -> list[Section]:
    """The sections of small charts that have something to show."""
    out = []
    for title, charts in THEMES:
        charts = (*charts, _components(rows)) if title == THEMES[0][0] else charts
        panels = [panel for chart in charts if (panel := _small(rows, chart))]
        if panels:
            out.append(Section(title, panels, small=True))
    return out


def _components(rows: Rows) -> Chart:
    """The named parts of the reward, where a reward function gives them."""
    names = recorded(rows, r"reward/component/.+")[:6]
    return Chart(
        "Components of the reward", tuple((name, name.rsplit("/", 1)[1], i) for i, name in enumerate(names)), None
    )


def _small(rows: Rows, chart: Chart) -> Panel | None:
    recorded = [curve for curve in chart.curves if metrics.series(rows, curve[0])[1]]
    values = [v for name, _, _ in recorded for v in metrics.series(rows, name)[1]]
    if len(recorded) < chart.least or (chart.floor == 0.0 and not any(values)):
        return None
    return curves(rows, chart.title, recorded, chart.floor, smooth=True, size=SMALL)


def curves(
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


# --------------------------------------------------------------------------------------------------------------------
# The large charts


def training(rows: Rows, max_staleness: Any) -> Section:
    """What every run shows first; a chart without data says why."""
    rates = [("throughput/generate_tokens_per_s", "sampling", 0), ("throughput/learn_tokens_per_s", "learning", 1)]
    rates = [rate for rate in rates if any(metrics.series(rows, rate[0])[1])] or rates  # nothing is sampled offline
    panels = [
        curves(rows, "Reward", [("reward/mean", "mean reward of the sampled answers", 0)], floor=0.0, smooth=True),
        _accuracy(rows),
        _injection(rows),
        _staleness(rows, max_staleness),
        curves(rows, "Throughput, tokens per second", rates, floor=0.0, smooth=True),
        _stages(rows),
    ]
    return Section("Training", panels)


def _staleness(rows: Rows, bound: Any) -> Panel:
    ages = [("staleness/max", "oldest token", 3), ("staleness/mean", "mean", 0)]
    if not recorded(rows, "staleness/m.*"):
        return Panel("Staleness", note="No trained token has an age: cached answers and demonstrations have none.")
    limit = (float(bound), f"max_staleness = {bound}") if isinstance(bound, int) else None
    return curves(rows, "Staleness", ages, floor=0.0, limit=limit)


def _accuracy(rows: Rows) -> Panel:
    title = "Held-out accuracy"
    lines = []
    for color, name in enumerate(recorded(rows, r"eval/[^/]+/pass@1")[:5]):
        steps, values = metrics.series(rows, name)
        _, errors = metrics.series(rows, f"{name}/se")
        band = errors if len(errors) == len(values) else ()
        label = f"{name.split('/')[1]} pass@1" + (" ± standard error" if band else "")
        lines.append(Line(label, steps, values, (1, 0, 2, 3, 4)[color], band, points=True))
        for other in recorded(rows, re.escape(name.removesuffix("1")) + r"\d+"):
            if other != name:
                other_steps, other_values = metrics.series(rows, other)
                label = f"{name.split('/')[1]} {other.rsplit('/', 1)[1]}"
                lines.append(Line(label, other_steps, other_values, 4, points=True, dashed=True))
    if not lines:
        return Panel(title, note="No evaluation recorded: data.eval names no held-out set, or none was reached.")
    svg = Markup(line_chart(lines, "share", floor=0.0, ceiling=1.0))  # noqa: S704 - see curves
    return Panel(title, svg, [(line.label, line.color) for line in lines])


def _injection(rows: Rows) -> Panel:
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
    return curves(derived, title, wanted, floor=0.0, ceiling=1.0, smooth=True)


def _stages(rows: Rows) -> Panel:
    title = "Where the time of a step goes, in seconds"
    timed = {row["step"]: row for row in rows if row.get("time/step_s")}
    if not timed:
        return Panel(title, note="No step was timed.")
    steps = sorted(timed)
    layers = [
        (label, [float(timed[s].get(f"time/{name}_s") or 0) for s in steps], color) for name, label, color in STAGES
    ]
    rest = [max(timed[s]["time/step_s"] - sum(values[i] for _, values, _ in layers), 0) for i, s in enumerate(steps)]
    least = 0.003 * sum(float(timed[s]["time/step_s"]) for s in steps)
    layers = [layer for layer in [*layers, ("other", rest, 6)] if sum(layer[1]) > least]
    svg = Markup(stack_chart(steps, layers))  # noqa: S704 - see curves
    note = "A bar with a gap goes on above: its values show under the pointer." if 'class="break"' in svg else ""
    return Panel(title, svg, [(label, color) for label, _, color in layers], note)


def gate(rows: Rows, gamma: Any) -> Section | None:
    """Confidence of the groups over training, and what each threshold would have opened; None without an injection."""
    names = [f"gate/confidence_hist/{b}" for b in range(10)]
    shown = {row["step"]: row for row in rows if all(isinstance(row.get(n), (int, float)) for n in names)}
    if not shown or not any(metrics.series(rows, "gate/injected")[1]):
        return None
    steps = sorted(shown)
    shares = [[float(shown[s][name]) for name in names] for s in steps]
    cells = [[share[b] for share in shares] for b in reversed(range(10))]
    labels = [f"confidence {b / 10:.1f} to {(b + 1) / 10:.1f}" for b in reversed(range(10))]
    constant = float(gamma) if isinstance(gamma, (int, float)) else None
    thresholds = [shown[s].get("gate/threshold", constant) for s in steps]
    known = [10 * (1 - float(t)) for t in thresholds if isinstance(t, (int, float))]
    rule = known if len(known) == len(steps) else ()
    top = max(max(row) for row in cells)
    heat = Heat(labels, [str(s) for s in steps], cells, high=top or 1.0, edges=("1", "0"), rule=rule)
    note = "Share of a step's groups by confidence." + (" The line is the gate's threshold." if rule else "")
    confidence = Panel("Confidence of the groups", Markup(heat_map(heat, cell_height=15)), note=note, wide=True)  # noqa: S704
    lines = [
        Line(f"below {t / 10:.1f}", steps, [sum(share[:t]) for share in shares], color, smooth=True)
        for t, color in ((2, 5), (4, 1), (6, 2), (8, 3))
    ]
    svg = Markup(line_chart(lines, "share", floor=0.0, ceiling=1.0))  # noqa: S704 - see curves
    decisions = Panel("Groups below a threshold of confidence", svg, [(line.label, line.color) for line in lines])
    return Section("The gate", [confidence, decisions, _decided(rows)])


def _decided(rows: Rows) -> Panel:
    wanted = [("gate/open_frac", "gate open", 3), ("gate/injected_frac", "teacher injected", 2)]
    return curves(rows, "What the gate decided", wanted, floor=0.0, ceiling=1.0, smooth=True)


def recorded(rows: Rows, pattern: str) -> list[str]:
    """Declared metric names matching ``pattern`` that hold a number in some row, in order of appearance."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, (int, float)))
    return [name for name in names if re.fullmatch(pattern, name) and metrics.find(name)]
