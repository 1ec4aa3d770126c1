"""A zoned block device of the host, passed through."""

from __future__ import annotations

import asyncio
import errno
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from zoned_hosts import CLOSE, FINISH, OPEN, REPORT, RESET, ZonedHost

from vmmblk import config
from vmmblk.backends.zoned_device import zone_model
from vmmblk.block import Operation, Zone, ZoneModel, ZoneState, ZoneType, Zoning, operations
from vmmblk.client.driver import attach
from vmmblk.client.errors import StatusError
from vmmblk.config import open_disk
from vmmblk.errors import (
    BlockError,
    ConfigError,
    ZoneActiveResource,
    ZoneInvalidCommand,
    ZoneOpenResource,
    ZoneUnalignedWritePointer,
)
from vmmblk.filters import prepare
from vmmblk.filters.threaded import asynchronous
from vmmblk.filters.zoned import Zoned
from vmmblk.spec import BlkConfig, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    Serve = Callable[..., Any]

SIZE = 16  # sectors of a zone
E, I, X, C = ZoneState.EMPTY, ZoneState.IMPLICIT_OPEN, ZoneState.EXPLICIT_OPEN, ZoneState.CLOSED  # noqa: E741
F, R, O = ZoneState.FULL, ZoneState.READ_ONLY, ZoneState.OFFLINE  # noqa: E741


def data(sectors: int, byte: int = 0x78, size: int = 512) -> list[memoryview]:
    """One buffer, full of a byte."""
    return [memoryview(bytearray([byte]) * (sectors * size))]


def bring(host: ZonedHost, zone: int, state: ZoneState) -> None:
    """Have a zone be in a state, from empty; with one sector in it where there can be."""
    table = host.table
    if state in (I, X, C, F, R, O):
        host.write(zone * SIZE, data(1))
    if state is X:
        table.open_zone(zone)
    elif state is C:
        table.close_zone(zone)
    elif state is F:
        table.finish(zone)
    elif state in (R, O):
        table.fail(zone, state)


# What the host tells.


def test_zones_and_limits_are_those_of_the_host(tmp_path: Path) -> None:
    """Model, size, limits and granularity are read from sysfs, zones with BLKREPORTZONE."""
    host = ZonedHost(tmp_path, zone_capacity=12, max_open=3, max_active=5, append_bytes=5000, granularity=1024)
    device = host.device()
    assert operations(device) == Operation.FLUSH | Operation.ZONES
    assert device.zoning() == Zoning(ZoneModel.HOST_MANAGED, SIZE, 3, 5, 8, 1024)
    host.write(SIZE, data(2))
    host.table.finish(2)
    assert device.report_zones(5, 3) == [
        Zone(0, 16, 16, ZoneType.CONVENTIONAL, ZoneState.NOT_WRITE_POINTER),
        Zone(16, 12, 18, ZoneType.SEQUENTIAL_REQUIRED, I),
        Zone(32, 12, 44, ZoneType.SEQUENTIAL_REQUIRED, F),
    ]
    assert device.report_zones(7 * SIZE, 100) == [Zone(112, 12, 112, ZoneType.SEQUENTIAL_REQUIRED, E)]
    assert device.report_zones(0, 0) == []


def test_a_host_that_tells_less(tmp_path: Path) -> None:
    """Before Linux 5.9 no capacity is told: then it is the size.  A disk without appends of its own has them."""
    device = ZonedHost(tmp_path, tells_capacity=False, append_bytes=0).device()
    assert [zone.capacity for zone in device.report_zones(6 * SIZE, 2)] == [16, 12]
    assert device.zoning() == Zoning(ZoneModel.HOST_MANAGED, SIZE, 0, 0, 12, 512)


def test_sectors_are_the_disk_s_own(tmp_path: Path) -> None:
    """Linux counts 512-byte sectors whatever the logical block."""
    host = ZonedHost(tmp_path, sector_size=4096)
    device = host.device()
    device.write(SIZE, data(1, size=4096))
    assert device.append(SIZE, data(2, size=4096)) == SIZE + 1
    assert device.report_zones(SIZE, 1)[0].write_pointer == SIZE + 3
    host.asked.clear()
    device.finish_zone(7 * SIZE)
    assert host.asked == [(REPORT, 896, 1), (FINISH, 896, 96)]


