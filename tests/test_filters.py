"""The filters that sit on top of every disk."""

# ruff: noqa: ARG002 - disks and fakes have the parameters of what they stand for
from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from vmmblk.backends.memory import Memory
from vmmblk.block import Block, BlockInfo, Buffers, Operation, ZoneModel, Zoning, operations
from vmmblk.check import check_block
from vmmblk.errors import BlockError, Disconnected, IsReadOnly, Unimplemented, Unknown
from vmmblk.filters import prepare
from vmmblk.filters.base import OFFSET_METHODS, Filter
from vmmblk.filters.checked import Checked
from vmmblk.filters.readonly import ReadOnly
from vmmblk.filters.threaded import Threaded, asynchronous

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

INFO = BlockInfo(read_write=True, sector_size=512, size_sectors=16)


def sectors(count: int) -> list[memoryview]:
    """One buffer of ``count`` sectors."""
    return [memoryview(bytearray(512 * count))]


class Plain(Block):
    """A disk of plain methods that tells what it was asked."""

    def __init__(self) -> None:
        self.info = INFO
        self.calls: list[tuple[object, ...]] = []

    def read(self, sector_start: int, buffers: Buffers) -> None:
        """Note the call and its thread."""
        self.calls.append(("read", sector_start, threading.current_thread()))

    def write(self, sector_start: int, buffers: Buffers) -> None:
        """Note the call."""
        self.calls.append(("write", sector_start))

    def disconnect(self) -> None:
        """Note the call."""
        self.calls.append(("disconnect",))


class Mixed(Plain):
    """A plain disk whose write is asynchronous."""

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """Note the thread."""
        self.calls.append(("write", threading.current_thread()))


class ReadableOnly(Block):
    """A disk whose author wrote nothing but read."""

    info = INFO

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """Do nothing."""


@pytest.mark.parametrize("wrap", [Filter, ReadOnly, Threaded, Checked, prepare])
def test_every_filter_over_memory_keeps_the_contract(wrap: Callable[[Block], Block]) -> None:
    """A filter is a block: check_block holds for it."""
    asyncio.run(check_block(lambda: wrap(Memory(16))))


def test_a_filter_that_overrides_one_method_with_a_sector_must_override_all() -> None:
    """Otherwise the forgotten ones would reach other sectors than the others."""
    with pytest.raises(TypeError, match="write_cached, discard, write_zeroes"):
        type("Half", (Filter,), {"read": Filter.flush, "write": Filter.flush})
    type("Whole", (Filter,), dict.fromkeys(OFFSET_METHODS, Filter.flush))
    type("Other", (Filter,), {"flush": Filter.disconnect})


def test_offset_methods_are_all_that_take_a_sector() -> None:
    """The list that guards filters names each method of Filter with a parameter sector_start."""
    found = [name for name, value in vars(Filter).items() if "sector_start" in getattr(value, "__annotations__", {})]
    assert sorted(found) == sorted(OFFSET_METHODS)


def test_a_filter_offers_what_the_disk_below_offers() -> None:
    """A filter has every method, so operations() asks the disk."""
    memory = Memory(16)
    assert operations(Filter(memory)) == operations(memory)
    assert operations(Filter(Plain())) == Operation(0)


def test_a_filter_tells_the_characteristics_of_the_disk_below() -> None:
    """Info, topology, alignment, pinning and bouncing are those of the disk."""
    memory = Memory(16)
    memory.buffer_alignment, memory.pins_memory, memory.bounce = 4096, True, True
    on_top = prepare(memory)
    assert on_top.info == memory.info
    assert on_top.topology == memory.topology
    assert (on_top.buffer_alignment, on_top.pins_memory, on_top.bounce) == (4096, True, True)


def test_plain_methods_run_in_a_thread_and_async_ones_do_not() -> None:
    """Blocks may mix both; each method is treated as what it is."""
    disk = Mixed()

    async def use() -> None:
        on_top = prepare(disk)
        await on_top.read(0, sectors(1))
        await on_top.write(0, sectors(1))
        await on_top.disconnect()

    asyncio.run(use())
    assert disk.calls[0][2] is not threading.current_thread()
    assert disk.calls[1] == ("write", threading.current_thread())


def test_an_asynchronous_disk_is_not_wrapped() -> None:
    """There is no thread between an asynchronous disk and its caller."""
    memory = Memory(16)
    assert asynchronous(memory) is memory
    assert not isinstance(asynchronous(ReadableOnly()), Threaded)
    assert isinstance(asynchronous(Plain()), Threaded)


