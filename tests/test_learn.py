"""The learner's step in one plain process: equal to a textbook loop, whatever the cut into micro-batches."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from hapo_async import algorithms, batch
from hapo_async.errors import ConfigError
from hapo_async.learner import learn, tally
from hapo_async.learner.backend import TorchBackend
from hapo_async.learner.policy import load_policy
from hapo_async.types import Source, Version
from tests import learners, reference_loop, samples_learn

pytest_plugins = ["tests.learner_fixtures"]


@pytest.mark.parametrize("algorithm", ["grpo", "hapo"])
def test_five_steps_equal_the_plain_loop(model, steps, algorithm):
    learner = learners.make(model, algorithm, torch.float32)
    samples_learn.train_alone(learner, steps)
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager")
    trace = reference_loop.train(policy, steps, reference_loop.Recipe(algorithm))
    assert len(learner.backend.seen) == len(trace.gradients) == 10
    assert max(learners.relative(a, b) for a, b in zip(learner.backend.seen, trace.gradients, strict=True)) < 1e-6
    for name, parameter in learner.backend.policy.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), trace.weights[name], atol=1e-5, rtol=0)


KINDS = [
    ("grpo", {"entropy_coef": 0.01, "kl_coef": 0.1, "kl": "k2", "kl_where": "errors"}),
    *((name, {}) for name in ("gspo", "hapo_apo", "ppo", "kto", "dpo", "fpa", "hpt", "reinforce_pp", "off_rl_kl")),
    ("hindsight_aware_hapo", {"quadrants": 5}),
    ("apo", {"critic": True}),
]


REST = [
    *((name, {}) for name in algorithms.names() if name not in {k for k, _ in KINDS}),
    ("hindsight_aware_hapo", {"capacity": "entropy_advantage"}),
    ("dpo", {"pairs": "all"}),
    ("off_rl_kl", {"kl_estimator": "k3"}),
    ("hpt", {"feedback": "linear"}),
]


def by_name(value) -> str:
    return value if isinstance(value, str) else "-".join(map(str, value))


@pytest.mark.parametrize(("algorithm", "options"), KINDS, ids=by_name)
def test_64_answers_as_one_as_some_or_as_single_micro_batches(model, reference, many_tasks, algorithm, options):
    """Two updates of large steps; preference pairs are cut between groups alone."""
    whole, some, single = (cut(model, algorithm, options, reference, many_tasks, n) for n in (100_000, 400, 1))
    compare(some, whole)
    compare(single, whole)
    assert single[0]["train/micro_batches"] > some[0]["train/micro_batches"]


@pytest.mark.parametrize(("algorithm", "options"), REST, ids=by_name)
def test_gradients_do_not_depend_on_the_number_of_micro_batches(model, reference, many_tasks, algorithm, options):
    whole, some = (cut(model, algorithm, options, reference, many_tasks[:8], n) for n in (100_000, 60))
    compare(some, whole)


def cut(model, algorithm, options, reference, tasks, tokens):
    learner = learners.make(model, algorithm, reference=reference, options=options, lr=1e-2, micro_batch_tokens=tokens)
    return samples_learn.train_alone(learner, [tasks])[0], learner.backend.seen


def compare(cut, whole) -> None:
    (many, seen), (one, expected) = cut, whole
    assert many["train/micro_batches"] > one["train/micro_batches"] == len(expected) == 2
    assert min(learners.flat(g).norm() for g in expected) > 1e-6, "a vanishing gradient would compare as equal"
    assert max(learners.relative(a, b) for a, b in zip(seen, expected, strict=True)) < 1e-10
    same = {n for n in one if n.startswith(("loss/", "offline/", "policy/hidden", "critic/", "reference/"))}
    for name in same | {"policy/grad_norm", "train/tokens", "train/teacher_tokens"}:
        assert many[name] == pytest.approx(one[name], rel=1e-9, abs=1e-12), name


@pytest.mark.parametrize("algorithm", ["hapo", "dpo", "ppo"])
def test_the_order_of_groups_changes_nothing(model, reference, many_tasks, algorithm):
    def run(tasks):
        learner = learners.make(model, algorithm, reference=reference, mini_batches=1, micro_batch_tokens=400)
        return samples_learn.train_alone(learner, [tasks])[0], learner.backend.seen[0]

    (one, a), (other, b) = run(many_tasks), run(many_tasks[::-1])
    assert learners.relative(a, b) < 1e-12
    assert one["loss/value"] == pytest.approx(other["loss/value"], rel=1e-12)


@pytest.mark.parametrize("algorithm", ["hapo", "dpo", "ppo"])
def test_the_packed_layout_equals_the_padded_one(model, reference, many_tasks, algorithm):
    padded, packed = learners.make(model, algorithm, reference=reference), learners.make(model, algorithm)
    packed._layout = "packed"
    for learner in (padded, packed):
        samples_learn.train_alone(learner, [many_tasks])
    assert max(learners.relative(a, b) for a, b in zip(packed.backend.seen, padded.backend.seen, strict=True)) < 1e-10


def test_gradient_checkpointing_changes_no_gradient(model, steps):
    plain, checkpointed = learners.make(model), learners.make(model, gradient_checkpointing=True)
    for learner in (plain, checkpointed):
        samples_learn.train_alone(learner, steps[:1])
    decoder = checkpointed.backend.policy.model.get_decoder()
    assert decoder.layers[0].gradient_checkpointing and decoder.training, "checkpointing must really be on"
    assert (
        max(learners.relative(a, b) for a, b in zip(checkpointed.backend.seen, plain.backend.seen, strict=True)) < 1e-12
    )


def test_a_poisoned_batch_moves_nothing_and_the_next_one_trains(model, steps, monkeypatch):
    learner = learners.make(model)
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
    learner = learners.make(model)
    config = learner.config
    groups = samples_learn.groups(steps[0][:1], config, Version(0, 0))
    idle = batch.plan_step(groups, 2, 1, Version(0, 0))[1]
    report = learner.step(idle, samples_learn.sequences(idle))
    assert report.sums["train/tokens"] == 0
    assert learners.flat(learner.backend.seen[0]).norm() == 0
    assert all(torch.isfinite(g).all() for g in learner.backend.seen[0].values())


def test_sequences_without_a_token_to_train_are_left_out(model, steps):
    """Tools may answer without the policy having said a word; a rank may be left with nothing else."""
    learner = learners.make(model, "grpo")
    plan, minis = learners.plan_of(learner, steps[0])
    silent = [
        [replace(s, sources=np.full_like(s.sources, Source.ENVIRONMENT)) for s in minis[0][:2]] + minis[0][2:],
        [replace(s, tokens=s.tokens[:0], sources=s.sources[:0]) for s in minis[1]],
    ]
    report = learner.step(plan, silent)
    assert report.sums["train/tokens"] == sum(len(s.tokens) for s in minis[0][2:])
    assert learners.flat(learner.backend.seen[0]).norm() > 0 and learners.flat(learner.backend.seen[1]).norm() == 0


def test_state_restores_schedule_and_random_numbers(model, steps, tmp_path):
    learner = learners.make(model, warmup_steps=4)
    samples_learn.train_alone(learner, steps[:1])
    torch.save(learner.state(), tmp_path / "state.pt")
    drawn = torch.rand(3), np.random.rand(3), random.random()
    fresh = learners.make(model, warmup_steps=4)
    fresh.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    again = torch.rand(3), np.random.rand(3), random.random()
    assert torch.equal(drawn[0], again[0]) and (drawn[1] == again[1]).all() and drawn[2] == again[2]
    assert fresh.schedule.get_last_lr() == learner.schedule.get_last_lr() == [0.5e-3]
    assert fresh.backend.torch_optimizer.param_groups[0]["lr"] == 0.5e-3


def test_bfloat16_trains(model, steps):
    (report,) = samples_learn.train_alone(learners.make(model, dtype=torch.bfloat16), steps[:1])
    (exact,) = samples_learn.train_alone(learners.make(model), steps[:1])
    assert report["train/updates"] == 2
    assert report["policy/grad_norm"] == pytest.approx(exact["policy/grad_norm"], rel=0.1)


def logp_of(path, sequence, temperature: float = 1.0) -> torch.Tensor:
    """[T]: log-probs of a sequence's tokens by plain transformers."""
    policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ids = torch.tensor([[*sequence.prompt_tokens.tolist(), *sequence.tokens.tolist()]])
    with torch.no_grad():
        logits = policy(input_ids=ids).logits[0, len(sequence.prompt_tokens) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, ids[0, len(sequence.prompt_tokens) :, None])[:, 0]


