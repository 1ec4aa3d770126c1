"""Holds every call against the contract before it reaches the disk, so that disks check nothing.

It sits on top of every disk.  A call that asks for what the disk does not have fails here, and the disk never sees it:
after ``disconnect`` with Disconnected, a change of a read-only disk with IsReadOnly, an operation that the disk lacks
with Unimplemented, sectors outside the disk or a buffer that is not whole sectors with Unknown; a zone outside the disk
with ZoneInvalidCommand.  The worker has the commonest reads and writes held against the same rules in C, a batch at a
time, and gives these to the disk itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from vmmblk.block import Block, Buffers, Lifetime, Native, Operation, Transfer, Zone, operations, total_bytes
from vmmblk.errors import BlockError, Disconnected, IsReadOnly, Unimplemented, Unknown, ZoneInvalidCommand
from vmmblk.filters.base import Filter
from vmmblk.filters.threaded import asynchronous

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    Call = Callable[[int, Buffers], Awaitable[None]]

__all__ = ["Checked"]

_CHANGES = Operation.FLUSH | Operation.DISCARD | Operation.WRITE_ZEROES | Operation.SECURE_ERASE


class Checked(Filter):
    """``block``, plain or asynchronous, with every rule of the contract enforced; all calls are awaited.

    ``read``, ``write`` and ``write_cached`` run once per request: they hand out the disk's own coroutine instead of
    wrapping it in another.
    """

    def __init__(self, block: Block) -> None:
        super().__init__(asynchronous(block))
        below = self.block
        info = below.info
        self._mask = info.sector_size - 1
        self._sector_size = info.sector_size
        self._size = info.size_bytes
        self._read_write = info.read_write
        self._connected = True
        self._read = cast("Call", below.read)
        has_write = type(below).write is not Block.write
        self._write = cast("Call", below.write) if has_write else None
        self._write_cached = cast("Call | None", getattr(below, "write_cached", None))
        self._submit = cast("Callable[[Sequence[Transfer]], Awaitable[None] | None]", getattr(below, "submit", None))
        self._grown: list[Callable[[], None]] = []
        if Operation.RESIZE in operations(below):
            super().on_resize(self._resized)

    @property
    def operations(self) -> Operation:
        """The optional operations of the disk; those that change it only if it can be written."""
        found = operations(self.block)
        return found if self._read_write else found & ~_CHANGES

    def read(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        """Check, then ``read``."""
        length = 0
        for buffer in buffers:
            length += len(buffer)
            if len(buffer) & self._mask:
                return _fail(self._ragged(len(buffer)))
        if not self._connected:
            return _fail(_disconnected())
        if not 0 <= sector_start * self._sector_size <= self._size - length:
            return _fail(self._outside(sector_start, length // self._sector_size))
        return self._read(sector_start, buffers) if length else _done()

    def write(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        """Check, then ``write``."""
        return self._change(self._write, sector_start, buffers)

    def write_cached(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        """Check, then ``write_cached``."""
        return self._change(self._write_cached, sector_start, buffers)

    def _change(self, write: Call | None, sector_start: int, buffers: Buffers) -> Awaitable[None]:
        length = 0
        for buffer in buffers:
            length += len(buffer)
            if len(buffer) & self._mask:
                return _fail(self._ragged(len(buffer)))
        if not (self._connected and self._read_write):
            return _fail(self._refusal())
        if write is None:
            return _fail(Unimplemented("this disk cannot be written like this"))
        if not 0 <= sector_start * self._sector_size <= self._size - length:
            return _fail(self._outside(sector_start, length // self._sector_size))
        return write(sector_start, buffers) if length else _done()

    def native(self) -> Native | None:
        """That of the disk: an engine checks what is checked here."""
        return self._native_below()

    def unchecked(self) -> Block:
        """The disk, for reads and writes that were held against ``info`` already."""
        return self.block

    async def submit(self, batch: Sequence[Transfer]) -> None:
        """Check each, then ``submit`` those that are right."""
        size, sector_size, mask = self._size, self._sector_size, self._mask
        connected, read_write = self._connected, self._read_write
        right = []
        for transfer in batch:
            length = bits = 0
            for buffer in transfer.buffers:
                length += len(buffer)
                bits |= len(buffer)
            start = transfer.sector_start * sector_size
            if bits & mask or not 0 <= start <= size - length or not connected:
                transfer.error = self._wrong(transfer, length, bits)
            elif transfer.write and not read_write:
                transfer.error = self._refusal()
            elif length:
                right.append(transfer)
        if right:
            pending = self._submit(right)
            if pending is not None:
                await pending

    def _wrong(self, transfer: Transfer, length: int, bits: int) -> BlockError:
        if bits & self._mask:
            return self._ragged(next(len(buffer) for buffer in transfer.buffers if len(buffer) & self._mask))
        if not self._connected:
            return _disconnected()
        return self._outside(transfer.sector_start, length // self._sector_size)

    async def flush(self) -> None:
        """Check, then ``flush``."""
        if not self._connected:
            raise _disconnected()
        await super().flush()

    async def discard(self, sector_start: int, sectors: int) -> None:
        """Check, then ``discard``."""
        self._check_range(sector_start, sectors)
        if sectors:
            await super().discard(sector_start, sectors)

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Check, then ``write_zeroes``."""
        self._check_range(sector_start, sectors)
        if sectors:
            await super().write_zeroes(sector_start, sectors, unmap)

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Check, then ``secure_erase``."""
        self._check_range(sector_start, sectors)
        if sectors:
            await super().secure_erase(sector_start, sectors)

    async def report_zones(self, sector_start: int, count: int) -> Sequence[Zone]:
        """Check, then ``report_zones``."""
        if not self._connected:
            raise _disconnected()
        self._check_zone(sector_start)
        return await super().report_zones(sector_start, count)

    async def open_zone(self, sector_start: int) -> None:
        """Check, then ``open_zone``."""
        self._check_zone_change(sector_start)
        await super().open_zone(sector_start)

    async def close_zone(self, sector_start: int) -> None:
        """Check, then ``close_zone``."""
        self._check_zone_change(sector_start)
        await super().close_zone(sector_start)

    async def finish_zone(self, sector_start: int) -> None:
        """Check, then ``finish_zone``."""
        self._check_zone_change(sector_start)
        await super().finish_zone(sector_start)

    async def reset_zone(self, sector_start: int) -> None:
        """Check, then ``reset_zone``."""
        self._check_zone_change(sector_start)
        await super().reset_zone(sector_start)

    async def reset_all_zones(self) -> None:
        """Check, then ``reset_all_zones``."""
        self._check_zone_change(0)
        await super().reset_all_zones()

    async def append(self, sector_start: int, buffers: Buffers) -> int:
        """Check, then ``append``."""
        for buffer in buffers:
            if len(buffer) & self._mask:
                raise self._ragged(len(buffer))
        self._check_zone_change(sector_start)
        if not total_bytes(buffers):
            raise ZoneInvalidCommand("there is nothing to append")
        return await super().append(sector_start, buffers)

    async def lifetime(self) -> Lifetime:
        """Check, then ``lifetime``."""
        if not self._connected:
            raise _disconnected()
        return await super().lifetime()

    def on_resize(self, changed: Callable[[], None]) -> None:
        """Have ``changed`` called, from any thread, each time ``info`` has grown.  Raises: Unimplemented."""
        if Operation.RESIZE not in self.operations:
            raise Unimplemented("this disk does not change its size")
        self._grown.append(changed)

    async def disconnect(self) -> None:
        """Disconnect the disk; it is told once, however often this is called."""
        if self._connected:
            self._connected = False
            await super().disconnect()

    def _resized(self) -> None:
        self._size = self.block.info.size_bytes
        for changed in self._grown:
            changed()

    def _check_range(self, sector_start: int, sectors: int) -> None:
        if not (self._connected and self._read_write):
            raise self._refusal()
        if not 0 <= sector_start <= self._size // self._sector_size - sectors or sectors < 0:
            raise self._outside(sector_start, sectors)

    def _check_zone_change(self, sector_start: int) -> None:
        if not (self._connected and self._read_write):
            raise self._refusal()
        self._check_zone(sector_start)

    def _check_zone(self, sector_start: int) -> None:
        if not 0 <= sector_start * self._sector_size < self._size:
            raise ZoneInvalidCommand(f"sector {sector_start} lies outside the disk of {self._size} bytes")

    def _refusal(self) -> BlockError:
        return IsReadOnly("this disk is read-only") if self._connected else _disconnected()

    def _ragged(self, length: int) -> BlockError:
        return Unknown(f"a buffer of {length} bytes is not a whole number of {self._sector_size}-byte sectors")

    def _outside(self, sector_start: int, sectors: int) -> BlockError:
        return Unknown(f"{sectors} sectors from {sector_start} reach outside the disk of {self._size} bytes")


def _disconnected() -> BlockError:
    return Disconnected("this disk has been disconnected")


async def _fail(error: BlockError) -> None:
    raise error


async def _done() -> None:
    return
