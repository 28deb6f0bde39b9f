"""Waiting for remote calls: every one has a deadline, and every failure names who failed."""

from __future__ import annotations

import asyncio
import itertools
import time
from dataclasses import dataclass
from typing import Any

import ray

from hapo_async.engine import EngineDead
from hapo_async.errors import RunError
from hapo_async.types import GroupKey


class CallFailed(RunError):
    """A remote call that brought no result.

    gone: the actor is dead or silent, rather than that it raised. lost: an object that the call needed died with its
    owner; nobody who answers the call is to blame.
    """

    def __init__(self, who: str, why: str, gone: bool, lost: bool = False) -> None:
        super().__init__(f"{who}: {why}")
        self.who = who
        self.gone = gone
        self.lost = lost


@dataclass(frozen=True)
class Pending:
    """A remote call that has not been answered. since: ``time.monotonic``. key: the group that it is about, if one."""

    actor: str
    method: str
    since: float
    key: GroupKey | None = None


class Calls:
    """Remote calls with deadlines, and which of them are still waited for."""

    def __init__(self) -> None:
        self._pending: dict[int, Pending] = {}
        self._numbers = itertools.count()

    def pending(self) -> list[Pending]:
        """Oldest first."""
        return list(self._pending.values())

    async def answer(
        self, ref: ray.ObjectRef, deadline_s: float, who: str, method: str, key: GroupKey | None = None
    ) -> Any:
        """``answer``, counted as pending meanwhile."""
        number = next(self._numbers)
        self._pending[number] = Pending(who, method, time.monotonic(), key)
        try:
            return await answer(ref, deadline_s, who)
        finally:
            del self._pending[number]


async def answer(ref: ray.ObjectRef, deadline_s: float, who: str) -> Any:
    """The result of a call. Raises CallFailed after ``deadline_s``, when the actor is dead, or when the call raised.

    A call on a frozen actor raises nothing by itself, hence the deadline.
    """
    try:
        async with asyncio.timeout(deadline_s):
            return await ref
    except ray.exceptions.ObjectLostError as error:
        raise CallFailed(
            who, f"an object that it needs is lost ({type(error).__name__})", gone=False, lost=True
        ) from error
    except ray.exceptions.RayTaskError as error:
        cause = getattr(error, "cause", None) or error
        # An engine that died under a living actor is as gone as the actor: it exits right after.
        raise CallFailed(who, f"{type(cause).__name__}: {cause}", gone=isinstance(cause, EngineDead)) from error
    except TimeoutError:  # after those of Ray's errors that are one: a call that timed out in its actor was answered
        raise CallFailed(who, f"no answer within {deadline_s:.0f} s", gone=True) from None
    except ray.exceptions.RayError as error:  # the actor, its worker or its node died, or was killed for memory
        raise CallFailed(who, f"died ({type(error).__name__})", gone=True) from error