def test_a_plain_method_that_gives_a_coroutine_has_it_awaited() -> None:
    """A wrapper function around an async method works."""
    done = []

    class Wrapped(Plain):
        def read(self, sector_start: int, buffers: Buffers) -> Awaitable[None]:
            async def later() -> None:
                done.append(sector_start)

            return later()

    asyncio.run(_use_once(Wrapped(), 3))
    assert done == [3]


async def _use_once(disk: Block, sector: int) -> None:
    on_top = prepare(disk)
    try:
        await on_top.read(sector, sectors(1))
    finally:
        await on_top.disconnect()


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (OSError(5, "disk"), OSError),
        (Unknown("fire"), Unknown),
        (StopIteration(), RuntimeError),
        (SystemExit(), RuntimeError),
    ],
)
def test_what_a_plain_disk_raises_reaches_the_caller(raised: BaseException, seen: type[Exception]) -> None:
    """As it is, or as a RuntimeError where it would stop the event loop."""

    class Failing(Plain):
        def read(self, sector_start: int, buffers: Buffers) -> None:
            raise raised

    with pytest.raises(seen):
        asyncio.run(_use_once(Failing(), 0))


def test_plain_calls_run_at_the_same_time() -> None:
    """A call that waits for another one's progress does not wait for ever."""
    meeting = threading.Barrier(4)

    class Meeting(Plain):
        def read(self, sector_start: int, buffers: Buffers) -> None:
            meeting.wait(10)

    async def use() -> None:
        disk = prepare(Meeting())
        await asyncio.gather(*(disk.read(0, sectors(1)) for _ in range(4)))

    asyncio.run(use())


@pytest.mark.parametrize("model", ZoneModel)
def test_plain_calls_that_change_a_zone_keep_their_order(model: ZoneModel) -> None:
    """One at a time, where zones must be written in order; other zones and reads do not wait for them."""
    allowed = threading.Event()

    class Zones(Plain):
        def zoning(self) -> Zoning:
            return Zoning(model, 8, 0, 0, 0, 512)

        def write(self, sector_start: int, buffers: Buffers) -> None:
            super().write(sector_start, buffers)
            if sector_start == 0:
                allowed.wait()

        def append(self, sector_start: int, buffers: Buffers) -> int:
            self.calls.append(("append", sector_start))
            return sector_start

        def open_zone(self, sector_start: int) -> None:
            self.calls.append(("zone", sector_start))

        report_zones = reset_all_zones = close_zone = finish_zone = reset_zone = open_zone

    async def use(plain: Zones) -> None:
        disk: Any = Threaded(plain)
        waiting = [disk.write(0, sectors(1)), disk.write(1, sectors(1)), disk.append(0, sectors(1))]
        waiting += [getattr(disk, f"{name}_zone")(0) for name in ("open", "close", "finish", "reset")]
        tasks = [asyncio.ensure_future(each) for each in waiting]
        await asyncio.sleep(0)
        await disk.write(8, sectors(1))
        await disk.read(0, sectors(1))
        if model is ZoneModel.HOST_AWARE:
            await asyncio.wait_for(tasks[1], 5)
        seen = list(plain.calls)
        allowed.set()
        await asyncio.gather(*tasks)
        if model is ZoneModel.HOST_MANAGED:
            in_zone = [call for call in plain.calls if call[0] != "read" and call[1] != 8]
            assert in_zone == [("write", 0), ("write", 1), ("append", 0), *[("zone", 0)] * 4]
            assert not set(in_zone[1:]) & set(seen)

    asyncio.run(use(Zones()))


