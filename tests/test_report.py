"""The report is one self-contained page, whatever the run left behind."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from hapo_async import config, metrics
from hapo_async.errors import UserError
from hapo_async.evaluation import verdicts
from hapo_async.report import page as report


class Page(HTMLParser):
    """Text and tags of a page; refuses tags that are not closed in order."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.html = html
        self.feed(html)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> does not close what is open"

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data + " "

    def headings(self) -> list[str]:
        return self._texts("h2")

    def _texts(self, wanted: str) -> list[str]:
        return re.findall(rf"<{wanted}>([^<]*)</{wanted}>", self.html)

    def heats(self) -> list[dict[str, Any]]:
        return [json.loads(attrs["data-heat"] or "") for _, attrs in self.tags if "data-heat" in attrs]

    def charts(self) -> list[dict[str, Any]]:
        return [
            json.loads(attrs["data-chart"] or "") for tag, attrs in self.tags if tag == "svg" and "data-chart" in attrs
        ]


def row(step: int, **extra: float) -> dict[str, float]:
    return {
        "reward/mean": step / 10,
        "train/prompts": 16,
        "gate/injected": 12 - step,
        "gate/confidence": 0.2 + step / 20,
        "staleness/mean": 0.5,
        "staleness/max": 1,
        "throughput/generate_tokens_per_s": 30_000,
        "throughput/learn_tokens_per_s": 20_000,
        "time/step_s": 2.0,
        "time/learn_s": 0.5,
        "time/wait_for_batch_s": 1.25,
        "policy/entropy": 0.5,
    } | {name.replace("__", "/"): value for name, value in extra.items()}


def run_folder(folder: Path, steps: int = 10, planned: int = 10, **overrides: Any) -> Path:
    """A small run of HAPO with two evaluations."""
    folder.mkdir()
    tree = {"algorithm": "hapo", "train": {"steps": planned, "batch_prompts": 16}, "max_staleness": 2, **overrides}
    (folder / "config.yaml").write_text(config.to_yaml(config.parse(tree)))
    with metrics.Writer(folder) as writer:
        writer.write(0, {"eval/chain-eval/pass@1": 0.25, "eval/chain-eval/pass@1/se": 0.03})
        for step in range(1, steps + 1):
            writer.write(step, row(step))
        writer.write(steps, {"eval/chain-eval/pass@1": 0.9, "eval/chain-eval/pass@1/se": 0.02})
    return folder


def page(folder: Path) -> Page:
    path = report.write(folder)
    assert path == folder / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def lines_of(parsed: Page) -> dict[str, list[float]]:
    return {line["label"]: line["y"] for chart in parsed.charts() for line in chart["lines"]}


