"""Feature bits and their negotiation."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from vmmblk.client.errors import QueueFull, RemoteError
from vmmblk.client.memory import GuestMemory, Range
from vmmblk.client.queue import DESCRIPTOR_SIZE, SplitQueue
from vmmblk.client.wire import Region
from vmmblk.conform.check import NotOffered, NotTestable, check, expect
from vmmblk.conform.steps import fence, go, negotiate, served, set_up, small, until
from vmmblk.spec import BlkConfig, CommonCfg, DeviceStatus, Feature, RequestType

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.queue import Virtqueue
    from vmmblk.conform.target import Target

_ALL = (1 << 64) - 1
_WORD = 0xFFFFFFFF
_LEGACY = sum(1 << bit for bit in (0, 7, 24, 27, 30))
"""BARRIER, SCSI, NOTIFY_ON_EMPTY, ANY_LAYOUT, BAD_FEATURE: what a transitional device may offer its legacy drivers."""
_TRANSITIONAL_IDS = range(0x1000, 0x1040)
_SR_IOV_CAPABILITY = 0x10
_EXTENDED = 0x100
_NOTHING = b"\xff" * 8
_USED = 1 << 15


# The offer.


@check()
def prerequisites_are_offered(target: Target) -> None:
    """Nothing is offered without what it needs: CONFIG_WCE without FLUSH, anything without VERSION_1 (FEAT-001)."""
    if target.offers(Feature.BLK_CONFIG_WCE):
        expect(target.offers(Feature.BLK_FLUSH), "CONFIG_WCE is offered and FLUSH is not")
    expect(target.offers(Feature.VERSION_1), f"the offer {target.facts.offer:#x} lacks VERSION_1")


@check()
def only_what_is_defined(target: Target) -> None:
    """Only bits that VIRTIO defines for a block device on PCI are offered (FEAT-004, FEAT-007)."""
    with target.driver(start=False) as driver:
        known = sum(feature.mask for feature in Feature)
        if driver.pci.device_id in _TRANSITIONAL_IDS:
            known |= _LEGACY
        unknown = target.facts.offer & ~known
        expect(not unknown, f"undefined bits are offered: {unknown:#x}")
        driver.reset()
        for select in (2, 3, 4, 5, 31, 32, 33, 64):
            driver.device.set(CommonCfg.DEVICE_FEATURE_SELECT, select)
            word = driver.device.get(CommonCfg.DEVICE_FEATURE)
            expect(word == 0, f"device_feature reads {word:#x} for select {select}")


@check()
def version_1_is_offered(target: Target) -> None:
    """VERSION_1 is offered (RSVD-001)."""
    expect(target.offers(Feature.VERSION_1), f"the offer is {target.facts.offer:#x}")


@check(Feature.SR_IOV)
def sr_iov_has_its_capability(target: Target) -> None:
    """SR_IOV is offered only by a device that has the capability (RSVD-013)."""
    with target.driver(start=False) as driver:
        expect(_has_sr_iov(driver), "SR_IOV is offered without an SR-IOV capability")


@check()
def sr_iov_is_offered(target: Target) -> None:
    """A device that has an SR-IOV capability offers SR_IOV (RSVD-012)."""
    with target.driver(start=False) as driver:
        if not _has_sr_iov(driver):
            raise NotOffered("the device has no SR-IOV capability")
    expect(target.offers(Feature.SR_IOV), "SR_IOV is not offered")


@check(Feature.ADMIN_VQ)
def admin_vq_announces_queues(target: Target) -> None:
    """ADMIN_VQ means that there are administration queues (RSVD-019)."""
    with target.driver() as driver:
        negotiate(driver, driver.features | Feature.ADMIN_VQ.mask)
        count = driver.device.get(CommonCfg.ADMIN_QUEUE_NUM)
        expect(count, "admin_queue_num reads 0 with ADMIN_VQ negotiated")


# What is accepted.


@check()
def each_bit_alone(target: Target) -> None:
    """Each offered bit is accepted alone, with what it needs (FEAT-002)."""
    base = _needed(target)
    with target.driver() as driver:
        for feature in (each for each in Feature if target.offers(each)):
            extra = Feature.BLK_FLUSH.mask if feature is Feature.BLK_CONFIG_WCE else 0
            mask = base | feature.mask | extra
            expect(_accepts(driver, mask), f"features {mask:#x} are refused: {feature.name} and what it needs")


@check()
def no_half_refusal(target: Target) -> None:
    """Without VERSION_1 either FEATURES_OK reads 0 or the device works (FEAT-003)."""
    _refused_or_served(target, Feature.VERSION_1)


@check()
def version_1_may_be_demanded(target: Target) -> None:
    """A driver without VERSION_1 is refused or served (RSVD-002, HOSTILE-103)."""
    _refused_or_served(target, Feature.VERSION_1)


@check(Feature.ACCESS_PLATFORM)
def access_platform_may_be_demanded(target: Target) -> None:
    """A driver without ACCESS_PLATFORM is refused or served (RSVD-004)."""
    _refused_or_served(target, Feature.ACCESS_PLATFORM)


@check(Feature.ORDER_PLATFORM)
def order_platform_may_be_demanded(target: Target) -> None:
    """A driver without ORDER_PLATFORM is refused or served, perhaps more slowly (RSVD-008, RSVD-009)."""
    _refused_or_served(target, Feature.ORDER_PLATFORM)


@check()
def accepted_again(target: Target) -> None:
    """What was accepted once is accepted after a reset of the device, and of the function (FEAT-005)."""
    with target.driver() as driver:
        masks = [driver.features, _needed(target)]
        for mask in masks:
            if not _accepts(driver, mask):
                raise NotTestable(f"features {mask:#x} are refused from the start")
        for mask in masks:
            expect(_accepts(driver, mask), f"features {mask:#x} are refused after a reset")
        with contextlib.suppress(RemoteError):
            driver.connection.device_reset()
        driver.pci.enable()
        for mask in masks:
            expect(_accepts(driver, mask), f"features {mask:#x} are refused after DEVICE_RESET")


@check(each_ring=True)
def frozen_from_features_ok(target: Target) -> None:
    """What is negotiated does not change from FEATURES_OK to the reset (FEAT-006)."""
    _frozen(target)


@check(each_ring=True)
def written_after_features_ok(target: Target) -> None:
    """driver_feature written after FEATURES_OK changes nothing (HOSTILE-104)."""
    _frozen(target)


def _frozen(target: Target) -> None:
    with small(target, indirect=True) as driver:
        negotiate(driver)
        other = driver.features ^ Feature.RING_PACKED.mask & target.facts.offer
        for mask in (0, other, Feature.VERSION_1.mask):
            _write_features(driver, mask)
        expect(DeviceStatus.FEATURES_OK in driver.status, "FEATURES_OK is gone after driver_feature was written")
        set_up(driver)
        _write_features(driver, 0)
        go(driver)
        served(target, driver)
        _write_features(driver, 0)
        served(target, driver)


@check(each_ring=True)
def the_last_word_counts(target: Target) -> None:
    """What driver_feature holds when FEATURES_OK is set is negotiated, whatever it held before (FEAT-009)."""
    with small(target, indirect=True) as driver:
        driver.device.reset()
        driver.device.greet()
        for mask in (target.facts.offer, driver.features ^ Feature.RING_PACKED.mask & target.facts.offer, 0):
            _write_features(driver, mask)
        expect(driver.device.accept(driver.features), f"features {driver.features:#x} are refused at the second try")
        set_up(driver)
        go(driver)
        served(target, driver)


@check()
def not_offered_stays_off(target: Target) -> None:
    """A bit that was not offered and is acknowledged is refused, or masked; it stays off (FEAT-010)."""
    _not_offered(target)


@check()
def not_offered_is_masked(target: Target) -> None:
    """A driver that acknowledges everything is refused, or gets what was offered (HOSTILE-101)."""
    _not_offered(target)


def _not_offered(target: Target) -> None:
    with small(target) as driver:
        device = driver.device
        if not _accepts(driver, driver.features | ~target.facts.offer & _ALL):
            return
        set_up(driver)
        go(driver)
        served(target, driver)
        if not target.offers(Feature.SUSPEND):
            device.status |= DeviceStatus.SUSPEND
            fence(driver)
            status = driver.status
            expect(
                DeviceStatus.DRIVER_OK in status and DeviceStatus.SUSPEND not in status,
                f"the device suspends without offering it, status {status:#x}",
            )
        if not target.offers(Feature.RING_RESET) and driver.pci.common.length >= CommonCfg.QUEUE_RESET + 2:
            device.set(CommonCfg.QUEUE_SELECT, 0)
            device.set(CommonCfg.QUEUE_RESET, 1)
            fence(driver)
            expect(device.get(CommonCfg.QUEUE_ENABLE) == 1, "a queue was reset though RING_RESET is not offered")
        if not target.offers(Feature.BLK_CONFIG_WCE) and driver.pci.device.length > BlkConfig.WRITEBACK:
            before = driver.config(BlkConfig.WRITEBACK)
            driver.device.set_config(BlkConfig.WRITEBACK, before ^ 1)
            expect(driver.config(BlkConfig.WRITEBACK) == before, "writeback changed though CONFIG_WCE is not offered")
        served(target, driver)


@check()
def no_prerequisite(target: Target) -> None:
    """A driver that takes features of this version without VERSION_1 is refused (HOSTILE-102)."""
    with target.driver() as driver:
        mask = target.facts.offer & ~Feature.VERSION_1.mask
        expect(not _accepts(driver, mask), f"features {mask:#x} are accepted")


@check()
def no_such_window(target: Target) -> None:
    """Selected with 0xFFFFFFFF the feature windows read 0 and ignore writes (HOSTILE-105)."""
    with small(target) as driver:
        device = driver.device
        device.reset()
        device.greet()
        _write_features(driver, driver.features)
        device.set(CommonCfg.DEVICE_FEATURE_SELECT, _WORD)
        device.set(CommonCfg.DRIVER_FEATURE_SELECT, _WORD)
        word = device.get(CommonCfg.DEVICE_FEATURE)
        expect(word == 0, f"device_feature reads {word:#x}")
        for value in (_WORD, 0):
            device.set(CommonCfg.DRIVER_FEATURE, value)
        device.status |= DeviceStatus.FEATURES_OK
        expect(DeviceStatus.FEATURES_OK in driver.status, "a write to window 0xFFFFFFFF changed the features")
        set_up(driver)
        go(driver)
        served(target, driver)


# What single bits mean.


@check()
def addresses_are_as_they_are(target: Target) -> None:
    """Without ACCESS_PLATFORM the device uses the addresses that it is given, above 4 GiB too (RSVD-005)."""
    mask = target.mask(without=(Feature.ACCESS_PLATFORM,))
    size = 8 << 20
    places = [Range(0, size), Range((1 << 32) - size // 2, size), Range(1 << 35, size)]
    read = []
    for place in places:
        with (
            GuestMemory(size, [place]) as memory,
            target.driver(memory=memory, features=mask, queue_size=64, start=False) as driver,
        ):
            driver.pci.enable()
            if not _accepts(driver, mask & target.facts.offer):
                raise NotTestable("the device demands ACCESS_PLATFORM")
            driver.init()
            read.append(driver.read(0, target.facts.block_size))
    expect(read[0] == read[1] == read[2], "the same sector is read differently at different addresses")


@check(each_ring=True)
def the_ring_has_the_format(target: Target) -> None:
    """The ring is packed with RING_PACKED and split without (RSVD-006)."""
    with small(target) as driver:
        for _ in range(3):
            served(target, driver)


@check(Feature.IN_ORDER, each_ring=True)
def buffers_come_back_in_order(target: Target) -> None:
    """With IN_ORDER buffers are used in the order in which they were made available (RSVD-007)."""
    with small(target, features=target.mask(Feature.IN_ORDER)) as driver:
        queue = driver.queues[0]
        if isinstance(queue, SplitQueue):
            driver.memory.write(queue.used + 4, _NOTHING * queue.size)
        blocks = [count for count in (8, 1, 4, 1, 2, 1, 1, 1) if count * target.block_sectors <= target.facts.capacity]
        chains: list[tuple[int, int]] = []
        with contextlib.suppress(QueueFull):
            for count in blocks:
                slot = queue.size - queue.room
                pending = driver.submit(RequestType.IN, 0, data_in=count * target.facts.block_size)
                chains.append((pending.head, slot))
        driver.kick(force=True)
        until(driver, lambda: _used_in_order(driver, queue, chains) == len(chains), "not all requests are used")


def _used_in_order(driver: VirtioBlk, queue: Virtqueue, chains: list[tuple[int, int]]) -> int:
    """How many of the first ``chains`` of a ring (name, slot) are used.  Raises Broken if they are not in order.

    A batch may be told by the name of its last chain alone, in the place of its first.
    """
    look = _told_split if isinstance(queue, SplitQueue) else _told_packed
    names = [name for name, _ in chains]
    done = 0
    while done < len(chains):
        name = look(driver, queue, done, chains[done][1])
        if name is None:
            break
        expect(name in names[done:], f"chain {name} comes back where {names[done:]} are in flight, in this order")
        following = names.index(name, done) + 1
        for inner in range(done + 1, following):
            skipped = look(driver, queue, inner, chains[inner][1])
            expect(skipped is None, f"chain {name} comes back before chain {skipped}")
        done = following
    return done


def _told_split(driver: VirtioBlk, queue: Virtqueue, position: int, _slot: int) -> int | None:
    if isinstance(queue, SplitQueue) and position >= queue.used_idx:
        return None
    element = driver.memory.read(queue.used + 4 + 8 * position, 8)
    return None if element == _NOTHING else int.from_bytes(element[:4], "little")


def _told_packed(driver: VirtioBlk, queue: Virtqueue, _position: int, slot: int) -> int | None:
    descriptor = driver.memory.read(queue.desc + DESCRIPTOR_SIZE * slot, DESCRIPTOR_SIZE)
    used = int.from_bytes(descriptor[14:], "little") & _USED
    return int.from_bytes(descriptor[12:14], "little") if used else None


@check(Feature.INDIRECT_DESC, each_ring=True)
def tables_are_followed(target: Target) -> None:
    """With INDIRECT_DESC a request may lie in an indirect table (RSVD-014)."""
    with small(target, indirect=True) as driver:
        for _ in range(3):
            served(target, driver)


@check(Feature.EVENT_IDX, each_ring=True)
def an_event_is_waited_for(target: Target) -> None:
    """With EVENT_IDX the interrupt comes when the position is reached that the driver waits for (RSVD-015)."""
    with small(target) as driver:
        driver.device.get(CommonCfg.DEVICE_STATUS)
        driver.take_interrupts()
        count = max(1, min(3, driver.queues[0].room // 3))
        driver.queues[0].arm(count)
        for _ in range(count):
            driver.submit(RequestType.IN, 0, data_in=target.facts.block_size)
            driver.kick(force=True)
        until(driver, driver.take_interrupts, f"the interrupt for request {count} does not come")


# The inside.


def _needed(target: Target) -> int:
    """The least that this device may demand of a driver."""
    wanted = (Feature.VERSION_1, Feature.ACCESS_PLATFORM, Feature.ORDER_PLATFORM, Feature.SR_IOV, Feature.BLK_ZONED)
    return sum(feature.mask for feature in wanted if target.offers(feature))


def _write_features(driver: VirtioBlk, mask: int) -> None:
    for window in range(2):
        driver.device.set(CommonCfg.DRIVER_FEATURE_SELECT, window)
        driver.device.set(CommonCfg.DRIVER_FEATURE, mask >> 32 * window & _WORD)


def _accepts(driver: VirtioBlk, mask: int) -> bool:
    """Reset the device, and tell whether it takes these features."""
    driver.device.reset()
    driver.device.greet()
    return driver.device.accept(mask)


def _refused_or_served(target: Target, without: Feature) -> None:
    with small(target) as driver:
        if _accepts(driver, driver.features & ~without.mask):
            set_up(driver)
            go(driver)
            served(target, driver)


def _has_sr_iov(driver: VirtioBlk) -> bool:
    if driver.connection.region_info(Region.CONFIG).size <= _EXTENDED:
        return False
    seen: set[int] = set()
    position = _EXTENDED
    while position >= _EXTENDED and position not in seen:
        seen.add(position)
        header = driver.pci.config_field(position, 4)
        if header & 0xFFFF == _SR_IOV_CAPABILITY:
            return True
        position = header >> 20 & ~3
    return False
