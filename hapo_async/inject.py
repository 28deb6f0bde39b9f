"""Composition: which rows of a judged group train, and with which advantage.

``compose`` runs in the driver on headers and rewards alone (no token payload but the teacher's own). The SSI operator
(seed 000) replaces an answer by the teacher's trajectory; LUFFY appends it; HPT switches to it or weighs both; SFT keeps
nothing else.

Options of algorithms that act here: ``filter``, ``band_low``, ``band_high``, ``overlong`` (with ``l_max``), ``pairs``,
``gamma``, ``feedback``, ``sft_steps``, and those of the advantage.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hapo_async import advantage as advantages
from hapo_async import gate
from hapo_async.reduction import match_pairs
from hapo_async.sequences import Row, TrainGroup
from hapo_async.types import SUCCESS, GatedGroup, Source

TEACHER_REWARD = 1.0
"""Only teachers that the verifier found correct are ever injected (``Teacher.rejected`` is None for no others)."""

FEEDBACK_SLOPE = 10.0
"""Slope of HPT's sigmoid feedback, over the success rate: from .12 to .88 within .2 on either side of gamma / N."""

ROUNDING = 1e-9
"""By so much the mean of a group's rewards may miss a bound that it is meant to equal."""


@dataclass(frozen=True)
class Setting:
    """What a composition may look at besides the group: resolved options, the learner's step, how a teacher is chosen
    where the gate named none, and the run's seed."""

    options: Mapping[str, Any]
    step: int = 0
    teacher: str = "seeded"
    seed: int = 0


def compose(
    kind: str,
    gated: GatedGroup,
    advantage: str,
    *,
    options: Mapping[str, Any],
    keep: str = "all",
    advantage_group: str = "injected",
    step: int = 0,
    teacher: str = "seeded",
    seed: int = 0,
) -> TrainGroup | None:
    """The rows of a group that train, or None when nothing is left to train (``why_nothing`` says why).

    kind: rollouts | demonstrations | append | ssi | switch (``Algorithm.composition``). advantage: a name of
    ``hapo_async.advantage``; where that is computed over a whole batch, rows hold their return until
    ``advantage.whiten_batch``. keep: all | judged | nonzero | paired, which rows stay once they have their
    advantage; a teacher's always does, except in pairs. advantage_group: ``injected`` computes it over the composed
    rows, ``rollouts`` over the sampled answers before injection (a teacher row, absent from those, keeps its advantage
    among the composed rows). step: the learner's. teacher, seed: how a teacher is chosen where the gate named none.
    Raises KeyError for an unknown kind or keep.
    """
    rows = KINDS[kind](gated, Setting(options, step, teacher, seed))
    if not rows or _unverified(rows, gated, advantage) or outside_band(gated, options) or _filtered(rows, options):
        return None
    rows = _with_advantages(rows, gated, advantage, advantage_group, options, apart=kind == "switch")
    rows = KEEPS[keep](rows, options)
    if not rows:
        return None
    sampled = any(row.source is Source.POLICY for row in rows)
    shown = next((row for row in rows if row.source is Source.TEACHER), None)
    sampling = gated.prompt.sampling
    return TrainGroup(
        key=gated.key,
        payload=gated.payload if sampled else None,
        prompt_length=len(gated.prompt.tokens),
        prompt_tokens=None if sampled else gated.prompt.tokens,
        teacher=gated.prompt.teachers[shown.index] if shown else None,
        rows=rows,
        confidence=gated.gate.confidence,
        temperature=sampling.temperature if sampled and sampling else 1.0,
    )


def why_nothing(gated: GatedGroup, options: Mapping[str, Any]) -> str:
    """The ledger's reason for a group that ``compose`` left nothing of: no_teacher (of a prompt that was not sampled) |
    unverified | outside_band | zero_variance | nothing_to_train."""
    if not gated.judgements and not gate.usable_teachers(gated.prompt.teachers):
        return "no_teacher"
    if gated.judgements and gated.judged.sum() < min(2, len(gated.judgements)):
        return "unverified"
    if outside_band(gated, options):
        return "outside_band"
    if gated.judgements and len(set(gated.rewards[gated.judged] >= SUCCESS)) == 1:  # by the filter, or by ``keep``
        return "zero_variance"
    return "nothing_to_train"


