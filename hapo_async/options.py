"""Options of an algorithm: declared once with default, rule and help; checked with the value, the rule and the fix."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hapo_async.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """One option. The kind of value follows from the default (bool, int, float, or one of ``choices``), or is ``kind``
    where the default is None; then None stays allowed. low, high: bounds, inclusive unless ``low_open`` or
    ``high_open``. aliases: other names."""

    default: Any
    help: str
    choices: tuple[str, ...] = ()
    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False
    kind: type | None = None
    aliases: tuple[str, ...] = ()

    @property
    def rule(self) -> str:
        """What a value must be, in words."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        kind = self.kind or type(self.default)
        if kind is bool:
            return "true or false"
        text = {int: "an integer", float: "a number"}[kind]
        if math.isfinite(self.low):
            text += f" {'above' if self.low_open else 'of at least'} {self.low:g}"
        if math.isfinite(self.high):
            text += " and" if math.isfinite(self.low) else ""
            text += f" {'below' if self.high_open else 'at most'} {self.high:g}"
        return text + (" or null" if self.default is None else "")

    def accepts(self, value: Any) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if value is None:
            return self.default is None
        kind = self.kind or type(self.default)
        if kind is bool or isinstance(value, bool):
            return kind is bool and isinstance(value, bool)
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below and (kind is float or float(value).is_integer())

    def convert(self, value: Any) -> Any:
        """An accepted value in the option's own type: 1 becomes 1.0 where a number is meant."""
        kind = self.kind or type(self.default)
        return kind(value) if kind in (int, float) and value is not None else value


def merge(
    owner: str, known: Mapping[str, Option], implied: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Defaults, then ``implied``, then ``given`` (by name or alias). Raises ConfigError for an unknown name, with the
    nearest one, for a value that breaks its rule, and for one option given twice."""
    names = {alias: name for name, option in known.items() for alias in (name, *option.aliases)}
    out = {name: option.default for name, option in known.items()}
    seen: set[str] = set()
    out |= {name: known[name].convert(value) for name, value in implied.items()}
    for key, value in given.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(
                f"unknown option {key!r} of algorithm {owner!r}.{hint} Its options: {', '.join(known) or 'none'}."
            )
        name, option = names[key], known[names[key]]
        if not option.accepts(value):
            raise ConfigError(f"options.{key}={value!r} of algorithm {owner!r} must be {option.rule}: {option.help}.")
        if key in given and name in seen:
            raise ConfigError(
                f"option {name!r} of algorithm {owner!r} is given twice, once as {key!r}. Keep one of the two."
            )
        seen.add(name)
        out[name] = option.convert(value)
    return out
