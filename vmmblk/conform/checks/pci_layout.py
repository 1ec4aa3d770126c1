"""The PCI function: header, BARs, capabilities, and where the structures are."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from vmmblk.client.pci import PciDevice
from vmmblk.client.wire import IrqIndex, Region
from vmmblk.conform.check import NotOffered, check, expect
from vmmblk.conform.function import (
    BUS_MASTER,
    COMMAND,
    MEMORY_SPACE,
    SHARED_MEMORY_CFG,
    STATUS,
    VENDOR_CFG,
    Bar,
    bars,
    capabilities,
    negotiate,
    only,
)
from vmmblk.spec import PCI_DEVICE_ID_BLK, PCI_VENDOR_ID_VIRTIO, BlkConfig, CommonCfg, Feature, PciCapType

if TYPE_CHECKING:
    from vmmblk.conform.function import VirtioCap
    from vmmblk.conform.target import Target

_DEVICE_ID_TRANSITIONAL = 0x1001
_REVISION, _CLASS, _HEADER_TYPE, _BAR0 = 0x08, 0x09, 0x0E, 0x10
_SUBSYSTEM_VENDOR, _SUBSYSTEM_ID, _CAPABILITIES, _INTERRUPT_PIN = 0x2C, 0x2E, 0x34, 0x3D
_DECODE = 3  # I/O and memory space of the command register
_ONES = b"\xff\xff\xff\xff"

_MANDATORY = (
    PciCapType.COMMON_CFG,
    PciCapType.NOTIFY_CFG,
    PciCapType.ISR_CFG,
    PciCapType.DEVICE_CFG,
    PciCapType.PCI_CFG,
)

_CONFIG_ENDS = {
    Feature.BLK_SIZE_MAX: BlkConfig.SEG_MAX,
    Feature.BLK_SEG_MAX: BlkConfig.GEOMETRY,
    Feature.BLK_GEOMETRY: BlkConfig.BLK_SIZE,
    Feature.BLK_BLK_SIZE: BlkConfig.PHYSICAL_BLOCK_EXP,
    Feature.BLK_TOPOLOGY: BlkConfig.WRITEBACK,
    Feature.BLK_CONFIG_WCE: BlkConfig.WRITEBACK + 1,
    Feature.BLK_MQ: BlkConfig.MAX_DISCARD_SECTORS,
    Feature.BLK_DISCARD: BlkConfig.MAX_WRITE_ZEROES_SECTORS,
    Feature.BLK_WRITE_ZEROES: BlkConfig.WRITE_ZEROES_MAY_UNMAP + 1,
    Feature.BLK_SECURE_ERASE: BlkConfig.ZONED,
    Feature.BLK_ZONED: BlkConfig.ZONED_MODEL + 1,
}
"""Where the fields of each feature end in the block configuration."""

_COMMON_ENDS = {
    Feature.VERSION_1: CommonCfg.QUEUE_NOTIF_CONFIG_DATA,
    Feature.NOTIF_CONFIG_DATA: CommonCfg.QUEUE_RESET,
    Feature.RING_RESET: CommonCfg.ADMIN_QUEUE_INDEX,
    Feature.ADMIN_VQ: CommonCfg.ADMIN_QUEUE_NUM + 2,
}
"""Where the registers of each feature end in the common configuration."""


# What it is.


@check()
def identity(target: Target) -> None:
    """Vendor 0x1AF4; device 0x1042, or 0x1001 with all that makes it transitional (PCI-002, PCI-003)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        expect(pci.vendor_id == PCI_VENDOR_ID_VIRTIO, f"the vendor id is {pci.vendor_id:#06x}")
        if pci.device_id == _DEVICE_ID_TRANSITIONAL:
            _expect_transitional(pci)
        else:
            expect(pci.device_id == PCI_DEVICE_ID_BLK, f"the device id is {pci.device_id:#06x}")


def _expect_transitional(pci: PciDevice) -> None:
    revision, subsystem = pci.config_field(_REVISION, 1), pci.config_field(_SUBSYSTEM_ID, 2)
    first = bars(pci).get(0)
    said = "the device id is the transitional one, 0x1001"
    expect(revision == 0, f"{said}, and the revision {revision}")
    expect(subsystem == 2, f"{said}, and the subsystem id {subsystem:#x}")
    expect(first and first.io, f"{said}, and BAR 0 is no I/O space")


