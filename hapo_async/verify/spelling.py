"""One spelling for what is only typography, and the exact values of numbers. All of it runs in linear time."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from hapo_async.verify import refuse

_SPACES = re.compile(r"\\(?:left|right|displaystyle|limits|q?quad)(?![a-zA-Z])|(?<!\\)\\[!,;: ]|(?<!\\)\$|~")
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_FRAC_OVER = re.compile(r"\\frac\s*(\\[a-zA-Z]+|\w)")
_FRAC_UNDER = re.compile(r"(\\frac\{[^{}]*\})\s*(\\[a-zA-Z]+|\w)")

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]+)\}|([0-9.]+)/([0-9.]+))")
_REPEATING = re.compile(r"([-+]?)([0-9]*)\.([0-9]*)\\(?:overline|dot)\{([0-9]+)\}")
_HAS_DIGIT = re.compile(r"[0-9]")

_GROUP_UNIT = re.compile(r"\\(?:text|mathrm|mbox|textbf|textrm|rm)\{([^{}]*)\}(?:\^\{?[0-9]\}?)?$")
_SIGN_UNIT = re.compile(r"(?:\^\{?\\circ\}?|\\?%|\\degree|°)$")
_SHORT_UNIT = re.compile(
    r"(?<=[0-9}])\s*(?:[cmk]m|[kmM]?Hz|kg|mg|ml|mL|ft|lbs?|oz|mph|km/h|m/s|cm/s|min|hrs?|sec|kWh|mol|USD)(?:\^\{?[23]\}?)?$"
)
_WORDS = re.compile(r"(?<=[0-9}])\s+[A-Za-z]{3,}(?:[ -][A-Za-z]+){0,6}$")
_NO_UNITS = frozenset(("i", "j", "e", "x", "y", "z", "n", "pi"))

_WRAPPED = re.compile(
    r"\\(?:text|mathrm|mathbf|textbf|boldsymbol|bm|mathit|textit|mbox|textrm)\{([^{}]*)\}|\{([^{}]*)\}"
)
_OPTION = re.compile(r"(?:\\(?:text|textbf|mathrm|mathbf)\{\s*\(?[A-J]\)?[.:]?\s*\}|\([A-J]\))\s*(?=\S)")
_CURRENCY = re.compile(r"^(?:[€£]|USD\s|\\(?:text|mathrm)\{\s*\})\s*")
_LETTERS_ONLY = re.compile(r"[A-Za-z .'/-]*")


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """One spelling, without any spaces: for comparing texts, not for parsing."""
    return re.sub(r"\s+", "", clean(text))


def clean(text: str) -> str:
    """Takes off ``\\left``, ``\\,``, ``$`` and the like, writes ``\\dfrac`` as ``\\frac``; keeps spaces."""
    text = text.strip().rstrip(".").strip()
    text = _FRAC.sub(r"\\frac", _SPACES.sub(" ", text))
    text = text.replace("\\$", "").replace("{,}", ",").replace("−", "-").replace("\\lbrace", "\\{")
    text = text.replace("\\rbrace", "\\}")
    return _FRAC_UNDER.sub(r"\1{\2}", _FRAC_OVER.sub(r"\\frac{\1}", text)).strip()


def number(text: str) -> Fraction | None:
    """The exact value of an integer, decimal or plain fraction without spaces; else None."""
    if len(text) > refuse.MOST_DIGITS + 400:
        return None
    if text and text not in "+-." and _NUMBER.fullmatch(text) and _HAS_DIGIT.search(text.split("e")[0].split("E")[0]):
        return Fraction(text.replace(",", "").rstrip(".") or "0")
    if repeating := _REPEATING.fullmatch(text):
        minus, whole, fixed, period = repeating.groups()
        value = Fraction(int((whole + fixed + period) or "0") - int((whole + fixed) or "0"), 10 ** len(fixed))
        return value / (10 ** len(period) - 1) * (-1 if minus == "-" else 1)
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, *parts = match.groups()
    over, under = (_NUMBER.fullmatch(p) and p.rstrip(".") for p in parts if p)
    if not over or not under or Fraction(under) == 0:
        return None
    return Fraction(over) / Fraction(under) * (-1 if sign == "-" else 1)


def without_unit(text: str) -> str:
    """``5\\text{ cm}^2``, ``90^\\circ`` and ``18 apples`` without what follows the number; nothing that changes its value
    (``42\\text{ or 43}``, ``42 million``, ``42\\mathrm{i}``) is a unit."""
    if group := _GROUP_UNIT.search(text):
        unit = group.group(1).strip()
        plain = (
            _LETTERS_ONLY.fullmatch(unit)
            and not refuse.stop_word(unit, "", refuse.UNIT_STOPS)
            and unit.lower() not in _NO_UNITS
        )
        return text[: group.start()].rstrip() if group.start() and plain else text
    if sign := _SIGN_UNIT.search(text):
        return text[: sign.start()].rstrip()
    if unit_ := _SHORT_UNIT.search(text):
        return text[: unit_.start()]
    if (words := _WORDS.search(text)) and not refuse.stop_word(words.group(), "", refuse.UNIT_STOPS):
        return text[: words.start()]
    return text


def bare(text: str) -> str:
    """The clean text of one value without what may stand around it: ``\\textbf{(C)}\\ 42``, ``\\text{42}``, ``\\$42``."""
    text = _CURRENCY.sub("", clean(text), count=1)
    if option := _OPTION.match(text):
        text = text[option.end() :].strip()
    for _ in range(4):
        if not (wrapped := _WRAPPED.fullmatch(text)):
            break
        text = (wrapped.group(1) or wrapped.group(2) or "").strip()
    return text


def is_decimal(text: str) -> bool:
    return "." in text or "e" in text.lower().replace("\\degree", "").replace("\\frac", "")
