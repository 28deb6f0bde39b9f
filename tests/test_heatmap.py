"""A heat map is well-formed SVG whose cells have the shades of their values."""

from __future__ import annotations

import json
import re
from xml.etree import ElementTree

import pytest

from hapo_async.report.heatmap import COLUMNS_SHOWN, ROWS_SHOWN, Heat, heat_map


def shades(svg: str) -> dict[tuple[str, float], int]:
    """(colour, opacity) -> number of cells."""
    root = ElementTree.fromstring(svg)
    out = {}
    for path in root.iter("path"):
        if opacity := path.get("fill-opacity"):
            color = re.fullmatch(r"fill:var\((--c\d)\)", path.get("style") or "")
            assert color
            out[color[1], float(opacity)] = (path.get("d") or "").count("M")
    return out


def payload(svg: str) -> dict:
    return json.loads(ElementTree.fromstring(svg).get("data-heat") or "")


def test_cells_of_one_shade_are_one_path() -> None:
    svg = heat_map(Heat(["a", "b"], ["0", "10", "20"], [[0.0, 0.5, 1.0], [None, 1.0, 1.0]]))
    assert shades(svg) == {("--c1", 0.5): 1, ("--c1", 1.0): 3}
    assert payload(svg)["cells"] == [[0.0, 0.5, 1.0], [None, 1.0, 1.0]]


def test_what_was_not_measured_has_no_background() -> None:
    svg = heat_map(Heat(["a", "b"], ["0", "1"], [[0.0, None], [1.0, 0.2]]))
    zero = next(p for p in ElementTree.fromstring(svg).iter("path") if p.get("class") == "zero")
    assert (zero.get("d") or "").count("M") == 3


def test_differences_have_a_colour_for_each_side() -> None:
    svg = heat_map(Heat(["a"], ["0", "1", "2", "3"], [[-1.0, -0.25, 0.0, 0.3]], low=-1.0))
    assert shades(svg) == {("--c3", 1.0): 1, ("--c3", 0.3): 1, ("--c1", 0.3): 1}


def test_a_rule_crosses_every_column() -> None:
    svg = heat_map(Heat(["a", "b"], ["0", "1"], [[0, 1], [1, 0]], rule=[0.5, 1.5]), cell_height=10)
    line = next(p for p in ElementTree.fromstring(svg).iter("path") if p.get("class") == "heat-rule")
    assert [float(y) for y in re.findall(r",([\d.]+)", line.get("d") or "")] == [15, 15, 25, 25]


def test_a_large_map_is_averaged_and_stays_small() -> None:
    rows, columns = 3 * ROWS_SHOWN, 2 * COLUMNS_SHOWN
    cells = [[float((r // 3 + c // 2) % 2) for c in range(columns)] for r in range(rows)]
    svg = heat_map(Heat([f"q{r}" for r in range(rows)], [str(c) for c in range(columns)], cells))
    data = payload(svg)
    assert (len(data["rows"]), len(data["columns"])) == (ROWS_SHOWN, COLUMNS_SHOWN)
    assert data["cells"][1][:3] == [1.0, 0.0, 1.0] and data["rows"][1] == "q3 … q5"
    assert len(svg) < 1_200_000


def test_labels_are_text() -> None:
    svg = heat_map(Heat(['<b>"&'], ["<i>"], [[1.0]], edges=("<u>", "")))
    assert payload(svg)["rows"] == ['<b>"&']
    assert "<i>" not in svg and "<u>" not in svg


@pytest.mark.parametrize("heat", [Heat([], ["0"], []), Heat(["a"], [], [[]])])
def test_a_map_without_cells_is_refused(heat: Heat) -> None:
    with pytest.raises(ValueError, match="at least one"):
        heat_map(heat)