def test_the_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    parsed = page(folder)
    html = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href|action)\s*=|url\(|@import|fetch\(|XMLHttp|import\(|https?://""", html)
    assert {"script", "style"} <= {tag for tag, _ in parsed.tags}
    assert not {tag for tag, _ in parsed.tags} & {"link", "img", "iframe", "object", "embed"}


def test_the_headline_gives_before_and_after(tmp_path: Path) -> None:
    text = " ".join(page(run_folder(tmp_path / "run")).text.split())
    assert "25% → 90%" in text
    assert "+65.0 points ± 2.0" in text
    assert "9.0 → 4.0" in text  # teachers: mean of the first and of the last five steps
    assert "10 of 10 steps, complete" in text
    assert "bound 2" in text
    assert "Bottleneck: generator." in text and "waited 62% of the step for rollouts" in text


def test_every_required_curve_is_drawn_with_its_values(tmp_path: Path) -> None:
    drawn = lines_of(page(run_folder(tmp_path / "run")))
    assert drawn["mean reward of the sampled answers"] == [s / 10 for s in range(1, 11)]
    assert drawn["chain-eval pass@1 ± standard error"] == [0.25, 0.9]
    assert drawn["groups with an injected teacher"] == pytest.approx([(12 - s) / 16 for s in range(1, 11)], abs=1e-4)
    assert len(drawn["mean confidence"]) == 10
    assert drawn["oldest token"] == [1] * 10 and drawn["mean"] == [0.5] * 10
    assert drawn["sampling"] == [30_000] * 10 and drawn["learning"] is not None
    assert drawn["waiting for a batch"] == [1.25] * 10
    assert drawn["other"] == [0.25] * 10


def test_a_theme_has_a_section_only_when_one_of_its_metrics_was_recorded(tmp_path: Path) -> None:
    themed = {
        "Correct and incorrect answers": {"offline/weight/correct": 0.5, "offline/weight/incorrect": 0.25},
        "Anchor": {"apo/r_anchor_p95": 1.5},
        "Teachers and offline data": {"train/offline_frac": 0.125},
    }
    plain = page(run_folder(tmp_path / "plain")).headings()
    assert not set(themed) & set(plain)
    folder = run_folder(tmp_path / "themed")
    with metrics.Writer(folder) as writer:
        for step in (11, 12):
            writer.write(step, {name: value for values in themed.values() for name, value in values.items()})
    parsed = page(folder)
    assert set(themed) <= set(parsed.headings())
    drawn = lines_of(parsed)
    assert drawn["correct"] == [0.5, 0.5] and drawn["incorrect"] == [0.25, 0.25]
    assert drawn["95th percentile"] == [1.5, 1.5] and drawn["train/offline_frac"] == [0.125, 0.125]


def test_components_of_the_reward_are_drawn_by_name(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with metrics.Writer(folder) as writer:
        writer.write(11, {"reward/component/format": 0.25, "reward/component/truth": -1.0})
    drawn = lines_of(page(folder))
    assert drawn["format"] == [0.25] and drawn["truth"] == [-1.0]


def test_what_stays_zero_is_not_drawn(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with metrics.Writer(folder) as writer:
        writer.write(11, {"apo/dead_frac": 0.0, "train/offline_frac": 0.0, "train/teacher_tokens": 0.0})
    assert not {"Anchor", "Teachers and offline data"} & set(page(folder).headings())


def test_the_gate_shows_confidence_over_time_and_what_each_threshold_would_open(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with metrics.Writer(folder) as writer:
        for step, shares in ((11, {1: 0.75, 5: 0.25}), (12, {7: 0.5, 8: 0.5})):
            values = {f"gate/confidence_hist/{b}": shares.get(b, 0.0) for b in range(10)}
            writer.write(step, values | {"gate/injected": 3.0, "gate/threshold": 0.8})
    parsed = page(folder)
    assert "The gate" in parsed.headings()
    heat = next(h for h in parsed.heats() if h["columns"] == ["11", "12"])
    cells = dict(zip(heat["rows"], heat["cells"], strict=True))
    assert cells["confidence 0.1 to 0.2"] == [0.75, 0.0] and cells["confidence 0.8 to 0.9"] == [0.0, 0.5]
    drawn = lines_of(parsed)
    assert drawn["below 0.2"] == [0.75, 0] and drawn["below 0.6"] == [1, 0] and drawn["below 0.8"] == [1, 0.5]


def test_questions_are_shown_over_training_with_what_was_gained_and_lost(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    for step, right in ((0, "a"), (10, "bc")):
        verdicts.append(folder, "chain-eval", step, [(uid, [uid in right], "") for uid in "abcd"])
    parsed = page(folder)
    assert "Question by question" in parsed.headings()
    assert "+2 / −1" in parsed.text
    heat = parsed.heats()[0]
    assert dict(zip(heat["rows"], heat["cells"], strict=True))["b"] == [0.0, 1.0]


def test_the_diversity_of_kept_rollouts_is_drawn(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    with metrics.Writer(folder) as writer:
        writer.write(11, {"groups/solved_frac": 0.5})
    (folder / "rollouts").mkdir()
    for step, texts in ((1, ["a b c d", "e f g h"]), (2, ["a b c d", "a b c d"])):
        row = {"step": step, "key": [0, "x", 0], "answers": [{"text": t} for t in texts]}
        (folder / "rollouts" / f"step-{step:06}.jsonl").write_text(json.dumps(row) + "\n")
    assert lines_of(page(folder))["1 - Self-BLEU"] == [1, 0]


def test_wall_time_counts_from_the_start_of_each_sitting_to_its_end(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps=2)
    with metrics.Writer(folder) as writer:
        for step, seconds in ((3, 30.0), (4, 100.0), (5, 20.0), (6, 50.0)):  # resumed after step 4
            writer.write(step, {"time/run_s": seconds})
    assert "2 min 30 s" in page(folder).text
    (folder / "status.json").write_text('{"state": "done", "seconds": 65.0}')
    assert "2 min 45 s" in page(folder).text


def test_recorded_metrics_are_listed_with_their_meaning_and_the_others_as_not_recorded(tmp_path: Path) -> None:
    text = page(run_folder(tmp_path / "run")).text
    assert "eval/chain-eval/pass@1/se" in text
    assert metrics.lookup("policy/entropy").meaning in text
    assert "perf/mfu" in text and "not recorded" in text


def test_a_run_that_a_crash_cut_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", steps=4, planned=100)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "time": 3.0, "reward/me')
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "step-1.jsonl").write_text('{"key": [0, "a", 0], "prom')
    text = page(folder).text
    assert "4 of 100 steps recorded" in text
    assert "No rollout was kept" in text
    (folder / "status.json").write_text('{"state": "failed"}')
    assert "failed after 4 of 100 steps" in page(folder).text


@pytest.mark.parametrize("files", [{}, {"config.yaml": "a: [", "metrics.jsonl": "\x00nonsense\n", "status.json": "{"}])
def test_an_empty_or_broken_folder_gives_a_page_that_says_so(tmp_path: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    parsed = page(tmp_path)
    assert "no step recorded yet" in parsed.text
    assert parsed.charts() == []


def test_a_run_without_its_config_is_still_drawn(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    (folder / "config.yaml").unlink()
    parsed = page(folder)
    assert len(parsed.charts()) >= 6
    assert "config.yaml is missing" in parsed.text


def test_an_algorithm_without_teachers_or_evaluation_says_why_there_is_no_curve(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, {"reward/mean": 0.5})
    parsed = page(tmp_path)
    assert "this algorithm injects no teacher" in parsed.text
    assert "No evaluation recorded" in parsed.text
    assert len(parsed.charts()) == 1


def test_a_single_step_and_values_that_are_not_finite_can_be_drawn(tmp_path: Path) -> None:
    with metrics.Writer(tmp_path) as writer:
        writer.write(1, row(1) | {"policy/grad_norm": float("nan")})
    assert len(page(tmp_path).charts()) >= 5


def test_what_a_model_wrote_is_shown_as_text_and_never_as_markup(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run<b>&")
    (folder / "rollouts").mkdir()
    attack = "<script>alert(1)</script>"
    group = {
        "key": [0, attack, 0],
        "prompt": attack,
        "truth": attack,
        "answers": [{"text": attack, "verdict": '"><b>'}],
    }
    (folder / "rollouts" / "step-1.jsonl").write_text(json.dumps(group) + "\n")
    parsed = page(folder)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1
    assert "alert(1)" in parsed.text
    assert all(attrs.get("class") != "b" for tag, attrs in parsed.tags if tag == "b")


def test_a_long_run_gives_a_page_of_bounded_size(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 5001):
            file.write(json.dumps({"step": step, "time": float(step), **row(step % 10)}) + "\n")
    assert report.write(tmp_path).stat().st_size < 1_000_000


def test_a_folder_that_does_not_exist_is_an_error_for_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        report.write(tmp_path / "nowhere")
