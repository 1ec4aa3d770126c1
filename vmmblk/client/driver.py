"""A virtio-blk driver without a guest.

:class:`VirtioBlk` brings a device up, and reads and writes it: synchronously (``read``, ``write``, ...), or in two
steps (``submit``, ``kick``, then ``wait``) with any number of requests in flight.  ``submit_raw``, the queues and the
registers in ``device`` are open to tests that break the rules.  One thread, one device.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

from vmmblk.client.connection import Connection
from vmmblk.client.device import VirtioDevice
from vmmblk.client.doorbells import Doorbells, Kick
from vmmblk.client.errors import NeedsReset, ProtocolError
from vmmblk.client.interrupts import InterruptLines, Interrupts
from vmmblk.client.memory import GuestMemory
from vmmblk.client.pci import PciDevice
from vmmblk.client.queue import DESCRIPTOR_SIZE, Descriptor, PackedQueue, SplitQueue, Virtqueue
from vmmblk.client.request import Framing, Pending, Request, cut, default_framing
from vmmblk.client.wire import IrqIndex
from vmmblk.spec import (
    BLK_ID_BYTES,
    DISCARD_SEGMENT,
    LIFETIME,
    SECTOR_SIZE,
    WRITE_ZEROES_FLAG_UNMAP,
    ZONE_APPEND_SECTOR,
    ZONE_DESCRIPTOR,
    ZONE_REPORT_HEADER,
    BlkConfig,
    CommonCfg,
    DeviceStatus,
    Feature,
    IsrStatus,
    RequestType,
)

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Sequence

__all__ = ["SUPPORTED", "VirtioBlk", "attach"]

SUPPORTED = sum(
    feature.mask
    for feature in (
        Feature.BLK_SIZE_MAX,
        Feature.BLK_SEG_MAX,
        Feature.BLK_GEOMETRY,
        Feature.BLK_RO,
        Feature.BLK_BLK_SIZE,
        Feature.BLK_FLUSH,
        Feature.BLK_TOPOLOGY,
        Feature.BLK_CONFIG_WCE,
        Feature.BLK_MQ,
        Feature.BLK_DISCARD,
        Feature.BLK_WRITE_ZEROES,
        Feature.BLK_LIFETIME,
        Feature.BLK_SECURE_ERASE,
        Feature.BLK_ZONED,
        Feature.INDIRECT_DESC,
        Feature.EVENT_IDX,
        Feature.VERSION_1,
        Feature.ACCESS_PLATFORM,
        Feature.ORDER_PLATFORM,
        Feature.NOTIFICATION_DATA,
        Feature.NOTIF_CONFIG_DATA,
        Feature.RING_RESET,
        Feature.SUSPEND,
    )
)
"""The features this driver takes when it is not told which: with a split ring, the one that every device has."""

_NO_LIMIT = 0xFFFFFFFF


class VirtioBlk:
    """A virtio-blk device on the other end of ``connection``, which must have been given ``memory`` already.

    ``features`` masks what is accepted of the offer (default: SUPPORTED).  ``queue_size`` is an upper bound.
    ``queues`` is how many to set up.  ``indirect`` uses indirect tables for every chain; by default only for chains
    that do not fit otherwise.  ``window`` goes through the PCI_CFG window; ``posted=False`` waits for the reply to
    each BAR write.  ``kick`` is how doorbells are rung.  ``interrupts`` are MSI-X by default, or INTx on a device
    without it.  With ``start=False`` nothing is written to the device until ``init`` is called.

    Raises ValueError if the device has not these interrupts, Impossible if not these doorbells.
    """

    def __init__(
        self,
        connection: Connection,
        memory: GuestMemory,
        *,
        features: int | None = None,
        queue_size: int | None = None,
        queues: int = 1,
        interrupts: Interrupts | None = None,
        indirect: bool | None = None,
        window: bool = False,
        posted: bool = True,
        kick: Kick = Kick.WRITE,
        timeout: float = 5.0,
        start: bool = True,
    ) -> None:
        self.connection = connection
        self.memory = memory
        self.timeout = timeout
        self.pci = PciDevice(connection, window=window, posted=posted)
        self.device = VirtioDevice(self.pci, timeout)
        self.wanted = SUPPORTED if features is None else features
        self.features = 0
        self.queues: list[Virtqueue] = []
        self.stray: list[tuple[int, int]] = []
        """Used elements (head, length) of chains that were offered behind this driver's back."""
        self._queue_size = queue_size
        self._queue_count = queues
        self._indirect = indirect
        self._pending: dict[tuple[int, int], Pending] = {}
        self._doorbells: list[tuple[int, int]] = []  # of each queue: offset, id
        self._size_max = _NO_LIMIT
        self._config_changes = 0
        self._generation = 0
        if interrupts is None:
            interrupts = Interrupts.INTX if self.pci.msix is None else Interrupts.MSIX
        self.doorbells = Doorbells(self.pci, kick)
        try:
            self.lines = InterruptLines(self.pci, interrupts, queues)
        except BaseException:
            self.doorbells.close()
            raise
        if start:
            try:
                self.init()
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Forget the device and close the eventfds.  It is not reset; the connection and memory stay open."""
        self.forget()
        self.lines.close()
        self.doorbells.close()

    # The life of a device.

    def init(self) -> None:
        """Bring the device up from any state: "Device Initialization", from reset to DRIVER_OK.

        Raises ProtocolError if the device refuses the features it offered.
        """
        self.reset()
        self.pci.enable()
        self.lines.install(self.pci)
        self.device.greet()
        self.features = self.device.features & self.wanted
        if not self.device.accept(self.features):
            raise ProtocolError(f"the device refuses features {self.features:#x} of its own offer")
        if self.has(Feature.BLK_SIZE_MAX):
            self._size_max = self.config(BlkConfig.SIZE_MAX) or _NO_LIMIT
        self.device.set_config_vector(self.lines.config_vector)
        for index in range(self._queue_count):
            self.queues.append(self._start_queue(index))
            notify_id = self.device.notify_id(index) if self.has(Feature.NOTIF_CONFIG_DATA) else index
            self._doorbells.append((self.device.notify_offset(index), notify_id))
        self._generation = self._read_generation()
        self.device.status |= DeviceStatus.DRIVER_OK

    def reset(self) -> None:
        """Reset the device by its status register; what was in flight is forgotten."""
        self.device.reset()
        self.forget()

    def forget(self) -> None:
        """Give up every queue and request, for instance after a reset of the whole device."""
        for pending in self._pending.values():
            pending.release(self.memory)
        self._pending.clear()
        for queue in self.queues:
            queue.close()
        self.queues.clear()
        self._doorbells.clear()
        self._config_changes = 0
        self._size_max = _NO_LIMIT
        self.features = 0

    def reset_queue(self, index: int = 0) -> None:
        """Reset one queue (RING_RESET) and set it up anew; what was in flight there is forgotten."""
        self.device.reset_queue(index)
        for key in [key for key in self._pending if key[0] == index]:
            self._pending.pop(key).release(self.memory)
        self.queues[index].close()
        self.queues[index] = self._start_queue(index)

    def new_queue(self, index: int, size: int) -> Virtqueue:
        """A ring for queue ``index`` in the negotiated format, of which the device knows nothing yet."""
        layout = PackedQueue if self.has(Feature.RING_PACKED) else SplitQueue
        return layout(self.memory, index, size, event_idx=self.has(Feature.EVENT_IDX))

    def has(self, feature: Feature) -> bool:
        """Whether a feature was negotiated."""
        return bool(self.features & feature.mask)

    # Configuration.

    @property
    def status(self) -> DeviceStatus:
        """The device status."""
        return self.device.status

    @property
    def capacity(self) -> int:
        """Size of the disk, sectors of 512 bytes."""
        return self.config(BlkConfig.CAPACITY)

    @property
    def block_size(self) -> int:
        """The disk's logical block, bytes."""
        return self.config(BlkConfig.BLK_SIZE) if self.has(Feature.BLK_BLK_SIZE) else SECTOR_SIZE

    @property
    def writeback(self) -> bool:
        """Whether the write cache is on (CONFIG_WCE); assigning switches it."""
        return bool(self.config(BlkConfig.WRITEBACK))

    @writeback.setter
    def writeback(self, value: bool) -> None:
        self.device.set_config(BlkConfig.WRITEBACK, int(value))

    def config(self, field: BlkConfig) -> int:
        """A field of the block configuration."""
        return self.device.config(field)

    # Requests, one at a time.  All raise StatusError, NeedsReset, TimeoutError or ConnectionError.

    def read(self, sector: int, length: int) -> bytes:
        """Read ``length`` bytes from ``sector`` (512-byte units)."""
        return self.call(RequestType.IN, sector, data_in=length)

    def write(self, sector: int, data: bytes) -> None:
        """Write ``data`` from ``sector`` (512-byte units) on."""
        self.call(RequestType.OUT, sector, data)

    def flush(self) -> None:
        """Make completed writes durable."""
        self.call(RequestType.FLUSH)

    def get_id(self) -> str:
        """The disk's serial."""
        return self.call(RequestType.GET_ID, data_in=BLK_ID_BYTES).rstrip(b"\0").decode("ascii")

    def discard(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Discard ranges: (sector, number of sectors), 512-byte units."""
        self.call(RequestType.DISCARD, 0, _segments(ranges, 0))

    def write_zeroes(self, ranges: Iterable[tuple[int, int]], *, unmap: bool = False) -> None:
        """Zero ranges: (sector, number of sectors), 512-byte units; ``unmap`` allows deallocation."""
        self.call(RequestType.WRITE_ZEROES, 0, _segments(ranges, WRITE_ZEROES_FLAG_UNMAP if unmap else 0))

    def secure_erase(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Erase ranges for good: (sector, number of sectors), 512-byte units."""
        self.call(RequestType.SECURE_ERASE, 0, _segments(ranges, 0))

    def zone_report(self, sector: int = 0, room: int = 64) -> list[tuple[int, int, int, int, int]]:
        """Zones from the one that holds ``sector`` on, at most ``room``: z_cap, z_start, z_wp, z_type, z_state of each.

        Units are 512-byte sectors.
        """
        size = ZONE_REPORT_HEADER.size + room * ZONE_DESCRIPTOR.size
        report = self.call(RequestType.ZONE_REPORT, sector, data_in=size)
        (count,) = ZONE_REPORT_HEADER.unpack_from(report)
        return list(ZONE_DESCRIPTOR.iter_unpack(report[ZONE_REPORT_HEADER.size :]))[:count]

    def zone_append(self, sector: int, data: bytes) -> int:
        """Append to the zone that starts at ``sector``; the first sector written, 512-byte units."""
        answer = self.call(RequestType.ZONE_APPEND, sector, data, data_in=ZONE_APPEND_SECTOR.size)
        (written,) = ZONE_APPEND_SECTOR.unpack(answer)
        return int(written)

    def get_lifetime(self) -> tuple[int, int, int]:
        """pre_eol_info and the two estimates of wear, typ_a and typ_b."""
        pre_eol_info, typ_a, typ_b = LIFETIME.unpack(self.call(RequestType.GET_LIFETIME, data_in=LIFETIME.size))
        return pre_eol_info, typ_a, typ_b

    def call(
        self,
        request_type: int,
        sector: int = 0,
        data_out: bytes = b"",
        data_in: int = 0,
        *,
        framing: Framing | None = None,
        queue: int = 0,
    ) -> bytes:
        """Submit a request, kick, wait, and return what was read."""
        pending = self.submit(request_type, sector, data_out, data_in, framing=framing, queue=queue)
        self.kick(queue)
        return self.wait(pending).result()

    # Requests, many at a time.

    def submit(
        self,
        request_type: int,
        sector: int = 0,
        data_out: bytes = b"",
        data_in: int = 0,
        *,
        framing: Framing | None = None,
        queue: int = 0,
        reserved: int = 0,
    ) -> Pending:
        """Put a request into the ring; the device may see it after ``kick``.

        Raises QueueFull, MemoryError.
        """
        request = Request(request_type, sector, data_out, data_in, reserved)
        pending = Pending(queue)
        pending.place(self.memory, request)
        if framing is None:
            framing = default_framing(request, self._size_max)
        segments = cut(pending, request, framing)
        try:
            table = self._table(pending, len(segments))
            pending.head = self.queues[queue].add(segments, table)
        except BaseException:
            pending.release(self.memory)
            raise
        self._pending[queue, pending.head] = pending
        return pending

    def submit_raw(self, descriptors: Sequence[Descriptor], *, queue: int = 0) -> Pending:
        """Put literal descriptors into free slots and offer the first.  Raises QueueFull."""
        pending = Pending(queue, self.queues[queue].add_raw(descriptors))
        self._pending[queue, pending.head] = pending
        return pending

    def kick(self, queue: int = 0, *, force: bool = False) -> bool:
        """Publish what was submitted, and notify the device if it wants to be (or ``force``); tells whether it was."""
        self.queues[queue].publish()
        wanted = self.queues[queue].need_kick()
        if wanted or force:
            self.ring_doorbell(queue)
        return wanted or force

    def ring_doorbell(self, queue: int = 0) -> None:
        """Notify the device, whatever the ring says."""
        offset, notify_id = self._doorbells[queue]
        if self.has(Feature.NOTIFICATION_DATA):
            data = notify_id | self.queues[queue].notification_data << 16
            self.doorbells.ring(offset, data.to_bytes(4, "little"))
        else:
            self.doorbells.ring(offset, notify_id.to_bytes(2, "little"))

    def doorbell_offset(self, queue: int = 0) -> int:
        """Where in the notification structure the doorbell of ``queue`` is."""
        return self._doorbells[queue][0]

    def poll(self, queue: int = 0) -> int:
        """Take what the device has completed, without waiting; returns how many.  Raises ProtocolError."""
        used = self.queues[queue].get_used()
        for head, written in used:
            pending = self._pending.pop((queue, head), None)
            if pending is None:
                self.stray.append((head, written))
            else:
                pending.finish(self.memory, written)
        return len(used)

    def wait(self, pending: Pending, timeout: float | None = None) -> Pending:
        """Sleep until ``pending`` is done, and return it.

        Raises TimeoutError, NeedsReset (the device gave up), ConnectionError (the server is gone).
        """
        deadline = self._deadline(timeout)
        queue = self.queues[pending.queue]
        while not pending.done:
            if self.poll(pending.queue) or pending.done:
                continue
            if self.lines.mode is Interrupts.POLL:
                queue.disarm()
            elif queue.arm():
                continue
            self._sleep(deadline, "the device does not complete the request")
            if self._config_changes and DeviceStatus.NEEDS_RESET in self.status:
                raise NeedsReset
        return pending

    def wait_all(self, pendings: Iterable[Pending], timeout: float | None = None) -> None:
        """Wait for each of them, all within ``timeout``."""
        deadline = self._deadline(timeout)
        for pending in pendings:
            self.wait(pending, deadline - time.monotonic())

    # Interrupts by themselves.

    def wait_config_change(self, timeout: float | None = None) -> None:
        """Sleep until the device has told of a configuration change since this last returned."""
        deadline = self._deadline(timeout)
        while not self._config_changes:
            self._sleep(deadline, "the device tells of no configuration change")
        self._config_changes = 0

    def wait_needs_reset(self, timeout: float | None = None) -> None:
        """Sleep until the device needs a reset and has told so."""
        deadline = self._deadline(timeout)
        while DeviceStatus.NEEDS_RESET not in self.status:
            self._sleep(deadline, "the device does not ask for a reset")

    def take_interrupts(self, queue: int = 0) -> int:
        """How often the queue's eventfd was signalled since it was last looked at; INTx stays asserted."""
        return self.lines.take(self.lines.queue_line(queue))

    # The inside.

    def _start_queue(self, index: int) -> Virtqueue:
        queue = self.new_queue(index, self.device.queue_size(index, self._queue_size))
        self.device.start_queue(queue, self.lines.queue_vector(index))
        return queue

    def _table(self, pending: Pending, count: int) -> int | None:
        """An indirect table for a chain of ``count``, if it shall have one."""
        room = self.queues[pending.queue].room
        wanted = room < count if self._indirect is None else self._indirect
        if not wanted or not self.has(Feature.INDIRECT_DESC):
            return None
        table = self.memory.alloc(DESCRIPTOR_SIZE * count, DESCRIPTOR_SIZE)
        pending.allocations.append(table)
        return table

    def _deadline(self, timeout: float | None) -> float:
        return time.monotonic() + (self.timeout if timeout is None else timeout)

    def _sleep(self, deadline: float, complaint: str) -> None:
        """Sleep until something happens, and take note of it; when polling, just look.  Raises TimeoutError."""
        remaining = deadline - time.monotonic()
        polling = self.lines.mode is Interrupts.POLL
        ready, message = self.lines.wait(self.connection.fileno(), 0 if polling else remaining)
        if message:
            self.connection.pump()
        for line in ready:
            self.lines.take(line)
        if not ready and remaining <= 0:
            raise TimeoutError(complaint)
        if self._config_changed(ready):
            self._config_changes += 1

    def _config_changed(self, ready: set[int]) -> bool:
        """Whether the eventfds that are ready tell of a configuration change."""
        if self.lines.mode is Interrupts.INTX:
            return bool(ready) and IsrStatus.CONFIG in self._acknowledge()
        if self.lines.config_line not in ready:
            return False
        if self.lines.mode is Interrupts.MSIX and self.lines.config_vector not in self._queue_vectors():
            return True
        before, self._generation = self._generation, self._read_generation()
        return before != self._generation or DeviceStatus.NEEDS_RESET in self.status

    def _read_generation(self) -> int:
        """The generation of the configuration, which changes only once a changed configuration is read."""
        self.device.config_bytes(BlkConfig.CAPACITY, 1)
        return self.device.get(CommonCfg.CONFIG_GENERATION)

    def _acknowledge(self) -> IsrStatus:
        """Read the ISR, which lowers INTx, and unmask it, as a VMM does after the access."""
        cause = IsrStatus(self.pci.isr.read(0, 1))
        self.connection.unmask_irqs(IrqIndex.INTX)
        return cause

    def _queue_vectors(self) -> set[int]:
        return {self.lines.queue_vector(index) for index in range(self._queue_count)}


@contextlib.contextmanager
def attach(
    address: str | os.PathLike[str],
    *,
    memory: GuestMemory | None = None,
    timeout: float = 5.0,
    **options: Any,
) -> Iterator[VirtioBlk]:
    """Connect to a server, give it memory (``memory`` stays the caller's; default 64 MiB) and drive its device.

    ``options`` are those of :class:`VirtioBlk`.
    """
    with contextlib.ExitStack() as stack:
        if memory is None:
            memory = stack.enter_context(GuestMemory())
        connection = stack.enter_context(Connection(address, timeout))
        memory.map_all(connection)
        driver = VirtioBlk(connection, memory, timeout=timeout, **options)
        stack.callback(driver.close)
        yield driver


def _segments(ranges: Iterable[tuple[int, int]], flags: int) -> bytes:
    return b"".join(DISCARD_SEGMENT.pack(sector, sectors, flags) for sector, sectors in ranges)
