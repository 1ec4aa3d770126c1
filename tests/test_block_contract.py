"""One test for every sentence of MirageOS V1 BLOCK that promises something, in its order.

They hold for disks as the server uses them, behind ``prepare``.  Where a sentence also binds what calls the disk (that
guest pages themselves are handed over, that a guest's request is never cancelled), the tests of the worker and of the
server say so for the guest; these say it for the block.
"""

# ruff: noqa: ARG002 - disks have the parameters of the contract
from __future__ import annotations

import asyncio
import os
import threading
from typing import TYPE_CHECKING

import pytest

from vmmblk.backends import file as file_module
from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.block import Block, BlockInfo, Buffers
from vmmblk.errors import Disconnected, IsReadOnly, Unimplemented, Unknown, status_of
from vmmblk.filters.checked import Checked
from vmmblk.filters.readonly import ReadOnly
from vmmblk.spec import Status

if TYPE_CHECKING:
    from pathlib import Path

SECTOR = 512


def filled(sectors: int, byte: int = 0) -> memoryview:
    """A buffer of ``sectors`` sectors."""
    return memoryview(bytearray([byte]) * (sectors * SECTOR))


class Plain(Block):
    """Eight sectors in a bytearray, in plain methods."""

    def __init__(self, *, read_write: bool = True) -> None:
        self.info = BlockInfo(read_write=read_write, sector_size=SECTOR, size_sectors=8)
        self.data = bytearray(8 * SECTOR)
        self.given: list[memoryview] = []

    def read(self, sector_start: int, buffers: Buffers) -> None:
        """Copy out."""
        self.given += buffers
        offset = sector_start * SECTOR
        for buffer in buffers:
            buffer[:] = self.data[offset : offset + len(buffer)]
            offset += len(buffer)

    def write(self, sector_start: int, buffers: Buffers) -> None:
        """Copy in."""
        self.given += buffers
        data = b"".join(buffers)
        self.data[sector_start * SECTOR : sector_start * SECTOR + len(data)] = data


class ReadableOnly(Block):
    """A disk whose author wrote no write."""

    info = BlockInfo(read_write=True, sector_size=SECTOR, size_sectors=8)

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """Do nothing."""


class Burning(Plain):
    """A disk on fire: a part is written, then it fails."""

    def write(self, sector_start: int, buffers: Buffers) -> None:
        """Write the first buffer only."""
        super().write(sector_start, buffers[:1])
        raise Unknown("disk on fire")


def test_unknown_is_an_undiagnosed_error() -> None:
    """``Unknown of string``: it carries its message, and the guest gets an I/O error."""
    with pytest.raises(Unknown, match="disk on fire") as caught:
        asyncio.run(Checked(Burning()).write(0, [filled(1)]))
    assert status_of(caught.value) == Status.IOERR


def test_unimplemented_is_an_operation_not_yet_implemented() -> None:
    """``Unimplemented``: what a disk's author has not written; the guest gets UNSUPP."""
    with pytest.raises(Unimplemented) as caught:
        asyncio.run(Checked(ReadableOnly()).write(0, [filled(1)]))
    assert status_of(caught.value) == Status.UNSUPP


def test_you_cannot_write_to_a_read_only_instance() -> None:
    """``Is_read_only``: every way to change the disk fails with it."""
    disk = Checked(Plain(read_write=False))
    for call in (
        disk.write(0, [filled(1)]),
        disk.write_cached(0, [filled(1)]),
        disk.discard(0, 1),
        disk.write_zeroes(0, 1, unmap=True),
    ):
        with pytest.raises(IsReadOnly) as caught:
            asyncio.run(call)
        assert status_of(caught.value) == Status.IOERR


def test_the_device_has_been_previously_disconnected() -> None:
    """``Disconnected``: every call after disconnect fails with it, reads too."""
    disk = Checked(Plain())
    asyncio.run(disk.disconnect())
    for call in (disk.read(0, [filled(1)]), disk.write(0, [filled(1)]), disk.flush(), disk.discard(0, 1)):
        with pytest.raises(Disconnected):
            asyncio.run(call)


