"""Checks of a disk that has zones: SupportsZones, and the states that docs/zoned.md tells of.

Each begins with a disk whose zones have been reset.  Where VIRTIO leaves an outcome open, as that of closing an empty
zone, every outcome is right that keeps to the rest.
"""

from __future__ import annotations

import asyncio
import mmap
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.block import Operation, Zone, ZoneModel, ZoneState, ZoneType, Zoning, operations
from vmmblk.check.helpers import CheckFailed, must_fail, pattern, read, require
from vmmblk.errors import (
    BlockError,
    Disconnected,
    IsReadOnly,
    ZoneActiveResource,
    ZoneInvalidCommand,
    ZoneOpenResource,
    ZoneUnalignedWritePointer,
)
from vmmblk.filters.checked import Checked

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence
    from typing import Any

    from vmmblk.block import Block

    Check = Callable[["Zones"], Coroutine[Any, Any, None]]

__all__ = ["check_zones"]

E, I, X, C, F = (  # noqa: E741
    ZoneState.EMPTY,
    ZoneState.IMPLICIT_OPEN,
    ZoneState.EXPLICIT_OPEN,
    ZoneState.CLOSED,
    ZoneState.FULL,
)
_OPEN = {I, X}
_ACTIVE = {I, X, C}
_POINTED = {E, I, X, C}
_DEAD = {ZoneState.READ_ONLY, ZoneState.OFFLINE}
_RESOURCES = (ZoneOpenResource, ZoneActiveResource)

_FILLED = 1 << 25  # bytes; zones that are bigger are not written from end to end

# What each command may make of a zone in each state; None is a refusal.
_COMMANDS: dict[str, dict[ZoneState, set[ZoneState | None]]] = {
    "open_zone": {E: {X}, I: {X}, X: {X}, C: {X}, F: {None}},
    "close_zone": {E: {None, E}, I: {C}, X: {C}, C: {C}, F: {None}},
    "finish_zone": {E: {F, None}, I: {F}, X: {F}, C: {F, None}, F: {F}},
    "reset_zone": {E: {E}, I: {E}, X: {E}, C: {E}, F: {E}},
}


