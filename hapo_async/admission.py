"""The two rules that hold ``max_staleness`` (eta) without ever looking at an average.

Let count(u) be the untrained groups, in flight or buffered, whose oldest token is of step u or older. At learner step v
the invariant is, for every u: count(u) <= (eta - (v - u) + 1) * B, since B groups leave per step, oldest first, and all of
them must be gone before step u + eta + 1.

*Issue* (``capacity``): capacity_g = min(max_concurrent - running_g, (eta - lag_g + 1) * B - untrained), with lag_g = v - the
step installed on g and ``untrained`` from the ledger. count(u) <= untrained for every u, so issuing keeps the invariant.

*Pass* (``overdue``): a batch takes the oldest *finished* groups; older ones may still be in flight. The learner passes to
v + 1 only when the invariant will hold there without them. Looking only at groups that would break the bound at once is
not enough: more than B of them can pile up behind newer groups that finish earlier. ``excess`` is what has to be given up
where waiting for them takes too long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def capacity(
    *, max_concurrent: int, running: int, max_staleness: int, lag: int, batch_prompts: int, untrained: int
) -> int:
    """Groups that one generator may be given now, never negative."""
    return max(0, min(max_concurrent - running, (max_staleness - lag + 1) * batch_prompts - untrained))


def overdue(
    in_flight: Sequence[int], buffered: Sequence[int], *, step: int, max_staleness: int, batch_prompts: int
) -> int | None:
    """The newest issue step whose in-flight groups the learner at ``step`` must wait for, or None.

    in_flight / buffered: the step of each group's oldest token (for those in flight: of the weights they were issued
    under). The batch that ``step`` would take is the ``batch_prompts`` oldest buffered groups.
    """
    counts = _counts(in_flight, buffered, step, max_staleness, batch_prompts)
    return max((newest for newest, flying, over in counts if flying and over > 0), default=None)


def excess(
    in_flight: Sequence[int], buffered: Sequence[int], *, step: int, max_staleness: int, batch_prompts: int
) -> int:
    """How many of the in-flight groups, oldest first, must go for the learner at ``step`` to pass. Arguments: ``overdue``'s."""
    counts = _counts(in_flight, buffered, step, max_staleness, batch_prompts)
    return max((min(flying, over) for _, flying, over in counts if over > 0), default=0)


def _counts(
    in_flight: Sequence[int], buffered: Sequence[int], step: int, max_staleness: int, batch_prompts: int
) -> Iterator[tuple[int, int, int]]:
    """(u, groups in flight of step u or older, groups left of step u or older beyond what the invariant allows at the next
    step), for each u that it bounds."""
    left = sorted([*sorted(buffered)[batch_prompts:], *in_flight])
    for ahead in range(max_staleness + 1):
        newest = step - max_staleness + ahead
        yield newest, sum(s <= newest for s in in_flight), sum(s <= newest for s in left) - ahead * batch_prompts
