"""The built-in task and the model that is shipped with it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hapo_async import toy

TOOLS = Path(__file__).parents[1] / "tools"
STEP = re.compile(r"([a-f])(\d\d)([+\-*])(\d)=(\d\d);")


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(toy.MODEL_DIR)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield AutoModelForCausalLM.from_pretrained(toy.MODEL_DIR).eval()
    torch.set_num_threads(before)


def test_the_same_seed_gives_the_same_rows_and_another_seed_fresh_ones():
    assert toy.rows("train", 300, seed=3) == toy.rows("train", 300, seed=3)
    assert toy.rows("train", 300, seed=3)[:100] == toy.rows("train", 100, seed=3)
    first, second = ({row["prompt"] for row in toy.rows("eval", 200, seed)} for seed in (0, 7))
    assert len(first) == len(second) == 200
    assert len(first & second) <= 2


def test_no_prompt_is_in_both_splits_whatever_the_seeds():
    train = {row["prompt"] for seed in range(4) for row in toy.rows("train", 1024, seed)}
    held_out = {row["prompt"] for seed in range(4) for row in toy.rows("eval", 200, seed)}
    assert len(train) > 4000 and len(held_out) > 780
    assert not train & held_out
    assert {toy.split_of(p) for p in train} == {"train"} and {toy.split_of(p) for p in held_out} == {"eval"}


def test_builtin_rows_have_the_documented_sizes_and_mixture():
    train, held_out = toy.builtin_rows("train"), toy.builtin_rows("eval")
    assert (len(train), len(held_out)) == (1024, 200)
    for rows in (train, held_out):
        easy = sum(row["k"] in toy.EASY_STEPS for row in rows) / len(rows)
        assert 0.18 < easy < 0.32
        assert {row["k"] for row in rows} == {2, 3, 4, 5, 6}


def test_solutions_follow_from_their_prompts():
    for row in toy.rows("train", 500, seed=11):
        value, *steps = re.findall(r"^\d\d|[a-f][+\-*]\d", row["prompt"])
        written = STEP.findall(row["solution"])
        assert len(steps) == len(written) == row["k"]
        for asked, (tag, before, op, d, after) in zip(steps, written, strict=True):
            assert asked == tag + op + d and before == value
            result = {"+": int(before) + int(d), "-": int(before) - int(d), "*": int(before) * int(d)}[op] % 100
            assert after == f"{result:02d}"
            value = after
        assert row["answer"] == value
        assert row["solution"].endswith(f";\\boxed{{{value}}}")


def test_boxing_an_intermediate_value_never_earns_the_reward_by_coincidence():
    for row in toy.rows("train", 1024, seed=0):
        before = [value for _, value, _, _, _ in STEP.findall(row["solution"])]
        assert len(before) == row["k"] and row["answer"] not in before


def test_an_unknown_split_and_a_negative_count_are_refused():
    with pytest.raises(ValueError, match="split='test' does not exist"):
        toy.rows("test", 3, seed=0)
    with pytest.raises(ValueError, match="n=-1"):
        toy.rows("train", -1, seed=0)
    with pytest.raises(ValueError, match="split='dev'"):
        toy.builtin_rows("dev")


def test_the_command_prints_rows_as_json_lines(capsys):
    assert toy.main(["--split", "eval", "--n", "5", "--seed", "7"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == toy.rows("eval", 5, seed=7)


def test_the_command_runs_as_a_module():
    out = subprocess.run(
        [sys.executable, "-m", "hapo_async.toy", "--n", "2"], capture_output=True, text=True, check=True, timeout=60
    )
    assert [json.loads(line)["k"] for line in out.stdout.splitlines()] == [r["k"] for r in toy.rows("eval", 2, seed=0)]


def test_every_token_id_is_decodable_and_comes_back(tokenizer, model):
    assert len(tokenizer) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    texts = [tokenizer.decode([i]) for i in range(len(tokenizer))]
    assert len(set(texts)) == len(texts) and all(texts)
    for i, text in enumerate(texts):
        assert tokenizer.encode(text) == [i], text


def test_solutions_round_trip_with_one_token_per_character(tokenizer):
    for row in toy.rows("train", 50, seed=5):
        ids = [*tokenizer.encode(row["solution"]), tokenizer.eos_token_id]
        assert len(ids) == 9 * row["k"] + 5
        assert tokenizer.decode(ids, skip_special_tokens=True) == row["solution"]
        assert tokenizer.decode(tokenizer.encode(row["prompt"])) == row["prompt"]
        assert len(tokenizer.encode(row["prompt"])) == len(row["prompt"])


def test_special_tokens_are_where_engines_look_for_them(tokenizer, model):
    assert tokenizer.eos_token_id != tokenizer.pad_token_id
    assert tokenizer.chat_template is None
    for settings in (model.config, model.generation_config):
        assert settings.eos_token_id == tokenizer.eos_token_id
        assert settings.pad_token_id == tokenizer.pad_token_id


def test_the_model_is_small_float32_and_has_heads_that_vllm_accepts(model):
    config = model.config
    assert config.model_type == "qwen2" and config.tie_word_embeddings
    assert config.hidden_size // config.num_attention_heads == 32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 80_000 < sum(p.numel() for p in model.parameters()) < 110_000
    assert sum(f.stat().st_size for f in toy.MODEL_DIR.iterdir()) < 500_000


def test_generate_solves_an_easy_prompt_and_ends(tokenizer, model):
    row = next(row for row in toy.rows("eval", 20, seed=2) if row["k"] == 3)
    inputs = tokenizer(row["prompt"], return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=64, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert out[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(out, skip_special_tokens=True) == row["solution"]


def test_the_shipped_model_is_calibrated(tokenizer, model, monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    import make_chain_model

    calibration = make_chain_model.measure(model, tokenizer, n=160, seed=3)
    make_chain_model.check(calibration)
    assert calibration.greedy <= 0.35  # what the quickstart starts from
