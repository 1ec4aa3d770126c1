"""The block contract: what a disk is to vmmblk.

This is MirageOS V1 ``BLOCK`` told in Python.  A disk is any object that satisfies :class:`Block`; twenty lines are
enough (see the README).  Everything vmmblk does above a disk - virtqueues, requests, durability, reset - relies on
these sentences and on nothing else:

* ``info`` tells ``read_write``, ``sector_size`` (bytes) and ``size_sectors``.  A device may make itself bigger over
  time; one that does implements :class:`SupportsResize`, and the guest sees the new size.
* ``read(sector_start, buffers)`` fills the buffers with data starting at ``sector_start``.
  ``write(sector_start, buffers)`` writes the data in the buffers, starting at ``sector_start``.  Sectors are the
  device's own, ``sector_size`` bytes each.
* ``buffers`` is a list, of any length, of memoryviews (format ``B``, one dimension).  Each is a whole number of
  sectors long.  They are the guest's own pages: the data is not copied, and a disk must not touch a buffer after the
  call has ended.  One that keeps a view all the same harms nobody: it sees memory that is no longer the guest's.
* When ``write`` completes, everything it wrote is persisted.
* Once submitted a request cannot be cancelled and there is no timeout.  vmmblk never cancels a call; it waits.
* Failures are the four exceptions of :mod:`vmmblk.errors`, and what each promises about written data is told there.
  ``OSError`` is understood as ``Unknown``.  Any other exception is a bug in the disk: it is logged with its
  traceback, and the guest gets an I/O error.
* ``disconnect()`` ends it: from then on every call fails with ``Disconnected``.

Range, whole sectors, read-only and disconnected are checked before a disk is called (``filters/checked.py``), so a
disk re-checks nothing.

Methods may be ``async def`` or plain ``def``: plain ones run in a thread pool, several at once, so a plain disk that
shares state between calls needs a lock.

What a disk can do beyond that are the ``Supports...`` protocols below, each optional, found by the presence of their
methods.  What a disk lacks, the device does not offer to the guest.
"""

from __future__ import annotations

import enum
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from vmmblk.errors import Unimplemented
from vmmblk.spec import ZoneModel, ZoneState, ZoneType

__all__ = [
    "Block",
    "BlockInfo",
    "Buffers",
    "Lifetime",
    "Native",
    "Operation",
    "Substance",
    "SupportsDiscard",
    "SupportsFlush",
    "SupportsIdentify",
    "SupportsLifetime",
    "SupportsNative",
    "SupportsResize",
    "SupportsSecureErase",
    "SupportsSubmit",
    "SupportsUnchecked",
    "SupportsWriteZeroes",
    "SupportsZones",
    "Topology",
    "Transfer",
    "Zone",
    "ZoneModel",
    "ZoneState",
    "ZoneType",
    "Zoning",
    "operations",
    "total_bytes",
]

Buffers = Sequence[memoryview]
"""A list, of any length, of byte memoryviews, each a whole number of sectors long; owned by the caller."""


@dataclass(frozen=True, slots=True)
class BlockInfo:
    """Characteristics of a block device.

    ``read_write`` is true if we can write, false if read-only; ``sector_size`` is octets per sector, a power of two
    from 512 up; ``size_sectors`` is the total of sectors of that size.
    """

    read_write: bool
    sector_size: int
    size_sectors: int

    @property
    def size_bytes(self) -> int:
        """The size of the device in bytes."""
        return self.sector_size * self.size_sectors


