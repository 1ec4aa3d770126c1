"""Resetting the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import NotOffered, check, expect
from vmmblk.conform.steps import (
    Bait,
    Watch,
    busy,
    fence,
    fence_after_reset,
    needs_reset,
    negotiate,
    served,
    set_up,
    small,
)
from vmmblk.spec import NO_VECTOR, CommonCfg, DeviceStatus, Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_ROUNDS = 3
_QUEUES_MAX = 8
_COMMAND = 0x04
_COMMAND_ENABLED = 0x07
_MSIX_ENABLE = 0x8000
_INFO_RESET = 1


@check(each_ring=True)
def in_any_state(target: Target) -> None:
    """A reset is accepted in any state, and status reads 0 after it (RST-001, RST-005)."""
    with small(target) as driver:
        for state, reach in _states(target, driver):
            reach()
            try:
                driver.device.reset()
            except TimeoutError:
                expect(False, f"status still reads {driver.status:#x} after a reset {state}")  # noqa: FBT003
        driver.init()
        served(target, driver)


@check(each_ring=True)
def in_need_of_it(target: Target) -> None:
    """A reset is accepted by a device that needs one, and makes it serve again (RST-005)."""
    with small(target) as driver:
        needs_reset(driver)
        driver.init()
        expect(DeviceStatus.NEEDS_RESET not in driver.status, f"status reads {driver.status:#x} after the reset")
        served(target, driver)


@check(each_ring=True)
def nothing_after_status_0(target: Target) -> None:
    """Requests in flight neither write memory nor notify once status reads 0 (RST-002 to 004, HOSTILE-107)."""
    with small(target) as driver:
        for _ in range(_ROUNDS):
            driver.init()
            busy(target, driver)
            driver.device.reset()
            watch = Watch(driver)
            _nothing_more(target, driver, watch, "after status read 0")


@check(each_ring=True)
def no_queue_is_live_after_it(target: Target) -> None:
    """After a reset no queue is live: doorbells touch neither ring nor buffers (STAT-011, RST-003, HOSTILE-091)."""
    with small(target) as driver:
        served(target, driver)
        driver.device.reset()
        bait, watch = Bait(target, driver), Watch(driver)
        for _ in range(4):
            driver.ring_doorbell()
            fence(driver)
        _nothing_more(target, driver, watch, "after a reset")
        expect(not bait.taken, "a request was taken after a reset")


@check(each_ring=True)
def everything_is_initial(target: Target) -> None:
    """After a reset features, queues and vectors are at their initial values (RST-006)."""
    with small(target) as driver:
        served(target, driver)
        driver.device.reset()
        for what, value, initial in _registers(target, driver):
            expect(value == initial, f"after a reset {what} reads {value:#x}, not {initial:#x}")
        driver.init()
        served(target, driver)


# Hostile drivers.


@check(each_ring=True)
def again_and_again(target: Target) -> None:
    """Resets written while one is under way end in status 0 and a clean state (HOSTILE-106)."""
    with small(target) as driver:
        for _ in range(_ROUNDS):
            busy(target, driver)
            for _ in range(8):
                driver.device.status = DeviceStatus(0)
            driver.device.reset()
            watch = Watch(driver)
            fence(driver)
            watch.quiet("after status read 0")
            driver.init()
            served(target, driver)


@check(each_ring=True)
def writes_before_it_has_ended(target: Target) -> None:
    """Writes while a reset is pending are ignored or applied after it (HOSTILE-108)."""
    device_writes = (
        (CommonCfg.DEVICE_STATUS, 1),
        (CommonCfg.DEVICE_STATUS, 15),
        (CommonCfg.QUEUE_SELECT, 0),
        (CommonCfg.QUEUE_ENABLE, 1),
    )
    with small(target) as driver:
        for _ in range(_ROUNDS):
            busy(target, driver)
            driver.device.status = DeviceStatus(0)
            for register, value in device_writes:
                driver.device.set(register, value)
            driver.ring_doorbell()
            fence(driver)
            driver.device.reset()
            watch = Watch(driver)
            fence_after_reset(target, driver)
            watch.untouched("after a reset that was followed by other writes")
            driver.init()
            served(target, driver)


@check(each_ring=True)
def of_the_function(target: Target) -> None:
    """A reset of the PCI function leaves a live device as a reset does, and PCI at its initial values (HOSTILE-136)."""
    with small(target) as driver:
        if not driver.connection.get_info().flags & _INFO_RESET:
            raise NotOffered("the device says that it cannot be reset as a whole")
        busy(target, driver)
        driver.connection.device_reset()
        watch = Watch(driver)
        command = driver.pci.config_field(_COMMAND, 2) & _COMMAND_ENABLED
        expect(not command, f"the command register still has {command:#x}")
        if driver.pci.msix is not None:
            control = driver.pci.config_field(driver.pci.msix.position + 2, 2)
            expect(not control & _MSIX_ENABLE, "MSI-X is still enabled")
        driver.pci.enable()
        expect(driver.status == 0, f"status reads {driver.status:#x}")
        for what, value, initial in _registers(target, driver):
            expect(value == initial, f"{what} reads {value:#x}, not {initial:#x}")
        watch.untouched("after the function was reset")
        driver.init()
        served(target, driver)


# The inside.


def _nothing_more(target: Target, driver: VirtioBlk, watch: Watch, when: str) -> None:
    """A device that was reset leaves memory alone and does not interrupt, then and while another driver is served."""
    fence(driver)
    watch.quiet(when)
    fence_after_reset(target, driver)
    watch.untouched(when)
    if driver.pci.msix is not None:  # INTx is the other driver's, too
        watch.silent(when)


def _states(target: Target, driver: VirtioBlk) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each state in which a device can be reset, and how to get there."""

    def negotiated() -> None:
        driver.init()
        negotiate(driver)

    def configured() -> None:
        negotiated()
        set_up(driver)

    def write(*values: int) -> Callable[[], None]:
        def run() -> None:
            for value in values:
                driver.device.status = DeviceStatus(value)

        return run

    def failed() -> None:
        driver.init()
        driver.device.status |= DeviceStatus.FAILED

    def working() -> None:
        driver.init()
        busy(target, driver)

    yield "of a live device", driver.init
    yield "after a reset", write()
    yield "after ACKNOWLEDGE", write(1)
    yield "after DRIVER", write(1, 3)
    yield "after FEATURES_OK", negotiated
    yield "after the queues were set up", configured
    yield "with requests in flight", working
    yield "after FAILED", failed


def _registers(target: Target, driver: VirtioBlk) -> Iterator[tuple[str, int, int]]:
    """What registers read, and what they read initially."""
    device = driver.device
    for window in range(2):
        device.set(CommonCfg.DRIVER_FEATURE_SELECT, window)
        yield f"driver_feature {window}", device.get(CommonCfg.DRIVER_FEATURE), 0
    vectors = driver.pci.msix is not None
    if vectors:
        yield "config_msix_vector", device.get(CommonCfg.CONFIG_MSIX_VECTOR), NO_VECTOR
    for queue in range(min(target.facts.queues, _QUEUES_MAX)):
        size = device.select_queue(queue)
        if queue == 0:
            yield "queue_size", size, target.facts.queue_size
        yield f"queue_enable of queue {queue}", device.get(CommonCfg.QUEUE_ENABLE), 0
        if vectors:
            yield f"queue_msix_vector of queue {queue}", device.get(CommonCfg.QUEUE_MSIX_VECTOR), NO_VECTOR
        if target.offers(Feature.RING_RESET):
            yield f"queue_reset of queue {queue}", device.get(CommonCfg.QUEUE_RESET), 0
