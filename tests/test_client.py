"""The driver's side by itself: messages against a socket pair, rings and requests against a device told in Python."""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import socket
import struct
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from vmmblk.client import wire
from vmmblk.client.connection import Connection
from vmmblk.client.driver import SUPPORTED, VirtioBlk
from vmmblk.client.errors import NeedsReset, ProtocolError, QueueFull, RemoteError, StatusError
from vmmblk.client.interrupts import Interrupts
from vmmblk.client.memory import PAGE, GuestMemory, Range, Sharing
from vmmblk.client.queue import Descriptor, Segment, SplitQueue
from vmmblk.client.wire import Command, HeaderFlag, IrqIndex, Message
from vmmblk.spec import (
    NO_VECTOR,
    REQUEST_HEADER,
    BlkConfig,
    CommonCfg,
    DescFlag,
    DeviceStatus,
    Feature,
    IsrStatus,
    RequestType,
    Status,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

# Messages.


class Peer:
    """The server's end of a socket pair, in the test's own thread."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def take(self) -> Message:
        """Read one message."""
        data, fds, *_ = socket.recv_fds(self.sock, wire.HEADER.size, 16)
        if not data:
            raise EOFError
        header = wire.decode_header(data)
        body = self.sock.recv(header.size - wire.HEADER.size, socket.MSG_WAITALL) if header.size > 16 else b""
        return Message(header, body, tuple(fds))

    def reply(self, msg_id: int, command: int, payload: bytes = b"", error: int = 0) -> None:
        """Send a reply."""
        flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if error else 0)
        self.sock.sendall(wire.encode(msg_id, command, payload, flags, error))


@pytest.fixture
def pair() -> Iterator[tuple[Connection, Peer]]:
    """A connection that has negotiated nothing, and its peer."""
    ours, theirs = socket.socketpair()
    with Connection(ours, timeout=20.0, negotiate=False) as connection, theirs:
        yield connection, Peer(theirs)


def version_reply(text: bytes, *, minor: int = 0) -> bytes:
    """A server's answer to the first message."""
    return wire.encode(0, Command.VERSION, wire.VERSION.pack(0, minor) + text, HeaderFlag.REPLY)


def test_negotiation_sends_capabilities_and_keeps_the_servers() -> None:
    """VERSION carries 0.0 and NUL-terminated JSON; the server's limit on descriptors is honoured."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(version_reply(b'{"capabilities": {"max_msg_fds": 4}}\0'))
        with Connection(ours) as connection:
            message = Peer(theirs).take()
            assert message.header.command == Command.VERSION
            assert message.payload[:4] == bytes(4)
            assert message.payload[-1] == 0
            assert json.loads(message.payload[4:-1])["capabilities"]["max_data_xfer_size"] == 1 << 20
            assert connection.max_msg_fds == 4


@pytest.mark.parametrize(
    "reply",
    [
        version_reply(b"", minor=1),
        version_reply(b'{"capabilities": {}}'),
        version_reply(b"nonsense\0"),
        version_reply(b"[]\0"),
    ],
    ids=["newer minor", "no NUL", "not JSON", "no capabilities"],
)
def test_a_bad_version_reply_is_a_protocol_error(reply: bytes) -> None:
    """A server that cannot be understood is refused, and the socket is closed."""
    ours, theirs = socket.socketpair()
    with theirs:
        theirs.sendall(reply)
        with pytest.raises(ProtocolError):
            Connection(ours)
        assert ours.fileno() == -1


def test_request_matches_replies_by_id_and_keeps_the_others(pair: tuple[Connection, Peer]) -> None:
    """Pipelined commands may be waited for in any order; what is left over comes out of receive()."""
    connection, peer = pair
    ids = [connection.send(Command.DEVICE_RESET) for _ in range(3)]
    assert [peer.take().header.msg_id for _ in ids] == ids
    for msg_id in ids:
        peer.reply(msg_id, Command.DEVICE_RESET, bytes([msg_id]))
    assert connection.wait(ids[2]).payload == bytes([ids[2]])
    assert connection.wait(ids[0]).payload == bytes([ids[0]])
    assert connection.receive().header.msg_id == ids[1]


def test_an_error_reply_is_raised_with_its_number(pair: tuple[Connection, Peer]) -> None:
    """The errno of an error reply reaches the caller as an OSError's."""
    connection, peer = pair
    peer.reply(0, Command.DMA_UNMAP, error=errno.ENOENT)
    with pytest.raises(RemoteError) as caught:
        connection.dma_unmap(0x1000, 0x1000)
    assert caught.value.errno == errno.ENOENT
    assert wire.DMA_UNMAP.unpack(peer.take().payload) == (24, 0, 0x1000, 0x1000)


def test_a_late_reply_times_out_and_loses_nothing(pair: tuple[Connection, Peer]) -> None:
    """Half a reply raises TimeoutError; the other half completes it."""
    connection, peer = pair
    reply = wire.encode(connection.send(Command.DEVICE_RESET), Command.DEVICE_RESET, b"late", HeaderFlag.REPLY)
    peer.sock.sendall(reply[:18])
    with pytest.raises(TimeoutError):
        connection.receive(timeout=0.01)
    peer.sock.sendall(reply[18:])
    assert connection.receive().payload == b"late"


def test_a_closed_peer_is_a_connection_error(pair: tuple[Connection, Peer]) -> None:
    """EOF before and after sending is ConnectionError, not a hang."""
    connection, peer = pair
    peer.sock.close()
    with pytest.raises(ConnectionError):
        connection.receive()
    with pytest.raises(ConnectionError):
        connection.device_reset()


@pytest.mark.parametrize("size", [0, 15, 1 << 31])
def test_an_absurd_message_size_is_a_protocol_error(pair: tuple[Connection, Peer], size: int) -> None:
    """A reply shorter than its header or of gigabytes is refused before it is read."""
    connection, peer = pair
    peer.sock.sendall(wire.HEADER.pack(0, Command.DEVICE_RESET, size, HeaderFlag.REPLY, 0))
    with pytest.raises(ProtocolError):
        connection.receive()


def test_dma_map_sends_the_descriptor_beside_the_structure(pair: tuple[Connection, Peer]) -> None:
    """DMA_MAP carries argsz, flags, file offset, IOVA and size, and the descriptor of those very pages."""
    connection, peer = pair
    peer.reply(0, Command.DMA_MAP)
    with GuestMemory(8 * PAGE, [Range(0x10000, 8 * PAGE)]) as memory:
        memory.write(0x12000, b"shared")
        memory.map(connection, 0x12000, 2 * PAGE)
        message = peer.take()
        assert wire.DMA_MAP.unpack(message.payload) == (32, 3, 0x2000, 0x12000, 2 * PAGE)
        (fd,) = message.fds
        assert os.pread(fd, 6, 0x2000) == b"shared"
        os.close(fd)


@pytest.mark.parametrize(("sharing", "seen"), [(Sharing.PRIVATE, [b"\0\0"]), (Sharing.NO_FD, [])])
def test_memory_can_be_mapped_without_being_shared(
    pair: tuple[Connection, Peer], sharing: Sharing, seen: list[bytes]
) -> None:
    """A private mapping shows other pages, one without a descriptor none at all."""
    connection, peer = pair
    peer.reply(0, Command.DMA_MAP)
    with GuestMemory(PAGE) as memory:
        memory.write(0, b"no")
        memory.map(connection, 0, PAGE, sharing=sharing)
        fds = peer.take().fds
        assert [os.pread(fd, 2, 0) for fd in fds] == seen
        for fd in fds:
            os.close(fd)


def test_set_irqs_is_cut_at_the_servers_limit_and_at_holes(pair: tuple[Connection, Peer]) -> None:
    """Eventfds go out in runs of at most max_msg_fds; None is a message of its own without a descriptor."""
    connection, peer = pair
    connection.max_msg_fds = 2
    fd = os.eventfd(0)
    for msg_id in range(4):
        peer.reply(msg_id, Command.DEVICE_SET_IRQS)
    connection.set_irqs(IrqIndex.MSIX, 1, [fd, fd, fd, None, fd])
    os.close(fd)
    seen = []
    for _ in range(4):
        message = peer.take()
        _, flags, index, start, count = wire.IRQ_SET.unpack(message.payload)
        assert (flags, index) == (0x24, IrqIndex.MSIX)
        seen.append((start, count, len(message.fds)))
        for received in message.fds:
            os.close(received)
    assert seen == [(1, 2, 2), (3, 1, 1), (4, 1, 0), (5, 1, 1)]


def test_a_posted_write_asks_for_no_reply(pair: tuple[Connection, Peer]) -> None:
    """A posted REGION_WRITE has the no-reply bit and returns at once."""
    connection, peer = pair
    connection.region_write(4, 0x3000, b"\1\0", posted=True)
    message = peer.take()
    assert message.header.flags == HeaderFlag.NO_REPLY
    assert message.payload == wire.REGION_ACCESS.pack(0x3000, 4, 2) + b"\1\0"


def test_a_short_region_read_is_a_protocol_error(pair: tuple[Connection, Peer]) -> None:
    """A reply with fewer bytes than were asked for is not taken for data."""
    connection, peer = pair
    peer.reply(0, Command.REGION_READ, wire.REGION_ACCESS.pack(0, 7, 4) + b"\0\0")
    with pytest.raises(ProtocolError):
        connection.region_read(7, 0, 4)


def test_the_servers_dma_messages_are_answered_while_waiting(pair: tuple[Connection, Peer]) -> None:
    """DMA_READ and DMA_WRITE reach guest memory; a bad range gets EFAULT, another command ENOTSUP."""
    connection, peer = pair
    with GuestMemory(PAGE) as memory:
        connection.dma_target = memory
        memory.write(8, b"guest")
        peer.sock.sendall(wire.encode(9, Command.DMA_READ, wire.DMA_ACCESS.pack(8, 5)))
        peer.sock.sendall(wire.encode(10, Command.DMA_WRITE, wire.DMA_ACCESS.pack(0, 3) + b"dev"))
        peer.sock.sendall(wire.encode(11, Command.DMA_READ, wire.DMA_ACCESS.pack(PAGE - 1, 2)))
        peer.sock.sendall(wire.encode(12, Command.DEVICE_RESET))
        peer.reply(0, Command.DEVICE_RESET)
        connection.device_reset()
        assert memory.read(0, 3) == b"dev"
    assert peer.take().header.command == Command.DEVICE_RESET
    answers = [peer.take() for _ in range(4)]
    assert answers[0].payload == wire.DMA_ACCESS.pack(8, 5) + b"guest"
    assert [answer.header.error for answer in answers] == [0, 0, errno.EFAULT, errno.ENOTSUP]


# Guest memory.


def test_memory_layout_has_holes_and_no_access_crosses_them() -> None:
    """Addresses map to the file range by range; what is not wholly memory is a ValueError."""
    with GuestMemory(4 * PAGE, [Range(0, 2 * PAGE), Range(1 << 32, 2 * PAGE)]) as memory:
        memory.write((1 << 32) + 4, b"high")
        assert memory.read((1 << 32) + 4, 4) == b"high"
        assert memory.offset(1 << 32) == 2 * PAGE
        for iova, length in [(2 * PAGE - 1, 2), (2 * PAGE, 1), ((1 << 32) - 1, 2), (1 << 63, 1), (0, -1)]:
            with pytest.raises(ValueError, match="not in guest memory"):
                memory.read(iova, length)


def test_the_allocator_aligns_never_overlaps_and_gets_everything_back() -> None:
    """Blocks are disjoint and aligned; once freed in any order, all but the page at 0 can be had in one."""
    with GuestMemory(16 * PAGE, [Range(0, 8 * PAGE), Range(8 * PAGE, 8 * PAGE)]) as memory:
        blocks = [(memory.alloc(size, align), size) for size, align in [(1, 1), (PAGE, PAGE), (100, 512), (3, 2)] * 2]
        spans = sorted((start, start + size) for start, size in blocks)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))
        for start, _ in blocks[::2] + blocks[1::2]:
            memory.free(start)
        assert sorted([memory.alloc(7 * PAGE), memory.alloc(8 * PAGE)]) == [PAGE, 8 * PAGE]
        with pytest.raises(MemoryError):
            memory.alloc(1, 1)


