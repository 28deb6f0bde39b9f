"""What a model makes of given texts: oracle coverage, and entropy, confidence and similarity of its own answers.

A plain transformers forward in this process, batched; logits exist one chunk at a time. Legend: T tokens of one answer,
H hidden, K top-K.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch

from hapo_async.evaluation.diversity import distinctness
from hapo_async.learner.head import reference_topk, token_logprobs

COVERAGE = (1, 4, 8, 16)
ANSWERS = 32  # per prompt: the papers' number
PROMPTS = 128  # per set that are analysed


class Pair(NamedTuple):
    """A prompt and something that answers it; int32 token ids."""

    prompt: np.ndarray
    answer: np.ndarray


class Scored(NamedTuple):
    """rank [T]: place of each token among the model's 16 likeliest, 16 when it is not among them. entropy [T], max_prob
    [T]: at temperature 1. pooled [H]: mean hidden state over the answer."""

    rank: torch.Tensor
    entropy: torch.Tensor
    max_prob: torch.Tensor
    pooled: torch.Tensor


class Probe:
    """A frozen model. batch_tokens: tokens, padding included, of one forward pass."""

    def __init__(self, model_path: str, batch_tokens: int = 16384, device: str = "", dtype: Any = None) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or (torch.bfloat16 if self.device == "cuda" else torch.float32)
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_path, dtype=dtype, trust_remote_code=False, use_safetensors=True
        )
        self.model = model.to(self.device).eval()
        self.batch_tokens = batch_tokens

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[Scored]:
        """Every answer under teacher forcing, in the order given. Raises ValueError for an empty prompt or answer."""
        for number, pair in enumerate(pairs):
            if not len(pair.prompt) or not len(pair.answer):
                raise ValueError(f"pair {number} has an empty prompt or answer: there is nothing to score")
        out: dict[int, Scored] = {}
        for batch in self._batches(pairs):
            hidden = self._hidden([pairs[i] for i in batch])
            for row, i in enumerate(batch):
                out[i] = self._one(hidden[row], pairs[i])
        return [out[i] for i in range(len(pairs))]

    def _batches(self, pairs: Sequence[Pair]) -> Iterator[list[int]]:
        """Indices of pairs of similar length that fit into one pass."""
        order = sorted(range(len(pairs)), key=lambda i: _length(pairs[i]))
        batch: list[int] = []
        for i in order:
            if batch and (len(batch) + 1) * _length(pairs[i]) > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        if batch:
            yield batch

    def _hidden(self, pairs: Sequence[Pair]) -> torch.Tensor:
        """[pairs, longest, H]: states at every position; padding on the right, which causal attention never sees."""
        width = max(_length(pair) for pair in pairs)
        ids = torch.zeros((len(pairs), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, pair in enumerate(pairs):
            tokens = np.concatenate([pair.prompt, pair.answer])
            ids[row, : len(tokens)] = torch.from_numpy(tokens.astype(np.int64))
            mask[row, : len(tokens)] = 1
        decoder = self.model.get_decoder()
        inputs = {"input_ids": ids.to(self.device), "attention_mask": mask.to(self.device)}
        return decoder(**inputs, use_cache=False).last_hidden_state

    def _one(self, states: torch.Tensor, pair: Pair) -> Scored:
        start, end = len(pair.prompt), _length(pair)
        head = self.model.get_output_embeddings()
        weight, bias = head.weight, getattr(head, "bias", None)
        targets = torch.from_numpy(pair.answer.astype(np.int64)).to(self.device)
        predict = states[start - 1 : end - 1]
        ids, logp = reference_topk(predict, weight, max(COVERAGE), bias=bias)
        entropy = token_logprobs(predict, weight, targets, entropy=True, bias=bias).entropy
        assert entropy is not None
        hit = ids == targets[:, None]
        rank = torch.where(hit.any(1), hit.int().argmax(1), max(COVERAGE))
        return Scored(rank, entropy, logp[:, 0].exp(), states[start:end].float().mean(0))


def oracle_recall(probe: Probe, pairs: Sequence[Pair], ks: Sequence[int] = COVERAGE) -> dict[int, float]:
    """Share of all ground-truth tokens that are among the model's k likeliest when the truth so far is given, by k."""
    ranks = torch.cat([scored.rank for scored in probe.score(pairs)])
    return {k: float((ranks < k).double().mean()) for k in ks}


def similarity(pooled: torch.Tensor) -> float:
    """Mean cosine over all pairs of rows of [n, H]; NaN for fewer than two."""
    n = len(pooled)
    if n < 2:
        return math.nan
    unit = torch.nn.functional.normalize(pooled.double(), dim=-1)
    return float((unit.sum(0).square().sum() - n) / (n * (n - 1)))


def diversity(probe: Probe, groups: Sequence[Sequence[Pair]], texts: Sequence[Sequence[str]]) -> dict[str, float]:
    """The four numbers over the answers of each prompt: ``self_bleu`` (1 - Self-BLEU) and ``similarity`` of hidden states,
    means over prompts with two answers or more; ``entropy`` and ``max_prob``, means over all tokens."""
    flat = probe.score([pair for group in groups for pair in group])
    cosines, start = [], 0
    for group in groups:
        part, start = flat[start : start + len(group)], start + len(group)
        if len(part) > 1:
            cosines.append(similarity(torch.stack([scored.pooled for scored in part])))
    values = {
        "self_bleu": distinctness(texts),
        "similarity": fmean(cosines) if cosines else math.nan,
        "entropy": float(torch.cat([s.entropy for s in flat]).double().mean()) if flat else math.nan,
        "max_prob": float(torch.cat([s.max_prob for s in flat]).double().mean()) if flat else math.nan,
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def of_set(probe: Probe, name: str, teachers: Sequence[Pair], rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Metrics of one evaluation set. rows: as ``verdicts.describe`` makes them."""
    out: dict[str, float] = {}
    if teachers:
        recall = oracle_recall(probe, teachers[:PROMPTS])
        out |= {f"eval/{name}/oracle_recall@{k}": value for k, value in recall.items()}
    groups, texts = [], []
    for row in rows[:PROMPTS]:
        answers = [answer for answer in row["answers"][:ANSWERS] if answer["tokens"]]
        prompt = np.asarray(row["prompt_tokens"], np.int32)
        groups.append([Pair(prompt, np.asarray(answer["tokens"], np.int32)) for answer in answers])
        texts.append([answer["text"] for answer in answers])
    if any(groups):
        out |= {f"eval/{name}/diversity/{what}": value for what, value in diversity(probe, groups, texts).items()}
    return out


def _length(pair: Pair) -> int:
    return len(pair.prompt) + len(pair.answer)