@pytest.mark.parametrize("tokens", [30, 100_000])
def test_scores_are_those_of_transformers_at_temperature_one(model, steps, tokens):
    learner = learners.make(model, dtype=torch.float32, micro_batch_tokens=tokens)
    _, (first, second) = learners.plan_of(learner, steps[0])
    sequences = [replace(s, temperature=0.5) for s in (*first, *second)]
    environment = sequences[3].sources.copy()
    environment[1:] = Source.ENVIRONMENT
    sequences[3] = replace(sequences[3], sources=environment)
    sequences[5] = replace(sequences[5], tokens=sequences[5].tokens[:0], sources=sequences[5].sources[:0])
    scored = learner.score(sequences)
    for s, scores in zip(sequences, scored, strict=True):
        assert scores.dtype == np.float32 and scores.shape == s.tokens.shape
        trained = (s.sources == Source.POLICY) | (s.sources == Source.TEACHER)
        assert np.isnan(scores[~trained]).all()
        if len(s.tokens):
            np.testing.assert_allclose(scores[trained], logp_of(model, s).numpy()[trained], atol=1e-5)
    assert not learner.backend.seen and all(p.grad is None for p in learner.backend.policy.parameters())


def test_a_learner_without_critic_or_reference_refuses_what_needs_them(model):
    for algorithm, what in (("ppo", "critic"), ("apo", "reference"), ("fpa", "reference"), ("grpo_kl", "reference")):
        config = samples_learn.config(model, algorithm)
        backend = TorchBackend(load_policy(model, config, dtype=torch.float32, device="cpu"), config)
        with pytest.raises(ConfigError, match=what):
            learn.Learner(backend, config)
    assert "reference" not in learn.needs_of(samples_learn.config(model, "dpo")), "offline scores are cached"


