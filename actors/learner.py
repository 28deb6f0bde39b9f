"""The learner on Ray: one actor per rank, and the driver's handle to all of them.

    driver                      rank 0 .. R-1 (max_restarts=0: one dies, the whole group is restarted)
    LearnerGroup.step(plans) -> resolve payloads, train in lockstep   -> reports, merged into metrics
    LearnerGroup.score(answers) -> log-probs, each rank a share       -> one array per answer
    LearnerGroup.publish     -> all walk the weights, rank 0 sends    -> an offer for the generators
    LearnerGroup.capture / write / load -> all take part              -> files, written beside the next steps

Every call has a deadline and every failure is a RunError that names the rank. A rank that dies or freezes leaves the
others waiting in a collective, so whoever complains first is rarely the culprit: the ranks are asked who still answers,
and then all of them are ended.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors import placement
from actors.calls import CallFailed, Calls, Pending
from actors.learner_rank import START_S, LearnerRank
from actors.transports import Member, Offer, Published
from actors.zero import check_overrides
from hapo_async.batch import StepPlan, share_out
from hapo_async.config import Config
from hapo_async.errors import ConfigError, RunError
from hapo_async.learner.blame import Blame
from hapo_async.learner.learn import check_needs, needs_of
from hapo_async.learner.tally import merge
from hapo_async.sequences import Sequence as TokenSequence
from hapo_async.types import Version

__all__ = ["LearnerGone", "LearnerGroup", "LearnerRank", "WriteFailed", "check_overrides"]

log = logging.getLogger(__name__)

PING_S = 5.0  # how long a rank has to say that it is alive, once something went wrong
GRACE_S = 2.0  # how long the other ranks' own errors are waited for


class LearnerGone(RunError):
    """A rank died or froze. The others are ended; ``LearnerGroup.restart`` begins anew."""


class WriteFailed(RunError):
    """A checkpoint's files could not be written. lost: because a rank died, rather than for what its disk said."""

    def __init__(self, why: str, lost: bool = False) -> None:
        super().__init__(why)
        self.lost = lost


