"""Every algorithm against a second implementation in plain floats, and against verl and TRL; the page that says so."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hapo_async import advantage, algorithms
from hapo_async.algorithms import loss
from tests.oracles import ORACLES, compare, oracle, peers
from tests.oracles.batches import BATCHES
from tests.oracles.cases import CASES
from tests.oracles.compare import CLOSE, apart, batch_named, package

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import algorithms_page

NAMES = sorted(ORACLES)
WITH_OPTIONS = (  # where options meet; the defaults meet all
    "random", "random with teachers", "in another order", "weighted rows", "responses of one token", "unjudged answers",
    "a response wholly masked", "broken where masked", "tiny probabilities", "ratios beyond the bound",
    "references beyond the bound", "references of no probability", "broken behaviour", "anchors at their edges",
    "spikes of entropy",
)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- oracles


def test_every_algorithm_has_an_oracle():
    assert set(NAMES) == set(algorithms.names())


@pytest.mark.parametrize("name", NAMES)
def test_an_algorithm_with_its_defaults_equals_its_oracle_on_every_batch(name):
    found = compare.against_oracle(name)
    assert len(found) == len(BATCHES)
    assert {b: d for b, d in found.items() if max(d) > CLOSE} == {}


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
def test_an_algorithm_with_options_equals_its_oracle(name, options):
    found = {
        b: apart(package(name, batch_named(b), **options), oracle(name)(batch_named(b), **options))
        for b in WITH_OPTIONS
    }
    assert {b: d for b, d in found.items() if max(d) > CLOSE} == {}


# A stop-gradient in the definition makes the gradient another function's than the value's.
STOPPED = {"cispo", "fpa", "kto"}


@pytest.mark.parametrize("name", [n for n in NAMES if n not in STOPPED])
def test_where_the_loss_is_a_function_its_gradient_is_its_finite_differences(name):
    batch, step = batch_named("random with teachers"), 1e-6
    grads = package(name, batch).grads
    moved = 0
    for field in ("logp", "topk_logp", "ref_kl", "value"):
        x = getattr(batch, field).detach()
        for at in range(x.numel()):
            ends = []
            for sign in (1, -1):
                y = x.clone()
                y.view(-1)[at] += sign * step
                ends.append(oracle(name)(replace(batch, **{field: y})).value)
            slope = (ends[0] - ends[1]) / (2 * step)
            got = grads[field].view(-1)[at].item() if field in grads else 0.0
            assert got == pytest.approx(slope, abs=3e-8), (field, at)
            moved += slope != 0
    assert moved > 3


def test_the_random_batches_reach_both_sides_of_every_clip():
    stats = {n: loss(n, batch_named("random"))[1] for n in ("grpo", "cispo", "apo")}
    assert 0 < stats["grpo"]["policy/clip_frac"] < 1
    assert 0 < stats["apo"]["apo/dead_frac"] < 1
    tight = (
        package("cispo", batch_named("random"), c=1.2).grads["logp"]
        - package("cispo", batch_named("random")).grads["logp"]
    )
    assert 0 < (tight != 0).sum() < len(tight)


# --------------------------------------------------------------------------------------------------------------- peers


@pytest.mark.parametrize("name", sorted(peers.PEERS))
def test_an_algorithm_equals_verl_and_trl_where_they_have_it(name):
    found = compare.against_peers(name)
    assert set(found) == {title for title, _, _ in peers.PEERS[name]}
    assert {b: d for b, d in found.items() if max(d) > CLOSE} == {}


def test_the_critics_loss_is_verls():
    batch = batch_named("random")
    with_critic, without = package("ppo", batch), package("ppo", batch, critic=False)
    value, gradient = peers.verl_value_loss(batch)
    assert with_critic.value - without.value == pytest.approx(value, rel=CLOSE)
    assert np.allclose(with_critic.grads["value"], gradient, rtol=CLOSE, atol=0)


def test_group_advantages_are_verls():
    core = peers.load("verl.trainer.ppo.core_algos")
    rng = np.random.default_rng(0)
    rewards = np.concatenate([rng.integers(0, 2, (6, 8)).astype(float), rng.random((6, 8))])
    rewards[0, :4], rewards[0, 4:] = 0.0, 1.0
    index, one = np.repeat(np.arange(12), 8), torch.ones(96, 1, dtype=torch.float64)
    scores = torch.tensor(rewards.reshape(-1, 1))
    theirs = lambda f, **o: f(scores.clone(), one, index=index, **o)[0].reshape(12, 8).numpy()  # noqa: E731
    varied = rewards.std(1) > 0
    for got, want in (
        (advantage.compute("grpo", rewards), theirs(core.compute_grpo_outcome_advantage)),
        (
            advantage.compute("dr_grpo", rewards),
            theirs(core.compute_grpo_outcome_advantage, norm_adv_by_std_in_grpo=False),
        ),
        (advantage.compute("rloo", rewards), theirs(core.compute_rloo_outcome_advantage)),
    ):
        assert np.allclose(got[varied], want[varied], rtol=CLOSE, atol=1e-12)
        assert not got[~varied].any()


def test_whitened_returns_and_gae_are_verls():
    core = peers.load("verl.trainer.ppo.core_algos")
    rng = np.random.default_rng(1)
    rewards, lengths = rng.random(10), rng.integers(1, 9, 10)
    mask = torch.tensor(np.arange(8)[None] < lengths[:, None]).double()
    at_the_end = torch.zeros(10, 8, dtype=torch.float64)
    at_the_end[range(10), lengths - 1] = torch.tensor(rewards)
    config = peers.load("verl.trainer.config").AlgoConfig(gamma=1.0)
    want, _ = core.compute_reinforce_plus_plus_outcome_advantage(at_the_end, mask, config)
    got = advantage.compute("reinforce_pp", rewards, lengths_PG=lengths)
    assert np.allclose(got, want[:, 0].numpy(), rtol=1e-6)  # they add 1e-8 to the variance
    values = torch.rand(10, 8, dtype=torch.float64) * mask
    for discount, lam in ((1.0, 1.0), (0.97, 0.9)):
        _, returns = core.compute_gae_advantage_return(at_the_end, values, mask, discount, lam)
        for row, n in enumerate(lengths):
            ours = advantage.gae(at_the_end[row, :n], values[row, :n], discount, lam)
            assert torch.allclose(ours[1], returns[row, :n], rtol=CLOSE)
            assert torch.allclose(ours[0], returns[row, :n] - values[row, :n], rtol=CLOSE)


# ------------------------------------------------------------------------------------------------------------ the page


def test_the_page_of_algorithms_is_what_the_code_says():
    text = algorithms_page.PAGE.read_text(encoding="utf-8")
    measured = algorithms_page.recorded(text)
    assert sorted(measured) == NAMES
    again = algorithms_page.page(measured, len(BATCHES), len(compare.PEER_BATCHES))
    assert text == again, "run: python tools/algorithms_page.py"


def test_the_differences_on_the_page_hold():
    recorded = algorithms_page.recorded(algorithms_page.PAGE.read_text(encoding="utf-8"))
    limit = lambda text: float(text.removeprefix("< "))  # noqa: E731
    for name in NAMES:
        each = compare.against_oracle(name).values()
        found = {algorithms_page.CLOSED_FORM: tuple(map(max, zip(*each, strict=True))), **compare.against_peers(name)}
        assert set(found) == set(recorded[name])
        for what, pair in found.items():
            assert all(x < limit(y) <= CLOSE for x, y in zip(pair, recorded[name][what], strict=True)), (name, what)


def test_the_reconstruction_is_called_one():
    text = algorithms_page.PAGE.read_text(encoding="utf-8")
    assert text.count("our reconstruction") >= 3
    assert "our reconstruction" in algorithms.get("hindsight_aware_hapo").describe()["title"]
