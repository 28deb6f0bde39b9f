"""The truth that answers are compared with. One that cannot be judged by poisons its prompt: nobody's answer is wrong."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from hapo_async.verify import boxed, refuse
from hapo_async.verify.glyphs import plain
from hapo_async.verify.spelling import normalise

MOST_TRUTHS = 64


class Poisoned(Exception):
    """No answer can be judged by this truth; says why."""


def check(truth: Any) -> list[str]:
    """The acceptable answers as text. Raises Poisoned where there is none."""
    for item in truth if isinstance(truth, list | tuple) else (truth,):
        if isinstance(item, Mapping | bytes | bool) or (isinstance(item, float) and not math.isfinite(item)):
            raise Poisoned(f"{str(item)[:80]!r} is no answer to compare with")
    try:
        texts = [text for text in boxed.truths(truth) if text]
    except RecursionError:
        raise Poisoned("a list nested too deep") from None
    if not texts:
        raise Poisoned("there is no truth to compare with")
    if len(texts) > MOST_TRUTHS:
        raise Poisoned(f"{len(texts)} acceptable answers; at most {MOST_TRUTHS}")
    return texts


def usable(truth: Any) -> list[str]:
    """As ``check``, without those that no mathematics should be done with. Raises Poisoned where none is left."""
    texts = check(truth)
    kept = [text for text in texts if not hostile(text)]
    if not kept:
        raise Poisoned(f"the truth {texts[0][:80]!r}: {hostile(texts[0])}")
    return kept


@functools.lru_cache(maxsize=4096)
def hostile(text: str) -> str:
    """Why a truth is not to be parsed, or ""."""
    if boxed.has_box(text):
        return "an unfinished box"
    if len(text) < refuse.LONGEST and not normalise(text):
        return "empty"
    return refuse.limits(plain(text))
