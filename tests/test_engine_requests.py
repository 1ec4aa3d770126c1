"""What an engine serves beside reads and writes, and through private memory: the same answers in C and in Python."""

from __future__ import annotations

import ctypes
import errno
import os
from typing import TYPE_CHECKING, Any

import pytest
from conftest import until
from mounts import loop_device
from test_engine import ENGINES, PATTERN, SECTORS, SIZE, delayed, folder, make, status_of, traffic

from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.backends.null import Null
from vmmblk.block import Block, BlockInfo, Buffers, Native, Operation, Substance
from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.client.memory import GuestMemory
from vmmblk.client.queue import Descriptor
from vmmblk.engine import EngineOptions
from vmmblk.filters.readonly import ReadOnly
from vmmblk.spec import DISCARD_SEGMENT, REQUEST_HEADER, DescFlag, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Served

    Serve = Callable[..., Served]
    Make = Callable[..., Block]

__all__ = ["folder", "make"]

KINDS = ["memory", "file", "tmpfs", "direct"]
MIB = 1 << 20
UNMAP = 1


def watched(disk: Block) -> list[str]:
    """The names of what is called of the disk from now on, in order."""
    calls: list[str] = []

    def watch(name: str, real: Callable[..., Any]) -> None:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        setattr(disk, name, call)

    for name in ("read", "write", "write_cached", "flush", "discard", "write_zeroes"):
        if hasattr(disk, name):
            watch(name, getattr(disk, name))
    return calls


def ranges(*each: tuple[int, int, int]) -> bytes:
    """The payload for segments of (sector, sectors, flags)."""
    return b"".join(DISCARD_SEGMENT.pack(*one) for one in each)


# Flush, discard, write zeroes.


