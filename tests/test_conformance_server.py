"""Rules that show only in a running device: seen by a driver on the other end of the socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from conftest import on_both_engines, until
from disks import CachedDisk, Disk, FullDisk

from vmmblk.block import Topology
from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.spec import BlkConfig, CommonCfg, DeviceStatus, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Served

    from vmmblk.client.memory import GuestMemory

    Serve = Callable[..., Served]

EVENT_IDX = Feature.EVENT_IDX.mask


def test_nothing_of_a_queue_happens_after_its_reset(serve: Serve) -> None:
    """VQRST-002, VQRST-003, VQRST-008, HOSTILE-078, PCI-055: what was in flight ends before the reset is reported."""
    disk = Disk()
    served = serve(disk)
    with attach(served.path) as v:
        queue = v.queues[0]
        disk.held.add("read")
        for _ in range(24):
            v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read", 24)
        v.device.set(CommonCfg.QUEUE_SELECT, 0)
        v.device.set(CommonCfg.QUEUE_RESET, 1)
        assert v.device.get(CommonCfg.QUEUE_RESET) == 1
        disk.release()
        until(lambda: v.device.get(CommonCfg.QUEUE_RESET) == 0)
        assert v.device.get(CommonCfg.QUEUE_ENABLE) == 0
        used, _ = queue.used_idx, v.take_interrupts()
        v.ring_doorbell()
        served.settle()
        assert (queue.used_idx, v.take_interrupts(), disk.count("read")) == (used, 0, 24)
        v.reset_queue(0)
        assert v.read(0, 512) == bytes(512)


def whole(memory: GuestMemory) -> list[bytes]:
    """All of guest memory."""
    return [memory.read(each.iova, each.size) for each in memory.layout]


def test_memory_is_left_alone_after_a_reset(serve: Serve) -> None:
    """RST-003, RST-004, HOSTILE-091, HOSTILE-107: whatever is in memory, rung for or still on its way from before."""
    disk = Disk()
    served = serve(disk)
    with attach(served.path) as v:
        disk.held.add("read")
        for _ in range(8):
            v.submit(RequestType.IN, 0, data_in=4096)
        v.kick()
        disk.wait_for("read", 8)
        v.device.status = DeviceStatus(0)
        disk.release()
        until(lambda: v.device.status == 0)
        for _ in range(8):
            v.submit(RequestType.IN, 0, data_in=4096)
        v.queues[0].publish()
        before = whole(v.memory)
        for _ in range(10):
            v.ring_doorbell()
        assert v.device.status == 0
        served.settle()
        assert whole(v.memory) == before
        assert disk.count("read") == 8


def test_configuration_is_little_endian(serve: Serve) -> None:
    """CFG-003, PCI-010, BLK-004: each field of more than a byte, lowest byte first."""
    with attach(serve(Disk(0x1234, sector_size=4096)).path) as v:
        raw = v.device.config_bytes(0, 96)
        assert raw[:8] == (0x1234 * 8).to_bytes(8, "little")
        assert raw[BlkConfig.BLK_SIZE : BlkConfig.BLK_SIZE + 4] == b"\x00\x10\x00\x00"
        assert raw[BlkConfig.SIZE_MAX : BlkConfig.SIZE_MAX + 4] == v.config(BlkConfig.SIZE_MAX).to_bytes(4, "little")


@on_both_engines
@pytest.mark.parametrize("features", [SUPPORTED, SUPPORTED & ~EVENT_IDX], ids=["event index", "flags"])
def test_a_driver_that_kicks_only_when_asked_to_is_always_heard(serve: Serve, features: int) -> None:
    """RING-EVENT-016, RING-SPLIT-012: buffers added while doorbells are being enabled are neither lost nor misread."""
    disk = Disk()
    disk.data[:] = b"".join(bytes([sector & 0xFF]) * 512 for sector in range(2048))
    with attach(serve(disk).path, features=features) as v:
        for round_ in range(600):
            pending = []
            for sector in range(round_ % 5 + 1):
                pending.append(v.submit(RequestType.IN, round_ + sector, data_in=512))
                v.kick()
            v.wait_all(pending)
            assert [each.data[0] for each in pending] == [round_ + sector & 0xFF for sector in range(len(pending))]


def test_topology_is_advice(serve: Serve) -> None:
    """BLK-026: positions and lengths are in units of 512 bytes whatever the topology says."""
    disk = Disk()
    disk.topology = Topology(physical_block_size=65536, minimum_io_size=65536, optimal_io_size=1 << 20)
    with attach(serve(disk).path) as v:
        assert v.config(BlkConfig.PHYSICAL_BLOCK_EXP) == 7
        assert v.config(BlkConfig.MIN_IO_SIZE) == 128
        assert v.capacity == 2048
        v.write(3, b"\x33" * 512)
        assert v.read(2, 3 * 512) == bytes(512) + b"\x33" * 512 + bytes(512)
    assert disk.data[3 * 512 : 4 * 512] == b"\x33" * 512


class CachedZeroes(CachedDisk):
    """A disk whose write_zeroes() is as durable as its write(), and that says what was cached before it."""

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Zero, and stable."""
        await self._enter("write_zeroes", sector_start, sectors, unmap)
        for each in (self.data, self.stable):
            each[sector_start * 512 : (sector_start + sectors) * 512] = bytes(sectors * 512)


@pytest.mark.parametrize("writeback", [False, True])
def test_zeroes_are_as_durable_as_writes(serve: Serve, writeback: bool) -> None:
    """BLK-096: written through they are stable at completion, written back after a flush at the latest."""
    disk = CachedZeroes()
    disk.data[:] = disk.stable[:] = b"\x11" * len(disk.data)
    with attach(serve(disk).path) as v:
        v.writeback = writeback
        v.write(8, b"\x22" * 512)
        v.write_zeroes([(8, 4)])
        if writeback:
            v.flush()
        assert disk.stable[8 * 512 : 12 * 512] == bytes(4 * 512)


@on_both_engines
@pytest.mark.parametrize("framing", [[16, 3 << 20], [16, *[4096] * 400]], ids=["a large segment", "many segments"])
def test_more_than_the_limits_of_a_request(serve: Serve, framing: list[int]) -> None:
    """HOSTILE-159, BLK-005, BLK-006: segments beyond size_max or seg_max are served, whatever the driver was told."""
    disk = FullDisk(sectors=8192)
    disk.data[:] = bytes(range(256)) * (len(disk.data) // 256)
    with attach(serve(disk, queue_size=512).path, indirect=False) as v:
        length = sum(framing[1:])
        assert length > v.config(BlkConfig.SIZE_MAX)
        pending = v.submit(RequestType.IN, 0, data_in=length, framing=framing)
        v.kick()
        assert v.wait(pending).status == Status.OK
        assert pending.data == disk.data[:length]
