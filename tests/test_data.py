"""Files become prompts with checked teachers, or a clear error; their order is seeded and can be resumed."""

import json
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from hapo_async import config as configs
from hapo_async import data
from hapo_async.data.prompts import encode_prompt, encode_teachers
from hapo_async.errors import ConfigError, DataError
from hapo_async.types import Prompt

GSM8K = [
    {
        "question": "48 clips and half as many?",
        "answer": "48/2 = <<48/2=24>>24 clips.\n48+24 = <<48+24=72>>72\n#### 72",
    },
    {"question": "A thousand and eighty?", "answer": "It is 1,080.\n#### 1,080"},
    {"question": "And a wrong one?", "answer": "2 + 2 = 5\n#### 5"},
]
LUFFY = [
    {
        "data_source": "openr1",
        "prompt": [{"role": "system", "content": "Think."}, {"role": "user", "content": f"{n} + {n}?"}],
        "target": [{"role": "assistant", "content": f"{n} + {n} = {n + n}, so \\boxed{{{n + n}}}"}],
        "ability": "math",
        "reward_model": {"ground_truth": str(n + n), "style": "rule"},
        "extra_info": {"index": n, "split": "default"},
    }
    for n in range(5)
]
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(chain_model):
    return data.load_tokenizer(chain_model)


def settings(**tree) -> configs.Config:
    return configs.parse({"sampling": {"max_tokens": 300}, **tree})


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def parquet(path, rows):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return str(path)


# --------------------------------------------------------------------------------------------------------------------
# Sources


def test_rows_are_the_same_from_every_file_type(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(GSM8K))
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": GSM8K}))
    sources = [
        lines(tmp_path / "a.jsonl", GSM8K),
        str(tmp_path / "a.json"),
        str(tmp_path / "wrapped.json"),
        parquet(tmp_path / "a.parquet", GSM8K),
    ]
    assert [data.load_rows(s) for s in sources] == [(GSM8K, n) for n in ("a", "a", "wrapped", "a")]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("broken.jsonl", '{"a": 1}\n\n{"a": \n', "line 3 is not JSON"),
        ("list.jsonl", "[1, 2]\n", "line 1 holds a list"),
        ("broken.json", "[{]", "is not JSON"),
        ("number.json", "3", "holds a int"),
        ("numbers.json", "[3]", "row 1 holds a int"),
        ("empty.jsonl", "", "holds no rows"),
        ("empty.json", "", "holds no rows"),
        ("none.json", "[]", "holds no rows"),
        ("table.csv", "a,b", "type '.csv', which is not supported"),
        ("bare", "a,b", "not supported"),
        ("broken.parquet", "PAR0", "not a parquet file"),
    ],
)
def test_a_bad_file_is_a_data_error_that_says_why(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        data.load_rows(str(tmp_path / name))


def test_text_that_is_not_utf8_is_a_data_error(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="not UTF-8"):
        data.load_rows(str(tmp_path / "latin.jsonl"))


def test_a_missing_file_is_a_data_error_with_the_nearest_name(tmp_path):
    lines(tmp_path / "train.jsonl", GSM8K)
    with pytest.raises(DataError, match=r"does not exist; did you mean '.*train.jsonl'"):
        data.load_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(DataError, match="nor does the folder"):
        data.load_rows(str(tmp_path / "nowhere" / "train.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        data.load_rows(str(tmp_path))


def test_a_hub_name_without_network_fails_soon(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"no file 'nobody/nothing'.*HF_HUB_OFFLINE"):
        data.load_rows("nobody/nothing")
    with pytest.raises(ConfigError, match=r"no folder 'nobody/nothing'.*HF_HUB_OFFLINE"):
        data.resolve_model("nobody/nothing")
    assert time.monotonic() - start < 60


def test_the_builtin_task_loads(tokenizer):
    rows, name = data.load_rows("builtin:chain/eval")
    assert len(rows) == 200 and name == "chain-eval"
    with pytest.raises(DataError, match=r"builtin:chain/train and builtin:chain/eval"):
        data.load_rows("builtin:chain/test")


# --------------------------------------------------------------------------------------------------------------------
# Columns


@pytest.mark.parametrize(
    ("row", "convention", "prompt", "truth", "teachers"),
    [
        (LUFFY[2], "LUFFY", "2 + 2?", "4", ["2 + 2 = 4, so \\boxed{4}"]),
        ({k: v for k, v in LUFFY[2].items() if k != "target"}, "verl", "2 + 2?", "4", []),
        (GSM8K[0], "GSM8K", GSM8K[0]["question"], "72", ["48/2 = 24 clips.\n48+24 = 72\n#### 72"]),
        ({"problem": "p", "solution": r"so \boxed{3}", "answer": "3"}, "MATH", "p", "3", [r"so \boxed{3}"]),
        ({"problem": "p", "solution": r"so \boxed{3}"}, "MATH", "p", "3", [r"so \boxed{3}"]),
        ({"prompt": "p", "answer": 70}, "TRL", "p", 70, []),
        ({"prompt": "p", "answer": r"\boxed{204}", "id": "x"}, "TRL", "p", r"\boxed{204}", []),
        (
            {"prompt": [{"role": "user", "content": "p"}], "answer": "1", "solution": "one: 1"},
            "TRL",
            "p",
            "1",
            ["one: 1"],
        ),
        ({"question": "p", "answer": "4"}, "question-answer", "p", "4", []),
    ],
)
def test_conventions_are_recognised(row, convention, prompt, truth, teachers):
    mapping = data.recognise([row])
    assert mapping.convention == convention
    assert mapping.prompt_of(row, "row 1")[-1]["content"] == prompt
    assert mapping.truth_of(row) == truth
    assert mapping.teachers_of(row) == teachers
    assert f"prompt = {mapping.prompt}" in mapping.text()


def test_columns_may_be_named_even_inside_others():
    row = {"q": "p", "meta": {"gold": "1"}, "worked": ["one", "eins"], "key": 7}
    mapping = data.recognise([row], {"prompt": "q", "truth": "meta.gold", "teacher": "worked", "uid": "key"})
    assert (mapping.truth_of(row), mapping.teachers_of(row), mapping.uid) == ("1", ["one", "eins"], "key")


def test_named_columns_keep_the_reading_of_hashes():
    row = {"q": "p", "a": "work\n#### 1,080"}
    assert data.recognise([row], {"prompt": "q", "truth": "a", "teacher": "a"}).truth_of(row) == "1,080"


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"prompt": "questoin"}, "Did you mean 'question'"),
        ({"promt": "question"}, "Did you mean 'prompt'"),
        ({"truth": "reward_model.gold"}, "no such column"),
    ],
)
def test_a_wrong_column_is_a_data_error_with_the_nearest(columns, said):
    with pytest.raises(DataError, match=said):
        data.recognise(GSM8K, columns)


