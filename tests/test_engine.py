"""Disks that are memory or files, served in C and in Python: the same data, the same answers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import struct
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import STOP_SECONDS, until

from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.backends.null import Null
from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.memory import GuestMemory, Sharing
from vmmblk.client.queue import Descriptor, SplitQueue
from vmmblk.engine import EngineOptions
from vmmblk.errors import ConfigError
from vmmblk.filters.readonly import ReadOnly
from vmmblk.spec import REQUEST_HEADER, BlkConfig, DescFlag, DeviceStatus, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Logs, Served

    from vmmblk.block import Block

    Serve = Callable[..., Served]
    Make = Callable[..., Block]

SECTORS = 4096
SIZE = SECTORS * 512
KINDS = ["memory", "file", "tmpfs", "direct"]
ENGINES = ["native", "python"]
CACHES = ["writeback", "writethrough"]
PATTERN = bytes(range(256)) * 64  # 16 KiB
PACKED = SUPPORTED | Feature.RING_PACKED.mask

FIEMAP = 0xC020660B
_EXTENT = struct.Struct("=QQQ16xI12x")
_NOT_WRITTEN = 2 | 4  # FIEMAP_EXTENT_UNKNOWN, FIEMAP_EXTENT_DELALLOC


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder on a file system that is on a disk, even where that of temporary files is in memory."""
    in_memory = subprocess.run(["stat", "-fc", "%T", tmp_path], capture_output=True, text=True, check=True).stdout
    if in_memory.strip() not in ("tmpfs", "ramfs"):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/var/tmp") as elsewhere:
        yield Path(elsewhere)


@pytest.fixture
def make(folder: Path) -> Iterator[Make]:
    """Make a disk of SIZE bytes of some kind."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:

        def disk(kind: str, *, read_only: bool = False, sector_size: int = 512) -> Block:
            if kind == "memory":
                return Memory(SIZE // sector_size, sector_size=sector_size)
            path = (Path(memory) if kind == "tmpfs" else folder) / "disk"
            if not path.exists():
                with path.open("wb") as file:
                    file.truncate(SIZE)
            direct = kind == "direct"
            return File(path, read_only=read_only, direct=direct, sector_size=4096 if direct else sector_size)

        yield disk


def uncalled(disk: Block) -> Block:
    """The same disk, whose methods that read and write fail: only an engine can serve it."""

    def refuse(*_: object) -> None:
        raise AssertionError

    for name in ("read", "write", "write_cached"):
        setattr(disk, name, refuse)
    return disk


def status_of(v: VirtioBlk, *arguments: Any, **named: Any) -> int | None:
    """The status of one request."""
    pending = v.submit(*arguments, **named)
    v.kick(pending.queue)
    return v.wait(pending).status


def traffic(v: VirtioBlk, queues: int = 1, rounds: int = 12, unit: int = 4096) -> None:
    """Batches of reads and writes anywhere, none of a batch over another; what is read is what was written last."""
    rng = random.Random(queues)  # noqa: S311
    blocks = SIZE // unit
    parts = range(0, SIZE, SIZE // 4)
    model = bytearray().join(v.read(at // 512, SIZE // 4) for at in parts)
    for _ in range(rounds):
        firsts = sorted(rng.sample(range(blocks), 2 * queues * 6))
        reads, requests = [], []
        for index, (first, end) in enumerate(zip(firsts[::2], firsts[1::2], strict=True)):
            length = min(end - first, 40) * unit
            queue, at = index % queues, first * unit
            if rng.random() < 0.5:
                data = rng.randbytes(length)
                model[at : at + length] = data
                requests.append(v.submit(RequestType.OUT, at // 512, data, queue=queue))
            else:
                requests.append(v.submit(RequestType.IN, at // 512, data_in=length, queue=queue))
                reads.append((requests[-1], bytes(model[at : at + length])))
        for queue in range(queues):
            v.kick(queue)
        v.wait_all(requests)
        assert all(each.status == Status.OK for each in requests)
        assert all(request.data == data for request, data in reads)
    for at in parts:
        assert v.read(at // 512, SIZE // 4) == model[at : at + SIZE // 4]


# Data.


@pytest.mark.parametrize("features", [SUPPORTED, PACKED], ids=["split", "packed"])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_is_read(serve: Serve, make: Make, kind: str, cache: str, features: int) -> None:
    """In C alone: the disk's own methods are never called (BLK-058, 059)."""
    served = serve(uncalled(make(kind)), engine="native", cache=cache)
    assert served.server.engine.startswith("native")
    with attach(served.path, features=features) as v:
        traffic(v)


