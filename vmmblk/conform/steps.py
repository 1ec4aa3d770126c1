"""What several checks do: bringing a device up step by step, offering requests early, watching what must not change."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from vmmblk.client.driver import VirtioBlk
from vmmblk.client.errors import QueueFull
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.memory import PAGE, GuestMemory, Range
from vmmblk.client.queue import Descriptor, SplitQueue
from vmmblk.conform.check import Broken, NotTestable, expect
from vmmblk.spec import (
    REQUEST_HEADER,
    SECTOR_SIZE,
    BlkConfig,
    CommonCfg,
    DescFlag,
    DeviceStatus,
    Feature,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmmblk.client.queue import Virtqueue
    from vmmblk.client.request import Pending
    from vmmblk.conform.target import Target

__all__ = [
    "Bait",
    "Watch",
    "answers",
    "areas",
    "busy",
    "fence",
    "fence_after_reset",
    "go",
    "needs_reset",
    "negotiate",
    "place",
    "renewed",
    "served",
    "set_up",
    "settings",
    "small",
    "until",
]

_MEMORY = 8 << 20
_QUEUE_SIZE = 64
_ELSEWHERE = 1 << 32
_UNKNOWN_TYPE = 0x7FFF_FFF0
_TURNS = 16
_PATIENCE = 1.0
_BUSY_BYTES = 1 << 17


@contextlib.contextmanager
def small(target: Target, **options: Any) -> Iterator[VirtioBlk]:
    """A driver (options: those of VirtioBlk) with short rings and little memory, so that all of it can be watched."""
    options.setdefault("queue_size", _QUEUE_SIZE)
    with GuestMemory(_MEMORY) as memory, target.driver(memory=memory, **options) as driver:
        yield driver


# The steps of "Device Initialization", for a driver that has been up and has not used its rings yet.


def negotiate(driver: VirtioBlk, features: int | None = None) -> None:
    """From a reset to FEATURES_OK; ``features`` defaults to those that the driver has.  The rings stay, as they are."""
    device = driver.device
    device.reset()
    device.greet()
    mask = driver.features if features is None else features
    expect(device.accept(mask), f"FEATURES_OK does not stay set for features {mask:#x}")


def set_up(driver: VirtioBlk) -> None:
    """Give the device its vectors and every queue of the driver's, enabled."""
    driver.device.set_config_vector(driver.lines.config_vector)
    for queue in driver.queues:
        place(driver, queue)


def place(driver: VirtioBlk, queue: Virtqueue) -> None:
    """Set up one queue and enable it."""
    driver.device.queue_size(queue.index, queue.size)
    driver.device.start_queue(queue, driver.lines.queue_vector(queue.index))


def settings(driver: VirtioBlk, queue: Virtqueue) -> None:
    """Write the settings of a queue, whether they are taken or not; it is not enabled."""
    device = driver.device
    device.set(CommonCfg.QUEUE_SELECT, queue.index)
    device.set(CommonCfg.QUEUE_SIZE, queue.size)
    device.set(CommonCfg.QUEUE_DESC, queue.desc)
    device.set(CommonCfg.QUEUE_DRIVER, queue.avail)
    device.set(CommonCfg.QUEUE_DEVICE, queue.used)
    device.set(CommonCfg.QUEUE_MSIX_VECTOR, driver.lines.queue_vector(queue.index))


def go(driver: VirtioBlk) -> None:
    """Set DRIVER_OK."""
    driver.device.status |= DeviceStatus.DRIVER_OK


def renewed(driver: VirtioBlk, index: int, size: int) -> Virtqueue:
    """A new ring in new memory, in the place of the driver's; the device has not been told.  Returns the old one.

    The memory of the old one, and of what was in flight in it, stays taken.
    """
    old = driver.queues[index]
    driver.queues[index] = driver.new_queue(index, size)
    return old


# Requests.


def served(target: Target, driver: VirtioBlk, queue: int = 0) -> None:
    """Have one request served, rung for in any case.  Raises what ``VirtioBlk.wait`` raises; StatusError."""
    Bait(target, driver, queue, ripe=True).eaten()


