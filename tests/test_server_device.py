"""The device as a driver finds it behind the socket: features, queues, interrupts, doorbells, resets, PCI."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING, Any

import pytest
from conftest import on_both_engines, until
from disks import CachedDisk, Disk, FullDisk

from vmmblk.client.connection import Connection
from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.errors import NeedsReset, ProtocolError, StatusError
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.memory import GuestMemory
from vmmblk.client.queue import Descriptor
from vmmblk.client.wire import IrqIndex, Region
from vmmblk.spec import (
    NO_VECTOR,
    REQUEST_HEADER,
    BlkConfig,
    CommonCfg,
    DescFlag,
    DeviceStatus,
    Feature,
    IsrStatus,
    PciCapType,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Logs, Served

    Serve = Callable[..., Served]

VERSION_1 = Feature.VERSION_1.mask
NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT
COMMAND = 0x04
OPTIONAL = [
    Feature.BLK_SIZE_MAX,
    Feature.BLK_SEG_MAX,
    Feature.BLK_BLK_SIZE,
    Feature.BLK_FLUSH,
    Feature.BLK_TOPOLOGY,
    Feature.BLK_CONFIG_WCE,
    Feature.BLK_DISCARD,
    Feature.BLK_WRITE_ZEROES,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.RING_PACKED,
    Feature.RING_RESET,
]


def exercise(v: VirtioBlk, sector: int = 8) -> None:
    """Write, read back and compare; several in flight."""
    v.write(sector, bytes([sector & 0xFF]) * 1536)
    assert v.read(sector, 1536) == bytes([sector & 0xFF]) * 1536
    requests = [v.submit(RequestType.IN, sector + i % 3, data_in=512) for i in range(min(5, v.queues[0].size // 3))]
    v.kick()
    v.wait_all(requests)
    assert all(request.data == bytes([sector & 0xFF]) * 512 for request in requests)


# Features.


def test_what_is_offered_is_what_the_disk_can_do(serve: Serve) -> None:
    """A full disk offers everything of this version, a plain one what needs no help from the disk (FEAT-004)."""
    always = VERSION_1 | sum(
        each.mask
        for each in OPTIONAL
        if each not in (Feature.BLK_CONFIG_WCE, Feature.BLK_DISCARD, Feature.BLK_WRITE_ZEROES)
    )
    with attach(serve(FullDisk()).path) as v:
        assert v.device.features == VERSION_1 | sum(each.mask for each in OPTIONAL)
    with attach(serve(CachedDisk()).path) as v:
        assert v.device.features == always | Feature.BLK_CONFIG_WCE.mask
    with attach(serve(Disk()).path) as v:
        assert v.device.features == always


@on_both_engines
@pytest.mark.parametrize(
    "extra",
    [0, *(each.mask for each in OPTIONAL), *(a.mask | b.mask for a, b in itertools.combinations(OPTIONAL[8:], 2))],
    ids=hex,
)
def test_every_feature_alone_and_paired_works(serve: Serve, extra: int) -> None:
    """A driver may take any of the optional features, and gets a device that works (FEAT-002)."""
    with attach(serve(FullDisk()).path, features=VERSION_1 | extra) as v:
        assert v.features == VERSION_1 | extra
        exercise(v)


@on_both_engines
@pytest.mark.parametrize("without", OPTIONAL, ids=lambda each: each.name)
def test_every_feature_can_be_left_out(serve: Serve, without: Feature) -> None:
    """A driver that takes everything but one gets a device that works."""
    with attach(serve(FullDisk()).path, features=SUPPORTED & ~without.mask) as v:
        assert not v.has(without)
        exercise(v)


@on_both_engines
def test_a_driver_without_version_1_is_refused(serve: Serve) -> None:
    """FEATURES_OK does not stick, and the same driver may try again with VERSION_1 (HOSTILE-103).

    And RSVD-002.
    """
    with attach(serve().path, start=False, features=SUPPORTED & ~VERSION_1) as v:
        with pytest.raises(ProtocolError):
            v.init()
        v.wanted = SUPPORTED
        v.init()
        exercise(v)


# Queues.


@on_both_engines
@pytest.mark.parametrize("size", [1, 2, 4, 16, 256, 1024, 32768])
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event"])
def test_every_queue_size_works(serve: Serve, size: int, event_idx: bool) -> None:
    """From one descriptor to 32768, past the wrap of the ring."""
    features = SUPPORTED if event_idx else SUPPORTED & ~Feature.EVENT_IDX.mask
    with attach(serve(queue_size=size).path, features=features) as v:
        assert v.queues[0].size == size
        for sector in range(40):
            v.write(sector, bytes([sector]) * 512)
        assert v.read(39, 512) == bytes([39]) * 512


@on_both_engines
@pytest.mark.parametrize("size", [1, 8, 64])
def test_the_driver_may_choose_a_smaller_queue(serve: Serve, size: int) -> None:
    """A size below the maximum reads back and is used (PCI-043)."""
    with attach(serve(queue_size=256).path, queue_size=size) as v:
        assert v.queues[0].size == size
        for turn in range(20):
            exercise(v, turn)


@on_both_engines
@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event"])
def test_indices_wrap(serve: Serve, event_idx: bool) -> None:
    """More than 65536 requests go through one ring: its indices wrap, nothing is lost."""
    features = SUPPORTED if event_idx else SUPPORTED & ~Feature.EVENT_IDX.mask
    disk = Disk()
    with attach(serve(disk, queue_size=1024).path, features=features) as v:
        block = v.memory.alloc(4096)
        v.memory.write(block, REQUEST_HEADER.pack(RequestType.FLUSH, 0, 0))
        queue = v.queues[0]
        head, tail = queue.reserve(2)
        queue.write_descriptor(head, Descriptor(block, 16, NEXT, tail))
        queue.write_descriptor(tail, Descriptor(block + 64, 1, WRITE))
        done = 0
        while done < 66_000:
            for _ in range(1000):  # the same chain, which is the driver's to reuse: FLUSH carries no data
                queue.offer(head)
            queue.publish()
            v.ring_doorbell()
            done += 1000
            until(lambda: queue.used_idx == done & 0xFFFF, "the requests do not complete")  # noqa: B023
        assert DeviceStatus.NEEDS_RESET not in v.status


@on_both_engines
def test_a_queue_reset_and_another_size(serve: Serve) -> None:
    """RING_RESET: the queue comes back at another size and place, from index 0 (VQRST-004 to 007, HOSTILE-079).

    And RSVD-018.
    """
    with attach(serve(queue_size=256).path) as v:
        exercise(v)
        for size in (16, 256, 4, 128):
            v._queue_size = size
            v.reset_queue(0)
            assert v.queues[0].size == size
            assert v.queues[0].used_idx == 0
            exercise(v, size & 63)
        assert v.queues[0].used_idx > 0


@on_both_engines
def test_a_queue_reset_forgets_its_settings(serve: Serve) -> None:
    """After queue_reset everything of the queue reads as at first, and nothing of it is served (VQRST-002 to 005)."""
    served = serve()
    with attach(served.path) as v:
        exercise(v)
        before = served.disk.count("read")
        used = v.queues[0].used_idx
        v.device.reset_queue(0)
        for register, value in (
            (CommonCfg.QUEUE_ENABLE, 0),
            (CommonCfg.QUEUE_RESET, 0),
            (CommonCfg.QUEUE_SIZE, 256),
            (CommonCfg.QUEUE_MSIX_VECTOR, NO_VECTOR),
        ):
            assert v.device.get(register) == value
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick(force=True)
        assert v.status & DeviceStatus.DRIVER_OK
        served.settle()
        assert (served.disk.count("read"), v.queues[0].used_idx) == (before, used)


@on_both_engines
def test_queue_reset_without_the_feature_is_ignored(serve: Serve) -> None:
    """queue_reset does nothing when RING_RESET was not negotiated (HOSTILE-074, PCI-048)."""
    with attach(serve().path, features=SUPPORTED & ~Feature.RING_RESET.mask) as v:
        v.device.set(CommonCfg.QUEUE_RESET, 1)
        assert v.device.get(CommonCfg.QUEUE_RESET) == 0
        exercise(v)


@on_both_engines
def test_event_index_suppresses_doorbells_and_interrupts(serve: Serve) -> None:
    """A driver that asks for no interrupt gets none; one at the end of a batch stands for all of it."""
    served = serve()
    with attach(served.path) as v:
        queue = v.queues[0]
        v.take_interrupts()
        queue.set_used_event(queue.used_idx - 1)  # far away: no interrupt
        requests = [v.submit(RequestType.IN, 0, data_in=512) for _ in range(20)]
        target = (queue.used_idx + 20) & 0xFFFF
        v.kick()
        until(lambda: queue.used_idx == target)
        served.settle()
        assert v.take_interrupts() == 0
        v.wait_all(requests)
        queue.set_used_event(queue.used_idx + 9)
        requests = [v.submit(RequestType.IN, 0, data_in=512) for _ in range(10)]
        v.kick()
        until(lambda: queue.used_idx == (target + 10) & 0xFFFF)
        until(lambda: v.take_interrupts() == 1, "the tenth request interrupts")


@on_both_engines
def test_the_interrupt_flag_suppresses_interrupts(serve: Serve) -> None:
    """Without EVENT_IDX, bit 0 of the avail flags decides alone (HOSTILE-037)."""
    served = serve()
    with attach(served.path, features=SUPPORTED & ~Feature.EVENT_IDX.mask) as v:
        queue = v.queues[0]
        v.take_interrupts()
        for flags, interrupts in ((0xFFFF, 0), (0xFFFE, 1)):
            queue.set_avail_flags(flags)
            v.submit(RequestType.IN, 0, data_in=512)
            target = queue.used_idx + 1
            v.kick(force=True)
            until(lambda: queue.used_idx == target)  # noqa: B023
            served.settle()
            assert v.take_interrupts() == interrupts


# Interrupts.


@on_both_engines
@pytest.mark.parametrize("mode", Interrupts, ids=lambda mode: mode.name)
@pytest.mark.parametrize("window", [False, True], ids=["bar", "window"])
@pytest.mark.parametrize("posted", [False, True], ids=["sync", "posted"])
def test_a_whole_driver_in_every_way(serve: Serve, mode: Interrupts, window: bool, posted: bool) -> None:
    """Init, I/O, config change and reset with each interrupt mode, directly and through PCI_CFG (PCI-097, 101)."""
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path, interrupts=mode, window=window, posted=posted) as v:
        exercise(v)
        disk.grow(4096)
        if mode is Interrupts.POLL:
            until(lambda: v.capacity == 4096)
        else:
            v.wait_config_change()
        assert v.capacity == 4096
        v.write(4095, bytes(512))
        v.reset()
        assert v.status == 0
        v.init()
        exercise(v)
        assert v.get_id() == "own-serial"


@on_both_engines
def test_msix_vectors_go_where_they_are_told(serve: Serve) -> None:
    """The queue's vector and the config vector are signalled apart; NO_VECTOR silences (PCI-102, 108 to 111).

    And NOTE-001 and 002.
    """
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path) as v:
        queue_line, config_line = v.lines.queue_line(0), v.lines.config_line
        exercise(v)
        v.lines.take(queue_line)
        disk.grow(2056)
        until(lambda: v.lines.take(config_line) == 1)
        assert v.lines.take(queue_line) == 0
        # swap them while the queue is live
        v.device.set(CommonCfg.QUEUE_SELECT, 0)
        v.device.set(CommonCfg.QUEUE_MSIX_VECTOR, v.lines.config_vector)
        v.device.set(CommonCfg.CONFIG_MSIX_VECTOR, NO_VECTOR)
        assert v.device.get(CommonCfg.CONFIG_MSIX_VECTOR) == NO_VECTOR
        v.queues[0].arm()
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        until(lambda: v.poll() == 1)
        until(lambda: v.lines.take(config_line) >= 1)
        assert v.lines.take(queue_line) == 0
        disk.grow(2064)
        until(lambda: v.capacity == 2064)
        assert v.lines.take(config_line) == v.lines.take(queue_line) == 0
        # a vector that does not exist
        v.device.set(CommonCfg.QUEUE_MSIX_VECTOR, 2)
        assert v.device.get(CommonCfg.QUEUE_MSIX_VECTOR) == NO_VECTOR


@on_both_engines
def test_intx_is_a_level(serve: Serve) -> None:
    """The ISR byte tells why and is cleared by reading; an unmask raises INTx again if set (PCI-076 to 080).

    And PCI-113.
    """
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path, interrupts=Interrupts.INTX) as v:
        line = v.lines.queue_line(0)
        assert line is not None
        v.queues[0].arm()
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        until(lambda: v.lines.take(line))
        assert v.pci.config_field(0x06, 2) & 8  # Interrupt Status
        for _ in range(3):  # the handler did not find the cause
            v.connection.unmask_irqs(IrqIndex.INTX)
            assert v.lines.take(line) == 1
        disk.grow(2056)
        until(lambda: v.lines.take(line))
        assert v.pci.isr.read(0, 1) == IsrStatus.QUEUE | IsrStatus.CONFIG
        assert v.pci.isr.read(0, 1) == 0
        assert not v.pci.config_field(0x06, 2) & 8
        v.connection.unmask_irqs(IrqIndex.INTX)
        assert v.lines.take(line) == 0


@on_both_engines
def test_interrupt_disable_holds_intx_back(serve: Serve) -> None:
    """With Interrupt Disable in the command register INTx waits, and comes when that is cleared (PCI-078)."""
    with attach(serve().path, interrupts=Interrupts.INTX) as v:
        line = v.lines.queue_line(0)
        command = v.pci.config_field(COMMAND, 2)
        v.pci.config_write(COMMAND, struct.pack("<H", command | 0x400))
        v.queues[0].arm()
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        until(lambda: v.poll() == 1)
        until(lambda: v.pci.config_field(0x06, 2) & 8)
        assert v.lines.take(line) == 0
        v.pci.config_write(COMMAND, struct.pack("<H", command))
        assert v.lines.take(line) == 1


@on_both_engines
def test_msix_enable_chooses_between_vectors_and_intx(serve: Serve) -> None:
    """Bit 15 of message control is looked at for each interrupt, not once (PCI-108, 112)."""
    with attach(serve().path) as v:
        line = v.lines.queue_line(0)
        exercise(v)
        v.lines.take(line)
        assert v.pci.isr.read(0, 1) == 0
        v.pci.enable_msix(False)  # noqa: FBT003
        v.queues[0].arm()
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        until(lambda: v.poll() == 1)
        until(lambda: v.pci.isr.read(0, 1) == IsrStatus.QUEUE)
        v.pci.enable_msix(True)  # noqa: FBT003
        exercise(v)


@on_both_engines
def test_a_disk_that_grows_tells_the_driver(serve: Serve) -> None:
    """New capacity, new generation, a config interrupt; the new sectors are served (BLK-063, 064, PCI-034)."""
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path) as v:
        assert v.capacity == 2048
        generation = v.device.get(CommonCfg.CONFIG_GENERATION)
        with pytest.raises(StatusError):
            v.read(2048, 512)
        disk.grow(2049)
        v.wait_config_change()
        assert v.capacity == 2049
        assert v.device.get(CommonCfg.CONFIG_GENERATION) != generation
        assert v.read(2048, 512) == bytes(512)
        with pytest.raises(StatusError):
            v.read(2049, 512)
        v.write_zeroes([(2048, 1)])
        v.reset()
        v.init()
        assert v.capacity == 2049  # a reset does not shrink it


@on_both_engines
def test_growth_before_driver_ok_is_told_then(serve: Serve) -> None:
    """A disk that grows between a driver's look at the capacity and DRIVER_OK: the interrupt follows (NOTE-003)."""
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path) as v:
        v.reset()
        disk.grow(4096)
        until(lambda: v.device.get(CommonCfg.DEVICE_STATUS) == 0)
        v.lines.take(v.lines.config_line)
        v.init()
        if v.lines.take(v.lines.config_line) == 0:
            assert v.capacity == 4096
        assert v.capacity == 4096


