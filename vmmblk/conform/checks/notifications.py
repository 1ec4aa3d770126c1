"""Notifications, in both directions."""

from __future__ import annotations

import select
from typing import TYPE_CHECKING

from vmmblk.client.interrupts import Interrupts
from vmmblk.conform.check import NotOffered, check, expect
from vmmblk.conform.function import eventfds, fired, require_intx, require_msix
from vmmblk.conform.steps import Bait, Watch, fence, served, small
from vmmblk.spec import CommonCfg, DeviceStatus, Feature, IsrStatus

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_DATA = (Feature.NOTIFICATION_DATA, Feature.NOTIF_CONFIG_DATA)
_QUEUES_MAX = 8
_STORM = 2000
_ROUNDS = 40
_GARBAGE = 0x5A5A


@check()
def used_buffers_interrupt_their_vector(target: Target) -> None:
    """Used buffers are notified by the vector of their queue and by no other one (NOTE-001, NOTE-002)."""
    with target.driver(start=False, interrupts=Interrupts.POLL) as driver:
        require_msix(driver.pci)
    with (
        small(target, queues=_several(target), interrupts=Interrupts.MSIX) as driver,
        eventfds(driver.connection) as lines,
    ):
        count = min(len(driver.queues), len(lines) - 1)
        if count < 1:
            raise NotOffered("the device has a single MSI-X vector")
        driver.device.set_config_vector(0)
        for queue in range(count):
            driver.device.set(CommonCfg.QUEUE_SELECT, queue)
            driver.device.set(CommonCfg.QUEUE_MSIX_VECTOR, queue + 1)
        for queue in range(count):
            bait = Bait(target, driver, queue, ripe=True)
            driver.ring_doorbell(queue)
            select.select(lines, [], [], driver.timeout)
            fence(driver)
            told = [vector for vector, line in enumerate(lines) if fired(line)]
            expect(told == [queue + 1], f"a buffer of queue {queue} was notified by vectors {told}")
            expect(bait.taken, f"queue {queue} was notified of and has no used buffer")


@check()
def used_buffers_show_in_the_isr(target: Target) -> None:
    """Without MSI-X used buffers are notified by INTx, with the queue bit in the ISR alone (NOTE-001, NOTE-002)."""
    with target.driver(start=False, interrupts=Interrupts.POLL) as driver:
        require_intx(driver.pci)
    with small(target, interrupts=Interrupts.INTX) as driver:
        driver.pci.isr.read(0, 1)
        bait = Bait(target, driver, ripe=True)
        driver.ring_doorbell()
        driver.lines.wait(driver.connection.fileno(), driver.timeout)
        cause = IsrStatus(driver.pci.isr.read(0, 1))
        expect(cause == IsrStatus.QUEUE, f"the ISR reads {cause:#x} for a used buffer")
        expect(bait.taken, "INTx came before the buffer was used")


@check()
def growth_is_notified(target: Target) -> None:
    """A device that changes its configuration sends a configuration change notification (NOTE-003)."""
    with small(target) as driver:
        before = driver.capacity
        target.resize()
        driver.wait_config_change()
        expect(driver.capacity > before, f"the capacity reads {driver.capacity} after the change, {before} before")


@check(each_ring=True)
def plain_doorbells(target: Target) -> None:
    """A doorbell carries the index of its queue, and that queue is served (NOTE-004)."""
    _doorbells(target, target.mask(without=_DATA))


@check(Feature.NOTIF_CONFIG_DATA, each_ring=True)
def doorbells_with_an_id(target: Target) -> None:
    """With NOTIF_CONFIG_DATA a doorbell carries what the device gave for that queue (NOTE-004, RSVD-017)."""
    _doorbells(target, target.mask(without=(Feature.NOTIFICATION_DATA,)))


@check(Feature.NOTIFICATION_DATA)
def doorbells_with_a_split_position(target: Target) -> None:
    """With NOTIFICATION_DATA a doorbell carries the available index too (NOTE-005, NOTE-006, RSVD-016)."""
    _doorbells(target, target.mask(without=(Feature.RING_PACKED,)))


