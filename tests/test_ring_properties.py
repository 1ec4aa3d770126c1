"""Properties of the ring: every legal chain goes through it byte for byte, and no garbage leads out of guest memory."""

from __future__ import annotations

import contextlib
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rings import INDIRECT, NEXT, PAGE, WRITE, Descriptor, Life, Range, Rig, Segment

from vmmblk.errors import BadRequest
from vmmblk.request import Limits, Read, Write, parse
from vmmblk.ring import CorruptRing
from vmmblk.spec import REQUEST_HEADER, DescFlag, Feature, RequestType

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from vmmblk.ring import Chain

    Draw = Callable[[st.SearchStrategy[Any]], Any]

SIZE = 64
RINGS = Range(0, 32 * PAGE)
BUFFERS = Range(1 << 32, 16 * PAGE)  # where chains get their elements from, mapped in random pieces
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Element(NamedTuple):
    """An element of a chain to be."""

    length: int
    writable: bool


@st.composite
def chains(draw: st.DrawFn, readable: int, writable: int) -> list[Element]:
    """The bytes of a request cut into elements, empty ones among them; at most as long as the queue."""
    elements: list[Element] = []
    for total, is_writable in ((readable, False), (writable, True)):
        cuts = sorted(draw(st.lists(st.integers(0, total), max_size=12)))
        edges = [0, *cuts, total]
        pieces = [end - start for start, end in pairwise(edges)]
        elements += [Element(length, is_writable) for length in pieces if length or draw(st.booleans())]
    return elements


@st.composite
def pieces(draw: st.DrawFn) -> list[Range]:
    """BUFFERS in some regions."""
    cuts = sorted(draw(st.sets(st.integers(1, 15), max_size=5)))
    edges = [0, *cuts, 16]
    return [Range(BUFFERS.iova + start * PAGE, (end - start) * PAGE) for start, end in pairwise(edges)]


def place(draw: Draw, elements: list[Element]) -> list[Segment]:
    """Addresses for elements, none overlapping, in random order with random gaps."""
    order = draw(st.permutations(range(len(elements))))
    where = BUFFERS.iova
    at = [0] * len(elements)
    for index in order:
        where += draw(st.integers(0, 100))
        at[index] = where
        where += elements[index].length
    return [Segment(at[index], element.length, element.writable) for index, element in enumerate(elements)]


def scatter(rig: Rig, segments: list[Segment], data: bytes) -> None:
    """Store data into segments of guest memory."""
    for segment in segments:
        rig.memory.write(segment.iova, data[: segment.length])
        data = data[segment.length :]


def gather(rig: Rig, segments: list[Segment]) -> bytes:
    """Load what segments hold."""
    return b"".join(rig.memory.read(segment.iova, segment.length) for segment in segments)


def do(request: Read | Write, chain: Chain, disk: bytearray) -> int:
    """Serve a read or a write from bytes; returns how much was written into the chain."""
    at = request.sector * 512
    if isinstance(request, Write):
        disk[at : at + chain.readable] = b"".join(chain.views_in)
        return 0
    for view in chain.views_out:
        view[:] = disk[at : at + len(view)]
        at += len(view)
    return chain.writable


