"""The device that is checked, as a check sees it."""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vmmblk.client.connection import Connection
from vmmblk.client.driver import SUPPORTED, VirtioBlk
from vmmblk.client.errors import ProtocolError
from vmmblk.client.memory import GuestMemory
from vmmblk.conform.check import NotOffered, NotTestable
from vmmblk.spec import SECTOR_SIZE, BlkConfig, CommonCfg, Feature

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["FAR_SECTOR", "SCRATCH_SECTORS", "TAIL_SECTORS", "Facts", "Options", "Target"]

SCRATCH_SECTORS = 4096
"""What checks write from sector 0 on, at most (512 bytes each); it is put back in the end."""
TAIL_SECTORS = 128
"""What they write at the end of the disk, at most."""
FAR_SECTOR = 1 << 50
"""A sector that no disk has, however it may have grown since it was asked."""
_PAUSE = 0.01


@dataclass(frozen=True, slots=True)
class Options:
    """How to check.  Times are in seconds."""

    timeout: float = 5.0
    """How long an answer or a completion may take."""
    limit: float = 60.0
    """How long one check may take."""
    destructive: bool = False
    """Whether what cannot be put back may be changed: zones."""
    resize_command: str = ""
    """A shell command that makes the disk bigger while it is served."""
    power_cut_command: str = ""
    """A shell command after which the disk holds only what was durable: kills the server's machine, and restarts it."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the device says about itself."""

    offer: int
    capacity: int
    """Sectors of 512 bytes."""
    block_size: int
    """Bytes."""
    queues: int
    queue_size: int
    """Of queue 0."""


class Target:
    """A vfio-user virtio-blk server behind a socket, to which checks connect anew each time.

    ``packed`` is the ring format that ``driver`` uses by default.  Without ``facts`` the device is asked: raises what
    ``driver`` raises.
    """

    def __init__(self, address: Path, options: Options, facts: Facts | None = None, *, packed: bool = False) -> None:
        self.address = address
        self.options = options
        self.packed = packed
        self._lock = threading.Lock()
        self._open: list[Connection] = []
        self._aborted = False
        self.facts = self._learn() if facts is None else facts

    # Facts.

    def offers(self, feature: Feature) -> bool:
        """Whether the device offers a feature."""
        return bool(self.facts.offer & feature.mask)

    def require(self, *features: Feature) -> None:
        """Raise NotOffered unless the device offers all of them."""
        missing = [feature.name for feature in features if not self.offers(feature)]
        if missing:
            raise NotOffered(f"{', '.join(missing)} is not offered")

    def require_queues(self, count: int) -> None:
        """Raise NotOffered unless the device has so many queues."""
        if self.facts.queues < count:
            raise NotOffered(f"the device has {self.facts.queues} queues")

    def room(self, sectors: int = 8) -> None:
        """Raise NotOffered or NotTestable unless that many sectors from sector 0 on may be written."""
        if self.offers(Feature.BLK_RO):
            raise NotOffered("the disk is read-only")
        if self.offers(Feature.BLK_ZONED):
            raise NotTestable("the disk is zoned; point it at one that is not, too")
        if min(self.facts.capacity, SCRATCH_SECTORS) < sectors:
            raise NotTestable(f"the disk has {self.facts.capacity} sectors, this takes {sectors}")

    @property
    def block_sectors(self) -> int:
        """Sectors (512 bytes) per logical block: the unit of position and length that this disk takes."""
        return self.facts.block_size // SECTOR_SIZE

    def mask(self, *extra: Feature, without: tuple[Feature, ...] = ()) -> int:
        """A set of features to negotiate: what the driver usually takes, in this ring format, plus and minus."""
        mask = SUPPORTED | (Feature.RING_PACKED.mask if self.packed else 0)
        for feature in extra:
            mask |= feature.mask
        for feature in without:
            mask &= ~feature.mask
        return mask

    # Connections.

    @contextlib.contextmanager
    def connection(self, **options: Any) -> Iterator[Connection]:
        """A fresh connection (options: those of Connection).

        Waits a while for a server that is not ready for its next client.  Raises OSError.
        """
        connected = self._connect(options)
        with self._lock:
            self._open.append(connected)
            if self._aborted:
                connected.abort()
        try:
            yield connected
        finally:
            with self._lock:
                self._open.remove(connected)
            connected.close()

    @contextlib.contextmanager
    def driver(self, *, memory: GuestMemory | None = None, **options: Any) -> Iterator[VirtioBlk]:
        """A fresh connection with memory and a driver on it (options: those of VirtioBlk), up unless start=False.

        ``features`` defaults to ``mask()``.  ``memory`` stays the caller's; by default there are 64 MiB.
        """
        options.setdefault("features", self.mask())
        options.setdefault("timeout", self.options.timeout)
        with contextlib.ExitStack() as stack:
            if memory is None:
                memory = stack.enter_context(GuestMemory())
            connection = stack.enter_context(self.connection())
            memory.map_all(connection)
            driver = VirtioBlk(connection, memory, **options)
            stack.callback(driver.close)
            yield driver

    def abort(self) -> None:
        """Make every connection fail, open or yet to come: the check has had its time.  From any thread."""
        with self._lock:
            self._aborted = True
            for connection in self._open:
                connection.abort()

    # Commands of the user's.

    def resize(self) -> None:
        """Have the disk made bigger.  Raises NotTestable without the command."""
        self._command(self.options.resize_command, "--resize-command")

    def cut_power(self) -> None:
        """Have the disk lose what was not durable; connections are lost.  Raises NotTestable without the command."""
        self._command(self.options.power_cut_command, "--power-cut-command")

    # The inside.

    def _command(self, command: str, option: str) -> None:
        if not command:
            raise NotTestable(f"takes {option}")
        result = subprocess.run(  # noqa: S602 - the user's own command line
            command, shell=True, check=False, capture_output=True, text=True, timeout=self.options.limit
        )
        if result.returncode:
            raise NotTestable(f"{option} ended with status {result.returncode}: {result.stderr.strip()[-200:]}")

    def _connect(self, options: dict[str, Any]) -> Connection:
        deadline = time.monotonic() + self.options.timeout
        while True:
            try:
                return Connection(self.address, self.options.timeout, **options)
            except ProtocolError:
                raise
            except (FileNotFoundError, ConnectionError):
                if time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE)  # nothing tells when a server that serves one client at a time has seen the last one off

    def _learn(self) -> Facts:
        with self.driver(start=False) as driver:
            driver.reset()
            driver.pci.enable()
            device = driver.device
            offer = device.features
            block_size = device.config(BlkConfig.BLK_SIZE) if offer & Feature.BLK_BLK_SIZE.mask else SECTOR_SIZE
            return Facts(
                offer=offer,
                capacity=device.config(BlkConfig.CAPACITY),
                block_size=max(block_size, SECTOR_SIZE),
                queues=device.get(CommonCfg.NUM_QUEUES),
                queue_size=device.select_queue(0),
            )