@check(Feature.NOTIFICATION_DATA, Feature.RING_PACKED)
def doorbells_with_a_packed_position(target: Target) -> None:
    """With NOTIFICATION_DATA a doorbell carries slot and wrap counter too (NOTE-005, NOTE-007, RSVD-016)."""
    _doorbells(target, target.mask(Feature.RING_PACKED))


@check(Feature.NOTIFICATION_DATA, each_ring=True)
def doorbells_again(target: Target) -> None:
    """The same doorbell over and over has no effect but that of the first (NOTE-008)."""
    _storm(target, _STORM // 10, target.mask())


# Hostile drivers.


@check(each_ring=True)
def doorbell_storm(target: Target) -> None:
    """Thousands of doorbells without new buffers have no effect, and requests are served after them (HOSTILE-089)."""
    _storm(target, _STORM, target.mask())


def _storm(target: Target, count: int, features: int) -> None:
    with small(target, features=features) as driver:
        served(target, driver)
        fence(driver)
        status, watch = driver.status, Watch(driver, live=True)
        for _ in range(count):
            driver.ring_doorbell()
        fence(driver)
        watch.quiet(f"after {count} doorbells without a new buffer")
        expect(driver.status == status, f"status reads {driver.status:#x} after {count} doorbells")
        served(target, driver)


@check(each_ring=True)
def doorbell_of_an_idle_queue(target: Target) -> None:
    """A doorbell of a queue that is not enabled is ignored (HOSTILE-081)."""
    target.require_queues(2)
    with small(target, features=target.mask(without=_DATA)) as driver:
        _without_effect(target, driver, driver.device.notify_offset(1), [1])


@check()
def doorbell_of_no_queue(target: Target) -> None:
    """A doorbell that names no queue, or lies where no queue has its own, is ignored (HOSTILE-082)."""
    with small(target, features=target.mask(without=_DATA)) as driver:
        count = target.facts.queues
        step = driver.pci.notify_off_multiplier
        values = [count, count + 1, 0x7FFF, 0xFFFF]
        if not step:
            _without_effect(target, driver, driver.device.notify_offset(0), values)
            return
        taken = {driver.device.notify_offset(index) for index in range(count)}
        end = driver.pci.notify.length - 1
        for offset in {max(taken) + step, end & ~1} - taken:
            if offset < end:
                _without_effect(target, driver, offset, [0, *values])


@check(each_ring=True)
def doorbell_of_another_queue(target: Target) -> None:
    """A doorbell whose value names another queue than its address does no harm (HOSTILE-084)."""
    with small(target, features=target.mask(without=_DATA)) as driver:
        for value in (1, 0x7F, 0xFFFF):
            bait = Bait(target, driver, ripe=True)
            driver.pci.notify.write(driver.device.notify_offset(0), 2, value)
            fence(driver)
            bait.eaten()
        _sound(driver)


@check(each_ring=True)
def doorbells_of_odd_shape(target: Target) -> None:
    """A doorbell of 8 bits, or a misaligned one, is ignored or a plain kick (HOSTILE-085)."""
    with small(target, features=target.mask(without=_DATA)) as driver:
        at = driver.device.notify_offset(0)
        for offset, width in ((at, 1), (at + 1, 1), (at + 1, 2)):
            if offset + width > driver.pci.notify.length:
                continue
            bait = Bait(target, driver, ripe=True)
            driver.pci.notify.write(offset, width, 0)
            fence(driver)
            bait.eaten()
        _sound(driver)


@check(each_ring=True)
def doorbells_of_the_other_width(target: Target) -> None:
    """A doorbell of 32 bits without NOTIFICATION_DATA, or of 16 with it, is a kick or ignored (HOSTILE-086)."""
    masks = [(4, target.mask(without=_DATA))]
    if target.offers(Feature.NOTIFICATION_DATA):
        masks.append((2, target.mask(without=(Feature.NOTIF_CONFIG_DATA,))))
    for width, mask in masks:
        with small(target, features=mask) as driver:
            at = driver.device.notify_offset(0)
            if at + width > driver.pci.notify.length:
                continue
            bait = Bait(target, driver, ripe=True)
            driver.pci.notify.write(at, width, 0)
            fence(driver)
            bait.eaten()
            _sound(driver)


@check(Feature.NOTIFICATION_DATA, each_ring=True)
def positions_are_hints(target: Target) -> None:
    """Whatever position a doorbell carries, the ring decides what is served (HOSTILE-087)."""
    with small(target, features=target.mask(without=(Feature.NOTIF_CONFIG_DATA,))) as driver:
        at = driver.device.notify_offset(0)
        for position in (0, 0x7FFF, 0x8000, 0xFFFF, driver.queues[0].size, _GARBAGE):
            fence(driver)
            watch = Watch(driver, live=True)
            driver.pci.notify.write(at, 4, position << 16)
            fence(driver)
            watch.silent(f"for a doorbell with position {position:#x} and no new buffer")
            bait = Bait(target, driver, ripe=True)
            driver.pci.notify.write(at, 4, position << 16)
            fence(driver)
            bait.eaten()
        _sound(driver)


@check(Feature.NOTIF_CONFIG_DATA, each_ring=True)
def unknown_ids(target: Target) -> None:
    """With NOTIF_CONFIG_DATA an id that was never handed out is ignored (HOSTILE-088)."""
    with small(target, features=target.mask(without=(Feature.NOTIFICATION_DATA,))) as driver:
        known = {driver.device.notify_id(index) for index in range(target.facts.queues)}
        values = [value for value in (0, 1, 0xFFFF, _GARBAGE) if value not in known]
        _without_effect(target, driver, driver.device.notify_offset(0), values)


@check()
def doorbells_can_be_read(target: Target) -> None:
    """A read of a doorbell returns a fixed value and has no effect (HOSTILE-090)."""
    with small(target) as driver:
        at = driver.device.notify_offset(0)
        widths = [width for width in (1, 2, 4) if at + width <= driver.pci.notify.length]
        before = [driver.pci.notify.read(at, width) for width in widths]
        served(target, driver)
        fence(driver)
        watch = Watch(driver, live=True)
        after = [driver.pci.notify.read(at, width) for width in widths]
        expect(before == after, f"a doorbell reads {before} at first and {after} later")
        fence(driver)
        watch.quiet("when a doorbell was read")
        served(target, driver)


# The inside.


def _several(target: Target) -> int:
    return min(target.facts.queues, _QUEUES_MAX) if target.offers(Feature.BLK_MQ) else 1


def _doorbells(target: Target, features: int) -> None:
    """Many requests on every queue, each with its doorbell; short rings, so that positions wrap."""
    count = _several(target)
    with small(target, features=features, queues=count, queue_size=8) as driver:
        for _ in range(_ROUNDS):
            for queue in range(count):
                served(target, driver, queue)
        _sound(driver)


def _without_effect(target: Target, driver: VirtioBlk, offset: int, values: list[int]) -> None:
    """Doorbells at ``offset`` change nothing, and a request with its own doorbell is served after them."""
    served(target, driver)
    fence(driver)
    status, watch = driver.status, Watch(driver, live=True)
    for value in values:
        driver.pci.notify.write(offset, 2, value)
    fence(driver)
    watch.quiet(f"for doorbells at {offset:#x} that name no queue")
    expect(driver.status == status, f"status reads {driver.status:#x} after doorbells that name no queue")
    bait = Bait(target, driver, ripe=True)
    for value in values:
        driver.pci.notify.write(offset, 2, value)
    fence(driver)
    bait.eaten()


def _sound(driver: VirtioBlk) -> None:
    status = driver.status
    expect(DeviceStatus.NEEDS_RESET not in status, f"status reads {status:#x} afterwards")
