"""Doorbells that cost no message: eventfds that the client gets, and a page of the BAR that it may map."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import select
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from conftest import STOP_SECONDS, until

from vmmblk.backends.memory import Memory
from vmmblk.client import wire
from vmmblk.client.bench import Workload, run
from vmmblk.client.connection import VMM_CAPABILITIES, Connection
from vmmblk.client.doorbells import Kick, mappable
from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.errors import Impossible, RemoteError
from vmmblk.client.memory import GuestMemory, Sharing
from vmmblk.client.queue import Segment, SplitQueue
from vmmblk.client.wire import Command
from vmmblk.engine import EngineOptions
from vmmblk.errors import ConfigError
from vmmblk.filters import prepare
from vmmblk.ring import Bell
from vmmblk.server import Server, ServerOptions
from vmmblk.spec import REQUEST_HEADER, BlkConfig, CommonCfg, Feature, RequestType

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Logs, Served

    Serve = Callable[..., Served]

BAR, NOTIFY, PAGE = 4, 0x3000, 0x1000
PACKED = SUPPORTED | Feature.RING_PACKED.mask
BUSY = EngineOptions(poll_us=None)
both_engines = pytest.mark.parametrize("engine", ["native", "python"])


def memory_disk() -> Memory:
    """A disk that both engines can serve."""
    return Memory(2048)


def works(v: VirtioBlk) -> None:
    """What is written is what is read, on every queue."""
    for index in range(len(v.queues)):
        data = bytes([index + 1]) * 512
        v.call(RequestType.OUT, 8 * index, data, queue=index)
        assert v.call(RequestType.IN, 8 * index, data_in=512, queue=index) == data


@pytest.fixture
def doorbell_messages(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What clients in this process write to doorbells by messages."""
    sent: list[bytes] = []
    write = Connection.region_write

    def spy(self: Connection, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        if region == BAR and offset >= NOTIFY:
            sent.append(data)
        write(self, region, offset, data, posted=posted)

    monkeypatch.setattr(Connection, "region_write", spy)
    return sent


def descriptors() -> int:
    """How many descriptors this process has open."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def rung(fd: int) -> bool:
    """Whether an eventfd has something to read."""
    return bool(select.select([fd], [], [], 0)[0])


# A bell by itself.


def test_a_bell_is_heard_each_time_and_never_read() -> None:
    """Every write makes heard_fd readable until it is cleared; the counter goes on counting."""
    bell = Bell()
    for count in range(1, 4):
        assert not rung(bell.heard_fd)
        os.eventfd_write(bell.fd, 1)
        assert rung(bell.heard_fd)
        bell.clear()
        assert not rung(bell.heard_fd)
        assert rung(bell.fd), count
    assert os.eventfd_read(bell.fd) == 3
    bell.close()


def test_a_renewed_bell_hears_nothing_of_the_old_one() -> None:
    """The number is the same, the eventfd another; who has the old one neither rings nor takes anything away."""
    bell = Bell()
    old = os.dup(bell.fd)
    os.eventfd_write(old, 1)
    bell.renew()
    assert not rung(bell.heard_fd)
    os.eventfd_write(old, 1)
    assert not rung(bell.heard_fd)
    assert not rung(bell.fd)
    os.eventfd_write(bell.fd, 1)
    assert rung(bell.heard_fd)
    os.close(old)
    bell.close()


# Eventfds.


@pytest.mark.parametrize("features", [SUPPORTED, PACKED], ids=["split", "packed"])
@both_engines
def test_eventfds_ring_every_queue(serve: Serve, engine: str, features: int, doorbell_messages: list[bytes]) -> None:
    """Requests on three queues are served, and no doorbell is a message; after a reset, too."""
    served = serve(memory_disk(), queues=3, engine=engine)
    with attach(served.path, queues=3, features=features, kick=Kick.EVENTFD) as v:
        works(v)
        v.reset()
        v.init()
        works(v)
        v.connection.device_reset()
        v.init()
        works(v)
    assert doorbell_messages == []


@both_engines
def test_eventfds_and_messages_ring_alike(serve: Serve, engine: str) -> None:
    """A client may use both, in any order, for one queue."""
    served = serve(memory_disk(), engine=engine)
    with attach(served.path, kick=Kick.EVENTFD) as v:
        for turn in range(20):
            pending = v.submit(RequestType.IN, 0, data_in=512)
            v.queues[0].publish()
            if turn % 2:
                v.ring_doorbell()
            else:
                v.pci.notify.write(v.doorbell_offset(), 2, 0)
            v.wait(pending)


def test_there_is_an_eventfd_for_each_doorbell(serve: Serve) -> None:
    """Of two bytes, where the doorbell is; no two of them are one, and other BARs have none."""
    served = serve(queues=4)
    with Connection(served.path) as connection:
        needed = connection.region_io_fds(BAR).argsz
        answer = connection.region_io_fds(BAR, argsz=needed)
        assert [(each.offset, each.size, each.type, each.flags) for each in answer.sub_regions] == [
            (NOTIFY + 4 * index, 2, 0, 0) for index in range(4)
        ]
        os.eventfd_write(answer.sub_regions[1].fd, 1)
        assert [rung(each.fd) for each in answer.sub_regions] == [False, True, False, False]
        assert connection.region_io_fds(1, argsz=4096).total == 0
        for fd in answer.fds:
            os.close(fd)


@both_engines
def test_notification_data_goes_by_message(serve: Serve, engine: str, doorbell_messages: list[bytes]) -> None:
    """A doorbell of four bytes is none of the eventfd's: an eventfd carries no data."""
    features = {"notification_data": True}
    with attach(serve(memory_disk(), engine=engine, features=features).path, kick=Kick.EVENTFD) as v:
        assert v.has(Feature.NOTIFICATION_DATA)
        works(v)
    assert {len(data) for data in doorbell_messages} == {4}


@both_engines
def test_an_eventfd_stands_for_the_doorbell_with_its_id(
    serve: Serve, engine: str, doorbell_messages: list[bytes]
) -> None:
    """With NOTIF_CONFIG_DATA the id is not seen, and not needed: the place says which queue it is."""
    features = {"notif_config_data": True}
    served = serve(memory_disk(), queues=2, engine=engine, features=features)
    with attach(served.path, queues=2, kick=Kick.EVENTFD) as v:
        assert v.has(Feature.NOTIF_CONFIG_DATA)
        works(v)
    assert doorbell_messages == []


@both_engines
def test_memory_that_is_not_shared_is_told_of(serve: Serve, engine: str, logs: Logs) -> None:
    """A doorbell by eventfd counts as the driver's, as one by message does."""
    logs.expect("guest memory is not shared")
    served = serve(memory_disk(), engine=engine)
    memory = GuestMemory(8 << 20, sharing=Sharing.PRIVATE)
    with memory, attach(served.path, memory=memory, kick=Kick.EVENTFD) as v:
        assert v.status & 4  # the answer comes after the queue has started; an eventfd may overtake messages
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick(force=True)
        logs.wait("guest memory is not shared")


@pytest.mark.parametrize("kick", [Kick.WRITE, Kick.EVENTFD])
def test_a_doorbell_is_not_for_a_later_life_of_the_queue(serve: Serve, kick: Kick) -> None:
    """One that is heard only after a reset says nothing of the new ring, to which nobody has written yet."""
    served = serve(memory_disk(), engine="python")
    with attach(served.path, kick=kick) as v:
        works(v)
        served.settle()
        held, go_on = threading.Event(), threading.Event()

        def hold() -> None:
            held.set()
            go_on.wait(STOP_SECONDS)

        served.server._worker._loop.call_soon_threadsafe(hold)
        assert held.wait(STOP_SECONDS)
        v.ring_doorbell()
        v.reset()
        v.init()
        go_on.set()
        served.settle()
        works(v)


@both_engines
def test_each_client_gets_eventfds_of_its_own(serve: Serve, engine: str) -> None:
    """Whoever was here before, and kept them, neither takes doorbells away nor is told of them."""
    served = serve(memory_disk(), engine=engine)
    with attach(served.path, kick=Kick.EVENTFD) as v:
        works(v)
        kept = os.dup(v.doorbells.eventfd(v.doorbell_offset()))
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(kept)
    with attach(served.path, kick=Kick.EVENTFD) as v:
        works(v)
        assert not rung(kept)
        os.eventfd_write(kept, 1)
        assert os.eventfd_read(v.doorbells.eventfd(v.doorbell_offset())) > 0
        works(v)
        assert os.eventfd_read(kept) == 1
    os.close(kept)


@both_engines
def test_a_client_that_abuses_its_eventfd_harms_itself(serve: Serve, engine: str) -> None:
    """Blocking, emptied at once, full: the server neither waits for it nor stops serving, this client or the next."""
    served = serve(memory_disk(), engine=engine)
    with attach(served.path, kick=Kick.EVENTFD) as v:
        works(v)
        fd = v.doorbells.eventfd(v.doorbell_offset())
        os.set_blocking(fd, True)
        for _ in range(2000):
            os.eventfd_write(fd, 1)
            os.eventfd_read(fd)
        os.eventfd_write(fd, (1 << 64) - 2)
        for _ in range(10):
            pending = v.submit(RequestType.IN, 0, data_in=512)
            v.queues[0].publish()
            v.pci.notify.write(v.doorbell_offset(), 2, 0)
            v.wait(pending)
    with attach(served.path, kick=Kick.EVENTFD) as v:
        works(v)


@both_engines
def test_an_interrupt_that_rings_a_bell_does_not_go_round(serve: Serve, engine: str) -> None:
    """A client may give a bell as the eventfd of an interrupt; each wakes the server once."""
    served = serve(memory_disk(), engine=engine)
    with attach(served.path, kick=Kick.EVENTFD) as v:
        fd = v.doorbells.eventfd(v.doorbell_offset())
        v.connection.set_irqs(wire.IrqIndex.MSIX, v.lines.queue_vector(0), [fd])
        pending = v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        until(lambda: v.poll() or pending.done, "it is not served")
        served.settle()  # the interrupt comes after the completion
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(fd)
        served.settle()
        assert not rung(fd)


@pytest.mark.parametrize(
    ("ask", "error"),
    [
        (wire.IO_FDS.pack(15, 0, BAR, 0), errno.EINVAL),
        (wire.IO_FDS.pack(0, 0, BAR, 0), errno.EINVAL),
        (wire.IO_FDS.pack(0xFFFFFFFF, 0, BAR, 0), errno.EINVAL),
        (wire.IO_FDS.pack(4096, 1, BAR, 0), errno.EINVAL),
        (wire.IO_FDS.pack(4096, 0, BAR, 1), errno.EINVAL),
        (wire.IO_FDS.pack(4096, 0, 99, 0), errno.EINVAL),
        (wire.IO_FDS.pack(4096, 0, 0, 0), errno.EINVAL),
        (wire.IO_FDS.pack(4096, 0, BAR, 0)[:15], errno.EINVAL),
        (b"", errno.EINVAL),
    ],
    ids=["short", "empty", "huge", "flags", "count", "region", "no-bar", "cut", "nothing"],
)
def test_a_question_that_is_wrong_is_refused(serve: Serve, logs: Logs, ask: bytes, error: int) -> None:
    """With an error, and no descriptor; the next question is answered."""
    logs.allow("libvfio-user")
    served = serve(queues=2)
    with Connection(served.path) as connection:
        with pytest.raises(RemoteError) as caught:
            connection.request(Command.DEVICE_GET_REGION_IO_FDS, ask)
        assert caught.value.errno == error
        assert connection.region_io_fds(BAR).total == 2


def test_a_buffer_that_is_too_small_gets_the_size(serve: Serve) -> None:
    """Room for less than all of them: none, no descriptor, and how much room they need."""
    served = serve(queues=3)
    with Connection(served.path) as connection:
        needed = connection.region_io_fds(BAR).argsz
        for room in (16, 17, 16 + 40, needed - 1):
            answer = connection.region_io_fds(BAR, argsz=room)
            assert (answer.argsz, answer.total, answer.sub_regions, answer.fds) == (needed, 3, (), ())


@pytest.mark.parametrize("limit", [1, 3, 16])
def test_a_client_gets_no_more_descriptors_than_it_takes(serve: Serve, limit: int) -> None:
    """The first queues' go to a client that can receive fewer than there are; the others it rings by message."""
    served = serve(queues=20)
    with Connection(served.path, capabilities={**VMM_CAPABILITIES, "max_msg_fds": limit}) as connection:
        answer = connection.region_io_fds(BAR, argsz=4096)
        assert [each.offset for each in answer.sub_regions] == [NOTIFY + 4 * index for index in range(limit)]
        assert len(answer.fds) == answer.total == limit
        for fd in answer.fds:
            os.close(fd)
    with attach(served.path, queues=20, kick=Kick.EVENTFD) as v:
        works(v)
        with pytest.raises(Impossible, match="use --kick write, or fewer queues"):
            v.doorbells.eventfd(v.doorbell_offset(16))


def test_asking_a_thousand_times_costs_nothing(serve: Serve, logs: Logs) -> None:
    """No descriptor stays behind in the server, be the answers read or never read."""
    logs.allow("failed to reply")
    served = serve(queues=4)
    with attach(served.path) as v:
        works(v)
    until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]
    before = descriptors()
    with Connection(served.path) as connection:
        for _ in range(1000):
            for fd in connection.region_io_fds(BAR, argsz=4096).fds:
                os.close(fd)
        connected = descriptors()
    with Connection(served.path) as connection, contextlib.suppress(TimeoutError):
        connection.timeout = 0.2  # for there is no room when nothing is read
        for _ in range(1000):
            connection.send(Command.DEVICE_GET_REGION_IO_FDS, wire.IO_FDS.pack(4096, 0, BAR, 0))
    until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]
    assert connected <= before + 2
    assert descriptors() <= before
    with attach(served.path, kick=Kick.EVENTFD) as v:
        works(v)


