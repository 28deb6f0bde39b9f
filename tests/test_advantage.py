"""Group advantages against plain arithmetic, and their edges."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch

from hapo_async import advantage
from hapo_async.advantage import compute
from hapo_async.errors import ConfigError


def grpo(rewards):
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(rewards), statistics.stdev(rewards)
    return [(r - mean) / (std + 1e-6) for r in rewards]


def test_advantages_equal_plain_arithmetic_on_random_groups():
    rng = np.random.default_rng(0)
    rewards = np.concatenate([rng.integers(0, 2, (20, 8)).astype(float), rng.random((20, 8))])
    rows = rewards.tolist()
    assert np.allclose(compute("grpo", rewards), [grpo(r) for r in rows], rtol=1e-12)
    centred = [[x - statistics.fmean(r) for x in r] for r in rows]
    assert np.allclose(compute("dr_grpo", rewards), centred, atol=1e-14)
    assert np.allclose(compute("grpo", rewards, std=False), centred, atol=1e-14)
    others = [[x - statistics.fmean(r[:i] + r[i + 1 :]) for i, x in enumerate(r)] for r in rows]
    assert np.allclose(compute("rloo", rewards), others, atol=1e-13)
    assert compute("reinforce", [[1.0, 0.0, 0.5]]).tolist() == [[1.0, -1.0, -1.0]]
    assert compute("none", [[0.3, 0.0]]).tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "rloo"])
def test_a_group_whose_rewards_are_equal_has_exactly_no_advantage(name):
    for reward in (0.0, 0.1, 1.0, 1 / 3):
        assert not compute(name, np.full((3, 7), reward)).any()
        assert not compute(name, torch.full((3, 7), reward)).any()


def test_unjudged_answers_enter_no_statistic_and_get_no_advantage():
    rewards = np.array([[1.0, 0.0, np.nan, 1.0, 99.0], [1.0, 5.0, 5.0, 5.0, 5.0], [7.0, 7.0, 7.0, 7.0, 7.0]])
    judged = np.array([[True, True, False, True, False], [True] + [False] * 4, [False] * 5])
    for name in ("grpo", "dr_grpo", "rloo"):
        got = compute(name, rewards, judged)
        assert np.allclose(got[0, [0, 1, 3]], compute(name, [1.0, 0.0, 1.0]))
        assert not got[0, [2, 4]].any() and not got[1:].any()
    assert compute("reinforce", rewards, judged)[1].tolist() == [1, 0, 0, 0, 0]


def test_a_reward_that_is_no_number_counts_as_unjudged_unless_it_is_said_to_be_judged():
    assert np.allclose(compute("grpo", [1.0, np.nan, 0.0]), [2**-0.5, 0, -(2**-0.5)], atol=1e-5)
    with pytest.raises(ValueError, match="not finite"):
        compute("grpo", [1.0, np.nan], [True, True])


def test_one_answer_has_no_advantage_and_rloo_refuses_it():
    assert compute("grpo", [[1.0]]).tolist() == [[0.0]]
    assert compute("dr_grpo", [[1.0]]).tolist() == [[0.0]]
    with pytest.raises(ValueError, match="at least 2"):
        compute("rloo", [[1.0]])


def test_tensors_give_tensors_of_their_type_and_arrays_give_fp64():
    rewards = [[0.0, 1.0, 1.0, 0.0]]
    for dtype, out in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.int64, torch.float32)):
        assert compute("grpo", torch.tensor(rewards).to(dtype)).dtype == out
    got = compute("grpo", torch.tensor(rewards), torch.ones(1, 4, dtype=torch.bool))
    assert np.allclose(got, compute("grpo", rewards), atol=1e-7)
    assert compute("grpo", rewards).dtype == np.float64
    assert compute("grpo", np.zeros((0, 8))).shape == (0, 8)
    assert compute("grpo", np.zeros((2, 0))).shape == (2, 0)


def test_the_name_of_an_algorithm_stands_for_its_advantage():
    rewards = [[0.0, 1.0, 1.0, 1.0]]
    for name, same in (("hapo", "grpo"), ("luffy", "grpo"), ("apo", "grpo"), ("hapo_apo", "grpo"), ("hpt", "dr_grpo")):
        assert np.array_equal(compute(name, rewards), compute(same, rewards))
    assert np.array_equal(compute("hpt", rewards, std=True), compute("grpo", rewards))


def test_unknown_names_options_and_shapes_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'rloo'"):
        compute("rlo", [1.0, 0.0])
    with pytest.raises(ConfigError, match="no option 'std'"):
        compute("rloo", [1.0, 0.0], std=True)
    with pytest.raises(ValueError, match="same shape"):
        compute("grpo", [1.0, 0.0], [True])
    assert advantage.needs_group("grpo") and not advantage.needs_group("reinforce")
    assert advantage.options("grpo") == ("std", "std_eps")
