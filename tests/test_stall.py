"""A disk that blocks, in every way a disk can: the device answers in time, whatever the client asks of it."""

from __future__ import annotations

import contextlib
import select
import struct
import time
from typing import TYPE_CHECKING

import pytest
from stalls import KINDS, Plain, Stalling, answers, within

from vmmblk.budget import DrainBudget
from vmmblk.client import wire
from vmmblk.client.connection import Connection
from vmmblk.client.driver import VirtioBlk, attach
from vmmblk.client.errors import StatusError
from vmmblk.client.memory import GuestMemory
from vmmblk.client.wire import Command, IrqIndex, Region
from vmmblk.spec import DeviceStatus, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Logs, Served

    Serve = Callable[..., Served]
    Sequence = Callable[[VirtioBlk, Path, contextlib.ExitStack], VirtioBlk]

QEMU_PATIENCE = 4.0
"""Seconds for a whole sequence; QEMU gives it five."""

SIZE = 4 << 20
OLD, NEW = b"old!" * 128, b"new!" * 128


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Guest memory that outlives connections."""
    with GuestMemory(SIZE) as memory:
        yield memory


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in flight get 0.1 s only, for tests of what happens then."""
    monkeypatch.setattr("vmmblk.server.DRAIN_LIMIT", 0.1)


@pytest.fixture(autouse=True)
def _orphans(logs: Logs) -> None:
    logs.allow("their memory is taken back")


# What a client does while a disk stalls.  Each returns a driver that is ready for requests.


def unmap(driver: VirtioBlk, path: Path, stack: contextlib.ExitStack) -> VirtioBlk:
    """All memory is unmapped, then mapped again, with a live ring."""
    driver.memory.unmap_all(driver.connection)
    driver.memory.map_all(driver.connection)
    return driver


def burst(driver: VirtioBlk, path: Path, stack: contextlib.ExitStack) -> VirtioBlk:
    """Ten unmaps and ten maps in a row; the client waits for the replies when all have been sent."""
    connection, (iova, size) = driver.connection, driver.memory.layout[0]
    sent = []
    for _ in range(10):
        sent.append(connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(iova, size)))
        payload = wire.encode_dma_map(iova, size, 0, wire.DmaFlag(3))
        sent.append(connection.send(Command.DMA_MAP, payload, [driver.memory.fd]))
    for message in sent:
        connection.wait(message)
    return driver


def device_reset(driver: VirtioBlk, path: Path, stack: contextlib.ExitStack) -> VirtioBlk:
    """The VMM resets the device."""
    driver.connection.device_reset()
    driver.init()
    return driver


def status_reset(driver: VirtioBlk, path: Path, stack: contextlib.ExitStack) -> VirtioBlk:
    """The driver resets the device, and reads the status until it is 0; at first it is not."""
    driver.device.status = DeviceStatus(0)
    assert driver.device.status != 0
    while driver.device.status:
        answers(driver)
    driver.init()
    return driver


def queue_reset(driver: VirtioBlk, path: Path, stack: contextlib.ExitStack) -> VirtioBlk:
    """The driver resets the queue."""
    driver.reset_queue()
    return driver


def disconnect(driver: VirtioBlk, path: Path, stack: contextlib.ExitStack) -> VirtioBlk:
    """The client goes away, and another one comes at once."""
    driver.connection.close()
    return stack.enter_context(attach(path, memory=driver.memory))


def reboot(driver: VirtioBlk, path: Path, stack: contextlib.ExitStack) -> VirtioBlk:
    """The guest reboots: QEMU resets the device, twice, and firmware remaps all memory."""
    connection = driver.connection
    for _ in range(2):
        connection.disable_irqs(IrqIndex.INTX)
        connection.disable_irqs(IrqIndex.MSIX)
        connection.region_write(Region.CONFIG, 0x04, b"\0\0")
        connection.device_reset()
        for bar in range(6):
            connection.region_write(Region.CONFIG, 0x10 + 4 * bar, struct.pack("<I", 0))
    for _ in range(5):
        driver.memory.unmap_all(connection)
        driver.memory.map_all(connection)
    driver.init()
    return driver


_ALL = (unmap, burst, device_reset, status_reset, queue_reset, disconnect, reboot)
SEQUENCES = {each.__name__: each for each in _ALL}
every_kind = pytest.mark.parametrize("kind", KINDS)


