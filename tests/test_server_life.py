"""A server's life: its socket, clients that come, vanish and misbehave, and its end."""

from __future__ import annotations

import array
import contextlib
import json
import os
import resource
import select
import shutil
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from conftest import STOP_SECONDS, on_both_engines, until
from disks import CachedDisk, Disk

import vmmblk
from vmmblk import vfio_user
from vmmblk.backends.memory import Memory
from vmmblk.client import wire
from vmmblk.client.connection import VMM_CAPABILITIES, Connection
from vmmblk.client.driver import VirtioBlk, attach
from vmmblk.client.memory import GuestMemory
from vmmblk.client.wire import Command, HeaderFlag, IrqIndex, IrqSetFlag
from vmmblk.errors import ConfigError
from vmmblk.filters import prepare
from vmmblk.server import Server, ServerOptions
from vmmblk.spec import RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Logs, Served

    Serve = Callable[..., Served]

MIB = 1 << 20
ANYTHING = "libvfio-user|client|connection|cannot be reached|on_.* failed"


def version() -> bytes:
    """A whole VERSION message."""
    text = json.dumps({"capabilities": VMM_CAPABILITIES}).encode() + b"\0"
    return wire.encode(0, Command.VERSION, wire.VERSION.pack(0, 0) + text)


def dial(path: Path) -> socket.socket:
    """A bare connection."""
    raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    raw.settimeout(STOP_SECONDS)
    raw.connect(str(path))
    return raw


def closed(raw: socket.socket) -> bool:
    """Read until the other end closes; False if it does not."""
    with contextlib.suppress(ConnectionError):
        try:
            while raw.recv(65536):
                pass
        except TimeoutError:
            return False
    return True


def works(path: Path) -> None:
    """A client comes, and is served."""
    with attach(path) as v:
        v.write(3, b"w" * 512)
        assert v.read(3, 512) == b"w" * 512


# The socket.


def test_the_socket_is_private_and_goes_away(serve: Serve) -> None:
    """Mode 0600 whatever the umask, a socket, removed at stop; stop twice is harmless."""
    old = os.umask(0)
    try:
        served = serve()
    finally:
        os.umask(old)
    mode = served.path.stat().st_mode
    assert stat.S_ISSOCK(mode)
    assert stat.S_IMODE(mode) == 0o600
    assert served.server.stop(STOP_SECONDS)
    assert not served.path.exists()
    assert served.server.stop(STOP_SECONDS)


def test_a_stale_socket_is_replaced(serve: Serve, tmp_path: Path, logs: Logs) -> None:
    """A socket file that nobody listens on is no obstacle."""
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(tmp_path / "s0"))
    stale.close()
    works(serve().path)
    assert logs.matching("nobody listened")


def test_a_live_socket_is_refused(serve: Serve, logs: Logs) -> None:
    """A second server on the same socket says that it is in use, and the first goes on."""
    logs.expect("a second client was refused")  # the second server knocks
    first = serve()
    with attach(first.path) as v:
        second = Server(first.path, prepare(Memory(64)), ServerOptions())
        with pytest.raises(ConfigError, match="in use by another server: choose another"):
            second.start()
        logs.wait("a second client was refused")  # while the first is attached: nothing else is said of the knock
        v.write(0, bytes(512))
    works(first.path)


def test_a_live_socket_of_somebody_else_is_refused(tmp_path: Path) -> None:
    """Whatever listens there is left alone."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        other.listen()
        with pytest.raises(ConfigError, match="in use"):
            Server(path, prepare(Memory(64)), ServerOptions()).start()
        assert path.is_socket()


def make_file(folder: Path) -> Path:
    """A regular file with something in it."""
    (folder / "f").write_text("precious")
    return folder / "f"


def make_folder(folder: Path) -> Path:
    """A folder."""
    (folder / "d").mkdir()
    return folder / "d"


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (make_file, "exists and is no socket: choose another"),
        (make_folder, "exists and is no socket: choose another"),
        (lambda folder: folder / "missing" / "s", "the folder .*missing does not exist"),
        (lambda folder: make_file(folder) / "s", "is no folder"),
        (lambda folder: folder / ("x" * 120), "too long for a UNIX socket"),
        (lambda folder: folder / ("x" * 300), "too long"),
        (lambda _: Path("/proc/vmmblk-socket"), "cannot be made"),
    ],
    ids=["file", "folder", "missing", "not-a-folder", "too-long", "much-too-long", "proc"],
)
def test_impossible_sockets(tmp_path: Path, where: Callable[[Path], Path], message: str) -> None:
    """Each is one line that says what to do; nothing is left behind and nothing is harmed."""
    path = where(tmp_path)
    before = process_state()
    disk = prepare(Memory(64))
    server = Server(path, disk, ServerOptions())
    with pytest.raises(ConfigError, match=message) as caught:
        server.start()
    assert "\n" not in str(caught.value)
    assert_no_growth(before, process_state())
    if (tmp_path / "f").exists():
        assert (tmp_path / "f").read_text() == "precious"


def test_the_longest_path_works(tmp_path: Path) -> None:
    """107 bytes are what a UNIX socket takes."""
    path = tmp_path / "s"
    path = tmp_path / ("s" * (107 - len(str(tmp_path)) - 1))
    assert len(str(path)) == 107
    server = Server(path, prepare(Memory(64)), ServerOptions())
    server.start()
    works(path)
    assert server.stop(STOP_SECONDS)


AS_NOBODY = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from vmmblk.backends.memory import Memory
from vmmblk.errors import ConfigError
from vmmblk.filters import prepare
from vmmblk.server import Server, ServerOptions
server = Server(Path(sys.argv[2]), prepare(Memory(64)), ServerOptions())
try:
    server.start()
except ConfigError as error:
    print(error)
else:
    print("started")
    server.stop(5)
"""


