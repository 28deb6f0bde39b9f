"""The learner's step in one plain process: equal to a textbook loop, whatever the cut into micro-batches."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hapo_async import batch, learn, metrics
from hapo_async.policy import load_policy
from hapo_async.types import Version
from tests import reference_loop, samples_learn


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return samples_learn.random_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def steps():
    return [samples_learn.tasks(8, 4, seed=step) for step in range(5)]


def make_learner(model: str, algorithm: str = "hapo", dtype=torch.float64, **settings) -> learn.Learner:
    """A learner on plain torch that keeps every update's gradients in ``learner.backend.seen``."""
    config = samples_learn.config(model, algorithm, **settings)
    backend = learn.TorchBackend(load_policy(model, config, dtype=dtype, device="cpu"), config)
    backend.seen = []
    update = backend.update

    def spy():
        backend.seen.append({n: p.grad.clone() for n, p in backend.policy.model.named_parameters()})
        return update()

    backend.update = spy
    return learn.Learner(backend, config)


def flat(gradients) -> torch.Tensor:
    return torch.cat([gradients[name].reshape(-1).double() for name in sorted(gradients)])


def relative(a, b) -> float:
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


@pytest.mark.parametrize("algorithm", ["grpo", "hapo"])
def test_five_steps_equal_the_plain_loop(model, steps, algorithm):
    learner = make_learner(model, algorithm, torch.float32)
    samples_learn.train_alone(learner, steps)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    trace = reference_loop.train(policy, steps, reference_loop.Recipe(algorithm))
    assert len(learner.backend.seen) == len(trace.gradients) == 10
    assert max(relative(a, b) for a, b in zip(learner.backend.seen, trace.gradients, strict=True)) < 1e-6
    for name, parameter in learner.backend.policy.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), trace.weights[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm", ["grpo", "dr_grpo", "luffy", "hpt", "hapo", "sft"])
def test_gradients_do_not_depend_on_the_number_of_micro_batches(model, steps, algorithm):
    def run(tokens):
        learner = make_learner(model, algorithm, micro_batch_tokens=tokens)
        tasks = [replace(t, teacher=t.teacher or t.answers[0]) for t in steps[0]] if algorithm == "sft" else steps[0]
        return samples_learn.train_alone(learner, [tasks])[0], learner.backend.seen

    (one, whole), (many, cut) = run(100_000), run(60)
    assert many["train/micro_batches"] > one["train/micro_batches"]
    assert max(relative(a, b) for a, b in zip(cut, whole, strict=True)) < 1e-12
    for name in ("loss/value", "policy/grad_norm", "train/tokens", "train/teacher_tokens"):
        assert many[name] == pytest.approx(one[name], rel=1e-9), name


def test_the_packed_layout_equals_the_padded_one(model, steps):
    padded, packed = make_learner(model), make_learner(model)
    packed._layout = "packed"
    for learner in (padded, packed):
        samples_learn.train_alone(learner, steps[:1])
    assert max(relative(a, b) for a, b in zip(packed.backend.seen, padded.backend.seen, strict=True)) < 1e-10


def test_gradient_checkpointing_changes_no_gradient(model, steps):
    plain, checkpointed = make_learner(model), make_learner(model, gradient_checkpointing=True)
    for learner in (plain, checkpointed):
        samples_learn.train_alone(learner, steps[:1])
    decoder = checkpointed.backend.policy.model.get_decoder()
    assert decoder.layers[0].gradient_checkpointing and decoder.training, "checkpointing must really be on"
    assert max(relative(a, b) for a, b in zip(checkpointed.backend.seen, plain.backend.seen, strict=True)) < 1e-12


def test_later_mini_batches_are_compared_with_the_policy_at_the_start_of_the_step(model, steps):
    """With a large step the second mini-batch's ratios leave 1; against its own policy they never would."""
    report = samples_learn.train_alone(make_learner(model, lr=3e-2), steps[:1])[0]
    assert abs(report["policy/ratio_mean"] - 1) > 1e-3
    single = samples_learn.train_alone(make_learner(model, lr=3e-2, mini_batches=1), steps[:1])[0]
    assert single["policy/ratio_mean"] == 1


def test_a_poisoned_batch_moves_nothing_and_the_next_one_trains(model, steps, monkeypatch):
    learner = make_learner(model)
    before = [p.detach().clone() for p in learner.backend.policy.parameters()]
    objective = learn.objective

    def poisoned(*args, **kwargs):
        loss, stats = objective(*args, **kwargs)
        return loss + (math.nan - loss).detach(), stats  # the value alone: its gradient stays finite

    with monkeypatch.context() as patch:
        patch.setattr(learn, "objective", poisoned)
        (report,) = samples_learn.train_alone(learner, steps[:1])
    assert report["train/skipped"] == 2 and report["train/updates"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, learner.backend.policy.parameters(), strict=True))
    assert learner.schedule.last_epoch == 0, "a skipped update does not count for the schedule"
    (report,) = samples_learn.train_alone(learner, steps[:1])
    assert report["train/updates"] == 2
    assert not all(torch.equal(a, b) for a, b in zip(before, learner.backend.policy.parameters(), strict=True))


