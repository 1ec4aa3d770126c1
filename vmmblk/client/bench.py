"""As many requests as a device takes, with no guest: the work behind ``vmmblk bench``.

One thread for each queue runs the loop in csrc/bench.c, which lets go of the interpreter; the thread that called
:func:`run` watches them and the server.  Each queue has its own share of the disk, so no two of them write the same
block.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import functools
import mmap
import os
import select
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmmblk._core import ffi, lib
from vmmblk.client import wire
from vmmblk.client.connection import Connection
from vmmblk.client.doorbells import Kick
from vmmblk.client.driver import SUPPORTED, VirtioBlk
from vmmblk.client.errors import Impossible, ProtocolError
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.latency import Latencies
from vmmblk.client.memory import PAGE, GuestMemory
from vmmblk.spec import SECTOR_SIZE, BlkConfig, DeviceStatus, Feature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["Direction", "Impossible", "Kick", "Outcome", "Wait", "Workload", "run"]

_DESCRIPTORS = 3  # header, data, status
_LOOK_SECONDS = 0.1
_RING_ROOM = 2 << 20  # for the areas of the longest ring


class Wait(enum.Enum):
    """How completions are noticed."""

    POLL = "poll"
    INTERRUPT = "interrupt"


@dataclass(frozen=True, slots=True)
class Workload:
    """What is to be done; the lengths are bytes, the times seconds.

    Of a hundred requests ``read_percent`` are reads.  ``iodepth`` is per queue.  ``runtime`` and ``requests`` (of all
    queues together) both end it; one of them must be given.  ``size`` None is the rest of the disk.  ``timeout`` is
    how long one answer or completion may take.
    """

    read_percent: int = 100
    random: bool = True
    block_size: int = 4096
    iodepth: int = 32
    queues: int = 1
    runtime: float | None = None
    requests: int | None = None
    offset: int = 0
    size: int | None = None
    packed: bool = False
    kick: Kick = Kick.WRITE
    wait: Wait = Wait.POLL
    verify: bool = False
    seed: int = 1
    timeout: float = 5.0


@dataclass(frozen=True, slots=True)
class Direction:
    """What became of the reads, or of the writes."""

    requests: int = 0
    bytes: int = 0
    errors: int = 0
    latencies: Latencies = field(default_factory=Latencies)

    def __add__(self, other: Direction) -> Direction:
        """Both together."""
        return Direction(
            self.requests + other.requests,
            self.bytes + other.bytes,
            self.errors + other.errors,
            self.latencies + other.latencies,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was measured.

    ``seconds`` is from the first request to the last completion.  ``server_cpu`` is seconds of processor time that the
    server used, None if its process is not to be seen.  ``verified`` blocks were read back in the end; ``corrupt`` ones
    did not hold what was written, then or before.  ``problem`` says why it ended early: a line for the user, or None.
    """

    began: float
    seconds: float
    read: Direction
    write: Direction
    kicks: int
    interrupts: int
    verified: int
    corrupt: int
    indirect: bool
    server_cpu: float | None
    interrupted: bool
    problem: str | None

    @property
    def requests(self) -> int:
        """Of both directions."""
        return self.read.requests + self.write.requests

    @property
    def errors(self) -> int:
        """Requests that the device failed."""
        return self.read.errors + self.write.errors

    @property
    def cpu_us(self) -> float | None:
        """Microseconds of the server's processor time for each request, those of the verification included."""
        done = self.requests + self.verified
        return None if self.server_cpu is None or not done else self.server_cpu * 1e6 / done


def run(
    address: str | os.PathLike[str], workload: Workload, watch: Callable[[float, int], None] = lambda *_: None
) -> Outcome:
    """Do ``workload`` on the server at ``address``; ``watch`` is told now and then: seconds so far, requests so far.

    What is measured until Ctrl-C or until the server fails is an outcome, too.  Raises Impossible, and for what goes
    wrong before the first request OSError (TimeoutError, ConnectionError).
    """
    with contextlib.ExitStack() as stack:
        driver = stack.enter_context(_attached(address, workload))
        jobs = stack.enter_context(_jobs(driver, workload))
        server = _peer(driver.connection)
        cpu, began = _cpu_seconds(server), time.time()
        problem, interrupted = _Crew(driver, jobs).work(watch)
        spent = _difference(cpu, _cpu_seconds(server))
        return _outcome(jobs, began, spent, interrupted=interrupted, problem=problem)


# Getting ready.


