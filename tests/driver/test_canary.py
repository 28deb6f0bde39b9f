"""The canary in the loop: real mismatch is named, staleness is not, and no generator can hold training up or break it."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from actors.transports import Offer
from hapo_async import canary as canaries
from hapo_async import config, metrics
from hapo_async.driver import fleet as fleets
from hapo_async.driver.canary import Canary
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.engine import TransformersEngine
from hapo_async.sampler import Sampler
from hapo_async.slot_cache import ATTENTION
from hapo_async.types import Prompt, Teacher, Version
from hapo_async.weights import Manifest
from tests import learners
from tests.driver.stand_ins import Loop, StandInGenerator, StandInLearner, raised

LIMIT = 0.01


@pytest.fixture(autouse=True)
def stand_ins_can_be_killed(monkeypatch):
    monkeypatch.setattr(fleets.ray, "kill", lambda actor: actor.die())


def prompts(count: int = 3) -> list[Prompt]:
    rng = np.random.default_rng(0)

    def tokens(n: int) -> np.ndarray:
        return rng.integers(3, 40, n).astype(np.int32)

    return [
        Prompt(f"p{i}", ({"role": "user", "content": "x"},), tokens(5 + i), "1", teachers=(Teacher("", tokens(30)),))
        for i in range(count)
    ]


def scene(actors: list[StandInGenerator], learner, every: int = 1, deadline_s: float = 5.0) -> SimpleNamespace:
    """A fleet of these actors and a canary; ``said`` is what people were told."""
    tree = {"run": {"alarms": {"canary_every": every}}, "weights": {"deadline_s": deadline_s}}
    c = config.parse({"algorithm": "grpo", **tree})
    fleet = Fleet(c, [Generator(a.name, a, None) for a in actors], lambda: None)  # type: ignore[arg-type]
    said: list[str] = []
    canary = Canary(c, prompts(), learner, fleet, said.append)
    return SimpleNamespace(fleet=fleet, canary=canary, said=said)


async def settled(canary: Canary, count: int) -> dict[str, float]:
    """Metrics once ``count`` generators were compared or left out; all names are declared."""
    found: dict[str, float] = {}
    end = time.monotonic() + 10
    while found.get("canary/compared", 0) + found.get("canary/skipped", 0) < count:
        assert time.monotonic() < end, found
        new = canary.take()
        for name, value in new.items():
            join = max if name in ("canary/kl", "canary/max_diff") else float.__add__
            found[name] = join(found.get(name, 0.0), value)
        await asyncio.sleep(0.002)
    for name in found:
        metrics.lookup(name)
    return found


# ---------------------------------------------------------------- real models


class RealGenerator(StandInGenerator):
    """The transformers engine behind the stand-in's surface. A publish carries the weights as its references; ``damage``
    changes them on the way, as a lost or garbled tensor would."""

    def __init__(self, name: str, model, damage: float = 0.0) -> None:
        super().__init__(name)
        self.engine = TransformersEngine(Sampler(model, [1]))
        self.damage = damage

    async def _install(self, offer):
        await asyncio.sleep(self.install_s)
        noise = torch.Generator().manual_seed(0)
        refs = offer.detail["refs"]
        tensors = [(n, w + self.damage * w.std() * torch.randn(w.shape, generator=noise)) for n, w in refs]
        await self.engine.install(Manifest(offer.version, ()), tensors)
        return {"version": str(offer.version)}

    async def _score(self, sequences):
        return await self.engine.score(sequences)


def weights_of(learner) -> list[tuple[str, torch.Tensor]]:
    return [(n, w.detach().clone()) for n, w in learner.backend.policy.model.named_parameters()]


def train_on(learner) -> None:
    """Weights as after many steps."""
    torch.manual_seed(5)
    with torch.no_grad():
        for weight in learner.backend.policy.model.parameters():
            weight.add_(0.5 * weight.std() * torch.randn_like(weight))


class Scorer:
    """A LearnerGroup's ``score`` over one learner in this process."""

    def __init__(self, learner) -> None:
        self.learner = learner

    async def score(self, sequences):
        await asyncio.sleep(0)
        return self.learner.score(sequences)


