"""Requests of every kind, from a driver through the socket to the disk and back."""

from __future__ import annotations

import asyncio
import errno
import itertools
from typing import TYPE_CHECKING, Any

import pytest
from conftest import on_both_engines
from disks import CachedDisk, Disk, FullDisk

from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.client.errors import StatusError
from vmmblk.client.queue import Descriptor
from vmmblk.errors import Disconnected, IsReadOnly, Unimplemented, Unknown
from vmmblk.spec import DISCARD_SEGMENT, REQUEST_HEADER, BlkConfig, DescFlag, DeviceStatus, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Logs, Served

    from vmmblk.client.driver import VirtioBlk

    Serve = Callable[..., Served]

VERSION_1 = Feature.VERSION_1.mask
FLUSH = Feature.BLK_FLUSH.mask
CONFIG_WCE = Feature.BLK_CONFIG_WCE.mask
NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT
POISON = 0xA5
PATTERN = bytes(range(256)) * 64  # 16 KiB


def call_status(driver: VirtioBlk, *args: Any, **kwargs: Any) -> int:
    """The status of one request."""
    pending = driver.submit(*args, **kwargs)
    driver.kick()
    status = driver.wait(pending).status
    assert status is not None
    return status


def segments(*each: tuple[int, int, int]) -> bytes:
    """The payload of DISCARD and WRITE_ZEROES."""
    return b"".join(DISCARD_SEGMENT.pack(*one) for one in each)


# Reading, writing, and where the data goes.


@on_both_engines
def test_data_written_is_data_read(serve: Serve) -> None:
    """OUT stores and IN fetches at the sector of the header; neighbours stay as they are (BLK-053, 054, 058, 059)."""
    served = serve()
    with attach(served.path) as v:
        v.write(8, PATTERN)
        assert v.read(8, len(PATTERN)) == PATTERN
        assert v.read(7, 512) == bytes(512)
        assert v.read(8 + 32, 512) == bytes(512)
    assert served.disk.data[: 41 * 512] == bytes(8 * 512) + PATTERN + bytes(512)


@on_both_engines
def test_used_length_counts_data_and_status(serve: Serve) -> None:
    """A read of n bytes has used length n + 1, a write 1 (BLK-057)."""
    with attach(serve().path) as v:
        requests = [v.submit(RequestType.IN, 0, data_in=1024), v.submit(RequestType.OUT, 0, bytes(512))]
        v.kick()
        v.wait_all(requests)
    assert [each.written for each in requests] == [1025, 1]


