"""Random token batches for the tests of objectives."""

from __future__ import annotations

from dataclasses import replace

import torch

from hapo_async.upge import TokenBatch

K = 4


def make(seed=0, lengths=(5, 1, 7, 3, 4, 6), groups=(0, 0, 0, 1, 1, 2), teachers=(2, 5), spread=0.4, masked=True):
    """A random fp64 batch: some ratios outside the clip, one masked token, two teacher sequences, leaf log-probs."""
    g = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    n = len(sequence)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    logp = -0.05 - 3 * rand(n)
    mask = torch.ones(n, dtype=torch.bool)
    if masked:
        mask[1] = mask[n - 1] = False
    advantage = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    ref = torch.log_softmax(3 * rand(n, K + 1), -1)[:, :K]
    keep = rand(n, K) > 0.2
    batch = TokenBatch(
        logp=logp.clone().requires_grad_(),
        logp_prox=logp - spread * torch.randn(n, generator=g, dtype=torch.float64),
        logp_behave=logp - spread * torch.randn(n, generator=g, dtype=torch.float64),
        logp_ref=logp - 0.5 * torch.randn(n, generator=g, dtype=torch.float64),
        entropy=rand(n).requires_grad_(),
        advantage=advantage[sequence],
        topk_logp=(ref + 0.5 * torch.randn(n, K, generator=g, dtype=torch.float64) - 0.3).clone().requires_grad_(),
        topk_ref_logp=ref,
        topk_keep=keep,
        mask=mask,
        is_teacher=torch.isin(sequence, torch.tensor(teachers, dtype=torch.long)),
        sequence=sequence,
        group=torch.tensor(groups)[sequence],
        reward=(rand(len(lengths)) > 0.5).double(),
        confidence=0.1 + 0.7 * rand(max(groups) + 1),
    )
    return replace(
        batch,
        future_logp=logp + 0.3 * torch.randn(n, generator=g, dtype=torch.float64),
        ref_kl=rand(n).requires_grad_(),
        value=rand(n).requires_grad_(),
        value_old=rand(n),
        returns=rand(n),
    )