# Doorbells.


def settled(served: Served, v: VirtioBlk) -> None:
    """The device is live, and the look that a queue gets when it starts has been taken."""
    v.device.get(CommonCfg.DEVICE_STATUS)
    served.settle()


def silent(served: Served, v: VirtioBlk) -> None:
    """The transport and the worker have seen everything, and no request reached the disk."""
    v.device.get(CommonCfg.DEVICE_STATUS)
    served.settle()
    assert not [call for call in served.disk.calls if call[0] != "flush"]


@on_both_engines
def test_a_doorbell_before_driver_ok_consumes_nothing(serve: Serve) -> None:
    """An enabled, filled queue is left alone until DRIVER_OK, then served without another doorbell (HOSTILE-083).

    And STAT-004.
    """
    served = serve()
    with attach(served.path, start=False) as v:
        device = v.device
        device.reset()
        v.pci.enable()
        v.lines.install(v.pci)
        device.status = DeviceStatus.ACKNOWLEDGE
        device.status = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER
        v.features = device.features & SUPPORTED
        assert device.accept(v.features)
        v.queues.append(v._start_queue(0))
        v._doorbells.append((device.notify_offset(0), 0))
        pending = v.submit(RequestType.IN, 0, data_in=512)
        for _ in range(10):
            v.kick(force=True)
        silent(served, v)
        assert v.queues[0].used_idx == 0
        assert v.take_interrupts() == 0
        device.status |= DeviceStatus.DRIVER_OK
        assert v.wait(pending).status == Status.OK