@on_both_engines
@pytest.mark.parametrize(
    "framing",
    [
        [1] * 16,
        [7, 9, 100, 412],
        [16 + 100, 1024],
        [3, 14, 511, 1, 513],
        lambda r, w: [r, w],
        lambda r, w: [5] * (r // 5) + [r % 5] + [333] * (w // 333),
    ],
    ids=["header-bytes", "split", "shared", "odd", "whole", "crumbs"],
)
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_framing_means_nothing(serve: Serve, framing: Any, indirect: bool) -> None:
    """However header, data and status are cut, the disk sees whole sectors and the data is right (RING-SPLIT-004).

    And BLK-050 and 051.
    """
    served = serve(queue_size=1024)
    with attach(served.path, indirect=indirect) as v:
        v.call(RequestType.OUT, 4, PATTERN[: 4 * 512], framing=framing)
        assert v.call(RequestType.IN, 4, data_in=4 * 512, framing=framing) == PATTERN[: 4 * 512]
    assert served.disk.data[4 * 512 : 8 * 512] == PATTERN[: 4 * 512]
    assert all(length % 512 == 0 for buffers in served.disk.buffers for length in buffers)


@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
def test_whole_sectors_are_not_copied(serve: Serve, indirect: bool) -> None:
    """Elements of whole sectors reach the disk one by one, as they lie in guest memory."""
    served = serve()
    with attach(served.path, indirect=indirect, memory=None) as v:
        v.call(RequestType.IN, 0, data_in=4096, framing=[16, 2048, 2048])
    assert served.disk.buffers in ([(4096,)], [(2048, 2048)])


@pytest.mark.parametrize(
    "needs", [{"buffer_alignment": 4096}, {"bounce": True}, {"buffer_alignment": 512, "pins_memory": True}], ids=str
)
@pytest.mark.parametrize("skew", [0, 512, 8], ids=["aligned", "sector", "odd"])
def test_a_disk_that_wants_aligned_buffers_gets_them(serve: Serve, needs: dict[str, Any], skew: int) -> None:
    """Whatever the guest's alignment, the data is right and what the disk sees is aligned."""
    seen: list[int] = []

    class Picky(Disk):
        async def read(self, sector_start: int, buffers: Any) -> None:
            seen.extend(len(buffer) % needs.get("buffer_alignment", 1) for buffer in buffers)
            await super().read(sector_start, buffers)

    disk = Picky()
    for name, value in needs.items():
        setattr(disk, name, value)
    served = serve(disk)
    disk.data[:] = PATTERN * (len(disk.data) // len(PATTERN))
    with attach(served.path) as v:
        block = v.memory.alloc(64 << 10)
        header, data, status = block, block + 4096 + skew, block + (60 << 10)
        v.memory.write(header, REQUEST_HEADER.pack(RequestType.IN, 0, 8))
        pending = v.submit_raw(
            [Descriptor(header, 16, NEXT), Descriptor(data, 8192, NEXT | WRITE), Descriptor(status, 1, WRITE)]
        )
        v.kick()
        v.wait(pending)
        assert v.memory.read(status, 1) == bytes([Status.OK])
        assert v.memory.read(data, 8192) == PATTERN[4096 : 4096 + 8192]
        assert v.memory.read(data + 8192, 16) == bytes(16)
    assert not any(seen)


def test_a_bounced_request_is_cut_into_pieces(serve: Serve) -> None:
    """Three megabytes through private memory arrive whole, both ways, in pieces of whole sectors."""
    disk = Disk(sectors=16384)
    disk.bounce = True
    served = serve(disk)
    data = PATTERN * (3 * 64) + PATTERN[:512]
    with attach(served.path) as v:
        v.write(3, data)
        assert v.read(3, len(data)) == data
    assert sum(sum(each) for each in disk.buffers) == 2 * len(data)
    assert max(sum(each) for each in disk.buffers) <= 1 << 20


@on_both_engines
def test_a_bounced_request_past_the_end_touches_nothing(serve: Serve) -> None:
    """A range that leaves the disk is refused whole, not after its first piece (HOSTILE-154)."""
    disk = Disk(sectors=4096)
    disk.bounce = True
    served = serve(disk)
    with attach(served.path) as v:
        assert call_status(v, RequestType.OUT, 2048, b"x" * (2 << 20)) == Status.IOERR
    assert not any(disk.data)


@on_both_engines
def test_a_request_of_sixteen_megabytes(serve: Serve) -> None:
    """A huge request is served whole."""
    served = serve(Disk(sectors=65536))
    data = PATTERN * 1024
    with attach(served.path) as v:
        v.write(0, data)
        assert v.read(0, len(data)) == data


class Bottomless(Disk):
    """Terabytes of nothing."""

    def __init__(self) -> None:
        super().__init__(0)
        self.info = type(self.info)(read_write=True, sector_size=512, size_sectors=1 << 40)
        self.asked: list[int] = []

    async def read(self, _sector: int, buffers: Any) -> None:
        """Count."""
        self.asked.append(sum(map(len, buffers)))


@pytest.mark.parametrize(("pieces", "status"), [(127, Status.OK), (128, Status.IOERR), (300, Status.IOERR)])
def test_requests_around_four_gigabytes(serve: Serve, pieces: int, status: Status) -> None:
    """Close to 4 GiB in one request is served, more is an error, and nothing wraps (HOSTILE-008, 158)."""
    served = serve(Bottomless())
    with attach(served.path) as v:
        block = v.memory.alloc(32 << 20)
        table = v.memory.alloc(16 * (pieces + 2))
        head = v.memory.alloc(4096)
        v.memory.write(head, REQUEST_HEADER.pack(RequestType.IN, 0, 0) + b"\xff")
        chain = [(head, 16, NEXT, 1)]
        chain += [(block, 32 << 20, NEXT | WRITE, 2 + i) for i in range(pieces)]
        chain += [(head + 16, 1, WRITE, 0)]
        raw = b"".join(
            address.to_bytes(8, "little")
            + length.to_bytes(4, "little")
            + int(flags).to_bytes(2, "little")
            + following.to_bytes(2, "little")
            for address, length, flags, following in chain
        )
        v.memory.write(table, raw)
        pending = v.submit_raw([Descriptor(table, len(raw), INDIRECT)])
        v.kick()
        v.wait(pending)
        assert v.memory.read(head + 16, 1) == bytes([status])
    assert served.disk.asked == ([pieces * (32 << 20)] if status == Status.OK else [])


@on_both_engines
def test_zero_length_data_is_no_io(serve: Serve) -> None:
    """IN and OUT without data are OK, and the disk is not asked (HOSTILE-153)."""
    served = serve()
    with attach(served.path) as v:
        assert call_status(v, RequestType.IN, 0) == Status.OK
        assert call_status(v, RequestType.OUT, 0) == Status.OK
    assert not served.disk.count("read")
    assert not served.disk.count("write")


def test_completions_may_overtake_each_other(serve: Serve) -> None:
    """A request that the disk holds does not keep the others back (BLK-052)."""
    disk = Disk()
    disk.held.add("write")
    served = serve(disk)
    with attach(served.path) as v:
        slow = v.submit(RequestType.OUT, 0, bytes(512))
        quick = v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        assert v.wait(quick).status == Status.OK
        assert not slow.done
        disk.release()
        assert v.wait(slow).status == Status.OK


# The edges of the disk and of a sector.


@on_both_engines
@pytest.mark.parametrize("kind", [RequestType.IN, RequestType.OUT])
@pytest.mark.parametrize(
    ("sector", "length", "status"),
    [
        (2047, 512, Status.OK),
        (2048, 512, Status.IOERR),
        (2047, 1024, Status.IOERR),
        (0, 511, Status.IOERR),
        (0, 513, Status.IOERR),
        (1 << 55, 512, Status.IOERR),
        ((1 << 55) + 1, 512, Status.IOERR),
        ((1 << 64) - 1, 512, Status.IOERR),
        ((1 << 64) - 1, 1024, Status.IOERR),
    ],
)
def test_ranges(serve: Serve, kind: RequestType, sector: int, length: int, status: Status) -> None:
    """The last sector is there, what lies past it is an error that touches nothing (HOSTILE-152, 154 to 157)."""
    served = serve()
    out = b"x" * length if kind == RequestType.OUT else b""
    with attach(served.path) as v:
        assert call_status(v, kind, sector, out, 0 if out else length) == status
        assert v.read(0, 512) == bytes(512)
    assert any(served.disk.data) == (status == Status.OK and bool(out))


@on_both_engines
def test_a_failed_read_overstates_nothing(serve: Serve) -> None:
    """An error has a used length of at most the status byte, and leaves the buffer alone (HOSTILE-170)."""
    with attach(serve().path) as v:
        pending = v.submit(RequestType.IN, 5000, data_in=512)
        v.kick()
        assert v.wait(pending).status == Status.IOERR
        assert pending.written <= 1
        assert pending.data == bytes([POISON]) * 512


def test_sectors_of_4096_bytes(serve: Serve) -> None:
    """Positions stay in units of 512 bytes; what is not a whole block is an error (BLK-025, HOSTILE-160)."""
    served = serve(FullDisk(64, sector_size=4096))
    with attach(served.path) as v:
        assert (v.block_size, v.capacity) == (4096, 512)
        v.write(16, PATTERN[:8192])
        assert v.read(16, 8192) == PATTERN[:8192]
        for sector, length in ((1, 4096), (8, 512), (8, 4608), (4, 4096)):
            assert call_status(v, RequestType.IN, sector, data_in=length) == Status.IOERR
            assert call_status(v, RequestType.OUT, sector, bytes(length)) == Status.IOERR
        v.call(RequestType.OUT, 8, PATTERN[:4096], framing=[16, 512, 512])  # elements smaller than a block
        assert v.read(8, 4096) == PATTERN[:4096]
        v.write_zeroes([(16, 8)])
        v.discard([(24, 8)])
        assert call_status(v, RequestType.WRITE_ZEROES, 0, segments((1, 8, 0))) == Status.IOERR
        assert call_status(v, RequestType.WRITE_ZEROES, 0, segments((8, 4, 0))) == Status.IOERR
    assert served.disk.calls[0] == ("write_cached", 2, 2)
    assert ("write_zeroes", 2, 1, False) in served.disk.calls
    assert ("discard", 3, 1) in served.disk.calls


# Broken chains that still deserve an answer.


@on_both_engines
@pytest.mark.parametrize("length", [0, 1, 15])
def test_a_short_header_is_an_error(serve: Serve, length: int) -> None:
    """Fewer than 16 readable bytes: IOERR in the status byte (HOSTILE-140)."""
    with attach(serve().path) as v:
        block = v.memory.alloc(4096)
        v.memory.write(block, bytes(64) + b"\xff")
        chain = [Descriptor(block, length, NEXT)] if length else []
        pending = v.submit_raw([*chain, Descriptor(block + 64, 1, WRITE)])
        v.kick()
        v.wait(pending)
        assert v.memory.read(block + 64, 1) == bytes([Status.IOERR])
        assert v.read(0, 512) == bytes(512)


@on_both_engines
def test_a_chain_without_a_status_byte_comes_back_unused(serve: Serve) -> None:
    """No writable byte: used length 0, nothing is done, and others are served (HOSTILE-141)."""
    served = serve()
    with attach(served.path) as v:
        block = v.memory.alloc(4096)
        v.memory.write(block, REQUEST_HEADER.pack(RequestType.OUT, 0, 0) + b"x" * 512)
        pending = v.submit_raw([Descriptor(block, 528)])
        v.kick()
        assert v.wait(pending).written == 0
        v.write(1, PATTERN[:512])
    assert served.disk.data[:1024] == bytes(512) + PATTERN[:512]


@on_both_engines
def test_a_header_in_writable_memory_is_not_read(serve: Serve) -> None:
    """The header is what is readable, whatever the first element holds (HOSTILE-144)."""
    served = serve()
    with attach(served.path) as v:
        block = v.memory.alloc(4096)
        v.memory.write(block, REQUEST_HEADER.pack(RequestType.OUT, 0, 0) + b"x" * 512 + b"\xff")
        pending = v.submit_raw([Descriptor(block, 16, NEXT | WRITE), Descriptor(block + 528, 1, WRITE)])
        v.kick()
        v.wait(pending)
        assert v.memory.read(block + 528, 1) == bytes([Status.IOERR])
    assert not served.disk.count("write")


@on_both_engines
def test_a_status_byte_inside_the_data_is_stored_last(serve: Serve) -> None:
    """Status over data, and status over the header: the status value is what stays (HOSTILE-151)."""
    served = serve()
    served.disk.data[:512] = b"\x77" * 512
    with attach(served.path) as v:
        block = v.memory.alloc(4096)
        v.memory.write(block, REQUEST_HEADER.pack(RequestType.IN, 0, 0))
        header, data = Descriptor(block, 16, NEXT), Descriptor(block + 512, 512, NEXT | WRITE)
        pending = v.submit_raw([header, data, Descriptor(block + 700, 1, WRITE)])
        v.kick()
        v.wait(pending)
        assert v.memory.read(block + 699, 3) == b"\x77\x00\x77"


@on_both_engines
def test_data_on_the_wrong_side_is_not_used(serve: Serve) -> None:
    """A write with writable data, a read with readable data: neither is taken for the other (HOSTILE-148 to 150)."""
    served = serve()
    served.disk.data[:] = b"\x55" * len(served.disk.data)
    with attach(served.path) as v:
        write = v.submit(RequestType.OUT, 0, b"", 512)
        read = v.submit(RequestType.IN, 0, b"y" * 512, 512)
        both = v.submit(RequestType.OUT, 2, b"z" * 512, 512)
        v.kick()
        v.wait_all([write, read, both])
        assert (write.status, write.data, write.written <= 1) == (Status.OK, bytes([POISON]) * 512, True)
        assert (read.status, read.data) == (Status.OK, b"\x55" * 512)
        assert (both.status, both.data, both.written <= 1) == (Status.OK, bytes([POISON]) * 512, True)
    assert served.disk.data[:1536] == b"\x55" * 1024 + b"z" * 512


@on_both_engines
def test_zero_length_elements_are_skipped(serve: Serve) -> None:
    """Empty elements anywhere in a chain change nothing (HOSTILE-010)."""
    served = serve()
    served.disk.data[:512] = PATTERN[:512]
    with attach(served.path) as v:
        block = v.memory.alloc(4096)
        v.memory.write(block, REQUEST_HEADER.pack(RequestType.IN, 0, 0))
        pending = v.submit_raw(
            [
                Descriptor(0, 0, NEXT),
                Descriptor(block, 16, NEXT),
                Descriptor(block, 0, NEXT),
                Descriptor(block + 1024, 512, NEXT | WRITE),
                Descriptor(0, 0, NEXT | WRITE),
                Descriptor(block + 2048, 1, WRITE | NEXT),
                Descriptor(1 << 60, 0, WRITE),
            ]
        )
        v.kick()
        assert v.wait(pending).written == 513
        assert v.memory.read(block + 1024, 512) == PATTERN[:512]


# Types.


@on_both_engines
@pytest.mark.parametrize("kind", [2, 3, 5, 6, 7, 9, 10, 12, 14, 15, 16, 18, 26, 27, 0x80000000, 0x80000004, 0xFFFFFFFF])
def test_types_that_are_not_offered_are_unsupported(serve: Serve, kind: int) -> None:
    """Unknown, legacy and optional types get UNSUPP (BLK-056, HOSTILE-145, 147, 168, 187)."""
    served = serve(FullDisk())
    with attach(served.path) as v:
        assert call_status(v, kind, 0, segments((0, 8, 0)), 512) == Status.UNSUPP
    assert [call[0] for call in served.disk.calls] == []


@on_both_engines
def test_the_reserved_field_is_ignored(serve: Serve) -> None:
    """A header with a reserved field that is not 0 is served (HOSTILE-146)."""
    with attach(serve().path) as v:
        assert call_status(v, RequestType.IN, 0, data_in=512, reserved=0xFFFFFFFF) == Status.OK


@on_both_engines
@pytest.mark.parametrize(
    ("serial", "told"),
    [("", b"own-serial"), ("s", b"s"), ("x" * 19, b"x" * 19), ("12345678901234567890", b"12345678901234567890")],
)
@pytest.mark.parametrize("room", [0, 1, 19, 20, 21, 512])
def test_get_id(serve: Serve, serial: str, told: bytes, room: int) -> None:
    """GET_ID gives at most 20 bytes, NUL padded, never more than there is room (BLK-073, 074, HOSTILE-166, 167)."""
    with attach(serve(FullDisk(), serial=serial).path) as v:
        pending = v.submit(RequestType.GET_ID, 0, data_in=room)
        v.kick()
        v.wait(pending)
    expected = (told.ljust(20, b"\0") + bytes([POISON]) * 512)[:room]
    assert (pending.status, pending.data) == (Status.OK, expected)
    assert pending.written <= 21


@on_both_engines
@pytest.mark.parametrize("extra", [{}, {"sector": 5}, {"data_out": bytes(700)}, {"data_in": 300}], ids=str)
@pytest.mark.parametrize("negotiated", [True, False])
def test_flush_is_always_performed(serve: Serve, extra: dict[str, Any], negotiated: bool) -> None:
    """With a sector, with data, without the feature: a FLUSH that says OK has flushed (BLK-010, HOSTILE-163 to 165)."""
    served = serve(CachedDisk())
    with attach(served.path, features=SUPPORTED if negotiated else SUPPORTED & ~FLUSH & ~CONFIG_WCE) as v:
        before = served.disk.count("flush")
        assert call_status(v, RequestType.FLUSH, **extra) == Status.OK
        assert served.disk.count("flush") > before


# Durability: virtio-layouts.md section 14.


@pytest.mark.parametrize(
    ("features", "writeback", "cached"),
    [
        (0, None, False),  # FLUSH offered, neither negotiated: stable at completion
        (CONFIG_WCE, None, False),  # CONFIG_WCE without FLUSH starts written through
        (CONFIG_WCE, 0, False),
        (CONFIG_WCE, 1, True),
        (FLUSH | CONFIG_WCE, 0, False),
        (FLUSH | CONFIG_WCE, 1, True),
        (FLUSH | CONFIG_WCE, None, True),  # as the server was told to start
        (FLUSH, None, True),  # stable after a later flush
    ],
)
def test_durability(serve: Serve, features: int, writeback: int | None, cached: bool) -> None:
    """A completed write is stable at once, or after a flush, as negotiation and cache mode say (BLK-012, 065, 066)."""
    disk = CachedDisk()
    served = serve(disk)
    with attach(served.path, features=VERSION_1 | features) as v:
        if writeback is not None:
            v.writeback = bool(writeback)
        if features & CONFIG_WCE:
            assert v.writeback is cached
        v.write(0, PATTERN[:512])
        assert disk.data[:512] == PATTERN[:512]
        assert disk.stable[:512] == (bytes(512) if cached else PATTERN[:512])
        assert [call[0] for call in disk.calls if call[0] != "flush"] == ["write_cached" if cached else "write"]
        v.flush()
        assert disk.stable[:512] == PATTERN[:512]


@pytest.mark.parametrize("features", [0, FLUSH])
def test_a_disk_without_a_cache_is_always_stable(serve: Serve, features: int) -> None:
    """A disk with no flush gets write() alone; FLUSH is OK and CONFIG_WCE is not offered (BLK-030, 031)."""
    served = serve()
    with attach(served.path, features=VERSION_1 | features) as v:
        assert v.device.features & FLUSH
        assert not v.device.features & CONFIG_WCE
        v.write(0, PATTERN[:512])
        assert served.disk.stable[:512] == PATTERN[:512]
        v.flush()
    assert [call[0] for call in served.disk.calls] == ["write"]


def test_the_server_can_start_written_through(serve: Serve) -> None:
    """With cache=writethrough a guest that does not switch has every write persisted."""
    served = serve(CachedDisk(), cache="writethrough")
    with attach(served.path) as v:
        assert not v.writeback
        v.write(0, bytes(512))
        v.writeback = True
        assert v.writeback  # read back: a posted write may still be on its way
        v.write(0, bytes(512))
    assert [call[0] for call in served.disk.calls][:2] == ["write", "write_cached"]


def test_switching_the_cache_off_flushes_what_it_held(serve: Serve) -> None:
    """Writes that completed with the cache on become stable when it is switched off, without a FLUSH."""
    disk = CachedDisk()
    served = serve(disk)
    with attach(served.path) as v:
        v.write(0, PATTERN[:512])
        assert disk.stable[:512] == bytes(512)
        v.writeback = False
        disk.wait_for("flush")
        v.write(1, PATTERN[:512])
        assert v.writeback is False
        assert disk.stable[:1024] == PATTERN[:512] * 2
    assert [call[0] for call in disk.calls][:3] == ["write_cached", "flush", "write"]


@on_both_engines
def test_negotiating_without_flush_flushes_what_an_earlier_driver_left(serve: Serve) -> None:
    """A driver that cannot flush follows one that could: what that one left in the cache becomes stable."""
    disk = CachedDisk()
    served = serve(disk)
    with attach(served.path) as v:
        v.write(0, PATTERN[:512])
        v.wanted = VERSION_1
        v.init()
        v.read(0, 512)
        disk.wait_for("flush")
        v.read(0, 512)
    assert disk.stable[:512] == PATTERN[:512]


def test_a_write_across_a_cache_switch_completes(serve: Serve) -> None:
    """A switch with writes in flight is answered at once and disturbs none of them (BLK-068)."""
    disk = CachedDisk()
    disk.held.add("write_cached")
    served = serve(disk)
    with attach(served.path) as v:
        pending = v.submit(RequestType.OUT, 0, PATTERN[:512])
        v.kick()
        disk.wait_for("write_cached")
        v.writeback = False
        assert v.writeback is False
        disk.release()
        assert v.wait(pending).status == Status.OK


@on_both_engines
def test_switching_the_cache_often_costs_few_flushes(serve: Serve) -> None:
    """However often a guest switches the cache off while a flush runs, only one more waits; what it wrote is stable."""
    disk = CachedDisk()
    served = serve(disk)
    with attach(served.path) as v:
        v.write(0, bytes(512))
        disk.held.add("flush")
        for _ in range(20):
            v.writeback = False
            v.writeback = True
        disk.wait_for("flush")
        v.write(0, PATTERN[:512])
        v.writeback = False
        assert not v.writeback  # the answer comes after all that was posted before
        served.settle()
        assert disk.count("flush") == 1
        disk.release()
        disk.wait_for("flush", 2)
        served.settle()
        assert disk.stable[:512] == PATTERN[:512]
        assert disk.count("flush") == 2


def test_a_flush_that_fails_is_not_ok(serve: Serve, logs: Logs) -> None:
    """What promised durability and could not keep it gets IOERR (BLK-071)."""
    disk = CachedDisk()
    logs.expect("the disk fails: .*disk on fire")
    logs.expect("flushing the disk failed")  # the one that the switch causes
    served = serve(disk)
    with attach(served.path) as v:
        v.write(0, bytes(512))
        disk.failures["flush"] = OSError(errno.EIO, "disk on fire")
        assert call_status(v, RequestType.FLUSH) == Status.IOERR
        v.writeback = False
        assert not v.writeback  # a posted write may still be on its way, and who looks needs no doorbell
        disk.failures["write"] = OSError(errno.ENOSPC, "full")
        assert call_status(v, RequestType.OUT, 0, bytes(512)) == Status.IOERR
        disk.failures.clear()
        v.flush()


@on_both_engines
def test_a_flush_covers_every_write_that_completed_before(serve: Serve) -> None:
    """Thirty-two cached writes, one flush: all of them are stable (BLK-067)."""
    disk = CachedDisk()
    with attach(serve(disk).path) as v:
        writes = [v.submit(RequestType.OUT, sector, bytes([sector + 1]) * 512) for sector in range(32)]
        v.kick()
        v.wait_all(writes)
        v.flush()
        assert disk.stable[: 32 * 512] == b"".join(bytes([sector + 1]) * 512 for sector in range(32))


# Discard and write zeroes.


@on_both_engines
def test_ranges_reach_the_disk_each(serve: Serve) -> None:
    """Every segment of a request is carried out, with its flag (BLK-081, 083, 089 to 091)."""
    disk = FullDisk()
    served = serve(disk)
    disk.data[:] = b"\x11" * len(disk.data)
    with attach(served.path) as v:
        v.discard([(0, 8), (16, 1)])
        v.write_zeroes([(32, 4), (40, 2)])
        v.write_zeroes([(50, 1)], unmap=True)
        assert v.read(32, 4 * 512) == bytes(4 * 512)
        assert v.read(36, 512) == b"\x11" * 512
        assert v.read(50, 512) == bytes(512)
    assert [call for call in disk.calls if call[0] not in ("read", "flush", "disconnect")] == [
        ("discard", 0, 8),
        ("discard", 16, 1),
        ("write_zeroes", 32, 4, False),
        ("write_zeroes", 40, 2, False),
        ("write_zeroes", 50, 1, True),
    ]


DISCARD, ZEROES = RequestType.DISCARD, RequestType.WRITE_ZEROES
IOERR, UNSUPP, OK = Status.IOERR, Status.UNSUPP, Status.OK


@on_both_engines
@pytest.mark.parametrize(
    ("kind", "payload", "status"),
    [
        (DISCARD, b"", IOERR),
        (DISCARD, bytes(15), IOERR),
        (DISCARD, bytes(17), IOERR),
        (ZEROES, bytes(24), IOERR),
        (DISCARD, segments(*[(0, 1, 0)] * 17), IOERR),
        (ZEROES, segments(*[(0, 1, 0)] * 17), IOERR),
        (DISCARD, segments((0, (1 << 21) + 1, 0)), IOERR),
        (ZEROES, segments((0, (1 << 17) + 1, 0)), IOERR),
        (DISCARD, segments((2040, 9, 0)), IOERR),
        (ZEROES, segments((2048, 1, 0)), IOERR),
        (ZEROES, segments(((1 << 64) - 1, 2, 0)), IOERR),
        (DISCARD, segments(((1 << 64) - 8, 8, 0)), IOERR),
        (ZEROES, segments((1 << 55, 8, 0)), IOERR),
        (DISCARD, segments((0, 1 << 23, 0)), IOERR),
        (DISCARD, segments((0, 0xFFFFFFFF, 0)), IOERR),
        (DISCARD, segments((0, 1, 1)), UNSUPP),
        (DISCARD, segments((0, 1, 0x80000000)), UNSUPP),
        (ZEROES, segments((0, 1, 2)), UNSUPP),
        (ZEROES, segments((0, 1, 0x80000001)), UNSUPP),
        (DISCARD, segments((0, 8, 0), (8, 8, 0), (4096, 1, 0)), IOERR),
        (ZEROES, segments((0, 8, 0), (0, 8, 4)), UNSUPP),
    ],
)
def test_bad_segments_touch_no_range(serve: Serve, kind: RequestType, payload: bytes, status: Status) -> None:
    """Bad lengths, limits, ranges and flags fail the request before any of it is done (HOSTILE-173 to 181)."""
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path) as v:
        assert call_status(v, kind, 0, payload) == status
    assert not disk.count("discard")
    assert not disk.count("write_zeroes")


@on_both_engines
@pytest.mark.parametrize(
    ("kind", "payload", "calls"),
    [
        (DISCARD, segments((5, 0, 0)), []),
        (ZEROES, segments(*[(8 * i, 8, 0) for i in range(16)]), [("write_zeroes", 8 * i, 8, False) for i in range(16)]),
        (ZEROES, segments((0, 8, 0), (4, 8, 0), (0, 8, 0)), [("write_zeroes", s, 8, False) for s in (0, 4, 0)]),
        (DISCARD, segments((2047, 1, 0)), [("discard", 2047, 1)]),
        (DISCARD, segments((3, 1, 0)), [("discard", 3, 1)]),
    ],
    ids=["empty", "as-many-as-allowed", "overlapping", "last-sector", "unaligned"],
)
def test_odd_but_good_segments(serve: Serve, kind: RequestType, payload: bytes, calls: list[Any]) -> None:
    """Empty, overlapping and boundary segments are served as they stand (HOSTILE-176, 183, 186)."""
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path) as v:
        assert call_status(v, kind, 0, payload) == OK
    assert [call for call in disk.calls if call[0] in ("discard", "write_zeroes")] == calls


