"""What only a packed virtqueue has: wrap counters, slots that are skipped, buffer ids, event suppression structures.

What holds for both formats is in test_ring.py.  Rows are those of the conformance list (RING-PACKED, HOSTILE).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import pytest
from rings import HEADER, INDIRECT, NEXT, PAGE, WRITE, Descriptor, Life, Range, Rig, Segment

from vmmblk.memory import Core, Region
from vmmblk.ring import CorruptRing, Queue, ending
from vmmblk.spec import DescFlag

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC, RESERVED = range(4)
OUTSIDE = 0xFEB0_0000
SEAM = 64 * PAGE
TWO_REGIONS = (Range(0, SEAM), Range(SEAM, SEAM))
ODD = 7


def packed(size: int = 16, *, event_idx: bool = False, indirect: bool = True) -> Life:
    """How a packed queue was started."""
    return Life(size=size, event_idx=event_idx, indirect=indirect, packed=True)


@pytest.fixture
def rig() -> Iterator[Rig]:
    """Seven slots, flags for suppression, indirect allowed."""
    with Rig(life=packed(ODD)) as made:
        yield made


def slot(rig: Rig, index: int) -> tuple[int, int, int, int]:
    """A descriptor as memory has it: address, length, id, flags."""
    raw = rig.memory.read(rig.ring.desc + 16 * index, 16)
    return tuple(int.from_bytes(raw[a:b], "little") for a, b in ((0, 8), (8, 12), (12, 14), (14, 16)))  # type: ignore[return-value]


def event(size: int, position: int) -> int:
    """Offset and wrap counter of a position."""
    return position % size | (0x8000 if position % (2 * size) < size else 0)


# ---- the ring


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 100, 1024])
@pytest.mark.parametrize("event_idx", [False, True])
def test_any_size_goes_round_and_round(size: int, event_idx: bool) -> None:
    """RING-PACKED-002, -004, -005, -006, -007, -023, -026: lists of changing length over many laps of the ring."""
    with Rig(life=packed(size, event_idx=event_idx)) as rig:
        status = rig.writable(1)
        empty = Segment(0, 0, writable=False)
        for n in range(5 * size + 20):
            length = 1 + n % min(size, 5)
            position = rig.ring.avail_position
            given = rig.offer(*[empty] * (length - 1), status)
            rig.complete(rig.pop_one())
            address, written, name, flags = slot(rig, position % size)
            assert (written, name) == (1, given)
            assert flags & (AVAIL | USED) == (AVAIL | USED if position < size else 0)
            assert address in {0, status.iova}
            assert rig.ring.get_used() == [(given, 1)]
            assert rig.ring.used_position == rig.ring.avail_position == (position + length) % (2 * size)


def test_a_full_queue_of_32768_wraps() -> None:
    """RING-PACKED-003: the largest queue, full, twice."""
    with Rig(layout=(Range(0, 4 << 20),), life=packed(32768), start=False) as driver:
        core = Core(1, 32768)
        host = driver.memory.address(0, 4 << 20)
        core.map(Region(0, 4 << 20, host, host, 4 << 20, PAGE, 3))
        queue, ring, status = Queue(core, 0), driver.ring, driver.writable(1)
        areas = {"desc": ring.desc, "driver": ring.avail, "device": ring.used}
        queue.start(size=32768, **areas, vector=0, event_idx=False, indirect=False, packed=True)
        for _ in range(2):
            for _ in range(32768):
                ring.add((status,))
            ring.publish()
            done = 0
            while chains := queue.pop():
                queue.complete(b"".join(ending(chain.token, 0, 0) for chain in chains))
                done += len(chains)
            assert done == len(ring.get_used()) == 32768
        queue.stop()
        core.unmap(0, 4 << 20)
        queue.close()
        core.close()


def test_a_zeroed_ring_has_nothing_available(rig: Rig) -> None:
    """RING-PACKED-008: and looks as if no driver had ever written to it."""
    assert rig.queue.pop() == []
    assert rig.queue.looks_unshared
    rig.request()
    assert len(rig.serve()) == 1
    assert not rig.queue.looks_unshared


@pytest.mark.parametrize("size", [1, 7, 256])
def test_areas_have_the_lengths_of_the_specification(size: int) -> None:
    """RING-PACKED-001: 16 bytes a slot and two structures of four, up to the last byte of guest memory."""
    layout = tuple(Range(16 * PAGE * (1 + 3 * i), 8 * PAGE) for i in range(4))
    with Rig(layout=layout, life=packed(size), start=False) as rig:
        ends = [piece.iova + piece.size for piece in layout[1:]]
        areas = {"desc": ends[0] - 16 * size, "driver": ends[1] - 4, "device": ends[2] - 4}
        rig.start(**areas)
        for area, step in (("desc", 16), ("driver", 4), ("device", 4)):
            rig.queue.stop()
            with pytest.raises(OSError, match="No such file") as caught:
                rig.start(**{**areas, area: areas[area] + step})
            assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(("area", "by"), [("desc", 8), ("driver", 2), ("device", 2), ("driver", 1), ("device", 1)])
def test_misaligned_areas_do_not_start(rig: Rig, area: str, by: int) -> None:
    """HOSTILE-060: refused before anything is read."""
    rig.queue.stop()
    areas = {"desc": rig.ring.desc, "driver": rig.ring.avail, "device": rig.ring.used}
    with pytest.raises(OSError, match="queue 0") as caught:
        rig.start(**{area: areas[area] + by})
    assert caught.value.errno == errno.EPROTO


@pytest.mark.parametrize("size", [0, 1025, 32769])
def test_an_impossible_size_does_not_start(rig: Rig, size: int) -> None:
    """HOSTILE-063, -064: nor does 0, nor more than the core was made for."""
    rig.queue.stop()
    with pytest.raises(OSError, match="Invalid argument"):
        rig.start(size=size)


def test_a_ring_that_cannot_be_written_does_not_start() -> None:
    """HOSTILE-025: used descriptors go into the ring itself."""
    layout = (Range(0, 32 * PAGE), Range(64 * PAGE, PAGE))
    with Rig(layout=layout, life=packed(), start=False) as rig:
        with rig.quiesced():
            rig.unmap(layout[1])
            rig.map(layout[1], prot=1)
        with pytest.raises(OSError, match="queue 0") as caught:
            rig.start(desc=64 * PAGE)
        assert caught.value.errno == errno.EPROTO
        rig.start(driver=64 * PAGE)  # the device only reads this one (RING-PACKED-029)
        assert rig.queue.pop() == []


def test_a_ring_over_two_regions_is_served() -> None:
    """Slots on both sides of a seam of guest memory, round and round."""
    with Rig(pieces=TWO_REGIONS, life=packed(ODD), start=False) as rig:
        rig.start(desc=SEAM - 48)
        status = rig.put(b"\xee")
        for position in range(5 * ODD):
            marks = AVAIL if position % (2 * ODD) < ODD else USED
            where = SEAM - 48 + 16 * (position % ODD)
            raw = status.to_bytes(8, "little") + (1).to_bytes(4, "little") + position.to_bytes(2, "little")
            rig.memory.write(where, raw + (WRITE | marks).to_bytes(2, "little"))
            rig.complete(rig.pop_one())
            assert rig.memory.read(where + 8, 6) == b"\1\0\0\0" + position.to_bytes(2, "little")


# ---- lists


def test_lists_of_different_length_complete_in_any_order(rig: Rig) -> None:
    """RING-PACKED-009, -010, -021: taken in ring order, given back as they end, each skipping its own length."""
    one, three = rig.offer(rig.writable(1)), rig.offer(rig.readable(HEADER), rig.writable(8), rig.writable(1))
    two = rig.offer(rig.readable(HEADER), rig.writable(1))
    chains = rig.queue.pop()
    assert [chain.writable for chain in chains] == [0, 8, 0]
    rig.complete(chains[1], written=8)
    assert slot(rig, 0)[1:3] == (9, three)
    rig.complete(chains[2])
    assert slot(rig, 3)[1:3] == (1, two)
    rig.complete(chains[0])
    assert slot(rig, 5)[1:3] == (1, one)
    assert rig.ring.get_used() == [(three, 9), (two, 1), (one, 1)]


def test_the_buffer_id_is_that_of_the_last_descriptor(rig: Rig) -> None:
    """RING-PACKED-020."""
    header, status = rig.plain()
    rig.offer_raw(header._replace(next=5), status._replace(next=3))
    rig.complete(rig.pop_one())
    assert slot(rig, 0)[2] == 3


@pytest.mark.parametrize("name", [ODD, 0x1234, 0xFFFF])
def test_any_buffer_id_is_echoed(rig: Rig, name: int) -> None:
    """HOSTILE-051: beyond the ring's size, and twice in flight; the device does not look anything up with it."""
    status = rig.writable(1)
    for _ in range(2):
        rig.ring.add_raw([Descriptor(status.iova, 1, WRITE)], name)
    rig.ring.publish()
    first, second = rig.queue.pop()
    assert first.token != second.token
    rig.complete(second, first)
    assert rig.ring.get_used() == [(name, 1), (name, 1)]


