"""The device as PCI shows it: config space, capabilities, and BARs reached directly or through the PCI_CFG window.

Nothing about the layout is assumed: every structure is found by walking the capability list
("Virtio Structure PCI Capabilities").
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, NamedTuple, Protocol

from vmmblk.client.errors import ProtocolError
from vmmblk.client.wire import Region
from vmmblk.spec import PciCapType

if TYPE_CHECKING:
    from vmmblk.client.connection import Connection

__all__ = ["BarAccess", "Capability", "DirectAccess", "MsixCapability", "PciDevice", "Structure", "WindowAccess"]

_COMMAND = 0x04
_STATUS = 0x06
_CAPABILITIES = 0x34
_STATUS_CAP_LIST = 0x10
_COMMAND_MEMORY_MASTER = 0x06

_CAP_ID_VENDOR = 0x09
_CAP_ID_MSIX = 0x11
_MSIX_ENABLE = 0x8000

_WIDTHS = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


class Capability(NamedTuple):
    """A PCI capability: its id and its place in config space."""

    cap_id: int
    position: int


class VirtioCapability(NamedTuple):
    """struct virtio_pci_cap, with ``notify_off_multiplier`` where it has one."""

    position: int
    cfg_type: int
    bar: int
    offset: int
    length: int
    notify_off_multiplier: int


class MsixCapability(NamedTuple):
    """The MSI-X capability: where it is and how many vectors the table has."""

    position: int
    table_size: int


class BarAccess(Protocol):
    """A way to the device's BARs, one access per call."""

    def read(self, bar: int, offset: int, length: int) -> bytes:
        """Read from a BAR."""

    def write(self, bar: int, offset: int, data: bytes) -> None:
        """Write to a BAR."""


class DirectAccess:
    """BARs by REGION_READ and REGION_WRITE.  Writes are ``posted``, as QEMU's are, unless told otherwise."""

    def __init__(self, connection: Connection, *, posted: bool = True) -> None:
        self._connection = connection
        self.posted = posted

    def read(self, bar: int, offset: int, length: int) -> bytes:
        """Read from a BAR."""
        return self._connection.region_read(bar, offset, length)

    def write(self, bar: int, offset: int, data: bytes) -> None:
        """Write to a BAR."""
        self._connection.region_write(bar, offset, data, posted=self.posted)


class WindowAccess:
    """BARs by the PCI_CFG capability at ``position`` of config space ("PCI configuration access capability").

    An access that is not 1, 2 or 4 bytes and naturally aligned is cut into such.
    """

    def __init__(self, connection: Connection, position: int) -> None:
        self._connection = connection
        self._position = position

    def read(self, bar: int, offset: int, length: int) -> bytes:
        """Read from a BAR."""
        data = b""
        while len(data) < length:
            step = self._aim(bar, offset + len(data), length - len(data))
            data += self._connection.region_read(Region.CONFIG, self._position + 16, step)
        return data

    def write(self, bar: int, offset: int, data: bytes) -> None:
        """Write to a BAR."""
        done = 0
        while done < len(data):
            step = self._aim(bar, offset + done, len(data) - done)
            self._connection.region_write(Region.CONFIG, self._position + 16, data[done : done + step])
            done += step

    def _aim(self, bar: int, offset: int, length: int) -> int:
        step = next(width for width in (4, 2, 1) if width <= length and offset % width == 0)
        self._connection.region_write(Region.CONFIG, self._position + 4, bytes([bar]))
        self._connection.region_write(Region.CONFIG, self._position + 8, struct.pack("<I", offset))
        self._connection.region_write(Region.CONFIG, self._position + 12, struct.pack("<I", step))
        return step


class Structure:
    """One virtio structure, at ``offset`` of ``bar``: common config, ISR, device config or notifications."""

    def __init__(self, access: BarAccess, bar: int, offset: int, length: int) -> None:
        self._access = access
        self.bar = bar
        self.offset = offset
        self.length = length

    def read(self, offset: int, width: int) -> int:
        """The field of 1, 2, 4 or 8 bytes at ``offset``, in one access."""
        (value,) = struct.unpack(_WIDTHS[width], self.read_bytes(offset, width))
        return int(value)

    def write(self, offset: int, width: int, value: int) -> None:
        """Set the field of 1, 2, 4 or 8 bytes at ``offset``, in one access."""
        self.write_bytes(offset, struct.pack(_WIDTHS[width], value))

    def read_bytes(self, offset: int, length: int) -> bytes:
        """Any bytes, in one access; nothing checks that they lie within the structure."""
        return self._access.read(self.bar, self.offset + offset, length)

    def write_bytes(self, offset: int, data: bytes) -> None:
        """Any bytes, in one access; nothing checks that they lie within the structure."""
        self._access.write(self.bar, self.offset + offset, data)


