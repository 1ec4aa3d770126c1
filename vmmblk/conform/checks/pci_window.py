"""The PCI_CFG capability: BARs reached through configuration space, rightly and wrongly."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmmblk.client.interrupts import Interrupts
from vmmblk.client.pci import PciDevice
from vmmblk.client.wire import Region
from vmmblk.conform.check import check, expect
from vmmblk.conform.function import (
    VirtioCap,
    Window,
    capabilities,
    expect_signal,
    negotiate,
    only,
    plain,
    require_intx,
    ring,
    submit,
)
from vmmblk.conform.steps import served
from vmmblk.spec import BlkConfig, CommonCfg, DeviceStatus, IsrStatus, PciCapType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.pci import PciDevice as Function
    from vmmblk.conform.target import Target

_LENGTHS = (0, 3, 5, 8, 0xFFFFFFFF)


def _common(pci: Function) -> VirtioCap:
    return only(pci, PciCapType.COMMON_CFG)[0]


# Rightly.


@check()
def fields_are_writable(target: Target) -> None:
    """The PCI_CFG capability is there; its bar, offset and length read back as written (PCI-092, PCI-093)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        expect(only(pci, PciCapType.PCI_CFG), "there is no PCI_CFG capability")
        window = Window(pci)
        for each in capabilities(pci):
            if each.structured:
                for length in (1, 2, 4):
                    aimed = (each.bar, each.offset, length)
                    window.aim(*aimed)
                    expect(window.target == aimed, f"bar, offset and length read {window.target} of {aimed}")
        window.aim(0, 0, 0)


@check()
def reads_through_the_window(target: Target) -> None:
    """pci_cfg_data reads 1, 2 or 4 bytes of the BAR, as a direct access does (PCI-094, PCI-096)."""
    with target.driver() as driver:
        common, window = _common(driver.pci), Window(driver.pci)
        driver.device.select_queue(0)
        for register, width in (
            (CommonCfg.DEVICE_STATUS, 1),
            (CommonCfg.NUM_QUEUES, 2),
            (CommonCfg.QUEUE_SIZE, 2),
            (CommonCfg.QUEUE_DESC, 4),
            (CommonCfg.DEVICE_FEATURE, 4),
        ):
            window.aim(common.bar, common.offset + register, width)
            seen, direct = window.read(width), driver.pci.common.read(register, width)
            expect(seen == direct, f"{register.name} is {direct:#x}, and {seen:#x} through the window")
        config = only(driver.pci, PciCapType.DEVICE_CFG)[0]
        for width in (1, 2, 4):
            window.aim(config.bar, config.offset + BlkConfig.CAPACITY, width)
            seen, direct = window.read(width), driver.pci.device.read(BlkConfig.CAPACITY, width)
            expect(seen == direct, f"{width} bytes of the capacity are {direct:#x}, and {seen:#x} through the window")


@check()
def writes_through_the_window(target: Target) -> None:
    """A write to pci_cfg_data writes its first 1, 2 or 4 bytes to the BAR, and no more (PCI-094, PCI-095)."""
    with target.driver(start=False) as driver:
        negotiate(driver, target.mask())
        common, window, device = _common(driver.pci), Window(driver.pci), driver.device
        device.select_queue(0)
        window.aim(common.bar, common.offset + CommonCfg.QUEUE_DESC, 4)
        window.write(0x12340000)
        expect(device.get(CommonCfg.QUEUE_DESC) == 0x12340000, "4 bytes written through the window do not arrive")
        window.aim(common.bar, common.offset + CommonCfg.QUEUE_SELECT, 2)
        for value in (0xFFFF, 0):
            window.write(value)
            back = device.get(CommonCfg.QUEUE_SELECT)
            expect(back == value, f"{value:#x} written to queue_select through the window reads {back:#x}")
        size = device.get(CommonCfg.QUEUE_SIZE)
        window.write(size // 2 << 16)
        back = device.get(CommonCfg.QUEUE_SIZE)
        expect(back == size, f"2 bytes written to queue_select through the window make queue_size {back} of {size}")
        window.aim(common.bar, common.offset + CommonCfg.DEVICE_STATUS, 1)
        window.write(driver.status | 1 << 16)
        back = device.get(CommonCfg.QUEUE_SELECT)
        expect(back == 0, f"1 byte written to the status through the window makes queue_select {back:#x}")
        window.write(0)
        driver.reset()


@check(each_ring=True)
def a_driver_by_the_window(target: Target) -> None:
    """Initialisation, doorbells, I/O and reset work through the window alone (PCI-097)."""
    with target.driver(window=True) as driver:
        for _ in range(2):
            for _ in range(3):
                served(target, driver)
            driver.reset()
            driver.init()


@check()
def the_isr_by_the_window(target: Target) -> None:
    """Through the window the ISR reads as it does directly, and is cleared (PCI-097)."""
    with _pending_isr(target) as driver:
        isr, window = only(driver.pci, PciCapType.ISR_CFG)[0], Window(driver.pci)
        window.aim(isr.bar, isr.offset, 1)
        first, second = window.read(1), driver.pci.isr.read(0, 1)
        expect(first & IsrStatus.QUEUE, f"through the window the ISR reads {first:#x} with an interrupt")
        expect(second == 0, f"read through the window, the ISR still reads {second:#x}")


@contextlib.contextmanager
def _pending_isr(target: Target) -> Iterator[VirtioBlk]:
    """A driver with INTx asserted for a used buffer, and the ISR not read yet.  Raises NotOffered without INTx."""
    with target.connection() as connection:
        require_intx(PciDevice(connection))
    with target.driver(features=plain(target), interrupts=Interrupts.INTX) as driver:
        driver.queues[0].arm()
        submit(target, driver)
        ring(driver)
        expect_signal(driver.lines.config_line, target.options.timeout, "INTx is not asserted for a used buffer")
        yield driver


# Wrongly.


@check()
def a_copy_of_the_space(target: Target) -> None:
    """All of configuration space read at once, as a VMM does, does not act on the window (HOSTILE-127)."""
    with _pending_isr(target) as driver:
        isr, window = only(driver.pci, PciCapType.ISR_CFG)[0], Window(driver.pci)
        window.aim(isr.bar, isr.offset, 1)
        driver.pci.config_read(0, min(driver.connection.region_info(Region.CONFIG).size, 4096))
        driver.pci.config_read(window.position, 20)
        seen = driver.pci.isr.read(0, 1)
        expect(seen & IsrStatus.QUEUE, f"a copy of configuration space was read, and now the ISR reads {seen:#x}")


@check()
def lengths_that_are_none(target: Target) -> None:
    """With length 0, 3, 5, 8 or 0xFFFFFFFF the window makes no access (HOSTILE-127)."""
    with _pending_isr(target) as driver:
        common, isr = _common(driver.pci), only(driver.pci, PciCapType.ISR_CFG)[0]
        window = Window(driver.pci)
        status = common.offset + CommonCfg.DEVICE_STATUS
        for length in _LENGTHS:
            window.aim(isr.bar, isr.offset, length)
            window.read(1)
            window.read()
            for offset in range(max(status - 3, 0), status + 1):
                window.aim(common.bar, offset, length)
                window.read()
                window.write(0)
                expect(driver.status & DeviceStatus.DRIVER_OK, f"a write of length {length:#x} reached the status")
        seen = driver.pci.isr.read(0, 1)
        expect(seen & IsrStatus.QUEUE, "a read of a length that is none cleared the ISR")
        driver.poll()
        served(target, driver)
