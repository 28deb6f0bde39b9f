"""The same for every transport, engine and staging: what a generator serves is what the learner published, or what it served
before, whatever happens to the buckets on the way.

A real learner rank, real generators, the run's own publish. Each generator keeps its engine from case to case and takes
another transport; versions go on counting.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
from types import SimpleNamespace

import pytest

from hapo_async.driver.fleet import Fleet
from hapo_async.driver.generators import Generator
from hapo_async.types import Version
from tests import samples_learn
from tools import weight_rig
from tools.weight_faults import DAMAGE, Fault, FaultyGenerator, FaultyRank
from tools.weight_rig import EXACT, Rig, Said, Watch, eventually

READY_S = 150
DEADLINE_S = 6.0
LATE = Version(1000, 0)
"""Of a later incarnation than anything that those generators have served."""
BUCKET_BYTES = 32_000
"""A version of 320 kB has a dozen buckets."""
WAYS = [
    pytest.param(engine, transport, staging, id=f"{transport}-{engine}-{staging}")
    for engine, transport, staging in itertools.product(
        ("transformers", "vllm"), ("ray", "zmq", "gloo"), ("host", "none")
    )
]
IN_WORKERS = pytest.param("vllm", "gloo", "device", id="gloo-vllm-device")
"""vLLM's own processes are the members."""


def settings(transport: str, staging: str, engine: str = "transformers"):
    weights = {"bucket_bytes": BUCKET_BYTES, "deadline_s": DEADLINE_S}
    return weight_rig.settings(transport, staging, engine, weights=weights)


@pytest.fixture(scope="module")
def parts(ray_session, generators, tmp_path_factory):
    """A learner and three generators: two that all tests here share, and one more with the transformers engine."""
    model = samples_learn.random_model(tmp_path_factory.mktemp("model"))
    config = settings("ray", "host").model_dump(mode="json")
    second = ray_session.remote(FaultyGenerator).options(num_cpus=0.5, max_concurrency=1000)
    second = second.remote("second", model, config, {"device": "cpu"})
    ready = second.ready.remote()
    learner = asyncio.run(weight_rig.start_learner(settings("ray", "host"), model, rank=FaultyRank))
    actors = {
        "vllm": generators.served("vllm").actor,
        "first": generators.served("transformers").actor,
        "second": second,
    }
    ray_session.get(ready, timeout=READY_S)
    yield SimpleNamespace(learner=learner, actors=actors, version=LATE, model=model)
    asyncio.run(learner.close())
    ray_session.kill(second)


@contextlib.asynccontextmanager
async def rig_of(parts, transport: str, staging: str, names: tuple[str, ...]):
    """A fleet of these generators, none of which has a version yet."""
    config = settings(transport, staging)
    parts.learner.transport = transport
    generators = [await member(parts, config, name) for name in names]
    rig = Rig(config, parts.learner, Fleet(config, generators, lambda: None), parts.version)
    try:
        yield rig
    finally:
        parts.version = rig.trainer.version
        await rig.fleet.weights.close()
        await parts.learner.ranks[0].arm.remote(None)
        for name in names:
            await parts.actors[name].arm.remote(None)


async def member(parts, config, name: str) -> Generator:
    actor = parts.actors[name]
    tree = config.model_dump(mode="json")
    tree["generator"]["engine"] = "vllm" if name == "vllm" else "transformers"
    key = await actor.become.remote(tree)
    return Generator(name, actor, None, key)


def pair(engine: str) -> tuple[str, str]:
    """Two generators, the first with this engine."""
    return ("vllm", "first") if engine == "vllm" else ("first", "second")


async def publish(rig: Rig) -> Version:
    """A step, a version, and everybody serves it."""
    version = await rig.step()
    await rig.trainer.publish()
    await rig.trainer.everywhere()
    return version


async def check_current(rig: Rig) -> None:
    for generator in rig.fleet.generators:
        version, error = await rig.error_of(generator)
        assert version == rig.trainer.version and error < EXACT, generator.name


# ---------------------------------------------------------------- as it should be


