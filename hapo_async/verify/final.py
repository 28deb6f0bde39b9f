"""Where a response states its final answer, and what else it states.

Only the last 4,096 characters are read; what a model thinks before ``</think>`` is no answer where one follows. The
final answer is the last ``\\boxed{}``; without one, what follows the last ``#### ``, ``A: `` or ``answer is``; without
these, the whole response if it is one short line. Everything else that is marked as an answer is kept beside it: a
response that answers twice must be right twice.

All patterns run in time linear in the text; runs of spaces are taken in one piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hapo_async.verify import boxed

TAIL = 4096
MOST_BOXES = 8  # a response that boxes more is fishing, or loops
MOST_CLAIMS = 4  # different ones

_THOUGHT = "</think>"
_HASHES = re.compile(r"#{4,}[ \t]*(?=([^\n]{1,1000}))")
_LABEL = re.compile(
    r"(?:^|\n)[ \t*_#>]*(?:A|(?:The[ \t]+)?(?:[Ff]inal[ \t]+)?[Aa]nswer)[*_]*[ \t]*[:：][*_]*[ \t]*([^\n]+)"
)
_LATER_LABEL = re.compile(
    r"[.!?;,][ \t*]{1,4}(?:The[ \t]+)?(?:[Ff]inal[ \t]+)?[Aa]nswer[*_]*[ \t]*[:：][*_]*[ \t]*(?=([^\n]{1,1000}))"
)
_OPTION = re.compile(r"\n[ \t*_#>]*B[*_]*[ \t]*[:：]")
_IS = re.compile(
    r"answer(?:[ \t]{1,4}to[ \t]{1,4}[^.\n]{1,80}?)?[ \t\n]{1,4}is\b[ \t]*:?[*_]*[ \t\n]{0,8}(?=([^\n]{1,1000}))",
    re.IGNORECASE,
)
_SENTENCE = re.compile(r"\.\s+[A-Z]")
_PLACEHOLDER = re.compile(
    r"(?:\\text\{)?(?:(?:your |the |final ){0,3}(?:answer|result)|\.\.\.|\\[lc]?dots|…|_+|\?)?\}?", re.IGNORECASE
)
_PLAIN = re.compile(r"\\?\$?[ \t]*[-+−]?[0-9][0-9.,/]*(?:[ \t]*(?:\\?%|[A-Za-z]+(?:[ \t][A-Za-z]+)?))?|\(?[A-J]\)?")
_BEFORE_BOX = re.compile(rf"[ \t*$]{{0,8}}({_PLAIN.pattern})[ \t*$]{{0,8}}[.,;]")


@dataclass(frozen=True)
class Claims:
    """answer: the final one, None when none is marked. others: what else is stated as an answer, as far as it differs.
    refusal: why nothing of it counts, or ""."""

    answer: str | None
    others: tuple[str, ...] = ()
    refusal: str = ""


def read(response: str) -> Claims:
    """The final answer of a response and what contradicts it."""
    text = response[-TAIL:]
    thought, mark, rest = text.rpartition(_THOUGHT)
    claims = _claims(rest)
    return _claims(thought) if mark and claims.answer is None and not claims.refusal else claims


def answer(response: str) -> str | None:
    """The text of the final answer, or None when the response does not mark one."""
    return read(response).answer


def _claims(text: str) -> Claims:
    number = boxed.count(text)
    if number > MOST_BOXES:
        return Claims(None, (), f"{number} boxes")
    marked = list(_marks(text))
    if number:
        boxes = boxed.contents(text)
        beside = [b for b in boxes[:-1] if b is not None and not _PLACEHOLDER.fullmatch(b)]
        beside += [line for _, line in marked if _PLAIN.fullmatch(line)]
        return _checked(boxes[-1] or None, beside)
    if marked:
        last = max(marked)[1]
        return _checked(last or None, [line for _, line in marked if _PLAIN.fullmatch(line)])
    line = text.strip()
    if line and "\n" not in line and len(line) <= 200:
        return Claims(_clean_line(line) or None)
    return Claims(None)


def _checked(final: str | None, beside: list[str]) -> Claims:
    others = tuple(dict.fromkeys(line for line in beside if line != final))
    if len(others) >= MOST_CLAIMS:
        return Claims(final, (), f"{len(others) + 1} different answers")
    return Claims(final, others)


def _marks(text: str) -> Iterator[tuple[int, str]]:
    """(where, what) of each line that says that it states an answer; of a line with a box, what is stated before that."""
    # "A: 3" is an option where a "B:" follows.
    labels = (_HASHES, _LATER_LABEL, _IS) if _OPTION.search(text) else (_HASHES, _LATER_LABEL, _LABEL, _IS)
    for pattern in labels:
        for found in pattern.finditer(text):
            line = found.group(1)
            if not boxed.has_box(line):
                yield found.start(1), _clean_line(line)
            elif claim := _BEFORE_BOX.match(line):
                yield found.start(1), claim.group(1)


def _clean_line(line: str) -> str:
    """Takes the mathematics out of a line of prose: ``**$\\frac12$.**`` is ``\\frac12``."""
    line = _SENTENCE.split(line.strip(), maxsplit=1)[0]
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if inside := _between(line, opening, closing):
            return inside
    return line.strip(" \t*_`").rstrip(".").strip(" \t*_`")


def _between(line: str, opening: str, closing: str) -> str:
    """What stands between the first pair of marks with something in between; "" without one. ``\\$`` is an amount."""
    at = line.find(opening)
    while at >= 0:
        start = at + len(opening)
        end = line.find(closing, start)
        if end < 0:
            return ""
        inside = line[start:end].strip()
        if inside and not inside.endswith("\\"):
            return inside
        at = line.find(opening, end)
    return ""
