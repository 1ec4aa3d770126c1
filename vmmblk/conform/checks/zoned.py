"""Zoned disks: what a driver sees of them without changing anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import NotOffered, NotTestable, check, expect
from vmmblk.conform.requests import ask, expect_answer, field
from vmmblk.conform.zones import (
    ACTIVE,
    SEQUENTIAL,
    Zone,
    descriptors,
    model,
    report,
    reports,
    zone_sectors,
)
from vmmblk.spec import (
    SECTOR_SIZE,
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
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

ZONED = Feature.BLK_ZONED
_HEADER, _DESCRIPTOR = ZONE_REPORT_HEADER.size, ZONE_DESCRIPTOR.size
_ZONED_BYTES = 24
_REQUESTS = (
    RequestType.ZONE_REPORT,
    RequestType.ZONE_OPEN,
    RequestType.ZONE_CLOSE,
    RequestType.ZONE_FINISH,
    RequestType.ZONE_APPEND,
    RequestType.ZONE_RESET,
    RequestType.ZONE_RESET_ALL,
)


# Negotiation.


@check(ZONED)
def host_managed_disks_need_the_feature(target: Target) -> None:
    """A host-managed device refuses FEATURES_OK to a driver that does not accept ZONED (BLK-038)."""
    if _model(target) != ZoneModel.HOST_MANAGED:
        raise NotOffered("the disk is not host-managed")
    with target.driver(start=False) as driver:
        expect(not _negotiate_without(target, driver), "FEATURES_OK stays set without ZONED")


@check(ZONED)
def others_hide_the_zones(target: Target) -> None:
    """Other models go on for a driver that does not accept ZONED, with zoned fields that are 0 (BLK-037)."""
    if _model(target) == ZoneModel.HOST_MANAGED:
        raise NotOffered("the disk is host-managed")
    with target.driver(start=False) as driver:
        expect(_negotiate_without(target, driver), "FEATURES_OK is refused without ZONED")
        found = driver.device.config_bytes(BlkConfig.ZONED, _ZONED_BYTES)
        expect(not any(found), f"ZONED was not accepted, the zoned fields are {found.hex(' ')}")


@check()
def requests_without_the_feature(target: Target) -> None:
    """Without ZONED negotiated each zone request gets UNSUPP (BLK-097, HOSTILE-187)."""
    if target.offers(ZONED):
        if _model(target) == ZoneModel.HOST_MANAGED:
            raise NotTestable("the disk is host-managed: ZONED is always negotiated")
        if not target.options.destructive:
            raise NotTestable("takes --destructive")
    with target.driver(features=target.mask(without=(ZONED,))) as driver:
        for kind in _REQUESTS:
            answer = ask(driver, kind, 0, b"", _HEADER + _DESCRIPTOR)
            expect_answer(answer, f"{kind.name}, ZONED not negotiated", Status.UNSUPP)


def _model(target: Target) -> int:
    with target.driver() as driver:
        return field(driver, BlkConfig.ZONED_MODEL)


def _negotiate_without(target: Target, driver: VirtioBlk) -> bool:
    driver.reset()
    driver.pci.enable()
    driver.device.greet()
    return driver.device.accept(driver.device.features & target.mask(without=(ZONED,)))


# Configuration.


@check(ZONED)
def host_managed_model(target: Target) -> None:
    """Where sequential zones must be written in order the model is 1, host-managed (BLK-040)."""
    _expect_model(target, ZoneType.SEQUENTIAL_REQUIRED, ZoneModel.HOST_MANAGED)


@check(ZONED)
def host_aware_model(target: Target) -> None:
    """Where sequential zones should be written in order the model is 2, host-aware (BLK-041)."""
    _expect_model(target, ZoneType.SEQUENTIAL_PREFERRED, ZoneModel.HOST_AWARE)


def _expect_model(target: Target, zone_type: ZoneType, right: ZoneModel) -> None:
    with target.driver() as driver:
        found = model(driver)
        if not any(zone.type == zone_type for zone in report(driver)):
            raise NotOffered(f"there are no zones of type {zone_type.name}")
        expect(found == right, f"there are zones of type {zone_type.name}, the model is {found}")


@check(ZONED)
def fields_are_valid(target: Target) -> None:
    """zone_sectors and max_append_sectors are sectors, write_granularity is bytes; zones are told (BLK-018, 023)."""
    with target.driver() as driver:
        model(driver)
        size, granularity = zone_sectors(driver), field(driver, BlkConfig.WRITE_GRANULARITY)
        appends = field(driver, BlkConfig.MAX_APPEND_SECTORS)
        whole = granularity > 0 and granularity % SECTOR_SIZE == 0 and granularity <= size * SECTOR_SIZE
        expect(whole, f"write_granularity is {granularity} bytes, a zone has {size} sectors")
        expect(appends <= size, f"max_append_sectors is {appends}, a zone has {size} sectors")
        expect(report(driver), "no zone is reported")


@check(ZONED)
def appends_fit_into_a_request(target: Target) -> None:
    """max_append_sectors is no more than seg_max elements of size_max bytes hold (BLK-046)."""
    target.require(Feature.BLK_SIZE_MAX, Feature.BLK_SEG_MAX)
    with target.driver() as driver:
        model(driver)
        most = field(driver, BlkConfig.SEG_MAX) * field(driver, BlkConfig.SIZE_MAX)
        appends = field(driver, BlkConfig.MAX_APPEND_SECTORS) * SECTOR_SIZE
        expect(appends <= most, f"an append may have {appends} bytes, a request {most}")


@check(ZONED)
def padding_is_zero(target: Target) -> None:
    """The padding after the model, at offset 93, is 0 (BLK-049)."""
    with target.driver() as driver:
        if driver.pci.device.length < BlkConfig.ZONED + _ZONED_BYTES:
            raise NotTestable(f"the configuration has {driver.pci.device.length} bytes")
        found = driver.device.config_bytes(BlkConfig.ZONED_MODEL + 1, 3)
        expect(not any(found), f"the bytes from 93 on are {found.hex(' ')}")


@check(ZONED)
def fields_are_read_only(target: Target) -> None:
    """Writes to the zoned fields change nothing (BLK-029)."""
    with target.driver() as driver:
        model(driver)
        before = driver.device.config_bytes(BlkConfig.ZONED, _ZONED_BYTES)
        for at in range(BlkConfig.ZONED, BlkConfig.ZONED + _ZONED_BYTES, 4):
            driver.pci.device.write(at, 4, 0x5A5A5A5A)
        after = driver.device.config_bytes(BlkConfig.ZONED, _ZONED_BYTES)
        expect(after == before, f"the zoned fields were {before.hex()}, after writes they are {after.hex()}")


# Reports.


@check(ZONED)
def zones_have_one_size(target: Target) -> None:
    """Zones follow each other zone_sectors apart, and end with the disk (BLK-042, 101)."""
    with target.driver() as driver:
        model(driver)
        size, zones = zone_sectors(driver), report(driver)
        for number, zone in enumerate(zones):
            expect(zone.start == number * size, f"zone {number} of {size:#x} sectors starts at {zone.start:#x}")
        expect(zones[-1].start < driver.capacity, f"a zone starts at {zones[-1].start:#x}, behind the end")


@check(ZONED)
def report_begins_where_it_is_asked_to(target: Target) -> None:
    """A report begins with the zone that holds the sector, be it its first or not (BLK-098)."""
    with target.driver() as driver:
        model(driver)
        size = zone_sectors(driver)
        last = (driver.capacity - 1) // size
        for sector in (0, size - 1, last * size, driver.capacity - 1):
            starts = [zone[1] for zone in driver.zone_report(sector, 1)]
            expect(starts == [sector // size * size], f"a report from sector {sector:#x} on begins at {starts}")


@check(ZONED, each_ring=True)
def report_has_what_fits(target: Target) -> None:
    """A report is a header and descriptors of 64 bytes, and nr_zones counts those that are whole (BLK-099, 100)."""
    with target.driver() as driver:
        model(driver)
        size = zone_sectors(driver)
        exist = -(-driver.capacity // size)
        for fit in (1, 2, 3):
            for extra in (0, _DESCRIPTOR // 2):
                room = _HEADER + fit * _DESCRIPTOR + extra
                answer, count = reports(driver, 0, room)
                expect_answer(answer, f"a report into {room} bytes", Status.OK)
                expect(count == min(fit, exist), f"a report into {room} bytes has {count} zones, there are {exist}")
                starts = [zone.start for zone in descriptors(answer.data, count)]
                expect(starts == [n * size for n in range(count)], f"the zones of a report start at {starts}")


@check(ZONED)
def capacities_are_within_zones(target: Target) -> None:
    """z_cap is not 0 and never more than zone_sectors (BLK-102)."""
    size, zones = _zones(target)
    bad = [zone for zone in zones if not 0 < zone.capacity <= size]
    expect(not bad, f"zones have {size:#x} sectors: {_first(bad)}")


@check(ZONED)
def pointers_are_within_zones(target: Target) -> None:
    """z_wp of a zone that is empty, open or closed lies within its capacity (BLK-103)."""
    _, zones = _zones(target)
    pointed = [zone for zone in zones if zone.state in (ZoneState.EMPTY, *ACTIVE)]
    if not pointed:
        raise NotOffered("no zone has a write pointer")
    bad = [zone for zone in pointed if not zone.start <= zone.pointer < zone.start + zone.capacity]
    expect(not bad, f"{_first(bad)}")


@check(ZONED)
def empty_zones_begin_at_their_start(target: Target) -> None:
    """z_wp of an empty zone is its start (BLK-150)."""
    _, zones = _zones(target)
    empty = [zone for zone in zones if zone.state == ZoneState.EMPTY]
    if not empty:
        raise NotOffered("no zone is empty")
    bad = [zone for zone in empty if zone.pointer != zone.start]
    expect(not bad, f"{_first(bad)}")


@check(ZONED)
def types_are_defined(target: Target) -> None:
    """z_type is 1, 2 or 3 (BLK-104)."""
    _, zones = _zones(target)
    bad = [zone for zone in zones if zone.type not in {each.value for each in ZoneType}]
    expect(not bad, f"{_first(bad)}")


@check(ZONED)
def states_are_defined(target: Target) -> None:
    """z_state is 0 to 4 or 13 to 15 (BLK-105)."""
    _, zones = _zones(target)
    bad = [zone for zone in zones if zone.state not in {each.value for each in ZoneState}]
    expect(not bad, f"{_first(bad)}")


@check(ZONED)
def conventional_zones_have_no_pointer(target: Target) -> None:
    """Conventional zones are in state 0, not-wp (BLK-106)."""
    _, zones = _zones(target)
    conventional = [zone for zone in zones if zone.type == ZoneType.CONVENTIONAL]
    if not conventional:
        raise NotOffered("no zone is conventional")
    bad = [zone for zone in conventional if zone.state != ZoneState.NOT_WRITE_POINTER]
    expect(not bad, f"{_first(bad)}")


@check(ZONED)
def sequential_zones_have_a_pointer(target: Target) -> None:
    """Sequential zones are never in state 0, not-wp (BLK-107)."""
    _, zones = _zones(target)
    bad = [zone for zone in zones if zone.type in SEQUENTIAL and zone.state == ZoneState.NOT_WRITE_POINTER]
    expect(not bad, f"{_first(bad)}")


def _zones(target: Target) -> tuple[int, list[Zone]]:
    with target.driver() as driver:
        model(driver)
        return zone_sectors(driver), report(driver)


def _first(bad: list[Zone]) -> str:
    if not bad:
        return ""
    zone = bad[0]
    return (
        f"{len(bad)} zones, the first at {zone.start:#x}: capacity {zone.capacity:#x}, pointer {zone.pointer:#x}, "
        f"type {zone.type}, state {zone.state}"
    )
