"""One run from start to end: start the actors, let the loops go, evaluate, save, report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
import signal
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from actors import placement
from actors.learner import LearnerGroup
from hapo_async import checkpoint, metrics, rollouts
from hapo_async.buffer import Buffer
from hapo_async.config import Config
from hapo_async.data import PromptStream
from hapo_async.driver.evaluation import Evaluator
from hapo_async.driver.fleet import Fleet
from hapo_async.driver.journal import Journal
from hapo_async.driver.judges import Judges
from hapo_async.driver.offline import Offline
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.setup import Prepared, check_libraries
from hapo_async.driver.training import StepTimes, Trained, Trainer
from hapo_async.errors import ConfigError, RunError
from hapo_async.ledger import Ledger
from hapo_async.live import LiveView
from hapo_async.quarantine import QUARANTINE_FILE, Quarantine
from hapo_async.report import page as report
from hapo_async.rundir import RunDir
from hapo_async.types import Version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. evals: metrics of the last evaluation. note: why it ended before train.steps, where it chose to."""

    run_dir: Path
    steps: int
    finished: bool
    seconds: float
    first_evals: dict[str, float] = field(default_factory=dict)
    evals: dict[str, float] = field(default_factory=dict)
    note: str = ""


def train(prepared: Prepared) -> Outcome:
    """Runs to the end. Raises UserError before anything started, RunError after."""
    with RunDir(prepared.config) as folder:
        resumed = _find_checkpoint(prepared.config, folder)
        if resumed:
            _refuse_another_run(prepared.config, folder)
        if resumed and resumed.step >= prepared.config.train.steps:
            return _already_done(folder, resumed)
        stream = _open_stream(prepared, resumed)  # refuses other data before anything is started or overwritten
        offline = Offline.open(prepared, folder.path, resumed) if prepared.algorithm.offline else None
        if resumed and offline and offline.early.due:
            return replace(_already_done(folder, resumed), note=_early_note(folder, offline))
        folder.write_config()
        actors = prepared.config.generator.count + prepared.config.learner.ranks
        cluster = placement.join(actors)
        try:
            check_libraries(prepared.config, cluster.device == "cuda")
            return asyncio.run(_Run(prepared, folder, cluster, resumed, stream, offline).go())
        finally:
            cluster.stop()
            with contextlib.suppress(OSError):  # a full disk must not hide how the run ended
                report.write(folder.path)


def _find_checkpoint(config: Config, folder: RunDir) -> checkpoint.Checkpoint | None:
    found = checkpoint.newest(folder.checkpoints)
    if found is None and config.run.resume == "must":
        raise ConfigError(f"run.resume=must, but {str(folder.checkpoints)!r} holds no checkpoint.")
    if found is None and folder.has_metrics:
        raise ConfigError(
            f"run.dir={str(folder.path)!r} holds a run without a checkpoint, which cannot be continued. Give another run.dir, "
            "or run.resume=never to move it aside and start afresh."
        )
    return found


def _refuse_another_run(config: Config, folder: RunDir) -> None:
    """Raises ConfigError where the folder holds a run of another algorithm, model or data: it would be taken for this
    one's. Other settings may change on the way."""
    before = folder.read_config()
    for key, mine in (("algorithm", config.algorithm), ("model", config.model), ("data.train", config.data.train)):
        there: Any = before
        for part in key.split("."):
            there = there.get(part, {}) if isinstance(there, dict) else {}
        if isinstance(there, str) and there != mine:
            raise ConfigError(
                f"run.dir={str(folder.path)!r} holds a run with {key}={there!r}, this one has {key}={mine!r}. Give another "
                "run.dir, or run.resume=never to move that run aside and start afresh."
            )


def _open_stream(prepared: Prepared, resumed: checkpoint.Checkpoint | None) -> PromptStream:
    """The data where the checkpoint left them. Raises DataError when these are other data, or in another order."""
    c = prepared.config
    stream = PromptStream(prepared.prompts, c.seed, c.data.shuffle, c.data.epochs)
    if resumed:
        stream.restore(resumed.driver["cursor"])
        if resumed.driver["config_digest"] != c.digest():
            log.warning("continuing from step %d with a changed configuration", resumed.step)
    return stream


def _already_done(folder: RunDir, found: checkpoint.Checkpoint) -> Outcome:
    if not folder.model.is_dir():
        _copy_model(found.path / "model", folder.model)
    rows = metrics.read(folder.path)
    evals = [{k: v for k, v in r.items() if k.startswith("eval/")} for r in rows]
    evals = [e for e in evals if e] or [{}]
    return Outcome(folder.path, found.step, True, 0.0, evals[0], evals[-1])


def _early_note(folder: RunDir, offline: Offline) -> str:
    best = folder.checkpoints / f"step-{offline.early.best_step}" / "model"
    return offline.early.text() + (f" (its model: {best})" if best.is_dir() else "")


