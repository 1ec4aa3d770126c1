"""I/O that ends after guest memory was taken back: it changes nothing in the guest, and stores nothing but its own."""

from __future__ import annotations

import asyncio
import resource
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest
from conftest import until
from stalls import KINDS, Placed, Stalling, changed, pages_of, scatter, snapshot, submit_at

from vmmblk.client.driver import SUPPORTED, VirtioBlk, attach
from vmmblk.client.memory import PAGE, GuestMemory, Range
from vmmblk.spec import Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from conftest import Logs, Served

    from vmmblk.block import Buffers

    Serve = Callable[..., Served]
    Pieces = Sequence[tuple[int, int]]
    Act = Callable[[VirtioBlk], None]

MIB = 1 << 20
BORDER = 2 * MIB
LAYOUT = (Range(0, 2 * MIB), Range(BORDER, 2 * MIB), Range(16 * MIB, 2 * MIB))
HERE, THERE = MIB, 17 * MIB  # far from what the allocator hands out
CONTROL = HERE + (MIB >> 1)  # where headers and status bytes lie

PIECES: dict[str, Pieces] = {
    "one piece": [(HERE, 4096)],
    "several pieces": [(HERE, 512), (HERE + 0x3000, 1024), (HERE + 0x1000, 2048)],
    "several regions": [(BORDER - 1024, 2048), (THERE, 1024), (HERE, 512)],
    "in one region twice": [(HERE, 1024), (THERE, 512), (HERE + 2048, 1024)],
    "bounced": [(HERE, 100), (HERE + 0x2000, 412)],
    "bounced over regions": [(BORDER - 100, 412), (THERE + 1, 100)],
}
every_shape = pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
every_kind = pytest.mark.parametrize("kind", KINDS)


def device_reset(driver: VirtioBlk) -> None:
    """DEVICE_RESET."""
    driver.connection.device_reset()


def status_reset(driver: VirtioBlk) -> None:
    """The driver's own reset."""
    driver.device.reset()


def queue_reset(driver: VirtioBlk) -> None:
    """The driver resets the queue."""
    driver.device.reset_queue(0)


def remap(driver: VirtioBlk) -> None:
    """All memory goes and comes back."""
    driver.memory.unmap_all(driver.connection)
    driver.memory.map_all(driver.connection)


ACTS = {each.__name__: each for each in (device_reset, status_reset, queue_reset, remap)}
every_act = pytest.mark.parametrize("act", ACTS.values(), ids=ACTS)


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    """Memory of three regions, two of which touch."""
    with GuestMemory(6 * MIB, LAYOUT) as memory:
        yield memory


