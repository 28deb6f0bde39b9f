"""What happened to a run besides its steps, and its marks in the report."""

from __future__ import annotations

import json
import re

from hapo_async import events
from hapo_async.events import Event
from hapo_async.files import append_row
from hapo_async.report import marks, panels
from hapo_async.report.charts import SMALL, Line, line_chart


def test_events_are_said_and_read_again_but_for_broken_lines(tmp_path):
    said: list[str] = []
    written = events.Events(tmp_path, lambda: 7, said.append)
    written.add("scaled", "generators 1 → 4", "scaled: generators 1 → 4")
    with (tmp_path / events.EVENTS_FILE).open("a") as file:
        file.write('{"step": 8, "time"')
    (event,) = events.read(tmp_path)
    assert (event.step, event.kind, event.label) == (7, "scaled", "generators 1 → 4")
    assert said == ["step 7: scaled: generators 1 → 4"] and events.read(tmp_path / "none") == []


def event(step: int, label: str = "a < b") -> Event:
    return Event(step, 0.0, "scaled", label, f"a sentence of {label}")


def test_a_mark_stands_at_its_step_with_its_words():
    svg = line_chart([Line("x", [0, 10], [1.0, 2.0])])
    drawn = marks.draw(svg, [event(0), event(5), event(10), event(99)])
    xs = [float(x) for x in re.findall(r'class="event" x1="([\d.]+)"', drawn)]
    assert xs[0] < xs[1] < xs[2] == xs[3] and abs(xs[1] - (xs[0] + xs[2]) / 2) < 0.1
    assert drawn.count(">a &lt; b</text>") == 4 and "step 5: a sentence of a &lt; b" in drawn
    assert marks.draw(svg, []) == svg and marks.draw("<svg></svg>", [event(1)]) == "<svg></svg>"


def test_small_and_crowded_charts_carry_no_labels():
    small = marks.draw(line_chart([Line("x", [0, 10], [1.0, 2.0])], size=SMALL), [event(3)])
    crowded = marks.draw(line_chart([Line("x", [0, 10], [1.0, 2.0])]), [event(n) for n in range(20)])
    assert small.count('class="event"') == 1 and crowded.count('class="event"') == 20
    assert "</text>" not in small.partition('class="event"')[2] and "event-label" not in crowded


def test_where_something_happened_the_report_counts_actors_over_steps():
    rows = [{"step": n, "scale/generators": 1.0 + n, "scale/verifiers": 1.0, "reward/mean": 0.5} for n in range(3)]
    sections = [panels.training(rows, 1)]
    assert marks.mark(sections, rows, []) == sections
    training, machine = marks.mark(sections, rows, [event(1)])
    assert machine.title == "The machine" and machine.panels[0].title == "Generators and verifiers"
    assert all('class="event"' in p.svg for s in (training, machine) for p in s.panels if p.svg)


def test_a_line_that_a_crash_cut_short_costs_no_other_and_a_full_disk_is_said(tmp_path, caplog):
    (tmp_path / "rows").write_text('{"row": 0}\n{"ro')
    append_row(tmp_path / "rows", {"row": 1, "text": "é\ud800"})
    append_row(tmp_path / "rows", {"row": 2})
    append_row(tmp_path / "new", {"row": 0})
    lines = (tmp_path / "rows").read_text().splitlines()
    assert [lines[0], lines[1], lines[3]] == ['{"row": 0}', '{"ro', '{"row": 2}'] and json.loads(lines[2])["row"] == 1
    assert (tmp_path / "new").read_text() == '{"row": 0}\n'
    (tmp_path / "full").symlink_to("/dev/full")
    append_row(tmp_path / "full", {"row": 0})
    assert "No space left" in caplog.text
