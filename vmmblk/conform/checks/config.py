"""Configuration space, as every device has it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.device import CONFIG_WIDTHS
from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.steps import small, until
from vmmblk.spec import BlkConfig, CommonCfg, DeviceStatus, Feature

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_FIELDS = {
    Feature.BLK_SIZE_MAX: (BlkConfig.SIZE_MAX,),
    Feature.BLK_SEG_MAX: (BlkConfig.SEG_MAX,),
    Feature.BLK_GEOMETRY: (BlkConfig.GEOMETRY,),
    Feature.BLK_BLK_SIZE: (BlkConfig.BLK_SIZE,),
    Feature.BLK_TOPOLOGY: (
        BlkConfig.PHYSICAL_BLOCK_EXP,
        BlkConfig.ALIGNMENT_OFFSET,
        BlkConfig.MIN_IO_SIZE,
        BlkConfig.OPT_IO_SIZE,
    ),
    Feature.BLK_CONFIG_WCE: (BlkConfig.WRITEBACK,),
    Feature.BLK_MQ: (BlkConfig.NUM_QUEUES,),
    Feature.BLK_DISCARD: (
        BlkConfig.MAX_DISCARD_SECTORS,
        BlkConfig.MAX_DISCARD_SEG,
        BlkConfig.DISCARD_SECTOR_ALIGNMENT,
    ),
    Feature.BLK_WRITE_ZEROES: (
        BlkConfig.MAX_WRITE_ZEROES_SECTORS,
        BlkConfig.MAX_WRITE_ZEROES_SEG,
        BlkConfig.WRITE_ZEROES_MAY_UNMAP,
    ),
    Feature.BLK_SECURE_ERASE: (
        BlkConfig.MAX_SECURE_ERASE_SECTORS,
        BlkConfig.MAX_SECURE_ERASE_SEG,
        BlkConfig.SECURE_ERASE_SECTOR_ALIGNMENT,
    ),
    Feature.BLK_ZONED: (
        BlkConfig.ZONE_SECTORS,
        BlkConfig.MAX_OPEN_ZONES,
        BlkConfig.MAX_ACTIVE_ZONES,
        BlkConfig.MAX_APPEND_SECTORS,
        BlkConfig.WRITE_GRANULARITY,
        BlkConfig.ZONED_MODEL,
    ),
}
"""What each feature brings."""


@check()
def fields_belong_to_features(target: Target) -> None:
    """The configuration holds every field that an offered feature brings (FEAT-008)."""
    with target.driver(start=False) as driver:
        length = driver.pci.device.length
        for feature, fields in _FIELDS.items():
            for field in fields:
                end = field + CONFIG_WIDTHS.get(field, 4)
                expect(
                    not target.offers(feature) or end <= length,
                    f"{feature.name} is offered, and the configuration ends at {length} before {field.name}",
                )


@check()
def capacity_is_there_at_once(target: Target) -> None:
    """The capacity can be read before FEATURES_OK, at every step (CFG-001)."""
    with target.driver() as driver:
        _as_when_live(driver, [BlkConfig.CAPACITY])


@check()
def offered_fields_are_there_at_once(target: Target) -> None:
    """Fields of offered features can be read before FEATURES_OK, whether they will be taken or not (CFG-002)."""
    offered = [field for feature, fields in _FIELDS.items() if target.offers(feature) for field in fields]
    with target.driver() as driver:
        end = driver.pci.device.length
        _as_when_live(driver, [field for field in offered if field + CONFIG_WIDTHS.get(field, 4) <= end])


@check()
def little_endian(target: Target) -> None:
    """Capacity and number of queues mean what they say when read as little-endian (CFG-003)."""
    with target.driver() as driver:
        if not target.facts.capacity:
            raise NotTestable("the disk is empty")
        driver.read(driver.capacity - target.block_sectors, target.facts.block_size)
        if driver.has(Feature.BLK_MQ):
            count = driver.config(BlkConfig.NUM_QUEUES)
            expect(1 <= count <= target.facts.queues, f"num_queues reads {count}, there are {target.facts.queues}")


@check()
def generation_counts_changes(target: Target) -> None:
    """Another capacity comes with another generation (CFG-004)."""
    with small(target) as driver:
        capacity, generation = driver.capacity, driver.device.get(CommonCfg.CONFIG_GENERATION)
        target.resize()
        until(driver, lambda: driver.capacity != capacity, f"the capacity still reads {capacity} after the resize")
        now = driver.device.get(CommonCfg.CONFIG_GENERATION)
        expect(now != generation, f"the capacity reads {driver.capacity} after {capacity}, the generation {now} still")


def _as_when_live(driver: VirtioBlk, fields: list[BlkConfig]) -> None:
    """Before FEATURES_OK these fields read what they read of the live device."""
    live = {field: driver.config(field) for field in fields}
    driver.device.reset()
    for status in (DeviceStatus(0), DeviceStatus.ACKNOWLEDGE, DeviceStatus(3)):
        if status:
            driver.device.status = status
        for field, value in live.items():
            found = driver.config(field)
            expect(found == value, f"{field.name} reads {found:#x} at status {status:#x}, and {value:#x} when live")
