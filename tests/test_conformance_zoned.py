"""Rules of zoned disks, as a driver on the other end of the socket sees them."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from disks import Disk, FullDisk

from vmmblk.block import ZoneState as S
from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.errors import ProtocolError
from vmmblk.filters.zoned import Zoned
from vmmblk.spec import BlkConfig, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Served

    Serve = Callable[..., Served]

OK, INVALID, UNALIGNED = Status.OK, Status.ZONE_INVALID_CMD, Status.ZONE_UNALIGNED_WP
NO_OPEN, NO_ACTIVE, UNSUPP, IOERR = Status.ZONE_OPEN_RESOURCE, Status.ZONE_ACTIVE_RESOURCE, Status.UNSUPP, Status.IOERR
IN, OUT, APPEND = RequestType.IN, RequestType.OUT, RequestType.ZONE_APPEND
OPEN, CLOSE, FINISH, RESET = (
    RequestType.ZONE_OPEN,
    RequestType.ZONE_CLOSE,
    RequestType.ZONE_FINISH,
    RequestType.ZONE_RESET,
)
RESET_ALL, REPORT = RequestType.ZONE_RESET_ALL, RequestType.ZONE_REPORT
ZONED = Feature.BLK_ZONED.mask
ZONE, CAPACITY = 32, 24  # sectors
GEOMETRY = {"zone_size": ZONE * 512, "zone_capacity": CAPACITY * 512, "conventional": 2, "max_append": 8 * 512}
A, B, C, D = (ZONE * zone for zone in (2, 3, 4, 5))  # sequential zones
SECTOR = b"\x5a" * 512


class Driver:
    """A driver of a zoned disk that looks at statuses."""

    def __init__(self, driver: VirtioBlk, disk: Zoned) -> None:
        self.driver = driver
        self.disk = disk

    def status(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0) -> int:
        """The status of one request."""
        pending = self.driver.submit(kind, sector, data, room)
        self.driver.kick()
        self.answer = self.driver.wait(pending)
        assert self.answer.status is not None
        return self.answer.status

    def write(self, sector: int, sectors: int = 1) -> int:
        """The status of a write."""
        return self.status(OUT, sector, SECTOR * sectors)

    def append(self, sector: int, sectors: int = 1) -> int:
        """The status of an append."""
        return self.status(APPEND, sector, SECTOR * sectors, 8)

    def state(self, sector: int) -> S:
        """The state of a zone."""
        return S(self.driver.zone_report(sector, 1)[0][4])

    def pointer(self, sector: int) -> int:
        """How far a zone is written."""
        return self.driver.zone_report(sector, 1)[0][2] - sector


@pytest.fixture
def zoned(serve: Serve) -> Callable[..., Any]:
    """A driver of a zoned disk with other than the usual geometry, or features."""

    @contextmanager
    def start(disk: Disk | None = None, features: int = SUPPORTED, **changes: Any) -> Iterator[Driver]:
        block = Zoned(disk or Disk(16 * ZONE), **{**GEOMETRY, **changes})
        with attach(serve(block).path, features=features) as v:
            yield Driver(v, block)

    return start


# Configuration.


@pytest.mark.parametrize(("model", "number"), [("host-managed", 1), ("host-aware", 2)])
def test_the_configuration_tells_the_zones(zoned: Any, model: str, number: int) -> None:
    """BLK-018, BLK-023, BLK-040..046, BLK-048, BLK-049: sizes in sectors, granularity in bytes, padding 0."""
    with zoned(model=model, max_open=3, max_active=5, write_granularity=1024) as d:
        config = d.driver.config
        assert d.driver.has(Feature.BLK_ZONED)
        assert config(BlkConfig.ZONED_MODEL) == number
        assert config(BlkConfig.ZONE_SECTORS) == ZONE
        assert (config(BlkConfig.MAX_OPEN_ZONES), config(BlkConfig.MAX_ACTIVE_ZONES)) == (3, 5)
        appends = int.from_bytes(d.driver.device.config_bytes(84, 4), "little")
        assert appends == (8 if number == 1 else 0)
        assert appends * 512 <= config(BlkConfig.SEG_MAX) * config(BlkConfig.SIZE_MAX)
        assert int.from_bytes(d.driver.device.config_bytes(88, 4), "little") == 1024
        assert d.driver.device.config_bytes(93, 3) == bytes(3)
        assert [zone[1] for zone in d.driver.zone_report()] == [ZONE * zone for zone in range(16)]


def test_a_host_managed_disk_needs_a_driver_that_knows_zones(zoned: Any) -> None:
    """BLK-038: FEATURES_OK is refused without ZONED."""
    with pytest.raises(ProtocolError), zoned(features=SUPPORTED & ~ZONED):
        pass


def test_a_host_aware_disk_serves_a_driver_that_knows_no_zones(zoned: Any) -> None:
    """BLK-037, BLK-097, HOSTILE-187: the zoned fields are 0, zone requests UNSUPP, reads and writes as ever."""
    with zoned(model="host-aware", features=SUPPORTED & ~ZONED) as d:
        assert d.driver.device.config_bytes(72, 24) == bytes(24)
        for kind in (REPORT, OPEN, CLOSE, FINISH, RESET, RESET_ALL):
            assert d.status(kind, A, room=128 if kind == REPORT else 0) == UNSUPP
        assert d.append(A) == UNSUPP
        assert d.write(A + 7) == OK
        assert d.driver.read(A + 7, 512) == SECTOR


# Reports.


def test_a_report_describes_zones(zoned: Any) -> None:
    """BLK-098..107, BLK-150: from the zone that holds the sector on; capacity, start, pointer, type, state of each."""
    with zoned() as d:
        assert d.write(A, 5) == OK
        report = d.driver.zone_report(ZONE + 31, 3)  # conventional, written, empty
        assert report[0][:2] == (ZONE, ZONE)
        assert report[0][3:] == (1, S.NOT_WRITE_POINTER)
        assert report[1] == (CAPACITY, A, A + 5, 2, S.IMPLICIT_OPEN)
        assert report[2] == (CAPACITY, B, B, 2, S.EMPTY)
        assert [zone[4] for zone in d.driver.zone_report(0, 16)] == [0, 0, 2, *[1] * 13]
        raw = d.driver.call(REPORT, A, data_in=64 + 64)
        assert raw[:8] == (1).to_bytes(8, "little")
        assert raw[8:64] == bytes(56)


@pytest.mark.parametrize(("room", "zones"), [(64, 0), (127, 0), (128, 1), (64 + 64 * 100, 16)])
def test_a_report_has_as_many_zones_as_fit(zoned: Any, room: int, zones: int) -> None:
    """BLK-100, HOSTILE-190, HOSTILE-191: nr_zones counts whole descriptors, of zones that exist."""
    with zoned() as d:
        assert d.status(REPORT, 0, room=room) == OK
        assert int.from_bytes(d.answer.data[:8], "little") == zones
        assert d.answer.written <= 64 + 64 * zones + 1
        assert d.answer.data[64 + 64 * zones :] == b"\xa5" * (room - 64 - 64 * zones)


@pytest.mark.parametrize("room", [0, 8, 63])
def test_a_report_needs_room_for_its_header(zoned: Any, room: int) -> None:
    """HOSTILE-190: an error that writes nothing."""
    with zoned() as d:
        assert d.status(REPORT, 0, room=room) == IOERR
        assert d.answer.data == b"\xa5" * room


# States: how a zone comes into each, what each command then does.

ENTER: dict[S, list[tuple[int, int]]] = {
    S.EMPTY: [],
    S.IMPLICIT_OPEN: [(OUT, 3)],
    S.EXPLICIT_OPEN: [(OUT, 3), (OPEN, 0)],
    S.CLOSED: [(OUT, 3), (CLOSE, 0)],
    S.FULL: [(FINISH, 0)],
}
TRANSITIONS = [
    ("BLK-151", S.EMPTY, OUT, OK, S.IMPLICIT_OPEN),
    ("BLK-151 append", S.EMPTY, APPEND, OK, S.IMPLICIT_OPEN),
    ("BLK-152, BLK-118", S.EMPTY, OPEN, OK, S.EXPLICIT_OPEN),
    ("BLK-122", S.EMPTY, CLOSE, INVALID, S.EMPTY),
    ("BLK-123", S.EMPTY, FINISH, OK, S.FULL),
    ("BLK-153", S.EMPTY, RESET, OK, S.EMPTY),
    ("BLK-154, BLK-125", S.IMPLICIT_OPEN, RESET, OK, S.EMPTY),
    ("BLK-154 all", S.IMPLICIT_OPEN, RESET_ALL, OK, S.EMPTY),
    ("BLK-155", S.IMPLICIT_OPEN, OPEN, OK, S.EXPLICIT_OPEN),
    ("BLK-156, BLK-121", S.IMPLICIT_OPEN, CLOSE, OK, S.CLOSED),
    ("BLK-158", S.IMPLICIT_OPEN, FINISH, OK, S.FULL),
    ("BLK-159", S.EXPLICIT_OPEN, RESET, OK, S.EMPTY),
    ("BLK-159 all", S.EXPLICIT_OPEN, RESET_ALL, OK, S.EMPTY),
    ("BLK-161", S.EXPLICIT_OPEN, CLOSE, OK, S.CLOSED),
    ("BLK-162", S.EXPLICIT_OPEN, FINISH, OK, S.FULL),
    ("BLK-163", S.EXPLICIT_OPEN, OPEN, OK, S.EXPLICIT_OPEN),
    ("BLK-164", S.CLOSED, RESET, OK, S.EMPTY),
    ("BLK-164 all", S.CLOSED, RESET_ALL, OK, S.EMPTY),
    ("BLK-165, BLK-128", S.CLOSED, OUT, OK, S.IMPLICIT_OPEN),
    ("BLK-165 append", S.CLOSED, APPEND, OK, S.IMPLICIT_OPEN),
    ("BLK-166", S.CLOSED, OPEN, OK, S.EXPLICIT_OPEN),
    ("BLK-167", S.CLOSED, CLOSE, OK, S.CLOSED),
    ("BLK-123 closed", S.CLOSED, FINISH, OK, S.FULL),
    ("BLK-168", S.FULL, RESET, OK, S.EMPTY),
    ("BLK-168, BLK-127 all", S.FULL, RESET_ALL, OK, S.EMPTY),
    ("BLK-169", S.FULL, FINISH, OK, S.FULL),
    ("BLK-119", S.FULL, OPEN, INVALID, S.FULL),
    ("BLK-122 full", S.FULL, CLOSE, INVALID, S.FULL),
    ("BLK-143, BLK-130 full", S.FULL, APPEND, INVALID, S.FULL),
]


@pytest.mark.parametrize(
    ("state", "kind", "status", "after"), [t[1:] for t in TRANSITIONS], ids=[t[0] for t in TRANSITIONS]
)
def test_each_command_in_each_state(zoned: Any, state: S, kind: int, status: int, after: S) -> None:
    """The rows named: what a command or write answers, and the state that the zone is in afterwards."""
    with zoned() as d:
        for command, sectors in ENTER[state]:
            assert d.status(command, A, SECTOR * sectors) == OK
        assert d.state(A) == state
        written = d.pointer(A) if state in (S.EMPTY, S.IMPLICIT_OPEN, S.EXPLICIT_OPEN, S.CLOSED) else 0
        if kind == OUT:
            assert d.write(A + written) == status
        elif kind == APPEND:
            assert d.append(A) == status
        else:
            assert d.status(kind, A) == status
        assert d.state(A) == after
        if after is S.EMPTY:
            assert d.pointer(A) == 0


def test_an_open_zone_without_data_is_empty_when_closed(zoned: Any) -> None:
    """BLK-160: CLOSE of an explicitly open zone whose pointer is at its start."""
    with zoned() as d:
        assert d.status(OPEN, A) == OK
        assert d.status(CLOSE, A) == OK
        assert d.state(A) == S.EMPTY


@pytest.mark.parametrize("explicit", [False, True], ids=["BLK-158 at capacity", "BLK-162 at capacity"])
@pytest.mark.parametrize("append", [False, True])
def test_a_zone_written_to_its_capacity_is_full(zoned: Any, explicit: bool, append: bool) -> None:
    """The rows named, and BLK-109, BLK-116: each write or append begins where the last one ended."""
    with zoned() as d:
        if explicit:
            d.status(OPEN, A)
        for offset in range(0, CAPACITY, 8):
            assert d.state(A) != S.FULL
            if append:
                assert d.driver.zone_append(A, SECTOR * 8) == A + offset
            else:
                assert d.write(A + offset, 8) == OK
        assert d.state(A) == S.FULL
        assert d.driver.read(A, CAPACITY * 512) == SECTOR * CAPACITY


# Where requests may go.


@pytest.mark.parametrize("kind", [OPEN, CLOSE, FINISH, RESET])
def test_commands_name_the_start_of_a_sequential_zone(zoned: Any, kind: int) -> None:
    """BLK-111, BLK-124, BLK-126, HOSTILE-188, HOSTILE-189: not conventional, not within, not past the end."""
    with zoned() as d:
        for sector in (0, ZONE, A + 1, A + ZONE - 1, 16 * ZONE, 1 << 40, 2**64 - 1):
            assert d.status(kind, sector) == INVALID
        assert [zone[4] for zone in d.driver.zone_report()] == [0] * 2 + [1] * 14


def test_an_append_names_the_start_of_a_sequential_zone(zoned: Any) -> None:
    """BLK-112, BLK-113, BLK-115, BLK-045, HOSTILE-189: and is no longer than max_append_sectors."""
    with zoned() as d:
        assert d.append(0) == INVALID
        assert d.append(A + 1) == INVALID
        assert d.append(16 * ZONE) == INVALID
        assert d.append(A, 9) == INVALID
        assert d.append(A, 8) == OK
        assert d.pointer(A) == 8


def test_a_disk_without_append(zoned: Any) -> None:
    """BLK-047, BLK-114, BLK-110, BLK-104: host-aware zones take writes anywhere, and no appends."""
    with zoned(model="host-aware") as d:
        assert d.driver.zone_report(A, 1)[0][3] == 3
        assert d.append(A) == UNSUPP
        assert d.write(A + 5) == OK
        assert d.write(A + 2) == OK
        assert d.write(A + 5) == OK


def test_a_sequential_zone_is_written_at_its_pointer(zoned: Any) -> None:
    """BLK-109, BLK-130..133, HOSTILE-193, HOSTILE-197: nothing else is written, and the pointer stays."""
    with zoned(write_granularity=1024) as d:
        assert d.write(A, 2) == OK
        for sector in (A, A + 1, A + 3, A + 4):
            assert d.write(sector, 2) == UNALIGNED
        assert d.write(A + 2, 3) == UNALIGNED
        assert d.append(A, 3) == UNALIGNED
        assert d.write(A + 2, CAPACITY) == INVALID
        assert d.write(A + 2, ZONE) == INVALID  # into the next
        assert d.status(IN, A, room=(ZONE + 1) * 512) == INVALID
        assert d.pointer(A) == 2
        assert d.driver.zone_report(B, 1)[0][2] == B
        assert d.driver.read(A + 2, 512) == bytes(512)


def test_conventional_zones_are_written_anywhere(zoned: Any) -> None:
    """BLK-108: in any order, over one zone's end, and their state stays."""
    with zoned() as d:
        for sector in (40, 3, 20, 3):
            assert d.write(sector) == OK
        assert d.write(ZONE - 2, 4) == OK
        assert d.driver.read(ZONE - 2, 4 * 512) == SECTOR * 4
        assert [zone[4] for zone in d.driver.zone_report(0, 2)] == [0, 0]


