"""The ledger loses nothing and trains nothing twice."""

import random

import pytest

from hapo_async.ledger import Ledger, LedgerError, Place


def identity_holds(ledger: Ledger) -> bool:
    c = ledger.counts()
    return c["issued"] == c["trained"] + c["dropped"] + c["in_flight"] + c["buffered"] + c["to_retry"]


def test_a_prompt_walks_from_issue_to_trained():
    ledger = Ledger()
    key = ledger.issue(0, "a")
    assert ledger.is_current(key)
    ledger.admit(key)
    assert not ledger.is_current(key)
    assert ledger.untrained == 1
    ledger.train(key, step=3)
    assert ledger.untrained == 0
    assert ledger.counts()["trained"] == 1


def test_training_twice_is_refused():
    ledger = Ledger()
    key = ledger.issue(0, "a")
    ledger.admit(key)
    ledger.train(key, 1)
    with pytest.raises(LedgerError, match="trained"):
        ledger.train(key, 2)


def test_a_late_answer_of_an_older_attempt_is_fenced():
    ledger = Ledger()
    first = ledger.issue(0, "a")
    assert ledger.retry(first, "generator died") == 1
    second = ledger.issue(0, "a")
    assert second.attempt == first.attempt + 1
    assert not ledger.is_current(first)
    assert ledger.is_current(second)
    with pytest.raises(LedgerError, match="not the current attempt"):
        ledger.admit(first)


def test_issuing_what_is_in_flight_is_refused():
    ledger = Ledger()
    ledger.issue(0, "a")
    with pytest.raises(LedgerError):
        ledger.issue(0, "a")


def test_the_same_prompt_in_another_epoch_is_another_entry():
    ledger = Ledger()
    ledger.issue(0, "a")
    ledger.issue(1, "a")
    assert ledger.counts()["issued"] == 2


def test_the_identity_holds_under_random_moves():
    rng = random.Random(0)
    ledger, flying, buffered, waiting = Ledger(), [], [], []
    for number in range(3000):
        move = rng.choice(["issue", "issue", "reissue", "admit", "train", "retry", "drop"])
        if move == "issue":
            flying.append(ledger.issue(0, f"p{number}"))
        elif move == "reissue" and waiting:
            old = waiting.pop(rng.randrange(len(waiting)))
            flying.append(ledger.issue(old.epoch, old.uid))
        elif move == "admit" and flying:
            key = flying.pop(rng.randrange(len(flying)))
            ledger.admit(key)
            buffered.append(key)
        elif move == "train" and buffered:
            ledger.train(buffered.pop(0), number)
        elif move == "retry" and (flying or buffered):
            pool = flying or buffered
            key = pool.pop(rng.randrange(len(pool)))
            ledger.retry(key, "x")
            waiting.append(key)
        elif move == "drop" and flying:
            ledger.drop(flying.pop(), "late")
        assert identity_holds(ledger)
    ledger.check(recount=True)
    c = ledger.counts()
    assert (c["in_flight"], c["buffered"], c["to_retry"]) == (len(flying), len(buffered), len(waiting))
    assert min(c[k] for k in ("issued", "trained", "dropped", "in_flight")) > 0


def test_a_resumed_ledger_retries_what_was_not_trained():
    ledger = Ledger()
    trained, buffered, flying, dropped = (ledger.issue(0, uid) for uid in "abcd")
    ledger.admit(trained)
    ledger.train(trained, 1)
    ledger.admit(buffered)
    ledger.drop(dropped, "late")
    resumed = Ledger.resumed(ledger.state_dict())
    resumed.check(recount=True)
    assert resumed.waiting() == [(0, "b"), (0, "c")]
    assert resumed.counts()["trained"] == 1
    assert resumed.dropped_reasons == {"late": 1}
    assert resumed.issue(0, "c").attempt == flying.attempt + 1


def test_a_broken_identity_is_found_at_once_and_a_wrong_entry_before_it_is_committed():
    ledger = Ledger()
    for i in range(100):
        ledger.issue(0, str(i))
    ledger.check()
    ledger._entries[0, "7"].place = Place.TRAINED  # the counts still add up
    ledger.check()
    with pytest.raises(LedgerError, match="entries"):
        ledger.check(recount=True)
    with pytest.raises(LedgerError, match="entries"):
        ledger.state_dict()
    for i in range(30):
        ledger.issue(1, str(i))
    with pytest.raises(LedgerError, match="entries"):
        ledger.check()  # a quarter more: recounted
    lost = Ledger()
    lost.issue(0, "a")
    lost._counts[Place.IN_FLIGHT] = 0
    with pytest.raises(LedgerError, match="1 entries"):
        lost.check()
