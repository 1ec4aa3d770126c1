"""The zones of a disk and what may be done to them: the state machine of "Device Operation", zoned part.  Pure.

A :class:`ZoneTable` knows states, write pointers and resources.  Each operation comes in two steps, because between
them something must be made durable: ``check_...`` raises what the guest gets, and changes nothing; the method without
``check_`` then makes the change, and cannot fail.  What the specification leaves open is decided in docs/zoned.md.

Sectors are the disk's own.  A zone is named by its index; offsets count from its start.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.block import Zone, ZoneModel, ZoneState, ZoneType, Zoning
from vmmblk.errors import ZoneActiveResource, ZoneInvalidCommand, ZoneOpenResource, ZoneUnalignedWritePointer

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Piece", "ZoneTable"]

_OPEN = (ZoneState.IMPLICIT_OPEN, ZoneState.EXPLICIT_OPEN)
_ACTIVE = (*_OPEN, ZoneState.CLOSED)
_DEAD = (ZoneState.READ_ONLY, ZoneState.OFFLINE)


@dataclass(frozen=True, slots=True)
class Piece:
    """The part of a range that lies in one zone: ``sectors`` sectors from ``offset`` on."""

    zone: int
    offset: int
    sectors: int


class ZoneTable:
    """The zones of a disk of ``size_sectors`` sectors of ``sector_size`` bytes, all of them empty.

    The first ``conventional`` zones have no write pointer.  ``zone_capacity`` sectors of each sequential zone can be
    written.
    """

    def __init__(
        self, zoning: Zoning, size_sectors: int, sector_size: int, *, conventional: int = 0, zone_capacity: int = 0
    ) -> None:
        self.zoning = zoning
        self.count = -(-size_sectors // zoning.zone_sectors)
        self.conventional = conventional
        self.zone_capacity = zone_capacity or zoning.zone_sectors
        self._size = size_sectors
        self._granularity = max(zoning.write_granularity // sector_size, 1)
        required = zoning.model is ZoneModel.HOST_MANAGED
        self._type = ZoneType.SEQUENTIAL_REQUIRED if required else ZoneType.SEQUENTIAL_PREFERRED
        self._states = [ZoneState.NOT_WRITE_POINTER] * conventional + [ZoneState.EMPTY] * (self.count - conventional)
        self._written = [0] * self.count
        # in the order of opening: the first of them makes room for another
        self._implicit: dict[int, None] = {}
        self.open = 0
        """Zones that are open."""
        self.active = 0
        """Zones that are open or closed."""

    # Looking.

    def start(self, zone: int) -> int:
        """The first sector of a zone."""
        return zone * self.zoning.zone_sectors

    def type(self, zone: int) -> ZoneType:
        """Whether and how a zone must be written in order."""
        return ZoneType.CONVENTIONAL if zone < self.conventional else self._type

    def state(self, zone: int) -> ZoneState:
        """The state of a zone."""
        return self._states[zone]

    def written(self, zone: int) -> int:
        """How many sectors from its start on a sequential zone holds: the write pointer, wherever there is one."""
        return self._written[zone]

    def capacity(self, zone: int) -> int:
        """The sectors of a zone that can be written."""
        size = min(self.zoning.zone_sectors, self._size - self.start(zone))
        return size if zone < self.conventional else min(size, self.zone_capacity)

    def describe(self, zone: int) -> Zone:
        """A zone as it is reported; a write pointer that means nothing is the end of what can be written."""
        start, state = self.start(zone), self._states[zone]
        pointer = self._written[zone] if state is ZoneState.EMPTY or state in _ACTIVE else self.capacity(zone)
        return Zone(start, self.capacity(zone), start + pointer, self.type(zone), state)

    def report(self, sector: int, count: int) -> list[Zone]:
        """At most ``count`` zones, from the one that holds ``sector`` on."""
        first = self._holding(sector)
        return [self.describe(zone) for zone in range(first, min(first + count, self.count))]

    def named(self, sector: int) -> int:
        """The zone that starts at ``sector``.  Raises: ZoneInvalidCommand (HOSTILE-188)."""
        zone = self._holding(sector)
        if sector != self.start(zone):
            raise ZoneInvalidCommand(f"no zone starts at sector {sector}")
        return zone

    def sequential(self, sector: int) -> int:
        """The zone that starts at ``sector``, which must not be conventional (BLK-111).  Raises: ZoneInvalidCommand."""
        zone = self.named(sector)
        if zone < self.conventional:
            raise ZoneInvalidCommand(f"zone {zone} is conventional")
        return zone

    def cut(self, sector: int, sectors: int) -> Iterator[Piece]:
        """A range zone by zone."""
        while sectors:
            zone, offset = divmod(sector, self.zoning.zone_sectors)
            part = min(sectors, self.zoning.zone_sectors - offset)
            yield Piece(zone, offset, part)
            sector, sectors = sector + part, sectors - part

    def pieces(self, sector: int, sectors: int) -> list[Piece]:
        """A range zone by zone.  Raises: ZoneInvalidCommand if it leaves a zone that must be written in order."""
        found = list(self.cut(sector, sectors))
        if len(found) > 1 and any(self.type(each.zone) is ZoneType.SEQUENTIAL_REQUIRED for each in found):
            raise ZoneInvalidCommand(f"{sectors} sectors from {sector} reach into another zone")  # BLK-131
        return found

    def readable(self, piece: Piece) -> int:
        """How many of the first sectors of ``piece`` hold data; the others are unwritten (BLK-137, BLK-138).

        Raises: ZoneInvalidCommand for a zone that is offline.
        """
        if self._states[piece.zone] is ZoneState.OFFLINE:
            raise ZoneInvalidCommand(f"zone {piece.zone} is offline")
        if piece.zone < self.conventional:
            return piece.sectors
        return max(0, min(piece.sectors, self._written[piece.zone] - piece.offset))

    # Writing.

    def check_write(self, piece: Piece) -> None:
        """Whether ``piece`` can be written now.  Raises: the four zone errors."""
        zone = piece.zone
        if zone < self.conventional:
            return
        if self.type(zone) is ZoneType.SEQUENTIAL_REQUIRED:
            self._check_writable(zone, full_is_fine=False)
            if piece.offset != self._written[zone]:
                raise ZoneUnalignedWritePointer(f"zone {zone} must be written at {self._written[zone]}")
        else:
            self._check_writable(zone, full_is_fine=True)
        self._check_room(piece)

    def check_append(self, zone: int, sectors: int) -> Piece:
        """Where an append of ``sectors`` goes.  Raises: the four zone errors."""
        if self.type(zone) is not ZoneType.SEQUENTIAL_REQUIRED or not sectors:
            raise ZoneInvalidCommand(f"zone {zone} takes no append of {sectors} sectors")  # BLK-112
        self._check_writable(zone, full_is_fine=False)
        piece = Piece(zone, self._written[zone], sectors)
        self._check_room(piece)
        return piece

    def written_after(self, piece: Piece) -> int:
        """What :meth:`written` will be once ``piece`` is."""
        return max(self._written[piece.zone], piece.offset + piece.sectors)

    def write(self, piece: Piece) -> None:
        """``piece`` has been written."""
        zone = piece.zone
        if zone < self.conventional or not piece.sectors:
            return
        self._written[zone] = self.written_after(piece)
        if self._states[zone] in (ZoneState.EMPTY, ZoneState.CLOSED):
            self._make_room()
            self._enter(zone, ZoneState.IMPLICIT_OPEN)
        if self._written[zone] == self.capacity(zone):
            self._enter(zone, ZoneState.FULL)

    # Commands.

    def check_open(self, zone: int) -> None:
        """Whether a zone can be opened.  Raises: ZoneInvalidCommand, ZoneOpenResource, ZoneActiveResource."""
        self._check_writable(zone, full_is_fine=False)
        self._check_resources(zone)

    def open_zone(self, zone: int) -> None:
        """Open explicitly."""
        if self._states[zone] not in _OPEN:
            self._make_room()
        self._enter(zone, ZoneState.EXPLICIT_OPEN)

    def check_close(self, zone: int) -> None:
        """Whether a zone can be closed: one that is active.  Raises: ZoneInvalidCommand."""
        if self._states[zone] not in _ACTIVE:
            raise ZoneInvalidCommand(f"zone {zone} cannot be closed: it is {self._states[zone].name}")

    def close_zone(self, zone: int) -> None:
        """Close; what was opened and never written is empty again."""
        self._enter(zone, ZoneState.CLOSED if self._written[zone] else ZoneState.EMPTY)

    def check_finish(self, zone: int) -> None:
        """Whether a zone can be made full.  Raises: ZoneInvalidCommand."""
        self._check_alive(zone)

    def finish(self, zone: int) -> None:
        """Make full; what was not written stays unwritten."""
        self._enter(zone, ZoneState.FULL)

    def check_reset(self, zone: int) -> None:
        """Whether a zone can be made empty.  Raises: ZoneInvalidCommand."""
        self._check_alive(zone)

    def reset(self, zone: int) -> None:
        """Make empty."""
        self._enter(zone, ZoneState.EMPTY)
        self._written[zone] = 0

    def resettable(self) -> list[int]:
        """The zones that RESET_ALL empties: those that are open, closed or full."""
        return [zone for zone, state in enumerate(self._states) if state in _ACTIVE or state is ZoneState.FULL]

    def check_fail(self, zone: int, state: ZoneState) -> None:
        """Whether the medium of a zone can fail like this.  Raises: ValueError."""
        if state not in _DEAD or zone < self.conventional or self._states[zone] is ZoneState.OFFLINE:
            raise ValueError(f"zone {zone} cannot become {state.name}")

    def fail(self, zone: int, state: ZoneState) -> None:
        """The medium of a zone has failed: it is READ_ONLY or OFFLINE for good."""
        self._enter(zone, state)

    def restore(self, zone: int, state: ZoneState, written: int) -> None:
        """Set a zone up as it was remembered: EMPTY, CLOSED, FULL, READ_ONLY or OFFLINE."""
        self._written[zone] = written
        self._enter(zone, state)

    # Rules.

    def _check_alive(self, zone: int) -> None:
        if self._states[zone] in _DEAD:
            raise ZoneInvalidCommand(f"zone {zone} is {self._states[zone].name}")

    def _check_writable(self, zone: int, *, full_is_fine: bool) -> None:
        self._check_alive(zone)
        if self._states[zone] is ZoneState.FULL and not full_is_fine:
            raise ZoneInvalidCommand(f"zone {zone} is full")

    def _check_room(self, piece: Piece) -> None:
        end = piece.offset + piece.sectors
        if end > self.capacity(piece.zone):
            raise ZoneInvalidCommand(f"zone {piece.zone} has no room for {piece.sectors} sectors more")  # BLK-130
        if end % self._granularity:
            raise ZoneUnalignedWritePointer(f"a write ends at {end}, not a multiple of {self._granularity} sectors")
        if piece.sectors:
            self._check_resources(piece.zone)

    def _check_resources(self, zone: int) -> None:
        limits, state = self.zoning, self._states[zone]
        if state is ZoneState.EMPTY and limits.max_active and self.active >= limits.max_active:
            raise ZoneActiveResource(f"{self.active} zones are active")  # also if both limits are met (BLK-149)
        opens = state in (ZoneState.EMPTY, ZoneState.CLOSED)
        if opens and limits.max_open and self.open >= limits.max_open and not self._implicit:
            raise ZoneOpenResource(f"{self.open} zones are open")

    def _make_room(self) -> None:
        """Before a zone is opened: at the limit, close the one that was opened implicitly longest ago (BLK-157)."""
        if self.zoning.max_open and self.open >= self.zoning.max_open:
            self.close_zone(next(iter(self._implicit)))

    def _enter(self, zone: int, state: ZoneState) -> None:
        was = self._states[zone]
        self.open += (state in _OPEN) - (was in _OPEN)
        self.active += (state in _ACTIVE) - (was in _ACTIVE)
        self._states[zone] = state
        if state is ZoneState.IMPLICIT_OPEN:
            self._implicit.setdefault(zone)
        else:
            self._implicit.pop(zone, None)

    # Geometry.

    def _holding(self, sector: int) -> int:
        if not 0 <= sector < self._size:
            raise ZoneInvalidCommand(f"there is no sector {sector}")
        return sector // self.zoning.zone_sectors
