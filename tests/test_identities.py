"""What the specification says that algorithms share: identities, the table of reference denominators, edges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import logsigmoid

from hapo_async import advantage, algorithms
from hapo_async.algorithms import loss, whole
from hapo_async.objective import objective
from hapo_async.upge import TokenBatch
from tests.oracles.batches import BATCHES, LEAVES, leaves, random
from tests.oracles.compare import CLOSE, apart, batch_named, package
from tests.oracles.offline import OFFLINE
from tests.oracles.plain import Plain, shares

NAMES = algorithms.names()
RATIOS = ("ppo", "grpo", "dr_grpo", "dapo", "reinforce_pp", "cispo", "gspo", "psr", "grpo_kl", "luffy", "hpt", "hapo")
RATIOS += ("hindsight_aware_hapo", "apo", "hapo_apo")


def same(a, b):
    """Two (name, batch, options) have the same value and gradients, and there is a gradient."""
    first, second = package(a[0], a[1], **a[2]), package(b[0], b[1], **b[2])
    assert max(apart(first, second)) <= 1e-13, (a[0], b[0], apart(first, second))
    assert any(g.abs().sum() > 0 for g in first.grads.values())


# ---------------------------------------------------------------------------------------------------------- identities


def test_apo_without_push_and_pull_is_grpo():
    for correction in ("off", "tis", "clip"):
        o = {"correction": correction}
        same(("apo", random(), {"lam": 1, "beta": 0} | o), ("grpo", random(), o))


def test_fpa_with_nothing_extrapolated_is_off_rl():
    same(("fpa", random(), {"lam": 0}), ("off_rl", random(), {}))
    no_side = leaves(random(), future_logp=random().logp.detach())
    same(("fpa", no_side, {}), ("off_rl", no_side, {}))


def test_hapo_whose_gate_never_opens_is_grpo_with_a_token_mean():
    same(("hapo", random(), {"gamma": 0.0}), ("grpo", random(), {"reduction": "TM"}))
    same(("hapo_apo", random(), {"gamma": 0.0}), ("apo", random(), {}))


def test_hapo_with_the_teacher_times_its_advantage_is_luffy_on_the_same_batch():
    batch = random(1, teachers=(3, 6, 8))
    same(("hapo", batch, {"teacher_weight": "advantage"}), ("luffy", batch, {"clip": True, "reduction": "TM"}))


def test_signed_capacity_without_kappa_is_grpo():
    same(("hindsight_aware_hapo", random(), {"kappa": 0}), ("grpo", random(), {"reduction": "TM"}))
    same(("hindsight_aware_hapo", random(), {"capacity": "none"}), ("grpo", random(), {"reduction": "TM"}))


def test_hpt_without_demonstrations_is_its_rl_part_and_with_nothing_else_is_sft():
    even = random(2, lengths=(3, 4, 5, 2), groups=(0, 0, 1, 1), rewards=(1, 0, 0, 1))
    for name in ("hpt", "hpt_off_on", "hpt_mix_on"):
        same((name, even, {"gamma": -1}), ("dr_grpo", even, {}))
    alone = random(3, lengths=(3, 4, 5), groups=(0, 1, 2), rewards=(1, 1, 1), teachers=(0, 1, 2))
    same(("hpt", alone, {"gamma": 3}), ("sft", alone, {"reduction": "SM"}))


def test_dpo_on_unnormalised_extrapolated_scores_is_dpo_with_a_larger_beta():
    batch, beta, lam = random(4), 0.1, 1.5
    score = {}
    for s in Plain(batch).sequences():
        now, ref = batch.logp[s.tokens].sum(), batch.logp_ref[s.tokens].sum()
        score[s.id] = (1 + lam) * now - lam * ref - ref  # against the reference, as DPO's own score is
    found = [(0, 1), (3, 2), (5, 4), (7, 8)]
    want = -sum(logsigmoid(beta * (score[w] - score[x])) for w, x in found) / len(found)
    got = package("dpo", batch, beta=beta * (1 + lam))
    assert got.value == pytest.approx(want.item(), rel=CLOSE)
    assert torch.allclose(got.grads["logp"], torch.autograd.grad(want, batch.logp)[0], rtol=CLOSE)


def test_reinforce_equals_grpo_at_equal_policies_and_gspo_equals_it_on_single_tokens():
    equal = batch_named("equal policies")
    a, b = package("reinforce", equal, reduction="TM").grads["logp"], package("grpo", equal).grads["logp"]
    assert torch.allclose(a, b, rtol=CLOSE)
    single = batch_named("responses of one token")
    same(("gspo", single, {}), ("grpo", single, {"reduction": "SM", "eps": 3e-4, "eps_high": 4e-4}))


@pytest.mark.parametrize("name", RATIOS)
def test_fresh_tokens_need_no_correction(name):
    batch = random(5, teachers=(3,) if name in ("luffy", "hpt", "hapo", "hapo_apo") else ())
    batch = leaves(batch, logp_behave=batch.logp_prox)
    for correction in ("tis", "clip"):
        same((name, batch, {"correction": correction}), (name, batch, {}))


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_of_whole_groups_add_up(name):
    algorithm, batch = algorithms.get(name), batch_named("large")
    want, options = package(name, batch), algorithm.resolve({})
    made, norm = whole.prepare(algorithm, batch, options)
    total = torch.zeros((), dtype=torch.float64)
    for chosen in ([4], [], [0, 5, 2], [3, 1]):
        rows = torch.isin(made.group, torch.tensor(chosen, dtype=torch.long))
        fields = {f: getattr(made, f) for f in made.__dataclass_fields__}
        part = {f: x[rows] if isinstance(x, torch.Tensor) and len(x) == len(rows) else x for f, x in fields.items()}
        total = total + objective(algorithm, options, type(made)(**part), norm)[0]
    inputs = [getattr(batch, f) for f in LEAVES]
    grads = zip(LEAVES, torch.autograd.grad(total, inputs, allow_unused=True), strict=True)
    got = type(want)(total.item(), {f: g for f, g in grads if g is not None})
    assert max(apart(got, want)) <= 1e-12


# ------------------------------------------------------------------------------------------------------- the UPGE table


def surrogate(batch, log_ref, a, keep, share, weight=1.0):
    """-sum(share * keep * A * weight * exp(l - sg(log_ref))): its gradient."""
    rows = torch.where(keep, share * a * weight * (batch.logp - log_ref.detach()).exp(), 0.0)
    return torch.autograd.grad(-rows.sum(), batch.logp)[0]


def test_every_row_of_the_estimators_table_has_the_gradient_of_its_reference_denominator():
    batch = random(6, masked=0.0)
    b, logp, a = Plain(batch), batch.logp.detach(), batch.advantage
    on, share = (
        torch.ones_like(batch.mask),
        lambda how: torch.tensor([shares(b.sequences(), how, 1024.0)[i] for i in range(b.n)]),
    )
    spread = lambda f: torch.tensor([f(s) for s in b.sequences()], dtype=torch.float64)[batch.sequence]  # noqa: E731
    gap = logp - batch.logp_prox
    inside = lambda x, low, high: torch.where(a > 0, x <= 1 + high, x >= 1 - low)  # noqa: E731
    log_s = spread(lambda s: gap[s.tokens].mean())
    r = spread(lambda s: 1.0 if s.reward == 1 else -1.0)
    delta = spread(lambda s: (logp - batch.logp_ref)[s.tokens].sum())
    z0 = torch.stack([delta[batch.sequence == s.id][0] for s in b.sequences()]).mean()
    v = torch.sigmoid(r * 0.1 * (delta - z0))
    likelihood = spread(lambda s: logp[s.tokens].mean().exp())
    future = spread(lambda s: batch.future_logp[s.tokens].mean().exp())
    rows = {
        "grpo": (batch.logp_prox, a, inside(gap.exp(), 0.2, 0.2), share("TM")),
        "dapo": (batch.logp_prox, a, inside(gap.exp(), 0.2, 0.28), share("TM")),
        "dr_grpo": (batch.logp_prox, a, inside(gap.exp(), 0.2, 0.2), share("SN")),
        "sft": (logp, 1.0, on, share("TM")),
        "reinforce": (logp, a, on, share("SEQ")),
        "rloo": (logp, a, on, share("SEQ")),
        "cispo": (logp - gap.clamp(max=math.log(5)), a, on, share("TM")),
        "gspo": (logp - log_s, a, inside(log_s.exp(), 3e-4, 4e-4), share("SM")),
        "kto": (logp, r * 0.1 * v * (1 - v), on, share("SEQ")),
        "off_rl": (logp, r, on, share("SM"), likelihood),
        "fpa": (logp, r, on, share("SM"), future),
    }
    for name, row in rows.items():
        assert torch.allclose(package(name, batch).grads["logp"], surrogate(batch, *row), rtol=CLOSE), name
    teachers = leaves(batch, is_teacher=on)
    shaped = 2 * torch.log(logp.exp() + 0.1) - math.log(0.1)
    for options, log_ref in (({}, shaped), ({"shaping": "identity"}, torch.zeros_like(logp))):
        got = package("luffy", teachers, **options).grads["logp"]
        assert torch.allclose(got, surrogate(teachers, log_ref, a, on, share("TM")), rtol=CLOSE), options


def test_apos_failures_have_the_gradient_of_their_two_terms():
    batch = leaves(random(7, masked=0.0), topk_keep=None)
    batch = replace(batch, advantage=-batch.advantage.abs())
    rho = (batch.logp - batch.logp_prox).exp()
    r_a = batch.topk_logp.exp().sum(-1) / batch.topk_ref_logp.exp().sum(-1)
    keep = (1.05 * rho - 0.1 * r_a).detach() >= 0.8
    terms = torch.where(keep, 1.05 * batch.advantage * rho - 0.1 * batch.advantage * r_a, 0.0)
    want = torch.autograd.grad(-terms.mean(), [batch.logp, batch.topk_logp])
    got = package("apo", batch).grads
    assert torch.allclose(got["logp"], want[0], rtol=CLOSE) and torch.allclose(got["topk_logp"], want[1], rtol=CLOSE)
    assert 0 < keep.sum() < len(keep)


# --------------------------------------------------------------------------------------------------------------- edges


@pytest.mark.parametrize("name", NAMES)
def test_nothing_to_train_gives_zero_with_a_graph(name):
    for at in ("empty", "all masked"):
        batch = BATCHES[at]()
        total, stats = loss(name, batch)
        assert total.item() == 0.0 and stats["value"] == 0.0
        total.backward()
        assert batch.logp.grad is not None and not batch.logp.grad.any()


@pytest.mark.parametrize("name", NAMES)
def test_numbers_of_masked_tokens_reach_neither_loss_nor_gradient(name):
    clean = random(17, teachers=(3, 6), masked=0.3)
    got, want = package(name, batch_named("broken where masked")), package(name, clean)
    assert got.value == want.value
    assert all(torch.equal(got.grads[f], want.grads[f]) for f in want.grads)


def test_groups_without_variance_keep_their_tokens_in_the_denominator():
    assert not advantage.compute("grpo", np.full((1, 7), 0.1)).any()
    batch = random(8, masked=0.0)
    silent = leaves(batch, advantage=torch.where(batch.group == 0, 0.0, batch.advantage))
    alone = leaves(batch, mask=batch.group != 0)
    share = int((batch.group != 0).sum()) / len(batch.logp)
    assert package("grpo", silent).value == pytest.approx(share * package("grpo", alone).value, rel=CLOSE)


def test_the_sampled_token_among_the_top_k_takes_no_part_whatever_its_score():
    batch = random(9)
    batch = leaves(batch, advantage=-batch.advantage.abs())
    other = torch.where(batch.topk_keep, batch.topk_logp.detach(), math.nan)
    a, b = package("apo", batch), package("apo", leaves(batch, topk_logp=other))
    assert a.value == b.value and torch.equal(a.grads["topk_logp"], b.grads["topk_logp"])
    assert not a.grads["topk_logp"][~batch.topk_keep].any() and a.grads["topk_logp"].any()


def test_an_anchor_with_no_mass_or_no_ids_does_not_pull():
    batch = random(10)
    batch = leaves(batch, advantage=-batch.advantage.abs())
    nowhere = {
        "Z": leaves(batch, topk_ref_logp=torch.full_like(batch.topk_ref_logp, -12.0)),
        "ids": leaves(batch, topk_keep=torch.zeros_like(batch.topk_keep)),
        "K": leaves(batch, **{f: getattr(batch, f)[:, :0] for f in ("topk_logp", "topk_ref_logp", "topk_keep")}),
    }
    want = package("apo", batch, beta=0)
    for why, b in nowhere.items():
        got = package("apo", b)
        assert got.value == want.value and torch.equal(got.grads["logp"], want.grads["logp"]), why
        assert why == "K" or not got.grads["topk_logp"].any()


def test_broken_behaviour_log_probs_weigh_one_and_are_counted():
    batch = BATCHES["broken behaviour"]()
    finite = torch.isfinite(batch.logp_behave)
    healed = leaves(batch, logp_behave=torch.where(finite, batch.logp_behave, batch.logp_prox))
    broken = int((~finite & batch.mask & ~batch.is_teacher).sum())
    for name in ("grpo", "gspo", "hapo", "apo"):
        same((name, batch, {"correction": "tis"}), (name, healed, {"correction": "tis"}))
        assert loss(name, batch, correction="tis")[1]["policy/bad_logp"] == broken == 3


@pytest.mark.parametrize("name", ["grpo", "gspo", "hapo", "apo", "hindsight_aware_hapo"])
def test_a_log_ratio_is_bounded_by_twenty_and_has_no_gradient_beyond(name):
    one = torch.ones(2, dtype=torch.float64)
    for gap, ratio in ((50.0, math.exp(20)), (-50.0, math.exp(-20))):
        logp = (-one).requires_grad_()
        batch = TokenBatch(logp, -one - gap, advantage=-one, sequence=torch.tensor([0, 1]), entropy_prox=one)
        total, stats = loss(name, batch, clip=False, **({"beta": 0.0, "lam": 1.0} if name == "apo" else {}))
        assert stats["value"] == pytest.approx(ratio, rel=CLOSE)
        assert not torch.autograd.grad(total, logp)[0].any()


@pytest.mark.parametrize("name", ["dpo", "rpo", "simper"])
def test_a_prompt_with_one_side_alone_makes_no_pair(name):
    for at in ("all right", "all wrong", "unjudged groups"):
        got = package(name, batch_named(at))
        assert got.value == 0 and not got.grads["logp"].any()
    got = package(name, batch_named("one side missing in some groups")).grads["logp"]
    assert not got[batch_named("one side missing in some groups").group != 2].any() and got.any()


def test_kto_with_one_class_moves_every_answer_the_same_way():
    for at, sign in (("all right", -1), ("all wrong", 1)):
        batch = batch_named(at)
        gradient = package("kto", batch).grads["logp"][batch.mask]
        assert (gradient.sign() == sign).all()


def test_a_filter_that_leaves_nothing_gives_zero_with_a_graph():
    wrong, right = batch_named("all wrong"), batch_named("all right")
    for name, batch in (("rft", wrong), ("psr", leaves(wrong, advantage=None)), ("nsr", leaves(right, advantage=None))):
        total, stats = loss(name, batch)
        assert stats["value"] == 0 and not torch.autograd.grad(total, batch.logp)[0].any()


@pytest.mark.parametrize("name", sorted([*OFFLINE, "rft", "srft"]))
def test_an_answer_without_a_verdict_moves_nothing(name):
    batch = batch_named("unjudged answers")
    lost = torch.isnan(batch.reward)[batch.sequence]
    gradient = package(name, batch).grads["logp"]
    assert not gradient[lost].any()
    if name != "srft":  # offline they are not even counted
        got, want = package(name, batch), package(name, leaves(batch, mask=batch.mask & ~lost))
        assert max(apart(got, want)) <= 1e-14
