"""What ``hapo-async status`` prints of a run's ``status.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from hapo_async.words import plural

PLACES = ("trained", "dropped", "in_flight", "buffered", "to_retry")


def lines(state: Mapping[str, Any]) -> Iterator[str]:
    """For people, of a run that trains."""
    yield f"{state['state']}: step {state['step']} of {state['steps']}, version {state['version']}"
    counts = state["ledger"]
    where = " + ".join(f"{counts[place]} {place.replace('_', ' ')}" for place in PLACES)
    yield f"ledger: {counts['issued']} issued = {where}"
    if state.get("dropped"):
        yield "dropped: " + ", ".join(f"{count} {why}" for why, count in state["dropped"].items())
    actors = {actor["name"]: actor for actor in state.get("actors", ())}
    for g in state["generators"]:
        how = g["state"]
        if how in ("healthy", "dead") and g["name"] in actors:
            how = actors[g["name"]]["state"]
        yield f"{g['name']}: {how}, serves {g['version']}, {plural(g['groups'], 'group')}"
    for role in ("verifier", "learner"):
        if states := Counter(a["state"] for a in actors.values() if a["role"] == role):
            yield f"{role}s: " + ", ".join(f"{count} {name}" for name, count in states.items())
    if told := state.get("scaling"):
        wanted = ", ".join(f"{key}={count}" for key, count in told["wanted"].items())
        yield f"scale {wanted}: {told['state']}: {told['line']}"
    if state["advice"]:
        yield state["advice"]
