"""Does the bound hold? 500 learner steps at max_staleness 0, 1 and 4, under conditions that make it hard, then counted.

    python tools/staleness_bound.py                   # about ten minutes on two quiet cores
    python tools/staleness_bound.py --etas 1 --steps 60

Three real generators, the second twice and the third five times as slow as the first; answers with heavy-tailed lengths
(4 to 200 tokens, each prompt names its own); a learner that finds 5% of its steps non-finite and skips them; every
group kept in rollouts/. Afterwards, from rollouts/ and from what the generators wrote down when they were asked:

- the age of every trained token, from the version that sampled it, is between 0 and max_staleness
- no prompt was trained twice, no answer is shorter than it was to be, and the run came to its end
- the lengths of trained groups are those of issued ones: two-sample Kolmogorov-Smirnov, and the share of each length bucket

max_staleness=0 is also compared with itself: three uneven generators give the answers and weights of a single one
(``--steps-equal`` steps). That such a run equals a plain synchronous loop is
tests/actors/test_learner.py::test_synchronous_training_equals_the_plain_loop.

Writes benchmarks/results/staleness_bound.json. Exit code 1 when something does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import random
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measured
import random_model
from scipy import stats

from actors import placement
from actors.generator import GeneratorActor
from actors.learner import LearnerGroup, LearnerRank
from hapo_async import config as configs
from hapo_async.driver import run, setup, starter, starting
from hapo_async.types import GroupRequest, Version

SLOWER = {"generator-0": 1, "generator-1": 2, "generator-2": 5}
SKIPPED = 0.05
SHORTEST, LONGEST, TAIL = 4, 200, 1.2
BUCKETS = (4, 6, 9, 16, 32, 64, 128, LONGEST + 1)
SIGMAS = 4.0  # a bucket's share of trained groups may differ from the whole's by so many standard errors
PROMPTS = 4000
COMMON = [
    *("algorithm=grpo", f"verifier.name={random_model.REWARD}", "data.chat_template=false", "learner.lr=1e-5"),
    *("sampling.n=2", f"sampling.max_tokens={LONGEST}", "train.batch_prompts=4", "learner.max_bad_steps=50"),
    *("generator.engine=transformers", "generator.max_concurrent=8", "staleness.late=wait"),
    *("train.checkpoint_every=0", "rollouts.sample=1.0"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--etas", type=int, nargs="+", default=[0, 1, 4])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--steps-equal", type=int, default=20)
    parser.add_argument("--runs", type=Path, default=Path("runs/staleness_bound"))
    args = parser.parse_args()
    model = random_model.make(args.runs / "model")
    data = random_model.write_prompts(args.runs / "prompts.jsonl", _prompts())
    start = [f"model={model}", f"data.train={data}", *COMMON]
    starter.GeneratorActor, starting.LearnerGroup = Uneven, Skipping  # type: ignore[misc, assignment]
    ray = placement.LocalRay(num_cpus=5)
    found = []
    try:
        for eta in args.etas:
            folder = args.runs / f"eta-{eta}"
            settings = [f"max_staleness={eta}", f"generator.count={len(SLOWER)}", f"train.steps={args.steps}"]
            seconds = train(folder, [*start, *settings])
            found.append({"eta": eta, "seconds": seconds, **count(folder, eta, args.steps)})
            print(line(found[-1]), flush=True)
        equal = compare_with_one(args.runs, start, args.steps_equal)
        print(f"max_staleness=0, {len(SLOWER)} uneven generators against one: {equal}")
    finally:
        ray.stop()
    failures = [f"eta {row['eta']}: {text}" for row in found for text in row["failures"]] + equal["failures"]
    content = {
        "slower": SLOWER,
        "skipped": SKIPPED,
        "common": COMMON,
        "steps": args.steps,
        "equal": equal,
        "runs": found,
    }
    print(f"\nwritten to {measured.write('staleness_bound', content)}")
    if failures:
        raise SystemExit("\n".join(["DOES NOT HOLD", *failures]))
    print("everything holds")


def _prompts() -> Iterator[tuple[str, str]]:
    """Each ends with the length of its answers: a discrete Pareto distribution, cut at LONGEST."""
    rng = random.Random(0)
    for index in range(PROMPTS):
        length = min(LONGEST, math.floor(SHORTEST / (1 - rng.random()) ** (1 / TAIL)))
        yield f"{index:05d}:{length:03d}", str(length)


def train(folder: Path, overrides: Sequence[str]) -> float:
    """One run, from its start; its seconds."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with folder.with_suffix(".log").open("w") as log, contextlib.redirect_stdout(log):
        outcome = run.train(setup.prepare(configs.load(None, [f"run.dir={folder.resolve()}", *overrides])))
    if not outcome.finished:
        raise SystemExit(f"{folder.name} was stopped by a signal")
    return round(time.monotonic() - began, 1)