# The ring, against the device's half in Python: one thread, so order is program order.


class DeviceRing:
    """The device's half of a split ring, reading and writing the shared bytes."""

    def __init__(self, read: Any, write: Any, size: int, areas: tuple[int, int, int]) -> None:
        self.read, self.write = read, write
        self.size = size
        self.desc, self.avail, self.used = areas
        self.seen = self.done = 0

    def u16(self, iova: int) -> int:
        """A 16-bit field."""
        return int.from_bytes(self.read(iova, 2), "little")

    def ask_for_kick(self) -> None:
        """Set avail_event so that the next chain is notified."""
        self.write(self.used + 4 + 8 * self.size, struct.pack("<H", self.seen))

    def pop(self) -> int | None:
        """The next available head."""
        if self.u16(self.avail + 2) == self.seen:
            return None
        head = self.u16(self.avail + 4 + 2 * (self.seen % self.size))
        self.seen = (self.seen + 1) & 0xFFFF
        return head

    def chain(self, head: int) -> list[tuple[int, int, int]]:
        """The elements of a chain, (iova, length, flags), indirect or not."""
        table, index = self.desc, head
        found: list[tuple[int, int, int]] = []
        while len(found) < 100:
            address, length, flags, following = struct.unpack("<QIHH", self.read(table + 16 * index, 16))
            if flags & DescFlag.INDIRECT:
                table, index = address, 0
                continue
            found.append((address, length, flags & DescFlag.WRITE))
            if not flags & DescFlag.NEXT:
                return found
            index = following
        raise ValueError("endless chain")

    def push(self, head: int, written: int) -> None:
        """Return a chain."""
        self.write(self.used + 4 + 8 * (self.done % self.size), struct.pack("<II", head, written))
        self.done = (self.done + 1) & 0xFFFF
        self.write(self.used + 2, struct.pack("<H", self.done))


