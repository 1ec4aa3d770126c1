"""Block device: the configuration, and what the device offers."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmmblk.client.device import CONFIG_WIDTHS
from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.ranges import DISCARD, SECURE_ERASE, WRITE_ZEROES, Kind
from vmmblk.conform.requests import ask, expect_answer, expect_data, field, pattern, reach
from vmmblk.spec import REQUEST_HEADER, SECTOR_SIZE, BlkConfig, CommonCfg, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_IDS = (0x1042, 0x1001)  # of block devices: by device type, and the transitional one
_QUEUES = 64
"""How many queues are tried, at most."""
_QUEUE_SIZE = 64
_SEGMENTS = 1024
_SEGMENT_BYTES = 1 << 20

_LAST_FIELDS = {
    Feature.BLK_SIZE_MAX: BlkConfig.SIZE_MAX,
    Feature.BLK_SEG_MAX: BlkConfig.SEG_MAX,
    Feature.BLK_GEOMETRY: BlkConfig.GEOMETRY,
    Feature.BLK_BLK_SIZE: BlkConfig.BLK_SIZE,
    Feature.BLK_TOPOLOGY: BlkConfig.OPT_IO_SIZE,
    Feature.BLK_CONFIG_WCE: BlkConfig.WRITEBACK,
    Feature.BLK_MQ: BlkConfig.NUM_QUEUES,
    Feature.BLK_DISCARD: BlkConfig.DISCARD_SECTOR_ALIGNMENT,
    Feature.BLK_WRITE_ZEROES: BlkConfig.WRITE_ZEROES_MAY_UNMAP,
    Feature.BLK_SECURE_ERASE: BlkConfig.SECURE_ERASE_SECTOR_ALIGNMENT,
    Feature.BLK_ZONED: BlkConfig.ZONED_MODEL,
}


# What is offered.


@check()
def device_type(target: Target) -> None:
    """The PCI device id is that of a block device (BLK-001)."""
    with target.driver(start=False) as driver:
        expect(driver.pci.device_id in _IDS, f"the device id is {driver.pci.device_id:#x}")


@check()
def flush_is_offered(target: Target) -> None:
    """FLUSH is offered (BLK-030)."""
    expect(target.offers(Feature.BLK_FLUSH), "FLUSH is not offered")


@check(Feature.BLK_CONFIG_WCE)
def flush_is_offered_with_config_wce(target: Target) -> None:
    """FLUSH is offered where CONFIG_WCE is (BLK-031)."""
    expect(target.offers(Feature.BLK_FLUSH), "CONFIG_WCE is offered without FLUSH")


@check()
def only_zoned_disks_offer_zones(target: Target) -> None:
    """ZONED is offered by zoned disks only: the model is not 0 (BLK-035)."""
    if target.offers(Feature.BLK_ZONED):
        with target.driver() as driver:
            expect(field(driver, BlkConfig.ZONED_MODEL), "ZONED is offered, and the model is 0, not zoned")


@check()
def configuration_has_the_fields(target: Target) -> None:
    """The configuration has the fields of each feature that is offered, at their offsets (BLK-024, 019)."""
    with target.driver(start=False) as driver:
        length = driver.pci.device.length
        for feature, last in _LAST_FIELDS.items():
            needed = last + CONFIG_WIDTHS.get(last, 4)
            beyond = target.offers(feature) and length < needed
            expect(not beyond, f"{feature.name} is offered, and the configuration has {length} bytes, not {needed}")


@check()
def padding_0_is_zero(target: Target) -> None:
    """The padding after writeback, at offset 33, is 0 (BLK-033)."""
    _expect_padding(target, 33, 1)


@check()
def padding_1_is_zero(target: Target) -> None:
    """The padding after write_zeroes_may_unmap, at offset 57, is 0 (BLK-034)."""
    _expect_padding(target, 57, 3)


def _expect_padding(target: Target, offset: int, length: int) -> None:
    with target.driver() as driver:
        if driver.pci.device.length < offset + length:
            raise NotTestable(f"the configuration has {driver.pci.device.length} bytes")
        found = driver.device.config_bytes(offset, length)
        expect(not any(found), f"the bytes from {offset} on are {found.hex(' ')}")


# Size and shape.


@check()
def capacity_counts_sectors(target: Target) -> None:
    """The capacity counts sectors of 512 bytes, whatever the block size: the last block is there (BLK-004)."""
    block = target.block_sectors
    reach(target, block)
    with target.driver() as driver:
        last = driver.capacity // block * block - block
        answer = ask(driver, RequestType.IN, last, data_in=target.facts.block_size)
        expect_answer(answer, f"reading the last block, at sector {last:#x} of {driver.capacity:#x}", Status.OK)
        if block > 1:
            last = driver.capacity * block - block
            answer = ask(driver, RequestType.IN, last, data_in=target.facts.block_size)
            expect(answer.outcome != Status.OK, f"capacity is {driver.capacity:#x}, and there is a sector {last:#x}")


@check(Feature.BLK_SIZE_MAX)
def segments_of_size_max(target: Target) -> None:
    """A request of elements of size_max bytes is served (BLK-005)."""
    reach(target, target.block_sectors)
    with target.driver() as driver:
        size = field(driver, BlkConfig.SIZE_MAX)
        expect(size > 0, "size_max is 0")
        length = _whole_blocks(target, min(size, _SEGMENT_BYTES))
        elements = [min(size, length - at) for at in range(0, length, size)]
        answer = ask(driver, RequestType.IN, 0, data_in=length, framing=[REQUEST_HEADER.size, *elements])
        expect_answer(answer, f"reading {length} bytes, size_max is {size}", Status.OK)


@check(Feature.BLK_SEG_MAX)
def as_many_segments_as_seg_max(target: Target) -> None:
    """A request of seg_max elements of data is served (BLK-006)."""
    reach(target, target.block_sectors)
    with target.driver() as driver:
        most = field(driver, BlkConfig.SEG_MAX)
        expect(most > 0, "seg_max is 0")
        # no chain may be longer than the queue, and two of its elements are header and status
        count = min(most, _SEGMENTS, max(driver.queues[0].size - 2, 1))
        length = _whole_blocks(target, count * SECTOR_SIZE)
        each = length // count
        elements = [each] * (count - 1) + [length - each * (count - 1)]
        answer = ask(driver, RequestType.IN, 0, data_in=length, framing=[REQUEST_HEADER.size, *elements])
        expect_answer(answer, f"reading {length} bytes in {count} elements, seg_max is {most}", Status.OK)


def _whole_blocks(target: Target, most: int) -> int:
    """About ``most`` bytes, but at least a block, and no more than there are."""
    block = target.facts.block_size
    return min(max(most // block, 1), target.facts.capacity // target.block_sectors) * block


@check(Feature.BLK_GEOMETRY)
def geometry_is_valid(target: Target) -> None:
    """The numbers of heads and of sectors in a track are not 0 (BLK-007)."""
    with target.driver() as driver:
        geometry = field(driver, BlkConfig.GEOMETRY)
        cylinders, heads, sectors = geometry & 0xFFFF, geometry >> 16 & 0xFF, geometry >> 24
        expect(heads and sectors, f"geometry is {cylinders}, {heads}, {sectors}")


@check(Feature.BLK_BLK_SIZE)
def block_size_is_valid(target: Target) -> None:
    """blk_size is a power of two from 512 on, and one block can be read (BLK-009)."""
    with target.driver() as driver:
        size = driver.block_size
        expect(size >= SECTOR_SIZE and size.bit_count() == 1, f"blk_size is {size}")
        reach(target, size // SECTOR_SIZE)
        expect_answer(ask(driver, RequestType.IN, 0, data_in=size), f"reading {size} bytes", Status.OK)


@check(Feature.BLK_BLK_SIZE)
def block_size_changes_no_unit(target: Target) -> None:
    """Sectors of requests are 512 bytes whatever blk_size is (BLK-025)."""
    _expect_units(target)


@check(Feature.BLK_TOPOLOGY)
def topology_is_valid(target: Target) -> None:
    """The first aligned block lies within a physical block (BLK-011)."""
    with target.driver() as driver:
        exponent, offset = (field(driver, each) for each in (BlkConfig.PHYSICAL_BLOCK_EXP, BlkConfig.ALIGNMENT_OFFSET))
        expect(exponent < 32, f"physical_block_exp is {exponent}")
        expect(offset < 1 << exponent, f"alignment_offset is {offset}, physical_block_exp {exponent}")


@check(Feature.BLK_TOPOLOGY)
def topology_changes_no_unit(target: Target) -> None:
    """Any logical block can be written by itself, whatever the topology (BLK-026)."""
    _expect_units(target)


def _expect_units(target: Target) -> None:
    """The second of four blocks is where its sector number says, and is written without its neighbours."""
    block, size = target.block_sectors, target.facts.block_size
    target.room(4 * block)
    before, written = pattern(4 * size, "before"), pattern(size, "written")
    with target.driver() as driver:
        driver.write(0, before)
        driver.write(block, written)
        expect_data(driver, 0, before[:size] + written + before[2 * size :], f"sector {block:#x} was written")


# Queues.


@check()
def one_queue_without_mq(target: Target) -> None:
    """Without MQ negotiated queue 0 serves requests (BLK-002)."""
    with target.driver(features=target.mask(without=(Feature.BLK_MQ,))) as driver:
        expect_answer(ask(driver, RequestType.GET_ID, data_in=20), "GET_ID", Status.OK, Status.UNSUPP)


@check(Feature.BLK_MQ)
def number_of_queues(target: Target) -> None:
    """num_queues is between 1 and the queues that there are (BLK-013)."""
    with target.driver() as driver:
        told, exist = field(driver, BlkConfig.NUM_QUEUES), driver.device.get(CommonCfg.NUM_QUEUES)
        expect(1 <= told <= exist, f"num_queues of the block device is {told}, of the common configuration {exist}")


@check(Feature.BLK_MQ)
def every_queue_serves(target: Target) -> None:
    """Each of num_queues request queues serves requests (BLK-003)."""
    with _every_queue(target) as driver:
        for queue in range(len(driver.queues)):
            answer = ask(driver, RequestType.GET_ID, data_in=20, queue=queue)
            expect_answer(answer, f"GET_ID on queue {queue}", Status.OK, Status.UNSUPP)


@check(Feature.BLK_MQ)
def queues_are_equal(target: Target) -> None:
    """What one request queue writes the next one reads (BLK-003)."""
    target.room(target.block_sectors)
    with _every_queue(target) as driver:
        for queue in range(len(driver.queues)):
            data = pattern(target.facts.block_size, f"queue {queue}")
            expect_answer(ask(driver, RequestType.OUT, 0, data, queue=queue), f"OUT on queue {queue}", Status.OK)
            answer = ask(driver, RequestType.IN, 0, data_in=len(data), queue=(queue + 1) % len(driver.queues))
            expect(answer.data == data, f"what queue {queue} wrote is not what the next one reads")


@contextlib.contextmanager
def _every_queue(target: Target) -> Iterator[VirtioBlk]:
    with target.driver(start=False) as driver:
        count = min(field(driver, BlkConfig.NUM_QUEUES), _QUEUES)
    with target.driver(queues=count, queue_size=min(_QUEUE_SIZE, target.facts.queue_size)) as driver:
        yield driver


# The write cache.


@check(Feature.BLK_CONFIG_WCE)
def writeback_is_zero_or_one(target: Target) -> None:
    """Reading writeback gives 0 or 1 (BLK-027)."""
    with target.driver() as driver:
        found = field(driver, BlkConfig.WRITEBACK)
        expect(found in (0, 1), f"writeback reads {found}")


@check(Feature.BLK_CONFIG_WCE)
def writeback_can_be_switched(target: Target) -> None:
    """What is written to writeback, 0 or 1, reads back (BLK-012, 028)."""
    with target.driver() as driver:
        first = field(driver, BlkConfig.WRITEBACK)
        for value in (0, 1, 0, first):
            driver.device.set_config(BlkConfig.WRITEBACK, value)
            found = field(driver, BlkConfig.WRITEBACK)
            expect(found == value, f"wrote {value} to writeback, it reads {found}")


@check(Feature.BLK_CONFIG_WCE)
def writeback_starts_off_without_flush(target: Target) -> None:
    """With CONFIG_WCE negotiated and FLUSH not, writeback starts as 0 (BLK-032)."""
    with target.driver(features=target.mask(without=(Feature.BLK_FLUSH,))) as driver:
        if not driver.has(Feature.BLK_CONFIG_WCE):
            raise NotTestable("CONFIG_WCE was not negotiated")
        found = field(driver, BlkConfig.WRITEBACK)
        expect(found == 0, f"writeback reads {found}")


# Limits of requests with ranges; that requests within them work is checked in block_erase.


@check(Feature.BLK_DISCARD)
def discard_limits_are_valid(target: Target) -> None:
    """The limits of DISCARD allow a block, in sectors of 512 bytes (BLK-014, 020)."""
    _expect_limits(target, DISCARD)


@check(Feature.BLK_WRITE_ZEROES)
def write_zeroes_limits_are_valid(target: Target) -> None:
    """The limits of WRITE_ZEROES allow a block, in sectors of 512 bytes (BLK-015, 021)."""
    _expect_limits(target, WRITE_ZEROES)


@check(Feature.BLK_SECURE_ERASE)
def secure_erase_limits_are_valid(target: Target) -> None:
    """The limits of SECURE_ERASE allow a block, in sectors of 512 bytes (BLK-017, 022)."""
    _expect_limits(target, SECURE_ERASE)


def _expect_limits(target: Target, kind: Kind) -> None:
    with target.driver() as driver:
        needed = max(target.block_sectors, field(driver, kind.alignment) if kind.alignment is not None else 1)
        sectors, count = field(driver, kind.max_sectors), field(driver, kind.max_seg)
        expect(count > 0, f"{kind.max_seg.name.lower()} is 0")
        expect(sectors >= needed, f"{kind.max_sectors.name.lower()} is {sectors}, the least to be aligned is {needed}")


@check(Feature.BLK_WRITE_ZEROES)
def may_unmap_is_zero_or_one(target: Target) -> None:
    """Reading write_zeroes_may_unmap gives 0 or 1 (BLK-092)."""
    with target.driver() as driver:
        found = field(driver, BlkConfig.WRITE_ZEROES_MAY_UNMAP)
        expect(found in (0, 1), f"write_zeroes_may_unmap reads {found}")


# A disk that grows.


@check()
def growing_is_announced(target: Target) -> None:
    """A capacity that changes is told by a configuration change notification, and holds (BLK-063, 064)."""
    reach(target, target.block_sectors)
    with target.driver() as driver:
        before = driver.capacity
        target.resize()
        driver.wait_config_change()
        after = driver.capacity
        expect(after > before, f"a change was told, capacity is {after:#x}, it was {before:#x}")
        block = target.block_sectors
        answer = ask(driver, RequestType.IN, after // block * block - block, data_in=target.facts.block_size)
        expect_answer(answer, f"capacity is {after:#x}, reading the last block", Status.OK)
