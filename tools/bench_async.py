"""What asynchrony gains in speed: learner steps per second, side by side, on two cores that nothing else uses.

    python tools/bench_async.py                       # about 18 minutes
    python tools/bench_async.py --settings balanced --rounds 3

Three settings of one random model with answers of a fixed length (so that every step has the same tokens): *generation*
(generators are the slower side), *balanced* and *learner* (the learner is). In each, ``--rounds`` times, both sides are
measured alone and then these modes take turns (the machine's own speed drifts: only what is of one round is compared):

- async: max_staleness=1, generator on one core, learner on the other, as on a disaggregated cluster
- sync: max_staleness=0, on the same cores; one of them always waits
- both: max_staleness=0, generator.placement=colocated, two generators and two learner ranks on both cores: whichever
  side is at work has the whole machine

Alone: the generator answers the same prompts with no learner, ``max_concurrent`` groups at a time; the learner repeats
steps on batches that are there already. Together: both of that at the same time, with nothing between them. What the loop
loses against the slower side together is coordination; what together loses against alone is the machine's, whose memory
both sides share.

Processes are bound with sched_setaffinity, all of their threads; the driver, Ray and the verifier run wherever they like.
Writes benchmarks/results/async.json and prints the table of docs/staleness.md.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measured
import psutil
import random_model

from actors import placement
from actors.learner import LearnerGroup
from hapo_async import batch
from hapo_async import config as configs
from hapo_async.buffer import Buffer, Ready
from hapo_async.data import PromptStream
from hapo_async.driver import run, setup
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.judges import Judges
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.setup import Prepared
from hapo_async.ledger import Ledger
from hapo_async.types import GroupKey, GroupRequest, Sampling, Version

PROMPT_TOKENS, PROMPTS = 24, 2000
COMMON = [
    *("algorithm=grpo", f"verifier.name={random_model.REWARD}", "data.chat_template=false", "learner.lr=1e-6"),
    *(
        "sampling.n=4",
        "sampling.max_tokens=96",
        "train.batch_prompts=16",
        "learner.mini_batches=2",
        "learner.zero_stage=1",
    ),
    *("generator.engine=transformers", "train.checkpoint_every=0", "rollouts.sample=0", "run.alarms={canary_every: 0}"),
]
SETTINGS: dict[str, list[str]] = {
    "generation": ["generator.max_concurrent=2"],
    "balanced": ["generator.max_concurrent=4"],
    "learner": ["generator.max_concurrent=8", "learner.gradient_checkpointing=true"],
}
MODES: dict[str, list[str]] = {
    "async": ["max_staleness=1"],
    "sync": ["max_staleness=0"],
    "both": ["max_staleness=0", "generator.placement=colocated", "generator.count=2", "learner.ranks=2"],
}
GENERATOR_CORE, LEARNER_CORE = 0, 1
WARM = 3  # first steps, which fill the pipeline and touch the memory
ALONE_BATCHES = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a run")
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_async"))
    args = parser.parse_args()
    start = _prepare_files(args.runs)
    ray = placement.LocalRay(num_cpus=4)
    try:
        found = {name: _setting(name, args.runs, start, args.rounds, args.steps) for name in args.settings}
    finally:
        ray.stop()
    content = {"common": COMMON, "settings": SETTINGS, "modes": MODES, "steps": args.steps, "found": found}
    print(f"\n{table(found)}\n\nwritten to {measured.write('async', content)}")


def _prepare_files(root: Path) -> list[str]:
    """The model and its prompts; the overrides that name them."""
    model = random_model.make(root / "model", hidden=256, layers=4, head=64)
    prompts = ((f"{i:06d}".ljust(PROMPT_TOKENS, "."), str(i)) for i in range(PROMPTS))
    data = random_model.write_prompts(root / "prompts.jsonl", prompts)
    return [f"model={model}", f"data.train={data}"]


def _setting(name: str, root: Path, start: Sequence[str], rounds: int, steps: int) -> dict[str, Any]:
    """Both sides alone, then the modes in turn."""
    overrides = [*start, *COMMON, *SETTINGS[name]]
    alone: list[dict[str, float]] = []
    runs: list[dict[str, Any]] = []
    for number in range(rounds):
        sides = _alone([*overrides, "max_staleness=3"])
        alone.append(sides)
        print(
            f"{name}: generator {sides['generator_alone_s']:.2f} s a step alone, "
            f"{sides['generator_together_s']:.2f} s together; "
            f"learner {sides['learner_alone_s']:.2f} s, {sides['learner_together_s']:.2f} s",
            flush=True,
        )
        for mode, more in MODES.items():
            folder = root / f"{name}-{mode}-{number}"
            shutil.rmtree(folder, ignore_errors=True)
            settings = [*overrides, *more, f"run.dir={folder}", f"train.steps={WARM + steps}"]
            runs.append({"mode": mode, "round": number, **_run(folder, settings, bind=mode != "both")})
            print(
                f"  {mode:<6} {runs[-1]['steps_per_s']:.3f} steps/s, {runs[-1]['tokens_per_s']:.0f} tokens/s",
                flush=True,
            )
    return {"alone": alone, "runs": runs, **compare(alone, runs)}


def compare(alone: Sequence[dict[str, float]], runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Ratios of steps per second, round by round, and the share of the slower side's own speed that the loop reaches."""

    def rates(mode: str) -> list[float]:
        return [run["steps_per_s"] for run in runs if run["mode"] == mode]

    pairs = {f"async/{m}": [a / b for a, b in zip(rates("async"), rates(m), strict=True)] for m in ("sync", "both")}
    reached = {
        f"async/slower side {how}": [
            rate * max(sides[f"generator_{how}_s"], sides[f"learner_{how}_s"])
            for rate, sides in zip(rates("async"), alone, strict=True)
        ]
        for how in ("alone", "together")
    }
    return {"ratios": {**pairs, **reached}}


