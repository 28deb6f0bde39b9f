"""``rollouts/``: a sampled record of groups, one JSON object per line, from prompt to advantage."""

from __future__ import annotations

import contextlib
import json
import logging
import random
from pathlib import Path
from typing import Any

from hapo_async.evaluation import verdicts
from hapo_async.sequences import TrainGroup
from hapo_async.types import GatedGroup, Group, Source

log = logging.getLogger(__name__)


class RolloutWriter:
    """Appends trained groups to rollouts/step-N.jsonl; ``share`` of them, chosen by a seeded draw. A disk that is full costs
    the sample and not the run: that is said once."""

    def __init__(self, folder: Path, share: float, seed: int) -> None:
        self.folder = folder
        self.share = share
        self._rng = random.Random(seed)
        self._failing = False

    def wants(self) -> bool:
        return self.share >= 1 or self._rng.random() < self.share

    def write(self, step: int, rows: list[dict[str, Any]]) -> None:
        if not rows:
            return
        path = self.folder / f"step-{step:06d}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for row in rows:
                    file.write(json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.error("%s cannot be written: %s; the run goes on without", path, error.strerror)
            self._failing = True
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def discard(run_dir: Path, purge_step: int) -> None:
    """Moves the rollouts and the evaluations' verdicts of ``purge_step`` and later, which a resume will make anew, to
    ``discarded/``."""
    verdicts.discard(run_dir, purge_step)
    gone = [f for f in (run_dir / "rollouts").glob("step-*.jsonl") if int(f.stem.removeprefix("step-")) >= purge_step]
    for file in gone:
        target = run_dir / "discarded" / "rollouts" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def describe(gated: GatedGroup, group: Group, train: TrainGroup, step: int) -> dict[str, Any]:
    """One group as rollouts/ keeps it. ``staleness`` is the age of its oldest policy token when it was trained on."""
    advantage = {row.index: row.advantage for row in train.rows if row.source is Source.POLICY}
    teacher = next((row for row in train.rows if row.source is Source.TEACHER), None)
    answers = [
        {
            "text": answer.text,
            "tokens": answer.tokens.tolist(),
            "logp_behave": [round(float(x), 7) for x in answer.logp_behave],
            "spans": [[str(s.version), s.start, s.end] for s in answer.spans],
            "finish_reason": answer.finish_reason,
            "verdict": str(judgement.verdict),
            "reward": judgement.reward,
            "advantage": advantage.get(answer.index),
            "injected": False,
            "replaced": train_replaced(gated, train, answer.index),
        }
        for answer, judgement in zip(group.answers, gated.judgements, strict=True)
    ]
    if teacher is not None and train.teacher is not None:
        answers.append(
            {
                "text": train.teacher.text,
                "tokens": train.teacher.tokens.tolist(),
                "finish_reason": "teacher",
                "verdict": "correct",
                "reward": teacher.reward,
                "advantage": teacher.advantage,
                "injected": True,
            }
        )
    gate = gated.gate
    return {
        "step": step,
        "key": list(gated.key),
        "prompt": gated.prompt.text,
        "prompt_tokens": group.prompt_tokens.tolist(),
        "truth": gated.prompt.truth,
        "temperature": group.temperature,
        "staleness": step - gated.header.oldest.step if gated.header.oldest else 0,
        "answers": answers,
        "generator": group.generator,
        "generator_pid": group.generator_pid,
        "gate": {
            "is_open": gate.is_open,
            "successes": gate.successes,
            "judged": gate.judged,
            "confidence": gate.confidence,
            "threshold": gate.threshold,
            "draw": gate.draw,
            "replaced": gate.replaced,
            "teacher": gate.teacher,
            "reason": gate.reason,
        },
    }


def train_replaced(gated: GatedGroup, train: TrainGroup, index: int) -> bool:
    """True for a sampled answer that does not train because a teacher took its place."""
    return train.teacher is not None and all(
        not (row.source is Source.POLICY and row.index == index) for row in train.rows
    )
