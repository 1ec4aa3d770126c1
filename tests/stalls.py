"""Disks that block in each of the ways a disk can, until the test lets them go on; and what watches guest memory."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from typing import TYPE_CHECKING, NamedTuple

from vmmblk.block import Block, BlockInfo, Buffers, total_bytes
from vmmblk.client.memory import PAGE, GuestMemory
from vmmblk.client.queue import Descriptor
from vmmblk.spec import REQUEST_HEADER, DescFlag, RequestType

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.request import Pending

SECTORS = 2048
PATIENCE = 30.0
ANSWER = 2.5
"""Seconds for a register read; a few milliseconds unless the machine is busy.  A VMM waits for five."""


class Stalling(Block):
    """A disk in memory whose calls stall between ``hold`` and ``release``: after they began, before they touch buffers.

    ``journal`` tells what began and ended, in order: (event, call, sector).  This one sleeps: it awaits.
    """

    def __init__(self) -> None:
        self.info = BlockInfo(read_write=True, sector_size=512, size_sectors=SECTORS)
        self.data = bytearray(b"\x5e" * self.info.size_bytes)
        self.journal: list[tuple[str, str, int]] = []
        self._changed = threading.Condition()
        self._open = threading.Event()
        self._open.set()
        self._sleepers: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    def hold(self) -> None:
        """Stall every call from now on."""
        self._open.clear()

    def release(self) -> None:
        """Let them all go on."""
        self._open.set()
        with self._changed:
            sleepers, self._sleepers = self._sleepers, []
        for loop, alarm in sleepers:
            loop.call_soon_threadsafe(alarm.set)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold; however it ends, release."""
        self.hold()
        try:
            yield
        finally:
            self.release()

    def count(self, event: str) -> int:
        """How many calls "began" or "ended"."""
        return sum(entry[0] == event for entry in list(self.journal))

    def wait(self, event: str, count: int = 1) -> None:
        """Wait until so many calls "began" or "ended"."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.count(event) >= count, PATIENCE), f"{count} {event}: not in time"

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """Stall, then fill the buffers."""
        self._note("began", "read", sector_start)
        await self._stall()
        self._fill(sector_start, buffers)

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Stall, then look at the buffers."""
        self._note("began", "write", sector_start)
        await self._stall()
        self._store(sector_start, buffers)

    async def _stall(self) -> None:
        alarm = asyncio.Event()
        with self._changed:
            if self._open.is_set():
                return
            self._sleepers.append((asyncio.get_running_loop(), alarm))
        await alarm.wait()

    def _fill(self, sector: int, buffers: Buffers) -> None:
        at = sector * 512
        for buffer in buffers:
            buffer[:] = self.data[at : at + len(buffer)]
            at += len(buffer)
        self._note("ended", "read", sector)

    def _store(self, sector: int, buffers: Buffers) -> None:
        self.data[sector * 512 : sector * 512 + total_bytes(buffers)] = b"".join(buffers)
        self._note("ended", "write", sector)

    def _note(self, event: str, call: str, sector: int) -> None:
        with self._changed:
            self.journal.append((event, call, sector))
            self._changed.notify_all()


class Blocking(Stalling):
    """Blocks the event loop that it runs in."""

    async def _stall(self) -> None:
        self._open.wait()


class Computing(Stalling):
    """Computes, in the event loop that it runs in and with the interpreter's lock."""

    async def _stall(self) -> None:
        value = 1
        while not self._open.is_set():
            for _ in range(1000):
                value = value * 1103515245 + 12345 & 0x7FFFFFFF


class Plain(Stalling):
    """Has plain methods, which wait in a thread pool."""

    def read(self, sector_start: int, buffers: Buffers) -> None:  # type: ignore[override]
        """Stall, then fill the buffers."""
        self._note("began", "read", sector_start)
        self._open.wait()
        self._fill(sector_start, buffers)

    def write(self, sector_start: int, buffers: Buffers) -> None:  # type: ignore[override]
        """Stall, then look at the buffers."""
        self._note("began", "write", sector_start)
        self._open.wait()
        self._store(sector_start, buffers)


KINDS: dict[str, type[Stalling]] = {"sleeping": Stalling, "blocking": Blocking, "computing": Computing, "plain": Plain}


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is inside takes less time than that."""
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


def answers(driver: VirtioBlk) -> None:
    """The device answers a register read at once."""
    with within(ANSWER):
        _ = driver.device.status


# Requests at addresses of the test's choice, which no allocator hands out again.


class Placed(NamedTuple):
    """A request put into memory by hand; ``status`` is where its status byte will be."""

    pending: Pending
    status: int


def submit_at(
    driver: VirtioBlk, request_type: RequestType, sector: int, pieces: Sequence[tuple[int, int]], page: int
) -> Placed:
    """Offer a request whose data lies in ``pieces`` (IOVA, length), its header and status in ``page``.

    The caller kicks.
    """
    poke(driver.memory, page, REQUEST_HEADER.pack(request_type, 0, sector))
    status = page + REQUEST_HEADER.size
    poke(driver.memory, status, b"\xff")
    flags = DescFlag.NEXT | (DescFlag.WRITE if request_type is RequestType.IN else 0)
    pending = driver.submit_raw(
        [
            Descriptor(page, REQUEST_HEADER.size, DescFlag.NEXT),
            *(Descriptor(iova, length, flags) for iova, length in pieces),
            Descriptor(status, 1, DescFlag.WRITE),
        ]
    )
    return Placed(pending, status)


def poke(memory: GuestMemory, iova: int, data: bytes) -> None:
    """Store ``data``, over the border of ranges that touch."""
    for piece in memory.layout:
        start, end = max(iova, piece.iova), min(iova + len(data), piece.iova + piece.size)
        if start < end:
            memory.write(start, data[start - iova : end - iova])


def scatter(memory: GuestMemory, pieces: Sequence[tuple[int, int]], data: bytes) -> None:
    """Store ``data`` in ``pieces``."""
    at = 0
    for iova, length in pieces:
        poke(memory, iova, data[at : at + length])
        at += length


def snapshot(memory: GuestMemory) -> dict[int, bytes]:
    """All of guest memory, by page."""
    return {
        iova: memory.read(iova, PAGE)
        for piece in memory.layout
        for iova in range(piece.iova, piece.iova + piece.size, PAGE)
    }


def changed(memory: GuestMemory, before: dict[int, bytes]) -> set[int]:
    """The pages that are no longer what they were."""
    return {iova for iova, page in snapshot(memory).items() if page != before[iova]}


def pages_of(driver: VirtioBlk, requests: Iterable[Pending]) -> set[int]:
    """The pages that the device may write on behalf of ``requests``: the used ring, and what the requests are in."""
    queue = driver.queues[0]
    blocks = [(iova, driver.memory._taken[iova]) for each in requests for iova in each.allocations]
    ring = [(iova, PAGE) for iova in (queue.desc, queue.avail, queue.used)]
    return {page for iova, size in ring + blocks for page in range(iova, iova + size, PAGE)}
