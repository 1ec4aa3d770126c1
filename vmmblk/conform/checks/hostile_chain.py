"""Chains that no driver should make.

What becomes of them is the device's choice within what each rule allows; what harms is judged everywhere: memory
that no element names is watched, and so is some that was never given to the device.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmmblk.client.queue import DESCRIPTOR_SIZE, Descriptor
from vmmblk.client.wire import DmaFlag
from vmmblk.conform.bench import MEMORY, bench
from vmmblk.conform.check import Harm, NotOffered, NotTestable, check, expect
from vmmblk.conform.hostile import RACES, expect_no_data, flip, pointer, race
from vmmblk.conform.rings import AVAIL, USED, linked
from vmmblk.conform.target import FAR_SECTOR
from vmmblk.conform.traffic import furnished, require_storage
from vmmblk.spec import DISCARD_SEGMENT, REQUEST_HEADER, DescFlag, Feature, PciCapType, RequestType

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmmblk.conform.bench import Bench
    from vmmblk.conform.target import Target

NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT

_INDEX_MAX = 0xFFFF
_NOT_MEMORY = 1 << 40
_TOP = 1 << 64
_PIECE = 1 << 20
_BAR0 = 0x10
_BAR, _MSI = 0xE000_0000, 0xFEE0_0000


# Indices.


@check()
def head_outside_the_table(target: Target) -> None:
    """A head that is no descriptor: the device asks for a reset (HOSTILE-001)."""
    for index in (None, _INDEX_MAX):
        with bench(target) as b:
            head = _decoy(b, b.block(bait=True).chain()) if index is None else index
            b.split.name(head)
            b.split.publish()
            b.kick()
            fate = b.fate()
            expect(fate.needs_reset, f"head {head:#x} in a queue of {b.split.size}: {fate}")


@check()
def next_outside_the_table(target: Target) -> None:
    """A next that is no descriptor: refused (HOSTILE-002)."""
    for index in (None, _INDEX_MAX):
        with bench(target) as b:
            header, rest = b.block(bait=True).elements(REQUEST_HEADER.size)
            following = _decoy(b, [rest]) if index is None else index
            fate = b.fate_of([header._replace(flags=NEXT, next=following)])
            expect(fate.refused, f"next {following:#x} in a queue of {b.split.size}: {fate}")


@check(Feature.INDIRECT_DESC)
def next_outside_an_indirect_table(target: Target) -> None:
    """A next beyond the entries of a table: refused, and what lies behind the table is not read (HOSTILE-003)."""
    with bench(target) as b:
        header, rest = b.block(bait=True).elements(REQUEST_HEADER.size)
        entries = b.split.literal([header._replace(flags=NEXT, next=2), rest, rest])
        fate = b.fate_of(pointer(b, entries, 2 * DESCRIPTOR_SIZE))
        expect(fate.refused, f"next 2 in a table of 2: {fate}")


@check()
def descriptor_that_follows_itself(target: Target) -> None:
    """A descriptor whose next is itself: refused (HOSTILE-004)."""
    for which in (0, 1):
        with bench(target) as b:
            element = b.block().elements(REQUEST_HEADER.size)[which]
            fate = b.fate_of([element._replace(flags=element.flags | NEXT, next=0)])
            expect(fate.refused, f"a descriptor that follows itself: {fate}")


@check()
def cycle_of_descriptors(target: Target) -> None:
    """A cycle of descriptors: refused (HOSTILE-005)."""
    with bench(target) as b:
        b.needs(3)
        header, _ = b.block().elements(REQUEST_HEADER.size)
        fate = b.fate_of([header._replace(flags=NEXT, next=following) for following in (1, 2, 0)])
        expect(fate.refused, f"three descriptors in a circle: {fate}")
    with bench(target) as b:
        header, rest = b.block().elements(REQUEST_HEADER.size)
        fate = b.fate_of([header._replace(flags=NEXT), rest._replace(flags=NEXT | WRITE, next=1)])
        expect(fate.refused, f"a chain whose second descriptor follows itself: {fate}")


@check(Feature.INDIRECT_DESC)
def cycle_in_a_table(target: Target) -> None:
    """A cycle in an indirect table: refused (HOSTILE-006)."""
    with bench(target) as b:
        header, _ = b.block().elements(REQUEST_HEADER.size)
        entries = b.split.literal([header._replace(flags=NEXT, next=1), header._replace(flags=NEXT, next=0)])
        fate = b.fate_of(pointer(b, entries))
        expect(fate.refused, f"two entries of a table in a circle: {fate}")


# Lengths.


@check(Feature.INDIRECT_DESC, each_ring=True)
def chain_longer_than_the_queue(target: Target) -> None:
    """A table longer than the queue is served well, or refused, or ends in an I/O error (HOSTILE-007)."""
    with bench(target, size=64) as b:
        truth = furnished(b)
        parcel = b.block()
        count = min(2 * b.rings[0].size, len(truth) // 2)
        fate = b.fate_of([b.table(parcel, REQUEST_HEADER.size, *[1] * count)], parcel)
        expect(fate.served or fate.failed, f"a table of {count + 2} entries in a queue of {b.rings[0].size}: {fate}")
        if fate.served and b.answer(parcel) != truth:
            raise Harm(f"a read by way of {count + 2} elements gives other data")


@check(Feature.INDIRECT_DESC, each_ring=True)
def chain_of_more_than_4_gib(target: Target) -> None:
    """A read of 4 GiB and a block more, of the last block of the disk, fails (HOSTILE-008)."""
    with bench(target) as b:
        b.block()  # there is one
        last, unit = target.facts.capacity - target.block_sectors, target.facts.block_size
        parcel = b.parcel(RequestType.IN, last, room=unit)
        piece = b.memory.space(_PIECE)
        b.memory.allow(piece, _PIECE)
        header, data, status = parcel.elements()
        many = [Descriptor(piece, _PIECE, WRITE)] * ((1 << 32) // _PIECE)
        fate = b.fate_of(pointer(b, b.rings[0].table([header, *many, data, status])), parcel)
        expect(fate.failed, f"a read of more than 4 GiB: {fate}")


@check(each_ring=True)
def readable_after_writable(target: Target) -> None:
    """A readable element after a writable one: refused, and not written (HOSTILE-009)."""
    with bench(target) as b:
        b.needs(3)
        header, data, status = b.block(bait=True).elements()
        b.memory.allow(data.address, data.length)
        fate = b.fate_of(linked(header, data, status._replace(flags=0)))
        expect(fate.refused, f"a readable element where the status belongs: {fate}")
    with bench(target) as b:
        parcel = b.block()
        header, rest = parcel.elements(REQUEST_HEADER.size)
        fate = b.fate_of(linked(header, rest, Descriptor(b.memory.place(bytes(512)), 512)), parcel)
        expect(fate.refused, f"a readable element after the status: {fate}")


@check(each_ring=True)
def empty_elements(target: Target) -> None:
    """Elements of length 0 are skipped (HOSTILE-010)."""
    with bench(target) as b:
        b.needs(5)
        truth = furnished(b)
        parcel = b.block()
        header, rest = parcel.elements(REQUEST_HEADER.size)
        nothing, nowhere = Descriptor(header.address, 0), Descriptor(rest.address, 0, WRITE)
        fate = b.fate_of(linked(nothing, header, nowhere, rest, nowhere), parcel)
        expect(fate.served, f"a read with empty elements in between: {fate}")
        expect(b.answer(parcel) == truth, "a read with empty elements in between gives other data")


@check(each_ring=True)
def nothing_but_empty_elements(target: Target) -> None:
    """A chain of elements of length 0: refused (HOSTILE-011)."""
    for flags in (0, WRITE):
        with bench(target) as b:
            place = b.memory.place(bytes(16))
            fate = b.fate_of(linked(Descriptor(place, 0), Descriptor(place, 0, flags)))
            expect(fate.refused, f"a chain of two empty elements: {fate}")


@check(each_ring=True)
def undefined_flags(target: Target) -> None:
    """Undefined flags of a descriptor are ignored (HOSTILE-012)."""
    with bench(target) as b:
        defined = NEXT | WRITE | INDIRECT | (AVAIL | USED if target.packed else 0)
        parcel = b.block()
        chain = [each._replace(flags=each.flags | 0xFFFF & ~defined) for each in parcel.chain(REQUEST_HEADER.size)]
        fate = b.fate_of(chain, parcel)
        expect(fate.served, f"a read with undefined flags set: {fate}")


# Tables.


@check(each_ring=True)
def table_without_the_feature(target: Target) -> None:
    """A table without INDIRECT_DESC negotiated: refused, and not followed (HOSTILE-013)."""
    with bench(target, features=target.mask(without=(Feature.INDIRECT_DESC,))) as b:
        parcel = b.block()
        fate = b.fate_of([b.table(parcel)], parcel)
        expect(fate.refused, f"an indirect descriptor: {fate}")
        expect(b.untouched(parcel), "the table was followed")


@check(Feature.INDIRECT_DESC)
def table_in_a_table(target: Target) -> None:
    """A table that leads to a table: refused, and the second one is not followed (HOSTILE-014)."""
    for plain in (0, 1):
        with bench(target) as b:
            parcel = b.block()
            elements = parcel.elements()
            inner = pointer(b, b.split.table(elements[plain:]))
            fate = b.fate_of(pointer(b, b.split.table([*elements[:plain], *inner])), parcel)
            expect(fate.refused, f"a table that leads to another: {fate}")
            expect(b.untouched(parcel), "the second table was followed")


@check(Feature.INDIRECT_DESC)
def table_with_next(target: Target) -> None:
    """INDIRECT and NEXT in one descriptor: the device asks for a reset, or ignores NEXT (HOSTILE-015)."""
    with bench(target) as b:
        b.needs(2)
        parcel = b.block()
        bait = b.block(bait=True).elements(REQUEST_HEADER.size)[1]
        fate = b.fate_of([b.table(parcel)._replace(flags=INDIRECT | NEXT), bait], parcel)
        expect(fate.needs_reset or fate.served, f"a table, and a descriptor after it: {fate}")


@check(Feature.INDIRECT_DESC, each_ring=True)
def empty_table(target: Target) -> None:
    """A table of length 0: refused (HOSTILE-016)."""
    with bench(target) as b:
        fate = b.fate_of([b.table(b.block(bait=True))._replace(length=0)])
        expect(fate.refused, f"a table of length 0: {fate}")


@check(Feature.INDIRECT_DESC, each_ring=True)
def ragged_table(target: Target) -> None:
    """A table whose length is no multiple of 16: refused (HOSTILE-017)."""
    for length in (2 * DESCRIPTOR_SIZE + 8, 3 * DESCRIPTOR_SIZE + 1, 1):
        with bench(target) as b:
            fate = b.fate_of([b.table(b.block(bait=True))._replace(length=length)])
            expect(fate.refused, f"a table of {length} bytes: {fate}")


@check(Feature.INDIRECT_DESC, each_ring=True)
def table_outside_memory(target: Target) -> None:
    """A table that lies outside guest memory, or reaches out of it: refused (HOSTILE-018)."""
    for place in (MEMORY, MEMORY - DESCRIPTOR_SIZE, _NOT_MEMORY, _TOP - DESCRIPTOR_SIZE):
        with bench(target) as b:
            table = b.rings[0].table(b.block(bait=True).elements())
            if place <= MEMORY:
                b.memory.write(place, table)
            fate = b.fate_of([Descriptor(place, len(table), INDIRECT)])
            expect(fate.refused, f"a table at {place:#x}, where memory ends at {MEMORY:#x}: {fate}")


@check(Feature.INDIRECT_DESC, each_ring=True)
def table_of_4_gib(target: Target) -> None:
    """A table of nearly 4 GiB is refused, or fails, or is read only as far as its chain goes (HOSTILE-019)."""
    with bench(target) as b:
        truth = furnished(b)
        parcel = b.block()
        fate = b.fate_of([b.table(parcel)._replace(length=0xFFFF_FFF0)], parcel)
        expect(fate.failed or fate.served, f"a table of nearly 4 GiB: {fate}")
        if fate.served and b.answer(parcel) != truth:
            raise Harm("a read by way of a table of nearly 4 GiB gives other data")


# Addresses.


@check(each_ring=True)
def data_outside_memory(target: Target) -> None:
    """Data outside guest memory: the device asks for a reset, or the request ends in an I/O error (HOSTILE-020)."""
    for place in (MEMORY, _NOT_MEMORY):
        expect_no_data(target, place)


@check(each_ring=True)
def header_or_status_outside_memory(target: Target) -> None:
    """A header or a status outside guest memory: refused, or an I/O error where there is a status (HOSTILE-020)."""
    for place in (MEMORY, _NOT_MEMORY):
        with bench(target) as b:
            b.needs(3)
            parcel = b.block(bait=True)
            b.memory.allow(parcel.status, 1)
            header, data, status = parcel.elements()
            b.memory.write(MEMORY, b.memory.read(header.address, header.length))
            fate = b.fate_of(linked(header._replace(address=place), data, status), parcel)
            expect(fate.failed, f"a header at {place:#x}, where memory ends at {MEMORY:#x}: {fate}")
        with bench(target) as b:
            header, data, status = b.block().elements()
            fate = b.fate_of(linked(header, data, status._replace(address=place)))
            expect(fate.refused, f"a status at {place:#x}, where memory ends at {MEMORY:#x}: {fate}")


@check(each_ring=True)
def data_around_the_address_space(target: Target) -> None:
    """Data that run over the end of the address space: as outside memory, and nothing at 0 is touched (HOSTILE-021)."""
    expect_no_data(target, _TOP - 256)


@check(each_ring=True)
def data_over_the_end_of_memory(target: Target) -> None:
    """Data that begin in guest memory and run out of it: as outside, and nothing beyond is touched (HOSTILE-022)."""
    expect_no_data(target, MEMORY - 256, 256)


@check(each_ring=True)
def data_over_two_regions(target: Target) -> None:
    """Data over two regions that are apart in the VMM: served well, or a clean failure (HOSTILE-023)."""
    border, elsewhere = MEMORY // 4, MEMORY // 2
    with bench(target, live=False, whole=False) as b:
        b.connection.dma_map(0, border, b.pages.descriptor(), 0)
        b.connection.dma_map(border, border, b.pages.descriptor(), elsewhere)
        ring = b.add_ring(size=64)
        b.go()
        b.needs(3)
        truth = furnished(b)
        parcel = b.block(bait=True)
        b.memory.allow(parcel.status, 1)
        b.memory.allow(border - 256, 256)
        b.memory.allow(elsewhere, len(truth) - 256)
        header, data, status = parcel.elements()
        b.offer(linked(header, data._replace(address=border - 256), status), ring.index)
        fate = b.fate(parcel)
        expect(fate.served or fate.failed, f"a read into two regions: {fate}")
        got = b.memory.read(border - 256, 256) + b.memory.read(elsewhere, len(truth) - 256)
        if fate.served and got != truth:
            raise Harm("a read into two regions gives other data")


@check(each_ring=True)
def data_on_registers(target: Target) -> None:
    """Data at the addresses of the device's own registers, or of interrupts: as outside memory (HOSTILE-024)."""

    def place_bar(b: Bench) -> None:
        common = next(each for each in b.pci.virtio_capabilities if each.cfg_type == PciCapType.COMMON_CFG)
        b.pci.config_write(_BAR0 + 4 * common.bar, struct.pack("<I", _BAR))

    expect_no_data(target, _BAR, prepare=place_bar)
    expect_no_data(target, _MSI)


