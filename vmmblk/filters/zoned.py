"""A zoned disk (host-managed or host-aware) emulated over any block.

The data of a zone lies where it would lie without zones; states and write pointers are kept beside it, in a
:class:`~vmmblk.filters.zone_file.ZoneFile`.  Whatever moment the process ends at, and whatever then is left of the
block's own cache, when it is opened again:

* A write pointer is not below data that was acknowledged as persisted.  The zone's record is stable before a ``write``,
  an ``append`` or a ``flush`` is acknowledged.
* A write pointer claims no data that is not there.  A record is made only when the data that it claims is persisted:
  after the block's own ``write``, or its ``flush`` if there were cached writes to the zone.
* What a zone held before it was reset never comes back, nor do later writes show under the old write pointer: a reset
  is stable before it is acknowledged, hence before anything is written to the zone again.

Open zones are not remembered as open: after a restart they are closed, or empty if nothing was written.

Everything that changes a zone takes one lock.  So two requests never judge the same state, and the order of guest
requests is kept; reads, and writes to conventional zones, go by.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path  # noqa: TC003 - the annotations say what a user may give
from typing import TYPE_CHECKING, Literal

from vmmblk.block import (
    Block,
    BlockInfo,
    Buffers,
    Operation,
    Zone,
    ZoneModel,
    ZoneState,
    ZoneType,
    Zoning,
    operations,
    total_bytes,
)
from vmmblk.errors import ConfigError, Unimplemented, Unknown
from vmmblk.filters.base import Filter
from vmmblk.filters.threaded import Pool
from vmmblk.filters.zone_file import Geometry, Record, ZoneFile
from vmmblk.filters.zone_table import Piece, ZoneTable

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Zoned"]

_MODELS = {"host-managed": ZoneModel.HOST_MANAGED, "host-aware": ZoneModel.HOST_AWARE}
_APPEND = 1 << 20  # bytes of the largest append, if nothing else is said
_ZONES_MAX = 1 << 20  # each takes memory
_LACKS = Operation.DISCARD | Operation.WRITE_ZEROES | Operation.RESIZE
"""What goes round the write pointers, or changes the number of zones."""


class Zoned(Filter):
    """``block`` (asynchronous) in zones of ``zone_size`` bytes, the first ``conventional`` of them conventional.

    ``zone_capacity`` bytes of each can be written (default: all), in units of ``write_granularity`` bytes (default: a
    sector).  ``max_open`` and ``max_active`` limit zones, ``max_append`` is in bytes; host-aware disks have no append.
    Write pointers are kept in the file ``state``; without one every zone is empty at the start.
    Raises: ConfigError.
    """

    def __init__(
        self,
        block: Block,
        /,
        *,
        zone_size: int,
        conventional: int = 0,
        zone_capacity: int = 0,
        max_open: int = 0,
        max_active: int = 0,
        max_append: int = _APPEND,
        write_granularity: int = 0,
        model: Literal["host-managed", "host-aware"] = "host-managed",
        state: Path | None = None,
    ) -> None:
        super().__init__(block)
        if Operation.ZONES in operations(block):
            raise ConfigError("this disk has zones of its own; leave the filter out")
        self._info = info = block.info
        size = info.sector_size
        capacity = zone_capacity or zone_size
        granularity = write_granularity or size
        appends = max_append if model == "host-managed" else 0
        _check(
            info,
            zone_size=zone_size,
            capacity=capacity,
            granularity=granularity,
            conventional=conventional,
            appends=appends,
            max_open=max_open,
            max_active=max_active,
        )
        zoning = Zoning(
            model=_MODELS[model],
            zone_sectors=zone_size // size,
            max_open=max_open,
            max_active=max_active,
            max_append_sectors=min(appends, capacity) // size,
            write_granularity=granularity,
        )
        self._table = ZoneTable(
            zoning, info.size_sectors, size, conventional=conventional, zone_capacity=capacity // size
        )
        self._file = None
        if state is not None:
            geometry = Geometry(size, info.size_sectors, zoning.zone_sectors, capacity // size, conventional)
            self._file = ZoneFile(state, geometry, read_only=not info.read_write)
            for zone, record in self._file.records.items():
                self._table.restore(zone, record.state, record.written)
        self._lock = asyncio.Lock()
        self._cached: set[int] = set()  # zones with writes that the block may still have in its cache
        self._pool = Pool(1)

    @property
    def info(self) -> BlockInfo:  # type: ignore[override]
        """That of the block below, as it was at first: zones do not grow."""
        return replace(self._info, read_write=self.block.info.read_write)

    @property
    def operations(self) -> Operation:
        """Those of the block below that leave zones alone, and zones."""
        return super().operations & ~_LACKS | Operation.ZONES

    def zoning(self) -> Zoning:
        """How the disk is divided."""
        return self._table.zoning

    # Data.

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """Forward ``read`` for what was written; the rest are zeroes (BLK-139).  Raises: ZoneInvalidCommand."""
        pieces = self._table.pieces(sector_start, self._sectors(buffers))
        held = [(piece, self._table.readable(piece)) for piece in pieces]
        if all(piece.sectors == sectors for piece, sectors in held):
            await super().read(sector_start, buffers)
            return
        rest = list(buffers)
        for piece, sectors in held:
            data, rest = self._cut(rest, sectors)
            if data:
                await super().read(self._table.start(piece.zone) + piece.offset, data)
            unwritten, rest = self._cut(rest, piece.sectors - sectors)
            for buffer in unwritten:
                buffer[:] = bytes(len(buffer))

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Write and remember, each on stable storage.  Raises: the four zone errors."""
        await self._store(sector_start, buffers, cached=False)

    async def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """Write; remembered with the next ``flush``.  Raises: the four zone errors."""
        await self._store(sector_start, buffers, cached=True)

    async def append(self, sector_start: int, buffers: Buffers) -> int:
        """Write at the write pointer, and remember, each on stable storage.  Raises: the four zone errors."""
        async with self._lock:
            zone = self._table.named(sector_start)
            piece = self._table.check_append(zone, self._sectors(buffers))
            await self._put(piece, buffers, cached=False)
            return self._table.start(zone) + piece.offset

    async def flush(self) -> None:
        """Forward ``flush``, then remember the write pointers of what was written until then."""
        async with self._lock:
            await self._settle()

    async def discard(self, sector_start: int, sectors: int) -> None:
        """Not on a zoned disk: zones are reset.  Raises: Unimplemented."""
        raise Unimplemented(f"a zoned disk cannot discard {sectors} sectors from {sector_start}")

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Not on a zoned disk.  Raises: Unimplemented."""
        raise Unimplemented(f"a zoned disk cannot zero {sectors} sectors from {sector_start} (unmap={unmap})")

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Reset whole zones, and erase what they held (BLK-142).  Raises: ZoneInvalidCommand, Unknown."""
        async with self._lock:
            pieces = list(self._table.cut(sector_start, sectors))
            if any(piece.offset or piece.sectors != self.zoning().zone_sectors for piece in pieces):
                raise Unknown("only whole zones can be erased")
            zones = [piece.zone for piece in pieces if self._table.type(piece.zone) is not ZoneType.CONVENTIONAL]
            for zone in zones:
                self._table.check_reset(zone)
            await self._empty(zones)
            await super().secure_erase(sector_start, sectors)

    # Zones.

    async def report_zones(self, sector_start: int, count: int) -> list[Zone]:
        """The zones as they are now."""
        return self._table.report(sector_start, count)

    async def open_zone(self, sector_start: int) -> None:
        """Open explicitly.  Raises: ZoneInvalidCommand, ZoneOpenResource, ZoneActiveResource."""
        async with self._lock:
            zone = self._table.sequential(sector_start)
            self._table.check_open(zone)
            self._table.open_zone(zone)

    async def close_zone(self, sector_start: int) -> None:
        """Close.  Raises: ZoneInvalidCommand."""
        async with self._lock:
            zone = self._table.sequential(sector_start)
            self._table.check_close(zone)
            self._table.close_zone(zone)

    async def finish_zone(self, sector_start: int) -> None:
        """Make full, and remember it.  Raises: ZoneInvalidCommand."""
        async with self._lock:
            zone = self._table.sequential(sector_start)
            self._table.check_finish(zone)
            if zone in self._cached:
                await self._settle()
            await self._remember({zone: Record(ZoneState.FULL, self._table.written(zone))})
            self._table.finish(zone)

    async def reset_zone(self, sector_start: int) -> None:
        """Make empty, and remember it.  Raises: ZoneInvalidCommand."""
        async with self._lock:
            zone = self._table.sequential(sector_start)
            self._table.check_reset(zone)
            await self._empty([zone])

    async def reset_all_zones(self) -> None:
        """Make every zone empty that is open, closed or full, and remember it."""
        async with self._lock:
            await self._empty(self._table.resettable())

    async def fail_zone(self, sector_start: int, state: ZoneState) -> None:
        """Let the medium of a zone fail for good: READ_ONLY or OFFLINE.  For tests of what a guest does then.

        Raises: ZoneInvalidCommand, ValueError.
        """
        async with self._lock:
            zone = self._table.sequential(sector_start)
            self._table.check_fail(zone, state)
            if zone in self._cached:
                await self._settle()
            await self._remember({zone: Record(state, self._table.written(zone))})
            self._table.fail(zone, state)

    async def disconnect(self) -> None:
        """Remember what was written, disconnect the block below and close the file."""
        try:
            if self._cached:
                await self.flush()
        finally:
            try:
                await super().disconnect()
            finally:
                if self._file is not None:
                    await self._pool.submit(self._file.close, ())
                self._pool.stop()

    # The inside; what changes anything holds the lock.

    async def _store(self, sector_start: int, buffers: Buffers, *, cached: bool) -> None:
        pieces = self._table.pieces(sector_start, self._sectors(buffers))
        if all(self._table.type(piece.zone) is ZoneType.CONVENTIONAL for piece in pieces):
            await (super().write_cached(sector_start, buffers) if cached else super().write(sector_start, buffers))
            return
        async with self._lock:
            rest = list(buffers)
            for piece in pieces:
                self._table.check_write(piece)
                part, rest = self._cut(rest, piece.sectors)
                await self._put(piece, part, cached=cached)

    async def _put(self, piece: Piece, buffers: Buffers, *, cached: bool) -> None:
        sector = self._table.start(piece.zone) + piece.offset
        if cached:
            await super().write_cached(sector, buffers)
            self._cached.add(piece.zone)
        else:
            await super().write(sector, buffers)
            if piece.zone in self._cached:  # the record would claim what is only cached
                await self._settle()
            await self._remember({piece.zone: self._record(piece.zone, self._table.written_after(piece))})
        self._table.write(piece)

    async def _settle(self) -> None:
        """Make everything written until now stable, then the write pointers that claim it."""
        if Operation.FLUSH in self.operations:
            await super().flush()
        await self._remember({zone: self._record(zone, self._table.written(zone)) for zone in self._cached})
        self._cached.clear()

    async def _empty(self, zones: Iterable[int]) -> None:
        zones = list(zones)
        await self._remember(dict.fromkeys(zones, Record(ZoneState.EMPTY, 0)))
        for zone in zones:
            self._table.reset(zone)
            self._cached.discard(zone)

    async def _remember(self, records: dict[int, Record]) -> None:
        if self._file is not None:
            await self._pool.submit(self._file.store, (records,))

    def _record(self, zone: int, written: int) -> Record:
        state = self._table.state(zone)
        if state in (ZoneState.FULL, ZoneState.READ_ONLY, ZoneState.OFFLINE):
            return Record(state, written)
        if written == self._table.capacity(zone):
            return Record(ZoneState.FULL, written)
        return Record(ZoneState.CLOSED if written else ZoneState.EMPTY, written)

    def _sectors(self, buffers: Buffers) -> int:
        return total_bytes(buffers) // self._info.sector_size

    def _cut(self, buffers: Buffers, sectors: int) -> tuple[list[memoryview], list[memoryview]]:
        """The first ``sectors`` sectors of ``buffers``, and the rest."""
        room = sectors * self._info.sector_size
        first: list[memoryview] = []
        rest: list[memoryview] = []
        for buffer in buffers:
            part = min(room, len(buffer))
            if part:
                first.append(buffer[:part])
            if part < len(buffer):
                rest.append(buffer[part:])
            room -= part
        return first, rest


