"""A learner and a fleet with nothing around them: for what measures or breaks the way of the weights between the two.

No data, no verifiers, no loop: a step trains on a few made-up demonstrations, and ``Trainer.publish`` is the run's own.
What a generator serves is checked by scoring a fixed answer: its log-probs are the learner's of that version, or they are
of something that never should have served.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from actors import placement
from actors.calls import CallFailed
from actors.learner import LearnerGroup, LearnerRank
from hapo_async import batch
from hapo_async import config as configs
from hapo_async.config import Config
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.generators import Generator
from hapo_async.driver.training import Trainer
from hapo_async.driver.upkeep import Upkeep
from hapo_async.errors import RunError
from hapo_async.sequences import Row, TrainGroup
from hapo_async.sequences import Sequence as TokenSequence
from hapo_async.types import GroupKey, GroupRequest, Sampling, Source, Teacher, Version

FIRST = Version(1, 0)

EXACT = 2e-4
"""Largest difference of two log-probs of one token under the same float32 weights, from two implementations."""

LEARNS = {"lr": 1e-3, "mini_batches": 1, "deadline_s": 120.0, "micro_batch_tokens": 256}
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 2, 6, 24
HIGHEST_TOKEN = 90  # every model here has more


def settings(transport: str, staging: str = "host", engine: str = "transformers", **tree: dict[str, Any]) -> Config:
    """A configuration whose steps move the weights far enough to tell any two versions apart."""
    base: dict[str, dict[str, Any]] = {
        "generator": {"engine": engine},
        "weights": {"transport": transport, "staging": staging},
        "learner": LEARNS,
        "sampling": {"max_tokens": 64},
        "data": {"max_prompt_tokens": 64},
        "train": {"batch_prompts": PROMPTS},
    }
    merged = {name: {**base.get(name, {}), **tree.get(name, {})} for name in {**base, **tree}}
    return configs.parse({"algorithm": "sft", **merged})


def demonstrations(seed: int) -> list[TrainGroup]:
    """Groups that train one made-up teacher's answer each."""
    rng = np.random.default_rng(seed)
    out = []
    for number in range(PROMPTS):
        prompt, answer = (rng.integers(3, HIGHEST_TOKEN, n).astype(np.int32) for n in (PROMPT_TOKENS, ANSWER_TOKENS))
        row = Row(Source.TEACHER, 0, len(answer), 1.0, True, 1.0)
        key = GroupKey(0, f"{seed}-{number}", 0)
        out.append(TrainGroup(key, None, len(prompt), prompt, Teacher("", answer), (row,), 1.0, 1.0))
    return out


def spoken(prompt: np.ndarray, answer: np.ndarray) -> TokenSequence:
    """An answer as the learner scores it. prompt int32 [P], answer int32 [T]."""
    n = len(answer)
    return TokenSequence(
        prompt_tokens=prompt,
        tokens=answer,
        sources=np.full(n, int(Source.TEACHER), np.int8),
        logp_behave=np.full(n, np.nan, np.float32),
        version_steps=np.full(n, -1, np.int32),
        advantage=1.0,
        reward=1.0,
        judged=True,
        is_teacher=True,
        temperature=1.0,
        group=0,
        confidence=1.0,
    )


PROBE = (np.arange(5, 11, dtype=np.int32), np.arange(20, 52, dtype=np.int32))


