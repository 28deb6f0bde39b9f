"""`make chaos` in small: real runs, each class of fault once or more, and what was left looked at from outside."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.end_to_end.helpers import json_lines

SIGNALS = {f"{who} {what}" for who in ("generator", "verifier", "worker", "learner") for what in ("kill", "stop")}
OTHERS = {
    *(
        "driver kill",
        "checkpoint flip",
        "verdict spin",
        "verdict bomb",
        "verdict segv",
    ),
    *(
        "verdict exit",
        "verdict nan",
        "rank-number nan-loss",
        "rank-number inf-gradient",
        "generator-number nan-logprob",
    ),
    *("generator-weights flip", "generator-weights drop", "generator-weights duplicate", "generator-weights reorder"),
    *("generator-weights swap", "generator-weights vanish", "rank-weights flip", "rank-weights drop"),
}


@pytest.mark.timeout(600)
def test_nothing_is_lost_trained_twice_taken_corrupt_or_left_behind(tmp_path):
    command = [sys.executable, "tools/chaos.py", "--short", "--runs", str(tmp_path)]
    done = subprocess.run(command, text=True, capture_output=True, timeout=580, check=False)
    rows = json_lines(tmp_path / "journal-short-0.jsonl")
    faults, ends = [r for r in rows if not r.get("end")], [r for r in rows if r.get("end")]
    assert not [r["problems"] for r in rows if r["problems"]], done.stdout[-4000:]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert {r["kind"] for r in faults} >= SIGNALS | OTHERS
    assert len(faults) >= 25
    for end in ends:
        nothing = ("lost", "trained_twice", "older_lineage", "corrupt_accepted", "identity_broken")
        assert [end[name] for name in nothing] == [0] * 5
        assert end["trained"] == end["expected"] > 0 and end["identity_checked"] >= end["steps"]
        assert max(end["orphans_s"]) < 15.0
    assert sum(end["discarded_lineage"] for end in ends) > 0, "no group of a discarded version came back"
