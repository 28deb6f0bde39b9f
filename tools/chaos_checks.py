"""A finished case of ``chaos.py``, looked at from outside: files alone, none of the product's code.

What must hold, whatever happened: the ledger's identity in every row; every prompt that the data gave out is in the ledger; a
prompt that it says was trained has one group in rollouts/, of that step; no prompt has two; no group that was trained holds a
token of a version that a restart had discarded by then; no checkpoint was taken in that is not what its manifest says.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from pathlib import Path
from typing import Any

import chaos_arms
from chaos_plan import Case

PLACES = ("trained", "dropped", "in_flight", "buffered", "to_retry")


class Story:
    """timeline.jsonl: the steps, starts and checkpoints of a case, in the order of time."""

    def __init__(self, folder: Path) -> None:
        self.rows = sorted(chaos_arms.rows(folder / chaos_arms.TIMELINE), key=lambda row: row["t"])
        self.steps = self.of("step")
        self._times = [row["t"] for row in self.steps]
        self.bases: dict[
            int, tuple[int, float]
        ] = {}  # of each incarnation that gave out a version: its first step, when
        for row in self.of("publish"):
            self.bases.setdefault(row["incarnation"], (row["step"], row["t"]))

    def of(self, *kinds: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] in kinds]

    def next_step_s(self, t: float, others: int = 0) -> float | None:
        """Seconds from ``t`` until a step was committed, ``others`` before it left out."""
        place = bisect_right(self._times, t) + others
        return self._times[place] - t if place < len(self._times) else None

    def step_at(self, t: float) -> int:
        """The newest step that had been committed."""
        place = bisect_right(self._times, t)
        return int(self.steps[place - 1]["step"]) if place else 0

    def rolled_back(self, t: float, until: float) -> int:
        """Steps that a restart which began in this time gave up."""
        return sum(
            max(0, self._last_before(began) - base)
            for incarnation, (base, began) in self.bases.items()
            if t < began <= until and incarnation > 1
        )

    def _last_before(self, t: float) -> int:
        place = bisect_right(self._times, t)
        return int(self.steps[place - 1]["step"]) if place else 0

    def is_discarded(self, incarnation: int, step: int, by: int) -> bool:
        """Whether a later incarnation, up to ``by``, went on from an earlier step."""
        return any(incarnation < later <= by and step > base for later, (base, _) in self.bases.items())


def problems(folder: Path, case: Case) -> tuple[list[str], dict[str, Any]]:
    """(what must not be, counts)."""
    story, run = Story(folder), folder / "run"
    rows = [row for row in chaos_arms.rows(run / "metrics.jsonl") if "ledger/issued" in row]
    gone = [row for row in chaos_arms.rows(run / "discarded" / "metrics.jsonl") if "ledger/issued" in row]
    broken = [row["step"] for row in (*rows, *gone) if row["ledger/issued"] != sum(row[f"ledger/{p}"] for p in PLACES)]
    rollouts = [row for path in sorted((run / "rollouts").glob("*.jsonl")) for row in chaos_arms.rows(path)]
    kept = Counter((row["key"][0], row["key"][1], row["step"] + 1) for row in rollouts)  # a row names the step before
    prompts = Counter((row["key"][0], row["key"][1]) for row in rollouts)
    driver = newest_driver(run)
    ledger = {(e, u): (place, detail) for e, u, place, _, detail, _ in driver["ledger"]["entries"]}
    trained = {(*where, int(detail)) for where, (place, detail) in ledger.items() if place == "trained"}
    cursor = driver["cursor"]
    drawn = cursor["epoch"] * cursor["prompts"] + cursor["position"]
    accepted = [row for row in story.of("load") if row["problem"]]
    last = max((row["step"] for row in rows), default=0)
    per_step = next(int(s.partition("=")[2]) for s in reversed(case.settings) if s.startswith("train.batch_prompts="))
    counts = {
        "steps": last,
        "steps_made": len(story.steps),
        "identity_checked": len(rows) + len(gone),
        "identity_broken": len(broken),
        "issued": len(ledger),
        "trained": len(trained),
        "expected": last * per_step,
        "lost": max(0, drawn - len(ledger)) + len(trained - set(kept)),
        "trained_twice": sum(n > 1 for n in prompts.values()) + len(set(kept) - trained),
        "older_lineage": sum(_holds_discarded(row, story) for row in rollouts),
        "discarded_lineage": int(max((row.get("ledger/discarded_lineage", 0) for row in rows), default=0)),
        "corrupt_accepted": len(accepted),
        "loads": len(story.of("load")),
        "incarnations": len(story.bases),
        "dropped": dict(driver["ledger"]["dropped_reasons"]),
        "alarms": int(sum(row.get("watchdog/alarms", 0) for row in (*rows, *gone))),
        "checkpoints_failed": int(sum(row.get("checkpoint/failed", 0) for row in (*rows, *gone))),
    }
    zero = ("identity_broken", "lost", "trained_twice", "older_lineage", "corrupt_accepted")
    out = [f"{name.replace('_', ' ')}: {counts[name]}" for name in zero if counts[name]]
    if counts["trained"] != counts["expected"]:
        out.append(f"{counts['trained']} prompts were trained in {last} steps, not {counts['expected']}")
    if case.steps and last != case.steps:
        out.append(f"the run has {last} steps, not {case.steps}")
    if [row["step"] for row in rows if row["step"]] != list(range(1, last + 1)):
        out.append("metrics.jsonl does not hold each step once")
    out += [f"injector: {row['text']}" for row in story.of("trouble")]
    return out, counts


def _holds_discarded(row: dict[str, Any], story: Story) -> bool:
    """Whether a trained group holds a token of a version that had been discarded when it was trained."""
    by = max((s["incarnation"] for s in story.steps if s["step"] == row["step"] + 1), default=0)
    spans = (tuple(map(int, span[0].split("."))) for a in row["answers"] for span in a.get("spans", ()))
    return any(story.is_discarded(incarnation, step, by) for incarnation, step in spans)


def newest_driver(run: Path) -> dict[str, Any]:
    """What the driver put into the newest checkpoint."""
    newest = max(
        (p for p in (run / "checkpoints").glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:])
    )
    told: dict[str, Any] = json.loads((newest / "driver.json").read_text())
    return told
