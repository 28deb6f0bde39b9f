"""The policy as the learner trains it: a Hugging Face causal LM that scores trained tokens, its optimizer and schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

from hapo_async.batch import Layout, MicroBatch
from hapo_async.config import Config
from hapo_async.learner.critic import ValueHead
from hapo_async.learner.head import ChunkedHead


class PolicyModel(nn.Module):
    """A Hugging Face causal LM that scores trained tokens only. ``model`` keeps its Hugging Face parameter names.

    value_head: a critic on the same trunk, or None. It is no part of ``model``: it is neither published nor saved with
    it. hidden_grad_squares [N]: after a backward pass, the squared norm of the gradient at each trained token's last
    hidden state.
    """

    def __init__(self, model: Any, with_value: bool = False) -> None:
        super().__init__()
        self.model = model
        projection = model.get_output_embeddings()
        self.head = ChunkedHead(projection)
        self.value_head = ValueHead(projection.in_features, projection.weight.dtype) if with_value else None
        self.hidden_grad_squares: torch.Tensor | None = None

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

        ``wanted`` is what ``hapo_async.learner.head`` is to return besides log-probs. The critic's values come always where
        there is a value head: a parameter that took part in some passes only would keep an old gradient under ZeRO-3.
        One output, because ZeRO-3 hooks every output tensor: were one of several not part of the loss on some rank (no
        token with a negative advantage, a dummy), that rank's backward would gather in another order than the others',
        and all would wait for ever.
        """
        hidden = self.hidden(micro)
        if hidden.requires_grad:
            hidden.register_hook(self._keep_squares)
        out = self.head(hidden, micro.targets, temperature=micro.temperature, **wanted)
        columns = [out.logp, out.entropy, out.topk_logp, out.ref_kl, out.future_logp]
        if self.value_head is not None:
            columns.append(self.value_head(hidden))
        return torch.cat([c if c.ndim == 2 else c[:, None] for c in columns if c is not None], 1)

    def _keep_squares(self, grad: torch.Tensor) -> None:
        wide = torch.float64 if grad.dtype == torch.float64 else torch.float32
        self.hidden_grad_squares = torch.linalg.vector_norm(grad.detach(), dim=-1, dtype=wide).square()


class Scores(NamedTuple):
    """What ``PolicyModel.forward`` says of N tokens. entropy, future_logp: without gradient unless asked for. None
    where not asked for (value: where there is no critic)."""

    logp: torch.Tensor
    entropy: torch.Tensor | None = None
    topk_logp: torch.Tensor | None = None
    ref_kl: torch.Tensor | None = None
    future_logp: torch.Tensor | None = None
    value: torch.Tensor | None = None


def split(columns: torch.Tensor, with_value: bool = False, **wanted: Any) -> Scores:
    """The columns of ``PolicyModel.forward``, which was called with ``wanted``, by name."""
    entropy_grad = bool(wanted.get("entropy_grad"))
    ids = wanted.get("topk_ids")
    widths = {
        "logp": 1,
        "entropy": int(entropy_grad or bool(wanted.get("entropy"))),
        "topk_logp": 0 if ids is None else ids.shape[-1],
        "ref_kl": int(bool(wanted.get("forward_kl"))),
        "future_logp": int(wanted.get("future_lam") is not None),
        "value": int(with_value),
    }
    parts = dict(zip(widths, columns.split(list(widths.values()), 1), strict=True))
    named = {
        name: part if name == "topk_logp" else part[:, 0]
        for name, part in parts.items()
        if widths[name] or (name == "topk_logp" and ids is not None)
    }
    for name in ("future_logp",) if entropy_grad else ("future_logp", "entropy"):
        if name in named:
            named[name] = named[name].detach()
    return Scores(**named)


def layout_for(device: str, dtype: torch.dtype) -> tuple[Layout, str]:
    """(how micro-batches are laid out, which attention runs them): packed rows where flash-attention is installed and
    takes the dtype."""
    if device == "cuda" and dtype in (torch.bfloat16, torch.float16):
        from transformers.utils import is_flash_attn_2_available

        if is_flash_attn_2_available():
            return "packed", "flash_attention_2"
    return "padded", "sdpa"


def load_policy(
    model_path: str, config: Config, *, dtype: torch.dtype, device: str | None, with_value: bool = False
) -> PolicyModel:
    """Loads a policy for training, with a critic if asked. ``device`` None leaves placement to DeepSpeed."""
    from transformers import AutoModelForCausalLM

    _, attention = layout_for("cuda" if torch.cuda.is_available() else "cpu", dtype)
    model = AutoModelForCausalLM.from_pretrained(
        model_path,
        dtype=dtype,
        attn_implementation=attention,
        trust_remote_code=False,
        use_safetensors=True,
        low_cpu_mem_usage=True,
    )
    _no_dropout(model)
    if config.learner.gradient_checkpointing:
        # The re-entrant form: ZeRO-3 has released a layer's parameters by the time that the other form checks shapes.
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.enable_input_require_grads()
    policy = PolicyModel(model, with_value).train()
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
    return torch.optim.AdamW(parameters, lr=c.lr, **c.adamw, fused=True if fused else None)


def schedule(optimizer: torch.optim.Optimizer, config: Config) -> Any:
    """The learning-rate schedule, counted in optimizer updates. Raises ValueError for an unknown name."""
    from transformers import get_scheduler

    c = config.learner
    updates = config.train.steps * c.mini_batches
    return get_scheduler(c.lr_schedule, optimizer, num_warmup_steps=c.warmup_steps, num_training_steps=updates)
