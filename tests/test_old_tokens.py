"""Old tokens in a learner step: gradients and numbers that no cut into micro-batches and ranks changes, and what a pass
costs."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from hapo_async import batch, metrics
from hapo_async.algorithms import get
from hapo_async.learner import learn, tally
from hapo_async.objective import objective
from hapo_async.types import Version
from tests import learners, samples_learn

pytest_plugins = ["tests.learner_fixtures"]

NOW = 5


@pytest.fixture(scope="module")
def tasks():
    return learners.many_tasks()[:8]


def make(model, name, algorithm="grpo", tokens=300, options=None, **learner):
    """A learner with large updates and a correction."""
    made = learners.make(model, algorithm, micro_batch_tokens=tokens, lr=1e-2, **learner)
    changed = {"correction": name, "options": options or {}}
    staleness = type(made.config.staleness).model_validate(made.config.staleness.model_dump() | changed)
    made._set(made.config.model_copy(update={"staleness": staleness, "max_staleness": 8}))
    return made


def old(minis):
    """The sequences as if tokens of versions 0 to 5 made them, a good deal off the policy."""

    def aged(s):
        rng = np.random.default_rng([len(s.tokens), int(s.tokens.sum())])
        versions = np.where(s.version_steps >= 0, rng.integers(0, NOW + 1, len(s.tokens)), s.version_steps)
        behave = (-4.6 + 0.3 * rng.standard_normal(len(s.tokens))).astype(np.float32)
        return replace(s, version_steps=versions.astype(s.version_steps.dtype), logp_behave=behave)

    return [[aged(s) for s in mini] for mini in minis]


def plans(learner, tasks):
    groups = samples_learn.groups(tasks, learner.config, Version(0, 0))
    return batch.plan_step(groups, learner.config.learner.ranks, learner.config.learner.mini_batches, Version(0, NOW))


def step(learner, tasks):
    (plan,) = plans(learner, tasks)
    return tally.merge([learner.step(plan, old(samples_learn.sequences(plan)))]), learner.backend.seen


def together(pair, tasks):
    """The same step on two ranks, each a thread: gradients are summed before an update, as ZeRO does."""
    meet, table = threading.Barrier(2, timeout=60), [None, None]

    def exchange(rank, value):
        table[rank] = value
        meet.wait()
        both = list(table)
        meet.wait()
        return both

    def connect(rank, backend):
        backend.rank, backend.world_size = rank, 2
        backend.agree_max = lambda v: [max(x) for x in zip(*exchange(rank, v), strict=True)]
        backend.agree_sum = lambda v: [sum(x) for x in zip(*exchange(rank, v), strict=True)]
        backend.gather = lambda v: torch.cat(exchange(rank, v))
        update = backend.update

        def summed(max_norm=None):
            both = exchange(rank, [p.grad.clone() for p in backend.policy.parameters()])
            for p, mine, other in zip(backend.policy.parameters(), *both, strict=True):
                p.grad = mine + other
            return update(max_norm)

        backend.update = summed

    reports = [None, None]

    def run(rank, plan):
        reports[rank] = pair[rank].step(plan, old(samples_learn.sequences(plan)))

    threads = []
    for rank, plan in enumerate(plans(pair[0], tasks)):
        connect(rank, pair[rank].backend)
        threads.append(threading.Thread(target=run, args=(rank, plan), daemon=True))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(reports), "a rank did not come to the end"
    return tally.merge(reports), pair[0].backend.seen


CASES = [
    ("tis", "grpo", {"decay": 0.7, "veto": 0.45}),
    ("tis", "hapo", {"prox": "loglinear"}),
    ("sequence_mask", "grpo", {"cap": 5.0, "floor": 0.1, "decay": 0.9}),
    ("m2po", "hapo", {}),
    ("m2po", "gspo", {"tau": 0.001}),
    ("m2po", "rloo", {}),
    ("m2po", "cispo", {}),
]
EXACT = (
    "policy/ess",
    "policy/masked_frac",
    "policy/veto_frac",
    "policy/mismatch_kl",
    "policy/weight_mean",
    "staleness/",
)


@pytest.mark.parametrize(("name", "algorithm", "options"), CASES, ids=[f"{n}-{a}" for n, a, _ in CASES])
def test_a_step_is_the_same_in_one_some_or_many_micro_batches_and_on_two_ranks(model, tasks, name, algorithm, options):
    numbers, whole = step(make(model, name, algorithm, 100_000, options), tasks)
    pair = [make(model, name, algorithm, 300, options, ranks=2) for _ in range(2)]
    others = [step(make(model, name, algorithm, n, options), tasks) for n in (300, 1)] + [together(pair, tasks)]
    assert len(whole) == 2 and min(float(learners.flat(g).norm()) for g in whole) > 1e-6
    exact = {n for n in numbers if n.startswith(EXACT)}
    assert exact > {"policy/ess", "policy/mismatch_kl_equal", "staleness/0/ess", "staleness/4-7/clip_frac"}
    assert [n for n in numbers if metrics.find(n) is None] == []
    if name != "tis" or "veto" in options:
        assert 0 < numbers["policy/masked_frac"] < 1
    for other, seen in others:
        assert max(learners.relative(a, b) for a, b in zip(seen, whole, strict=True)) < 1e-10
        for n in exact:
            assert other[n] == pytest.approx(numbers[n], rel=1e-9, abs=1e-12), n


def forwards(learner, tasks) -> int:
    count, forward = [], learner.backend.forward
    learner.backend.forward = lambda micro, **wanted: count.append(1) or forward(micro, **wanted)
    step(learner, tasks)
    return len(count)


def test_what_each_correction_costs_in_forward_passes(model, tasks):
    def of(name, algorithm="grpo", minis=4, **options):
        return forwards(make(model, name, algorithm, 100_000, options, mini_batches=minis), tasks)

    assert of("off") == of("tis") == of("mask") == 4 + 3, "later mini-batches are scored before the step"
    assert of("clip") == of("tis", prox="loglinear") == 4, "nothing to score"
    assert of("m2po") == 4 + 3 + 1, "the first is scored as well"
    assert of("tis", "rloo") == 4 and of("m2po", "rloo") == 4 + 4
    assert of("tis", minis=1) == of("tis", minis=1, prox="loglinear") == 1


def watched(monkeypatch, learner, tasks):
    """What the objective was given, update by update."""
    seen = []
    monkeypatch.setattr(
        learn, "objective", lambda a, o, b, n, **k: seen.append((b, n, k)) or objective(a, o, b, n, **k)
    )
    step(learner, tasks)
    return seen


def test_versions_count_updates_made_within_the_step(model, tasks, monkeypatch):
    learner = make(model, "tis", tokens=100_000, options={"prox": "loglinear"}, mini_batches=4)
    assert [k["moved"] for _, _, k in watched(monkeypatch, learner, tasks)] == [0.0, 0.25, 0.5, 0.75]
    learner = make(model, "tis", tokens=100_000, options={"prox": "loglinear"}, mini_batches=4)
    learner.options["skip_grad_norm"] = 0.0
    assert [k["moved"] for _, _, k in watched(monkeypatch, learner, tasks)] == [0.0] * 4, "no update was applied"


def test_with_one_mini_batch_the_log_linear_proximal_policy_is_the_exact_one(model, tasks):
    (a, exact), (b, line) = (
        step(make(model, "tis", options=o, mini_batches=1), tasks) for o in ({}, {"prox": "loglinear"})
    )
    assert torch.equal(learners.flat(exact[0]), learners.flat(line[0])) and a["policy/ess"] == b["policy/ess"]


def test_the_second_moment_of_kept_tokens_is_within_tau_over_each_mini_batch(model, tasks, monkeypatch):
    learner = make(model, "m2po", "grpo", tokens=200)
    by_threshold = {}
    for b, norm, _ in watched(monkeypatch, learner, tasks):
        chosen = ~b.is_teacher
        by_threshold.setdefault(norm.m2_threshold, []).append((b.logp_prox - b.logp_behave).detach()[chosen])
    assert len(by_threshold) == 2, "one number for each mini-batch"
    for threshold, parts in by_threshold.items():
        sizes = torch.cat(parts).abs().sort().values
        kept = sizes[sizes <= threshold]
        assert len(parts) > 1 and 0 < len(kept) < len(sizes)
        assert kept.square().mean() <= 0.04 < sizes[: len(kept) + 1].square().mean()


def test_mismatch_at_equal_versions_is_told_from_staleness(model, tasks, monkeypatch):
    """Behaviour log-probs that are the learner's own for tokens of the present, and far off for older ones."""
    learner = make(model, "tis", mini_batches=2)
    (plan,) = plans(learner, tasks)
    minis = old(samples_learn.sequences(plan))
    warm = [replace(s, temperature=1.0) for mini in minis for s in mini]
    scores = iter(learner.score(warm))
    minis = [
        [replace(s, logp_behave=np.where(s.version_steps == NOW, next(scores), s.logp_behave)) for s in mini]
        for mini in minis
    ]
    report = tally.merge([learner.step(plan, minis)])
    assert report["policy/mismatch_kl_equal"] < 1e-9 < 1e-3 < report["policy/mismatch_kl"]
    assert report["staleness/0/kl"] < 1e-9 < 1e-3 < report["staleness/4-7/kl"]
    assert sum(v for n, v in report.items() if n.endswith("/frac")) == pytest.approx(1)
    assert get("grpo").rollout.ratio == "proximal"
