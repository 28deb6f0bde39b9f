"""Mathematical equality of a response's final answer and the truth, strict against answers that only look right.

Numbers and plain fractions are compared exactly and cost microseconds; everything else goes to Math-Verify (sympy),
which is loaded on first need. Math-Verify's own time limits are SIGALRM and are switched off: the process pool is the
deadline.

Strict: a response states one final answer (``verify.final``), and where it states several all must be right. Where the
truth is a number, the answer must be one number: digits, operators and functions, a unit after it, a name before it
(``x=42``). No relation (``41=42``), negation (``\\neq 42``), list, set or interval, no letters that cancel, no words that
widen it (``42 or 43``). Where it is something else, the answer may hold no relation, negation or alternative that the
truth has not.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

from hapo_async.types import Verdict
from hapo_async.verify import final, refuse, truth
from hapo_async.verify.spelling import bare, clean, is_decimal, normalise, number, without_unit

# Called with True before sympy is loaded and with False after, so that a worker can stop its deadline clock.
loading_hook: Callable[[bool], None] | None = None

_NAME = (
    r"(?:[A-Za-z]|[A-Z]{2,4}|\\[a-zA-Z]+|\\?(?:text|mathrm)\{[A-Za-z ]*\})"  # x, \theta, \text{area}
    r"(?:_(?:\w|\{[^{}]*\}))?(?:\([A-Za-z0-9]{1,3}(?:,[A-Za-z])*\))?'?"  # x_1, f(x), f(3), f'
)
_ASSIGNMENT = re.compile(rf"(?:{_NAME}|\({_NAME}(?:,{_NAME})+\))=([^=]+)")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox|textit)\{([^{}]*)\}")
_ORDER = re.compile(r"\\(?:leqslant|geqslant|leqq?|geqq?|le|ge|lt|gt)(?![a-zA-Z])|[<>≤≥]")
_SET = re.compile(r"\\(?:cup|cap|infty|in|mathbb|emptyset|varnothing|setminus|pm|mp)(?![a-zA-Z])|\\\{|[∪∩∞±]")
_SET_SIGNS = re.compile(r"\\(?:in|cup|pm|mp|lor|vee|land|wedge|mid|setminus)(?![a-zA-Z])|[∈∪±∨∧]")
_BETWEEN = re.compile(r",|\\text\{\s{0,9}(?:or|and)\s{0,9}\}|\s(?:or|and)\s")
_REPEATING = re.compile(r"(\.[0-9]*)\\overline\{[0-9]+\}")
_NUMERIC = re.compile(
    r"(?:\\(?:frac|sqrt|cdot|times|div|pi|log|ln|lg|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|exp|binom|"
    r"[lr]floor|[lr]ceil|circ|degree)(?![a-zA-Z])|[-0-9+*/^(){}\[\].!|_πei√×÷·²³\s]|(?<=[0-9]),(?=[0-9]{3}(?![0-9])))+"
)

Outcome = tuple[bool | None, str]
"""(True, False, or None when the answer cannot be read; why)."""


def judge(response: str, gold: Any) -> tuple[Verdict, str]:
    """The verdict on a response and, where there is one, its reason. Raises Poisoned for a truth that nothing can be
    compared with."""
    golds = truth.usable(gold)
    claims = final.read(response)
    if claims.refusal:
        return Verdict.WRONG, f"refused: {claims.refusal}"
    if claims.answer is None:
        return Verdict.UNPARSEABLE, ""
    outcome, why = _best(claims.answer, golds)
    if outcome is not True:
        return Verdict.UNPARSEABLE if outcome is None else Verdict.WRONG, why
    for other in claims.others:
        if _best(other, golds)[0] is not True:
            return Verdict.WRONG, f"refused: {claims.answer[:40]!r} is right, but {other[:40]!r} is stated as well"
    return Verdict.CORRECT, ""


def verdict(response: str, gold: Any) -> Verdict:
    """As ``judge``, without the reason."""
    return judge(response, gold)[0]


final_answer = final.answer


def _best(answer: str, golds: list[str]) -> Outcome:
    """By the truth that fits best."""
    worst: Outcome = (None, "")
    for gold in golds:
        outcome, why = _compare(answer, gold)
        if outcome:
            return True, ""
        if worst[0] is None:
            worst = (outcome, why or worst[1])
    return worst


def _compare(answer: str, gold: str) -> Outcome:
    if reason := refuse.limits(answer, gold) or refuse.characters(answer, gold):
        return False, f"refused: {reason}"
    spaced = clean(answer)
    a, g = normalise(answer), normalise(gold)
    if not a:
        return None, ""
    if refuse.split_digits(spaced) and not refuse.split_digits(clean(gold)):
        return False, "refused: digits with spaces between"
    if g in (a, _TEXT.sub(r"\1", a)):
        return True, ""
    if (choice := _same_text(answer, gold)) is not None:
        return choice, ""
    value = _without_name(bare(gold))
    if (number_g := number(normalise(without_unit(value)))) is not None:
        return _equals_number(answer, number_g, value, gold)
    if refuse.items(gold) > 1 and (values := _named_list(spaced)) and not refuse.hedges(values, gold):
        return _sympy_equal(values, _value(gold, False)), ""
    if reason := _deceives(answer, gold):
        return False, f"refused: {reason}"
    value_a, value_g = _without_name(a), _without_name(g)
    if value_a == value_g:
        return True, ""
    return _sympy_equal(_value(answer, value_a != a), _value(gold, value_g != g)), ""


def _value(text: str, is_named: bool) -> str:
    """What Math-Verify gets: the clean text, without the name before the equality sign where there is one."""
    text = clean(text)
    return text.split("=", 1)[1].strip() if is_named else text


def _without_name(text: str) -> str:
    """``x=5`` is 5: one name, one equality. Anything else stays."""
    name, equals, value = text.partition("=")
    if not equals or not _ASSIGNMENT.fullmatch(normalise(text)) or refuse.hedges(name):
        return text
    return text if refuse.stop_word(_TEXT.sub(r"\1", name), "", refuse.NEGATIONS) else value.strip()


# --------------------------------------------------------------------------------------------------------------------
# Numbers


def _equals_number(answer: str, number_g: Fraction, value_g: str, gold: str) -> Outcome:
    """The answer must be one number, and that one."""
    text = _REPEATING.sub(r"\g<1>", answer)
    if reason := refuse.hedges(text, gold):
        return False, f"refused: {reason} beside a number"
    value = without_unit(_without_name(bare(answer)))
    wanted = [number_g, number_g / 100] if "%" in value_g and "%" not in answer else [number_g]  # 8% is 8, or 0.08
    if (number_a := number(normalise(value))) is not None:
        exact = not (is_decimal(value) or is_decimal(value_g))
        return any(_close(number_a, g, exact or g != number_g) for g in wanted), ""
    if word := refuse.stop_word(_TEXT.sub(r"\1", value)):
        return False, f"refused: {word!r} beside a number"
    odd = value.count("|") % 2 or "[" in value.replace("\\sqrt[", "") or "_" in value.replace("\\log_", "")
    if odd or "\\{" in value or not _NUMERIC.fullmatch(_REPEATING.sub(r"\g<1>", value)):
        return False, "not one number"
    hundredths = [clean(value_g)] if len(wanted) > 1 else []
    return _equal_to_any(value, [without_unit(clean(value_g)), *hundredths]), ""


def _equal_to_any(answer: str, golds: list[str]) -> bool | None:
    outcomes = [_sympy_equal(answer, gold) for gold in golds]
    return any(outcomes) if None not in outcomes else None


def _close(a: Fraction, g: Fraction, exact: bool) -> bool:
    """Decimals agree to six places (relative below one); whole numbers and fractions exactly."""
    return bool(a == g if exact else abs(a - g) * 10**6 <= min(Fraction(1), abs(g)))


# --------------------------------------------------------------------------------------------------------------------
# Everything else


def _deceives(answer: str, gold: str) -> str:
    """What the answer claims beyond the truth, or ""."""
    is_set = _SET.search(gold) is not None or _ORDER.search(gold) is not None or "," in clean(gold)
    rest = _SET_SIGNS.sub(" ", answer) if is_set else answer
    if sign := refuse.hedges(rest, gold):
        return f"{sign} is not in the truth"
    given, wanted = clean(answer), clean(gold)
    if given.count("=") != wanted.count("=") and "=" in _without_name(given):
        return "more equations than in the truth"
    if not is_set and _ORDER.search(given):
        return "an inequality"
    if not is_set and refuse.items(given) > 1:
        return "a list"
    if _is_point(wanted) and refuse.items(given) > 1:
        return "a list"
    if not is_set and "\\{" in given:
        return "a set"
    words = " ".join(_TEXT.findall(answer))
    if word := refuse.stop_word(words, gold):
        return "" if is_set and word in ("or", "and") else f"the word {word!r}"
    return _other_brackets(given, wanted)


def _named_list(text: str) -> str:
    """``x=1 or x=2`` is ``1, 2``; "" for anything else."""
    parts = [part.partition("=") for part in _BETWEEN.split(text)]
    names = {name.strip() for name, _, _ in parts}
    values = [value.strip() for _, _, value in parts]
    if len(parts) < 2 or len(names) > 1 or not all(values) or any("=" in value for value in values):
        return ""
    return ", ".join(values) if _without_name(f"{names.pop()}=1") == "1" else ""


def _other_brackets(answer: str, gold: str) -> str:
    """An interval or point with one comma must have its own brackets: ``[2,5)`` is not ``(2,5)``."""
    both = _is_point(answer) and _is_point(gold) and answer.count(",") == gold.count(",") == 1
    return "other brackets" if both and (answer[0], answer[-1]) != (gold[0], gold[-1]) else ""


def _is_point(text: str) -> bool:
    """``(3,4]``: one pair of round or square brackets around it all."""
    return text[0] in "([" and text[-1] in ")]" and refuse.depth(text) == 1 and refuse.items(text) == 1


def _same_text(answer: str, gold: str) -> bool | None:
    """Compares words and multiple-choice letters; None when the truth is neither."""
    word = _TEXT.sub(r"\1", gold).strip().strip("()").strip()
    given = _TEXT.sub(r"\1", answer).strip(" .$*")
    if re.fullmatch(r"[A-J]", word):
        return _same_choice(given, word)
    is_text = "\\text" in gold and re.fullmatch(r"[A-Za-z][A-Za-z ,'-]*", word) is not None
    if not is_text and not re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]+)*", word):
        return None
    same = re.sub(r"[\s()]+", "", given).casefold() == re.sub(r"[\s()]+", "", word).casefold()
    return same or (False if is_text or len(word) > 3 else None)


_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+)?\(?([A-Ja-j])(?:([.:)]+)(?:\s+(\S.*))?|\s*)$", re.DOTALL
)
_SECOND = re.compile(r"^(?:or|and|not|[,;/&|]|\(?[A-J](?:[).:,]|$))|(?:^|[^A-Za-z])\(?[A-J][).:]", re.IGNORECASE)


def _same_choice(given: str, letter: str) -> bool | None:
    """One letter, with its text where a ``.``, ``:`` or ``)`` comes between; no second letter."""
    if not given.isascii():
        return False
    if choice := _CHOICE.match(given):
        return choice.group(1).upper() == letter and not (choice.group(3) and _SECOND.search(choice.group(3)))
    letters = len(re.findall(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])", given))
    return False if letters > 1 or refuse.stop_word(given) or refuse.hedges(given) else None


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


@functools.lru_cache(maxsize=4096)
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
