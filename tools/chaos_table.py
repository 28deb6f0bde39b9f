"""What the journal of ``chaos.py`` says, as a table: docs/faults.md between its marks, and benchmarks/results/chaos.json."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chaos_arms
import measured
import numpy as np

DOC = Path("docs/faults.md")
BEGIN, END = "<!-- from the journal: begin -->", "<!-- from the journal: end -->"
NAMES = {
    "generator": "generator actor",
    "engine": "engine process (vLLM)",
    "verifier": "verifier actor",
    "worker": "verifier worker",
    "learner": "learner rank",
    "driver": "driver",
    "node": "second Ray node",
    "checkpoint": "checkpoint file",
    "disk": "disk of the checkpoints",
    "driver-save": "driver's writing",
    "rank-save": "learner's writing",
    "port": "port",
    "verdict": "judged answer",
    "rank-number": "learner's numbers",
    "generator-number": "generator's log-probs",
    "generator-weights": "bucket at a generator",
    "rank-weights": "bucket leaving the learner",
}
SIGNALS = ("kill", "stop", "term")
COUNTS = {
    "lost": "prompts lost",
    "trained_twice": "prompts trained twice",
    "older_lineage": "groups of an older lineage trained",
    "corrupt_accepted": "corrupt checkpoints accepted",
    "identity_broken": "steps at which the ledger's identity did not hold",
}


def rows(journal: Path) -> list[dict[str, Any]]:
    """The lines of each run's last try."""
    found = chaos_arms.rows(journal)
    last = {row["case"]: row["try"] for row in found if row.get("end")}
    return [row for row in found if row["try"] == last.get(row["case"])]


def summary(journal: Path) -> dict[str, Any]:
    """Counts over all runs, and what each class of fault cost."""
    found = rows(journal)
    faults, ends = [r for r in found if not r.get("end")], [r for r in found if r.get("end")]
    classes: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(faults, key=lambda r: (list(NAMES).index(r["who"]), r["what"])):
        classes.setdefault(row["kind"], []).append(row)
    drivers = [r["orphans_s"] for r in faults if r.get("orphans_s") is not None]
    hangs = [r for r in faults if "never got over" in r["problems"]]
    ended = [s for end in ends for s in end.get("orphans_s", [])]
    return {
        "faults": len(faults),
        "signals": sum(r["what"] in SIGNALS for r in faults),
        "runs": len(ends),
        "starts": sum(end.get("starts", 0) for end in ends),
        "steps": sum(end.get("steps", 0) for end in ends),
        "steps_made": sum(end.get("steps_made", 0) for end in ends),
        "rows_checked": sum(end.get("identity_checked", 0) for end in ends),
        "trained": sum(end.get("trained", 0) for end in ends),
        "rolled_back": sum(r.get("rolled_back", 0) for r in faults),
        "discarded_lineage": sum(end.get("discarded_lineage", 0) for end in ends),
        **{name: sum(end.get(name, 0) for end in ends) for name in COUNTS},
        "hangs": len(hangs),
        "orphans": sum(s > 15.0 for s in ended),
        "orphans_s_max": max(ended, default=0.0),
        "killed_orphans_s_max": max(drivers, default=0.0),
        "upper_bound": bound(0, len(faults)),
        "classes": [_class(kind, mine) for kind, mine in classes.items()],
        "ends": ends,
    }


def _class(kind: str, mine: Sequence[dict[str, Any]]) -> dict[str, Any]:
    seconds = [r["healthy_s"] for r in mine if r["healthy_s"] is not None]
    spread = np.percentile(seconds, [50, 95, 100]) if seconds else [None] * 3
    return {
        "kind": kind,
        "who": mine[0]["who"],
        "what": mine[0]["what"],
        "stages": sorted({r["stage"] for r in mine if r["stage"]}),
        "times": len(mine),
        **{
            name: None if s is None else round(float(s), 2)
            for name, s in zip(("p50_s", "p95_s", "max_s"), spread, strict=True)
        },
        "rolled_back": sum(r.get("rolled_back", 0) for r in mine),
        "problems": sum(bool(r["problems"]) for r in mine),
        "upper_bound": bound(sum(bool(r["problems"]) for r in mine), len(mine)),
    }


def bound(failures: int, trials: int) -> float:
    """The one-sided 95% upper bound of a probability (Clopper-Pearson); 3 / trials without any failure."""
    from scipy.stats import beta

    if not trials or failures >= trials:
        return 1.0
    return round(float(beta.ppf(0.95, failures + 1, trials - failures)), 5)


def text(journal: Path) -> str:
    """Markdown."""
    s = summary(journal)
    head = [
        f"{s['faults']} faults, {s['signals']} of them signals, in {s['runs']} runs with {s['starts']} starts and "
        f"{s['steps']} steps ({s['steps_made']} made, {s['rolled_back']} of them rolled back); {s['trained']} prompts trained.",
        "",
        "| what must not be | times | 95% upper bound per fault |",
        "|---|---|---|",
    ]
    head += [f"| {name} | {s[key]} | {bound(s[key], s['faults']):.2%} |" for key, name in COUNTS.items()]
    head += [
        f"| hangs past a deadline | {s['hangs']} | {bound(s['hangs'], s['faults']):.2%} |",
        f"| processes left 15 s after a driver's end ({s['starts']} ends, at most {s['orphans_s_max']:.1f} s) | {s['orphans']} | "
        f"{bound(s['orphans'], max(1, s['starts'])):.2%} per end |",
        "",
        "Groups that restarts gave up because a discarded version had sampled them, undone steps included: "
        f"{s['discarded_lineage']}.",
        "",
        "| what | fault | in | times | recovered after p50 | p95 | max | steps rolled back | problems | 95% bound |",
        "|" + "---|" * 10,
    ]
    return "\n".join([*head, *(_line(c) for c in s["classes"])])


def _line(c: dict[str, Any]) -> str:
    times = [f"{c[name]:.1f} s" if c[name] is not None else "" for name in ("p50_s", "p95_s", "max_s")]
    stages = ", ".join(c["stages"]) or "of itself"
    cells = [
        NAMES[c["who"]],
        c["what"],
        stages,
        c["times"],
        *times,
        c["rolled_back"],
        c["problems"],
        f"{c['upper_bound']:.0%}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def write(journal: Path) -> str:
    """Fills docs/faults.md and benchmarks/results/chaos.json."""
    target = measured.write("chaos", summary(journal))
    before, _, rest = DOC.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    DOC.write_text(f"{before}{BEGIN}\n\n{text(journal)}\n\n{END}{after}")
    return f"{DOC}\n{target}"