@dataclass(frozen=True, slots=True)
class Topology:
    """Advice about performance that the guest is told (virtio TOPOLOGY, DISCARD); all in bytes, 0 is "no opinion"."""

    physical_block_size: int = 0
    minimum_io_size: int = 0
    optimal_io_size: int = 0
    discard_granularity: int = 0


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How worn a disk is, in the terms of eMMC (JESD84-B50); 0 is "not known" in every field.

    ``pre_eol_info`` tells of its reserved blocks: 1 less than 80 % are used, 2 80 %, 3 90 %.  ``typ_a`` and ``typ_b``
    tell of the life of its SLC and its MLC cells: 1 to 10 for up to that many tenths used, 11 for more than all.
    Raises: ValueError for other values, which a guest must never see (BLK-080).
    """

    pre_eol_info: int = 0
    typ_a: int = 0
    typ_b: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.pre_eol_info <= 3 and 0 <= self.typ_a <= 11 and 0 <= self.typ_b <= 11):
            raise ValueError(f"{self} has a reserved value")


@dataclass(frozen=True, slots=True)
class Zone:
    """A zone: ``start`` and ``write_pointer`` are sector numbers, ``capacity`` is sectors that can be written.

    ``write_pointer`` means something only for a zone that is empty, open or closed.
    """

    start: int
    capacity: int
    write_pointer: int
    type: ZoneType
    state: ZoneState


@dataclass(frozen=True, slots=True)
class Zoning:
    """How a zoned disk is divided.

    Every zone has ``zone_sectors`` sectors, only the last may have fewer.  ``max_open`` and ``max_active`` count
    zones, 0 is no limit.  ``max_append_sectors`` is the largest append, 0 if there is none.  Writes and appends to
    sequential zones must end at a multiple of ``write_granularity`` bytes.
    """

    model: ZoneModel
    zone_sectors: int
    max_open: int
    max_active: int
    max_append_sectors: int
    write_granularity: int


class Block(ABC):
    """A disk.  Subclass it, set ``info``, write ``read`` and, unless it is read-only, ``write``."""

    info: BlockInfo
    """Characteristics of the device; set before the constructor returns."""

    topology: Topology = Topology()
    """Advice for the guest about sizes that perform well."""

    buffer_alignment: int = 1
    """Bytes to which every buffer must be aligned in address and length; vmmblk copies what is not."""

    pins_memory: bool = False
    """True if the kernel holds on to buffer pages during a call (O_DIRECT), so that they cannot be taken back."""

    bounce: bool = False
    """True to be given private copies instead of guest pages (``bounce=on``)."""

    @abstractmethod
    def read(self, sector_start: int, buffers: Buffers) -> Awaitable[None] | None:
        """Fill ``buffers`` with data starting at ``sector_start``.

        On failure some buffers may be filled and others not.  Raises: BlockError, OSError.
        """

    def write(self, sector_start: int, buffers: Buffers) -> Awaitable[None] | None:  # noqa: ARG002
        """Write the data in ``buffers`` from ``sector_start`` on; on return it is persisted.

        Raises: Unimplemented, IsReadOnly (no data has been written), Disconnected, Unknown, OSError (an unknown
        amount has been written).
        """
        raise Unimplemented("this disk has no write()")

    def disconnect(self) -> Awaitable[None] | None:
        """Release what the disk holds.  Called once, when no other call is under way."""
        return None


@runtime_checkable
class SupportsFlush(Protocol):
    """Write-back: an optional pair, used only while the guest has the write cache on."""

    def write_cached(self, sector_start: int, buffers: Buffers) -> Awaitable[None] | None:
        """As ``write``, but the data need not be persisted before the next ``flush`` has completed."""

    def flush(self) -> Awaitable[None] | None:
        """When it completes, every ``write_cached`` that completed before the call is persisted."""


@runtime_checkable
class SupportsDiscard(Protocol):
    """Deallocation of sectors whose contents no longer matter."""

    def discard(self, sector_start: int, sectors: int) -> Awaitable[None] | None:
        """Forget ``sectors`` sectors from ``sector_start``; later reads of them may return anything."""


@runtime_checkable
class SupportsWriteZeroes(Protocol):
    """Zeroing without carrying the zeroes."""

    def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> Awaitable[None] | None:
        """Make ``sectors`` sectors from ``sector_start`` read as zeroes; on return that is persisted.

        ``unmap`` allows the disk to deallocate them; reads give zeroes all the same.
        """


@runtime_checkable
class SupportsSecureErase(Protocol):
    """Erasing that leaves nothing to recover."""

    def secure_erase(self, sector_start: int, sectors: int) -> Awaitable[None] | None:
        """Erase ``sectors`` sectors from ``sector_start``, and every copy of them that the disk still holds."""


@runtime_checkable
class SupportsLifetime(Protocol):
    """Wear that the disk can measure; for one that cannot, leave it out."""

    def lifetime(self) -> Awaitable[Lifetime] | Lifetime:
        """How worn the disk is now."""


@runtime_checkable
class SupportsIdentify(Protocol):
    """A serial number of its own."""

    def identify(self) -> str:
        """The disk's serial: ASCII, at most 20 characters."""


@runtime_checkable
class SupportsResize(Protocol):
    """A device that makes itself bigger over time."""

    def on_resize(self, changed: Callable[[], None]) -> None:
        """Keep ``changed`` and call it, from any thread, each time ``info`` has grown."""


@runtime_checkable
class SupportsZones(Protocol):
    """A disk of zones that are written in order.

    Its ``read`` and ``write`` obey the rules of zones too.  A call that breaks one raises ZoneInvalidCommand,
    ZoneUnalignedWritePointer, ZoneOpenResource or ZoneActiveResource, and changes nothing.
    """

    def zoning(self) -> Zoning:
        """How the disk is divided; always the same."""

    def report_zones(self, sector_start: int, count: int) -> Awaitable[Sequence[Zone]] | Sequence[Zone]:
        """At most ``count`` zones, beginning with the one that holds ``sector_start``."""

    def open_zone(self, sector_start: int) -> Awaitable[None] | None:
        """Open the zone that starts there explicitly."""

    def close_zone(self, sector_start: int) -> Awaitable[None] | None:
        """Close the zone that starts there."""

    def finish_zone(self, sector_start: int) -> Awaitable[None] | None:
        """Make the zone that starts there full."""

    def reset_zone(self, sector_start: int) -> Awaitable[None] | None:
        """Make the zone that starts there empty."""

    def reset_all_zones(self) -> Awaitable[None] | None:
        """Make every sequential zone empty that is open, closed or full."""

    def append(self, sector_start: int, buffers: Buffers) -> Awaitable[int] | int:
        """Write at the write pointer of the zone that starts there; the first sector written.

        On return the data is persisted, as with ``write``.
        """


