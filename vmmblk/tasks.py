"""Coroutines that are begun at once, and go on as tasks of the event loop only if they have to wait.

A request that a disk answers without waiting costs no turn of the loop so.  To a coroutine it is as if one task carried
out one request after the other: while coroutines are begun a spare task is the current one, and they run in its
context; the first that waits keeps it, and the next gets a fresh one.  (From Python 3.12 on asyncio can start tasks
eagerly, but that makes one for each coroutine.)
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

__all__ = ["Starter"]


class Starter:
    """Begins coroutines in the event loop ``loop``, between tasks.

    Coroutines must let no exception out.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.waiting: set[asyncio.Task[None]] = set()
        """The tasks of those that have begun and not ended."""
        self._loop = loop
        self._spare: Spare | None = None

    def begin(self, coroutines: Iterator[Coroutine[Any, Any, None]]) -> None:
        """Run each coroutine to its end, or to where it waits; then it goes on as a task."""
        more = True
        while more:
            spare = self._spare
            if spare is None or spare.task.cancelling():
                spare = self._spare = Spare(self._loop)
            task = spare.task
            asyncio._enter_task(self._loop, task)  # noqa: SLF001 - documented, for such as us
            try:
                more = spare.context.run(self._run, spare, coroutines)
            finally:
                asyncio._leave_task(self._loop, task)  # noqa: SLF001

    def close(self) -> None:
        """Begin no more: the spare task ends with the next turn of the loop."""
        if self._spare is not None:
            self._spare.wake()
            self._spare = None

    def _run(self, spare: Spare, coroutines: Iterator[Coroutine[Any, Any, None]]) -> bool:
        """Begin coroutines until one needs the spare task; False when there are no more."""
        cancelling = spare.task.cancelling
        for coroutine in coroutines:
            try:
                waits_for = coroutine.send(None)
            except StopIteration:
                if cancelling():  # it cancelled itself, which must not befall another
                    return True
            else:
                self._spare = None
                self.waiting.add(spare.task)
                spare.task.add_done_callback(self.waiting.discard)
                spare.go_on(coroutine, waits_for)
                return True
        return False


class Spare(Coroutine[Any, Any, None]):
    """What a spare task runs: nothing, until it is given a coroutine that has begun and waits."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.context = contextvars.Context()
        self.task: asyncio.Task[None] = asyncio.Task(self, loop=loop, context=self.context)
        self._loop = loop
        self._idle: asyncio.Future[None] | None = None
        self._woken = False
        self._coroutine: Coroutine[Any, Any, None] | None = None
        self._waits_for: object = None
        self._future: asyncio.Future[Any] | None = None
        self._going = False

    def go_on(self, coroutine: Coroutine[Any, Any, None], waits_for: Any) -> None:
        """From the next turn of the loop on the task runs ``coroutine``, which waits for what it has yielded."""
        del self.task  # which keeps us: together they would wait for the garbage collector
        self._coroutine = coroutine
        self._waits_for = waits_for
        if getattr(waits_for, _MARK, False):  # until the task takes it others may wait for it
            self._future = waits_for
            setattr(waits_for, _MARK, False)
        self.wake()

    def wake(self) -> None:
        """Have the task run: the coroutine, or to its end if there is none."""
        self._woken = True
        if self._idle is not None and not self._idle.done():
            self._idle.set_result(None)

    def send(self, value: Any) -> Any:
        """A step of the task."""
        if self._coroutine is None:
            return self._idle_on()
        if self._going:
            return self._coroutine.send(value)
        return self._wait()

    def throw(self, *error: Any) -> Any:
        """A step of the task: it has been cancelled, or what it waited for has failed."""
        if self._coroutine is None:
            raise error[0]
        # what a task waits for is cancelled with it, but this one does not know yet what that is
        if not self._going and self._future is not None and self._future.cancel():
            return self._wait()
        self._going = True
        return self._coroutine.throw(*error)

    def close(self) -> None:
        """The task will never run again."""
        if self._coroutine is not None:
            self._coroutine.close()

    def __await__(self) -> Generator[Any, Any, None]:
        raise TypeError("only a task runs it")

    def _idle_on(self) -> Any:
        if self._woken:
            raise StopIteration
        self._idle = self._loop.create_future()
        return _marked(self._idle)

    def _wait(self) -> object:
        self._going = True
        waits_for, future = self._waits_for, self._future
        self._waits_for = self._future = None
        return waits_for if future is None else _marked(future)


_MARK = "_asyncio_future_blocking"  # on a future that await yields to a task; documented in asyncio.futures


def _marked(future: asyncio.Future[Any]) -> asyncio.Future[Any]:
    setattr(future, _MARK, True)
    return future