@pytest.mark.parametrize(("room", "written", "flag"), [(0, 0, WRITE), (512, 512, WRITE), (512, 0, 0)])
def test_write_says_whether_anything_was_written(rig: Rig, room: int, written: int, flag: int) -> None:
    """RING-PACKED-022, -024, -025: with the length, and no other flag of the driver's."""
    rig.request(b"x", room=room)
    rig.complete(rig.pop_one(), written=written)
    assert slot(rig, 0)[3] == AVAIL | USED | flag


def test_a_list_may_be_as_long_as_the_queue(rig: Rig) -> None:
    """RING-PACKED-017, -019: in order, and with nothing else in flight."""
    given = rig.offer(*[rig.readable(bytes([n])) for n in range(6)], rig.writable(1))
    chain = rig.pop_one()
    assert chain.header == bytes(range(6))
    rig.complete(chain)
    assert rig.ring.get_used() == [(given, 1)]


def test_only_used_descriptors_and_the_event_structure_are_written(rig: Rig) -> None:
    """RING-PACKED-013, -016, -029: neither the driver's structure nor a list's other slots, and what is used stays."""
    rig.request(b"x" * 512)
    before = rig.memory.read(rig.ring.desc + 16, 16 * (ODD - 1)), rig.memory.read(rig.ring.avail, 4)
    rig.serve()
    assert (rig.memory.read(rig.ring.desc + 16, 16 * (ODD - 1)), rig.memory.read(rig.ring.avail, 4)) == before
    used = slot(rig, 0)
    rig.request()
    rig.serve()
    assert slot(rig, 0) == used


