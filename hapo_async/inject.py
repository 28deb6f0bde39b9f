"""Composition: which rows of a judged group train, and with which advantage; later, their tokens.

``compose`` runs in the driver on headers and rewards alone (no token payload but the teacher's own); ``materialise``
runs on a learner rank, which has fetched the payload. The SSI operator (seed 000) replaces an answer by the teacher's
trajectory; LUFFY appends it; HPT switches to it; SFT keeps nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hapo_async import advantage as advantages
from hapo_async import gate
from hapo_async.types import GatedGroup, Group, GroupKey, Source, Teacher

TEACHER_REWARD = 1.0
"""Only teachers that the verifier found correct are ever injected (``Teacher.rejected`` is None for no others)."""


@dataclass(frozen=True)
class Row:
    """One response that trains. index: into the group's answers (POLICY) or the prompt's teachers (TEACHER). length:
    trained tokens. advantage: of every token of the row."""

    source: Source
    index: int
    length: int
    reward: float
    judged: bool
    advantage: float


@dataclass(frozen=True)
class TrainGroup:
    """A group as the learner trains it. ``payload`` refers to the Group and is None where no sampled answer trains;
    then ``prompt_tokens`` int32 [Tp] is here. ``temperature`` is the rollouts' own where the prompt names it."""

    key: GroupKey
    payload: Any
    prompt_length: int
    prompt_tokens: np.ndarray | None
    teacher: Teacher | None
    rows: tuple[Row, ...]
    confidence: float
    temperature: float

    @property
    def tokens(self) -> int:
        """Prompt and response tokens over all rows: what a rank has to compute."""
        return sum(self.prompt_length + row.length for row in self.rows)

    @property
    def mask_tokens(self) -> int:
        """Trained tokens over all rows."""
        return sum(row.length for row in self.rows)

    @property
    def rollouts(self) -> int:
        """Rows that the policy sampled and that hold a token: this group's entry of ``TokenBatch.group_size``."""
        return sum(row.source is Source.POLICY and row.length > 0 for row in self.rows)


@dataclass(frozen=True)
class Sequence:
    """One response with its tokens. tokens int32 [T], sources int8 [T], logp_behave float32 [T] (NaN: none),
    version_steps int32 [T] (-1: none), temperature 1.0 for a teacher. ``group`` is the index that the packer gives;
    ``group_size`` counts the rollouts of its group in the whole mini-batch."""

    prompt_tokens: np.ndarray
    tokens: np.ndarray
    sources: np.ndarray
    logp_behave: np.ndarray
    version_steps: np.ndarray
    advantage: float
    reward: float
    judged: bool
    is_teacher: bool
    temperature: float
    group: int
    confidence: float
    group_size: int = 0


def compose(
    kind: str, gated: GatedGroup, advantage: str, *, advantage_group: str = "injected", options: Mapping[str, Any]
) -> TrainGroup | None:
    """The rows of a group that train, or None when nothing is left to train.

    kind: rollouts | demonstrations | append | ssi | switch (``Algorithm.composition``). advantage: a name of
    ``hapo_async.advantage``. advantage_group: ``injected`` computes it over the composed rows, ``rollouts`` over the
    sampled answers before injection (a teacher row, absent from those, keeps its advantage among the composed rows).
    Raises KeyError for an unknown kind.
    """
    rows = KINDS[kind](gated, options)
    sampled = any(row.source is Source.POLICY for row in rows)
    if not rows or (sampled and advantages.needs_group(advantage) and gated.judged.sum() < 2):
        return None
    rows = _with_advantages(rows, gated, advantage, advantage_group, options)
    teacher = next((row for row in rows if row.source is Source.TEACHER), None)
    sampling = gated.prompt.sampling
    return TrainGroup(
        key=gated.key,
        payload=gated.payload if sampled else None,
        prompt_length=len(gated.prompt.tokens),
        prompt_tokens=None if sampled else gated.prompt.tokens,
        teacher=gated.prompt.teachers[teacher.index] if teacher else None,
        rows=rows,
        confidence=gated.gate.confidence,
        temperature=sampling.temperature if sampled and sampling else 1.0,
    )


def materialise(train: TrainGroup, group: Group | None, *, index: int = 0) -> list[Sequence]:
    """The rows' tokens. ``group`` is the fetched payload, None where the train group has none. ``index`` becomes
    ``Sequence.group``. Raises ValueError when the payload is missing or another group's."""
    if train.payload is not None and group is None:
        raise ValueError(f"group {train.key} trains sampled answers but came without its payload")
    if group is not None and group.key != train.key:
        raise ValueError(f"group {train.key} came with the payload of {group.key}")
    return [_sequence(row, train, group, index) for row in train.rows]


