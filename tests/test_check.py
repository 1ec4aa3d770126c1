"""The checks that authors run their disks through: what is right passes, and what is wrong is told by a sentence."""

# ruff: noqa: ANN001, ANN201, ANN202, ARG002, D101, D102 - broken disks, each by what it overrides
from __future__ import annotations

import asyncio
import errno
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from zoned_hosts import ZonedHost

from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.backends.null import Null
from vmmblk.block import Block, Lifetime, Operation, ZoneModel, ZoneState, ZoneType
from vmmblk.check import CheckFailed, check_block
from vmmblk.errors import Unimplemented, ZoneActiveResource, ZoneInvalidCommand, ZoneOpenResource
from vmmblk.filters.readonly import ReadOnly
from vmmblk.filters.threaded import asynchronous
from vmmblk.filters.zoned import Zoned

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 16  # sectors of a zone


def zoned(kind: type[Zoned] = Zoned, disk: Any = None, **options: Any) -> Zoned:
    """Zones of 16 sectors, the first of them conventional, over a disk of 128."""
    return kind(Memory(128) if disk is None else disk, **{"zone_size": SIZE * 512, "conventional": 1, **options})


# What is right.


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conventional": 0},
        {"conventional": 7},
        {"zone_capacity": 12 * 512},
        {"max_open": 2, "max_active": 3},
        {"max_open": 3, "max_active": 3},
        {"max_open": 1},
        {"max_active": 4},
        {"write_granularity": 1024},
        {"max_append": 0},
        {"max_append": 512},
        {"model": "host-aware"},
        {"model": "host-aware", "zone_capacity": 12 * 512, "max_open": 2},
        {"zone_size": 128 * 512, "conventional": 0},
    ],
)
def test_the_zoned_filter_keeps_the_contract(options: dict[str, Any]) -> None:
    """With every option that changes what is allowed."""
    asyncio.run(check_block(lambda: zoned(**options)))


