"""Zoned disks: which requests go where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import NotOffered, NotTestable, check, expect
from vmmblk.conform.ranges import segments
from vmmblk.conform.requests import Answer, ask, expect_answer, expect_data, field, pattern
from vmmblk.conform.zones import (
    SEQUENTIAL,
    Zone,
    expect_same,
    expect_zone,
    model,
    report,
    zone_sectors,
    zoned,
)
from vmmblk.spec import SECTOR_SIZE, ZONE_APPEND_SECTOR, BlkConfig, Feature, RequestType, Status, ZoneState, ZoneType

if TYPE_CHECKING:
    from vmmblk.conform.target import Target
    from vmmblk.conform.zones import Zones

ZONED, ERASE = Feature.BLK_ZONED, Feature.BLK_SECURE_ERASE
IN, OUT, APPEND = RequestType.IN, RequestType.OUT, RequestType.ZONE_APPEND
OPEN, CLOSE, FINISH, RESET = (
    RequestType.ZONE_OPEN,
    RequestType.ZONE_CLOSE,
    RequestType.ZONE_FINISH,
    RequestType.ZONE_RESET,
)
OK, INVALID, UNALIGNED = Status.OK, Status.ZONE_INVALID_CMD, Status.ZONE_UNALIGNED_WP
REQUIRED, PREFERRED = (ZoneType.SEQUENTIAL_REQUIRED,), (ZoneType.SEQUENTIAL_PREFERRED,)
CONVENTIONAL = (ZoneType.CONVENTIONAL,)
_APPEND_BYTES = 8 << 20
"""Bytes of an append that carries data of its own, at most."""


# Where writes go.


@check(ZONED, destructive=True)
def conventional_zones_are_written_anywhere(target: Target) -> None:
    """Conventional zones are read and written anywhere in any order (BLK-108)."""
    with zoned(target, 1, CONVENTIONAL) as z:
        (zone,) = z.mine
        for units in (3, 0, 2, 0):
            sector, data = zone.start + units * z.unit, z.data(1, f"at {units}")
            expect_answer(ask(z.driver, OUT, sector, data), f"writing sector {sector:#x}, conventional", OK)
            expect_data(z.driver, sector, data, f"sector {sector:#x} was written")
        expect_zone(z, zone, ZoneState.NOT_WRITE_POINTER, "after writes")


@check(ZONED, destructive=True)
def writes_go_to_the_pointer(target: Target) -> None:
    """Writes at the write pointer are OK and advance it by what they write, which can be read (BLK-109)."""
    with zoned(target, 1, SEQUENTIAL) as z:
        (zone,) = z.mine
        for written, units in ((0, 1), (1, 2)):
            data = z.data(units, f"{written}")
            sector = zone.start + written * z.unit
            expect_answer(ask(z.driver, OUT, sector, data), f"writing at the pointer {sector:#x}", OK)
            now = z.look(zone).pointer
            expect(
                now == sector + units * z.unit, f"{units * z.unit} sectors written at {sector:#x}, it is at {now:#x}"
            )
            expect_data(z.driver, sector, data, "written at the pointer")


@check(ZONED, destructive=True)
def writes_elsewhere_are_refused(target: Target) -> None:
    """A write that does not begin at the write pointer gets ZONE_UNALIGNED_WP (BLK-132, 109)."""
    with zoned(target, 1, REQUIRED) as z:
        for state in (ZoneState.EMPTY, ZoneState.IMPLICIT_OPEN):
            zone = z.bring(z.mine[0], state)
            for sector in {zone.start, zone.pointer + z.unit, zone.pointer + 2 * z.unit} - {zone.pointer}:
                case = f"writing sector {sector:#x}, the pointer is {zone.pointer:#x}"
                expect_answer(ask(z.driver, OUT, sector, z.data()), case, UNALIGNED)
                expect_same(z, zone, case)


@check(ZONED, destructive=True)
def preferred_zones_are_written_anywhere(target: Target) -> None:
    """Zones that should be written in order take other writes too (BLK-110)."""
    with zoned(target, 1, PREFERRED) as z:
        (zone,) = z.mine
        for units in (2, 0, 2):
            sector, data = zone.start + units * z.unit, z.data(1, f"at {units}")
            expect_answer(ask(z.driver, OUT, sector, data), f"writing sector {sector:#x}, the zone prefers order", OK)
            expect_data(z.driver, sector, data, f"sector {sector:#x} was written")


@check(ZONED, destructive=True)
def writes_have_a_granularity(target: Target) -> None:
    """A write whose end is no multiple of write_granularity gets ZONE_UNALIGNED_WP (BLK-133)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        size = target.facts.block_size
        if z.unit * SECTOR_SIZE == size:
            raise NotTestable(f"write_granularity is that of blocks, {size} bytes")
        expect_answer(ask(z.driver, OUT, zone.start, bytes(size)), f"writing {size} bytes", UNALIGNED)
        expect_same(z, zone, f"writing {size} bytes")


