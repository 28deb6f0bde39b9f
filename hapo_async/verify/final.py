"""Where a response states its final answer, and what else it states.

Only the last 4,096 characters are read; what a model thinks before ``</think>`` is no answer where one follows. The
final answer is the last ``\\boxed{}``; without one, what follows the last ``#### ``, ``A: `` or ``answer is``; without
these, the whole response if it is one short line. Everything else that is marked as an answer is kept beside it: a
response that answers twice must be right twice.

All patterns run in time linear in the text; runs of spaces are taken in one piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hapo_async.verify import boxed, context, units

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
_SENTENCE = re.compile(r"\.\s+[A-Z]|,?\s(?:because|since)\s")
_PLACEHOLDER = re.compile(
    r"(?:\\text\{)?(?:(?:your |the |final ){0,3}(?:answer|result)|\.\.\.|\\[lc]?dots|…|_+|\?)?\}?", re.IGNORECASE
)
_PLAIN = re.compile(r"\\?\$?[ \t]*[-+−]?[0-9][0-9.,/]*(?:[ \t]*(?:\\?%|[A-Za-z]+(?:[ \t][A-Za-z]+)?))?|\(?[A-J]\)?")
_DELIMITERS = re.compile(r"(?<!\\)\$|\\[()\[\]]")
_HAS_VALUE = re.compile(r"[0-9]|\\[a-z]|^\(?[A-J]\)?$|^[a-z]+$")
_WORDS = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")
_JOINED = re.compile(r"\b(?:or|and)\b")
_NUMBER_WORDS_TEXT = (
    "or and either text frac sqrt zero one two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty "
    "thirty forty fifty hundred thousand million half"
)
_NUMBER_WORDS = frozenset(_NUMBER_WORDS_TEXT.split())
_EQUAL = re.compile(r"[\s$]{0,8}=\s{0,8}(-?[0-9][0-9.,/]*)")
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
    if number and boxed.has_other(text):
        return Claims(None, (), "a box of another kind")
    marked = list(_marks(text))
    if number:
        return _of_boxes(text, marked)
    if marked:
        last = max(marked, key=lambda mark: mark.start)
        return _checked(text, last, [m.statement for m in marked if m is not last and m.statement], False)
    line = text.strip()
    if line and "\n" not in line and len(line) <= 200:
        return _checked(text, _mark(text, text.index(line), line), [], False)
    return Claims(None)


def _of_boxes(text: str, marked: list[_Mark]) -> Claims:
    boxes = [_Mark(*box) for box in boxed.spans(text)]
    stated = [box for box in boxes if box.text is not None and not _PLACEHOLDER.fullmatch(box.text)]
    for box in stated[:-1]:
        if reason := context.objection(text, box.start, box.end, True):
            return Claims(box.text, (), reason)
    beside = [box.text for box in boxes[:-1] if box in stated]
    within = [mark for mark in marked if any(box.start < mark.start < box.end for box in boxes)]
    beside += [mark.statement for mark in marked if mark.statement and mark not in within]
    beside += [equal.group(1) for box in stated if (equal := _EQUAL.match(text, box.end))]
    return _checked(text, boxes[-1], beside, True)


def _checked(text: str, final: _Mark, beside: Sequence[str | None], is_box: bool) -> Claims:
    if not final.text:
        return Claims(None)
    if reason := context.objection(text, final.start, final.end, is_box):
        return Claims(final.text, (), reason)
    others = tuple(dict.fromkeys(line for line in beside if line and line != final.text))
    if len(others) >= MOST_CLAIMS:
        return Claims(final.text, (), f"{len(others) + 1} different answers")
    return Claims(final.text, others)


@dataclass(frozen=True)
class _Mark:
    """An answer with where it starts and ends. statement: what its line states, "" where that is prose."""

    start: int
    end: int
    text: str | None
    statement: str = ""


def _marks(text: str) -> Iterator[_Mark]:
    """Each line that says that it states an answer; of a line with a box, what is stated before that."""
    # "A: 3" is an option where a "B:" follows.
    labels = (_HASHES, _LATER_LABEL, _IS) if _OPTION.search(text) else (_HASHES, _LATER_LABEL, _LABEL, _IS)
    for pattern in labels:
        for found in pattern.finditer(text):
            line = found.group(1)
            if not boxed.has_box(line):
                yield _mark(text, found.start(1), line)
            elif claim := _BEFORE_BOX.match(line):
                yield _Mark(found.start(1), found.start(1) + claim.end(1), claim.group(1), claim.group(1))


def _mark(text: str, start: int, line: str) -> _Mark:
    """Takes the mathematics out of a line of prose: ``**$\\frac12$.**`` is ``\\frac12``."""
    sentence = _SENTENCE.split(line, maxsplit=1)[0]
    end = start + len(sentence.rstrip())
    if statement := _statement(sentence):
        claim = statement if "," in statement or _JOINED.search(statement) else statement.rpartition("=")[2].strip()
        return _Mark(start + len(sentence) - len(sentence.lstrip()), end, statement, claim)
    for opening, closing in (("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        at, inside = _between(sentence, opening, closing)
        if inside.strip():
            return _Mark(start + at, start + at + len(inside), inside.strip())
    return _Mark(start + len(sentence) - len(sentence.lstrip()), end, _without_stop(sentence))


def _without_stop(sentence: str) -> str:
    text = sentence.strip(" \t*_`")
    return (text if text.endswith("..") else text.rstrip(".")).strip(" \t*_`")


def _statement(sentence: str) -> str:
    """The sentence if it is an answer and nothing else: mathematics, numbers in words, ``or`` and ``and``; else ""."""
    text = _without_stop(_DELIMITERS.sub(" ", sentence))
    if not text or len(text) > 120 or not _HAS_VALUE.search(text):
        return ""
    value, _ = units.split(text)
    return text if all(word.lower() in _NUMBER_WORDS for word in _WORDS.findall(value)) else ""


def _between(line: str, opening: str, closing: str) -> tuple[int, str]:
    """(where, what) stands between the first pair of marks with something in between; "" without one. ``\\$`` is an
    amount."""
    at = line.find(opening)
    while at >= 0:
        start = at + len(opening)
        end = line.find(closing, start)
        if end < 0:
            break
        inside = line[start:end]
        if inside.strip() and not inside.endswith("\\"):
            return start, inside
        at = line.find(opening, end)
    return 0, ""
