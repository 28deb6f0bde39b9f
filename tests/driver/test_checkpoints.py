"""Checkpoints beside training: what is captured is the step boundary, and a disk that fails costs a checkpoint, not the run."""

from __future__ import annotations

import asyncio
import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from actors.learner import LearnerGone, WriteFailed
from hapo_async import checkpoint, config, driver_state, group_files
from hapo_async.buffer import Buffer
from hapo_async.driver import checkpoints as module
from hapo_async.driver.checkpoints import MAX_FAILED, Checkpoints
from hapo_async.driver.resuming import already_done, copy_model, find_checkpoint, waiting_groups
from hapo_async.errors import RunError
from hapo_async.ledger import Ledger
from hapo_async.rundir import RunDir
from hapo_async.types import Version
from tests.driver.stand_ins import Loop
from tests.test_group_files import prompt, same, taught, waiting


class Learner:
    """Writes a real file when it is let. plan: what each write does: None, or what it raises."""

    def __init__(self, *plan: Exception | None) -> None:
        self.plan, self.is_writing = list(plan), False
        self.may = asyncio.Event()
        self.captured: list[int] = []
        self.weights = self.writing = 0
        self.before_seal = lambda folder: None

    async def capture(self, folder) -> None:
        await asyncio.sleep(0)
        self.folder, self.copy = folder, self.weights
        self.captured.append(self.weights)

    async def write(self):
        self.writing += 1
        await self.may.wait()
        self.writing -= 1
        problem = self.plan.pop(0) if self.plan else None
        (self.folder / "weights").write_text(str(self.copy))
        if problem is not None:
            raise problem
        self.before_seal(self.folder)
        return {"weights": checkpoint.describe(self.folder / "weights")}


class Rig:
    """Real sampler, ledger, buffer and files around the learner."""

    def __init__(self, tmp_path, *plan: Exception | None, **train) -> None:
        self.loop = Loop([], prompts=8, run={"dir": str(tmp_path / "run")}, train=train)
        self.learner, self.events = Learner(*plan), list[str]()
        self.root = tmp_path / "run" / "checkpoints"
        watchdog = SimpleNamespace(during=contextlib.nullcontext)
        folder = RunDir(self.loop.config)
        self.kept = Checkpoints(self.loop.config, folder, self.learner, self.loop.sampler, watchdog)
        self.kept.note = lambda kind, label, text: self.events.append(text)

    async def save(self, step: int, wait: bool = True) -> None:
        self.learner.weights = step
        await self.kept.save(Version(1, step), {})
        if wait:
            self.learner.may.set()
            await self.kept.written()
            self.learner.may.clear()

    @property
    def steps(self) -> list[str]:
        return sorted(p.name for p in self.root.iterdir())


def test_training_goes_on_while_the_step_boundary_is_written(tmp_path):
    async def scenario():
        rig = Rig(tmp_path)
        key = rig.loop.ledger.issue(0, "p001")
        await rig.save(1, wait=False)
        assert rig.kept.path is None and rig.kept.take() == {}
        rig.learner.weights = 2
        rig.loop.ledger.drop(key, "late")
        next_one = asyncio.create_task(rig.save(2, wait=False))
        await asyncio.sleep(0.05)
        assert rig.learner.captured == [1] and rig.learner.writing == 1, "the next one waits for the one before"
        rig.learner.may.set()
        await next_one
        found = rig.kept.newest()
        assert rig.kept.path == found.path and found.step == 1
        assert (found.path / "weights").read_text() == "1"
        assert [row[2] for row in found.driver["ledger"]["entries"]] == ["in_flight"]
        assert found.driver["packages"]["torch"] and driver_state.problem(json.dumps(found.driver).encode(), 1) is None
        await rig.kept.written()
        assert rig.kept.newest().step == 2
        taken = rig.kept.take()
        assert taken["checkpoint/failed"] == 0 and taken["checkpoint/write_s"] > 0.05 and rig.kept.take() == {}

    asyncio.run(scenario())


