"""What `explain` prints comes from the table: every part of every algorithm, and the difference of two."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hapo_async import algorithms, explain
from hapo_async.cli import app
from hapo_async.errors import ConfigError


@pytest.mark.parametrize("name", algorithms.names())
def test_a_page_names_every_part_and_option(name):
    d = explain.find(name)
    text = " ".join(explain.page(d).split())
    parts = [d["equation"], d["title"], d["advantage"], d["reduction"], *d["reference"].values(), *d["mask"].values()]
    for part in parts:
        assert " ".join(part.split()) in text
    for option, value in d["defaults"].items():
        assert f"{option}=" in text and d["options"][option].split()[0] in text, (option, value)


def test_no_two_algorithms_have_the_same_equation_or_parts():
    rows = [algorithms.get(name).describe() for name in algorithms.names()]
    assert len({row["equation"] for row in rows}) == len(rows)
    for row in rows:
        for key in ("name", "title", "equation"):
            del row[key]
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)


def test_the_difference_of_two_is_what_one_would_have_to_change():
    found = explain.difference(explain.find("grpo"), explain.find("Dr.GRPO"))
    assert found["defaults"]["std"] == {"grpo": "true", "dr_grpo": "false"}
    assert set(found) == {"equation", "advantage", "reduction", "defaults"}
    assert explain.difference(explain.find("hapo"), explain.find("hapo")) == {}
    assert explain.difference(explain.find("grpo"), explain.find("apo"))["defaults"]["beta"] == {
        "grpo": None,
        "apo": "0.1",
    }
    text = explain.difference_text(explain.find("grpo"), explain.find("apo"))
    assert "beta: grpo has none, apo 0.1" in text
    with pytest.raises(ConfigError, match="Did you mean 'hapo'"):
        explain.find("haapo")


def test_the_command_prints_text_and_json():
    run = CliRunner().invoke
    listed = json.loads(run(app, ["explain", "--json"]).stdout)
    assert [row["name"] for row in listed] == algorithms.names()
    assert all(row["equation"] and row["advantage"] and row["reduction"] for row in listed)
    assert json.loads(run(app, ["explain", "HAPO+APO", "--json"]).stdout)["name"] == "hapo_apo"
    assert set(json.loads(run(app, ["explain", "dpo", "rpo", "--json"]).stdout)["defaults"]) == {"alpha"}
    assert "a_star_po" in run(app, ["explain"]).stdout
    assert "critic=true" in run(app, ["explain", "ppo"]).stdout