@pytest.mark.parametrize("kind", KINDS)
def test_in_c_alone(serve: Serve, make: Make, kind: str) -> None:
    """Flushing, discarding and zeroing: the disk is not called (BLK-090, 091)."""
    disk = make(kind)
    calls = watched(disk)
    served = serve(disk, engine="native")
    with attach(served.path) as v:
        v.write(0, PATTERN)
        v.discard([(16, 8)])
        v.write_zeroes([(0, 8), (24, 8)], unmap=True)
        if v.has(Feature.BLK_FLUSH):
            v.flush()
        assert v.read(0, 4096) + v.read(24, 4096) == bytes(8192)
        assert v.read(8, 4096) == PATTERN[4096:8192]
        assert not calls
        v.write_zeroes([(8, 8)])
        assert v.read(8, 4096) == bytes(4096)
        assert ("write_zeroes" in calls) is (kind == "tmpfs")  # which cannot zero without holes


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_is_forgotten(serve: Serve, engine: str) -> None:
    """A null disk can flush, discard and zero, inside of it."""
    served = serve(Null(SECTORS), engine=engine)
    with attach(served.path) as v:
        v.discard([(0, SECTORS)])
        v.write_zeroes([(0, SECTORS)])
        assert status_of(v, RequestType.FLUSH) == Status.OK
        assert status_of(v, RequestType.DISCARD, 0, ranges((SECTORS, 1, 0))) == Status.IOERR


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_space_is_given_back(serve: Serve, make: Make, folder: Path, kind: str) -> None:
    """Discarding frees what lies whole inside; zeroing does only if it may unmap (BLK-089)."""
    disk = make(kind)
    served = serve(disk, engine="native")

    def held() -> int:
        if isinstance(disk, File):
            return os.stat(folder / "disk").st_blocks * 512  # noqa: PTH116
        assert isinstance(disk, Memory)
        native = disk.native()
        assert native is not None
        pages = ctypes.create_string_buffer(SIZE // 4096)
        assert not ctypes.CDLL(None).mincore(ctypes.c_void_p(native.address), ctypes.c_size_t(SIZE), pages)
        return sum(page & 1 for page in pages.raw) * 4096

    with attach(served.path) as v:
        v.write(0, PATTERN * 8)
        if v.has(Feature.BLK_FLUSH):
            v.flush()
        full = held()
        v.write_zeroes([(0, 32)])
        assert held() == full
        v.write_zeroes([(0, 32)], unmap=True)
        assert held() == full - 16384
        v.discard([(33, 39)])
        assert held() == full - 16384 - 16384
        assert v.read(32, 512) == PATTERN[:512]
        assert v.read(72, 4096) == PATTERN[4096:8192]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_block_device(serve: Serve, tmp_path: Path, engine: str) -> None:
    """It is zeroed and flushed in C; to discard takes an ioctl, which is the disk's (BLK-090, 091)."""
    image = tmp_path / "medium"
    image.write_bytes(bytes(SIZE))
    with loop_device(image) as device:
        disk = File(device)
        calls = watched(disk)
        served = serve(disk, engine=engine)
        with attach(served.path) as v:
            v.write(0, PATTERN)
            v.write_zeroes([(8, 8)])
            v.flush()
            assert "write_zeroes" not in calls or engine == "python"
            v.write_zeroes([(16, 8)], unmap=True)
            v.discard([(24, 8)])
            assert "discard" in calls
            assert v.read(0, 12288) == PATTERN[:4096] + bytes(8192)


BAD = {
    "a reserved flag": (RequestType.WRITE_ZEROES, ranges((0, 8, 2)), Status.UNSUPP),
    "discarding may not unmap": (RequestType.DISCARD, ranges((0, 8, UNMAP)), Status.UNSUPP),
    "past the end": (RequestType.WRITE_ZEROES, ranges((SECTORS - 8, 16, 0)), Status.IOERR),
    "behind the end": (RequestType.DISCARD, ranges((SECTORS + 8, 8, 0)), Status.IOERR),
    "wraps": (RequestType.DISCARD, ranges(((1 << 64) - 8, 16, 0)), Status.IOERR),
    "wraps in bytes": (RequestType.WRITE_ZEROES, ranges((1 << 55, 8, 0)), Status.IOERR),
    "too long": (RequestType.WRITE_ZEROES, ranges((0, (64 << 20) // 512 + 8, 0)), Status.IOERR),
    "no segment": (RequestType.DISCARD, b"", Status.IOERR),
    "a byte short": (RequestType.DISCARD, ranges((0, 8, 0))[:-1], Status.IOERR),
    "a byte more": (RequestType.WRITE_ZEROES, ranges((0, 8, 0)) + b"\0", Status.IOERR),
    "too many": (RequestType.DISCARD, 17 * ranges((0, 8, 0)), Status.IOERR),
    "the last is bad": (RequestType.WRITE_ZEROES, ranges((0, 8, 0), (8, 8, 0), (SECTORS, 8, 0)), Status.IOERR),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_segments_that_are_refused(serve: Serve, make: Make, kind: str, engine: str, bad: str) -> None:
    """The guest is told why, and nothing is changed, not even by those that are good.

    BLK-086, 087, HOSTILE-173, -174, -175, -177, -178.
    """
    served = serve(make(kind), engine=engine)
    request, payload, status = BAD[bad]
    with attach(served.path) as v:
        v.write(0, PATTERN)
        assert status_of(v, request, 0, payload) == status
        assert v.read(0, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_segments_that_are_no_whole_blocks(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """With sectors of 4096 bytes they are refused; the one before them is not served."""
    served = serve(make(kind, sector_size=4096), engine=engine)
    with attach(served.path) as v:
        v.write(0, PATTERN)
        for request in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
            for segment in ((9, 8, 0), (8, 9, 0), (7, 1, 0)):
                assert status_of(v, request, 0, ranges((0, 8, 0), segment)) == Status.IOERR
        assert v.read(0, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_segments_in_crumbs(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """They may be cut at any byte, and those of no sectors are left out (BLK-083, HOSTILE-176)."""
    served = serve(make(kind), engine=engine)
    payload = ranges((8, 8, 0), (SECTORS, 0, 0), (24, 8, UNMAP))
    with attach(served.path) as v:
        v.write(0, PATTERN)
        v.call(RequestType.WRITE_ZEROES, 0, payload, framing=[16, *[7] * 6, 6, 1])
        assert v.read(0, len(PATTERN)) == PATTERN[:4096] + bytes(4096) + PATTERN[8192:12288] + bytes(4096)
        assert status_of(v, RequestType.DISCARD, 0, ranges((SECTORS, 0, 0))) == Status.OK


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_what_was_not_negotiated(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """It is not served, and touches nothing; the next driver may have it (HOSTILE-172)."""
    served = serve(make(kind), engine=engine)
    lacks = SUPPORTED & ~(Feature.BLK_DISCARD.mask | Feature.BLK_WRITE_ZEROES.mask)
    with attach(served.path, features=lacks) as v:
        v.write(0, PATTERN)
        for request in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
            assert status_of(v, request, 0, ranges((0, 8, 0))) == Status.UNSUPP
        assert v.read(0, len(PATTERN)) == PATTERN
    with attach(served.path) as v:
        v.write_zeroes([(0, 8)])
        assert v.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["memory", "file"])
def test_the_disk_may_not_be_changed(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """Of a read-only disk nothing is discarded nor zeroed, and a flush is no lie (HOSTILE-162)."""
    served = serve(ReadOnly(make(kind)), engine=engine)
    with attach(served.path) as v:
        for request in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
            assert status_of(v, request, 0, ranges((0, 8, 0))) == Status.UNSUPP
        assert status_of(v, RequestType.FLUSH) == Status.OK


def test_what_takes_long_is_handed_over(serve: Serve) -> None:
    """Zeroing much memory does not keep a queue's thread: the disk does it."""
    disk = Memory((32 * MIB) // 512)
    calls = watched(disk)
    served = serve(disk, engine="native")
    with attach(served.path) as v:
        v.write(0, PATTERN)
        v.write_zeroes([(0, 16 * MIB // 512)])
        assert not calls
        v.write_zeroes([(0, 16 * MIB // 512), (0, 8)], unmap=True)
        v.discard([(0, 32 * MIB // 512)])
        assert calls == ["write_zeroes", "write_zeroes", "discard"]


def test_zeroes_are_durable(serve: Serve, make: Make, folder: Path) -> None:
    """Zeroing syncs, and so what was written before is on the disk, too (BLK-096)."""
    served = serve(make("file"), engine="native")
    with attach(served.path) as v:
        v.write(0, PATTERN)
        assert delayed(folder / "disk")
        v.write_zeroes([(64, 8)])
        assert not delayed(folder / "disk")


# Losses.


class Broken(Block):
    """A file that takes writes and cannot be synced: a pipe; what is handed over is noted."""

    operations = Operation.FLUSH | Operation.WRITE_ZEROES

    def __init__(self) -> None:
        self.info = BlockInfo(read_write=True, sector_size=512, size_sectors=SECTORS)
        self.calls: list[str] = []
        self.lost = ctypes.c_bool()
        self._end, self.tap = os.pipe()

    def native(self) -> Native:
        """The end of the pipe that is written to."""
        return Native(Substance.FILE, fileno=self.tap, operations=self.operations, lost=ctypes.addressof(self.lost))

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """Nobody reads."""

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Nobody writes."""

    async def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """Nobody writes."""

    async def flush(self) -> None:
        """Note it."""
        self.calls.append("flush")
        if self.lost.value:
            raise OSError(errno.EIO, "lost")

    async def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:  # noqa: ARG002
        """Note it."""
        self.calls.append("write_zeroes")

    async def disconnect(self) -> None:
        """Close both ends."""
        os.close(self._end)
        os.close(self.tap)


def test_a_flush_that_fails(serve: Serve, logs: Any) -> None:
    """The guest is told; from then on the disk is asked, and every later flush fails, too (BLK-071)."""
    logs.expect("the disk fails")
    logs.expect("flushing the disk failed")  # in the end
    disk = Broken()
    served = serve(disk, engine="native")
    with attach(served.path) as v:
        assert status_of(v, RequestType.FLUSH) == Status.IOERR
        assert (disk.calls, disk.lost.value) == ([], True)
        assert status_of(v, RequestType.FLUSH) == Status.IOERR
        assert disk.calls == ["flush"]
        v.write_zeroes([(0, 8)])
        assert disk.calls == ["flush", "write_zeroes"]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["file", "tmpfs"])
def test_a_loss_that_the_disk_knows_of(serve: Serve, logs: Any, make: Make, kind: str, engine: str) -> None:
    """No flush succeeds after it, whoever is asked, and no zeroing, which promises the same (BLK-071)."""
    logs.expect("an earlier write was lost")
    disk = make(kind)
    served = serve(disk, engine=engine)
    with attach(served.path) as v:
        v.flush()
        disk._write_failed(OSError(errno.EIO, "on fire"))  # type: ignore[attr-defined]
        assert status_of(v, RequestType.FLUSH) == Status.IOERR
        assert status_of(v, RequestType.WRITE_ZEROES, 0, ranges((0, 8, 0))) == Status.IOERR
        v.write(0, PATTERN)


# Private memory.


@pytest.mark.parametrize("direct", [False, True], ids=["cached", "direct"])
@pytest.mark.parametrize("threads", [1, 2])
def test_bounced(serve: Serve, make: Make, folder: Path, threads: int, *, direct: bool) -> None:
    """Through private memory: the same data, and the disk is not called."""
    make("file").disconnect()
    disk = File(folder / "disk", bounce=True, direct=direct, sector_size=4096 if direct else 512)
    calls = watched(disk)
    served = serve(disk, engine="native", queues=2, cache="writethrough", io=EngineOptions(threads=threads))
    with attach(served.path, queues=2) as v:
        traffic(v, queues=2)
        v.write(0, PATTERN * 96)  # in more than one piece
        assert v.read(0, 96 * len(PATTERN)) == PATTERN * 96
        assert not calls


def test_bounced_without_io_uring(serve: Serve, make: Make, folder: Path) -> None:
    """The kernel is not given guest memory then either: the disk is called, with private copies."""
    make("file").disconnect()
    disk = File(folder / "disk", bounce=True)
    calls = watched(disk)
    served = serve(disk, engine="native", io=EngineOptions(uring=False))
    with attach(served.path) as v:
        v.write(0, PATTERN)
        assert v.read(0, len(PATTERN)) == PATTERN
        assert set(calls) == {"write_cached", "read"}


def test_odd_memory_of_a_direct_file(serve: Serve, make: Make) -> None:
    """What O_DIRECT cannot take where it lies goes through private memory, in C."""
    disk = make("direct")
    calls = watched(disk)
    served = serve(disk, engine="native")
    with attach(served.path) as v:
        v.call(RequestType.OUT, 8, PATTERN[1:8193], framing=[17, 4097, 4094, 1])
        assert v.call(RequestType.IN, 8, data_in=8192, framing=[16, 1, 5000, 3192]) == PATTERN[1:8193]
        assert not calls


@pytest.mark.parametrize("engine", ENGINES)
def test_a_bounced_file_that_was_cut(serve: Serve, logs: Any, make: Make, folder: Path, engine: str) -> None:
    """Reading what is gone is an error; what is there is read."""
    logs.expect("the disk fails")
    make("file").disconnect()
    disk = File(folder / "disk", bounce=True)
    served = serve(disk, engine=engine)
    with attach(served.path) as v:
        v.write(0, PATTERN)
        os.ftruncate(disk.fileno(), 8192)
        assert v.read(0, 8192) == PATTERN[:8192]
        assert status_of(v, RequestType.IN, 8, data_in=8192) == Status.IOERR


# Time.


def test_a_batch_is_bounded_in_bytes(serve: Serve) -> None:
    """Many big requests that come at once are not all taken at once: a drain waits for those that were."""
    served = serve(Null(SECTORS), engine="native")
    features = SUPPORTED & ~Feature.EVENT_IDX.mask
    with GuestMemory(4 * MIB) as memory, attach(served.path, memory=memory, features=features) as v:
        head, data = memory.alloc(4096), memory.alloc(MIB)
        memory.write(head, REQUEST_HEADER.pack(RequestType.OUT, 0, 0))
        pendings = [
            v.submit_raw(
                [
                    Descriptor(head, 16, DescFlag.NEXT),
                    Descriptor(data, MIB, DescFlag.NEXT),
                    Descriptor(head + 16 + i, 1, DescFlag.WRITE),
                ]
            )
            for i in range(64)
        ]
        batches = 0

        def served_all() -> bool:
            nonlocal batches
            v.poll()
            batches += v.take_interrupts()
            return batches >= 4 and all(each.done for each in pendings)

        v.kick()
        until(served_all)
        assert batches == 4  # each of 16 MiB
