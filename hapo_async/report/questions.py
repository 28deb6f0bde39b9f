"""Panels of single questions: accuracy over training, exclusive solves, the difference of two runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import NamedTuple

from markupsafe import Markup

from hapo_async.evaluation import evaluate
from hapo_async.evaluation.verdicts import Questions
from hapo_async.report.heatmap import Heat, heat_map
from hapo_async.report.panels import Panel, Section


class Exclusive(NamedTuple):
    """Questions that only one of two evaluations solves; a question is solved when one of its answers is correct.
    levels: (level, +X, -Y), where the data name levels."""

    gained: list[str]
    lost: list[str]
    levels: list[tuple[str, int, int]]

    def text(self) -> str:
        """+12 / -3 (level 4: +8 / -1, level 5: +4 / -2)"""
        parts = [f"level {level.lower().removeprefix('level').strip()}: +{x} / −{y}" for level, x, y in self.levels]
        return f"+{len(self.gained)} / −{len(self.lost)}" + (f" ({', '.join(parts)})" if parts else "")


def exclusive(a: Questions, step_a: int, b: Questions, step_b: int) -> Exclusive:
    """What b at step_b solves and a at step_a does not, and the other way round."""
    gained, lost = evaluate.exclusive_solves(a.accuracy[step_a], b.accuracy[step_b])
    levels = a.levels | b.levels
    plus, minus = Counter(levels.get(uid, "") for uid in gained), Counter(levels.get(uid, "") for uid in lost)
    named = sorted(level for level in plus | minus if level)
    return Exclusive(gained, lost, [(level, plus[level], minus[level]) for level in named])


def sections(sets: dict[str, Questions]) -> list[Section]:
    """A heat map for each evaluation set that was asked at least twice."""
    panels = [accuracy_map(questions) for questions in sets.values() if len(questions.steps) > 1]
    return [Section("Question by question", panels)] if panels else []


def accuracy_map(questions: Questions) -> Panel:
    """Accuracy of every question at every evaluation, the ones answered best on top."""
    steps = questions.steps
    table = {uid: [questions.accuracy[s].get(uid) for s in steps] for uid in questions.uids}
    order = sorted(table, key=lambda uid: -_mean(table[uid]))
    heat = Heat(order, [str(s) for s in steps], [table[uid] for uid in order], edges=_edges(len(order)))
    solves = exclusive(questions, steps[0], questions, steps[-1]).text()
    note = f"Solved at step {steps[-1]} alone / at step {steps[0]} alone: {solves}."
    return Panel(f"Accuracy on {questions.name}", Markup(heat_map(heat)), note=note, wide=True)  # noqa: S704


def difference_map(a: Questions, b: Questions, steps: Sequence[int]) -> Panel:
    """Accuracy of b minus accuracy of a on the questions that both were asked, b's largest lead on top."""
    table: dict[str, list[float | None]] = {}
    for uid in [uid for uid in a.uids if uid in set(b.uids)]:
        pairs = [(a.accuracy[s].get(uid), b.accuracy[s].get(uid)) for s in steps]
        table[uid] = [None if x is None or y is None else y - x for x, y in pairs]
    order = sorted(table, key=lambda uid: -_mean(table[uid]))
    cells = [table[uid] for uid in order]
    heat = Heat(order, [str(s) for s in steps], cells, low=-1.0, edges=_edges(len(order)))
    note = "Green where B answers better, red where A does."
    return Panel(f"Accuracy on {a.name}, B − A", Markup(heat_map(heat)), note=note, wide=True)  # noqa: S704


def _mean(values: Sequence[float | None]) -> float:
    there = [v for v in values if v is not None]
    return fmean(there) if there else -2.0


def _edges(count: int) -> tuple[str, str]:
    return ("1", str(count)) if count > 1 else ("1", "")
