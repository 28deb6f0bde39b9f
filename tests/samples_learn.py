"""Hand-made groups for the learner's tests: the same samples as plain tasks and as what travels through the system."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hapo_async import advantage as advantages
from hapo_async import algorithms, batch, gate, inject, toy
from hapo_async.algorithms import Algorithm
from hapo_async.config import Config
from hapo_async.learner.learn import Learner
from hapo_async.learner.tally import merge
from hapo_async.sequences import Sequence, TrainGroup, materialise
from hapo_async.types import (
    Answer,
    GatedGroup,
    Group,
    GroupHeader,
    GroupKey,
    Judgement,
    Prompt,
    Sampling,
    Segment,
    Source,
    Teacher,
    Verdict,
    Version,
    VersionSpan,
)
from tests.reference_loop import Task


def tasks(count: int, answers: int, seed: int, vocab: int = 100) -> list[Task]:
    """Tasks of random tokens and very unequal lengths; rewards vary, and every third task has solved answers only."""
    rng = np.random.default_rng(seed)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(3, vocab, int(rng.integers(low, high))).tolist()

    out = []
    for i in range(count):
        rewards = [1.0] * answers if i % 3 == 2 else rng.integers(0, 2, answers).astype(float).tolist()
        teacher = ids(5, 25) if i % 2 == 0 else None
        out.append(Task(ids(2, 12), [ids(1, 40) for _ in range(answers)], rewards, teacher))
    return out


def random_model(folder: Path, seed: int = 0) -> str:
    """A random model of the shipped one's shape, with its tokenizer, in ``folder``.

    Its gradients are well-conditioned in fp32 (a trained model's cancel: there even two plain loops in fp32 differ by
    more than 1e-6), so that equality can be asked to rounding.
    """
    shutil.copytree(toy.MODEL_DIR, folder, dirs_exist_ok=True)
    settings = AutoConfig.from_pretrained(folder)
    settings.initializer_range = 0.02
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
    return str(folder)


def config(
    model: str = "",
    algorithm: str = "grpo",
    zero: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    **learner: Any,
) -> Config:
    """A small fp32 learner whose Adam epsilon does not amplify rounding. ``zero``: DeepSpeed's zero_optimization."""
    settings = {"lr": 1e-3, "adamw": {"eps": 1e-4}, "lr_schedule": "cosine", "mini_batches": 2, "deadline_s": 60}
    settings |= {"micro_batch_tokens": 300, **learner}
    return Config.model_validate(
        {
            "model": model,
            "algorithm": algorithm,
            "options": options or {},
            "max_staleness": 0,
            "sampling": {"n": 4},
            "train": {"batch_prompts": 8, "steps": 10},
            "learner": settings,
            "deepspeed": {"zero_optimization": zero} if zero else {},
        }
    )


def groups(
    chosen: list[Task], config: Config, version: Version, store: Callable[[Group], Any] = lambda group: group
) -> list[TrainGroup]:
    """The tasks as the driver would hand them to the learner; ``store`` makes the payload's reference."""
    algorithm = algorithms.get(config.algorithm)
    options = algorithm.resolve(dict(config.options), config)
    out = []
    for i, task in enumerate(chosen):
        gated = _gated(task, GroupKey(0, f"t{i}", 0), config, algorithm, version, store)
        train = inject.compose(
            algorithm.composition,
            gated,
            algorithm.advantage_for(options),
            options=options,
            keep=algorithm.keep,
            advantage_group=config.gate.advantage_group,
            step=version.step,
        )
        if train is not None:
            out.append(replace(train, logp_ref=cached_scores(task) if algorithm.offline else None))
    whole_batch = advantages.of(algorithm.advantage_for(options)).whole_batch
    return advantages.whiten_batch(out) if whole_batch else out


def cached_scores(task: Task) -> tuple[np.ndarray, ...]:
    """Made-up log-probs of the reference, by answer."""
    rng = np.random.default_rng(len(task.prompt))
    return tuple((-4.6 + 0.3 * rng.standard_normal(len(ids))).astype(np.float32) for ids in task.answers)


def plans(chosen: list[TrainGroup], config: Config, version: Version) -> list[batch.StepPlan]:
    """One plan per learner rank."""
    options = algorithms.get(config.algorithm).resolve(dict(config.options), config)
    c = config.learner
    return batch.plan_step(chosen, c.ranks, c.mini_batches, version, pairs=options.get("pairs"))


def train_alone(learner: Learner, steps: list[list[Task]]) -> list[dict[str, float]]:
    """Runs steps in this process; the metrics of each."""
    out = []
    for i, chosen in enumerate(steps):
        version = Version(0, i)
        (plan,) = plans(groups(chosen, learner.config, version), learner.config, version)
        out.append(merge([learner.step(plan, sequences(plan))]))
    return out


def sequences(plan: batch.StepPlan) -> list[list[Sequence]]:
    """What a rank makes of its plan, where payloads are the groups themselves."""
    return [
        [s for index, train in enumerate(mini) for s in materialise(train, train.payload, index=index)]
        for mini in plan.minis
    ]


def _gated(
    task: Task, key: GroupKey, config: Config, algorithm: Algorithm, version: Version, store: Callable[[Group], Any]
) -> GatedGroup:
    prompt_tokens = np.array(task.prompt, np.int32)
    answers = []
    for j, ids in enumerate(task.answers):
        logp = np.full(len(ids), -3.0, np.float32)
        written = Version(-1, -1) if algorithm.offline else version
        segment = Segment(Source.POLICY, np.array(ids, np.int32), logp, (VersionSpan(written, 0, len(ids)),))
        answers.append(Answer(j, (segment,), "stop"))
    group = Group(key, prompt_tokens, tuple(answers), config.sampling.temperature, "g0", 1)
    teachers = () if task.teacher is None else (Teacher("", np.array(task.teacher, np.int32)),)
    sampling = Sampling(n=len(answers), max_tokens=64, temperature=config.sampling.temperature)
    prompt = Prompt(key.uid, (), prompt_tokens, None, teachers=teachers, sampling=sampling)
    judgements = tuple(_judgement(r) for r in task.rewards)
    header = GroupHeader.of(group, 0.0)
    mode = {} if algorithm.uses_gate else {"mode": "never"}
    decision = gate.decide(
        np.nan_to_num(task.rewards),
        ~np.isnan(task.rewards),
        teachers,
        header.lengths,
        [version.step] * len(answers),
        config=config.gate.model_copy(update=mode),
    )
    return GatedGroup(header, store(group), prompt, judgements, decision)


def _judgement(reward: float) -> Judgement:
    if math.isnan(reward):
        return Judgement(Verdict.TIMEOUT, None)
    return Judgement(Verdict.CORRECT if reward == 1 else Verdict.WRONG, reward)
