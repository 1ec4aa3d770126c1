"""Virtqueues laid out by hand, byte by byte, and memory in which every byte that the device writes shows.

Unlike the rings in :mod:`vmmblk.client.queue` these hold nobody to anything: chains may be broken, slots stored over,
positions set.  The price: the device must be notified of everything, and what it uses is looked for, not waited for.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, NamedTuple

from vmmblk.client.memory import PAGE
from vmmblk.client.queue import DESCRIPTOR_SIZE, Descriptor
from vmmblk.conform.check import Broken, Harm, NotTestable
from vmmblk.spec import DescFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmmblk.client.memory import GuestMemory

__all__ = ["AVAIL", "USED", "PackedRing", "Ring", "Shadow", "SplitRing", "Used", "linked"]

AVAIL, USED = 1 << 7, 1 << 15
"""The marks of a packed descriptor."""

_DESC = struct.Struct("<QIHH")
_ELEMENT = struct.Struct("<II")
_WRAP = 1 << 15
_FILL = bytes(range(1, 252))  # neither zero nor of a length that anything else has


class Shadow:
    """Guest memory, and next to it what the driver has put there: where they differ, the device has written.

    It is filled with bytes that a device does not come by.  ``allow`` tells what the device may write.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._size = memory.size
        self._mine = bytearray((_FILL * (memory.size // len(_FILL) + 1))[: memory.size])
        self._allowed: list[tuple[int, int]] = []
        self._names: list[tuple[int, int, str]] = []
        memory.write(0, bytes(self._mine))

    def write(self, iova: int, data: bytes) -> None:
        """Store what is the driver's."""
        self._memory.write(iova, data)
        self._mine[iova : iova + len(data)] = data

    def read(self, iova: int, length: int) -> bytes:
        """What is there now, whoever wrote it."""
        return self._memory.read(iova, length)

    def space(self, length: int, align: int = 16, *, barely: bool = False, name: str = "") -> int:
        """Room for ``length`` bytes, filled; ``barely`` aligned: not to twice that.  Raises NotTestable."""
        try:
            iova = (
                self._memory.alloc(length + align, 2 * align) + align if barely else self._memory.alloc(length, align)
            )
        except MemoryError as error:
            raise NotTestable(f"queues or blocks are too large: {error}") from None
        if name:
            self._names.append((iova, length, name))
        return iova

    def place(self, data: bytes, align: int = 16) -> int:
        """Room that holds ``data``."""
        iova = self.space(max(len(data), 1), align)
        self.write(iova, data)
        return iova

    def allow(self, iova: int, length: int) -> None:
        """Let the device write there."""
        self._allowed.append((iova, length))

    def unharmed(self) -> None:
        """Raise Harm if the device has written where it may not."""
        now, then = bytearray(self.read(0, self._size)), bytearray(self._mine)
        for start, length in self._allowed:
            now[start : start + length] = then[start : start + length] = bytes(length)
        if now == then:
            return
        page = next(at for at in range(0, self._size, PAGE) if now[at : at + PAGE] != then[at : at + PAGE])
        at = next(at for at in range(page, page + PAGE) if now[at] != then[at])
        where = next((f" in {name}" for start, length, name in self._names if start <= at < start + length), "")
        raise Harm(f"the device wrote to memory at {at:#x}{where}, which no element gives it to write")


class Used(NamedTuple):
    """What the device says about a buffer that it has used; ``flags`` in a packed ring only."""

    id: int
    length: int
    flags: int = 0


def linked(*elements: Descriptor) -> list[Descriptor]:
    """A chain of elements: NEXT is set in all but the last."""
    return [each._replace(flags=each.flags | DescFlag.NEXT) for each in elements[:-1]] + list(elements[-1:])


class Ring(ABC):
    """Queue ``index`` with room for ``size`` descriptors, its areas zeroed; nothing was told to the device.

    ``areas`` are the addresses of descriptors, driver area and device area; by default each is on a page of its own,
    or, with ``barely``, aligned no more than it must be.
    """

    alignments: ClassVar[tuple[int, int, int]]
    position: int
    """Where the next chain is made available."""

    def __init__(
        self, memory: Shadow, index: int, size: int, areas: Sequence[int] | None = None, *, barely: bool = False
    ) -> None:
        self.index = index
        self.size = size
        self._memory = memory
        lengths = self.lengths(size)
        if areas is None:
            names = ("the descriptor table", "the driver's area of the ring", "the device's area of the ring")
            aligned = self.alignments if barely else (PAGE, PAGE, PAGE)
            places = zip(lengths, aligned, names, strict=True)
            areas = [memory.space(length, align, barely=barely, name=name) for length, align, name in places]
            for area, length in zip(areas, lengths, strict=True):
                memory.write(area, bytes(length))
            memory.allow(areas[2], lengths[2])
        self.desc, self.avail, self.used = areas

    @staticmethod
    @abstractmethod
    def lengths(size: int) -> tuple[int, int, int]:
        """Bytes of the three areas."""

    @abstractmethod
    def offer(self, chain: Sequence[Descriptor], *, publish: bool = True) -> int:
        """Store a chain in the next slots and make it available; returns what the device will name it by.

        With ``publish=False`` the device does not see it before ``publish``.
        """

    @abstractmethod
    def publish(self) -> None:
        """Show the device what was offered."""

    @abstractmethod
    def take(self) -> Used | None:
        """The next buffer that the device has used, if there is one."""

    @abstractmethod
    def take_batch(self, waiting: Sequence[int]) -> int:
        """With IN_ORDER, how many of the buffers in flight, told in their order, are used by what was used next.

        Raises Broken if that is none of them.
        """

    @abstractmethod
    def table(self, elements: Sequence[Descriptor]) -> bytes:
        """An indirect table of elements, as this format has it."""

    @abstractmethod
    def literal(self, entries: Sequence[Descriptor]) -> bytes:
        """Table entries as they stand; ``next`` is the buffer id in a packed ring."""

    @property
    @abstractmethod
    def has_used(self) -> bool:
        """Whether ``take`` would give something."""

    @abstractmethod
    def slot_ahead(self, steps: int) -> int:
        """The address of the descriptor that is so many further than the one that is offered next."""

    @property
    @abstractmethod
    def notification_data(self) -> int:
        """What a doorbell says with NOTIFICATION_DATA: next_off and next_wrap."""

    def _load(self, iova: int) -> int:
        return int.from_bytes(self._memory.read(iova, 2), "little")

    def _store(self, iova: int, *values: int) -> None:
        self._memory.write(iova, b"".join((value & 0xFFFF).to_bytes(2, "little") for value in values))


class SplitRing(Ring):
    """A split ring."""

    alignments = (16, 2, 4)

    def __init__(
        self, memory: Shadow, index: int, size: int, areas: Sequence[int] | None = None, *, barely: bool = False
    ) -> None:
        super().__init__(memory, index, size, areas, barely=barely)
        self.position = 0  # the available index: how many chains were offered
        self.taken = 0
        """How many used elements were taken."""
        self._slot = 0

    @staticmethod
    def lengths(size: int) -> tuple[int, int, int]:
        """16 bytes per descriptor; flags, index, entries and the event word of the other side."""
        return DESCRIPTOR_SIZE * size, 6 + 2 * size, 6 + 8 * size

    def offer(self, chain: Sequence[Descriptor], *, publish: bool = True) -> int:
        """Store a chain and put its head into the available ring."""
        slots = [(self._slot + step) % self.size for step in range(len(chain))]
        for slot, following, each in zip(slots, [*slots[1:], 0], chain, strict=True):
            self.store(slot, each._replace(next=following) if each.next is None else each)
        self._slot = (self._slot + len(chain)) % self.size
        self.name(slots[0])
        if publish:
            self.publish()
        return slots[0]

    def store(self, slot: int, descriptor: Descriptor) -> None:
        """Store a descriptor, whatever is there."""
        address, length, flags, following = descriptor
        self._memory.write(self.desc + DESCRIPTOR_SIZE * slot, _DESC.pack(address, length, flags, following or 0))

    def name(self, head: int) -> None:
        """Put any number into the next available slot."""
        self._store(self.avail + 4 + 2 * (self.position % self.size), head)
        self.position += 1

    def publish(self) -> None:
        """Store the available index."""
        self._store(self.avail + 2, self.position)

    @property
    def used_index(self) -> int:
        """The used index."""
        return self._load(self.used + 2)

    @property
    def used_flags(self) -> int:
        """The flags of the used ring."""
        return self._load(self.used)

    @property
    def avail_event(self) -> int:
        """Where the device wants to be notified (EVENT_IDX)."""
        return self._load(self.used + 4 + 8 * self.size)

    def used_element(self, position: int) -> Used:
        """An entry of the used ring."""
        where = self.used + 4 + 8 * (position % self.size)
        return Used(*_ELEMENT.unpack(self._memory.read(where, _ELEMENT.size)))

    def take(self) -> Used | None:
        """The next used element.  Raises Broken if the index is further ahead than the queue is long."""
        ahead = self.used_index - self.taken & 0xFFFF
        if ahead > self.size:
            raise Broken(f"the used index is {self.used_index:#x} after {self.taken} used buffers were taken")
        if not ahead:
            return None
        self.taken += 1
        return self.used_element(self.taken - 1)

    @property
    def has_used(self) -> bool:
        """Whether the used index has moved."""
        return self.used_index != self.taken & 0xFFFF

    def slot_ahead(self, steps: int) -> int:
        """In the descriptor table."""
        return self.desc + DESCRIPTOR_SIZE * ((self._slot + steps) % self.size)

    def take_batch(self, waiting: Sequence[int]) -> int:
        """One element stands for a batch: it names the last buffer of it, and the index goes on by as many."""
        ahead = self.used_index - self.taken & 0xFFFF
        if not ahead:
            return 0
        count = _until(waiting, self.used_element(self.taken).id)
        if count > ahead:
            raise Broken(f"buffer {count} of those in flight was returned when the used index had moved by {ahead}")
        self.taken += count
        return count

    def set_flags(self, flags: int) -> None:
        """Store the flags of the available ring: bit 0 asks for no interrupts."""
        self._store(self.avail, flags)

    def set_used_event(self, event: int) -> None:
        """Store where the driver wants to be interrupted (EVENT_IDX)."""
        self._store(self.avail + 4 + 2 * self.size, event)

    def table(self, elements: Sequence[Descriptor]) -> bytes:
        """Entries that are chained one after the other."""
        return self.literal([each._replace(next=i) for i, each in enumerate(linked(*elements), 1)])

    def literal(self, entries: Sequence[Descriptor]) -> bytes:
        """Table entries as they stand."""
        return b"".join(_DESC.pack(*each[:3], each.next or 0) for each in entries)

    @property
    def notification_data(self) -> int:
        """The available index."""
        return self.position & 0xFFFF


class PackedRing(Ring):
    """A packed ring.  A position counts from 0 to twice the size; the wrap counter is 1 on the first lap."""

    alignments = (16, 4, 4)

    def __init__(
        self, memory: Shadow, index: int, size: int, areas: Sequence[int] | None = None, *, barely: bool = False
    ) -> None:
        super().__init__(memory, index, size, areas, barely=barely)
        self.position = 0
        self.taken = 0
        """Where the next used descriptor is looked for."""
        self._lists: dict[int, list[int]] = {}
        self._in_flight = 0
        self._held: tuple[int, int] | None = None
        self._next_id = 0
        if areas is None:
            memory.allow(self.desc, DESCRIPTOR_SIZE * size)

    @staticmethod
    def lengths(size: int) -> tuple[int, int, int]:
        """16 bytes per descriptor, and two event suppression structures."""
        return DESCRIPTOR_SIZE * size, 4, 4

    def offer(self, chain: Sequence[Descriptor], *, publish: bool = True, buffer_id: int | None = None) -> int:
        """Store a list of descriptors, the first one's flags last; all but the last one have an id of no meaning."""
        if buffer_id is None:
            buffer_id = self._next_id
            self._next_id = (self._next_id + 1) % self.size
        self._lists.setdefault(buffer_id, []).append(len(chain))
        self._in_flight += 1
        first = self.position
        for step, each in enumerate(chain):
            link = buffer_id if step == len(chain) - 1 else buffer_id ^ 0x5A5A
            flags = each.flags | self.marks(self.position)
            hold = step == 0 and self._held is None
            kept = self._flags(self.position) if hold else flags
            self.store(self.position % self.size, Descriptor(each.address, each.length, kept, link))
            if hold:
                self._held = (first, flags)
            self.position = (self.position + 1) % (2 * self.size)
        if publish:
            self.publish()
        return buffer_id

    def marks(self, position: int) -> int:
        """The marks of an available descriptor there."""
        return AVAIL if position < self.size else USED

    def store(self, slot: int, descriptor: Descriptor) -> None:
        """Store a descriptor as it stands, the flags last; ``next`` is its buffer id."""
        address, length, flags, link = descriptor
        where = self.desc + DESCRIPTOR_SIZE * slot
        self._memory.write(where, _DESC.pack(address, length, link or 0, flags)[:14])
        self._store(where + 14, flags)

    def publish(self) -> None:
        """Mark the first of what was offered available, and with it the rest."""
        if self._held is not None:
            position, flags = self._held
            self._store(self.desc + DESCRIPTOR_SIZE * (position % self.size) + 14, flags)
            self._held = None

    def is_used(self, position: int) -> bool:
        """Whether the descriptor there is marked used."""
        return self._flags(position) & (AVAIL | USED) == (AVAIL | USED if position < self.size else 0)

    def slot(self, position: int) -> bytes:
        """The 16 bytes of a slot."""
        return self._memory.read(self.desc + DESCRIPTOR_SIZE * (position % self.size), DESCRIPTOR_SIZE)

    def take(self) -> Used | None:
        """The next used descriptor.  Raises Broken if it has an id that is not in flight."""
        if not self.has_used:
            return None
        _, length, link, flags = _DESC.unpack(self.slot(self.taken))
        lists = self._lists.get(link)
        if not lists:
            raise Broken(f"a buffer with id {link:#x} was returned, and none is in flight")
        self._in_flight -= 1
        self.taken = (self.taken + lists.pop(0)) % (2 * self.size)
        return Used(link, length, flags)

    @property
    def has_used(self) -> bool:
        """Whether the next descriptor is marked used, and could be."""
        return self._in_flight > 0 and self.is_used(self.taken)

    def slot_ahead(self, steps: int) -> int:
        """In the ring."""
        return self.desc + DESCRIPTOR_SIZE * ((self.position + steps) % self.size)

    def take_batch(self, waiting: Sequence[int]) -> int:
        """One used descriptor stands for a batch: it names the last buffer of it, and the slots of all are skipped."""
        if not self.is_used(self.taken):
            return 0
        count = _until(waiting, _DESC.unpack(self.slot(self.taken))[2])
        for name in waiting[:count]:
            self.taken = (self.taken + self._lists[name].pop(0)) % (2 * self.size)
            self._in_flight -= 1
        return count

    def set_event(self, flags: int, position: int = 0) -> None:
        """Store the driver's event suppression structure; ``position`` is that of the descriptor it is about."""
        self.set_event_word(flags, position % self.size | (_WRAP if position < self.size else 0))

    def set_event_word(self, flags: int, event: int) -> None:
        """The same, with offset and wrap counter as they are stored."""
        self._store(self.avail, event, flags)

    @property
    def device_event(self) -> tuple[int, int]:
        """The device's event suppression structure: flags, and offset with wrap counter."""
        return self._load(self.used + 2), self._load(self.used)

    def table(self, elements: Sequence[Descriptor]) -> bytes:
        """Entries that are read one after the other."""
        return self.literal(elements)

    def literal(self, entries: Sequence[Descriptor]) -> bytes:
        """Table entries as they stand."""
        return b"".join(_DESC.pack(each.address, each.length, each.next or 0, each.flags) for each in entries)

    @property
    def notification_data(self) -> int:
        """Slot and wrap counter of the next descriptor."""
        return self.position % self.size | (_WRAP if self.position < self.size else 0)

    def _flags(self, position: int) -> int:
        return self._load(self.desc + DESCRIPTOR_SIZE * (position % self.size) + 14)


def _until(waiting: Sequence[int], name: int) -> int:
    """How many of those waiting there are up to the one that is named."""
    if name not in waiting:
        raise Broken(f"the device returned {name:#x}, which is not in flight")
    return waiting.index(name) + 1