def test_what_is_not_written_reads_as_zeroes(zoned: Any) -> None:
    """BLK-137..139: behind the pointer, also of a zone that was finished, and after a reset."""
    disk = Disk(16 * ZONE)
    disk.data[:] = b"\x77" * len(disk.data)
    with zoned(disk) as d:
        assert d.write(A, 2) == OK
        assert d.driver.read(A, 4 * 512) == SECTOR * 2 + bytes(2 * 512)
        assert d.status(FINISH, A) == OK
        assert d.driver.read(A, ZONE * 512) == SECTOR * 2 + bytes((ZONE - 2) * 512)
        assert d.status(RESET, A) == OK
        assert d.driver.read(A, 512) == bytes(512)


def test_an_append_without_room_for_its_answer(zoned: Any) -> None:
    """HOSTILE-192, HOSTILE-194, BLK-117: an error, and nothing is written; nor is an append or write of nothing."""
    with zoned() as d:
        for room in (0, 1, 7):
            assert d.status(APPEND, A, SECTOR, room) == IOERR
        d.append(A, 0)
        d.status(OUT, A)
        assert (d.state(A), d.pointer(A)) == (S.EMPTY, 0)


def test_reset_all_looks_at_neither_sector_nor_data(zoned: Any) -> None:
    """BLK-127, HOSTILE-195, HOSTILE-196: whatever comes with it, the sequential zones are empty."""
    with zoned() as d:
        for sector in (A, B):
            d.write(sector)
        d.status(FINISH, C)
        assert d.status(RESET_ALL, 12345, SECTOR, 512) == OK
        assert d.answer.data == b"\xa5" * 512
        assert [zone[4] for zone in d.driver.zone_report()] == [0] * 2 + [1] * 14
        assert d.status(OPEN, A, SECTOR, 512) == OK
        assert d.state(A) == S.EXPLICIT_OPEN


