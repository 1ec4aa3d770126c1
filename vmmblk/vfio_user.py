"""The vfio-user transport: libvfio-user's callbacks and the event loop of the transport thread.

libvfio-user is single-threaded, so one thread makes every call on it.  That thread answers registers at once and never
does block I/O: QEMU gives a reply five seconds, and after a late one the stream is lost.  It polls

* the listening socket, also while a client is connected: a second one is accepted and closed at once, where it would
  otherwise hang in the backlog.  When the first has hung up the second does wait there, until that is dealt with;
* the connection, unless a message waits for the device to be quiescent: then the library reads nothing more;
* an eventfd of its own, for calls from other threads, and the core's *drained* eventfd.

Messages are handled until none is left, and only then does the handler resume: a burst of maps and unmaps, which QEMU
pipelines, is drained for once.

A client may send half a message and stop.  The library then waits in ``recv`` with no way out but breaking the
connection, which a second thread does after ``PATIENCE`` seconds.
"""

from __future__ import annotations

import collections
import errno
import fcntl
import functools
import logging
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vmmblk._vfu import ffi, lib
from vmmblk.budget import LogBudget
from vmmblk.memory import Region

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["CONFIG_REGION", "Handler", "Layout", "Transport"]

log = logging.getLogger("vmmblk.vfio_user")

CONFIG_REGION = 7
"""The region index of PCI configuration space; BAR n is region n."""

PATIENCE = 5.0
"""Seconds that a client gets to send the rest of a message."""

_SYNCHRONOUS = {signal.SIGBUS, signal.SIGSEGV, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS}
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.ENOSPC}
_BACKLOG = 16  # clients that may knock at once; the library's own 0 makes a non-blocking connect() fail
_BURST = 256  # messages handled before the other descriptors are looked at
_SYSLOG_LEVELS = (logging.CRITICAL, logging.CRITICAL, logging.CRITICAL, logging.ERROR, logging.WARNING, logging.INFO)


@dataclass(frozen=True, slots=True)
class Layout:
    """What the library must know of the device: MSI-X vectors, BAR sizes in bytes (six), where the doorbells are.

    A client may map ``mapped_size`` bytes of their BAR, from the first doorbell on, if that is not 0: memory that it
    shares with nobody who looks.
    """

    vectors: int
    bar_sizes: tuple[int, ...]
    doorbell_bar: int
    doorbell_offset: int
    doorbell_stride: int
    queues: int
    mapped_size: int = 0


class Handler(Protocol):
    """The device behind the transport.  Every method is called on the transport thread and answers at once."""

    drained_fd: int

    def welcome(self) -> None:
        """A client is about to be accepted.  Raises: OSError if there are no means to serve it."""

    def region_read(self, region: int, offset: int, length: int) -> bytes:
        """``length`` bytes of a region."""

    def region_write(self, region: int, offset: int, data: bytes) -> None:
        """Write to a region."""

    def quiesce(self) -> bool:
        """Stop touching guest memory.  False: not yet; :meth:`Transport.quiesced` will be called."""

    def resume(self) -> None:
        """The messages that needed quiescence are done."""

    def reset(self, *, lost: bool) -> None:
        """The client reset the device, or it is gone (``lost``).  The device is quiescent."""

    def dma_map(self, region: Region) -> None:
        """Guest memory appeared.  The device is quiescent."""

    def dma_unmap(self, iova: int, size: int) -> None:
        """Guest memory goes away.  The device is quiescent."""

    def intx_unmask(self) -> None:
        """INTx may be raised again."""

    def drained(self) -> None:
        """``drained_fd`` was written, or time has passed."""

    def deadline(self) -> float | None:
        """When (``time.monotonic``) ``drained`` wants to be called in any case."""


