"""Inequalities in one letter as intervals, and the brackets of lists: ``2 \\le x < 5`` is ``[2,5)``, no set is a point."""

from __future__ import annotations

import re
from collections import Counter

_RELATION = re.compile(r"(\\(?:le|ge|lt|gt)(?![a-zA-Z])|[<>])")
_LETTER = re.compile(r"[A-Za-z]|\\(?:theta|alpha|beta|lambda|mu|phi|omega)")
_OR = re.compile(r"\\text\{\s*or\s*\}|\\lor(?![a-zA-Z])|\\vee(?![a-zA-Z])|\bor\b|\\cup(?![a-zA-Z])")
_AND = re.compile(r"\\text\{\s*and\s*\}|\\land(?![a-zA-Z])|\\wedge(?![a-zA-Z])|\band\b|\\cap(?![a-zA-Z])")
_FUNCTIONS = re.compile(r"\\(?:frac|sqrt|pi|infty|ln|log|cdot|times)(?![a-zA-Z])")
_MEMBER = re.compile(r"^(?:[A-Za-z]|\\[a-z]+)\s*\\in(?![a-zA-Z])\s*")
_CONNECTIVE = re.compile(rf"{_OR.pattern}|{_AND.pattern}|[,;&]")
_FLIPPED = {"<": ">", ">": "<", "\\le": "\\ge", "\\ge": "\\le"}

_OPENING, _CLOSING = "([{", ")]}"


def has_order(text: str) -> bool:
    return _RELATION.search(text) is not None


def has_connective(text: str) -> bool:
    """Whether it joins several relations: ``or``, ``and``, a comma."""
    return _CONNECTIVE.search(text) is not None


def parts(text: str) -> tuple[list[str], list[str]]:
    """(the relations in a fixed order, what joins them) of a text: for comparing them as they are written."""
    joints = ["or" if _OR.fullmatch(j) else "and" if _AND.fullmatch(j) else j for j in _CONNECTIVE.findall(text)]
    return sorted(re.sub(r"\s+", "", part) for part in _CONNECTIVE.split(text)), joints


def notation(text: str) -> tuple[str, str] | None:
    """(letter, intervals as text) of inequalities in one letter, joined by ``or`` and ``and``; None for anything else."""
    letters: set[str] = set()
    alternatives = []
    for alternative in _OR.split(text):
        joint = [_piece(part.strip(), letters) for part in _AND.split(alternative)]
        if None in joint:
            return None
        alternatives.append("\\cap".join(str(piece) for piece in joint))
    return (letters.pop(), "\\cup".join(alternatives)) if len(letters) == 1 else None


def of_member(text: str) -> str:
    """``x \\in [2,5)`` is ``[2,5)``; "" where the text is no set of numbers for certain (``(2,5)`` may be a point)."""
    rest = without_member(text)
    is_set = rest != text or "\\infty" in rest or "\\cup" in rest
    half_open = rest[:1] + rest[-1:] in ("(]", "[)")
    return rest if (is_set or half_open) and rest[:1] in "([" and not has_order(rest) else ""


def without_member(text: str) -> str:
    """``x \\in \\{1,2\\}`` is ``\\{1,2\\}``."""
    return _MEMBER.sub("", text)


def _piece(text: str, letters: set[str]) -> str | None:
    parts = [part.strip() for part in _RELATION.split(text)]
    if len(parts) not in (3, 5) or not all(parts):
        return None
    signs = [{"\\lt": "<", "\\gt": ">"}.get(sign, sign) for sign in parts[1::2]]
    terms = parts[0::2]
    at = [i for i, term in enumerate(terms) if _LETTER.fullmatch(term)]
    if (
        len(at) != 1
        or (len(terms) == 3 and at != [1])
        or any(_has_letters(t) for i, t in enumerate(terms) if i not in at)
    ):
        return None
    letters.add(terms[at[0]])
    if len(terms) == 2:
        sign, bound = (signs[0], terms[1]) if at == [0] else (_FLIPPED[signs[0]], terms[0])
        if sign in ("<", "\\le"):
            return f"(-\\infty,{bound}" + (")" if sign == "<" else "]")
        return ("(" if sign == ">" else "[") + f"{bound},\\infty)"
    low, high = (terms[0], terms[2]) if signs[0] in ("<", "\\le") else (terms[2], terms[0])
    first, second = signs if signs[0] in ("<", "\\le") else [_FLIPPED[sign] for sign in reversed(signs)]
    if second not in ("<", "\\le"):
        return None
    return ("(" if first == "<" else "[") + f"{low},{high}" + (")" if second == "<" else "]")


def _has_letters(text: str) -> bool:
    rest = _FUNCTIONS.sub(" ", text)
    return "\\" in rest or any(c.isalpha() or c in ",;=|" for c in rest)


def brackets(text: str) -> Counter[str]:
    """The kinds of brackets around lists; the braces of a set around everything do not count, groups of LaTeX neither."""
    open_at: list[tuple[str, int, bool]] = []
    out: list[tuple[str, bool]] = []
    commas: list[bool] = []
    for position, character in enumerate(text):
        if character in _OPENING:
            open_at.append((character, position, position > 0 and text[position - 1] == "\\"))
            commas.append(False)
        elif character in _CLOSING and open_at:
            opening, start, escaped = open_at.pop()
            if commas.pop() and (opening != "{" or escaped):
                is_outer = opening == "{" and start == 1 and position == len(text) - 1
                out.append((opening + character, is_outer))
        elif character in ",;" and commas:
            commas[-1] = True
    return Counter(kind for kind, is_outer in out if not is_outer)