@on_both_engines
@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("value", [0, 1, 0xFF])
def test_a_doorbell_of_any_width_and_value_is_a_kick(serve: Serve, width: int, value: int) -> None:
    """The address names the queue; width and value do not matter (HOSTILE-084 to 086, NOTE-004)."""
    with attach(serve().path) as v:
        pending = v.submit(RequestType.IN, 0, data_in=512)
        v.queues[0].publish()
        v.pci.notify.write(0, width, value)
        assert v.wait(pending).status == Status.OK


@on_both_engines
def test_doorbells_that_name_no_queue_are_ignored(serve: Serve) -> None:
    """Slots beyond the last queue, and odd places next to them, do nothing (HOSTILE-082)."""
    served = serve()
    with attach(served.path) as v:
        settled(served, v)
        v.submit(RequestType.IN, 0, data_in=512)
        v.queues[0].publish()
        for offset in (4, 6, 8, 0x100, 0xFFE, 0xFFC):
            v.pci.notify.write(offset, 2, 0)
        silent(served, v)
        v.ring_doorbell()
        until(lambda: v.poll() == 1)


@on_both_engines
def test_a_doorbell_for_a_queue_that_is_not_enabled_is_ignored(serve: Serve) -> None:
    """DRIVER_OK with no queue, or after a reset: a doorbell touches nothing (HOSTILE-081, 091, 109).

    And STAT-011, PCI-046.
    """
    served = serve()
    with attach(served.path) as v:
        settled(served, v)
        v.submit(RequestType.IN, 0, data_in=512)
        v.queues[0].publish()
        # the ring stays where it was, and is no longer the device's
        v.device.reset()
        v.ring_doorbell()
        silent(served, v)
        for bits in (1, 3):
            v.device.status = DeviceStatus(bits)
        assert v.device.accept(SUPPORTED)
        v.device.status |= DeviceStatus.DRIVER_OK
        v.ring_doorbell()
        silent(served, v)
        assert v.queues[0].used_idx == 0
        assert v.take_interrupts() == 0


