"""How many groups a second one driver moves, and how long its decisions take: 64 generators that are stubs, the real driver.

    python tools/bench_driver.py [--generators 64] [--seconds 40]

Real: sampler, fleet, judges, gate, composition, ledger, buffer, trainer, Ray and its actors. Stubs (``driver_stubs``, no
torch): what generators, verifiers and learner compute. Two loads: *paced*, where generators finish about 240 groups a
second, and *saturated*, where they finish at once and the driver is the bottleneck. Written to
``benchmarks/results/driver.json``.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import cProfile
import os
import pstats
import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import driver_stubs as stubs
import ray

from actors.transports import Published
from hapo_async import algorithms, config
from hapo_async.buffer import Buffer, Ready
from hapo_async.data import PromptStream
from hapo_async.driver.fleet import ACTOR_OPTIONS, Fleet, Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.training import StepTimes, Trained, Trainer
from hapo_async.ledger import Ledger
from hapo_async.types import GroupHeader, GroupKey, GroupRequest, Judgement, Prompt, Teacher, Version

READY_S = 300.0
TOKENS = 64  # of each answer
ANSWERS = 8
PROMPT_TOKENS = 128
SIGMA = 0.4  # of the logarithm of a group's seconds


@dataclass
class Clock:
    """Moments by ``time.monotonic``, of groups and of free places."""

    known: dict[GroupKey, float] = field(default_factory=dict)
    judged_s: dict[GroupKey, float] = field(default_factory=dict)
    finished: dict[GroupKey, float] = field(default_factory=dict)
    room: dict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    admit_s: list[float] = field(default_factory=list)  # from known to admitted
    own_s: list[float] = field(default_factory=list)  # of that, without the verifier's answer
    whole_s: list[float] = field(default_factory=list)  # from finished on the generator to admitted
    issue_s: list[float] = field(default_factory=list)  # from room to the issue call
    counting: bool = False

    def admitted(self, key: GroupKey) -> None:
        now = time.monotonic()
        known, judged, finished = self.known.pop(key), self.judged_s.pop(key), self.finished.pop(key)
        if self.counting:
            self.admit_s.append(now - known)
            self.own_s.append(now - known - judged)
            self.whole_s.append(now - finished)

    def issued(self, name: str, count: int) -> None:
        now, room = time.monotonic(), self.room[name]
        for _ in range(min(count, len(room))):  # the first ones fill places that were never taken
            since = room.popleft()
            if self.counting:
                self.issue_s.append(now - since)


class TimedFleet(Fleet):
    clock: Clock

    async def submit(self, generator: Generator, requests: list[GroupRequest]) -> None:
        self.clock.issued(generator.name, len(requests))
        await super().submit(generator, requests)

    async def sample(self, generator: Generator, request: GroupRequest, deadline_s: float) -> tuple[GroupHeader, Any]:
        self.clock.issued(generator.name, 1)
        return await super().sample(generator, request, deadline_s)

    async def _header(
        self, generator: Generator, key: GroupKey, refs: tuple[Any, Any], deadline_s: float
    ) -> tuple[GroupHeader, Any]:
        header, payload = await super()._header(generator, key, refs, deadline_s)
        self.clock.known[key], self.clock.finished[key] = time.monotonic(), header.seconds
        return header, payload

    def release(self, generator: Generator, key: GroupKey) -> None:
        self.clock.room[generator.name].append(time.monotonic())
        super().release(generator, key)


class TimedJudges(Judges):
    clock: Clock

    async def judge(self, payload: Any, prompt: Prompt, answers: int, key: GroupKey | None = None) -> list[Judgement]:
        began = time.monotonic()
        try:
            return await super().judge(payload, prompt, answers, key)
        finally:
            assert key is not None
            self.clock.judged_s[key] = time.monotonic() - began


@dataclass
class TimedBuffer(Buffer):
    clock: Clock = field(default_factory=Clock)

    def add(self, group: Ready) -> None:
        super().add(group)
        self.clock.admitted(group.key)


class StubLearner:
    """Takes any batch at once."""

    is_remote = False
    blamed: tuple[Any, ...] = ()

    def __init__(self) -> None:
        self.trained: list[GroupKey] = []

    async def step(self, plans: list[Any]) -> dict[str, float]:
        await asyncio.sleep(0)
        self.trained += [g.key for plan in plans for mini in plan.minis for g in mini]
        return {}

    async def announce(self, version: Version, members: Sequence[Any]) -> None:
        return None

    async def admit(self, members: Sequence[Any]) -> None:
        pass

    async def publish(self, version: Version, transport: str = "") -> Published:
        return Published(stubs.Announced(version))  # type: ignore[arg-type]


class Bench:
    """The driver's parts around stub actors, in a Ray that is there. Call ``start``, ``measure`` and ``stop``."""

    def __init__(self, generators: int, verifiers: int, in_flight: int, mean_s: float, prompts: int = 4096) -> None:
        self.config = config.parse(
            {
                "algorithm": "hapo",
                "max_staleness": 4,
                "sampling": {"n": ANSWERS, "max_tokens": TOKENS},
                "generator": {"count": generators, "max_concurrent": in_flight},
                "train": {"steps": 10**9, "batch_prompts": generators * in_flight},
            }
        )
        algorithm = algorithms.get(self.config.algorithm)
        self.clock, self.ledger, self.learner = Clock(), Ledger(), StubLearner()
        teacher = Teacher("t", np.zeros(TOKENS, np.int32))
        message = ({"role": "user", "content": "question"},)
        tokens = np.zeros(PROMPT_TOKENS, np.int32)
        items = [Prompt(f"p{i}", message, tokens, "1", teachers=(teacher,)) for i in range(prompts)]
        by_uid = {p.uid: p for p in items}
        room = (self.config.max_staleness + 1) * self.config.train.batch_prompts
        self.buffer = TimedBuffer(room, self.ledger.order, clock=self.clock)
        options, stream = algorithm.check_config(self.config), PromptStream(items, 0, True, 0)
        self.sampler = Sampler(self.config, algorithm, options, stream, by_uid, self.ledger, self.buffer)
        here = {"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}}  # where the stubs are, whatever script runs
        remote = {"num_cpus": 0, "runtime_env": here, **ACTOR_OPTIONS}
        actor: Any = ray.remote(stubs.StubGenerator)
        judge: Any = ray.remote(stubs.StubVerifier)
        self.actors = {
            f"generator-{i}": actor.options(**remote).remote(f"generator-{i}", mean_s, SIGMA, i)
            for i in range(generators)
        }
        self.verifiers = {f"verifier-{i}": judge.options(**remote).remote() for i in range(verifiers)}
        slot: Any = SimpleNamespace(release=lambda: None)
        fleet = [Generator(name, actor, slot) for name, actor in self.actors.items()]
        self.fleet = TimedFleet(self.config, fleet, self.sampler.wake)
        self.judges = TimedJudges(self.config, self.verifiers)
        self.fleet.clock = self.judges.clock = self.clock
        learner: Any = self.learner
        version = Version(1, 0)
        self.trainer = Trainer(self.config, learner, self.fleet, self.sampler, self.ledger, self.buffer, version)
        self.most_stale = 0

    async def start(self) -> None:
        """Waits for all actors. Raises AssertionError when one has imported torch."""
        actors = [*self.actors.values(), *self.verifiers.values()]
        ready = await asyncio.wait_for(asyncio.gather(*(a.ready.remote() for a in actors)), READY_S)
        assert not any(r["torch"] for r in ready), "a stub has imported torch"
        await self.trainer.publish()
        await self.fleet.wait_installed(Version(1, 0), READY_S)
        self._loops = [
            asyncio.create_task(self.sampler.feed(self.fleet, self.judges)),
            asyncio.create_task(self.trainer.run(self._committed)),
        ]

    async def _committed(self, trained: Trained) -> StepTimes:
        ages = [trained.step - 1 - g.header.oldest.step for g in trained.groups if g.header.oldest]
        self.most_stale = max(self.most_stale, *ages)
        return StepTimes()

    async def measure(self, warm_s: float, seconds: float) -> dict[str, Any]:
        """Rate and latencies over ``seconds``, after ``warm_s``. Raises what a loop raised."""
        await self._run_for(warm_s)
        clock = self.clock
        for times in (clock.admit_s, clock.own_s, clock.whole_s, clock.issue_s):
            times.clear()
        clock.counting = True
        began, before, step, cpu = time.monotonic(), self.trained, self.trainer.version.step, cpu_seconds()
        await self._run_for(seconds)
        clock.counting = False
        took, groups, admitted = time.monotonic() - began, self.trained - before, len(clock.admit_s)
        used = {who: after - cpu.get(who, 0.0) for who, after in cpu_seconds().items()}
        return {
            "seconds": round(took, 1),
            "groups_admitted": admitted,
            "groups_per_s": round(admitted / took, 1),
            "groups_trained_per_s": round(groups / took, 1),
            "learner_steps": self.trainer.version.step - step,
            "cpu_share": {who: round(seconds / took, 3) for who, seconds in used.items()},
            "cpu_ms_per_group": {
                who: round(1e3 * seconds / max(1, admitted), 3) for who, seconds in used.items() if who != "others"
            },
            "most_stale": self.most_stale,
            "ms": {
                "known_to_admitted": percentiles(clock.admit_s),
                "known_to_admitted_without_the_verifier": percentiles(clock.own_s),
                "finished_on_the_generator_to_admitted": percentiles(clock.whole_s),
                "room_to_issue": percentiles(clock.issue_s),
            },
        }

    @property
    def trained(self) -> int:
        return self.ledger.counts()["trained"]

    async def _run_for(self, seconds: float) -> None:
        done, _ = await asyncio.wait(self._loops, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()

    async def pace(self, mean_s: float) -> None:
        await asyncio.gather(*(a.pace.remote(mean_s) for a in self.actors.values()))

    async def stop(self) -> None:
        """Ends loops and actors. Raises when the ledger does not add up or a stub has imported torch."""
        self.trainer.stopping = True
        self.sampler.wake()
        for task in self._loops:
            task.cancel()
        await asyncio.wait_for(asyncio.gather(*self._loops, return_exceptions=True), READY_S)
        await self.sampler.close()
        actors = [*self.actors.values(), *self.verifiers.values()]
        closed = await asyncio.wait_for(asyncio.gather(*(a.close.remote() for a in actors)), READY_S)
        for one in actors:
            ray.kill(one)
        assert not any(closed), "a stub has imported torch"
        self.ledger.check(recount=True)


def cpu_seconds() -> dict[str, float]:
    """Used so far by this process (the driver), by the stubs of each kind, by Ray's own processes, and by whatever
    else runs on the machine."""
    out: dict[str, float] = defaultdict(float)
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            name, times = process.cmdline()[0], process.cpu_times()
            kind = next((k for k in ("Generator", "Verifier") if f"Stub{k}" in name), "Ray").lower()
            out["driver" if process.pid == os.getpid() else kind] += times.user + times.system
    everything = psutil.cpu_times()
    out["others"] = sum(everything) - everything.idle - everything.iowait - everything.guest - sum(out.values())
    return dict(out)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    if not seconds:
        return {}
    values = 1e3 * np.array(seconds)
    return {"p50": round(float(np.median(values)), 2), "p99": round(float(np.percentile(values, 99)), 2)}


async def main(arguments: argparse.Namespace) -> dict[str, Any]:
    in_flight = arguments.in_flight
    mean_s = arguments.generators * in_flight / arguments.rate
    bench = Bench(arguments.generators, arguments.verifiers, in_flight, mean_s)
    await bench.start()
    await asyncio.sleep(arguments.settle)  # the actors' processes have just been started
    print(f"{arguments.generators} generators are ready", flush=True)
    out: dict[str, Any] = {}
    out["paced"] = {"offered_groups_per_s": arguments.rate, **await bench.measure(2 * mean_s, arguments.seconds)}
    print(out["paced"], flush=True)
    await bench.pace(0.0)
    profile = cProfile.Profile()
    if arguments.profile:
        profile.enable()
    out["saturated"] = await bench.measure(5.0, arguments.seconds)
    if arguments.profile:
        profile.disable()
        pstats.Stats(profile).sort_stats("tottime").print_stats(60)
    print(out["saturated"], flush=True)
    await bench.stop()
    return out


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--generators", type=int, default=64)
    parser.add_argument("--verifiers", type=int, default=4)
    parser.add_argument("--in-flight", type=int, default=8, help="groups on one generator")
    parser.add_argument("--rate", type=float, default=240.0, help="groups a second that generators finish (paced)")
    parser.add_argument("--seconds", type=float, default=40.0, help="of each measurement")
    parser.add_argument("--settle", type=float, default=20.0, help="seconds before the first measurement")
    parser.add_argument("--profile", action="store_true", help="print where the driver's time goes; writes no result")
    return parser.parse_args()


if __name__ == "__main__":
    import measured

    from actors.placement import LocalRay

    given = arguments()
    local = LocalRay(num_cpus=os.cpu_count() or 1)
    try:
        load = os.getloadavg()
        found = asyncio.run(main(given))
    finally:
        local.stop()
    if not given.profile:
        setting = {
            "generators": given.generators,
            "verifiers": given.verifiers,
            "groups_per_generator": given.in_flight,
        }
        sizes = {"answers": ANSWERS, "tokens": TOKENS, "prompt_tokens": PROMPT_TOKENS, "cpus": os.cpu_count()}
        path = measured.write("driver", {**setting, **sizes, "load_before": round(load[0], 1), **found})
        print(f"written to {path}")