@pytest.mark.parametrize("how", ["a rank", "driver.json", "MANIFEST.json", "a folder"])
def test_what_cannot_be_written_is_said_and_ends_the_run_when_it_goes_on(tmp_path, how, monkeypatch):
    async def scenario():
        no = WriteFailed("learner rank 1: No space left on device: shard.pt (0.1 MB free)")
        plan = [None, None, no, no, None, no, no, no] if how == "a rank" else []
        rig = Rig(tmp_path, *plan)
        bad = {3, 4, 6, 7, 8}

        def spoil(folder) -> None:
            if rig.learner.copy in bad and how.endswith(".json"):
                (folder / how).symlink_to("/dev/full")

        rig.learner.before_seal = spoil
        mkdir = type(rig.root).mkdir

        def refuse(path, *arguments, **named):
            if how == "a folder" and path.name.endswith(".writing") and rig.learner.weights in bad:
                raise OSError(28, "No space left on device", str(path))
            mkdir(path, *arguments, **named)

        monkeypatch.setattr(type(rig.root), "mkdir", refuse)
        failed = []
        for step in range(1, 9):
            await rig.save(step)
            failed.append(rig.kept.take()["checkpoint/failed"])
            newest = rig.kept.newest()
            assert newest.step == max(s for s in range(1, step + 1) if s not in bad)
            assert rig.steps == sorted(f"step-{s}" for s in [s for s in range(1, step + 1) if s not in bad][-2:])
        assert failed == [0, 0, 1, 1, 0, 1, 1, 1] and len(rig.events) == 5
        assert all(
            "No space left" in text and str(rig.root) in text and "newest one is step-" in text for text in rig.events
        )
        with pytest.raises(RunError, match=rf"{MAX_FAILED} checkpoints in a row.*Make room.*{rig.root}.*from step-5"):
            rig.kept.check()
        with pytest.raises(RunError, match="in a row"):
            await rig.save(9)

    asyncio.run(scenario())


def test_without_a_first_checkpoint_nothing_is_trained(tmp_path):
    async def scenario():
        rig = Rig(tmp_path, WriteFailed("No space left on device"))
        await rig.save(0)
        with pytest.raises(RunError, match=r"first checkpoint.*No space left.*Make room"):
            await rig.kept.first()
        await rig.save(0)
        await rig.kept.first()

    asyncio.run(scenario())


def test_a_rank_that_dies_while_it_writes_is_no_matter_of_the_disk(tmp_path):
    async def scenario():
        died = WriteFailed("learner rank 0: died (ActorDiedError)", lost=True)
        rig = Rig(tmp_path, died, WriteFailed("No space left on device"), died)
        await rig.save(0)
        with pytest.raises(LearnerGone, match=r"first checkpoint.*rank 0: died \(ActorDiedError\)$"):
            await rig.kept.first()
        await rig.save(0)
        with pytest.raises(RunError, match="Make room") as full:
            await rig.kept.first()
        assert not isinstance(full.value, LearnerGone)
        rig.learner.may.set()
        with pytest.raises(LearnerGone, match=r"last checkpoint.*ActorDiedError\)$"):
            await rig.kept.final(Version(1, 1), {}, hurried=True)

    asyncio.run(scenario())


@pytest.mark.parametrize("left", ["nothing", "an older one", "half of it", "it"])
def test_a_finished_run_has_the_model_of_its_last_checkpoint(tmp_path, left):
    """Whatever an earlier stop, or a copy that failed, has left."""
    folder = RunDir(Loop([], prompts=8, run={"dir": str(tmp_path / "run")}).config)
    begun = checkpoint.begin(folder.checkpoints, 4)
    (begun / "model").mkdir()
    for name in ("weights", "config"):
        (begun / "model" / name).write_text(f"{name} of step 4")
    sealed = checkpoint.seal(begun, folder.checkpoints, 4, {"step": 4})
    if left != "nothing":
        folder.model.mkdir()
        (folder.model / "config").write_text("config of step 4")
    if left in ("an older one", "it"):
        (folder.model / "weights").write_text(f"weights of step {4 if left == 'it' else 2}")
    before = folder.model.stat().st_ino if left == "it" else 0
    assert already_done(folder, checkpoint.Checkpoint(sealed, 4, {})).steps == 4
    assert (folder.model / "weights").read_text() == "weights of step 4"
    assert left != "it" or folder.model.stat().st_ino == before, "it was copied again"


def test_the_last_one_is_tried_again_unless_a_grace_period_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RETRY_S", 0.01)

    async def scenario():
        no = WriteFailed("No space left on device")
        rig = Rig(tmp_path, no, no, None, no, no, no, no)
        rig.learner.may.set()
        path = await rig.kept.final(Version(1, 5), {}, hurried=False)
        assert path.name == "step-5" and len(rig.learner.captured) == 3
        assert await rig.kept.final(Version(1, 5), {}, hurried=True) == path, "a signal right after it"
        assert len(rig.learner.captured) == 3
        with pytest.raises(RunError, match="last checkpoint could not be written: No space left"):
            await rig.kept.final(Version(1, 6), {}, hurried=True)
        with pytest.raises(RunError, match="in a row"):
            await rig.kept.final(Version(1, 6), {}, hurried=False)
        assert len(rig.learner.captured) == 6

    asyncio.run(scenario())


