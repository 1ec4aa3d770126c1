"""Real guests for the tests: boot one with a disk that vmmblk serves, and tell what its command printed.

A thin layer over qemu-scripts, which the tests so use as the user does. ``tests/run`` has fetched QEMU and the guest
before pytest starts; a test that is run by hand fetches them itself.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO

_SCRIPTS = Path(__file__).resolve().parent.parent / "qemu-scripts"
sys.path.insert(0, str(_SCRIPTS / "lib"))

from vmm import (  # noqa: E402
    NO_STATUS,
    TIMED_OUT,
    CommandOutput,
    Guest,
    Result,
    Served,
    Setup,
    guest_folder,
    kvm_works,
    vfio_user_device,
)

__all__ = [
    "MIB",
    "NO_STATUS",
    "TIMED_OUT",
    "VMMBLK",
    "CommandOutput",
    "Guest",
    "Result",
    "Served",
    "Setup",
    "boot",
    "fio",
    "guest_folder",
    "kvm_works",
    "make_boot_disk",
    "make_image",
    "on_both_engines",
    "on_both_engines_if_long",
    "scripts",
    "serve",
    "vfio_user_device",
    "wait_until",
]

MIB = 1 << 20
VMMBLK = (sys.executable, "-m", "vmmblk")

on_both_engines = pytest.mark.parametrize("engine", ["native", "python"])
on_both_engines_if_long = pytest.mark.parametrize("engine", ["native", pytest.param("python", marks=pytest.mark.long)])


def scripts() -> Path:
    """The folder qemu-scripts."""
    return _SCRIPTS


def serve(socket: Path, *arguments: str, engine: str | None = None) -> Served:
    """Starts ``vmmblk serve --socket SOCKET ARGUMENTS``; it listens when this returns, and ``engine`` serves.

    Raises RuntimeError with what vmmblk said when it ended instead.
    """
    if engine is None:
        return Served(socket, *arguments, program=VMMBLK)
    served = Served(socket, "--engine", engine, *arguments, program=VMMBLK)
    told = next((line for line in cast("IO[str]", served.process.stdout) if line.startswith("engine: ")), "")
    if not told.startswith(f"engine: {engine}"):
        served.kill()
        raise AssertionError(f"not served by the {engine} engine: {told or served.log}")
    return served


def boot(command: str, *arguments: str, timeout: float = 120, **setup: Any) -> Result:
    """Boots a guest with these QEMU arguments, runs a shell command in it and tells how both ended.

    ``setup`` is what :class:`Setup` takes. A guest that gives no status fails the test, with the end of its console.
    """
    with Guest(Setup(arguments=list(arguments), **setup), command) as guest:
        result = guest.wait(timeout)
        assert result.status not in (TIMED_OUT, NO_STATUS), guest.report()
    return result


def make_boot_disk(path: Path, sector_size: int = 512) -> None:
    """Makes a raw image that SeaBIOS and OVMF can boot; see qemu-scripts/make-boot-disk."""
    subprocess.run([_SCRIPTS / "make-boot-disk", "--sector-size", str(sector_size), path], check=True)


def make_image(path: Path, size: int) -> Path:
    """Makes a sparse image of ``size`` bytes; returns its path."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


def fio(rw: str, bs: str, size: str, *, offset: str = "0") -> str:
    """The guest's command that writes to /dev/vda, 32 deep with a flush now and then, and verifies every block."""
    return (
        f"fio --name=verify --filename=/dev/vda --direct=1 --ioengine=io_uring --iodepth=32 --rw={rw} --bs={bs}"
        f" --size={size} --offset={offset} --fsync=64 --verify=crc32c --verify_fatal=1 --eta=never --output=/tmp/fio"
        " || { cat /tmp/fio; exit 1; }"
    )


def wait_until(happened: Callable[[], bool], what: str, timeout: float = 60) -> None:
    """Waits for something that can only be looked at again and again, as a line in a log. Raises TimeoutError."""
    deadline = time.monotonic() + timeout
    while not happened():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not happen within {timeout:g} s")
        time.sleep(0.02)