@pytest.fixture(scope="module")
def sharp_model(tmp_path_factory, chain_model) -> str:
    """A model of which each token's log-prob says something: random, with large weights."""
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("sharp")
    shutil.copytree(chain_model, folder, dirs_exist_ok=True)
    settings = AutoConfig.from_pretrained(folder)
    settings.initializer_range = 0.1
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def real(sharp_model: str, damages: list[float], dtype: torch.dtype = torch.float32):
    """(learner, one generator per damage), all with the same weights so far."""
    from transformers import AutoModelForCausalLM

    learner = learners.make(sharp_model, "grpo", dtype=torch.float32)
    load = AutoModelForCausalLM.from_pretrained
    models = [load(sharp_model, dtype=dtype, attn_implementation=ATTENTION) for _ in damages]
    return learner, [RealGenerator(f"g{i}", m, d) for i, (m, d) in enumerate(zip(models, damages, strict=True))]


@pytest.mark.parametrize("damage", [0.0, 0.1])
def test_wrong_weights_under_the_right_version_are_named_and_right_ones_are_not(sharp_model, damage):
    async def go():
        learner, generators = real(sharp_model, [0.0, damage])
        s = scene(generators, Scorer(learner))
        s.fleet.weights.publish(Offer("ray", Version(1, 0), detail={"refs": weights_of(learner)}))
        await s.canary.at_publish(Version(1, 0))
        found = await settled(s.canary, 2)
        for generator in generators:
            await generator.engine.close()
        return found, s.said

    found, said = asyncio.run(go())
    assert found["canary/compared"] == 2 and found.get("canary/skipped") == 0 and found["time/canary_s"] > 0
    if damage:
        (line,) = said
        assert line.startswith("g1 and the learner disagree at equal weights (version 1.0)")
        assert "limit 0.01" in line and "numerics, not staleness" in line
        assert found["canary/kl"] > LIMIT and found["canary/max_diff"] > 0.1
    else:
        assert said == [] and found["canary/kl"] < 1e-9 and found["canary/max_diff"] < 1e-4


def test_a_policy_that_has_moved_on_raises_no_alarm(sharp_model):
    async def go():
        learner, (generator,) = real(sharp_model, [0.0])
        generator.install_s = 0.05
        s = scene([generator], Scorer(learner))
        s.fleet.weights.publish(Offer("ray", Version(1, 0), detail={"refs": weights_of(learner)}))
        await s.canary.at_publish(Version(1, 0))
        train_on(learner)  # before the generator has even installed what it will be compared at
        found = await settled(s.canary, 1)
        _, now = await generator.engine.score(s.canary._pairs)
        stale = canaries.compare(learner.score([canaries.sequence(p) for p in s.canary._pairs]), now)
        await generator.engine.close()
        return found, s.said, stale

    found, said, stale = asyncio.run(go())
    assert found["canary/compared"] == 1 and found["canary/kl"] < 1e-9 and said == []
    assert stale.kl > 10 * LIMIT  # a comparison that looked at staleness would have cried


def test_bfloat16_against_float32_stays_below_the_limit(sharp_model):
    async def go():
        learner, (generator,) = real(sharp_model, [0.0], torch.bfloat16)
        s = scene([generator], Scorer(learner))
        s.fleet.weights.publish(Offer("ray", Version(1, 0), detail={"refs": weights_of(learner)}))
        await s.canary.at_publish(Version(1, 0))
        found = await settled(s.canary, 1)
        await generator.engine.close()
        return found

    found = asyncio.run(go())
    assert 1e-9 < found["canary/kl"] < LIMIT


# ---------------------------------------------------------------- generators that misbehave


