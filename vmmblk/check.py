"""Conformance checks that any disk can be run through, those of vmmblk and yours.

::

    import asyncio
    from vmmblk.check import check_block

    asyncio.run(check_block(lambda: MyDisk(...)))

Each check gets a disk of its own from ``make``, wrapped as the server wraps it (``filters/checked.py``).  The disks are
written to: hand over scratch ones.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import TYPE_CHECKING

from vmmblk.block import Block, BlockInfo, Operation, operations
from vmmblk.errors import BlockError, Disconnected, IsReadOnly, Unimplemented, Unknown
from vmmblk.filters.checked import Checked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from typing import Any

    Check = Callable[[Checked], Coroutine[Any, Any, None]]

__all__ = ["CheckFailed", "check_block"]

_SPAN = 8
"""Sectors that a disk needs at least to be checked."""


class CheckFailed(AssertionError):
    """A disk breaks the contract; the message says which sentence."""


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

    checks: list[Check] = [_reads_fill_all_buffers, _empty_list, _past_the_end, _ends_with_disconnect]
    checks += [_changes] if writable else [_refuses_changes]
    if writable and stores:
        checks += [_keeps_data, _splits_buffers, _overlaps, _leaves_buffers_alone, _at_the_same_time]
    if writable and Operation.FLUSH in found:
        checks += [_flushes]
    if writable and Operation.DISCARD in found:
        checks += [_discards]
    if writable and Operation.WRITE_ZEROES in found:
        checks += [_zeroes]
    for check in checks:
        disk = Checked(make())
        try:
            await check(disk)
        finally:
            await disk.disconnect()
    if writable and stores and persistent:
        await _persists(make, cached=False)
        if Operation.FLUSH in found:
            await _persists(make, cached=True)


def _check_info(info: BlockInfo) -> None:
    size = info.sector_size
    _require(size >= 512 and size & (size - 1) == 0, f"sector_size is a power of two from 512 up, not {size}")
    _require(
        info.size_sectors >= _SPAN, f"to be checked a disk needs {_SPAN} sectors, this one has {info.size_sectors}"
    )


async def _reads_fill_all_buffers(disk: Checked) -> None:
    """Two reads agree on every byte, whatever the buffers held before."""
    for sector in (0, disk.info.size_sectors // 2, disk.info.size_sectors - 1):
        ones, others = _filled(disk, 1, 0x55), _filled(disk, 1, 0xAA)
        await disk.read(sector, [ones])
        await disk.read(sector, [others])
        _require(ones == others, f"read fills its buffers, but left bytes of sector {sector} as they were")


async def _empty_list(disk: Checked) -> None:
    """A list of any length may be empty, and may contain empty buffers."""
    await disk.read(0, [])
    first, second = _filled(disk, 1, 0x55), _filled(disk, 1, 0xAA)
    await disk.read(0, [memoryview(bytearray()), first, memoryview(bytearray())])
    await disk.read(0, [second])
    _require(first == second, "an empty buffer in the list changes nothing for the others")
    if disk.info.read_write:
        await disk.write(0, [])


async def _past_the_end(disk: Checked) -> None:
    """A range that is not wholly inside fails, and the part that is inside is not written."""
    last = disk.info.size_sectors - 1
    before = await _read(disk, last, 1)
    for sector, count in ((last, 2), (last + 1, 1), (-1, 1), (1 << 62, 1)):
        where = f"{count} sectors from {sector}, outside the disk"
        await _must_fail(disk.read(sector, [_filled(disk, count, 0)]), Unknown, f"reading {where}")
        if disk.info.read_write:
            await _must_fail(disk.write(sector, [_filled(disk, count, 0x77)]), Unknown, f"writing {where}")
    await _must_fail(disk.read(0, [memoryview(bytearray(100))]), Unknown, "reading a part of a sector")
    _require(await _read(disk, last, 1) == before, "a write past the end writes nothing")


async def _ends_with_disconnect(disk: Checked) -> None:
    """After disconnect every call fails with Disconnected."""
    await disk.disconnect()
    await disk.disconnect()
    data = _filled(disk, 1, 0)
    for name, call in (
        ("read", disk.read(0, [data])),
        ("write", disk.write(0, [data])),
        ("write_cached", disk.write_cached(0, [data])),
        ("flush", disk.flush()),
        ("discard", disk.discard(0, 1)),
        ("write_zeroes", disk.write_zeroes(0, 1, unmap=False)),
    ):
        await _must_fail(call, Disconnected, f"{name} after disconnect")


async def _refuses_changes(disk: Checked) -> None:
    """A read-only disk refuses every change with IsReadOnly and keeps its data."""
    before = await _read(disk, 0, 1)
    data = memoryview(bytes(byte ^ 0xFF for byte in before))
    for name, call in (
        ("write", disk.write(0, [data])),
        ("write_cached", disk.write_cached(0, [data])),
        ("discard", disk.discard(0, 1)),
        ("write_zeroes", disk.write_zeroes(0, 1, unmap=False)),
    ):
        await _must_fail(call, IsReadOnly, f"{name} on a read-only disk")
    _require(await _read(disk, 0, 1) == before, "a read-only disk keeps its data")
    _require(not operations(disk) & Operation.DISCARD, "a read-only disk does not offer to discard")


async def _changes(disk: Checked) -> None:
    """A writable disk takes writes, and refuses with Unimplemented only what it does not offer."""
    await disk.write(0, [_pattern(disk, 1, 1)])
    offered = operations(disk)
    for operation, name, call in (
        (Operation.FLUSH, "flush", disk.flush),
        (Operation.DISCARD, "discard", lambda: disk.discard(0, 1)),
        (Operation.WRITE_ZEROES, "write_zeroes", lambda: disk.write_zeroes(0, 1, unmap=False)),
    ):
        if operation in offered:
            await call()
        else:
            await _must_fail(call(), Unimplemented, f"{name}, which this disk does not offer,")


async def _keeps_data(disk: Checked) -> None:
    """What is written is read, at both ends of the disk and in the middle."""
    sectors = (0, disk.info.size_sectors // 2, disk.info.size_sectors - 2, disk.info.size_sectors - 1)
    for seed, sector in enumerate(sectors):
        await disk.write(sector, [_pattern(disk, 1, seed)])
    for seed, sector in enumerate(sectors):
        _require(await _read(disk, sector, 1) == _pattern(disk, 1, seed), f"sector {sector} reads as it was written")


async def _splits_buffers(disk: Checked) -> None:
    """However a range is split into buffers, for writing or reading, it is the same range."""
    data = _pattern(disk, _SPAN, 3)
    start = disk.info.size_sectors - _SPAN
    size = disk.info.sector_size
    for cuts in ((8,), (1,) * 8, (3, 5), (1, 0, 6, 1)):
        edges = [size * edge for edge in itertools.accumulate(cuts, initial=0)]
        await disk.write(start, [_filled(disk, _SPAN, 0)])
        await disk.write(start, [data[begin:end] for begin, end in itertools.pairwise(edges)])
        _require(await _read(disk, start, _SPAN) == data, f"a write in buffers of {cuts} sectors writes them in order")
        target = _filled(disk, _SPAN, 0)
        await disk.read(start, [target[begin:end] for begin, end in itertools.pairwise(edges)])
        _require(target == data, f"a read into buffers of {cuts} sectors fills them in order")


async def _overlaps(disk: Checked) -> None:
    """A write changes its own sectors only; of two that overlap the later one counts."""
    size = disk.info.sector_size
    await disk.write(0, [_filled(disk, _SPAN, 0x11)])
    await disk.write(2, [_filled(disk, 3, 0x22)])
    await disk.write(4, [_filled(disk, 2, 0x33)])
    expected = b"".join(bytes([byte]) * size for byte in (0x11, 0x11, 0x22, 0x22, 0x33, 0x33, 0x11, 0x11))
    _require(await _read(disk, 0, _SPAN) == expected, "a write changes exactly the sectors it names")


async def _leaves_buffers_alone(disk: Checked) -> None:
    """A disk neither changes the buffers of a write nor looks at any buffer after the call."""
    data = _pattern(disk, 2, 5)
    expected = bytes(data)
    await disk.write(1, [data])
    _require(data == expected, "write leaves its buffers as they are")
    data[:] = bytes(len(data))
    _require(await _read(disk, 1, 2) == expected, "a buffer that changes after write has ended changes nothing on disk")
    target = _filled(disk, 2, 0)
    await disk.read(1, [target])
    target[:] = bytes(len(target))
    _require(await _read(disk, 1, 2) == expected, "a buffer that changes after read has ended changes nothing on disk")


async def _at_the_same_time(disk: Checked) -> None:
    """Calls that run at the same time on different sectors do not disturb each other."""
    patterns = [_pattern(disk, 1, seed) for seed in range(_SPAN)]
    await asyncio.gather(*(disk.write(sector, [data]) for sector, data in enumerate(patterns)))
    targets = [_filled(disk, 1, 0) for _ in patterns]
    await asyncio.gather(*(disk.read(sector, [target]) for sector, target in enumerate(targets)))
    _require(targets == patterns, "calls at the same time on different sectors do not disturb each other")


async def _flushes(disk: Checked) -> None:
    """What write_cached wrote is read at once, and after flush."""
    data = _pattern(disk, 2, 7)
    await disk.write_cached(3, [data])
    before = await _read(disk, 3, 2)
    await disk.flush()
    after = await _read(disk, 3, 2)
    _require(before == after, "flush changes no data")


async def _discards(disk: Checked) -> None:
    """Discarded sectors can be read and written; the others keep their data."""
    last = disk.info.size_sectors
    await disk.write(0, [_pattern(disk, _SPAN, 9)])
    before = await _read(disk, 0, _SPAN)
    size = disk.info.sector_size
    await disk.discard(2, 3)
    after = await _read(disk, 0, _SPAN)
    outside = (slice(0, 2 * size), slice(5 * size, None))
    _require(all(before[part] == after[part] for part in outside), "discard leaves the sectors around it alone")
    await disk.discard(last - 1, 1)
    await disk.discard(0, 0)
    await disk.write(2, [_pattern(disk, 3, 10)])
    await _must_fail(disk.discard(last - 1, 2), Unknown, "discarding past the end")


async def _zeroes(disk: Checked) -> None:
    """After write_zeroes the sectors read as zeroes, and the others keep their data."""
    size = disk.info.sector_size
    for unmap in (False, True):
        await disk.write(0, [_pattern(disk, _SPAN, 11)])
        before = await _read(disk, 0, _SPAN)
        await disk.write_zeroes(2, 3, unmap)
        expected = before[: 2 * size] + bytes(3 * size) + before[5 * size :]
        _require(await _read(disk, 0, _SPAN) == expected, f"write_zeroes(unmap={unmap}) zeroes the sectors it names")
    await _must_fail(disk.write_zeroes(disk.info.size_sectors, 1, unmap=False), Unknown, "zeroing past the end")


async def _persists(make: Callable[[], Block], *, cached: bool) -> None:
    """What was written, or written cached and flushed, is there when the medium is opened again."""
    disk = Checked(make())
    data = _pattern(disk, 2, 13 + cached)
    if cached:
        await disk.write_cached(1, [data])
        await disk.flush()
    else:
        await disk.write(1, [data])
    await disk.disconnect()
    again = Checked(make())
    found = await _read(again, 1, 2)
    await again.disconnect()
    _require(found == data, "what was written is there when the disk is opened again")


def _pattern(disk: Checked, sectors: int, seed: int) -> memoryview:
    """Bytes in which every sector, and every seed, is different."""
    size = disk.info.sector_size
    whole = b"".join((seed * 1000 + sector).to_bytes(8, "big") * (size // 8) for sector in range(1, sectors + 1))
    return memoryview(bytearray(whole))


def _filled(disk: Checked, sectors: int, byte: int) -> memoryview:
    return memoryview(bytearray([byte]) * (sectors * disk.info.sector_size))


async def _read(disk: Checked, sector_start: int, sectors: int) -> bytes:
    target = _filled(disk, sectors, 0xEE)
    await disk.read(sector_start, [target])
    return bytes(target)


async def _must_fail(call: Awaitable[None], error: type[BlockError], what: str) -> None:
    try:
        await call
    except error:
        return
    except BlockError as exc:
        raise CheckFailed(f"{what} fails with {error.__name__}, not with {type(exc).__name__}") from exc
    raise CheckFailed(f"{what} fails with {error.__name__}; here it succeeded")


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise CheckFailed(f"broken: {sentence}")
