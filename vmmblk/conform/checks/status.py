"""Device status."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmmblk.client.errors import RemoteError
from vmmblk.conform.check import check, expect
from vmmblk.conform.steps import Bait, Watch, fence, go, needs_reset, negotiate, served, set_up, settings, small
from vmmblk.spec import CommonCfg, DeviceStatus, Feature

if TYPE_CHECKING:
    from vmmblk.conform.target import Target

_QUEUES_MAX = 8
_UNDEFINED = DeviceStatus(32)


@check()
def zero_at_power_on(target: Target) -> None:
    """The status reads 0 before the driver has written anything (STAT-001)."""
    with target.driver(start=False) as driver:
        with contextlib.suppress(RemoteError):  # a device that cannot be reset as a whole is as its last client left it
            driver.connection.device_reset()
        expect(driver.status == 0, f"status reads {driver.status:#x}")


@check()
def bits_read_back(target: Target) -> None:
    """Each bit that the driver adds reads back, in the order of the initialization (STAT-002)."""
    with target.driver() as driver:
        device = driver.device
        device.reset()
        for bit in (DeviceStatus.ACKNOWLEDGE, DeviceStatus.DRIVER):
            device.status |= bit
            expect(bit in driver.status, f"{bit.name} does not read back, status is {driver.status:#x}")
        expect(device.accept(driver.features), f"FEATURES_OK does not read back, status is {driver.status:#x}")
        set_up(driver)
        go(driver)
        wanted = DeviceStatus(15)
        expect(driver.status == wanted, f"status reads {driver.status:#x} after {wanted:#x} was written")


@check(each_ring=True)
def nothing_before_driver_ok(target: Target) -> None:
    """Before DRIVER_OK no buffer is taken and no interrupt comes, doorbell or not (STAT-003, STAT-004, HOSTILE-083)."""
    with small(target) as driver:
        negotiate(driver)
        set_up(driver)
        bait, watch = Bait(target, driver), Watch(driver)
        for _ in range(4):
            driver.ring_doorbell()
            fence(driver)
        watch.quiet("before DRIVER_OK")
        bait.ripen()
        go(driver)
        bait.eaten()


@check(each_ring=True)
def every_queue_starts_with_driver_ok(target: Target) -> None:
    """Buffers queued before DRIVER_OK are served after it, from every queue that was enabled (STAT-005, STAT-010)."""
    count = min(target.facts.queues, _QUEUES_MAX)
    with small(target, queues=count if target.offers(Feature.BLK_MQ) else 1) as driver:
        negotiate(driver)
        set_up(driver)
        baits = [Bait(target, driver, queue.index, ripe=True) for queue in driver.queues]
        go(driver)
        for bait in baits:
            bait.eaten()


@check(each_ring=True)
def what_is_beyond_repair_asks_for_a_reset(target: Target) -> None:
    """A device that a corrupt ring leaves in need of a reset says so (STAT-006)."""
    with small(target) as driver:
        needs_reset(driver)


@check(each_ring=True)
def needing_a_reset_is_notified(target: Target) -> None:
    """DEVICE_NEEDS_RESET on a live device comes with a configuration change notification (STAT-007, STAT-008)."""
    with small(target) as driver:
        needs_reset(driver)
        driver.wait_config_change()


@check()
def features_ok_stays(target: Target) -> None:
    """FEATURES_OK reads 1 after the driver has taken what it can of the offer (STAT-009)."""
    with target.driver() as driver:
        negotiate(driver)


@check()
def failed_stays_until_reset(target: Target) -> None:
    """FAILED reads back until the reset, and nothing is notified because of it (STAT-012)."""
    with small(target) as driver:
        watch = Watch(driver)
        driver.device.status |= DeviceStatus.FAILED
        for _ in range(2):
            expect(DeviceStatus.FAILED in driver.status, f"status reads {driver.status:#x} after FAILED was written")
            fence(driver)
        watch.silent("after FAILED")
        driver.device.reset()


# Hostile drivers.


@check(each_ring=True)
def not_live_without_features_ok(target: Target) -> None:
    """DRIVER_OK without FEATURES_OK does not make the device live (HOSTILE-093)."""
    _not_live_after(target, [DeviceStatus(1), DeviceStatus(3)], [DeviceStatus(7)])


@check(each_ring=True)
def wrong_order_is_not_live(target: Target) -> None:
    """Status bits in a wrong order make no live device (HOSTILE-094)."""
    _not_live_after(target, [], [DeviceStatus.DRIVER_OK])
    _not_live_after(target, [DeviceStatus(5)], [DeviceStatus(7)])
    _not_live_after(target, [DeviceStatus.FEATURES_OK], [DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK])


@check()
def all_bits_at_once(target: Target) -> None:
    """All status bits at once make no live device, unless it takes them as a negotiation (HOSTILE-094)."""
    _not_live_after(target, [], [DeviceStatus(15)], negotiated=True)
    _not_live_after(target, [DeviceStatus(1)], [DeviceStatus(15)], negotiated=True)


def _not_live_after(
    target: Target, before: list[DeviceStatus], after: list[DeviceStatus], *, negotiated: bool = False
) -> None:
    """Write features, the status values ``before``, the queues, the status values ``after``; no request is taken.

    With ``negotiated`` a device may be live that shows both FEATURES_OK and DRIVER_OK.
    """
    both = DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK
    with small(target) as driver:
        device, features = driver.device, driver.features
        device.reset()
        for window in range(2):
            device.set(CommonCfg.DRIVER_FEATURE_SELECT, window)
            device.set(CommonCfg.DRIVER_FEATURE, features >> 32 * window & 0xFFFFFFFF)
        for value in before:
            device.status = value
        for queue in driver.queues:
            settings(driver, queue)
            device.set(CommonCfg.QUEUE_ENABLE, 1)
        bait, watch = Bait(target, driver), Watch(driver)
        for value in after:
            device.status = value
        driver.ring_doorbell()
        fence(driver)
        if not (negotiated and driver.status & both == both):
            watch.untouched(f"though no negotiation was completed; status reads {driver.status:#x}")
            expect(not bait.taken, "a request was taken though no negotiation was completed")
        device.reset()


@check()
def cleared_bits(target: Target) -> None:
    """A write that clears earlier bits is ignored, or stops the device altogether (HOSTILE-095)."""
    with small(target) as driver:
        driver.device.status = DeviceStatus(3)
        shown = driver.status
        bait, watch = Bait(target, driver, ripe=True), Watch(driver)
        if DeviceStatus.DRIVER_OK in shown:
            bait.eaten()
        else:
            driver.ring_doorbell()
            fence(driver)
            watch.untouched(f"though status reads {shown:#x}")


@check()
def needs_reset_is_the_devices(target: Target) -> None:
    """DEVICE_NEEDS_RESET written by the driver is not set, and not notified (HOSTILE-096)."""
    _ignored(target, DeviceStatus.NEEDS_RESET)


@check()
def undefined_bit(target: Target) -> None:
    """The undefined status bit 32 is ignored (HOSTILE-097)."""
    _ignored(target, _UNDEFINED)


@check()
def suspend_without_the_feature(target: Target) -> None:
    """SUSPEND without the feature negotiated is ignored (HOSTILE-098)."""
    _ignored(target, DeviceStatus.SUSPEND)


def _ignored(target: Target, bit: DeviceStatus) -> None:
    """A bit that is written to the status of a live device has no effect (SUSPEND is not negotiated)."""
    with small(target, features=target.mask(without=(Feature.SUSPEND,))) as driver:
        before, watch = driver.status, Watch(driver, live=True)
        driver.device.status = before | bit
        fence(driver)
        expect(driver.status == before, f"status reads {driver.status:#x} after {before | bit:#x} was written")
        watch.silent(f"after {bit:#x} was written to status")
        served(target, driver)


@check()
def failed_and_going_on(target: Target) -> None:
    """A driver that sets FAILED and goes on is served or not, and registers answer (HOSTILE-100)."""
    with small(target) as driver:
        driver.device.status |= DeviceStatus.FAILED
        bait = Bait(target, driver, ripe=True)
        driver.ring_doorbell()
        fence(driver)
        driver.device.status |= DeviceStatus.DRIVER_OK
        fence(driver)
        expect(not bait.taken or bait.pending.status is not None, "a request was used without a status")


@check()
def no_queue_at_all(target: Target) -> None:
    """DRIVER_OK with no queue enabled: the device idles (HOSTILE-109)."""
    with small(target) as driver:
        negotiate(driver)
        go(driver)
        bait, watch = Bait(target, driver), Watch(driver)
        driver.ring_doorbell()
        fence(driver)
        watch.quiet("though no queue is enabled")
        expect(not bait.taken, "a request was taken from a queue that is not enabled")
        status = driver.status
        expect(DeviceStatus.NEEDS_RESET not in status, f"status reads {status:#x}")


@check(each_ring=True)
def going_on_after_needs_reset(target: Target) -> None:
    """A device that needs a reset ignores doorbells on every queue until then (HOSTILE-092, HOSTILE-110)."""
    two = target.facts.queues > 1 and target.offers(Feature.BLK_MQ)
    with small(target, queues=2 if two else 1) as driver:
        needs_reset(driver)
        queue = len(driver.queues) - 1
        if queue:
            bait = Bait(target, driver, queue)
        fence(driver)
        watch = Watch(driver)
        driver.device.status |= DeviceStatus.DRIVER_OK
        for each in range(len(driver.queues)):
            driver.ring_doorbell(each)
        fence(driver)
        watch.quiet("though the device needs a reset")
        expect(DeviceStatus.NEEDS_RESET in driver.status, f"without a reset status reads {driver.status:#x}")
        expect(not queue or not bait.taken, "a request was taken though the device needs a reset")
        driver.init()
        served(target, driver)
