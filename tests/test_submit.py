"""Disks that are given many reads and writes at once, from a driver through the socket and back."""

# ruff: noqa: ARG002, FBT003 - a disk has parameters it does not need; a transfer is told by position
from __future__ import annotations

import asyncio
import errno
import threading
from typing import TYPE_CHECKING, Any

import pytest
from disks import CachedDisk, Disk, FullDisk

from vmmblk.block import Block, BlockInfo, Buffers, Operation, Transfer, operations
from vmmblk.client.driver import SUPPORTED, attach
from vmmblk.client.queue import Descriptor
from vmmblk.errors import Disconnected, IsReadOnly, Unimplemented, Unknown
from vmmblk.filters import prepare
from vmmblk.filters.base import Filter
from vmmblk.filters.checked import Checked
from vmmblk.filters.readonly import ReadOnly
from vmmblk.filters.threaded import Threaded
from vmmblk.spec import REQUEST_HEADER, DescFlag, Feature, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from conftest import Logs, Served

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.request import Pending

    Serve = Callable[..., Served]
    Shape = tuple[bool, bool, int, int]

IN, OUT, FLUSH, GET_ID = RequestType.IN, RequestType.OUT, RequestType.FLUSH, RequestType.GET_ID
INFO = BlockInfo(read_write=True, sector_size=512, size_sectors=16)


class Batches(FullDisk):
    """Notes the shape of each batch: whether it writes, whether that is cached, sector and number of sectors.

    ``fails`` tells with what a transfer to a sector fails, ``breaks`` what ``submit`` raises.
    """

    def __init__(self, *, read_write: bool = True) -> None:
        super().__init__(read_write=read_write)
        self.batches: list[list[Shape]] = []
        self.fails: dict[int, BaseException] = {}
        self.breaks: BaseException | None = None

    async def submit(self, batch: Sequence[Transfer]) -> None:
        """As read and write do."""
        self.batches.append([(t.write, t.cached, t.sector_start, self._sectors(t.buffers)) for t in batch])
        await self._enter("submit")
        for transfer in batch:
            transfer.error = self.fails.get(transfer.sector_start)
            if transfer.error is None:
                self._carry_out(transfer)
        if self.breaks is not None:
            raise self.breaks

    def _carry_out(self, transfer: Transfer) -> None:
        if transfer.write:
            self._store(transfer.sector_start, transfer.buffers)
            return
        at = transfer.sector_start * 512
        for buffer in transfer.buffers:
            buffer[:] = self.data[at : at + len(buffer)]
            at += len(buffer)


def statuses(v: VirtioBlk, requests: Iterable[tuple[RequestType, int]]) -> list[int | None]:
    """What becomes of requests of a sector each, made together."""
    pendings = [
        v.submit(kind, sector, bytes([sector % 251]) * 512) if kind is OUT else v.submit(kind, sector, data_in=512)
        for kind, sector in requests
    ]
    v.kick()
    v.wait_all(pendings)
    return [each.status for each in pendings]


def in_pieces(v: VirtioBlk, sector: int, *pieces: bytes) -> Pending:
    """A write of pieces that do not lie side by side."""
    page = v.memory.alloc(4096 * (len(pieces) + 1))
    v.memory.write(page, REQUEST_HEADER.pack(OUT, 0, sector))
    descriptors = [Descriptor(page, 16, DescFlag.NEXT)]
    for i, piece in enumerate(pieces):
        v.memory.write(page + 4096 * (i + 1), piece)
        descriptors.append(Descriptor(page + 4096 * (i + 1), len(piece), DescFlag.NEXT))
    return v.submit_raw([*descriptors, Descriptor(page + 16, 1, DescFlag.WRITE)])


def test_what_is_made_together_comes_together(serve: Serve) -> None:
    """The disk gets one batch, in the order of the ring, and its data is the data."""
    served = serve(Batches(), cache="writethrough")
    with attach(served.path) as v:
        assert statuses(v, [(OUT, each) for each in range(8)]) == [Status.OK] * 8
        read = [v.submit(IN, each, data_in=512) for each in range(8)]
        v.kick()
        v.wait_all(read)
    assert [each.result() for each in read] == [bytes([each]) * 512 for each in range(8)]
    assert [each.written for each in read] == [513] * 8
    assert served.disk.batches == [
        [(True, False, each, 1) for each in range(8)],
        [(False, False, each, 1) for each in range(8)],
    ]


def test_more_than_a_batch_is_several(serve: Serve) -> None:
    """64 at a time, and nothing is lost."""
    served = serve(Batches(), queue_size=1024)
    with attach(served.path) as v:
        assert statuses(v, [(OUT, each) for each in range(200)]) == [Status.OK] * 200
        assert v.read(199, 512) == bytes([199]) * 512
    assert sum(map(len, served.disk.batches)) == 201
    assert max(map(len, served.disk.batches)) == 64


