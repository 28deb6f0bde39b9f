"""Who is being sampled, and how far: the groups in work, their running answers, and the numbers of each running row.

A row is one running answer; rows are compact, so that the numbers of the first R rows are arrays of length R.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from hapo_async.types import Answer, GroupRequest, Segment, Source, VersionSpan


@dataclass(eq=False)
class Job:
    """One group in work. answers: by index, None while unfinished. cap: tokens that an answer may have, if truncated."""

    request: GroupRequest
    answers: list[Answer | None]
    since: float
    cap: int | None = None

    @property
    def is_complete(self) -> bool:
        return all(a is not None for a in self.answers)

    @property
    def unfinished(self) -> list[int]:
        return [i for i, a in enumerate(self.answers) if a is None]

    def prefix(self, index: int) -> Answer | None:
        """What an unfinished answer resumes, where that has a token."""
        return next((a for a in self.request.prefixes if a.index == index and a.length), None)

    def resumed(self) -> list[Answer | None]:
        """By index: answers that the request brought and that need no sampling, None for the others."""
        longest = self.request.sampling.max_tokens
        out: list[Answer | None] = [None] * self.request.sampling.n
        for answer in self.request.prefixes:
            if answer.finish_reason != "abort":
                out[answer.index] = Answer(answer.index, answer.segments, answer.finish_reason)
            elif answer.length >= longest:
                out[answer.index] = Answer(answer.index, answer.segments, "length")
        return out

    @property
    def lengths(self) -> list[int]:
        """Tokens of each answer; of an unfinished one those of the prefix that the request came with."""
        prefixes = {a.index: a.length for a in self.request.prefixes}
        return [prefixes.get(i, 0) if a is None else a.length for i, a in enumerate(self.answers)]


@dataclass(eq=False)
class Row:
    """One running answer. history: prompt and resumed prefix. span_start: where the current version's tokens begin."""

    job: Job
    index: int
    history: np.ndarray
    prefix: Answer | None = None
    spans: list[VersionSpan] = field(default_factory=list)
    span_start: int = 0


@dataclass(frozen=True)
class Sampled:
    """A complete group: its answers by index (without text) and the seconds since it was added."""

    request: GroupRequest
    answers: tuple[Answer, ...]
    seconds: float

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each answer."""
        return tuple(a.length for a in self.answers)


def continued(index: int, prefix: Answer | None, segment: Segment | None, reason: str) -> Answer:
    """An answer of a resumed prefix and what was sampled after it. Of segments without tokens at most one is kept, where
    there is no other."""
    pieces = (prefix.segments if prefix else ()) + ((segment,) if segment else ())
    empty = Segment(Source.POLICY, np.zeros(0, np.int32), np.zeros(0, np.float32))
    return Answer(index, tuple(s for s in pieces if len(s.tokens)) or (empty,), reason)


class Columns:
    """Numbers per running row, as arrays that grow by doubling: [capacity] and, for what was sampled, [capacity, T]."""

    def __init__(self) -> None:
        self.feed = np.zeros(16, np.int64)  # the token that the next step reads
        self.done = np.zeros(16, np.int64)  # tokens sampled so far
        self.position = np.zeros(16, np.int64)  # of `feed` in the whole sequence
        self.offset = np.zeros(16, np.int64)  # length of the resumed prefix
        self.limit = np.zeros(16, np.int64)  # sampled tokens at which the answer ends
        self.noise = np.zeros(16, np.uint64)
        self.temperature = np.zeros(16, np.float64)
        self.top_p = np.zeros(16, np.float64)
        self.top_k = np.zeros(16, np.int64)
        self.tokens = np.zeros((16, 64), np.int32)
        self.logp = np.zeros((16, 64), np.float32)

    def grow(self, rows: int, width: int) -> None:
        """Makes room for ``rows`` rows of ``width`` sampled tokens."""
        for name, old in vars(self).items():
            shape = tuple(_doubled(size, needed) for size, needed in zip(old.shape, (rows, width), strict=False))
            if shape != old.shape:
                new = np.zeros(shape, old.dtype)
                new[tuple(slice(n) for n in old.shape)] = old
                setattr(self, name, new)

    def move(self, source: int, target: int) -> None:
        for array in vars(self).values():
            array[target] = array[source]


def _doubled(size: int, needed: int) -> int:
    while size < needed:
        size *= 2
    return size
