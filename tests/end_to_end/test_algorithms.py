"""Every algorithm of the table trains three real steps: one Ray, one learner group, one generator, one verifier for all.

The parts are those of a run (sampler, ledger, buffer, trainer, fleet, judges); only the learner is configured anew for
each algorithm instead of being started anew. Before the first one, sixteen steps of SFT give the shipped model half of
the missing skill, so that groups hold right and wrong answers.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import Any

import pytest

from actors import placement
from actors.learner import LearnerGroup
from hapo_async import algorithms, config, metrics
from hapo_async.buffer import Buffer
from hapo_async.data import PromptStream
from hapo_async.driver import setup
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.driver.offline import Offline
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.training import StepTimes, Trained, Trainer
from hapo_async.ledger import Ledger
from hapo_async.types import Source, Version

pytestmark = pytest.mark.usefixtures("ray_session")

STEPS = 3
HYBRIDS = {"sft", "luffy", "srft", "hpt", "hpt_off_on", "hpt_mix_on", "hapo", "hapo_apo"}
TOLD = {  # what an algorithm must report besides what all do
    "ppo": {"loss/value_function", "critic/value_mean"},
    "grpo_kl": {"loss/kl"},
    "grpo_kl_error_only": {"loss/kl"},
    "off_rl_kl": {"loss/kl"},
    "apo": {"apo/r_anchor_mean", "reference/bytes"},
    "hapo_apo": {"apo/r_anchor_mean", "reference/bytes"},
    "cispo": {"policy/ratio_bounded_frac"},
    "fpa": {"offline/future_weight/correct", "offline/weight/correct", "offline/future_ratio/incorrect"},
    **{name: {"policy/drift/correct", "policy/drift/incorrect"} for name in ("dpo", "rpo", "kto", "a_star_po")},
    **{name: {"loss/teacher", "policy/teacher_logp"} for name in HYBRIDS},
}


class Parts:
    """What the runs share. ``train`` is one run on it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.runs = 0
        self.wake: Any = lambda: None

    async def start(self) -> None:
        c = self.config("grpo")
        cluster = placement.join(2)
        slot = placement.reserve(cluster, 1, 1.0, f"algorithms-{id(self)}")
        path = setup.prepare(c).model_path
        needs = frozenset({"topk", "ref_logp", "ref_kl", "future", "value"})
        self.learner, self.fleet, self.judges = await asyncio.gather(
            LearnerGroup.start(c, path, cluster, slot, needs=needs),
            Fleet.start(c, path, cluster, 1.0, lambda: self.wake()),
            Judges.start(c),
        )
        await self.train("sft", STEPS + 13, lr=1e-4)
        await self.train("dpo", 1)  # makes the cached answers of all that follow, before anything else has learnt

    def config(self, name: str, steps: int = STEPS, lr: float = 1e-5, **options: Any) -> config.Config:
        overrides = [f"algorithm={name}", f"train.steps={steps}", f"learner.lr={lr}", "learner.warmup_steps=0"]
        overrides += ["train.batch_prompts=8", "learner.mini_batches=2", "data.demonstrations=-1", "data.limit=96"]
        overrides += ["data.eval=[]", f"data.answers={self.root / 'answers'}", f"run.dir={self.root / 'run'}"]
        overrides += ["gate.teacher=likeliest", *(f"options.{k}={v}" for k, v in options.items())]
        return config.load("configs/quickstart.yaml", overrides)

    async def train(self, name: str, steps: int = STEPS, lr: float = 1e-5, **options: Any) -> list[Trained]:
        """The committed steps of one run."""
        c = self.config(name, steps, lr, **options)
        prepared = setup.prepare(c)
        await self.learner.configure(c)
        stream = PromptStream(prepared.prompts, c.seed, c.data.shuffle, c.data.epochs)
        ledger = Ledger()
        buffer = Buffer((c.max_staleness + 1) * c.train.batch_prompts, ledger.order)
        sampler = Sampler(c, prepared.algorithm, prepared.options, stream, stream.by_uid(), ledger, buffer)
        self.wake = sampler.wake
        self.runs += 1
        trainer = Trainer(c, self.learner, self.fleet, sampler, ledger, buffer, Version(self.runs, 0))
        await trainer.publish()
        await self.fleet.wait_installed(trainer.version, 60)
        if prepared.algorithm.offline:
            offline = Offline.open(prepared, self.root / "run")
            await offline.generate(self.fleet, self.judges, lambda text: None)
            await offline.score(self.learner, lambda text: None)
            sampler.offline = offline
        done: list[Trained] = []

        async def committed(trained: Trained) -> StepTimes:
            done.append(trained)
            return StepTimes()

        feeding = asyncio.create_task(sampler.feed(self.fleet, self.judges))
        try:
            await asyncio.wait_for(trainer.run(committed), 120)
            ledger.check()
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            await sampler.close()
            await self.forget()
        return done

    async def forget(self) -> None:
        """Nothing of a run is left in the generators: keys of the next one would meet it."""
        owners = {g.name: list(g.outstanding) for g in self.fleet.alive if g.outstanding}
        await self.fleet.abort(owners)
        for generator in self.fleet.generators:
            for key in owners.get(generator.name, []):
                generator.unassign(key)

    async def close(self) -> None:
        await asyncio.gather(self.learner.close(), self.fleet.close(), self.judges.close())


