"""What people read of a run's status."""

from __future__ import annotations

from hapo_async.status import lines

STATE = {
    "state": "running",
    "step": 7,
    "steps": 20,
    "version": "2.7",
    "ledger": {"issued": 60, "in_flight": 8, "buffered": 2, "to_retry": 1, "trained": 46, "dropped": 3},
    "dropped": {"zero_variance": 2, "poisoned": 1},
    "generators": [
        {"name": "generator-0", "state": "healthy", "version": "2.7", "groups": 8},
        {"name": "generator-1", "state": "dead", "version": "1.9", "groups": 1},
        {"name": "generator-2", "state": "lent", "version": "2.6", "groups": 0},
    ],
    "actors": [
        {"name": "generator-0", "role": "generator", "state": "stale"},
        {"name": "generator-1", "role": "generator", "state": "restarting"},
        {"name": "generator-2", "role": "generator", "state": "healthy"},
        {"name": "verifier-0", "role": "verifier", "state": "healthy"},
        {"name": "verifier-1", "role": "verifier", "state": "suspect"},
        {"name": "learner rank 0", "role": "learner", "state": "healthy"},
    ],
    "scaling": {"wanted": {"generators": 3}, "state": "under way", "line": "starting 1 generators"},
    "advice": "",
}


def test_the_identity_can_be_added_up_and_everybody_has_a_state():
    assert list(lines(STATE)) == [
        "running: step 7 of 20, version 2.7",
        "ledger: 60 issued = 46 trained + 3 dropped + 8 in flight + 2 buffered + 1 to retry",
        "dropped: 2 zero_variance, 1 poisoned",
        "generator-0: stale, serves 2.7, 8 groups",
        "generator-1: restarting, serves 1.9, 1 group",
        "generator-2: lent, serves 2.6, 0 groups",
        "verifiers: 1 healthy, 1 suspect",
        "learners: 1 healthy",
        "scale generators=3: under way: starting 1 generators",
    ]