@contextlib.contextmanager
def _attached(address: str | os.PathLike[str], workload: Workload) -> Iterator[VirtioBlk]:
    """The device, brought up as the workload wants it."""
    room = _slot_size(workload) * workload.iodepth + _RING_ROOM
    with contextlib.ExitStack() as stack:
        connection = stack.enter_context(Connection(address, workload.timeout))
        try:
            memory = stack.enter_context(GuestMemory(_RING_ROOM + room * workload.queues))
        except (OSError, OverflowError, ValueError) as exc:
            raise Impossible(f"no memory for this: {exc}; use a smaller --bs, --iodepth or --queues") from exc
        memory.map_all(connection)
        driver = stack.enter_context(contextlib.closing(_driver(connection, memory, workload)))
        _check_offer(driver.device.features, driver, workload)
        driver.init()
        _check_limits(driver, workload)
        yield driver


def _driver(connection: Connection, memory: GuestMemory, workload: Workload) -> VirtioBlk:
    features = SUPPORTED & ~(Feature.NOTIFICATION_DATA.mask | Feature.NOTIF_CONFIG_DATA.mask)
    if workload.packed:
        features |= Feature.RING_PACKED.mask
    interrupts = Interrupts.POLL if workload.wait is Wait.POLL else Interrupts.MSIX
    try:
        return VirtioBlk(
            connection,
            memory,
            features=features,
            queues=workload.queues,
            interrupts=interrupts,
            timeout=workload.timeout,
            kick=workload.kick,
            start=False,
        )
    except Impossible:
        raise
    except ValueError as exc:
        raise Impossible("the device has no MSI-X; use --wait poll") from exc


def _check_offer(offer: int, driver: VirtioBlk, workload: Workload) -> None:
    """What can be known before the device is brought up."""
    if workload.packed and not offer & Feature.RING_PACKED.mask:
        raise Impossible("the device does not offer packed rings; use --ring split")
    if workload.read_percent < 100 and offer & Feature.BLK_RO.mask:
        raise Impossible("the disk is read-only; use --rw read or randread")
    queues = driver.config(BlkConfig.NUM_QUEUES) if offer & Feature.BLK_MQ.mask else 1
    if workload.queues > queues:
        raise Impossible(f"the device has {queues} queue{'s' * (queues > 1)}; use --queues {queues} or less")


def _check_limits(driver: VirtioBlk, workload: Workload) -> None:
    size, block = workload.block_size, driver.block_size
    if size % block:
        raise Impossible(f"--bs {size} is not a multiple of the disk's block of {block} bytes; use --bs {block}")
    limit = driver.config(BlkConfig.SIZE_MAX) if driver.has(Feature.BLK_SIZE_MAX) else 0
    if 0 < limit < size:
        raise Impossible(f"the device takes at most {limit} bytes in one piece; use a smaller --bs")
    lines = [driver.lines.queue_line(index) for index in range(workload.queues)]
    if workload.wait is Wait.INTERRUPT and len(set(lines)) < len(lines):
        raise Impossible(f"the device has too few MSI-X vectors for {workload.queues} queues; use --wait poll")


def shares(workload: Workload, capacity: int) -> list[tuple[int, int]]:
    """Each queue's part of a disk of ``capacity`` bytes: first block, number of blocks.  Raises Impossible."""
    block = workload.block_size
    if workload.offset % block:
        raise Impossible(f"--offset {workload.offset} is not a multiple of --bs {block}; round it")
    size = capacity - workload.offset if workload.size is None else workload.size
    if size < 0 or workload.offset + size > capacity:
        raise Impossible(f"the disk ends at {capacity} bytes; use a smaller --offset and --size")
    blocks = size // block
    if blocks < workload.queues:
        raise Impossible(f"{size} bytes have no block of {block} for each queue; use a bigger --size or a smaller --bs")
    first, cuts = workload.offset // block, [blocks * i // workload.queues for i in range(workload.queues + 1)]
    return [(first + cuts[i], cuts[i + 1] - cuts[i]) for i in range(workload.queues)]


def is_indirect(iodepth: int, queue_size: int, *, negotiated: bool) -> bool:
    """Whether requests need indirect tables to fit into the ring; direct descriptors are faster.  Raises Impossible."""
    if iodepth * _DESCRIPTORS <= queue_size:
        return False
    if iodepth <= queue_size and negotiated:
        return True
    most = queue_size if negotiated else queue_size // _DESCRIPTORS
    raise Impossible(f"a queue of {queue_size} descriptors has room for {most} requests; use --iodepth {most} or less")


@dataclass(slots=True)
class _Job:
    """A queue's part; the C structures, and what they point to."""

    job: Any
    outcome: Any
    verification: Any
    progress: Any
    result: int = 0
    keep: tuple[object, ...] = ()

    def work(self, stop: Any, *, verify: bool) -> None:
        """Run the loop, then verify; the thread's whole life."""
        self.result = lib.vdrv_bench(self.job, self.outcome, stop, self.progress)
        if verify and not self.result:
            self.result = lib.vdrv_verify(self.job, self.verification, stop, ffi.new("uint64_t *"))

    @property
    def verify(self) -> bool:
        """Whether what is written is to be read back."""
        return bool(self.job.generations != ffi.NULL)


