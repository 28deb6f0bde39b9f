"""How long a run goes on with groups of which none can be trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hapo_async.errors import RunError
from hapo_async.types import Judgement

FRUITLESS = (8, 64)  # batches' worth of groups in a row, and at least so many groups
ONE_SIDED = (32, 4096)  # ... where all that is wrong is that their answers are all right or all wrong, or too nearly so
FILTERED = ("zero_variance", "outside_band")


class Barren:
    """Counts groups dropped since the last one that was admitted, by reason. prompts: those of one epoch."""

    def __init__(self, batch_prompts: int, prompts: int) -> None:
        self._batch, self._prompts = batch_prompts, prompts
        self._counts: Counter[str] = Counter()

    def admitted(self) -> None:
        self._counts.clear()

    def dropped(self, reason: str, judgements: Sequence[Judgement]) -> None:
        """Raises RunError when there has been nothing to train on for too long."""
        if reason in FILTERED:
            # Such a group was sampled and judged as it should be: whatever else goes wrong is not all that happens.
            self._counts = Counter({r: self._counts[r] for r in FILTERED})
        self._counts[reason] += 1
        count = sum(self._counts[r] for r in (FILTERED if reason in FILTERED else (reason,)))
        if count > self._limit(reason):
            raise RunError(f"{count} groups in a row were dropped as {reason!r} and {_explain(reason, judgements)}")

    def _limit(self, reason: str) -> int:
        batches, groups = ONE_SIDED if reason in FILTERED else FRUITLESS
        limit = max(groups, batches * self._batch)
        return max(limit, self._prompts) if reason == "no_teacher" else limit


def _explain(reason: str, judgements: Sequence[Judgement]) -> str:
    if reason == "zero_variance":
        return (
            "none could be trained on: their answers were all right or all wrong. The data are too easy or too hard for "
            "this model, or it has learnt them. Use others, a larger sampling.n, or an algorithm that trains on such groups too."
        )
    if reason == "outside_band":
        return (
            "none could be trained on: their mean rewards lay outside options.band_low and options.band_high. Widen the "
            "band, use other data, or a larger sampling.n."
        )
    if reason == "no_teacher":
        return (
            "none could be trained on: options.sft_steps trains demonstrations, and the data hold none that is usable. "
            "Name their column with data.columns (hapo-async check-data), or set options.sft_steps=0."
        )
    seen = ", ".join(sorted({str(j.verdict) + (f" ({j.detail})" if j.detail else "") for j in judgements}))
    return (
        f"none could be trained on; the last verdicts: {seen or 'none'}. Look at the verifier (hapo-async check-verifier) "
        "and at the data (hapo-async check-data)."
    )
