"""Going back to a checkpoint: which versions count, and what the ledger says."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from hapo_async.ledger import Ledger, LedgerError
from hapo_async.lineage import Lineage
from hapo_async.types import Answer, Group, GroupHeader, GroupKey, Segment, Source, Version, VersionSpan


def header(*versions: Version) -> GroupHeader:
    """Of a group whose one answer has a token of each version."""
    spans = tuple(VersionSpan(v, i, i + 1) for i, v in enumerate(versions))
    count = len(versions)
    segment = Segment(Source.POLICY, np.zeros(count, np.int32), np.zeros(count, np.float32), spans)
    group = Group(GroupKey(0, "a", 0), np.zeros(2, np.int32), (Answer(0, (segment,), "stop"),), 1.0, "g", 1)
    return GroupHeader.of(group, 0.0)


def test_versions_past_a_cut_are_gone_and_those_of_later_incarnations_count():
    lineage = Lineage()
    assert not lineage.is_discarded(Version(1, 9))
    lineage.cut(Version(1, 5))
    gone = [Version(i, s) for i in (0, 1, 2) for s in (4, 5, 6) if lineage.is_discarded(Version(i, s))]
    assert gone == [(0, 6), (1, 6)]
    lineage.cut(Version(2, 3))
    assert lineage.is_discarded(Version(2, 4)) and lineage.is_discarded(Version(1, 4))
    assert not lineage.is_discarded(Version(3, 4)) and not lineage.is_discarded(Version(1, 3))


def test_one_token_is_enough_wherever_it_stands():
    """The newest and the oldest version of a group may count though one between them does not."""
    lineage = Lineage()
    lineage.cut(Version(1, 5))
    assert lineage.discards(header(Version(1, 4), Version(1, 7), Version(2, 5)))
    assert not lineage.discards(header(Version(1, 4), Version(1, 5), Version(2, 5), Version(2, 6)))
    assert not lineage.discards(header())


def test_the_ledger_goes_back_and_fences_what_is_on_its_way():
    ledger = Ledger()
    trained, buffered, flying, kept = (ledger.issue(0, uid) for uid in "abcd")
    ledger.admit(trained)
    ledger.train(trained, 1)
    ledger.admit(buffered)
    state = json.loads(json.dumps(ledger.state_dict()))

    ledger.train(buffered, 2)
    ledger.drop(flying, "zero_variance")
    ledger.admit(kept)
    late = ledger.issue(0, "e")
    assert ledger.roll_back(state, {kept}) == 1
    assert ledger.counts() == {"issued": 5, "in_flight": 0, "buffered": 1, "to_retry": 3, "trained": 1, "dropped": 0}
    assert ledger.waiting() == [(0, "b"), (0, "c"), (0, "e")] and not ledger.dropped_reasons
    again = [ledger.issue(0, uid) for uid in "bce"]
    assert [key.attempt for key in again] == [1, 1, 1] and not ledger.is_current(late)
    with pytest.raises(LedgerError):
        ledger.admit(late)
    ledger.train(kept, 2)


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happened_since_the_identity_holds_and_nothing_is_lost(seed):
    rng, ledger = random.Random(seed), Ledger()
    current: dict[str, GroupKey] = {}
    saved = [ledger.state_dict()]
    for step in range(400):
        counts = ledger.counts()
        uid = f"p{rng.randrange(40)}"
        move = rng.choice(["issue", "admit", "train", "drop", "retry", "save", "back"])
        key = current.get(uid)
        try:
            if move == "issue":
                current[uid] = ledger.issue(0, uid)
            elif move == "save":
                saved.append(json.loads(json.dumps(ledger.state_dict())))
            elif move == "back" and rng.random() < 0.2:
                ledger.roll_back(saved[-1], set(rng.sample(sorted(current.values()), len(current) // 2)))
            elif key is not None and move == "train":
                ledger.train(key, step)
            elif key is not None and move in ("admit", "drop", "retry"):
                getattr(ledger, move)(*((key,) if move == "admit" else (key, "x")))
        except LedgerError:
            assert ledger.counts() == counts, "a move that is refused changes nothing"
        ledger.check(recount=True)
        assert sum(ledger.dropped_reasons.values()) == ledger.counts()["dropped"]
    ledger.roll_back(saved[-1], ())
    before = Ledger.resumed(saved[-1])
    assert ledger.counts()["trained"] == before.counts()["trained"]
    assert ledger.counts()["issued"] >= before.counts()["issued"]
