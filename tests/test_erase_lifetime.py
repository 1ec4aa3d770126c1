"""SECURE_ERASE and GET_LIFETIME, from the request to the disk."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import struct
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from disks import Call, Disk

from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.block import Block, BlockInfo, Buffers, Lifetime, Operation, Topology, operations
from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.client.errors import StatusError
from vmmblk.device import configure
from vmmblk.errors import BadRequest, BlockError, Disconnected, IsReadOnly, Unimplemented, Unknown
from vmmblk.filters import prepare
from vmmblk.filters.readonly import ReadOnly
from vmmblk.request import GetLifetime, Limits, Range, SecureErase, SegmentLimits, parse, parse_ranges
from vmmblk.spec import DISCARD_SEGMENT, REQUEST_HEADER, BlkConfig, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    Serve = Callable[..., Any]

BOTH = Feature.BLK_SECURE_ERASE.mask | Feature.BLK_LIFETIME.mask
LIMITS = Limits(features=BOTH, secure_erase=SegmentLimits(max_sectors=64, max_seg=2, alignment=8), capacity=1 << 20)
LIFETIME_HEADER = REQUEST_HEADER.pack(RequestType.GET_LIFETIME, 0, 0)
ERASE_HEADER = REQUEST_HEADER.pack(RequestType.SECURE_ERASE, 0, 0)


class Worn(Disk):
    """A disk that can erase and knows its wear."""

    worn: Any = Lifetime(2, 7, 11)

    async def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Fill with 0xee, so that it shows."""
        await self._enter("secure_erase", sector_start, sectors)
        size = self.info.sector_size
        self.data[sector_start * size : (sector_start + sectors) * size] = b"\xee" * (sectors * size)

    def lifetime(self) -> Any:
        """What the test says, from a thread."""
        self.calls.append(("lifetime",))
        if isinstance(self.worn, Exception):
            raise self.worn
        return self.worn


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """One segment of a SECURE_ERASE request."""
    return DISCARD_SEGMENT.pack(sector, sectors, flags)


def refused(attempt: Callable[[], object]) -> Status:
    """The status with which a request is refused."""
    with pytest.raises(BadRequest) as caught:
        attempt()
    return caught.value.status


def error(call: Awaitable[Any] | None) -> BlockError | None:
    """What awaiting a call raises."""

    async def wait() -> None:
        assert call is not None
        await call

    try:
        asyncio.run(wait())
    except BlockError as exc:
        return exc
    return None


# Requests.


def test_secure_erase_and_get_lifetime_are_parsed() -> None:
    """BLK-075, BLK-081: segments are device-readable data, a lifetime goes to the device-writable data."""
    assert parse(ERASE_HEADER, 32, 0, LIMITS) == SecureErase(32)
    assert parse(LIFETIME_HEADER, 0, 6, LIMITS) == GetLifetime()
    assert parse(LIFETIME_HEADER, 9, 4096, LIMITS) == GetLifetime()


@pytest.mark.parametrize("header", [ERASE_HEADER, LIFETIME_HEADER])
def test_what_was_not_negotiated_is_not_supported(header: bytes) -> None:
    """HOSTILE-168, HOSTILE-172: without its feature each gets UNSUPP."""
    assert refused(lambda: parse(header, 16, 6, Limits(features=~BOTH))) is Status.UNSUPP


@pytest.mark.parametrize("room", [0, 1, 5])
def test_a_lifetime_needs_room(room: int) -> None:
    """HOSTILE-169: fewer than 6 bytes for the answer give IOERR."""
    assert refused(lambda: parse(LIFETIME_HEADER, 0, room, LIMITS)) is Status.IOERR


@pytest.mark.parametrize("length", [0, 15, 17, 48])
def test_segments_that_cannot_be_are_refused(length: int) -> None:
    """BLK-082: no segment, half a segment and more than max_secure_erase_seg give IOERR."""
    assert refused(lambda: parse(ERASE_HEADER, length, 0, LIMITS)) is Status.IOERR


@pytest.mark.parametrize("flags", [1, 2, 1 << 31])
def test_a_secure_erase_has_no_flags(flags: int) -> None:
    """BLK-085, HOSTILE-182: any flag, unmap too, gives UNSUPP."""
    assert refused(lambda: parse_ranges(RequestType.SECURE_ERASE, segment(0, 8, flags), LIMITS)) is Status.UNSUPP


