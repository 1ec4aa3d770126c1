"""One virtio-blk device on one socket: wires transport, PCI function, core, worker and block together.

Three threads matter.  The transport thread owns the registers and everything in this module but ``start`` and ``stop``.
The worker's thread owns the block.  The thread that made the server starts and stops it.

Draining.  Before guest memory changes, before a reset is answered and when the client is lost, nothing may be in
flight.  The queues are paused, and what is in flight may take ``DRAIN_LIMIT`` seconds, over a whole burst of such
messages: QEMU gives all of them together five.  What has not ended by then is orphaned: the core takes the memory back
from it, the block goes on in memory of its own, and until it has ended no new request reaches the block.  A reset by
the driver (a status of 0, queue_reset) is drained the same way, while the registers read "not yet".

Memory that the kernel has pinned (O_DIRECT without bounce) cannot be taken back.  Then the connection is closed instead
of answered, after ``PINNED_DRAIN_LIMIT``: the VMM goes down, but no guest memory is corrupted.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from vmmblk.block import Block, Operation, SupportsIdentify, SupportsResize, SupportsZones, Zoning, operations
from vmmblk.budget import DrainBudget, LogBudget, Patience
from vmmblk.device import (
    ConfigInterrupt,
    ConfigVectorChanged,
    Device,
    Notify,
    QueueVectorChanged,
    Reset,
    ResetQueue,
    Resume,
    StartQueue,
    StopQueues,
    Suspend,
    WriteCacheChanged,
    configure,
)
from vmmblk.engine import Engine, EngineOptions, native
from vmmblk.errors import ConfigError
from vmmblk.memory import Core, Pause, Region
from vmmblk.pci import (
    NOTIFY_MULTIPLIER,
    NOTIFY_OFFSET,
    NOTIFY_SIZE,
    VIRTIO_BAR,
    BusMaster,
    Effect,
    IntxDisabled,
    MsixEnabled,
    PciFunction,
)
from vmmblk.request import Limits, SegmentLimits
from vmmblk.ring import LostMemory, Queue, RingFailure, UnreachableRing
from vmmblk.spec import BLK_ID_BYTES, NO_VECTOR, SECTOR_SIZE
from vmmblk.vfio_user import CONFIG_REGION, Layout, Transport
from vmmblk.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

__all__ = ["DRAIN_LIMIT", "MEMORY_ADVICE", "MEMORY_GONE", "PINNED_DRAIN_LIMIT", "Server", "ServerOptions"]

log = logging.getLogger("vmmblk.server")

DRAIN_LIMIT = 1.0
"""Seconds that requests in flight get to end before their memory is taken back."""

PINNED_DRAIN_LIMIT = 4.0
"""Seconds that they get when their memory cannot be taken back: what comes then is worse than a VMM kept waiting."""

MEMORY_ADVICE = (
    "guest memory is not shared with vmmblk: start QEMU with"
    " -object memory-backend-memfd,id=mem,size=<as -m>,share=on -machine memory-backend=mem"
)

MEMORY_GONE = (
    "guest memory is gone: the file behind it was truncated, or its file system is full;"
    " use -object memory-backend-memfd, or make room in the file system"
)


@dataclass(frozen=True)
class ServerOptions:
    """How the device presents the block.

    ``serial`` (ASCII, at most 20 characters) is what GET_ID answers, by default what the block says; ``queue_size`` a
    power of two up to 32768; ``cache`` the mode in which a guest that can choose starts; ``queues`` 1 to 64;
    ``features`` those that are not to be at their defaults, by their names in ``device.SWITCHES``.
    """

    serial: str = ""
    queues: int = 1
    queue_size: int = 256
    cache: Literal["writeback", "writethrough"] = "writeback"
    features: Mapping[str, bool] = field(default_factory=dict)
    engine: Literal["auto", "native", "python"] = "auto"
    """Whether reads and writes of a disk that is memory or a file are served in C (auto: if it is)."""
    io: EngineOptions = field(default_factory=EngineOptions)
    doorbell: Literal["message", "mmap"] = "message"
    """Whether clients may map the doorbells (mmap).  What is stored there is not heard: ``io`` must poll for ever."""
    coalesce: tuple[int, int] | None = None
    """How many completions may share an interrupt, and for how many microseconds it is held back at most."""


class Server:
    """A virtio-blk device on the UNIX socket ``socket``, its disk ``block`` (prepared by ``filters.prepare``).

    The server owns the block from ``start`` on and disconnects it in ``stop``.  Raises: ConfigError for options that
    no device can have.
    """

    def __init__(self, socket: Path, block: Block, options: ServerOptions) -> None:
        if options.doorbell == "mmap" and options.io.poll_us is not None:
            raise ConfigError("mapped doorbells are not heard: with --doorbell mmap use --poll-us busy, or neither")
        self._path = socket
        self._block = block
        self._doorbell = options.doorbell
        info = block.info
        try:
            self._config = configure(
                info,
                operations(block),
                block.topology,
                queues=options.queues,
                queue_size=options.queue_size,
                cache=options.cache,
                zoning=_zoning(block),
                switches=options.features,
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._core = Core(self._config.queues, self._config.queue_size)
        if options.coalesce is not None:
            self._core.coalesce(*options.coalesce)
        self._queues = [Queue(self._core, index) for index in range(self._config.queues)]
        self._device = Device(self._config)
        self._pci = PciFunction(self._device, self._core)
        self._engine = self._choose_engine(options)
        self._worker = Worker(
            block,
            self._queues,
            _serial(block, options),
            self,
            engine=self._engine,
            patience=self._patience(options.io),
        )
        self._transport: Transport | None = None
        self._pinned = block.pins_memory and not block.bounce
        self._budget = DrainBudget(PINNED_DRAIN_LIMIT if self._pinned else DRAIN_LIMIT)
        self._deadline: float | None = None
        self._quiescing = False
        self._resetting_queues: set[int] = set()
        self._advised = False
        self._advice_log = LogBudget()
        self._guest_log = LogBudget()  # for what a guest or a client can cause as often as it likes
        self._started = False
        self._closed = False
        self._inode: tuple[int, int] | None = None
        self.drained_fd = self._core.drained_fd
        self._apply_table: dict[type, Callable[[Any], None]] = {
            Reset: lambda _: self._begin_reset(),
            Suspend: lambda _: self._begin_suspend(),
            Resume: lambda _: self._core.resume(Pause.SUSPEND),
            StartQueue: self._start_queue,
            StopQueues: lambda _: self._stop_queues(),
            ResetQueue: self._begin_queue_reset,
            Notify: lambda effect: self._queues[effect.index].kick(),
            ConfigVectorChanged: lambda effect: self._core.set_config_vector(effect.vector),
            QueueVectorChanged: lambda effect: self._queues[effect.index].set_vector(effect.vector),
            ConfigInterrupt: lambda _: self._core.config_interrupt(),
            WriteCacheChanged: lambda effect: self._worker.set_write_cache(effect.on),
            MsixEnabled: lambda effect: self._core.set_msix(effect.on),
            IntxDisabled: lambda effect: self._core.set_intx_disabled(effect.on),
            BusMaster: lambda effect: self._set_bus_master(effect.on),
        }

    # -- life, called by the thread that made the server

    def start(self) -> None:
        """Bind the socket and serve.  A socket file that nobody listens on any more is replaced.

        Raises: ConfigError with what to do about it.
        """
        try:
            self._transport = self._bind()
        except ConfigError:
            self._close()
            raise
        self._started = True
        self._inode = _inode(self._path)
        try:
            self._serve(self._transport)
        except BaseException:
            self.stop(0.5)
            raise

    def stop(self, timeout: float) -> bool:
        """Drain, flush, disconnect the block, close the connection, remove the socket.

        False if that was not over after ``timeout`` seconds: then something in the disk hangs, and only ending the
        process ends it (the socket is removed all the same).
        """
        if not self._started:
            self._close()
            return True
        until = time.monotonic() + timeout
        self._core.pause(Pause.STOP)
        stopped = self._worker.stop(timeout)
        if stopped and self._transport is not None:
            stopped = self._transport.stop(max(0.5, until - time.monotonic()))
        self._remove_socket()
        if stopped:
            self._started = False
            self._close()
        return stopped

    @property
    def failed(self) -> BaseException | None:
        """What ended the server before its time, if anything did."""
        return self._worker.failed or (self._transport.failed if self._transport else None)

    def _choose_engine(self, options: ServerOptions) -> Engine | None:
        made_of = None if options.engine == "python" else native(self._block)
        if made_of is None:
            if options.engine == "native":
                raise ConfigError("this disk cannot be served by the native engine: leave --engine out")
            return None
        return Engine(self._block, made_of, self._queues, self._config.queue_size, options.io)

    def _patience(self, io: EngineOptions) -> Patience:
        if self._engine is not None:  # it looks for itself, and the worker has little to do
            return Patience(0, adaptive=False)
        return Patience(None if io.poll_us is None else io.poll_us * 1000, adaptive=io.adaptive)

    @property
    def engine(self) -> str:
        """Who serves reads and writes, in words."""
        if self._engine is None:
            return "python"
        return f"native{', ' if self._engine.waits else ''}{self._engine.waits}"

    def _serve(self, transport: Transport) -> None:
        self._core.irq_sink(*transport.trigger)
        for queue in self._queues:
            transport.set_kick(queue.index, queue.kick_fd)
        transport.offer_bells([queue.bell.fd for queue in self._queues])
        self._core.pause(Pause.BUS_MASTER)
        if isinstance(self._block, SupportsResize) and Operation.RESIZE in operations(self._block):
            self._block.on_resize(self._block_grew)
        self._worker.start()
        transport.start()

    def _bind(self) -> Transport:
        _clear_stale_socket(self._path)
        umask = os.umask(0o177)  # whoever can connect reads and writes the disk: others cannot, not for a moment
        try:
            return Transport(self._path, self, self._layout())
        except OSError as error:
            raise ConfigError(_why_not_bound(self._path, error)) from error
        finally:
            os.umask(umask)

    def _close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._engine is not None:
            self._engine.close()
        for queue in self._queues:
            queue.stop()
            queue.close()
        self._core.close()

    def _remove_socket(self) -> None:
        with contextlib.suppress(OSError):
            if self._inode and _inode(self._path) == self._inode:  # not one that somebody put in its place
                self._path.unlink()

    def _layout(self) -> Layout:
        return Layout(
            vectors=self._config.vectors,
            bar_sizes=tuple(self._pci.bar_size(bar) for bar in range(6)),
            doorbell_bar=VIRTIO_BAR,
            doorbell_offset=NOTIFY_OFFSET,
            doorbell_stride=NOTIFY_MULTIPLIER,
            queues=self._config.queues,
            mapped_size=NOTIFY_SIZE if self._doorbell == "mmap" else 0,
        )

    # -- what the transport asks (Handler)

    def welcome(self) -> None:
        """Each client gets bells of its own: who was here before must not ring them, or keep them from being heard."""
        for queue in self._queues:
            queue.bell.renew()

    def region_read(self, region: int, offset: int, length: int) -> bytes:
        """Registers, configuration space, MSI-X table and PBA."""
        if region == CONFIG_REGION:
            return self._pci.config_read(offset, length)
        return self._pci.bar_read(region, offset, length)

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        """Registers, configuration space, MSI-X table."""
        if region == CONFIG_REGION:
            self._apply(self._pci.config_write(offset, data))
        else:
            self._apply(self._pci.bar_write(region, offset, data))

    def quiesce(self) -> bool:
        """Pause the queues; True if nothing is in flight."""
        if not self._core.pause(Pause.QUIESCE):
            return True
        self._quiescing = True
        self._deadline = self._budget.begin(time.monotonic())
        return False

    def resume(self) -> None:
        """Serve again."""
        self._core.resume(Pause.QUIESCE)

    def reset(self, *, lost: bool) -> None:
        """DEVICE_RESET, or the client is gone: the whole function is as it was at first."""
        if lost:
            self._advised = False
        else:
            self._guest_log.log(log, logging.INFO, "the client reset the device")
        self._finish_reset(self._pci.reset())

    def dma_map(self, region: Region) -> None:
        """Guest memory appeared."""
        try:
            self._core.map(region)
        except OSError as error:
            self._guest_log.log(log, logging.ERROR, "%s: it cannot be reached", error.strerror)

    def dma_unmap(self, iova: int, size: int) -> None:
        """Guest memory goes away."""
        if self._core.busy:  # only when the worker ended before its time: what the disk still does must keep its data
            self._core.orphan()
        with contextlib.suppress(FileNotFoundError):  # it could not be mapped
            self._core.unmap(iova, size)

    def intx_unmask(self) -> None:
        """INTx is a level."""
        self._core.intx_again()

    def deadline(self) -> float | None:
        """When what is in flight is orphaned."""
        return self._deadline

    def drained(self) -> None:
        """Finish what waited for nothing to be in flight, or give up waiting."""
        if self._deadline is not None and time.monotonic() >= self._deadline and self._core.busy:
            self._deadline = None
            self._take_memory_back()
        self._settle()

    # -- what the worker reports (Supervisor), from its thread

    def ring_failed(self, queue: Queue, start: int, error: RingFailure) -> None:
        """A ring is corrupt or out of reach: only a reset repairs that."""
        if self._transport is not None:
            self._transport.call(lambda: self._ring_failed(queue, start, error))

    def memory_not_shared(self) -> None:
        """Say so, once a client."""
        if not self._advised:
            self._advised = True
            self._advice_log.log(log, logging.ERROR, "%s", MEMORY_ADVICE)

    def _ring_failed(self, queue: Queue, start: int, error: RingFailure) -> None:
        if queue.starts != start or not self._device.live:
            return  # it has been reset meanwhile
        if isinstance(error, UnreachableRing):
            self.memory_not_shared()
        elif isinstance(error, LostMemory):
            self._guest_log.log(log, logging.ERROR, MEMORY_GONE)
        else:
            message = "queue %d is corrupt: the device needs a reset"
            self._guest_log.log(log, logging.INFO, message, queue.index)
        self._apply(self._device.needs_reset())

    def _block_grew(self) -> None:
        transport = self._transport
        if transport is not None:
            sectors = self._block.info.size_bytes // SECTOR_SIZE
            self._worker.grown()
            transport.call(lambda: self._apply(self._device.set_capacity(sectors)))

    # -- effects of register writes

    def _apply(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            self._apply_table[type(effect)](effect)

    def _set_bus_master(self, on: bool) -> None:
        if on:
            self._core.resume(Pause.BUS_MASTER)
        else:
            self._core.pause(Pause.BUS_MASTER)

    def _start_queue(self, effect: StartQueue) -> None:
        blk = self._config.blk
        self._worker.configure(
            Limits(
                features=self._device.negotiated,
                sector_size=self._block.info.sector_size,
                discard=SegmentLimits(blk.max_discard_sectors, blk.max_discard_seg),
                write_zeroes=SegmentLimits(blk.max_write_zeroes_sectors, blk.max_write_zeroes_seg),
                secure_erase=SegmentLimits(
                    blk.max_secure_erase_sectors, blk.max_secure_erase_seg, blk.secure_erase_sector_alignment or 1
                ),
                max_append_sectors=blk.max_append_sectors,
            )
        )
        self._worker.set_write_cache(self._device.write_cache)
        c = effect.queue
        queue = self._queues[c.index]
        if self._transport is not None:
            self._transport.set_notify_id(c.index, c.notify_id)
        try:
            queue.start(
                size=c.size,
                desc=c.desc,
                driver=c.driver,
                device=c.device,
                vector=c.vector,
                event_idx=c.event_idx,
                indirect=c.indirect,
                packed=c.packed,
                in_order=c.in_order,
            )
        except OSError as error:
            if error.errno == errno.EFAULT:
                self.memory_not_shared()
            elif error.errno == errno.EIO:
                self._guest_log.log(log, logging.ERROR, MEMORY_GONE)
            else:
                self._guest_log.log(log, logging.INFO, "%s: the device needs a reset", error.strerror)
            self._apply(self._device.needs_reset())
            return
        queue.kick()

    def _stop_queues(self) -> None:
        self._core.pause(Pause.RESET)

    def _begin_reset(self) -> None:
        self._core.pause(Pause.RESET)
        self._drain_for_driver()

    def _begin_queue_reset(self, effect: ResetQueue) -> None:
        self._queues[effect.index].pause(Pause.RESET)
        self._resetting_queues.add(effect.index)
        self._drain_for_driver()

    def _begin_suspend(self) -> None:
        # nobody waits for an answer meanwhile, so requests take the time that they need and nothing is taken back
        self._core.pause(Pause.SUSPEND)
        self._settle()

    def _drain_for_driver(self) -> None:
        if self._deadline is None:
            self._deadline = self._budget.begin(time.monotonic())
        self._settle()

    # -- draining

    def _settle(self) -> None:
        if self._device.resetting and not self._core.busy:
            self._device.reset_done()
            self._core.take()
            self._finish_reset([])
        for index in list(self._resetting_queues):
            if not self._queues[index].busy:
                self._finish_queue_reset(index)
        if self._device.suspending and not self._core.busy and not self._core.orphans:
            self._device.suspend_done()
        if not (self._core.busy and (self._quiescing or self._device.resetting or self._resetting_queues)):
            self._end_drain()

    def _end_drain(self) -> None:
        if self._deadline is not None:
            self._deadline = None
            self._budget.end(time.monotonic())
        if self._quiescing and self._transport is not None:
            self._quiescing = False
            self._transport.quiesced()

    def _finish_reset(self, effects: Iterable[Effect]) -> None:
        for queue in self._queues:
            queue.stop()
            queue.forget_doorbells()
            queue.set_vector(NO_VECTOR)
        self._core.set_config_vector(NO_VECTOR)
        self._resetting_queues.clear()
        self._apply(effects)
        self._core.resume(Pause.SUSPEND)
        self._core.resume(Pause.RESET)

    def _finish_queue_reset(self, index: int) -> None:
        self._resetting_queues.discard(index)
        self._queues[index].stop()
        self._queues[index].forget_doorbells()
        self._queues[index].set_vector(NO_VECTOR)
        self._device.queue_reset_done(index)
        self._queues[index].resume(Pause.RESET)

    def _take_memory_back(self) -> None:
        busy = self._core.busy
        if self._pinned:
            if self._quiescing:
                message = "%d requests have not ended and hold guest memory: the connection is closed"
                self._guest_log.log(log, logging.ERROR, message, busy)
                self._drop()
            return
        self._budget.end(time.monotonic())
        # the time left may have been nothing, so a guest that resets in a loop gets here as often as its disk is slow
        message = "%d requests have not ended in the time that drains have: their memory is taken back"
        self._guest_log.log(log, logging.WARNING, message, busy)
        try:
            self._core.orphan()
        except OSError as error:
            log.error("%s: the connection is closed", error)
            self._drop()

    def _drop(self) -> None:
        if self._transport is not None:
            self._transport.drop()


def _serial(block: Block, options: ServerOptions) -> str:
    serial = options.serial
    if not serial and isinstance(block, SupportsIdentify) and Operation.IDENTIFY in operations(block):
        serial = block.identify()
    if not serial.isascii() or len(serial) > BLK_ID_BYTES:
        raise ConfigError(f"the serial {serial!r} must be ASCII and at most {BLK_ID_BYTES} characters")
    return serial


def _inode(path: Path) -> tuple[int, int] | None:
    """What tells a file from one that takes its place; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _zoning(block: Block) -> Zoning | None:
    return block.zoning() if isinstance(block, SupportsZones) and Operation.ZONES in operations(block) else None


