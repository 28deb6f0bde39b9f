"""Advantages: from rewards to one number per answer, or with a critic to one per token.

Always computed in fp64. Unjudged answers (verifier timeout, oom, crash) neither enter the statistics nor get an
advantage. Legend: P prompts, G answers in a group, T tokens of one sequence.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import itertools
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hapo_async.errors import ConfigError
from hapo_async.types import SUCCESS

if TYPE_CHECKING:
    from hapo_async.sequences import TrainGroup

WHITEN_EPS = 1e-8


@dataclass(frozen=True)
class Advantage:
    """A named advantage. compute: (rewards [P, G] with 0 where unjudged, judged [P, G], **options) -> [P, G].

    needs_group: a single answer can have none but 0. whole_batch: its statistics run over all prompts of a learner step
    (``whiten_batch``). asks_success: it asks whether R = 1 and for nothing else.
    """

    equation: str
    compute: Callable[..., np.ndarray]
    needs_group: bool = True
    whole_batch: bool = False
    asks_success: bool = False


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
    return of(name).needs_group


def of(name: str) -> Advantage:
    """The named advantage. Raises ConfigError for an unknown name."""
    return ADVANTAGES[_resolve(name)[0]]


def options(name: str) -> tuple[str, ...]:
    """Names of an advantage's options."""
    return _option_names(_resolve(name)[0])


@functools.cache
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
# Over time, and over a batch


def gae(rewards_T: Any, values_T: Any, discount: float = 1.0, lam: float = 1.0) -> tuple[Any, Any]:
    """Generalised advantage estimation of one whole sequence: (advantages [T], returns [T]), without gradient.

    delta_t = r_t + discount V_{t+1} - V_t with V_T = 0; advantage_t = sum_k (discount lam)^k delta_{t+k}; returns =
    advantages + values. Arrays give float64 arrays; a tensor of values gives tensors of its dtype and device. Raises
    ValueError for shapes.
    """
    rewards, values = _array(rewards_T).astype(np.float64), _array(values_T).astype(np.float64)
    if rewards.ndim != 1 or rewards.shape != values.shape:
        raise ValueError(f"rewards {rewards.shape} and values {values.shape} must have the same shape [T]")
    delta = rewards + discount * np.append(values[1:], 0.0) - values if len(values) else values
    decay = discount * lam
    backwards = itertools.accumulate(delta[::-1].tolist(), lambda later, now: now + decay * later)
    advantages = np.array(list(backwards), np.float64)[::-1].copy()
    returns = advantages + values
    if not isinstance(values_T, torch.Tensor):
        return advantages, returns
    return torch.as_tensor(advantages).to(values_T), torch.as_tensor(returns).to(values_T)


def whiten_batch(groups: Seq[TrainGroup]) -> list[TrainGroup]:
    """The groups of a learner step with whitened advantages, where the composition left each row's return: minus the
    mean, over the unbiased std, both over all trained tokens of the step. 0 where they do not vary. Unjudged rows enter
    no statistic and keep 0."""
    rows = [row for group in groups for row in group.rows]
    judged = np.array([row.judged for row in rows], bool)
    values = _whiten(np.array([row.advantage for row in rows]), np.array([row.length for row in rows]), judged)
    fresh = iter([replace(row, advantage=float(value)) for row, value in zip(rows, values, strict=True)])
    return [replace(group, rows=tuple(itertools.islice(fresh, len(group.rows)))) for group in groups]


def _whiten(values: np.ndarray, tokens: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """(x - mean) / sqrt(var + 1e-8), each value counted ``tokens`` times, unbiased; all arrays of one shape."""
    weight = np.where(judged, tokens, 0).astype(np.float64)
    seen = values[weight > 0]
    if not len(seen) or seen.max() == seen.min():
        return np.zeros(values.shape)
    count = weight.sum()
    centred = np.where(judged, values - (weight * values).sum() / count, 0.0)
    variance = (weight * centred**2).sum() / (count - 1)
    return centred / np.sqrt(variance + WHITEN_EPS)


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
    return np.where(rewards >= SUCCESS, 1.0, -1.0)


def _none(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """1: every answer is learnt as it is."""
    return np.ones_like(rewards)


def _return(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """R."""
    return rewards


def _reinforce_pp(rewards: np.ndarray, judged: np.ndarray, lengths_PG: Any = None) -> np.ndarray:
    """R whitened over the tokens of all answers; ``lengths_PG`` tokens each, by default as many in each answer."""
    lengths = np.ones_like(rewards) if lengths_PG is None else _array(lengths_PG)
    if lengths.shape != rewards.shape:
        raise ValueError(f"lengths {lengths.shape} must have the shape of the rewards {rewards.shape}")
    return _whiten(rewards, lengths, judged)


def _psr(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """+1 for a success, 0 for anything else."""
    return np.where(rewards >= SUCCESS, 1.0, 0.0)


def _nsr(rewards: np.ndarray, judged: np.ndarray) -> np.ndarray:
    """0 for a success, -1 for anything else."""
    return np.where(rewards >= SUCCESS, 0.0, -1.0)


def _w_reinforce(rewards: np.ndarray, judged: np.ndarray, lam: float = 0.1) -> np.ndarray:
    """+lam for a success, -1 for anything else."""
    return np.where(rewards >= SUCCESS, lam, -1.0)


def _a_star_po(scores: np.ndarray, judged: np.ndarray, beta1: float = 0.5, rewards: str = "signed") -> np.ndarray:
    """r - V*, V* = beta1 log mean exp(r / beta1) over the group; r is 1 for a success, else -1 (signed) or 0 (binary)."""
    r = np.where(scores >= SUCCESS, 1.0, -1.0 if rewards == "signed" else 0.0)
    top = np.where(judged, r, -1.0).max(-1, keepdims=True, initial=-1.0)
    total = np.where(judged, np.exp(np.minimum(r - top, 0.0) / beta1), 0.0).sum(-1, keepdims=True)
    mean = np.where(total > 0, total, 1.0) / np.maximum(judged.sum(-1, keepdims=True), 1)
    return r - top - beta1 * np.log(mean)


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
    "reinforce": Advantage("+1 where R = 1, else −1", _reinforce, needs_group=False, asks_success=True),
    "none": Advantage("1", _none, needs_group=False, asks_success=True),
    "return": Advantage("R", _return, needs_group=False),
    "reinforce_pp": Advantage(
        "(R − mean) / √(var + 1e-8) over all tokens of the batch, unbiased; 0 where max = min",
        _reinforce_pp,
        needs_group=False,
        whole_batch=True,
    ),
    "psr": Advantage("+1 where R = 1, else 0", _psr, needs_group=False, asks_success=True),
    "nsr": Advantage("0 where R = 1, else −1", _nsr, needs_group=False, asks_success=True),
    "w_reinforce": Advantage("+λ where R = 1, else −1", _w_reinforce, needs_group=False, asks_success=True),
    "a_star_po": Advantage("r − V*, V* = β₁·log mean e^{r/β₁}, r = ±1 (or 0, 1)", _a_star_po, asks_success=True),
}
