"""The learner on Ray: one actor per rank, and the driver's handle to all of them.

    driver                      rank 0 .. R-1 (max_restarts=0: one dies, the whole group is restarted)
    LearnerGroup.step(plans) -> resolve payloads, train in lockstep   -> reports, merged into metrics
    LearnerGroup.score(answers) -> log-probs, each rank a share       -> one array per answer
    LearnerGroup.publish     -> all walk the weights, rank 0 sends    -> an offer for the generators
    LearnerGroup.save / load -> all take part                         -> files

Every call has a deadline and every failure is a RunError that names the rank. A rank that dies or freezes leaves the
others waiting in a collective, so whoever complains first is rarely the culprit: the ranks are asked who still answers,
and then all of them are ended.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import socket
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors import placement, transports, weights, zero, zero_files
from actors.calls import CallFailed, Calls, Pending
from actors.reference import FrozenReference
from actors.transports import Member, Offer, Published, Sender
from actors.zero import check_overrides
from hapo_async.batch import StepPlan, share_out
from hapo_async.config import Config
from hapo_async.errors import ConfigError, RunError
from hapo_async.learner.learn import Learner, check_needs, needs_of
from hapo_async.learner.progress import Progress
from hapo_async.learner.tally import RankReport, merge
from hapo_async.sequences import Sequence as TokenSequence
from hapo_async.sequences import materialise
from hapo_async.types import Group, Version
from hapo_async.weights import TransferError

__all__ = ["LearnerGroup", "LearnerRank", "check_overrides"]

log = logging.getLogger(__name__)

START_S = 900.0  # loading a model takes longer than training on a batch
PING_S = 5.0  # how long a rank has to say that it is alive, once something went wrong
GRACE_S = 2.0  # how long the other ranks' own errors are waited for
PREFETCH_S = 30.0  # what is not there by then is fetched when the step asks for it


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a rank, of which ``ping`` tells while it runs."""

    @functools.wraps(method)
    def run(self: LearnerRank, *arguments: Any) -> Any:
        with self.progress.during(method.__name__):
            return method(self, *arguments)

    return run