def test_read_write_is_true_if_we_can_write_false_if_read_only(tmp_path: Path) -> None:
    """``read_write`` and what happens to a write agree."""
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * SECTOR))
    for make in (lambda: File(image), lambda: File(image, read_only=True), lambda: ReadOnly(Memory(8))):
        disk = Checked(make())
        if disk.info.read_write:
            asyncio.run(disk.write(0, [filled(1)]))
        else:
            with pytest.raises(IsReadOnly):
                asyncio.run(disk.write(0, [filled(1)]))
        asyncio.run(disk.disconnect())


@pytest.mark.parametrize("sector_size", [512, 4096])
def test_sector_size_is_octets_per_sector(tmp_path: Path, sector_size: int) -> None:
    """Sector n begins ``n * sector_size`` octets into the medium."""
    image = tmp_path / "image"
    image.write_bytes(bytes(4 * 4096))
    disk = File(image, sector_size=sector_size)
    disk.write(1, [memoryview(b"\1" * sector_size)])
    disk.disconnect()
    assert image.read_bytes().find(b"\1") == sector_size
    assert image.read_bytes().count(b"\1") == sector_size


def test_size_sectors_is_total_sectors_per_device() -> None:
    """The last sector is ``size_sectors - 1`` and there is none after it."""
    disk = Checked(Memory(8))
    asyncio.run(disk.read(disk.info.size_sectors - 1, [filled(1)]))
    with pytest.raises(Unknown):
        asyncio.run(disk.read(disk.info.size_sectors, [filled(1)]))


def test_devices_may_be_able_to_make_themselves_bigger_over_time() -> None:
    """One that does says so: ``info`` is new, who listens is told, and the new sectors work."""
    memory = Memory(8, max_sectors=16)
    disk = Checked(memory)
    told = threading.Event()
    disk.on_resize(told.set)
    memory.grow(16)
    assert told.is_set()
    assert disk.info.size_sectors == 16
    asyncio.run(disk.write(15, [filled(1, 7)]))


def test_read_fills_buffers_with_data_starting_at_sector_start() -> None:
    """The first buffer gets the first sectors from ``sector_start``, the next the following ones."""
    disk = Plain()
    disk.data[:] = b"".join(bytes([sector]) * SECTOR for sector in range(8))
    first, second = filled(1), filled(2)
    asyncio.run(Checked(disk).read(3, [first, second]))
    assert first == bytes([3]) * SECTOR
    assert second == bytes([4]) * SECTOR + bytes([5]) * SECTOR


def test_read_is_a_blocking_operation() -> None:
    """It has not completed before the disk has filled the buffers."""
    allowed = threading.Event()

    class Slow(Plain):
        def read(self, sector_start: int, buffers: Buffers) -> None:
            allowed.wait()
            super().read(sector_start, buffers)

    async def use() -> None:
        disk = Slow()
        disk.data[:] = b"\7" * len(disk.data)
        target = filled(1)
        reading = asyncio.ensure_future(Checked(disk).read(0, [target]))
        await asyncio.sleep(0)
        assert not reading.done()
        allowed.set()
        await reading
        assert target == b"\7" * SECTOR

    asyncio.run(use())


@pytest.mark.parametrize("length", [1, 511, 513, 4095])
def test_each_buffer_must_be_a_whole_number_of_sectors_in_length(length: int) -> None:
    """Of read and of write: a disk is never called with another one, not even if the list adds up."""
    plain = Plain()
    disk = Checked(plain)
    rest = -length % SECTOR
    buffers = [memoryview(bytearray(length)), memoryview(bytearray(rest))]
    for call in (disk.read(0, buffers), disk.write(0, buffers)):
        with pytest.raises(Unknown, match="whole number"):
            asyncio.run(call)
    assert plain.given == []


