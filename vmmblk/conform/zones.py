"""A zoned disk as checks use it: what it reports, and zones of it that may be written."""

from __future__ import annotations

import contextlib
import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from vmmblk.client.queue import Segment
from vmmblk.conform.check import Broken, NotOffered, NotTestable, expect
from vmmblk.conform.requests import Answer, ask, ask_chain, expect_answer, field, pattern
from vmmblk.spec import (
    REQUEST_HEADER,
    SECTOR_SIZE,
    ZONE_APPEND_SECTOR,
    ZONE_DESCRIPTOR,
    ZONE_REPORT_HEADER,
    BlkConfig,
    Feature,
    RequestType,
    Status,
    ZoneModel,
    ZoneState,
    ZoneType,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

__all__ = [
    "ACTIVE",
    "OPEN_STATES",
    "SEQUENTIAL",
    "Zone",
    "Zones",
    "descriptors",
    "expect_same",
    "expect_zone",
    "limit",
    "model",
    "report",
    "reports",
    "zone_sectors",
    "zoned",
]

_REPORT = 256
"""How many zones are asked for at a time, and"""
_MOST = 1 << 16
"""how many are looked at."""
_CHUNK = 256 << 10
_PIECE = 32 << 20
_FILL = 32 << 20
"""Bytes of a zone that is written full, at most."""


OPEN_STATES = (ZoneState.IMPLICIT_OPEN, ZoneState.EXPLICIT_OPEN)
ACTIVE = (*OPEN_STATES, ZoneState.CLOSED)
SEQUENTIAL = (ZoneType.SEQUENTIAL_REQUIRED, ZoneType.SEQUENTIAL_PREFERRED)
_FAILED = (ZoneState.READ_ONLY, ZoneState.OFFLINE)

# What brings an empty zone into a state, after a write.
_WAYS = {
    ZoneState.IMPLICIT_OPEN: None,
    ZoneState.EXPLICIT_OPEN: RequestType.ZONE_OPEN,
    ZoneState.CLOSED: RequestType.ZONE_CLOSE,
    ZoneState.FULL: RequestType.ZONE_FINISH,
}


class Zone(NamedTuple):
    """A zone as it is reported; in sectors of 512 bytes."""

    capacity: int
    start: int
    pointer: int
    type: int
    state: int


def model(driver: VirtioBlk) -> ZoneModel:
    """The model of the disk.  Raises NotOffered if it is none with zones."""
    found = field(driver, BlkConfig.ZONED_MODEL)
    if found not in (ZoneModel.HOST_MANAGED, ZoneModel.HOST_AWARE):
        raise NotOffered(f"the zoned model is {found}: the disk has no zones")
    return ZoneModel(found)


def zone_sectors(driver: VirtioBlk) -> int:
    """The size of a zone, sectors of 512 bytes.  Raises Broken if it is 0."""
    found = field(driver, BlkConfig.ZONE_SECTORS)
    expect(found, "zone_sectors is 0")
    return found


def report(driver: VirtioBlk) -> list[Zone]:
    """Every zone of the disk, from the first on, or as many as are ever looked at.

    Raises Broken if the reports do not lead on.
    """
    zones: list[Zone] = []
    size = zone_sectors(driver)
    while len(zones) < _MOST and len(zones) * size < driver.capacity:
        more = [Zone(*each) for each in driver.zone_report(len(zones) * size, _REPORT)]
        if not more:
            raise Broken(f"a report from sector {len(zones) * size:#x} on tells of no zone")
        zones += more
    return zones


@dataclass(frozen=True, slots=True)
class Zones:
    """Empty zones of a disk, ``mine``, for a check to use."""

    target: Target
    driver: VirtioBlk
    mine: tuple[Zone, ...]
    unit: int
    """Sectors: the least that can be written."""

    def look(self, zone: Zone) -> Zone:
        """The zone as it is now."""
        return Zone(*self.driver.zone_report(zone.start, 1)[0])

    def data(self, units: int = 1, seed: str = "zone") -> bytes:
        """Something to write."""
        return pattern(units * self.unit * SECTOR_SIZE, seed)

    def tell(self, kind: RequestType, zone: Zone) -> Answer:
        """OPEN, CLOSE, FINISH or RESET the zone; RESET_ALL as well."""
        return ask(self.driver, kind, zone.start)

    def write(self, zone: Zone, units: int = 1) -> Answer:
        """Write at the write pointer."""
        return ask(self.driver, RequestType.OUT, self.look(zone).pointer, self.data(units))

    def append(self, zone: Zone, units: int = 1) -> Answer:
        """Append to the zone.  Raises NotOffered if the disk has no append."""
        if not field(self.driver, BlkConfig.MAX_APPEND_SECTORS):
            raise NotOffered("max_append_sectors is 0: there is no append")
        return ask(self.driver, RequestType.ZONE_APPEND, zone.start, self.data(units), ZONE_APPEND_SECTOR.size)

    def write_much(self, kind: RequestType, sector: int, sectors: int) -> Answer:
        """A write or append of any length, from memory that is named again and again.

        Raises NotTestable if that is more than the device takes in one request.
        """
        header = self.driver.memory.alloc(4096)
        self.driver.memory.write(header, REQUEST_HEADER.pack(kind, 0, sector))
        data = self._repeat(sectors * SECTOR_SIZE)
        room = ZONE_APPEND_SECTOR.size if kind == RequestType.ZONE_APPEND else 0
        status = header + 64 + room
        chain = [Segment(header, REQUEST_HEADER.size, writable=False), *data]
        return ask_chain(self.driver, [*chain, Segment(header + 64, room + 1, writable=True)], status)

    def _repeat(self, length: int) -> list[Segment]:
        driver, piece = self.driver, _PIECE
        if driver.has(Feature.BLK_SIZE_MAX):
            piece = min(piece, field(driver, BlkConfig.SIZE_MAX) or piece)
        count = -(-length // piece)
        most = field(driver, BlkConfig.SEG_MAX) if driver.has(Feature.BLK_SEG_MAX) else count
        if length >= 1 << 32 or count > most:
            raise NotTestable(f"{length} bytes are more than one request can have here")
        iova = driver.memory.alloc(min(piece, length))
        return [Segment(iova, min(piece, length - at), writable=False) for at in range(0, length, piece)]

    def bring(self, zone: Zone, state: ZoneState) -> Zone:
        """Bring an empty zone into a state, with something written unless it is to be empty; the zone then.

        Raises NotTestable if it does not get there.
        """
        steps = [] if state is ZoneState.EMPTY else [self.write(zone)]
        if command := _WAYS.get(state):
            steps.append(self.tell(command, zone))
        now = self.look(zone)
        if any(step.outcome != Status.OK for step in steps) or now.state != state:
            told = ", ".join(str(step) for step in steps)
            raise NotTestable(f"no zone comes into the state {state.name}: it is in state {now.state}; {told}")
        return now

    def fill(self, zone: Zone, kind: RequestType) -> None:
        """Write or append to a zone until it is at its capacity.  Raises NotTestable if that is too much."""
        if zone.capacity * SECTOR_SIZE > _FILL:
            raise NotTestable(f"a zone has {zone.capacity} sectors, too many to write all of one")
        step = self._step(kind)
        at = self.look(zone).pointer
        while at < zone.start + zone.capacity:
            sectors = min(step, zone.start + zone.capacity - at)
            sector = zone.start if kind == RequestType.ZONE_APPEND else at
            room = ZONE_APPEND_SECTOR.size if kind == RequestType.ZONE_APPEND else 0
            answer = ask(self.driver, kind, sector, pattern(sectors * SECTOR_SIZE, f"{at}"), room)
            expect_answer(answer, f"{kind.name} of {sectors} sectors at {at:#x}", Status.OK)
            at += sectors

    def _step(self, kind: RequestType) -> int:
        most = _CHUNK // SECTOR_SIZE
        if kind == RequestType.ZONE_APPEND:
            most = min(most, field(self.driver, BlkConfig.MAX_APPEND_SECTORS))
        if not most:
            raise NotOffered("max_append_sectors is 0: there is no append")
        return max(most // self.unit * self.unit, self.unit)


def limit(driver: VirtioBlk, which: BlkConfig, most: int = 64) -> int:
    """A limit of zones, max_open_zones or max_active_zones.  Raises NotTestable if there is none, or it is too far."""
    found = field(driver, which)
    if not 0 < found <= most:
        raise NotTestable(f"{which.name.lower()} is {found}" if found else f"{which.name.lower()} is 0: no limit")
    return found


@contextlib.contextmanager
def zoned(target: Target, count: int = 1, types: tuple[ZoneType, ...] = SEQUENTIAL) -> Iterator[Zones]:
    """A driver of a zoned disk with ``count`` empty zones of one of ``types``, and no zone open or closed.

    Raises NotOffered, NotTestable if the disk is not zoned, is read-only or has no such zones.
    """
    target.require(Feature.BLK_ZONED)
    if target.offers(Feature.BLK_RO):
        raise NotTestable("the disk is read-only")
    with target.driver() as driver:
        model(driver)
        granularity = max(field(driver, BlkConfig.WRITE_GRANULARITY), SECTOR_SIZE)
        unit = math.lcm(granularity, target.facts.block_size) // SECTOR_SIZE
        zones = Zones(target, driver, (), unit)
        found = report(driver)
        for zone in found:
            if zone.state in ACTIVE:
                zones.tell(RequestType.ZONE_RESET, zone)
        fitting = (z for z in found if z.type in types and z.state not in _FAILED and z.capacity >= 4 * unit)
        mine = tuple(itertools.islice(fitting, count))
        if len(mine) < count:
            raise NotOffered(f"takes {count} zones of type {' or '.join(t.name for t in types)}, there are {len(mine)}")
        for zone in mine:
            if zone.type != ZoneType.CONVENTIONAL:
                zones.tell(RequestType.ZONE_RESET, zone)
        yield Zones(target, driver, tuple(zones.look(zone) for zone in mine), unit)


def expect_zone(zones: Zones, zone: Zone, state: ZoneState, case: str) -> None:
    """Raise Broken unless the zone is in ``state`` after ``case``."""
    now = zones.look(zone)
    expect(now.state == state, f"{case}: the zone is in state {_name(now.state)}")
    if state is ZoneState.EMPTY:
        expect(now.pointer == zone.start, f"{case}: the zone is empty, its pointer is {now.pointer:#x}")


def expect_same(zones: Zones, zone: Zone, case: str) -> None:
    """Raise Broken unless the zone is as it was, in state and pointer."""
    now = zones.look(zone)
    moved = zone.state in (ZoneState.EMPTY, *ACTIVE) and now.pointer != zone.pointer
    changed = now.state != zone.state or moved
    expect(not changed, f"{case}: a zone in state {_name(zone.state)} is in {_name(now.state)}, at {now.pointer:#x}")


def _name(state: int) -> str:
    names = {each.value: each.name for each in ZoneState}
    return names.get(state, f"{state}")


def reports(driver: VirtioBlk, sector: int, room: int) -> tuple[Answer, int]:
    """A report into ``room`` bytes, and how many zones it says it has."""
    answer = ask(driver, RequestType.ZONE_REPORT, sector, data_in=room)
    (count,) = ZONE_REPORT_HEADER.unpack_from(answer.data) if room >= ZONE_REPORT_HEADER.size else (0,)
    return answer, int(count)


def descriptors(data: bytes, count: int) -> list[Zone]:
    """The first ``count`` zones of a report."""
    end = ZONE_REPORT_HEADER.size + count * ZONE_DESCRIPTOR.size
    return [Zone(*each) for each in ZONE_DESCRIPTOR.iter_unpack(data[ZONE_REPORT_HEADER.size : end])]
