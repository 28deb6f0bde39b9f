"""Faults in the middle of weight transfers: does anything wrong ever serve, and what does it cost those that are well?

    python tools/weights_chaos.py                          # all: about half an hour; the same command goes on where it was
    python tools/weights_chaos.py --transports zmq --seed 1
    python tools/weights_chaos.py --summary

Per transport, on real actors: a generator is killed or stopped (SIGKILL, SIGSTOP) while its second, third ... bucket
arrives, 15 times with the transformers engine (5 of them in place, ``weights.staging=none``) and 6 times with vLLM, of these
4 times its engine's process; and buckets are damaged, at one generator or on their way out of the learner
(``weight_faults.DAMAGE``). Which generator and which bucket are drawn from the seed.

After every fault one more version is published without any. Each line of <runs>/faults.jsonl says

- publish_s, next_s: what the learner waited for the faulty version and for the next one; lost_s: their difference
- others_lost: versions that generators which were well did not get before the next one left the learner
- others_s: seconds from the start of the faulty publish until the generators that are well served that version
- back_s: seconds from the start of the faulty publish until the generator served the newest version (two versions later;
  a restarted one has another pid)
- looks, worst: how often generators were asked what they serve meanwhile, and the largest difference from the learner's
  log-probs of that version
- problems: what must not be; empty when all is well

A deadline is 5 s here. Restarts are not rationed as in a run (``driver/restarts.py``), where three deaths in ten minutes are
too many. Only processes of this command's own Ray are ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import math
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import measured
import random_model
import weight_rig
from weight_faults import DAMAGE, Fault, FaultyGenerator, FaultyRank
from weight_rig import Rig, Said, Watch, eventually

from actors import placement
from hapo_async.driver import restarts, starter
from hapo_async.driver.distribution import GRACE_S
from hapo_async.driver.generators import Generator
from hapo_async.errors import RunError
from hapo_async.types import Version

TRANSPORTS = ("ray", "zmq", "gloo")
DEADLINE_S = 5.0
SLACK_S = GRACE_S + 1.0  # until who is silent counts as gone, and a machine whose cores are shared
BACK_S = 120.0  # a vLLM engine starts in half a minute, beside others
SHAPE = {"hidden": 128, "layers": 6}
BUCKET_BYTES = 1 << 18
BUCKETS = 12
"""At least so many buckets make a version of this model."""
GENERATORS = {"transformers": 3, "vllm": 2}
KILLS = {
    ("transformers", "host"): {"kill": 6, "stop": 4},
    ("transformers", "none"): {"kill": 3, "stop": 2},
    ("vllm", "host"): {"kill-engine": 2, "stop-engine": 2, "kill": 1, "stop": 1},
}


@dataclass(frozen=True)
class Case:
    """One fault. at: "generator" or "learner". All of a block run on one fleet."""

    transport: str
    engine: str
    staging: str
    number: int
    fault: Fault
    at: str
    victim: int

    @property
    def block(self) -> tuple[str, str, str]:
        return self.transport, self.engine, self.staging

    @property
    def name(self) -> str:
        return f"{self.transport}-{self.engine}-{self.staging}-{self.number}-{self.fault.what}"


def cases(transports: Sequence[str], seed: int) -> list[Case]:
    out = []
    for transport in transports:
        for (engine, staging), kills in KILLS.items():
            rng = random.Random(f"{seed}-{transport}-{engine}-{staging}")
            wanted = [(what, "generator") for what, count in kills.items() for _ in range(count)]
            wanted += [(what, "generator") for what in DAMAGE]
            if engine == "transformers":
                wanted += [(what, "learner") for what in DAMAGE]
            rng.shuffle(wanted)
            for number, (what, at) in enumerate(wanted):
                fault = Fault(what, rng.randrange(1, BUCKETS - 2))
                out.append(Case(transport, engine, staging, number, fault, at, rng.randrange(GENERATORS[engine])))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--engines", nargs="+", choices=GENERATORS, default=list(GENERATORS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs/weights_chaos"))
    parser.add_argument("--summary", action="store_true", help="break nothing")
    args = parser.parse_args()
    journal = args.runs / f"faults-{args.seed}.jsonl"
    wanted = [case for case in cases(args.transports, args.seed) if case.engine in args.engines]
    if not args.summary:
        model = random_model.make(args.runs / "model", **SHAPE)
        for block in dict.fromkeys(case.block for case in wanted):
            done = {row["name"] for row in rows(journal)}
            if todo := [case for case in wanted if case.block == block and case.name not in done]:
                _run_block(todo, model, journal)
    found = rows(journal)
    if not found:
        raise SystemExit("no fault has been tried")
    content = {"seed": args.seed, "deadline_s": DEADLINE_S, "summary": summary(found), "faults": found}
    print(f"\n{table(found)}\n\nwritten to {measured.write('weights_chaos', content)}")
    sys.exit(1 if any(row["problems"] for row in found) else 0)


def rows(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in journal.read_text().splitlines()] if journal.exists() else []


def _run_block(todo: Sequence[Case], model: str, journal: Path) -> None:
    """Faults one after the other, on one fleet in a Ray of its own; a line for each as soon as it is over."""
    local = placement.LocalRay(num_cpus=8)
    try:
        asyncio.run(_break_all(todo, model, journal))
    finally:
        local.stop()


async def _break_all(todo: Sequence[Case], model: str, journal: Path) -> None:
    starter.GeneratorActor = FaultyGenerator
    restarts.MOST, restarts.BACKOFF_S = 1000, (0.1,) * 1000
    first = todo[0]
    config = weight_rig.settings(
        first.transport,
        first.staging,
        first.engine,
        generator={"count": GENERATORS[first.engine]},
        weights={"bucket_bytes": BUCKET_BYTES, "deadline_s": DEADLINE_S},
    )
    rig = await Rig.start(config, model, rank=FaultyRank)
    try:
        await rig.note_truth()
        await _publish(rig)
        for case in todo:
            row = {"name": case.name, "transport": case.transport, **await _one(rig, case)}
            journal.parent.mkdir(parents=True, exist_ok=True)
            with journal.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(line(row), flush=True)
    finally:
        await rig.close()


async def _publish(rig: Rig) -> float:
    """Seconds that the learner gives to a version. Afterwards the generators that are well have it, or a deadline is over."""
    began = time.monotonic()
    await rig.trainer.publish()
    seconds = time.monotonic() - began
    with contextlib.suppress(RunError):
        await rig.trainer.everywhere()
    return seconds


# --------------------------------------------------------------------------------------------------------------------
# One fault


async def _one(rig: Rig, case: Case) -> dict[str, Any]:
    victim = rig.member(f"generator-{case.victim}")
    assert victim is not None and victim.serves
    others = [g for g in rig.fleet.generators if g is not victim]
    pids = await _pids(victim)
    target = rig.learner.ranks[0] if case.at == "learner" else victim.actor
    looks, rig.worst = rig.looked, 0.0
    served_at: dict[tuple[str, Version], float] = {}
    rig.fleet.weights.on_installed.append(lambda g, v: served_at.setdefault((g.name, v), time.monotonic()))
    async with Said() as said, Watch(rig) as watch:
        version = await rig.step()
        await target.arm.remote(case.fault)
        began = time.monotonic()
        publish_s = await _publish(rig)
        lost = max(int(g.installed != version) for g in others)
        signalled = case.fault.what not in DAMAGE
        if not signalled and not await target.fired.remote():
            said.lines.append("the fault did not happen")
        served = victim.installed if victim.alive else None
        newest = await rig.step()
        next_s = await _publish(rig)
        behind = [g.name for g in others if g.installed != newest]
        back_s = await _back(rig, victim, newest, began)
        rig.fleet.weights.on_installed.pop()
    row = {
        "engine": case.engine,
        "staging": case.staging,
        "fault": case.fault.what,
        "at": case.at,
        "after": case.fault.after,
        "victim": victim.name,
        "publish_s": round(publish_s, 3),
        "next_s": round(next_s, 3),
        "lost_s": round(publish_s - next_s, 3),
        "others_s": round(max(served_at.get((g.name, version), math.inf) for g in others) - began, 3),
        "others_lost": lost if case.at == "generator" else None,
        "victim_got_it": served == version,
        "back_s": back_s if back_s is None else round(back_s, 3),
        "new_pid": back_s is not None and (await _pids(rig.member(victim.name)))[0] != pids[0],
        "looks": rig.looked - looks,
        "worst": float(f"{rig.worst:.3g}"),
        "said": said.lines[:4],
    }
    return row | {"problems": [*watch.wrong, *_problems(row, case, behind, await _leftover(pids, row["new_pid"]))]}


def _problems(row: dict[str, Any], case: Case, behind: Sequence[str], left: Sequence[int]) -> list[str]:
    """What the rules of the weight transaction forbid."""
    out = []
    if row["lost_s"] > DEADLINE_S + SLACK_S:
        out.append(f"the learner lost {row['lost_s']:.1f} s, more than a deadline")
    if behind:
        out.append(f"{', '.join(behind)} lost more than one version")
    if row["back_s"] is None:
        out.append(f"{row['victim']} was not back after {BACK_S:.0f} s")
    if left:
        out.append(f"processes {list(left)} of the dead generator live on")
    if case.fault.what in DAMAGE:
        if "the fault did not happen" in row["said"]:
            out.append("the fault did not happen")
        elif case.fault.what in ("flip", "drop", "swap") and not row["said"]:
            out.append("nobody noticed")
    elif not row["new_pid"] and row["back_s"] is not None:
        out.append("the signal did not end or stop it")
    if not row["looks"]:
        out.append("nobody looked")
    return out


async def _back(rig: Rig, victim: Generator, newest: Version, since: float) -> float | None:
    """Seconds since ``since`` until it serves the newest version, as training would make that possible; None: never."""
    until = time.monotonic() + BACK_S
    while time.monotonic() < until:
        now = rig.member(victim.name)
        if now is not None and now.serves and now.installed == newest:
            with contextlib.suppress(Exception):
                if (await rig.error_of(now))[1] < weight_rig.EXACT:
                    return time.monotonic() - since
        with contextlib.suppress(RunError):
            await rig.trainer.everywhere()
        await asyncio.sleep(0.1)
    return None


async def _pids(generator: Generator) -> list[int]:
    """The generator's process, then those of its engine."""
    pid = (await rig_stats(generator))["pid"]
    return [pid, *(p.pid for p in psutil.Process(pid).children(recursive=True))]