@pytest.mark.parametrize("model", ["host-managed", "host-aware"])
def test_the_zoned_filter_over_a_file_keeps_the_contract(tmp_path: Path, model: Any) -> None:
    """Zones are what they were when image and state are opened again; sectors of 4096 bytes."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(128 * 4096))
    asyncio.run(
        check_block(
            lambda: zoned(
                disk=asynchronous(File(image, sector_size=4096)),
                zone_size=SIZE * 4096,
                model=model,
                state=tmp_path / "zones",
            ),
            persistent=True,
        )
    )


def test_a_zoned_disk_that_stores_nothing_keeps_the_rest() -> None:
    """Zones over null have write pointers and no data."""
    asyncio.run(check_block(lambda: zoned(disk=Null(128)), stores=False))


def test_a_zoned_disk_that_is_read_only_keeps_the_contract() -> None:
    """It tells of its zones, and refuses the rest."""
    asyncio.run(check_block(lambda: ReadOnly(zoned())))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sector_size": 4096},
        {"max_open": 2, "max_active": 3},
        {"zone_capacity": 12, "granularity": 1024},
        {"model": ZoneModel.HOST_AWARE},
        {"tells_capacity": False, "append_bytes": 0},
    ],
)
def test_a_zoned_device_of_the_host_keeps_the_contract(tmp_path: Path, options: dict[str, Any]) -> None:
    """The same host is opened again and again; what was in its zones goes."""
    host = ZonedHost(tmp_path, **options)
    asyncio.run(check_block(host.device, persistent=True))


class Erasing(Memory):
    """A disk with everything."""

    def identify(self) -> str:
        return "serial"

    def lifetime(self) -> Lifetime:
        return Lifetime(1, 2, 3)


def test_a_disk_with_everything_keeps_the_contract() -> None:
    """Secure erase, lifetime and serial among it."""
    asyncio.run(check_block(lambda: Erasing(64)))
    asyncio.run(check_block(lambda: ReadOnly(Erasing(64))))


# What is wrong with erasing, zeroing and telling.


class ErasesNothing(Erasing):
    async def secure_erase(self, sector_start, sectors):
        pass


class ErasesTooMuch(Erasing):
    async def secure_erase(self, sector_start, sectors):
        await super().secure_erase(0, sector_start + sectors)


class ErasesTooLittle(Erasing):
    async def secure_erase(self, sector_start, sectors):
        await super().secure_erase(sector_start, sectors - 1)


class ZeroesNoEnd(Erasing):
    async def write_zeroes(self, sector_start, sectors, unmap):
        if sector_start + sectors < 64:
            await super().write_zeroes(sector_start, sectors, unmap)


class ZeroesWithoutUnmapOnly(Erasing):
    async def write_zeroes(self, sector_start, sectors, unmap):
        if not unmap:
            await super().write_zeroes(sector_start, sectors, unmap)


class CachesTooLong(Erasing):
    """Write-back that forgets what happened in between."""

    def __init__(self, sectors: int) -> None:
        super().__init__(sectors)
        self.cached: list[tuple[int, list[bytes]]] = []

    async def write_cached(self, sector_start, buffers):
        await super().write(sector_start, buffers)
        self.cached.append((sector_start, [bytes(each) for each in buffers]))

    async def flush(self):
        for sector, buffers in self.cached:
            await super().write(sector, [memoryview(bytearray(each)) for each in buffers])


class DiscardsAround(Erasing):
    async def discard(self, sector_start, sectors):
        await super().discard(sector_start, sectors + 1)


class LongSerial(Erasing):
    def identify(self) -> str:
        return "x" * 21


class WornUnknown(Erasing):
    def lifetime(self) -> Any:
        return (1, 2, 3)


class OffersWhatItLacks(Erasing):
    async def secure_erase(self, sector_start, sectors):
        raise Unimplemented("not yet")


@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        (ErasesNothing, "erased securely is never read"),
        (ErasesTooMuch, "secure_erase leaves the sectors around it alone"),
        (ErasesTooLittle, "erased securely is never read"),
        (ZeroesNoEnd, "zeroes the last sector"),
        (ZeroesWithoutUnmapOnly, r"write_zeroes\(unmap=True\) zeroes"),
        (CachesTooLong, "does not bring back what was zeroed"),
        (DiscardsAround, "discard leaves the sectors around it alone"),
        (LongSerial, "at most 20 characters"),
        (WornUnknown, "gives a Lifetime"),
    ],
)
def test_a_disk_that_breaks_a_promise_is_told(broken: Callable[[int], Block], sentence: str) -> None:
    """By the sentence that it breaks."""
    with pytest.raises(CheckFailed, match=sentence):
        asyncio.run(check_block(lambda: broken(64)))


def test_what_is_offered_is_there() -> None:
    """An operation that is offered and then missing is let through as what it is."""
    with pytest.raises(Unimplemented, match="not yet"):
        asyncio.run(check_block(lambda: OffersWhatItLacks(64)))


# What is wrong with zones.


class NotInOrder(Zoned):
    """Takes writes anywhere."""

    async def write(self, sector_start, buffers):
        await self.block.write(sector_start, buffers)
        zone = sector_start // SIZE
        for piece in self._table.cut(sector_start, self._sectors(buffers)):
            if piece.zone == zone:
                self._table.write(piece)


class WrongError(Zoned):
    """Tells of any rule in the same way."""

    async def write(self, sector_start, buffers):
        try:
            await super().write(sector_start, buffers)
        except (ZoneInvalidCommand, ZoneOpenResource, ZoneActiveResource):
            raise
        except Exception as exc:
            raise OSError(errno.EIO, "no") from exc


class WritesFirst(Zoned):
    """Refuses a write when it has been done."""

    async def write(self, sector_start, buffers):
        await self.block.write(sector_start, buffers)
        await super().write(sector_start, buffers)


class AppendsElsewhere(Zoned):
    """Tells the zone, not the sector."""

    async def append(self, sector_start, buffers):
        await super().append(sector_start, buffers)
        return sector_start


class AppendsAtOnce(Zoned):
    """Looks at the write pointer, and only then waits."""

    async def append(self, sector_start, buffers):
        zone = self._table.named(sector_start)
        piece = self._table.check_append(zone, self._sectors(buffers))
        await asyncio.sleep(0)
        await self.block.write(self._table.start(zone) + piece.offset, buffers)
        self._table.write(piece)
        return self._table.start(zone) + piece.offset


class AppendsAnywhere(Zoned):
    """Takes any sector of a zone for the zone."""

    async def append(self, sector_start, buffers):
        return await super().append(sector_start - sector_start % SIZE, buffers)


class ReportsTooMuch(Zoned):
    async def report_zones(self, sector_start, count):
        return await super().report_zones(sector_start, count + 1)


class ReportsFromTheStart(Zoned):
    """Begins with the zone that starts there."""

    async def report_zones(self, sector_start, count):
        return await super().report_zones(-(-sector_start // SIZE) * SIZE if sector_start < 112 else 112, count)


class ReportsOffsets(Zoned):
    """Tells write pointers from the start of the zone."""

    async def report_zones(self, sector_start, count):
        zones = await super().report_zones(sector_start, count)
        return [replace(zone, write_pointer=zone.write_pointer - zone.start) for zone in zones]


class ReportsBigZones(Zoned):
    async def report_zones(self, sector_start, count):
        zones = await super().report_zones(sector_start, count)
        return [replace(zone, capacity=zone.capacity + 1) for zone in zones]


class ReportsTypes(Zoned):
    """Preferred, on a disk that is host-managed."""

    async def report_zones(self, sector_start, count):
        zones = await super().report_zones(sector_start, count)
        return [replace(z, type=ZoneType.SEQUENTIAL_PREFERRED) if z.start else z for z in zones]


class ResetsThePointer(Zoned):
    """Empties a zone and leaves its data for who reads."""

    async def read(self, sector_start, buffers):
        self._table.pieces(sector_start, self._sectors(buffers))
        await self.block.read(sector_start, buffers)


class ResetsNothing(Zoned):
    async def reset_zone(self, sector_start):
        pass


class ResetsTooMuch(Zoned):
    async def reset_zone(self, sector_start):
        await super().reset_zone(sector_start)
        await self.reset_all_zones()


class FinishesSoftly(Zoned):
    """Closes what is to be full."""

    async def finish_zone(self, sector_start):
        await super().close_zone(sector_start)


class FinishesForGood(Zoned):
    """Refuses to finish what is full already."""

    async def finish_zone(self, sector_start):
        if self._table.state(sector_start // SIZE) is ZoneState.FULL:
            raise ZoneInvalidCommand("it is full")
        await super().finish_zone(sector_start)


class OpensFull(Zoned):
    """Opens what is full."""

    async def open_zone(self, sector_start):
        zone = self._table.sequential(sector_start)
        if self._table.state(zone) is not ZoneState.FULL:
            await super().open_zone(sector_start)


class ClosesToClosed(Zoned):
    """Closes a zone that holds nothing."""

    async def close_zone(self, sector_start):
        zone = self._table.sequential(sector_start)
        await super().close_zone(sector_start)
        self._table._enter(zone, ZoneState.CLOSED)


class TakesMiddles(Zoned):
    async def open_zone(self, sector_start):
        await super().open_zone(sector_start - sector_start % SIZE)


class TakesConventional(Zoned):
    async def reset_zone(self, sector_start):
        if sector_start:
            await super().reset_zone(sector_start)


class NoOpenLimit(Zoned):
    async def open_zone(self, sector_start):
        zone = self._table.sequential(sector_start)
        self._table._check_writable(zone, full_is_fine=False)
        self._table._enter(zone, ZoneState.EXPLICIT_OPEN)


class NoActiveLimit(Zoned):
    async def write(self, sector_start, buffers):
        active, self._table.active = self._table.active, 0
        try:
            await super().write(sector_start, buffers)
        finally:
            self._table.active += active


class SwapsLimits(Zoned):
    """Tells of the one limit when the other is met."""

    async def open_zone(self, sector_start):
        try:
            await super().open_zone(sector_start)
        except ZoneOpenResource as exc:
            raise ZoneActiveResource("there are too many") from exc


class LeavesZones(Zoned):
    """Writes on into the next zone."""

    async def write(self, sector_start, buffers):
        room = SIZE - sector_start % SIZE
        if sector_start >= SIZE and self._sectors(buffers) > room:
            return
        await super().write(sector_start, buffers)


class ReadsOn(Zoned):
    async def read(self, sector_start, buffers):
        at = sector_start
        for buffer in buffers:
            for sector in range(len(buffer) // 512):
                await super().read(at + sector, [buffer[sector * 512 : (sector + 1) * 512]])
            at += len(buffer) // 512


class CachesPointers(Zoned):
    """Moves the write pointer with the flush."""

    async def write_cached(self, sector_start, buffers):
        await self.block.write(sector_start, buffers)


class NeverFull(Zoned):
    """Stays open when there is no room left."""

    async def write(self, sector_start, buffers):
        await super().write(sector_start, buffers)
        zone = sector_start // SIZE
        if zone and self._table.state(zone) is ZoneState.FULL:
            self._table._enter(zone, ZoneState.IMPLICIT_OPEN)


class ResetsConventional(Zoned):
    """Zeroes everything when all zones are reset."""

    async def reset_all_zones(self):
        await super().reset_all_zones()
        await self.block.write_zeroes(0, SIZE, unmap=False)


class ErasesParts(Zoned):
    async def secure_erase(self, sector_start, sectors):
        if sectors == SIZE:
            await super().secure_erase(sector_start, sectors)


class ErasesData(Zoned):
    """Erases what zones hold, and leaves them full of it."""

    async def secure_erase(self, sector_start, sectors):
        if sectors != SIZE:
            raise ZoneInvalidCommand("whole zones only")
        await self.block.secure_erase(sector_start, sectors)


class TakesNothing(Zoned):
    """Appends that are too small."""

    async def append(self, sector_start, buffers):
        half = self.zoning().write_granularity // 2
        if sum(map(len, buffers)) == half:
            return sector_start
        return await super().append(sector_start, buffers)


@pytest.mark.parametrize(
    ("broken", "options", "sentence"),
    [
        (NotInOrder, {}, "not at the write pointer fails with ZoneUnalignedWritePointer"),
        (WrongError, {}, "fails with ZoneUnalignedWritePointer, not with OSError"),
        (WritesFirst, {}, "written before a write that was refused"),
        (AppendsElsewhere, {}, "append returns the first sector written"),
        (AppendsAtOnce, {}, "appends at the same time"),
        (AppendsAnywhere, {}, "appending at a sector that starts no zone"),
        (ReportsTooMuch, {}, "a report"),
        (ReportsFromTheStart, {}, "the zone that holds it"),
        (ReportsOffsets, {}, "write pointer of zone 1"),
        (ReportsBigZones, {}, "capacity of zone 0 is at most its size"),
        (ReportsTypes, {}, "of the disk's model"),
        (ResetsThePointer, {}, "before it was reset"),
        (ResetsNothing, {}, "a reset|leads to EMPTY"),
        (ResetsTooMuch, {}, "while another is reset"),
        (FinishesSoftly, {}, "gets there|leads to"),
        (FinishesForGood, {}, "finish_zone of a zone that is FULL leads to FULL"),
        (OpensFull, {}, "open_zone of a zone that is FULL leads to a refusal"),
        (ClosesToClosed, {}, "is empty when it is closed"),
        (TakesMiddles, {}, "open_zone of a sector in the middle"),
        (TakesConventional, {}, "reset_zone of a sector that starts a conventional zone"),
        (NoOpenLimit, {"max_open": 2}, "open_zone at the limit max_open"),
        (NoActiveLimit, {"max_active": 3}, "at the limit max_active|3 can be"),
        (SwapsLimits, {"max_open": 2}, "fails with ZoneOpenResource, not with ZoneActiveResource"),
        (LeavesZones, {}, "writing more than a zone has room for"),
        (ReadsOn, {}, "reading on into another zone"),
        (CachesPointers, {"disk": "file"}, "write_cached moves the write pointer at once"),
        (NeverFull, {}, "written to its capacity is full"),
        (ResetsConventional, {}, "written in a conventional zone"),
        (ErasesParts, {}, "a secure erase of a part of a zone fails"),
        (ErasesData, {}, "a secure erase resets a zone"),
        (TakesNothing, {"write_granularity": 1024}, "appending less than write_granularity"),
    ],
)
def test_a_zoned_disk_that_breaks_a_rule_is_told(
    tmp_path: Path, broken: type[Zoned], options: dict[str, Any], sentence: str
) -> None:
    """By the sentence that it breaks; each of these disks breaks one."""
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(128 * 512))
    options = dict(options)
    on_file = options.pop("disk", None) is not None
    with pytest.raises(CheckFailed, match=sentence):
        asyncio.run(check_block(lambda: zoned(broken, disk=asynchronous(File(image)) if on_file else None, **options)))


def test_zones_that_are_not_remembered_are_told() -> None:
    """Whoever says that a disk is persistent is held to it, in its zones too."""
    disk = Memory(128)
    disk.disconnect = lambda: None  # type: ignore[method-assign]
    with pytest.raises(CheckFailed, match="when the disk is opened again"):
        asyncio.run(check_block(lambda: zoned(disk=disk), persistent=True))


def test_a_disk_without_a_zone_to_write_is_told() -> None:
    """There is nothing to check then."""

    class Conventional(Zoned):
        async def report_zones(self, sector_start, count):
            zones = await super().report_zones(sector_start, count)
            kind, state = ZoneType.CONVENTIONAL, ZoneState.NOT_WRITE_POINTER
            return [replace(zone, type=kind, state=state) for zone in zones]

    with pytest.raises(CheckFailed, match="needs a sequential zone"):
        asyncio.run(check_block(lambda: zoned(Conventional)))


def test_the_checks_need_no_operation_that_a_disk_lacks() -> None:
    """A zoned disk without a cache is checked without one."""
    assert Operation.FLUSH not in zoned().operations
