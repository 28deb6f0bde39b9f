"""Cached answers survive a kill, are never mixed up, and come back as they were."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hapo_async import config
from hapo_async.answers import AnswerCache
from hapo_async.errors import ConfigError, DataError
from hapo_async.holdout import EarlyStop, Split
from hapo_async.recipe import Recipe, data_digest, model_identity
from hapo_async.types import (
    Answer,
    Group,
    GroupKey,
    Judgement,
    Prompt,
    Segment,
    Source,
    Verdict,
    Version,
    VersionSpan,
)

RIGHT, WRONG = Judgement(Verdict.CORRECT, 1.0), Judgement(Verdict.WRONG, 0.0, {"format": 0.5}, detail="not equal")
FAILED = Judgement(Verdict.TIMEOUT, None)
RECIPE = Recipe("model", "data", 3, 2, 0.7, 64, "boxed")


def prompt(uid: str, tokens=(5, 6, 7), truth="1") -> Prompt:
    return Prompt(uid, ({"role": "user", "content": f"what is {uid}?"},), np.asarray(tokens, np.int32), truth)


PROMPTS = [prompt(uid) for uid in "abc"]


def group(of: Prompt, lengths=(3, 4), source=Source.POLICY) -> Group:
    """Random answers, sampled by version 1.0 at temperature 0.7, one of them with odd log-probs."""
    rng = np.random.default_rng(len(lengths))
    answers = []
    for index, length in enumerate(lengths):
        logp = -rng.random(length).astype(np.float32)
        logp[: 1 if index else 0] = np.nan
        span = (VersionSpan(Version(1, 0), 0, length),)
        tokens = rng.integers(0, 50, length).astype(np.int32)
        policy = source is Source.POLICY
        segment = Segment(source, tokens, logp if policy else None, span if policy else ())
        answers.append(Answer(index, (segment,), "stop", f"answer {index} — \ud800"))
    return Group(GroupKey(-1, of.uid, 0), of.tokens, tuple(answers), 0.7, "generator-1", 4711)


def write(folder, *, judgements=((RIGHT, WRONG),) * 3, seal=True, recipe=RECIPE) -> AnswerCache:
    cache = AnswerCache.open(folder, recipe)
    cache.begin()
    for p, verdicts in zip(PROMPTS, judgements, strict=False):
        cache.append(p, group(p), verdicts)
    if seal:
        cache.seal()
    cache.close()
    return cache


def test_answers_come_back_as_they_were_but_without_version_at_temperature_one(tmp_path):
    write(tmp_path, judgements=((RIGHT, WRONG), (FAILED, RIGHT), (WRONG, FAILED)))
    cache = AnswerCache.open(tmp_path, RECIPE)
    assert cache.complete and list(cache.entries) == ["a", "b", "c"]
    key = GroupKey(4, "b", 2)
    read, was = cache.read(PROMPTS[1], key), group(PROMPTS[1])
    assert (read.key, read.temperature) == (key, 1.0)
    for now, before in zip(read.answers, was.answers, strict=True):
        assert (now.text, now.finish_reason) == (before.text, before.finish_reason)
        assert np.array_equal(now.tokens, before.tokens)
        assert now.logp_behave.tobytes() == before.logp_behave.tobytes(), "log-probs must keep every bit"
        assert (now.version_steps == -1).all()
    header = cache.entries["b"].header(key, PROMPTS[1])
    assert header.oldest is None and header.lengths == (3, 4) and header.prompt_length == 3
    assert cache.entries["b"].judgements == (FAILED, RIGHT), "an answer without a verdict stays without one"
    assert cache.entries["c"].judgements[0] == WRONG


def test_answers_of_anybody_but_the_policy_are_refused(tmp_path):
    cache = AnswerCache.open(tmp_path, RECIPE)
    cache.begin()
    with pytest.raises(ValueError, match="did not write"):
        cache.append(PROMPTS[0], group(PROMPTS[0], source=Source.ENVIRONMENT), (RIGHT, WRONG))
    cache.close()


@pytest.mark.parametrize("cut", [1, 40, "garbage"])
def test_a_killed_generation_continues_where_its_last_whole_row_ends(tmp_path, cut):
    write(tmp_path, judgements=((RIGHT, WRONG),) * 2, seal=False)
    path = tmp_path / "answers.jsonl"
    rows = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(path.read_bytes()[:-cut] if cut != "garbage" else rows[0] + b"\0" * 500 + b"\n")
    cache = AnswerCache.open(tmp_path, RECIPE)
    assert not cache.complete and [p.uid for p in cache.missing(PROMPTS)] == ["b", "c"]
    cache.begin()
    for p in cache.missing(PROMPTS):
        cache.append(p, group(p), (WRONG, RIGHT))
    cache.seal()
    assert path.read_bytes().startswith(rows[0])
    assert [json.loads(line)["uid"] for line in path.read_bytes().splitlines()] == ["a", "b", "c"]
    again = AnswerCache.open(tmp_path, RECIPE)
    assert again.complete and again.read(PROMPTS[1], GroupKey(0, "b", 0)).answers[0].length == 3


def test_a_row_is_never_written_twice(tmp_path):
    cache = write(tmp_path, seal=False)
    cache.begin()
    cache.append(PROMPTS[0], group(PROMPTS[0]), (WRONG, WRONG))
    cache.close()
    assert len((tmp_path / "answers.jsonl").read_bytes().splitlines()) == 3
    assert AnswerCache.open(tmp_path, RECIPE).entries["a"].judgements == (RIGHT, WRONG)


@pytest.mark.parametrize(
    ("field", "value", "key"),
    [
        ("model", "other", "model"),
        ("data", "other", "data.train"),
        ("prompts", 4, "data.limit"),
        ("n", 8, "sampling.n: 2 there, 8 here"),
        ("temperature", 1.0, "sampling.temperature: 0.7 there, 1.0 here"),
        ("max_tokens", 32, "sampling.max_tokens"),
        ("verifier", "math", "verifier.name"),
    ],
)
@pytest.mark.parametrize("seal", [True, False])
def test_answers_that_do_not_fit_the_run_are_refused_with_what_differs_and_the_fix(tmp_path, field, value, key, seal):
    write(tmp_path, seal=seal)
    other = Recipe(**{**RECIPE.__dict__, field: value})
    with pytest.raises(ConfigError) as info:
        AnswerCache.open(tmp_path, other)
    assert key in str(info.value) and "data.answers" in str(info.value)


@pytest.mark.parametrize("file", ["answers.jsonl", "about.json", "MANIFEST.json"])
def test_a_damaged_cache_is_refused(tmp_path, file):
    write(tmp_path)
    path = tmp_path / file
    path.write_bytes(path.read_bytes().replace(b"a", b"e", 3)[:-7])
    with pytest.raises(DataError, match="Remove the folder"):
        AnswerCache.open(tmp_path, RECIPE)


def test_a_second_writer_is_kept_out(tmp_path):
    first, second = AnswerCache.open(tmp_path, RECIPE), AnswerCache.open(tmp_path, RECIPE)
    first.begin()
    with pytest.raises(ConfigError, match="another run"):
        second.begin()
    first.close()
    second.begin()
    second.close()


# ---------------------------------------------------------------- the reference's log-probs


def scored(tmp_path):
    cache = write(tmp_path, judgements=((RIGHT, WRONG), (WRONG, WRONG), (WRONG, RIGHT)))
    scores = {uid: [np.full(3, -i, np.float32), np.full(4, -i - 0.5, np.float32)] for i, uid in enumerate("ac")}
    cache.write_reference(scores)
    return scores


def test_reference_log_probs_of_mixed_prompts_are_kept_by_answer(tmp_path):
    scores = scored(tmp_path)
    cache = AnswerCache.open(tmp_path, RECIPE)
    assert cache.has_reference
    for uid, expected in scores.items():
        assert all(np.array_equal(a, b) for a, b in zip(cache.reference(uid), expected, strict=True))


def test_reference_log_probs_of_other_lengths_or_other_answers_are_not_taken(tmp_path):
    scores = scored(tmp_path / "one")
    cache = write(tmp_path / "two", judgements=((RIGHT, WRONG),) * 3)
    assert not cache.has_reference
    with pytest.raises(ValueError, match="tokens"):
        cache.write_reference({**scores, "b": [np.zeros(3, np.float32), np.zeros(5, np.float32)]})
    (tmp_path / "two" / "reference.safetensors").write_bytes((tmp_path / "one" / "reference.safetensors").read_bytes())
    assert not AnswerCache.open(tmp_path / "two", RECIPE).has_reference


def test_damaged_reference_log_probs_are_refused(tmp_path):
    scored(tmp_path)
    path = tmp_path / "reference.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x55")
    with pytest.raises(DataError, match="digest"):
        AnswerCache.open(tmp_path, RECIPE)
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(DataError, match="damaged"):
        AnswerCache.open(tmp_path, RECIPE)


# ---------------------------------------------------------------- recipes


def test_a_model_is_known_by_its_weights_wherever_it_lies(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(content * 100)
    one, same, other = (model_identity(str(tmp_path / name)) for name in "abc")
    assert one == same != other


def test_data_are_known_by_uid_tokens_and_truth_in_any_order():
    same = data_digest(PROMPTS[::-1])
    assert data_digest(PROMPTS) == same
    changed = ([prompt("a", (5, 6, 8))], [prompt("a", truth="2")], [prompt("d")])
    assert len({same, *(data_digest([*PROMPTS[1:], *c]) for c in changed)}) == 4


def test_a_recipe_is_read_off_the_config(tmp_path):
    c = config.parse({"sampling": {"n": 4, "temperature": 0.5, "max_tokens": 9}, "verifier": {"name": "math"}})
    recipe = Recipe.of(c, PROMPTS, str(tmp_path))
    assert (recipe.n, recipe.temperature, recipe.max_tokens, recipe.verifier, recipe.prompts) == (4, 0.5, 9, "math", 3)


# ---------------------------------------------------------------- which prompts train


def entries(tmp_path, **outcomes):
    cache = AnswerCache.open(tmp_path, RECIPE)
    cache.begin()
    for uid, verdicts in outcomes.items():
        cache.append(prompt(uid), group(prompt(uid)), verdicts)
    cache.close()
    return cache.entries


def test_prompts_with_nothing_to_compare_are_left_out_and_counted(tmp_path):
    found = entries(
        tmp_path, a=(RIGHT, WRONG), b=(RIGHT, RIGHT), c=(WRONG, WRONG), d=(FAILED, RIGHT), e=(FAILED, FAILED)
    )
    split = Split.of(found, 0.0, 0)
    assert split.train == {"a"} and split.held_out == ()
    assert AnswerCache.open(tmp_path, RECIPE).unjudged == 3
    assert split.left_out == {"all correct": 2, "all wrong": 1, "unverified": 1}
    assert "2 all correct, 1 all wrong, 1 unverified" in split.text()


def test_a_seeded_share_is_held_out_and_something_is_always_left(tmp_path):
    found = entries(tmp_path, **{f"p{i}": (RIGHT, WRONG) for i in range(40)})
    split = Split.of(found, 0.05, 7)
    assert len(split.held_out) == 2 and len(split.train) == 38 and not split.train & set(split.held_out)
    assert split == Split.of(dict(reversed(found.items())), 0.05, 7), "the order of the file does not matter"
    assert {Split.of(found, 0.05, seed).held_out for seed in range(5)} != {split.held_out}
    one = {"p0": found["p0"]}
    assert Split.of(one, 0.5, 0) == Split(frozenset({"p0"}), ())
    two = {uid: found[uid] for uid in ("p0", "p1")}
    assert len(Split.of(two, 0.05, 0).held_out) == 1, "at least one where early stopping wants to look"


def test_early_stopping_counts_evaluations_without_a_better_loss():
    early = EarlyStop(2)
    for step, loss, due in ((0, 1.0, False), (5, 0.5, False), (10, 0.5, False), (15, float("nan"), True)):
        early.see(step, loss)
        assert early.due is due, step
    assert "step 5" in early.text() and "0.5" in early.text()
    again = EarlyStop(3, **json.loads(json.dumps(early.state())))
    assert (again.best, again.best_step, again.waited, again.due) == (0.5, 5, 2, False)
    broken = EarlyStop(2)
    for step, loss in enumerate((float("nan"), 1.0, 0.9)):
        broken.see(step, loss)
    assert (broken.best, broken.best_step, broken.due) == (0.9, 2, False)
    never = EarlyStop(0)
    for step in range(9):
        never.see(step, 1.0)
    assert not never.due