# --------------------------------------------------------------------------------------------------------------------
# One run


def _run(folder: Path, overrides: Sequence[str], bind: bool) -> dict[str, Any]:
    """Trains; steps and answer tokens per second after the first ``WARM`` steps."""
    prepared = setup.prepare(configs.load(None, overrides))
    c = prepared.config
    with (
        folder.with_suffix(".log").open("w") as log,
        contextlib.redirect_stdout(log),
        Binding() if bind else contextlib.nullcontext() as binding,
    ):
        run.train(prepared)
    rows = [row for row in measured.rows(folder) if row["step"] >= WARM]
    seconds = rows[-1]["time"] - rows[0]["time"]
    tokens = c.train.batch_prompts * c.sampling.n * c.sampling.max_tokens
    rate = (rows[-1]["step"] - rows[0]["step"]) / seconds
    spent = ("learn", "wait_for_batch", "wait_for_stale", "wait_for_weights", "sync")
    return {
        "steps_per_s": round(rate, 4),
        "tokens_per_s": round(rate * tokens, 1),
        "train_tokens": sorted({row["train/tokens"] for row in rows}),
        "bound": sorted(binding.seen.values()) if binding else [],
        **{name: round(statistics.fmean(row[f"time/{name}_s"] for row in rows[1:]), 4) for name in spent},
    }


class Binding:
    """While open, every thread of every generator of this process's Ray is bound to one core, and of every learner rank to
    another. ``seen``: {pid: (role, core)}."""

    def __init__(self) -> None:
        self.seen: dict[int, str] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Binding:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        """A thread inherits its creator's core: only those that were there before need a second look."""
        while not self._done.wait(1.0):
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error, OSError):
                    self._bind(process.pid, " ".join(process.cmdline()))

    def _bind(self, pid: int, title: str) -> None:
        roles = {"GeneratorActor": GENERATOR_CORE, "LearnerRank": LEARNER_CORE}
        for role, core in roles.items():
            if role not in title:
                continue
            for thread in Path(f"/proc/{pid}/task").iterdir():
                with contextlib.suppress(OSError):  # a thread that has just ended
                    os.sched_setaffinity(int(thread.name), {core})
            self.seen[pid] = f"{role} {pid} on core {core}"


# --------------------------------------------------------------------------------------------------------------------
# Each side alone


def _alone(overrides: Sequence[str]) -> dict[str, float]:
    prepared = setup.prepare(configs.load(None, overrides))
    with Binding():
        return asyncio.run(_measure_alone(prepared))


async def _measure_alone(p: Prepared) -> dict[str, float]:
    """Seconds per step of the generator and of the learner, alone and together."""
    c, cluster = p.config, placement.join(2)
    async with contextlib.AsyncExitStack() as stack:
        slot = placement.reserve(cluster, c.learner.ranks, 1.0, "learner")
        learner = await LearnerGroup.start(c, p.model_path, cluster, slot)
        stack.push_async_callback(learner.close)
        stream, ledger = PromptStream(p.prompts, c.seed, c.data.shuffle, c.data.epochs), Ledger()
        buffer = Buffer((c.max_staleness + 1) * c.train.batch_prompts, ledger.order)
        sampler = Sampler(c, p.algorithm, p.options, stream, stream.by_uid(), ledger, buffer)
        fleet = await Fleet.start(c, p.model_path, cluster, 1.0, sampler.wake)
        stack.push_async_callback(fleet.close)
        judges = await Judges.start(c)
        stack.push_async_callback(judges.close)
        published = await learner.publish(Version(1, 0))
        assert published.offer is not None
        fleet.weights.publish(published.offer)
        await fleet.wait_installed(Version(1, 0), c.weights.deadline_s)
        groups = await _sample(sampler, fleet, judges, ALONE_BATCHES * c.train.batch_prompts)
        out = {"generator_alone_s": await _generate(p, fleet, 1), "learner_alone_s": await _learn(p, learner, groups)}
        generating = asyncio.create_task(_generate(p, fleet, 2))
        out["learner_together_s"] = await _learn(p, learner, groups, generating)
        out["generator_together_s"] = await generating
    return {name: round(seconds, 4) for name, seconds in out.items()}


