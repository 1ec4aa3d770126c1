"""Queues of the virtio state machine: set-up, reset, vectors, accesses of any width, and any driver at all."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registers import LIVE, STAGES, VERSION_1, WIDTHS, Driver, started

from vmmblk.device import (
    ConfigInterrupt,
    ConfigVectorChanged,
    Effect,
    Notify,
    QueueVectorChanged,
    Reset,
    ResetQueue,
    StartQueue,
    StopQueues,
)
from vmmblk.spec import NO_VECTOR, BlkConfig, CommonCfg, DeviceStatus, Feature

# --- queues ---------------------------------------------------------------------------------------------------------


def test_enabled_queues_start_at_driver_ok() -> None:
    """STAT-003, STAT-010, HOSTILE-083: none before, all of them then, each with its own settings."""
    driver = Driver()
    driver.negotiate()
    for index, size in ((0, 64), (2, 128)):
        driver.set_up_queue(index, size)
        assert driver.enable() == []
        assert driver.device.doorbell(index) == []
    assert driver.write_status(LIVE) == [started(0), started(2, size=128, vector=2)]
    assert [driver.device.doorbell(index) for index in range(4)] == [[Notify(0)], [], [Notify(2)], []]


def test_a_queue_enabled_on_a_live_device_starts_at_once() -> None:
    """HOSTILE-071: a so far unused queue may be enabled late."""
    driver = Driver()
    driver.go_live()
    driver.set_up_queue(1)
    assert driver.device.doorbell(1) == []
    assert driver.enable() == [started(1, vector=1)]
    assert driver.device.doorbell(1) == [Notify(1)]


def test_ring_features_follow_negotiation() -> None:
    """RING-INDIRECT-012, RSVD-015: indirect tables and the event index are on only when negotiated."""
    driver = Driver()
    (effect,) = driver.go_live(VERSION_1 | Feature.INDIRECT_DESC.mask)
    assert isinstance(effect, StartQueue)
    assert (effect.queue.indirect, effect.queue.event_idx, effect.queue.packed) == (True, False, False)


def test_each_queue_keeps_its_own_registers() -> None:
    """PCI-033, PCI-044, PCI-053: fields of the selected queue read back; notify_off is the index."""
    driver = Driver()
    for index in range(3):
        driver.set_up_queue(index, 32 << index)
    assert driver.read(CommonCfg.NUM_QUEUES) == 3
    for index in range(3):
        driver.write(CommonCfg.QUEUE_SELECT, index)
        assert driver.read(CommonCfg.QUEUE_SIZE) == 32 << index
        assert driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == index
        assert driver.read(CommonCfg.QUEUE_NOTIFY_OFF) == index
        assert driver.read(CommonCfg.QUEUE_DESC) == 0x1_0000_1000


@pytest.mark.parametrize("index", [3, 4, 0x7FFF, 0xFFFF])
def test_a_queue_that_does_not_exist_is_inert(index: int) -> None:
    """PCI-041, PCI-052, HOSTILE-072, HOSTILE-073: queue_size reads 0, writes reach no queue."""
    driver = Driver()
    driver.negotiate()
    driver.set_up_queue(index)
    assert driver.enable() == []
    assert driver.write(CommonCfg.QUEUE_RESET, 1) == []
    assert driver.read(CommonCfg.QUEUE_SELECT) == index
    assert driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == NO_VECTOR
    inert = (CommonCfg.QUEUE_SIZE, CommonCfg.QUEUE_ENABLE, CommonCfg.QUEUE_RESET, CommonCfg.QUEUE_DESC)
    assert [driver.read(register) for register in inert] == [0, 0, 0, 0]
    for real in range(3):
        driver.write(CommonCfg.QUEUE_SELECT, real)
        assert driver.read(CommonCfg.QUEUE_SIZE) == 256
        assert driver.read(CommonCfg.QUEUE_DESC) == 0


@pytest.mark.parametrize("size", [0, 3, 100, 255, 257, 512, 0x8000, 0xFFFF])
def test_impossible_queue_sizes_are_ignored(size: int) -> None:
    """HOSTILE-062..064, PCI-042: 0, no power of two or above the maximum leaves the size as it was."""
    driver = Driver()
    driver.write(CommonCfg.QUEUE_SIZE, 64)
    driver.write(CommonCfg.QUEUE_SIZE, size)
    assert driver.read(CommonCfg.QUEUE_SIZE) == 64


@pytest.mark.parametrize(("size", "reads"), [(1, 1), (7, 7), (255, 255), (256, 256), (0, 64), (257, 64), (0x8000, 64)])
def test_a_packed_queue_may_have_any_size(size: int, reads: int) -> None:
    """RING-PACKED-002, HOSTILE-063, -064: with RING_PACKED any size up to the maximum reads back, 0 and more do not."""
    driver = Driver()
    driver.negotiate()
    driver.write(CommonCfg.QUEUE_SIZE, 64)
    driver.write(CommonCfg.QUEUE_SIZE, size)
    assert driver.read(CommonCfg.QUEUE_SIZE) == reads


def test_an_odd_size_needs_packed_rings_to_be_negotiated() -> None:
    """PCI-042, HOSTILE-062: before FEATURES_OK, and without RING_PACKED, a queue has a power of two of descriptors."""
    driver = Driver()
    driver.write(CommonCfg.QUEUE_SIZE, 7)
    assert driver.read(CommonCfg.QUEUE_SIZE) == 256
    driver.negotiate(driver.device.config.features & ~Feature.RING_PACKED.mask)
    driver.write(CommonCfg.QUEUE_SIZE, 7)
    assert driver.read(CommonCfg.QUEUE_SIZE) == 256


@pytest.mark.parametrize(("packed", "starts"), [(False, True), (True, False)])
def test_an_event_structure_needs_more_alignment_than_an_available_ring(packed: bool, starts: bool) -> None:
    """HOSTILE-060, RING-PACKED-001: a driver area at an address divisible by 2 only starts a split queue only."""
    driver = Driver()
    features = driver.device.config.features
    driver.negotiate(features if packed else features & ~Feature.RING_PACKED.mask)
    driver.set_up_queue()
    driver.write(CommonCfg.QUEUE_DRIVER, 0x2002)
    driver.enable()
    assert any(isinstance(effect, StartQueue) for effect in driver.write_status(LIVE)) == starts


@pytest.mark.parametrize("size", [1, 2, 64, 256])
def test_a_queue_can_be_made_smaller(size: int) -> None:
    """PCI-043: the size starts at the maximum, and a smaller power of two reads back."""
    driver = Driver()
    assert driver.read(CommonCfg.QUEUE_SIZE) == 256
    driver.write(CommonCfg.QUEUE_SIZE, size)
    assert driver.read(CommonCfg.QUEUE_SIZE) == size


def test_an_enabled_queue_is_fixed() -> None:
    """HOSTILE-065, HOSTILE-068: size and addresses ignore writes, enabling again restarts nothing."""
    driver = Driver()
    driver.go_live()
    before = driver.device.common_read(0, 64)
    driver.write(CommonCfg.QUEUE_SIZE, 32)
    for area in (CommonCfg.QUEUE_DESC, CommonCfg.QUEUE_DRIVER, CommonCfg.QUEUE_DEVICE):
        driver.write(area, 0x9000)
    assert driver.enable() == []
    assert driver.device.common_read(0, 64) == before


@pytest.mark.parametrize("value", [0, 2, 3, 0xFFFF])
@pytest.mark.parametrize("enabled", [False, True])
def test_queue_enable_takes_only_one(value: int, enabled: bool) -> None:
    """HOSTILE-066, HOSTILE-067: any other value, before or after enabling, is ignored."""
    driver = Driver()
    driver.negotiate()
    driver.set_up_queue()
    if enabled:
        driver.enable()
    assert driver.write(CommonCfg.QUEUE_ENABLE, value) == []
    assert driver.read(CommonCfg.QUEUE_ENABLE) == enabled


@pytest.mark.parametrize("status", [0, 1, 3])
def test_queue_enable_before_features_ok_is_ignored(status: int) -> None:
    """HOSTILE-070: the ring format is known only then."""
    driver = Driver()
    if status:
        driver.status = status
    driver.set_up_queue()
    driver.enable()
    assert driver.read(CommonCfg.QUEUE_ENABLE) == 0


def test_further_queues_need_mq() -> None:
    """BLK-002, HOSTILE-080: without MQ only queue 0 can be enabled."""
    driver = Driver()
    driver.negotiate(driver.device.config.features & ~Feature.BLK_MQ.mask)
    driver.set_up_queue(1)
    driver.enable()
    assert driver.read(CommonCfg.QUEUE_ENABLE) == 0


@pytest.mark.parametrize(
    ("register", "address"),
    [
        (CommonCfg.QUEUE_DESC, 0),
        (CommonCfg.QUEUE_DRIVER, 0),
        (CommonCfg.QUEUE_DEVICE, 0),
        (CommonCfg.QUEUE_DESC, 0x1008),
        (CommonCfg.QUEUE_DRIVER, 0x2001),
        (CommonCfg.QUEUE_DEVICE, 0x3002),
        (CommonCfg.QUEUE_DEVICE, 2**64 - 1),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_a_misplaced_ring_is_never_started(register: CommonCfg, address: int, late: bool) -> None:
    """HOSTILE-040, HOSTILE-069: missing or misaligned areas make the device need a reset instead."""
    driver = Driver()
    if late:
        driver.go_live()
    else:
        driver.negotiate()
    driver.set_up_queue(1)
    driver.write(register, address)
    effects = driver.enable()
    if not late:
        effects += driver.write_status(LIVE)
    assert effects == [StopQueues(), ConfigInterrupt()]
    assert driver.status == LIVE | DeviceStatus.NEEDS_RESET
    assert driver.device.doorbell(1) == []


# --- queue reset ----------------------------------------------------------------------------------------------------


def test_queue_reset_reads_one_until_it_is_done() -> None:
    """VQRST-001..004, PCI-054..056: then both fields read 0 and the queue is as it was at first."""
    driver = Driver()
    driver.go_live()
    driver.set_up_queue(1)
    driver.enable()
    driver.write(CommonCfg.QUEUE_SELECT, 0)
    assert driver.write(CommonCfg.QUEUE_RESET, 1) == [ResetQueue(0)]
    assert driver.read(CommonCfg.QUEUE_RESET) == 1
    driver.device.queue_reset_done(0)
    assert driver.read(CommonCfg.QUEUE_RESET) == driver.read(CommonCfg.QUEUE_ENABLE) == 0
    assert driver.read(CommonCfg.QUEUE_SIZE) == 256
    assert driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == NO_VECTOR
    assert driver.device.doorbell(0) == []
    assert driver.device.doorbell(1) == [Notify(1)]


def test_a_queue_can_be_set_up_again_after_its_reset() -> None:
    """VQRST-006, VQRST-007, PCI-040, PCI-057: with other settings, and without a device reset."""
    driver = Driver()
    driver.go_live()
    driver.write(CommonCfg.QUEUE_RESET, 1)
    driver.device.queue_reset_done(0)
    driver.set_up_queue(0, size=16)
    assert driver.enable() == [started(0, size=16)]
    assert driver.read(CommonCfg.QUEUE_RESET) == 0


def test_writes_during_a_queue_reset_are_ignored() -> None:
    """HOSTILE-077, VQRST-003: neither a second reset, nor enabling, new settings or a doorbell has an effect."""
    driver = Driver()
    driver.go_live()
    driver.write(CommonCfg.QUEUE_RESET, 1)
    assert driver.write(CommonCfg.QUEUE_RESET, 1) == []
    assert driver.enable() == []
    driver.write(CommonCfg.QUEUE_SIZE, 16)
    driver.write(CommonCfg.QUEUE_DESC, 0x9000)
    assert driver.read(CommonCfg.QUEUE_SIZE) == 64
    assert driver.read(CommonCfg.QUEUE_DESC) == 0x1_0000_1000
    assert driver.device.doorbell(0) == []


@pytest.mark.parametrize("value", [0, 2, 0xFFFF])
def test_queue_reset_takes_only_one(value: int) -> None:
    """HOSTILE-076: any other value is ignored."""
    driver = Driver()
    driver.go_live()
    assert driver.write(CommonCfg.QUEUE_RESET, value) == []
    assert driver.read(CommonCfg.QUEUE_RESET) == 0
    assert driver.read(CommonCfg.QUEUE_ENABLE) == 1


def test_queue_reset_needs_its_feature() -> None:
    """HOSTILE-074: without RING_RESET it is ignored."""
    driver = Driver()
    driver.go_live(driver.device.config.features & ~Feature.RING_RESET.mask)
    assert driver.write(CommonCfg.QUEUE_RESET, 1) == []
    assert driver.read(CommonCfg.QUEUE_RESET) == 0
    assert driver.read(CommonCfg.QUEUE_ENABLE) == 1


@pytest.mark.parametrize("enabled", [False, True])
def test_queue_reset_of_an_idle_queue_completes_at_once(enabled: bool) -> None:
    """HOSTILE-075: nothing can be in flight on a queue that was never started."""
    driver = Driver()
    driver.negotiate()
    driver.set_up_queue()
    if enabled:
        driver.enable()
    assert driver.write(CommonCfg.QUEUE_RESET, 1) == []
    assert driver.read(CommonCfg.QUEUE_RESET) == driver.read(CommonCfg.QUEUE_ENABLE) == 0


def test_a_queue_enabled_again_without_settings_is_refused() -> None:
    """HOSTILE-079, HOSTILE-069: its addresses went with the reset, so nothing at address 0 is touched."""
    driver = Driver()
    driver.go_live()
    driver.write(CommonCfg.QUEUE_RESET, 1)
    driver.device.queue_reset_done(0)
    assert driver.enable() == [StopQueues(), ConfigInterrupt()]


def test_a_queue_reset_that_a_device_reset_overtook_changes_nothing() -> None:
    """A late report about a queue does not undo what the driver has set up since."""
    driver = Driver()
    driver.go_live()
    driver.write(CommonCfg.QUEUE_RESET, 1)
    driver.status = 0
    driver.device.reset_done()
    driver.go_live()
    driver.device.queue_reset_done(0)
    assert driver.read(CommonCfg.QUEUE_ENABLE) == 1
    assert driver.device.doorbell(0) == [Notify(0)]


# --- vectors --------------------------------------------------------------------------------------------------------


def test_vectors_start_unmapped() -> None:
    """PCI-104: every vector field reads NO_VECTOR."""
    driver = Driver()
    assert driver.read(CommonCfg.CONFIG_MSIX_VECTOR) == driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == NO_VECTOR


@pytest.mark.parametrize("vector", [0, 1, 3])
def test_any_event_can_have_any_vector(vector: int) -> None:
    """PCI-101..103, PCI-105: vectors may be shared, read back, and be unmapped again, live or not."""
    driver = Driver()
    driver.go_live()
    driver.write(CommonCfg.QUEUE_MSIX_VECTOR, 2)
    assert driver.write(CommonCfg.CONFIG_MSIX_VECTOR, vector) == [ConfigVectorChanged(vector)]
    assert driver.write(CommonCfg.QUEUE_MSIX_VECTOR, vector) == [QueueVectorChanged(0, vector)]
    assert driver.read(CommonCfg.CONFIG_MSIX_VECTOR) == driver.device.config_vector == vector
    assert driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == driver.device.queue_vector(0) == vector
    assert driver.write(CommonCfg.QUEUE_MSIX_VECTOR, vector) == []
    assert driver.write(CommonCfg.QUEUE_MSIX_VECTOR, NO_VECTOR) == [QueueVectorChanged(0, NO_VECTOR)]
    assert driver.write(CommonCfg.CONFIG_MSIX_VECTOR, NO_VECTOR) == [ConfigVectorChanged(NO_VECTOR)]


@pytest.mark.parametrize("vector", [4, 0x7FF, 0x800, 0xFFFE])
def test_a_vector_outside_the_table_is_not_mapped(vector: int) -> None:
    """PCI-106, PCI-107, HOSTILE-131: a failed mapping reads back as NO_VECTOR."""
    driver = Driver()
    driver.write(CommonCfg.CONFIG_MSIX_VECTOR, 1)
    driver.write(CommonCfg.QUEUE_MSIX_VECTOR, 1)
    driver.write(CommonCfg.CONFIG_MSIX_VECTOR, vector)
    driver.write(CommonCfg.QUEUE_MSIX_VECTOR, vector)
    assert driver.read(CommonCfg.CONFIG_MSIX_VECTOR) == driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == NO_VECTOR


# --- accesses of any width ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pieces",
    [
        [(0x20, 8), (0x28, 8), (0x30, 8)],
        [(0x20, 4), (0x24, 4), (0x28, 4), (0x2C, 4), (0x30, 4), (0x34, 4)],
        [(0x34, 4), (0x30, 4), (0x2C, 4), (0x28, 4), (0x24, 4), (0x20, 4)],
        [(0x20, 24)],
    ],
)
def test_addresses_can_be_written_in_dwords_or_qwords(pieces: list[tuple[int, int]]) -> None:
    """PCI-010, PCI-011, HOSTILE-113: either half on its own, in any order, or both at once."""
    device = Driver().device
    image = bytes(range(0x20, 0x38))
    for offset, width in pieces:
        device.common_write(offset, image[offset - 0x20 : offset - 0x20 + width])
    assert device.common_read(0x20, 24) == image


READ_ONLY = [
    CommonCfg.DEVICE_FEATURE,
    CommonCfg.NUM_QUEUES,
    CommonCfg.CONFIG_GENERATION,
    CommonCfg.QUEUE_NOTIFY_OFF,
    CommonCfg.QUEUE_NOTIF_CONFIG_DATA,
    CommonCfg.ADMIN_QUEUE_INDEX,
    CommonCfg.ADMIN_QUEUE_NUM,
]


@pytest.mark.parametrize("register", READ_ONLY)
def test_read_only_registers_ignore_writes(register: CommonCfg) -> None:
    """HOSTILE-111: the rest of common configuration is not the driver's."""
    driver = Driver()
    before = driver.device.common_read(0, 64)
    assert driver.write(register, (1 << 8 * WIDTHS.get(register, 2)) - 1) == []
    assert driver.device.common_read(0, 64) == before


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0x18, b"\x40"),  # half of queue_size
        (0x19, b"\0\0"),  # misaligned over queue_size and queue_msix_vector
        (0x1B, b"\0"),
        (0x20, b"\x11\x22"),  # a word of queue_desc
        (0x22, b"\x11\x22\x33\x44"),  # over both halves of queue_desc
        (0x0F, b"\xff"),
        (0x40, b"\xff" * 8),
        (0x3F, b"\xff" * 4),
        (0x18, b""),
    ],
)
def test_partial_writes_are_ignored(offset: int, data: bytes) -> None:
    """HOSTILE-112, HOSTILE-114: a register that is not covered wholly keeps its value."""
    device = Driver().device
    before = device.common_read(0, 64)
    assert device.common_write(offset, data) == []
    assert device.common_read(0, 64) == before


