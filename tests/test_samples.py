"""Sample rollouts come from the whole course of a run, and survive files that a crash cut."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hapo_async.report import samples


def group(step: int, uid: str = "p", correct: int = 0, n: int = 4, teacher: bool = False) -> dict[str, Any]:
    answers: list[dict[str, Any]] = [
        {
            "text": f"answer {i}",
            "tokens": [1, 2, 3],
            "spans": [["1.0", 0, 2], ["1.1", 2, 3]],
            "finish_reason": "stop",
            "verdict": "correct" if i < correct else "wrong",
            "reward": float(i < correct),
            "advantage": None if teacher and i == n - 1 else -0.5,
            "injected": False,
            "replaced": teacher and i == n - 1,
        }
        for i in range(n)
    ]
    if teacher:
        answers.append(
            {"text": "solution", "tokens": [1], "finish_reason": "teacher", "verdict": "correct", "reward": 1.0,
             "advantage": 2.5, "injected": True}
        )  # fmt: skip
    gate = {"is_open": True, "successes": correct, "judged": n, "confidence": (1 + correct) / (2 + n)}
    gate |= {"replaced": n - 1 if teacher else None, "teacher": 0 if teacher else None}
    gate["reason"] = "" if teacher else "no teacher"
    return {"step": step, "key": [0, uid, 0], "prompt": "1+1?", "truth": "2", "answers": answers, "gate": gate}


def write(folder: Path, steps: dict[int, list[dict[str, Any]]]) -> Path:
    folder.mkdir(exist_ok=True)
    for step, groups in steps.items():
        (folder / f"step-{step}.jsonl").write_text("".join(json.dumps(g) + "\n" for g in groups))
    return folder


def test_samples_come_from_the_beginning_the_middle_and_the_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", {s: [group(s, f"{s}-{u}") for u in range(3)] for s in range(1, 101)})
    steps = [g.step for g in samples.pick(folder)]
    assert steps == sorted(steps)
    assert len(steps) == 6
    assert steps[0] <= 2 and 40 <= steps[2] <= 60 and steps[-1] == 100


def test_one_large_file_is_read_at_its_beginning_middle_and_end(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", {1: [group(s, str(s)) for s in range(1, 401)]})
    steps = [g.step for g in samples.pick(folder)]
    assert steps[0] <= 24 and 195 <= steps[2] <= 230 and steps[-1] > 390


def test_no_group_is_shown_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", {1: [group(1, "a"), group(1, "b")]})
    assert sorted(g.key for g in samples.pick(folder)) == ["0/a/0", "0/b/0"]


def test_groups_with_a_teacher_or_mixed_verdicts_are_preferred(tmp_path: Path) -> None:
    dull = [group(1, f"dull{i}") for i in range(4)]
    folder = write(tmp_path / "r", {1: [*dull, group(1, "mixed", correct=2), group(1, "taught", teacher=True)]})
    shown = [g.key for g in samples.pick(folder, per_place=2)][:2]
    assert sorted(shown) == ["0/mixed/0", "0/taught/0"]


def test_a_group_says_what_the_gate_did_and_which_answer_was_replaced(tmp_path: Path) -> None:
    shown = samples.pick(write(tmp_path / "r", {3: [group(3, teacher=True)]}))[0]
    assert shown.place == "step 3"
    assert shown.gate == "0 of 4 correct · confidence 0.17 · gate open · the teacher replaced answer 3"
    assert [a.is_replaced for a in shown.answers] == [False, False, False, True, False]
    assert [a.is_teacher for a in shown.answers] == [False, False, False, False, True]
    assert shown.answers[0].versions == "1.0 → 1.1"
    assert (shown.answers[0].advantage, shown.answers[3].advantage, shown.answers[4].advantage) == (
        "-0.50",
        "–",
        "+2.50",
    )
    closed = samples.pick(write(tmp_path / "s", {3: [group(3)]}))[0]
    assert closed.gate.endswith("no teacher")


def test_lines_that_are_cut_or_strange_are_left_out(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", {1: [group(1)]})
    with (folder / "step-1.jsonl").open("a") as file:
        file.write('[1]\n{"answers": 3}\n{"key": [0, "q", 0], "answers": [{}, 7]}\n{"key": [0, "cut"')
    shown = samples.pick(folder)
    assert [g.key for g in shown] == ["0/q/0", "0/p/0"]
    assert shown[0].answers[0].verdict == "unjudged"


def test_without_rollouts_there_are_no_samples(tmp_path: Path) -> None:
    assert samples.pick(tmp_path / "nowhere") == []
    (tmp_path / "step-1.jsonl").touch()
    assert samples.pick(tmp_path) == []


def test_long_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    long = group(1)
    long["answers"][0]["text"] = "x" * 5000
    shown = samples.pick(write(tmp_path / "r", {1: [long]}))[0]
    assert len(shown.answers[0].text) < 1000
    assert shown.answers[0].text.endswith("(4100 more characters)")


def test_distinctness_is_measured_on_a_few_evenly_spread_steps_without_teachers(tmp_path: Path) -> None:
    folder = write(tmp_path / "r", {s: [group(s, n=3, teacher=True)] for s in range(1, 101)})
    steps, values = samples.distinctness(folder, files=5)
    assert steps == [1, 26, 50, 75, 100] or steps == [1, 26, 51, 75, 100]
    # "answer 0", "answer 1", "answer 2": one word of two is shared, no pair of words is
    assert values == [1.0] * 5
    assert samples.distinctness(tmp_path / "nowhere") == ([], [])
