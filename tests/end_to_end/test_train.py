"""The whole loop, run as a user runs it: real Ray, engines, verifiers, ZeRO-3, files."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hapo_async import metrics, toy
from hapo_async.types import Version
from tests.end_to_end.helpers import hapo, hapo_here, json_lines, rollouts, succeeded

SMALL = [
    "configs/quickstart.yaml",
    "train.batch_prompts=8",
    "sampling.max_tokens=48",
    "eval.limit=16",
    "eval.every=0",
    "rollouts.sample=1.0",
    "data.demonstrations=512",
]


pytestmark = pytest.mark.usefixtures("ray_session")


def train(run_dir: Path, *overrides: str, config: str = "") -> None:
    arguments = [config] if config else SMALL
    assert hapo_here("train", *arguments, f"run.dir={run_dir}", *overrides) == 0


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[Path, str]:
    """Six asynchronous steps of HAPO on the transformers engine, with a checkpoint at each step, in a process of its own
    that starts and ends its own Ray."""
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    options = ("train.steps=6", "max_staleness=1", "train.checkpoint_every=1", "train.keep_checkpoints=20")
    return run_dir, succeeded(hapo("train", *SMALL, f"run.dir={run_dir}", *options))


def test_a_run_prints_where_its_results_are_and_they_are_there(plain):
    run_dir, printed = plain
    for name in ("report.html", "tensorboard", "model"):
        assert str(run_dir / name) in printed
        assert (run_dir / name).exists()
    assert "held-out accuracy" in printed


@pytest.mark.parametrize("setting", ["algorithm=grpo", f"model={toy.MODEL_DIR}", "data.train=builtin:chain/eval"])
def test_a_run_of_something_else_is_not_continued(plain, setting, monkeypatch, capsys):
    from hapo_async.driver import run as runs

    monkeypatch.setattr(runs.placement, "join", lambda actors: pytest.fail("Ray was about to be started"))
    for steps in (6, 9):  # a run that is complete, and one that would go on
        overrides = (f"train.steps={steps}", "max_staleness=1", setting)
        assert hapo_here("train", *SMALL, f"run.dir={plain[0]}", *overrides) == 2
        errors = capsys.readouterr().err
        key, value = setting.split("=")
        assert key in errors and value in errors and "run.resume=never" in errors


def test_a_complete_run_says_that_nothing_was_trained(plain, capsys):
    assert hapo_here("train", *SMALL, f"run.dir={plain[0]}", "train.steps=6", "max_staleness=1") == 0
    assert "nothing was trained" in capsys.readouterr().out


def test_metrics_hold_one_row_per_step_with_declared_names(plain):
    rows = json_lines(plain[0] / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(7))
    for row in rows:
        for name in set(row) - {"step", "time", "bottleneck", "advice"}:
            assert metrics.find(name), name
    last = rows[-1]
    for name in (
        "reward/mean",
        "gate/open_frac",
        "gate/injected",
        "gate/confidence",
        "staleness/max",
        "throughput/generate_tokens_per_s",
        "throughput/learn_tokens_per_s",
        "time/step_s",
        "time/learn_s",
        "weights/version",
        "policy/entropy",
        "policy/clip_frac",
        "eval/chain-eval/pass@1",
        "eval/chain-eval/pass@1/se",
    ):
        assert isinstance(last.get(name), float), name
    assert last["bottleneck"] in ("generator", "verifier", "learner", "sync", "staleness") and last["advice"]


def test_every_question_of_every_evaluation_is_kept_and_shown(plain, capsys):
    rows = json_lines(plain[0] / "evals" / "chain-eval.jsonl")
    assert [sum(r["step"] == step for r in rows) for step in (0, 6)] == [16, 16]
    measured = {
        r["step"]: r["eval/chain-eval/pass@1"] for r in json_lines(plain[0] / "metrics.jsonl") if r["step"] in (0, 6)
    }
    for step, accuracy in measured.items():
        assert np.mean([r["correct"][0] for r in rows if r["step"] == step]) == pytest.approx(accuracy)
    assert "Question by question" in (plain[0] / "report.html").read_text()
    assert hapo_here("compare", str(plain[0]), str(plain[0]), "--json") == 0
    compared = json.loads(capsys.readouterr().out)
    assert compared["metrics"]["reward/mean"]["steps"] == list(range(1, 7))
    assert compared["exclusive_solves"]["chain-eval"]["step"] == 6


def test_terminal_and_status_count_from_the_same_moment(plain):
    status = json.loads((plain[0] / "status.json").read_text())
    last = json_lines(plain[0] / "metrics.jsonl")[-1]
    printed = re.search(r"6 steps in (\d+) s", plain[1])
    assert printed and int(printed[1]) == pytest.approx(status["seconds"], abs=0.51)
    assert 0 < last["time/run_s"] <= status["seconds"]


def test_tensorboard_holds_the_same_numbers(plain):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(plain[0] / "tensorboard")).Reload()
    rows = json_lines(plain[0] / "metrics.jsonl")
    events = board.Scalars("reward/mean")
    assert [e.step for e in events] == list(range(1, 7))
    assert np.allclose([e.value for e in events], [r["reward/mean"] for r in rows[1:]], rtol=1e-5)


def test_no_group_was_trained_beyond_the_bound_and_ledgers_balance(plain):
    rows = rollouts(plain[0])
    assert len(rows) == 6 * 8
    assert {r["staleness"] for r in rows} <= {0, 1}
    assert len({tuple(r["key"][:2]) for r in rows}) == len(rows), "a prompt was trained twice"
    last = json_lines(plain[0] / "metrics.jsonl")[-1]
    places = ("trained", "dropped", "in_flight", "buffered", "to_retry")
    assert last["ledger/issued"] == sum(last[f"ledger/{p}"] for p in places)
    assert last["ledger/trained"] == 48


def test_rollouts_show_what_was_injected_and_what_it_replaced(plain):
    for row in rollouts(plain[0]):
        injected = [a for a in row["answers"] if a["injected"]]
        replaced = [a for a in row["answers"] if a.get("replaced")]
        assert len(injected) == len(replaced) == (1 if row["gate"]["replaced"] is not None else 0)
        if injected:
            assert injected[0]["reward"] == 1.0 and replaced[0]["reward"] == 0.0
            assert "logp_behave" not in injected[0], "a teacher's token has no behaviour log-prob"


def test_the_model_loads_with_transformers_alone_and_differs_from_the_start(plain):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(plain[0] / "model")
    start = AutoModelForCausalLM.from_pretrained(toy.MODEL_DIR)
    AutoTokenizer.from_pretrained(plain[0] / "model")
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)


def test_recorded_log_probs_are_those_of_the_version_that_sampled(plain):
    worst, checked = check_behaviour(plain[0], "recompute")
    assert checked > 1000
    assert worst < 1e-4


def test_status_reads_the_run(plain):
    state = json.loads(succeeded(hapo("status", str(plain[0]), "--json")))
    assert (state["state"], state["step"]) == ("done", 6)
    assert state["ledger"]["trained"] == 48
    assert "done" in succeeded(hapo("status", str(plain[0])))


def test_the_same_command_on_a_finished_run_changes_nothing(plain):
    before = (plain[0] / "metrics.jsonl").read_text()
    train(plain[0], "train.steps=6", "max_staleness=1")
    assert (plain[0] / "metrics.jsonl").read_text() == before


def test_a_finished_run_can_be_taken_further(plain, tmp_path):
    import shutil

    run_dir = tmp_path / "copy"
    shutil.copytree(plain[0], run_dir)
    train(run_dir, "train.steps=8", "max_staleness=1")
    rows = json_lines(run_dir / "metrics.jsonl")
    assert [r["step"] for r in rows] == list(range(9))
    assert rows[-1]["ledger/trained"] == 64
    spans = [s for r in rollouts(run_dir) if r["step"] > 6 for a in r["answers"] for s in a.get("spans", [])]
    versions = {Version.parse(s[0]) for s in spans}
    told = json.loads((run_dir / "status.json").read_text())
    assert told["version"] == "2.8", "a restart must count as a new incarnation"
    waited = [v for v in versions if v.incarnation == 1]
    assert versions and all(5 <= v.step <= 6 for v in waited), "of the one before, what waited in the checkpoint"


def test_the_trained_model_evaluates_without_further_settings(plain, capsys):
    """The default answer length is longer than this model's context: it is fitted, not refused."""
    capsys.readouterr()
    assert hapo_here("eval", str(plain[0] / "model"), "--data", "builtin:chain/eval", "--json", "eval.limit=8") == 0
    assert json.loads(capsys.readouterr().out)["eval/chain-eval/prompts"] == 8


