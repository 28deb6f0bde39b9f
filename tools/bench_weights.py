"""How fast new weights reach the generators, and how long these stand still for it, beside a plain copy of the same bytes.

    python tools/bench_weights.py                                     # about 20 minutes
    python tools/bench_weights.py --transports zmq --receivers 3 --versions 5
    python tools/bench_weights.py --summary                           # the table of what is measured already

A random model of 300 MB (float32), a real learner rank that makes a real optimizer step before each version, and 1 or 3
generators, all on one machine: everything here shares its cores and its memory bus, so the copies of several receivers
compete, where they would not on a cluster. In each setting the first version warms up; of the others the table has the
median and the range. After each version every generator's log-probs are compared with the learner's.

- step -> serving: from the end of the optimizer step until the last generator serves the new version
- per receiver: bytes of the version / seconds from the first bucket until all have arrived and are verified
- pause: what the generators' sampling stands still, the longest of them; share: of step -> serving
- memcpy: one copy of the same bytes within one process, measured before each setting

Settings run one after the other, each with processes of its own. Writes benchmarks/results/weights.json after each one.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

import measured
import random_model
import weight_rig
from weight_rig import Rig

from actors import placement
from hapo_async.weights import digest

TRANSPORTS, STAGINGS, RECEIVERS, ENGINES = ("ray", "zmq", "gloo"), ("host", "none"), (1, 3), ("transformers", "vllm")
SHAPE = {"hidden": 1024, "layers": 8, "head": 64}
"""75.8 million parameters, 303 MB."""
COLUMNS = ("transport", "staging", "engine", "receivers")
RESULT = "weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS)
    parser.add_argument("--stagings", nargs="+", choices=STAGINGS, default=STAGINGS)
    parser.add_argument("--receivers", nargs="+", type=int, default=RECEIVERS, help="vLLM: the first of these alone")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--versions", type=int, default=5, help="measured versions of a setting")
    parser.add_argument("--bucket-mib", type=int, default=16)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench_weights"))
    parser.add_argument("--summary", action="store_true", help="measure nothing")
    args = parser.parse_args()
    found = _known()
    if not args.summary:
        model = random_model.make(args.runs / "model", **SHAPE)
        for setting in chosen(args):
            found = [s for s in found if not _same(s, setting)]
            found.append(_measure(setting, model, args.versions, args.bucket_mib << 20))
            print(line(found[-1]), flush=True)
            measured.write(RESULT, {"shape": SHAPE, "settings": sorted(found, key=_order)})
    if not found:
        raise SystemExit("nothing is measured")
    print(f"\n{table(sorted(found, key=_order))}\n\nin {measured.RESULTS / RESULT}.json")


def chosen(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Several vLLM engines would measure how they share two cores, so that engine gets one receiver."""
    every = itertools.product(args.engines, args.transports, args.stagings, args.receivers)
    return [
        {"transport": transport, "staging": staging, "engine": engine, "receivers": count}
        for engine, transport, staging, count in every
        if engine == "transformers" or count == args.receivers[0]
    ]


def _known() -> list[dict[str, Any]]:
    path = measured.RESULTS / f"{RESULT}.json"
    return json.loads(path.read_text())["settings"] if path.exists() else []


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return all(a[name] == b[name] for name in COLUMNS)


def _order(setting: dict[str, Any]) -> tuple[int, ...]:
    lists: tuple[Sequence[Any], ...] = (ENGINES, TRANSPORTS, STAGINGS)
    names = ("engine", "transport", "staging")
    return (*(every.index(setting[name]) for name, every in zip(names, lists, strict=True)), setting["receivers"])


def _measure(setting: dict[str, Any], model: str, versions: int, bucket_bytes: int) -> dict[str, Any]:
    """One setting, in a Ray of its own."""
    config = weight_rig.settings(
        setting["transport"],
        setting["staging"],
        setting["engine"],
        generator={"count": setting["receivers"]},
        weights={"bucket_bytes": bucket_bytes, "deadline_s": 60.0},
    )
    copies = plain_copies(303_000_000, versions)
    ray = placement.LocalRay(num_cpus=4)
    try:
        runs = asyncio.run(_publish_all(config, model, versions))
    finally:
        ray.stop()
    return {**setting, "bucket_bytes": bucket_bytes, "memcpy": copies, "versions": runs}


