"""A zoned block device of the host, with its zones passed through.

The disk itself keeps states, write pointers and limits, and its word counts.  What it answers to a broken rule is an
I/O error or less, so the rules that a guest is to be told of are looked at first: a zone's state before a command, its
write pointer before a write.  A write pointer is remembered while writes go well, and asked for again after anything
else, and before a write is refused for it.

Linux lets no program append to a zone of a block device.  An append is a write at the write pointer, and a lock of the
zone is held from looking at the pointer to the end of the write; every other change of the zone takes that lock too.

Data goes past the page cache: what is written back from there comes in any order.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import threading
from array import array
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from vmmblk.backends.file import File
from vmmblk.block import Block, Buffers, Zone, ZoneModel, ZoneState, ZoneType, Zoning, total_bytes
from vmmblk.errors import (
    BlockError,
    ConfigError,
    ZoneActiveResource,
    ZoneInvalidCommand,
    ZoneOpenResource,
    ZoneUnalignedWritePointer,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any

__all__ = ["HostZones", "ZonedDevice", "zone_model"]

# linux/blkzoned.h; sectors there have 512 bytes
_BLKREPORTZONE = 0xC0101282
_BLKRESETZONE = 0x40101283
_BLKOPENZONE = 0x40101286
_BLKCLOSEZONE = 0x40101287
_BLKFINISHZONE = 0x40101288
_REPORT = struct.Struct("=QII")  # struct blk_zone_report: sector, zones asked for and told, flags
_ZONE = struct.Struct("=QQQBB6xQ24x")  # struct blk_zone: start, len, wp, type, cond, capacity
_RANGE = struct.Struct("=QQ")  # struct blk_zone_range
_REP_CAPACITY = 1  # in the flags: the capacity is told (Linux >= 5.9)
_SECTOR = 512

_DEVICES = Path("/sys/dev/block")
_MODELS = {"host-managed": ZoneModel.HOST_MANAGED, "host-aware": ZoneModel.HOST_AWARE}
_ZONES_AT_A_TIME = 4096  # of a report: 256 KiB
_LOCKS = 64  # each is that of every 64th zone
_APPEND = 1 << 20  # bytes of the largest append, where the disk has none itself

_HAS_POINTER = {ZoneState.EMPTY, ZoneState.IMPLICIT_OPEN, ZoneState.EXPLICIT_OPEN, ZoneState.CLOSED}
_DEAD = {ZoneState.READ_ONLY, ZoneState.OFFLINE}
_NO_OPEN = _DEAD | {ZoneState.FULL}
_NO_CLOSE = _NO_OPEN | {ZoneState.EMPTY}

# What Linux makes of the answers that disks have for zones.
_RESOURCES: dict[int | None, type[BlockError]] = {
    errno.ETOOMANYREFS: ZoneOpenResource,
    errno.EOVERFLOW: ZoneActiveResource,
}
_INVALID = {errno.EINVAL, errno.EREMOTEIO}


def zone_model(path: Path, *, devices: Path = _DEVICES) -> ZoneModel | None:
    """Whether ``path`` is a zoned block device, and of which model.  ``devices`` is where Linux describes them."""
    try:
        is_device = path.is_block_device()
    except OSError:
        return None  # opening it will tell
    return _MODELS.get(_read(_queue(path, devices) / "zoned")) if is_device else None


class HostZones:
    """The zones of the block device that ``fd`` is open on, as ``path`` describes it; sectors of ``sector_size`` bytes.

    ``fd`` stays its owner's.  ``ioctl`` is the system call.
    """

    def __init__(
        self,
        fd: int,
        path: Path,
        sector_size: int,
        *,
        devices: Path = _DEVICES,
        ioctl: Callable[[int, int, Any], Any] = fcntl.ioctl,
    ) -> None:
        self._fd = fd
        self._queue = _queue(path, devices)
        self._scale = sector_size // _SECTOR
        self._ioctl = ioctl
        self.model = _MODELS[_read(self._queue / "zoned")]
        self.zone_sectors = self.limit("chunk_sectors") // self._scale
        """How many sectors a zone has; only the last may have fewer."""

    def limit(self, name: str) -> int:
        """What the file ``name`` of the device's queue says; 0 if there is none."""
        text = _read(self._queue / name)
        return int(text) if text else 0

    def report(self, sector: int, count: int) -> list[Zone]:
        """At most ``count`` zones from the one that holds ``sector`` on, with BLKREPORTZONE.  Raises: OSError."""
        if not count:
            return []
        buffer = bytearray(_REPORT.size + count * _ZONE.size)
        _REPORT.pack_into(buffer, 0, sector * self._scale, count, 0)
        self._ioctl(self._fd, _BLKREPORTZONE, buffer)
        _, told, flags = _REPORT.unpack_from(buffer)
        whole = memoryview(buffer)[_REPORT.size : _REPORT.size + told * _ZONE.size]
        return [self._zone(fields, has_capacity=bool(flags & _REP_CAPACITY)) for fields in _ZONE.iter_unpack(whole)]

    def open(self, sector: int, sectors: int) -> None:
        """Open the zones of a range with BLKOPENZONE.  Raises: OSError."""
        self._command(_BLKOPENZONE, sector, sectors)

    def close(self, sector: int, sectors: int) -> None:
        """Close them with BLKCLOSEZONE.  Raises: OSError."""
        self._command(_BLKCLOSEZONE, sector, sectors)

    def finish(self, sector: int, sectors: int) -> None:
        """Make them full with BLKFINISHZONE.  Raises: OSError."""
        self._command(_BLKFINISHZONE, sector, sectors)

    def reset(self, sector: int, sectors: int) -> None:
        """Make them empty with BLKRESETZONE; of the whole disk those that can be.  Raises: OSError."""
        self._command(_BLKRESETZONE, sector, sectors)

    def _command(self, request: int, sector: int, sectors: int) -> None:
        self._ioctl(self._fd, request, _RANGE.pack(sector * self._scale, sectors * self._scale))

    def _zone(self, fields: tuple[int, ...], *, has_capacity: bool) -> Zone:
        start, length, pointer, kind, state, capacity = fields
        if not has_capacity:
            capacity = length
        if state not in _HAS_POINTER:  # disks say anything then
            pointer = start + capacity
        scale = self._scale
        return Zone(start // scale, capacity // scale, pointer // scale, ZoneType(kind), ZoneState(state))


class ZonedDevice(Block):
    """The zoned block device that ``disk`` is open on, with direct I/O, and ``zones`` tells of.

    Its methods are plain, so they run in threads.
    """

    def __init__(self, disk: File, zones: HostZones) -> None:
        self._disk = disk
        self._zones = zones
        self.info = disk.info
        self.topology = disk.topology
        self.buffer_alignment = disk.buffer_alignment
        self.pins_memory = disk.pins_memory
        self.bounce = disk.bounce
        self._types, self._capacities = self._survey()
        self._zoning = self._divide()
        self._locks = [threading.Lock() for _ in range(_LOCKS)]
        self._pointers: dict[int, int] = {}  # write pointers, by zone, that are known for certain

    @classmethod
    def open(cls, path: Path, *, read_only: bool = False, bounce: bool = False, lock: bool = True) -> ZonedDevice:
        """The zoned block device ``path``; its logical blocks are the sectors.

        The parameters are those of :class:`File`.  Raises: ConfigError.
        """
        size = int(_read(_queue(path, _DEVICES) / "logical_block_size"))
        disk = File(path, sector_size=size, read_only=read_only, direct=True, bounce=bounce, lock=lock)
        try:
            return cls(disk, HostZones(disk.fileno(), path, size))
        except BaseException:
            disk.disconnect()
            raise

    def zoning(self) -> Zoning:
        """How the disk is divided, and its limits."""
        return self._zoning

    # Data.

    def read(self, sector_start: int, buffers: Buffers) -> None:
        """Read; what was not written is what the disk makes of it.  Raises: ZoneInvalidCommand, OSError."""
        zones = self._holding(sector_start, buffers)
        try:
            self._disk.read(sector_start, buffers)
        except OSError as exc:
            raise self._explained(exc, zones, {ZoneState.OFFLINE}) from exc

    def write(self, sector_start: int, buffers: Buffers) -> None:
        """Write to stable storage.  Raises: the four zone errors, OSError."""
        self._store(self._disk.write, sector_start, buffers)

    def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """Write to the cache of the disk.  Raises: the four zone errors, OSError."""
        self._store(self._disk.write_cached, sector_start, buffers)

    def flush(self) -> None:
        """Have the disk flush its cache."""
        self._disk.flush()

    def append(self, sector_start: int, buffers: Buffers) -> int:
        """Write at the write pointer, to stable storage.  Raises: the four zone errors, OSError."""
        zone = self._named(sector_start)
        if self._types[zone] != ZoneType.SEQUENTIAL_REQUIRED:
            raise ZoneInvalidCommand(f"zone {zone} takes no appends")
        with self._lock(zone):
            sector = self._pointers[zone] if zone in self._pointers else self._ask(zone)
            self._put(self._disk.write, zone, sector, buffers)
        return sector

    # Zones.

    def report_zones(self, sector_start: int, count: int) -> list[Zone]:
        """The zones as the disk tells of them now.  Raises: OSError."""
        # from the start of the zone: behind the capacity of a SCSI disk's zone lies another, which Linux skips
        first = sector_start - sector_start % self._zoning.zone_sectors
        return self._zones.report(first, min(count, len(self._types)))

    def open_zone(self, sector_start: int) -> None:
        """Open explicitly.  Raises: ZoneInvalidCommand, ZoneOpenResource, ZoneActiveResource, OSError."""
        self._command(self._zones.open, sector_start, _NO_OPEN)

    def close_zone(self, sector_start: int) -> None:
        """Close.  Raises: ZoneInvalidCommand, OSError."""
        self._command(self._zones.close, sector_start, _NO_CLOSE)

    def finish_zone(self, sector_start: int) -> None:
        """Make full.  Raises: ZoneInvalidCommand, ZoneOpenResource, ZoneActiveResource, OSError."""
        self._command(self._zones.finish, sector_start, _DEAD)

    def reset_zone(self, sector_start: int) -> None:
        """Make empty.  Raises: ZoneInvalidCommand, OSError."""
        self._command(self._zones.reset, sector_start, _DEAD)

    def reset_all_zones(self) -> None:
        """Make every zone empty that is open, closed or full.  Raises: OSError."""
        with ExitStack() as stack:
            for lock in self._locks:
                stack.enter_context(lock)
            self._pointers.clear()
            self._zones.reset(0, self.info.size_sectors)

    def disconnect(self) -> None:
        """Flush, and close the device."""
        self._disk.disconnect()

    # The inside.

    def _survey(self) -> tuple[bytes, array[int]]:
        """Of each zone its type, and how many sectors can be written: what never changes."""
        types, capacities, sector = bytearray(), array("Q"), 0
        while sector < self.info.size_sectors:
            try:
                zones = self._zones.report(sector, _ZONES_AT_A_TIME)
            except (OSError, ValueError) as exc:
                raise ConfigError(
                    f"cannot use the zones of the disk: {exc}; look at them with: blkzone report"
                ) from None
            if not zones:
                raise ConfigError(f"the disk has no zone at sector {sector}; look at them with: blkzone report")
            types += bytes(zone.type for zone in zones)
            capacities.extend(zone.capacity for zone in zones)
            sector = len(types) * self._zones.zone_sectors
        return bytes(types), capacities

    def _divide(self) -> Zoning:
        zones, size = self._zones, self.info.sector_size
        granularity = max(zones.limit("zone_write_granularity"), size)
        appends = zones.limit("zone_append_max_bytes") or _APPEND
        most = min(appends - appends % granularity, min(self._capacities) * size)
        return Zoning(
            model=zones.model,
            zone_sectors=zones.zone_sectors,
            max_open=zones.limit("max_open_zones"),
            max_active=zones.limit("max_active_zones"),
            max_append_sectors=most // size if zones.model is ZoneModel.HOST_MANAGED else 0,
            write_granularity=granularity,
        )

    def _store(self, write: Callable[[int, Buffers], None], sector: int, buffers: Buffers) -> None:
        zones = self._holding(sector, buffers)
        zone = zones[0]
        if self._types[zone] != ZoneType.SEQUENTIAL_REQUIRED:
            try:
                write(sector, buffers)
            except OSError as exc:
                raise self._explained(exc, zones, _DEAD) from exc
            return
        with self._lock(zone):
            if self._pointers.get(zone) != sector and self._ask(zone) != sector:
                raise ZoneUnalignedWritePointer(f"zone {zone} must be written at sector {self._pointers[zone]}")
            self._put(write, zone, sector, buffers)

    def _put(self, write: Callable[[int, Buffers], None], zone: int, sector: int, buffers: Buffers) -> None:
        """Write at the write pointer of a zone, and know it afterwards; with its lock."""
        end = sector + total_bytes(buffers) // self.info.sector_size
        self._check_room(zone, end)
        del self._pointers[zone]  # until the write has ended well
        try:
            write(sector, buffers)
        except OSError as exc:
            explained = self._explained(exc, range(zone, zone + 1), _DEAD)
            if explained is exc and not sector <= self._ask(zone) <= end:  # somebody else has moved it
                explained = ZoneUnalignedWritePointer(f"zone {zone} was not to be written at sector {sector}")
            raise explained from exc
        self._pointers[zone] = end

    def _check_room(self, zone: int, end: int) -> None:
        if end > self._start(zone) + self._capacities[zone]:
            raise ZoneInvalidCommand(f"zone {zone} has no room up to sector {end}")
        if end * self.info.sector_size % self._zoning.write_granularity:
            raise ZoneUnalignedWritePointer(f"a write ends at {end}, not at {self._zoning.write_granularity} bytes")

    def _command(self, call: Callable[[int, int], None], sector: int, refused: Collection[ZoneState]) -> None:
        zone = self._named(sector)
        if self._types[zone] == ZoneType.CONVENTIONAL:
            raise ZoneInvalidCommand(f"zone {zone} is conventional")
        with self._lock(zone):
            self._pointers.pop(zone, None)
            state = self._zones.report(sector, 1)[0].state
            if state in refused:
                raise ZoneInvalidCommand(f"zone {zone} is {state.name}")
            try:
                call(sector, min(self._zoning.zone_sectors, self.info.size_sectors - sector))
            except OSError as exc:
                if exc.errno in _INVALID:
                    raise ZoneInvalidCommand(f"zone {zone} is {state.name}: {exc}") from exc
                raise _resource(exc) or exc from exc

    def _ask(self, zone: int) -> int:
        """The write pointer, from the disk itself; with the lock.  Raises: ZoneInvalidCommand if there is none."""
        found = self._zones.report(self._start(zone), 1)[0]
        if found.state not in _HAS_POINTER:
            raise ZoneInvalidCommand(f"zone {zone} is {found.state.name}")
        self._pointers[zone] = found.write_pointer
        return found.write_pointer

    def _explained(self, error: OSError, zones: range, dead: Collection[ZoneState]) -> Exception:
        """What the guest is told for an error of data in ``zones``: in ``dead`` states there is no I/O."""
        if found := _resource(error):
            return found
        for zone in zones:
            state = self._zones.report(self._start(zone), 1)[0].state
            if state in dead:
                return ZoneInvalidCommand(f"zone {zone} is {state.name}")
        return error

    # Geometry.

    def _start(self, zone: int) -> int:
        return zone * self._zoning.zone_sectors

    def _holding(self, sector: int, buffers: Buffers) -> range:
        """The zones of a range.  Raises: ZoneInvalidCommand if it leaves one that must be written in order."""
        sectors = total_bytes(buffers) // self.info.sector_size
        zones = range(sector // self._zoning.zone_sectors, (sector + sectors - 1) // self._zoning.zone_sectors + 1)
        if len(zones) > 1 and any(self._types[zone] == ZoneType.SEQUENTIAL_REQUIRED for zone in zones):
            raise ZoneInvalidCommand(f"{sectors} sectors from {sector} reach into another zone")
        return zones

    def _named(self, sector: int) -> int:
        zone, offset = divmod(sector, self._zoning.zone_sectors)
        if offset:
            raise ZoneInvalidCommand(f"no zone starts at sector {sector}")
        return zone

    def _lock(self, zone: int) -> threading.Lock:
        return self._locks[zone % _LOCKS]


def _resource(error: OSError) -> BlockError | None:
    kind = _RESOURCES.get(error.errno)
    return kind(str(error)) if kind else None


def _queue(path: Path, devices: Path) -> Path:
    """Where Linux describes the queue of a block device; a partition has that of its disk."""
    number = path.stat().st_rdev
    device = (devices / f"{os.major(number)}:{os.minor(number)}").resolve()
    return (device if (device / "queue").is_dir() else device.parent) / "queue"


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii").strip() if path.exists() else ""
