"""The exceptions of vmmblk and the tables that turn them into what others understand.

::

    vmmblk.errors.Error
    +-- BlockError              a block could not do what it was asked   -> the guest gets a status
    |   +-- Unknown             some other permanent, fatal error; an unknown amount was written
    |   +-- Unimplemented       not implemented; no data has been written
    |   +-- IsReadOnly          the device is read-only; no data has been written
    |   +-- Disconnected        disconnected at the application's request; an unknown amount was written
    |   +-- ZoneInvalidCommand, ZoneUnalignedWritePointer, ZoneOpenResource, ZoneActiveResource
    |                           a rule of zoned disks is broken; no data has been written
    +-- BadRequest              the guest sent a request that breaks a rule -> it carries the status
    +-- ConfigError             the user asked for something impossible  -> one line, exit status 2

The first four block errors and what they promise about written data are those of MirageOS V1 BLOCK.
"""

from __future__ import annotations

import errno

from vmmblk.spec import Status

__all__ = [
    "BadRequest",
    "BlockError",
    "ConfigError",
    "Disconnected",
    "Error",
    "IsReadOnly",
    "Unimplemented",
    "Unknown",
    "ZoneActiveResource",
    "ZoneInvalidCommand",
    "ZoneOpenResource",
    "ZoneUnalignedWritePointer",
    "status_of",
]


class Error(Exception):
    """Base of every exception that vmmblk raises on purpose."""


class BlockError(Error):
    """A block could not do what it was asked.  ``errno`` is the number a system call would have given."""

    errno = errno.EIO


class Unknown(BlockError):
    """An undiagnosed, permanent error (disk on fire); an unknown amount of data has been written."""


class Unimplemented(BlockError):
    """The operation has not been implemented; no data has been written."""

    errno = errno.EOPNOTSUPP


class IsReadOnly(BlockError):
    """The device is read-only; no data has been written."""

    errno = errno.EROFS


class Disconnected(BlockError):
    """The device was disconnected at the application's request; an unknown amount of data has been written."""

    errno = errno.ENODEV


class ZoneInvalidCommand(BlockError):
    """A zone cannot do this in the state it is in, or is none; no data has been written, no state has changed."""


class ZoneUnalignedWritePointer(BlockError):
    """A write does not begin at the write pointer of its zone, or ends unaligned; no data has been written."""


class ZoneOpenResource(BlockError):
    """More zones would be open than the disk can have; no data has been written."""

    errno = errno.EMFILE


class ZoneActiveResource(BlockError):
    """More zones would be active than the disk can have; no data has been written."""

    errno = errno.EOVERFLOW


class BadRequest(Error):
    """The guest sent a request that breaks a rule; ``status`` is what it gets for it."""

    def __init__(self, status: Status, why: str) -> None:
        super().__init__(why)
        self.status = status


class ConfigError(Error):
    """The user asked for something that cannot be done.  The message is one line and says what to do."""


def status_of(error: BaseException) -> Status:
    """The virtio-blk status byte for an exception that ended a request ("Device Operation").

    Unimplemented is UNSUPP, the zone errors have statuses of their own, a bad request carries its status, everything
    else is IOERR.
    """
    if isinstance(error, BadRequest):
        return error.status
    return next((status for kind, status in _STATUSES.items() if isinstance(error, kind)), Status.IOERR)


_STATUSES = {
    Unimplemented: Status.UNSUPP,
    ZoneInvalidCommand: Status.ZONE_INVALID_CMD,
    ZoneUnalignedWritePointer: Status.ZONE_UNALIGNED_WP,
    ZoneOpenResource: Status.ZONE_OPEN_RESOURCE,
    ZoneActiveResource: Status.ZONE_ACTIVE_RESOURCE,
}