# --------------------------------------------------------------------------------------------------------------------
# The conditions


class Uneven(GeneratorActor):
    """Gives each prompt's answers the length that it names, takes SLOWER times as long for a token as it could, and writes
    down what it was asked for."""

    async def _start(self) -> Any:
        engine: Any = await super()._start()
        step, factor = engine._sampler.step, SLOWER[self.name]

        def slowly() -> Any:
            began = time.perf_counter()
            done = step()
            time.sleep((factor - 1) * (time.perf_counter() - began))
            return done

        engine._sampler.step = slowly
        return engine

    async def submit(self, requests: list[GroupRequest]) -> None:
        forced = []
        with (Path(self.config.run.dir) / f"issued-{self.name}.jsonl").open("a") as file:
            for request in requests:
                length = int(self._tokenizer.decode(request.prompt_tokens).split(":")[1])
                forced.append(replace(request, sampling=replace(request.sampling, max_tokens=length)))
                row = {"key": list(request.key), "length": length, "step": self.engine.version.step}
                file.write(json.dumps(row) + "\n")
        await super().submit(forced)


class SkippingRank(LearnerRank):
    """Finds the loss of a share of its steps non-finite."""

    _rng = random.Random(0)

    def step(self, plan: Any) -> Any:
        from hapo_async.learner import learn

        objective = learn.objective

        def poisoned(*args: Any, **kwargs: Any) -> Any:
            loss, found = objective(*args, **kwargs)
            return loss * math.nan, found

        learn.objective = poisoned if self._rng.random() < SKIPPED else objective
        try:
            return super().step(plan)
        finally:
            learn.objective = objective


class Skipping(LearnerGroup):
    @classmethod
    async def start(cls, *args: Any, **kwargs: Any) -> LearnerGroup:
        return await super().start(*args, rank_class=SkippingRank, **kwargs)


# --------------------------------------------------------------------------------------------------------------------
# Counting


def count(folder: Path, eta: int, steps: int) -> dict[str, Any]:
    """What rollouts/ and the generators' own records say, and what of it is not as promised."""
    rows = trained_groups(folder)
    metrics = measured.rows(folder)
    issued = issued_lengths(folder, steps - 1 - eta)
    ages: Counter[int] = Counter()
    for row in rows:
        for answer in row["answers"]:
            for version, first, end in answer["spans"]:
                ages[row["step"] - Version.parse(version).step] += end - first
    prompts = Counter(tuple(row["key"][:2]) for row in rows)
    cut = sum(len(a["tokens"]) != int(row["truth"]) for row in rows for a in row["answers"])
    lengths = compare_lengths(
        list(issued.values()), [int(row["truth"]) for row in rows if tuple(row["key"][:2]) in issued]
    )
    out: dict[str, Any] = {
        "steps": metrics[-1]["step"],
        "skipped_steps": round(
            sum(metrics[-1].get(f"ledger/dropped/{why}", 0) for why in ("skipped_step", "poisoned")) / 4
        ),
        "groups": len(rows),
        "tokens": sum(ages.values()),
        "tokens_by_age": dict(sorted(ages.items())),
        "spans_per_answer": round(sum(len(a["spans"]) for r in rows for a in r["answers"]) / (2 * len(rows)), 3),
        "groups_by_generator": dict(sorted(Counter(row["generator"] for row in rows).items())),
        "trained_twice": sum(n - 1 for n in prompts.values()),
        "cut_answers": cut,
        "longest_wait_s": round(max(m["time/wait_for_batch_s"] + m["time/wait_for_stale_s"] for m in metrics), 2),
        "lengths": lengths,
    }
    rules = {
        f"the run ended at step {out['steps']} of {steps}": out["steps"] == steps,
        f"ages {min(ages)} to {max(ages)}": min(ages) >= 0 and max(ages) <= eta,
        f"{out['trained_twice']} prompts were trained twice": out["trained_twice"] == 0,
        f"{cut} answers are shorter than they were to be": cut == 0,
        f"{len(rows)} groups in rollouts/ for {steps} steps": len(rows) == 4 * steps,
        f"no step was skipped in {steps}": out["skipped_steps"] > 0 or steps < 100,
        f"lengths: p = {lengths['ks_p']}": lengths["ks_p"] > 0.05,
        f"lengths: a bucket is off by {lengths['worst_sigmas']} standard errors": lengths["worst_sigmas"] < SIGMAS,
    }
    return {**out, "failures": [text for text, holds in rules.items() if not holds]}