def test_unknown_columns_are_listed():
    with pytest.raises(DataError, match=r"no known columns among left, right.*data\.columns\.prompt"):
        data.recognise([{"left": 1, "right": 2}])


def test_a_prompt_of_the_wrong_type_names_its_row(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [{"prompt": "1?", "answer": 1}, {"prompt": 7, "answer": 1}])
    with pytest.raises(DataError, match="row 2: column 'prompt' holds '7'"):
        data.load_prompts(settings(), path, tokenizer, "eval")


# --------------------------------------------------------------------------------------------------------------------
# Prompts


def test_gsm8k_loads_with_its_mapping_and_counts(tmp_path, tokenizer):
    prompts, report = data.load_prompts(settings(), lines(tmp_path / "a.jsonl", GSM8K), tokenizer)
    assert [p.truth for p in prompts] == ["72", "1,080", "5"]
    assert "GSM8K: prompt = question, truth = answer" in report.text()
    assert (report.total, report.used, report.teachers, report.accepted) == (3, 3, 3, 3)
    (teacher,) = prompts[1].teachers
    assert teacher.rejected is None and teacher.text == "It is 1,080.\n#### 1,080"
    assert teacher.tokens[-1] == tokenizer.eos_token_id and teacher.tokens.dtype == np.int32
    assert tokenizer.decode(teacher.tokens[:-1]) == teacher.text


def test_a_verl_parquet_loads(tmp_path, tokenizer):
    prompts, report = data.load_prompts(settings(), parquet(tmp_path / "a.parquet", LUFFY), tokenizer)
    assert report.mapping.convention == "LUFFY" and report.with_teacher == 5
    assert {p.source for p in prompts} == {"openr1"}
    assert [m["role"] for m in prompts[0].messages] == ["system", "user"]
    assert prompts[3].text == "3 + 3?"


