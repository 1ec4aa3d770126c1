"""The PCI function: identity, capabilities, BARs, the PCI_CFG window and interrupts' switches."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from registers import LIVE, Driver, a_config, started

from vmmblk.device import Notify, QueueVectorChanged, Reset, WriteCacheChanged
from vmmblk.pci import (
    COMMON_OFFSET,
    CONFIG_SPACE_SIZE,
    DEVICE_OFFSET,
    ISR_OFFSET,
    MSIX_PBA_BAR,
    MSIX_TABLE_BAR,
    NOTIFY_OFFSET,
    VIRTIO_BAR,
    BusMaster,
    Effect,
    IntxDisabled,
    MsixEnabled,
    PciFunction,
    PlainIsr,
)
from vmmblk.spec import BLK_CONFIG_SIZE, NO_VECTOR, BlkConfig, CommonCfg, PciCapType

COMMAND, STATUS, INTERRUPT_LINE = 0x04, 0x06, 0x3C
VENDOR, MSIX = 0x09, 0x11


class Function:
    """A PCI function, its ISR, and the driver of the device in it."""

    def __init__(self, **changes: Any) -> None:
        self.driver = Driver(a_config(**changes))
        self.isr = PlainIsr()
        self.pci = PciFunction(self.driver.device, self.isr)

    def config(self, offset: int, width: int) -> int:
        """Read a field of configuration space."""
        return int.from_bytes(self.pci.config_read(offset, width), "little")

    def set_config(self, offset: int, width: int, value: int) -> list[Effect]:
        """Write a field of configuration space."""
        return self.pci.config_write(offset, value.to_bytes(width, "little"))

    def capabilities(self) -> list[tuple[int, bytes]]:
        """Offset and bytes of each capability (to the end of the space), in the order of the list."""
        found, offset = [], self.config(0x34, 1)
        while offset:
            found.append((offset, self.pci.config_read(offset, CONFIG_SPACE_SIZE - offset)))
            offset = self.config(offset + 1, 1)
        return found

    def virtio(self, cfg_type: PciCapType) -> tuple[int, bytes]:
        """The virtio capability of a type."""
        ((offset, body),) = [each for each in self.capabilities() if each[1][0] == VENDOR and each[1][3] == cfg_type]
        return offset, body[: body[2]]

    @property
    def msix(self) -> int:
        """The offset of the MSI-X capability."""
        ((offset, _),) = [each for each in self.capabilities() if each[1][0] == MSIX]
        return offset

    @property
    def window(self) -> int:
        """The offset of the PCI_CFG capability."""
        return self.virtio(PciCapType.PCI_CFG)[0]

    def aim(self, bar: int, offset: int, length: int) -> None:
        """Point the PCI_CFG window somewhere."""
        self.set_config(self.window + 4, 1, bar)
        self.set_config(self.window + 8, 4, offset)
        self.set_config(self.window + 12, 4, length)

    def window_read(self, offset: int, length: int, bar: int = VIRTIO_BAR) -> int:
        """Read a BAR through the window."""
        self.aim(bar, offset, length)
        return self.config(self.window + 16, length)

    def window_write(self, offset: int, length: int, value: int, bar: int = VIRTIO_BAR) -> list[Effect]:
        """Write a BAR through the window."""
        self.aim(bar, offset, length)
        return self.set_config(self.window + 16, length, value)


# --- identity and header --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("offset", "width", "value"),
    [
        (0x00, 2, 0x1AF4),
        (0x02, 2, 0x1042),
        (0x04, 2, 0),
        (0x06, 2, 0x0010),  # capability list
        (0x08, 1, 1),
        (0x09, 3, 0x018000),  # mass storage, other
        (0x0E, 1, 0),  # type 0, one function
        (0x2C, 2, 0x1AF4),
        (0x30, 4, 0),  # no expansion ROM
        (0x3D, 1, 1),  # INTA
    ],
)
def test_identity(offset: int, width: int, value: int) -> None:
    """BLK-001, PCI-001..005: a modern virtio block device, and nothing transitional."""
    function = Function()
    assert function.config(offset, width) == value
    function.set_config(offset, width, (1 << 8 * width) - 1)
    assert function.config(offset, width) == (value if offset != COMMAND else 0x0546)


def test_subsystem_id_is_one_that_drivers_accept() -> None:
    """PCI-006: 0x40 or higher."""
    assert Function().config(0x2E, 2) >= 0x40


def test_command_register_takes_only_what_exists() -> None:
    """PCI-001: memory space, bus master, parity, SERR# and INTx disable; the status bits above clear nothing."""
    function = Function()
    function.set_config(COMMAND, 4, 0xFFFFFFFF)
    assert function.config(COMMAND, 4) == 0x0010_0546
    function.set_config(COMMAND, 2, 0)
    assert function.config(COMMAND, 2) == 0