def trained_groups(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for file in sorted((folder / "rollouts").glob("*.jsonl")) for text in file.open()]


def issued_lengths(folder: Path, last_step: int) -> dict[tuple[int, str], int]:
    """Length by prompt, of those that any generator was asked for under version ``last_step`` or before: they must have been
    trained, or skipped, by the end. Of later ones the end of the run leaves the longest unfinished."""
    found = {}
    for file in folder.glob("issued-*.jsonl"):
        for row in map(json.loads, file.open()):
            if row["step"] <= last_step:
                found[tuple(row["key"][:2])] = row["length"]
    return found


def compare_lengths(issued: Sequence[int], trained: Sequence[int]) -> dict[str, Any]:
    """Kolmogorov-Smirnov over all groups, and by bucket which share of the issued ones was trained."""
    ks = stats.ks_2samp(issued, trained)
    share = len(trained) / len(issued)
    buckets, worst = [], 0.0
    for low, high in itertools.pairwise(BUCKETS):
        n, m = (sum(low <= length < high for length in lengths) for lengths in (issued, trained))
        sigmas = (m - n * share) / math.sqrt(n * share * (1 - share)) if n and share < 1 else 0.0
        worst = max(worst, abs(sigmas))
        buckets.append({"tokens": f"{low}-{high - 1}", "issued": n, "trained": m, "sigmas": round(sigmas, 2)})
    return {
        "issued": len(issued),
        "trained": len(trained),
        "ks": round(float(ks.statistic), 4),
        "ks_p": round(float(ks.pvalue), 4),
        "worst_sigmas": round(worst, 2),
        "buckets": buckets,
    }


def line(row: dict[str, Any]) -> str:
    lengths = row["lengths"]
    return (
        f"max_staleness {row['eta']}: {row['steps']} steps in {row['seconds']:.0f} s, {row['skipped_steps']} skipped; tokens by "
        f"age {row['tokens_by_age']}; trained twice {row['trained_twice']}; lengths of {lengths['trained']} trained and "
        f"{lengths['issued']} issued groups: KS {lengths['ks']} (p = {lengths['ks_p']}), worst bucket "
        f"{lengths['worst_sigmas']} standard errors{''.join('; FAILS: ' + text for text in row['failures'])}"
    )


def compare_with_one(root: Path, start: Sequence[str], steps: int) -> dict[str, Any]:
    """Synchronous runs on one and on three generators: their answers, and the largest relative difference of a weight."""
    from safetensors.torch import load_file

    folders = [root / f"equal-{number}" for number in (1, len(SLOWER))]
    for folder, number in zip(folders, (1, len(SLOWER)), strict=True):
        train(folder, [*start, "max_staleness=0", f"generator.count={number}", f"train.steps={steps}"])
    answers = [
        {(row["step"], *row["key"][:2]): [a["tokens"] for a in row["answers"]] for row in trained_groups(folder)}
        for folder in folders
    ]
    one, many = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    worst = max(float((one[name] - many[name]).norm() / one[name].norm()) for name in one)
    same = answers[0] == answers[1]
    failures = [] if same and worst < 1e-4 else ["synchronous training depends on the number of generators"]
    return {"steps": steps, "same_answers": same, "weights_relative_difference": worst, "failures": failures}


if __name__ == "__main__":
    main()
