"""One token per row from logits, with noise that belongs to the token and to nothing else.

Shapes: R rows (one row is one answer), V vocabulary.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch

from hapo_async.types import GroupKey


def noise_key(seed: int, key: GroupKey, index: int) -> int:
    """64 bits that name the noise of one answer."""
    text = f"{seed}|{key.epoch}|{key.uid}|{key.attempt}|{index}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def uniforms(keys_R: np.ndarray, positions_R: np.ndarray) -> np.ndarray:
    """float64 [R] in [0, 1): a pure function of (key, position). SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    z = keys_R + (positions_R.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)) * 2.0**-53


def draw(
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    uniform_R: torch.Tensor,
    top_p_R: torch.Tensor | None = None,
    top_k_R: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one token per row by inverting the cumulative distribution in float64.

    temperature 0 takes the most likely token. Returns (tokens int64 [R], log-probs float32 [R]): the log-prob under the
    distribution that was sampled from, at temperature 1 for a greedy row.
    """
    greedy = temperature_R == 0
    scaled = logits_RV.double() / torch.where(greedy, 1.0, temperature_R)[:, None]
    logp = torch.log_softmax(scaled, -1)
    if top_p_R is not None and top_k_R is not None:
        logp = _restrict(logp, top_p_R, top_k_R)
    cumulative = logp.exp().cumsum(-1)
    total = cumulative[:, -1:]
    # Strictly below the total, so that the first larger entry exists and belongs to a token of positive probability.
    target = torch.minimum(uniform_R[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    if greedy.any():
        tokens = torch.where(greedy, logp.argmax(-1), tokens)
    return tokens, logp.gather(-1, tokens[:, None]).squeeze(-1).float()


def _restrict(logp_RV: torch.Tensor, top_p_R: torch.Tensor, top_k_R: torch.Tensor) -> torch.Tensor:
    """Log-probs renormalised over the top-k tokens and the smallest set that holds top-p of the mass (0 and 1: all)."""
    ordered, order = logp_RV.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ordered.shape[-1], device=ordered.device)
    outside = (top_k_R[:, None] > 0) & (rank >= top_k_R[:, None])
    inside = torch.log_softmax(ordered.masked_fill(outside, -torch.inf), -1)
    before = inside.exp().cumsum(-1) - inside.exp()
    outside |= (top_p_R[:, None] < 1) & (before >= top_p_R[:, None])
    ordered = torch.log_softmax(ordered.masked_fill(outside, -torch.inf), -1)
    return torch.empty_like(logp_RV).scatter_(-1, order, ordered)