def test_another_user_without_permission() -> None:
    """No permission on the folder, or on a socket in it: one line; a folder of its own: it starts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        shutil.copytree(Path(vmmblk.__file__).parent, folder / "code" / "vmmblk")
        python = str(Path(sys.executable).resolve())  # of the virtual environment another user may see nothing
        script = folder / "script.py"
        script.write_text(textwrap.dedent(AS_NOBODY))
        theirs = folder / "theirs"
        theirs.mkdir()
        theirs.chmod(0o777)
        ours = folder / "ours"
        ours.mkdir()
        ours.chmod(0o555)
        packages = site_packages(folder)
        become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"] if os.geteuid() == 0 else []
        with socket.socket(socket.AF_UNIX) as live:
            live.bind(str(theirs / "root"))
            (theirs / "root").chmod(0o000)
            live.listen()
            outputs = [
                subprocess.run(
                    [*become, python, str(script), str(folder / "code"), str(path)],
                    env={"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": packages},
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=30,
                )
                for path in (ours / "s", theirs / "root", theirs / "s")
            ]
        assert [each.stderr for each in outputs] == [""] * 3
        assert "no permission on" in outputs[0].stdout
        assert "choose a folder that you may write to" in outputs[0].stdout
        assert "no permission" in outputs[1].stdout or "in use" in outputs[1].stdout
        assert outputs[2].stdout == "started\n"
        assert [each.stdout.count("\n") for each in outputs] == [1, 1, 1]


def site_packages(folder: Path) -> str:
    """A copy of cffi that anybody can read; what of it the system has needs none."""
    import _cffi_backend
    import cffi

    place = folder / "site"
    shutil.copytree(Path(cffi.__file__).parent, place / "cffi")
    shutil.copy(_cffi_backend.__file__, place)
    return str(place)


# Clients that come again, and several at once.


@pytest.mark.parametrize("disk", [Disk, CachedDisk])
def test_the_disk_outlives_its_clients(serve: Serve, disk: Callable[[], Disk]) -> None:
    """What one client wrote the next one reads; the disk is disconnected once, at the end, after a flush."""
    served = serve(disk())
    for turn in range(5):
        with attach(served.path) as v:
            assert v.read(0, 512) == bytes([turn]) * 512
            v.write(0, bytes([turn + 1]) * 512)
    assert served.server.stop(STOP_SECONDS)
    assert served.disk.count("disconnect") == 1
    assert served.disk.calls[-1][0] == "disconnect"
    assert served.disk.stable[:512] == bytes([5]) * 512


def test_a_second_client_is_refused_at_once(serve: Serve, logs: Logs) -> None:
    """It sees its connection close, also when it speaks first; the first client goes on."""
    logs.expect("a second client was refused")
    served = serve()
    with attach(served.path) as v:
        for _ in range(3):
            with dial(served.path) as raw:
                with contextlib.suppress(BrokenPipeError):
                    raw.sendall(version())
                assert closed(raw)
            v.write(0, bytes(512))
    works(served.path)


def test_second_clients_cannot_flood_the_log(serve: Serve, logs: Logs) -> None:
    """Two hundred of them leave a few lines."""
    logs.expect("a second client was refused")
    served = serve()
    with attach(served.path) as v:
        for _ in range(200):
            with dial(served.path) as raw:
                assert closed(raw)
        v.write(0, bytes(512))
    assert len(logs.records) < 30


def process_state() -> tuple[int, int, int]:
    """Descriptors, threads and mappings of this process."""
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    mappings = len(Path("/proc/self/maps").read_text().splitlines())
    return descriptors, threading.active_count(), mappings


def assert_no_growth(before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
    """No more descriptors and threads; the allocator may have mapped a little more, for threads that met in it."""
    assert after[0] <= before[0]
    assert after[1] <= before[1]
    assert after[2] <= before[2] + 8


@on_both_engines
def test_attaching_again_and_again_leaks_nothing(serve: Serve) -> None:
    """Fifty clients in a row: no descriptor, thread or mapping more than after the first few."""
    served = serve()
    states = []
    for turn in range(56):
        with attach(served.path) as v:
            v.write(turn, bytes([turn]) * 512)
            v.memory.unmap_all(v.connection)
            v.memory.map_all(v.connection)
            assert v.read(turn, 512) == bytes([turn]) * 512
        until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]
        states.append(process_state())
    assert_no_growth(states[5], states[-1])


def test_starting_and_stopping_leaks_nothing(tmp_path: Path) -> None:
    """Servers come and go: no descriptor, thread or mapping stays."""
    states = []
    for _ in range(30):
        server = Server(tmp_path / "s", prepare(Memory(64)), ServerOptions())
        server.start()
        works(tmp_path / "s")
        assert server.stop(STOP_SECONDS)
        states.append(process_state())
    assert_no_growth(states[5], states[-1])


# Clients that vanish.


def vanish_silent(path: Path, _disk: Disk) -> None:
    """Before a word."""
    dial(path).close()


def vanish_in_version(path: Path, _disk: Disk) -> None:
    """In the middle of VERSION."""
    with dial(path) as raw:
        raw.sendall(version()[:30])


def vanish_unread(path: Path, _disk: Disk) -> None:
    """With the answer to VERSION not read."""
    with dial(path) as raw:
        raw.sendall(version())


def vanish_after_version(path: Path, _disk: Disk) -> None:
    """After VERSION."""
    Connection(path).close()


def vanish_after_map(path: Path, _disk: Disk) -> None:
    """After DMA_MAP."""
    with GuestMemory(4 * MIB) as memory, Connection(path) as connection:
        memory.map_all(connection)


def vanish_in_map(path: Path, _disk: Disk) -> None:
    """In the middle of DMA_MAP, its descriptor sent."""
    with GuestMemory(4 * MIB) as memory, Connection(path) as connection:
        message = wire.encode(9, Command.DMA_MAP, wire.encode_dma_map(0, 4 * MIB, 0, 3))
        connection.send_raw(message[:20], [memory.fd])


def vanish_in_header(path: Path, _disk: Disk) -> None:
    """In the middle of a header."""
    with Connection(path) as connection:
        connection.send_raw(wire.encode(9, Command.REGION_WRITE, bytes(24))[:7])


def vanish_in_body(path: Path, _disk: Disk) -> None:
    """After half a body."""
    with Connection(path) as connection:
        connection.send_raw(wire.encode(9, Command.REGION_WRITE, bytes(24))[:28])


def vanish_unanswered(path: Path, _disk: Disk) -> None:
    """With two hundred answers not read."""
    with Connection(path) as connection:
        for _ in range(200):
            connection.send(Command.REGION_READ, wire.encode_region_read(7, 0, 256))


def vanish_half_initialised(path: Path, _disk: Disk) -> None:
    """With a queue set up and no DRIVER_OK."""
    with attach(path, start=False) as v:
        v.reset()
        v.pci.enable()
        v.lines.install(v.pci)
        v.device.status = 3  # type: ignore[assignment]
        v.device.select_queue(0)


def vanish_live(path: Path, _disk: Disk) -> None:
    """Live and idle."""
    with attach(path):
        pass


def vanish_with_requests(path: Path, disk: Disk) -> None:
    """With requests in flight, which end a little later."""
    disk.held.add("read")
    before = disk.count("read")
    with attach(path) as v:
        for sector in range(20):
            v.submit(RequestType.IN, sector, data_in=512)
        v.kick()
        disk.wait_for("read", before + 20)
    disk.release()


def vanish_with_a_message_waiting(path: Path, disk: Disk) -> None:
    """With a request in flight and an unmap that waits for it."""
    disk.held.add("read")
    before = disk.count("read")
    with attach(path) as v:
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read", before + 1)
        v.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(0, v.memory.size))
        v.connection.send(Command.DEVICE_RESET)
    disk.release()


VANISHING = [
    vanish_silent,
    vanish_in_version,
    vanish_unread,
    vanish_after_version,
    vanish_after_map,
    vanish_in_map,
    vanish_in_header,
    vanish_in_body,
    vanish_unanswered,
    vanish_half_initialised,
    vanish_live,
    vanish_with_requests,
    vanish_with_a_message_waiting,
]


@pytest.mark.parametrize("vanish", VANISHING, ids=lambda each: each.__name__)
def test_a_client_that_vanishes(serve: Serve, logs: Logs, vanish: Callable[[Path, Disk], None]) -> None:
    """At any moment: the next client is served at once, and fifty times leave no descriptor, thread or mapping."""
    logs.allow(ANYTHING)
    served = serve()
    states = []
    for turn in range(51):
        vanish(served.path, served.disk)
        if turn % 10 == 0:
            works(served.path)
            until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]
            states.append(process_state())
    assert_no_growth(states[1], states[-1])
    assert len([record for record in logs.records if record.levelname != "INFO"]) < 60


def test_who_waits_for_the_end_of_a_lost_client_costs_nothing(
    serve: Serve, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a lost client's requests drain the next one waits in the queue of the socket, and nobody spins."""
    logs.allow(ANYTHING)
    turns: list[None] = []
    turn = vfio_user.Transport._turn
    monkeypatch.setattr(vfio_user.Transport, "_turn", lambda transport: (turns.append(None), turn(transport))[1])
    disk = Disk()
    disk.held.add("read")
    served = serve(disk)
    with attach(served.path) as v:
        v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read")
        v.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(0, v.memory.size))
        until(lambda: served.server._transport._pending)  # type: ignore[union-attr]
    with dial(served.path) as raw:
        raw.sendall(version())
        before = len(turns)
        assert not select.select([raw], [], [], 0.3)[0]
        assert len(turns) - before < 20
        disk.release()
        assert raw.recv(16)


