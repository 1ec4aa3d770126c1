"""The virtio state machine: features, status, reset and configuration space, through its registers."""

from __future__ import annotations

import itertools
from dataclasses import astuple
from typing import Literal

import pytest
from registers import ACKNOWLEDGED, ALL, DISK, LIVE, NEGOTIATED, STAGES, VERSION_1, Driver, a_config, started

from vmmblk.block import BlockInfo, Operation, Topology
from vmmblk.device import (
    OFF_BY_DEFAULT,
    SWITCHES,
    BlkConfigSpace,
    ConfigInterrupt,
    Effect,
    Reset,
    StopQueues,
    WriteCacheChanged,
    configure,
)
from vmmblk.spec import BLK_CONFIG_SIZE, BlkConfig, CommonCfg, DeviceStatus, Feature

# --- configure ------------------------------------------------------------------------------------------------------

BASE = (
    Feature.VERSION_1,
    Feature.INDIRECT_DESC,
    Feature.EVENT_IDX,
    Feature.RING_PACKED,
    Feature.RING_RESET,
    Feature.BLK_SIZE_MAX,
    Feature.BLK_SEG_MAX,
    Feature.BLK_BLK_SIZE,
    Feature.BLK_TOPOLOGY,
    Feature.BLK_FLUSH,
)


@pytest.mark.parametrize(
    ("read_write", "ops", "more"),
    [
        (True, Operation(0), ()),
        (True, Operation.FLUSH, (Feature.BLK_CONFIG_WCE,)),
        (True, Operation.DISCARD, (Feature.BLK_DISCARD,)),
        (True, Operation.WRITE_ZEROES, (Feature.BLK_WRITE_ZEROES,)),
        (True, Operation.IDENTIFY | Operation.RESIZE, ()),
        (True, ALL, (Feature.BLK_CONFIG_WCE, Feature.BLK_DISCARD, Feature.BLK_WRITE_ZEROES)),
        (False, Operation(0), (Feature.BLK_RO,)),
        (False, ALL, (Feature.BLK_RO,)),
    ],
)
def test_a_block_is_offered_with_what_it_can_do(read_write: bool, ops: Operation, more: tuple[Feature, ...]) -> None:
    """FEAT-004, BLK-030, BLK-031, BLK-060: what a block lacks, or may not do, is not offered; FLUSH always is."""
    config = configure(BlockInfo(read_write, 512, 8), ops, Topology())
    assert config.features == sum(feature.mask for feature in (*BASE, *more))


def test_configuration_describes_the_block() -> None:
    """BLK-004, 009, 011, 020: capacity and limits count 512-byte sectors, topology counts logical blocks."""
    topology = Topology(
        physical_block_size=16384, minimum_io_size=8192, optimal_io_size=1 << 20, discard_granularity=65536
    )
    blk = configure(BlockInfo(read_write=True, sector_size=4096, size_sectors=1000), ALL, topology).blk
    assert blk.capacity == 8000
    assert blk.blk_size == 4096
    assert (blk.physical_block_exp, blk.alignment_offset, blk.min_io_size, blk.opt_io_size) == (2, 0, 2, 256)
    assert blk.discard_sector_alignment == 128
    assert blk.max_discard_sectors % 8 == blk.max_write_zeroes_sectors % 8 == 0


def test_limits_of_offered_operations_are_not_zero() -> None:
    """BLK-014, BLK-015, BLK-092: drivers refuse a device that offers an operation and allows none of it."""
    blk = configure(DISK, ALL, Topology()).blk
    limits = (blk.max_discard_sectors, blk.max_discard_seg, blk.max_write_zeroes_sectors, blk.max_write_zeroes_seg)
    assert min(limits) > 0
    assert blk.discard_sector_alignment == 1
    assert blk.write_zeroes_may_unmap == 1


def test_configuration_without_opinions_is_zero() -> None:
    """A block with no topology and no operations leaves those fields 0."""
    blk = configure(DISK, Operation(0), Topology()).blk
    fields = (blk.physical_block_exp, blk.min_io_size, blk.opt_io_size, blk.max_discard_seg, blk.max_write_zeroes_seg)
    assert fields == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(("queue_size", "seg_max"), [(1, 1), (2, 1), (4, 2), (128, 126), (256, 254), (1024, 254)])
def test_segments_fit_the_queue(queue_size: int, seg_max: int) -> None:
    """BLK-006: a request of seg_max segments fits a chain beside its header and status."""
    blk = configure(DISK, ALL, Topology(), queue_size=queue_size).blk
    assert blk.seg_max == seg_max
    assert blk.size_max >= 4096


