"""Serves virtqueues from a block: pop, parse, await the block, complete.

The worker has an event loop in a thread of its own, apart from the transport: a disk that sleeps, waits or computes
delays requests but never a register.  Each request is a task.  Nothing is ever cancelled: a request that was submitted
to a block runs to its end, and draining waits for it.

It knows rings, memory views and a block, and nothing of the transport; what it has to say about a ring that failed goes
to a :class:`Supervisor`, from the worker's thread.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import logging
import mmap
import os
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, cast

from vmmblk.block import (
    Block,
    Buffers,
    Lifetime,
    Operation,
    SupportsDiscard,
    SupportsFlush,
    SupportsLifetime,
    SupportsSecureErase,
    SupportsSubmit,
    SupportsUnchecked,
    SupportsWriteZeroes,
    SupportsZones,
    Transfer,
    Zone,
    operations,
)
from vmmblk.budget import LogBudget, Patience, Room
from vmmblk.errors import BadRequest, BlockError, Unimplemented, status_of
from vmmblk.request import (
    Discard,
    Flush,
    GetId,
    GetLifetime,
    Limits,
    Read,
    Request,
    SecureErase,
    SegmentLimits,
    Write,
    WriteZeroes,
    ZoneAppend,
    ZoneCommand,
    ZoneReport,
    parse,
    parse_ranges,
)
from vmmblk.ring import PLAIN_READ, Chain, Plain, Queue, RingFailure, ending, endings
from vmmblk.spec import (
    BLK_ID_BYTES,
    LIFETIME,
    SECTOR_SIZE,
    ZONE_APPEND_SECTOR,
    ZONE_DESCRIPTOR,
    ZONE_REPORT_HEADER,
    Feature,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from typing import Any

    Call = Callable[[int, Buffers], Awaitable[None] | None]

    from vmmblk.engine import Engine

from vmmblk.tasks import Starter

__all__ = ["Supervisor", "Worker"]

log = logging.getLogger("vmmblk.worker")

_BOUNCE_CHUNK = 1 << 20  # bytes of a bounced request that are in private memory at a time
_BOUNCE_ROOM = 32 << 20  # bytes of private memory, of all requests; one alone may take more
_LOOK_NS = 250_000  # of looking for more between turns of the event loop
_REPORT_ZONES = 16384  # zones told of in one request: 1 MiB

# What a call may end with.  All but the errors of the contract are bugs in a disk: nobody cancels a task here, so
# CancelledError is one as well, and a disk that exits must not take the event loop with it.
_FAILURES = (Exception, asyncio.CancelledError, SystemExit)

_OK = Status.OK  # looked up once: it is needed for each request

Outcome = tuple[Status, int]
"""Status, and how many leading bytes of the device-writable data were written."""


class Supervisor(Protocol):
    """Who is told when a ring fails; called from the worker's thread."""

    def ring_failed(self, queue: Queue, start: int, error: RingFailure) -> None:
        """``queue``, in its ``start``-th life, can be served no more."""

    def memory_not_shared(self) -> None:
        """Guest memory seems not to be shared with us."""


class InOrder:
    """Holds the completions of one queue back until all chains that were taken before have ended (IN_ORDER)."""

    def __init__(self) -> None:
        self.taken: collections.deque[int] = collections.deque()
        """The tokens of the chains that were taken and not completed; those that are never put here need not wait."""
        self._ended: dict[int, bytes] = {}

    def end(self, ended: bytes) -> bytes:
        """Chains have ended: the endings of those that can be completed now, in order."""
        if not self.taken:
            return ended
        for each in endings(ended):
            self._ended[each[0]] = ending(*each)
        ready = b""
        while self.taken and self.taken[0] in self._ended:
            ready += self._ended.pop(self.taken.popleft())
        return ready


