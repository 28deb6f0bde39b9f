"""One run from start to end: start the actors, let the loops go, evaluate, save, report."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from actors import placement
from actors.learner import LearnerGone
from hapo_async import checkpoint, metrics, rollouts
from hapo_async.buffer import Buffer
from hapo_async.data import PromptStream
from hapo_async.driver import starting, tasks
from hapo_async.driver.beside import BesideTraining
from hapo_async.driver.canary import Canary
from hapo_async.driver.checkpoints import Checkpoints
from hapo_async.driver.evaluation import Evaluator
from hapo_async.driver.generators import Generator
from hapo_async.driver.journal import Journal
from hapo_async.driver.measuring import Measuring
from hapo_async.driver.offline import Offline
from hapo_async.driver.outcome import Outcome, outcome_rows
from hapo_async.driver.recovery import Recovery
from hapo_async.driver.resuming import (
    already_done,
    copy_model,
    early_note,
    find_checkpoint,
    open_stream,
    refuse_another_run,
    waiting_groups,
)
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.scaling import Scaler
from hapo_async.driver.setup import Prepared, check_libraries
from hapo_async.driver.supervision import Supervision
from hapo_async.driver.training import StepTimes, Trained, Trainer
from hapo_async.driver.upkeep import Upkeep
from hapo_async.driver.watchdog import Watchdog
from hapo_async.errors import RunError
from hapo_async.events import EVENTS_FILE, Events
from hapo_async.guardian import Guardian
from hapo_async.ledger import Ledger
from hapo_async.live import LiveView
from hapo_async.quarantine import QUARANTINE_FILE, Quarantine
from hapo_async.report import page as report
from hapo_async.rundir import RunDir, in_words
from hapo_async.threads import DaemonThreads
from hapo_async.types import Version

__all__ = ["Outcome", "outcome_rows", "train"]

log = logging.getLogger(__name__)

T = TypeVar("T")

STOPS = (signal.SIGTERM, signal.SIGINT)


def train(prepared: Prepared) -> Outcome:
    """Runs to the end. Raises UserError before anything started, RunError after."""
    with RunDir(prepared.config) as folder, in_words(folder.path), _signals_as_before():
        resumed = find_checkpoint(prepared.config, folder)
        if resumed:
            refuse_another_run(prepared.config, folder)
        if resumed and resumed.step >= prepared.config.train.steps:
            return already_done(folder, resumed)
        stream = open_stream(prepared, resumed)  # refuses other data before anything is started or overwritten
        offline = Offline.open(prepared, folder.path, resumed) if prepared.algorithm.offline else None
        if resumed and offline and offline.early.due:
            return replace(already_done(folder, resumed), note=early_note(folder, offline))
        folder.write_config()
        actors = prepared.config.generator.count + prepared.config.learner.ranks
        with Guardian(folder.path) as guardian:
            cluster = placement.join(actors)
            try:
                guardian.tell(cluster.pids)
                check_libraries(prepared.config, cluster.device == "cuda")
                return asyncio.run(_Run(prepared, folder, cluster, resumed, stream, offline).go())
            except asyncio.CancelledError:
                raise RunError(
                    "ended at once by a second signal; the same command continues from its checkpoint"
                ) from None
            finally:
                _be_deaf()
                cluster.stop()
                with contextlib.suppress(OSError):  # a full disk must not hide how the run ended
                    report.write(folder.path)


@contextlib.contextmanager
def _signals_as_before() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOPS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _be_deaf() -> None:
    """What is put in order at the end takes seconds: a signal that comes meanwhile changes nothing about it."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


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
        self._stopped = asyncio.Event()
        self._is_over = False  # nothing is trained any more
        self.began = time.monotonic()

    async def go(self) -> Outcome:
        asyncio.get_running_loop().set_default_executor(DaemonThreads())
        self._build_flow()
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._ignore_signals)
            await self._start_actors(stack)
            purge = (self.resumed.step + 1 if self.resumed.step else 0) if self.resumed else None
            writer = stack.enter_context(metrics.Writer(self.folder.path, purge))
            if purge is not None:
                rollouts.discard(self.folder.path, purge)
                for name in (QUARANTINE_FILE, EVENTS_FILE):
                    metrics.discard(self.folder.path / name, purge)
            self.sampler.retries.quarantine = Quarantine(self.folder.path)
            view = stack.enter_context(LiveView(self.config.train.steps, began=self.began))
            if self.resumed:
                view.console.print(f"continuing from the checkpoint of step {self.resumed.step}", highlight=False)
            self.view = view
            self.journal = Journal(
                self.config, self.folder, writer, view, self.fleet, self.judges, self.sampler, self.began
            )
            self.measuring = Measuring(
                self.trainer, self.evaluator, self.beside, self.journal, self._stopped, self.offline
            )
            self._start_upkeep(stack)
            self.checkpoints.synced = writer.sync
            try:
                self._heed_signals()
                await self._train()
            except BaseException as error:
                self.journal.status("failed", self.trainer)
                if isinstance(error, Exception):
                    await self._write_rest()
                raise
            finally:
                self._is_over = True
            finished = not self.trainer.stopping
            seconds = self.journal.elapsed_s()
            self.journal.status("done" if finished else "stopped", self.trainer)
        first, last = self.measuring.first, self.measuring.last
        return Outcome(self.folder.path, self.trainer.version.step, finished, seconds, first, last, self.note)

    @property
    def note(self) -> str:
        """Why the run ends early, where early stopping says so."""
        early = self.trainer.version.step < self.config.train.steps and self.offline and self.offline.early.due
        return early_note(self.folder, self.offline) if early and self.offline else ""

    # ---------------------------------------------------------------- coming up

    def _build_flow(self) -> None:
        p, c = self.prepared, self.config
        state = self.resumed.driver if self.resumed else None
        prompts = self.stream.by_uid()
        waiting = waiting_groups(c, self.resumed, prompts)
        self.ledger = Ledger.resumed(state["ledger"], {g.key for g in waiting}) if state else Ledger()
        step = self.resumed.step if self.resumed else 0
        self.version = Version(self.folder.next_incarnation(), step)
        self.buffer = Buffer(c.most_untrained, self.ledger.order)
        for group in waiting:
            if self.ledger.is_buffered(group.key):
                self.buffer.add(group)
        self.sampler = Sampler(c, p.algorithm, p.options, self.stream, prompts, self.ledger, self.buffer)
        self.sampler.step, self.sampler.incarnation = step, self.version.incarnation
        if state:
            self.sampler.returns.lineage.cut(Version(self.version.incarnation - 1, step))
            self.sampler.posteriors.restore(state.get("gate", {}))

    async def _start_actors(self, stack: contextlib.AsyncExitStack) -> None:
        c = self.config
        self.learner, self.fleet, self.judges = await starting.start(
            c, self.prepared.model_path, self.cluster, self.sampler.wake, stack
        )
        stack.push_async_callback(self.sampler.close)
        self.trainer = Trainer(c, self.learner, self.fleet, self.sampler, self.ledger, self.buffer, self.version)
        if self.resumed:
            async with self.trainer.turn():
                await self.learner.load(self.resumed.path)
        self.evaluator = Evaluator(c, self.prepared.eval_sets, self.fleet, self.judges, self.folder.path)
        self.beside = BesideTraining(c, self.evaluator, self.fleet)
        stack.push_async_callback(self.beside.close)
        self.canary = Canary(c, self.prepared.prompts, self.learner, self.fleet, self._say)
        stack.push_async_callback(self.canary.close)
        self.trainer.at_publish = self.canary.at_publish
        self.supervision = Supervision(c, self.fleet, self.judges, self.learner)
        self.watchdog = Watchdog(
            c,
            self.fleet,
            self.judges,
            self.learner,
            self.sampler,
            self.buffer,
            self.ledger,
            self.folder.path,
            self._say,
            self.supervision,
        )
        path = self.resumed.path if self.resumed else None
        self.checkpoints = await stack.enter_async_context(
            Checkpoints(c, self.folder, self.learner, self.sampler, self.watchdog, self.trainer.turn, path)
        )
        watching = asyncio.create_task(self.watchdog.run())
        stack.push_async_callback(tasks.end, watching)

    def _start_upkeep(self, stack: contextlib.AsyncExitStack) -> None:
        """From now on who dies is replaced."""
        self.events = Events(self.folder.path, lambda: self.trainer.version.step, self._say)
        assert self.fleet.starter is not None
        self.upkeep = Upkeep(self.fleet, self.fleet.starter, self.events.add)
        stack.push_async_callback(self.upkeep.close)
        self.judges.note = self.checkpoints.note = self.events.add
        self.recovery = Recovery(
            self.config,
            self.cluster,
            self.trainer,
            self.checkpoints,
            self.journal,
            self.measuring,
            self.events.add,
            self.folder.next_incarnation,
            self.offline,
        )
        self.supervision.restarting = lambda: self.recovery.restarting
        self.journal.actors = lambda: self.supervision.actors(self.trainer.version, self.watchdog.reading)

    def _say(self, text: str) -> None:
        """A line for people, above the live view."""
        self.view.console.print(text, markup=False, highlight=False, soft_wrap=True)

    # ---------------------------------------------------------------- running

    async def _train(self) -> None:
        if not await self._surviving(self._begin):
            return
        feeding = asyncio.create_task(self.sampler.feed(self.fleet, self.judges))
        training = asyncio.create_task(self._surviving(self._to_the_end))
        scaling = asyncio.create_task(self._scaler().run())
        try:
            done, _ = await asyncio.wait({feeding, training}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            await tasks.end(scaling, feeding, training)

    async def _begin(self) -> bool:
        """Everybody has the weights, there is a checkpoint and a first evaluation. False when a signal came first."""
        if self.fleet.weights.newest != self.trainer.version:
            await self.trainer.publish()
        await self.trainer.everywhere()
        if self.checkpoints.path is None:
            await self._checkpoint()
        if self.offline and not await self._prepare_answers(self.offline):
            return False
        await self.checkpoints.first()  # from here on the same command continues, however the run ends
        if self.trainer.version.step == 0:
            await self.measuring.before()
        return True

    async def _to_the_end(self) -> None:
        """All steps and the final checkpoint."""
        await self.trainer.run(self._committed)
        self.sampler.hold = True  # what is issued from now on nobody will train on
        await self._finish()

    async def _surviving(self, work: Callable[[], Awaitable[T]]) -> T:
        """What the work brings. When the learner is lost meanwhile, it starts again, and so does the work."""
        while True:
            try:
                return await work()
            except LearnerGone as error:
                if self.trainer.stopping:
                    raise
                await self.recovery.recover(error)

    def _scaler(self) -> Scaler:
        def hand_over(generator: Generator) -> Awaitable[tuple[int, int]]:
            return self.sampler.handover.take_from(self.fleet, generator)

        def changed(told: dict[str, Any]) -> None:
            self.journal.scaling = told
            self.journal.status("running", self.trainer)

        return Scaler(self.config, self.folder.path, self.upkeep, self.judges, hand_over, self.events.add, changed)

    async def _prepare_answers(self, offline: Offline) -> bool:
        """The cached answers, sampled, judged and scored where that has not been done; False when a signal came first.
        A run that has trained finds them complete: its weights are no longer those that they belong to."""
        if self.trainer.stopping:
            return False

        async def prepare() -> None:
            await offline.generate(self.fleet, self.judges, self._say)
            async with self.trainer.turn():
                await offline.score(self.learner, self._say)

        self._preparing = asyncio.ensure_future(prepare())
        await asyncio.wait({self._preparing})
        if self._preparing.cancelled():
            return False
        self._preparing.result()
        self.sampler.offline = offline
        return True

    async def _committed(self, trained: Trained) -> StepTimes:
        """The step boundary: evaluation, the step's row and rollouts, then the checkpoint that seals them."""
        train, step = self.config.train, trained.step
        extra = await self.measuring.at(trained)
        await self.journal.step(trained, self.trainer, extra | self._taken())
        self.trainer.enough = bool(self.note)
        self.checkpoints.check()
        times = StepTimes()
        if train.checkpoint_every and step % train.checkpoint_every == 0 and step < train.steps:
            await self._checkpoint()
            times.checkpoint = time.monotonic() - times.began
        return times

    def _taken(self) -> dict[str, float]:
        """What the parts beside the loop measured since the last step."""
        restarts = {"scale/restarts": float(self.upkeep.take() + self.judges.take() + self.recovery.take())}
        states = self.supervision.metrics(self.trainer.version)
        return self.canary.take() | self.watchdog.take() | self.checkpoints.take() | restarts | states

    async def _finish(self) -> None:
        """The final checkpoint and the model; an evaluation where the data ended before train.steps."""
        step = self.trainer.version.step
        ended_early = step < self.config.train.steps and not self.trainer.stopping
        if ended_early and step == 0:
            raise RunError(
                "the data ended and nothing was left to train on: "
                + ", ".join(f"{count} prompts {why}" for why, count in self.ledger.dropped_reasons.items())
            )
        await self.measuring.at_the_end(ended_early)
        path = await self._last_checkpoint()
        late = f"the same command copies {path / 'model'} to {self.folder.model}, which was not done"
        with self.watchdog.during("copies the model"):
            await tasks.in_time(self.config.learner.deadline_s, late, copy_model, path / "model", self.folder.model)

    async def _write_rest(self) -> None:
        """What a run that fails still has to write down: rollouts, and evaluations that ended beside it or are given up."""
        with contextlib.suppress(Exception):
            await self.journal.settle()
        with contextlib.suppress(Exception):
            await self.measuring.give_up()

    async def _checkpoint(self) -> None:
        await self.journal.settle()  # what a manifest seals is in its file by then
        await self.checkpoints.save(self.trainer.version, self._more_state())

    async def _last_checkpoint(self) -> Path:
        await self.journal.settle()
        return await self.checkpoints.final(self.trainer.version, self._more_state(), hurried=self.trainer.stopping)

    def _more_state(self) -> dict[str, Any]:
        return {"offline": self.offline.early.state()} if self.offline else {}

    # ---------------------------------------------------------------- stopping

    def _heed_signals(self) -> None:
        """SIGTERM and SIGINT end the run at the next step boundary, with a checkpoint; a second one ends it now, also while
        everything is being closed."""
        loop = asyncio.get_running_loop()
        current = asyncio.current_task()

        def stop() -> None:
            if self.trainer.stopping and current:
                current.cancel()
            elif not self.trainer.stopping and not self._is_over:
                kept = self.checkpoints.path.name if self.checkpoints.path else "none"
                self._say(
                    f"told to stop: a checkpoint comes after this step (so far: {kept}); a second signal ends it now"
                )
            self.trainer.stopping = True
            self._stopped.set()
            self.sampler.wake()
            if self._preparing:
                self._preparing.cancel()

        for number in STOPS:
            loop.add_signal_handler(number, stop)

    def _ignore_signals(self) -> None:
        for number in STOPS:
            asyncio.get_running_loop().remove_signal_handler(number)
        _be_deaf()