@pytest.mark.parametrize(
    ("ops", "cache", "writeback"),
    [
        (ALL, "writeback", 1),
        (ALL, "writethrough", 0),
        (Operation(0), "writeback", 0),
    ],
)
def test_cache_mode_is_where_the_device_starts(
    ops: Operation, cache: Literal["writeback", "writethrough"], writeback: int
) -> None:
    """BLK-027: writeback starts as asked for, and is 0 for a block that has no cache to switch on."""
    assert configure(DISK, ops, Topology(), cache=cache).blk.writeback == writeback


@pytest.mark.parametrize(
    "changes",
    [
        {"queue_size": 0},
        {"queue_size": 100},
        {"queue_size": 65536},
        {"queues": 0},
        {"queues": 65},
        {"features": 0},
        {"features": VERSION_1 | Feature.BLK_CONFIG_WCE.mask},
        {"features": VERSION_1 | 1 << 3},
        {"features": VERSION_1 | 1 << 64},
    ],
)
def test_an_offer_that_virtio_forbids_is_an_error(changes: dict[str, int]) -> None:
    """FEAT-001, FEAT-004, RSVD-001, BLK-031, PCI-042: such a device is never made."""
    with pytest.raises(ValueError, match=r"queue|offered"):
        a_config(**changes)


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_adds_or_takes_one_feature(name: str) -> None:
    """FEAT-001, FEAT-004, FEAT-007: the other features stay as they are, and CONFIG_WCE goes with FLUSH."""
    ops = ALL | Operation.SECURE_ERASE | Operation.LIFETIME
    on, off = (configure(DISK, ops, Topology(), switches={name: on}).features for on in (True, False))
    implied = Feature.BLK_CONFIG_WCE.mask if name == "flush" else 0
    assert on & ~off == SWITCHES[name].mask | implied
    assert off & ~on == 0
    default = configure(DISK, ops, Topology(), queues=2).features
    assert bool(default & SWITCHES[name].mask) == (SWITCHES[name] not in OFF_BY_DEFAULT)


@pytest.mark.parametrize(
    ("ops", "queues", "switches", "rule"),
    [
        (Operation(0), 1, {"discard": True}, "FEAT-004"),
        (Operation(0), 1, {"config_wce": True}, "FEAT-004"),
        (ALL, 1, {"flush": False, "config_wce": True}, "BLK-031"),
        (ALL, 2, {"mq": False}, "BLK-003"),
        (ALL, 1, {"warp": True}, "there is no feature warp; there are mq, "),
    ],
)
def test_a_combination_that_no_device_can_have_is_refused(
    ops: Operation, queues: int, switches: dict[str, bool], rule: str
) -> None:
    """FEAT-001, FEAT-004, BLK-031: in one line, which names the rule."""
    with pytest.raises(ValueError, match=rule) as caught:
        configure(DISK, ops, Topology(), queues=queues, switches=switches)
    assert "\n" not in str(caught.value)


def test_what_is_switched_off_leaves_no_trace_in_the_configuration() -> None:
    """FEAT-008: the fields of discard, zeroes, topology, write-back and num_queues are 0 without their features."""
    off = dict.fromkeys(("discard", "write_zeroes", "topology", "flush", "mq"), False)
    topology = Topology(physical_block_size=4096, minimum_io_size=4096, optimal_io_size=8192)
    blk = configure(DISK, ALL, topology, switches=off).blk
    assert astuple(blk)[7:] == (0,) * 21


def test_configuration_space_is_the_specified_structure() -> None:
    """BLK-024, BLK-033, BLK-034: every field is at its offset, in its width, and the padding is 0."""
    layout = [  # offset, width, in the order of the fields
        *((0, 8), (8, 4), (12, 4), (16, 2), (18, 1), (19, 1), (20, 4), (24, 1), (25, 1), (26, 2), (28, 4), (32, 1)),
        *((34, 2), (36, 4), (40, 4), (44, 4), (48, 4), (52, 4), (56, 1), (60, 4), (64, 4), (68, 4), (72, 4), (76, 4)),
        *((80, 4), (84, 4), (88, 4), (92, 1)),
    ]
    expected = bytearray(BLK_CONFIG_SIZE)
    values = []
    for number, (offset, width) in enumerate(layout, 1):
        expected[offset : offset + width] = bytes([number]) * width
        values.append(int.from_bytes(bytes([number]) * width, "little"))
    assert BlkConfigSpace(*values).pack() == expected