@pytest.fixture(scope="module")
def loop():
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(scope="module")
def parts(loop, tmp_path_factory):
    shared = Parts(tmp_path_factory.mktemp("algorithms"))
    loop.run_until_complete(shared.start())
    yield shared
    loop.run_until_complete(shared.close())


@pytest.mark.parametrize("name", algorithms.names())
def test_three_real_steps(name, parts, loop):
    algorithm = algorithms.get(name)
    # The half-skilled model fails a whole group too rarely for three steps of HPT to meet one.
    options = {"gamma": 6} if algorithm.composition == "switch" else {}
    done = loop.run_until_complete(parts.train(name, **options))
    assert [trained.step for trained in done] == [1, 2, 3]
    for trained in done:
        numbers = trained.learner
        assert all(math.isfinite(value) for value in numbers.values()), numbers
        assert all(metrics.find(key) for key in numbers), [k for k in numbers if not metrics.find(k)]
        assert numbers["train/updates"] >= 1 and numbers["train/skipped"] == 0
        assert numbers.get("staleness/max", 0) <= 1
    assert any(trained.learner["policy/grad_norm"] > 0 for trained in done)
    told = set().union(*(trained.learner for trained in done))
    assert TOLD.get(name, set()) <= told, TOLD[name] - told
    rows = [row for trained in done for group in trained.groups for row in group.train.rows]
    assert any(row.source is Source.TEACHER for row in rows) == (name in HYBRIDS)
    if algorithm.keep == "nonzero":
        assert all(row.advantage != 0 for row in rows)
    if name == "dapo":
        assert all(0 < g.gated.rewards.mean() < 1 for trained in done for g in trained.groups)


def test_the_weights_moved(parts, loop):
    """The manifests of the versions before and after three steps differ."""

    async def digests() -> list[Any]:
        published = await parts.learner.publish(Version(parts.runs + 1, 0))
        return [bucket.digest for bucket in published.offer.manifest.buckets]

    before = loop.run_until_complete(digests())
    loop.run_until_complete(parts.train("grpo"))
    assert loop.run_until_complete(digests()) != before


def test_apo_and_ppo_go_together_and_options_reach_the_learner(parts, loop):
    done = loop.run_until_complete(parts.train("apo", critic="true"))
    assert "critic/value_mean" in done[-1].learner and "apo/r_anchor_mean" in done[-1].learner
    done = loop.run_until_complete(parts.train("grpo", kl_coef=0.1, kl="k2", entropy_coef=0.01))
    assert "loss/kl" in done[-1].learner