def test_each_transfer_fails_by_itself(serve: Serve, logs: Logs) -> None:
    """With the status of its own error; a bug is told in the log."""
    logs.expect("the disk raised ValueError")
    logs.expect("the disk fails: .*broken")
    disk = Batches()
    disk.fails = {
        1: Unknown("bad"),
        2: Unimplemented("never"),
        3: OSError(errno.EIO, "broken"),
        4: ValueError("a bug"),
        5: SystemExit(1),
    }
    logs.allow("the disk raised SystemExit")
    with attach(serve(disk).path) as v:
        found = statuses(v, [(OUT, each) for each in range(7)])
        failed = v.submit(IN, 3, data_in=512)
        v.kick()
        assert v.wait(failed).written == 0
    assert found == [Status.OK, Status.IOERR, Status.UNSUPP, *[Status.IOERR] * 3, Status.OK]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Unknown("bad"), Status.IOERR),
        (Unimplemented("no"), Status.UNSUPP),
        (ValueError("a bug"), Status.IOERR),
        (asyncio.CancelledError(), Status.IOERR),
        (SystemExit(1), Status.IOERR),
    ],
    ids=repr,
)
def test_raising_fails_all(serve: Serve, logs: Logs, error: BaseException, status: Status) -> None:
    """Those that failed by themselves keep their error; and the next batch is served."""
    logs.allow("the disk raised")
    disk = Batches()
    disk.breaks, disk.fails = error, {3: Unknown("bad")}
    with attach(serve(disk).path) as v:
        assert statuses(v, [(OUT, each) for each in range(2, 5)]) == [status, Status.IOERR, status]
        disk.breaks = None
        assert statuses(v, [(OUT, 0)]) == [Status.OK]


@pytest.mark.parametrize("waits", [False, True])
def test_a_batch_is_mixed_with_other_requests(serve: Serve, waits: bool) -> None:
    """Flushes, identification and transfers in odd pieces go their own ways, whether the disk waits or not."""
    disk = Batches()
    served = serve(disk)
    if waits:
        disk.held = {"submit", "flush", "write_cached"}
    with attach(served.path, indirect=False) as v:
        requests = [
            v.submit(OUT, 0, b"a" * 512),
            v.submit(FLUSH, 0),
            in_pieces(v, 1, b"b" * 256, b"b" * 256),
            v.submit(GET_ID, 0, data_in=20),
            v.submit(OUT, 2, b"c" * 512),
        ]
        v.kick()
        if waits:
            for name in ("submit", "flush", "write_cached"):
                disk.wait_for(name)
            disk.release()
        v.wait_all(requests)
        assert [each.status for each in requests if each.status is not None] == [Status.OK] * 4
        assert v.read(0, 3 * 512) == b"a" * 512 + b"b" * 512 + b"c" * 512
    assert disk.batches[0] == [(True, True, 0, 1), (True, True, 2, 1)]


@pytest.mark.parametrize("other", ["write", "flush", "submit"])
def test_completions_keep_their_order(serve: Serve, other: str) -> None:
    """With IN_ORDER, whatever ends first."""
    disk = Batches()
    served = serve(disk, features={"in_order": True}, cache="writethrough")
    disk.held = {other}
    with attach(served.path, features=SUPPORTED | Feature.IN_ORDER.mask, indirect=False) as v:
        requests = [
            in_pieces(v, 1, b"b" * 256, b"b" * 256),
            v.submit(FLUSH, 0),
            v.submit(OUT, 0, b"a" * 512),
        ]
        v.kick()
        disk.wait_for(other)
        disk.release()
        v.wait_all(requests)
        assert [each.status for each in requests[1:]] == [Status.OK] * 2


def test_what_is_cached_follows_the_write_cache(serve: Serve) -> None:
    """Only while the guest has it on, and reads never."""
    disk = Batches()
    with attach(serve(disk).path) as v:
        for on in (True, False, True):
            v.writeback = on
            assert v.writeback is on
            v.write(0, bytes(512))
            v.read(0, 512)
    written = [shape[1] for [shape] in disk.batches if shape[0]]
    assert written == [True, False, True]
    assert not any(shape[1] for [shape] in disk.batches if not shape[0])


def test_without_a_flush_nothing_is_cached(serve: Serve) -> None:
    """A disk that cannot flush must persist."""

    class Persistent(Disk):
        async def submit(self, batch: Sequence[Transfer]) -> None:
            self.calls.extend(("submit", transfer.cached) for transfer in batch)

    served = serve(Persistent())
    with attach(served.path) as v:
        v.write(0, bytes(512))
    assert served.disk.calls[0] == ("submit", False)


def test_a_read_only_disk_is_not_written(serve: Serve) -> None:
    """The write is refused, the read in the same batch is not."""
    disk = Batches(read_write=False)
    with attach(serve(disk).path) as v:
        assert statuses(v, [(IN, 0), (OUT, 0), (IN, 1)]) == [Status.OK, Status.IOERR, Status.OK]
    assert disk.batches == [[(False, False, 0, 1), (False, False, 1, 1)]]


