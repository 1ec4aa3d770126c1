"""The device's side of a virtqueue against the driver's, in one process: framing, rings, suppression, hostility.

What only packed rings have is in test_ring_packed.py.  Rows are those of the conformance list (RING-*, HOSTILE-*).
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, NamedTuple

import pytest
from rings import (
    CORE_QUEUE_SIZE,
    HEADER,
    INDIRECT,
    NEXT,
    PAGE,
    WRITE,
    Descriptor,
    Life,
    Range,
    Rig,
    Segment,
    rang,
)

from vmmblk.memory import Core, Pause, Region
from vmmblk.ring import PLAIN_READ, CorruptRing, Queue, UnreachableRing, ending, endings
from vmmblk.spec import NO_VECTOR, REQUEST_HEADER, IsrStatus

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TWO_REGIONS = (Range(0, 64 * PAGE), Range(64 * PAGE, 64 * PAGE))
SEAM = 64 * PAGE
TOP = 1 << 64
OUTSIDE = 0xFEB0_0000  # where a BAR could be
MEGABYTE = 1 << 20
IOERR = 1


@pytest.fixture
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    """Sixteen descriptors, flags for suppression, indirect allowed; a split ring, or what ``both`` says."""
    with Rig(life=getattr(request, "param", Life())) as made:
        yield made


both = pytest.mark.parametrize("rig", [Life(), Life(packed=True)], ids=["split", "packed"], indirect=True)
"""The test holds for either format of ring."""


@pytest.fixture
def event_rig() -> Iterator[Rig]:
    """The same with the event index."""
    with Rig(life=Life(event_idx=True)) as made:
        yield made


def joined(views: list[memoryview]) -> bytes:
    """What the views hold."""
    return b"".join(views)


def fill(views: list[memoryview], data: bytes) -> None:
    """Write into the views one after the other."""
    for view in views:
        view[:], data = data[: len(view)], data[len(view) :]


# ---- framing


def cut(data: bytes, at: int) -> list[bytes]:
    """Two pieces, or one if the cut is at an end."""
    return [piece for piece in (data[:at], data[at:]) if piece]


@both
def test_readable_bytes_may_be_cut_anywhere(rig: Rig) -> None:
    """RING-SPLIT-004, HOSTILE-142: the first 16 readable bytes are the header however they are cut."""
    told = HEADER + bytes(range(100, 140))
    for at in range(len(told) + 1):
        head = rig.offer(*[rig.readable(piece) for piece in cut(told, at)], rig.writable(1))
        chain = rig.pop_one()
        assert (chain.header, joined(chain.views_in)) == (told[:16], told[16:])
        assert (chain.readable, chain.writable, chain.views_out) == (40, 0, [])
        rig.complete(chain)
        assert rig.ring.get_used() == [(head, 1)]


@both
def test_writable_bytes_may_be_cut_anywhere(rig: Rig) -> None:
    """RING-SPLIT-004, HOSTILE-143: the last writable byte is the status however the rest is cut."""
    told = bytes(range(100, 140))
    for at in range(len(told) + 2):
        parts = [rig.writable(len(piece)) for piece in cut(told + b"s", at)]
        head = rig.offer(rig.readable(HEADER), *parts)
        chain = rig.pop_one()
        fill(chain.views_out, told)
        assert (chain.writable, sum(map(len, chain.views_out))) == (40, 40)
        rig.complete(chain, status=7, written=40)
        assert b"".join(rig.memory.read(part.iova, part.length) for part in parts) == told + b"\x07"
        assert rig.ring.get_used() == [(head, 41)]


@both
def test_neighbouring_elements_are_one_view(rig: Rig) -> None:
    """Elements that touch in memory reach the disk as one buffer."""
    base = rig.put(bytes(1024))
    parts = [Segment(base, 512, writable=False), Segment(base + 512, 512, writable=False)]
    rig.offer(rig.readable(HEADER), *parts, rig.writable(1))
    assert [len(view) for view in rig.pop_one().views_in] == [1024]


@both
def test_a_header_is_never_joined_with_readable_neighbours_of_the_writable_part(rig: Rig) -> None:
    """Readable and writable elements that touch stay apart."""
    base = rig.put(bytes(64))
    parts = [Segment(base, 32, writable=False), Segment(base + 32, 32, writable=True)]
    rig.offer(rig.readable(HEADER), *parts, rig.writable(1))
    chain = rig.pop_one()
    assert [len(view) for view in chain.views_in] == [len(view) for view in chain.views_out] == [32]


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_an_element_over_two_regions_is_served(order: str) -> None:
    """HOSTILE-023: what straddles adjacent regions is both regions' bytes, whichever was mapped first."""
    with Rig(pieces=TWO_REGIONS) as rig:
        if order == "descending":
            with rig.quiesced():
                rig.unmap(TWO_REGIONS[0])
                rig.map(TWO_REGIONS[0])
        rig.memory.write(SEAM - 10, b"0123456789")
        rig.memory.write(SEAM, b"abcdefghij")
        rig.offer(
            rig.readable(HEADER),
            Segment(SEAM - 10, 20, writable=False),
            Segment(SEAM - 5, 10, writable=True),
            rig.writable(1),
        )
        chain = rig.pop_one()
        assert joined(chain.views_in) == b"0123456789abcdefghij"
        fill(chain.views_out, b"ABCDEFGHIJ")
        rig.complete(chain, written=10)
        assert rig.memory.read(SEAM - 5, 5) + rig.memory.read(SEAM, 5) == b"ABCDEFGHIJ"


def test_a_header_over_two_regions_is_read(rig: Rig) -> None:
    """HOSTILE-023 for the header and the status byte."""
    with Rig(pieces=TWO_REGIONS) as two:
        two.memory.write(SEAM - 7, HEADER[:7])
        two.memory.write(SEAM, HEADER[7:])
        two.offer(Segment(SEAM - 7, 16, writable=False), Segment(SEAM - 1 - 512, 513, writable=True))
        chain = two.pop_one()
        assert (chain.header, chain.writable, chain.reachable) == (HEADER, 512, True)


@both
def test_a_short_header_is_what_there_is(rig: Rig) -> None:
    """HOSTILE-140: fewer than 16 readable bytes are handed on as they are."""
    rig.offer(rig.readable(HEADER[:5]), rig.writable(1))
    assert rig.pop_one().header == HEADER[:5]


@both
def test_the_header_is_copied_once(rig: Rig) -> None:
    """HOSTILE-028: a header changed after the pop changes nothing."""
    header = rig.readable(HEADER)
    rig.offer(header, rig.writable(1))
    chain = rig.pop_one()
    rig.memory.write(header.iova, bytes(16))
    assert chain.header == HEADER


@both
def test_descriptors_are_copied_once(rig: Rig) -> None:
    """HOSTILE-026: descriptors changed after the pop change neither the data nor where the status goes."""
    data, status, trap = rig.writable(512), rig.writable(1), rig.put(b"\xaa" * PAGE)
    head = rig.offer(rig.readable(HEADER), data, status)
    chain = rig.pop_one()
    for slot in range(3):
        rig.ring.write_descriptor(slot, Descriptor(trap, PAGE, WRITE))
    fill(chain.views_out, b"x" * 512)
    rig.complete(chain, written=512)
    assert rig.memory.read(trap, PAGE) == b"\xaa" * PAGE
    assert rig.memory.read(data.iova, 512) == b"x" * 512
    assert rig.memory.read(status.iova, 1) == b"\0"
    assert rig.ring.get_used() == [(head, 513)]


@both
def test_an_indirect_table_is_read_once(rig: Rig) -> None:
    """HOSTILE-027: a table changed after the pop changes nothing."""
    data, table, trap = rig.writable(512), rig.put(bytes(48)), rig.put(b"\xaa" * PAGE)
    rig.offer(rig.readable(HEADER), data, rig.writable(1), table=table)
    chain = rig.pop_one()
    rig.memory.write(table, rig.memory.read(rig.table(*[Descriptor(trap, PAGE, WRITE)] * 3), 48))
    fill(chain.views_out, b"x" * 512)
    rig.complete(chain, written=512)
    assert rig.memory.read(trap, PAGE) == b"\xaa" * PAGE


@both
def test_device_readable_data_cannot_be_written_through_its_view(rig: Rig) -> None:
    """RING-SPLIT-006: a view of readable elements refuses stores."""
    rig.request(b"data" * 128)
    with pytest.raises(TypeError):
        rig.pop_one().views_in[0][0] = 1


