"""The constants and layouts are those of VIRTIO 1.4."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from vmmblk import spec
from vmmblk.spec import BlkConfig, CommonCfg, DeviceStatus, Feature, PciCapType, RequestType, Status

if TYPE_CHECKING:
    import struct

FEATURE_BITS = {
    Feature.BLK_SIZE_MAX: 1,
    Feature.BLK_SEG_MAX: 2,
    Feature.BLK_GEOMETRY: 4,
    Feature.BLK_RO: 5,
    Feature.BLK_BLK_SIZE: 6,
    Feature.BLK_FLUSH: 9,
    Feature.BLK_TOPOLOGY: 10,
    Feature.BLK_CONFIG_WCE: 11,
    Feature.BLK_MQ: 12,
    Feature.BLK_DISCARD: 13,
    Feature.BLK_WRITE_ZEROES: 14,
    Feature.BLK_LIFETIME: 15,
    Feature.BLK_SECURE_ERASE: 16,
    Feature.BLK_ZONED: 17,
    Feature.INDIRECT_DESC: 28,
    Feature.EVENT_IDX: 29,
    Feature.VERSION_1: 32,
    Feature.ACCESS_PLATFORM: 33,
    Feature.RING_PACKED: 34,
    Feature.IN_ORDER: 35,
    Feature.ORDER_PLATFORM: 36,
    Feature.SR_IOV: 37,
    Feature.NOTIFICATION_DATA: 38,
    Feature.NOTIF_CONFIG_DATA: 39,
    Feature.RING_RESET: 40,
    Feature.ADMIN_VQ: 41,
    Feature.SUSPEND: 43,
}


def test_every_feature_has_its_bit_number_and_mask() -> None:
    """Feature bits are numbered as in "Feature bits" and "Reserved Feature Bits"; mask is one bit."""
    assert {feature: feature.value for feature in Feature} == FEATURE_BITS
    assert all(feature.mask == 1 << bit for feature, bit in FEATURE_BITS.items())


def test_status_bits_are_those_of_the_status_field() -> None:
    """STAT-002: each status bit has its value."""
    assert [bit.value for bit in DeviceStatus] == [1, 2, 4, 8, 16, 64, 128]


def test_common_configuration_fields_are_contiguous() -> None:
    """Each field of struct virtio_pci_common_cfg begins where the previous one ends, 64 bytes in all."""
    widths = [4, 4, 4, 4, 2, 2, 1, 1, 2, 2, 2, 2, 2, 8, 8, 8, 2, 2, 2, 2]
    offsets = [sum(widths[:index]) for index in range(len(widths))]
    assert [field.value for field in CommonCfg] == offsets
    assert sum(widths) == spec.COMMON_CFG_SIZE


def test_block_configuration_fields_are_where_the_table_has_them() -> None:
    """BLK-024: struct virtio_blk_config is 96 bytes with the zoned block at offset 72."""
    offsets = [0, 8, 12, 16, 20, 24, 25, 26, 28, 32, 34, 36, 40, 44, 48, 52, 56, 60, 64, 68, 72, 76, 80, 84, 88, 92]
    assert [field.value for field in BlkConfig] == offsets
    assert spec.BLK_CONFIG_SIZE == 96


def test_requests_and_statuses_are_numbered_as_specified() -> None:
    """BLK-054..056: request types and status codes."""
    assert [kind.value for kind in RequestType] == [0, 1, 4, 8, 10, 11, 13, 14, 15, 16, 18, 20, 22, 24, 26]
    assert [status.value for status in Status] == [0, 1, 2, 3, 4, 5, 6]
    assert [kind.value for kind in PciCapType] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("layout", "values", "encoded"),
    [
        (spec.REQUEST_HEADER, (1, 2, 3), "01000000 02000000 0300000000000000"),
        (spec.DISCARD_SEGMENT, (1, 2, 3), "0100000000000000 02000000 03000000"),
    ],
)
def test_structures_are_little_endian_without_padding(
    layout: struct.Struct, values: tuple[int, ...], encoded: str
) -> None:
    """CFG-003, RING-SPLIT-003: the request header and the segment have exactly these 16 bytes."""
    assert layout.pack(*values) == bytes.fromhex(encoded)
