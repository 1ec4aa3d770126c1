"""A host with a zoned block device, as Linux shows one: for tests where there is none."""

from __future__ import annotations

import errno
import os
import struct
from typing import TYPE_CHECKING, Any

from vmmblk.backends.zoned_device import HostZones, ZonedDevice
from vmmblk.block import BlockInfo, Buffers, Topology, ZoneModel, ZoneState, Zoning, total_bytes
from vmmblk.errors import BlockError, ZoneActiveResource, ZoneOpenResource
from vmmblk.filters.zone_table import ZoneTable

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

REPORT, RESET, OPEN, CLOSE, FINISH = 0xC0101282, 0x40101283, 0x40101286, 0x40101287, 0x40101288
ERRNO = {ZoneOpenResource: errno.ETOOMANYREFS, ZoneActiveResource: errno.EOVERFLOW}


class ZonedHost:
    """A disk of ``zones`` zones, each of ``zone_sectors`` sectors of ``sector_size`` bytes: system calls, and sysfs.

    It answers as Linux does: EIO for most of what breaks a rule of zones, and only some rules are told apart.  It has
    what a :class:`File` has, which is open on it.  ``asked`` tells the ioctls.
    """

    topology = Topology()
    buffer_alignment = 1
    pins_memory = True
    bounce = False

    def __init__(
        self,
        folder: Path,
        *,
        zones: int = 8,
        zone_sectors: int = 16,
        sector_size: int = 512,
        conventional: int = 1,
        model: ZoneModel = ZoneModel.HOST_MANAGED,
        tells_capacity: bool = True,
        append_bytes: int = 8192,
        granularity: int | None = None,
        **limits: Any,
    ) -> None:
        self.info = BlockInfo(read_write=True, sector_size=sector_size, size_sectors=zones * zone_sectors - 4)
        self.scale = sector_size // 512
        zoning = Zoning(model, zone_sectors, limits.get("max_open", 0), limits.get("max_active", 0), 0, sector_size)
        self.table = ZoneTable(
            zoning,
            self.info.size_sectors,
            sector_size,
            conventional=conventional,
            zone_capacity=limits.get("zone_capacity", 0),
        )
        self.tells_capacity = tells_capacity
        self.data = bytearray(self.info.size_bytes)
        self.asked: list[tuple[int, int, int]] = []
        self.fails: dict[str, int] = {}
        """What a write, a read, a report or a command fails with, whatever the zones say."""
        self.keeps = 0
        """Sectors of a write that fails which are written all the same."""
        self.path = folder / "zoned"
        self.path.write_bytes(b"")
        self.devices = folder / "sys"
        queue = self.devices / "0:0" / "queue"
        queue.mkdir(parents=True)
        names = {
            "zoned": {ZoneModel.HOST_MANAGED: "host-managed", ZoneModel.HOST_AWARE: "host-aware"}[model],
            "chunk_sectors": zone_sectors * self.scale,
            "zone_append_max_bytes": append_bytes,
            "max_open_zones": limits.get("max_open", 0),
            "max_active_zones": limits.get("max_active", 0),
        }
        if granularity is not None:
            names["zone_write_granularity"] = granularity
        for name, value in names.items():
            (queue / name).write_text(f"{value}\n")

    def device(self) -> ZonedDevice:
        """The disk that passes it through."""
        zones = HostZones(7, self.path, self.info.sector_size, devices=self.devices, ioctl=self.ioctl)
        return ZonedDevice(self, zones)  # type: ignore[arg-type]

    # The device file.

    def ioctl(self, fd: int, request: int, argument: Any) -> None:
        """What Linux does for BLKREPORTZONE and the commands."""
        assert fd == 7
        first, second = struct.unpack_from("=QQ", argument)
        self.asked.append((request, first, second))
        if request == REPORT:
            self._fail("report")
            self._report(argument, first // self.scale, second & 0xFFFFFFFF)
            return
        sector, sectors = first // self.scale, second // self.scale
        if request == RESET and sectors == self.info.size_sectors:
            for zone in self.table.resettable():
                self._reset(zone)
            return
        names = {RESET: "reset", OPEN: "open", CLOSE: "close", FINISH: "finish"}
        self._fail(names[request])
        zone = self._call(self.table.sequential, sector)
        assert sectors == min(self.table.zoning.zone_sectors, self.info.size_sectors - sector)
        self._call(getattr(self.table, f"check_{names[request]}"), zone)
        changes = {
            OPEN: self.table.open_zone,
            CLOSE: self.table.close_zone,
            FINISH: self.table.finish,
            RESET: self._reset,
        }
        changes[request](zone)

    def read(self, sector_start: int, buffers: Buffers) -> None:
        """Read, not from a zone that is offline."""
        self._fail("read")
        for piece in self.table.cut(sector_start, self._sectors(buffers)):
            self._call(self.table.readable, piece)
        at = sector_start * self.info.sector_size
        for buffer in buffers:
            buffer[:] = self.data[at : at + len(buffer)]
            at += len(buffer)

    def write(self, sector_start: int, buffers: Buffers) -> None:
        """Write by the rules of zones."""
        pieces = list(self.table.cut(sector_start, self._sectors(buffers)))
        for piece in pieces:
            self._call(self.table.check_write, piece)
        if "write" in self.fails:
            for piece in self.table.cut(sector_start, self.keeps):
                self.table.write(piece)
            self._fail("write")
        data, at = b"".join(buffers), sector_start * self.info.sector_size
        self.data[at : at + len(data)] = data
        for piece in pieces:
            self.table.write(piece)

    write_cached = write

    def flush(self) -> None:
        """Nothing is cached."""
        self._fail("flush")

    def disconnect(self) -> None:
        """Nothing to release."""

    def state(self, zone: int) -> ZoneState:
        """The state of a zone."""
        return self.table.state(zone)

    def _reset(self, zone: int) -> None:
        start, size = self.table.start(zone), self.info.sector_size
        end = start + self.table.capacity(zone)
        self.data[start * size : end * size] = bytes((end - start) * size)
        self.table.reset(zone)

    def _report(self, buffer: bytearray, sector: int, count: int) -> None:
        zones = list(self._blk_zones(sector, count))
        struct.pack_into("=QII", buffer, 0, sector * self.scale, len(zones), int(self.tells_capacity))
        buffer[16 : 16 + 64 * len(zones)] = b"".join(zones)

    def _blk_zones(self, sector: int, count: int) -> Iterator[bytes]:
        assert count, "Linux refuses to report no zones"
        size = self.table.zoning.zone_sectors
        if sector % size >= self.table.capacity(sector // size):  # a SCSI disk has a zone there that Linux hides
            sector = (sector // size + 1) * size
        for zone in self.table.report(sector, count):
            length = min(self.table.zoning.zone_sectors, self.info.size_sectors - zone.start)
            means = zone.state in (ZoneState.EMPTY, *range(2, 5))
            pointer = zone.write_pointer * self.scale if means else 0xFFFFFFFFFFFFFFFF
            capacity = zone.capacity * self.scale if self.tells_capacity else 0
            yield struct.pack(
                "=QQQBBBB4xQ24x",
                zone.start * self.scale,
                length * self.scale,
                pointer,
                zone.type,
                zone.state,
                0,
                0,
                capacity,
            )

    def _call(self, rule: Any, *arguments: Any) -> Any:
        try:
            return rule(*arguments)
        except BlockError as exc:
            number = ERRNO.get(type(exc), errno.EIO)
            raise OSError(number, os.strerror(number)) from exc

    def _fail(self, name: str) -> None:
        if number := self.fails.get(name):
            raise OSError(number, os.strerror(number))

    def _sectors(self, buffers: Buffers) -> int:
        return total_bytes(buffers) // self.info.sector_size