# ---- plain requests

TERMS = {"sector_size": 512, "sectors": 16, "alignment": 1, "writable": True}
READ, OUT = 0, 1


def asked(rig: Rig, kind: int, sector: int, length: int, **terms: object) -> tuple[int, int, int] | None:
    """Sector, start and end of a request in one piece that the disk can be given as it is, or None."""
    rig.queue.set_terms(**{**TERMS, **terms})  # type: ignore[arg-type]
    data = rig.put(bytes(length), align=4096)
    header = rig.readable(REQUEST_HEADER.pack(kind, 0, sector))
    rig.offer(header, Segment(data, length, writable=kind == READ), rig.writable(1))
    plain, others = rig.queue.plain(rig.queue.take())
    rig.queue.complete(b"".join(ending(token, 0, 0) for token in rig.queue.tokens(1)))
    assert len(plain) + len(others) == 1
    if not plain:
        return None
    [(_, told, alias, written, first, start, end)] = plain
    assert (told == PLAIN_READ, written) == (kind == READ, length if kind == READ else 0)
    assert (alias, start, end) == (1, data, data + length)
    return first, start - data, end - data


@both
@pytest.mark.parametrize("kind", [READ, OUT])
def test_whole_sectors_inside_the_disk_are_plain(rig: Rig, kind: int) -> None:
    """They can be given to the disk as they are, up to its last sector, in sectors of its own."""
    assert asked(rig, kind, 0, 512) == (0, 0, 512)
    assert asked(rig, kind, 15, 512) == (15, 0, 512)
    assert asked(rig, kind, 0, 16 * 512) == (0, 0, 16 * 512)
    assert asked(rig, kind, 24, 4096, sector_size=4096, sectors=4) == (3, 0, 4096)
    assert asked(rig, kind, 0, 4096, alignment=4096) == (0, 0, 4096)


@both
@pytest.mark.parametrize("kind", [READ, OUT])
@pytest.mark.parametrize(
    ("sector", "length", "terms"),
    [
        (16, 512, {}),
        (15, 1024, {}),
        (0, 17 * 512, {}),
        (TOP - 1, 512, {}),
        (TOP - 1, 1024, {"sectors": TOP - 1}),
        (TOP // 512, 512, {}),
        (0, 511, {}),
        (0, 513, {}),
        (1, 4096, {"sector_size": 4096}),
        (0, 512, {"sector_size": 4096}),
        (128, 4096, {"sector_size": 4096}),
        (0, 512, {"alignment": 1024}),
        (0, 512, {"sectors": 0}),
    ],
)
def test_what_the_disk_might_not_take_is_not_plain(
    rig: Rig, kind: int, sector: int, length: int, terms: dict[str, int]
) -> None:
    """Past the end (however large the sum), not whole sectors, badly aligned: those are looked at again."""
    assert asked(rig, kind, sector, length, **terms) is None


def test_no_write_to_a_read_only_disk_is_plain(rig: Rig) -> None:
    """And a read of one is."""
    assert asked(rig, OUT, 0, 512, writable=False) is None
    assert asked(rig, READ, 0, 512, writable=False) == (0, 0, 512)


def test_badly_aligned_memory_is_not_plain(rig: Rig) -> None:
    """However well aligned its length is."""
    rig.queue.set_terms(sector_size=512, sectors=16, alignment=512, writable=True)
    data = rig.put(bytes(1024), align=4096)
    for offset in (0, 8):
        rig.offer(rig.readable(bytes(16)), Segment(data + offset, 512, writable=True), rig.writable(1))
    plain, others = rig.queue.plain(rig.queue.take())
    assert ([record[5] - data for record in plain], others) == ([0], [1])


def test_what_is_laid_out_otherwise_is_not_plain(rig: Rig) -> None:
    """Another type, half a header, data in pieces or on the wrong side, none, no status: those are looked at again."""
    rig.queue.set_terms(sector_size=512, sectors=16, alignment=1, writable=True)
    read, write = (rig.readable(REQUEST_HEADER.pack(kind, 0, 0)) for kind in (READ, OUT))
    data_in, data_out = rig.readable(bytes(512)), rig.writable(512)
    status = rig.writable(1)
    shapes = [
        [rig.readable(REQUEST_HEADER.pack(4, 0, 0)), data_in, status],
        [rig.readable(bytes(15)), data_out, status],
        [write, data_in, rig.readable(bytes(512)), status],
        [read, data_in, status],
        [write, data_out, status],
        [write, data_in, data_out, status],
        [read, status],
        [write, data_in],
        [write, Segment(OUTSIDE, 512, writable=False), status],
        [read, data_out, status],
    ]
    rig.life = rig.life._replace(size=64)
    rig.restart()
    for shape in shapes:
        rig.offer(*shape)
    plain, others = rig.queue.plain(rig.queue.take())
    assert (len(plain), others) == (1, list(range(len(shapes) - 1)))
    assert list(endings(rig.queue.good(1))) == [(plain[0][0], 0, 512)], "how it ends if all goes well"


# ---- the areas


@pytest.mark.parametrize("size", [1, 2, 8, 256, 1024])
def test_areas_have_the_lengths_of_the_specification(size: int) -> None:
    """RING-SPLIT-001, RING-EVENT-009: rings whose areas end where guest memory ends are served, event words too."""
    lengths = (16 * size, 6 + 2 * size, 6 + 8 * size)
    gap = 16 * PAGE
    layout = tuple(Range(gap * (1 + 3 * i), 8 * PAGE) for i in range(4))
    with Rig(layout=layout, life=Life(size=size, event_idx=True), start=False) as rig:
        ends = [
            (piece.iova + piece.size - length) & ~(align - 1)
            for piece, length, align in zip(layout[1:], lengths, (16, 4, 4), strict=True)
        ]
        rig.start(desc=ends[0], driver=ends[1], device=ends[2])
        rig.memory.write(ends[0], bytes(lengths[0]))
        rig.memory.write(ends[1], b"\0\0\1\0")
        assert rig.queue.pop()[0].header == b""
        beyond = ends[0] + (16 if lengths[0] % PAGE == 0 else PAGE)
        rig.queue.stop()
        with pytest.raises(OSError, match="No such file") as caught:
            rig.start(desc=beyond, driver=ends[1], device=ends[2])
        assert caught.value.errno == errno.ENOENT


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"size": 0}, errno.EINVAL),
        ({"size": 3}, errno.EINVAL),
        ({"size": 2 * CORE_QUEUE_SIZE}, errno.EINVAL),
        ({"size": 0x1_0000_0010}, None),
        ({"desc": PAGE + 8}, errno.EPROTO),
        ({"driver": PAGE + 1}, errno.EPROTO),
        ({"device": PAGE + 2}, errno.EPROTO),
        ({"desc": OUTSIDE}, errno.ENOENT),
        ({"driver": OUTSIDE}, errno.ENOENT),
        ({"device": OUTSIDE}, errno.ENOENT),
        ({"device": MEGABYTE - 16}, errno.ENOENT),
        ({"desc": TOP - 16}, errno.EPROTO),
        ({"driver": TOP - 2}, errno.EPROTO),
        ({"device": TOP - 4}, errno.EPROTO),
    ],
)
def test_an_impossible_queue_does_not_start(rig: Rig, change: dict[str, int], error: int | None) -> None:
    """RING-SPLIT-002, HOSTILE-040, -041, -042: bad sizes, misaligned, absent and wrapping areas are refused."""
    rig.queue.stop()
    if error is None:
        with pytest.raises(OverflowError):
            rig.start(**change)
        return
    with pytest.raises(OSError, match="queue 0") as caught:
        rig.start(**change)
    assert caught.value.errno == error
    assert rig.queue.pop() == []


@both
def test_a_running_queue_cannot_be_started(rig: Rig) -> None:
    """Starting twice is refused and changes nothing."""
    rig.request()
    with pytest.raises(OSError, match="Invalid argument"):
        rig.start()
    assert len(rig.serve()) == 1


