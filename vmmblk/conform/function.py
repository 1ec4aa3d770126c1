"""For checks of the PCI function: its capabilities and BARs as they stand, and a driver brought up step by step."""

from __future__ import annotations

import contextlib
import os
import select
import struct
import time
from typing import TYPE_CHECKING, NamedTuple

from vmmblk.client.interrupts import Interrupts
from vmmblk.client.queue import SplitQueue, Virtqueue
from vmmblk.client.wire import IrqIndex, Region
from vmmblk.conform.check import NotOffered, NotTestable, expect
from vmmblk.spec import CommonCfg, DeviceStatus, Feature, PciCapType, RequestType

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vmmblk.client.connection import Connection
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.client.pci import MsixCapability, PciDevice
    from vmmblk.client.request import Pending
    from vmmblk.conform.target import Target

__all__ = [
    "BUS_MASTER",
    "COMMAND",
    "INTX_DISABLE",
    "MEMORY_SPACE",
    "SHARED_MEMORY_CFG",
    "STATUS",
    "STATUS_INTERRUPT",
    "VENDOR_CFG",
    "Bar",
    "VirtioCap",
    "Window",
    "any_interrupts",
    "bars",
    "bring_up",
    "capabilities",
    "change_config",
    "eventfds",
    "expect_signal",
    "fired",
    "msix_ranges",
    "negotiate",
    "new_queue",
    "only",
    "plain",
    "queue_count",
    "require_intx",
    "require_msix",
    "ring",
    "submit",
    "vector_fields",
]

COMMAND, STATUS = 0x04, 0x06
MEMORY_SPACE, BUS_MASTER, INTX_DISABLE = 1 << 1, 1 << 2, 1 << 10
STATUS_INTERRUPT = 1 << 3

SHARED_MEMORY_CFG, VENDOR_CFG = 8, 9
"""Values of cfg_type that a block device has no use for."""

_BAR0 = 0x10
_CAP_ID_VENDOR = 0x09
_CAP_SIZE = 16
_EXTRA_SIZES = {PciCapType.NOTIFY_CFG: 4, PciCapType.PCI_CFG: 4, SHARED_MEMORY_CFG: 8}
_VECTORS_MAX = 16  # how many MSI-X vectors are listened to at once


# The function.


class VirtioCap(NamedTuple):
    """A vendor-specific capability: its place in configuration space, and its bytes up to its length.

    Those of a PCI_CFG capability end before pci_cfg_data, which acts when it is read.
    """

    position: int
    raw: bytes

    @property
    def cap_len(self) -> int:
        """How long it says it is, bytes."""
        return self.raw[2]

    @property
    def cfg_type(self) -> int:
        """What it is about."""
        return self.raw[3]

    @property
    def bar(self) -> int:
        """Its BAR; a number above 5 is reserved."""
        return self.raw[4]

    @property
    def id(self) -> int:
        """What tells several of one type apart."""
        return self.raw[5]

    @property
    def offset(self) -> int:
        """Where its structure begins in the BAR."""
        return self._field(8)

    @property
    def length(self) -> int:
        """How long its structure is."""
        return self._field(12)

    @property
    def multiplier(self) -> int:
        """notify_off_multiplier."""
        return int.from_bytes(self.raw[16:20], "little")

    @property
    def name(self) -> str:
        """Its type in words, and where it is."""
        known = {each.value: each.name for each in PciCapType}
        return f"{known.get(self.cfg_type, f'type {self.cfg_type}')} capability at {self.position:#x}"

    @property
    def least_len(self) -> int:
        """What a capability of its type has at least, bytes."""
        return _CAP_SIZE + _EXTRA_SIZES.get(self.cfg_type, 0) if self.cfg_type != VENDOR_CFG else 6

    @property
    def structured(self) -> bool:
        """Whether it tells where a structure is: PCI_CFG's fields are the driver's, vendor data is something else."""
        return self.cfg_type not in (PciCapType.PCI_CFG, VENDOR_CFG)

    def _field(self, at: int) -> int:
        low = int.from_bytes(self.raw[at : at + 4], "little")
        if self.cfg_type == SHARED_MEMORY_CFG:
            return low | int.from_bytes(self.raw[at + 8 : at + 12][:4], "little") << 32
        return low