def test_a_host_whose_zones_cannot_be_used_is_refused(tmp_path: Path) -> None:
    """It tells of none, or does not tell, or has zones of a kind that VIRTIO has not; one line says so."""
    host = ZonedHost(tmp_path)
    report = host.table.report
    host.table.report = lambda *_: []  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="no zone at sector 0; look at them"):
        host.device()
    host.table.report = lambda *_: [replace(zone, type=4) for zone in report(*_)]  # type: ignore[method-assign]
    with pytest.raises(ConfigError, match="cannot use the zones of the disk: 4 is not a valid ZoneType; look at them"):
        host.device()
    host.fails["report"] = errno.ENOTTY
    with pytest.raises(ConfigError, match=r"cannot use the zones of the disk: .*Inappropriate ioctl"):
        host.device()


def test_which_disks_are_zoned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue of a block device says it; a partition has its disk's; files and what is not there are not zoned."""
    host = ZonedHost(tmp_path)
    assert zone_model(host.path, devices=host.devices) is None
    assert zone_model(tmp_path / "nothing", devices=host.devices) is None
    monkeypatch.setattr(Path, "is_block_device", lambda _: True)
    assert zone_model(host.path, devices=host.devices) is ZoneModel.HOST_MANAGED
    zoned = host.devices / "0:0" / "queue" / "zoned"
    for text, model in (("host-aware", ZoneModel.HOST_AWARE), ("none", None)):
        zoned.write_text(text + "\n")
        assert zone_model(host.path, devices=host.devices) is model
    disk = tmp_path / "disk"
    (host.devices / "0:0").rename(disk)
    (disk / "part").mkdir()
    (host.devices / "0:0").symlink_to(disk / "part")
    (disk / "queue" / "zoned").write_text("host-managed\n")
    assert zone_model(host.path, devices=host.devices) is ZoneModel.HOST_MANAGED

    def unreachable(_: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "is_block_device", unreachable)
    assert zone_model(host.path, devices=host.devices) is None


# Writing.


def test_a_zone_is_written_at_its_write_pointer(tmp_path: Path) -> None:
    """What does not begin there is refused and never reaches the disk; the disk is asked before it is refused."""
    host = ZonedHost(tmp_path)
    device = host.device()
    device.write(SIZE, data(2, 1))
    device.write_cached(SIZE + 2, data(1, 2))
    before = bytes(host.data)
    for sector in (SIZE, SIZE + 2, SIZE + 4):
        with pytest.raises(ZoneUnalignedWritePointer):
            device.write(sector, data(1, 9))
    assert host.data == before
    host.asked.clear()
    device.write(SIZE + 3, data(13, 3))
    assert host.asked == []
    assert host.state(1) is F
    with pytest.raises(ZoneInvalidCommand, match="FULL"):
        device.write(SIZE + 3, data(1))
    device.write(3, data(2, 4))
    found = []
    for sector in (0, SIZE):
        target = data(SIZE)
        device.read(sector, target)
        found.append(bytes(target[0]))
    assert found == [
        bytes(3 * 512) + b"\4" * 1024 + bytes(11 * 512),
        b"\1" * 1024 + b"\2" * 512 + b"\3" * 13 * 512,
    ]


def test_a_write_stays_in_its_zone(tmp_path: Path) -> None:
    """Where it does not, nothing of it is written, though Linux would have split it."""
    host = ZonedHost(tmp_path, zone_capacity=12, conventional=2, granularity=1024)
    device = host.device()
    cases: list[tuple[int, int, type[BlockError]]] = [
        (2 * SIZE, 13, ZoneInvalidCommand),
        (2 * SIZE, 17, ZoneInvalidCommand),
        (2 * SIZE - 1, 2, ZoneInvalidCommand),
        (2 * SIZE, 3, ZoneUnalignedWritePointer),
    ]
    for sector, sectors, kind in cases:
        with pytest.raises(kind):
            device.write(sector, data(sectors))
    with pytest.raises(ZoneInvalidCommand):
        device.read(3 * SIZE - 1, data(2))
    for sectors, kind in ((13, ZoneInvalidCommand), (3, ZoneUnalignedWritePointer)):
        with pytest.raises(kind):
            device.append(2 * SIZE, data(sectors))
    assert not any(host.data)
    device.write(SIZE - 1, data(2))
    device.read(SIZE - 1, data(2))


def test_an_append_goes_to_the_write_pointer(tmp_path: Path) -> None:
    """It returns the sector; only zones that are written in order take one."""
    host = ZonedHost(tmp_path)
    device = host.device()
    assert [device.append(SIZE, data(count)) for count in (1, 2, 3)] == [16, 17, 19]
    device.write(22, data(1))
    assert device.append(SIZE, data(1)) == 23
    for sector in (0, SIZE + 1):
        with pytest.raises(ZoneInvalidCommand):
            device.append(sector, data(1))
    device.finish_zone(SIZE)
    with pytest.raises(ZoneInvalidCommand):
        device.append(SIZE, data(1))
    device.reset_zone(SIZE)
    assert device.append(SIZE, data(1)) == 16


