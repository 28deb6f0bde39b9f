"""What a run writes down at each step boundary: metrics, sampled rollouts, the live view and status.json."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import ray

from hapo_async import algorithms, group_stats, metrics, rollouts
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.training import Trained, Trainer
from hapo_async.live import LiveView
from hapo_async.quarantine import QUARANTINE_FILE
from hapo_async.rundir import RunDir
from hapo_async.types import Group

log = logging.getLogger(__name__)

FETCH_DEADLINE_S = 60.0

VERDICTS = ("unparseable", "timeout", "oom", "crash", "charged", "masked")
"""What is counted of judgements: ``Judgement.tally``."""


class Journal:
    """One row per step, from what each part measured of itself. began: ``time.monotonic`` when the run was started or
    resumed; every wall time that people see counts from there."""

    def __init__(
        self,
        config: Config,
        folder: RunDir,
        writer: metrics.Writer,
        view: LiveView,
        fleet: Fleet,
        judges: Judges,
        sampler: Sampler,
        began: float | None = None,
    ) -> None:
        self.began = time.monotonic() if began is None else began
        self.config = config
        self.folder = folder
        self.writer = writer
        self.view = view
        self.fleet = fleet
        self.judges = judges
        self.sampler = sampler
        self.rollouts = rollouts.RolloutWriter(folder.path / "rollouts", config.rollouts.sample, config.seed)
        self._algorithm = algorithms.get(config.algorithm)
        self._recording: asyncio.Future[None] | None = None
        self._tokens_before: dict[Generator, int] = {}
        self.scaling: Mapping[str, Any] = {}  # the last request to scale
        self.actors: Callable[[], list[dict[str, Any]]] = list
        self._row: Mapping[str, Any] = {}
        self._forget_idling()

    async def step(self, trained: Trained, trainer: Trainer, extra: Mapping[str, float]) -> None:
        """Writes the row of a committed step; ``extra`` holds an evaluation's metrics."""
        values = {
            **trained.learner,
            **group_stats.of_groups(trained.groups, self._algorithm),
            **self._flow(trained, trainer),
            **trained.times.metrics(),
            "time/run_s": self.elapsed_s(),
            **extra,
        }
        row = self.writer.write(trained.step, values)
        await self.settle()
        self._recording = asyncio.ensure_future(self._keep_rollouts(trained))
        self.view.update(trained.step, row)
        self._row = row
        self.status("running", trainer)

    async def roll_back(self, purge_step: int) -> None:
        """The run goes on before ``purge_step``: what was written of it and later steps moves to ``discarded/``."""
        with contextlib.suppress(OSError):
            await self.settle()
        self.writer.roll_back(purge_step)
        rollouts.discard(self.folder.path, purge_step)
        metrics.discard(self.folder.path / QUARANTINE_FILE, purge_step)
        self._row = {}

    async def settle(self) -> None:
        """Returns when the rollouts of the last step are in their file; they are written beside the next one. Raises what
        the writing raised."""
        if self._recording is not None:
            recording, self._recording = self._recording, None
            await recording

    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation outside a step (before the first one)."""
        self._forget_idling()
        self.view.update(step, self.writer.write(step, {**values, "time/run_s": self.elapsed_s()}))

    def beside(self, step: int, values: Mapping[str, float]) -> None:
        """An evaluation that ended beside training, of a step that was a while ago."""
        self.view.evaluation(step, self.writer.write(step, {**values, "time/run_s": self.elapsed_s()}))

    def _forget_idling(self) -> None:
        """What generators idled while the run came up, or beside an evaluation, is no wait for weights."""
        for generator in self.fleet.generators:
            generator.take_idle_s()

    def status(self, state: str, trainer: Trainer) -> None:
        """What `hapo-async status` prints, with the numbers of the last step while the run goes on."""
        row = self._row if state == "running" else {}
        self.folder.write_status(
            {
                "state": state,
                "seconds": self.elapsed_s(),
                "step": trainer.version.step,
                "steps": self.config.train.steps,
                "version": str(trainer.version),
                "ledger": trainer.ledger.counts(),
                "dropped": dict(trainer.ledger.dropped_reasons),
                "generators": [
                    {
                        "name": g.name,
                        "state": g.state,
                        "version": str(g.installed),
                        "groups": len(g.outstanding),
                    }
                    for g in self.fleet.generators
                ],
                "verifiers": self.judges.count,
                "actors": self.actors(),
                "scaling": dict(self.scaling),
                "bottleneck": row.get("bottleneck", ""),
                "advice": row.get("advice", ""),
                "metrics": {k: v for k, v in row.items() if k not in ("step", "time", "bottleneck", "advice")},
            }
        )

    # ---------------------------------------------------------------- the row

    def _flow(self, trained: Trained, trainer: Trainer) -> dict[str, float]:
        tally = self.sampler.take_tally()
        seconds = max(1e-9, time.monotonic() - trained.times.began)
        alive, serving = self.fleet.alive, self.fleet.serving
        # Beside cached answers a generator has nothing to do but evaluations: it waits for no weights.
        idle = [g.take_idle_s() for g in serving if not self._algorithm.offline]
        installs = [g.last_install for g in serving if g.last_install]
        lags = {g.name: trained.step - (g.installed.step if g.installed else 0) for g in serving}
        ledger = {f"ledger/{k}": float(v) for k, v in trainer.ledger.counts().items()}
        ledger |= {f"ledger/dropped/{k}": float(v) for k, v in trainer.ledger.dropped_reasons.items()}
        per_generator = {}
        for generator in self.fleet.generators:
            new = generator.tokens - self._tokens_before.get(generator, 0)
            self._tokens_before[generator] = generator.tokens
            per_generator[f"throughput/generate_tokens_per_s/{generator.name}"] = new / seconds
        out = {
            "throughput/generate_tokens_per_s": tally.generated_tokens / seconds,
            "throughput/groups_per_s": len(trained.groups) / seconds,
            **per_generator,
            "time/wait_for_weights_s": float(np.mean(idle)) if idle else 0.0,
            "buffer/blocked_s": tally.blocked_s,
            "buffer/groups": len(trainer.buffer),
            "buffer/fill": len(trainer.buffer) / trainer.buffer.capacity,
            "weights/failed": self.fleet.weights.failed + trainer.failed_transfers,
            "weights/version": trained.step,
            "weights/lag": max(lags.values(), default=0),
            **{f"weights/version/{g.name}": g.installed.step for g in alive if g.installed},
            **{f"weights/lag/{name}": lag for name, lag in lags.items()},
            "scale/generators": len(alive),
            "scale/verifiers": self.judges.count,
            "scale/learners": self.config.learner.ranks,
            **{f"staleness/dropped_length/{edge}": n for edge, n in tally.late_lengths.items()},
            "staleness/dropped": trainer.expired + tally.late,
            "staleness/late": trainer.late,
            "staleness/truncated": trainer.truncated,
            "train/poisoned": trainer.poisoned,
            "ledger/discarded_lineage": trainer.ledger.discarded_lineage,
            "verify/queue": sum(f.stage == "verifying" for f in self.sampler.flights.values()),
            **{f"verify/{v}": tally.verdicts.get(v, 0) for v in VERDICTS},
            **ledger,
        }
        trainer.expired = trainer.late = trainer.truncated = trainer.poisoned = 0
        trainer.failed_transfers = self.fleet.weights.failed = 0
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
        return out | self._per_gpu(out, trainer)

    def _per_gpu(self, rates: Mapping[str, float], trainer: Trainer) -> dict[str, float]:
        """Throughput over the GPUs that were reserved for it; nothing on machines without."""
        width = self.config.generator.width
        sampling = sum(g.slot.gpus * width for g in self.fleet.alive)
        learning = trainer.learner.slot.gpus * self.config.learner.ranks if trainer.learner.slot else 0.0
        out = {}
        for kind, gpus in (("generate", sampling), ("learn", learning)):
            rate = rates.get(f"throughput/{kind}_tokens_per_s")
            if gpus and rate is not None:
                out[f"throughput/{kind}_tokens_per_gpu_s"] = rate / gpus
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