class _Run:
    """The parts of a run and the order in which they come up and go down."""

    def __init__(
        self,
        prepared: Prepared,
        folder: RunDir,
        cluster: placement.Cluster,
        resumed: checkpoint.Checkpoint | None,
        stream: PromptStream,
        offline: Offline | None = None,
    ) -> None:
        self.prepared = prepared
        self.config = prepared.config
        self.folder = folder
        self.cluster = cluster
        self.resumed = resumed
        self.stream = stream
        self.offline = offline
        self._preparing: asyncio.Future[None] | None = None
        self.began = time.monotonic()
        self.first_evals: dict[str, float] = {}
        self.last_evals: dict[str, float] = {}

    async def go(self) -> Outcome:
        self._build_flow()
        async with contextlib.AsyncExitStack() as stack:
            await self._start_actors(stack)
            purge = (self.resumed.step + 1 if self.resumed.step else 0) if self.resumed else None
            writer = stack.enter_context(metrics.Writer(self.folder.path, purge))
            if purge is not None:
                rollouts.discard(self.folder.path, purge)
                metrics.discard(self.folder.path / QUARANTINE_FILE, purge)
            view = stack.enter_context(LiveView(self.config.train.steps, began=self.began))
            if self.resumed:
                view.console.print(f"continuing from the checkpoint of step {self.resumed.step}", highlight=False)
            self.view = view
            self.journal = Journal(
                self.config, self.folder, writer, view, self.fleet, self.judges, self.sampler, self.began
            )
            try:
                with self._signals():
                    await self._train()
            except BaseException as error:
                self.journal.status("failed", self.trainer)
                if isinstance(error, Exception):
                    with contextlib.suppress(Exception):
                        await self.journal.settle()
                raise
            finished = not self.trainer.stopping
            seconds = self.journal.elapsed_s()
            self.journal.status("done" if finished else "stopped", self.trainer)
        return Outcome(
            self.folder.path, self.trainer.version.step, finished, seconds, self.first_evals, self.last_evals, self.note
        )

    @property
    def note(self) -> str:
        """Why the run ends early, where early stopping says so."""
        early = self.trainer.version.step < self.config.train.steps and self.offline and self.offline.early.due
        return _early_note(self.folder, self.offline) if early and self.offline else ""

    # ---------------------------------------------------------------- coming up

    def _build_flow(self) -> None:
        p, c = self.prepared, self.config
        state = self.resumed.driver if self.resumed else None
        self.ledger = Ledger.resumed(state["ledger"]) if state else Ledger()
        step = self.resumed.step if self.resumed else 0
        self.version = Version(self.folder.next_incarnation(), step)
        self.buffer = Buffer((c.max_staleness + 1) * c.train.batch_prompts, self.ledger.order)
        self.sampler = Sampler(c, p.algorithm, p.options, self.stream, self.stream.by_uid(), self.ledger, self.buffer)
        self.sampler.step = step
        self.sampler.retries.quarantine = Quarantine(self.folder.path)
        if state:
            self.sampler.posteriors.restore(state.get("gate", {}))

    async def _start_actors(self, stack: contextlib.AsyncExitStack) -> None:
        p, c = self.prepared, self.config
        sampling = c.generator.count * c.generator.width
        shared = c.generator.placement == "colocated"
        bundles = max(sampling, c.learner.ranks) if shared else sampling + c.learner.ranks
        share = placement.cpu_share(self.cluster, bundles)
        slot = placement.reserve(self.cluster, bundles if shared else c.learner.ranks, share, "learner")
        parts: list[placement.Slot] = []
        if shared:
            slot, parts = placement.share(slot, c.generator.count, c.generator.width)

        async def fleet(after: Awaitable[Any]) -> Fleet:
            if parts:  # the learner leaves the devices first
                await (await asyncio.shield(after)).sleep()
            return await Fleet.start(c, p.model_path, self.cluster, share, self.sampler.wake, parts)

        learner = asyncio.ensure_future(LearnerGroup.start(c, p.model_path, self.cluster, slot))
        starting = (learner, fleet(learner), Judges.start(c))
        started: Any = await asyncio.gather(*starting, return_exceptions=True)
        failed = [part for part in started if isinstance(part, BaseException)]
        for part in started:
            if part not in failed:
                stack.push_async_callback(part.close)
        if failed:
            raise failed[0]
        self.learner, self.fleet, self.judges = started
        stack.push_async_callback(self.sampler.close)
        self.trainer = Trainer(c, self.learner, self.fleet, self.sampler, self.ledger, self.buffer, self.version)
        if self.resumed:
            async with self.trainer.turn():
                await self.learner.load(self.resumed.path)
        self.evaluator = Evaluator(c, p.eval_sets, self.fleet, self.judges, self.folder.path)

    # ---------------------------------------------------------------- running

    async def _train(self) -> None:
        await self.trainer.publish()
        await self.fleet.wait_installed(self.version, self.config.weights.deadline_s)
        if not self.resumed:
            await self._checkpoint(0)  # from here on the same command continues, however the run ends
        if self.offline and not await self._prepare_answers(self.offline):
            return
        if self.version.step == 0 and (values := await self._evaluate(0)):
            self.first_evals = self.last_evals
            self.journal.evaluation(0, values | (self.offline.counts() if self.offline else {}))
        feeding = asyncio.create_task(self.sampler.feed(self.fleet, self.judges))
        training = asyncio.create_task(self.trainer.run(self._committed))
        try:
            done, _ = await asyncio.wait({feeding, training}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in (feeding, training):
                task.cancel()
            await asyncio.gather(feeding, training, return_exceptions=True)
        await self._finish()

    async def _prepare_answers(self, offline: Offline) -> bool:
        """The cached answers, sampled, judged and scored where that has not been done; False when a signal came first.
        A run that has trained finds them complete: its weights are no longer those that they belong to."""

        def say(text: str) -> None:
            self.view.console.print(text, markup=False, highlight=False, soft_wrap=True)

        async def prepare() -> None:
            await offline.generate(self.fleet, self.judges, say)
            async with self.trainer.turn():
                await offline.score(self.learner, say)

        self._preparing = asyncio.ensure_future(prepare())
        await asyncio.wait({self._preparing})
        if self._preparing.cancelled():
            return False
        self._preparing.result()
        self.sampler.offline = offline
        return True

    async def _committed(self, trained: Trained) -> StepTimes:
        """The step boundary: evaluation, the step's row and rollouts, then the checkpoint that seals them."""
        c, step = self.config, trained.step
        evals: dict[str, float] = {}
        last = step == c.train.steps
        if last or (c.eval.every and step % c.eval.every == 0):
            began = time.monotonic()
            evals = await self._evaluate(step)
            trained.times.eval += time.monotonic() - began
        await self.journal.step(trained, self.trainer, evals)
        self.trainer.enough = bool(self.note)
        times = StepTimes()
        if c.train.checkpoint_every and step % c.train.checkpoint_every == 0 and not last:
            await self._checkpoint(step)
            times.checkpoint = time.monotonic() - times.began
        return times

    async def _evaluate(self, step: int) -> dict[str, float]:
        """Barrier: the learner waits, and every generator serves its version. With what is held out of cached answers."""
        values: dict[str, float] = {}
        if self.evaluator.sets:
            await self.fleet.wait_installed(self.trainer.version, self.config.weights.deadline_s)
            values = self.last_evals = await self.evaluator.run(step)
        if self.offline:
            async with self.trainer.turn():
                values |= await self.offline.measure(self.learner, self.trainer.version)
        return values

    async def _finish(self) -> None:
        """The final checkpoint and the model; an evaluation where the data ended before train.steps."""
        step = self.trainer.version.step
        ended_early = step < self.config.train.steps and not self.trainer.stopping
        if ended_early and step == 0:
            raise RunError(
                "the data ended and nothing was left to train on: "
                + ", ".join(f"{count} prompts {why}" for why, count in self.ledger.dropped_reasons.items())
            )
        evaluated = self.config.eval.every and step % self.config.eval.every == 0
        if ended_early and not evaluated and (values := await self._evaluate(step)):
            self.journal.evaluation(step, values)
        path = await self._checkpoint(step)
        await asyncio.to_thread(_copy_model, path / "model", self.folder.model)

    async def _checkpoint(self, step: int) -> Path:
        began = time.monotonic()
        await self.journal.settle()  # what a manifest seals is on disk by then
        root = self.folder.checkpoints
        folder = checkpoint.begin(root, step)
        async with self.trainer.turn():
            await self.learner.save(folder)
        driver = {
            "step": step,
            "incarnation": self.trainer.version.incarnation,
            "cursor": self.stream.cursor(),
            "ledger": self.ledger.state_dict(),
            "gate": self.sampler.posteriors.state_dict(),
            "config_digest": self.config.digest(),
            **({"offline": self.offline.early.state()} if self.offline else {}),
        }
        path = await asyncio.to_thread(checkpoint.seal, folder, root, step, driver)
        checkpoint.prune(root, self.config.train.keep_checkpoints)
        log.info("checkpoint of step %d written in %.1f s", step, time.monotonic() - began)
        return path

    # ---------------------------------------------------------------- stopping

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and SIGINT end the run at the next step boundary, with a checkpoint; a second one ends it now."""
        loop = asyncio.get_running_loop()
        current = asyncio.current_task()

        def stop() -> None:
            if self.trainer.stopping and current:
                current.cancel()
            self.trainer.stopping = True
            self.sampler.wake()
            if self._preparing:
                self._preparing.cancel()

        numbers = (signal.SIGTERM, signal.SIGINT)
        for number in numbers:
            loop.add_signal_handler(number, stop)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def _copy_model(source: Path, target: Path) -> None:
    beside = target.with_name(".model.writing")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(source, beside)
    shutil.rmtree(target, ignore_errors=True)
    beside.rename(target)


def outcome_rows(outcome: Outcome) -> list[tuple[str, Any, Any]]:
    """(set, pass@1 before, pass@1 after) of each evaluation set, for the closing lines."""
    names = [k for k in outcome.evals if k.endswith("/pass@1")]
    return [(n.split("/")[1], outcome.first_evals.get(n), outcome.evals[n]) for n in names]