def test_a_zoned_disk_does_not_discard(zoned: Any) -> None:
    """HOSTILE-198: UNSUPP, the zone and its data as before."""
    with zoned(FullDisk(16 * ZONE)) as d:
        d.write(A)
        segment = A.to_bytes(8, "little") + (1).to_bytes(8, "little")
        assert d.status(RequestType.DISCARD, 0, segment) == UNSUPP
        assert d.status(RequestType.WRITE_ZEROES, 0, segment) == UNSUPP
        assert (d.state(A), d.pointer(A), d.driver.read(A, 512)) == (S.IMPLICIT_OPEN, 1, SECTOR)


# Resources.


def test_open_zones_are_limited(zoned: Any) -> None:
    """BLK-120, BLK-129, BLK-144, BLK-146, BLK-147, BLK-043: explicitly open ones stay, no other zone can be opened."""
    with zoned(max_open=2) as d:
        assert [d.status(OPEN, zone) for zone in (A, B)] == [OK, OK]
        assert d.status(OPEN, C) == NO_OPEN
        assert d.write(C) == NO_OPEN
        assert d.append(C) == NO_OPEN
        assert (d.state(C), d.pointer(C)) == (S.EMPTY, 0)
        assert d.status(FINISH, A) == OK
        assert d.status(OPEN, C) == OK