class LearnerRank:
    """One rank. All methods but ``ping`` and ``prefetch`` run in one thread, in the order of the calls.

    needs: "reference" and "value" load a reference model and a critic, for this configuration or a later one.
    """

    def __init__(
        self, rank: int, world_size: int, config: Config, model_path: str, device: str, needs: frozenset[str]
    ) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.rank, self.world_size = rank, world_size
        self.config, self.model_path, self.device, self.needs = config, model_path, device, needs
        self._listener: socket.socket | None = None
        self._senders: dict[str, Sender] = {}
        self.progress = Progress()

    @ray.method(concurrency_group="control")
    def ping(self) -> dict[str, Any]:
        """pid, what the rank is doing and how far it is (``Progress.read``); answered while it computes."""
        return self.progress.read()

    def listen(self) -> tuple[str, int]:
        """Opens the rendezvous on this rank's own node, on no other interface."""
        ip = ray.util.get_node_ip_address()
        self._listener, port = zero.listen(ip)
        return ip, port

    def start(self, ip: str, port: int) -> int:
        """Joins the process group and loads the model. Returns this process's id."""
        c = self.config
        torch.manual_seed(c.seed + self.rank)
        # The driver ends a group that misses its deadline; this one only bounds ranks whose driver is gone.
        timeout_s = max(START_S, c.learner.deadline_s)
        zero.join(zero.Seat(self.rank, self.world_size, ip, port, self.device, timeout_s), self._listener)
        dtype = model_dtype(c, self.device)
        reference = self._reference(dtype) if "reference" in self.needs else None
        self.backend = zero.ZeroBackend(
            self.model_path, c, dtype=dtype, device=self.device, with_value="value" in self.needs
        )
        self.learner = Learner(self.backend, c, reference)
        self.backend.moved = self.progress.move
        for policy in (self.backend.policy, *([reference.policy] if reference else [])):
            self.progress.watch(policy.model)
        return os.getpid()

    def _reference(self, dtype: torch.dtype) -> FrozenReference:
        partitioned = self.config.learner.zero_stage == 3 and self.world_size > 1
        tree = zero.engine_config(self.config, dtype, self.device) if partitioned else None
        return FrozenReference(self.model_path, self.config, dtype=dtype, device=self.device, engine_config=tree)

    @_told
    def step(self, plan: StepPlan) -> RankReport:
        """Fetches the payloads of the plan and trains on it."""
        return self.learner.step(plan, self._sequences(plan))

    @_told
    def holdout(self, plan: StepPlan) -> RankReport:
        """The objective on the plan's groups, without gradient."""
        return self.learner.holdout(plan, self._sequences(plan))

    @_told
    def score(self, sequences: list[TokenSequence]) -> list[np.ndarray]:
        """Log-probs at temperature 1, one array per sequence."""
        return self.learner.score(sequences)

    @_told
    def configure(self, config: Config) -> None:
        """Another algorithm or other settings on the same weights."""
        self.learner.configure(config)
        self.config = config

    def _sequences(self, plan: StepPlan) -> list[list[TokenSequence]]:
        """This rank's sequences of each mini-batch, payloads fetched."""
        groups = [group for mini in plan.minis for group in mini]
        refs = [g.payload for g in groups if g.payload is not None]
        with self.progress.during("step, fetching answers"):
            fetched = ray.get(refs, timeout=self.config.learner.deadline_s)
        payloads: dict[Any, Group] = dict(zip(refs, fetched, strict=True))
        return [
            [
                sequence
                for index, train in enumerate(mini)
                for sequence in materialise(train, payloads.get(train.payload), index=index)
            ]
            for mini in plan.minis
        ]

    def announce(self, version: Version, members: list[Member], transport: str) -> Offer | None:
        """Rank 0, before ``publish``: what ``members`` need to fetch a version while it is gathered. A transport that cannot
        say makes the publish fail, not the learner."""
        try:
            return self._sender(transport).announce(version, self._kind, members)
        except TransferError as error:
            log.warning("version %s cannot be announced: %s", version, error)
            return None

    @ray.method(concurrency_group="control")
    def admit(self, members: list[Member]) -> None:
        """Rank 0: lets more generators fetch what is there."""
        for sender in list(self._senders.values()):
            try:
                sender.admit(members)
            except TransferError as error:  # who is not let in gets a snapshot
                log.warning("%s cannot be let in: %s", ", ".join(m.name for m in members), error)

    @_told
    def publish(self, version: Version, transport: str) -> Published | None:
        """Walks the weights; rank 0 sends them."""
        sender = self._sender(transport) if self.rank == 0 else None
        sent = weights.AdapterView(self.backend) if self.config.learner.lora else self.backend
        return weights.publish(sent, version, self.config.weights.bucket_bytes, sender, self._kind)

    @property
    def _kind(self) -> str:
        return "adapter" if self.config.learner.lora else "full"

    def _sender(self, transport: str) -> Sender:
        if transport in self._senders and self._senders[transport].is_broken:
            self._senders.pop(transport).close()
        if transport not in self._senders:
            address, deadline_s = ray.util.get_node_ip_address(), self.config.weights.deadline_s
            self._senders[transport] = transports.sender(transport, self.device, address, deadline_s)
        return self._senders[transport]

    @ray.method(concurrency_group="data")
    def prefetch(self, refs: list[ray.ObjectRef]) -> int:
        """Brings objects to this rank's node while it computes; how many are there now."""
        return len(ray.wait(refs, num_returns=len(refs), timeout=PREFETCH_S, fetch_local=True)[0])

    @_told
    def sleep(self) -> None:
        """Leaves the device to the generators."""
        self.backend.sleep()

    @_told
    def wake(self) -> None:
        self.backend.wake()

    @_told
    def save(self, folder: str) -> None:
        """Writes ``folder/model`` (Hugging Face, safetensors, tokenizer) and ``folder/state`` (to resume)."""
        root = Path(folder)
        zero_files.save_model(self.backend, root / "model", self.model_path, self.config.weights.bucket_bytes)
        zero_files.save_state(self.backend, root / "state", self.learner.state())

    @_told
    def load(self, folder: str) -> None:
        """Restores what ``save`` wrote."""
        self.learner.load_state(zero_files.load_state(self.backend, Path(folder) / "state"))

    def close(self) -> None:
        for sender in self._senders.values():
            sender.close()
        zero.leave()