@dataclass(eq=False, slots=True)
class Transfer:
    """One read or write of a batch.

    ``buffers`` are to be filled from ``sector_start`` on, or hold what is to be written there; they are the caller's,
    as in ``read`` and ``write``.  ``cached``: a write need not be persisted before the next ``flush``.  Whoever carries
    it out leaves what it failed with, if it did, in ``error``.
    """

    write: bool
    cached: bool
    sector_start: int
    buffers: Buffers
    error: BaseException | None = None


@runtime_checkable
class SupportsSubmit(Protocol):
    """A disk that would rather be given many reads and writes at once: fewer calls, and more to choose from."""

    def submit(self, batch: Sequence[Transfer]) -> Awaitable[None] | None:
        """Carry out every transfer, in any order; on return each has ended, and ``error`` says which failed.

        Other calls may be under way.  Raising fails all of them.
        """


class Operation(enum.Flag):
    """Which optional protocols a block has."""

    FLUSH = enum.auto()
    DISCARD = enum.auto()
    WRITE_ZEROES = enum.auto()
    IDENTIFY = enum.auto()
    RESIZE = enum.auto()
    SECURE_ERASE = enum.auto()
    LIFETIME = enum.auto()
    ZONES = enum.auto()
    SUBMIT = enum.auto()


_NO_OPERATION = Operation(0)


class Substance(enum.Enum):
    """What a disk is made of that the native engine knows."""

    NOTHING = enum.auto()
    """Reads give zeroes, writes vanish."""
    MEMORY = enum.auto()
    FILE = enum.auto()


@dataclass(frozen=True, slots=True)
class Native:
    """What a disk is made of, for an engine that reads and writes that itself instead of calling the disk.

    ``address`` is where MEMORY lies, and it stays there, up to the largest size; ``fileno`` is the open FILE, which
    stays open.  Both are the disk's until ``disconnect``.  ``write_failed`` is called with each error of a write that
    the engine made, in the thread of the event loop.

    ``operations`` are those that the engine may carry out itself, too, and how: FLUSH is fdatasync of the FILE; DISCARD
    punches holes into it (fallocate), and WRITE_ZEROES does so or zeroes, then syncs.  MEMORY is private and anonymous:
    both zero it, and give whole pages back (MADV_DONTNEED) unless zeroing must not unmap.  Of NOTHING, nothing is left.
    """

    substance: Substance
    address: int = 0
    fileno: int = -1
    direct: bool = False
    """FILE: opened with O_DIRECT."""
    in_memory: bool = False
    """FILE: reads and writes never wait for a device (tmpfs)."""
    write_failed: Callable[[OSError], None] | None = None
    operations: Operation = _NO_OPERATION
    lost: int = 0
    """FILE: the address of a byte, the disk's, or 0.  It is 1 once something written was lost: from then on no flush
    succeeds.  The engine sets it, and looks at it, too."""


@runtime_checkable
class SupportsNative(Protocol):
    """A disk whose sectors are those of memory or of a file, one by one."""

    def native(self) -> Native | None:
        """What it is made of; None if it must be called after all."""


@runtime_checkable
class SupportsUnchecked(Protocol):
    """A wrapper that holds calls against the contract, and trusts a caller who has done so."""

    def unchecked(self) -> Block:
        """The disk itself, for reads and writes of whole sectors inside it, unless it is read-only or disconnected."""


_PROTOCOLS = {
    Operation.FLUSH: SupportsFlush,
    Operation.DISCARD: SupportsDiscard,
    Operation.WRITE_ZEROES: SupportsWriteZeroes,
    Operation.IDENTIFY: SupportsIdentify,
    Operation.RESIZE: SupportsResize,
    Operation.SECURE_ERASE: SupportsSecureErase,
    Operation.LIFETIME: SupportsLifetime,
    Operation.ZONES: SupportsZones,
    Operation.SUBMIT: SupportsSubmit,
}


def operations(block: Block) -> Operation:
    """The optional operations that ``block`` really has.

    A wrapper has every method because it must forward them; it tells what the block below it can do in an attribute
    ``operations``.
    """
    declared = getattr(block, "operations", None)
    if isinstance(declared, Operation):
        return declared
    found = Operation(0)
    for operation, protocol in _PROTOCOLS.items():
        if isinstance(block, protocol):
            found |= operation
    return found


def total_bytes(buffers: Buffers) -> int:
    """The length of a list of buffers, bytes."""
    return sum(map(len, buffers))