def test_active_zones_are_limited(zoned: Any) -> None:
    """BLK-120, BLK-129, BLK-145, BLK-146, BLK-148, BLK-044: a closed zone counts until it is full or empty."""
    with zoned(max_active=2) as d:
        for zone in (A, B):
            assert d.write(zone) == OK
            assert d.status(CLOSE, zone) == OK
        assert d.status(OPEN, C) == NO_ACTIVE
        assert d.write(C) == NO_ACTIVE
        assert d.append(C) == NO_ACTIVE
        assert d.state(C) == S.EMPTY
        assert d.status(RESET, A) == OK
        assert d.write(C) == OK


def test_both_limits_at_once(zoned: Any) -> None:
    """BLK-149: the active resource is what is missing."""
    with zoned(max_open=2, max_active=2) as d:
        assert [d.status(OPEN, zone) for zone in (A, B)] == [OK, OK]
        assert d.status(OPEN, C) == NO_ACTIVE


def test_a_zone_that_was_opened_by_a_write_makes_room(zoned: Any) -> None:
    """BLK-134, BLK-157: at the limit the device closes one itself."""
    with zoned(max_open=2) as d:
        assert [d.write(zone) for zone in (A, B, C)] == [OK, OK, OK]
        assert sorted(d.state(zone) for zone in (A, B, C)) == [S.IMPLICIT_OPEN, S.IMPLICIT_OPEN, S.CLOSED]