def model_dtype(config: Config, device: str) -> torch.dtype:
    name = config.learner.dtype
    return getattr(torch, ("bfloat16" if device == "cuda" else "float32") if name == "auto" else name)


class LearnerGroup:
    """The driver's handle. Any failure breaks it: its ranks are ended, and from then on every call raises RunError."""

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
        self._broken: str | None = None
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
            "concurrency_groups": {"control": 1, "data": 1},
        }
        actor: Any = ray.remote(**settings)(rank_class)
        ranks = [
            actor.options(**slot.options(i), name=f"learner-{os.getpid()}-{id(slot)}-{i}").remote(
                i, count, config, model_path, cluster.device, needs
            )
            for i in range(count)
        ]
        group = cls(config, ranks, slot, needs, cluster.device)
        began = time.monotonic()
        ip, port = (await group._call("listen", [()], START_S, ranks=ranks[:1]))[0]
        pids = await group._call("start", [(ip, port)] * count, START_S)
        log.info("learner: %d ranks ready in %.1f s (pids %s)", count, time.monotonic() - began, pids)
        return group

    async def step(self, plans: Sequence[StepPlan]) -> dict[str, float]:
        """One learner step on one plan per rank; its metrics. ``skipped`` is 1 when no update was applied because none
        was finite, else 0."""
        reports = await self._call("step", [(plan,) for plan in plans], self.config.learner.deadline_s)
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
        """Model and resumable state into ``folder`` (which all ranks must see under this path)."""
        await self._call("save", [(str(folder),)] * len(self.ranks), self.config.learner.deadline_s)

    async def load(self, folder: Path | str) -> None:
        """Resumes from ``folder``. Raises RunError when it was written by another number of ranks."""
        await self._call("load", [(str(folder),)] * len(self.ranks), self.config.learner.deadline_s)

    async def close(self) -> None:
        """Ends all ranks and frees their places."""
        if self._broken is None:
            calls = [self._answer(i, rank, "close", (), PING_S) for i, rank in enumerate(self.ranks)]
            await asyncio.gather(*calls, return_exceptions=True)
            self._end("the learner was closed")
        if self.slot is not None:
            self.slot.release()
            self.slot = None

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
        """The answers of all ranks. On the first failure: finds the culprit, ends all ranks, raises RunError."""
        if self._broken is not None:
            raise RunError(f"learner.{method}: {self._broken}")
        targets = self.ranks if ranks is None else ranks
        tasks = [
            asyncio.ensure_future(self._answer(i, rank, method, args, deadline_s))
            for i, (rank, args) in enumerate(zip(targets, arguments, strict=True))
        ]
        try:
            return list(await asyncio.gather(*tasks))
        except CallFailed:
            why = await self._diagnose(method, tasks)
            self._end(why)
            raise RunError(why) from None
        finally:
            for task in tasks:
                task.cancel()

    async def _answer(self, index: int, rank: Any, method: str, args: tuple[Any, ...], deadline_s: float) -> Any:
        ref = getattr(rank, method).remote(*args)
        return await self._calls.answer(ref, deadline_s, rank_name(index), method)

    async def _diagnose(self, method: str, tasks: Sequence[asyncio.Future[Any]]) -> str:
        """Who failed: ranks that are dead or silent, else the first error that is not a mere broken collective."""
        await asyncio.wait(tasks, timeout=GRACE_S)
        pings = [self._answer(i, rank, "ping", (), PING_S) for i, rank in enumerate(self.ranks)]
        silent = [p for p in await asyncio.gather(*pings, return_exceptions=True) if isinstance(p, CallFailed)]
        if silent:
            return f"learner.{method} failed: " + "; ".join(_state(p) for p in silent)
        errors = [t.exception() for t in tasks if t.done() and not t.cancelled() and t.exception() is not None]
        errors.sort(key=_is_collective)
        return f"learner.{method} failed: {errors[0]}"

    def _end(self, why: str) -> None:
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
