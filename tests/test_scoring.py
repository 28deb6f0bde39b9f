"""Scoring given tokens equals a plain forward, however sequences are batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hapo_async import scoring
from tests.test_sampler import FAMILIES, tiny


def pairs(*lengths: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [tuple(rng.integers(0, 48, n).astype(np.int32) for n in pair) for pair in lengths]


@torch.no_grad()
def plain(model, pair) -> np.ndarray:
    ids = torch.from_numpy(np.concatenate(pair).astype(np.int64))[None]
    logp = torch.log_softmax(model(ids).logits[0].double(), -1)[:-1].gather(1, ids[0, 1:, None])[:, 0]
    return logp[len(pair[0]) - 1 :].numpy()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("room", [1, 48 * 40, 1 << 27])
def test_scores_equal_a_plain_forward(family: str, room: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(scoring, "_LOGITS", room)
    monkeypatch.setattr(scoring, "_WIDE_LOGITS", 48 * 7)
    model = tiny(family=family)
    asked = pairs((3, 9), (60, 1), (1, 70), (17, 0), (5, 5), (1, 1))
    found = scoring.score(model, asked)
    assert [f.dtype for f in found] == [np.float32] * 6
    for pair, logp in zip(asked, found, strict=True):
        expected = plain(model, pair)
        assert logp.shape == expected.shape
        assert np.abs(logp - expected).max(initial=0.0) < 1e-5


def test_no_forward_takes_more_than_its_share(monkeypatch: pytest.MonkeyPatch):
    model, shapes = tiny(), []
    monkeypatch.setattr(scoring, "_LOGITS", 48 * 64)
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    scoring.score(model, pairs(*[(4, 12)] * 9, (4, 100)))
    hook.remove()
    assert [tuple(s) for s in shapes] == [(4, 16), (4, 16), (1, 16), (1, 104)]
