"""What a run writes down at each step boundary: metrics, sampled rollouts, the live view and status.json."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import ray

from hapo_async import metrics, rollouts
from hapo_async.buffer import Ready
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.training import Trained, Trainer
from hapo_async.live import LiveView
from hapo_async.rundir import RunDir
from hapo_async.types import Group, Source

log = logging.getLogger(__name__)

FETCH_DEADLINE_S = 60.0


class Journal:
    """One row per step, from what each part measured of itself."""

    def __init__(
        self,
        config: Config,
        folder: RunDir,
        writer: metrics.Writer,
        view: LiveView,
        fleet: Fleet,
        judges: Judges,
        sampler: Sampler,
    ) -> None:
        self.config = config
        self.folder = folder
        self.writer = writer
        self.view = view
        self.fleet = fleet
        self.judges = judges
        self.sampler = sampler
        self.rollouts = rollouts.RolloutWriter(folder.path / "rollouts", config.rollouts.sample, config.seed)
        self._tokens_before = {g.name: 0 for g in fleet.generators}

    async def step(self, trained: Trained, trainer: Trainer, extra: Mapping[str, float]) -> None:
        """Writes the row of a committed step; ``extra`` holds an evaluation's metrics."""
        values = {
            **trained.learner,
            **self._groups(trained.groups),
            **self._flow(trained, trainer),
            **trained.times.metrics(),
            **extra,
        }
        row = self.writer.write(trained.step, values)
        await self._keep_rollouts(trained)
        self.view.update(trained.step, row)
        self.status("running", trainer, row)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation outside a step (before the first one)."""
        self.view.update(step, self.writer.write(step, values))

    def status(self, state: str, trainer: Trainer, row: Mapping[str, Any] | None = None) -> None:
        row = row or {}
        self.folder.write_status(
            {
                "state": state,
                "step": trainer.version.step,
                "steps": self.config.train.steps,
                "version": str(trainer.version),
                "ledger": trainer.ledger.counts(),
                "dropped": dict(trainer.ledger.dropped_reasons),
                "generators": [
                    {
                        "name": g.name,
                        "state": "healthy" if g.alive else "dead",
                        "version": str(g.installed),
                        "groups": len(g.outstanding),
                    }
                    for g in self.fleet.generators
                ],
                "verifiers": self.judges.count,
                "bottleneck": row.get("bottleneck", ""),
                "advice": row.get("advice", ""),
                "metrics": {k: v for k, v in row.items() if k not in ("step", "time", "bottleneck", "advice")},
            }
        )

    # ---------------------------------------------------------------- the row

    def _groups(self, groups: list[Ready]) -> dict[str, float]:
        sampled = [g for g in groups if g.gated.judgements]
        injected = [g for g in groups if any(r.source is Source.TEACHER for r in g.train.rows)]
        out: dict[str, float] = {
            "gate/injected": len(injected),
            "gate/injected_frac": len(injected) / len(groups),
            "train/prompts": len(groups),
            "train/epoch": max(g.key.epoch for g in groups),
        }
        if not sampled:
            return out
        rewards = [r for g in sampled if len(r := g.gated.rewards[g.gated.judged])]
        lengths = [n for g in sampled for n in g.header.lengths]
        reasons = [r for g in sampled for r in g.header.finish_reasons]
        gates = [g.gated.gate for g in sampled]
        if rewards:
            out |= {
                "reward/mean": float(np.concatenate(rewards).mean()),
                "reward/std": float(np.mean([r.std() for r in rewards])),
                "groups/zero_variance_frac": float(np.mean([r.max() == r.min() for r in rewards])),
                "groups/solved_frac": float(np.mean([r.max() >= 1 for r in rewards])),
                "groups/all_correct_frac": float(np.mean([r.min() >= 1 for r in rewards])),
            }
        out |= {
            "response/length_mean": float(np.mean(lengths)),
            "response/length_max": float(max(lengths)),
            "response/truncated_frac": float(np.mean([r == "length" for r in reasons])),
            "response/multi_version_frac": float(np.mean([g.header.oldest != g.header.newest for g in sampled])),
            "gate/open_frac": float(np.mean([d.is_open for d in gates])),
            "gate/confidence": float(np.mean([d.confidence for d in gates])),
            "gate/no_teacher": sum(d.reason.startswith("no teacher") for d in gates),
            "gate/blocked": sum(d.reason.startswith("blocked") for d in gates),
            "gate/degenerate": sum(all(r.reward == 1 for r in g.train.rows) for g in injected),
            "verify/p50_s": float(np.median([j.seconds for g in sampled for j in g.gated.judgements])),
        }
        return out

    def _flow(self, trained: Trained, trainer: Trainer) -> dict[str, float]:
        tally = self.sampler.take_tally()
        seconds = max(1e-9, time.monotonic() - trained.times.began)
        alive = self.fleet.alive
        installs = [g.last_install for g in alive if g.last_install]
        lags = {g.name: trained.step - (g.installed.step if g.installed else 0) for g in alive}
        ledger = {f"ledger/{k}": float(v) for k, v in trainer.ledger.counts().items()}
        ledger |= {f"ledger/dropped/{k}": float(v) for k, v in trainer.ledger.dropped_reasons.items()}
        per_generator = {}
        for generator in self.fleet.generators:
            new = generator.tokens - self._tokens_before[generator.name]
            self._tokens_before[generator.name] = generator.tokens
            per_generator[f"throughput/generate_tokens_per_s/{generator.name}"] = new / seconds
        out = {
            "throughput/generate_tokens_per_s": tally.generated_tokens / seconds,
            "throughput/groups_per_s": len(trained.groups) / seconds,
            **per_generator,
            "time/wait_for_weights_s": float(np.mean([g.take_idle_s() for g in alive])) if alive else 0.0,
            "buffer/groups": len(trainer.buffer),
            "buffer/fill": len(trainer.buffer) / trainer.buffer.capacity,
            "weights/version": trained.step,
            "weights/lag": max(lags.values(), default=0),
            **{f"weights/version/{g.name}": g.installed.step for g in alive if g.installed},
            **{f"weights/lag/{name}": lag for name, lag in lags.items()},
            "scale/generators": len(alive),
            "scale/verifiers": self.judges.count,
            "scale/learners": self.config.learner.ranks,
            "staleness/dropped": trainer.expired + tally.late,
            "staleness/late": trainer.late,
            "staleness/truncated": trainer.truncated,
            "verify/queue": sum(f.stage == "verifying" for f in self.sampler.flights.values()),
            **{f"verify/{v}": tally.verdicts.get(v, 0) for v in ("unparseable", "timeout", "oom", "crash")},
            **ledger,
        }
        trainer.expired = trainer.late = trainer.truncated = 0
        if tally.verify_s:
            out["time/verify_s"] = float(np.mean(tally.verify_s))
        if tally.generate_s:
            out["time/generate_s"] = float(np.mean(tally.generate_s))
        if installs:
            pause = max(i["pause_s"] for i in installs)
            fetch = max(i["fetch_s"] for i in installs)
            size = installs[0]["bytes"]
            out |= {"weights/pause_s": pause, "weights/fetch_s": fetch, "weights/bytes": size}
            out["weights/bytes_per_s"] = size / max(1e-9, pause + fetch)
        if trained.times.learn > 0 and "train/tokens" in trained.learner:
            out["throughput/learn_tokens_per_s"] = trained.learner["train/tokens"] / trained.times.learn
        return out

    async def _keep_rollouts(self, trained: Trained) -> None:
        kept = [g for g in trained.groups if g.gated.payload is not None and self.rollouts.wants()]
        if not kept:
            return
        # The step is already committed: a payload that its generator took down with it is only missing here.
        groups = await asyncio.to_thread(_fetch, [g.gated.payload for g in kept])
        age_step = trained.step - 1
        pairs = [(g, group) for g, group in zip(kept, groups, strict=True) if group is not None]
        rows = [rollouts.describe(g.gated, group, g.train, age_step) for g, group in pairs]
        await asyncio.to_thread(self.rollouts.write, trained.step, rows)


def _fetch(refs: list[Any]) -> list[Group | None]:
    """The groups behind references, None where one is lost."""
    try:
        return ray.get(refs, timeout=FETCH_DEADLINE_S)
    except ray.exceptions.RayError:
        return [_fetch_one(ref) for ref in refs]


def _fetch_one(ref: Any) -> Group | None:
    try:
        return ray.get(ref, timeout=1.0)
    except ray.exceptions.RayError as error:
        log.warning("a sampled group is missing from rollouts/: %s", type(error).__name__)
        return None
