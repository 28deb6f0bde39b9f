"""Who answers an evaluation, and as which version.

barrier    all that serve, while the learner waits: one version, checked
detached   one that leaves training for it, at exactly the version that is evaluated, and comes back whatever happens
floating   all that serve, beside training: versions change under way
"""

from __future__ import annotations

import logging

from actors.calls import CallFailed
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.errors import RunError
from hapo_async.types import GroupHeader, GroupKey, Version

log = logging.getLogger(__name__)


class Crew:
    """All serving generators. version: the only one that may answer, None for any. width: prompts at a time on each
    generator. A crew serves one evaluation and is closed after it."""

    def __init__(self, fleet: Fleet, width: int, version: Version | None = None) -> None:
        self.fleet = fleet
        self.width = width
        self.version = version
        self._asked: dict[GroupKey, str] = {}

    async def generators(self) -> list[Generator]:
        """Those to ask now. Raises RunError where there can be none."""
        return await self.fleet.someone()

    def asked(self, generator: Generator, keys: list[GroupKey]) -> None:
        self._asked |= dict.fromkeys(keys, generator.name)

    def answered(self, header: GroupHeader) -> None:
        """Raises RunError for an answer of another version."""
        self._asked.pop(header.key, None)
        if self.version is not None and not header.oldest == header.newest == self.version:
            raise RunError(
                f"{header.generator} answered {header.key} with versions {header.oldest} to {header.newest}, not with "
                f"{self.version}"
            )

    async def close(self) -> None:
        """Nothing of the evaluation goes on running on a generator that trains."""
        left: dict[str, list[GroupKey]] = {}
        for key, name in self._asked.items():
            left.setdefault(name, []).append(key)
        self._asked.clear()
        if left:
            await self.fleet.abort(left)


class Lent(Crew):
    """One generator that training lends: the one with the fewest outstanding tokens; when it dies, another one, as long as
    that can still serve the version and one more is left to training."""

    def __init__(self, fleet: Fleet, width: int, version: Version, deadline_s: float) -> None:
        super().__init__(fleet, width, version)
        self.generator: Generator | None = None
        self._version, self._deadline_s = version, deadline_s

    async def generators(self) -> list[Generator]:
        if self.generator is None or not self.generator.alive:
            self.generator = await self._lend()
        return [self.generator]

    async def _lend(self) -> Generator:
        """Each failure takes a generator out of service, so that this ends."""
        while serving := self.fleet.serving:
            free = min(serving, key=lambda g: g.load)
            try:
                await self.fleet.detach(free, self._version, self._deadline_s)
            except CallFailed as error:
                log.warning("an evaluation needs another generator: %s", error)
                if free.alive:
                    raise
                continue
            return free
        raise RunError("no generator is left")

    async def close(self) -> None:
        try:
            await super().close()
        finally:
            if self.generator is not None:
                self.generator.take_idle_s()  # it waited for nothing
                self.fleet.attach(self.generator)
                self.generator = None
