"""A virtio device's registers as a driver uses them: status, features, queues, device configuration.

Each method is one step of "Device Initialization" or its like; the order is the caller's, right or wrong.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmmblk.client.errors import ProtocolError
from vmmblk.spec import BlkConfig, CommonCfg, DeviceStatus

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmmblk.client.pci import PciDevice
    from vmmblk.client.queue import Virtqueue

__all__ = ["CONFIG_WIDTHS", "VirtioDevice"]

_WIDTHS = {
    CommonCfg.DEVICE_FEATURE_SELECT: 4,
    CommonCfg.DEVICE_FEATURE: 4,
    CommonCfg.DRIVER_FEATURE_SELECT: 4,
    CommonCfg.DRIVER_FEATURE: 4,
    CommonCfg.DEVICE_STATUS: 1,
    CommonCfg.CONFIG_GENERATION: 1,
    CommonCfg.QUEUE_DESC: 8,
    CommonCfg.QUEUE_DRIVER: 8,
    CommonCfg.QUEUE_DEVICE: 8,
}  # the others are 2

CONFIG_WIDTHS = {
    BlkConfig.CAPACITY: 8,
    BlkConfig.GEOMETRY: 4,
    BlkConfig.PHYSICAL_BLOCK_EXP: 1,
    BlkConfig.ALIGNMENT_OFFSET: 1,
    BlkConfig.MIN_IO_SIZE: 2,
    BlkConfig.WRITEBACK: 1,
    BlkConfig.NUM_QUEUES: 2,
    BlkConfig.WRITE_ZEROES_MAY_UNMAP: 1,
    BlkConfig.ZONED_MODEL: 1,
}
"""Bytes of each field of the block configuration; those not named are 4."""

_FEATURE_WINDOWS = 2
_PAUSE = 0.001
_GENERATION_TRIES = 16


class VirtioDevice:
    """The registers of the device behind ``pci``.  ``timeout`` bounds the waits for a reset, seconds."""

    def __init__(self, pci: PciDevice, timeout: float = 5.0) -> None:
        self.pci = pci
        self.timeout = timeout

    def get(self, register: CommonCfg) -> int:
        """A register of the common configuration, in its own width."""
        return self.pci.common.read(register, _WIDTHS.get(register, 2))

    def set(self, register: CommonCfg, value: int) -> None:
        """Write a register of the common configuration; 64-bit ones in two halves, as drivers do."""
        width = _WIDTHS.get(register, 2)
        if width == 8:
            self.pci.common.write(register, 4, value & 0xFFFFFFFF)
            self.pci.common.write(register + 4, 4, value >> 32)
        else:
            self.pci.common.write(register, width, value)

    # Status and features.

    @property
    def status(self) -> DeviceStatus:
        """The device status; assigning writes it."""
        return DeviceStatus(self.get(CommonCfg.DEVICE_STATUS))

    @status.setter
    def status(self, value: int) -> None:
        self.set(CommonCfg.DEVICE_STATUS, value)

    def suspend(self) -> None:
        """Suspend the device (SUSPEND) and wait until it shows that it is.  Raises TimeoutError."""
        self.status |= DeviceStatus.SUSPEND
        self._await(lambda: self.suspended, "the device is not suspended")

    def resume(self) -> None:
        """Let a suspended device go on, and wait until it does.  Raises TimeoutError."""
        self.status |= DeviceStatus.DRIVER_OK
        self._await(lambda: not self.suspended, "the device is not resumed")

    @property
    def suspended(self) -> bool:
        """Whether the status is that of a suspended device: SUSPEND and not DRIVER_OK."""
        return self.status & (DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK) == DeviceStatus.SUSPEND

    def reset(self) -> None:
        """Write status 0 and wait until it reads 0.  Raises TimeoutError."""
        self.status = DeviceStatus(0)
        self._await(lambda: self.get(CommonCfg.DEVICE_STATUS) == 0, "the device does not end its reset")

    def greet(self) -> None:
        """Set ACKNOWLEDGE, then DRIVER, as a driver does after a reset."""
        self.status |= DeviceStatus.ACKNOWLEDGE
        self.status |= DeviceStatus.DRIVER

    @property
    def features(self) -> int:
        """The features that the device offers, as a mask of 64 bits."""
        mask = 0
        for window in range(_FEATURE_WINDOWS):
            self.set(CommonCfg.DEVICE_FEATURE_SELECT, window)
            mask |= self.get(CommonCfg.DEVICE_FEATURE) << 32 * window
        return mask

    def accept(self, mask: int) -> bool:
        """Write the driver's features, set FEATURES_OK, and tell whether the device took them."""
        for window in range(_FEATURE_WINDOWS):
            self.set(CommonCfg.DRIVER_FEATURE_SELECT, window)
            self.set(CommonCfg.DRIVER_FEATURE, mask >> 32 * window & 0xFFFFFFFF)
        self.status |= DeviceStatus.FEATURES_OK
        return bool(self.status & DeviceStatus.FEATURES_OK)

    # Queues.

    def select_queue(self, index: int) -> int:
        """Select a queue; returns its size, 0 where there is none."""
        self.set(CommonCfg.QUEUE_SELECT, index)
        return self.get(CommonCfg.QUEUE_SIZE)

    def queue_size(self, index: int, wanted: int | None) -> int:
        """Select a queue and settle its size: what the device says, or less if ``wanted`` is less.

        Raises ProtocolError if there is no such queue or the device does not take the size.
        """
        size = self.select_queue(index)
        if size == 0:
            raise ProtocolError(f"the device has no queue {index}")
        if wanted is not None and wanted < size:
            self.set(CommonCfg.QUEUE_SIZE, wanted)
            size = self.get(CommonCfg.QUEUE_SIZE)
            if size != wanted:
                raise ProtocolError(f"wrote queue size {wanted}, read back {size}")
        return size

    def start_queue(self, queue: Virtqueue, vector: int) -> None:
        """Tell the device where a queue is, give it its MSI-X vector, and enable it.

        Raises ProtocolError if the vector is refused.
        """
        self.set(CommonCfg.QUEUE_SELECT, queue.index)
        self.set(CommonCfg.QUEUE_DESC, queue.desc)
        self.set(CommonCfg.QUEUE_DRIVER, queue.avail)
        self.set(CommonCfg.QUEUE_DEVICE, queue.used)
        self._set_vector(CommonCfg.QUEUE_MSIX_VECTOR, vector)
        self.set(CommonCfg.QUEUE_ENABLE, 1)

    def set_config_vector(self, vector: int) -> None:
        """Give configuration changes their MSI-X vector.  Raises ProtocolError if it is refused."""
        self._set_vector(CommonCfg.CONFIG_MSIX_VECTOR, vector)

    def reset_queue(self, index: int) -> None:
        """Reset one queue (RING_RESET) and wait for its end.  Raises TimeoutError."""
        self.set(CommonCfg.QUEUE_SELECT, index)
        self.set(CommonCfg.QUEUE_RESET, 1)
        self._await(lambda: self.get(CommonCfg.QUEUE_RESET) == 0, f"the device does not end the reset of queue {index}")

    def notify_id(self, index: int) -> int:
        """What the doorbell of queue ``index`` carries with NOTIF_CONFIG_DATA negotiated."""
        self.set(CommonCfg.QUEUE_SELECT, index)
        return self.get(CommonCfg.QUEUE_NOTIF_CONFIG_DATA)

    def notify_offset(self, index: int) -> int:
        """Where in the notification structure queue ``index`` has its doorbell."""
        self.set(CommonCfg.QUEUE_SELECT, index)
        return self.get(CommonCfg.QUEUE_NOTIFY_OFF) * self.pci.notify_off_multiplier

    # Device configuration.

    def config_bytes(self, offset: int, length: int) -> bytes:
        """Bytes of the device configuration, in one access."""
        return self.pci.device.read_bytes(offset, length)

    def config(self, field: BlkConfig) -> int:
        """A field of the block configuration, consistent however many accesses it takes (config_generation)."""
        width = CONFIG_WIDTHS.get(field, 4)
        if width < 8:
            return self.pci.device.read(field, width)
        for _ in range(_GENERATION_TRIES):
            before = self.get(CommonCfg.CONFIG_GENERATION)
            value = self.pci.device.read(field, 4) | self.pci.device.read(field + 4, 4) << 32
            if self.get(CommonCfg.CONFIG_GENERATION) == before:
                return value
        raise ProtocolError("config_generation changes at every read")

    def set_config(self, field: BlkConfig, value: int) -> None:
        """Write a field of the block configuration."""
        self.pci.device.write(field, CONFIG_WIDTHS.get(field, 4), value)

    def _set_vector(self, register: CommonCfg, vector: int) -> None:
        self.set(register, vector)
        if (back := self.get(register)) != vector:
            raise ProtocolError(f"{register.name} {vector:#x} was refused, reads {back:#x}")

    def _await(self, done: Callable[[], bool], complaint: str) -> None:
        deadline = time.monotonic() + self.timeout
        while not done():
            if time.monotonic() > deadline:
                raise TimeoutError(complaint)
            time.sleep(_PAUSE)  # nothing interrupts at the end of a reset
