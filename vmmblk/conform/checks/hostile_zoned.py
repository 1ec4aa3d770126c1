"""Hostile drivers: zone requests that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import NotOffered, NotTestable, check, expect
from vmmblk.conform.ranges import DISCARD, segments
from vmmblk.conform.requests import ask, expect_answer, field
from vmmblk.conform.zones import (
    ACTIVE,
    expect_same,
    expect_zone,
    model,
    report,
    reports,
    zone_sectors,
    zoned,
)
from vmmblk.spec import (
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
    from vmmblk.conform.target import Target

ZONED = Feature.BLK_ZONED
OUT, APPEND, REPORT, RESET_ALL = (
    RequestType.OUT,
    RequestType.ZONE_APPEND,
    RequestType.ZONE_REPORT,
    RequestType.ZONE_RESET_ALL,
)
COMMANDS = (RequestType.ZONE_OPEN, RequestType.ZONE_CLOSE, RequestType.ZONE_FINISH, RequestType.ZONE_RESET)
OK, IOERR, INVALID, UNALIGNED = Status.OK, Status.IOERR, Status.ZONE_INVALID_CMD, Status.ZONE_UNALIGNED_WP
REQUIRED = (ZoneType.SEQUENTIAL_REQUIRED,)
_HEADER, _DESCRIPTOR = ZONE_REPORT_HEADER.size, ZONE_DESCRIPTOR.size
_LINUX_ROOM = 15
"""Bytes before the status of an append: Linux has append_sector and the status at the ends of a padded structure."""


@check(ZONED, destructive=True)
def commands_within_a_zone(target: Target) -> None:
    """OPEN, CLOSE, FINISH and RESET of a sector that starts no zone get ZONE_INVALID_CMD (HOSTILE-188)."""
    with zoned(target) as z:
        zone = z.bring(z.mine[0], ZoneState.IMPLICIT_OPEN)
        for kind in COMMANDS:
            for sector in (zone.start + 1, zone.start + z.unit, zone.start + zone.capacity - 1):
                expect_answer(ask(z.driver, kind, sector), f"{kind.name} of sector {sector:#x} of a zone", INVALID)
                expect_same(z, zone, f"{kind.name} of sector {sector:#x}")


@check(ZONED, destructive=True)
def commands_past_the_end(target: Target) -> None:
    """Zone requests of sectors behind the disk get ZONE_INVALID_CMD (HOSTILE-189)."""
    with zoned(target) as z:
        size = zone_sectors(z.driver)
        behind = -(-z.driver.capacity // size) * size
        before = report(z.driver)
        for sector in (behind, behind + size, 1 << 40, 1 << 55, 1 << 63, (1 << 64) - size, (1 << 64) - 1):
            for kind in COMMANDS:
                expect_answer(ask(z.driver, kind, sector), f"{kind.name} of sector {sector:#x}", INVALID)
            answer = ask(z.driver, REPORT, sector, data_in=_HEADER + _DESCRIPTOR)
            expect_answer(answer, f"a report from sector {sector:#x} on", INVALID)
            if field(z.driver, BlkConfig.MAX_APPEND_SECTORS):
                answer = ask(z.driver, APPEND, sector, z.data(), ZONE_APPEND_SECTOR.size)
                expect_answer(answer, f"an append at sector {sector:#x}", INVALID)
        expect(report(z.driver) == before, "zones have changed by requests behind the disk")


@check(ZONED, each_ring=True)
def reports_without_room(target: Target) -> None:
    """A report without room for its header, or for a zone, is refused or has no zone (HOSTILE-190)."""
    with target.driver() as driver:
        model(driver)
        for room in (0, 8, _HEADER - 1):
            answer, _ = reports(driver, 0, room)
            expect_answer(answer, f"a report into {room} bytes", IOERR, INVALID)
        for room in (_HEADER, _HEADER + 1, _HEADER + _DESCRIPTOR - 1):
            answer, count = reports(driver, 0, room)
            expect_answer(answer, f"a report into {room} bytes", OK, IOERR, INVALID)
            expect(answer.outcome != OK or count == 0, f"a report into {room} bytes has {count} zones")


@check(ZONED)
def reports_with_room(target: Target) -> None:
    """A report with more room than there are zones has those that exist (HOSTILE-191)."""
    with target.driver() as driver:
        model(driver)
        size = zone_sectors(driver)
        answer, count = reports(driver, driver.capacity - 1, _HEADER + 64 * _DESCRIPTOR)
        expect_answer(answer, "a report from the last zone on", OK)
        expect(count == 1, f"a report from the last zone on has {count} zones")
        answer, count = reports(driver, 0, 1 << 20)
        exist = -(-driver.capacity // size)
        expect_answer(answer, "a report into a megabyte", OK)
        expect(count <= exist, f"a report into a megabyte has {count} zones, there are {exist}")


@check(ZONED, destructive=True, each_ring=True)
def appends_without_room(target: Target) -> None:
    """An append without room for append_sector is refused, and nothing is written (HOSTILE-192)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        if not field(z.driver, BlkConfig.MAX_APPEND_SECTORS):
            raise NotOffered("max_append_sectors is 0: there is no append")
        for room in (0, 1, ZONE_APPEND_SECTOR.size - 1):
            answer = ask(z.driver, APPEND, zone.start, z.data(), room)
            expect(answer.outcome != OK, f"an append with room for {room} bytes: {answer}")
            expect_same(z, zone, f"an append with room for {room} bytes")


