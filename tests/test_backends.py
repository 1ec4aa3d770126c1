"""The disks that come with vmmblk."""

# ruff: noqa: ARG005 - disks and fakes have the parameters of what they stand for
from __future__ import annotations

import asyncio
import errno
import fcntl
import logging
import os
import re
import socket
import stat
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from mounts import loop_device

from vmmblk.backends import file as file_module
from vmmblk.backends.file import File
from vmmblk.backends.memory import Memory
from vmmblk.backends.null import Null
from vmmblk.block import Operation, operations
from vmmblk.check import CheckFailed, check_block
from vmmblk.errors import ConfigError, Unknown

if TYPE_CHECKING:
    from collections.abc import Iterator

SECTOR_SIZES = [512, 4096]


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image of 64 sectors of 4096 bytes, all zero."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(64 * 4096))
    return path


@pytest.fixture
def device(image: Path) -> Iterator[Path]:
    """A block device: a loop device over the image."""
    with loop_device(image) as path:
        yield path


@contextmanager
def opened(path: Path, **options: object) -> Iterator[File]:
    """A file disk that is closed at the end."""
    disk = File(path, **options)
    try:
        yield disk
    finally:
        disk.disconnect()


def views(*lengths: int, byte: int = 0x5A) -> list[memoryview]:
    """Buffers of these lengths."""
    return [memoryview(bytearray([byte]) * length) for length in lengths]


@pytest.mark.parametrize("sector_size", SECTOR_SIZES)
def test_memory_keeps_the_contract(sector_size: int) -> None:
    """check_block holds for memory."""
    asyncio.run(check_block(lambda: Memory(64, sector_size=sector_size)))


@pytest.mark.parametrize("sector_size", SECTOR_SIZES)
def test_null_keeps_the_contract_except_the_data(sector_size: int) -> None:
    """check_block holds for null, which stores nothing."""
    asyncio.run(check_block(lambda: Null(64, sector_size=sector_size), stores=False))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lock": False},
        {"sector_size": 4096},
        {"read_only": True},
        {"direct": True, "sector_size": 4096},
        {"direct": True, "bounce": True, "sector_size": 4096},
    ],
)
def test_file_keeps_the_contract(image: Path, options: dict[str, object]) -> None:
    """check_block holds for a file, and what was written is there when it is opened again."""
    asyncio.run(check_block(lambda: File(image, **options), persistent=True))


@pytest.mark.parametrize("options", [{}, {"sector_size": 4096}, {"read_only": True}, {"direct": True}])
def test_block_device_keeps_the_contract(device: Path, options: dict[str, object]) -> None:
    """check_block holds for a block device, discard and zeroes among it."""
    asyncio.run(check_block(lambda: File(device, **options), persistent=True))


def test_block_device_tells_its_size_and_what_it_needs(device: Path, image: Path) -> None:
    """Size, physical block size and alignment for direct I/O are the device's own."""
    with opened(device, direct=True) as disk:
        assert disk.info.size_bytes == image.stat().st_size
        assert disk.topology.physical_block_size == disk.buffer_alignment == 512


def test_block_device_in_use_is_refused(device: Path) -> None:
    """As a mounted one is: somebody has it exclusively."""
    holder = os.open(device, os.O_RDONLY | os.O_EXCL)
    try:
        with pytest.raises(ConfigError, match="unmount it, or use --no-lock"):
            File(device)
        with opened(device, lock=False):
            pass
    finally:
        os.close(holder)


def test_block_device_discard_reaches_the_device(device: Path, image: Path) -> None:
    """What the loop device discards is a hole in its image."""
    with opened(device) as disk:
        disk.write(0, views(64 * 4096))
        full = image.stat().st_blocks
        disk.discard(0, disk.info.size_sectors)
        assert image.stat().st_blocks < full


def test_file_on_tmpfs_keeps_the_contract() -> None:
    """On a file system that cannot zero a range, zeroes are written."""
    path = f"/dev/shm/vmmblk-test-{os.getpid()}"
    with open(path, "xb") as created:  # noqa: PTH123
        created.truncate(64 * 512)
    try:
        from pathlib import Path as RealPath

        asyncio.run(check_block(lambda: File(RealPath(path)), persistent=True))
    finally:
        os.unlink(path)  # noqa: PTH108


