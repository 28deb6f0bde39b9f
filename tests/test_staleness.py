"""Importance weights of old tokens: by hand, and what is said of them."""

from __future__ import annotations

import math

import pytest
import torch

from hapo_async import metrics
from hapo_async.algorithms import loss
from hapo_async.corrections import OFF, resolve
from hapo_async.staleness import BUCKETS, MOMENTS, moments, weights
from hapo_async.staleness import metrics as numbers
from hapo_async.upge import TokenBatch
from tests.oracles.compare import batch_named

TIS, CLIP, MASK = resolve("tis", {}), resolve("clip", {}), resolve("mask", {})
GAPS = [0.0, 2.5, -0.5]  # lp - lb of the policy's tokens below


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
    w = weights(batch)
    assert w.weight.tolist() == [1.0] * 4 and torch.equal(w.logp_prox, batch.logp_prox)
    alone = weights(TokenBatch(batch.logp))
    assert torch.equal(alone.logp_prox, batch.logp.detach()) and not alone.logp_prox.requires_grad


def test_clip_makes_the_behaviour_policy_the_denominator_of_policy_tokens_alone_and_weighs_one():
    w = weights(make(), CLIP)
    assert w.weight.tolist() == [1.0] * 4
    assert w.logp_prox.tolist() == [-1.0, -3.0, -1.5, -0.1]


def test_tis_is_the_truncated_ratio_of_proximal_to_behaviour_and_one_for_teachers():
    w = weights(make(), TIS)
    assert torch.allclose(w.weight, torch.tensor([1.0, 2.0, math.exp(-0.5), 1.0], dtype=torch.float64))
    assert w.stats["policy/weight_capped_frac"].value == pytest.approx(1 / 3)
    assert w.stats["policy/weight_mean"].value == pytest.approx((3 + math.exp(-0.5)) / 3)
    assert w.stats["policy/mismatch_kl"].value == pytest.approx(sum(math.exp(g) - 1 - g for g in GAPS) / 3)
    assert "policy/masked_frac" not in w.stats and "policy/mismatch_kl_equal" not in w.stats


def test_masks_of_a_token_of_a_response_and_of_its_mean():
    total, mean = math.exp(2.0), math.exp(2.0 / 3)
    for name, options, want in (
        ("mask", {}, [1, 0, math.exp(-0.5), 1]),
        ("mask", {"floor": 0.7}, [1, 0, 0, 1]),
        ("sequence_mask", {"cap": 8.0}, [total, total, total, 1]),
        ("sequence_mask", {}, [0, 0, 0, 1]),
        ("geometric_mask", {"cap": 2.0}, [mean, mean, mean, 1]),
        ("sequence_tis", {}, [2, 2, 2, 1]),
        ("geometric_tis", {"cap": 1.5}, [1.5, 1.5, 1.5, 1]),
    ):
        w = weights(make(), resolve(name, options))
        assert w.weight.tolist() == pytest.approx(want, rel=1e-14), (name, options)
        if "mask" in name:
            assert w.stats["policy/masked_frac"].value == pytest.approx(sum(x == 0 for x in want) / 3)
            assert w.stats["policy/weight_capped_frac"].value == 0


def test_a_veto_masks_the_whole_response_and_no_other():
    two = make(is_teacher=None, sequence=torch.tensor([0, 0, 1, 1]))  # smallest ratios: 1, exp(-.5)
    w = weights(two, resolve("tis", {"veto": 0.7}))
    assert w.weight.tolist() == [1, 2, 0, 0]
    assert w.stats["policy/veto_frac"].value == w.stats["policy/masked_frac"].value == 0.5
    assert weights(two, resolve("tis", {"veto": 0.6})).weight.tolist()[2:] == pytest.approx([math.exp(-0.5), 2])


def test_bounds_come_closer_to_one_with_age():
    far = make(
        logp_prox=torch.zeros(4, dtype=torch.float64),
        logp_behave=torch.tensor([-9.0, -9.0, -9.0, 9.0], dtype=torch.float64),
        is_teacher=None,
        age=torch.tensor([0, 1, 3, 0]),
        sequence=torch.tensor([0, 0, 0, 1]),
    )
    caps = [3.0, 2.0, 1.25]
    assert weights(far, resolve("tis", {"cap": 3, "decay": 0.5})).weight.tolist()[:3] == caps
    oldest = weights(far, resolve("sequence_tis", {"cap": 3, "decay": 0.5})).weight.tolist()[:3]
    assert oldest == [1.25] * 3, "a response is as old as its oldest token"
    options = {"cap": 3.0, "floor": 1 / 3, "decay": 0.5}
    for age, cap in zip((0, 1, 3), caps, strict=True):
        for inside in (cap * 0.999, 1.001 / cap, cap * 1.001, 0.999 / cap):
            one = TokenBatch(
                torch.tensor([math.log(inside)], dtype=torch.float64),
                logp_behave=torch.zeros(1, dtype=torch.float64),
                age=torch.tensor([age]),
            )
            kept = weights(one, resolve("mask", options)).weight.item() > 0
            assert kept == (1 / cap <= inside <= cap), "the lower bound is the upper one's reciprocal at every age"


def test_no_staleness_is_no_correction():
    batch = make(logp_prox=None, logp_behave=torch.full((4,), -1.0, dtype=torch.float64))
    for correction in (OFF, CLIP, TIS, MASK):
        w = weights(batch, correction)
        assert w.weight.tolist() == [1.0] * 4 and w.logp_prox.tolist() == [-1.0] * 4
        assert w.stats["policy/mismatch_kl"].value == 0


