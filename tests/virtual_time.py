"""An event loop whose clock jumps to the next timer: minutes of waiting pass in milliseconds, and always alike."""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Coroutine
from typing import Any

import pytest


class _Selector(selectors.DefaultSelector):
    """Waits by moving the clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        events = super().select(0 if timeout is not None else 5.0)
        if not events and timeout is None:
            raise TimeoutError("every task waits for something that no timer brings")
        if not events and timeout:
            self._clock.now += timeout
        return events


class Clock:
    """``time.monotonic`` of the test; ``now`` may be set forward by hand."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        patch.setattr(time, "monotonic", lambda: self.now)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Selector(self))) as runner:
            return runner.run(work)
