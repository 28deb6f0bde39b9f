"""While a version is on its way, a generator comes, one leaves, and the learner dies and starts anew: the fleet ends up
serving, and current. Real actors; each bucket is held up for a moment, so that there is a middle."""

from __future__ import annotations

import asyncio
import itertools
from types import SimpleNamespace

import pytest

from actors import placement
from hapo_async.driver import starter
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.generators import Generator
from hapo_async.driver.training import Trainer
from hapo_async.errors import RunError
from hapo_async.types import Version
from tests import samples_learn
from tools import weight_rig
from tools.weight_faults import Fault, FaultyGenerator, FaultyRank
from tools.weight_rig import EXACT, Rig, Watch, eventually

TRANSPORTS = ("ray", "zmq", "gloo")
MIDDLE = 4
"""Buckets, of a dozen."""
PACE_S = 0.02
DEADLINE_S = 6.0


def settings(transport: str, generators: int = 1):
    weights = {"bucket_bytes": 32_000, "deadline_s": DEADLINE_S}
    return weight_rig.settings(transport, weights=weights, generator={"count": generators})


@pytest.fixture(scope="module")
def parts(ray_session, tmp_path_factory):
    """A learner and another one for each time that it dies, a generator that stays, and one that comes and goes for each
    transport."""
    model = samples_learn.random_model(tmp_path_factory.mktemp("model"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(starter, "GeneratorActor", FaultyGenerator)
        count = 1 + len(TRANSPORTS)
        started = starter.Starter(settings("ray", count), model, placement.join(1), 0.3).first()
    ready = [actor.ready.remote() for _, actor, _ in started]

    async def learners():
        config = settings("ray")
        starting = [weight_rig.start_learner(config, model, rank=FaultyRank) for _ in range(1 + len(TRANSPORTS))]
        return await asyncio.gather(*starting)

    found = SimpleNamespace(learners=asyncio.run(learners()), version=Version(1, 0), truth={})
    ray_session.get(ready, timeout=150)
    found.generators = dict(zip(("stays", *TRANSPORTS), started, strict=True))
    yield found
    for learner in found.learners:
        asyncio.run(learner.close())
    for _, actor, slot in started:
        ray_session.kill(actor)
        slot.release()


@pytest.fixture(params=TRANSPORTS)
def scene(request, parts):
    """Runs ``scenario(rig, parts)`` on a fleet of the one that stays."""

    def run(scenario):
        async def go():
            config, learner = settings(request.param), parts.learners[0]
            learner.transport = request.param
            stays = await take(parts, config, "stays")
            rig = Rig(config, learner, Fleet(config, [stays], lambda: None), parts.version, parts.truth)
            try:
                await learner.ranks[0].arm.remote(None)
                await publish(rig)
                await learner.ranks[0].arm.remote(None, PACE_S)
                async with Watch(rig) as watch:
                    await scenario(rig, parts)
                assert watch.wrong == [] and rig.looked > 0
            finally:
                parts.version = max(parts.truth)
                await rig.fleet.weights.close()

        asyncio.run(go())

    return run


async def take(parts, config, name: str) -> Generator:
    its_name, actor, slot = parts.generators[name]
    return Generator(its_name, actor, slot, await actor.become.remote(config.model_dump(mode="json")))


async def guest_of(parts, config) -> Generator:
    """The one that comes and goes with this transport: it has started, and is no member yet."""
    return await take(parts, config, config.weights.transport)


async def publish(rig: Rig) -> None:
    """A step, a version, and everybody serves it."""
    await rig.step()
    await rig.trainer.publish()
    await rig.trainer.everywhere()


async def in_the_middle(rig: Rig) -> asyncio.Task[None]:
    """A publish of which a few buckets have left the learner, and not all."""
    await rig.step()
    publishing = asyncio.create_task(rig.trainer.publish())
    while await rig.learner.ranks[0].passed.remote() >= MIDDLE:  # those of the last version
        await asyncio.sleep(0.001)
    while await rig.learner.ranks[0].passed.remote() < MIDDLE:
        await asyncio.sleep(0.001)
    assert not publishing.done()
    return publishing


async def check_current(rig: Rig, *members: Generator) -> None:
    """These serve, nobody else does, and all have the newest version."""
    await rig.trainer.everywhere()
    await eventually("all serve", lambda: set(rig.fleet.serving) == set(members), DEADLINE_S)
    for generator in members:
        version, error = await rig.error_of(generator)
        assert version == rig.trainer.version and error < EXACT, generator.name
        assert await rig.answers_error(generator) < EXACT


def test_a_generator_that_joins_during_a_publish_serves_the_version_that_was_on_its_way(scene):
    async def scenario(rig, parts):
        stays, guest = rig.fleet.generators[0], await guest_of(parts, rig.config)
        publishing = await in_the_middle(rig)
        await rig.fleet.join(guest)
        assert guest.joining and rig.fleet.serving == [stays]
        await publishing
        await check_current(rig, stays, guest)
        await publish(rig)
        await check_current(rig, stays, guest)

    scene(scenario)


def test_a_generator_that_leaves_during_a_publish_holds_nobody_up(scene):
    async def scenario(rig, parts):
        stays, guest = rig.fleet.generators[0], await guest_of(parts, rig.config)
        await rig.fleet.join(guest)
        await rig.trainer.everywhere()
        await publish(rig)
        await check_current(rig, stays, guest)
        publishing = await in_the_middle(rig)
        guest.leaving = True
        await rig.fleet.dismiss(guest)
        await publishing
        await check_current(rig, stays)
        await publish(rig)
        await check_current(rig, stays)

    scene(scenario)


def test_a_learner_that_dies_during_a_publish_and_starts_anew_is_followed(scene):
    async def scenario(rig, parts):
        stays = rig.fleet.generators[0]
        before = stays.installed
        await rig.learner.ranks[0].arm.remote(Fault("kill", after=MIDDLE), PACE_S)
        await rig.step()
        with pytest.raises(RunError, match=r"learner rank 0.*died"):
            await rig.trainer.publish()
        assert stays.installed == before and (await rig.error_of(stays))[0] == before
        parts.learners.pop(0)
        await start_anew(rig, parts)
        await check_current(rig, stays)
        assert stays.installed[0] == before[0] + 1
        await publish(rig)
        await check_current(rig, stays)

    scene(scenario)


async def start_anew(rig: Rig, parts) -> None:
    """What a restart does: another learner, from older weights, under a higher incarnation."""
    learner = rig.learner = parts.learners[0]
    learner.transport = rig.config.weights.transport
    nothing = itertools.repeat(None, 3)
    version = Version(rig.trainer.version.incarnation + 1, 0)
    rig.trainer = Trainer(rig.config, learner, rig.fleet, *nothing, version)
    await rig.note_truth()
    await rig.trainer.publish()