def test_appends_at_the_same_time_share_nothing(tmp_path: Path) -> None:
    """From many threads: each has sectors of its own, and they hold what it wrote."""
    host = ZonedHost(tmp_path, zones=9, zone_sectors=64)
    device = host.device()
    placed: dict[int, int] = {}
    start = threading.Barrier(8)

    def work(worker: int) -> None:
        start.wait()
        for turn in range(16):
            byte = worker * 16 + turn
            placed[byte] = device.append((1 + turn % 4) * 64, data(1 + byte % 2, byte))

    threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(placed) == 128
    for byte, sector in placed.items():
        end = sector + 1 + byte % 2
        assert set(host.data[sector * 512 : end * 512]) == {byte}
    assert sum(host.table.written(zone) for zone in range(1, 5)) == 8 * (8 + 16)


@pytest.mark.parametrize("name", ["append", "reset_zone", "reset_all_zones"])
def test_an_append_is_not_interrupted(tmp_path: Path, name: str) -> None:
    """From looking at the write pointer to the end of the write nothing else changes the zone."""
    host = ZonedHost(tmp_path)
    device = host.device()
    arguments = {"append": (SIZE, data(1)), "reset_zone": (SIZE,), "reset_all_zones": ()}[name]
    other = threading.Thread(target=getattr(device, name), args=arguments)
    write = host.write

    def interrupted(sector_start: int, buffers: Any) -> None:
        host.write = write  # type: ignore[method-assign]
        other.start()
        other.join(0.1)
        assert other.is_alive()
        write(sector_start, buffers)

    host.write = interrupted  # type: ignore[method-assign]
    assert device.append(SIZE, data(2)) == SIZE
    other.join()
    assert device.report_zones(SIZE, 1)[0].write_pointer == SIZE + (3 if name == "append" else 0)


def test_writes_that_are_in_flight_together_go_in_order(tmp_path: Path) -> None:
    """As the server calls the disk, in threads: none of them overtakes another of its zone."""
    host = ZonedHost(tmp_path, zones=9, zone_sectors=64)

    async def use() -> None:
        disk: Any = prepare(host.device())
        await asyncio.gather(*(disk.write(zone * 64 + at, data(1, at)) for at in range(64) for zone in range(1, 5)))

    asyncio.run(use())
    assert [host.state(zone) for zone in range(1, 5)] == [F] * 4


def test_somebody_else_moves_the_write_pointer(tmp_path: Path) -> None:
    """The disk's own pointer counts: what fits it is written, what does not is refused, and then it is known."""
    host = ZonedHost(tmp_path)
    device = host.device()
    device.write(SIZE, data(1))
    host.write(SIZE + 1, data(1))
    device.write(SIZE + 2, data(1))
    host.write(SIZE + 3, data(3))
    with pytest.raises(ZoneUnalignedWritePointer):
        device.write(SIZE + 3, data(2))
    assert device.append(SIZE, data(1)) == SIZE + 6
    host.table.reset(1)
    with pytest.raises(ZoneUnalignedWritePointer):
        device.append(SIZE, data(1))
    assert device.append(SIZE, data(1)) == SIZE
    host.table.finish(1)
    with pytest.raises(ZoneInvalidCommand):
        device.append(SIZE, data(1))


@pytest.mark.parametrize("keeps", [0, 2, 4])
def test_an_error_of_the_medium_stays_one(tmp_path: Path, keeps: int) -> None:
    """However much was written: it is no zone error, and what comes next goes where the disk's pointer is."""
    host = ZonedHost(tmp_path)
    device = host.device()
    device.write(SIZE, data(1))
    host.fails["write"], host.keeps = errno.EIO, keeps
    with pytest.raises(OSError, match="Input/output"):
        device.write(SIZE + 1, data(4))
    with pytest.raises(OSError, match="Input/output"):
        device.write(0, data(1))
    host.fails.clear()
    assert device.append(SIZE, data(1)) == SIZE + 1 + keeps


def test_a_disk_that_tells_nothing_more(tmp_path: Path) -> None:
    """A write has failed, and so has the question why: it is an I/O error, and asked about when the next comes."""
    host = ZonedHost(tmp_path)
    device = host.device()
    device.write(SIZE, data(1))
    host.fails, host.keeps = {"write": errno.EIO, "report": errno.EIO}, 2
    with pytest.raises(OSError, match="Input/output"):
        device.append(SIZE, data(4))
    host.fails.clear()
    assert device.append(SIZE, data(1)) == SIZE + 3


