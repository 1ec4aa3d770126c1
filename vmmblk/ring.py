"""A virtqueue, split or packed: the typed face of csrc/queue.c.

The life of a queue, told by the loop that serves one::

    queue.clear_kick()                      # the kick was heard
    while True:
        chains = queue.pop()                # at most BATCH; doorbells are armed again when the ring ran dry
        for chain in chains:
            ...                             # use chain.readable_views(), chain.writable_views()
            done += ending(chain.token, status, written)
        queue.complete(done)                # status bytes, used ring, one interrupt if the driver wants one
        if len(chains) < queue.BATCH:
            break                           # a doorbell will come

Each chain is completed exactly once.  One thread, the queue's own, pops and completes.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk._core import ffi, lib

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from vmmblk.memory import Core

__all__ = [
    "PLAIN_READ",
    "Bell",
    "Chain",
    "CorruptRing",
    "LostMemory",
    "Plain",
    "Queue",
    "RingFailure",
    "UnreachableRing",
    "ending",
    "endings",
]

_FLAG_NO_STATUS: int = lib.VMM_CHAIN_NO_STATUS
_FLAG_UNREACHABLE: int = lib.VMM_CHAIN_UNREACHABLE
_FLAG_NO_FD: int = lib.VMM_CHAIN_NO_FD


# struct vmm_plain: one call decodes a batch, where a look at each field would cost more than all the rest.
_PLAIN = struct.Struct("@IIII QQQ")
_ENDING = struct.Struct("@III")  # struct vmm_completion
_NOT_PLAIN: int = lib.VMM_NOT_PLAIN
PLAIN_READ: int = lib.VMM_PLAIN_READ

Plain = tuple[int, int, int, int, int, int, int]
"""token; PLAIN_READ or else a write; alias; bytes that will have been written to guest memory; the disk's own sector;
start and end of the data in the alias."""


ending: Callable[[int, int, int], bytes] = _ENDING.pack
"""How a chain ends, for ``Queue.complete``: token, status byte, bytes of writable data written without a gap."""

endings: Callable[[bytes], Iterator[Any]] = _ENDING.iter_unpack
"""The chains in several endings joined."""


class RingFailure(Exception):
    """A ring can be served no more, until the queue is stopped."""


class CorruptRing(RingFailure):
    """The driver's ring breaks a rule; only a reset repairs that."""


class UnreachableRing(RingFailure):
    """The ring lies in guest memory that came without a file descriptor, so it cannot be reached."""


class LostMemory(RingFailure):
    """Guest memory is gone: the file behind it was truncated, or its file system is full."""


_FAILURES: dict[int, type[RingFailure]] = {
    -errno.EPROTO: CorruptRing,
    -errno.EFAULT: UnreachableRing,
    -errno.EIO: LostMemory,
}


@dataclass(slots=True)
class Chain:
    """A request as it came off the ring.

    ``header`` is up to 16 bytes, copied.  ``readable`` and ``writable`` are the bytes of device-readable data after
    the header and of device-writable data before the status byte.  ``views_in`` and ``views_out`` are those data: the
    guest's own pages, to be let go when the chain has been completed.
    """

    token: int
    flags: int
    header: bytes
    readable: int
    writable: int
    views_in: list[memoryview]
    views_out: list[memoryview]
    addresses: int
    """All the views' host addresses or-ed together: its low bits tell how well they are aligned."""
    error: int = 0
    """errno of the native engine's transfer, if it made one that failed."""

    @property
    def answerable(self) -> bool:
        """False without a byte for the status: the chain goes back with a used length of 0."""
        return not self.flags & _FLAG_NO_STATUS

    @property
    def reachable(self) -> bool:
        """False if part of the data lies outside the guest memory that can be reached."""
        return not self.flags & _FLAG_UNREACHABLE

    @property
    def without_fd(self) -> bool:
        """True if that is because the memory came without a file descriptor."""
        return bool(self.flags & _FLAG_NO_FD)


