"""Each question's verdicts are kept per evaluation, survive a crash, and are taken back with the steps they belong to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hapo_async import rollouts
from hapo_async.evaluation import verdicts
from hapo_async.types import Answer, Group, GroupKey, Judgement, Prompt, Segment, Source, Verdict, Version, VersionSpan


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_written_is_read_back_as_accuracies(tmp_path: Path) -> None:
    verdicts.append(tmp_path, "aime", 0, [("a", [True, False, None], "5"), ("b", [None, None], ""), ("c", [False], "")])
    verdicts.append(tmp_path, "aime", 10, [("a", [True, True], "5"), ("c", [True], "")])
    found = verdicts.read(tmp_path)["aime"]
    assert found.steps == [0, 10]
    assert found.accuracy == {0: {"a": 0.5, "c": 0.0}, 10: {"a": 1.0, "c": 1.0}}
    assert found.uids == ["a", "c"] and found.levels == {"a": "5"}
    assert lines(tmp_path / "evals" / "aime.jsonl")[0] == {
        "step": 0, "uid": "a", "correct": [True, False, None], "level": "5"
    }  # fmt: skip


def test_a_rollback_moves_later_evaluations_aside(tmp_path: Path) -> None:
    for step in (0, 10, 20):
        verdicts.append(tmp_path, "s", step, [("a", [step > 0], "")])
    rollouts.discard(tmp_path, 11)
    assert verdicts.read(tmp_path)["s"].steps == [0, 10]
    assert [row["step"] for row in lines(tmp_path / "discarded" / "evals" / "s.jsonl")] == [20]
    verdicts.append(tmp_path, "s", 20, [("a", [False], "")])
    assert verdicts.read(tmp_path)["s"].accuracy[20] == {"a": 0.0}


def test_a_line_that_a_crash_cut_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    verdicts.append(tmp_path, "s", 0, [("a", [True], ""), ("b", [True], "")])
    path = tmp_path / "evals" / "s.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    verdicts.append(tmp_path, "s", 1, [("a", [True], ""), ("b", [False], "")])
    assert verdicts.read(tmp_path)["s"].accuracy == {0: {"a": 1.0}, 1: {"a": 1.0, "b": 0.0}}


def test_of_a_large_set_a_bounded_number_is_kept(tmp_path: Path) -> None:
    verdicts.append(tmp_path, "s", 0, [(str(i), [True], "") for i in range(verdicts.QUESTIONS_KEPT + 5)])
    assert len(lines(tmp_path / "evals" / "s.jsonl")) == verdicts.QUESTIONS_KEPT


def test_a_folder_without_evaluations_has_none(tmp_path: Path) -> None:
    assert verdicts.read(tmp_path) == {}


def test_a_saved_answer_has_its_text_verdict_length_and_log_probs_and_is_read_back(tmp_path: Path) -> None:
    spans = (VersionSpan(Version(0, 0), 0, 2),)
    segment = Segment(Source.POLICY, np.array([7, 1], np.int32), np.array([-0.5, -0.25], np.float32), spans)
    answers = tuple(Answer(i, (segment,), "stop", text) for i, text in enumerate(["one", "two", "three"]))
    group = Group(GroupKey(-1, "u", 0), np.array([3, 4], np.int32), answers, 0.7, "g", 1)
    prompt = Prompt("u", ({"role": "user", "content": "2-1?"},), group.prompt_tokens, "1", extra={"level": "Level 3"})
    judged = [Judgement(Verdict.CORRECT, 1.0), Judgement(Verdict.WRONG, 0.0), Judgement(Verdict.TIMEOUT, None)]
    row = verdicts.describe("math", prompt, group, judged)
    assert row["answers"][0] == {
        "text": "one", "verdict": "correct", "reward": 1.0, "finish_reason": "stop", "length": 2, "tokens": [7, 1],
        "logp": [-0.5, -0.25],
    }  # fmt: skip
    assert (row["set"], row["uid"], row["prompt"], row["truth"]) == ("math", "u", "2-1?", "1")
    path = tmp_path / "answers.jsonl"
    path.write_text(json.dumps(row) + "\n")
    found = verdicts.read_answers(path)["math"]
    assert found.accuracy == {0: {"u": 0.5}} and found.levels == {"u": "Level 3"}
