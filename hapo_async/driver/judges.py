"""The verifiers as the driver sees them: each group goes to the one with the fewest outstanding."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import ray

from actors import placement
from actors.calls import CallFailed, Calls, Pending
from actors.verifier import VerifierActor
from hapo_async.config import Config
from hapo_async.driver.fleet import ACTOR_OPTIONS
from hapo_async.errors import RunError
from hapo_async.types import GroupKey, Judgement, Prompt

log = logging.getLogger(__name__)


class Judges:
    """All verifier actors. An actor that dies or stays silent is left out; its group goes to another."""

    def __init__(self, config: Config, actors: dict[str, Any]) -> None:
        self.config = config
        self._actors = actors
        self._outstanding = dict.fromkeys(actors, 0)
        self._calls = Calls()

    @classmethod
    async def start(cls, config: Config) -> Judges:
        actors: dict[str, Any] = {}
        remote: Any = VerifierActor
        for index in range(config.verifier.count):
            name = f"verifier-{index}"
            actors[name] = remote.options(**ACTOR_OPTIONS).remote(
                config.verifier.name, config.verifier.workers, config.verifier.timeout_s
            )
        refs = {name: actor.ready.remote() for name, actor in actors.items()}
        await asyncio.to_thread(placement.wait_ready, refs)
        return cls(config, actors)

    @property
    def count(self) -> int:
        return len(self._actors)

    def calls(self) -> list[Pending]:
        """Remote calls that have not been answered, oldest first."""
        return self._calls.pending()

    @property
    def names(self) -> list[str]:
        """Those in service."""
        return list(self._actors)

    async def stats(self, name: str, deadline_s: float) -> dict[str, Any]:
        """What a verifier says of itself: ``VerifierActor.stats``. Raises CallFailed."""
        if (actor := self._actors.get(name)) is None:
            raise CallFailed(name, "out of service", gone=True)
        stats: dict[str, Any] = await self._calls.answer(actor.stats.remote(), deadline_s, name, "stats")
        return stats

    async def judge(self, payload: Any, prompt: Prompt, answers: int, key: GroupKey | None = None) -> list[Judgement]:
        """One judgement per answer of the group behind ``payload``; ``key`` names it to those who ask what is pending.

        The deadline covers all answers that the verifier has before it, judged one after the other, each tried again.
        Raises CallFailed when the group cannot be judged though a verifier answers (its payload is lost, a worker does
        not start), RunError when no verifier is left.
        """
        while self._actors:
            name = min(self._actors, key=lambda n: self._outstanding[n])
            self._outstanding[name] += answers
            deadline_s = 30.0 + 2 * self._outstanding[name] * self.config.verifier.timeout_s
            try:
                ref = self._actors[name].judge.remote(
                    payload, prompt.text, prompt.truth, prompt.verifier, dict(prompt.extra)
                )
                judgements: list[Judgement] = await self._calls.answer(ref, deadline_s, name, "judge", key)
                return judgements
            except CallFailed as error:
                if not error.gone:
                    raise
                if (actor := self._actors.pop(name, None)) is not None:
                    log.error("%s is out of service: %s", name, error)
                    ray.kill(actor)
            finally:
                self._outstanding[name] -= answers
        raise RunError("no verifier is left")

    async def close(self) -> None:
        for name, actor in self._actors.items():
            try:
                await self._calls.answer(actor.close.remote(), 10.0, name, "close")
            except CallFailed as error:
                log.warning("closing: %s", error)
            ray.kill(actor)
