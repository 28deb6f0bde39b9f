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

from hapo_async.reduction import Normaliser
from hapo_async.types import Source, Version

if TYPE_CHECKING:
    from hapo_async.sequences import Sequence, TrainGroup

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
    groups: Seq[TrainGroup],
    ranks: int,
    mini_batches: int,
    version: Version,
    *,
    seed: int = 0,
    pairs: str | None = None,
) -> list[StepPlan]:
    """One plan per rank. ``groups`` are split in their order into (at most) ``mini_batches`` parts of equal count.

    pairs: how preference pairs are matched (``reduction.match_pairs``), where the algorithm counts them. A last,
    partial batch works: there are never more mini-batches than groups, and a rank may get no group at all (it then
    computes weightless dummies). Raises ValueError when there is nothing to train.
    """
    if not groups:
        raise ValueError("a learner step needs at least one group; the composition left none to train")
    minis = [list(part) for part in _split(groups, min(mini_batches, len(groups)))]
    normalisers = tuple(Normaliser.of_groups(mini, pairs) for mini in minis)
    shares = [share_out([g.tokens for g in mini], ranks) for mini in minis]
    return [
        StepPlan(
            version,
            tuple(tuple(mini[i] for i in share[rank]) for mini, share in zip(minis, shares, strict=True)),
            normalisers,
            seed,
        )
        for rank in range(ranks)
    ]


def _split(groups: Seq[TrainGroup], parts: int) -> list[Seq[TrainGroup]]:
    edges = [round(i * len(groups) / parts) for i in range(parts + 1)]
    return [groups[a:b] for a, b in itertools.pairwise(edges)]


def share_out(tokens: Seq[int], ranks: int) -> list[list[int]]:
    """Indices into ``tokens`` for every rank: longest first, each to the rank with the fewest tokens so far; ties go to
    the lowest rank."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for i in sorted(range(len(tokens)), key=lambda i: (-tokens[i], i)):
        rank = load.index(min(load))
        shares[rank].append(i)
        load[rank] += tokens[i]
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
    given it. ``version_step`` is -1 where no policy version is recorded (teachers, cached answers). ``logp_ref`` holds
    cached scores of the reference, NaN where there are none; ``has_ref``: every policy token has one. ``reward`` is NaN
    where unjudged. A dummy scores one token, so that every parameter takes part, and must be given a zero loss.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    predict: torch.Tensor
    targets: torch.Tensor
    temperature: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    logp_behave: torch.Tensor
    logp_ref: torch.Tensor
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
    has_ref: bool = False
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
    whole_groups: bool = False,
    pad_id: int = 0,
    dtype: torch.dtype = torch.float32,
) -> list[MicroBatch]:
    """Micro-batches of at most ``budget_tokens`` token columns, padding included (a longer sequence gets its own).

    Sequences of like length share a micro-batch, so that little is padded. ``groups`` is P, by default just enough for
    the sequences' own indices. ``whole_groups`` keeps the sequences of a group together, whatever their tokens. Padding
    and grouping never change a result, only the time it takes.
    """
    if not sequences:
        return []
    table = _group_table(sequences, groups)
    units = _units(sequences, whole_groups)
    rows = np.array([len(unit) for unit in units])
    widths = np.array([max(_length(sequences[i]) for i in unit) for unit in units])
    if layout == "padded":
        sizes = _padded_sizes(widths, budget_tokens, rows)
    else:
        sizes = _packed_sizes([sum(_length(sequences[i]) for i in unit) for unit in units], budget_tokens)
    out, start = [], 0
    for size in sizes:
        chosen = [i for unit in units[start : start + size] for i in unit]
        out.append(_assemble(sequences, chosen, table, layout, pad_id, dtype))
        start += size
    return out


def _units(sequences: Seq[Sequence], whole_groups: bool) -> list[list[int]]:
    """What may not be cut apart: single sequences, or those of a group; as indices, the longest first."""
    units: dict[int, list[int]] = {}
    for i, s in enumerate(sequences):
        units.setdefault(s.group if whole_groups else i, []).append(i)
    return sorted(units.values(), key=lambda unit: -max(_length(sequences[i]) for i in unit))


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
        weight=one,
        logp_behave=empty,
        logp_ref=torch.full_like(empty, np.nan),
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


def narrowed(micro: MicroBatch, positions: torch.Tensor) -> MicroBatch:
    """The model's inputs without the sequences that hold none of ``positions`` int [M] into [N], and predict and targets
    [M] of those positions: the same hidden states for less. One sequence stays where there are no positions. What else
    is per token or sequence is left as it was."""
    packed, ids = micro.cu_seqlens is not None, micro.input_ids
    width = ids.shape[1]
    edges = (
        torch.arange(len(ids) + 1, device=ids.device) * width if micro.cu_seqlens is None else micro.cu_seqlens.long()
    )
    flat = micro.predict[positions]
    held = torch.searchsorted(edges, flat, right=True) - 1
    kept, place = torch.unique(held, return_inverse=True)
    if not len(kept):
        kept = torch.zeros(1, dtype=torch.long, device=ids.device)
    lengths = edges[kept + 1] - edges[kept]
    starts = lengths.cumsum(0) - lengths
    index = torch.repeat_interleave(edges[kept] - starts, lengths) + torch.arange(int(lengths.sum()), device=ids.device)
    shape = (1, -1) if packed else (len(kept), width)
    return replace(
        micro,
        input_ids=ids.reshape(-1)[index].reshape(shape),
        position_ids=micro.position_ids.reshape(-1)[index].reshape(shape),
        cu_seqlens=torch.cat([starts, lengths.sum()[None]]).int() if packed else None,
        predict=flat - edges[held] + starts[place],
        targets=micro.targets[positions],
    )


def trained_positions(sources: np.ndarray) -> np.ndarray:
    """Indices of the tokens that the policy or a teacher wrote, among sources int8 [T]."""
    return np.flatnonzero((sources == Source.POLICY) | (sources == Source.TEACHER))


def _length(s: Sequence) -> int:
    return len(s.prompt_tokens) + len(s.tokens)


def _group_table(sequences: Seq[Sequence], groups: int | None) -> tuple[np.ndarray, np.ndarray]:
    """(confidence, group_size), each [P], read off the groups' sequences; NaN and 0 for a group without any."""
    count = groups if groups is not None else 1 + max(s.group for s in sequences)
    confidence, size = np.full(count, np.nan), np.zeros(count, np.int64)
    for s in sequences:
        confidence[s.group], size[s.group] = s.confidence, s.group_size
    return confidence, size


