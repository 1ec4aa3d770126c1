"""Interrupts as a VMM receives them: eventfds given to the server, for MSI-X vectors or for INTx."""

from __future__ import annotations

import enum
import os
import select
from typing import TYPE_CHECKING

from vmmblk.client.wire import IrqIndex
from vmmblk.spec import NO_VECTOR

if TYPE_CHECKING:
    from vmmblk.client.pci import PciDevice

__all__ = ["InterruptLines", "Interrupts"]


class Interrupts(enum.Enum):
    """How the driver wants to be interrupted."""

    MSIX = enum.auto()
    """A vector for configuration changes and one per queue; with too few vectors the queues share one."""
    MSIX_SHARED = enum.auto()
    """Vector 0 for everything."""
    INTX = enum.auto()
    """One line, with the ISR byte to tell why."""
    POLL = enum.auto()
    """MSI-X enabled and no vector in use: completions are found by looking."""


class InterruptLines:
    """The eventfds of one device, and which event has which vector."""

    def __init__(self, pci: PciDevice, mode: Interrupts, queues: int) -> None:
        vectors = 0
        if mode in (Interrupts.MSIX, Interrupts.MSIX_SHARED):
            vectors = pci.connection.irq_info(IrqIndex.MSIX).vectors
            if pci.msix is None or vectors == 0:
                raise ValueError("the device has no MSI-X; use INTX")
        self.mode = mode
        self.config_vector = NO_VECTOR
        self._vectors = [NO_VECTOR] * queues
        if vectors == 1 or mode is Interrupts.MSIX_SHARED:
            self.config_vector, self._vectors, vectors = 0, [0] * queues, 1
        elif vectors:
            shared = vectors < queues + 1
            self.config_vector, self._vectors = 0, [1 if shared else 1 + i for i in range(queues)]
            vectors = 2 if shared else queues + 1
        lines = 1 if mode is Interrupts.INTX else vectors
        self._fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(lines)]

    def install(self, pci: PciDevice) -> None:
        """Tell the server about the eventfds.  A reset of the whole device makes it forget them."""
        pci.enable_msix(self.mode is not Interrupts.INTX)
        if self._fds:
            index = IrqIndex.INTX if self.mode is Interrupts.INTX else IrqIndex.MSIX
            pci.connection.set_irqs(index, 0, self._fds)

    def close(self) -> None:
        """Close the eventfds; the server may still hold its own copies of them."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()

    def queue_vector(self, queue: int) -> int:
        """The MSI-X vector of a queue, or NO_VECTOR."""
        return self._vectors[queue]

    def queue_line(self, queue: int) -> int | None:
        """The eventfd that a queue's interrupts arrive on."""
        return self._line(self._vectors[queue])

    @property
    def config_line(self) -> int | None:
        """The eventfd that configuration changes arrive on."""
        return self._line(self.config_vector)

    def take(self, line: int | None) -> int:
        """How often the eventfd ``line`` was signalled since this was last asked."""
        try:
            return 0 if line is None else os.eventfd_read(line)
        except BlockingIOError:
            return 0

    def wait(self, connection_fd: int, timeout: float) -> tuple[set[int], bool]:
        """Sleep until an eventfd is signalled or a message arrives: (those eventfds, whether one did)."""
        poller = select.poll()
        for fd in (*self._fds, connection_fd):
            poller.register(fd, select.POLLIN)
        ready = {fd for fd, _ in poller.poll(max(timeout, 0) * 1000)}
        return ready - {connection_fd}, connection_fd in ready

    def _line(self, vector: int) -> int | None:
        if self.mode is Interrupts.INTX:
            return self._fds[0]
        return None if vector == NO_VECTOR else self._fds[vector]
