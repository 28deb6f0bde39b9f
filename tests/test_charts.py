"""Charts are well-formed SVG that shows the values it was given."""

from __future__ import annotations

import itertools
import json
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hapo_async.report.charts import (
    Line,
    format_value,
    line_chart,
    nice_ticks,
    running_mean,
    sparkline,
    stack_chart,
    thin,
)

NUMBERS = st.floats(-1e6, 1e6, allow_nan=False)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.958, "share", "95.8%"),
        (1.0, "share", "100%"),
        (31412.0, "tokens/s", "31.4k"),
        (5692.4, "tokens", "5692"),
        (1_234_567, "", "1.23M"),
        (4_100_000, "bytes/s", "4.1 MB/s"),
        (0.004, "s", "4 ms"),
        (12.345, "s", "12.3 s"),
        (0.0, "s", "0 s"),
        (5e-7, "", "5e-7"),
        (-0.148, "", "-0.148"),
        (float("nan"), "", "n/a"),
    ],
)
def test_numbers_are_written_for_people(value: float, unit: str, text: str) -> None:
    assert format_value(value, unit) == text


@given(NUMBERS, NUMBERS)
def test_ticks_cover_the_values_and_are_few(a: float, b: float) -> None:
    low, high = min(a, b), max(a, b)
    ticks = nice_ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert ticks[0] <= low + slack and ticks[-1] >= high - slack
    assert 2 <= len(ticks) <= 8
    assert ticks == sorted(ticks)


def test_whole_ticks_are_integers() -> None:
    assert nice_ticks(0, 2, whole=True) == [0, 1, 2]


@given(st.lists(NUMBERS, min_size=1, max_size=700))
def test_thinning_keeps_the_range_of_steps_and_the_mean(values: list[float]) -> None:
    steps, kept = thin(range(len(values)), values, 100)
    assert len(steps) == len(kept) <= 100
    assert (steps[0], steps[-1]) == (0, len(values) - 1)
    assert min(values) - 1e-6 <= min(kept) and max(kept) <= max(values) + 1e-6
    assert max(thin(range(len(values)), values, 100, peaks=True)[1]) == max(values)


def test_a_running_mean_leaves_a_constant_alone_and_evens_out_noise() -> None:
    assert running_mean([2.0] * 50) == [2.0] * 50
    noisy = [float(i % 2) for i in range(90)]
    assert all(0.2 < v < 0.8 for v in running_mean(noisy)[5:-5])


def test_a_line_chart_shows_each_line_with_its_last_value() -> None:
    svg = line_chart(
        [
            Line("acc", [0, 10, 20], [0.2, 0.5, 0.9], 1, band=[0.1, 0.1, 0.1], points=True),
            Line("<b>", [0, 10, 20], [0.1, 0.1, 0.1], 2, dashed=True),
        ],
        "share",
        floor=0.0,
        ceiling=1.0,
        limit=(0.8, "bound"),
    )
    root = ElementTree.fromstring(svg)
    texts = [e.text for e in root.iter("text")]
    assert "90%" in texts and "10%" in texts and "bound" in texts and "100%" in texts
    data = json.loads(root.attrib["data-chart"])
    assert [line["label"] for line in data["lines"]] == ["acc", "<b>"]
    assert data["lines"][0]["y"] == [0.2, 0.5, 0.9]


def test_higher_values_are_drawn_higher() -> None:
    path = re.search(r'class="curve" d="M([^"]+)"', line_chart([Line("x", [1, 2, 3], [1.0, 2.0, 4.0])]))
    assert path
    points = [tuple(map(float, p.split(","))) for p in path.group(1).split("L")]
    assert points[0][0] < points[1][0] < points[2][0]
    assert points[0][1] > points[1][1] > points[2][1]
    # Twice the distance in value is twice the distance on paper.
    assert (points[1][1] - points[2][1]) / (points[0][1] - points[1][1]) == pytest.approx(2, abs=0.02)


