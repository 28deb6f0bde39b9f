"""Heat maps as inline SVG: questions or bins down, steps across, colour by value. Theme by CSS variables.

Cells of one shade are one path, so that a large map stays small. The page shows the values under the pointer, from the
``data-heat`` attribute.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from hapo_async.report.charts import format_value

Cells = Sequence[Sequence[float | None]]

ROWS_SHOWN, COLUMNS_SHOWN = 240, 120
_SHADES = 10
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 64, 10, 26
_GOOD, _BAD = 1, 3  # colours of --c1 and --c3


@dataclass(frozen=True)
class Heat:
    """rows: labels from the top down. columns: labels, usually steps. cells[row][column]: None where nothing was measured.
    low, high: values of the scale's ends; a low below 0 gives two colours around 0. edges: labels at the left of the first
    and the last row. rule: values per column in rows from the top, drawn as a line over the map."""

    rows: Sequence[str]
    columns: Sequence[str]
    cells: Cells
    low: float = 0.0
    high: float = 1.0
    unit: str = "share"
    edges: tuple[str, str] = ("", "")
    rule: Sequence[float] = ()


def heat_map(heat: Heat, width: int = 1160, cell_height: float = 0.0) -> str:
    """SVG of a map; rows beyond 240 and columns beyond 120 are averaged with their neighbours. Raises ValueError for a map
    without cells."""
    if not heat.rows or not heat.columns:
        raise ValueError("a heat map needs at least one row and one column")
    heat = _thinned(heat)
    tall = cell_height or min(max(440 / len(heat.rows), 2.0), 22)
    height = _TOP + tall * len(heat.rows) + _BOTTOM
    wide = (width - _LEFT - _RIGHT) / len(heat.columns)
    parts = [_background(heat, wide, tall)]
    for shade, cells in sorted(_by_shade(heat).items()):
        color, opacity = (_GOOD, shade) if shade > 0 else (_BAD, -shade)
        path = "".join(_cell(c, r, wide, tall) for r, c in cells)
        parts.append(f'<path d="{path}" style="fill:var(--c{color})" fill-opacity="{opacity / _SHADES:.2g}"/>')
    parts.append(_rule(heat, wide, tall))
    parts += _labels(heat, wide, tall, height)
    parts += _scale(heat, width)
    payload = {
        "unit": heat.unit,
        "box": [_LEFT, _LEFT + wide * len(heat.columns), _TOP, _TOP + tall * len(heat.rows)],
        "rows": list(heat.rows),
        "columns": list(heat.columns),
        "cells": [[None if v is None else round(v, 3) for v in row] for row in heat.cells],
    }
    return (
        f'<svg class="chart heat" viewBox="0 0 {width} {height:.0f}" role="img" '
        f'data-heat="{html.escape(json.dumps(payload))}">{"".join(parts)}</svg>'
    )


def _by_shade(heat: Heat) -> dict[int, list[tuple[int, int]]]:
    """Shade -10 .. 10 without 0 -> cells (row, column)."""
    out: dict[int, list[tuple[int, int]]] = {}
    for r, row in enumerate(heat.cells):
        for c, value in enumerate(row):
            if value is None:
                continue
            end = heat.high if value > 0 else abs(heat.low)
            shade = min(math.ceil(abs(value) / end * _SHADES - 1e-9), _SHADES) if end else 0
            if shade:
                out.setdefault(shade if value > 0 else -shade, []).append((r, c))
    return out


def _background(heat: Heat, wide: float, tall: float) -> str:
    """Measured cells get the colour of 0, so that what was not measured stays empty."""
    measured = [(r, c) for r, row in enumerate(heat.cells) for c, value in enumerate(row) if value is not None]
    if len(measured) == len(heat.rows) * len(heat.columns):
        size = f'width="{wide * len(heat.columns):.1f}" height="{tall * len(heat.rows):.1f}"'
        return f'<rect class="zero" x="{_LEFT}" y="{_TOP}" {size}/>'
    return f'<path class="zero" d="{"".join(_cell(c, r, wide, tall) for r, c in measured)}"/>'


def _cell(column: int, row: int, wide: float, tall: float) -> str:
    x, y = _LEFT + column * wide, _TOP + row * tall
    gap = 0.6 if wide > 6 and tall > 5 else 0.0
    return f"M{x:.1f} {y:.1f}h{wide - gap:.1f}v{tall - gap:.1f}h{gap - wide:.1f}z"


def _rule(heat: Heat, wide: float, tall: float) -> str:
    if not heat.rule:
        return ""
    points = [
        f"{_LEFT + (column + side) * wide:.1f},{_TOP + row * tall:.1f}"
        for column, row in enumerate(heat.rule)
        for side in (0, 1)
    ]
    return f'<path class="heat-rule" d="M{"L".join(points)}"/>'


def _labels(heat: Heat, wide: float, tall: float, height: float) -> list[str]:
    bottom = _TOP + tall * len(heat.rows)
    every = max(1, math.ceil(len(heat.columns) * 44 / (wide * len(heat.columns))))
    out = [
        f'<text class="tick" x="{_LEFT + (c + 0.5) * wide:.1f}" y="{bottom + 17:.1f}" text-anchor="middle">'
        f"{html.escape(heat.columns[c])}</text>"
        for c in range(0, len(heat.columns), every)
    ]
    out.append(f'<text class="tick" x="{_LEFT + wide * len(heat.columns) + 14:.1f}" y="{bottom + 17:.1f}">step</text>')
    for label, y in zip(heat.edges, (_TOP + 9, bottom - 2), strict=True):
        out.append(f'<text class="tick" x="{_LEFT - 8}" y="{y:.1f}" text-anchor="end">{html.escape(label)}</text>')
    return out


def _scale(heat: Heat, width: int) -> list[str]:
    """The colours with their values, at the right."""
    values = [heat.high * i / 4 for i in (4, 3, 2, 1)] + [0.0]
    if heat.low < 0:
        values = [heat.high, heat.high / 2, 0.0, heat.low / 2, heat.low]
    out, x = [], width - _RIGHT + 12
    for i, value in enumerate(values):
        y = _TOP + i * 17
        color = "var(--zero)" if not value else f"var(--c{_GOOD if value > 0 else _BAD})"
        opacity = 1 if not value else abs(value) / (heat.high if value > 0 else -heat.low)
        out.append(
            f'<rect x="{x}" y="{y}" width="10" height="10" style="fill:{color}" fill-opacity="{opacity:.2g}"/>'
            f'<text class="tick" x="{x + 15}" y="{y + 9}">{format_value(value, heat.unit)}</text>'
        )
    return out


def _thinned(heat: Heat) -> Heat:
    rows, columns = _spans(len(heat.rows), ROWS_SHOWN), _spans(len(heat.columns), COLUMNS_SHOWN)
    if len(rows) == len(heat.rows) and len(columns) == len(heat.columns):
        return heat
    cells = [[_mean([heat.cells[r][c] for r in range(*rs) for c in range(*cs)]) for cs in columns] for rs in rows]
    names = [heat.rows[a] if b - a == 1 else f"{heat.rows[a]} … {heat.rows[b - 1]}" for a, b in rows]
    rule = [sum(heat.rule[a:b]) / (b - a) for a, b in columns] if heat.rule else ()
    labels = [heat.columns[a] for a, _ in columns]
    return Heat(names, labels, cells, heat.low, heat.high, heat.unit, heat.edges, rule)


def _spans(n: int, limit: int) -> list[tuple[int, int]]:
    """At most ``limit`` spans of equal size, the last one smaller where they do not divide n."""
    size = math.ceil(n / limit)
    return [(start, min(start + size, n)) for start in range(0, n, size)]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [v for v in values if v is not None]
    return sum(there) / len(there) if there else None