@on_both_engines
def test_stop_with_a_client_connected(serve: Serve) -> None:
    """Stopping breaks the connection: the client sees its end."""
    served = serve()
    with attach(served.path) as v:
        v.write(0, bytes(512))
        assert served.server.stop(STOP_SECONDS)
        with pytest.raises(ConnectionError):
            v.read(0, 512)


def test_stop_waits_for_requests_in_flight(serve: Serve) -> None:
    """What was submitted is completed, flushed, and the disk disconnected, in this order."""
    disk = CachedDisk()
    served = serve(disk)
    with attach(served.path) as v:
        disk.held.add("write_cached")
        pending = v.submit(RequestType.OUT, 0, b"z" * 512)
        v.kick()
        disk.wait_for("write_cached")
        stopped: list[bool] = []
        stopper = threading.Thread(target=lambda: stopped.append(served.server.stop(STOP_SECONDS)))
        stopper.start()
        disk.release()
        stopper.join()
        assert stopped == [True]
        assert v.poll() == 1
        assert pending.status == Status.OK
    assert [call[0] for call in disk.calls] == ["write_cached", "flush", "disconnect"]
    assert disk.stable[:512] == b"z" * 512


def test_a_server_that_never_started_can_be_stopped(tmp_path: Path) -> None:
    """Stop before start closes what was open, and does not touch the disk, which is still its owner's."""
    disk = Disk()
    before = process_state()
    server = Server(tmp_path / "s", prepare(disk), ServerOptions())
    assert server.stop(1.0)
    assert server.stop(1.0)
    assert_no_growth(before, process_state())
    assert not disk.calls


