"""How a run ended, for the closing lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Outcome:
    """How a run ended. evals: metrics of the last evaluation. note: why it ended before train.steps, where it chose to."""

    run_dir: Path
    steps: int
    finished: bool
    seconds: float
    first_evals: dict[str, float] = field(default_factory=dict)
    evals: dict[str, float] = field(default_factory=dict)
    note: str = ""


def outcome_rows(outcome: Outcome) -> list[tuple[str, Any, Any]]:
    """(set, pass@1 before, pass@1 after) of each evaluation set, for the closing lines."""
    names = [k for k in outcome.evals if k.endswith("/pass@1")]
    return [(n.split("/")[1], outcome.first_evals.get(n), outcome.evals[n]) for n in names]