def test_labels_of_neighbouring_ends_do_not_overlap() -> None:
    svg = line_chart([Line(str(i), [1, 2], [1.0, 1.0 + i / 1000], i) for i in range(4)], floor=0.0)
    heights = sorted(float(y) for y in re.findall(r'class="end" x="[\d.]+" y="([\d.]+)"', svg))
    assert len(heights) == 4
    assert min(b - a for a, b in itertools.pairwise(heights)) >= 12.9


@pytest.mark.parametrize("values", [[1.0], [3.0, 3.0], [0.0, 0.0, 0.0], [-1e-9, 1e9]])
def test_flat_and_lone_values_can_be_drawn(values: list[float]) -> None:
    svg = line_chart([Line("x", range(len(values)), values, smooth=True)])
    ElementTree.fromstring(svg)
    assert "nan" not in svg and "inf" not in svg


def test_a_chart_without_a_point_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one point"):
        line_chart([Line("x", [], [])])


def test_a_stack_is_as_tall_as_its_layers_together() -> None:
    svg = stack_chart([1, 2], [("a", [1.0, 2.0], 0), ("b", [3.0, 2.0], 1)])
    ElementTree.fromstring(svg)
    bars = [tuple(map(float, m)) for m in re.findall(r'x="([\d.]+)" width="[\d.]+" y="[\d.]+" height="([\d.]+)"', svg)]
    assert len(bars) == 4
    heights: dict[float, float] = {}
    for x, height in bars:
        heights[x] = heights.get(x, 0) + height
    first, second = heights.values()
    assert first == pytest.approx(second, abs=0.2) and first > 0


def test_a_bar_that_is_cut_says_so() -> None:
    ordinary = [1.0] * 20
    assert "break" not in stack_chart(range(20), [("a", ordinary, 0)])
    svg = stack_chart(range(20), [("a", ordinary, 0), ("b", [0.0] * 19 + [9.0], 1)])
    (gap,) = re.findall(r'<path class="break" d="M([\d.]+),[\d.]+L([\d.]+),', svg)
    bars = re.findall(r'<rect x="([\d.]+)" width="([\d.]+)"', svg)
    assert float(gap[0]) < float(bars[-1][0]) < float(bars[-1][0]) + float(bars[-1][1]) < float(gap[1])
    data = json.loads(ElementTree.fromstring(svg).attrib["data-chart"])
    assert data["lines"][1]["y"][-1] == 9.0, "the whole value shows under the pointer"


def test_the_band_of_a_share_ends_at_its_natural_limits() -> None:
    lines = [Line("x", [1, 2], [0.9, 0.1], band=[0.4, 0.4])]
    ticks = re.findall(r'text-anchor="end">([^<]+)<', line_chart(lines, "share", floor=0.0, ceiling=1.0))
    assert (ticks[0], ticks[-1]) == ("0%", "100%")
    ticks = re.findall(r'text-anchor="end">([^<]+)<', line_chart(lines, "", floor=0.0, ceiling=1.0))
    assert float(ticks[0]) < 0 and float(ticks[-1]) > 1


def test_a_sparkline_needs_two_values() -> None:
    assert sparkline([1.0]) == ""
    ElementTree.fromstring(sparkline([1.0, 2.0, 1.5]))
    ElementTree.fromstring(sparkline([2.0] * 300))


def test_an_axis_that_starts_at_zero_does_not_go_below_it_for_rounding() -> None:
    svg = line_chart([Line("kl", [1, 2, 3], [-2e-9, 0.02, 0.05])], floor=0.0)
    ticks = re.findall(r'text-anchor="end">([^<]+)<', svg)
    assert ticks[0] == "0" and not any(tick.startswith("-") for tick in ticks)
    below = line_chart([Line("x", [1, 2], [-0.02, 0.05])], floor=0.0)
    assert "-0.02" in re.findall(r'text-anchor="end">([^<]+)<', below)
