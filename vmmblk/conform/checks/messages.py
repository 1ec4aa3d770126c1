"""vfio-user messages that no VMM sends, clients that vanish, and memory that is cut short.

No rule of VIRTIO is about them, but what is common to all HOSTILE rules is: the server does not die or hang, and
serves fully afterwards.  Each check names the rule whose case comes nearest.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
from typing import TYPE_CHECKING, NamedTuple

from vmmblk.client import wire
from vmmblk.client.errors import NeedsReset, ProtocolError, RemoteError, StatusError
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.memory import GuestMemory
from vmmblk.client.pci import PciDevice
from vmmblk.client.queue import Descriptor, SplitQueue
from vmmblk.client.request import UNSET_STATUS
from vmmblk.client.wire import Command, HeaderFlag, IrqIndex, IrqSetFlag, Region
from vmmblk.conform.check import Broken, Harm, NotTestable, check, expect
from vmmblk.conform.function import bars, negotiate, new_queue, only, plain, ring
from vmmblk.conform.steps import answers, areas, busy, served
from vmmblk.spec import (
    NO_VECTOR,
    REQUEST_HEADER,
    CommonCfg,
    DescFlag,
    DeviceStatus,
    Feature,
    PciCapType,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from vmmblk.client.connection import Connection
    from vmmblk.client.driver import VirtioBlk
    from vmmblk.conform.target import Target

_MIB = 1 << 20
_VERSION = wire.VERSION.pack(0, 0)
_MSG_ID = 0x7777
_NOISE = 60
_FAR = 1 << 40  # where no other memory is
_TRIGGER, _EVENTFD = IrqSetFlag.ACTION_TRIGGER, IrqSetFlag.DATA_EVENTFD
_NONE, _BOOL = IrqSetFlag.DATA_NONE, IrqSetFlag.DATA_BOOL


class Bad(NamedTuple):
    """A message as it goes over the socket, and how many descriptors go with it."""

    data: bytes
    fds: int = 0
    disturbs: bool = False
    """Whether it may be taken for good, and take the device from its driver."""


# Messages.


def _header(command: int, size: int, *, flags: int = 0, error: int = 0) -> bytes:
    return wire.HEADER.pack(_MSG_ID, command, size, flags, error)


def _message(command: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return wire.encode(_MSG_ID, command, payload, flags)


def _map(iova: int, size: int, fds: int = 1, *, argsz: int = 32, offset: int = 0, flags: int = 3) -> Bad:
    return Bad(_message(Command.DMA_MAP, wire.DMA_MAP.pack(argsz, flags, offset, iova, size)), fds)


def _unmap(iova: int, size: int, *, argsz: int = 24, flags: int = 0) -> Bad:
    return Bad(_message(Command.DMA_UNMAP, wire.DMA_UNMAP.pack(argsz, flags, iova, size)))


def _irqs(index: int, start: int, count: int, flags: int, fds: int = 0, *, argsz: int = 20, data: bytes = b"") -> Bad:
    return Bad(_message(Command.DEVICE_SET_IRQS, wire.IRQ_SET.pack(argsz, flags, index, start, count) + data), fds)


def _access(command: int, region: int, offset: int, count: int, data: bytes = b"") -> Bad:
    return Bad(_message(command, wire.REGION_ACCESS.pack(offset, region, count) + data))


_SIZES = {
    "a size of 0": Bad(_header(Command.REGION_READ, 0)),
    "a size of 15": Bad(_header(Command.REGION_READ, 15)),
    "a read without a body": Bad(_message(Command.REGION_READ)),
    "a write without a body": Bad(_message(Command.REGION_WRITE)),
    "half a read": Bad(_message(Command.REGION_READ, bytes(4))),
    "half a GET_INFO": Bad(_message(Command.DEVICE_GET_INFO, bytes(4))),
    "GET_INFO with argsz 0": Bad(_message(Command.DEVICE_GET_INFO, bytes(16))),
    "half a GET_REGION_INFO": Bad(_message(Command.DEVICE_GET_REGION_INFO, bytes(8))),
    "GET_REGION_INFO with a huge argsz": Bad(
        _message(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(0xFFFFFFFF, 0, 7, 0, 0, 0))
    ),
    "half a GET_IRQ_INFO": Bad(_message(Command.DEVICE_GET_IRQ_INFO, bytes(3))),
    "half a SET_IRQS": Bad(_message(Command.DEVICE_SET_IRQS, bytes(7))),
    "half a DMA_MAP": Bad(_message(Command.DMA_MAP, bytes(16))),
    "half a DMA_UNMAP": Bad(_message(Command.DMA_UNMAP, bytes(8))),
    "a reset with data": Bad(_message(Command.DEVICE_RESET, bytes(100)), disturbs=True),
    "an empty VERSION": Bad(_message(Command.VERSION)),
}

_KINDS = {
    **{f"command {number:#x}": Bad(_message(number, bytes(16))) for number in (0, 15, 16, 99, 0x7FFF, 0xFFFF)},
    "a reply to nothing": Bad(_message(Command.REGION_READ, bytes(16), HeaderFlag.REPLY)),
    "an error to nothing": Bad(_header(Command.REGION_READ, 16, flags=HeaderFlag.REPLY | HeaderFlag.ERROR, error=5)),
    "all flags": Bad(_header(Command.REGION_READ, 16, flags=0xFFFFFFFF, error=0xFFFFFFFF)),
    "message type 2": Bad(_message(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(16, 0, 0, 0), 2)),
    "a second VERSION": Bad(_message(Command.VERSION, _VERSION + b'{"capabilities":{}}\0'), disturbs=True),
    "GET_REGION_IO_FDS": Bad(_message(Command.DEVICE_GET_REGION_IO_FDS, bytes(16))),
    "DMA_READ from a client": Bad(_message(Command.DMA_READ, bytes(16))),
    "DMA_WRITE from a client": Bad(_message(Command.DMA_WRITE, bytes(16))),
    "DIRTY_PAGES": Bad(_message(Command.DIRTY_PAGES, bytes(16))),
    "GET_REGION_INFO of region 99": Bad(
        _message(Command.DEVICE_GET_REGION_INFO, wire.REGION_INFO.pack(32, 0, 99, 0, 0, 0))
    ),
    "GET_IRQ_INFO of index 99": Bad(_message(Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(16, 0, 99, 0))),
    "a reset with descriptors": Bad(_message(Command.DEVICE_RESET), 5, disturbs=True),
}

_MAPS = {
    "an argsz of 0": _map(_FAR, _MIB, argsz=0),
    "no bytes": _map(_FAR, 0),
    "2^62 bytes": _map(0, 1 << 62),
    "2^64 - 1 bytes": _map(0, (1 << 64) - 1),
    "a range that wraps": _map((1 << 64) - 4096, 8192),
    "4095 bytes at an odd address": _map(_FAR + 1, 4095),
    "bytes beyond the file": _map(_FAR, _MIB, offset=1 << 40),
    "more bytes than the file has": _map(_FAR, 1 << 30),
    "an offset that wraps": _map(_FAR, _MIB, offset=(1 << 64) - 4096),
    "an odd offset": _map(_FAR, _MIB, offset=123),
    "undefined flags": _map(_FAR, _MIB, flags=0xFF),
    "no access": _map(_FAR, _MIB, flags=0),
    "no descriptor": _map(_FAR, _MIB, 0),
    "two descriptors": _map(_FAR, _MIB, 2),
    "eight descriptors": _map(_FAR, _MIB, 8),
    "forty descriptors": _map(_FAR, _MIB, 40),
    "250 descriptors": _map(_FAR, _MIB, 250),
    "an unmap of nothing": _unmap(_FAR, _MIB),
    "an unmap of no bytes": _unmap(_FAR, 0),
    "an unmap that wraps": _unmap((1 << 64) - 1, (1 << 64) - 1),
    "an unmap with a huge argsz": _unmap(_FAR, _MIB, argsz=0xFFFFFFFF),
    "an unmap with undefined flags": _unmap(_FAR, _MIB, flags=0xFFFFFFFC),
}


def _accesses(bar: int, size: int) -> dict[str, Bad]:
    """Accesses of a BAR of so many bytes, and of regions that there are not, that no VMM makes."""
    read, write = Command.REGION_READ, Command.REGION_WRITE
    return {
        "a read of region 99": _access(read, 99, 0, 4),
        "a read of region 0xffffffff": _access(read, 0xFFFFFFFF, 0, 4),
        "a read of the ROM": _access(read, Region.ROM, 0, 4),
        "a read beyond the end": _access(read, bar, size, 4),
        "a read over the end": _access(read, bar, size - 2, 4),
        "a read that wraps": _access(read, bar, (1 << 64) - 2, 4),
        "a read of nothing": _access(read, bar, 0, 0),
        "a read of 2 MiB": _access(read, bar, 0, 2 * _MIB),
        "a read of 4 GiB": _access(read, Region.CONFIG, 0, 0xFFFFFFFF),
        "a read beyond configuration space": _access(read, Region.CONFIG, 1 << 20, 4),
        "a write to region 99": _access(write, 99, 0, 4, bytes(4)),
        "a write of nothing": _access(write, bar, 0, 0),
        "a write of less than it says": _access(write, bar, size - 8, 100, bytes(4)),
        "a write of more than it says": _access(write, bar, size - 1, 1, bytes(64)),
        "a write of 4 GiB": _access(write, bar, size - 8, 0xFFFFFFFF, bytes(8)),
        "a write beyond the end": _access(write, bar, size, 4, bytes(4)),
        "a write over the end": _access(write, bar, size - 2, 4, bytes(4)),
        "a write that wraps": _access(write, bar, (1 << 64) - 2, 4, bytes(4)),
        "a write beyond configuration space": _access(write, Region.CONFIG, 1 << 20, 4, bytes(4)),
        "a write with descriptors": _access(write, bar, size - 4, 4, bytes(4))._replace(fds=3),
    }


def _interrupts(index: IrqIndex, count: int) -> dict[str, Bad]:
    """Ways to set ``count`` interrupts of a kind up that no VMM goes."""
    every = 0xFFFFFFFF
    return {
        "index 99": _irqs(99, 0, 1, _NONE | _TRIGGER),
        "a start beyond the last": _irqs(index, count + 7, 1, _NONE | _TRIGGER),
        "a start of 0xffffffff": _irqs(index, every, 1, _NONE | _TRIGGER),
        "a count of 0xffffffff": _irqs(index, 0, every, _NONE | _TRIGGER),
        "a range that wraps": _irqs(index, 1, every, _EVENTFD | _TRIGGER, 1),
        "no flags": _irqs(index, 0, 1, 0),
        "all flags": _irqs(index, 0, 1, 0xFF, 1),
        "two actions": _irqs(index, 0, 1, _NONE | _TRIGGER | IrqSetFlag.ACTION_MASK),
        "one bool for many": _irqs(index, 0, count, _BOOL | _TRIGGER),
        "a file for an eventfd": _irqs(index, 0, 1, _EVENTFD | _TRIGGER, 1),
        "more eventfds than interrupts": _irqs(index, 0, 1, _EVENTFD | _TRIGGER, 2),
        "fewer eventfds than interrupts": _irqs(index, 0, count + 1, _EVENTFD | _TRIGGER, 1),
        "200 descriptors": _irqs(index, 0, 1, _EVENTFD | _TRIGGER, 200),
        "ERR": _irqs(IrqIndex.ERR, 0, 1, _EVENTFD | _TRIGGER, 1),
        "an argsz of 0": _irqs(index, 0, 1, _NONE | _TRIGGER, argsz=0),
    }


@check()
def sizes(target: Target) -> None:
    """Messages that are too short for what they are get an answer or end that connection only (HOSTILE-114)."""
    _expect_survival(target, _SIZES)


@check()
def kinds(target: Target) -> None:
    """Unknown commands, ids and flags, and what only a server sends, harm nobody (HOSTILE-112)."""
    _expect_survival(target, _KINDS)


@check()
def region_accesses(target: Target) -> None:
    """Accesses beyond a region, of one that there is not, or too long harm nobody (HOSTILE-114, HOSTILE-115)."""
    with target.connection() as connection:
        pci = PciDevice(connection)
        bar = only(pci, PciCapType.DEVICE_CFG)[0].bar
        cases = _accesses(bar, bars(pci)[bar].size)
    _expect_survival(target, cases)


@check()
def memory_maps(target: Target) -> None:
    """Maps that are huge, empty, odd or without end, or with too many descriptors, harm nobody (HOSTILE-020, 042)."""
    _expect_survival(target, _MAPS)


@check()
def interrupt_setup(target: Target) -> None:
    """Interrupts that there are not, and descriptors that are none, harm nobody (HOSTILE-131)."""
    with target.connection() as connection:
        counts = {index: connection.irq_info(index).vectors for index in (IrqIndex.MSIX, IrqIndex.INTX)}
    for index, count in counts.items():
        if count:
            _expect_survival(target, _interrupts(index, count))


@check()
def noise(target: Target) -> None:
    """Messages with random bodies, with and without descriptors, harm nobody (HOSTILE-112)."""
    chance = random.Random(7)  # noqa: S311 - the same noise each time
    cases = {}
    for number in range(_NOISE):
        body = chance.randbytes(chance.randrange(60))
        flags = chance.choice([0, HeaderFlag.NO_REPLY])
        data = _message(chance.randrange(17), body, flags)
        cases[f"noise {number}, {data[:24].hex()}"] = Bad(data, chance.choice([0, 0, 1, 3]), disturbs=True)
    _expect_survival(target, cases)


def _expect_survival(target: Target, cases: Mapping[str, Bad]) -> None:
    """A live device gets each: the server answers or hangs up; if it answers, it goes on serving."""
    left = list(cases.items())
    after = "nothing"
    while left:
        with _next_client(target, after) as driver:
            alike = True
            while left and alike:
                after, bad = left.pop(0)
                alike = _answers(driver.connection, after, bad) and not bad.disturbs
                if alike:
                    _expect_service(target, driver, after)
    with _next_client(target, after) as driver:
        _expect_service(target, driver, after)


@contextlib.contextmanager
def _next_client(target: Target, after: str, memory: GuestMemory | None = None) -> Iterator[VirtioBlk]:
    """A driver that looks for completions.  Raises Harm if it cannot come up."""
    with contextlib.ExitStack() as stack:
        options = target.driver(memory=memory, features=plain(target), interrupts=Interrupts.POLL, start=False)
        try:
            driver = stack.enter_context(options)
            status = driver.device.get(CommonCfg.DEVICE_STATUS)
            driver.init()
        except OSError as error:
            raise Harm(f"after {after} the next client is not served: {error}") from error
        expect(status == 0, f"after {after} the next client finds status {status:#x}")
        yield driver


def _expect_service(target: Target, driver: VirtioBlk, after: str) -> None:
    try:
        served(target, driver)
    except (NeedsReset, StatusError, TimeoutError) as error:
        raise Broken(f"after {after} the device does not serve: {str(error) or type(error).__name__}") from error
    except ConnectionError as error:
        raise Harm(f"after {after}, which was answered, the connection was lost: {error}") from error


def _answers(connection: Connection, name: str, bad: Bad) -> bool:
    """Whether the server goes on after a message; False if it hangs up.  Raises Harm if it does neither."""
    with tempfile.TemporaryFile() as file:
        file.truncate(_MIB)
        try:
            connection.send_raw(bad.data, [file.fileno()] * bad.fds)
            connection.get_info()
        except TimeoutError as error:
            raise Harm(f"after {name} the server neither answers nor hangs up") from error
        except ProtocolError as error:
            raise Harm(f"after {name} the server says what is no message: {error}") from error
        except ConnectionError:
            return False
    return True


# Clients that vanish.


def _torn(target: Target) -> dict[str, bytes]:
    """Beginnings of messages."""
    read = wire.encode(_MSG_ID, Command.REGION_READ, wire.REGION_ACCESS.pack(0, Region.CONFIG, 4))
    write = wire.encode_region_write(Region.CONFIG, 4, bytes(target.facts.block_size))
    return {
        "7 bytes of a header": read[:7],
        "a header": read[: wire.HEADER.size],
        "half a read": read[:24],
        "a header that promises 64 KiB": _header(Command.REGION_WRITE, 1 << 16),
        "a header that promises 4 GiB": _header(Command.REGION_WRITE, 0xFFFFFFFF),
        "half a write": wire.encode(_MSG_ID, Command.REGION_WRITE, write)[:48],
        "half a DMA_MAP": _map(_FAR, _MIB).data[:30],
    }


_FIRST = {
    "not a word": b"",
    "another protocol": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 10,
    "zeroes": bytes(4096),
    "an empty VERSION": _message(Command.VERSION),
    "half a VERSION": _message(Command.VERSION, _VERSION + b'{"capabilities":{}}\0')[:24],
    "version 9.9": _message(Command.VERSION, wire.VERSION.pack(9, 9) + b"{}\0"),
    "JSON that ends early": _message(Command.VERSION, _VERSION + b"{"),
    "JSON that is no object": _message(Command.VERSION, _VERSION + b"[]\0"),
    "JSON without end": _message(Command.VERSION, _VERSION + b'{"a":' * 5000 + b"\0"),
    "capabilities below 0": _message(
        Command.VERSION, _VERSION + b'{"capabilities":{"max_msg_fds":-1,"max_data_xfer_size":-1}}\0'
    ),
    "a DMA_MAP before VERSION": _map(0, _MIB, 0).data,
}


@check()
def first_messages(target: Target) -> None:
    """A client that says anything but VERSION, or half of it, and goes, keeps nobody out (HOSTILE-106)."""
    for name, data in _FIRST.items():
        with target.connection(negotiate=False) as connection, contextlib.suppress(ConnectionError):
            connection.send_raw(data)
        with _next_client(target, name) as driver:
            _expect_service(target, driver, name)


@check()
def half_messages(target: Target) -> None:
    """A client that vanishes in the middle of a message keeps nobody out (HOSTILE-106)."""
    for name, data in _torn(target).items():
        with _next_client(target, name) as driver, tempfile.TemporaryFile() as file:
            driver.connection.send_raw(data, [file.fileno()] if "DMA_MAP" in name else [])
        with _next_client(target, name) as driver:
            _expect_service(target, driver, name)


@check()
def clients_that_vanish(target: Target) -> None:
    """In whatever state a client leaves the device, the next one finds it reset, and is served (HOSTILE-136)."""
    for name, lead in _STATES.items():
        with target.driver(start=False, features=plain(target), interrupts=Interrupts.POLL) as driver:
            driver.reset()
            lead(target, driver)
        with _next_client(target, f"a client that vanished {name}") as driver:
            _expect_service(target, driver, f"a client that vanished {name}")


def _greet(_: Target, driver: VirtioBlk) -> None:
    driver.device.greet()


def _agree(target: Target, driver: VirtioBlk) -> None:
    negotiate(driver, plain(target))


def _set_up(target: Target, driver: VirtioBlk) -> None:
    _agree(target, driver)
    driver.queues.append(new_queue(driver, 0))
    driver.device.start_queue(driver.queues[0], NO_VECTOR)


def _start(_: Target, driver: VirtioBlk) -> None:
    driver.init()


def _work(target: Target, driver: VirtioBlk) -> None:
    driver.init()
    busy(target, driver)


def _reset(target: Target, driver: VirtioBlk) -> None:
    _work(target, driver)
    driver.device.status = DeviceStatus(0)


def _reset_queue(target: Target, driver: VirtioBlk) -> None:
    _work(target, driver)
    if driver.has(Feature.RING_RESET):
        driver.device.set(CommonCfg.QUEUE_SELECT, 0)
        driver.device.set(CommonCfg.QUEUE_RESET, 1)


def _fail(_: Target, driver: VirtioBlk) -> None:
    driver.init()
    driver.device.status |= DeviceStatus.FAILED


def _break(_: Target, driver: VirtioBlk) -> None:
    driver.init()
    queue = driver.queues[0]
    if isinstance(queue, SplitQueue):
        queue.offer(queue.size)
        queue.publish()
    ring(driver)


def _unmap_all(target: Target, driver: VirtioBlk) -> None:
    _work(target, driver)
    for piece in driver.memory.layout:
        driver.connection.send(Command.DMA_UNMAP, wire.encode_dma_unmap(*piece))


def _ask_much(_: Target, driver: VirtioBlk) -> None:
    for _message_number in range(200):
        driver.connection.send(Command.REGION_READ, wire.encode_region_read(Region.CONFIG, 0, 64))


_STATES: dict[str, Callable[[Target, VirtioBlk], None]] = {
    "after ACKNOWLEDGE and DRIVER": _greet,
    "after FEATURES_OK": _agree,
    "with a queue set up": _set_up,
    "live and idle": _start,
    "with requests in flight": _work,
    "in the middle of a reset": _reset,
    "in the middle of a queue reset": _reset_queue,
    "after FAILED": _fail,
    "with a corrupt ring": _break,
    "with memory being unmapped": _unmap_all,
    "with answers that it has not read": _ask_much,
}


@check(each_ring=True)
def memory_of_the_dead(target: Target) -> None:
    """Once the next client is served, nothing is written to the memory of one that vanished (HOSTILE-107)."""
    with GuestMemory() as memory:
        with target.driver(memory=memory, features=plain(target), interrupts=Interrupts.POLL) as driver:
            given = [*answers(busy(target, driver)), *areas(driver.queues[0])]
        with _next_client(target, "a client that vanished with requests in flight") as driver:
            before = [memory.read(*piece) for piece in given]
            served(target, driver)
            if [memory.read(*piece) for piece in given] != before:
                raise Harm("memory of a client that is gone was written while the next one was served")


# Memory that is cut short.


@check(each_ring=True)
def buffers_cut_short(target: Target) -> None:
    """A read whose memory is a file that was truncated fails, or the device needs a reset (HOSTILE-048)."""
    _expect_failure(target, RequestType.IN, DescFlag.WRITE)


@check(each_ring=True)
def data_cut_short(target: Target) -> None:
    """A write whose data is in a file that was truncated fails, or the device needs a reset (HOSTILE-048)."""
    target.room(target.block_sectors)
    with target.driver(features=plain(target)) as driver:
        pattern = bytes(range(1, 129)) * (target.facts.block_size // 128)
        driver.write(0, pattern)
        if driver.read(0, len(pattern)) != pattern:
            raise NotTestable("the disk does not look at what it is given")
    _expect_failure(target, RequestType.OUT, DescFlag(0))


def _expect_failure(target: Target, kind: RequestType, flags: DescFlag) -> None:
    with target.driver(features=plain(target)) as driver, _short_file() as fd:
        driver.connection.dma_map(_FAR, _MIB, fd)
        os.ftruncate(fd, 0)
        status = _request(target, driver, kind, Descriptor(_FAR, target.facts.block_size, DescFlag.NEXT | flags))
        expect(status != Status.OK, f"{kind.name} by memory that is gone is completed with OK")
        driver.connection.dma_unmap(_FAR, _MIB)
        driver.init()
        served(target, driver)


@check(each_ring=True)
def elements_beyond_the_file(target: Target) -> None:
    """A map of more than the file holds is refused, or requests beyond the end fail (HOSTILE-022, HOSTILE-048)."""
    with target.driver(features=plain(target)) as driver, _short_file() as fd:
        try:
            driver.connection.dma_map(_FAR, 4 * _MIB, fd)
        except RemoteError:
            return
        where = Descriptor(_FAR + 2 * _MIB, target.facts.block_size, DescFlag.NEXT | DescFlag.WRITE)
        status = _request(target, driver, RequestType.IN, where)
        expect(status != Status.OK, "IN to memory beyond the end of the file is completed with OK")
        driver.connection.dma_unmap(_FAR, 4 * _MIB)
        driver.init()
        served(target, driver)


@check(each_ring=True)
def rings_cut_short(target: Target) -> None:
    """With the ring's memory truncated registers answer, and a reset with new memory restores service (HOSTILE-048)."""
    with target.driver(features=plain(target)) as driver, _short_file(driver.memory.size) as fd:
        served(target, driver)
        memory, connection = driver.memory, driver.connection
        memory.unmap_all(connection)
        for piece in memory.layout:
            connection.dma_map(*piece, fd, memory.offset(*piece))
        os.ftruncate(fd, 0)
        for _ in range(10):
            ring(driver)
            status = driver.device.get(CommonCfg.DEVICE_STATUS)
            expect(status, "the device has reset itself")
        memory.unmap_all(connection)
        memory.map_all(connection)
        driver.init()
        served(target, driver)


@contextlib.contextmanager
def _short_file(size: int = _MIB) -> Iterator[int]:
    fd = os.memfd_create("cut short")
    try:
        os.ftruncate(fd, size)
        yield fd
    finally:
        os.close(fd)


def _request(target: Target, driver: VirtioBlk, kind: RequestType, data: Descriptor) -> int | None:
    """Make a request of the first block with its data there; its status, or None if the device needs a reset."""
    if target.facts.capacity < target.block_sectors:
        raise NotTestable("the disk is empty")
    block = driver.memory.alloc(4096)
    driver.memory.write(block, REQUEST_HEADER.pack(kind, 0, 0) + bytes(48) + bytes([UNSET_STATUS]))
    pending = driver.submit_raw(
        [
            Descriptor(block, REQUEST_HEADER.size, DescFlag.NEXT),
            data,
            Descriptor(block + 64, 1, DescFlag.WRITE),
        ]
    )
    driver.kick(force=True)
    try:
        driver.wait(pending)
    except NeedsReset:
        return None
    return driver.memory.read(block + 64, 1)[0]
