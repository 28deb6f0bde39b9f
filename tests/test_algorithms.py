"""Every objective against closed forms written here in plain Python floats, finite differences, and the identities."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from hapo_async import algorithms, objective
from hapo_async.algorithms import loss, whole
from hapo_async.config import parse
from hapo_async.errors import ConfigError
from tests.token_batches import K, make

ALL = ["sft", "grpo", "dr_grpo", "luffy", "hpt", "hapo", "apo", "hapo_apo"]


# ---------------------------------------------------------------------------------------------- independent closed forms


def clip(x, low, high):
    return min(max(x, low), high)


def ppo(rho, a, eps=0.2):
    return min(rho * a, clip(rho, 1 - eps, 1 + eps) * a)


def anchored(b, i, rho, a, lam=1.05, beta=0.1, eps=0.2, push_only=False, r_max=math.inf):
    if a >= 0:
        return ppo(rho, a, eps)
    ids = [k for k in range(K) if b.topk_keep[i][k]]
    z = sum(math.exp(b.topk_ref_logp[i][k]) for k in ids)
    usable = ids and z >= 1e-4
    r_a = min(sum(math.exp(b.topk_logp[i][k]) for k in ids) / z, r_max) if usable else 0.0
    if push_only:
        return min(lam * rho * a, clip(lam * rho, 1 - eps, 1 + eps) * a) - beta * a * r_a
    r = lam * rho - beta * r_a
    return min(r * a, clip(r, 1 - eps, 1 + eps) * a)


class Plain:
    """A batch as plain Python lists."""

    def __init__(self, batch):
        for field in batch.__dataclass_fields__:
            value = getattr(batch, field)
            setattr(self, field, value.detach().tolist() if isinstance(value, torch.Tensor) else value)


def per_token(name, b, o):
    """J of token i, before any reduction, or None where the token is not part of the loss."""
    shaping = {
        "f": lambda p: p / (p + o.get("shaping_gamma", 0.1)),
        "logp": math.log,
        "identity": lambda p: p,
    }[o.get("shaping", "f")]

    def j(i):
        teacher, a, pi = b.is_teacher[i], b.advantage[i], math.exp(b.logp[i])
        if not b.mask[i] or (teacher and name in ("grpo", "dr_grpo", "apo")):
            return None
        if name == "sft":
            return b.logp[i]
        prox, w = b.logp_prox[i], 1.0
        if o.get("correction") == "clip":
            prox = b.logp_behave[i]
        if o.get("correction") == "tis":
            w = min(math.exp(prox - b.logp_behave[i]), o.get("cap", 2.0))
        rho = math.exp(b.logp[i] - prox)
        if not teacher:
            if not o.get("clip", True):
                return w * rho * a
            if name in ("apo", "hapo_apo"):
                keys = {"lam": "lam", "beta": "beta", "r_anchor_max": "r_max"}
                more = {keys[k]: v for k, v in o.items() if k in keys}
                return w * anchored(b, i, rho, a, push_only=o.get("anchor_clip") == "push_only", **more)
            return w * ppo(rho, a)
        if name == "hpt":
            return o.get("sft_coef", 1.0) * b.logp[i]
        c = b.confidence[b.group[i]]
        factor = {"gate": 1.0, "1-c": 1 - c, "1-c/gamma": max(0.0, 1 - c / o.get("gamma", 0.8))}[
            o.get("confidence", "gate")
        ]
        times_a = o.get("teacher_weight", "advantage" if name == "luffy" else "one") == "advantage"
        return factor * shaping(pi) * (a if times_a else 1.0)

    return j


REDUCTION = {"dr_grpo": "SN", "hpt": "PN"}


def expected(name, b, **o):
    """-J in plain floats."""
    b = Plain(b)
    j = per_token(name, b, o)
    tokens = [(i, x) for i in range(len(b.logp)) if (x := j(i)) is not None]
    entropy = o.get("entropy_coef", 0.0)
    tokens = [(i, x + entropy * b.entropy[i]) for i, x in tokens]
    how, length = o.get("reduction", REDUCTION.get(name, "TM")), o.get("l_max", 1024.0)
    by_sequence = {}
    for i, x in tokens:
        by_sequence.setdefault(b.sequence[i], []).append((i, x))
    sums = {s: sum(x for _, x in xs) for s, xs in by_sequence.items()}
    is_teacher = {s: b.is_teacher[xs[0][0]] for s, xs in by_sequence.items()}
    if how == "TM":
        if o.get("normaliser") == "separate":
            halves = [[x for i, x in tokens if b.is_teacher[i] is t] for t in (False, True)]
            return -sum(sum(h) / len(h) for h in halves if h)
        return -sum(x for _, x in tokens) / len(tokens)
    if how == "SM":
        return -sum(sums[s] / len(xs) for s, xs in by_sequence.items()) / len(sums)
    if how == "SEQ":
        return -sum(sums.values()) / len(sums)
    if how == "SN":
        return -sum(sums.values()) / length / len(sums)
    group = {s: b.group[xs[0][0]] for s, xs in by_sequence.items()}
    total = 0.0
    for p in set(group.values()):
        rollouts = [s for s in sums if group[s] == p and not is_teacher[s]]
        total += sum(sums[s] / length for s in rollouts) / max(1, len(rollouts))
        total += sum(sums[s] / len(by_sequence[s]) for s in sums if group[s] == p and is_teacher[s])
    return -total / len(set(group.values()))


CASES = [(name, {}) for name in ALL] + [
    *[(n, {"reduction": r}) for n in ("sft", "grpo", "luffy", "hapo", "apo") for r in ("SM", "SEQ", "SN")],
    *[(n, {"correction": c}) for n in ("grpo", "dr_grpo", "hapo", "apo", "hapo_apo", "hpt") for c in ("clip", "tis")],
    ("grpo", {"correction": "tis", "cap": 1.1}),
    ("grpo", {"clip": False}),
    ("dr_grpo", {"l_max": 7.0}),
    ("luffy", {"clip": False, "reduction": "SN", "l_max": 8192.0, "entropy_coef": 0.001}),
    ("luffy", {"shaping_gamma": 0.3}),
    ("hpt", {"sft_coef": 0.3, "l_max": 5.0}),
    ("hpt", {"clip": False, "entropy_coef": 0.01}),
    ("hapo", {"shaping": "logp"}),
    ("hapo", {"shaping": "identity"}),
    ("hapo", {"shaping_gamma": 0.02, "teacher_weight": "advantage"}),
    ("hapo", {"confidence": "1-c"}),
    ("hapo", {"confidence": "1-c/gamma", "gamma": 0.5, "teacher_weight": "advantage"}),
    ("hapo", {"normaliser": "separate", "entropy_coef": 0.05}),
    ("apo", {"anchor_clip": "push_only"}),
    ("apo", {"beta": 0.7, "lam": 1.3}),
    ("apo", {"beta": 0.7, "r_anchor_max": 0.8}),
    ("apo", {"beta": 0.0, "lam": 1.2}),
    ("hapo_apo", {"anchor_clip": "push_only", "confidence": "1-c", "correction": "tis"}),
]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{o}" for n, o in CASES])
def test_value_and_loss_equal_the_closed_form_and_the_gradient_equals_its_finite_differences(name, options):
    for seed in (0, 1):
        batch = make(seed)
        total, stats = loss(name, batch, **options)
        want = expected(name, batch, **options)
        assert stats["value"] == pytest.approx(want, rel=1e-12, abs=1e-13)
        assert total.item() == pytest.approx(want, rel=1e-12, abs=1e-13)
        leaves = {"logp": batch.logp, "topk_logp": batch.topk_logp, "entropy": batch.entropy}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        step, found = 1e-6, 0
        for (field, x), grad in zip(leaves.items(), grads, strict=True):
            grad = torch.zeros_like(x) if grad is None else grad
            for index in range(x.numel()):
                ends = []
                for sign in (1, -1):
                    moved = x.detach().clone()
                    moved.view(-1)[index] += sign * step
                    ends.append(expected(name, replace(batch, **{field: moved}), **options))
                slope = (ends[0] - ends[1]) / (2 * step)
                assert grad.view(-1)[index].item() == pytest.approx(slope, abs=2e-8), (field, index)
                found += slope != 0
        assert found > 3


def test_the_random_batches_exercise_every_branch_of_the_clip_and_of_the_anchor():
    _, stats = loss("apo", make(0))
    assert 0 < stats["policy/clip_frac"] < 1
    assert 0 < stats["apo/dead_frac"] < 1
    _, stats = loss("grpo", make(0), correction="tis")
    assert 0 < stats["policy/weight_capped_frac"] < 1


# ---------------------------------------------------------------------------------------------------------- identities


def same(a, b):
    """Two (name, batch, options) give the same value and gradient."""
    out = []
    for name, batch, options in (a, b):
        total, stats = loss(name, batch, **options)
        out.append((stats["value"], torch.autograd.grad(total, batch.logp)[0]))
    assert out[0][0] == pytest.approx(out[1][0], rel=1e-14, abs=1e-15)
    assert torch.allclose(out[0][1], out[1][1], rtol=1e-13, atol=1e-16)
    assert out[0][1].abs().sum() > 0


def test_apo_without_push_and_pull_is_grpo():
    same(("apo", make(), {"lam": 1, "beta": 0}), ("grpo", make(), {}))
    no_topk = replace(make(), topk_logp=None, topk_ref_logp=None, topk_keep=None)
    same(("apo", no_topk, {"lam": 1, "beta": 0}), ("grpo", no_topk, {}))


def test_hapo_whose_gate_never_opens_is_grpo_with_a_token_mean():
    batch = make(teachers=())
    same(("hapo", batch, {"gamma": 0.0}), ("grpo", batch, {"reduction": "TM"}))
    same(("hapo_apo", batch, {}), ("apo", batch, {}))


def test_hapo_with_the_teacher_times_its_advantage_is_luffy_on_the_same_batch():
    same(("hapo", make(), {"teacher_weight": "advantage"}), ("luffy", make(), {"reduction": "TM", "clip": True}))


def test_hpt_without_demonstrations_is_dr_grpo_and_with_nothing_else_is_sft_per_prompt():
    even = {"lengths": (3, 4, 5, 2), "groups": (0, 0, 1, 1)}
    same(("hpt", make(teachers=(), **even), {}), ("dr_grpo", make(teachers=(), **even), {}))
    alone = make(lengths=(3, 4, 5), groups=(0, 1, 2), teachers=(0, 1, 2))
    same(("hpt", alone, {}), ("sft", alone, {"reduction": "SM"}))


def test_hapo_apo_differs_from_hapo_only_where_a_failure_trains():
    batch = replace(make(), advantage=make().advantage.abs())
    same(("hapo_apo", batch, {}), ("hapo", batch, {}))


def test_confidence_is_counted_from_the_rewards_where_it_is_not_given():
    batch = replace(make(), confidence=None)
    successes = [sum(bool(batch.reward[s] == 1) for s in rollouts) for rollouts in ([0, 1], [3, 4], [])]
    c = torch.tensor([(1 + s) / (2 + n) for s, n in zip(successes, (3, 2, 1), strict=True)], dtype=torch.float64)
    same(("hapo", batch, {"confidence": "1-c"}), ("hapo", replace(batch, confidence=c), {"confidence": "1-c"}))


# ------------------------------------------------------------------------------------------------------ table, options


def test_the_table_describes_every_algorithm_from_the_code():
    assert len(algorithms.names()) == len(set(algorithms.names())) == 33
    for name in algorithms.names():
        d = algorithms.get(name).describe()
        assert {"advantage", "reference", "mask", "weight", "reduction", "equation", "seed_papers", "defaults"} <= set(
            d
        )
        assert d["name"] == name and d["seed_papers"] and d["defaults"] == algorithms.get(name).resolve({})
    assert algorithms.get("hapo").uses_gate and algorithms.get("hapo_apo").uses_gate
    assert algorithms.get("apo").needs == {"prox", "topk"} and algorithms.get("sft").needs == set()
    luffy = algorithms.get("luffy")
    assert luffy.requires(luffy.resolve({"entropy_coef": 0.001})) == {"prox", "entropy"}
    assert algorithms.get("apo").requires(algorithms.get("apo").resolve({"beta": 0})) == {"prox"}


def test_a_config_that_cannot_learn_is_refused_and_the_run_implies_length_and_threshold():
    def config(algorithm, n=8, gamma=0.5, **options):
        tree = {
            "algorithm": algorithm,
            "sampling": {"n": n, "max_tokens": 64},
            "gate": {"gamma": gamma},
            "options": options,
        }
        return parse(tree)

    for name in algorithms.names():
        if name in {"sft", "ppo", "reinforce", "reinforce_pp", "psr", "nsr", "w_reinforce"}:
            algorithms.get(name).check_config(config(name, n=1))
            continue
        with pytest.raises(ConfigError, match=r"sampling\.n=1"):
            algorithms.get(name).check_config(config(name, n=1))
    assert algorithms.get("dr_grpo").check_config(config("dr_grpo"))["l_max"] == 64
    assert algorithms.get("dr_grpo").check_config(config("dr_grpo", l_max=9))["l_max"] == 9
    assert algorithms.get("hapo").check_config(config("hapo"))["gamma"] == 0.5
    with pytest.raises(ConfigError, match=r"gate\.gamma"):
        algorithms.get("hapo").check_config(config("hapo", gamma=0.5).model_copy(update={"options": {"gamma": 0.7}}))
    hpt = algorithms.get("hpt")
    assert hpt.check_config(parse({"algorithm": "hpt", "options": {"gamma": -1}}))["gamma"] == -1
    with pytest.raises(ConfigError, match="between -1"):
        hpt.check_config(parse({"algorithm": "hpt", "options": {"gamma": 9}}))


def test_the_one_loss_path_is_the_public_one():
    assert whole.objective is objective.objective
