"""Block devices and file systems of the test's own, made as root, or through sudo."""

from __future__ import annotations

import os
import subprocess
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def _root(*command: object) -> str:
    sudo = [] if os.getuid() == 0 else ["sudo", "-n"]
    return subprocess.run(
        [*sudo, *map(str, command)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    ).stdout.strip()


@contextmanager
def loop_device(image: Path) -> Iterator[Path]:
    """A block device over the file ``image``; it goes when nobody has it open any more."""
    path = type(image)(_root("losetup", "--find", "--show", image))
    try:
        _root("chown", os.getuid(), path)
        yield path
    finally:
        _root("losetup", "--detach", path)


@contextmanager
def small_tmpfs(folder: Path, size: int) -> Iterator[Path]:
    """A file system of ``size`` bytes in memory, at ``folder``, which is made; it goes when nobody has a file open."""
    folder.mkdir()
    with _mounted(folder, "-t", "tmpfs", "-o", f"size={size},mode=777", "tmpfs"):
        yield folder


@contextmanager
def small_ext4(folder: Path, size: int) -> Iterator[Path]:
    """As ``small_tmpfs``, but on a device."""
    folder.mkdir()
    image = folder.with_name(folder.name + ".img")
    with image.open("wb") as file:
        file.truncate(size)
    _root("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", image)
    with _mounted(folder, "-o", "loop", image):
        _root("chmod", "777", folder)
        yield folder


@contextmanager
def _mounted(folder: Path, *what: object) -> Iterator[None]:
    _root("mount", *what, folder)
    try:
        yield
    finally:
        _root("umount", "--lazy", folder)
