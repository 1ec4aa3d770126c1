"""Rules about what is offered and how registers answer, held against the device and its PCI function alone."""

from __future__ import annotations

import pytest
from registers import ALL, DISK, LIVE, Driver, a_config
from test_pci import Function

from vmmblk.block import Operation, Topology
from vmmblk.device import StartQueue, configure
from vmmblk.pci import VIRTIO_BAR
from vmmblk.spec import BlkConfig, CommonCfg, Feature, PciCapType

BLOCK_BITS = range(24)
RING_BITS = [*range(28, 30), *range(32, 37), 38, 39, 40, 43]
"""Of what may be offered on PCI by a device without legacy interface, administration queues and SR-IOV."""

FIELDS_OF = {
    Feature.BLK_SIZE_MAX: [(BlkConfig.SIZE_MAX, 4)],
    Feature.BLK_SEG_MAX: [(BlkConfig.SEG_MAX, 4)],
    Feature.BLK_GEOMETRY: [(BlkConfig.GEOMETRY, 4)],
    Feature.BLK_BLK_SIZE: [(BlkConfig.BLK_SIZE, 4)],
    Feature.BLK_TOPOLOGY: [(BlkConfig.PHYSICAL_BLOCK_EXP, 8)],
    Feature.BLK_CONFIG_WCE: [(BlkConfig.WRITEBACK, 1)],
    Feature.BLK_MQ: [(BlkConfig.NUM_QUEUES, 2)],
    Feature.BLK_DISCARD: [(BlkConfig.MAX_DISCARD_SECTORS, 12)],
    Feature.BLK_WRITE_ZEROES: [(BlkConfig.MAX_WRITE_ZEROES_SECTORS, 9)],
    Feature.BLK_SECURE_ERASE: [(BlkConfig.MAX_SECURE_ERASE_SECTORS, 12)],
    Feature.BLK_ZONED: [(BlkConfig.ZONED, 24)],
}

every_disk = pytest.mark.parametrize(
    "ops", [Operation(0), Operation.FLUSH, Operation.DISCARD, Operation.WRITE_ZEROES, ALL], ids=str
)


@every_disk
def test_only_bits_of_this_device_are_offered(ops: Operation) -> None:
    """FEAT-004, FEAT-007, RSVD-001, RSVD-013, BLK-035: none for another type, none unused, not zoned by itself."""
    offered = Driver(configure(DISK, ops, Topology())).offered()
    assert offered & ~sum(1 << bit for bit in (*BLOCK_BITS, *RING_BITS)) == 0
    assert not offered & Feature.BLK_ZONED.mask
    assert offered & Feature.VERSION_1.mask


@every_disk
def test_fields_belong_to_features(ops: Operation) -> None:
    """FEAT-008: whatever is beyond the capacity is 0 unless the feature that it belongs to is offered."""
    driver = Driver(configure(DISK, ops, Topology()))
    space = bytearray(driver.device.config_read(0, 128))
    for feature, fields in FIELDS_OF.items():
        if driver.device.config.offers(feature):
            for offset, length in fields:
                space[offset : offset + length] = bytes(length)
    assert space[8:] == bytes(120)


@pytest.mark.parametrize(
    ("register", "width", "value"),
    [
        (CommonCfg.DEVICE_FEATURE_SELECT, 4, 1),
        (CommonCfg.DRIVER_FEATURE_SELECT, 4, 1),
        (CommonCfg.CONFIG_MSIX_VECTOR, 2, 1),
        (CommonCfg.DEVICE_STATUS, 1, 1),
        (CommonCfg.QUEUE_SELECT, 2, 2),
        (CommonCfg.QUEUE_SIZE, 2, 32),
        (CommonCfg.QUEUE_MSIX_VECTOR, 2, 3),
        (CommonCfg.QUEUE_DESC, 4, 0x89ABCDE0),
        (CommonCfg.QUEUE_DRIVER + 4, 4, 0x01234567),
        (CommonCfg.QUEUE_DEVICE, 4, 0xFFFFFFF0),
    ],
)
def test_a_field_answers_in_its_own_width(register: int, width: int, value: int) -> None:
    """PCI-012, PCI-053: what is written to a field at its offset, in its width, is read there, and nowhere else."""
    function = Function()
    before = function.pci.bar_read(VIRTIO_BAR, 0, 64)
    function.pci.bar_write(VIRTIO_BAR, register, value.to_bytes(width, "little"))
    assert function.pci.bar_read(VIRTIO_BAR, register, width) == value.to_bytes(width, "little")
    after = function.pci.bar_read(VIRTIO_BAR, 0, 64)
    windows = range(CommonCfg.DEVICE_FEATURE, CommonCfg.CONFIG_MSIX_VECTOR)  # show what a select register selects
    of_queue = range(CommonCfg.QUEUE_SIZE, 64) if register == CommonCfg.QUEUE_SELECT else range(0)
    own = [*range(register, register + width), *windows, *of_queue]
    assert [at for at in range(64) if before[at] != after[at] and at not in own] == []


def test_capability_ids_are_zero() -> None:
    """PCI-024: a block device assigns no meaning to the id of a capability."""
    function = Function()
    for cfg_type in (PciCapType.COMMON_CFG, PciCapType.NOTIFY_CFG, PciCapType.ISR_CFG, PciCapType.DEVICE_CFG):
        assert function.virtio(cfg_type)[1][5:8] == bytes(3)


def test_only_defined_structures_are_presented() -> None:
    """PCI-016: the types are the five that a block device without shared memory and vendor data has."""
    types = [body[3] for _, body in Function().capabilities() if body[0] == 0x09]
    assert sorted(types) == [1, 2, 3, 4, 5]


def test_each_area_is_where_the_driver_puts_it() -> None:
    """PCI-045: descriptor, driver and device area are handed on as 64-bit addresses, each its own."""
    driver = Driver(a_config())
    driver.negotiate()
    driver.set_up_queue()
    driver.write(CommonCfg.QUEUE_DESC, 0xF000_0000_1000)
    driver.write(CommonCfg.QUEUE_DRIVER, 0xE000_0000_0008)
    driver.write(CommonCfg.QUEUE_DEVICE, 0xD000_0000_0004)
    driver.enable()
    (effect,) = driver.write_status(LIVE)
    assert isinstance(effect, StartQueue)
    queue = effect.queue
    assert (queue.desc, queue.driver, queue.device) == (0xF000_0000_1000, 0xE000_0000_0008, 0xD000_0000_0004)


def test_a_queue_without_enable_is_not_served() -> None:
    """PCI-046: only queues with queue_enable 1 start at DRIVER_OK."""
    driver = Driver(a_config())
    driver.negotiate()
    for index in range(3):
        driver.set_up_queue(index)
        if index != 1:
            driver.enable()
    assert [each.queue.index for each in driver.write_status(LIVE) if isinstance(each, StartQueue)] == [0, 2]
    assert driver.device.doorbell(1) == []