def published(actors, body, learner=None, **settings):
    """``body(s, actors)`` after version 1.1 was published to actors that serve 1.0; then whether anything was said."""

    async def go():
        made = actors()
        s = scene(made, learner or StandInLearner(), **settings)
        s.fleet.weights.publish(Offer("ray", Version(1, 0)))
        await s.fleet.wait_installed(Version(1, 0), 2.0)
        s.fleet.weights.publish(Offer("ray", Version(1, 1)))
        try:
            return await body(s, made)
        finally:
            await s.canary.close()
            await asyncio.sleep(0.01)  # what was asked last is under way

    return asyncio.run(go())


def test_generators_that_fail_hang_or_moved_on_are_left_out_and_counted():
    class Failing(StandInGenerator):
        async def _score(self, sequences):
            raise raised("no")

    class Silent(StandInGenerator):
        async def _score(self, sequences):
            await asyncio.sleep(60)

    class Ahead(StandInGenerator):
        async def _score(self, sequences):
            return Version(1, 2), (await super()._score(sequences))[1]

    class Short(StandInGenerator):
        async def _score(self, sequences):
            return self.version, (await super()._score(sequences))[1][:1]

    async def body(s, actors):
        began = time.monotonic()
        await s.canary.at_publish(Version(1, 1))
        assert time.monotonic() - began < 0.9  # training waits for the learner's scores and for nobody else
        found = await settled(s.canary, 5)
        s.fleet.check()
        return found, s.said

    kinds = (StandInGenerator, Failing, Silent, Ahead, Short)
    found, said = published(lambda: [kind(kind.__name__) for kind in kinds], body, deadline_s=1.0)
    assert (found["canary/compared"], found["canary/skipped"]) == (1, 4) and said == []