def test_evaluation_sets_take_numbers_and_latex_and_no_teachers(tmp_path, tokenizer):
    path = tmp_path / "AIME.json"
    rows = [
        {"prompt": "a?", "answer": 204},
        {"prompt": "b?", "answer": r"\boxed{113}"},
        {"prompt": "c?", "answer": r"\pi"},
    ]
    path.write_text(json.dumps([r | {"solution": "s"} for r in rows]))
    prompts, report = data.load_prompts(settings(), str(path), tokenizer, "eval")
    assert [p.truth for p in prompts] == [204, r"\boxed{113}", r"\pi"] and report.name == "AIME"
    assert not any(p.teachers for p in prompts)


def test_columns_named_for_training_do_not_break_evaluation_sets(tmp_path, tokenizer):
    config = settings(data={"columns": {"prompt": "q", "truth": "a"}})
    path = lines(tmp_path / "eval.jsonl", [{"prompt": "1?", "answer": 1}])
    assert data.load_prompts(config, path, tokenizer, "eval")[0][0].truth == 1


def test_limits_and_lengths_are_counted(tmp_path, tokenizer):
    rows = [{"prompt": "1" * n, "answer": 1} for n in (1, 50, 2, 51, 3)] + [{"prompt": "4", "answer": None}]
    path = lines(tmp_path / "a.jsonl", rows)
    config = settings(data={"max_prompt_tokens": 20}, algorithm="grpo")
    prompts, report = data.load_prompts(config, path, tokenizer)
    assert [len(p.tokens) for p in prompts] == [1, 2, 3]
    assert report.left_out == {"too long": 2, "no truth": 1} and "left out: 1 no truth, 2 too long" in report.text()
    assert len(data.load_prompts(settings(data={"limit": 1}, algorithm="grpo"), path, tokenizer)[0]) == 1
    with pytest.raises(DataError, match=r"left out: 1 too long.*Raise data\.max_prompt_tokens"):
        data.load_prompts(config, lines(tmp_path / "b.jsonl", rows[1:2]), tokenizer)


def test_data_without_truth_is_refused_unless_the_verifier_is_a_plugin(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [{"prompt": "1?"}])
    with pytest.raises(DataError, match=r"data\.columns\.truth"):
        data.load_prompts(settings(), path, tokenizer)
    config = settings(verifier={"name": "os.path:join"}, algorithm="grpo")
    assert data.load_prompts(config, path, tokenizer)[0][0].truth is None


def test_uids_are_stable_and_unique(tmp_path, tokenizer):
    rows = [{"prompt": p, "answer": 1} for p in ("a", "b", "a", "a")]
    config = settings(algorithm="grpo")
    first, report = data.load_prompts(config, lines(tmp_path / "a.jsonl", rows), tokenizer)
    again, _ = data.load_prompts(config, lines(tmp_path / "b.jsonl", rows[1::-1]), tokenizer)
    assert len({p.uid for p in first}) == 4 and report.duplicates == 2
    assert first[2].uid == first[0].uid + "#2"
    assert [p.uid for p in again] == [first[1].uid, first[0].uid]
    with_ids = lines(tmp_path / "c.jsonl", [{"id": n, **row} for n, row in enumerate(rows)])
    assert [p.uid for p in data.load_prompts(config, with_ids, tokenizer)[0]] == ["0", "1", "2", "3"]


def test_system_and_suffix_are_added_once(tmp_path, tokenizer):
    config = settings(data={"system": "Be brief.", "suffix": "Use \\boxed{}."}, algorithm="grpo")
    (prompt,), _ = data.load_prompts(config, lines(tmp_path / "a.jsonl", [{"prompt": "1+1?", "answer": 2}]), tokenizer)
    assert [m["content"] for m in prompt.messages] == ["Be brief.", "1+1?\nUse \\boxed{}."]
    (prompt, *_), _ = data.load_prompts(config, lines(tmp_path / "b.jsonl", LUFFY), tokenizer)
    assert prompt.messages[0]["content"] == "Think."