# Zones whose medium has failed.


def test_a_read_only_zone(zoned: Any) -> None:
    """BLK-135, BLK-170, BLK-171, BLK-126, BLK-124: it can be read and not written, and no command changes it."""
    with zoned() as d:
        d.write(A, 2)
        fail(d, A, S.READ_ONLY)
        assert d.write(A + 2) == d.append(A) == INVALID
        assert [d.status(kind, A) for kind in (OPEN, CLOSE, FINISH, RESET)] == [INVALID] * 4
        assert d.status(RESET_ALL) == OK
        assert d.state(A) == S.READ_ONLY
        assert d.driver.read(A, 1024) == SECTOR * 2
        fail(d, A, S.OFFLINE)
        assert d.state(A) == S.OFFLINE


def test_an_offline_zone(zoned: Any) -> None:
    """BLK-136, BLK-170, BLK-171: it can be neither read nor written, for good."""
    with zoned() as d:
        d.write(A, 2)
        fail(d, A, S.OFFLINE)
        assert d.status(IN, A, room=512) == INVALID
        assert d.write(A + 2) == d.append(A) == INVALID
        assert [d.status(kind, A) for kind in (OPEN, CLOSE, FINISH, RESET)] == [INVALID] * 4
        assert d.status(RESET_ALL) == OK
        assert d.state(A) == S.OFFLINE


