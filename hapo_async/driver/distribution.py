"""Which generator gets which version of the weights, and when.

    announce   a version is about to leave the learner: those that can fetch it meanwhile begin to (a second copy)
    publish    it has left: each generator installs it as soon as it can, and skips what was published meanwhile

Where versions travel in lockstep, a generator that came later or missed one cannot fetch it: it is ``wanting`` until the
same version is published once more as a snapshot, to those alone.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from actors.calls import CallFailed
from actors.transports import Member, Offer
from hapo_async.config import Config
from hapo_async.driver.generators import Generator
from hapo_async.errors import RunError
from hapo_async.types import Version

log = logging.getLogger(__name__)

SNAPSHOT = "ray"
"""The transport of versions that some generators need once more."""
INSTALL_TRIES = 3
RETRY_S = 0.5
GRACE_S = 2.0
"""A generator's own deadline comes first: it then says what is wrong. One that says nothing for so much longer is gone."""

Installed = Callable[[Generator, Version], None]
"""Called after each install of a version on a generator."""


async def _nobody(members: Sequence[Member]) -> None:
    pass


class Ask(Protocol):
    """Calls a method of a generator's actor. Raises CallFailed."""

    async def __call__(self, generator: Generator, method: str, deadline_s: float, *arguments: Any) -> Any: ...


