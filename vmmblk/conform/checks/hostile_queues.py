"""Drivers that set queues up as nobody should."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from vmmblk.client.memory import GuestMemory, Range
from vmmblk.client.queue import SplitQueue
from vmmblk.conform.check import NotOffered, NotTestable, check, expect
from vmmblk.conform.steps import Bait, Watch, fence, go, negotiate, served, set_up, settings, small
from vmmblk.spec import NO_VECTOR, QUEUE_SIZE_MAX, CommonCfg, DeviceStatus, Feature, Status

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_AREAS = (CommonCfg.QUEUE_DESC, CommonCfg.QUEUE_DRIVER, CommonCfg.QUEUE_DEVICE)
_FIELDS = (CommonCfg.QUEUE_SIZE, CommonCfg.QUEUE_MSIX_VECTOR, CommonCfg.QUEUE_ENABLE, *_AREAS)
_PATIENCE = 1.0
_ROUNDS = 12
_HIGH = 16 << 20
_MEMORY = 8 << 20


@check()
def odd_size(target: Target) -> None:
    """A split queue's size that is no power of two is ignored, or the queue is refused (HOSTILE-062)."""
    if target.facts.queue_size < 4:
        raise NotTestable(f"the queue has only {target.facts.queue_size} descriptors")
    _size(target, 3)


@check()
def size_that_is_shown(target: Target) -> None:
    """Without RING_PACKED queue_size never reads anything but 0 and powers of two, whatever is written (PCI-042)."""
    with small(target, features=target.mask(without=(Feature.RING_PACKED,))) as driver:
        negotiate(driver)
        driver.device.set(CommonCfg.QUEUE_SELECT, 0)
        for size in (3, 6, target.facts.queue_size - 1, 0xFFFF):
            driver.device.set(CommonCfg.QUEUE_SIZE, size)
            shown = driver.device.get(CommonCfg.QUEUE_SIZE)
            expect(shown.bit_count() <= 1, f"queue_size reads {shown} after {size} was written")


@check()
def size_0(target: Target) -> None:
    """A queue size of 0 is ignored, or the queue is not started (HOSTILE-063)."""
    with small(target) as driver:
        negotiate(driver)
        driver.device.set(CommonCfg.QUEUE_SELECT, 0)
        driver.device.set(CommonCfg.QUEUE_SIZE, 0)
        if driver.device.get(CommonCfg.QUEUE_SIZE):
            set_up(driver)
            go(driver)
            served(target, driver)
            return
        settings(driver, driver.queues[0])
        driver.device.set(CommonCfg.QUEUE_SIZE, 0)
        driver.device.set(CommonCfg.QUEUE_ENABLE, 1)
        bait, watch = Bait(target, driver), Watch(driver)
        go(driver)
        driver.ring_doorbell()
        fence(driver)
        watch.untouched("though the queue has size 0")
        expect(not bait.taken, "a request was taken from a queue of size 0")


@check()
def size_above_the_most(target: Target) -> None:
    """A queue size above what the device can do is ignored, or the queue is refused (HOSTILE-064)."""
    for size in {min(2 * target.facts.queue_size, QUEUE_SIZE_MAX), QUEUE_SIZE_MAX, 0xFFFF}:
        if size > target.facts.queue_size:
            _size(target, size)


def _size(target: Target, wrong: int) -> None:
    """A size that no split queue of this device can have is ignored, or the queue is refused."""
    with small(target, features=target.mask(without=(Feature.RING_PACKED,))) as driver:
        device = driver.device
        negotiate(driver)
        device.set(CommonCfg.QUEUE_SELECT, 0)
        device.set(CommonCfg.QUEUE_SIZE, wrong)
        taken = device.get(CommonCfg.QUEUE_SIZE)
        if taken != wrong:
            good = 0 < taken <= target.facts.queue_size and taken.bit_count() == 1
            expect(good, f"queue_size reads {taken} after {wrong} was written")
            set_up(driver)
            go(driver)
            served(target, driver)
            return
        settings(driver, driver.queues[0])
        device.set(CommonCfg.QUEUE_SIZE, wrong)
        device.set(CommonCfg.QUEUE_ENABLE, 1)
        enabled = device.get(CommonCfg.QUEUE_ENABLE)
        go(driver)
        deadline = time.monotonic() + min(_PATIENCE, driver.timeout)
        while enabled and DeviceStatus.NEEDS_RESET not in driver.status:
            expect(time.monotonic() < deadline, f"a split queue of size {wrong} was enabled")