def stall_during(sequence: Sequence, disk: Stalling, served: Served, memory: GuestMemory) -> None:
    """Go through ``sequence`` with a stalled write, and see a new one wait for it and be served."""
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(attach(served.path, memory=memory))
        stack.enter_context(disk.held())
        driver.submit(RequestType.OUT, 8, OLD)
        driver.kick()
        disk.wait("began")
        answers(driver)
        with within(QEMU_PATIENCE):
            driver = sequence(driver, served.path, stack)
        answers(driver)
        new = driver.submit(RequestType.OUT, 8, NEW)
        driver.kick()
        answers(driver)
        driver.poll()
        assert not new.done
        disk.release()
        driver.wait(new).result()
    assert disk.journal == [("began", "write", 8), ("ended", "write", 8)] * 2
    assert disk.data[8 * 512 : 9 * 512] == NEW


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("sequence", SEQUENCES.values(), ids=SEQUENCES)
@every_kind
def test_a_stall_holds_up_nothing_but_requests(
    kind: str, sequence: Sequence, serve: Serve, memory: GuestMemory
) -> None:
    """The client gets its answers, a new request waits until the old one has ended, and then is served."""
    disk = KINDS[kind]()
    stall_during(sequence, disk, serve(disk), memory)


@pytest.mark.parametrize("sequence", [burst, disconnect, reboot])
def test_the_answers_come_in_time_with_the_real_limit(sequence: Sequence, serve: Serve, memory: GuestMemory) -> None:
    """With all the time that requests get, a sequence of messages is over before QEMU gives up."""
    disk = KINDS["computing"]()
    stall_during(sequence, disk, serve(disk), memory)


def test_registers_answer_all_through_a_long_stall(serve: Serve, memory: GuestMemory) -> None:
    """While a disk computes for seconds on end each register read is answered at once, and the request is served."""
    disk = KINDS["computing"]()
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        pending = driver.submit(RequestType.IN, 0, data_in=512)
        driver.kick()
        disk.wait("began")
        until = time.monotonic() + 3.0
        while time.monotonic() < until:
            answers(driver)
        assert not pending.done
        disk.release()
        assert driver.wait(pending).result() == disk.data[:512]


@pytest.mark.usefixtures("quick")
@every_kind
def test_an_orphan_of_a_live_queue_is_an_error_once(kind: str, serve: Serve, memory: GuestMemory) -> None:
    """When memory was remapped under a request, its queue not reset, it ends with IOERR, in one used element."""
    disk = KINDS[kind]()
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        orphan = driver.submit(RequestType.IN, 0, data_in=512)
        driver.kick()
        disk.wait("began")
        memory.unmap_all(driver.connection)
        memory.map_all(driver.connection)
        disk.release()
        assert driver.wait(orphan).status == Status.IOERR
        assert driver.read(0, 512) == disk.data[:512]
        assert driver.queues[0].used_idx == 2
        assert not driver.stray


