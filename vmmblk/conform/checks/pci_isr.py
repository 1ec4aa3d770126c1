"""The ISR status byte, the Interrupt Status bit and INTx."""

from __future__ import annotations

import contextlib
import struct
import time
from typing import TYPE_CHECKING

from vmmblk.client.interrupts import Interrupts
from vmmblk.client.pci import PciDevice
from vmmblk.client.wire import IrqIndex
from vmmblk.conform.check import check, expect
from vmmblk.conform.function import (
    COMMAND,
    INTX_DISABLE,
    STATUS,
    STATUS_INTERRUPT,
    change_config,
    expect_signal,
    fired,
    only,
    plain,
    require_intx,
    require_msix,
    ring,
    submit,
)
from vmmblk.spec import IsrStatus, PciCapType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target


@contextlib.contextmanager
def _by_line(target: Target) -> Iterator[VirtioBlk]:
    """A driver with MSI-X disabled.  Raises NotOffered without INTx."""
    with target.connection() as connection:
        require_intx(PciDevice(connection))
    with target.driver(features=plain(target), interrupts=Interrupts.INTX) as driver:
        yield driver


def _interrupt(target: Target, driver: VirtioBlk) -> None:
    """Have a request completed and wait for INTx."""
    driver.poll()
    driver.queues[0].arm()
    submit(target, driver)
    ring(driver)
    expect_signal(driver.lines.config_line, target.options.timeout, "INTx is not asserted for a used buffer")


def _shown(driver: VirtioBlk) -> bool:
    return bool(driver.pci.config_field(STATUS, 2) & STATUS_INTERRUPT)


@check()
def isr_capability(target: Target) -> None:
    """An ISR_CFG capability is there, of at least a byte (PCI-073, PCI-074)."""
    with target.connection() as connection:
        found = only(PciDevice(connection), PciCapType.ISR_CFG)
        expect(found, "there is no ISR_CFG capability")
        for each in found:
            expect(each.length >= 1, f"the {each.name} has no bytes")


@check()
def used_buffers(target: Target) -> None:
    """With MSI-X disabled a used buffer asserts INTx, with bit 0 of the ISR set before (PCI-076, PCI-112)."""
    with _by_line(target) as driver:
        _interrupt(target, driver)
        isr = driver.pci.isr.read(0, 1)
        expect(isr & IsrStatus.QUEUE, f"INTx came for a used buffer, and the ISR reads {isr:#x}")


@check()
def reading_clears(target: Target) -> None:
    """A read of the ISR returns its bits and clears them (PCI-079)."""
    with _by_line(target) as driver:
        for _ in range(2):
            _interrupt(target, driver)
            first, second = driver.pci.isr.read(0, 1), driver.pci.isr.read(0, 1)
            expect(first and not second, f"the ISR reads {first:#x}, then {second:#x}")


@check()
def reading_lowers_the_line(target: Target) -> None:
    """A read of the ISR de-asserts INTx: unmasked, it does not come again until the next event (PCI-080)."""
    with _by_line(target) as driver:
        line = driver.lines.config_line
        for _ in range(2):
            _interrupt(target, driver)
            driver.pci.isr.read(0, 1)
            driver.connection.unmask_irqs(IrqIndex.INTX)
            expect(line is not None and not fired(line), "INTx is asserted after the ISR was read")


@check()
def interrupt_status_bit(target: Target) -> None:
    """With MSI-X disabled Interrupt Status in PCI status is set while a bit of the ISR is (PCI-077)."""
    with _by_line(target) as driver:
        for _ in range(2):
            expect(not _shown(driver), "Interrupt Status is set with no interrupt")
            _interrupt(target, driver)
            expect(_shown(driver), "Interrupt Status is clear with an interrupt in the ISR")
            driver.pci.isr.read(0, 1)
        expect(not _shown(driver), "Interrupt Status is set after the ISR was read")


@check()
def interrupt_disable(target: Target) -> None:
    """With Interrupt Disable in the command register INTx waits, and comes when that is cleared (PCI-078)."""
    with _by_line(target) as driver:
        pci, line = driver.pci, driver.lines.config_line
        command = pci.config_field(COMMAND, 2)
        pci.config_write(COMMAND, struct.pack("<H", command | INTX_DISABLE))
        driver.queues[0].arm()
        submit(target, driver)
        ring(driver)
        deadline = time.monotonic() + target.options.timeout
        while not _shown(driver):
            expect(
                time.monotonic() < deadline, "Interrupt Status is clear with Interrupt Disable set and a used buffer"
            )
        expect(line is not None and not fired(line), "INTx is asserted with Interrupt Disable set")
        pci.config_write(COMMAND, struct.pack("<H", command))
        expect_signal(line, target.options.timeout, "INTx is not asserted after Interrupt Disable was cleared")


@check()
def reserved_bits(target: Target) -> None:
    """Bits of the ISR other than the lowest two read 0 (PCI-081)."""
    with _by_line(target) as driver:
        _interrupt(target, driver)
        isr = driver.pci.isr.read(0, 1)
        expect(isr & ~(IsrStatus.QUEUE | IsrStatus.CONFIG) == 0, f"the ISR reads {isr:#x}")


@check()
def configuration_bit_with_msix(target: Target) -> None:
    """Bit 1 of the ISR is set before a configuration change notification, with MSI-X enabled (PCI-075)."""
    with target.connection() as connection:
        require_msix(PciDevice(connection))
    with target.driver(features=plain(target), interrupts=Interrupts.MSIX) as driver:
        change_config(target, driver)
        line = driver.lines.config_line
        expect_signal(line, target.options.timeout, "a configuration change is not told")
        isr = driver.pci.isr.read(0, 1)
        expect(isr & IsrStatus.CONFIG, f"a configuration change was told, and the ISR reads {isr:#x}")


@check()
def configuration_changes(target: Target) -> None:
    """With MSI-X disabled a configuration change asserts INTx, with bit 1 of the ISR set before (PCI-075, PCI-113)."""
    with _by_line(target) as driver:
        change_config(target, driver)
        line = driver.lines.config_line
        expect_signal(line, target.options.timeout, "INTx is not asserted for a configuration change")
        isr = driver.pci.isr.read(0, 1)
        expect(isr & IsrStatus.CONFIG, f"INTx came for a configuration change, and the ISR reads {isr:#x}")
