"""What can go wrong between a driver and a device.

::

    OSError
    +-- RemoteError          the server answered a message with an error number
    +-- TimeoutError         (built in) no answer, or no completion, in time
    +-- ConnectionError      (built in) the server is gone
        +-- ProtocolError    the server or the device broke a rule of vfio-user or virtio
    StatusError              the device completed a request with a status other than OK
    NeedsReset               the device set DEVICE_NEEDS_RESET
    Impossible               (ValueError) the device or its server has not what is asked for
    QueueFull                the chain does not fit into the descriptors that are free
"""

from __future__ import annotations

import os

from vmmblk.spec import Status

__all__ = ["Impossible", "NeedsReset", "ProtocolError", "QueueFull", "RemoteError", "StatusError"]


class RemoteError(OSError):
    """The server answered ``command`` with an error; ``errno`` is the one it sent."""

    def __init__(self, error: int, command: int) -> None:
        super().__init__(error, f"command {command}: {os.strerror(error)}")
        self.command = command


class ProtocolError(ConnectionError):
    """The server or the device broke a rule; nothing it says can be trusted any more."""


class StatusError(Exception):
    """A request was completed with ``status``: a :class:`Status` where it has a name, else the bare number."""

    def __init__(self, status: int) -> None:
        self.status: int = Status(status) if status in Status.__members__.values() else status
        super().__init__(getattr(self.status, "name", f"status {status:#x}"))


class Impossible(ValueError):
    """The device cannot do what is asked; the message says what to ask for instead."""


class NeedsReset(Exception):
    """The device set DEVICE_NEEDS_RESET: it serves no queue until it is reset."""


class QueueFull(Exception):
    """Not enough free descriptors; complete something first."""