@pytest.mark.parametrize("length", [0, 1, 2, 8, 3000])
def test_the_list_of_buffers_can_be_of_any_length(tmp_path: Path, length: int) -> None:
    """Of read and of write, from none to more than a system call takes."""
    image = tmp_path / "image"
    image.write_bytes(bytes(3000 * SECTOR))
    for block in (File(image), Memory(3000)):
        disk = Checked(block)
        source = [filled(1, index % 251) for index in range(length)]
        target = [filled(1, 0xEE) for _ in range(length)]

        async def use(disk: Checked = disk, source: Buffers = source, target: Buffers = target) -> None:
            await disk.write(0, source)
            await disk.read(0, target)
            await disk.disconnect()

        asyncio.run(use())
        assert target == source


def test_write_writes_the_data_within_buffers_starting_at_sector_start() -> None:
    """In order, those sectors and no others."""
    disk = Plain()
    asyncio.run(Checked(disk).write(2, [filled(1, 1), filled(2, 2)]))
    assert disk.data == bytes(2 * SECTOR) + b"\1" * SECTOR + b"\2" * 2 * SECTOR + bytes(3 * SECTOR)


def test_when_the_io_operation_completes_then_all_writes_have_been_persisted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the kernel acknowledged as synchronous, or as synced, covers every byte before ``write`` completes.

    A model of a disk with a volatile cache stands between the file backend and the file: data of an ordinary write is
    lost unless fdatasync follows; only what was persisted when ``write`` completed counts.
    """
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * SECTOR))
    persisted = bytearray(8 * SECTOR)
    cached: list[tuple[int, bytes]] = []
    pwritev, fdatasync = os.pwritev, os.fdatasync

    def settle() -> None:
        for offset, data in cached:
            persisted[offset : offset + len(data)] = data
        cached.clear()

    def modelled_pwritev(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        part = [buffers[0][:700]]  # short, so that a part forgotten later would show
        done = pwritev(fd, part, offset, flags)
        cached.append((offset, bytes(part[0][:done])))
        if flags & (os.RWF_DSYNC | os.RWF_SYNC):
            settle()
        return done

    def modelled_fdatasync(fd: int) -> None:
        fdatasync(fd)
        settle()

    monkeypatch.setattr(file_module.os, "pwritev", modelled_pwritev)
    monkeypatch.setattr(file_module.os, "fdatasync", modelled_fdatasync)
    block = File(image)
    expected = b"\1" * SECTOR + b"\2" * 2 * SECTOR
    asyncio.run(Checked(block).write(1, [filled(1, 1), filled(2, 2)]))
    assert persisted[SECTOR : 4 * SECTOR] == expected

    block.write_cached(5, [filled(1, 3)])
    assert persisted[5 * SECTOR : 6 * SECTOR] == bytes(SECTOR), "the model would not notice an ordinary write"
    block.flush()
    assert persisted[5 * SECTOR : 6 * SECTOR] == b"\3" * SECTOR
    block.disconnect()


def test_once_submitted_it_is_not_possible_to_cancel_a_request() -> None:
    """Cancelling the task that waits does not stop the disk: the call runs to its end.

    That no request of a guest is ever cancelled in the first place is the worker's to show.
    """
    entered, allowed, ended = threading.Event(), threading.Event(), threading.Event()

    class Slow(Plain):
        def write(self, sector_start: int, buffers: Buffers) -> None:
            entered.set()
            allowed.wait()
            super().write(sector_start, buffers)
            ended.set()

    async def use(disk: Slow) -> None:
        waiting = asyncio.ensure_future(Checked(disk).write(1, [filled(1, 9)]))
        await asyncio.to_thread(entered.wait)
        waiting.cancel()
        allowed.set()
        await asyncio.to_thread(ended.wait)

    disk = Slow()
    asyncio.run(use(disk))
    assert disk.data[SECTOR : 2 * SECTOR] == b"\t" * SECTOR


def test_there_is_no_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Years may pass on the event loop's clock, and the request is still waited for."""
    entered, allowed = threading.Event(), threading.Event()

    class Slow(Plain):
        def read(self, sector_start: int, buffers: Buffers) -> None:
            entered.set()
            allowed.wait()

    async def use() -> None:
        waiting = asyncio.ensure_future(Checked(Slow()).read(0, [filled(1)]))
        await asyncio.to_thread(entered.wait)
        loop = asyncio.get_running_loop()
        now = loop.time()
        monkeypatch.setattr(loop, "time", lambda: now + 1e9)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not waiting.done()
        allowed.set()
        await waiting

    asyncio.run(use())


