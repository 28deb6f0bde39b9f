"""A plain synchronous training loop for GRPO and HAPO, written from the papers' equations and nothing of the project's.

One sequence per forward pass, no padding, no micro-batches, no ranks, torch.optim.AdamW: what the learner must equal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Task:
    """A prompt with its sampled answers. All token lists are plain ids; ``teacher`` may be missing."""

    prompt: list[int]
    answers: list[list[int]]
    rewards: list[float]
    teacher: list[int] | None = None


@dataclass(frozen=True)
class Recipe:
    algorithm: str  # grpo | hapo
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    adam_eps: float = 1e-4
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    steps: int = 10
    mini_batches: int = 2
    clip: float = 0.2
    gamma: float = 0.8
    teacher_gamma: float = 0.1


@dataclass(frozen=True)
class Trace:
    """gradients: of every update, before clipping, by parameter name. weights: in the end."""

    gradients: list[dict[str, torch.Tensor]]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Row:
    prompt: list[int]
    tokens: list[int]
    advantage: float
    is_teacher: bool


def train(model: torch.nn.Module, steps: list[list[Task]], recipe: Recipe) -> Trace:
    """Trains a Hugging Face causal LM in place; the learning rate follows a cosine from lr to 0 over recipe.steps."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, eps=recipe.adam_eps, weight_decay=recipe.weight_decay
    )
    updates = recipe.steps * recipe.mini_batches
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / updates)))
    gradients = []
    for tasks in steps:
        minis = _split([rows(task, recipe) for task in tasks], recipe.mini_batches)
        with torch.no_grad():  # one proximal policy per step
            old = [[_logp(model, row) for row in mini] for mini in minis]
        for mini, proximal in zip(minis, old, strict=True):
            total = sum(len(row.tokens) for row in mini)
            optimizer.zero_grad()
            for row, logp_old in zip(mini, proximal, strict=True):
                (-_objective(_logp(model, row), logp_old, row, recipe).sum() / total).backward()
            gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip)
            optimizer.step()
            cosine.step()
    return Trace(gradients, {n: p.detach().clone() for n, p in model.named_parameters()})


def _split(groups: list[list[Row]], parts: int) -> list[list[Row]]:
    size = len(groups) // parts
    return [[row for group in groups[i * size : (i + 1) * size] for row in group] for i in range(parts)]


def rows(task: Task, recipe: Recipe) -> list[Row]:
    """HAPO: below confidence gamma, the first answer of lowest reward makes way for the teacher, whose reward is 1."""
    bodies, rewards = list(task.answers), list(task.rewards)
    teacher = -1
    if recipe.algorithm == "hapo" and task.teacher is not None:
        wins, n = sum(r == 1 for r in rewards), len(rewards)
        lowest = min(range(n), key=lambda i: rewards[i])
        if (1 + wins) / (2 + n) < recipe.gamma and rewards[lowest] < 1:
            bodies[lowest], rewards[lowest], teacher = task.teacher, 1.0, lowest
    r = torch.tensor(rewards, dtype=torch.float64)
    a = torch.zeros_like(r) if r.max() == r.min() else (r - r.mean()) / (r.std() + 1e-6)
    return [Row(task.prompt, b, float(x), i == teacher) for i, (b, x) in enumerate(zip(bodies, a, strict=True))]


def _objective(logp: torch.Tensor, logp_old: torch.Tensor, row: Row, recipe: Recipe) -> torch.Tensor:
    """[T]: PPO's clipped objective for sampled tokens, pi / (pi + gamma) for the teacher's."""
    if row.is_teacher:
        return logp.exp() / (logp.exp() + recipe.teacher_gamma)
    ratio = (logp - logp_old).exp()
    return torch.minimum(ratio * row.advantage, ratio.clamp(1 - recipe.clip, 1 + recipe.clip) * row.advantage)


def _logp(model: torch.nn.Module, row: Row) -> torch.Tensor:
    """[T]: log-prob of each response token."""
    ids = torch.tensor([row.prompt + row.tokens])
    logits = model(input_ids=ids).logits[0, len(row.prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, ids[0, len(row.prompt) :, None])[:, 0]
