"""The verifier actor judges groups and leaves no process behind."""

import time
from pathlib import Path

import numpy as np
import pytest

from hapo_async.types import Answer, Fault, Group, GroupKey, Segment, Source, Verdict, Version, VersionSpan


def group_of(*texts: str) -> Group:
    """A group whose answers carry these texts."""
    span = (VersionSpan(Version(0, 0), 0, 1),)
    segment = Segment(Source.POLICY, np.zeros(1, np.int32), np.zeros(1, np.float32), span)
    answers = tuple(Answer(n, (segment,), "stop", text) for n, text in enumerate(texts))
    return Group(GroupKey(0, "a", 0), np.zeros(1, np.int32), answers, 1.0, "g0", 1)


def gone(pids: list[int], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(Path(f"/proc/{p}/cmdline").exists() and Path(f"/proc/{p}/cmdline").read_text() for p in pids):
            return True
        time.sleep(0.05)
    return False


@pytest.fixture
def actor(ray_session):
    from actors.verifier import VerifierActor

    handle = VerifierActor.remote("auto", 2, 30.0)
    yield handle
    ray_session.kill(handle)


def test_groups_are_judged_by_reference_and_in_order(ray_session, actor):
    ready = ray_session.get(actor.ready.remote(), timeout=120)
    assert ready["pid"] > 0
    reference = ray_session.put(group_of(r"\boxed{1}", "A: 2", "", r"\boxed{2}"))
    out = ray_session.get(actor.judge.remote(reference, "which?", 2), timeout=120)
    assert [j.verdict for j in out] == [Verdict.WRONG, Verdict.CORRECT, Verdict.UNPARSEABLE, Verdict.CORRECT]
    assert [j.reward for j in out] == [0.0, 1.0, 0.0, 1.0]
    assert ray_session.get(actor.stats.remote(), timeout=60)["judged"] == 4


def test_each_group_may_name_its_verifier(ray_session, actor):
    judged = actor.judge.remote(group_of("A: 2"), "", 2, "boxed")
    assert [j.verdict for j in ray_session.get(judged, timeout=120)] == [Verdict.UNPARSEABLE]


def test_an_answer_that_kills_its_worker_is_charged_and_a_truth_that_is_none_is_masked(ray_session, actor):
    judging = actor.judge.remote(group_of("fine", "abort", "fine"), "", "t", "tests.verify_plugins:naughty")
    assert [j.reward for j in ray_session.get(judging, timeout=120)] == [1.0, 0.0, 1.0]
    masked = ray_session.get(actor.judge.remote(group_of(r"\boxed{1}"), "", None), timeout=120)
    assert [(j.reward, j.fault) for j in masked] == [(None, Fault.PROMPT)]
    stats = ray_session.get(actor.stats.remote(), timeout=60)
    assert (stats["judged"], stats["charged"], stats["masked"]) == (4, 1, 1) and stats["p99_s"] >= stats["p50_s"]


def test_it_says_how_much_waits_while_it_judges(ray_session, actor, tmp_path):
    file = tmp_path / "go"
    judging = actor.judge.remote(group_of("x", "y"), "", str(file), "tests.rewards:patient")
    deadline = time.monotonic() + 60
    while ray_session.get(actor.stats.remote(), timeout=60)["waiting"] != 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    stats = ray_session.get(actor.stats.remote(), timeout=60)
    assert (stats["waiting"], stats["judged"]) == (2, 0)
    file.touch()
    assert [j.reward for j in ray_session.get(judging, timeout=120)] == [1.0, 1.0]
    stats = ray_session.get(actor.stats.remote(), timeout=60)
    assert (stats["waiting"], stats["judged"]) == (0, 2)


def test_workers_die_with_a_killed_actor(ray_session):
    from actors.verifier import VerifierActor

    handle = VerifierActor.remote("auto", 2, 30.0)
    ray_session.get(handle.ready.remote(), timeout=120)
    pids = ray_session.get(handle.stats.remote(), timeout=60)["worker_pids"]
    assert len(pids) == 2 and not gone(pids, 0.2)
    ray_session.kill(handle)
    assert gone(pids)


def test_close_ends_the_workers_and_an_unknown_verifier_is_refused(ray_session, actor):
    with pytest.raises(Exception, match="nowhere_module"):
        ray_session.get(actor.judge.remote(group_of("x"), "", 1, "nowhere_module:f"), timeout=120)
    ray_session.get(actor.ready.remote(), timeout=120)
    pids = ray_session.get(actor.stats.remote(), timeout=60)["worker_pids"]
    ray_session.get(actor.close.remote(), timeout=60)
    assert len(pids) >= 2 and gone(pids)