def test_a_learner_that_is_lost_while_it_writes_fails_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SETTLE_S", 0.05)

    async def scenario():
        rig = Rig(tmp_path, None, WriteFailed("learner rank 0: died", lost=True))
        await rig.save(1)
        for step in (2, 3):  # it dies, it is frozen
            await rig.save(step, wait=step == 2)
            await rig.kept.settle()
            assert rig.kept.newest().step == 1 and rig.steps == ["step-1"]
        assert rig.kept.take() == {"checkpoint/failed": 0.0, "checkpoint/write_s": pytest.approx(0.5, abs=0.5)}
        rig.learner.is_writing = True
        await rig.save(4)
        assert len(rig.events) == 1 and "still not taken" in rig.events[0] and rig.learner.captured == [1, 2, 3]
        await rig.kept.settle()

    asyncio.run(scenario())


@pytest.mark.parametrize("now", [False, True])
def test_a_run_that_fails_waits_for_what_is_being_written_and_one_that_must_end_now_does_not(tmp_path, now):
    async def scenario():
        rig = Rig(tmp_path)
        asyncio.get_running_loop().call_later(0.1, rig.learner.may.set)
        error = asyncio.CancelledError if now else RunError
        with pytest.raises(error):
            async with rig.kept:
                await rig.save(1, wait=False)
                raise error
        assert rig.steps == ([] if now else ["step-1"])

    asyncio.run(scenario())


# --------------------------------------------------------------------------------------------------------------------
# Going on


def test_damaged_ones_are_in_the_events_when_a_run_goes_on(tmp_path, caplog):
    async def scenario():
        rig = Rig(tmp_path)
        for step in (1, 2):
            await rig.save(step)
        (rig.root / "step-2" / "weights").write_text("3")
        (rig.root / ".step-3.x.writing").mkdir()
        return rig

    rig = asyncio.run(scenario())
    with RunDir(rig.loop.config) as folder:
        found = find_checkpoint(rig.loop.config, folder)
        assert found.step == 1 and rig.steps == ["step-1", "step-2.corrupt"]
        assert folder.next_incarnation() == 2, "one more than the checkpoint's, though no file says so"
    (event,) = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert event["step"] == 1 and "weights differs" in event["text"] and event["text"] in caplog.text


def test_groups_that_wait_come_back_into_ledger_and_buffer(tmp_path, ray_session):
    """With their attempts; those of prompts that are gone, or too old for another bound, are left to be issued again."""
    tree = {"max_staleness": 2, "train": {"batch_prompts": 1}}

    async def scenario():
        rig = Rig(tmp_path)
        sampler = rig.loop.sampler
        ledger, buffer = sampler.ledger, sampler.buffer = Ledger(), Buffer(9, lambda key: ledger.order(key))
        for uid in ("p", "q", "r", "old"):
            ready, payload = waiting(uid, attempt=0)
            ready = taught(uid) if uid == "q" else ready
            key = ledger.issue(ready.key.epoch, uid)
            ref = None if uid == "q" else ray_session.put(payload)
            ledger.admit(key)
            buffer.add(with_payload(ready, ref))
        flying = ledger.issue(0, "flying")
        await rig.save(5)
        return rig, flying

    rig, flying = asyncio.run(scenario())
    assert group_files.LINES in json.loads((rig.root / "step-5" / checkpoint.MANIFEST).read_text())["files"]
    resumed = rig.kept.newest()
    prompts = {uid: prompt(uid) for uid in ("p", "q", "r")}
    found = waiting_groups(config.parse({**tree}), resumed, prompts)
    assert [g.key.uid for g in found] == ["q", "p", "r"], "in the order of the buffer; unknown prompts are left out"
    ledger = Ledger.resumed(resumed.driver["ledger"], {g.key for g in found})
    assert all(ledger.is_buffered(g.key) for g in found) and not ledger.is_buffered(flying)
    assert {k: v for k, v in ledger.counts().items() if v} == {"issued": 5, "buffered": 3, "to_retry": 2}
    ledger.check(recount=True)
    expected, payload = waiting("p", attempt=0)
    assert same(ray_session.get(found[1].gated.payload), payload)
    assert same(found[1].gated.header, expected.gated.header) and same(found[1].train.rows, expected.train.rows)
    younger = waiting_groups(config.parse({**tree, "max_staleness": 1}), resumed, prompts)
    assert [g.key.uid for g in younger] == ["q"], "version 1.3 is two steps old"
    (resumed.path / group_files.ARRAYS).write_bytes(b"")
    assert waiting_groups(config.parse(tree), resumed, prompts) == []


def with_payload(ready, ref):
    train = replace(ready.train, payload=ref if ready.train.payload is not None else None)
    return replace(ready, gated=replace(ready.gated, payload=ref), train=train)


def test_a_model_that_cannot_be_copied_is_not_half_there(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "weights").write_text("w")
    (tmp_path / ".model.writing").write_text("in the way")
    with pytest.raises(RunError, match="could not be copied"):
        copy_model(tmp_path / "source", tmp_path / "model")
    assert not (tmp_path / "model").exists()
    (tmp_path / ".model.writing").unlink()
    copy_model(tmp_path / "source", tmp_path / "model")
    assert (tmp_path / "model" / "weights").read_text() == "w"