# A page to map.


@pytest.fixture
def mapped(serve: Serve) -> Served:
    """A server whose doorbells can be mapped."""
    return serve(memory_disk(), queues=2, doorbell="mmap", io=BUSY)


@pytest.fixture
def page(mapped: Served) -> Iterator[tuple[Connection, int]]:
    """A client of it, and the descriptor of the BAR."""
    with Connection(mapped.path) as connection:
        info = connection.region_info(BAR, argsz=4096)
        yield connection, info.fds[0]
        for fd in info.fds:
            os.close(fd)


def test_only_the_doorbells_can_be_mapped(mapped: Served, serve: Serve) -> None:
    """One page of BAR 4, no other region; and nothing of a server that was not told to."""
    for path, areas in ((mapped.path, [(NOTIFY, PAGE)]), (serve().path, [])):
        with Connection(path) as connection:
            for index in range(9):
                info = connection.region_info(index, argsz=4096)
                assert mappable(info) == (areas if index == BAR else [])
                for fd in info.fds:
                    os.close(fd)


@pytest.mark.parametrize("features", [SUPPORTED, PACKED], ids=["split", "packed"])
@both_engines
def test_stores_are_served(serve: Serve, engine: str, features: int, doorbell_messages: list[bytes]) -> None:
    """Requests of a driver that stores to the page are served, on every queue, after a reset too, with no message."""
    served = serve(memory_disk(), queues=2, engine=engine, doorbell="mmap", io=BUSY)
    with attach(served.path, queues=2, features=features, kick=Kick.MMAP) as v:
        works(v)
        v.reset()
        v.init()
        works(v)
    assert doorbell_messages == []