@dataclass
class Rig:
    """truth: the learner's log-probs float32 [T] of PROBE by version. worst: the largest error that a generator ever had.
    looked: how often one was asked. A generator that dies is replaced, if the fleet was started here."""

    config: Config
    learner: LearnerGroup
    fleet: Fleet
    version: Version = FIRST
    truth: dict[Version, np.ndarray] = field(default_factory=dict)
    worst: float = 0.0
    looked: int = 0

    def __post_init__(self) -> None:
        nothing: Any = None  # a publish needs neither sampler nor ledger nor buffer
        self.events: list[str] = []
        self.upkeep = self.fleet.starter and Upkeep(
            self.fleet, self.fleet.starter, lambda *text: self.events.append(text[2])
        )
        self.trainer = Trainer(self.config, self.learner, self.fleet, nothing, nothing, nothing, self.version)
        self._groups = itertools.count()

    @classmethod
    async def start(cls, config: Config, model: str, cpus: float = 0.3, rank: type[LearnerRank] = LearnerRank) -> Rig:
        """Starts both sides. Raises RunError."""
        learner = await start_learner(config, model, cpus, rank)
        try:
            fleet = await Fleet.start(config, model, placement.join(1), cpus, lambda: None)
        except BaseException:
            await learner.close()
            raise
        return cls(config, learner, fleet)

    async def step(self) -> Version:
        """A real optimizer step; the learner's new version, of which ``truth`` then holds the log-probs."""
        version = self.trainer.version
        plans = batch.plan_step(demonstrations(version.step), self.config.learner.ranks, 1, version)
        metrics = await self.learner.step(plans)
        if metrics["skipped"]:
            raise RunError(f"the step after version {version} was skipped")
        self.trainer.version = Version(version.incarnation, version.step + 1)
        await self.note_truth()
        return self.trainer.version

    async def note_truth(self) -> None:
        (logp,) = await self.learner.score([spoken(*PROBE)])
        self.truth[self.trainer.version] = logp

    def member(self, name: str) -> Generator | None:
        """Who has that name now."""
        return next((g for g in self.fleet.generators if g.name == name), None)

    async def error_of(self, generator: Generator) -> tuple[Version, float]:
        """(version that it says it serves, how far its log-probs are from the learner's). Raises CallFailed when it serves
        nothing."""
        version, (logp,) = await self.fleet.score(generator, [PROBE])
        if version not in self.truth:
            raise AssertionError(f"{generator.name} serves {version}, which the learner never had: {list(self.truth)}")
        error = float(np.abs(logp - self.truth[version]).max())
        self.worst, self.looked = max(self.worst, error), self.looked + 1
        return version, error

    async def answers_error(self, generator: Generator, tokens: int = 12) -> float:
        """Samples a group and compares its recorded log-probs with the learner's, whose version it must have."""
        key = GroupKey(9, f"asked-{next(self._groups)}", 0)
        request = GroupRequest(key, PROBE[0], Sampling(n=2, max_tokens=tokens, temperature=1.0))
        _, ref = await self.fleet.sample(generator, request, 30.0)
        group = await ref
        scored = await self.learner.score([spoken(group.prompt_tokens, a.tokens) for a in group.answers])
        return max(float(np.abs(a.logp_behave - s).max()) for a, s in zip(group.answers, scored, strict=True))

    async def close(self) -> None:
        try:
            if self.upkeep:
                await self.upkeep.close()
            await self.fleet.close()
        finally:
            await self.learner.close()


class Watch:
    """Asks every generator again and again what it serves, beside whatever happens, until it is left.

    seen: versions by generator, in the order they were first served. wrong: what must never be."""

    def __init__(self, rig: Rig, every_s: float = 0.05) -> None:
        self.rig, self.every_s = rig, every_s
        self.seen: dict[str, list[Version]] = {}
        self.wrong: list[str] = []
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Watch:
        self._tasks = [asyncio.create_task(self._follow(g.name)) for g in self.rig.fleet.generators]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _follow(self, name: str) -> None:
        while True:
            generator = self.rig.member(name)
            if generator is not None and generator.serves and generator.installed is not None:
                await self._look(generator)
            await asyncio.sleep(self.every_s)

    async def _look(self, generator: Generator) -> None:
        try:
            version, error = await self.rig.error_of(generator)
        except CallFailed:
            return  # it serves nothing: that is allowed
        except AssertionError as unknown:
            self.wrong.append(str(unknown))
            return
        mine = self.seen.setdefault(generator.name, [])
        if version not in mine:
            mine.append(version)
        if not error < EXACT:
            self.wrong.append(f"{generator.name} serves {version} with log-probs that are {error:.2g} off")


class Said(logging.Handler):
    """The driver's warnings meanwhile, shortened."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage().replace("\n", " ")[:300])

    async def __aenter__(self) -> Said:
        logging.getLogger("hapo_async").addHandler(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        logging.getLogger("hapo_async").removeHandler(self)


async def start_learner(
    config: Config, model: str, cpus: float = 0.3, rank: type[LearnerRank] = LearnerRank
) -> LearnerGroup:
    """A learner in a place of its own. Raises RunError."""
    cluster = placement.join(1)
    name = f"learner-{next(_numbers)}"
    slot = await asyncio.to_thread(placement.reserve, cluster, config.learner.ranks, cpus, name)
    return await LearnerGroup.start(config, model, cluster, slot, rank)


_numbers = itertools.count()


async def eventually(what: str, holds: Any, deadline_s: float, every_s: float = 0.02) -> float:
    """Seconds until ``holds()``. Raises TimeoutError."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    while not holds():
        if loop.time() - began > deadline_s:
            raise TimeoutError(f"{what}: not within {deadline_s:.0f} s")
        await asyncio.sleep(every_s)
    return loop.time() - began


def distances(truth: Sequence[np.ndarray]) -> float:
    """The smallest distance of two neighbouring versions: EXACT must be far below it, or nothing is shown."""
    return min(float(np.abs(a - b).max()) for a, b in itertools.pairwise(truth))
