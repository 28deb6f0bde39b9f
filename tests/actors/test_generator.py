"""Both engines behind the generator actor: weights that change in flight, transactions, truncation, and clean ends.

The model is random with large weights: answers are long, their ends are random, and two versions differ clearly.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from hapo_async import lora, weights
from hapo_async.types import Answer, GroupKey, GroupRequest, Segment, Source, Version, VersionSpan
from tests.actors.serving import (
    LONGEST,
    collect,
    errors,
    get,
    install,
    logp,
    offer,
    random_model,
    requests,
    stats,
    stream,
    wait_for_tokens,
)


@pytest.fixture(scope="module", params=["transformers", "vllm"])
def served(request, generators):
    return generators.served(request.param)


# ---------------------------------------------------------------- weights


def test_updates_in_flight_drop_no_answer_and_each_token_knows_its_version(served):
    asked = requests("flight", 24)
    get(served, served.actor.submit.remote(asked))
    wait_for_tokens(served)
    first = install(served, 1)
    wait_for_tokens(served)
    install(served, 2)
    groups = collect(served, asked)

    assert first["version"] == "1.1" and first["bytes"] > 300_000 and first["pause_s"] > 0
    assert [g.key for g in groups] == [r.key for r in asked]
    assert all(len(g.answers) == 4 for g in groups)
    answers = [a for g in groups for a in g.answers]
    for answer in answers:
        versions = [s.version for s in answer.spans]
        assert versions == sorted(set(versions))
        assert [s.start for s in answer.spans] == [0, *(s.end for s in answer.spans[:-1])]
        assert answer.spans[-1].end == answer.length
    crossing = [g for g in groups if any(len(a.spans) > 1 for a in g.answers)]
    assert crossing
    assert errors(served, groups) < 1e-4
    swapped = SimpleNamespace(models={v: served.models[Version(0, 0)] for v in served.models})
    assert errors(swapped, crossing) > 0.1  # the check above can tell versions apart


def test_end_of_text_is_a_sampled_token_and_reasons_are_right(served):
    asked = requests("reasons", 12, max_tokens=60)
    get(served, served.actor.submit.remote(asked))
    groups = collect(served, asked)
    answers = [a for g in groups for a in g.answers]
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    for answer in answers:
        ends = np.flatnonzero(answer.tokens == 1)
        assert (answer.finish_reason == "stop") == bool(len(ends))
        assert answer.length == (ends[0] + 1 if len(ends) else 60)
        assert np.isfinite(answer.logp_behave).all()
        assert "<eos>" not in answer.text and "<pad>" not in answer.text
    assert all(a.text for a in answers if a.length > 10)
    assert errors(served, groups) < 1e-4


@pytest.mark.parametrize("damage", ["digest", "missing bucket", "wrong tensors"])
def test_a_failed_install_leaves_the_old_version_serving(served, damage):
    before = stats(served)["version"]
    manifest, data = stream(random_model(served.chain, 9), Version(2, 0))
    if damage == "digest":
        data[1] = data[1].copy()
        data[1][7] ^= 1
    elif damage == "missing bucket":
        data = data[:-1]
    else:
        manifest = weights.Manifest(Version(2, 0), manifest.buckets[:-1])
        data = data[:-1]
    asked = requests(damage, 4, max_tokens=40)
    get(served, served.actor.submit.remote(asked))
    with pytest.raises(served.ray.exceptions.RayTaskError, match=r"digest|never arrived"):
        get(served, served.actor.install.remote(offer(served, manifest, data)))
    assert stats(served)["version"] == before
    groups = collect(served, asked)
    assert {str(s.version) for g in groups for a in g.answers for s in a.spans} == {before}
    assert errors(served, groups) < 1e-4


def test_versions_never_go_back(served):
    install(served, 3)
    manifest, data = stream(served.models[Version(0, 0)], Version(0, 9))
    with pytest.raises(served.ray.exceptions.RayTaskError, match="older than the installed"):
        get(served, served.actor.install.remote(offer(served, manifest, data)))


def test_an_adapter_is_merged_into_the_weights_of_the_start(served):
    """Each is whole: the second one does not come on top of the first, nor of the full versions before."""
    sent, merged = [], []
    for seed in (1, 2):
        model = random_model(served.chain, 0)
        lora.attach(model, lora.Lora(4, 6.0, (), 0.0), seed)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.1)
        pieces = list(weights.pack(lora.streamed(model.named_parameters()), 10_000))
        manifest = weights.Manifest(Version(1, 3), tuple(b for b, _ in pieces), "adapter")
        sent.append(offer(served, manifest, [d for _, d in pieces]))
        merged.append(model.eval())
    half = weights.Manifest(Version(1, 3), manifest.buckets[:-1], "adapter")
    asked = requests("adapter", 6)
    get(served, served.actor.submit.remote(asked))
    wait_for_tokens(served)
    get(served, served.actor.install.remote(sent[0]))
    with pytest.raises(served.ray.exceptions.RayTaskError, match=r"its adapter is missing|half an adapter"):
        get(served, served.actor.install.remote(offer(served, half, [d for _, d in pieces[:-1]])))
    report = get(served, served.actor.install.remote(sent[1]))
    assert report["bytes"] == sum(len(d) for _, d in pieces) == 34816
    asked_after = requests("adapted", 6)
    get(served, served.actor.submit.remote(asked_after))
    collect(served, asked)
    served.models[Version(1, 3)] = merged[1]
    groups = collect(served, asked_after)
    assert errors(served, groups) < 1e-4
    for other in (merged[0], random_model(served.chain, 0)):
        assert errors(SimpleNamespace(models={Version(1, 3): other}), groups) > 0.1


# ---------------------------------------------------------------- requests


def test_greedy_answers_are_those_of_the_plain_model(served):
    (asked,) = requests("greedy", 1, n=1, temperature=0.0, max_tokens=20)
    get(served, served.actor.submit.remote([asked]))
    (group,) = collect(served, [asked])
    (answer,) = group.answers
    model = served.models[answer.spans[0].version]
    ids = torch.from_numpy(np.concatenate([asked.prompt_tokens, answer.tokens]).astype(np.int64))[None]
    assert np.array_equal(answer.tokens, model(ids).logits[0, len(asked.prompt_tokens) - 1 : -1].argmax(-1).numpy())
    assert errors(served, [group]) < 1e-4  # at temperature 1
    assert group.temperature == 1.0


def test_one_call_submits_and_collects(served):
    (asked,) = requests("alone", 1, n=2, max_tokens=9)
    header, group = get(served, list(served.actor.sample.remote(asked)))
    assert header.key == group.key == asked.key and header.lengths == tuple(a.length for a in group.answers)
    assert errors(served, [group]) < 1e-4
    with pytest.raises(served.ray.exceptions.RayTaskError, match="is not here"):  # handed out once
        get(served, served.actor.collect.remote(asked.key)[0])


def test_truncated_groups_come_back_as_they_are(served):
    asked = requests("truncate", 8, n=8)
    get(served, served.actor.submit.remote(asked))
    wait_for_tokens(served, 64)
    told = get(served, served.actor.truncate.remote([r.key for r in asked] + [GroupKey(5, "nobody", 0)]))
    groups = collect(served, asked)
    answers = [a for g in groups for a in g.answers]
    assert set(told) == {r.key for r in asked}
    for group in groups:  # an answer that had no token yet gets one; vLLM's may have run on by one meanwhile
        assert all(0 <= a.length - n <= 1 for a, n in zip(group.answers, told[group.key], strict=True))
    assert sum(map(sum, told.values())) >= 64
    assert all(1 <= a.length < LONGEST - 100 for a in answers)
    cut = [a for a in answers if a.tokens[-1] != 1]
    assert cut and {a.finish_reason for a in cut} == {"length"}
    assert errors(served, groups) < 1e-4


def test_aborted_groups_are_forgotten(served):
    asked = requests("abort", 6)
    get(served, served.actor.submit.remote(asked))
    waiting, _ = served.actor.collect.remote(asked[0].key)
    time.sleep(0.05)
    wait_for_tokens(served, 24)
    told = get(served, served.actor.abort.remote([r.key for r in asked[:5]] + [GroupKey(5, "nobody", 0)]))
    assert set(told) == {r.key for r in asked[:5]} and all(len(lengths) == 4 for lengths in told.values())
    assert max(map(max, told.values())) > 0
    with pytest.raises(served.ray.exceptions.RayTaskError, match="aborted"):
        get(served, waiting)
    with pytest.raises(served.ray.exceptions.RayTaskError, match="abort-1/0 is not here"):
        get(served, served.actor.collect.remote(asked[1].key)[0])
    assert len(collect(served, asked[5:])) == 1
    assert stats(served)["running_sequences"] == stats(served)["running_groups"] == 0


def test_tokens_are_counted_while_answers_are_being_made(served):
    (asked,) = requests("moving", 1, n=1, max_tokens=190)
    for attempt in range(20):  # until an answer is long
        asked = GroupRequest(asked.key._replace(attempt=attempt), asked.prompt_tokens, asked.sampling)
        before, seen = stats(served)["tokens"], set()
        get(served, served.actor.submit.remote([asked]))
        while (now := stats(served))["running_groups"]:
            seen.add(now["tokens"] - before)
        (group,) = collect(served, [asked])
        assert stats(served)["tokens"] - before == group.answers[0].length >= max(seen, default=0)
        if len(seen - {0, group.answers[0].length}) > 2:
            return
    pytest.fail("no count was ever seen between the first token and the last")


# ---------------------------------------------------------------- scores and sleep


def pairs(count: int) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(7)
    return [(rng.integers(2, 100, 3 + 9 * i), rng.integers(2, 100, 70 - 8 * i)) for i in range(count)]


def score_error(served, scored: tuple[Version, list[np.ndarray]]) -> float:
    version, found = scored
    worst = 0.0
    for (prompt, tokens), logp_T in zip(pairs(len(found)), found, strict=True):
        span = (VersionSpan(version, 0, len(tokens)),)
        answer = Answer(0, (Segment(Source.POLICY, tokens, np.zeros(len(tokens), np.float32), span),), "stop")
        assert logp_T.dtype == np.float32 and logp_T.shape == tokens.shape
        worst = max(worst, np.abs(logp(served.models[version], prompt, answer) - logp_T).max())
    return worst


def test_scores_equal_a_plain_forward_and_are_of_one_version_while_weights_change(served):
    asked = requests("scored", 12)
    get(served, served.actor.submit.remote(asked))
    repeated = [served.actor.score.remote(pairs(6)) for _ in range(2)]  # the second finds the first in a prefix cache
    install(served, 4)
    after = served.actor.score.remote(pairs(6))
    scored = get(served, [*repeated, after])
    assert scored[2][0] == Version(1, 4)
    assert max(score_error(served, s) for s in scored) < 1e-4
    assert score_error(served, (Version(0, 0), scored[2][1])) > 0.1  # the check above can tell versions apart
    assert errors(served, collect(served, asked)) < 1e-4
    too_long = [(np.arange(5), np.full(5000, 7))]
    with pytest.raises(served.ray.exceptions.RayTaskError, match=r"to be scored.*exceed"):
        get(served, served.actor.score.remote(too_long))


def test_a_sleeping_generator_takes_weights_and_no_work(served):
    asked = requests("asleep", 3)
    get(served, served.actor.submit.remote(asked))
    with pytest.raises(served.ray.exceptions.RayTaskError, match="groups are in"):
        get(served, served.actor.sleep.remote())
    collect(served, asked)
    get(served, served.actor.sleep.remote())
    install(served, 5)
    for call in (served.actor.submit.remote(requests("refused", 1)), served.actor.score.remote(pairs(1))):
        with pytest.raises(served.ray.exceptions.RayTaskError, match="asleep"):
            get(served, call)
    get(served, served.actor.wake.remote())
    get(served, served.actor.submit.remote(requests("awake", 2, max_tokens=30)))
    groups = collect(served, requests("awake", 2))
    assert {s.version for g in groups for a in g.answers for s in a.spans} == {Version(1, 5)}
    assert errors(served, groups) < 1e-4
    assert score_error(served, get(served, served.actor.score.remote(pairs(2)))) < 1e-4


def test_unknown_collected_and_repeated_keys_are_clear_errors(served):
    (asked,) = requests("once", 1, max_tokens=3)
    get(served, served.actor.submit.remote([asked]))
    with pytest.raises(served.ray.exceptions.RayTaskError, match="submitted twice"):
        get(served, served.actor.submit.remote([asked]))
    collect(served, [asked])
    for key in (asked.key, GroupKey(5, "nobody", 0)):
        with pytest.raises(served.ray.exceptions.RayTaskError, match="is not here"):
            get(served, served.actor.collect.remote(key)[0])
    with pytest.raises(served.ray.exceptions.RayTaskError, match=r"sampling\.max_tokens"):
        get(served, served.actor.submit.remote(requests("long", 1, max_tokens=5000)))


def test_a_prefix_is_continued_and_keeps_its_spans(served):
    tokens = np.arange(20, 30, dtype=np.int32)
    old = VersionSpan(Version(0, 0), 0, 10)
    prefix = Answer(1, (Segment(Source.POLICY, tokens, np.zeros(10, np.float32), (old,)),), "abort")
    (asked,) = requests("prefix", 1, n=2, max_tokens=25, prefixes=(prefix,))
    get(served, served.actor.submit.remote([asked]))
    (group,) = collect(served, [asked])
    fresh, resumed = group.answers
    assert fresh.spans[0].start == 0 and fresh.spans[0].version == resumed.spans[1].version
    assert np.array_equal(resumed.tokens[:10], tokens) and resumed.spans[0] == old
    assert 10 < resumed.length <= 25
    expected = logp(served.models[resumed.spans[1].version], asked.prompt_tokens, resumed)[10:]
    assert np.abs(expected - resumed.logp_behave[10:]).max() < 1e-4


# ---------------------------------------------------------------- processes


def test_nothing_listens_on_a_wildcard_address(served):
    family = [psutil.Process(served.pid), *psutil.Process(served.pid).children(recursive=True)]
    assert (len(family) > 1) == (served.engine == "vllm")
    listening = [c.laddr.ip for p in family for c in p.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening and not {"0.0.0.0", "::", "*"} & set(listening)
