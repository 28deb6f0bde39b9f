"""Two runs, or two evaluations, side by side: metrics at equal steps, exclusive solves, questions where they differ.

A run is its folder; an evaluation is a file that ``hapo-async eval --save`` wrote. A is the first, B the second, and
differences are B - A.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from rich.table import Table

from hapo_async import metrics
from hapo_async.errors import ConfigError
from hapo_async.evaluation import verdicts
from hapo_async.evaluation.verdicts import Questions
from hapo_async.report import questions
from hapo_async.report.charts import SMALL, Line, format_value, line_chart
from hapo_async.report.panels import Panel, Section, recorded

# What the table shows, where both runs have it; --json gives every metric that both recorded.
SHOWN = (
    r"eval/[^/]+/(pass|avg|bootstrap)@\d+",
    r"reward/mean",
    r"groups/(zero_variance_frac|solved_frac|all_correct_frac)",
    r"response/(length_mean|truncated_frac)",
    r"gate/(open_frac|injected|confidence)",
    r"train/(offline_frac|teacher_tokens)",
    r"policy/(entropy|grad_norm|clip_frac|ref_kl|mismatch_kl|ess)",
    r"apo/(r_anchor_p95|dead_frac)",
    r"staleness/(mean|max)",
    r"throughput/(generate|learn)_tokens_per_s",
    r"time/(step_s|run_s)",
)


class Pair(NamedTuple):
    """One metric at the steps that both recorded."""

    name: str
    steps: list[int]
    a: list[float]
    b: list[float]


class Solves(NamedTuple):
    """Exclusive solves of one set at the last step that both evaluated; ``asked`` questions were asked in both."""

    set: str
    step: int
    asked: int
    exclusive: questions.Exclusive


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found. names: of A and B, told apart. apart: sets that were evaluated, but never at an equal step once
    training had begun, each as a sentence."""

    names: tuple[str, str]
    pairs: Sequence[Pair]
    solves: Sequence[Solves]
    questions: Sequence[tuple[Questions, Questions, list[int]]]
    apart: Sequence[str] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything, as plain data. ``gained`` are questions that B alone solves, ``lost`` those that A alone solves."""
        exclusive = {
            s.set: {
                "step": s.step,
                "asked": s.asked,
                "gained": s.exclusive.gained,
                "lost": s.exclusive.lost,
                "levels": {level: {"gained": x, "lost": y} for level, x, y in s.exclusive.levels},
            }
            for s in self.solves
        }
        table = {p.name: {"steps": p.steps, "a": p.a, "b": p.b} for p in self.pairs}
        return {"a": self.names[0], "b": self.names[1], "metrics": table, "exclusive_solves": exclusive}

    def blocks(self) -> Iterator[Table | str]:
        """What a terminal shows."""
        a, b = self.names
        yield f"A  {a}\nB  {b}"
        yield from self.apart
        shown = _shown(self.pairs)
        if shown:
            table = Table("metric", "step", "A", "B", "B − A")
            for pair in shown:
                table.add_row(pair.name, str(pair.steps[-1]), *_last(pair))
            yield table
        for s in self.solves:
            yield f"{s.set}, step {s.step}, {s.asked} questions: only B / only A solves {s.exclusive.text()}"
        if not shown and not self.solves:
            yield "Nothing in common: no metric was recorded by both at an equal step, and no question was asked in both."


def compare(a: Path, b: Path) -> Comparison:
    """Raises ConfigError where one of the two is neither a run folder nor a file of answers."""
    (rows_a, sets_a), (rows_b, sets_b) = _load(a), _load(b)
    pairs = [pair for name in recorded(rows_a, ".*") if (pair := _pair(name, rows_a, rows_b)).steps]
    both: list[tuple[Questions, Questions, list[int]]] = []
    solves = []
    for name in [name for name in sets_a if name in sets_b]:
        one, other = sets_a[name], sets_b[name]
        steps = [s for s in one.steps if s in other.accuracy]
        asked = one.accuracy[steps[-1]].keys() & other.accuracy[steps[-1]].keys() if steps else set()
        if asked:
            both.append((one, other, steps))
            found = questions.exclusive(one, steps[-1], other, steps[-1])
            solves.append(Solves(name, steps[-1], len(asked), found))
    solves.sort(key=lambda s: s.step == 0)
    return Comparison(_names(a, b), pairs, solves, both, list(_apart(rows_a, rows_b)))


def write(found: Comparison, path: Path) -> None:
    """One self-contained page. Raises ConfigError where it cannot be written."""
    from hapo_async.report.page import page

    curves = [_panel(pair) for pair in _shown(found.pairs) if len(pair.steps) > 1 and any(pair.a + pair.b)]
    maps = [questions.difference_map(a, b, steps) for a, b, steps in found.questions]
    sections = [s for s in (Section("Questions", maps), Section("Metrics", curves, small=True)) if s.panels]
    text = page(
        "compare.html.j2",
        names=found.names,
        apart=found.apart,
        solves=[(s.set, s.step, s.asked, s.exclusive) for s in found.solves],
        table=[(pair.name, pair.steps[-1], *_last(pair)) for pair in _shown(found.pairs)],
        sections=sections,
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError(f"the page cannot be written to {str(path)!r}: {error.strerror}.") from None


def _load(path: Path) -> tuple[list[dict[str, Any]], dict[str, Questions]]:
    """(metric rows, evaluation sets)."""
    if path.is_dir() and (path / metrics.METRICS_FILE).exists():
        return metrics.read(path), verdicts.read(path)
    if path.is_file() and (sets := verdicts.read_answers(path)):
        return [], sets
    raise ConfigError(
        f"{str(path)!r} is neither a run folder with a {metrics.METRICS_FILE} nor a file that `hapo-async eval --save` wrote."
    )


def _names(a: Path, b: Path) -> tuple[str, str]:
    """The folders' own names where these differ, else the whole paths."""
    short = a.resolve().name, b.resolve().name
    return short if short[0] != short[1] else (str(a), str(b))


