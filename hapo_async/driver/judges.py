"""The verifiers as the driver sees them: each group goes to the one with the fewest outstanding; dead ones are replaced."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from actors import placement
from actors.calls import CallFailed, Calls, Pending
from actors.verifier import VerifierActor
from hapo_async.config import Config
from hapo_async.driver import tasks
from hapo_async.driver.restarts import Budget
from hapo_async.driver.starter import ACTOR_OPTIONS
from hapo_async.errors import RunError
from hapo_async.types import Fault, GroupKey, Judgement, Prompt

log = logging.getLogger(__name__)

START_S = 120.0
CLOSE_S = 10.0
LOOK_S = 0.2
NAMES_KEPT = 32  # of those that have left
TRIES = 4  # judgements that one answer may cost: two tries and two benign ones
MOST_FAILURES = 20  # judgements in a row, and at least two groups, that failed by the judges' own fault


@dataclass(eq=False)
class _Judge:
    """One verifier. outstanding: answers that it has before it."""

    name: str
    actor: Any
    outstanding: int = 0


def _spawn(config: Config) -> Any:
    remote: Any = VerifierActor
    return remote.options(**ACTOR_OPTIONS).remote(
        config.verifier.name, config.verifier.workers, config.verifier.timeout_s
    )


def _no_note(kind: str, label: str, text: str) -> None:
    log.warning(text)


class Judges:
    """All verifier actors. One that dies or stays silent is left out, its groups go to others, and another one is started
    under its name, a few times. note: takes kind, label and text of what happens (``hapo_async.events``)."""

    def __init__(self, config: Config, actors: dict[str, Any], spawn: Callable[[Config], Any] = _spawn) -> None:
        self.config = config
        self.note: Callable[[str, str, str], None] = _no_note
        self._restarts = 0
        self._spawn = spawn
        self._judges = {name: _Judge(name, actor) for name, actor in actors.items()}
        self._numbers = itertools.count(len(actors))
        self._calls = Calls()
        self._failures = 0
        self.retired: deque[str] = deque(maxlen=NAMES_KEPT)
        self._budgets: dict[str, Budget] = {}
        self._expected: dict[str, asyncio.Task[None]] = {}
        self._changed = asyncio.Event()
        self._closed = False

    @classmethod
    async def start(cls, config: Config) -> Judges:
        actors = {f"verifier-{index}": _spawn(config) for index in range(config.verifier.count)}
        refs = {name: actor.ready.remote() for name, actor in actors.items()}
        await asyncio.to_thread(placement.wait_ready, refs)
        return cls(config, actors)

    def take(self) -> int:
        """Replacements that have started since the last call."""
        restarts, self._restarts = self._restarts, 0
        return restarts

    @property
    def count(self) -> int:
        return len(self._judges)

    def calls(self) -> list[Pending]:
        """Remote calls that have not been answered, oldest first."""
        return self._calls.pending()

    @property
    def members(self) -> list[str]:
        """Those in service and those that are being replaced, oldest first."""
        return sorted([*self._judges, *self._expected], key=lambda name: int(name.rpartition("-")[2]))

    @property
    def names(self) -> list[str]:
        """Those in service."""
        return list(self._judges)

    def lose(self, name: str, error: CallFailed) -> None:
        """Takes a silent one out of service; its groups go to others."""
        if (judge := self._judges.get(name)) is not None:
            self._lose(judge, error)

    async def stats(self, name: str, deadline_s: float) -> dict[str, Any]:
        """What a verifier says of itself: ``VerifierActor.stats``. Raises CallFailed."""
        if (judge := self._judges.get(name)) is None:
            raise CallFailed(name, "out of service", gone=True)
        stats: dict[str, Any] = await self._calls.answer(judge.actor.stats.remote(), deadline_s, name, "stats")
        return stats

    async def judge(self, payload: Any, prompt: Prompt, answers: int, key: GroupKey | None = None) -> list[Judgement]:
        """One judgement per answer of the group behind ``payload``; ``key`` names it to those who ask what is pending.

        The deadline covers all answers that the verifier has before it, judged one after the other, each tried again and
        followed by two benign ones (``verify.attribution``). Raises CallFailed when the group cannot be judged though a
        verifier answers (its payload is lost, a worker does not start), RunError when no verifier is left and none is on
        its way, or when too many judgements in a row failed by the judges' own fault.
        """
        while True:
            judge = await self._free()
            judge.outstanding += answers
            deadline_s = 30.0 + TRIES * judge.outstanding * self.config.verifier.timeout_s
            try:
                ref = judge.actor.judge.remote(payload, prompt.text, prompt.truth, prompt.verifier, dict(prompt.extra))
                judgements: list[Judgement] = await self._calls.answer(ref, deadline_s, judge.name, "judge", key)
                self._check(judgements)
                return judgements
            except CallFailed as error:
                if not error.gone:
                    raise
                self._lose(judge, error)
            finally:
                judge.outstanding -= answers

    def _check(self, judgements: Sequence[Judgement]) -> None:
        """Raises RunError when nothing but the judges has failed for too long."""
        for judgement in judgements:
            if judgement.fault is Fault.JUDGE:
                self._failures += 1
            elif judgement.is_judged:
                self._failures = 0
        if self._failures >= max(MOST_FAILURES, 2 * len(judgements)):
            why = next(j.detail for j in reversed(judgements) if j.fault is Fault.JUDGE)
            raise RunError(
                f"{self._failures} judgements in a row failed, and benign answers failed with them. The last: {why}. Look at "
                "the verifier (hapo-async check-verifier), at what it depends on, and at verifier.timeout_s; a plug-in must "
                "return 0.0 for an answer that it cannot read."
            )

    async def _free(self) -> _Judge:
        """The one with the fewest answers before it; where there is none, the next that comes."""
        while not self._judges:
            if not self._expected:
                raise RunError("no verifier is left")
            self._changed.clear()
            await self._changed.wait()
        return min(self._judges.values(), key=lambda judge: judge.outstanding)

    # ---------------------------------------------------------------- replacing

    def _lose(self, judge: _Judge, error: CallFailed) -> None:
        """Once for each death, whoever notices it."""
        if self._judges.get(judge.name) is not judge:
            return
        del self._judges[judge.name]
        log.error("%s is out of service: %s", judge.name, error)
        ray.kill(judge.actor)
        wait_s = None if self._closed else self._wait_s(judge.name)
        if wait_s is None:
            self.note("given_up", f"{judge.name} lost", f"{judge.name} is lost and not replaced: {error}")
            self._changed.set()
            return
        self.note(
            "lost", f"{judge.name} lost", f"{judge.name} is lost: {error}; another one is started in {wait_s:g} s"
        )
        task = self._expected[judge.name] = asyncio.create_task(self._replace(judge.name, wait_s))
        task.add_done_callback(lambda _: self._changed.set())

    def _wait_s(self, name: str) -> float | None:
        return self._budgets.setdefault(name, Budget()).take(time.monotonic())

    async def _replace(self, name: str, wait_s: float | None) -> None:
        try:
            while wait_s is not None:
                await asyncio.sleep(wait_s)
                try:
                    actor = await self._bring_up(name)
                except CallFailed as error:
                    log.error("%s could not be started again: %s", name, error)
                    wait_s = self._wait_s(name)
                    continue
                self._judges[name] = _Judge(name, actor)
                self._restarts += 1
                self.note("replaced", f"{name} back", f"{name} has been started again")
                return
            self.note("given_up", f"{name} given up", f"{name} could not be started again: {self.count} go on")
        finally:
            self._expected.pop(name, None)

    async def _bring_up(self, name: str) -> Any:
        """An actor that is ready. Raises CallFailed."""
        actor = self._spawn(self.config)
        try:
            await self._calls.answer(actor.ready.remote(), START_S, name, "ready")
        except BaseException:
            ray.kill(actor)
            raise
        return actor

    # ---------------------------------------------------------------- scaling

    async def grow(self) -> str:
        """One more. Returns its name. Raises RunError."""
        name = f"verifier-{next(self._numbers)}"
        self._judges[name] = _Judge(name, await self._bring_up(name))
        self._changed.set()
        return name

    async def retire(self, name: str, drain_s: float) -> bool:
        """Lets one go: it gets nothing more, and has ``drain_s`` for what it has; the rest goes to others. False when it is the
        last one, or not there."""
        if task := self._expected.get(name):
            await tasks.end(task)
            if name not in self._judges:
                return True
        if len(self._judges) < 2 or (judge := self._judges.pop(name, None)) is None:
            return False
        self.retired.append(name)
        deadline = time.monotonic() + drain_s
        while judge.outstanding and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_S)
        await self._end(judge)
        return True

    async def _end(self, judge: _Judge) -> None:
        try:
            await self._calls.answer(judge.actor.close.remote(), CLOSE_S, judge.name, "close")
        except CallFailed as error:
            log.warning("closing: %s", error)
        ray.kill(judge.actor)

    async def close(self) -> None:
        self._closed = True
        await tasks.end(*self._expected.values())
        for judge in list(self._judges.values()):
            await self._end(judge)
