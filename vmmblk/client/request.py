"""Block requests as a driver lays them out in guest memory, framed at any byte.

A request is two runs of bytes: what the device reads (header and data) and what it writes (data and status).  Each
run lies contiguous in memory, with the data on a page boundary, and can be cut into elements anywhere
("Message Framing").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from vmmblk.client.errors import StatusError
from vmmblk.client.memory import PAGE
from vmmblk.client.queue import Segment
from vmmblk.spec import REQUEST_HEADER, Status

if TYPE_CHECKING:
    from vmmblk.client.memory import GuestMemory

__all__ = ["UNSET_STATUS", "Framing", "Pending", "Request", "cut", "default_framing"]

Framing = Sequence[int] | Callable[[int, int], Sequence[int]]
"""Sizes of the elements, bytes, readable ones first; or a function of the readable and the writable total.

Whatever the sizes leave over is one more element, and an element never spans both directions.
"""

UNSET_STATUS = 0xFF
"""What the status byte holds until the device stores one."""

_POISON = b"\xa5"  # what the device did not write must not look like what was there before


@dataclass(frozen=True, slots=True)
class Request:
    """A request to be: its header, what it carries out and how many bytes it takes in."""

    type: int
    sector: int = 0
    data_out: bytes = b""
    data_in: int = 0
    reserved: int = 0

    @property
    def readable(self) -> bytes:
        """All that the device reads."""
        return REQUEST_HEADER.pack(self.type, self.reserved, self.sector) + self.data_out


@dataclass(eq=False, slots=True)
class Pending:
    """A chain that was given to the device.

    ``readable`` and ``writable`` are the IOVAs of its two runs (0 for a raw chain, which has none of ours);
    ``status`` is None until it is done, and for a raw chain for ever; ``written`` is the used length.
    """

    queue: int
    head: int = -1
    readable: int = 0
    writable: int = 0
    data_in: int = 0
    allocations: list[int] = field(default_factory=list)
    done: bool = False
    written: int = 0
    status: int | None = None
    data: bytes = b""

    def result(self) -> bytes:
        """What was read.  Raises StatusError unless the status is OK."""
        if self.status != Status.OK:
            raise StatusError(UNSET_STATUS if self.status is None else self.status)
        return self.data

    def place(self, memory: GuestMemory, request: Request) -> None:
        """Put ``request`` into ``memory``; it stays there until ``finish`` or ``release``."""
        data_out = _pages(len(request.data_out))
        block = memory.alloc(PAGE + data_out + _pages(request.data_in + 1))
        self.allocations.append(block)
        self.readable = block + PAGE - REQUEST_HEADER.size
        self.writable = block + PAGE + data_out
        self.data_in = request.data_in
        memory.write(self.readable, request.readable)
        memory.write(self.writable, _POISON * request.data_in + bytes([UNSET_STATUS]))

    def finish(self, memory: GuestMemory, written: int) -> None:
        """Take the outcome out of memory, and give the memory back."""
        self.done = True
        self.written = written
        if self.writable:
            outcome = memory.read(self.writable, self.data_in + 1)
            self.data, self.status = outcome[:-1], outcome[-1]
        self.release(memory)

    def release(self, memory: GuestMemory) -> None:
        """Give the memory back."""
        for iova in self.allocations:
            memory.free(iova)
        self.allocations.clear()


def default_framing(request: Request, size_max: int) -> list[int]:
    """Header, data and status each on their own, as most drivers do; data in elements of at most ``size_max``."""
    out, data_in = len(request.data_out), request.data_in
    return [REQUEST_HEADER.size, *_pieces(out, size_max), *_pieces(data_in, size_max)]


def cut(pending: Pending, request: Request, framing: Framing) -> list[Segment]:
    """The elements of a placed request."""
    readable, writable = REQUEST_HEADER.size + len(request.data_out), request.data_in + 1
    sizes = list(framing(readable, writable) if callable(framing) else framing)
    segments: list[Segment] = []
    for start, total, is_writable in ((pending.readable, readable, False), (pending.writable, writable, True)):
        position = 0
        while position < total:
            size = min(sizes.pop(0) if sizes else total, total - position)
            segments.append(Segment(start + position, size, is_writable))
            position += size
    return segments


def _pieces(total: int, largest: int) -> list[int]:
    return [min(largest, total - start) for start in range(0, total, largest)]


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
