"""What looks at a finished run of `make chaos` from outside does see what must not be."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"
PLACES = ("trained", "dropped", "in_flight", "buffered", "to_retry")


@pytest.fixture
def tools(monkeypatch):
    """Imports a module of tools/ by its name."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module


def lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Run:
    """A case of three steps of one prompt each: one start, and one restart of the learner from step 1."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        told = [("publish", 1, 0), ("step", 1, 1), ("step", 1, 2), ("publish", 2, 1), ("step", 2, 2), ("step", 2, 3)]
        self.timeline = [{"t": float(t), "kind": k, "incarnation": i, "step": s} for t, (k, i, s) in enumerate(told)]
        self.timeline.append({"t": 2.5, "kind": "load", "path": "x", "problem": ""})
        self.metrics = [
            {"step": s, "ledger/issued": s + 2, "ledger/trained": s, "ledger/buffered": 2}
            | {f"ledger/{place}": 0 for place in PLACES if place not in ("trained", "buffered")}
            for s in (1, 2, 3)
        ]
        self.rollouts = [self.row(1, "1.0"), self.row(2, "1.1"), self.row(3, "2.1")]
        self.entries = [[0, f"p{s}", "trained", 0, str(s), {}] for s in (1, 2, 3)]
        self.entries += [[0, f"p{s}", "to_retry", 1, "", {}] for s in (4, 5)]

    @staticmethod
    def row(step: int, version: str) -> dict:
        return {"step": step - 1, "key": [0, f"p{step}", 0], "answers": [{"spans": [[version, 0, 5]]}]}

    def problems(self, tools) -> list[str]:
        run = self.folder / "run"
        lines(self.folder / "timeline.jsonl", self.timeline)
        lines(run / "metrics.jsonl", self.metrics)
        lines(run / "rollouts" / "step-000001.jsonl", self.rollouts)
        ledger = {"entries": self.entries, "dropped_reasons": {}}
        driver = {"ledger": ledger, "cursor": {"epoch": 0, "prompts": 100, "position": 5}}
        lines(run / "checkpoints" / "step-3" / "driver.json", [driver])
        case = tools("chaos_plan").Case("a", ("train.batch_prompts=1",), steps=3)
        return tools("chaos_checks").problems(self.folder, case)[0]


def test_a_run_as_it_should_be(tmp_path, tools):
    assert Run(tmp_path).problems(tools) == []


def lose(run: Run) -> None:
    del run.entries[-1]


def train_twice(run: Run) -> None:
    run.rollouts.append(run.row(2, "1.1"))


def train_unseen(run: Run) -> None:
    del run.rollouts[1]


def train_discarded(run: Run) -> None:
    run.rollouts[2] = run.row(3, "1.2")


def take_corrupt(run: Run) -> None:
    run.timeline[-1]["problem"] = "driver.json is not what the manifest says"


def break_the_identity(run: Run) -> None:
    run.metrics[1]["ledger/buffered"] = 1


def stop_early(run: Run) -> None:
    del run.metrics[-1]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lose, "lost: 1"),
        (train_twice, "trained twice: 1"),
        (train_unseen, "lost: 1"),
        (train_discarded, "older lineage: 1"),
        (take_corrupt, "corrupt accepted: 1"),
        (break_the_identity, "identity broken: 1"),
        (stop_early, "the run has 2 steps, not 3"),
    ],
)
def test_what_must_not_be_is_seen(tmp_path, tools, what, said):
    run = Run(tmp_path)
    what(run)
    assert said in run.problems(tools)


def test_the_schedule_holds_what_it_should(tools):
    plan = tools("chaos_plan")
    cases = plan.schedule(0)
    faults = [fault for case in cases for fault in case.faults]
    assert len({fault.id for fault in faults}) == len(faults)
    assert len(faults) + tools("chaos").FILE_TRIALS >= 500
    assert sum(case.steps or case.least for case in cases) >= 2000
    for who in ("generator", "engine", "verifier", "worker", "learner", "driver"):
        for what in ("kill", "stop"):
            assert sum((f.who, f.what) == (who, what) for f in faults) >= 5, (who, what)
    stages = {fault.stage for fault in faults if fault.who == "driver"}
    assert stages >= {*plan.STAGES, "starting", "ending"}
    assert [case.as_dict() for case in plan.schedule(0)] == [case.as_dict() for case in cases]
    assert [plan.Case.of(json.loads(json.dumps(case.as_dict()))) for case in cases] == cases
    assert plan.schedule(1) != cases


def test_the_bound_of_so_many_trials(tools):
    bound = tools("chaos_table").bound
    assert bound(0, 500) == pytest.approx(1 - 0.05 ** (1 / 500), abs=1e-4)
    assert bound(1, 500) > bound(0, 500) and bound(0, 60) == pytest.approx(3 / 60, rel=0.05)
