"""Sample rollouts for people: a few groups from the beginning, the middle and the end of what a run kept.

Reads ``rollouts/*.jsonl`` by position, never whole: such files grow to gigabytes. Lines that a crash cut are left out,
and fields that are missing are shown as missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hapo_async.evaluation import diversity
from hapo_async.files import open_regular, parse_json

_LINES_READ = 16  # groups looked at per place, from which the most telling are shown
_TEXT_SHOWN = 900  # characters of one text; the rest is counted


@dataclass(frozen=True)
class SampleAnswer:
    """One answer as shown. versions: "0.1 → 0.2" for an answer sampled under two of them."""

    text: str
    verdict: str
    reward: str
    advantage: str
    tokens: int
    versions: str
    finish_reason: str
    is_teacher: bool
    is_replaced: bool


@dataclass(frozen=True)
class SampleGroup:
    """One group as shown."""

    step: int
    place: str
    key: str
    prompt: str
    truth: str
    gate: str
    answers: tuple[SampleAnswer, ...]


def pick(folder: Path, per_place: int = 2) -> list[SampleGroup]:
    """Groups from the beginning, the middle and the end of the rollouts, of each place the ones that show most: an
    injected teacher, both right and wrong answers. Empty when nothing is readable."""
    files = [f for f in sorted(folder.glob("*.jsonl"), key=_natural) if f.is_file() and f.stat().st_size]
    if not files:
        return []
    total = sum(f.stat().st_size for f in files)
    out: list[SampleGroup] = []
    seen: set[str] = set()
    for place, fraction in (("first steps", 0.0), ("half way", 0.5), ("last steps", 1.0)):
        groups = [g for g in _read_at(files, fraction * total, from_end=fraction == 1.0) if _key(g) not in seen]
        for group in sorted(groups, key=_interest, reverse=True)[:per_place]:
            seen.add(_key(group))
            out.append(_shown(group, place))
    return sorted(out, key=lambda group: group.step)


def distinctness(folder: Path, files: int = 24, groups: int = 4) -> tuple[list[float], list[float]]:
    """(steps, 1 - Self-BLEU of the sampled answers of a group, mean over the first groups kept) for at most ``files``
    steps, evenly spread."""
    found = [f for f in sorted(folder.glob("step-*.jsonl"), key=_natural) if f.is_file()]
    chosen = (
        [found[round(i * (len(found) - 1) / max(1, files - 1))] for i in range(files)] if len(found) > files else found
    )
    steps, values = [], []
    for path in chosen:
        with open_regular(path) as file:
            kept = _parsed([file.readline() for _ in range(groups)])
        texts = [
            [str(a.get("text", "")) for a in g["answers"] if isinstance(a, dict) and not _is_teacher(a)] for g in kept
        ]
        value = diversity.distinctness(texts)
        if kept and isinstance(kept[0].get("step"), int) and math.isfinite(value):
            steps.append(float(kept[0]["step"]))
            values.append(value)
    return steps, values


def _natural(path: Path) -> list[Any]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def _read_at(files: Sequence[Path], offset: float, from_end: bool) -> list[dict[str, Any]]:
    """Up to _LINES_READ groups around a byte offset into the files taken as one."""
    for i, path in enumerate(files):
        size = path.stat().st_size
        if offset <= size or i == len(files) - 1:
            break
        offset -= size
    with open_regular(path) as file:
        if from_end:
            return _tail(file, path.stat().st_size)
        file.seek(int(min(offset, size)))
        if file.tell():
            file.readline()
        groups = _parsed([file.readline() for _ in range(_LINES_READ)])
        if groups or not offset:
            return groups
        file.seek(0)  # the offset fell into the last line
        return _parsed([file.readline() for _ in range(_LINES_READ)])


def _tail(file: Any, size: int, window: int = 1 << 20) -> list[dict[str, Any]]:
    """The last whole groups of a file; the window grows until it holds one."""
    while True:
        file.seek(max(size - window, 0))
        lines = file.read().split(b"\n")
        groups = _parsed(lines[1:] if window < size else lines)
        if groups or window >= size:
            return groups[-_LINES_READ // 2 :]
        window *= 8


def _parsed(lines: Sequence[bytes]) -> list[dict[str, Any]]:
    groups = []
    for line in lines:
        try:
            group = parse_json(line)
        except ValueError:
            continue
        if isinstance(group, dict) and isinstance(group.get("answers"), list):
            groups.append(group)
    return groups


def _key(group: dict[str, Any]) -> str:
    key = group.get("key")
    return "/".join(str(part) for part in key) if isinstance(key, list) else str(key)


def _interest(group: dict[str, Any]) -> int:
    verdicts = {a.get("verdict") for a in group["answers"] if isinstance(a, dict) and not _is_teacher(a)}
    mixed = len(verdicts) > 1
    injected = any(_is_teacher(a) for a in group["answers"] if isinstance(a, dict))
    return 2 * injected + mixed


def _is_teacher(answer: dict[str, Any]) -> bool:
    return bool(answer.get("injected")) or answer.get("finish_reason") == "teacher"


def _shown(group: dict[str, Any], place: str) -> SampleGroup:
    recorded = group.get("gate")
    gate = recorded if isinstance(recorded, dict) else {}
    answers = [a for a in group["answers"] if isinstance(a, dict)]
    return SampleGroup(
        step=group["step"] if isinstance(group.get("step"), int) else 0,
        place=place if group.get("step") is None else f"step {group['step']}",
        key=_key(group),
        prompt=_clip(group.get("prompt")),
        truth=_clip(group.get("truth"), 200),
        gate=_gate(gate),
        answers=tuple(_answer(a) for a in answers),
    )


def _answer(answer: dict[str, Any]) -> SampleAnswer:
    spans = answer.get("spans") or []
    versions = list(dict.fromkeys(str(span[0]) for span in spans if isinstance(span, list) and span))
    is_teacher = _is_teacher(answer)
    return SampleAnswer(
        text=_clip(answer.get("text")),
        verdict=str(answer.get("verdict") or "unjudged"),
        reward=_number(answer.get("reward"), "{:g}"),
        advantage=_number(answer.get("advantage"), "{:+.2f}"),
        tokens=len(answer.get("tokens") or []),
        versions=" → ".join(versions),
        finish_reason=str(answer.get("finish_reason") or ""),
        is_teacher=is_teacher,
        is_replaced=bool(answer.get("replaced")) and not is_teacher,
    )


def _gate(gate: dict[str, Any]) -> str:
    """The gate's decision as a sentence; "" when none was recorded."""
    if "successes" not in gate:
        return ""
    parts = [f"{gate['successes']} of {gate.get('judged', '?')} correct"]
    if isinstance(gate.get("confidence"), (int, float)):
        parts.append(f"confidence {gate['confidence']:.2f}")
    parts.append("gate open" if gate.get("is_open") else "gate closed")
    if gate.get("replaced") is not None:
        parts.append(f"the teacher replaced answer {gate['replaced']}")
    elif gate.get("reason"):
        parts.append(str(gate["reason"]))
    return " · ".join(parts)


def _number(value: Any, form: str) -> str:
    return form.format(value) if isinstance(value, (int, float)) else "–"


def _clip(text: Any, limit: int = _TEXT_SHOWN) -> str:
    text = "" if text is None else str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text) - limit} more characters)"