def test_the_chat_template_is_used_where_there_is_one(chain_model):
    tokenizer = data.load_tokenizer(chain_model)
    messages = [{"role": "user", "content": "1+1?"}]
    plain = encode_prompt(tokenizer, messages)
    assert tokenizer.decode(plain) == "1+1?"
    tokenizer.chat_template = TEMPLATE
    templated = encode_prompt(tokenizer, messages)
    expected = tokenizer("[user]1+1?[assistant]")["input_ids"]
    assert templated.tolist() == expected and templated.dtype == np.int32
    assert encode_prompt(tokenizer, messages, chat_template=False).tolist() == plain.tolist()


# --------------------------------------------------------------------------------------------------------------------
# Teachers


def solved(prompt, solution, answer):
    return {"prompt": prompt, "solution": solution, "answer": answer}


def test_teachers_are_checked_and_counted_by_reason(tmp_path, tokenizer):
    eos = tokenizer.eos_token
    rows = [
        solved("a", r"\boxed{1}", 1),
        solved("b", r"\boxed{1}" + eos, 1),
        solved("c", r"\boxed{2}", 1),
        solved("d", "no idea\nnone", 1),
        solved("e", "1" * 400 + r"\boxed{1}", 1),
        solved("f", "stop" + eos + r"\boxed{1}", 1),
        solved("g", None, 1),
    ]
    seen = []
    prompts, report = data.load_prompts(
        settings(), lines(tmp_path / "a.jsonl", rows), tokenizer, progress=lambda *at: seen.append(at)
    )
    assert [p.teachers[0].rejected if p.teachers else "none" for p in prompts] == [
        None,
        None,
        "wrong",
        "unparseable",
        "too long",
        "end-of-text inside",
        "none",
    ]
    assert (report.teachers, report.accepted, report.with_teacher) == (6, 2, 2)
    assert report.rejected == {"wrong": 1, "unparseable": 1, "too long": 1, "end-of-text inside": 1}
    assert "2 of 6 usable" in report.text() and seen[-1][0] == 4
    for prompt in prompts[:2]:
        assert (prompt.teachers[0].tokens == tokenizer.eos_token_id).nonzero()[0].tolist() == [
            len(prompt.teachers[0].tokens) - 1
        ]


def test_only_the_wanted_number_of_prompts_keeps_a_teacher(tmp_path, tokenizer):
    rows = [solved(f"{n}", rf"\boxed{{{n if n % 2 else -1}}}", n) for n in range(100)]
    path = lines(tmp_path / "a.jsonl", rows)

    def chosen(seed, wanted):
        prompts, report = data.load_prompts(settings(data={"demonstrations": wanted}, seed=seed), path, tokenizer)
        usable = {p.uid for p in prompts if any(t.rejected is None for t in p.teachers)}
        assert report.with_teacher == len(usable) and len(prompts) == 100
        return usable, report

    first, _ = chosen(0, 10)
    assert len(first) == 10 and chosen(0, 10)[0] == first and chosen(1, 10)[0] != first
    assert first < chosen(0, 20)[0], "more demonstrations are a superset"
    everyone, report = chosen(0, 80)
    assert len(everyone) == 50 and "only 50 prompts" in report.text()
    none, report = chosen(0, 0)
    assert not none and report.teachers == 0


def test_algorithms_without_teachers_do_not_load_them(tmp_path, tokenizer):
    prompts, report = data.load_prompts(settings(algorithm="grpo"), lines(tmp_path / "a.jsonl", GSM8K), tokenizer)
    assert not any(p.teachers for p in prompts) and report.teachers == 0


def test_teachers_that_all_exceed_the_context_are_an_error(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [solved(f"{n}", "1" * 50 + r"\boxed{1}", 1) for n in range(3)])
    config = settings(sampling={"max_tokens": 20})
    with pytest.raises(DataError, match=r"all 3 teacher solutions are longer than the context.*sampling.max_tokens=20"):
        data.load_prompts(config, path, tokenizer)
    long = lines(tmp_path / "b.jsonl", [solved("1", "1" * 2000 + r"\boxed{1}", 1)])
    with pytest.raises(DataError, match="longer than the context"):
        data.load_prompts(settings(sampling={"max_tokens": 10_000}), long, tokenizer)


def test_no_usable_teacher_is_a_warning_or_for_sft_an_error(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [solved("1", r"\boxed{2}", 1)])
    report = data.load_prompts(settings(), path, tokenizer)[1]
    assert "will never see a demonstration" in report.text()
    with pytest.raises(DataError, match="sft learns from nothing else"):
        data.load_prompts(settings(algorithm="sft"), path, tokenizer)


