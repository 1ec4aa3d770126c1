"""A disk in memory: sparse, gone when the process ends."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from typing import TYPE_CHECKING

from vmmblk.block import Block, BlockInfo, Buffers, Native, Operation, Substance, Topology

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Memory"]

_MAP_NORESERVE = 0x4000  # the mmap module names it from Python 3.12 on
_CHUNK = 1 << 20  # bytes


class Memory(Block):
    """``size_sectors`` sectors of ``sector_size`` bytes in anonymous memory.

    Pages take memory once they are written; ``discard`` and ``write_zeroes(unmap=True)`` give them back.  With
    ``hugepages`` the kernel is asked for pages of 2 MiB, which are found faster, are taken and cleared whole for the
    first sector written in them, and come back whole: one that is discarded in part may stay until memory is short.
    The disk can ``grow`` up to ``max_sectors``: the addresses are reserved from the start, so the data never moves.
    """

    def __init__(
        self, size_sectors: int, *, sector_size: int = 512, max_sectors: int = 0, hugepages: bool = False
    ) -> None:
        self.info = BlockInfo(read_write=True, sector_size=sector_size, size_sectors=size_sectors)
        self.topology = Topology(discard_granularity=max(sector_size, mmap.PAGESIZE))
        self._sector_size = sector_size
        self._max_sectors = max(size_sectors, max_sectors)
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        self._map = mmap.mmap(-1, self._max_sectors * sector_size, flags=flags)
        if hugepages:
            with contextlib.suppress(OSError):  # a kernel that has none
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._data = memoryview(self._map)
        self._changed: Callable[[], None] | None = None

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """Copy from memory."""
        data = self._data
        start = sector_start * self._sector_size
        for buffer in buffers:
            end = start + len(buffer)
            buffer[:] = data[start:end]
            start = end

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Copy to memory, which is as persistent as this disk gets."""
        data = self._data
        start = sector_start * self._sector_size
        for buffer in buffers:
            end = start + len(buffer)
            data[start:end] = buffer
            start = end

    async def discard(self, sector_start: int, sectors: int) -> None:
        """Give whole pages back; the sectors read as zeroes."""
        self._deallocate(sector_start * self._sector_size, (sector_start + sectors) * self._sector_size)

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Zero, giving whole pages back if ``unmap``."""
        start, end = sector_start * self._sector_size, (sector_start + sectors) * self._sector_size
        if unmap:
            self._deallocate(start, end)
        else:
            self._zero(start, end)

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Zero: memory keeps no other copy."""
        self._zero(sector_start * self._sector_size, (sector_start + sectors) * self._sector_size)

    def native(self) -> Native | None:
        """The memory; a subclass must be called."""
        if type(self) is not Memory:
            return None
        return Native(
            Substance.MEMORY,
            address=ctypes.addressof(ctypes.c_char.from_buffer(self._map)),
            operations=Operation.DISCARD | Operation.WRITE_ZEROES,
        )

    def on_resize(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called after each :meth:`grow`."""
        self._changed = changed

    def grow(self, size_sectors: int) -> None:
        """Make the disk ``size_sectors`` big; new sectors read as zeroes.  Any thread may call it.

        Raises: ValueError for less than it is, or more than ``max_sectors``.
        """
        if not self.info.size_sectors <= size_sectors <= self._max_sectors:
            raise ValueError(f"the disk can grow from {self.info.size_sectors} to {self._max_sectors} sectors")
        self.info = BlockInfo(read_write=True, sector_size=self._sector_size, size_sectors=size_sectors)
        if self._changed is not None:
            self._changed()

    async def disconnect(self) -> None:
        """Free the memory."""
        self._data.release()
        self._map.close()

    def _deallocate(self, start: int, end: int) -> None:
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if first >= last:
            self._zero(start, end)
            return
        self._zero(start, first)
        self._map.madvise(mmap.MADV_DONTNEED, first, last - first)
        self._zero(last, end)

    def _zero(self, start: int, end: int) -> None:
        zeroes = bytes(min(end - start, _CHUNK))
        for chunk in range(start, end, _CHUNK):
            length = min(end - chunk, _CHUNK)
            self._data[chunk : chunk + length] = zeroes[:length]