def test_descriptors_are_looked_at_without_a_doorbell(rig: Rig) -> None:
    """RING-PACKED-012, -015, -028: a slot counts once its flags say so, not before, and only the next one does."""
    status = rig.writable(1)
    rig.ring.write_descriptor(1, Descriptor(status.iova, 1, WRITE | AVAIL))
    assert rig.queue.pop() == []
    rig.ring.write_descriptor(0, Descriptor(status.iova, 1, WRITE))
    assert rig.queue.pop() == []
    rig.ring.write_descriptor(0, Descriptor(status.iova, 1, WRITE | AVAIL))
    assert len(rig.queue.pop()) == 2


@pytest.mark.parametrize("marks", [0, USED, AVAIL | USED])
def test_marks_of_another_lap_are_not_available(rig: Rig, marks: int) -> None:
    """HOSTILE-052, RING-PACKED-006: on the first lap only AVAIL without USED counts."""
    rig.ring.write_descriptor(0, Descriptor(rig.put(b"\xee"), 1, WRITE | marks))
    assert rig.queue.pop() == []


# ---- indirect


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])
@pytest.mark.parametrize("noise", [0, NEXT, INDIRECT, NEXT | INDIRECT | AVAIL | USED])
def test_a_table_is_read_in_sequence_and_only_write_counts(rig: Rig, flags: int, noise: int) -> None:
    """RING-INDIRECT-007, -008, -009, HOSTILE-054: one entry after the other, whatever flags and ids say."""
    data, status = rig.readable(b"data"), rig.writable(1)
    table = rig.table(
        Descriptor(rig.put(HEADER), 16, noise, 0xFFFF),
        Descriptor(data.iova, 4, noise, 0),
        Descriptor(status.iova, 1, WRITE | noise, 7),
    )
    given = rig.offer_raw(Descriptor(table, 48, flags))
    chain = rig.pop_one()
    assert (chain.header, b"".join(chain.views_in), chain.writable) == (HEADER, b"data", 0)
    rig.complete(chain)
    assert rig.ring.get_used() == [(given, 1)]