def test_a_rank_without_groups_computes_dummies_of_zero_weight(model, steps):
    learner = make_learner(model)
    config = learner.config
    groups = samples_learn.groups(steps[0][:1], config, Version(0, 0))
    idle = batch.plan_step(groups, 2, 1, Version(0, 0))[1]
    report = learner.step(idle, samples_learn.sequences(idle))
    assert report.sums["train/tokens"] == 0
    assert flat(learner.backend.seen[0]).norm() == 0
    assert all(torch.isfinite(g).all() for g in learner.backend.seen[0].values())


def test_metrics_are_declared_and_measured(model, steps):
    (report,) = samples_learn.train_alone(make_learner(model), steps[:1])
    assert [name for name in report if metrics.find(name) is None] == []
    assert 0 < report["policy/entropy"] <= math.log(100) + 1e-9
    assert report["staleness/max"] == 0
    assert report["train/teacher_tokens"] > 0
    assert 0 <= report["train/padding_frac"] < 1
    assert report["policy/lr"] > 0


def test_the_age_of_tokens_counts_from_the_learners_version(model, steps):
    learner = make_learner(model)
    groups = samples_learn.groups(steps[0], learner.config, Version(0, 2))
    (plan,) = batch.plan_step(groups, 1, 1, Version(0, 5))
    report = learn.merge([learner.step(plan, samples_learn.sequences(plan))])
    assert report["staleness/mean"] == report["staleness/max"] == 3


def test_merge_weighs_means_and_adds_counts():
    def report(value, weight, top):
        return learn.RankReport(
            {"a": (value, weight), "train/teacher_tokens": (3, 1)}, {"n": 2}, {"m": top}, {"lr": 0.1}
        )

    assert learn.merge([report(1.0, 1.0, 5), report(0.0, 3.0, 4)]) == {
        "a": 0.25,
        "train/teacher_tokens": 6,
        "n": 4,
        "m": 5,
        "lr": 0.1,
    }


def test_state_restores_schedule_and_random_numbers(model, steps, tmp_path):
    learner = make_learner(model, warmup_steps=4)
    samples_learn.train_alone(learner, steps[:1])
    torch.save(learner.state(), tmp_path / "state.pt")
    drawn = torch.rand(3), np.random.rand(3), random.random()
    fresh = make_learner(model, warmup_steps=4)
    fresh.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]
    assert fresh.schedule.get_last_lr() == learner.schedule.get_last_lr() == [0.5e-3]
    assert fresh.backend.torch_optimizer.param_groups[0]["lr"] == 0.5e-3


def test_bfloat16_trains(model, steps):
    (report,) = samples_learn.train_alone(make_learner(model, dtype=torch.bfloat16), steps[:1])
    (exact,) = samples_learn.train_alone(make_learner(model), steps[:1])
    assert report["train/updates"] == 2
    assert report["policy/grad_norm"] == pytest.approx(exact["policy/grad_norm"], rel=0.1)
