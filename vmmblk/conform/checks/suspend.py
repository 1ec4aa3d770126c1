"""Suspending the device (SUSPEND)."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.steps import (
    Bait,
    Watch,
    answers,
    areas,
    busy,
    fence,
    fence_after_reset,
    go,
    negotiate,
    served,
    set_up,
    small,
    until,
)
from vmmblk.spec import BLK_CONFIG_SIZE, NO_VECTOR, BlkConfig, CommonCfg, DeviceStatus, Feature, Status

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_ROUNDS = 3
_BOTH = DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK


@check(Feature.SUSPEND, each_ring=True)
def status_bit_16(target: Target) -> None:
    """With SUSPEND negotiated the device is suspended by bit 16 of status (SUSPEND-001, RSVD-020)."""
    with small(target) as driver:
        served(target, driver)
        _suspended(driver)


@check(Feature.SUSPEND)
def not_before_driver_ok(target: Target) -> None:
    """SUSPEND has no effect before the initialization is complete (SUSPEND-002, HOSTILE-099)."""
    with small(target) as driver:
        device = driver.device
        device.reset()
        device.status = DeviceStatus.SUSPEND
        _no_suspend(driver, "after a reset")
        for done in (DeviceStatus.ACKNOWLEDGE, DeviceStatus(3)):
            device.reset()
            device.status |= DeviceStatus.ACKNOWLEDGE
            device.status |= done
            device.status |= DeviceStatus.SUSPEND
            _no_suspend(driver, f"at {done:#x}")
        negotiate(driver)
        device.status |= DeviceStatus.SUSPEND
        _no_suspend(driver, "after FEATURES_OK")
        set_up(driver)
        device.status |= DeviceStatus.SUSPEND
        _no_suspend(driver, "before DRIVER_OK")
        go(driver)
        fence(driver)
        expect(driver.status & _BOTH == DeviceStatus.DRIVER_OK, f"status reads {driver.status:#x} after DRIVER_OK")
        served(target, driver)


@check(Feature.SUSPEND, each_ring=True)
def it_suspends_or_gives_up(target: Target) -> None:
    """Asked to suspend, idle or busy, the device does, or needs a reset (SUSPEND-003)."""
    with small(target) as driver:
        for work in (0, 16):
            busy(target, driver, count=work)
            driver.device.status |= DeviceStatus.SUSPEND
            until(
                driver,
                lambda: driver.device.suspended or DeviceStatus.NEEDS_RESET in driver.status,
                "the device neither suspends nor asks for a reset",
            )
            driver.init()


@check(Feature.SUSPEND)
def what_a_suspended_device_shows(target: Target) -> None:
    """A suspended device shows SUSPEND and not DRIVER_OK (SUSPEND-004)."""
    with small(target) as driver:
        driver.device.status |= DeviceStatus.SUSPEND
        until(driver, lambda: DeviceStatus.SUSPEND in driver.status, "SUSPEND is never shown")
        expect(DeviceStatus.DRIVER_OK not in driver.status, f"status reads {driver.status:#x} when suspended")


@check(Feature.SUSPEND, each_ring=True)
def everything_is_settled_before(target: Target) -> None:
    """What was taken is used and notified before the device shows that it is suspended (SUSPEND-005 to 007)."""
    with small(target) as driver:
        for _ in range(_ROUNDS):
            began = time.monotonic()
            driver.wait_all(busy(target, driver))
            usual = time.monotonic() - began
            fence(driver)
            driver.take_interrupts()
            pending = busy(target, driver)
            _suspended(driver)
            told = driver.take_interrupts()
            watch = Watch(driver, ranges=[*areas(driver.queues[0]), *answers(pending)])
            done = driver.poll()
            expect(told or not done, f"{done} requests are used and the device is suspended without having notified")
            driver.ring_doorbell()
            fence(driver, 2 * usual)  # what was taken and is still under way would have ended by then
            watch.quiet("after the device showed that it is suspended")
            driver.init()


@check(Feature.SUSPEND, each_ring=True)
def silence(target: Target) -> None:
    """A suspended device touches no queue and notifies nothing, doorbell or not (SUSPEND-008, SUSPEND-009)."""
    _nothing_while_suspended(target)


@check(Feature.SUSPEND, each_ring=True)
def doorbells_while_suspended(target: Target) -> None:
    """New buffers and doorbells are left alone until the device is resumed, then served (HOSTILE-137)."""
    _nothing_while_suspended(target)


def _nothing_while_suspended(target: Target) -> None:
    with small(target) as driver:
        for _ in range(_ROUNDS):
            served(target, driver)
            _suspended(driver)
            bait, watch = Bait(target, driver), Watch(driver)
            for _ in range(4):
                driver.ring_doorbell()
                fence(driver)
            watch.quiet("while the device is suspended")
            expect(not bait.taken, "a request was taken while the device is suspended")
            bait.ripen()
            _resumed(driver)
            bait.eaten()


@check(Feature.SUSPEND)
def configuration_stands_still(target: Target) -> None:
    """A disk that grows meanwhile changes no configuration and is not notified (SUSPEND-010, SUSPEND-012)."""
    with small(target) as driver:
        _suspended(driver)
        before, watch = _configuration(driver), Watch(driver)
        target.resize()
        fence(driver)
        expect(_configuration(driver) == before, "the configuration changed while the device is suspended")
        watch.silent("while the device is suspended")


@check(Feature.SUSPEND)
def growth_is_told_on_resume(target: Target) -> None:
    """A configuration change that arose while suspended is notified once the device is resumed (SUSPEND-013)."""
    with small(target) as driver:
        before = driver.capacity
        _suspended(driver)
        Watch(driver)
        target.resize()
        fence(driver)
        _resumed(driver)
        driver.wait_config_change()
        expect(driver.capacity > before, f"the capacity reads {driver.capacity} after the change, {before} before")


@check(Feature.SUSPEND)
def writes_while_suspended(target: Target) -> None:
    """A suspended device ignores what is written to its configuration (SUSPEND-011)."""
    with small(target) as driver:
        if not driver.has(Feature.BLK_CONFIG_WCE):
            raise NotTestable("the disk has no configuration that can be written")
        _suspended(driver)
        before = driver.config(BlkConfig.WRITEBACK)
        driver.device.set_config(BlkConfig.WRITEBACK, before ^ 1)
        expect(driver.config(BlkConfig.WRITEBACK) == before, "writeback changed while the device is suspended")
        _resumed(driver)
        expect(driver.config(BlkConfig.WRITEBACK) == before, "writeback changed with the resumption")


@check(Feature.SUSPEND, each_ring=True)
def registers_while_suspended(target: Target) -> None:
    """Queue registers written while the device is suspended are ignored (HOSTILE-138)."""
    with small(target) as driver:
        device = driver.device
        device.set(CommonCfg.QUEUE_SELECT, 0)
        _suspended(driver)
        registers = (
            (CommonCfg.QUEUE_SIZE, 2),
            (CommonCfg.QUEUE_MSIX_VECTOR, NO_VECTOR),
            (CommonCfg.CONFIG_MSIX_VECTOR, NO_VECTOR),
            (CommonCfg.QUEUE_DESC, driver.queues[0].used),
            (CommonCfg.QUEUE_ENABLE, 0),
            (CommonCfg.DRIVER_FEATURE, 0),
        )
        for register, value in registers:
            before = device.get(register)
            device.set(register, value)
            now = device.get(register)
            expect(now == before, f"{register.name} reads {now:#x}, not {before:#x}, after a write while suspended")
        if target.offers(Feature.RING_RESET):
            device.set(CommonCfg.QUEUE_RESET, 1)
            fence(driver)
            found = device.get(CommonCfg.QUEUE_RESET), device.get(CommonCfg.QUEUE_ENABLE)
            expect(found == (0, 1), f"queue_reset and queue_enable read {found} after a write while suspended")
        _resumed(driver)
        served(target, driver)


@check(Feature.SUSPEND, each_ring=True)
def driver_ok_resumes(target: Target) -> None:
    """A suspended device that DRIVER_OK is written to resumes, or needs a reset (SUSPEND-014)."""
    with small(target) as driver:
        _suspended(driver)
        driver.device.status |= DeviceStatus.DRIVER_OK
        until(
            driver,
            lambda: not driver.device.suspended or DeviceStatus.NEEDS_RESET in driver.status,
            "the device neither resumes nor asks for a reset",
        )
        if DeviceStatus.NEEDS_RESET not in driver.status:
            served(target, driver)


@check(Feature.SUSPEND)
def what_a_resumed_device_shows(target: Target) -> None:
    """A resumed device shows DRIVER_OK and not SUSPEND, again and again (SUSPEND-015)."""
    with small(target) as driver:
        for _ in range(_ROUNDS):
            _suspended(driver)
            _resumed(driver)
            expect(driver.status & _BOTH == DeviceStatus.DRIVER_OK, f"status reads {driver.status:#x} when resumed")
            served(target, driver)


@check(Feature.SUSPEND, each_ring=True)
def nothing_is_lost(target: Target) -> None:
    """Requests that were under way when the device was suspended are all served, before or after (SUSPEND-014)."""
    with small(target) as driver:
        for _ in range(_ROUNDS):
            pending = busy(target, driver)
            _suspended(driver)
            _resumed(driver)
            driver.ring_doorbell()
            driver.wait_all(pending)
            failed = [each.status for each in pending if each.status != Status.OK]
            expect(not failed, f"reads were completed with {failed} around a suspension")


@check(Feature.SUSPEND, each_ring=True)
def reset_while_suspended(target: Target) -> None:
    """A reset ends a suspension, also one that is under way, and status reads 0 (HOSTILE-139)."""
    with small(target) as driver:
        for wait in (True, False):
            driver.init()
            busy(target, driver)
            driver.device.status |= DeviceStatus.SUSPEND
            if wait:
                until(driver, lambda: driver.device.suspended, "the device is never suspended")
            driver.device.reset()
            watch = Watch(driver)
            fence(driver)
            watch.quiet("after status read 0")
            fence_after_reset(target, driver)
            watch.untouched("after status read 0")


# The inside.


def _suspended(driver: VirtioBlk) -> None:
    """Suspend the device.  Raises NotTestable if it asks for a reset instead, as it may."""
    driver.device.status |= DeviceStatus.SUSPEND
    until(
        driver,
        lambda: driver.device.suspended or DeviceStatus.NEEDS_RESET in driver.status,
        f"asked to suspend, the device shows status {driver.status:#x}",
    )
    if DeviceStatus.NEEDS_RESET in driver.status:
        raise NotTestable("the device asks for a reset instead of suspending")


def _resumed(driver: VirtioBlk) -> None:
    """Resume the device.  Raises NotTestable if it asks for a reset instead, as it may."""
    driver.device.status |= DeviceStatus.DRIVER_OK
    until(
        driver,
        lambda: not driver.device.suspended or DeviceStatus.NEEDS_RESET in driver.status,
        f"asked to resume, the device shows status {driver.status:#x}",
    )
    if DeviceStatus.NEEDS_RESET in driver.status:
        raise NotTestable("the device asks for a reset instead of resuming")


def _no_suspend(driver: VirtioBlk, when: str) -> None:
    fence(driver)
    expect(DeviceStatus.SUSPEND not in driver.status, f"status reads {driver.status:#x}: SUSPEND was taken {when}")


def _configuration(driver: VirtioBlk) -> tuple[int, bytes]:
    """The generation, and every word of the configuration."""
    generation = driver.device.get(CommonCfg.CONFIG_GENERATION)
    words = range(0, min(driver.pci.device.length, BLK_CONFIG_SIZE) - 3, 4)
    return generation, b"".join(driver.device.config_bytes(at, 4) for at in words)