@on_both_engines
def test_a_doorbell_reads_as_zero(serve: Serve) -> None:
    """Reading the doorbell region has no effect (HOSTILE-090)."""
    served = serve()
    with attach(served.path) as v:
        settled(served, v)
        v.submit(RequestType.IN, 0, data_in=512)
        v.queues[0].publish()
        assert [v.pci.notify.read(0, width) for width in (1, 2, 4, 8)] == [0] * 4
        silent(served, v)


@on_both_engines
def test_a_doorbell_storm(serve: Serve, logs: Logs) -> None:
    """Ten thousand doorbells without a buffer: registers and requests are answered, nothing is logged (HOSTILE-089)."""
    served = serve()
    with attach(served.path) as v:
        exercise(v)
        for _ in range(10):
            for _ in range(1000):
                v.ring_doorbell()
            exercise(v)
        assert DeviceStatus.NEEDS_RESET not in v.status
    assert len(logs.records) < 5


@on_both_engines
def test_bus_master_off_stops_the_device(serve: Serve) -> None:
    """Without Bus Master Enable no memory is touched; with it, the waiting request is served (HOSTILE-134)."""
    served = serve()
    with attach(served.path) as v:
        command = v.pci.config_field(COMMAND, 2)
        v.pci.config_write(COMMAND, struct.pack("<H", command & ~4))
        pending = v.submit(RequestType.IN, 0, data_in=512)
        v.kick(force=True)
        silent(served, v)
        assert v.queues[0].used_idx == 0
        v.pci.config_write(COMMAND, struct.pack("<H", command))
        assert v.wait(pending).status == Status.OK


# Corrupt rings.


def jump(v: VirtioBlk) -> None:
    """The avail index leaps past the ring."""
    v.queues[0].avail_idx = v.queues[0].avail_idx + v.queues[0].size + 1


def backwards(v: VirtioBlk) -> None:
    """The avail index goes back."""
    v.queues[0].avail_idx = v.queues[0].avail_idx - 1


def bad_head(v: VirtioBlk) -> None:
    """A head that is no descriptor."""
    v.queues[0].offer(v.queues[0].size)
    v.queues[0].publish()