def test_several_teachers_of_one_prompt_are_all_kept(tmp_path, tokenizer):
    path = lines(tmp_path / "a.jsonl", [solved("1", [r"\boxed{1}", r"\boxed{2}", r"so \boxed{1}"], 1)])
    (prompt,), _ = data.load_prompts(settings(), path, tokenizer)
    assert [t.rejected for t in prompt.teachers] == [None, "wrong", None]


def test_teacher_tokens_end_with_one_end_of_text(tokenizer):
    (teacher,) = encode_teachers(tokenizer, ["1+1=2" + tokenizer.eos_token])
    assert teacher.tokens.tolist() == [
        *tokenizer("1+1=2", add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
    ]


def test_check_data_reports_every_source(tmp_path, chain_model):
    train, held_out = lines(tmp_path / "a.jsonl", GSM8K), lines(tmp_path / "b.jsonl", GSM8K)
    reports = data.check_data(settings(model=chain_model, data={"train": train, "eval": [held_out]}))
    assert [(r.split, r.used) for r in reports] == [("train", 3), ("eval", 3)]
    json.dumps([r.as_dict() for r in reports])


# --------------------------------------------------------------------------------------------------------------------
# Models


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "~/nowhere-at-all", "a/b/c", "builtin:other"])
def test_a_model_that_is_not_there_is_a_config_error(model):
    with pytest.raises(ConfigError):
        data.resolve_model(model)


def test_a_folder_without_a_model_or_tokenizer_is_a_config_error(tmp_path, chain_model):
    with pytest.raises(ConfigError, match=r"no config\.json"):
        data.resolve_model(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match="holds no tokenizer"):
        data.load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        data.load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        data.resolve_model(str(tmp_path / "config.json"))
    assert data.resolve_model("builtin:chain") == chain_model == data.resolve_model(chain_model)


# --------------------------------------------------------------------------------------------------------------------
# Order and cursor


def prompts_of(*uids):
    return [Prompt(uid, (), np.zeros(1, np.int32), 1) for uid in uids]


def drawn(stream, count):
    return [(epoch, prompt.uid) for epoch, prompt in (stream.next() for _ in range(count))]


def test_each_epoch_is_a_new_permutation_that_the_seed_fixes():
    uids = [str(n) for n in range(50)]
    stream = data.PromptStream(prompts_of(*uids), seed=1)
    first, second = drawn(stream, 50), drawn(stream, 50)
    assert sorted(u for _, u in first) == sorted(u for _, u in second) == sorted(uids)
    assert [u for _, u in first] != [u for _, u in second] and {e for e, _ in second} == {1}
    assert drawn(data.PromptStream(prompts_of(*reversed(uids)), seed=1), 50) == first, (
        "the file's order does not matter"
    )
    assert drawn(data.PromptStream(prompts_of(*uids), seed=2), 50) != first


def test_unshuffled_data_keeps_its_order_and_ends_after_its_epochs():
    stream = data.PromptStream(prompts_of("a", "b"), seed=0, shuffle=False, epochs=2)
    assert drawn(stream, 4) == [(0, "a"), (0, "b"), (1, "a"), (1, "b")]
    assert stream.next() is None and stream.exhausted and stream.cursor()["exhausted"]


@pytest.mark.parametrize("taken", [0, 3, 7, 8, 20])
def test_a_restored_stream_continues_where_it_stopped(taken):
    def fresh():
        return data.PromptStream(prompts_of(*"abcdefg"), seed=3, epochs=3)

    stream, copy = fresh(), fresh()
    drawn(stream, taken)
    copy.restore(json.loads(json.dumps(stream.cursor())))
    assert drawn(copy, 21 - taken) == drawn(stream, 21 - taken)
    assert copy.next() is None


def test_a_cursor_of_other_data_or_another_seed_is_refused():
    cursor = data.PromptStream(prompts_of("a", "b"), seed=0).cursor()
    for other in (
        data.PromptStream(prompts_of("a", "c"), seed=0),
        data.PromptStream(prompts_of("a", "b"), seed=1),
        data.PromptStream(prompts_of("a", "b"), seed=0, shuffle=False),
    ):
        with pytest.raises(DataError, match="would not continue"):
            other.restore(cursor)


def test_a_stream_of_nothing_is_refused():
    with pytest.raises(DataError, match="no prompts"):
        data.PromptStream([], seed=0)
