"""The parts: each reference's gain is the derivative of its primitive; reductions; counts."""

from __future__ import annotations

import math

import pytest
import torch

from hapo_async import reduction, upge
from hapo_async.reduction import Normaliser
from hapo_async.upge import Mean, TokenBatch


@pytest.mark.parametrize("reference", [upge.OLD, upge.THETA, upge.ONE, upge.shaped(0.1), upge.shaped(0.7)])
def test_the_analytic_weight_of_every_reference_is_the_derivative_of_its_objective(reference):
    logp = torch.linspace(-6, -0.001, 50, dtype=torch.float64, requires_grad=True)
    prox = torch.linspace(-0.5, -4, 50, dtype=torch.float64)
    gain = reference.gain(logp, prox)
    of_primitive = torch.autograd.grad(reference.primitive(logp, prox).sum(), logp)[0]
    of_surrogate = torch.autograd.grad(gain.sum(), logp)[0]
    assert torch.allclose(gain, of_primitive, rtol=1e-12)
    assert torch.allclose(of_surrogate, gain, rtol=1e-12)


def test_luffys_weight_peaks_at_a_quarter_where_the_probability_is_gamma():
    at = lambda p: upge.shaped(0.1).gain(torch.tensor([math.log(p)], dtype=torch.float64), None).item()  # noqa: E731
    assert at(0.1) == pytest.approx(0.25) and at(1.0) == pytest.approx(0.1 / 1.21)
    assert max(at(p / 1000) for p in range(1, 1001)) == pytest.approx(0.25)


def batch(**change):
    fields = {
        "logp": torch.zeros(7, dtype=torch.float64),
        "mask": torch.tensor([1, 1, 0, 1, 1, 1, 0], dtype=torch.bool),
        "is_teacher": torch.tensor([0, 0, 0, 0, 1, 1, 1], dtype=torch.bool),
        "sequence": torch.tensor([5, 5, 5, 9, 2, 2, 7]),
        "group": torch.tensor([0, 0, 0, 1, 1, 1, 3]),
    }
    return TokenBatch(**(fields | change))


def test_the_normaliser_counts_what_trains():
    assert Normaliser.of(batch()) == Normaliser(5, 3, 2, 2, 1)
    assert Normaliser.of(TokenBatch(torch.zeros(4))) == Normaliser(4, 1, 1, 0, 0)
    assert Normaliser.of(TokenBatch(torch.zeros(0))) == Normaliser(0, 0, 0, 0, 0)


def test_each_reduction_gives_every_token_its_share():
    b, norm = batch(), Normaliser.of(batch())
    on = b.trained
    share = lambda how, teacher=False, **o: reduction.shares(how, b, teacher, norm, l_max=10.0, **o)[on].tolist()  # noqa: E731
    assert share("TM") == [1 / 5] * 5
    assert share("SEQ") == pytest.approx([1 / 3] * 5)
    assert share("SN") == pytest.approx([1 / 30] * 5)
    assert share("SM") == pytest.approx([1 / 6, 1 / 6, 1 / 3, 1 / 6, 1 / 6])
    assert share("TM", separate=True) == pytest.approx([1 / 3] * 5)
    assert share("TM", teacher=True, separate=True) == pytest.approx([1 / 2] * 5)
    sized = batch(group_size=torch.tensor([1, 4, 0, 0]))
    got = reduction.shares("PN", sized, False, norm, l_max=10.0)[on].tolist()
    assert got[:3] == pytest.approx([1 / 20, 1 / 20, 1 / 80])
    assert share("PN", teacher=True)[3:] == pytest.approx([1 / 4, 1 / 4])


def test_group_sizes_and_confidence_are_counted_from_a_whole_batch():
    assert reduction.group_sizes(batch()).tolist() == [1, 1]
    reward = torch.zeros(10)
    reward[[2, 5, 7]] = 1
    assert reduction.group_confidence(batch(reward=reward)).tolist() == pytest.approx([2 / 3, 1 / 4])
    with pytest.raises(ValueError, match="reward"):
        reduction.group_confidence(batch())


def test_means_add_up_and_an_empty_mean_is_zero():
    a, b = Mean(torch.tensor(3.0), torch.tensor(2)), Mean(torch.tensor(1.0), torch.tensor(2))
    assert (a + b).value == 1.0
    assert Mean(torch.tensor(0.0), torch.tensor(0)).value == 0.0


def test_log_ratios_stay_within_twenty_with_no_gradient_outside():
    x = torch.tensor([-50.0, -20.0, 0.5, 50.0, -math.inf], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.0, 0.0, 0.0, 0.0, -math.inf], dtype=torch.float64)
    out = upge.log_ratio(x, reference)
    assert out.tolist() == [-20, -20, 0.5, 20, 0]
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [0, 1, 1, 0, 0]