async def _publish_all(config: Any, model: str, versions: int) -> list[dict[str, Any]]:
    rig = await Rig.start(config, model)
    try:
        return [await _publish(rig) for _ in range(1 + versions)][1:]
    finally:
        await rig.close()


async def _publish(rig: Rig) -> dict[str, Any]:
    """One step and one version. Raises AssertionError when a generator then serves anything else."""
    version = await rig.step()
    began = time.perf_counter()
    await rig.trainer.publish()
    left_s = time.perf_counter() - began
    await rig.trainer.everywhere()
    serving_s = time.perf_counter() - began
    installs = [dict(g.last_install) for g in rig.fleet.generators]
    for generator in rig.fleet.generators:
        served, error = await rig.error_of(generator)
        assert served == version and error < weight_rig.EXACT, f"{generator.name} serves {served}, {error:.2g} off"
    return {
        "bytes": int(installs[0]["bytes"]),
        "learner_s": round(left_s, 4),
        "serving_s": round(serving_s, 4),
        "fetch_s": [round(i["fetch_s"], 4) for i in installs],
        "pause_s": [round(i["pause_s"], 4) for i in installs],
    }


def plain_copies(nbytes: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of one copy of ``nbytes`` and of one digest of them, in this process alone."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)

    def copy() -> None:
        np.copyto(target, source)

    return {"copy_s": _timed(copy, repeats), "digest_s": _timed(lambda: digest(target), repeats)}


def _timed(call: Callable[[], Any], repeats: int) -> list[float]:
    out = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        call()
        out.append(round(time.perf_counter() - began, 4))
    return out[1:]


# --------------------------------------------------------------------------------------------------------------------
# Results


def numbers(setting: dict[str, Any]) -> dict[str, list[float]]:
    """What the table shows, one value per version."""
    runs = setting["versions"]
    return {
        "serving_s": [r["serving_s"] for r in runs],
        "learner_s": [r["learner_s"] for r in runs],
        "rate": [r["bytes"] / s / 1e6 for r in runs for s in r["fetch_s"]],
        "pause_ms": [1000 * max(r["pause_s"]) for r in runs],
        "share": [100 * max(r["pause_s"]) / r["serving_s"] for r in runs],
        "copy_s": setting["memcpy"]["copy_s"],
        "times": [r["serving_s"] / statistics.median(setting["memcpy"]["copy_s"]) for r in runs],
    }


def line(setting: dict[str, Any]) -> str:
    n = numbers(setting)
    return (
        f"{setting['engine']:<12} {setting['transport']:<5} {setting['staging']:<5} x{setting['receivers']}  "
        f"serving after {_spread(n['serving_s'], 2)} s, {_spread(n['rate'], 0)} MB/s, pause {_spread(n['pause_ms'], 0)} ms "
        f"({_spread(n['share'], 0)} %), memcpy {_spread(n['copy_s'], 3)} s"
    )


def table(settings: Sequence[dict[str, Any]]) -> str:
    """Markdown: median (range) over versions."""
    out = [
        "| engine | transport | staging | receivers | step → serving | of these the learner | per receiver | pause | "
        "share | memcpy of the same bytes | × memcpy |",
        "|---" * 11 + "|",
    ]
    for s in settings:
        n = numbers(s)
        out.append(
            f"| {s['engine']} | {s['transport']} | {s['staging']} | {s['receivers']} | {_spread(n['serving_s'], 2)} s | "
            f"{_spread(n['learner_s'], 2)} s | {_spread(n['rate'], 0)} MB/s | {_spread(n['pause_ms'], 0)} ms | "
            f"{_spread(n['share'], 0)} % | {_spread(n['copy_s'], 3)} s | {statistics.median(n['times']):.1f} |"
        )
    return "\n".join(out)


def _spread(values: Sequence[float], digits: int) -> str:
    low, middle, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low}–{high})"


if __name__ == "__main__":
    main()
