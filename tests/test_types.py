"""What travels refuses to be inconsistent."""

import numpy as np
import pytest

from hapo_async.types import (
    Answer,
    Fault,
    Group,
    GroupHeader,
    GroupKey,
    Judgement,
    Segment,
    Source,
    Verdict,
    Version,
    VersionSpan,
)


def policy(tokens, spans):
    spans = tuple(VersionSpan(Version(1, v), a, b) for v, a, b in spans)
    return Segment(Source.POLICY, np.array(tokens, np.int32), np.full(len(tokens), -0.5, np.float32), spans)


def test_only_policy_tokens_have_a_behaviour_log_prob():
    with pytest.raises(ValueError, match="TEACHER segment must not"):
        Segment(Source.TEACHER, np.zeros(2, np.int32), np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="POLICY segment must"):
        Segment(Source.POLICY, np.zeros(2, np.int32))


@pytest.mark.parametrize("spans", [[], [(0, 0, 1)], [(0, 0, 1), (1, 2, 3)], [(0, 1, 3)], [(0, 0, 4)]])
def test_version_spans_must_tile_the_segment(spans):
    with pytest.raises(ValueError, match="tile"):
        policy([5, 6, 7], spans)


def test_an_answer_of_several_segments_keeps_positions_sources_and_versions():
    answer = Answer(
        0,
        (
            policy([1, 2], [(3, 0, 2)]),
            Segment(Source.ENVIRONMENT, np.array([9], np.int32)),
            policy([4, 5], [(3, 0, 1), (4, 1, 2)]),
        ),
        "stop",
    )
    assert answer.tokens.tolist() == [1, 2, 9, 4, 5]
    assert answer.sources.tolist() == [1, 1, 3, 1, 1]
    assert answer.version_steps.tolist() == [3, 3, -1, 3, 4]
    assert np.isnan(answer.logp_behave).tolist() == [False, False, True, False, False]
    assert [(s.version.step, s.start, s.end) for s in answer.spans] == [(3, 0, 2), (3, 3, 4), (4, 4, 5)]


def test_a_header_knows_the_oldest_and_newest_token():
    answers = (
        Answer(0, (policy([1], [(7, 0, 1)]),), "stop"),
        Answer(1, (policy([1, 2], [(5, 0, 1), (6, 1, 2)]),), "length"),
    )
    header = GroupHeader.of(Group(GroupKey(0, "a", 0), np.zeros(3, np.int32), answers, 1.0, "g", 1), 0.1)
    assert (header.oldest, header.newest) == (Version(1, 5), Version(1, 7))
    assert header.answer_steps == (7, 5)
    assert header.lengths == (1, 2)


def test_versions_order_by_incarnation_first():
    assert Version(2, 0) > Version(1, 99)
    assert Version.parse(str(Version(3, 14))) == Version(3, 14)


@pytest.mark.parametrize("verdict", [Verdict.TIMEOUT, Verdict.OOM, Verdict.CRASH])
def test_a_failure_of_the_judge_is_masked_or_charged_and_never_more(verdict):
    masked, charged = Judgement(verdict, None), Judgement(verdict, 0.0, fault=Fault.ANSWER)
    assert not masked.is_judged and masked.tally == (verdict, "masked")
    assert charged.is_judged and charged.tally == (verdict, "charged")
    with pytest.raises(ValueError, match="cannot carry"):
        Judgement(verdict, 1.0)
    with pytest.raises(ValueError, match="cannot carry"):
        Judgement(Verdict.WRONG, None)