@contextlib.contextmanager
def ring(size: int = 8, *, event_idx: bool = True) -> Iterator[tuple[SplitQueue, DeviceRing, GuestMemory]]:
    """Both halves of one ring."""
    with GuestMemory(64 * PAGE) as memory:
        queue = SplitQueue(memory, 0, size, event_idx=event_idx)
        yield queue, DeviceRing(memory.read, memory.write, size, (queue.desc, queue.avail, queue.used)), memory
        queue.close()


THREE = [Segment(0x1000, 16, writable=False), Segment(0x2000, 512, writable=True), Segment(0x3000, 1, writable=True)]


def test_a_chain_is_seen_after_publish_and_returned_once() -> None:
    """What the device reads is what was added, in order; its descriptors are free again after the used element."""
    with ring() as (queue, device, _):
        head = queue.add(THREE)
        assert device.pop() is None
        queue.publish()
        assert device.pop() == head
        assert device.chain(head) == [(0x1000, 16, 0), (0x2000, 512, 2), (0x3000, 1, 2)]
        assert queue.room == 5
        assert queue.get_used() == []
        device.push(head, 513)
        assert queue.get_used() == [(head, 513)]
        assert queue.room == 8
        assert queue.get_used() == []


def test_an_indirect_chain_takes_one_descriptor() -> None:
    """With a table the ring spends one descriptor and the device reads the same elements."""
    with ring(2) as (queue, device, memory):
        head = queue.add(THREE, table=memory.alloc(48))
        queue.publish()
        assert queue.room == 1
        assert device.chain(head) == [(0x1000, 16, 0), (0x2000, 512, 2), (0x3000, 1, 2)]


