"""Zoned disks: what brings a zone from one state into another, and what that takes."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.requests import expect_answer, field
from vmmblk.conform.zones import (
    ACTIVE,
    OPEN_STATES,
    SEQUENTIAL,
    expect_same,
    expect_zone,
    limit,
    report,
    zoned,
)
from vmmblk.spec import BlkConfig, Feature, RequestType, Status, ZoneState, ZoneType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.conform.requests import Answer
    from vmmblk.conform.target import Target
    from vmmblk.conform.zones import Zone, Zones

ZONED = Feature.BLK_ZONED
OUT, APPEND = RequestType.OUT, RequestType.ZONE_APPEND
OPEN, CLOSE, FINISH, RESET, RESET_ALL = (
    RequestType.ZONE_OPEN,
    RequestType.ZONE_CLOSE,
    RequestType.ZONE_FINISH,
    RequestType.ZONE_RESET,
    RequestType.ZONE_RESET_ALL,
)
EMPTY, IMPLICIT, EXPLICIT, CLOSED, FULL = (
    ZoneState.EMPTY,
    ZoneState.IMPLICIT_OPEN,
    ZoneState.EXPLICIT_OPEN,
    ZoneState.CLOSED,
    ZoneState.FULL,
)
OK, NO_OPEN, NO_ACTIVE = Status.OK, Status.ZONE_OPEN_RESOURCE, Status.ZONE_ACTIVE_RESOURCE
REQUIRED = (ZoneType.SEQUENTIAL_REQUIRED,)


def _expect_moves(target: Target, start: ZoneState, end: ZoneState, *kinds: RequestType) -> None:
    """Each of ``kinds`` is OK for a zone in ``start`` and brings it into ``end``."""
    for kind in kinds:
        with zoned(target, 1, REQUIRED if kind is APPEND else SEQUENTIAL) as z:
            zone = z.bring(z.mine[0], start)
            case = f"{kind.name} in state {start.name}"
            expect_answer(_make(z, kind, zone), case, OK)
            if start is end and kind not in (OUT, APPEND):
                expect_same(z, zone, case)
            expect_zone(z, zone, end, case)


def _make(z: Zones, kind: RequestType, zone: Zone) -> Answer:
    if kind is OUT:
        return z.write(zone)
    return z.append(zone) if kind is APPEND else z.tell(kind, zone)


# From empty.


@check(ZONED, destructive=True)
def empty_is_written(target: Target) -> None:
    """A write to an empty zone opens it implicitly (BLK-128, 151)."""
    _expect_moves(target, EMPTY, IMPLICIT, OUT)


@check(ZONED, destructive=True)
def empty_is_appended_to(target: Target) -> None:
    """An append to an empty zone opens it implicitly (BLK-128, 151)."""
    _expect_moves(target, EMPTY, IMPLICIT, APPEND)


@check(ZONED, destructive=True)
def empty_is_opened(target: Target) -> None:
    """OPEN opens an empty zone explicitly (BLK-118, 152)."""
    _expect_moves(target, EMPTY, EXPLICIT, OPEN)


@check(ZONED, destructive=True)
def empty_is_reset(target: Target) -> None:
    """RESET of an empty zone is OK and changes nothing (BLK-153)."""
    _expect_moves(target, EMPTY, EMPTY, RESET)


# From implicitly open.


@check(ZONED, destructive=True)
def implicit_is_reset(target: Target) -> None:
    """RESET and RESET_ALL empty an implicitly open zone (BLK-125, 127, 154)."""
    _expect_moves(target, IMPLICIT, EMPTY, RESET, RESET_ALL)


@check(ZONED, destructive=True)
def implicit_is_opened(target: Target) -> None:
    """OPEN opens an implicitly open zone explicitly (BLK-118, 155)."""
    _expect_moves(target, IMPLICIT, EXPLICIT, OPEN)


@check(ZONED, destructive=True)
def implicit_is_closed(target: Target) -> None:
    """CLOSE closes an implicitly open zone (BLK-121, 156)."""
    _expect_moves(target, IMPLICIT, CLOSED, CLOSE)


@check(ZONED, destructive=True)
def implicit_is_finished(target: Target) -> None:
    """FINISH makes an implicitly open zone full (BLK-123, 158)."""
    _expect_moves(target, IMPLICIT, FULL, FINISH)


@check(ZONED, destructive=True)
def implicit_is_written_full(target: Target) -> None:
    """Writes and appends up to the capacity make an implicitly open zone full (BLK-158)."""
    _expect_full(target, IMPLICIT)


# From explicitly open.


@check(ZONED, destructive=True)
def explicit_is_reset(target: Target) -> None:
    """RESET and RESET_ALL empty an explicitly open zone (BLK-125, 127, 159)."""
    _expect_moves(target, EXPLICIT, EMPTY, RESET, RESET_ALL)


@check(ZONED, destructive=True)
def explicit_without_data_is_closed(target: Target) -> None:
    """CLOSE of an explicitly open zone without data makes it empty (BLK-160)."""
    with zoned(target) as z:
        (zone,) = z.mine
        expect_answer(z.tell(OPEN, zone), "OPEN of an empty zone", OK)
        expect_answer(z.tell(CLOSE, zone), "CLOSE of an open zone without data", OK)
        expect_zone(z, zone, EMPTY, "CLOSE of an open zone without data")


@check(ZONED, destructive=True)
def explicit_is_closed(target: Target) -> None:
    """CLOSE closes an explicitly open zone with data (BLK-121, 161)."""
    _expect_moves(target, EXPLICIT, CLOSED, CLOSE)


@check(ZONED, destructive=True)
def explicit_is_finished(target: Target) -> None:
    """FINISH makes an explicitly open zone full (BLK-123, 162)."""
    _expect_moves(target, EXPLICIT, FULL, FINISH)


@check(ZONED, destructive=True)
def explicit_is_written_full(target: Target) -> None:
    """Writes and appends up to the capacity make an explicitly open zone full (BLK-162)."""
    _expect_full(target, EXPLICIT)


@check(ZONED, destructive=True)
def explicit_is_opened(target: Target) -> None:
    """OPEN of an explicitly open zone is OK and changes nothing (BLK-163)."""
    _expect_moves(target, EXPLICIT, EXPLICIT, OPEN)


# From closed.


@check(ZONED, destructive=True)
def closed_is_reset(target: Target) -> None:
    """RESET and RESET_ALL empty a closed zone (BLK-125, 127, 164)."""
    _expect_moves(target, CLOSED, EMPTY, RESET, RESET_ALL)


@check(ZONED, destructive=True)
def closed_is_written(target: Target) -> None:
    """A write to a closed zone opens it implicitly (BLK-128, 165)."""
    _expect_moves(target, CLOSED, IMPLICIT, OUT)


@check(ZONED, destructive=True)
def closed_is_appended_to(target: Target) -> None:
    """An append to a closed zone opens it implicitly (BLK-128, 165)."""
    _expect_moves(target, CLOSED, IMPLICIT, APPEND)


@check(ZONED, destructive=True)
def closed_is_opened(target: Target) -> None:
    """OPEN opens a closed zone explicitly (BLK-118, 166)."""
    _expect_moves(target, CLOSED, EXPLICIT, OPEN)


@check(ZONED, destructive=True)
def closed_is_closed(target: Target) -> None:
    """CLOSE of a closed zone is OK and changes nothing (BLK-167)."""
    _expect_moves(target, CLOSED, CLOSED, CLOSE)


# From full.


@check(ZONED, destructive=True)
def full_is_reset(target: Target) -> None:
    """RESET and RESET_ALL empty a full zone (BLK-125, 127, 168)."""
    _expect_moves(target, FULL, EMPTY, RESET, RESET_ALL)


@check(ZONED, destructive=True)
def full_is_finished(target: Target) -> None:
    """FINISH of a full zone is OK and changes nothing (BLK-169)."""
    _expect_moves(target, FULL, FULL, FINISH)


@check(ZONED, destructive=True)
def all_are_reset(target: Target) -> None:
    """RESET_ALL empties every sequential zone that is open, closed or full (BLK-127)."""
    with zoned(target, 3) as z:
        for zone, state in zip(z.mine, (FULL, CLOSED, EXPLICIT), strict=True):
            z.bring(zone, state)
        expect_answer(z.tell(RESET_ALL, z.mine[0]), "RESET_ALL", OK)
        left = [zone for zone in report(z.driver) if zone.state in (*ACTIVE, FULL)]
        expect(not left, f"after RESET_ALL {len(left)} zones are open, closed or full")


def _expect_full(target: Target, start: ZoneState) -> None:
    with zoned(target) as z:
        (zone,) = z.mine
        appends = zone.type == ZoneType.SEQUENTIAL_REQUIRED and field(z.driver, BlkConfig.MAX_APPEND_SECTORS)
        for kind in (OUT, APPEND) if appends else (OUT,):
            z.bring(zone, start)
            z.fill(zone, kind)
            expect_zone(z, zone, FULL, f"{kind.name} up to the capacity of a zone in state {start.name}")
            expect_answer(z.tell(RESET, zone), "RESET", OK)


# Resources.


@check(ZONED, destructive=True)
def open_zones_are_limited(target: Target) -> None:
    """max_open_zones may be open, OPEN of one more gets ZONE_OPEN_RESOURCE and leaves it (BLK-043, 120, 144, 147)."""
    with _open_to_the_limit(target) as (z, another):
        if limits := _active_limit(z):
            raise NotTestable(f"max_active_zones is {limits}, so that no zone more can be active either")
        expect_answer(z.tell(OPEN, another), "OPEN of one zone more than max_open_zones", NO_OPEN)
        expect_same(z, another, "OPEN of one zone more than max_open_zones")


@check(ZONED, destructive=True)
def active_zones_are_limited(target: Target) -> None:
    """max_active_zones may be active, OPEN of one more gets ZONE_ACTIVE_RESOURCE and leaves it.

    BLK-044, BLK-120, BLK-145, BLK-148.
    """
    with _closed_to_the_limit(target) as (z, another):
        expect_answer(z.tell(OPEN, another), "OPEN of one zone more than max_active_zones", NO_ACTIVE)
        expect_same(z, another, "OPEN of one zone more than max_active_zones")


@check(ZONED, destructive=True)
def both_limits(target: Target) -> None:
    """Where OPEN would exceed both limits it gets ZONE_ACTIVE_RESOURCE (BLK-120, 149)."""
    most_open, most_active = _limits(target)
    if most_active < most_open:
        raise NotTestable(f"max_open_zones is {most_open}, max_active_zones {most_active}")
    with zoned(target, most_active + 1) as z:
        for zone in z.mine[most_open:-1]:
            z.bring(zone, CLOSED)
        for zone in z.mine[:most_open]:
            expect_answer(z.tell(OPEN, zone), f"OPEN of {most_open} zones, {most_active} active", OK)
        expect_answer(z.tell(OPEN, z.mine[-1]), "OPEN of one zone more than either limit", NO_ACTIVE)
        expect_same(z, z.mine[-1], "OPEN of one zone more than either limit")


@check(ZONED, destructive=True)
def open_resources_come_back(target: Target) -> None:
    """A zone that is no longer open makes room for another (BLK-146)."""
    with _open_to_the_limit(target) as (z, another):
        expect_answer(z.tell(FINISH, z.mine[0]), "FINISH", OK)
        expect_answer(z.tell(OPEN, another), "OPEN after FINISH of another zone", OK)


@check(ZONED, destructive=True)
def active_resources_come_back(target: Target) -> None:
    """A zone that is no longer active makes room for another (BLK-146)."""
    with _closed_to_the_limit(target) as (z, another):
        expect_answer(z.tell(RESET, z.mine[0]), "RESET", OK)
        expect_answer(z.tell(OPEN, another), "OPEN after RESET of a closed zone", OK)


@check(ZONED, destructive=True)
def writes_take_open_resources(target: Target) -> None:
    """A write or append that cannot open its zone gets ZONE_OPEN_RESOURCE or ZONE_ACTIVE_RESOURCE (BLK-129)."""
    with _open_to_the_limit(target) as (z, another):
        _expect_no_resource(z, another)


@check(ZONED, destructive=True)
def writes_take_active_resources(target: Target) -> None:
    """A write or append that cannot make its zone active gets ZONE_ACTIVE_RESOURCE or ZONE_OPEN_RESOURCE (BLK-129)."""
    with _closed_to_the_limit(target) as (z, another):
        _expect_no_resource(z, another)


@check(ZONED, destructive=True)
def writes_open_no_more_than_allowed(target: Target) -> None:
    """Zones that are written one after the other are closed by the device, or refused, at the limit (BLK-157)."""
    with zoned(target, 0) as z:
        most = limit(z.driver, BlkConfig.MAX_OPEN_ZONES)
    with zoned(target, most + 1) as z:
        for zone in z.mine:
            expect_answer(z.write(zone), f"a write, max_open_zones is {most}", OK, NO_OPEN, NO_ACTIVE)
        count = sum(zone.state in OPEN_STATES for zone in report(z.driver))
        expect(count <= most, f"{count} zones are open, max_open_zones is {most}")


def _expect_no_resource(z: Zones, another: Zone) -> None:
    expect_answer(z.write(another), "a write for which there is no resource", NO_OPEN, NO_ACTIVE)
    expect_same(z, another, "a write for which there is no resource")
    if another.type == ZoneType.SEQUENTIAL_REQUIRED and field(z.driver, BlkConfig.MAX_APPEND_SECTORS):
        expect_answer(z.append(another), "an append for which there is no resource", NO_OPEN, NO_ACTIVE)
        expect_same(z, another, "an append for which there is no resource")


def _limits(target: Target) -> tuple[int, int]:
    with zoned(target, 0) as z:
        return limit(z.driver, BlkConfig.MAX_OPEN_ZONES), limit(z.driver, BlkConfig.MAX_ACTIVE_ZONES)


def _active_limit(z: Zones) -> int:
    """max_active_zones, if the zones that are open are all that may be active."""
    most = field(z.driver, BlkConfig.MAX_ACTIVE_ZONES)
    return most if most < len(z.mine) else 0


@contextlib.contextmanager
def _open_to_the_limit(target: Target) -> Iterator[tuple[Zones, Zone]]:
    """As many zones explicitly open as may be, and an empty one."""
    with zoned(target, 0) as z:
        most = limit(z.driver, BlkConfig.MAX_OPEN_ZONES)
    with zoned(target, most + 1) as z:
        for zone in z.mine[:-1]:
            expect_answer(z.tell(OPEN, zone), f"OPEN of {most} zones, as many as max_open_zones", OK)
        yield z, z.mine[-1]


@contextlib.contextmanager
def _closed_to_the_limit(target: Target) -> Iterator[tuple[Zones, Zone]]:
    """As many zones closed as may be active, and an empty one."""
    with zoned(target, 0) as z:
        most = limit(z.driver, BlkConfig.MAX_ACTIVE_ZONES)
    with zoned(target, most + 1) as z:
        for zone in z.mine[:-1]:
            z.bring(zone, CLOSED)
        yield z, z.mine[-1]
