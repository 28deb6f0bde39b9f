"""Continuous batching: log-probs equal a plain forward, whoever joins or leaves and whenever the weights change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hapo_async import sampler as module
from hapo_async.rows import Sampled
from hapo_async.sampler import Sampler
from hapo_async.slot_cache import ATTENTION
from hapo_async.types import Answer, GroupKey, GroupRequest, Sampling, Version

STOP = 47
FAMILIES = {
    "qwen2 with grouped and tied heads": (Qwen2Config, Qwen2ForCausalLM, 1, True),
    "llama with its own output head": (LlamaConfig, LlamaForCausalLM, 2, False),
}


def tiny(seed: int = 0, family: str = "qwen2 with grouped and tied heads", dtype: torch.dtype = torch.float32):
    """A random model. Its weights are large, so that its distributions are far from uniform and differ by seed."""
    config_class, model_class, kv_heads, tied = FAMILIES[family]
    config = config_class(
        vocab_size=48,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        max_position_embeddings=256,
        initializer_range=0.1,
    )
    torch.manual_seed(seed)
    return model_class._from_config(config, attn_implementation=ATTENTION).to(dtype).eval()


def request(uid: int, prompt: int = 6, prefixes: tuple[Answer, ...] = (), **sampling) -> GroupRequest:
    tokens = np.random.default_rng(uid).integers(0, STOP, prompt).astype(np.int32)
    return GroupRequest(GroupKey(0, str(uid), 0), tokens, Sampling(**{"n": 4, "max_tokens": 30, **sampling}), prefixes)


def run(sampler: Sampler, requests: list[GroupRequest], events: dict | None = None) -> dict[GroupKey, Sampled]:
    """Decodes until nothing is left; ``events`` are called before the step of their number."""
    sampler.add(requests)
    out: dict[GroupKey, Sampled] = {}
    step = 0
    while sampler.has_work:
        (events or {}).get(step, lambda: None)()
        out |= {s.request.key: s for s in sampler.step()}
        step += 1
    return out


@torch.no_grad()
def reference_logp(model, prompt: np.ndarray, answer: Answer, temperature: float = 1.0) -> np.ndarray:
    """float64 [T]: log-probs of an answer from one plain forward of the whole sequence, without any cache."""
    ids = torch.from_numpy(np.concatenate([prompt, answer.tokens]).astype(np.int64))[None]
    logp = torch.log_softmax(model(ids).logits[0].double() / temperature, -1)
    return logp[len(prompt) - 1 : -1].gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def worst(found: dict[GroupKey, Sampled], models: dict[int, torch.nn.Module]) -> float:
    """Largest error of a recorded log-prob against the model of that token's version."""
    errors = []
    for group in found.values():
        for answer in group.answers:
            steps = answer.version_steps
            for step in np.unique(steps):
                t = group.request.sampling.temperature
                expected = reference_logp(models[step], group.request.prompt_tokens, answer, t)
                errors.append(np.abs(expected - answer.logp_behave)[steps == step].max())
    return max(errors)


# ---------------------------------------------------------------- answers


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_equal_a_plain_forward_when_groups_come_and_go(family: str):
    model = tiny(family=family)
    sampler = Sampler(model, [STOP])
    late = [request(10, prompt=70, temperature=0.7), request(11, prompt=1), request(12, prompt=2, max_tokens=90)]
    events = {9: lambda: sampler.add(late), 30: lambda: sampler.add([request(13, prompt=140)])}
    found = run(sampler, [request(i, prompt=3 + 5 * i, max_tokens=20 + 3 * i) for i in range(5)], events)
    assert len(found) == 9
    assert worst(found, {0: model}) < 1e-4


def test_an_answer_ends_with_its_stop_token_or_at_its_limit():
    found = run(Sampler(tiny(), [STOP, 3]), [request(i) for i in range(8)])
    answers = [a for g in found.values() for a in g.answers]
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    for answer in answers:
        ends = np.flatnonzero(np.isin(answer.tokens, [STOP, 3]))
        assert (answer.finish_reason == "stop") == bool(len(ends))
        assert answer.length == (ends[0] + 1 if len(ends) else 30)
        assert np.isfinite(answer.logp_behave).all() and len(answer.logp_behave) == answer.length


