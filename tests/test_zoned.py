"""The zoned filter: data, what is remembered of zones, and what a crash leaves."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from disks import CachedDisk, Disk, FullDisk
from hypothesis import given, settings
from hypothesis import strategies as st

from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.block import Lifetime, Operation, ZoneState, operations
from vmmblk.config import open_disk
from vmmblk.errors import (
    BlockError,
    ConfigError,
    IsReadOnly,
    Unimplemented,
    Unknown,
    ZoneInvalidCommand,
    ZoneUnalignedWritePointer,
)
from vmmblk.filters import prepare
from vmmblk.filters.readonly import ReadOnly
from vmmblk.filters.threaded import asynchronous
from vmmblk.filters.zone_file import Geometry, Record, ZoneFile
from vmmblk.filters.zoned import Zoned

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine

ZONE = 8  # sectors
GEOMETRY = Geometry(512, 64, ZONE, ZONE, 1)


def zoned(disk: Any = None, **options: Any) -> Any:
    """Zones of 8 sectors over a disk of 64, the first one conventional."""
    return Zoned(Memory(64) if disk is None else disk, **{"zone_size": ZONE * 512, "conventional": 1, **options})


def data(sectors: int, byte: int = 0x78) -> list[memoryview]:
    """Sectors full of a byte, in buffers of one sector each."""
    return [memoryview(bytearray([byte]) * 512) for _ in range(sectors)]


async def read(disk: Any, sector: int, sectors: int) -> bytes:
    """Sectors of the disk, read into two buffers if there is more than one."""
    buffer = bytearray(b"\xa5" * sectors * 512)
    whole = memoryview(buffer)
    await disk.read(sector, [whole[:512], whole[512:]] if sectors > 1 else [whole])
    return bytes(buffer)


def error(call: Awaitable[Any]) -> BaseException | None:
    """What awaiting a call raises."""

    async def wait() -> None:
        await call

    try:
        asyncio.run(wait())
    except (BlockError, OSError) as exc:
        return exc
    return None


async def state(disk: Any, zone: int) -> ZoneState:
    """The state that a zone is reported in."""
    found: ZoneState = (await disk.report_zones(zone * ZONE, 1))[0].state
    return found


def run(use: Coroutine[Any, Any, Any]) -> Any:
    """Run one coroutine."""
    return asyncio.run(use)


# Data.


def test_unwritten_sectors_read_as_zeroes() -> None:
    """BLK-137, BLK-139: whatever the disk below holds past the write pointer, or held before a reset."""

    async def use() -> None:
        memory = Memory(64)
        await memory.write(0, data(64, 0xEE))
        disk = zoned(memory)
        assert await read(disk, ZONE, ZONE) == bytes(ZONE * 512)
        await disk.write(ZONE, data(3))
        assert await read(disk, ZONE, ZONE) == b"x" * 3 * 512 + bytes(5 * 512)
        assert await read(disk, ZONE + 1, 2) == b"x" * 2 * 512
        assert await read(disk, 0, ZONE) == b"\xee" * ZONE * 512
        await disk.reset_zone(ZONE)
        assert await read(disk, ZONE, ZONE) == bytes(ZONE * 512)
        await disk.disconnect()

    run(use())


def test_an_append_tells_where_it_went() -> None:
    """BLK-116: the first sector written, and the data is there."""

    async def use() -> None:
        disk = zoned()
        await disk.write(ZONE, data(3))
        assert await disk.append(ZONE, data(2, 0x61)) == ZONE + 3
        assert await disk.append(ZONE, data(1, 0x62)) == ZONE + 5
        assert await read(disk, ZONE + 3, 3) == b"a" * 1024 + b"b" * 512
        await disk.disconnect()

    run(use())


def test_what_is_refused_reaches_nothing() -> None:
    """HOSTILE-197, BLK-131: a write or a read out of a zone and a write in its middle never reach the disk below."""
    below = Disk(64)
    disk = zoned(below)
    assert isinstance(error(disk.write(ZONE, data(ZONE + 1))), ZoneInvalidCommand)
    assert isinstance(error(disk.write(ZONE + 1, data(1))), ZoneUnalignedWritePointer)
    assert isinstance(error(disk.read(0, data(ZONE + 1))), ZoneInvalidCommand)
    assert isinstance(error(disk.append(ZONE + 1, data(1))), ZoneInvalidCommand)
    assert below.calls == []


def test_a_write_that_fails_below_moves_no_pointer() -> None:
    """BLK-151: only a successful write opens a zone."""
    below = Disk(64)
    below.failures["write"] = OSError(5, "disk")
    disk = zoned(below)
    assert isinstance(error(disk.write(ZONE, data(1))), OSError)
    assert run(state(disk, 1)) is ZoneState.EMPTY


def test_writes_of_one_zone_that_are_in_flight_together_go_in_order() -> None:
    """The second is judged when the first is done; both succeed."""

    async def use() -> None:
        disk = zoned(asynchronous(Slow()))
        await asyncio.gather(*(disk.write(ZONE + at, data(1, at)) for at in range(ZONE)))
        assert await state(disk, 1) is ZoneState.FULL
        assert await read(disk, ZONE, ZONE) == b"".join(bytes([at]) * 512 for at in range(ZONE))
        await disk.disconnect()

    run(use())


class Slow(Disk):
    """Each write takes a few turns of the loop."""

    def __init__(self) -> None:
        super().__init__(64)

    async def write(self, sector_start: int, buffers: Any) -> None:
        """Later ones overtake earlier ones."""
        for _ in range(20 - sector_start):
            await asyncio.sleep(0)
        await super().write(sector_start, buffers)


def test_a_host_aware_disk_is_written_across_zones() -> None:
    """BLK-110: in any order, and from one zone into the next."""

    async def use() -> None:
        disk = zoned(model="host-aware")
        await disk.write(ZONE + 4, data(ZONE))
        assert await read(disk, ZONE + 4, ZONE) == b"x" * ZONE * 512
        assert [await state(disk, zone) for zone in (1, 2)] == [ZoneState.FULL, ZoneState.IMPLICIT_OPEN]
        assert disk.zoning().max_append_sectors == 0
        await disk.disconnect()

    run(use())


@pytest.mark.parametrize("failed", [ZoneState.READ_ONLY, ZoneState.OFFLINE])
def test_a_zone_whose_medium_fails(tmp_path: Path, failed: ZoneState) -> None:
    """BLK-135, BLK-136, BLK-170, BLK-171: it stays so over a restart; read-only data is readable, offline is not."""

    async def use() -> None:
        memory = Memory(64)
        path = tmp_path / "zones"
        disk = zoned(memory, state=path)
        await disk.write(ZONE, data(2))
        await disk.fail_zone(ZONE, failed)
        disk._file.close()  # as when the process ends
        for each in (disk, zoned(memory, state=path)):
            assert await state(each, 1) is failed
            calls = [each.write(ZONE + 2, data(1)), each.append(ZONE, data(1)), each.reset_zone(ZONE)]
            if failed is ZoneState.OFFLINE:
                calls.append(each.read(ZONE, data(1)))
            else:
                assert await read(each, ZONE, 4) == b"x" * 1024 + bytes(1024)
            for call in calls:
                with pytest.raises(ZoneInvalidCommand):
                    await call

    run(use())


# What it offers.


def test_zones_take_the_place_of_what_goes_round_them() -> None:
    """HOSTILE-198: discard, write-zeroes and growing are not offered, the rest of the disk below is."""
    disk = prepare(zoned(FullDisk(64)))
    assert operations(disk) == Operation.FLUSH | Operation.IDENTIFY | Operation.ZONES
    assert isinstance(error(disk.discard(ZONE, 1)), Unimplemented)  # type: ignore[attr-defined]
    assert isinstance(error(disk.write_zeroes(ZONE, 1, unmap=False)), Unimplemented)  # type: ignore[attr-defined]


def test_a_secure_erase_is_a_reset(tmp_path: Path) -> None:
    """BLK-141, BLK-142: whole zones become empty and their data is gone; anything else is refused."""

    async def use() -> None:
        memory = Memory(64)
        disk = prepare(zoned(memory, state=tmp_path / "zones"))
        for zone in (0, 1, 2):
            await disk.write(zone * ZONE, data(4))  # type: ignore[misc]
        with pytest.raises(Unknown):
            await disk.secure_erase(ZONE, ZONE - 1)  # type: ignore[attr-defined]
        await disk.secure_erase(0, 2 * ZONE)  # type: ignore[attr-defined]
        assert [await state(disk, zone) for zone in (0, 1, 2)] == [
            ZoneState.NOT_WRITE_POINTER,
            ZoneState.EMPTY,
            ZoneState.IMPLICIT_OPEN,
        ]
        assert await read(memory, 0, 2 * ZONE) == bytes(2 * ZONE * 512)
        assert await read(memory, 2 * ZONE, 1) == b"x" * 512
        await disk.disconnect()  # type: ignore[misc]

    run(use())


def test_a_read_only_disk_reports_zones_and_changes_none(tmp_path: Path) -> None:
    """HOSTILE-162: every change is refused, and no file is made."""
    path = tmp_path / "zones"
    for disk in (prepare(zoned(ReadOnly(Memory(64)), state=path)), prepare(ReadOnly(zoned(state=None)))):
        each: Any = disk
        calls = [
            each.open_zone(ZONE),
            each.close_zone(ZONE),
            each.finish_zone(ZONE),
            each.reset_zone(ZONE),
            each.reset_all_zones(),
            each.append(ZONE, data(1)),
            each.write(ZONE, data(1)),
        ]
        assert all(isinstance(error(call), IsReadOnly) for call in calls)
        assert run(state(each, 1)) is ZoneState.EMPTY
    assert not path.exists()


def test_filters_refuse_what_only_a_filter_can_get() -> None:
    """ReadOnly by itself refuses every change of a zone."""
    filtered: Any = ReadOnly(zoned())
    calls = [
        filtered.open_zone(ZONE),
        filtered.close_zone(ZONE),
        filtered.finish_zone(ZONE),
        filtered.reset_zone(ZONE),
        filtered.reset_all_zones(),
        filtered.append(ZONE, data(1)),
    ]
    assert all(isinstance(error(call), IsReadOnly) for call in calls)


def test_checked_keeps_bad_zone_calls_from_the_disk() -> None:
    """HOSTILE-189, HOSTILE-194: sectors outside, ragged buffers and an empty append go no further."""
    disk: Any = prepare(zoned(Disk(64)))
    for call in (disk.report_zones(64, 1), disk.open_zone(64), disk.append(1 << 60, data(1)), disk.append(ZONE, [])):
        assert isinstance(error(call), ZoneInvalidCommand)
    assert isinstance(error(disk.append(ZONE, [memoryview(bytearray(100))])), Unknown)


def test_a_plain_disk_may_have_zones() -> None:
    """Its methods run in threads and their answers come back."""

    class Plain(Disk):
        def lifetime(self) -> Lifetime:
            return Lifetime()

        def zoning(self) -> Any:
            return zoned().zoning()

        def report_zones(self, sector_start: int, count: int) -> Any:
            return [sector_start, count]

        def open_zone(self, sector_start: int) -> None:
            self.calls.append(("open", sector_start))

        close_zone = finish_zone = reset_zone = open_zone

        def reset_all_zones(self) -> None:
            self.calls.append(("reset_all",))

        def append(self, sector_start: int, buffers: Any) -> int:
            return sector_start + len(buffers)

    async def use() -> None:
        plain = Plain(64)
        disk: Any = prepare(plain)
        assert Operation.ZONES in operations(disk)
        assert await disk.report_zones(8, 3) == [8, 3]
        assert await disk.append(8, data(2)) == 10
        for call in (disk.open_zone, disk.close_zone, disk.finish_zone, disk.reset_zone):
            await call(16)
        await disk.reset_all_zones()
        assert plain.calls == [("open", 16)] * 4 + [("reset_all",)]

    run(use())


# What is remembered.


def test_zones_are_remembered(tmp_path: Path) -> None:
    """Written zones come back closed or full, opened ones empty, and finished ones without more data than they had."""

    async def use() -> None:
        memory = Memory(64)
        disk = zoned(memory, state=tmp_path / "zones")
        await disk.write(1 * ZONE, data(3))
        await disk.write(2 * ZONE, data(ZONE))
        await disk.open_zone(3 * ZONE)
        await disk.append(4 * ZONE, data(2))
        await disk.finish_zone(4 * ZONE)
        await disk.write(5 * ZONE, data(1))
        await disk.reset_zone(5 * ZONE)
        disk._file.close()  # as when the process ends
        again = zoned(memory, state=tmp_path / "zones")
        states = [await state(again, zone) for zone in range(1, 6)]
        assert states == [ZoneState.CLOSED, ZoneState.FULL, ZoneState.EMPTY, ZoneState.FULL, ZoneState.EMPTY]
        assert await again.append(ZONE, data(1)) == ZONE + 3
        assert await read(again, 4 * ZONE, 4) == b"x" * 1024 + bytes(1024)

    run(use())


def test_cached_writes_are_remembered_with_a_flush(tmp_path: Path) -> None:
    """Before it the record is silent; after it, and after a disconnect, it tells."""

    async def use() -> None:
        disk = zoned(CachedDisk(64), state=tmp_path / "zones")
        await disk.write_cached(ZONE, data(3))
        assert stored(tmp_path / "zones") == {}
        await disk.flush()
        assert stored(tmp_path / "zones") == {1: Record(ZoneState.CLOSED, 3)}
        await disk.write_cached(ZONE + 3, data(2))
        await disk.disconnect()
        assert stored(tmp_path / "zones") == {1: Record(ZoneState.CLOSED, 5)}

    run(use())


def test_a_flush_that_fails_remembers_nothing(tmp_path: Path) -> None:
    """The data may be gone: the record must not claim it."""
    below = CachedDisk(64)
    disk = zoned(below, state=tmp_path / "zones")
    assert error(disk.write_cached(ZONE, data(3))) is None
    below.failures["flush"] = OSError(5, "disk")
    assert isinstance(error(disk.flush()), OSError)
    assert isinstance(error(disk.finish_zone(ZONE)), OSError)
    assert stored(tmp_path / "zones") == {}


def stored(path: Path) -> dict[int, Record]:
    """What a file would tell after a crash now."""
    return dict(ZoneFile(path, GEOMETRY, read_only=True).records)


OPERATIONS = ["write", "write_cached", "append", "flush", "reset", "finish", "open", "close", "reset_all"]


class Crashes:
    """A zoned disk that may crash at any call of the disk below: at each, ``check`` looks at what would be left."""

    def __init__(self, path: Path) -> None:
        model = self

        class Watched(CachedDisk):
            async def _enter(self, *call: object) -> None:
                await super()._enter(*call)
                model.check()

        self.path = path
        self.below = Watched(64)
        self.disk = zoned(self.below, state=path)
        self.contents: list[list[bytes]] = [[] for _ in range(8)]
        """Of each zone, what was written to its sectors."""
        self.acknowledged = [0] * 8
        """Of each zone, how many sectors must survive."""
        self._serial = itertools.count(1)

    def check(self) -> None:
        """A record claims only what is stable."""
        for zone, record in stored(self.path).items():
            held = b"".join(self.contents[zone][: record.written])
            assert len(held) == record.written * 512
            assert self.below.stable[zone * ZONE * 512 :][: len(held)] == held

    async def step(self, name: str, zone: int, sectors: int) -> None:
        """Make one call, see what it acknowledges, and look again."""
        if name in ("write", "write_cached", "append"):
            await self._write(name, zone, sectors)
        elif name == "flush":
            await self.disk.flush()
            self.acknowledged = [len(held) for held in self.contents]
        elif name == "reset_all":
            await self.disk.reset_all_zones()
            self._forget(*range(8))
        else:
            await getattr(self.disk, f"{name}_zone")(zone * ZONE)
            self._forget(*([zone] if name == "reset" else []))
        self.check()
        found = stored(self.path)
        kept = [found.get(each, Record(ZoneState.EMPTY, 0)).written for each in range(8)]
        assert all(map(int.__ge__, kept, self.acknowledged))

    async def _write(self, name: str, zone: int, sectors: int) -> None:
        new = [next(self._serial).to_bytes(2, "big") * 256 for _ in range(sectors)]
        at = len(self.contents[zone])
        if at == ZONE:
            return  # beyond lies another zone
        start = zone * ZONE + (0 if name == "append" else at)
        self.contents[zone] += new
        try:
            placed = await getattr(self.disk, name)(start, [memoryview(each) for each in new])
        except BlockError:
            del self.contents[zone][at:]
            return
        assert placed in (None, zone * ZONE + at)
        if name != "write_cached":
            self.acknowledged[zone] = len(self.contents[zone])

    def _forget(self, *zones: int) -> None:
        for zone in zones:
            self.contents[zone].clear()
            self.acknowledged[zone] = 0


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(1, 3), st.integers(1, 4)), max_size=25))
def test_at_every_moment_a_record_claims_only_what_is_stable(steps: list[tuple[str, int, int]]) -> None:
    """And once acknowledged as persisted, data is claimed: whatever call of the disk or the file a crash falls on."""

    async def use(path: Path) -> None:
        crashes = Crashes(path)
        for each in steps:
            with contextlib.suppress(ZoneInvalidCommand):
                await crashes.step(*each)
        await crashes.disk.disconnect()

    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        run(use(Path(folder, "zones")))


# The program that a crash test kills: it writes zones of a file without end, and says what it has been told is done.
VICTIM = """
import asyncio, sys
from pathlib import Path
from vmmblk.backends.file import File
from vmmblk.filters.threaded import asynchronous
from vmmblk.filters.zoned import Zoned