def test_a_ring_that_is_full_says_so_and_recovers() -> None:
    """A chain that does not fit raises QueueFull and changes nothing."""
    with ring(4) as (queue, device, _):
        head = queue.add(THREE)
        with pytest.raises(QueueFull):
            queue.add(THREE)
        queue.publish()
        device.pop()
        device.push(head, 0)
        queue.get_used()
        assert queue.add(THREE) in range(4)
        with pytest.raises(ValueError, match="no such chain"):
            queue.add([])


def test_the_ring_works_past_the_wrap_of_its_indices() -> None:
    """70000 chains through a ring of 4, completed out of order, all come back."""
    with ring(4) as (queue, device, _):
        for _ in range(35000):
            first, second = queue.add(THREE[:2]), queue.add(THREE[1:])
            queue.publish()
            assert (device.pop(), device.pop()) == (first, second)
            device.push(second, 2)
            device.push(first, 1)
            assert queue.get_used() == [(second, 2), (first, 1)]
        assert queue.room == 4


@pytest.mark.parametrize(("event", "kick"), [(0, True), (1, True), (2, True), (3, False), (0xFFFF, False)])
def test_avail_event_decides_on_the_kick(event: int, kick: bool) -> None:
    """With event index the device is kicked when the batch passes avail_event, and only then."""
    with ring() as (queue, device, memory):
        memory.write(device.used + 4 + 8 * 8, struct.pack("<H", event))
        memory.write(device.used, b"\1\0")  # the flag means nothing with event index
        for _ in range(3):
            queue.add(THREE[:1])
        queue.publish()
        assert queue.need_kick() is kick
        assert queue.need_kick() is False


def test_used_flags_decide_on_the_kick_without_event_index() -> None:
    """Without event index, NO_NOTIFY suppresses the kick and avail_event means nothing."""
    with ring(event_idx=False) as (queue, device, memory):
        memory.write(device.used + 4 + 8 * 8, struct.pack("<H", 0x7777))
        for flags, kick in [(0, True), (1, False), (2, True)]:
            memory.write(device.used, struct.pack("<H", flags))
            queue.add(THREE[:1])
            queue.publish()
            assert queue.need_kick() is kick


def test_arm_sets_used_event_and_tells_what_is_waiting() -> None:
    """used_event is the index after which the device must interrupt; elements already there are counted."""
    with ring() as (queue, device, _):
        heads = [queue.add(THREE[:1]) for _ in range(3)]
        queue.publish()
        assert queue.arm(2) == 0
        assert device.u16(device.avail + 4 + 2 * 8) == 1
        device.push(heads[0], 0)
        assert queue.arm() == 1
        assert queue.get_used() == [(heads[0], 0)]
        queue.disarm()
        assert device.u16(device.avail + 4 + 2 * 8) == 0
        queue.set_used_event(0x1234)
        assert device.u16(device.avail + 4 + 2 * 8) == 0x1234


def test_without_event_index_arm_and_disarm_are_the_avail_flag() -> None:
    """NO_INTERRUPT is set by disarm and cleared by arm."""
    with ring(event_idx=False) as (queue, device, _):
        queue.disarm()
        assert device.u16(device.avail) == 1
        queue.arm()
        assert device.u16(device.avail) == 0


@pytest.mark.parametrize("bad", [7, 8, 0xFFFFFFFF])
def test_a_used_id_that_is_not_in_flight_is_a_protocol_error(bad: int) -> None:
    """Ids free, out of range or returned twice are refused; good elements before them are delivered."""
    with ring() as (queue, device, _):
        head = queue.add(THREE)
        queue.publish()
        device.push(head, 1)
        device.push(bad, 1)
        assert queue.get_used() == [(head, 1)]
        for _ in range(2):
            with pytest.raises(ProtocolError):
                queue.get_used()
        assert queue.room == 8


def test_a_used_index_too_far_ahead_is_a_protocol_error() -> None:
    """An index more than a ring ahead is not followed."""
    with ring() as (queue, device, memory):
        memory.write(device.used + 2, struct.pack("<H", 9))
        with pytest.raises(ProtocolError):
            queue.get_used()


def test_a_device_that_scribbles_over_descriptors_does_not_confuse_the_free_list() -> None:
    """The driver never reads the descriptor table back."""
    with ring() as (queue, device, memory):
        head = queue.add(THREE)
        queue.publish()
        memory.write(device.desc, b"\xff" * 16 * 8)
        device.push(head, 0)
        queue.get_used()
        assert len(set(queue.reserve(8))) == 8


def test_wrong_rings_can_be_written() -> None:
    """Literal descriptors, heads and indices reach memory as they are; a head offered twice comes back twice."""
    with ring() as (queue, device, _):
        loop = queue.add_raw([Descriptor(0x10, 1, DescFlag.NEXT), Descriptor(0x20, 2, DescFlag.NEXT)])
        queue.offer(loop)
        queue.offer(999)
        queue.publish()
        assert [device.pop() for _ in range(3)] == [loop, loop, 999]
        with pytest.raises(ValueError, match="endless"):
            device.chain(loop)
        device.push(loop, 0)
        device.push(loop, 0)
        assert queue.get_used() == [(loop, 0), (loop, 0)]
        assert queue.room == 8
        queue.avail_idx += 1000
        assert device.u16(device.avail + 2) == 1003
        with pytest.raises(ValueError, match="no such"):
            queue.write_descriptor(8, Descriptor(0, 0))


