"""Disks that record what they are asked, for the tests of a running server."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from typing import TYPE_CHECKING

from vmmblk.block import Block, BlockInfo, Buffers, Native, Substance, total_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

Call = tuple[object, ...]


class Disk(Block):
    """A disk that reads and writes, in memory.

    ``calls`` tells each call: its name, then sector and number of sectors, in order of arrival.  ``data`` is what
    reads give, ``stable`` what would be there after a crash.  A call named in ``failures`` raises what it finds
    there; one named in ``held`` waits for ``release``.

    With ``in_c`` the native engine may read and write ``data`` itself: such reads and writes are no calls, and what is
    written is stable after the next flush.
    """

    def __init__(self, sectors: int = 2048, *, sector_size: int = 512, read_write: bool = True) -> None:
        self.info = BlockInfo(read_write=read_write, sector_size=sector_size, size_sectors=sectors)
        self.in_c = False
        self._room = bytearray(2 * self.info.size_bytes)  # it can grow, and never moves
        self.data = memoryview(self._room)[: self.info.size_bytes]
        self.stable = bytearray(self.info.size_bytes)
        self.calls: list[Call] = []
        self.buffers: list[tuple[int, ...]] = []
        """The lengths of the buffers of each read or write."""
        self.failures: dict[str, BaseException] = {}
        self.held: set[str] = set()
        self._gates: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._changed = threading.Condition()

    def native(self) -> Native | None:
        """The memory, unless a subclass does more than to copy."""
        copies = type(self).read is Disk.read and type(self).write is Disk.write
        if not (self.in_c and copies):
            return None
        return Native(Substance.MEMORY, address=ctypes.addressof(ctypes.c_char.from_buffer(self._room)))

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """From memory."""
        self.buffers.append(tuple(map(len, buffers)))
        await self._enter("read", sector_start, self._sectors(buffers))
        at = sector_start * self.info.sector_size
        for buffer in buffers:
            buffer[:] = self.data[at : at + len(buffer)]
            at += len(buffer)

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """To memory, and stable."""
        self.buffers.append(tuple(map(len, buffers)))
        await self._enter("write", sector_start, self._sectors(buffers))
        start, end = self._store(sector_start, buffers)
        self.stable[start:end] = self.data[start:end]

    async def disconnect(self) -> None:
        """Only recorded."""
        await self._enter("disconnect")

    def count(self, name: str) -> int:
        """How many calls of that name there were."""
        return sum(call[0] == name for call in list(self.calls))

    def wait_for(self, name: str, count: int = 1, timeout: float = 30.0) -> None:
        """Wait until there have been ``count`` calls of that name."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count(name) >= count, timeout), f"no {name}: {self.calls}"

    def release(self) -> None:
        """Let every call that is held go on, and hold no more."""
        with self._changed:
            self.held.clear()
            gates, self._gates = self._gates, []
        for loop, gate in gates:
            loop.call_soon_threadsafe(gate.set)

    async def _enter(self, *call: object) -> None:
        name = str(call[0])
        gate = asyncio.Event()
        with self._changed:
            waits = name in self.held
            if waits:
                self._gates.append((asyncio.get_running_loop(), gate))
            self.calls.append(call)
            self._changed.notify_all()
        if waits:
            await gate.wait()
        if name in self.failures:
            raise self.failures[name]

    def _sectors(self, buffers: Buffers) -> int:
        return total_bytes(buffers) // self.info.sector_size

    def _store(self, sector_start: int, buffers: Buffers) -> tuple[int, int]:
        start = at = sector_start * self.info.sector_size
        for buffer in buffers:
            self.data[at : at + len(buffer)] = buffer
            at += len(buffer)
        return start, at


class CachedDisk(Disk):
    """A disk with a write-back cache."""

    async def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """To memory, not yet stable."""
        self.buffers.append(tuple(map(len, buffers)))
        await self._enter("write_cached", sector_start, self._sectors(buffers))
        self._store(sector_start, buffers)

    async def flush(self) -> None:
        """Make everything stable."""
        written = bytes(self.data)
        await self._enter("flush")
        self.stable[:] = written


class FullDisk(CachedDisk):
    """A disk that can do everything."""

    def __init__(self, sectors: int = 2048, *, sector_size: int = 512, read_write: bool = True) -> None:
        super().__init__(sectors, sector_size=sector_size, read_write=read_write)
        self._resized: Callable[[], None] | None = None

    async def discard(self, sector_start: int, sectors: int) -> None:
        """Fill with 0xdd, so that it shows."""
        await self._enter("discard", sector_start, sectors)
        self._fill(sector_start, sectors, 0xDD)

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Zero."""
        await self._enter("write_zeroes", sector_start, sectors, unmap)
        self._fill(sector_start, sectors, 0)

    def identify(self) -> str:
        """A serial of its own."""
        return "own-serial"

    def on_resize(self, changed: Callable[[], None]) -> None:
        """Keep who wants to know."""
        self._resized = changed

    def grow(self, sectors: int) -> None:
        """Make the disk bigger, and say so."""
        more = (sectors - self.info.size_sectors) * self.info.sector_size
        self.data = memoryview(self._room)[: len(self.data) + more]
        self.stable += bytes(more)
        self.info = BlockInfo(self.info.read_write, self.info.sector_size, sectors)
        if self._resized is not None:
            self._resized()

    def _fill(self, sector_start: int, sectors: int, byte: int) -> None:
        size = self.info.sector_size
        self.data[sector_start * size : (sector_start + sectors) * size] = bytes([byte]) * (sectors * size)
        self.stable[sector_start * size : (sector_start + sectors) * size] = bytes([byte]) * (sectors * size)
