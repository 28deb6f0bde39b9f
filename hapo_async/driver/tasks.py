"""Ending tasks."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

log = logging.getLogger(__name__)

_AGAIN_S = 0.5


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
