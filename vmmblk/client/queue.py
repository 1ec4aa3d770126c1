"""The driver's virtqueues, split and packed: ring memory out of guest memory, ring operations in C.

Right use is ``add``, ``publish``, ``need_kick``, ``get_used``; everything else exists to do it wrong on purpose.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from vmmblk._core import ffi, lib
from vmmblk.client.errors import ProtocolError, QueueFull
from vmmblk.spec import DescFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmmblk.client.memory import GuestMemory

__all__ = ["DESCRIPTOR_SIZE", "Descriptor", "PackedQueue", "Segment", "SplitQueue", "Virtqueue"]

DESCRIPTOR_SIZE = 16
_USED_BATCH = 256


class Segment(NamedTuple):
    """One element of a chain: ``length`` bytes at ``iova``, for the device to read or to write."""

    iova: int
    length: int
    writable: bool


class Descriptor(NamedTuple):
    """A descriptor told literally.

    ``next`` None is the slot of the descriptor that follows in the list; in a packed ring, whose descriptors have a
    buffer id in its place, the id of the list.
    """

    address: int
    length: int
    flags: int = 0
    next: int | None = None


def _operations(layout: str) -> SimpleNamespace:
    """The C functions of one ring format, by the names that both have."""
    names = ["new", "free", "room", "add", "reserve", "write", "publish", "need_kick", "get_used", "arm", "disarm"]
    return SimpleNamespace(**{name: getattr(lib, f"vdrv_{layout}_{name}") for name in names})


class Virtqueue(ABC):
    """Queue ``index`` of ``size`` descriptors.

    ``desc``, ``avail`` and ``used`` are the IOVAs of its areas: descriptors, what the driver writes, what the device
    writes.  Call ``close`` before the memory is closed.
    """

    _c: ClassVar[SimpleNamespace]

    def __init__(self, memory: GuestMemory, index: int, size: int, *, event_idx: bool) -> None:
        self.index = index
        self.size = size
        self.event_idx = event_idx
        self._memory = memory
        lengths = self._area_lengths(size)
        self.desc, self.avail, self.used = (memory.alloc(length) for length in lengths)
        areas = zip((self.desc, self.avail, self.used), lengths, strict=True)
        hosts = [ffi.cast("void *", memory.address(iova, length)) for iova, length in areas]
        self._ring = self._c.new(*hosts, size, event_idx)
        if self._ring == ffi.NULL:
            self._release_areas()
            raise OSError(ffi.errno, f"cannot make a ring of {size} descriptors")
        self._popped = ffi.new("struct vdrv_used[]", _USED_BATCH)

    @staticmethod
    @abstractmethod
    def _area_lengths(size: int) -> tuple[int, int, int]:
        """Bytes of the three areas."""

    def close(self) -> None:
        """Give the ring's memory back.  The device must have been told to leave it first."""
        if self._ring != ffi.NULL:
            self._c.free(self._ring)
            self._ring = ffi.NULL
            self._release_areas()

    def _release_areas(self) -> None:
        for iova in (self.desc, self.avail, self.used):
            self._memory.free(iova)

    @property
    def handle(self) -> Any:
        """The ring, for C; valid until ``close``."""
        return self._ring

    # As the specification wants it.

    @property
    def room(self) -> int:
        """Descriptors that are free."""
        return int(self._c.room(self._ring))

    def add(self, segments: Sequence[Segment], table: int | None = None) -> int:
        """Make a chain of ``segments`` and offer it; the device sees it after ``publish``.

        ``table`` is the IOVA of 16 bytes per segment, for an indirect chain; it is the caller's until the chain is
        used.  Returns what the device will name it by: its head, or its buffer id.  Raises QueueFull.
        """
        chain = ffi.new("struct vdrv_segment[]", len(segments))
        for slot, segment in zip(chain, segments, strict=True):
            slot.iova, slot.len = segment.iova, segment.length
            slot.flags = DescFlag.WRITE if segment.writable else 0
        host = ffi.NULL
        if table is not None:
            host = ffi.cast("void *", self._memory.address(table, DESCRIPTOR_SIZE * len(segments)))
        return self._checked(self._c.add(self._ring, chain, len(segments), table or 0, host))

    def publish(self) -> None:
        """Make everything offered visible to the device."""
        self._c.publish(self._ring)

    def need_kick(self) -> bool:
        """Whether the device wants to be notified of what was published since this was last asked."""
        return bool(self._c.need_kick(self._ring))

    def get_used(self) -> list[tuple[int, int]]:
        """What the device has used since the last call: (what names the chain, bytes written), in its order.

        Raises ProtocolError if the device returned what it was not given.
        """
        taken: list[tuple[int, int]] = []
        while (count := self._c.get_used(self._ring, self._popped, _USED_BATCH)) > 0:
            taken += [(self._popped[i].id, self._popped[i].len) for i in range(count)]
        if count < 0 and not taken:
            raise ProtocolError(f"queue {self.index}: the device wrote a used element that was not in flight")
        return taken

    def arm(self, ahead: int = 1) -> int:
        """Ask for an interrupt once ``ahead`` more chains are used; returns how many are waiting already."""
        return int(self._c.arm(self._ring, ahead))

    def disarm(self) -> None:
        """Ask for no interrupts."""
        self._c.disarm(self._ring)

    # Piece by piece, right or wrong.

    @property
    @abstractmethod
    def notification_data(self) -> int:
        """Where the next chain will be offered, as NOTIFICATION_DATA tells it: next_off and next_wrap, 16 bits."""

    @abstractmethod
    def add_raw(self, descriptors: Sequence[Descriptor]) -> int:
        """Write ``descriptors`` into free slots and offer them as one chain; returns its name.  Raises QueueFull."""

    def write_descriptor(self, slot: int, descriptor: Descriptor) -> None:
        """Store a descriptor in the table, as it stands (``next`` None is 0)."""
        address, length, flags, following = descriptor
        self._checked(self._c.write(self._ring, slot, address, length, flags, following or 0))

    def _checked(self, result: int) -> int:
        if result == -errno.ENOSPC:
            raise QueueFull(f"queue {self.index} has {self.room} free descriptors of {self.size}")
        if result < 0:
            raise ValueError(f"queue {self.index}: no such chain or descriptor")
        return result


