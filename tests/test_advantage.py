"""Group advantages against plain arithmetic, and their edges."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch

from hapo_async import advantage, algorithms
from hapo_async.advantage import compute
from hapo_async.errors import ConfigError
from hapo_async.sequences import Row, TrainGroup
from hapo_async.types import GroupKey, Source


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
    with pytest.raises(ValueError, match="lengths"):
        compute("reinforce_pp", [[1.0, 0.0]], lengths_PG=[[1, 2, 3]])


def test_advantages_that_ask_for_success_alone():
    rewards = [[1.0, 0.0, 0.5, np.nan]]
    assert compute("psr", rewards).tolist() == [[1, 0, 0, 0]]
    assert compute("nsr", rewards).tolist() == [[0, -1, -1, 0]]
    assert compute("w_reinforce", rewards).tolist() == [[0.1, -1, -1, 0]]
    assert compute("w_reinforce", rewards, lam=0.7).tolist() == [[0.7, -1, -1, 0]]
    assert compute("reinforce", rewards).tolist() == [[1, -1, -1, 0]]
    assert compute("return", rewards).tolist() == [[1, 0, 0.5, 0]]


@pytest.mark.parametrize("name", algorithms.names())
def test_every_algorithm_has_an_advantage_that_leaves_out_what_is_unjudged(name):
    values = compute(name, [[1.0, 0.0, np.nan, 1.0], [0.0, np.nan, 0.0, 0.0]])
    assert np.isfinite(values).all() and values[0, 2] == values[1, 1] == 0
    assert np.array_equal(compute(name, [[1.0, 0.0, 9.0, 1.0]], [[True, True, False, True]])[0], values[0]) or (
        advantage.of(name).whole_batch
    )


# --------------------------------------------------------------------------------------------------------------------
# A*-PO


@pytest.mark.parametrize("beta1", [0.05, 0.5, 3.0])
@pytest.mark.parametrize(("rewards_as", "wrong"), [("signed", -1.0), ("binary", 0.0)])
def test_the_optimal_value_is_the_soft_mean_of_the_rewards(rewards_as, wrong, beta1):
    got = compute("a_star_po", [[1.0, 0.0, 0.0, 1.0, 0.0]], beta1=beta1, rewards=rewards_as)[0]
    r = [1.0, wrong, wrong, 1.0, wrong]
    v_star = beta1 * math.log(statistics.fmean(math.exp(x / beta1) for x in r))
    assert np.allclose(got, [x - v_star for x in r], rtol=1e-12)
    assert np.exp(got / beta1).mean() == pytest.approx(1.0)


def test_the_optimal_value_of_equal_rewards_is_that_reward_and_nothing_overflows():
    for rewards in ([1.0] * 4, [0.0] * 4, [0.0, np.nan], [np.nan, np.nan]):
        for rewards_as in ("signed", "binary"):
            assert not compute("a_star_po", rewards, beta1=1e-3, rewards=rewards_as).any()
    assert np.allclose(compute("a_star_po", [1.0, 0.0], beta1=1e-3), [1e-3 * math.log(2), -2 + 1e-3 * math.log(2)])
    assert np.allclose(
        compute("a_star_po", [1.0, np.nan, 0.0]), compute("a_star_po", [1.0, 0.0])[[0, 0, 1]] * [1, 0, 1]
    )


# --------------------------------------------------------------------------------------------------------------------
# REINFORCE++


def masked_whiten(values, mask):
    """As REINFORCE++ is commonly done, over [rows, tokens]: minus the masked mean, over the unbiased masked std."""
    count = mask.sum()
    mean = (values * mask).sum() / count
    variance = ((values - mean) ** 2 * mask).sum() / count * (count / (count - 1))
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def test_returns_are_whitened_over_the_tokens_of_all_answers():
    rng = np.random.default_rng(1)
    for binary in (True, False):
        rewards = rng.integers(0, 2, (6, 4)).astype(float) if binary else rng.random((6, 4))
        lengths = rng.integers(0, 9, (6, 4))
        judged = rng.random((6, 4)) > 0.2
        weight = torch.tensor(np.where(judged, lengths, 0).ravel())
        tokens = torch.tensor(rewards.ravel())[:, None].expand(-1, 9)
        mask = (torch.arange(9) < weight[:, None]).double()
        want = masked_whiten(tokens, mask)
        got = torch.tensor(compute("reinforce_pp", rewards, judged, lengths_PG=lengths).ravel())
        assert torch.allclose(got[:, None] * mask, want, atol=1e-12)
        assert not got[~torch.tensor(judged.ravel())].any()
    rewards = rng.random((5, 3))
    assert np.allclose(
        compute("reinforce_pp", rewards), (rewards - rewards.mean()) / math.sqrt(rewards.var(ddof=1) + 1e-8)
    )


def test_returns_that_do_not_vary_have_no_advantage():
    for rewards in ([[0.1] * 7], [[1.0]], [[np.nan, 0.3]], np.zeros((0, 4))):
        assert not compute("reinforce_pp", rewards).any()
    assert not compute("reinforce_pp", [[1.0, 0.0]], lengths_PG=[[5, 0]]).any()


def train_group(uid, *rows):
    made = tuple(
        Row(Source.POLICY, i, length, reward, judged, reward if judged else 0.0)
        for i, (reward, length, judged) in enumerate(rows)
    )
    return TrainGroup(GroupKey(0, uid, 0), None, 3, np.arange(3, dtype=np.int32), None, made, 0.5, 1.0)


def test_a_step_is_whitened_across_its_groups_and_nothing_else_of_them_changes():
    groups = [
        train_group("a", (1.0, 2, True), (0.0, 5, True), (0.0, 4, False)),
        train_group("b", (1.0, 7, True)),
        train_group("c", (0.25, 1, True), (0.0, 3, True)),
    ]
    whitened = advantage.whiten_batch(groups)
    rewards, lengths = [1.0, 0.0, 0.0, 1.0, 0.25, 0.0], [2, 5, 4, 7, 1, 3]
    want = compute("reinforce_pp", rewards, [True, True, False, True, True, True], lengths_PG=lengths)
    assert [row.advantage for g in whitened for row in g.rows] == want.tolist()
    tokens = np.repeat(want, lengths)[np.repeat([True, True, False, True, True, True], lengths)]
    assert tokens.mean() == pytest.approx(0, abs=1e-12) and tokens.std(ddof=1) == pytest.approx(1, abs=1e-6)
    assert [len(g.rows) for g in whitened] == [3, 1, 2] and [g.key for g in whitened] == [g.key for g in groups]
    assert [row.reward for g in whitened for row in g.rows] == rewards
    assert advantage.whiten_batch([]) == []
    assert not any(r.advantage for g in advantage.whiten_batch(groups[1:2] * 3) for r in g.rows)


# --------------------------------------------------------------------------------------------------------------------
# With a critic


def gae_by_definition(rewards, values, discount, lam):
    following = [*values[1:], 0.0]
    delta = [r + discount * after - v for r, v, after in zip(rewards, values, following, strict=True)]
    return [sum((discount * lam) ** k * delta[t + k] for k in range(len(delta) - t)) for t in range(len(delta))]


@pytest.mark.parametrize(("discount", "lam"), [(1.0, 1.0), (0.99, 0.95), (1.0, 0.0), (0.0, 1.0)])
def test_generalised_advantages_equal_their_definition(discount, lam):
    rng = np.random.default_rng(2)
    rewards, values = rng.normal(size=30), rng.normal(size=30)
    got, returns = advantage.gae(rewards, values, discount, lam)
    assert got.dtype == np.float64 and np.allclose(got, gae_by_definition(rewards, values, discount, lam), atol=1e-12)
    assert np.allclose(returns, got + values)


def test_without_decay_the_advantage_is_the_return_to_come_minus_the_value():
    rewards, values = np.array([0.0, 0.0, 0.0, 1.0]), np.array([0.3, 0.4, 0.5, 0.9])
    got, returns = advantage.gae(rewards, values)
    assert np.allclose(got, 1.0 - values) and np.allclose(returns, 1.0)
    assert np.allclose(advantage.gae(rewards, values, lam=0.0)[0], [0.1, 0.1, 0.4, 0.1])


def test_gae_of_tensors_has_their_type_and_no_gradient_and_shapes_are_checked():
    values = torch.randn(9, dtype=torch.float32, requires_grad=True)
    got, returns = advantage.gae(torch.ones(9), values, 0.9, 0.8)
    assert got.dtype == returns.dtype == torch.float32 and not got.requires_grad and not returns.requires_grad
    assert np.allclose(got, gae_by_definition([1.0] * 9, values.tolist(), 0.9, 0.8), atol=1e-5)
    assert [len(x) for x in advantage.gae([], [])] == [0, 0]
    with pytest.raises(ValueError, match="same shape"):
        advantage.gae([1.0], [1.0, 2.0])