class Transport:
    """One vfio-user socket.  Binds it when made; :meth:`start` begins to serve.

    Raises: OSError from binding (EADDRINUSE, EACCES, ENOENT, ENAMETOOLONG, ...).
    """

    def __init__(self, path: Path, handler: Handler, layout: Layout) -> None:
        self._handler = handler
        self._self = ffi.new_handle(self)
        self._layout = layout
        self._page = _shared_page(layout) if layout.mapped_size else -1
        plain = ffi.new(
            "struct vmm_vfu_layout *",
            (
                layout.vectors,
                list(layout.bar_sizes),
                layout.doorbell_bar,
                layout.doorbell_offset,
                layout.doorbell_stride,
                layout.queues,
                layout.mapped_size,
                self._page,
            ),
        )
        error = ffi.new("int *")
        self._vfu = lib.vmm_vfu_new(os.fsencode(path), self._self, plain, error)
        if self._vfu == ffi.NULL:
            self._close_page()
            raise OSError(error[0], os.strerror(error[0]), str(path))
        self._listener = socket.socket(fileno=os.dup(lib.vmm_vfu_listen_fd(self._vfu)))
        self._listener.listen(_BACKLOG)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._pending = False
        self._stopping = False
        self._deaf_until = 0.0
        self._news = LogBudget(burst=20)
        self._complaints = LogBudget()
        self._inside_since: float | None = None
        self._thread = threading.Thread(target=self._loop, name="vfio-user", daemon=True)
        self._guard_thread = threading.Thread(target=self._guard, name="vfio-user-guard", daemon=True)
        self._ended = threading.Event()
        self._lock = threading.RLock()  # other threads find the library's context and the eventfd, or their end
        self._open = True
        self.failed: BaseException | None = None
        """What ended the thread before its time."""

    @property
    def trigger(self) -> tuple[int, int]:
        """The interrupt sink: a C function pointer and its argument, callable from any thread."""
        return lib.vmm_vfu_trigger_address(), int(ffi.cast("uintptr_t", self._vfu))

    def offer_bells(self, fds: Sequence[int]) -> None:
        """Let clients write these eventfds, one for each queue, instead of sending doorbells.  Once, before `start`.

        Raises: OSError.
        """
        error = lib.vmm_vfu_offer_bells(self._vfu, list(fds))
        if error:
            raise OSError(-error, f"doorbells cannot be offered as eventfds: {os.strerror(-error)}")

    def set_kick(self, queue: int, fd: int) -> None:
        """A doorbell of ``queue`` writes the eventfd ``fd``."""
        lib.vmm_vfu_set_kick(self._vfu, queue, fd)

    def set_notify_id(self, queue: int, notify_id: int | None) -> None:
        """What doorbells of ``queue`` must carry in their low 16 bits, else they are ignored; None: anything."""
        lib.vmm_vfu_set_notify_id(self._vfu, queue, -1 if notify_id is None else notify_id)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()
        self._guard_thread.start()

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the transport thread, soon.  From any thread."""
        with self._lock:
            if self._open:
                self._calls.append(function)
                os.eventfd_write(self._wake, 1)

    def stop(self, timeout: float) -> bool:
        """End the thread; the connection breaks, the socket closes.  False if it has not ended within ``timeout`` s.

        Guest memory is unmapped through the handler, on the calling thread.  Nobody may raise interrupts any more.
        """
        self._stopping = True
        if self._thread.ident is not None and not self._end_thread(timeout):
            return False
        with self._lock:
            self._open = False
            context, self._vfu = self._vfu, ffi.NULL
        lib.vmm_vfu_free(context)
        self._close_page()
        self._listener.close()
        os.close(self._wake)
        return True

    def _renew_page(self) -> None:
        """What the clients before have mapped is not what the next one gets."""
        if self._page >= 0:
            fresh = _shared_page(self._layout)
            os.dup2(fresh, self._page, inheritable=False)
            os.close(fresh)

    def _close_page(self) -> None:
        if self._page >= 0:
            os.close(self._page)

    def _end_thread(self, timeout: float) -> bool:
        os.eventfd_write(self._wake, 1)
        self._ended.wait(min(timeout, 0.2))
        if not self._ended.is_set():
            self.drop()  # it may be waiting for the rest of a message
        if not self._ended.wait(timeout):
            return False
        self._thread.join()
        if self._guard_thread.ident is not None:
            self._guard_thread.join()
        return True

    def drop(self) -> None:
        """Break the connection, if there is one.  From any thread."""
        with self._lock:
            if self._vfu != ffi.NULL:
                lib.vmm_vfu_shutdown(self._vfu)

    def quiesced(self) -> None:
        """The device is quiescent: answer the message that waited.  On the transport thread, outside callbacks."""
        self._pending = False
        self._enter(lib.vmm_vfu_quiesced)
        self._messages()

    # -- the thread

    def _loop(self) -> None:
        # the library takes a send that a signal cut short for a broken connection
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _SYNCHRONOUS)
        try:
            while not self._stopping:
                self._turn()
        except BaseException as error:
            log.exception("the transport failed")
            self.failed = error
            self.drop()  # the VMM must not wait for answers; the rest goes in stop(), when nobody interrupts any more
        finally:
            self._ended.set()

    def _turn(self) -> None:
        for fd in self._wait():
            if fd == self._wake:
                self._run_calls()
            elif fd == self._handler.drained_fd:
                os.eventfd_read(fd)
            elif fd == self._listener.fileno():
                self._knock()
            else:
                self._messages()
        self._handler.drained()

    def _wait(self) -> list[int]:
        poll = select.poll()
        for fd in (self._wake, self._handler.drained_fd):
            poll.register(fd, select.POLLIN)
        deadline = self._handler.deadline()
        if self._deaf_until > time.monotonic():
            deadline = self._deaf_until if deadline is None else min(deadline, self._deaf_until)
        elif not (self._pending and self._hung_up()):
            poll.register(self._listener, select.POLLIN)
        if self._connected and not self._pending:
            poll.register(lib.vmm_vfu_poll_fd(self._vfu), select.POLLIN)
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
        return [fd for fd, _ in poll.poll(timeout)]

    @property
    def _connected(self) -> bool:
        return bool(lib.vmm_vfu_poll_fd(self._vfu) != lib.vmm_vfu_listen_fd(self._vfu))

    def _hung_up(self) -> bool:
        """Whether there is a connection with nobody at the other end, so that the next client may wait for its end."""
        poll = select.poll()
        poll.register(lib.vmm_vfu_poll_fd(self._vfu), 0)
        return self._connected and any(events & select.POLLHUP for _, events in poll.poll(0))

    def _run_calls(self) -> None:
        os.eventfd_read(self._wake)
        while self._calls:
            self._calls.popleft()()

    def _knock(self) -> None:
        if not self._connected:
            try:
                self._renew_page()
                self._handler.welcome()
            except OSError as error:
                self._refused(error)
                return
            result = self._enter(lib.vmm_vfu_attach)
            if result == 0:
                self._news.log(log, logging.INFO, "a client connected")
            elif result != -errno.EAGAIN:
                self._refused(OSError(-result, os.strerror(-result)))
        elif not self._hung_up():
            try:
                self._listener.accept()[0].close()
                self._complaints.log(log, logging.WARNING, "a second client was refused: one is connected already")
            except (BlockingIOError, ConnectionError):
                pass
            except OSError as error:
                self._refused(error)

    def _refused(self, error: OSError) -> None:
        self._complaints.log(log, logging.WARNING, "a client was refused: %s", error.strerror)
        if error.errno in _EXHAUSTED:  # it still waits there: trying again at once would not help
            self._deaf_until = time.monotonic() + 1.0

    def _messages(self) -> None:
        for _ in range(_BURST):
            if not self._connected:
                break
            result = self._enter(lib.vmm_vfu_run)
            if result == -errno.EBUSY:
                self._pending = True
                return
            if result == -errno.ENOTCONN:
                self._news.log(log, logging.INFO, "the client disconnected")
                break
            if result < 0:
                # the stream can no longer be understood
                self._complaints.log(log, logging.WARNING, "the connection is broken: %s", os.strerror(-result))
                self.drop()
            elif result == 0:
                break
        self._handler.resume()

    def _enter(self, function: Callable[[Any], int]) -> int:
        self._inside_since = time.monotonic()
        try:
            return function(self._vfu)
        finally:
            self._inside_since = None

    def _guard(self) -> None:
        while not self._ended.wait(1.0):
            since = self._inside_since
            if since is not None and time.monotonic() - since > PATIENCE:
                message = "the client did not finish its message within %g s: the connection is closed"
                self._complaints.log(log, logging.WARNING, message, PATIENCE)
                self.drop()

    # -- what the callbacks below call

    def on_region(self, region: int, buffer: Any, count: int, offset: int, is_write: bool) -> int:
        """Read into or write from the library's buffer; returns ``count``."""
        data = ffi.buffer(buffer, count)
        if is_write:
            self._handler.region_write(region, offset, data[:])
        else:
            data[:] = self._handler.region_read(region, offset, count)
        return count

    def on_quiesce(self) -> int:
        """Raises: BlockingIOError while the device is not quiescent."""
        if not self._handler.quiesce():
            raise BlockingIOError(errno.EBUSY, "requests are in flight")
        return 0

    def on_reset(self, lost_connection: int) -> int:
        """The device is reset."""
        self._handler.reset(lost=bool(lost_connection))
        return 0

    def on_dma_map(self, *region: int) -> None:
        """Guest memory appeared."""
        self._handler.dma_map(Region(*region))

    def on_dma_unmap(self, iova: int, size: int) -> None:
        """Guest memory goes away."""
        self._handler.dma_unmap(iova, size)

    def on_intx_unmask(self) -> None:
        """INTx may be raised again."""
        self._handler.intx_unmask()

    def on_log(self, level: int, message: Any) -> None:
        """A message of the library; C has seen to it that there are not too many."""
        text = ffi.string(message).decode(errors="replace").rstrip()
        log.log(_SYSLOG_LEVELS[level] if level < len(_SYSLOG_LEVELS) else logging.DEBUG, "libvfio-user: %s", text)