@dataclass(frozen=True, slots=True)
class Zones:
    """A disk whose zones have been reset, and what there is to work with."""

    disk: Checked
    zoning: Zoning
    sequential: Sequence[Zone]
    """Those that can be written."""
    conventional: Sequence[Zone]
    stores: bool

    @property
    def in_order(self) -> bool:
        """Whether a sequential zone takes writes at its write pointer only."""
        return self.zoning.model is ZoneModel.HOST_MANAGED

    @property
    def unit(self) -> int:
        """Sectors of the smallest write."""
        return max(self.zoning.write_granularity // self.disk.info.sector_size, 1)

    def data(self, units: int, seed: int) -> list[memoryview]:
        """Data for a write, a buffer for each unit."""
        size = self.unit * self.disk.info.sector_size
        whole = pattern(self.disk, units * self.unit, seed)
        return [whole[at : at + size] for at in range(0, len(whole), size)]

    async def look(self, zone: Zone) -> Zone:
        """A zone as it is now."""
        return (await self.disk.report_zones(zone.start, 1))[0]

    async def holds(self, sector: int, data: Sequence[memoryview], what: str) -> None:
        """Raises CheckFailed unless ``data`` is read from ``sector`` on."""
        expected = b"".join(data)
        if self.stores:
            found = await read(self.disk, sector, len(expected) // self.disk.info.sector_size)
            require(found == expected, f"{what} is read from sector {sector}")

    async def gone(self, sector: int, data: Sequence[memoryview], what: str) -> None:
        """Raises CheckFailed if any sector of ``data`` is still read from ``sector`` on."""
        size, old = self.disk.info.sector_size, b"".join(data)
        for index in range(len(old) // size):
            try:
                found = await read(self.disk, sector + index, 1)
            except (BlockError, OSError):
                continue  # a disk may refuse to read what is not written
            require(found != old[index * size : (index + 1) * size], f"{what} is never read again")

    async def refuses(self, zone: Zone, call: Awaitable[object], error: Any, what: str) -> None:
        """Raises CheckFailed unless ``call`` fails with ``error`` and ``zone`` stays as it is."""
        before = await self.look(zone)
        await must_fail(call, error, what)
        require(await self.look(zone) == before, f"{what} changes nothing")

    async def bring(self, zone: Zone, state: ZoneState) -> Zone:
        """Have a zone that is empty be in ``state``, with a unit of data in it unless that is EMPTY."""
        if state is X:
            await self.disk.open_zone(zone.start)
        if state is not E:
            await self.disk.write(zone.start, self.data(1, state))
        if state is C:
            await self.disk.close_zone(zone.start)
        elif state is F:
            await self.disk.finish_zone(zone.start)
        now = await self.look(zone)
        require(now.state is state, f"a zone on its way to {state.name} gets there, not to {now.state.name}")
        return now


async def check_zones(make: Callable[[], Block], *, stores: bool, persistent: bool) -> None:
    """Run the checks of zones on what ``make`` gives, as :func:`vmmblk.check.check_block` does."""
    disk = Checked(make())
    writable = disk.info.read_write
    await disk.disconnect()
    checks: list[Check] = [_tells_its_zones, _ends]
    if writable:
        checks += [_writes, _stays_inside, _fills, _commands, _names, _limits, _resets, _finishes, _keeps_conventional]
        checks += [_appends, _appends_together]
        checks += [_caches] if Operation.FLUSH in operations(disk) else []
    else:
        checks += [_refuses_changes]
    for check in checks:
        disk = Checked(make())
        try:
            await check(await _zones(disk, stores=stores))
        finally:
            await disk.disconnect()
    if writable and persistent:
        await _persists(make, stores=stores)


async def _zones(disk: Checked, *, stores: bool) -> Zones:
    if disk.info.read_write:
        await disk.reset_all_zones()
    zones = await disk.report_zones(0, -(-disk.info.size_sectors // disk.zoning().zone_sectors))
    conventional = [zone for zone in zones if zone.type is ZoneType.CONVENTIONAL]
    sequential = [zone for zone in zones if zone.type is not ZoneType.CONVENTIONAL and zone.state not in _DEAD]
    require(bool(sequential), "to be checked a disk needs a sequential zone that can be written")
    if disk.info.read_write:
        require(all(zone.state is E for zone in sequential), "reset_all_zones empties every sequential zone")
    return Zones(disk, disk.zoning(), sequential, conventional, stores)


# Looking.


async def _tells_its_zones(z: Zones) -> None:
    """Zoning and report_zones agree with each other, and reports in parts with the whole."""
    disk, zoning, size = z.disk, z.zoning, z.disk.info.size_sectors
    require(zoning == disk.zoning(), "zoning is always the same")
    require(zoning.zone_sectors > 0, "a zone has sectors")
    require(zoning.write_granularity >= disk.info.sector_size, "write_granularity is a sector or more")
    require(zoning.write_granularity % disk.info.sector_size == 0, "write_granularity is whole sectors")
    require(zoning.max_append_sectors % z.unit == 0, "the largest append is a multiple of write_granularity")
    require(min(zoning.max_open, zoning.max_active, zoning.max_append_sectors) >= 0, "no limit is negative")
    if zoning.max_active:
        require(zoning.max_open <= zoning.max_active, "an open zone is active, so max_open is at most max_active")
    count = -(-size // zoning.zone_sectors)
    zones = list(await disk.report_zones(0, count + 1))
    require(len(zones) == count, f"there are {count} zones in a report of all, not {len(zones)}")
    kind = ZoneType.SEQUENTIAL_REQUIRED if z.in_order else ZoneType.SEQUENTIAL_PREFERRED
    for index, zone in enumerate(zones):
        require(zone.start == index * zoning.zone_sectors, f"zone {index} begins where the one before it ends")
        length = min(zoning.zone_sectors, size - zone.start)
        require(0 < zone.capacity <= length, f"the capacity of zone {index} is at most its size")
        require(zone.type in (ZoneType.CONVENTIONAL, kind), f"the type of zone {index} is of the disk's model")
        none = zone.type is ZoneType.CONVENTIONAL
        require(
            (zone.state is ZoneState.NOT_WRITE_POINTER) == none,
            f"zone {index} has a write pointer unless it is conventional",
        )
        if zone.state in _POINTED:
            inside = zone.start <= zone.write_pointer <= zone.start + zone.capacity
            require(inside, f"the write pointer of zone {index} is in the zone")
        if zone.state is E:
            require(
                zone.write_pointer == zone.start, f"the write pointer of zone {index}, which is empty, is its start"
            )
        last = zone.start + length - 1
        for sector in {zone.start, last}:
            part = list(await disk.report_zones(sector, 1))
            require(part == [zone], f"a report of one zone from sector {sector} on is the zone that holds it")
    require(list(await disk.report_zones(0, 0)) == [], "a report of no zones is empty")
    require(list(await disk.report_zones(0, 2)) == zones[:2], "a report is no longer than was asked for")
    await must_fail(disk.report_zones(size, 1), ZoneInvalidCommand, "a report from outside the disk")


async def _ends(z: Zones) -> None:
    """After disconnect every call fails with Disconnected."""
    disk, start = z.disk, z.sequential[0].start
    await disk.disconnect()
    await must_fail(disk.report_zones(start, 1), Disconnected, "report_zones after disconnect")
    for name, call in _changes(z, start):
        await must_fail(call, Disconnected, f"{name} after disconnect")


async def _refuses_changes(z: Zones) -> None:
    """A read-only disk tells of its zones and changes none."""
    start = z.sequential[0].start
    for name, call in _changes(z, start):
        await z.refuses(z.sequential[0], call, IsReadOnly, f"{name} on a read-only disk")


def _changes(z: Zones, start: int) -> list[tuple[str, Awaitable[object]]]:
    calls = [(name, getattr(z.disk, name)(start)) for name in _COMMANDS]
    return [*calls, ("reset_all_zones", z.disk.reset_all_zones()), ("append", z.disk.append(start, z.data(1, 1)))]


# Writing.


async def _writes(z: Zones) -> None:
    """A sequential zone is written at its write pointer, which moves on; elsewhere only if that is a preference."""
    disk, zone, unit = z.disk, z.sequential[0], z.unit
    start = zone.start
    await disk.write(start, z.data(1, 1))
    now = await z.look(zone)
    require(now.state is I, f"a zone that is written is implicitly open, not {now.state.name}")
    require(now.write_pointer == start + unit, "a write moves the write pointer to its end")
    await disk.write(start + unit, z.data(2, 2))
    require((await z.look(zone)).write_pointer == start + 3 * unit, "a write in many buffers is one write")
    await z.holds(start, [*z.data(1, 1), *z.data(2, 2)], "what was written in a zone")
    if not z.in_order:
        await disk.write(start, z.data(1, 3))
        await disk.write(start + 4 * unit, z.data(1, 4))
        require(
            (await z.look(zone)).write_pointer == start + 5 * unit,
            "the write pointer is the end of the last sector written",
        )
        await z.holds(start, [*z.data(1, 3), *z.data(2, 2)], "what was written again in a host-aware zone")
        await z.holds(start + 4 * unit, z.data(1, 4), "what was written beyond the write pointer of a host-aware zone")
        return
    for sector, where in (
        (start, "the start"),
        (start + 2 * unit, "a sector before"),
        (start + 4 * unit, "a sector after"),
    ):
        what = f"writing at {where} and not at the write pointer"
        await z.refuses(zone, disk.write(sector, z.data(1, 9)), ZoneUnalignedWritePointer, what)
    if unit > 1:
        half = [part[: len(part) // 2] for part in z.data(1, 9)]
        what = "writing less than write_granularity"
        await z.refuses(zone, disk.write(start + 3 * unit, half), ZoneUnalignedWritePointer, what)
    await z.holds(start, [*z.data(1, 1), *z.data(2, 2)], "what was written before a write that was refused")


async def _stays_inside(z: Zones) -> None:
    """A request that leaves a zone that must be written in order, or the capacity of one, is refused whole."""
    disk, unit = z.disk, z.unit
    if not z.in_order:
        return
    for zone in {z.sequential[0].start: z.sequential[0], z.sequential[-1].start: z.sequential[-1]}.values():
        room = zone.capacity - zone.capacity % unit
        beyond = min(zone.start + room + unit, disk.info.size_sectors) - zone.start
        if beyond > zone.capacity:
            with mmap.mmap(-1, beyond * disk.info.sector_size) as memory, memoryview(memory) as big:
                what = "writing more than a zone has room for"
                await z.refuses(zone, disk.write(zone.start, [big]), ZoneInvalidCommand, what)
    for zone in z.sequential:
        border = zone.start + z.zoning.zone_sectors
        if border < disk.info.size_sectors:
            target = [pattern(disk, 2, 1)]
            await must_fail(disk.read(border - 1, target), ZoneInvalidCommand, "reading on into another zone")
            return


async def _fills(z: Zones) -> None:
    """A zone that is written to its capacity is full, and takes no more; from the last sector it is read."""
    disk, zone, unit = z.disk, min(z.sequential, key=lambda zone: zone.capacity), z.unit
    if zone.capacity * disk.info.sector_size > _FILLED or zone.capacity % unit:
        return
    step = unit * max((1 << 20) // (unit * disk.info.sector_size), 1)
    for at in range(0, zone.capacity, step):
        units = min(step, zone.capacity - at) // unit
        await disk.write(zone.start + at, z.data(units, at))
    last = z.data(units, at)
    require((await z.look(zone)).state is F, "a zone that is written to its capacity is full")
    await z.holds(zone.start + at, last, "the end of a full zone")
    if z.in_order:
        for sector in (zone.start, zone.start + zone.capacity - unit):
            await z.refuses(zone, disk.write(sector, z.data(1, 9)), ZoneInvalidCommand, "writing to a full zone")
        if z.zoning.max_append_sectors:
            await z.refuses(zone, disk.append(zone.start, z.data(1, 9)), ZoneInvalidCommand, "appending to a full zone")
    await z.holds(zone.start + at, last, "a full zone after a write that was refused")


async def _appends(z: Zones) -> None:
    """An append is written at the write pointer and returns where; what cannot be appended changes nothing."""
    disk, zone, unit = z.disk, z.sequential[0], z.unit
    if not (z.in_order and z.zoning.max_append_sectors):
        return
    units = 2 if z.zoning.max_append_sectors >= 2 * unit else 1
    for seed, sector in ((1, zone.start), (2, zone.start + units * unit)):
        placed = await disk.append(zone.start, z.data(units, seed))
        require(placed == sector, f"append returns the first sector written, {sector}, not {placed}")
    await z.holds(zone.start, [*z.data(units, 1), *z.data(units, 2)], "what was appended")
    now = await z.look(zone)
    require(now.state is I, f"a zone that was appended to is implicitly open, not {now.state.name}")
    require(now.write_pointer == zone.start + 2 * units * unit, "an append moves the write pointer to its end")
    await disk.write(now.write_pointer, z.data(1, 3))
    placed = await disk.append(zone.start, z.data(1, 4))
    require(placed == now.write_pointer + unit, "an append goes behind a write")
    await disk.reset_zone(zone.start)
    what = "appending at a sector that starts no zone"
    await z.refuses(zone, disk.append(zone.start + unit, z.data(1, 9)), ZoneInvalidCommand, what)
    await z.refuses(zone, disk.append(zone.start, []), ZoneInvalidCommand, "appending nothing")
    if unit > 1:
        half = [part[: len(part) // 2] for part in z.data(1, 9)]
        what = "appending less than write_granularity"
        await z.refuses(zone, disk.append(zone.start, half), ZoneUnalignedWritePointer, what)
    for conventional in z.conventional[:1]:
        what = "appending to a conventional zone"
        await z.refuses(conventional, disk.append(conventional.start, z.data(1, 9)), ZoneInvalidCommand, what)


async def _appends_together(z: Zones) -> None:
    """Appends at the same time get sectors of their own, and nothing lies between them; writes at the same time too."""
    disk, zone = z.disk, z.sequential[0]
    count = min(16, zone.capacity // z.unit)
    if not (z.in_order and z.zoning.max_append_sectors):
        return
    placed = await asyncio.gather(*(disk.append(zone.start, z.data(1, seed)) for seed in range(count)))
    expected = [zone.start + index * z.unit for index in range(count)]
    require(sorted(placed) == expected, "appends at the same time lie one behind the other")
    for seed, sector in enumerate(placed):
        await z.holds(sector, z.data(1, seed), "what was appended at the same time as others")
    await disk.reset_zone(zone.start)
    await asyncio.gather(*(disk.write(sector, z.data(1, seed)) for seed, sector in enumerate(expected)))
    for seed, sector in enumerate(expected):
        await z.holds(sector, z.data(1, seed), "what was written at the same time as others")


async def _caches(z: Zones) -> None:
    """write_cached obeys the same rules as write, and what it wrote is read before and after the flush."""
    disk, zone, unit = z.disk, z.sequential[0], z.unit
    await disk.write_cached(zone.start, z.data(2, 1))
    require((await z.look(zone)).write_pointer == zone.start + 2 * unit, "write_cached moves the write pointer at once")
    if z.in_order:
        what = "write_cached at a sector that is not the write pointer"
        await z.refuses(zone, disk.write_cached(zone.start, z.data(1, 9)), ZoneUnalignedWritePointer, what)
    await z.holds(zone.start, z.data(2, 1), "what was written cached")
    await disk.flush()
    await z.holds(zone.start, z.data(2, 1), "what was flushed")
    await disk.write_cached(zone.start + 2 * unit, z.data(1, 2))
    await disk.reset_zone(zone.start)
    await disk.flush()
    require((await z.look(zone)).state is E, "a flush after a reset brings no write pointer back")


async def _keeps_conventional(z: Zones) -> None:
    """A conventional zone is written anywhere, and a reset of all zones leaves it alone."""
    disk, unit = z.disk, z.unit
    for zone in z.conventional[:1]:
        for sector, seed in ((4, 1), (1, 2), (1, 3)):
            await disk.write(zone.start + sector * unit, z.data(1, seed))
        before = await z.look(zone)
        await disk.reset_all_zones()
        require(await z.look(zone) == before, "a reset of all zones does not change a conventional one")
        await z.holds(zone.start + 4 * unit, z.data(1, 1), "what was written in a conventional zone")
        await z.holds(zone.start + unit, z.data(1, 3), "what was written last in a conventional zone")


# Commands.


async def _commands(z: Zones) -> None:
    """Each command makes of a zone in each state what it should, or refuses and changes nothing."""
    zone = z.sequential[0]
    for name, outcomes in _COMMANDS.items():
        for state, allowed in outcomes.items():
            before = await z.bring(zone, state)
            what = f"{name} of a zone that is {state.name}"
            try:
                await getattr(z.disk, name)(zone.start)
                outcome = (await z.look(zone)).state
            except (ZoneInvalidCommand, *_RESOURCES) as exc:
                outcome = None
                require(await z.look(zone) == before, f"{what} and is refused changes nothing")
                right = isinstance(exc, ZoneInvalidCommand) or (name == "finish_zone" and state in (E, C))
                require(right, f"{what} fails with ZoneInvalidCommand, not with {type(exc).__name__}")
            expected = " or ".join(sorted(each.name if each else "a refusal" for each in allowed))
            require(
                outcome in allowed, f"{what} leads to {expected}, not to {outcome.name if outcome else 'a refusal'}"
            )
            if state in (I, X, C, F) and outcome is not E:
                await z.holds(zone.start, z.data(1, state), f"what was written before {what}")
            await z.disk.reset_zone(zone.start)
            now = await z.look(zone)
            require(
                (now.state, now.write_pointer) == (E, zone.start),
                "a reset makes a zone empty, with its write pointer at its start",
            )
    await z.disk.open_zone(zone.start)
    await z.disk.close_zone(zone.start)
    require((await z.look(zone)).state is E, "a zone that was opened and never written is empty when it is closed")
    await z.bring(zone, C)
    await z.disk.write(zone.start + z.unit, z.data(1, 2))
    require((await z.look(zone)).state is I, "a closed zone that is written is implicitly open")
    await z.disk.open_zone(zone.start)
    await z.disk.write(zone.start + 2 * z.unit, z.data(1, 3))
    require((await z.look(zone)).state is X, "a zone that was opened explicitly stays so when it is written")


async def _names(z: Zones) -> None:
    """Commands name the start of a sequential zone."""
    wrong = [(z.sequential[0], z.sequential[0].start + 1, "in the middle of a zone")]
    wrong += [(zone, zone.start, "that starts a conventional zone") for zone in z.conventional[:1]]
    for zone, sector, where in wrong:
        for name in _COMMANDS:
            call = getattr(z.disk, name)(sector)
            await z.refuses(zone, call, ZoneInvalidCommand, f"{name} of a sector {where}")


async def _limits(z: Zones) -> None:
    """There are never more open or active zones than there can be, and who asks for one too many is told which."""
    disk, limits = z.disk, z.zoning
    if limits.max_open and len(z.sequential) > limits.max_open:
        opened, other = z.sequential[: limits.max_open], z.sequential[limits.max_open]
        for zone in opened:
            await disk.open_zone(zone.start)
        wanted = ZoneActiveResource if limits.max_active == limits.max_open else ZoneOpenResource
        await _meets_limit(z, other, wanted, "max_open")
        await disk.close_zone(opened[0].start)
        await disk.open_zone(other.start)
        await disk.reset_all_zones()
        for zone in z.sequential[: limits.max_open + 1]:
            try:
                await disk.write(zone.start, z.data(1, 1))
            except _RESOURCES:  # a disk need not close what was opened implicitly
                require(zone == other, "a write opens a zone while there are fewer open than max_open")
            await _within_limits(z)
        await disk.reset_all_zones()
    if limits.max_active and len(z.sequential) > limits.max_active:
        for zone in z.sequential[: limits.max_active]:
            await disk.write(zone.start, z.data(1, 1))
            await disk.close_zone(zone.start)
            await _within_limits(z)
        other = z.sequential[limits.max_active]
        await _meets_limit(z, other, ZoneActiveResource, "max_active")
        await disk.finish_zone(z.sequential[0].start)
        await disk.write(other.start, z.data(1, 1))
        await _within_limits(z)


async def _meets_limit(z: Zones, zone: Zone, error: type[BlockError], limit: str) -> None:
    await z.refuses(zone, z.disk.open_zone(zone.start), error, f"open_zone at the limit {limit}")
    await z.refuses(zone, z.disk.write(zone.start, z.data(1, 1)), error, f"a write at the limit {limit}")
    if z.in_order and z.zoning.max_append_sectors:
        call = z.disk.append(zone.start, z.data(1, 1))
        await z.refuses(zone, call, error, f"an append at the limit {limit}")


async def _within_limits(z: Zones) -> None:
    states = [(await z.look(zone)).state for zone in z.sequential]
    for limit, kinds in ((z.zoning.max_open, _OPEN), (z.zoning.max_active, _ACTIVE)):
        count = sum(state in kinds for state in states)
        require(
            not limit or count <= limit,
            f"{count} zones are {'open' if kinds is _OPEN else 'active'} where {limit} can be",
        )


async def _resets(z: Zones) -> None:
    """What a zone held before a reset is gone, also behind what is written then; one reset empties one zone."""
    disk, zone = z.disk, z.sequential[0]
    await disk.write(zone.start, z.data(4, 1))
    others = z.sequential[1:2]
    for other in others:
        await disk.write(other.start, z.data(1, 2))
    await disk.reset_zone(zone.start)
    if z.stores:
        await z.gone(zone.start, z.data(4, 1), "what a zone held before it was reset")
    for other in others:
        await z.holds(other.start, z.data(1, 2), "what a zone holds while another is reset")
        require((await z.look(other)).state is I, "a reset changes no other zone")
    await disk.write(zone.start, z.data(1, 3))
    await z.holds(zone.start, z.data(1, 3), "what was written after a reset")
    if z.stores:
        kept = [part for index, part in enumerate(z.data(4, 1)) if index]
        await z.gone(zone.start + z.unit, kept, "what a zone held before it was reset and written again")
    if Operation.SECURE_ERASE in operations(disk):
        await _erases(z)


async def _erases(z: Zones) -> None:
    """A secure erase is of whole zones, and resets them."""
    disk, zone = z.disk, z.sequential[0]
    before = await z.look(zone)
    try:
        await disk.secure_erase(zone.start, z.unit)
    except BlockError:
        require(await z.look(zone) == before, "a secure erase that is refused changes nothing")
    else:
        raise CheckFailed("a secure erase of a part of a zone fails; here it succeeded")
    await disk.secure_erase(zone.start, min(z.zoning.zone_sectors, disk.info.size_sectors - zone.start))
    require((await z.look(zone)).state is E, "a secure erase resets a zone")
    if z.stores:
        await z.gone(zone.start, z.data(1, 3), "what was erased securely")


async def _finishes(z: Zones) -> None:
    """A zone that was finished keeps what was written, and takes no more; what lay behind that stays hidden."""
    disk, zone, unit = z.disk, z.sequential[0], z.unit
    await disk.write(zone.start, z.data(3, 1))
    await disk.reset_zone(zone.start)
    await disk.write(zone.start, z.data(1, 2))
    await disk.finish_zone(zone.start)
    await z.holds(zone.start, z.data(1, 2), "what was written before a zone was finished")
    if z.stores:
        await z.gone(zone.start + unit, z.data(3, 1)[1:], "what a zone held before it was reset and finished")
    if z.in_order:
        for sector in (zone.start, zone.start + unit):
            await z.refuses(zone, disk.write(sector, z.data(1, 9)), ZoneInvalidCommand, "writing to a finished zone")


async def _persists(make: Callable[[], Block], *, stores: bool) -> None:
    """When the medium is opened again zones hold what they held, and are full, written or empty as they were."""
    z = await _zones(Checked(make()), stores=stores)
    states = dict(zip(z.sequential, (C, F, E, I), strict=False))
    for zone, state in states.items():
        if state is E:
            await z.bring(zone, I)
            await z.disk.reset_zone(zone.start)
        else:
            await z.bring(zone, state)
    cached = [zone for zone, state in states.items() if state is I and Operation.FLUSH in operations(z.disk)]
    for zone in cached:
        await z.disk.write_cached(zone.start + z.unit, z.data(1, 7))
        await z.disk.flush()
    await z.disk.disconnect()
    again = Zones(Checked(make()), z.zoning, z.sequential, z.conventional, stores)
    try:
        for zone, state in states.items():
            now = await again.look(zone)
            right = now.state in _ACTIVE if state in _ACTIVE else now.state is state
            require(right, f"a zone that was {state.name} is not {now.state.name} when the disk is opened again")
            if state in _ACTIVE:
                end = zone.start + z.unit * (2 if zone in cached else 1)
                require(now.write_pointer == end, "a write pointer is where it was when the disk is opened again")
            if state is not E:
                await again.holds(zone.start, z.data(1, state), "what was written before the disk was opened again")
        for zone in cached:
            await again.holds(zone.start + z.unit, z.data(1, 7), "what was flushed before the disk was opened again")
    finally:
        await again.disk.disconnect()