@contextlib.contextmanager
def _jobs(driver: VirtioBlk, workload: Workload) -> Iterator[list[_Job]]:
    """A job for each queue that has something to do."""
    parts = shares(workload, driver.capacity * SECTOR_SIZE)
    with contextlib.ExitStack() as stack:
        jobs = []
        for index, (first, blocks) in enumerate(parts):
            requests = None if workload.requests is None else _share(workload.requests, index, workload.queues)
            if requests != 0:
                job = _job(driver, workload, index, (first, blocks), requests or 0)
                _aim(job, driver, workload.kick, index)
                stack.callback(_let_go, job)
                jobs.append(job)
        yield jobs


def _let_go(job: _Job) -> None:
    """Drop what was kept, buffers before what they were made of."""
    for each in job.keep:
        if isinstance(each, mmap.mmap):
            each.close()
        else:
            ffi.release(each)


def _job(driver: VirtioBlk, workload: Workload, index: int, part: tuple[int, int], requests: int) -> _Job:
    queue, (first, blocks) = driver.queues[index], part
    depth = workload.iodepth
    memory = driver.memory.alloc(_slot_size(workload) * depth)
    keep: tuple[object, ...] = ()
    line = driver.lines.queue_line(index) if workload.wait is Wait.INTERRUPT else None
    job = ffi.new("struct vdrv_job *")
    setattr(job, "packed" if workload.packed else "split", queue.handle)
    job.memory = ffi.cast("uint8_t *", driver.memory.address(memory, _slot_size(workload) * depth))
    job.iova, job.depth, job.block_size = memory, depth, workload.block_size
    job.indirect = is_indirect(depth, queue.size, negotiated=driver.has(Feature.INDIRECT_DESC))
    job.first, job.blocks = first, blocks
    job.read_percent, job.random, job.seed = workload.read_percent, workload.random, workload.seed + index
    job.runtime_ns, job.requests = int((workload.runtime or 0) * 1e9), requests
    job.timeout_ns = int(workload.timeout * 1e9)
    job.interrupt_fd = -1 if line is None else line
    if workload.verify:
        table = mmap.mmap(-1, blocks * 4)  # pages of it exist once they are used
        buffer = ffi.from_buffer("uint32_t[]", table)
        job.generations, keep = buffer, (buffer, table)
    outcomes = (ffi.new("struct vdrv_outcome *"), ffi.new("struct vdrv_outcome *"))
    return _Job(job, *outcomes, ffi.new("uint64_t *"), keep=keep)


def _aim(job: _Job, driver: VirtioBlk, kick: Kick, index: int) -> None:
    """Tell the loop how this queue's doorbell is rung."""
    job.job.queue, job.job.socket, job.job.kick_fd = index, driver.connection.fileno(), -1
    offset = driver.doorbell_offset(index)
    if kick is Kick.MMAP:
        job.job.doorbell = ffi.cast("uint16_t *", driver.doorbells.address(offset))
    elif kick is Kick.EVENTFD:
        job.job.kick_fd = driver.doorbells.eventfd(offset)
    elif kick is Kick.WRITE:
        notify = driver.pci.notify
        payload = wire.encode_region_write(notify.bar, notify.offset + offset, index.to_bytes(2, "little"))
        message = wire.encode(0, wire.Command.REGION_WRITE, payload, wire.HeaderFlag.NO_REPLY)
        buffer = ffi.new("uint8_t[]", message)
        job.job.message, job.job.message_len = buffer, len(message)
        job.keep += (buffer,)


