"""What the kernel refuses: a file system that is full, a device that fails.  The same answers in C and in Python."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

import pytest
from mounts import loop_device, small_ext4, small_tmpfs

from vmmblk.backends.file import File
from vmmblk.client.driver import VirtioBlk, attach
from vmmblk.spec import DeviceStatus, RequestType, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Logs, Served

    Serve = Callable[..., Served]

SIZE = 8 << 20
ROOM = 2 << 20
UNIT = 64 << 10
UNITS = SIZE // UNIT
engines = pytest.mark.parametrize("engine", ["native", "python"])
caches = pytest.mark.parametrize("cache", ["writeback", "writethrough"])


def sparse(path: Path) -> Path:
    """An image of SIZE bytes that takes no room."""
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


@pytest.fixture(params=["tmpfs", "ext4", "ext4 direct"])
def short(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[File]:
    """A disk in a file for which its file system has no room."""
    make = small_tmpfs if request.param == "tmpfs" else small_ext4
    with make(tmp_path / "small", ROOM) as folder:
        direct = request.param == "ext4 direct"
        yield File(sparse(folder / "disk"), direct=direct, sector_size=4096 if direct else 512)


def data(unit: int) -> bytes:
    """What is written there."""
    return bytes([unit + 1]) * UNIT


def statuses(v: VirtioBlk, kind: RequestType, units: range) -> list[int | None]:
    """Make a request for each unit, all at once; how they ended."""
    requests = []
    for unit in units:
        payload = (data(unit), 0) if kind == RequestType.OUT else (b"", UNIT)
        requests.append(v.submit(kind, unit * UNIT // 512, *payload))
    v.kick()
    v.wait_all(requests)
    return [each.status for each in requests]


def status_of(v: VirtioBlk, kind: RequestType) -> int | None:
    """How one request without data ended."""
    pending = v.submit(kind)
    v.kick()
    return v.wait(pending).status


@caches
@engines
def test_a_file_system_that_is_full(short: File, serve: Serve, logs: Logs, engine: str, cache: str) -> None:
    """What does not fit is an error and told once; what is there is read and written, and there may be room again."""
    full = f"the disk fails: .*{os.strerror(errno.ENOSPC)}"
    logs.expect(full)
    with attach(serve(short, engine=engine, cache=cache).path) as v:
        found = [
            status for first in range(0, UNITS, 32) for status in statuses(v, RequestType.OUT, range(first, first + 32))
        ]
        assert set(found) == {Status.OK, Status.IOERR}
        kept = [unit for unit, status in enumerate(found) if status == Status.OK]
        assert kept[0] == 0
        assert all(v.read(unit * UNIT // 512, UNIT) == data(unit) for unit in kept)
        v.write(0, data(1))
        assert v.read(0, UNIT) == data(1)
        v.flush()
        v.discard([(0, kept[-1] * UNIT // 512)])
        lost = found.index(Status.IOERR)
        assert statuses(v, RequestType.OUT, range(lost, lost + 4)) == [Status.OK] * 4
        v.flush()
        assert DeviceStatus.NEEDS_RESET not in v.status
    assert len(logs.matching("the disk fails")) == 1


@contextlib.contextmanager
def full_device(folder: Path) -> Iterator[Path]:
    """A device of SIZE bytes whose medium takes nothing, but for its first unit."""
    with small_tmpfs(folder, UNIT) as medium:
        image = sparse(medium / "medium")
        with image.open("r+b") as file:
            file.write(bytes(UNIT))
        with loop_device(image) as device:
            yield device


@caches
@engines
def test_a_device_that_cannot_be_written(tmp_path: Path, serve: Serve, logs: Logs, engine: str, cache: str) -> None:
    """Each direct write that fails is an error, they are told of once, and the rest of the disk is served (BLK-071)."""
    logs.expect("the disk fails")
    with full_device(tmp_path / "medium") as device:
        served = serve(File(device, direct=True), engine=engine, cache=cache)
        with attach(served.path) as v:
            v.write(0, data(0))
            assert statuses(v, RequestType.OUT, range(16, 32)) == [Status.IOERR] * 16
            v.write(0, data(1))
            assert v.read(0, UNIT) == data(1)
            v.flush()
            assert DeviceStatus.NEEDS_RESET not in v.status
    assert len(logs.matching("the disk fails")) == 1


@engines
def test_a_write_through_the_page_cache(tmp_path: Path, serve: Serve, logs: Logs, engine: str) -> None:
    """With the cache off it is an error if the device takes it not, and no flush is good afterwards (BLK-066, 071)."""
    logs.expect("the disk fails")
    logs.expect("ing the disk failed")  # in the end
    with full_device(tmp_path / "medium") as device:
        served = serve(File(device), engine=engine, cache="writethrough")
        with attach(served.path) as v:
            v.write(0, data(0))
            assert [statuses(v, RequestType.OUT, range(unit, unit + 1)) for unit in range(16, 20)] == [
                [Status.IOERR]
            ] * 4
            assert Status.IOERR in statuses(v, RequestType.OUT, range(32, 48))  # of several at once Linux tells one
            assert status_of(v, RequestType.FLUSH) == Status.IOERR
            v.write(0, data(1))
            assert v.read(0, UNIT) == data(1)
            assert DeviceStatus.NEEDS_RESET not in v.status
    assert len(logs.matching("the disk fails")) == 1


@engines
def test_a_device_that_loses_what_was_cached(tmp_path: Path, serve: Serve, logs: Logs, engine: str) -> None:
    """No flush is good any more once one has failed; reads and cached writes go on."""
    logs.expect("the disk fails")
    logs.expect("ing the disk failed")  # in the end
    with full_device(tmp_path / "medium") as device:
        served = serve(File(device), engine=engine, cache="writeback")
        with attach(served.path) as v:
            assert statuses(v, RequestType.OUT, range(16, 32)) == [Status.OK] * 16
            assert [status_of(v, RequestType.FLUSH) for _ in range(3)] == [Status.IOERR] * 3
            v.write(0, data(1))
            assert v.read(0, UNIT) == data(1)
        assert len(logs.matching("the disk fails")) == 1


@engines
@pytest.mark.parametrize("direct", [False, True])
def test_a_device_that_cannot_be_read(tmp_path: Path, serve: Serve, logs: Logs, *, direct: bool, engine: str) -> None:
    """Each read that fails is an error, they are told of once, and the rest of the disk is served."""
    unreadable = f"the disk fails: .*{os.strerror(errno.EIO)}"
    logs.expect(unreadable)
    image = sparse(tmp_path / "medium")
    with loop_device(image) as device:
        served = serve(File(device, direct=direct), engine=engine)
        with attach(served.path) as v:
            v.write(0, data(0))
            v.flush()
            os.truncate(image, SIZE // 2)
            assert statuses(v, RequestType.IN, range(UNITS // 2, UNITS // 2 + 16)) == [Status.IOERR] * 16
            assert v.read(0, UNIT) == data(0)
            assert statuses(v, RequestType.IN, range(16)) == [Status.OK] * 16
            assert DeviceStatus.NEEDS_RESET not in v.status
    assert len(logs.matching(unreadable)) == 1
