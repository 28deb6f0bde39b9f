"""Groups that wait for the learner come back from a checkpoint as they were, without a pickle."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest

from hapo_async import group_files
from hapo_async.buffer import Ready
from hapo_async.sequences import Row, TrainGroup, materialise
from hapo_async.types import (
    Answer,
    Fault,
    GateDecision,
    GatedGroup,
    Group,
    GroupHeader,
    GroupKey,
    Judgement,
    Prompt,
    Segment,
    Source,
    Teacher,
    Verdict,
    Version,
    VersionSpan,
)

TEACHERS = (Teacher("no", np.arange(2, dtype=np.int32), "wrong"), Teacher("yes", np.arange(5, dtype=np.int32)))


def prompt(uid: str = "p") -> Prompt:
    return Prompt(uid, ({"role": "user", "content": "x"},), np.arange(3, dtype=np.int32), "1", teachers=TEACHERS)


def sampled(numbers: list[int], *cuts: tuple[str, int, int]) -> Segment:
    spans = tuple(VersionSpan(Version.parse(v), a, b) for v, a, b in cuts)
    logp = np.array([-n / 7 for n in numbers], np.float32)
    return Segment(Source.POLICY, np.array(numbers, np.int32), logp, spans)


def waiting(uid: str = "p", attempt: int = 2) -> tuple[Ready, Group]:
    """Two answers: one of three versions, around a tool's words, with a log-prob that is no number; one of none at all. The
    teacher stands in for the second."""
    tool = Segment(Source.ENVIRONMENT, np.array([9, 9], np.int32))
    first = sampled([4, 5, 6, 7], ("1.3", 0, 1), ("1.4", 1, 4))
    first.logp_behave[2] = np.nan
    answers = (
        Answer(0, (first, tool, sampled([8], ("2.4", 0, 1))), "stop", "ünï \ud800 \n {}"),
        Answer(1, (), "length", ""),
    )
    key = GroupKey(1, uid, attempt)
    group = Group(key, prompt(uid).tokens, answers, 0.7, "g1", 4711)
    judgements = (
        Judgement(Verdict.CORRECT, 1.0, {"format": 0.5}, 0.25, "fine"),
        Judgement(Verdict.TIMEOUT, None, {}, 3.0, "", Fault.JUDGE),
    )
    gate = GateDecision(True, 1, 1, 2 / 3, 1, 1, "", 0.8, 0.123456789)
    gated = GatedGroup(GroupHeader.of(group, 1.5), "a reference", prompt(uid), judgements, gate)
    rows = (
        Row(Source.POLICY, 0, 7, 1.0, True, 0.1 + 0.2, 1.0),
        Row(Source.TEACHER, 1, 5, 1.0, True, -1 / 3, 0.5),
    )
    train = TrainGroup(key, "a reference", 3, None, TEACHERS[1], rows, 2 / 3, 0.7)
    return Ready(gated, train), group


def taught(uid: str = "q") -> Ready:
    """Nothing was sampled: demonstrations alone."""
    key = GroupKey(0, uid, 0)
    gated = GatedGroup(
        GroupHeader(key, (), (), (), None, None, 3, "", 0.0), None, prompt(uid), (), GateDecision(False, 0, 0, 0.5)
    )
    rows = (Row(Source.TEACHER, 1, 5, 1.0, True, 1.0),)
    return Ready(gated, TrainGroup(key, None, 3, prompt(uid).tokens, TEACHERS[1], rows, 0.5, 1.0))


def same(a: object, b: object) -> bool:
    """Equality with arrays in it."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "__dataclass_fields__"):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in fields(a))
    return type(a) is type(b) and a == b


def test_groups_come_back_bit_by_bit(tmp_path):
    first, payload = waiting()
    second, other = waiting("r", attempt=0)
    group_files.write(tmp_path, [(first, payload), (taught(), None), (second, other)])
    put: list[Group] = []

    def keep(group: Group) -> str:
        put.append(group)
        return "a reference"

    found = group_files.read(tmp_path, {uid: prompt(uid) for uid in "pqr"}, keep)
    assert same(tuple(found), (first, taught(), second))
    assert same(tuple(put), (payload, other))
    before, after = materialise(first.train, payload), materialise(found[0].train, put[0])
    assert same(tuple(before), tuple(after)) and len(before) == 2, "what a learner rank makes of it"


def test_groups_of_prompts_that_are_gone_are_passed_over(tmp_path):
    (first, payload), (second, other) = waiting(), waiting("r")
    group_files.write(tmp_path, [(first, payload), (second, other)])
    (found,) = group_files.read(tmp_path, {"r": prompt("r")}, lambda group: "a reference")
    assert same(found, second)


def test_a_checkpoint_without_groups_holds_none(tmp_path):
    assert group_files.read(tmp_path, {}, lambda group: group) == []


def test_a_group_that_is_no_json_is_left_out(tmp_path):
    (first, payload), (second, other) = waiting(), waiting("r")
    odd = replace(first.gated, judgements=(Judgement(Verdict.WRONG, 0.0, {"x": object()}), first.gated.judgements[1]))
    group_files.write(tmp_path, [(replace(first, gated=odd), payload), (second, other)])
    (found,) = group_files.read(tmp_path, {uid: prompt(uid) for uid in "pr"}, lambda group: "a reference")
    assert same(found, second)


def test_files_that_do_not_belong_together_are_refused(tmp_path):
    from safetensors.numpy import save_file

    ready, payload = waiting()
    group_files.write(tmp_path, [(ready, payload)])
    for tokens in (6, 8):
        save_file(
            {"tokens": np.zeros(tokens, np.int32), "logp": np.zeros(5, np.float32)}, tmp_path / group_files.ARRAYS
        )
        with pytest.raises(ValueError, match="tokens"):
            group_files.read(tmp_path, {"p": prompt()}, lambda group: group)
    (tmp_path / group_files.ARRAYS).write_bytes(b"nothing")
    with pytest.raises(ValueError, match="safetensors"):
        group_files.read(tmp_path, {"p": prompt()}, lambda group: group)
