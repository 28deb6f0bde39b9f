"""How often something that dies is started again."""

from __future__ import annotations

from collections import deque

MOST, WINDOW_S = 3, 600.0
BACKOFF_S = (1.0, 5.0, 20.0)
"""Before the first, second, third start within the window: what dies at once must not be started in a circle."""


class Budget:
    """Of one actor. Times are ``time.monotonic``."""

    def __init__(self) -> None:
        self._starts: deque[float] = deque()

    def take(self, now: float) -> float | None:
        """Seconds to wait before another start, or None when there were ``MOST`` of them within ``WINDOW_S``."""
        while self._starts and now - self._starts[0] > WINDOW_S:
            self._starts.popleft()
        if len(self._starts) >= MOST:
            return None
        self._starts.append(now)
        return BACKOFF_S[len(self._starts) - 1]