class Distribution:
    """serving: the generators that are to get versions now. fail: takes one out of service. moved: called when a version was
    installed or could not be."""

    def __init__(
        self,
        ask: Ask,
        serving: Callable[[], list[Generator]],
        fail: Callable[[Generator, CallFailed], None],
        moved: Callable[[], None],
        config: Config,
    ) -> None:
        self.on_installed: list[Installed] = []
        self.failed = 0  # fetches and installs, since the journal last looked
        self.admit: Callable[[Sequence[Member]], Awaitable[None]] = _nobody  # lets newcomers fetch what is there
        self._ask, self._serving, self._fail, self._moved = ask, serving, fail, moved
        self._deadline_s = config.weights.deadline_s + GRACE_S
        self._install_s = 2 * config.weights.deadline_s + GRACE_S  # to fetch it, and to take it in
        self._offers: list[Offer] = []  # of the newest version
        self.is_leaving = False  # a version has been announced and is not published yet
        self._invited: set[Member] = set()  # those that the learner knows
        self._overtaken: dict[str, int] = {}  # tries of a generator that a newer version made vain, in a row
        self._missed: set[tuple[str, str, Version]] = set()  # (generator, transport, version) that failed in lockstep
        self._spoilt: list[tuple[Generator, Offer]] = []  # of the newest version, and too often tried in vain
        self._fetching: dict[str, asyncio.Task[None]] = {}  # the newest of each generator
        self._tasks: set[asyncio.Task[None]] = set()  # every fetch that goes on
        self._installers: dict[str, asyncio.Task[None]] = {}
        self._error: BaseException | None = None

    @property
    def newest(self) -> Version | None:
        """The newest version that has been published."""
        return self._offers[0].version if self._offers else None

    @property
    def wanting(self) -> list[Generator]:
        """Serving generators that the newest version cannot reach: they came after it, or it broke off on the way."""
        return [
            g
            for g in self._serving()
            if self._offers and g.installed != self.newest and self.offer_for(g) is None and not self._is_fetching(g)
        ]

    def offer_for(self, generator: Generator) -> Offer | None:
        """What the generator can get the newest version from."""
        name = generator.name
        usable = (o for o in self._offers if o.is_for(name) and (name, o.transport, o.version) not in self._missed)
        if self._is_slow(generator):
            usable = (o for o in usable if o.transport == SNAPSHOT)
        return next((o for o in usable if not any(g is generator and bad is o for g, bad in self._spoilt)), None)

    def announce(self, offer: Offer) -> None:
        """Generators begin to fetch a version that is still leaving the learner. Where it can be fetched later as well, those
        that are busy with an older one are not disturbed."""
        self.is_leaving = True
        for generator in self._serving():
            busy = self._is_installing(generator) or self._is_fetching(generator) or self._is_slow(generator)
            if offer.is_for(generator.name) and not (offer.members is None and busy):
                task = self._fetching[generator.name] = asyncio.create_task(self._fetch(generator, offer))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _fetch(self, generator: Generator, offer: Offer) -> None:
        try:
            await self._ask(generator, "receive", self._deadline_s, offer)
        except CallFailed as error:
            log.warning("%s could not fetch version %s: %s", generator.name, offer.version, error)
            self.failed += 1
            self._miss(generator, offer)
            if error.gone:
                self._give_up(generator, error)

    def _miss(self, generator: Generator, offer: Offer) -> None:
        if offer.members is not None:
            self._missed.add((generator.name, offer.transport, offer.version))

    async def fetched(self) -> None:
        """Until nobody is fetching; each fetch has a deadline."""
        if running := [task for task in self._fetching.values() if not task.done()]:
            await asyncio.wait(running)

    def publish(self, offer: Offer) -> None:
        """Makes a version the newest, or offers the newest to more generators."""
        self.is_leaving = False
        if offer.version == self.newest:
            self._offers.append(offer)
        else:
            self._offers, self._spoilt = [offer], []
            self._missed = {missed for missed in self._missed if missed[2] == offer.version}
        for generator in self._serving():
            self.start(generator)

    async def join(self, generator: Generator) -> None:
        """Takes a generator in that has started since the newest version left: it installs that one first."""
        for offer in self._offers:  # in lockstep, with a dead one of its name
            self._miss(generator, offer)
        self.start(generator)

    def invited(self, members: Sequence[Member]) -> None:
        """The learner has announced a version to these, and to nobody else."""
        self._invited = set(members)

    async def _invite(self, generator: Generator) -> bool:
        """False where the learner is lost: what it publishes when it is back is for everybody who is there."""
        member = Member(generator.name, generator.key)
        if member not in self._invited:  # it was lent, or was not there
            try:
                await self.admit([member])
            except RunError as error:  # whoever trains meets it too, and starts the learner again
                log.warning("%s gets no weights for now: %s", generator.name, error)
                return False
            self._invited.add(member)
        return True

    def start(self, generator: Generator) -> None:
        """The generator installs the newest version, if it has not."""
        if not self._is_installing(generator):
            task = self._installers[generator.name] = asyncio.create_task(self._install(generator))
            task.add_done_callback(self._ended)

    async def idle(self, generator: Generator) -> None:
        """Until no version is on its way into a generator."""
        mine = (self._installers.get(generator.name), self._fetching.get(generator.name))
        if running := [task for task in mine if task is not None and not task.done()]:
            await asyncio.wait(running)

    async def _install(self, generator: Generator) -> None:
        """Installs the newest version, and what has become the newest meanwhile."""
        while generator.takes_weights and generator.installed != self.newest:
            fetching = self._fetching.get(generator.name)
            if fetching is not None and not fetching.done():
                await asyncio.wait({fetching})
                continue
            offer = self.offer_for(generator)
            if offer is None:
                self._moved()  # somebody has to publish a snapshot
                return
            if not await self._invite(generator):
                return
            await self.install_once(generator, offer)
            if generator.installed != offer.version:
                await asyncio.sleep(RETRY_S)

    async def install_once(self, generator: Generator, offer: Offer) -> None:
        """One try. After a few, somebody has to gather the version once more, since its bytes may be damaged where they come
        from; when that does not help either, and when the generator is gone, it is taken out of service."""
        try:
            generator.last_install = await self._ask(generator, "install", self._install_s, offer)
        except CallFailed as error:
            generator.failures += 1
            self.failed += 1
            log.warning("%s keeps serving %s: %s", generator.name, generator.installed, error)
            self._miss(generator, offer)
            if offer.version != self.newest and not error.gone:
                generator.failures -= 1
                self._overtaken[generator.name] = self._overtaken.get(generator.name, 0) + 1
            elif error.gone or generator.failures >= 2 * INSTALL_TRIES:
                self._give_up(generator, CallFailed(generator.name, str(error), gone=True))
            elif generator.failures % INSTALL_TRIES == 0:
                self._spoilt.append((generator, offer))
            return
        generator.failures = 0
        if not self._is_slow(generator):
            self._overtaken.pop(generator.name, None)
        elif offer.transport == SNAPSHOT:
            self._overtaken[generator.name] = INSTALL_TRIES - 1  # one more try by itself
        generator.installed = offer.version
        for call in self.on_installed:
            call(generator, offer.version)
        self._moved()

    def _give_up(self, generator: Generator, error: CallFailed) -> None:
        try:
            self._fail(generator, error)
        except Exception as fatal:
            self._error = self._error or fatal
            self._moved()

    def _is_slow(self, generator: Generator) -> bool:
        """Too slow for versions that the learner keeps for a while; a snapshot stays until it was fetched."""
        return self._overtaken.get(generator.name, 0) >= INSTALL_TRIES

    def _is_installing(self, generator: Generator) -> bool:
        task = self._installers.get(generator.name)
        return task is not None and not task.done()

    def _is_fetching(self, generator: Generator) -> bool:
        task = self._fetching.get(generator.name)
        return task is not None and not task.done()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._error = self._error or error
            self._moved()

    def check(self) -> None:
        """Raises what went wrong beside everything: nothing else would notice."""
        if self._error:
            raise self._error

    async def close(self) -> None:
        running = [task for task in (*self._installers.values(), *self._tasks) if not task.done()]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
