"""One rank of the learner, as a Ray actor: DeepSpeed's process group, the training step, and the walk over the weights."""

from __future__ import annotations

import functools
import logging
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch

from actors import transports, weights, zero, zero_files
from actors.reference import FrozenReference
from actors.transports import Member, Offer, Published, Sender
from hapo_async import secrets
from hapo_async.batch import StepPlan
from hapo_async.config import Config
from hapo_async.learner.blame import LOST, Blame
from hapo_async.learner.learn import Learner
from hapo_async.learner.progress import Progress
from hapo_async.learner.tally import RankReport
from hapo_async.sequences import Sequence as TokenSequence
from hapo_async.sequences import materialise
from hapo_async.types import Group, GroupKey, Version
from hapo_async.weights import TransferError

log = logging.getLogger(__name__)

START_S = 900.0  # loading a model takes longer than training on a batch
FETCH_AGAIN_S = 5.0  # for the other answers, once one is known to be lost
PREFETCH_S = 30.0  # what is not there by then is fetched when the step asks for it


def _told(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a rank, of which ``ping`` tells while it runs."""

    @functools.wraps(method)
    def run(self: LearnerRank, *arguments: Any) -> Any:
        with self.progress.during(method.__name__):
            return method(self, *arguments)

    return run


class LearnerRank:
    """One rank. All methods but ``ping``, ``prefetch`` and ``write`` run in one thread, in the order of the calls.

    needs: "reference" and "value" load a reference model and a critic, for this configuration or a later one.
    """

    def __init__(
        self, rank: int, world_size: int, config: Config, model_path: str, device: str, needs: frozenset[str]
    ) -> None:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        secrets.learn(config.model_dump())
        self.rank, self.world_size = rank, world_size
        self.config, self.model_path, self.device, self.needs = config, model_path, device, needs
        self._listener: socket.socket | None = None
        self._senders: dict[str, Sender] = {}
        self._captured: zero_files.Captured | None = None
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
        return self.learner.step(plan, *self._sequences(plan))

    @_told
    def holdout(self, plan: StepPlan) -> RankReport:
        """The objective on the plan's groups, without gradient."""
        return self.learner.holdout(plan, self._sequences(plan)[0])

    @_told
    def score(self, sequences: list[TokenSequence]) -> list[np.ndarray]:
        """Log-probs at temperature 1, one array per sequence."""
        return self.learner.score(sequences)

    @_told
    def configure(self, config: Config) -> None:
        """Another algorithm or other settings on the same weights."""
        self.learner.configure(config)
        self.config = config

    def _sequences(self, plan: StepPlan) -> tuple[list[list[TokenSequence]], list[Blame]]:
        """This rank's sequences of each mini-batch, payloads fetched, and the groups whose payload is lost, which are left
        out."""
        groups = [group for mini in plan.minis for group in mini if group.payload is not None]
        with self.progress.during("step, fetching answers"):
            fetched = _fetch([g.payload for g in groups], self.config.learner.deadline_s)
        payloads: dict[GroupKey, Group] = {
            g.key: payload for g, payload in zip(groups, fetched, strict=True) if payload is not None
        }
        lost = {g.key for g in groups} - payloads.keys()
        minis = [
            [
                sequence
                for index, train in enumerate(mini)
                if train.key not in lost
                for sequence in materialise(train, payloads.get(train.key), index=index)
            ]
            for mini in plan.minis
        ]
        return minis, [Blame(key, LOST) for key in sorted(lost)]

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
    def capture(self, folder: str) -> None:
        """Copies what belongs to this step boundary to host memory, for ``write``."""
        self._captured = None
        stretch_bytes = self.config.weights.bucket_bytes
        self._captured = zero_files.capture(self.backend, Path(folder), stretch_bytes, self.learner.state())

    @ray.method(concurrency_group="files")
    def write(self) -> zero_files.Written:
        """Writes ``folder/model`` (Hugging Face, safetensors, tokenizer) and ``folder/state`` (to resume) of what ``capture``
        copied, while the rank goes on."""
        captured, self._captured = self._captured, None
        assert captured is not None, "capture comes first"
        with self.progress.beside():
            return zero_files.write(captured, self.backend, self.model_path)

    @_told
    def load(self, folder: str) -> None:
        """Restores what ``write`` wrote."""
        self.learner.load_state(zero_files.load_state(self.backend, Path(folder) / "state"))

    def close(self) -> None:
        for sender in self._senders.values():
            sender.close()
        zero.leave()


def model_dtype(config: Config, device: str) -> torch.dtype:
    name = config.learner.dtype
    return getattr(torch, ("bfloat16" if device == "cuda" else "float32") if name == "auto" else name)


def _fetch(refs: list[Any], deadline_s: float) -> list[Group | None]:
    """What is behind the references, None where it died with its node. Raises ray's GetTimeoutError."""
    try:
        return list(ray.get(refs, timeout=deadline_s))
    except ray.exceptions.ObjectLostError:
        at_hand = set(ray.wait(refs, num_returns=len(refs), timeout=FETCH_AGAIN_S)[0])
        return [_fetch_one(ref) if ref in at_hand else None for ref in refs]


def _fetch_one(ref: Any) -> Group | None:
    try:
        group: Group = ray.get(ref, timeout=FETCH_AGAIN_S)
        return group
    except (ray.exceptions.ObjectLostError, ray.exceptions.GetTimeoutError):
        return None