@pytest.mark.parametrize("offset", [0x0C, 0x0D, INTERRUPT_LINE])
def test_registers_for_the_system_keep_what_it_writes(offset: int) -> None:
    """PCI-001: cache line size, latency timer and interrupt line."""
    function = Function()
    function.set_config(offset, 1, 0xA5)
    assert function.config(offset, 1) == 0xA5


@pytest.mark.parametrize(
    ("bar", "kind", "mask"),
    [(0, 0, 0), (1, 0, 0xFFFFF000), (2, 0, 0xFFFFF000), (3, 0, 0), (4, 0xC, 0xFFFFC000), (5, 0, 0xFFFFFFFF)],
)
def test_bars_tell_their_size_and_keep_their_address(bar: int, kind: int, mask: int) -> None:
    """PCI-001: ones written to a BAR read back as size and type; BAR 4 is 64-bit and prefetchable."""
    function = Function()
    register = 0x10 + 4 * bar
    assert function.config(register, 4) == kind
    function.set_config(register, 4, 0xFFFFFFFF)
    assert function.config(register, 4) == mask | kind
    function.set_config(register, 4, 0xC0104000)
    assert function.config(register, 4) == 0xC0104000 & mask | kind


def test_bar_sizes() -> None:
    """What is sized through configuration space is what bar_size tells."""
    pci = Function().pci
    assert [pci.bar_size(bar) for bar in range(7)] == [0, 0x1000, 0x1000, 0, 0x4000, 0, 0]


def test_configuration_space_ends() -> None:
    """HOSTILE-114: reads past the end give zeroes, writes there do nothing."""
    function = Function()
    assert function.pci.config_read(0, 4096) == function.pci.config_read(0, 256) + bytes(4096 - 256)
    assert function.pci.config_read(254, 8)[2:] == bytes(6)
    assert function.pci.config_write(254, b"\xff" * 8) == []
    assert function.pci.config_write(5000, b"\xff") == []


# --- capabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("queues", [1, 3, 64])
def test_every_structure_has_its_capability(queues: int) -> None:
    """PCI-013..018, 026, 027, 058, 073, 074, 082, 083, 092: one of each, with the structure inside its BAR."""
    function = Function(queues=queues)
    expected = {
        PciCapType.COMMON_CFG: (COMMON_OFFSET, 64),
        PciCapType.NOTIFY_CFG: (NOTIFY_OFFSET, 4 * queues),
        PciCapType.ISR_CFG: (ISR_OFFSET, 1),
        PciCapType.DEVICE_CFG: (DEVICE_OFFSET, BLK_CONFIG_SIZE),
    }
    for cfg_type, (offset, length) in expected.items():
        _, body = function.virtio(cfg_type)
        assert struct.unpack_from("<II", body, 8) == (offset, length)
        assert body[2] == len(body) == (20 if cfg_type is PciCapType.NOTIFY_CFG else 16)
        assert body[4] == VIRTIO_BAR
        assert offset + length <= function.pci.bar_size(VIRTIO_BAR)
    assert function.virtio(PciCapType.PCI_CFG)[1][2] == 20