def _modern(pci: PciDevice) -> PciDevice:
    if pci.device_id == _DEVICE_ID_TRANSITIONAL:
        raise NotOffered("the device is transitional")
    return pci


@check()
def modern_device_id(target: Target) -> None:
    """A device that is not transitional has an id from 0x1040 to 0x107F (PCI-004)."""
    with target.connection() as connection:
        pci = _modern(PciDevice(connection))
        expect(0x1040 <= pci.device_id <= 0x107F, f"the device id is {pci.device_id:#06x}")


@check()
def modern_revision(target: Target) -> None:
    """A device that is not transitional has revision 1 or higher (PCI-005)."""
    with target.connection() as connection:
        revision = _modern(PciDevice(connection)).config_field(_REVISION, 1)
        expect(revision >= 1, f"the revision is {revision}")


@check()
def modern_subsystem(target: Target) -> None:
    """A device that is not transitional has a subsystem device id of 0x40 or higher (PCI-006)."""
    with target.connection() as connection:
        subsystem = _modern(PciDevice(connection)).config_field(_SUBSYSTEM_ID, 2)
        expect(subsystem >= 0x40, f"the subsystem device id is {subsystem:#x}")


# A PCI function.


@check()
def header(target: Target) -> None:
    """A header of type 0, a capability list behind it, an interrupt pin if there is INTx (PCI-001)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        kind = pci.config_field(_HEADER_TYPE, 1)
        expect(kind & 0x7F == 0, f"the header type is {kind:#x}")
        expect(pci.capabilities, f"status is {pci.config_field(STATUS, 2):#x}: there is no capability list")
        size = connection.region_info(Region.CONFIG).size
        for each in pci.capabilities:
            expect(each.position + 2 <= min(size, 256), f"a capability lies at {each.position:#x}")
        pin, lines = pci.config_field(_INTERRUPT_PIN, 1), connection.irq_info(IrqIndex.INTX).vectors
        expect((1 <= pin <= 4) if lines else pin == 0, f"the interrupt pin is {pin}, and there are {lines} INTx lines")


@check()
def command_register(target: Target) -> None:
    """Memory space and bus master can be switched, and read back as switched (PCI-001)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        was = pci.config_field(COMMAND, 2)
        try:
            for bits in (0, MEMORY_SPACE, BUS_MASTER, MEMORY_SPACE | BUS_MASTER, 0):
                pci.config_write(COMMAND, struct.pack("<H", bits))
                back = pci.config_field(COMMAND, 2)
                expect(back == bits, f"the command register reads {back:#x} after {bits:#x} was written")
        finally:
            pci.config_write(COMMAND, struct.pack("<H", was))


@check()
def read_only_header(target: Target) -> None:
    """Ids, revision, class, header type and the capability pointer stay whatever is written there (PCI-001)."""
    fields = ((0, 4), (_REVISION, 4), (_HEADER_TYPE, 1), (_SUBSYSTEM_VENDOR, 4), (_CAPABILITIES, 1))
    with target.connection() as connection:
        pci = PciDevice(connection)
        for offset, width in fields:
            was = pci.config_read(offset, width)
            for value in (b"\xff" * width, bytes(width)):
                pci.config_write(offset, value)
                seen = pci.config_read(offset, width)
                pci.config_write(offset, was)
                expect(seen == was, f"the field at {offset:#x} of configuration space can be written")