def test_configure_changes_algorithm_and_optimizer_and_keeps_the_weights(model, reference, many_tasks):
    learner = learners.make(model, "grpo", reference=reference, mini_batches=1)
    fresh = learners.make(model, "hapo_apo", reference=reference, mini_batches=1, lr=2e-3, grad_clip=0.5)
    learner.configure(fresh.config)
    for mine in (learner, fresh):
        samples_learn.train_alone(mine, [many_tasks, many_tasks])
    assert all(
        learners.flat(a).equal(learners.flat(b)) for a, b in zip(learner.backend.seen, fresh.backend.seen, strict=True)
    )
    pairs = zip(learner.backend.policy.parameters(), fresh.backend.policy.parameters(), strict=True)
    assert all(a.equal(b) for a, b in pairs)


def test_held_out_loss_moves_nothing_and_is_the_steps_own(model, reference, many_tasks):
    learner = learners.make(model, "hapo_apo", reference=reference, mini_batches=1, micro_batch_tokens=200)
    before = [p.detach().clone() for p in learner.backend.policy.parameters()]
    plan, minis = learners.plan_of(learner, many_tasks)
    held_out = tally.merge([learner.holdout(plan, minis)])["loss/value"]
    assert all(a.equal(b) for a, b in zip(before, learner.backend.policy.parameters(), strict=True))
    assert not learner.backend.seen
    assert tally.merge([learner.step(plan, minis)])["loss/value"] == pytest.approx(held_out, rel=1e-12)


def test_updates_above_a_gradient_norm_are_left_out(model, many_tasks):
    learner = learners.make(model, "hpt")
    (report,) = samples_learn.train_alone(learner, [many_tasks])
    norms = [float(learners.flat(g).norm()) for g in learner.backend.seen]
    learner = learners.make(model, "hpt", mini_batches=1)
    (report,) = samples_learn.train_alone(learner, [many_tasks])
    bound = report["policy/grad_norm"]
    for limit, updates in ((bound * 0.99, 0), (bound * 1.01, 1)):
        learner = learners.make(model, "hpt", mini_batches=1)
        learner.options["skip_grad_norm"] = limit
        before = [p.detach().clone() for p in learner.backend.policy.parameters()]
        (report,) = samples_learn.train_alone(learner, [many_tasks])
        assert report["train/updates"] == updates and report["train/skipped_norm"] == 1 - updates
        assert report["train/skipped"] == 0
        after = learner.backend.policy.parameters()
        assert all(a.equal(b) for a, b in zip(before, after, strict=True)) == (updates == 0)
    assert len(norms) == 2