def _pair(name: str, rows_a: Sequence[Mapping[str, Any]], rows_b: Sequence[Mapping[str, Any]]) -> Pair:
    a = dict(zip(*metrics.series(rows_a, name), strict=True))
    b = dict(zip(*metrics.series(rows_b, name), strict=True))
    steps = sorted(a.keys() & b.keys())
    return Pair(name, steps, [a[s] for s in steps], [b[s] for s in steps])


def _apart(rows_a: Sequence[Mapping[str, Any]], rows_b: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for name in recorded(rows_a, r"eval/[^/]+/pass@1"):
        a, b = (set(metrics.series(rows, name)[0]) for rows in (rows_a, rows_b))
        if any(a) and any(b) and not any(a & b):
            only_start = "; step 0 is before training" if a & b else ""
            steps = (", ".join(str(step) for step in sorted(found)) for found in (a, b))
            yield "{}: no common evaluation after step 0. A has steps {}; B has steps {}{}.".format(
                name.split("/")[1], *steps, only_start
            )


def _shown(pairs: Sequence[Pair]) -> list[Pair]:
    """Those of interest. What both recorded only before training comes last."""
    shown = [pair for pattern in SHOWN for pair in pairs if re.fullmatch(pattern, pair.name)]
    return sorted(shown, key=lambda pair: pair.steps[-1] == 0)


def _last(pair: Pair) -> tuple[str, str, str]:
    unit = metrics.lookup(pair.name).unit
    a, b = pair.a[-1], pair.b[-1]
    sign = "+" if b >= a else "−"
    return format_value(a, unit), format_value(b, unit), sign + format_value(abs(b - a), unit)


def _panel(pair: Pair) -> Panel:
    lines = [Line("A", pair.steps, pair.a, 0, smooth=True), Line("B", pair.steps, pair.b, 2, smooth=True)]
    svg = Markup(line_chart(lines, metrics.lookup(pair.name).unit, size=SMALL))  # noqa: S704 - drawn here from numbers
    return Panel(pair.name, svg, [("A", 0), ("B", 2)])