@pytest.mark.parametrize(("sector", "sectors"), [(4, 8), (8, 4), (0, 72), ((1 << 20) - 8, 16)])
def test_a_range_to_erase_is_aligned_and_within_limits(sector: int, sectors: int) -> None:
    """HOSTILE-183: what is not a multiple of secure_erase_sector_alignment, too long or outside gives IOERR."""
    assert refused(lambda: parse_ranges(RequestType.SECURE_ERASE, segment(sector, sectors), LIMITS)) is Status.IOERR
    assert parse_ranges(RequestType.SECURE_ERASE, segment(8, 16), LIMITS) == (Range(8, 16),)


# The device.


def test_the_device_offers_what_the_disk_can() -> None:
    """BLK-016, BLK-017, BLK-022, BLK-078, BLK-079: features follow the disk, limits of what is offered are not 0."""
    info = BlockInfo(read_write=True, sector_size=4096, size_sectors=8)
    config = configure(info, Operation.SECURE_ERASE | Operation.LIFETIME, Topology())
    assert config.features & BOTH == BOTH
    blk = config.blk
    assert (blk.max_secure_erase_seg > 0, blk.secure_erase_sector_alignment) == (True, 8)
    assert blk.max_secure_erase_sectors % 8 == 0 < blk.max_secure_erase_sectors
    neither = configure(info, Operation(0), Topology())
    assert neither.features & BOTH == 0
    assert neither.blk.max_secure_erase_sectors == neither.blk.max_secure_erase_seg == 0


def test_a_read_only_device_does_not_erase() -> None:
    """SECURE_ERASE changes a disk; reading its wear does not."""
    info = BlockInfo(read_write=False, sector_size=512, size_sectors=8)
    config = configure(info, Operation.SECURE_ERASE | Operation.LIFETIME, Topology())
    assert config.features & BOTH == Feature.BLK_LIFETIME.mask


# Blocks and filters.


@pytest.mark.parametrize("values", [(4, 0, 0), (-1, 0, 0), (0, 12, 0), (0, 0, 12)])
def test_a_reserved_lifetime_cannot_be_made(values: tuple[int, int, int]) -> None:
    """BLK-076, BLK-077, BLK-080: no reserved value can reach a guest."""
    with pytest.raises(ValueError, match="reserved"):
        Lifetime(*values)


def test_filters_forward_both_and_hold_them_against_the_contract() -> None:
    """A lifetime comes back through every filter; erasing is checked for range, read-only and disconnected."""
    disk = Worn(sectors=16)
    on_top = prepare(disk)
    assert operations(on_top) == Operation.SECURE_ERASE | Operation.LIFETIME

    async def use() -> None:
        assert await on_top.lifetime() == Lifetime(2, 7, 11)  # type: ignore[attr-defined]
        await on_top.secure_erase(15, 1)  # type: ignore[attr-defined]

    asyncio.run(use())
    assert disk.calls == [("lifetime",), ("secure_erase", 15, 1)]
    assert isinstance(error(on_top.secure_erase(15, 2)), Unknown)  # type: ignore[attr-defined]
    read_only = prepare(ReadOnly(disk))
    assert operations(read_only) == Operation.LIFETIME
    assert isinstance(error(read_only.secure_erase(0, 1)), IsReadOnly)  # type: ignore[attr-defined]
    assert isinstance(error(ReadOnly(disk).secure_erase(0, 1)), IsReadOnly)
    assert error(on_top.disconnect()) is None
    assert isinstance(error(on_top.lifetime()), Disconnected)  # type: ignore[attr-defined]
    assert isinstance(error(prepare(Disk()).lifetime()), Unimplemented)  # type: ignore[attr-defined]
    assert disk.calls == [("lifetime",), ("secure_erase", 15, 1), ("disconnect",)]


def test_a_plain_disk_erases_in_a_thread() -> None:
    """secure_erase and lifetime may be plain methods, and lifetime may be asynchronous."""
    calls: list[Call] = []

    class Plain(Block):
        info = BlockInfo(read_write=True, sector_size=512, size_sectors=16)

        def read(self, sector_start: int, buffers: Buffers) -> None:
            """Nothing."""

        def secure_erase(self, sector_start: int, sectors: int) -> None:
            calls.append((sector_start, sectors))

        async def lifetime(self) -> Lifetime:
            return Lifetime(1)

    async def use() -> None:
        on_top: Any = prepare(Plain())
        await on_top.secure_erase(2, 3)
        assert await on_top.lifetime() == Lifetime(1)

    asyncio.run(use())
    assert calls == [(2, 3)]


