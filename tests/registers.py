"""A virtio driver that is nothing but register accesses, for the tests of the device and its PCI function."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from vmmblk.block import BlockInfo, Operation, Topology
from vmmblk.device import Device, DeviceConfig, QueueConfig, StartQueue, configure
from vmmblk.spec import BlkConfig, CommonCfg, Feature

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmmblk.device import Effect

ALL = Operation.FLUSH | Operation.DISCARD | Operation.WRITE_ZEROES
DISK = BlockInfo(read_write=True, sector_size=512, size_sectors=2048)
VERSION_1 = Feature.VERSION_1.mask
ACKNOWLEDGED, NEGOTIATED, LIVE = 3, 11, 15

WIDTHS = {
    CommonCfg.DEVICE_FEATURE_SELECT: 4,
    CommonCfg.DEVICE_FEATURE: 4,
    CommonCfg.DRIVER_FEATURE_SELECT: 4,
    CommonCfg.DRIVER_FEATURE: 4,
    CommonCfg.DEVICE_STATUS: 1,
    CommonCfg.CONFIG_GENERATION: 1,
    CommonCfg.QUEUE_DESC: 8,
    CommonCfg.QUEUE_DRIVER: 8,
    CommonCfg.QUEUE_DEVICE: 8,
}


def a_config(**changes: Any) -> DeviceConfig:
    """A device with everything that is offered by default, and three queues, or one without MQ."""
    queues = 3 if changes.get("features", Feature.BLK_MQ.mask) & Feature.BLK_MQ.mask else 1
    return dataclasses.replace(configure(DISK, ALL, Topology(), queues=queues), **changes)


class Driver:
    """A driver of one device, register by register."""

    def __init__(self, config: DeviceConfig | None = None) -> None:
        self.device = Device(config or a_config())

    def read(self, register: CommonCfg) -> int:
        """Read a register in its own width."""
        return int.from_bytes(self.device.common_read(register, WIDTHS.get(register, 2)), "little")

    def write(self, register: CommonCfg, value: int) -> list[Effect]:
        """Write a register in its own width."""
        return self.device.common_write(register, value.to_bytes(WIDTHS.get(register, 2), "little"))

    @property
    def status(self) -> int:
        """The device_status register."""
        return self.read(CommonCfg.DEVICE_STATUS)

    @status.setter
    def status(self, value: int) -> None:
        self.write(CommonCfg.DEVICE_STATUS, value)

    def write_status(self, value: int) -> list[Effect]:
        """Write device_status and return the effects."""
        return self.write(CommonCfg.DEVICE_STATUS, value)

    def offered(self) -> int:
        """The offer, read through all windows of which the first two can be non-zero."""
        windows = []
        for select in range(4):
            self.write(CommonCfg.DEVICE_FEATURE_SELECT, select)
            windows.append(self.read(CommonCfg.DEVICE_FEATURE))
        return sum(window << 32 * select for select, window in enumerate(windows))

    def acknowledge(self, features: int) -> None:
        """Write the driver features."""
        for select in range(2):
            self.write(CommonCfg.DRIVER_FEATURE_SELECT, select)
            self.write(CommonCfg.DRIVER_FEATURE, features >> 32 * select & 0xFFFFFFFF)

    def negotiate(self, features: int | None = None) -> None:
        """Initialise up to FEATURES_OK, by default with everything offered."""
        self.status = 1
        self.status = ACKNOWLEDGED
        self.acknowledge(self.device.config.features if features is None else features)
        self.status = NEGOTIATED

    def set_up_queue(self, index: int = 0, size: int = 64) -> None:
        """Give a queue its size, vector and addresses."""
        self.write(CommonCfg.QUEUE_SELECT, index)
        self.write(CommonCfg.QUEUE_SIZE, size)
        self.write(CommonCfg.QUEUE_MSIX_VECTOR, index)
        self.write(CommonCfg.QUEUE_DESC, 0x1_0000_1000)
        self.write(CommonCfg.QUEUE_DRIVER, 0x2004)
        self.write(CommonCfg.QUEUE_DEVICE, 0x3004)

    def enable(self) -> list[Effect]:
        """Enable the selected queue."""
        return self.write(CommonCfg.QUEUE_ENABLE, 1)

    def go_live(self, features: int | None = None) -> list[Effect]:
        """Initialise with queue 0 up to DRIVER_OK; returns the effects of that."""
        self.negotiate(features)
        self.set_up_queue()
        self.enable()
        return self.write_status(LIVE)

    def config(self, field: BlkConfig, width: int) -> int:
        """Read a field of struct virtio_blk_config."""
        return int.from_bytes(self.device.config_read(field, width), "little")


def started(index: int = 0, size: int = 64, vector: int = 0) -> StartQueue:
    """What starts a queue that was set up by Driver.set_up_queue."""
    areas = (0x1_0000_1000, 0x2004, 0x3004)
    return StartQueue(QueueConfig(index, size, *areas, vector, event_idx=True, indirect=True, packed=True))


STAGES: dict[str, Callable[[Driver], object]] = {
    "untouched": lambda _: None,
    "acknowledged": lambda driver: driver.write_status(1),
    "negotiated": lambda driver: driver.negotiate(),
    "live": lambda driver: driver.go_live(),
    "broken": lambda driver: (driver.go_live(), driver.device.needs_reset()),
    "failed": lambda driver: (driver.go_live(), driver.write_status(0x80)),
}
"""How far a driver has come before a test begins."""
