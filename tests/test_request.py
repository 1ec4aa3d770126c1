"""Requests: header bytes and lengths in, a request or the status for the guest out."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vmmblk.errors import BadRequest
from vmmblk.request import (
    Discard,
    Flush,
    GetId,
    Limits,
    Range,
    Read,
    Request,
    SegmentLimits,
    Write,
    WriteZeroes,
    parse,
    parse_ranges,
)
from vmmblk.spec import DISCARD_SEGMENT, REQUEST_HEADER, Feature, RequestType, Status

RANGED = Feature.BLK_DISCARD.mask | Feature.BLK_WRITE_ZEROES.mask
LIMITS = Limits(
    features=RANGED,
    discard=SegmentLimits(max_sectors=1 << 24, max_seg=4),
    write_zeroes=SegmentLimits(max_sectors=1 << 23, max_seg=2),
    capacity=1 << 25,
)
DISCARD, WRITE_ZEROES = RequestType.DISCARD, RequestType.WRITE_ZEROES


def header(kind: int, sector: int = 0, reserved: int = 0) -> bytes:
    """A request header."""
    return REQUEST_HEADER.pack(kind, reserved, sector)


def segments(*each: tuple[int, int, int]) -> bytes:
    """The payload of a DISCARD or WRITE_ZEROES request."""
    return b"".join(DISCARD_SEGMENT.pack(*fields) for fields in each)


def parse_status(head: bytes, readable: int = 0, writable: int = 0, limits: Limits = LIMITS) -> Status:
    """The status with which a request is refused."""
    with pytest.raises(BadRequest) as refused:
        parse(head, readable, writable, limits)
    return refused.value.status


def ranges_status(kind: RequestType, payload: bytes, limits: Limits = LIMITS) -> Status:
    """The status with which segments are refused."""
    with pytest.raises(BadRequest) as refused:
        parse_ranges(kind, payload, limits)
    return refused.value.status


@pytest.mark.parametrize(
    ("head", "readable", "writable", "expected"),
    [
        (header(0, 7), 0, 1024, Read(7, 1024)),
        (header(1, 9), 512, 0, Write(9, 512)),
        (header(4), 0, 0, Flush()),
        (header(8), 0, 20, GetId(20)),
        (header(11), 16, 0, Discard(16)),
        (header(13), 32, 0, WriteZeroes(32)),
    ],
)
def test_each_type_gives_its_request(head: bytes, readable: int, writable: int, expected: Request) -> None:
    """BLK-058, BLK-059 and the table of requests: data is counted on the side that the type uses."""
    assert parse(head, readable, writable, LIMITS) == expected


@pytest.mark.parametrize(
    ("head", "readable", "writable", "expected"),
    [
        (header(0, 7, reserved=0xFFFFFFFF), 0, 512, Read(7, 512)),  # HOSTILE-146
        (header(0, 7), 33, 512, Read(7, 512)),  # HOSTILE-148
        (header(1, 7), 512, 33, Write(7, 512)),  # HOSTILE-149
        (header(1, 7), 0, 512, Write(7, 0)),  # HOSTILE-150
        (header(0, 7), 0, 0, Read(7, 0)),  # HOSTILE-153
        (header(1, 7), 0, 0, Write(7, 0)),  # HOSTILE-153
        (header(4, 99), 0, 0, Flush()),  # HOSTILE-163
        (header(4), 100, 100, Flush()),  # HOSTILE-164
        (header(8), 0, 0, GetId(0)),
        (header(8), 0, 5, GetId(5)),  # HOSTILE-166
        (header(8), 0, 4096, GetId(20)),  # HOSTILE-167
        (header(0, 2**64 - 1), 0, 512, Read(2**64 - 1, 512)),  # HOSTILE-157: not wrapped; the disk refuses it
        (header(0, 2**55), 0, 512, Read(2**55, 512)),  # HOSTILE-156
    ],
)
def test_odd_requests_that_are_served(head: bytes, readable: int, writable: int, expected: Request) -> None:
    """Reserved fields and data on the unused side are ignored, lengths are truncated, sectors never wrap."""
    assert parse(head, readable, writable, LIMITS) == expected


@pytest.mark.parametrize("length", [0, 1, 15])
def test_short_header_is_an_error(length: int) -> None:
    """HOSTILE-140: fewer than 16 device-readable bytes give IOERR."""
    assert parse_status(header(0)[:length], writable=512) is Status.IOERR


@pytest.mark.parametrize("length", [1, 511, 513, 1023])
@pytest.mark.parametrize("kind", [0, 1])
def test_data_must_be_whole_sectors(kind: int, length: int) -> None:
    """HOSTILE-152: IN and OUT with a length that is no multiple of 512 give IOERR."""
    assert parse_status(header(kind), readable=length, writable=length) is Status.IOERR


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize(("sector", "length"), [(1, 4096), (0, 512), (7, 512), (8, 4096 + 512)])
def test_data_must_be_whole_blocks_of_the_disk(kind: int, sector: int, length: int) -> None:
    """HOSTILE-160: position or length that is no multiple of blk_size gives IOERR."""
    limits = Limits(0, sector_size=4096)
    assert parse_status(header(kind, sector), length, length, limits) is Status.IOERR


def test_whole_blocks_of_the_disk_are_served() -> None:
    """BLK-025: the protocol counts 512-byte sectors whatever blk_size is."""
    assert parse(header(0, 16), 0, 8192, Limits(0, sector_size=4096)) == Read(16, 8192)


UNKNOWN = [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 18, 20, 22, 24, 26, 27, 0x80000000, 0x80000004, 0xFFFFFFFF]


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_types_are_unsupported(kind: int) -> None:
    """HOSTILE-145, 147, 168, 172, 187: unknown, legacy and not yet offered types and bit 31 give UNSUPP."""
    assert parse_status(header(kind), readable=512, writable=512) is Status.UNSUPP


def test_flush_is_performed_without_negotiation() -> None:
    """HOSTILE-165: a flush is never a false OK, nor refused."""
    assert parse(header(4), 0, 0, Limits(features=0)) == Flush()


@pytest.mark.parametrize(
    ("kind", "feature"), [(DISCARD, Feature.BLK_DISCARD), (WRITE_ZEROES, Feature.BLK_WRITE_ZEROES)]
)
def test_ranged_requests_need_their_feature(kind: RequestType, feature: Feature) -> None:
    """HOSTILE-172: DISCARD and WRITE_ZEROES that were not negotiated give UNSUPP, whatever else is wrong."""
    limits = Limits(features=RANGED & ~feature.mask, discard=LIMITS.discard, write_zeroes=LIMITS.write_zeroes)
    assert parse_status(header(kind), readable=16, limits=limits) is Status.UNSUPP
    assert parse_status(header(kind), readable=3, limits=limits) is Status.UNSUPP
    assert ranges_status(kind, segments((0, 1, 0)), limits) is Status.UNSUPP


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("length", [0, 1, 15, 17, 16 * 5, 1 << 32])
def test_number_of_segments_is_bounded_before_they_are_read(kind: RequestType, length: int) -> None:
    """HOSTILE-173, 174, 185: no segments, part of one or too many give IOERR from the length alone."""
    assert parse_status(header(kind), readable=length, writable=16) is Status.IOERR


@pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
@pytest.mark.parametrize("payload", [b"", bytes(15), bytes(17), bytes(16 * 5)])
def test_payload_must_be_whole_segments(kind: RequestType, payload: bytes) -> None:
    """HOSTILE-173, 174: the payload itself is held to the same rule."""
    assert ranges_status(kind, payload) is Status.IOERR


def test_every_segment_is_returned_in_order() -> None:
    """BLK-083, HOSTILE-186: several segments, overlapping or not, are all acted on."""
    payload = segments((0, 8, 0), (4, 8, 0), (1 << 24, 1, 0))
    assert parse_ranges(DISCARD, payload, LIMITS) == (Range(0, 8), Range(4, 8), Range(1 << 24, 1))


def test_unmap_is_carried_by_write_zeroes() -> None:
    """BLK-089: WRITE_ZEROES allows deallocation by flag bit 0."""
    assert parse_ranges(WRITE_ZEROES, segments((1, 2, 1), (3, 4, 0)), LIMITS) == (Range(1, 2, unmap=True), Range(3, 4))


@pytest.mark.parametrize(
    ("kind", "flags"),
    [(DISCARD, 1), (DISCARD, 2), (DISCARD, 0x80000000), (WRITE_ZEROES, 2), (WRITE_ZEROES, 3), (WRITE_ZEROES, 1 << 31)],
)
def test_flags_that_are_not_allowed(kind: RequestType, flags: int) -> None:
    """BLK-084, BLK-086, BLK-087, HOSTILE-181: undefined flags, and unmap on DISCARD, give UNSUPP."""
    assert ranges_status(kind, segments((0, 1, flags))) is Status.UNSUPP


@pytest.mark.parametrize(
    ("sector", "sectors"),
    [
        (0, (1 << 24) + 1),  # HOSTILE-175
        ((1 << 25) - 1, 2),  # HOSTILE-177
        (1 << 25, 1),
        (2**64 - 1, 1),  # HOSTILE-178
        (2**64 - 8, 16),
        ((1 << 25) - (1 << 23), (1 << 23) + 1),  # HOSTILE-179
    ],
)
def test_ranges_outside_the_limits(sector: int, sectors: int) -> None:
    """HOSTILE-175, 177..179: too long, past the capacity or wrapping 2^64 gives IOERR."""
    assert ranges_status(DISCARD, segments((sector, sectors, 0))) is Status.IOERR


def test_last_sectors_are_within_the_limits() -> None:
    """The longest range that is allowed, ending at the very end of the disk, is accepted."""
    assert parse_ranges(DISCARD, segments((1 << 24, 1 << 24, 0)), LIMITS) == (Range(1 << 24, 1 << 24),)


def test_range_cannot_wrap_without_a_capacity() -> None:
    """HOSTILE-178: 2^64 bounds a range even when the disk checks the capacity."""
    limits = Limits(RANGED, discard=SegmentLimits(1 << 24, 4))
    assert ranges_status(DISCARD, segments((2**64 - 1, 2, 0)), limits) is Status.IOERR
    assert parse_ranges(DISCARD, segments((2**64 - 2, 2, 0)), limits) == (Range(2**64 - 2, 2),)


@pytest.mark.parametrize("bad", [(0, 1, 4), (0, 1 << 31, 0), (1 << 25, 1, 0)])
def test_one_bad_segment_refuses_them_all(bad: tuple[int, int, int]) -> None:
    """HOSTILE-180: all segments are validated before any is returned."""
    with pytest.raises(BadRequest):
        parse_ranges(DISCARD, segments((0, 8, 0), (8, 8, 0), bad), LIMITS)


def test_empty_segments_have_no_effect() -> None:
    """HOSTILE-176: a segment of no sectors is OK and asks for nothing."""
    assert parse_ranges(DISCARD, segments((5, 0, 0), (6, 1, 0)), LIMITS) == (Range(6, 1),)


@pytest.mark.parametrize(("sector", "sectors"), [(1, 8), (8, 7), (4, 4)])
def test_segments_must_be_whole_blocks_of_the_disk(sector: int, sectors: int) -> None:
    """HOSTILE-183: a segment that is not whole logical blocks gives IOERR, so nothing beside it is touched."""
    limits = Limits(RANGED, sector_size=4096, discard=LIMITS.discard)
    assert ranges_status(DISCARD, segments((sector, sectors, 0)), limits) is Status.IOERR


@pytest.mark.parametrize("kind", [RequestType.SECURE_ERASE, RequestType.IN])
def test_only_ranged_requests_have_segments(kind: RequestType) -> None:
    """HOSTILE-182: segments of a type that is not offered give UNSUPP."""
    assert ranges_status(kind, segments((0, 1, 1))) is Status.UNSUPP


LENGTHS = st.one_of(st.integers(0, 4096), st.integers(0, 1 << 40))


@given(st.binary(max_size=16), LENGTHS, LENGTHS, st.integers(0, (1 << 64) - 1))
@example(header(0), 0, 512, 0)
@example(header(13), 16, 0, RANGED)
def test_any_header_gives_a_request_or_a_status(head: bytes, readable: int, writable: int, features: int) -> None:
    """Whatever the guest sends, it is a request within what it sent or a BadRequest, never another exception."""
    limits = Limits(features, discard=LIMITS.discard, write_zeroes=LIMITS.write_zeroes)
    try:
        request = parse(head, readable, writable, limits)
    except BadRequest as bad:
        assert bad.status in {Status.IOERR, Status.UNSUPP}  # noqa: PT017
        return
    match request:
        case Read(_, length):
            assert length == writable
        case Write(_, length) | Discard(length) | WriteZeroes(length):
            assert length == readable
        case GetId(length):
            assert length <= min(writable, 20)
        case Flush():
            pass


SEGMENT = st.builds(
    DISCARD_SEGMENT.pack,
    st.one_of(st.integers(0, 1 << 25), st.integers(0, 2**64 - 1)),
    st.one_of(st.integers(0, 1 << 10), st.integers(0, 2**32 - 1)),
    st.one_of(st.just(0), st.integers(0, 2**32 - 1)),
)


@given(st.one_of(st.binary(max_size=80), st.lists(SEGMENT, max_size=5).map(b"".join)), st.sampled_from(RequestType))
def test_any_payload_gives_ranges_inside_the_disk_or_a_status(payload: bytes, kind: RequestType) -> None:
    """Whatever the segments are, what is returned lies on the disk and is no longer than allowed."""
    try:
        ranges = parse_ranges(kind, payload, LIMITS)
    except BadRequest as bad:
        assert bad.status in {Status.IOERR, Status.UNSUPP}  # noqa: PT017
        return
    for each in ranges:
        assert 0 < each.sectors <= 1 << 24
        assert each.sector + each.sectors <= 1 << 25
