"""Rings that no driver should have, and what it should not do with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.bench import MEMORY, bench
from vmmblk.conform.check import Harm, check, expect
from vmmblk.conform.hostile import areas, misaligned
from vmmblk.conform.rings import SplitRing, linked
from vmmblk.conform.traffic import UNKNOWN_TYPE, furnished
from vmmblk.spec import REQUEST_HEADER, SECTOR_SIZE, Feature, RequestType

if TYPE_CHECKING:
    from vmmblk.client.queue import Descriptor
    from vmmblk.conform.bench import Bench, Fate, Parcel
    from vmmblk.conform.rings import Ring
    from vmmblk.conform.target import Target

_SHORT = 8
_NOT_MEMORY = 1 << 40
_TOP = 1 << 64
_TURNS = 60
_ROUNDS = 5
_MUCH = 64 << 10
_AREAS = ("descriptor table", "available ring", "used ring")


# The available ring.


@check()
def available_index_that_jumps(target: Target) -> None:
    """An available index further ahead than the queue is long: the device asks for a reset, and replays no old chains.

    HOSTILE-032.
    """
    with bench(target, size=_SHORT) as b:
        _move_index(b, b.split.size + 1)


@check()
def available_index_that_goes_back(target: Target) -> None:
    """An available index that goes back: the device asks for a reset, and replays no old chains (HOSTILE-033)."""
    with bench(target, size=_SHORT) as b:
        _move_index(b, -1)


@check(Feature.INDIRECT_DESC)
def more_in_flight_than_the_queue_is_long(target: Target) -> None:
    """Twice as many buffers at once as the queue is long: all are used, or a reset is asked for (HOSTILE-034)."""
    with bench(target, size=64) as b:
        ring = b.split
        heads = [ring.offer([b.table(b.parcel(UNKNOWN_TYPE))], publish=False) for _ in range(ring.size)]
        ring.publish()
        b.kick()
        for head in heads:
            ring.name(head)
        ring.publish()
        b.kick()
        b.until(lambda: ring.used_index == 2 * len(heads) or b.needs_reset)
        used = ring.used_index
        expect(used == 2 * len(heads) or b.needs_reset, f"{used} of {2 * len(heads)} buffers were used")


@check(each_ring=True)
def available_index_that_runs_on(target: Target) -> None:
    """While a queue is filled again and again, registers are answered and another queue is served (HOSTILE-035)."""
    with bench(target, size=64, queues=min(target.facts.queues, 2)) as b:
        ring = b.rings[0]
        chain = b.parcel(UNKNOWN_TYPE).chain()
        in_flight = 0
        for turn in range(_TURNS):
            while in_flight < ring.size // len(chain):
                ring.offer(chain, publish=False)
                in_flight += 1
            ring.publish()
            b.kick()
            if turn % 10 == 0:
                b.fence()
            while ring.take() is not None:
                in_flight -= 1
        for _ in range(in_flight):
            b.take()


@check()
def undefined_available_flags(target: Target) -> None:
    """Of the available flags only bit 0 counts (HOSTILE-037)."""
    with bench(target, features=target.mask(without=(Feature.EVENT_IDX,))) as b:
        b.split.set_flags(0xFFFE)
        b.serve(b.parcel(UNKNOWN_TYPE).chain())
        expect(b.interrupted(), "no interrupt came with available flags 0xfffe")
        b.split.set_flags(0xFFFF)
        for _ in range(4):
            b.serve(b.parcel(UNKNOWN_TYPE).chain())
        b.fence()
        expect(not b.interrupts(), "an interrupt came with available flags 0xffff")


@check(Feature.EVENT_IDX)
def arbitrary_used_event(target: Target) -> None:
    """Whatever used_event holds, buffers are used (HOSTILE-039)."""
    with bench(target) as b:
        for event in (0xFFFF, 0x8000, 0x7FFF, 1, 12345, 0):
            b.split.set_used_event(event)
            b.call(b.block())


# The used ring.


@check()
def used_ring_overwritten(target: Target) -> None:
    """The device does not read back the used ring: it stores its own index, and its elements (HOSTILE-036)."""
    with bench(target, size=_SHORT) as b:
        ring = b.split
        for count in range(1, 2 * ring.size):
            b.memory.write(ring.used, bytes([0x77]) * ring.lengths(ring.size)[2])
            head = b.offer(b.block().chain(REQUEST_HEADER.size))
            came = b.until(lambda: ring.used_index == count)  # noqa: B023
            expect(
                came, f"the used index is {ring.used_index:#x} where {count} buffers were used, 0x7777 was stored there"
            )
            used = ring.used_element(count - 1)
            expect(used.id == head, f"used element {count - 1} has id {used.id:#x}, the head was {head:#x}")


@check(each_ring=True)
def used_area_not_zeroed(target: Target) -> None:
    """What the device's area held before the queue was enabled does not matter (HOSTILE-046)."""
    with bench(target, live=False) as b:
        size = min(b.device.select_queue(0), _SHORT)
        places = areas(b, size)
        b.memory.write(places[2], bytes([0xFF]) * b.layout.lengths(size)[2])
        ring = b.add_ring(size=size, areas=places)
        b.go()
        for count in range(1, 4):
            parcel = b.block()
            if isinstance(ring, SplitRing):
                b.offer(parcel.chain(REQUEST_HEADER.size))
                came = b.until(lambda: ring.used_index == count)  # noqa: B023
                expect(came, f"the used index is {ring.used_index:#x} after {count} buffers, 0xffff was stored there")
                expect(ring.used_flags in (0, 1), f"the used flags are {ring.used_flags:#x}, 0xffff was stored there")
            else:
                b.serve(parcel.chain(REQUEST_HEADER.size))
            b.answer(parcel)