def bad_next(v: VirtioBlk) -> None:
    """A next that is no descriptor."""
    v.submit_raw([Descriptor(4096, 16, NEXT, 0xFFFF)])
    v.queues[0].publish()


def self_loop(v: VirtioBlk) -> None:
    """A descriptor that follows itself."""
    (slot,) = v.queues[0].reserve(1)
    v.queues[0].write_descriptor(slot, Descriptor(4096, 16, NEXT, slot))
    v.queues[0].offer(slot)
    v.queues[0].publish()


def readable_after_writable(v: VirtioBlk) -> None:
    """The wrong order."""
    v.submit_raw([Descriptor(4096, 16, NEXT | WRITE), Descriptor(4096, 16)])
    v.queues[0].publish()


def empty_table(v: VirtioBlk) -> None:
    """An indirect table of no entries."""
    v.submit_raw([Descriptor(4096, 0, INDIRECT)])
    v.queues[0].publish()


def ragged_table(v: VirtioBlk) -> None:
    """An indirect table of one and a bit."""
    v.submit_raw([Descriptor(4096, 17, INDIRECT)])
    v.queues[0].publish()


def table_outside(v: VirtioBlk) -> None:
    """An indirect table that is no memory."""
    v.submit_raw([Descriptor(1 << 50, 32, INDIRECT)])
    v.queues[0].publish()


def table_with_next(v: VirtioBlk) -> None:
    """INDIRECT and NEXT together."""
    v.submit_raw([Descriptor(4096, 32, INDIRECT | NEXT), Descriptor(4096, 1, WRITE)])
    v.queues[0].publish()


def table_in_table(v: VirtioBlk) -> None:
    """A table in a table."""
    table = v.memory.alloc(4096)
    v.memory.write(table, struct.pack("<QIHH", table, 16, INDIRECT, 0))
    v.submit_raw([Descriptor(table, 16, INDIRECT)])
    v.queues[0].publish()


def endless_table(v: VirtioBlk) -> None:
    """Two entries that follow each other."""
    table = v.memory.alloc(4096)
    v.memory.write(table, struct.pack("<QIHH", table, 16, NEXT, 1) + struct.pack("<QIHH", table, 16, NEXT, 0))
    v.submit_raw([Descriptor(table, 32, INDIRECT)])
    v.queues[0].publish()


CORRUPTIONS = [
    jump,
    backwards,
    bad_head,
    bad_next,
    self_loop,
    readable_after_writable,
    empty_table,
    ragged_table,
    table_outside,
    table_with_next,
    table_in_table,
    endless_table,
]


@on_both_engines
@pytest.mark.parametrize("corrupt", CORRUPTIONS, ids=lambda corrupt: corrupt.__name__)
@pytest.mark.parametrize("mode", [Interrupts.MSIX, Interrupts.INTX], ids=lambda mode: mode.name)
def test_a_corrupt_ring_needs_a_reset(serve: Serve, corrupt: Callable[[VirtioBlk], None], mode: Interrupts) -> None:
    """NEEDS_RESET and a config interrupt, no queue served until the reset, full service after it (STAT-006 to 008)."""
    served = serve()
    with attach(served.path, interrupts=mode) as v:
        exercise(v)
        reads = served.disk.count("read")
        corrupt(v)
        v.ring_doorbell()
        v.wait_config_change()
        assert DeviceStatus.NEEDS_RESET in v.status
        used = v.queues[0].used_idx
        for _ in range(3):  # a driver that goes on all the same (HOSTILE-092, 110)
            v.ring_doorbell()
        v.device.status |= DeviceStatus.DRIVER_OK
        v.device.get(CommonCfg.DEVICE_STATUS)
        served.settle()
        assert (served.disk.count("read"), v.queues[0].used_idx) == (reads, used)
        v.init()
        exercise(v)


@on_both_engines
def test_good_chains_before_the_fault_are_served(serve: Serve) -> None:
    """What was popped whole reaches the disk, though the driver may not be told any more."""
    served = serve()
    with attach(served.path) as v:
        v.submit(RequestType.OUT, 5, b"g" * 512)
        bad_head(v)
        v.ring_doorbell()
        v.wait_needs_reset()
        until(lambda: served.disk.data[5 * 512 : 6 * 512] == b"g" * 512)


@on_both_engines
def test_an_indirect_chain_without_the_feature_is_corrupt(serve: Serve) -> None:
    """The table is not followed (HOSTILE-013)."""
    with attach(serve().path, features=SUPPORTED & ~Feature.INDIRECT_DESC.mask) as v:
        v.submit_raw([Descriptor(4096, 16, INDIRECT)])
        v.kick()
        v.wait_needs_reset()


@on_both_engines
def test_corrupting_for_ever_cannot_flood_the_log(serve: Serve, logs: Logs) -> None:
    """A guest that breaks its ring and resets a hundred times is served each time, and leaves a few lines."""
    served = serve()
    with attach(served.path) as v:
        for _ in range(100):
            bad_head(v)
            v.ring_doorbell()
            v.wait_needs_reset()
            v.init()
        exercise(v)
    assert len(logs.records) < 30
    assert logs.matching("corrupt")


