"""APO's anchor at its edges; its closed form is among those of test_algorithms."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hapo_async.algorithms import loss
from hapo_async.upge import TokenBatch


def anchor_batch(r_a, ratio=1.0):
    """One failed token whose anchor ratio is r_a."""
    ref = torch.tensor([[math.log(0.2)]], dtype=torch.float64)
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    return TokenBatch(
        logp,
        logp.detach() - math.log(ratio),
        advantage=-torch.ones(1, dtype=torch.float64),
        topk_logp=(ref + math.log(r_a)).requires_grad_(),
        topk_ref_logp=ref,
        topk_keep=torch.ones(1, 1, dtype=torch.bool),
    )


def test_apo_is_active_at_initialisation_unless_the_anchor_ratio_exceeds_two_and_a_half():
    total, stats = loss("apo", anchor_batch(1.0))
    assert stats["value"] == pytest.approx(0.95)
    for r_a, alive in ((1.0, True), (2.49, True), (2.51, False)):
        batch = anchor_batch(r_a)
        total, stats = loss("apo", batch)
        push, pull = torch.autograd.grad(total, [batch.logp, batch.topk_logp])
        assert stats["apo/dead_frac"] == (not alive)
        assert push.item() == pytest.approx(1.05 if alive else 0) and pull.item() == pytest.approx(
            -0.1 * r_a if alive else 0
        )


def test_apo_keeps_its_gradient_above_the_upper_clip():
    batch = anchor_batch(1.0, ratio=2.0)
    total, _ = loss("apo", batch)
    assert torch.autograd.grad(total, batch.logp)[0].item() == pytest.approx(2.1)


def test_apo_skips_the_pull_where_the_anchor_set_is_empty_or_has_no_mass():
    for change in (
        {"topk_keep": torch.zeros(1, 1, dtype=torch.bool)},
        {"topk_ref_logp": torch.tensor([[math.log(9e-5)]], dtype=torch.float64)},
        {"topk_ref_logp": torch.tensor([[-math.inf]], dtype=torch.float64)},
        {"topk_logp": torch.zeros(1, 0), "topk_ref_logp": torch.zeros(1, 0), "topk_keep": torch.zeros(1, 0)},
    ):
        batch = replace(anchor_batch(5.0), **change)
        total, stats = loss("apo", batch)
        assert stats["value"] == pytest.approx(1.05) and stats["apo/skipped_frac"] == 1
        total.backward()
        assert batch.logp.grad.item() == pytest.approx(1.05)
        assert batch.topk_logp.grad is None or not batch.topk_logp.grad.any()


def test_an_impossible_anchor_id_has_no_nan_gradient():
    batch = replace(anchor_batch(1.0), topk_logp=torch.full((1, 1), -math.inf, dtype=torch.float64, requires_grad=True))
    total, stats = loss("apo", batch)
    assert stats["value"] == pytest.approx(1.05, abs=1e-9)
    assert not torch.autograd.grad(total, batch.topk_logp)[0].any()
