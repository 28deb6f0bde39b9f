"""The draw follows the distribution, and its noise names its token."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hapo_async.draw import draw, noise_key, uniforms
from hapo_async.types import GroupKey


def test_a_draw_follows_the_distribution_and_reports_its_log_prob():
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, -torch.inf])
    uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    tokens, logp = draw(logits.expand(20_000, 5), torch.full((20_000,), 0.5, dtype=torch.float64), uniform)
    expected = torch.softmax(logits.double() / 0.5, 0)
    assert torch.allclose(torch.bincount(tokens, minlength=5).double() / 20_000, expected, atol=1e-4)
    assert torch.allclose(logp.double(), expected[tokens].log(), atol=1e-6)


@pytest.mark.parametrize("uniform", [0.0, 1 - 2.0**-53])
def test_a_token_without_probability_is_never_drawn(uniform: float):
    logits = torch.tensor([[-torch.inf, 0.0, 0.0, -torch.inf]])
    token, _ = draw(logits, torch.ones(1, dtype=torch.float64), torch.tensor([uniform], dtype=torch.float64))
    assert token.item() in (1, 2)


def test_temperature_zero_takes_the_best_token_with_its_log_prob_at_temperature_one():
    logits = torch.randn(8, 20)
    tokens, logp = draw(logits, torch.zeros(8, dtype=torch.float64), torch.rand(8, dtype=torch.float64))
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.allclose(logp, torch.log_softmax(logits, -1).max(-1).values, atol=1e-6)


def test_top_p_and_top_k_keep_the_likeliest_tokens_and_renormalise():
    logits = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.3])).expand(4000, 4)
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    ones = torch.ones(4000, dtype=torch.float64)
    tokens, logp = draw(logits, ones, uniform, 0.5 * ones, torch.zeros(4000, dtype=torch.int64))
    assert set(tokens.tolist()) == {1, 3}  # 0.4 alone is less than 0.5, 0.4 + 0.3 is enough
    assert torch.allclose(logp[tokens == 1], torch.tensor(4 / 7).log())
    tokens, logp = draw(logits, ones, uniform, ones, torch.full((4000,), 3))
    assert set(tokens.tolist()) == {1, 2, 3}
    assert torch.allclose(logp[tokens == 2], torch.tensor(2 / 9).log())


def test_noise_is_uniform_and_names_its_token():
    keys = np.array([noise_key(7, GroupKey(0, "a", 0), i) for i in range(200)], np.uint64)
    draws = np.stack([uniforms(keys, np.full(200, position)) for position in range(200)])
    assert len(np.unique(draws)) == draws.size
    assert draws.min() >= 0 and draws.max() < 1
    assert np.histogram(draws, 10, (0, 1))[0].std() < 200  # 4,000 expected in each of ten bins, sd 60
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.02
    others = [
        (8, GroupKey(0, "a", 0), 0),
        (7, GroupKey(1, "a", 0), 0),
        (7, GroupKey(0, "b", 0), 0),
        (7, GroupKey(0, "a", 1), 0),
    ]
    assert not {noise_key(*o) for o in others} & set(keys.tolist())