def _padded_sizes(lengths: np.ndarray, budget: int, rows: np.ndarray | None = None) -> list[int]:
    """How many of the sorted (falling) lengths go into each micro-batch, at the least cost. rows: sequences that each
    length stands for (None: one).

    Dynamic programme over cut points: a micro-batch of i..j costs its rectangle, its rows times lengths[i], plus
    LAUNCH_TOKENS, and may not exceed the budget unless it is a single entry.
    """
    n = len(lengths)
    before = np.arange(n + 1) if rows is None else np.concatenate([[0], np.cumsum(rows)])
    best = np.full(n + 1, np.inf)
    best[0] = 0.0
    previous = np.zeros(n + 1, np.int64)
    for i in range(n):
        most = before[i] + budget // max(1, int(lengths[i]))
        last = max(i + 1, int(np.searchsorted(before, most, side="right")) - 1)
        ends = np.arange(i + 1, last + 1)
        costs = best[i] + (before[ends] - before[i]) * lengths[i] + LAUNCH_TOKENS
        better = costs < best[ends]
        best[ends[better]] = costs[better]
        previous[ends[better]] = i
    sizes, end = [], n
    while end:
        sizes.append(int(end - previous[end]))
        end = int(previous[end])
    return sizes[::-1]


def _packed_sizes(lengths: Seq[int], budget: int) -> list[int]:
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
    trained = [trained_positions(s.sources) for s in rows]
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
    reward[torch.as_tensor(chosen)] = torch.tensor([s.reward if s.judged else np.nan for s in rows], dtype=dtype)
    cached = [np.full(len(s.tokens), np.nan) if s.logp_ref is None else s.logp_ref for s in rows]
    logp_ref = np.concatenate([scores[kept] for scores, kept in zip(cached, trained, strict=True)]).astype(np.float64)
    is_teacher = per_token("sources") == Source.TEACHER
    return MicroBatch(
        input_ids=torch.from_numpy(ids.reshape(shape)),
        position_ids=torch.from_numpy(np.array(positions)),
        predict=torch.from_numpy(np.concatenate(predict)),
        targets=torch.from_numpy(per_token("tokens").astype(np.int64)),
        temperature=torch.from_numpy(spread([s.temperature for s in rows])).to(dtype),
        advantage=torch.from_numpy(spread([s.advantage for s in rows])).to(dtype),
        weight=torch.from_numpy(spread([s.weight for s in rows])).to(dtype),
        logp_behave=torch.from_numpy(per_token("logp_behave").astype(np.float64)).to(dtype),
        logp_ref=torch.from_numpy(logp_ref).to(dtype),
        is_teacher=torch.from_numpy(is_teacher),
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
        has_ref=not np.isnan(logp_ref[~is_teacher]).any(),
    )
