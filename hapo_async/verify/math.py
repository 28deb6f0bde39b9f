"""Mathematical equality of a response's final answer and the truth, strict against answers that only look right.

Numbers and plain fractions are compared exactly and cost microseconds; everything else goes to Math-Verify (sympy,
``verify.symbolic``), which is loaded on first need. Math-Verify's own time limits are SIGALRM and are switched off: the
process pool is the deadline.

Strict: a response states one final answer (``verify.final``), and where it states several all must be right. Where the
truth is a number, the answer must be one number: digits, operators and functions, a unit after it (``verify.units``), a
name before it (``x=42``). No relation (``41=42``), negation (``\\neq 42``), list, set or interval, no letters that cancel,
no words that widen it (``42 or 43``). Where it is something else, the answer may hold no relation, negation, alternative,
word or unknown command that the truth has not, and no other brackets.
"""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from typing import Any

from hapo_async.types import Verdict
from hapo_async.verify import final, intervals, names, refuse, symbolic, truth, units, words
from hapo_async.verify.glyphs import plain
from hapo_async.verify.spelling import bare, clean, exact_decimals, is_close, may_be_rounded, normalise, number
from hapo_async.verify.words import TEXT

_ORDER = re.compile(r"\\(?:le|ge|lt|gt)(?![a-zA-Z])|[<>]")
_SET = re.compile(r"\\(?:cup|cap|infty|in|mathbb|emptyset|setminus|pm|mp)(?![a-zA-Z])|\\\{")
_SET_SIGNS = re.compile(r"\\(?:in|cup|pm|mp|lor|vee|land|wedge|mid|setminus)(?![a-zA-Z])|[∨∧]")
_INEXACT = re.compile(r"\\(?:sqrt|frac|pi|ln|log|exp|sin|cos|tan|arc[a-z]+)(?![a-zA-Z])|[/.e]|\^\{?-")
_REPEATING = re.compile(r"(\.[0-9]*)\\overline\{[0-9]+\}")
_NUMERIC = re.compile(
    r"(?:\\(?:frac|sqrt|cdot|times|div|pi|log|ln|lg|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|exp|binom|"
    r"[lr]floor|[lr]ceil|circ|degree)(?![a-zA-Z])|[-0-9+*/^(){}\[\].!|_ei\s]|(?<=[0-9]),(?=[0-9]{3}(?![0-9])))+"
)
_PERCENT = re.compile(r"percent|\bper cent|%", re.IGNORECASE)

Outcome = tuple[bool | None, str]
"""(True, False, or None when the answer cannot be read; why)."""


def judge(response: str, gold: Any, prompt: str = "") -> tuple[Verdict, str]:
    """The verdict on a response and, where there is one, its reason. A percentage counts for a plain number, and digits for a
    numeral to a base, only where the prompt asks for such. Raises Poisoned for a truth that nothing can be compared with."""
    golds = truth.usable(gold)
    claims = final.read(response)
    if claims.refusal:
        return Verdict.WRONG, f"refused: {claims.refusal}"
    if claims.answer is None:
        return Verdict.UNPARSEABLE, ""
    outcome, why = _best(claims.answer, golds, prompt)
    if outcome is not True:
        return Verdict.UNPARSEABLE if outcome is None else Verdict.WRONG, why
    for other in claims.others:
        if _best(other, golds, prompt)[0] is not True:
            return Verdict.WRONG, f"refused: {claims.answer[:40]!r} is right, but {other[:40]!r} is stated as well"
    return Verdict.CORRECT, ""


def verdict(response: str, gold: Any) -> Verdict:
    """As ``judge``, without the reason."""
    return judge(response, gold)[0]


final_answer = final.answer


def _best(answer: str, golds: list[str], prompt: str) -> Outcome:
    """By the truth that fits best."""
    worst: Outcome = (None, "")
    for gold in golds:
        outcome, why = _compare(answer, gold, prompt)
        if outcome:
            return True, ""
        if worst[0] is None:
            worst = (outcome, why or worst[1])
    return worst


def _compare(answer: str, gold: str, prompt: str) -> Outcome:
    if reason := refuse.characters(answer, gold):
        return False, f"refused: {reason}"
    answer, gold = names.without_sign(plain(answer)), plain(gold)
    if reason := refuse.limits(answer, gold):
        return False, f"refused: {reason}"
    a, g = normalise(answer), normalise(gold)
    if not a:
        return None, ""
    if refuse.split_digits(clean(answer)) and not refuse.split_digits(clean(gold)):
        return False, "refused: digits with spaces between"
    if g in (a, TEXT.sub(r"\1", a)):
        return True, ""
    if (same := words.same(answer, gold, prompt)) is not None:
        return same, ""
    value, unit = units.of_truth(names.without_name(bare(gold)))
    if (number_g := number(normalise(value))) is not None:
        return _equals_number(answer, number_g, (value, unit), gold, _PERCENT.search(prompt) is not None)
    return _equals_other(answer, gold)


# --------------------------------------------------------------------------------------------------------------------
# Numbers