def test_null_reads_zeroes_whatever_was_written() -> None:
    """Reads give zeroes, writes vanish."""
    disk = Null(8)
    target = views(1024)
    asyncio.run(disk.write(0, views(1024)))
    asyncio.run(disk.read(0, target))
    assert target[0] == bytes(1024)


def test_memory_is_sparse_and_gives_discarded_pages_back() -> None:
    """A terabyte costs nothing; discarded sectors read as zeroes."""
    disk = Memory((1 << 40) // 512)
    for discarded in (3, 30):  # within one page, and with whole pages in between
        asyncio.run(disk.write(8, views(40 * 512)))
        asyncio.run(disk.discard(9, discarded))
        target = views(40 * 512)
        asyncio.run(disk.read(8, target))
        assert target[0] == b"Z" * 512 + bytes(discarded * 512) + b"Z" * ((39 - discarded) * 512)
    asyncio.run(disk.disconnect())


def test_memory_discard_frees_memory() -> None:
    """After a discard of everything the process is as small as before."""
    disk = Memory((16 << 20) // 512)

    def resident() -> int:
        with open("/proc/self/statm") as statm:  # noqa: PTH123
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGESIZE")

    asyncio.run(disk.write(0, views(16 << 20)))
    full = resident()
    asyncio.run(disk.discard(0, disk.info.size_sectors))
    assert full - resident() > 12 << 20
    asyncio.run(disk.disconnect())


def flags_of_memory(address: int) -> list[str]:
    """What the kernel was told of the mapping at an address, in its two letters each."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if area := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(area[1], 16) <= address < int(area[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.parametrize("hugepages", [True, False])
def test_memory_asks_for_huge_pages(*, hugepages: bool) -> None:
    """The kernel is told so, unless it has none, or the user wants none."""
    disk = Memory((8 << 20) // 512, hugepages=hugepages)
    native = disk.native()
    assert native is not None
    wanted = hugepages and Path("/sys/kernel/mm/transparent_hugepage").exists()
    assert ("hg" in flags_of_memory(native.address)) == wanted
    asyncio.run(disk.disconnect())


def test_memory_grows_within_what_was_reserved() -> None:
    """The new size is told, the data stays, and more than max_sectors is refused."""
    disk = Memory(8, max_sectors=16)
    told: list[int] = []
    disk.on_resize(lambda: told.append(disk.info.size_sectors))
    asyncio.run(disk.write(7, views(512)))
    disk.grow(16)
    target = views(1024, byte=1)
    asyncio.run(disk.read(7, target))
    assert told == [16]
    assert target[0] == bytes([0x5A]) * 512 + bytes(512)
    for wrong in (17, 8):
        with pytest.raises(ValueError, match="can grow"):
            disk.grow(wrong)


def test_file_offers_what_it_can() -> None:
    """A file flushes, discards and zeroes."""
    assert operations(File.__new__(File)) == Operation.FLUSH | Operation.DISCARD | Operation.WRITE_ZEROES


def test_file_handles_more_buffers_than_one_call_takes(image: Path) -> None:
    """Lists longer than IOV_MAX, empty buffers among them, are transferred whole and in order."""
    with opened(image) as disk:
        count = 500
        source = [memoryview(bytearray([index % 251]) * 512) for index in range(count)]
        gaps = [memoryview(bytearray())] * (2 * file_module.IOV_MAX)
        disk.write(0, [*gaps, *source])
        target = [memoryview(bytearray(512)) for _ in range(count)]
        disk.read(0, [*target[:100], *gaps, *target[100:]])
        assert target == source


@pytest.mark.parametrize("step", [100, 511, 700, 5000])
def test_file_continues_after_short_transfers(image: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """However little a system call transfers, the rest follows at the right place."""
    real = {"preadv": os.preadv, "pwritev": os.pwritev}

    def short(name: str) -> object:
        def call(fd: int, buffers: list[memoryview], offset: int, *flags: int) -> int:
            left, some = step, []
            for buffer in buffers:
                some.append(buffer[:left])
                left -= len(some[-1])
            return int(real[name](fd, some, offset, *flags))

        return call

    for name in real:
        monkeypatch.setattr(file_module.os, name, short(name))
    source = [memoryview(bytearray(os.urandom(length))) for length in (512, 1024, 512)]
    with opened(image) as disk:
        disk.write(3, source)
        target = views(1024, 512, 512)
        disk.read(3, target)
        assert b"".join(target) == b"".join(source)


def test_file_that_became_shorter_fails_instead_of_looping(image: Path) -> None:
    """Reading what somebody cut off is an error."""
    with opened(image) as disk:
        os.truncate(image, 512)
        with pytest.raises(OSError, match="shorter"):
            disk.read(1, views(512))


def test_file_write_is_synchronous_and_write_cached_is_not(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write asks the kernel for RWF_DSYNC, write_cached does not, flush calls fdatasync."""
    calls = record(monkeypatch)
    with opened(image) as disk:
        disk.write(0, views(512))
        disk.write_cached(0, views(512))
        disk.flush()
        assert calls == [("pwritev", os.RWF_DSYNC), ("pwritev", 0), ("fdatasync", 0)]


@pytest.mark.parametrize("unmap", [False, True])
def test_file_zeroes_are_persisted(image: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool) -> None:
    """write_zeroes ends with fdatasync."""
    calls = record(monkeypatch)
    with opened(image) as disk:
        disk.write_zeroes(0, 8, unmap)
        assert calls[-1] == ("fdatasync", 0)


def record(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The writing system calls that the file backend makes, with their flags; they are made all the same."""
    calls: list[tuple[str, int]] = []
    pwritev, fdatasync = os.pwritev, os.fdatasync

    def recording_pwritev(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        calls.append(("pwritev", flags))
        return pwritev(fd, buffers, offset, flags)

    def recording_fdatasync(fd: int) -> None:
        calls.append(("fdatasync", 0))
        fdatasync(fd)

    monkeypatch.setattr(file_module.os, "pwritev", recording_pwritev)
    monkeypatch.setattr(file_module.os, "fdatasync", recording_fdatasync)
    return calls


def test_file_flush_keeps_failing_after_a_lost_write(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux reports a failed write-back once; the guest must not believe the next flush."""

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "lost")

    disk = File(image)
    with monkeypatch.context() as patch:
        patch.setattr(file_module.os, "fdatasync", fail)
        with pytest.raises(OSError, match="lost"):
            disk.flush()
    with pytest.raises(Unknown, match="earlier write"):
        disk.flush()
    with pytest.raises(Unknown, match="earlier write"):
        disk.disconnect()


def test_file_write_error_that_may_tell_of_cached_data_fails_the_next_flush(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error of a synchronous write may be that of write_cached before it."""

    def fail(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, "lost")

    disk = File(image)
    with monkeypatch.context() as patch:
        patch.setattr(file_module.os, "pwritev", fail)
        with pytest.raises(OSError, match="lost"):
            disk.write(0, views(512))
    with pytest.raises(Unknown, match="earlier write"):
        disk.disconnect()


def test_file_without_cached_data_loses_none_with_a_write_that_fails(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With direct I/O a bad sector is that sector's affair, and later flushes succeed."""

    def fail(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.EIO, "bad sector")

    with opened(image, direct=True, sector_size=4096) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(file_module.os, "pwritev", fail)
            with pytest.raises(OSError, match="bad sector"):
                disk.write(0, views(4096))
        disk.flush()


def test_full_file_system_is_an_error_and_not_the_end(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC fails the write; when there is room again writing and flushing work."""

    def full(fd: int, buffers: list[memoryview], offset: int, flags: int = 0) -> int:
        raise OSError(errno.ENOSPC, "full")

    with opened(image) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(file_module.os, "pwritev", full)
            with pytest.raises(OSError, match="full"):
                disk.write(0, views(512))
        disk.write(0, views(512))
        disk.flush()


def test_file_discard_deallocates(image: Path) -> None:
    """Blocks of the file go back to the file system; its size stays."""
    with opened(image, sector_size=4096) as disk:
        disk.write(0, views(64 * 4096))
        full = image.stat().st_blocks
        disk.discard(0, 32)
        assert image.stat().st_blocks < full
        assert image.stat().st_size == 64 * 4096


def test_file_zeroes_without_unmap_stay_allocated(image: Path) -> None:
    """Only unmap=True may take the space away."""
    with opened(image, sector_size=4096) as disk:
        disk.write(0, views(64 * 4096))
        full = image.stat().st_blocks
        disk.write_zeroes(0, 64, unmap=False)
        assert image.stat().st_blocks >= full
        assert image.read_bytes() == bytes(64 * 4096)
        disk.write_zeroes(0, 64, unmap=True)
        assert image.stat().st_blocks < full
        assert image.read_bytes() == bytes(64 * 4096)


def test_file_zeroes_are_written_where_fallocate_cannot(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without fallocate still gets its zeroes, more than one chunk of them, and no more."""

    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(file_module, "_fallocate", unsupported)
    monkeypatch.setattr(file_module, "_ZERO_CHUNK", 8192)
    with opened(image) as disk:
        disk.write(0, views(64 * 512))
        disk.write_zeroes(1, 50, unmap=True)
        disk.discard(60, 2)
        assert (
            image.read_bytes()[: 64 * 512] == views(512)[0].tobytes() + bytes(50 * 512) + views(13 * 512)[0].tobytes()
        )


def test_file_with_direct_io_says_what_it_needs(image: Path) -> None:
    """O_DIRECT pins memory and needs aligned buffers, unless they are bounced."""
    with opened(image, sector_size=4096, direct=True) as disk:
        assert disk.buffer_alignment >= 512
        assert disk.pins_memory
        assert fcntl.fcntl(disk._fd, fcntl.F_GETFL) & os.O_DIRECT
    with opened(image, sector_size=4096, direct=True, bounce=True) as disk:
        assert (disk.pins_memory, disk.bounce) == (False, True)


def test_direct_io_refuses_sectors_smaller_than_the_device_s(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the option that helps."""
    monkeypatch.setattr(file_module, "_statx_direct", lambda fd: (512, 4096))
    with pytest.raises(ConfigError, match="add --block-size 4096"):
        File(image, direct=True)


def test_file_read_only_is_opened_read_only(image: Path) -> None:
    """Not even a bug could write to it."""
    image.chmod(0o444)
    with opened(image, read_only=True) as disk:
        assert not disk.info.read_write
        assert fcntl.fcntl(disk._fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY


def test_file_that_is_not_whole_sectors_is_rounded_down_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """1000 bytes are one sector, and the user is told."""
    path = tmp_path / "odd"
    path.write_bytes(bytes(1000))
    with caplog.at_level(logging.WARNING), opened(path) as disk:
        assert disk.info.size_sectors == 1
    assert "the last 488 bytes" in caplog.text


def test_file_tells_its_topology(image: Path) -> None:
    """Sizes are powers of two and not below the sector size."""
    with opened(image) as disk:
        size = disk.topology.physical_block_size
        assert size >= 512
        assert size & (size - 1) == 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "does not exist; make an empty disk with: truncate"),
        (lambda path: path.touch(), "is empty; give it a size"),
        (lambda path: path.write_bytes(bytes(100)), "less than one sector"),
        (lambda path: path.mkdir(), "is a directory"),
        (os.mkfifo, "is a FIFO"),
        (lambda path: path.symlink_to("/dev/zero"), "is a character device"),
        (lambda path: path.symlink_to(path), "cannot reach"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_not_a_disk_is_refused_in_one_line(tmp_path: Path, make: object, message: str, read_only: bool) -> None:
    """The line says what is wrong and what to do."""
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(ConfigError, match=message) as caught:
        File(path, read_only=read_only)
    assert "\n" not in str(caught.value)


def test_a_socket_is_not_a_disk(tmp_path: Path) -> None:
    """A user who swaps the two arguments is told."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        with pytest.raises(ConfigError, match="is a socket"):
            File(tmp_path / "s")


@pytest.mark.parametrize(("mode", "message"), [(0o444, "or use --read-only"), (0o000, "no permission to read")])
def test_no_permission_is_told_with_what_helps(image: Path, mode: int, message: str) -> None:
    """An image of another user: tried as nobody, since root may open everything."""
    for folder in image.parents[:3]:
        folder.chmod(folder.stat().st_mode | stat.S_IXGRP | stat.S_IXOTH)
    image.chmod(mode)
    script = (
        "import os, sys; from pathlib import Path; from vmmblk.backends.file import File; "
        "os.getuid() or (os.setgid(65534), os.setuid(65534))\n"
        "from vmmblk.errors import ConfigError\n"
        f"try: File(Path(sys.argv[1]), read_only={mode == 0})\n"
        "except ConfigError as exc: print(exc)"
    )
    told = subprocess.run([sys.executable, "-c", script, str(image)], check=True, capture_output=True, text=True)
    assert message in told.stdout


def test_two_writers_are_refused_and_two_readers_are_not(image: Path) -> None:
    """An exclusive lock for writing, a shared one for reading; lock=False does without."""
    with opened(image):
        for read_only in (False, True):
            with pytest.raises(ConfigError, match="in use by another program"):
                File(image, read_only=read_only)
        with opened(image, lock=False):
            pass
    with (
        opened(image, read_only=True),
        opened(image, read_only=True),
        pytest.raises(ConfigError, match="in use by another program"),
    ):
        File(image)
    with opened(image):
        pass


def test_a_file_that_cannot_be_served_is_not_left_open(image: Path) -> None:
    """No descriptor leaks from a failed attempt."""
    before = os.listdir("/proc/self/fd")  # noqa: PTH208
    with opened(image):
        during = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        with pytest.raises(ConfigError):
            File(image)
        assert len(os.listdir("/proc/self/fd")) == during  # noqa: PTH208
    assert len(os.listdir("/proc/self/fd")) == len(before)  # noqa: PTH208


def test_check_block_finds_a_disk_that_breaks_the_contract() -> None:
    """The checks can fail: each broken disk is told apart by the sentence it breaks."""

    class Shifted(Memory):
        async def read(self, sector_start, buffers):  # noqa: ANN001, ANN202
            await super().read(max(sector_start - 1, 0), buffers)

    class OnlyFirst(Memory):
        async def write(self, sector_start, buffers):  # noqa: ANN001, ANN202
            await super().write(sector_start, buffers[:1])

    class Lazy(Memory):
        def __init__(self, sectors: int) -> None:
            super().__init__(sectors)
            self.kept: list[tuple[int, list[memoryview]]] = []

        async def write(self, sector_start, buffers):  # noqa: ANN001, ANN202
            self.kept.append((sector_start, list(buffers)))

        async def read(self, sector_start, buffers):  # noqa: ANN001, ANN202
            for sector, kept in self.kept:
                await super().write(sector, kept)
            await super().read(sector_start, buffers)

    class Forgets(Memory):
        async def write_zeroes(self, sector_start, sectors, unmap):  # noqa: ANN001, ANN202
            pass

    class TooWide(Memory):
        async def discard(self, sector_start, sectors):  # noqa: ANN001, ANN202
            await super().discard(0, sector_start + sectors)

    class Unfilled(Memory):
        async def read(self, sector_start, buffers):  # noqa: ANN001, ANN202
            pass

    for broken, sentence in (
        (Shifted, "reads as it was written"),
        (OnlyFirst, "in order"),
        (Lazy, "after write has ended"),
        (Forgets, "zeroes the sectors"),
        (TooWide, "around it alone"),
        (Unfilled, "fills its buffers"),
    ):
        with pytest.raises(CheckFailed, match=sentence):
            asyncio.run(check_block(lambda broken=broken: broken(16)))


def test_check_block_finds_a_disk_that_does_not_persist() -> None:
    """Memory opened again is empty."""
    with pytest.raises(CheckFailed, match="opened again"):
        asyncio.run(check_block(lambda: Memory(16), persistent=True))