def _check(
    info: BlockInfo,
    *,
    zone_size: int,
    capacity: int,
    granularity: int,
    conventional: int,
    appends: int,
    max_open: int,
    max_active: int,
) -> None:
    """Hold the parameters against what VIRTIO and drivers allow.  Raises: ConfigError."""
    size = info.sector_size
    if zone_size < size or zone_size & (zone_size - 1):
        raise ConfigError(f"zone_size is {zone_size}; it must be a power of two from {size} up")
    if zone_size // 512 >= 1 << 32:
        raise ConfigError("zone_size must be less than 2 TiB")
    zones = -(-info.size_bytes // zone_size)
    if zones > _ZONES_MAX:
        raise ConfigError(f"there would be {zones} zones, at most {_ZONES_MAX} are possible; make zone_size bigger")
    if granularity < size or granularity & (granularity - 1) or granularity > zone_size:
        raise ConfigError(f"write_granularity is {granularity}; it must be a power of two from {size} to the zone size")
    if not 0 < capacity <= zone_size or capacity % granularity:
        raise ConfigError(f"zone_capacity must be a multiple of {granularity} bytes and at most zone_size")
    if info.size_bytes % granularity:
        raise ConfigError(f"the disk must be a multiple of write_granularity, {granularity} bytes")
    if not 0 <= conventional < zones:
        raise ConfigError(f"conventional must be from 0 to {zones - 1}: of {zones} zones one must be sequential")
    if appends % granularity:
        raise ConfigError(f"max_append must be a multiple of {granularity} bytes")
    if min(appends, max_open, max_active) < 0 or (max_active and max_open > max_active):
        raise ConfigError("max_append, max_open and max_active must not be negative, and max_open not above max_active")
