"""How much a prompt's answers differ from each other: 1 - Self-BLEU, exactly and without any library.

BLEU is Papineni et al.'s: clipped n-gram precisions up to order 4, geometric mean, brevity penalty against the closest
reference length (the shorter one on a tie), no smoothing. Self-BLEU (Zhu et al. 2018) is the mean BLEU of each answer
with all others as its references. Words are runs of letters and digits, and every other sign by itself.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from statistics import fmean

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]

ORDER = 4


def words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]", text)


def self_bleu(answers: Sequence[str], order: int = ORDER) -> float:
    """Mean BLEU of each answer against the others; NaN for fewer than two. An answer shorter than ``order`` words has no
    n-grams of that order and is measured on the shorter ones; one without a word scores 1 beside another such, else 0."""
    texts = [words(answer) for answer in answers]
    if len(texts) < 2:
        return math.nan
    best = [_best_counts([_grams(text, n) for text in texts]) for n in range(1, order + 1)]
    lengths = [len(text) for text in texts]
    return fmean(_bleu(i, texts[i], best, lengths) for i in range(len(texts)))


def distinctness(groups: Sequence[Sequence[str]]) -> float:
    """1 - Self-BLEU, mean over groups of two or more answers; NaN when there is none."""
    scores = [1.0 - self_bleu(group) for group in groups if len(group) > 1]
    return fmean(scores) if scores else math.nan


class _Best(dict[tuple[str, ...], tuple[int, int, int]]):
    """n-gram -> (largest count in one answer, which answer, largest count in any other)."""


def _best_counts(counts: Sequence[Grams]) -> _Best:
    best = _Best()
    for i, grams in enumerate(counts):
        for gram, count in grams.items():
            top, owner, second = best.get(gram, (0, -1, 0))
            if count > top:
                best[gram] = (count, i, top)
            elif count > second:
                best[gram] = (top, owner, count)
    return best


def _bleu(i: int, text: Words, best: Sequence[_Best], lengths: Sequence[int]) -> float:
    others = [length for j, length in enumerate(lengths) if j != i]
    if not text:
        return float(0 in others)
    logs = []
    for n in range(1, min(len(best), len(text)) + 1):
        clipped = 0
        for gram, count in _grams(text, n).items():
            top, owner, second = best[n - 1][gram]
            clipped += min(count, second if owner == i else top)
        if not clipped:
            return 0.0
        logs.append(math.log(clipped / (len(text) - n + 1)))
    closest = min(others, key=lambda length: (abs(length - len(text)), length))
    penalty = 0.0 if len(text) >= closest else 1 - closest / len(text)
    return math.exp(fmean(logs) + penalty)


def _grams(text: Words, n: int) -> Grams:
    return Counter(tuple(text[i : i + n]) for i in range(len(text) - n + 1))