@pytest.fixture(autouse=True)
def _orphans(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests in flight get 0.05 s only: what counts here is what happens then."""
    logs.allow("their memory is taken back")
    monkeypatch.setattr("vmmblk.server.DRAIN_LIMIT", 0.05)


def some_bytes(pieces: Pieces, start: int = 0) -> bytes:
    """As many bytes as the pieces have, no two sectors of them alike."""
    return b"".join((start + i).to_bytes(4, "little") for i in range(sum(length for _, length in pieces) // 4))


def whole(pieces: Pieces) -> int:
    """Their length, bytes."""
    return sum(length for _, length in pieces)


def barrier(driver: VirtioBlk, disk: Stalling) -> set[int]:
    """Let the disk go on, and serve one new request, which waits for every orphan; the pages that may have changed."""
    driver.init()
    pending = driver.submit(RequestType.IN, 1000, data_in=512)
    mine = pages_of(driver, [pending])
    driver.kick()
    disk.release()
    driver.wait(pending).result()
    return mine


@every_act
@every_shape
def test_a_late_write_stores_its_own_data(act: Act, pieces: Pieces, serve: Serve, memory: GuestMemory) -> None:
    """Whatever the guest puts into the buffer after its reset, the disk gets what was there before (RST-004)."""
    disk = KINDS["plain"]()
    data = some_bytes(pieces)
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        scatter(memory, pieces, data)
        submit_at(driver, RequestType.OUT, 40, pieces, CONTROL)
        driver.kick()
        disk.wait("began")
        act(driver)
        scatter(memory, pieces, b"\xee" * len(data))
        barrier(driver, disk)
    assert bytes(disk.data[40 * 512 : 40 * 512 + len(data)]) == data
    assert disk.journal[:2] == [("began", "write", 40), ("ended", "write", 40)]


@every_act
@every_shape
def test_a_late_read_lands_nowhere(act: Act, pieces: Pieces, serve: Serve, memory: GuestMemory) -> None:
    """After a reset no byte of guest memory changes on behalf of a request from before (RST-004, HOSTILE-107)."""
    disk = KINDS["plain"]()
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        submit_at(driver, RequestType.IN, 40, pieces, CONTROL)
        driver.kick()
        disk.wait("began")
        act(driver)
        scatter(memory, pieces, b"\xee" * whole(pieces))
        before = snapshot(memory)
        mine = barrier(driver, disk)
        assert changed(memory, before) <= mine
    assert disk.journal[:2] == [("began", "read", 40), ("ended", "read", 40)]


@every_kind
@pytest.mark.parametrize("request_type", [RequestType.IN, RequestType.OUT])
def test_every_kind_of_stall_ends_harmlessly(
    kind: str, request_type: RequestType, serve: Serve, memory: GuestMemory
) -> None:
    """Late reads and writes of each kind of disk, some begun and some only queued, stay apart from the guest."""
    disk = KINDS[kind]()
    requests = [[(HERE + i * PAGE, 1024)] for i in range(24)]
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        for i, pieces in enumerate(requests):
            scatter(memory, pieces, some_bytes(pieces, 1000 * i))
            submit_at(driver, request_type, 2 * i, pieces, CONTROL + i * PAGE)
        driver.kick()
        disk.wait("began")
        driver.connection.device_reset()
        for pieces in requests:
            scatter(memory, pieces, b"\xee" * 1024)
        before = snapshot(memory)
        mine = barrier(driver, disk)
        assert changed(memory, before) <= mine
    ended = {sector // 2 for event, call, sector in disk.journal if (event, call) == ("ended", "write")}
    assert len(ended) == (24 if request_type is RequestType.OUT else 0)
    for i in ended:
        assert bytes(disk.data[1024 * i : 1024 * (i + 1)]) == some_bytes(requests[i], 1000 * i)


def test_late_writes_may_share_their_buffer(serve: Serve, memory: GuestMemory) -> None:
    """Writes from the same and from overlapping pages each bring what was there."""
    disk = KINDS["plain"]()
    requests = [[(HERE, 2048)], [(HERE, 2048)], [(HERE + 1024, 2048)], [(HERE + 512, 512), (HERE, 512)]]
    memory.write(HERE, some_bytes([(HERE, 4096)]))
    expected = [b"".join(memory.read(*piece) for piece in pieces) for pieces in requests]
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        for i, pieces in enumerate(requests):
            submit_at(driver, RequestType.OUT, 8 * i, pieces, CONTROL + i * PAGE)
        driver.kick()
        disk.wait("began", len(requests))
        driver.connection.device_reset()
        memory.write(HERE, b"\xee" * 4096)
        barrier(driver, disk)
    assert [bytes(disk.data[i * 4096 : i * 4096 + len(data)]) for i, data in enumerate(expected)] == expected


def test_a_late_read_does_not_show_in_a_late_write(serve: Serve, memory: GuestMemory) -> None:
    """What a guest asked to be read into a page that it also writes from is the guest's own doing, and no crash."""
    disk = KINDS["plain"]()
    memory.write(HERE, some_bytes([(HERE, 4096)]))
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        submit_at(driver, RequestType.OUT, 0, [(HERE, 1024)], CONTROL)
        submit_at(driver, RequestType.IN, 8, [(HERE + 1024, 1024)], CONTROL + PAGE)
        driver.kick()
        disk.wait("began", 2)
        driver.connection.device_reset()
        memory.write(HERE, b"\xee" * 4096)
        before = snapshot(memory)
        assert changed(memory, before) <= barrier(driver, disk)
    assert bytes(disk.data[:1024]) == some_bytes([(HERE, 1024)])


@every_shape
def test_an_orphan_of_a_live_queue_touches_only_its_status(pieces: Pieces, serve: Serve, memory: GuestMemory) -> None:
    """A read whose memory was remapped ends with IOERR and a used length of 0, its buffer as the guest left it."""
    disk = KINDS["plain"]()
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        placed = submit_at(driver, RequestType.IN, 40, pieces, CONTROL)
        driver.kick()
        disk.wait("began")
        remap(driver)
        scatter(memory, pieces, b"\xee" * whole(pieces))
        before = snapshot(memory)
        disk.release()
        driver.wait(placed.pending)
        assert memory.read(placed.status, 1)[0] == Status.IOERR
        assert changed(memory, before) <= {CONTROL, *pages_of(driver, [])}
        assert driver.queues[0].used_idx == 1


def test_a_region_that_stays_away_is_not_touched(serve: Serve, memory: GuestMemory) -> None:
    """When only the buffer's region was unmapped, for good, a late read does not land in what was behind it."""
    disk = KINDS["plain"]()
    away = LAYOUT[2]
    with attach(serve(disk).path, memory=memory) as driver, disk.held():
        placed = submit_at(driver, RequestType.IN, 40, [(THERE, 4096)], CONTROL)
        driver.kick()
        disk.wait("began")
        memory.unmap(driver.connection, *away)
        before = snapshot(memory)
        disk.release()
        driver.wait(placed.pending)
        assert memory.read(placed.status, 1)[0] == Status.IOERR
        assert changed(memory, before) <= {CONTROL, *pages_of(driver, [])}


@pytest.mark.parametrize("away", [LAYOUT, LAYOUT[2:]], ids=["all", "the status"])
def test_an_orphan_that_ends_while_memory_is_away_is_told_later(
    away: Sequence[Range], serve: Serve, memory: GuestMemory
) -> None:
    """Firmware unmaps and maps again: the driver learns of what ended in between, once, and before anything new."""
    disk = KINDS["plain"]()
    served = serve(disk)
    with attach(served.path, memory=memory) as driver, disk.held():
        placed = submit_at(driver, RequestType.IN, 40, [(HERE, 4096)], THERE)
        driver.kick()
        disk.wait("began")
        for piece in away:
            memory.unmap(driver.connection, *piece)
        disk.release()
        disk.wait("ended")
        served.settle()
        assert driver.queues[0].used_idx == 0
        for piece in away:
            memory.map(driver.connection, *piece)
        driver.wait(placed.pending)
        assert memory.read(placed.status, 1)[0] == Status.IOERR
        assert placed.pending.written == 0
        assert driver.read(40, 512) == disk.data[40 * 512 : 41 * 512]
        assert driver.queues[0].used_idx == 2
        assert driver.stray == []


@pytest.mark.parametrize("packed", [False, True])
def test_orphans_are_told_in_order(packed: bool, serve: Serve, memory: GuestMemory) -> None:
    """RING-INORDER-001: one whose status byte is away holds back the next, whose byte is there; then both are told."""
    disk = KINDS["plain"]()
    served = serve(disk, features={"in_order": True, "packed": packed})
    features = SUPPORTED | Feature.IN_ORDER.mask | (Feature.RING_PACKED.mask if packed else 0)
    with attach(served.path, memory=memory, features=features) as driver, disk.held():
        placed = [submit_at(driver, RequestType.IN, 40, [(HERE, 4096)], page) for page in (THERE, CONTROL)]
        driver.kick()
        disk.wait("began", 2)
        memory.unmap(driver.connection, *LAYOUT[2])
        disk.release()
        disk.wait("ended", 2)
        served.settle()
        assert driver.queues[0].get_used() == []
        memory.map(driver.connection, *LAYOUT[2])
        told: list[int] = []
        until(lambda: told.extend(name for name, _ in driver.queues[0].get_used()) or len(told) == 2)
        assert told == [each.pending.head for each in placed]


def test_an_orphan_that_was_not_told_is_forgotten_at_a_reset(serve: Serve, memory: GuestMemory) -> None:
    """A queue that is reset while its memory is away starts without what ended meanwhile."""
    disk = KINDS["plain"]()
    served = serve(disk)
    with attach(served.path, memory=memory) as driver:
        for _ in range(260):  # more than the ring has places
            with disk.held():
                submit_at(driver, RequestType.IN, 40, [(HERE, 4096)], THERE)
                driver.kick()
                disk.wait("began")
                memory.unmap_all(driver.connection)
            disk.wait("ended")
            served.settle()
            memory.map(driver.connection, *LAYOUT[0])
            memory.map(driver.connection, *LAYOUT[1])
            driver.init()
            memory.map(driver.connection, *LAYOUT[2])
            assert driver.read(40, 512) == disk.data[40 * 512 : 41 * 512]
            assert driver.queues[0].used_idx == 1
            disk.journal.clear()


class Hoarder(Stalling):
    """Keeps the buffers of every call for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.hoard: list[memoryview] = []

    def _fill(self, sector: int, buffers: Buffers) -> None:
        self.hoard += buffers
        super()._fill(sector, buffers)

    def scribble(self) -> None:
        """Read and write everything that was kept."""
        for view in self.hoard:
            view[:] = bytes(~byte & 0xFF for byte in view)


@pytest.mark.parametrize("orphaned", [False, True], ids=["ended", "orphaned"])
def test_a_view_that_is_kept_for_ever_harms_nobody(orphaned: bool, serve: Serve, memory: GuestMemory) -> None:
    """A disk that touches its buffers once the memory was unmapped, the client gone or the server stopped."""
    disk = Hoarder()
    served = serve(disk)
    with attach(served.path, memory=memory) as driver:
        placed = _hoard(driver, disk, orphaned=orphaned)
        memory.unmap_all(driver.connection)
        before = snapshot(memory)
        disk.scribble()
        assert changed(memory, before) == set()
        memory.map_all(driver.connection)
        disk.scribble()
        assert changed(memory, before) == set()
        assert driver.read(40, 512) == disk.data[40 * 512 : 41 * 512]
        assert memory.read(placed.status, 1)[0] == (Status.IOERR if orphaned else Status.OK)
    with attach(served.path, memory=memory) as driver:
        driver.read(40, 512)
        before = snapshot(memory)
        disk.hoard.pop()  # of this very request, whose memory is still the guest's
        disk.scribble()
        assert changed(memory, before) == set()
    assert served.server.stop(5)
    before = snapshot(memory)
    disk.scribble()
    assert changed(memory, before) == set()


def _hoard(driver: VirtioBlk, disk: Hoarder, *, orphaned: bool) -> Placed:
    """Have the disk keep the buffers of a request that has ended."""
    with disk.held():
        placed = submit_at(driver, RequestType.IN, 40, [(HERE, 512), (THERE, 1024)], CONTROL)
        driver.kick()
        disk.wait("began")
        if orphaned:
            remap(driver)
    driver.wait(placed.pending)
    return placed


def test_a_guest_cannot_fill_the_log_with_orphans(serve: Serve, logs: Logs) -> None:
    """A guest that resets in a loop, each time with a request in flight, is told of a few times only."""
    disk = Stalling()
    served = serve(disk)
    with attach(served.path) as driver:
        for count in range(1, 21):
            with disk.held():
                driver.submit(RequestType.IN, 0, data_in=512)
                driver.kick()
                disk.wait("began", count)
                driver.init()
            disk.wait("ended", count)
            served.settle()
    assert 1 <= len(logs.matching("taken back")) <= 10


def test_orphans_leave_nothing_behind(serve: Serve) -> None:
    """However often a guest makes orphans, the address space that they had is given back."""
    disk = KINDS["plain"]()
    size = 256 * MIB
    with GuestMemory(size) as memory, attach(serve(disk).path, memory=memory) as driver:
        used = []
        for round_ in range(5):
            with disk.held():
                driver.submit(RequestType.IN, 0, data_in=512)
                driver.kick()
                disk.wait("began", 2 * round_ + 1)
                driver.device.reset()
                driver.forget()
            driver.init()
            driver.read(0, 512)
            used.append(_address_space())
    assert used[-1] - used[1] < 2 * size


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


class Slow(Stalling):
    """Takes a moment for each request, longer for some."""

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Wait, then look at the buffers."""
        await asyncio.sleep(0.0005 * (sector_start % 4))
        self._store(sector_start, buffers)


class SlowPlain(Slow):
    """The same in threads."""

    def write(self, sector_start: int, buffers: Buffers) -> None:  # type: ignore[override]
        """Wait, then look at the buffers."""
        time.sleep(0.0005 * (sector_start % 4))
        self._store(sector_start, buffers)


@pytest.mark.parametrize("limit", [0.0, 0.001, 1.0])
@pytest.mark.parametrize("kind", [Slow, SlowPlain])
def test_nothing_is_lost_in_a_storm(
    kind: type[Slow], limit: float, serve: Serve, memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Remaps and resets at any moment: each request of a live queue ends, and each write that lands is whole."""
    monkeypatch.setattr("vmmblk.server.DRAIN_LIMIT", limit)
    random = Random(1)  # noqa: S311 - the same storm each time
    disk = kind()
    written: dict[int, set[bytes]] = {sector: {b"\x5e" * 512} for sector in range(16)}
    with attach(serve(disk).path, memory=memory) as driver:
        for round_ in range(40):
            data = {sector: bytes([round_, sector]) * 256 for sector in written}
            pending = [driver.submit(RequestType.OUT, sector, data[sector]) for sector in written]
            driver.kick()
            if random.random() < 0.5:
                driver.wait(pending[0])
            act = random.choice([remap, remap, queue_reset, status_reset, device_reset])
            act(driver)
            if act is remap:
                driver.wait_all(pending)
                for sector, each in enumerate(pending):
                    assert each.status == Status.IOERR or disk.data[sector * 512 :][:512] == data[sector]
            else:
                driver.reset_queue() if act is queue_reset else driver.init()
            for sector, each in data.items():
                written[sector].add(each)
        driver.read(0, 512)
        assert driver.stray == []
    for sector, possible in written.items():
        assert bytes(disk.data[sector * 512 :][:512]) in possible