# Commands.


@pytest.mark.parametrize(
    ("name", "request_", "outcomes"),
    [
        ("open_zone", OPEN, {E: X, I: X, X: X, C: X, F: None, R: None, O: None}),
        ("close_zone", CLOSE, {E: None, I: C, X: C, C: C, F: None, R: None, O: None}),
        ("finish_zone", FINISH, {E: F, I: F, X: F, C: F, F: F, R: None, O: None}),
        ("reset_zone", RESET, {E: E, I: E, X: E, C: E, F: E, R: None, O: None}),
    ],
)
def test_every_command_in_every_state(
    tmp_path: Path, name: str, request_: int, outcomes: dict[ZoneState, ZoneState | None]
) -> None:
    """As in the table of docs/zoned.md; what is invalid does not reach the disk."""
    for index, (state, outcome) in enumerate(outcomes.items()):
        folder = tmp_path / str(index)
        folder.mkdir()
        host = ZonedHost(folder)
        device = host.device()
        bring(host, 2, state)
        host.asked.clear()
        if outcome is None:
            with pytest.raises(ZoneInvalidCommand):
                getattr(device, name)(2 * SIZE)
            assert host.asked == [(REPORT, 32, 1)]
            assert host.state(2) is state
        else:
            getattr(device, name)(2 * SIZE)
            assert host.asked == [(REPORT, 32, 1), (request_, 32, 16)]
            assert host.state(2) is outcome


@pytest.mark.parametrize("name", ["open_zone", "close_zone", "finish_zone", "reset_zone"])
@pytest.mark.parametrize("sector", [0, SIZE + 1])
def test_commands_name_the_start_of_a_sequential_zone(tmp_path: Path, name: str, sector: int) -> None:
    """Others do not reach the disk."""
    host = ZonedHost(tmp_path)
    device = host.device()
    host.asked.clear()
    with pytest.raises(ZoneInvalidCommand):
        getattr(device, name)(sector)
    assert host.asked == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.ETOOMANYREFS, ZoneOpenResource),
        (errno.EOVERFLOW, ZoneActiveResource),
        (errno.EREMOTEIO, ZoneInvalidCommand),
        (errno.EINVAL, ZoneInvalidCommand),
        (errno.EIO, OSError),
    ],
)
def test_what_the_disk_refuses_a_command_with(tmp_path: Path, number: int, kind: type[Exception]) -> None:
    """Linux's numbers become the four zone errors where they mean one."""
    host = ZonedHost(tmp_path)
    host.fails["open"] = number
    with pytest.raises(kind):
        host.device().open_zone(SIZE)


def test_resources_are_the_disk_s(tmp_path: Path) -> None:
    """Limits of open and of active zones that a write or a command meets are told apart."""
    host = ZonedHost(tmp_path, max_open=2, max_active=3)
    device = host.device()
    for zone in (1, 2):
        device.open_zone(zone * SIZE)
    for attempt in (
        lambda: device.open_zone(3 * SIZE),
        lambda: device.write(3 * SIZE, data(1)),
        lambda: device.append(3 * SIZE, data(1)),
    ):
        with pytest.raises(ZoneOpenResource):
            attempt()
    device.write(SIZE, data(1))
    device.close_zone(SIZE)
    device.write(3 * SIZE, data(1))
    with pytest.raises(ZoneActiveResource):
        device.append(4 * SIZE, data(1))
    device.finish_zone(3 * SIZE)
    assert device.append(4 * SIZE, data(1)) == 4 * SIZE


def test_all_zones_are_reset_at_once(tmp_path: Path) -> None:
    """With one call for the whole disk; what cannot be reset stays, and pointers are known to be the start."""
    host = ZonedHost(tmp_path)
    device = host.device()
    device.write(SIZE, data(3))
    bring(host, 2, F)
    bring(host, 3, R)
    host.asked.clear()
    device.reset_all_zones()
    assert host.asked == [(RESET, 0, 8 * SIZE - 4)]
    assert [host.state(zone) for zone in (1, 2, 3)] == [E, E, R]
    assert device.append(SIZE, data(1)) == SIZE


