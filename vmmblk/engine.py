"""The native engine: queues whose disk is memory, a file or nothing, served in C (csrc/engine.c).

It reads and writes what the disk is made of (:class:`~vmmblk.block.Native`), flushes, discards and zeroes; whatever
is not plainly good comes to the worker, as do requests that fail, so both ways give the same answers.
"""

from __future__ import annotations

import functools
import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk._core import ffi, lib
from vmmblk.block import Block, Native, Operation, Substance, SupportsNative, operations

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from vmmblk.ring import Queue

__all__ = ["Engine", "EngineOptions", "native"]

log = logging.getLogger("vmmblk.engine")

_POLL_ALWAYS = (1 << 64) - 1

_KINDS = {
    Substance.NOTHING: lib.VMM_TARGET_NULL,
    Substance.MEMORY: lib.VMM_TARGET_MEMORY,
    Substance.FILE: lib.VMM_TARGET_FILE,
}


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How the engine works.

    ``poll_us`` microseconds are spent looking for more before a thread sleeps, fewer when that was in vain if
    ``adaptive``; None is for ever.  ``threads``, at most one for each queue, share the queues; each runs on its own of
    ``cpus`` if there are any.  Without ``uring`` what would wait is done by threads of the disk.
    """

    poll_us: int | None = 200
    adaptive: bool = True
    threads: int = 64
    cpus: tuple[int, ...] = ()
    uring: bool = True


def native(block: Block) -> Native | None:
    """What ``block`` is made of, if an engine can serve it."""
    return block.native() if isinstance(block, SupportsNative) else None


def _flush(block: Block, made_of: Native) -> int:
    if Operation.FLUSH not in operations(block):
        needless: int = lib.VMM_FLUSH_NEEDLESS
        return needless
    sync: int = lib.VMM_FLUSH_SYNC if Operation.FLUSH in made_of.operations else lib.VMM_FLUSH_HAND_OVER
    return sync


class Engine:
    """Serves ``queues``, of at most ``queue_size`` descriptors each, from ``made_of``, which ``block`` is made of.

    It must have been stopped before ``block`` is disconnected.
    """

    def __init__(
        self, block: Block, made_of: Native, queues: Sequence[Queue], queue_size: int, options: EngineOptions
    ) -> None:
        self._made_of = made_of
        self._options = options
        offered = made_of.operations & operations(block)
        target = {
            "kind": _KINDS[made_of.substance],
            "sector_size": block.info.sector_size,
            "memory": made_of.address,
            "fd": made_of.fileno,
            "alignment": block.buffer_alignment,
            "writable": block.info.read_write,
            "direct": made_of.direct,
            "in_memory": made_of.in_memory,
            "bounce": block.bounce,
            "discards": Operation.DISCARD in offered,
            "zeroes": Operation.WRITE_ZEROES in offered,
            "flush": _flush(block, made_of),
            "lost": made_of.lost,
        }
        settings = {
            "poll_ns": _POLL_ALWAYS if options.poll_us is None else options.poll_us * 1000,
            "poll_adaptive": options.adaptive and options.poll_us is not None,
            "uring": options.uring,
            "threads": options.threads,
            "queue_size_max": queue_size,
        }
        ready = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in queues]
        self._handle: Any = lib.vmm_engine_new(
            ffi.new("struct vmm_target *", target),
            ffi.new("struct vmm_engine_options *", settings),
            [queue.handle for queue in queues],
            ready,
            len(queues),
        )
        if self._handle == ffi.NULL:
            for each in ready:
                os.close(each)
            raise MemoryError
        for index, queue in enumerate(queues):
            lane = lib.vmm_engine_lane(self._handle, index)
            lib.vmm_lane_set_bell(lane, queue.bell.heard_fd)
            queue.served_by(functools.partial(lib.vmm_lane_take, lane), ready[index])
        self.resize(block.info.size_bytes)

    @property
    def waits(self) -> str:
        """What becomes of what would wait: "io_uring", or why it goes through threads; empty if nothing waits."""
        if self._made_of.substance is not Substance.FILE:
            return ""
        if not self._options.uring:
            return "threads"
        error = lib.vmm_engine_uring_error(self._handle)
        return f"threads (no io_uring: {os.strerror(error)})" if error else "io_uring"

    def start(self) -> None:
        """Begin to serve.  Raises: OSError."""
        if self.waits.startswith("threads ("):
            log.warning("%s; allow io_uring (kernel.io_uring_disabled, seccomp) for speed", self.waits)
        error = lib.vmm_engine_start(self._handle, list(self._options.cpus), len(self._options.cpus))
        if error:
            raise OSError(-error, f"the engine's threads cannot start: {os.strerror(-error)}")

    def stop(self) -> None:
        """Have the threads end when nothing of theirs is under way; the queues are paused for good."""
        lib.vmm_engine_stop(self._handle)

    def join(self, timeout: float) -> bool:
        """Wait for the threads to end; False if they have not within ``timeout`` seconds."""
        ended: bool = lib.vmm_engine_join(self._handle, int(timeout * 1000))
        return ended

    def close(self) -> None:
        """Free it; the threads have ended, and nobody pops any more."""
        lib.vmm_engine_free(self._handle)
        self._handle = ffi.NULL

    def resize(self, size: int) -> None:
        """The disk has ``size`` bytes.  From any thread."""
        lib.vmm_engine_resize(self._handle, size)

    def set_write_cache(self, on: bool) -> None:
        """Whether completed writes may be volatile until the next flush.  From any thread."""
        lib.vmm_engine_set_write_cache(self._handle, on)

    def limit(self, discard: tuple[int, int], write_zeroes: tuple[int, int]) -> None:
        """What the driver may ask for: sectors of 512 bytes in a segment, and segments; zeroes for what it may not.

        From any thread, before the queues start.
        """
        lib.vmm_engine_limit(self._handle, *discard, *write_zeroes)

    def enable(self, on: bool) -> None:
        """Off, every request is handed over.  From any thread."""
        lib.vmm_engine_enable(self._handle, on)

    def write_failed(self, error: OSError) -> None:
        """Tell the disk of a write of the engine's that failed."""
        if self._made_of.write_failed is not None:
            self._made_of.write_failed(error)
