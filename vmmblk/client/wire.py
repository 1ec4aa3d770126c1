"""The vfio-user protocol on the wire: commands, flags and structures, all little-endian and packed.

A message is a 16-byte header and a payload; file descriptors travel beside it (SCM_RIGHTS).  Where the payload is a
VFIO structure it is the kernel's own (``linux/vfio.h``), without the parts that only a kernel can use.
"""

from __future__ import annotations

import enum
import struct
from typing import NamedTuple

__all__ = [
    "DEVICE_INFO",
    "DMA_ACCESS",
    "DMA_MAP",
    "DMA_UNMAP",
    "HEADER",
    "IO_FD",
    "IO_FDS",
    "IRQ_INFO",
    "IRQ_SET",
    "MESSAGE_SIZE_MAX",
    "REGION_ACCESS",
    "REGION_INFO",
    "VERSION",
    "Command",
    "DmaFlag",
    "Header",
    "HeaderFlag",
    "IrqIndex",
    "IrqSetFlag",
    "Message",
    "Region",
    "RegionFlag",
    "decode_header",
    "encode",
    "encode_dma_map",
    "encode_dma_unmap",
    "encode_region_read",
    "encode_region_write",
    "encode_set_irqs",
]


class Command(enum.IntEnum):
    """Message types."""

    VERSION = 1
    DMA_MAP = 2
    DMA_UNMAP = 3
    DEVICE_GET_INFO = 4
    DEVICE_GET_REGION_INFO = 5
    DEVICE_GET_REGION_IO_FDS = 6
    DEVICE_GET_IRQ_INFO = 7
    DEVICE_SET_IRQS = 8
    REGION_READ = 9
    REGION_WRITE = 10
    DMA_READ = 11
    DMA_WRITE = 12
    DEVICE_RESET = 13
    DIRTY_PAGES = 14


class HeaderFlag(enum.IntFlag):
    """The flags word of the header; the low four bits are a type: 0 command, 1 reply."""

    REPLY = 1
    NO_REPLY = 0x10
    ERROR = 0x20


class DmaFlag(enum.IntFlag):
    """What the device may do with a DMA region."""

    READ = 1
    WRITE = 2


class Region(enum.IntEnum):
    """Regions of a PCI device beyond BAR 0 to 5, which are regions 0 to 5."""

    ROM = 6
    CONFIG = 7


class RegionFlag(enum.IntFlag):
    """Flags of a region."""

    READ = 1
    WRITE = 2
    MMAP = 4
    CAPS = 8


class IrqIndex(enum.IntEnum):
    """Interrupt kinds of a PCI device."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class IrqSetFlag(enum.IntFlag):
    """Flags of SET_IRQS: one kind of data and one action."""

    DATA_NONE = 1
    DATA_BOOL = 2
    DATA_EVENTFD = 4
    ACTION_MASK = 8
    ACTION_UNMASK = 16
    ACTION_TRIGGER = 32


HEADER = struct.Struct("<HHIII")
"""msg_id, command, msg_size (header included), flags, error_no."""

VERSION = struct.Struct("<HH")
"""major, minor; JSON text with a terminating NUL follows."""

DMA_MAP = struct.Struct("<IIQQQ")
"""argsz, flags, offset in the file, address (IOVA), size."""

DMA_UNMAP = struct.Struct("<IIQQ")
"""argsz, flags, address (IOVA), size."""

DEVICE_INFO = struct.Struct("<IIII")
"""argsz, flags, num_regions, num_irqs."""

REGION_INFO = struct.Struct("<IIIIQQ")
"""argsz, flags, index, cap_offset, size, offset."""

IO_FDS = struct.Struct("<IIII")
"""argsz, flags, index, count; that many sub-regions follow, all of one size, in the answer."""

IO_FD = struct.Struct("<QQIII")
"""offset, size, fd_index, type, flags of a sub-region; the rest depends on the server's version."""

IRQ_INFO = struct.Struct("<IIII")
"""argsz, flags, index, count."""

IRQ_SET = struct.Struct("<IIIII")
"""argsz, flags, index, start, count."""

REGION_ACCESS = struct.Struct("<QII")
"""offset, region, count; the data follows."""

DMA_ACCESS = struct.Struct("<QQ")
"""address (IOVA), count; the data follows."""

MESSAGE_SIZE_MAX = (1 << 20) + 4096
"""No message of a sane peer is bigger: the largest transfer we allow and its headers."""


class Header(NamedTuple):
    """A decoded message header; ``size`` includes its own 16 bytes."""

    msg_id: int
    command: int
    size: int
    flags: int
    error: int


class Message(NamedTuple):
    """A whole message.  Whoever takes it owns the descriptors in ``fds``."""

    header: Header
    payload: bytes
    fds: tuple[int, ...]

    @property
    def is_reply(self) -> bool:
        """Whether it answers a command."""
        return self.header.flags & 0xF == HeaderFlag.REPLY


def encode(msg_id: int, command: int, payload: bytes = b"", flags: int = 0, error: int = 0) -> bytes:
    """A message as bytes; ``payload`` follows the header."""
    return HEADER.pack(msg_id, command, HEADER.size + len(payload), flags, error) + payload


def decode_header(data: bytes | bytearray) -> Header:
    """The header in the first 16 bytes of ``data``."""
    return Header(*HEADER.unpack_from(data))


def encode_dma_map(iova: int, size: int, offset: int, flags: int) -> bytes:
    """The payload of DMA_MAP."""
    return DMA_MAP.pack(DMA_MAP.size, flags, offset, iova, size)


def encode_dma_unmap(iova: int, size: int, flags: int = 0) -> bytes:
    """The payload of DMA_UNMAP."""
    return DMA_UNMAP.pack(DMA_UNMAP.size, flags, iova, size)


def encode_region_read(region: int, offset: int, length: int) -> bytes:
    """The payload of REGION_READ."""
    return REGION_ACCESS.pack(offset, region, length)


def encode_region_write(region: int, offset: int, data: bytes) -> bytes:
    """The payload of REGION_WRITE."""
    return REGION_ACCESS.pack(offset, region, len(data)) + data


def encode_set_irqs(index: int, start: int, count: int, flags: int) -> bytes:
    """The payload of DEVICE_SET_IRQS."""
    return IRQ_SET.pack(IRQ_SET.size, flags, index, start, count)
