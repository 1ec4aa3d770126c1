"""Split rings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.bench import bench
from vmmblk.conform.check import check, expect
from vmmblk.conform.traffic import (
    UNKNOWN_TYPE,
    data_not_read,
    expect_length,
    failing_read,
    furnished,
    header_not_read,
    long_chain,
    reads_framed,
    served_full,
    served_full_of_32768,
    treadmill,
    writes_framed,
)
from vmmblk.spec import QUEUE_SIZE_MAX, Feature

if TYPE_CHECKING:
    from vmmblk.conform.target import Target

_SHORT, _LONG = 8, 256
_INDICES = 1 << 16
_STALE = bytes([0xFF]) * 8


@check()
def layout(target: Target) -> None:
    """Areas of exactly their size, barely aligned, laid out by hand, are served lap by lap.

    RING-SPLIT-001, 003, 010, 017, 018.
    """
    with bench(target, size=_SHORT, barely=True) as b:
        ring = b.split
        expect(ring.used_index == 0, f"the used index is {ring.used_index:#x} at first")
        for count in range(1, 3 * ring.size):
            head = b.offer(b.block().chain(16))
            used = b.take()
            expect(used.id == head, f"used element {count - 1} has id {used.id:#x}, the head was {head:#x}")
            expect(ring.used_index == count, f"the used index is {ring.used_index:#x} after {count} buffers")


@check()
def queue_sizes(target: Target) -> None:
    """Every queue is a power of two long, and not more than 32768 (RING-SPLIT-002)."""
    with bench(target, live=False) as b:
        for index in range(target.facts.queues):
            size = b.device.select_queue(index)
            expect(
                0 < size <= QUEUE_SIZE_MAX and size & (size - 1) == 0, f"queue {index} has {size} descriptors at most"
            )


@check()
def framing_of_reads(target: Target) -> None:
    """Header, data and status of a read may be cut or joined anywhere (RING-SPLIT-004, 013)."""
    with bench(target) as b:
        reads_framed(b)


@check()
def framing_of_writes(target: Target) -> None:
    """Header and data of a write may be cut or joined anywhere (RING-SPLIT-004, 013)."""
    with bench(target) as b:
        writes_framed(b)


@check()
def what_is_written(target: Target) -> None:
    """The device writes writable elements and the used ring; no descriptor, no available ring, no readable element.

    RING-SPLIT-006, 008, 009.
    """
    with bench(target, size=_SHORT) as b:
        for _ in range(2 * b.split.size):
            furnished(b)
        b.serve(b.parcel(UNKNOWN_TYPE).chain())


@check()
def writable_header(target: Target) -> None:
    """A header in a writable element is not read (RING-SPLIT-007)."""
    with bench(target) as b:
        b.needs(3)
        header_not_read(b)


@check()
def writable_data(target: Target) -> None:
    """Data in a writable element are not written to the disk (RING-SPLIT-007)."""
    data_not_read(target)


@check()
def chain_as_long_as_the_queue(target: Target) -> None:
    """A chain may have as many elements as the queue (RING-SPLIT-014)."""
    with bench(target, size=_LONG) as b:
        b.needs(3)
        long_chain(b)


@check(Feature.INDIRECT_DESC)
def full_queue(target: Target) -> None:
    """As many buffers as the queue is long may be in flight, and all are used (RING-SPLIT-015)."""
    with bench(target, size=_LONG) as b:
        served_full(b)
        served_full(b)


@check(Feature.INDIRECT_DESC)
def full_queue_of_32768(target: Target) -> None:
    """A queue of 32768 that is full is not taken for an empty one (RING-SPLIT-024)."""
    served_full_of_32768(target)


@check()
def indices_wrap(target: Target) -> None:
    """The available and the used index go on from 65535 to 0 (RING-SPLIT-010, 018)."""
    with bench(target, size=_LONG) as b:
        for count in treadmill(b):
            index = count & 0xFFFF
            expect(b.split.used_index == index, f"the used index is {b.split.used_index:#x} after {count:#x} buffers")
            if count > _INDICES:
                break


@check()
def used_length(target: Target) -> None:
    """As many bytes as the used element says have been written when it is there (RING-SPLIT-020, 022)."""
    with bench(target) as b:
        for _ in range(8):
            parcel = b.block()
            expect_length(b, b.serve(parcel.chain(16)), parcel)


@check()
def used_length_of_a_failure(target: Target) -> None:
    """A read that fails claims no bytes that were not written (RING-SPLIT-020, 022)."""
    with bench(target) as b:
        failing_read(b)


@check()
def used_elements_are_whole(target: Target) -> None:
    """When the used index tells of an element, its id and length are there (RING-SPLIT-019)."""
    with bench(target, size=_SHORT) as b:
        ring = b.split
        for position in range(64):
            b.memory.write(ring.used + 4 + 8 * (position % ring.size), _STALE)
            parcel = b.block()
            head = b.offer(parcel.chain(16))
            used = b.take()
            expect(used.id == head, f"an element with id {used.id:#x} was seen, the head was {head:#x}")
            expect_length(b, used, parcel)
