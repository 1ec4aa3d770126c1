"""Packed rings that no driver should have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.queue import DESCRIPTOR_SIZE
from vmmblk.client.request import UNSET_STATUS
from vmmblk.conform.bench import bench
from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.hostile import misaligned, pointer, race
from vmmblk.conform.rings import linked
from vmmblk.conform.traffic import UNKNOWN_TYPE
from vmmblk.spec import REQUEST_HEADER, SECTOR_SIZE, DescFlag, Feature, RequestType, Status

if TYPE_CHECKING:
    from vmmblk.conform.bench import Bench
    from vmmblk.conform.target import Target

NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT

_SHORT, _LONG = 8, 256
_AT_DESCRIPTOR, _RESERVED = 2, 3
_TAIL = 12
_MUCH = 1 << 20
_ROUNDS, _TRIES = 3, 60


@check(Feature.RING_PACKED)
def endless_list(target: Target) -> None:
    """A list as long as the queue that goes on: the device asks for a reset (HOSTILE-049)."""
    for which in (0, 1):
        with bench(target, packed=True, size=_LONG) as b:
            element = b.block().elements(REQUEST_HEADER.size)[which]
            fate = b.fate_of([element._replace(flags=element.flags | NEXT)] * b.packed.size)
            expect(fate.needs_reset, f"{b.packed.size} descriptors, all of them with NEXT: {fate}")


@check(Feature.RING_PACKED)
def list_that_is_not_all_available(target: Target) -> None:
    """A list whose second descriptor is not available: it ends there, or the device asks for a reset (HOSTILE-050)."""
    with bench(target, packed=True) as b:
        b.needs(2)
        ring = b.packed
        header, rest = b.block(bait=True).elements(REQUEST_HEADER.size)
        ring.store(1, rest._replace(next=0))
        fate = b.fate_of([header._replace(flags=NEXT)])
        expect(fate.needs_reset or fate.used is not None, f"a list whose second descriptor is not available: {fate}")


@check(Feature.RING_PACKED)
def any_buffer_id(target: Target) -> None:
    """Whatever its buffer id is, a list is returned with it (HOSTILE-051)."""
    with bench(target, packed=True) as b:
        for identity in (b.packed.size, 0x8000, 0xFFFF, 0):
            parcel = b.block()
            b.packed.offer(parcel.chain(REQUEST_HEADER.size), buffer_id=identity)
            b.kick()
            fate = b.fate(parcel)
            expect(fate.served, f"a list with id {identity:#x}: {fate}")
            expect(fate.used is not None and fate.used.id == identity, f"id {identity:#x} came back as {fate.used}")


@check(Feature.RING_PACKED)
def buffer_id_in_flight(target: Target) -> None:
    """Lists in flight with the same buffer id are all returned with it (HOSTILE-051)."""
    with bench(target, packed=True, size=_SHORT) as b:
        b.needs(4)
        parcels = [b.block() for _ in range(b.packed.size // 2)]
        for parcel in parcels:
            b.packed.offer(parcel.chain(REQUEST_HEADER.size), publish=False, buffer_id=5)
        b.packed.publish()
        b.kick()
        for _ in parcels:
            used = b.take()
            expect(used.id == 5, f"a list with id 5 came back as {used}")
        for parcel in parcels:
            b.answer(parcel)


@check(Feature.RING_PACKED, Feature.INDIRECT_DESC)
def table_in_a_list(target: Target) -> None:
    """A table in a list with other descriptors: refused (HOSTILE-053)."""
    for first in (True, False):
        with bench(target, packed=True) as b:
            b.needs(2)
            header, rest = b.block().elements(REQUEST_HEADER.size)
            table = pointer(b, b.packed.table([header, rest] if first else [rest]))
            chain = linked(*table, rest) if first else linked(header, *table)
            fate = b.fate_of(chain)
            expect(fate.refused, f"a table in a list of two descriptors: {fate}")


@check(Feature.RING_PACKED, Feature.INDIRECT_DESC)
def ragged_table(target: Target) -> None:
    """A table of length 0, or of no multiple of 16: refused (HOSTILE-055)."""
    for length in (0, 1, 2 * DESCRIPTOR_SIZE + 8, 3 * DESCRIPTOR_SIZE + 1):
        with bench(target, packed=True) as b:
            fate = b.fate_of([b.table(b.block(bait=True))._replace(length=length)])
            expect(fate.refused, f"a table of {length} bytes: {fate}")


@check(Feature.RING_PACKED)
def reserved_event_flags(target: Target) -> None:
    """The reserved event flags 3 enable interrupts (HOSTILE-056)."""
    for features in (target.mask(), target.mask(without=(Feature.EVENT_IDX,))):
        with bench(target, packed=True, features=features) as b:
            _expect_interrupts(b, _RESERVED)


@check(Feature.RING_PACKED)
def event_without_the_feature(target: Target) -> None:
    """Event flags 2 without EVENT_IDX enable interrupts (HOSTILE-057)."""
    with bench(target, packed=True, features=target.mask(without=(Feature.EVENT_IDX,))) as b:
        _expect_interrupts(b, _AT_DESCRIPTOR)


@check(Feature.RING_PACKED, Feature.EVENT_IDX)
def event_beyond_the_ring(target: Target) -> None:
    """Whatever the event word holds, buffers are used (HOSTILE-058)."""
    with bench(target, packed=True) as b:
        for event in (b.packed.size & 0x7FFF, 0x7FFF, 0xFFFF, b.packed.size | 0x8000):
            b.packed.set_event_word(_AT_DESCRIPTOR, event)
            b.call(b.block(), sizes=(REQUEST_HEADER.size,))


@check(Feature.RING_PACKED)
def descriptors_that_change(target: Target) -> None:
    """A descriptor that changes while it is read: whatever is served, no byte beyond memory (HOSTILE-059)."""
    with bench(target, packed=True, size=64) as b:
        b.needs(3)
        race(b, lambda elements: (linked(*elements), b.packed.slot_ahead(1)))


@check(Feature.RING_PACKED)
def misaligned_areas(target: Target) -> None:
    """A ring that is not aligned is not started, or is served all the same (HOSTILE-060)."""
    off = {"descriptor ring": 8, "driver's event structure": 2, "device's event structure": 2}
    misaligned(target, off, packed=True)


@check(Feature.RING_PACKED)
def list_over_slots_in_flight(target: Target) -> None:
    """A list that runs on into slots that are in flight: the device asks for a reset (HOSTILE-061)."""
    count = [0, 0, 0]
    for _ in range(_TRIES):
        with bench(target, packed=True, size=_LONG) as b:
            count[_run_into_flight(b)] += 1
        expect(count[_SERVED] < _ROUNDS, "a list was served whose last slots were still in flight for others")
        if count[_REFUSED] >= _ROUNDS and not count[_SERVED]:
            return
    if not count[_REFUSED]:
        raise NotTestable("the disk is too quick to have requests in flight while the ring changes")


_REFUSED, _SERVED, _TOO_LATE = range(3)


def _run_into_flight(b: Bench) -> int:
    """Fill half the ring with reads and, while they are in flight, offer a list longer than what is left.

    Its last descriptors lie where used ones of the reads are to come: a device that waits for those finds it broken.
    """
    ring, unit = b.packed, b.target.facts.block_size
    b.needs(64)
    room = max(min(_MUCH, b.target.facts.capacity * SECTOR_SIZE) // unit, 1) * unit
    long_read = b.parcel(RequestType.IN, room=room).chain(REQUEST_HEADER.size)
    half, witness, parcel = ring.size // 2, b.block(), b.block()
    first, *others = parcel.chain(REQUEST_HEADER.size, *[1] * (half + _TAIL - 2))
    for step, each in enumerate(others[:-_TAIL], 1):
        ring.store(half + step, each._replace(flags=each.flags | ring.marks(half + step), next=0))
    reads = [b.block().chain(REQUEST_HEADER.size) for _ in range(_TAIL // 2)] + [witness.chain(REQUEST_HEADER.size)]
    for chain in reads + [long_read] * (half // 2 - len(reads)):
        ring.offer(chain, publish=False)
    ring.publish()
    b.kick()
    # reads are begun in the order of the ring: those whose slots are stored over have been taken
    b.until(lambda: not b.untouched(witness), b.patience)
    if ring.is_used(0):
        return _TOO_LATE
    for step, each in enumerate(others[-_TAIL:]):
        ring.store(step, each._replace(flags=each.flags | ring.marks(ring.size + step), next=0))
        # a read that is given back there in between leaves its used length, and so changes what the list names
        b.memory.allow(each.address, room + 1)
    ring.store(half, first._replace(flags=first.flags | ring.marks(half), next=0))
    late = ring.is_used(_TAIL)
    b.kick()
    came = b.until(lambda: b.needs_reset or b.status_of(parcel) != UNSET_STATUS, b.patience)
    expect(came, "a list that runs into slots in flight is neither served, nor is a reset asked for")
    if b.needs_reset:  # nothing is used any more; what was used before may be what it found wrong
        return _TOO_LATE if any(ring.is_used(step) for step in range(_TAIL)) else _REFUSED
    return _TOO_LATE if late or b.status_of(parcel) != Status.OK else _SERVED


def _expect_interrupts(b: Bench, flags: int) -> None:
    for event in (0, 0x7FFF, 0x8005):
        b.packed.set_event_word(flags, event)
        b.serve(b.parcel(UNKNOWN_TYPE).chain())
        expect(b.interrupted(), f"no interrupt came with event flags {flags} and event word {event:#x}")