def test_areas_over_two_regions_are_served() -> None:
    """A ring whose areas lie over a seam of guest memory works like any other, round and round."""
    life = Life(size=256, event_idx=True)
    with Rig(pieces=TWO_REGIONS, life=life, start=False) as rig:
        for area, length in (("desc", 16 * 256), ("avail", 6 + 512), ("used", 6 + 2048)):
            whole = SEAM - (length // 2 & ~15)
            rig.queue.stop()
            moved = {"desc": rig.ring.desc, "driver": rig.ring.avail, "device": rig.ring.used}
            moved[{"desc": "desc", "avail": "driver", "used": "device"}[area]] = whole
            rig.start(**moved)
            rig.memory.write(moved["driver"], bytes(6 + 512))
            header, status = rig.put(HEADER), rig.put(b"\xee")
            for n in range(600):
                slot = 2 * (n % 128)
                write_desc(rig, moved["desc"], slot, Descriptor(header, 16, NEXT, slot + 1))
                write_desc(rig, moved["desc"], slot + 1, Descriptor(status, 1, WRITE))
                put16(rig, moved["driver"] + 4 + 2 * (n % 256), slot)
                put16(rig, moved["driver"] + 2, n + 1)
                put16(rig, moved["driver"] + 4 + 2 * 256, n)
                rig.vectors.clear()
                rig.complete(rig.pop_one())
                assert rig.vectors == [0]
                assert get(rig, moved["device"] + 2, 2) == n + 1
                assert get(rig, moved["device"] + 4 + 8 * (n % 256), 4) == slot
                assert get(rig, moved["device"] + 8 + 8 * (n % 256), 4) == 1


def write_desc(rig: Rig, base: int, slot: int, d: Descriptor) -> None:
    """Store a descriptor across whatever regions the table lies in."""
    raw = d.address.to_bytes(8, "little") + d.length.to_bytes(4, "little")
    raw += int(d.flags).to_bytes(2, "little") + (d.next or 0).to_bytes(2, "little")
    rig.memory.write(base + 16 * slot, raw)


def put16(rig: Rig, iova: int, value: int) -> None:
    """Store a le16."""
    rig.memory.write(iova, (value & 0xFFFF).to_bytes(2, "little"))


def get(rig: Rig, iova: int, width: int) -> int:
    """Load a little-endian number."""
    return int.from_bytes(rig.memory.read(iova, width), "little")


@pytest.mark.parametrize("odd", [1, 2, 6, 9])
def test_areas_that_a_region_boundary_cuts_through_an_element_are_refused(odd: int) -> None:
    """HOSTILE-040: a seam inside a descriptor or at an odd byte of a ring does not start, and is never touched."""
    with Rig(start=False) as rig:
        whole = rig.memory.layout[0]
        seam = rig.ring.used + 4 + odd
        if seam % 4 == 0:
            seam += 1
        with rig.quiesced():
            rig.unmap(whole)
            rig.map(Range(0, seam))
            base = rig.region(Range(rig.ring.used, 64 * PAGE))
            rig.core.map(type(base)(seam, PAGE, base.vaddr + 2 * PAGE, base.map_base, base.map_len, PAGE, base.prot))
            rig.mapped.append(Range(seam, PAGE))
        with pytest.raises(OSError, match="queue 0") as caught:
            rig.start()
        assert caught.value.errno == errno.EPROTO


def test_used_ring_in_read_only_memory_is_refused() -> None:
    """HOSTILE-025 for the ring itself: a used ring that cannot be written does not start."""
    layout = (Range(0, 32 * PAGE), Range(64 * PAGE, PAGE))
    with Rig(layout=layout, start=False) as rig:
        with rig.quiesced():
            rig.unmap(layout[1])
            rig.map(layout[1], prot=1)
        with pytest.raises(OSError, match="queue 0") as caught:
            rig.start(device=64 * PAGE)
        assert caught.value.errno == errno.EPROTO
        rig.start(desc=64 * PAGE)  # the device only reads this one
        assert rig.queue.pop() == []


def test_old_content_of_the_used_ring_does_not_matter(rig: Rig) -> None:
    """HOSTILE-046: garbage in the used ring before the start is overwritten, never read."""
    rig.queue.stop()
    rig.memory.write(rig.ring.used, b"\xff" * (6 + 8 * 16))
    rig.start()
    rig.ring.write_descriptor(0, Descriptor(rig.put(HEADER), 16, NEXT, 1))
    rig.ring.write_descriptor(1, Descriptor(rig.put(b"\xee"), 1, WRITE))
    rig.ring.offer(0)
    rig.ring.publish()
    rig.complete(rig.pop_one())
    assert rig.memory.read(rig.ring.used, 12) == b"\0\0" + b"\1\0" + bytes(4) + b"\1\0\0\0"


# ---- one chain, hostile


class Case(NamedTuple):
    """What a broken chain is made of: the two descriptors of a sound request."""

    rig: Rig
    header: Descriptor
    status: Descriptor


BROKEN_CHAINS: dict[str, Callable[[Case], list[Descriptor]]] = {
    "HOSTILE-002 next past the table": lambda c: [c.header._replace(next=16)],
    "HOSTILE-002 next far past the table": lambda c: [c.header._replace(next=0xFFFF)],
    "HOSTILE-004 next is itself": lambda c: [c.header._replace(next=0)],
    "HOSTILE-005 a longer cycle": lambda c: [c.header, c.header._replace(next=None), c.header._replace(next=0)],
    "HOSTILE-049 every descriptor goes on": lambda c: [c.header] * 14,
    "HOSTILE-009 readable after writable": lambda c: [
        c.status._replace(flags=WRITE | NEXT),
        c.header._replace(flags=0),
    ],
    "HOSTILE-014 indirect in a table": lambda c: [
        Descriptor(c.rig.table(c.header, Descriptor(c.rig.table(c.status), 16, INDIRECT)), 32, INDIRECT)
    ],
    "HOSTILE-014 indirect in a table, with next": lambda c: [
        Descriptor(c.rig.table(Descriptor(c.rig.table(c.header), 16, INDIRECT | NEXT), c.status), 32, INDIRECT)
    ],
    "HOSTILE-015 indirect and next": lambda c: [
        Descriptor(c.rig.table(c.header, c.status), 32, INDIRECT | NEXT),
        c.status,
    ],
    "HOSTILE-016 empty table": lambda c: [Descriptor(c.rig.table(c.header, c.status), 0, INDIRECT)],
    "HOSTILE-017 table of 17 bytes": lambda c: [Descriptor(c.rig.table(c.header, c.status), 17, INDIRECT)],
    "HOSTILE-017 table of 15 bytes": lambda c: [Descriptor(c.rig.table(c.header, c.status), 15, INDIRECT)],
    "HOSTILE-003 next past a table": lambda c: [
        Descriptor(c.rig.table(c.header._replace(next=2), c.status), 32, INDIRECT)
    ],
    "HOSTILE-006 cycle in a table": lambda c: [
        Descriptor(c.rig.table(c.header, c.header._replace(next=0), c.status), 48, INDIRECT)
    ],
    "HOSTILE-018 table outside memory": lambda _: [Descriptor(OUTSIDE, 32, INDIRECT)],
    "HOSTILE-018 table running out of memory": lambda c: [
        c.header,
        Descriptor(last_entry(c.rig, c.header), 32, INDIRECT),
    ],
    "HOSTILE-018 table that wraps": lambda _: [Descriptor(TOP - 16, 32, INDIRECT)],
    "HOSTILE-019 a cycle in a table of 4 GiB": lambda c: [
        Descriptor(c.rig.table(c.header, c.header._replace(next=0)), 0xFFFF_FFF0, INDIRECT)
    ],
}


def last_entry(rig: Rig, descriptor: Descriptor) -> int:
    """The last 16 bytes of guest memory, holding a descriptor that goes on."""
    where = MEGABYTE - 16
    rig.memory.write(where, rig.memory.read(rig.table(descriptor._replace(next=1)), 16))
    return where


@pytest.mark.parametrize("build", BROKEN_CHAINS.values(), ids=BROKEN_CHAINS.keys())
def test_a_chain_that_breaks_a_rule_corrupts_the_ring(rig: Rig, build: Callable[[Case], list[Descriptor]]) -> None:
    """The rows named in each case: the walk ends, nothing is handed out, and only a reset repairs the ring."""
    rig.offer_raw(*build(Case(rig, *rig.plain())))
    for _ in range(2):
        with pytest.raises(CorruptRing):
            rig.queue.pop()
    rig.request()
    with pytest.raises(CorruptRing):
        rig.queue.pop()
    assert rig.queue.busy == 0
    assert rig.ring.used_idx == 0
    rig.restart()
    rig.request()
    assert len(rig.serve()) == 1


@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])
def test_indirect_without_the_feature_corrupts_the_ring(flags: int) -> None:
    """HOSTILE-013, RING-INDIRECT-012: the table is not followed."""
    with Rig(life=Life(indirect=False)) as rig:
        rig.offer_raw(Descriptor(rig.table(*rig.plain()), 32, flags))
        with pytest.raises(CorruptRing):
            rig.queue.pop()


