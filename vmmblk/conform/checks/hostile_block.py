"""Hostile drivers: block requests that are malformed, out of range, or not what was negotiated."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.client.queue import Segment
from vmmblk.conform.check import NotOffered, NotTestable, check, expect
from vmmblk.conform.ranges import KINDS, segments
from vmmblk.conform.requests import (
    NEEDS_RESET,
    USED0,
    ask,
    ask_chain,
    expect_answer,
    expect_data,
    expect_intact,
    field,
    pattern,
    reach,
)
from vmmblk.spec import (
    BLK_ID_BYTES,
    LIFETIME,
    REQUEST_HEADER,
    SECTOR_SIZE,
    BlkConfig,
    DeviceStatus,
    Feature,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

IN, OUT, FLUSH, GET_ID = RequestType.IN, RequestType.OUT, RequestType.FLUSH, RequestType.GET_ID
OK, IOERR, UNSUPP = Status.OK, Status.IOERR, Status.UNSUPP
_LEGACY_TYPES = (2, 3, 5, 0x80000000, 0x80000001, 0x80000004)
_TRANSITIONAL_ID = 0x1001
_HEADER = REQUEST_HEADER.size
_PAGE = 4096
_MUCH = 32 << 20
"""Bytes that one element may have here at most, and"""
_MANY = (4 << 30) // _MUCH - 1
"""how many of such are close to 4 GiB."""


@dataclass(frozen=True, slots=True)
class _Watch:
    """The first two blocks of a disk, which no request made here may change."""

    driver: VirtioBlk
    data: bytes

    def look(self, case: str) -> None:
        """Raise Harm if ``case`` has changed them.  Brings the device up again if it needs a reset."""
        if DeviceStatus.NEEDS_RESET in self.driver.status:
            self.driver.init()
        expect_intact(self.driver, 0, self.data, case)


@contextlib.contextmanager
def _watched(target: Target) -> Iterator[_Watch]:
    size = 2 * target.facts.block_size
    reach(target, size // SECTOR_SIZE)
    with target.driver() as driver:
        if not target.offers(Feature.BLK_RO):
            driver.write(0, pattern(size, "watched"))
        yield _Watch(driver, driver.read(0, size))


def _place(driver: VirtioBlk, data: bytes) -> int:
    """Put ``data`` at the beginning of memory of its own, with a page to spare."""
    iova = driver.memory.alloc(len(data) + _PAGE)
    driver.memory.write(iova, data)
    return iova


# The shape of a request.


@check(each_ring=True)
def short_header(target: Target) -> None:
    """Fewer than 16 readable bytes get IOERR, and what lies behind them is not read (HOSTILE-140)."""
    with _watched(target) as watch:
        driver = watch.driver
        header = _place(driver, REQUEST_HEADER.pack(GET_ID, 0, 0))
        status = header + _PAGE
        for length in (0, 1, 15):
            chain = [Segment(header, length, writable=False)] if length else []
            answer = ask_chain(driver, [*chain, Segment(status, 1, writable=True)], status)
            watch.look(f"a header of {length} bytes")
            expect_answer(answer, f"a header of {length} bytes", IOERR)


@check(each_ring=True)
def no_status_byte(target: Target) -> None:
    """Without a writable byte it comes back unused, or the device needs a reset; nothing is done (HOSTILE-141)."""
    size = target.facts.block_size
    with _watched(target) as watch:
        request = _place(watch.driver, REQUEST_HEADER.pack(OUT, 0, 0) + bytes(size))
        answer = ask_chain(watch.driver, [Segment(request, _HEADER + size, writable=False)], None)
        watch.look("a write without a status byte")
        expect_answer(answer, "a write without a status byte", USED0, NEEDS_RESET)


@check(each_ring=True)
def header_cut_or_joined(target: Target) -> None:
    """A header in several elements, or in one with data, works (HOSTILE-142)."""
    size = target.facts.block_size
    target.room(target.block_sectors)
    with target.driver() as driver:
        for framing in ([1, 1, _HEADER - 2], [8, 8], [_HEADER + size], [3, _HEADER + size - 3], [_HEADER + 1]):
            data = pattern(size, f"{framing}")
            expect_answer(ask(driver, OUT, 0, data, framing=framing), f"OUT cut as {framing}", OK)
            expect_data(driver, 0, data, f"OUT cut as {framing}")


@check(each_ring=True)
def status_joined_to_data(target: Target) -> None:
    """A status in one element with data that is read works, and is not data (HOSTILE-143)."""
    size = target.facts.block_size
    reach(target, target.block_sectors)
    with target.driver() as driver:
        data = driver.read(0, size)
        for framing in ([_HEADER, size + 1], [_HEADER, size - 1, 2], [_HEADER, 1, size]):
            answer = ask(driver, IN, 0, data_in=size, framing=framing)
            expect_answer(answer, f"IN cut as {framing}", OK)
            expect(answer.data == data, f"IN cut as {framing} gives other data")


@check(each_ring=True)
def writable_header(target: Target) -> None:
    """A header in writable memory is not obeyed: unused, IOERR, or the device needs a reset (HOSTILE-144)."""
    size = target.facts.block_size
    with _watched(target) as watch:
        request = _place(watch.driver, REQUEST_HEADER.pack(IN, 0, 0) + bytes(size + 1))
        status = request + _HEADER + size
        chain = [Segment(request, _HEADER, writable=True), Segment(request + _HEADER, size + 1, writable=True)]
        answer = ask_chain(watch.driver, chain, status)
        watch.look("a header in writable memory")
        expect_answer(answer, "a header in writable memory", USED0, IOERR, NEEDS_RESET)


@check(each_ring=True)
def reserved_field(target: Target) -> None:
    """The reserved field of the header is ignored (HOSTILE-146)."""
    with target.driver() as driver:
        usual = ask(driver, GET_ID, data_in=BLK_ID_BYTES)
        answer = ask(driver, GET_ID, data_in=BLK_ID_BYTES, reserved=0xFFFFFFFF)
        expect(answer.status == usual.status, f"with a reserved field that is not 0: {answer}")
        expect(answer.data == usual.data, "with a reserved field that is not 0 the answer is another one")


@check()
def legacy_types(target: Target) -> None:
    """The types of legacy devices, and bit 31, get UNSUPP on a device that is not transitional (HOSTILE-147)."""
    with _watched(target) as watch:
        if watch.driver.pci.device_id == _TRANSITIONAL_ID:
            raise NotOffered("the device is transitional")
        for kind in _LEGACY_TYPES:
            answer = ask(watch.driver, kind, 0, b"", target.facts.block_size)
            watch.look(f"type {kind:#x}")
            expect_answer(answer, f"type {kind:#x}", UNSUPP)


@check(each_ring=True)
def read_with_readable_data(target: Target) -> None:
    """A read with readable bytes behind its header ignores them, or gets UNSUPP or IOERR (HOSTILE-148)."""
    size = target.facts.block_size
    reach(target, target.block_sectors)
    with _watched(target) as watch:
        answer = ask(watch.driver, IN, 0, pattern(size, "readable"), size)
        watch.look("a read with readable data")
        expect_answer(answer, "a read with readable data", OK, UNSUPP, IOERR)
        right = answer.outcome != OK or answer.data == watch.driver.read(0, size)
        expect(right, "a read with readable data gives other data")


@check(each_ring=True)
def write_with_writable_data(target: Target) -> None:
    """A write with writable bytes before its status leaves them, and does not count them as used (HOSTILE-149)."""
    size = target.facts.block_size
    target.room(target.block_sectors)
    with target.driver() as driver:
        data = pattern(size, "written")
        answer = ask(driver, OUT, 0, data, size)
        expect(answer.data == answer.before, "a write has written to writable memory before its status")
        expect(answer.written <= 1, f"the used length of a write is {answer.written}")
        if answer.outcome == OK:
            expect_data(driver, 0, data, "a write with writable data was OK")


@check(each_ring=True)
def write_of_writable_data(target: Target) -> None:
    """A write whose data is in writable memory is of no length, or gets IOERR (HOSTILE-150)."""
    with _watched(target) as watch:
        answer = ask(watch.driver, OUT, 0, b"", target.facts.block_size)
        watch.look("a write whose data is in writable memory")
        expect_answer(answer, "a write whose data is in writable memory", OK, IOERR)


@check(each_ring=True)
def status_within_data(target: Target) -> None:
    """Where the status lies within the data that is read, or in the header, it is stored last (HOSTILE-151)."""
    size = target.facts.block_size
    target.room(target.block_sectors)
    with target.driver() as driver:
        driver.write(0, b"\x77" * size)
        request = _place(driver, REQUEST_HEADER.pack(IN, 0, 0) + bytes(size + 1))
        header, data = Segment(request, _HEADER, writable=False), Segment(request + _HEADER, size, writable=True)
        for case, status in {"within the data": request + _HEADER + 100, "within the header": request + 5}.items():
            driver.memory.write(request, REQUEST_HEADER.pack(IN, 0xEEEEEEEE, 0))
            answer = ask_chain(driver, [header, data, Segment(status, 1, writable=True)], status, unset=False)
            if answer.outcome == NEEDS_RESET:
                driver.init()
            expect_answer(answer, f"a status {case}", OK, IOERR, UNSUPP, NEEDS_RESET)


# Positions and lengths.


@check(each_ring=True)
def lengths_that_are_no_sectors(target: Target) -> None:
    """IN and OUT of bytes that are no whole sectors get IOERR and transfer nothing (HOSTILE-152)."""
    with _watched(target) as watch:
        for length in (1, SECTOR_SIZE - 1, SECTOR_SIZE + 1, target.facts.block_size + 100):
            answer = ask(watch.driver, IN, 0, data_in=length)
            expect_answer(answer, f"reading {length} bytes", IOERR)
            expect(answer.data == answer.before, f"reading {length} bytes gets IOERR, and data")
            answer = ask(watch.driver, OUT, 0, bytes(length))
            watch.look(f"writing {length} bytes")
            expect_answer(answer, f"writing {length} bytes", IOERR)


@check(each_ring=True)
def no_data(target: Target) -> None:
    """IN and OUT without data are OK, or get IOERR, and transfer nothing (HOSTILE-153)."""
    with _watched(target) as watch:
        for kind in (IN, OUT):
            answer = ask(watch.driver, kind, 0)
            watch.look(f"{kind.name} without data")
            expect_answer(answer, f"{kind.name} without data", OK, IOERR)


@check(each_ring=True)
def past_the_end(target: Target) -> None:
    """A range that ends behind the disk gets IOERR, and none of its sectors is touched (HOSTILE-154)."""
    block, size = target.block_sectors, target.facts.block_size
    reach(target, block)
    with target.driver() as driver:
        last = _last_block(driver, block)
        answer = ask(driver, IN, last, data_in=2 * size)
        expect_answer(answer, "reading the last block and one more", IOERR)
        expect(answer.data == answer.before, "reading past the end gets IOERR, and data")
        target.room(block)
        before = pattern(size, "last block")
        driver.write(last, before)
        answer = ask(driver, OUT, last, pattern(2 * size, "past the end"))
        expect_answer(answer, "writing the last block and one more", IOERR)
        expect_data(driver, last, before, "a write past the end got IOERR")


@check(each_ring=True)
def the_last_sector(target: Target) -> None:
    """The last block is served, the one behind it gets IOERR (HOSTILE-155)."""
    block, size = target.block_sectors, target.facts.block_size
    reach(target, block)
    with target.driver() as driver:
        last = _last_block(driver, block)
        expect_answer(ask(driver, IN, last, data_in=size), "reading the last block", OK)
        expect_answer(ask(driver, IN, last + block, data_in=size), "reading the block behind the last", IOERR)
        target.room(block)
        expect_answer(ask(driver, OUT, last, pattern(size, "last")), "writing the last block", OK)
        expect_answer(ask(driver, OUT, last + block, bytes(size)), "writing the block behind the last", IOERR)


@check(each_ring=True)
def bytes_that_wrap(target: Target) -> None:
    """Sectors whose position in bytes wraps 2^64 get IOERR, and the first ones are untouched (HOSTILE-156)."""
    _expect_nowhere(target, 1 << 55, (1 << 55) + target.block_sectors, 1 << 56, 1 << 63)


@check(each_ring=True)
def sectors_that_wrap(target: Target) -> None:
    """The last sectors that 64 bits can name get IOERR, their end does not wrap (HOSTILE-157)."""
    _expect_nowhere(target, (1 << 64) - 1, (1 << 64) - target.block_sectors)


def _expect_nowhere(target: Target, *sectors: int) -> None:
    size = target.facts.block_size
    with _watched(target) as watch:
        for sector in sectors:
            for length in (size, 2 * size):
                answer = ask(watch.driver, IN, sector, data_in=length)
                expect_answer(answer, f"reading {length} bytes at sector {sector:#x}", IOERR)
                answer = ask(watch.driver, OUT, sector, bytes(length))
                watch.look(f"writing {length} bytes at sector {sector:#x}")
                expect_answer(answer, f"writing {length} bytes at sector {sector:#x}", IOERR)


@check()
def close_to_four_gigabytes(target: Target) -> None:
    """A read of close to 4 GiB is served or gets IOERR (HOSTILE-158)."""
    reach(target, target.block_sectors)
    patience = target.options.limit * 0.8
    with target.driver(timeout=patience) as driver:
        request = _place(driver, REQUEST_HEADER.pack(IN, 0, 0))
        status = request + _PAGE
        data = [Segment(driver.memory.alloc(_MUCH), _MUCH, writable=True)] * _MANY
        chain = [Segment(request, _HEADER, writable=False), *data, Segment(status, 1, writable=True)]
        try:
            answer = ask_chain(driver, chain, status)
        except TimeoutError:
            raise NotTestable(f"reading 4 GiB takes the disk more than {patience:g} s, see --limit") from None
        expect_answer(answer, f"reading {_MANY} times {_MUCH} bytes", OK, IOERR)


@check(Feature.BLK_SIZE_MAX)
def longer_than_size_max(target: Target) -> None:
    """An element of more than size_max bytes is served or gets IOERR (HOSTILE-159)."""
    size = target.facts.block_size
    with target.driver() as driver:
        most = field(driver, BlkConfig.SIZE_MAX)
        length = (most // size + 1) * size
        if length > _MUCH:
            raise NotTestable(f"size_max is {most} bytes")
        reach(target, length // SECTOR_SIZE)
        answer = ask(driver, IN, 0, data_in=length, framing=[_HEADER, length, 1])
        expect_answer(answer, f"an element of {length} bytes, size_max is {most}", OK, IOERR)


@check(Feature.BLK_SEG_MAX)
def more_than_seg_max(target: Target) -> None:
    """A request of more than seg_max elements is served or gets IOERR (HOSTILE-159)."""
    size = target.facts.block_size
    reach(target, target.block_sectors)
    with target.driver() as driver:
        most = field(driver, BlkConfig.SEG_MAX)
        if most >= size:
            raise NotTestable(f"seg_max is {most}")
        answer = ask(driver, IN, 0, data_in=size, framing=[_HEADER, *[1] * most, size - most, 1])
        expect_answer(answer, f"{most + 1} elements of data, seg_max is {most}", OK, IOERR)


@check(each_ring=True)
def parts_of_blocks(target: Target) -> None:
    """What is not whole blocks is served right, or gets IOERR; neighbours stay (HOSTILE-160)."""
    block, size = target.block_sectors, target.facts.block_size
    if block == 1:
        raise NotTestable("blocks are sectors here")
    target.room(4 * block)
    with target.driver() as driver:
        for sector, length in ((block + 1, SECTOR_SIZE), (block, SECTOR_SIZE), (block + block // 2, size)):
            before, written = pattern(4 * size, f"before {sector}"), pattern(length, f"written {sector}")
            start, end = sector * SECTOR_SIZE, sector * SECTOR_SIZE + length
            driver.write(0, before)
            answer = ask(driver, IN, sector, data_in=length)
            case = f"{length} bytes at sector {sector}, blocks have {size}"
            expect_answer(answer, f"reading {case}", OK, IOERR)
            expect(answer.outcome == IOERR or answer.data == before[start:end], f"reading {case} gives other data")
            answer = ask(driver, OUT, sector, written)
            after = before[:start] + written + before[end:] if answer.outcome == OK else before
            expect_intact(driver, 0, after, f"writing {case}")
            expect_answer(answer, f"writing {case}", OK, IOERR)


@check(Feature.BLK_RO)
def read_only_disks_are_not_erased(target: Target) -> None:
    """Requests with ranges to a read-only disk get IOERR or UNSUPP and change nothing (HOSTILE-162)."""
    with _watched(target) as watch:
        for kind in KINDS:
            answer = ask(watch.driver, kind.type, 0, segments((0, target.block_sectors)))
            watch.look(f"{kind.type.name} of a read-only disk")
            expect_answer(answer, f"{kind.type.name} of a read-only disk", IOERR, UNSUPP)


def _last_block(driver: VirtioBlk, block: int) -> int:
    return driver.capacity // block * block - block


# FLUSH, GET_ID, GET_LIFETIME.


@check(Feature.BLK_FLUSH)
def flush_with_a_sector(target: Target) -> None:
    """A FLUSH with a sector is carried out, or gets IOERR (HOSTILE-163)."""
    with target.driver() as driver:
        expect_answer(ask(driver, FLUSH, 8), "FLUSH of sector 8", OK, IOERR)


@check(Feature.BLK_FLUSH, each_ring=True)
def flush_with_data(target: Target) -> None:
    """A FLUSH with data is carried out, the data is ignored (HOSTILE-164)."""
    with _watched(target) as watch:
        for case, out, room in (("readable", bytes(SECTOR_SIZE), 0), ("writable", b"", SECTOR_SIZE)):
            answer = ask(watch.driver, FLUSH, 0, out, room)
            watch.look(f"FLUSH with {case} data")
            expect_answer(answer, f"FLUSH with {case} data", OK)
            expect(answer.data == answer.before, "FLUSH has written to memory before its status")


@check()
def flush_without_the_feature(target: Target) -> None:
    """FLUSH that was not negotiated is carried out, or gets UNSUPP (HOSTILE-165)."""
    with target.driver(features=target.mask(without=(Feature.BLK_FLUSH,))) as driver:
        expect_answer(ask(driver, FLUSH), "FLUSH, not negotiated", OK, UNSUPP)


@check(each_ring=True)
def id_without_room(target: Target) -> None:
    """GET_ID with room for less than 20 bytes writes no more than that, or gets IOERR (HOSTILE-166)."""
    with target.driver() as driver:
        for room in (0, 1, BLK_ID_BYTES - 1):
            answer = ask(driver, GET_ID, data_in=room)
            expect_answer(answer, f"GET_ID with room for {room} bytes", OK, IOERR)
            expect(answer.written <= room + 1, f"GET_ID with room for {room} bytes: used length {answer.written}")


@check(each_ring=True)
def id_with_more_room(target: Target) -> None:
    """GET_ID with room for more than 20 bytes writes 20 (HOSTILE-167)."""
    with target.driver() as driver:
        for room in (BLK_ID_BYTES + 1, SECTOR_SIZE):
            answer = ask(driver, GET_ID, data_in=room)
            beyond = answer.data[BLK_ID_BYTES:] != answer.before[BLK_ID_BYTES:]
            expect(not beyond, f"GET_ID with room for {room} bytes has written more than 20")
            expect(answer.written <= BLK_ID_BYTES + 1, f"the used length of GET_ID is {answer.written}")


@check()
def lifetime_without_the_feature(target: Target) -> None:
    """GET_LIFETIME that was not negotiated gets UNSUPP (HOSTILE-168)."""
    with target.driver(features=target.mask(without=(Feature.BLK_LIFETIME,))) as driver:
        answer = ask(driver, RequestType.GET_LIFETIME, data_in=LIFETIME.size)
        expect_answer(answer, "GET_LIFETIME, not negotiated", UNSUPP)


@check(Feature.BLK_LIFETIME)
def lifetime_without_room(target: Target) -> None:
    """GET_LIFETIME with room for less than 6 bytes gets IOERR (HOSTILE-169)."""
    with target.driver() as driver:
        for room in (0, 1, LIFETIME.size - 1):
            answer = ask(driver, RequestType.GET_LIFETIME, data_in=room)
            expect_answer(answer, f"GET_LIFETIME with room for {room} bytes", IOERR)
