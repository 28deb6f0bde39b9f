"""Importance weights of old tokens."""

from __future__ import annotations

import math

import pytest
import torch

from hapo_async.staleness import effective_sample_size, weights
from hapo_async.upge import TokenBatch


def make(**change):
    fields = {
        "logp": torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True),
        "logp_prox": torch.tensor([-1.0, -0.5, -2.0, -0.1], dtype=torch.float64),
        "logp_behave": torch.tensor([-1.0, -3.0, -1.5, -9.0], dtype=torch.float64),
        "is_teacher": torch.tensor([False, False, False, True]),
    }
    return TokenBatch(**(fields | change))


def test_off_weighs_one_against_the_proximal_policy():
    batch = make()
    w = weights(batch, "off")
    assert w.weight.tolist() == [1.0] * 4 and torch.equal(w.logp_prox, batch.logp_prox)
    alone = weights(TokenBatch(batch.logp))
    assert torch.equal(alone.logp_prox, batch.logp.detach()) and not alone.logp_prox.requires_grad


def test_clip_makes_the_behaviour_policy_the_denominator_of_policy_tokens_alone_and_weighs_one():
    batch = make()
    w = weights(batch, "clip")
    assert w.weight.tolist() == [1.0] * 4
    assert w.logp_prox.tolist() == [-1.0, -3.0, -1.5, -0.1]


def test_tis_is_the_truncated_ratio_of_proximal_to_behaviour_and_one_for_teachers():
    w = weights(make(), "tis", cap=2.0)
    assert torch.allclose(w.weight, torch.tensor([1.0, 2.0, math.exp(-0.5), 1.0], dtype=torch.float64))
    assert w.stats["policy/weight_capped_frac"].value == pytest.approx(1 / 3)
    assert w.stats["policy/weight_mean"].value == pytest.approx((3 + math.exp(-0.5)) / 3)
    gaps = [0.0, 2.5, -0.5]
    assert w.stats["policy/mismatch_kl"].value == pytest.approx(sum(math.exp(g) - 1 - g for g in gaps) / 3)
    values = torch.tensor([1.0, 2.0, math.exp(-0.5)], dtype=torch.float64)
    assert w.stats["policy/ess"].value == pytest.approx((values.sum() ** 2 / (3 * (values**2).sum())).item())


def test_no_staleness_is_no_correction():
    batch = make(logp_prox=None, logp_behave=torch.full((4,), -1.0, dtype=torch.float64))
    for correction in ("off", "clip", "tis"):
        w = weights(batch, correction)
        assert w.weight.tolist() == [1.0] * 4 and w.logp_prox.tolist() == [-1.0] * 4
        assert w.stats["policy/mismatch_kl"].value == 0 and w.stats["policy/ess"].value == 1


def test_broken_log_probs_weigh_one_and_are_counted_for_the_policy_alone():
    behave = torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=torch.float64)
    for correction in ("tis", "clip"):
        w = weights(make(logp_behave=behave), correction)
        assert w.weight.tolist() == [1.0] * 4 and w.logp_prox.tolist() == [-1.0, -0.5, -2.0, -0.1]
        assert w.stats["policy/bad_logp"].sum == 3
    prox = torch.tensor([math.nan, -math.inf, -2.0, math.nan], dtype=torch.float64)
    assert weights(make(logp_prox=prox), "off").logp_prox.tolist() == [-1.0, -1.0, -2.0, -1.0]


def test_extreme_ratios_stay_finite_in_fp32():
    w = weights(make(logp=torch.zeros(4), logp_behave=torch.full((4,), -1e5)), "tis", cap=1e12)
    assert torch.isfinite(w.weight).all() and w.weight[0].item() == pytest.approx(math.exp(20), rel=1e-5)


def test_the_effective_sample_size_is_a_share():
    assert effective_sample_size(torch.ones(7)) == 1
    assert effective_sample_size(torch.tensor([1.0, 0.0, 0.0, 0.0])) == 0.25
    assert effective_sample_size(torch.zeros(0)) == 1


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="off, clip, tis"):
        weights(make(), "ppo")
    with pytest.raises(ValueError, match="positive"):
        weights(make(), "tis", cap=0.0)
    with pytest.raises(ValueError, match="logp_behave"):
        weights(make(logp_behave=None), "tis")