class SplitQueue(Virtqueue):
    """A split ring; its size is a power of two."""

    _c = _operations("split")

    @staticmethod
    def _area_lengths(size: int) -> tuple[int, int, int]:
        return DESCRIPTOR_SIZE * size, 6 + 2 * size, 6 + 8 * size

    def reserve(self, count: int) -> list[int]:
        """Take ``count`` free descriptors; they come back when the device returns the first.  Raises QueueFull."""
        slots = ffi.new("uint16_t[]", max(count, 1))
        self._checked(self._c.reserve(self._ring, count, slots))
        return list(slots[0:count])

    def add_raw(self, descriptors: Sequence[Descriptor]) -> int:
        """Write ``descriptors`` into free slots and offer the first; returns it.  Raises QueueFull."""
        slots = self.reserve(len(descriptors))
        for position, descriptor in enumerate(descriptors):
            following = descriptor.next
            if following is None:
                following = slots[(position + 1) % len(slots)] if descriptor.flags & DescFlag.NEXT else 0
            self.write_descriptor(slots[position], descriptor._replace(next=following))
        self.offer(slots[0])
        return slots[0]

    def offer(self, head: int) -> None:
        """Put any number into the next avail slot."""
        lib.vdrv_split_offer(self._ring, head)

    @property
    def avail_idx(self) -> int:
        """The avail index after everything offered; setting it publishes any value at once."""
        return int(lib.vdrv_split_avail_idx(self._ring))

    @avail_idx.setter
    def avail_idx(self, value: int) -> None:
        lib.vdrv_split_set_avail_idx(self._ring, value & 0xFFFF)

    @property
    def notification_data(self) -> int:
        """The available index: its top bit is the wrap."""
        return self.avail_idx

    @property
    def used_idx(self) -> int:
        """The used index as the device last stored it."""
        return int(lib.vdrv_split_used_idx(self._ring))

    @property
    def used_flags(self) -> int:
        """The device's flags: bit 0 asks for no kicks."""
        return int(lib.vdrv_split_used_flags(self._ring))

    @property
    def avail_event(self) -> int:
        """The avail index at which the device asks for a kick (event index)."""
        return int(lib.vdrv_split_avail_event(self._ring))

    def set_avail_flags(self, flags: int) -> None:
        """Store the driver's flags: bit 0 asks for no interrupts."""
        lib.vdrv_split_set_avail_flags(self._ring, flags)

    def set_used_event(self, event: int) -> None:
        """Store the used index at which the driver asks for an interrupt (event index)."""
        lib.vdrv_split_set_used_event(self._ring, event & 0xFFFF)


class PackedQueue(Virtqueue):
    """A packed ring of any size; ``avail`` and ``used`` are the event suppression structures.

    A position counts from 0 to twice the size: the slot, on a lap whose wrap counter is 1, then on one where it is 0.
    """

    _c = _operations("packed")

    @staticmethod
    def _area_lengths(size: int) -> tuple[int, int, int]:
        return DESCRIPTOR_SIZE * size, 4, 4

    def add_raw(self, descriptors: Sequence[Descriptor], buffer_id: int | None = None) -> int:
        """Put ``descriptors`` into the next slots, marked available, as one list; returns its buffer id.

        ``buffer_id`` is one of one's own choosing, which may be in flight.  Raises QueueFull.
        """
        chosen = lib.VDRV_ANY_ID if buffer_id is None else buffer_id
        used_id = self._checked(self._c.reserve(self._ring, len(descriptors), chosen))
        for address, length, flags, link in descriptors:
            lib.vdrv_packed_put(self._ring, address, length, flags, used_id if link is None else link)
        return used_id

    @property
    def notification_data(self) -> int:
        """The slot, and the wrap counter."""
        position = self.avail_position
        return position % self.size | (position < self.size) << 15

    @property
    def avail_position(self) -> int:
        """Where the next descriptor goes."""
        return int(lib.vdrv_packed_avail(self._ring))

    @property
    def used_position(self) -> int:
        """Where the next used descriptor is looked for."""
        return int(lib.vdrv_packed_used(self._ring))

    @property
    def device_event(self) -> tuple[int, int]:
        """The device's event suppression structure: flags (2 bits, and those reserved), offset and wrap counter."""
        wish = int(lib.vdrv_packed_their_wish(self._ring))
        return wish >> 16, wish & 0xFFFF

    def set_driver_event(self, flags: int, event: int = 0) -> None:
        """Store the driver's event suppression structure; ``event`` has the wrap counter in its bit 15."""
        lib.vdrv_packed_set_wish(self._ring, flags << 16 | event)