class Bar(NamedTuple):
    """A BAR that exists: its number, its register as read, and its size in bytes as vfio-user tells."""

    number: int
    register: int
    size: int

    @property
    def io(self) -> bool:
        """Whether it is I/O space."""
        return bool(self.register & 1)

    @property
    def wide(self) -> bool:
        """Whether it is 64-bit memory, which takes the next register too."""
        return self.register & 7 == 4


def capabilities(pci: PciDevice) -> list[VirtioCap]:
    """Every vendor-specific capability, in the order of the list."""
    size = pci.connection.region_info(Region.CONFIG).size
    found = []
    for position in (each.position for each in pci.capabilities if each.cap_id == _CAP_ID_VENDOR):
        raw = pci.config_read(position, min(_CAP_SIZE, size - position))
        expect(len(raw) == _CAP_SIZE, f"the capability at {position:#x} does not fit into configuration space")
        end = min(position + raw[2], size)
        if end > position + _CAP_SIZE and raw[3] != PciCapType.PCI_CFG:
            raw += pci.config_read(position + _CAP_SIZE, end - position - _CAP_SIZE)
        found.append(VirtioCap(position, raw))
    return found


def only(pci: PciDevice, *kinds: int) -> list[VirtioCap]:
    """The capabilities of these types."""
    return [each for each in capabilities(pci) if each.cfg_type in kinds]


def bars(pci: PciDevice) -> dict[int, Bar]:
    """The BARs that exist, by index."""
    sizes = [pci.connection.region_info(index).size for index in range(6)]
    return {i: Bar(i, pci.config_field(_BAR0 + 4 * i, 4), size) for i, size in enumerate(sizes) if size}


