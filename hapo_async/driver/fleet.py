"""The generators as the driver sees them: who runs what, which version each one serves, and how weights reach them.

A generator is *alive* until it fails, and *serving* unless it is *joining* (it has no version yet), *detached* (lent to an
evaluation, at one version, without groups of the training) or *leaving*. ``upkeep`` starts others, and replaces dead ones.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import ray

from actors import placement
from actors.calls import CallFailed, Calls, Pending
from actors.transports import Member
from hapo_async.config import Config
from hapo_async.driver.distribution import Distribution
from hapo_async.driver.generators import Generator, Replacements
from hapo_async.driver.starter import ACTOR_OPTIONS, Starter
from hapo_async.driver.turns import everyone
from hapo_async.errors import RunError
from hapo_async.types import Group, GroupHeader, GroupKey, GroupRequest, Version

__all__ = ["ACTOR_OPTIONS", "Fleet", "Generator"]

log = logging.getLogger(__name__)

CONTROL_S = 30.0
PROBE_S = 5.0  # how long a generator has to say that it is there, once something went wrong
CLOSE_S = 20.0

START_S = 300.0
HEARTBEAT = "stats"
NAMES_KEPT = 32  # of those that have left


class Fleet:
    """All generators. ``changed`` is called whenever capacity may have changed."""

    def __init__(self, config: Config, generators: list[Generator], changed: Callable[[], None]) -> None:
        self.config = config
        self.generators = generators
        self.changed = changed
        self.upkeep: Replacements | None = None  # nobody is replaced
        self.starter: Starter | None = None
        self.retired: deque[str] = deque(maxlen=NAMES_KEPT)
        self._calls = Calls()
        self.weights = Distribution(self.ask, lambda: self.taking, self.mark_failed, self._weights_moved, config)
        self.weights.on_installed.append(self._installed)
        self._moved = asyncio.Event()  # a group left a generator, a version was installed, a generator came or failed
        self._error: RunError | None = None

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
        starter = Starter(config, model_path, cluster, cpu_share)
        generators = [Generator(*started) for started in starter.first(slots)]
        refs = {g.name: g.actor.ready.remote() for g in generators}
        told = await asyncio.to_thread(placement.wait_ready, refs)
        for generator in generators:
            generator.key = told[generator.name]["member_key"]
        fleet = cls(config, generators, changed)
        fleet.starter = starter
        return fleet

    @property
    def alive(self) -> list[Generator]:
        return [g for g in self.generators if g.alive]

    @property
    def serving(self) -> list[Generator]:
        """Those that training's groups are issued to."""
        return [g for g in self.generators if g.serves]

    @property
    def taking(self) -> list[Generator]:
        """Those that are to have the newest version: the serving ones, and those that join."""
        return [g for g in self.generators if g.takes_weights]

    async def someone(self) -> list[Generator]:
        """Those that serve; where nobody does, once a replacement does. Raises RunError when none will."""
        while not self.serving:
            self._keep_someone("none serves")
            self.check()
            self._moved.clear()
            await self._moved.wait()
        return self.serving

    def calls(self) -> list[Pending]:
        """Remote calls that have not been answered, oldest first."""
        return self._calls.pending()

    # ---------------------------------------------------------------- requests

    async def submit(self, generator: Generator, requests: list[GroupRequest]) -> None:
        """Hands over requests in one call, so that they enter the engine together. Raises CallFailed."""
        await self.ask(generator, "submit", self.config.weights.deadline_s, requests)

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
                found.update(await self.ask(generator, method, CONTROL_S, keys) or {})
            except CallFailed as error:
                log.warning("%s of %d groups failed: %s", method, len(keys), error)

        await asyncio.gather(*(one(g, owners[g.name]) for g in self.alive if g.name in owners))
        return found

    async def hand_over(self, generator: Generator, keys: Sequence[GroupKey]) -> list[tuple[GroupHeader, Group]]:
        """Ends groups now: what each is so far, complete or not. Those that the generator does not hold are left out. Raises
        CallFailed."""
        found: list[tuple[GroupHeader, Group]] = await self.ask(generator, "hand_over", CONTROL_S, list(keys))
        return found

    async def score(
        self, generator: Generator, sequences: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> tuple[Version, list[np.ndarray]]:
        """(version, log-probs float32 [T] of each sequence at temperature 1), all under that one version. sequences:
        (prompt tokens, tokens [T]) each. Raises CallFailed."""
        scored: tuple[Version, list[np.ndarray]] = await self.ask(
            generator, "score", self.config.generator.deadline_s, list(sequences)
        )
        return scored

    async def stats(self, generator: Generator, deadline_s: float) -> dict[str, Any]:
        """What the generator says of itself: ``GeneratorActor.stats``. Raises CallFailed."""
        stats: dict[str, Any] = await self.ask(generator, "stats", deadline_s)
        return stats

    async def ask(self, generator: Generator, method: str, deadline_s: float, *arguments: Any) -> Any:
        """Calls a method of its actor. Raises CallFailed."""
        ref = getattr(generator.actor, method).remote(*arguments)
        return await self._calls.answer(ref, deadline_s, generator.name, method)

    def mark_failed(self, generator: Generator, error: CallFailed) -> None:
        """Takes a dead or silent generator out of service. Raises RunError when it was the last one and is not replaced.

        Its actor is ended, so that every call that still waits for it fails at once and its groups are issued again.
        """
        if not error.gone or not generator.alive:
            return
        generator.alive = False
        ray.kill(generator.actor)
        log.error("%s is out of service: %s", generator.name, error)
        if self.upkeep is not None and not generator.leaving:
            self.upkeep.replace(generator, error)
        self._moved.set()
        self.changed()
        self._keep_someone(f"the last one failed: {error}")

    def lose(self, generator: Generator, error: CallFailed) -> None:
        """``mark_failed`` by somebody who cannot raise: the run ends at its next look when that was the last one."""
        try:
            self.mark_failed(generator, error)
        except RunError as fatal:
            self._error = self._error or fatal
            self._weights_moved()

    def _keep_someone(self, why: str) -> None:
        """Training comes first: where nobody serves, one that is lent or about to leave is taken back. Raises RunError when
        there is none and none is on its way."""
        if self.serving:
            return
        if back := next((g for g in self.alive if not g.joining), None):
            back.leaving = False
            self.attach(back)
        elif not any(g.joining for g in self.alive) and not (self.upkeep and self.upkeep.expected):
            raise RunError(f"no generator is left; {why}")

    # ---------------------------------------------------------------- coming and going

    async def ready(self, name: str, actor: Any) -> str:
        """The member key of an actor that has been started. Raises CallFailed when it has not come up within ``START_S``."""
        told = await self._calls.answer(actor.ready.remote(), START_S, name, "ready")
        return str(told["member_key"])

    async def join(self, generator: Generator) -> None:
        """Takes a generator in, in the place of a dead one of its name if there is one. It serves after its first install."""
        if self.weights.newest is not None:  # else it is like those that a run starts with
            generator.joining = True
            await self.weights.join(generator)
        names = [g.name for g in self.generators]
        if generator.name in names:
            self.generators[names.index(generator.name)] = generator
        else:
            self.generators.append(generator)
        self.look_again("")

    def _installed(self, generator: Generator, version: Version) -> None:
        generator.joining = False

    def is_busy(self, generator: Generator) -> bool:
        """Whether a group or a call is in flight on it."""
        pending = any(c.actor == generator.name and c.method != HEARTBEAT for c in self._calls.pending())
        return bool(generator.outstanding) or pending

    async def dismiss(self, generator: Generator) -> None:
        """Ends a generator for good and gives its place back. What is in flight on it fails and is issued again."""
        was_alive, generator.alive = generator.alive, False
        self.generators = [g for g in self.generators if g is not generator]
        self.retired.append(generator.name)
        if was_alive:
            await self._end(generator)
        generator.slot.release()
        self.look_again(f"{generator.name} has left")

    async def _end(self, generator: Generator) -> None:
        try:
            await self.ask(generator, "close", CLOSE_S)
        except CallFailed as error:
            log.warning("closing: %s", error)
        ray.kill(generator.actor)

    def look_again(self, why: str) -> None:
        """Somebody came, left, or does not come: the run ends when nobody is left, and those who wait look again."""
        try:
            self._keep_someone(why)
        except RunError as error:
            self._error = self._error or error
        self._weights_moved()

    # ---------------------------------------------------------------- taking turns

    async def sleep(self) -> None:
        """Every serving generator frees what it can for the learner; none has a group in flight."""
        await everyone(self, "sleep")

    async def wake(self) -> None:
        """Undoes ``sleep``."""
        await everyone(self, "wake")

    # ---------------------------------------------------------------- lending

    async def detach(self, generator: Generator, version: Version, deadline_s: float) -> None:
        """Takes a generator out of training: it gets no new groups, finishes those that it has, installs ``version`` and
        stays there until ``attach``, whatever is published meanwhile, or until no other one is left to training.

        ``version`` must be the newest when this is called. Raises RunError when it is not, when no other generator would
        serve, or when the generator is not free within ``deadline_s`` (it then serves on); CallFailed when it fails.
        """
        if (newest := self.weights.newest) != version:
            raise RunError(f"{generator.name} cannot be detached at version {version}: the newest is {newest}")
        if generator not in self.serving or len(self.serving) < 2:
            raise RunError(f"{generator.name} cannot be detached: it does not serve, or no other one does")
        offer = self.weights.offer_for(generator)
        if self.weights.is_leaving:  # in place, it may be in the model already
            raise RunError(f"{generator.name} cannot be detached: a version after {version} is on its way to it")
        if offer is None:
            raise RunError(f"{generator.name} cannot be detached: version {version} has not reached it")
        generator.detached = True
        try:
            async with asyncio.timeout(deadline_s):
                await self._drained(generator)
                while generator.alive and generator.detached and generator.installed != version:
                    await self.weights.install_once(generator, offer)
                    if generator.installed != version and self.weights.newest != version:
                        raise RunError(f"version {version} was overtaken before it reached {generator.name}")
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
        await self.weights.idle(generator)

    def attach(self, generator: Generator) -> None:
        """Gives a detached generator back to training: it installs the newest version and gets groups again."""
        generator.detached = False
        if generator.alive:
            self.weights.start(generator)
        self._moved.set()
        self.changed()

    # ---------------------------------------------------------------- weights

    @property
    def members(self) -> list[Member]:
        """Those that the next version is sent to."""
        return [Member(g.name, g.key) for g in self.taking]

    async def wait_installed(self, version: Version, deadline_s: float) -> None:
        """Returns when every serving generator, at least one, has ``version``. Those that have not within ``deadline_s`` are out
        of service. Raises RunError when nobody is left."""
        limit: float | None = None
        while not self.serving or any(g.installed != version for g in self.serving):
            if not self.serving:
                await self.someone()
                limit = None
                continue
            limit = limit or time.monotonic() + deadline_s
            self._moved.clear()
            try:
                async with asyncio.timeout(max(0.0, limit - time.monotonic())):
                    await self._moved.wait()
            except TimeoutError:
                limit = None
                why = f"did not install version {version} within {deadline_s:.0f} s"
                for generator in [g for g in self.serving if g.installed != version]:
                    self.mark_failed(generator, CallFailed(generator.name, why, gone=True))
            self.check()

    def _weights_moved(self) -> None:
        self._moved.set()
        self.changed()

    async def probe(self) -> None:
        """Asks every generator that takes weights whether it is there, and takes those out of service that do not answer."""

        async def one(generator: Generator) -> None:
            try:
                await self.stats(generator, PROBE_S)
            except CallFailed as error:
                self.mark_failed(generator, error)

        await asyncio.gather(*(one(g) for g in self.taking))

    def check(self) -> None:
        """Raises what went wrong beside everything: nothing else would notice."""
        if self._error:
            raise self._error
        self.weights.check()

    async def close(self) -> None:
        await self.weights.close()
        ending = self.alive
        await asyncio.gather(*(self._end(generator) for generator in ending))
        for generator in ending:
            generator.alive = False
        for generator in self.generators:
            generator.slot.release()