def _shared_page(layout: Layout) -> int:
    """A file as long as the BAR of the doorbells, for clients to map what they may of it.

    It is theirs to write, and nobody here reads it, so all that they could do is change its size under each other.
    """
    fd = os.memfd_create("vmmblk-doorbells", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, layout.bar_sizes[layout.doorbell_bar])
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    except OSError:
        os.close(fd)
        raise
    return fd


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _export(name: str, method: _Method, *, returns: bool) -> None:
    """Make ``method`` of Transport the C function ``name``.

    A Python callback that raises returns its error value but leaves errno as it was, and the library would read a
    stale errno as success or as "wait": so every callback goes through here, and sets it.
    """

    @functools.wraps(method)
    def entry(handle: Any, *arguments: Any) -> Any:
        try:
            return method(ffi.from_handle(handle), *arguments)
        except OSError as error:  # expected: EBUSY while draining, a region that cannot be mapped
            ffi.errno = error.errno or errno.EIO
        except BaseException:
            log.exception("%s failed", name)
            ffi.errno = errno.EIO
        return -1 if returns else None

    if returns:
        ffi.def_extern(name=name, error=-1)(entry)
    else:
        ffi.def_extern(name=name)(entry)


_export("vmmblk_on_region", Transport.on_region, returns=True)
_export("vmmblk_on_quiesce", Transport.on_quiesce, returns=True)
_export("vmmblk_on_reset", Transport.on_reset, returns=True)
_export("vmmblk_on_dma_map", Transport.on_dma_map, returns=False)
_export("vmmblk_on_dma_unmap", Transport.on_dma_unmap, returns=False)
_export("vmmblk_on_intx_unmask", Transport.on_intx_unmask, returns=False)
_export("vmmblk_on_log", Transport.on_log, returns=False)
