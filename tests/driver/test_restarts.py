"""How often something that dies is started again."""

from __future__ import annotations

from hapo_async.driver.restarts import BACKOFF_S, MOST, WINDOW_S, Budget


def test_three_starts_with_longer_waits_then_none_until_the_window_has_passed():
    budget = Budget()
    assert [budget.take(float(n)) for n in range(MOST)] == list(BACKOFF_S)
    assert budget.take(10.0) is None and budget.take(WINDOW_S) is None
    assert budget.take(WINDOW_S + 0.5) == BACKOFF_S[-1], "the first start is forgotten, the other two are not"
    assert budget.take(3 * WINDOW_S) == BACKOFF_S[0]