@pytest.mark.parametrize("head", [16, 17, 0x8000, 0xFFFF])
def test_a_head_outside_the_table_corrupts_the_ring(rig: Rig, head: int) -> None:
    """HOSTILE-001: nothing is read past the descriptor table."""
    rig.ring.offer(head)
    rig.ring.publish()
    with pytest.raises(CorruptRing):
        rig.queue.pop()


@pytest.mark.parametrize("jump", [17, 100, 0x7FFF, 0x8000, 0xFFFF])
def test_an_avail_index_that_jumps_corrupts_the_ring(rig: Rig, jump: int) -> None:
    """HOSTILE-032, HOSTILE-033: further than the ring is long, or backwards."""
    rig.ring.avail_idx = jump
    with pytest.raises(CorruptRing):
        rig.queue.pop()
    rig.ring.avail_idx = 0
    with pytest.raises(CorruptRing):
        rig.queue.pop()


def test_chains_before_the_fault_are_handed_out_and_the_fault_is_told_without_a_doorbell(rig: Rig) -> None:
    """The sound chains before a corrupt one come first; a driver that is not to kick need not, to hear the rest."""
    rig.request()
    rig.request()
    rig.offer_raw(Descriptor(OUTSIDE, 32, INDIRECT))
    rig.queue.clear_kick()
    chains = rig.queue.pop()
    assert len(chains) == 2
    assert rig.kicked()
    with pytest.raises(CorruptRing):
        rig.queue.pop()
    rig.complete(*chains)
    assert rig.queue.busy == 0


def test_an_index_that_jumps_while_chains_are_taken_loses_none_of_them(rig: Rig) -> None:
    """HOSTILE-032: whatever was handed out is all that is in flight, so a drain ends."""
    rig.request()
    rig.ring.avail_idx = 1
    taken = len(rig.queue.pop())
    rig.ring.avail_idx = 0x4000
    with contextlib.suppress(CorruptRing):
        taken += len(rig.queue.pop())
    assert rig.queue.busy == taken == 1


def test_a_head_may_be_offered_twice(rig: Rig) -> None:
    """HOSTILE-031: both are processed, each completed once."""
    head = rig.request()
    rig.ring.offer(head)
    rig.ring.publish()
    chains = rig.queue.pop()
    assert len({chain.token for chain in chains}) == 2
    rig.complete(*chains)
    assert rig.ring.get_used() == [(head, 1), (head, 1)]


def test_chains_may_share_descriptors(rig: Rig) -> None:
    """HOSTILE-030: each is processed as it stands."""
    rig.request(b"x" * 512)
    rig.ring.offer(1)
    rig.ring.publish()
    first, second = rig.queue.pop()
    assert (len(first.header), first.readable) == (16, 512)
    assert (len(second.header), second.readable) == (16, 496)


def test_more_in_flight_than_the_queue_is_long_corrupts_it(rig: Rig) -> None:
    """HOSTILE-034: heads reused before completion."""
    head = rig.request()
    for _ in range(15):
        rig.ring.offer(head)
    rig.ring.publish()
    chains = rig.queue.pop()
    assert len(chains) == 16
    rig.ring.offer(head)
    rig.ring.publish()
    with pytest.raises(CorruptRing):
        rig.queue.pop()


@pytest.mark.parametrize("flags", [8, 0x10, 0x8000, 0xFFF8])
def test_undefined_descriptor_flags_are_ignored(rig: Rig, flags: int) -> None:
    """HOSTILE-012."""
    header, status = rig.plain()
    head = rig.offer_raw(header._replace(flags=NEXT | flags), status._replace(flags=WRITE | flags))
    assert rig.serve() == [(head, 1)]


@both
def test_empty_elements_are_skipped(rig: Rig) -> None:
    """HOSTILE-010: wherever they stand, and wherever they point."""
    nothing = Descriptor(OUTSIDE, 0, NEXT)
    header, status = rig.plain()
    head = rig.offer_raw(
        nothing,
        header,
        nothing,
        nothing._replace(flags=NEXT | WRITE),
        status._replace(flags=NEXT | WRITE),
        nothing._replace(flags=WRITE),
    )
    chain = rig.pop_one()
    assert (chain.header, chain.answerable, chain.reachable) == (HEADER, True, True)
    rig.complete(chain, status=3)
    assert rig.ring.get_used() == [(head, 1)]
    assert rig.memory.read(status.address, 1) == b"\3"


@both
@pytest.mark.parametrize("flags", [0, WRITE])
def test_a_chain_of_empty_elements_goes_back_with_length_0(rig: Rig, flags: int) -> None:
    """HOSTILE-011."""
    head = rig.offer_raw(Descriptor(OUTSIDE, 0, NEXT | flags), Descriptor(OUTSIDE, 0, flags))
    chain = rig.pop_one()
    assert not chain.answerable
    rig.complete(chain, status=IOERR)
    assert rig.ring.get_used() == [(head, 0)]


@both
def test_a_chain_without_a_writable_byte_goes_back_with_length_0(rig: Rig) -> None:
    """HOSTILE-141: no status byte, and the requests after it are unharmed."""
    head = rig.offer(rig.readable(HEADER + bytes(512)))
    other = rig.request()
    first, second = rig.queue.pop()
    assert (first.answerable, second.answerable) == (False, True)
    rig.complete(first, second)
    assert rig.ring.get_used() == [(head, 0), (other, 1)]


@both
def test_a_writable_header_is_not_read(rig: Rig) -> None:
    """HOSTILE-144, RING-SPLIT-007, -013: a chain of writable elements only has no header."""
    rig.offer(rig.writable(16), rig.writable(1))
    chain = rig.pop_one()
    assert (chain.header, chain.writable) == (b"", 16)


# ---- addresses


UNREACHABLE: dict[str, Descriptor] = {
    "HOSTILE-020 outside": Descriptor(OUTSIDE, 512),
    "HOSTILE-020 just behind the end": Descriptor(MEGABYTE, 1),
    "HOSTILE-021 wraps": Descriptor(TOP - 256, 512),
    "HOSTILE-021 wraps by one byte": Descriptor(TOP - 511, 512),
    "HOSTILE-022 runs past the end": Descriptor(MEGABYTE - 256, 512),
    "HOSTILE-022 runs past the end by a byte": Descriptor(MEGABYTE - 511, 512),
    "HOSTILE-022 as long as can be": Descriptor(0, 0xFFFF_FFFF),
}


@both
@pytest.mark.parametrize("where", UNREACHABLE.values(), ids=UNREACHABLE.keys())
@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
def test_data_outside_memory_fails_its_request_only(rig: Rig, where: Descriptor, flags: int) -> None:
    """The rows named, and HOSTILE-024: no view at all, an IOERR that is told, and the ring goes on."""
    header, status = rig.plain()
    head = rig.offer_raw(header, where._replace(flags=NEXT | flags), status)
    other = rig.request()
    chain, sound = rig.queue.pop()
    assert (chain.reachable, chain.without_fd, chain.answerable) == (False, False, True)
    assert (chain.views_in, chain.views_out) == ([], [])
    assert sound.reachable
    rig.complete(chain, status=IOERR)
    rig.complete(sound)
    assert rig.memory.read(status.address, 1) == b"\1"
    assert [h for h, _ in rig.ring.get_used()] == [head, other]


@both
@pytest.mark.parametrize("where", UNREACHABLE.values(), ids=UNREACHABLE.keys())
def test_a_status_outside_memory_goes_back_with_length_0(rig: Rig, where: Descriptor) -> None:
    """HOSTILE-020 to -022 for the status byte: nothing is written anywhere."""
    header, _ = rig.plain()
    before = rig.memory.read(0, PAGE)
    head = rig.offer_raw(header, where._replace(flags=WRITE))
    chain = rig.pop_one()
    assert not chain.reachable
    rig.complete(chain, status=IOERR)
    assert rig.ring.get_used()[0] == (head, 0)
    assert rig.memory.read(0, PAGE) == before


