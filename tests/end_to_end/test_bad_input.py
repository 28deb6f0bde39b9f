"""Bad input: a clear error with exit code 2, before Ray starts."""

import json
import sys

import pytest

from tests.end_to_end.helpers import hapo, hapo_here

QUICKSTART = "configs/quickstart.yaml"


def write(path, *rows):
    path.write_text("\n".join(json.dumps(r) for r in rows))
    return path


CASES = {
    "missing config": (["configs/nothing.yaml"], ["configs/nothing.yaml", "does not exist"]),
    "missing data": ([QUICKSTART, "data.train=nowhere.jsonl"], ["nowhere.jsonl"]),
    "unknown key": ([QUICKSTART, "gate.gama=0.5"], ["gate.gama", "gate.gamma"]),
    "impossible gamma": ([QUICKSTART, "gate.gamma=0.95"], ["0.95", "9/10", "gate.mode=always"]),
    "one answer per group": ([QUICKSTART, "sampling.n=1", "gate.gamma=0.5", "algorithm=grpo"], ["sampling.n"]),
    "unknown algorithm": ([QUICKSTART, "algorithm=grop"], ["grop", "grpo"]),
    "unknown option": ([QUICKSTART, "options={epsilonn: 1}"], ["epsilonn"]),
    "missing model": ([QUICKSTART, "model=./no/such/model"], ["no/such/model"]),
    "missing reward function": ([QUICKSTART, "verifier.name=nowhere:verify"], ["nowhere"]),
    "unknown vllm argument": (
        [QUICKSTART, "generator.engine=vllm", "vllm={max_model_length: 1}"],
        ["max_model_length", "max_model_len"],
    ),
    "unknown schedule": ([QUICKSTART, "learner.lr_schedule=cosin"], ["cosin", "lr_schedule"]),
    "schedule that needs more": ([QUICKSTART, "learner.lr_schedule=reduce_lr_on_plateau"], ["reduce_lr_on_plateau"]),
    "impossible betas": ([QUICKSTART, "learner.adamw.betas=[0.9, 1.5]"], ["1.5"]),
    "one cached answer": ([QUICKSTART, "algorithm=fpa", "sampling.n=1"], ["sampling.n=1"]),
    "patience without evaluations": (
        [QUICKSTART, "algorithm=fpa", "eval.every=0", "options.patience=2"],
        ["options.patience=2", "eval.every"],
    ),
    "patience without held-out prompts": (
        [QUICKSTART, "algorithm=fpa", "options={patience: 2, holdout: 0}"],
        ["options.patience=2", "options.holdout"],
    ),
    "demonstrations first, but none": (
        [QUICKSTART, "algorithm=hpt", "options.sft_steps=5", "data.demonstrations=0"],
        ["sft_steps", "data.columns"],
    ),
    "unknown deepspeed argument": ([QUICKSTART, "deepspeed={zero_optimisation: {}}"], ["zero_optimisation"]),
}


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))
def test_it_ends_with_2_and_names_value_and_fix(case, tmp_path, capsys, monkeypatch):
    from actors import placement

    monkeypatch.setattr(placement, "join", lambda actors: pytest.fail("Ray was about to be started"))
    arguments, expected = CASES[case]
    code = hapo_here("train", *arguments, f"run.dir={tmp_path / 'run'}")
    errors = capsys.readouterr().err
    assert code == 2, errors
    for word in ("error:", *expected):
        assert word in errors, errors
    assert not (tmp_path / "run").exists(), "a run folder was made for a run that could not start"


@pytest.mark.parametrize("key", ["run.dir", "data.answers"])
def test_a_folder_that_is_a_file(key, tmp_path, capsys, monkeypatch):
    from actors import placement

    monkeypatch.setattr(placement, "join", lambda actors: pytest.fail("Ray was about to be started"))
    folders = {"run.dir": tmp_path / "run", key: "README.md"}
    assert hapo_here("train", QUICKSTART, "algorithm=fpa", *(f"{k}={v}" for k, v in folders.items())) == 2
    errors = capsys.readouterr().err
    assert key in errors and "README.md" in errors


def test_the_process_says_so_in_one_message_without_a_traceback():
    result = hapo("train", QUICKSTART, "data.train=nowhere.jsonl", timeout_s=60)
    assert result.returncode == 2
    assert result.stderr.count("error:") == 1 and "Traceback" not in result.stderr


def test_a_column_that_does_not_exist(tmp_path, capsys):
    data = write(tmp_path / "d.jsonl", {"question": "1+1?", "answer": "2"})
    assert hapo_here("train", QUICKSTART, f"data.train={data}", "data.columns={prompt: qestion}") == 2
    errors = capsys.readouterr().err
    assert "qestion" in errors and "question" in errors


def test_teachers_longer_than_the_context_for_every_prompt(tmp_path, capsys):
    long = "1+1=2; " * 50 + r"\boxed{2}"
    data = write(tmp_path / "d.jsonl", *({"prompt": f"{i}a+1?", "answer": "2", "solution": long} for i in range(4)))
    assert hapo_here("train", QUICKSTART, f"data.train={data}") == 2
    assert "sampling.max_tokens" in capsys.readouterr().err


def test_an_engine_that_is_not_installed(tmp_path):
    """vllm is hidden from this one process by an import hook."""
    import os
    import subprocess

    hook = tmp_path / "sitecustomize.py"
    hook.write_text(
        "import sys\nclass Hide:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'vllm': raise ModuleNotFoundError(name)\n"
        "import importlib.util as u\n_old = u.find_spec\n"
        "u.find_spec = lambda name, package=None: None if name == 'vllm' else _old(name, package)\n"
        "sys.meta_path.insert(0, Hide())\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "hapo_async", "train", QUICKSTART, "generator.engine=vllm"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert "vllm is not installed" in result.stderr and "hapo_async[" in result.stderr