def test_memory_erases_by_zeroing() -> None:
    """What was erased reads as zeroes, its neighbours stay."""

    async def use() -> bytes:
        memory = Memory(16)
        await memory.write(0, [memoryview(b"x" * 16 * 512)])
        await memory.secure_erase(3, 9)
        data = bytearray(16 * 512)
        await memory.read(0, [memoryview(data)])
        return bytes(data)

    assert asyncio.run(use()) == b"x" * 3 * 512 + bytes(9 * 512) + b"x" * 4 * 512


@pytest.mark.parametrize(
    ("release", "answer", "offered"),
    [
        ("6.1.0-28-amd64", errno.EINVAL, True),
        ("6.12.107+deb13-amd64", errno.EOPNOTSUPP, False),
        ("7.0", None, False),
        ("5.19.0-rc1", errno.EINVAL, True),
        ("5.18.16-1", errno.EINVAL, False),
    ],
)
def test_a_block_device_erases_only_if_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, release: str, answer: int | None, offered: bool
) -> None:
    """FEAT-004: BLKSECDISCARD is asked about with a range that erases nothing, and then gets bytes, not sectors.

    Before 5.19 Linux does not tell erasing from discarding.
    """
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8192))
    asked: list[tuple[int, int]] = []

    def ioctl(fd: int, request: int, argument: bytes) -> bytes:
        assert request == 0x127D
        asked.append(struct.unpack("=QQ", argument))
        if answer is not None and asked[-1] == (1, 1):
            raise OSError(answer, os.strerror(answer))
        return b""

    monkeypatch.setattr("vmmblk.backends.file._is_block_device", lambda _: True)
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release=release))
    disk = File(image, lock=False)
    assert (Operation.SECURE_ERASE in operations(disk)) is offered
    assert asked == ([] if release.startswith("5.18") else [(1, 1)])
    if offered:
        disk.secure_erase(2, 3)
        assert asked[1:] == [(1024, 1536)]
    disk.disconnect()


def test_a_file_does_not_offer_to_erase(tmp_path: Path) -> None:
    """No file system can promise that."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8192))
    disk = File(image)
    assert Operation.SECURE_ERASE not in operations(disk)
    disk.disconnect()


# The server.


def test_a_guest_erases_and_reads_the_wear(serve: Serve) -> None:
    """SECURE_ERASE reaches the disk range by range, GET_LIFETIME gives its three values (BLK-075)."""
    served = serve(Worn(sector_size=4096))
    with attach(served.path) as v:
        assert v.features & BOTH == BOTH
        assert v.config(BlkConfig.SECURE_ERASE_SECTOR_ALIGNMENT) == 8
        assert v.get_lifetime() == (2, 7, 11)
        v.secure_erase([(8, 16), (64, 0), (32, 8)])
        assert v.read(8, 4096) == b"\xee" * 4096
        with pytest.raises(StatusError) as caught:
            v.secure_erase([(0, 8), (4, 8)])
        assert caught.value.status == Status.IOERR
    assert [call for call in served.disk.calls if call[0] == "secure_erase"] == [
        ("secure_erase", 1, 2),
        ("secure_erase", 4, 1),
    ]


def test_a_lifetime_is_framed_at_any_byte(serve: Serve) -> None:
    """Room for more than 6 bytes gets 6, split anywhere, and the used length says so."""
    with attach(serve(Worn()).path) as v:
        pending = v.submit(RequestType.GET_LIFETIME, data_in=10, framing=[16, 1, 3, 4, 3])
        v.kick()
        assert v.wait(pending).result() == struct.pack("<HHH", 2, 7, 11) + b"\xa5" * 4
        assert pending.written == 6


def test_without_the_features_both_are_unsupported(serve: Serve) -> None:
    """HOSTILE-168, HOSTILE-172: a driver that did not take the features gets UNSUPP, and the disk is not asked."""
    served = serve(Worn())
    with attach(served.path, features=SUPPORTED & ~BOTH) as v:
        for attempt in (v.get_lifetime, lambda: v.secure_erase([(0, 8)])):
            with pytest.raises(StatusError) as caught:
                attempt()  # type: ignore[operator]
            assert caught.value.status == Status.UNSUPP
    assert not served.disk.calls


def test_a_disk_that_fails_to_tell_its_wear(serve: Serve, logs: Any) -> None:
    """An error of the disk is an I/O error for the guest."""
    logs.expect("the disk fails: .*no answer")
    disk = Worn()
    disk.worn = OSError(errno.EIO, "no answer")
    with attach(serve(disk).path) as v, pytest.raises(StatusError) as caught:
        v.get_lifetime()
    assert caught.value.status == Status.IOERR
