"""Indirect descriptors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.queue import Descriptor
from vmmblk.conform.bench import MEMORY, bench
from vmmblk.conform.check import check, expect
from vmmblk.conform.rings import linked
from vmmblk.conform.traffic import furnished
from vmmblk.spec import DescFlag, Feature

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmmblk.conform.bench import Bench, Parcel
    from vmmblk.conform.target import Target

_SHORT = 8
_NOWHERE = MEMORY * 16
NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT


@check(Feature.INDIRECT_DESC)
def write_flag_in_a_split_ring(target: Target) -> None:
    """WRITE on a descriptor that points at a table is ignored (RING-INDIRECT-001)."""
    with bench(target) as b:
        _write_flag(b)


@check(Feature.INDIRECT_DESC, Feature.RING_PACKED)
def write_flag_in_a_packed_ring(target: Target) -> None:
    """WRITE on a descriptor that points at a table is ignored (RING-INDIRECT-009)."""
    with bench(target, packed=True) as b:
        _write_flag(b)


@check(Feature.INDIRECT_DESC)
def plain_descriptors_first(target: Target) -> None:
    """A chain of plain descriptors may end in a table (RING-INDIRECT-002)."""
    with bench(target) as b:
        truth = furnished(b)
        for plain in range(min(4, b.split.size)):
            parcel = b.block()
            elements = parcel.elements(16, 100, 100)
            rest = b.split.table(elements[plain:])
            chain = linked(*elements[:plain], Descriptor(b.memory.place(rest), len(rest), INDIRECT))
            _expect_read(b, parcel, chain, truth, f"a chain of {plain} descriptors and a table")


@check(Feature.INDIRECT_DESC)
def split_tables_are_chained(target: Target) -> None:
    """The entries of a table, from the first on, are chained by next, which may jump (RING-INDIRECT-003)."""
    with bench(target) as b:
        truth = furnished(b)
        parcel = b.block()
        header, first, second, status = parcel.elements(16, 100, len(truth) - 100)
        nowhere = Descriptor(_NOWHERE, 64, WRITE)
        entries = [
            header._replace(flags=NEXT, next=4),
            second._replace(flags=WRITE | NEXT, next=2),
            status._replace(flags=WRITE, next=3),
            nowhere,
            first._replace(flags=WRITE | NEXT, next=1),
        ]
        table = b.split.literal(entries)
        _expect_read(b, parcel, _pointer(b, table), truth, "a table whose entries lie crosswise")


@check(Feature.INDIRECT_DESC)
def split_tables_end_early(target: Target) -> None:
    """A chain in a table ends with the first entry without NEXT (RING-INDIRECT-004)."""
    with bench(target) as b:
        truth = furnished(b)
        parcel = b.block()
        table = b.split.table(parcel.elements())
        rest = b.split.literal([Descriptor(_NOWHERE, 64, WRITE | NEXT, 1)] * 3)
        _expect_read(b, parcel, _pointer(b, table + rest), truth, "a table with entries left over")


@check(Feature.INDIRECT_DESC, each_ring=True)
def readable_and_writable_entries(target: Target) -> None:
    """A table holds readable and writable entries (RING-INDIRECT-005)."""
    with bench(target) as b:
        truth = furnished(b)
        for sizes in ((16,), (16, 100), (1, 15, 1, 1), ()):
            parcel = b.block()
            _expect_read(b, parcel, [b.table(parcel, *sizes)], truth, "a table")


@check(Feature.INDIRECT_DESC, Feature.RING_PACKED)
def packed_tables_are_sequential(target: Target) -> None:
    """A packed table is read entry by entry to its end, and of its flags only WRITE counts.

    RING-INDIRECT-007, 008, HOSTILE-054.
    """
    with bench(target, packed=True) as b:
        truth = furnished(b)
        for extra in (0, NEXT, INDIRECT, NEXT | INDIRECT, 0xFFFF & ~WRITE):
            parcel = b.block()
            entries = [
                each._replace(flags=each.flags | extra, next=0x7000 + i)
                for i, each in enumerate(parcel.elements(16, 1, 200))
            ]
            table = b.packed.literal(entries)
            _expect_read(b, parcel, _pointer(b, table), truth, f"a table whose entries have flags {extra:#x}, too,")


@check(Feature.INDIRECT_DESC, Feature.RING_PACKED)
def direct_and_indirect_alternate(target: Target) -> None:
    """Lists and tables take turns in one ring, and a table takes one slot (RING-INDIRECT-010, 011)."""
    with bench(target, packed=True, size=_SHORT) as b:
        truth = furnished(b)
        for turn in range(3 * b.packed.size):
            parcel = b.block()
            before = b.packed.taken
            chain = [b.table(parcel)] if turn % 2 else parcel.chain(16)
            _expect_read(b, parcel, chain, truth, "a table" if turn % 2 else "a list")
            step = (b.packed.taken - before) % (2 * b.packed.size)
            expect(step == len(chain), f"a chain of {len(chain)} slots was skipped by {step}")


def _write_flag(b: Bench) -> None:
    truth = furnished(b)
    parcel = b.block()
    pointer = b.table(parcel)
    _expect_read(b, parcel, [pointer._replace(flags=INDIRECT | WRITE)], truth, "a table pointed at with WRITE")


def _pointer(b: Bench, table: bytes) -> list[Descriptor]:
    return [Descriptor(b.memory.place(table), len(table), INDIRECT)]


def _expect_read(b: Bench, parcel: Parcel, chain: Sequence[Descriptor], truth: bytes, what: str) -> None:
    b.serve(chain)
    expect(b.answer(parcel) == truth, f"a read by way of {what} gives other data")
