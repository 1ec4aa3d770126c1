"""Hostile drivers: DISCARD, WRITE_ZEROES and SECURE_ERASE with ranges that cannot be."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.ranges import KINDS, SECURE_ERASE, WRITE_ZEROES, Eraser, erasers, segments
from vmmblk.conform.requests import ask, expect_answer, expect_data, expect_intact, pattern, reach
from vmmblk.conform.target import SCRATCH_SECTORS, TAIL_SECTORS
from vmmblk.spec import DISCARD_SEGMENT, SECTOR_SIZE, WRITE_ZEROES_FLAG_UNMAP, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from vmmblk.conform.target import Target

_REFUSED = (Status.IOERR, Status.UNSUPP)
_MANY_SEGMENTS = 1 << 16
_WRAPS_32_BITS = 1 << 23
"""So many sectors of 512 bytes are 2^32 bytes."""


@check()
def not_negotiated(target: Target) -> None:
    """A request with ranges whose feature was not negotiated gets UNSUPP and touches nothing (HOSTILE-172)."""
    reach(target, target.block_sectors)
    features = tuple(kind.feature for kind in KINDS)
    with target.driver(features=target.mask(without=features)) as driver:
        before = driver.read(0, target.facts.block_size)
        for kind in KINDS:
            answer = ask(driver, kind.type, 0, segments((0, target.block_sectors)))
            expect_intact(driver, 0, before, f"{kind.type.name}, not negotiated")
            expect_answer(answer, f"{kind.type.name}, not negotiated", Status.UNSUPP)


@check()
def data_of_odd_length(target: Target) -> None:
    """No data, or data that is not whole segments, gets IOERR or UNSUPP and touches nothing (HOSTILE-173)."""

    def payloads(eraser: Eraser) -> dict[str, bytes]:
        one = segments((0, eraser.unit))
        return {"no data": b"", "15 bytes": one[:-1], "17 bytes": one + b"\0", "24 bytes": one + one[:8]}

    _expect_untouched(target, payloads, _REFUSED)


@check()
def more_segments_than_allowed(target: Target) -> None:
    """More segments than max_*_seg get IOERR or UNSUPP and touch nothing (HOSTILE-174)."""

    def payloads(eraser: Eraser) -> dict[str, bytes]:
        if eraser.max_seg >= _MANY_SEGMENTS:
            return {}
        return {f"{eraser.max_seg + 1} segments": segments((0, eraser.unit)) * (eraser.max_seg + 1)}

    _expect_untouched(target, payloads, _REFUSED)


@check()
def more_sectors_than_allowed(target: Target) -> None:
    """A range of more sectors than max_*_sectors gets IOERR and touches nothing (HOSTILE-175).

    Where such a range is more than may be written here it begins with the last block, and so also leaves the disk.
    """

    def payloads(eraser: Eraser) -> dict[str, bytes]:
        sectors = (eraser.max_sectors // eraser.unit + 1) * eraser.unit
        if sectors >= 1 << 32:
            return {}
        start = 0 if sectors <= min(eraser.last, SCRATCH_SECTORS) else eraser.last
        return {f"{sectors} sectors of {eraser.max_sectors}": segments((start, sectors))}

    _expect_untouched(target, payloads, (Status.IOERR,))


@check()
def empty_ranges(target: Target) -> None:
    """A range of no sectors is OK or IOERR, and touches nothing (HOSTILE-176)."""
    _expect_untouched(target, lambda _: {"0 sectors": segments((0, 0))}, (Status.OK, Status.IOERR))


@check()
def ranges_past_the_end(target: Target) -> None:
    """A range that ends behind the disk, or begins there, gets IOERR and touches nothing (HOSTILE-177)."""

    def payloads(eraser: Eraser) -> dict[str, bytes]:
        return {
            "the last block and one more": segments((eraser.last, 2 * eraser.unit)),
            "the block past the end": segments((eraser.last + eraser.unit, eraser.unit)),
        }

    _expect_untouched(target, payloads, (Status.IOERR,))


@check()
def ranges_that_wrap_64_bits(target: Target) -> None:
    """A range whose end wraps 2^64, counted in sectors or in bytes, gets IOERR and touches nothing (HOSTILE-178)."""

    def payloads(eraser: Eraser) -> dict[str, bytes]:
        unit = eraser.unit
        return {
            "from the top of 2^64 sectors": segments(((1 << 64) - unit, 2 * unit)),
            "from sector 2^55, which is byte 2^64": segments((1 << 55, unit)),
        }

    _expect_untouched(target, payloads, (Status.IOERR,))


@check()
def ranges_that_wrap_32_bits(target: Target) -> None:
    """A range of 2^32 bytes and one block gets IOERR, it is no single block (HOSTILE-179)."""

    def payloads(eraser: Eraser) -> dict[str, bytes]:
        sectors = -(-_WRAPS_32_BITS // eraser.unit) * eraser.unit + eraser.unit
        return {f"{sectors} sectors from the last block on": segments((eraser.last, sectors))}

    _expect_untouched(target, payloads, (Status.IOERR,))


@check()
def one_bad_range_among_good_ones(target: Target) -> None:
    """One bad range among good ones fails the request with IOERR or UNSUPP (HOSTILE-180)."""
    with target.driver() as driver:
        for eraser in erasers(target, driver):
            if eraser.max_seg < 3:
                continue
            unit = eraser.unit
            good = segments((0, unit))
            for case, bad in {
                "a range past the end": segments((eraser.last + unit, unit)),
                "a reserved flag": segments((2 * unit, unit), flags=1 << 31),
            }.items():
                answer = ask(driver, eraser.type, 0, good + bad + good)
                expect_answer(answer, f"{eraser.name} with {case} between two good ones", *_REFUSED)


@check(Feature.BLK_SECURE_ERASE)
def secure_erase_does_not_unmap(target: Target) -> None:
    """SECURE_ERASE with the unmap flag gets UNSUPP and touches nothing (HOSTILE-182)."""

    def payloads(eraser: Eraser) -> dict[str, bytes]:
        if eraser.type is not RequestType.SECURE_ERASE:
            return {}
        return {"unmap": segments((0, eraser.unit), flags=WRITE_ZEROES_FLAG_UNMAP)}

    _expect_untouched(target, payloads, (Status.UNSUPP,))


@check()
def unaligned_ranges(target: Target) -> None:
    """A range that is not aligned is served, trimmed or refused with IOERR; nothing around is touched (HOSTILE-183)."""
    block = target.block_sectors
    with target.driver() as driver:
        coarse = [each for each in erasers(target, driver) if each.unit > block]
        if not coarse:
            raise NotTestable(f"ranges need no more alignment than blocks of {block} sectors have")
        for eraser in coarse:
            before = pattern(4 * eraser.unit * SECTOR_SIZE, eraser.name)
            driver.write(0, before)
            sector, sectors = eraser.unit - block, eraser.unit
            answer = ask(driver, eraser.type, 0, segments((sector, sectors)))
            case = f"{eraser.name} of {sectors} sectors from {sector} on"
            end = sector + sectors
            expect_intact(driver, 0, before[: sector * SECTOR_SIZE], case)
            expect_intact(driver, end, before[end * SECTOR_SIZE :], case)
            expect_answer(answer, case, Status.OK, Status.IOERR)


@check()
def segments_cut_at_odd_bytes(target: Target) -> None:
    """Segments are understood however their bytes are cut into elements (HOSTILE-184)."""
    with target.driver() as driver:
        for eraser in erasers(target, driver):
            size = eraser.unit * SECTOR_SIZE
            before = pattern(4 * size, eraser.name)
            driver.write(0, before)
            named = [(eraser.unit, eraser.unit), (3 * eraser.unit, eraser.unit)][: eraser.max_seg]
            case = f"{eraser.name} of {len(named)} segments cut at odd bytes"
            answer = ask(driver, eraser.type, 0, segments(*named), framing=[9, 7 + 3, 5, 1])
            expect_answer(answer, case, Status.OK)
            expect_intact(driver, 0, before[:size], case)
            expect_intact(driver, 2 * eraser.unit, before[2 * size : 3 * size], case)
            for sector, _ in named if eraser.type is not RequestType.DISCARD else ():
                now = driver.read(sector, size)
                expect(now != before[sector * SECTOR_SIZE :][:size], f"{case}: sector {sector} was left as it was")


@check()
def segments_in_writable_memory(target: Target) -> None:
    """Segments in device-writable memory are not read: IOERR or UNSUPP, and nothing is touched (HOSTILE-185)."""
    with target.driver() as driver:
        for eraser in erasers(target, driver):
            before = pattern(eraser.unit * SECTOR_SIZE, eraser.name)
            driver.write(0, before)
            case = f"{eraser.name}, segments in writable memory"
            pending = driver.submit(eraser.type, 0, b"", DISCARD_SEGMENT.size)
            driver.memory.write(pending.writable, segments((0, eraser.unit)))
            driver.kick()
            driver.wait(pending)
            expect_intact(driver, 0, before, case)
            expect(pending.status in _REFUSED, f"{case}: status {pending.status:#x}")


@check()
def overlapping_ranges(target: Target) -> None:
    """Ranges that overlap or repeat act on all that any of them names (HOSTILE-186)."""
    with target.driver() as driver:
        for eraser in erasers(target, driver, WRITE_ZEROES, SECURE_ERASE, units=5):
            unit, size = eraser.unit, eraser.unit * SECTOR_SIZE
            if eraser.max_seg < 3 or eraser.max_sectors < 2 * unit:
                continue
            before = pattern(5 * size, eraser.name)
            driver.write(0, before)
            answer = ask(driver, eraser.type, 0, segments((unit, 2 * unit), (2 * unit, 2 * unit), (unit, 2 * unit)))
            case = f"{eraser.name} of overlapping ranges"
            expect_answer(answer, case, Status.OK)
            expect_intact(driver, 0, before[:size], case)
            expect_intact(driver, 4 * unit, before[4 * size :], case)
            if eraser.type is RequestType.WRITE_ZEROES:
                expect_data(driver, unit, bytes(3 * size), case)
            else:
                now = driver.read(unit, 3 * size)
                left = [i for i in range(3) if now[i * size :][:size] == before[(1 + i) * size :][:size]]
                expect(not left, f"{case}: part {left} of it was left as it was")


def _expect_untouched(
    target: Target, payloads: Callable[[Eraser], dict[str, bytes]], outcomes: tuple[Status, ...]
) -> None:
    """Make each request that ``payloads`` tells by case, for each kind; the first and the last unit must stay."""
    tried = 0
    with target.driver() as driver:
        for eraser in erasers(target, driver, units=2):
            last, size = eraser.last, eraser.unit * SECTOR_SIZE
            if last + eraser.unit > SCRATCH_SECTORS and last < driver.capacity - TAIL_SECTORS:
                continue
            first_data, last_data = pattern(2 * size, f"{eraser.name} first"), pattern(size, f"{eraser.name} last")
            driver.write(last, last_data)
            driver.write(0, first_data)
            for case, payload in payloads(eraser).items():
                answer = ask(driver, eraser.type, 0, payload)
                expect_intact(driver, 0, first_data, f"{eraser.name}, {case}")
                expect_intact(driver, last, last_data, f"{eraser.name}, {case}")
                expect_answer(answer, f"{eraser.name}, {case}", *outcomes)
                tried += 1
    if not tried:
        raise NotTestable("the limits of this device leave nothing to try")