def say(*words):
    print(*words, flush=True)

async def main(image, seed):
    disk = Zoned(asynchronous(File(image)), zone_size=4096, state=Path(f"{image}.zones"))
    cached = {}
    for turn in range(seed, 1 << 30):
        zone = turn * 7 % 5
        held = (await disk.report_zones(zone * 8, 1))[0]
        at = held.write_pointer - held.start
        if held.state.name == "FULL" or turn % 11 == 0:
            say("resetting", zone)
            await disk.reset_zone(zone * 8)
            cached.pop(zone, None)
            say("reset", zone)
            continue
        data = [memoryview((f"{zone} {at + n} {turn} ".encode() * 128)[:512]) for n in range(min(3, 8 - at))]
        say("writing", zone, at, turn, len(data))
        if turn % 3:
            await disk.write_cached(zone * 8 + at, data)
            cached[zone] = at + len(data)
        else:
            await disk.write(zone * 8 + at, data)
            cached.pop(zone, None)
            say("written", zone, at + len(data))
        if turn % 8 == 5:
            await disk.flush()
            for zone, end in cached.items():
                say("written", zone, end)
            cached.clear()

asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))
"""


def test_write_pointers_survive_a_kill(tmp_path: Path) -> None:
    """SIGKILL at many moments: each zone holds what was acknowledged, and nothing but what was written to it last."""
    image = tmp_path / "image"
    image.write_bytes(bytes(5 * 4096))
    story: list[list[str]] = []
    for lines in (3, 11, 40, 57, 91, 150):
        command = [sys.executable, "-c", VICTIM, str(image), str(len(story))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
            assert victim.stdout is not None
            story += [victim.stdout.readline().split() for _ in range(lines)]
            victim.send_signal(signal.SIGKILL)
            story += [line.split() for line in victim.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        story.append(["killed"])
        run(verify(image, story))


async def verify(image: Path, story: list[list[str]]) -> None:
    """Hold an image against what its writers have said until now."""
    promised, writers, doubtful = _told(story)
    disk = zoned(asynchronous(File(image)), zone_size=4096, conventional=0, state=Path(f"{image}.zones"))
    for zone in range(5):
        held = (await disk.report_zones(zone * 8, 1))[0]
        length = 8 if held.state is ZoneState.FULL else held.write_pointer - held.start
        if length == 0 and zone in doubtful:
            continue
        assert length >= promised[zone], (zone, story[-6:])
        found = await read(disk, zone * 8, 8)
        for sector in range(length):
            text = found[sector * 512 :][:512]
            assert any(text == (f"{zone} {sector} {turn} ".encode() * 128)[:512] for turn in writers[zone][sector])
        assert found[length * 512 :] == bytes((8 - length) * 512)
    await disk.disconnect()


def _told(story: list[list[str]]) -> tuple[list[int], list[list[list[int]]], set[int]]:
    """Of each zone the sectors that are promised, and of each sector the turns since its last reset that wrote it.

    And the zones of which nobody knows whether they have been reset, as that was when the kill came.
    """
    promised = [0] * 5
    writers: list[list[list[int]]] = [[[] for _ in range(8)] for _ in range(5)]
    doubtful: set[int] = set()
    last = [""]
    for word, *numbers in story:
        zone, *rest = map(int, numbers or ["0"])
        if word == "killed" and last[0] == "resetting":
            doubtful.add(int(last[1]))
        last = [word, *numbers]
        if word == "reset" or (word == "writing" and rest[0] == 0 and zone in doubtful):
            doubtful.discard(zone)
            promised[zone] = 0
            writers[zone] = [[] for _ in range(8)]
        if word == "written":
            promised[zone] = rest[0]
        elif word == "writing":
            at, turn, count = rest
            for sector in range(at, at + count):
                writers[zone][sector].append(turn)
    return promised, writers, doubtful


# The file.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a file of zones goes."""
    return tmp_path / "zones"


