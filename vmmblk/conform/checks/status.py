"""Device status."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import check, expect
from vmmblk.spec import DeviceStatus

if TYPE_CHECKING:
    from vmmblk.conform.target import Target


@check()
def zero_at_power_on(target: Target) -> None:
    """The status reads 0 before the driver has written anything (STAT-001)."""
    with target.driver(start=False) as driver:
        expect(driver.status == 0, f"status reads {driver.status:#x}")


@check()
def bits_read_back(target: Target) -> None:
    """Each bit that the driver adds reads back, in the order of the initialization (STAT-002)."""
    with target.driver(start=False) as driver:
        driver.reset()
        for bit in (DeviceStatus.ACKNOWLEDGE, DeviceStatus.DRIVER):
            driver.device.status |= bit
            expect(bit in driver.status, f"{bit.name} does not read back, status is {driver.status:#x}")