@on_both_engines
def test_the_limits_that_are_told_are_the_limits(serve: Serve) -> None:
    """max_*_seg and max_*_sectors in the configuration are exactly what a request may ask for (BLK-014, 015, 082).

    And BLK-021.
    """
    disk = FullDisk(sectors=1)
    disk.info = type(disk.info)(read_write=True, sector_size=512, size_sectors=1 << 24)
    disk._fill = lambda *_: None  # type: ignore[method-assign]
    served = serve(disk)
    with attach(served.path) as v:
        for kind, seg, sectors in (
            (DISCARD, v.config(BlkConfig.MAX_DISCARD_SEG), v.config(BlkConfig.MAX_DISCARD_SECTORS)),
            (ZEROES, v.config(BlkConfig.MAX_WRITE_ZEROES_SEG), v.config(BlkConfig.MAX_WRITE_ZEROES_SECTORS)),
        ):
            assert call_status(v, kind, 0, segments(*[(0, sectors, 0)] * seg)) == OK
            assert call_status(v, kind, 0, segments(*[(0, 1, 0)] * (seg + 1))) == IOERR
            assert call_status(v, kind, 0, segments((0, sectors + 1, 0))) == IOERR


@on_both_engines
def test_segments_split_at_odd_bytes(serve: Serve) -> None:
    """Segment data in any framing is parsed (HOSTILE-184), in writable elements it is not (HOSTILE-185)."""
    disk = FullDisk()
    served = serve(disk)
    with attach(served.path) as v:
        v.call(DISCARD, 0, segments((1, 2, 0), (4, 5, 0)), framing=[9, 7, 3, 18, 1])
        assert call_status(v, DISCARD, 0, b"", 16) == IOERR
    assert [call for call in disk.calls if call[0] == "discard"] == [("discard", 1, 2), ("discard", 4, 5)]