def test_a_torn_record_is_ignored(path: Path) -> None:
    """Cut anywhere in the last record, the file tells what it told before."""
    file = ZoneFile(path, GEOMETRY, read_only=False)
    file.store({1: Record(ZoneState.CLOSED, 3)})
    whole = path.read_bytes()
    file.store({1: Record(ZoneState.FULL, 8)})
    longer = path.read_bytes()
    file.close()
    for length in range(len(whole), len(longer)):
        path.write_bytes(longer[:length])
        assert stored(path) == {1: Record(ZoneState.CLOSED, 3)}
        path.write_bytes(longer[:length] + bytes(len(longer) - length))
        assert stored(path) == {1: Record(ZoneState.CLOSED, 3)}
    path.write_bytes(longer)
    assert stored(path) == {1: Record(ZoneState.FULL, 8)}


def test_what_is_stored_after_a_torn_record_is_found(path: Path) -> None:
    """Opening the file writes it anew, without the torn end."""
    file = ZoneFile(path, GEOMETRY, read_only=False)
    file.store({1: Record(ZoneState.CLOSED, 3)})
    file.close()
    path.write_bytes(path.read_bytes() + b"torn")
    file = ZoneFile(path, GEOMETRY, read_only=False)
    file.store({2: Record(ZoneState.CLOSED, 1)})
    file.close()
    assert stored(path) == {1: Record(ZoneState.CLOSED, 3), 2: Record(ZoneState.CLOSED, 1)}


