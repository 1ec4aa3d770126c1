"""Real guests for the tests: boot one with a disk that vmmblk serves, and tell what its command printed.

A thin layer over qemu-scripts, which the tests so use as the user does. ``tests/run`` has fetched QEMU and the guest
before pytest starts; a test that is run by hand fetches them itself.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

_SCRIPTS = Path(__file__).resolve().parent.parent / "qemu-scripts"
sys.path.insert(0, str(_SCRIPTS / "lib"))

from vmm import NO_STATUS, TIMED_OUT, Guest, Result, Served, Setup, vfio_user_device  # noqa: E402

__all__ = [
    "NO_STATUS",
    "TIMED_OUT",
    "VMMBLK",
    "Guest",
    "Result",
    "Served",
    "Setup",
    "boot",
    "make_boot_disk",
    "serve",
    "vfio_user_device",
]

VMMBLK = (sys.executable, "-m", "vmmblk")


def serve(socket: Path, *arguments: str) -> Served:
    """Starts ``vmmblk serve --socket SOCKET ARGUMENTS``; it listens when this returns.

    Raises RuntimeError with what vmmblk said when it ended instead.
    """
    return Served(socket, *arguments, program=VMMBLK)


def boot(command: str, *arguments: str, timeout: float = 120, **setup: Any) -> Result:
    """Boots a guest with these QEMU arguments, runs a shell command in it and tells how both ended.

    ``setup`` is what :class:`Setup` takes. A guest that gives no status fails the test, with the end of its console.
    """
    with Guest(Setup(arguments=list(arguments), **setup), command) as guest:
        result = guest.wait(timeout)
        assert result.status not in (TIMED_OUT, NO_STATUS), guest.report()
    return result


def make_boot_disk(path: Path) -> None:
    """Makes a raw image that SeaBIOS and OVMF can boot; see qemu-scripts/make-boot-disk."""
    subprocess.run([_SCRIPTS / "make-boot-disk", path], check=True)
