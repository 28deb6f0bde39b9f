"""Questions over training: heat maps, exclusive solves by level, the difference of two runs."""

from __future__ import annotations

import json
from xml.etree import ElementTree

from hapo_async.evaluation.verdicts import Questions
from hapo_async.report import questions

A = Questions(
    "math", {0: {"x": 0.0, "y": 1.0, "z": 0.5}, 5: {"x": 1.0, "y": 0.0, "z": 0.5}}, {"x": "Level 4", "y": "1"}
)
B = Questions("math", {5: {"x": 0.5, "z": 0.0, "new": 1.0}})


def data_of(panel: questions.Panel) -> dict:
    return json.loads(ElementTree.fromstring(str(panel.svg)).get("data-heat") or "")


def test_the_map_has_every_question_at_every_evaluation() -> None:
    panel = questions.accuracy_map(A)
    data = data_of(panel)
    assert data["columns"] == ["0", "5"]
    assert dict(zip(data["rows"], data["cells"], strict=True)) == {"x": [0.0, 1.0], "y": [1.0, 0.0], "z": [0.5, 0.5]}
    assert panel.wide and "+1 / −1 (level 1: +0 / −1, level 4: +1 / −0)" in panel.note


def test_questions_that_are_answered_best_come_first() -> None:
    asked = Questions("s", {0: {"low": 0.0, "high": 1.0}, 1: {"low": 0.25, "high": 1.0, "late": 0.5}})
    data = data_of(questions.accuracy_map(asked))
    assert data["rows"] == ["high", "late", "low"]
    assert data["cells"][1] == [None, 0.5]


def test_a_set_that_was_asked_once_has_no_map() -> None:
    assert questions.sections({"b": B}) == []
    assert [section.title for section in questions.sections({"a": A, "b": B})] == ["Question by question"]


def test_exclusive_solves_of_two_runs() -> None:
    found = questions.exclusive(A, 5, B, 5)
    assert (found.gained, found.lost) == ([], ["z"])
    assert found.levels == [] and found.text() == "+0 / −1"


def test_the_difference_is_of_questions_that_both_were_asked() -> None:
    data = data_of(questions.difference_map(A, B, [5]))
    assert dict(zip(data["rows"], data["cells"], strict=True)) == {"x": [-0.5], "z": [-0.5]}
