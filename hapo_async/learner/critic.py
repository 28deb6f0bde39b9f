"""The critic: a value head on the policy's own trunk, and the advantages that its values make of rewards.

The value of a token is that of the state that predicts it: what the policy has seen before it writes the token.
Legend: N trained tokens, H hidden.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from hapo_async.advantage import gae
from hapo_async.batch import MicroBatch


class ValueHead(nn.Linear):
    """[N, H] -> [N], in fp32 (fp64 for fp64 states) whatever the weights' type. It starts at 0: then the advantages
    are the rewards themselves."""

    def __init__(self, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__(hidden_size, 1, dtype=dtype)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        return nn.functional.linear(hidden.to(wide), self.weight.to(wide), self.bias.to(wide))[:, 0]


class Estimate(NamedTuple):
    """value [N]: the critic's, before the step. advantage, returns [N]: of generalised advantage estimation."""

    value: torch.Tensor
    advantage: torch.Tensor
    returns: torch.Tensor


def estimate(micro: MicroBatch, value: torch.Tensor, discount: float, lam: float) -> Estimate:
    """Advantages of the policy's tokens from values [N]: the reward of a sequence (which the driver handed down as its
    advantage) comes with its last token. Unjudged sequences get advantage 0 and their values as returns; a teacher's
    keep the advantage they came with."""
    value = value.detach()
    advantage, returns = micro.advantage.clone(), value.clone()
    judged = ~torch.isnan(micro.reward[micro.sequence])
    reward, values = micro.advantage.double().cpu().numpy(), value.double().cpu().numpy()
    kind = torch.where(micro.is_teacher, 0, torch.where(judged, 1, 2)).cpu().numpy()
    sequence = micro.sequence.cpu().numpy()
    edges = [0, *(np.flatnonzero(np.diff(sequence)) + 1).tolist(), len(sequence)]
    for start, end in itertools.pairwise(edges):
        if kind[start] == 2:
            advantage[start:end] = 0.0
        if kind[start] != 1:
            continue
        rewards = np.zeros(end - start)
        rewards[-1] = reward[end - 1]
        made = gae(rewards, values[start:end], discount, lam)
        for target, source in zip((advantage, returns), made, strict=True):
            target[start:end] = torch.as_tensor(source, dtype=target.dtype, device=target.device)
    return Estimate(value, advantage, returns)
