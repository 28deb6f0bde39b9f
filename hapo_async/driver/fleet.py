"""The generators as the driver sees them: who runs what, which version each one serves, and how weights reach them.

A generator is *alive* until it fails, and *serving* unless it is also detached: lent to something else (an evaluation),
at one version, without groups of the training.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray

from actors import placement
from actors.calls import CallFailed, Calls, Pending
from actors.generator import GeneratorActor
from hapo_async.config import Config
from hapo_async.errors import RunError
from hapo_async.types import GroupHeader, GroupKey, GroupRequest, Version
from hapo_async.weights import Manifest

log = logging.getLogger(__name__)

INSTALL_TRIES = 3
CONTROL_S = 30.0
CLOSE_S = 20.0

ACTOR_OPTIONS: dict[str, Any] = {"max_concurrency": 1000, "max_restarts": 0, "enable_task_events": False}
"""Of actors that are called several times for each group. Events of every call would cost a tenth of the driver's time."""

Installed = Callable[["Generator", Version], None]
"""Called after each install of a version on a generator."""


@dataclass
class Generator:
    """One generator. outstanding: estimated tokens still to come, by group in flight on it; load: their sum. detached: it
    gets no groups, and keeps its version whatever is published."""

    name: str
    actor: Any
    slot: placement.Slot
    installed: Version | None = None
    outstanding: dict[GroupKey, int] = field(default_factory=dict)
    load: int = 0
    alive: bool = True
    detached: bool = False
    failures: int = 0
    last_install: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    idle_since: float | None = field(default_factory=time.monotonic)
    idle_s: float = 0.0

    @property
    def serves(self) -> bool:
        """Whether training's groups are issued to it."""
        return self.alive and not self.detached

    def assign(self, key: GroupKey, tokens: int) -> None:
        self.outstanding[key] = tokens
        self.load += tokens
        if self.idle_since is not None:
            self.idle_s += time.monotonic() - self.idle_since
            self.idle_since = None

    def unassign(self, key: GroupKey) -> None:
        self.load -= self.outstanding.pop(key, 0)
        if not self.outstanding and self.idle_since is None:
            self.idle_since = time.monotonic()

    def take_idle_s(self) -> float:
        """Seconds without work since the last call."""
        now = time.monotonic()
        if self.idle_since is not None:
            self.idle_s += now - self.idle_since
            self.idle_since = now
        idle, self.idle_s = self.idle_s, 0.0
        return idle