class Bait:
    """A request that lies in the ring before the device may take it.

    It is of no known type, so that its status tells if the device took it as it was; ``ripen`` makes it a read of the
    first block, which it is from the start if it is ``ripe``.  Raises NotTestable if there is no block, or no room.
    """

    def __init__(self, target: Target, driver: VirtioBlk, queue: int = 0, *, ripe: bool = False) -> None:
        if not target.facts.capacity:
            raise NotTestable("the disk is empty")
        self._driver = driver
        kind = RequestType.IN if ripe else _UNKNOWN_TYPE
        try:
            self.pending = driver.submit(kind, 0, data_in=target.facts.block_size, queue=queue)
        except QueueFull as full:
            raise NotTestable(str(full)) from full
        driver.queues[queue].arm()
        driver.queues[queue].publish()

    def ripen(self) -> None:
        """Make it a proper request."""
        self._driver.memory.write(self.pending.readable, REQUEST_HEADER.pack(RequestType.IN, 0, 0))

    @property
    def taken(self) -> bool:
        """Whether the device has used it."""
        self._driver.poll(self.pending.queue)
        return self.pending.done

    def eaten(self) -> None:
        """Ring the doorbell, and have it served; it must be ripe by then.

        Raises Broken if it was served earlier as it was then, and what ``VirtioBlk.wait`` raises.
        """
        self._driver.ring_doorbell(self.pending.queue)
        status = self._driver.wait(self.pending).status
        expect(status == Status.OK, f"a read was completed with status {status}, or taken before its time")