@on_both_engines
@pytest.mark.parametrize(
    ("desc", "avail", "used"),
    [(0, 1, 1), (1 << 50, 1, 1), (1, 1 << 50, 1), (1, 1, (1 << 64) - 4096), ((1 << 64) - 16, 1, 1), (1, 1, 0)],
)
def test_a_ring_outside_guest_memory_needs_a_reset(serve: Serve, desc: int, avail: int, used: int) -> None:
    """A ring at no address, at an address that is no memory, or round the end: NEEDS_RESET (HOSTILE-041, 042, 069)."""
    with attach(serve().path, start=False) as v:
        v.device.reset()
        v.pci.enable()
        for bits in (1, 3):
            v.device.status = DeviceStatus(bits)
        assert v.device.accept(SUPPORTED)
        block = v.memory.alloc(64 << 10)
        v.device.select_queue(0)
        for register, where in (
            (CommonCfg.QUEUE_DESC, desc),
            (CommonCfg.QUEUE_DRIVER, avail),
            (CommonCfg.QUEUE_DEVICE, used),
        ):
            v.device.set(register, block + 16384 * (register >> 3 & 3) if where == 1 else where)
        v.device.set(CommonCfg.QUEUE_ENABLE, 1)
        v.device.status |= DeviceStatus.DRIVER_OK
        assert DeviceStatus.NEEDS_RESET in v.status
        v.init()
        exercise(v)


@on_both_engines
def test_areas_on_top_of_each_other_hurt_nobody(serve: Serve) -> None:
    """Overlapping ring areas: whatever it means, the server lives and serves after a reset (HOSTILE-043, 047)."""
    with attach(serve().path) as v:
        block = v.memory.alloc(64 << 10)
        v.reset()
        for bits in (1, 3):
            v.device.status = DeviceStatus(bits)
        assert v.device.accept(SUPPORTED)
        v.device.select_queue(0)
        for register in (CommonCfg.QUEUE_DESC, CommonCfg.QUEUE_DRIVER, CommonCfg.QUEUE_DEVICE):
            v.device.set(register, block)
        v.device.set(CommonCfg.QUEUE_ENABLE, 1)
        v.device.status |= DeviceStatus.DRIVER_OK
        v.memory.write(block, struct.pack("<QIHH", block, 4096, WRITE, 0) + bytes(4096))
        v.pci.notify.write(0, 2, 0)
        v.init()
        exercise(v)


@on_both_engines
@pytest.mark.parametrize("area", ["desc", "used"])
def test_data_over_the_ring_is_only_the_guests_loss(serve: Serve, area: str) -> None:
    """A read into the descriptor table or the used ring: the device works from its own state (HOSTILE-036, 047)."""
    served = serve()
    served.disk.data[:] = b"\xff" * len(served.disk.data)
    with attach(served.path) as v:
        block = v.memory.alloc(4096)
        v.memory.write(block, REQUEST_HEADER.pack(RequestType.IN, 0, 0) + bytes(48) + b"\xff")
        where = getattr(v.queues[0], area)
        v.submit_raw(
            [Descriptor(block, 16, NEXT), Descriptor(where, 512, NEXT | WRITE), Descriptor(block + 64, 1, WRITE)]
        )
        v.kick()
        until(lambda: v.memory.read(block + 64, 1) == bytes([Status.OK]))
        assert v.memory.read(where + 64, 448) == b"\xff" * 448  # the used element may lie in what comes before
        v.ring_doorbell()
        served.disk.data[:] = bytes(len(served.disk.data))
        v.init()
        exercise(v)