# Messages that break the rules.


def header(command: int, size: int, *, msg_id: int = 1, flags: int = 0, error: int = 0) -> bytes:
    """A message header with any size."""
    return wire.HEADER.pack(msg_id, command, size, flags, error)


def map_message(iova: int, size: int, *, argsz: int = 32, offset: int = 0, flags: int = 3) -> bytes:
    """A DMA_MAP."""
    return wire.encode(1, Command.DMA_MAP, wire.DMA_MAP.pack(argsz, flags, offset, iova, size))


def irqs(index: int, start: int, count: int, flags: int, *, argsz: int = 20, data: bytes = b"") -> bytes:
    """A SET_IRQS."""
    return wire.encode(1, Command.DEVICE_SET_IRQS, wire.IRQ_SET.pack(argsz, flags, index, start, count) + data)


def access(command: int, region: int, offset: int, count: int, data: bytes = b"") -> bytes:
    """A region access."""
    return wire.encode(1, command, wire.REGION_ACCESS.pack(offset, region, count) + data)


READ, WRITE = Command.REGION_READ, Command.REGION_WRITE
TRIGGER, EVENTFD, NONE, BOOL = (
    IrqSetFlag.ACTION_TRIGGER,
    IrqSetFlag.DATA_EVENTFD,
    IrqSetFlag.DATA_NONE,
    IrqSetFlag.DATA_BOOL,
)
BAD_MESSAGES: dict[str, tuple[bytes, int]] = {
    "size-0": (header(READ, 0), 0),
    "size-15": (header(READ, 15), 0),
    "size-4G": (header(READ, 0xFFFFFFFF), 0),
    "size-2M": (header(WRITE, 2 * MIB), 0),
    "no-body": (header(READ, 16), 0),
    "short-body": (header(READ, 20) + bytes(4), 0),
    "command-0": (header(0, 16), 0),
    "command-99": (header(99, 16), 0),
    "command-ffff": (header(0xFFFF, 16), 0),
    "reply-unasked": (header(READ, 16, flags=HeaderFlag.REPLY), 0),
    "error-unasked": (header(READ, 16, flags=HeaderFlag.REPLY | HeaderFlag.ERROR, error=5), 0),
    "flags-all": (header(READ, 16, flags=0xFFFFFFFF, error=0xFFFFFFFF), 0),
    "type-2": (header(READ, 16, flags=2), 0),
    "version-again": (version(), 0),
    "version-empty": (header(Command.VERSION, 16), 0),
    "info-short": (wire.encode(1, Command.DEVICE_GET_INFO, bytes(4)), 0),
    "info-argsz-0": (wire.encode(1, Command.DEVICE_GET_INFO, bytes(16)), 0),
    "region-info-99": (wire.encode(1, Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(32, 0, 99, 0, 0, 0)), 0),
    "region-info-short": (wire.encode(1, Command.DEVICE_GET_REGION_INFO, bytes(8)), 0),
    "region-info-huge": (
        wire.encode(1, Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(0xFFFFFFFF, 0, 4, 0, 0, 0)),
        0,
    ),
    "irq-info-99": (wire.encode(1, Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, 99, 0)), 0),
    "irq-info-short": (wire.encode(1, Command.DEVICE_GET_IRQ_INFO, bytes(3)), 0),
    "io-fds": (wire.encode(1, Command.DEVICE_GET_REGION_IO_FDS, bytes(16)), 0),
    "dma-read": (wire.encode(1, Command.DMA_READ, bytes(16)), 0),
    "dma-write": (wire.encode(1, Command.DMA_WRITE, bytes(16)), 0),
    "dirty-pages": (wire.encode(1, Command.DIRTY_PAGES, bytes(16)), 0),
    "map-short": (wire.encode(1, Command.DMA_MAP, bytes(16)), 0),
    "map-argsz": (map_message(0, MIB, argsz=0), 0),
    "map-empty": (map_message(0, 0), 1),
    "map-huge": (map_message(0, 1 << 62), 1),
    "map-everything": (map_message(0, (1 << 64) - 1), 1),
    "map-wraps": (map_message((1 << 64) - 4096, 8192), 1),
    "map-odd": (map_message(1, 4095), 1),
    "map-past-the-file": (map_message(0, MIB, offset=1 << 40), 1),
    "map-offset-wraps": (map_message(0, MIB, offset=(1 << 64) - 4096), 1),
    "map-odd-offset": (map_message(0, MIB, offset=123), 1),
    "map-flags": (map_message(0, MIB, flags=0xFF), 1),
    "map-no-flags": (map_message(0, MIB, flags=0), 1),
    "map-no-fd": (map_message(0, MIB), 0),
    "map-two-fds": (map_message(0, MIB), 2),
    "map-many-fds": (map_message(0, MIB), 8),
    "map-too-many-fds": (map_message(0, MIB), 40),
    "unmap-nothing": (wire.encode(1, Command.DMA_UNMAP, wire.encode_dma_unmap(0, MIB)), 0),
    "unmap-empty": (wire.encode(1, Command.DMA_UNMAP, wire.encode_dma_unmap(0, 0)), 0),
    "unmap-wraps": (wire.encode(1, Command.DMA_UNMAP, wire.encode_dma_unmap((1 << 64) - 1, (1 << 64) - 1)), 0),
    "unmap-short": (wire.encode(1, Command.DMA_UNMAP, bytes(8)), 0),
    "unmap-argsz": (wire.encode(1, Command.DMA_UNMAP, wire.DMA_UNMAP.pack(0xFFFFFFFF, 0, 0, MIB)), 0),
    "unmap-flags": (wire.encode(1, Command.DMA_UNMAP, wire.encode_dma_unmap(0, MIB, 0xFFFFFFFF)), 0),
    "read-region-99": (access(READ, 99, 0, 4), 0),
    "read-region-0": (access(READ, 0, 0, 4), 0),
    "read-rom": (access(READ, 6, 0, 4), 0),
    "read-past-the-end": (access(READ, 4, 0x4000, 4), 0),
    "read-over-the-end": (access(READ, 4, 0x3FFE, 4), 0),
    "read-offset-wraps": (access(READ, 4, (1 << 64) - 2, 4), 0),
    "read-nothing": (access(READ, 4, 0, 0), 0),
    "read-2M": (access(READ, 4, 0, 2 * MIB), 0),
    "read-4G": (access(READ, 7, 0, 0xFFFFFFFF), 0),
    "read-config-over": (access(READ, 7, 255, 2), 0),
    "write-region-99": (access(WRITE, 99, 0, 4, bytes(4)), 0),
    "write-nothing": (access(WRITE, 4, 0, 0), 0),
    "write-less-than-said": (access(WRITE, 4, 0, 100, bytes(4)), 0),
    "write-more-than-said": (access(WRITE, 4, 0, 1, bytes(64)), 0),
    "write-past-the-end": (access(WRITE, 4, 0x4000, 4, bytes(4)), 0),
    "write-with-fds": (access(WRITE, 4, 0, 4, bytes(4)), 3),
    "irqs-index": (irqs(99, 0, 1, NONE | TRIGGER), 0),
    "irqs-start": (irqs(IrqIndex.MSIX, 99, 1, NONE | TRIGGER), 0),
    "irqs-count": (irqs(IrqIndex.MSIX, 0, 0xFFFFFFFF, NONE | TRIGGER), 0),
    "irqs-overflow": (irqs(IrqIndex.MSIX, 1, 0xFFFFFFFF, EVENTFD | TRIGGER), 1),
    "irqs-overflow-none": (irqs(IrqIndex.MSIX, 0xFFFFFFFF, 1, NONE | TRIGGER), 0),
    "irqs-flags-0": (irqs(IrqIndex.MSIX, 0, 1, 0), 0),
    "irqs-flags-all": (irqs(IrqIndex.MSIX, 0, 1, 0xFF), 1),
    "irqs-two-actions": (irqs(IrqIndex.MSIX, 0, 1, NONE | TRIGGER | IrqSetFlag.ACTION_MASK), 0),
    "irqs-bool": (irqs(IrqIndex.MSIX, 0, 2, BOOL | TRIGGER, data=b"\1\1"), 0),
    "irqs-bool-short": (irqs(IrqIndex.MSIX, 0, 2, BOOL | TRIGGER), 0),
    "irqs-not-an-eventfd": (irqs(IrqIndex.MSIX, 0, 1, EVENTFD | TRIGGER), 1),
    "irqs-more-fds": (irqs(IrqIndex.MSIX, 0, 1, EVENTFD | TRIGGER), 2),
    "irqs-fewer-fds": (irqs(IrqIndex.MSIX, 0, 2, EVENTFD | TRIGGER), 1),
    "irqs-err": (irqs(IrqIndex.ERR, 0, 1, EVENTFD | TRIGGER), 1),
    "irqs-mask-msix": (irqs(IrqIndex.MSIX, 0, 1, NONE | IrqSetFlag.ACTION_MASK), 0),
    "irqs-short": (wire.encode(1, Command.DEVICE_SET_IRQS, bytes(7)), 0),
    "irqs-argsz": (irqs(IrqIndex.MSIX, 0, 1, NONE | TRIGGER, argsz=0), 0),
    "reset-with-data": (wire.encode(1, Command.DEVICE_RESET, bytes(100)), 0),
    "reset-with-fds": (wire.encode(1, Command.DEVICE_RESET), 5),
}


