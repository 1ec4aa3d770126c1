"""Block device: requests that are right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vmmblk.conform.check import NotTestable, check, expect
from vmmblk.conform.requests import (
    NEEDS_RESET,
    USED0,
    ask,
    expect_answer,
    expect_data,
    expect_intact,
    pattern,
    reach,
)
from vmmblk.spec import BLK_ID_BYTES, LIFETIME, REQUEST_HEADER, Feature, RequestType, Status

if TYPE_CHECKING:
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.request import Framing
    from vmmblk.conform.target import Target

_UNKNOWN_TYPES = (6, 7, 9, 12, 17, 19, 27, 0x100, 0x7FFFFFFF)
_PRE_EOL_INFO = range(4)
_WEAR = range(12)
_HEADER = REQUEST_HEADER.size


# Reading and writing.


@check(each_ring=True)
def data_written_is_data_read(target: Target) -> None:
    """OUT stores at the sector of the header, in 512-byte units, and IN gives it back (BLK-053, 054, 058, 059)."""
    block, size = target.block_sectors, target.facts.block_size
    target.room(8 * block)
    with target.driver() as driver:
        all_of_it, part = pattern(8 * size, "all"), pattern(3 * size, "part")
        expect_answer(ask(driver, RequestType.OUT, 0, all_of_it), "writing 8 blocks", Status.OK)
        expect_answer(ask(driver, RequestType.OUT, 2 * block, part), "writing 3 blocks", Status.OK)
        expect_data(driver, 0, all_of_it[: 2 * size] + part + all_of_it[5 * size :], f"3 of 8 blocks of {size} written")
        answer = ask(driver, RequestType.IN, 3 * block, data_in=size)
        expect_answer(answer, "reading a block", Status.OK)
        expect(answer.data == part[size : 2 * size], f"sector {3 * block:#x} reads as another one")


def _framings(data_out: int, data_in: int) -> list[Framing]:
    """Ways to cut a request: header, data and status joined and split at any byte."""
    readable, writable = _HEADER + data_out, data_in + 1
    return [
        [readable, writable],
        [_HEADER, data_out, data_in, 1] if data_out else [_HEADER, data_in, 1],
        [1, _HEADER - 1],
        [7, 9, 100, max(readable - 116, 1)] if data_out else [7, 9, 100],
        [readable - 1, 1, writable - 1] if data_out else [_HEADER, writable - 1],
        [5, readable - 5, 3, writable - 3] if data_in else [5, readable - 5],
    ]


@check(each_ring=True)
def framing_means_nothing(target: Target) -> None:
    """A request is header, data, then status in the last writable byte, however it is cut (BLK-050, 051)."""
    size = target.facts.block_size
    target.room(target.block_sectors)
    with target.driver() as driver:
        for number, framing in enumerate(_framings(size, 0)):
            data = pattern(size, f"framing {number}")
            expect_answer(ask(driver, RequestType.OUT, 0, data, framing=framing), f"OUT cut as {framing}", Status.OK)
            expect_data(driver, 0, data, f"OUT cut as {framing}")
        for framing in _framings(0, size):
            answer = ask(driver, RequestType.IN, 0, data_in=size, framing=framing)
            expect_answer(answer, f"IN cut as {framing}", Status.OK)
            expect(answer.data == data, f"IN cut as {framing} gives other data")


@check(each_ring=True)
def used_length(target: Target) -> None:
    """The used length is at most that of the data and the status that the device writes (BLK-057)."""
    size = target.facts.block_size
    reach(target, target.block_sectors)
    with target.driver() as driver:
        read = ask(driver, RequestType.IN, 0, data_in=size)
        expect(read.written <= size + 1, f"the used length of a read of {size} bytes is {read.written}")
        target.room(target.block_sectors)
        write = ask(driver, RequestType.OUT, 0, read.data)
        expect(write.written <= 1, f"the used length of a write is {write.written}")


@check(each_ring=True)
def unknown_types_are_unsupported(target: Target) -> None:
    """A type of request that does not exist gets UNSUPP (BLK-056, HOSTILE-145)."""
    with target.driver() as driver:
        for kind in _UNKNOWN_TYPES:
            expect_answer(ask(driver, kind, 0, bytes(16), 16), f"type {kind:#x}", Status.UNSUPP)


@check()
def errors_have_a_status(target: Target) -> None:
    """What a driver may not ask for, a sector past the end, is answered with IOERR if with a status (BLK-055)."""
    reach(target, target.block_sectors)
    with target.driver() as driver:
        case = f"reading sector {driver.capacity:#x}, the first past the end"
        answer = ask(driver, RequestType.IN, driver.capacity, data_in=target.facts.block_size)
        expect_answer(answer, case, Status.IOERR, USED0, NEEDS_RESET)


# Read-only disks.


@check()
def only_read_only_disks_cannot_be_written(target: Target) -> None:
    """A disk whose device does not offer RO can be written (BLK-008)."""
    target.room(target.block_sectors)
    with target.driver() as driver:
        answer = ask(driver, RequestType.OUT, 0, driver.read(0, target.facts.block_size))
        expect_answer(answer, "RO is not offered, writing a block", Status.OK)


@check(Feature.BLK_RO)
def read_only_disks_are_read(target: Target) -> None:
    """A read-only disk can be read (BLK-062)."""
    reach(target, target.block_sectors)
    with target.driver() as driver:
        expect_answer(ask(driver, RequestType.IN, 0, data_in=target.facts.block_size), "reading a block", Status.OK)


@check(Feature.BLK_RO)
def read_only_disks_refuse_writes(target: Target) -> None:
    """A write to a read-only disk gets IOERR and changes nothing, whether RO was accepted or not.

    BLK-060, BLK-061, HOSTILE-161.
    """
    reach(target, target.block_sectors)
    for without in ((), (Feature.BLK_RO,)):
        with target.driver(features=target.mask(without=without)) as driver:
            before = driver.read(0, target.facts.block_size)
            answer = ask(driver, RequestType.OUT, 0, bytes(byte ^ 0xFF for byte in before))
            expect_intact(driver, 0, before, "writing to a read-only disk")
            expect_answer(answer, f"writing, RO {'not ' if without else ''}accepted", Status.IOERR)


# Other requests.


@check(Feature.BLK_FLUSH)
def flush_works(target: Target) -> None:
    """A FLUSH is OK (BLK-010)."""
    with target.driver() as driver:
        expect_answer(ask(driver, RequestType.FLUSH), "FLUSH", Status.OK)


@check()
def id_is_ascii(target: Target) -> None:
    """GET_ID gives 20 bytes: ASCII, then NUL to the end (BLK-073)."""
    with target.driver() as driver:
        found = _get_id(driver)
        text, _, padding = found.partition(b"\0")
        expect(text.isascii(), f"the id is {found!r}")
        expect(not any(padding), f"the id is {found!r}, the NUL in it is not followed by others")


@check()
def id_of_20_characters(target: Target) -> None:
    """An id of 20 characters has no NUL behind it (BLK-074)."""
    with target.driver() as driver:
        found = _get_id(driver)
        if 0 in found:
            raise NotTestable(f"the id has {found.index(0)} characters")
        more = ask(driver, RequestType.GET_ID, data_in=BLK_ID_BYTES + 4)
        expect(
            more.outcome != Status.OK or more.data[:BLK_ID_BYTES] == found, f"the id is {found!r}, then {more.data!r}"
        )


def _get_id(driver: VirtioBlk) -> bytes:
    answer = ask(driver, RequestType.GET_ID, data_in=BLK_ID_BYTES)
    if answer.outcome == Status.UNSUPP:
        raise NotTestable("the device has no id: GET_ID gets UNSUPP")
    expect_answer(answer, "GET_ID", Status.OK)
    return answer.data


@check(Feature.BLK_LIFETIME)
def lifetime_is_told(target: Target) -> None:
    """GET_LIFETIME gives three numbers of 16 bits (BLK-016, 075)."""
    with target.driver() as driver:
        answer = ask(driver, RequestType.GET_LIFETIME, data_in=LIFETIME.size)
        expect_answer(answer, "GET_LIFETIME", Status.OK)
        expect(answer.written >= LIFETIME.size, f"the used length of a lifetime is {answer.written}")


@check(Feature.BLK_LIFETIME)
def lifetime_has_no_reserved_value(target: Target) -> None:
    """pre_eol_info is 0 to 3, each estimate of wear 0 to 11 (BLK-076, 077, 080)."""
    with target.driver() as driver:
        worn = driver.get_lifetime()
        valid = worn[0] in _PRE_EOL_INFO and worn[1] in _WEAR and worn[2] in _WEAR
        expect(valid, f"pre_eol_info is {worn[0]}, the estimates are {worn[1]} and {worn[2]}")
