"""From prompt to buffer: issue under the admission rule, follow each group through generator, verifier and gate."""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.calls import CallFailed
from hapo_async import gate
from hapo_async.admission import capacity
from hapo_async.algorithms import Algorithm
from hapo_async.buffer import Buffer
from hapo_async.config import Config
from hapo_async.data import PromptStream
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.flights import MOVING, VERIFYING, Flight, Tally
from hapo_async.driver.handover import HandOver
from hapo_async.driver.intake import Intake
from hapo_async.driver.judges import Judges
from hapo_async.driver.offline import Offline
from hapo_async.driver.retries import Retries
from hapo_async.driver.returns import Returns
from hapo_async.ledger import Ledger
from hapo_async.types import GroupHeader, GroupKey, GroupRequest, Judgement, Prompt, Sampling

log = logging.getLogger(__name__)


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
        self.incarnation = 0
        self.hold = False
        self.exhausted = False
        self.flights: dict[GroupKey, Flight] = {}
        self.tally = Tally()
        self.retries = Retries(ledger, config.train.batch_prompts)
        self.intake = Intake(config, algorithm, options, ledger, buffer, len(stream), self.retries)
        self.posteriors = self.intake.posteriors
        self.returns = Returns(config, ledger, buffer, self.flights, self.retries, self._start, self.wake)
        self.handover = HandOver(self.flights, ledger, self.retries, self._sampling, self.wake)
        self.offline: Offline | None = None  # the cached answers, of an offline algorithm
        self.changed = asyncio.Event()
        self.arrived = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._mean_length = config.sampling.max_tokens / 2
        self._blocked_since: float | None = None
        self._error: BaseException | None = None

    def take_tally(self) -> Tally:
        self._clock_the_bound()
        tally, self.tally = self.tally, Tally()
        tally.late, self.returns.given_up = self.returns.given_up, 0
        tally.late_lengths, self.retries.late_lengths = self.retries.late_lengths, Counter()
        return tally

    @property
    def drained(self) -> bool:
        """True when the data are used up and nothing is on its way."""
        return self.exhausted and not self.retries and not self.flights

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
                elif self.demonstrations_ahead:
                    self._issue_demonstrations()
                else:
                    self._issue(fleet, judges)
            self._clock_the_bound()
            if self.drained:
                self.arrived.set()  # whoever waits for a full batch must make do with what is left
            await self.changed.wait()

    def _clock_the_bound(self) -> None:
        now = time.monotonic()
        if self._blocked_since is not None:
            self.tally.blocked_s += now - self._blocked_since
        is_full = self._untrained >= self.config.most_untrained
        is_full = is_full and len(self.buffer) >= self.config.train.batch_prompts
        self._blocked_since = now if is_full and not self.hold else None

    def _issue(self, fleet: Fleet, judges: Judges) -> None:
        """Gives every free place a prompt, each time to the generator with the fewest tokens outstanding. Groups that another
        generator has begun come first."""
        for generator, request in self.handover.place(fleet, self.config.generator.max_concurrent, self._mean_length):
            self._start(self._follow(fleet, judges, generator, request.key, request))
        rounds: dict[str, tuple[Generator, list[GroupRequest]]] = {}
        roomy = self._roomy(fleet)
        while roomy:
            _, place, generator = roomy[0]
            # Every prompt issued takes from all capacities: one that is used up stays so.
            if self._capacity(generator) <= 0:
                heapq.heappop(roomy)
                continue
            if (found := self._next_prompt()) is None:
                break
            epoch, prompt = found
            assert generator.installed is not None
            key = self.ledger.issue(epoch, prompt.uid)
            sampling = self._sampling(prompt)
            generator.assign(key, sampling.n * int(len(prompt.tokens) + self._mean_length))
            self.flights[key] = Flight(prompt, generator.name, generator.installed.step, time.monotonic())
            rounds.setdefault(generator.name, (generator, []))[1].append(GroupRequest(key, prompt.tokens, sampling))
            heapq.heapreplace(roomy, (generator.load, place, generator))
        for generator, requests in rounds.values():
            # Several enter the engine together, in one call; one alone, the usual case, needs no call of its own for that.
            first, *more = requests
            self._start(
                self._dispatch(fleet, judges, generator, requests)
                if more
                else self._follow(fleet, judges, generator, first.key, first)
            )

    def _roomy(self, fleet: Fleet) -> list[tuple[int, int, Generator]]:
        """(tokens outstanding, position, generator) of those that serve and have capacity, as a heap."""
        if self._untrained >= self.config.most_untrained:
            return []  # no capacity even without any lag
        able = [(g.load, place, g) for place, g in enumerate(fleet.generators) if g.serves and self._capacity(g) > 0]
        heap = [entry for entry in able if not entry[2].suspect] or able
        heapq.heapify(heap)
        return heap

    @property
    def _untrained(self) -> int:
        """A prompt that waits to be retried is about to be issued: it must not block itself."""
        return self.ledger.untrained - self.ledger.to_retry

    def _capacity(self, generator: Generator) -> int:
        if generator.installed is None or generator.installed.incarnation < self.incarnation:
            return 0
        return capacity(
            max_concurrent=self.config.generator.max_concurrent,
            running=len(generator.outstanding),
            max_staleness=self.config.max_staleness,
            lag=self.step - generator.installed.step,
            batch_prompts=self.config.train.batch_prompts,
            untrained=self._untrained,
        )

    def _next_prompt(self) -> tuple[int, Prompt] | None:
        if self.retries:
            epoch, uid = self.retries.pop()
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
    def demonstrations_ahead(self) -> int:
        """Steps for which demonstrations alone are wanted now; 0 when answers are to be sampled."""
        ahead = self.config.max_staleness + 1
        if self.algorithm.composition == "demonstrations":
            return ahead
        return max(0, min(ahead, self.options.get("sft_steps", 0) - self.step))

    def _issue_demonstrations(self) -> None:
        """What learns from demonstrations alone needs no generator: prompts go straight to the buffer."""
        wanted = self.config.train.batch_prompts * self.demonstrations_ahead
        while self._untrained < wanted:
            if (found := self._next_prompt()) is None:
                return
            epoch, prompt = found
            key = self.ledger.issue(epoch, prompt.uid)
            header = GroupHeader(key, (), (), (), None, None, len(prompt.tokens), "", 0.0)
            self._admit(header, None, prompt, [])

    def _issue_cached(self, offline: Offline) -> None:
        """Cached answers need no generator either. Prompts that the run does not train on are passed over."""
        while self._untrained < self.config.most_untrained and (found := self._next_prompt()):
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
            for key in given_up:
                fleet.release(generator, key)
        for request in requests:
            if request.key not in given_up:
                self._start(self._follow(fleet, judges, generator, request.key))

    async def _follow(
        self, fleet: Fleet, judges: Judges, generator: Generator, key: GroupKey, request: GroupRequest | None = None
    ) -> None:
        """request: where the group has not been submitted yet."""
        flight = self.flights.get(key)
        if flight is None:  # given up before it began
            fleet.release(generator, key)
            return
        try:
            deadline_s = self.config.generator.deadline_s
            if request:
                header, payload = await fleet.sample(generator, request, deadline_s)
            else:
                header, payload = await fleet.collect(generator, key, deadline_s)
        except CallFailed as error:
            fleet.mark_failed(generator, error)
            self._give_back(fleet, generator, key, error)
            return
        fleet.release(generator, key)
        if not self.ledger.is_current(key):
            return  # given up in the meantime: a late answer is fenced by its attempt
        self._count_generated(header)
        flight.stage, flight.lengths = VERIFYING, header.lengths
        flight.step = header.oldest.step if header.oldest else flight.step
        began = time.monotonic()
        try:
            judgements = await judges.judge(payload, flight.prompt, len(header.lengths), key)
        except CallFailed as error:
            self._give_back(fleet, generator, key, error)
            return
        self.tally.verify_s.append(time.monotonic() - began)
        self.tally.verdicts.update(word for judgement in judgements for word in judgement.tally)
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
        self.flights.pop(header.key, None)
        if self.returns.is_discarded(header):
            return
        try:
            self.intake.admit(header, payload, prompt, judgements, self.step, logp_ref)
        finally:
            self.wake()

    # ---------------------------------------------------------------- giving up

    def _give_back(self, fleet: Fleet, generator: Generator, key: GroupKey, error: CallFailed) -> None:
        """Infrastructure failed: the prompt is issued again, a bounded number of times."""
        fleet.release(generator, key)
        flight = self.flights.get(key)
        if not self.ledger.is_current(key) or (flight and flight.stage == MOVING):
            return
        self.flights.pop(key, None)
        self.retries.failed(key, self.step + 1, error)
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
