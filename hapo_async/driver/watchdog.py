"""Names whoever blocks the run: the actor, what it was doing, for how long, and where everything else waits.

Every actor is asked how far it is, once in a third of ``run.alarms.silence_s``, with a deadline. One that has work is

    busy      it answers, and what it counts (tokens, verdicts, layers computed) changes
    stalled   it answers, and nothing of that has changed for silence_s (a verifier: nor for verifier.timeout_s)
    frozen    it has not even answered for silence_s

and one without work is none of them. When nothing of anything moves though work is left, the run itself is *blocked*, and
the oldest pending call is named. One alarm for one incident, at the latest silence_s after the last sign of life, and
another line when it is over. ``watchdog.jsonl`` holds each with the queues at that moment. It only names: nobody is
restarted here.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from actors.calls import CallFailed, Pending
from actors.learner import LearnerGroup, rank_name
from hapo_async.buffer import Buffer
from hapo_async.config import Config
from hapo_async.driver import queues
from hapo_async.driver.fleet import Fleet, Generator
from hapo_async.driver.judges import Judges
from hapo_async.driver.pulses import Actor, Incident, Pulse, Reading
from hapo_async.driver.sampling import Sampler
from hapo_async.driver.supervision import Supervision
from hapo_async.files import append_row
from hapo_async.ledger import Ledger
from hapo_async.words import plural

log = logging.getLogger(__name__)

FILE = "watchdog.jsonl"
ASKED_IN_SILENCE = 3  # calls to one actor in silence_s, at most
TICKS_BETWEEN = 4  # looks at the clock between two of them
OWN_WORK = 10  # times silence_s that the driver may take for something that nothing shows
HEARTBEATS = ("stats", "ping")


class Watchdog:
    """say: prints a line for people. ``alarms`` counts them all."""

    def __init__(
        self,
        config: Config,
        fleet: Fleet,
        judges: Judges,
        learner: LearnerGroup,
        sampler: Sampler,
        buffer: Buffer,
        ledger: Ledger,
        run_dir: Path,
        say: Callable[[str], None],
        supervision: Supervision | None = None,
    ) -> None:
        self.supervision = supervision  # nothing is done about anybody
        self.fleet, self.judges, self.learner = fleet, judges, learner
        self.sampler, self.buffer, self.ledger = sampler, buffer, ledger
        self.path = run_dir / FILE
        self.say = say
        self.alarms = 0
        self.silence_s = float(config.run.alarms["silence_s"])
        self._beat_s = self.silence_s / ASKED_IN_SILENCE
        self._judgement_s = config.verifier.timeout_s + self._beat_s  # then a worker is killed, and that counts
        self._tick_s = self._beat_s / TICKS_BETWEEN
        self._install_s = config.weights.deadline_s + self._beat_s  # then the install has failed
        self._pulses: dict[str, Pulse] = {}
        self._seen: Any = None  # the driver's own progress
        self._moved = time.monotonic()  # ... and when it last changed
        self._blocked: Incident | None = None
        self._own_work = ""
        self._taken = 0

    def take(self) -> dict[str, float]:
        """Metrics of what happened since the last call."""
        new, self._taken = self.alarms - self._taken, self.alarms
        return {"watchdog/alarms": float(new)}

    def reading(self, name: str) -> Reading | None:
        """An actor's last answer."""
        pulse = self._pulses.get(name)
        return pulse.reading if pulse else None

    @contextlib.contextmanager
    def during(self, what: str) -> Iterator[None]:
        """Inside, the driver does something by itself that nothing else shows: the run is not blocked for a while."""
        before, self._own_work, self._moved = self._own_work, what, time.monotonic()
        try:
            yield
        finally:
            self._own_work, self._moved = before, time.monotonic()

    async def run(self) -> None:
        """Until cancelled. What goes wrong here ends it with a word, and never the run."""
        try:
            last = time.monotonic()
            while True:
                await asyncio.sleep(self._tick_s)
                now = time.monotonic()
                self._overslept(now - last - self._tick_s, now)
                self._look(now)
                last = now
        except Exception as error:
            log.exception("the watchdog failed")
            self.say(f"watchdog: it failed and watches no longer ({type(error).__name__}: {error})")
        finally:
            for pulse in self._pulses.values():
                if pulse.call is not None:
                    pulse.call.cancel()

    # ---------------------------------------------------------------- listening

    def _look(self, now: float) -> None:
        self._know(now)
        work = self._work()
        for pulse in self._pulses.values():
            self._ask(pulse, now)
            self._judge(pulse, work.get(pulse.actor.name), now)
        self._judge_run(work, now)

    def _know(self, now: float) -> None:
        """New actors are watched from now on, those out of service no longer."""
        actors = {actor.name: actor for actor in self._actors()}
        for name in [n for n in self._pulses if n not in actors]:
            pulse = self._pulses.pop(name)
            if pulse.call is not None:
                pulse.call.cancel()
            if pulse.incident is not None:
                self._over(pulse.incident, "is out of service", now)
        for name, actor in actors.items():
            if name not in self._pulses:
                self._pulses[name] = Pulse(actor, now)
            self._pulses[name].actor = actor  # one that has died may have been replaced

    def _actors(self) -> Iterator[Actor]:
        for generator in self.fleet.alive:
            yield Actor(generator.name, functools.partial(self._ask_generator, generator))
        for name in self.judges.names:
            yield Actor(name, functools.partial(self._ask_verifier, name), patience_s=self._judgement_s)
        for index in range(len(self.learner.ranks)):
            yield Actor(rank_name(index), functools.partial(self._ask_rank, index), team="learner")

    async def _ask_generator(self, generator: Generator, deadline_s: float) -> Reading:
        s = await self.fleet.stats(generator, deadline_s)
        applying = bool(s.get("applying"))
        doing = f"{plural(s['running_groups'], 'group')} running, version {s['version']}"
        doing += ", installing another" if applying else ""
        progress = (s["tokens"], s["version"], s.get("received"), applying)
        children = tuple(s.get("engine_pids", ()))
        return Reading(progress, doing, s["pid"], self._install_s if applying else 0.0, children)

    async def _ask_verifier(self, name: str, deadline_s: float) -> Reading:
        s = await self.judges.stats(name, deadline_s)
        doing, children = f"judging {s['waiting']} answers", tuple(s.get("worker_pids", ()))
        return Reading((s["judged"], s["workers_started"]), doing, s["pid"], children=children)

    async def _ask_rank(self, index: int, deadline_s: float) -> Reading:
        s = await self.learner.ping(index, deadline_s)
        doing = f"in {s['doing']} for {s['doing_s']:.0f} s" if s["doing"] else "idle"
        return Reading(s["moved"], doing, s["pid"])

    def _ask(self, pulse: Pulse, now: float) -> None:
        """One call at a time, and not too often. Raises what a heartbeat ran into, other than silence."""
        if pulse.call is not None:
            if not pulse.call.done():
                return
            pulse.call.result()
        if now - pulse.asked >= self._beat_s - self._tick_s / 2:
            pulse.asked = now
            pulse.call = asyncio.create_task(self._hear(pulse))

    async def _hear(self, pulse: Pulse) -> None:
        try:
            reading = await pulse.actor.ask(self.silence_s)
        except CallFailed as error:
            if not error.gone:  # it answers, if with a refusal
                pulse.answered = time.monotonic()
            return
        now = time.monotonic()
        pulse.hear(reading, now)
        self._judge(pulse, self._work().get(pulse.actor.name), now)

    def _work(self) -> dict[str, Pending]:
        """The oldest pending call of each actor that has one."""
        out: dict[str, Pending] = {}
        for call in self._calls():
            if call.actor not in out or call.since < out[call.actor].since:
                out[call.actor] = call
        return out

    def _calls(self) -> list[Pending]:
        calls = [*self.fleet.calls(), *self.judges.calls(), *self.learner.calls()]
        return [call for call in calls if call.method not in HEARTBEATS]

    # ---------------------------------------------------------------- judging

    def _judge(self, pulse: Pulse, work: Pending | None, now: float) -> None:
        """Raises or ends the actor's incident. work: its oldest pending call."""
        incident = pulse.incident
        state = incident.state if incident else ""
        if incident and state == "frozen" and pulse.answered > incident.since:
            pulse.incident = None
            self._over(incident, "answers again", now)
        elif incident and state == "stalled" and (work is None or pulse.moved > incident.since):
            pulse.incident = None
            self._over(incident, "gets on" if work else "has nothing to do any more", now)
        elif work is not None:
            limit_s = self.silence_s - self._tick_s
            silent, still = max(pulse.answered, work.since), max(pulse.moved, work.since)
            is_still = now - still >= max(limit_s, pulse.patience_s) and pulse.unmoved > 1
            if now - silent >= limit_s and state != "frozen":
                pulse.incident = self._name(pulse, "frozen", silent, now)
            elif is_still and not state and not self._silent(pulse.actor.team, now) and not self._is_starting(pulse):
                pulse.incident = self._name(pulse, "stalled", still, now)
        if pulse.incident is not None and self.supervision is not None:
            self.supervision.lasting(pulse.incident, now)

    def _is_starting(self, pulse: Pulse) -> bool:
        """Nothing shows how far a learner is that loads its model."""
        return pulse.actor.team == "learner" and self.supervision is not None and self.supervision.restarting()

    def _silent(self, team: str | None, now: float) -> list[str]:
        """The members of a team (None: all actors) that have been asked and have not answered for a while."""
        overdue = [p.actor for p in self._pulses.values() if now - p.answered > 1.5 * self._beat_s]
        return [actor.name for actor in overdue if team is None or (team and actor.team == team)]

    def _name(self, pulse: Pulse, state: str, since: float, now: float) -> Incident:
        name, reading = pulse.actor.name, pulse.reading
        mine = sorted((c for c in self._calls() if c.actor == name), key=lambda c: c.since)
        doing = f"calls pending: {len(mine)}, the oldest: {queues.describe(mine[0], self.sampler, now)}"
        doing += f"; at its last answer: {reading.doing}" if reading else ""
        others = [other for other in self._silent(None, now) if other != name]
        doing += f"; silent as well: {', '.join(others[:8])}" if others else ""
        incident = Incident(name, state, since)
        self._alarm(incident, doing, now, reading.pid if reading else None)
        if self.supervision is not None:
            self.supervision.doubt(incident)
        return incident

    def _judge_run(self, work: dict[str, Pending], now: float) -> None:
        """Nothing moves though there is work, and no actor is to blame."""
        seen = (self.ledger.counts(), self.sampler.step, [g.installed for g in self.fleet.generators])
        if seen != self._seen:
            self._seen, self._moved = seen, now
        since = max([self._moved, *(p.seen for p in self._pulses.values())])
        is_idle = not work and not self.ledger.untrained and self.sampler.drained
        limit_s = self.silence_s * OWN_WORK if self._own_work else self.silence_s
        limit_s += self._beat_s if work else -self._tick_s  # an actor with work is named first, if it is to blame
        patience = [p.patience_s for p in self._pulses.values() if p.actor.name in work]
        is_still = not is_idle and now - since >= max([limit_s, *patience])
        if self._blocked is not None:
            if not is_still:
                self._over(self._blocked, "gets on", now)
                self._blocked = None
        elif is_still and not any(p.incident for p in self._pulses.values()):
            oldest = min(work.values(), key=lambda call: call.since, default=None)
            doing = self._own_work or "no call is pending"
            if oldest is not None:
                doing = f"the oldest pending call: {oldest.actor}: {queues.describe(oldest, self.sampler, now)}"
            self._blocked = Incident("the run", "blocked", since)
            self._alarm(self._blocked, doing, now)

    def _overslept(self, late_s: float, now: float) -> None:
        """While the driver itself stood still, it heard nobody: that is nobody else's silence."""
        if late_s < self._beat_s / 2:
            return
        for pulse in self._pulses.values():
            pulse.shift(late_s)
        self._moved += late_s
        if late_s >= self.silence_s:
            incident = Incident("the driver", "stalled", now - late_s)
            self._alarm(incident, self._own_work or "its event loop did not come round", now)
            self._over(incident, "gets on", now)

    # ---------------------------------------------------------------- telling

    def _alarm(self, incident: Incident, doing: str, now: float, pid: int | None = None) -> None:
        self.alarms += 1
        how = {"frozen": "does not answer", "stalled": "answers but does not get on", "blocked": "does not get on"}
        who = f"{incident.who} (pid {pid})" if pid else incident.who
        silent_s = now - incident.since
        self.say(f"watchdog: {who} is {incident.state}: it {how[incident.state]}, for {silent_s:.3g} s; {doing}.")
        snapshot = queues.snapshot(self._calls(), self.fleet, self.sampler, self.buffer, self.ledger, now)
        told = {
            name: {"answered_s": now - p.answered, "moved_s": now - p.moved, "doing": p.reading and p.reading.doing}
            for name, p in self._pulses.items()
        }
        self._write(incident, now, {"event": "alarm", "doing": doing, "pid": pid, "actors": told, "queues": snapshot})

    def _over(self, incident: Incident, how: str, now: float) -> None:
        if self.supervision is not None:
            self.supervision.trust(incident.who)
        self._moved = max(self._moved, now)
        self.say(f"watchdog: {incident.who} {how}, after {now - incident.since:.3g} s.")
        self._write(incident, now, {"event": "over", "how": how})

    def _write(self, incident: Incident, now: float, row: dict[str, Any]) -> None:
        clock, silent_s = time.time(), now - incident.since
        head = {"time": clock, "who": incident.who, "state": incident.state, "since": clock - silent_s}
        append_row(self.path, {**head, "silent_s": silent_s, **row})