@both
@pytest.mark.parametrize("where", UNREACHABLE.values(), ids=UNREACHABLE.keys())
def test_a_header_outside_memory_fails_its_request(rig: Rig, where: Descriptor) -> None:
    """HOSTILE-020 to -022 for the header."""
    _, status = rig.plain()
    head = rig.offer_raw(where._replace(flags=NEXT), status)
    chain = rig.pop_one()
    assert not chain.reachable
    rig.complete(chain, status=IOERR)
    assert rig.ring.get_used() == [(head, 1)]


TOP_AND_BOTTOM = (Range(0, 64 * PAGE), Range(TOP - PAGE, PAGE))


@pytest.mark.parametrize("length", [17, 32, 64, 300])
def test_elements_do_not_wrap_from_the_last_region_to_the_first(length: int) -> None:
    """HOSTILE-021: memory at both ends of the address space is not one, for header, data or status."""
    with Rig(layout=TOP_AND_BOTTOM) as rig:
        rig.memory.write(0, b"\xee" * 512)
        header, status = rig.plain()
        wrapping = Descriptor(TOP - 16, length)
        rig.offer_raw(wrapping._replace(flags=NEXT), status)
        rig.offer_raw(header, wrapping._replace(flags=NEXT), status)
        rig.offer_raw(header, wrapping._replace(flags=NEXT | WRITE), status)
        last = rig.offer_raw(header, wrapping._replace(flags=WRITE))
        chains = rig.queue.pop()
        assert [chain.reachable for chain in chains] == [False] * 4
        rig.complete(*chains, status=IOERR)
        assert rig.memory.read(0, 512) == b"\xee" * 512
        assert rig.ring.get_used()[3] == (last, 0)


def test_the_last_byte_of_the_address_space_is_memory_like_any_other() -> None:
    """HOSTILE-021: an element that ends with the address space does not wrap."""
    with Rig(layout=TOP_AND_BOTTOM) as rig:
        head = rig.offer(rig.readable(HEADER), Segment(TOP - 513, 513, writable=True))
        chain = rig.pop_one()
        assert (chain.reachable, chain.writable) == (True, 512)
        rig.complete(chain, status=9, written=512)
        assert rig.memory.read(TOP - 1, 1) == b"\x09"
        assert rig.ring.get_used() == [(head, 513)]


@both
def test_a_chain_of_more_than_4_gib_is_unreachable(rig: Rig) -> None:
    """HOSTILE-008: sums do not wrap, and no used length could tell."""
    header, status = rig.plain()
    huge = Descriptor(0, 0x8000_0000, NEXT)
    rig.offer_raw(header, huge, huge, status)
    rig.offer_raw(header, *[huge._replace(flags=NEXT | WRITE)] * 2, status)
    first, second = rig.queue.pop()
    assert (first.readable, second.writable) == (1 << 32, 1 << 32)
    assert not first.reachable
    assert not second.reachable


def test_a_chain_of_more_than_4_gib_in_memory_is_unreachable() -> None:
    """HOSTILE-008: even if every element is sound by itself."""
    with Rig(layout=(Range(0, 1 << 30),)) as rig:
        header, status = rig.plain()
        whole = Descriptor(0, 1 << 30, NEXT | WRITE)
        rig.offer_raw(header, *[whole] * 4, status)
        head = rig.offer_raw(header, *[whole] * 3, status)
        first, second = rig.queue.pop()
        assert (first.reachable, second.reachable) == (False, True)
        rig.complete(second, written=3 << 30)
        assert rig.ring.get_used() == [(head, (3 << 30) + 1)]


def test_writable_data_in_read_only_memory_is_unreachable() -> None:
    """HOSTILE-025: the request fails, memory is unchanged; a status there goes back with length 0."""
    layout = (Range(0, 64 * PAGE), Range(64 * PAGE, PAGE))
    with Rig(layout=layout) as rig:
        rig.memory.write(SEAM, b"\xee" * PAGE)
        rig.remap(layout[1], prot=1)
        rig.offer(rig.readable(HEADER), Segment(SEAM, 512, writable=True), rig.writable(1))
        rig.offer(rig.readable(HEADER), Segment(SEAM, 1, writable=True))
        rig.offer(rig.readable(HEADER), Segment(SEAM, 512, writable=False), rig.writable(1))
        chains = rig.queue.pop()
        assert [chain.reachable for chain in chains] == [False, False, True]
        assert joined(chains[2].views_in) == b"\xee" * 512
        rig.complete(*chains)
        assert [length for _, length in rig.ring.get_used()] == [0, 0, 1]
        assert rig.memory.read(SEAM, PAGE) == b"\xee" * PAGE


def test_data_in_memory_without_a_descriptor_is_told_apart() -> None:
    """Memory without a file descriptor is out of reach for its own reason."""
    layout = (Range(0, 64 * PAGE), Range(64 * PAGE, PAGE))
    with Rig(layout=layout) as rig:
        rig.remap(layout[1], fd=False)
        rig.offer(rig.readable(HEADER), Segment(SEAM, 512, writable=True), rig.writable(1))
        rig.offer(Segment(SEAM, 16, writable=False), rig.writable(1))
        assert [(chain.reachable, chain.without_fd) for chain in rig.queue.pop()] == [(False, True)] * 2


# ---- indirect


@both
@pytest.mark.parametrize("flags", [INDIRECT, INDIRECT | WRITE])
def test_an_indirect_table_is_a_chain(rig: Rig, flags: int) -> None:
    """RING-INDIRECT-001, -005: entries of both directions; WRITE on the descriptor of the table is ignored."""
    data, status = rig.writable(512), rig.writable(1)
    table = rig.table(
        Descriptor(rig.put(HEADER), 16, NEXT),
        Descriptor(data.iova, 512, NEXT | WRITE),
        Descriptor(status.iova, 1, WRITE),
    )
    head = rig.offer_raw(Descriptor(table, 48, flags))
    chain = rig.pop_one()
    assert (chain.header, chain.writable) == (HEADER, 512)
    rig.complete(chain, written=512)
    assert rig.ring.get_used() == [(head, 513)]


@pytest.mark.parametrize("direct", [0, 1, 2])
def test_plain_descriptors_may_precede_the_table(rig: Rig, direct: int) -> None:
    """RING-INDIRECT-002."""
    header, status = rig.plain()
    pieces = [header, Descriptor(rig.put(b"abc"), 3, NEXT), Descriptor(rig.put(b"def"), 3, NEXT), status]
    rest = pieces[direct:]
    rig.offer_raw(*pieces[:direct], Descriptor(rig.table(*rest), 16 * len(rest), INDIRECT))
    chain = rig.pop_one()
    assert (chain.header, joined(chain.views_in)) == (HEADER, b"abcdef")


def test_next_may_jump_around_in_a_table(rig: Rig) -> None:
    """RING-INDIRECT-003, -004: from entry 0 along next, to the first entry without; the rest is not looked at."""
    header, status = rig.plain()
    table = rig.table(
        header._replace(next=3),
        status,
        Descriptor(OUTSIDE, 1, INDIRECT),
        Descriptor(rig.put(b"abc"), 3, NEXT, 1),
    )
    rig.offer_raw(Descriptor(table, 64, INDIRECT))
    chain = rig.pop_one()
    assert (chain.header, joined(chain.views_in), chain.answerable) == (HEADER, b"abc", True)


@both
@pytest.mark.parametrize("offset", [0, 1, 8])
def test_a_table_may_lie_at_any_address(rig: Rig, offset: int) -> None:
    """Indirect tables have no alignment."""
    packed = rig.memory.read(rig.table(*rig.plain()), 32)
    base = rig.put(bytes(64)) + offset
    rig.memory.write(base, packed)
    rig.offer_raw(Descriptor(base, 32, INDIRECT))
    assert rig.pop_one().header == HEADER


def test_a_table_may_lie_over_two_regions() -> None:
    """HOSTILE-023 for a table: each entry is looked up where it lies."""
    with Rig(pieces=TWO_REGIONS) as rig:
        packed = rig.memory.read(rig.table(*rig.plain()), 32)
        rig.memory.write(SEAM - 16, packed[:16])
        rig.memory.write(SEAM, packed[16:])
        rig.offer_raw(Descriptor(SEAM - 16, 32, INDIRECT))
        assert rig.pop_one().header == HEADER


