"""The policy as the learner trains it: a Hugging Face causal LM that scores trained tokens, its optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hapo_async.batch import Layout, MicroBatch
from hapo_async.config import Config
from hapo_async.head import ChunkedHead, HeadOut


class PolicyModel(nn.Module):
    """A Hugging Face causal LM that scores trained tokens only. ``model`` keeps its Hugging Face parameter names."""

    def __init__(self, model: Any, chunk_tokens: int) -> None:
        super().__init__()
        self.model = model
        self.head = ChunkedHead(model.get_output_embeddings(), chunk_tokens)

    def hidden(self, micro: MicroBatch) -> torch.Tensor:
        """[N, H]: the states that predict the trained tokens."""
        extra: dict[str, Any] = {}
        if micro.cu_seqlens is not None:  # variable-length attention needs no mask: the edges say it all
            extra = {
                "cu_seq_lens_q": micro.cu_seqlens,
                "cu_seq_lens_k": micro.cu_seqlens,
                "max_length_q": micro.max_length,
                "max_length_k": micro.max_length,
            }
        out = self.model.get_decoder()(
            input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False, **extra
        ).last_hidden_state
        return out.reshape(-1, out.shape[-1])[micro.predict]

    def forward(self, micro: MicroBatch, **wanted: Any) -> torch.Tensor:
        """[N, C]: scores of the N trained tokens, side by side; ``split`` takes them apart again.

        ``wanted`` is what ``hapo_async.head`` is to return besides log-probs. One output, because ZeRO-3 hooks every
        output tensor: were one of several not part of the loss on some rank (no token with a negative advantage, a
        dummy), that rank's backward would gather in another order than the others', and all would wait for ever.
        """
        out = self.head(self.hidden(micro), micro.targets, temperature=micro.temperature, **wanted)
        columns = [out.logp[:, None]]
        if out.entropy is not None:
            columns.append(out.entropy[:, None])
        if out.topk_logp is not None:
            columns.append(out.topk_logp)
        return torch.cat(columns, 1)


def split(scores: torch.Tensor, entropy: bool, entropy_grad: bool, topk: bool) -> HeadOut:
    """The columns of ``PolicyModel.forward`` by name."""
    kept = scores if entropy_grad else scores.detach()
    return HeadOut(
        logp=scores[:, 0],
        entropy=kept[:, 1] if entropy else None,
        topk_logp=scores[:, 2 if entropy else 1 :] if topk else None,
    )


def layout_for(device: str) -> tuple[Layout, str]:
    """(how micro-batches are laid out, which attention runs them): packed rows where flash-attention is installed."""
    if device == "cuda":
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return "packed", "flash_attention_2"
    return "padded", "sdpa"


def load_policy(model_path: str, config: Config, *, dtype: torch.dtype, device: str | None) -> PolicyModel:
    """Loads a policy for training. ``device`` None leaves placement to DeepSpeed."""
    from transformers import AutoModelForCausalLM

    _, attention = layout_for("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        model_path, dtype=dtype, attn_implementation=attention, trust_remote_code=False, low_cpu_mem_usage=True
    )
    _no_dropout(model)
    if config.learner.gradient_checkpointing:
        # The re-entrant form: ZeRO-3 has released a layer's parameters by the time that the other form checks shapes.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    policy = PolicyModel(model, config.learner.head_chunk_tokens).train()
    return policy.to(device) if device is not None else policy


def _no_dropout(model: nn.Module) -> None:
    """A ratio of two log-probs of the same weights must be one."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  (mypy takes module attributes for tensors)


def adamw(parameters: Iterable[nn.Parameter], config: Config, fused: bool = False) -> torch.optim.AdamW:
    c = config.learner
    return torch.optim.AdamW(
        parameters, lr=c.lr, betas=c.betas, eps=c.eps, weight_decay=c.weight_decay, fused=True if fused else None
    )


def schedule(optimizer: torch.optim.Optimizer, config: Config) -> Any:
    """The learning-rate schedule, counted in optimizer updates. Raises ValueError for an unknown name."""
    from transformers import get_scheduler

    c = config.learner
    updates = config.train.steps * c.mini_batches
    return get_scheduler(c.lr_schedule, optimizer, num_warmup_steps=c.warmup_steps, num_training_steps=updates)
