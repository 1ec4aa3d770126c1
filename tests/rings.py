"""A driver's ring and the core that serves it, in one process: guest memory mapped as the transport maps it."""

from __future__ import annotations

import mmap
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from vmmblk._core import ffi

from vmmblk.client.memory import PAGE, GuestMemory, Range
from vmmblk.client.queue import Descriptor, PackedQueue, Segment, SplitQueue
from vmmblk.memory import Core, Pause, Region
from vmmblk.ring import Chain, Queue, ending
from vmmblk.spec import NO_VECTOR, DescFlag

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HEADER = bytes(range(1, 17))
CORE_QUEUE_SIZE = 1024
RW = mmap.PROT_READ | mmap.PROT_WRITE
NEXT, WRITE, INDIRECT = DescFlag.NEXT, DescFlag.WRITE, DescFlag.INDIRECT


class Life(NamedTuple):
    """How a queue was started."""

    size: int = 16
    event_idx: bool = False
    indirect: bool = True
    packed: bool = False
    in_order: bool = False


DEFAULT_LIFE = Life()


class Rig:
    """A core with ``queues`` queues over guest memory, and the driver's side of them; a context manager.

    ``layout`` is the guest's memory, mapped as ``pieces`` (default: each range whole); ``vectors`` are the interrupts
    that came.
    """

    def __init__(
        self,
        *,
        layout: Sequence[Range] = (Range(0, 1 << 20),),
        pieces: Sequence[Range] | None = None,
        queues: int = 1,
        life: Life = DEFAULT_LIFE,
        start: bool = True,
        coalesce: tuple[int, int] | None = None,
    ) -> None:
        self.memory = GuestMemory(sum(piece.size for piece in layout), layout)
        self.core = Core(queues, CORE_QUEUE_SIZE)
        if coalesce is not None:
            self.core.coalesce(*coalesce)
        self.vectors: list[int] = []
        self._sink = ffi.callback("void(void *, uint32_t)", lambda _, vector: self.vectors.append(vector))
        self.core.irq_sink(int(ffi.cast("uintptr_t", self._sink)), 0)
        self.core.set_msix(on=True)
        self.mapped: list[Range] = []
        for piece in self.memory.layout if pieces is None else pieces:
            self.map(piece)
        self.queues = [Queue(self.core, index) for index in range(queues)]
        self.life = life
        self.rings: list[Any] = [self.new_ring(index) for index in range(queues)]
        if start:
            for index in range(queues):
                self.start(index)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        for queue in self.queues:
            queue.stop()
        for piece in list(self.mapped):
            self.unmap(piece)
        for queue, ring in zip(self.queues, self.rings, strict=True):
            queue.close()
            ring.close()
        self.core.close()
        self.memory.close()

    @property
    def queue(self) -> Queue:
        """The device's first queue."""
        return self.queues[0]

    def new_ring(self, index: int) -> SplitQueue | PackedQueue:
        """The driver's side of a queue, in guest memory."""
        layout = PackedQueue if self.life.packed else SplitQueue
        return layout(self.memory, index, self.life.size, event_idx=self.life.event_idx)

    @property
    def ring(self) -> Any:
        """The driver's first queue: a SplitQueue or a PackedQueue."""
        return self.rings[0]

    # -- the transport's part

    def region(self, piece: Range, *, prot: int = RW, fd: bool = True) -> Region:
        """``piece`` of guest memory as the transport describes it."""
        host = self.memory.address(*piece) if fd else 0
        return Region(piece.iova, piece.size, host, host, piece.size if fd else 0, PAGE if fd else 0, prot)

    def map(self, piece: Range, *, prot: int = RW, fd: bool = True) -> None:
        """Map a piece of guest memory, with a descriptor or without."""
        self.core.map(self.region(piece, prot=prot, fd=fd))
        self.mapped.append(piece)

    def unmap(self, piece: Range) -> None:
        """Unmap what was mapped."""
        self.core.unmap(*piece)
        self.mapped.remove(piece)

    @contextmanager
    def quiesced(self) -> Iterator[None]:
        """Pause the queues, as around every map and unmap."""
        self.core.pause(Pause.QUIESCE)
        yield
        self.core.resume(Pause.QUIESCE)

    def remap(self, piece: Range, *, prot: int = RW, fd: bool = True) -> None:
        """Unmap and map again, perhaps otherwise."""
        with self.quiesced():
            self.unmap(piece)
            self.map(piece, prot=prot, fd=fd)

    def start(self, index: int = 0, **changes: Any) -> None:
        """Start a queue on the driver's ring."""
        ring = self.rings[index]
        config = {
            "size": self.life.size,
            "desc": ring.desc,
            "driver": ring.avail,
            "device": ring.used,
            "vector": index,
            "event_idx": self.life.event_idx,
            "indirect": self.life.indirect,
            "packed": self.life.packed,
            "in_order": self.life.in_order,
        }
        self.queues[index].start(**{**config, **changes})

    def restart(self) -> None:
        """Reset the first queue: a new ring in place of the old."""
        self.queue.stop()
        self.ring.close()
        self.rings[0] = self.new_ring(0)
        self.start()

    # -- the driver's part

    def put(self, data: bytes, *, align: int = 16) -> int:
        """Guest memory that holds ``data``; returns its address."""
        iova = self.memory.alloc(max(len(data), 1), align)
        self.memory.write(iova, data)
        return iova

    def readable(self, data: bytes) -> Segment:
        """An element for the device to read."""
        return Segment(self.put(data), len(data), writable=False)

    def writable(self, length: int) -> Segment:
        """An element for the device to write, filled with 0xEE."""
        return Segment(self.put(b"\xee" * length), length, writable=True)

    def offer(self, *segments: Segment, table: int | None = None) -> int:
        """Make a chain available; returns its head."""
        head = self.ring.add(segments, table)
        self.ring.publish()
        return head

    def offer_raw(self, *descriptors: Descriptor) -> int:
        """Make descriptors available as they stand; returns the head."""
        head = self.ring.add_raw(descriptors)
        self.ring.publish()
        return head

    def request(self, data: bytes = b"", room: int = 0) -> int:
        """Make a request available: a header, data to write, room to read into, a status byte.  Returns its head."""
        parts = [self.readable(HEADER), *([self.readable(data)] if data else [])]
        return self.offer(*parts, *([self.writable(room)] if room else []), self.writable(1))

    def plain(self) -> tuple[Descriptor, Descriptor]:
        """Two descriptors of a sound request: a header and a status byte."""
        header, status = self.readable(HEADER), self.writable(1)
        return Descriptor(header.iova, 16, NEXT), Descriptor(status.iova, 1, WRITE)

    def table(self, *descriptors: Descriptor) -> int:
        """An indirect table, literally; in a packed ring next is the buffer id."""
        entries = b""
        for index, d in enumerate(descriptors):
            tail = (int(d.flags), index + 1 if d.next is None else d.next)
            entries += d.address.to_bytes(8, "little") + d.length.to_bytes(4, "little")
            entries += b"".join(word.to_bytes(2, "little") for word in (reversed(tail) if self.life.packed else tail))
        return self.put(entries)

    # -- the device's part

    def pop_one(self) -> Chain:
        """Pop the one chain that there is."""
        (chain,) = self.queue.pop()
        return chain

    def complete(self, *chains: Chain, status: int = 0, written: int = 0) -> None:
        """Complete chains alike."""
        self.queue.complete(b"".join(ending(chain.token, status, written) for chain in chains))

    def serve(self, written: int = 0) -> list[tuple[int, int]]:
        """Pop and complete what there is; returns what the driver got: (head, length)."""
        while chains := self.queue.pop():
            self.complete(*chains, written=written)
            del chains
        return self.ring.get_used()

    def kicked(self, index: int = 0) -> bool:
        """Whether a queue's doorbell rang since this was last asked."""
        return rang(self.queues[index].kick_fd)


def rang(fd: int) -> bool:
    """Whether an eventfd was written since this was last asked."""
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


def mapping_at(address: int) -> str:
    """The line of /proc/self/maps that ``address`` lies in, or an empty string."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            return line
    return ""


__all__ = [
    "CORE_QUEUE_SIZE",
    "HEADER",
    "INDIRECT",
    "NEXT",
    "NO_VECTOR",
    "PAGE",
    "RW",
    "WRITE",
    "Descriptor",
    "Life",
    "Range",
    "Rig",
    "Segment",
    "mapping_at",
    "rang",
]
