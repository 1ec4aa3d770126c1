"""What the checks of hostile drivers have in common."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmmblk.client.memory import PAGE
from vmmblk.client.queue import Descriptor
from vmmblk.conform.bench import MEMORY, bench
from vmmblk.conform.check import expect
from vmmblk.conform.rings import PackedRing, linked
from vmmblk.spec import REQUEST_HEADER, DescFlag, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vmmblk.conform.bench import Bench, Fate, Parcel
    from vmmblk.conform.target import Target

__all__ = ["RACES", "areas", "expect_no_data", "flip", "misaligned", "pointer", "race"]

RACES = 30
"""How often to try to catch the device between two looks."""

_FLIPS = 20000
_SLACK = 64
_SHORT = 8


def pointer(b: Bench, table: bytes, length: int | None = None) -> list[Descriptor]:
    """A chain of one indirect table, which says that it has ``length`` bytes."""
    return [Descriptor(b.memory.place(table), len(table) if length is None else length, DescFlag.INDIRECT)]


def areas(b: Bench, size: int) -> list[int]:
    """Three areas of a ring on pages of their own, zeroed, with a little more room than they take."""
    places = []
    for which, length in enumerate(b.layout.lengths(size)):
        start = b.memory.space(length + 2 * _SLACK, PAGE)
        b.memory.write(start, bytes(length + 2 * _SLACK))
        if which == 2 or b.layout is PackedRing:
            b.memory.allow(start, length + 2 * _SLACK)
        places.append(start + _SLACK)
    return places


def misaligned(target: Target, off: Mapping[str, int], *, packed: bool = False) -> None:
    """Start a ring of which one area, then another, lies ``off`` bytes beside its alignment; told in their order."""
    for which, (name, by) in enumerate(off.items()):
        with bench(target, packed=packed, live=False) as b:
            size = min(b.device.select_queue(0), _SHORT)
            places = areas(b, size)
            places[which] += by
            b.add_ring(size=size, areas=places)
            b.go()
            parcel = b.block()
            fate = b.fate_of(parcel.chain(REQUEST_HEADER.size), parcel)
            unused = fate.used is None
            expect(unused or fate.served, f"the {name} lies {by} bytes off its alignment: {fate}")


def expect_no_data(
    target: Target, place: int, reachable: int = 0, *, prepare: Callable[[Bench], None] | None = None
) -> None:
    """Read into a place of which the device may reach only the first bytes; the request must fail, or need a reset."""
    with bench(target) as b:
        b.needs(3)
        if prepare is not None:
            prepare(b)
        parcel = b.block(bait=True)
        b.memory.allow(parcel.status, 1)
        b.memory.allow(place, reachable)
        header, data, status = parcel.elements()
        fate = b.fate_of(linked(header, data._replace(address=place), status), parcel)
        failed = fate.used is not None and fate.status == Status.IOERR
        expect(fate.needs_reset or failed, f"data at {place:#x}, where memory ends at {MEMORY:#x}: {fate}")


def race(b: Bench, offered: Callable[[list[Descriptor]], tuple[list[Descriptor], int]]) -> None:
    """Read with an element that flips between two places, one with room for much, one with little before memory ends.

    ``offered`` makes of elements what is put in the ring, and tells where its second element lies.
    """
    unit = b.target.facts.block_size
    roomy = b.memory.space(4 * unit)
    b.memory.allow(roomy, 4 * unit)
    b.memory.allow(MEMORY - unit, unit)
    words = [struct.pack("<QI", roomy, 4 * unit), struct.pack("<QI", MEMORY - unit, unit)]
    for _ in range(RACES):
        parcel = b.block(bait=True)
        b.memory.allow(parcel.status, 1)
        header, data, status = parcel.elements()
        chain, place = offered([header, data._replace(address=roomy, length=4 * unit), status])
        fate = flip(b, chain, place, words, parcel)
        if fate.needs_reset:
            return
        expect(fate.served or fate.failed, f"a read whose element changes: {fate}")


def flip(b: Bench, chain: Sequence[Descriptor], place: int, words: Sequence[bytes], parcel: Parcel) -> Fate:
    """Offer a chain and, until it is used, store one of ``words`` after the other in a place; what became of it."""
    b.offer(chain)
    turns = iter(range(_FLIPS))

    def decided() -> bool:
        turn = next(turns, None)
        if turn is None:
            return True
        b.memory.write(place, words[turn % len(words)])
        return b.rings[0].has_used

    b.until(decided)
    return b.fate(parcel)
