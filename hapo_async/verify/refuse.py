"""What no honest answer needs: a gate of microseconds before sympy, so that nothing blows up there.

``limits`` bounds size and magnitude and holds for truths too; ``form`` refuses characters and claims that only deceive.
Both return the reason, or "". What a truth contains an answer may contain. The bounds need not be complete: whatever
slips through meets the worker's deadline and is charged to the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

LONGEST = 2000  # characters
MOST_DIGITS = 1000
DEEPEST = 50  # brackets within brackets
MOST_ITEMS = 64  # of a list, a set, a matrix
MOST_COMMANDS = 150
MOST_SIGNS = 200
MOST_FACTORS = 10  # sums in brackets
MOST_ROOTS = 12
HIGHEST_POWER = 1000
HIGHEST_TRUE_POWER = 10**4  # years are popular in competitions
TALLEST_TOWER = 2  # powers within powers
HIGHEST_TOWER = 10**4  # of a power that is itself an exponent
HIGHEST_SUM_POWER = 20  # of a sum with letters, which may be expanded
MOST_POWERS = 20_000  # product of the powers of brackets: ((10^9)^9)^9
BIGGEST_FACTORIAL = 1000
BIGGEST_INDEX = 4  # digits of a binomial's number, a root's or a logarithm's index

_DIGITS = re.compile(r"[0-9]+")
_DECIMALS = re.compile(r"\.[0-9]+")
_SIMPLE_EXPONENT = re.compile(r"[-+]?[0-9a-zA-Z]")
_PLAIN_EXPONENT = re.compile(r"[-+]?[0-9]+")
_COMMANDS = re.compile(r"\\[a-zA-Z]+")
_SEPARATORS = re.compile(r"[,;&]|\\\\")
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_BRACKETS = re.compile(r"\(([^()]*)\)")
_SIGNS = re.compile(r"[-+*/=^<>]")
_RUN = re.compile(r"[-+]{6}|[*/^=<>!]{4}")
_SCIENTIFIC = re.compile(r"[0-9.][eE][-+]?[0-9]{4,}")
_UNBOUNDED = (
    "sum prod coprod int iint iiint oint lim limsup liminf Gamma zeta uparrow Uparrow underbrace overbrace det gcd lcm "
    "input include write def csname catcode newcommand usepackage loop expandafter phantom hphantom vphantom "
    "cancel bcancel xcancel sout rlap llap smash color textcolor href url verb iffalse"
)
_UNBOUNDED_COMMANDS = frozenset(_UNBOUNDED.split())
_FACTORIAL = re.compile(r"((?<![0-9])[0-9]+|[)}\]!])\s*!(?!=)")
_INDEXED = re.compile(r"\\(?:[dt]?binom|sqrt|log|choose|lg|ln|pmod|bmod|mod)(?![a-zA-Z])")
_MATRIX_POWER = re.compile(r"\\end\{[a-zA-Z]*matrix\}(?:\\right[)\]|.])?\s*\^")
_DOUBLE_POWER = re.compile(r"(?:\^|\*\*)\s*(?:[0-9]{1,20}|[a-zA-Z]|\([^()]{0,40}\)|\{[^{}]{0,40}\})\s*(?:\^|\*\*)")


def limits(text: str, truth: str = "") -> str:
    """Why ``text`` is too big to be worth a look, or "". Linear in it; truth: what it is compared with, "" where it is the
    truth."""
    if len(text) > max(LONGEST, 2 * len(truth)):
        return f"longer than {LONGEST} characters"
    if len(text) > MOST_DIGITS and sum(map(len, _DIGITS.findall(text))) > MOST_DIGITS:
        return f"more than {MOST_DIGITS} digits"
    if depth(text) > DEEPEST:
        return f"nested deeper than {DEEPEST}"
    if len(_SEPARATORS.findall(_THOUSANDS.sub("", text))) >= MOST_ITEMS:
        return f"more than {MOST_ITEMS} items"
    commands = _COMMANDS.findall(text)
    if len(commands) > max(MOST_COMMANDS, 2 * truth.count("\\")):
        return f"more than {MOST_COMMANDS} commands"
    if _RUN.search(text) or len(_SIGNS.findall(text)) > max(MOST_SIGNS, 2 * len(_SIGNS.findall(truth))):
        return "a row of signs"
    if truth and _factors(text) > max(MOST_FACTORS, 2 * truth.count("(")):
        return f"more than {MOST_FACTORS} sums in brackets"
    if commands.count("\\exp") > 2:
        return "exponentials of exponentials"
    if commands.count("\\sqrt") > max(MOST_ROOTS, truth.count("\\sqrt")):
        return f"more than {MOST_ROOTS} roots"
    if _SCIENTIFIC.search(text):
        return "an exponent of more than three digits"
    return _powers(text, truth) or _products(text, truth)


def _factors(text: str) -> int:
    """Innermost round brackets that hold a sum with letters."""
    return sum(_sum_with_letters(inside) for inside in _BRACKETS.findall(text))


def depth(text: str) -> int:
    """How deep brackets of any kind are nested."""
    most = now = 0
    for character in text:
        if character in "{([":
            now += 1
            most = max(most, now)
        elif character in "})]" and now:
            now -= 1
    return most


def _powers(text: str, truth: str) -> str:
    if "^" not in text and "**" not in text:
        return ""
    known = set(_DIGITS.findall(truth))
    if _DOUBLE_POWER.search(text):
        return "a power of a power without brackets"
    if _MATRIX_POWER.search(text) and not _MATRIX_POWER.search(truth):
        return "a power of a matrix"
    product = 1
    for level, exponent, base in _exponents(text):
        if level > TALLEST_TOWER and level > truth.count("^"):
            return f"a tower of more than {TALLEST_TOWER} powers"
        if "!" in exponent:
            return "a factorial as exponent"
        bound = 1
        for digits in _DIGITS.findall(_DECIMALS.sub("", exponent)):
            if digits not in known:
                bound *= max(1, int(digits[:6]))
        if bound > (HIGHEST_POWER if truth else HIGHEST_TRUE_POWER):
            return f"a power of {bound}"
        if level > 1 and _size(text, base) ** min(bound, 20) > HIGHEST_TOWER:
            return f"a power of {bound} within a power"
        if text[base : base + 1] in (")", "]", "}"):
            product *= bound
            if truth and bound > HIGHEST_SUM_POWER and _sum_with_letters(text):
                return f"a power of {bound} of a sum"
    return f"powers of powers: {product}" if product > MOST_POWERS else ""


def _size(text: str, end: int) -> int:
    """About how large the base is that ends at ``end``: a number is what it is, brackets are ten, letters are one."""
    if not text[end].isdigit():
        return 10 if text[end] in ")]}" else 1
    start = end
    while start > 0 and text[start - 1].isdigit() and end - start < 6:
        start -= 1
    return int(text[start : end + 1])


def _exponents(text: str) -> Iterator[tuple[int, str, int]]:
    """(level from 1, the exponent's text, where its base ends) of each power, in one pass."""
    open_at: list[
        tuple[int, int, int]
    ] = []  # a power in brackets: where it starts, its base's end, its bracket's depth
    now = position = before = 0
    while position < len(text):
        character = text[position]
        sign = 1 if character == "^" else 2 if text.startswith("**", position) else 0
        if sign:
            position += sign
            while position < len(text) and text[position].isspace():
                position += 1
            if position < len(text) and text[position] in "{(":
                open_at.append((position, before, now))
                now += 1
            elif found := (_PLAIN_EXPONENT if sign == 2 else _SIMPLE_EXPONENT).match(text, position):
                yield len(open_at) + 1, found.group(), before
                position = found.end() - 1
        elif character in "{([":
            now += 1
        elif character in "})]":
            now = max(0, now - 1)
            if open_at and open_at[-1][2] == now:
                start, base, _ = open_at.pop()
                yield len(open_at) + 1, text[start + 1 : position], base
        if position < len(text) and not text[position].isspace():
            before = position
        position += 1
    for level, (start, base, _) in enumerate(open_at, 1):
        yield level, text[start + 1 :], base


def _sum_with_letters(text: str) -> bool:
    bare = _COMMANDS.sub("", text)
    return ("+" in bare or "-" in bare) and any(c.isalpha() for c in bare)


def _products(text: str, truth: str) -> str:
    """Factorials, binomials and whatever else has no bound of its own."""
    for found in _FACTORIAL.finditer(text):
        before = found.group(1)
        if before.isdigit():
            if len(before) > 4 or int(before) > BIGGEST_FACTORIAL:
                return f"the factorial of {before[:12]}"
        elif text.count("!") > truth.count("!") and (before == "!" or _is_large(text)):
            return "a factorial of something large"
    for found in _INDEXED.finditer(text):
        near = text[found.end() : found.end() + 24]
        near = near.split("]")[0] if near.startswith("[") else near
        is_index = found.group() not in ("\\sqrt", "\\log", "\\ln", "\\lg") or near.lstrip().startswith(("[", "_"))
        if is_index and any(len(digits) > BIGGEST_INDEX for digits in _DIGITS.findall(near)):
            return f"a large argument of {found.group()}"
    for command in _COMMANDS.findall(text):
        if truth and command[1:] in _UNBOUNDED_COMMANDS and command not in truth:
            return f"{command} in a final answer"
    return ""


def _is_large(text: str) -> bool:
    return "^" in text or text.count("!") > 2 or any(len(digits) > 2 for digits in _DIGITS.findall(text))


# --------------------------------------------------------------------------------------------------------------------
# Characters

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_LETTERS = (0x00C0, 0x024F), (0x0370, 0x03FF)  # Latin, Greek
_SYMBOLS = (
    (0x00A0, 0x00BF),
    (0x2010, 0x2027),
    (0x2030, 0x205F),
    (0x2070, 0x209C),
    (0x2100, 0x214F),
    (0x2150, 0x215E),
    (0x2190, 0x22FF),
    (0x2308, 0x230B),
    (0x27E8, 0x27E9),
    (0x2A00, 0x2AFF),
    (0x20A0, 0x20BF),
)


def characters(text: str, truth: str = "") -> str:
    """Why a character of ``text`` has no business in an answer, or "": control bytes, invisible ones, digits and letters
    that only look like others."""
    if _CONTROL.search(text):
        return "control characters"
    if text.isascii():
        return ""
    for character in set(text) - set(truth):
        code = ord(character)
        if code < 128:
            continue
        category = unicodedata.category(character)
        allowed = any(a <= code <= b for a, b in (*_LETTERS, *_SYMBOLS)) or category == "Zs"
        if not allowed or category in ("Cf", "Cc", "Mn", "Me", "Nd"):
            return f"the character U+{code:04X} ({unicodedata.name(character, 'unnamed')})"
    return ""


# --------------------------------------------------------------------------------------------------------------------
# Form

_SPLIT_DIGITS = re.compile(r"(?<![_^0-9])[0-9]+(?:\s+[0-9]+)+")
_GROUPED = re.compile(r"[0-9]{1,3}(?:\s[0-9]{3})+")
_BAD = re.compile(
    r"\\(?:neq?|not|neg|lnot|approx|sim|simeq|cong|nless|ngtr|nleq|ngeq|notin|in|ni|subset|subseteq|mid|nmid|lor|vee|land|"
    r"wedge|to|rightarrow|implies|iff|Rightarrow|Leftrightarrow|overline|underline|widehat|pm|mp|cup|setminus|dots|ldots|"
    r"cdots|forall|exists|because|therefore)(?![a-zA-Z])"
    r"|[≠≈∉∈∼¬±∓∪∨∧→⇒…≡≅]|!=|=!|<>|~|\.\.|==|:=|\|\||&&|(?:^|[^\\])%(?=.*\S)"
)
_WORD = re.compile(r"[A-Za-z]+")
_PRIMES = re.compile(r"['\"`´″]")
_SET_WORDS = re.compile(r"\\text\{[^{}]*\}")
_READ_TEXT = (
    "frac sqrt cdot times div pi sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp binom lfloor rfloor "
    "lceil rceil circ degree begin end cup cap infty in mathbb emptyset pm mp le ge lt gt text "
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau upsilon phi "
    "varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega ell lvert rvert vert choose "
    "lor land vee wedge imath"
)
_READ = frozenset(_READ_TEXT.split())
_NEGATE = (
    "not no nor never neither isn isnt wrong false incorrect except but unlike cannot anything nothing instead nope untrue "
    "impossible invalid excluded excluding exclude without fails unequal non doesn doesnt don dont can cant won wasn aren"
)
_CHANGE = (
    "or and either if else unless maybe perhaps possibly approximately roughly nearly almost than to minus plus half double "
    "twice thrice triple squared cubed hundred thousand million billion trillion dozen negative negated opposite reciprocal "
    "inverse complement conjugate factorial percentile exceeds exceeding roughly approx circa versus vs alternatively otherwise"
)
_WIDEN = (
    "about around between more less greater least most over under above below at from all any every none some real larger "
    "smaller bigger bounded beyond within near close"
)
NEGATIONS = frozenset(_NEGATE.split())
UNIT_STOPS = NEGATIONS | frozenset(_CHANGE.split())
STOP_WORDS = UNIT_STOPS | frozenset(_WIDEN.split())
"""Words that take back, change or widen what they stand beside (``42 or 43``, ``42 million``, ``at least 42``); those of
units are fewer: ``42 more apples``, ``42 in all``."""


def without_commands(text: str) -> str:
    return _COMMANDS.sub(" ", text)


def primes(text: str, truth: str = "") -> str:
    """A prime or quotation mark outside of words, which the grammar would pass over, or ""."""
    found = _PRIMES.search(_SET_WORDS.sub("", text))
    return found.group() if found and found.group() not in truth else ""


def unread(text: str, truth: str = "") -> str:
    """The first command that is neither known nor in the truth, or ""."""
    return next((c for c in _COMMANDS.findall(text) if c[1:] not in _READ and c not in truth), "")


def split_digits(text: str) -> bool:
    """``4 2`` is no 42; ``10 080`` is a number."""
    return any(not _GROUPED.fullmatch(found.group()) for found in _SPLIT_DIGITS.finditer(text))


def hedges(text: str, truth: str = "") -> str:
    """The first sign of negation, approximation, alternative or membership that the truth has not, or ""."""
    for found in _BAD.finditer(text):
        if found.group() not in truth:
            return found.group()
    return ""


def stop_word(text: str, truth: str = "", words: frozenset[str] = STOP_WORDS) -> str:
    """The first of ``words`` in the text that the truth has not, or ""."""
    known = {word.lower() for word in _WORD.findall(truth)}
    return next((w for w in map(str.lower, _WORD.findall(text)) if w in words and w not in known), "")


def items(text: str) -> int:
    """Parts of a list at the top level: separated by commas or semicolons outside of brackets."""
    count, now = 1, 0
    for character in _THOUSANDS.sub("", text):
        if character in "{([":
            now += 1
        elif character in "})]":
            now -= 1
        elif character in ",;" and now <= 0:
            count += 1
    return count