def test_after_a_failed_write_the_file_is_written_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What follows a record that may be torn would not be found."""
    file = ZoneFile(path, GEOMETRY, read_only=False)
    real = os.pwrite

    def short(fd: int, data: bytes, at: int) -> int:
        real(fd, data[:7], at)
        raise OSError(28, "full")

    monkeypatch.setattr(os, "pwrite", short)
    with pytest.raises(OSError, match="full"):
        file.store({1: Record(ZoneState.CLOSED, 3)})
    monkeypatch.setattr(os, "pwrite", real)
    assert file.records == {}
    file.store({2: Record(ZoneState.CLOSED, 1)})
    file.store({3: Record(ZoneState.CLOSED, 2)})
    file.close()
    assert stored(path) == {2: Record(ZoneState.CLOSED, 1), 3: Record(ZoneState.CLOSED, 2)}


def test_the_log_does_not_grow_without_end(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has grown it is written anew, and tells the same."""
    monkeypatch.setattr("vmmblk.filters.zone_file._GROWTH", 1000)
    file = ZoneFile(path, GEOMETRY, read_only=False)
    for turn in range(1, 1000):
        file.store({1: Record(ZoneState.CLOSED, turn), 2: Record(ZoneState.CLOSED, 1)})
    assert path.stat().st_size < 2000
    assert stored(path) == {1: Record(ZoneState.CLOSED, 999), 2: Record(ZoneState.CLOSED, 1)}
    file.close()
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_what_does_not_change_is_not_written(path: Path) -> None:
    """A record that says what is known already costs nothing."""
    file = ZoneFile(path, GEOMETRY, read_only=False)
    file.store({1: Record(ZoneState.CLOSED, 3)})
    size = path.stat().st_size
    file.store({1: Record(ZoneState.CLOSED, 3), 2: Record(ZoneState.EMPTY, 0)})
    file.close()
    assert path.stat().st_size == size


