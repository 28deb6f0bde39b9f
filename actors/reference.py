"""The frozen reference policy on the learner's ranks: it scores after the gate, and only the tokens that need it.

With ZeRO-3 on several ranks it is partitioned like the policy, and every rank must then ask alike; otherwise each rank
keeps a whole copy. It must be loaded before the policy: once DeepSpeed's configuration is announced to transformers,
everything that is loaded gets partitioned.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from hapo_async.batch import MicroBatch, narrowed
from hapo_async.config import Config
from hapo_async.learner.backend import Anchors
from hapo_async.learner.head import reference_topk
from hapo_async.learner.policy import PolicyModel, load_policy


class _TopKHead(nn.Module):
    """Owns the projection, so that ZeRO-3 gathers it exactly around the forward pass."""

    def __init__(self, projection: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = projection.weight, projection.bias

    def forward(self, hidden: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, logp = reference_topk(hidden, self.weight, k, bias=self.bias)
        return ids, logp


class _ReferenceModel(nn.Module):
    """One forward for all that is asked of the reference: under ZeRO-3 it is the engine's only entrance."""

    def __init__(self, policy: PolicyModel) -> None:
        super().__init__()
        self.policy = policy
        self.topk = _TopKHead(policy.model.get_output_embeddings())

    def forward(self, micro: MicroBatch, what: Literal["topk", "logp", "states"], *arguments: Any) -> Any:
        if what == "logp":
            return self.policy(micro)[:, 0]
        if what == "states":
            return self.policy.hidden(micro)
        positions, k = arguments
        return self.topk(self.policy.hidden(narrowed(micro, positions)), k)


class FrozenReference:
    """Scores with weights that never change; implements ``hapo_async.learner.backend.Reference``."""

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
        self.policy = policy
        self._projection = policy.model.get_output_embeddings()
        self._head: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._model: Any = _ReferenceModel(policy)
        if engine_config is not None:
            import deepspeed

            self._model = deepspeed.initialize(model=self._model, config=engine_config, dist_init_required=False)[0]

    @torch.no_grad()
    def topk(self, micro: MicroBatch, positions: torch.Tensor, k: int) -> Anchors:
        """The K most likely tokens at ``positions``: K ids and K log-probs for each, and nothing else. Sequences without
        such a position are not computed."""
        ids, logp = self._model(micro, "topk", positions, k)
        return Anchors(positions.int(), ids.int(), logp)

    @torch.no_grad()
    def logp(self, micro: MicroBatch) -> torch.Tensor:
        """[N]: log-probs of the micro-batch's own tokens, at their own temperature."""
        return self._model(micro, "logp")

    @torch.no_grad()
    def states(self, micro: MicroBatch) -> torch.Tensor:
        """[N, H]: the hidden states that the head reads."""
        return self._model(micro, "states")

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [V, H], bias [V] or None). A collective on its first call, where the weights are partitioned: every
        rank then keeps this one matrix whole."""
        if self._head is None:
            weight, bias = self._projection.weight, self._projection.bias
            if self._announced is None:
                self._head = weight.detach(), bias if bias is None else bias.detach()
            else:
                import deepspeed

                with deepspeed.zero.GatheredParameters([p for p in (weight, bias) if p is not None]):
                    self._head = weight.detach().clone(), bias if bias is None else bias.detach().clone()
        return self._head
