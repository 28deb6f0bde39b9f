"""From prompt to buffer: issue under the admission rule, follow each group through generator, verifier and gate."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from actors.calls import CallFailed
from hapo_async import gate, inject
from hapo_async.admission import capacity
from hapo_async.algorithms import Algorithm
from hapo_async.buffer import Buffer, Ready
from hapo_async.config import Config
from hapo_async.data import PromptStream
from hapo_async.driver.barren import Barren
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.offline import Offline
from hapo_async.errors import RunError
from hapo_async.ledger import Ledger
from hapo_async.posterior import Posteriors
from hapo_async.types import (
    GateDecision,
    GatedGroup,
    GroupHeader,
    GroupKey,
    GroupRequest,
    Judgement,
    Prompt,
    Sampling,
)

log = logging.getLogger(__name__)

MAX_REFUSALS = 3  # a prompt that engines or verifiers refuse this often is dropped
MAX_LATE = 2  # ... and one that is too late this often


@dataclass
class Flight:
    """A group between issue and buffer. step: the version step it was issued under, a lower bound of its age."""

    prompt: Prompt
    generator: str
    step: int
    started: float
    stage: str = "generating"


@dataclass
class Tally:
    """What happened since the last learner step; ``take`` hands it over and starts afresh."""

    generated_tokens: int = 0
    generate_s: list[float] = field(default_factory=list)
    verify_s: list[float] = field(default_factory=list)
    verdicts: dict[str, int] = field(default_factory=dict)
    late: int = 0


class Sampler:
    """Keeps every generator as busy as the staleness bound allows.

    step follows the learner; ``hold`` stops issuing (an evaluation of a synchronous run); ``posteriors`` is what the
    pooled gate knows of each prompt.
    """

    def __init__(
        self,
        config: Config,
        algorithm: Algorithm,
        options: Mapping[str, Any],
        stream: PromptStream,
        prompts: Mapping[str, Prompt],
        ledger: Ledger,
        buffer: Buffer,
    ) -> None:
        self.config = config
        self.algorithm = algorithm
        self.options = options
        self.stream = stream
        self.prompts = prompts
        self.ledger = ledger
        self.buffer = buffer
        self.step = 0
        self.hold = False
        self.exhausted = False
        self.flights: dict[GroupKey, Flight] = {}
        self.tally = Tally()
        self.offline: Offline | None = None  # the cached answers, of an offline algorithm
        self.posteriors = Posteriors(config.gate.decay)
        self.changed = asyncio.Event()
        self.arrived = asyncio.Event()
        self._retries: deque[tuple[int, str]] = deque(ledger.waiting())
        self._tasks: set[asyncio.Task[None]] = set()
        self._mean_length = config.sampling.max_tokens / 2
        self._error: BaseException | None = None
        self._barren = Barren(config.train.batch_prompts, len(stream))

    def take_tally(self) -> Tally:
        tally, self.tally = self.tally, Tally()
        return tally

    @property
    def drained(self) -> bool:
        """True when the data are used up and nothing is on its way."""
        return self.exhausted and not self._retries and not self.flights

    def wake(self) -> None:
        """Something changed: the issuing loop and whoever waits for arrivals look again."""
        self.changed.set()
        self.arrived.set()

    # ---------------------------------------------------------------- issuing

    async def feed(self, fleet: Fleet, judges: Judges) -> None:
        """Runs until cancelled."""
        while True:
            self.changed.clear()
            fleet.check()
            if not self.hold:
                if self.offline:
                    self._issue_cached(self.offline)
                elif self._demonstrations_ahead:
                    self._issue_demonstrations()
                else:
                    await self._issue(fleet, judges)
            if self.drained:
                self.arrived.set()  # whoever waits for a full batch must make do with what is left
            await self.changed.wait()

    async def _issue(self, fleet: Fleet, judges: Judges) -> None:
        rounds: dict[str, tuple[Generator, list[GroupRequest]]] = {}
        while (generator := self._roomiest(fleet)) is not None and (found := self._next_prompt()) is not None:
            epoch, prompt = found
            assert generator.installed is not None
            key = self.ledger.issue(epoch, prompt.uid)
            sampling = self._sampling(prompt)
            generator.assign(key, sampling.n * int(len(prompt.tokens) + self._mean_length))
            self.flights[key] = Flight(prompt, generator.name, generator.installed.step, time.monotonic())
            rounds.setdefault(generator.name, (generator, []))[1].append(GroupRequest(key, prompt.tokens, sampling))
        for generator, requests in rounds.values():
            self._start(self._dispatch(fleet, judges, generator, requests))

    def _roomiest(self, fleet: Fleet) -> Generator | None:
        """The serving generator with capacity that has the fewest tokens outstanding."""
        roomy = [g for g in fleet.serving if self._capacity(g) > 0]
        return min(roomy, key=lambda g: sum(g.outstanding.values()), default=None)

    def _capacity(self, generator: Generator) -> int:
        if generator.installed is None:
            return 0
        return capacity(
            max_concurrent=self.config.generator.max_concurrent,
            running=len(generator.outstanding),
            max_staleness=self.config.max_staleness,
            lag=self.step - generator.installed.step,
            batch_prompts=self.config.train.batch_prompts,
            # A prompt that waits to be retried is about to be issued: it must not block itself.
            untrained=self.ledger.untrained - self.ledger.to_retry,
        )

    def _next_prompt(self) -> tuple[int, Prompt] | None:
        if self._retries:
            epoch, uid = self._retries.popleft()
            return epoch, self.prompts[uid]
        found = self.stream.next()
        self.exhausted = found is None
        return found

    def _sampling(self, prompt: Prompt) -> Sampling:
        usable = gate.usable_teachers(prompt.teachers)
        # An appended demonstration is one of the N (LUFFY: 7 sampled, 1 teacher).
        n = self.config.sampling.n - (1 if self.algorithm.composition == "append" and usable else 0)
        return Sampling(n, self.config.sampling.max_tokens, self.config.sampling.temperature, seed=self.config.seed)

    @property
    def _demonstrations_ahead(self) -> int:
        """Steps for which demonstrations alone are wanted now; 0 when answers are to be sampled."""
        ahead = self.config.max_staleness + 1
        if self.algorithm.composition == "demonstrations":
            return ahead
        return max(0, min(ahead, self.options.get("sft_steps", 0) - self.step))

    def _issue_demonstrations(self) -> None:
        """What learns from demonstrations alone needs no generator: prompts go straight to the buffer."""
        wanted = self.config.train.batch_prompts * self._demonstrations_ahead
        while self.ledger.untrained - self.ledger.to_retry < wanted:
            if (found := self._next_prompt()) is None:
                return
            epoch, prompt = found
            key = self.ledger.issue(epoch, prompt.uid)
            header = GroupHeader(key, (), (), (), None, None, len(prompt.tokens), "", 0.0)
            self._admit(header, None, prompt, [])

    def _issue_cached(self, offline: Offline) -> None:
        """Cached answers need no generator either. Prompts that the run does not train on are passed over."""
        wanted = self.config.train.batch_prompts * (self.config.max_staleness + 1)
        while self.ledger.untrained - self.ledger.to_retry < wanted and (found := self._next_prompt()):
            epoch, prompt = found
            if not offline.trains(prompt.uid):
                continue
            key = self.ledger.issue(epoch, prompt.uid)
            cached = offline.take(key, prompt)
            self._admit(cached.header, cached.payload, prompt, cached.judgements, cached.logp_ref)

    # ---------------------------------------------------------------- following

    async def _dispatch(self, fleet: Fleet, judges: Judges, generator: Generator, requests: list[GroupRequest]) -> None:
        try:
            await fleet.submit(generator, requests)
        except CallFailed as error:
            fleet.mark_failed(generator, error)
            if not error.gone and len(requests) > 1:
                # All or none: one prompt that the engine refuses must not take its neighbours along.
                for request in requests:
                    self._start(self._dispatch(fleet, judges, generator, [request]))
                return
            for request in requests:
                self._give_back(fleet, generator, request.key, error)
            return
        given_up = [r.key for r in requests if not self.ledger.is_current(r.key)]
        if given_up:
            await fleet.abort({generator.name: given_up})
        for request in requests:
            if request.key not in given_up:
                self._start(self._follow(fleet, judges, generator, request.key))

    async def _follow(self, fleet: Fleet, judges: Judges, generator: Generator, key: GroupKey) -> None:
        flight = self.flights.get(key)
        if flight is None:
            return
        try:
            header, payload = await fleet.collect(generator, key, self.config.generator.deadline_s)
        except CallFailed as error:
            fleet.mark_failed(generator, error)
            self._give_back(fleet, generator, key, error)
            return
        fleet.release(generator, key)
        if not self.ledger.is_current(key):
            return  # given up in the meantime: a late answer is fenced by its attempt
        self._count_generated(header)
        flight.stage = "verifying"
        flight.step = header.oldest.step if header.oldest else flight.step
        began = time.monotonic()
        try:
            judgements = await judges.judge(payload, flight.prompt, len(header.lengths), key)
        except CallFailed as error:
            self._give_back(fleet, generator, key, error)
            return
        self.tally.verify_s.append(time.monotonic() - began)
        for judgement in judgements:
            self.tally.verdicts[judgement.verdict] = self.tally.verdicts.get(judgement.verdict, 0) + 1
        if self.ledger.is_current(key):
            self._admit(header, payload, flight.prompt, judgements)

    def _count_generated(self, header: GroupHeader) -> None:
        tokens = sum(header.lengths)
        self.tally.generated_tokens += tokens
        self.tally.generate_s.append(header.seconds)
        self._mean_length += 0.05 * (tokens / max(1, len(header.lengths)) - self._mean_length)

    def _admit(
        self,
        header: GroupHeader,
        payload: Any,
        prompt: Prompt,
        judgements: list[Judgement],
        logp_ref: tuple[np.ndarray, ...] | None = None,
    ) -> None:
        """Gate, injection and advantage; then the buffer, or ``dropped`` when nothing is left to train on."""
        gated = GatedGroup(header, payload, prompt, tuple(judgements), self._decide(header, prompt, judgements))
        train = inject.compose(
            self.algorithm.composition,
            gated,
            self.algorithm.advantage_for(self.options),
            options=self.options,
            keep=self.algorithm.keep,
            advantage_group=self.config.gate.advantage_group,
            step=self.step,
            teacher=self.config.gate.teacher,
            seed=self.config.seed,
        )
        self.flights.pop(header.key, None)
        if train is None:
            self._drop(header.key, inject.why_nothing(gated, self.options), judgements)
            return
        self._barren.admitted()
        self.ledger.admit(header.key)
        self.buffer.add(Ready(gated, replace(train, logp_ref=logp_ref)))
        self.wake()

    def _drop(self, key: GroupKey, reason: str, judgements: list[Judgement]) -> None:
        """A group without anything to learn from. Raises RunError when there is nothing else for many batches."""
        self.ledger.drop(key, reason)
        self._barren.dropped(reason, judgements)
        self.wake()

    def _decide(self, header: GroupHeader, prompt: Prompt, judgements: list[Judgement]) -> GateDecision:
        """Once for each group, when it is complete."""
        pooled = self.config.gate.decision == "pooled"
        rewards = [j.reward or 0.0 for j in judgements]
        judged = [j.verdict.is_judged for j in judgements]
        decision = gate.decide(
            rewards,
            judged,
            prompt.teachers,
            header.lengths,
            header.answer_steps,
            config=self.config.gate,
            rng_seed=gate.seed_of(header.key, self.config.seed),
            progress=Fraction(self.step, self.config.train.steps),
            past=self.posteriors.before(header.key) if pooled else None,
        )
        if pooled and not decision.is_unverified:
            self.posteriors.record(header.key, decision.successes, decision.judged - decision.successes)
        return decision

    # ---------------------------------------------------------------- giving up

    def _give_back(self, fleet: Fleet, generator: Generator, key: GroupKey, error: CallFailed) -> None:
        """Infrastructure failed: the prompt is issued again. What died with a generator is never charged to the prompt;
        one that is refused again and again is dropped."""
        fleet.release(generator, key)
        if not self.ledger.is_current(key):
            return
        self.flights.pop(key, None)
        blameless = error.gone or error.lost
        tries = self.ledger.retry(key, "lost" if blameless else "refused")
        if blameless or tries < MAX_REFUSALS:
            self._retries.append((key.epoch, key.uid))
        else:
            self.ledger.drop(key, "failed")
            log.error("prompt %s failed %d times, last: %s", key.uid, tries, error)
            if self.ledger.dropped_reasons["failed"] > self.config.train.batch_prompts:
                count = self.ledger.dropped_reasons["failed"]
                raise RunError(f"{count} prompts failed {MAX_REFUSALS} times each; the last: {error}")
        self.wake()

    async def give_up_late(self, fleet: Fleet, keys: list[GroupKey]) -> None:
        """Drops groups that would grow too old: aborted, issued again once, then quarantined (``dropped(late)``)."""
        owners = fleet.owners(keys)
        # The books first: whatever an aborted call brings then belongs to an attempt that is over.
        for key in keys:
            if not self.ledger.is_current(key):
                continue
            self.flights.pop(key, None)
            for generator in fleet.generators:
                if key in generator.outstanding:
                    fleet.release(generator, key)
            if self.ledger.retry(key, "late") >= MAX_LATE:
                self.ledger.drop(key, "late")
            else:
                self._retries.append((key.epoch, key.uid))
            self.tally.late += 1
        self.wake()
        await fleet.abort(owners)

    def reissue(self, groups: list[Ready], reason: str) -> None:
        """Buffered groups that can no longer be trained on are sampled anew."""
        for group in groups:
            self.ledger.retry(group.key, reason)
            self._retries.append((group.key.epoch, group.key.uid))
        self.wake()

    def _start(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._error = self._error or error
            self.wake()

    def check(self) -> None:
        """Raises what a follower raised."""
        if self._error:
            raise self._error

    def oldest_call(self) -> str:
        """Who has kept a group for longest: for the watchdog's sentence."""
        if not self.flights:
            return "nothing is in flight"
        key, flight = min(self.flights.items(), key=lambda item: item[1].started)
        return f"{flight.generator} is {flight.stage} group {key} for {time.monotonic() - flight.started:.0f} s"

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
