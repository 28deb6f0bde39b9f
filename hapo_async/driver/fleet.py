"""The generators as the driver sees them: who runs what, which version each one serves, and how weights reach them."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray

from actors import placement
from actors.calls import CallFailed, answer
from actors.generator import GeneratorActor
from hapo_async.config import Config
from hapo_async.errors import RunError
from hapo_async.types import GroupHeader, GroupKey, GroupRequest, Version
from hapo_async.weights import Manifest

log = logging.getLogger(__name__)

INSTALL_TRIES = 3
CONTROL_S = 30.0


@dataclass
class Generator:
    """One generator. outstanding: estimated tokens still to come, by group in flight on it."""

    name: str
    actor: Any
    slot: placement.Slot
    installed: Version | None = None
    outstanding: dict[GroupKey, int] = field(default_factory=dict)
    alive: bool = True
    failures: int = 0
    last_install: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    idle_since: float | None = field(default_factory=time.monotonic)
    idle_s: float = 0.0

    def assign(self, key: GroupKey, tokens: int) -> None:
        self.outstanding[key] = tokens
        if self.idle_since is not None:
            self.idle_s += time.monotonic() - self.idle_since
            self.idle_since = None

    def unassign(self, key: GroupKey) -> None:
        self.outstanding.pop(key, None)
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
        self._newest: tuple[Manifest, Sequence[Any]] | None = None
        self._installers: dict[str, asyncio.Task[None]] = {}
        self._installed = asyncio.Event()

    @classmethod
    async def start(
        cls, config: Config, model_path: str, cluster: placement.Cluster, cpu_share: float, changed: Callable[[], None]
    ) -> Fleet:
        """Starts all generators and waits until each is ready. Raises RunError naming the one that is not."""
        width = config.generator.tensor_parallel * config.generator.pipeline_parallel
        generators = []
        for index in range(config.generator.count):
            name = f"generator-{index}"
            slot = placement.reserve(cluster, width, cpu_share, name, one_node=True)
            options = slot.options(0, gpus=0 if width > 1 else None, max_concurrency=1000, max_restarts=0)
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

    # ---------------------------------------------------------------- requests

    async def submit(self, generator: Generator, requests: list[GroupRequest]) -> None:
        """Hands over requests in one call, so that they enter the engine together. Raises CallFailed."""
        ref = generator.actor.submit.remote(requests)
        await answer(ref, self.config.weights.deadline_s, generator.name)

    async def collect(self, generator: Generator, key: GroupKey, deadline_s: float) -> tuple[GroupHeader, Any]:
        """(header, reference to the Group). The group's tokens stay where they were made. Raises CallFailed."""
        header_ref, payload_ref = generator.actor.collect.remote(key)
        header = await answer(header_ref, deadline_s, generator.name)
        generator.tokens += sum(header.lengths)
        return header, payload_ref

    def release(self, generator: Generator, key: GroupKey) -> None:
        generator.unassign(key)
        self.changed()

    def owners(self, keys: Sequence[GroupKey]) -> dict[str, list[GroupKey]]:
        """Which generator works on which of these groups."""
        found = {g.name: [k for k in keys if k in g.outstanding] for g in self.alive}
        return {name: mine for name, mine in found.items() if mine}

    async def truncate(self, owners: dict[str, list[GroupKey]]) -> None:
        """Ends the running answers of these groups now; they come back as they are. A silent generator is ignored."""
        await self._each("truncate", owners)

    async def abort(self, owners: dict[str, list[GroupKey]]) -> None:
        """Makes generators forget groups. A silent generator is ignored."""
        await self._each("abort", owners)

    async def _each(self, method: str, owners: dict[str, list[GroupKey]]) -> None:
        async def one(generator: Generator, keys: list[GroupKey]) -> None:
            try:
                await answer(getattr(generator.actor, method).remote(keys), CONTROL_S, generator.name)
            except CallFailed as error:
                log.warning("%s of %d groups failed: %s", method, len(keys), error)

        await asyncio.gather(*(one(g, owners[g.name]) for g in self.alive if g.name in owners))

    def mark_failed(self, generator: Generator, error: CallFailed) -> None:
        """Takes a dead or silent generator out of service. Raises RunError when it was the last one.

        Its actor is ended, so that every call that still waits for it fails at once and its groups are issued again.
        """
        if not error.gone or not generator.alive:
            return
        generator.alive = False
        ray.kill(generator.actor)
        log.error("%s is out of service: %s", generator.name, error)
        self._installed.set()
        self.changed()
        if not self.alive:
            raise RunError(f"no generator is left; the last one failed: {error}")

    # ---------------------------------------------------------------- weights

    def publish(self, manifest: Manifest, refs: Sequence[Any]) -> None:
        """Makes a version the newest; each generator installs it as soon as it can, skipping versions in between."""
        self._newest = (manifest, refs)
        for generator in self.alive:
            running = self._installers.get(generator.name)
            if running is None or running.done():
                self._installers[generator.name] = asyncio.create_task(self._install(generator))

    async def wait_installed(self, version: Version, deadline_s: float) -> None:
        """Returns when every living generator serves ``version``. Raises RunError after the deadline."""

        async def all_current() -> None:
            while any(g.installed != version for g in self.alive):
                self._installed.clear()
                await self._installed.wait()
                self.check()

        try:
            await asyncio.wait_for(all_current(), deadline_s)
        except TimeoutError:
            late = [g.name for g in self.alive if g.installed != version]
            raise RunError(f"{', '.join(late)} did not install version {version} within {deadline_s:.0f} s") from None

    async def _install(self, generator: Generator) -> None:
        while generator.alive and self._newest and generator.installed != self._newest[0].version:
            manifest, refs = self._newest
            try:
                ref = generator.actor.install.remote(manifest, list(refs))
                generator.last_install = await answer(ref, self.config.weights.deadline_s, generator.name)
            except CallFailed as error:
                generator.failures += 1
                log.warning("%s keeps serving %s: %s", generator.name, generator.installed, error)
                if error.gone or generator.failures >= INSTALL_TRIES:
                    self.mark_failed(generator, CallFailed(generator.name, str(error), gone=True))
                continue
            generator.failures = 0
            generator.installed = manifest.version
            self._installed.set()
            self.changed()

    def check(self) -> None:
        """Raises what an installer raised: nothing else would notice."""
        for task in self._installers.values():
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def close(self) -> None:
        for task in self._installers.values():
            task.cancel()
        for generator in self.alive:
            try:
                await answer(generator.actor.close.remote(), 20.0, generator.name)
            except CallFailed as error:
                log.warning("closing: %s", error)
            ray.kill(generator.actor)
            generator.alive = False
        for generator in self.generators:
            generator.slot.release()
