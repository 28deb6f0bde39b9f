"""The frozen reference policy on the learner's ranks: it scores after the gate, and only the tokens that need it.

With ZeRO-3 on several ranks it is partitioned like the policy, and every rank must then ask alike; otherwise each rank
keeps a whole copy. It must be loaded before the policy: once DeepSpeed's configuration is announced to transformers,
everything that is loaded gets partitioned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hapo_async.batch import MicroBatch
from hapo_async.config import Config
from hapo_async.head import reference_topk
from hapo_async.policy import PolicyModel, load_policy


class _TopKHead(nn.Module):
    """Owns the projection, so that ZeRO-3 gathers it exactly around the forward pass."""

    def __init__(self, projection: nn.Linear, chunk_tokens: int) -> None:
        super().__init__()
        self.weight, self.bias, self.chunk_tokens = projection.weight, projection.bias, chunk_tokens

    def forward(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, logp = reference_topk(hidden, self.weight, k, self.chunk_tokens, self.bias)
        return ids, logp


class _ReferenceModel(nn.Module):
    def __init__(self, policy: PolicyModel, chunk_tokens: int) -> None:
        super().__init__()
        self.policy = policy
        self.head = _TopKHead(policy.model.get_output_embeddings(), chunk_tokens)

    def forward(self, micro: MicroBatch, chosen: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.head(self.policy.hidden(micro)[chosen], k)


class FrozenReference:
    """Scores with weights that never change; implements ``hapo_async.learn.Reference``."""

    def __init__(
        self, model_path: str, config: Config, *, dtype: torch.dtype, device: str, engine_config: dict[str, Any] | None
    ) -> None:
        """engine_config: DeepSpeed's configuration to partition the weights under, or None for a whole copy."""
        learner = config.learner.model_copy(update={"gradient_checkpointing": False})
        frozen = config.model_copy(update={"learner": learner})
        self._announced: Any = None
        if engine_config is not None:
            from transformers.integrations import HfDeepSpeedConfig

            self._announced = HfDeepSpeedConfig(engine_config)
        policy = load_policy(model_path, frozen, dtype=dtype, device=device if engine_config is None else None)
        policy.eval().requires_grad_(False)
        self._model: Any = _ReferenceModel(policy, config.learner.head_chunk_tokens)
        if engine_config is not None:
            import deepspeed

            self._model = deepspeed.initialize(model=self._model, config=engine_config, dist_init_required=False)[0]

    @torch.no_grad()
    def topk(self, micro: MicroBatch, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(ids int64, logp, keep bool), each [N, K]. Scored are policy tokens with a negative advantage; for others,
        and where an id is the sampled token, keep is False. Runs on dummies too: ranks stay in step."""
        chosen = ((micro.advantage < 0) & ~micro.is_teacher).nonzero().squeeze(-1)
        some_ids, some_logp = self._model(micro, chosen, k)
        shape = (micro.trained_tokens, some_ids.shape[-1])
        ids = torch.zeros(shape, dtype=torch.long, device=some_ids.device).index_copy_(0, chosen, some_ids)
        logp = torch.zeros(shape, dtype=some_logp.dtype, device=some_ids.device).index_copy_(0, chosen, some_logp)
        keep = torch.zeros(shape, dtype=torch.bool, device=some_ids.device)
        keep[chosen] = some_ids != micro.targets[chosen, None]
        return ids, logp, keep
