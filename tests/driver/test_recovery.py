"""The learner dies and starts again: later steps than its checkpoint are made anew, what old weights sampled never trains."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actors.learner import LearnerGone
from actors.transports import Published
from hapo_async.driver.generators import Generator
from hapo_async.driver.recovery import Recovery
from hapo_async.driver.training import StepTimes, Trained
from hapo_async.errors import RunError
from hapo_async.learner.blame import LOST, Blame
from hapo_async.types import GroupKey, Version
from tests.driver.living import Live, Places, Resuming, Slot
from tests.driver.stand_ins import StandInLearner


@pytest.fixture(autouse=True)
def no_threads(monkeypatch):
    """A virtual clock does not wait for threads."""

    async def at_once(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)


class Mortal(StandInLearner):
    """Dies in the calls that ``deaths`` names (method, how many calls of it before); a dead one refuses everything until it is
    restarted. unmakeable: blamed by the steps of these numbers."""

    slot = None

    def __init__(self, deaths: dict[str, list[int]], skip_share: float = 0.0) -> None:
        super().__init__(skip_share, step_s=1.0)
        self.deaths, self.calls = deaths, Counter[str]()
        self.is_dead = False
        self.loaded: list[Path] = []
        self.restart_s, self.stillborn = 20.0, 0
        self.blames: dict[int, str] = {}

    def _call(self, method: str) -> None:
        number = self.calls[method]
        self.calls[method] += 1
        self.is_dead = self.is_dead or number in self.deaths.get(method, ())
        if self.is_dead:
            raise LearnerGone(f"learner.{method} failed: learner rank 0: died (ActorDiedError)")

    async def step(self, plans: list[Any]) -> dict[str, float]:
        await asyncio.sleep(self.step_s / 2)
        self._call("step")
        keys = [g.key for plan in plans for mini in plan.minis for g in mini]
        reason = self.blames.get(self.calls["step"])
        self.blamed = (Blame(keys[0], reason),) if reason else ()
        return {"skipped": 1.0} if reason else await super().step(plans)

    async def publish(self, version: Version, transport: str = "") -> Published:
        self._call("publish")
        return await super().publish(version, transport)

    async def restart(self, slot: Any = None) -> None:
        await asyncio.sleep(self.restart_s)
        self.calls["restart"] += 1
        if self.stillborn:
            self.stillborn -= 1
            raise LearnerGone("learner.start failed: learner rank 0: died")
        self.is_dead, self.blamed = False, ()

    async def load(self, folder: Path) -> None:
        self._call("load")
        self.loaded.append(folder)


class Recovering(Live):
    """A living loop with a learner that dies, and a checkpoint every so many steps."""

    def __init__(self, learner: Mortal, every: int = 5, generators: int = 2, **more: Any) -> None:
        super().__init__(generators, trains=learner, **more)
        self.every = every
        self.saved: list[SimpleNamespace] = []
        self.rolled_back: list[int] = []
        self.history: dict[int, list[Any]] = {}
        self.incarnation = 1
        self.save()
        self.recovery = Recovery(
            self.config,
            None,  # type: ignore[arg-type]
            self.trainer,
            SimpleNamespace(settle=self._settle, newest=lambda: self.saved[-1]),  # type: ignore[arg-type]
            SimpleNamespace(roll_back=self._roll_back),  # type: ignore[arg-type]
            SimpleNamespace(forget=self._forget),  # type: ignore[arg-type]
            lambda *note: self.notes.append(note),
            self._next_incarnation,
        )

    def save(self) -> None:
        state = {"ledger": self.ledger.state_dict(), "gate": self.sampler.posteriors.state_dict()}
        step = self.trainer.version.step
        self.saved.append(SimpleNamespace(path=Path(f"step-{step}"), step=step, driver=json.loads(json.dumps(state))))

    async def _settle(self) -> None:
        pass

    async def _forget(self, step: int) -> None:
        pass

    async def _roll_back(self, purge_step: int) -> None:
        self.rolled_back.append(purge_step)
        self.history = {step: groups for step, groups in self.history.items() if step < purge_step}

    def _next_incarnation(self) -> int:
        self.incarnation += 1
        return self.incarnation

    async def _committed(self, trained: Trained) -> StepTimes:
        self.history[trained.step] = trained.groups
        self.ledger.check(recount=True)
        if trained.step % self.every == 0:
            self.save()
        return await super()._committed(trained)

    async def run(self, limit_s: float = 20.0) -> None:
        steps = self.trainer.run

        async def to_the_end(committed: Any) -> None:
            while True:
                try:
                    return await steps(committed)
                except LearnerGone as error:
                    await self.recovery.recover(error)

        self.trainer.run = to_the_end  # type: ignore[method-assign]
        await super().run(limit_s)

    @property
    def discarded(self) -> int:
        return self.ledger.discarded_lineage

    def check(self) -> None:
        """The history that counts holds every prompt once, and nothing that discarded weights sampled."""
        trained = [g for groups in self.history.values() for g in groups]
        assert len({(g.key.epoch, g.key.uid) for g in trained}) == len(trained) == self.ledger.counts()["trained"]
        counts = self.ledger.counts()
        assert counts["issued"] == sum(n for place, n in counts.items() if place != "issued")
        for step, groups in self.history.items():
            for group in groups:
                assert not self.sampler.returns.lineage.discards(group.header), (step, group.header.versions)
                assert 0 <= step - 1 - group.header.oldest.step <= self.config.max_staleness
        assert sorted(self.history) == list(range(1, self.trainer.version.step + 1))


def played(clock, make, play=None) -> Recovering:
    async def nothing(loop: Live) -> None:
        pass

    async def go() -> Live:
        return await make().played(play or nothing)

    loop = clock.run(go())
    loop.check()
    return loop


@pytest.mark.parametrize("method", ["step", "publish"])
@pytest.mark.parametrize("eta", [0, 2])
def test_a_learner_that_dies_goes_on_from_its_checkpoint(clock, method, eta):
    """At step 9 of a checkpoint at 5: four steps are made anew, under versions of another incarnation."""
    deaths = {method: [8 if method == "step" else 9]}
    loop = played(clock, lambda: Recovering(Mortal(deaths), steps=20, max_staleness=eta))
    assert loop.trainer.version == (2, 20) and loop.learner.loaded == [Path("step-5")] and loop.rolled_back == [6]
    assert loop.discarded > 4 * 3
    assert [kind for kind, _, _ in loop.notes] == ["lost", "replaced"]
    assert all(g.installed[0] == 2 for g in loop.fleet.generators)
    assert all(v >= (2, 5) for g in loop.actors.values() for v in g.installs[-10:])


def test_what_a_checkpoint_of_the_same_step_knows_stays(clock):
    """Nothing was learned after it: no group is sampled again."""
    loop = played(clock, lambda: Recovering(Mortal({"step": [8]}), every=1, steps=20))
    issued = Counter((k.epoch, k.uid) for g in loop.actors.values() for k in g.issued)
    assert loop.discarded == 0 and max(issued.values()) == 1


def test_groups_in_flight_under_discarded_weights_are_aborted_and_their_late_answers_ignored(clock):
    """Slow answers: all that run at the death were begun after the checkpoint."""
    loop = played(clock, lambda: Recovering(Mortal({"step": [9]}), every=6, steps=20, latency=lambda key: 30.0))
    issued = Counter((k.epoch, k.uid) for g in loop.actors.values() for k in g.issued)
    assert loop.discarded > 0 and max(issued.values()) == 2
    assert all(len(g._slots) <= 4 for g in loop.actors.values())


def test_nobody_gets_groups_between_the_restart_and_the_refit(clock):
    class Watched(Resuming):
        async def _submit(self, requests: Any) -> None:
            self.at_submit = [*getattr(self, "at_submit", []), self.version]
            await super()._submit(requests)

        async def _install(self, offer: Any) -> Any:
            self.install_s = 4.0
            return await super()._install(offer)

    def make() -> Recovering:
        loop = Recovering(Mortal({"step": [8]}), steps=20)
        for generator in loop.fleet.generators:
            generator.actor = loop.actors[generator.name] = Watched(generator.name, lambda key: 2.0)
        return loop

    loop = played(clock, make)
    for actor in loop.actors.values():
        after = actor.at_submit[next(i for i, v in enumerate(actor.at_submit) if v[0] == 2) :]
        assert all(version[0] == 2 for version in after)


def test_one_that_dies_again_and_again_ends_the_run_with_its_last_words(clock):
    loop = Recovering
    with pytest.raises(RunError, match=r"lost too often within ten minutes; the last time: learner.step"):
        played(clock, lambda: loop(Mortal({"step": [2, 3, 4, 5, 6]}), every=1, steps=20))


def test_one_that_dies_before_there_is_a_checkpoint_starts_as_the_run_did(clock):
    async def scenario():
        loop = Recovering(Mortal({"publish": [0]}))
        loop.saved.clear()
        loop.recovery._checkpoints.newest = lambda: None
        with pytest.raises(LearnerGone) as lost:
            await loop.trainer.publish()
        await loop.recovery.recover(lost.value)
        await loop.fleet.wait_installed(Version(2, 0), 5.0)
        assert loop.trainer.version == (2, 0) and loop.learner.loaded == [] and not loop.learner.is_dead
        loop.trainer.version = Version(2, 7)
        with pytest.raises(LearnerGone):
            await loop.recovery.recover(lost.value)
        await loop.fleet.weights.close()

    clock.run(scenario())


def test_a_restart_that_fails_is_tried_again(clock):
    def make() -> Recovering:
        learner = Mortal({"step": [7]})
        learner.stillborn = 2
        return Recovering(learner, steps=20)

    loop = played(clock, make)
    assert loop.learner.calls["restart"] == 3 and loop.trainer.version == (2, 20)
    assert [kind for kind, _, _ in loop.notes] == ["lost"] * 3 + ["replaced"]


def test_generators_die_while_the_learner_starts_again(clock):
    async def play(loop: Live) -> None:
        await loop.until(lambda: loop.recovery.restarting)
        await asyncio.sleep(5.0)
        for actor in loop.actors.values():
            actor.die()

    loop = played(clock, lambda: Recovering(Mortal({"step": [8]}), steps=20), play)
    assert loop.trainer.version == (2, 20)
    assert {"generator-0", "generator-1"} == set(loop.names)


@pytest.mark.parametrize("seed", range(40))
def test_any_deaths_at_any_time_lose_nothing_and_train_nothing_twice(clock, seed):
    rng = random.Random(seed)
    deaths = {m: sorted(rng.sample(range(1, 30), rng.choice([0, 1, 1]))) for m in ("step", "publish", "load")}

    def make() -> Recovering:
        # A learner that survives its load and a failing install or two.
        learner = Mortal(
            {**deaths, "load": [0] if deaths["load"] and rng.random() < 0.5 else []}, rng.choice([0.0, 0.1])
        )
        learner.blames = {rng.randrange(1, 40): rng.choice([LOST, "a log-prob is not finite"]) for _ in range(3)}
        return Recovering(
            learner,
            every=rng.choice([1, 3, 7]),
            generators=rng.choice([1, 2, 3]),
            steps=30,
            max_staleness=rng.choice([0, 1, 4]),
            latency=lambda key: 0.5 + hash((seed, key.uid)) % 9,
            places=Places(lambda name: Resuming(name, lambda key: 3.0)),
        )

    async def play(loop: Live) -> None:
        for _ in range(rng.choice([0, 1, 2])):
            await asyncio.sleep(rng.uniform(1, 60))
            if alive := loop.fleet.serving:
                rng.choice(alive).actor.die()

    loop = played(clock, make, play)
    assert loop.trainer.version.step == 30
    assert loop.ledger.dropped_reasons.keys() <= {"skipped_step", "poisoned", "late"}


@pytest.mark.parametrize("reason", [LOST, "its reward is nan"])
def test_a_group_that_spoils_a_step_goes_and_the_others_train(clock, reason):
    def make() -> Recovering:
        learner = Mortal({})
        learner.blames = {4: reason}
        return Recovering(learner, steps=12)

    loop = played(clock, make)
    counts = loop.ledger.counts()
    assert loop.learner.calls["step"] == 13 and counts["trained"] == 12 * 4
    assert counts["dropped"] == (0 if reason == LOST else 1)
    assert loop.trainer.poisoned == (0 if reason == LOST else 1)
    assert isinstance(loop.steps[0][0].key, GroupKey)


def test_a_generator_that_comes_back_from_an_evaluation_while_the_learner_is_dead_waits_for_it(clock):
    """It has no weights to ask for, and the run goes on: a learner that starts again publishes to all."""

    class Asked(Mortal):
        async def admit(self, members: Any) -> None:
            self._call("admit")

    async def play(loop: Live) -> None:
        await loop.at_step(3)
        lent = loop.fleet.generators[1]
        await loop.until(lambda: lent.installed == loop.fleet.weights.newest)
        await loop.fleet.detach(lent, loop.fleet.weights.newest, 100.0)
        await loop.until(lambda: loop.learner.is_dead)
        await asyncio.sleep(0.5)
        assert loop.recovery.restarting
        loop.fleet.attach(lent)
        await asyncio.sleep(2.0)
        await loop.fleet.join(Generator("generator-9", Resuming("generator-9"), Slot(), "key"))
        await asyncio.sleep(0.5)
        assert loop.learner.calls["admit"] >= 2 and loop.recovery.restarting

    loop = played(clock, lambda: Recovering(Asked({"step": [12]}), steps=30), play)
    assert loop.trainer.version == (2, 30) and len(loop.names) == 3
    assert all(g.installed >= (2, 29) for g in loop.fleet.generators)


@pytest.mark.parametrize("reason", [LOST, "its reward is nan"])
def test_groups_of_a_step_that_was_not_made_go_back_as_they_came(clock, reason):
    """Advantages that are made over a whole batch are not made of what another batch made."""
    came: dict[GroupKey, Any] = {}
    again: list[GroupKey] = []

    def make() -> Recovering:
        learner = Mortal({})
        learner.blames = {4: reason}
        loop = Recovering(learner, steps=12, algorithm="reinforce_pp")
        add = loop.buffer.add

        def watched(group: Any) -> None:
            if group.key in came:
                again.append(group.key)
                assert group.train is came[group.key]
            came[group.key] = group.train
            add(group)

        loop.buffer.add = watched  # type: ignore[method-assign]
        return loop

    played(clock, make)
    assert len(again) == 3


def test_a_learner_that_dies_right_after_a_step_that_was_not_made_brings_no_group_back_twice(clock):
    def make() -> Recovering:
        learner = Mortal({})
        learner.blames = {4: "a log-prob is not finite"}
        loop = Recovering(learner, every=3, steps=12)
        serve, died = loop.trainer._serve_wanting, list[int]()

        async def once() -> None:
            if learner.calls["step"] == 4 and not died:
                died.append(1)
                learner.is_dead = True
                learner._call("publish")  # a snapshot, for a generator that came back
            await serve()

        loop.trainer._serve_wanting = once  # type: ignore[method-assign]
        return loop

    loop = played(clock, make)
    assert loop.trainer.version == (2, 12) and loop.ledger.counts()["trained"] == 12 * 4


def test_going_back_takes_back_that_it_was_enough(clock):
    async def scenario() -> None:
        loop = Recovering(Mortal({}))
        loop.trainer.enough = True
        loop.trainer.roll_back(Version(2, 0))
        assert not loop.trainer.enough

    clock.run(scenario())


def test_one_that_is_told_to_stop_does_not_start_again(clock):
    async def scenario() -> None:
        loop = Recovering(Mortal({}))
        recovering = asyncio.create_task(loop.recovery.recover(LearnerGone("died")))
        await asyncio.sleep(0.5)
        loop.trainer.stopping = True
        with pytest.raises(LearnerGone, match="died"):
            await recovering
        assert loop.learner.calls["restart"] == 0 and not loop.recovery.restarting

    clock.run(scenario())