@quick
@given(st.data())
def test_any_legal_chain_carries_its_bytes(data: st.DataObject) -> None:
    """RING-SPLIT-004, -013, -014, RING-INDIRECT-002, -003, -005, HOSTILE-023: ring and parser, byte for byte."""
    sectors, sector = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 8))
    kind = data.draw(st.sampled_from([RequestType.IN, RequestType.OUT]))
    header = REQUEST_HEADER.pack(kind, 0, sector)
    payload = data.draw(st.randoms(use_true_random=False)).randbytes(512 * sectors)
    told = header + (payload if kind == RequestType.OUT else b"")
    room = 1 + (512 * sectors if kind == RequestType.IN else 0)
    segments = place(data.draw, data.draw(chains(len(told), room)))
    life = Life(size=SIZE, packed=data.draw(st.booleans()))
    with Rig(layout=(RINGS, BUFFERS), pieces=(RINGS, *data.draw(pieces())), life=life) as rig:
        inputs = [segment for segment in segments if not segment.writable]
        outputs = [segment for segment in segments if segment.writable]
        rig.memory.write(BUFFERS.iova, b"\xee" * BUFFERS.size)
        scatter(rig, inputs, told)
        head = offer(data.draw, rig, segments)
        chain = rig.pop_one()
        assert chain.reachable
        request = parse(chain.header, chain.readable, chain.writable, Limits(Feature.VERSION_1.mask))
        assert isinstance(request, Read if kind == RequestType.IN else Write)
        assert (request.sector, request.length) == (sector, 512 * sectors)
        disk = bytearray(16 * 512)
        disk[512 * sector : 512 * (sector + sectors)] = payload if kind == RequestType.IN else bytes(512 * sectors)
        written = do(request, chain, disk)
        rig.complete(chain, written=written)
        assert rig.ring.get_used() == [(head, room)]
        expected = (payload if kind == RequestType.IN else b"") + b"\0"
        assert gather(rig, outputs) == expected
        assert disk[512 * sector : 512 * (sector + sectors)] == payload
        scatter(rig, outputs, b"\xee" * room)
        scatter(rig, inputs, b"\xee" * len(told))
        assert rig.memory.read(*BUFFERS) == b"\xee" * BUFFERS.size


def offer(draw: Draw, rig: Rig, segments: list[Segment]) -> int:
    """Make a chain available: direct, or with its tail in an indirect table whose entries are in any order.

    In a packed ring it is direct or in a table, and a table is in sequence.
    """
    packed = rig.life.packed
    direct = draw(st.sampled_from([0, len(segments)]) if packed else st.integers(0, len(segments)))
    flags = [(WRITE if segment.writable else 0) | NEXT for segment in segments]
    flags[-1] &= ~NEXT
    all_of_them = [
        Descriptor(segment.iova, segment.length, flag) for segment, flag in zip(segments, flags, strict=True)
    ]
    tail = all_of_them[direct:]
    if not tail:
        return rig.offer_raw(*all_of_them)
    slots = [*range(len(tail))] if packed else [0, *draw(st.permutations(range(1, len(tail))))]
    table = [Descriptor(0, 0)] * len(tail)
    for position, descriptor in enumerate(tail):
        following = slots[position + 1] if position + 1 < len(tail) else 0
        table[slots[position]] = descriptor._replace(next=following)
    last = Descriptor(rig.table(*table), 16 * len(tail), INDIRECT | draw(st.sampled_from([0, WRITE])))
    return rig.offer_raw(*all_of_them[:direct], last)


# ---- garbage

interesting = st.one_of(
    st.integers(0, RINGS.size),
    st.integers(RINGS.size - 64, RINGS.size + 64),
    st.integers(BUFFERS.iova - 64, BUFFERS.iova + BUFFERS.size + 64),
    st.integers((1 << 64) - 4096, (1 << 64) - 1),
    st.integers(0, (1 << 64) - 1),
)
lengths = st.one_of(st.integers(0, 64), st.integers(0, 8 * PAGE), st.integers(0, 0xFFFF_FFFF))
descriptors = st.builds(
    Descriptor,
    interesting,
    st.one_of(lengths, lengths.map(lambda n: n & ~15)),
    st.one_of(st.integers(0, 7), st.integers(0, 0xFFFF)),
    st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)),
)