# --------------------------------------------------------------------------------------------------------------------
# Which rows


def _rollouts(gated: GatedGroup, setting: Setting) -> tuple[Row, ...]:
    """Every sampled answer. Unjudged ones stay, with advantage 0: no filter changes a denominator."""
    parts = zip(gated.header.lengths, gated.rewards, gated.judged, strict=True)
    return tuple(
        Row(Source.POLICY, i, length, float(reward), bool(judged), 0.0)
        for i, (length, reward, judged) in enumerate(parts)
    )


def _demonstrations(gated: GatedGroup, setting: Setting) -> tuple[Row, ...]:
    """The teacher alone; nothing without one. Which one: the gate's, else as the setting says."""
    teachers = gated.prompt.teachers
    index = gated.gate.teacher
    if index is None:
        index = gate.choose_teacher(teachers, setting.teacher, gate.seed_of(gated.key, setting.seed))
    if index is None or index not in gate.usable_teachers(teachers):
        return ()
    return (Row(Source.TEACHER, index, len(teachers[index].tokens), TEACHER_REWARD, True, 0.0),)


def _append(gated: GatedGroup, setting: Setting) -> tuple[Row, ...]:
    """LUFFY: the sampled answers and one teacher."""
    return _rollouts(gated, setting) + _demonstrations(gated, setting)


def _replace(gated: GatedGroup, setting: Setting) -> tuple[Row, ...]:
    """HAPO's SSI operator: the teacher takes the place of the answer that the gate named."""
    rows, teacher = _rollouts(gated, setting), _demonstrations(gated, setting)
    if gated.gate.replaced is None or not teacher:
        return rows
    return tuple(row for row in rows if row.index != gated.gate.replaced) + teacher


def _switch(gated: GatedGroup, setting: Setting) -> tuple[Row, ...]:
    """HPT: the sampled answers with weight alpha and the teacher with beta = 1 - alpha, each only where its weight is
    not 0 (``feedback_weight``). A prompt without a usable teacher trains its answers in full. While ``sft_steps`` last,
    the teacher alone."""
    teacher = _demonstrations(gated, setting)
    if setting.step < setting.options.get("sft_steps", 0):
        return teacher
    if gated.judged.sum() < 2:
        return ()
    alpha = feedback_weight(gated, setting.options) if teacher else 1.0
    rollouts = tuple(replace(row, weight=alpha) for row in _rollouts(gated, setting)) if alpha > 0 else ()
    return rollouts + tuple(replace(row, weight=1.0 - alpha) for row in teacher if alpha < 1)


def feedback_weight(gated: GatedGroup, options: Mapping[str, Any]) -> float:
    """HPT's alpha from S successes among N judged answers: ``switch`` [S > gamma]; ``linear`` S/N; ``sigmoid``
    1 / (1 + exp(-10 (S/N - gamma/N)))."""
    successes, judged = gate.count_successes(gated.rewards, gated.judged), int(gated.judged.sum())
    how, gamma = options.get("feedback", "switch"), options["gamma"]
    if how == "switch":
        return float(successes > gamma)
    if how == "linear":
        return successes / judged
    assert how == "sigmoid", how
    return 1.0 / (1.0 + math.exp(-FEEDBACK_SLOPE * (successes - gamma) / judged))


KINDS: dict[str, Callable[[GatedGroup, Setting], tuple[Row, ...]]] = {
    "rollouts": _rollouts,
    "demonstrations": _demonstrations,
    "append": _append,
    "ssi": _replace,
    "switch": _switch,
}


def _unverified(rows: tuple[Row, ...], gated: GatedGroup, advantage: str) -> bool:
    """Sampled answers with too few verdicts to learn from."""
    enough = 2 if advantages.needs_group(advantage) else min(2, len(gated.judgements))
    return any(row.source is Source.POLICY for row in rows) and bool(gated.judged.sum() < enough)


def _filtered(rows: tuple[Row, ...], options: Mapping[str, Any]) -> bool:
    """DAPO's filter: sampled answers alone, whose rewards are all the same."""
    if options.get("filter", "none") == "none" or any(row.source is Source.TEACHER for row in rows):
        return False
    assert options["filter"] == "zero_variance", options["filter"]
    return len({row.reward for row in rows if row.judged}) < 2