@check(ZONED, destructive=True)
def granules_can_be_written(target: Target) -> None:
    """Writes and appends of write_granularity bytes are OK (BLK-048)."""
    with zoned(target, 2, REQUIRED) as z:
        first, second = z.mine
        expect_answer(z.write(first), f"writing {z.unit * SECTOR_SIZE} bytes", OK)
        if field(z.driver, BlkConfig.MAX_APPEND_SECTORS) >= z.unit:
            expect_answer(z.append(second), f"appending {z.unit * SECTOR_SIZE} bytes", OK)


@check(ZONED, destructive=True)
def more_than_there_is_room_for(target: Target) -> None:
    """A write or append of more than is left in the zone gets ZONE_INVALID_CMD (BLK-130)."""
    with zoned(target, 1, REQUIRED) as z:
        zone = z.bring(z.mine[0], ZoneState.IMPLICIT_OPEN)
        left = zone.start + zone.capacity - zone.pointer
        expect_answer(z.write_much(OUT, zone.pointer, left + z.unit), "writing more than is left", INVALID)
        expect_same(z, zone, "writing more than is left")
        if left + z.unit <= field(z.driver, BlkConfig.MAX_APPEND_SECTORS):
            expect_answer(z.write_much(APPEND, zone.start, left + z.unit), "appending more than is left", INVALID)
            expect_same(z, zone, "appending more than is left")


@check(ZONED, destructive=True)
def no_request_spans_zones(target: Target) -> None:
    """A read or write that spans zones gets ZONE_INVALID_CMD (BLK-131, HOSTILE-197)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        size = zone_sectors(z.driver)
        if zone.start + 2 * size > z.driver.capacity:
            raise NotTestable("takes two zones of full size")
        following = Zone(*z.driver.zone_report(zone.start + size, 1)[0])
        block = target.block_sectors
        answer = ask(z.driver, IN, following.start - block, data_in=2 * target.facts.block_size)
        expect_answer(answer, "a read that spans zones", INVALID)
        answer = z.write_much(OUT, zone.start, size + z.unit)
        expect_answer(answer, "a write that spans zones", INVALID)
        expect_same(z, zone, "a write that spans zones")
        expect_same(z, following, "a write that spans zones, in the second")


# What cannot be read.


@check(ZONED, destructive=True)
def unwritten_sectors_hold_nothing_old(target: Target) -> None:
    """Sectors from the pointer on are a fill pattern when read, or cannot be; old data is gone (BLK-137, 139)."""
    with zoned(target) as z:
        (zone,) = z.mine
        data = z.data(2, "old")
        expect_answer(ask(z.driver, OUT, zone.start, data), "writing", OK)
        expect_answer(z.tell(RESET, zone), "RESET", OK)
        _expect_fresh(z, zone.start, data, "after a RESET")
        z.write(zone)
        _expect_fresh(z, zone.start + z.unit, data[len(data) // 2 :], "after a RESET and a write")


@check(ZONED, destructive=True)
def finished_zones_hold_nothing_old(target: Target) -> None:
    """Sectors that were not written when the zone was finished are unwritten too (BLK-138)."""
    with zoned(target) as z:
        (zone,) = z.mine
        data = z.data(2, "old")
        expect_answer(ask(z.driver, OUT, zone.start, data), "writing", OK)
        for kind in (RESET, OUT, FINISH):
            answer = z.write(zone) if kind == OUT else z.tell(kind, zone)
            expect_answer(answer, kind.name, OK)
        _expect_fresh(z, zone.start + z.unit, data[len(data) // 2 :], "behind what was written before FINISH")


def _expect_fresh(z: Zones, sector: int, old: bytes, case: str) -> None:
    answer = ask(z.driver, IN, sector, data_in=len(old))
    pieces = range(0, len(old), SECTOR_SIZE)
    seen = [at for at in pieces if answer.data[at : at + SECTOR_SIZE] == old[at : at + SECTOR_SIZE]]
    expect(answer.outcome != OK or not seen, f"{case} reading sector {sector:#x} gives what was there before")


# Appends.


@check(ZONED, destructive=True, each_ring=True)
def appends_tell_where(target: Target) -> None:
    """An append is written at the write pointer, and tells the sector (BLK-116)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        for written in (0, 1, 2):
            data = z.data(1, f"append {written}")
            answer = ask(z.driver, APPEND, zone.start, data, ZONE_APPEND_SECTOR.size)
            if answer.outcome == Status.UNSUPP:
                raise NotOffered("there is no append")
            expect_answer(answer, "an append", OK)
            (sector,) = ZONE_APPEND_SECTOR.unpack(answer.data)
            right = zone.start + written * z.unit
            expect(sector == right, f"an append at {right:#x} says that it was written at {sector:#x}")
            expect_data(z.driver, sector, data, "what was appended")