class PciDevice:
    """A virtio device found on the other end of ``connection``.

    With ``window`` every BAR access goes through the PCI_CFG window.  Raises ProtocolError if the capability list is
    broken or a structure that every virtio device has is missing.
    """

    def __init__(self, connection: Connection, *, window: bool = False, posted: bool = True) -> None:
        self.connection = connection
        self.vendor_id = self.config_field(0x00, 2)
        self.device_id = self.config_field(0x02, 2)
        self.capabilities = self._walk()
        self.virtio_capabilities = self._virtio_capabilities()
        self.msix = self._find_msix()
        self.access: BarAccess = DirectAccess(connection, posted=posted)
        if window:
            self.access = WindowAccess(connection, self._first(PciCapType.PCI_CFG).position)
        self.common = self._structure(PciCapType.COMMON_CFG)
        self.isr = self._structure(PciCapType.ISR_CFG)
        self.device = self._structure(PciCapType.DEVICE_CFG)
        self.notify = self._structure(PciCapType.NOTIFY_CFG)
        self.notify_off_multiplier = self._first(PciCapType.NOTIFY_CFG).notify_off_multiplier

    def config_read(self, offset: int, length: int) -> bytes:
        """Bytes of PCI config space."""
        return self.connection.region_read(Region.CONFIG, offset, length)

    def config_write(self, offset: int, data: bytes) -> None:
        """Write PCI config space; waits for the reply, as QEMU does."""
        self.connection.region_write(Region.CONFIG, offset, data)

    def config_field(self, offset: int, width: int) -> int:
        """The little-endian field of ``width`` bytes at ``offset`` of config space."""
        return int.from_bytes(self.config_read(offset, width), "little")

    def enable(self) -> None:
        """Let the device answer memory accesses and be a bus master."""
        command = self.config_field(_COMMAND, 2) | _COMMAND_MEMORY_MASTER
        self.config_write(_COMMAND, struct.pack("<H", command))

    def enable_msix(self, enabled: bool) -> None:
        """Set the MSI-X enable bit: off means INTx.  Nothing happens on a device without MSI-X."""
        if self.msix is None:
            return
        control = self.config_field(self.msix.position + 2, 2) & ~_MSIX_ENABLE
        self.config_write(self.msix.position + 2, struct.pack("<H", control | (_MSIX_ENABLE if enabled else 0)))

    def _walk(self) -> tuple[Capability, ...]:
        if not self.config_field(_STATUS, 2) & _STATUS_CAP_LIST:
            return ()
        found: dict[int, Capability] = {}
        position = self.config_field(_CAPABILITIES, 1) & ~3
        while position:
            if position < 0x40 or position in found:
                raise ProtocolError(f"broken PCI capability list at {position:#x}")
            cap_id, following = self.config_read(position, 2)
            found[position] = Capability(cap_id, position)
            position = following & ~3
        return tuple(found.values())

    def _virtio_capabilities(self) -> tuple[VirtioCapability, ...]:
        found = []
        for capability in self.capabilities:
            if capability.cap_id != _CAP_ID_VENDOR:
                continue
            position = capability.position
            length, cfg_type, bar = self.config_read(position + 2, 3)
            if cfg_type > PciCapType.PCI_CFG or length < 16:
                continue
            where, size = struct.unpack("<II", self.config_read(position + 8, 8))
            extra = self.config_field(position + 16, 4) if cfg_type == PciCapType.NOTIFY_CFG and length >= 20 else 0
            found.append(VirtioCapability(position, cfg_type, bar, where, size, extra))
        return tuple(found)

    def _find_msix(self) -> MsixCapability | None:
        for capability in self.capabilities:
            if capability.cap_id == _CAP_ID_MSIX:
                control = self.config_field(capability.position + 2, 2)
                return MsixCapability(capability.position, (control & 0x7FF) + 1)
        return None

    def _first(self, cfg_type: PciCapType) -> VirtioCapability:
        """The first one is the one the device prefers; those with a reserved BAR number are not for us."""
        for capability in self.virtio_capabilities:
            if capability.cfg_type == cfg_type and capability.bar <= 5:
                return capability
        raise ProtocolError(f"the device has no {cfg_type.name} capability")

    def _structure(self, cfg_type: PciCapType) -> Structure:
        capability = self._first(cfg_type)
        return Structure(self.access, capability.bar, capability.offset, capability.length)