def test_capability_list_is_well_formed() -> None:
    """PCI-001, PCI-014: aligned, behind the header, not overlapping, ending."""
    capabilities = Function().capabilities()
    assert len(capabilities) == 6
    sizes = [body[2] if body[0] == VENDOR else 12 for _, body in capabilities]
    for (offset, _), size, following in zip(capabilities, sizes, [*(o for o, _ in capabilities[1:]), 256], strict=True):
        assert offset >= 0x40
        assert offset % 4 == 0
        assert offset + size <= following


@pytest.mark.parametrize("queues", [1, 64])
def test_doorbells_lie_inside_the_notify_structure(queues: int) -> None:
    """PCI-059, 060, 062..069: multiplier 4, each queue's doorbell within the length of the capability."""
    function = Function(queues=queues)
    _, body = function.virtio(PciCapType.NOTIFY_CFG)
    length, multiplier = struct.unpack_from("<II", body, 12)
    assert multiplier == 4
    for index in range(queues):
        function.driver.write(CommonCfg.QUEUE_SELECT, index)
        assert function.driver.read(CommonCfg.QUEUE_NOTIFY_OFF) * multiplier + 4 <= length


def test_capabilities_are_read_only_but_for_the_window() -> None:
    """PCI-021, PCI-093, HOSTILE-125: ones written over all of them change PCI_CFG fields and MSI-X control only."""
    function = Function()
    before = function.pci.config_read(0x40, 192)
    function.pci.config_write(0x40, b"\xff" * 192)
    after = function.pci.config_read(0x40, 192)
    changed = {0x40 + at for at in range(192) if before[at] != after[at]}
    fields = (function.window + at for at in (4, *range(8, 20)))
    assert changed == {*fields, function.msix + 3}


@pytest.mark.parametrize(("queues", "table_bar_size"), [(1, 0x1000), (3, 0x1000), (64, 0x1000)])
def test_msix_has_a_vector_per_queue_and_one_more(queues: int, table_bar_size: int) -> None:
    """PCI-098..100: table size is encoded as N - 1; table and pending bits are in BARs of their own."""
    function = Function(queues=queues)
    assert function.config(function.msix + 2, 2) == queues
    assert function.config(function.msix + 4, 4) == MSIX_TABLE_BAR
    assert function.config(function.msix + 8, 4) == MSIX_PBA_BAR
    assert function.pci.bar_size(MSIX_TABLE_BAR) == table_bar_size


# --- switches -------------------------------------------------------------------------------------------------------


def test_bus_master_and_intx_disable_are_reported_when_they_change() -> None:
    """HOSTILE-134: each change is one effect, a rewrite of the same is none."""
    function = Function()
    assert function.set_config(COMMAND, 2, 0x0406) == [IntxDisabled(on=True), BusMaster(on=True)]
    assert (function.pci.intx_disabled, function.pci.bus_master) == (True, True)
    assert function.set_config(COMMAND, 2, 0x0406) == []
    assert function.set_config(COMMAND, 1, 0x02) == [BusMaster(on=False)]
    assert function.set_config(COMMAND + 1, 1, 0) == [IntxDisabled(on=False)]


@pytest.mark.parametrize("value", [0x8000, 0xC000, 0xFFFF])
def test_msix_enable_chooses_the_kind_of_interrupt(value: int) -> None:
    """PCI-099: enable and function mask can be written, the size cannot."""
    function = Function()
    assert function.set_config(function.msix + 2, 2, value) == [MsixEnabled(on=True)]
    assert function.config(function.msix + 2, 2) == value & 0xC000 | 3
    assert function.pci.msix_enabled
    assert function.set_config(function.msix + 2, 2, 0x4000) == [MsixEnabled(on=False)]
    assert not function.pci.msix_enabled


def test_msix_enable_in_a_wider_write() -> None:
    """PCI-001: the dword that begins with the capability's id works as well."""
    function = Function()
    assert function.set_config(function.msix, 4, 0x80000000) == [MsixEnabled(on=True)]