def test_a_record_is_stable_before_store_returns(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each append ends in fdatasync; a file written anew is synced before it is renamed, its folder afterwards."""
    done: list[str] = []
    for name in ("pwrite", "fdatasync", "fsync", "rename"):
        real = getattr(os, name)

        def traced(*arguments: Any, name: str = name, real: Any = real) -> Any:
            done.append(name)
            return real(*arguments)

        monkeypatch.setattr(os, name, traced)
    file = ZoneFile(path, GEOMETRY, read_only=False)
    assert done == ["pwrite", "fsync", "rename", "fsync"]
    done.clear()
    file.store({1: Record(ZoneState.CLOSED, 3)})
    assert done == ["pwrite", "fdatasync"]
    file.close()


@pytest.mark.parametrize("content", [b"", b"something else altogether" * 9], ids=["empty", "other"])
def test_a_file_of_something_else_is_left_alone(path: Path, content: bytes) -> None:
    """It is refused, and not written."""
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ConfigError, match="does not hold zones; name another file with state="):
            ZoneFile(path, GEOMETRY, read_only=False)
    assert path.read_bytes() == content


def test_a_file_has_one_writer(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one is refused, also when the file was just made or has been written anew; who only looks is not."""
    monkeypatch.setattr("vmmblk.filters.zone_file._GROWTH", 100)
    file = ZoneFile(path, GEOMETRY, read_only=False)
    for turn in range(1, 20):
        with pytest.raises(ConfigError, match=f"^{path} is in use by another server; end it, or name another file"):
            ZoneFile(path, GEOMETRY, read_only=False)
        assert stored(path) == file.records
        file.store({1: Record(ZoneState.CLOSED, turn)})
    file.close()
    again = ZoneFile(path, GEOMETRY, read_only=False)
    assert again.records == {1: Record(ZoneState.CLOSED, 19)}
    again.close()


def test_a_file_that_is_replaced_while_it_is_opened_is_opened_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was there first still has it, or has ended and left what is there now."""
    file = ZoneFile(path, GEOMETRY, read_only=False)
    real = fcntl.flock

    def late(fd: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        file.store({1: Record(ZoneState.CLOSED, 3)})
        file._rewrite(dict(file.records))
        file.close()
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", late)
    again = ZoneFile(path, GEOMETRY, read_only=False)
    assert again.records == {1: Record(ZoneState.CLOSED, 3)}
    with pytest.raises(ConfigError, match="in use"):
        ZoneFile(path, GEOMETRY, read_only=False)
    again.close()


def test_two_servers_do_not_share_the_zones_of_a_disk(path: Path) -> None:
    """Whatever their disks are, and until the first has ended."""
    first = zoned(state=path)
    with pytest.raises(ConfigError, match="in use by another server"):
        zoned(state=path)
    run(first.disconnect())
    run(zoned(state=path).disconnect())


def test_a_file_of_another_geometry_is_refused(path: Path) -> None:
    """Zones of another size would claim other sectors."""
    ZoneFile(path, GEOMETRY, read_only=False).close()
    with pytest.raises(ConfigError, match="of another size or disk"):
        ZoneFile(path, Geometry(512, 64, 16, 16, 1), read_only=True)


def test_a_file_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    """One line says which and why."""
    with pytest.raises(ConfigError, match=r"cannot keep zones in .*No such file"):
        ZoneFile(tmp_path / "missing" / "zones", GEOMETRY, read_only=False)


# The command line.


def test_filters_are_named_on_the_command_line(tmp_path: Path) -> None:
    """The first is on top; an image remembers its zones beside itself, memory nowhere."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    disk: Any = open_disk(str(image), filters=["zoned:zone_size=64K,conventional=2,max_open=3"])
    assert (disk.zoning().zone_sectors, disk.zoning().max_open) == (128, 3)
    run(disk.disconnect())
    assert (tmp_path / "disk.img.zones").exists()
    disk = open_disk("memory:1M", filters=["readonly", "zoned:zone_size=64K,model=host-aware"])
    assert not disk.info.read_write
    assert disk.zoning().model.name == "HOST_AWARE"
    elsewhere = tmp_path / "elsewhere"
    open_disk("memory:1M", filters=[f"zoned:zone_size=64K,state={elsewhere}"])
    assert elsewhere.exists()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("zoomed", "there is no filter zoomed; there are readonly, zoned"),
        ("zoned", "--filter zoned needs the parameter zone_size"),
        ("zoned:zone_size", "'zone_size' is not a parameter"),
        ("zoned:zone_size=64K,colour=red", "--filter zoned has no parameter colour"),
        ("zoned:zone_size=64K,model=drive-managed", "model=drive-managed is wrong"),
        ("zoned:zone_size=60K", "--filter zoned: zone_size is 61440; it must be a power of two"),
        ("zoned:zone_size=64K,zone_capacity=65K", "zone_capacity must be a multiple of 512"),
        ("zoned:zone_size=64K,conventional=16", "conventional must be from 0 to 15"),
        ("zoned:zone_size=64K,write_granularity=700", "write_granularity is 700"),
        ("zoned:zone_size=64K,max_open=4,max_active=3", "max_open not above max_active"),
        ("zoned:zone_size=64K,max_open=-1", "must not be negative"),
        ("zoned:zone_size=64K,max_append=100", "max_append must be a multiple of 512"),
        ("zoned:zone_size=4T", "less than 2 TiB"),
        ("readonly:hard=yes", "--filter readonly has no parameter hard; it takes none"),
        ("readonly:block=1", "--filter readonly has no parameter block; it takes none"),
    ],
)
def test_mistakes_in_filters_are_told_in_one_line(text: str, complaint: str) -> None:
    """Which filter, and what is wrong."""
    with pytest.raises(ConfigError) as told:
        open_disk("memory:1M", filters=[text])
    assert complaint in str(told.value)
    assert "\n" not in str(told.value)


def test_too_many_zones_are_refused() -> None:
    """Each takes memory."""
    with pytest.raises(ConfigError, match="make zone_size bigger"):
        open_disk("null:1T", filters=["zoned:zone_size=512"])


def test_a_block_device_has_no_place_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev is no folder for files: the user says where."""
    monkeypatch.setattr(Path, "is_block_device", lambda _: True)
    with pytest.raises(ConfigError, match="say with state=FILE"):
        open_disk("memory:1M", filters=["zoned:zone_size=64K"])