@on_both_engines
@pytest.mark.parametrize("kind", [DISCARD, ZEROES])
def test_without_the_feature_ranges_are_unsupported(serve: Serve, kind: RequestType) -> None:
    """Not negotiated, or not offered because the disk cannot: UNSUPP (HOSTILE-172)."""
    disk = FullDisk()
    with attach(serve(disk).path, features=VERSION_1) as v:
        assert call_status(v, kind, 0, segments((0, 1, 0))) == UNSUPP
    with attach(serve(Disk()).path) as v:
        assert not v.device.features & (Feature.BLK_DISCARD.mask | Feature.BLK_WRITE_ZEROES.mask)
        assert call_status(v, kind, 0, segments((0, 1, 0))) == UNSUPP
    assert not disk.count("discard")


# Read-only.


@pytest.mark.parametrize("accepts", [True, False])
def test_a_read_only_disk(serve: Serve, accepts: bool) -> None:
    """RO is offered; writes and ranges change nothing, reads are served (BLK-008, 060 to 062, HOSTILE-161, 162)."""
    disk = FullDisk(read_write=False)
    disk.data[:512] = PATTERN[:512]
    served = serve(disk)
    with attach(served.path, features=SUPPORTED if accepts else SUPPORTED & ~Feature.BLK_RO.mask) as v:
        assert v.device.features & Feature.BLK_RO.mask
        assert v.read(0, 512) == PATTERN[:512]
        assert call_status(v, RequestType.OUT, 0, bytes(512)) == IOERR
        assert call_status(v, RequestType.DISCARD, 0, segments((0, 1, 0))) in (IOERR, UNSUPP)
        assert call_status(v, RequestType.WRITE_ZEROES, 0, segments((0, 1, 0))) in (IOERR, UNSUPP)
        v.flush()
        assert v.read(0, 512) == PATTERN[:512]
    assert {call[0] for call in disk.calls} <= {"read", "flush", "disconnect"}


