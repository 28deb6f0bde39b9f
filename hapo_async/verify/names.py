"""What stands before an equality sign and names the value behind it: ``x = 5``, ``f(-1) = 5``, ``m\\angle A = 5``."""

from __future__ import annotations

import re

from hapo_async.verify import refuse
from hapo_async.verify.spelling import normalise
from hapo_async.verify.words import TEXT

_GREEK = (
    "alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|varphi|"
    "chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Sigma|Phi|Psi|Omega|ell"
)
_NAME = (
    rf"(?:[A-Za-z](?:\+[A-Za-z])*|[A-Z]{{2,4}}|\\(?:{_GREEK})|\\text\{{[A-Za-z0-9 ,.'-]*\}}|\\overline\{{[A-Z]{{2}}\}}|"
    r"\|[A-Z]{2}\||m?\\angle[A-Z]{1,3}|\\triangle[A-Z]{3})"
    r"(?:_(?:\w|\{[A-Za-z0-9,]*\}|\{\\text\{[A-Za-z ]*\}\}))?(?:\^\{-1\})?'{0,2}"
    r"(?:\((?:-?[A-Za-z0-9./]{1,5}|\\frac\{[0-9]{1,3}\}\{[0-9]{1,3}\})(?:,-?[A-Za-z0-9]{1,3})*\))?'?"
)
_ASSIGNMENT = re.compile(rf"(?:{_NAME}|\({_NAME}(?:,{_NAME})+\))=([^=]+)")
_REVERSED = re.compile(r"(-?[0-9.,/]+|-?\\frac\{[0-9]+\}\{[0-9]+\})=[A-Za-z]")
_SIGN = re.compile(r"^[\s$]*=\s*(?=[-+0-9A-Za-z\\({.])(?!\\(?:neq|not|le|ge|lt|gt|approx|sim))")
_SAID = re.compile(r"^\\text\{\s*(?:The |the )?(?:[Ff]inal )?[Aa]nswer(?: is)?\s*:?\s*\}\s*:?\s*(?=\S)")
_BETWEEN = re.compile(r",|\\text\{\s{0,9}(?:or|and|,|, and|, or)\s{0,9}\}|\s(?:or|and)\s")
_POINT = re.compile(r"[A-Z]\s?(?=\()")

_NOUNS_TEXT = (
    "area volume perimeter circumference length width height depth radius diameter distance speed velocity acceleration time "
    "total sum product number count answer value values probability cost price profit age mean median mode average min max "
    "minimum maximum slope angle side base ways way of the a an in remainder quotient ratio difference result solution surface "
    "lateral final required expected new original initial hypotenuse leg altitude mass weight force energy power work "
    "temperature rate interest amount money income salary discount tax score degree degrees rank det trace period amplitude "
    "frequency coefficient constant term terms digit digits units cents for per is and x y z n triangle square circle "
    "rectangle sphere cone cylinder trapezoid polygon hexagon pentagon segment chord arc sector shaded region"
)
_NOUNS = frozenset(_NOUNS_TEXT.split())


def without_sign(text: str) -> str:
    """``= 5`` and ``\\text{The answer is } 5`` are 5."""
    return _SAID.sub("", _SIGN.sub("", text, count=1), count=1)


def without_name(text: str) -> str:
    """``x=5`` is 5, ``5 = x`` too: one name, one equality. Anything else stays."""
    name, equals, value = text.partition("=")
    if not equals:
        return text
    short = normalise(text)
    if _REVERSED.fullmatch(short):
        return name.strip()
    return value.strip() if _ASSIGNMENT.fullmatch(short) and _is_said(name) else text


def _is_said(name: str) -> bool:
    """Whether the words of a name are nouns."""
    said = " ".join(TEXT.findall(name))
    if refuse.stop_word(said):
        return False
    return all(w.lower() in _NOUNS or w[:1].isupper() or w.endswith("s") for w in re.findall(r"[A-Za-z]{2,}", said))


def unnamed(text: str, gold: str) -> str:
    """``x=1 or x=2`` is the list ``1, 2``; ``x=2, y=5`` and ``P(2,5)`` are points, where the truth is one."""
    is_point = gold.startswith("(") and gold.endswith(")")
    if is_point and (named := _POINT.match(text)):
        return text[named.end() :]
    parts = [part.partition("=") for part in _BETWEEN.split(text) if part.strip()]
    called = [name.strip() for name, _, _ in parts]
    values = [value.strip() for _, _, value in parts]
    if len(parts) < 2 or not all(values) or any("=" in value for value in values):
        return text
    if is_point and "".join(called) in ("xy", "xyz", "abc", "ab", "abcd", "pq", "mn", "rs", "uv"):
        return f"({', '.join(values)})"
    is_list = refuse.items(gold) > 1 or gold.startswith("\\{") or "\\pm" in gold
    return ", ".join(values) if is_list and len(set(called)) == 1 and without_name(f"{called[0]}=1") == "1" else text