@pytest.mark.parametrize("size", [0, 3, 65536])
def test_impossible_ring_sizes_are_refused(size: int) -> None:
    """Sizes that are no power of two up to 32768 raise OSError and leak no memory."""
    with GuestMemory(512 * PAGE) as memory:
        with pytest.raises((OSError, MemoryError)):
            SplitQueue(memory, 0, size, event_idx=False)
        assert memory.alloc(511 * PAGE) == PAGE


# A whole driver, against a small device that answers vfio-user in a thread.

BAR, COMMON, ISR, CONFIG, NOTIFY = 2, 0x100, 0x208, 0x300, 0x400  # unlike anybody's layout, on purpose
SECTORS = 64
OFFER = SUPPORTED & ~(Feature.BLK_SIZE_MAX.mask | Feature.NOTIFICATION_DATA.mask | Feature.NOTIF_CONFIG_DATA.mask)


class SmallDevice(threading.Thread):
    """A virtio-blk device over bytes: correct, complete enough for the driver, and without mercy for its mistakes."""

    def __init__(self, sock: socket.socket, *, vectors: int = 3, queue_max: int = 16, queues: int = 1) -> None:
        super().__init__(daemon=True)
        self.peer = Peer(sock)
        self.disk = bytearray(SECTORS * 512)
        self.vectors, self.queue_max = vectors, queue_max
        self.maps: dict[int, mmap.mmap] = {}
        self.irqs: dict[tuple[int, int], int] = {}
        self.log: list[str] = []
        self.config = bytearray(96)
        struct.pack_into("<Q", self.config, BlkConfig.CAPACITY, SECTORS)
        struct.pack_into("<I", self.config, BlkConfig.BLK_SIZE, 512)
        self.pci = self._config_space()
        self.count = queues
        self.isr = 0
        self._reset()

    def _reset(self) -> None:
        self.common = bytearray(64)
        struct.pack_into("<HH", self.common, CommonCfg.CONFIG_MSIX_VECTOR, NO_VECTOR, self.count)
        self.queues = [bytearray(64) for _ in range(self.count)]
        for index, queue in enumerate(self.queues):
            struct.pack_into("<HHHH", queue, CommonCfg.QUEUE_SIZE, self.queue_max, NO_VECTOR, 0, 3 + index)
        self.rings: dict[int, DeviceRing] = {}

    def _config_space(self) -> bytearray:
        space = bytearray(256)
        struct.pack_into("<HHHH", space, 0, 0x1AF4, 0x1042, 0, 0x10)
        space[0x34] = 0x40
        places = [(1, COMMON, 64, 0), (2, NOTIFY, 64, 4), (3, ISR, 1, 0), (4, CONFIG, 96, 0), (5, 0, 0, 0)]
        for number, (kind, offset, length, extra) in enumerate(places):
            at = 0x40 + 0x18 * number
            struct.pack_into("<BBBBBBHIII", space, at, 9, at + 0x18, 20, kind, BAR, 0, 0, offset, length, extra)
        self.msix_at, self.window = 0x40 + 0x18 * 5, 0x40 + 0x18 * 4
        struct.pack_into("<BBH", space, self.msix_at, 0x11, 0, max(self.vectors - 1, 0))
        return space

    def run(self) -> None:
        """Answer until the client goes."""
        try:
            while True:
                message = self.peer.take()
                payload, error = b"", 0
                try:
                    payload = self._handle(message)
                except OSError as refused:
                    error = refused.errno or errno.EIO
                if not message.header.flags & HeaderFlag.NO_REPLY:
                    self.peer.reply(message.header.msg_id, message.header.command, payload, error)
        except (EOFError, OSError):
            return

    def stop(self) -> None:
        """End the thread and give everything back."""
        self.peer.sock.shutdown(socket.SHUT_RDWR)
        self.join(5)
        assert not self.is_alive()
        self.peer.sock.close()
        for region in self.maps.values():
            region.close()
        for fd in self.irqs.values():
            os.close(fd)

    def _handle(self, message: Message) -> bytes:
        payload = message.payload
        match message.header.command:
            case Command.VERSION:
                return wire.VERSION.pack(0, 0)
            case Command.DMA_MAP:
                _, _, offset, iova, size = wire.DMA_MAP.unpack(payload)
                (fd,) = message.fds
                self.maps[iova] = mmap.mmap(fd, size, offset=offset)
                os.close(fd)
            case Command.DEVICE_GET_IRQ_INFO:
                return wire.IRQ_INFO.pack(16, 1, IrqIndex.MSIX, self.vectors)
            case Command.DEVICE_SET_IRQS:
                _, flags, index, start, _ = wire.IRQ_SET.unpack(payload)
                self.log.append(f"set_irqs {index} {start} {len(message.fds)} {flags:#x}")
                for number, fd in enumerate(message.fds):
                    if (index, start + number) in self.irqs:
                        os.close(self.irqs[index, start + number])
                    self.irqs[index, start + number] = fd
            case Command.REGION_READ:
                offset, region, count = wire.REGION_ACCESS.unpack(payload)
                return payload + self._read(region, offset, count)
            case Command.REGION_WRITE:
                offset, region, count = wire.REGION_ACCESS.unpack(payload[:16])
                self._write(region, offset, payload[16:])
                return payload[:16]
            case Command.DEVICE_RESET:
                self._reset()
            case _:
                raise OSError(errno.EINVAL, "")
        return b""

    def _window(self) -> tuple[int, int, int]:
        bar, offset, length = struct.unpack_from("<B3xII", self.pci, self.window + 4)
        assert bar == BAR
        assert length in (1, 2, 4)
        assert offset % length == 0
        return bar, offset, length

    def _bytes(self, offset: int, length: int) -> tuple[bytearray, int]:
        """The store behind a BAR access."""
        if COMMON <= offset < COMMON + 64:
            at = offset - COMMON
            if CommonCfg.QUEUE_SIZE <= at < CommonCfg.ADMIN_QUEUE_INDEX:
                (selected,) = struct.unpack_from("<H", self.common, CommonCfg.QUEUE_SELECT)
                return (self.queues[selected] if selected < self.count else bytearray(64)), at
            return self.common, at
        if CONFIG <= offset < CONFIG + 96:
            return self.config, offset - CONFIG
        raise OSError(errno.EINVAL, f"{offset:#x} {length}")

    def _read(self, region: int, offset: int, length: int) -> bytes:
        if region == wire.Region.CONFIG:
            if offset == self.window + 16:
                return self._read(*self._window())
            return bytes(self.pci[offset : offset + length])
        assert region == BAR
        if offset == ISR:
            cause, self.isr = self.isr, 0
            return bytes([cause])
        if offset == COMMON + CommonCfg.DEVICE_FEATURE:
            select = self.common[CommonCfg.DEVICE_FEATURE_SELECT]
            return struct.pack("<I", OFFER >> 32 * select & 0xFFFFFFFF)
        store, at = self._bytes(offset, length)
        return bytes(store[at : at + length])

    def _write(self, region: int, offset: int, data: bytes) -> None:
        if region == wire.Region.CONFIG:
            self.pci[offset : offset + len(data)] = data
            if offset == self.window + 16:
                bar, where, length = self._window()
                assert length == len(data)
                self._write(bar, where, data)
        elif NOTIFY <= offset < NOTIFY + 64:
            assert len(data) == 2
            index = int.from_bytes(data, "little")
            assert offset == NOTIFY + 4 * (3 + index)
            self.log.append(f"kick {index}")
            self._serve(index)
        elif offset == COMMON + CommonCfg.DEVICE_STATUS and data == b"\0":
            self.log.append("reset")
            self._reset()
        else:
            store, at = self._bytes(offset, len(data))
            store[at : at + len(data)] = data
            if offset == COMMON + CommonCfg.QUEUE_RESET:
                store[at : at + 2] = store[CommonCfg.QUEUE_ENABLE : CommonCfg.QUEUE_ENABLE + 2] = b"\0\0"
                self.rings.pop(self.common[CommonCfg.QUEUE_SELECT], None)

    def memory_read(self, iova: int, length: int) -> bytes:
        """Guest memory; a chain outside it is the test's failure."""
        base = max(start for start in self.maps if start <= iova)
        data = self.maps[base][iova - base : iova - base + length]
        assert len(data) == length
        return data

    def memory_write(self, iova: int, data: bytes) -> None:
        """Guest memory."""
        base = max(start for start in self.maps if start <= iova)
        self.maps[base][iova - base : iova - base + len(data)] = data

    def _serve(self, index: int) -> None:
        assert self.common[CommonCfg.DEVICE_STATUS] & DeviceStatus.DRIVER_OK
        size, _, enabled = struct.unpack_from("<HHH", self.queues[index], CommonCfg.QUEUE_SIZE)
        assert enabled == 1
        areas = struct.unpack_from("<QQQ", self.queues[index], CommonCfg.QUEUE_DESC)
        ring = self.rings.setdefault(index, DeviceRing(self.memory_read, self.memory_write, size, areas))
        while (head := ring.pop()) is not None:
            ring.push(head, self._request(ring.chain(head)))
            ring.ask_for_kick()
        self.interrupt(struct.unpack_from("<H", self.queues[index], CommonCfg.QUEUE_MSIX_VECTOR)[0], IsrStatus.QUEUE)

    def _request(self, chain: list[tuple[int, int, int]]) -> int:
        self.log.append("chain " + " ".join(f"{'w' if flags else 'r'}{length}" for _, length, flags in chain))
        readable = b"".join(self.memory_read(iova, length) for iova, length, flags in chain if not flags)
        places = [iova + i for iova, length, flags in chain if flags for i in range(length)]
        kind, _, sector = REQUEST_HEADER.unpack_from(readable)
        data_out, status, data_in = readable[16:], Status.OK, b""
        match kind:
            case RequestType.IN if sector * 512 + len(places) - 1 <= len(self.disk):
                data_in = bytes(self.disk[sector * 512 : sector * 512 + len(places) - 1])
            case RequestType.OUT if sector * 512 + len(data_out) <= len(self.disk):
                self.disk[sector * 512 : sector * 512 + len(data_out)] = data_out
            case RequestType.GET_ID:
                data_in = b"small".ljust(20, b"\0")
            case RequestType.DISCARD | RequestType.WRITE_ZEROES:
                for at, sectors, flags in struct.iter_unpack("<QII", data_out):
                    self.log.append(f"range {kind} {at} {sectors} {flags}")
            case RequestType.FLUSH:
                self.log.append("flush")
            case _:
                status = Status.IOERR
        for place, value in zip(places[:-1], data_in, strict=False):
            self.memory_write(place, bytes([value]))
        self.memory_write(places[-1], bytes([status]))
        return len(data_in) + 1

    def interrupt(self, vector: int, cause: IsrStatus) -> None:
        """Signal a vector, or INTx while MSI-X is off."""
        if self.pci[self.msix_at + 3] & 0x80:
            if vector != NO_VECTOR:
                os.eventfd_write(self.irqs[IrqIndex.MSIX, vector], 1)
        else:
            self.isr |= cause
            os.eventfd_write(self.irqs[IrqIndex.INTX, 0], 1)

    def ask_for_reset(self) -> None:
        """Set NEEDS_RESET and tell, from the test's thread."""
        self.common[CommonCfg.CONFIG_GENERATION] += 1
        self.common[CommonCfg.DEVICE_STATUS] |= DeviceStatus.NEEDS_RESET
        self.interrupt(struct.unpack_from("<H", self.common, CommonCfg.CONFIG_MSIX_VECTOR)[0], IsrStatus.CONFIG)


