"""Charts as inline SVG: lines with bands, stacked bars, sparklines. No dependency, no network, theme by CSS variables.

Colours are CSS variables ``--c0`` ... ``--c6`` that the page defines, so that one drawing serves light and dark. Each
chart carries its numbers in a ``data-chart`` attribute, from which the page shows the values under the pointer.
"""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

LARGE, SMALL = (560, 232), (372, 164)
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 58, 12, 26
_WHOLE = ("steps", "groups", "prompts")  # units that come in whole numbers
_POINTS = 240  # more points than that are averaged: the drawing is that wide


@dataclass(frozen=True)
class Line:
    """One curve. ``band``: half-widths drawn around it; that of a share ends at 0 and 1. ``points``: marks, for values that
    are measured now and then. ``smooth``: draws the running mean in full and the raw values faintly. ``dots``: no line, for
    values that jump."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    color: int = 0
    band: Sequence[float] = ()
    points: bool = False
    smooth: bool = False
    dashed: bool = False
    dots: bool = False


@dataclass(frozen=True)
class Frame:
    """Data ranges of a drawing area, and the mapping to pixels."""

    x0: float
    x1: float
    y0: float
    y1: float
    left: float = _LEFT
    right: float = LARGE[0] - _RIGHT
    top: float = _TOP
    bottom: float = LARGE[1] - _BOTTOM
    ticks: Sequence[float] = field(default_factory=tuple)

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / ((self.x1 - self.x0) or 1) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / ((self.y1 - self.y0) or 1) * (self.bottom - self.top)


def line_chart(
    lines: Sequence[Line],
    unit: str = "",
    floor: float | None = None,
    ceiling: float | None = None,
    limit: tuple[float, str] | None = None,
    size: tuple[int, int] = LARGE,
) -> str:
    """SVG of curves over steps. floor, ceiling: values the y axis includes. limit: (value, label) of a dashed rule.

    Raises ValueError when no line has a point.
    """
    lines = [line for line in lines if line.values]
    if not lines:
        raise ValueError("a chart needs at least one point")
    thinned = [_thinned(line) for line in lines]
    top = limit[0] * 1.01 if limit else None  # room for the rule's label
    frame = _frame(thinned, [v for v in (floor, ceiling, top) if v is not None], unit, size)
    parts = [_axes(frame, unit)]
    if limit:
        y = frame.y(limit[0])
        parts.append(f'<line class="limit" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="limit-label" x="{frame.left + 6}" y="{y - 5:.1f}">{html.escape(limit[1])}</text>')
    parts += [_curve(line, frame, unit) for line in thinned]
    parts += _end_labels(thinned, frame, unit)
    return _svg(parts, frame, unit, size, [(line.label, line.color, line.steps, line.values) for line in thinned])


def stack_chart(steps: Sequence[float], layers: Sequence[tuple[str, Sequence[float], int]], unit: str = "") -> str:
    """SVG of stacked bars over steps; layers: (label, values, colour) from the bottom up. A bar that is cut where the axis
    ends has a gap below its top (class ``break``)."""
    columns = [thin(steps, values, 120)[1] for _, values, _ in layers]
    xs = thin(steps, layers[0][1], 120)[0]
    totals = [sum(column[i] for column in columns) for i in range(len(xs))]
    half = (xs[-1] - xs[0]) / (len(xs) - 1) / 2 if len(xs) > 1 else 0.5
    # The axis ends above all ordinary bars; the few that an evaluation makes tall are cut, with their value under the pointer.
    ticks = nice_ticks(0, min(max(totals), 1.6 * sorted(totals)[int(0.9 * (len(totals) - 1))]) or 1)
    frame = Frame(xs[0] - half, xs[-1] + half, 0, ticks[-1], right=LARGE[0] - 40, ticks=ticks)
    width = max((frame.x(xs[0] + 2 * half) - frame.x(xs[0])) * 0.82, 0.8)
    parts = [_axes(frame, unit)]
    for i, x in enumerate(xs):
        base = 0.0
        for (_, _, color), column in zip(layers, columns, strict=True):
            top = min(base + column[i], frame.y1)
            if top - base > frame.y1 * 0.002:
                parts.append(
                    f'<rect x="{frame.x(x) - width / 2:.1f}" width="{width:.1f}" y="{frame.y(top):.1f}" '
                    f'height="{frame.y(base) - frame.y(top):.1f}" style="fill:var(--c{color})"/>'
                )
            base = top
        if totals[i] > frame.y1 * 1.002:
            left, right, y = frame.x(x) - width / 2 - 1, frame.x(x) + width / 2 + 1, frame.top + 8
            parts.append(f'<path class="break" d="M{left:.1f},{y + 2:.1f}L{right:.1f},{y - 2:.1f}"/>')
    data = [(label, color, xs, column) for (label, _, color), column in zip(layers, columns, strict=True)]
    return _svg(parts, frame, unit, LARGE, data)


def sparkline(values: Sequence[float], width: int = 96, height: int = 22) -> str:
    """A small SVG curve without axes; its last value is marked. Empty for fewer than two values."""
    if len(values) < 2:
        return ""
    xs, ys = thin(range(len(values)), values, width // 2)
    frame = Frame(xs[0], xs[-1], min(ys), max(ys), left=2, right=width - 4, top=3, bottom=height - 3)
    flat = frame.y0 == frame.y1
    points = [(frame.x(x), height / 2 if flat else frame.y(y)) for x, y in zip(xs, ys, strict=True)]
    path = "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" aria-hidden="true">'
        f'<path d="{path}"/><circle cx="{points[-1][0]:.1f}" cy="{points[-1][1]:.1f}" r="2"/></svg>'
    )


def format_value(value: float, unit: str = "") -> str:
    """A number for people: shares as per cent, 31.4k, 1.2M, three significant digits; seconds and bytes with unit."""
    if not math.isfinite(value):
        return "n/a"
    if unit == "share":
        return f"{100 * value:.1f}%".replace(".0%", "%")
    if unit in ("bytes", "bytes/s"):
        return _scaled(value, (" ", " k", " M", " G", " T")) + unit.replace("bytes", "B")
    if unit == "s":
        return f"{_scaled(1000 * value)} ms" if 0 < abs(value) < 0.1 else f"{_scaled(value)} s"
    return _scaled(value)


def _scaled(value: float, suffixes: Sequence[str] = ("", "k", "M", "G")) -> str:
    size = abs(value)
    for suffix in suffixes[:-1]:
        if size < (9999.5 if not suffix.strip() else 999.5):
            break
        size, value = size / 1000, value / 1000
    else:
        suffix = suffixes[-1]
    if value == int(value):
        return f"{int(value)}{suffix}"
    if size >= 100:
        return f"{value:.0f}{suffix}"
    if 0 < size < 0.001:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-") + suffix
    return f"{value:.3g}{suffix}"


def nice_ticks(low: float, high: float, count: int = 4, whole: bool = False) -> list[float]:
    """Round values that cover [low, high], about ``count`` of them; ``whole`` ones are integers."""
    if high - low < 1e-200:  # one value, as far as a drawing can tell
        high = low + (abs(low) if abs(low) > 1e-100 else 1) * 0.1
    rough = max((high - low) / count, 1.0 if whole else 0.0)
    unit = 10.0 ** math.floor(math.log10(rough))
    sizes = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(m * unit for m in sizes if m * unit >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin(
    steps: Sequence[float], values: Sequence[float], limit: int = _POINTS, peaks: bool = False
) -> tuple[list[float], list[float]]:
    """At most ``limit`` points over the same range: neighbours are averaged; with ``peaks`` the largest one stays."""
    n = len(values)
    if n <= limit:
        return list(steps), list(values)
    edges = [round(i * n / limit) for i in range(limit + 1)]
    spans = [(a, b) for a, b in itertools.pairwise(edges) if b > a]
    xs = [sum(steps[a:b]) / (b - a) for a, b in spans]
    xs[0], xs[-1] = steps[0], steps[-1]
    return xs, [max(values[a:b]) if peaks else sum(values[a:b]) / (b - a) for a, b in spans]


def running_mean(values: Sequence[float]) -> list[float]:
    """Centred running mean over about a fifteenth of the values; the ends use what there is."""
    half = max(len(values) // 30, 1)
    out = []
    for i in range(len(values)):
        window = values[max(i - half, 0) : i + half + 1]
        out.append(sum(window) / len(window))
    return out


# --------------------------------------------------------------------------------------------------------------------
# Pieces


def _thinned(line: Line) -> Line:
    steps, values = thin(line.steps, line.values, peaks=line.dots)
    band = thin(line.steps, line.band)[1] if line.band else ()
    return Line(line.label, steps, values, line.color, band, line.points, line.smooth, line.dashed, line.dots)


def _frame(lines: Sequence[Line], include: Sequence[float], unit: str, size: tuple[int, int]) -> Frame:
    xs = [x for line in lines for x in line.steps]
    ys = list(include)
    for line in lines:
        ys += line.values
        for lower, upper in _edges(line, unit):
            ys += [lower, upper]
    low, high = min(ys), max(ys)
    ticks = nice_ticks(low, high, whole=unit in _WHOLE)
    # An axis that starts at a natural end does not go below it, not even for what rounding put there.
    if include and low > min(include) - 0.01 * (high - low) - 1e-12:
        ticks = [t for t in ticks if t >= min(include) - 1e-12]
    x0, x1 = min(xs), max(xs)
    if x0 == x1:
        x0, x1 = x0 - 0.5, x1 + 0.5
    return Frame(x0, x1, ticks[0], ticks[-1], right=size[0] - _RIGHT, bottom=size[1] - _BOTTOM, ticks=ticks)


def _axes(frame: Frame, unit: str) -> str:
    parts = []
    for tick in frame.ticks:
        y = frame.y(tick)
        parts.append(f'<line class="grid" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        label = format_value(tick, unit)
        parts.append(f'<text class="tick" x="{frame.left - 8}" y="{y + 3.5:.1f}" text-anchor="end">{label}</text>')
    parts.append(f'<text class="tick" x="{frame.right + 20}" y="{frame.bottom + 17}">step</text>')
    for tick in nice_ticks(frame.x0, frame.x1, 6):
        if tick == int(tick) and frame.x0 - 1e-9 <= tick <= frame.x1 + 1e-9:
            x = frame.x(tick)
            parts.append(
                f'<text class="tick" x="{x:.1f}" y="{frame.bottom + 17}" text-anchor="middle">{int(tick)}</text>'
            )
    return "".join(parts)


def _edges(line: Line, unit: str) -> list[tuple[float, float]]:
    """Lower and upper end of the band at each step. A share is never below 0 nor above 1, whatever its band says."""
    bounds = (0.0, 1.0) if unit == "share" else (-math.inf, math.inf)
    return [
        (max(value - half, min(value, bounds[0])), min(value + half, max(value, bounds[1])))
        for value, half in zip(line.values, line.band, strict=False)
    ]


def _curve(line: Line, frame: Frame, unit: str) -> str:
    color = f"var(--c{line.color})"
    parts = []
    if line.band:
        edges = list(zip(line.steps, _edges(line, unit), strict=False))
        lower, upper = [(x, low) for x, (low, _) in edges], [(x, high) for x, (_, high) in edges]
        parts.append(f'<path class="band" d="{_path(upper + lower[::-1], frame)}Z" style="fill:{color}"/>')
    raw = list(zip(line.steps, line.values, strict=True))
    smooth = _is_smooth(line)
    if smooth:
        parts.append(f'<path class="raw" d="{_path(raw, frame)}" style="stroke:{color}"/>')
    shown = list(zip(line.steps, running_mean(line.values), strict=True)) if smooth else raw
    if not line.dots:
        kind = "curve dashed" if line.dashed else "curve"
        parts.append(f'<path class="{kind}" d="{_path(shown, frame)}" style="stroke:{color}"/>')
    marks = raw if line.points or line.dots or len(raw) <= 12 else shown[-1:]
    radius = 2.4 if line.dots and len(raw) > 12 else 3.2
    parts += [
        f'<circle class="mark" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="{radius}" style="fill:{color}"/>'
        for x, y in marks
    ]
    return "".join(parts)


def _path(points: Sequence[tuple[float, float]], frame: Frame) -> str:
    return "M" + "L".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in points)


def _end_labels(lines: Sequence[Line], frame: Frame, unit: str) -> list[str]:
    """Last values beside the ends of the curves, pushed apart where they would overlap."""
    ends = []
    for line in lines:
        last = running_mean(line.values)[-1] if _is_smooth(line) else line.values[-1]
        ends.append((frame.y(last), frame.x(line.steps[-1]), format_value(last, unit), line.color))
    ends.sort()
    heights = [end[0] for end in ends]
    for above, below in itertools.pairwise(range(len(ends))):
        heights[below] = max(heights[below], heights[above] + 13)
    excess = max(heights[-1] - frame.bottom, 0)
    return [
        f'<text class="end" x="{x + 8:.1f}" y="{y - excess + 4:.1f}" style="fill:var(--c{color})">{text}</text>'
        for y, (_, x, text, color) in zip(heights, ends, strict=True)
    ]


def _is_smooth(line: Line) -> bool:
    return line.smooth and len(line.values) >= 24


def _svg(
    parts: Sequence[str],
    frame: Frame,
    unit: str,
    size: tuple[int, int],
    data: Sequence[tuple[str, int, Sequence[float], Sequence[float]]],
) -> str:
    payload = {
        "unit": unit,
        "box": [frame.left, frame.right, frame.x0, frame.x1],
        "lines": [
            {"label": label, "color": color, "x": [_short(v) for v in xs], "y": [_short(v) for v in ys]}
            for label, color, xs, ys in data
        ],
    }
    return (
        f'<svg class="chart" viewBox="0 0 {size[0]} {size[1]}" role="img" '
        f'data-chart="{html.escape(json.dumps(payload))}">'
        f'{"".join(parts)}<line class="cursor" y1="{frame.top}" y2="{frame.bottom}" x1="-9" x2="-9"/></svg>'
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else 0.0
