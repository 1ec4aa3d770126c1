"""A connection to a vfio-user server, as a VMM holds it.

One thread, one socket, one message at a time in each direction; ``send`` and ``wait`` are there apart from
``request`` so that messages can be pipelined.  The server may send commands of its own (DMA_READ, DMA_WRITE, for
memory it was given without a descriptor): they are answered whenever the connection is read.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from vmmblk.client import wire
from vmmblk.client.errors import ProtocolError, RemoteError
from vmmblk.client.wire import Command, DmaFlag, Header, HeaderFlag, IrqSetFlag, Message

if TYPE_CHECKING:
    import struct
    from collections.abc import Mapping, Sequence

__all__ = ["VMM_CAPABILITIES", "Connection", "DeviceInfo", "DmaTarget", "IoFd", "IrqInfo", "RegionInfo", "RegionIoFds"]

VMM_CAPABILITIES: Mapping[str, Any] = {
    "max_msg_fds": 16,
    "max_data_xfer_size": 1 << 20,
    "max_dma_maps": 65535,
    "pgsizes": 4096,
    "migration": {"pgsize": 4096, "max_bitmap_size": 256 << 20},
}
"""What the client says it can do; the values of QEMU's client."""

_FDS_MAX = 16


class DmaTarget(Protocol):
    """Memory that serves the server's DMA_READ and DMA_WRITE messages; raises ValueError for a bad range."""

    def read(self, iova: int, length: int) -> bytes:
        """The bytes at ``iova``."""

    def write(self, iova: int, data: bytes) -> None:
        """Store ``data`` at ``iova``."""


class DeviceInfo(NamedTuple):
    """The answer to GET_INFO."""

    flags: int
    num_regions: int
    num_irqs: int


class RegionInfo(NamedTuple):
    """The answer to GET_REGION_INFO.

    ``argsz`` is what the whole answer needs; ``capabilities`` are the bytes after the fixed part.  The caller owns
    ``fds``.
    """

    argsz: int
    flags: int
    size: int
    offset: int
    capabilities: bytes
    fds: tuple[int, ...]


class IoFd(NamedTuple):
    """A descriptor that stands for accesses of ``size`` bytes at ``offset`` of a region (0: of any size).

    ``fd`` is the number of a descriptor in :class:`RegionIoFds`; ``type`` 0 is an eventfd.
    """

    offset: int
    size: int
    fd: int
    type: int
    flags: int


class RegionIoFds(NamedTuple):
    """The answer to GET_REGION_IO_FDS.

    ``argsz`` is what the whole answer needs, ``total`` how many sub-regions there are; with less room than that there
    are none of them.  The caller owns ``fds``.
    """

    argsz: int
    total: int
    sub_regions: tuple[IoFd, ...]
    fds: tuple[int, ...]


class IrqInfo(NamedTuple):
    """The answer to GET_IRQ_INFO."""

    flags: int
    vectors: int