async def _sample(sampler: Sampler, fleet: Fleet, judges: Judges, count: int) -> list[Ready]:
    """Groups for the learner, as the loop makes them; this also warms the generator up."""
    feeding = asyncio.create_task(sampler.feed(fleet, judges))
    while len(sampler.buffer) < count:
        await asyncio.wait({feeding}, timeout=0.05)
        if feeding.done():
            feeding.result()
    sampler.hold = True
    while sampler.flights:
        await asyncio.sleep(0.05)
    feeding.cancel()
    await asyncio.gather(feeding, return_exceptions=True)
    return sampler.buffer.take(count, 0, 0)


async def _generate(p: Prepared, fleet: Fleet, attempt: int) -> float:
    """Seconds per batch: ``max_concurrent`` groups are always in flight until all batches are there."""
    c, (generator,) = p.config, fleet.serving
    sampling = Sampling(c.sampling.n, c.sampling.max_tokens, c.sampling.temperature, seed=c.seed)
    free = asyncio.Semaphore(c.generator.max_concurrent)

    async def one(index: int) -> None:
        prompt = p.prompts[index]
        key = GroupKey(-1, prompt.uid, attempt)
        async with free:
            await fleet.submit(generator, [GroupRequest(key, prompt.tokens, sampling)])
            await fleet.collect(generator, key, c.generator.deadline_s)

    began = time.monotonic()
    await asyncio.gather(*(one(i) for i in range(ALONE_BATCHES * c.train.batch_prompts)))
    return (time.monotonic() - began) / ALONE_BATCHES


async def _learn(
    p: Prepared, learner: LearnerGroup, groups: Sequence[Ready], beside: asyncio.Task[float] | None = None
) -> float:
    """Seconds per step on batches that are there; for as long as ``beside`` runs."""
    c = p.config
    size = c.train.batch_prompts
    batches = [[g.train for g in groups[start : start + size]] for start in range(0, len(groups), size)]
    seconds: list[float] = []
    while (not beside.done()) if beside is not None else (len(seconds) <= 2 * len(batches)):
        number = len(seconds)
        trains = batches[number % len(batches)]
        plans = batch.plan_step(trains, c.learner.ranks, c.learner.mini_batches, Version(1, number), seed=c.seed)
        began = time.monotonic()
        await learner.step(plans)
        seconds.append(time.monotonic() - began)
    # The first one warms up; of those beside something else the last was alone for a part of its time.
    return statistics.fmean(seconds[1:] if beside is None else seconds[:-1] or seconds)


# --------------------------------------------------------------------------------------------------------------------
# The table


def table(found: dict[str, dict[str, Any]]) -> str:
    """Markdown: one row per setting; ratios as mean (lowest - highest of the rounds)."""
    out = [
        "| slower side | generator alone, together | learner alone, together | async | sync | both cores in turn | "
        "async / sync | async / both in turn | async / slower side alone | async / slower side together |",
        "|---" * 10 + "|",
    ]
    for name, setting in found.items():
        ratios = setting["ratios"]
        sides = {key: statistics.fmean(side[key] for side in setting["alone"]) for key in setting["alone"][0]}
        rates = {
            mode: statistics.fmean(r["steps_per_s"] for r in setting["runs"] if r["mode"] == mode) for mode in MODES
        }
        out.append(
            f"| {name} | {sides['generator_alone_s']:.2f}, {sides['generator_together_s']:.2f} s | "
            f"{sides['learner_alone_s']:.2f}, {sides['learner_together_s']:.2f} s | "
            + " | ".join(f"{rates[mode]:.2f} steps/s" for mode in MODES)
            + " | "
            + " | ".join(_spread(values) for values in ratios.values())
            + " |"
        )
    return "\n".join(out)


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} - {max(values):.2f})"


if __name__ == "__main__":
    main()
