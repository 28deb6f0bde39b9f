"""Where everything of a run waits at one moment: what the watchdog writes beside an alarm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from actors.calls import Pending
from hapo_async.buffer import Buffer
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.sampling import Sampler
from hapo_async.ledger import Ledger


def describe(call: Pending, sampler: Sampler, now: float) -> str:
    """A pending call in words: method, group, and for how long; of a verifier's, where the answers are."""
    flight = sampler.flights.get(call.key) if call.key is not None else None
    group = f" of group {call.key}" if call.key is not None else ""
    held = f" (its answers are on {flight.generator})" if flight and call.method == "judge" else ""
    return f"{call.method}{group} for {now - call.since:.3g} s{held}"


def snapshot(
    calls: Sequence[Pending], fleet: Fleet, sampler: Sampler, buffer: Buffer, ledger: Ledger, now: float
) -> dict[str, Any]:
    """Flights by stage and by generator, the buffer, the ledger, versions, and the pending calls of each actor. Ages are
    in seconds, those of the buffer in learner steps. now: ``time.monotonic``."""
    flights = list(sampler.flights.values())
    stages = {
        stage: {"groups": len(held), "oldest_s": max(now - f.started for f in held)}
        for stage in sorted({f.stage for f in flights})
        if (held := [f for f in flights if f.stage == stage])
    }
    ages = Counter(sampler.step - step for step in buffer.oldest_steps())
    return {
        "step": sampler.step,
        "flights": stages,
        "generators": {
            g.name: _of_generator(g, [f for f in flights if f.generator == g.name], now) for g in fleet.generators
        },
        "buffer": {
            "groups": len(buffer),
            "capacity": buffer.capacity,
            "ages": {str(a): n for a, n in sorted(ages.items())},
        },
        "ledger": ledger.counts(),
        "pending": {
            actor: _of_actor([c for c in calls if c.actor == actor], now) for actor in sorted({c.actor for c in calls})
        },
    }


def _of_generator(generator: Any, flights: Sequence[Any], now: float) -> dict[str, Any]:
    return {
        "alive": generator.alive,
        "detached": generator.detached,
        "version": str(generator.installed),
        "groups": len(generator.outstanding),
        "tokens": sum(generator.outstanding.values()),
        "oldest_s": max((now - f.started for f in flights), default=0.0),
    }


def _of_actor(calls: Sequence[Pending], now: float) -> dict[str, Any]:
    oldest = min(calls, key=lambda call: call.since)
    return {
        "calls": dict(Counter(call.method for call in calls)),
        "oldest": oldest.method,
        "oldest_s": now - oldest.since,
        "group": str(oldest.key) if oldest.key is not None else "",
    }