class Connection:
    """The client's end of a vfio-user socket.

    ``address`` is the path of the server's socket, or a connected socket, which the connection then owns.
    ``timeout`` is how long a reply may take, seconds; it may be changed at any time.  With ``negotiate=False``
    nothing is sent.

    Every method that reads may raise TimeoutError, ConnectionError (the server is gone) or ProtocolError;
    those that get a reply raise RemoteError when it is an error.
    """

    def __init__(
        self,
        address: str | os.PathLike[str] | socket.socket,
        timeout: float = 5.0,
        *,
        capabilities: Mapping[str, Any] = VMM_CAPABILITIES,
        negotiate: bool = True,
    ) -> None:
        self.timeout = timeout
        self.dma_target: DmaTarget | None = None
        self.server_capabilities: dict[str, Any] = {}
        self.max_msg_fds = 8  # what QEMU's client assumes until told
        self._next_id = 0
        self._inbox = bytearray()
        self._inbox_fds: list[int] = []
        self._arrived: deque[Message] = deque()
        self._socket = address if isinstance(address, socket.socket) else _connect(address, timeout)
        if negotiate:
            try:
                self._negotiate(capabilities)
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def fileno(self) -> int:
        """The socket's descriptor, for poll()."""
        return self._socket.fileno()

    def abort(self) -> None:
        """Make whoever reads or writes fail from now on, with ConnectionError.  From any thread, until ``close``."""
        with contextlib.suppress(OSError):  # the server has closed it already
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and every descriptor that was received and not taken."""
        self._socket.close()
        for message in self._arrived:
            _close_all(message.fds)
        self._arrived.clear()
        _close_all(self._inbox_fds)
        self._inbox_fds.clear()

    # Messages.

    def send(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), *, no_reply: bool = False) -> int:
        """Send a command and return its message id, without waiting for a reply."""
        msg_id = self._next_id
        self._next_id = (msg_id + 1) & 0xFFFF
        flags = HeaderFlag.NO_REPLY if no_reply else 0
        self.send_raw(wire.encode(msg_id, command, payload, flags), fds)
        return msg_id

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send any bytes, well formed or not, with descriptors beside them."""
        self._socket.settimeout(self.timeout)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        sent = self._socket.sendmsg([data], rights)
        if sent < len(data):
            self._socket.sendall(memoryview(data)[sent:])

    def receive(self, timeout: float | None = None) -> Message:
        """The next message to us that is no command, errors included; in the order of arrival."""
        if self._arrived:
            return self._arrived.popleft()
        return self._next_reply(time.monotonic() + (self.timeout if timeout is None else timeout))

    def wait(self, msg_id: int) -> Message:
        """The reply to the message ``msg_id``; other replies are kept for later."""
        for message in self._arrived:
            if message.header.msg_id == msg_id:
                self._arrived.remove(message)
                return _checked(message)
        deadline = time.monotonic() + self.timeout
        while (message := self._next_reply(deadline)).header.msg_id != msg_id:
            self._arrived.append(message)
        return _checked(message)

    def request(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> tuple[bytes, tuple[int, ...]]:
        """Send a command and wait for its reply: payload and descriptors, which the caller owns."""
        message = self.wait(self.send(command, payload, fds))
        return message.payload, message.fds

    def pump(self) -> None:
        """Take one message that is known to be on its way (the socket polls readable); answer it or keep it."""
        message = self._next_message(time.monotonic() + self.timeout)
        if message.is_reply:
            self._arrived.append(message)
        else:
            self._serve(message)

    # Commands.

    def dma_map(self, iova: int, size: int, fd: int | None, offset: int = 0, flags: int = 3) -> None:
        """Give the device ``size`` bytes of guest memory at ``iova``; ``fd`` None gives no way to reach them."""
        payload = wire.encode_dma_map(iova, size, offset, DmaFlag(flags))
        self._simple(Command.DMA_MAP, payload, () if fd is None else (fd,))

    def dma_unmap(self, iova: int, size: int) -> None:
        """Take back what was mapped at ``iova``."""
        self._simple(Command.DMA_UNMAP, wire.encode_dma_unmap(iova, size))

    def get_info(self) -> DeviceInfo:
        """What kind of device it is."""
        payload = self._simple(Command.DEVICE_GET_INFO, wire.DEVICE_INFO.pack(wire.DEVICE_INFO.size, 0, 0, 0))
        _, *info = _unpack(wire.DEVICE_INFO, payload)
        return DeviceInfo(*info)

    def region_info(self, index: int, argsz: int = wire.REGION_INFO.size) -> RegionInfo:
        """A region; a bigger ``argsz`` leaves room for its capabilities."""
        ask = wire.REGION_INFO.pack(argsz, 0, index, 0, 0, 0)
        payload, fds = self.request(Command.DEVICE_GET_REGION_INFO, ask)
        try:
            needed, flags, _, _, size, offset = _unpack(wire.REGION_INFO, payload)
        except ProtocolError:
            _close_all(fds)
            raise
        return RegionInfo(needed, flags, size, offset, payload[wire.REGION_INFO.size :], fds)

    def region_io_fds(self, index: int, argsz: int = wire.IO_FDS.size) -> RegionIoFds:
        """The descriptors that stand for accesses to a region; a bigger ``argsz`` leaves room for them."""
        ask = wire.IO_FDS.pack(argsz, 0, index, 0)
        payload, fds = self.request(Command.DEVICE_GET_REGION_IO_FDS, ask)
        try:
            needed, _, _, total = _unpack(wire.IO_FDS, payload)
            return RegionIoFds(needed, total, _sub_regions(payload[wire.IO_FDS.size :], total, fds), fds)
        except ProtocolError:
            _close_all(fds)
            raise

    def irq_info(self, index: int) -> IrqInfo:
        """A kind of interrupt: how many vectors the device has of it."""
        payload = self._simple(Command.DEVICE_GET_IRQ_INFO, wire.IRQ_INFO.pack(wire.IRQ_INFO.size, 0, index, 0))
        _, flags, _, count = _unpack(wire.IRQ_INFO, payload)
        return IrqInfo(flags, count)

    def set_irqs(self, index: int, start: int, fds: Sequence[int | None]) -> None:
        """Set the eventfds of interrupts ``start`` and up, as few messages as the server's limit allows.

        None takes an interrupt's eventfd away, in a message of its own, as QEMU does.  The fds stay the caller's.
        """
        flags = IrqSetFlag.DATA_EVENTFD | IrqSetFlag.ACTION_TRIGGER
        position = 0
        while position < len(fds):
            run: list[int] = []
            for fd in fds[position : position + self.max_msg_fds]:
                if fd is None:
                    break
                run.append(fd)
            count = max(len(run), 1)
            self._simple(Command.DEVICE_SET_IRQS, wire.encode_set_irqs(index, start + position, count, flags), run)
            position += count

    def disable_irqs(self, index: int) -> None:
        """Take away every eventfd of this kind of interrupt."""
        flags = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_TRIGGER
        self._simple(Command.DEVICE_SET_IRQS, wire.encode_set_irqs(index, 0, 0, flags))

    def unmask_irqs(self, index: int, start: int = 0, count: int = 1) -> None:
        """Unmask interrupts; QEMU does it for INTx at every register access while one is pending."""
        flags = IrqSetFlag.DATA_NONE | IrqSetFlag.ACTION_UNMASK
        self._simple(Command.DEVICE_SET_IRQS, wire.encode_set_irqs(index, start, count, flags))

    def region_read(self, region: int, offset: int, length: int) -> bytes:
        """Read ``length`` bytes of a region in one access."""
        payload = self._simple(Command.REGION_READ, wire.encode_region_read(region, offset, length))
        *_, count = _unpack(wire.REGION_ACCESS, payload)
        data = payload[wire.REGION_ACCESS.size :]
        if count != length or len(data) != length:
            raise ProtocolError(f"asked for {length} bytes of region {region}, got {count} and {len(data)}")
        return data

    def region_write(self, region: int, offset: int, data: bytes, *, posted: bool = False) -> None:
        """Write to a region in one access; ``posted`` asks for no reply and does not wait."""
        payload = wire.encode_region_write(region, offset, data)
        if posted:
            self.send(Command.REGION_WRITE, payload, no_reply=True)
        else:
            self._simple(Command.REGION_WRITE, payload)

    def device_reset(self) -> None:
        """Reset the whole device (DEVICE_RESET)."""
        self._simple(Command.DEVICE_RESET)

    # The inside.

    def _simple(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> bytes:
        reply, unexpected = self.request(command, payload, fds)
        _close_all(unexpected)
        return reply

    def _negotiate(self, capabilities: Mapping[str, Any]) -> None:
        text = json.dumps({"capabilities": capabilities}).encode() + b"\0"
        reply = self._simple(Command.VERSION, wire.VERSION.pack(0, 0) + text)
        major, minor = _unpack(wire.VERSION, reply)
        if (major, minor) != (0, 0):
            raise ProtocolError(f"server speaks vfio-user {major}.{minor}, not 0.0")
        body = reply[wire.VERSION.size :]
        if not body:
            return
        if body[-1] != 0:
            raise ProtocolError("the server's capabilities lack the terminating NUL")
        try:
            self.server_capabilities = dict(json.loads(body[:-1])["capabilities"])
            offered = int(self.server_capabilities.get("max_msg_fds", self.max_msg_fds))
        except (ValueError, KeyError, TypeError) as error:
            raise ProtocolError(f"bad capabilities in the server's version reply: {error}") from error
        self.max_msg_fds = max(1, min(offered, _FDS_MAX))

    def _next_reply(self, deadline: float) -> Message:
        while not (message := self._next_message(deadline)).is_reply:
            self._serve(message)
        return message

    def _next_message(self, deadline: float) -> Message:
        """Read exactly one message; what has arrived of it survives a TimeoutError."""
        while (missing := self._missing()) > 0:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError("no message from the server in time")
            self._socket.settimeout(remaining)
            data, fds, *_ = socket.recv_fds(self._socket, missing, _FDS_MAX, socket.MSG_CMSG_CLOEXEC)
            self._inbox_fds += fds
            if not data:
                raise ConnectionResetError("the server closed the connection")
            self._inbox += data
        header = wire.decode_header(self._inbox)
        message = Message(header, bytes(self._inbox[wire.HEADER.size :]), tuple(self._inbox_fds))
        self._inbox.clear()
        self._inbox_fds.clear()
        return message

    def _missing(self) -> int:
        if len(self._inbox) < wire.HEADER.size:
            return wire.HEADER.size - len(self._inbox)
        size = wire.decode_header(self._inbox).size
        if not wire.HEADER.size <= size <= wire.MESSAGE_SIZE_MAX:
            raise ProtocolError(f"message of {size} bytes from the server")
        return size - len(self._inbox)

    def _serve(self, message: Message) -> None:
        """Answer a command of the server's."""
        _close_all(message.fds)
        header, payload, error = message.header, b"", 0
        try:
            payload = self._dma(header, message.payload)
        except (ValueError, OverflowError):
            error = errno.EFAULT
        except NotImplementedError:
            error = errno.ENOTSUP
        if not header.flags & HeaderFlag.NO_REPLY:
            flags = HeaderFlag.REPLY | (HeaderFlag.ERROR if error else 0)
            self.send_raw(wire.encode(header.msg_id, header.command, payload, flags, error))

    def _dma(self, header: Header, payload: bytes) -> bytes:
        if self.dma_target is None or header.command not in (Command.DMA_READ, Command.DMA_WRITE):
            raise NotImplementedError
        iova, count = _unpack(wire.DMA_ACCESS, payload)
        data = payload[wire.DMA_ACCESS.size :]
        if header.command == Command.DMA_READ:
            return wire.DMA_ACCESS.pack(iova, count) + self.dma_target.read(iova, count)
        if len(data) != count:
            raise ValueError("DMA_WRITE with the wrong amount of data")
        self.dma_target.write(iova, data)
        return wire.DMA_ACCESS.pack(iova, count)


def _sub_regions(body: bytes, count: int, fds: Sequence[int]) -> tuple[IoFd, ...]:
    """What a list of sub-regions says; its elements are of one size, which is not known beforehand."""
    if not body:
        return ()
    step, rest = divmod(len(body), max(count, 1))
    if rest or step < wire.IO_FD.size:
        raise ProtocolError(f"{len(body)} bytes do not tell of {count} sub-regions")
    found = []
    for at in range(0, len(body), step):
        offset, size, index, kind, flags = wire.IO_FD.unpack_from(body, at)
        if index >= len(fds):
            raise ProtocolError(f"a sub-region names descriptor {index} of {len(fds)}")
        found.append(IoFd(offset, size, fds[index], kind, flags))
    return tuple(found)


def _connect(path: str | os.PathLike[str], timeout: float) -> socket.socket:
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.settimeout(timeout)
        connected.connect(os.fspath(path))
    except BaseException:
        connected.close()
        raise
    return connected


def _checked(message: Message) -> Message:
    if message.header.flags & HeaderFlag.ERROR:
        _close_all(message.fds)
        raise RemoteError(message.header.error, message.header.command)
    return message


def _unpack(layout: struct.Struct, payload: bytes) -> tuple[int, ...]:
    if len(payload) < layout.size:
        raise ProtocolError(f"reply of {len(payload)} bytes where {layout.size} are needed")
    return tuple(layout.unpack_from(payload))


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
