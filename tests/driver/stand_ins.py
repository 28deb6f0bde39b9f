"""Stand-ins for remote actors, so that the driver's own loops can be put through deaths, delays and refusals in
milliseconds. What is tested is the driver; the actors themselves have their own tests."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import ray

from actors.transports import Member, Offer, Published
from hapo_async import algorithms, config
from hapo_async.buffer import Buffer, Ready
from hapo_async.data import PromptStream
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.training import StepTimes, Trained, Trainer
from hapo_async.ledger import Ledger
from hapo_async.sequences import Sequence
from hapo_async.types import GroupHeader, GroupKey, GroupRequest, Judgement, Prompt, Teacher, Verdict, Version


class Method:
    """``actor.method.remote(...)`` as a task; Ray's references can be awaited just so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.remote = function


def raised(message: str) -> Exception:
    return ray.exceptions.RayTaskError("method", "traceback", ValueError(message))


class StandInGenerator:
    """Answers after ``latency(key)`` seconds; may die, refuse prompts, install slowly."""

    def __init__(self, name: str, latency: Callable[[GroupKey], float] = lambda key: 0.002) -> None:
        self.name, self.latency = name, latency
        self.version = Version(0, 0)
        self.refused: set[str] = set()
        self.install_s = 0.0
        self.submit_s = 0.0
        self.issued: list[GroupKey] = []
        self.so_far: Callable[[GroupKey], tuple[int, ...]] | None = lambda key: (5, 900)  # None: it does not tell
        self._slots: dict[GroupKey, asyncio.Future[GroupHeader]] = {}
        self._dead: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.submit, self.install = self._method(self._submit), self._method(self._install)
        self.receive, self.receive_s = self._method(self._receive), 0.0
        self.received: list[Version] = []
        self.truncate, self.abort = self._method(self._truncate), self._method(self._abort)
        self.asleep = False
        self.sleep, self.wake = self._method(self._sleep), self._method(self._wake)
        self.score, self.stats = self._method(self._score), self._method(self._stats)
        self.installs: list[Version] = []
        self.collect = Method(lambda key: (self._call(self._collect(GroupKey(*key))), ("payload", GroupKey(*key))))
        self.sample = Method(lambda request: (self._call(self._sample(request)), ("payload", request.key)))

    def die(self) -> None:
        if not self._dead.done():
            self._dead.set_result(None)

    def _method(self, function: Callable[..., Any]) -> Method:
        return Method(lambda *arguments: self._call(function(*arguments)))

    def _call(self, work: Any) -> asyncio.Task[Any]:
        async def run() -> Any:
            task = asyncio.ensure_future(work)
            if not self._dead.done():
                await asyncio.wait({task, self._dead}, return_when=asyncio.FIRST_COMPLETED)
            if self._dead.done():
                task.cancel()
                raise ray.exceptions.ActorDiedError()
            return task.result()

        outer = asyncio.ensure_future(run())
        outer.add_done_callback(lambda t: t.cancelled() or t.exception())
        return outer

    async def _submit(self, requests: list[GroupRequest]) -> None:
        await asyncio.sleep(self.submit_s)
        for request in requests:
            if request.key.uid in self.refused:
                raise raised(f"{request.key} is refused")
        loop = asyncio.get_running_loop()
        for request in requests:
            self.issued.append(request.key)
            future = loop.create_future()
            future.add_done_callback(lambda f: f.cancelled() or f.exception())
            self._slots[request.key] = future
            loop.call_later(self.latency(request.key), self._finish, request.key, self._header(request, self.version))

    async def _sample(self, request: GroupRequest) -> GroupHeader:
        await self._submit([request])
        return await self._collect(request.key)

    def _header(self, request: GroupRequest, version: Version, reason: str = "stop") -> GroupHeader:
        n = request.sampling.n
        steps = (version.step,) * n
        return GroupHeader(request.key, (4,) * n, (reason,) * n, steps, version, version, 3, self.name, 0.1, (version,))

    def _finish(self, key: GroupKey, header: GroupHeader) -> None:
        if key in self._slots and not self._slots[key].done():
            self._slots[key].set_result(header)

    async def _collect(self, key: GroupKey) -> GroupHeader:
        if key not in self._slots:
            raise raised(f"{key} is unknown")
        header = await asyncio.shield(self._slots[key])
        self._slots.pop(key, None)
        return header

    async def _receive(self, offer: Offer) -> None:
        await asyncio.sleep(self.receive_s)
        self.received.append(offer.version)

    async def _install(self, offer: Offer) -> dict[str, Any]:
        await asyncio.sleep(self.install_s)
        self.version = offer.version
        self.installs.append(offer.version)
        return {"version": str(offer.version), "fetch_s": 0.0, "pause_s": 0.0, "bytes": 1}

    async def _sleep(self) -> None:
        self.asleep = True

    async def _wake(self) -> None:
        self.asleep = False

    async def _score(self, sequences: list[tuple[np.ndarray, np.ndarray]]) -> tuple[Version, list[np.ndarray]]:
        return self.version, [-tokens.astype(np.float32) for _, tokens in sequences]

    async def _stats(self) -> dict[str, Any]:
        running = sum(not f.done() for f in self._slots.values())
        return {"running_groups": running, "tokens": 4 * len(self.issued), "version": str(self.version), "pid": 1}

    def _tell(self, keys: list[GroupKey]) -> dict[GroupKey, tuple[int, ...]] | None:
        return self.so_far and {key: self.so_far(key) for key in keys if key in self._slots}

    async def _truncate(self, keys: list[GroupKey]) -> dict[GroupKey, tuple[int, ...]] | None:
        for key in keys:
            v = self.version
            header = GroupHeader(key, (2, 2), ("length",) * 2, (v.step,) * 2, v, v, 3, self.name, 0.1, (v,))
            self._finish(key, header)
        return self._tell(keys)

    async def _abort(self, keys: list[GroupKey]) -> dict[GroupKey, tuple[int, ...]] | None:
        told = self._tell(keys)
        for key in keys:
            future = self._slots.pop(key, None)
            if future and not future.done():
                future.set_exception(raised("aborted"))
        return told