@check(each_ring=True)
def data_in_read_only_memory(target: Target) -> None:
    """A read into memory that the device may only read fails (HOSTILE-025)."""
    half = MEMORY // 2
    with bench(target, live=False, whole=False) as b:
        b.connection.dma_map(0, half, b.pages.descriptor(), 0)
        b.connection.dma_map(half, half, b.pages.descriptor(), half, DmaFlag.READ)
        b.add_ring(size=64)
        b.go()
        b.needs(3)
        parcel = b.block(bait=True)
        b.memory.allow(parcel.status, 1)
        header, data, status = parcel.elements()
        fate = b.fate_of(linked(header, data._replace(address=half), status), parcel)
        expect(fate.failed, f"a read into read-only memory: {fate}")


# Races.


@check()
def descriptors_that_change(target: Target) -> None:
    """A descriptor that changes while it is read: whatever is served, no byte beyond memory (HOSTILE-026)."""
    with bench(target, size=64) as b:
        b.needs(3)
        race(b, lambda elements: (linked(*elements), b.split.slot_ahead(1)))


@check(Feature.INDIRECT_DESC, each_ring=True)
def tables_that_change(target: Target) -> None:
    """A table that changes while it is read: whatever is served, no byte beyond memory (HOSTILE-027)."""
    with bench(target, size=64) as b:

        def in_table(elements: list[Descriptor]) -> tuple[list[Descriptor], int]:
            table = pointer(b, b.rings[0].table(elements))
            return table, table[0].address + DESCRIPTOR_SIZE

        race(b, in_table)


