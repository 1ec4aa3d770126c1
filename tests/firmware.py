"""Firmware in guests: U-Boot at its prompt, and what firmware told the device."""

from __future__ import annotations

import re
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from guests import Guest, Setup

from vmmblk.spec import CommonCfg, DeviceStatus

if TYPE_CHECKING:
    from collections.abc import Iterator

    from guests import Result

TRACE_REGISTERS = ["-trace", "vfio_region_write"]
"""QEMU's arguments that make :func:`accepted_features` work."""

_PROMPT = b"\r\n=> "
_WRITE = re.compile(r"^vfio_region_write .*:region4\+(0x[0-9a-f]+), (0x[0-9a-f]+), \d\)$", re.MULTILINE)
_BUSY_MACHINE = 100.0
"""Seconds that whatever U-Boot does may take."""


class UBoot:
    """U-Boot's console, at the prompt."""

    def __init__(self, guest: Guest, console: socket.socket) -> None:
        self.guest = guest
        self._console = console
        self._console.settimeout(_BUSY_MACHINE)
        self._said = b""
        self._until(b"to stop autoboot")
        self._console.sendall(b" ")
        self._until(_PROMPT)

    def run(self, line: str) -> str:
        """Types a command; returns what it printed, once the prompt is there again. Raises TimeoutError."""
        self._console.sendall(line.encode() + b"\r")
        return self._until(_PROMPT).partition("\n")[2]

    def leave(self, line: str) -> Result:
        """Types a command that starts an operating system, and tells how that ended."""
        self._console.sendall(line.encode() + b"\r")
        reader = threading.Thread(target=self._read_on)
        reader.start()
        try:
            return self.guest.wait(2 * _BUSY_MACHINE)
        finally:
            self.guest.kill()
            reader.join()

    def _read_on(self) -> None:
        # A guest stands still when nobody reads what it prints. It is kept in the console's log.
        self._console.settimeout(None)
        while self._console.recv(65536):
            pass

    def _until(self, text: bytes) -> str:
        while text not in self._said:
            try:
                piece = self._console.recv(65536)
            except TimeoutError as error:
                message = f"U-Boot did not say {text!r}\n{self.guest.report()}"
                raise TimeoutError(message) from error
            assert piece, self.guest.report()
            self._said += piece
        before, _, self._said = self._said.partition(text)
        return before.decode(errors="replace")


@contextmanager
def u_boot(*arguments: str, firmware: str = "u-boot", command: str = "") -> Iterator[UBoot]:
    """U-Boot on the machine pc with these QEMU arguments; a Linux that it starts runs the shell command."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            guest = Guest(Setup(machine="pc", firmware=firmware, console=theirs, arguments=list(arguments)), command)
        with guest:
            yield UBoot(guest, ours)


def accepted_features(qemu_log: str) -> list[int]:
    """The features that the guest's drivers took, firmware's first: those of each negotiation, from QEMU's trace."""
    accepted = []
    select, status, windows = 0, 0, {}
    for offset, value in ((int(write[1], 16), int(write[2], 16)) for write in _WRITE.finditer(qemu_log)):
        if offset == CommonCfg.DRIVER_FEATURE_SELECT:
            select = value
        elif offset == CommonCfg.DRIVER_FEATURE:
            windows[select] = value
        elif offset == CommonCfg.DEVICE_STATUS:
            if value & ~status & DeviceStatus.FEATURES_OK:
                accepted.append(sum(window << 32 * index for index, window in windows.items()))
            status = value
    return accepted
