"""A small version of ``tools/bench_driver.py``: the real driver over real Ray actors that hold no model."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import bench_driver

GENERATORS, IN_FLIGHT = 8, 4


async def enough(bench: bench_driver.Bench, steps: int) -> None:
    """Until so many steps are trained. Raises TimeoutError, or what the driver raises."""
    async with asyncio.timeout(60.0):
        while bench.trainer.version.step < steps:
            await bench.measure(0.0, 0.1)


def test_groups_flow_through_real_actors_and_every_one_is_accounted_for(ray_session):
    async def scenario():
        bench = bench_driver.Bench(GENERATORS, verifiers=1, in_flight=IN_FLIGHT, mean_s=0.1, prompts=64)
        await bench.start()
        await enough(bench, 2)
        found = await bench.measure(warm_s=0.0, seconds=2.0)
        await enough(bench, 4)
        await bench.stop()  # recounts the ledger
        return bench, found

    bench, found = asyncio.run(scenario())
    batch = bench.config.train.batch_prompts
    trained = [(key.epoch, key.uid) for key in bench.learner.trained]
    assert len(trained) == len(set(trained)) > 0
    # The step that was under way when the loops were ended may be trained and not in the ledger.
    assert bench.trained <= len(trained) <= bench.trained + batch
    assert bench.trained == bench.trainer.version.step * batch
    assert 0 <= found["most_stale"] <= bench.config.max_staleness
    assert found["groups_admitted"] > 0 and found["groups_per_s"] > 0
    counts = bench.ledger.counts()
    assert counts["dropped"] == 0
    assert counts["in_flight"] == len(bench.sampler.flights)
    assert counts["buffered"] - len(bench.buffer) in (0, batch)
    assert {g.installed.incarnation for g in bench.fleet.generators} == {1}
    latencies = found["ms"]
    own = latencies["known_to_admitted_without_the_verifier"]["p50"]
    assert 0 < own <= latencies["known_to_admitted"]["p50"] <= latencies["finished_on_the_generator_to_admitted"]["p50"]
    assert latencies["room_to_issue"]["p99"] > 0
