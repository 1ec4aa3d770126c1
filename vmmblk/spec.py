"""Wire constants and structures of VIRTIO 1.4, named as the specification names them.

Nothing here decides anything: numbers, bit names and little-endian layouts only.  All multi-byte fields are
little-endian without padding ("Structure Specifications").  Each group names the section it comes from.
"""

from __future__ import annotations

import enum
import struct

__all__ = [
    "BLK_CONFIG_SIZE",
    "BLK_ID_BYTES",
    "COMMON_CFG_SIZE",
    "DISCARD_SEGMENT",
    "LIFETIME",
    "NO_VECTOR",
    "PCI_DEVICE_ID_BLK",
    "PCI_VENDOR_ID_VIRTIO",
    "QUEUE_SIZE_MAX",
    "REQUEST_HEADER",
    "SECTOR_SIZE",
    "WRITE_ZEROES_FLAG_UNMAP",
    "ZONE_APPEND_SECTOR",
    "ZONE_DESCRIPTOR",
    "ZONE_REPORT_HEADER",
    "BlkConfig",
    "CommonCfg",
    "DescFlag",
    "DeviceStatus",
    "Feature",
    "IsrStatus",
    "PciCapType",
    "RequestType",
    "Status",
    "ZoneModel",
    "ZoneState",
    "ZoneType",
]

SECTOR_SIZE = 512
"""Bytes per sector of the protocol; blk_size never changes it ("Block Device / Device Operation")."""

PCI_VENDOR_ID_VIRTIO = 0x1AF4
PCI_DEVICE_ID_BLK = 0x1042  # 0x1040 + device type 2, non-transitional

NO_VECTOR = 0xFFFF  # VIRTIO_MSI_NO_VECTOR
QUEUE_SIZE_MAX = 32768


class Feature(enum.IntEnum):
    """Feature bit numbers ("Feature bits", "Reserved Feature Bits")."""

    BLK_SIZE_MAX = 1
    BLK_SEG_MAX = 2
    BLK_GEOMETRY = 4
    BLK_RO = 5
    BLK_BLK_SIZE = 6
    BLK_FLUSH = 9
    BLK_TOPOLOGY = 10
    BLK_CONFIG_WCE = 11
    BLK_MQ = 12
    BLK_DISCARD = 13
    BLK_WRITE_ZEROES = 14
    BLK_LIFETIME = 15
    BLK_SECURE_ERASE = 16
    BLK_ZONED = 17
    INDIRECT_DESC = 28
    EVENT_IDX = 29
    VERSION_1 = 32
    ACCESS_PLATFORM = 33
    RING_PACKED = 34
    IN_ORDER = 35
    ORDER_PLATFORM = 36
    SR_IOV = 37
    NOTIFICATION_DATA = 38
    NOTIF_CONFIG_DATA = 39
    RING_RESET = 40
    ADMIN_VQ = 41
    SUSPEND = 43

    @property
    def mask(self) -> int:
        """The feature as a bit mask."""
        return 1 << self.value


