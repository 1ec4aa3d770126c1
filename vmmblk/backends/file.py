"""A disk in a raw image file or on a block device.

The methods are plain, so they run in threads.  ``write`` is a synchronous write (RWF_DSYNC); ``write_cached`` goes to
the page cache and ``flush`` is fdatasync.  Once Linux has reported a failed write-back it considers the lost pages
clean, and the next fdatasync succeeds without them: so after one failure every later ``flush`` fails too, until the
disk is opened again.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
import re
import stat
import struct
from typing import TYPE_CHECKING

from vmmblk.block import Block, BlockInfo, Buffers, Native, Operation, Substance, Topology, total_bytes
from vmmblk.errors import ConfigError, Unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path
    from typing import Any

__all__ = ["File"]

log = logging.getLogger(__name__)

IOV_MAX = os.sysconf("SC_IOV_MAX")
_ZERO_CHUNK = 1 << 20  # bytes

# linux/fs.h
_BLKDISCARD = 0x1277
_BLKIOMIN = 0x1278
_BLKIOOPT = 0x1279
_BLKPBSZGET = 0x127B
_BLKSECDISCARD = 0x127D
_BLKSSZGET = 0x1268
_BLKGETSIZE64 = 0x80081272

# linux/falloc.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16

# linux/stat.h: mask bit, and where struct statx has stx_dio_mem_align and stx_dio_offset_align
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000
_DIO_ALIGN = struct.Struct("=I148xII")

_FLOCK = struct.Struct("hhqqi4x")  # struct flock, 64-bit: type, whence, start, len (0: to the end), pid

# linux/magic.h: tmpfs, ramfs
_IN_MEMORY = {0x01021994, 0x858458F6}

_DIRECT_ALIGNMENT = 4096  # bytes; enough for every device where the kernel does not say

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
"""What fallocate and BLKDISCARD answer when a file system or device cannot, or not at this granularity."""


class File(Block):
    """The raw image file or block device ``path``.

    ``sector_size`` is in bytes.  ``direct`` bypasses the page cache; ``bounce`` then asks for private copies of guest
    memory, because the kernel pins what it transfers directly.  ``lock`` keeps other programs off that lock the image
    too: an exclusive lock, or a shared one if ``read_only``.

    Raises: ConfigError if ``path`` cannot be served.
    """

    operations = Operation.FLUSH | Operation.DISCARD | Operation.WRITE_ZEROES

    def __init__(
        self,
        path: Path,
        *,
        sector_size: int = 512,
        read_only: bool = False,
        direct: bool = False,
        bounce: bool = False,
        lock: bool = True,
    ) -> None:
        self._is_device = _is_block_device(path)
        self._lost: OSError | None = None
        self._is_lost = ctypes.c_bool()  # an engine looks at it, and sets it as well
        self._direct = direct
        self._fd = _open(path, read_only=read_only, direct=direct, exclusive=lock and self._is_device)
        try:
            if lock:
                _lock(self._fd, path, shared=read_only)
            self.info = BlockInfo(not read_only, sector_size, _count_sectors(self._fd, path, sector_size))
            self.topology = _topology(self._fd, sector_size)
            if self._is_device and not read_only and _erases_securely(self._fd):
                self.operations |= Operation.SECURE_ERASE
            if direct:
                self.buffer_alignment = _direct_alignment(self._fd, path, sector_size)
        except BaseException:
            os.close(self._fd)
            raise
        self.bounce = bounce
        self.pins_memory = direct and not bounce

    def fileno(self) -> int:
        """The open file; it stays this disk's."""
        return self._fd

    def native(self) -> Native | None:
        """The open file; a subclass must be called."""
        if type(self) is not File:
            return None
        return Native(
            Substance.FILE,
            fileno=self._fd,
            direct=self._direct,
            # the node of a device lies in memory, the device does not
            in_memory=not self._is_device and _file_system(self._fd) in _IN_MEMORY,
            write_failed=self._write_failed,
            # a device forgets with an ioctl
            operations=File.operations & ~Operation.DISCARD if self._is_device else File.operations,
            lost=ctypes.addressof(self._is_lost),
        )

    def read(self, sector_start: int, buffers: Buffers) -> None:
        """Fill the buffers with preadv."""
        self._transfer(os.preadv, sector_start, buffers)

    def write(self, sector_start: int, buffers: Buffers) -> None:
        """Write with RWF_DSYNC: on return the data, and what is needed to find it, is on stable storage."""
        try:
            self._transfer(os.pwritev, sector_start, buffers, os.RWF_DSYNC)
        except OSError as exc:
            self._write_failed(exc)
            raise

    def write_cached(self, sector_start: int, buffers: Buffers) -> None:
        """Write to the page cache."""
        self._transfer(os.pwritev, sector_start, buffers)

    def flush(self) -> None:
        """Bring everything written to stable storage with fdatasync."""
        if self._is_lost.value:
            raise Unknown(f"an earlier write was lost: {self._lost or 'a flush failed'}")
        try:
            os.fdatasync(self._fd)
        except OSError as exc:
            self._lose(exc)
            raise

    def discard(self, sector_start: int, sectors: int) -> None:
        """Deallocate; where that cannot be done nothing happens, as discarding is advice."""
        start, length = self._range(sector_start, sectors)
        if self._is_device:
            _possible(fcntl.ioctl, self._fd, _BLKDISCARD, struct.pack("=QQ", start, length))
        else:
            _possible(_fallocate, self._fd, _PUNCH_HOLE | _KEEP_SIZE, start, length)

    def write_zeroes(self, sector_start: int, sectors: int, unmap: bool) -> None:
        """Zero with fallocate, or where that cannot be done by writing zeroes; then fdatasync."""
        start, length = self._range(sector_start, sectors)
        modes = [_PUNCH_HOLE, _ZERO_RANGE] if unmap else [_ZERO_RANGE]
        if not any(_possible(_fallocate, self._fd, mode | _KEEP_SIZE, start, length) for mode in modes):
            self._write_zeroes_out(sector_start, length)
        self.flush()

    def secure_erase(self, sector_start: int, sectors: int) -> None:
        """Erase with BLKSECDISCARD; only for a block device that can."""
        fcntl.ioctl(self._fd, _BLKSECDISCARD, struct.pack("=QQ", *self._range(sector_start, sectors)))

    def disconnect(self) -> None:
        """Flush what can be, and close the file, which ends the lock."""
        try:
            if self.info.read_write:
                self.flush()
        finally:
            os.close(self._fd)

    def _write_failed(self, error: OSError) -> None:
        # it may have told of pages that write_cached left, and tells only once
        if error.errno == errno.EIO:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        if not self._direct:
            self._lost = error
            self._is_lost.value = True

    def _range(self, sector_start: int, sectors: int) -> tuple[int, int]:
        return sector_start * self.info.sector_size, sectors * self.info.sector_size

    def _transfer(self, call: Callable[..., int], sector_start: int, buffers: Buffers, *flags: int) -> None:
        offset = sector_start * self.info.sector_size
        pending = list(filter(len, buffers))
        missing = total_bytes(buffers)
        while missing:
            done = call(self._fd, pending[:IOV_MAX], offset, *flags)
            if done == 0:
                raise OSError(errno.EIO, "the file has become shorter since it was opened")
            offset += done
            missing -= done
            if missing:
                pending = _after(pending, done)

    def _write_zeroes_out(self, sector_start: int, length: int) -> None:
        chunk = min(length, _ZERO_CHUNK)
        with mmap.mmap(-1, chunk) as zeroes, memoryview(zeroes) as view:  # page-aligned, as O_DIRECT wants it
            for done in range(0, length, chunk):
                with view[: length - done] as part:
                    self._transfer(os.pwritev, sector_start + done // self.info.sector_size, [part])


def _file_system(fd: int) -> int:
    """The number by which Linux knows a kind of file system."""
    answer = ctypes.create_string_buffer(256)  # struct statfs begins with f_type, a long
    return 0 if _libc().fstatfs(fd, answer) else ctypes.c_long.from_buffer(answer).value


def _erases_securely(fd: int) -> bool:
    """Whether a block device has BLKSECDISCARD: asked with a range that no device takes, so nothing is erased.

    Linux before 5.19 gives the same answer for a device that can only discard.  There is no other way to ask, so there
    no device is taken for one that can.
    """
    if _linux() < (5, 19):
        return False
    try:
        fcntl.ioctl(fd, _BLKSECDISCARD, struct.pack("=QQ", 1, 1))
    except OSError as exc:
        return exc.errno == errno.EINVAL
    return False  # one that does not look at its arguments is not to be trusted with this


def _linux() -> tuple[int, ...]:
    """The version of the kernel, as in (6, 1)."""
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


def _after(buffers: Sequence[memoryview], done: int) -> list[memoryview]:
    """What is left of ``buffers`` when their first ``done`` bytes have been transferred."""
    for index, buffer in enumerate(buffers):
        if done < len(buffer):
            return [buffer[done:], *buffers[index + 1 :]]
        done -= len(buffer)
    return []


def _is_block_device(path: Path) -> bool:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; make an empty disk with: truncate -s 1G {path}") from None
    except OSError as exc:
        raise ConfigError(f"cannot reach {path}: {exc.strerror}; check the path and its folders' permissions") from None
    if stat.S_ISBLK(mode):
        return True
    if stat.S_ISREG(mode):
        return False
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a character device")
    raise ConfigError(f"{path} is {kind}; give a raw disk image or a block device")


def _open(path: Path, *, read_only: bool, direct: bool, exclusive: bool) -> int:
    flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0)
    if exclusive and not read_only:
        flags |= os.O_EXCL  # of a block device: refuses one that is mounted
    try:
        return os.open(path, flags)
    except PermissionError:
        if read_only:
            raise ConfigError(f"no permission to read {path}; change its owner or mode") from None
        raise ConfigError(f"no permission to write {path}; change its owner or mode, or use --read-only") from None
    except OSError as exc:
        advice = {
            errno.EROFS: "use --read-only",
            errno.EBUSY: "unmount it, or use --no-lock",
            errno.EINVAL: "its file system has no direct I/O: drop direct=on",
            errno.ETXTBSY: "it is being executed",
        }.get(exc.errno or 0, "check that it is a disk you can use")
        raise ConfigError(f"cannot open {path}: {exc.strerror}; {advice}") from None