def test_direct_and_indirect_lists_alternate(rig: Rig) -> None:
    """RING-INDIRECT-010, -011: a list in a table takes one slot, whatever its length."""
    for n in range(3 * ODD):
        parts = (rig.readable(HEADER), rig.writable(1))
        position = rig.ring.avail_position
        table = rig.memory.alloc(32) if n % 2 else None
        given = rig.offer(*parts, table=table)
        assert rig.serve() == [(given, 1)]
        assert rig.ring.used_position == (position + (1 if n % 2 else 2)) % (2 * ODD)


@pytest.mark.parametrize(("size", "entries", "sound"), [(7, 1024, True), (7, 1025, False), (7, 0x0FFF_FFFF, False)])
def test_tables_are_long_up_to_a_limit(size: int, entries: int, sound: bool) -> None:
    """HOSTILE-007, RING-PACKED-018: memory and time are bounded."""
    with Rig(life=packed(size)) as rig:
        rig.offer_raw(Descriptor(rig.put(bytes(16 * min(entries, 1025))), 16 * entries, INDIRECT))
        if sound:
            assert not rig.pop_one().answerable
        else:
            with pytest.raises(CorruptRing):
                rig.queue.pop()


# ---- hostility


def not_available(rig: Rig) -> None:
    """A list whose second descriptor is not there yet."""
    header, status = rig.plain()
    rig.ring.add_raw([header, status])
    rig.ring.write_descriptor(1, status)
    rig.ring.publish()


def endless(rig: Rig) -> None:
    """Every slot goes on, on this lap and, as it seems, on the next."""
    header, _ = rig.plain()
    for index in range(ODD):
        rig.ring.write_descriptor(index, header._replace(flags=NEXT | AVAIL))


def longer_than_what_is_free(rig: Rig) -> None:
    """A list that would be whole, but for going on into slots of what is in flight, made available again."""
    header, _ = rig.plain()
    assert len([rig.offer(*[rig.readable(b"x")] * 4), *rig.queue.pop()]) == 2
    for index in range(4):
        rig.ring.write_descriptor(index, header._replace(flags=USED | (NEXT if index < 3 else 0)))
    for index in range(4, ODD):
        rig.ring.write_descriptor(index, header._replace(flags=NEXT | AVAIL))


def raw(*build: Callable[[Rig], Descriptor]) -> Callable[[Rig], None]:
    """A list of descriptors."""

    def corrupt(rig: Rig) -> None:
        rig.offer_raw(*[each(rig) for each in build])

    return corrupt


BROKEN: dict[str, Callable[[Rig], None]] = {
    "HOSTILE-049 endless": endless,
    "HOSTILE-050 not available": not_available,
    "HOSTILE-061 longer than what is free": longer_than_what_is_free,
    "HOSTILE-009 readable after writable": raw(
        lambda rig: rig.plain()[1]._replace(flags=WRITE | NEXT), lambda rig: rig.plain()[0]._replace(flags=0)
    ),
    "HOSTILE-009 readable after writable in a table": raw(
        lambda rig: Descriptor(rig.table(*reversed(rig.plain())), 32, INDIRECT)
    ),
    "HOSTILE-053 a table with next": raw(
        lambda rig: Descriptor(rig.table(*rig.plain()), 32, INDIRECT | NEXT), lambda rig: rig.plain()[1]
    ),
    "HOSTILE-053 a table after next": raw(
        lambda rig: rig.plain()[0], lambda rig: Descriptor(rig.table(rig.plain()[1]), 16, INDIRECT)
    ),
    "HOSTILE-055 an empty table": raw(lambda rig: Descriptor(rig.table(*rig.plain()), 0, INDIRECT)),
    "HOSTILE-055 a table of 17 bytes": raw(lambda rig: Descriptor(rig.table(*rig.plain()), 17, INDIRECT)),
    "HOSTILE-055 a table of 15 bytes": raw(lambda rig: Descriptor(rig.table(*rig.plain()), 15, INDIRECT)),
    "HOSTILE-018 a table outside": raw(lambda _: Descriptor(OUTSIDE, 32, INDIRECT)),
    "HOSTILE-018 a table that wraps": raw(lambda _: Descriptor((1 << 64) - 16, 32, INDIRECT)),
}