def test_msix_table_is_memory() -> None:
    """PCI-101: entries read back what is written and start masked; behind them there is nothing."""
    function = Function()
    assert function.pci.bar_read(MSIX_TABLE_BAR, 12, 4) == b"\1\0\0\0"
    function.pci.bar_write(MSIX_TABLE_BAR, 16, bytes(range(16)))
    assert function.pci.bar_read(MSIX_TABLE_BAR, 16, 16) == bytes(range(16))
    function.pci.bar_write(MSIX_TABLE_BAR, 60, b"\xff" * 16)
    assert function.pci.bar_read(MSIX_TABLE_BAR, 60, 16) == b"\xff" * 4 + bytes(12)


def test_pending_bits_are_read_only() -> None:
    """HOSTILE-133: writes to the PBA are ignored."""
    function = Function()
    assert function.pci.bar_write(MSIX_PBA_BAR, 0, b"\xff" * 8) == []
    assert function.pci.bar_read(MSIX_PBA_BAR, 0, 8) == bytes(8)


# --- ISR ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1, 2, 3])
@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_reading_isr_clears_it(value: int, width: int) -> None:
    """PCI-079, PCI-081, HOSTILE-117: the byte is returned once, wider reads are filled with zeroes."""
    function = Function()
    function.isr.value = value
    assert function.pci.bar_read(VIRTIO_BAR, ISR_OFFSET, width) == bytes([value]).ljust(width, b"\0")
    assert function.pci.bar_read(VIRTIO_BAR, ISR_OFFSET, 1) == b"\0"


@pytest.mark.parametrize(("offset", "length"), [(ISR_OFFSET + 1, 4), (ISR_OFFSET - 4, 4), (COMMON_OFFSET, 64)])
def test_reading_beside_isr_leaves_it(offset: int, length: int) -> None:
    """HOSTILE-114: only an access that includes the byte clears it."""
    function = Function()
    function.isr.value = 1
    function.pci.bar_read(VIRTIO_BAR, offset, length)
    assert function.isr.peek() == 1


def test_writing_isr_is_ignored() -> None:
    """HOSTILE-116: neither set nor cleared."""
    function = Function()
    function.isr.value = 2
    assert function.pci.bar_write(VIRTIO_BAR, ISR_OFFSET, b"\xff") == []
    assert function.isr.peek() == 2


@pytest.mark.parametrize(("isr", "msix", "shown"), [(0, 0, 0), (1, 0, 8), (2, 0, 8), (3, 0, 8), (3, 0x8000, 0)])
def test_interrupt_status_shows_isr(isr: int, msix: int, shown: int) -> None:
    """PCI-077: the bit in PCI status is the OR of the ISR bits while MSI-X is disabled; looking clears nothing."""
    function = Function()
    function.isr.value = isr
    function.set_config(function.msix + 2, 2, msix)
    assert function.config(STATUS, 2) & 8 == shown
    assert function.isr.peek() == isr


# --- structures in the BAR ------------------------------------------------------------------------------------------


def test_each_structure_answers_on_its_page() -> None:
    """PCI-097: common and device configuration are reached through the BAR, width by width."""
    function = Function()
    write = function.pci.bar_write
    assert write(VIRTIO_BAR, CommonCfg.QUEUE_MSIX_VECTOR, b"\2\0") == [QueueVectorChanged(0, 2)]
    assert function.driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == 2
    assert function.pci.bar_read(VIRTIO_BAR, 0, 64) == function.driver.device.common_read(0, 64)
    assert function.pci.bar_read(VIRTIO_BAR, DEVICE_OFFSET, 8) == struct.pack("<Q", 2048)
    function.driver.go_live()
    assert write(VIRTIO_BAR, DEVICE_OFFSET + BlkConfig.WRITEBACK, b"\0") == [WriteCacheChanged(on=False)]


