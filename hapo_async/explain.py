"""What `hapo-async explain` prints: the parts of algorithms as text, and what two of them do differently."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from hapo_async import algorithms

WIDTH = 116
_PARTS = ("trains_on", "keep", "advantage", "reference", "mask", "weight", "reduction")
_LABELS = {"trains_on": "trains on", "keep": "keeps", "J_per_token": "J per token", "needs": "needs"}


def find(name: str) -> dict[str, Any]:
    """``Algorithm.describe`` of a name as people write it (HAPO+APO, Dr.GRPO). Raises ConfigError for an unknown one."""
    spelled = name.lower().replace("+", "_").replace(".", "_").replace("-", "_")
    return algorithms.get(spelled if spelled in algorithms.TABLE else name).describe()


def overview() -> str:
    """One line for every algorithm: name, what it trains on, title."""
    rows = [algorithms.get(name).describe() for name in algorithms.names()]
    lines = [f"{'name':<22}{'trains on':<16}what it is"]
    for d in rows:
        source = "cached answers" if d["offline"] else d["composition"]
        lines += _wrapped(d["title"], f"{d['name']:<22}{source:<16}")
    return "\n".join(lines)


def page(d: Mapping[str, Any]) -> str:
    """One algorithm: title, papers, equation, parts, options with defaults."""
    lines = [f"{d['name']}: {d['title']}", f"papers {', '.join(d['seed_papers'])}"]
    if "note" in d:
        lines.append(f"note: {d['note']}")
    lines += ["", *_wrapped(d["equation"], ""), ""]
    for key in (*_PARTS, "needs"):
        lines += _entry(_LABELS.get(key, key), d[key])
    lines += ["", "options (set as options.NAME=VALUE):"]
    for name, text in d["options"].items():
        setting = f"{name}={_value(d['defaults'][name])}"
        lines += _wrapped(text, f"  {setting:<28}")
    return "\n".join(lines)


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Part -> {name of a: ..., name of b: ...} where the two differ; options under ``defaults`` (absent: null)."""
    out: dict[str, dict[str, Any]] = {}
    for key in ("equation", *_PARTS, "uses_gate", "needs"):
        if a[key] != b[key]:
            out[key] = {a["name"]: a[key], b["name"]: b[key]}
    absent = object()
    for name in dict.fromkeys([*a["defaults"], *b["defaults"]]):
        values = [d["defaults"].get(name, absent) for d in (a, b)]
        if values[0] != values[1]:
            shown = [None if v is absent else _value(v) for v in values]
            out.setdefault("defaults", {})[name] = {a["name"]: shown[0], b["name"]: shown[1]}
    return out


def difference_text(a: Mapping[str, Any], b: Mapping[str, Any]) -> str:
    """``difference`` for reading."""
    found = difference(a, b)
    options = found.pop("defaults", {})
    lines = [f"{a['name']}: {a['title']}", f"{b['name']}: {b['title']}"]
    width = max(len(a["name"]), len(b["name"])) + 2
    for key, values in found.items():
        lines += ["", _LABELS.get(key, key)]
        for name, value in values.items():
            lines += _wrapped(_flat(value), f"  {name:<{width}}")
    if options:
        lines += ["", "options"]
    for name, values in options.items():
        shown = [f"{who} {'has none' if v is None else v}" for who, v in values.items()]
        lines.append(f"  {name}: {', '.join(shown)}")
    if not found and not options:
        lines += ["", "no difference"]
    return "\n".join(lines)


def _entry(label: str, value: Any) -> list[str]:
    if isinstance(value, Mapping) and len(value) > 1:
        lines = []
        for i, (name, text) in enumerate(value.items()):
            lines += _wrapped(str(text), f"{label if i == 0 else '':<12}{name}: ")
        return lines
    return _wrapped(_flat(value), f"{label:<12}")


def _flat(value: Any) -> str:
    if isinstance(value, Mapping):
        parts = list(value.items())
        return str(parts[0][1]) if len(parts) == 1 else "; ".join(f"{k}: {v}" for k, v in parts)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "nothing but log-probs"
    return str(value)


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def _wrapped(text: str, first: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=" " * len(first)) or [first.rstrip()]