# --- feature negotiation --------------------------------------------------------------------------------------------


def test_offer_is_read_through_windows() -> None:
    """PCI-028, PCI-029: device_feature shows 32 bits of the offer, 0 beyond bit 63."""
    driver = Driver()
    assert driver.offered() == driver.device.config.features


@pytest.mark.parametrize("select", [2, 3, 0x80000000, 0xFFFFFFFF])
def test_feature_windows_beyond_the_second_are_inert(select: int) -> None:
    """HOSTILE-105: they read 0 and ignore writes."""
    driver = Driver()
    driver.write(CommonCfg.DEVICE_FEATURE_SELECT, select)
    driver.write(CommonCfg.DRIVER_FEATURE_SELECT, select)
    driver.write(CommonCfg.DRIVER_FEATURE, 0xFFFFFFFF)
    assert driver.read(CommonCfg.DEVICE_FEATURE) == driver.read(CommonCfg.DRIVER_FEATURE) == 0
    assert driver.read(CommonCfg.DEVICE_FEATURE_SELECT) == driver.read(CommonCfg.DRIVER_FEATURE_SELECT) == select
    driver.write(CommonCfg.DRIVER_FEATURE_SELECT, 0)
    assert driver.read(CommonCfg.DRIVER_FEATURE) == 0


def test_bits_that_were_not_offered_are_masked() -> None:
    """FEAT-010, HOSTILE-101, PCI-030: a valid bit reads back, one that was not offered never becomes active."""
    driver = Driver(a_config(features=VERSION_1 | Feature.BLK_FLUSH.mask))
    driver.negotiate((1 << 64) - 1)
    assert driver.device.negotiated == VERSION_1 | Feature.BLK_FLUSH.mask
    driver.write(CommonCfg.DRIVER_FEATURE_SELECT, 0)
    assert driver.read(CommonCfg.DRIVER_FEATURE) == Feature.BLK_FLUSH.mask


@pytest.mark.parametrize("bit", [bit for bit in range(64) if a_config().features >> bit & 1])
def test_each_offered_bit_can_be_negotiated_alone(bit: int) -> None:
    """FEAT-002, STAT-009: any subset with VERSION_1 is accepted."""
    driver = Driver()
    driver.negotiate(VERSION_1 | 1 << bit)
    assert driver.status == NEGOTIATED
    assert driver.device.negotiated == VERSION_1 | 1 << bit


def test_driver_without_version_1_is_refused() -> None:
    """FEAT-003, HOSTILE-102, HOSTILE-103: FEATURES_OK does not stick, and the driver may try again."""
    driver = Driver()
    driver.negotiate(driver.device.config.features & ~VERSION_1)
    assert driver.status == ACKNOWLEDGED
    assert driver.device.negotiated == 0
    driver.acknowledge(VERSION_1)
    driver.status = NEGOTIATED
    assert driver.status == NEGOTIATED


def test_negotiated_features_are_frozen() -> None:
    """FEAT-006, FEAT-009, HOSTILE-104: what is written after FEATURES_OK changes nothing."""
    driver = Driver()
    driver.negotiate(VERSION_1)
    driver.acknowledge(driver.device.config.features)
    driver.status = NEGOTIATED
    assert driver.device.negotiated == VERSION_1


def test_accepted_features_are_accepted_again_after_a_reset() -> None:
    """FEAT-005: a second negotiation of the same set succeeds."""
    driver = Driver()
    for _ in range(2):
        driver.go_live()
        assert driver.device.live
        driver.status = 0
        driver.device.reset_done()


# --- status ---------------------------------------------------------------------------------------------------------


def test_status_is_zero_at_first_and_bits_read_back() -> None:
    """STAT-001, STAT-002: each bit of the sequence stays once written."""
    driver = Driver()
    seen = [driver.status]
    driver.acknowledge(VERSION_1)
    for value in (1, ACKNOWLEDGED, NEGOTIATED, LIVE):
        driver.status = value
        seen.append(driver.status)
    assert seen == [0, 1, ACKNOWLEDGED, NEGOTIATED, LIVE]


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 8, 4))))
def test_only_the_right_order_of_status_bits_goes_live(order: tuple[int, ...]) -> None:
    """HOSTILE-093, HOSTILE-094: DRIVER, FEATURES_OK and DRIVER_OK in any other order leave the device not live."""
    driver = Driver()
    driver.acknowledge(VERSION_1)
    for bit in order:
        driver.status = driver.status | bit
    assert driver.device.live == ([bit for bit in order if bit != 1] == [2, 8, 4])