@pytest.mark.parametrize("width", [1, 2, 4, 8])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_doorbell_of_any_width_notifies_the_addressed_queue(width: int, at: int) -> None:
    """HOSTILE-084..086, PCI-070: the address counts, whatever is written there."""
    function = Function()
    function.driver.go_live()
    function.driver.set_up_queue(1)
    function.driver.enable()
    assert function.pci.bar_write(VIRTIO_BAR, NOTIFY_OFFSET + 4 + at, b"\xee" * width) == [Notify(1)]


@pytest.mark.parametrize("offset", [4, 8, 12, 64, 0xFFC])
def test_a_doorbell_of_no_running_queue_is_ignored(offset: int) -> None:
    """HOSTILE-081, HOSTILE-082: not enabled, not there or beyond the last."""
    function = Function()
    function.driver.go_live()
    assert function.pci.bar_write(VIRTIO_BAR, NOTIFY_OFFSET + offset, b"\0\0") == []


def test_a_doorbell_before_driver_ok_or_after_a_failure_is_ignored() -> None:
    """HOSTILE-083, HOSTILE-092: there is nothing to serve."""
    function = Function()
    assert function.pci.bar_write(VIRTIO_BAR, NOTIFY_OFFSET, b"\0\0") == []
    function.driver.go_live()
    function.driver.device.needs_reset()
    assert function.pci.bar_write(VIRTIO_BAR, NOTIFY_OFFSET, b"\0\0") == []


def test_doorbells_read_as_zero() -> None:
    """HOSTILE-090: reading one has no effect."""
    assert Function().pci.bar_read(VIRTIO_BAR, NOTIFY_OFFSET, 4) == bytes(4)


@pytest.mark.parametrize(
    ("bar", "offset"), [(VIRTIO_BAR, 0x40), (VIRTIO_BAR, 0x0FFC), (VIRTIO_BAR, 0x2060), (VIRTIO_BAR, 1 << 40), (0, 0)]
)
def test_outside_every_structure_there_is_nothing(bar: int, offset: int) -> None:
    """HOSTILE-115: reads give 0, writes are ignored."""
    function = Function()
    assert function.pci.bar_write(bar, offset, b"\xff" * 4) == []
    assert function.pci.bar_read(bar, offset, 4) == bytes(4)


def test_an_access_that_spans_structures_reaches_each() -> None:
    """HOSTILE-114: every byte goes where it belongs."""
    function = Function()
    function.isr.value = 3
    whole = function.pci.bar_read(VIRTIO_BAR, 0, 0x3000)
    assert whole[:64] == function.driver.device.common_read(0, 64)
    assert whole[64:0x1000] == bytes(0x1000 - 64)
    assert whole[0x1000:0x1002] == b"\3\0"
    assert whole[0x2000:0x2060] == function.driver.device.config_read(0, 96)


# --- the PCI_CFG window ---------------------------------------------------------------------------------------------


def test_a_driver_can_live_on_the_window_alone() -> None:
    """PCI-094..097: initialisation, a doorbell and the ISR, as firmware does it for a BAR above 4 GiB."""
    function = Function()
    write, read = function.window_write, function.window_read
    assert write(CommonCfg.DEVICE_STATUS, 1, 0) == [Reset()]
    function.driver.device.reset_done()
    assert read(CommonCfg.DEVICE_STATUS, 1) == 0
    write(CommonCfg.DEVICE_STATUS, 1, 1)
    write(CommonCfg.DEVICE_STATUS, 1, 3)
    for select in range(2):
        write(CommonCfg.DEVICE_FEATURE_SELECT, 4, select)
        write(CommonCfg.DRIVER_FEATURE_SELECT, 4, select)
        write(CommonCfg.DRIVER_FEATURE, 4, read(CommonCfg.DEVICE_FEATURE, 4))
    write(CommonCfg.DEVICE_STATUS, 1, 11)
    write(CommonCfg.QUEUE_SELECT, 2, 0)
    write(CommonCfg.QUEUE_SIZE, 2, 64)
    write(CommonCfg.QUEUE_MSIX_VECTOR, 2, 0)
    addresses = {CommonCfg.QUEUE_DESC: 0x1_0000_1000, CommonCfg.QUEUE_DRIVER: 0x2004, CommonCfg.QUEUE_DEVICE: 0x3004}
    for register, address in addresses.items():
        write(register, 4, address & 0xFFFFFFFF)
        write(register + 4, 4, address >> 32)
    write(CommonCfg.QUEUE_ENABLE, 2, 1)
    assert write(CommonCfg.DEVICE_STATUS, 1, LIVE) == [started()]
    assert write(NOTIFY_OFFSET, 2, 0) == [Notify(0)]
    function.isr.value = 1
    assert read(ISR_OFFSET, 1) == 1
    assert read(ISR_OFFSET, 1) == 0
    assert read(DEVICE_OFFSET, 4) == 2048