@check(ZONED, destructive=True, each_ring=True)
def appends_with_room(target: Target) -> None:
    """An append with more room than append_sector, as Linux makes it, tells its sector in the first (HOSTILE-199)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        if not field(z.driver, BlkConfig.MAX_APPEND_SECTORS):
            raise NotOffered("max_append_sectors is 0: there is no append")
        for written in (0, 1):
            answer = ask(z.driver, APPEND, zone.start, z.data(), _LINUX_ROOM)
            expect_answer(answer, f"an append with room for {_LINUX_ROOM} bytes", OK)
            (sector,) = ZONE_APPEND_SECTOR.unpack_from(answer.data)
            right = zone.start + written * z.unit
            expect(sector == right, f"an append at {right:#x} has {sector:#x} in the first of {_LINUX_ROOM} bytes")


@check(ZONED, destructive=True)
def parts_of_granules(target: Target) -> None:
    """Parts of write_granularity are not written: ZONE_UNALIGNED_WP or ZONE_INVALID_CMD (HOSTILE-193)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        if z.unit == 1:
            raise NotTestable("write_granularity is a sector")
        odd = bytes((z.unit + 1) * SECTOR_SIZE)
        expect_answer(ask(z.driver, OUT, zone.start, odd), f"writing {len(odd)} bytes", UNALIGNED, INVALID)
        expect_same(z, zone, f"writing {len(odd)} bytes")
        if len(odd) <= field(z.driver, BlkConfig.MAX_APPEND_SECTORS) * SECTOR_SIZE:
            answer = ask(z.driver, APPEND, zone.start, odd, ZONE_APPEND_SECTOR.size)
            expect_answer(answer, f"appending {len(odd)} bytes", UNALIGNED, INVALID)
            expect_same(z, zone, f"appending {len(odd)} bytes")


@check(ZONED, destructive=True)
def nothing_is_written(target: Target) -> None:
    """Writes and appends of no bytes change no state (HOSTILE-194)."""
    with zoned(target) as z:
        for state in (ZoneState.EMPTY, ZoneState.CLOSED):
            zone = z.bring(z.mine[0], state)
            ask(z.driver, OUT, zone.pointer)
            expect_same(z, zone, f"a write of nothing in state {state.name}")
            ask(z.driver, APPEND, zone.start, b"", ZONE_APPEND_SECTOR.size)
            expect_same(z, zone, f"an append of nothing in state {state.name}")


@check(ZONED, destructive=True)
def reset_all_of_a_sector(target: Target) -> None:
    """RESET_ALL ignores its sector (HOSTILE-195)."""
    with zoned(target, 2) as z:
        for sector in (z.mine[0].start + 1, (1 << 64) - 1):
            for zone in z.mine:
                z.bring(zone, ZoneState.IMPLICIT_OPEN)
            expect_answer(ask(z.driver, RESET_ALL, sector), f"RESET_ALL of sector {sector:#x}", OK)
            for zone in z.mine:
                expect_zone(z, zone, ZoneState.EMPTY, f"RESET_ALL of sector {sector:#x}")


@check(ZONED, destructive=True)
def commands_with_data(target: Target) -> None:
    """Data that comes with OPEN, CLOSE, FINISH, RESET and RESET_ALL is ignored (HOSTILE-196)."""
    ends = (ZoneState.EXPLICIT_OPEN, ZoneState.CLOSED, ZoneState.FULL, ZoneState.EMPTY, ZoneState.EMPTY)
    with zoned(target) as z:
        z.bring(z.mine[0], ZoneState.IMPLICIT_OPEN)
        for kind, end in zip((*COMMANDS, RESET_ALL), ends, strict=True):
            answer = ask(z.driver, kind, z.mine[0].start, z.data(), SECTOR_SIZE)
            expect_answer(answer, f"{kind.name} with data", OK)
            expect(answer.data == answer.before, f"{kind.name} has written to memory before its status")
            expect_zone(z, z.mine[0], end, f"{kind.name} with data")


@check(ZONED, Feature.BLK_RO, destructive=True)
def read_only_disks_keep_their_zones(target: Target) -> None:
    """Zone commands, writes and appends to a read-only disk get IOERR or UNSUPP, and change no zone (HOSTILE-162)."""
    with target.driver() as driver:
        model(driver)
        before = report(driver)
        pointed = [zone for zone in before if zone.type != ZoneType.CONVENTIONAL]
        if not pointed:
            raise NotOffered("there is no sequential zone")
        zone, data = pointed[0], bytes(target.facts.block_size)
        answers = {kind: ask(driver, kind, zone.start) for kind in (*COMMANDS, RESET_ALL)}
        answers[OUT] = ask(driver, OUT, zone.pointer if zone.state in ACTIVE else zone.start, data)
        answers[APPEND] = ask(driver, APPEND, zone.start, data, ZONE_APPEND_SECTOR.size)
        expect(report(driver) == before, "zones of a read-only disk have changed")
        for kind, answer in answers.items():
            expect_answer(answer, f"{kind.name} to a read-only disk", IOERR, Status.UNSUPP)


@check(ZONED, destructive=True)
def discard_leaves_zones(target: Target) -> None:
    """DISCARD of a host-managed disk gets UNSUPP if it is not offered, and changes no zone (HOSTILE-198)."""
    with zoned(target) as z:
        if model(z.driver) != ZoneModel.HOST_MANAGED:
            raise NotOffered("the disk is not host-managed")
        zone = z.bring(z.mine[0], ZoneState.IMPLICIT_OPEN)
        answer = ask(z.driver, DISCARD.type, 0, segments((zone.start, z.unit)))
        expect_same(z, zone, "DISCARD")
        if not target.offers(DISCARD.feature):
            expect_answer(answer, "DISCARD, not offered", Status.UNSUPP)