@pytest.mark.parametrize("corrupt", BROKEN.values(), ids=BROKEN.keys())
def test_a_list_that_breaks_a_rule_corrupts_the_ring(rig: Rig, corrupt: Callable[[Rig], None]) -> None:
    """HOSTILE-009, -018, -049, -050, -053, -055, -061: nothing is handed out, and only a reset repairs the ring."""
    corrupt(rig)
    in_flight = rig.queue.busy
    for _ in range(2):
        with pytest.raises(CorruptRing):
            rig.queue.pop()
    assert rig.queue.busy == in_flight


def test_indirect_without_the_feature_corrupts_the_ring() -> None:
    """HOSTILE-013, RING-INDIRECT-012: the table is not followed."""
    with Rig(life=packed(indirect=False)) as rig:
        rig.offer_raw(Descriptor(rig.table(*rig.plain()), 32, INDIRECT))
        with pytest.raises(CorruptRing):
            rig.queue.pop()


def test_a_corrupt_ring_is_whole_after_a_restart(rig: Rig) -> None:
    """HOSTILE-049: full service again, from slot 0 and wrap counter 1."""
    rig.request()
    rig.serve()
    rig.offer_raw(Descriptor(OUTSIDE, 32, INDIRECT))
    with pytest.raises(CorruptRing):
        rig.queue.pop()
    rig.restart()
    given = rig.request()
    assert rig.serve() == [(given, 1)]
    assert slot(rig, 0)[3] == AVAIL | USED | WRITE


def test_a_descriptor_that_is_rewritten_changes_nothing_that_was_taken(rig: Rig) -> None:
    """HOSTILE-059, RING-PACKED-014: neither where the status goes, nor the id, nor how many slots are skipped."""
    trap, given = rig.put(b"\xaa" * 64), rig.request(room=8)
    chain = rig.pop_one()
    for index in range(3):
        rig.ring.write_descriptor(index, Descriptor(trap, 64, WRITE | AVAIL, 99))
    rig.complete(chain, written=8)
    assert slot(rig, 0)[1:3] == (9, given)
    assert rig.memory.read(trap, 64) == b"\xaa" * 64
    assert rig.ring.get_used() == [(given, 9)]
    assert rig.ring.used_position == 3


def test_more_in_flight_than_the_queue_is_long_corrupts_it(rig: Rig) -> None:
    """HOSTILE-034, HOSTILE-061: slots made available again before they were used."""
    status = rig.writable(1)
    for index in range(ODD):
        rig.ring.write_descriptor(index, Descriptor(status.iova, 1, WRITE | AVAIL))
    assert len(rig.queue.pop()) == ODD
    assert rig.queue.pop() == []
    rig.ring.write_descriptor(0, Descriptor(status.iova, 1, WRITE | USED))
    with pytest.raises(CorruptRing):
        rig.queue.pop()


def test_chains_before_the_fault_are_handed_out(rig: Rig) -> None:
    """HOSTILE-055: the sound ones come first, and the fault is told without a doorbell."""
    rig.request()
    rig.offer_raw(Descriptor(OUTSIDE, 32, INDIRECT))
    rig.queue.clear_kick()
    chains = rig.queue.pop()
    assert len(chains) == 1
    assert rig.kicked()
    with pytest.raises(CorruptRing):
        rig.queue.pop()
    rig.complete(*chains)
    assert rig.queue.busy == 0


@pytest.mark.parametrize("flags", [8, 0x10, 0x0F78 & ~DescFlag.INDIRECT])
def test_undefined_descriptor_flags_are_ignored(rig: Rig, flags: int) -> None:
    """HOSTILE-012."""
    header, status = rig.plain()
    flags &= ~(AVAIL | USED)
    given = rig.offer_raw(header._replace(flags=NEXT | flags), status._replace(flags=WRITE | flags))
    assert rig.serve() == [(given, 1)]