def test_reading_configuration_space_in_bulk_does_not_use_the_window() -> None:
    """PCI-097: only 1, 2 or 4 bytes at exactly pci_cfg_data act; a VMM's copy of the space has no side effect."""
    function = Function()
    function.isr.value = 1
    function.aim(VIRTIO_BAR, ISR_OFFSET, 1)
    data = function.window + 16
    for offset, length in ((0, 256), (0, 4096), (function.window, 20), (data - 1, 2), (data + 1, 1), (data, 3)):
        function.pci.config_read(offset, length)
    assert function.isr.peek() == 1
    function.config(data, 1)
    assert function.isr.peek() == 0


@pytest.mark.parametrize("width", [3, 8])
def test_writing_the_window_in_bulk_does_not_act(width: int) -> None:
    """PCI-095: other widths only store."""
    function = Function()
    function.aim(VIRTIO_BAR, CommonCfg.DEVICE_STATUS, 1)
    assert function.set_config(function.window + 16, width, 1) == []
    assert function.driver.status == 0


def test_window_uses_the_length_of_the_capability() -> None:
    """PCI-095, PCI-096: of the data written the first cap.length bytes count, and of those read likewise."""
    function = Function()
    function.aim(VIRTIO_BAR, CommonCfg.QUEUE_SIZE, 2)
    function.set_config(function.window + 16, 4, 0x0001_0040)
    assert function.driver.read(CommonCfg.QUEUE_SIZE) == 64
    assert function.driver.read(CommonCfg.QUEUE_MSIX_VECTOR) == NO_VECTOR
    assert function.config(function.window + 16, 4) == 64


@pytest.mark.parametrize(
    ("bar", "offset", "length"),
    [
        *((bar, CommonCfg.DEVICE_STATUS, 1) for bar in (0, 3, 5, 6, 255)),  # HOSTILE-126
        *((VIRTIO_BAR, CommonCfg.QUEUE_DESC, length) for length in (0, 3, 5, 8, 0xFFFFFFFF)),  # HOSTILE-127
        (VIRTIO_BAR, CommonCfg.QUEUE_DESC + 1, 4),  # HOSTILE-128
        (VIRTIO_BAR, CommonCfg.QUEUE_DESC + 1, 2),
        (VIRTIO_BAR, 0x40, 4),  # HOSTILE-129
        (VIRTIO_BAR, 0x4000, 4),
        (VIRTIO_BAR, 0xFFFFFFFC, 4),
        (MSIX_PBA_BAR, 0, 4),  # HOSTILE-130
    ],
)
def test_a_window_aimed_at_nothing_reads_zero(bar: int, offset: int, length: int) -> None:
    """HOSTILE-126..130: no access is performed and nothing is raised."""
    function = Function()
    function.driver.write(CommonCfg.QUEUE_DESC, 2**64 - 1)
    before = function.driver.device.common_read(0, 64)
    function.aim(bar, offset, length)
    assert function.set_config(function.window + 16, 4, 0xFFFFFFFF) == []
    assert function.config(function.window + 16, 4) == 0
    assert function.driver.device.common_read(0, 64) == before


