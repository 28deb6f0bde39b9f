"""Evaluation numbers: pass@k, avg@n and their standard errors, from verdicts.

``correct`` is a table [prompts][answers] of True, False or None, where None is an answer that no verifier could judge.
Such answers are left out of every accuracy and counted; they are neither right nor wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import fmean, stdev

Verdicts = Sequence[bool | None]


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


def summarise(name: str, correct: Sequence[Verdicts], k: int = 1) -> dict[str, float]:
    """Metrics of one evaluation set, named as the registry has them.

    ``eval/<set>/pass@1`` with ``/se``, ``pass@<k>`` with ``/se`` (over prompts) when k > 1, ``avg@<n>`` with ``/se``
    when there are n > 1 answers, ``prompts`` and ``unjudged``. Prompts with fewer than k judged answers do not count in
    pass@k. Accuracies are missing, not 0, when nothing could be judged.
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
    if k > 1:
        chances = [pass_at_k(len(judged), sum(judged), k) for row in correct if len(judged := _judged(row)) >= k]
        if chances:
            spread = stdev(chances) if len(chances) > 1 else 0.0
            out |= {f"{prefix}/pass@{k}": fmean(chances), f"{prefix}/pass@{k}/se": spread / math.sqrt(len(chances))}
    return out


def set_name(source: str) -> str:
    """A metric-safe name for an evaluation set: the file's stem or the source's last part."""
    if source.startswith("builtin:"):
        source = source.removeprefix("builtin:").replace("/", "-")
    last = re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    stem = re.sub(r"\.(jsonl|json|parquet)$", "", last)
    return re.sub(r"[^\w.-]+", "_", stem).strip("_") or "eval"


def _judged(row: Verdicts) -> list[bool]:
    return [verdict for verdict in row if verdict is not None]
