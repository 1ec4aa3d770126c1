"""A device brought up with rings laid out by hand, and what becomes of the chains that it is given.

A :class:`Bench` is a driver without manners: it offers chains of any shape and tells their :class:`Fate`.  All of its
memory is watched; some more of the same pages was never given to the device.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.client.device import VirtioDevice
from vmmblk.client.errors import NeedsReset, StatusError
from vmmblk.client.interrupts import InterruptLines, Interrupts
from vmmblk.client.memory import GuestMemory
from vmmblk.client.pci import PciDevice
from vmmblk.client.queue import Descriptor
from vmmblk.client.request import UNSET_STATUS
from vmmblk.client.wire import IrqIndex
from vmmblk.conform.check import Broken, NotTestable, expect
from vmmblk.conform.rings import PackedRing, Ring, Shadow, SplitRing, Used, linked
from vmmblk.spec import REQUEST_HEADER, CommonCfg, DescFlag, DeviceStatus, Feature, IsrStatus, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from vmmblk.client.connection import Connection
    from vmmblk.conform.target import Target

__all__ = ["BEYOND", "MEMORY", "Bench", "Fate", "Parcel", "bench"]

MEMORY = 4 << 20
"""Bytes that the device is given, from address 0 on."""
BEYOND = 64 << 10
"""Bytes that follow in the same file, and are not given to it."""

_POISON = bytes(range(255, 128, -1))  # what a device that writes nothing leaves
_GRAIN = 8  # bytes that are not all written as they were by chance
_SPINS = 500
_LOOKS = 250  # for a used buffer, before one at the status
_NAP = 0.002
_FENCES = 4


@dataclass(frozen=True, slots=True)
class Parcel:
    """A request in memory: a run of bytes for the device to read, then one for it to write, the status at its end."""

    readable: int
    readable_length: int
    writable: int
    writable_length: int

    @property
    def status(self) -> int:
        """Address of the status byte."""
        return self.writable + self.writable_length - 1

    def elements(self, *sizes: int) -> list[Descriptor]:
        """The runs cut into elements of these sizes, readable ones first; what is left of a run is one more.

        By default the header, the data and the status are apart.
        """
        wanted = list(sizes) or [REQUEST_HEADER.size, *filter(None, self._data)]
        elements = []
        runs = ((self.readable, self.readable_length, 0), (self.writable, self.writable_length, DescFlag.WRITE))
        for start, total, flags in runs:
            position = 0
            while position < total:
                size = min(wanted.pop(0) if wanted else total, total - position)
                elements.append(Descriptor(start + position, size, flags))
                position += size
        return elements

    def chain(self, *sizes: int) -> list[Descriptor]:
        """The elements as one chain."""
        return linked(*self.elements(*sizes))

    @property
    def _data(self) -> tuple[int, int]:
        return self.readable_length - REQUEST_HEADER.size, self.writable_length - 1


@dataclass(frozen=True, slots=True)
class Fate:
    """What became of a chain, or of a queue: all of it False if nothing did while the driver had patience."""

    needs_reset: bool
    used: Used | None
    status: int
    """What the status byte holds, if the chain has one."""

    @property
    def refused(self) -> bool:
        """The device asks for a reset, or gives the chain back unused."""
        returned = self.used is not None and self.used.length == 0 and self.status == UNSET_STATUS
        return self.needs_reset or returned

    @property
    def failed(self) -> bool:
        """It is refused, or the request ends with an I/O error."""
        return self.refused or (self.used is not None and self.status == Status.IOERR)

    @property
    def served(self) -> bool:
        """The request ends well."""
        return self.used is not None and not self.needs_reset and self.status == Status.OK

    def __str__(self) -> str:
        seen = []
        if self.used is not None:
            names = {status.value: status.name for status in Status} | {UNSET_STATUS: "no status"}
            status = names.get(self.status, f"status {self.status:#x}")
            seen.append(f"the chain was used with length {self.used.length:#x} and {status}")
        if self.needs_reset:
            seen.append("the device set DEVICE_NEEDS_RESET")
        return " and ".join(seen) or "the chain stays in the ring, and the device does not ask for a reset"


@contextlib.contextmanager
def bench(
    target: Target,
    *,
    features: int | None = None,
    packed: bool | None = None,
    queues: int = 1,
    size: int | None = None,
    barely: bool = False,
    live: bool = True,
    whole: bool = True,
) -> Iterator[Bench]:
    """A bench on a fresh connection.

    ``features`` are what is accepted of the offer; ``packed`` chooses the ring format otherwise than the check's.
    There are ``queues`` rings of at most ``size`` descriptors, ``barely`` aligned if so wished, and the device goes
    live; with ``live=False`` it stops at FEATURES_OK, and there are no rings.  With ``whole=False`` no memory is given
    to it.
    At the end, the device must not have written where it may not: raises Harm.
    """
    if packed is None:
        packed = target.packed
    if features is None:
        features = target.mask(without=(Feature.BLK_SIZE_MAX, Feature.BLK_SEG_MAX))
    features = features & ~Feature.RING_PACKED.mask | (Feature.RING_PACKED.mask if packed else 0)
    with contextlib.ExitStack() as stack:
        memory = stack.enter_context(GuestMemory(MEMORY + BEYOND))
        connection = stack.enter_context(target.connection())
        connection.dma_target = memory
        if whole:
            memory.map(connection, 0, MEMORY)
        made = Bench(target, connection, memory, features, queues)
        stack.callback(made.lines.close)
        if live:
            for index in range(queues):
                made.add_ring(index, size=size, barely=barely)
            made.go()
        try:
            yield made
        except Broken:
            made.memory.unharmed()
            raise
        made.memory.unharmed()


class Bench:
    """See :func:`bench`.  ``memory`` watches over ``pages``; ``rings`` are the queues by index."""

    def __init__(
        self, target: Target, connection: Connection, pages: GuestMemory, features: int, queues: int = 1
    ) -> None:
        self.target = target
        self.connection = connection
        self.pages = pages
        self.memory = Shadow(pages)
        self.pci = PciDevice(connection)
        self.device = VirtioDevice(self.pci, target.options.timeout)
        msix = self.pci.msix is not None and connection.irq_info(IrqIndex.MSIX).vectors
        self.lines = InterruptLines(self.pci, Interrupts.MSIX if msix else Interrupts.INTX, queues)
        self.rings: dict[int, Ring] = {}
        self._doorbells: dict[int, tuple[int, int]] = {}
        self.features = self._negotiate(features)

    def has(self, feature: Feature) -> bool:
        """Whether a feature was negotiated."""
        return bool(self.features & feature.mask)

    # Bringing it up.

    def add_ring(
        self, index: int = 0, *, size: int | None = None, areas: Sequence[int] | None = None, barely: bool = False
    ) -> Ring:
        """Set up a queue and enable it; ``size`` and ``areas`` are as for ``bench`` and ``Ring``."""
        ring = self.layout(self.memory, index, self.device.queue_size(index, size), areas, barely=barely)
        self.rings[index] = ring
        notify_id = self.device.notify_id(index) if self.has(Feature.NOTIF_CONFIG_DATA) else index
        self._doorbells[index] = (self.device.notify_offset(index), notify_id)
        self.device.set(CommonCfg.QUEUE_SELECT, index)
        self.device.set(CommonCfg.QUEUE_DESC, ring.desc)
        self.device.set(CommonCfg.QUEUE_DRIVER, ring.avail)
        self.device.set(CommonCfg.QUEUE_DEVICE, ring.used)
        self.device.set(CommonCfg.QUEUE_MSIX_VECTOR, self.lines.queue_vector(index))
        self.device.set(CommonCfg.QUEUE_ENABLE, 1)
        return ring

    def go(self) -> None:
        """Set DRIVER_OK."""
        self.device.status |= DeviceStatus.DRIVER_OK

    @property
    def layout(self) -> type[SplitRing | PackedRing]:
        """The ring format that was negotiated."""
        return PackedRing if self.has(Feature.RING_PACKED) else SplitRing

    @property
    def split(self) -> SplitRing:
        """Queue 0, a split ring."""
        ring = self.rings[0]
        if not isinstance(ring, SplitRing):
            raise TypeError("the ring is packed")
        return ring

    @property
    def packed(self) -> PackedRing:
        """Queue 0, a packed ring."""
        ring = self.rings[0]
        if not isinstance(ring, PackedRing):
            raise TypeError("the ring is split")
        return ring

    def needs(self, descriptors: int) -> None:
        """Raise NotTestable unless queue 0 is that long."""
        if self.rings[0].size < descriptors:
            raise NotTestable(f"the queue has {self.rings[0].size} descriptors, this takes {descriptors}")

    # Requests.

    def parcel(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, *, bait: bool = False) -> Parcel:
        """A request in memory: its type, its sector (512 bytes), what it carries, and bytes of room for an answer.

        ``bait`` is a request that the device must not find: it may not write the answer.
        """
        header = self.memory.place(REQUEST_HEADER.pack(kind, 0, sector) + data)
        answer = self.memory.place(_poison(room))
        if not bait:
            self.memory.allow(answer, room + 1)
        return Parcel(header, REQUEST_HEADER.size + len(data), answer, room + 1)

    def block(self, *, bait: bool = False) -> Parcel:
        """A read of the first logical block.  Raises NotTestable if the disk has none."""
        if self.target.facts.capacity < self.target.block_sectors:
            raise NotTestable("the disk is empty")
        return self.parcel(RequestType.IN, room=self.target.facts.block_size, bait=bait)

    def answer(self, parcel: Parcel) -> bytes:
        """What a request has read.  Raises StatusError unless its status is OK."""
        if (status := self.status_of(parcel)) != Status.OK:
            raise StatusError(status)
        return self.memory.read(parcel.writable, parcel.writable_length - 1)

    def status_of(self, parcel: Parcel) -> int:
        """What the status byte holds."""
        return self.memory.read(parcel.status, 1)[0]

    def written(self, parcel: Parcel) -> int:
        """How many bytes of the writable run were written, up to the first few that were not."""
        now = self.memory.read(parcel.writable, parcel.writable_length)
        was = _poison(parcel.writable_length - 1)
        for at in range(0, len(now) - _GRAIN, _GRAIN):
            if now[at : at + _GRAIN] == was[at : at + _GRAIN]:
                return at
        return len(now) - (now[-1] == UNSET_STATUS)

    def untouched(self, parcel: Parcel) -> bool:
        """Whether nothing was written for a request, neither data nor status."""
        return self.memory.read(parcel.writable, parcel.writable_length) == _poison(parcel.writable_length - 1)

    def table(self, parcel: Parcel, *sizes: int) -> Descriptor:
        """What points at a new indirect table of a request's elements."""
        entries = self.rings[0].table(parcel.elements(*sizes))
        return Descriptor(self.memory.place(entries), len(entries), DescFlag.INDIRECT)

    # Chains.

    def offer(self, chain: Sequence[Descriptor], index: int = 0) -> int:
        """Make a chain available, and notify the device; returns its name."""
        name = self.rings[index].offer(chain)
        self.kick(index)
        return name

    def kick(self, index: int = 0) -> None:
        """Ring the doorbell of a queue."""
        offset, notify_id = self._doorbells[index]
        if self.has(Feature.NOTIFICATION_DATA):
            self.pci.notify.write(offset, 4, notify_id | self.rings[index].notification_data << 16)
        else:
            self.pci.notify.write(offset, 2, notify_id)

    def take(self, index: int = 0) -> Used:
        """Wait for the next used buffer.  Raises TimeoutError, NeedsReset."""
        taken: list[Used | None] = []

        def come() -> bool:
            taken.append(self.rings[index].take())
            if len(taken) % _LOOKS == 0 and self.needs_reset:
                raise NeedsReset
            return taken[-1] is not None

        self.until(come)
        if (used := taken[-1]) is None:
            raise TimeoutError("the device does not use the buffer")
        return used

    def serve(self, chain: Sequence[Descriptor], index: int = 0) -> Used:
        """Offer a chain and wait until it, alone in the ring, is used.  Raises what ``take`` raises."""
        name = self.offer(chain, index)
        used = self.take(index)
        expect(used.id == name, f"the device returned {used.id:#x}, and {name:#x} was in flight")
        return used

    def call(self, parcel: Parcel, index: int = 0, sizes: Sequence[int] = ()) -> bytes:
        """Have a request served, and return what it reads.  Raises what ``serve`` and ``answer`` raise."""
        self.serve(parcel.chain(*sizes), index)
        return self.answer(parcel)

    def fate(self, parcel: Parcel | None = None, index: int = 0) -> Fate:
        """What becomes of the next chain of a queue, ``parcel`` if it is one, within the driver's patience."""
        taken: list[Used] = []

        def decided() -> bool:
            used = self.rings[index].take()
            if used is not None:
                taken.append(used)
            return used is not None or self.needs_reset

        self.until(decided, self.patience)
        status = UNSET_STATUS if parcel is None else self.status_of(parcel)
        return Fate(self.needs_reset, taken[0] if taken else None, status)

    def fate_of(self, chain: Sequence[Descriptor], parcel: Parcel | None = None) -> Fate:
        """Offer a chain and see what becomes of it."""
        self.offer(chain)
        return self.fate(parcel)

    # Waiting.

    @property
    def patience(self) -> float:
        """How long to wait for what a device may leave undone, seconds: less than for what it must do."""
        return self.target.options.timeout / 4

    @property
    def needs_reset(self) -> bool:
        """Whether the device asks for a reset."""
        return DeviceStatus.NEEDS_RESET in self.device.status

    def until(self, done: Callable[[], object], timeout: float | None = None) -> bool:
        """Ask until it is so, or the time (default: that for completions) is over; tells which."""
        deadline = time.monotonic() + (self.target.options.timeout if timeout is None else timeout)
        tries = 0
        while not done():
            tries += 1
            if time.monotonic() > deadline:
                return bool(done())
            if tries > _SPINS and self.lines.wait(self.connection.fileno(), _NAP)[1]:
                self.connection.pump()
        return True

    def fence(self) -> None:
        """Have the device do other things, so that what it was told before has had its turn.

        It answers registers, and serves queue 1 if there is one.
        """
        for _ in range(_FENCES):
            self.device.get(CommonCfg.DEVICE_STATUS)
            if 1 in self.rings:
                self.call(self.block(), 1)

    def interrupts(self, index: int = 0) -> int:
        """How many interrupts of a queue have come since this was last asked; with INTx, whether one has."""
        count = self.lines.take(self.lines.queue_line(index))
        if self.lines.mode is Interrupts.INTX and count:
            cause = self.pci.isr.read(0, 1)
            self.connection.unmask_irqs(IrqIndex.INTX)
            return cause & IsrStatus.QUEUE
        return count

    def interrupted(self, index: int = 0) -> bool:
        """Wait for an interrupt of a queue; tells whether it came."""
        return self.until(lambda: self.interrupts(index))

    # The inside.

    def _negotiate(self, features: int) -> int:
        self.device.reset()
        self.pci.enable()
        self.lines.install(self.pci)
        self.device.greet()
        features &= self.device.features
        expect(self.device.accept(features), f"the device refuses features {features:#x} of its own offer")
        self.device.set(CommonCfg.CONFIG_MSIX_VECTOR, self.lines.config_vector)
        return features


def _poison(room: int) -> bytes:
    """The writable run of a request before the device writes it."""
    return (_POISON * (room // len(_POISON) + 1))[:room] + bytes([UNSET_STATUS])
