"""Which column is what: the conventions of verl, LUFFY, TRL, GSM8K and MATH, and a person's own words before them.

| convention | told by | prompt | truth | teacher |
|---|---|---|---|---|
| verl | ``reward_model`` | ``prompt`` (messages or text) | ``reward_model.ground_truth`` | |
| LUFFY | verl and ``target`` | as verl | as verl | ``target`` (messages or text) |
| GSM8K | ``question``, ``answer`` with ``####`` | ``question`` | after ``####`` | the whole ``answer`` |
| MATH | ``problem``, ``solution`` | ``problem`` | ``answer``, else the last box of ``solution`` | ``solution`` |
| TRL | ``prompt``, ``answer`` (``ground_truth``, ``truth``) | ``prompt`` | that | ``solution`` where there is one |
| question-answer | ``question``, ``answer`` | ``question`` | ``answer`` | ``solution`` where there is one |
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hapo_async.errors import DataError
from hapo_async.verify import boxed

ROLES = ("prompt", "truth", "teacher", "uid", "source")
_UID = ("uid", "unique_id", "problem_id", "id")
_SOURCE = ("data_source", "source")
_TRUTH = ("answer", "ground_truth", "truth", "final_answer")
_CALCULATOR = re.compile(r"<<[^<>\n]*>>")


@dataclass(frozen=True)
class ColumnMapping:
    """The column of each role, dotted where it lies inside another; None where there is none."""

    convention: str
    prompt: str
    truth: str | None
    teacher: str | None = None
    uid: str | None = None
    source: str | None = None
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """One line for people."""
        parts = [f"{role} = {getattr(self, role)}" for role in ROLES if getattr(self, role)]
        return f"{self.convention}: " + ", ".join(parts) + "".join(f"; {note}" for note in self.notes)

    # The values of one row ------------------------------------------------------------------------------------------

    def prompt_of(self, row: Mapping[str, Any], where: str) -> list[dict[str, str]]:
        """The messages; text becomes one user message. Raises DataError."""
        value = get(row, self.prompt)
        if isinstance(value, str) and value.strip():
            return [{"role": "user", "content": value}]
        if isinstance(value, list) and value and all(_is_message(m) for m in value):
            return [{"role": str(m["role"]), "content": str(m["content"])} for m in value]
        raise DataError(
            f"{where}: column {self.prompt!r} holds {str(value)[:60]!r}; a prompt is text or a list of "
            '{"role", "content"} messages. Fix the row, or name another column with data.columns.prompt.'
        )

    def truth_of(self, row: Mapping[str, Any]) -> Any:
        """What the verifier compares with, or None."""
        value = get(row, self.truth) if self.truth else None
        if isinstance(value, str) and self.convention == "GSM8K":
            value = value.rsplit("####", 1)[1].strip() if "####" in value else None
        if isinstance(value, str) and self.truth == self.teacher and self.convention == "MATH":
            value = boxed.last_boxed(value)
        return None if value is None or value == "" or value == [] else value

    def teachers_of(self, row: Mapping[str, Any]) -> list[str]:
        """Worked solutions: none, one or several."""
        texts = _texts(get(row, self.teacher)) if self.teacher else []
        if self.convention == "GSM8K":
            # Calculator annotations such as <<48/2=24>> are for a tool that nobody runs: they are not taught.
            texts = [_CALCULATOR.sub("", text) for text in texts]
        return [text.strip() for text in texts if text.strip()]


def recognise(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> ColumnMapping:
    """Finds the columns from the first rows; ``columns`` (role -> name) overrides.

    Raises DataError for an unknown role, a column that is not there (with the nearest), and rows of no known shape.
    """
    chosen = dict(columns or {})
    for role in chosen:
        if role not in ROLES:
            near = difflib.get_close_matches(role, ROLES, n=1, cutoff=0.4)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise DataError(f"data.columns.{role} is not a role.{hint} The roles are {', '.join(ROLES)}.")
    sample = rows[: min(len(rows), 64)]
    names = list(dict.fromkeys(name for row in sample for name in row))
    for role, column in chosen.items():
        _require(sample, role, column, names)
    found = _convention(sample, names, explicit_prompt="prompt" in chosen)
    if found is None and "prompt" not in chosen:
        raise DataError(
            f"no known columns among {', '.join(names)}. Name them: data.columns.prompt=..., data.columns.truth=..., "
            "and where there are worked solutions data.columns.teacher=..."
        )
    found = found or {"convention": "your own", "prompt": chosen["prompt"], "truth": None}
    uid = next((c for c in _UID if c in names and all(isinstance(r.get(c), str | int) for r in rows)), None)
    source = next((c for c in _SOURCE if c in names), None)
    merged = {"uid": uid, "source": source} | found | chosen
    if chosen.keys() & {"prompt", "truth", "teacher"}:
        merged["convention"] = _named_convention(sample, merged)
    mapping = ColumnMapping(**merged)
    return ColumnMapping(**{**merged, "notes": _notes(mapping)})


def get(row: Mapping[str, Any], column: str) -> Any:
    """A column's value; ``a.b`` is key b of column a. None where it is missing."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _convention(sample: Sequence[Mapping[str, Any]], names: list[str], explicit_prompt: bool) -> dict[str, Any] | None:
    solution = "solution" if "solution" in names else None
    if "prompt" in names and "reward_model" in names:
        teacher = "target" if "target" in names else None
        return {
            "convention": "LUFFY" if teacher else "verl",
            "prompt": "prompt",
            "truth": "reward_model.ground_truth",
            "teacher": teacher,
        }
    if "question" in names and "answer" in names and _mostly_hashed(sample, "answer"):
        return {"convention": "GSM8K", "prompt": "question", "truth": "answer", "teacher": "answer"}
    truth = next((c for c in _TRUTH if c in names), None)
    if "problem" in names and (solution or truth):
        return {"convention": "MATH", "prompt": "problem", "truth": truth or solution, "teacher": solution}
    if "prompt" in names:
        return {
            "convention": "TRL",
            "prompt": "prompt",
            "truth": truth or solution,
            "teacher": solution if truth else None,
        }
    if "question" in names:
        return {
            "convention": "question-answer",
            "prompt": "question",
            "truth": truth or solution,
            "teacher": solution if truth else None,
        }
    if explicit_prompt:
        return {"convention": "your own", "prompt": "", "truth": truth, "teacher": solution}
    return None


