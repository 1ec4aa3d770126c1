"""The common configuration structure: feature windows, generation, reset, and the registers of queues."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.driver import VirtioBlk
from vmmblk.client.memory import GuestMemory, Range
from vmmblk.conform.check import NotOffered, NotTestable, check, expect
from vmmblk.conform.function import negotiate, new_queue, plain, ring, submit
from vmmblk.conform.steps import Watch, answers, areas, busy, served
from vmmblk.spec import BLK_CONFIG_SIZE, QUEUE_SIZE_MAX, BlkConfig, CommonCfg, DeviceStatus, Feature

if TYPE_CHECKING:
    from collections.abc import Iterable

    from vmmblk.client.device import VirtioDevice
    from vmmblk.client.queue import Virtqueue
    from vmmblk.conform.target import Target

_BEYOND = (2, 3, 4, 31, 32, 33, 64, 0x10000, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFF)
"""Windows of features that no device has."""

_RESERVED_FEATURES = range(44, 50)
_AREAS = (CommonCfg.QUEUE_DESC, CommonCfg.QUEUE_DRIVER, CommonCfg.QUEUE_DEVICE)
_HIGH = 8 << 30


# Features.


@check()
def feature_windows(target: Target) -> None:
    """device_feature shows the 32 bits that device_feature_select names, 0 beyond bit 63 (PCI-028, PCI-029)."""
    with target.driver(start=False) as driver:
        device = driver.device
        device.reset()
        for select in (0, 1, 1, 0, *_BEYOND, 1, 0):
            device.set(CommonCfg.DEVICE_FEATURE_SELECT, select)
            shown, offered = device.get(CommonCfg.DEVICE_FEATURE), target.facts.offer >> 32 * min(select, 2)
            expected = offered & 0xFFFFFFFF
            expect(shown == expected, f"window {select:#x} shows {shown:#x}, of an offer of {target.facts.offer:#x}")


@check()
def driver_features_read_back(target: Target) -> None:
    """driver_feature shows what was written there of the offer, window by window (PCI-030)."""
    with target.driver(start=False) as driver:
        device, offer = driver.device, target.facts.offer
        _greet(device)
        for mask in (offer, 0, offer & 0xFFFFFFFF, offer & ~0xFFFFFFFF):
            for window in (1, 0):
                _write_window(device, window, mask >> 32 * window & 0xFFFFFFFF)
            for select in _BEYOND:
                _write_window(device, select, 0xFFFFFFFF)
            back = sum((_read_window(device, window) & offer >> 32 * window) << 32 * window for window in (0, 1))
            expect(back == mask, f"driver_feature reads {back:#x} where {mask:#x} of the offer was written")


@check()
def mirrored_features_are_refused(target: Target) -> None:
    """A device that shows bits which it never offered refuses them when FEATURES_OK is set (PCI-032)."""
    with target.driver(start=False) as driver:
        device, offer = driver.device, target.facts.offer
        _greet(device)
        invalid = next(1 << bit for bit in _RESERVED_FEATURES if not offer >> bit & 1)
        _write_window(device, 1, invalid >> 32)
        if not _read_window(device, 1) & invalid >> 32:
            raise NotOffered("the device does not show bits that it does not offer")
        accepted = device.accept(offer & target.mask() | invalid)
        expect(not accepted, f"the device accepts feature {invalid:#x}, which it does not offer")


def _greet(device: VirtioDevice) -> None:
    device.reset()
    device.greet()


def _write_window(device: VirtioDevice, window: int, value: int) -> None:
    device.set(CommonCfg.DRIVER_FEATURE_SELECT, window)
    device.set(CommonCfg.DRIVER_FEATURE, value)


def _read_window(device: VirtioDevice, window: int) -> int:
    device.set(CommonCfg.DRIVER_FEATURE_SELECT, window)
    return device.get(CommonCfg.DRIVER_FEATURE)


# The generation.


@check()
def generation_follows_changes(target: Target) -> None:
    """config_generation is another once a capacity that has changed was read (PCI-034)."""
    with target.driver() as driver:
        capacity = driver.capacity
        generation = driver.device.get(CommonCfg.CONFIG_GENERATION)
        target.resize()
        driver.wait_config_change()
        if driver.capacity == capacity:
            raise NotTestable("the resize command has not changed the capacity")
        now = driver.device.get(CommonCfg.CONFIG_GENERATION)
        expect(now != generation, f"the capacity has changed, and the generation is still {now}")


@check()
def generation_stands_still(target: Target) -> None:
    """Reading a configuration that does not change does not change the generation (PCI-035)."""
    with target.driver() as driver:
        length = min(driver.pci.device.length, BLK_CONFIG_SIZE)
        driver.device.config_bytes(BlkConfig.CAPACITY, length)
        before = driver.device.get(CommonCfg.CONFIG_GENERATION)
        seen = set()
        for _ in range(300):
            driver.device.config_bytes(BlkConfig.CAPACITY, length)
            seen.add(driver.device.get(CommonCfg.CONFIG_GENERATION))
        expect(seen == {before}, f"the generation was {before} and became {sorted(seen)}")


# Reset.


@check()
def reset_puts_registers_back(target: Target) -> None:
    """Status 0 written to a live device: every queue is disabled and has its full size (PCI-036, 038, 043)."""
    with target.driver(start=False) as driver:
        device = driver.device
        device.reset()
        queues = range(device.get(CommonCfg.NUM_QUEUES))
        sizes = [device.select_queue(index) for index in queues]
        driver.init()
        driver.reset()
        expect(device.get(CommonCfg.DEVICE_STATUS) == 0, f"the status reads {driver.status:#x} after the reset")
        for index, size in zip(queues, sizes, strict=True):
            now = device.select_queue(index)
            expect(now == size, f"queue {index} had size {size}, after a reset {now}")
            enabled = device.get(CommonCfg.QUEUE_ENABLE)
            expect(enabled == 0, f"queue_enable of queue {index} reads {enabled} after a reset")


@check(each_ring=True)
def reset_ends_before_it_shows(target: Target) -> None:
    """Once the status reads 0 nothing is written for requests that were in flight (PCI-037)."""
    with target.driver() as driver:
        pendings = busy(target, driver)
        driver.device.reset()
        watch = Watch(driver, ranges=[*areas(driver.queues[0]), *answers(pendings)])
        other = VirtioBlk(
            driver.connection,
            driver.memory,
            features=target.mask(),
            interrupts=driver.lines.mode,
            timeout=driver.timeout,
        )
        try:
            served(target, other)
            watch.untouched("for requests from before the reset, after status read 0")
        finally:
            other.device.reset()
            other.close()


# Queues.


@check()
def queues_are_counted(target: Target) -> None:
    """num_queues says how many queues there are: those have a size, and no others do (PCI-033, PCI-041, PCI-052)."""
    with target.driver(start=False) as driver:
        driver.reset()
        count = driver.device.get(CommonCfg.NUM_QUEUES)
        expect(count >= 1, "num_queues reads 0")
        for index in range(min(count, 256)):
            expect(driver.device.select_queue(index), f"of {count} queues number {index} has size 0")
        for index in {count, count + 1, count + 64, count | 0x100, count | 0x8000, 0xFFFE, 0xFFFF}:
            if count <= index <= 0xFFFF:
                size = driver.device.select_queue(index)
                expect(size == 0, f"there are {count} queues, and number {index} has size {size}")


@check()
def split_queues_are_powers_of_two(target: Target) -> None:
    """Without RING_PACKED every queue_size is a power of two, up to 32768 (PCI-042)."""
    with target.driver(start=False) as driver:
        negotiate(driver, target.mask(without=(Feature.RING_PACKED,)))
        for index in range(target.facts.queues):
            size = driver.device.select_queue(index)
            good = size & (size - 1) == 0 and size <= QUEUE_SIZE_MAX
            expect(good, f"queue {index} has size {size}")


@check(each_ring=True)
def smaller_queues(target: Target) -> None:
    """A smaller size can be written, reads back, and is what the queue then has (PCI-043)."""
    sizes = [size for size in (target.facts.queue_size // 2, 4) if 4 <= size < target.facts.queue_size]
    if not sizes:
        raise NotOffered(f"a queue has {target.facts.queue_size} descriptors")
    with target.driver(start=False) as driver:
        for size in sizes:
            negotiate(driver, target.mask())
            driver.device.select_queue(0)
            driver.device.set(CommonCfg.QUEUE_SIZE, size)
            back = driver.device.get(CommonCfg.QUEUE_SIZE)
            expect(back == size, f"queue_size reads {back} after {size} was written")
    with target.driver(queue_size=sizes[-1]) as driver:
        for _ in range(2 * sizes[-1] + 1):
            served(target, driver)


@check()
def queues_have_their_own_registers(target: Target) -> None:
    """Size, addresses and queue_enable are those of the queue in queue_select, and read back (PCI-044, PCI-053)."""
    target.require_queues(2)
    with target.driver(start=False) as driver:
        negotiate(driver, target.mask())
        device = driver.device
        half, indices = max(target.facts.queue_size // 2, 1), sorted({0, 1, target.facts.queues - 1})
        queues = [new_queue(driver, index, half if index == 1 else None) for index in indices]
        driver.queues += queues
        last = queues[-1]
        for queue in queues:
            _place(device, queue)
        device.set(CommonCfg.QUEUE_SELECT, last.index)
        device.set(CommonCfg.QUEUE_ENABLE, 1)
        for queue in queues:
            device.set(CommonCfg.QUEUE_SELECT, queue.index)
            enabled = device.get(CommonCfg.QUEUE_ENABLE)
            expect(enabled == (queue is last), f"queue_enable of queue {queue.index} reads {enabled}")
            size = device.get(CommonCfg.QUEUE_SIZE)
            expect(size == queue.size, f"queue_size of queue {queue.index} reads {size} of {queue.size}")
            places = [device.get(register) for register in _AREAS]
            expected = [queue.desc, queue.avail, queue.used]
            expect(places == expected, f"the addresses of queue {queue.index} read {places} of {expected}")


@check()
def registers_read_back(target: Target) -> None:
    """What is written to a field at its offset, in its width, is read there and nowhere else (PCI-012, PCI-053)."""
    with target.driver(start=False) as driver:
        negotiate(driver, target.mask())
        device = driver.device
        for register in (CommonCfg.DEVICE_FEATURE_SELECT, CommonCfg.DRIVER_FEATURE_SELECT):
            for value in (1, 0):
                device.set(register, value)
                expect(device.get(register) == value, f"{register.name} reads {device.get(register):#x} of {value:#x}")
        device.select_queue(0)
        values = dict.fromkeys(_AREAS, 0)
        for value in (0x10000, 0x1_0000_0000, 0x7654_3210_0000, 0):
            for register in _AREAS:
                values[register] = value
                device.set(register, value)
                seen = {each: device.get(each) for each in _AREAS}
                expect(
                    seen == values, f"after {value:#x} to {register.name} the addresses read {_in_hex(seen.values())}"
                )
        for index in (target.facts.queues - 1, 0):
            device.set(CommonCfg.QUEUE_SELECT, index)
            back = device.get(CommonCfg.QUEUE_SELECT)
            expect(back == index, f"queue_select reads {back} of {index}")


def _in_hex(values: Iterable[int]) -> str:
    return ", ".join(f"{each:#x}" for each in values)


def _place(device: VirtioDevice, queue: Virtqueue) -> None:
    device.set(CommonCfg.QUEUE_SELECT, queue.index)
    for register, address in zip(_AREAS, (queue.desc, queue.avail, queue.used), strict=True):
        device.set(register, address)


@check(each_ring=True)
def rings_above_4_gib(target: Target) -> None:
    """Descriptors, driver and device area are found at 64-bit addresses, in any order (PCI-045)."""
    size = 64 << 20
    with GuestMemory(size, [Range(_HIGH, size)]) as memory, target.driver(memory=memory) as driver:
        queue = driver.queues[0]
        expect(min(queue.desc, queue.avail, queue.used) >= _HIGH, "the ring was not put where it should be")
        served(target, driver)


@check(each_ring=True)
def only_enabled_queues_are_served(target: Target) -> None:
    """With queue_enable 0 nothing is taken from a queue, with 1 it is (PCI-046)."""
    with target.driver(start=False) as driver:
        for enable in (False, True):
            negotiate(driver, plain(target))
            queue = new_queue(driver, 0)
            driver.queues.append(queue)
            if enable:
                driver.device.start_queue(queue, driver.lines.queue_vector(0))
            else:
                _place(driver.device, queue)
            pending = submit(target, driver)
            driver.device.status |= DeviceStatus.DRIVER_OK
            ring(driver)
            if enable:
                driver.wait(pending).result()
            else:
                driver.device.reset()  # which is over when the device has done whatever it does
                expect(not driver.poll() and not pending.done, "a queue that is not enabled was served")
                driver.forget()


@check(Feature.ADMIN_VQ)
def admin_queues(target: Target) -> None:
    """Administration queues lie behind the others and within 16 bits (PCI-050, PCI-051)."""
    with target.driver(start=False) as driver:
        negotiate(driver, target.mask(Feature.ADMIN_VQ))
        device = driver.device
        count = device.get(CommonCfg.NUM_QUEUES)
        first, number = device.get(CommonCfg.ADMIN_QUEUE_INDEX), device.get(CommonCfg.ADMIN_QUEUE_NUM)
        expect(first >= count, f"admin_queue_index is {first}, and there are {count} queues")
        expect(number <= 0x10000 - first, f"admin_queue_num is {number}, from {first} on")


# Queue reset.


@check(Feature.RING_RESET)
def queue_reset_reads_0(target: Target) -> None:
    """queue_reset reads 0 after a device reset, and after a queue was enabled (PCI-039, PCI-040)."""
    with target.driver(start=False) as driver:
        for turn in ("after a device reset", "after another"):
            negotiate(driver, target.mask())
            for index in range(target.facts.queues):
                driver.device.select_queue(index)
                value = driver.device.get(CommonCfg.QUEUE_RESET)
                expect(value == 0, f"queue_reset of queue {index} reads {value} {turn}")
            driver.init()
            driver.device.select_queue(0)
            value = driver.device.get(CommonCfg.QUEUE_RESET)
            expect(value == 0, f"queue_reset reads {value} after queue 0 was enabled")


@check(Feature.RING_RESET, each_ring=True)
def queue_reset(target: Target) -> None:
    """1 written to queue_reset resets the queue; in the end it and queue_enable read 0 (PCI-054, PCI-056)."""
    with target.driver() as driver:
        served(target, driver)
        driver.device.reset_queue(0)
        enabled = driver.device.get(CommonCfg.QUEUE_ENABLE)
        expect(enabled == 0, f"queue_enable reads {enabled} after a queue reset")
        size = driver.device.select_queue(0)
        expect(size == target.facts.queue_size, f"queue_size reads {size} after a queue reset")


@check(Feature.RING_RESET, each_ring=True)
def queue_reset_ends_before_it_shows(target: Target) -> None:
    """queue_reset reads 1 until nothing more is written for what was in flight in the queue (PCI-055)."""
    with target.driver() as driver:
        pendings = busy(target, driver)
        driver.device.reset_queue(0)
        old = driver.queues[0]
        watch = Watch(driver, ranges=[*areas(old), *answers(pendings)])
        driver.queues[0] = new_queue(driver, 0)
        driver.device.start_queue(driver.queues[0], driver.lines.queue_vector(0))
        try:
            served(target, driver)
            watch.untouched("for requests from before, after queue_reset read 0")
        finally:
            old.close()


@check(Feature.RING_RESET, each_ring=True)
def queue_starts_anew(target: Target) -> None:
    """After a queue reset the queue works with another size and at other addresses (PCI-057)."""
    with target.driver() as driver:
        full = target.facts.queue_size
        for size in (full // 2, full) if full >= 8 else (full, full):
            served(target, driver)
            driver.device.reset_queue(0)
            old = driver.queues[0]
            driver.queues[0] = new_queue(driver, 0, size)
            old.close()
            driver.device.start_queue(driver.queues[0], driver.lines.queue_vector(0))
            for _ in range(min(2 * size, 64) + 1):
                served(target, driver)
