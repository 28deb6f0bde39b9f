"""The papers' protocols: how many answers on which benchmark, sampled how, and what the user may still say."""

from __future__ import annotations

import pytest

from hapo_async import config
from hapo_async.errors import ConfigError
from hapo_async.evaluation import protocols


def settings(name: str, benchmark: str, *more: str, n: int | None = None, k: int | None = None) -> config.EvalConfig:
    return config.load(None, [*protocols.overrides(protocols.get(name), benchmark, n, k), *more]).eval


@pytest.mark.parametrize(
    ("protocol", "benchmark", "n", "k", "temperature"),
    [
        ("000", "AIME24", 32, 1, 0.6),
        ("000", "aime_2024", 32, 1, 0.6),
        ("000", "MATH-500", 1, 1, 0.6),
        ("000", "olympiadbench", 1, 1, 0.6),
        ("001", "amc23", 32, 1, 1.0),
        ("001", "minerva_math", 4, 1, 1.0),
        ("002", "AIME25", 32, 1, 0.6),
        ("002", "arc-challenge", 1, 1, 0.6),
        ("002", "GPQA-Diamond", 1, 1, 0.6),
        ("003", "gsm8k", 8, 1, 0.7),
        ("003", "MATH-Perturb-Hard", 8, 1, 0.7),
        ("003", "AIME26", 32, 1, 0.7),
        ("004", "AIME25", 256, 256, 1.0),
        ("004", "minerva", 16, 16, 1.0),
    ],
)
def test_a_benchmark_is_asked_as_its_paper_does(
    protocol: str, benchmark: str, n: int, k: int, temperature: float
) -> None:
    chosen = settings(protocol, benchmark)
    assert (chosen.n, chosen.k, chosen.temperature) == (n, k, temperature)


def test_what_else_a_paper_gives() -> None:
    assert settings("000", "AIME24").max_tokens == 8192
    assert settings("002", "AIME24").top_p == 0.95
    assert protocols.get("002").bootstrap > 0


def test_explicit_settings_win() -> None:
    chosen = settings("004", "AIME24", "eval.sampling.temperature=0.3", n=8)
    assert (chosen.n, chosen.k, chosen.temperature) == (8, 8, 0.3)
    assert settings("004", "AIME24", n=8, k=2).k == 2
    with pytest.raises(ConfigError, match=r"eval\.n"):
        settings("000", "AIME24", n=0)


def test_without_a_protocol_one_greedy_answer_or_several_sampled_ones() -> None:
    assert protocols.overrides(None, "x") == ["eval.n=1", "eval.k=1"]
    assert protocols.overrides(None, "x", 4, 2) == ["eval.n=4", "eval.k=2", "eval.sampling.temperature=1.0"]


@pytest.mark.parametrize("benchmark", ["mymath500", "aime", "amcx", "math", "gsm8k-mini"])
def test_a_benchmark_that_the_paper_does_not_have_gets_the_default_and_a_note(benchmark: str) -> None:
    assert settings("000", benchmark).n == 1
    assert any(repr(benchmark) in note for note in protocols.notes(protocols.get("000"), ["AIME24", benchmark]))


def test_notes_leave_out_what_is_known_or_given() -> None:
    assert not any("AIME24" in note for note in protocols.notes(protocols.get("000"), ["AIME24"]))
    assert any("eval.sampling.temperature" in note for note in protocols.notes(protocols.get("004"), ["AIME24"]))
    given = {"n", "temperature", "top_p", "max_tokens"}
    assert protocols.notes(protocols.get("004"), ["unknown"], given) == []


def test_an_unknown_protocol_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="000, 001, 002, 003, 004"):
        protocols.get("5")