def _lock(fd: int, path: Path, *, shared: bool) -> None:
    kind = fcntl.F_RDLCK if shared else fcntl.F_WRLCK
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, 0, 0, 0))
    except (BlockingIOError, PermissionError):
        raise ConfigError(
            f"{path} is in use by another program; end that one, or use --no-lock if you are sure"
        ) from None
    except OSError as exc:
        raise ConfigError(f"cannot lock {path}: {exc.strerror}; use --no-lock") from None


def _count_sectors(fd: int, path: Path, sector_size: int) -> int:
    status = os.fstat(fd)
    size = _ioctl_int(fd, _BLKGETSIZE64, "Q") if stat.S_ISBLK(status.st_mode) else status.st_size
    if size == 0:
        raise ConfigError(f"{path} is empty; give it a size with: truncate -s 1G {path}")
    if size < sector_size:
        raise ConfigError(f"{path} has {size} bytes, less than one sector of {sector_size}; make it bigger")
    if size % sector_size:
        log.warning("%s: the last %d bytes are not a whole sector and are left out", path, size % sector_size)
    return size // sector_size


def _topology(fd: int, sector_size: int) -> Topology:
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        physical = max(sector_size, _ioctl_int(fd, _BLKPBSZGET, "I"))
        return Topology(
            physical_block_size=physical,
            minimum_io_size=_ioctl_int(fd, _BLKIOMIN, "I"),
            optimal_io_size=_ioctl_int(fd, _BLKIOOPT, "I"),
            discard_granularity=physical,
        )
    unit = max(sector_size, 1 << (status.st_blksize.bit_length() - 1))  # some FUSE file systems say odd numbers
    return Topology(physical_block_size=unit, minimum_io_size=unit, discard_granularity=unit)