def test_a_driver_that_never_acknowledges_is_served() -> None:
    """After its reset U-Boot before 2026.07 goes on with DRIVER; ACKNOWLEDGE, which has no effect, is not missed."""
    driver = Driver()
    driver.status = 0
    driver.device.reset_done()
    driver.acknowledge(VERSION_1)
    seen = []
    for bit in (2, 8, 4):
        driver.status = driver.status | bit
        seen.append(driver.status)
    assert seen == [2, 10, 14]
    assert driver.device.live


def test_all_status_bits_at_once_do_not_replace_negotiation() -> None:
    """HOSTILE-094: without acknowledged features the device does not go live."""
    driver = Driver()
    driver.status = 0xFF
    assert driver.status == ACKNOWLEDGED | DeviceStatus.FAILED
    assert not driver.device.live


@pytest.mark.parametrize("value", [1, 2, 4, 8, 3, 11, 0x40])
def test_status_bits_cannot_be_cleared_one_by_one(value: int) -> None:
    """HOSTILE-095: a non-zero write that omits bits takes none away."""
    driver = Driver()
    driver.go_live()
    driver.status = value
    assert driver.status == LIVE
    assert driver.device.live


@pytest.mark.parametrize("bit", [16, 32, 64])
@pytest.mark.parametrize("live", [False, True])
def test_driver_cannot_set_bits_that_are_not_its_own(bit: int, live: bool) -> None:
    """HOSTILE-096..099: NEEDS_RESET, SUSPEND without its feature and the undefined bit are ignored."""
    driver = Driver()
    if live:
        driver.go_live()
    before = driver.status
    assert driver.write_status(before | bit) == []
    assert driver.status == before


def test_failed_stays_until_reset_and_notifies_nobody() -> None:
    """STAT-012, HOSTILE-100: FAILED is visible, has no effect, and a reset clears it."""
    driver = Driver()
    driver.go_live()
    assert driver.write_status(0x80) == []
    assert driver.status == LIVE | 0x80
    driver.status = 0
    driver.device.reset_done()
    assert driver.status == 0


def test_device_without_queues_idles() -> None:
    """HOSTILE-109: DRIVER_OK with no queue enabled has no effect."""
    driver = Driver()
    driver.negotiate()
    assert driver.write_status(LIVE) == []
    assert driver.device.live


# --- needing a reset ------------------------------------------------------------------------------------------------


def test_needing_a_reset_stops_a_live_device_and_tells_the_driver() -> None:
    """STAT-006..008, HOSTILE-092: the bit shows, queues stop, a configuration interrupt follows, doorbells die."""
    driver = Driver()
    driver.go_live()
    assert driver.device.needs_reset() == [StopQueues(), ConfigInterrupt()]
    assert driver.status == LIVE | DeviceStatus.NEEDS_RESET
    assert not driver.device.live
    assert driver.device.doorbell(0) == []
    assert driver.device.needs_reset() == []


def test_needing_a_reset_before_driver_ok_interrupts_nobody() -> None:
    """STAT-007: the notification is for a driver that is running; such a device does not go live either."""
    driver = Driver()
    driver.negotiate()
    driver.set_up_queue()
    driver.enable()
    assert driver.device.needs_reset() == []
    assert driver.write_status(LIVE) == []
    assert not driver.device.live


def test_a_reset_restores_full_service() -> None:
    """HOSTILE-110: a driver that goes on is not served until it resets, and then it is."""
    driver = Driver()
    driver.go_live()
    driver.device.needs_reset()
    driver.set_up_queue(1)
    assert driver.enable() == []
    assert driver.write_status(0) == [Reset()]
    driver.device.reset_done()
    assert driver.go_live() == [started()]


# --- device reset ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_status_reads_zero_only_after_the_reset(stage: str) -> None:
    """RST-001, RST-005, PCI-036, PCI-037: a reset is taken in any state and ends when it is reported done."""
    driver = Driver()
    STAGES[stage](driver)
    assert driver.write_status(0) == [Reset()]
    assert driver.status != 0
    assert driver.device.resetting
    driver.device.reset_done()
    assert driver.status == 0
    assert not driver.device.resetting


