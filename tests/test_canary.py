"""The canary's sequences and its comparison: bounded, sensitive to wrong weights, deaf to tokens that nobody samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hapo_async import canary
from hapo_async.types import Prompt, Teacher


def prompt(number: int, length: int = 9, solution: int = 0) -> Prompt:
    tokens = np.full(length, number, np.int32)
    teachers = (Teacher("", np.arange(solution, dtype=np.int32)),) if solution else ()
    return Prompt(f"p{number}", ({"role": "user", "content": "x"},), tokens, "1", teachers=teachers)


def numbers(pairs: list) -> list[int]:
    return [int(context[0]) for context, _ in pairs]


# ---------------------------------------------------------------- choosing


def test_solutions_are_preferred_and_spread_over_the_data():
    prompts = [prompt(i, solution=20 if i % 2 else 0) for i in range(64)]
    pairs = canary.choose(prompts, 1000)
    assert numbers(pairs) == [1, 9, 17, 25, 33, 41, 49, 57]
    assert all(len(context) == 9 and np.array_equal(tokens, np.arange(20)) for context, tokens in pairs)


def test_without_solutions_the_prompts_themselves_are_scored():
    pairs = canary.choose([prompt(0, length=1), prompt(1), prompt(2)], 1000)
    assert [(len(c), len(t)) for c, t in pairs] == [(1, 8), (1, 8)]
    assert canary.choose([prompt(0, length=1)], 1000) == []


def test_sequences_are_bounded_and_leave_room_for_one_sampled_token():
    for maximum, length, solution in ((4, 9, 20), (10_000, 900, 5000), (0, 5000, 7), (10_000, 5000, 0)):
        for context, tokens in canary.choose([prompt(1, length, solution)], maximum):
            assert len(context) + len(tokens) <= canary.LONGEST
            assert len(context) >= 1 and len(tokens) >= 1
            assert len(tokens) <= max(maximum, 0) or len(context) == 1  # a prompt scored by itself fits by itself


# ---------------------------------------------------------------- comparing


def kl(log_p, log_q) -> float:
    return canary.compare([np.asarray(log_p, np.float32)], [np.asarray(log_q, np.float32)]).kl


def test_over_the_learners_own_samples_the_estimate_is_the_divergence():
    rng = torch.Generator().manual_seed(0)
    log_p, log_q = torch.log_softmax(torch.randn(2, 50, generator=rng, dtype=torch.float64), -1)
    sampled = torch.multinomial(log_p.exp(), 200_000, replacement=True, generator=rng)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert kl(log_p[sampled].numpy(), log_q[sampled].numpy()) == pytest.approx(exact, rel=0.02)


def test_equal_scores_are_no_gap_and_one_token_shows():
    assert canary.compare([np.array([-1.0, -3.0])], [np.array([-1.0, -3.0])]) == canary.Gap(0.0, 0.0)
    gap = canary.compare([np.array([-1.0]), np.array([-3.0])], [np.array([-1.0]), np.array([-5.5])])
    assert gap.max_diff == 2.5 and gap.kl == pytest.approx((np.exp(-2.5) + 1.5) / 2)


def test_bfloat16_rounding_stays_below_the_default_limit_and_wrong_weights_do_not():
    rng = np.random.default_rng(0)
    sampled = np.log(rng.beta(2, 0.5, 4000))
    rounded = rng.uniform(-0.075, 0.075, 4000)  # the largest seen between two bf16 engines
    assert kl(sampled, sampled + rounded) < 0.003
    assert kl(sampled, rng.permutation(sampled)) > 0.1


def test_tokens_that_neither_would_sample_are_left_out_unless_there_are_no_others():
    likely, unlikely = np.full(100, -0.5), np.full(100, -15.0)
    noise = np.tile([1.5, -1.5], 50)  # coarse rounding of small numbers
    assert kl(np.concatenate([likely, unlikely + noise]), np.concatenate([likely, unlikely])) == 0.0
    assert kl(unlikely + noise, unlikely) > 0.5
    assert kl(likely, unlikely) > 10 and kl(unlikely, likely) > 10  # what one of them would sample counts


def test_log_probs_that_are_no_numbers_are_an_infinite_gap_and_impossible_tokens_a_large_one():
    assert kl([-1.0, np.nan], [-1.0, -1.0]) == kl([-1.0, -1.0], [np.nan, -1.0]) == np.inf
    assert kl([-1.0, -np.inf], [-1.0, -np.inf]) == 0.0
    gap = canary.compare([np.array([-1.0, -1.0])], [np.array([-1.0, -np.inf])])
    assert gap.kl == pytest.approx(9.5) and gap.max_diff == np.inf


def test_scores_of_other_sequences_are_refused():
    for other in ([], [np.zeros(3)], [np.zeros(2), np.zeros(2)]):
        with pytest.raises(ValueError, match="do not match"):
            canary.compare([np.zeros(2)], other)
    with pytest.raises(ValueError, match="no token"):
        canary.compare([np.zeros(0)], [np.zeros(0)])