async def rig_stats(generator: Generator) -> dict[str, Any]:
    stats: dict[str, Any] = await generator.actor.stats.remote()
    return stats


async def _leftover(pids: Sequence[int], replaced: bool | None) -> list[int]:
    """Which processes of a generator that was replaced are still there after 15 s."""
    if not replaced:
        return []
    with contextlib.suppress(TimeoutError):
        await eventually("the dead generator's processes end", lambda: not _alive(pids), 15.0, every_s=0.2)
    return _alive(pids)


def _alive(pids: Sequence[int]) -> list[int]:
    out = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                out.append(pid)
    return out


# --------------------------------------------------------------------------------------------------------------------
# Results


def line(row: dict[str, Any]) -> str:
    back = "never" if row["back_s"] is None else f"{row['back_s']:.1f} s"
    trouble = f"  PROBLEMS: {'; '.join(row['problems'])}" if row["problems"] else ""
    return (
        f"{row['transport']:<5} {row['engine']:<12} {row['staging']:<5} {row['fault']:<11} at the {row['at']:<9} publish "
        f"{row['publish_s']:.2f} s, next {row['next_s']:.2f} s, back after {back}, {row['looks']} looks{trouble}"
    )


def summary(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """By transport and fault."""
    out = []
    for transport, fault in sorted({(row["transport"], row["fault"]) for row in found}):
        mine = [row for row in found if (row["transport"], row["fault"]) == (transport, fault)]
        back = [row["back_s"] for row in mine if row["back_s"] is not None]
        out.append(
            {
                "transport": transport,
                "fault": fault,
                "times": len(mine),
                "lost_s_max": max(row["lost_s"] for row in mine),
                "others_s_max": max(row["others_s"] for row in mine),
                "others_lost_max": max((row["others_lost"] or 0 for row in mine), default=0),
                "back_s_median": round(statistics.median(back), 2) if back else None,
                "back_s_max": max(back, default=None),
                "looks": sum(row["looks"] for row in mine),
                "worst": max(row["worst"] for row in mine),
                "problems": sum(bool(row["problems"]) for row in mine),
            }
        )
    return out


def table(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    out = [
        "| transport | fault | times | learner lost at most | others lost at most | back after (median, max) | looks | "
        "worst difference | problems |",
        "|---" * 9 + "|",
    ]
    for s in summary(found):
        back = "never" if s["back_s_max"] is None else f"{s['back_s_median']:.1f}, {s['back_s_max']:.1f} s"
        out.append(
            f"| {s['transport']} | {s['fault']} | {s['times']} | {max(0.0, s['lost_s_max']):.1f} s | {s['others_lost_max']} "
            f"versions | {back} | {s['looks']} | {s['worst']:.1g} | {s['problems']} |"
        )
    hit = Counter(row["transport"] for row in found if row["fault"] not in DAMAGE)
    killed = ", ".join(f"{name} {count}" for name, count in sorted(hit.items()))
    return "\n".join([f"Killed or stopped in the middle of a transfer: {killed}.", "", *out])


if __name__ == "__main__":
    main()
