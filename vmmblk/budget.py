"""Bounds on what others can cause: what they can have logged, how long the transport waits, what memory they take.

Pure: whoever asks brings the time.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import deque
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging
    from collections.abc import AsyncIterator, Callable

__all__ = ["DrainBudget", "LogBudget", "Patience", "Room"]


class LogBudget:
    """How often something that a guest can cause may be logged: ``burst`` times, then once in ``seconds``."""

    def __init__(self, burst: int = 10, seconds: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._seconds = seconds
        self._clock = clock
        self._tokens = float(burst)
        self._last = clock()
        self.suppressed = 0
        """Messages swallowed since the last that was allowed."""

    def allows(self) -> bool:
        """Whether to log now."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._last) / self._seconds)
        self._last = now
        if self._tokens < 1:
            self.suppressed += 1
            return False
        self._tokens -= 1
        return True

    def log(
        self, logger: logging.Logger, level: int, message: str, *arguments: object, cause: BaseException | None = None
    ) -> None:
        """Log a message, with the traceback of ``cause``, unless there were too many; and tell of those swallowed."""
        if self.allows():
            also = f" ({self.suppressed} more were not logged)" if self.suppressed else ""
            self.suppressed = 0
            logger.log(level, message + also, *arguments, exc_info=cause)


class DrainBudget:
    """How long a drain may take: ``limit`` seconds in all for drains in a row; time between them is earned back."""

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self._spent = 0.0
        self._began = 0.0
        self._ended = float("-inf")

    def begin(self, now: float) -> float:
        """A drain begins; returns when it must be over."""
        self._spent = max(0.0, self._spent - (now - self._ended))
        self._began = now
        return now + self.limit - self._spent

    def end(self, now: float) -> None:
        """It is over."""
        self._spent = min(self.limit, self._spent + now - self._began)
        self._ended = now


class Patience:
    """How long to look for more before sleeping: longer when something came soon after, less when it was in vain.

    All in nanoseconds.  ``most`` bounds it, None is for ever; without ``adaptive`` it is that always.
    """

    _LEAST = 2_000

    def __init__(self, most: int | None, *, adaptive: bool) -> None:
        self.endless = most is None
        """Never sleep, not even before anything has come."""
        self._adaptive = adaptive and most is not None
        self._most = sys.maxsize if most is None else most
        self.window = 0 if self._adaptive else self._most

    def slept(self, duration: int) -> None:
        """After looking in vain we slept so long."""
        if not self._adaptive:
            return
        if duration < self._most:
            self.window = min(max(2 * self.window, self._LEAST), self._most)
        else:
            self.window = self.window // 2 if self.window > self._LEAST else 0


class Room:
    """Memory of ``size`` bytes to share in one event loop: who asks first is served first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free = size
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def take(self, size: int) -> AsyncIterator[None]:
        """Hold ``size`` bytes, as soon as there are so many; whoever asks for more than there is gets all."""
        size = min(size, self._size)
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        self._serve()
        await turn
        try:
            yield
        finally:
            self._free += size
            self._serve()

    def _serve(self) -> None:
        while self._waiting and self._waiting[0][0] <= self._free:
            size, turn = self._waiting.popleft()
            self._free -= size
            turn.set_result(None)
