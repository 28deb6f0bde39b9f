"""Numbers in sentences, and texts by models and data that are shown and never obeyed."""

from __future__ import annotations

import re

_ODD = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, among them the start of every escape sequence
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what reorders the text around it
    "\ud800-\udfff]"  # halves of characters, which cannot be written
)


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 step, 2 steps."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def clean(text: str) -> str:
    """The text with everything that a terminal would act on spelled out, such as \\x1b; tabs and line ends stay."""
    return _ODD.sub(_spelled, text.replace("\r\n", "\n"))


def _spelled(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
