"""Block device: DISCARD, WRITE_ZEROES and SECURE_ERASE that are right, and their flags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.ranges import DISCARD, SECURE_ERASE, WRITE_ZEROES, Eraser, Kind, erasers, segments
from vmmblk.conform.requests import ask, expect_answer, expect_data, expect_intact, pattern
from vmmblk.conform.target import SCRATCH_SECTORS
from vmmblk.spec import SECTOR_SIZE, WRITE_ZEROES_FLAG_UNMAP, Feature, Status

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_SEGMENTS = 256
"""How many ranges are put into one request, at most."""
_RESERVED_FLAGS = (1 << 1, 1 << 7, 1 << 16, 1 << 31, 0xFFFFFFFE)


# Ranges.


@check(Feature.BLK_DISCARD)
def discard_works(target: Target) -> None:
    """DISCARD takes one range and as many as max_discard_seg, and leaves what lies around (BLK-014, 081..083)."""
    _expect_ranges(target, DISCARD)


@check(Feature.BLK_WRITE_ZEROES)
def write_zeroes_works(target: Target) -> None:
    """WRITE_ZEROES takes one range and as many as max_write_zeroes_seg, and acts on each (BLK-015, 081..083)."""
    _expect_ranges(target, WRITE_ZEROES)


@check(Feature.BLK_SECURE_ERASE)
def secure_erase_works(target: Target) -> None:
    """SECURE_ERASE takes one range and as many as max_secure_erase_seg, and acts on each (BLK-017, 081..083)."""
    _expect_ranges(target, SECURE_ERASE)


def _expect_ranges(target: Target, kind: Kind) -> None:
    """Every other unit is named; the others must stay, and those that are named must change if they must."""
    with target.driver() as driver:
        (eraser,) = erasers(target, driver, kind)
        room = min(target.facts.capacity, SCRATCH_SECTORS) // eraser.unit
        for count in sorted({1, min(eraser.max_seg, _SEGMENTS, room // 2)}):
            before = _fill(driver, eraser, 2 * count)
            named = [(2 * i * eraser.unit, eraser.unit) for i in range(count)]
            answer = ask(driver, eraser.type, 0, segments(*named))
            expect_answer(answer, f"{eraser.name} of {count} ranges of {eraser.max_seg}", Status.OK)
            size = eraser.unit * SECTOR_SIZE
            now = driver.read(0, len(before))
            for i in range(2 * count):
                unit = slice(i * size, (i + 1) * size)
                case = f"{eraser.name} of {count} ranges"
                if i % 2:
                    expect_intact(driver, i * eraser.unit, before[unit], f"{case}, beside one of them")
                elif kind is not DISCARD:
                    expect(now[unit] != before[unit], f"{case}: range {i // 2} of them was left as it was")


@check(Feature.BLK_WRITE_ZEROES)
def zeroes_are_read(target: Target) -> None:
    """After WRITE_ZEROES the range reads as zeroes, with unmap and without (BLK-090, 091)."""
    with target.driver() as driver:
        (eraser,) = erasers(target, driver, WRITE_ZEROES)
        for flags in (0, WRITE_ZEROES_FLAG_UNMAP):
            before = _fill(driver, eraser, 4)
            answer = ask(driver, eraser.type, 0, segments((eraser.unit, 2 * eraser.unit), flags=flags))
            case = f"WRITE_ZEROES of 2 blocks of 4, flags {flags}"
            expect_answer(answer, case, Status.OK)
            size = eraser.unit * SECTOR_SIZE
            expect_data(driver, 0, before[:size] + bytes(2 * size) + before[3 * size :], case)


# Limits are in sectors of 512 bytes.


@check(Feature.BLK_DISCARD)
def discard_of_the_most(target: Target) -> None:
    """One range may have max_discard_sectors (BLK-020)."""
    _expect_most(target, DISCARD)


@check(Feature.BLK_WRITE_ZEROES)
def write_zeroes_of_the_most(target: Target) -> None:
    """One range may have max_write_zeroes_sectors (BLK-021)."""
    _expect_most(target, WRITE_ZEROES)


@check(Feature.BLK_SECURE_ERASE)
def secure_erase_of_the_most(target: Target) -> None:
    """One range may have max_secure_erase_sectors (BLK-022)."""
    _expect_most(target, SECURE_ERASE)


def _expect_most(target: Target, kind: Kind) -> None:
    with target.driver() as driver:
        (eraser,) = erasers(target, driver, kind, units=1)
        room = min(target.facts.capacity, SCRATCH_SECTORS, eraser.max_sectors)
        sectors = room // eraser.unit * eraser.unit
        answer = ask(driver, eraser.type, 0, segments((0, sectors)))
        expect_answer(answer, f"{eraser.name} of {sectors} sectors, at most {eraser.max_sectors}", Status.OK)


# Flags.


@check(Feature.BLK_DISCARD)
def discard_knows_no_flags(target: Target) -> None:
    """DISCARD with an undefined flag gets UNSUPP (BLK-084, HOSTILE-181)."""
    _expect_unsupported(target, DISCARD, *_RESERVED_FLAGS)


@check(Feature.BLK_DISCARD)
def discard_does_not_unmap(target: Target) -> None:
    """DISCARD with the unmap flag gets UNSUPP (BLK-087)."""
    _expect_unsupported(target, DISCARD, WRITE_ZEROES_FLAG_UNMAP)


@check(Feature.BLK_SECURE_ERASE)
def secure_erase_knows_no_flags(target: Target) -> None:
    """SECURE_ERASE with an undefined flag gets UNSUPP (BLK-085, HOSTILE-181)."""
    _expect_unsupported(target, SECURE_ERASE, *_RESERVED_FLAGS)


@check(Feature.BLK_WRITE_ZEROES)
def write_zeroes_knows_one_flag(target: Target) -> None:
    """WRITE_ZEROES with an undefined flag, unmap set or not, gets UNSUPP (BLK-086, HOSTILE-181)."""
    both = tuple(flag | WRITE_ZEROES_FLAG_UNMAP for flag in _RESERVED_FLAGS)
    _expect_unsupported(target, WRITE_ZEROES, *_RESERVED_FLAGS, *both)


def _expect_unsupported(target: Target, kind: Kind, *flags: int) -> None:
    with target.driver() as driver:
        (eraser,) = erasers(target, driver, kind)
        for each in flags:
            answer = ask(driver, eraser.type, 0, segments((0, eraser.unit), flags=each))
            expect_answer(answer, f"{eraser.name} with flags {each:#x}", Status.UNSUPP)


def _fill(driver: VirtioBlk, eraser: Eraser, units: int) -> bytes:
    """Write something to the first ``units`` units of the disk; returns it."""
    size = eraser.unit * SECTOR_SIZE
    if units * size > SCRATCH_SECTORS * SECTOR_SIZE:
        raise NotTestable(f"{units} ranges of {eraser.unit} sectors are more than may be written")
    for at in range(units):
        driver.write(at * eraser.unit, pattern(size, f"unit {at}"))
    return b"".join(pattern(size, f"unit {at}") for at in range(units))