@pytest.mark.parametrize(("engine", "transport", "staging"), [*WAYS, IN_WORKERS])
def test_what_is_published_is_what_all_serve_a_late_joiner_too_and_who_leaves_holds_nobody_up(
    parts, engine, transport, staging
):
    async def scenario():
        other, late = reversed(pair(engine))
        async with rig_of(parts, transport, staging, (other,)) as rig:
            await publish(rig)
            newcomer = await member(parts, rig.config, late)
            newcomer.joining = True
            await rig.fleet.join(newcomer)
            await rig.trainer.everywhere()
            await eventually("it serves", lambda: newcomer.serves, DEADLINE_S)
            await check_current(rig)
            version = await publish(rig)  # now as a member
            await check_current(rig)
            assert await rig.answers_error(newcomer) < EXACT
            reports = [(str(version), g.last_install) for g in rig.fleet.generators]

            newcomer.leaving = True
            await publish(rig)
            rig.fleet.generators.remove(newcomer)
            await publish(rig)
            await check_current(rig)
            assert newcomer.installed == version
            stays = (await rig.fleet.stats(newcomer, 5.0))["version"]
            return version, stays, reports, weight_rig.distances(list(rig.truth.values()))

    version, stays, reports, distance = asyncio.run(scenario())
    assert stays == str(version), "who has left gets no more versions"
    assert distance > 20 * EXACT, "the check cannot tell one version from the next"
    for version, report in reports:
        assert report["version"] == version and report["bytes"] > 300_000
        assert 0 < report["pause_s"] < DEADLINE_S and 0 < report["fetch_s"] < DEADLINE_S


# ---------------------------------------------------------------- buckets that do not arrive as they left


@pytest.mark.parametrize(("engine", "transport", "staging"), WAYS)
def test_a_damaged_bucket_is_noticed_never_serves_and_the_next_version_heals(parts, engine, transport, staging):
    async def scenario():
        async with rig_of(parts, transport, staging, pair(engine)) as rig:
            await publish(rig)
            victim, other = rig.fleet.generators
            noticed = {}
            async with Watch(rig) as watch:
                for what in DAMAGE:
                    await victim.actor.arm.remote(Fault(what, after=2))
                    async with Said() as said:
                        version = await publish(rig)
                    assert [f.what for f in await victim.actor.fired.remote()] == [what]
                    noticed[what] = said.lines
                    assert other.installed == victim.installed == version
                    await check_current(rig)
            return noticed, watch, rig.looked

    noticed, watch, looked = asyncio.run(scenario())
    assert watch.wrong == [] and looked > len(DAMAGE)
    for what in ("flip", "drop", "swap"):
        assert any(re.search("digest|bytes arrived|never arrived", line) for line in noticed[what]), what


@pytest.mark.parametrize(("transport", "staging"), [("ray", "host"), ("zmq", "none"), ("gloo", "host")])
def test_buckets_damaged_at_the_learner_never_serve_anywhere(parts, transport, staging):
    async def scenario():
        async with rig_of(parts, transport, staging, ("first", "second")) as rig:
            await publish(rig)
            rank = parts.learner.ranks[0]
            async with Watch(rig) as watch:
                for what in DAMAGE:
                    await rank.arm.remote(Fault(what, after=3))
                    await publish(rig)
                    assert [f.what for f in await rank.fired.remote()] == [what]
                    await check_current(rig)
            return watch

    watch = asyncio.run(scenario())
    assert watch.wrong == []
    assert all(len(versions) > 3 for versions in watch.seen.values())


@pytest.mark.parametrize("transport", ["ray", "zmq", "gloo"])
def test_weights_that_are_torn_serve_nothing_until_a_full_version_came(parts, transport):
    """In place: the generator is asked all the time what it serves."""

    async def scenario():
        async with rig_of(parts, transport, "none", ("first", "second")) as rig:
            await publish(rig)
            victim = rig.fleet.generators[0]
            await victim.actor.arm.remote(Fault("flip", after=4), 0.02)
            async with Watch(rig) as watch:
                publishing = asyncio.create_task(publish(rig))
                torn = 0
                while not publishing.done():
                    torn += (await rig.fleet.stats(victim, 5.0))["torn"] > 0
                    await asyncio.sleep(0.005)
                await publishing
                await check_current(rig)
            return torn, (await rig.fleet.stats(victim, 5.0))["torn"], watch

    torn, in_the_end, watch = asyncio.run(scenario())
    assert torn > 0 and in_the_end == 0
    assert watch.wrong == [] and len(watch.seen["first"]) > 0