class DeviceStatus(enum.IntFlag):
    """Bits of device_status ("Device Status Field")."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    SUSPEND = 16
    NEEDS_RESET = 64
    FAILED = 128


class IsrStatus(enum.IntFlag):
    """Bits of the ISR status byte ("ISR status capability")."""

    QUEUE = 1
    CONFIG = 2


class PciCapType(enum.IntEnum):
    """cfg_type of a virtio PCI capability ("Virtio Structure PCI Capabilities")."""

    COMMON_CFG = 1
    NOTIFY_CFG = 2
    ISR_CFG = 3
    DEVICE_CFG = 4
    PCI_CFG = 5


class CommonCfg(enum.IntEnum):
    """Offsets in struct virtio_pci_common_cfg, bytes ("Common configuration structure layout")."""

    DEVICE_FEATURE_SELECT = 0x00
    DEVICE_FEATURE = 0x04
    DRIVER_FEATURE_SELECT = 0x08
    DRIVER_FEATURE = 0x0C
    CONFIG_MSIX_VECTOR = 0x10
    NUM_QUEUES = 0x12
    DEVICE_STATUS = 0x14
    CONFIG_GENERATION = 0x15
    QUEUE_SELECT = 0x16
    QUEUE_SIZE = 0x18
    QUEUE_MSIX_VECTOR = 0x1A
    QUEUE_ENABLE = 0x1C
    QUEUE_NOTIFY_OFF = 0x1E
    QUEUE_DESC = 0x20
    QUEUE_DRIVER = 0x28
    QUEUE_DEVICE = 0x30
    QUEUE_NOTIF_CONFIG_DATA = 0x38
    QUEUE_RESET = 0x3A
    ADMIN_QUEUE_INDEX = 0x3C
    ADMIN_QUEUE_NUM = 0x3E


COMMON_CFG_SIZE = 64


class BlkConfig(enum.IntEnum):
    """Offsets in struct virtio_blk_config, bytes ("Block Device / Device configuration layout")."""

    CAPACITY = 0
    SIZE_MAX = 8
    SEG_MAX = 12
    GEOMETRY = 16
    BLK_SIZE = 20
    PHYSICAL_BLOCK_EXP = 24
    ALIGNMENT_OFFSET = 25
    MIN_IO_SIZE = 26
    OPT_IO_SIZE = 28
    WRITEBACK = 32
    NUM_QUEUES = 34
    MAX_DISCARD_SECTORS = 36
    MAX_DISCARD_SEG = 40
    DISCARD_SECTOR_ALIGNMENT = 44
    MAX_WRITE_ZEROES_SECTORS = 48
    MAX_WRITE_ZEROES_SEG = 52
    WRITE_ZEROES_MAY_UNMAP = 56
    MAX_SECURE_ERASE_SECTORS = 60
    MAX_SECURE_ERASE_SEG = 64
    SECURE_ERASE_SECTOR_ALIGNMENT = 68
    ZONED = 72
    ZONE_SECTORS = 72
    MAX_OPEN_ZONES = 76
    MAX_ACTIVE_ZONES = 80
    MAX_APPEND_SECTORS = 84
    WRITE_GRANULARITY = 88
    ZONED_MODEL = 92


BLK_CONFIG_SIZE = 96


class DescFlag(enum.IntFlag):
    """Flags of struct virtq_desc ("The Virtqueue Descriptor Table")."""

    NEXT = 1
    WRITE = 2
    INDIRECT = 4


class RequestType(enum.IntEnum):
    """Types of a block request ("Block Device / Device Operation")."""

    IN = 0
    OUT = 1
    FLUSH = 4
    GET_ID = 8
    GET_LIFETIME = 10
    DISCARD = 11
    WRITE_ZEROES = 13
    SECURE_ERASE = 14
    ZONE_APPEND = 15
    ZONE_REPORT = 16
    ZONE_OPEN = 18
    ZONE_CLOSE = 20
    ZONE_FINISH = 22
    ZONE_RESET = 24
    ZONE_RESET_ALL = 26


class ZoneModel(enum.IntEnum):
    """Whether sequential zones must be written in order, or should be ("Zoned Block Device")."""

    HOST_MANAGED = 1
    HOST_AWARE = 2


class ZoneType(enum.IntEnum):
    """How a zone may be written."""

    CONVENTIONAL = 1
    SEQUENTIAL_REQUIRED = 2
    SEQUENTIAL_PREFERRED = 3


class ZoneState(enum.IntEnum):
    """Where a zone is in its life."""

    NOT_WRITE_POINTER = 0
    EMPTY = 1
    IMPLICIT_OPEN = 2
    EXPLICIT_OPEN = 3
    CLOSED = 4
    READ_ONLY = 13
    FULL = 14
    OFFLINE = 15


class Status(enum.IntEnum):
    """Status byte of a block request ("Block Device / Device Operation")."""

    OK = 0
    IOERR = 1
    UNSUPP = 2
    ZONE_INVALID_CMD = 3
    ZONE_UNALIGNED_WP = 4
    ZONE_OPEN_RESOURCE = 5
    ZONE_ACTIVE_RESOURCE = 6


REQUEST_HEADER = struct.Struct("<IIQ")
"""struct virtio_blk_req up to the data: type, reserved, sector (in 512-byte units)."""

DISCARD_SEGMENT = struct.Struct("<QII")
"""struct virtio_blk_discard_write_zeroes: sector, num_sectors (both 512-byte units), flags."""

WRITE_ZEROES_FLAG_UNMAP = 1

LIFETIME = struct.Struct("<HHH")
"""struct virtio_blk_lifetime: pre_eol_info, device_lifetime_est_typ_a, device_lifetime_est_typ_b."""

ZONE_REPORT_HEADER = struct.Struct("<Q56x")
"""struct virtio_blk_zone_report up to the descriptors: nr_zones."""

ZONE_DESCRIPTOR = struct.Struct("<QQQBB38x")
"""struct virtio_blk_zone_descriptor: z_cap, z_start, z_wp, z_type, z_state."""

ZONE_APPEND_SECTOR = struct.Struct("<Q")
"""append_sector, between the data and the status of a zone append."""

BLK_ID_BYTES = 20
"""Length of a GET_ID answer: ASCII, NUL padded, no terminator when all bytes are used."""