HARMLESS = {
    "flags-all",
    "region-info-huge",
    "map-odd",
    "map-past-the-file",
    "map-odd-offset",
    "map-no-flags",
    "map-no-fd",
    "map-two-fds",
    "map-many-fds",
    "map-too-many-fds",
    "read-nothing",
    "write-nothing",
    "write-with-fds",
    "irqs-bool",
    "irqs-mask-msix",
    "reset-with-data",
    "reset-with-fds",
}
"""Those that may also be taken for good."""


def send_bad(connection: Connection, data: bytes, fds: int) -> bool:
    """Send it, then ask something that has an answer; the server answers both or hangs up.

    True if it refused the message: with an error, or by hanging up.
    """
    refused = False
    with tempfile.TemporaryFile() as file:
        file.truncate(MIB)
        with contextlib.suppress(ConnectionError):
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [file.fileno()] * fds))] if fds else []
            connection._socket.sendmsg([data], rights)
            connection.send(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0))
            while True:
                reply = connection.receive(STOP_SECONDS)
                for fd in reply.fds:
                    os.close(fd)
                refused |= bool(reply.header.flags & HeaderFlag.ERROR)
                if reply.header.command == Command.DEVICE_GET_INFO and not reply.header.flags & HeaderFlag.ERROR:
                    return refused
    return True


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages(serve: Serve, logs: Logs, name: str) -> None:
    """Each is answered or ends that connection, again and again; nothing leaks, the next client is served."""
    logs.allow(ANYTHING)
    served = serve()
    message, fds = BAD_MESSAGES[name]
    states = []
    works(served.path)
    for _ in range(4):
        for _ in range(2):
            with Connection(served.path) as connection:
                assert send_bad(connection, message, fds) or name in HARMLESS
            until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]
        states.append(process_state())
        works(served.path)
        until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]
    assert_no_growth(states[0], states[-1])
    assert served.server.failed is None