@check()
def bars_can_be_sized(target: Target) -> None:
    """Ones written to a BAR read back as its size, a power of two, and its type (PCI-001)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        command = pci.config_field(COMMAND, 2)
        pci.config_write(COMMAND, struct.pack("<H", command & ~_DECODE))
        try:
            for bar in bars(pci).values():
                expect(bar.size & (bar.size - 1) == 0, f"BAR {bar.number} has {bar.size:#x} bytes, no power of two")
                shown = _sized(pci, bar)
                expect(shown == bar.size, f"BAR {bar.number} has {bar.size:#x} bytes and shows {shown:#x}")
        finally:
            pci.config_write(COMMAND, struct.pack("<H", command))


def _sized(pci: PciDevice, bar: Bar) -> int:
    """The size that a BAR shows when ones are written to it; it is put back."""
    registers = [_BAR0 + 4 * bar.number + 4 * half for half in range(2 if bar.wide else 1)]
    before = [pci.config_read(register, 4) for register in registers]
    for register in registers:
        pci.config_write(register, _ONES)
    ones = [pci.config_field(register, 4) for register in registers]
    for register, value in zip(registers, before, strict=True):
        pci.config_write(register, value)
    kind = 3 if bar.io else 0xF
    expect(ones[0] & kind == bar.register & kind, f"the type of BAR {bar.number} can be written")
    width = 32 * len(registers)
    shown = sum(half << 32 * position for position, half in enumerate(ones)) & ~kind
    return -shown & (1 << width) - 1


# Capabilities.


@check()
def capabilities_are_whole(target: Target) -> None:
    """Each is long enough for its type, and none begins within another (PCI-013, PCI-014, PCI-059)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        found = capabilities(pci)
        missing = [kind.name for kind in _MANDATORY if kind not in {each.cfg_type for each in found}]
        expect(not missing, f"the capability list has no {', '.join(missing)}")
        for each in found:
            expect(each.cap_len >= each.least_len, f"the {each.name} has length {each.cap_len}, not {each.least_len}")
            inside = range(each.position + 1, each.position + each.cap_len)
            others = [f"{other.position:#x}" for other in pci.capabilities if other.position in inside]
            expect(not others, f"within the {each.name}, of {each.cap_len} bytes, another begins at {others}")


@check()
def capability_types(target: Target) -> None:
    """cfg_type is 1 to 5, 8 or 9 (PCI-016)."""
    known = {*_MANDATORY, SHARED_MEMORY_CFG, VENDOR_CFG}
    with target.connection() as connection:
        strange = [each.name for each in capabilities(PciDevice(connection)) if each.cfg_type not in known]
        expect(not strange, f"there is a {strange}")


@check()
def structures_lie_in_bars(target: Target) -> None:
    """Each capability names a BAR that exists, and its structure lies inside it (PCI-017, PCI-018)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        exist = bars(pci)
        upper = {each.number + 1 for each in exist.values() if each.wide}
        for each in capabilities(pci):
            if each.structured:
                expect(each.bar in exist and each.bar not in upper, f"the {each.name} names BAR {each.bar}")
                end, size = each.offset + each.length, exist[each.bar].size
                expect(each.length and end <= size, f"the {each.name} ends at {end:#x} of a BAR of {size:#x}")


@check()
def capabilities_are_read_only(target: Target) -> None:
    """Nothing that is written to a capability other than PCI_CFG stays (PCI-021)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        for each in capabilities(pci):
            if each.structured:
                for value in (_ONES, bytes(4)):
                    _expect_unwritable(pci, each, value)


