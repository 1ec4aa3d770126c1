"""What the checks of both ring formats have in common: requests of all shapes, and many at a time."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from vmmblk.client.queue import Descriptor
from vmmblk.client.request import UNSET_STATUS
from vmmblk.conform.bench import bench
from vmmblk.conform.check import NotOffered, NotTestable, expect
from vmmblk.conform.rings import linked
from vmmblk.conform.target import FAR_SECTOR
from vmmblk.spec import QUEUE_SIZE_MAX, REQUEST_HEADER, DescFlag, RequestType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.conform.bench import Bench, Parcel
    from vmmblk.conform.rings import Used
    from vmmblk.conform.target import Target

__all__ = [
    "UNKNOWN_TYPE",
    "data_not_read",
    "expect_length",
    "failing_read",
    "furnished",
    "header_not_read",
    "long_chain",
    "reads_framed",
    "require_storage",
    "served_full",
    "served_full_of_32768",
    "treadmill",
    "writes_framed",
]

UNKNOWN_TYPE = 0x7FFF_FFF0
"""A request that every device answers, with a status only."""

_TREADMILL_SIZE = 64
_INDICES, _FOREVER = 1 << 16, 1 << 17
_SAMPLE = 1 << 10  # buffers after which one can tell how long the rest will take
_PATTERN = bytes((7 * n + (n >> 8)) & 0xFF for n in range(4096))


def furnished(b: Bench) -> bytes:
    """What the first logical block holds: bytes that all differ from their neighbours, where it can be written."""
    with contextlib.suppress(NotOffered, NotTestable):
        b.target.room(b.target.block_sectors)
        b.call(b.parcel(RequestType.OUT, 0, _pattern(b)))
    return b.call(b.block())


def require_storage(b: Bench) -> None:
    """Raise NotOffered or NotTestable unless the first block keeps what is written to it."""
    b.target.room(b.target.block_sectors)
    if furnished(b) != _pattern(b):
        raise NotTestable("the disk does not keep what is written")


def reads_framed(b: Bench) -> None:
    """Read a block with header, data and status cut and joined in many ways; the bytes come in their order."""
    truth = furnished(b)
    n, header = len(truth), REQUEST_HEADER.size
    framings = [(header,), (5,), (1, 14, 1), (header, 1), (header, n // 2 + 3), (header, n - 1), (8, 8, 100, n - 100)]
    for sizes in framings:
        parcel = b.block()
        if len(parcel.elements(*sizes)) <= b.rings[0].size:
            data = b.call(parcel, sizes=sizes)
            expect(data == truth, f"a read in elements of {told(parcel, sizes)} bytes gives other data")


def writes_framed(b: Bench) -> None:
    """Write a block with header and data cut and joined in many ways; it reads back."""
    require_storage(b)
    n, header = b.target.facts.block_size, REQUEST_HEADER.size
    framings = [(n + header,), (3,), (header,), (header + 1,), (header, n - 1), (header + n - 5,), (10, 6, n // 2 + 1)]
    for turn, sizes in enumerate(framings):
        data = bytes((byte + turn + 1) & 0xFF for byte in _pattern(b))
        parcel = b.parcel(RequestType.OUT, 0, data)
        if len(parcel.elements(*sizes)) <= b.rings[0].size:
            b.call(parcel, sizes=sizes)
            expect(b.call(b.block()) == data, f"a write in elements of {told(parcel, sizes)} bytes stores other data")


def told(parcel: Parcel, sizes: tuple[int, ...]) -> str:
    """The sizes of all elements."""
    return ", ".join(str(each.length) for each in parcel.elements(*sizes))


def long_chain(b: Bench) -> None:
    """Read a block with a chain that is as long as the queue, most of its elements of one byte."""
    truth, size = furnished(b), b.rings[0].size
    if len(truth) < size - 2:
        raise NotTestable(f"the queue has {size} descriptors, and a block {len(truth)} bytes")
    data = b.call(b.block(), sizes=[REQUEST_HEADER.size] + [1] * (size - 3) + [len(truth) - size + 3])
    expect(data == truth, f"a read with a chain of {size} elements gives other data")


def served_full(b: Bench) -> None:
    """Have as many chains in flight as the queue is long, each an indirect table; all of them are used, once."""
    ring = b.rings[0]
    header = b.memory.place(REQUEST_HEADER.pack(UNKNOWN_TYPE, 0, 0))
    statuses = b.memory.place(bytes([UNSET_STATUS]) * ring.size)
    b.memory.allow(statuses, ring.size)
    head = Descriptor(header, REQUEST_HEADER.size)
    tables = [ring.table([head, Descriptor(statuses + i, 1, DescFlag.WRITE)]) for i in range(ring.size)]
    length = len(tables[0])
    block = b.memory.place(b"".join(tables))
    chains = (Descriptor(block + length * i, length, DescFlag.INDIRECT) for i in range(ring.size))
    names = [ring.offer([chain], publish=False) for chain in chains]
    ring.publish()
    b.kick()
    back = sorted(b.take().id for _ in names)
    expect(back == sorted(names), f"of {ring.size} buffers in flight some came back twice, and others never")
    left = b.memory.read(statuses, ring.size).count(UNSET_STATUS)
    expect(not left, f"{left} of {ring.size} buffers came back without a status")


def served_full_of_32768(target: Target, *, packed: bool = False) -> None:
    """Have the largest queue that there can be served when it is full.  Raises NotOffered if the device has it not."""
    with bench(target, packed=packed, live=False) as b:
        size = b.device.select_queue(0)
        if size != QUEUE_SIZE_MAX:
            raise NotOffered(f"the queue has {size} descriptors")
        b.add_ring()
        b.go()
        served_full(b)


def treadmill(b: Bench) -> Iterator[int]:
    """Have the same chains served again and again, half a split ring at a time; yields how many were used so far.

    Raises NotTestable if the indices would take too long to wrap: the queue is short, or the device slow.
    """
    ring = b.split
    if ring.size < _TREADMILL_SIZE:
        raise NotTestable(
            f"the queue has {ring.size} descriptors, and tens of thousands of buffers would take too long"
        )
    began, limit = time.monotonic(), b.target.options.limit / 2
    half = ring.size // 2
    heads = [ring.offer(b.parcel(UNKNOWN_TYPE).chain(), publish=False) for _ in range(half)]
    for head in heads:  # the other half of the available ring names the same chains
        ring.name(head)
    for count in range(half, _FOREVER, half):
        ring.position = count
        ring.publish()
        b.kick()
        back = {b.take().id for _ in range(half)}
        expect(back == set(heads), f"other buffers came back than were offered, before buffer {count:#x}")
        if (time.monotonic() - began) * _INDICES > limit * max(count, _SAMPLE):
            raise NotTestable(f"65536 buffers would take more than {limit:g} s")
        yield count


def expect_length(b: Bench, used: Used, parcel: Parcel) -> None:
    """Expect that as much as ``used`` says was written for a request, from the first writable byte on."""
    room, written = parcel.writable_length, b.written(parcel)
    expect(used.length <= room, f"a used length of {used.length:#x} for a buffer with room for {room:#x} bytes")
    expect(used.length <= written, f"a used length of {used.length:#x} where {written:#x} bytes were written")


def failing_read(b: Bench) -> None:
    """A read beyond the end of the disk claims no bytes that were not written."""
    parcel = b.parcel(RequestType.IN, FAR_SECTOR, room=b.target.facts.block_size)
    used = b.serve(parcel.chain())
    expect_length(b, used, parcel)


def header_not_read(b: Bench) -> None:
    """A header in a writable element is none."""
    truth, parcel = furnished(b), b.block()
    header, data, status = parcel.elements()
    b.memory.allow(header.address, header.length)
    fate = b.fate_of(linked(header._replace(flags=DescFlag.WRITE), data, status), parcel)
    got = b.memory.read(parcel.writable, len(truth))
    expect(got != truth, f"the request in a writable header was carried out: {fate}")


def data_not_read(target: Target, *, packed: bool = False) -> None:
    """Data to be written that lie in a writable element do not get to the disk."""
    target.room(target.block_sectors)
    with bench(target, packed=packed) as b:
        truth = furnished(b)
        data = bytes(byte ^ 0xFF for byte in truth)
        header, status = b.parcel(RequestType.OUT).elements()
        place = b.memory.place(data)
        b.memory.allow(place, len(data))
        fate = b.fate_of(linked(header, Descriptor(place, len(data), DescFlag.WRITE), status))
    with bench(target, packed=packed) as b:
        expect(b.call(b.block()) != data, f"what a writable element held was written to the disk: {fate}")


def _pattern(b: Bench) -> bytes:
    unit = b.target.facts.block_size
    return (_PATTERN * (unit // len(_PATTERN) + 1))[:unit]
