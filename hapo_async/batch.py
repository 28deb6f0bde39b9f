"""From gated groups to tensors: one step's work shared out over updates and ranks, then packed into micro-batches.

Two stages. ``plan_step`` runs in the driver and sees headers only: it splits a batch into mini-batches (one optimizer
update each) and shares every mini-batch out over the learner ranks, whole groups balanced by tokens; the normalisers
are global, so that gradients depend neither on the number of ranks nor on that of micro-batches. ``pack`` runs on a
rank, on token ids: it forms micro-batches under a token budget.

Shapes: B rows, T columns of one micro-batch; N trained tokens; S sequences; P groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from hapo_async.types import Source, Version
from hapo_async.upge import Normaliser

if TYPE_CHECKING:
    from hapo_async.inject import Sequence, TrainGroup

Layout = Literal["padded", "packed"]

# What starting one more micro-batch costs, in token columns: fewer, fuller micro-batches win against less padding.
LAUNCH_TOKENS = 768


# --------------------------------------------------------------------------------------------------------------------
# The driver's side: who trains what


@dataclass(frozen=True)
class StepPlan:
    """One rank's share of a learner step.

    version: the learner's version before the step; ages are counted from it. minis: this rank's groups of each
    mini-batch (maybe none). normalisers: one per mini-batch, over all ranks. seed: for anything random in the step.
    """

    version: Version
    minis: tuple[tuple[TrainGroup, ...], ...]
    normalisers: tuple[Normaliser, ...]
    seed: int = 0


def plan_step(
    groups: Seq[TrainGroup], ranks: int, mini_batches: int, version: Version, *, seed: int = 0
) -> list[StepPlan]:
    """One plan per rank. ``groups`` are split in their order into (at most) ``mini_batches`` parts of equal count.

    A last, partial batch works: there are never more mini-batches than groups, and a rank may get no group at all (it
    then computes weightless dummies). Raises ValueError when there is nothing to train.
    """
    if not groups:
        raise ValueError("a learner step needs at least one group; the composition left none to train")
    minis = [list(part) for part in _split(groups, min(mini_batches, len(groups)))]
    shares = [_balance(mini, ranks) for mini in minis]
    normalisers = tuple(Normaliser.of_groups(mini) for mini in minis)
    return [StepPlan(version, tuple(tuple(s[rank]) for s in shares), normalisers, seed) for rank in range(ranks)]


def _split(groups: Seq[TrainGroup], parts: int) -> list[Seq[TrainGroup]]:
    edges = [round(i * len(groups) / parts) for i in range(parts + 1)]
    return [groups[a:b] for a, b in itertools.pairwise(edges)]


def _balance(groups: Seq[TrainGroup], ranks: int) -> list[list[TrainGroup]]:
    """Longest first, each to the rank with the fewest tokens so far; ties go to the lowest rank."""
    shares: list[list[TrainGroup]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(groups)), key=lambda i: (-groups[i].tokens, i)):
        rank = load.index(min(load))
        shares[rank].append(groups[i])
        load[rank] += groups[i].tokens
    return shares


# --------------------------------------------------------------------------------------------------------------------
# A rank's side: tensors


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. Model inputs [B, T]; one entry per trained token [N]; per sequence [S]; per group [P].

    Right-padded rows need no attention mask: under causal attention no real token ever sees the padding behind it. In
    the packed layout B = 1, ``position_ids`` restart with every sequence, and ``cu_seqlens`` [sequences + 1] give
    variable-length attention its edges. ``predict`` holds, for every trained token, the flat index into [B * T] of the
    position whose hidden state predicts it. ``sequence`` and ``group`` index this rank's mini-batch, as the packer was
    given it. A dummy scores one token, so that every parameter takes part, and must be given a zero loss.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    temperature: torch.Tensor
    advantage: torch.Tensor
    logp_behave: torch.Tensor
    is_teacher: torch.Tensor
    version_step: torch.Tensor
    sequence: torch.Tensor
    group: torch.Tensor
    reward: torch.Tensor
    confidence: torch.Tensor
    group_size: torch.Tensor
    sequence_ids: tuple[int, ...]
    cu_seqlens: torch.Tensor | None = None
    max_length: int = 0
    real_tokens: int = 0
    is_real: bool = True

    @property
    def trained_tokens(self) -> int:
        return len(self.targets)

    @property
    def computed_tokens(self) -> int:
        """Padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device | str) -> MicroBatch:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors: dict[str, Any] = {k: v.to(device) for k, v in moved.items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


def pack(
    sequences: Seq[Sequence],
    budget_tokens: int,
    layout: Layout = "padded",
    *,
    groups: int | None = None,
    pad_id: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[MicroBatch]:
    """Micro-batches of at most ``budget_tokens`` token columns, padding included (a longer sequence gets its own).

    Sequences of like length share a micro-batch, so that little is padded. ``groups`` is P, by default just enough for
    the sequences' own indices. Padding and grouping never change a result, only the time it takes.
    """
    if not sequences:
        return []
    table = _group_table(sequences, groups)
    lengths = np.array([_length(s) for s in sequences])
    order = np.argsort(-lengths, kind="stable")
    sizes = (_padded_sizes if layout == "padded" else _packed_sizes)(lengths[order], budget_tokens)
    out, start = [], 0
    for size in sizes:
        chosen = [int(i) for i in order[start : start + size]]
        out.append(_assemble(sequences, chosen, table, layout, pad_id, dtype))
        start += size
    return out


def dummy(dtype: torch.dtype = torch.float32) -> MicroBatch:
    """Two tokens that train nothing: what a rank computes to stay in step with ranks that have more to do."""
    none, empty, one = torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=dtype), torch.ones(1, dtype=dtype)
    return MicroBatch(
        input_ids=torch.zeros(1, 2, dtype=torch.long),
        position_ids=torch.arange(2).unsqueeze(0),
        predict=none,
        targets=none,
        temperature=one,
        advantage=empty,
        logp_behave=empty,
        is_teacher=torch.zeros(1, dtype=torch.bool),
        version_step=none,
        sequence=none,
        group=none,
        reward=empty,
        confidence=empty,
        group_size=none,
        sequence_ids=(),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        max_length=2,
        is_real=False,
    )


def _length(s: Sequence) -> int:
    return len(s.prompt_tokens) + len(s.tokens)


def _group_table(sequences: Seq[Sequence], groups: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, group_size), each [P], read off the groups' sequences; NaN and 0 for a group without any."""
    count = groups if groups is not None else 1 + max(s.group for s in sequences)
    confidence, size = np.full(count, np.nan), np.zeros(count, np.int64)
    for s in sequences:
        confidence[s.group], size[s.group] = s.confidence, s.group_size
    return confidence, size


def _padded_sizes(lengths: np.ndarray, budget: int) -> list[int]:
    """How many of the sorted (falling) lengths go into each micro-batch, at the least cost.

    Dynamic programme over cut points: a micro-batch of rows i..j costs its rectangle (j - i) * lengths[i] plus
    LAUNCH_TOKENS, and may not exceed the budget unless it is a single row.
    """
    n = len(lengths)
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(n + 1, np.int64)
    for i in range(n):
        most = max(1, budget // max(1, int(lengths[i])))
        ends = np.arange(i + 1, min(n, i + most) + 1)
        costs = best[i] + (ends - i) * lengths[i] + LAUNCH_TOKENS
        better = costs < best[ends]
        best[ends[better]] = costs[better]
        previous[ends[better]] = i
    sizes, end = [], n
    while end:
        sizes.append(int(end - previous[end]))
        end = int(previous[end])
    return sizes[::-1]


def _packed_sizes(lengths: np.ndarray, budget: int) -> list[int]:
    sizes: list[int] = []
    used = 0
    for length in lengths:
        if sizes and used + length <= budget:
            sizes[-1] += 1
            used += int(length)
        else:
            sizes.append(1)
            used = int(length)
    return sizes


def _assemble(
    sequences: Seq[Sequence],
    chosen: Seq[int],
    table: tuple[np.ndarray, np.ndarray],
    layout: Layout,
    pad_id: int,
    dtype: torch.dtype,
) -> MicroBatch:
    rows = [sequences[i] for i in chosen]
    lengths = np.array([_length(s) for s in rows])
    width = int(lengths.max())
    starts = np.arange(len(rows)) * width if layout == "padded" else np.concatenate([[0], np.cumsum(lengths)[:-1]])
    size = len(rows) * width if layout == "padded" else int(lengths.sum())
    ids = np.full(size, pad_id, np.int64)
    trained = [np.flatnonzero((s.sources == Source.POLICY) | (s.sources == Source.TEACHER)) for s in rows]
    predict = []
    for s, start, kept in zip(rows, starts, trained, strict=True):
        assert len(s.prompt_tokens) > 0, "a sequence without a prompt token has nothing that predicts its first token"
        ids[start : start + len(s.prompt_tokens)] = s.prompt_tokens
        ids[start + len(s.prompt_tokens) : start + _length(s)] = s.tokens
        predict.append(start + len(s.prompt_tokens) - 1 + kept)
    if layout == "padded":
        shape, positions = (len(rows), width), np.broadcast_to(np.arange(width), (len(rows), width))
    else:
        shape, positions = (1, size), np.concatenate([np.arange(n) for n in lengths])[None]

    def per_token(name: str) -> np.ndarray:
        return np.concatenate([getattr(s, name)[kept] for s, kept in zip(rows, trained, strict=True)])

    def spread(values: Seq[float]) -> np.ndarray:
        return np.repeat(np.asarray(values), [len(kept) for kept in trained])

    edges = np.concatenate([[0], np.cumsum(lengths)]) if layout == "packed" else None
    reward = torch.zeros(len(sequences), dtype=dtype)
    reward[torch.as_tensor(chosen)] = torch.tensor([s.reward for s in rows], dtype=dtype)
    return MicroBatch(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        position_ids=torch.from_numpy(np.array(positions)),
        predict=torch.from_numpy(np.concatenate(predict)),
        targets=torch.from_numpy(per_token("tokens").astype(np.int64)),
        temperature=torch.from_numpy(spread([s.temperature for s in rows])).to(dtype),
        advantage=torch.from_numpy(spread([s.advantage for s in rows])).to(dtype),
        logp_behave=torch.from_numpy(per_token("logp_behave").astype(np.float64)).to(dtype),
        is_teacher=torch.from_numpy(per_token("sources") == Source.TEACHER),
        version_step=torch.from_numpy(per_token("version_steps").astype(np.int64)),
        sequence=torch.from_numpy(spread(chosen).astype(np.int64)),
        group=torch.from_numpy(spread([s.group for s in rows]).astype(np.int64)),
        reward=reward,
        confidence=torch.from_numpy(table[0]).to(dtype),
        group_size=torch.from_numpy(table[1]),
        sequence_ids=tuple(chosen),
        cu_seqlens=None if edges is None else torch.from_numpy(edges.astype(np.int32)),
        max_length=width,
        real_tokens=int(lengths.sum()),
    )
