"""Where the write pointers of an emulated zoned disk are kept: a small file that survives a crash at any moment.

The file is a log.  After a header that tells the geometry come records, each the state of one zone; the last one of a
zone counts.  A record is appended and brought to stable storage before what it tells is acknowledged.  A crash can
leave a torn record at the end only: its checksum is wrong, and it is ignored, as nobody was told of it.  When the log
has grown it is written anew beside itself and put in its place by rename, which is whole or not at all.

Whoever writes it holds a lock on it: two servers would each believe in write pointers of their own.  What is written
anew is locked before it is put in place, so there is no moment without a lock.
"""

from __future__ import annotations

import fcntl
import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmmblk.block import ZoneState
from vmmblk.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

__all__ = ["Geometry", "Record", "ZoneFile"]

_MAGIC = b"vmmblkz1"
_HEADER = struct.Struct("<8sIQQQQI")  # magic, then the fields of Geometry, then the CRC of all before
_RECORD = struct.Struct("<QQB3xI")  # zone, sectors written, state, the CRC of all before
_CRC = struct.Struct("<I")
_GROWTH = 1 << 20  # bytes of log before it is written anew


@dataclass(frozen=True, slots=True)
class Geometry:
    """What must not change between two uses of the file; sectors of ``sector_size`` bytes."""

    sector_size: int
    size_sectors: int
    zone_sectors: int
    zone_capacity: int
    conventional: int


@dataclass(frozen=True, slots=True)
class Record:
    """What outlives the process of one zone: EMPTY, CLOSED, FULL, READ_ONLY or OFFLINE, and the sectors it holds."""

    state: ZoneState
    written: int


_NEW = Record(ZoneState.EMPTY, 0)


class ZoneFile:
    """The file ``path``, made if it does not exist; with ``read_only`` it is only looked at.

    Its methods block, and only one may run at a time.  Raises: ConfigError for a file that is of another disk, or is
    used by another server.
    """

    def __init__(self, path: Path, geometry: Geometry, *, read_only: bool) -> None:
        self._path = path
        self._header = _sealed(_HEADER, _MAGIC, *_fields(geometry))
        self._records: dict[int, Record] = {}
        self._fd = -1
        self._end = 0
        self._torn = False
        try:
            self._load(read_only=read_only)
        except BlockingIOError:
            self.close()
            raise ConfigError(f"{path} is in use by another server; end it, or name another file with state=") from None
        except OSError as exc:
            self.close()
            raise ConfigError(f"cannot keep zones in {path}: {exc.strerror}; check it and its folder") from None
        except ConfigError:
            self.close()
            raise

    @property
    def records(self) -> Mapping[int, Record]:
        """What is on stable storage, zone by zone; a zone that is not there is empty."""
        return self._records

    def store(self, records: Mapping[int, Record]) -> None:
        """Bring ``records`` to stable storage.  Raises: OSError, and then they may be there or not."""
        news = {zone: record for zone, record in records.items() if self._records.get(zone, _NEW) != record}
        if not news:
            return
        if self._torn or self._end > _GROWTH + 2 * _RECORD.size * len(self._records):
            self._rewrite({**self._records, **news})
        else:
            self._append(_encode(news))
        self._records.update(news)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _load(self, *, read_only: bool) -> None:
        exists = self._path.exists()
        if exists and not read_only:
            self._fd = _claim(self._path)
        if exists:
            self._records = _parse(self._path, self._path.read_bytes(), self._header)
        if not read_only:
            self._rewrite(self._records)

    def _append(self, data: bytes) -> None:
        self._torn = True  # unless all goes well: what comes after a torn record would not be found
        _write_all(self._fd, data, self._end)
        os.fdatasync(self._fd)
        self._end += len(data)
        self._torn = False

    def _rewrite(self, records: Mapping[int, Record]) -> None:
        data = self._header + _encode({zone: record for zone, record in records.items() if record != _NEW})
        new = self._path.with_name(self._path.name + ".new")
        fd = _claim(new)
        try:
            os.ftruncate(fd, 0)
            _write_all(fd, data, 0)
            os.fsync(fd)
            new.rename(self._path)
            _sync_folder(self._path)
        except BaseException:
            os.close(fd)
            raise
        self.close()
        self._fd, self._end, self._torn = fd, len(data), False


def _fields(geometry: Geometry) -> tuple[int, ...]:
    return (
        geometry.sector_size,
        geometry.size_sectors,
        geometry.zone_sectors,
        geometry.zone_capacity,
        geometry.conventional,
    )


def _sealed(layout: struct.Struct, *fields: object) -> bytes:
    body = layout.pack(*fields, 0)[: -_CRC.size]
    return body + _CRC.pack(zlib.crc32(body))


def _encode(records: Mapping[int, Record]) -> bytes:
    return b"".join(_sealed(_RECORD, zone, record.written, record.state) for zone, record in records.items())


def _parse(path: Path, data: bytes, header: bytes) -> dict[int, Record]:
    if data[: len(header)] != header:
        if data[: len(_MAGIC)] == _MAGIC:
            raise ConfigError(
                f"{path} has zones of another size or disk; use the same, or delete it to empty all zones"
            )
        raise ConfigError(f"{path} does not hold zones; name another file with state=")
    records = {}
    for at in range(len(header), len(data) - _RECORD.size + 1, _RECORD.size):
        sealed = data[at : at + _RECORD.size]
        zone, written, state, crc = _RECORD.unpack(sealed)
        if crc != zlib.crc32(sealed[: -_CRC.size]):
            break
        records[zone] = Record(ZoneState(state), written)
    return records


def _claim(path: Path) -> int:
    """Open a file, made if it does not exist, and lock it.  Raises: BlockingIOError if another server has it."""
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another one has been put in its place meanwhile


def _write_all(fd: int, data: bytes, at: int) -> None:
    while data:
        done = os.pwrite(fd, data, at)
        data, at = data[done:], at + done


def _sync_folder(path: Path) -> None:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