def _expect_unwritable(pci: PciDevice, each: VirtioCap, value: bytes) -> None:
    places = range(each.position, each.position + len(each.raw) // 4 * 4, 4)
    for place in places:
        pci.config_write(place, value)
    for place in range(each.position, each.position + len(each.raw)):
        pci.config_write(place, value[:1])
    seen = pci.config_read(each.position, len(each.raw))
    if seen != each.raw:
        for at in range(len(each.raw)):
            pci.config_write(each.position + at, each.raw[at : at + 1])
    changed = [f"+{at:#x}" for at in range(len(each.raw)) if seen[at] != each.raw[at]]
    expect(not changed, f"bytes {', '.join(changed)} of the {each.name} can be written")


@check()
def common_structure(target: Target) -> None:
    """COMMON_CFG is there, 4-byte aligned, and holds the registers of what is offered (PCI-026, 027, 047 to 049)."""
    _expect_structure(target, PciCapType.COMMON_CFG, _COMMON_ENDS)


@check()
def device_structure(target: Target) -> None:
    """DEVICE_CFG is there, 4-byte aligned, and holds the fields of what is offered (PCI-082, PCI-083)."""
    _expect_structure(target, PciCapType.DEVICE_CFG, {Feature.VERSION_1: BlkConfig.SIZE_MAX, **_CONFIG_ENDS})


def _expect_structure(target: Target, kind: PciCapType, ends: dict[Feature, int]) -> None:
    needed = max(end for feature, end in ends.items() if target.offers(feature) or feature is Feature.VERSION_1)
    with target.connection() as connection:
        found = only(PciDevice(connection), kind)
        expect(found, f"there is no {kind.name} capability")
        for each in found:
            expect(each.offset % 4 == 0, f"the {each.name} has offset {each.offset:#x}")
            expect(each.length >= needed, f"the {each.name} has {each.length:#x} bytes of {needed:#x}")


@check()
def shared_memory(target: Target) -> None:
    """Shared memory, if there is any, lies inside its BAR, under ids of its own (PCI-025, PCI-084, PCI-085)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        found = only(pci, SHARED_MEMORY_CFG)
        if not found:
            raise NotOffered("there is no shared memory")
        exist = bars(pci)
        for each in found:
            size = exist[each.bar].size if each.bar in exist else 0
            expect(each.offset + each.length <= size, f"the {each.name} ends beyond BAR {each.bar}, of {size:#x} bytes")
        ids = [each.id for each in found]
        expect(len(set(ids)) == len(ids), f"the ids of shared memory are {ids}")


@check()
def vendor_data(target: Target) -> None:
    """Vendor data, if there is any, is not of 0x1AF4, whole dwords long, harmless to read (PCI-087 to 089)."""
    with target.driver() as driver:
        found = only(driver.pci, VENDOR_CFG)
        if not found:
            raise NotOffered("there is no vendor data capability")
        status = driver.status
        for each in found:
            vendor = int.from_bytes(each.raw[4:6], "little")
            expect(vendor != PCI_VENDOR_ID_VIRTIO, f"the {each.name} has vendor id {vendor:#06x}")
            expect(each.cap_len % 4 == 0, f"the {each.name} has length {each.cap_len}")
            for at in range(0, len(each.raw), 4):
                driver.pci.config_read(each.position + at, 4)
        again = only(driver.pci, VENDOR_CFG)
        expect(again == found, "vendor data changes when it is read")
        expect(driver.status == status, f"reading vendor data changes the status to {driver.status:#x}")


# Fields.


@check()
def fields_are_little_endian(target: Target) -> None:
    """The lowest byte of a field comes first, the low dword of a 64-bit one too (PCI-010)."""
    with target.driver(start=False) as driver:
        common = driver.pci.common
        driver.reset()
        common.write_bytes(CommonCfg.DEVICE_FEATURE_SELECT, bytes([1, 0, 0, 0]))
        window = common.read_bytes(CommonCfg.DEVICE_FEATURE, 4)
        expect(window[0] & 1, f"VERSION_1 is not the lowest bit of the first byte of window 1: {window.hex()}")
        queues = common.read_bytes(CommonCfg.NUM_QUEUES, 2)
        common.write_bytes(CommonCfg.QUEUE_SELECT, (int.from_bytes(queues, "little") - 1).to_bytes(2, "little"))
        size = common.read_bytes(CommonCfg.QUEUE_SIZE, 2)
        expect(any(size), f"num_queues is {queues.hex()}, and the last queue has size 0")
    with target.driver() as driver:
        low, high = (driver.device.config_bytes(at, 4) for at in (BlkConfig.CAPACITY, BlkConfig.CAPACITY + 4))
        capacity = int.from_bytes(low + high, "little")
        if capacity >= target.block_sectors:
            driver.read(capacity - target.block_sectors, target.facts.block_size)


@check()
def halves_are_accessed_apart(target: Target) -> None:
    """Either half of a 64-bit field can be read and written on its own (PCI-011)."""
    fields = (CommonCfg.QUEUE_DESC, CommonCfg.QUEUE_DRIVER, CommonCfg.QUEUE_DEVICE)
    with target.driver(start=False) as driver:
        negotiate(driver, target.mask())
        common, device = driver.pci.common, driver.pci.device
        driver.device.select_queue(0)
        for count, field in enumerate(fields, 1):
            for half, value in ((4, 0x1234 * count), (0, 0x5670000 * count), (4, 0x4321 * count)):
                other = common.read(field + 4 - half, 4)
                common.write(field + half, 4, value)
                back = common.read(field + half, 4), common.read(field + 4 - half, 4)
                expect(back == (value, other), f"{field.name}+{half} reads {back[0]:#x} of {value:#x}")
        driver.reset()
        halves = [device.read(BlkConfig.CAPACITY + at, 4) for at in (4, 0)]
        capacity = halves[0] << 32 | halves[1]
        expect(capacity == driver.capacity, f"the halves of the capacity make {capacity}, not {driver.capacity}")
