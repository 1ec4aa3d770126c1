"""A server that looks for more before it sleeps, and a disk that never waits."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

import pytest
from conftest import until
from disks import CachedDisk, Disk

from vmmblk.backends.memory import Memory
from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.engine import EngineOptions
from vmmblk.spec import Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import Served

    from vmmblk.block import Buffers
    from vmmblk.client.driver import VirtioBlk

    Serve = Callable[..., Served]

IN = RequestType.IN
FOR_EVER = EngineOptions(poll_us=None)
LONG = EngineOptions(poll_us=60_000_000, adaptive=False)
PATIENCE = 30.0


def read(v: VirtioBlk, queue: int = 0) -> int | None:
    """The status of a read that nobody is told of."""
    pending = v.submit(IN, 0, data_in=512, queue=queue)
    v.queues[queue].publish()
    return v.wait(pending).status


def test_who_looks_always_needs_no_doorbell(serve: Serve) -> None:
    """Not even the first, on any queue, after a reset too."""
    served = serve(queues=3, features={"mq": True}, io=FOR_EVER)
    with attach(served.path, queues=3) as v:
        assert [read(v, queue) for queue in (2, 0, 1)] == [Status.OK] * 3
        v.reset()
        v.init()
        assert read(v) == Status.OK


def test_who_looks_on_needs_no_second_doorbell(serve: Serve) -> None:
    """While it looks the driver's requests are seen, as no doorbell tells of them."""
    with attach(serve(io=LONG).path) as v:
        pending = v.submit(IN, 0, data_in=512)
        v.kick()
        v.wait(pending)
        assert [read(v) for _ in range(3)] == [Status.OK] * 3


def test_who_is_asked_often_begins_to_look(serve: Serve) -> None:
    """Adaptive patience grows from nothing, until no doorbell is wanted."""
    with attach(serve(io=EngineOptions(poll_us=10_000_000)).path) as v:

        def rings() -> bool:
            pending = v.submit(IN, 0, data_in=512)
            rung = v.kick()
            v.wait(pending)
            return rung

        until(lambda: not rings(), "it never looks")


def test_who_looks_in_vain_asks_for_doorbells(serve: Serve) -> None:
    """Nothing is lost between looking and sleeping."""
    with attach(serve(queues=2, io=EngineOptions(poll_us=20, adaptive=False)).path, queues=2) as v:
        for i in range(300):
            pending = v.submit(IN, 0, data_in=512, queue=i % 2)
            v.kick(i % 2)
            assert v.wait(pending).status == Status.OK


@pytest.mark.parametrize("io", [FOR_EVER, LONG, EngineOptions()], ids=["ever", "long", "adaptive"])
def test_the_event_loop_has_its_turn(serve: Serve, io: EngineOptions) -> None:
    """For disks that wait, and for what the transport has to say, as a cache that is switched off."""

    class Slow(CachedDisk):
        async def read(self, sector_start: int, buffers: Buffers) -> None:
            await asyncio.sleep(0.002)
            await super().read(sector_start, buffers)

    served = serve(Slow(), io=io)
    with attach(served.path) as v:
        pendings = [v.submit(IN, each, data_in=512) for each in range(10)]
        v.kick()
        v.wait_all(pendings)
        v.writeback = True
        v.write(0, bytes(512))
        v.writeback = False
        served.disk.wait_for("flush")


class Endless(CachedDisk):
    """Each read of sector 0 has the driver make another before it ends, so that the ring is never empty for long."""

    def __init__(self, driver: VirtioBlk) -> None:
        super().__init__()
        self.driver = driver
        self.more = True
        self.timer = threading.Event()
        self.other = threading.Event()
        self.reads = 0

    async def read(self, sector_start: int, _buffers: Buffers) -> None:
        """Never waits."""
        if sector_start:
            self.other.set()
            return
        self.reads += 1
        if self.reads == 1:
            asyncio.get_running_loop().call_later(0.01, self.timer.set)
        if self.more:
            self.driver.poll()  # gives back the descriptors of those that have ended
            self.driver.submit(IN, 0, data_in=512)
            self.driver.queues[0].publish()


class Late(CachedDisk):
    """A disk that is another one from a certain time on."""

    def __init__(self) -> None:
        super().__init__()
        self.then: Endless

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """As the other."""
        await self.then.read(sector_start, buffers)


def test_a_driver_that_never_stops_holds_nobody_up(serve: Serve) -> None:
    """Timers, other queues, the transport's wishes and the end all have their turn."""
    served = serve(Late(), queues=2, features={"mq": True}, io=LONG)
    with attach(served.path, queues=2) as v:
        disk = served.disk.then = Endless(v)
        v.submit(IN, 8, data_in=512, queue=1)
        v.submit(IN, 0, data_in=512)
        v.kick()
        try:
            assert disk.timer.wait(PATIENCE)
            v.kick(1, force=True)
            assert disk.other.wait(PATIENCE)
            served.server._worker.set_write_cache(on=True)
            served.server._worker.set_write_cache(on=False)
            served.disk.wait_for("flush")
            before = disk.reads
            until(lambda: disk.reads > before + 10)
            assert served.server.stop(PATIENCE)
        finally:
            disk.more = False


@pytest.mark.parametrize("poll_us", [None, 100, 0], ids=["adaptive", "100", "never"])
def test_who_has_nothing_to_do_uses_no_processor(serve: Serve, poll_us: int | None) -> None:
    """After the last request the worker soon sleeps for good."""
    io = EngineOptions() if poll_us is None else EngineOptions(poll_us=poll_us, adaptive=False)
    served = serve(Disk(), io=io)
    with attach(served.path) as v:
        for _ in range(20):
            v.read(0, 512)
        worker = served.server._worker
        until(lambda: not worker._looking)
        used = []
        for _ in range(2):
            used.append(asyncio.run_coroutine_threadsafe(used_time(), worker._loop).result(PATIENCE))
            time.sleep(0.1)  # the behaviour: nothing happens
    assert used[1] - used[0] < 0.01


async def used_time() -> float:
    """Of the event loop's thread, in seconds."""
    return time.thread_time()


def test_what_was_handed_over_is_answered_before_the_end(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much an engine has left to the worker when the server stops."""
    served = serve(Memory(2048), engine="native", queue_size=1024, features={"in_order": True})
    with attach(served.path, features=SUPPORTED | Feature.IN_ORDER.mask, indirect=True) as v:
        loop, stopping = served.server._worker._loop, threading.Event()
        call = loop.call_soon_threadsafe
        call(stopping.wait)

        def tell_and_go_on(*arguments: Any) -> None:
            call(*arguments)
            stopping.set()

        pendings = [v.submit(IN, 0, data_in=512) for _ in range(700)]
        v.kick()
        until(lambda: served.server._core.busy == len(pendings))
        monkeypatch.setattr(loop, "call_soon_threadsafe", tell_and_go_on)
        assert served.server.stop(PATIENCE)
        while v.poll():
            pass
        assert [each.status for each in pendings] == [Status.OK] * len(pendings)
