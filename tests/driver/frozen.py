"""Stand-ins that may be stopped, or stand still though they answer, around the driver's loop and its watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from actors.calls import Calls, Pending
from actors.learner import rank_name
from hapo_async.driver.judges import Judges
from hapo_async.driver.watchdog import Watchdog
from hapo_async.types import Judgement, Verdict
from tests.driver.stand_ins import Loop, Method, StandInGenerator, StandInLearner

SILENCE_S = 30.0


class Freezer:
    """A process that may be stopped (its calls are answered when it goes on) and may stand still though it answers."""

    def __init__(self) -> None:
        self.awake = asyncio.Event()
        self.awake.set()
        self.stuck = False  # answers, without getting on
        self.asked = 0
        self._at = 0.0

    async def held(self, work: Coroutine[Any, Any, Any]) -> Any:
        try:
            await self.awake.wait()
            result = await work
            await self.awake.wait()
            return result
        finally:
            work.close()

    def moved(self, works: bool) -> int:
        """Grows ten times a second while it works, unless stuck."""
        self.asked += 1
        if works and not self.stuck:
            self._at = time.monotonic()
        return int(10 * self._at)


class Generator(StandInGenerator):
    """latency_s: of every group."""

    def __init__(self, name: str, latency_s: float = 4.7) -> None:
        super().__init__(name, lambda key: self.latency_s)
        self.latency_s = latency_s
        self.process = Freezer()
        self.received = 0
        self.applying = False

    def _call(self, work: Any) -> asyncio.Task[Any]:
        return super()._call(self.process.held(work))

    async def _stats(self) -> dict[str, Any]:
        moved = self.process.moved(works=bool(self._slots))
        return {**await super()._stats(), "tokens": moved, "received": self.received, "applying": self.applying}


class Verifier:
    def __init__(self) -> None:
        self.process = Freezer()
        self.answered = asyncio.Event()
        self.answered.set()
        self.waiting = self.judged = 0
        self.judgement_s = 0.0
        self.judge = Method(lambda *a: asyncio.ensure_future(self.process.held(self._judge())))
        self.stats = Method(lambda: asyncio.ensure_future(self.process.held(self._stats())))

    async def _judge(self) -> list[Judgement]:
        self.waiting += 2
        await self.answered.wait()
        await asyncio.sleep(self.judgement_s)
        self.waiting -= 2
        self.judged += 2
        return [Judgement(Verdict.CORRECT, 1.0), Judgement(Verdict.WRONG, 0.0)]

    async def _stats(self) -> dict[str, Any]:
        self.process.asked += 1
        return {"judged": self.judged, "workers_started": 1, "waiting": self.waiting, "pid": 7}


class Learner(StandInLearner):
    """Ranks in lockstep: one that is frozen or stuck holds up all."""

    def __init__(self, ranks: int = 1, step_s: float = 1.6) -> None:
        super().__init__(step_s=0.0)
        self.busy_s = step_s
        self.ranks = [Freezer() for _ in range(ranks)]
        self.doing: list[str] = []
        self._calls = Calls()

    def calls(self) -> list[Pending]:
        return self._calls.pending()

    async def ping(self, index: int, deadline_s: float) -> dict[str, Any]:
        async def told() -> dict[str, Any]:
            held_up = any(not rank.awake.is_set() or rank.stuck for rank in self.ranks)
            moved = self.ranks[index].moved(works=bool(self.doing) and not held_up)
            return {"pid": 100 + index, "doing": " and ".join(self.doing), "doing_s": 1.0, "moved": moved}

        ref = asyncio.ensure_future(self.ranks[index].held(told()))
        return await self._calls.answer(ref, deadline_s, rank_name(index), "ping")

    async def step(self, plans: list[Any]) -> dict[str, float]:
        await self.busy("step", self.busy_s)
        return await super().step(plans)

    async def busy(self, what: str, seconds: float) -> None:
        async def one(rank: Freezer) -> None:
            await rank.held(asyncio.sleep(seconds))
            while rank.stuck:
                await asyncio.sleep(0.1)

        self.doing.append(what)
        calls = [asyncio.ensure_future(one(rank)) for rank in self.ranks]
        await asyncio.gather(
            *(self._calls.answer(c, 1e4, rank_name(i), what) for i, c in enumerate(calls))  # type: ignore[arg-type]
        )
        self.doing.remove(what)


class Scene:
    """A loop of stand-ins and its watchdog. said: its lines, with seconds since the scene began."""

    def __init__(self, path: Path, generators: int = 2, ranks: int = 1, **tree: Any) -> None:
        self.generators = [Generator(f"generator-{i}") for i in range(generators)]
        self.verifier, self.learner = Verifier(), Learner(ranks)
        base: dict[str, Any] = {
            "train": {"batch_prompts": 4, "steps": 10_000},
            "generator": {"deadline_s": 5000.0, "max_concurrent": 4},
            "weights": {"deadline_s": 5000.0},
            "staleness": {"late_deadline_s": 5000.0},
            "verifier": {"timeout_s": 15.0},
            "max_staleness": 2,
            "run": {"alarms": {"silence_s": SILENCE_S}},
        }
        base |= tree
        loop = self.loop = Loop(self.generators, prompts=64, trains=self.learner, judges="later", **base)  # type: ignore[arg-type]
        loop.judges = Judges(loop.config, {"verifier-0": self.verifier})
        self.said: list[tuple[float, str]] = []
        self.path = path
        self.began = time.monotonic()
        self.watchdog = Watchdog(
            loop.config, loop.fleet, loop.judges, self.learner, loop.sampler, loop.buffer, loop.ledger, path, self.say
        )  # type: ignore[arg-type]

    def say(self, text: str) -> None:
        self.said.append((time.monotonic() - self.began, text))

    @contextlib.asynccontextmanager
    async def running(self):
        tasks = [asyncio.create_task(self.loop.run(1e6)), asyncio.create_task(self.watchdog.run())]
        try:
            yield self
            for task in tasks:
                assert not task.done(), task.exception()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def rows(self) -> list[dict[str, Any]]:
        path = self.path / "watchdog.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def alarms(self) -> list[tuple[str, str]]:
        return [(row["who"], row["state"]) for row in self.rows if row["event"] == "alarm"]