@on_both_engines
@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_bad_messages_to_a_live_device(serve: Serve, logs: Logs, name: str) -> None:
    """After a bad message a live device still works, unless the connection was closed for it."""
    logs.allow(ANYTHING)
    served = serve()
    message, fds = BAD_MESSAGES[name]
    with attach(served.path) as v, contextlib.suppress(ConnectionError):
        v.write(0, b"a" * 512)
        send_bad(v.connection, message, fds)
        if not name.startswith(("reset", "unmap", "irqs", "write-more", "version")):
            assert v.read(0, 512) == b"a" * 512
    works(served.path)


def test_bad_messages_cannot_flood_the_log(serve: Serve, logs: Logs) -> None:
    """A thousand of them on one connection, and a hundred connections: a few dozen lines."""
    logs.allow(ANYTHING)
    served = serve()
    with Connection(served.path) as connection:
        for _ in range(500):
            send_bad(connection, *BAD_MESSAGES["read-region-99"])
            send_bad(connection, *BAD_MESSAGES["irqs-start"])
    for _ in range(100):
        with Connection(served.path) as connection:
            send_bad(connection, *BAD_MESSAGES["size-4G"])
    works(served.path)
    assert len(logs.records) < 100


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
        header(Command.VERSION, 16),
        wire.encode(0, Command.VERSION, wire.VERSION.pack(9, 9) + b"{}\0"),
        wire.encode(0, Command.VERSION, wire.VERSION.pack(0, 0) + b"{"),
        wire.encode(0, Command.VERSION, wire.VERSION.pack(0, 0) + b"[]\0"),
        wire.encode(0, Command.VERSION, wire.VERSION.pack(0, 0) + b'{"capabilities":{"max_msg_fds":-1}}\0'),
        wire.encode(0, Command.VERSION, wire.VERSION.pack(0, 0) + b'{"capabilities":{"max_data_xfer_size":0}}\0'),
        wire.encode(0, Command.DMA_MAP, bytes(32)),
        wire.encode(0, Command.VERSION, wire.VERSION.pack(0, 0) + b'{"a":' * 5000 + b"\0"),
        bytes(4096),
    ],
    ids=["nothing", "http", "empty", "9.9", "torn", "array", "fds", "xfer", "map", "deep", "zeroes"],
)
def test_bad_first_messages(serve: Serve, logs: Logs, first: bytes) -> None:
    """Whatever comes instead of VERSION: the connection ends or is answered, and the next client is served."""
    logs.allow(ANYTHING)
    served = serve()
    for _ in range(5):
        with dial(served.path) as raw:
            with contextlib.suppress(ConnectionError):
                raw.sendall(first)
            raw.shutdown(socket.SHUT_WR)
            assert closed(raw)
    works(served.path)


