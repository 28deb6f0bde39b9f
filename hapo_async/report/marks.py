"""Marks of what happened to a run, as vertical rules in the charts over its steps.

A mark stands where the event found the run: after the last step that had been committed. Each rule has its event's sentence
as a tooltip; large charts also carry its label.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from markupsafe import Markup

from hapo_async.events import Event
from hapo_async.report import panels
from hapo_async.report.charts import LARGE, SMALL
from hapo_async.report.panels import Section

MARKED = ("Training", "The machine")
MOST_LABELS = 12
_ROWS = 3  # labels of neighbours stand below each other
_CURSOR = '<line class="cursor"'


def mark(sections: Sequence[Section], rows: Sequence[Mapping[str, Any]], events: Sequence[Event]) -> list[Section]:
    """The sections with marks in their charts over steps, and a chart of how many actors there were; the sections as they are
    where nothing happened."""
    if not events:
        return list(sections)
    wanted = [("scale/generators", "generators", 0), ("scale/verifiers", "verifiers", 1)]
    counts = panels.curves(rows, "Generators and verifiers", wanted, floor=0.0, size=SMALL)
    out = list(sections)
    if counts.svg and out and out[-1].title == MARKED[1]:
        out[-1] = replace(out[-1], panels=[counts, *out[-1].panels])
    elif counts.svg:
        out.append(Section(MARKED[1], [counts], small=True))
    return [_marked(section, events) if section.title in MARKED else section for section in out]


def _marked(section: Section, events: Sequence[Event]) -> Section:
    drawn = [replace(p, svg=Markup(draw(str(p.svg), events))) if p.svg else p for p in section.panels]  # noqa: S704 - see draw
    return replace(section, panels=drawn)


def draw(svg: str, events: Sequence[Event]) -> str:
    """A chart of ``charts`` with a rule for each event. Texts are escaped."""
    found = re.search(r'data-chart="([^"]*)"', svg)
    ends = re.search(_CURSOR + r' y1="([\d.]+)" y2="([\d.]+)"', svg)
    size = re.search(r'viewBox="0 0 (\d+) \d+"', svg)
    if not (found and ends and size):
        return svg
    left, right, x0, x1 = json.loads(html.unescape(found[1]))["box"]
    top, bottom = float(ends[1]), float(ends[2])
    labelled = int(size[1]) >= LARGE[0] and len(events) <= MOST_LABELS
    parts = []
    for number, event in enumerate(events):
        x = left + (min(max(event.step, x0), x1) - x0) / ((x1 - x0) or 1) * (right - left)
        tip = f"<title>step {event.step}: {html.escape(event.text)}</title>"
        parts.append(f'<line class="event" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}">{tip}</line>')
        if labelled:
            anchor, shift = ("end", -3) if x > (left + right) / 2 else ("start", 3)
            y = top + 9 + 11 * (number % _ROWS)
            label = f"<title>{html.escape(event.text)}</title>{html.escape(event.label)}"
            parts.append(
                f'<text class="event-label" x="{x + shift:.1f}" y="{y:.1f}" text-anchor="{anchor}">{label}</text>'
            )
    return svg.replace(_CURSOR, "".join(parts) + _CURSOR, 1)
