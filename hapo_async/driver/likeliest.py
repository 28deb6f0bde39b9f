"""The teacher that the policy finds likeliest, for each group of a batch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import replace

import numpy as np

from hapo_async import gate
from hapo_async.buffer import Ready
from hapo_async.sequences import Sequence as TokenSequence
from hapo_async.sequences import TrainGroup, demonstration, with_teacher

SCORED_AT_ONCE = 256  # sequences that travel with one call


async def choose_likeliest(
    groups: list[Ready], score: Callable[[list[TokenSequence]], Awaitable[list[np.ndarray]]]
) -> list[Ready]:
    """The groups, each teacher row with that demonstration of its prompt whose tokens have the highest mean log-prob
    (the first of equals). ``score`` gives the log-probs [T] of sequences under the policy; it is asked about prompts
    with a choice and no others."""
    choices: list[tuple[int, int, TrainGroup]] = []
    for place, group in enumerate(groups):
        teachers = group.gated.prompt.teachers
        usable = gate.usable_teachers(teachers) if group.train.teacher is not None else []
        if len(usable) > 1:
            choices += [(place, index, with_teacher(group.train, teachers, index)) for index in usable]
    if not choices:
        return groups
    asked = [demonstration(train, groups[place].gated.prompt.tokens) for place, _, train in choices]
    parts = [asked[start : start + SCORED_AT_ONCE] for start in range(0, len(asked), SCORED_AT_ONCE)]
    scores = [logp for part in parts for logp in await score(part)]
    out, best = list(groups), {place: -np.inf for place, _, _ in choices}
    for (place, index, train), logp in zip(choices, scores, strict=True):
        mean = float(np.mean(logp, dtype=np.float64))
        if mean > best[place]:
            best[place] = mean
            gated = groups[place].gated
            decided = gated.gate if gated.gate.teacher is None else replace(gated.gate, teacher=index)
            out[place] = Ready(replace(gated, gate=decided), train)
    return out
