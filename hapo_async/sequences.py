"""What of a group trains: its rows as the driver plans them, and their tokens as a learner rank packs them.

A ``TrainGroup`` travels without the answers' tokens; ``materialise`` runs where the payload has been fetched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hapo_async.types import Group, GroupKey, Source, Teacher


@dataclass(frozen=True)
class Row:
    """One response that trains. index: into the group's answers (POLICY) or the prompt's teachers (TEACHER). length:
    trained tokens. advantage: of every token of the row. weight: the learner-side weight of its tokens."""

    source: Source
    index: int
    length: int
    reward: float
    judged: bool
    advantage: float
    weight: float = 1.0


@dataclass(frozen=True)
class TrainGroup:
    """A group as the learner trains it. ``payload`` refers to the Group and is None where no sampled answer trains;
    then ``prompt_tokens`` int32 [Tp] is here. ``temperature`` is the rollouts' own where the prompt names it.
    ``logp_ref``: by answer, the reference's log-probs float32 [T] of its trained tokens, where they were kept."""

    key: GroupKey
    payload: Any
    prompt_length: int
    prompt_tokens: np.ndarray | None
    teacher: Teacher | None
    rows: tuple[Row, ...]
    confidence: float
    temperature: float
    logp_ref: tuple[np.ndarray, ...] | None = None

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
    ``group_size`` counts the rollouts of its group in the whole mini-batch. ``logp_ref``: see TrainGroup."""

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
    weight: float = 1.0
    logp_ref: np.ndarray | None = None


def with_teacher(train: TrainGroup, teachers: tuple[Teacher, ...], index: int) -> TrainGroup:
    """The group with another of the prompt's demonstrations in the place of its own."""
    length = len(teachers[index].tokens)
    rows = tuple(replace(r, index=index, length=length) if r.source is Source.TEACHER else r for r in train.rows)
    return replace(train, rows=rows, teacher=teachers[index])


def demonstration(train: TrainGroup, prompt_tokens: np.ndarray) -> Sequence:
    """The tokens of a group's teacher alone, without its answers. Raises ValueError where it has none."""
    for row in train.rows:
        if row.source is Source.TEACHER:
            return _sequence(row, replace(train, payload=None, prompt_tokens=prompt_tokens), None, 0)
    raise ValueError(f"group {train.key} has no teacher")


def materialise(train: TrainGroup, group: Group | None, *, index: int = 0) -> list[Sequence]:
    """The rows' tokens. ``group`` is the fetched payload, None where the train group has none. ``index`` becomes
    ``Sequence.group``. Raises ValueError when the payload is missing or another group's."""
    if train.payload is not None and group is None:
        raise ValueError(f"group {train.key} trains sampled answers but came without its payload")
    if group is not None and group.key != train.key:
        raise ValueError(f"group {train.key} came with the payload of {group.key}")
    return [_sequence(row, train, group, index) for row in train.rows]


def to_score(prompt_tokens: np.ndarray, tokens: np.ndarray, sources: np.ndarray | None = None) -> Sequence:
    """A response that is only scored, at temperature 1. sources int8 [T]: tokens that would not train are not scored;
    all are the policy's when not given."""
    count = len(tokens)
    return Sequence(
        prompt_tokens=np.asarray(prompt_tokens, np.int32),
        tokens=np.asarray(tokens, np.int32),
        sources=np.full(count, int(Source.POLICY), np.int8) if sources is None else sources,
        logp_behave=np.full(count, np.nan, np.float32),
        version_steps=np.full(count, -1, np.int32),
        advantage=0.0,
        reward=0.0,
        judged=False,
        is_teacher=False,
        temperature=1.0,
        group=0,
        confidence=0.0,
    )


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
        weight=row.weight,
        logp_ref=None if train.logp_ref is None or row.source is Source.TEACHER else train.logp_ref[row.index],
    )