class Fleet:
    """All generators. ``changed`` is called whenever capacity may have changed."""

    def __init__(self, config: Config, generators: list[Generator], changed: Callable[[], None]) -> None:
        self.config = config
        self.generators = generators
        self.changed = changed
        self.on_installed: list[Installed] = []
        self.failed_installs = 0  # since the journal last looked
        self._calls = Calls()
        self._newest: tuple[Manifest, Sequence[Any]] | None = None
        self._installers: dict[str, asyncio.Task[None]] = {}
        self._error: BaseException | None = None
        self._moved = asyncio.Event()  # a group left a generator, a version was installed, a generator failed

    @classmethod
    async def start(
        cls,
        config: Config,
        model_path: str,
        cluster: placement.Cluster,
        cpu_share: float,
        changed: Callable[[], None],
        slots: Sequence[placement.Slot] = (),
    ) -> Fleet:
        """Starts all generators, in ``slots`` or in places of their own, and waits until each is ready. Raises RunError
        naming the one that is not."""
        width = config.generator.width
        generators = []
        for index in range(config.generator.count):
            name = f"generator-{index}"
            slot = slots[index] if slots else placement.reserve(cluster, width, cpu_share, name, one_node=True)
            options = slot.options(0, gpus=0 if width > 1 else None, **ACTOR_OPTIONS)
            actor = (
                ray.remote(GeneratorActor)
                .options(**options)
                .remote(name, model_path, config.model_dump(mode="json"), {"device": cluster.device})
            )
            generators.append(Generator(name, actor, slot))
        refs = {g.name: g.actor.ready.remote() for g in generators}
        await asyncio.to_thread(placement.wait_ready, refs)
        return cls(config, generators, changed)

    @property
    def alive(self) -> list[Generator]:
        return [g for g in self.generators if g.alive]

    @property
    def serving(self) -> list[Generator]:
        """Alive and not detached: those that training's groups are issued to."""
        return [g for g in self.generators if g.serves]

    def calls(self) -> list[Pending]:
        """Remote calls that have not been answered, oldest first."""
        return self._calls.pending()

    # ---------------------------------------------------------------- requests

    async def submit(self, generator: Generator, requests: list[GroupRequest]) -> None:
        """Hands over requests in one call, so that they enter the engine together. Raises CallFailed."""
        await self._ask(generator, "submit", self.config.weights.deadline_s, requests)

    async def collect(self, generator: Generator, key: GroupKey, deadline_s: float) -> tuple[GroupHeader, Any]:
        """(header, reference to the Group). The group's tokens stay where they were made. Raises CallFailed."""
        refs = generator.actor.collect.remote(list(key))  # plain data: no pickle
        return await self._header(generator, key, refs, deadline_s)

    async def sample(self, generator: Generator, request: GroupRequest, deadline_s: float) -> tuple[GroupHeader, Any]:
        """``submit`` and ``collect`` of one request in one call."""
        return await self._header(generator, request.key, generator.actor.sample.remote(request), deadline_s)

    async def _header(
        self, generator: Generator, key: GroupKey, refs: tuple[Any, Any], deadline_s: float
    ) -> tuple[GroupHeader, Any]:
        header_ref, payload_ref = refs
        header: GroupHeader = await self._calls.answer(header_ref, deadline_s, generator.name, "collect", key)
        generator.tokens += sum(header.lengths)
        return header, payload_ref

    def release(self, generator: Generator, key: GroupKey) -> None:
        generator.unassign(key)
        self._moved.set()
        self.changed()

    def owners(self, keys: Sequence[GroupKey]) -> dict[str, list[GroupKey]]:
        """Which generator works on which of these groups."""
        found = {g.name: [k for k in keys if k in g.outstanding] for g in self.alive}
        return {name: mine for name, mine in found.items() if mine}

    async def truncate(self, owners: dict[str, list[GroupKey]]) -> dict[GroupKey, tuple[int, ...]]:
        """Ends the running answers of these groups now; they come back as they are. Returns the tokens so far of each
        answer, by group, where generators tell. A silent generator is ignored."""
        return await self._each("truncate", owners)

    async def abort(self, owners: dict[str, list[GroupKey]]) -> dict[GroupKey, tuple[int, ...]]:
        """Makes generators forget groups. Returns the tokens so far of each answer, by group, where generators tell. A
        silent generator is ignored."""
        return await self._each("abort", owners)

    async def _each(self, method: str, owners: dict[str, list[GroupKey]]) -> dict[GroupKey, tuple[int, ...]]:
        found: dict[GroupKey, tuple[int, ...]] = {}

        async def one(generator: Generator, keys: list[GroupKey]) -> None:
            try:
                found.update(await self._ask(generator, method, CONTROL_S, keys) or {})
            except CallFailed as error:
                log.warning("%s of %d groups failed: %s", method, len(keys), error)

        await asyncio.gather(*(one(g, owners[g.name]) for g in self.alive if g.name in owners))
        return found

    async def score(
        self, generator: Generator, sequences: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[Version, list[np.ndarray]]:
        """(version, log-probs float32 [T] of each sequence at temperature 1), all under that one version. sequences:
        (prompt tokens, tokens [T]) each. Raises CallFailed."""
        scored: tuple[Version, list[np.ndarray]] = await self._ask(
            generator, "score", self.config.generator.deadline_s, list(sequences)
        )
        return scored

    async def stats(self, generator: Generator, deadline_s: float) -> dict[str, Any]:
        """What the generator says of itself: ``GeneratorActor.stats``. Raises CallFailed."""
        stats: dict[str, Any] = await self._ask(generator, "stats", deadline_s)
        return stats

    async def _ask(self, generator: Generator, method: str, deadline_s: float, *arguments: Any) -> Any:
        ref = getattr(generator.actor, method).remote(*arguments)
        return await self._calls.answer(ref, deadline_s, generator.name, method)

    def mark_failed(self, generator: Generator, error: CallFailed) -> None:
        """Takes a dead or silent generator out of service. Raises RunError when it was the last one.

        Its actor is ended, so that every call that still waits for it fails at once and its groups are issued again.
        """
        if not error.gone or not generator.alive:
            return
        generator.alive = False
        ray.kill(generator.actor)
        log.error("%s is out of service: %s", generator.name, error)
        self._moved.set()
        self.changed()
        if not self.alive:
            raise RunError(f"no generator is left; the last one failed: {error}")
        if not self.serving:  # an evaluation has the last one: training comes first
            self.attach(self.alive[0])

    # ---------------------------------------------------------------- taking turns

    async def sleep(self) -> None:
        """Every serving generator frees what it can for the learner; none has a group in flight."""
        await self._everyone("sleep")

    async def wake(self) -> None:
        """Undoes ``sleep``."""
        await self._everyone("wake")

    async def _everyone(self, method: str) -> None:
        """Raises RunError when no generator is left."""

        async def one(generator: Generator) -> None:
            try:
                await self._ask(generator, method, self.config.weights.deadline_s)
            except CallFailed as error:
                log.error("%s failed: %s", method, error)
                self.mark_failed(generator, CallFailed(generator.name, str(error), gone=True))

        await asyncio.gather(*(one(g) for g in self.serving))

    async def detach(self, generator: Generator, version: Version, deadline_s: float) -> None:
        """Takes a generator out of training: it gets no new groups, finishes those that it has, installs ``version`` and
        stays there until ``attach``, whatever is published meanwhile, or until no other one is left to training.

        ``version`` must be the newest when this is called. Raises RunError when it is not, when no other generator would
        serve, or when the generator is not free within ``deadline_s`` (it then serves on); CallFailed when it fails.
        """
        if self._newest is None or self._newest[0].version != version:
            newest = self._newest and self._newest[0].version
            raise RunError(f"{generator.name} cannot be detached at version {version}: the newest is {newest}")
        if generator not in self.serving or len(self.serving) < 2:
            raise RunError(f"{generator.name} cannot be detached: it does not serve, or no other one does")
        manifest, refs = self._newest
        generator.detached = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._drained(generator)
                while generator.alive and generator.detached and generator.installed != version:
                    await self._install_once(generator, manifest, refs)
        except TimeoutError:
            self.attach(generator)
            raise RunError(f"{generator.name} was not free within {deadline_s:.0f} s") from None
        except BaseException:
            self.attach(generator)
            raise
        if not generator.alive:
            raise CallFailed(generator.name, "failed while it was being detached", gone=True)
        if not generator.detached:
            raise RunError(f"{generator.name} was taken back: no other generator is left to training")

    async def _drained(self, generator: Generator) -> None:
        """Until no group and no install is in flight on a generator, or it has failed."""
        while generator.alive and generator.detached and generator.outstanding:
            self._moved.clear()
            await self._moved.wait()
        running = self._installers.get(generator.name)
        if running is not None:
            await asyncio.wait({running})

    def attach(self, generator: Generator) -> None:
        """Gives a detached generator back to training: it installs the newest version and gets groups again."""
        generator.detached = False
        if generator.alive:
            self._start_installing(generator)
        self._moved.set()
        self.changed()

    # ---------------------------------------------------------------- weights

    def publish(self, manifest: Manifest, refs: Sequence[Any]) -> None:
        """Makes a version the newest; each serving generator installs it as soon as it can, skipping versions in
        between."""
        self._newest = (manifest, refs)
        for generator in self.serving:
            self._start_installing(generator)

    def _start_installing(self, generator: Generator) -> None:
        running = self._installers.get(generator.name)
        if running is None or running.done():
            task = self._installers[generator.name] = asyncio.create_task(self._install(generator))
            task.add_done_callback(self._install_ended)

    async def wait_installed(self, version: Version, deadline_s: float) -> None:
        """Returns when every serving generator, at least one, has ``version``. Raises RunError after the deadline."""

        try:
            async with asyncio.timeout(deadline_s):
                while not self.serving or any(g.installed != version for g in self.serving):
                    self._moved.clear()
                    await self._moved.wait()
                    self.check()
        except TimeoutError:
            late = [g.name for g in self.serving if g.installed != version] or ["no generator"]
            raise RunError(f"{', '.join(late)} did not install version {version} within {deadline_s:.0f} s") from None

    async def _install(self, generator: Generator) -> None:
        """Installs the newest version, and what has become the newest meanwhile."""
        while generator.alive and not generator.detached and self._newest:
            manifest, refs = self._newest
            if generator.installed == manifest.version:
                return
            await self._install_once(generator, manifest, refs)

    async def _install_once(self, generator: Generator, manifest: Manifest, refs: Sequence[Any]) -> None:
        """One try. Takes the generator out of service when it is gone or has failed too often."""
        try:
            generator.last_install = await self._ask(
                generator, "install", self.config.weights.deadline_s, manifest, list(refs)
            )
        except CallFailed as error:
            generator.failures += 1
            self.failed_installs += 1
            log.warning("%s keeps serving %s: %s", generator.name, generator.installed, error)
            if error.gone or generator.failures >= INSTALL_TRIES:
                self.mark_failed(generator, CallFailed(generator.name, str(error), gone=True))
            return
        generator.failures = 0
        generator.installed = manifest.version
        self._moved.set()
        for call in self.on_installed:
            call(generator, manifest.version)
        self.changed()

    def _install_ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._error = self._error or error
            self._moved.set()
            self.changed()

    def check(self) -> None:
        """Raises what an installer raised: nothing else would notice."""
        if self._error:
            raise self._error

    async def close(self) -> None:
        for task in self._installers.values():
            task.cancel()
        for generator in self.alive:
            try:
                await self._ask(generator, "close", CLOSE_S)
            except CallFailed as error:
                log.warning("closing: %s", error)
            ray.kill(generator.actor)
            generator.alive = False
        for generator in self.generators:
            generator.slot.release()
