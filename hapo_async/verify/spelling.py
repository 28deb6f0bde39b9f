"""One spelling for what is only typography, and the exact values of numbers. All of it runs in linear time."""

from __future__ import annotations

import functools
import re
from fractions import Fraction

from hapo_async.verify import refuse

_SPACES = re.compile(
    r"\\(?:left|right|limits|q?quad)(?![a-zA-Z])|(?<!\\)\\[!,;: ()]|(?<!\\)\\[\[\]]|(?<!\\)\$"
    r"|(?<=[0-9A-Za-z})\],.])~"  # a tie follows something; anywhere else it says "about"
)
_FRAC = re.compile(r"\\[dtc]frac(?![a-zA-Z])")
_FRAC_OVER = re.compile(r"\\frac\s*(\\[a-zA-Z]+|\w)")
_FRAC_UNDER = re.compile(r"(\\frac\{[^{}]*\})\s*(\\[a-zA-Z]+|\w)")

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?")
_MIXED = re.compile(r"(?<![\w.^}])([0-9]+)\s+([0-9]+)\s?/\s?([0-9]+)(?![0-9.])")
_FRACTION = re.compile(r"([-+]?)(?:\\frac\{(-?[0-9.]+)\}\{(-?[0-9.]+)\}|([0-9.]+)/([0-9.]+))")
_WITH_WHOLE = re.compile(r"([-+]?)([0-9]+)\\frac\{([0-9]+)\}\{([0-9]+)\}")
_SCIENTIFIC = re.compile(r"([-+]?[0-9]+(?:\.[0-9]+)?)(?:\\times|\\cdot|\*|x)10\^(?:\{(-?[0-9]{1,3})\}|([0-9]))")
_REPEATING = re.compile(r"([-+]?)([0-9]*)\.([0-9]*)\\(?:overline|dot)\{([0-9]+)\}")
_DECIMAL = re.compile(r"(?<![A-Za-z0-9.^_])([0-9]{0,40})\.([0-9]{1,40})(?![0-9.]|\\overline)")
_HAS_DIGIT = re.compile(r"[0-9]")

_WRAPPED = re.compile(r"\\text\{([^{}]*)\}|\{([^{}]*)\}")
_OPTION = re.compile(r"(?:\\text\{\s*\(?[A-J]\)?[.:]?\s*\}|\([A-J]\))\s*(?=\S)")
_CURRENCY = re.compile(r"^(?:[€£¥₹]|USD\s|Rs\.?\s|\\text\{\s*(?:Rs\.?|USD|[€£¥₹])?\s*\})\s*")


@functools.lru_cache(maxsize=4096)
def normalise(text: str) -> str:
    """One spelling, without any spaces: for comparing texts, not for parsing."""
    return re.sub(r"\s+", "", clean(text))


def clean(text: str) -> str:
    """Takes off ``\\left``, ``\\,``, ``$`` and the like, writes ``\\dfrac`` as ``\\frac``; spaces become single ones."""
    text = text.strip()
    text = text[:-1].strip() if text.endswith(".") and not text.endswith("..") else text
    text = " ".join(_FRAC.sub(r"\\frac", _SPACES.sub(" ", text)).split())
    text = text.replace("\\$", "").replace("{,}", ",").replace("{:}", ":").replace("\\lbrace", "\\{")
    text = text.replace("\\rbrace", "\\}")
    text = _FRAC_UNDER.sub(r"\1{\2}", _FRAC_OVER.sub(r"\\frac{\1}", text))
    return _MIXED.sub(r"\1\\frac{\2}{\3}", text).strip()


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
    if mixed := _WITH_WHOLE.fullmatch(text):
        minus, whole, over, under = mixed.groups()
        return (int(whole) + Fraction(int(over), int(under))) * (-1 if minus == "-" else 1) if int(under) else None
    if scientific := _SCIENTIFIC.fullmatch(text):
        return Fraction(scientific.group(1)) * Fraction(10) ** int(scientific.group(2) or scientific.group(3))
    match = _FRACTION.fullmatch(text)
    if not match:
        return None
    sign, *parts = match.groups()
    over, under = (_NUMBER.fullmatch(p) and p.rstrip(".") for p in parts if p)
    if not over or not under or Fraction(under) == 0:
        return None
    return Fraction(over) / Fraction(under) * (-1 if sign == "-" else 1)


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


def exact_decimals(text: str) -> str:
    """Decimals as fractions: sympy would take them for rounded."""
    return _DECIMAL.sub(
        lambda m: rf"\frac{{{(m.group(1) + m.group(2)).lstrip('0') or '0'}}}{{1{'0' * len(m.group(2))}}}", text
    )


def may_be_rounded(value: Fraction, text: str) -> bool:
    """A truth of six decimals, or a fraction whose decimals have no end."""
    return len(text.partition(".")[2]) >= 6 or 10**40 % value.denominator != 0


def is_close(a: Fraction, g: Fraction, text_a: str, text_g: str) -> bool:
    """Equal; or equal to six places (relative below one) where one is rounded: a fraction without an end that the other
    writes as a decimal, or a truth of six decimals."""
    if a == g:
        return True
    is_rounded = may_be_rounded(g, text_g) or 10**40 % a.denominator != 0
    is_decimal = any("." in text or "e" in text.lower().replace("\\frac", "") for text in (text_a, text_g))
    return is_rounded and is_decimal and bool(abs(a - g) * 10**6 <= min(Fraction(1), abs(g)))