def test_a_wide_write_reaches_every_register_it_covers() -> None:
    """HOSTILE-112: size and vector in one dword act as two writes."""
    driver = Driver()
    driver.device.common_write(CommonCfg.QUEUE_SIZE, b"\x40\0\1\0")
    assert driver.read(CommonCfg.QUEUE_SIZE) == 64
    assert driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == 1


@given(st.integers(0, 200), st.integers(0, 200))
def test_reads_are_slices_of_the_registers(offset: int, length: int) -> None:
    """HOSTILE-112, HOSTILE-114: any offset and length is a slice, followed by zeroes."""
    device = Driver().device
    image = device.common_read(0, 64) + bytes(400)
    assert device.common_read(offset, length) == image[offset : offset + length]


# --- any driver at all ----------------------------------------------------------------------------------------------

VALUES = st.one_of(st.sampled_from([0, 1, 2, 3, 4, 8, 11, 15, 64, 128, 255, 0x1000, NO_VECTOR]), st.integers(0))
REGISTER_WRITES = st.tuples(st.sampled_from(list(CommonCfg)), VALUES)
RAW_WRITES = st.tuples(st.integers(0, 70), st.binary(max_size=16))
REPORTS = st.sampled_from(["reset_done", "queue_reset_done", "needs_reset", "set_capacity", "writeback"])
DRIVERS = st.lists(st.one_of(REGISTER_WRITES, REGISTER_WRITES, RAW_WRITES, REPORTS), max_size=40)


