"""Resetting one queue (RING_RESET)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.queue import SplitQueue
from vmmblk.conform.check import NotOffered, check, expect
from vmmblk.conform.steps import (
    Bait,
    Watch,
    answers,
    areas,
    busy,
    fence,
    go,
    negotiate,
    place,
    renewed,
    served,
    small,
    until,
)
from vmmblk.spec import NO_VECTOR, CommonCfg, DeviceStatus, Feature

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_ROUNDS = 3


@check(Feature.RING_RESET, each_ring=True)
def one_queue_is_reset(target: Target) -> None:
    """With RING_RESET a queue can be reset by itself: it is off, then serves anew (VQRST-001, RSVD-018)."""
    with small(target) as driver:
        for _ in range(_ROUNDS):
            served(target, driver)
            driver.device.reset_queue(0)
            enabled = driver.device.get(CommonCfg.QUEUE_ENABLE)
            expect(enabled == 0, f"queue_enable reads {enabled:#x} after queue_reset")
            expect(DeviceStatus.DRIVER_OK in driver.status, f"status reads {driver.status:#x} after queue_reset")
            _restart(driver, driver.queues[0].size)


@check(Feature.RING_RESET, Feature.BLK_MQ, each_ring=True)
def the_others_keep_running(target: Target) -> None:
    """While one queue is reset the others go on (VQRST-001)."""
    target.require_queues(2)
    with small(target, queues=2) as driver:
        busy(target, driver, 0)
        going = busy(target, driver, 1)
        driver.device.reset_queue(0)
        driver.wait_all(going)
        served(target, driver, 1)
        _restart(driver, driver.queues[0].size)
        for queue in range(2):
            served(target, driver, queue)


@check(Feature.RING_RESET, each_ring=True)
def nothing_after_it(target: Target) -> None:
    """Once queue_reset reads 0 nothing of the queue happens any more (VQRST-002, 003 and 008, HOSTILE-078)."""
    with small(target) as driver:
        for _ in range(_ROUNDS):
            pending = busy(target, driver)
            driver.device.reset_queue(0)
            watch = Watch(driver, ranges=[*areas(driver.queues[0]), *answers(pending)])
            fence(driver)
            driver.ring_doorbell()
            fence(driver)
            watch.quiet("after queue_reset read 0")
            old = renewed(driver, 0, driver.queues[0].size)
            place(driver, driver.queues[0])
            served(target, driver)
            watch.untouched("after queue_reset read 0")
            old.close()


@check(Feature.RING_RESET, each_ring=True)
def no_request_of_it(target: Target) -> None:
    """A request in a queue that was reset is not executed, doorbell or not (VQRST-002)."""
    with small(target) as driver:
        served(target, driver)
        driver.device.reset_queue(0)
        bait, watch = Bait(target, driver), Watch(driver)
        for _ in range(4):
            driver.ring_doorbell()
            fence(driver)
        watch.quiet("in a queue that was reset")
        expect(not bait.taken, "a request was taken from a queue that was reset")


@check(Feature.RING_RESET, each_ring=True)
def everything_of_it_is_initial(target: Target) -> None:
    """After queue_reset all of the queue's state is initial, its positions too (VQRST-004, VQRST-005)."""
    with small(target, queue_size=8) as driver:
        device = driver.device
        for count in (1, 3, 5):
            for _ in range(count):
                served(target, driver)
            device.reset_queue(0)
            found = device.get(CommonCfg.QUEUE_SIZE), device.get(CommonCfg.QUEUE_ENABLE)
            expect(found == (target.facts.queue_size, 0), f"size and enable of the queue read {found}")
            if driver.pci.msix is not None:
                vector = device.get(CommonCfg.QUEUE_MSIX_VECTOR)
                expect(vector == NO_VECTOR, f"queue_msix_vector reads {vector:#x}")
            _restart(driver, driver.queues[0].size)
            served(target, driver)
            queue = driver.queues[0]
            if isinstance(queue, SplitQueue):
                expect(queue.used_idx == 1, f"the used index reads {queue.used_idx} after one request")


@check(Feature.RING_RESET, each_ring=True)
def other_settings(target: Target) -> None:
    """A queue that was reset can be set up with another size at another place (VQRST-006, VQRST-007)."""
    most = target.facts.queue_size
    sizes = [size for size in (16, 4, 64, 8) if size <= most] or [most]
    with small(target) as driver:
        for size in sizes:
            served(target, driver)
            driver.device.reset_queue(0)
            old = renewed(driver, 0, size)
            watch = Watch(driver, ranges=areas(old))
            place(driver, driver.queues[0])
            for _ in range(10):
                served(target, driver)
            watch.untouched("though the ring has moved")
            old.close()