@on_both_engines
@pytest.mark.parametrize(
    ("address", "length", "why"),
    [
        (1 << 50, 512, "outside"),
        ((64 << 20) - 512, 1024, "past the end"),
        ((1 << 64) - 512, 512, "at the very end"),
        ((1 << 64) - 512, 1024, "round the end"),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
def test_data_outside_guest_memory_is_an_error(serve: Serve, address: int, length: int, why: str) -> None:
    """Only that request fails: IOERR, no disk access, the ring goes on (HOSTILE-020 to 022)."""
    served = serve()
    with attach(served.path) as v:
        block = v.memory.alloc(4096)
        for kind, flags in ((RequestType.IN, NEXT | WRITE), (RequestType.OUT, NEXT)):
            v.memory.write(block, REQUEST_HEADER.pack(kind, 0, 0) + bytes(48) + b"\xff")
            pending = v.submit_raw(
                [Descriptor(block, 16, NEXT), Descriptor(address, length, flags), Descriptor(block + 64, 1, WRITE)]
            )
            v.kick()
            v.wait(pending)
            assert v.memory.read(block + 64, 1) == bytes([Status.IOERR])
        assert not served.disk.calls
        exercise(v)


# Resets.


@on_both_engines
@pytest.mark.parametrize("how", ["status", "device"])
@pytest.mark.parametrize("stage", range(8))
def test_a_reset_at_every_stage_of_init(serve: Serve, how: str, stage: int) -> None:
    """However far a driver got, a reset (twice) takes everything back, and a full init works (RST-005, 006)."""
    served = serve()
    with attach(served.path, start=False) as v:
        device = v.device
        steps: list[Callable[[], Any]] = [
            device.reset,
            lambda: setattr(device, "status", DeviceStatus(1)),
            lambda: setattr(device, "status", DeviceStatus(3)),
            lambda: device.accept(SUPPORTED),
            lambda: device.set_config_vector(0),
            lambda: device.select_queue(0),
            lambda: device.set(CommonCfg.QUEUE_DESC, 0x10000),
        ]
        v.pci.enable()
        v.lines.install(v.pci)
        for step in steps[:stage]:
            step()
        for _ in range(2):
            if how == "status":
                device.reset()
            else:
                v.connection.device_reset()
        assert device.status == 0
        device.select_queue(0)
        assert device.get(CommonCfg.QUEUE_ENABLE) == 0
        assert device.get(CommonCfg.QUEUE_DESC) == 0
        assert device.get(CommonCfg.CONFIG_MSIX_VECTOR) == NO_VECTOR
        v.init()
        exercise(v)


@on_both_engines
def test_device_reset_takes_the_function_back(serve: Serve) -> None:
    """DEVICE_RESET, twice, on a live device: status 0, command and MSI-X cleared; init works (HOSTILE-136)."""
    served = serve()
    with attach(served.path) as v:
        for _ in range(5):
            exercise(v)
            v.connection.disable_irqs(IrqIndex.MSIX)
            v.connection.device_reset()
            v.connection.device_reset()
            assert v.device.status == 0
            assert v.pci.config_field(COMMAND, 2) == 0
            assert v.pci.msix is not None
            assert not v.pci.config_field(v.pci.msix.position + 2, 2) & 0x8000
            v.forget()
            v.init()
            exercise(v)


def test_nothing_happens_after_status_reads_zero(serve: Serve) -> None:
    """Two dozen requests in flight at a reset: none of them is written back or notifies (RST-002, 003, HOSTILE-107)."""
    disk = Disk()
    served = serve(disk)
    with attach(served.path) as v:
        queue = v.queues[0]
        v.take_interrupts()
        disk.held.add("read")
        for _ in range(24):
            v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read", 24)
        v.device.status = DeviceStatus(0)
        assert v.device.status != 0
        disk.release()
        until(lambda: v.device.status == 0)
        used, interrupts = queue.used_idx, v.take_interrupts()
        served.settle()
        assert (queue.used_idx, v.take_interrupts()) == (used, 0)
        assert interrupts <= 24
        v.forget()
        v.init()
        exercise(v)


def test_register_writes_during_a_reset_are_ignored(serve: Serve) -> None:
    """While a reset drains, no write makes a half-reset device; afterwards all is as at first (HOSTILE-106, 108)."""
    disk = Disk()
    served = serve(disk)
    with attach(served.path) as v:
        disk.held.add("read")
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read")
        for _ in range(3):
            v.device.status = DeviceStatus(0)
        v.device.status = DeviceStatus(15)
        v.device.set(CommonCfg.QUEUE_ENABLE, 1)
        v.ring_doorbell()
        assert v.device.status != 0
        disk.release()
        until(lambda: v.device.status == 0)
        v.forget()
        v.init()
        exercise(v)


# PCI, as the transport shows it.


def test_identity_and_capabilities(serve: Serve) -> None:
    """IDs, class, capabilities inside BAR 4, MSI-X with two vectors (PCI-001 to 006, 013 to 018, 058 to 060).

    And PCI-062 to 065, 092.
    """
    with attach(serve().path) as v:
        space = v.pci.config_read(0, 256)
        assert space[:4] == bytes.fromhex("f41a4210")
        assert space[8] >= 1
        assert space[0x0B] == 1  # mass storage
        assert int.from_bytes(space[0x2E:0x30], "little") >= 0x40
        types = [each.cfg_type for each in v.pci.virtio_capabilities]
        assert sorted(types) == [1, 2, 3, 4, 5]
        for each in v.pci.virtio_capabilities:
            if each.cfg_type != PciCapType.PCI_CFG:
                assert each.bar == 4
                assert each.offset + each.length <= v.connection.region_info(each.bar).size
        assert v.pci.notify_off_multiplier in (2, 4, 8)
        assert v.pci.msix is not None
        assert v.pci.msix.table_size == 2 == v.connection.irq_info(IrqIndex.MSIX).vectors
        assert v.connection.irq_info(IrqIndex.INTX).vectors == 1
        assert space[0x20] & 0xF == 0xC  # BAR 4: 64 bit, prefetchable
        assert v.connection.region_info(Region.CONFIG).size == 256


def test_bars_can_be_sized(serve: Serve) -> None:
    """Ones written to a BAR read back as its size, also through a 64-bit pair; and config space is writable again.

    HOSTILE-135: a BAR that moves under a live device changes nothing, for messages name regions.
    """
    with attach(serve().path) as v:
        for bar, size in ((1, 4096), (2, 4096)):
            v.pci.config_write(0x10 + 4 * bar, b"\xff" * 4)
            assert v.pci.config_field(0x10 + 4 * bar, 4) == (1 << 32) - size
        for offset in (0x20, 0x24):
            v.pci.config_write(offset, b"\xff" * 4)
        assert v.pci.config_field(0x20, 4) & ~0xF == (1 << 32) - v.connection.region_info(4).size
        assert v.pci.config_field(0x24, 4) == 0xFFFFFFFF
        v.pci.config_write(0x20, struct.pack("<Q", 0xC0_0000_4000))
        assert v.pci.config_field(0x20, 4) == 0x0000400C
        exercise(v)


def test_reading_all_of_config_space_has_no_side_effect(serve: Serve) -> None:
    """A VMM's bulk read does not go through the window: the ISR stays as it is."""
    with attach(serve().path, interrupts=Interrupts.INTX) as v:
        position = next(c.position for c in v.pci.virtio_capabilities if c.cfg_type == PciCapType.PCI_CFG)
        isr = next(c for c in v.pci.virtio_capabilities if c.cfg_type == PciCapType.ISR_CFG)
        v.pci.config_write(position + 4, bytes([isr.bar]))
        v.pci.config_write(position + 8, struct.pack("<II", isr.offset, 1))
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        until(lambda: v.poll() == 1)
        until(lambda: v.pci.config_field(6, 2) & 8)
        v.pci.config_read(0, 256)
        v.pci.config_read(position, 20)
        assert v.pci.config_field(6, 2) & 8
        assert v.pci.config_read(position + 16, 1) == b"\x01"  # this does, and clears it
        assert not v.pci.config_field(6, 2) & 8


@pytest.mark.parametrize("length", [0, 3, 5, 8, 0xFFFFFFFF])
@pytest.mark.parametrize("bar", [4, 0, 5, 6, 255])
def test_a_window_set_up_wrongly_does_nothing(serve: Serve, length: int, bar: int) -> None:
    """Lengths, BARs and offsets that make no sense: no access, and the device goes on (HOSTILE-126 to 129)."""
    with attach(serve().path) as v:
        position = next(c.position for c in v.pci.virtio_capabilities if c.cfg_type == PciCapType.PCI_CFG)
        for offset in (0x14, 0x15, 0x3FFF, 0x4000, 0xFFFFFFFC):
            v.pci.config_write(position + 4, bytes([bar]))
            v.pci.config_write(position + 8, struct.pack("<II", offset, length))
            v.pci.config_read(position + 16, 4)
            v.pci.config_write(position + 16, bytes(4))
        assert v.status & DeviceStatus.DRIVER_OK
        exercise(v)


def test_odd_register_accesses(serve: Serve) -> None:
    """Any width and place in every region gives an answer, and the device goes on (HOSTILE-112 to 115, 124, 133)."""
    served = serve()
    with attach(served.path) as v:
        c = v.connection
        for region in (1, 2, 4):
            size = c.region_info(region).size
            for length in (1, 3, 4, 7, 8, 9, 64, 96, 4096):
                for offset in (0, 1, 0x13, 0xFFF, 0x1001, 0x205F, 0x2FFF, size - length):
                    if 0 <= offset <= size - length:
                        assert len(c.region_read(region, offset, length)) == length
        c.region_write(2, 0, b"\xff" * 8)
        assert c.region_read(2, 0, 8) == bytes(8)
        c.region_write(4, 0x2000, b"\xff" * 8)  # capacity
        c.region_write(4, 0x1000, b"\xff")  # ISR
        c.region_write(4, 0x1800, b"\xff" * 2048)  # nothing at all, up to the device configuration
        assert v.capacity == 2048
        assert c.region_read(4, 0x2000, 8) == struct.pack("<Q", 2048)  # one 8-byte access
        exercise(v)


def test_a_driver_that_looks_at_nothing_but_bar_4(serve: Serve, tmp_path: Path) -> None:
    """The layout that some initiators know by heart: common, ISR, device, notify, a page each."""
    with attach(serve().path) as v:
        places = {each.cfg_type: (each.bar, each.offset) for each in v.pci.virtio_capabilities if each.cfg_type != 5}
    assert places == {1: (4, 0), 3: (4, 0x1000), 4: (4, 0x2000), 2: (4, 0x3000)}


@on_both_engines
def test_a_ring_that_is_filled_without_a_doorbell_after_enable(serve: Serve) -> None:
    """Buffers queued before DRIVER_OK are found without any doorbell (STAT-005)."""
    served = serve()
    with GuestMemory() as memory, Connection(served.path) as connection:
        memory.map_all(connection)
        v = VirtioBlk(connection, memory, start=False)
        v.init()
        v.device.reset_queue(0)
        queue = v.queues[0] = v._start_queue(0)
        pending = v.submit(RequestType.IN, 0, data_in=512)
        queue.publish()
        v.device.set(CommonCfg.QUEUE_SELECT, 0)
        v.ring_doorbell()
        v.wait(pending)
        v.close()


@on_both_engines
def test_queue_enable_after_driver_ok(serve: Serve) -> None:
    """A queue that is enabled on a live device is served (HOSTILE-071); a second enable is ignored (HOSTILE-068)."""
    with attach(serve().path) as v:
        v.reset_queue(0)  # which enables it with DRIVER_OK set
        exercise(v)
        v.device.set(CommonCfg.QUEUE_ENABLE, 1)
        v.device.set(CommonCfg.QUEUE_ENABLE, 0)
        v.device.set(CommonCfg.QUEUE_SIZE, 4)
        v.device.set(CommonCfg.QUEUE_DESC, 0)
        exercise(v)


def test_config_of_the_block_device(serve: Serve) -> None:
    """Every field of the configuration, as the disk is (BLK-004 to 015, 033, 034)."""
    with attach(serve(FullDisk(512, sector_size=4096), queue_size=64).path) as v:
        raw = v.device.config_bytes(0, 96)
        assert v.config(BlkConfig.CAPACITY) == 4096
        assert v.config(BlkConfig.BLK_SIZE) == 4096
        assert v.config(BlkConfig.SEG_MAX) == 62
        assert v.config(BlkConfig.DISCARD_SECTOR_ALIGNMENT) == 8
        assert v.config(BlkConfig.WRITE_ZEROES_MAY_UNMAP) == 1
        assert raw[33] == 0
        assert raw[57:60] == bytes(3)
        assert raw[60:] == bytes(36)  # no secure erase, no zones


@on_both_engines
def test_needs_reset_wakes_who_waits(serve: Serve) -> None:
    """A driver that waits for a request learns that the device gave up."""
    with attach(serve().path) as v:
        pending = v.submit(RequestType.IN, 0, data_in=512)
        jump(v)
        v.ring_doorbell()
        with pytest.raises(NeedsReset):
            v.wait(pending)