def busy(target: Target, driver: VirtioBlk, queue: int = 0, count: int = 16) -> list[Pending]:
    """Have ``count`` reads under way, as long ones as disk and ring allow; rung for, not waited for."""
    if not target.facts.capacity:
        raise NotTestable("the disk is empty")
    unit = target.facts.block_size
    most = driver.config(BlkConfig.SIZE_MAX) if driver.has(Feature.BLK_SIZE_MAX) else _BUSY_BYTES
    length = max(min(_BUSY_BYTES, most or _BUSY_BYTES, target.facts.capacity * SECTOR_SIZE) // unit, 1) * unit
    pending: list[Pending] = []
    with contextlib.suppress(QueueFull):
        while len(pending) < count:
            pending.append(driver.submit(RequestType.IN, 0, data_in=length, queue=queue))
    driver.queues[queue].arm()
    driver.kick(queue, force=True)
    return pending


def areas(queue: Virtqueue) -> list[Range]:
    """Where a ring lies."""
    count = queue.size
    sizes = (16 * count, 6 + 2 * count, 6 + 8 * count) if isinstance(queue, SplitQueue) else (16 * count, 4, 4)
    return [Range(*each) for each in zip((queue.desc, queue.avail, queue.used), sizes, strict=True)]


def answers(pending: Sequence[Pending]) -> list[Range]:
    """What the device writes into, of these requests."""
    return [Range(each.writable, each.data_in + 1) for each in pending]


# Watching.


class Watch:
    """What the device could do behind the driver's back: change memory, interrupt.  Counts from its making.

    With ``live`` the device may write its wishes about doorbells, as it may at any time while it is live.  ``ranges``
    are what is watched, by default all of memory.
    """

    def __init__(self, driver: VirtioBlk, *, live: bool = False, ranges: Sequence[Range] | None = None) -> None:
        self._driver = driver
        self._ranges = driver.memory.layout if ranges is None else ranges
        self._holes = [hole for queue in driver.queues for hole in _wishes(queue)] if live else []
        self._before = self._memory()
        self._interrupts()

    def quiet(self, when: str) -> None:
        """Expect that nothing has happened; ``when`` tells when that was."""
        self.untouched(when)
        self.silent(when)

    def untouched(self, when: str) -> None:
        """Expect that memory is what it was."""
        for piece, was, now in zip(self._ranges, self._before, self._memory(), strict=True):
            if now != was:
                page = next(at for at in range(0, piece.size, PAGE) if now[at : at + PAGE] != was[at : at + PAGE])
                at = next(at for at in range(page, page + PAGE) if now[at] != was[at])
                raise Broken(f"memory was written at {piece.iova + at:#x} {when}")

    def silent(self, when: str) -> None:
        """Expect that there was no interrupt."""
        count = self._interrupts()
        expect(not count, f"{count} interrupts came {when}")

    def _memory(self) -> list[bytearray]:
        pieces = [bytearray(self._driver.memory.read(*piece)) for piece in self._ranges]
        for hole in self._holes:
            for piece, data in zip(self._ranges, pieces, strict=True):
                start = hole.iova - piece.iova
                if 0 <= start < piece.size:
                    data[start : start + hole.size] = bytes(hole.size)
        return pieces

    def _interrupts(self) -> int:
        lines = self._driver.lines
        queues = {lines.queue_line(queue.index) for queue in self._driver.queues}
        return sum(lines.take(line) for line in {lines.config_line, *queues})


def _wishes(queue: Virtqueue) -> list[Range]:
    """Where the device tells whether it wants doorbells."""
    if isinstance(queue, SplitQueue):
        return [Range(queue.used, 2), Range(queue.used + 4 + 8 * queue.size, 2)]
    return [Range(queue.used, 4)]


def until(driver: VirtioBlk, done: Callable[[], object], seen: str, timeout: float | None = None) -> None:
    """Ask again and again, with a register read in between; raises Broken with what was ``seen`` if it never holds."""
    deadline = time.monotonic() + (driver.timeout if timeout is None else timeout)
    while not done():
        expect(time.monotonic() < deadline, seen)
        driver.device.get(CommonCfg.DEVICE_STATUS)


def fence(driver: VirtioBlk, seconds: float = 0.0) -> None:
    """Let the device answer register reads, so that it has seen every write before, and has had its turn.

    For ``seconds`` at least, where the device is known to have needed that long for what it might do now.
    """
    end = time.monotonic() + seconds
    turns = 0
    while turns < _TURNS or time.monotonic() < end:
        driver.device.get(CommonCfg.DEVICE_STATUS)
        turns += 1


def fence_after_reset(target: Target, driver: VirtioBlk) -> None:
    """Have another driver, in other memory, bring the device up and get a request served, then reset it.

    Whatever the device still had under way has come by then.  Interrupts still go to ``driver``'s eventfds; a device
    with MSI-X makes none of the new requests.
    """
    with GuestMemory(_MEMORY, [Range(_ELSEWHERE, _MEMORY)]) as memory:
        memory.map_all(driver.connection)
        other = VirtioBlk(
            driver.connection,
            memory,
            features=driver.wanted,
            queue_size=_QUEUE_SIZE,
            interrupts=Interrupts.POLL,
            timeout=driver.timeout,
        )
        try:
            served(target, other)
            other.reset()
        finally:
            other.close()
            driver.connection.dma_target = driver.memory
        memory.unmap_all(driver.connection)


# Needing a reset.


def needs_reset(driver: VirtioBlk) -> None:
    """Corrupt the first ring until the device sets DEVICE_NEEDS_RESET.  Raises NotTestable if it never does."""
    for corrupt in (_no_descriptor, _wrong_order, _empty_table):
        if not corrupt(driver):
            continue
        driver.ring_doorbell()
        deadline = time.monotonic() + min(_PATIENCE, driver.timeout)
        while time.monotonic() < deadline:
            if DeviceStatus.NEEDS_RESET in driver.status:
                return
        driver.init()
    raise NotTestable("no corrupt ring makes this device ask for a reset")


def _no_descriptor(driver: VirtioBlk) -> bool:
    """A head that is no descriptor, where there are heads."""
    queue = driver.queues[0]
    if not isinstance(queue, SplitQueue):
        return False
    queue.offer(queue.size)
    queue.publish()
    return True


def _wrong_order(driver: VirtioBlk) -> bool:
    """An element to read after one to write."""
    block = driver.memory.alloc(PAGE)
    both = DescFlag.NEXT | DescFlag.WRITE
    driver.submit_raw([Descriptor(block, 16, both), Descriptor(block + 64, 16)])
    driver.queues[0].publish()
    return True


def _empty_table(driver: VirtioBlk) -> bool:
    """An indirect table without entries."""
    driver.submit_raw([Descriptor(driver.memory.alloc(PAGE), 0, DescFlag.INDIRECT)])
    driver.queues[0].publish()
    return True