# Where rings lie.


@check()
def misaligned_areas(target: Target) -> None:
    """A ring that is not aligned is not started, or is served all the same (HOSTILE-040)."""
    misaligned(target, dict(zip(_AREAS, (8, 1, 2), strict=True)))


@check(each_ring=True)
def areas_outside_memory(target: Target) -> None:
    """A queue with an area outside guest memory is not served, and the device asks for a reset (HOSTILE-041)."""
    for which in range(3):
        for place in (MEMORY, _NOT_MEMORY):
            with bench(target, live=False) as b:
                _misplace(b, which, place)
                came = b.until(lambda: b.needs_reset, b.patience)
                expect(came, f"area {which} of the ring lies at {place:#x}, and no reset is asked for")


@check(each_ring=True)
def areas_around_the_address_space(target: Target) -> None:
    """A queue whose areas run over the end of the address space is not served (HOSTILE-042)."""
    for which in range(3):
        with bench(target, live=False) as b:
            if which and b.layout is not SplitRing:
                continue  # an event structure ends where the address space does
            ring = _misplace(b, which, _TOP - b.layout.alignments[which])
            b.fence()
            expect(which == 2 or not ring.has_used, f"a buffer was used, area {which} runs over the end of addresses")


@check()
def areas_on_top_of_each_other(target: Target) -> None:
    """Areas that overlap hurt nobody: registers are answered, and another queue is served (HOSTILE-043)."""
    queues = min(target.facts.queues, 2)
    with bench(target, live=False, queues=queues) as b:
        size = min(b.device.select_queue(0), _SHORT)
        places = areas(b, size)
        b.memory.allow(places[0], b.layout.lengths(size)[0])
        b.add_ring(size=size, areas=[places[0]] * 3)
        if queues > 1:
            b.add_ring(1, size=_SHORT)
        b.go()
        b.memory.write(places[0] + 2, (1).to_bytes(2, "little"))  # an index, and descriptor 0 as well
        b.kick()
        b.fence()


@check(Feature.BLK_MQ)
def two_queues_on_one_ring(target: Target) -> None:
    """Two queues on the same ring: a request is served, by either or by both (HOSTILE-044)."""
    target.require_queues(2)
    truth = _truth(target)
    with bench(target, live=False, queues=2) as b:
        ring = b.add_ring(0, size=_SHORT)
        b.add_ring(1, size=_SHORT, areas=(ring.desc, ring.avail, ring.used))
        b.go()
        parcel = b.block()
        ring.offer(parcel.chain(REQUEST_HEADER.size))
        b.kick(0)
        b.kick(1)
        fate = b.fate(parcel)
        expect(fate.served or fate.needs_reset, f"two queues on one ring: {fate}")
        if fate.served and b.answer(parcel) != truth:
            raise Harm("a read by way of a ring of two queues gives other data")


@check(Feature.IN_ORDER)
def in_order_descriptors_anywhere(target: Target) -> None:
    """With IN_ORDER next is followed wherever it leads, within the table (HOSTILE-045)."""
    features = target.mask(Feature.IN_ORDER)
    with bench(target, features=features) as b:
        b.needs(4)
        parcel = b.block()
        header, data, status = parcel.chain()
        fate = _scattered(b, header._replace(next=0), data._replace(next=2), status, parcel)
        expect(fate.served, f"a chain from descriptor 3 by 0 to 2: {fate}")
    with bench(target, features=features) as b:
        b.needs(4)
        parcel = b.block(bait=True)
        header, data, status = parcel.chain()
        fate = _scattered(b, header._replace(next=b.split.size), data._replace(next=2), status, parcel)
        expect(fate.refused, f"a next of {b.split.size} in a queue as long: {fate}")


