"""Run in a guest that makes zoned disks itself (see zoned_guests.py): zoned disks of a host, served, used and judged.

What is wrong ends it with a traceback.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vmmblk.backends.zoned_device import ZonedDevice, zone_model
from vmmblk.block import ZoneModel, ZoneState
from vmmblk.check import check_block
from vmmblk.client.driver import attach
from vmmblk.client.errors import StatusError
from vmmblk.spec import BlkConfig, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmmblk.client.driver import Driver

DISKS = Path("/sys/kernel/config/nullb")
SOCKET = Path("/tmp/host_zones.sock")
ZONE = 8192  # sectors of 512 bytes: 4 MiB
CAPACITY = 6144  # 3 MiB


def make_disk(name: str, **settings: int) -> Path:
    """A disk of null_blk with 16 zones, two of them conventional."""
    folder = DISKS / name
    folder.mkdir()
    before = set(Path("/sys/block").iterdir())
    settings = {"zoned": 1, "memory_backed": 1, "size": 64, "zone_size": 4, "zone_capacity": 3, **settings}
    for key, value in {**settings, "zone_nr_conv": 2, "power": 1}.items():
        (folder / key).write_text(f"{value}\n")
    (new,) = set(Path("/sys/block").iterdir()) - before  # older kernels do not name it so
    return Path("/dev") / new.name


def serve(disk: Path) -> subprocess.Popen[str]:
    """``vmmblk serve``, listening."""
    line = [sys.executable, "-m", "vmmblk", "serve", "--socket", str(SOCKET), str(disk)]
    server = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdout.readline()
    return server


def status(attempt: Callable[[], object]) -> int:
    """The status that a request is completed with."""
    try:
        attempt()
    except StatusError as error:
        return error.status
    return Status.OK


def look(v: Driver, disk: Path) -> None:
    """A driver sees the zones of the host."""
    queue = Path("/sys/block") / disk.name / "queue"
    assert v.features & Feature.BLK_ZONED.mask
    assert not v.features & (Feature.BLK_DISCARD.mask | Feature.BLK_WRITE_ZEROES.mask)
    for field, file in (
        (BlkConfig.ZONE_SECTORS, "chunk_sectors"),
        (BlkConfig.MAX_OPEN_ZONES, "max_open_zones"),
        (BlkConfig.MAX_ACTIVE_ZONES, "max_active_zones"),
        (BlkConfig.WRITE_GRANULARITY, "zone_write_granularity"),
    ):
        assert v.config(field) == int((queue / file).read_text()), file
    assert v.config(BlkConfig.ZONED_MODEL) == ZoneModel.HOST_MANAGED
    assert 0 < v.config(BlkConfig.MAX_APPEND_SECTORS) * 512 <= int((queue / "zone_append_max_bytes").read_text())
    zones = v.zone_report(0, 100)
    assert [zone[:2] for zone in zones] == [
        (ZONE if index < 2 else CAPACITY, index * ZONE) for index in range(int((queue / "nr_zones").read_text()))
    ]


def in_flight(v: Driver) -> None:
    """Requests that are in flight together are served in order."""
    v.call(RequestType.ZONE_RESET_ALL)
    v.write(2 * ZONE, b"w" * 8192)
    data = [bytes([byte]) * 4096 for byte in range(1, 17)]
    pending = [v.submit(RequestType.ZONE_APPEND, 2 * ZONE, each, 8) for each in data]
    v.kick()
    sectors = [int.from_bytes(v.wait(each).result(), "little") for each in pending]
    assert sorted(sectors) == list(range(2 * ZONE + 16, 2 * ZONE + 16 + 8 * 16, 8))
    assert [v.read(sector, 4096) for sector in sectors] == data
    pending = [v.submit(RequestType.OUT, 3 * ZONE + 8 * at, each) for at, each in enumerate(data)]
    v.kick()
    for each in pending:
        v.wait(each).result()
    assert v.read(3 * ZONE, 4096 * 16) == b"".join(data)


def limits(v: Driver) -> None:
    """What the host refuses has its status."""
    assert status(lambda: v.write(2 * ZONE, b"w" * 512)) == Status.ZONE_UNALIGNED_WP
    assert status(lambda: v.write(2 * ZONE + CAPACITY, b"w" * 512)) == Status.ZONE_UNALIGNED_WP
    assert status(lambda: v.call(RequestType.ZONE_OPEN, 0)) == Status.ZONE_INVALID_CMD
    assert status(lambda: v.call(RequestType.ZONE_CLOSE, 5 * ZONE)) == Status.ZONE_INVALID_CMD
    v.call(RequestType.ZONE_RESET_ALL)
    for zone in (2, 3, 4):
        v.call(RequestType.ZONE_OPEN, zone * ZONE)
    assert status(lambda: v.write(5 * ZONE, b"w" * 512)) == Status.ZONE_OPEN_RESOURCE
    v.write(2 * ZONE, b"w" * 512)
    v.call(RequestType.ZONE_CLOSE, 2 * ZONE)
    v.call(RequestType.ZONE_OPEN, 5 * ZONE)
    assert status(lambda: v.call(RequestType.ZONE_OPEN, 6 * ZONE)) == Status.ZONE_ACTIVE_RESOURCE


def failed_zones(v: Driver, name: str) -> None:
    """Zones whose medium fails are told of."""
    (DISKS / name / "zone_readonly").write_text(f"{2 * ZONE}\n")
    (DISKS / name / "zone_offline").write_text(f"{3 * ZONE}\n")
    assert [v.zone_report(zone * ZONE, 1)[0][4] for zone in (2, 3)] == [ZoneState.READ_ONLY, ZoneState.OFFLINE]
    assert status(lambda: v.write(2 * ZONE + 1, b"w" * 512)) == Status.ZONE_INVALID_CMD
    for zone in (2, 3):
        assert status(lambda zone=zone: v.zone_append(zone * ZONE, b"w" * 512)) == Status.ZONE_INVALID_CMD
        assert status(lambda zone=zone: v.call(RequestType.ZONE_RESET, zone * ZONE)) == Status.ZONE_INVALID_CMD
    assert status(lambda: v.read(3 * ZONE, 512)) == Status.ZONE_INVALID_CMD


def use(disk: Path, name: str) -> None:
    """As a driver does, over a server that is killed: write pointers are where the host has them."""
    server = serve(disk)
    with attach(SOCKET) as v:
        look(v, disk)
        in_flight(v)
        limits(v)
        failed_zones(v, name)
        v.call(RequestType.ZONE_RESET_ALL)
        v.write(4 * ZONE, b"k" * 4096)
        server.kill()
    server.wait()
    SOCKET.unlink()
    server = serve(disk)
    with attach(SOCKET) as v:
        assert v.zone_append(4 * ZONE, b"l" * 512) == 4 * ZONE + 8
        assert v.read(4 * ZONE, 4608) == b"k" * 4096 + b"l" * 512
    server.terminate()
    assert server.wait() == 0


def served() -> None:
    """A disk with limits, for a driver."""
    disk = make_disk("served", blocksize=512, zone_max_open=3, zone_max_active=4)
    assert zone_model(disk) is ZoneModel.HOST_MANAGED
    use(disk, "served")


def checked() -> None:
    """The contract, for disks of two kinds."""
    (scsi,) = Path("/sys/bus/pseudo/drivers/scsi_debug/adapter0").glob("host*/target*/*/block/*")
    limited = make_disk("limited", blocksize=512, zone_max_open=3, zone_max_active=4)
    for disk in (limited, make_disk("big", blocksize=4096), Path("/dev") / scsi.name):
        asyncio.run(check_block(lambda disk=disk: ZonedDevice.open(disk), persistent=True))


if __name__ == "__main__":
    {"served": served, "checked": checked}[sys.argv[1]]()