def test_what_reaches_past_the_end_is_refused_alone(serve: Serve) -> None:
    """The disk does not see it."""
    disk = Batches()
    with attach(serve(disk).path) as v:
        assert statuses(v, [(IN, 2048), (IN, 2047), (OUT, 1 << 60)]) == [Status.IOERR, Status.OK, Status.IOERR]
    assert disk.batches == [[(False, False, 2047, 1)]]


def test_a_plain_submit_runs_in_a_thread(serve: Serve) -> None:
    """And delays no event loop."""

    class Plain(CachedDisk):
        def submit(self, batch: Sequence[Transfer]) -> None:
            self.calls.append(("submit", len(batch), threading.current_thread().name))

    served = serve(Plain())
    with attach(served.path) as v:
        assert statuses(v, [(OUT, 0), (OUT, 1)]) == [Status.OK] * 2
    name, count, thread = served.disk.calls[0]
    assert (name, count) == ("submit", 2)
    assert thread.startswith("disk-")


class Shifting(Filter):
    """A filter of somebody's that changes single reads and writes."""


@pytest.mark.parametrize("wrap", [Shifting, ReadOnly])
def test_a_filter_on_top_hides_it(serve: Serve, wrap: Callable[[Block], Block]) -> None:
    """It must see every read and write."""
    disk = Batches()
    with attach(serve(wrap(disk)).path) as v:
        assert statuses(v, [(IN, 0), (IN, 1)]) == [Status.OK] * 2
    assert disk.batches == []
    assert disk.count("read") == 2


def test_who_has_it() -> None:
    """The disk, and what changes none of its reads and writes."""
    assert all(Operation.SUBMIT in operations(block) for block in (Batches(), Threaded(Batches()), prepare(Batches())))
    assert not any(Operation.SUBMIT in operations(block) for block in (Disk(), Threaded(Disk()), prepare(Disk())))


def data(*lengths: int) -> list[memoryview]:
    """Buffers of those lengths."""
    return [memoryview(bytearray(each)) for each in lengths]


def test_bad_transfers_are_refused_and_the_others_pass() -> None:
    """Each with an error that says what is wrong; one of no length has nothing to do."""

    async def main() -> None:
        disk = Batches()
        disk.info = INFO
        checked = Checked(disk)
        batch = [
            Transfer(False, False, 0, data(512, 1024)),
            Transfer(False, False, 15, data(1024)),
            Transfer(False, False, -1, data(512)),
            Transfer(False, False, 0, data(256, 256)),
            Transfer(False, False, 0, data()),
            Transfer(True, False, 15, data(512)),
        ]
        await checked.submit(batch)
        assert disk.batches == [[(False, False, 0, 3), (True, False, 15, 1)]]
        told = [str(each.error) if each.error else "" for each in batch]
        assert told == [
            "",
            "2 sectors from 15 reach outside the disk of 8192 bytes",
            "1 sectors from -1 reach outside the disk of 8192 bytes",
            "a buffer of 256 bytes is not a whole number of 512-byte sectors",
            "",
            "",
        ]
        await checked.submit(batch[1:4])
        assert len(disk.batches) == 1, "an empty batch is no batch"
        await checked.disconnect()
        late = [Transfer(write, False, 0, data(512)) for write in (False, True)]
        await checked.submit(late)
        assert all(isinstance(each.error, Disconnected) for each in late)
        assert len(disk.batches) == 1

    asyncio.run(main())


def test_a_write_to_a_read_only_disk_is_refused_as_such() -> None:
    """With IsReadOnly."""
    transfer = Transfer(True, False, 0, data(512))
    asyncio.run(Checked(Batches(read_write=False)).submit([transfer]))
    assert isinstance(transfer.error, IsReadOnly)


def test_submit_may_hand_back_a_future(serve: Serve) -> None:
    """Whatever can be awaited, from a plain method too."""

    class Future(Disk):
        def submit(self, batch: Sequence[Transfer]) -> Any:
            return self._later(batch)

        async def _later(self, batch: Sequence[Transfer]) -> None:
            await asyncio.sleep(0)
            self.calls.append(("submit", len(batch)))

        async def read(self, sector_start: int, buffers: Buffers) -> None:
            raise AssertionError

    served = serve(Future())
    with attach(served.path) as v:
        assert statuses(v, [(IN, 0)]) == [Status.OK]
    assert served.disk.count("submit") == 1


def test_a_disk_may_sort_its_batch(serve: Serve) -> None:
    """What failed is told of the request that failed."""

    class Sorts(Batches):
        async def submit(self, batch: Sequence[Transfer]) -> None:
            assert isinstance(batch, list)
            batch.sort(key=lambda transfer: transfer.sector_start)
            batch[0].error = Unimplemented("no")

    with attach(serve(Sorts()).path) as v:
        assert statuses(v, [(IN, each) for each in (3, 2, 1, 4)]) == [Status.OK, Status.OK, Status.UNSUPP, Status.OK]