@every_kind
def test_a_drain_that_ends_in_time_orphans_nothing(
    kind: str, serve: Serve, memory: GuestMemory, logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A message waits for the requests in flight; when they end soon they end well, and their data lands."""
    monkeypatch.setattr("vmmblk.server.DRAIN_LIMIT", 4.5)
    disk = KINDS[kind]()
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        read = driver.submit(RequestType.IN, 3, data_in=1024)
        driver.kick()
        disk.wait("began")
        iova, size = memory.layout[0]
        message = driver.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(iova, size))
        assert select.select([driver.connection], [], [], 0.3)[0] == []
        disk.release()
        driver.connection.wait(message)
        assert driver.poll() == 1
        assert read.result() == disk.data[:1024]
        memory.map_all(driver.connection)
        assert driver.read(0, 512) == disk.data[:512]
    assert not logs.matching("taken back")


@every_kind
def test_while_an_orphan_lives_every_reset_succeeds_at_once(kind: str, serve: Serve, memory: GuestMemory) -> None:
    """Resetting again, by message or by driver, waits no more; what was asked meanwhile never reaches the disk."""
    disk = KINDS[kind]()
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        for sector in range(5):
            driver.submit(RequestType.OUT, sector, OLD)
            driver.kick()
            disk.wait("began")
            with within(5.0 if sector == 0 else 0.9):  # the time that drains have
                driver.connection.device_reset()
            driver.init()
            with within(0.9):
                driver.reset_queue()
        new = driver.submit(RequestType.OUT, 9, NEW)
        driver.kick()
        disk.release()
        driver.wait(new).result()
    assert [entry[2] for entry in disk.journal if entry[0] == "began"] == [0, 9]


@pytest.mark.usefixtures("quick")
@every_kind
def test_a_hundred_requests_in_flight_are_orphaned(kind: str, serve: Serve, memory: GuestMemory) -> None:
    """Of many writes that stalled each that reaches the disk brings its own data, and all end before a new one."""
    disk = KINDS[kind]()
    with attach(serve(disk).path, memory=memory, indirect=True) as driver, disk.held():
        for sector in range(100):
            driver.submit(RequestType.OUT, sector, bytes([sector]) * 512)
        driver.kick()
        disk.wait("began")
        with within(QEMU_PATIENCE):
            driver.connection.device_reset()
        memory.write(memory.layout[0].iova, b"\xee" * SIZE)
        driver.init()
        new = driver.submit(RequestType.OUT, 200, NEW)
        driver.kick()
        disk.release()
        driver.wait(new).result()
    assert disk.journal[-2:] == [("began", "write", 200), ("ended", "write", 200)]
    reached = {sector for event, _, sector in disk.journal[:-2] if event == "ended"}
    assert len(reached) >= 64
    for sector in reached:
        assert disk.data[sector * 512 : (sector + 1) * 512] == bytes([sector]) * 512


@pytest.mark.usefixtures("quick")
def test_one_stall_after_another(serve: Serve, memory: GuestMemory) -> None:
    """A disk that stalls, recovers and stalls again: each time the reset succeeds and the disk is served again."""
    disk = Plain()
    with attach(serve(disk).path, memory=memory) as driver:
        for round_ in range(3):
            with disk.held():
                for sector in range(64):
                    driver.submit(RequestType.IN, sector, data_in=512)
                driver.kick()
                disk.wait("began", 17 * round_ + 16)  # as many as there are threads
                with within(QEMU_PATIENCE):
                    driver.connection.device_reset()
                driver.init()
            driver.read(0, 512)
            disk.journal[:] = [("began", "read", 0)] * 17 * (round_ + 1)


def test_drains_that_follow_each_other_share_one_limit(serve: Serve, memory: GuestMemory) -> None:
    """What the first drain took, orphans and all, the next does not get again."""
    disk = Stalling()
    with attach(serve(disk).path, memory=memory) as driver, disk.held(), within(4.5):
        for round_ in range(6):
            pending = driver.submit(RequestType.IN, 0, data_in=512)
            driver.kick()
            disk.wait("began", round_ + 1)
            memory.unmap_all(driver.connection)
            memory.map_all(driver.connection)
            disk.release()
            with pytest.raises(StatusError):
                driver.wait(pending).result()
            disk.hold()


@every_kind
def test_a_client_may_come_as_soon_as_the_last_has_gone(kind: str, serve: Serve, memory: GuestMemory) -> None:
    """Time and again, a client that connects right after another has disconnected is served."""
    disk = KINDS[kind]()
    served = serve(disk)
    for _ in range(30):
        with Connection(served.path) as connection:
            memory.map_all(connection)
            assert connection.get_info().num_regions >= 8


@pytest.mark.usefixtures("quick")
def test_a_second_client_is_refused_during_a_drain(serve: Serve, memory: GuestMemory, logs: Logs) -> None:
    """While a client is there, even one that waits for a drain, another is turned away and does not hang."""
    logs.expect("a second client was refused")
    disk = Stalling()
    served = serve(disk)
    with attach(served.path, memory=memory) as driver, disk.held():
        driver.submit(RequestType.IN, 0, data_in=512)
        driver.kick()
        disk.wait("began")
        iova, size = memory.layout[0]
        message = driver.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(iova, size))
        with pytest.raises(ConnectionError):
            Connection(served.path)
        driver.connection.wait(message)


class TestDrainBudget:
    """The time that drains may take, with a clock of the test's."""

    def test_a_drain_gets_the_limit(self) -> None:
        """The first drain may take all of it."""
        assert DrainBudget(1.0).begin(100.0) == 101.0

    def test_drains_in_a_row_share_it(self) -> None:
        """What one has taken the next does not get, but for the time between them."""
        budget = DrainBudget(1.0)
        budget.begin(100.0)
        budget.end(100.4)
        assert budget.begin(100.4) == pytest.approx(101.0)
        budget.end(100.9)
        assert budget.begin(101.0) == pytest.approx(101.2)

    def test_it_is_never_less_than_nothing(self) -> None:
        """A drain that took too long leaves no time, but no debt either."""
        budget = DrainBudget(1.0)
        budget.begin(100.0)
        budget.end(103.0)
        assert budget.begin(103.0) == 103.0
        budget.end(103.0)
        assert budget.begin(103.5) == pytest.approx(104.0)

    def test_calm_gives_it_back(self) -> None:
        """After a while without a drain the next may take all of it again."""
        budget = DrainBudget(1.0)
        budget.begin(100.0)
        budget.end(101.0)
        assert budget.begin(102.5) == 103.5

    def test_short_drains_never_use_it_up(self) -> None:
        """Steady remaps over a healthy disk are no reason to take memory back."""
        budget = DrainBudget(1.0)
        for start in range(100, 1000):
            assert budget.begin(start / 5) >= start / 5 + 0.9
            budget.end(start / 5 + 0.05)
