"""Every correction of old tokens against plain Python, finite differences, verl, and what must hold for all of them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from hapo_async import algorithms, config, corrections, staleness
from hapo_async.algorithms import loss
from hapo_async.corrections import CORRECTIONS, resolve
from hapo_async.errors import ConfigError
from tests.oracles import oracle, peers
from tests.oracles.batches import leaves, random
from tests.oracles.compare import CLOSE, apart, batch_named, package
from tests.oracles.plain import Plain

GIVEN = [
    ("off", {}),
    ("clip", {}),
    ("clip", {"cap": 1.3}),
    ("tis", {}),
    ("tis", {"cap": 1.2, "decay": 0.6, "veto": 0.3}),
    ("tis", {"prox": "loglinear", "moved": 0.5}),
    ("mask", {}),
    ("mask", {"cap": 1.4, "floor": 0.7, "decay": 0.5, "veto": 0.2}),
    ("mask", {"floor": 0.0, "decay": 0.5, "prox": "loglinear", "moved": 0.25}),
    ("sequence_tis", {}),
    ("sequence_tis", {"cap": 1.5, "decay": 0.5}),
    ("sequence_mask", {"cap": 3.0, "floor": 0.3}),
    ("sequence_mask", {"cap": 9.0, "floor": 0.1, "decay": 0.8}),
    ("geometric_tis", {}),
    ("geometric_tis", {"cap": 1.2, "decay": 0.5}),
    ("geometric_mask", {"cap": 1.3, "floor": 0.8}),
    ("geometric_mask", {"cap": 1.5, "floor": 0.6, "decay": 0.7, "veto": 0.3}),
    ("m2po", {}),
    ("m2po", {"tau": 0.2, "veto": 0.3}),
    ("m2po", {"tau": 1e-9}),
]
KINDS = {"grpo": "proximal", "gspo": "sequence", "cispo": "behaviour", "rloo": "weight", "apo": "proximal"}
BATCHES = (
    "random with teachers", "in another order", "weighted rows", "no proximal policy", "responses of one token",
    "a lone token", "all masked", "empty", "a response wholly masked", "teachers alone", "broken where masked",
    "broken behaviour", "ratios beyond the bound",
)  # fmt: skip
IDS = [f"{name}-{options}" for name, options in GIVEN]


# ----------------------------------------------------------------------------------------------------- names and options


def test_every_name_resolves_and_is_among_the_cases():
    assert {name for name, _ in GIVEN} == set(CORRECTIONS)
    for name, row in CORRECTIONS.items():
        settings = resolve(name, {key: option.default for key, option in row.options.items()})
        assert settings == resolve(name, {}) and settings.name == name and settings.kind == row.kind


def test_auto_is_one_constant_where_data_may_be_old_and_off_elsewhere():
    assert resolve("auto", {"cap": 3}).name == corrections.AUTO and resolve("auto", {"cap": 3}).cap == 3.0
    assert resolve("auto", {"cap": 3}, asynchronous=False) == corrections.OFF
    assert config.load(None, ["max_staleness=0"]).correction == corrections.OFF
    assert config.load(None, ["max_staleness=2"]).correction.name == corrections.AUTO
    chosen = config.load(None, ["max_staleness=0", "staleness.correction=m2po", "staleness.options={tau: 0.1}"])
    assert chosen.correction.tau == 0.1, "a correction by name is taken at its word"


def test_off_must_be_said_and_leaves_the_options_of_others_unused():
    for word in ("off", False):
        assert resolve(word, {"cap": 3, "tau": 0.1}) == corrections.OFF
    with pytest.raises(ValueError, match="write off"):
        resolve(None, {})
    with pytest.raises(ConfigError, match=r"staleness.correction.*write off"):
        config.load(None, ["staleness.correction=null"])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("ppo", {}, "'ppo' must be one of auto, off, clip, tis"),
        ("sequence-tis", {}, "did you mean 'sequence_tis'"),
        (True, {}, "True must be one of"),
        (["tis"], {}, "must be one of"),
        ("tis", {"cap": 0.9}, "cap=0.9 of correction 'tis' must be a number of at least 1"),
        ("tis", {"cap": None}, "cap=None"),
        ("tis", {"decay": 0}, "above 0 and at most 1"),
        ("tis", {"decay": 1.1}, "at most 1"),
        ("tis", {"veto": -1}, "at least 0"),
        ("tis", {"prox": "linear"}, "one of recompute, loglinear"),
        ("tis", {"cpa": 2}, "Did you mean 'cap'"),
        ("tis", {"floor": 0.5}, "It is one of mask, sequence_mask, geometric_mask"),
        ("mask", {"floor": 1.5}, "at most 1"),
        ("m2po", {"tau": 0}, "tau=0 .* above 0"),
        ("m2po", {"prox": "loglinear"}, "no option of correction 'm2po'"),
        ("clip", {"veto": 0.1}, "Its options: cap"),
        ("off", {"cpa": 2}, "Did you mean 'cap'"),
        ("auto", {"tau": 0.1}, "no option of correction 'clip'"),
    ],
)
def test_what_is_refused_names_value_rule_and_fix(name, options, words):
    with pytest.raises(ValueError, match=words):
        resolve(name, options)
    if name == "auto" or (isinstance(name, str) and name in CORRECTIONS):
        text = ", ".join(f"{k}: {'null' if v is None else v}" for k, v in options.items())
        with pytest.raises(ConfigError, match=r"staleness\.options=.*" + words):
            config.load(None, [f"staleness.correction={name}", f"staleness.options={{{text}}}"])


def test_the_table_needs_no_torch():
    code = "import sys, hapo_async.corrections; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_an_option_of_an_algorithm_without_ratios_stays_its_own():
    shared = {key: n for n, a in algorithms.TABLE.items() for key in corrections.OPTIONS if key in a.all_options}
    assert shared == {"tau": "off_rl_kl"} and algorithms.get("off_rl_kl").rollout.ratio == "none"
    batch = batch_named("random")
    assert loss("off_rl_kl", batch, tau=0.9)[1]["value"] != loss("off_rl_kl", batch)[1]["value"]


# ------------------------------------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize(("name", "options"), GIVEN, ids=IDS)
def test_values_and_gradients_are_those_of_plain_python_for_every_kind_of_ratio(name, options):
    far = {}
    for algorithm in (*KINDS, "hapo"):
        for b in BATCHES:
            given = options | {"correction": name}
            batch = batch_named(b)
            difference = max(apart(package(algorithm, batch, **given), oracle(algorithm)(batch, **given)))
            if difference > CLOSE:
                far[algorithm, b] = difference
    assert far == {}


def test_the_batches_meet_both_sides_of_every_bound():
    seen = {(n, str(o)): loss("grpo", batch_named("random"), correction=n, **o)[1] for n, o in GIVEN}
    for (name, options), stats in seen.items():
        row = CORRECTIONS[name]
        if row.kind in ("mask", "moment") and options != "{'tau': 1e-09}":
            assert 0 < stats["policy/masked_frac"] < 1, (name, options)
        if row.kind == "cap":
            assert 0 < stats["policy/weight_capped_frac"] < 1, (name, options)
        if "veto" in options:
            assert stats["policy/veto_frac"] > 0, (name, options)
    assert seen["m2po", "{'tau': 1e-09}"]["policy/masked_frac"] == 1


STILL = [(n, o) for n, o in GIVEN if o.get("prox") != "loglinear"]  # w and the denominator do not move with l


@pytest.mark.parametrize("algorithm", ["grpo", "gspo", "apo"])
def test_gradients_are_finite_differences_where_weights_stand_still(algorithm):
    batch, step = random(21, lengths=(4, 1, 3), groups=(0, 0, 1), rewards=(1.0, 0.0, 1.0), masked=0.0), 1e-6
    for name, options in STILL:
        given = options | {"correction": name}
        grad = package(algorithm, batch, **given).grads["logp"]
        for at in range(len(grad)):
            ends = []
            for sign in (1, -1):
                moved = batch.logp.detach().clone()
                moved[at] += sign * step
                ends.append(loss(algorithm, replace(batch, logp=moved), **given)[1]["value"])
            assert grad[at].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=3e-8), (name, options, at)


# ---------------------------------------------------------------------------------------------------------- what always holds


@pytest.mark.parametrize("algorithm", [*KINDS, "hapo", "reinforce", "hpt"])
def test_tokens_of_the_policy_itself_need_no_correction(algorithm):
    batch = batch_named("random with teachers")
    ratio = algorithms.get(algorithm).rollout.ratio
    own = batch.logp.detach() if ratio in ("weight", "behaviour") else batch.logp_prox
    fresh = leaves(batch, logp_behave=own, logp_prox=own)
    want = package(algorithm, fresh)
    for name, options in GIVEN:
        if options.get("prox") == "loglinear":  # lp lies at the behaviour policy where the token is of this very step
            options = options | {"moved": 0.5}
            fresh = leaves(fresh, age=torch.zeros_like(batch.age))
        assert max(apart(package(algorithm, fresh, correction=name, **options), want)) < 1e-12, (name, options)


@pytest.mark.parametrize("reduction", ["TM", "SM", "SN", "SEQ"])
def test_masked_tokens_stay_in_the_denominators(reduction):
    """A response that a veto masks counts like one whose advantage is 0."""
    batch = batch_named("random with teachers")
    behave = batch.logp_prox.clone()
    behave[int((batch.mask & (batch.sequence == 4)).nonzero()[0])] += 3
    old = leaves(batch, logp_behave=behave)
    silent = leaves(batch, logp_behave=batch.logp_prox, advantage=batch.advantage * (batch.sequence != 4))
    for name in ("tis", "mask", "m2po", "sequence_tis", "geometric_mask"):
        got = package("hapo", old, correction=name, veto=0.1, reduction=reduction)
        assert max(apart(got, package("hapo", silent, reduction=reduction))) < 1e-12, name
    assert loss("hapo", old, correction="tis", veto=0.1)[1]["policy/veto_frac"] > 0


@pytest.mark.parametrize("algorithm", ["hapo", "luffy", "hpt", "srft"])
def test_no_teacher_token_has_a_weight_or_a_say_in_one(algorithm):
    batch = batch_named("random with teachers")
    teachers = batch.is_teacher & batch.mask
    wild = leaves(
        batch,
        logp_behave=torch.where(teachers, -40.0, batch.logp_behave),
        logp_prox=torch.where(teachers, torch.nan, batch.logp_prox),
        age=torch.where(teachers, 99, batch.age),
    )
    for name, options in GIVEN:
        given = options | {"correction": name}
        (_, stats), (_, other) = loss(algorithm, batch, **given), loss(algorithm, wild, **given)
        assert stats == other, (name, options)
        settings, moved, _ = algorithms.whole.split(algorithms.get(algorithm), given)
        for ratio in ("proximal", "sequence", "behaviour", "weight"):
            w = staleness.weights(wild, settings, ratio, moved=moved, threshold=0.1)
            assert (w.weight[teachers] == 1).all() and (w.kl[teachers] == 0).all(), (name, ratio)


@pytest.mark.parametrize("algorithm", ["sft", "off_rl", "dpo", "kto"])
def test_algorithms_without_ratios_know_of_no_correction(algorithm):
    batch = batch_named("random")
    want = package(algorithm, batch)
    for name in CORRECTIONS:
        _, stats = loss(algorithm, batch, correction=name)
        assert max(apart(package(algorithm, batch, correction=name), want)) == 0
        assert not [key for key in stats if key.startswith("staleness/") or "weight_mean" in key]


def test_a_sequence_weight_neither_overflows_nor_vanishes():
    n = 4000
    for gap, want in ((1.0, 1e9), (-1.0, 0.0)):
        batch = random(0, lengths=[n], groups=[0], rewards=[1.0], masked=0.0)
        batch = leaves(batch, logp_behave=batch.logp_prox - gap, logp=batch.logp_prox)
        low = replace(batch, logp_prox=batch.logp_prox.float(), logp_behave=batch.logp_behave.float())
        w = staleness.weights(low, resolve("sequence_tis", {"cap": 1e12})).weight
        assert torch.isfinite(w).all() and w[0].item() == pytest.approx(want, rel=0.6, abs=1e-8)


def test_what_a_correction_needs_is_named():
    batch = batch_named("random")
    with pytest.raises(ValueError, match="age"):
        loss("grpo", replace(batch, age=None), correction="tis", decay=0.5)
    with pytest.raises(ValueError, match="age"):
        loss("grpo", replace(batch, age=None), correction="tis", prox="loglinear", moved=0.5)
    with pytest.raises(ValueError, match="m2_threshold"):
        staleness.weights(batch, resolve("m2po", {}))
    with pytest.raises(ValueError, match="logp_behave"):
        loss("grpo", replace(batch, logp_behave=None), correction="m2po")
    with pytest.raises(ValueError, match="moved=1"):
        loss("grpo", batch, correction="tis", prox="loglinear", moved=1)
    with pytest.raises(ValueError, match="cap=0"):
        loss("grpo", batch, correction="tis", cap=0.0)


# --------------------------------------------------------------------------------------------------------- proximal, M2PO


def test_the_log_linear_proximal_policy_lies_between_behaviour_and_current_by_versions():
    batch = replace(
        batch_named("random"), age=torch.arange(len(batch_named("random").logp)) % 4, mask=None, logp_prox=None
    )
    logp, behave = batch.logp.detach(), batch.logp_behave
    for moved in (0.0, 0.25, 0.5):
        prox = staleness.weights(batch, resolve("tis", {"prox": "loglinear"}), moved=moved).logp_prox
        for i in range(len(logp)):
            age = int(batch.age[i])
            alpha = 1.0 if age + moved == 0 else age / (age + moved)
            assert prox[i].item() == pytest.approx((1 - alpha) * behave[i].item() + alpha * logp[i].item(), rel=1e-13)
        if moved == 0:
            assert torch.equal(prox, logp), "before the first update the policy is its own proximal policy, to the bit"


def test_m2po_keeps_as_many_of_the_smallest_as_fit():
    def threshold(*sizes, tau=0.04):
        return staleness.m2_threshold(torch.tensor(sizes, dtype=torch.float64), tau)

    assert threshold() == threshold(0.1, 0.0, 0.2) == float("inf")
    assert threshold(0.0, 0.1, 1.0) == pytest.approx(0.55)
    assert threshold(1.0, 0.1, 0.0) == threshold(0.0, 0.1, 1.0), "order is nothing"
    assert threshold(0.25, 0.25, tau=0.0625) == float("inf"), "a mean of exactly tau fits"
    assert 0 < threshold(0.5, 0.9) < 0.5, "even the smallest alone is too much"
    # One of the equals would fit, both do not: they go together.
    assert 0.0 < threshold(0.0, 0.0, 0.3, 0.3) < 0.3
    assert threshold(0.0, 0.0, 0.3) == float("inf")


def test_m2po_counts_neither_teachers_nor_masked_nor_broken_tokens():
    batch = batch_named("broken behaviour")
    plain = Plain(batch)
    usable = [
        i for i in range(plain.n)
        if plain.mask[i] and not plain.is_teacher[i] and torch.isfinite(batch.logp_behave[i])
    ]  # fmt: skip
    gaps = (batch.logp_prox - batch.logp_behave)[usable].clamp(-20, 20).abs()
    assert torch.equal(staleness.log_ratios(batch, "proximal"), gaps)
    assert len(usable) < int((batch.mask & ~batch.is_teacher).sum())


# ---------------------------------------------------------------------------------------------------------------- verl


def verl_rows(batch):
    b = Plain(batch)
    p = peers.Padded.of(b, peers.rollouts(b))
    return p, p.rows([b.prox(i) - b.logp_behave[i] for i in range(b.n)])


@pytest.mark.parametrize("batch", ["random", "large without teachers", "responses of one token"])
def test_weights_are_verls_where_it_has_them(batch):
    helper = peers.load("verl.trainer.ppo.rollout_corr_helper")
    batch = batch_named(batch)
    p, gap = verl_rows(batch)
    on = p.mask.bool()

    def ours(name, **options):
        return p.rows(staleness.weights(batch, resolve(name, options)).weight)[on]

    for name, level, spec, options in (
        ("tis", "token", 1.5, {"cap": 1.5}),
        ("mask", "token", "0.6_1.7", {"floor": 0.6, "cap": 1.7}),
        ("sequence_tis", "sequence", 2.0, {"cap": 2.0}),
        ("sequence_mask", "sequence", "0.4_3.0", {"floor": 0.4, "cap": 3.0}),
    ):
        theirs = helper.compute_rollout_correction_weights(gap, p.mask, level, spec)[0]
        torch.testing.assert_close(ours(name, **options), theirs[on], rtol=CLOSE, atol=0)
    # Its filters measure log pi_behave - log pi_prox, and bound its exponential.
    floor, cap = 0.7, 1.4
    for name, statistic in (("mask", "token_k1"), ("sequence_mask", "seq_sum_k1"), ("geometric_mask", "seq_mean_k1")):
        kept = helper.compute_rollout_rejection_mask(gap, p.mask, statistic, f"{1 / cap}_{1 / floor}")[0]
        assert torch.equal(ours(name, floor=floor, cap=cap) > 0, kept[on] > 0), name