@check()
def data_over_the_ring(target: Target) -> None:
    """Data that overwrite the ring land as asked, and the device goes on from what it knows (HOSTILE-047)."""
    truth = _truth(target)
    for which in (0, 2):
        with bench(target, live=False) as b:
            size = min(b.device.select_queue(0), _SHORT)
            unit = target.facts.block_size
            zone = b.memory.space(unit + 2048, 4096)
            b.memory.write(zone, bytes(unit + 2048))
            b.memory.allow(zone, unit)
            places = areas(b, size)
            places[which] = zone
            b.memory.allow(zone, b.layout.lengths(size)[which])
            b.add_ring(size=size, areas=places)
            b.go()
            b.needs(3)
            ring = b.split
            header, data, status = b.block().elements()
            b.offer(linked(header, data._replace(address=zone), status))
            came = b.until(lambda: ring.used_index == 1)  # noqa: B023
            expect(came, f"the used index is {ring.used_index:#x} after one buffer, which lay over the {_AREAS[which]}")
            tail = sum(ring.lengths(size)[2:])  # of the used ring, which the device writes as well
            got = b.memory.read(zone + tail, unit - tail)
            expect(got == truth[tail:], f"data that were read over the {_AREAS[which]} are not there")
            ring.taken = 1
            b.call(b.block())


# Memory that goes away.


@check(each_ring=True)
def data_unmapped_in_flight(target: Target) -> None:
    """Once memory is unmapped nothing is written there, whatever was in flight (HOSTILE-048)."""
    half = MEMORY // 2
    with bench(target, live=False, whole=False) as b:
        b.connection.dma_map(0, half, b.pages.descriptor(), 0)
        b.add_ring(size=64)
        b.go()
        b.needs(3)
        unit = target.facts.block_size
        room = max(min(_MUCH, target.facts.capacity * SECTOR_SIZE) // unit, 1) * unit
        for _ in range(_ROUNDS):
            b.connection.dma_map(half, half, b.pages.descriptor(), half)
            b.memory.allow(half, half)
            header, data, status = b.parcel(RequestType.IN, room=room).elements()
            count = min(b.rings[0].size // 3, half // room)
            for place in range(half, half + count * room, room):
                b.rings[0].offer(linked(header, data._replace(address=place), status), publish=False)
            b.rings[0].publish()
            b.kick()
            b.connection.dma_unmap(half, half)
            was = b.memory.read(half, half)
            left = count
            while left and b.fate().used is not None:
                left -= 1
            b.fence()
            if b.memory.read(half, half) != was:
                raise Harm("memory was written after it had been unmapped")
            if left or b.needs_reset:
                break


@check(each_ring=True)
def ring_unmapped(target: Target) -> None:
    """Once its memory is unmapped a ring is left alone, and registers are answered (HOSTILE-048)."""
    with bench(target, size=64) as b:
        b.call(b.block())
        chains = [b.block().chain(REQUEST_HEADER.size) for _ in range(b.rings[0].size // 2)]
        for chain in chains:
            b.rings[0].offer(chain)
        b.kick()
        b.connection.dma_unmap(0, MEMORY)
        was = b.memory.read(0, MEMORY)
        b.kick()
        for _ in range(_ROUNDS):
            b.fence()
        if b.memory.read(0, MEMORY) != was:
            raise Harm("memory was written after it had been unmapped")


# The tools.


def _truth(target: Target) -> bytes:
    """What the first block holds."""
    with bench(target) as b:
        return furnished(b)


def _move_index(b: Bench, by: int) -> None:
    """Move the available index after one request was served; that one must not be served again."""
    ring, parcel = b.split, b.block()
    b.call(parcel)
    was = b.memory.read(parcel.writable, parcel.writable_length)
    mine = bytes(byte ^ 0xFF for byte in was)
    b.memory.write(parcel.writable, mine)
    ring.position += by
    ring.publish()
    b.kick()
    came = b.until(lambda: b.needs_reset or ring.has_used, b.patience)
    stale = b.memory.read(parcel.writable, parcel.writable_length) != mine
    expect(not stale, f"a request that was served before was served again when the available index moved by {by}")
    expect(came and b.needs_reset, f"the available index moved by {by}, and no reset is asked for")


def _misplace(b: Bench, which: int, place: int) -> Ring:
    """Bring up queue 0 with one area elsewhere, something available in it as far as it can be, and ring for it."""
    size = min(b.device.select_queue(0), _SHORT)
    places = areas(b, size)
    places[which] = place
    ring = b.add_ring(size=size, areas=places)
    b.go()
    if isinstance(ring, SplitRing) and which != 1:
        ring.name(0)
        ring.publish()
    b.kick()
    return ring


def _scattered(b: Bench, header: Descriptor, data: Descriptor, status: Descriptor, parcel: Parcel) -> Fate:
    """Offer a chain whose header is descriptor 3, data descriptor 0 and status descriptor 2."""
    for slot, each in ((3, header), (0, data), (2, status)):
        b.split.store(slot, each)
    b.split.name(3)
    b.split.publish()
    b.kick()
    return b.fate(parcel)
