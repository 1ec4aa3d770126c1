"""A server that holds interrupts back for more completions, and sleeps: with either engine."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import STOP_SECONDS, until
from test_coalescing import FOR_EVER, NAMES
from test_engine import SECTORS, SIZE, traffic
from test_engine_stall import SECTOR, Pipe, busy, reading

from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.block import Block, BlockInfo, Buffers
from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.engine import EngineOptions
from vmmblk.spec import Feature, RequestType

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from conftest import Served

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.request import Pending

    Serve = Callable[..., Served]


class Tap(Block):
    """A disk in Python whose reads end when they are let, in the order of the requests."""

    def __init__(self) -> None:
        self.info = BlockInfo(read_write=False, sector_size=SECTOR, size_sectors=2048)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._gate = asyncio.Semaphore(0)

    async def read(self, sector_start: int, buffers: Buffers) -> None:  # noqa: ARG002
        """Waits."""
        self._loop = asyncio.get_running_loop()
        await self._gate.acquire()

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Nothing writes."""

    def pour(self, _byte: bytes, sectors: int = 1) -> None:
        """Let so many reads end."""
        until(lambda: self._loop)
        assert self._loop is not None
        for _ in range(sectors):
            self._loop.call_soon_threadsafe(self._gate.release)


EVENT_IDX, PACKED = Feature.EVENT_IDX.mask, Feature.RING_PACKED.mask
FEATURES = [SUPPORTED & ~EVENT_IDX, SUPPORTED, (SUPPORTED | PACKED) & ~EVENT_IDX, SUPPORTED | PACKED]
SHORT = 2000

engines = pytest.mark.parametrize(("engine", "make"), [("native", Pipe), ("python", Tap)], ids=["native", "python"])
rings = pytest.mark.parametrize("features", FEATURES, ids=NAMES)
polls = pytest.mark.parametrize("poll_us", [0, 100, None], ids=["sleeps", "polls", "busy"])


def ended(v: VirtioBlk, pendings: list[Pending], count: int) -> None:
    """So many of them have ended, and the driver asks for an interrupt at the next."""
    until(lambda: v.poll() or sum(each.done for each in pendings) == count)
    assert not v.queues[0].arm()


@engines
@rings
@polls
def test_nobody_sleeps_over_an_interrupt(
    serve: Serve, engine: str, make: Callable[[], Any], features: int, poll_us: int | None
) -> None:
    """It comes in its time and not before, though nothing else does."""
    served = serve(make(), engine=engine, io=EngineOptions(poll_us=poll_us, adaptive=False), coalesce=(100, SHORT))
    with reading(served, features=features) as (v, pendings):
        for count in (1, 2, 3):
            began = time.monotonic()
            served.disk.pour(b"x")
            until(v.take_interrupts, "it never comes")
            assert time.monotonic() - began >= SHORT / 1e6
            ended(v, pendings, count)
        served.disk.pour(b"x")
        v.wait_all(pendings)


@engines
@rings
@polls
def test_a_server_tells_of_so_many(
    serve: Serve, engine: str, make: Callable[[], Any], features: int, poll_us: int | None
) -> None:
    """Two completions are an interrupt, and so is the last in flight."""
    served = serve(make(), engine=engine, io=EngineOptions(poll_us=poll_us), coalesce=(2, FOR_EVER))
    with reading(served, features=features) as (v, pendings):
        for count, interrupts in ((1, 0), (2, 1), (3, 0), (4, 1)):
            served.disk.pour(b"x")
            ended(v, pendings, count)
            served.settle()
            until(lambda due=interrupts: v.take_interrupts() == due)


@engines
def test_the_end_waits_for_no_interrupt(serve: Serve, engine: str, make: Callable[[], Any]) -> None:
    """What was held back is told when the server is asked to stop, before it has."""
    served = serve(make(), engine=engine, coalesce=(100, FOR_EVER))
    stopped: list[bool] = []
    with reading(served) as (v, _):
        served.disk.pour(b"x")
        until(v.poll)
        stopping = threading.Thread(target=lambda: stopped.append(served.server.stop(STOP_SECONDS)))
        stopping.start()
        until(v.take_interrupts, "it never comes")
        assert busy(served) == 3
        served.disk.pour(b"x", 3)
        stopping.join()
    assert stopped == [True]


def test_what_was_handed_over_is_told_in_time(serve: Serve) -> None:
    """Though it is not the engine that completes it, and the engine sleeps."""
    served = serve(Pipe(), engine="native", io=EngineOptions(poll_us=0), coalesce=(100, SHORT))
    with reading(served) as (v, pendings):
        for _ in range(5):
            asked = v.submit(RequestType.GET_ID, data_in=20)
            v.kick()
            until(v.take_interrupts, "it never comes")
            ended(v, [asked], 1)
        served.disk.pour(b"x", 4)
        v.wait_all(pendings)


@engines
def test_a_timer_rings_once(serve: Serve, engine: str, make: Callable[[], Any]) -> None:
    """Whoever has raised an interrupt sleeps, for as long as nothing comes."""
    served = serve(make(), engine=engine, io=EngineOptions(poll_us=0), coalesce=(100, SHORT))
    with reading(served) as (v, pendings):
        served.disk.pour(b"x")
        until(v.take_interrupts, "it never comes")
        before = time.process_time()
        time.sleep(0.2)  # the behaviour: nothing happens
        assert time.process_time() - before < 0.1
        served.disk.pour(b"x", 3)
        v.wait_all(pendings)


@pytest.mark.parametrize("engine", ["native", "python"])
@rings
def test_one_request_after_the_other_is_not_slowed(serve: Serve, engine: str, features: int) -> None:
    """Each is told at once, of plain ones and of others."""
    with attach(serve(Memory(SECTORS), engine=engine, coalesce=(100, FOR_EVER)).path, features=features) as v:
        for _ in range(20):
            v.write(0, bytes(512))
            v.get_id()


@pytest.mark.parametrize("engine", ["native", "python"])
@pytest.mark.parametrize("kind", ["memory", "file"])
@rings
def test_traffic(serve: Serve, tmp_path: Path, kind: str, engine: str, features: int) -> None:
    """Drivers that sleep until they are told get all that they asked for."""
    path = tmp_path / "disk"
    path.write_bytes(bytes(SIZE))
    disk = Memory(SECTORS) if kind == "memory" else File(path)
    served = serve(disk, engine=engine, queues=2, coalesce=(4, 50), io=EngineOptions(threads=1))
    with attach(served.path, queues=2, features=features) as v:
        traffic(v, queues=2)
