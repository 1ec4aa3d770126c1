"""A zoned disk as a driver meets it: configuration, negotiation, requests, statuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from disks import CachedDisk, FullDisk

from vmmblk.backends.memory import Memory
from vmmblk.block import BlockInfo, Operation, Topology, ZoneModel, Zoning
from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.client.errors import ProtocolError, StatusError
from vmmblk.device import Device, configure
from vmmblk.errors import BadRequest
from vmmblk.filters.readonly import ReadOnly
from vmmblk.filters.zoned import Zoned
from vmmblk.request import Limits, Write, ZoneAppend, ZoneCommand, ZoneReport, parse
from vmmblk.spec import REQUEST_HEADER, ZONE_APPEND_SECTOR, ZONE_REPORT_HEADER, BlkConfig, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    Serve = Callable[..., Any]

ZONE = 64  # sectors
ZONED = Feature.BLK_ZONED.mask
LIMITS = Limits(features=ZONED, sector_size=4096, max_append_sectors=32)
COMMANDS = [
    RequestType.ZONE_OPEN,
    RequestType.ZONE_CLOSE,
    RequestType.ZONE_FINISH,
    RequestType.ZONE_RESET,
    RequestType.ZONE_RESET_ALL,
]
REQUESTS = [*COMMANDS, RequestType.ZONE_APPEND, RequestType.ZONE_REPORT]


def zoned(disk: Any = None, **options: Any) -> Zoned:
    """Eight zones of 64 sectors (32 KiB), the first conventional, over memory."""
    options = {"zone_size": ZONE * 512, "conventional": 1, "max_append": 16384, **options}
    return Zoned(Memory(8 * ZONE) if disk is None else disk, **options)


def status(attempt: Callable[[], object]) -> int:
    """The status that a request is completed with."""
    try:
        attempt()
    except StatusError as error:
        return error.status
    return Status.OK


def refused(kind: int, sector: int = 0, readable: int = 0, writable: int = 0, limits: Limits = LIMITS) -> Status:
    """The status with which a request is refused before the disk is asked."""
    with pytest.raises(BadRequest) as caught:
        parse(REQUEST_HEADER.pack(kind, 0, sector), readable, writable, limits)
    return caught.value.status


def a_device(model: ZoneModel, **changes: Any) -> Device:
    """A device of 4096-byte blocks with zones of 64 of them."""
    fields = {"max_open": 3, "max_active": 5, "max_append_sectors": 16, "write_granularity": 8192, **changes}
    zoning = Zoning(model, zone_sectors=64, **fields)
    everything = Operation.DISCARD | Operation.WRITE_ZEROES | Operation.SECURE_ERASE | Operation.ZONES
    return Device(configure(BlockInfo(True, 4096, 512), everything, Topology(), zoning=zoning))  # noqa: FBT003


def zoned_fields(device: Device) -> list[int]:
    """zone_sectors, max_open_zones, max_active_zones, max_append_sectors, write_granularity, model, unused2."""
    data = device.config_read(BlkConfig.ZONED, 24)
    return [int.from_bytes(data[at : at + 4], "little") for at in range(0, 20, 4)] + list(data[20:])


# Configuration and negotiation.


@pytest.mark.parametrize("model", ZoneModel)
def test_the_configuration_describes_the_zones(model: ZoneModel) -> None:
    """BLK-018, BLK-023, BLK-040..045, BLK-048, BLK-049: in 512-byte sectors, the granularity in bytes, padding 0."""
    device = a_device(model)
    assert device.config.features & ZONED
    assert zoned_fields(device) == [512, 3, 5, 128, 8192, model, 0, 0, 0]


def test_zoned_fields_are_read_only() -> None:
    """BLK-029: writes to them change nothing."""
    device = a_device(ZoneModel.HOST_MANAGED)
    before = zoned_fields(device)
    device.config_write(BlkConfig.ZONED, b"\xff" * 24)
    assert zoned_fields(device) == before


def test_an_append_fits_into_a_request() -> None:
    """BLK-046, BLK-047: max_append_sectors is at most seg_max * size_max, and may be 0."""
    blk = a_device(ZoneModel.HOST_MANAGED, max_append_sectors=1 << 24).config.blk
    assert blk.max_append_sectors * 512 == blk.seg_max * blk.size_max
    assert a_device(ZoneModel.HOST_MANAGED, max_append_sectors=0).config.blk.max_append_sectors == 0


def test_a_secure_erase_is_of_whole_zones() -> None:
    """BLK-140: its alignment and its limit are multiples of zone_sectors."""
    blk = a_device(ZoneModel.HOST_MANAGED).config.blk
    assert blk.secure_erase_sector_alignment == blk.zone_sectors
    assert blk.max_secure_erase_sectors % blk.zone_sectors == 0 < blk.max_secure_erase_sectors


def test_a_host_managed_device_is_not_discarded() -> None:
    """HOSTILE-198: what would go round the write pointers is not offered, even if the disk could."""
    both = Feature.BLK_DISCARD.mask | Feature.BLK_WRITE_ZEROES.mask
    assert a_device(ZoneModel.HOST_MANAGED).config.features & both == 0
    assert a_device(ZoneModel.HOST_AWARE).config.features & both == both


def test_a_disk_without_zones_does_not_offer_them() -> None:
    """BLK-035: no feature, and a model of 0."""
    config = configure(BlockInfo(True, 512, 64), Operation(0), Topology())  # noqa: FBT003
    assert config.features & ZONED == 0
    assert zoned_fields(Device(config)) == [0] * 9


def test_a_driver_without_zones_cannot_use_a_host_managed_device(serve: Serve) -> None:
    """BLK-038: FEATURES_OK does not stay set."""
    with (
        pytest.raises(ProtocolError, match="refuses features"),
        attach(serve(zoned()).path, features=SUPPORTED & ~ZONED),
    ):
        pass


def test_a_driver_without_zones_uses_a_host_aware_device(serve: Serve) -> None:
    """BLK-037, BLK-097, HOSTILE-187: the fields are 0, zone requests UNSUPP, writes go anywhere; until the reset."""
    served = serve(zoned(model="host-aware"))
    with attach(served.path, features=SUPPORTED & ~ZONED) as v:
        assert v.device.config_bytes(BlkConfig.ZONED, 24) == bytes(24)
        for kind in REQUESTS:
            assert status(lambda: v.call(kind, ZONE, data_in=128)) == Status.UNSUPP  # noqa: B023
        v.write(ZONE + 5, b"x" * 512)
        assert v.read(ZONE + 4, 1024) == bytes(512) + b"x" * 512
        v.reset()
        assert v.config(BlkConfig.ZONED_MODEL) == ZoneModel.HOST_AWARE
    with attach(served.path) as v:
        assert v.has(Feature.BLK_ZONED)
        assert v.config(BlkConfig.ZONE_SECTORS) == ZONE


def test_a_driver_without_zones_gets_no_zone_status(serve: Serve) -> None:
    """What it does not know it is told as an I/O error."""
    with attach(serve(zoned(model="host-aware", zone_capacity=4096)).path, features=SUPPORTED & ~ZONED) as v:
        assert status(lambda: v.write(ZONE + 8, bytes(512))) == Status.IOERR


# Parsing.


def test_zone_requests_are_parsed() -> None:
    """BLK-055, BLK-099: data where the type has it; management ignores it (HOSTILE-196), RESET_ALL its sector."""
    for kind in COMMANDS[:-1]:
        assert parse(REQUEST_HEADER.pack(kind, 0, 64), 77, 77, LIMITS) == ZoneCommand(kind, 64)
    reset_all = RequestType.ZONE_RESET_ALL
    assert parse(REQUEST_HEADER.pack(reset_all, 0, 3), 0, 0, LIMITS) == ZoneCommand(reset_all, 0)  # HOSTILE-195
    assert parse(REQUEST_HEADER.pack(RequestType.ZONE_REPORT, 0, 3), 0, 64 + 191, LIMITS) == ZoneReport(3, 2)
    assert parse(REQUEST_HEADER.pack(RequestType.ZONE_APPEND, 0, 64), 4096, 8, LIMITS) == ZoneAppend(64, 4096)
    assert parse(REQUEST_HEADER.pack(RequestType.OUT, 0, 64), 4096, 0, LIMITS) == Write(64, 4096)


@pytest.mark.parametrize("kind", REQUESTS)
def test_zone_requests_need_the_feature(kind: RequestType) -> None:
    """BLK-097, HOSTILE-187: each is UNSUPP without ZONED."""
    assert refused(kind, 64, 4096, 128, Limits(features=~ZONED, max_append_sectors=32)) is Status.UNSUPP


@pytest.mark.parametrize("room", [0, 7])
def test_an_append_has_room_for_its_sector(room: int) -> None:
    """HOSTILE-192: less than 8 bytes is IOERR, and nothing is written."""
    assert refused(RequestType.ZONE_APPEND, 64, 4096, room) is Status.IOERR


def test_an_append_is_not_too_long() -> None:
    """BLK-045, BLK-114, BLK-115: UNSUPP if there is no append, ZONE_INVALID_CMD if it is longer than the longest."""
    assert refused(RequestType.ZONE_APPEND, 64, 20480, 8) is Status.ZONE_INVALID_CMD
    assert refused(RequestType.ZONE_APPEND, 64, 4096, 8, Limits(features=ZONED)) is Status.UNSUPP


@pytest.mark.parametrize("length", [512, 4095, 4097])
def test_what_is_not_whole_blocks_is_unaligned(length: int) -> None:
    """HOSTILE-193: an append or a write of parts of a block gets ZONE_UNALIGNED_WP."""
    assert refused(RequestType.ZONE_APPEND, 64, length, 8) is Status.ZONE_UNALIGNED_WP
    assert refused(RequestType.OUT, 64, length) is Status.ZONE_UNALIGNED_WP


@pytest.mark.parametrize("kind", [*COMMANDS[:-1], RequestType.ZONE_APPEND])
def test_no_zone_starts_within_a_block(kind: RequestType) -> None:
    """HOSTILE-188: ZONE_INVALID_CMD."""
    assert refused(kind, 65, 4096, 8) is Status.ZONE_INVALID_CMD


@pytest.mark.parametrize("room", [0, 1, 63])
def test_a_report_has_room_for_its_header(room: int) -> None:
    """HOSTILE-190: else it is IOERR."""
    assert refused(RequestType.ZONE_REPORT, 0, 0, room) is Status.IOERR


# Requests.


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_a_driver_goes_through_the_life_of_a_zone(serve: Serve, sector_size: int) -> None:
    """BLK-098..105, BLK-116, BLK-118, BLK-121, BLK-123, BLK-125, BLK-127: in 512-byte sectors whatever the block."""
    memory = Memory(8 * ZONE * 512 // sector_size, sector_size=sector_size)
    with attach(serve(zoned(memory)).path) as v:

        def zone(index: int = 1) -> tuple[int, int]:
            _, start, pointer, _, state = v.zone_report(index * ZONE, 1)[0]
            return pointer - start, state

        assert v.zone_report(0, 1) == [(ZONE, 0, ZONE, 1, 0)]
        assert v.zone_report(ZONE + 3, 2) == [(ZONE, ZONE, ZONE, 2, 1), (ZONE, 2 * ZONE, 2 * ZONE, 2, 1)]
        assert len(v.zone_report(0, 100)) == 8
        v.write(ZONE, b"a" * 4096)
        assert zone() == (8, 2)
        assert v.zone_append(ZONE, b"b" * 8192) == ZONE + 8
        assert zone() == (24, 2)
        assert v.read(ZONE, 16384) == b"a" * 4096 + b"b" * 8192 + bytes(4096)
        for kind, outcome in (("OPEN", (24, 3)), ("CLOSE", (24, 4)), ("FINISH", (ZONE, 14)), ("RESET", (0, 1))):
            v.call(RequestType[f"ZONE_{kind}"], ZONE, b"data", 4)
            assert zone() == outcome
        v.write(ZONE, b"c" * 4096)
        v.call(RequestType.ZONE_OPEN, 2 * ZONE)
        v.call(RequestType.ZONE_RESET_ALL, 12345)
        assert [zone(1), zone(2)] == [(0, 1), (0, 1)]
        assert v.read(ZONE, 4096) == bytes(4096)


@pytest.mark.parametrize("room", [8, 15, 4096])
def test_an_append_tells_its_sector_in_the_first_bytes_of_more_room(serve: Serve, room: int) -> None:
    """HOSTILE-199: Linux gives 15; the padding of its structure is between append_sector and the status."""
    with attach(serve(zoned()).path) as v:
        v.write(ZONE, b"a" * 512)
        answer = v.call(RequestType.ZONE_APPEND, ZONE, b"b" * 512, room)
        assert ZONE_APPEND_SECTOR.unpack_from(answer) == (ZONE + 1,)
        assert v.read(ZONE, 1024) == b"a" * 512 + b"b" * 512


def test_every_zone_status_reaches_the_driver(serve: Serve) -> None:
    """BLK-111..113, BLK-120, BLK-132, BLK-147, BLK-148, HOSTILE-188, HOSTILE-189: each rule has its status."""
    with attach(serve(zoned(max_open=1, max_active=2)).path) as v:
        for kind in COMMANDS[:-1]:
            for sector in (0, ZONE + 1, 8 * ZONE, 1 << 62):
                assert status(lambda: v.call(kind, sector)) == Status.ZONE_INVALID_CMD  # noqa: B023
        assert status(lambda: v.zone_append(0, bytes(512))) == Status.ZONE_INVALID_CMD
        assert status(lambda: v.zone_append(ZONE + 1, bytes(512))) == Status.ZONE_INVALID_CMD
        assert status(lambda: v.zone_append(ZONE, bytes(16896))) == Status.ZONE_INVALID_CMD
        assert status(lambda: v.zone_append(ZONE, b"")) == Status.ZONE_INVALID_CMD
        assert status(lambda: v.zone_report(8 * ZONE)) == Status.ZONE_INVALID_CMD
        assert status(lambda: v.write(ZONE + 1, bytes(512))) == Status.ZONE_UNALIGNED_WP
        assert status(lambda: v.write(ZONE, bytes((ZONE + 1) * 512))) == Status.ZONE_INVALID_CMD
        assert status(lambda: v.read(2 * ZONE - 1, 1024)) == Status.ZONE_INVALID_CMD
        v.call(RequestType.ZONE_OPEN, ZONE)
        assert status(lambda: v.call(RequestType.ZONE_OPEN, 2 * ZONE)) == Status.ZONE_OPEN_RESOURCE
        v.write(ZONE, bytes(512))
        v.call(RequestType.ZONE_CLOSE, ZONE)
        v.write(2 * ZONE, bytes(512))
        assert status(lambda: v.write(3 * ZONE, bytes(512))) == Status.ZONE_ACTIVE_RESOURCE
        assert [zone[4] for zone in v.zone_report(ZONE, 3)] == [4, 2, 1]
        assert status(lambda: v.discard([(ZONE, 1)])) == Status.UNSUPP  # HOSTILE-198
        assert v.zone_report(ZONE, 1)[0][2] == ZONE + 1


def test_a_report_goes_no_further_than_its_buffer(serve: Serve) -> None:
    """BLK-100, HOSTILE-190, HOSTILE-191: whole descriptors only, as many as there are zones, cut at any byte."""
    with attach(serve(zoned()).path) as v:
        for size, count in ((64, 0), (127, 0), (128, 1), (64 + 3 * 64 + 9, 3), (1 << 20, 8)):
            pending = v.submit(RequestType.ZONE_REPORT, data_in=size, framing=[16, 7, 50, 100])
            v.kick()
            report = v.wait(pending).result()
            assert ZONE_REPORT_HEADER.unpack_from(report) == (count,)
            assert report[64 + 64 * count :] == b"\xa5" * (size - 64 - 64 * count)
            assert not any(report[8:64])


def test_requests_framed_at_odd_bytes_are_one_write(serve: Serve) -> None:
    """A write or an append through private memory is judged whole: too long a one writes nothing (HOSTILE-197)."""
    odd = [16 + 100, 411, 1, 700]
    memory = Memory(8 * 8192)
    memory.bounce = True
    with attach(serve(zoned(memory, zone_size=8192 * 512, max_append=2 << 20)).path) as v:
        start = 8192
        v.call(RequestType.OUT, start, b"a" * (3 << 20), framing=odd)
        assert status(lambda: v.call(RequestType.OUT, start + 6144, bytes(3 << 20), framing=odd)) == 3
        assert v.zone_report(start, 1)[0][2] == start + 6144
        answer = v.call(RequestType.ZONE_APPEND, start, b"b" * 4096, 8, framing=[*odd, 3000, 3, 5])
        assert int.from_bytes(answer, "little") == start + 6144
        assert v.read(start + 6143, 1024) == b"a" * 512 + b"b" * 512


def test_requests_through_private_memory_run_at_the_same_time(serve: Serve) -> None:
    """None of them waits for another while there is memory for all."""
    disk = CachedDisk(8 * ZONE)
    disk.bounce = True
    disk.held.add("read")
    with attach(serve(zoned(disk)).path) as v:
        pending = [v.submit(RequestType.IN, 8 * index, data_in=4096) for index in range(8)]
        v.kick()
        disk.wait_for("read", 8)
        disk.release()
        for each in pending:
            v.wait(each).result()


def test_a_read_only_zoned_disk(serve: Serve) -> None:
    """HOSTILE-162: zones are reported, and every change is an I/O error."""
    with attach(serve(ReadOnly(zoned())).path) as v:
        assert len(v.zone_report()) == 8
        for kind in COMMANDS:
            assert status(lambda: v.call(kind, ZONE)) == Status.IOERR  # noqa: B023
        assert status(lambda: v.zone_append(ZONE, bytes(512))) == Status.IOERR
        assert status(lambda: v.write(ZONE, bytes(512))) == Status.IOERR


def test_an_append_is_persisted_when_it_completes(serve: Serve) -> None:
    """Also while the write cache is on."""
    disk = CachedDisk(8 * ZONE)
    with attach(serve(zoned(disk)).path) as v:
        assert v.writeback
        v.write(ZONE, b"a" * 512)
        v.zone_append(ZONE, b"b" * 512)
        assert bytes(disk.stable[ZONE * 512 :][:1024]) == b"a" * 512 + b"b" * 512


def test_a_zoned_disk_is_erased_by_zones(serve: Serve) -> None:
    """BLK-141, BLK-142: parts of a zone are an I/O error, whole zones are empty afterwards."""
    with attach(serve(zoned()).path) as v:
        v.write(ZONE, b"a" * 512)
        assert status(lambda: v.secure_erase([(ZONE, ZONE // 2)])) == Status.IOERR
        v.secure_erase([(ZONE, ZONE)])
        assert v.zone_report(ZONE, 1)[0][4] == 1


def test_a_disk_without_zones_has_no_zone_requests(serve: Serve) -> None:
    """BLK-097: each is UNSUPP, and the disk is not asked."""
    served = serve(FullDisk(64))
    with attach(served.path) as v:
        for kind in REQUESTS:
            assert status(lambda: v.call(kind, data_in=128)) == Status.UNSUPP  # noqa: B023
    assert served.disk.calls == []
