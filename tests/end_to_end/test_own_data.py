"""Files as their authors publish them, a model of one's own, a reward of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.end_to_end.helpers import hapo, hapo_here, json_lines, rollouts, succeeded

TINY = [
    "configs/quickstart.yaml",
    "train.steps=3",
    "train.batch_prompts=4",
    "sampling.n=4",
    "sampling.max_tokens=24",
    "data.max_prompt_tokens=400",
    "data.demonstrations=-1",
    "data.eval=[]",
    "gate.gamma=0.8",
    "rollouts.sample=1.0",
]

GSM8K = [
    {
        "question": f"Tom has {i} apples and buys {i + 1} more. How many has he?",
        "answer": f"{i}+{i + 1}=<<{i}+{i + 1}={2 * i + 1}>>{2 * i + 1}\n#### {2 * i + 1}",
    }
    for i in range(1, 13)
]


pytestmark = pytest.mark.usefixtures("ray_session")


def train(run_dir: Path, *overrides: str) -> None:
    assert hapo_here("train", *TINY, f"run.dir={run_dir}", *overrides) == 0


def test_gsm8k_columns_train_for_three_steps(tiny_model, tmp_path, capsys):
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in GSM8K))
    run = tmp_path / "run"
    train(run, f"model={tiny_model}", f"data.train={path}", "verifier.name=math", "sampling.max_tokens=64")
    printed = capsys.readouterr().out
    assert "question" in printed and "answer" in printed, "the mapping is printed"
    assert [r["step"] for r in json_lines(run / "metrics.jsonl")] == [1, 2, 3]
    rows = rollouts(run)
    assert {r["truth"] for r in rows} <= {str(2 * i + 1) for i in range(1, 13)}
    assert any(a["injected"] for r in rows for a in r["answers"]), "the worked answers serve as teachers"


def test_verl_parquet_with_luffy_targets_trains_for_three_steps(tiny_model, tmp_path):
    import pandas

    rows = [
        {
            "data_source": "math",
            "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"What is {i}+{i}?"}],
            "target": [{"role": "assistant", "content": rf"It is \boxed{{{2 * i}}}"}],
            "reward_model": {"style": "rule", "ground_truth": str(2 * i)},
            "extra_info": {"index": i, "split": "train"},
        }
        for i in range(12)
    ]
    path = tmp_path / "train.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    run = tmp_path / "run"
    train(run, f"model={tiny_model}", f"data.train={path}", "algorithm=luffy")
    rows = rollouts(run)
    assert len(rows) == 12
    for row in rows:
        sampled = [a for a in row["answers"] if not a["injected"]]
        assert (len(sampled), len(row["answers"])) == (3, 4), "three sampled and one teacher make the group of four"


def test_a_reward_function_of_ones_own(tiny_model, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "answer": "x"}) for i in range(12)))
    run = tmp_path / "run"
    options = ("algorithm=grpo", "train.steps=2", "verifier.name=tests.rewards:even")
    train(run, f"model={tiny_model}", f"data.train={path}", *options)
    answers = [a for r in rollouts(run) for a in r["answers"]]
    assert {a["reward"] for a in answers} == {0.0, 1.0}
    assert all(a["reward"] == float(len(a["text"]) % 2 == 0) for a in answers)


def test_evaluation_of_benchmark_files(tiny_model, tmp_path, capsys):
    math = tmp_path / "MATH-500.json"
    math.write_text(json.dumps([{"prompt": "1/2+1/3?", "answer": "\\frac{5}{6}", "source": "math", "id": "a"}] * 3))
    aime = tmp_path / "AIME24.json"
    aime.write_text(json.dumps([{"prompt": "Find n.", "answer": 204, "source": "aime", "id": 1}]))
    sets = ("--data", str(math), "--data", str(aime))
    assert hapo_here("eval", tiny_model, *sets, "--n", "4", "--k", "2", "--json", "sampling.max_tokens=16") == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["eval/MATH-500/prompts"] == 3 and metrics["eval/AIME24/prompts"] == 1
    assert {"eval/AIME24/pass@1", "eval/AIME24/pass@2", "eval/AIME24/avg@4", "eval/AIME24/avg@4/se"} <= metrics.keys()


def test_the_verifier_is_checked_against_labels(tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [
        {"response": r"so \boxed{18}", "truth": "18", "label": True},
        {"response": "A: 17", "truth": "18", "label": False},
        {"response": r"\boxed{3}", "truth": "3", "label": False},
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    report = json.loads(succeeded(hapo("check-verifier", str(path), "--json")))
    assert report["cases"] == 3 and len(report["disagreements"]) == 1
    assert report["agreement"] == pytest.approx(2 / 3)
