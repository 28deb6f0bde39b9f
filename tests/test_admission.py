"""The admission rule holds the staleness bound and never deadlocks, whatever the order and speed."""

import random

import pytest

from hapo_async.admission import capacity, excess, overdue


@pytest.mark.parametrize("eta", [0, 1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_a_simulated_fleet_never_exceeds_the_bound_and_never_stops(eta, seed):
    """Three generators of different speed, random lengths, late installs, dropped groups, skipped steps."""
    rng = random.Random(1000 * eta + seed)
    size, step, untrained = 8, 0, 0
    installed = [0, 0, 0]
    running: list[list[tuple[int, float]]] = [[], [], []]
    finished: list[int] = []
    trained_steps, clock, worst = 0, 0.0, 0
    while trained_steps < 200:
        clock += 1.0
        assert clock < 50_000, "the loop stopped making progress"
        for g in range(3):
            if rng.random() < 0.3:
                installed[g] = step
            room = capacity(
                max_concurrent=6,
                running=len(running[g]),
                max_staleness=eta,
                lag=step - installed[g],
                batch_prompts=size,
                untrained=untrained,
            )
            for _ in range(room):
                running[g].append((installed[g], clock + rng.expovariate(1 / (3 + 5 * g))))
                untrained += 1
            done = [r for r in running[g] if r[1] <= clock]
            running[g] = [r for r in running[g] if r[1] > clock]
            for version, _ in done:
                if rng.random() < 0.05:
                    untrained -= 1
                else:
                    finished.append(version)
        flying = [v for rs in running for v, _ in rs]
        late = overdue(flying, finished, step=step, max_staleness=eta, batch_prompts=size)
        if len(finished) < size or late is not None:
            continue
        finished.sort()
        batch, finished = finished[:size], finished[size:]
        ages = [step - v for v in batch]
        assert min(ages) >= 0 and max(ages) <= eta
        worst = max(worst, *ages)
        untrained -= size
        if rng.random() < 0.05:
            continue  # a skipped step: the groups are gone, the version stays
        step += 1
        trained_steps += 1
    assert worst == eta, "the simulation never reached the bound, so it proved nothing"


def test_synchronous_training_issues_exactly_one_batch():
    room = capacity(max_concurrent=100, running=0, max_staleness=0, lag=0, batch_prompts=16, untrained=0)
    assert room == 16
    assert capacity(max_concurrent=100, running=16, max_staleness=0, lag=0, batch_prompts=16, untrained=16) == 0


def test_the_learner_waits_before_more_than_a_batch_of_old_groups_piles_up():
    # Groups of step 0 are still running; after step 1 with eta=2 only one more batch of 4 can take them in time.
    assert overdue([0] * 5, [1] * 4, step=1, max_staleness=2, batch_prompts=4) == 0
    assert overdue([0] * 4, [1] * 4, step=1, max_staleness=2, batch_prompts=4) is None


def test_the_learner_waits_for_a_group_that_would_be_too_old_at_once():
    assert overdue([3], [4] * 4, step=4, max_staleness=1, batch_prompts=4) == 3
    assert overdue([4], [4] * 4, step=4, max_staleness=1, batch_prompts=4) is None
    assert overdue([4], [4] * 4, step=4, max_staleness=0, batch_prompts=4) == 4


@pytest.mark.parametrize("seed", range(4))
def test_what_is_given_up_is_enough_to_pass_and_one_less_is_not(seed):
    rng = random.Random(seed)
    waits = 0
    for _ in range(500):
        eta, size, step = rng.randint(0, 3), rng.randint(1, 4), rng.randint(3, 6)
        rule = {"step": step, "max_staleness": eta, "batch_prompts": size}
        flying = sorted(rng.randint(step - eta, step) for _ in range(rng.randint(0, 12)))
        finished = [rng.randint(step - eta, step) for _ in range(rng.randint(size, 12))]
        count = excess(flying, finished, **rule)
        assert (count > 0) == (overdue(flying, finished, **rule) is not None)
        assert overdue(flying[count:], finished, **rule) is None
        if count:
            waits += 1
            assert overdue(flying[count - 1 :], finished, **rule) is not None
    assert waits > 50


def test_of_five_groups_where_four_may_stay_one_is_given_up():
    assert excess([0] * 5, [1] * 4, step=1, max_staleness=2, batch_prompts=4) == 1
    assert excess([0] * 4, [1] * 4, step=1, max_staleness=2, batch_prompts=4) == 0


def test_a_generator_that_lags_behind_the_bound_gets_nothing():
    assert capacity(max_concurrent=100, running=0, max_staleness=1, lag=2, batch_prompts=16, untrained=0) == 0
