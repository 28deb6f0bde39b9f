"""What stands in ``\\boxed{}``, and exact match on the last one."""

from __future__ import annotations

import re
from typing import Any

from hapo_async.types import Verdict

_COMMAND = re.compile(r"\\f?box(?:ed)?(?![a-zA-Z])")
_BARE = re.compile(r"\s+([^\s$\\{}]+)|([0-9])(?![0-9])")
_OTHER = re.compile(r"\\(?!f?box|[mhl]box|makebox|raisebox)[a-zA-Z]*box(?:ed)?(?![a-zA-Z])")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)


def has_box(text: str) -> bool:
    """Whether a ``\\boxed`` occurs, finished or not."""
    return _COMMAND.search(text) is not None


def has_other(text: str) -> bool:
    """Whether something is boxed by another command: ``\\framebox``, ``\\colorbox``."""
    return _OTHER.search(text) is not None


def count(text: str) -> int:
    """How many there are, nested ones too."""
    return sum(1 for _ in _COMMAND.finditer(text))


def last_boxed(text: str) -> str | None:
    """Content of the last ``\\boxed{...}`` (or ``\\fbox{...}``), braces balanced; None when there is none or the last
    one is not finished."""
    end = max((found.end() for found in _COMMAND.finditer(text)), default=None)
    return None if end is None else _content(text, end)[0]


def contents(text: str) -> list[str | None]:
    """All boxes in order, None for one that is not finished. A box within a box belongs to the outer one, which is read
    without the inner command."""
    return [inner for _, _, inner in spans(text)]


def spans(text: str) -> list[tuple[int, int, str | None]]:
    """As ``contents``, with where each box starts and ends."""
    out: list[tuple[int, int, str | None]] = []
    end = 0
    for found in _COMMAND.finditer(text):
        if found.start() < end:
            continue
        inner, end = _content(text, found.end())
        out.append((found.start(), end, None if inner is None else _COMMAND.sub("", inner).strip()))
    return out


def _content(text: str, start: int) -> tuple[str | None, int]:
    """(what follows the command that ends at ``start``, where that ends)."""
    opening = start
    while opening < len(text) and text[opening].isspace():
        opening += 1
    if opening == len(text) or text[opening] != "{":
        bare = _BARE.match(text, start)
        return (bare.group(1) or bare.group(2), bare.end()) if bare else (None, start)
    depth = 0
    for brace in _BRACE.finditer(text, opening):
        if brace.group() == "{":
            depth += 1
        elif brace.group() == "}":
            depth -= 1
            if depth == 0:
                return text[opening + 1 : brace.start()].strip(), brace.end()
    return None, start


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
