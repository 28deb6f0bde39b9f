"""`hapo-async check-verifier`: how far the verifier agrees with labels that a file already holds.

Two shapes of file (JSON lines, a JSON list or parquet): rows of response, truth and label; and GSM8K's published model
solutions, whose rows hold ``ground_truth`` and, per model, ``{is_correct, solution}``.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hapo_async.data.source import load_rows
from hapo_async.errors import DataError
from hapo_async.verify import math, resolve
from hapo_async.verify.pool import VerifierPool

_RESPONSE = ("response", "solution", "completion", "output", "prediction", "model_output")
_TRUTH = ("truth", "ground_truth", "answer", "gold", "target")
_LABEL = ("label", "is_correct", "correct", "score", "reward")
_PROMPT = ("prompt", "question", "problem")


@dataclass(frozen=True)
class Case:
    """One labelled response; ``row`` counts from 1, ``column`` names the model where a row holds several."""

    row: int
    column: str
    prompt: str
    response: str
    truth: Any
    label: bool


@dataclass(frozen=True)
class Disagreement:
    """A case in which the verifier and the label differ, with what the verifier read."""

    row: int
    column: str
    label: bool
    verdict: str
    answer: str
    truth: str
    detail: str


@dataclass(frozen=True)
class VerifierReport:
    """Outcome of ``check_verifier``; ``agreement`` is the share of cases where (verdict is correct) == label."""

    file: str
    verifier: str
    cases: int
    agree: int
    agreement: float
    seconds: float
    verdicts: Mapping[str, int]
    disagreements: tuple[Disagreement, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def text(self) -> str:
        """For people: one line of result, then a line per disagreement."""
        verdicts = ", ".join(f"{count} {name}" for name, count in sorted(self.verdicts.items()))
        lines = [
            f"{self.file}: verifier {self.verifier!r} agrees with {self.agree} of {self.cases} labels "
            f"({100 * self.agreement:.2f}%) in {self.seconds:.1f} s; verdicts: {verdicts}"
        ]
        if self.disagreements:
            lines.append(f"{len(self.disagreements)} disagreements:")
        for d in self.disagreements:
            label = "correct" if d.label else "wrong"
            where = f"row {d.row}" + (f" {d.column}" if d.column else "")
            note = f" ({d.detail})" if d.detail else ""
            lines.append(f"  {where}: label {label}, verdict {d.verdict}; read {d.answer!r}, truth {d.truth!r}{note}")
        return "\n".join(lines)


def check_verifier(
    path: str,
    name: str = "auto",
    workers: int | None = None,
    timeout_s: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> VerifierReport:
    """Judges every labelled response of a file in a process pool.

    Raises DataError for a file without such columns, ConfigError for an unknown verifier.
    """
    resolve(name)
    rows, _ = load_rows(path)
    cases = read_cases(rows, path)
    start = time.perf_counter()
    with VerifierPool(name, workers or os.cpu_count() or 1, timeout_s) as pool:
        judgements = pool.judge([(c.prompt, c.response, c.truth) for c in cases], progress)
    seconds = time.perf_counter() - start
    differ = [
        Disagreement(
            c.row, c.column, c.label, str(j.verdict), math.final_answer(c.response) or "", str(c.truth), j.detail
        )
        for c, j in zip(cases, judgements, strict=True)
        if (str(j.verdict) == "correct") != c.label
    ]
    agree = len(cases) - len(differ)
    verdicts = Counter(str(j.verdict) for j in judgements)
    return VerifierReport(path, name, len(cases), agree, agree / len(cases), seconds, dict(verdicts), tuple(differ))


def read_cases(rows: Sequence[Mapping[str, Any]], path: str) -> list[Case]:
    """The labelled responses of the rows. Raises DataError when the columns are neither of the two shapes."""
    columns = list(rows[0])
    models = [c for c in columns if isinstance(rows[0][c], Mapping) and {"is_correct", "solution"} <= set(rows[0][c])]
    prompt = next((c for c in _PROMPT if c in columns), None)
    truth = next((c for c in _TRUTH if c in columns), None)
    response = next((c for c in _RESPONSE if c in columns and c != truth), None)
    label = next((c for c in _LABEL if c in columns), None)
    if truth is None or not (models or (response and label)):
        raise DataError(
            f"{path} has columns {', '.join(columns)}. check-verifier needs a response ({', '.join(_RESPONSE)}), a "
            f"truth ({', '.join(_TRUTH)}) and a label ({', '.join(_LABEL)}), or per model a {{is_correct, solution}} "
            "next to ground_truth. Rename the columns."
        )
    cases = []
    for number, row in enumerate(rows, 1):
        text = str(row.get(prompt) or "") if prompt else ""
        gold = _final(row.get(truth))
        for model in models:
            made = row.get(model)
            if isinstance(made, Mapping):
                cases.append(
                    Case(number, model, text, str(made["solution"]), gold, _label(made["is_correct"], number, path))
                )
        if not models:
            assert response and label
            cases.append(Case(number, "", text, str(row.get(response)), gold, _label(row.get(label), number, path)))
    return cases


def _final(truth: Any) -> Any:
    """A worked solution as truth stands for its final answer."""
    return (math.final_answer(truth) or truth) if isinstance(truth, str) and "\n" in truth else truth


def _label(value: Any, row: int, path: str) -> bool:
    if isinstance(value, str) and value.strip().lower() in ("true", "false", "correct", "wrong", "incorrect", "0", "1"):
        return value.strip().lower() in ("true", "correct", "1")
    if isinstance(value, bool | int | float):
        return float(value) >= 1
    raise DataError(f"{path} row {row}: label {value!r} is neither true nor false. Use true/false or 1/0.")
