"""Guest memory and the device core: the typed face of csrc/memory.c and csrc/device.c.

The core maps each region of guest memory a second time, the region's *alias*, and gives it a number.  A segment of a
request names its alias, and :attr:`Core.aliases` tells the views of the guest's own pages for it.  An alias outlives
its region: when guest memory is taken back, anonymous memory takes the alias's place, and the address range is freed
when the last view of it is gone.  So a block that keeps a view for ever harms nobody.

Threads: the transport thread calls everything here; the thread that pops looks up the aliases of chains in flight.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any

from vmmblk._core import ffi, lib

__all__ = ["Alias", "Core", "Pause", "Region"]


class Pause:
    """Reasons for a queue not to pop, a bit each; it pops when no reason is left."""

    QUIESCE: int = lib.VMM_PAUSE_QUIESCE
    RESET: int = lib.VMM_PAUSE_RESET
    BUS_MASTER: int = lib.VMM_PAUSE_BUS_MASTER
    STOP: int = lib.VMM_PAUSE_STOP
    ORPHAN: int = lib.VMM_PAUSE_ORPHAN
    SUSPEND: int = lib.VMM_PAUSE_SUSPEND


@dataclass(frozen=True, slots=True)
class Region:
    """A region of guest memory as the transport mapped it.

    ``vaddr`` is its host address in the transport's mapping ``[map_base, map_base + map_len)``, whose pages are
    ``page_size`` bytes; 0 for memory that came without a file descriptor.  ``prot`` is PROT_READ and PROT_WRITE bits.
    """

    iova: int
    size: int
    vaddr: int
    map_base: int
    map_len: int
    page_size: int
    prot: int


class Alias:
    """One mapping of a guest region: its address and views of it.  ``writable`` is ``readable`` in read-only memory."""

    __slots__ = ("address", "readable", "writable")

    def __init__(self, described: Any) -> None:
        self.address: int = described.addr
        base, length = described.map_base, described.map_len
        start = described.addr - base

        def release(_: object) -> None:
            lib.vmm_alias_release(base, length)

        # every view handed out keeps this cdata alive, and with it the address range
        owner = ffi.gc(ffi.cast("char *", base), release)
        whole = memoryview(ffi.buffer(owner, length))[start : start + described.size]
        self.readable = whole.toreadonly()
        self.writable = whole if described.prot & 2 else self.readable


def _check(result: int, what: str) -> int:
    if result < 0:
        raise OSError(-result, f"{what}: {os.strerror(-result)}")
    return result


class Core:
    """The core of one device: guest memory, interrupts, and what its queues share.

    ``drained_fd`` is an eventfd that is written each time a paused queue has nothing in flight any more.
    """

    def __init__(self, queues: int, queue_size: int) -> None:
        self.drained_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.handle = lib.vmm_device_new(queues, queue_size, self.drained_fd)
        if self.handle == ffi.NULL:
            raise MemoryError
        self.aliases: dict[int, Alias] = {}
        """By number; one is there as long as a chain that names it is in flight."""
        self._retired: list[int] = []
        self._fresh = ffi.new("struct vmm_alias[]", lib.VMM_MAX_REGIONS)

    def close(self) -> None:
        """Free the core.  Nothing may be in flight, no thread in it, no region mapped."""
        self.aliases.clear()
        lib.vmm_device_free(self.handle)
        os.close(self.drained_fd)

    # -- guest memory

    def map(self, region: Region) -> None:
        """Add a region (all queues paused).  Raises: OSError (EINVAL, EEXIST for an overlap, ENOSPC, ENOMEM)."""
        self._forget_retired()
        out = self._fresh[0]
        r = region
        _check(
            lib.vmm_device_map(
                self.handle,
                r.iova,
                r.size,
                r.vaddr,
                r.map_base,
                r.map_len,
                r.page_size,
                r.prot,
                ffi.addressof(out),
            ),
            f"guest memory at {r.iova:#x}",
        )
        if out.addr:
            self.aliases[out.id] = Alias(out)

    def unmap(self, iova: int, size: int) -> None:
        """Remove a region; views of it see anonymous memory from now on.  Raises: OSError (ENOENT)."""
        alias = ffi.new("uint32_t *")
        _check(lib.vmm_device_unmap(self.handle, iova, size, alias), f"guest memory at {iova:#x}")
        if alias[0]:
            self._retired.append(alias[0])
        self._forget_retired()

    def _forget_retired(self) -> None:
        # memory is retired with nothing in flight but orphans, so without orphans nobody looks these up any more
        if not self.orphans:
            while self._retired:
                del self.aliases[self._retired.pop()]

    def orphan(self) -> None:
        """Take guest memory back from everything in flight, of all queues.

        Reads in flight land nowhere, writes in flight send what they were given, and no queue pops before the last of
        them has ended.  Raises: OSError if some memory could not be taken back; the chains are orphans all the same.
        """
        self._forget_retired()  # a guest can get here again and again without a map or unmap
        count = ffi.new("int *")
        self.pause(Pause.ORPHAN)  # a queue that still runs must not pop before the fresh aliases are known here
        error = lib.vmm_device_orphan(self.handle, self._fresh, count)
        for i in range(count[0]):
            self.aliases[self._fresh[i].id] = Alias(self._fresh[i])
            self._retired.append(self._fresh[i].old)
        self.resume(Pause.ORPHAN)
        _check(error, "taking guest memory back")

    # -- all queues at once

    def pause(self, reason: int) -> int:
        """Stop all queues popping for ``reason``; returns how many requests are still in flight."""
        busy: int = lib.vmm_device_pause(self.handle, reason)
        return busy

    def resume(self, reason: int) -> None:
        """Take ``reason`` back.  A queue that may pop again is kicked."""
        lib.vmm_device_resume(self.handle, reason)

    @property
    def busy(self) -> int:
        """Requests in flight that are no orphans."""
        busy: int = lib.vmm_device_busy(self.handle)
        return busy

    @property
    def orphans(self) -> int:
        """Requests whose memory was taken back and which have not ended."""
        orphans: int = lib.vmm_device_orphans(self.handle)
        return orphans

    # -- interrupts

    def irq_sink(self, function: int, argument: int) -> None:
        """Deliver interrupts to a C function ``void (*)(void *argument, uint32_t vector)``, callable anywhere."""
        lib.vmm_device_irq_sink(self.handle, function, argument)

    def coalesce(self, completions: int, microseconds: int) -> None:
        """Up to ``completions`` share an interrupt from now on, held back for ``microseconds`` at most.

        Once, before there are queues.  Raises: OSError (EMFILE).
        """
        _check(lib.vmm_device_coalesce(self.handle, completions, microseconds * 1000), "interrupts cannot be held back")

    def set_msix(self, on: bool) -> None:
        """MSI-X is enabled: vectors; otherwise INTx with the ISR byte."""
        lib.vmm_device_set_msix(self.handle, on)

    def set_intx_disabled(self, disabled: bool) -> None:
        """The Interrupt Disable bit of the PCI command register."""
        lib.vmm_device_set_intx_disabled(self.handle, disabled)

    def intx_again(self) -> None:
        """INTx was unmasked: raise it again if an ISR bit is still set."""
        lib.vmm_device_intx_again(self.handle)

    def set_config_vector(self, vector: int) -> None:
        """config_msix_vector."""
        lib.vmm_device_set_config_vector(self.handle, vector)

    def config_interrupt(self) -> None:
        """Send a configuration change notification."""
        lib.vmm_device_config_interrupt(self.handle)

    def take(self) -> int:
        """Read the ISR status byte, which clears it."""
        isr: int = lib.vmm_device_isr_take(self.handle)
        return isr

    def peek(self) -> int:
        """The ISR status byte, left as it is."""
        isr: int = lib.vmm_device_isr_peek(self.handle)
        return isr

    # -- for the queues

    def queue_handle(self, index: int, kick_fd: int) -> Any:
        """The C queue of that index, whose doorbells come over the eventfd ``kick_fd``."""
        handle = lib.vmm_device_queue(self.handle, index, kick_fd)
        if handle == ffi.NULL:
            raise OSError(errno.EINVAL, f"no queue {index}")
        return handle