def test_a_run_is_not_continued_on_other_data(plain, capsys):
    before = (plain[0] / "config.yaml").read_text()
    code = hapo_here("train", *SMALL, f"run.dir={plain[0]}", "train.steps=9", "data.limit=100")
    assert code == 2 and "data" in capsys.readouterr().err
    assert (plain[0] / "config.yaml").read_text() == before


def test_a_synchronous_run_from_its_own_config_gives_the_same_weights(tmp_path):
    from safetensors.torch import load_file

    options = ("train.steps=3", "max_staleness=0", "data.eval=[]")
    train(tmp_path / "a", *options)
    train(tmp_path / "b", config=str(tmp_path / "a" / "config.yaml"))
    a, b = (load_file(tmp_path / x / "model" / "model.safetensors") for x in "ab")
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name
    rows = rollouts(tmp_path / "a")
    assert {r["staleness"] for r in rows} == {0}
    train(tmp_path / "c", *options, "generator.placement=colocated", "generator.count=2")
    c = load_file(tmp_path / "c" / "model" / "model.safetensors")
    assert all(torch.allclose(a[name], c[name], rtol=1e-5, atol=1e-7) for name in a)
    assert len({r["generator"] for r in rollouts(tmp_path / "c")}) == 2


def test_a_forced_lag_is_the_age_of_every_sampled_token(tmp_path):
    train(tmp_path, "train.steps=5", "max_staleness=2", "staleness.force_lag=2", "data.eval=[]", "generator.count=2")
    for row in rollouts(tmp_path):
        versions = {s[0] for a in row["answers"] if not a["injected"] for s in a["spans"]}
        assert versions == {f"1.{max(0, row['step'] - 2)}"}, (row["step"], versions)
    rows = json_lines(tmp_path / "metrics.jsonl")
    assert [r["staleness/max"] for r in rows] == [0, 1, 2, 2, 2] and rows[-1]["staleness/2/frac"] == 1.0


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "sft", "luffy", "hpt", "apo", "hapo_apo"])
def test_every_algorithm_trains(algorithm, tmp_path):
    train(
        tmp_path / "run",
        f"algorithm={algorithm}",
        "train.steps=2",
        "data.eval=[]",
        "verifier.name=tests.rewards:even",
        "sampling.temperature=2.0",
    )
    rows = json_lines(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in rows] == [1, 2]
    assert all(np.isfinite(r["loss/value"]) and r["policy/grad_norm"] > 0 for r in rows)


