"""The virtio block device as a state machine: register writes in, effects out.  Pure.

A :class:`Device` owns what a driver sees of "Basic Facilities of a Virtio Device": status, feature negotiation,
queue registers, configuration space.  It touches no ring and raises no interrupt.  It returns *effects*, and whoever
calls it carries them out, in order.

A device's life::

    status 0 --ACKNOWLEDGE, DRIVER, FEATURES_OK--> negotiated --DRIVER_OK--> live: StartQueue for each enabled queue
       ^                                                                      |
       +---- reset_done() ---- resetting: Reset() returned, reads non-zero <--+---- status 0 is written, at any time

Three things take time because requests must drain first; they are asked for and later reported as done: the device
reset (``Reset`` and :meth:`Device.reset_done`), the reset of one queue (``ResetQueue`` and
:meth:`Device.queue_reset_done`), and suspending (``Suspend`` and :meth:`Device.suspend_done`).  In between the
registers read as the specification wants, and those of what is being reset ignore writes.

Suspended, the device ignores every write but to device_status, and its configuration stands still ("Device Suspend").

Rules for a driver that keeps to none:

* A write acts on each register that it covers wholly, and on no other; a 64-bit register is two of 32 bits.  A read
  may have any offset and length.  What lies past the end reads 0.
* Status bits are only ever added, each only once its predecessors in the initialisation sequence are there. But
  ACKNOWLEDGE, which has no effect, is no condition: U-Boot before 2026.07 leaves it out after its reset.
* A queue whose ring addresses are missing (0) or misaligned is never started: the device needs a reset instead.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import ClassVar, Literal

from vmmblk.block import BlockInfo, Operation, Topology, ZoneModel, Zoning
from vmmblk.spec import (
    BLK_CONFIG_SIZE,
    NO_VECTOR,
    QUEUE_SIZE_MAX,
    SECTOR_SIZE,
    BlkConfig,
    CommonCfg,
    DeviceStatus,
    Feature,
)

__all__ = [
    "OFF_BY_DEFAULT",
    "QUEUES_MAX",
    "SWITCHES",
    "BlkConfigSpace",
    "ConfigInterrupt",
    "ConfigVectorChanged",
    "Device",
    "DeviceConfig",
    "Effect",
    "Notify",
    "QueueConfig",
    "QueueVectorChanged",
    "Reset",
    "ResetQueue",
    "Resume",
    "StartQueue",
    "StopQueues",
    "Suspend",
    "WriteCacheChanged",
    "configure",
]

QUEUES_MAX = 64
"""Request queues of a device at most."""

_SEG_MAX = 254
_NOTIFY_ID_BASE = 0x4000
_SIZE_MAX = 1 << 20

# How much one request may ask for.  Requests are drained, never cancelled, so these bound the wait: a discard is
# bookkeeping, but zeroing may really write.
_DISCARD_SECTORS_MAX = (1 << 30) // SECTOR_SIZE
_WRITE_ZEROES_SECTORS_MAX = (64 << 20) // SECTOR_SIZE
_SECURE_ERASE_SECTORS_MAX = (64 << 20) // SECTOR_SIZE
_RANGE_SEG_MAX = 16


# --- what the device is ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BlkConfigSpace:
    """The fields of struct virtio_blk_config, in its order and units ("Device configuration layout")."""

    capacity: int
    size_max: int = 0
    seg_max: int = 0
    cylinders: int = 0
    heads: int = 0
    sectors: int = 0
    blk_size: int = 0
    physical_block_exp: int = 0
    alignment_offset: int = 0
    min_io_size: int = 0
    opt_io_size: int = 0
    writeback: int = 0
    num_queues: int = 0
    max_discard_sectors: int = 0
    max_discard_seg: int = 0
    discard_sector_alignment: int = 0
    max_write_zeroes_sectors: int = 0
    max_write_zeroes_seg: int = 0
    write_zeroes_may_unmap: int = 0
    max_secure_erase_sectors: int = 0
    max_secure_erase_seg: int = 0
    secure_erase_sector_alignment: int = 0
    zone_sectors: int = 0
    max_open_zones: int = 0
    max_active_zones: int = 0
    max_append_sectors: int = 0
    write_granularity: int = 0
    zoned_model: int = 0

    def pack(self) -> bytes:
        """The 96 bytes that the driver reads."""
        return _BLK_CONFIG.pack(*astuple(self))


_BLK_CONFIG = struct.Struct("<QIIHBBIBBHIBxHIIIIIB3xIIIIIIIIB3x")


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """What a device offers, fixed for its life but for the capacity.

    ``features`` is the offered mask, ``queue_size`` the maximum and initial size of each of ``queues`` queues.
    Raises: ValueError for an offer that VIRTIO forbids.
    """

    features: int
    blk: BlkConfigSpace
    queues: int = 1
    queue_size: int = 256

    def __post_init__(self) -> None:
        if not 1 <= self.queues <= QUEUES_MAX:
            raise ValueError(f"a device has 1 to {QUEUES_MAX} queues, not {self.queues}")
        if not _is_queue_size(self.queue_size, QUEUE_SIZE_MAX):  # whatever ring the driver will choose
            raise ValueError(f"queue size {self.queue_size} is not a power of two up to {QUEUE_SIZE_MAX}")
        if not self.offers(Feature.VERSION_1):
            raise ValueError("VERSION_1 must be offered")
        if self.offers(Feature.BLK_CONFIG_WCE) and not self.offers(Feature.BLK_FLUSH):
            raise ValueError("config_wce=on needs flush=on: CONFIG_WCE is never offered without FLUSH (BLK-031)")
        if self.queues > 1 and not self.offers(Feature.BLK_MQ):
            raise ValueError(f"{self.queues} queues need mq=on: without MQ offered there is one queue (BLK-003)")
        known = sum(feature.mask for feature in Feature)
        if self.features & ~known:
            raise ValueError(f"features {self.features & ~known:#x} are offered but not defined")

    def offers(self, feature: Feature) -> bool:
        """Whether the device offers ``feature``."""
        return bool(self.features & feature.mask)

    @property
    def vectors(self) -> int:
        """MSI-X vectors: one for each queue and one for the configuration."""
        return self.queues + 1


SWITCHES: Mapping[str, Feature] = MappingProxyType(
    {
        "mq": Feature.BLK_MQ,
        "packed": Feature.RING_PACKED,
        "indirect": Feature.INDIRECT_DESC,
        "event_idx": Feature.EVENT_IDX,
        "in_order": Feature.IN_ORDER,
        "ring_reset": Feature.RING_RESET,
        "notification_data": Feature.NOTIFICATION_DATA,
        "notif_config_data": Feature.NOTIF_CONFIG_DATA,
        "access_platform": Feature.ACCESS_PLATFORM,
        "order_platform": Feature.ORDER_PLATFORM,
        "suspend": Feature.SUSPEND,
        "flush": Feature.BLK_FLUSH,
        "config_wce": Feature.BLK_CONFIG_WCE,
        "topology": Feature.BLK_TOPOLOGY,
        "discard": Feature.BLK_DISCARD,
        "write_zeroes": Feature.BLK_WRITE_ZEROES,
        "secure_erase": Feature.BLK_SECURE_ERASE,
        "lifetime": Feature.BLK_LIFETIME,
    }
)
"""The features that the user can switch, by the names that the user gives them."""

OFF_BY_DEFAULT = frozenset(
    {
        # each costs something, or makes drivers do other than they usually do
        Feature.IN_ORDER,
        Feature.NOTIFICATION_DATA,
        Feature.NOTIF_CONFIG_DATA,
        Feature.ACCESS_PLATFORM,
        Feature.ORDER_PLATFORM,
        Feature.SUSPEND,
    }
)
"""The features that a device which has them offers only when asked to."""


def configure(
    info: BlockInfo,
    ops: Operation,
    topology: Topology,
    *,
    queues: int = 1,
    queue_size: int = 256,
    cache: Literal["writeback", "writethrough"] = "writeback",
    zoning: Zoning | None = None,
    switches: Mapping[str, bool] = MappingProxyType({}),
) -> DeviceConfig:
    """The device for a block: what the block can do becomes features and configuration, and nothing else does.

    ``cache`` is the mode in which a guest that can choose starts; a block without a cache is always written through.
    ``zoning`` is that of a block with zones.  ``switches`` are names of SWITCHES that are not to be at their defaults.
    Raises: ValueError for what no device can be, naming the rule: a row of the conformance checklist.
    """
    # On a host-managed disk both would go round the write pointers (HOSTILE-198).
    in_any_order = info.read_write and not (zoning and zoning.model is ZoneModel.HOST_MANAGED)
    able = {
        Feature.VERSION_1: True,
        Feature.RING_PACKED: True,
        Feature.INDIRECT_DESC: True,
        Feature.EVENT_IDX: True,
        Feature.IN_ORDER: True,
        Feature.RING_RESET: True,
        Feature.NOTIFICATION_DATA: True,
        Feature.NOTIF_CONFIG_DATA: True,
        Feature.ACCESS_PLATFORM: True,
        Feature.ORDER_PLATFORM: True,
        Feature.SUSPEND: True,
        Feature.BLK_SIZE_MAX: True,
        Feature.BLK_SEG_MAX: True,
        Feature.BLK_BLK_SIZE: True,
        Feature.BLK_TOPOLOGY: True,
        Feature.BLK_MQ: queues > 1 or "mq" in switches,
        # in any case: a guest without it must be asked to persist each write (BLK-065)
        Feature.BLK_FLUSH: True,
        Feature.BLK_RO: not info.read_write,
        Feature.BLK_CONFIG_WCE: Operation.FLUSH in ops and info.read_write,
        Feature.BLK_DISCARD: Operation.DISCARD in ops and in_any_order,
        Feature.BLK_WRITE_ZEROES: Operation.WRITE_ZEROES in ops and in_any_order,
        Feature.BLK_LIFETIME: Operation.LIFETIME in ops,
        Feature.BLK_SECURE_ERASE: Operation.SECURE_ERASE in ops and info.read_write,
        Feature.BLK_ZONED: zoning is not None,
    }
    features = _offer(able, switches)
    blk = _describe(info, ops, topology, features, queue_size=queue_size, queues=queues, cache=cache)
    if zoning is not None:
        blk = _divide(blk, zoning, info.sector_size)
    return DeviceConfig(features=features, blk=blk, queues=queues, queue_size=queue_size)


def _offer(able: Mapping[Feature, bool], switches: Mapping[str, bool]) -> int:
    """The mask of what is offered: what the device is ``able`` to, but for what is off by default or by a switch."""
    wanted = {feature: yes and feature not in OFF_BY_DEFAULT for feature, yes in able.items()}
    for name, on in switches.items():
        if name not in SWITCHES:
            raise ValueError(f"there is no feature {name}; there are {', '.join(SWITCHES)}")
        feature = SWITCHES[name]
        if on and not able[feature]:
            raise ValueError(f"{name}=on: this disk cannot do that, and what it cannot do is not offered (FEAT-004)")
        wanted[feature] = on
    if not wanted[Feature.BLK_FLUSH] and "config_wce" not in switches:
        wanted[Feature.BLK_CONFIG_WCE] = False
    return sum(feature.mask for feature, yes in wanted.items() if yes)


def _describe(
    info: BlockInfo,
    ops: Operation,
    topology: Topology,
    features: int,
    *,
    queues: int,
    queue_size: int,
    cache: Literal["writeback", "writethrough"],
) -> BlkConfigSpace:
    """The configuration that goes with ``features``; a field without its feature is 0 (FEAT-008)."""

    def offered(feature: Feature) -> bool:
        return bool(features & feature.mask)

    can_cache = Operation.FLUSH in ops and info.read_write and offered(Feature.BLK_FLUSH)
    can_discard, can_zero = offered(Feature.BLK_DISCARD), offered(Feature.BLK_WRITE_ZEROES)
    can_erase = offered(Feature.BLK_SECURE_ERASE)
    if not offered(Feature.BLK_TOPOLOGY):
        topology = Topology(discard_granularity=topology.discard_granularity)
    block = info.sector_size
    return BlkConfigSpace(
        capacity=info.size_bytes // SECTOR_SIZE,
        size_max=_SIZE_MAX,
        # A header and a status take two descriptors of a chain, which is at most as long as the queue.
        seg_max=max(1, min(queue_size - 2, _SEG_MAX)),
        blk_size=block,
        physical_block_exp=max(topology.physical_block_size // block, 1).bit_length() - 1,
        min_io_size=min(topology.minimum_io_size // block, 0xFFFF),
        opt_io_size=min(topology.optimal_io_size // block, 0xFFFFFFFF),
        writeback=int(can_cache and cache == "writeback"),
        max_discard_sectors=_DISCARD_SECTORS_MAX if can_discard else 0,
        max_discard_seg=_RANGE_SEG_MAX if can_discard else 0,
        discard_sector_alignment=max(topology.discard_granularity, block) // SECTOR_SIZE if can_discard else 0,
        max_write_zeroes_sectors=_WRITE_ZEROES_SECTORS_MAX if can_zero else 0,
        max_write_zeroes_seg=_RANGE_SEG_MAX if can_zero else 0,
        write_zeroes_may_unmap=int(can_zero),
        max_secure_erase_sectors=_SECURE_ERASE_SECTORS_MAX if can_erase else 0,
        max_secure_erase_seg=_RANGE_SEG_MAX if can_erase else 0,
        secure_erase_sector_alignment=block // SECTOR_SIZE if can_erase else 0,
        num_queues=queues if offered(Feature.BLK_MQ) else 0,
    )


def _divide(blk: BlkConfigSpace, zoning: Zoning, block: int) -> BlkConfigSpace:
    """``blk`` with the zones of a disk whose sectors have ``block`` bytes (BLK-039 to 049)."""
    scale = block // SECTOR_SIZE
    zone_sectors = zoning.zone_sectors * scale
    if blk.max_secure_erase_sectors:  # whole zones only (BLK-140)
        most = max(blk.max_secure_erase_sectors // zone_sectors, 1) * zone_sectors
        blk = replace(blk, max_secure_erase_sectors=most, secure_erase_sector_alignment=zone_sectors)
    return replace(
        blk,
        zone_sectors=zone_sectors,
        max_open_zones=zoning.max_open,
        max_active_zones=zoning.max_active,
        # what the segments of a request can hold, in whole blocks (BLK-046)
        max_append_sectors=min(zoning.max_append_sectors, blk.seg_max * blk.size_max // block) * scale,
        write_granularity=zoning.write_granularity,
        zoned_model=zoning.model,
    )


def _is_queue_size(size: int, most: int, *, packed: bool = False) -> bool:
    return 0 < size <= most and (packed or size.bit_count() == 1)


# --- effects --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """A queue as the driver has set it up.

    ``desc``, ``driver`` and ``device`` are the IOVAs of its areas, aligned but not otherwise checked; ``vector`` may
    be NO_VECTOR; the rest follows from the negotiated features.
    """

    index: int
    size: int
    desc: int
    driver: int
    device: int
    vector: int
    event_idx: bool
    indirect: bool
    packed: bool
    in_order: bool = False
    notify_id: int | None = None
    """What each doorbell must carry in its low 16 bits (NOTIF_CONFIG_DATA); None if that does not matter."""


@dataclass(frozen=True, slots=True)
class Reset:
    """The driver resets the device: stop and drain every queue, then call :meth:`Device.reset_done`."""


@dataclass(frozen=True, slots=True)
class Suspend:
    """The driver suspends the device: serve no queue, drain, then call :meth:`Device.suspend_done`."""


@dataclass(frozen=True, slots=True)
class Resume:
    """The device is no longer suspended, or suspending: serve its queues again."""


@dataclass(frozen=True, slots=True)
class StartQueue:
    """Serve this queue, from index 0 on; look for buffers at once, they may have been queued before."""

    queue: QueueConfig


@dataclass(frozen=True, slots=True)
class StopQueues:
    """DEVICE_NEEDS_RESET has been set on a live device: serve no queue any more until it is reset."""


@dataclass(frozen=True, slots=True)
class ResetQueue:
    """The driver resets a queue: stop and drain it, then call :meth:`Device.queue_reset_done`."""

    index: int


@dataclass(frozen=True, slots=True)
class Notify:
    """The driver has rung the doorbell of a queue that is being served."""

    index: int


@dataclass(frozen=True, slots=True)
class ConfigVectorChanged:
    """Configuration change notifications go to ``vector`` from now on; NO_VECTOR is nowhere."""

    vector: int


@dataclass(frozen=True, slots=True)
class QueueVectorChanged:
    """Used buffer notifications of queue ``index`` go to ``vector`` from now on; NO_VECTOR is nowhere."""

    index: int
    vector: int


@dataclass(frozen=True, slots=True)
class ConfigInterrupt:
    """Send a configuration change notification."""


@dataclass(frozen=True, slots=True)
class WriteCacheChanged:
    """The driver has switched the write cache: with ``on`` false, completed writes must be durable."""

    on: bool


Effect = (
    Reset
    | Suspend
    | Resume
    | StartQueue
    | StopQueues
    | ResetQueue
    | Notify
    | ConfigVectorChanged
    | QueueVectorChanged
    | ConfigInterrupt
    | WriteCacheChanged
)


# --- the state machine ----------------------------------------------------------------------------------------------

# The status bits a driver sets, in the order of "Device Initialization", each with those that must be set before.
_STATUS_SEQUENCE = (
    (DeviceStatus.ACKNOWLEDGE, DeviceStatus(0)),
    (DeviceStatus.DRIVER, DeviceStatus(0)),
    (DeviceStatus.FEATURES_OK, DeviceStatus.DRIVER),
    (DeviceStatus.DRIVER_OK, DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK),
    (DeviceStatus.FAILED, DeviceStatus(0)),
)

# struct virtio_pci_common_cfg, every field in order.
_COMMON_CFG = struct.Struct("<IIIIHHBBHHHHHQQQHHHH")

# Alignment of descriptor, driver and device area ("Split Virtqueues", "Packed Virtqueues").
_SPLIT_ALIGNMENT = (16, 2, 4)
_PACKED_ALIGNMENT = (16, 4, 4)
_DESC, _DRIVER, _DEVICE = range(3)


@dataclass(slots=True)
class _Queue:
    """The registers of one queue.  ``started``: StartQueue was returned, and no reset has ended it yet."""

    size: int
    vector: int = NO_VECTOR
    areas: list[int] = field(default_factory=lambda: [0, 0, 0])
    enabled: bool = False
    started: bool = False
    resetting: bool = False

    @property
    def configurable(self) -> bool:
        return not self.enabled and not self.resetting

    @property
    def served(self) -> bool:
        return self.started and not self.resetting

    def placed(self, *, packed: bool) -> bool:
        """Whether every area has an address, suitably aligned."""
        alignment = _PACKED_ALIGNMENT if packed else _SPLIT_ALIGNMENT
        return all(area and not area % align for area, align in zip(self.areas, alignment, strict=True))


class Device:
    """The registers and the state of one device; see the head of this module."""

    def __init__(self, config: DeviceConfig) -> None:
        self.config = config
        self._blk = bytearray(config.blk.pack())
        self._sectors = config.blk.capacity
        self._generation = 0
        self._config_unread = False  # config has changed since the driver last read it
        self._initialise()

    def _initialise(self) -> None:
        """Everything that a reset puts back; the capacity and the generation are not among it."""
        self._status = DeviceStatus(0)
        self._resetting = False
        self._device_feature_select = 0
        self._driver_feature_select = 0
        self._driver_features = 0
        self._config_vector = NO_VECTOR
        self._queue_select = 0
        self._queues = [_Queue(self.config.queue_size) for _ in range(self.config.queues)]
        self._set_writeback(on=bool(self.config.blk.writeback))
        self._set_zoned(self.config.blk.pack()[BlkConfig.ZONED :])
        self._interrupt_owed = False  # the capacity has changed and the driver could not be told yet
        self._suspending = False
        self._show_capacity(self._sectors)  # which may have changed while the device was suspended

    # --- state ---

    @property
    def status(self) -> int:
        """The device_status register.  While a reset is under way it is never 0, even if it was before."""
        if self._resetting:
            return int(self._status or DeviceStatus.ACKNOWLEDGE)
        return int(self._status)

    @property
    def resetting(self) -> bool:
        """Whether a device reset waits for :meth:`reset_done`."""
        return self._resetting

    @property
    def suspending(self) -> bool:
        """Whether the driver has asked to suspend the device and :meth:`suspend_done` has not been called."""
        return self._suspending

    @property
    def suspended(self) -> bool:
        """Whether the device is suspended: status shows SUSPEND and not DRIVER_OK."""
        return bool(self._status & DeviceStatus.SUSPEND)

    @property
    def negotiated(self) -> int:
        """The mask of negotiated features: 0 until FEATURES_OK, then fixed until the reset."""
        return self._driver_features if self._status & DeviceStatus.FEATURES_OK else 0

    @property
    def live(self) -> bool:
        """Whether queues are to be served: DRIVER_OK, not broken, not being reset; also while suspending."""
        running = self._status & (DeviceStatus.DRIVER_OK | DeviceStatus.NEEDS_RESET) == DeviceStatus.DRIVER_OK
        return running and not self._resetting

    @property
    def write_cache(self) -> bool:
        """Whether completed writes may be volatile until a flush completes ("Device Operation", durability)."""
        return bool(self._blk[BlkConfig.WRITEBACK])

    @property
    def capacity(self) -> int:
        """The size that the driver sees, in 512-byte sectors."""
        return int.from_bytes(self._blk[BlkConfig.CAPACITY : BlkConfig.CAPACITY + 8], "little")

    @property
    def config_vector(self) -> int:
        """The MSI-X vector of configuration changes, or NO_VECTOR."""
        return self._config_vector

    def queue_vector(self, index: int) -> int:
        """The MSI-X vector of queue ``index``, or NO_VECTOR."""
        return self._queues[index].vector

    # --- what the device's owner reports ---

    def reset_done(self) -> None:
        """Nothing is in flight any more: the device is as it was at first, and status reads 0.

        Also for a reset that no driver asked for (of the PCI function, or because the client has gone).
        """
        self._initialise()

    def queue_reset_done(self, index: int) -> None:
        """Nothing of queue ``index`` is in flight any more: it is as it was at first, queue_reset reads 0."""
        if self._queues[index].resetting:
            self._queues[index] = _Queue(self.config.queue_size)

    def suspend_done(self) -> None:
        """Nothing is in flight any more and the driver has been told of all of it: status shows SUSPEND."""
        if self._suspending:
            self._suspending = False
            self._status = self._status & ~DeviceStatus.DRIVER_OK | DeviceStatus.SUSPEND

    def needs_reset(self) -> list[Effect]:
        """The device has met what only a reset repairs: set DEVICE_NEEDS_RESET ("DEVICENEEDSRESET").

        It gives up suspending for that (SUSPEND-003).  While it is suspended nothing is met.
        """
        if self._resetting or self.suspended or self._status & DeviceStatus.NEEDS_RESET:
            return []
        was_live = self.live
        self._suspending = False
        self._status |= DeviceStatus.NEEDS_RESET
        return [StopQueues(), ConfigInterrupt()] if was_live else []

    def set_capacity(self, sectors512: int) -> list[Effect]:
        """The disk has now ``sectors512`` sectors of 512 bytes; the driver is told, at DRIVER_OK if not before.

        While the device is suspended neither the configuration changes nor is anything told, until it is resumed.
        """
        self._sectors = sectors512
        if self.suspended or not self._show_capacity(sectors512):
            return []
        if self.live:
            return [ConfigInterrupt()]
        self._interrupt_owed = True
        return []

    def _show_capacity(self, sectors512: int) -> bool:
        """Let the driver read this capacity from now on.  False if it is what it reads already."""
        if sectors512 == self.capacity:
            return False
        self._blk[BlkConfig.CAPACITY : BlkConfig.CAPACITY + 8] = sectors512.to_bytes(8, "little")
        self._config_unread = True
        return True

    def doorbell(self, index: int, data: bytes = b"") -> list[Effect]:
        """The driver has written ``data`` to doorbell ``index``; what names no queue that is being served is ignored.

        The address tells which queue it is.  Of the data only the id of NOTIF_CONFIG_DATA matters (HOSTILE-088); the
        position of NOTIFICATION_DATA is not looked at, the ring decides (HOSTILE-087).
        """
        served = self.live and index < len(self._queues) and self._queues[index].served
        if not served:
            return []
        expected = self._notify_id(index)
        if expected is not None and data[:2] != expected.to_bytes(2, "little"):
            return []
        return [Notify(index)]

    # --- device configuration space ---

    def config_read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of struct virtio_blk_config from ``offset`` on."""
        if self._config_unread:
            # Counted when a change is first seen, so that any number of unread ones cannot wrap it round.
            self._generation = (self._generation + 1) & 0xFF
        self._config_unread = self._interrupt_owed = False
        return bytes(self._blk[offset : offset + length]).ljust(length, b"\0")

    def config_write(self, offset: int, data: bytes) -> list[Effect]:
        """Write to struct virtio_blk_config: only writeback can change, and only with CONFIG_WCE negotiated."""
        position = BlkConfig.WRITEBACK - offset
        if self.suspended:
            return []
        if self._resetting or not self._has(Feature.BLK_CONFIG_WCE) or not 0 <= position < len(data):
            return []
        was = self.write_cache
        self._set_writeback(on=data[position] != 0)
        return [WriteCacheChanged(self.write_cache)] if self.write_cache != was else []

    def _set_writeback(self, *, on: bool) -> None:
        if on != self.write_cache:
            self._blk[BlkConfig.WRITEBACK] = on
            self._config_unread = True

    def _set_zoned(self, fields: bytes) -> None:
        if self._blk[BlkConfig.ZONED :] != fields:
            self._blk[BlkConfig.ZONED :] = fields
            self._config_unread = True

    # --- common configuration ---

    def common_read(self, offset: int, length: int) -> bytes:
        """``length`` bytes of struct virtio_pci_common_cfg from ``offset`` on; reading changes nothing."""
        queue = self._selected()
        image = _COMMON_CFG.pack(
            self._device_feature_select,
            _window(self.config.features, self._device_feature_select),
            self._driver_feature_select,
            _window(self._driver_features, self._driver_feature_select),
            self._config_vector,
            self.config.queues,
            self.status,
            self._generation,
            self._queue_select,
            queue.size if queue else 0,
            queue.vector if queue else NO_VECTOR,
            queue.enabled if queue else 0,
            self._queue_select if queue else 0,  # queue_notify_off
            *(queue.areas if queue else (0, 0, 0)),
            (self._notify_id(self._queue_select) or 0) if queue else 0,  # queue_notif_config_data
            queue.resetting if queue else 0,
            0,  # admin_queue_index
            0,  # admin_queue_num
        )
        return image[offset : offset + length].ljust(length, b"\0")

    def common_write(self, offset: int, data: bytes) -> list[Effect]:
        """Write ``data`` to struct virtio_pci_common_cfg at ``offset``: to each register that it covers wholly."""
        effects: list[Effect] = []
        for register, width, write in self._REGISTERS:
            start = register - offset
            ignored = self._resetting or (self.suspended and register != CommonCfg.DEVICE_STATUS)
            if start >= 0 and start + width <= len(data) and not ignored:
                effects += write(self, int.from_bytes(data[start : start + width], "little"))
        return effects

    def _write_device_feature_select(self, value: int) -> list[Effect]:
        self._device_feature_select = value
        return []

    def _write_driver_feature_select(self, value: int) -> list[Effect]:
        self._driver_feature_select = value
        return []

    def _write_driver_feature(self, value: int) -> list[Effect]:
        select = self._driver_feature_select
        if select > 1 or self._status & DeviceStatus.FEATURES_OK:
            return []
        kept = self._driver_features & ~(0xFFFFFFFF << 32 * select)
        self._driver_features = kept | (value << 32 * select & self.config.features)
        return []

    def _write_config_vector(self, value: int) -> list[Effect]:
        was, self._config_vector = self._config_vector, self._usable_vector(value)
        return [ConfigVectorChanged(self._config_vector)] if self._config_vector != was else []

    def _write_queue_select(self, value: int) -> list[Effect]:
        self._queue_select = value
        return []

    # Status.

    def _write_status(self, value: int) -> list[Effect]:
        if value == 0:
            self._suspending = False
            self._resetting = True
            return [Reset()]
        if self.suspended:
            self._status |= value & DeviceStatus.FAILED
            return self._resume() if value & DeviceStatus.DRIVER_OK else []
        had = self._status
        for bit, predecessors in _STATUS_SEQUENCE:
            if value & bit and self._status & predecessors == predecessors:
                self._status |= bit
                if bit is DeviceStatus.FEATURES_OK and not had & bit:
                    self._finish_negotiation()
        if self.live and not had & DeviceStatus.DRIVER_OK:
            return self._go_live()
        if value & DeviceStatus.SUSPEND and self.live and not self._suspending and self._has(Feature.SUSPEND):
            self._suspending = True
            return [Suspend()]
        return []

    def _resume(self) -> list[Effect]:
        self._status = self._status & ~DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK
        changed = self._show_capacity(self._sectors)
        return [Resume(), ConfigInterrupt()] if changed else [Resume()]

    def _finish_negotiation(self) -> None:
        # A non-transitional device cannot serve a driver without VERSION_1, nor can a driver that knows of no zones
        # use a host-managed disk (BLK-038); no other block feature depends on one.
        zoned = self._has(Feature.BLK_ZONED)
        if not self._has(Feature.VERSION_1) or (self.config.blk.zoned_model == ZoneModel.HOST_MANAGED and not zoned):
            self._status &= ~DeviceStatus.FEATURES_OK
            return
        if not zoned:
            self._set_zoned(bytes(BLK_CONFIG_SIZE - BlkConfig.ZONED))  # BLK-037
        if not self._has(Feature.BLK_FLUSH):
            # Such a driver could not make its writes durable, so each of them must be (BLK-032, BLK-065).
            self._set_writeback(on=False)

    def _go_live(self) -> list[Effect]:
        effects = self._start(*(index for index, queue in enumerate(self._queues) if queue.enabled))
        if self.live and self._interrupt_owed:
            effects.append(ConfigInterrupt())
        self._interrupt_owed = False
        return effects

    def _start(self, *indices: int) -> list[Effect]:
        packed = self._has(Feature.RING_PACKED)
        if not all(self._queues[index].placed(packed=packed) for index in indices):
            return self.needs_reset()
        for index in indices:
            self._queues[index].started = True
        return [StartQueue(self._queue_config(index)) for index in indices]

    def _queue_config(self, index: int) -> QueueConfig:
        queue = self._queues[index]
        return QueueConfig(
            index=index,
            size=queue.size,
            desc=queue.areas[_DESC],
            driver=queue.areas[_DRIVER],
            device=queue.areas[_DEVICE],
            vector=queue.vector,
            event_idx=self._has(Feature.EVENT_IDX),
            indirect=self._has(Feature.INDIRECT_DESC),
            packed=self._has(Feature.RING_PACKED),
            in_order=self._has(Feature.IN_ORDER),
            notify_id=self._notify_id(index),
        )

    def _notify_id(self, index: int) -> int | None:
        # not the index, so that a driver that does not look is found out
        return _NOTIFY_ID_BASE + index if self._has(Feature.NOTIF_CONFIG_DATA) else None

    # Queue registers: those of the queue in queue_select, if there is one.

    def _write_queue_size(self, queue: _Queue, value: int) -> list[Effect]:
        packed = self._has(Feature.RING_PACKED)
        if queue.configurable and _is_queue_size(value, self.config.queue_size, packed=packed):
            queue.size = value
        return []

    def _write_queue_vector(self, queue: _Queue, value: int) -> list[Effect]:
        was, queue.vector = queue.vector, self._usable_vector(value)
        return [QueueVectorChanged(self._queue_select, queue.vector)] if queue.vector != was else []

    def _write_queue_enable(self, queue: _Queue, value: int) -> list[Effect]:
        # Writing 0 is forbidden to drivers, yet some do it before they set a queue up.
        usable = self._status & DeviceStatus.FEATURES_OK and (self._queue_select == 0 or self._has(Feature.BLK_MQ))
        if value != 1 or not usable or not queue.configurable:
            return []
        queue.enabled = True
        return self._start(self._queue_select) if self.live else []

    def _write_queue_area(self, queue: _Queue, value: int, *, area: int, shift: int) -> list[Effect]:
        if queue.configurable:
            queue.areas[area] = queue.areas[area] & ~(0xFFFFFFFF << shift) | value << shift
        return []

    def _write_queue_reset(self, queue: _Queue, value: int) -> list[Effect]:
        if value != 1 or not self._has(Feature.RING_RESET) or queue.resetting:
            return []
        queue.resetting = True
        if queue.started:
            return [ResetQueue(self._queue_select)]
        self.queue_reset_done(self._queue_select)
        return []

    # Helpers.

    def _has(self, feature: Feature) -> bool:
        return bool(self.negotiated & feature.mask)

    def _usable_vector(self, vector: int) -> int:
        return vector if vector < self.config.vectors else NO_VECTOR

    def _selected(self) -> _Queue | None:
        return self._queues[self._queue_select] if self._queue_select < len(self._queues) else None

    @staticmethod
    def _of_queue(write: Callable[[Device, _Queue, int], list[Effect]]) -> _Write:
        def write_selected(device: Device, value: int) -> list[Effect]:
            queue = device._selected()
            return write(device, queue, value) if queue else []

        return write_selected

    # Every writable register: offset, width in bytes, what a write does.  In ascending order, so that one wide write
    # acts as separate ones would.
    _REGISTERS: ClassVar[tuple[tuple[int, int, _Write], ...]] = (
        (CommonCfg.DEVICE_FEATURE_SELECT, 4, _write_device_feature_select),
        (CommonCfg.DRIVER_FEATURE_SELECT, 4, _write_driver_feature_select),
        (CommonCfg.DRIVER_FEATURE, 4, _write_driver_feature),
        (CommonCfg.CONFIG_MSIX_VECTOR, 2, _write_config_vector),
        (CommonCfg.DEVICE_STATUS, 1, _write_status),
        (CommonCfg.QUEUE_SELECT, 2, _write_queue_select),
        (CommonCfg.QUEUE_SIZE, 2, _of_queue(_write_queue_size)),
        (CommonCfg.QUEUE_MSIX_VECTOR, 2, _of_queue(_write_queue_vector)),
        (CommonCfg.QUEUE_ENABLE, 2, _of_queue(_write_queue_enable)),
        (CommonCfg.QUEUE_DESC, 4, _of_queue(partial(_write_queue_area, area=_DESC, shift=0))),
        (CommonCfg.QUEUE_DESC + 4, 4, _of_queue(partial(_write_queue_area, area=_DESC, shift=32))),
        (CommonCfg.QUEUE_DRIVER, 4, _of_queue(partial(_write_queue_area, area=_DRIVER, shift=0))),
        (CommonCfg.QUEUE_DRIVER + 4, 4, _of_queue(partial(_write_queue_area, area=_DRIVER, shift=32))),
        (CommonCfg.QUEUE_DEVICE, 4, _of_queue(partial(_write_queue_area, area=_DEVICE, shift=0))),
        (CommonCfg.QUEUE_DEVICE + 4, 4, _of_queue(partial(_write_queue_area, area=_DEVICE, shift=32))),
        (CommonCfg.QUEUE_RESET, 2, _of_queue(_write_queue_reset)),
    )


_Write = Callable[[Device, int], list[Effect]]


def _window(features: int, select: int) -> int:
    """The 32 bits of ``features`` that a feature select register shows."""
    return features >> 32 * select & 0xFFFFFFFF if select < 2 else 0