@pytest.mark.parametrize("stage", STAGES)
def test_everything_is_initial_after_a_reset(stage: str) -> None:
    """RST-006, PCI-038, 039, 043, 104: registers, features and vectors, shown by comparing with a new device."""
    driver = Driver()
    STAGES[stage](driver)
    driver.write(CommonCfg.CONFIG_MSIX_VECTOR, 1)
    driver.device.config_write(BlkConfig.WRITEBACK, b"\0")
    driver.status = 0
    driver.device.reset_done()
    fresh = Driver()
    for index in range(4):
        driver.write(CommonCfg.QUEUE_SELECT, index)
        fresh.write(CommonCfg.QUEUE_SELECT, index)
        assert driver.device.common_read(0, 64) == fresh.device.common_read(0, 64)
    assert driver.device.config_read(0, 96) == fresh.device.config_read(0, 96)
    assert driver.device.negotiated == 0
    driver.write(CommonCfg.QUEUE_SELECT, 0)
    assert driver.go_live() == [started()]


def test_writes_during_a_reset_are_ignored() -> None:
    """HOSTILE-106, HOSTILE-108: a repeated reset asks for nothing more, and there is no half-reset device."""
    driver = Driver()
    driver.go_live()
    driver.status = 0
    before = driver.device.common_read(0, 64)
    assert driver.write_status(0) == []
    driver.negotiate()
    driver.set_up_queue(1)
    assert driver.enable() == []
    assert driver.write_status(LIVE) == []
    assert driver.device.config_write(BlkConfig.WRITEBACK, b"\0") == []
    assert driver.device.doorbell(0) == []
    assert driver.device.needs_reset() == []
    assert driver.device.common_read(0, 64) == before


def test_nothing_is_notified_after_a_reset() -> None:
    """RST-002, HOSTILE-091: doorbells and capacity changes have no effect until the next initialisation."""
    driver = Driver()
    driver.go_live()
    driver.status = 0
    driver.device.reset_done()
    assert driver.device.doorbell(0) == []
    assert driver.device.set_capacity(4096) == []


# --- device configuration space -------------------------------------------------------------------------------------


def test_configuration_can_be_read_before_negotiation() -> None:
    """CFG-001, CFG-002, HOSTILE-120: every field, whether or not the driver will accept its feature."""
    driver = Driver()
    assert driver.device.config_read(0, 96) == driver.device.config.blk.pack()
    assert driver.config(BlkConfig.CAPACITY, 8) == 2048


def test_reads_past_the_end_of_configuration_are_zero() -> None:
    """CFG-005, HOSTILE-124: beyond 96 bytes there is nothing."""
    device = Driver().device
    assert device.config_read(92, 8) == device.config_read(92, 4) + bytes(4)
    assert device.config_read(4096, 4) == bytes(4)
    assert device.config_write(96, b"\1") == []


@pytest.mark.parametrize(("value", "on"), [(0, False), (1, True), (2, True), (255, True)])
def test_writeback_switches_the_cache(value: int, on: bool) -> None:
    """BLK-028, HOSTILE-121: with CONFIG_WCE any value becomes 0 or 1, reads back and takes effect once."""
    for before in (False, True):
        driver = Driver()
        driver.go_live()
        driver.device.config_write(BlkConfig.WRITEBACK, bytes([before]))
        effects = driver.device.config_write(BlkConfig.WRITEBACK, bytes([value]))
        assert effects == ([WriteCacheChanged(on)] if before != on else [])
        assert driver.config(BlkConfig.WRITEBACK, 1) == on
        assert driver.device.write_cache == on


@pytest.mark.parametrize("features", [None, VERSION_1 | Feature.BLK_FLUSH.mask])
def test_writeback_is_read_only_without_config_wce(features: int | None) -> None:
    """HOSTILE-119, HOSTILE-122: before FEATURES_OK or without the feature a write is ignored."""
    driver = Driver()
    if features is not None:
        driver.go_live(features)
    assert driver.device.config_write(BlkConfig.WRITEBACK, b"\0") == []
    assert driver.config(BlkConfig.WRITEBACK, 1) == 1


def test_other_configuration_is_read_only() -> None:
    """HOSTILE-118, HOSTILE-123, BLK-029: a write of everything changes writeback alone."""
    driver = Driver()
    driver.go_live()
    before = driver.device.config_read(0, 96)
    assert driver.device.config_write(0, bytes(128)) == [WriteCacheChanged(on=False)]
    after = driver.device.config_read(0, 96)
    assert [at for at in range(96) if before[at] != after[at]] == [BlkConfig.WRITEBACK]
    assert driver.device.config_write(BlkConfig.CAPACITY, b"\xff" * 8) == []
    assert driver.device.config_read(0, 96) == after


