"""Evaluation as papers do it: protocols, kept answers, analyses, and the comparison of two evaluations."""

from __future__ import annotations

import json

import pytest

from tests.end_to_end.helpers import hapo_here, json_lines

pytestmark = pytest.mark.usefixtures("ray_session")


def test_a_protocol_with_kept_answers_and_analyses(chain_model, tmp_path, capsys):
    rows = [
        {"prompt": "19a+8b*3?", "answer": "81", "solution": r"a19+8=27;b27*3=81;\boxed{81}", "level": "Level 1"},
        {"prompt": "2a+3b*3?", "answer": "15", "solution": r"a2+3=5;b5*3=15;\boxed{15}", "level": "Level 2"},
    ]
    amc, other = tmp_path / "amc23.jsonl", tmp_path / "other.jsonl"
    for path in (amc, other):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    saved = tmp_path / "answers.jsonl"
    sets = ("--data", str(amc), "--data", str(other), "--protocol", "004")
    more = ("--save", str(saved), "--analyses", "--bootstrap", "50", "--json", "sampling.max_tokens=32")
    assert hapo_here("eval", chain_model, *sets, *more) == 0
    printed = capsys.readouterr()
    assert "does not name 'other'" in printed.err
    metrics = json.loads(printed.out)
    assert {f"eval/amc23/pass@{k}" for k in (1, 16, 128, 256)} <= metrics.keys(), "n = K = 256"
    assert {"eval/other/pass@16", "eval/other/bootstrap@4/se", "eval/macro/pass@8"} <= metrics.keys()
    assert "eval/other/pass@32" not in metrics and "eval/macro/pass@32" not in metrics
    means = [metrics[f"eval/{name}/pass@1"] for name in ("amc23", "other")]
    assert metrics["eval/macro/pass@1"] == pytest.approx(sum(means) / 2)
    kept = json_lines(saved)
    assert sorted((row["set"], len(row["answers"])) for row in kept) == [("amc23", 256)] * 2 + [("other", 16)] * 2
    for row in kept:
        for answer in row["answers"]:
            assert len(answer["logp"]) == len(answer["tokens"]) == answer["length"]
    right = [a["reward"] == 1 for row in kept if row["set"] == "amc23" for a in row["answers"]]
    assert metrics["eval/amc23/pass@1"] == pytest.approx(sum(right) / len(right))
    recall = [metrics[f"eval/amc23/oracle_recall@{k}"] for k in (1, 4, 8, 16)]
    assert recall == sorted(recall) and 0 < recall[0] <= recall[-1] <= 1
    assert {f"eval/amc23/diversity/{name}" for name in ("self_bleu", "similarity", "entropy", "max_prob")} <= set(
        metrics
    )

    assert hapo_here("compare", str(saved), str(saved), "--json") == 0
    found = json.loads(capsys.readouterr().out)["exclusive_solves"]
    assert found["amc23"]["asked"] == 2 and found["amc23"]["gained"] == found["amc23"]["lost"] == []


def test_what_cannot_be_evaluated_or_compared_is_refused_before_anything_starts(chain_model, tmp_path, capsys):
    assert hapo_here("eval", chain_model, "--data", "builtin:chain/eval", "--protocol", "7") == 2
    assert hapo_here("eval", chain_model, "--data", "builtin:chain/eval", "--n", "2", "--k", "3") == 2
    blocked = tmp_path / "file"
    blocked.write_text("")
    where = ("--save", str(blocked / "answers.jsonl"))
    assert hapo_here("eval", chain_model, "--data", "builtin:chain/eval", *where) == 2
    assert hapo_here("compare", str(tmp_path), str(blocked)) == 2
    errors = capsys.readouterr().err
    for word in ("000, 001", "eval.k=3", "cannot be saved", "neither a run folder"):
        assert word in errors
