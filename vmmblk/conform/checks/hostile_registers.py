"""Drivers that use registers and configuration space as nobody should."""

from __future__ import annotations

import contextlib
import struct
from typing import TYPE_CHECKING, NamedTuple

from vmmblk.client.errors import RemoteError
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.wire import IrqIndex
from vmmblk.conform.check import NotOffered, check, expect
from vmmblk.conform.function import (
    BUS_MASTER,
    COMMAND,
    MEMORY_SPACE,
    Window,
    bars,
    capabilities,
    msix_ranges,
    only,
    require_intx,
    require_msix,
)
from vmmblk.conform.steps import Bait, Watch, fence, negotiate, served, small
from vmmblk.spec import BLK_CONFIG_SIZE, NO_VECTOR, BlkConfig, CommonCfg, DeviceStatus, Feature, IsrStatus, PciCapType

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.pci import PciDevice
    from vmmblk.conform.target import Target

_BAR0 = 0x10
_STRUCTURES = (PciCapType.COMMON_CFG, PciCapType.NOTIFY_CFG, PciCapType.ISR_CFG, PciCapType.DEVICE_CFG)
_READ_ONLY = (
    (CommonCfg.DEVICE_FEATURE, 4),
    (CommonCfg.NUM_QUEUES, 2),
    (CommonCfg.CONFIG_GENERATION, 1),
    (CommonCfg.QUEUE_NOTIFY_OFF, 2),
    (CommonCfg.QUEUE_NOTIF_CONFIG_DATA, 2),
    (CommonCfg.ADMIN_QUEUE_INDEX, 2),
    (CommonCfg.ADMIN_QUEUE_NUM, 2),
)
_PLACE = 0x1234_5678_9ABC_D000
_MARK = 0x5A
_ALL_ONES = 0xFFFFFFFF


# Common configuration.


@check()
def read_only_registers(target: Target) -> None:
    """Registers that are the device's to write ignore writes (HOSTILE-111)."""
    with small(target) as driver:
        common = driver.pci.common
        driver.device.set(CommonCfg.QUEUE_SELECT, 0)
        for register, width in _READ_ONLY:
            if register + width > common.length:
                continue
            before = common.read(register, width)
            common.write(register, width, ~before & (1 << 8 * width) - 1)
            now = common.read(register, width)
            expect(now == before, f"{register.name} reads {now:#x}, not {before:#x}, after it was written")
        served(target, driver)


@check()
def odd_accesses(target: Target) -> None:
    """Common configuration answers accesses of any width and alignment; writes act bytewise or not (HOSTILE-112)."""
    with small(target) as driver:
        common, length = driver.pci.common, min(driver.pci.common.length, 64)
        for width in (1, 2, 4, 8):
            for offset in range(length - width + 1):
                common.read(offset, width)
        driver.device.reset()
        for offset, data in (
            (0, b"\1"),
            (1, b"\1"),
            (3, b"\1"),
            (0, b"\1\0"),
            (1, b"\1\1"),
            (2, b"\1\0"),
            (3, b"\1\0"),
        ):
            driver.device.set(CommonCfg.DRIVER_FEATURE_SELECT, 0)
            common.write_bytes(CommonCfg.DRIVER_FEATURE_SELECT + offset, data)
            bytewise = (bytes(offset) + data).ljust(4, b"\0")[:4]
            found = driver.device.get(CommonCfg.DRIVER_FEATURE_SELECT)
            expect(
                found in (0, int.from_bytes(bytewise, "little")),
                f"driver_feature_select reads {found:#x} after {data.hex()} was written at its byte {offset}",
            )


@check()
def quadwords(target: Target) -> None:
    """An 8-byte access to a 64-bit register is two of 4 bytes, or ignored (HOSTILE-113)."""
    with small(target) as driver:
        negotiate(driver)
        common = driver.pci.common
        driver.device.set(CommonCfg.QUEUE_SELECT, 0)
        for register in (CommonCfg.QUEUE_DESC, CommonCfg.QUEUE_DRIVER, CommonCfg.QUEUE_DEVICE):
            before = _two_halves(driver, register)
            common.write(register, 8, _PLACE)
            after = _two_halves(driver, register)
            expect(
                after in (before, _PLACE),
                f"{register.name} reads {after:#x}, after {before:#x}, when {_PLACE:#x} was written in one access",
            )
            whole = common.read(register, 8)
            expect(whole in (after, 0), f"{register.name} reads {whole:#x} in one access, {after:#x} in two")


