"""Conformance checks that any disk can be run through, those of vmmblk and yours.

::

    import asyncio
    from vmmblk.check import check_block

    asyncio.run(check_block(lambda: MyDisk(...)))

Each check gets a disk of its own from ``make``, wrapped as the server wraps it (``filters/checked.py``).  The disks are
written to: hand over scratch ones.  Of a disk with zones all are reset.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from vmmblk.block import Block, BlockInfo, Lifetime, Operation, operations
from vmmblk.check.helpers import CheckFailed, filled, must_fail, pattern, read, require
from vmmblk.check.zones import check_zones
from vmmblk.errors import Disconnected, IsReadOnly, Unimplemented, Unknown
from vmmblk.filters.checked import Checked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    Check = Callable[[Checked], Coroutine[Any, Any, None]]

__all__ = ["CheckFailed", "check_block"]

_SPAN = 8
"""Sectors that a disk needs at least to be checked."""


async def check_block(make: Callable[[], Block], *, stores: bool = True, persistent: bool = False) -> None:
    """Run every check that applies to what ``make`` gives: a new, connected disk of at least 8 sectors each time.

    ``stores=False`` is for a disk that does not give back what was written.  ``persistent`` says that ``make`` opens
    the same medium each time, so that what was written must be there after ``disconnect``.

    Raises: CheckFailed with a sentence, or whatever else the disk raises where it should not.
    """
    probe = Checked(make())
    info = probe.info
    writable = info.read_write
    found = operations(probe)
    await probe.disconnect()
    _check_info(info)

    checks: list[Check] = [_reads_fill_all_buffers, _empty_list, _past_the_end, _ends_with_disconnect, _tells_of_itself]
    if Operation.ZONES in found:
        await check_zones(make, stores=stores, persistent=persistent)
    elif writable:
        checks += [_changes]
        checks += [_keeps_data, _splits_buffers, _overlaps, _leaves_buffers_alone, _at_the_same_time] if stores else []
        checks += [_flushes] if Operation.FLUSH in found else []
        checks += [_discards] if Operation.DISCARD in found else []
        checks += [_zeroes] if Operation.WRITE_ZEROES in found else []
        checks += [_erases] if Operation.SECURE_ERASE in found else []
    if not writable:
        checks += [_refuses_changes]
    for check in checks:
        disk = Checked(make())
        try:
            await check(disk)
        finally:
            await disk.disconnect()
    if writable and stores and persistent and Operation.ZONES not in found:
        await _persists(make, found)


def _check_info(info: BlockInfo) -> None:
    size = info.sector_size
    require(size >= 512 and size & (size - 1) == 0, f"sector_size is a power of two from 512 up, not {size}")
    require(info.size_sectors >= _SPAN, f"to be checked a disk needs {_SPAN} sectors, this one has {info.size_sectors}")


async def _reads_fill_all_buffers(disk: Checked) -> None:
    """Two reads agree on every byte, whatever the buffers held before."""
    for sector in (0, disk.info.size_sectors // 2, disk.info.size_sectors - 1):
        ones, others = filled(disk, 1, 0x55), filled(disk, 1, 0xAA)
        await disk.read(sector, [ones])
        await disk.read(sector, [others])
        require(ones == others, f"read fills its buffers, but left bytes of sector {sector} as they were")


async def _empty_list(disk: Checked) -> None:
    """A list of any length may be empty, and may contain empty buffers."""
    await disk.read(0, [])
    first, second = filled(disk, 1, 0x55), filled(disk, 1, 0xAA)
    await disk.read(0, [memoryview(bytearray()), first, memoryview(bytearray())])
    await disk.read(0, [second])
    require(first == second, "an empty buffer in the list changes nothing for the others")
    if disk.info.read_write:
        await disk.write(0, [])


async def _past_the_end(disk: Checked) -> None:
    """A range that is not wholly inside fails, and the part that is inside is not written."""
    last = disk.info.size_sectors - 1
    before = await read(disk, last, 1)
    for sector, count in ((last, 2), (last + 1, 1), (-1, 1), (1 << 62, 1)):
        where = f"{count} sectors from {sector}, outside the disk"
        await must_fail(disk.read(sector, [filled(disk, count, 0)]), Unknown, f"reading {where}")
        if disk.info.read_write:
            await must_fail(disk.write(sector, [filled(disk, count, 0x77)]), Unknown, f"writing {where}")
    await must_fail(disk.read(0, [memoryview(bytearray(100))]), Unknown, "reading a part of a sector")
    require(await read(disk, last, 1) == before, "a write past the end writes nothing")


async def _ends_with_disconnect(disk: Checked) -> None:
    """After disconnect every call fails with Disconnected."""
    await disk.disconnect()
    await disk.disconnect()
    data = filled(disk, 1, 0)
    for name, call in (
        ("read", disk.read(0, [data])),
        ("write", disk.write(0, [data])),
        ("write_cached", disk.write_cached(0, [data])),
        ("flush", disk.flush()),
        ("discard", disk.discard(0, 1)),
        ("write_zeroes", disk.write_zeroes(0, 1, unmap=False)),
        ("secure_erase", disk.secure_erase(0, 1)),
        ("lifetime", disk.lifetime()),
    ):
        await must_fail(call, Disconnected, f"{name} after disconnect")


async def _refuses_changes(disk: Checked) -> None:
    """A read-only disk refuses every change with IsReadOnly and keeps its data."""
    before = await read(disk, 0, 1)
    data = memoryview(bytes(byte ^ 0xFF for byte in before))
    for name, call in (
        ("write", disk.write(0, [data])),
        ("write_cached", disk.write_cached(0, [data])),
        ("discard", disk.discard(0, 1)),
        ("write_zeroes", disk.write_zeroes(0, 1, unmap=False)),
        ("secure_erase", disk.secure_erase(0, 1)),
    ):
        await must_fail(call, IsReadOnly, f"{name} on a read-only disk")
    require(await read(disk, 0, 1) == before, "a read-only disk keeps its data")
    changes = Operation.DISCARD | Operation.WRITE_ZEROES | Operation.SECURE_ERASE
    require(not operations(disk) & changes, "a read-only disk does not offer to discard, to zero or to erase")


async def _changes(disk: Checked) -> None:
    """A writable disk takes writes, and refuses with Unimplemented only what it does not offer."""
    await disk.write(0, [pattern(disk, 1, 1)])
    offered = operations(disk)
    for operation, name, call in (
        (Operation.FLUSH, "flush", disk.flush),
        (Operation.DISCARD, "discard", lambda: disk.discard(0, 1)),
        (Operation.WRITE_ZEROES, "write_zeroes", lambda: disk.write_zeroes(0, 1, unmap=False)),
    ):
        if operation in offered:
            await call()
        else:
            await must_fail(call(), Unimplemented, f"{name}, which this disk does not offer,")


async def _keeps_data(disk: Checked) -> None:
    """What is written is read, at both ends of the disk and in the middle."""
    sectors = (0, disk.info.size_sectors // 2, disk.info.size_sectors - 2, disk.info.size_sectors - 1)
    for seed, sector in enumerate(sectors):
        await disk.write(sector, [pattern(disk, 1, seed)])
    for seed, sector in enumerate(sectors):
        require(await read(disk, sector, 1) == pattern(disk, 1, seed), f"sector {sector} reads as it was written")


async def _splits_buffers(disk: Checked) -> None:
    """However a range is split into buffers, for writing or reading, it is the same range."""
    data = pattern(disk, _SPAN, 3)
    start = disk.info.size_sectors - _SPAN
    size = disk.info.sector_size
    for cuts in ((8,), (1,) * 8, (3, 5), (1, 0, 6, 1)):
        edges = [size * edge for edge in itertools.accumulate(cuts, initial=0)]
        await disk.write(start, [filled(disk, _SPAN, 0)])
        await disk.write(start, [data[begin:end] for begin, end in itertools.pairwise(edges)])
        require(await read(disk, start, _SPAN) == data, f"a write in buffers of {cuts} sectors writes them in order")
        target = filled(disk, _SPAN, 0)
        await disk.read(start, [target[begin:end] for begin, end in itertools.pairwise(edges)])
        require(target == data, f"a read into buffers of {cuts} sectors fills them in order")


async def _overlaps(disk: Checked) -> None:
    """A write changes its own sectors only; of two that overlap the later one counts."""
    size = disk.info.sector_size
    await disk.write(0, [filled(disk, _SPAN, 0x11)])
    await disk.write(2, [filled(disk, 3, 0x22)])
    await disk.write(4, [filled(disk, 2, 0x33)])
    expected = b"".join(bytes([byte]) * size for byte in (0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x11, 0x11))
    require(await read(disk, 0, _SPAN) == expected, "a write changes exactly the sectors it names")


async def _leaves_buffers_alone(disk: Checked) -> None:
    """A disk neither changes the buffers of a write nor looks at any buffer after the call."""
    data = pattern(disk, 2, 5)
    expected = bytes(data)
    await disk.write(1, [data])
    require(data == expected, "write leaves its buffers as they are")
    data[:] = bytes(len(data))
    require(await read(disk, 1, 2) == expected, "a buffer that changes after write has ended changes nothing on disk")
    target = filled(disk, 2, 0)
    await disk.read(1, [target])
    target[:] = bytes(len(target))
    require(await read(disk, 1, 2) == expected, "a buffer that changes after read has ended changes nothing on disk")


async def _at_the_same_time(disk: Checked) -> None:
    """Calls that run at the same time on different sectors do not disturb each other."""
    patterns = [pattern(disk, 1, seed) for seed in range(_SPAN)]
    await asyncio.gather(*(disk.write(sector, [data]) for sector, data in enumerate(patterns)))
    targets = [filled(disk, 1, 0) for _ in patterns]
    await asyncio.gather(*(disk.read(sector, [target]) for sector, target in enumerate(targets)))
    require(targets == patterns, "calls at the same time on different sectors do not disturb each other")


async def _flushes(disk: Checked) -> None:
    """What write_cached wrote is read at once, and after flush."""
    data = pattern(disk, 2, 7)
    await disk.write_cached(3, [data])
    before = await read(disk, 3, 2)
    await disk.flush()
    after = await read(disk, 3, 2)
    require(before == after, "flush changes no data")


async def _discards(disk: Checked) -> None:
    """Discarded sectors can be read and written; the others keep their data."""
    await _forgets(disk, "discard", disk.discard)


async def _erases(disk: Checked) -> None:
    """What was erased securely is never read again; the others keep their data."""
    before, after = await _forgets(disk, "secure_erase", disk.secure_erase)
    size = disk.info.sector_size
    for sector in range(2, 5):
        part = slice(sector * size, (sector + 1) * size)
        require(before[part] != after[part], "what was erased securely is never read again")


async def _forgets(disk: Checked, name: str, call: Callable[[int, int], Awaitable[None]]) -> tuple[bytes, bytes]:
    """Forget three sectors from the third on; what the first sectors held before and after that."""
    end, size = disk.info.size_sectors, disk.info.sector_size
    await disk.write(0, [pattern(disk, _SPAN, 9)])
    before = await read(disk, 0, _SPAN)
    await call(2, 3)
    after = await read(disk, 0, _SPAN)
    outside = (slice(0, 2 * size), slice(5 * size, None))
    require(all(before[part] == after[part] for part in outside), f"{name} leaves the sectors around it alone")
    await call(end - 1, 1)
    await call(0, 0)
    require(await read(disk, 0, _SPAN) == after, f"{name} of no sectors changes none")
    await disk.write(2, [pattern(disk, 3, 10)])
    await must_fail(call(end - 1, 2), Unknown, f"{name} past the end")
    return before, after


async def _zeroes(disk: Checked) -> None:
    """After write_zeroes the sectors read as zeroes, and the others keep their data."""
    size, end = disk.info.sector_size, disk.info.size_sectors
    for unmap in (False, True):
        await disk.write(0, [pattern(disk, _SPAN, 11)])
        before = await read(disk, 0, _SPAN)
        await disk.write_zeroes(2, 3, unmap)
        await disk.write_zeroes(1, 0, unmap)
        expected = before[: 2 * size] + bytes(3 * size) + before[5 * size :]
        require(await read(disk, 0, _SPAN) == expected, f"write_zeroes(unmap={unmap}) zeroes the sectors it names")
        await disk.write(end - 1, [pattern(disk, 1, 12)])
        await disk.write_zeroes(end - 1, 1, unmap)
        require(await read(disk, end - 1, 1) == bytes(size), f"write_zeroes(unmap={unmap}) zeroes the last sector")
    if Operation.FLUSH in operations(disk):
        await disk.write_cached(0, [pattern(disk, 1, 13)])
        await disk.write_zeroes(0, 1, unmap=False)
        await disk.flush()
        require(await read(disk, 0, 1) == bytes(size), "a flush does not bring back what was zeroed after write_cached")
    await must_fail(disk.write_zeroes(end, 1, unmap=False), Unknown, "zeroing past the end")


async def _tells_of_itself(disk: Checked) -> None:
    """A serial is ASCII and at most 20 characters; a lifetime is one."""
    if Operation.IDENTIFY in operations(disk):
        serial = disk.identify()
        require(serial.isascii() and len(serial) <= 20, f"a serial is ASCII, at most 20 characters, not {serial!r}")
    if Operation.LIFETIME in operations(disk):
        worn = await disk.lifetime()
        require(isinstance(worn, Lifetime), f"lifetime gives a Lifetime, not {worn!r}")


async def _persists(make: Callable[[], Block], found: Operation) -> None:
    """What was written, written cached and flushed, or zeroed, is there when the medium is opened again."""
    disk = Checked(make())
    expected = [pattern(disk, 2, 14)]
    await disk.write(1, expected)
    if Operation.FLUSH in found:
        expected.append(pattern(disk, 2, 15))
        await disk.write_cached(3, expected[1:])
        await disk.flush()
    if Operation.WRITE_ZEROES in found:
        await disk.write(0, [pattern(disk, 1, 16)])
        await disk.write_zeroes(0, 1, unmap=True)
    await disk.disconnect()
    again = Checked(make())
    try:
        kept = await read(again, 1, 2 * len(expected))
        require(kept == b"".join(expected), "what was written is there when the disk is opened again")
        if Operation.WRITE_ZEROES in found:
            zeroed = await read(again, 0, 1)
            require(zeroed == bytes(len(zeroed)), "what was zeroed is zero when the disk is opened again")
    finally:
        await again.disconnect()