@on_both_engines
def test_random_bytes(serve: Serve, logs: Logs) -> None:
    """Noise after a good start, with and without descriptors: the server lives."""
    import random

    logs.allow(ANYTHING)
    noise = random.Random(7)  # noqa: S311
    served = serve()
    before = None
    for turn in range(150):
        with Connection(served.path) as connection, contextlib.suppress(OSError):
            for _ in range(noise.randrange(1, 4)):
                body = noise.randbytes(noise.randrange(0, 60))
                size = 16 + len(body)
                message = struct.pack("<HHIII", turn, noise.randrange(0, 17), size, noise.choice([0, 16]), 0) + body
                connection.send_raw(message, [1] * noise.choice([0, 0, 1, 3]))
        if turn == 20:
            works(served.path)
            until(lambda: not served.server._transport._connected)  # type: ignore[union-attr]
            before = process_state()[:2]
    works(served.path)
    until(lambda: process_state()[:2] == before, "descriptors or threads have leaked")


# Half a message, and silence.


def half_header(path: Path) -> socket.socket:
    """Seven bytes of sixteen."""
    raw = dial(path)
    raw.sendall(version())
    raw.recv(4096)
    raw.sendall(header(READ, 32)[:7])
    return raw


def half_body(path: Path) -> socket.socket:
    """A header that promises a body."""
    raw = dial(path)
    raw.sendall(version())
    raw.recv(4096)
    raw.sendall(header(READ, 32))
    return raw


def no_version(path: Path) -> socket.socket:
    """Not a word."""
    return dial(path)


def half_version(path: Path) -> socket.socket:
    """A VERSION whose text does not come."""
    raw = dial(path)
    raw.sendall(version()[:40])
    return raw


def deaf(path: Path) -> socket.socket:
    """Asks and asks, and reads no answer."""
    raw = dial(path)
    raw.sendall(version())
    raw.recv(4096)
    raw.setblocking(False)  # noqa: FBT003
    with contextlib.suppress(BlockingIOError):
        while True:
            raw.send(access(READ, 4, 0, 4096))
    raw.settimeout(STOP_SECONDS)
    return raw


SILENT = [half_body, no_version, half_version, deaf]


@pytest.mark.parametrize("fall_silent", SILENT, ids=lambda each: each.__name__)
def test_half_a_message_and_silence(
    serve: Serve, logs: Logs, monkeypatch: pytest.MonkeyPatch, fall_silent: Callable[[Path], socket.socket]
) -> None:
    """The connection is closed after PATIENCE, with one line, and the next client is served."""
    monkeypatch.setattr(vfio_user, "PATIENCE", 0.05)
    logs.allow(ANYTHING)
    logs.expect("did not finish its message")
    served = serve()
    with fall_silent(served.path) as raw:
        poll = select.poll()
        poll.register(raw, 0)  # without reading, which would be an end of the silence
        assert [events & select.POLLHUP for _, events in poll.poll(STOP_SECONDS * 1000)] == [select.POLLHUP]
    works(served.path)
    assert len(logs.matching("did not finish")) <= 2


@pytest.mark.parametrize("fall_silent", SILENT, ids=lambda each: each.__name__)
def test_stop_does_not_wait_for_the_rest_of_a_message(
    serve: Serve, logs: Logs, fall_silent: Callable[[Path], socket.socket]
) -> None:
    """A client that keeps the transport waiting does not keep the server from stopping."""
    logs.allow(ANYTHING)
    served = serve()
    with fall_silent(served.path):
        until(lambda: served.server._transport._inside_since, "the transport waits for the client")  # type: ignore[union-attr]
        began = time.monotonic()
        assert served.server.stop(STOP_SECONDS)
        assert time.monotonic() - began < 2
    assert not served.path.exists()