def test_a_table_of_4_gib_is_read_only_as_far_as_it_goes(rig: Rig) -> None:
    """HOSTILE-019: a sound chain in a table whose length exceeds guest memory is served."""
    rig.offer_raw(Descriptor(rig.table(*rig.plain()), 0xFFFF_FFF0, INDIRECT))
    assert rig.pop_one().header == HEADER


def long_table(rig: Rig, entries: int) -> int:
    """A table of so many entries: a header, elements of one byte that do not touch, a status byte."""
    header, status = rig.plain()
    bytes_ = rig.put(b"\x55" * (2 * entries))
    middle = [Descriptor(bytes_ + 2 * n, 1, NEXT) for n in range(entries - 2)]
    return rig.table(header, *middle, status)


@pytest.mark.parametrize(("size", "entries"), [(16, 17), (16, 1024), (1024, 1024)])
def test_a_table_may_be_longer_than_the_queue_up_to_a_limit(size: int, entries: int) -> None:
    """HOSTILE-007, RING-SPLIT-014: 1024 entries, or as many as the queue is long, whatever leads to the table."""
    with Rig(life=Life(size=size)) as rig:
        rig.offer_raw(Descriptor(long_table(rig, entries), 16 * entries, INDIRECT))
        chain = rig.pop_one()
        assert (chain.readable, len(chain.views_in), chain.reachable) == (entries - 2, entries - 2, True)


def test_a_table_beyond_the_limit_corrupts_the_ring(rig: Rig) -> None:
    """HOSTILE-007, RING-SPLIT-005: memory and time are bounded."""
    rig.offer_raw(Descriptor(long_table(rig, 1025), 16 * 1025, INDIRECT))
    with pytest.raises(CorruptRing):
        rig.queue.pop()


def test_a_chain_cut_into_very_many_pieces_is_unreachable() -> None:
    """HOSTILE-007: region boundaries cannot multiply one chain's pieces without bound."""
    layout = tuple(Range(n * PAGE, PAGE) for n in range(200))
    with Rig(layout=(Range(1 << 32, 64 * PAGE), *layout)) as rig:
        base = 1 << 32
        header, status = base + 60 * PAGE, base + 60 * PAGE + 64
        entries = [Descriptor(header, 16, NEXT), *[Descriptor(0, 200 * PAGE, NEXT)] * 10, Descriptor(status, 1, WRITE)]
        packed = b"".join(
            d.address.to_bytes(8, "little") + d.length.to_bytes(4, "little") + int(d.flags).to_bytes(2, "little")
            + (n + 1).to_bytes(2, "little")
            for n, d in enumerate(entries)
        )  # fmt: skip
        rig.memory.write(base + 61 * PAGE, packed)
        rig.offer_raw(Descriptor(base + 61 * PAGE, len(packed), INDIRECT))
        chain = rig.pop_one()
        assert (chain.reachable, chain.answerable) == (False, True)


def test_a_direct_chain_may_be_as_long_as_the_queue() -> None:
    """RING-SPLIT-014."""
    with Rig(life=Life(size=1024)) as rig:
        parts = [rig.readable(b"x") for _ in range(1023)]
        head = rig.offer(*parts, rig.writable(1))
        chain = rig.pop_one()
        assert (len(chain.header), chain.readable) == (16, 1007)
        rig.complete(chain)
        assert rig.ring.get_used() == [(head, 1)]


# ---- used lengths


@both
@pytest.mark.parametrize(
    ("room", "written", "told"),
    [(512, 0, 0), (512, 511, 511), (512, 512, 513), (512, 9999, 513), (512, 0xFFFF_FFFF, 513), (0, 0, 1), (0, 5, 1)],
)
def test_used_length_counts_only_what_was_written_without_a_gap(rig: Rig, room: int, written: int, told: int) -> None:
    """RING-SPLIT-017, -020 to -022: an underestimate at most; the status counts when all before it was written."""
    head = rig.request(room=room)
    rig.complete(rig.pop_one(), written=written)
    assert rig.ring.get_used() == [(head, told)]


@both
def test_a_status_that_overlaps_the_data_is_stored_last(rig: Rig) -> None:
    """HOSTILE-151."""
    data = rig.writable(512)
    rig.offer(rig.readable(HEADER), data, Segment(data.iova, 1, writable=True))
    chain = rig.pop_one()
    fill(chain.views_out, b"x" * 512)
    rig.complete(chain, status=9, written=512)
    assert rig.memory.read(data.iova, 2) == b"\x09x"


def test_nothing_but_used_ring_and_status_is_written(rig: Rig) -> None:
    """RING-SPLIT-006, -008, -009: neither the descriptor table nor the available ring nor readable data."""
    rig.request(b"x" * 512)
    kept = [(rig.ring.desc, 256), (rig.ring.avail, 38)]
    before = [rig.memory.read(*area) for area in kept]
    rig.serve()
    assert [rig.memory.read(*area) for area in kept] == before


def test_a_data_buffer_over_the_ring_is_written_as_asked(rig: Rig) -> None:
    """HOSTILE-047: the device keeps its own position, so the next used entry lands where it belongs."""
    rig.offer(rig.readable(HEADER), Segment(rig.ring.used, 6 + 8 * 16, writable=True), rig.writable(1))
    chain = rig.pop_one()
    fill(chain.views_out, b"\xff" * (6 + 8 * 16))
    rig.complete(chain, written=6 + 8 * 16)
    assert rig.ring.used_idx == 1
    assert get(rig, rig.ring.used + 4, 4) == 0


def test_used_index_and_entries_are_never_read_back(rig: Rig) -> None:
    """HOSTILE-036."""
    rig.request()
    rig.serve()
    rig.memory.write(rig.ring.used, b"\xff" * (6 + 8 * 16))
    rig.request()
    rig.complete(rig.pop_one())
    assert rig.ring.used_idx == 2


def test_areas_may_overlap(rig: Rig) -> None:
    """HOSTILE-043, HOSTILE-044: garbage stays in its queue and every pop and completion ends."""
    with Rig(queues=2, start=False) as two:
        base = two.ring.desc
        two.start(0, desc=base, driver=base, device=base)
        two.start(1, desc=base, driver=base, device=base)
        for word in range(64):
            put16(two, base + 2, word)
            for queue in two.queues:
                with contextlib.suppress(CorruptRing):
                    queue.complete(b"".join(ending(chain.token, 0, 0) for chain in queue.pop()))
    rig.request()
    assert len(rig.serve()) == 1


# ---- completing


@both
def test_chains_complete_in_any_order(rig: Rig) -> None:
    """RING-SPLIT-015, -016: a full queue, completed backwards."""
    heads = [rig.offer(rig.writable(1)) for _ in range(16)]
    chains = rig.queue.pop()
    rig.complete(*reversed(chains))
    assert rig.ring.get_used() == [(head, 1) for head in reversed(heads)]


def test_each_chain_is_completed_once(rig: Rig) -> None:
    """A token that was completed, that never was, or of another life is ignored, also within one batch."""
    head = rig.request()
    chain = rig.pop_one()
    answers = (chain.token, 0), (chain.token, 1), (0xFFFF, 0), (0xFFFF_FFFF, 0)
    rig.queue.complete(b"".join(ending(token, status, 0) for token, status in answers))
    rig.complete(chain)
    assert rig.ring.get_used() == [(head, 1)]
    assert (rig.ring.used_idx, rig.queue.busy) == (1, 0)
    assert rig.vectors == [0]
    again = rig.request()
    other = rig.pop_one()
    assert other.token != chain.token
    rig.complete(chain)
    assert rig.ring.get_used() == []
    rig.complete(other)
    assert rig.ring.get_used() == [(again, 1)]


def test_tokens_of_a_queue_that_never_started_are_ignored() -> None:
    """Completing on a fresh queue does nothing."""
    with Rig(start=False) as rig:
        rig.queue.complete(ending(0, 0, 0))
        assert rig.ring.used_idx == 0


def test_one_interrupt_for_a_batch(rig: Rig) -> None:
    """RING-SPLIT-019, -023: used index once, interrupt once."""
    for _ in range(5):
        rig.request()
    rig.complete(*rig.queue.pop())
    assert (rig.ring.used_idx, rig.vectors) == (5, [0])


