"""Who gets which version: versions that travel in lockstep, those who miss them, newcomers, and those who are busy."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.transports import Member, Offer, Published
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.errors import RunError
from hapo_async.types import Version
from tests.driver.stand_ins import Loop, StandInGenerator, StandInLearner, raised

V0, V1, V2 = (Version(1, step) for step in range(3))


class Lockstep(StandInLearner):
    """Sends to the members of a version all at once, in ``walk_s``. ``broken``: steps whose transfer fails."""

    def __init__(self, broken: tuple[int, ...] = (), walk_s: float = 0.05) -> None:
        super().__init__()
        self.broken, self.walk_s = broken, walk_s
        self.announced: list[tuple[Version, list[str]]] = []
        self.published: list[tuple[Version, str]] = []

    async def announce(self, version: Version, members: list[Member]) -> Offer | None:
        self.announced.append((version, [m.name for m in members]))
        return Offer("gloo", version, members=tuple(m.name for m in members))

    async def publish(self, version: Version, transport: str = "") -> Published:
        self.published.append((version, transport))
        await asyncio.sleep(self.walk_s)
        if transport == "ray":
            return Published(Offer("ray", version))
        if version.step in self.broken:
            return Published(None, "a member did not take part")
        return Published(Offer("gloo", version, members=tuple(self.announced[-1][1])))


class LockstepGenerator(StandInGenerator):
    """Refuses what it has not received, unless it is a snapshot. ``misses``: steps that it does not receive."""

    def __init__(self, name: str, misses: tuple[int, ...] = ()) -> None:
        super().__init__(name)
        self.misses = misses
        self.snapshots: list[Version] = []

    async def _receive(self, offer: Offer) -> None:
        if offer.version.step in self.misses:
            raise raised("a bucket was damaged")
        await super()._receive(offer)

    async def _install(self, offer: Offer) -> dict[str, Any]:
        if offer.transport == "ray":
            self.snapshots.append(offer.version)
        elif offer.version not in self.received:
            raise raised(f"{offer.version} was never received")
        return await super()._install(offer)


def loop_of(generators: list[Any], learner: Any, **tree: Any) -> Loop:
    settings = {"train": {"steps": 6, "batch_prompts": 2}, "max_staleness": 1}
    return Loop(generators, prompts=60, trains=learner, **settings | tree)


def test_members_receive_while_the_learner_gathers_and_install_after_it(clock):
    learner = Lockstep()

    async def go():
        generators = [LockstepGenerator("g0"), LockstepGenerator("g1")]
        loop = loop_of(generators, learner)
        await loop.run()
        return generators

    for generator in clock.run(go()):
        assert generator.received == [Version(1, step) for step in range(7)] and generator.snapshots == []
    assert {transport for _, transport in learner.published} == {""}
    assert all(names == ["g0", "g1"] for _, names in learner.announced)


def test_a_version_that_broke_off_reaches_everybody_as_a_snapshot(clock):
    learner = Lockstep(broken=(2, 4))

    async def go():
        generators = [LockstepGenerator("g0"), LockstepGenerator("g1")]
        loop = loop_of(generators, learner)
        await loop.run()
        return loop, generators

    loop, generators = clock.run(go())
    assert loop.trainer.version == Version(1, 6) and loop.trainer.failed_transfers == 2
    assert [v for v, transport in learner.published if transport == "ray"] == [V2, Version(1, 4)]
    assert any(V2 in g.snapshots for g in generators) and all(g.alive for g in loop.fleet.generators)


def test_who_died_in_a_transfer_is_found_and_the_next_version_goes_to_the_others(clock):
    learner = Lockstep(broken=(1,))

    async def go():
        generators = [LockstepGenerator("g0"), LockstepGenerator("g1")]
        loop = loop_of(generators, learner)

        async def killed(version: Version) -> None:
            if version == V0:
                generators[1].die()

        loop.trainer.at_publish = killed
        await loop.run()
        return loop

    loop = clock.run(go())
    assert loop.trainer.version == Version(1, 6)
    assert [names for version, names in learner.announced if version >= V2] == [["g0"]] * 5


def test_one_that_missed_a_version_gets_the_same_one_at_the_next_step_boundary(clock):
    learner = Lockstep()

    async def go():
        generators = [LockstepGenerator("g0", misses=(1,)), LockstepGenerator("g1")]
        loop = loop_of(generators, learner, max_staleness=0)
        await loop.run()
        return generators

    g0, g1 = clock.run(go())
    assert g0.snapshots == [V1] and g1.snapshots == []
    assert g0.installs == g1.installs == [Version(1, step) for step in range(7)]


def test_the_only_generator_left_that_came_late_does_not_wait_for_a_step_that_needs_it(clock):
    learner = Lockstep()

    async def go():
        first, second = LockstepGenerator("g0"), LockstepGenerator("g1")
        loop = loop_of([first], learner, max_staleness=0)
        running = asyncio.create_task(loop.run())
        while loop.trainer.version < V2:
            await asyncio.sleep(0.01)
        newcomer = Generator("g1", second, None)  # type: ignore[arg-type]
        loop.fleet.generators.append(newcomer)
        first.die()
        await loop.fleet.weights.join(newcomer)
        await running
        return second

    second = clock.run(go())
    assert len(second.snapshots) == 1 and second.version == Version(1, 6)


def test_a_barrier_waits_for_a_snapshot_too(clock):
    learner = Lockstep()

    async def go():
        generators = [LockstepGenerator("g0"), LockstepGenerator("g1", misses=(0,))]
        loop = loop_of(generators, learner)
        await loop.trainer.publish()
        await loop.trainer.everywhere()
        await loop.sampler.close()
        return generators

    assert [g.version for g in clock.run(go())] == [V0, V0]


def fleet_of(*actors: StandInGenerator) -> Fleet:
    loop = Loop(list(actors), prompts=2)
    return loop.fleet


def test_one_that_is_busy_with_an_older_version_is_left_alone_where_it_can_fetch_later(clock):
    async def go():
        slow, quick = StandInGenerator("slow"), StandInGenerator("quick")
        slow.install_s = 1.0
        fleet = fleet_of(slow, quick)
        fleet.weights.publish(Offer("zmq", V0))
        await asyncio.sleep(0.1)
        fleet.weights.announce(Offer("zmq", V1))
        await asyncio.sleep(0.1)
        received = slow.received, quick.received
        fleet.weights.publish(Offer("zmq", V1))
        await fleet.wait_installed(V1, 5.0)
        return received, slow.installs, quick.installs

    assert clock.run(go()) == (([], [V1]), [V0, V1], [V0, V1])


def test_one_that_was_lent_while_a_version_was_announced_is_let_in_before_it_fetches(clock):
    admitted = []

    class Learner(StandInLearner):
        async def announce(self, version: Version, members: list[Member]) -> Offer | None:
            return Offer("zmq", version)

        async def admit(self, members: list[Member]) -> None:
            admitted.append([m.name for m in members])

        async def publish(self, version: Version, transport: str = "") -> Published:
            return Published(Offer("zmq", version))

    async def go():
        loop = loop_of([StandInGenerator("g0"), StandInGenerator("g1")], Learner())
        await loop.trainer.publish()
        await loop.trainer.everywhere()
        lent = loop.fleet.generators[1]
        await loop.fleet.detach(lent, V0, 5.0)
        loop.trainer.version = V1
        await loop.trainer.publish()
        await loop.trainer.everywhere()
        before = list(admitted)
        loop.fleet.attach(lent)
        await loop.trainer.everywhere()
        await loop.sampler.close()
        return before, lent.installed

    assert clock.run(go()) == ([], V1)
    assert admitted == [["g1"]]


def test_an_install_waits_for_what_is_still_being_received(clock):
    async def go():
        actor = LockstepGenerator("g0")
        actor.receive_s = 1.0
        fleet = fleet_of(actor)
        offer = Offer("gloo", V0, members=("g0",))
        fleet.weights.announce(offer)
        fleet.weights.publish(offer)
        await fleet.wait_installed(V0, 5.0)
        return actor.installs, fleet.weights.failed

    assert clock.run(go()) == ([V0], 0)


class Shelf(StandInLearner):
    """Keeps the newest two versions for those whom it knows, and gives them out in ``walk_s``."""

    def __init__(self, step_s: float = 1.0, walk_s: float = 0.05) -> None:
        super().__init__(step_s=step_s)
        self.walk_s = walk_s
        self.kept: list[Version] = []
        self.known: set[str] = set()

    async def announce(self, version: Version, members: list[Member]) -> Offer | None:
        self.known = {m.key for m in members}
        self.kept = [*self.kept, version][-2:]
        return Offer("zmq", version)

    async def admit(self, members: list[Member]) -> None:
        self.known |= {m.key for m in members}

    async def publish(self, version: Version, transport: str = "") -> Published:
        await asyncio.sleep(self.walk_s)
        return Published(Offer(transport or "zmq", version))


class Fetching(StandInGenerator):
    """Takes ``fetch_s`` to fetch a version, which may be gone by then."""

    def __init__(self, name: str, learner: Shelf, fetch_s: float, key: str = "") -> None:
        super().__init__(name)
        self.learner, self.fetch_s, self.key = learner, fetch_s, key or name
        self.transports: list[str] = []

    async def _receive(self, offer: Offer) -> None:
        await self._fetch(offer)

    async def _fetch(self, offer: Offer) -> None:
        if offer.version in self.received:
            return
        if offer.transport == "zmq" and self.key not in self.learner.known:
            raise raised("it does not know me")
        await asyncio.sleep(self.fetch_s)
        if offer.transport == "zmq" and offer.version not in self.learner.kept:
            raise raised(f"{offer.version} is no longer kept")
        self.received.append(offer.version)

    async def _install(self, offer: Offer) -> dict[str, Any]:
        await self._fetch(offer)
        self.transports.append(offer.transport)
        return await super()._install(offer)


def shelf_loop(learner: Shelf, generators: list[Fetching], **tree: Any) -> Loop:
    loop = Loop(list(generators), prompts=200, trains=learner, **tree)
    for generator, actor in zip(loop.fleet.generators, generators, strict=True):
        generator.key = actor.key
    return loop


def test_one_that_fetches_slower_than_versions_are_kept_gets_snapshots_and_serves_on(clock):
    async def go():
        learner = Shelf()
        quick, slow = Fetching("quick", learner, 0.1), Fetching("slow", learner, 4.0)
        loop = shelf_loop(learner, [quick, slow], train={"steps": 40, "batch_prompts": 2}, max_staleness=2)
        await loop.run(500.0)
        return loop, slow

    loop, slow = clock.run(go())
    assert loop.trainer.version == Version(1, 40) and len(loop.fleet.serving) == 2
    assert "ray" in slow.transports and len(slow.installs) > 3


def test_a_barrier_goes_on_without_one_that_cannot_fetch(clock):
    class Cut(StandInGenerator):
        async def _install(self, offer: Offer) -> dict[str, Any]:
            if offer.version >= V2:
                await asyncio.sleep(20)
                raise raised("it was not there in time")
            return await super()._install(offer)

    async def go():
        generators = [StandInGenerator("g0"), Cut("cut")]
        settings = {"train": {"steps": 4, "batch_prompts": 2}, "max_staleness": 1, "weights": {"deadline_s": 20.0}}
        loop = Loop(generators, prompts=60, **settings)
        await loop.run()
        await loop.trainer.everywhere()
        return loop

    loop = clock.run(go())
    assert loop.trainer.version == Version(1, 4) and [g.name for g in loop.fleet.serving] == ["g0"]


def test_a_lent_one_that_was_overtaken_comes_back_unharmed(clock):
    async def go():
        learner = Shelf()
        quick, slow = Fetching("quick", learner, 0.1), Fetching("slow", learner, 0.1)
        loop = shelf_loop(learner, [quick, slow])
        await loop.trainer.publish()
        await loop.trainer.everywhere()
        lent = loop.fleet.generators[1]
        slow.fetch_s = 5.0
        loop.trainer.version = V1
        await loop.trainer.publish()
        detaching = asyncio.create_task(loop.fleet.detach(lent, V1, 60.0))
        for step in (2, 3):
            await asyncio.sleep(0.1)
            loop.trainer.version = Version(1, step)
            await loop.trainer.publish()
        with pytest.raises(RunError, match=r"version 1\.1 was overtaken before it reached slow"):
            await detaching
        slow.fetch_s = 0.1
        await loop.trainer.everywhere()
        await loop.sampler.close()
        return lent

    lent = clock.run(go())
    assert lent.serves and lent.installed == Version(1, 3) and lent.failures == 0


def test_one_that_came_back_under_its_name_while_a_version_was_gathered_is_let_in(clock):
    async def go():
        learner = Shelf(walk_s=1.0)
        old, new = Fetching("g1", learner, 0.1, key="old"), Fetching("g1", learner, 0.1, key="new")
        loop = shelf_loop(learner, [Fetching("g0", learner, 0.1), old])
        publishing = asyncio.create_task(loop.trainer.publish())
        await asyncio.sleep(0.5)
        member = loop.fleet.generators[1]
        member.actor, member.key = new, "new"
        await publishing
        await loop.trainer.everywhere()
        await loop.sampler.close()
        return new.version, loop.fleet.weights.failed

    assert clock.run(go()) == (V0, 0)


def test_nobody_who_left_while_the_learner_got_ready_is_a_member_of_a_lockstep_version(clock):
    class Slowly(Lockstep):
        async def announce(self, version: Version, members: list[Member]) -> Offer | None:
            offer = await super().announce(version, members)
            if version == V1 and len(members) == 2:
                loop.fleet.generators[1].detached = True
            return offer

    async def go():
        nonlocal loop
        loop = loop_of([LockstepGenerator("g0"), LockstepGenerator("g1")], learner)
        await loop.trainer.publish()
        await loop.trainer.everywhere()
        loop.trainer.version = V1
        await loop.trainer.publish()
        await loop.sampler.close()

    learner = Slowly()
    loop: Loop
    clock.run(go())
    assert [names for version, names in learner.announced if version == V1] == [["g0", "g1"], ["g0"]]