def _slot_size(workload: Workload) -> int:
    return PAGE + -(-workload.block_size // PAGE) * PAGE


def _share(total: int, index: int, parts: int) -> int:
    return total * (index + 1) // parts - total * index // parts


# Doing it.


_GONE = "the server ended, or closed the connection; its log should say why"


class _Crew:
    """The threads, and who watches them."""

    def __init__(self, driver: VirtioBlk, jobs: Sequence[_Job]) -> None:
        self._driver = driver
        self._jobs = jobs
        self._running = len(jobs)
        self._stop = ffi.new("int *")
        self._ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._interrupts = 0
        self._problem: str | None = None

    def work(self, watch: Callable[[float, int], None]) -> tuple[str | None, bool]:
        """Run the jobs to their end: what went wrong, and whether Ctrl-C ended them."""
        threads = [threading.Thread(target=self._one, args=(job,), name="bench") for job in self._jobs]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        poller = select.poll()
        for fd in (self._ended, self._driver.connection.fileno()):
            poller.register(fd, select.POLLIN)
        try:
            while self._running:
                with self._interruptible():
                    self._look(poller)
                    watch(time.monotonic() - began, sum(int(job.progress[0]) for job in self._jobs))
        finally:
            self._stop[0] = lib.VDRV_GIVE_UP
            for thread in threads:
                thread.join()
            os.close(self._ended)
        failures = [job.result for job in self._jobs if job.result not in (0, -errno.ECANCELED)]
        if self._problem is None and failures:
            self._problem = self._explain(-failures[0])
        return self._problem, self._interrupts > 0

    def _one(self, job: _Job) -> None:
        job.work(self._stop, verify=job.verify)
        if job.result:
            self._stop[0] = lib.VDRV_GIVE_UP  # the others wait in vain, too, or would measure something else
        os.eventfd_write(self._ended, 1)

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        """The first Ctrl-C lets the requests under way end, the second does not wait for them."""
        try:
            yield
        except KeyboardInterrupt:
            self._interrupts += 1
            self._stop[0] = max(self._stop[0], lib.VDRV_STOP if self._interrupts == 1 else lib.VDRV_GIVE_UP)

    def _look(self, poller: select.poll) -> None:
        """Wait a moment, for a thread that ends or for the server to say something, or to go."""
        for fd, _ in poller.poll(_LOOK_SECONDS * 1000):
            if fd == self._ended:
                self._running -= os.eventfd_read(self._ended)
                continue
            try:
                self._driver.connection.pump()
            except (OSError, ValueError) as exc:
                poller.unregister(fd)
                self._stop[0] = lib.VDRV_GIVE_UP
                gone = isinstance(exc, ConnectionError) and not isinstance(exc, ProtocolError)
                self._problem = _GONE if gone else str(exc)

    def _explain(self, error: int) -> str:
        if error == errno.ETIMEDOUT and _needs_reset(self._driver):
            return "the device needs a reset: it gave up serving its queues; its log should say why"
        if error == errno.ETIMEDOUT:
            seconds = self._driver.timeout
            return f"the device did not complete a request within {seconds:g} s; see its log, or raise --timeout"
        if error == errno.EPROTO:
            return "the device returned a request that it was not given; check it with vmmblk conform"
        if error in (errno.EPIPE, errno.ECONNRESET):
            return _GONE
        return f"it cannot go on: {os.strerror(error)}"


def _needs_reset(driver: VirtioBlk) -> bool:
    driver.connection.timeout = min(driver.connection.timeout, 1.0)
    try:
        return DeviceStatus.NEEDS_RESET in driver.status
    except (OSError, ValueError):
        return False


# What came of it.


def _outcome(
    jobs: Sequence[_Job], began: float, server_cpu: float | None, *, interrupted: bool, problem: str | None
) -> Outcome:
    outcomes, checks = [job.outcome for job in jobs], [job.verification for job in jobs]
    unreadable = sum(each.read.errors for each in checks)
    if problem is None and unreadable:
        problem = f"{unreadable} blocks that were written could not be read back; see the server's log"
    return Outcome(
        began=began,
        seconds=max((each.elapsed_ns for each in outcomes), default=0) / 1e9,
        read=functools.reduce(Direction.__add__, (_direction(each.read) for each in outcomes), Direction()),
        write=functools.reduce(Direction.__add__, (_direction(each.write) for each in outcomes), Direction()),
        kicks=sum(each.kicks for each in outcomes),
        interrupts=sum(each.interrupts for each in outcomes),
        verified=sum(each.read.requests for each in checks),
        corrupt=sum(each.corrupt for each in (*outcomes, *checks)),
        indirect=any(job.job.indirect for job in jobs),
        server_cpu=server_cpu,
        interrupted=interrupted,
        problem=problem,
    )


def _direction(counted: Any) -> Direction:
    buckets = {index: number for index, number in enumerate(ffi.unpack(counted.buckets, lib.VDRV_BUCKETS)) if number}
    latencies = Latencies(counted.min_ns, counted.max_ns, counted.sum_ns, buckets)
    return Direction(counted.requests, counted.bytes, counted.errors, latencies)


def _peer(connection: Connection) -> int:
    """The process at the other end of the socket; 0 if it is not to be known, or this one."""
    with socket.socket(fileno=os.dup(connection.fileno())) as copy:
        credentials = copy.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    (pid,) = struct.unpack_from("i", credentials)
    return 0 if pid == os.getpid() else int(pid)


def _cpu_seconds(pid: int) -> float | None:
    """The processor time that a process has used, its threads included."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() if pid > 0 else []
    except OSError:
        return None
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK") if fields else None


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before
