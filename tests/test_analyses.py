"""Oracle coverage and diversity equal what full logits of one sequence at a time say."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hapo_async import metrics
from hapo_async.evaluation import analyses
from hapo_async.evaluation.analyses import Pair, Probe


@pytest.fixture(scope="module")
def probe(tiny_model: str) -> Probe:
    return Probe(tiny_model, batch_tokens=40, device="cpu", dtype=torch.float64)


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    return [Pair(rng.integers(0, 256, p).astype(np.int32), rng.integers(0, 256, t).astype(np.int32))
            for p, t in ((3, 9), (1, 1), (12, 4), (5, 30), (2, 9))]  # fmt: skip


def full_logits(probe: Probe, pair: Pair) -> torch.Tensor:
    """[T, V]: of the tokens that predict the answer, one sequence alone."""
    ids = torch.from_numpy(np.concatenate(pair)).long()[None]
    with torch.no_grad():
        return probe.model(ids).logits[0, len(pair.prompt) - 1 : -1].double()


def test_recall_is_the_share_of_tokens_among_the_likeliest(probe: Probe, pairs: list[Pair]) -> None:
    recall = analyses.oracle_recall(probe, pairs)
    for k in analyses.COVERAGE:
        hits = [
            int(token) in full_logits(probe, pair)[t].topk(k).indices.tolist()
            for pair in pairs
            for t, token in enumerate(pair.answer)
        ]
        assert recall[k] == pytest.approx(sum(hits) / len(hits))
    assert recall[1] <= recall[4] <= recall[8] <= recall[16]


def test_a_models_own_greedy_answer_is_covered_completely(probe: Probe) -> None:
    prompt = np.array([5, 6, 7], np.int32)
    tokens = probe.model.generate(torch.from_numpy(prompt).long()[None], max_new_tokens=8, do_sample=False)[0, 3:]
    assert analyses.oracle_recall(probe, [Pair(prompt, tokens.numpy())]) == dict.fromkeys(analyses.COVERAGE, 1.0)


def test_entropy_and_confidence_are_those_of_the_full_distribution(probe: Probe, pairs: list[Pair]) -> None:
    for scored, pair in zip(probe.score(pairs), pairs, strict=True):
        logp = full_logits(probe, pair).log_softmax(-1)
        assert torch.allclose(scored.entropy.double(), -(logp.exp() * logp).sum(-1), atol=1e-9)
        assert torch.allclose(scored.max_prob.double(), logp.exp().max(-1).values, atol=1e-9)


def test_similarity_is_the_mean_cosine_over_pairs() -> None:
    x = torch.randn(5, 7, dtype=torch.float64)
    cosines = [torch.cosine_similarity(x[i], x[j], 0) for i in range(5) for j in range(i)]
    assert analyses.similarity(x) == pytest.approx(float(torch.stack(cosines).mean()))
    assert analyses.similarity(x[:1].repeat(3, 1)) == pytest.approx(1.0)
    assert math.isnan(analyses.similarity(x[:1]))


def test_diversity_pools_hidden_states_over_the_answer(probe: Probe, pairs: list[Pair]) -> None:
    groups, texts = [pairs[:2], pairs[2:4], pairs[4:]], [["a b c d", "e f g h"], ["x", "x"], ["alone"]]
    found = analyses.diversity(probe, groups, texts)
    assert found["self_bleu"] == 0.5
    pooled = []
    for pair in pairs[:4]:
        ids = torch.from_numpy(np.concatenate(pair)).long()[None]
        with torch.no_grad():
            pooled.append(probe.model.get_decoder()(ids).last_hidden_state[0, len(pair.prompt) :].mean(0))
    cosine = torch.cosine_similarity
    expected = (cosine(pooled[0], pooled[1], 0) + cosine(pooled[2], pooled[3], 0)) / 2
    assert found["similarity"] == pytest.approx(float(expected), abs=1e-6)
    tokens = [e for scored in probe.score(pairs) for e in scored.entropy.tolist()]
    assert found["entropy"] == pytest.approx(np.mean(tokens))


def test_the_metrics_of_a_set_are_declared(probe: Probe, pairs: list[Pair]) -> None:
    answers = [{"text": "a b", "tokens": p.answer.tolist()} for p in pairs] + [{"text": "", "tokens": []}]
    found = analyses.of_set(probe, "s", pairs[:1], [{"prompt_tokens": [1, 2], "answers": answers}])
    assert len(found) == 8
    for name in found:
        metrics.lookup(name)
    assert analyses.of_set(probe, "s", [], []) == {}


def test_an_empty_prompt_or_answer_is_refused(probe: Probe) -> None:
    empty, one = np.zeros(0, np.int32), np.ones(1, np.int32)
    for pair in (Pair(empty, one), Pair(one, empty)):
        with pytest.raises(ValueError, match="empty"):
            probe.score([pair])
