"""How a driver without a guest rings a doorbell: by a message, by a store, by an eventfd, or not at all.

A store goes to memory that the server lets its clients map (VFIO's sparse mmap capability); an eventfd is one that the
server gives for accesses to the doorbell (GET_REGION_IO_FDS).  An access that no eventfd is for goes as a message.
"""

from __future__ import annotations

import enum
import mmap
import os
import struct
from typing import TYPE_CHECKING

from vmmblk._core import ffi
from vmmblk.client import wire
from vmmblk.client.errors import Impossible

if TYPE_CHECKING:
    from vmmblk.client.connection import IoFd, RegionInfo
    from vmmblk.client.pci import PciDevice

__all__ = ["Doorbells", "Kick", "mappable"]

_REGION_INFO_MAX = 4096
_CAP_HEADER = struct.Struct("<HHI")  # id, version, where the next is
_CAP_SPARSE_MMAP = 1
_SPARSE_HEADER = struct.Struct("<II")  # areas, reserved
_SPARSE_AREA = struct.Struct("<QQ")
_TYPE_EVENTFD = 0

_NOT_MAPPED = "the server does not let its doorbells be mapped; use --kick write, or start it so that it does"
_NO_EVENTFD = "the server has no eventfd for every doorbell; use --kick write, or fewer queues"


class Kick(enum.Enum):
    """How the device is notified."""

    WRITE = "write"
    """By messages, as QEMU does."""
    MMAP = "mmap"
    """By stores to the device's memory, where it lets it be mapped."""
    EVENTFD = "eventfd"
    """By eventfds, where the server gives them, as KVM would."""
    POLL = "poll"
    """Never: for servers that look by themselves."""


class Doorbells:
    """The doorbells of the device behind ``pci``; offsets are from the start of its notification structure.

    Raises: Impossible, now or when a doorbell is named, if the server has none of that kind; OSError from asking it.
    """

    def __init__(self, pci: PciDevice, kick: Kick) -> None:
        self._notify = pci.notify
        self._kick = kick
        self._fds: tuple[int, ...] = ()
        self._eventfds: dict[int, IoFd] = {}
        self._pages: mmap.mmap | None = None
        self._start = 0
        if kick is Kick.MMAP:
            self._map(pci)
        elif kick is Kick.EVENTFD:
            self._ask(pci)

    def close(self) -> None:
        """Unmap and close what the server gave."""
        if self._pages is not None:
            ffi.release(self._buffer)
            self._pages.close()
        for fd in self._fds:
            os.close(fd)
        self._pages, self._fds = None, ()
        self._eventfds.clear()

    def ring(self, offset: int, data: bytes) -> None:
        """Write ``data``, of 2 or 4 bytes, to the doorbell at ``offset``."""
        given = self._eventfds.get(offset)
        if self._kick is Kick.MMAP:
            kind = "uint16_t *" if len(data) == 2 else "uint32_t *"
            ffi.cast(kind, self.address(offset))[0] = int.from_bytes(data, "little")  # one store
        elif given is not None and given.size in {0, len(data)}:
            os.eventfd_write(given.fd, 1)
        elif self._kick is not Kick.POLL:
            self._notify.write_bytes(offset, data)

    def address(self, offset: int) -> int:
        """Where the doorbell at ``offset`` is mapped.  Raises Impossible."""
        at = self._notify.offset + offset - self._start
        if self._pages is None or not 0 <= at <= len(self._pages) - 4:
            raise Impossible(_NOT_MAPPED)
        return int(ffi.cast("uintptr_t", self._buffer)) + at

    def eventfd(self, offset: int) -> int:
        """What to write for the doorbell at ``offset``, when that would be two bytes.  Raises Impossible."""
        given = self._eventfds.get(offset)
        if given is None or given.size not in {0, 2}:
            raise Impossible(_NO_EVENTFD)
        return given.fd

    def _map(self, pci: PciDevice) -> None:
        info = pci.connection.region_info(self._notify.bar, argsz=_REGION_INFO_MAX)
        first = self._notify.offset
        try:
            around = [(start, size) for start, size in mappable(info) if start <= first < start + size]
            if not around:
                raise Impossible(_NOT_MAPPED)
            self._start, size = around[0]
            self._pages = mmap.mmap(info.fds[0], size, offset=info.offset + self._start)
            self._buffer = ffi.from_buffer(self._pages)
        finally:
            for fd in info.fds:
                os.close(fd)

    def _ask(self, pci: PciDevice) -> None:
        needed = pci.connection.region_io_fds(self._notify.bar).argsz
        answer = pci.connection.region_io_fds(self._notify.bar, argsz=needed)
        self._fds = answer.fds
        for each in answer.sub_regions:
            if each.type == _TYPE_EVENTFD and not each.flags:  # flags have it match data, or be an I/O port
                self._eventfds[each.offset - self._notify.offset] = each


def mappable(info: RegionInfo) -> list[tuple[int, int]]:
    """The parts of a region that the client may map: offset and size of each.

    Without a list of them (VFIO's sparse mmap capability) it is all of a region that has the MMAP flag.
    """
    if not info.flags & wire.RegionFlag.MMAP or not info.fds:
        return []
    start, position = wire.REGION_INFO.size, wire.REGION_INFO.size
    while info.flags & wire.RegionFlag.CAPS and start <= position <= start + len(info.capabilities) - _CAP_HEADER.size:
        cap_id, _, following = _CAP_HEADER.unpack_from(info.capabilities, position - start)
        if cap_id == _CAP_SPARSE_MMAP:
            return _areas(info.capabilities[position - start + _CAP_HEADER.size :])
        if following <= position:
            break
        position = following
    return [(0, info.size)]


def _areas(body: bytes) -> list[tuple[int, int]]:
    if len(body) < _SPARSE_HEADER.size:
        return []
    count, _ = _SPARSE_HEADER.unpack_from(body)
    listed = body[_SPARSE_HEADER.size :][: count * _SPARSE_AREA.size]
    return list(_SPARSE_AREA.iter_unpack(listed[: len(listed) // _SPARSE_AREA.size * _SPARSE_AREA.size]))
