"""Mathematical equality of a response's final answer and the truth.

The final answer is the last ``\\boxed{}``; without one, what follows the last ``#### ``, ``A: `` or ``answer is``;
without these, the whole response if it is one short line. Numbers and plain fractions are compared exactly and cost
microseconds; everything else goes to Math-Verify (sympy), which is loaded on first need. Math-Verify's own time limits
are SIGALRM and are switched off: the process pool is the deadline.

An answer is refused as wrong, whatever sympy makes of it, when it claims more than the truth: ``41=42`` for 42, a chain
of equalities, ``\\neq 42``. ``x=42`` is allowed: a name, then one value.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hapo_async.types import Verdict
from hapo_async.verify import boxed

# Called with True before sympy is loaded and with False after, so that a worker can stop its deadline clock.
loading_hook: Callable[[bool], None] | None = None

_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_LABEL = re.compile(
    r"(?:^|\n)[ \t]*[*_#> ]*(?:A|(?:The[ \t]+)?(?:[Ff]inal[ \t]+)?[Aa]nswer)[*_]*[ \t]*[:：][*_]*[ \t]*([^\n]+)"
)
_IS = re.compile(r"answer(?:\s+to\s+[^.\n]{1,80})?\s+is\s*:?[*_]*\s*([^\n]+)", re.IGNORECASE)
_DOLLARS = re.compile(r"\$([^$\n]*[^$\n\\])\$")
_PARENS = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]")

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d*)?(?:[eE][-+]?\d{1,3})?")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(-?[\d.]+)\}\{(-?[\d.]+)\}|([\d.]+)/([\d.]+))")
_UNIT = re.compile(r"(?:\\text|\\mathrm|\\mbox|\\textbf)\{[^{}]*\}(?:\^\{?\d\}?)?$|\^\{?\\circ\}?$|\\?%$|\\degree$")
_WORDS = re.compile(r"(?<=\d)\s+[A-Za-z]{3,}(?:[ -][A-Za-z]+)*$")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\{([^{}]*)\}")
_NAME = (
    r"(?:[A-Za-z]|\\[a-zA-Z]+|\\?(?:text|mathrm)\{[^{}]*\})"  # x, \theta, \text{area}
    r"(?:_(?:\w|\{[^{}]*\}))?(?:\([A-Za-z](?:,[A-Za-z])*\))?'?"  # x_1, f(x), f'
)
_ASSIGNMENT = re.compile(rf"(?:{_NAME}|\({_NAME}(?:,{_NAME})+\))=([^=]+)")
_RELATION = re.compile(r"=|<|>|\\(?:neq?|leq?|geq?|lt|gt|approx|equiv|sim|ne|le|ge)(?![a-zA-Z])|≠|≤|≥|≈")
_NOT_EQUAL = re.compile(r"\\neq?(?![a-zA-Z])|≠|!=|\\approx|≈|\\not")


def verdict(response: str, truth: Any) -> Verdict:
    """Judges the final answer of ``response``; an empty truth is judged wrong only by an honest mistake upstream, so it
    raises ValueError."""
    golds = boxed.truths(truth)
    if not golds:
        raise ValueError("there is no truth to compare with")
    answer = final_answer(response)
    if answer is None:
        return Verdict.UNPARSEABLE
    outcomes = [_compare(answer, gold) for gold in golds]
    if any(outcome is True for outcome in outcomes):
        return Verdict.CORRECT
    return Verdict.UNPARSEABLE if all(outcome is None for outcome in outcomes) else Verdict.WRONG


def final_answer(response: str) -> str | None:
    """The text of the final answer, or None when the response does not mark one."""
    if boxed.has_box(response):
        return boxed.last_boxed(response) or None
    marked = [m for pattern in (_HASHES, _LABEL, _IS) for m in _last(pattern, response)]
    if marked:
        return _clean_line(max(marked, key=lambda m: m.start(1)).group(1)) or None
    line = response.strip()
    if line and "\n" not in line and len(line) <= 200:
        return _clean_line(line) or None
    return None


def _last(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    found = list(pattern.finditer(text))
    return found[-1:]


def _clean_line(line: str) -> str:
    """Takes the mathematics out of a line of prose: ``**$\\frac12$.**`` is ``\\frac12``."""
    line = re.split(r"\.\s+[A-Z]", line.strip())[0]
    math_part = _DOLLARS.search(line) or _PARENS.search(line)
    if math_part:
        return next(g for g in math_part.groups() if g).strip()
    return line.strip(" \t*_`").rstrip(".").strip(" \t*_`")


# --------------------------------------------------------------------------------------------------------------------
# Comparing


def _compare(answer: str, gold: str) -> bool | None:
    """True, False, or None when the answer cannot be read."""
    a, g = normalise(answer), normalise(gold)
    if not a:
        return None
    if a == g:
        return True
    if (choice := _same_text(answer, gold)) is not None:
        return choice
    value_a, value_g = _without_name(a), _without_name(g)
    number_g = number(_without_words(value_g, gold))
    if not _honest(value_a, value_g, number_g is not None):
        return False
    number_a = number(_without_words(value_a, answer))
    if number_a is not None and number_g is not None:
        return _close(number_a, number_g, exact=not (_is_decimal(value_a) or _is_decimal(value_g)))
    if value_a == value_g:
        return True
    return _sympy_equal(_value(answer, value_a != a), _value(gold, value_g != g))


@functools.lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """One spelling for what is only typography, without any spaces: for comparing texts, not for parsing."""
    return re.sub(r"\s+", "", clean(text))


def clean(text: str) -> str:
    """Takes off ``\\left``, ``\\,``, ``$`` and the like, writes ``\\dfrac`` as ``\\frac``; keeps spaces."""
    text = text.strip().rstrip(".").strip()
    text = re.sub(r"\\(?:left|right|displaystyle|limits|q?quad)(?![a-zA-Z])|\\[!,;: ]|(?<!\\)\$|~", " ", text)
    text = re.sub(r"\\[dtc]frac(?![a-zA-Z])", r"\\frac", text)
    text = text.replace("\\$", "").replace("{,}", ",").replace("−", "-").replace("\\lbrace", "\\{")
    text = text.replace("\\rbrace", "\\}")
    text = re.sub(r"\\frac\s*(\\[a-zA-Z]+|\w)", r"\\frac{\1}", text)
    text = re.sub(r"(\\frac\{[^{}]*\})\s*(\\[a-zA-Z]+|\w)", r"\1{\2}", text)
    return text.strip()


def _value(text: str, is_named: bool) -> str:
    """What Math-Verify gets: the clean text, without the name before the equality sign where there is one."""
    text = clean(text)
    return text.split("=", 1)[1].strip() if is_named else text


def number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or plain fraction, a unit after it ignored; else None."""
    if len(text) > 200:
        return None
    text = _UNIT.sub("", text) if not text.startswith("\\text") else text
    if text and text not in "+-." and _NUMBER.fullmatch(text) and re.search(r"\d", text.split("e")[0].split("E")[0]):
        return Fraction(text.replace(",", "").rstrip(".") or "0")
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, *parts = match.groups()
    over, under = (_NUMBER.fullmatch(p) and p.rstrip(".") for p in parts if p)
    if not over or not under or Fraction(under) == 0:
        return None
    return Fraction(over) / Fraction(under) * (-1 if sign == "-" else 1)


