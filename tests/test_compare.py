"""Two runs side by side: equal steps, exclusive solves, files of answers, and a page that loads nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hapo_async import metrics
from hapo_async.errors import ConfigError
from hapo_async.evaluation import verdicts
from hapo_async.report import compare
from tests.test_report import Page


def run(folder: Path, rewards: dict[int, float], solved: dict[int, str], **more: float) -> Path:
    with metrics.Writer(folder) as writer:
        for step, reward in rewards.items():
            writer.write(step, {"reward/mean": reward, **{k.replace("__", "/"): v for k, v in more.items()}})
    for step, uids in solved.items():
        verdicts.append(folder, "math", step, [(u, [u in uids], "5" if u == "a" else "") for u in "abcd"])
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    first = run(tmp_path / "one", {1: 0.1, 2: 0.2, 4: 0.4}, {0: "", 2: "ab", 4: "abc"}, policy__entropy=0.5)
    return first, run(tmp_path / "two", {1: 0.3, 2: 0.5, 3: 0.7}, {0: "", 2: "bd"})


def test_metrics_are_compared_at_equal_steps(runs: tuple[Path, Path]) -> None:
    found = compare.compare(*runs).as_dict()
    assert (found["a"], found["b"]) == ("one", "two")
    assert found["metrics"] == {"reward/mean": {"steps": [1, 2], "a": [0.1, 0.2], "b": [0.3, 0.5]}}


def test_exclusive_solves_are_of_the_last_common_evaluation(runs: tuple[Path, Path]) -> None:
    solves = compare.compare(*runs).as_dict()["exclusive_solves"]["math"]
    assert solves == {
        "step": 2, "asked": 4, "gained": ["d"], "lost": ["a"], "levels": {"5": {"gained": 0, "lost": 1}}
    }  # fmt: skip


def test_the_terminal_shows_the_difference(runs: tuple[Path, Path]) -> None:
    from rich.console import Console

    console = Console(width=120, record=True)
    for block in compare.compare(*runs).blocks():
        console.print(block)
    text = console.export_text()
    assert re.search(r"reward/mean\W+2\W+0\.2\W+0\.5\W+\+0\.3", text)
    assert "only B / only A solves +1 / −1 (level 5: +0 / −1)" in text


def test_the_page_is_self_contained_and_has_the_map_of_differences(runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "sub" / "page.html"
    compare.write(compare.compare(*runs), path)
    html = path.read_text()
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|fetch\(|XMLHttp|import\(|https?://""", html)
    page = Page(html)
    heat = [json.loads(attrs["data-heat"] or "") for _, attrs in page.tags if "data-heat" in attrs]
    assert len(heat) == 1 and dict(zip(heat[0]["rows"], heat[0]["cells"], strict=True)) == {
        "a": [0.0, -1.0], "b": [0.0, 0.0], "c": [0.0, 0.0], "d": [0.0, 1.0]
    }  # fmt: skip
    drawn = [(line["label"], line["y"]) for chart in page.charts() for line in chart["lines"]]
    assert ("A", [0.1, 0.2]) in drawn and ("B", [0.3, 0.5]) in drawn


def test_files_of_saved_answers_can_be_compared(tmp_path: Path) -> None:
    for name, rewards in (("a", [0.0, 1.0]), ("b", [1.0, 1.0])):
        rows = [{"set": "s", "uid": str(i), "answers": [{"reward": r}]} for i, r in enumerate(rewards)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = compare.compare(tmp_path / "a.jsonl", tmp_path / "b.jsonl").as_dict()
    assert found["exclusive_solves"]["s"]["gained"] == ["0"] and found["metrics"] == {}


def test_runs_with_nothing_in_common_say_so(tmp_path: Path) -> None:
    found = compare.compare(run(tmp_path / "a", {1: 0.0}, {}), run(tmp_path / "b", {2: 0.0}, {}))
    assert any("Nothing in common" in str(block) for block in found.blocks())
    compare.write(found, tmp_path / "page.html")
    assert "Nothing in common" in Page((tmp_path / "page.html").read_text()).text


def test_runs_that_were_never_evaluated_at_an_equal_step_do_not_lead_with_step_0(tmp_path: Path) -> None:
    folders = []
    for name, every in (("a", 2), ("b", 3)):
        with metrics.Writer(tmp_path / name) as writer:
            for step in range(7):
                evaluated = {"eval/math/pass@1": step / 10} if step in (0, every) else {}
                writer.write(step, ({"reward/mean": 0.5} if step else {}) | evaluated)
        verdicts.append(tmp_path / name, "math", 0, [("q", [False], "")])
        folders.append(tmp_path / name)
    found = compare.compare(*folders)
    assert [pair.name for pair in compare._shown(found.pairs)] == ["reward/mean", "eval/math/pass@1"]
    sentence = "math: no common evaluation after step 0. A has steps 0, 2; B has steps 0, 3; step 0 is before training."
    assert list(found.blocks())[1] == sentence
    compare.write(found, tmp_path / "page.html")
    assert sentence in Page((tmp_path / "page.html").read_text()).text


def test_runs_with_an_evaluation_in_common_say_nothing_of_the_others(tmp_path: Path) -> None:
    for name, steps in (("a", (0, 2, 4)), ("b", (0, 4, 5))):
        with metrics.Writer(tmp_path / name) as writer:
            for step in steps:
                writer.write(step, {"eval/math/pass@1": 0.5})
    assert not compare.compare(tmp_path / "a", tmp_path / "b").apart


def test_runs_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for parent in "xy":
        run(tmp_path / parent / "run", {1: 0.0}, {})
    names = compare.compare(tmp_path / "x" / "run", tmp_path / "y" / "run").names
    assert names[0] != names[1]


@pytest.mark.parametrize("name", ["nowhere", "empty", "other.jsonl"])
def test_what_is_neither_a_run_nor_answers_is_refused(runs: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.jsonl").write_text('{"prompt": "x"}\n')
    with pytest.raises(ConfigError, match=re.escape(name)):
        compare.compare(runs[0], tmp_path / name)