@quick
@given(
    direct=st.lists(descriptors, min_size=1, max_size=12),
    table=st.lists(descriptors, min_size=1, max_size=8),
    heads=st.lists(st.one_of(st.integers(0, 8), st.integers(0, 0xFFFF)), max_size=8),
    jump=st.one_of(st.just(None), st.integers(0, 0xFFFF)),
    regions=pieces(),
    noise=st.binary(max_size=200),
    limits=st.sampled_from([0, (1 << 64) - 1]),
)
def test_garbage_is_popped_or_refused(
    *,
    direct: list[Descriptor],
    table: list[Descriptor],
    heads: list[int],
    jump: int | None,
    regions: list[Range],
    noise: bytes,
    limits: int,
) -> None:
    """HOSTILE-001 to -034: a chain that holds what it says, or CorruptRing; memory unmapped is never touched."""
    hole = regions[-1]
    with Rig(layout=(RINGS, BUFFERS), pieces=(RINGS, *regions[:-1]), life=Life(size=16)) as rig:
        rig.memory.write(BUFFERS.iova, noise)
        rig.memory.write(hole.iova, b"\xaa" * hole.size)
        where = rig.table(*table)
        for slot, descriptor in enumerate(direct):
            aimed = descriptor.flags & DescFlag.INDIRECT and slot % 2
            rig.ring.write_descriptor(slot, descriptor._replace(address=where) if aimed else descriptor)
        for head in heads:
            rig.ring.offer(head)
        rig.ring.publish()
        if jump is not None:
            rig.ring.avail_idx = jump
        with contextlib.suppress(CorruptRing):
            for _ in range(4):
                for chain in rig.queue.pop():
                    use(rig, chain, limits)
        assert rig.queue.busy == 0
        assert rig.memory.read(*hole) == b"\xaa" * hole.size


def use(rig: Rig, chain: Chain, features: int) -> None:
    """Treat a chain as the worker does: parse it, touch every byte it has, complete it."""
    assert len(chain.header) <= 16
    if chain.reachable:
        assert sum(map(len, chain.views_in)) == chain.readable
        assert sum(map(len, chain.views_out)) == chain.writable
        for view in chain.views_out:
            view[:] = bytes(len(view))
    else:
        assert (chain.views_in, chain.views_out) == ([], [])
    with contextlib.suppress(BadRequest):
        parse(chain.header, chain.readable, chain.writable, Limits(features))
    rig.complete(chain, status=1, written=chain.writable)


@quick
@given(
    size=st.integers(1, 9),
    slots=st.lists(descriptors, min_size=1, max_size=9),
    table=st.lists(descriptors, min_size=1, max_size=8),
    laps=st.lists(st.sampled_from([0, 1 << 7, 1 << 15, 1 << 7 | 1 << 15]), min_size=9, max_size=9),
    wish=st.integers(0, 0xFFFF_FFFF),
    event_idx=st.booleans(),
    regions=pieces(),
)
def test_garbage_in_a_packed_ring_is_popped_or_refused(
    *,
    size: int,
    slots: list[Descriptor],
    table: list[Descriptor],
    laps: list[int],
    wish: int,
    event_idx: bool,
    regions: list[Range],
) -> None:
    """HOSTILE-049 to -061: a list that holds what it says, or CorruptRing; no more in flight than there are slots."""
    hole = regions[-1]
    life = Life(size=size, event_idx=event_idx, packed=True)
    with Rig(layout=(RINGS, BUFFERS), pieces=(RINGS, *regions[:-1]), life=life) as rig:
        rig.memory.write(hole.iova, b"\xaa" * hole.size)
        rig.ring.set_driver_event(wish >> 16, wish & 0xFFFF)
        where = rig.table(*table)
        for slot, descriptor in enumerate(slots[:size]):
            aimed = descriptor.flags & DescFlag.INDIRECT and slot % 2
            placed = descriptor._replace(address=where) if aimed else descriptor
            marks = descriptor.flags & ~(1 << 7 | 1 << 15) | laps[slot]
            rig.ring.write_descriptor(slot, placed._replace(flags=marks))
        with contextlib.suppress(CorruptRing):
            for _ in range(4):
                taken = rig.queue.pop()
                assert len(taken) <= size
                for chain in taken:
                    use(rig, chain, 0)
        assert rig.queue.busy == 0
        assert rig.memory.read(*hole) == b"\xaa" * hole.size