# --------------------------------------------------------------------------------------------------------------------
# Which rows


def _rollouts(gated: GatedGroup, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """Every sampled answer. Unjudged ones stay, with advantage 0: no filter changes a denominator."""
    parts = zip(gated.header.lengths, gated.rewards, gated.judged, strict=True)
    return tuple(
        Row(Source.POLICY, i, length, float(reward), bool(judged), 0.0)
        for i, (length, reward, judged) in enumerate(parts)
    )


def _demonstrations(gated: GatedGroup, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """The teacher alone; nothing without one."""
    row = _teacher_row(gated)
    return (row,) if row else ()


def _append(gated: GatedGroup, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """LUFFY: the sampled answers and one teacher."""
    return _rollouts(gated, options) + _demonstrations(gated, options)


def _replace(gated: GatedGroup, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """HAPO's SSI operator: the teacher takes the place of the answer that the gate named."""
    rows = _rollouts(gated, options)
    teacher = _teacher_row(gated)
    if gated.gate.replaced is None or teacher is None:
        return rows
    return (*(row for row in rows if row.index != gated.gate.replaced), teacher)


def _switch(gated: GatedGroup, options: Mapping[str, Any]) -> tuple[Row, ...]:
    """HPT: the teacher alone where at most gamma answers were right (S <= gamma), else the sampled answers."""
    successes = gate.count_successes(gated.rewards, gated.judged)
    teacher = _demonstrations(gated, options)
    return teacher if teacher and successes <= options["gamma"] else _rollouts(gated, options)


KINDS: dict[str, Callable[[GatedGroup, Mapping[str, Any]], tuple[Row, ...]]] = {
    "rollouts": _rollouts,
    "demonstrations": _demonstrations,
    "append": _append,
    "ssi": _replace,
    "switch": _switch,
}


def _teacher_row(gated: GatedGroup) -> Row | None:
    """The gate's teacher; where the gate named none, the one that (prompt, epoch) picks."""
    teachers = gated.prompt.teachers
    index = gated.gate.teacher
    if index is None:
        index = gate.choose_teacher(teachers, "seeded", gate.seed_of(gated.key))
    if index is None or teachers[index].rejected is not None or not len(teachers[index].tokens):
        return None
    return Row(Source.TEACHER, index, len(teachers[index].tokens), TEACHER_REWARD, True, 0.0)


def _with_advantages(
    rows: tuple[Row, ...], gated: GatedGroup, name: str, over: str, options: Mapping[str, Any]
) -> tuple[Row, ...]:
    if len(rows) == 1 and rows[0].source is Source.TEACHER:
        return (_with(rows[0], 1.0),)  # a lone demonstration
    known = {k: v for k, v in options.items() if k in advantages.options(name)}
    values = advantages.compute(name, [r.reward for r in rows], [r.judged for r in rows], **known)
    if over == "rollouts":
        before = advantages.compute(name, gated.rewards, gated.judged, **known)
        values = [before[r.index] if r.source is Source.POLICY else v for r, v in zip(rows, values, strict=True)]
    return tuple(_with(row, float(value)) for row, value in zip(rows, values, strict=True))


def _with(row: Row, advantage: float) -> Row:
    return Row(row.source, row.index, row.length, row.reward, row.judged, advantage)


# --------------------------------------------------------------------------------------------------------------------
# Their tokens


def _sequence(row: Row, train: TrainGroup, group: Group | None, index: int) -> Sequence:
    if row.source is Source.TEACHER:
        assert train.teacher is not None
        tokens = train.teacher.tokens
        sources = np.full(len(tokens), int(Source.TEACHER), np.int8)
        logp_behave = np.full(len(tokens), np.nan, np.float32)
        version_steps = np.full(len(tokens), -1, np.int32)
    else:
        assert group is not None
        answer = group.answers[row.index]
        tokens, sources = answer.tokens, answer.sources
        logp_behave, version_steps = answer.logp_behave, answer.version_steps
    prompt = train.prompt_tokens if group is None else group.prompt_tokens
    assert prompt is not None
    return Sequence(
        prompt_tokens=np.asarray(prompt, np.int32),
        tokens=np.asarray(tokens, np.int32),
        sources=sources,
        logp_behave=logp_behave,
        version_steps=version_steps,
        advantage=row.advantage,
        reward=row.reward,
        judged=row.judged,
        is_teacher=row.source is Source.TEACHER,
        temperature=1.0 if row.source is Source.TEACHER or group is None else group.temperature,
        group=index,
        confidence=train.confidence,
        group_size=train.rollouts,
    )