def test_an_answer_does_not_depend_on_who_else_is_in_the_batch():
    alone = run(Sampler(tiny(), [STOP]), [request(3)])
    crowd = run(Sampler(tiny(), [STOP]), [request(i, prompt=6 + i) for i in (9, 8)] + [request(3)])
    for one, other in zip(alone[request(3).key].answers, crowd[request(3).key].answers, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
    assert len({a.tokens.tobytes() for a in alone[request(3).key].answers}) == 4


def test_greedy_answers_take_the_best_token_each_time():
    model = tiny()
    (group,) = run(Sampler(model, [STOP]), [request(1, n=1, temperature=0.0)]).values()
    ids = torch.from_numpy(np.concatenate([group.request.prompt_tokens, group.answers[0].tokens]).astype(np.int64))[
        None
    ]
    assert np.array_equal(group.answers[0].tokens, model(ids).logits[0, 5:-1].argmax(-1).numpy())


def test_bfloat16_models_sample_what_they_record():
    model = tiny(dtype=torch.bfloat16)
    assert worst(run(Sampler(model, [STOP]), [request(i) for i in range(3)]), {0: model}) < 0.2


def test_groups_wait_while_their_cache_would_not_fit(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(module.KV_BYTES, "cpu", 1)
    sampler = Sampler(tiny(), [STOP])
    sampler.add([request(i) for i in range(3)])
    sampler.step()
    assert (sampler.running, sampler.waiting, sampler.groups) == (4, 8, 3)
    assert len(run(sampler, [])) == 3


# ---------------------------------------------------------------- weights that change


def two_versions(recompute: bool) -> tuple[dict[GroupKey, Sampled], dict[int, torch.nn.Module]]:
    models = {0: tiny(0), 1: tiny(1)}
    sampler = Sampler(tiny(0), [STOP], recompute=recompute)
    events = {
        7: lambda: sampler.add([request(20, prompt=40)]),
        11: lambda: sampler.install(Version(0, 1), list(models[1].named_parameters())),
    }
    return run(sampler, [request(i, prompt=4 + 3 * i) for i in range(4)], events), models


@pytest.mark.parametrize("recompute", [True, False])
def test_a_swap_in_the_middle_drops_nothing_and_is_recorded_token_by_token(recompute: bool):
    found, _ = two_versions(recompute)
    answers = [a for g in found.values() for a in g.answers]
    assert len(answers) == 20
    crossing = [a for a in answers if len(a.spans) == 2]
    assert crossing
    for answer in crossing:
        (old, start, swap), (new, again, end) = answer.spans
        assert (old, new) == (Version(0, 0), Version(0, 1))
        assert (start, again, end) == (0, swap, answer.length)
        assert swap in (4, 11)


def test_after_recomputing_every_token_has_the_log_prob_of_its_own_version():
    found, models = two_versions(recompute=True)
    assert worst(found, models) < 1e-4
    assert worst(found, {0: models[1], 1: models[0]}) > 0.1


def test_a_kept_cache_leaves_the_tokens_before_the_swap_exact():
    found, models = two_versions(recompute=False)
    errors = {0: 0.0, 1: 0.0}
    for group in found.values():
        for answer in group.answers:
            for step in np.unique(answer.version_steps):
                expected = reference_logp(models[step], group.request.prompt_tokens, answer)
                error = np.abs(expected - answer.logp_behave)[answer.version_steps == step].max()
                errors[step] = max(errors[step], error)
    assert errors[0] < 1e-4
    assert errors[1] > 0.1  # new weights over old keys and values: a behaviour policy of its own, recorded as sampled


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pairs: pairs[1:], "never arrived"),
        (lambda pairs: [*pairs, ("model.foreign", torch.zeros(1))], "no parameter 'model.foreign'"),
        (lambda pairs: [(pairs[0][0], torch.zeros(2, 2)), *pairs[1:]], "has shape"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(change, message: str):
    sampler = Sampler(tiny(0), [STOP])
    with pytest.raises(ValueError, match=message):
        sampler.install(Version(0, 1), change(list(tiny(1).named_parameters())))
    assert sampler.version == Version(0, 0)
    assert all(torch.equal(p, q) for p, q in zip(sampler.model.parameters(), tiny(0).parameters(), strict=True))


# ---------------------------------------------------------------- truncate, abort, resume


def test_truncated_answers_keep_what_they_have():
    sampler = Sampler(tiny(), [STOP])
    requests = [request(i, max_tokens=200) for i in range(2)]
    found = run(sampler, requests, {10: lambda: sampler.truncate([requests[0].key, GroupKey(9, "unknown", 0)])})
    first, second = found[requests[0].key].answers, found[requests[1].key].answers
    assert max(a.length for a in first) == 10 < max(a.length for a in second)
    assert {a.finish_reason for a in first if a.length == 10} <= {"length", "stop"}
    assert all(a.spans[-1].end == a.length for a in first)


def test_truncate_and_abort_tell_how_long_the_answers_were():
    sampler, told = Sampler(tiny(), [STOP]), {}
    (done,) = run(sampler, [request(8, n=1, max_tokens=5)]).values()
    first, second = request(0, max_tokens=40), request(1, max_tokens=40)
    third = request(2, n=2, prefixes=(replace(done.answers[0], finish_reason="abort"),))
    keys = [first.key, second.key, GroupKey(9, "unknown", 0)]

    def stop() -> None:
        before = sampler.lengths(keys)
        assert sampler.truncate(keys[:1]) == {first.key: before[first.key]}
        sampler.add([third])
        told.update(sampler.abort([*keys[1:], third.key]))
        told[first.key] = before[first.key]

    found = run(sampler, [first, second], {7: stop})
    assert [a.length for a in found[first.key].answers] == list(told[first.key])
    assert max(told[second.key]) == 7 and told[third.key] == (done.answers[0].length, 0)
    assert set(told) == {first.key, second.key, third.key}


def test_a_group_that_has_not_started_is_not_cut_to_nothing():
    sampler = Sampler(tiny(), [STOP])
    (group,) = run(sampler, [request(0)], {0: lambda: sampler.truncate([request(0).key])}).values()
    (whole,) = run(Sampler(tiny(), [STOP]), [request(0)]).values()
    assert [a.length for a in group.answers] == [a.length for a in whole.answers]


def test_aborted_groups_vanish_and_the_others_are_untouched():
    model, sampler = tiny(), Sampler(tiny(), [STOP])
    requests = [request(i, max_tokens=60) for i in range(3)]
    found = run(sampler, requests, {5: lambda: sampler.abort([requests[1].key])})
    assert set(found) == {requests[0].key, requests[2].key}
    assert sampler.running == sampler.groups == 0
    assert worst(found, {0: model}) < 1e-4


def test_a_prefix_is_continued_where_it_stopped():
    model = tiny()
    (whole,) = run(Sampler(model, [STOP]), [request(0, max_tokens=40)]).values()
    prefixes = tuple(
        Answer(
            a.index,
            (
                module.Segment(
                    module.Source.POLICY, a.tokens[:9], a.logp_behave[:9], (module.VersionSpan(Version(0, 0), 0, 9),)
                ),
            ),
            "abort",
        )
        for a in whole.answers
        if a.length > 9
    )
    assert prefixes
    (resumed,) = run(
        Sampler(model, [STOP], version=Version(0, 3)), [request(0, max_tokens=40, prefixes=prefixes)]
    ).values()
    for before, after in zip(whole.answers, resumed.answers, strict=True):
        assert np.array_equal(before.tokens, after.tokens)
        if before.length > 9:
            assert after.spans == ((Version(0, 0), 0, 9), (Version(0, 3), 9, before.length))
    assert worst({whole.request.key: resumed}, {0: model, 3: model}) < 1e-4


def test_finished_prefixes_come_back_as_they_are():
    (done,) = run(Sampler(tiny(), [STOP]), [request(0, n=1)]).values()
    (again,) = run(Sampler(tiny(), [STOP]), [request(0, n=1, prefixes=done.answers)]).values()
    assert again.answers == done.answers


@pytest.mark.parametrize(
    ("bad", "message"),
    [(request(0, prompt=0), "empty"), (request(0, max_tokens=300), "256 positions"), (request(1), "already")],
)
def test_a_refused_group_refuses_the_whole_submission(bad: GroupRequest, message: str):
    sampler = Sampler(tiny(), [STOP])
    sampler.add([request(1)])
    with pytest.raises(ValueError, match=message):
        sampler.add([request(2), bad])
    assert sampler.groups == 1


# ---------------------------------------------------------------- scoring and sleeping


def test_scoring_in_between_changes_no_answer_and_speaks_of_the_weights_as_they_are():
    models, scored = {0: tiny(0), 1: tiny(1)}, {}
    sampler = Sampler(tiny(0), [STOP])
    pair = (request(5).prompt_tokens, np.arange(20, dtype=np.int32))

    def score() -> None:
        scored[sampler.version.step] = sampler.score([pair])[0]

    swap = lambda: sampler.install(Version(0, 1), list(models[1].named_parameters()))  # noqa: E731
    found = run(sampler, [request(i) for i in range(3)], {4: score, 11: swap, 12: score})
    assert worst(found, models) < 1e-4
    for step, logp in scored.items():
        expected = reference_logp(models[step], pair[0], policy_answer(pair[1]))
        assert np.abs(expected - logp).max() < 1e-4


def policy_answer(tokens: np.ndarray) -> Answer:
    span = module.VersionSpan(Version(0, 0), 0, len(tokens))
    return Answer(
        0, (module.Segment(module.Source.POLICY, tokens, np.zeros(len(tokens), np.float32), (span,)),), "stop"
    )


@pytest.mark.parametrize(("prompt", "tokens", "message"), [(0, 3, "empty"), (200, 57, "256 positions")])
def test_what_cannot_be_scored_is_refused(prompt: int, tokens: int, message: str):
    with pytest.raises(ValueError, match=message):
        Sampler(tiny(), [STOP]).score([(np.zeros(prompt, np.int32), np.zeros(tokens, np.int32))])


def test_a_sleeping_sampler_has_given_its_cache_back_and_serves_on_after_waking():
    sampler = Sampler(tiny(), [STOP])
    run(sampler, [request(i, prompt=90) for i in range(6)])
    assert sampler._cache.slots[0].is_initialized
    sampler.sleep()
    assert not sampler._cache.slots[0].is_initialized
    for call in (lambda: sampler.add([request(7)]), lambda: sampler.score([])):
        with pytest.raises(ValueError, match="asleep"):
            call()
    sampler.install(Version(0, 1), list(tiny(1).named_parameters()))
    sampler.wake()
    assert worst(run(sampler, [request(7)]), {1: tiny(1)}) < 1e-4


def test_a_sampler_at_work_does_not_fall_asleep():
    sampler = Sampler(tiny(), [STOP])
    sampler.add([request(0)])
    with pytest.raises(ValueError, match="1 groups are in work"):
        sampler.sleep()
    assert len(run(sampler, [])) == 1
