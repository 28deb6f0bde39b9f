"""Group advantages: from the rewards of a prompt's answers to one number per answer.

Always computed in fp64. Unjudged answers (verifier timeout, oom, crash) neither enter the statistics nor get an
advantage. Legend: P prompts, G answers in a group.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hapo_async.errors import ConfigError


@dataclass(frozen=True)
class Advantage:
    """A named advantage. compute: (rewards [P, G] with 0 where unjudged, judged [P, G], **options) -> [P, G]."""

    equation: str
    compute: Callable[..., np.ndarray]
    needs_group: bool = True


def compute(name: str, rewards_PG: Any, judged_PG: Any = None, **options: Any) -> Any:
    """Advantages of groups of answers.

    name: a key of ``ADVANTAGES``, or an algorithm, which means that algorithm's advantage with its defaults.
    rewards_PG: array-like [P, G] (or [G]); judged_PG: bool of the same shape, None means all whose reward is a number.
    Returns float64 numpy of the same shape, or a tensor of the rewards' floating dtype (fp32 for integers) and device
    when they are a tensor. Raises ConfigError for an unknown name or option; ValueError for shapes, for a judged reward
    that is not finite, and for RLOO on groups of one.
    """
    name, defaults = _resolve(name)
    chosen = {**defaults, **options}
    unknown = sorted(set(chosen) - set(_option_names(name)))
    if unknown:
        known = ", ".join(_option_names(name)) or "none"
        raise ConfigError(f"advantage {name!r} has no option {unknown[0]!r}; its options: {known}.")
    rewards = _array(rewards_PG).astype(np.float64)
    judged = np.isfinite(rewards) if judged_PG is None else _array(judged_PG).astype(bool)
    if rewards.ndim == 0 or rewards.shape != judged.shape:
        raise ValueError(f"rewards {rewards.shape} and judged {judged.shape} must have the same shape [P, G] or [G]")
    if not np.isfinite(rewards[judged]).all():
        raise ValueError("a judged answer has a reward that is not finite; mark it as unjudged instead")
    values = ADVANTAGES[name].compute(np.where(judged, rewards, 0.0), judged, **chosen)
    values = np.where(judged, values, 0.0)
    if not isinstance(rewards_PG, torch.Tensor):
        return values
    dtype = rewards_PG.dtype if rewards_PG.is_floating_point() else torch.float32
    return torch.as_tensor(values, dtype=dtype, device=rewards_PG.device)


def needs_group(name: str) -> bool:
    """True when a single answer can have no advantage other than 0."""
    return ADVANTAGES[_resolve(name)[0]].needs_group


def options(name: str) -> tuple[str, ...]:
    """Names of an advantage's options."""
    return _option_names(_resolve(name)[0])


def _option_names(name: str) -> tuple[str, ...]:
    parameters = inspect.signature(ADVANTAGES[name].compute).parameters
    return tuple(parameters)[2:]


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """(key of ADVANTAGES, options): an algorithm's name stands for its advantage."""
    if name in ADVANTAGES:
        return name, {}
    from hapo_async import algorithms  # late: algorithms are made of advantages

    if name in algorithms.names():
        algorithm = algorithms.get(name)
        known = _option_names(algorithm.advantage)
        return algorithm.advantage, {k: v for k, v in algorithm.defaults.items() if k in known}
    near = difflib.get_close_matches(name, ADVANTAGES, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown advantage {name!r}.{hint} There are: {', '.join(ADVANTAGES)}.")


def _array(x: Any) -> np.ndarray:
    return x.detach().cpu().double().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


# --------------------------------------------------------------------------------------------------------------------
# The table


def _grpo(rewards: np.ndarray, judged: np.ndarray, std: bool = True, std_eps: float = 1e-6) -> np.ndarray:
    """(R - mean) / (std + 1e-6) with the unbiased std; R - mean where ``std`` is off. Zero variance is tested as
    max == min, never by dividing: rounding alone would give seven equal rewards of 0.1 an advantage."""
    count = judged.sum(-1, keepdims=True)
    centred = np.where(judged, rewards - _mean(rewards, judged), 0.0)
    if std:
        variance = (centred**2).sum(-1, keepdims=True) / np.maximum(count - 1, 1)
        centred = centred / (np.sqrt(variance) + std_eps)
    return np.where(_varies(rewards, judged), centred, 0.0)


def _dr_grpo(rewards: np.ndarray, judged: np.ndarray, std: bool = False, std_eps: float = 1e-6) -> np.ndarray:
    """R - mean (GRPO without the std)."""
    return _grpo(rewards, judged, std, std_eps)


def _rloo(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """R minus the mean of the others = n/(n-1) (R - mean)."""
    if rewards.shape[-1] < 2:
        raise ValueError("rloo needs groups of at least 2 answers: the baseline is the mean of the others")
    count = judged.sum(-1, keepdims=True)
    return _grpo(rewards, judged, std=False) * count / np.maximum(count - 1, 1)


def _reinforce(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """+1 for a success (R = 1), -1 for anything else."""
    return np.where(rewards == 1.0, 1.0, -1.0)


def _none(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """1: every answer is learnt as it is."""
    return np.ones_like(rewards)


def _mean(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    return rewards.sum(-1, keepdims=True) / np.maximum(judged.sum(-1, keepdims=True), 1)


def _varies(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """[..., 1] bool: at least two judged answers with different rewards."""
    high = np.where(judged, rewards, -np.inf).max(-1, keepdims=True, initial=-np.inf)
    low = np.where(judged, rewards, np.inf).min(-1, keepdims=True, initial=np.inf)
    return high > low


ADVANTAGES: dict[str, Advantage] = {
    "grpo": Advantage("(R − mean) / (std + 1e-6), unbiased std; 0 where max = min", _grpo),
    "dr_grpo": Advantage("R − mean", _dr_grpo),
    "rloo": Advantage("n/(n−1) · (R − mean)", _rloo),
    "reinforce": Advantage("+1 where R = 1, else −1", _reinforce, needs_group=False),
    "none": Advantage("1", _none, needs_group=False),
}
