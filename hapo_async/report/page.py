"""The report of a run: one self-contained HTML file from what the run folder holds.

It reads ``config.yaml``, ``metrics.jsonl``, ``events.jsonl``, ``evals/`` and ``rollouts/``, each of which may be missing or
cut short by a crash, and draws what there is: a section without data says why or is left out. Nothing is fetched when the
page is opened. What is drawn is decided in ``panels`` and ``questions``; here are the head of the page and its tables.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml
from markupsafe import Markup

from hapo_async import events, metrics
from hapo_async.bottleneck import bottleneck
from hapo_async.errors import UserError
from hapo_async.evaluation import verdicts
from hapo_async.files import parse_json, read_regular
from hapo_async.report import marks, panels, questions, samples
from hapo_async.report.charts import SMALL, Line, format_value, line_chart, sparkline
from hapo_async.report.panels import STAGES, Panel, Section, recorded
from hapo_async.secrets import redact
from hapo_async.words import plural

Rows = Sequence[dict[str, Any]]

REPORT_FILE = "report.html"
_TEMPLATES = Path(__file__).parent / "templates"
_MOST_READ = 16 << 20  # bytes of a file that the driver wrote


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
    fresh.write_text(redact(render(folder)), encoding="utf-8", errors="replace")
    fresh.replace(target)
    return target


def render(folder: Path) -> str:
    """The report as HTML text."""
    config, config_text = _read_config(folder)
    rows = metrics.read(folder)
    status = _read_status(folder)
    return page(
        "report.html.j2",
        name=folder.resolve().name,
        facts=_facts(rows, config),
        state=_state(rows, config, str(status.get("state", ""))),
        tiles=_tiles(rows, config, status),
        limits=_limits(rows),
        sections=_sections(rows, config, folder),
        samples=samples.pick(folder / "rollouts"),
        glossary=_glossary(rows),
        config_text=config_text,
    )


def page(template: str, **values: Any) -> str:
    """A page of ``templates/``. Its policy lets nothing be fetched and no script run but its own, whatever a text that it shows
    would try."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    script = environment.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(**values, script=Markup(script), script_digest=digest)  # noqa: S704


def _sections(rows: Rows, config: dict[str, Any], folder: Path) -> list[Section]:
    out = [panels.training(rows, _get(config, "max_staleness"))]
    if gate := panels.gate(rows, _get(config, "gate.gamma")):
        out.append(gate)
    out += questions.sections(verdicts.read(folder))
    themes = panels.themes(rows)
    steps, values = samples.distinctness(folder / "rollouts")
    if len(values) > 1:
        lines = [Line("1 - Self-BLEU", steps, values, points=True)]
        svg = Markup(line_chart(lines, "share", 0.0, size=SMALL))  # noqa: S704 - drawn here from numbers
        panel = Panel("Diversity of a group's answers", svg, [("1 - Self-BLEU of kept rollouts", 0)])
        if themes and themes[0].title == panels.THEMES[0][0]:
            themes[0] = Section(themes[0].title, [*themes[0].panels, panel], small=True)
    return marks.mark(out + themes, rows, events.read(folder))


# --------------------------------------------------------------------------------------------------------------------
# Head of the page


def _read_config(folder: Path) -> tuple[dict[str, Any], str]:
    try:
        text = read_regular(folder / "config.yaml", _MOST_READ).decode("utf-8")
        tree = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
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


def _read_status(folder: Path) -> dict[str, Any]:
    """What the driver last said of the run; {} when it said nothing."""
    try:
        status = parse_json(read_regular(folder / "status.json", _MOST_READ))
    except (OSError, ValueError):
        return {}
    return status if isinstance(status, dict) else {}


def _state(rows: Rows, config: dict[str, Any], status: str) -> tuple[str, str]:
    """(kind, sentence) of how far the run came: done | partial | failed."""
    step, planned = _last_step(rows), _get(config, "train.steps")
    of = f"{step} of {plural(planned, 'step')}" if isinstance(planned, int) else plural(step, "step")
    if status == "failed":
        return "failed", f"failed after {of}"
    if not rows:
        return "partial", "no step recorded yet"
    if isinstance(planned, int) and step < planned and status != "done":
        return "partial", f"stopped after {of}" if status == "stopped" else f"{of} recorded"
    return "done", f"{of}, complete"


def _tiles(rows: Rows, config: dict[str, Any], status: dict[str, Any]) -> list[Tile]:
    tiles = [*_accuracy_tiles(rows)]
    _, reward = metrics.series(rows, "reward/mean")
    if reward and not tiles:
        tiles.append(Tile("Reward", _tenth(reward[-10:]), _tenth(reward[:10]), "mean of the first and last ten steps"))
    if steps := _last_step(rows):
        tiles.append(Tile("Wall time", _duration(_wall_s(rows, status)), note=plural(steps, "learner step")))
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
        if any(values):
            tiles.append(Tile(label, format_value(_mean(values)), note="tokens per second"))
    _, oldest = metrics.series(rows, "staleness/max")
    if oldest:
        bound = _get(config, "max_staleness")
        tiles.append(
            Tile("Oldest data", plural(int(max(oldest)), "step"), note=f"bound {bound}" if bound is not None else "")
        )
    return tiles


def _accuracy_tiles(rows: Rows) -> list[Tile]:
    tiles = []
    for name in recorded(rows, r"eval/[^/]+/pass@1"):
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
    verdict = bottleneck(mean)
    if not verdict.component:
        return {}
    counts = Counter(row["bottleneck"] for row in timed if isinstance(row.get("bottleneck"), str))
    total = max(mean["time/step_s"], sum(mean.get(f"time/{name}_s", 0) for name, _, _ in STAGES))
    shares = [(label, color, mean.get(f"time/{name}_s", 0) / total) for name, label, color in STAGES]
    shares.append(("other", 6, max(1 - sum(share for *_, share in shares), 0)))
    component, _, advice = verdict.advice.partition(": ")
    return {
        "component": component,
        "advice": advice,
        "counts": [(name, count / sum(counts.values())) for name, count in counts.most_common()],
        "shares": [item for item in shares if item[2] >= 0.005],
    }


# --------------------------------------------------------------------------------------------------------------------
# Tables


def _glossary(rows: Rows) -> list[dict[str, Any]]:
    """Every recorded metric with its declaration, ends and a sparkline, then the declared ones not recorded."""
    names = recorded(rows, r".*")
    order = {name: i for i, name in enumerate(metrics.REGISTRY)}
    out = []
    for name in sorted(names, key=lambda n: (order[metrics.lookup(n).name], n)):
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
    covered = {metrics.lookup(name).name for name in names}
    out += [
        {"name": m.name, "unit": m.unit, "meaning": m.meaning, "spark": "", "first": "", "last": ""}
        for m in metrics.REGISTRY.values()
        if m.name not in covered
    ]
    return out


def _wall_s(rows: Rows, status: dict[str, Any]) -> float:
    """Seconds since the run was started, the time between its sittings left out. Folders without ``time/run_s`` give what
    lies between their first and last rows."""
    clocks = [float(row["time/run_s"]) for row in rows if isinstance(row.get("time/run_s"), (int, float))]
    if clocks:
        ended = status.get("seconds")  # the sitting went on after its last row: the final checkpoint
        if isinstance(ended, (int, float)) and ended > clocks[-1]:
            clocks.append(float(ended))
        return sum(a for a, b in itertools.pairwise(clocks) if b < a) + clocks[-1]
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


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _tenth(values: Sequence[float]) -> str:
    return f"{_mean(values):.2f}"