@pytest.mark.parametrize("kind", KINDS)
def test_without_io_uring(serve: Serve, make: Make, kind: str) -> None:
    """What would wait is done by threads of the disk, and nothing is said of what was asked for."""
    served = serve(make(kind), engine="native", cache="writethrough", io=EngineOptions(uring=False))
    assert served.server.engine == ("native" if kind == "memory" else "native, threads")
    with attach(served.path) as v:
        traffic(v)


@pytest.mark.parametrize("poll_us", [0, 50, None], ids=["sleeps", "polls", "busy"])
@pytest.mark.parametrize("threads", [1, 3, 4])
def test_queues_that_share_threads(serve: Serve, make: Make, threads: int, poll_us: int | None) -> None:
    """Every queue is served, however many threads there are and whether they sleep."""
    options = EngineOptions(threads=threads, poll_us=poll_us)
    served = serve(uncalled(make("file")), queues=4, engine="native", io=options)
    with attach(served.path, queues=4) as v:
        traffic(v, queues=4)


def test_nothing_reads_as_zeroes(serve: Serve) -> None:
    """A null disk takes writes, and reads zero what was there before."""
    served = serve(uncalled(Null(SECTORS)), engine="native")
    with attach(served.path) as v:
        v.write(0, PATTERN)
        assert v.read(0, len(PATTERN)) == bytes(len(PATTERN))
        assert status_of(v, RequestType.IN, SECTORS, data_in=512) == Status.IOERR