@pytest.mark.parametrize("indirect", [False, True])
def test_indices_wrap(indirect: bool) -> None:
    """RING-SPLIT-010, -018: slots modulo the size, indices modulo 65536."""
    with Rig(life=Life(size=1024)) as rig:
        header, status = rig.readable(HEADER), rig.writable(1)
        tables = [rig.put(bytes(32)) for _ in range(512)] if indirect else [None] * 512
        total = 0
        while total < 66_000:
            heads = [rig.ring.add((header, status), table) for table in tables]
            rig.ring.publish()
            used = rig.serve()
            assert used == [(head, 1) for head in heads]
            total += len(used)
        assert rig.ring.used_idx == rig.ring.avail_idx == total & 0xFFFF


def test_a_full_queue_of_32768_is_told_from_an_empty_one() -> None:
    """RING-SPLIT-002, -024: the largest queue, with every descriptor a chain."""
    with Rig(layout=(Range(0, 4 << 20),), life=Life(size=32768), start=False) as driver:
        memory = driver.memory
        core = Core(1, 32768)
        host = memory.address(0, 4 << 20)
        core.map(Region(0, 4 << 20, host, host, 4 << 20, PAGE, 3))
        queue = Queue(core, 0)
        ring = driver.ring
        queue.start(
            size=32768, desc=ring.desc, driver=ring.avail, device=ring.used, vector=0, event_idx=False, indirect=False
        )
        assert queue.pop() == []
        status = driver.writable(1)
        for _ in range(32768):
            ring.add((status,))
        ring.publish()
        done = 0
        while chains := queue.pop():
            queue.complete(b"".join(ending(chain.token, 0, 0) for chain in chains))
            done += len(chains)
        assert done == len(ring.get_used()) == 32768
        ring.avail_idx = 1
        with pytest.raises(CorruptRing):  # 32769 further
            queue.pop()
        queue.stop()
        core.unmap(0, 4 << 20)
        queue.close()
        core.close()


def test_a_batch_is_at_most_64_chains() -> None:
    """HOSTILE-035: one pop ends however much there is; the next goes on where it stopped."""
    with Rig(life=Life(size=128)) as rig:
        for _ in range(128):
            rig.offer(rig.writable(1))
        first, second = rig.queue.pop(), rig.queue.pop()
        assert (len(first), len(second), rig.queue.BATCH) == (64, 64, 64)
        assert rig.queue.pop() == []
        rig.complete(*first, *second)
        assert len(rig.ring.get_used()) == 128


def test_a_queue_with_very_many_segments_in_flight_waits_for_some_to_end() -> None:
    """HOSTILE-007: memory for chains in flight is bounded; a completion brings the doorbell that goes on."""
    with Rig(life=Life(size=1024)) as rig:
        table = long_table(rig, 1024)
        for _ in range(300):
            rig.offer_raw(Descriptor(table, 16 * 1024, INDIRECT))
        tokens: list[int] = []
        while chains := rig.queue.pop():
            tokens += [chain.token for chain in chains]
        assert 256 <= len(tokens) < 300
        rig.queue.clear_kick()
        assert rig.queue.pop() == []
        rig.queue.complete(ending(tokens.pop(), 0, 0))
        assert rig.kicked()
        total = len(tokens) + 1
        rig.queue.complete(b"".join(ending(token, 0, 0) for token in tokens))
        while chains := rig.queue.pop():
            rig.complete(*chains)
            total += len(chains)
        assert total == 300


# ---- suppression: interrupts


@pytest.mark.parametrize("flags", [0, 2, 0xFFFE])
def test_an_interrupt_is_sent_while_the_flag_is_clear(rig: Rig, flags: int) -> None:
    """RING-EVENT-001, -003, HOSTILE-037: only bit 0 counts, and the used_event word is ignored."""
    rig.ring.set_avail_flags(flags)
    rig.ring.set_used_event(1234)
    rig.request()
    rig.serve()
    assert rig.vectors == [0]


@pytest.mark.parametrize("flags", [1, 3, 0xFFFF])
def test_no_interrupt_is_sent_while_the_flag_is_set(rig: Rig, flags: int) -> None:
    """RING-EVENT-002, HOSTILE-037."""
    rig.ring.set_avail_flags(flags)
    rig.request()
    rig.serve()
    assert rig.vectors == []


def served_interrupts(rig: Rig, count: int) -> int:
    """Serve so many requests in one batch; how many interrupts that made."""
    for _ in range(count):
        rig.request()
    rig.vectors.clear()
    rig.complete(*rig.queue.pop())
    rig.ring.get_used()
    return len(rig.vectors)


@pytest.mark.parametrize(("batch", "before"), [(b, n) for b in (1, 2, 5) for n in (0, 1, 3)])
def test_used_event_decides_about_a_batch(batch: int, before: int) -> None:
    """RING-EVENT-004, -005, -006, -008, HOSTILE-038: due exactly if the batch passes used_event; flags are ignored."""
    for event in (*range(-2, before + batch + 2), 0x7FFF):
        with Rig(life=Life(event_idx=True)) as rig:
            rig.ring.set_avail_flags(1)
            if before:
                served_interrupts(rig, before)
            rig.ring.set_used_event(event)
            assert served_interrupts(rig, batch) == (before <= event < before + batch)


def test_used_event_0_interrupts_first_and_every_65536th() -> None:
    """RING-EVENT-007, HOSTILE-039: also across the wrap of the used index."""
    with Rig(life=Life(size=1024, event_idx=True)) as rig:
        rig.ring.set_used_event(0)
        status = rig.writable(1)
        told: list[int] = []
        total = 0
        while total < 66_000:
            for _ in range(64):
                rig.ring.add((status,))
            rig.ring.publish()
            rig.complete(*rig.queue.pop())
            rig.ring.get_used()
            if rig.vectors:
                told.append(total)
                rig.vectors.clear()
            total += 64
        assert told == [0, 65536]


# ---- suppression: doorbells


def test_doorbells_are_off_while_a_batch_waits_and_on_when_the_ring_is_dry() -> None:
    """RING-EVENT-010, -011, -015: only 0 and 1 are stored in the used flags."""
    with Rig(life=Life(size=128)) as rig:
        assert rig.queue.pop() == []
        assert rig.ring.used_flags == 0
        for _ in range(65):
            rig.offer(rig.writable(1))
        rig.queue.pop()
        assert rig.ring.used_flags == 1
        assert not rig.ring.need_kick()
        rig.queue.pop()
        assert rig.ring.used_flags == 0
        rig.offer(rig.writable(1))
        assert rig.ring.need_kick()


def test_avail_event_asks_for_the_next_chain() -> None:
    """RING-EVENT-012, -013: used flags stay 0, silence until the ring ran dry."""
    with Rig(life=Life(size=128, event_idx=True)) as rig:
        assert rig.queue.pop() == []
        rig.offer(rig.writable(1))
        assert rig.ring.need_kick()
        for _ in range(70):
            rig.offer(rig.writable(1))
        assert not rig.ring.need_kick()
        assert len(rig.queue.pop()) == 64
        assert (rig.ring.used_flags, rig.ring.avail_event) == (0, 0)
        assert len(rig.queue.pop()) == 7
        assert (rig.ring.used_flags, rig.ring.avail_event) == (0, 71)


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_doorbell_that_announces_nothing_is_tolerated(event_idx: bool) -> None:
    """RING-EVENT-014, RING-SPLIT-011: and chains are fetched without a doorbell too."""
    with Rig(life=Life(event_idx=event_idx)) as rig:
        for _ in range(3):
            assert rig.queue.pop() == []
        rig.request()
        assert len(rig.serve()) == 1


def test_kick_fd_counts_as_one_doorbell(rig: Rig) -> None:
    """A doorbell heard is cleared, however often it rang; clearing a silent one is fine."""
    rig.queue.kick()
    rig.queue.kick()
    rig.queue.clear_kick()
    rig.queue.clear_kick()
    assert not rig.kicked()


# ---- interrupts: MSI-X and INTx


def test_each_queue_has_its_vector() -> None:
    """MSI-X: the vector of the queue, the last one set; NO_VECTOR is silent."""
    with Rig(queues=3) as rig:
        rig.queues[1].set_vector(7)
        rig.queues[2].set_vector(NO_VECTOR)
        for queue, ring in zip(rig.queues, rig.rings, strict=True):
            ring.add((rig.writable(1),))
            ring.publish()
            queue.complete(b"".join(ending(chain.token, 0, 0) for chain in queue.pop()))
        assert rig.vectors == [0, 7]
        assert rig.core.peek() == 0