def _clear_stale_socket(path: Path) -> None:
    """Remove a socket file that nobody listens on.  Raises: ConfigError if somebody does, or if it is no socket."""
    try:
        if not path.is_socket():
            if path.exists():
                raise ConfigError(f"{path} exists and is no socket: choose another --socket")
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
            result = probe.connect_ex(os.fsencode(path))
        if result == errno.ECONNREFUSED:
            path.unlink()
            log.info("replaced %s, which nobody listened on", path)
        elif result != errno.ENOENT:
            raise ConfigError(f"{path} is in use by another server: choose another --socket, or stop that one")
    except OSError as error:
        raise ConfigError(_why_not_bound(path, error)) from error


def _why_not_bound(path: Path, error: OSError) -> str:
    reasons = {
        errno.EADDRINUSE: "is in use by another server: choose another --socket",
        errno.EACCES: f"cannot be made: no permission on {path.parent}, choose a folder that you may write to",
        errno.EPERM: f"cannot be made: no permission on {path.parent}, choose a folder that you may write to",
        errno.EROFS: "cannot be made: its file system is read-only",
        errno.ENOENT: f"cannot be made: the folder {path.parent} does not exist",
        errno.ENOTDIR: f"cannot be made: {path.parent} is no folder",
        errno.ENAMETOOLONG: "is too long for a UNIX socket (107 bytes): choose a shorter --socket",
    }
    why = reasons.get(error.errno or 0, f"cannot be made: {error.strerror}")
    return f"the socket {path} {why}"
