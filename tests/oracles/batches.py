"""The batches that oracles, peers and the package meet on: random, degenerate, adversarial; seeded, fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hapo_async.upge import TokenBatch

K = 4
LENGTHS = (5, 1, 7, 3, 4, 6, 2, 8, 5)
GROUPS = (0, 0, 0, 0, 1, 1, 1, 2, 2)
REWARDS = (1.0, 0.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0)
LEAVES = ("logp", "topk_logp", "entropy", "ref_kl", "value")
FLOATS = (
    "logp", "logp_prox", "logp_behave", "logp_ref", "entropy", "entropy_prox", "advantage", "topk_logp",
    "topk_ref_logp", "future_logp", "ref_kl", "value", "value_old", "returns", "weight",
)  # fmt: skip


def leaves(batch: TokenBatch, **changes: Tensor | None) -> TokenBatch:
    """The batch with new values, and fresh leaves where gradients are compared."""
    batch = replace(batch, **changes)
    fresh = {f: x.detach().clone().requires_grad_() for f in LEAVES if (x := getattr(batch, f)) is not None}
    return replace(batch, **fresh)


def random(
    seed: int = 0,
    lengths: Sequence[int] = LENGTHS,
    groups: Sequence[int] = GROUPS,
    rewards: Sequence[float] = REWARDS,
    teachers: Sequence[int] = (),
    spread: float = 0.4,
    masked: float = 0.1,
) -> TokenBatch:
    """Every field filled: ratios on both sides of every clip, about one token in ten masked."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    noise = lambda *shape: spread * torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    count = torch.tensor(lengths, dtype=torch.long)
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), count)
    n, logp = len(sequence), -0.05 - 3 * rand(int(count.sum()))
    advantage = torch.randn(len(lengths), generator=g, dtype=torch.float64)
    ref = torch.log_softmax(3 * rand(n, K + 1), -1)[:, :K]
    batch = TokenBatch(
        logp=logp,
        logp_prox=logp + noise(n),
        logp_behave=logp + 2 * noise(n),
        logp_ref=logp + noise(n),
        entropy=3 * rand(n),
        entropy_prox=3 * rand(n),
        advantage=advantage[sequence],
        topk_logp=ref + noise(n, K) + 0.3,
        topk_ref_logp=ref,
        topk_keep=rand(n, K) > 0.2,
        future_logp=logp + noise(n),
        ref_kl=rand(n),
        mask=rand(n) >= masked,
        is_teacher=torch.isin(sequence, torch.tensor(teachers, dtype=torch.long)),
        sequence=sequence,
        group=torch.tensor(groups, dtype=torch.long)[sequence],
        age=torch.randint(0, 3, (n,), generator=g),
        value=rand(n),
        value_old=rand(n),
        returns=rand(n),
        reward=torch.tensor(rewards, dtype=torch.float64),
        confidence=0.1 + 0.7 * rand(max(groups, default=0) + 1),
    )
    return leaves(batch)


def broken(batch: TokenBatch) -> TokenBatch:
    """NaN in every number of every masked token."""
    off = ~batch.mask
    bad = {
        f: x.detach().masked_fill(off if x.ndim == 1 else off[:, None], torch.nan)
        for f in FLOATS
        if (x := getattr(batch, f)) is not None
    }
    return leaves(batch, **bad)


def shifted(field: str, by: Sequence[float], seed: int = 0, teachers: Sequence[int] = ()) -> TokenBatch:
    """A random batch in which single tokens of one field sit at logp + by."""
    batch = random(seed, teachers=teachers)
    values = getattr(batch, field).detach().clone()
    for at, gap in enumerate(by):
        values[3 * at + 1] = gap + (batch.logp[3 * at + 1].detach() if torch.isfinite(torch.tensor(gap)) else 0)
    return leaves(batch, **{field: values})


def tiny_probabilities() -> TokenBatch:
    """Tokens at log-probabilities of -50 and -200, and their neighbours in every other field."""
    batch = random(4, teachers=(3, 6))
    shift = torch.zeros_like(batch.logp)
    shift[2::5], shift[4::7] = -50.0, -200.0
    moved = {
        f: getattr(batch, f).detach() + shift for f in ("logp", "logp_prox", "logp_behave", "logp_ref", "future_logp")
    }
    return leaves(batch, **moved)


def interleaved() -> TokenBatch:
    """The same tokens in another order: nothing may depend on a response lying in one piece, or on its ids."""
    batch = random(5, teachers=(3,))
    order = torch.randperm(len(batch.logp), generator=torch.Generator().manual_seed(0))
    n = len(order)
    moved = {
        f: x.detach()[order]
        for f in batch.__dataclass_fields__
        if isinstance(x := getattr(batch, f), Tensor) and len(x) == n
    }
    return leaves(batch, **moved)


