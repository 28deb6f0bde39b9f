"""``hapo-async scale``: requests to a live run for more or fewer generators and verifiers, met one after the other."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from hapo_async.config import Config
from hapo_async.control import Desk, Request
from hapo_async.driver.judges import Judges
from hapo_async.driver.upkeep import HandOver, Note, Upkeep
from hapo_async.errors import RunError

log = logging.getLogger(__name__)

POLL_S = 1.0
LENT_S = 0.5  # how often it looks whether a generator that an evaluation has is back

Outcome = Literal["", "done", "failed"]


class Scaler:
    """hand_over: ends what a generator samples and has it continued elsewhere. note: takes events. changed: is given what
    ``status.json`` says of the last request, whenever that changes."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        upkeep: Upkeep,
        judges: Judges,
        hand_over: HandOver,
        note: Note,
        changed: Callable[[dict[str, Any]], None] = lambda _: None,
    ) -> None:
        self.config, self.run_dir = config, run_dir
        self.upkeep, self.judges = upkeep, judges
        self._hand_over, self._note, self._changed = hand_over, note, changed
        self._lines: list[str] = []
        self._desk: Desk | None = None

    async def run(self) -> None:
        """Until cancelled. What goes wrong here ends no run."""
        refuses = ""
        if self.config.generator.placement == "colocated":
            refuses = (
                "generator.placement=colocated: the generators share the learner's places, so their number is fixed. Stop the "
                "run and continue it with another generator.count."
            )
        try:
            self._desk = desk = Desk(self.run_dir, refuses)
        except OSError as error:
            log.error("this run takes no requests: %s", error)
            return
        try:
            while True:
                if request := desk.take():
                    await self.meet(request)
                await asyncio.sleep(POLL_S)
        finally:
            desk.close()

    async def meet(self, request: Request) -> None:
        """Does what is asked and says how it went."""
        self._lines.clear()
        before = (self.upkeep.count, len(self.judges.members))
        try:
            failures = await self._meet(request)
        except asyncio.CancelledError:
            self._tell(request, "the run ends", "failed")
            raise
        except Exception as error:
            log.exception("a request to scale failed")
            failures = [f"{type(error).__name__}: {error}"]
        after = (self.upkeep.count, len(self.judges.members))
        names = ("generators", "verifiers")
        changes = [f"{name} {a} → {b}" for name, a, b in zip(names, before, after, strict=True) if a != b]
        counts = f"{after[0]} generators, {after[1]} verifiers"
        if changes:
            self._note("scaled", ", ".join(changes), f"scaled: {', '.join(changes)}")
        if failures:
            self._note("refused", "scaling failed", f"scaling failed: {'; '.join(failures)}")
            self._tell(request, f"{counts}: {'; '.join(failures)}", "failed")
        else:
            self._tell(request, counts, "done")

    def _tell(self, request: Request, line: str, outcome: Outcome = "") -> None:
        self._lines.append(line)
        if self._desk is not None:
            self._desk.answer(request, self._lines, outcome)
        wanted = {k: n for k, n in (("generators", request.generators), ("verifiers", request.verifiers)) if n}
        self._changed({"wanted": wanted, "state": outcome or "under way", "line": line, "time": time.time()})

    async def _meet(self, request: Request) -> list[str]:
        """What could not be done."""
        deadline = time.monotonic() + request.wait_s
        both = await asyncio.gather(self._generators(request, deadline), self._verifiers(request, deadline))
        return [failure for failures in both for failure in failures]

    # ---------------------------------------------------------------- generators

    async def _generators(self, request: Request, deadline: float) -> list[str]:
        wanted, count = request.generators, self.upkeep.count
        if wanted is None or wanted == count:
            return []
        if wanted > count:
            self._tell(request, f"starting {wanted - count} generators")
            return await self._all([self._one_more(request, deadline) for _ in range(wanted - count)])
        return await self._fewer(request, deadline, wanted)

    async def _one_more(self, request: Request, deadline: float) -> None:
        name = await self.upkeep.grow(max(1.0, deadline - time.monotonic()))
        self._tell(request, f"{name} serves")

    async def _fewer(self, request: Request, deadline: float, wanted: int) -> list[str]:
        """One that an evaluation has cannot leave, nor can the last that serves: it waits for them."""
        failures: list[str] = []
        while not failures and (count := self.upkeep.count) > wanted:
            if leaving := self.upkeep.victims(count - wanted):
                names = ", ".join(g.name for g in leaving)
                self._tell(request, f"{names}: no new groups; {request.drain_deadline_s:g} s for those that are there")
                failures += await self._all([self._one_less(request, generator) for generator in leaving])
            elif time.monotonic() >= deadline:
                failures.append(f"{count - wanted} cannot leave: an evaluation has them, or nobody else would serve")
            else:
                await asyncio.sleep(LENT_S)
        return failures

    async def _one_less(self, request: Request, generator: Any) -> None:
        left = await self.upkeep.retire(generator, request.drain_deadline_s, self._hand_over)
        if left.stays:
            raise RunError(f"{left.name} stays: {left.stays}")
        handed = f"; {left.continued} groups go on elsewhere" if left.continued else ""
        handed += f"; {left.again} start again" if left.again else ""
        self._tell(request, f"{left.name} has left{handed}")

    # ---------------------------------------------------------------- verifiers

    async def _verifiers(self, request: Request, deadline: float) -> list[str]:
        members = self.judges.members
        wanted = len(members) if request.verifiers is None else request.verifiers
        if wanted > len(members):
            self._tell(request, f"starting {wanted - len(members)} verifiers")
            return await self._all([self._verifier_more(request, deadline) for _ in range(wanted - len(members))])
        return await self._all([self._verifier_less(request, name) for name in members[wanted:]])

    async def _verifier_more(self, request: Request, deadline: float) -> None:
        try:
            async with asyncio.timeout(max(1.0, deadline - time.monotonic())):
                name = await self.judges.grow()
        except TimeoutError:
            raise RunError("a verifier was not ready in time") from None
        self._tell(request, f"{name} serves")

    async def _verifier_less(self, request: Request, name: str) -> None:
        if not await self.judges.retire(name, request.drain_deadline_s):
            raise RunError(f"{name} stays: it is the last one")
        self._tell(request, f"{name} has left")

    @staticmethod
    async def _all(work: list[Any]) -> list[str]:
        """Runs everything beside each other; what failed, in words. What is neither RunError nor cancellation is raised."""
        running = [asyncio.ensure_future(each) for each in work]
        try:
            results = await asyncio.gather(*running, return_exceptions=True)
        finally:
            for task in running:
                task.cancel()
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, RunError):
                raise result
        return [str(result) for result in results if isinstance(result, RunError)]