@both
def test_intx_sets_isr_and_reading_it_clears_it(rig: Rig) -> None:
    """INTx: bit 0 for a queue, bit 1 for the configuration; vector 0 is raised for both."""
    rig.core.set_msix(on=False)
    rig.request()
    rig.serve()
    rig.core.config_interrupt()
    assert rig.core.peek() == IsrStatus.QUEUE | IsrStatus.CONFIG
    assert rig.core.take() == IsrStatus.QUEUE | IsrStatus.CONFIG
    assert rig.core.take() == 0
    assert rig.vectors == [0, 0]


def test_intx_disabled_keeps_the_isr_and_raises_on_enabling(rig: Rig) -> None:
    """Interrupt Disable masks the line, not the status; the level comes back with it."""
    rig.core.set_msix(on=False)
    rig.core.set_intx_disabled(disabled=True)
    rig.request()
    rig.serve()
    assert (rig.vectors, rig.core.peek()) == ([], IsrStatus.QUEUE)
    rig.core.set_intx_disabled(disabled=False)
    assert rig.vectors == [0]
    rig.core.take()
    rig.core.intx_again()
    assert rig.vectors == [0]


def test_intx_is_raised_again_while_a_bit_is_set(rig: Rig) -> None:
    """Unmasking INTx repeats a level that was not acknowledged; with MSI-X on there is no level."""
    rig.core.set_msix(on=False)
    rig.core.config_interrupt()
    rig.core.intx_again()
    assert rig.vectors == [0, 0]
    rig.core.set_msix(on=True)
    rig.core.intx_again()
    assert rig.vectors == [0, 0]


def test_config_interrupt_has_its_vector_and_sets_isr(rig: Rig) -> None:
    """PCI-075: configuration changes set the ISR bit even with MSI-X; without a vector nothing is sent."""
    rig.core.config_interrupt()
    assert (rig.vectors, rig.core.take()) == ([], IsrStatus.CONFIG)
    rig.core.set_config_vector(5)
    rig.core.config_interrupt()
    assert rig.vectors == [5]


# ---- life: stop, pause


@both
def test_a_stopped_queue_pops_nothing_and_touches_nothing(rig: Rig) -> None:
    """Neither a chain that waits nor one completed late reaches a stopped ring."""
    rig.request()
    rig.request()
    chains = rig.queue.pop()
    rig.request()
    rig.queue.stop()
    before = rig.memory.read(0, MEGABYTE)
    rig.complete(*chains)
    assert rig.queue.pop() == []
    assert rig.memory.read(0, MEGABYTE) == before
    assert rig.vectors == []


@both
def test_a_chain_of_an_earlier_life_is_not_told_to_the_next(rig: Rig) -> None:
    """A late completion after stop and start touches nothing of the new ring."""
    rig.request()
    chain = rig.pop_one()
    rig.restart()
    before = rig.memory.read(0, MEGABYTE)
    rig.complete(chain)
    assert rig.memory.read(0, MEGABYTE) == before
    assert (rig.vectors, rig.queue.busy) == ([], 0)


@both
def test_a_queue_starts_at_position_0_each_time(rig: Rig) -> None:
    """RING-SPLIT-010, -018: positions do not survive a reset."""
    for expected in (1, 2):
        for _ in range(3):
            rig.request()
        assert len(rig.serve()) == 3
        rig.restart()
        assert rig.queue.starts == expected + 1


@both
@pytest.mark.parametrize("reason", [Pause.QUIESCE, Pause.RESET, Pause.BUS_MASTER, Pause.STOP])
def test_a_paused_queue_does_not_pop_until_no_reason_is_left(rig: Rig, reason: int) -> None:
    """Reasons add up; taking the last one back rings the doorbell, taking back one that was not there does not."""
    other = Pause.STOP if reason != Pause.STOP else Pause.RESET
    rig.request()
    rig.core.pause(reason)
    rig.queue.pause(other)
    assert rig.queue.pop() == []
    rig.queue.resume(reason)
    assert not rig.kicked()
    assert rig.queue.pop() == []
    rig.core.resume(other)
    assert rig.kicked()
    rig.core.resume(other)
    assert not rig.kicked()
    assert len(rig.queue.pop()) == 1


@both
def test_a_paused_queue_completes_and_tells_when_it_is_drained(rig: Rig) -> None:
    """drained_fd is written when the last chain in flight of a paused queue has ended, after its interrupt."""
    rig.request()
    rig.request()
    first, second = rig.queue.pop()
    assert rig.core.pause(Pause.QUIESCE) == rig.core.busy == 2
    rig.complete(first)
    assert not rang(rig.core.drained_fd)
    rig.complete(second)
    assert rang(rig.core.drained_fd)
    assert rig.core.busy == 0
    assert len(rig.ring.get_used()) == 2


def test_an_unpaused_queue_does_not_tell_of_being_idle(rig: Rig) -> None:
    """drained_fd is for whoever paused."""
    rig.request()
    rig.serve()
    assert not rang(rig.core.drained_fd)


@both
def test_an_interrupt_on_its_way_counts_as_in_flight(rig: Rig) -> None:
    """While the sink runs the queue is busy: memory and vectors may not change under it."""
    seen: list[tuple[int, int]] = []

    class Watching(list[int]):
        def append(self, vector: int) -> None:
            seen.append((vector, rig.core.busy))

    rig.vectors = Watching()
    rig.request()
    rig.serve()
    assert (seen, rig.core.busy) == ([(0, 1)], 0)


def test_queues_do_not_wait_for_each_other() -> None:
    """HOSTILE-035, -044: a corrupt, a paused and a full queue leave the others alone."""
    with Rig(queues=4) as rig:
        rig.rings[0].avail_idx = 0x8000
        rig.queues[1].pause(Pause.RESET)
        for ring in rig.rings[1:]:
            ring.add((rig.writable(1),))
            ring.publish()
        with pytest.raises(CorruptRing):
            rig.queues[0].pop()
        assert [len(queue.pop()) for queue in rig.queues[1:]] == [0, 1, 1]


# ---- what cannot be reached


@both
def test_a_ring_in_memory_without_a_descriptor_does_not_start(rig: Rig) -> None:
    """EFAULT: the advice about the memory backend, not corruption."""
    rig.queue.stop()
    rig.remap(rig.memory.layout[0], fd=False)
    with pytest.raises(OSError, match="Bad address"):
        rig.start()


@both
def test_a_live_ring_that_loses_its_descriptor_is_unreachable_until_reset(rig: Rig) -> None:
    """UnreachableRing, again and again, even if the memory comes back otherwise."""
    whole = rig.memory.layout[0]
    rig.remap(whole, fd=False)
    for _ in range(2):
        with pytest.raises(UnreachableRing):
            rig.queue.pop()
    rig.remap(whole)
    with pytest.raises(UnreachableRing):
        rig.queue.pop()
    rig.restart()
    rig.request()
    assert len(rig.serve()) == 1


@both
def test_a_live_used_ring_that_becomes_read_only_is_corrupt(rig: Rig) -> None:
    """HOSTILE-025 for a live ring: corrupt until reset."""
    whole = rig.memory.layout[0]
    rig.remap(whole, prot=1)
    with pytest.raises(CorruptRing):
        rig.queue.pop()
    rig.remap(whole)
    with pytest.raises(CorruptRing):
        rig.queue.pop()


@pytest.mark.parametrize(
    ("change", "expected"),
    [("nothing", True), ("idx", False), ("descriptor", False), ("served", False), ("stopped", False), ("away", False)],
)
def test_an_untouched_ring_with_a_doorbell_looks_unshared(rig: Rig, change: str, expected: bool) -> None:
    """share=off in the VMM: the ring reads as zeros although the doorbell rang."""
    rig.queue.pop()
    match change:
        case "idx":
            rig.ring.avail_idx = 1
        case "descriptor":
            rig.ring.write_descriptor(0, Descriptor(0, 1))
        case "served":
            rig.request()
            rig.serve()
            rig.ring.avail_idx = 0
            for slot in range(2):
                rig.ring.write_descriptor(slot, Descriptor(0, 0))
        case "stopped":
            rig.queue.stop()
        case "away":
            rig.unmap(rig.memory.layout[0])
    assert rig.queue.looks_unshared is expected
    if change == "away":
        rig.map(rig.memory.layout[0])


def test_a_queue_index_that_does_not_exist_is_refused(rig: Rig) -> None:
    """Queues are numbered from 0."""
    with pytest.raises(OSError, match="no queue 1"):
        Queue(rig.core, 1)
