"""The run as one sees it in a terminal: a table that stays in place on a TTY, one plain line per step anywhere else."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Callable, Mapping
from typing import IO, Any, cast

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hapo_async.report.charts import format_value
from hapo_async.terminal import Terminal

_BLOCKS = "▁▂▃▄▅▆▇█"
_COURSE = 32  # characters of the reward's course
_COLORS = {"generator": "yellow", "verifier": "magenta", "learner": "blue", "sync": "cyan", "staleness": "red"}

Row = Mapping[str, Any]


class _Output:
    """Standard output, where a full disk or a closed pipe costs the text and not the run."""

    def write(self, text: str) -> int:
        try:
            return sys.stdout.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stdout.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stdout, name)


class LiveView:
    """Shows the rows that the metrics writer returns. A context manager.

    console: where to; the default is standard output, and its ``is_terminal`` decides between table and lines.
    clock: seconds, for tests. began: when, on that clock, the run was started; now, when not given.
    """

    def __init__(
        self,
        total_steps: int,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
    ) -> None:
        self.total_steps = total_steps
        self.console = console or Terminal(file=cast(IO[str], _Output()))
        self.step = 0
        self.note = ""
        self._clock = clock
        self._began = clock() if began is None else began
        self._first: tuple[int, float] | None = None  # (step, when) of the first learner step seen
        self._last_at = clock()
        self._row: dict[str, Any] = {}
        self._evals: dict[str, list[tuple[int, float]]] = {}
        self._rewards: list[float] = []
        self._live: Live | None = None

    def __enter__(self) -> LiveView:
        if self.console.is_terminal:
            self._live = Live(console=self.console, get_renderable=self.render, refresh_per_second=2)
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(self, step: int, row: Row, note: str = "") -> None:
        """Takes the row of a step; ``note`` is a word for people, such as "checkpoint written"."""
        now = self._clock()
        self.step, self.note, self._last_at = step, note or self.note, now
        if step > 0 and self._first is None:
            self._first = (step, now)
        self._keep_evals(step, row)
        if (reward := _number(row, "reward/mean")) is not None:
            self._rewards.append(reward)
        # Metrics that a step did not measure keep their last value on the table.
        self._row |= {name: value for name, value in row.items() if value is not None}
        if self._live is not None:
            self._live.refresh()
        else:
            self.console.print(self.line(row, note), markup=False, highlight=False, soft_wrap=True)

    def evaluation(self, step: int, row: Row) -> None:
        """Takes what an evaluation beside training found for a step that was a while ago."""
        found = self._keep_evals(step, row)
        if self._live is not None:
            self._live.refresh()
        else:
            text = "  ".join(f"eval {name} {format_value(value, 'share')}" for name, value in found) or "no evaluation"
            self.console.print(f"of step {step}:  {text}", markup=False, highlight=False, soft_wrap=True)

    def _keep_evals(self, step: int, row: Row) -> list[tuple[str, float]]:
        """(set, pass@1) of what the row holds."""
        found = [(n.split("/")[1], v) for n in row if n.endswith("/pass@1") and (v := _number(row, n)) is not None]
        for name, value in found:
            self._evals.setdefault(name, []).append((step, value))
        return found

    def eta_s(self) -> float | None:
        """Seconds to the last step at the pace so far; None before two steps were seen."""
        if self._first is None or self.step <= self._first[0]:
            return None
        first_step, when = self._first
        pace = (self._last_at - when) / (self.step - first_step)
        return max(pace * (self.total_steps - self.step) - (self._clock() - self._last_at), 0.0)

    # ---------------------------------------------------------------- one line per step

    def line(self, row: Row, note: str = "") -> str:
        """The row as one line; what it did not measure is left out."""
        width = len(str(self.total_steps))
        parts = [f"step {self.step:>{width}}/{self.total_steps}"]
        parts += _named(row, (("reward", "reward/mean", ""),))
        parts += [f"eval {name} {format_value(points[-1][1], 'share')}" for name, points in self._evals_of(row)]
        parts += _named(row, (("injected", "gate/injected", ""), ("confidence", "gate/confidence", "")))
        if (oldest := _number(row, "staleness/max")) is not None:
            parts.append(f"staleness {_number(row, 'staleness/mean') or 0:.1f} (max {oldest:.0f})")
        rates = _rates(row)
        if rates:
            parts.append(" ".join(f"{label} {rate}" for label, rate in rates) + " tok/s")
        parts += _named(row, (("", "time/step_s", "s"),))
        if (eta := self.eta_s()) is not None and self.step < self.total_steps:
            parts.append(f"left {clock_text(eta)}")
        if row.get("bottleneck"):
            parts.append(f"limited by {row['bottleneck']}")
        return "  ".join(parts + ([note] if note else []))

    def _evals_of(self, row: Row) -> list[tuple[str, list[tuple[int, float]]]]:
        return [(name, points) for name, points in self._evals.items() if f"eval/{name}/pass@1" in row]

    # ---------------------------------------------------------------- the table

    def render(self) -> RenderableType:
        """What the terminal shows now."""
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        for label, content in self._table_rows():
            table.add_row(label, content)
        title = Text(" hapo_async ", style="bold")
        return Panel(
            Group(self._head(), "", table), title=title, title_align="left", box=box.ROUNDED, border_style="dim"
        )

    def _head(self) -> RenderableType:
        eta = self.eta_s()
        left = f"{clock_text(eta)} left" if eta is not None and self.step < self.total_steps else ""
        head = Table.grid(padding=(0, 2))
        head.add_column(no_wrap=True)
        head.add_column()
        head.add_column(no_wrap=True, style="dim")
        head.add_row(
            Text(f"step {self.step}/{self.total_steps}", style="bold"),
            ProgressBar(self.total_steps, self.step, width=36, complete_style="green", finished_style="green"),
            "  ".join(part for part in (f"{clock_text(self._clock() - self._began)} elapsed", left) if part),
        )
        return head

    def _table_rows(self) -> list[tuple[str, RenderableType]]:
        row, out = self._row, list[tuple[str, RenderableType]]()
        if self._rewards:
            course = Text(f"{self._rewards[-1]:.3f}  ", style="bold")
            out.append(("reward", course + Text(blocks(self._rewards, _COURSE), style="green")))
        for name, points in self._evals.items():
            out.append((f"held-out {name}", _eval_text(points)))
        if (injected := _number(row, "gate/injected")) is not None:
            prompts = _number(row, "train/prompts")
            text = f"{injected:.0f}" + (f" of {prompts:.0f} groups" if prompts else "")
            confidence = _number(row, "gate/confidence")
            out.append(("injected", text + (f"  confidence {confidence:.2f}" if confidence is not None else "")))
        if (oldest := _number(row, "staleness/max")) is not None:
            out.append(("staleness", f"mean {_number(row, 'staleness/mean') or 0:.2f}  max {oldest:.0f}"))
        if rates := _rates(row):
            out.append(("tokens/s", "  ".join(f"{label} {rate}" for label, rate in rates)))
        if versions := _versions(row):
            out.append(("weights", versions))
        if row.get("bottleneck"):
            component = str(row["bottleneck"])
            advice = str(row.get("advice", component)).removeprefix(f"{component}: ")
            style = f"bold {_COLORS.get(component, 'white')}"
            out.append(("bottleneck", Text.assemble((component, style), f": {advice}")))
        if self.note:
            out.append(("", Text(self.note, style="dim")))
        return out or [("", Text("waiting for the first step", style="dim"))]


def blocks(values: list[float], width: int) -> str:
    """The course of a series in block characters, at most ``width`` of them, neighbours averaged."""
    count = min(len(values), width)
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, spread = min(means), max(means) - min(means)
    if spread == 0:
        return _BLOCKS[0] * count
    return "".join(_BLOCKS[min(int((m - low) / spread * len(_BLOCKS)), len(_BLOCKS) - 1)] for m in means)


def clock_text(seconds: float) -> str:
    """1:02:05 or 2:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _eval_text(points: list[tuple[int, float]]) -> Text:
    step, value = points[-1]
    text = Text()
    if len(points) > 1:
        text.append(f"{format_value(points[0][1], 'share')} → ", style="dim")
    text.append(format_value(value, "share"), style="bold green")
    return text.append(f"  step {step}", style="dim")


def _versions(row: Row) -> str:
    """Version per generator, "g0 54  g1 53"; the published one where generators are not told apart."""
    prefix = "weights/version/"
    parts = [f"{name.removeprefix(prefix)} {row[name]:.0f}" for name in sorted(row) if name.startswith(prefix)]
    published = _number(row, "weights/version")
    head = [f"published {published:.0f}"] if published is not None else []
    lags = [
        f"{name.removeprefix('weights/lag/')} {published - row[name]:.0f}"
        for name in sorted(row)
        if name.startswith("weights/lag/") and published is not None
    ]
    return "  ".join(head + (parts or lags))


def _rates(row: Row) -> list[tuple[str, str]]:
    names = (("generate", "throughput/generate_tokens_per_s"), ("learn", "throughput/learn_tokens_per_s"))
    return [(label, format_value(rate)) for label, name in names if (rate := _number(row, name)) is not None]


def _named(row: Row, wanted: tuple[tuple[str, str, str], ...]) -> list[str]:
    found = [(label, _number(row, name), unit) for label, name, unit in wanted]
    return [f"{label} {format_value(value, unit)}".strip() for label, value, unit in found if value is not None]


def _number(row: Row, name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, (int, float)) else None