def step(driver: Driver, action: Any) -> list[Effect]:
    """Carry out one action of a random driver, or of the device's owner."""
    device = driver.device
    match action:
        case CommonCfg() as register, int(value):
            return driver.write(register, value & (1 << 8 * WIDTHS.get(register, 2)) - 1)
        case int(offset), bytes(data):
            return device.common_write(offset, data)
        case "reset_done":
            if device.resetting:
                device.reset_done()
        case "queue_reset_done":
            for index in range(3):
                device.queue_reset_done(index)
        case "needs_reset":
            return device.needs_reset()
        case "set_capacity":
            return device.set_capacity(device.capacity + 1)
        case "writeback":
            return device.config_write(BlkConfig.WRITEBACK, b"\0")
    return []


@given(st.sampled_from(sorted(STAGES)), DRIVERS)
def test_no_driver_breaks_the_invariants(stage: str, actions: list[Any]) -> None:
    """HOSTILE rows of queues, status and registers: random writes from any stage keep every promise."""
    driver = Driver()
    STAGES[stage](driver)
    device = driver.device
    serving = {0} if stage in {"live", "failed"} else set()
    for action in actions:
        effects = step(driver, action)
        for effect in effects:
            match effect:
                case StartQueue(queue):
                    assert device.live
                    assert queue.index not in serving
                    assert (queue.desc % 16, queue.driver % 2, queue.device % 4) == (0, 0, 0)
                    assert queue.size.bit_count() == 1
                    assert queue.size <= 256
                    serving.add(queue.index)
                case ResetQueue(index):
                    serving.discard(index)
                case Reset() | StopQueues():
                    serving.clear()
                case ConfigInterrupt():
                    assert driver.status & DeviceStatus.DRIVER_OK
        check_invariants(driver)
    driver.device.reset_done()
    for index in range(3):
        driver.write(CommonCfg.QUEUE_SELECT, index)
        assert driver.read(CommonCfg.QUEUE_ENABLE) == driver.read(CommonCfg.QUEUE_RESET) == 0
    driver.write(CommonCfg.QUEUE_SELECT, 0)
    driver.write(CommonCfg.DRIVER_FEATURE_SELECT, 0)
    assert driver.go_live()[0] == started()


def check_invariants(driver: Driver) -> None:
    """What holds in every state."""
    device = driver.device
    if device.live:
        assert driver.status & LIVE == LIVE
        assert not driver.status & DeviceStatus.NEEDS_RESET
        assert device.negotiated & VERSION_1
    if device.resetting:
        assert driver.status
        assert not device.live
    assert device.negotiated & ~device.config.features == 0
    assert all(device.doorbell(index) == [] for index in range(64) if not device.live or index > 2)
    assert driver.read(CommonCfg.CONFIG_MSIX_VECTOR) in {0, 1, 2, 3, NO_VECTOR}