@contextlib.contextmanager
def small_device(**options: Any) -> Iterator[tuple[Connection, GuestMemory, SmallDevice]]:
    """A small device at work, a connection to it, and memory that it has."""
    ours, theirs = socket.socketpair()
    device = SmallDevice(theirs, **options)
    device.start()
    try:
        with Connection(ours, timeout=20.0) as connection, GuestMemory(8 << 20) as memory:
            memory.map_all(connection)
            yield connection, memory, device
    finally:
        device.stop()


@contextlib.contextmanager
def driven(device_options: dict[str, Any] | None = None, **options: Any) -> Iterator[tuple[VirtioBlk, SmallDevice]]:
    """A driver on a small device."""
    with small_device(**device_options or {}) as (connection, memory, device):
        driver = VirtioBlk(connection, memory, timeout=20.0, **options)
        yield driver, device
        driver.close()


WAYS: list[dict[str, Any]] = [
    {},
    {"window": True},
    {"posted": False},
    {"interrupts": Interrupts.MSIX_SHARED},
    {"interrupts": Interrupts.INTX},
    {"interrupts": Interrupts.POLL},
    {"indirect": True},
    {"queue_size": 4},
    {"features": Feature.VERSION_1.mask},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_the_driver_reads_what_it_wrote(options: dict[str, Any]) -> None:
    """Whatever way the driver goes about it, data written is on the disk and comes back."""
    with driven(**options) as (driver, device):
        data = os.urandom(4096)
        driver.write(8, data)
        assert device.disk[8 * 512 : 16 * 512] == data
        assert driver.read(8, 4096) == data
        driver.flush()
        assert "flush" in device.log
        assert driver.get_id() == "small"
        assert driver.capacity == SECTORS
        assert driver.block_size == 512
        assert driver.status == 15


def test_ranges_and_flags_of_discard_and_write_zeroes_are_encoded() -> None:
    """Each range is one segment; only write-zeroes may carry unmap."""
    with driven() as (driver, device):
        driver.discard([(1, 2), (3, 4)])
        driver.write_zeroes([(5, 6)], unmap=True)
        assert [entry for entry in device.log if entry.startswith("range")] == [
            "range 11 1 2 0",
            "range 11 3 4 0",
            "range 13 5 6 1",
        ]


def test_a_failed_request_raises_its_status_and_leaves_the_driver_usable() -> None:
    """StatusError carries the status byte; the next request works."""
    with driven() as (driver, _):
        with pytest.raises(StatusError) as caught:
            driver.read(SECTORS, 512)
        assert caught.value.status is Status.IOERR
        assert driver.read(0, 512) == bytes(512)


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(
    ("framing", "shape"),
    [
        (None, "r16 w512 w1"),
        ([], "r16 w513"),
        ([1, 2, 3], "r1 r2 r3 r10 w513"),
        ([16, 512], "r16 w512 w1"),
        ([7, 9, 0, 256], "r7 r9 w0 w256 w257"),
        (lambda readable, writable: [readable, writable - 3, 2], "r16 w510 w2 w1"),
    ],
)
def test_framing_is_free(framing: Any, shape: str, indirect: bool) -> None:
    """Elements may end at any byte, header and status included, and the request is the same."""
    with driven(indirect=indirect) as (driver, device):
        device.disk[512:1024] = data = os.urandom(512)
        assert driver.call(RequestType.IN, 1, data_in=512, framing=framing) == data
        assert device.log[-1] == f"chain {shape}"


def test_many_requests_in_flight_are_kicked_once_and_all_complete() -> None:
    """A batch is one doorbell; requests may be waited for in any order, and memory is given back."""
    with driven() as (driver, device):
        room = driver.memory.alloc(7 << 20)
        driver.memory.free(room)
        batch = [driver.submit(RequestType.OUT, sector, bytes([sector]) * 512) for sector in range(5)]
        assert driver.kick()
        driver.wait_all(reversed(batch))
        assert [pending.result() for pending in batch] == [b""] * 5
        assert [pending.written for pending in batch] == [1] * 5
        assert device.log.count("kick 0") == 1
        assert device.disk[: 5 * 512 : 512] == bytes(range(5))
        assert driver.memory.alloc(7 << 20) == room


def test_a_chain_longer_than_the_ring_goes_indirect_by_itself() -> None:
    """Without being told, the driver uses a table only when the ring has no room; without the feature it says so."""
    sizes = [1] * 40
    with driven({"queue_max": 8}) as (driver, device):
        driver.call(RequestType.OUT, 0, bytes(512), framing=sizes)
        assert device.log[-1].count("r1 ") == 40
    with driven({"queue_max": 8}, features=Feature.VERSION_1.mask) as (driver, _):
        free = driver.memory.alloc(1)
        driver.memory.free(free)
        with pytest.raises(QueueFull):
            driver.submit(RequestType.OUT, 0, bytes(512), framing=sizes)
        assert driver.memory.alloc(1) == free


def test_raw_chains_go_to_the_device_literally() -> None:
    """submit_raw writes the descriptors it is given; the used length comes back."""
    with driven() as (driver, device):
        block = driver.memory.alloc(PAGE)
        driver.memory.write(block, REQUEST_HEADER.pack(RequestType.FLUSH, 0, 0))
        chain = [Descriptor(block, 16, DescFlag.NEXT), Descriptor(block + 16, 1, DescFlag.WRITE)]
        pending = driver.submit_raw(chain)
        driver.kick()
        assert driver.wait(pending).written == 1
        assert driver.memory.read(block + 16, 1) == b"\0"
        assert "flush" in device.log


def test_each_event_has_the_vector_that_was_asked_for() -> None:
    """Vector 0 is configuration, the queues follow; with too few vectors they share; with one everything does."""
    for vectors, expected in [(3, [0, 1, 2]), (2, [0, 1, 1]), (1, [0, 0, 0])]:
        options = {"vectors": vectors, "queues": 2}
        with driven(options, queues=2) as (driver, device):
            seen = [struct.unpack_from("<H", device.common, CommonCfg.CONFIG_MSIX_VECTOR)[0]]
            seen += [struct.unpack_from("<H", queue, CommonCfg.QUEUE_MSIX_VECTOR)[0] for queue in device.queues]
            assert seen == expected
            assert driver.call(RequestType.GET_ID, data_in=20, queue=1)[:5] == b"small"
            assert "kick 1" in device.log


@pytest.mark.parametrize("mode", [Interrupts.MSIX, Interrupts.MSIX_SHARED, Interrupts.INTX])
def test_a_device_that_needs_a_reset_wakes_the_waiter_and_can_be_revived(mode: Interrupts) -> None:
    """NEEDS_RESET ends a wait at once, by whatever line it comes; init brings the device back."""
    with driven(interrupts=mode) as (driver, device):
        stuck = driver.submit(RequestType.IN, 0, data_in=512)
        driver.queues[0].publish()  # no doorbell: it never completes
        assert DeviceStatus.DRIVER_OK in driver.status  # posted writes have arrived
        device.ask_for_reset()
        with pytest.raises(NeedsReset):
            driver.wait(stuck)
        driver.wait_needs_reset()
        driver.init()
        assert driver.read(0, 512) == bytes(512)


def test_a_queue_reset_forgets_what_was_in_flight() -> None:
    """After reset_queue the ring is new and works; the old request never completes."""
    with driven() as (driver, _):
        lost = driver.submit(RequestType.IN, 0, data_in=512)
        driver.reset_queue()
        assert driver.read(0, 512) == bytes(512)
        assert not lost.done


def test_a_whole_device_reset_is_followed_by_init() -> None:
    """DEVICE_RESET and init, twice in a row, leave a working device with fresh rings."""
    with driven() as (driver, device):
        for _ in range(2):
            driver.connection.device_reset()
            driver.forget()
            driver.init()
        driver.write(0, b"x" * 512)
        assert device.disk[:512] == b"x" * 512


def test_waiting_ends_when_the_server_dies() -> None:
    """A server that goes away while a request is in flight is a ConnectionError at once, not a timeout."""
    with driven() as (driver, device):
        stuck = driver.submit(RequestType.IN, 0, data_in=512)
        device.peer.sock.shutdown(socket.SHUT_RDWR)
        started = time.monotonic()
        with pytest.raises(ConnectionError):
            driver.wait(stuck)
        assert time.monotonic() - started < 10.0


def test_waiting_for_a_silent_device_times_out() -> None:
    """A request that is never completed is a TimeoutError after the time that was given."""
    with driven() as (driver, _):
        stuck = driver.submit(RequestType.IN, 0, data_in=512)
        with pytest.raises(TimeoutError):
            driver.wait(stuck, timeout=0.01)


def test_a_broken_capability_list_is_a_protocol_error() -> None:
    """A capability list that loops, or lacks the common configuration, is refused."""
    with small_device() as (connection, memory, device):
        intact = bytes(device.pci)
        device.pci[0x41] = 0x40
        with pytest.raises(ProtocolError, match="broken"):
            VirtioBlk(connection, memory)
        device.pci[:] = intact
        device.pci[0x43] = 8  # shared memory instead of common configuration
        with pytest.raises(ProtocolError, match="COMMON_CFG"):
            VirtioBlk(connection, memory)


def test_features_are_the_offer_masked_by_what_is_wanted() -> None:
    """The driver accepts no more than was offered and no more than it was told to."""
    wanted = Feature.VERSION_1.mask | Feature.BLK_FLUSH.mask | Feature.RING_PACKED.mask
    with driven(features=wanted) as (driver, device):
        assert driver.features == Feature.VERSION_1.mask | Feature.BLK_FLUSH.mask
        assert not driver.has(Feature.EVENT_IDX)
        assert driver.queues[0].event_idx is False
        assert not any("kick" in entry for entry in device.log)
