"""Which questions were answered correctly: ``evals/<set>.jsonl`` of a run, and the answers that ``eval --save`` keeps.

A run's rows are {step, uid, correct, level}. ``correct`` lists True, False or None (unjudged) for each answer; ``level``
is there where the data name one. Of a large set the first 2,048 questions are kept.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from hapo_async.files import json_line, open_regular, parse_json
from hapo_async.types import SUCCESS, Group, Judgement, Prompt

log = logging.getLogger(__name__)

FOLDER = "evals"
QUESTIONS_KEPT = 2048

Result = tuple[str, Sequence[bool | None], str]
"""(uid, verdict of each answer, level or "")."""


@dataclass
class Questions:
    """One evaluation set over a run. accuracy: step -> uid -> share of correct answers; unjudged ones are left out, and a
    question without a judged answer is missing."""

    name: str
    accuracy: dict[int, dict[str, float]] = field(default_factory=dict)
    levels: dict[str, str] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        return sorted(self.accuracy)

    @property
    def uids(self) -> list[str]:
        """All questions, in the order of their first appearance."""
        return list(dict.fromkeys(uid for step in self.steps for uid in self.accuracy[step]))


def append(run_dir: Path, name: str, step: int, results: Iterable[Result]) -> None:
    """Writes one evaluation of one set. A disk that is full costs the file and not the run."""
    path = run_dir / FOLDER / f"{name}.jsonl"
    lines = []
    for uid, correct, level in list(results)[:QUESTIONS_KEPT]:
        row: dict[str, Any] = {"step": step, "uid": uid, "correct": list(correct)}
        lines.append(_line(row | ({"level": level} if level else {})))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            if file.tell() and not _ends_line(path):  # a crash cut the last line
                file.write(b"\n")
            file.write("".join(lines).encode())
    except OSError as error:
        log.error("%s cannot be written: %s", path, error.strerror)


def discard(run_dir: Path, purge_step: int) -> None:
    """Moves the results of ``purge_step`` and later, which a resume will make anew, to ``discarded/evals/``."""
    for path in _files(run_dir):
        rows = _rows(path)
        gone = [row for row in rows if row["step"] >= purge_step]
        if not gone:
            continue
        target = run_dir / "discarded" / FOLDER / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            file.writelines(_line(row) for row in gone)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(_line(row) for row in rows if row["step"] < purge_step), encoding="utf-8")
        fresh.replace(path)


def read(run_dir: Path) -> dict[str, Questions]:
    """All sets of a run folder. Lines that a crash cut are left out; of two results of a step the later one counts."""
    found = {}
    for path in _files(run_dir):
        questions = Questions(path.stem)
        for row in _rows(path):
            _add(questions, row["step"], row)
        if questions.accuracy:
            found[path.stem] = questions
    return found


def read_answers(path: Path) -> dict[str, Questions]:
    """The sets of a file that ``hapo-async eval --save`` wrote, as evaluations at step 0."""
    found: dict[str, Questions] = {}
    for row in _rows(path, needs=("set", "answers")):
        verdicts = [a.get("reward") for a in row["answers"]]
        correct = [None if reward is None else reward >= SUCCESS for reward in verdicts]
        questions = found.setdefault(str(row["set"]), Questions(str(row["set"])))
        _add(questions, 0, {"uid": row.get("uid"), "correct": correct, "level": row.get("level", "")})
    return found


def describe(name: str, prompt: Prompt, group: Group, judgements: Sequence[Judgement]) -> dict[str, Any]:
    """One evaluated question with all its answers, as ``hapo-async eval --save`` keeps it. ``logp`` are log-probs under the
    distribution that was sampled from, at ``temperature``."""
    row: dict[str, Any] = {"set": name, "uid": prompt.uid, "prompt": prompt.text, "truth": prompt.truth}
    if level := level_of(prompt):
        row["level"] = level
    row |= {"prompt_tokens": group.prompt_tokens.tolist(), "temperature": group.temperature}
    row["answers"] = [
        {
            "text": answer.text,
            "verdict": str(judgement.verdict),
            "reward": judgement.reward,
            "finish_reason": answer.finish_reason,
            "length": answer.length,
            "tokens": answer.tokens.tolist(),
            "logp": [round(float(x), 6) for x in answer.logp_behave],
        }
        for answer, judgement in zip(group.answers, judgements, strict=True)
    ]
    return row


def level_of(prompt: Prompt) -> str:
    """What the data call the question's level, "" where they name none."""
    level = prompt.extra.get("level")
    return "" if level is None else str(level)


def _add(questions: Questions, step: int, row: Mapping[str, Any]) -> None:
    judged = [bool(v) for v in row["correct"] if v is not None]
    uid = str(row["uid"])
    of_step = questions.accuracy.setdefault(step, {})
    if judged:
        of_step[uid] = fmean(judged)
    if row.get("level"):
        questions.levels[uid] = str(row["level"])


def _files(run_dir: Path) -> list[Path]:
    return [path for path in sorted((run_dir / FOLDER).glob("*.jsonl")) if path.is_file()]


def _rows(path: Path, needs: Sequence[str] = ("step", "uid", "correct")) -> list[dict[str, Any]]:
    out = []
    with open_regular(path) as file:
        for line in file:
            try:
                row = parse_json(line.decode("utf-8", "replace"))
            except ValueError:
                continue
            if isinstance(row, dict) and all(name in row for name in needs):
                out.append(row)
    return out


def _line(row: Mapping[str, Any]) -> str:
    return json_line(row)


def _ends_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"
