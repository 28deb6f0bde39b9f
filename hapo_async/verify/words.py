"""Truths that are words, multiple-choice letters, times of day or numerals to a base: compared as what they are."""

from __future__ import annotations

import re

from hapo_async.verify import refuse
from hapo_async.verify.spelling import clean

TEXT = re.compile(r"\\text\{([^{}]*)\}")
_KNOWN = frozenset(("no", "yes", "odd", "even", "true", "false", "none", "left", "right", "east", "west"))
_TITLE = re.compile(r"[A-Z][a-z]+")

_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s+)?(?:\(([A-Ja-j])\)(?![A-Za-z(])\s*(?:[.:]\s*)?(\S.*)?|([A-Ja-j])(?:([.:)]+)(?:\s+(\S.*))?|\s*))$",
    re.DOTALL,
)
_LETTER = re.compile(r"(?<![A-Za-z\\])(?:[B-HJ](?![A-Za-z'])|\(?[AI][).:](?![A-Za-z])|A$)")
_TAKES_BACK = re.compile(
    r"(?:is|isn|isnt|was|wasn|are|also|maybe|perhaps|possibly|probably|or|nor|and|actually|unless|wrong|incorrect|untrue|"
    r"false|nope|either|neither|but|if|except|excluded|fails|cannot|never|not|no|can|does|doesn|seems|would|looks|wait)\b",
    re.IGNORECASE,
)
_TAKES_BACK_ALONE = re.compile(
    r"(?:no|not|never|if|can|does|would)\b", re.IGNORECASE
)  # options may begin so: "No change"
_WRONG = re.compile(
    r"\b(?:is|are|was)\s+(?:not\s+)?(?:wrong|incorrect|right|correct|untrue|excluded|impossible)\b", re.IGNORECASE
)

_CLOCK = re.compile(r"0?([0-9]{1,2})\s?:\s?([0-9]{2})\s*(?:([aApP])\s?\.?\s?[mM]\.?)?")
_BASED = re.compile(r"\(?([0-9A-F]+)\)?_(?:\{\s*\(?\s*(?:\\text\{)?\s*([0-9]+|[a-z]+)\s*\}?\s*\)?\s*\}|([0-9]))")
_OF_BASES = re.compile(r"\bbase\b|\b(?:binary|ternary|octal|hexadecimal)\b|_[{]?[0-9]", re.IGNORECASE)
_BASE_NAMES = "two three four five six seven eight nine ten eleven twelve"
_BASES = {name: str(base) for base, name in enumerate(_BASE_NAMES.split(), 2)}


def same(answer: str, gold: str, prompt: str = "") -> bool | None:
    """Whether they are the same; None when the truth is none of these. Both in plain spelling."""
    word = TEXT.sub(r"\1", gold).strip().strip("()").strip()
    given = TEXT.sub(r"\1", clean(answer)).strip(" .$*")
    if re.fullmatch(r"[A-J]", word):
        return _same_choice(given, word)
    if clock := _CLOCK.fullmatch(word):
        return _same_time(given, clock)
    if based := _BASED.fullmatch(clean(gold)):
        return _same_numeral(clean(answer), based, _OF_BASES.search(prompt) is not None)
    is_text = "\\text" in gold and re.fullmatch(r"[A-Za-z][A-Za-z ,'-]*", word) is not None
    is_known = word.lower() in _KNOWN or (len(word) > 1 and _TITLE.fullmatch(word) is not None)
    if not is_text and not is_known and not re.fullmatch(r"[A-Za-z]{3,}(?: [A-Za-z]+)*", word):
        return None
    equal = re.sub(r"[\s()]+", "", given).casefold() == re.sub(r"[\s()]+", "", word).casefold()
    return equal or (False if is_text or is_known or len(word) > 3 else None)


def _same_choice(given: str, letter: str) -> bool | None:
    """One letter, with its text where a ``.``, ``:`` or ``)`` comes between; the text names no second letter and takes
    nothing back."""
    if not given.isascii():
        return False
    if choice := _CHOICE.match(given):
        named, beside = choice.group(1) or choice.group(3), (choice.group(2) or choice.group(5) or "").strip()
        return named.upper() == letter and not (beside and _takes_back(beside))
    letters = len(re.findall(r"(?<![A-Za-z\\])[A-J](?![A-Za-z])", given))
    return False if letters > 1 or refuse.stop_word(given) or refuse.hedges(given) or refuse.primes(given) else None


def _takes_back(text: str) -> bool:
    if _LETTER.search(text) or _WRONG.search(text) or text[:1] in ",;/&|":
        return True
    found = _TAKES_BACK.match(text)
    if not found:
        return False
    return not (_TAKES_BACK_ALONE.match(text) and re.match(r"\s+[a-z]{3,}", text[found.end() :]))


def _same_time(given: str, gold: re.Match[str]) -> bool | None:
    clock = _CLOCK.fullmatch(given)
    if not clock or clock.group(1, 2) != gold.group(1, 2):
        return False if gold.group(3) else None
    half, wanted = (clock.group(3) or "").lower(), (gold.group(3) or "").lower()
    return not wanted or half == wanted


def _same_numeral(answer: str, gold: re.Match[str], is_asked: bool) -> bool:
    """``1010_2`` is neither ``1010_3`` nor, unless the prompt speaks of bases, ``1010``."""
    numeral = answer.partition("=")[2].strip() or answer
    given = _BASED.fullmatch(numeral)
    if given is None:
        return is_asked and numeral == gold.group(1)
    return given.group(1) == gold.group(1) and _base(given) == _base(gold)


def _base(numeral: re.Match[str]) -> str:
    name = numeral.group(2) or numeral.group(3)
    return str(_BASES.get(name, name))
