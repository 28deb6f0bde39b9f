"""What a run would need: memory per learner rank and per generator, and the first prompt as the model sees it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hapo_async import lora
from hapo_async.config import Config
from hapo_async.learner.learn import needs_of
from hapo_async.types import Prompt

GIB = 1 << 30


def parameter_count(model_path: str) -> int:
    """Parameters of a causal LM, tied ones once; built without memory (meta device)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        settings = AutoConfig.from_pretrained(model_path, trust_remote_code=False)
        model = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    model.tie_weights()
    return sum(p.numel() for p in model.parameters())


def learner_bytes(parameters: int, trained: int, ranks: int, zero_stage: int, bf16: bool) -> int:
    """Persistent bytes of one learner rank: weights; gradients and AdamW's two moments plus fp32 master weights of those
    that are trained.

    ZeRO-1 shards the optimizer, ZeRO-2 the gradients too, ZeRO-3 the weights too. Activations come on top.
    """
    width = 2 if bf16 else 4
    optimizer = 12 if bf16 else 8
    weights = width / (ranks if zero_stage == 3 else 1)
    gradients = width / (ranks if zero_stage >= 2 else 1)
    return int(parameters * weights + trained * (gradients + optimizer / ranks))


def describe(config: Config, model_path: str, tokenizer: Any, prompt: Prompt) -> Iterator[str]:
    """Lines for ``--dry-run``."""
    c = config
    parameters = parameter_count(model_path)
    bf16 = c.learner.dtype == "bfloat16" or (c.learner.dtype == "auto" and torch.cuda.is_available())
    width = c.generator.width
    adapter = lora.size(c, model_path)
    rank = learner_bytes(parameters + adapter, adapter or parameters, c.learner.ranks, c.learner.zero_stage, bf16)
    if "reference" in needs_of(c):
        shared = c.learner.ranks if c.learner.zero_stage == 3 else 1
        rank += parameters * (2 if bf16 else 4) // shared
    yield (
        f"placement ({c.generator.placement}): learner {c.learner.ranks} x 1 bundle; generators {c.generator.count} x {width} "
        f"bundles{', the same ones' if c.generator.placement == 'colocated' else ''}; "
        f"verifiers {c.verifier.count}"
    )
    yield f"model: {parameters:,} parameters in {model_path}"
    if adapter:
        yield f"adapter: {adapter:,} parameters, the only ones that train and that generators are sent"
    yield f"memory, weights, reference and optimizer state without activations: {rank / GIB:.3f} GiB per learner rank"
    yield f"memory, weights without KV cache: {parameters * (2 if bf16 else 4) / width / GIB:.3f} GiB per generator bundle"
    yield f"first prompt ({len(prompt.tokens)} tokens): {tokenizer.decode(prompt.tokens)!r}"
    yield f"first token ids: {prompt.tokens[:16].tolist()}"
    usable = [t for t in prompt.teachers if t.rejected is None]
    yield f"teacher solutions of the first prompt: {len(prompt.teachers)}, usable {len(usable)}"
