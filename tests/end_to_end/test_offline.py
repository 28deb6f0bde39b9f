"""Offline algorithms, run as a user runs them: answers sampled once, then trained on by the one loop."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from hapo_async import toy
from hapo_async.answers import AnswerCache
from hapo_async.config import load
from hapo_async.driver.setup import prepare
from hapo_async.recipe import Recipe
from hapo_async.types import GroupKey
from tests.end_to_end.helpers import hapo_here, json_lines, rollouts

# At this temperature about a quarter of the built-in prompts have right and wrong answers.
SMALL = [
    "configs/fpa_offline.yaml",
    "data.limit=48",
    "data.eval=[]",
    "sampling.max_tokens=48",
    "eval.every=0",
    "options={holdout: 0.2}",
    "train.batch_prompts=4",
    "train.steps=3",
    "learner.warmup_steps=0",
    "rollouts.sample=1.0",
    "max_staleness=0",
]

pytestmark = pytest.mark.usefixtures("ray_session")


def offline(run_dir: Path, answers: Path, *overrides: str, command: str = "train") -> int:
    return hapo_here(command, *SMALL, f"data.answers={answers}", f"run.dir={run_dir}", *overrides)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run_dir / "model" / "model.safetensors")


def uids(path: Path) -> list[str]:
    return [row["uid"] for row in json_lines(path)]


@pytest.fixture(scope="module")
def off_rl(tmp_path_factory) -> Path:
    """Answers, sampled into ``answers`` beside it, and three steps of Off-RL."""
    run_dir = tmp_path_factory.mktemp("offline") / "off_rl"
    assert offline(run_dir, run_dir.parent / "answers", "algorithm=off_rl") == 0
    return run_dir


@pytest.fixture(scope="module")
def answers(off_rl) -> Path:
    """A complete cache."""
    return off_rl.parent / "answers"


def test_every_prompt_is_answered_and_judged_once(answers):
    rows = json_lines(answers / "answers.jsonl")
    assert len({r["uid"] for r in rows}) == len(rows) == 48
    assert all(len(r["answers"]) == 8 for r in rows)
    verdicts = {a["verdict"] for r in rows for a in r["answers"]}
    assert {"correct", "wrong"} <= verdicts
    assert all(len(a["tokens"]) == len(a["logp_behave"]) <= 48 for r in rows for a in r["answers"])


def test_a_complete_cache_is_used_as_it_is(answers, capsys, monkeypatch):
    from actors import placement

    monkeypatch.setattr(placement, "join", lambda actors: pytest.fail("something was about to be sampled"))
    before = (answers / "answers.jsonl").stat().st_mtime_ns
    assert offline(answers.parent / "again", answers, "--generate-only", command="offline") == 0
    assert "complete already" in capsys.readouterr().out
    assert (answers / "answers.jsonl").stat().st_mtime_ns == before
    assert not (answers.parent / "again").exists()


def test_a_dry_run_looks_into_the_answers(answers, tmp_path, capsys):
    assert offline(tmp_path / "run", answers, "--dry-run") == 0
    assert f"answers: {answers}: complete; " in capsys.readouterr().out
    assert offline(tmp_path / "run", tmp_path / "new", "--dry-run") == 0
    assert "0 of 48 prompts there; the others are sampled first" in capsys.readouterr().out
    assert offline(tmp_path / "run", answers, "sampling.n=4", "--dry-run") == 2
    assert "do not fit this run" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_generation_that_was_killed_goes_on_where_it_was(answers, tmp_path, capsys):
    cut = tmp_path / "answers"
    shutil.copytree(answers, cut)
    (cut / "MANIFEST.json").unlink()
    (cut / "reference.safetensors").unlink(missing_ok=True)
    whole = (cut / "answers.jsonl").read_bytes()
    (cut / "answers.jsonl").write_bytes(whole[: len(whole) * 2 // 3])
    kept = (cut / "answers.jsonl").read_bytes().rpartition(b"\n")[0]
    assert offline(tmp_path / "run", cut, "--generate-only", command="offline") == 0
    assert (cut / "answers.jsonl").read_bytes().startswith(kept + b"\n")
    (status,) = json_lines(tmp_path / "run" / "status.json")
    assert status["state"] == "done" and status["answers"] == {"folder": str(cut), "done": 48, "of": 48}
    assert hapo_here("status", str(tmp_path / "run")) == 0
    assert "done: answers to 48 of 48 prompts" in capsys.readouterr().out

    def tokens(folder: Path) -> dict:
        return {r["uid"]: [a["tokens"] for a in r["answers"]] for r in json_lines(folder / "answers.jsonl")}

    assert len(uids(cut / "answers.jsonl")) == 48
    assert tokens(cut) == tokens(answers), "an answer's noise is its own: a continued cache is the same cache"


def test_mixed_prompts_train_and_the_others_are_counted(off_rl, answers):
    solved = {r["uid"]: sum(a["reward"] == 1 for a in r["answers"]) for r in json_lines(answers / "answers.jsonl")}
    mixed = {uid for uid, right in solved.items() if 0 < right < 8}
    rows = json_lines(off_rl / "metrics.jsonl")
    counts = {k.removeprefix("offline/prompts/"): v for k, v in rows[0].items() if k.startswith("offline/prompts/")}
    assert counts["train"] + counts["held_out"] == len(mixed) and counts["held_out"] >= 1
    assert sum(counts.values()) == 48 and counts["all_wrong"] == sum(right == 0 for right in solved.values())
    trained = {r["key"][1] for r in rollouts(off_rl)}
    assert trained <= mixed and len(trained) <= counts["train"]
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[-1]["ledger/trained"] == 12 and rows[-1]["ledger/dropped"] == 0


def test_cached_answers_have_no_age_and_no_generator_samples_while_training(off_rl):
    rows = json_lines(off_rl / "metrics.jsonl")[1:]
    for row in rows:
        assert not [name for name in row if name in ("staleness/max", "staleness/mean") or name.startswith("gate/")]
        assert row["throughput/generate_tokens_per_s"] == 0.0
        assert np.isfinite(row["loss/value"]) and row["policy/grad_norm"] > 0
    groups = rollouts(off_rl)
    assert {r["staleness"] for r in groups} == {0} and {r["temperature"] for r in groups} == {1.0}
    spans = {s[0] for r in groups for a in r["answers"] for s in a["spans"]}
    assert spans == {"0.-1"}


def test_the_held_out_loss_is_measured_before_and_after(off_rl):
    rows = json_lines(off_rl / "metrics.jsonl")
    losses = {r["step"]: r["offline/holdout_loss"] for r in rows if "offline/holdout_loss" in r}
    assert set(losses) == {0, 3} and all(np.isfinite(x) for x in losses.values()) and losses[0] != losses[3]


def test_fpa_without_extrapolation_is_off_rl_step_by_step_even_when_it_was_resumed(off_rl, answers, tmp_path):
    run_dir = tmp_path / "fpa"
    options = ("algorithm=fpa", "options={holdout: 0.2, lam: 0}")
    assert offline(run_dir, answers, *options, "train.steps=2") == 0
    assert offline(run_dir, answers, *options, command="offline") == 0
    a, b = (json_lines(x / "metrics.jsonl")[1:] for x in (off_rl, run_dir))
    assert [r["step"] for r in a] == [r["step"] for r in b] == [1, 2, 3]
    for name in ("loss/value", "policy/grad_norm"):
        assert np.allclose([r[name] for r in a], [r[name] for r in b], rtol=1e-6, atol=1e-9), name
    one, other, start = weights(off_rl), weights(run_dir), weights_of_the_start()
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 1e-6
    assert max((one[k] - start[k]).abs().max().item() for k in one) > 1e-4


def weights_of_the_start() -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(Path(toy.MODEL_DIR) / "model.safetensors")


def test_fpa_weighs_by_the_extrapolated_policy_and_ends_early_where_the_held_out_loss_does_not_improve(
    answers, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    options = ("options={holdout: 0.2, lam: 2, patience: 2}", "eval.every=1", "learner.lr=0.05", "train.steps=12")
    assert offline(run_dir, answers, *options, command="offline") == 0
    assert "stopped early: the held-out loss has not improved for 2 evaluations" in capsys.readouterr().out
    before = (run_dir / "metrics.jsonl").read_text()
    rows = json_lines(run_dir / "metrics.jsonl")
    last, losses = rows[-1]["step"], [r["offline/holdout_loss"] for r in rows]
    assert 2 <= last < 12 and min(losses) == losses[-3]
    ratios = [r["offline/future_ratio/correct"] for r in rows[1:]]
    assert ratios[0] == pytest.approx(1.0, abs=1e-4), "before the first step the policy is its own reference"
    assert abs(ratios[1] - 1) > 1e-3
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert (run_dir / "model" / "model.safetensors").exists()
    assert offline(run_dir, answers, *options) == 0, "the same command finds it finished"
    assert "stopped early" in capsys.readouterr().out
    assert (run_dir / "metrics.jsonl").read_text() == before


def test_dpo_scores_the_answers_once_and_resumes_only_with_those_scores(answers, tmp_path, capsys):
    run_dir, own = tmp_path / "run", tmp_path / "answers"
    shutil.copytree(answers, own)
    assert offline(run_dir, own, "algorithm=dpo") == 0
    rows = json_lines(run_dir / "metrics.jsonl")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert rows[1]["loss/value"] == pytest.approx(np.log(2), abs=1e-4), "policy and reference are one"
    assert abs(rows[2]["loss/value"] - rows[1]["loss/value"]) > 1e-3
    check_reference(own)
    (own / "reference.safetensors").unlink()
    assert offline(run_dir, own, "algorithm=dpo", "train.steps=4") == 2
    assert "reference's log-probs" in capsys.readouterr().err
    (own / "MANIFEST.json").unlink()
    assert offline(run_dir, own, "algorithm=dpo", "train.steps=4") == 2
    assert "complete answers" in capsys.readouterr().err


def check_reference(folder: Path) -> None:
    """The kept log-probs are those of the shipped model at temperature 1."""
    from transformers import AutoModelForCausalLM

    cache = AnswerCache.open(folder, Recipe(**json.loads((folder / "about.json").read_text())))
    prompts = {p.uid: p for p in prepare(load(SMALL[0], SMALL[1:])).prompts}
    model = AutoModelForCausalLM.from_pretrained(toy.MODEL_DIR)
    uid = cache.mixed()[0]
    group = cache.read(prompts[uid], GroupKey(0, uid, 0))
    for answer, kept in zip(group.answers, cache.reference(uid), strict=True):
        ids = torch.tensor([[*group.prompt_tokens.tolist(), *answer.tokens.tolist()]])
        with torch.no_grad():
            logp = model(ids).logits[0, len(group.prompt_tokens) - 1 : -1].log_softmax(-1)
        own = logp.gather(1, torch.from_numpy(answer.tokens.astype(np.int64))[:, None])[:, 0].numpy()
        assert np.abs(own - kept).max() < 1e-4


# ---------------------------------------------------------------- refusals, before anything starts


@pytest.fixture
def nothing_starts(monkeypatch):
    from actors import placement

    monkeypatch.setattr(placement, "join", lambda actors: pytest.fail("Ray was about to be started"))


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampling.n=4", ["sampling.n: 8 there, 4 here"]),
        ("sampling.temperature=0.7", ["sampling.temperature"]),
        ("data.limit=47", ["data.limit"]),
        ("data.suffix= Think.", ["data.suffix"]),
        ("options={patience: 2}", ["options.patience=2", "eval.every"]),
    ],
)
def test_answers_that_do_not_fit_are_refused(override, words, answers, tmp_path, capsys):
    assert offline(tmp_path / "run", answers, override) == 2
    errors = capsys.readouterr().err
    for word in words:
        assert word in errors


@pytest.mark.usefixtures("nothing_starts")
def test_answers_of_other_weights_are_refused(answers, tmp_path, capsys):
    other = tmp_path / "model"
    shutil.copytree(toy.MODEL_DIR, other)
    file = other / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    assert offline(tmp_path / "run", answers, f"model={other}") == 2
    assert "model:" in capsys.readouterr().err


@pytest.mark.usefixtures("nothing_starts")
def test_answers_that_teach_nothing_are_refused(answers, tmp_path, capsys):
    poor = tmp_path / "answers"
    shutil.copytree(answers, poor)
    (poor / "MANIFEST.json").unlink()
    text = (poor / "answers.jsonl").read_text().replace('"correct", "reward": 1.0', '"wrong", "reward": 0.0')
    (poor / "answers.jsonl").write_text(text)
    seal(poor)
    assert offline(tmp_path / "run", poor, "algorithm=dpo") == 2
    assert "nothing to train on" in capsys.readouterr().err


def seal(folder: Path) -> None:
    cache = AnswerCache.open(folder, Recipe(**json.loads((folder / "about.json").read_text())))
    cache.begin()
    cache.seal()


@pytest.mark.usefixtures("nothing_starts")
def test_offline_names_the_algorithms_that_it_runs(answers, tmp_path, capsys):
    code = offline(tmp_path / "run", answers, "algorithm=grpo", "options={}", command="offline")
    errors = capsys.readouterr().err
    assert code == 2
    for name in ("'grpo'", "fpa", "dpo", "off_rl", "a_star_po", "rft"):
        assert name in errors