@both_engines
def test_messages_are_heard_beside_the_page(serve: Serve, engine: str, doorbell_messages: list[bytes]) -> None:
    """A VMM that traps the page, now or always, sends them."""
    served = serve(memory_disk(), engine=engine, doorbell="mmap", io=BUSY)
    with attach(served.path) as v:
        for _ in range(3):
            pending = v.submit(RequestType.IN, 0, data_in=512)
            v.kick(force=True)
            v.wait(pending)
    assert len(doorbell_messages) == 3


def test_what_is_in_the_file_does_not_matter(mapped: Served) -> None:
    """A client that fills all of the file, or punches it away, changes no register and no queue."""
    with attach(mapped.path, queues=2, kick=Kick.MMAP) as v:
        info = v.connection.region_info(BAR, argsz=4096)
        bar = mmap.mmap(info.fds[0], 0x4000)
        before = v.device.status, v.capacity, v.device.get(CommonCfg.NUM_QUEUES)
        for byte in (b"\xff", b"\x00", b"\x5a"):
            bar[:] = byte * 0x4000
            works(v)
            assert (v.device.status, v.capacity, v.device.get(CommonCfg.NUM_QUEUES)) == before
        punch = ctypes.CDLL(None, use_errno=True).fallocate
        hole = punch(info.fds[0], 1 | 2, ctypes.c_long(0), ctypes.c_long(0x4000))  # PUNCH_HOLE, KEEP_SIZE
        assert (hole, bar[NOTIFY]) == (0, 0)
        works(v)
        bar.close()
        for fd in info.fds:
            os.close(fd)