def outside_band(gated: GatedGroup, options: Mapping[str, Any]) -> bool:
    """Whether the mean reward of the judged sampled answers lies outside [band_low, band_high], None being no bound: a
    prompt too hard or too easy to be worth its step. A teacher makes no difference."""
    low, high = options.get("band_low"), options.get("band_high")
    if (low is None and high is None) or not gated.judgements or not gated.judged.any():
        return False
    mean = gated.rewards[gated.judged].mean()
    return bool((low is not None and mean < low - ROUNDING) or (high is not None and mean > high + ROUNDING))


# --------------------------------------------------------------------------------------------------------------------
# With which advantage


def _with_advantages(
    rows: tuple[Row, ...], gated: GatedGroup, name: str, over: str, options: Mapping[str, Any], apart: bool
) -> tuple[Row, ...]:
    """apart: a demonstration is a branch of its own. It is then compared with nothing, like one that is alone."""
    rollouts = tuple(row for row in rows if row.source is Source.POLICY)
    if apart or not rollouts:
        alone = tuple(replace(row, advantage=1.0) for row in rows if row.source is Source.TEACHER)
        return _valued(rollouts, _advantages(name, rollouts, options)) + alone
    values = _advantages(name, rows, options)
    if over == "rollouts":
        before = _advantages(name, _rollouts(gated, Setting(options)), options)
        values = np.concatenate([before[[row.index for row in rollouts]], values[len(rollouts) :]])
    return _valued(rows, values)


def _valued(rows: tuple[Row, ...], values: np.ndarray) -> tuple[Row, ...]:
    return tuple(replace(row, advantage=float(value)) for row, value in zip(rows, values, strict=True))


def _advantages(name: str, rows: tuple[Row, ...], options: Mapping[str, Any]) -> np.ndarray:
    """[rows]. The penalty of over-long answers is added to the reward; to the advantage itself, unless that is 0, where
    it asks for nothing but success."""
    if not rows:
        return np.zeros(0)
    how = advantages.of(name)
    rewards, judged = np.array([row.reward for row in rows]), [row.judged for row in rows]
    penalties = np.array([overlong_penalty(row, options) for row in rows])
    known = {k: options[k] for k in advantages.options(name) if k in options}
    if how.whole_batch:
        name, known = "return", {}
    if not how.asks_success:
        return np.asarray(advantages.compute(name, rewards + penalties, judged, **known))
    values = np.asarray(advantages.compute(name, rewards, judged, **known))
    return np.where(values == 0, 0.0, values + penalties)


def overlong_penalty(row: Row, options: Mapping[str, Any]) -> float:
    """DAPO's: 0 up to (1 - overlong) l_max tokens, from there falling linearly to -1 at l_max. Sampled answers only."""
    share = options.get("overlong", 0.0)
    if not share or row.source is not Source.POLICY:
        return 0.0
    margin = share * options["l_max"]
    return -min(1.0, max(0.0, (row.length - (options["l_max"] - margin)) / margin))


# --------------------------------------------------------------------------------------------------------------------
# Which of them stay


def _keep_paired(rows: tuple[Row, ...], options: Mapping[str, Any]) -> tuple[Row, ...]:
    """Rows of the policy in a preference pair; a row in none is not trained."""
    rollouts = [row for row in rows if row.source is Source.POLICY and row.length > 0]
    pairs = match_pairs([row.reward if row.judged else math.nan for row in rollouts], options["pairs"])
    paired = {i for pair in pairs for i in pair}
    return tuple(row for i, row in enumerate(rollouts) if i in paired)


def _keeping(stays: Callable[[Row], bool]) -> Callable[[tuple[Row, ...], Mapping[str, Any]], tuple[Row, ...]]:
    return lambda rows, options: tuple(row for row in rows if row.source is Source.TEACHER or stays(row))


KEEPS: dict[str, Callable[[tuple[Row, ...], Mapping[str, Any]], tuple[Row, ...]]] = {
    "all": lambda rows, options: rows,
    "judged": _keeping(lambda row: row.judged),
    "nonzero": _keeping(lambda row: row.advantage != 0),
    "paired": _keep_paired,
}
