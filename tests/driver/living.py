"""A loop of stand-ins whose generators and verifiers come, leave, die and are replaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import numpy as np
import ray

from hapo_async.control import Request
from hapo_async.driver.generators import Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.scaling import Scaler
from hapo_async.driver.training import StepTimes, Trained
from hapo_async.driver.upkeep import Upkeep
from hapo_async.errors import RunError
from hapo_async.types import Answer, Group, GroupHeader, GroupRequest, Segment, Source, Version, VersionSpan
from tests.driver.stand_ins import Loop, Method, StandInGenerator, raised
from tests.virtual_time import Clock


class Slot:
    """A place; ``released`` counts how often it was given back."""

    is_part = False

    def __init__(self) -> None:
        self.released, self.whole = 0, True

    def release(self) -> None:
        self.released += 1


class Resuming(StandInGenerator):
    """Samples a token a second under the version that it serves; hands over what it has, and goes on from prefixes."""

    def __init__(self, name: str, latency: Callable[[Any], float] = lambda key: 2.0) -> None:
        super().__init__(name, latency)
        self.ready_s, self.broken = 3.0, False
        self.requests: dict[Any, tuple[GroupRequest, float, Version]] = {}
        self.resumed: list[GroupRequest] = []
        self.closed = False
        self.ready, self.close = self._method(self._ready), self._method(self._close)
        self.hand_over, self.hand_over_s = self._method(self._hand_over), 0.0

    async def _ready(self) -> dict[str, Any]:
        await asyncio.sleep(self.ready_s)
        if self.broken:
            raise raised("no engine")
        return {"member_key": f"key of {self.name}"}

    async def _close(self) -> None:
        self.closed = True

    async def _submit(self, requests: list[GroupRequest]) -> None:
        assert self.installs, f"{self.name} was given groups before it had weights"
        for request in requests:
            self.requests[request.key] = (request, asyncio.get_running_loop().time(), self.version)
            if request.prefixes:
                self.resumed.append(request)
        await super()._submit(requests)

    def _header(self, request: GroupRequest, version: Version, reason: str = "stop") -> GroupHeader:
        header = super()._header(request, version, reason)
        versions = tuple(sorted({version, *(s.version for a in request.prefixes for s in a.spans)}))
        seen = {"oldest": versions[0], "newest": versions[-1], "versions": versions}
        return GroupHeader(**{**header.__dict__, **seen})

    async def _hand_over(self, keys: list[Any]) -> list[tuple[None, Group]]:
        await asyncio.sleep(self.hand_over_s)
        out = []
        for key in keys:
            future = self._slots.pop(key, None)
            if future is None or future.done():
                continue
            future.set_exception(raised(f"{key} was handed over"))
            request, since, version = self.requests[key]
            spans = [s for a in request.prefixes[:1] for s in a.spans]
            done = sum(s.end - s.start for s in spans)
            new = int(asyncio.get_running_loop().time() - since)
            spans += [VersionSpan(version, done, done + new)] if new else []
            tokens, logp = np.ones(done + new, np.int32), np.zeros(done + new, np.float32)
            segment = Segment(Source.POLICY, tokens, logp, tuple(spans))
            answers = tuple(Answer(i, (segment,), "abort") for i in range(request.sampling.n))
            out.append((None, Group(key, request.prompt_tokens, answers, 1.0, self.name, 1)))
        return out


class Places:
    """A cluster with ``free`` places, where actors are made by ``make``."""

    def __init__(self, make: Callable[[str], Resuming] = Resuming, free: int = 100) -> None:
        self.make, self.free = make, free
        self.place_s = 1.0
        self.slots: list[Slot] = []
        self.actors: list[Resuming] = []

    async def place(self, name: str, timeout_s: float) -> Slot:
        await asyncio.sleep(self.place_s)
        if self.free < 1:
            raise RunError(f"{name}: no place within {timeout_s:.0f} s")
        self.free -= 1
        self.slots.append(Slot())
        return self.slots[-1]

    def is_whole(self, slot: Slot) -> bool:
        return slot.whole

    def spawn(self, name: str, slot: Slot) -> Resuming:
        self.actors.append(self.make(name))
        return self.actors[-1]


class Live(Loop):
    """A loop with upkeep. ``play`` runs beside it, and the run goes on until it is over and ``steps`` are done."""

    def __init__(
        self, count: int, places: Places | None = None, latency: Callable[[Any], float] = lambda key: 2.0, **more: Any
    ) -> None:
        actors = [Resuming(f"generator-{i}", latency) for i in range(count)]
        tree = {
            "max_staleness": 2,
            "generator": {"max_concurrent": 4, "deadline_s": 500.0},
            "weights": {"deadline_s": 20.0},
        }
        train = {"batch_prompts": 4, "steps": more.pop("steps", 60)}
        super().__init__(actors, prompts=more.pop("prompts", 400), train=train, **{**tree, **more})  # type: ignore[arg-type]
        self.actors = {a.name: a for a in actors}
        for generator in self.fleet.generators:
            generator.slot = Slot()  # type: ignore[assignment]
        self.places = places or Places(lambda name: Resuming(name, latency))
        self.notes: list[tuple[str, str, str]] = []
        self.told: list[dict[str, Any]] = []
        self.upkeep = Upkeep(self.fleet, self.places, lambda *note: self.notes.append(note))  # type: ignore[arg-type]
        self.most: dict[str, int] = {}

    def scaler(self, folder: Path = Path("/nowhere")) -> Scaler:
        spare = Judges(self.config, {"verifier-0": Verifier()}, lambda _: Verifier())
        return Scaler(
            self.config,
            folder,
            self.upkeep,
            spare,
            lambda g: self.sampler.handover.take_from(self.fleet, g),
            lambda *note: self.notes.append(note),
            self.told.append,
        )

    async def scale(self, drain: float = 30.0, wait: float = 300.0, **wanted: int) -> str:
        """The outcome."""
        await self.scaler().meet(Request(id="0" * 16, drain_deadline_s=drain, wait_s=wait, **wanted))
        return self.told[-1]["state"]

    async def until(self, condition: Callable[[], Any]) -> None:
        deadline = asyncio.get_running_loop().time() + 1000.0
        while not condition():
            assert asyncio.get_running_loop().time() < deadline, "what the test waits for does not happen"
            await asyncio.sleep(0.1)

    async def at_step(self, step: int) -> None:
        await self.until(lambda: self.trainer.version.step >= step)

    def member(self, name: str) -> Generator:
        return next(g for g in self.fleet.generators if g.name == name)

    @property
    def names(self) -> list[str]:
        return sorted(g.name for g in self.fleet.serving)

    async def _committed(self, trained: Trained) -> StepTimes:
        for generator in self.fleet.alive:
            busy = len(generator.outstanding)
            self.most[generator.name] = max(self.most.get(generator.name, 0), busy)
        return await super()._committed(trained)

    async def played(self, play: Callable[[Live], Coroutine[Any, Any, None]], limit_s: float = 5000.0) -> Live:
        playing = asyncio.create_task(play(self))
        try:
            await self.run(limit_s)
            await playing
        finally:
            playing.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await playing
            await self.upkeep.close()
        return self


class Verifier:
    """Judges after ``judge_s``."""

    def __init__(self, judge_s: float = 1.0) -> None:
        self.judge_s, self.judged, self.closed = judge_s, 0, False
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ready, self.judge = Method(lambda: self._call(0.5)), Method(lambda *a: self._call(self.judge_s, True))
        self.close = Method(lambda: self._call(0.0))

    def die(self) -> None:
        if not self._dead.done():
            self._dead.set_result(None)

    def _call(self, seconds: float, judges: bool = False) -> asyncio.Task[Any]:
        async def run() -> Any:
            await asyncio.wait({self._dead}, timeout=seconds)
            if self._dead.done():
                raise ray.exceptions.ActorDiedError()
            self.judged += judges
            return []

        return asyncio.ensure_future(run())


def check(loop: Live) -> None:
    """Each prompt is in one place, and trained at most once; no token was too old."""
    trained = Counter((k.epoch, k.uid) for keys in loop.learner.trained for k in keys)
    assert max(trained.values()) == 1, "a prompt was trained twice"
    assert len(trained) == loop.ledger.counts()["trained"]
    counts = loop.ledger.counts()
    assert counts["dropped"] == 0 and counts["issued"] == sum(n for place, n in counts.items() if place != "issued")
    assert max(loop.ages) <= loop.config.max_staleness


def played(clock: Clock, make: Callable[[], Live], play: Callable[[Live], Coroutine[Any, Any, None]]) -> Live:
    """The loop that ``make`` makes, after it has run with ``play`` beside it."""

    async def go() -> Live:
        return await make().played(play)

    loop: Live = clock.run(go())
    return loop
