"""pass@k, avg@n and standard errors are what the formulas say, and unjudged answers are neither right nor wrong."""

from __future__ import annotations

import itertools
import math
from statistics import fmean, stdev

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hapo_async import metrics
from hapo_async.evaluation import evaluate


@given(st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_share_of_draws_that_hold_a_correct_answer(case: tuple[int, int, int]) -> None:
    n, c, k = case
    draws = list(itertools.combinations([i < c for i in range(n)], k))
    assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)


def test_pass_at_k_stays_exact_for_many_samples() -> None:
    assert evaluate.pass_at_k(2048, 1, 1024) == 0.5
    assert evaluate.pass_at_k(2048, 0, 1024) == 0.0
    assert evaluate.pass_at_k(2048, 1025, 1024) == 1.0


@pytest.mark.parametrize(("n", "c", "k"), [(4, 1, 5), (4, 5, 1), (4, -1, 1), (4, 1, 0), (0, 0, 1)])
def test_an_impossible_pass_at_k_is_refused(n: int, c: int, k: int) -> None:
    with pytest.raises(ValueError, match="undefined"):
        evaluate.pass_at_k(n, c, k)


def test_the_standard_error_is_taken_over_samples() -> None:
    correct = [[True, False, True], [True, True, False], [False, False, True], [True, False, False]]
    accuracies = [0.75, 0.25, 0.5]
    assert evaluate.sample_accuracies(correct) == accuracies
    assert evaluate.standard_error(correct) == pytest.approx(stdev(accuracies) / math.sqrt(3))


def test_the_standard_error_of_a_single_sample_is_binomial() -> None:
    correct = [[True], [False], [True], [True], [None]]
    assert evaluate.standard_error(correct) == pytest.approx(math.sqrt(0.75 * 0.25 / 4))


def test_unjudged_answers_do_not_move_the_accuracy() -> None:
    correct = [[True, None], [False, False], [None, None]]
    assert evaluate.avg_at_n(correct) == 0.5
    summary = evaluate.summarise("set", correct)
    assert summary["eval/set/unjudged"] == 3
    assert summary["eval/set/prompts"] == 3


def test_a_summary_names_its_metrics_as_the_registry_does() -> None:
    correct = [[True, False, False, False], [False, False, False, False], [True, True, True, None]]
    summary = evaluate.summarise("data/AIME 24.jsonl", correct, k=2)
    for name in summary:
        metrics.lookup(name)
    prefix = "eval/AIME_24"
    assert summary[f"{prefix}/pass@1"] == summary[f"{prefix}/avg@4"] == pytest.approx((0.25 + 0 + 1) / 3)
    chances = [0.5, 0.0, 1.0]
    assert summary[f"{prefix}/pass@2"] == pytest.approx(0.5)
    assert summary[f"{prefix}/pass@2/se"] == pytest.approx(stdev(chances) / math.sqrt(3))


def test_prompts_with_too_few_judged_answers_do_not_count_in_pass_at_k() -> None:
    summary = evaluate.summarise("set", [[True, False], [False, None]], k=2)
    assert summary["eval/set/pass@2"] == 1.0


def test_one_answer_per_prompt_gives_pass_at_1_alone() -> None:
    summary = evaluate.summarise("set", [[True], [False]])
    assert set(summary) == {f"eval/set/{name}" for name in ("pass@1", "pass@1/se", "prompts", "unjudged")}


@pytest.mark.parametrize("correct", [[], [[None], [None]], [[]]])
def test_without_a_judged_answer_there_is_no_accuracy_rather_than_zero(correct: list[list[bool | None]]) -> None:
    summary = evaluate.summarise("set", correct)
    assert "eval/set/pass@1" not in summary
    assert math.isnan(evaluate.avg_at_n(correct)) and math.isnan(evaluate.standard_error(correct))


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/data/math-500.jsonl", "math-500"),
        ("builtin:chain/eval", "chain-eval"),
        ("HuggingFaceH4/aime_2024", "aime_2024"),
        ("a b/c d.parquet", "c_d"),
        ("///", "eval"),
    ],
)
def test_a_set_is_named_after_its_file(source: str, name: str) -> None:
    assert evaluate.set_name(source) == name


def test_the_bootstrap_is_that_of_drawing_answers_with_replacement() -> None:
    correct = [[True] + [False] * 7, [True] * 4 + [False] * 4, [False] * 8]
    mean, error = evaluate.bootstrap_at_k(correct, k=4, draws=4000)
    rng = np.random.default_rng(1)
    drawn = [fmean(any(rng.choice(row, 4)) for row in correct) for _ in range(4000)]
    exact = fmean(1 - (1 - c / 8) ** 4 for c in (1, 4, 0))
    assert mean == pytest.approx(exact, abs=0.01) and fmean(drawn) == pytest.approx(exact, abs=0.01)
    assert error == pytest.approx(stdev(drawn), rel=0.06)


def test_the_bootstrap_is_seeded_and_uses_the_first_2048_judged_answers() -> None:
    correct = [[None] + [False] * 2048 + [True] * 2048, [True] * 1024 + [False] * 1024]
    first = evaluate.bootstrap_at_k(correct, k=1024, draws=50, seed=3)
    assert first == evaluate.bootstrap_at_k(correct, k=1024, draws=50, seed=3)
    assert first == (0.5, 0.0), "the first prompt has no right answer among the ones drawn from, the second many"
    assert all(map(math.isnan, evaluate.bootstrap_at_k([[True, None]], k=2)))


@pytest.mark.parametrize(("k", "points"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_the_points_of_a_curve_double_up_to_k(k: int, points: list[int]) -> None:
    assert evaluate.ladder(k) == points


def test_a_summary_of_several_k_has_them_all_and_the_bootstrap_where_it_is_wanted() -> None:
    correct = [[True, False, False, False], [False] * 4]
    summary = evaluate.summarise("x", correct, [1, 2, 4], bootstrap=20)
    for name in summary:
        metrics.lookup(name)
    assert [summary[f"eval/x/pass@{k}"] for k in (1, 2, 4)] == [0.125, 0.25, 0.5]
    assert {f"eval/x/bootstrap@{k}{se}" for k in (1, 2, 4) for se in ("", "/se")} <= summary.keys()


def test_the_macro_average_counts_every_benchmark_alike() -> None:
    values = evaluate.summarise("a", [[True], [True], [True], [False]]) | evaluate.summarise("b", [[False, True]] * 100)
    macro = evaluate.macro_average(values, ["a", "b"])
    assert macro["eval/macro/pass@1"] == pytest.approx((0.75 + 0.5) / 2)
    errors = values["eval/a/pass@1/se"], values["eval/b/pass@1/se"]
    assert macro["eval/macro/pass@1/se"] == pytest.approx(math.hypot(*errors) / 2)
    assert set(macro) == {"eval/macro/pass@1", "eval/macro/pass@1/se"}, "avg@2 is not an accuracy of both"
    assert evaluate.macro_average(values, ["a"]) == {}


def test_exclusive_solves_count_questions_that_both_were_asked() -> None:
    before = {"a": 0.0, "b": 0.5, "c": 1.0, "d": 0.0, "only before": 1.0}
    after = {"a": 0.25, "b": 0.0, "c": 0.1, "d": 0.0, "only after": 1.0}
    assert evaluate.exclusive_solves(before, after) == (["a"], ["b"])