class Gated(StandInGenerator):
    """Installs nothing while its gate is closed."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.gate = asyncio.Event()
        self.gate.set()

    async def _install(self, offer):
        await self.gate.wait()
        return await super()._install(offer)


def test_a_generator_that_skips_the_version_is_given_up_and_one_that_never_installs_it_too():
    async def body(s, actors):
        _, slow, stuck = actors
        await s.fleet.wait_installed(Version(1, 1), 2.0)
        slow.gate.clear()
        stuck.gate.clear()
        s.fleet.weights.publish(Offer("ray", Version(1, 2)))
        await asyncio.sleep(0.01)  # slow is busy with 1.2 when 1.3 and 1.4 come out
        for step in (3, 4):
            s.fleet.weights.publish(Offer("ray", Version(1, step)))
            await s.canary.at_publish(Version(1, step))
        slow.gate.set()
        await s.fleet.wait_installed(Version(1, 4), 3.0)  # stuck has been taken out of service by then
        return await settled(s.canary, 3), slow.installs

    found, installs = published(lambda: [Gated("quick"), Gated("slow"), Gated("stuck")], body, deadline_s=0.5, every=3)
    assert installs[-2:] == [Version(1, 2), Version(1, 4)]
    assert (found["canary/compared"], found["canary/skipped"]) == (1, 2)


def test_generators_that_join_are_asked_and_those_that_leave_are_counted():
    async def body(s, actors):
        leaving = s.fleet.generators[1]
        await s.fleet.wait_installed(Version(1, 1), 2.0)
        actors[1].gate.clear()
        s.fleet.weights.publish(Offer("ray", Version(1, 2)))
        await s.canary.at_publish(Version(1, 2))
        leaving.alive = False
        joined = StandInGenerator("joined")
        s.fleet.generators.append(Generator("joined", joined, None))  # type: ignore[arg-type]
        s.fleet.weights.publish(Offer("ray", Version(1, 2)))
        return await settled(s.canary, 3)

    found = published(lambda: [Gated("a"), Gated("b")], body, deadline_s=0.5)
    assert (found["canary/compared"], found["canary/skipped"]) == (2, 1)


def test_a_generator_is_asked_although_the_learner_has_not_scored_yet():
    class Slow(StandInLearner):
        async def score(self, sequences):
            await asyncio.sleep(0.05)
            assert actors[0].asked  # right after its install, before it could move on
            return await super().score(sequences)

    class Asked(StandInGenerator):
        asked = False

        async def _score(self, sequences):
            self.asked = True
            return await super()._score(sequences)

    actors: list[Asked] = []

    async def body(s, made):
        actors.extend(made)
        await s.canary.at_publish(Version(1, 1))
        return await settled(s.canary, 1)

    assert published(lambda: [Asked("a")], body, Slow())["canary/compared"] == 1


def test_only_every_so_many_publishes_are_compared_and_never_means_never():
    async def body(s, actors):
        for step in range(1, 8):
            await s.canary.at_publish(Version(1, step))
        await asyncio.sleep(0)
        return len(learner.scored)

    for every, times in ((3, 2), (1, 7), (0, 0)):
        learner = StandInLearner()
        assert published(lambda: [StandInGenerator("a")], body, learner, every=every) == times


def test_a_generator_that_goes_on_disagreeing_is_named_once_until_it_agrees_again():
    class Learner(StandInLearner):
        apart = 0.5

        async def score(self, sequences):
            return [logp - self.apart for logp in await super().score(sequences)]

    learner = Learner()

    async def body(s, actors):
        for step, apart in ((1, 0.5), (2, 0.5), (3, 0.5), (4, 0.0), (5, 0.0), (6, 0.5)):
            learner.apart = apart
            await s.canary.at_publish(Version(1, step))
            s.fleet.weights.publish(Offer("ray", Version(1, step)))
            await s.fleet.wait_installed(Version(1, step), 2.0)
            assert (await settled(s.canary, 1))["canary/compared"] == 1
        return s.said

    disagrees, agrees, again = published(lambda: [StandInGenerator("a")], body, learner, every=1)
    assert "a and the learner disagree" in disagrees and "(version 1.1)" in disagrees
    assert "agree again" in agrees and "(version 1.4)" in agrees and "(version 1.6)" in again


def test_an_error_of_the_learner_is_not_swallowed():
    class Broken(StandInLearner):
        async def score(self, sequences):
            raise RuntimeError("rank 0 died")

    async def body(s, actors):
        with pytest.raises(RuntimeError, match="rank 0 died"):
            await s.canary.at_publish(Version(1, 1))
        return s.canary.take()

    assert published(lambda: [StandInGenerator("a")], body, Broken()) == {}


def test_beside_a_whole_loop_every_round_ends():
    """The real trainer, sampler and fleet; the canary is called where a publish is."""

    async def go():
        generators = [StandInGenerator("g0"), StandInGenerator("g1")]
        generators[1].install_s = 0.01
        tree = {"train": {"steps": 12, "batch_prompts": 4}, "run": {"alarms": {"canary_every": 2}}}
        loop = Loop(generators, prompts=80, max_staleness=1, **tree)
        said: list[str] = []
        canary = Canary(loop.config, prompts(), loop.learner, loop.fleet, said.append)  # type: ignore[arg-type]
        publish = loop.fleet.weights.publish

        def publish_and_compare(offer):
            publish(offer)
            checks.append(asyncio.ensure_future(canary.at_publish(offer.version)))

        checks: list[asyncio.Future] = []
        loop.fleet.weights.publish = publish_and_compare  # type: ignore[method-assign]
        await loop.run()
        await asyncio.gather(*checks)
        await loop.fleet.wait_installed(loop.trainer.version, 2.0)
        await asyncio.gather(*canary._tasks)
        canary._end_round()
        found = canary.take()
        await canary.close()
        return found, said

    found, said = asyncio.run(go())
    assert found["canary/compared"] + found["canary/skipped"] == 2 * 7 and found["canary/compared"] >= 7
    assert found["canary/kl"] == 0.0 and said == []
