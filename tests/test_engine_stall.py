"""Transfers that the kernel holds, while the guest resets, remaps, leaves, and the server stops.

The disk is a pipe: the kernel keeps a read until somebody writes into it, and gives it no more than there is.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import STOP_SECONDS, until
from stalls import answers, changed, snapshot
from test_engine import engine_threads

from vmmblk.block import Block, BlockInfo, Buffers, Native, Substance
from vmmblk.client.driver import VirtioBlk, attach
from vmmblk.client.memory import GuestMemory
from vmmblk.engine import EngineOptions
from vmmblk.spec import DeviceStatus, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from conftest import Logs, Served

    from vmmblk.client.request import Pending

    Serve = Callable[..., Served]

MIB = 1 << 20
SECTOR = 512
TAKEN_BACK = "their memory is taken back"


class Pipe(Block):
    """A disk whose reads give what is written into ``tap``, in the order of the requests."""

    def __init__(self) -> None:
        self.info = BlockInfo(read_write=False, sector_size=SECTOR, size_sectors=2048)
        self.calls = 0
        self._end, self.tap = os.pipe()

    def native(self) -> Native:
        """Not seekable, so it is io_uring's from the start."""
        return Native(Substance.FILE, fileno=self._end, direct=True)

    async def read(self, sector_start: int, buffers: Buffers) -> None:  # noqa: ARG002
        """What the engine hands over, with zeroes."""
        self.calls += 1
        for buffer in buffers:
            buffer[:] = bytes(len(buffer))

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Nothing writes."""

    async def disconnect(self) -> None:
        """Close both ends."""
        os.close(self._end)
        os.close(self.tap)

    def pour(self, byte: bytes, sectors: int = 1) -> None:
        """Let reads of so many sectors end."""
        os.write(self.tap, byte * (SECTOR * sectors))


@pytest.fixture(params=[False, True], ids=["guest memory", "private memory"])
def pipe(request: pytest.FixtureRequest) -> Pipe:
    """A disk, whose data goes through private memory or not."""
    disk = Pipe()
    disk.bounce = request.param
    return disk


@contextlib.contextmanager
def reading(served: Served, count: int = 4, **options: Any) -> Iterator[tuple[VirtioBlk, list[Pending]]]:
    """A driver, and reads of a sector that the kernel has."""
    with GuestMemory(8 * MIB) as memory, attach(served.path, memory=memory, **options) as v:
        pendings = [v.submit(RequestType.IN, i, data_in=SECTOR) for i in range(count)]
        v.kick()
        until(lambda: busy(served) == count)
        yield v, pendings


def busy(served: Served) -> int:
    """What is in flight."""
    return served.server._core.busy


def works(v: VirtioBlk, pipe: Pipe) -> None:
    """A read takes what comes next."""
    pending = v.submit(RequestType.IN, 8, data_in=SECTOR)
    v.kick()
    pipe.pour(b"n")
    assert v.wait(pending).result() == b"n" * SECTOR


def test_a_read_in_many_parts(serve: Serve, pipe: Pipe) -> None:
    """What the kernel gives bit by bit arrives whole, and nothing is said before."""
    served = serve(pipe, engine="native")
    with attach(served.path) as v:
        pending = v.submit(RequestType.IN, 0, data_in=2 * SECTOR, framing=[16, 100, 700, 224])
        v.kick()
        data = bytes(range(256)) * 4
        for i in range(0, len(data), 61):
            assert not v.poll()
            os.write(pipe.tap, data[i : i + 61])
        assert v.wait(pending).result() == data
        works(v, pipe)
    assert not pipe.calls


@pytest.mark.parametrize("poll_us", [0, None], ids=["sleeps", "busy"])
def test_a_reset_takes_back_what_the_kernel_has(serve: Serve, logs: Logs, pipe: Pipe, poll_us: int | None) -> None:
    """The reset ends; what comes later changes nothing of the guest's; until it has come nobody is served."""
    logs.expect(TAKEN_BACK)
    served = serve(pipe, engine="native", io=EngineOptions(poll_us=poll_us))
    with reading(served) as (v, _):
        v.init()
        answers(v)
        assert served.server._core.orphans == 4
        pendings = [v.submit(RequestType.IN, i, data_in=SECTOR) for i in range(3)]
        v.kick()
        before = snapshot(v.memory)
        pipe.pour(b"o", 3)
        until(lambda: served.server._core.orphans == 1)
        assert not busy(served)
        assert not changed(v.memory, before)
        pipe.pour(b"o")
        pipe.pour(b"n", 3)
        v.wait_all(pendings)
        assert [each.result() for each in pendings] == 3 * [b"n" * SECTOR]
        works(v, pipe)
    assert not pipe.calls


def test_resets_again_and_again(serve: Serve, logs: Logs, pipe: Pipe) -> None:
    """The kernel's operations keep their places however often the device is reset meanwhile."""
    logs.expect(TAKEN_BACK)
    served = serve(pipe, engine="native", queue_size=8)
    with reading(served, 2) as (v, _):
        for _ in range(20):
            v.init()
            v.submit(RequestType.IN, 0, data_in=SECTOR)
            v.kick()
        assert served.server._core.orphans == 2
        v.init()
        pipe.pour(b"o", 2)
        until(lambda: not served.server._core.orphans)
        works(v, pipe)


