"""The one loss path: micro-batches, masks, broken numbers, precision, what is missing."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hapo_async import algorithms, reduction
from hapo_async.algorithms import loss, whole
from hapo_async.objective import objective
from hapo_async.reduction import Normaliser
from hapo_async.upge import TokenBatch
from tests.test_algorithms import CASES, same
from tests.token_batches import make

NAMES = algorithms.names()


SPLITS = {
    "responses": ([0, 3], [2, 1, 5], [4], []),  # groups are torn apart, responses are not
    "groups": ([3, 4], [], [0, 1, 2], [5]),
}
EVERY = CASES + [(name, {}) for name in NAMES if (name, {}) not in CASES]


@pytest.mark.parametrize(("name", "options"), EVERY, ids=[f"{n}-{o}" for n, o in EVERY])
def test_micro_batches_add_up_to_the_whole_batch(name, options):
    batch = mixed_verdicts(make(teachers=(2, 5) if algorithms.get(name).teacher else ()))
    whole_loss, stats = loss(name, batch, **options)
    want = torch.autograd.grad(whole_loss, batch.logp)[0]
    algorithm = algorithms.get(name)
    correction, _, options = whole.split(algorithm, options)
    resolved = algorithm.resolve(options)
    batch, norm = whole.prepare(algorithm, batch, resolved)
    sizes = reduction.group_sizes(batch)
    total, parts = torch.zeros((), dtype=torch.float64), []
    for chosen in SPLITS["groups" if "groups" in algorithm.requires(resolved) else "responses"]:
        rows = torch.isin(batch.sequence, torch.tensor(chosen, dtype=torch.long))
        pick = lambda x: x[rows] if x is not None and len(x) == len(rows) else x  # noqa: B023, E731
        micro = TokenBatch(**{k: pick(getattr(batch, k)) for k in batch.__dataclass_fields__} | {"group_size": sizes})
        part, means = objective(algorithm, resolved, micro, norm, correction=correction)
        total = total + part
        parts.append(means)
    got = torch.autograd.grad(total, batch.logp)[0]
    assert torch.allclose(got, want, rtol=1e-12, atol=1e-16)
    assert got.any()
    merged = parts[0]["loss/value"] + parts[1]["loss/value"] + parts[2]["loss/value"] + parts[3]["loss/value"]
    assert merged.value == pytest.approx(stats["value"], rel=1e-12)


def mixed_verdicts(batch):
    """The batch with right and wrong answers in both of its larger groups, and one without a verdict."""
    return replace(batch, reward=torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, math.nan], dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_and_an_all_masked_batch_give_zero_with_a_graph(name):
    for batch in (make(lengths=(1,), groups=(0,), teachers=(), masked=False), make()):
        rows = torch.zeros(len(batch.logp), dtype=torch.bool)
        empty = TokenBatch(
            **{
                k: v[rows] if isinstance(v := getattr(batch, k), torch.Tensor) and len(v) == len(rows) else v
                for k in batch.__dataclass_fields__
            }
        )
        masked = replace(batch, mask=rows)
        for each in (empty, masked):
            total, stats = loss(name, each)
            assert total.item() == 0.0 and stats["value"] == 0.0
            total.backward()
        assert batch.logp.grad is not None and not batch.logp.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_garbage_in_tokens_that_do_not_train_reaches_neither_loss_nor_gradient(name):
    clean = make()
    off = ~clean.mask
    bad = {
        f: torch.where(off if getattr(clean, f).ndim == 1 else off[:, None], math.nan, getattr(clean, f).detach())
        for f in ("logp", "logp_prox", "logp_behave", "advantage", "topk_logp", "topk_ref_logp")
    }
    teacher = clean.is_teacher & clean.mask
    for f in ("logp_prox", "logp_behave"):  # no ratio is ever formed for a teacher's token
        bad[f] = torch.where(teacher, math.nan, bad[f])
    dirty = replace(clean, **bad)
    dirty.logp.requires_grad_()
    for options in ({}, {"correction": "tis"}, {"correction": "clip"}):
        (a, _), (b, _) = loss(name, clean, **options), loss(name, dirty, **options)
        assert a.item() == b.item()
        want, got = torch.autograd.grad(a, clean.logp)[0], torch.autograd.grad(b, dirty.logp)[0]
        assert torch.equal(want, got)


def test_behaviour_log_probs_that_are_not_finite_weigh_one_and_are_counted():
    batch = make(teachers=())
    behave = batch.logp_behave.clone()
    behave[2], behave[3], behave[4] = math.nan, math.inf, -math.inf
    broken = replace(batch, logp_behave=behave)
    healed = replace(batch, logp_behave=torch.where(torch.isfinite(behave), behave, batch.logp_prox))
    for correction in ("tis", "clip"):
        total, stats = loss("grpo", broken, correction=correction)
        assert stats["policy/bad_logp"] == 3
        assert stats["value"] == loss("grpo", healed, correction=correction)[1]["value"]
        assert torch.isfinite(torch.autograd.grad(total, batch.logp)[0]).all()


def test_log_ratios_are_clamped_so_that_fp32_never_overflows():
    for name in ("grpo", "apo", "hapo"):
        logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        batch = TokenBatch(
            logp,
            torch.tensor([-500.0, 300.0]),
            advantage=torch.tensor([-1.0, -1.0]),
            topk_logp=torch.tensor([[-1.0], [-200.0]]),
            topk_ref_logp=torch.tensor([[-0.5], [-0.5]]),
        )
        total, _ = loss(name, batch, clip=False)
        assert torch.isfinite(total)
        assert not torch.autograd.grad(total, logp)[0].any()


def test_an_impossible_teacher_token_does_not_poison_a_shaped_loss():
    logp = torch.tensor([-math.inf, -1.0], dtype=torch.float64, requires_grad=True)
    total, stats = loss("hapo", TokenBatch(logp, is_teacher=torch.tensor([True, True]), advantage=torch.ones(2)))
    f = math.exp(-1) / (math.exp(-1) + 0.1)
    assert stats["value"] == pytest.approx(-f / 2)
    gradient = torch.autograd.grad(total, logp)[0]
    assert gradient[0] == 0 and gradient[1].item() == pytest.approx(-0.5 * f * (1 - f))


def test_equal_policies_give_ratio_one_and_an_active_gradient():
    batch = replace(make(teachers=()), logp_prox=None)
    total, stats = loss("grpo", batch)
    assert stats["policy/clip_frac"] == 0 and stats["policy/ratio_mean"] == 1 and stats["policy/kl"] == 0
    count = batch.mask.sum()
    want = torch.where(batch.mask, -batch.advantage / count, 0.0)
    assert torch.allclose(torch.autograd.grad(total, batch.logp)[0], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_inputs_are_computed_in_fp32(dtype):
    batch = make()
    low = {f: getattr(batch, f).detach().to(dtype) for f in ("logp", "logp_prox", "entropy", "advantage", "topk_logp")}
    for name in NAMES:
        total, stats = loss(name, replace(batch, **low))
        assert total.dtype == torch.float32
        assert stats["value"] == pytest.approx(loss(name, batch)[1]["value"], rel=0.05, abs=0.02)


def test_teacher_tokens_are_no_part_of_an_algorithm_without_a_teacher_term():
    batch = make()
    without = replace(batch, mask=batch.mask & ~batch.is_teacher)
    same(("grpo", batch, {}), ("grpo", without, {}))


def test_what_is_missing_is_named():
    batch = TokenBatch(torch.zeros(2))
    for name, options, word in (
        ("grpo", {}, "advantage"),
        ("sft", {"entropy_coef": 0.1}, "entropy"),
        ("grpo", {"correction": "tis"}, "advantage|logp_behave"),
    ):
        with pytest.raises(ValueError, match=word):
            loss(name, batch, **options)
    with pytest.raises(ValueError, match="topk"):
        loss("apo", replace(batch, advantage=-torch.ones(2)))
    with pytest.raises(ValueError, match="group_size"):
        objective(algorithms.get("hpt"), algorithms.get("hpt").defaults, make(), Normaliser.of(make()))
