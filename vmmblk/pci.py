"""The PCI function: configuration space, capabilities and BARs around a :class:`~vmmblk.device.Device`.  Pure.

The layout is fixed, one page for each structure, all in BAR 4; initiators exist that know it by heart::

    BAR 1  32-bit memory                    MSI-X table
    BAR 2  32-bit memory                    MSI-X pending bits
    BAR 4  64-bit prefetchable memory       0x0000 common configuration   0x1000 ISR status
           (BAR 5 is its upper half)        0x2000 device configuration   0x3000 notification

Reads and writes take any offset and length and never raise: each byte goes to the structure it lies in, what lies in
none reads 0 and ignores writes.  Writes return effects: the device's, and three of the function itself.

Configuration space is an array of bytes and an array of masks that tells which of their bits a driver can change;
sizing a BAR by writing ones to it is nothing but such a mask.  Two things in it are alive: the Interrupt Status bit,
and the window of the PCI_CFG capability, through which firmware reaches BARs that lie above 4 GiB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from vmmblk.device import Device
from vmmblk.device import Effect as DeviceEffect
from vmmblk.spec import BLK_CONFIG_SIZE, COMMON_CFG_SIZE, PCI_DEVICE_ID_BLK, PCI_VENDOR_ID_VIRTIO, PciCapType

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = [
    "COMMON_OFFSET",
    "CONFIG_SPACE_SIZE",
    "DEVICE_OFFSET",
    "ISR_OFFSET",
    "MSIX_PBA_BAR",
    "MSIX_TABLE_BAR",
    "NOTIFY_MULTIPLIER",
    "NOTIFY_OFFSET",
    "NOTIFY_SIZE",
    "VIRTIO_BAR",
    "BusMaster",
    "Effect",
    "IntxDisabled",
    "Isr",
    "MsixEnabled",
    "PciFunction",
    "PlainIsr",
]

CONFIG_SPACE_SIZE = 256

MSIX_TABLE_BAR = 1
MSIX_PBA_BAR = 2
VIRTIO_BAR = 4

COMMON_OFFSET = 0x0000
ISR_OFFSET = 0x1000
DEVICE_OFFSET = 0x2000
NOTIFY_OFFSET = 0x3000
NOTIFY_SIZE = 0x1000
VIRTIO_BAR_SIZE = 0x4000

NOTIFY_MULTIPLIER = 4
"""Bytes between doorbells; 4 suits 16-bit and 32-bit doorbells alike."""

_PAGE = 0x1000
_MSIX_ENTRY_SIZE = 16

# Offsets in the header and bits in it that are used here (PCI Local Bus Specification 3.0, chapter 6).
_VENDOR_ID, _DEVICE_ID, _COMMAND, _STATUS, _REVISION, _CLASS = 0x00, 0x02, 0x04, 0x06, 0x08, 0x09
_CACHE_LINE, _LATENCY, _BAR0, _SUBSYSTEM_VENDOR, _SUBSYSTEM_ID = 0x0C, 0x0D, 0x10, 0x2C, 0x2E
_CAPABILITIES, _INTERRUPT_LINE, _INTERRUPT_PIN, _FIRST_CAPABILITY = 0x34, 0x3C, 0x3D, 0x40

_COMMAND_BUS_MASTER = 1 << 2
_COMMAND_INTX_DISABLE = 1 << 10
_COMMAND_WRITABLE = 1 << 1 | _COMMAND_BUS_MASTER | 1 << 6 | 1 << 8 | _COMMAND_INTX_DISABLE  # memory, parity, SERR#
_STATUS_INTERRUPT = 1 << 3
_STATUS_CAPABILITY_LIST = 1 << 4
_BAR_64BIT_PREFETCHABLE = 0xC

_CLASS_STORAGE_OTHER = 0x018000
_SUBSYSTEM_ID_BLK = 0x1100  # drivers want at least 0x40

_CAP_ID_VENDOR = 0x09
_CAP_ID_MSIX = 0x11
_MSIX_CONTROL = 2  # from the start of the MSI-X capability
_MSIX_ENABLE = 1 << 15
_MSIX_CONTROL_WRITABLE = _MSIX_ENABLE | 1 << 14
_MSIX_MASKED = 1

# From the start of a virtio capability ("Virtio Structure PCI Capabilities").
_CAP_BAR, _CAP_OFFSET, _CAP_LENGTH, _CAP_DATA = 0x04, 0x08, 0x0C, 0x10


@dataclass(frozen=True, slots=True)
class MsixEnabled:
    """MSI-X is switched ``on``, or off: interrupts are INTx then."""

    on: bool


@dataclass(frozen=True, slots=True)
class IntxDisabled:
    """INTx may no longer be asserted (``on``), or may again."""

    on: bool


@dataclass(frozen=True, slots=True)
class BusMaster:
    """The function may access memory and send messages (``on``), or may no longer."""

    on: bool


Effect = DeviceEffect | MsixEnabled | IntxDisabled | BusMaster


class Isr(Protocol):
    """The ISR status byte.  It is set where interrupts are raised, so it lives there."""

    def peek(self) -> int:
        """The byte, left as it is."""

    def take(self) -> int:
        """The byte, cleared by reading; INTx is de-asserted."""


class PlainIsr:
    """An ISR status byte that is only a number."""

    def __init__(self, value: int = 0) -> None:
        self.value = value

    def peek(self) -> int:
        """The byte, left as it is."""
        return self.value

    def take(self) -> int:
        """The byte, cleared by reading."""
        value, self.value = self.value, 0
        return value


@dataclass(frozen=True, slots=True)
class _Structure:
    """Something in a BAR.  ``read`` and ``write`` are only called with what lies within its ``size`` bytes."""

    offset: int
    size: int
    read: Callable[[int, int], bytes]
    write: Callable[[int, bytes], Sequence[Effect]]

    def overlap(self, offset: int, length: int) -> tuple[int, int]:
        """First and last-plus-one byte of an access that concern this structure; empty if first >= last."""
        return max(offset, self.offset), min(offset + length, self.offset + self.size)


class _ConfigSpace:
    """Bytes, and masks of the bits in them that a driver can write."""

    def __init__(self) -> None:
        self.data = bytearray(CONFIG_SPACE_SIZE)
        self._mask = bytearray(CONFIG_SPACE_SIZE)
        self._end = _FIRST_CAPABILITY
        self._link = _CAPABILITIES

    def get(self, offset: int, width: int) -> int:
        return int.from_bytes(self.data[offset : offset + width], "little")

    def set(self, offset: int, width: int, value: int) -> None:
        self.data[offset : offset + width] = value.to_bytes(width, "little")

    def allow(self, offset: int, width: int, bits: int) -> None:
        """Let the driver write ``bits`` of the field at ``offset``."""
        self._mask[offset : offset + width] = bits.to_bytes(width, "little")

    def append_capability(self, body: bytes) -> int:
        """Append a capability (without its next pointer) to the list.  Returns its offset."""
        offset = self._end
        self.data[offset : offset + len(body) + 1] = body[:1] + b"\0" + body[1:]
        self.data[self._link] = offset
        self._link = offset + 1
        self._end = (offset + len(body) + 1 + 3) & ~3
        return offset

    def write(self, offset: int, data: bytes) -> None:
        for at, byte in enumerate(data[: max(0, CONFIG_SPACE_SIZE - offset)], offset):
            self.data[at] = self.data[at] & ~self._mask[at] | byte & self._mask[at]


class PciFunction:
    """What a driver reaches of the device through PCI; see the head of this module."""

    def __init__(self, device: Device, isr: Isr) -> None:
        self._device = device
        self._isr = isr
        self._msix_entries_size = device.config.vectors * _MSIX_ENTRY_SIZE
        self._bar_sizes = {
            MSIX_TABLE_BAR: _bar_size_for(self._msix_entries_size),
            MSIX_PBA_BAR: _bar_size_for(-(-device.config.vectors // 64) * 8),
            VIRTIO_BAR: VIRTIO_BAR_SIZE,
        }
        self._structures: dict[int, tuple[_Structure, ...]] = {
            MSIX_TABLE_BAR: (_Structure(0, self._msix_entries_size, self._read_msix_table, self._write_msix_table),),
            # The pending bits are kept by whoever masks vectors, which is the VMM.  Here they read 0.
            MSIX_PBA_BAR: (),
            VIRTIO_BAR: (
                _Structure(COMMON_OFFSET, COMMON_CFG_SIZE, device.common_read, device.common_write),
                _Structure(ISR_OFFSET, 1, self._read_isr, _ignore),
                _Structure(DEVICE_OFFSET, BLK_CONFIG_SIZE, device.config_read, device.config_write),
                _Structure(NOTIFY_OFFSET, device.config.queues * NOTIFY_MULTIPLIER, _zeroes, self._ring_doorbell),
            ),
        }
        self._power_on()

    def _power_on(self) -> None:
        self._space = _ConfigSpace()
        self._lay_out_header()
        self._lay_out_capabilities()
        self._msix_table = bytearray(self._msix_entries_size)
        self._msix_table[12::_MSIX_ENTRY_SIZE] = bytes([_MSIX_MASKED]) * self._device.config.vectors

    def _lay_out_header(self) -> None:
        space = self._space
        for offset, width, value in (
            (_VENDOR_ID, 2, PCI_VENDOR_ID_VIRTIO),
            (_DEVICE_ID, 2, PCI_DEVICE_ID_BLK),
            (_STATUS, 2, _STATUS_CAPABILITY_LIST),
            (_REVISION, 1, 1),
            (_CLASS, 3, _CLASS_STORAGE_OTHER),
            (_SUBSYSTEM_VENDOR, 2, PCI_VENDOR_ID_VIRTIO),
            (_SUBSYSTEM_ID, 2, _SUBSYSTEM_ID_BLK),
            (_INTERRUPT_PIN, 1, 1),
            (_bar(VIRTIO_BAR), 4, _BAR_64BIT_PREFETCHABLE),
        ):
            space.set(offset, width, value)
        for offset, width, bits in (
            (_COMMAND, 2, _COMMAND_WRITABLE),
            (_CACHE_LINE, 1, 0xFF),
            (_LATENCY, 1, 0xFF),
            (_INTERRUPT_LINE, 1, 0xFF),
            (_bar(MSIX_TABLE_BAR), 4, -self.bar_size(MSIX_TABLE_BAR) & 0xFFFFFFFF),
            (_bar(MSIX_PBA_BAR), 4, -self.bar_size(MSIX_PBA_BAR) & 0xFFFFFFFF),
            (_bar(VIRTIO_BAR), 8, -self.bar_size(VIRTIO_BAR) & 0xFFFFFFFFFFFFFFFF),
        ):
            space.allow(offset, width, bits)

    def _lay_out_capabilities(self) -> None:
        space = self._space
        doorbells = self._device.config.queues * NOTIFY_MULTIPLIER
        space.append_capability(_virtio_capability(PciCapType.COMMON_CFG, COMMON_OFFSET, COMMON_CFG_SIZE))
        space.append_capability(
            _virtio_capability(PciCapType.NOTIFY_CFG, NOTIFY_OFFSET, doorbells, _le32(NOTIFY_MULTIPLIER))
        )
        space.append_capability(_virtio_capability(PciCapType.ISR_CFG, ISR_OFFSET, 1))
        space.append_capability(_virtio_capability(PciCapType.DEVICE_CFG, DEVICE_OFFSET, BLK_CONFIG_SIZE))
        self._window = space.append_capability(_virtio_capability(PciCapType.PCI_CFG, 0, 0, _le32(0), bar=0))
        space.allow(self._window + _CAP_BAR, 1, 0xFF)
        space.allow(self._window + _CAP_OFFSET, 4, 0xFFFFFFFF)
        space.allow(self._window + _CAP_LENGTH, 4, 0xFFFFFFFF)
        space.allow(self._window + _CAP_DATA, 4, 0xFFFFFFFF)
        table_size = (self._device.config.vectors - 1).to_bytes(2, "little")
        # Offset and BAR number share a field; both structures start at offset 0.
        self._msix = space.append_capability(
            bytes([_CAP_ID_MSIX]) + table_size + _le32(MSIX_TABLE_BAR) + _le32(MSIX_PBA_BAR)
        )
        space.allow(self._msix + _MSIX_CONTROL, 2, _MSIX_CONTROL_WRITABLE)

    # --- state ---

    @property
    def msix_enabled(self) -> bool:
        """Whether interrupts are MSI-X vectors, not INTx."""
        return bool(self._space.get(self._msix + _MSIX_CONTROL, 2) & _MSIX_ENABLE)

    @property
    def intx_disabled(self) -> bool:
        """Whether the command register forbids INTx."""
        return bool(self._space.get(_COMMAND, 2) & _COMMAND_INTX_DISABLE)

    @property
    def bus_master(self) -> bool:
        """Whether the command register allows the function to access memory."""
        return bool(self._space.get(_COMMAND, 2) & _COMMAND_BUS_MASTER)

    def bar_size(self, bar: int) -> int:
        """The size of a BAR in bytes, 0 for one that does not exist or is the upper half of another."""
        return self._bar_sizes.get(bar, 0)

    def reset(self) -> list[Effect]:
        """Reset the function and the device in it; the caller has seen to it that nothing is in flight."""
        was = self._switches()
        self._power_on()
        self._isr.take()
        self._device.reset_done()
        return self._switched(was)

    def _switches(self) -> tuple[bool, bool, bool]:
        return self.msix_enabled, self.intx_disabled, self.bus_master

    def _switched(self, was: tuple[bool, bool, bool]) -> list[Effect]:
        kinds: tuple[type[MsixEnabled | IntxDisabled | BusMaster], ...] = (MsixEnabled, IntxDisabled, BusMaster)
        return [kind(on) for kind, before, on in zip(kinds, was, self._switches(), strict=True) if on != before]

    # --- configuration space ---

    def config_read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of configuration space; only an access of the PCI_CFG window itself has side effects."""
        if self._is_window(offset, length):
            self._read_window()
        image = bytearray(self._space.data)
        if not self.msix_enabled and self._isr.peek():
            image[_STATUS] |= _STATUS_INTERRUPT
        return bytes(image[offset : offset + length]).ljust(length, b"\0")

    def config_write(self, offset: int, data: bytes) -> list[Effect]:
        """Write to configuration space, where it can be written."""
        was = self._switches()
        self._space.write(offset, data)
        effects = self._switched(was)
        if self._is_window(offset, len(data)):
            effects += self._write_window()
        return effects

    def _is_window(self, offset: int, length: int) -> bool:
        # A VMM reads the whole space at once to keep a copy: that must not read the ISR, for instance.
        return offset == self._window + _CAP_DATA and length in {1, 2, 4}

    def _window_target(self) -> tuple[int, int, int]:
        """BAR, offset and length that the window shows; length 0 if the driver has set it up wrongly."""
        bar = self._space.get(self._window + _CAP_BAR, 1)
        offset = self._space.get(self._window + _CAP_OFFSET, 4)
        length = self._space.get(self._window + _CAP_LENGTH, 4)
        usable = length in {1, 2, 4} and offset % length == 0
        return bar, offset, length if usable else 0

    def _read_window(self) -> None:
        value = self.bar_read(*self._window_target())
        self._space.set(self._window + _CAP_DATA, 4, int.from_bytes(value, "little"))

    def _write_window(self) -> list[Effect]:
        bar, offset, length = self._window_target()
        data = self._space.get(self._window + _CAP_DATA, 4).to_bytes(4, "little")
        return self.bar_write(bar, offset, data[:length])

    # --- BARs ---

    def bar_read(self, bar: int, offset: int, length: int) -> bytes:
        """``length`` bytes of a BAR from ``offset`` on."""
        data = bytearray(length)
        for structure in self._structures.get(bar, ()):
            first, last = structure.overlap(offset, length)
            if first < last:
                data[first - offset : last - offset] = structure.read(first - structure.offset, last - first)
        return bytes(data)

    def bar_write(self, bar: int, offset: int, data: bytes) -> list[Effect]:
        """Write ``data`` to a BAR at ``offset``."""
        effects: list[Effect] = []
        for structure in self._structures.get(bar, ()):
            first, last = structure.overlap(offset, len(data))
            if first < last:
                effects += structure.write(first - structure.offset, data[first - offset : last - offset])
        return effects

    def _read_isr(self, _offset: int, _length: int) -> bytes:
        return bytes([self._isr.take() & 0xFF])

    def _ring_doorbell(self, offset: int, data: bytes) -> Sequence[Effect]:
        # The address names the queue, whatever the value says.
        return self._device.doorbell(offset // NOTIFY_MULTIPLIER, data)

    def _read_msix_table(self, offset: int, length: int) -> bytes:
        return bytes(self._msix_table[offset : offset + length])

    def _write_msix_table(self, offset: int, data: bytes) -> list[Effect]:
        self._msix_table[offset : offset + len(data)] = data
        return []


def _bar(index: int) -> int:
    """The offset of a BAR register in configuration space."""
    return _BAR0 + 4 * index


def _bar_size_for(size: int) -> int:
    """The size of a BAR that holds ``size`` bytes: whole pages, a power of two."""
    return max(_PAGE, 1 << (size - 1).bit_length())


def _le32(value: int) -> bytes:
    return value.to_bytes(4, "little")


def _virtio_capability(
    cfg_type: PciCapType, offset: int, length: int, extra: bytes = b"", *, bar: int = VIRTIO_BAR
) -> bytes:
    """A struct virtio_pci_cap without its cap_next ("Virtio Structure PCI Capabilities")."""
    size = _CAP_DATA + len(extra)
    return bytes([_CAP_ID_VENDOR, size, cfg_type, bar, 0, 0, 0]) + _le32(offset) + _le32(length) + extra


def _zeroes(_offset: int, length: int) -> bytes:
    return bytes(length)


def _ignore(_offset: int, _data: bytes) -> list[Effect]:
    return []