@pytest.mark.parametrize(
    "framing",
    [
        [1] * 16,
        [7, 9, 100, 412],
        [16 + 100, 1024],
        [3, 14, 511, 1, 513],
        lambda r, w: [5] * (r // 5) + [r % 5] + [33] * (w // 33),
    ],
    ids=["header-bytes", "split", "shared", "odd", "crumbs"],
)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_framing_means_nothing(serve: Serve, make: Make, kind: str, engine: str, framing: Any) -> None:
    """Header, data and status may be cut at any byte; neighbours stay as they are (RING-SPLIT-004, BLK-050, 051)."""
    served = serve(make(kind), engine=engine, queue_size=4096)
    with attach(served.path, indirect=True) as v:
        v.write(0, PATTERN)
        v.call(RequestType.OUT, 8, PATTERN[1:4097], framing=framing)
        assert v.call(RequestType.IN, 8, data_in=4096, framing=framing) == PATTERN[1:4097]
        assert v.read(0, len(PATTERN)) == PATTERN[:4096] + PATTERN[1:4097] + PATTERN[8192:]


@pytest.mark.parametrize("engine", ENGINES)
def test_more_pieces_than_one_call_takes(serve: Serve, make: Make, engine: str) -> None:
    """A request in more segments than IOV_MAX is served all the same."""
    served = serve(make("file"), engine=engine, queue_size=4096)
    pieces = os.sysconf("SC_IOV_MAX") + 500
    with attach(served.path, indirect=True) as v:
        block = v.memory.alloc(2 * 512 * pieces)
        v.write(0, PATTERN * (512 * pieces // len(PATTERN) + 1))
        head = v.memory.alloc(4096)
        v.memory.write(head, REQUEST_HEADER.pack(RequestType.IN, 0, 0) + b"\xff")
        gaps = [Descriptor(block + 1024 * i, 512, DescFlag.NEXT | DescFlag.WRITE) for i in range(pieces)]
        pending = v.submit_raw([Descriptor(head, 16, DescFlag.NEXT), *gaps, Descriptor(head + 16, 1, DescFlag.WRITE)])
        v.kick()
        v.wait(pending)
        assert v.memory.read(head + 16, 1) == bytes([Status.OK])
        for i in range(pieces):
            assert v.memory.read(block + 1024 * i, 1024) == PATTERN[512 * (i % 32) :][:512] + bytes(512)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_big_sectors(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """With sectors of 4096 bytes, others are refused, and none of them is written (HOSTILE-160)."""
    served = serve(make(kind, sector_size=4096), engine=engine)
    with attach(served.path) as v:
        assert v.block_size == 4096
        v.write(8, PATTERN)
        assert status_of(v, RequestType.OUT, 9, bytes(4096)) == Status.IOERR
        assert status_of(v, RequestType.OUT, 8, bytes(512)) == Status.IOERR
        assert status_of(v, RequestType.IN, 8, data_in=4096 + 512) == Status.IOERR
        assert v.read(8, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_other_requests(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """Flush, discard, zeroes, identity, what is unknown and what is empty, between reads and writes (BLK-056, 090)."""
    served = serve(make(kind), engine=engine, serial="the-same")
    with attach(served.path) as v:
        v.write(0, PATTERN)
        if v.has(Feature.BLK_FLUSH):
            v.flush()
        v.write_zeroes([(8, 8)])
        assert v.read(0, len(PATTERN)) == PATTERN[:4096] + bytes(4096) + PATTERN[8192:]
        v.discard([(0, 8)])
        assert v.read(16, 4096) == PATTERN[8192:12288]
        assert v.get_id() == "the-same"
        assert status_of(v, 0x4711) == Status.UNSUPP
        assert status_of(v, RequestType.OUT, 0) == Status.OK
        assert status_of(v, RequestType.IN, 0) == Status.OK


# Caches.


def delayed(path: Path) -> bool:
    """Whether some of a file's data is in the page cache only: it has no place on the disk yet."""
    with path.open("rb") as file:
        answer = bytearray(struct.pack("=QQIIII", 0, 1 << 62, 0, 0, 32, 0) + bytes(32 * 56))
        fcntl.ioctl(file.fileno(), FIEMAP, answer)
    (count,) = struct.unpack_from("=I", answer, 20)
    assert count
    return any(struct.unpack_from("=I", answer, 32 + 56 * i + 40)[0] & _NOT_WRITTEN for i in range(count))


def set_cache(v: VirtioBlk, *, on: bool) -> None:
    """Switch the cache; reading it back waits for the write, which is posted and which polling may overtake."""
    v.writeback = on
    assert v.writeback is on


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("uring", [True, False])
def test_a_write_is_durable_when_the_cache_is_off(
    serve: Serve, make: Make, folder: Path, engine: str, uring: bool
) -> None:
    """The data has its place on the disk at once, or with the cache on after a flush (BLK-066, 067)."""
    served = serve(make("file"), engine=engine, cache="writethrough", io=EngineOptions(uring=uring))
    with attach(served.path) as v:
        v.write(0, PATTERN)
        assert not delayed(folder / "disk")
        set_cache(v, on=True)
        v.write(1024, PATTERN)
        assert delayed(folder / "disk")
        v.flush()
        assert not delayed(folder / "disk")
        v.write(2048, PATTERN)
        set_cache(v, on=False)
        until(lambda: not delayed(folder / "disk"))
        v.write(3072, PATTERN)
        assert not delayed(folder / "disk")


@pytest.mark.parametrize("engine", ENGINES)
def test_stopping_makes_everything_durable(serve: Serve, make: Make, folder: Path, engine: str) -> None:
    """What was written with the cache on is flushed when the server stops."""
    served = serve(make("file"), engine=engine)
    with attach(served.path) as v:
        v.write(0, PATTERN)
        assert delayed(folder / "disk")
    assert served.server.stop(STOP_SECONDS)
    assert not delayed(folder / "disk")


# Errors.


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_past_the_end(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """Nothing is transferred of a request that ends after the disk, or wraps (HOSTILE-154, -156)."""
    served = serve(make(kind), engine=engine)
    with attach(served.path) as v:
        for sector in (SECTORS, SECTORS - 8, 1 << 40, (1 << 55) - 8, (1 << 64) - 8):
            assert status_of(v, RequestType.OUT, sector, b"x" * 8192) == Status.IOERR
            assert status_of(v, RequestType.IN, sector, data_in=8192) == Status.IOERR
        assert v.read(SECTORS - 8, 4096) == bytes(4096)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", KINDS)
def test_read_only(serve: Serve, make: Make, kind: str, engine: str) -> None:
    """Writes fail, reads do not (BLK-060, 062)."""
    disk = ReadOnly(make("memory")) if kind == "memory" else make(kind, read_only=True)
    served = serve(disk, engine=engine)
    with attach(served.path) as v:
        assert v.has(Feature.BLK_RO)
        assert status_of(v, RequestType.OUT, 0, b"x" * 4096) == Status.IOERR
        assert v.read(0, 4096) == bytes(4096)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["file", "tmpfs", "direct"])
def test_a_file_that_was_cut(serve: Serve, logs: Logs, make: Make, kind: str, engine: str) -> None:
    """Reading what is gone, or half gone, is an error; what is there is read."""
    logs.expect("the disk fails: ")
    disk = make(kind)
    served = serve(disk, engine=engine)
    with attach(served.path) as v:
        v.write(0, PATTERN)
        os.ftruncate(disk.fileno(), 8192)  # type: ignore[attr-defined]
        assert v.read(0, 8192) == PATTERN[:8192]
        assert status_of(v, RequestType.IN, 8, data_in=8192) == Status.IOERR
        assert status_of(v, RequestType.IN, 2048, data_in=8192) == Status.IOERR


@contextlib.contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    """No file of this process can be written beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["file", "tmpfs", "direct"])
def test_a_write_that_fails(serve: Serve, logs: Logs, make: Make, *, kind: str, engine: str, cache: str) -> None:
    """The guest is told, others go on, and the disk knows of what write-through lost (BLK-071)."""
    logs.expect("the disk fails: .*File too large")
    disk = make(kind)
    failures: list[OSError] = []
    disk._write_failed = failures.append  # type: ignore[attr-defined]
    served = serve(disk, engine=engine, cache=cache)
    with attach(served.path) as v, files_no_longer_than(SIZE // 2):
        assert status_of(v, RequestType.OUT, SECTORS // 2, PATTERN) == Status.IOERR
        assert status_of(v, RequestType.OUT, SECTORS // 2 - 8, PATTERN) == Status.IOERR  # half of it could be written
        v.write(0, PATTERN)
        assert v.read(0, len(PATTERN)) == PATTERN
    if engine == "native" or cache == "writethrough":
        assert {error.errno for error in failures} == {errno.EFBIG}


# Life.


def engine_threads() -> dict[int, int]:
    """The engine's threads in this process, and the processor time that they have had, in clock ticks."""
    threads = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            if name == "vmmblk-engine":
                threads[int(task.name)] = sum(map(int, rest.split()[11:13]))
    return threads


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_idle_costs_nothing(serve: Serve, make: Make, kind: str) -> None:
    """After some traffic its threads sleep until there is more."""
    served = serve(make(kind), queues=2, engine="native")
    with attach(served.path, queues=2) as v:
        traffic(v, queues=2, rounds=3)
        before = engine_threads()
        assert len(before) == 2
        v.lines.wait(v.connection.fileno(), 0.5)  # nothing comes
        assert sum(engine_threads().values()) - sum(before.values()) <= 1
        v.write(0, PATTERN)


def test_the_file_is_free_when_the_server_has_stopped(serve: Serve, make: Make) -> None:
    """Its lock goes with it, at once: another server can have it."""
    for _ in range(20):
        served = serve(make("file"), engine="native")
        with attach(served.path) as v:
            v.write(0, PATTERN)
        assert served.server.stop(STOP_SECONDS)


def test_threads_that_cannot_start(serve: Serve, make: Make) -> None:
    """The server does not start, says why, and leaves no thread and no lock behind."""
    here = next(iter(os.sched_getaffinity(0)))
    for _ in range(2):
        with pytest.raises(OSError, match="the engine's threads cannot start"):
            serve(make("file"), queues=2, engine="native", io=EngineOptions(cpus=(here, 1000)))
        assert not engine_threads()
    serve(make("file"))


@pytest.mark.parametrize("cpus", [(), (-1,)], ids=["anywhere", "pinned"])
def test_threads_run_where_they_are_told(serve: Serve, make: Make, cpus: tuple[int, ...]) -> None:
    """Each on its own processor, or on any."""
    everywhere = os.sched_getaffinity(0)
    chosen = tuple(sorted(everywhere)[-1:]) if cpus else ()
    serve(make("memory"), queues=2, engine="native", io=EngineOptions(cpus=chosen))
    assert [os.sched_getaffinity(thread) for thread in engine_threads()] == 2 * [set(chosen) or everywhere]


@pytest.mark.parametrize("engine", ENGINES)
def test_growing(serve: Serve, engine: str) -> None:
    """New sectors can be used as soon as the guest knows of them (BLK-063, 064)."""
    disk = Memory(8, max_sectors=64)
    served = serve(disk, engine=engine)
    with attach(served.path) as v:
        assert status_of(v, RequestType.OUT, 8, PATTERN[:4096]) == Status.IOERR
        disk.grow(64)
        v.wait_config_change()
        assert v.config(BlkConfig.CAPACITY) == 64
        v.write(8, PATTERN[:4096])
        assert v.read(0, 8192) == bytes(4096) + PATTERN[:4096]
        assert status_of(v, RequestType.OUT, 64, PATTERN[:512]) == Status.IOERR


@pytest.mark.parametrize("poll_us", [0, 50, None], ids=["sleeps", "polls", "busy"])
def test_memory_that_is_not_shared_is_told_of(serve: Serve, logs: Logs, poll_us: int | None) -> None:
    """A doorbell to a ring that nobody ever wrote to: the guest's memory is private."""
    logs.expect("guest memory is not shared")
    served = serve(Memory(SECTORS), engine="native", io=EngineOptions(poll_us=poll_us))
    with GuestMemory(sharing=Sharing.PRIVATE) as memory, attach(served.path, memory=memory) as v:
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick(force=True)
        logs.wait("guest memory is not shared")


@pytest.mark.parametrize("poll_us", [0, 50, None], ids=["sleeps", "polls", "busy"])
def test_a_corrupt_ring(serve: Serve, logs: Logs, poll_us: int | None) -> None:
    """NEEDS_RESET, told once however often the doorbell rings; then a reset mends all, again and again (STAT-006)."""
    served = serve(uncalled(Memory(SECTORS)), engine="native", io=EngineOptions(poll_us=poll_us))
    with attach(served.path) as v:
        for count in range(1, 6):
            v.write(0, PATTERN)
            assert isinstance(v.queues[0], SplitQueue)
            v.queues[0].offer(0xFFFF)
            v.queues[0].publish()
            v.ring_doorbell()
            v.wait_needs_reset()
            for _ in range(3):
                v.ring_doorbell()
                assert DeviceStatus.NEEDS_RESET in v.status
            served.settle()
            assert len(logs.matching("corrupt")) == count
            v.init()
        assert v.read(0, len(PATTERN)) == PATTERN


def test_in_order_goes_through_the_worker(serve: Serve) -> None:
    """With IN_ORDER requests are completed in their order, whoever is ready first; without, in C."""
    disk = Memory(SECTORS)
    reads: list[int] = []
    real = disk.read

    async def read(sector: int, buffers: Any) -> None:
        reads.append(sector)
        await real(sector, buffers)

    disk.read = read  # type: ignore[method-assign,assignment]
    served = serve(disk, engine="native", features={"in_order": True})
    with attach(served.path, features=SUPPORTED | Feature.IN_ORDER.mask) as v:
        assert v.has(Feature.IN_ORDER)
        traffic(v)
        assert reads
        reads.clear()
    with attach(served.path) as v:
        traffic(v)
        assert not reads


def test_only_what_is_memory_or_a_file(serve: Serve) -> None:
    """A disk of one's own is called, and asking for the engine all the same is refused."""

    class Mine(Memory):
        """A disk that may read and write otherwise."""

    assert serve(Mine(SECTORS)).server.engine == "python"
    with pytest.raises(ConfigError, match="cannot be served by the native engine"):
        serve(Mine(SECTORS), engine="native")


FORBIDDEN = """
import ctypes, logging, struct, sys
from pathlib import Path
sys.path[:0] = sys.argv[2:]
from vmmblk.backends.file import File
from vmmblk.client.driver import attach
from vmmblk.filters import prepare
from vmmblk.server import Server, ServerOptions

logging.basicConfig(format="%(message)s")
libc = ctypes.CDLL(None, use_errno=True)
program = b"".join(struct.pack("=HBBI", *each) for each in (
    (0x20, 0, 0, 0),           # the number of the system call
    (0x15, 0, 1, 425),         # io_uring_setup?
    (0x06, 0, 0, 0x00050001),  # then EPERM
    (0x06, 0, 0, 0x7FFF0000),
))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_char_p)]
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.byref(Program(4, program))) == 0

folder = Path(sys.argv[1])
server = Server(folder / "s", prepare(File(folder / "disk")), ServerOptions(queues=2, cache="writethrough"))
server.start()
with attach(folder / "s", queues=2) as v:
    for queue in range(2):
        v.write(8 * queue, bytes([queue + 1]) * 4096)
    assert v.read(0, 8192) == b"\\1" * 4096 + b"\\2" * 4096
print(server.engine)
assert server.stop(5)
"""


def test_io_uring_is_forbidden(make: Make, folder: Path) -> None:
    """Threads do what would wait, and the reason is told once."""
    os.close(make("file").fileno())  # type: ignore[attr-defined]
    here = [str(Path(__file__).parents[1])]
    child = subprocess.run(
        [sys.executable, "-c", FORBIDDEN, folder, *here], capture_output=True, text=True, timeout=60, check=False
    )
    reason = "threads (no io_uring: Operation not permitted)"
    assert child.stdout == f"native, {reason}\n", child.stderr
    assert child.stderr.count(reason) == child.stderr.count("\n") == 1