def test_an_idle_client_is_left_alone(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """PATIENCE is for half a message, not for a client that has nothing to say."""
    monkeypatch.setattr(vfio_user, "PATIENCE", 0.05)
    with attach(serve().path) as v:
        assert not select.select([v.connection], [], [], 1.3)[0]
        v.write(0, bytes(512))


def test_requests_are_served_while_the_transport_waits(serve: Serve, logs: Logs) -> None:
    """Half a message holds up messages, not the disk: what was kicked before is completed."""
    logs.allow(ANYTHING)
    disk = Disk()
    served = serve(disk)
    with attach(served.path, interrupts=poll_mode()) as v:
        disk.held.add("read")
        pending = v.submit(RequestType.IN, 0, data_in=512)
        v.kick()
        disk.wait_for("read")
        v.connection.send_raw(header(READ, 32))
        disk.release()
        until(lambda: v.poll() or pending.done)
        assert pending.status == Status.OK


def poll_mode() -> Any:
    """Completions are found by looking."""
    from vmmblk.client.interrupts import Interrupts

    return Interrupts.POLL


def test_a_header_in_two_pieces_ends_the_connection_or_is_understood(serve: Serve, logs: Logs) -> None:
    """Half a header and silence hold nothing up: the connection is closed at once, and the next client is served."""
    logs.allow(ANYTHING)
    served = serve()
    with half_header(served.path) as raw:
        assert closed(raw)
    works(served.path)


@on_both_engines
def test_a_driver_finds_the_server_gone(serve: Serve) -> None:
    """Errors of the client library when the server stops under it are connection errors."""
    served = serve()
    with GuestMemory(4 * MIB) as memory, Connection(served.path) as connection:
        memory.map_all(connection)
        v = VirtioBlk(connection, memory)
        served.server.stop(STOP_SECONDS)
        with pytest.raises(ConnectionError):
            connection.get_info()
        v.close()
    with pytest.raises(FileNotFoundError):
        Connection(served.path)


# What should not happen.


def test_a_transport_that_fails_lets_the_disk_finish(tmp_path: Path, logs: Logs) -> None:
    """The client is dropped; guest memory stays until the write under way has ended, so that it stores its own data."""
    logs.expect("the transport failed")
    disk = Disk()
    disk.held.add("write")
    server = Server(tmp_path / "s", prepare(disk), ServerOptions())
    server.start()
    with attach(server._path) as v:
        v.submit(RequestType.OUT, 4, data_out=b"w" * 4096)
        v.kick()
        disk.wait_for("write")
        transport = server._transport
        assert transport is not None
        transport.call(lambda: 1 // 0)
        until(lambda: server.failed)
        with pytest.raises((ConnectionError, TimeoutError)):
            v.connection.region_read(4, 0x14, 1)
        disk.release()
        assert server.stop(STOP_SECONDS)
    assert isinstance(server.failed, ZeroDivisionError)
    assert disk.data[4 * 512 : 12 * 512] == b"w" * 4096


def test_a_start_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    """A disk that raises when it is watched: the socket is gone, and the next server can have its place."""

    class Broken(Memory):
        def on_resize(self, changed: Callable[[], None]) -> None:  # noqa: ARG002
            raise RuntimeError("no")

    server = Server(tmp_path / "s", prepare(Memory(64)), ServerOptions())
    server._block = Broken(64)
    with pytest.raises(RuntimeError, match="no"):
        server.start()
    assert not (tmp_path / "s").exists()
    again = Server(tmp_path / "s", prepare(Memory(64)), ServerOptions())
    again.start()
    works(tmp_path / "s")
    assert again.stop(STOP_SECONDS)


def test_no_descriptors_left(serve: Serve, logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients that cannot be accepted are refused without spinning, and who is connected goes on."""
    logs.expect("a client was refused: Too many open files")
    logs.allow("a client was refused|failed to rec")  # the second is gone when it could be accepted
    turns: list[None] = []
    turn = vfio_user.Transport._turn
    monkeypatch.setattr(vfio_user.Transport, "_turn", lambda transport: (turns.append(None), turn(transport))[1])
    served = serve()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with attach(served.path) as v, socket.socket(socket.AF_UNIX) as second:
        used = max(int(fd.name) for fd in Path("/proc/self/fd").iterdir())
        spare = []
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, hard))
            with contextlib.suppress(OSError):
                while True:
                    spare.append(os.dup(0))
            second.connect(str(served.path))
            logs.wait("a client was refused")
            before = len(turns)
            v.write(3, b"w" * 512)
            assert v.read(3, 512) == b"w" * 512
            assert len(turns) - before < 100
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in spare:
                os.close(fd)
    works(served.path)