@check(each_ring=True)
def headers_that_change(target: Target) -> None:
    """A header that changes while it is read: the sector that was checked is the one that is read (HOSTILE-028)."""
    with bench(target, size=64) as b:
        truth = furnished(b)
        for _ in range(RACES):
            parcel = b.block()
            words = [struct.pack("<Q", sector) for sector in (0, FAR_SECTOR)]
            fate = flip(b, parcel.chain(REQUEST_HEADER.size), parcel.readable + 8, words, parcel)
            if fate.needs_reset:
                return
            expect(fate.served or fate.failed, f"a read whose sector changes: {fate}")
            if fate.served and b.answer(parcel) != truth:
                raise Harm("a read whose sector changes gives data from elsewhere")


@check(each_ring=True)
def segments_that_change(target: Target) -> None:
    """Ranges to be zeroed or discarded that change while they are read: what was checked is done (HOSTILE-029)."""
    if not target.offers(Feature.BLK_WRITE_ZEROES) and not target.offers(Feature.BLK_DISCARD):
        raise NotOffered("neither BLK_WRITE_ZEROES nor BLK_DISCARD is offered")
    blocks = target.block_sectors
    target.room(4 * blocks)
    kind = RequestType.WRITE_ZEROES if target.offers(Feature.BLK_WRITE_ZEROES) else RequestType.DISCARD
    pattern = bytes(range(256)) * (4 * target.facts.block_size // 256)
    with bench(target, size=64) as b:
        require_storage(b)
        b.call(b.parcel(RequestType.OUT, 0, pattern))
        ranges = [DISCARD_SEGMENT.pack(0, blocks, 0), DISCARD_SEGMENT.pack(2 * blocks, 0xFFFF_FFFF, 0)]
        for _ in range(RACES):
            parcel = b.parcel(kind, 0, ranges[0])
            fate = flip(b, parcel.chain(), parcel.readable + REQUEST_HEADER.size, ranges, parcel)
            if fate.needs_reset:
                break
            expect(fate.served or fate.failed, f"a request whose range changes: {fate}")
    with bench(target) as b:
        now = b.call(b.parcel(RequestType.IN, room=len(pattern)))
    unit = target.facts.block_size
    if any(now[at : at + unit] != pattern[at : at + unit] for at in (unit, 3 * unit)):
        raise Harm("blocks were changed that no range covered which is sound")


# Chains that share.


@check()
def shared_descriptors(target: Target) -> None:
    """Two chains that share descriptors are both served as they stand (HOSTILE-030)."""
    with bench(target) as b:
        b.needs(4)
        truth = furnished(b)
        ring, parcel = b.split, b.block()
        first = ring.offer(parcel.chain(16, 256), publish=False)
        header = Descriptor(b.block().readable, REQUEST_HEADER.size, NEXT, (first + 1) % ring.size)
        second = ring.offer([header], publish=False)
        ring.publish()
        b.kick()
        back = {b.take().id, b.take().id}
        expect(back == {first, second}, f"heads {first} and {second} were in flight, {back} came back")
        expect(b.answer(parcel) == truth, "two reads into the same elements give other data")


@check()
def head_offered_twice(target: Target) -> None:
    """A head offered again while it is in flight: both are served, or the device asks for a reset (HOSTILE-031)."""
    with bench(target) as b:
        ring, parcel = b.split, b.block()
        head = ring.offer(parcel.chain(16), publish=False)
        ring.name(head)
        ring.publish()
        b.kick()
        fates = [b.fate(parcel)]
        if not fates[0].needs_reset:
            fates.append(b.fate(parcel))
        for fate in fates:
            expect(fate.needs_reset or fate.served, f"a head that was offered twice: {fate}")
            expect(fate.used is None or fate.used.id == head, f"head {head} was offered twice: {fate.used}")


# The tools.


def _decoy(b: Bench, chain: Sequence[Descriptor]) -> int:
    """Put a chain where descriptors would be if the table were longer; returns its index."""
    place = b.memory.space(DESCRIPTOR_SIZE * len(chain))
    index = (place - b.split.desc) // DESCRIPTOR_SIZE
    b.memory.write(place, b.split.literal([each._replace(next=index + i) for i, each in enumerate(chain, 1)]))
    if not b.split.size <= index <= _INDEX_MAX - len(chain):
        raise NotTestable(f"no memory lies where descriptor {b.split.size} would be")
    return index
