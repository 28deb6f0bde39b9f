"""A terminal for texts by models and data: they are shown, never obeyed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.text import Text

from hapo_async.words import clean


class Terminal(Console):
    """A console that cleans all texts that it is given, and takes no markup and no :emoji: in them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"markup": False, "emoji": False, **options})

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(clean(text), **options)

    def print_json(self, json: str | None = None, **options: Any) -> None:
        super().print_json(json, **{"ensure_ascii": True, **options})