def msix_ranges(pci: PciDevice) -> list[tuple[int, range]]:
    """Where the MSI-X table and the pending bits are: BAR and bytes of each; nothing without MSI-X."""
    if pci.msix is None:
        return []
    table, pending = struct.unpack("<II", pci.config_read(pci.msix.position + 4, 8))
    sizes = (16 * pci.msix.table_size, -(-pci.msix.table_size // 64) * 8)
    places = ((table & 7, table & ~7), (pending & 7, pending & ~7))
    return [(bar, range(start, start + size)) for (bar, start), size in zip(places, sizes, strict=True)]


class Window:
    """The PCI_CFG capability, to be used rightly or wrongly."""

    def __init__(self, pci: PciDevice) -> None:
        self._pci = pci
        self.position = next(each.position for each in capabilities(pci) if each.cfg_type == PciCapType.PCI_CFG)

    @property
    def target(self) -> tuple[int, int, int]:
        """BAR, offset and length as they read back."""
        bar = self._pci.config_field(self.position + 4, 1)
        return bar, self._pci.config_field(self.position + 8, 4), self._pci.config_field(self.position + 12, 4)

    def aim(self, bar: int, offset: int, length: int) -> None:
        """Write BAR, offset and length."""
        self._pci.config_write(self.position + 4, bytes([bar]))
        self._pci.config_write(self.position + 8, struct.pack("<I", offset))
        self._pci.config_write(self.position + 12, struct.pack("<I", length))

    def read(self, width: int = 4) -> int:
        """Read pci_cfg_data, ``width`` bytes of it."""
        return self._pci.config_field(self.position + 16, width)

    def write(self, value: int, width: int = 4) -> None:
        """Write pci_cfg_data, ``width`` bytes of it."""
        self._pci.config_write(self.position + 16, value.to_bytes(width, "little"))


# A driver, step by step.


def negotiate(driver: VirtioBlk, mask: int) -> None:
    """Bring the device from any state to FEATURES_OK with what it offers of ``mask``."""
    driver.reset()
    driver.pci.enable()
    driver.lines.install(driver.pci)
    driver.device.greet()
    driver.features = driver.device.features & mask
    expect(driver.device.accept(driver.features), f"the device refuses features {driver.features:#x} of its own offer")


def new_queue(driver: VirtioBlk, index: int, size: int | None = None) -> Virtqueue:
    """A ring for queue ``index``, of ``size`` or as long as the device has it; only the size is told to the device."""
    return driver.new_queue(index, driver.device.queue_size(index, size))


def queue_count(target: Target) -> int:
    """How many queues a driver can use."""
    return target.facts.queues if target.offers(Feature.BLK_MQ) else 1


def plain(target: Target) -> int:
    """The features that the driver usually takes, but for those that change what a doorbell carries."""
    return target.mask(without=(Feature.NOTIFICATION_DATA, Feature.NOTIF_CONFIG_DATA))


def bring_up(driver: VirtioBlk, mask: int, vectors: Sequence[int], config_vector: int) -> None:
    """Bring the device from any state to DRIVER_OK, with a queue for each of ``vectors``."""
    driver.forget()
    negotiate(driver, mask)
    driver.device.set_config_vector(config_vector)
    for index, vector in enumerate(vectors):
        driver.queues.append(new_queue(driver, index))
        driver.device.start_queue(driver.queues[-1], vector)
    driver.device.status |= DeviceStatus.DRIVER_OK


def ring(driver: VirtioBlk, queue: int = 0) -> None:
    """Write a queue's number to its doorbell; for features that leave doorbells ``plain``."""
    driver.pci.notify.write(driver.device.notify_offset(queue), 2, queue)


def submit(target: Target, driver: VirtioBlk, queue: int = 0) -> Pending:
    """Offer a read of the first block, without a doorbell.  Raises NotTestable on an empty disk."""
    if target.facts.capacity < target.block_sectors:
        raise NotTestable("the disk is empty")
    pending = driver.submit(RequestType.IN, 0, data_in=target.facts.block_size, queue=queue)
    driver.queues[queue].publish()
    return pending


# Interrupts.


def require_msix(pci: PciDevice) -> MsixCapability:
    """The MSI-X capability.  Raises NotOffered without one."""
    if pci.msix is None:
        raise NotOffered("the device has no MSI-X")
    return pci.msix


def require_intx(pci: PciDevice) -> None:
    """Raise NotOffered unless there is an INTx line."""
    if not pci.connection.irq_info(IrqIndex.INTX).vectors:
        raise NotOffered("the device has no INTx")


def any_interrupts(connection: Connection) -> Interrupts:
    """MSI-X, or INTx where there is none."""
    return Interrupts.MSIX if connection.irq_info(IrqIndex.MSIX).vectors else Interrupts.INTX


@contextlib.contextmanager
def eventfds(connection: Connection, index: IrqIndex = IrqIndex.MSIX) -> Iterator[list[int]]:
    """An eventfd for each interrupt of a kind (of many, for the first), known to the server."""
    count = min(connection.irq_info(index).vectors, _VECTORS_MAX)
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(count)]
    try:
        connection.set_irqs(index, 0, fds)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def fired(fd: int) -> int:
    """How often an eventfd was signalled since this was last asked."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


def expect_signal(fd: int | None, timeout: float, what: str) -> None:
    """Wait until the eventfd is signalled, and take the signal.  Raises Broken, which says ``what`` has not come."""
    ready = [] if fd is None else select.select([fd], [], [], timeout)[0]
    expect(ready and fired(ready[0]), f"{what} within {timeout:g} s")


def change_config(target: Target, driver: VirtioBlk) -> None:
    """Make the device tell of a change: a resize, or else a split ring so corrupt that it needs a reset.

    Comes back when the change shows in registers.  Raises NotTestable if the device does not react.
    """
    before = driver.capacity
    if target.options.resize_command:
        target.resize()
    else:
        queue = driver.queues[0]
        if not isinstance(queue, SplitQueue):
            raise NotTestable("takes --resize-command")
        queue.offer(queue.size)
        queue.publish()
        ring(driver)
    deadline = time.monotonic() + target.options.timeout
    while driver.capacity == before and DeviceStatus.NEEDS_RESET not in driver.status:
        if time.monotonic() > deadline:
            raise NotTestable("takes --resize-command: a corrupt ring does not make this device need a reset")


def vector_fields(driver: VirtioBlk) -> list[tuple[CommonCfg, int]]:
    """The registers that hold a vector, each with the queue that must be selected."""
    queues = driver.device.get(CommonCfg.NUM_QUEUES)
    fields = [(CommonCfg.CONFIG_MSIX_VECTOR, 0)]
    return fields + [(CommonCfg.QUEUE_MSIX_VECTOR, index) for index in range(queues)]