@check(ZONED, destructive=True)
def appends_go_to_sequential_zones(target: Target) -> None:
    """An append to a zone that is not one to be written in order gets ZONE_INVALID_CMD (BLK-112)."""
    with zoned(target, 1, (ZoneType.CONVENTIONAL, ZoneType.SEQUENTIAL_PREFERRED)) as z:
        expect_answer(z.append(z.mine[0]), f"an append to a zone of type {z.mine[0].type}", INVALID)


@check(ZONED, destructive=True)
def appends_name_the_start_of_a_zone(target: Target) -> None:
    """An append whose sector is not the start of a zone gets ZONE_INVALID_CMD (BLK-113)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        z.append(zone)
        before = z.look(zone)
        for sector in (zone.start + z.unit, zone.start + zone.capacity - z.unit):
            answer = ask(z.driver, APPEND, sector, z.data(), ZONE_APPEND_SECTOR.size)
            expect_answer(answer, f"an append at sector {sector:#x} of a zone at {zone.start:#x}", INVALID)
            expect_same(z, before, f"an append at sector {sector:#x}")


@check(ZONED, destructive=True)
def no_appends(target: Target) -> None:
    """With max_append_sectors 0 an append gets UNSUPP (BLK-114)."""
    with zoned(target) as z:
        if field(z.driver, BlkConfig.MAX_APPEND_SECTORS):
            raise NotOffered("max_append_sectors is not 0")
        answer = ask(z.driver, APPEND, z.mine[0].start, z.data(), ZONE_APPEND_SECTOR.size)
        expect_answer(answer, "an append, max_append_sectors is 0", Status.UNSUPP)


@check(ZONED, destructive=True)
def the_largest_append(target: Target) -> None:
    """An append of max_append_sectors is OK (BLK-045)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        most = min(field(z.driver, BlkConfig.MAX_APPEND_SECTORS), zone.capacity, _APPEND_BYTES // SECTOR_SIZE)
        sectors = most // z.unit * z.unit
        if not sectors:
            raise NotOffered("max_append_sectors is 0: there is no append")
        data = pattern(sectors * SECTOR_SIZE, "large")
        answer = ask(z.driver, APPEND, zone.start, data, ZONE_APPEND_SECTOR.size)
        expect_answer(answer, f"an append of {sectors} sectors", OK)


@check(ZONED, destructive=True)
def an_append_that_is_too_large(target: Target) -> None:
    """An append of more than max_append_sectors, where they are not 0, gets ZONE_INVALID_CMD (BLK-115)."""
    with zoned(target, 1, REQUIRED) as z:
        (zone,) = z.mine
        most = field(z.driver, BlkConfig.MAX_APPEND_SECTORS)
        if not most:
            raise NotOffered("max_append_sectors is 0: there is no append")
        sectors = (most // z.unit + 1) * z.unit
        answer = z.write_much(APPEND, zone.start, sectors)
        expect_answer(answer, f"an append of {sectors} sectors, at most {most}", INVALID)
        expect_same(z, zone, f"an append of {sectors} sectors")


# Commands to zones that cannot obey.


@check(ZONED, destructive=True)
def conventional_zones_take_no_commands(target: Target) -> None:
    """OPEN, CLOSE, FINISH and RESET of a conventional zone get ZONE_INVALID_CMD (BLK-111)."""
    with zoned(target, 1, CONVENTIONAL) as z:
        for kind in (OPEN, CLOSE, FINISH, RESET):
            expect_answer(z.tell(kind, z.mine[0]), f"{kind.name} of a conventional zone", INVALID)
            expect_zone(z, z.mine[0], ZoneState.NOT_WRITE_POINTER, kind.name)


@check(ZONED, destructive=True)
def zones_that_cannot_be_full(target: Target) -> None:
    """FINISH of a zone that cannot become full gets ZONE_INVALID_CMD and leaves its state (BLK-124)."""
    _expect_no_way(target, FINISH)


@check(ZONED, destructive=True)
def zones_that_cannot_be_empty(target: Target) -> None:
    """RESET of a zone that cannot become empty gets ZONE_INVALID_CMD and leaves its state (BLK-126)."""
    _expect_no_way(target, RESET)


def _expect_no_way(target: Target, kind: RequestType) -> None:
    """Conventional, read-only and offline zones are never full or empty."""
    with zoned(target, 0) as z:
        never = (ZoneState.NOT_WRITE_POINTER, ZoneState.READ_ONLY, ZoneState.OFFLINE)
        stuck = {zone.state: zone for zone in report(z.driver) if zone.state in never}
        if not stuck:
            raise NotOffered("no zone is conventional, read-only or offline")
        for zone in stuck.values():
            case = f"{kind.name} of a zone in state {ZoneState(zone.state).name}"
            expect_answer(z.tell(kind, zone), case, INVALID)
            expect_same(z, zone, case)


@check(ZONED, destructive=True)
def full_zones_are_not_opened(target: Target) -> None:
    """OPEN of a zone that cannot become open, a full one, gets ZONE_INVALID_CMD (BLK-119)."""
    _expect_full_refuses(target, OPEN)


@check(ZONED, destructive=True)
def full_zones_are_not_closed(target: Target) -> None:
    """CLOSE of a zone that cannot become closed, a full one, gets ZONE_INVALID_CMD (BLK-122)."""
    _expect_full_refuses(target, CLOSE)


def _expect_full_refuses(target: Target, kind: RequestType) -> None:
    with zoned(target) as z:
        zone = z.bring(z.mine[0], ZoneState.FULL)
        expect_answer(z.tell(kind, zone), f"{kind.name} of a full zone", INVALID)
        expect_same(z, zone, f"{kind.name} of a full zone")


@check(ZONED, destructive=True)
def full_zones_are_not_appended_to(target: Target) -> None:
    """An append to a full zone gets ZONE_INVALID_CMD (BLK-143)."""
    with zoned(target, 1, REQUIRED) as z:
        zone = z.bring(z.mine[0], ZoneState.FULL)
        expect_answer(z.append(zone), "an append to a full zone", INVALID)
        expect_same(z, zone, "an append to a full zone")


# Zones that have failed; only a device can make such.


@check(ZONED, destructive=True)
def read_only_zones_are_not_written(target: Target) -> None:
    """A write or append to a read-only zone gets ZONE_INVALID_CMD (BLK-135)."""
    zone = _failed(target, ZoneState.READ_ONLY)
    with zoned(target, 0) as z:
        for answer in _attempts(z, zone):
            expect_answer(answer, "writing to a read-only zone", INVALID)
        expect_zone(z, zone, ZoneState.READ_ONLY, "after writes")


@check(ZONED, destructive=True)
def offline_zones_take_no_requests(target: Target) -> None:
    """Every request to an offline zone gets ZONE_INVALID_CMD (BLK-136)."""
    zone = _failed(target, ZoneState.OFFLINE)
    with zoned(target, 0) as z:
        answers = _attempts(z, zone) + [z.tell(kind, zone) for kind in (OPEN, CLOSE, FINISH, RESET)]
        for answer in [*answers, ask(z.driver, IN, zone.start, data_in=target.facts.block_size)]:
            expect_answer(answer, "a request to an offline zone", INVALID)


@check(ZONED, destructive=True)
def failed_zones_stay(target: Target) -> None:
    """No command brings a read-only or offline zone back (BLK-170)."""
    found = [zone for state in (ZoneState.READ_ONLY, ZoneState.OFFLINE) for zone in _zones_in(target, state)[:1]]
    if not found:
        raise NotOffered("no zone is read-only or offline")
    with zoned(target, 0) as z:
        for zone in found:
            for kind in (OPEN, CLOSE, FINISH, RESET, RequestType.ZONE_RESET_ALL):
                z.tell(kind, zone)
                now = z.look(zone).state
                expect(now in (zone.state, ZoneState.OFFLINE), f"{kind.name} brings a failed zone into state {now}")


@check(ZONED)
def failed_zones_are_read(target: Target) -> None:
    """A read-only zone can be read, an offline zone cannot (BLK-171)."""
    found = [zone for state in (ZoneState.READ_ONLY, ZoneState.OFFLINE) for zone in _zones_in(target, state)[:1]]
    if not found:
        raise NotOffered("no zone is read-only or offline")
    with target.driver() as driver:
        for zone in found:
            answer = ask(driver, IN, zone.start, data_in=target.facts.block_size)
            right = (answer.outcome == OK) is (zone.state == ZoneState.READ_ONLY)
            expect(right, f"reading a zone in state {ZoneState(zone.state).name}: {answer}")


def _attempts(z: Zones, zone: Zone) -> list[Answer]:
    answers = [ask(z.driver, OUT, zone.start, z.data())]
    if field(z.driver, BlkConfig.MAX_APPEND_SECTORS):
        answers.append(z.append(zone))
    return answers


def _failed(target: Target, state: ZoneState) -> Zone:
    found = _zones_in(target, state)
    if not found:
        raise NotOffered(f"no zone is in state {state.name}")
    return found[0]


def _zones_in(target: Target, state: ZoneState) -> list[Zone]:
    with target.driver() as driver:
        model(driver)
        return [zone for zone in report(driver) if zone.state == state]


# SECURE_ERASE.


@check(ZONED, ERASE)
def erase_is_aligned_to_zones(target: Target) -> None:
    """secure_erase_sector_alignment is a multiple of zone_sectors (BLK-140)."""
    with target.driver() as driver:
        model(driver)
        alignment = field(driver, BlkConfig.SECURE_ERASE_SECTOR_ALIGNMENT)
        size = zone_sectors(driver)
        aligned = alignment and alignment % size == 0
        expect(aligned, f"secure_erase_sector_alignment is {alignment}, zone_sectors {size}")


@check(ZONED, ERASE, destructive=True)
def erase_is_of_whole_zones(target: Target) -> None:
    """SECURE_ERASE of what is no whole zone is refused (BLK-141)."""
    with zoned(target) as z:
        zone = z.bring(z.mine[0], ZoneState.IMPLICIT_OPEN)
        size = zone_sectors(z.driver)
        for sector, sectors in ((zone.start, z.unit), (zone.start, size - z.unit), (zone.start + z.unit, size)):
            answer = ask(z.driver, RequestType.SECURE_ERASE, 0, segments((sector, sectors)))
            case = f"SECURE_ERASE of {sectors:#x} sectors from {sector:#x} on"
            expect(answer.outcome != OK, f"{case}, zones have {size:#x}: {answer}")
            expect_same(z, zone, case)


@check(ZONED, ERASE, destructive=True)
def erase_resets_zones(target: Target) -> None:
    """SECURE_ERASE of a zone makes it empty, and leaves others (BLK-142)."""
    with zoned(target, 2) as z:
        for state in (ZoneState.IMPLICIT_OPEN, ZoneState.FULL):
            first, second = (z.bring(zone, state) for zone in z.mine)
            size = zone_sectors(z.driver)
            if first.start + size > z.driver.capacity or field(z.driver, BlkConfig.MAX_SECURE_ERASE_SECTORS) < size:
                raise NotTestable("takes zones that can be erased whole")
            answer = ask(z.driver, RequestType.SECURE_ERASE, 0, segments((first.start, size)))
            expect_answer(answer, "SECURE_ERASE of a zone", OK)
            expect_zone(z, first, ZoneState.EMPTY, "SECURE_ERASE of a zone")
            expect_same(z, second, "SECURE_ERASE of another zone")
            z.tell(RESET, second)
