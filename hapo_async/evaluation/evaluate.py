"""Evaluation numbers: pass@k, avg@n and their standard errors, from verdicts.

``correct`` is a table [prompts][answers] of True, False or None, where None is an answer that no verifier could judge.
Such answers are left out of every accuracy and counted; they are neither right nor wrong.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean, stdev

import numpy as np

Verdicts = Sequence[bool | None]

MACRO = "macro"
LONGEST_NAME = 100  # bytes of a set's name, which becomes part of a file's
BOOTSTRAP_ANSWERS = 2048  # answers per prompt that the bootstrap draws from


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k answers, drawn from n of which c are correct, hold a correct one: 1 - C(n-c, k) / C(n, k), exactly.

    Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {c} correct among {n} is undefined: it needs 0 <= c <= n and 1 <= k <= n.")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def avg_at_n(correct: Sequence[Verdicts]) -> float:
    """Mean over prompts of the share of correct answers; prompts without a judged answer are left out. NaN when none is
    left."""
    shares = [fmean(judged) for row in correct if (judged := _judged(row))]
    return fmean(shares) if shares else math.nan


def sample_accuracies(correct: Sequence[Verdicts]) -> list[float]:
    """a_1 ... a_n: the accuracy over prompts of the j-th answers; columns without a judged answer are left out."""
    width = max((len(row) for row in correct), default=0)
    columns = [[row[j] for row in correct if j < len(row)] for j in range(width)]
    return [fmean(judged) for column in columns if (judged := _judged(column))]


def standard_error(correct: Sequence[Verdicts]) -> float:
    """Standard error of ``avg_at_n``.

    With two or more answers per prompt std(a_1 ... a_n) / sqrt(n), a_j the accuracy of the j-th answers: how much the
    number would move if the same prompts were answered again. With one answer the binomial sqrt(p(1-p)/prompts). NaN
    when nothing is judged.
    """
    accuracies = sample_accuracies(correct)
    if len(accuracies) > 1:
        return stdev(accuracies) / math.sqrt(len(accuracies))
    prompts = sum(bool(_judged(row)) for row in correct)
    if not prompts:
        return math.nan
    p = accuracies[0]
    return math.sqrt(p * (1 - p) / prompts)


def bootstrap_at_k(correct: Sequence[Verdicts], k: int, draws: int = 1000, seed: int = 0) -> tuple[float, float]:
    """(mean, standard error) of pass@k by the bootstrap (seed 002): each of ``draws`` times, k answers of every prompt
    are drawn with replacement from its first 2,048 judged ones, and the share of prompts with a correct one is noted.

    Whether a draw of k holds a correct answer is Bernoulli with chance 1 - (1 - c/n)^k, so that is what is drawn. Only
    prompts with at least k judged answers count; (NaN, NaN) when there is none.
    """
    rows = [judged[:BOOTSTRAP_ANSWERS] for row in correct if len(judged := _judged(row)) >= k]
    if not rows:
        return math.nan, math.nan
    chances = np.array([1.0 - (1.0 - sum(row) / len(row)) ** k for row in rows])
    rng = np.random.default_rng([seed, k])
    means = np.array([(rng.random(len(rows)) < chances).mean() for _ in range(draws)])
    return float(means.mean()), float(means.std(ddof=1))


def ladder(k: int) -> list[int]:
    """1, 2, 4, ... up to k, and k itself: the points of a pass@k curve."""
    return sorted({k} | {2**i for i in range(k.bit_length()) if 2**i <= k})


def summarise(
    name: str, correct: Sequence[Verdicts], k: int | Collection[int] = 1, bootstrap: int = 0, seed: int = 0
) -> dict[str, float]:
    """Metrics of one evaluation set, named as the registry has them.

    ``eval/<set>/pass@1`` with ``/se``, ``pass@<k>`` with ``/se`` (over prompts) for every k > 1, ``bootstrap@<k>`` with
    ``/se`` when ``bootstrap`` draws are wanted, ``avg@<n>`` with ``/se`` when there are n > 1 answers, ``prompts`` and
    ``unjudged``. Prompts with fewer than k judged answers do not count in pass@k. Accuracies are missing, not 0, when
    nothing could be judged.
    """
    prefix = f"eval/{set_name(name)}"
    flat = [verdict for row in correct for verdict in row]
    out: dict[str, float] = {
        f"{prefix}/prompts": float(len(correct)),
        f"{prefix}/unjudged": float(sum(verdict is None for verdict in flat)),
    }
    if all(verdict is None for verdict in flat):
        return out
    mean, error = avg_at_n(correct), standard_error(correct)
    out |= {f"{prefix}/pass@1": mean, f"{prefix}/pass@1/se": error}
    n = max(len(row) for row in correct)
    if n > 1:
        out |= {f"{prefix}/avg@{n}": mean, f"{prefix}/avg@{n}/se": error}
    for size in sorted({k} if isinstance(k, int) else set(k)):
        chances = [pass_at_k(len(judged), sum(judged), size) for row in correct if len(judged := _judged(row)) >= size]
        if size > 1 and chances:
            spread = stdev(chances) if len(chances) > 1 else 0.0
            out |= {
                f"{prefix}/pass@{size}": fmean(chances),
                f"{prefix}/pass@{size}/se": spread / math.sqrt(len(chances)),
            }
        if bootstrap and chances:
            drawn, error = bootstrap_at_k(correct, size, bootstrap, seed)
            out |= {f"{prefix}/bootstrap@{size}": drawn, f"{prefix}/bootstrap@{size}/se": error}
    return out


def macro_average(values: Mapping[str, float], sets: Sequence[str]) -> dict[str, float]:
    """``eval/macro/<accuracy>``: the mean over sets of each accuracy that all of them have, every set counting alike, and
    its standard error sqrt(sum se^2) / sets. Empty for fewer than two sets."""
    if len(sets) < 2:
        return {}
    out = {}
    for name in values:
        first, _, what = name.removeprefix("eval/").partition("/")
        names = [f"eval/{other}/{what}" for other in sets]
        if first == sets[0] and re.fullmatch(r"(pass|avg|bootstrap)@\d+", what) and all(n in values for n in names):
            out[f"eval/{MACRO}/{what}"] = fmean(values[n] for n in names)
            errors = [values.get(f"{n}/se", math.nan) for n in names]
            out[f"eval/{MACRO}/{what}/se"] = math.sqrt(sum(e * e for e in errors)) / len(sets)
    return out


def exclusive_solves(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[list[str], list[str]]:
    """(+X, -Y): questions that only ``after`` solves and only ``before`` solves. Both map uids to accuracies; a question is
    solved when at least one answer is correct. Only questions that both were asked count."""
    both = [uid for uid in after if uid in before]
    gained = [uid for uid in both if after[uid] > 0 and before[uid] == 0]
    return gained, [uid for uid in both if before[uid] > 0 and after[uid] == 0]


def set_name(source: str) -> str:
    """A metric-safe name for an evaluation set: the file's stem or the source's last part."""
    if source.startswith("builtin:"):
        source = source.removeprefix("builtin:").replace("/", "-")
    last = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    stem = re.sub(r"\.(jsonl|json|parquet)$", "", last)
    name = re.sub(r"[^\w.-]+", "_", stem).strip("_.") or "eval"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    tail = hashlib.sha256(name.encode()).hexdigest()[:8]  # two long names stay two
    return f"{name.encode()[: LONGEST_NAME - 9].decode(errors='ignore')}-{tail}"


def _judged(row: Verdicts) -> list[bool]:
    return [verdict for verdict in row if verdict is not None]
