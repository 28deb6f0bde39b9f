"""What both engines do with weights that arrive in place, with torn ones, and with groups that move to another generator.
vLLM also with two ranks."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from hapo_async import weights
from hapo_async.types import Group, GroupRequest, Version
from tests.actors.serving import (
    KINDS,
    collect,
    errors,
    get,
    random_model,
    requests,
    stats,
    wait_for_tokens,
)


@pytest.fixture(scope="module", params=KINDS)
def served(request, generators):
    return generators.served(request.param)


def pieces(served, step: int) -> list[tuple[weights.Bucket, np.ndarray]]:
    """Version 3.``step`` in buckets. Its layers straddle them."""
    served.models[Version(3, step)] = random_model(served.chain, step)
    found = list(weights.pack(served.models[Version(3, step)].named_parameters(), 50_000))
    assert len(found) > 4
    return found


def pour(served, step: int, sent: list, fails: bool = False) -> float:
    return get(served, served.actor.pour.remote(Version(3, step), sent, fails))


def versions(groups: list[Group]) -> set[Version]:
    return {span.version for g in groups for a in g.answers for span in a.spans}


# ---------------------------------------------------------------- weights


def test_weights_can_be_written_in_place_while_answers_run(served):
    asked = requests("in place", 4)
    get(served, served.actor.submit.remote(asked))
    wait_for_tokens(served)
    assert pour(served, 1, pieces(served, 1)) > 0
    groups = collect(served, asked)
    assert Version(3, 1) in versions(groups)
    assert errors(served, groups) < 1e-4


def test_torn_weights_sample_nothing_and_are_healed_by_a_full_update(served):
    before = stats(served)["version"]
    kept, dropped, late = requests("torn", 3)
    get(served, served.actor.submit.remote([kept, dropped]))
    wait_for_tokens(served)
    sent = pieces(served, 2000)
    for half in (sent[:3], sent[1:4]):  # the second failure finds layers that the first has begun
        with pytest.raises(served.ray.exceptions.RayTaskError, match="torn until a full update"):
            pour(served, 2000, half, fails=True)
    with pytest.raises(served.ray.exceptions.RayTaskError, match="never arrived"):
        pour(served, 2000, sent[:-1])
    get(served, served.actor.submit.remote([late]))
    get(served, served.actor.abort.remote([dropped.key]))
    with pytest.raises(served.ray.exceptions.RayTaskError, match="torn"):
        get(served, served.actor.score.remote([(kept.prompt_tokens, np.arange(5))]))
    torn = stats(served)
    time.sleep(0.2)
    assert (torn["torn"], torn["version"], torn["tokens"]) == (1.0, before, stats(served)["tokens"])
    pour(served, 2001, pieces(served, 2001))
    assert stats(served)["torn"] == 0.0
    groups = collect(served, [kept, late])
    assert versions(groups[1:]) == {Version(3, 2001)} <= versions(groups[:1])
    assert errors(served, groups) < 1e-4
    with pytest.raises(served.ray.exceptions.RayTaskError, match="is not here"):
        get(served, served.actor.collect.remote(dropped.key)[0])


# ---------------------------------------------------------------- groups


def resumed(group: Group, old: GroupRequest) -> GroupRequest:
    return replace(old, key=old.key._replace(attempt=7), prefixes=group.answers)


@pytest.mark.parametrize(
    ("source", "target"),
    [("vllm", "vllm of two ranks"), ("vllm", "transformers"), ("transformers", "vllm of two ranks")],
)
def test_groups_move_to_another_generator_with_what_they_have(generators, source: str, target: str):
    one, other = generators.served(source), generators.served(target)
    asked = requests(f"{source} to {target}", 4)
    short = requests("short", 1, max_tokens=1)
    get(one, one.actor.submit.remote([*asked, *short]))
    wait_for_tokens(one, 60)
    waiting, _ = one.actor.collect.remote(asked[0].key)
    time.sleep(0.05)
    moved = get(one, one.actor.hand_over.remote([r.key for r in (*asked, *short)]))
    with pytest.raises(one.ray.exceptions.RayTaskError, match="handed over"):
        get(one, waiting)
    now = stats(one)
    assert now["running_groups"] == now["running_sequences"] == 0
    groups = [group for _, group in moved]
    assert [h.key for h, _ in moved] == [r.key for r in (*asked, *short)]
    assert [h.lengths for h, _ in moved] == [tuple(a.length for a in g.answers) for g in groups]
    assert {a.finish_reason for a in groups[-1].answers} <= {"stop", "length"}
    reasons = {a.finish_reason for g in groups[:-1] for a in g.answers}
    assert "abort" in reasons and reasons <= {"abort", "stop"}
    assert errors(one, groups) < 1e-4

    again = [resumed(g, r) for g, r in zip(groups, (*asked, *short), strict=True)]
    get(other, other.actor.submit.remote(again))
    ended = collect(other, again)
    both = replace_models(one, other)
    for before, after in zip(groups, ended, strict=True):
        for prefix, answer in zip(before.answers, after.answers, strict=True):
            assert np.array_equal(prefix.tokens, answer.tokens[: prefix.length])
            assert np.array_equal(prefix.logp_behave, answer.logp_behave[: prefix.length])
            assert answer.spans[: len(prefix.spans)] == prefix.spans
            assert (answer.length == prefix.length) == (prefix.finish_reason != "abort")
            assert answer.finish_reason in ("stop", "length") and answer.length <= 200
    assert errors(both, ended) < 1e-4


def replace_models(one, other):
    """Both generators' versions; where both have one of the same name, it is the same model."""
    merged = type(one)(**vars(one))
    merged.models = one.models | other.models
    return merged


@pytest.mark.parametrize("how", ["abort", "hand_over", "truncate"])
def test_a_group_that_is_ended_while_it_is_submitted_leaves_nothing_running(served, how: str):
    for pauses in range(8):
        asked = requests(f"{how} {pauses}", 3, n=2, max_tokens=60)
        found = get(served, served.actor.race.remote(asked, how, pauses))
        assert len(found) in (0, 3)
        if how == "truncate":
            groups = collect(served, asked)
            assert errors(served, groups) < 1e-4
            if pauses and served.engine == "vllm":  # the other leaves groups alone that have not started
                assert max(a.length for g in groups for a in g.answers) < 60
        if how == "hand_over" and found:
            assert [s.request.key for s in found] == [r.key for r in asked]
        if how != "truncate" and not found:
            get(served, served.actor.abort.remote([r.key for r in asked]))  # it came before the groups
        now = stats(served)
        assert now["running_groups"] == now["running_sequences"] == 0
    before = stats(served)["tokens"]
    time.sleep(0.2)
    assert stats(served)["tokens"] == before
