"""A driver that does anything at any moment, right and wrong, held against a model of what must come of it.

Each example is a server, a disk, and a sequence of moves: requests of every kind, chains that break rules, register
accesses of any width anywhere, resets of each kind, suspending, memory that comes and goes, a disk that stalls, a VMM
that dies.  The model knows what each sector may hold, which requests are outstanding, what the status must read, and
when nothing can be foretold any more: after a write to any register at all, until the next reset.
"""

from __future__ import annotations

import contextlib
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pytest
from conftest import STOP_SECONDS, Served, until
from contents import SECTOR, Access, Contents, check_flush, check_read
from disks import FullDisk
from fuzzing import effort
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from registers import WIDTHS

from vmmblk.client.connection import Connection
from vmmblk.client.driver import SUPPORTED, VirtioBlk
from vmmblk.client.errors import QueueFull, RemoteError
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.memory import PAGE, GuestMemory, Range
from vmmblk.client.queue import Descriptor, SplitQueue
from vmmblk.client.request import UNSET_STATUS, Request
from vmmblk.client.wire import Region
from vmmblk.filters import prepare
from vmmblk.server import Server, ServerOptions
from vmmblk.spec import (
    BLK_ID_BYTES,
    COMMON_CFG_SIZE,
    DISCARD_SEGMENT,
    REQUEST_HEADER,
    BlkConfig,
    CommonCfg,
    DescFlag,
    DeviceStatus,
    Feature,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from collections.abc import Set as AbstractSet

    from conftest import Logs

    from vmmblk.client.request import Pending

SECTORS, SECTORS_MAX = 64, 96
QUEUES = 4
PATIENCE = 30.0
FAILED = {Status.IOERR, UNSET_STATUS}
"""How a request ends whose memory is not there: the place where that is told may be a part of it."""

RECORDS_MAX = 80
"""Lines that one example may leave in the log."""

NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT
COMMAND = 0x04
LIVE = DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FEATURES_OK | DeviceStatus.DRIVER_OK
SUSPENDED = LIVE & ~DeviceStatus.DRIVER_OK | DeviceStatus.SUSPEND
LAYOUT = (Range(0, 2 << 20), Range(1 << 32, 1 << 20))
END = sum(LAYOUT[1])
NOWHERE = 1 << 50
ALL = SUPPORTED | Feature.RING_PACKED.mask | Feature.IN_ORDER.mask
OPTIONAL = tuple(feature for feature in Feature if ALL & feature.mask and feature is not Feature.VERSION_1)
SWITCHES = dict.fromkeys(("in_order", "notification_data", "notif_config_data", "access_platform", "suspend"), True)
CALLS = frozenset({"read", "write", "write_cached", "flush", "discard", "write_zeroes"})


class Place(NamedTuple):
    """Which ring a request goes to, how it is cut into elements, and whether it is made available at once."""

    queue: int
    framing: Sequence[int] | None
    kick: bool


class Transfer(NamedTuple):
    """A write of sectors that ``tag`` tells apart, or, if that is 0, a read."""

    sector: int
    count: int
    tag: int


class Clearing(NamedTuple):
    """A write of zeroes or a discard: ranges of (sector, number of sectors)."""

    zeroes: bool
    ranges: list[tuple[int, int]]


class Poke(NamedTuple):
    """A register access: the method that makes it, and what it is to make of."""

    how: str
    number: int
    value: bytes


Batch = list[tuple[Place, Transfer | Clearing | int]]
ANYWHERE = Place(0, None, kick=True)


@dataclass(eq=False)
class Outstanding:
    """A request that the device has, how it may end, and what it does."""

    pending: Pending
    statuses: set[int]
    access: Access


# Chains of one's own making.  ``page`` holds a header at 0, of a read of sector 0, and has room for a status at 16.


def chain(page: int, *middle: Descriptor) -> list[Descriptor]:
    """A request with something between header and status."""
    return [Descriptor(page, 16, NEXT), *middle, Descriptor(page + 16, 1, WRITE)]


def data(address: int, length: int, flags: int = 0) -> Descriptor:
    """An element to read into."""
    return Descriptor(address, length, NEXT | WRITE | flags)


BENIGN: dict[str, tuple[Callable[[int], list[Descriptor]], int | None]] = {
    "a sector": (lambda page: chain(page, data(page + 512, SECTOR)), Status.OK),
    "nothing between": (lambda page: chain(page, data(page, 0), data(page + 512, SECTOR), data(page, 0)), Status.OK),
    "flags that mean nothing": (lambda page: chain(page, data(page + 512, SECTOR, 0x7F78)), Status.OK),
    "data nowhere": (lambda page: chain(page, data(NOWHERE, SECTOR)), Status.IOERR),
    "data over the end of memory": (lambda page: chain(page, data(END - 256, SECTOR)), Status.IOERR),
    "data between regions": (lambda page: chain(page, data(sum(LAYOUT[0]) - 256, SECTOR)), Status.IOERR),
    "data round the end": (lambda page: chain(page, data((1 << 64) - 256, SECTOR)), Status.IOERR),
    "4 GiB": (lambda page: chain(page, data(page + 512, 0xFFFFFFFF)), Status.IOERR),
    "half a sector": (lambda page: chain(page, data(page + 512, 256)), Status.IOERR),
    "half a header": (lambda page: [Descriptor(page, 8, NEXT), Descriptor(page + 16, 1, WRITE)], Status.IOERR),
    "a header nowhere": (lambda page: [Descriptor(NOWHERE, 16, NEXT), Descriptor(page + 16, 1, WRITE)], Status.IOERR),
    "no status": (lambda page: [Descriptor(page, 16)], None),
    "a status nowhere": (lambda page: [Descriptor(page, 16, NEXT), Descriptor(NOWHERE, 1, WRITE)], None),
    "empty elements only": (lambda page: [Descriptor(page, 0, NEXT), Descriptor(page, 0, WRITE)], None),
}
"""Chains that are no reason to give up, and the status that each is to get; None where there is nowhere to say it."""

CORRUPT: dict[str, Callable[[int], list[Descriptor]]] = {
    "readable after writable": lambda page: [Descriptor(page + 512, 512, NEXT | WRITE), Descriptor(page, 16)],
    "a table of nothing": lambda page: [Descriptor(page, 0, INDIRECT)],
    "a table and a bit": lambda page: [Descriptor(page, 17, INDIRECT)],
    "a table nowhere": lambda _: [Descriptor(NOWHERE, 32, INDIRECT)],
    "a table and more": lambda page: [Descriptor(page, 32, INDIRECT | NEXT), Descriptor(page + 16, 1, WRITE)],
    "a table over the end of memory": lambda _: [Descriptor(END - 8, 32, INDIRECT)],
    "a list that goes on": lambda page: [Descriptor(page, 16, NEXT, 0xFFFF)],
}
"""Chains that no ring can hold."""


def self_loop(queue: SplitQueue, page: int) -> None:
    """A descriptor that follows itself."""
    (slot,) = queue.reserve(1)
    queue.write_descriptor(slot, Descriptor(page, 16, NEXT, slot))
    queue.offer(slot)
    queue.publish()


def bad_head(queue: SplitQueue, page: int) -> None:
    """A head that is no descriptor."""
    queue.offer(queue.size)
    queue.publish()


def leap(queue: SplitQueue, page: int) -> None:
    """The index goes further than the ring is long."""
    queue.avail_idx += queue.size + 1


def back(queue: SplitQueue, page: int) -> None:
    """The index goes back."""
    queue.avail_idx -= 1


SPLIT_CORRUPT = {each.__name__: each for each in (self_loop, bad_head, leap, back)}

# Where and what to write.

queues = st.sampled_from([0, 0, 0, 0, 1, 2, 3])
sectors = st.integers(0, SECTORS + 4)
few = st.integers(1, 8)
transfers = st.builds(Transfer, sectors, few, st.just(0) | st.integers(1, 255))
clearings = st.builds(Clearing, st.booleans(), st.lists(st.tuples(sectors, few), min_size=1, max_size=3))
others = st.sampled_from([RequestType.FLUSH] * 3 + [8, 9, 10, 14, 15, 16, 24, 1 << 31, 0xFFFFFFFF])
cuts = st.integers(0, 255).map(lambda page: page * PAGE)
places = st.builds(
    Place, queues, st.none() | st.lists(st.integers(1, 700), max_size=5), st.sampled_from([True, True, True, False])
)
offsets = st.integers(0, 0x40) | st.integers(0, 0x3FFF) | st.sampled_from([0x1000, 0x2000, 0x2020, 0x3000, 0xFFFFFFFF])
values = st.binary(min_size=1, max_size=8) | st.sampled_from(
    [b"\0", b"\1", b"\x04", b"\x10", b"\x40", b"\x80", b"\0\0", b"\1\0", b"\xff\xff", bytes(4), b"\xff" * 8, bytes(64)]
)
regions = st.sampled_from([4, 4, 4, 4, 1, 2, 7, 7, 0, 3, 5, 6, 8, 9])
batches = st.lists(st.tuples(places, st.one_of(transfers, transfers, clearings, others)), min_size=1, max_size=8)
pokes = st.lists(
    st.builds(
        Poke,
        st.sampled_from(["kick", "doorbell", "read_anything", "write_config", "write_in_vain", "say_it_again"]),
        st.integers(0, 0x3FF) | st.integers(0, 0xFFFFFF),
        values,
    ),
    min_size=1,
    max_size=5,
)
stalls = st.just(CALLS) | st.sets(st.sampled_from(sorted(CALLS)), min_size=1, max_size=3)
INERT: tuple[tuple[CommonCfg, int], ...] = (
    (CommonCfg.DEVICE_FEATURE, 4),
    (CommonCfg.DRIVER_FEATURE, 4),
    (CommonCfg.NUM_QUEUES, 2),
    (CommonCfg.CONFIG_GENERATION, 1),
    (CommonCfg.QUEUE_SIZE, 2),
    (CommonCfg.QUEUE_NOTIFY_OFF, 2),
    (CommonCfg.QUEUE_DESC, 8),
    (CommonCfg.QUEUE_DRIVER, 8),
    (CommonCfg.QUEUE_DEVICE, 4),
    (CommonCfg.QUEUE_NOTIF_CONFIG_DATA, 2),
    (CommonCfg.ADMIN_QUEUE_INDEX, 2),
    (CommonCfg.ADMIN_QUEUE_NUM, 2),
)
"""Registers of a live device that take no value, those of an enabled queue among them, and their widths."""


class HostileDriver(RuleBasedStateMachine):
    """The driver, its VMM and the disk, which ``engine`` serves; ``logs`` is where the server's complaints go.

    The native engine does not stall: there only what it hands over does, which is everything with IN_ORDER.
    """

    def __init__(self, logs: Logs, engine: str) -> None:
        super().__init__()
        self.logs = logs
        self.records = len(logs.records)
        self.disk = FullDisk(SECTORS)
        self.disk.in_c = engine == "native"
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name, "s")
        options = ServerOptions(queues=QUEUES, queue_size=64, features=SWITCHES, engine=engine)
        self.server = Server(self.path, prepare(self.disk), options)
        assert self.server.engine == engine
        self.server.start()
        self.served = Served(self.server, self.path, self.disk)
        self.contents = Contents(bytes(self.disk.data))
        self.requests: list[Outstanding] = []
        self.v: VirtioBlk | None = None
        self.graves: list[tuple[Pending, list[bytes]]] = []
        self.calls: int | None = 0
        self.known = True  # otherwise nothing is foretold
        self.plug_in()

    # What the model knows.

    @property
    def held(self) -> bool:
        """The disk stalls."""
        return bool(self.disk.held)

    @property
    def all_mapped(self) -> bool:
        """Memory is there."""
        return all(self.mapped.values())

    @property
    def serving(self) -> bool:
        """What is made available is taken."""
        return self.status == LIVE and self.known and self.all_mapped and self.master

    @property
    def orderly(self) -> bool:
        """What is taken ends soon."""
        return self.serving and not self.held

    @property
    def rings(self) -> bool:
        """The driver has queues."""
        return self.v is not None and bool(self.v.queues)

    def driver(self) -> VirtioBlk:
        """The driver, which there is."""
        assert self.v is not None
        return self.v

    def bury(self, queue: int | None = None) -> None:
        """Nobody will learn how these requests end.  Their memory is kept, for from the reset on it is the driver's."""
        for request in list(self.requests):
            if queue in (None, request.pending.queue):
                self.contents.end(request.access, done=False)
                self.requests.remove(request)
                self.driver()._pending.pop((request.pending.queue, request.pending.head), None)
                self.graves.append((request.pending, []))

    def seal(self) -> None:
        """They have been reset: the device does not touch their memory any more."""
        for pending, pages in self.graves:
            if not pages:
                pages += [self.memory.read(iova, self.memory._taken[iova]) for iova in pending.allocations]

    def idle(self) -> None:
        """Nothing is under way any more."""
        until(lambda: not (self.server._core.orphans or self.server._core.busy), "requests do not end", PATIENCE)

    def dig(self) -> None:
        """It has not."""
        for pending, pages in self.graves:
            for iova, page in zip(pending.allocations, pages, strict=True):
                assert not self.known or self.memory.read(iova, len(page)) == page, "written to after a reset"
            pending.release(self.memory)
        self.graves.clear()

    def may_fail(self) -> None:
        """Memory may have been taken back from what is in flight, or may not be there when it is looked at."""
        for request in self.requests:
            request.statuses |= FAILED

    def clean(self) -> None:
        """The whole device has been reset: all is as at first, and if the disk is idle the model can be checked."""
        self.status = DeviceStatus(0)
        self.master = False
        if self.held:
            return  # orphans may live
        self.idle()
        self.dig()
        if self.known:
            self.contents.check(self.disk.data)
        self.contents = Contents(bytes(self.disk.data))
        self.known = True

    # A VMM's life.

    def plug_in(self) -> None:
        """A VMM connects, with memory."""
        self.memory = GuestMemory(sum(piece.size for piece in LAYOUT), LAYOUT)
        self.connection = Connection(self.path, PATIENCE)
        self.connection.dma_target = self.memory
        self.mapped: dict[Range, list[Range]] = {piece: [] for piece in LAYOUT}
        for piece in LAYOUT:
            self.map(piece, piece.size)
        self.page = self.memory.alloc(PAGE)
        self.status = DeviceStatus(0)
        self.master = False

    def pull_out(self) -> None:
        """The VMM is gone."""
        self.bury()
        self.graves.clear()
        if self.v is not None:
            self.v.close()
            self.v = None
        self.connection.close()
        self.memory.close()

    def map(self, piece: Range, cut: int) -> None:
        """Give the device a range, in two pieces."""
        for part in (Range(piece.iova, cut), Range(piece.iova + cut, piece.size - cut)):
            if part.size:
                self.memory.map(self.connection, *part)
                self.mapped[piece].append(part)

    def disconnect(self) -> None:
        """The VMM dies, and another takes its place."""
        if not self.held:
            self.idle()
            self.dig()
        self.pull_out()
        self.plug_in()
        self.clean()

    @initialize()
    def start_well(self) -> None:
        """Every example begins with a device that works, and an engine that serves it."""
        without = frozenset({Feature.IN_ORDER} if self.server.engine == "native" else {})
        self.initialise(without, QUEUES, 64, Interrupts.MSIX, None)

    @rule(
        without=st.frozensets(st.sampled_from(OPTIONAL), max_size=6),
        count=st.integers(1, QUEUES),
        size=st.sampled_from([1, 2, 4, 16, 64, None]),
        mode=st.sampled_from(Interrupts),
        indirect=st.sampled_from([None, True]),
    )
    def initialise(
        self, without: frozenset[Feature], count: int, size: int | None, mode: Interrupts, indirect: bool | None
    ) -> None:
        """A driver comes and brings the device up, whatever state it is in."""
        self.bury()
        if self.v is not None:
            self.v.close()
        self.v = VirtioBlk(
            self.connection,
            self.memory,
            features=ALL & ~sum(feature.mask for feature in without),
            queue_size=size,
            queues=1 if Feature.BLK_MQ in without else count,
            interrupts=mode,
            indirect=indirect,
            start=False,
        )
        self.v.reset()
        self.seal()
        self.clean()
        self.v.init()
        self.master = True
        rings_mapped = bool(self.mapped[LAYOUT[0]])
        self.status = LIVE if rings_mapped else LIVE | DeviceStatus.NEEDS_RESET
        self.calls = self.final_calls()

    def reset(self) -> None:
        """Status 0."""
        if self.v is not None:
            self.bury()
            self.v.reset()
            self.seal()
            master = self.master
            self.clean()
            self.master = master

    def device_reset(self) -> None:
        """DEVICE_RESET, of the whole function."""
        self.bury()
        self.connection.device_reset()
        self.seal()
        if self.v is not None:
            self.v.forget()
        self.clean()

    @rule(how=st.sampled_from([disconnect, reset, device_reset]), again=st.booleans())
    def lose(self, how: Callable[[HostileDriver], None], again: bool) -> None:
        """All that there was is gone, and mostly somebody begins again."""
        how(self)
        if again:
            self.start_well()

    @precondition(lambda self: not self.serving)
    @rule(release=st.booleans())
    def recover(self, release: bool) -> None:
        """Somebody comes who makes all well."""
        if release:
            self.disk.release()
        for piece in LAYOUT:
            self.remap(piece, 0)
        self.start_well()

    @precondition(lambda self: self.serving and self.v.has(Feature.RING_RESET))
    @rule(queue=queues, size=st.sampled_from([1, 2, 8, 64]))
    def reset_queue(self, queue: int, size: int) -> None:
        """One queue begins anew, elsewhere and of another size."""
        v = self.driver()
        queue %= len(v.queues)
        self.poll()
        self.bury(queue)
        if self.held:
            self.may_fail()  # all of memory is taken back
        v._queue_size = size
        v.reset_queue(queue)
        self.seal()

    def begin_queue_anew(self) -> None:
        """The first one."""
        if self.driver().has(Feature.RING_RESET):
            self.reset_queue(0, 16)

    @precondition(lambda self: self.orderly and self.v.has(Feature.SUSPEND))
    @rule(value=st.binary(min_size=8, max_size=8), batch=batches, go_on=st.booleans())
    def suspend(self, value: bytes, batch: Batch, go_on: bool) -> None:
        """The device shows that it is suspended when it has told of all that it had taken; then it takes nothing."""
        self.driver().device.suspend()
        self.poll()
        self.status = SUSPENDED
        self.write_while_suspended(value)
        self.work(batch)
        self.served.settle()
        self.poll()
        if go_on:
            self.resume()

    def write_while_suspended(self, value: bytes) -> None:
        """Nothing but the status can be written."""
        common = self.driver().pci.common
        before = common.read_bytes(0, COMMON_CFG_SIZE)
        for register in set(CommonCfg) - {CommonCfg.DEVICE_STATUS}:
            common.write_bytes(register, value[: WIDTHS.get(register, 2)])
        assert common.read_bytes(0, COMMON_CFG_SIZE) == before

    @precondition(lambda self: self.status == SUSPENDED and self.known)
    @rule()
    def resume(self) -> None:
        """It goes on."""
        self.driver().device.resume()
        self.status = LIVE

    def bus_master(self, on: bool) -> None:
        """The device may use memory, or not."""
        self.connection.region_write(Region.CONFIG, COMMAND, struct.pack("<H", 6 if on else 2))
        self.master = on

    # Memory.

    @rule(what=st.sampled_from(["goes", "comes", "comes and goes", "master"]), piece=st.sampled_from(LAYOUT), cut=cuts)
    def change_memory(self, what: str, piece: Range, cut: int) -> None:
        """Some of memory goes or comes back, or all does both, or the device may not use it for a while."""
        if what == "goes":
            self.unmap(piece)
        elif what == "comes":
            self.remap(piece, cut)
        elif what == "comes and goes":
            self.come_and_go(cut)
        elif self.known:
            self.bus_master(not self.master)

    def unmap(self, piece: Range) -> None:
        """Memory goes, whatever is in flight."""
        self.may_fail()
        while self.mapped[piece]:
            self.memory.unmap(self.connection, *self.mapped[piece].pop())

    def remap(self, piece: Range, cut: int) -> None:
        """Memory comes back, in one piece or two."""
        if not self.mapped[piece]:
            self.map(piece, cut)

    def come_and_go(self, cut: int) -> None:
        """All of memory goes and comes back, as firmware does it."""
        for piece in LAYOUT:
            self.unmap(piece)
        for piece in LAYOUT:
            self.remap(piece, cut)

    def forget_memory(self) -> None:
        """All of it, and at once it is there again."""
        self.come_and_go(0)

    # The disk.

    @rule(calls=st.just(frozenset()) | stalls)
    def stall(self, calls: AbstractSet[str]) -> None:
        """Some calls of the disk stall from now on, the others go on."""
        self.disk.release()
        self.disk.held = set(calls)

    def let_go(self) -> None:
        """The disk goes on, and everything ends."""
        self.disk.release()
        self.settle()

    @precondition(lambda self: self.orderly and len(self.contents) < SECTORS_MAX)
    @rule()
    def grow(self) -> None:
        """The disk gets bigger, and the driver sees that."""
        self.settle()
        before = self.generation()
        self.disk.grow(len(self.contents) + 8)
        self.contents.grow(len(self.contents) + 8)
        v = self.driver()
        until(lambda: v.capacity == len(self.contents), "the capacity stays as it was", PATIENCE)
        assert self.generation() != before

    def generation(self) -> int:
        """config_generation, which counts what was read."""
        self.driver().device.config_bytes(0, 1)
        return self.driver().device.get(CommonCfg.CONFIG_GENERATION)

    # Requests.

    def submit(self, place: Place, request: Request, status: int, begin: Callable[[], Access]) -> None:
        """Put a request into a ring, if there is room."""
        v = self.driver()
        queue = place.queue % len(v.queues)
        self.poll()
        try:
            pending = v.submit(
                request.type, request.sector, request.data_out, request.data_in, framing=place.framing, queue=queue
            )
        except (QueueFull, MemoryError):
            return
        risky = set() if self.all_mapped else FAILED
        self.requests.append(Outstanding(pending, {status, *risky}, begin()))
        if place.kick:
            v.kick(queue)

    @precondition(lambda self: self.rings)
    @rule(batch=batches)
    def work(self, batch: Batch) -> None:
        """Some requests, one after the other."""
        for place, what in batch:
            if isinstance(what, Transfer):
                self.transfer(place, what)
            elif isinstance(what, Clearing):
                self.clear(place, what)
            elif what == RequestType.FLUSH:
                self.submit(place, Request(what), Status.OK, self.contents.flush)
            else:
                status = Status.OK if what == RequestType.GET_ID else Status.UNSUPP
                self.submit(place, Request(what, data_in=BLK_ID_BYTES), status, self.contents.nothing)

    def transfer(self, place: Place, what: Transfer) -> None:
        """A read or a write, maybe over the end of the disk."""
        touched = range(what.sector, what.sector + what.count)
        stores = {sector: bytes([(what.tag + sector) % 256]) * SECTOR for sector in touched if what.tag}
        request = Request(RequestType.IN, what.sector, data_in=what.count * SECTOR)
        if what.tag:
            request = Request(RequestType.OUT, what.sector, b"".join(stores.values()))
        if touched.stop > len(self.contents):
            self.submit(place, request, Status.IOERR, self.contents.nothing)
        elif what.tag:
            self.submit(place, request, Status.OK, lambda: self.contents.write(stores))
        else:
            self.submit(place, request, Status.OK, lambda: self.contents.read(touched))

    def clear(self, place: Place, what: Clearing) -> None:
        """A discard or a write of zeroes; one range out of bounds spoils all."""
        kind, feature, content = RequestType.DISCARD, Feature.BLK_DISCARD, b"\xdd"
        if what.zeroes:
            kind, feature, content = RequestType.WRITE_ZEROES, Feature.BLK_WRITE_ZEROES, b"\0"
        stores = {sector: content * SECTOR for at, n in what.ranges for sector in range(at, at + n)}
        request = Request(kind, 0, b"".join(DISCARD_SEGMENT.pack(at, n, 0) for at, n in what.ranges))
        if not self.driver().has(feature):
            self.submit(place, request, Status.UNSUPP, self.contents.nothing)
        elif max(stores) >= len(self.contents):
            self.submit(place, request, Status.IOERR, self.contents.nothing)
        else:
            self.submit(place, request, Status.OK, lambda: self.contents.write(stores))

    @precondition(lambda self: self.orderly)
    @rule(
        calls=stalls,
        batch=batches,
        how=st.sampled_from([disconnect, reset, device_reset, begin_queue_anew, start_well, forget_memory, let_go]),
        release=st.booleans(),
    )
    def ambush(
        self, calls: AbstractSet[str], batch: Batch, how: Callable[[HostileDriver], None], release: bool
    ) -> None:
        """Something happens while the disk stalls with requests."""
        self.stall(calls)
        self.work(batch)
        self.served.settle()
        self.poll()
        how(self)
        if release:
            self.disk.release()

    # How they end.

    def poll(self) -> None:
        """Take what the device has completed, each once, and hold it against the model."""
        v = self.driver()
        if not self.known or DeviceStatus.NEEDS_RESET in self.status or not v.queues:
            return
        ended: list[Pending] = []
        for queue in v.queues:
            for name, written in queue.get_used():
                pending = v._pending.pop((queue.index, name))
                pending.finish(self.memory, written)
                ended.append(pending)
        assert not (ended and self.status == SUSPENDED), "a suspended device completes requests"
        if v.has(Feature.IN_ORDER):
            for queue in v.queues:
                waiting = [each.pending for each in self.requests if each.pending.queue == queue.index]
                mine = [pending for pending in ended if pending.queue == queue.index]
                assert waiting[: len(mine)] == mine
        for pending in ended:
            (request,) = (each for each in self.requests if each.pending is pending)
            self.end(request)

    def end(self, request: Outstanding) -> None:
        """A request has ended."""
        pending = request.pending
        self.requests.remove(request)
        done = pending.status == Status.OK
        self.contents.end(request.access, done=done)
        if pending.status is None:
            return
        assert pending.status in request.statuses
        assert pending.written <= (0 if pending.status == UNSET_STATUS else pending.data_in + 1)
        if done:
            assert pending.written == pending.data_in + 1
            check_read(request.access, pending.data)
            check_flush(request.access, self.disk.stable)

    @precondition(lambda self: self.orderly)
    @rule()
    def settle(self) -> None:
        """Everything outstanding ends."""
        v = self.driver()
        for queue in v.queues:
            v.kick(queue.index)
        deadline = time.monotonic() + PATIENCE
        while self.requests:
            self.poll()
            assert time.monotonic() < deadline, f"{len(self.requests)} requests do not end"

    # What breaks rules.

    @precondition(lambda self: self.orderly)
    @rule(queue=queues, name=st.sampled_from(sorted(BENIGN)))
    def odd_chain(self, queue: int, name: str) -> None:
        """A chain that makes little sense is answered, and nothing else suffers."""
        v = self.driver()
        queue %= len(v.queues)
        make, status = BENIGN[name]
        self.settle()
        self.memory.write(self.page, REQUEST_HEADER.pack(RequestType.IN, 0, 0) + b"\xff")
        try:
            pending = v.submit_raw(make(self.page), queue=queue)
        except QueueFull:
            return
        self.requests.append(Outstanding(pending, set(), self.contents.nothing()))
        self.settle()
        assert self.memory.read(self.page + 16, 1)[0] == (0xFF if status is None else status)

    @precondition(lambda self: self.orderly)
    @rule(queue=queues, name=st.sampled_from(sorted(CORRUPT)) | st.sampled_from(sorted(SPLIT_CORRUPT)))
    def corrupt(self, queue: int, name: str) -> None:
        """The device needs a reset."""
        v = self.driver()
        ring = v.queues[queue % len(v.queues)]
        self.settle()  # so that there is room or not, however fast the device is
        try:
            if name in CORRUPT:
                v.submit_raw(CORRUPT[name](self.page), queue=ring.index)
            elif isinstance(ring, SplitQueue):
                SPLIT_CORRUPT[name](ring, self.page)
            else:
                return
        except QueueFull:
            return
        self.give_up(ring.index)

    def give_up(self, queue: int) -> None:
        """The device finds out, says so, and serves nothing."""
        v = self.driver()
        v.kick(queue)
        v.ring_doorbell(queue)
        until(lambda: DeviceStatus.NEEDS_RESET in v.status, "the device does not ask for a reset", PATIENCE)
        self.status |= DeviceStatus.NEEDS_RESET
        self.idle()
        self.calls = self.final_calls()

    def count_calls(self) -> int:
        """How often the disk was asked for something, other than by a switch of its cache."""
        return len(self.disk.calls) - self.disk.count("flush")

    def final_calls(self) -> int | None:
        """The same; None while there may be more of requests from before a reset, which go on, range by range."""
        quiet = not (self.server._core.orphans or self.server._core.busy)
        count = self.count_calls()
        return count if quiet else None

    @precondition(lambda self: self.rings)
    @rule(pokes=pokes)
    def poke(self, pokes: list[Poke]) -> None:
        """Accesses of which it can be foretold what comes of them, most often nothing."""
        for poke in pokes:
            with contextlib.suppress(RemoteError):
                getattr(self, poke.how)(poke.number, poke.value)

    def kick(self, queue: int, _: bytes) -> None:
        """What was put into the ring is made available."""
        self.driver().kick(queue % len(self.driver().queues))

    def doorbell(self, queue: int, value: bytes) -> None:
        """Any doorbell, with anything in it."""
        self.driver().pci.notify.write_bytes(4 * (queue % 100), value)

    def read_anything(self, number: int, value: bytes) -> None:
        """Any access is answered."""
        length = 16 * value[0] + 1
        assert len(self.connection.region_read(number % 10, number >> 4, length)) == length

    def write_config(self, offset: int, value: bytes) -> None:
        """The device's configuration: only writeback can be written, and it reads 0 or 1."""
        v = self.driver()
        before = v.device.config_bytes(0, BlkConfig.WRITEBACK)
        v.pci.device.write_bytes(offset % 100, value)
        after = v.device.config_bytes(0, BlkConfig.WRITEBACK + 1)
        assert after[: BlkConfig.WRITEBACK] == before
        assert after[BlkConfig.WRITEBACK] in (0, 1)

    def write_in_vain(self, number: int, value: bytes) -> None:
        """A register that takes no value now: nothing comes of it."""
        if not self.known or self.status != LIVE:
            return
        v = self.driver()
        offset, width = INERT[number % len(INERT)]
        v.device.set(CommonCfg.QUEUE_SELECT, number % len(v.queues))
        before = v.pci.common.read_bytes(0, COMMON_CFG_SIZE)
        v.pci.common.write_bytes(offset, value.ljust(width, b"\xff")[:width])
        assert v.pci.common.read_bytes(0, COMMON_CFG_SIZE) == before

    def say_it_again(self, number: int, value: bytes) -> None:
        """Status bits that are set or undefined, and queue_enable of what is enabled: nothing comes of it."""
        if not self.known or self.status != LIVE:
            return
        v = self.driver()
        v.device.set(CommonCfg.DEVICE_STATUS, value[0] & (LIVE | 0x20 | DeviceStatus.NEEDS_RESET) or 1)
        v.device.set(CommonCfg.QUEUE_SELECT, number % len(v.queues))
        v.device.set(CommonCfg.QUEUE_ENABLE, number >> 8 & 0xFFFF)
        assert v.device.get(CommonCfg.QUEUE_ENABLE) == 1

    @rule(writes=st.lists(st.tuples(regions, offsets, values), min_size=1, max_size=5), again=st.booleans())
    def write_anything(self, writes: list[tuple[int, int, bytes]], again: bool) -> None:
        """Any access is answered; what comes of it nobody can tell, until the next reset."""
        for region, offset, value in writes:
            with contextlib.suppress(RemoteError):
                self.connection.region_write(region, offset, value)
        self.known = False
        if again:
            self.recover(release=True)

    # Always.

    @invariant()
    def the_status_is_as_it_must_be(self) -> None:
        """The register answers in time, and tells the truth."""
        if self.v is not None:
            status = self.v.status
            assert not self.known or status == self.status
            self.poll()

    @invariant()
    def a_device_that_needs_a_reset_serves_nobody(self) -> None:
        """Whatever is offered to it."""
        if self.known and DeviceStatus.NEEDS_RESET in self.status:
            if self.calls is None:
                self.calls = self.final_calls()
            assert self.calls in (None, self.count_calls())

    @invariant()
    def the_log_is_short(self) -> None:
        """Whatever is done, a few lines."""
        assert len(self.logs.records) - self.records < RECORDS_MAX

    def teardown(self) -> None:
        """In the end the next VMM gets full service, the disk holds what it must, and the server stops."""
        self.disk.release()
        try:
            if sys.exc_info()[0] is None:
                self.finish()
        finally:
            self.pull_out()
            assert self.server.stop(STOP_SECONDS)
            assert self.server.failed is None
            self.folder.cleanup()

    def finish(self) -> None:
        """The next VMM gets full service, and the disk holds what it must."""
        self.disconnect()
        self.start_well()
        calls = self.disk.count("read")
        self.work([(ANYWHERE, Transfer(3, 4, 77)), (ANYWHERE, Transfer(0, 8, 0))])
        self.settle()
        assert (self.disk.count("read") == calls) == (self.server.engine == "native")
        self.contents.check(self.disk.data)


@pytest.mark.parametrize("engine", ["python", "native"])
def test_a_driver_that_does_anything(logs: Logs, monkeypatch: pytest.MonkeyPatch, engine: str) -> None:
    """HOSTILE-048, -106, -107, -108, -110: legal and illegal moves in any order; every promise that is left holds."""
    monkeypatch.setattr("vmmblk.server.DRAIN_LIMIT", 0.05)
    for pattern in ("their memory is taken back", "guest memory is not shared", "libvfio-user: "):
        logs.allow(pattern)
    run_state_machine_as_test(lambda: HostileDriver(logs, engine), settings=effort(100))
