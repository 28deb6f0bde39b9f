"""The live view: a table on a terminal, one line per step anywhere else."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from hapo_async.live import LiveView, blocks, clock_text

ROW: dict[str, Any] = {
    "reward/mean": 0.5,
    "gate/injected": 12.0,
    "train/prompts": 16.0,
    "gate/confidence": 0.31,
    "staleness/mean": 0.8,
    "staleness/max": 2.0,
    "throughput/generate_tokens_per_s": 31_400.0,
    "throughput/learn_tokens_per_s": 22_000.0,
    "time/step_s": 0.5,
    "weights/version": 7.0,
    "weights/lag/g0": 0.0,
    "weights/lag/g1": 1.0,
    "bottleneck": "learner",
    "advice": "learner: it computed 80% of the step; add ranks (learner.ranks) or raise learner.micro_batch_tokens.",
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(*updates: tuple[int, dict[str, Any]], total: int = 10, seconds: float = 2.0) -> list[str]:
    out, clock = io.StringIO(), Clock()
    with LiveView(total, Console(file=out, width=60), clock) as view:
        for step, row in updates:
            clock.now += seconds
            view.update(step, row)
    return out.getvalue().splitlines()


def table(view: LiveView, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, record=True)
    console.print(view.render())
    return console.export_text()


def test_without_a_terminal_each_step_is_one_line_however_narrow() -> None:
    out = lines((0, {"eval/aime/pass@1": 0.25}), (1, ROW), (2, ROW))
    assert len(out) == 3
    assert "eval aime 25%" in out[0]
    for part in (
        "step  2/10",
        "reward 0.5",
        "injected 12",
        "staleness 0.8 (max 2)",
        "generate 31.4k",
        "limited by learner",
    ):
        assert part in out[2]
    assert "eval" not in out[2]


def test_the_lines_carry_no_terminal_codes() -> None:
    assert "\x1b" not in "".join(lines((1, ROW)))


def test_what_a_step_did_not_measure_is_left_out_of_its_line() -> None:
    (line,) = lines((1, {"reward/mean": None, "loss/value": 1.0}))
    assert line == "step  1/10"


def test_the_time_left_follows_the_pace_of_the_learner_steps() -> None:
    clock = Clock()
    view = LiveView(10, Console(file=io.StringIO()), clock)
    clock.now = 100.0  # a long start and a first evaluation say nothing about the pace
    view.update(0, {})
    clock.now = 103.0
    view.update(1, ROW)
    assert view.eta_s() is None
    clock.now = 105.0
    view.update(2, ROW)
    assert view.eta_s() == pytest.approx(16.0)
    clock.now = 106.0
    assert view.eta_s() == pytest.approx(15.0)


def test_a_resumed_run_takes_its_pace_from_the_steps_it_saw() -> None:
    clock = Clock()
    view = LiveView(100, Console(file=io.StringIO()), clock)
    for step in (91, 92, 93):
        clock.now += 2.0
        view.update(step, ROW)
    assert view.eta_s() == pytest.approx(14.0)


def test_the_table_shows_what_matters() -> None:
    clock = Clock()
    view = LiveView(10, Console(file=io.StringIO()), clock)
    view.update(0, {"eval/aime/pass@1": 0.25})
    for step in range(1, 8):
        clock.now += 1.0
        view.update(step, ROW | {"reward/mean": step / 10}, "checkpoint written" if step == 7 else "")
    view.update(7, {"eval/aime/pass@1": 0.5})
    text = table(view)
    expected = (
        "step 7/10",
        "0:03 left",
        "0.700",
        "▁",
        "█",
        "25% → 50%",
        "12 of 16 groups",
        "confidence 0.31",
        "mean 0.80  max 2",
        "generate 31.4k",
        "published 7  g0 7  g1 6",
        "learner: it computed 80%",
        "checkpoint written",
    )
    for part in expected:
        assert part in text


def test_the_table_is_there_before_the_first_step() -> None:
    assert "waiting for the first step" in table(LiveView(10, Console(file=io.StringIO())))


def test_on_a_terminal_the_table_is_drawn_and_left_standing() -> None:
    out = io.StringIO()
    with LiveView(2, Console(file=out, force_terminal=True, width=100)) as view:
        view.update(1, ROW)
        view.update(2, ROW)
    shown = out.getvalue()
    assert "\x1b[" in shown
    assert "step 2/2" in shown[shown.rindex("hapo_async") :]


def test_a_view_closes_when_the_run_fails() -> None:
    view = LiveView(2, Console(file=io.StringIO(), force_terminal=True))
    with pytest.raises(KeyError), view:
        raise KeyError
    assert view._live is None


def test_blocks_follow_the_course_of_a_series() -> None:
    assert blocks([1.0, 2.0, 3.0], 10) == "▁▅█"
    assert blocks([5.0, 5.0], 10) == "▁▁"
    assert len(blocks([float(i) for i in range(1000)], 32)) == 32


@pytest.mark.parametrize(("seconds", "text"), [(5, "0:05"), (125.4, "2:05"), (3725, "1:02:05")])
def test_clock_texts(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


def test_the_clock_shows_the_time_since_the_run_was_started() -> None:
    clock = Clock()
    clock.now = 100.0
    view = LiveView(10, Console(file=io.StringIO()), clock, began=40.0)
    clock.now = 105.0
    assert "1:05 elapsed" in table(view)