def anchors_at_their_edges() -> TokenBatch:
    """APO: no id left, Z under 1e-4, a huge r_a, ids of no probability under the policy."""
    batch = random(6)
    keep, ref, now = batch.topk_keep.clone(), batch.topk_ref_logp.clone(), batch.topk_logp.detach().clone()
    keep[::5] = False
    ref[1::5] = -15.0
    now[2::5], ref[2::5] = -1.5, -8.0
    now[3::5] = -50.0
    return leaves(batch, topk_keep=keep, topk_ref_logp=ref, topk_logp=now, advantage=-batch.advantage.abs() - 0.1)


def with_rewards(*rewards: float, seed: int = 7) -> TokenBatch:
    return random(seed, rewards=rewards)


def nothing() -> TokenBatch:
    batch = random(0)
    empty = {
        f: x.detach()[:0]
        for f in batch.__dataclass_fields__
        if isinstance(x := getattr(batch, f), Tensor) and len(x) == len(batch.logp)
    }
    return leaves(batch, **empty)


def weighted() -> TokenBatch:
    """Each row with a weight of its own, as a soft switch gives them."""
    batch = random(8, teachers=(3, 8))
    return leaves(batch, weight=torch.linspace(0, 1, 9, dtype=torch.float64)[batch.sequence])


NAN = float("nan")
INF = float("inf")
BATCHES: dict[str, Callable[[], TokenBatch]] = {
    "random": lambda: random(0),
    "random with teachers": lambda: random(1, teachers=(3, 6)),
    "large": lambda: random(
        2, lengths=[3 + 7 * i % 23 for i in range(48)], groups=[i // 8 for i in range(48)],
        rewards=[float(i % 3 == 0) for i in range(48)], teachers=range(7, 48, 8), spread=0.2, masked=0.02,
    ),
    "in another order": interleaved,
    "weighted rows": weighted,
    "no proximal policy": lambda: leaves(random(9, teachers=(2,)), logp_prox=None, entropy_prox=None),
    "equal policies": lambda: (lambda b: leaves(b, logp_prox=b.logp.detach(), logp_behave=b.logp.detach()))(random(10)),
    "no advantage anywhere": lambda: (lambda b: leaves(b, advantage=torch.zeros_like(b.advantage)))(random(11)),
    "responses of one token": lambda: random(12, lengths=[1] * 9, teachers=(4,), masked=0.0),
    "a lone token": lambda: random(13, lengths=[1], groups=[0], rewards=[1.0], masked=0.0),
    "all masked": lambda: (lambda b: leaves(b, mask=torch.zeros_like(b.mask)))(random(14, teachers=(3,))),
    "empty": nothing,
    "a response wholly masked": lambda: (lambda b: leaves(b, mask=b.mask & (b.sequence != 0) & (b.sequence != 4)))(
        random(15, teachers=(3,))
    ),
    "teachers alone": lambda: random(16, teachers=range(9)),
    "all right": lambda: with_rewards(*[1.0] * 9),
    "all wrong": lambda: with_rewards(*[0.0] * 9),
    "one side missing in some groups": lambda: with_rewards(1, 1, 1, 1, 0, 0, 0, 1, 0),
    "rewards between 0 and 1": lambda: with_rewards(1, 0.5, 0.99, 1, 0.1, 1, -1, 1, 0),
    "unjudged answers": lambda: with_rewards(1, NAN, 0, 0, NAN, NAN, NAN, NAN, 1),
    "unjudged groups": lambda: with_rewards(*[NAN] * 9),
    "broken where masked": lambda: broken(random(17, teachers=(3, 6), masked=0.3)),
    "tiny probabilities": tiny_probabilities,
    "ratios beyond the bound": lambda: shifted("logp_prox", (-25, 24, -300, 30, 19, -22, 28, -21), teachers=(3,)),
    "single tokens beyond the bound": lambda: (
        lambda b: leaves(b, logp_prox=b.logp.detach() + torch.linspace(-40, 40, 9, dtype=torch.float64))
    )(random(19, lengths=[1] * 9, masked=0.0)),
    "references beyond the bound": lambda: shifted("logp_ref", (-25, 24, -300, 30, 19, -22, 28)),
    "references of no probability": lambda: shifted("logp_ref", (-INF, -INF)),
    "broken behaviour": lambda: shifted("logp_behave", (NAN, INF, -INF, 25, -25), teachers=(3,)),
    "anchors at their edges": anchors_at_their_edges,
    "spikes of entropy": lambda: (
        lambda b: leaves(b, entropy_prox=torch.where(torch.arange(len(b.logp)) % 13 == 5, 3.0, 0.01 * b.entropy_prox))
    )(random(20, lengths=[14, 20, 9, 16, 1, 12, 13, 25, 8])),
    "no entropy": lambda: (lambda b: leaves(b, entropy_prox=torch.zeros_like(b.logp), entropy=torch.zeros_like(b.logp)))(
        random(18)
    ),
}  # fmt: skip
