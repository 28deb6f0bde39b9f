"""One LaTeX spelling for signs that people also write in Unicode or by rarer commands. Nothing is dropped: what is not in the
tables stays. Linear time."""

from __future__ import annotations

import functools
import re

_SIGNS = {
    "−": "-",
    "×": r"\times ",
    "÷": r"\div ",
    "·": r"\cdot ",
    "⋅": r"\cdot ",
    "π": r"\pi ",
    "θ": r"\theta ",
    "∞": r"\infty ",
    "∪": r"\cup ",
    "∩": r"\cap ",
    "∈": r"\in ",
    "∅": r"\emptyset ",
    "±": r"\pm ",
    "≤": r"\le ",
    "≥": r"\ge ",
    "≠": r"\neq ",
    "°": r"^\circ ",
    "∠": r"\angle ",
    "⁄": "/",
    "’": "'",
    "′": "'",
    "\u00a0": " ",
    "½": r"\frac{1}{2}",
    "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}",
    "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}",
    "⅕": r"\frac{1}{5}",
    "⅛": r"\frac{1}{8}",
}
_TABLE = str.maketrans(_SIGNS)
_RAISED = re.compile("([⁺⁻]?)([⁰¹²³⁴-⁹]{1,400})")
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_ROOT = re.compile(r"√\s?(?:([0-9.]+|[A-Za-z])|\(([^()√]{0,200})\)|\{([^{}√]{0,200})\})")
_DASH = re.compile(r"(?:(?<=^)|(?<=[=({,]))–(?=[0-9.\\a-z(])")

_TEXT = "text(?:rm|sf|tt|up|normal|bf|it|sl)|math(?:rm|sf|tt|bf|it|normal)|operatorname|[mh]box|boldsymbol|bm|text|emph"
_FONT = re.compile(rf"\\(?:{_TEXT})\s*(?=\{{)")
_ONE = re.compile(r"\\(?:math(?:bf|it|normal)|boldsymbol|bm)\{(\w|[0-9.]{1,40})\}|\\(?:mathrm|text)\{([ei])\}")
_OVER = re.compile(r"\{\s?(-?[0-9a-zA-Z]{1,20})\s?\\over\s?([0-9a-zA-Z]{1,20})\s?\}")
_RULES = (
    (re.compile(r"\\(?:displaystyle|textstyle|large|Large|LARGE|huge|Huge|bf|bfseries|boldmath)(?![a-zA-Z])"), " "),
    (re.compile(r"\\(?:leqslant|leqq|leq)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geqslant|geqq|geq)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\(?:s|nice)frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"(?<=[.0-9])\\(?:bar|dot)(?=\{[0-9])"), r"\\overline"),
    (re.compile(r"\\ne(?![a-zA-Z])"), r"\\neq"),
    (re.compile(r"\\prime(?![a-zA-Z])"), "'"),
    (re.compile(r"\\operatorname\*?\{((?:arc)?(?:sin|cos|tan)|cot|sec|csc|log|ln)\}"), r"\\\1 "),
    (_OVER, r"\\frac{\1}{\2}"),
)


@functools.lru_cache(maxsize=4096)
def plain(text: str) -> str:
    """``2√3`` is ``2\\sqrt{3}``, ``x²`` is ``x^{2}``; all commands that set words become ``\\text``."""
    if not text.isascii():
        text = _DASH.sub("-", text)
        text = _RAISED.sub(lambda m: "^{" + m.group().translate(_LOWERED) + "}", text)
        text = _ROOT.sub(lambda m: rf"\sqrt{{{m.group(1) or m.group(2) or m.group(3) or ''}}}", text)
        text = text.translate(_TABLE)
    if "\\" not in text:
        return text
    for pattern, spelling in _RULES:
        text = pattern.sub(spelling, text)
    text = _ONE.sub(lambda m: m.group(1) or m.group(2), text)
    return _FONT.sub(r"\\text", text)
