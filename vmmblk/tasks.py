"""Coroutines that are begun at once, and become tasks of the event loop only if they have to wait.

A request that a disk answers without waiting costs no turn of the loop so.  While a coroutine is begun a
:class:`StandIn` is the current task, as some of asyncio wants one: ``asyncio.timeout`` cancels it, maybe later, and
then means the task that the coroutine has become.
"""

from __future__ import annotations

import asyncio
import types
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from collections.abc import Coroutine, Generator

__all__ = ["Starter"]


class StandIn:
    """A task that is still to come."""

    def __init__(self) -> None:
        self.task: asyncio.Task[None] | None = None

    def cancel(self, msg: object = None) -> bool:
        """Cancel the task, if there is one: what has not waited yet cannot be cancelled."""
        return self.task is not None and self.task.cancel(msg)

    def cancelling(self) -> int:
        """How often the task was cancelled."""
        return 0 if self.task is None else self.task.cancelling()

    def uncancel(self) -> int:
        """Take one cancellation back."""
        return 0 if self.task is None else self.task.uncancel()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)


class Starter:
    """Begins coroutines in one event loop, between tasks: ``with`` it, call ``begin``.

    Coroutines must let no exception out.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.waiting: set[asyncio.Task[None]] = set()
        """The tasks of those that have begun and not ended."""
        self._loop = loop
        self._stand_in = StandIn()

    def __enter__(self) -> Self:
        asyncio._enter_task(self._loop, self._stand_in)  # type: ignore[arg-type] # noqa: SLF001 - documented
        return self

    def __exit__(self, *_exc: object) -> None:
        asyncio._leave_task(self._loop, self._stand_in)  # type: ignore[arg-type] # noqa: SLF001

    def begin(self, coroutine: Coroutine[Any, None, None]) -> None:
        """Run ``coroutine`` to its end, or to where it waits; then it goes on as a task."""
        try:
            waits_for = coroutine.send(None)
        except StopIteration:
            return
        self.__exit__()
        self._stand_in.task = self.spawn(_resumed(coroutine, waits_for))
        self._stand_in = StandIn()
        self.__enter__()

    def spawn(self, coroutine: Coroutine[Any, None, None]) -> asyncio.Task[None]:
        """Run ``coroutine`` as a task from the beginning."""
        task = self._loop.create_task(coroutine)
        self.waiting.add(task)
        task.add_done_callback(self.waiting.discard)
        return task


@types.coroutine
def _resumed(coroutine: Coroutine[Any, Any, None], waits_for: object) -> Generator[object, Any, None]:
    """Go on with a coroutine that has been begun, and waits."""
    try:
        while True:
            try:
                sent = yield waits_for
            except BaseException as error:  # noqa: BLE001 - it is the coroutine's to judge
                waits_for = coroutine.throw(error)
            else:
                waits_for = coroutine.send(sent)
    except StopIteration:
        return