class StandInJudges:
    """Every second answer is right, or those are of which ``right(uid, index)`` says so; or every verdict is ``always``;
    or ``error`` is raised."""

    def __init__(
        self,
        always: Verdict | None = None,
        error: Exception | None = None,
        right: Callable[[str, int], bool] = lambda uid, index: index % 2 == 1,
    ) -> None:
        self.always, self.error, self.right, self.count = always, error, right, 1

    async def judge(self, payload: Any, prompt: Prompt, answers: int, key: GroupKey | None = None) -> list[Judgement]:
        await asyncio.sleep(0)
        if self.error:
            raise self.error
        if self.always:
            return [Judgement(self.always, None)] * answers
        correct, wrong = Judgement(Verdict.CORRECT, 1.0), Judgement(Verdict.WRONG, 0.0)
        return [correct if self.right(prompt.uid, i) else wrong for i in range(answers)]


class StandInLearner:
    """Records what it trained; skips a share of steps. A token's log-prob is minus its id. prefetched: the payloads that
    it was sent beside its steps."""

    is_remote = True
    blamed: tuple[Any, ...] = ()

    def __init__(self, skip_share: float = 0.0, step_s: float = 0.001) -> None:
        self.trained: list[list[GroupKey]] = []
        self.prefetched: list[Any] = []
        self.asleep = False
        self.scored: list[list[Sequence]] = []
        self.skip_share, self.step_s = skip_share, step_s
        self._rng = random.Random(0)

    async def step(self, plans: list[Any]) -> dict[str, float]:
        await asyncio.sleep(self.step_s)
        if self._rng.random() < self.skip_share:
            return {"skipped": 1.0}
        self.trained.append([g.key for plan in plans for mini in plan.minis for g in mini])
        return {"skipped": 0.0}

    def prefetch(self, refs: list[Any]) -> None:
        self.prefetched += refs

    async def sleep(self) -> None:
        self.asleep = True

    async def wake(self) -> None:
        self.asleep = False

    async def score(self, sequences: list[Sequence]) -> list[np.ndarray]:
        await asyncio.sleep(0)
        self.scored.append(sequences)
        return [-s.tokens.astype(np.float32) for s in sequences]

    async def announce(self, version: Version, members: list[Member]) -> Offer | None:
        return None

    async def admit(self, members: list[Member]) -> None:
        pass

    async def publish(self, version: Version, transport: str = "") -> Published:
        await asyncio.sleep(0)
        return Published(Offer("ray", version))


class Loop:
    """The driver's real sampler, trainer, fleet, ledger and buffer around stand-ins. teachers: of each prompt, by its
    number. ``steps`` holds the groups of each step."""

    def __init__(
        self,
        generators: list[StandInGenerator],
        *,
        prompts: int,
        judges: Any = None,
        trains: Any = None,
        teachers: Callable[[int], tuple[Teacher, ...]] = lambda number: (),
        **tree: Any,
    ):
        base: dict[str, Any] = {"algorithm": "grpo", "sampling": {"n": 2, "max_tokens": 8}}
        self.config = config.parse({**base, **tree})
        algorithm = algorithms.get(self.config.algorithm)
        options = algorithm.check_config(self.config)
        items = [
            Prompt(
                f"p{i:03}",
                ({"role": "user", "content": "x"},),
                np.arange(3, dtype=np.int32),
                "1",
                teachers=teachers(i),
            )
            for i in range(prompts)
        ]
        self.ledger = Ledger()
        stream = PromptStream(items, 0, True, self.config.data.epochs)
        self.buffer = Buffer((self.config.max_staleness + 1) * self.config.train.batch_prompts, self.ledger.order)
        by_uid = {p.uid: p for p in items}
        self.sampler = Sampler(self.config, algorithm, options, stream, by_uid, self.ledger, self.buffer)
        fleet = [Generator(g.name, g, None) for g in generators]  # type: ignore[arg-type]
        self.fleet = Fleet(self.config, fleet, self.sampler.wake)
        self.judges = judges or StandInJudges()
        self.learner = trains or StandInLearner()
        self.trainer = Trainer(
            self.config, self.learner, self.fleet, self.sampler, self.ledger, self.buffer, Version(1, 0)
        )
        self.ages: list[int] = []
        self.steps: list[list[Ready]] = []

    async def _committed(self, trained: Trained) -> StepTimes:
        self.steps.append(trained.groups)
        self.ages += [trained.step - 1 - g.header.oldest.step for g in trained.groups if g.header.oldest]
        return StepTimes()

    async def run(self, limit_s: float = 20.0) -> None:
        """Until the run ends by itself. Raises what it raises, or TimeoutError when it hangs."""
        await self.trainer.publish()
        await self.fleet.wait_installed(Version(1, 0), 5.0)
        feeding = asyncio.create_task(self.sampler.feed(self.fleet, self.judges))
        training = asyncio.create_task(self.trainer.run(self._committed))
        try:
            done, _ = await asyncio.wait({feeding, training}, timeout=limit_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise TimeoutError(f"hangs at step {self.trainer.version.step}: {self.ledger.counts()}")
            for task in done:
                task.result()
        finally:
            for task in (feeding, training):
                task.cancel()
            await asyncio.gather(feeding, training, return_exceptions=True)
            await self.sampler.close()
        self.ledger.check(recount=True)