# Hostile drivers.


@check()
def without_the_feature(target: Target) -> None:
    """queue_reset without RING_RESET negotiated is ignored (HOSTILE-074)."""
    with small(target, features=target.mask(without=(Feature.RING_RESET,))) as driver:
        _needs_register(driver)
        _ignored(target, driver, 1)


@check(Feature.RING_RESET, each_ring=True)
def of_a_queue_that_never_ran(target: Target) -> None:
    """queue_reset of a queue that was never enabled ends at once with both fields 0 (HOSTILE-075)."""
    with small(target) as driver:
        negotiate(driver)
        for live in (False, True):
            driver.device.reset_queue(0)
            found = driver.device.get(CommonCfg.QUEUE_RESET), driver.device.get(CommonCfg.QUEUE_ENABLE)
            expect(found == (0, 0), f"queue_reset and queue_enable read {found}")
            if not live:
                go(driver)
        expect(DeviceStatus.NEEDS_RESET not in driver.status, f"status reads {driver.status:#x}")


@check(Feature.RING_RESET, each_ring=True)
def other_values(target: Target) -> None:
    """queue_reset written with anything but 1 is ignored (HOSTILE-076)."""
    with small(target) as driver:
        for value in (0, 2, 0xFFFF):
            _ignored(target, driver, value)


@check(Feature.RING_RESET, each_ring=True)
def while_it_is_running(target: Target) -> None:
    """queue_reset and queue_enable written while a queue is being reset are ignored, or come after (HOSTILE-077)."""
    with small(target) as driver:
        device = driver.device
        for _ in range(_ROUNDS):
            busy(target, driver)
            device.set(CommonCfg.QUEUE_SELECT, 0)
            for register in (CommonCfg.QUEUE_RESET, CommonCfg.QUEUE_RESET, CommonCfg.QUEUE_ENABLE):
                device.set(register, 1)
            until(driver, lambda: device.get(CommonCfg.QUEUE_RESET) == 0, "queue_reset does not end")
            if DeviceStatus.NEEDS_RESET in driver.status:  # enabled after the reset, with no settings
                driver.init()
            elif device.get(CommonCfg.QUEUE_ENABLE):
                device.reset_queue(0)
                _restart(driver, driver.queues[0].size)
            else:
                _restart(driver, driver.queues[0].size)
            served(target, driver)


@check(Feature.RING_RESET)
def enabled_as_it_was(target: Target) -> None:
    """A queue that is enabled again without settings starts from index 0, or is refused (HOSTILE-079)."""
    with small(target, features=target.mask(without=(Feature.RING_PACKED,))) as driver:
        for _ in range(3):
            served(target, driver)
        queue = driver.queues[0]
        driver.device.reset_queue(0)
        bait = Bait(target, driver, ripe=True)
        _, *rings = areas(queue)
        for area in rings:
            driver.memory.write(area.iova, bytes(area.size))
        driver.device.set(CommonCfg.QUEUE_ENABLE, 1)
        driver.ring_doorbell()
        fence(driver)
        used = driver.memory.read(queue.used + 2, 2)
        expect(used == bytes(2), f"the used index reads {used.hex()} and nothing is available")
        driver.memory.write(queue.avail + 4, bait.pending.head.to_bytes(2, "little"))
        driver.memory.write(queue.avail + 2, b"\1\0")
        driver.ring_doorbell()
        fence(driver)
        device_part = driver.memory.read(queue.used, 12)
        used_idx, head = int.from_bytes(device_part[2:4], "little"), int.from_bytes(device_part[4:8], "little")
        expect(
            used_idx == 0 or (used_idx, head) == (1, bait.pending.head),
            f"used index {used_idx} and chain {head} where chain {bait.pending.head} alone is available",
        )


# The inside.


def _restart(driver: VirtioBlk, size: int) -> None:
    """Set the first queue up anew, elsewhere."""
    old = renewed(driver, 0, size)
    place(driver, driver.queues[0])
    old.close()


def _needs_register(driver: VirtioBlk) -> None:
    if driver.pci.common.length < CommonCfg.QUEUE_RESET + 2:
        raise NotOffered("the common configuration ends before queue_reset")


def _ignored(target: Target, driver: VirtioBlk, value: int) -> None:
    """queue_reset with this value leaves a running queue as it is."""
    device = driver.device
    device.set(CommonCfg.QUEUE_SELECT, 0)
    device.set(CommonCfg.QUEUE_RESET, value)
    fence(driver)
    found = device.get(CommonCfg.QUEUE_RESET), device.get(CommonCfg.QUEUE_ENABLE)
    expect(found == (0, 1), f"queue_reset and queue_enable read {found} after {value:#x} was written to queue_reset")
    served(target, driver)