@check(each_ring=True)
def changes_after_enabling(target: Target) -> None:
    """Size and addresses of a queue that are written after queue_enable are ignored (HOSTILE-065)."""
    with small(target, queue_size=8) as driver:
        queue = driver.queues[0]
        elsewhere = driver.memory.alloc(3 << 16)
        driver.memory.write(elsewhere, bytes(3 << 16))
        negotiate(driver)
        set_up(driver)
        for live in (False, True):
            driver.device.set(CommonCfg.QUEUE_SELECT, 0)
            driver.device.set(CommonCfg.QUEUE_SIZE, max(queue.size // 2, 1))
            for position, register in enumerate(_AREAS):
                driver.device.set(register, elsewhere + (position << 16))
            if not live:
                go(driver)
            for _ in range(_ROUNDS):
                served(target, driver)


@check(each_ring=True)
def enable_0(target: Target) -> None:
    """queue_enable written 0 under a live queue is ignored, or stops the queue (HOSTILE-066)."""
    with small(target) as driver:
        served(target, driver)
        driver.device.set(CommonCfg.QUEUE_SELECT, 0)
        driver.device.set(CommonCfg.QUEUE_ENABLE, 0)
        fence(driver)
        enabled, status = driver.device.get(CommonCfg.QUEUE_ENABLE), driver.status
        if enabled and DeviceStatus.NEEDS_RESET not in status:
            served(target, driver)
            return
        bait = Bait(target, driver, ripe=True)
        driver.ring_doorbell()
        fence(driver)
        expect(
            not bait.taken or bait.pending.status == Status.OK,
            f"a queue that was stopped completed a read with {bait.pending.status}",
        )


@check()
def enable_other_values(target: Target) -> None:
    """queue_enable written with other values than 0 and 1 is ignored (HOSTILE-067)."""
    for value in (2, 0xFFFF, 0x0100):
        with small(target) as driver:
            negotiate(driver)
            settings(driver, driver.queues[0])
            driver.device.set(CommonCfg.QUEUE_ENABLE, value)
            enabled = driver.device.get(CommonCfg.QUEUE_ENABLE)
            expect(enabled == 0, f"queue_enable reads {enabled:#x} after {value:#x} was written")
            bait, watch = Bait(target, driver), Watch(driver)
            go(driver)
            driver.ring_doorbell()
            fence(driver)
            watch.untouched(f"though {value:#x} was written to queue_enable")
            expect(not bait.taken, f"a queue was enabled by {value:#x}")
            status = driver.status
            expect(DeviceStatus.NEEDS_RESET not in status, f"status reads {status:#x} after queue_enable {value:#x}")


@check(each_ring=True)
def enable_twice(target: Target) -> None:
    """queue_enable written 1 once more does not restart the ring (HOSTILE-068)."""
    with small(target, queue_size=8) as driver:
        for count in (3, 4, 5):
            for _ in range(count):
                served(target, driver)
            driver.device.set(CommonCfg.QUEUE_SELECT, 0)
            driver.device.set(CommonCfg.QUEUE_ENABLE, 1)
        served(target, driver)
        queue = driver.queues[0]
        if isinstance(queue, SplitQueue):
            expect(queue.used_idx == 13, f"the used index reads {queue.used_idx} after 13 requests")


@check(each_ring=True)
def no_addresses(target: Target) -> None:
    """A queue that is enabled without an address is refused, or idle; nothing is accessed for it (HOSTILE-069)."""
    for missing in (_AREAS, *((each,) for each in _AREAS)):
        with (
            GuestMemory(_MEMORY, [Range(_HIGH, _MEMORY)]) as memory,
            target.driver(memory=memory, queue_size=64) as driver,
        ):
            negotiate(driver)
            settings(driver, driver.queues[0])
            for register in missing:
                driver.device.set(register, 0)
            bait, watch = Bait(target, driver), Watch(driver)
            driver.device.set(CommonCfg.QUEUE_ENABLE, 1)
            go(driver)
            driver.ring_doorbell()
            fence(driver)
            names = ", ".join(each.name for each in missing)
            expect(not bait.taken, f"a request was taken from a queue without {names}")
            if CommonCfg.QUEUE_DEVICE in missing:
                watch.untouched(f"for a queue without {names}")


@check(each_ring=True)
def enabled_too_early(target: Target) -> None:
    """A queue enabled before FEATURES_OK is not, or is one of the format that is then negotiated (HOSTILE-070)."""
    with small(target) as driver:
        device = driver.device
        device.reset()
        device.greet()
        settings(driver, driver.queues[0])
        device.set(CommonCfg.QUEUE_ENABLE, 1)
        if not device.accept(driver.features):
            return
        device.set(CommonCfg.QUEUE_SELECT, 0)
        enabled = device.get(CommonCfg.QUEUE_ENABLE)
        bait = Bait(target, driver, ripe=True)
        go(driver)
        if enabled and DeviceStatus.NEEDS_RESET not in driver.status:
            bait.eaten()
            return
        driver.ring_doorbell()
        fence(driver)
        expect(not bait.taken, "a request was taken from a queue that does not show that it is enabled")


@check(each_ring=True)
def enabled_late(target: Target) -> None:
    """A queue enabled after DRIVER_OK is not, or is served (HOSTILE-071)."""
    with small(target) as driver:
        negotiate(driver)
        go(driver)
        settings(driver, driver.queues[0])
        bait = Bait(target, driver, ripe=True)
        driver.device.set(CommonCfg.QUEUE_ENABLE, 1)
        if driver.device.get(CommonCfg.QUEUE_ENABLE):
            bait.eaten()
            return
        driver.ring_doorbell()
        fence(driver)
        expect(not bait.taken, "a request was taken from a queue that does not show that it is enabled")


@check()
def no_such_queue(target: Target) -> None:
    """A queue that there is not has size 0, cannot be enabled, and is no alias of another (HOSTILE-072)."""
    count = target.facts.queues
    with small(target) as driver:
        before = _registers(driver, range(min(count, 8)))
        for select in (count, count + 1, count + 4, 0x7FFF):
            if select >= count:
                _scribble(driver, select, (CommonCfg.QUEUE_SIZE, CommonCfg.QUEUE_ENABLE, *_AREAS))
                driver.device.set(CommonCfg.QUEUE_SELECT, select)
                found = driver.device.get(CommonCfg.QUEUE_SIZE), driver.device.get(CommonCfg.QUEUE_ENABLE)
                expect(found == (0, 0), f"size and enable of queue {select}, of {count}, read {found}")
        _still(driver, before)
        served(target, driver)


@check()
def queue_ffff(target: Target) -> None:
    """Whatever is written while queue 0xFFFF is selected has no effect on any queue (HOSTILE-073)."""
    with small(target) as driver:
        before = _registers(driver, range(min(target.facts.queues, 8)))
        reset = (CommonCfg.QUEUE_RESET,) if target.offers(Feature.RING_RESET) else ()
        _scribble(driver, 0xFFFF, (*_FIELDS, *reset))
        _still(driver, before)
        served(target, driver)


@check(Feature.BLK_MQ, each_ring=True)
def further_queues_without_mq(target: Target) -> None:
    """A second queue without MQ negotiated is refused, or served (HOSTILE-080)."""
    target.require_queues(2)
    with small(target, queues=2) as driver:
        mask = driver.features & ~Feature.BLK_MQ.mask
        negotiate(driver, mask)
        if not driver.device.select_queue(1):
            raise NotOffered("without MQ there is one queue")
        for queue in driver.queues:
            settings(driver, queue)
            driver.device.set(CommonCfg.QUEUE_ENABLE, 1)
        go(driver)
        if DeviceStatus.NEEDS_RESET in driver.status:
            return
        served(target, driver)
        bait = Bait(target, driver, 1, ripe=True)
        driver.ring_doorbell(1)
        fence(driver)
        served(target, driver)
        expect(
            not bait.taken or bait.pending.status == Status.OK,
            f"the second queue completed a read with {bait.pending.status}",
        )


# The inside.


def _registers(driver: VirtioBlk, queues: range) -> dict[tuple[int, CommonCfg], int]:
    """What the registers of these queues read."""
    found = {}
    for queue in queues:
        driver.device.set(CommonCfg.QUEUE_SELECT, queue)
        for register in _FIELDS:
            found[queue, register] = _get(driver, register)
    return found


def _get(driver: VirtioBlk, register: CommonCfg) -> int:
    if register in _AREAS:
        return driver.pci.common.read(register, 4) | driver.pci.common.read(register + 4, 4) << 32
    return driver.device.get(register)


def _scribble(driver: VirtioBlk, select: int, registers: tuple[CommonCfg, ...]) -> None:
    """Write to queue registers with ``select`` in queue_select."""
    values = {CommonCfg.QUEUE_SIZE: 2, CommonCfg.QUEUE_MSIX_VECTOR: NO_VECTOR}
    driver.device.set(CommonCfg.QUEUE_SELECT, select)
    for register in registers:
        driver.device.set(register, 0x1000 if register in _AREAS else values.get(register, 1))


def _still(driver: VirtioBlk, before: dict[tuple[int, CommonCfg], int]) -> None:
    """No register of a queue has changed, and the device runs."""
    queues = max(queue for queue, _ in before) + 1
    for (queue, register), now in _registers(driver, range(queues)).items():
        was = before[queue, register]
        expect(now == was, f"{register.name} of queue {queue} reads {now:#x}, not {was:#x}, after writes to another")
    status = driver.status
    expect(DeviceStatus.NEEDS_RESET not in status, f"status reads {status:#x} after writes to a queue that is not")
