"""What is on its way between issue and buffer, and what was seen of it since the last step."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hapo_async.types import Prompt

GENERATING, MOVING, VERIFYING = "generating", "moving", "verifying"
"""Stages of a flight; moving: between two generators."""


@dataclass
class Flight:
    """A group between issue and buffer. step: the version step it was issued under, a lower bound of its age. lengths: of
    its answers [tokens], once they are complete."""

    prompt: Prompt
    generator: str
    step: int
    started: float
    stage: str = GENERATING
    lengths: tuple[int, ...] | None = None


@dataclass
class Tally:
    """What happened since the last learner step; ``take`` hands it over and starts afresh. blocked_s: the bound held
    generators back while a full batch waited for the learner."""

    generated_tokens: int = 0
    generate_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)
    late: int = 0
    blocked_s: float = 0.0
    late_lengths: Counter[str] = field(default_factory=Counter)