def test_a_plain_disk_that_hangs_does_not_keep_the_process_alive() -> None:
    """The interpreter ends although a thread still waits for the disk."""
    script = """
import asyncio, threading
from vmmblk import Block, BlockInfo
from vmmblk.filters import prepare

called = threading.Event()

class Hung(Block):
    info = BlockInfo(True, 512, 1)
    def read(self, sector_start, buffers):
        called.set()
        threading.Event().wait()

async def use():
    task = asyncio.ensure_future(prepare(Hung()).read(0, [memoryview(bytearray(512))]))
    await asyncio.to_thread(called.wait)
    task.cancel()

asyncio.run(use())
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize(("sector", "count"), [(16, 1), (15, 2), (-1, 1), (0, 17), (1 << 64, 1)])
def test_checked_keeps_calls_outside_the_disk_from_it(sector: int, count: int) -> None:
    """Neither a read nor a write past the end reaches the disk."""
    disk = Plain()
    on_top = prepare(disk)
    for call in (on_top.read, on_top.write):
        assert isinstance(_error(call(sector, sectors(count))), Unknown)
    assert disk.calls == []


def test_checked_refuses_a_buffer_that_is_not_whole_sectors() -> None:
    """Even if the list as a whole is a whole number of sectors."""
    disk = Plain()
    halves = [memoryview(bytearray(256)), memoryview(bytearray(256))]
    assert isinstance(_error(prepare(disk).read(0, halves)), Unknown)
    assert isinstance(_error(prepare(disk).write(0, halves)), Unknown)
    assert disk.calls == []


def test_checked_answers_for_no_sectors_itself() -> None:
    """A disk is never asked to forget or to zero nothing."""
    asked: list[str] = []

    class Forgetful(Plain):
        def discard(self, sector_start: int, sectors: int) -> None:
            asked.append("discard")

        def secure_erase(self, sector_start: int, sectors: int) -> None:
            asked.append("secure_erase")

        def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
            asked.append("write_zeroes")

    async def use(count: int) -> None:
        disk = Checked(Forgetful())
        await disk.discard(0, count)
        await disk.secure_erase(0, count)
        await disk.write_zeroes(0, count, unmap=True)

    asyncio.run(use(0))
    assert asked == []
    asyncio.run(use(1))
    assert asked == ["discard", "secure_erase", "write_zeroes"]


def test_checked_disconnects_the_disk_once_and_then_refuses() -> None:
    """Whatever is called after disconnect, the disk is left alone."""
    disk = Plain()
    on_top = prepare(disk)

    async def use() -> None:
        await on_top.disconnect()
        await on_top.disconnect()

    asyncio.run(use())
    assert isinstance(_error(on_top.read(0, sectors(1))), Disconnected)
    assert isinstance(_error(on_top.write(0, [])), Disconnected)
    assert disk.calls == [("disconnect",)]


def test_checked_answers_for_what_the_disk_lacks() -> None:
    """Optional operations that a disk does not have are Unimplemented."""
    on_top = Checked(Plain())
    calls = [
        on_top.flush(),
        on_top.write_cached(0, sectors(1)),
        on_top.discard(0, 1),
        on_top.write_zeroes(0, 1, unmap=False),
    ]
    assert all(isinstance(_error(call), Unimplemented) for call in calls)
    with pytest.raises(Unimplemented):
        on_top.identify()
    with pytest.raises(Unimplemented):
        on_top.on_resize(lambda: None)


def test_checked_follows_a_disk_that_grows() -> None:
    """Sectors that are new can be used, and whoever asked is told."""
    memory = Memory(4, max_sectors=8)
    on_top = Checked(memory)
    told: list[int] = []
    on_top.on_resize(lambda: told.append(on_top.info.size_sectors))
    assert isinstance(_error(on_top.read(4, sectors(1))), Unknown)
    memory.grow(6)
    assert told == [6]
    assert _error(on_top.read(5, sectors(1))) is None
    assert isinstance(_error(on_top.read(6, sectors(1))), Unknown)


def test_a_read_only_disk_offers_nothing_that_changes_it() -> None:
    """Flush, discard and write_zeroes are not offered, writes are refused, and nothing reaches the disk below."""
    disk = Plain()
    on_top = Checked(ReadOnly(asynchronous(disk)))
    assert not on_top.info.read_write
    assert operations(on_top) & (Operation.FLUSH | Operation.DISCARD | Operation.WRITE_ZEROES) == Operation(0)
    assert isinstance(_error(on_top.write(0, sectors(1))), IsReadOnly)
    assert isinstance(_error(ReadOnly(disk).write(0, sectors(1))), IsReadOnly)
    assert disk.calls == []


def test_identify_is_forwarded() -> None:
    """A disk's own serial is seen through every filter."""

    class Named(Plain):
        def identify(self) -> str:
            return "disk-7"

    assert Checked(ReadOnly(asynchronous(Named()))).identify() == "disk-7"


def _error(call: Awaitable[None] | None) -> BlockError | None:
    async def wait() -> None:
        assert call is not None
        await call

    try:
        asyncio.run(wait())
    except BlockError as exc:
        return exc
    return None
