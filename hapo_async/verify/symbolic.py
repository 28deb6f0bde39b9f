"""Equality by sympy, through Math-Verify's grammar. All of a text is parsed, or it is not understood: no piece is looked for,
nothing is taken for a unit.

Two equations are equal when one is a multiple of the other; inequalities when the factor is positive. What Math-Verify calls
equal up to rounding is looked at again with 60 digits.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable
from typing import Any

# Called with True before sympy is loaded and with False after, so that a worker can stop its deadline clock.
loading_hook: Callable[[bool], None] | None = None

_IMAGINARY = re.compile(r"(?<![A-Za-z\\_])i(?![A-Za-z])|\\(?:mathbb\{C\}|imath|Re|Im|arg|det)(?![a-zA-Z])")
_MOST_ERROR = 10.0**-40
_ORDERS = {
    "StrictGreaterThan": (1, True),
    "StrictLessThan": (-1, True),
    "GreaterThan": (1, False),
    "LessThan": (-1, False),
}


def equal(answer: str, gold: str) -> bool | None:
    """None when the answer cannot be read; False when the truth cannot: only the same text would have been right."""
    is_real = not (_IMAGINARY.search(answer) or _IMAGINARY.search(gold))
    truth = _parse(gold, is_real)
    if truth is None:
        return False
    given = _parse(answer, is_real)
    if given is None:
        return None
    if _is_plain_relation(truth) and _is_plain_relation(given):
        return _same_relation(truth, given)
    same = bool(_math_verify().verify([truth], [given], timeout_seconds=None))
    return same and not _differ(truth, given)


@functools.cache
def _math_verify() -> Any:
    """The Math-Verify module, ready to parse; loading it takes a second."""
    if loading_hook:
        loading_hook(True)
    try:
        import math_verify

        logging.getLogger("math_verify").setLevel(logging.CRITICAL)
        logging.getLogger("latex2sympy2_extended").setLevel(logging.CRITICAL)
        _parse_with("1", True)  # builds the grammar, most of the first judgement's time
    finally:
        if loading_hook:
            loading_hook(False)
    return math_verify


@functools.lru_cache(maxsize=1024)  # the answers of a group are often the same
def _parse(text: str, is_real: bool) -> Any:
    _math_verify()
    return _parse_with(text, is_real)


def _parse_with(text: str, is_real: bool) -> Any:
    """The sympy object that all of the text stands for, or None."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Intersection

    spelling = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none")
    try:
        value = latex2sympy(text, None, is_real, False, spelling, ConversionConfig(lowercase_symbols=False))
        return Intersection(*value.args) if isinstance(value, Intersection) else value
    except Exception:  # the grammar's own, and whatever sympy raises on odd input
        return None


def _is_plain_relation(value: Any) -> bool:
    """An equation or inequality between two expressions."""
    from sympy import Expr
    from sympy.core.relational import Relational

    return isinstance(value, Relational) and isinstance(value.lhs, Expr) and isinstance(value.rhs, Expr)


def _same_relation(gold: Any, given: Any) -> bool:
    from sympy import simplify

    one, other = (value.doit() for value in (gold.lhs - gold.rhs, given.lhs - given.rhs))
    orders = [_ORDERS.get(type(value).__name__) for value in (gold, given)]
    if type(gold) is not type(given) and (None in orders or orders[0][1] != orders[1][1]):  # type: ignore[index]
        return False
    factor = simplify(one / other) if other != 0 else None
    if factor is None or not factor.is_number or factor.is_zero is not False or not factor.is_finite:
        return False
    if orders[0] is None or orders[1] is None:
        return True
    return bool(factor.is_positive) if orders[0] == orders[1] else bool(factor.is_negative)


def _differ(gold: Any, given: Any) -> bool:
    """Whether two expressions without decimals differ at a point, however little."""
    from sympy import Expr, Float, Rational

    if not (isinstance(gold, Expr) and isinstance(given, Expr)) or gold.has(Float) or given.has(Float):
        return False
    try:
        difference = gold - given
        letters = sorted(difference.free_symbols, key=str)
        point = {letter: Rational(137 + 41 * i, 101) for i, letter in enumerate(letters)}
        value = difference.subs(point).doit().evalf(60)
        return bool(value.is_real and abs(value) > _MOST_ERROR)
    except Exception:  # no number comes out: it stays with what Math-Verify said
        return False
