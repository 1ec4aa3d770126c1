"""What a guest asks for: the bytes of a request in, a value out.  Pure.

Framing never matters here ("Message Framing"): the ring core has joined the descriptors of a chain, taken the first
16 device-readable bytes as the header and the last device-writable byte as the status, and counted what is left on
each side.  :func:`parse` turns that into one of a few requests, or raises :class:`~vmmblk.errors.BadRequest` with the
status the guest gets.  The segments of DISCARD, WRITE_ZEROES and SECURE_ERASE are data, so they are read only after
``parse`` has bounded how many there can be; :func:`parse_ranges` then validates all of them before any is executed.

Positions and lengths against the capacity, and read-only, are the business of ``filters/checked.py``.  Sectors here
are those of the protocol, 512 bytes each, whatever the logical block size of the disk.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from vmmblk.errors import BadRequest
from vmmblk.spec import (
    BLK_ID_BYTES,
    DISCARD_SEGMENT,
    LIFETIME,
    REQUEST_HEADER,
    SECTOR_SIZE,
    WRITE_ZEROES_FLAG_UNMAP,
    ZONE_APPEND_SECTOR,
    ZONE_DESCRIPTOR,
    ZONE_REPORT_HEADER,
    Feature,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Discard",
    "Flush",
    "GetId",
    "GetLifetime",
    "Limits",
    "Range",
    "Read",
    "Request",
    "SecureErase",
    "SegmentLimits",
    "Write",
    "WriteZeroes",
    "ZoneAppend",
    "ZoneCommand",
    "ZoneReport",
    "parse",
    "parse_ranges",
]


@dataclass(frozen=True, slots=True)
class Read:
    """IN: fill ``length`` bytes of device-writable data from ``sector`` on.  ``length`` may be 0."""

    sector: int
    length: int


@dataclass(frozen=True, slots=True)
class Write:
    """OUT: store ``length`` bytes of device-readable data from ``sector`` on.  ``length`` may be 0."""

    sector: int
    length: int


@dataclass(frozen=True, slots=True)
class Flush:
    """FLUSH: make every write that completed before it durable."""


@dataclass(frozen=True, slots=True)
class GetId:
    """GET_ID: put the first ``length`` bytes of the padded serial, at most 20, into the device-writable data."""

    length: int


@dataclass(frozen=True, slots=True)
class Discard:
    """DISCARD: ``length`` bytes of device-readable segments follow, for :func:`parse_ranges`."""

    length: int


@dataclass(frozen=True, slots=True)
class WriteZeroes:
    """WRITE_ZEROES: ``length`` bytes of device-readable segments follow, for :func:`parse_ranges`."""

    length: int


@dataclass(frozen=True, slots=True)
class SecureErase:
    """SECURE_ERASE: ``length`` bytes of device-readable segments follow, for :func:`parse_ranges`."""

    length: int


@dataclass(frozen=True, slots=True)
class GetLifetime:
    """GET_LIFETIME: put struct virtio_blk_lifetime into the device-writable data, which has room for it."""


@dataclass(frozen=True, slots=True)
class ZoneAppend:
    """ZONE_APPEND: store ``length`` bytes of device-readable data in the zone that starts at ``sector``.

    The device-writable data begins with the 8 bytes of append_sector.
    """

    sector: int
    length: int


@dataclass(frozen=True, slots=True)
class ZoneReport:
    """ZONE_REPORT: describe zones from the one that holds ``sector`` on; the buffer has room for ``zones`` of them."""

    sector: int
    zones: int


@dataclass(frozen=True, slots=True)
class ZoneCommand:
    """ZONE_OPEN, CLOSE, FINISH or RESET of the zone that starts at ``sector``, or ZONE_RESET_ALL, which has none."""

    type: RequestType
    sector: int


Request = (
    Read
    | Write
    | Flush
    | GetId
    | Discard
    | WriteZeroes
    | SecureErase
    | GetLifetime
    | ZoneAppend
    | ZoneReport
    | ZoneCommand
)


@dataclass(frozen=True, slots=True)
class SegmentLimits:
    """What the device configuration allows of one kind of ranged request, in 512-byte sectors and segments.

    Both ends of a segment must be multiples of ``alignment`` where that is not mere advice, as it is for DISCARD.
    """

    max_sectors: int
    max_seg: int
    alignment: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """What requests are held against.

    ``features`` is the negotiated mask, ``sector_size`` the logical block size of the disk in bytes (a power of
    two), ``capacity`` the size of the disk in 512-byte sectors, None to leave that check to the disk.
    ``max_append_sectors`` is that of the configuration, in 512-byte sectors.
    """

    features: int
    sector_size: int = SECTOR_SIZE
    discard: SegmentLimits = SegmentLimits(0, 0)
    write_zeroes: SegmentLimits = SegmentLimits(0, 0)
    secure_erase: SegmentLimits = SegmentLimits(0, 0)
    capacity: int | None = None
    max_append_sectors: int = 0


@dataclass(frozen=True, slots=True)
class Range:
    """A validated segment: ``sectors`` 512-byte sectors from ``sector`` on; ``unmap`` allows deallocation."""

    sector: int
    sectors: int
    unmap: bool = False


# Plain integers: looking a member up in an enum would cost more than the rest of parse().
_IN = int(RequestType.IN)
_OUT = int(RequestType.OUT)
_HEADER_SIZE = REQUEST_HEADER.size
_unpack_header = REQUEST_HEADER.unpack


def parse(header: bytes, readable: int, writable: int, limits: Limits) -> Request:
    """The request in ``header``, the first 16 device-readable bytes of a chain (fewer if there are fewer).

    ``readable`` is the number of device-readable bytes after the header, ``writable`` that of the device-writable
    bytes before the status.  Data on the side that a request does not use is ignored, as is the reserved field.

    Raises: BadRequest, with UNSUPP for a type that is unknown or not negotiated, with IOERR for a malformed one.
    """
    if len(header) != _HEADER_SIZE:
        raise BadRequest(Status.IOERR, f"header has {len(header)} bytes, not {_HEADER_SIZE}")
    kind, _, sector = _unpack_header(header)
    if kind == _IN:
        # Position and length at once: both are multiples of the block size (a power of two), or the bits show.
        if (sector * SECTOR_SIZE | writable) % limits.sector_size:
            raise _unaligned(sector, writable, limits)
        return Read(sector, writable)
    if kind == _OUT:
        if (sector * SECTOR_SIZE | readable) % limits.sector_size:
            zoned = limits.features & Feature.BLK_ZONED.mask
            raise _unaligned(sector, readable, limits, Status.ZONE_UNALIGNED_WP if zoned else Status.IOERR)
        return Write(sector, readable)
    parse_other = _OTHERS.get(kind)
    if parse_other is None:
        raise BadRequest(Status.UNSUPP, f"request type {kind:#x} is not known")
    return parse_other(sector, readable, writable, limits)


def _unaligned(sector: int, length: int, limits: Limits, status: Status = Status.IOERR) -> BadRequest:
    return BadRequest(status, f"{length} bytes at sector {sector} are not whole blocks of {limits.sector_size}")


def _parse_flush(_sector: int, _readable: int, _writable: int, _limits: Limits) -> Request:
    # Performed whether or not FLUSH was negotiated: it can do no harm, and OK is then never a lie.
    return Flush()


def _parse_get_id(_sector: int, _readable: int, writable: int, _limits: Limits) -> Request:
    return GetId(min(writable, BLK_ID_BYTES))


def _parse_discard(_sector: int, readable: int, _writable: int, limits: Limits) -> Request:
    _check_segments(Feature.BLK_DISCARD, readable, limits, limits.discard)
    return Discard(readable)


def _parse_write_zeroes(_sector: int, readable: int, _writable: int, limits: Limits) -> Request:
    _check_segments(Feature.BLK_WRITE_ZEROES, readable, limits, limits.write_zeroes)
    return WriteZeroes(readable)


def _parse_secure_erase(_sector: int, readable: int, _writable: int, limits: Limits) -> Request:
    _check_segments(Feature.BLK_SECURE_ERASE, readable, limits, limits.secure_erase)
    return SecureErase(readable)


def _parse_get_lifetime(_sector: int, _readable: int, writable: int, limits: Limits) -> Request:
    _require(Feature.BLK_LIFETIME, limits)
    if writable < LIFETIME.size:
        raise BadRequest(Status.IOERR, f"{writable} bytes have no room for a lifetime of {LIFETIME.size}")
    return GetLifetime()


def _parse_zone_append(sector: int, readable: int, writable: int, limits: Limits) -> Request:
    _require(Feature.BLK_ZONED, limits)
    # Linux gives 15 bytes and looks into the first: there is padding between append_sector and status in its structure.
    if writable < ZONE_APPEND_SECTOR.size:
        raise BadRequest(Status.IOERR, f"{writable} bytes have no room for append_sector's {ZONE_APPEND_SECTOR.size}")
    if readable > limits.max_append_sectors * SECTOR_SIZE:
        # BLK-114, BLK-115
        status = Status.ZONE_INVALID_CMD if limits.max_append_sectors else Status.UNSUPP
        raise BadRequest(status, f"{readable} bytes to append, at most {limits.max_append_sectors} sectors are allowed")
    if readable % limits.sector_size:
        raise _unaligned(sector, readable, limits, Status.ZONE_UNALIGNED_WP)
    return ZoneAppend(_zone_sector(sector, limits), readable)


def _parse_zone_report(sector: int, _readable: int, writable: int, limits: Limits) -> Request:
    _require(Feature.BLK_ZONED, limits)
    room = writable - ZONE_REPORT_HEADER.size
    if room < 0:
        raise BadRequest(Status.IOERR, f"{writable} bytes have no room for a zone report")
    return ZoneReport(sector, room // ZONE_DESCRIPTOR.size)


def _parse_zone_command(sector: int, _readable: int, _writable: int, limits: Limits, *, kind: RequestType) -> Request:
    _require(Feature.BLK_ZONED, limits)
    if kind is RequestType.ZONE_RESET_ALL:
        return ZoneCommand(kind, 0)  # HOSTILE-195: the sector has no meaning
    return ZoneCommand(kind, _zone_sector(sector, limits))


def _zone_sector(sector: int, limits: Limits) -> int:
    """``sector``, which must start a zone, so at least a block."""
    if sector * SECTOR_SIZE % limits.sector_size:
        raise BadRequest(Status.ZONE_INVALID_CMD, f"no zone starts at sector {sector}")
    return sector


def _require(feature: Feature, limits: Limits) -> None:
    if not limits.features & feature.mask:
        raise BadRequest(Status.UNSUPP, f"{feature.name} was not negotiated")


def _check_segments(feature: Feature, length: int, limits: Limits, allowed: SegmentLimits) -> None:
    """Refuse segments before their bytes are read: a chain can hold gigabytes of them."""
    _require(feature, limits)
    segments, rest = divmod(length, DISCARD_SEGMENT.size)
    if rest or not segments:
        raise BadRequest(Status.IOERR, f"{length} bytes of segments are not a positive multiple of 16")
    if segments > allowed.max_seg:
        raise BadRequest(Status.IOERR, f"{segments} segments, at most {allowed.max_seg} are allowed")


_OTHERS: dict[int, Callable[[int, int, int, Limits], Request]] = {
    RequestType.FLUSH: _parse_flush,
    RequestType.GET_ID: _parse_get_id,
    RequestType.DISCARD: _parse_discard,
    RequestType.WRITE_ZEROES: _parse_write_zeroes,
    RequestType.SECURE_ERASE: _parse_secure_erase,
    RequestType.GET_LIFETIME: _parse_get_lifetime,
    RequestType.ZONE_APPEND: _parse_zone_append,
    RequestType.ZONE_REPORT: _parse_zone_report,
    RequestType.ZONE_OPEN: partial(_parse_zone_command, kind=RequestType.ZONE_OPEN),
    RequestType.ZONE_CLOSE: partial(_parse_zone_command, kind=RequestType.ZONE_CLOSE),
    RequestType.ZONE_FINISH: partial(_parse_zone_command, kind=RequestType.ZONE_FINISH),
    RequestType.ZONE_RESET: partial(_parse_zone_command, kind=RequestType.ZONE_RESET),
    RequestType.ZONE_RESET_ALL: partial(_parse_zone_command, kind=RequestType.ZONE_RESET_ALL),
}


def parse_ranges(request_type: RequestType, payload: bytes, limits: Limits) -> tuple[Range, ...]:
    """The segments of a DISCARD, WRITE_ZEROES or SECURE_ERASE request, all validated; those of no sectors are left out.

    Raises: BadRequest, with UNSUPP for a flag that is not allowed ("Device Operation"), with IOERR for the rest.
    """
    if request_type == RequestType.DISCARD:
        feature, allowed, flags_allowed = Feature.BLK_DISCARD, limits.discard, 0
    elif request_type == RequestType.WRITE_ZEROES:
        feature, allowed, flags_allowed = Feature.BLK_WRITE_ZEROES, limits.write_zeroes, WRITE_ZEROES_FLAG_UNMAP
    elif request_type == RequestType.SECURE_ERASE:
        feature, allowed, flags_allowed = Feature.BLK_SECURE_ERASE, limits.secure_erase, 0
    else:
        raise BadRequest(Status.UNSUPP, f"request type {request_type:#x} has no segments")
    _check_segments(feature, len(payload), limits, allowed)
    ranges = [_parse_range(segment, flags_allowed, allowed, limits) for segment in DISCARD_SEGMENT.iter_unpack(payload)]
    return tuple(each for each in ranges if each.sectors)


def _parse_range(segment: tuple[int, int, int], flags_allowed: int, allowed: SegmentLimits, limits: Limits) -> Range:
    sector, sectors, flags = segment
    if flags & ~flags_allowed:
        raise BadRequest(Status.UNSUPP, f"segment flags {flags:#x} are not allowed")
    if sectors > allowed.max_sectors:
        raise BadRequest(Status.IOERR, f"segment of {sectors} sectors, at most {allowed.max_sectors} are allowed")
    # 2^64 bounds a range even where the disk checks the capacity: nothing may wrap on its way there.
    end = 1 << 64 if limits.capacity is None else limits.capacity
    if sector + sectors > end:
        raise BadRequest(Status.IOERR, f"segment of {sectors} sectors at {sector} ends after sector {end}")
    if (sector | sectors) * SECTOR_SIZE % limits.sector_size:
        raise _unaligned(sector, sectors * SECTOR_SIZE, limits)
    if sector % allowed.alignment or sectors % allowed.alignment:
        raise BadRequest(Status.IOERR, f"{sectors} sectors at {sector} are not multiples of {allowed.alignment}")
    return Range(sector, sectors, bool(flags & WRITE_ZEROES_FLAG_UNMAP))
