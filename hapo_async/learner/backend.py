"""What the learner's step needs from outside: a backend that owns module and optimizer, and a frozen reference.

``actors.zero`` and ``actors.reference`` are the real ones; ``TorchBackend`` is one plain process without DeepSpeed.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from hapo_async.batch import MicroBatch
from hapo_async.config import Config
from hapo_async.learner.policy import PolicyModel, adamw


class Update(NamedTuple):
    """The outcome of one optimizer update. grad_norm: global, before clipping. ``applied`` is False when the norm was
    not finite, or finite and above the bound that was asked for."""

    grad_norm: float
    applied: bool

    @property
    def over_bound(self) -> bool:
        return not self.applied and math.isfinite(self.grad_norm)


class Backend(Protocol):
    """What a learner needs from whoever owns module and optimizer. All methods but ``configure`` are collective.

    loss_scale: what ``backward`` multiplies the loss by, and with it every gradient that a hook sees.
    """

    policy: PolicyModel
    torch_optimizer: torch.optim.Optimizer
    device: torch.device
    rank: int
    world_size: int
    loss_scale: float

    def forward(self, micro: MicroBatch, **wanted: Any) -> torch.Tensor:
        """The policy's forward pass."""

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Adds the gradient of ``loss``, summed over ranks; ``last`` marks the update's last micro-batch."""

    def update(self, max_norm: float | None = None) -> Update:
        """Clips, steps and clears the gradients; steps nothing, on any rank, when their global norm is not finite or
        above ``max_norm``."""

    def configure(self, config: Config) -> None:
        """Takes over the optimizer's settings; its moments stay."""

    def agree_max(self, values: list[int]) -> list[int]:
        """Elementwise maximum over ranks."""

    def agree_sum(self, values: list[float]) -> list[float]:
        """Elementwise sum over ranks."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """Everyone's [n] (n may differ) one after the other, on every rank."""


def set_optimizer(optimizer: torch.optim.Optimizer, config: Config) -> None:
    """Puts the settings of ``config`` into an AdamW; a schedule made afterwards starts from its learning rate."""
    lr = config.learner.lr
    for group in optimizer.param_groups:
        group.update(lr=lr, initial_lr=lr, **config.learner.adamw)


class TorchBackend:
    """One plain process, no DeepSpeed: for tests, for notebooks, and as the reading version of ``actors.zero``."""

    def __init__(self, policy: PolicyModel, config: Config) -> None:
        self.policy = policy
        self.torch_optimizer: torch.optim.Optimizer = adamw(policy.parameters(), config)
        self.device = next(policy.parameters()).device
        self.rank, self.world_size, self.loss_scale = 0, 1, 1.0
        self._clip = config.learner.grad_clip

    def forward(self, micro: MicroBatch, **wanted: Any) -> torch.Tensor:
        return self.policy(micro, **wanted)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def update(self, max_norm: float | None = None) -> Update:
        norm = float(nn.utils.clip_grad_norm_(self.policy.parameters(), self._clip))
        applied = math.isfinite(norm) and (max_norm is None or norm <= max_norm)
        if applied:
            self.torch_optimizer.step()
        self.torch_optimizer.zero_grad(set_to_none=True)
        return Update(norm, applied)

    def configure(self, config: Config) -> None:
        set_optimizer(self.torch_optimizer, config)
        self._clip = config.learner.grad_clip

    def agree_max(self, values: list[int]) -> list[int]:
        return values

    def agree_sum(self, values: list[float]) -> list[float]:
        return values

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        return values


# --------------------------------------------------------------------------------------------------------------------
# The reference


class Anchors(NamedTuple):
    """The reference's most likely tokens at M of a micro-batch's N positions. positions int32 [M]; ids int32 [M, K],
    best first; logp [M, K] at temperature 1."""

    positions: torch.Tensor
    ids: torch.Tensor
    logp: torch.Tensor


class Reference(Protocol):
    """A frozen model that scores after the gate. Its methods are called by all ranks alike, on dummies too."""

    def topk(self, micro: MicroBatch, positions: torch.Tensor, k: int) -> Anchors:
        """Its K most likely tokens at ``positions`` int [M] into [N], and nothing for any other."""

    def logp(self, micro: MicroBatch) -> torch.Tensor:
        """[N]: log-probs of the micro-batch's own tokens, at their own temperature."""

    def states(self, micro: MicroBatch) -> torch.Tensor:
        """[N, H]: the hidden states that its head reads; its log-probs are those of ``states @ weight.T + bias``."""

    def head(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(weight [V, H], bias [V] or None), whole, for ``states``."""


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