def test_the_file_keeps_its_size(page: tuple[Connection, int]) -> None:
    """It is sealed: nobody can cut it from under whoever has it mapped, make it longer, or seal it against writing."""
    _, fd = page
    assert os.fstat(fd).st_size == 0x4000
    for size in (0, NOTIFY, 0x5000):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        os.pwrite(fd, b"more", 0x4000)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_each_client_maps_a_page_of_its_own(mapped: Served) -> None:
    """What one client leaves there, or goes on to write, the next does not see."""
    with Connection(mapped.path) as connection:
        first = connection.region_info(BAR, argsz=4096).fds[0]
        os.pwrite(first, b"secret", NOTIFY)
    with Connection(mapped.path) as connection:
        second = connection.region_info(BAR, argsz=4096).fds[0]
        os.pwrite(first, b"SECRET", NOTIFY)
        assert os.pread(second, 6, NOTIFY) == bytes(6)
    os.close(first)
    os.close(second)


def test_mapping_again_and_again_leaks_nothing(mapped: Served) -> None:
    """Forty clients, each with its page: no descriptor more than after the first."""
    counts = []
    for _ in range(40):
        with attach(mapped.path, kick=Kick.MMAP) as v:
            works(v)
        until(lambda: not mapped.server._transport._connected)  # type: ignore[union-attr]
        counts.append(descriptors())
    assert counts[-1] <= counts[0]