class Worker:
    """Serves ``queues`` from ``block``, which must be asynchronous and checked (``filters.prepare``).

    With an ``engine`` for these queues it serves what that hands over, and starts and stops it.  ``serial`` is what
    GET_ID answers: ASCII, at most 20 characters.
    """

    def __init__(
        self,
        block: Block,
        queues: Sequence[Queue],
        serial: str,
        supervisor: Supervisor,
        *,
        engine: Engine | None = None,
        patience: Patience | None = None,
    ) -> None:
        self._block = block
        self._disk = block.unchecked() if isinstance(block, SupportsUnchecked) else block
        self._engine = engine
        self._patience = patience or Patience(0, adaptive=False)
        self._queues = queues
        self._serial = serial.encode("ascii")[:BLK_ID_BYTES].ljust(BLK_ID_BYTES, b"\0")
        self._supervisor = supervisor
        self._flushable = block if isinstance(block, SupportsFlush) and Operation.FLUSH in operations(block) else None
        self._sector_size = block.info.sector_size
        self._bounces_all = block.bounce
        self._address_mask = block.buffer_alignment - 1
        self._length_mask = (self._sector_size - 1) | self._address_mask
        self._write_cache = False
        self._flush_due = False
        self._flushing = False
        self._limits = Limits(0)
        self._done: dict[int, bytearray] = {queue.index: bytearray() for queue in queues}
        self._in_order = {queue.index: InOrder() for queue in queues}
        self._batching = False
        self._starter: Starter
        self._failed: dict[int, int] = {}  # by queue, the life in which its ring failed
        self._submittable = (
            self._disk if isinstance(self._disk, SupportsSubmit) and Operation.SUBMIT in operations(block) else None
        )
        self._looking = False
        self._watched: set[Queue] = set()  # while looking: their doorbells may be off
        self._found = self._slept_since = 0  # when, in nanoseconds
        self._bug_log = LogBudget()
        self._failure_log = LogBudget(burst=1, seconds=60.0)
        self._loop: asyncio.AbstractEventLoop
        self._stop = asyncio.Event()
        self._zoned = block if isinstance(block, SupportsZones) and Operation.ZONES in operations(block) else None
        self._scale = self._sector_size // SECTOR_SIZE
        self._set_terms()
        self._private = Room(_BOUNCE_ROOM)
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self.failed: BaseException | None = None
        """What ended the worker before its time."""

    def start(self) -> None:
        """Begin to serve."""
        self._loop = asyncio.new_event_loop()
        self._starter = Starter(self._loop)
        self._thread.start()
        if self._engine is not None:
            self._engine.start()

    def configure(self, limits: Limits) -> None:
        """What requests are held against from now on.  From any thread, before the queues start."""
        self._limits = limits
        if self._engine is not None:  # it completes what it serves at once, whatever else is under way
            self._engine.enable(not limits.features & Feature.IN_ORDER.mask)
            self._engine.limit(
                _if_negotiated(limits, Feature.BLK_DISCARD, limits.discard),
                _if_negotiated(limits, Feature.BLK_WRITE_ZEROES, limits.write_zeroes),
            )

    def grown(self) -> None:
        """The block has become bigger.  From any thread."""
        self._set_terms()
        if self._engine is not None:
            self._engine.resize(self._block.info.size_bytes)

    def _set_terms(self) -> None:
        info = self._block.info
        plainly = self._zoned is None and not self._bounces_all
        for queue in self._queues:
            queue.set_terms(
                sector_size=info.sector_size,
                sectors=info.size_sectors if plainly else 0,
                alignment=self._block.buffer_alignment,
                writable=info.read_write,
            )

    def set_write_cache(self, on: bool) -> None:
        """Whether completed writes may be volatile until the next flush.  From any thread.

        Turning it off flushes: a driver that sees write-through may never send a flush for what it wrote before.
        """
        ends = self._write_cache and not on
        self._write_cache = on  # before the flush: it must cover all that was cached
        if self._engine is not None:
            self._engine.set_write_cache(on and self._flushable is not None)
        if ends and not self._flush_due and self._flushable is not None:
            self._flush_due = True  # a guest may switch as often as it likes: one flush runs, one more may wait
            with contextlib.suppress(RuntimeError):  # the worker has ended, and flushed
                self._loop.call_soon_threadsafe(self._flush_soon)

    def stop(self, timeout: float) -> bool:
        """Wait for what is in flight, flush, disconnect the block, end the thread.

        The queues must have been paused.  False if that has not happened within ``timeout`` seconds.
        """
        until = time.monotonic() + timeout
        if self._engine is not None:  # first: what it hands over is still answered
            self._engine.stop()
            if not self._engine.join(timeout):
                return False
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # the loop has just ended by itself
                self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(max(until - time.monotonic(), 0.0))
        return not self._thread.is_alive()

    # -- the thread

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._main())
        except BaseException as error:
            log.exception("the worker failed")
            self.failed = error
        finally:
            self._loop.close()

    async def _main(self) -> None:
        for queue in self._queues:
            self._loop.add_reader(queue.ready_fd, self._kicked, queue)
            if self._engine is None:
                self._loop.add_reader(queue.bell.heard_fd, self._rung, queue)
                if queue.timer_fd >= 0:
                    self._loop.add_reader(queue.timer_fd, queue.tell)
        if self._patience.endless:  # not every driver rings
            self._begin_to_look()
        await self._stop.wait()
        for queue in self._queues:
            self._loop.remove_reader(queue.ready_fd)
            self._loop.remove_reader(queue.bell.heard_fd)
            if queue.timer_fd >= 0:
                self._loop.remove_reader(queue.timer_fd)
        rest = self._loop.create_future()
        self._loop.call_soon(self._serve_rest, rest)
        await rest
        while self._starter.waiting:
            await asyncio.wait(self._starter.waiting)
        await asyncio.sleep(0)  # completions of the last tasks are sent in a turn of their own
        self._starter.close()
        await self._flush_quietly()
        await _attempt("disconnecting", self._block.disconnect)

    def _flush_soon(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._starter.begin(iter([self._flush_while_due()]))  # before any write that the driver makes from now on

    async def _flush_while_due(self) -> None:
        while self._flush_due:
            self._flush_due = False
            await self._flush_quietly()
        self._flushing = False

    async def _flush_quietly(self) -> None:
        if self._flushable is not None:
            await _attempt("flushing", self._flushable.flush)

    # -- a queue

    def _kicked(self, queue: Queue) -> None:
        life = queue.life
        self._woken(queue, life if queue.clear_kick() else None)

    def _rung(self, queue: Queue) -> None:
        life = queue.life
        self._woken(queue, life if queue.bell.clear() else None)

    def _woken(self, queue: Queue, rung_in: int | None) -> None:
        if not self._looking:
            self._patience.slept(time.monotonic_ns() - self._slept_since)
        self._serve(queue, rung_in)

    def _serve(self, queue: Queue, rung_in: int | None = None) -> None:
        """Serve what there is; ``rung_in`` is the life of the queue in which its doorbell was heard, if it was."""
        count = self._serve_some(queue, arm=not self._looking)
        if rung_in is not None and not count and queue.looks_unshared and queue.life == rung_in:
            self._supervisor.memory_not_shared()
        if self._looking:
            self._watched.add(queue)
        elif count and self._patience.window:
            self._watched.add(queue)
            self._begin_to_look()
        elif count == queue.BATCH:
            self._loop.call_soon(self._serve, queue)
        else:
            self._slept_since = time.monotonic_ns()

    def _serve_rest(self, served: asyncio.Future[None]) -> None:
        """What an engine has handed over before the queues were paused."""
        if sum([self._serve_some(queue) for queue in self._queues]):
            self._loop.call_soon(self._serve_rest, served)
        else:
            served.set_result(None)

    def _serve_some(self, queue: Queue, *, arm: bool = True) -> int:
        """Take a batch of chains and begin with them; how many they are."""
        start = queue.starts
        if self._failed.get(queue.index) == start:
            return 0
        try:
            count = queue.take(arm=arm)
        except RingFailure as error:
            self._failed[queue.index] = start
            self._supervisor.ring_failed(queue, start, error)
            return 0
        if self._limits.features & Feature.IN_ORDER.mask:
            self._in_order[queue.index].taken.extend(queue.tokens(count))
        if count:
            self._serve_batch(queue, count)
        return count

    def _begin_to_look(self) -> None:
        self._looking = True
        self._found = time.monotonic_ns()
        self._loop.call_soon(self._look_on)

    def _look_on(self) -> None:
        """Look for more before the doorbells are armed and the thread sleeps; now and then the loop turns.

        Only requests that do not wait let it stay here: for the others the loop is needed.
        """
        until = time.monotonic_ns() + _LOOK_NS
        if self._patience.endless:
            self._watched.update(queue for queue in self._queues if queue.starts)
        while not self._stop.is_set():
            found = sum([self._serve_some(queue, arm=False) for queue in self._watched])
            now = time.monotonic_ns()
            if found:
                self._found = now
            elif now - self._found > self._patience.window:
                break
            if now > until or self._starter.waiting:
                self._loop.call_soon(self._look_on)
                return
            if not found:
                os.sched_yield()  # the driver may be waiting for this very processor
        self._looking = False
        watched, self._watched = self._watched, set()
        for queue in watched:
            self._serve(queue)

    def _serve_batch(self, queue: Queue, count: int) -> None:
        """Begin with every request; those that end without having waited are completed together, at once."""
        self._batching = True
        try:
            self._starter.begin(self._begun(queue, count))
        finally:
            self._batching = False
            if self._done[queue.index]:
                self._send(queue)

    def _begun(self, queue: Queue, count: int) -> Iterator[Coroutine[Any, None, None]]:
        plain, others = queue.plain(count)
        for index in others:
            yield self._serve_chain(queue, queue.chain(index))
        if plain and self._submittable is not None:
            yield self._submit(queue, plain, self._submittable)
        else:
            plain.reverse()
            while plain:
                yield self._serve_plain(queue, plain)

    async def _submit(self, queue: Queue, plain: list[Plain], disk: SupportsSubmit) -> None:
        """The disk gets all reads and writes at once."""
        aliases = queue.aliases
        cached = self._caches
        transfers = [
            Transfer(False, False, sector, [aliases[alias].writable[start:end]])  # noqa: FBT003 - keywords take longer
            if kind == PLAIN_READ
            else Transfer(True, cached, sector, [aliases[alias].readable[start:end]])  # noqa: FBT003
            for _, kind, alias, _, sector, start, end in plain
        ]
        ended = queue.good(len(plain))
        failure: BaseException | None = None
        try:
            await _finished(disk.submit(list(transfers)))  # a disk may sort its own
        except _FAILURES as raised:
            failure = raised
        if failure is not None or [each for each in transfers if each.error is not None]:
            ended = self._judge_all(plain, transfers, failure)
        self._complete(queue, ended)

    def _judge_all(self, plain: list[Plain], transfers: list[Transfer], failure: BaseException | None) -> bytes:
        ended = b""
        for (token, _, _, written, *_), transfer in zip(plain, transfers, strict=True):
            failed = failure if transfer.error is None else transfer.error
            ended += ending(token, _OK, written) if failed is None else ending(token, self._judge(failed), 0)
        return ended

    async def _serve_plain(self, queue: Queue, plain: list[Plain]) -> None:
        """Serve what is left, from the end on; once one waits, somebody else goes on with the rest."""
        aliases, read, write = queue.aliases, self._disk.read, self._writer(self._disk)
        cancelling = cast("asyncio.Task[None]", asyncio.current_task()).cancelling
        while plain:
            token, kind, alias, written, sector, start, end = plain.pop()
            status = _OK
            try:
                if kind == PLAIN_READ:
                    pending = read(sector, [aliases[alias].writable[start:end]])
                else:
                    pending = write(sector, [aliases[alias].readable[start:end]])
                if pending is not None:
                    await pending
            except _FAILURES as failure:
                status, written = self._judge(failure), 0
            self._complete(queue, ending(token, status, written))
            if cancelling():  # it cancelled itself, which must not befall another
                return

    @property
    def _caches(self) -> bool:
        return self._write_cache and self._flushable is not None

    def _writer(self, disk: Block) -> Call:
        return cast("SupportsFlush", disk).write_cached if self._caches else disk.write

    async def _serve_chain(self, queue: Queue, chain: Chain) -> None:
        try:
            status, written = await self._answer(chain)
        except _FAILURES as failure:
            status, written = self._judge(failure), 0
        self._complete(queue, ending(chain.token, status, written))

    def _judge(self, failure: BaseException) -> Status:
        if isinstance(failure, (BadRequest, BlockError, OSError)):  # the guest or the disk: quiet
            log.debug("a request failed: %s", failure)
            if isinstance(failure, OSError):
                message = "the disk fails: %s; the guest gets I/O errors until that is mended"
                self._failure_log.log(log, logging.WARNING, message, failure)
            return self._status_of(failure)
        self._report_bug(failure)
        return status_of(failure)

    def _status_of(self, error: BaseException) -> Status:
        status = status_of(error)
        # a driver that did not take ZONED, as on a host-aware disk, knows nothing of its statuses
        known = status <= Status.UNSUPP or self._limits.features & Feature.BLK_ZONED.mask
        return status if known else Status.IOERR

    def _report_bug(self, error: BaseException) -> None:
        message = "the disk raised %s; the guest gets an I/O error"
        self._bug_log.log(log, logging.ERROR, message, type(error).__name__, cause=error)

    def _complete(self, queue: Queue, ended: bytes) -> None:
        # what ends in one turn of the loop is sent together: one used index, one interrupt
        done, in_order = self._done[queue.index], self._in_order[queue.index]
        if in_order.taken:
            ended = in_order.end(ended)
        if ended and not done and not self._batching:
            self._loop.call_soon(self._send, queue)
        done += ended

    def _send(self, queue: Queue) -> None:
        done, self._done[queue.index] = self._done[queue.index], bytearray()
        queue.complete(done)

    # -- a request

    async def _answer(self, chain: Chain) -> Outcome:
        if not chain.answerable:
            return Status.OK, 0  # there is no byte to say anything in; the chain goes back untouched
        if not chain.reachable:
            if chain.without_fd:
                self._supervisor.memory_not_shared()
            raise BadRequest(Status.IOERR, "part of the request lies outside the guest memory that can be reached")
        request = parse(chain.header, chain.readable, chain.writable, self._limits)
        if chain.error:
            raise self._engine_failed(chain.error, write=isinstance(request, Write))
        if isinstance(request, Read):
            await self._transfer(self._block.read, request.sector, chain.views_out, chain, fill=True)
            return Status.OK, request.length
        if isinstance(request, Write):
            await self._transfer(self._writer(self._block), request.sector, chain.views_in, chain, fill=False)
            return Status.OK, 0
        return await self._answer_rare(request, chain)

    def _engine_failed(self, number: int, *, write: bool) -> OSError:
        error = OSError(number, os.strerror(number))
        if write and self._engine is not None:
            self._engine.write_failed(error)
        return error

    async def _answer_rare(self, request: Request, chain: Chain) -> Outcome:
        if isinstance(request, Flush):
            # without write-back every completed write is persisted already
            if self._flushable is not None:
                await _finished(self._flushable.flush())
            return Status.OK, 0
        if isinstance(request, GetId):
            _scatter(self._serial[: request.length], chain.views_out)
            return Status.OK, request.length
        if isinstance(request, Discard):
            await self._discard(chain)
        elif isinstance(request, WriteZeroes):
            await self._write_zeroes(chain)
        elif isinstance(request, SecureErase):
            await self._secure_erase(chain)
        elif isinstance(request, GetLifetime):
            return await self._get_lifetime(chain)
        elif isinstance(request, ZoneReport):
            return await self._zone_report(request, chain)
        elif isinstance(request, ZoneAppend):
            return await self._zone_append(request, chain)
        elif isinstance(request, ZoneCommand):
            await self._zone_command(request)
        return Status.OK, 0

    async def _discard(self, chain: Chain) -> None:
        ranges = self._ranges(RequestType.DISCARD, chain)
        if isinstance(self._block, SupportsDiscard):
            for sector, sectors, _ in ranges:
                await _finished(self._block.discard(sector, sectors))

    async def _write_zeroes(self, chain: Chain) -> None:
        ranges = self._ranges(RequestType.WRITE_ZEROES, chain)
        if isinstance(self._block, SupportsWriteZeroes):
            for sector, sectors, unmap in ranges:
                await _finished(self._block.write_zeroes(sector, sectors, unmap))

    async def _secure_erase(self, chain: Chain) -> None:
        ranges = self._ranges(RequestType.SECURE_ERASE, chain)
        if isinstance(self._block, SupportsSecureErase):
            for sector, sectors, _ in ranges:
                await _finished(self._block.secure_erase(sector, sectors))

    async def _get_lifetime(self, chain: Chain) -> Outcome:
        worn = self._block.lifetime() if isinstance(self._block, SupportsLifetime) else Lifetime()
        worn = worn if isinstance(worn, Lifetime) else await worn
        _scatter(LIFETIME.pack(worn.pre_eol_info, worn.typ_a, worn.typ_b), chain.views_out)
        return Status.OK, LIFETIME.size

    async def _zone_report(self, request: ZoneReport, chain: Chain) -> Outcome:
        count = min(request.zones, _REPORT_ZONES)
        found = self._zones.report_zones(request.sector // self._scale, count)
        zones = found if isinstance(found, Sequence) else await found
        descriptors = b"".join(_describe_zone(zone, self._scale) for zone in zones[:count])
        report = ZONE_REPORT_HEADER.pack(len(descriptors) // ZONE_DESCRIPTOR.size) + descriptors
        _scatter(report, chain.views_out)
        return Status.OK, len(report)

    async def _zone_append(self, request: ZoneAppend, chain: Chain) -> Outcome:
        zone = request.sector // self._scale
        if self._fits(chain.views_in, chain.addresses):
            placed = self._zones.append(zone, chain.views_in)
            sector = placed if isinstance(placed, int) else await placed
        else:
            async with self._private.take(sum(map(len, chain.views_in))):
                copy = _private_copy(chain.views_in)
                placed = self._zones.append(zone, [copy] if copy else [])
                sector = placed if isinstance(placed, int) else await placed
        _scatter(ZONE_APPEND_SECTOR.pack(sector * self._scale), chain.views_out)
        return Status.OK, ZONE_APPEND_SECTOR.size

    async def _zone_command(self, request: ZoneCommand) -> None:
        if request.type is RequestType.ZONE_RESET_ALL:
            await _finished(self._zones.reset_all_zones())
            return
        call = {
            RequestType.ZONE_OPEN: self._zones.open_zone,
            RequestType.ZONE_CLOSE: self._zones.close_zone,
            RequestType.ZONE_FINISH: self._zones.finish_zone,
            RequestType.ZONE_RESET: self._zones.reset_zone,
        }[request.type]
        await _finished(call(request.sector // self._scale))

    @property
    def _zones(self) -> SupportsZones:
        if self._zoned is None:
            raise Unimplemented("this disk has no zones")
        return self._zoned

    def _ranges(self, kind: RequestType, chain: Chain) -> list[tuple[int, int, bool]]:
        # the payload is copied once, then validated as a whole: the guest may be changing it
        payload = b"".join(chain.views_in)
        limits = dataclasses.replace(self._limits, capacity=self._block.info.size_bytes // SECTOR_SIZE)
        ranges = parse_ranges(kind, payload, limits)
        return [(r.sector // self._scale, r.sectors // self._scale, r.unmap) for r in ranges]

    async def _transfer(
        self,
        call: Callable[[int, Buffers], Awaitable[None] | None],
        sector512: int,
        views: list[memoryview],
        chain: Chain,
        *,
        fill: bool,
    ) -> None:
        sector = sector512 * SECTOR_SIZE // self._sector_size
        if self._fits(views, chain.addresses):
            await _finished(call(sector, views))
        else:
            await self._bounce(call, sector, views, fill=fill)

    def _fits(self, views: list[memoryview], addresses: int) -> bool:
        if self._bounces_all or addresses & self._address_mask:
            return False
        mask = self._length_mask
        return not any(len(view) & mask for view in views)

    async def _bounce(
        self,
        call: Callable[[int, Buffers], Awaitable[None] | None],
        sector: int,
        views: list[memoryview],
        *,
        fill: bool,
    ) -> None:
        # the range is checked before the first piece, so that a request is refused whole
        length = sum(map(len, views))
        if sector * self._sector_size + length > self._block.info.size_bytes:
            raise BadRequest(Status.IOERR, "the request reaches past the end of the disk")
        # a write to a zone is one write or none, so it cannot be cut into pieces
        chunk = _BOUNCE_CHUNK if self._zoned is None else max(length, 1)
        async with self._private.take(min(chunk, length)):
            for piece in _pieces(views, chunk):
                size = sum(map(len, piece))
                buffer = memoryview(mmap.mmap(-1, size))  # page-aligned; freed with the last view of it
                if not fill:
                    _gather(piece, buffer)
                await _finished(call(sector, [buffer]))
                if fill:
                    _scatter(buffer, piece)
                sector += size // self._sector_size


def _if_negotiated(limits: Limits, feature: Feature, allowed: SegmentLimits) -> tuple[int, int]:
    return (allowed.max_sectors, allowed.max_seg) if limits.features & feature.mask else (0, 0)


async def _attempt(what: str, call: Callable[[], Awaitable[None] | None]) -> None:
    """Make a call of the disk that no request waits for; whatever it raises is only logged."""
    try:
        await _finished(call())
    except (BlockError, OSError) as error:
        log.error("%s the disk failed: %s", what, error)
    except _FAILURES as error:
        log.error("%s the disk failed: it raised %s", what, type(error).__name__, exc_info=error)


async def _finished(pending: Awaitable[None] | None) -> None:
    if pending is not None:
        await pending


def _pieces(views: list[memoryview], size: int) -> Iterator[list[memoryview]]:
    """The views cut into lists of ``size`` bytes each, the last maybe shorter."""
    piece: list[memoryview] = []
    room = size
    for view in views:
        rest = view
        while len(rest) >= room:
            piece.append(rest[:room])
            yield piece
            rest, piece, room = rest[room:], [], size
        if len(rest):
            piece.append(rest)
            room -= len(rest)
    if piece:
        yield piece


def _scatter(data: bytes | memoryview, views: Sequence[memoryview]) -> None:
    at = 0
    for view in views:
        part = data[at : at + len(view)]
        view[: len(part)] = part
        at += len(part)


def _describe_zone(zone: Zone, scale: int) -> bytes:
    return ZONE_DESCRIPTOR.pack(
        zone.capacity * scale, zone.start * scale, zone.write_pointer * scale, zone.type, zone.state
    )


def _private_copy(views: Sequence[memoryview]) -> memoryview:
    buffer = memoryview(mmap.mmap(-1, max(sum(map(len, views)), 1)))[: sum(map(len, views))]
    _gather(views, buffer)
    return buffer


def _gather(views: Sequence[memoryview], buffer: memoryview) -> None:
    at = 0
    for view in views:
        buffer[at : at + len(view)] = view
        at += len(view)