def test_two_vllm_generators_and_two_learner_ranks(tmp_path):
    """In-flight updates: nothing is dropped, answers cross versions, log-probs are those of each token's version."""
    run_dir = tmp_path / "run"
    train(
        run_dir,
        "generator.engine=vllm",
        "generator.count=2",
        "learner.ranks=2",
        "train.steps=22",
        "max_staleness=2",
        "train.checkpoint_every=1",
        "train.keep_checkpoints=30",
        "eval.limit=8",
        "eval.every=10",
    )
    metric_rows = json_lines(run_dir / "metrics.jsonl")
    beside = {r["step"]: r for r in metric_rows if "eval/chain-eval/pass@1" in r}
    assert [beside[step]["eval/chain-eval/version"] for step in (10, 22)] == [10, 22]
    assert "time/step_s" not in beside[10] and "time/step_s" in beside[22]
    last = metric_rows[-1]
    assert last["ledger/dropped"] == 0 and last["ledger/trained"] == 22 * 8
    rows = rollouts(run_dir)
    assert len({r["generator"] for r in rows}) == 2
    assert max(r["staleness"] for r in rows) <= 2
    spans = [a["spans"] for r in rows for a in r["answers"] if not a["injected"]]
    crossing = [s for s in spans if len(s) >= 2]
    assert crossing, "no answer crossed an update"
    for answer in spans:
        steps = [int(s[0].split(".")[1]) for s in answer]
        assert steps == sorted(steps)
    worst, checked = check_behaviour(run_dir, "recompute")
    assert checked > 1000 and worst < 1e-4


def check_behaviour(run_dir: Path, kv_cache: str) -> tuple[float, int]:
    """(largest difference, tokens compared) between recorded behaviour log-probs and a transformers forward with the
    weights of each token's version; versions whose checkpoint is not there (the first one is the model itself) are
    skipped."""
    from transformers import AutoModelForCausalLM

    models = {"1.0": AutoModelForCausalLM.from_pretrained(toy.MODEL_DIR)}
    for path in (run_dir / "checkpoints").glob("step-*"):
        models[f"1.{path.name.removeprefix('step-')}"] = AutoModelForCausalLM.from_pretrained(path / "model")
    worst, checked = 0.0, 0
    for row in rollouts(run_dir):
        for answer in row["answers"]:
            if answer["injected"]:
                continue
            ids = torch.tensor([row["prompt_tokens"] + answer["tokens"]])
            recorded = torch.tensor(answer["logp_behave"])
            start = len(row["prompt_tokens"])
            for version, a, b in answer["spans"][: None if kv_cache == "recompute" else 1]:
                if version not in models or a == b:
                    continue
                with torch.no_grad():
                    logits = models[version](ids).logits[0].float() / row["temperature"]
                logp = logits.log_softmax(-1)[start - 1 + a : start - 1 + b]
                picked = logp.gather(1, ids[0, start + a : start + b, None])[:, 0]
                worst = max(worst, (picked - recorded[a:b]).abs().max().item())
                checked += b - a
    return worst, checked