@pytest.mark.parametrize("poll_us", [0, 50])
def test_mapped_doorbells_need_a_server_that_looks(tmp_path: Path, poll_us: int) -> None:
    """Anything but polling for ever is refused, with what to do about it."""
    options = ServerOptions(doorbell="mmap", io=EngineOptions(poll_us=poll_us))
    with pytest.raises(ConfigError, match="with --doorbell mmap use --poll-us busy"):
        Server(tmp_path / "s", prepare(Memory(64)), options)


VMMBLK = [sys.executable, "-m", "vmmblk"]


@pytest.mark.parametrize("poll", ["auto", "0", "100"])
def test_the_command_refuses_the_two_together(tmp_path: Path, poll: str) -> None:
    """In one line, with exit status 2."""
    command = [*VMMBLK, "serve", "--socket", str(tmp_path / "s"), "--doorbell", "mmap", "--poll-us", poll, "memory:1M"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "use --poll-us busy" in result.stderr


@pytest.mark.parametrize("more", [[], ["--poll-us", "busy"]], ids=["implied", "said"])
def test_the_command_serves_by_looking(tmp_path: Path, more: list[str]) -> None:
    """--doorbell mmap is --poll-us busy as well: a driver whose stores nobody hears is served."""
    path = tmp_path / "s"
    command = [*VMMBLK, "serve", "--socket", str(path), "--doorbell", "mmap", *more, "memory:1M"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stdout.readline()
        with attach(path, kick=Kick.MMAP) as v:
            works(v)
        server.terminate()
        assert server.wait(STOP_SECONDS * 4) == 0


# The benchmark.


@pytest.mark.parametrize("kick", [Kick.MMAP, Kick.EVENTFD])
@both_engines
def test_the_benchmark_rings(serve: Serve, engine: str, kick: Kick) -> None:
    """On two queues, split and packed, and every request is made and checked."""
    options = {"doorbell": "mmap", "io": BUSY} if kick is Kick.MMAP else {}
    served = serve(memory_disk(), queues=2, engine=engine, **options)
    for packed in (False, True):
        workload = Workload(read_percent=50, requests=300, queues=2, packed=packed, verify=True, kick=kick, iodepth=8)
        outcome = run(served.path, workload)
        assert (outcome.requests, outcome.errors, outcome.corrupt, outcome.problem) == (300, 0, 0, None)
        assert outcome.kicks > 0


def test_the_benchmark_says_what_the_server_has_not(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """No page, or no eventfd: what to use instead."""
    served = serve()
    with pytest.raises(Impossible, match="does not let its doorbells be mapped; use --kick write"):
        run(served.path, Workload(requests=1, kick=Kick.MMAP))
    ask = Connection.region_io_fds
    monkeypatch.setattr(Connection, "region_io_fds", lambda self, _, argsz=16: ask(self, 1, argsz))
    with pytest.raises(Impossible, match="no eventfd for every doorbell; use --kick write"):
        run(served.path, Workload(requests=1, kick=Kick.EVENTFD))


# A driver that knows the layout by heart and never rings.


class ByHeart:
    """A driver that looks for no capability: all structures are in BAR 4, a page each.

    It does what SPDK's does: the capacity in one access of eight bytes, rings cleared after they were enabled,
    queue_enable written 0 at the end, INTx off, and no doorbell ever.
    """

    COMMON, DEVICE = 0x0000, 0x2000

    def __init__(self, connection: Connection, memory: GuestMemory) -> None:
        self._connection = connection
        self._memory = memory
        for index in range(connection.get_info().num_regions):
            for fd in connection.region_info(index, argsz=4096).fds:
                os.close(fd)
        command = int.from_bytes(connection.region_read(wire.Region.CONFIG, 4, 2), "little") | 0x404
        connection.region_write(wire.Region.CONFIG, 4, command.to_bytes(2, "little"))

    def get(self, field: int, width: int) -> int:
        """A register of the common configuration."""
        return int.from_bytes(self._connection.region_read(BAR, self.COMMON + field, width), "little")

    def set(self, field: int, width: int, value: int) -> None:
        """Write one."""
        self._connection.region_write(BAR, self.COMMON + field, value.to_bytes(width, "little"))

    def begin(self) -> SplitQueue:
        """From reset to DRIVER_OK, with one queue."""
        for status in (0, 1, 3):
            self.set(CommonCfg.DEVICE_STATUS, 1, status)
        for select_, wanted in ((0, 0), (1, 1)):  # VERSION_1 and no other
            self.set(CommonCfg.DRIVER_FEATURE_SELECT, 4, select_)
            self.set(CommonCfg.DRIVER_FEATURE, 4, wanted)
        self.set(CommonCfg.DEVICE_STATUS, 1, 11)
        assert self.get(CommonCfg.DEVICE_STATUS, 1) == 11
        self.set(CommonCfg.QUEUE_SELECT, 2, 0)
        queue = SplitQueue(self._memory, 0, self.get(CommonCfg.QUEUE_SIZE, 2), event_idx=False)
        for field, address in (
            (CommonCfg.QUEUE_DESC, queue.desc),
            (CommonCfg.QUEUE_DRIVER, queue.avail),
            (CommonCfg.QUEUE_DEVICE, queue.used),
        ):
            self.set(field, 4, address & 0xFFFFFFFF)
            self.set(field + 4, 4, address >> 32)
        self.get(CommonCfg.QUEUE_NOTIFY_OFF, 2)
        self.set(CommonCfg.QUEUE_ENABLE, 2, 1)
        self._memory.write(queue.desc, bytes(16 * queue.size))
        self._memory.write(queue.avail, bytes(4 + 2 * queue.size))
        self._memory.write(queue.used, bytes(4 + 8 * queue.size))
        self.set(CommonCfg.DEVICE_STATUS, 1, 15)
        return queue

    def capacity(self) -> int:
        """In one access."""
        data = self._connection.region_read(BAR, self.DEVICE + BlkConfig.CAPACITY, 8)
        return int(struct.unpack("<Q", data)[0])

    def request(self, queue: SplitQueue, kind: int, sector: int, data: bytes) -> bytes:
        """One request, waited for by looking; returns what is in its buffer then."""
        at = self._memory.alloc(PAGE)
        self._memory.write(at, REQUEST_HEADER.pack(kind, 0, sector) + b"\xff")
        self._memory.write(at + 512, data)
        reads = kind == RequestType.IN
        header, status = Segment(at, 16, writable=False), Segment(at + 16, 1, writable=True)
        queue.add([header, Segment(at + 512, len(data), writable=reads), status])
        queue.publish()
        until(queue.get_used, "nothing comes back")
        assert self._memory.read(at + 16, 1) == b"\0"
        return self._memory.read(at + 512, len(data))

    def end(self) -> None:
        """As at the end of a bdev."""
        self.set(CommonCfg.QUEUE_SELECT, 2, 0)
        self.set(CommonCfg.QUEUE_ENABLE, 2, 0)
        self.set(CommonCfg.DEVICE_STATUS, 1, 0)
        until(lambda: not self.get(CommonCfg.DEVICE_STATUS, 1))


@pytest.mark.parametrize("doorbell", ["message", "mmap"])
@both_engines
def test_a_driver_that_knows_the_layout_by_heart(serve: Serve, engine: str, doorbell: str) -> None:
    """It finds everything where it expects it and is served without a doorbell, more than once, by a busy server."""
    served = serve(memory_disk(), engine=engine, doorbell=doorbell, io=BUSY)
    with GuestMemory(8 << 20) as memory, Connection(served.path) as connection:
        memory.map_all(connection)
        driver = ByHeart(connection, memory)
        for turn in range(2):
            queue = driver.begin()
            assert driver.capacity() == 2048
            data = bytes([turn + 1]) * 1024
            driver.request(queue, RequestType.OUT, 7, data)
            assert driver.request(queue, RequestType.IN, 7, bytes(1024)) == data
            driver.end()
            queue.close()