def test_a_zone_whose_medium_has_failed(tmp_path: Path) -> None:
    """Its errors are those of the zone, not of one sector."""
    host = ZonedHost(tmp_path)
    device = host.device()
    device.write(SIZE, data(1, 5))
    host.table.fail(1, R)
    bring(host, 2, O)
    target = data(1)
    device.read(SIZE, target)
    assert bytes(target[0]) == b"\5" * 512
    for attempt in (
        lambda: device.write(SIZE + 1, data(1)),
        lambda: device.append(SIZE, data(1)),
        lambda: device.append(2 * SIZE, data(1)),
        lambda: device.read(2 * SIZE, data(1)),
    ):
        with pytest.raises(ZoneInvalidCommand):
            attempt()
    host.fails["read"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        device.read(SIZE, data(1))


def test_a_host_aware_disk_is_written_anywhere(tmp_path: Path) -> None:
    """Its zones are no matter of order, so it takes no appends either."""
    host = ZonedHost(tmp_path, model=ZoneModel.HOST_AWARE)
    device = host.device()
    assert (device.zoning().model, device.zoning().max_append_sectors) == (ZoneModel.HOST_AWARE, 0)
    device.write(SIZE + 3, data(1))
    device.write(2 * SIZE - 1, data(2))
    assert device.report_zones(SIZE, 1)[0].state is F
    with pytest.raises(ZoneInvalidCommand):
        device.append(3 * SIZE, data(1))
    host.table.fail(1, R)
    with pytest.raises(ZoneInvalidCommand):
        device.write(SIZE, data(1))


def test_what_was_cached_is_flushed(tmp_path: Path) -> None:
    """With the disk's own flush, whose errors are told."""
    host = ZonedHost(tmp_path)
    host.fails["flush"] = errno.EIO
    with pytest.raises(OSError, match="Input/output"):
        host.device().flush()


# From the command line, and for the guest.


def test_a_zoned_device_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is opened with its zones, and never through the page cache."""
    device = ZonedHost(tmp_path).device()
    opened: list[dict[str, object]] = []
    monkeypatch.setattr(config, "zone_model", lambda _: ZoneModel.HOST_MANAGED)
    monkeypatch.setattr(config.ZonedDevice, "open", lambda _, **options: opened.append(options) or device)
    disk = open_disk("/dev/zoned", ["bounce=on"])
    assert Operation.ZONES in operations(disk)
    assert opened == [{"read_only": False, "bounce": True, "lock": True}]
    with pytest.raises(ConfigError, match="leave direct=off out"):
        open_disk("/dev/zoned", ["direct=off"])
    with pytest.raises(ConfigError, match="leave --block-size out"):
        open_disk("/dev/zoned", block_size=4096)


def test_zones_are_not_put_on_zones(tmp_path: Path) -> None:
    """The filter would keep write pointers that are not the disk's."""
    with pytest.raises(ConfigError, match="zones of its own"):
        Zoned(asynchronous(ZonedHost(tmp_path).device()), zone_size=8192)


def test_a_guest_uses_the_zones_of_the_host(tmp_path: Path, serve: Serve) -> None:
    """It sees them in its configuration, and what breaks a rule has the status of that rule."""
    host = ZonedHost(tmp_path, max_open=1, max_active=2)

    def status(attempt: Callable[[], object]) -> int:
        with pytest.raises(StatusError) as caught:
            attempt()
        return caught.value.status

    with attach(serve(host.device()).path) as v:
        assert v.features & Feature.BLK_ZONED.mask
        assert v.config(BlkConfig.ZONE_SECTORS) == SIZE
        assert v.config(BlkConfig.MAX_OPEN_ZONES) == 1
        v.write(SIZE, b"x" * 512)
        assert v.zone_append(SIZE, b"y" * 512) == SIZE + 1
        assert v.read(SIZE, 1024) == b"x" * 512 + b"y" * 512
        assert status(lambda: v.write(SIZE, b"x" * 512)) == Status.ZONE_UNALIGNED_WP
        assert status(lambda: v.call(RequestType.ZONE_CLOSE, 2 * SIZE)) == Status.ZONE_INVALID_CMD
        v.call(RequestType.ZONE_OPEN, SIZE)
        assert status(lambda: v.call(RequestType.ZONE_OPEN, 2 * SIZE)) == Status.ZONE_OPEN_RESOURCE
        v.call(RequestType.ZONE_CLOSE, SIZE)
        v.call(RequestType.ZONE_OPEN, 2 * SIZE)
        assert status(lambda: v.call(RequestType.ZONE_OPEN, 3 * SIZE)) == Status.ZONE_ACTIVE_RESOURCE
        v.call(RequestType.ZONE_RESET_ALL)
        assert {state for *_, state in v.zone_report(SIZE, 7)} == {E}