def _two_halves(driver: VirtioBlk, register: CommonCfg) -> int:
    return driver.pci.common.read(register, 4) | driver.pci.common.read(register + 4, 4) << 32


# BARs.


class _Place(NamedTuple):
    bar: int
    bytes: range
    name: str


@check()
def over_the_end(target: Target) -> None:
    """What an access takes in beyond the end of a structure reads 0 and ignores writes (HOSTILE-114)."""
    with small(target) as driver:
        sizes = {index: bar.size for index, bar in bars(driver.pci).items()}
        places = list(_owned(driver.pci))
        for place in places:
            end = place.bytes.stop
            for width in (2, 4, 8):
                for inside in {1, width // 2}:
                    start = end - inside
                    if start < place.bytes.start or start + width > sizes.get(place.bar, 0):
                        continue
                    data = driver.pci.access.read(place.bar, start, width)
                    spare = [at for at in range(end, start + width) if not _holder(places, place.bar, at)]
                    found = bytes(data[at - start] for at in spare)
                    expect(not any(found), f"{found.hex()} is read beyond the end of the {place.name}")
                    if place.name == PciCapType.DEVICE_CFG.name:
                        driver.pci.access.write(place.bar, start, b"\xff" * width)
        served(target, driver)


@check()
def between_structures(target: Target) -> None:
    """What is in a BAR and in no structure reads 0 and ignores writes (HOSTILE-115)."""
    with small(target) as driver:
        places = list(_owned(driver.pci))
        sizes = {index: bar.size for index, bar in bars(driver.pci).items()}
        for number in {place.bar for place in places if place.name != "MSI-X"}:
            for start, stop in _gaps(places, number, sizes[number]):
                for at in {start, (start + stop) // 8 * 4, stop - 4}:
                    for write in (False, True):
                        if write:
                            driver.pci.access.write(number, at, b"\xff" * 4)
                        data = driver.pci.access.read(number, at, 4)
                        when = " after a write" if write else ""
                        expect(not any(data), f"BAR {number} reads {data.hex()} at {at:#x}, in no structure{when}")
        served(target, driver)


def _owned(pci: PciDevice) -> Iterator[_Place]:
    """What holds which bytes of the BARs."""
    for each in capabilities(pci):
        if each.structured and each.bar <= 5:
            names = {kind.value: kind.name for kind in PciCapType}
            name = names.get(each.cfg_type, f"structure of type {each.cfg_type}")
            yield _Place(each.bar, range(each.offset, each.offset + each.length), name)
    for bar, where in msix_ranges(pci):
        yield _Place(bar, where, "MSI-X")


def _holder(places: list[_Place], bar: int, at: int) -> _Place | None:
    return next((place for place in places if place.bar == bar and at in place.bytes), None)


def _gaps(places: list[_Place], bar: int, size: int) -> Iterator[tuple[int, int]]:
    """What lies between, from a word boundary to one; at least a word."""
    position = 0
    for held in sorted((place.bytes for place in places if place.bar == bar), key=lambda each: each.start):
        yield from _words(position, held.start)
        position = max(position, held.stop)
    yield from _words(position, size)


def _words(start: int, stop: int) -> Iterator[tuple[int, int]]:
    start, stop = (start + 3) // 4 * 4, stop // 4 * 4
    if start < stop:
        yield start, stop


# ISR.


@check()
def isr_writes(target: Target) -> None:
    """A write to the ISR is ignored (HOSTILE-116)."""
    with _intx(target) as driver:
        _cause(target, driver)
        for value in (0xFF, 0):
            driver.pci.isr.write(0, 1, value)
        cause = driver.pci.isr.read(0, 1)
        expect(cause == IsrStatus.QUEUE, f"the ISR reads {cause:#x} after a used buffer and a write")


@check()
def wide_isr_reads(target: Target) -> None:
    """A wide read of the ISR gives and clears its byte, and 0 beside it (HOSTILE-117)."""
    with _intx(target) as driver:
        capability = only(driver.pci, PciCapType.ISR_CFG)[0]
        places = list(_owned(driver.pci))
        others = [place for place in places if place.name != PciCapType.ISR_CFG.name]
        for width in (2, 4):
            if capability.offset + width > bars(driver.pci)[capability.bar].size:
                continue
            _cause(target, driver)
            data = driver.pci.isr.read_bytes(0, width)
            expect(data[0] == IsrStatus.QUEUE, f"the ISR reads {data.hex()} after a used buffer")
            beside = [data[at] for at in range(1, width) if not _holder(others, capability.bar, capability.offset + at)]
            expect(not any(beside), f"the ISR reads {data.hex()} in an access of {width} bytes")
            left = driver.pci.isr.read(0, 1)
            expect(left == 0, f"the ISR still reads {left:#x} after it was read in an access of {width} bytes")


@contextlib.contextmanager
def _intx(target: Target) -> Iterator[VirtioBlk]:
    """A driver that is interrupted by INTx.  Raises NotOffered without it."""
    with target.driver(start=False, interrupts=Interrupts.POLL) as driver:
        require_intx(driver.pci)
    with small(target, interrupts=Interrupts.INTX) as driver:
        yield driver


def _cause(target: Target, driver: VirtioBlk) -> None:
    """Have the ISR tell of a used buffer; nothing has read it since."""
    driver.pci.isr.read(0, 1)
    driver.lines.take(driver.lines.queue_line(0))
    driver.connection.unmask_irqs(IrqIndex.INTX)
    bait = Bait(target, driver, ripe=True)
    driver.ring_doorbell()
    ready, _ = driver.lines.wait(driver.connection.fileno(), driver.timeout)
    expect(ready and bait.taken, "no INTx comes for a used buffer")


# Device configuration.


@check()
def read_only_configuration(target: Target) -> None:
    """Writes to capacity and the other fields that are the device's are ignored (HOSTILE-118)."""
    with small(target) as driver:
        before = _configuration(driver)
        config = driver.pci.device
        for width in (4, 8):
            for offset in range(0, len(before) - width + 1, width):
                if not offset <= BlkConfig.WRITEBACK < offset + width:
                    config.write_bytes(offset, bytes(byte ^ 0xFF for byte in before[offset : offset + width]))
        _unchanged(driver, before, "though every read-only field of the configuration was written")
        served(target, driver)


@check()
def writeback_without_the_feature(target: Target) -> None:
    """Without CONFIG_WCE negotiated a write to writeback is ignored (HOSTILE-119)."""
    with small(target, features=target.mask(without=(Feature.BLK_CONFIG_WCE,))) as driver:
        _has_writeback(driver)
        before = _configuration(driver)
        for value in (before[BlkConfig.WRITEBACK] ^ 1, 0, 1):
            driver.device.set_config(BlkConfig.WRITEBACK, value)
            _unchanged(driver, before, f"though {value} was written to writeback without CONFIG_WCE")


@check()
def writeback_before_negotiation(target: Target) -> None:
    """A read of writeback before FEATURES_OK gives some value and has no effect (HOSTILE-120)."""
    with small(target) as driver:
        _has_writeback(driver)
        live = driver.config(BlkConfig.WRITEBACK)
        driver.device.reset()
        seen = {driver.config(BlkConfig.WRITEBACK) for _ in range(3)}
        expect(len(seen) == 1, f"writeback reads {sorted(seen)} before FEATURES_OK")
        driver.init()
        now = driver.config(BlkConfig.WRITEBACK)
        expect(now == live, f"writeback reads {now} after it was read before FEATURES_OK, and {live} otherwise")


@check(Feature.BLK_CONFIG_WCE)
def odd_writeback(target: Target) -> None:
    """Values other than 0 and 1 for writeback are ignored, or made 0 or 1 (HOSTILE-121)."""
    with small(target) as driver:
        for value in (2, 0x80, 0xFF):
            driver.device.set_config(BlkConfig.WRITEBACK, value)
            found = driver.config(BlkConfig.WRITEBACK)
            expect(found in (0, 1), f"writeback reads {found:#x} after {value:#x} was written")
        served(target, driver)


@check()
def configuration_before_negotiation(target: Target) -> None:
    """Writes to the configuration before FEATURES_OK are ignored (HOSTILE-122)."""
    with small(target) as driver:
        driver.device.reset()
        for status in (0, 1, 3):
            if status:
                driver.device.status = DeviceStatus(status)
            before = _configuration(driver)
            for offset in range(0, len(before) - 3, 4):
                driver.pci.device.write_bytes(offset, bytes(byte ^ 1 for byte in before[offset : offset + 4]))
            if len(before) > BlkConfig.WRITEBACK:
                driver.device.set_config(BlkConfig.WRITEBACK, before[BlkConfig.WRITEBACK] ^ 1)
            _unchanged(driver, before, f"though it was written at status {status}")


@check(Feature.BLK_CONFIG_WCE)
def writeback_and_its_neighbours(target: Target) -> None:
    """A write that covers writeback and its neighbours leaves the neighbours alone (HOSTILE-123)."""
    with small(target) as driver:
        before = _configuration(driver)
        for offset, width in ((32, 2), (32, 4), (28, 8), (31, 2), (32, 8)):
            if offset + width > len(before):
                continue
            driver.pci.device.write_bytes(offset, b"\xff" * width)
            now = _configuration(driver)
            wrong = [at for at in range(len(before)) if at != BlkConfig.WRITEBACK and now[at] != before[at]]
            expect(not wrong, f"bytes {wrong} of the configuration changed in a write of {width} bytes at {offset}")
        served(target, driver)


@check()
def beyond_the_configuration(target: Target) -> None:
    """What lies at or beyond the end of the configuration reads 0 and ignores writes (HOSTILE-124)."""
    with small(target) as driver:
        before = _configuration(driver)
        capability = only(driver.pci, PciCapType.DEVICE_CFG)[0]
        places, size = list(_owned(driver.pci)), bars(driver.pci)[capability.bar].size
        end = capability.offset + capability.length
        for at in (end, end + 1, end + 4, end + 64):
            if at >= size or _holder(places, capability.bar, at):
                continue
            for write in (False, True):
                if write:
                    driver.pci.access.write(capability.bar, at, b"\xff")
                data = driver.pci.access.read(capability.bar, at, 1)
                expect(data == b"\0", f"{data.hex()} is read {at - end} bytes beyond the configuration")
        _unchanged(driver, before, "though only what lies beyond it was written")


def _has_writeback(driver: VirtioBlk) -> None:
    if driver.pci.device.length <= BlkConfig.WRITEBACK:
        raise NotOffered(f"the configuration has {driver.pci.device.length} bytes, and no writeback")


def _configuration(driver: VirtioBlk) -> bytes:
    """Every whole word of the configuration."""
    words = range(0, min(driver.pci.device.length, BLK_CONFIG_SIZE) - 3, 4)
    return b"".join(driver.pci.device.read_bytes(at, 4) for at in words)


def _unchanged(driver: VirtioBlk, before: bytes, though: str) -> None:
    now = _configuration(driver)
    wrong = [at for at in range(len(before)) if now[at] != before[at]]
    expect(not wrong, f"bytes {wrong} of the configuration changed {though}")


# PCI configuration space.


@check()
def capabilities_are_read_only(target: Target) -> None:
    """Writes to virtio capabilities but PCI_CFG are ignored (HOSTILE-125)."""
    with small(target) as driver:
        for each in capabilities(driver.pci):
            if each.cfg_type not in _STRUCTURES:
                continue
            before = driver.pci.config_read(each.position, each.cap_len)
            for value in (b"\xff" * 4, bytes(4)):
                for at in range(0, each.cap_len - 3, 4):
                    with contextlib.suppress(RemoteError):  # refused is ignored
                        driver.pci.config_write(each.position + at, value)
            now = driver.pci.config_read(each.position, each.cap_len)
            expect(now == before, f"the {each.name} reads {now.hex()} after it was written, {before.hex()} before")
        served(target, driver)


@check()
def window_to_no_bar(target: Target) -> None:
    """The PCI_CFG window at a BAR that there is not reads 0 and ignores writes (HOSTILE-126)."""
    with small(target) as driver:
        window, select = _window(driver), _select(driver)
        wide = {index + 1 for index, bar in bars(driver.pci).items() if bar.wide}
        missing = set(range(6)) - set(bars(driver.pci)) - wide
        for bar in (*sorted(missing), 6, 7, 0x80, 0xFF):
            _aimed_at_nothing(driver, window, bar, select)


@check()
def window_of_odd_length(target: Target) -> None:
    """The PCI_CFG window with a length other than 1, 2 and 4 performs no access (HOSTILE-127)."""
    with small(target) as driver:
        window, select = _window(driver), _select(driver)
        bar = only(driver.pci, PciCapType.COMMON_CFG)[0].bar
        for length in (0, 3, 5, 8, _ALL_ONES):
            driver.device.set(CommonCfg.DRIVER_FEATURE_SELECT, _MARK)
            window.aim(bar, select, length)
            with contextlib.suppress(RemoteError):
                window.read()
                window.write(1)
            found = driver.device.get(CommonCfg.DRIVER_FEATURE_SELECT)
            expect(found == _MARK, f"a window of length {length:#x} wrote driver_feature_select: {found:#x}")


@check()
def misaligned_window(target: Target) -> None:
    """The PCI_CFG window at an offset that is no multiple of its length is aligned down or ignored (HOSTILE-128)."""
    with small(target) as driver:
        window, select = _window(driver), _select(driver)
        bar = only(driver.pci, PciCapType.COMMON_CFG)[0].bar
        driver.device.reset()
        for by, length in ((1, 4), (2, 4), (3, 4), (1, 2), (3, 2)):
            driver.device.set(CommonCfg.DRIVER_FEATURE_SELECT, 0)
            beside = driver.device.get(CommonCfg.DRIVER_FEATURE)
            window.aim(bar, select + by, length)
            with contextlib.suppress(RemoteError):
                window.read(length)
                window.write(1, length)
            found = driver.device.get(CommonCfg.DRIVER_FEATURE_SELECT)
            down = 1 << 8 * (by // length * length)
            expect(
                found in (0, down),
                f"a window of {length} bytes at byte {by} of driver_feature_select made it {found:#x}",
            )
            driver.device.set(CommonCfg.DRIVER_FEATURE_SELECT, 0)
            now = driver.device.get(CommonCfg.DRIVER_FEATURE)
            expect(now == beside, f"a window of {length} bytes at byte {by} of driver_feature_select wrote beside it")


@check()
def window_beyond_everything(target: Target) -> None:
    """The PCI_CFG window beyond every structure, or the BAR, reads 0 and ignores writes (HOSTILE-129)."""
    with small(target) as driver:
        window = _window(driver)
        bar = only(driver.pci, PciCapType.COMMON_CFG)[0].bar
        size = bars(driver.pci)[bar].size
        gaps = [start for start, _ in _gaps(list(_owned(driver.pci)), bar, size)]
        for offset in (*gaps, size, size + 4096, 0x7FFF_FFFC, 0xFFFF_FFFC):
            if offset <= _ALL_ONES - 3:
                _aimed_at_nothing(driver, window, bar, offset)


@check()
def window_to_the_msix_table(target: Target) -> None:
    """The PCI_CFG window at the MSI-X table or the pending bits does as a direct access, or nothing (HOSTILE-130)."""
    with small(target) as driver:
        require_msix(driver.pci)
        window = _window(driver)
        for bar, where in msix_ranges(driver.pci):
            for offset in (where.start, where.start + 4):
                direct = int.from_bytes(driver.pci.access.read(bar, offset, 4), "little")
                window.aim(bar, offset, 4)
                found = 0
                with contextlib.suppress(RemoteError):
                    found = window.read()
                expect(
                    found in (0, direct),
                    f"through the window BAR {bar} reads {found:#x} at {offset:#x}, directly {direct:#x}",
                )
        served(target, driver)


def _window(driver: VirtioBlk) -> Window:
    if not only(driver.pci, PciCapType.PCI_CFG):
        raise NotOffered("the device has no PCI_CFG capability")
    return Window(driver.pci)


def _select(driver: VirtioBlk) -> int:
    """Where driver_feature_select lies in its BAR: a register that can be written without further effect."""
    return only(driver.pci, PciCapType.COMMON_CFG)[0].offset + CommonCfg.DRIVER_FEATURE_SELECT


def _aimed_at_nothing(driver: VirtioBlk, window: Window, bar: int, offset: int) -> None:
    """A window at nothing reads 0, and what is written there comes nowhere."""
    driver.device.set(CommonCfg.DRIVER_FEATURE_SELECT, _MARK)
    status = driver.status
    window.aim(bar, offset, 4)
    found = window.read()
    expect(found == 0, f"a window at BAR {bar}, offset {offset:#x} reads {found:#x}")
    window.write(1)
    now = driver.device.get(CommonCfg.DRIVER_FEATURE_SELECT)
    expect(
        (now, driver.status) == (_MARK, status),
        f"after a write to a window at BAR {bar}, offset {offset:#x} driver_feature_select reads {now:#x}",
    )


# MSI-X.


@check()
def vectors_beyond_the_table(target: Target) -> None:
    """A vector that the table does not have reads back as no vector (HOSTILE-131)."""
    with small(target) as driver:
        count = require_msix(driver.pci).table_size
        driver.device.set(CommonCfg.QUEUE_SELECT, 0)
        for register in (CommonCfg.CONFIG_MSIX_VECTOR, CommonCfg.QUEUE_MSIX_VECTOR):
            for vector in (count, 0x7FFF, 0xFFFE):
                driver.device.set(register, vector)
                found = driver.device.get(register)
                expect(found == NO_VECTOR, f"{register.name} reads {found:#x} after {vector:#x}, of {count} vectors")


@check()
def pending_bits(target: Target) -> None:
    """Writes to the MSI-X pending bits are ignored (HOSTILE-133)."""
    with small(target) as driver:
        require_msix(driver.pci)
        _, (bar, where) = msix_ranges(driver.pci)
        for at in {where.start, where.stop - 8}:
            before = driver.pci.access.read(bar, at, 4)
            driver.pci.access.write(bar, at, bytes(byte ^ 0xFF for byte in before))
            now = driver.pci.access.read(bar, at, 4)
            expect(now == before, f"the pending bits read {now.hex()} after a write, {before.hex()} before")
        served(target, driver)


# The command register, and BARs.


@check(each_ring=True)
def no_bus_master(target: Target) -> None:
    """Without Bus Master Enable no memory is accessed and no MSI-X message sent, until it is set (HOSTILE-134)."""
    with small(target) as driver:
        command = driver.pci.config_field(COMMAND, 2)
        fence(driver)
        driver.pci.config_write(COMMAND, struct.pack("<H", command & ~BUS_MASTER))
        fence(driver)
        bait, watch = Bait(target, driver), Watch(driver)
        for _ in range(4):
            driver.ring_doorbell()
            fence(driver)
        watch.quiet("without Bus Master Enable")
        expect(not bait.taken, "a request was taken without Bus Master Enable")
        bait.ripen()
        driver.pci.config_write(COMMAND, struct.pack("<H", command))
        bait.eaten()


@check()
def no_memory_space(target: Target) -> None:
    """Memory Space Enable cleared, or a BAR moved, under a live device do no harm (HOSTILE-135)."""
    with small(target) as driver:
        command = driver.pci.config_field(COMMAND, 2)
        places = {index: bar.register for index, bar in bars(driver.pci).items()}
        for register in (None, *places):
            driver.pci.config_write(COMMAND, struct.pack("<H", command & ~MEMORY_SPACE))
            if register is not None:
                driver.pci.config_write(_BAR0 + 4 * register, struct.pack("<I", _ALL_ONES))
            with contextlib.suppress(RemoteError):  # nobody is there
                driver.device.get(CommonCfg.DEVICE_STATUS)
            if register is not None:
                driver.pci.config_write(_BAR0 + 4 * register, struct.pack("<I", places[register]))
            driver.pci.config_write(COMMAND, struct.pack("<H", command))
            served(target, driver)