def _without_words(value: str, text: str) -> str:
    """``18 apples`` is 18; ``3 n`` stays a product."""
    words = _WORDS.search(clean(text))
    return value.removesuffix(normalise(words.group())) if words else value


def _is_decimal(text: str) -> bool:
    return "." in text or "e" in text.lower().replace("\\degree", "")


def _close(a: Fraction, g: Fraction, exact: bool) -> bool:
    """Decimals agree to six places (relative below one); whole numbers and fractions exactly."""
    return a == g if exact else abs(a - g) <= Fraction(1, 10**6) * min(Fraction(1), abs(g))


def _without_name(text: str) -> str:
    """``x=5`` is 5: one name, one equality. Anything else stays."""
    match = _ASSIGNMENT.fullmatch(text)
    return match.group(1) if match else text


def _honest(answer: str, gold: str, gold_is_number: bool) -> bool:
    """Whether the answer claims no more relations than the truth does."""
    if gold_is_number and _RELATION.search(answer):
        return False
    if answer.count("=") != gold.count("=") and "=" in answer:
        return False
    return not (_NOT_EQUAL.search(answer) and not _NOT_EQUAL.search(gold))


def _same_text(answer: str, gold: str) -> bool | None:
    """Compares words and multiple-choice letters; None when the truth is neither."""
    word = _TEXT.sub(r"\1", gold).strip().strip("()").strip()
    given = _TEXT.sub(r"\1", answer).strip(" .$*")
    if re.fullmatch(r"[A-J]", word):
        choice = re.match(r"\(?([A-Ja-j])(?:[.:)]*$|[.:)]*\s)", given)
        return choice.group(1).upper() == word if choice else None
    is_text = "\\text" in gold and re.fullmatch(r"[A-Za-z][A-Za-z ,'-]*", word) is not None
    if not is_text and not re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]+)*", word):
        return None
    same = re.sub(r"[\s()]+", "", given).casefold() == re.sub(r"[\s()]+", "", word).casefold()
    return same or (False if is_text else None)


# --------------------------------------------------------------------------------------------------------------------
# sympy


@functools.cache
def _math_verify() -> Any:
    """The Math-Verify module, ready to parse; loading it takes a second."""
    if loading_hook:
        loading_hook(True)
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
    math_verify.parse("$1$", parsing_timeout=None)  # builds the grammar, most of the first judgement's time
    if loading_hook:
        loading_hook(False)
    return math_verify


@functools.lru_cache(maxsize=16384)
def _parse_gold(text: str) -> tuple[Any, ...]:
    return tuple(_parse(text))


def _parse(text: str) -> list[Any]:
    mv = _math_verify()
    return mv.parse(f"${text}$", extraction_config=[mv.LatexExtractionConfig()], parsing_timeout=None)


def _sympy_equal(answer: str, gold: str) -> bool | None:
    golds = _parse_gold(gold)
    if not golds:
        return False  # the truth is no mathematics: only the same text would have been right
    answers = _parse(answer)
    if not answers:
        return None
    return bool(_math_verify().verify(list(golds), answers, timeout_seconds=None))
