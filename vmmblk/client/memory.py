"""Guest memory without a guest: pages that this process and the device share.

A :class:`GuestMemory` has a layout: ranges of I/O virtual addresses over one anonymous file.  Which parts the device
may reach at a given moment is a matter of ``map`` and ``unmap``, in any pieces, as firmware does it.
"""

from __future__ import annotations

import bisect
import enum
import mmap
import os
from typing import TYPE_CHECKING, NamedTuple, Self

from vmmblk._core import ffi

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmmblk.client.connection import Connection

__all__ = ["PAGE", "GuestMemory", "Range", "Sharing"]

PAGE = 4096


class Range(NamedTuple):
    """``size`` bytes at ``iova``."""

    iova: int
    size: int


class Sharing(enum.Enum):
    """What the device is given of the memory."""

    SHARED = enum.auto()
    """A descriptor of the very pages."""
    PRIVATE = enum.auto()
    """A descriptor of other pages, all zero: what a private mapping in the VMM amounts to."""
    NO_FD = enum.auto()
    """No descriptor: the device must ask for every byte (DMA_READ, DMA_WRITE)."""


class GuestMemory:
    """``size`` bytes of memory, with an allocator; addresses are I/O virtual addresses.

    ``layout`` defaults to one range at 0; its ranges, disjoint, in order and whole pages, must add up to ``size``.
    ``sharing`` is what ``map`` gives the device unless told otherwise.
    """

    def __init__(
        self, size: int = 64 << 20, layout: Sequence[Range] | None = None, *, sharing: Sharing = Sharing.SHARED
    ) -> None:
        self.layout = tuple(layout) if layout is not None else (Range(0, size),)
        if sum(piece.size for piece in self.layout) != size:
            raise ValueError(f"the layout does not add up to {size} bytes")
        self.size = size
        self.sharing = sharing
        self.fd = _memfd("guest memory", size)
        self._decoy_fd = -1
        self._pages = mmap.mmap(self.fd, size)
        self._buffer = ffi.from_buffer(self._pages)
        self._base = int(ffi.cast("uintptr_t", self._buffer))
        # as in a guest, the page at address 0 is not handed out: an address of 0 means that none was set
        self._free = [_above(PAGE, piece) for piece in self.layout]
        self._taken: dict[int, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the memory back.  Rings and views over it must be gone."""
        ffi.release(self._buffer)
        self._pages.close()
        os.close(self.fd)
        if self._decoy_fd >= 0:
            os.close(self._decoy_fd)

    # What the device sees.

    def map(
        self, connection: Connection, iova: int, size: int, *, sharing: Sharing | None = None, flags: int = 3
    ) -> None:
        """Map ``size`` bytes at ``iova`` (within one range of the layout) to the device."""
        connection.dma_map(iova, size, self.descriptor(sharing), self.offset(iova, size), flags)

    def map_all(self, connection: Connection) -> None:
        """Map every range of the layout, and serve the device's DMA messages from this memory."""
        connection.dma_target = self
        for piece in self.layout:
            self.map(connection, *piece)

    def unmap(self, connection: Connection, iova: int, size: int) -> None:
        """Take back a range that was mapped."""
        connection.dma_unmap(iova, size)

    def unmap_all(self, connection: Connection) -> None:
        """Take back every range of the layout, each mapped whole."""
        for piece in self.layout:
            self.unmap(connection, *piece)

    def descriptor(self, sharing: Sharing | None = None) -> int | None:
        """The descriptor to send in a DMA_MAP; it stays this object's."""
        match sharing or self.sharing:
            case Sharing.SHARED:
                return self.fd
            case Sharing.PRIVATE:
                if self._decoy_fd < 0:
                    self._decoy_fd = _memfd("other memory", self.size)
                return self._decoy_fd
            case Sharing.NO_FD:
                return None

    # What the driver sees.

    def offset(self, iova: int, length: int = 1) -> int:
        """The place of ``length`` bytes at ``iova`` in the file.  Raises ValueError if they are not all memory."""
        start = 0
        for piece in self.layout:
            if piece.iova <= iova and 0 <= length <= piece.iova + piece.size - iova:
                return start + iova - piece.iova
            start += piece.size
        raise ValueError(f"[{iova:#x}, +{length:#x}) is not in guest memory")

    def address(self, iova: int, length: int = 1) -> int:
        """The address of ``iova`` in this process, valid until ``close``, for C."""
        return self._base + self.offset(iova, length)

    def view(self, iova: int, length: int) -> memoryview:
        """The memory itself; release it before ``close``."""
        start = self.offset(iova, length)
        return memoryview(self._pages)[start : start + length]

    def read(self, iova: int, length: int) -> bytes:
        """A copy of ``length`` bytes at ``iova``."""
        start = self.offset(iova, length)
        return self._pages[start : start + length]

    def write(self, iova: int, data: bytes) -> None:
        """Store ``data`` at ``iova``."""
        start = self.offset(iova, len(data))
        self._pages[start : start + len(data)] = data

    # The allocator: first fit over a sorted list of free ranges.

    def alloc(self, size: int, align: int = PAGE) -> int:
        """``size`` bytes that nobody else has, contiguous, aligned; their contents are whatever was there.

        Raises MemoryError.
        """
        for index, (start, length) in enumerate(self._free):
            iova = -(-start // align) * align
            end = start + length
            if size <= 0 or iova + size > end:
                continue
            rest = [Range(start, iova - start), Range(iova + size, end - iova - size)]
            self._free[index : index + 1] = [piece for piece in rest if piece.size]
            self._taken[iova] = size
            return iova
        raise MemoryError(f"no room for {size} bytes in guest memory")

    def free(self, iova: int) -> None:
        """Give back what ``alloc`` returned."""
        size = self._taken.pop(iova)
        index = bisect.bisect(self._free, Range(iova, size))
        starts = {piece.iova for piece in self.layout}  # ranges that merely touch stay apart
        if index < len(self._free) and iova + size == self._free[index].iova not in starts:
            size += self._free.pop(index).size
        if index > 0 and sum(self._free[index - 1]) == iova not in starts:
            index -= 1
            iova, grown = self._free.pop(index)
            size += grown
        self._free.insert(index, Range(iova, size))


def _memfd(name: str, size: int) -> int:
    fd = os.memfd_create(name)
    os.ftruncate(fd, size)
    return fd


def _above(iova: int, piece: Range) -> Range:
    start = max(iova, piece.iova)
    return Range(start, piece.iova + piece.size - start)