def test_a_queue_reset(serve: Serve, logs: Logs, pipe: Pipe) -> None:
    """The same for one queue."""
    logs.expect(TAKEN_BACK)
    served = serve(pipe, engine="native", queues=2)
    with reading(served, queues=2) as (v, _):
        v.reset_queue(0)
        before = snapshot(v.memory)
        pipe.pour(b"o", 4)
        until(lambda: not served.server._core.orphans)
        assert not changed(v.memory, before)
        works(v, pipe)


def test_memory_is_taken_away(serve: Serve, logs: Logs, pipe: Pipe) -> None:
    """An unmap is answered in time, what ends later does no harm, and the driver is told after the next map."""
    logs.expect(TAKEN_BACK)
    served = serve(pipe, engine="native")
    with reading(served) as (v, pendings):
        v.memory.unmap_all(v.connection)
        before = snapshot(v.memory)
        pipe.pour(b"o", 4)
        until(lambda: not served.server._core.orphans)
        assert not changed(v.memory, before)
        v.memory.map_all(v.connection)
        v.wait_all(pendings)
        assert [each.status for each in pendings] == 4 * [Status.IOERR]
        works(v, pipe)


def test_a_drain_waits_for_the_kernel(serve: Serve, pipe: Pipe) -> None:
    """What ends in time has its data where the guest wanted it, and is told when the queue goes on."""
    served = serve(pipe, engine="native")
    with reading(served) as (v, pendings), GuestMemory(MIB) as more:
        pipe.pour(b"i", 4)
        v.connection.dma_map(1 << 40, MIB, more.fd, 0, 3)
        v.wait_all(pendings)
        assert [each.result() for each in pendings] == 4 * [b"i" * SECTOR]


def test_the_client_leaves(serve: Serve, logs: Logs, pipe: Pipe) -> None:
    """The next one is served once the kernel has given back what the last one wanted."""
    logs.allow(TAKEN_BACK)
    served = serve(pipe, engine="native")
    with reading(served):
        pass
    with attach(served.path) as v:
        pipe.pour(b"o", 4)
        until(lambda: not served.server._core.orphans)
        works(v, pipe)


def test_stopping_waits_without_turning(serve: Serve, pipe: Pipe) -> None:
    """A server that is told to stop sleeps until the kernel has ended; then it stops."""
    served = serve(pipe, engine="native")
    with reading(served):
        before = sum(engine_threads().values())
        began = time.monotonic()
        assert not served.server.stop(1.0)
        assert time.monotonic() - began >= 1.0
        assert sum(engine_threads().values()) - before < 20  # of the hundred ticks of that second
        pipe.pour(b"o", 4)
        assert served.server.stop(STOP_SECONDS)


def test_a_read_that_ends_early(serve: Serve, pipe: Pipe) -> None:
    """At the end of the file the disk is asked what to make of it."""
    served = serve(pipe, engine="native")
    with reading(served) as (v, pendings):
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123
            os.dup2(nothing.fileno(), pipe.tap)  # the last writer is gone
        v.wait_all(pendings)
        assert [each.result() for each in pendings] == 4 * [bytes(SECTOR)]
        assert DeviceStatus.NEEDS_RESET not in v.status
    assert pipe.calls == 4


def test_more_than_private_memory_can_hold(serve: Serve) -> None:
    """Those that find none of it free wait for it, in their order; a drain waits for them, too."""
    pipe = Pipe()
    pipe.bounce = True
    served = serve(pipe, engine="native", queues=2, io=EngineOptions(threads=1))
    with reading(served, count=80, queues=2) as (v, pendings), GuestMemory(MIB) as more:
        for i in range(80):
            os.write(pipe.tap, bytes([i]) * SECTOR)
        v.connection.dma_map(1 << 40, MIB, more.fd, 0, 3)
        v.wait_all(pendings)
        assert sorted(each.result()[0] for each in pendings) == list(range(80))
        assert all(each.result() == SECTOR * each.result()[:1] for each in pendings)
        works(v, pipe)
    assert not pipe.calls


def test_who_waits_for_private_memory_is_taken_back(serve: Serve, logs: Logs) -> None:
    """Requests that have not reached the kernel end as late as those that have, and change nothing of the guest's."""
    logs.expect(TAKEN_BACK)
    pipe = Pipe()
    pipe.bounce = True
    served = serve(pipe, engine="native")
    with reading(served, count=80) as (v, _):
        v.init()
        assert served.server._core.orphans == 80
        before = snapshot(v.memory)
        pipe.pour(b"o", 40)
        until(lambda: served.server._core.orphans == 40)
        pipe.pour(b"o", 40)
        until(lambda: not served.server._core.orphans)
        assert not changed(v.memory, before)
        works(v, pipe)
    assert not pipe.calls