def test_window_reaches_the_msix_table() -> None:
    """HOSTILE-130: the same as a direct access."""
    function = Function()
    function.window_write(16, 4, 0x12345678, bar=MSIX_TABLE_BAR)
    assert function.window_read(16, 4, bar=MSIX_TABLE_BAR) == 0x12345678
    assert function.pci.bar_read(MSIX_TABLE_BAR, 16, 4) == b"\x78\x56\x34\x12"


# --- reset ----------------------------------------------------------------------------------------------------------


def test_function_reset_restores_everything() -> None:
    """HOSTILE-136: PCI registers, MSI-X table, ISR and the virtio device are as a new one's."""
    function = Function()
    function.driver.go_live()
    function.isr.value = 3
    function.pci.config_write(0, b"\xff" * 256)
    function.pci.bar_write(MSIX_TABLE_BAR, 0, b"\xff" * 64)
    assert function.pci.reset() == [MsixEnabled(on=False), IntxDisabled(on=False), BusMaster(on=False)]
    fresh = Function()
    for bar in (MSIX_TABLE_BAR, VIRTIO_BAR):
        size = fresh.pci.bar_size(bar)
        assert function.pci.bar_read(bar, 0, size) == fresh.pci.bar_read(bar, 0, size)
    assert function.pci.config_read(0, 256) == fresh.pci.config_read(0, 256)
    assert not function.driver.device.live


def test_a_second_reset_changes_nothing() -> None:
    """Two resets in a row, as a VMM does at start, are one."""
    function = Function()
    function.set_config(COMMAND, 2, 6)
    assert function.pci.reset() == [BusMaster(on=False)]
    assert function.pci.reset() == []


# --- any access at all ----------------------------------------------------------------------------------------------

OFFSETS = st.one_of(
    st.integers(0, 300),
    st.sampled_from([COMMON_OFFSET, ISR_OFFSET, DEVICE_OFFSET, NOTIFY_OFFSET]).flatmap(
        lambda page: st.integers(max(0, page - 8), page + 100)
    ),
    st.integers(0, (1 << 64) - 1),
)
DATA = st.one_of(st.sampled_from([b"\0", b"\1", b"\3", b"\x0b", b"\x0f", b"\1\0"]), st.binary(max_size=300))
ACCESSES = st.one_of(
    st.tuples(st.just("config"), st.just(0), OFFSETS, DATA),
    st.tuples(st.just("bar"), st.integers(-1, 10), OFFSETS, DATA),
    st.tuples(st.just("window"), st.integers(0, 255) | st.just(VIRTIO_BAR), st.integers(0, (1 << 32) - 1), DATA),
)


@given(st.booleans(), st.lists(ACCESSES, max_size=20))
def test_no_access_raises_or_breaks_the_invariants(live: bool, accesses: list[tuple[str, int, int, bytes]]) -> None:
    """HOSTILE-112, 114, 115, 124..130: any access of any region answers with as many bytes as were asked for."""
    function = Function()
    if live:
        function.driver.go_live()
    identity = function.pci.config_read(0, 4)
    for region, bar, offset, data in accesses:
        if region == "config":
            function.pci.config_write(offset, data)
            assert len(function.pci.config_read(offset, len(data))) == len(data)
        elif region == "bar":
            function.pci.bar_write(bar, offset, data)
            assert len(function.pci.bar_read(bar, offset, len(data))) == len(data)
        else:
            function.aim(bar, offset, len(data))
            function.pci.config_write(function.window + 16, data)
            assert len(function.pci.config_read(function.window + 16, len(data))) == len(data)
        assert function.pci.config_read(0, 4) == identity
        assert len(function.capabilities()) == 6
        if function.driver.device.live:
            assert function.driver.status & LIVE == LIVE
    function.pci.reset()
    assert function.driver.go_live() == [started()]