def _named_convention(sample: Sequence[Mapping[str, Any]], merged: Mapping[str, Any]) -> str:
    """Named columns keep the reading of their convention: ``####`` in a truth is GSM8K's wherever it stands."""
    truth, teacher = merged.get("truth"), merged.get("teacher")
    if truth and _mostly_hashed(sample, truth):
        return "GSM8K"
    return "MATH" if truth and truth == teacher else "your own"


def _notes(mapping: ColumnMapping) -> tuple[str, ...]:
    notes = []
    if mapping.convention == "GSM8K":
        notes.append("truth is what follows ####; calculator annotations <<...>> are left out of the teacher")
    if mapping.convention == "MATH" and mapping.truth == mapping.teacher:
        notes.append("truth is the last \\boxed{} of the solution")
    if mapping.truth is None:
        notes.append("no truth column")
    if mapping.uid is None:
        notes.append("uid is a hash of the prompt")
    return tuple(notes)


def _require(sample: Sequence[Mapping[str, Any]], role: str, column: str, names: list[str]) -> None:
    if any(get(row, column) is not None for row in sample):
        return
    near = difflib.get_close_matches(column, names, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise DataError(
        f"data.columns.{role}={column!r}: there is no such column (or it is empty).{hint} "
        f"The columns are {', '.join(names)}."
    )


def _mostly_hashed(sample: Sequence[Mapping[str, Any]], column: str) -> bool:
    return 2 * sum(isinstance(v := get(row, column), str) and "####" in v for row in sample) > len(sample)


def _texts(value: Any) -> list[str]:
    """A solution is text, messages (the assistant's last counts), or a list of either."""
    if value is None:
        return []
    if isinstance(value, list):
        if value and all(_is_message(m) for m in value):
            spoken = [str(m["content"]) for m in value if m["role"] == "assistant"]
            return spoken[-1:]
        return [text for item in value for text in _texts(item)]
    return [str(value)]


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and isinstance(value.get("content"), str)