class Bell:
    """A doorbell that costs no message: an eventfd, ``fd``, that the client gets a copy of, and whoever serves hears.

    With its copy the client can also read it, make it block, and keep it when its connection is over.  So nobody here
    reads it: ``heard_fd``, which only we have, polls readable when it was written (an edge, which a counter that is
    never cleared gives as well).  And each client gets one of its own.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._ear = select.epoll()
        self._ear.register(self.fd, select.EPOLLIN | select.EPOLLET)

    @property
    def heard_fd(self) -> int:
        """An epoll descriptor: looking at what it has to say (``clear``) makes it unreadable again."""
        return self._ear.fileno()

    def clear(self) -> bool:
        """Hear it; False if it has not been rung since."""
        return bool(self._ear.poll(0))

    def renew(self) -> None:
        """From now on ``fd`` is another eventfd, and what is done to copies of the one before is not heard.

        Raises: OSError; then it is deaf, and can be renewed later.
        """
        fresh = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        with contextlib.suppress(FileNotFoundError):  # it is deaf
            self._ear.unregister(self.fd)
        os.dup2(fresh, self.fd, inheritable=False)
        os.close(fresh)
        self._ear.register(self.fd, select.EPOLLIN | select.EPOLLET)

    def close(self) -> None:
        """Close the eventfd; nobody looks at ``heard_fd`` any more."""
        self._ear.close()
        os.close(self.fd)


class Queue:
    """One virtqueue of a device.  ``kick_fd`` is the eventfd that its doorbell writes, ``bell`` that of the client.

    Once it is ``served_by`` an engine, ``pop`` gives only what that hands over.
    """

    BATCH = 64

    def __init__(self, core: Core, index: int) -> None:
        self.index = index
        self.starts = 0
        """How often the queue was started: tells its lives apart."""
        self.kick_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.bell = Bell()
        self.aliases = core.aliases
        """The mappings of guest memory, by number."""
        self.ready_fd = self.kick_fd
        """What tells that there may be something to pop: the doorbell, or the engine that heard it."""
        self.handle = core.queue_handle(index, self.kick_fd)
        """The queue in C."""
        self.timer_fd: int = lib.vmm_queue_timer(self.handle)
        """What tells that ``tell`` is due; the core's.  -1 if interrupts are never held back."""
        self._take: Callable[[Any, int], int] = functools.partial(lib.vmm_queue_pop, self.handle)
        self._look: Callable[[Any, int], int] = functools.partial(lib.vmm_queue_poll, self.handle)
        self._chains = ffi.new("struct vmm_chain[]", self.BATCH)
        self._terms = ffi.new("struct vmm_terms *", (1, 1, 0, False))
        self._plain = ffi.new("struct vmm_plain[]", self.BATCH)
        self._records = memoryview(ffi.buffer(self._plain))
        self._good = ffi.new("struct vmm_completion[]", self.BATCH)
        self._endings = memoryview(ffi.buffer(self._good))

    def close(self) -> None:
        """Close the doorbell.  The queue must be stopped and its thread gone."""
        self.bell.close()
        os.close(self.kick_fd)
        if self.ready_fd != self.kick_fd:
            os.close(self.ready_fd)

    def served_by(self, take: Callable[[Any, int], int], ready_fd: int) -> None:
        """Pop with ``take``, a function of C as vmm_queue_pop, when the eventfd ``ready_fd`` tells; it is ours now."""
        self._take = self._look = take
        self.ready_fd = ready_fd

    def start(
        self,
        *,
        size: int,
        desc: int,
        driver: int,
        device: int,
        vector: int,
        event_idx: bool,
        indirect: bool,
        packed: bool = False,
        in_order: bool = False,
    ) -> None:
        """Start from position 0; ``desc``, ``driver``, ``device`` are the areas' IOVAs ("Virtqueue Configuration").

        A split ring has a power of two of descriptors, a ``packed`` one any number up to 32768.  With ``in_order``
        whoever completes does so in the order of the chains.

        Raises: OSError - EINVAL (size, or started already), EPROTO (misaligned), ENOENT (outside guest memory),
        EFAULT (in memory that came without a file descriptor), EIO (guest memory is gone), ENOMEM.
        """
        config = ffi.new(
            "struct vmm_queue_config *", (size, vector, desc, driver, device, event_idx, indirect, packed, in_order)
        )
        error = lib.vmm_queue_start(self.handle, config)
        if error:
            raise OSError(-error, f"queue {self.index}: {os.strerror(-error)}")
        self.starts += 1

    def stop(self) -> None:
        """Touch the ring no more.  What was in flight must have been drained or orphaned."""
        lib.vmm_queue_stop(self.handle)

    def pause(self, reason: int) -> int:
        """Stop popping for a reason (:class:`~vmmblk.memory.Pause`); returns how many requests are in flight."""
        busy: int = lib.vmm_queue_pause(self.handle, reason)
        return busy

    def resume(self, reason: int) -> None:
        """Take a reason back; the queue is kicked if it may pop again."""
        lib.vmm_queue_resume(self.handle, reason)

    @property
    def busy(self) -> int:
        """Requests in flight that are no orphans."""
        busy: int = lib.vmm_queue_busy(self.handle)
        return busy

    def set_vector(self, vector: int) -> None:
        """queue_msix_vector."""
        lib.vmm_queue_set_vector(self.handle, vector)

    def kick(self) -> None:
        """Have the queue looked at."""
        os.eventfd_write(self.kick_fd, 1)

    def clear_kick(self) -> bool:
        """The kick was heard.  True if the driver's doorbell was among what kicked: one adds 2^32 to the eventfd."""
        try:
            return os.eventfd_read(self.ready_fd) >= 1 << 32
        except BlockingIOError:
            return False

    def forget_doorbells(self) -> None:
        """The queue was reset, and the driver does not know yet: what it has rung is not for the life that comes."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.kick_fd)
        self.bell.clear()

    @property
    def life(self) -> int:
        """Which life of the queue it is, as C counts them: another one as soon as it has started."""
        epoch: int = lib.vmm_queue_epoch(self.handle)
        return epoch

    @property
    def looks_unshared(self) -> bool:
        """A doorbell came, but the ring reads as if it had never been touched: the guest does not share its memory."""
        unshared: bool = lib.vmm_queue_looks_unshared(self.handle)
        return unshared

    def pop(self) -> list[Chain]:
        """Take up to BATCH chains; with fewer, a doorbell will announce the next.

        Raises: CorruptRing, UnreachableRing, LostMemory; they stay until the queue is stopped.
        """
        return [self.chain(index) for index in range(self.take())]

    def take(self, *, arm: bool = True) -> int:
        """As ``pop``, but only how many chains there are, and without ``arm`` no doorbell is asked for.

        Until the next call ``plain`` and ``chain`` tell what they are.  Raises what ``pop`` does.
        """
        n = self._take(self._chains, self.BATCH) if arm else self._look(self._chains, self.BATCH)
        if n < 0:
            raise _FAILURES[n](f"queue {self.index}")
        return n

    def set_terms(self, *, sector_size: int, sectors: int, alignment: int, writable: bool) -> None:
        """What the disk takes, for ``plain``: of a disk of no ``sectors`` nothing is.  From any thread."""
        self._terms = ffi.new("struct vmm_terms *", (sector_size, alignment, sectors, writable))

    def plain(self, count: int) -> tuple[list[Plain], list[int]]:
        """Of the ``count`` chains taken, those that the disk can be given as they are, and which the others are.

        The former read or write whole sectors inside the disk, in one piece of memory that is aligned as it wants.
        """
        found = lib.vmm_chains_plain(self._chains, count, self._terms, self._plain, self._good)
        records: list[Any] = list(_PLAIN.iter_unpack(self._records[: count * _PLAIN.size]))
        if found == count:
            return records, []
        others = [index for index, record in enumerate(records) if record[1] == _NOT_PLAIN]
        return [record for record in records if record[1] != _NOT_PLAIN], others

    def good(self, count: int) -> bytes:
        """The endings of the ``count`` requests that ``plain`` told of, if all goes well."""
        return bytes(self._endings[: count * _ENDING.size])

    def tokens(self, count: int) -> list[int]:
        """Of the ``count`` chains taken."""
        return [self._chains[index].token for index in range(count)]

    def chain(self, index: int) -> Chain:
        """One of the chains taken, with views of its data."""
        chain = self._chains[index]
        split, count = chain.readable_segs, chain.writable_segs
        views: list[memoryview] = []
        addresses = 0
        if not chain.flags & _FLAG_UNREACHABLE:
            for i in range(split + count):
                seg = chain.segs[i]
                mapped = self.aliases[seg.alias]
                views.append((mapped.readable if i < split else mapped.writable)[seg.offset : seg.offset + seg.len])
                addresses |= int(ffi.cast("uintptr_t", seg.host))
        header = bytes(ffi.buffer(chain.header))[: chain.header_len]
        return Chain(
            chain.token,
            chain.flags,
            header,
            chain.readable,
            chain.writable,
            views[:split],
            views[split:],
            addresses,
            chain.error,
        )

    def complete(self, done: bytes | bytearray) -> None:
        """Complete chains, by the ``ending`` of each."""
        lib.vmm_queue_complete(self.handle, ffi.from_buffer("struct vmm_completion[]", done), len(done) // _ENDING.size)
        if self.timer_fd >= 0:
            self.tell()

    def tell(self) -> None:
        """Raise the interrupt that was held back for long enough; ``timer_fd`` tells when there is another."""
        may_sleep = True
        lib.vmm_queue_tell(self.handle, may_sleep)
