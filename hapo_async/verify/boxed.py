"""Exact match on the last ``\\boxed{}``."""

from __future__ import annotations

import re
from typing import Any

from hapo_async.types import Verdict

_COMMAND = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")
_BARE = re.compile(r"\s+([^\s$\\{}]+)")


def has_box(text: str) -> bool:
    """Whether a ``\\boxed`` occurs, finished or not."""
    return _COMMAND.search(text) is not None


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` (or ``\\fbox{...}``), braces balanced; None when there is none or the last
    one is not finished."""
    found = list(_COMMAND.finditer(text))
    if not found:
        return None
    rest = text[found[-1].end() :]
    if not rest.lstrip().startswith("{"):
        bare = _BARE.match(rest)
        return bare.group(1) if bare else None
    start = rest.index("{")
    depth = 0
    position = start
    while position < len(rest):
        character = rest[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return rest[start + 1 : position].strip()
        position += 1
    return None


def truths(truth: Any) -> list[str]:
    """The acceptable answers as text: numbers as people write them, ``\\boxed{}``, ``####`` and ``A:`` taken off."""
    if isinstance(truth, list | tuple):
        return [text for item in truth for text in truths(item)]
    if truth is None:
        return []
    if isinstance(truth, float) and truth.is_integer() and abs(truth) < 1e15:
        truth = int(truth)
    text = str(truth).strip()
    inner = last_boxed(text)
    if inner is not None:
        return [inner]
    for marker in ("####", "\nA:"):
        if marker in text:
            return [text.rsplit(marker, 1)[1].strip()]
    return [text]


def verdict(response: str, truth: Any) -> Verdict:
    """correct: the last box holds the truth, letter for letter (spaces around it and ``$`` aside)."""
    answer = last_boxed(response)
    if answer is None:
        return Verdict.UNPARSEABLE
    return Verdict.CORRECT if any(_bare(answer) == _bare(t) for t in truths(truth)) else Verdict.WRONG


def _bare(text: str) -> str:
    text = text.strip()
    return text[1:-1].strip() if len(text) > 2 and text[0] == text[-1] == "$" and "$" not in text[1:-1] else text
