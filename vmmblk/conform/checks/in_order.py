"""Buffers that are used in the order in which they were made available (IN_ORDER)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.client.request import UNSET_STATUS
from vmmblk.conform.bench import bench
from vmmblk.conform.check import check, expect
from vmmblk.conform.rings import PackedRing, Ring, SplitRing
from vmmblk.conform.traffic import UNKNOWN_TYPE
from vmmblk.spec import SECTOR_SIZE, Feature, RequestType

if TYPE_CHECKING:
    from vmmblk.conform.bench import Bench, Parcel
    from vmmblk.conform.target import Target

_LONG = 64
_ROUNDS = 8
_BIG = 64 << 10
_STALE = 0xFF


@check(Feature.IN_ORDER)
def split_ring(target: Target) -> None:
    """Long and short requests come back in their order; one element for several names the last, all of them finished.

    RING-INORDER-001, 002, 003, 006.
    """
    with bench(target, features=target.mask(Feature.IN_ORDER), packed=False, size=_LONG) as b:
        _in_order(b)


@check(Feature.IN_ORDER, Feature.RING_PACKED)
def packed_ring(target: Target) -> None:
    """Long and short requests come back in their order; one descriptor for several names the last, all slots skipped.

    RING-INORDER-001, 004, 005, 006.
    """
    with bench(target, features=target.mask(Feature.IN_ORDER), packed=True, size=_LONG) as b:
        _in_order(b)


def _in_order(b: Bench) -> None:
    for _ in range(_ROUNDS):
        _round(b)


def _round(b: Bench) -> None:
    """Fill half the ring with requests of all kinds, and take them as they come back."""
    ring = b.rings[0]
    if isinstance(ring, SplitRing):
        b.memory.write(ring.used + 4, bytes([_STALE]) * 8 * ring.size)
    parcels = [_request(b, turn) for turn in range(max(1, ring.size // 6))]
    names, starts = [], []
    for each in parcels:
        starts.append(ring.position)
        names.append(ring.offer(each.chain(), publish=False))
    ring.publish()
    b.kick()
    done, skipped = 0, []
    while done < len(names):
        count = _next_batch(b, names[done:])
        expect(count, f"{done} of {len(names)} buffers came back, no more")
        left = [each for each in parcels[done : done + count] if b.status_of(each) == UNSET_STATUS]
        expect(not left, f"a batch of {count} buffers came back, {len(left)} of them without a status")
        skipped += starts[done + 1 : done + count]
        done += count
    odd = [at for at in skipped if _is_used(ring, at)]
    expect(not odd, "a buffer came back before one that was made available earlier")


def _next_batch(b: Bench, waiting: list[int]) -> int:
    """How many buffers come back next; 0 if none does in time."""
    counts = [0]

    def come() -> int:
        counts.append(b.rings[0].take_batch(waiting))
        return counts[-1]

    b.until(come)
    return counts[-1]


def _is_used(ring: Ring, position: int) -> bool:
    """Whether the device has said anything where a batch lets it skip."""
    if isinstance(ring, PackedRing):
        return ring.is_used(position)
    return isinstance(ring, SplitRing) and ring.used_element(position).id & 0xFF != _STALE


def _request(b: Bench, turn: int) -> Parcel:
    """One of several requests, some of which take longer than others."""
    unit, capacity = b.target.facts.block_size, b.target.facts.capacity * SECTOR_SIZE
    if turn % 4 == 0 and capacity >= unit:
        return b.parcel(RequestType.IN, room=min(_BIG, capacity) // unit * unit)
    if turn % 4 == 1 and b.has(Feature.BLK_FLUSH):
        return b.parcel(RequestType.FLUSH)
    if turn % 4 == 2:
        return b.block()
    return b.parcel(UNKNOWN_TYPE)
