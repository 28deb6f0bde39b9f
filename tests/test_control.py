"""Requests to a live run: what is refused before anything, and what becomes of those that are not."""

from __future__ import annotations

import json
import os

import pytest

from hapo_async import control
from hapo_async.errors import ConfigError, RunError


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generator=2"], "Did you mean generators=N"),
        (["generators=0"], "whole number from 1"),
        (["generators=-1"], "whole number from 1"),
        (["generators=two"], "whole number from 1"),
        (["learners=2"], "Give generators=N"),
        (["generators"], "cannot be scaled"),
        (["generators=1", "generators=2"], "given twice"),
        ([], "nothing to change"),
    ],
)
def test_what_cannot_be_asked_is_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        control.new_request(words)


def test_a_request_needs_a_live_run_that_can_be_scaled(tmp_path, monkeypatch):
    request = control.new_request(["generators=2"])
    with pytest.raises(ConfigError, match="not the folder of a run"):
        control.submit(tmp_path, request)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match="not live"):
        control.submit(tmp_path, request)
    monkeypatch.setattr(control, "driver_of", lambda run_dir: 1)
    control.Desk(tmp_path, "generator.placement=colocated: no")
    with pytest.raises(ConfigError, match=r"placement=colocated"):
        control.submit(tmp_path, request)


def test_a_driver_that_dies_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "driver_of", lambda run_dir: 1)
    (tmp_path / "config.yaml").touch()
    control.Desk(tmp_path)
    request = control.new_request(["generators=2"])
    control.submit(tmp_path, request)
    monkeypatch.setattr(control, "driver_of", lambda run_dir: None)
    with pytest.raises(RunError, match="driver ended"):
        control.follow(tmp_path, request, print)
    assert not (tmp_path / "control" / "request.json").exists()


def test_the_outcome_is_told_line_by_line(tmp_path, monkeypatch):
    monkeypatch.setattr(control, "driver_of", lambda run_dir: 1)
    (tmp_path / "config.yaml").touch()
    desk, told = control.Desk(tmp_path), []
    for outcome in ("done", "failed"):
        request = control.new_request(["generators=2"], 1.0, 5.0)
        control.submit(tmp_path, request)
        assert desk.take() == request
        lines = [f"line {n} " + "x" * 1000 for n in range(1000)] + ["in the end"]
        desk.answer(request, lines, outcome)
        assert desk.take() is None
        if outcome == "failed":
            with pytest.raises(RunError, match="in the end"):
                control.follow(tmp_path, request, told.append)
        else:
            control.follow(tmp_path, request, told.append)
            assert told[0].startswith("line 0 x") and told[-1] == "in the end" and len(told) == control.MAX_LINES


def test_what_does_not_fit_the_schema_is_not_obeyed(tmp_path):
    desk = control.Desk(tmp_path)
    path = tmp_path / "control" / "request.json"
    good = {"id": "0" * 16, "generators": 2}
    path.write_text(json.dumps(good))
    assert desk.take() is not None
    for bad in (
        {**good, "generators": 0}, {**good, "generators": "2"}, {**good, "learners": 1}, {**good, "id": "../../x"},
        {**good, "wait_s": float("inf")}, {**good, "id": "0" * 16 + "\n"}, [good], {**good, "drain_deadline_s": -1},
    ):  # fmt: skip
        path.write_text(json.dumps(bad))
        assert desk.take() is None and not path.exists(), bad
    path.write_text(json.dumps(good) + " " * control.MAX_BYTES)
    assert desk.take() is None and not path.exists()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(json.dumps(good))
    path.symlink_to(elsewhere)
    assert desk.take() is None and elsewhere.exists()
    os.mkfifo(path)
    assert desk.take() is None and not path.exists()
