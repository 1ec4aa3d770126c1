"""How things end while a disk stalls: pinned memory, memory that vanishes, a server that stops, a process told to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING

import pytest
from stalls import KINDS, PATIENCE, Stalling, answers, changed, pages_of, snapshot, submit_at, within

from vmmblk.backends.file import File
from vmmblk.client import wire
from vmmblk.client.driver import VirtioBlk, attach
from vmmblk.client.memory import PAGE, GuestMemory
from vmmblk.client.wire import Command
from vmmblk.spec import DeviceStatus, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Logs, Served

    from vmmblk.block import Buffers

    Serve = Callable[..., Served]

SIZE = 4 << 20
HERE, CONTROL = 2 << 20, 3 << 20
every_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Guest memory that outlives connections."""
    with GuestMemory(SIZE) as memory:
        yield memory


@pytest.fixture(autouse=True)
def _quick(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in flight get 0.1 s only."""
    logs.allow("their memory is taken back")
    logs.allow("guest memory is gone")  # where the server meets the hole before the client is gone
    monkeypatch.setattr("vmmblk.server.DRAIN_LIMIT", 0.1)
    monkeypatch.setattr("vmmblk.server.PINNED_DRAIN_LIMIT", 0.1)


def begin_read(driver: VirtioBlk, disk: Stalling) -> int:
    """Have the disk begin to read sector 40 to HERE; where the status byte will be."""
    placed = submit_at(driver, RequestType.IN, 40, [(HERE, PAGE)], CONTROL)
    driver.kick()
    disk.wait("began")
    return placed.status


def send_unmap(driver: VirtioBlk) -> int:
    """Ask for all memory back, and do not wait."""
    iova, size = driver.memory.layout[0]
    return driver.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(iova, size))


class Pinning(Stalling):
    """A disk whose memory the kernel holds on to."""

    pins_memory = True


def test_pinned_memory_is_never_taken_back(serve: Serve, memory: GuestMemory, logs: Logs) -> None:
    """When the time is up the connection is closed, not answered; the I/O ends in the memory that it began in."""
    logs.expect("hold guest memory: the connection is closed")
    logs.allow("libvfio-user: failed to reply")
    disk = Pinning()
    served = serve(disk)
    with disk.held():
        with attach(served.path, memory=memory) as driver:
            status = begin_read(driver, disk)
            message = send_unmap(driver)
            with within(4.0), pytest.raises(ConnectionError):
                driver.connection.wait(message)
        disk.release()
        disk.wait("ended")
        assert memory.read(HERE, PAGE) == disk.data[40 * 512 : 40 * 512 + PAGE]
    with attach(served.path, memory=memory) as driver:
        assert memory.read(status, 1)[0] == Status.OK
        assert driver.read(40, 512) == disk.data[40 * 512 : 41 * 512]


def test_a_driver_may_wait_for_pinned_memory(serve: Serve, memory: GuestMemory) -> None:
    """A reset by the driver is over when the I/O is, however long that takes; the connection stays."""
    disk = Pinning()
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        begin_read(driver, disk)
        driver.device.status = DeviceStatus(0)
        until = time.monotonic() + 0.6
        while time.monotonic() < until:
            assert driver.device.status != 0
        disk.release()
        driver.init()
        assert memory.read(HERE, PAGE) == disk.data[40 * 512 : 40 * 512 + PAGE]
        assert driver.read(40, 512) == disk.data[40 * 512 : 41 * 512]


def test_bounced_memory_is_not_pinned(serve: Serve, memory: GuestMemory) -> None:
    """With private copies even such a disk is orphaned, and its late read lands nowhere."""
    disk = Pinning()
    disk.bounce = True
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        begin_read(driver, disk)
        driver.connection.device_reset()
        memory.write(HERE, b"\xee" * PAGE)
        driver.init()
        before = snapshot(memory)
        pending = driver.submit(RequestType.IN, 0, data_in=512)
        mine = pages_of(driver, [pending])
        driver.kick()
        disk.release()
        driver.wait(pending).result()
        assert changed(memory, before) <= mine


def test_a_file_is_read_and_written_directly(tmp_path: Path, serve: Serve, memory: GuestMemory) -> None:
    """With O_DIRECT the guest's pages go to the file and back, aligned or not, over unmaps and resets."""
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    disk = File(path, sector_size=PAGE, direct=True)
    assert disk.pins_memory
    data = os.urandom(2 * PAGE)
    with attach(serve(disk).path, memory=memory) as driver:
        driver.write(0, data)
        assert driver.read(0, len(data)) == data
        memory.unmap_all(driver.connection)
        memory.map_all(driver.connection)
        memory.write(HERE, data)
        odd = submit_at(driver, RequestType.OUT, 64, [(HERE + 3, 4000), (HERE + PAGE + 5, 96)], CONTROL)
        driver.kick()
        driver.wait(odd.pending)
        assert memory.read(odd.status, 1)[0] == Status.OK
        driver.connection.device_reset()
        driver.init()
        driver.flush()
    assert path.read_bytes()[: len(data)] == data
    assert path.read_bytes()[64 * 512 : 64 * 512 + PAGE] == data[3:4003] + data[PAGE + 5 : PAGE + 101]


# A client that takes its memory away under the server.  Nobody may touch the memory any more, on either side.


@contextlib.contextmanager
def doomed(path: Path) -> Iterator[VirtioBlk]:
    """A driver whose memory the test truncates."""
    with GuestMemory(SIZE) as memory, attach(path, memory=memory) as driver:
        yield driver


def test_memory_that_vanished_under_a_ring(serve: Serve, memory: GuestMemory, logs: Logs) -> None:
    """The server looks for requests in a ring that is gone, says so, answers, and serves the next client."""
    logs.expect("guest memory is gone")
    disk = Stalling()
    served = serve(disk)
    with doomed(served.path) as driver:
        driver.read(0, 512)
        driver.submit(RequestType.IN, 0, data_in=512)
        driver.queues[0].publish()
        os.ftruncate(driver.memory.fd, 0)
        driver.ring_doorbell()
        served.settle()
        answers(driver)
    with attach(served.path, memory=memory) as driver:
        assert driver.read(0, 512) == disk.data[:512]


@every_kind
@pytest.mark.parametrize("request_type", [RequestType.IN, RequestType.OUT])
def test_memory_that_vanished_under_a_request(
    kind: str, request_type: RequestType, serve: Serve, memory: GuestMemory
) -> None:
    """The disk goes on in a buffer that is gone, the completion to a ring that is gone; the next client is served."""
    disk = KINDS[kind]()
    served = serve(disk)
    with doomed(served.path) as driver, disk.held():
        submit_at(driver, request_type, 40, [(HERE, PAGE)], CONTROL)
        driver.kick()
        disk.wait("began")
        os.ftruncate(driver.memory.fd, 0)
        disk.release()
        disk.wait("ended")
        answers(driver)
    with attach(served.path, memory=memory) as driver:
        assert driver.read(0, 512) == disk.data[:512]


@every_kind
def test_memory_that_vanished_before_it_was_taken_back(kind: str, serve: Serve, memory: GuestMemory) -> None:
    """A write is orphaned whose data is gone: the reset succeeds, and the next client is served."""
    disk = KINDS[kind]()
    served = serve(disk)
    with disk.held():
        with doomed(served.path) as driver:
            submit_at(driver, RequestType.OUT, 40, [(HERE, PAGE)], CONTROL)
            driver.kick()
            disk.wait("began")
            os.ftruncate(driver.memory.fd, 0)
            with within(4.0):
                driver.connection.device_reset()
                driver.memory.unmap_all(driver.connection)
        disk.release()
        disk.wait("ended")
    with attach(served.path, memory=memory) as driver:
        assert driver.read(0, 512) == disk.data[:512]


# Stopping.


class Recorder(Stalling):
    """Has a write-back cache, and tells of flush and disconnect in its journal."""

    async def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """As write."""
        await self.write(sector_start, buffers)

    async def flush(self) -> None:
        """Only recorded."""
        self._note("ended", "flush", 0)

    async def disconnect(self) -> None:
        """Only recorded."""
        self._note("ended", "disconnect", 0)


class Stopping:
    """A server that is being stopped, in a thread."""

    def __init__(self, served: Served, timeout: float) -> None:
        self.result: bool | None = None
        self._thread = threading.Thread(target=self._stop, args=(served, timeout))
        self._thread.start()

    def _stop(self, served: Served, timeout: float) -> None:
        self.result = served.server.stop(timeout)

    def ended(self, within: float) -> bool:
        """Whether it has ended; waits so many seconds for that."""
        self._thread.join(within)
        return not self._thread.is_alive()


def test_a_server_that_stops_finishes_what_it_has(serve: Serve, memory: GuestMemory) -> None:
    """It waits for the write in flight and answers registers meanwhile; then it flushes, then it disconnects."""
    disk = Recorder()
    served = serve(disk)
    with attach(served.path, memory=memory) as driver, disk.held():
        pending = driver.submit(RequestType.OUT, 0, b"x" * 512)
        driver.kick()
        disk.wait("began")
        stopping = Stopping(served, PATIENCE)
        assert not stopping.ended(0.2)
        answers(driver)
        disk.release()
        assert stopping.ended(PATIENCE)
        assert stopping.result
        driver.wait(pending).result()
    assert [call for event, call, _ in disk.journal if event == "ended"] == ["write", "flush", "disconnect"]
    assert not served.path.exists()


def test_a_server_may_stop_during_a_drain(serve: Serve, memory: GuestMemory) -> None:
    """The message that waited for the requests in flight is answered, and the server stops."""
    disk = Recorder()
    served = serve(disk)
    with attach(served.path, memory=memory) as driver, disk.held():
        driver.submit(RequestType.OUT, 0, b"x" * 512)
        driver.kick()
        disk.wait("began")
        message = send_unmap(driver)
        stopping = Stopping(served, PATIENCE)
        disk.release()
        driver.connection.wait(message)
        assert stopping.ended(PATIENCE)
        assert stopping.result


@every_kind
@pytest.mark.parametrize("orphaned", [False, True], ids=["in flight", "orphaned"])
def test_a_server_does_not_wait_for_ever(kind: str, orphaned: bool, serve: Serve, memory: GuestMemory) -> None:
    """With a disk that hangs it gives up when the time is over, says so, and removes its socket."""
    disk = KINDS[kind]()
    served = serve(disk)
    with attach(served.path, memory=memory) as driver, disk.held():
        begin_read(driver, disk)
        if orphaned:
            driver.connection.device_reset()
        assert not served.server.stop(0.5)
        assert not served.path.exists()
        disk.release()
        assert served.server.stop(PATIENCE)


# A process.

DISK = """
import asyncio, pathlib, threading, time
import vmmblk

class Disk(vmmblk.Block):
    def __init__(self, *, began: pathlib.Path, hang: bool = False):
        self.info = vmmblk.BlockInfo(read_write=True, sector_size=512, size_sectors=2048)
        self.began, self.hang = began, hang

    {prefix} read(self, sector_start, buffers):
        self.began.touch()
        {body}
"""

BODIES = {
    "sleeping": ("async def", "await asyncio.sleep(3600 if self.hang else 0)"),
    "blocking": ("async def", "time.sleep(3600 if self.hang else 0)"),
    "computing": ("async def", "while self.hang: pass"),
    "plain": ("def", "threading.Event().wait(3600 if self.hang else 0)"),
}


@contextlib.contextmanager
def process(folder: Path, kind: str, *parameters: str) -> Iterator[subprocess.Popen[str]]:
    """``vmmblk serve`` with a disk of the user's, ready to be connected to."""
    prefix, body = BODIES[kind]
    (folder / "disk.py").write_text(DISK.format(prefix=prefix, body=body))
    command = [sys.executable, "-m", "vmmblk", "serve", "--socket", "s", "--stop-timeout", "1", "./disk.py"]
    with subprocess.Popen(
        [*command, "began=began", *parameters], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        try:
            assert "QEMU" in child.stdout.readline()
            yield child
        finally:
            child.kill()


@every_kind
def test_a_process_ends_although_its_disk_hangs(kind: str, tmp_path: Path, memory: GuestMemory) -> None:
    """On SIGTERM it waits as long as it was told, says what is wrong, and exits with 1; the socket is removed."""
    with process(tmp_path, kind, "hang=on") as child, attach(tmp_path / "s", memory=memory) as driver:
        driver.submit(RequestType.IN, 0, data_in=512)
        driver.kick()
        until = time.monotonic() + PATIENCE
        while not (tmp_path / "began").exists():
            assert time.monotonic() < until
            answers(driver)
        child.send_signal(signal.SIGTERM)
        _, complaint = child.communicate(timeout=PATIENCE)
        assert child.returncode == 1
        assert "the disk did not finish within 1 s" in complaint
        assert not (tmp_path / "s").exists()


def test_a_process_ends_well(tmp_path: Path, memory: GuestMemory) -> None:
    """On SIGTERM, with a client connected and a disk that does not hang, it exits with 0; the socket is removed."""
    with process(tmp_path, "plain") as child, attach(tmp_path / "s", memory=memory) as driver:
        assert len(driver.read(0, 512)) == 512
        child.send_signal(signal.SIGTERM)
        _, complaint = child.communicate(timeout=PATIENCE)
        assert (child.returncode, complaint) == (0, "")
        assert not (tmp_path / "s").exists()
