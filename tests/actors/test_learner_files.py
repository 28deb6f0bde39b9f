"""What learner ranks write beside training: exactly the step boundary that was captured, or an error and nothing worse."""

from __future__ import annotations

import asyncio
import resource
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.host_copies import check, load, to_host
from actors.learner import LearnerRank, WriteFailed
from hapo_async import checkpoint
from hapo_async.errors import RunError
from hapo_async.types import Version
from tests import samples_learn
from tests.actors.test_learner import PARTITION_ALL, _plans, _start, _weights

pytest_plugins = ["tests.learner_fixtures"]


class LimitedRank(LearnerRank):
    """A rank whose disk can be made to take only so much."""

    def limit_files(self, size: int) -> None:
        """Bytes that a file of this process may have; 0 lifts the limit."""
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size or most, most))


@pytest.fixture(scope="module")
def steps():
    return [samples_learn.tasks(8, 4, seed=step) for step in range(3)]


@pytest.fixture(scope="module")
def learner(ray_session, model):
    config = samples_learn.config(model, "hapo", ranks=2, zero=PARTITION_ALL)
    started = asyncio.run(_start(config, model, LimitedRank))
    yield started
    asyncio.run(started.close())


async def train(ray, learner, steps, first: int, last: int) -> list[dict[str, float]]:
    return [await learner.step(_plans(ray, learner.config, steps[i], i)) for i in range(first, last)]


def test_what_is_written_is_the_boundary_that_was_captured(learner, ray_session, steps, tmp_path):
    async def scenario():
        await train(ray_session, learner, steps, 0, 1)
        await learner.capture(tmp_path)
        assert list(tmp_path.iterdir()) == []
        before = await _weights(learner, Version(0, 1))
        writing = asyncio.create_task(learner.write())
        (first,) = await train(ray_session, learner, steps, 1, 2)
        files = await writing
        after = await _weights(learner, Version(0, 2))
        assert not learner.is_writing and any(not torch.equal(before[name], after[name]) for name in before)
        assert files == {
            p.relative_to(tmp_path).as_posix(): checkpoint.describe(p) for p in tmp_path.rglob("*") if p.is_file()
        }
        await learner.load(tmp_path)
        loaded = await _weights(learner, Version(0, 3))
        (again,) = await train(ray_session, learner, steps, 1, 2)
        return before, after, loaded, await _weights(learner, Version(0, 4)), first, again

    before, after, loaded, once_more, first, again = asyncio.run(scenario())
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).named_parameters())
    for name in before:
        assert torch.equal(saved[name], before[name]) and torch.equal(loaded[name], before[name]), name
        assert torch.equal(once_more[name], after[name]), "moments, schedule and random states too"
    for name in ("loss/value", "policy/grad_norm", "policy/lr", "policy/entropy"):
        assert first[name] == again[name], name
    for path in (tmp_path / "state").rglob("*.pt"):
        load(path)
        check(path)


def test_a_rank_that_cannot_write_says_why_and_trains_on(learner, ray_session, steps, tmp_path):
    limited = learner.ranks[1]
    for size in (50_000, 0):
        ray_session.get(limited.limit_files.remote(size))
        folder = tmp_path / str(size)
        if size:
            with pytest.raises(WriteFailed, match=r"learner rank 1: .*MB free") as failed:
                asyncio.run(learner.save(folder))
            assert not failed.value.lost
        else:
            asyncio.run(learner.save(folder))
            assert (folder / "state" / "rank1.pt").exists()
        (measured,) = asyncio.run(train(ray_session, learner, steps, 2, 3))
        assert measured["skipped"] == 0


def test_a_file_that_unpickles_more_than_tensors_is_refused(tmp_path):
    torch.save({"weights": torch.ones(2), "odd": Path("x")}, tmp_path / "odd.pt")
    torch.save({"weights": torch.ones(2), "plain": [1, "a", None]}, tmp_path / "plain.pt")
    assert load(tmp_path / "plain.pt")["plain"] == [1, "a", None]
    check(tmp_path / "plain.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "plain.pt").read_bytes()[:300])
    for name in ("odd.pt", "cut.pt"):
        for read in (load, check):
            with pytest.raises(RunError, match=name):
                read(tmp_path / name)


def test_a_host_copy_shares_nothing_and_keeps_what_is_one():
    tied, scaler = torch.arange(6.0).reshape(2, 3), {"scale": [1.0]}
    state = torch.nn.Linear(2, 2).state_dict()
    copied = to_host({"a": tied, "b": (tied.T, tied), "scaler": scaler, "module": state})
    tied += 1
    scaler["scale"].append(2.0)
    assert copied["a"] is copied["b"][1] and torch.equal(copied["a"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(copied["b"][0], copied["a"].T) and copied["scaler"] == {"scale": [1.0]}
    assert copied["module"]._metadata == state._metadata and type(copied["module"]) is type(state)
