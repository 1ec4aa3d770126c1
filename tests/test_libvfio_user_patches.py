"""What qemu-scripts/patches mend in libvfio-user 0.1: one test for each patch, against the library itself."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import select
import struct
import subprocess
import termios
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from vmmblk.client import wire
from vmmblk.client.connection import VMM_CAPABILITIES, Connection
from vmmblk.client.errors import RemoteError
from vmmblk.client.wire import Command, DmaFlag, IrqIndex, IrqSetFlag

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
PAGE = mmap.PAGESIZE


class Server:
    """A running tests/csrc/library_server."""

    def __init__(self, program: Path, path: Path) -> None:
        self.path = path
        self.process = subprocess.Popen([program, path], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "listening\n"

    def close(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def descriptors(self) -> int:
        """How many descriptors the server has open."""
        return sum(1 for _ in Path(f"/proc/{self.process.pid}/fd").iterdir())


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server, built with the library that get-libvfio-user built."""
    script = HERE.parent / "qemu-scripts" / "get-libvfio-user"
    prefix = Path(subprocess.run([script], stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
    built = tmp_path_factory.mktemp("library") / "library_server"
    sources = [HERE / "csrc" / "library_server.c", prefix / "lib/libvfio-user.a", prefix / "lib/libjson-c.a"]
    include = [f"-I{prefix}/include", f"-I{prefix}/include/vfio-user"]
    subprocess.run(["gcc", "-D_GNU_SOURCE", "-O1", "-Wl,--wrap=close", *include, "-o", built, *sources], check=True)
    return built


@pytest.fixture
def server(program: Path, tmp_path: Path) -> Iterator[Server]:
    """A server that listens."""
    running = Server(program, tmp_path / "socket")
    yield running
    running.close()


@pytest.fixture
def client(server: Server) -> Iterator[Connection]:
    """A client of that server."""
    with Connection(server.path) as connection:
        yield connection


@pytest.fixture
def memory() -> Iterator[int]:
    """Eight pages of memory to map; page n is full of n."""
    fd = os.memfd_create("memory")
    os.write(fd, b"".join(bytes([n]) * PAGE for n in range(8)))
    yield fd
    os.close(fd)


def trigger(client: Connection, vector: int) -> int:
    """Makes the device trigger a vector; returns the errno that it got."""
    client.region_write(0, 0, struct.pack("<I", vector))
    return int.from_bytes(client.region_read(0, 0, 4), "little")


def set_irqs(client: Connection, index: int, vectors: range, data: IrqSetFlag, extra: bytes = b"") -> None:
    """SET_IRQS without descriptors."""
    payload = wire.encode_set_irqs(index, vectors.start, len(vectors), data | IrqSetFlag.ACTION_TRIGGER)
    client.request(Command.DEVICE_SET_IRQS, payload + extra)


def fired(eventfd: int) -> bool:
    """Whether an eventfd was signalled; it is reset."""
    if not select.select([eventfd], [], [], 0)[0]:
        return False
    os.eventfd_read(eventfd)
    return True


def refused(number: int) -> pytest.RaisesExc[RemoteError]:
    """The request is answered with this error."""
    return pytest.raises(RemoteError, check=lambda error: error.errno == number)


def test_irq_range_overflow(server: Server, client: Connection) -> None:
    """A range of vectors whose end overflows 32 bits is refused and harms nothing."""
    before = server.descriptors()
    with refused(errno.EINVAL):
        set_irqs(client, IrqIndex.MSIX, range(1, 2**32), IrqSetFlag.DATA_EVENTFD)
    assert client.get_info().num_irqs == 5
    assert server.descriptors() == before


def test_irq_disable_range(client: Connection) -> None:
    """Taking back the vectors from 2 on silences those and no others."""
    eventfds = [os.eventfd(0) for _ in range(4)]
    client.set_irqs(IrqIndex.MSIX, 0, eventfds)
    set_irqs(client, IrqIndex.MSIX, range(2, 4), IrqSetFlag.DATA_EVENTFD)
    answers = [trigger(client, vector) for vector in range(4)]
    assert answers == [0, 0, errno.ENOENT, errno.ENOENT]
    assert [fired(fd) for fd in eventfds] == [True, True, False, False]


@pytest.mark.parametrize("index", [IrqIndex.ERR, IrqIndex.REQ])
def test_irq_err_and_req(client: Connection, index: IrqIndex) -> None:
    """The eventfd of ERR or REQ is signalled when that is triggered, and never by vector 0 of the device."""
    vector, special = os.eventfd(0), os.eventfd(0)
    client.set_irqs(IrqIndex.MSIX, 0, [vector])
    client.set_irqs(index, 0, [special])
    assert trigger(client, 0) == 0
    assert (fired(vector), fired(special)) == (True, False)
    set_irqs(client, index, range(1), IrqSetFlag.DATA_NONE)
    assert (fired(vector), fired(special)) == (False, True)
    set_irqs(client, index, range(1), IrqSetFlag.DATA_BOOL, b"\1")
    assert (fired(vector), fired(special)) == (False, True)


def test_irq_nonblocking(client: Connection) -> None:
    """An eventfd whose counter is full does not hold up the device, though its owner made it blocking."""
    full = os.eventfd(0)
    os.eventfd_write(full, 2**64 - 2)
    client.set_irqs(IrqIndex.MSIX, 0, [full])
    assert trigger(client, 0) == errno.EAGAIN


def test_irq_eventfds_only(client: Connection, memory: int) -> None:
    """A pipe or a file given as an eventfd is refused, and nothing is ever written to it."""
    pipe = os.pipe()
    for descriptor in (pipe[1], memory):
        with refused(errno.EINVAL):
            client.set_irqs(IrqIndex.MSIX, 0, [descriptor])
    assert trigger(client, 0) == errno.ENOENT


def test_dma_map_double_close(client: Connection) -> None:
    """A descriptor that cannot be mapped is closed once."""
    reader, _writer = os.pipe()
    with refused(errno.ENODEV):
        client.dma_map(0, PAGE, reader, flags=DmaFlag.READ)
    assert int.from_bytes(client.region_read(0, 4, 4), "little") == 0


def test_dma_map_twice(server: Server, client: Connection, memory: int) -> None:
    """Mapping a region that is mapped already is refused, and no descriptor stays behind."""
    client.dma_map(0, PAGE, memory)
    before = server.descriptors()
    with refused(errno.EEXIST):
        client.dma_map(0, PAGE, memory)
    assert server.descriptors() == before


@pytest.mark.parametrize(("address", "size"), [(PAGE, 0), (2**64 - PAGE, PAGE), (2**64 - PAGE, 2 * PAGE)])
def test_dma_map_wraps(client: Connection, address: int, size: int) -> None:
    """A region that is empty, or whose end is not a 64-bit address, is refused."""
    with refused(errno.EINVAL):
        client.dma_map(address, size, None)


def test_dma_map_unaligned(client: Connection, memory: int) -> None:
    """A region that starts within a page of its file is mapped up to its last byte."""
    client.dma_map(0, PAGE, memory, offset=PAGE)
    client.dma_map(PAGE, 2 * PAGE, memory, offset=PAGE + 1)
    # What lies behind a mapping that is too short is the first one, or nothing at all.
    assert client.region_read(0, 8, 1) == b"\3"


def test_dma_regions(client: Connection) -> None:
    """A guest may have hundreds of pieces of memory."""
    for number in range(500):
        client.dma_map(number * PAGE, PAGE, None)


def test_receive_leak(server: Server, memory: int) -> None:
    """The descriptors that came with a header that is cut short are closed."""
    with Connection(server.path):
        before = server.descriptors()
    for _ in range(3):
        with Connection(server.path) as client:
            client.send_raw(bytes(8), [memory] * 100)
            with pytest.raises(ConnectionError):
                client.receive()
    with Connection(server.path):
        assert server.descriptors() == before


def test_receive_split_body(client: Connection) -> None:
    """A message whose body arrives in pieces is answered as if it had come in one."""
    message = wire.encode(7, Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, 0, 0, 0))
    for piece in (message[:20], message[20:25], message[25:]):
        client.send_raw(piece)
        wait_until_read(client)
    reply = client.wait(7)
    assert wire.DEVICE_INFO.unpack(reply.payload)[3] == 5


def wait_until_read(client: Connection) -> None:
    """Waits until the server has taken from its socket all that was sent."""
    deadline = time.monotonic() + 5
    while struct.unpack("i", fcntl.ioctl(client.fileno(), termios.TIOCOUTQ, bytes(4)))[0]:
        assert time.monotonic() < deadline
        os.sched_yield()


def test_attach_timeout(server: Server) -> None:
    """A client that falls silent before it has said who it is keeps the next one out for five seconds only."""
    with Connection(server.path, negotiate=False) as silent:
        silent.send_raw(wire.encode(0, Command.VERSION, bytes(4))[: wire.HEADER.size])
        wait_until_read(silent)
        with Connection(server.path, timeout=8) as client:
            assert client.get_info().num_irqs == 5


@pytest.mark.parametrize("limit", [1, 16])
def test_io_fds_limit(server: Server, limit: int) -> None:
    """A client that can receive so many descriptors in one message gets so many ioeventfds of twenty."""
    with Connection(server.path, capabilities={**VMM_CAPABILITIES, "max_msg_fds": limit}) as client:
        answer = client.region_io_fds(1, argsz=4096)
        assert (answer.total, len(answer.sub_regions), len(answer.fds)) == (limit, limit, limit)
        for fd in answer.fds:
            os.close(fd)