def fail(d: Driver, sector: int, state: S) -> None:
    """Let the medium of a zone fail."""
    asyncio.run(d.disk.fail_zone(sector, state))


# Secure erase.


class Erasing(Disk):
    """A disk that can erase."""

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Fill with 0xee, so that it shows."""
        await self._enter("secure_erase", sector_start, sectors)
        self.data[sector_start * 512 : (sector_start + sectors) * 512] = b"\xee" * (sectors * 512)


def test_secure_erase_resets_whole_zones(zoned: Any) -> None:
    """BLK-140..142: the alignment is a multiple of the zone, part of a zone is refused, a zone is reset."""
    with zoned(Erasing(16 * ZONE)) as d:
        assert d.driver.config(BlkConfig.SECURE_ERASE_SECTOR_ALIGNMENT) % ZONE == 0
        d.write(A, 2)
        d.write(B, 2)
        for sector, sectors in ((A, 1), (A + 1, ZONE), (A, ZONE + 1)):
            segment = sector.to_bytes(8, "little") + sectors.to_bytes(8, "little")
            assert d.status(RequestType.SECURE_ERASE, 0, segment) == IOERR
            assert d.state(A) == S.IMPLICIT_OPEN
        segment = A.to_bytes(8, "little") + ZONE.to_bytes(8, "little")
        assert d.status(RequestType.SECURE_ERASE, 0, segment) == OK
        assert (d.state(A), d.pointer(A), d.state(B)) == (S.EMPTY, 0, S.IMPLICIT_OPEN)
        assert d.driver.read(A, 512) == bytes(512)
