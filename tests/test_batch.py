"""Sharing a step out and packing it: nothing lost, nothing doubled, budgets held, padding without effect."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hapo_async import batch, reduction
from hapo_async.types import Source, Version
from tests import samples_learn


@pytest.fixture(scope="module")
def groups():
    return samples_learn.groups(
        samples_learn.tasks(10, 4, seed=1), samples_learn.config(algorithm="hapo"), Version(0, 3)
    )


@pytest.fixture(scope="module")
def sequences(groups):
    """One without a verdict, one with a weight, some with cached scores of the reference."""
    (plan,) = batch.plan_step(groups, 1, 1, Version(0, 3))
    out = samples_learn.sequences(plan)[0]
    out[1] = replace(out[1], judged=False)
    out[2] = replace(out[2], weight=0.25)
    for i in range(0, len(out), 2):
        out[i] = replace(out[i], logp_ref=-np.arange(len(out[i].tokens), dtype=np.float32))
    return out


@pytest.mark.parametrize(("ranks", "minis"), [(1, 1), (2, 2), (3, 2), (4, 5)])
def test_every_group_is_planned_once_and_mini_batches_do_not_depend_on_ranks(groups, ranks, minis):
    plans = batch.plan_step(groups, ranks, minis, Version(0, 3), seed=7)
    assert len(plans) == ranks
    keys = [g.key for plan in plans for mini in plan.minis for g in mini]
    assert sorted(keys) == sorted(g.key for g in groups)
    alone = batch.plan_step(groups, 1, minis, Version(0, 3))[0]
    for i, mini in enumerate(alone.minis):
        assert {g.key for g in mini} == {g.key for plan in plans for g in plan.minis[i]}
        assert all(plan.normalisers[i] == reduction.Normaliser.of_groups(mini) for plan in plans)


def test_ranks_get_like_shares_of_tokens(groups):
    plans = batch.plan_step(groups, 2, 1, Version(0, 3))
    loads = [sum(g.tokens for g in plan.minis[0]) for plan in plans]
    assert max(loads) - min(loads) <= max(g.tokens for g in groups)


def test_a_partial_batch_leaves_ranks_idle_rather_than_failing(groups):
    plans = batch.plan_step(groups[:1], 3, 2, Version(0, 3))
    assert [[len(mini) for mini in plan.minis] for plan in plans] == [[1], [0], [0]]
    with pytest.raises(ValueError, match="at least one group"):
        batch.plan_step([], 1, 1, Version(0, 0))


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("budget", [1, 100, 10_000])
def test_packing_keeps_every_trained_token_and_its_attributes(sequences, layout, budget):
    micros = batch.pack(sequences, budget, layout)
    assert sorted(i for m in micros for i in m.sequence_ids) == list(range(len(sequences)))
    for micro in micros:
        assert micro.computed_tokens <= budget or len(micro.sequence_ids) == 1
        for i in micro.sequence_ids:
            s, mine = sequences[i], micro.sequence == i
            assert micro.targets[mine].tolist() == s.tokens.tolist()
            flat = micro.input_ids.reshape(-1)
            context = flat[micro.predict[mine]].tolist()
            assert context == [*s.prompt_tokens[-1:].tolist(), *s.tokens[:-1].tolist()]
            positions = micro.position_ids.reshape(-1)[micro.predict[mine]].tolist()
            assert positions == [len(s.prompt_tokens) - 1 + t for t in range(len(s.tokens))]
            assert micro.is_teacher[mine].tolist() == [s.is_teacher] * len(s.tokens)
            np.testing.assert_array_equal(micro.logp_behave[mine].numpy(), s.logp_behave)
            assert set(micro.advantage[mine].tolist()) == {float(np.float32(s.advantage))}
            assert set(micro.group[mine].tolist()) == {s.group}
            assert set(micro.weight[mine].tolist()) == {float(np.float32(s.weight))}
            assert micro.reward[i] == s.reward if s.judged else torch.isnan(micro.reward[i])
            cached = np.full(len(s.tokens), np.nan, np.float32) if s.logp_ref is None else s.logp_ref
            np.testing.assert_array_equal(micro.logp_ref[mine].numpy(), cached)
            assert micro.group_size[s.group] == s.group_size
            assert micro.confidence[s.group] == pytest.approx(s.confidence)
        has = [sequences[i].logp_ref is not None or sequences[i].is_teacher for i in micro.sequence_ids]
        assert micro.has_ref == all(has)


def test_packed_rows_restart_positions_where_their_edges_are(sequences):
    micro = batch.pack(sequences, 10_000, "packed")[0]
    assert micro.input_ids.shape[0] == 1
    starts = (micro.position_ids[0] == 0).nonzero()[:, 0].tolist()
    assert [*starts, micro.computed_tokens] == micro.cu_seqlens.tolist()
    assert micro.max_length == max(len(s.prompt_tokens) + len(s.tokens) for s in sequences)


def test_like_lengths_share_a_micro_batch():
    """Sixty short and two long sequences: padding all to the long ones would cost seven times the tokens."""
    lengths = np.array(sorted([100] * 2 + [10] * 600, reverse=True))
    sizes = batch._padded_sizes(lengths, 10_000)
    assert sizes == [2, 600]
    assert sum(batch._padded_sizes(lengths, 300)) == len(lengths)
    assert all(
        width * size <= 300
        for width, size in zip(
            lengths[np.cumsum([0, *batch._padded_sizes(lengths, 300)[:-1]])],
            batch._padded_sizes(lengths, 300),
            strict=True,
        )
    )


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("budget", [1, 150, 10_000])
def test_whole_groups_stay_together_even_beyond_the_budget(sequences, layout, budget):
    micros = batch.pack(sequences, budget, layout, whole_groups=True)
    assert sorted(i for m in micros for i in m.sequence_ids) == list(range(len(sequences)))
    groups = [{sequences[i].group for i in m.sequence_ids} for m in micros]
    assert sum(map(len, groups)) == len({s.group for s in sequences}), "no group in two micro-batches"
    for micro, inside in zip(micros, groups, strict=True):
        assert micro.computed_tokens <= budget or len(inside) == 1
    assert len(micros) == (1 if budget == 10_000 else len(micros)) and (budget > 1 or len(micros) == 10)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_narrowing_keeps_the_context_of_the_positions_and_drops_other_sequences(sequences, layout):
    micro = batch.pack(sequences, 10_000, layout)[0]
    first, last = micro.sequence[0], micro.sequence[-1]
    positions = ((micro.sequence == first) | (micro.sequence == last)).nonzero()[1::2, 0]
    narrow = batch.narrowed(micro, positions)
    assert narrow.input_ids.reshape(-1)[narrow.predict].equal(micro.input_ids.reshape(-1)[micro.predict[positions]])
    assert narrow.position_ids.reshape(-1)[narrow.predict].equal(
        micro.position_ids.reshape(-1)[micro.predict[positions]]
    )
    assert narrow.targets.equal(micro.targets[positions])
    whole = [len(s.prompt_tokens) + len(s.tokens) for s in (sequences[first], sequences[last])]
    if layout == "packed":
        assert narrow.cu_seqlens.tolist() == [0, whole[0], sum(whole)] and narrow.computed_tokens == sum(whole)
    else:
        assert narrow.input_ids.shape == (2, micro.input_ids.shape[1])
    idle = batch.narrowed(micro, positions[:0])
    assert len(idle.predict) == 0 and idle.computed_tokens > 0, "a rank with nothing to ask computes all the same"


def test_work_is_shared_out_by_tokens():
    assert batch.share_out([5, 1, 4, 4], 2) == [[0, 1], [2, 3]]
    assert batch.share_out([3], 3) == [[0], [], []]


def test_environment_tokens_are_context_but_not_trained(sequences):
    s = sequences[0]
    sources = s.sources.copy()
    sources[: len(sources) // 2] = Source.ENVIRONMENT
    (micro,) = batch.pack([replace(s, sources=sources, group=0)], 1000)
    assert micro.trained_tokens == len(s.tokens) - len(sources) // 2
    assert micro.input_ids.numel() == len(s.prompt_tokens) + len(s.tokens)
    assert micro.targets.tolist() == s.tokens[len(sources) // 2 :].tolist()


def test_a_dummy_scores_something_but_is_marked():
    idle = batch.dummy()
    assert not idle.is_real
    assert idle.targets.numel() == idle.predict.numel() == 1
    assert idle.to("cpu").input_ids.shape == (1, 2)
    assert torch.isfinite(idle.temperature).all()