def _equals_number(answer: str, gold_number: Fraction, gold: tuple[str, str], text: str, in_percent: bool) -> Outcome:
    """The answer must be one number, and that one. gold: its value and its unit."""
    value, unit = units.split(names.without_name(bare(answer)), text)
    if reason := refuse.hedges(_REPEATING.sub(r"\g<1>", value), text):
        return False, f"refused: {reason} beside a number"
    if units.differ(unit, gold[1]):
        return False, f"refused: {unit!r} for {gold[1]!r}"
    wanted = _wanted(gold_number, unit == "%", gold[1] == "%", in_percent)
    if not wanted:
        return False, "refused: a percentage"
    if (given := number(normalise(value))) is not None:
        return any(is_close(given, g, value, gold[0]) if g == gold_number else given == g for g in wanted), ""
    if word := refuse.stop_word(TEXT.sub(r"\1", value)):
        return False, f"refused: {word!r} beside a number"
    odd = value.count("|") % 2 or "[" in value.replace("\\sqrt[", "") or "_" in value.replace("\\log_", "")
    if odd or "\\{" in value or not _NUMERIC.fullmatch(value):
        return False, "not one number"
    value = value if may_be_rounded(gold_number, gold[0]) else exact_decimals(value)
    outcomes = [symbolic.equal(value, gold[0] if g == gold_number else _latex(g)) for g in wanted]
    return (any(outcomes) if None not in outcomes else None), ""


def _wanted(gold: Fraction, is_percent: bool, wants_percent: bool, in_percent: bool) -> list[Fraction]:
    """The numbers that count: for 8% it is 8, or 0.08 where no sign follows; for 0.25 it is 25 before a sign; 8% is no 8
    unless the prompt asks for per cent."""
    if wants_percent:
        return [gold] if is_percent else [gold, gold / 100]
    if not is_percent:
        return [gold]
    parts = [gold * 100] if gold.denominator != 1 else []
    return [gold, *parts] if in_percent else parts


def _latex(value: Fraction) -> str:
    return rf"{'-' if value < 0 else ''}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


# --------------------------------------------------------------------------------------------------------------------
# Everything else


def _equals_other(answer: str, gold: str) -> Outcome:
    wanted = clean(gold)
    given = names.unnamed(clean(answer), wanted)
    if intervals.has_order(given) or intervals.has_order(wanted):
        if (sets := _as_sets(given, wanted)) is not None:
            return symbolic.equal(*sets), ""
        if intervals.has_connective(given) or intervals.has_connective(wanted):
            return intervals.parts(given) == intervals.parts(wanted), ""
    if reason := _deceives(given, wanted):
        return False, f"refused: {reason}"
    value_a, value_g = names.without_name(given), names.without_name(wanted)
    if "=" in value_a or "=" in value_g:
        return symbolic.equal(given, wanted), ""
    value_a, value_g = exact_decimals(value_a) if not _INEXACT.search(value_g) else value_a, value_g
    return _equals_value(value_a, value_g)


def _equals_value(answer: str, gold: str) -> Outcome:
    """Without units: these must agree. A letter is no unit here."""
    (value_a, unit_a), (value_g, unit_g) = units.behind_formula(answer, gold), units.behind_formula(gold, gold)
    if units.differ(unit_a, unit_g) or unit_a.startswith("deg") != unit_g.startswith("deg"):
        return False, f"refused: {unit_a!r} for {unit_g!r}"
    known = frozenset(word for text in TEXT.findall(gold) for word in text.lower().split())
    for word in (w for text in TEXT.findall(value_a) for w in re.findall(r"[A-Za-z]{2,}", text.lower())):
        if word not in known and word not in ("or", "and"):
            return False, f"refused: the word {word!r}"
    if normalise(value_a) == normalise(value_g):
        return True, ""
    return symbolic.equal(value_a, value_g), ""


def _as_sets(answer: str, gold: str) -> tuple[str, str] | None:
    """Both as intervals, where both say for certain which numbers they mean and one is an inequality."""
    a, g = intervals.notation(answer), intervals.notation(gold)
    if a and g:
        return (a[1], g[1]) if a[0] == g[0] else None
    if a and (of_gold := intervals.of_member(gold)):
        return a[1], of_gold
    if g and (of_answer := intervals.of_member(answer)):
        return of_answer, g[1]
    return None


def _deceives(given: str, wanted: str) -> str:
    """What the answer claims beyond the truth, or ""."""
    is_set = _SET.search(wanted) is not None or _ORDER.search(wanted) is not None or "," in wanted
    rest = _SET_SIGNS.sub(" ", given) if is_set else given
    if sign := refuse.hedges(rest, wanted) or refuse.primes(given) or refuse.unread(given, wanted):
        return f"{sign} is not in the truth"
    if given.count("=") != wanted.count("=") and "=" in names.without_name(given):
        return "more equations than in the truth"
    if not is_set and _ORDER.search(given):
        return "an inequality"
    if not is_set and refuse.items(given) > 1:
        return "a list"
    if not is_set and "\\{" in given:
        return "a set"
    if _brackets(given) != _brackets(wanted):
        return "other brackets"
    said = refuse.without_commands(TEXT.sub(r" \1 ", names.without_name(given)))
    word = refuse.stop_word(said, wanted, refuse.STOP_WORDS - {"or", "and"} if is_set else refuse.STOP_WORDS)
    return f"the word {word!r}" if word else ""


def _brackets(text: str) -> Counter[str]:
    return intervals.brackets(intervals.without_member(names.without_name(text)))