def _direct_alignment(fd: int, path: Path, sector_size: int) -> int:
    """Bytes to which memory must be aligned for O_DIRECT.  Raises: ConfigError if sectors are too small for it."""
    if stat.S_ISBLK(os.fstat(fd).st_mode):
        memory = offset = _ioctl_int(fd, _BLKSSZGET, "I")
    else:
        memory, offset = _statx_direct(fd)
    if sector_size % offset:
        raise ConfigError(f"direct=on needs sectors of {offset} bytes on {path}; add --block-size {offset}")
    return max(memory, offset)


def _statx_direct(fd: int) -> tuple[int, int]:
    """The alignment of memory and of offsets that the file system states for direct I/O, bytes (Linux >= 6.1)."""
    answer = ctypes.create_string_buffer(256)
    failed = _libc().statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer)
    mask, memory, offset = _DIO_ALIGN.unpack_from(answer)
    if failed or not mask & _STATX_DIOALIGN or not offset:
        return _DIRECT_ALIGNMENT, _DIRECT_ALIGNMENT
    return memory, offset


def _ioctl_int(fd: int, request: int, code: str) -> int:
    answer = fcntl.ioctl(fd, request, bytes(struct.calcsize(code)))
    value: int = struct.unpack(code, answer)[0]
    return value


def _fallocate(fd: int, mode: int, start: int, length: int) -> None:
    if _libc().fallocate(fd, mode, ctypes.c_int64(start), ctypes.c_int64(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _libc() -> Any:
    return ctypes.CDLL(None, use_errno=True)


def _possible(call: Callable[..., object], *arguments: object) -> bool:
    """Make a call that not every file system or device can serve; whether this one could."""
    try:
        call(*arguments)
    except OSError as exc:
        if exc.errno in _UNSUPPORTED:
            return False
        raise
    return True
