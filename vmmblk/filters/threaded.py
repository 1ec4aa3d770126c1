"""Makes a plain block asynchronous: its plain methods run in threads, its ``async`` ones are called directly.

The threads are daemons of our own, not ``concurrent.futures``: that library joins its threads when the interpreter
exits, so a disk that hangs would keep the process from ending.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

from vmmblk.block import Block, Native, Operation, SupportsZones, Transfer, ZoneModel, operations
from vmmblk.filters.base import OFFSET_METHODS, Filter

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from vmmblk.block import Buffers, Lifetime, Zone

    Job = tuple[asyncio.AbstractEventLoop, asyncio.Future[Any], Callable[..., Any], tuple[object, ...]]

__all__ = ["Pool", "Threaded", "asynchronous"]

WORKERS = 16
"""Calls of a plain disk that run at the same time."""

_AWAITED = (*OFFSET_METHODS, "flush", "lifetime", "reset_all_zones", "submit", "disconnect")


def asynchronous(block: Block) -> Block:
    """``block`` itself if awaiting its methods works, else the block wrapped in :class:`Threaded`."""
    if isinstance(block, Filter) or not _plain_methods(block):
        return block
    return Threaded(block)


def _plain_methods(block: Block) -> list[str]:
    """The methods of ``block`` itself that are not ``async``; those that every Block inherits block nobody."""
    own = [name for name in _AWAITED if getattr(type(block), name, None) is not getattr(Block, name, None)]
    return [name for name in own if not inspect.iscoroutinefunction(getattr(block, name))]


class Threaded(Filter):
    """Runs the plain methods of ``block`` in a pool of threads, several at once.

    A call that was submitted runs to its end even if the task that awaits it is cancelled.  What changes a zone of a
    host-managed disk runs one call at a time and in the order of the calls, which threads would lose.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(block)
        self._zone_sectors = _ordered_zones(block)
        self._turns: WeakValueDictionary[int, asyncio.Lock] = WeakValueDictionary()  # by zone, while there is a call
        self._pool = Pool(WORKERS)
        plain = _plain_methods(block)
        for name in _AWAITED:
            if name not in plain and hasattr(block, name):
                setattr(self, name, getattr(block, name))

    @property
    def operations(self) -> Operation:
        """Those of the disk, all of them."""
        return operations(self.block)

    async def submit(self, batch: Sequence[Transfer]) -> None:
        """``submit`` in a thread."""
        await self._run("submit", batch)

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """``read`` in a thread."""
        await self._run("read", sector_start, buffers)

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """``write`` in a thread."""
        await self._run_in_turn("write", sector_start, buffers)

    async def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """``write_cached`` in a thread."""
        await self._run_in_turn("write_cached", sector_start, buffers)

    def native(self) -> Native | None:
        """That of the disk."""
        return self._native_below()

    async def flush(self) -> None:
        """``flush`` in a thread."""
        await self._run("flush")

    async def discard(self, sector_start: int, sectors: int) -> None:
        """``discard`` in a thread."""
        await self._run("discard", sector_start, sectors)

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """``write_zeroes`` in a thread."""
        await self._run("write_zeroes", sector_start, sectors, unmap)

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """``secure_erase`` in a thread."""
        await self._run("secure_erase", sector_start, sectors)

    async def report_zones(self, sector_start: int, count: int) -> Sequence[Zone]:
        """``report_zones`` in a thread."""
        zones: Sequence[Zone] = await self._run("report_zones", sector_start, count)
        return zones

    async def open_zone(self, sector_start: int) -> None:
        """``open_zone`` in a thread."""
        await self._run_in_turn("open_zone", sector_start)

    async def close_zone(self, sector_start: int) -> None:
        """``close_zone`` in a thread."""
        await self._run_in_turn("close_zone", sector_start)

    async def finish_zone(self, sector_start: int) -> None:
        """``finish_zone`` in a thread."""
        await self._run_in_turn("finish_zone", sector_start)

    async def reset_zone(self, sector_start: int) -> None:
        """``reset_zone`` in a thread."""
        await self._run_in_turn("reset_zone", sector_start)

    async def reset_all_zones(self) -> None:
        """``reset_all_zones`` in a thread."""
        await self._run("reset_all_zones")

    async def append(self, sector_start: int, buffers: Buffers) -> int:
        """``append`` in a thread."""
        sector: int = await self._run_in_turn("append", sector_start, buffers)
        return sector

    async def lifetime(self) -> Lifetime:
        """``lifetime`` in a thread."""
        worn: Lifetime = await self._run("lifetime")
        return worn

    async def disconnect(self) -> None:
        """``disconnect`` in a thread; then the threads end."""
        try:
            await self._run("disconnect")
        finally:
            self._pool.stop()

    async def _run_in_turn(self, name: str, sector_start: int, *arguments: object) -> Any:
        if not self._zone_sectors:
            return await self._run(name, sector_start, *arguments)
        turn = self._turns.setdefault(sector_start // self._zone_sectors, asyncio.Lock())
        async with turn:
            return await self._run(name, sector_start, *arguments)

    async def _run(self, name: str, *arguments: object) -> Any:
        result = await self._pool.submit(self._method(name), arguments)
        # a plain method may have handed back a coroutine
        return await result if inspect.isawaitable(result) else result


def _ordered_zones(block: Block) -> int:
    """The size of the zones of a host-managed disk, in sectors; 0 for other disks."""
    if Operation.ZONES not in operations(block) or not isinstance(block, SupportsZones):
        return 0
    zoning = block.zoning()
    return zoning.zone_sectors if zoning.model is ZoneModel.HOST_MANAGED else 0


class Pool:
    """Daemon threads that take calls from one queue and settle futures of the event loop that submitted them."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._started = 0
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def submit(self, call: Callable[..., Any], arguments: tuple[object, ...]) -> asyncio.Future[Any]:
        """Have a thread run ``call(*arguments)``; called in an event loop, whose future is returned."""
        while self._started < self._workers:
            threading.Thread(target=self._work, name=f"disk-{self._started}", daemon=True).start()
            self._started += 1
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._jobs.put((loop, future, call, arguments))
        return future

    def stop(self) -> None:
        """End each thread when it has finished what it does."""
        for _ in range(self._started):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            loop, future, call, arguments = job
            result, error = None, None
            try:
                result = call(*arguments)
            except Exception as exc:  # noqa: BLE001 - whatever a disk raises belongs to its caller
                error = exc
            except BaseException as exc:  # noqa: BLE001 - SystemExit would end the event loop of the caller
                error = RuntimeError(f"the disk raised {type(exc).__name__}")
                error.__cause__ = exc
            try:
                loop.call_soon_threadsafe(_settle, future, result, error)
            except RuntimeError:
                return  # the loop is closed: nobody waits any more
            del job, future, call, arguments, result, error  # keep no guest memory while waiting


def _settle(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return  # the task that waited was cancelled; the call ran to its end all the same
    if error is None:
        future.set_result(result)
    elif isinstance(error, StopIteration):  # a future refuses it
        future.set_exception(RuntimeError("the disk raised StopIteration"))
    else:
        future.set_exception(error)
