"""Ending tasks, and waiting for a disk no longer than a deadline."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from hapo_async.errors import RunError

log = logging.getLogger(__name__)

T = TypeVar("T")

_AGAIN_S = 0.5


async def in_time(deadline_s: float, late: str, function: Callable[..., T], *arguments: Any) -> T:
    """What a function returns that reads or writes files, in a thread. late: what to say when that takes longer than
    ``learner.deadline_s``. Raises RunError then."""
    try:
        async with asyncio.timeout(deadline_s):
            return await asyncio.to_thread(function, *arguments)
    except TimeoutError:
        raise RunError(f"{late} within {deadline_s:.0f} s (learner.deadline_s)") from None


async def end(*tasks: asyncio.Task[Any], limit_s: float = 15.0) -> None:
    """Cancels tasks and waits until they are over, at most ``limit_s``; what they raise is not looked at.

    They are cancelled again and again: a task that waits with a timeout may lose a cancellation that comes at the very
    moment when what it waits for is done.
    """
    pending = {task for task in tasks if not task.done()}
    clock = asyncio.get_running_loop()
    deadline = clock.time() + limit_s
    while pending and clock.time() < deadline:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=_AGAIN_S)
    for task in pending:
        log.error("%s does not end", task.get_name())