def test_broken_log_probs_weigh_one_and_are_counted_for_the_policy_alone():
    behave = torch.tensor([math.nan, math.inf, -math.inf, math.nan], dtype=torch.float64)
    for correction in (TIS, CLIP, MASK, resolve("tis", {"veto": 1.0})):
        w = weights(make(logp_behave=behave), correction)
        assert w.weight.tolist() == [1.0] * 4 and w.logp_prox.tolist() == [-1.0, -0.5, -2.0, -0.1]
        assert w.stats["policy/bad_logp"].sum == 3 and w.stats["policy/mismatch_kl"].weight == 0
    prox = torch.tensor([math.nan, -math.inf, -2.0, math.nan], dtype=torch.float64)
    assert weights(make(logp_prox=prox)).logp_prox.tolist() == [-1.0, -1.0, -2.0, -1.0]


def test_extreme_ratios_stay_finite_in_fp32():
    w = weights(make(logp=torch.zeros(4), logp_behave=torch.full((4,), -1e5)), resolve("tis", {"cap": 1e12}))
    assert torch.isfinite(w.weight).all() and w.weight[0].item() == pytest.approx(math.exp(20), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------- numbers


def sample_size(ws):
    return sum(ws) ** 2 / (len(ws) * sum(w * w for w in ws)) if any(ws) else 0.0


def test_numbers_by_age_are_those_of_plain_python():
    batch = batch_named("broken behaviour")
    ages = torch.tensor([0, 1, 2, 3, 4, 7, 8, 30, 5])
    batch = TokenBatch(**{f: getattr(batch, f) for f in batch.__dataclass_fields__} | {"age": ages[batch.sequence]})
    _, stats = loss("grpo", batch, correction="mask")
    w = weights(batch, MASK)
    low, high, found = 0.8, 1.2, set()
    policy = [i for i in range(len(batch.logp)) if batch.policy[i]]
    for bucket, members in zip(BUCKETS, ({0}, {1}, {2}, {3}, {4, 5, 7}, {8, 30}), strict=True):
        here = [i for i in policy if int(batch.age[i]) in members]
        if not here:
            assert f"staleness/{bucket}/frac" not in stats
            continue
        found.add(bucket)
        rho = [math.exp((batch.logp[i] - batch.logp_prox[i]).item()) for i in here]
        a = [batch.advantage[i].item() for i in here]
        gone = [r > high if x > 0 else x < 0 and r < low for r, x in zip(rho, a, strict=True)]
        usable = [i for i in here if math.isfinite(batch.logp_behave[i])]
        gaps = [min(20, max(-20, (batch.logp_prox[i] - batch.logp_behave[i]).item())) for i in usable]
        want = {
            "frac": len(here) / len(policy),
            "ess": sample_size([w.weight[i].item() for i in here]),
            "clip_frac": sum(gone) / len(here),
            "kl": sum(math.exp(g) - 1 - g for g in gaps) / len(usable),
        }
        for name, value in want.items():
            assert stats[f"staleness/{bucket}/{name}"] == pytest.approx(value, rel=1e-12), (bucket, name)
            assert metrics.find(f"staleness/{bucket}/{name}") is not None
        if bucket == "0":
            assert stats["policy/mismatch_kl_equal"] == pytest.approx(want["kl"], rel=1e-12)
    assert len(found) >= 5
    assert stats["policy/ess"] == pytest.approx(sample_size([w.weight[i].item() for i in policy]), rel=1e-12)
    assert MOMENTS not in stats


def test_tokens_without_an_age_count_in_the_whole_alone():
    _, stats = loss("grpo", make(advantage=torch.ones(4), age=None), correction="tis")
    ws = [1.0, 2.0, math.exp(-0.5)]
    assert stats["policy/ess"] == pytest.approx(sample_size(ws))
    assert not [n for n in stats if n.startswith("staleness/")]


def test_the_effective_sample_size_is_a_share():
    def ess(ws):
        batch = TokenBatch(torch.zeros(len(ws)), age=torch.zeros(len(ws), dtype=torch.long))
        one = weights(batch)._replace(weight=torch.tensor(ws))
        return numbers(moments(batch, one, torch.ones(len(ws), dtype=torch.bool)).sum.flatten().tolist())

    assert ess([1.0] * 7)["policy/ess"] == 1
    assert ess([1.0, 0.0, 0.0, 0.0])["policy/ess"] == 0.25
    assert ess([0.0, 0.0])["policy/ess"] == 0
    assert ess([]) == {}


def test_after_an_update_within_the_step_nothing_is_said_of_equal_versions():
    batch = make(age=torch.zeros(4, dtype=torch.long))
    assert "policy/mismatch_kl_equal" in weights(batch, TIS).stats
    assert "policy/mismatch_kl_equal" not in weights(batch, TIS, moved=0.5).stats


def test_missing_behaviour_log_probs_are_named():
    with pytest.raises(ValueError, match="logp_behave"):
        weights(make(logp_behave=None), TIS)


@pytest.mark.parametrize("name", ["off", "clip", "tis", "mask", "m2po"])
def test_weights_of_tokens_and_their_sums_read_no_number_from_the_device(name):
    """Tensors without content: whatever would wait for a GPU to look at a number fails on them."""
    one = {k: torch.zeros(8, device="meta") for k in ("logp", "logp_prox", "logp_behave", "advantage")}
    flags = {k: torch.zeros(8, dtype=torch.bool, device="meta") for k in ("mask", "is_teacher")}
    batch = TokenBatch(**one, **flags, age=torch.zeros(8, dtype=torch.long, device="meta"))
    options = {"decay": 0.5, "prox": "loglinear"} if name in ("tis", "mask") else {}
    w = weights(batch, resolve(name, options), moved=0.5, threshold=0.1)
    assert moments(batch, w, batch.mask).sum.is_meta
    with pytest.raises((RuntimeError, NotImplementedError)):
        bool(w.weight.sum() > 0)