class LearnerGroup:
    """The driver's handle. Any failure breaks it: its ranks are ended, and from then on every call raises RunError, until
    ``restart``. blamed: what the last step could not train on, and why."""

    def __init__(
        self,
        config: Config,
        ranks: Sequence[Any],
        slot: placement.Slot | None,
        needs: frozenset[str],
        device: str = "cpu",
    ) -> None:
        self.config = config
        self.needs = needs
        self.transport = config.transport(device == "cuda")
        self.ranks = list(ranks)
        self.slot = slot
        # On one node every object is at hand already.
        self.is_remote = ray.is_initialized() and sum(node["Alive"] for node in ray.nodes()) > 1
        self.blamed: tuple[Blame, ...] = ()
        self._broken: RunError | None = None
        self._writes: list[ray.ObjectRef] = []
        self._spawn: Callable[[placement.Slot], list[Any]] | None = None
        self._calls = Calls()

    @classmethod
    async def start(
        cls,
        config: Config,
        model_path: str,
        cluster: placement.Cluster,
        slot: placement.Slot,
        rank_class: type[LearnerRank] = LearnerRank,
        needs: frozenset[str] | None = None,
    ) -> LearnerGroup:
        """Starts ``learner.ranks`` actors in the bundles of ``slot`` and loads the model on all. Raises RunError.

        needs: what later configurations will need besides this one's: "reference" or a part of it (topk, ref_logp,
        ref_kl, future), and "value" for a critic.
        """
        count = config.learner.ranks
        later = needs or frozenset()
        needs = needs_of(config) | later
        if later & {"topk", "ref_logp", "ref_kl", "future"}:
            needs |= {"reference"}
        settings: dict[str, Any] = {
            "max_restarts": 0,
            "max_task_retries": 0,
            "concurrency_groups": {"control": 1, "data": 1, "files": 1},
        }
        actor: Any = ray.remote(**settings)(rank_class)
        numbers = itertools.count()

        def spawn(slot: placement.Slot) -> list[Any]:
            name = f"learner-{os.getpid()}-{id(actor)}-{next(numbers)}"
            return [
                actor.options(**slot.options(i), name=f"{name}-{i}").remote(
                    i, count, config, model_path, cluster.device, needs
                )
                for i in range(count)
            ]

        group = cls(config, spawn(slot), slot, needs, cluster.device)
        group._spawn = spawn
        await group._begin()
        return group

    async def restart(self, slot: placement.Slot | None = None) -> None:
        """Other ranks with the model that the run started from, in the place of those that are gone or in another one; ``load``
        comes next. Raises RunError; then it may be tried again."""
        assert self._spawn is not None, "these ranks were not started here"
        self._end(RunError("the learner is started again"))
        if slot is not None:
            if self.slot is not None:
                self.slot.release()
            self.slot = slot
        assert self.slot is not None
        self.ranks, self.blamed = self._spawn(self.slot), ()
        self._broken = None
        await self._begin()

    async def _begin(self) -> None:
        """The ranks meet and load the model."""
        began, count = time.monotonic(), len(self.ranks)
        ip, port = (await self._call("listen", [()], START_S, ranks=self.ranks[:1]))[0]
        pids = await self._call("start", [(ip, port)] * count, START_S)
        log.info("learner: %d ranks ready in %.1f s (pids %s)", count, time.monotonic() - began, pids)

    async def step(self, plans: Sequence[StepPlan]) -> dict[str, float]:
        """One learner step on one plan per rank; its metrics. ``skipped`` is 1 when no update was applied because none
        was finite, or because of what ``blamed`` then names, else 0."""
        reports = await self._call("step", [(plan,) for plan in plans], self.config.learner.deadline_s)
        self.blamed = tuple(blame for report in reports for blame in report.blamed)
        metrics = merge(reports)
        # An update that options.skip_grad_norm skipped is the algorithm's will, no failure.
        metrics["skipped"] = float(metrics["train/updates"] == 0 and not metrics.get("train/skipped_norm"))
        metrics["train/prompts"] = float(sum(len(mini) for plan in plans for mini in plan.minis))
        return metrics

    async def holdout(self, plans: Sequence[StepPlan]) -> float:
        """The objective's -J on the plans' groups, without gradient; the mean over their mini-batches."""
        reports = await self._call("holdout", [(plan,) for plan in plans], self.config.learner.deadline_s)
        return merge(reports).get("loss/value", 0.0)

    async def score(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """float32 [T] per sequence: log-probs of its trained tokens at temperature 1 under the weights as they are, NaN
        for others. The sequences travel with the call: hand over a few hundred at a time."""
        tokens = [len(s.prompt_tokens) + len(s.tokens) for s in sequences]
        shares = share_out(tokens, len(self.ranks))
        calls = [([sequences[i] for i in share],) for share in shares]
        answers = await self._call("score", calls, self.config.learner.deadline_s)
        scored = {i: a for share, part in zip(shares, answers, strict=True) for i, a in zip(share, part, strict=True)}
        return [scored[i] for i in range(len(sequences))]

    async def configure(self, config: Config) -> None:
        """Another algorithm, its options, another learning rate and schedule, on the same ranks and weights; optimizer
        moments stay. Raises ConfigError for what this learner was not started with."""
        check_needs(config, "reference" in self.needs, "value" in self.needs)
        fixed = ("ranks", "zero_stage", "dtype", "gradient_checkpointing", "lora")
        changed = [name for name in fixed if getattr(config.learner, name) != getattr(self.config.learner, name)]
        if changed:
            raise ConfigError(f"learner.{changed[0]} cannot change on a running learner; start another one.")
        await self._call("configure", [(config,)] * len(self.ranks), self.config.learner.deadline_s)
        self.config = config

    async def announce(self, version: Version, members: Sequence[Member]) -> Offer | None:
        """The current weights are about to be published as ``version``: what generators need to fetch them meanwhile, or None
        where there is nothing to fetch before ``publish`` has ended. Raises RunError."""
        told: list[Offer | None] = await self._call(
            "announce", [(version, list(members), self.transport)], self.config.learner.deadline_s, ranks=self.ranks[:1]
        )
        return told[0]

    async def admit(self, members: Sequence[Member]) -> None:
        """Lets generators that came after ``announce`` fetch the newest version, where the transport can. Raises RunError."""
        deadline_s = self.config.learner.deadline_s
        await self._call("admit", [(list(members),)], deadline_s, ranks=self.ranks[:1])

    async def publish(self, version: Version, transport: str = "") -> Published:
        """Sends the current weights as ``version``, by the configured transport or another one. A failed transfer is a
        result; RunError means that the learner failed."""
        call = (version, transport or self.transport)
        answers = await self._call("publish", [call] * len(self.ranks), self.config.learner.deadline_s)
        assert answers[0] is not None
        published: Published = answers[0]
        return published

    def prefetch(self, refs: Sequence[Any]) -> None:
        """Asks all ranks to bring these objects to their nodes, beside whatever they do. Nobody waits for it."""
        for rank in self.ranks if self._broken is None else []:
            rank.prefetch.remote(list(refs))

    async def sleep(self) -> None:
        """All ranks leave their devices to others."""
        await self._call("sleep", [()] * len(self.ranks), self.config.learner.deadline_s)

    async def wake(self) -> None:
        await self._call("wake", [()] * len(self.ranks), self.config.learner.deadline_s)

    async def save(self, folder: Path | str) -> None:
        """Model and resumable state into ``folder`` (which all ranks must see under this path). Raises RunError."""
        await self.capture(folder)
        await self.write()

    async def capture(self, folder: Path | str) -> None:
        """Copies what belongs to this step boundary to the ranks' host memory. ``write`` brings it into ``folder``, which all
        ranks must see under this path; the weights may change meanwhile."""
        await self._call("capture", [(str(folder),)] * len(self.ranks), self.config.learner.deadline_s)

    async def write(self) -> dict[str, dict[str, Any]]:
        """All ranks write what ``capture`` copied, beside whatever else they do. Size and sha256 of each file by its name below
        the folder. Raises WriteFailed and breaks nothing: a rank that died is found by the next call."""
        self._writes = [rank.write.remote() for rank in self.ranks]
        deadline_s = self.config.learner.deadline_s
        answers = await asyncio.gather(
            *(self._calls.answer(ref, deadline_s, rank_name(i), "write") for i, ref in enumerate(self._writes)),
            return_exceptions=True,
        )
        files: dict[str, dict[str, Any]] = {}
        for index, answer in enumerate(answers):
            if isinstance(answer, CallFailed):
                raise WriteFailed(str(answer), lost=answer.gone and answer.__cause__ is not None) from None
            if isinstance(answer, BaseException):
                raise answer
            if answer.error:
                raise WriteFailed(f"{rank_name(index)}: {answer.error}")
            files |= answer.files
        return files

    @property
    def is_writing(self) -> bool:
        """Whether a rank has not ended the last ``write``, whatever became of the wait for it."""
        return bool(self._writes) and bool(ray.wait(self._writes, num_returns=len(self._writes), timeout=0)[1])

    async def load(self, folder: Path | str) -> None:
        """Resumes from ``folder``. Raises RunError when it was written by another number of ranks."""
        await self._call("load", [(str(folder),)] * len(self.ranks), self.config.learner.deadline_s)

    async def close(self) -> None:
        """Ends all ranks and frees their places."""
        if self._broken is None:
            calls = [self._answer(i, rank, "close", (), PING_S) for i, rank in enumerate(self.ranks)]
            await asyncio.gather(*calls, return_exceptions=True)
            self._end(RunError("the learner was closed"))
        if self.slot is not None:
            self.slot.release()
            self.slot = None

    def give_up(self, why: str) -> None:
        """Takes the group for lost: every call that waits for it raises LearnerGone."""
        if self._broken is None:
            self._end(LearnerGone(why))

    # ---------------------------------------------------------------- calls

    def calls(self) -> list[Pending]:
        """Remote calls that have not been answered, oldest first."""
        return self._calls.pending()

    async def ping(self, index: int, deadline_s: float) -> dict[str, Any]:
        """What one rank is doing: ``LearnerRank.ping``. Raises CallFailed; breaks nothing."""
        told: dict[str, Any] = await self._answer(index, self.ranks[index], "ping", (), deadline_s)
        return told

    async def _call(
        self, method: str, arguments: Sequence[tuple[Any, ...]], deadline_s: float, ranks: Sequence[Any] | None = None
    ) -> list[Any]:
        """The answers of all ranks. On the first failure: finds the culprit, ends all ranks, raises RunError, LearnerGone where
        a rank is dead or silent."""
        if self._broken is not None:
            raise type(self._broken)(f"learner.{method}: {self._broken}")
        targets = self.ranks if ranks is None else ranks
        tasks = [
            asyncio.ensure_future(self._answer(i, rank, method, args, deadline_s))
            for i, (rank, args) in enumerate(zip(targets, arguments, strict=True))
        ]
        try:
            return list(await asyncio.gather(*tasks))
        except CallFailed:
            broken = self._broken or await self._diagnose(method, tasks)
            if self._broken is None:
                self._end(broken)
            raise broken from None
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, index: int, rank: Any, method: str, args: tuple[Any, ...], deadline_s: float) -> Any:
        ref = getattr(rank, method).remote(*args)
        return await self._calls.answer(ref, deadline_s, rank_name(index), method)

    async def _diagnose(self, method: str, tasks: Sequence[asyncio.Future[Any]]) -> RunError:
        """Who failed: ranks that are dead or silent, else the first error that is not a mere broken collective."""
        await asyncio.wait(tasks, timeout=GRACE_S)
        pings = [self._answer(i, rank, "ping", (), PING_S) for i, rank in enumerate(self.ranks)]
        silent = [p for p in await asyncio.gather(*pings, return_exceptions=True) if isinstance(p, CallFailed)]
        if silent:
            return LearnerGone(f"learner.{method} failed: " + "; ".join(_state(p) for p in silent))
        errors = [t.exception() for t in tasks if t.done() and not t.cancelled() and t.exception() is not None]
        errors.sort(key=_is_collective)
        return RunError(f"learner.{method} failed: {errors[0]}")

    def _end(self, why: RunError) -> None:
        """Ends all ranks: those that are well may hang in a collective with one that is not."""
        self._broken = why
        for rank in self.ranks:
            ray.kill(rank, no_restart=True)


def rank_name(index: int) -> str:
    return f"learner rank {index}"


def _state(failure: CallFailed) -> str:
    text = str(failure)
    return text.replace(f"no answer within {PING_S:.0f} s", "does not answer (frozen?)")


def _is_collective(error: BaseException | None) -> bool:
    """An error that says no more than that another rank did not take part."""
    text = str(error)
    signs = ("DistBackendError", "gloo", "NCCL", "Connection closed by peer", "Timed out waiting")
    return any(sign in text for sign in signs)