# ---- suppression: interrupts


def interrupts(rig: Rig, count: int) -> int:
    """Serve so many requests of one slot in one batch; how many interrupts that made."""
    status = rig.writable(1)
    for _ in range(count):
        rig.ring.add((status,))
    rig.ring.publish()
    rig.vectors.clear()
    rig.complete(*rig.queue.pop())
    assert len(rig.ring.get_used()) == count
    return len(rig.vectors)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize(("flags", "sent"), [(ENABLE, 1), (DISABLE, 0), (RESERVED, 1), (DISABLE | 0xFFFC, 0)])
def test_flags_decide_about_an_interrupt(event_idx: bool, flags: int, sent: int) -> None:
    """RING-EVENT-017, -019, -020, HOSTILE-056: one for a batch, or none; the reserved value enables."""
    with Rig(life=packed(event_idx=event_idx)) as rig:
        rig.ring.set_driver_event(flags, event(16, 9))
        assert interrupts(rig, 3) == sent


@pytest.mark.parametrize("before", range(2 * ODD))
@pytest.mark.parametrize("batch", [1, 2, ODD])
def test_an_event_decides_about_a_batch(before: int, batch: int) -> None:
    """RING-EVENT-018: due exactly if the batch uses the slot named, on the lap named, wherever the batch begins."""
    for ahead in range(2 * ODD):
        with Rig(life=packed(ODD, event_idx=True)) as rig:
            for _ in range(before):
                interrupts(rig, 1)
            rig.ring.set_driver_event(DESC, event(ODD, before + ahead))
            assert interrupts(rig, batch) == (ahead < batch), (before, batch, ahead)


def test_an_event_inside_a_list_is_passed_with_it() -> None:
    """RING-EVENT-018: a list uses all its slots at once."""
    with Rig(life=packed(ODD, event_idx=True)) as rig:
        rig.ring.set_driver_event(DESC, event(ODD, 2))
        rig.offer(*[rig.readable(b"x")] * 3, rig.writable(1))
        rig.serve()
        assert rig.vectors == [0]


def test_an_event_without_the_feature_enables(rig: Rig) -> None:
    """HOSTILE-057."""
    rig.ring.set_driver_event(DESC, event(ODD, 5))
    assert interrupts(rig, 1) == 1


@pytest.mark.parametrize("offset", [ODD, ODD + 1, 0x7FFF])
@pytest.mark.parametrize("wrap", [0, 0x8000])
def test_an_event_beyond_the_ring_loses_no_interrupt(offset: int, wrap: int) -> None:
    """HOSTILE-058: at worst one too many."""
    with Rig(life=packed(ODD, event_idx=True)) as rig:
        rig.ring.set_driver_event(DESC, offset | wrap)
        assert interrupts(rig, 2) == 1


# ---- suppression: doorbells


@pytest.mark.parametrize("event_idx", [False, True])
def test_doorbells_are_off_while_a_batch_waits_and_on_when_the_ring_is_dry(event_idx: bool) -> None:
    """RING-EVENT-021, -022, -023: disabled, then enabled, or with the event index asked for at the next slot."""
    with Rig(life=packed(100, event_idx=event_idx)) as rig:
        status = rig.writable(1)
        total = 0
        for _ in range(5):
            for _ in range(65):
                rig.ring.add((status,))
            rig.ring.publish()
            first = rig.queue.pop()
            assert rig.ring.device_event == (DISABLE, 0)
            assert not rig.ring.need_kick()
            rig.complete(*first, *rig.queue.pop())
            total += len(rig.ring.get_used())
            assert rig.ring.device_event == ((DESC, event(100, total)) if event_idx else (ENABLE, 0))
            rig.ring.add((status,))
            rig.ring.publish()
            assert rig.ring.need_kick()
            total += len(rig.serve())
        assert total == 5 * 66


def test_old_content_of_the_event_structure_does_not_matter(rig: Rig) -> None:
    """HOSTILE-046: what the driver left there is overwritten at the start."""
    rig.queue.stop()
    rig.memory.write(rig.ring.used, b"\xff" * 4)
    rig.start()
    assert rig.ring.device_event == (ENABLE, 0)