FLUSH, WCE = Feature.BLK_FLUSH.mask, Feature.BLK_CONFIG_WCE.mask


@pytest.mark.parametrize(
    ("cache", "features", "write_cache"),
    [
        ("writeback", 0, False),
        ("writeback", FLUSH, True),
        ("writeback", FLUSH | WCE, True),
        ("writeback", WCE, False),
        ("writethrough", 0, False),
        ("writethrough", FLUSH, False),
        ("writethrough", FLUSH | WCE, False),
        ("writethrough", WCE, False),
    ],
)
def test_durability_follows_negotiation(
    cache: Literal["writeback", "writethrough"], features: int, write_cache: bool
) -> None:
    """BLK-027, 032, 065, 066: writes are cached only for a driver that can flush; writeback shows the real mode."""
    driver = Driver(configure(DISK, ALL, Topology(), cache=cache))
    driver.go_live(VERSION_1 | features)
    assert driver.device.write_cache == write_cache
    assert driver.config(BlkConfig.WRITEBACK, 1) == write_cache


def test_driver_with_config_wce_alone_can_switch_the_cache_on() -> None:
    """BLK-028, BLK-032: without FLUSH writeback starts as 0, and is the driver's to change."""
    driver = Driver()
    driver.go_live(VERSION_1 | WCE)
    assert driver.device.config_write(BlkConfig.WRITEBACK, b"\1") == [WriteCacheChanged(on=True)]


def test_growing_is_announced_to_a_live_driver() -> None:
    """BLK-063, BLK-064, NOTE-003: the new capacity reads back and a configuration interrupt follows."""
    driver = Driver()
    driver.go_live()
    assert driver.device.set_capacity(1 << 40) == [ConfigInterrupt()]
    assert driver.config(BlkConfig.CAPACITY, 8) == driver.device.capacity == 1 << 40
    assert driver.device.set_capacity(1 << 40) == []


@pytest.mark.parametrize(("read_again", "told"), [(False, [ConfigInterrupt()]), (True, [])])
def test_growing_before_driver_ok_is_announced_when_it_comes(read_again: bool, told: list[Effect]) -> None:
    """BLK-064: a driver that has read the old capacity during its probe learns of the new one."""
    driver = Driver()
    driver.config(BlkConfig.CAPACITY, 8)
    driver.negotiate()
    assert driver.device.set_capacity(4096) == []
    if read_again:
        driver.config(BlkConfig.CAPACITY, 8)
    assert driver.write_status(LIVE) == told


def test_capacity_survives_a_reset() -> None:
    """The disk stays as big as it has become."""
    driver = Driver()
    driver.device.set_capacity(4096)
    driver.status = 0
    driver.device.reset_done()
    assert driver.config(BlkConfig.CAPACITY, 8) == 4096


def test_generation_changes_once_per_change_that_is_read() -> None:
    """CFG-004, PCI-034, PCI-035: 256 unread changes count once; reading the same again counts nothing."""
    driver = Driver()
    before = driver.read(CommonCfg.CONFIG_GENERATION)
    for size in range(256):
        driver.device.set_capacity(10_000 + size)
    assert driver.read(CommonCfg.CONFIG_GENERATION) == before
    driver.config(BlkConfig.CAPACITY, 4)
    assert driver.read(CommonCfg.CONFIG_GENERATION) == (before + 1) & 0xFF
    driver.config(BlkConfig.CAPACITY, 8)
    assert driver.read(CommonCfg.CONFIG_GENERATION) == (before + 1) & 0xFF


def test_generation_shows_a_capacity_torn_between_two_reads() -> None:
    """CFG-004: a change between reading the two halves is seen when the generation is read again."""
    driver = Driver()
    driver.config(BlkConfig.CAPACITY, 4)
    before = driver.read(CommonCfg.CONFIG_GENERATION)
    driver.config(BlkConfig.CAPACITY, 4)
    driver.device.set_capacity(1 << 33)
    driver.device.config_read(BlkConfig.CAPACITY + 4, 4)
    assert driver.read(CommonCfg.CONFIG_GENERATION) != before


def test_generation_wraps() -> None:
    """The counter has 8 bits."""
    driver = Driver()
    for size in range(256):
        driver.device.set_capacity(10_000 + size)
        driver.config(BlkConfig.CAPACITY, 8)
    assert driver.read(CommonCfg.CONFIG_GENERATION) == 0
