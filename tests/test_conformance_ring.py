"""Rules of the rings, with every byte of them written and read by the test itself."""

from __future__ import annotations

import struct

import pytest
from rings import HEADER, NEXT, WRITE, Life, Rig

SIZE = 4


def test_a_split_ring_laid_out_by_hand() -> None:
    """RING-SPLIT-003, 010, 017, 018, 022: little-endian fields, slots modulo the size, head and length in used."""
    with Rig(life=Life(size=SIZE)) as rig:
        desc, avail, used = rig.ring.desc, rig.ring.avail, rig.ring.used
        buffer = rig.put(bytes(0x2345))
        rig.memory.write(desc + 16 * 3, struct.pack("<QIHH", rig.put(HEADER), 16, NEXT, 1))
        rig.memory.write(desc + 16 * 1, struct.pack("<QIHH", buffer, 0x2345, WRITE, 0x5555))
        for count in range(1, 3 * SIZE):
            rig.memory.write(avail + 4 + 2 * ((count - 1) % SIZE), struct.pack("<H", 3))
            rig.memory.write(avail, struct.pack("<HH", 0, count))
            chain = rig.pop_one()
            assert (chain.header, chain.readable, chain.writable) == (HEADER, 0, 0x2344)
            rig.complete(chain, written=0x2344 - count)
            del chain
            assert struct.unpack("<H", rig.memory.read(used + 2, 2)) == (count,)
            slot = rig.memory.read(used + 4 + 8 * ((count - 1) % SIZE), 8)
            assert struct.unpack("<II", slot) == (3, 0x2344 - count)


@pytest.mark.parametrize("event_idx", [False, True])
def test_event_words_are_where_they_belong(event_idx: bool) -> None:
    """RING-EVENT-009, 012, 013, 015: behind the entries of the other ring; with them the used flags stay 0."""
    with Rig(life=Life(size=SIZE, event_idx=event_idx)) as rig:
        assert rig.queue.pop() == []
        for count in range(1, 3 * SIZE):
            rig.request()
            rig.serve()
            assert rig.memory.read(rig.ring.used, 2) == bytes(2)
            (avail_event,) = struct.unpack("<H", rig.memory.read(rig.ring.used + 4 + 8 * SIZE, 2))
            assert avail_event == (count if event_idx else 0)
