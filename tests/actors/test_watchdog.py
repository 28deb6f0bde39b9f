"""The watchdog beside real actors: stopped processes are named in time, and the run goes on once they do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from actors import placement
from actors.calls import Pending
from actors.learner import LearnerGroup, rank_name
from hapo_async import config as configs
from hapo_async import toy
from hapo_async.buffer import Buffer
from hapo_async.data import PromptStream
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.setup import prepare
from hapo_async.driver.training import StepTimes, Trained, Trainer
from hapo_async.driver.watchdog import Watchdog
from hapo_async.ledger import Ledger
from hapo_async.types import Version

SILENCE_S = 2.0
SLACK_S = 20.0  # for a machine that does much else


class Run:
    """The driver's parts around real actors, as ``driver.run`` puts them together."""

    def __init__(self, folder: Path) -> None:
        tree: dict[str, Any] = {
            "algorithm": "grpo",
            "model": str(toy.MODEL_DIR),
            "data": {"limit": 64},
            "sampling": {"n": 2, "max_tokens": 16},
            "train": {"batch_prompts": 4, "steps": 100_000},
            "generator": {"count": 2, "engine": "transformers"},
            "staleness": {"late_deadline_s": 120.0},
            "run": {"alarms": {"silence_s": SILENCE_S}},
        }
        self.prepared = p = prepare(configs.parse(tree))
        self.config = c = p.config
        self.ledger = Ledger()
        self.buffer = Buffer((c.max_staleness + 1) * c.train.batch_prompts, self.ledger.order)
        stream = PromptStream(p.prompts, 0, True, 0)
        self.sampler = Sampler(c, p.algorithm, p.options, stream, stream.by_uid(), self.ledger, self.buffer)
        self.path = folder
        self.steps = 0
        self.tasks: list[asyncio.Task[Any]] = []

    @contextlib.asynccontextmanager
    async def going(self) -> AsyncIterator[Run]:
        c, model = self.config, self.prepared.model_path
        cluster = placement.join(3)
        slot = await asyncio.to_thread(placement.reserve, cluster, 1, 0.5, "learner")
        self.learner, self.fleet, self.judges = await asyncio.gather(
            LearnerGroup.start(c, model, cluster, slot),
            Fleet.start(c, model, cluster, 0.5, self.sampler.wake),
            Judges.start(c),
        )
        trainer = Trainer(c, self.learner, self.fleet, self.sampler, self.ledger, self.buffer, Version(1, 0))
        said: list[str] = []
        parts = (self.fleet, self.judges, self.learner, self.sampler, self.buffer, self.ledger, self.path)
        self.watchdog = Watchdog(c, *parts, said.append)
        tasks = self.tasks
        try:
            await trainer.publish()
            await self.fleet.wait_installed(Version(1, 0), 60.0)
            works = (self.sampler.feed(self.fleet, self.judges), trainer.run(self._committed), self.watchdog.run())
            tasks += [asyncio.create_task(work) for work in works]
            yield self
        finally:
            for task in tasks:
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=10.0)
            await self.sampler.close()
            await asyncio.gather(*(part.close() for part in (self.learner, self.fleet, self.judges)))

    def pending(self) -> list[Pending]:
        return [*self.fleet.calls(), *self.judges.calls(), *self.learner.calls()]

    async def _committed(self, trained: Trained) -> StepTimes:
        self.steps += 1
        return StepTimes()

    async def until(self, what: Any, limit_s: float) -> float:
        """Seconds until ``what()`` is true."""
        began = time.monotonic()
        while not what():
            for task in self.tasks:
                assert not task.done(), task.result()
            assert time.monotonic() - began < limit_s, f"not within {limit_s} s at step {self.steps}: {self.rows}"
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.path / "watchdog.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def told(self, event: str, who: str, after: float) -> list[dict[str, Any]]:
        """What was said since, of a frozen actor: a starved one may well be called stalled."""
        rows = [row for row in self.rows if row["event"] == event and row["who"] == who and row["time"] > after]
        return [row for row in rows if row["state"] == "frozen"]


async def stopped(run: Run, who: str, pid: int, call: str) -> float:
    """Stops a process until it is named; then everything goes on. Returns how long it took."""
    await run.until(lambda: any(c.actor == who and c.method == call for c in run.pending()), 60.0)
    clock = time.time()
    os.kill(pid, signal.SIGSTOP)
    try:
        seconds = await run.until(lambda: run.told("alarm", who, clock), SILENCE_S + SLACK_S)
        alarm = run.told("alarm", who, clock)[0]
        assert alarm["pid"] == pid and alarm["queues"]["pending"][who]["calls"]
    finally:
        os.kill(pid, signal.SIGCONT)
    steps = run.steps
    await run.until(lambda: run.told("over", who, clock), SLACK_S)
    await run.until(lambda: run.steps > steps + 1, 60.0)
    return seconds


def test_a_stopped_generator_verifier_and_learner_are_each_named(ray_session, tmp_path):
    async def scenario() -> dict[str, float]:
        async with Run(tmp_path).going() as run:
            await run.until(lambda: run.steps > 1, 60.0)
            generator = (await run.fleet.stats(run.fleet.generators[1], 10.0))["pid"]
            verifier = (await run.judges.stats("verifier-0", 10.0))["pid"]
            rank = (await run.learner.ping(0, 10.0))["pid"]
            return {
                "generator-1": await stopped(run, "generator-1", generator, "collect"),
                "verifier-0": await stopped(run, "verifier-0", verifier, "judge"),
                rank_name(0): await stopped(run, rank_name(0), rank, "step"),
            }

    took = asyncio.run(scenario())
    print("named after", {who: round(seconds, 2) for who, seconds in took.items()})
    assert len(took) == 3