def test_unimplemented_means_no_data_has_been_written() -> None:
    """An operation that the disk lacks is not replaced by another one that writes."""
    plain = Plain()
    disk = Checked(plain)
    for call in (disk.write_cached(0, [filled(1, 1)]), disk.write_zeroes(0, 1, unmap=True), disk.discard(0, 1)):
        with pytest.raises(Unimplemented):
            asyncio.run(call)
    assert plain.given == []
    assert plain.data == bytes(8 * SECTOR)


def test_is_read_only_means_no_data_has_been_written(tmp_path: Path) -> None:
    """Neither in memory nor in a file."""
    image = tmp_path / "image"
    image.write_bytes(b"\5" * 8 * SECTOR)
    plain = Plain(read_write=False)
    for block in (plain, File(image, read_only=True)):
        disk = Checked(block)
        with pytest.raises(IsReadOnly):
            asyncio.run(disk.write(0, [filled(1, 1)]))
        asyncio.run(disk.disconnect())
    assert plain.data == bytes(8 * SECTOR)
    assert image.read_bytes() == b"\5" * 8 * SECTOR


def test_disconnected_means_disconnected_at_application_request() -> None:
    """Only after disconnect, and then for good; what a call under way has written is unknown, but it does end."""
    entered, allowed = threading.Event(), threading.Event()

    class Slow(Plain):
        def write(self, sector_start: int, buffers: Buffers) -> None:
            entered.set()
            allowed.wait()
            super().write(sector_start, buffers)

    async def use() -> None:
        disk = Checked(Slow())
        under_way = asyncio.ensure_future(disk.write(0, [filled(1, 1)]))
        await asyncio.to_thread(entered.wait)
        await disk.disconnect()
        with pytest.raises(Disconnected):
            await disk.write(0, [filled(1, 2)])
        allowed.set()
        await under_way
        with pytest.raises(Disconnected):
            await disk.read(0, [filled(1)])

    asyncio.run(use())


def test_unknown_means_that_an_unknown_amount_of_data_has_been_written() -> None:
    """A part may be on disk; the next write of the same sectors is not refused for it."""
    disk = Burning()
    with pytest.raises(Unknown):
        asyncio.run(Checked(disk).write(0, [filled(1, 1), filled(1, 2)]))
    assert disk.data[: 2 * SECTOR] == b"\1" * SECTOR + bytes(SECTOR)
    with pytest.raises(Unknown, match="on fire"):
        asyncio.run(Checked(disk).write(0, [filled(1, 1)]))


def test_the_data_will_not_be_copied() -> None:
    """The disk is given views of the very memory that the caller handed over, in plain and async methods alike."""

    class Awaited(Plain):
        async def read(self, sector_start: int, buffers: Buffers) -> None:
            super().read(sector_start, buffers)

    for disk in (Plain(), Awaited()):
        page = bytearray(2 * SECTOR)
        views = [memoryview(page)[:SECTOR], memoryview(page)[SECTOR:]]
        asyncio.run(Checked(disk).read(0, views))
        asyncio.run(Checked(disk).write(0, views))
        page[0], page[SECTOR] = 0xA1, 0xA2
        assert [view[0] for view in disk.given] == [0xA1, 0xA2, 0xA1, 0xA2]


def test_the_supplied_buffers_must_not_be_reused_until_the_io_operation_completes(tmp_path: Path) -> None:
    """And may be from then on: no disk looks at a buffer after its call has ended."""
    image = tmp_path / "image"
    image.write_bytes(bytes(8 * SECTOR))
    for block in (File(image), Memory(8)):
        disk = Checked(block)

        async def use(disk: Checked = disk) -> None:
            buffer, target = filled(1, 1), filled(1)
            await disk.write(0, [buffer])
            buffer[:] = filled(1, 2)
            await disk.write(1, [buffer])
            await disk.read(0, [target])
            assert target == filled(1, 1)
            buffer.release()  # fails if the disk still holds on to it
            await disk.disconnect()

        asyncio.run(use())
