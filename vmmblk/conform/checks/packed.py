"""Packed rings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.queue import Descriptor
from vmmblk.conform.bench import bench
from vmmblk.conform.check import check, expect
from vmmblk.conform.rings import AVAIL, USED
from vmmblk.conform.traffic import (
    data_not_read,
    expect_length,
    failing_read,
    furnished,
    header_not_read,
    long_chain,
    reads_framed,
    served_full,
    served_full_of_32768,
    writes_framed,
)
from vmmblk.spec import QUEUE_SIZE_MAX, DescFlag, Feature

if TYPE_CHECKING:
    from vmmblk.conform.bench import Bench
    from vmmblk.conform.target import Target

_SHORT, _MIDDLE, _LONG = 8, 32, 256
_ODD = (7, 5, 3, 100, 255)
_ROUNDS = 4


@check(Feature.RING_PACKED)
def layout(target: Target) -> None:
    """Areas of exactly their size, barely aligned, laid out by hand, are served lap by lap.

    RING-PACKED-001, 004, 005, 007, 023.
    """
    with bench(target, packed=True, size=_SHORT, barely=True) as b:
        ring = b.packed
        for count in range(3 * ring.size):
            parcel = b.block()
            at = ring.position
            used = b.serve(parcel.chain() if count % 2 and ring.size > 2 else parcel.chain(16))
            b.answer(parcel)
            lap = 1 if at < ring.size else 0
            marks = used.flags & (AVAIL | USED)
            expect(marks == (AVAIL | USED) * lap, f"a used descriptor of wrap counter {lap} has flags {used.flags:#x}")


@check(Feature.RING_PACKED)
def odd_sizes(target: Target) -> None:
    """Rings of a size that is no power of two are served (RING-PACKED-002)."""
    with bench(target, packed=True, live=False) as b:
        longest = b.device.select_queue(0)
    for size in [size for size in _ODD if size <= longest] or [longest]:
        with bench(target, packed=True, size=size) as b:
            for _ in range(size + 2):
                b.call(b.block(), sizes=(16,))


@check(Feature.RING_PACKED)
def queue_sizes(target: Target) -> None:
    """Every queue has at least one descriptor, and at most 32768 (RING-PACKED-003)."""
    with bench(target, packed=True, live=False) as b:
        for index in range(target.facts.queues):
            size = b.device.select_queue(index)
            expect(0 < size <= QUEUE_SIZE_MAX, f"queue {index} has {size} descriptors at most")


@check(Feature.RING_PACKED)
def zeroed_ring(target: Target) -> None:
    """In a ring of zeroes nothing is available (RING-PACKED-008)."""
    with bench(target, packed=True, size=_SHORT, queues=_queues(target)) as b:
        for _ in range(_ROUNDS):
            b.kick()
            b.fence()
        _expect_idle(b, "in a ring of zeroes")
        b.call(b.block(), sizes=(16,))


@check(Feature.RING_PACKED)
def marks_of_another_lap(target: Target) -> None:
    """A descriptor whose marks are not those of an available one on this lap is left alone, on each of three laps.

    RING-PACKED-006, 015, HOSTILE-052.
    """
    with bench(target, packed=True, size=_SHORT, queues=_queues(target)) as b:
        b.needs(4)
        ring = b.packed
        for _ in range(3 * ring.size // 2):
            for wrong in {0, AVAIL, USED, AVAIL | USED} - {ring.marks(ring.position)}:
                _lay(b, wrong, ring.position)
                b.kick()
                b.fence()
                _expect_idle(b, f"with marks {wrong:#x} where {ring.marks(ring.position):#x} was due")
            b.call(b.block(), sizes=(16,))


@check(Feature.RING_PACKED)
def marks_behind_the_last(target: Target) -> None:
    """The same, right behind a buffer that is available (RING-PACKED-006, 015, HOSTILE-052)."""
    with bench(target, packed=True, size=_SHORT, queues=_queues(target)) as b:
        b.needs(4)
        ring = b.packed
        for turn in range(3 * ring.size // 2):
            behind = (ring.position + 2) % (2 * ring.size)
            wrong = sorted({0, AVAIL, USED, AVAIL | USED} - {ring.marks(behind)})[turn % 3]
            _lay(b, wrong, behind)
            b.call(b.block(), sizes=(16,))
            b.fence()
            _expect_idle(b, f"with marks {wrong:#x} where {ring.marks(behind):#x} was due")


@check(Feature.RING_PACKED)
def a_gap(target: Target) -> None:
    """A buffer in a later slot waits until the slot before it is available (RING-PACKED-009, 012)."""
    with bench(target, packed=True, size=_SHORT, queues=_queues(target)) as b:
        b.needs(4)
        ring = b.packed
        for _ in range(_ROUNDS):
            first, second = b.block(), b.block()
            ring.offer(first.chain(16), publish=False)
            ring.offer(second.chain(16), publish=False)  # available but for the one before
            b.kick()
            b.fence()
            expect(b.untouched(first) and b.untouched(second), "a buffer was served before its turn in the ring")
            ring.publish()
            b.kick()
            b.take()
            b.take()
            b.answer(first)
            b.answer(second)


@check(Feature.RING_PACKED)
def what_is_written(target: Target) -> None:
    """The device writes writable elements, used descriptors and its event structure, and nothing else.

    RING-PACKED-013, 029.
    """
    with bench(target, packed=True, size=_SHORT) as b:
        for _ in range(2 * b.packed.size):
            furnished(b)


@check(Feature.RING_PACKED)
def used_descriptors_stay(target: Target) -> None:
    """A used descriptor is not changed again (RING-PACKED-016)."""
    with bench(target, packed=True, size=_LONG) as b:
        ring = b.packed
        used: dict[int, bytes] = {}
        for _ in range(min(ring.size // 2, 32)):
            at = ring.position
            b.call(b.block(), sizes=(16,))
            used[at] = ring.slot(at)
        b.fence()
        for at, was in used.items():
            expect(ring.slot(at) == was, f"the used descriptor in slot {at} has changed")


@check(Feature.RING_PACKED)
def framing_of_reads(target: Target) -> None:
    """Header, data and status of a read may be cut or joined anywhere; elements count in their order (RING-PACKED-017).

    RING-SPLIT-004.
    """
    with bench(target, packed=True) as b:
        reads_framed(b)


@check(Feature.RING_PACKED)
def framing_of_writes(target: Target) -> None:
    """Header and data of a write may be cut or joined anywhere; elements count in their order (RING-PACKED-017).

    RING-SPLIT-004.
    """
    with bench(target, packed=True) as b:
        writes_framed(b)


@check(Feature.RING_PACKED)
def list_as_long_as_the_queue(target: Target) -> None:
    """A list may have as many descriptors as the queue (RING-PACKED-019)."""
    with bench(target, packed=True, size=_LONG) as b:
        b.needs(3)
        long_chain(b)
        long_chain(b)


@check(Feature.RING_PACKED)
def buffer_id(target: Target) -> None:
    """The id of a list is that of its last descriptor (RING-PACKED-020)."""
    with bench(target, packed=True, size=_SHORT) as b:
        b.needs(3)
        for identity in range(b.packed.size):
            parcel = b.block()
            name = b.packed.offer(parcel.chain(), buffer_id=identity)
            b.kick()
            used = b.take()
            expect(used.id == name, f"a list with id {name:#x} in its last descriptor was returned as {used.id:#x}")


@check(Feature.RING_PACKED)
def lists_are_skipped(target: Target) -> None:
    """One used descriptor for each list, the next one as many slots further as the list was long (RING-PACKED-021)."""
    with bench(target, packed=True, size=_MIDDLE) as b:
        b.needs(8)
        ring = b.packed
        for turn in range(ring.size):
            parcels = [b.block(), b.block()]
            parcels = parcels[: 1 + turn % 2]
            names = {ring.offer(each.chain(*(16, 1, 1)[: 1 + turn % 3])) for each in parcels}
            b.kick()
            back = {b.take().id for _ in parcels}  # raises if nothing is where it should be
            expect(back == names, f"buffers {names} were in flight, {back} came back")


@check(Feature.RING_PACKED)
def used_length(target: Target) -> None:
    """As many bytes were written as the length of a used descriptor says (RING-PACKED-025)."""
    with bench(target, packed=True) as b:
        for _ in range(8):
            parcel = b.block()
            expect_length(b, b.serve(parcel.chain(16)), parcel)


@check(Feature.RING_PACKED)
def used_length_of_a_failure(target: Target) -> None:
    """A read that fails claims no bytes that were not written (RING-PACKED-025)."""
    with bench(target, packed=True) as b:
        failing_read(b)


@check(Feature.RING_PACKED)
def write_flag(target: Target) -> None:
    """WRITE of a used descriptor tells that something was written (RING-PACKED-024)."""
    with bench(target, packed=True) as b:
        parcel = b.block()
        used = b.serve(parcel.chain(16))
        b.answer(parcel)
        expect(used.flags & DescFlag.WRITE, f"the flags are {used.flags:#x} when data was read")


@check(Feature.RING_PACKED)
def used_descriptors_are_whole(target: Target) -> None:
    """When a descriptor is marked used, its id and length are there (RING-PACKED-027)."""
    with bench(target, packed=True, size=_SHORT) as b:
        b.needs(3)
        for _ in range(64):
            parcel = b.block()
            used = b.serve(parcel.chain())  # whose first descriptor has another id, and another length
            expect_length(b, used, parcel)


@check(Feature.RING_PACKED, Feature.INDIRECT_DESC)
def full_queue(target: Target) -> None:
    """As many buffers as the queue is long may be in flight, and all are used (RING-SPLIT-015)."""
    with bench(target, packed=True, size=_LONG) as b:
        served_full(b)
        served_full(b)


@check(Feature.RING_PACKED, Feature.INDIRECT_DESC)
def full_queue_of_32768(target: Target) -> None:
    """A ring of 32768 descriptors is served when it is full (RING-PACKED-003)."""
    served_full_of_32768(target, packed=True)


@check(Feature.RING_PACKED)
def writable_header(target: Target) -> None:
    """A header in a writable element is not read (RING-PACKED-014)."""
    with bench(target, packed=True) as b:
        b.needs(3)
        header_not_read(b)


@check(Feature.RING_PACKED)
def writable_data(target: Target) -> None:
    """Data in a writable element are not written to the disk (RING-PACKED-014)."""
    data_not_read(target, packed=True)


def _queues(target: Target) -> int:
    """How many queues to use where a second one serves as a fence."""
    return min(target.facts.queues, 2)


def _lay(b: Bench, marks: int, position: int) -> None:
    """Put a sound read into two slots, with these marks; nobody may touch its memory."""
    ring = b.packed
    bait = b.memory.place(bytes(16 + b.target.facts.block_size + 1))
    first, second = (each % ring.size for each in (position, position + 1))
    ring.store(second, Descriptor(bait + 16, b.target.facts.block_size + 1, DescFlag.WRITE | marks, 0))
    ring.store(first, Descriptor(bait, 16, DescFlag.NEXT | marks, 0))


def _expect_idle(b: Bench, where: str) -> None:
    """Expect that nothing was used, and nothing served."""
    used = b.packed.take()
    expect(used is None, f"a descriptor was used {where}")
    b.memory.unharmed()