# Errors of the disk.

OPERATIONS: dict[str, tuple[Any, ...]] = {
    "read": (RequestType.IN, 0, b"", 512),
    "write": (RequestType.OUT, 0, bytes(512)),
    "write_cached": (RequestType.OUT, 0, bytes(512)),
    "flush": (RequestType.FLUSH,),
    "discard": (DISCARD, 0, segments((0, 1, 0))),
    "write_zeroes": (ZEROES, 0, segments((0, 1, 0))),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_errors_of_the_disk_become_a_status(serve: Serve, logs: Logs, name: str) -> None:
    """Each error of the disk is told to the guest, and the next one is served (HOSTILE-170, BLK-055)."""
    logs.expect("the disk fails: .*full")
    disk = FullDisk()
    with attach(serve(disk, cache="writethrough" if name == "write" else "writeback").path) as v:
        for error, status in (
            (Unknown("disk on fire"), IOERR),
            (Unimplemented("no"), UNSUPP),
            (IsReadOnly("no"), IOERR),
            (Disconnected("gone"), IOERR),
            (OSError(errno.ENOSPC, "full"), IOERR),
        ):
            disk.failures[name] = error
            assert call_status(v, *OPERATIONS[name]) == status
            disk.failures.clear()
            assert call_status(v, *OPERATIONS[name]) == OK


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("oops"),
        StopAsyncIteration("oops"),
        asyncio.CancelledError("oops"),
        TimeoutError("oops"),
        MemoryError("oops"),
        SystemExit("oops"),
        AssertionError("oops"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_bug_of_the_disk_is_logged_and_the_guest_gets_an_error(serve: Serve, logs: Logs, error: Exception) -> None:
    """Whatever a disk raises, the request ends with IOERR, the log has the traceback, and service goes on."""
    disk = Disk()
    disk.failures["read"] = error
    told = "the disk fails: oops" if isinstance(error, OSError) else f"the disk raised {type(error).__name__}"
    logs.expect(f"{told}; the guest gets")
    with attach(serve(disk).path) as v:
        assert call_status(v, RequestType.IN, 0, data_in=512) == IOERR
        disk.failures.clear()
        assert v.read(0, 512) == bytes(512)
    assert all(record.exc_info and record.exc_info[1] is error for record in logs.matching("the disk raised"))


def test_a_bug_cannot_flood_the_log(serve: Serve, logs: Logs) -> None:
    """Two hundred failing requests leave a dozen records at most."""
    disk = Disk()
    disk.failures["write"] = ZeroDivisionError("oops")
    logs.expect("the disk raised")
    with attach(serve(disk).path) as v:
        for _ in range(200):
            assert call_status(v, RequestType.OUT, 0, bytes(512)) == IOERR
    assert len(logs.records) <= 12


@on_both_engines
@pytest.mark.parametrize("name", ["flush", "disconnect"])
@pytest.mark.parametrize("error", [ZeroDivisionError("oops"), OSError(errno.EIO, "fire"), Unknown("fire")], ids=repr)
def test_stop_survives_what_the_disk_raises(serve: Serve, logs: Logs, name: str, error: Exception) -> None:
    """A flush or disconnect that fails at the end is logged; the disk is disconnected and the server stops."""
    disk = CachedDisk()
    disk.failures[name] = error
    logs.expect(f"{name}ing the disk failed")
    served = serve(disk)
    with attach(served.path) as v:
        v.write(0, bytes(512))
    assert served.server.stop(5)
    assert disk.count("disconnect") == 1
    assert served.server.failed is None


@on_both_engines
def test_a_bug_in_flush_while_the_cache_is_switched_off(serve: Serve, logs: Logs) -> None:
    """The flush that a switch causes may fail: that is logged, and service goes on."""
    disk = CachedDisk()
    logs.expect("flushing the disk failed")
    with attach(serve(disk).path) as v:
        v.write(0, bytes(512))
        disk.failures["flush"] = ZeroDivisionError("oops")
        v.writeback = False
        logs.wait("flushing the disk failed")
        disk.failures.clear()
        v.write(0, bytes(512))


def test_plain_disks_are_served_too(serve: Serve, logs: Logs) -> None:
    """A disk whose methods are not asynchronous runs in threads, several calls at once."""
    logs.expect("the disk fails: .*no")

    class Plain(Disk):
        def read(self, sector_start: int, buffers: Any) -> None:  # type: ignore[override]
            for buffer in buffers:
                buffer[:] = bytes([sector_start]) * len(buffer)

        def write(self, *_: Any) -> None:  # type: ignore[override]
            raise OSError(errno.EIO, "no")

    with attach(serve(Plain()).path) as v:
        reads = [v.submit(RequestType.IN, sector, data_in=512) for sector in range(40)]
        v.kick()
        v.wait_all(reads)
        assert [each.data[0] for each in reads] == list(range(40))
        with pytest.raises(StatusError):
            v.write(0, bytes(512))


def test_many_requests_in_flight(serve: Serve) -> None:
    """Many full rings in a row: every request is answered once, past the wrap of the indices."""
    served = serve(Disk(sectors=4096), queue_size=64)
    with attach(served.path, features=SUPPORTED) as v:
        for turn in range(60):
            requests = [v.submit(RequestType.OUT, i, bytes([turn]) * 512) for i in range(21)]
            v.kick()
            v.wait_all(requests)
            assert {each.status for each in requests} == {OK}
        assert v.read(0, 21 * 512) == bytes([59]) * 21 * 512
        assert v.status & DeviceStatus.NEEDS_RESET == 0
    assert served.disk.count("write") == 60 * 21


def test_a_request_may_outlive_thousands_of_others(serve: Serve) -> None:
    """A held request keeps its descriptors and its data while the ring turns round and round."""
    disk = Disk()
    disk.held.add("write")
    with attach(serve(disk, queue_size=16).path) as v:
        slow = v.submit(RequestType.OUT, 7, PATTERN[:512])
        v.kick()
        disk.wait_for("write")
        for sector in itertools.islice(itertools.cycle(range(8)), 400):
            v.read(sector, 512)
        disk.release()
        assert v.wait(slow).status == OK
    assert disk.data[7 * 512 : 8 * 512] == PATTERN[:512]


def test_a_disk_that_cancels_its_task_harms_no_other_request(serve: Serve) -> None:
    """Not even those that are begun right after, and wait."""

    class Rash(Disk):
        async def read(self, sector_start: int, *_: Any) -> None:
            if sector_start % 3:
                await asyncio.sleep(0)
            else:
                asyncio.current_task().cancel()  # type: ignore[union-attr]

    with attach(serve(Rash()).path) as v:
        reads = [v.submit(RequestType.IN, sector, data_in=512) for sector in range(12)]
        v.kick()
        v.wait_all(reads)
        assert [each.status for each in reads] == [Status.OK] * 12


def test_who_waits_holds_up_nobody_that_came_with_it(serve: Serve) -> None:
    """Of requests made together those end that do not wait, whatever comes before or after them."""

    class Slow(Disk):
        async def read(self, sector_start: int, buffers: Any) -> None:
            if sector_start % 2:
                await super().read(sector_start, buffers)

    served = serve(Slow())
    served.disk.held.add("read")
    with attach(served.path) as v:
        reads = [v.submit(RequestType.IN, sector, data_in=512) for sector in range(12)]
        v.kick()
        v.wait_all(reads[::2])
        served.disk.wait_for("read", 6)
        assert not any(each.done for each in reads[1::2])
        served.disk.release()
        v.wait_all(reads)
        assert [each.status for each in reads] == [Status.OK] * 12
