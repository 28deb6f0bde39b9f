"""The buffer hands out the oldest first and nothing too old."""

import numpy as np
import pytest

from hapo_async.buffer import Buffer, Ready
from hapo_async.errors import RunError
from hapo_async.sequences import TrainGroup
from hapo_async.types import GateDecision, GatedGroup, GroupHeader, GroupKey, Prompt, Version


def ready(uid: str, step: int | None) -> Ready:
    key = GroupKey(0, uid, 0)
    version = Version(1, step) if step is not None else None
    header = GroupHeader(key, (1,), ("stop",), (step or 0,), version, version, 1, "g", 0.0)
    prompt = Prompt(uid, (), np.zeros(1, np.int32), "1")
    gate = GateDecision(False, 0, 1, 0.5)
    train = TrainGroup(
        key=key,
        payload=None,
        prompt_length=1,
        prompt_tokens=None,
        teacher=None,
        rows=(),
        confidence=0.5,
        temperature=1.0,
    )
    return Ready(GatedGroup(header, None, prompt, (), gate), train)


def buffer(capacity: int = 10) -> Buffer:
    return Buffer(capacity, order=lambda key: int(key.uid))


def test_takes_the_oldest_version_first_and_then_the_order_of_issue():
    b = buffer()
    for uid, step in [("3", 5), ("2", 4), ("1", 5), ("0", 5)]:
        b.add(ready(uid, step))
    assert [g.key.uid for g in b.take(3, step=5, max_staleness=1)] == ["2", "0", "1"]
    assert len(b) == 1


@pytest.mark.parametrize("step", [4, 8])
def test_refuses_to_hand_out_what_breaks_the_bound(step):
    b = buffer()
    b.add(ready("0", 5))
    with pytest.raises(RunError, match="staleness"):
        b.take(1, step=step, max_staleness=2)


def test_expired_groups_are_taken_out_and_the_others_stay():
    b = buffer()
    for uid, step in [("0", 1), ("1", 2), ("2", 3)]:
        b.add(ready(uid, step))
    assert [g.key.uid for g in b.take_expired(step=4, max_staleness=2)] == ["0"]
    assert [g.key.uid for g in b.take(5, step=4, max_staleness=2)] == ["1", "2"]


def test_demonstrations_have_no_age():
    b = buffer()
    b.add(ready("0", None))
    assert b.oldest_steps() == []
    assert len(b.take(1, step=100, max_staleness=0)) == 1


def test_overflow_is_a_bug_that_is_noticed():
    b = buffer(capacity=1)
    b.add(ready("0", 0))
    with pytest.raises(AssertionError, match="overflows"):
        b.add(ready("1", 0))
