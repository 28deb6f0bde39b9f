"""Self-BLEU agrees with BLEU counted by hand, and with a direct computation."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hapo_async.evaluation.diversity import distinctness, self_bleu, words


def test_words_are_letters_and_digits_and_signs_stand_alone() -> None:
    assert words(r"So x=12, \boxed{7}.") == ["So", "x", "=", "12", ",", "\\", "boxed", "{", "7", "}", "."]


def test_counts_by_hand() -> None:
    # Precisions of each against the other: 4/5, 3/4, 2/3, 1/2; no penalty, equal length.
    assert self_bleu(["a b c d e", "a b c d f"]) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)
    # "a a b" against "a b": a is clipped to one: 2/3, 1/2 and no third order. Back: 2/2, 1/1, and exp(1 - 3/2).
    hypothesis = self_bleu(["a a b", "a b"], order=2)
    assert hypothesis == pytest.approx((math.sqrt(2 / 3 * 1 / 2) + math.exp(1 - 3 / 2)) / 2)
    # Three answers: "a b" is covered by the union of the others in unigrams, its bigram by neither.
    assert self_bleu(["a b", "a x", "y b"], order=1) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert self_bleu(["a b", "a x", "y b"], order=2) == 0.0


def test_equal_answers_score_one_and_disjoint_ones_zero() -> None:
    assert self_bleu(["the same words here now"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b c d", "e f g h"]) == 0.0
    assert distinctness([["a b c d", "e f g h"], ["same one here ok", "same one here ok"]]) == pytest.approx(0.5)


def test_short_and_empty_answers() -> None:
    assert self_bleu(["7", "7", "8"]) == pytest.approx(2 / 3)
    assert self_bleu(["", ""]) == 1.0
    assert self_bleu(["", "a"]) == 0.0
    assert math.isnan(self_bleu(["alone"])) and math.isnan(distinctness([["alone"], []]))


def direct(texts: list[list[str]], order: int = 4) -> float:
    """BLEU of each text against the others, straight from the definition."""
    scores = []
    for i, text in enumerate(texts):
        others = [t for j, t in enumerate(texts) if j != i]
        precisions = []
        for n in range(1, min(order, len(text)) + 1):
            counts = Counter(tuple(text[a : a + n]) for a in range(len(text) - n + 1))
            grams = [Counter(tuple(t[a : a + n]) for a in range(len(t) - n + 1)) for t in others]
            clipped = sum(min(count, max(g[gram] for g in grams)) for gram, count in counts.items())
            precisions.append(clipped / sum(counts.values()))
        length = min((len(t) for t in others), key=lambda r: (abs(r - len(text)), r))
        penalty = 1.0 if len(text) >= length else math.exp(1 - length / len(text))
        scores.append(penalty * math.prod(precisions) ** (1 / len(precisions)))
    return sum(scores) / len(scores)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abc"), min_size=1, max_size=9), min_size=2, max_size=5))
def test_the_shared_counts_give_what_the_definition_gives(texts: list[list[str]]) -> None:
    assert self_bleu([" ".join(text) for text in texts]) == pytest.approx(direct(texts), abs=1e-12)
