"""Log-probs of given tokens: one plain forward of whole sequences, without a cache.

Shapes: T tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

Pair = tuple[np.ndarray, np.ndarray]
"""(prompt tokens [at least 1], tokens [T] that are scored)."""

_LOGITS = 1 << 27  # that one forward makes, unless a single sequence needs more
_WIDE_LOGITS = 1 << 24  # float64 copies that exist at one time


@torch.inference_mode()
def score(model: Any, sequences: Sequence[Pair]) -> list[np.ndarray]:
    """float32 [T] per sequence, in their order: log-probs at temperature 1 of ``tokens`` given what precedes them."""
    out: list[np.ndarray] = [np.zeros(0, np.float32)] * len(sequences)
    for batch in _batches(sequences, max(1, _LOGITS // model.config.get_text_config().vocab_size)):
        pairs = [sequences[i] for i in batch]
        for i, logp in zip(batch, _forward(model, pairs), strict=True):
            out[i] = logp
    return out


def _batches(sequences: Sequence[Pair], tokens: int) -> Iterator[list[int]]:
    """Indices of sequences of like length, whose padded size stays within ``tokens``. Empty answers are in none."""
    lengths = [len(prompt) + len(answer) for prompt, answer in sequences]
    batch: list[int] = []
    for i in sorted((i for i, s in enumerate(sequences) if len(s[1])), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _forward(model: Any, pairs: Sequence[Pair]) -> list[np.ndarray]:
    """Padding is on the right, where causal attention never sees it."""
    width = max(len(prompt) + len(tokens) for prompt, tokens in pairs)
    first = min(len(prompt) for prompt, _ in pairs) - 1  # the earliest position whose logits are needed
    padded = torch.zeros((len(pairs), width), dtype=torch.int64)
    for row, (prompt, tokens) in enumerate(pairs):
        padded[row, : len(prompt) + len(tokens)] = torch.from_numpy(np.concatenate([prompt, tokens]).astype(np.int64))
    logits = model(
        input_ids=padded.to(model.device),
        position_ids=torch.arange(width, device=model.device)[None],
        use_cache=False,
        logits_to_keep=width - first,
    ).logits
    return [
        _logp(logits[row, len(prompt) - 1 - first :][: len(tokens)], tokens)
        for row, (prompt, tokens) in enumerate(pairs)
    ]


def _logp(logits_TV: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
    targets = torch.from_numpy(tokens.astype(np.int64)).to(logits_TV.device)
    size = max(1, _WIDE_LOGITS // logits_TV.shape[-1])
    parts = [
        torch.log_softmax(logits.double(), -1).gather(-1, wanted[:, None])[:, 0]
        for logits, wanted in zip(logits_TV.split(size), targets.split(size), strict=True)
    ]
    return np.asarray(torch.cat(parts).float().cpu().numpy(), np.float32)
