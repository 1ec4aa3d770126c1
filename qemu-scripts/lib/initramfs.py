"""Packs the initramfs of the test guest: a few programs with their libraries, a few modules, and an init.

Run by get-guest as ``initramfs.py LOADER USERLAND KERNEL INIT OUTPUT PROGRAM...``. LOADER is the dynamic loader of the
unpacked Debian packages in USERLAND, and KERNEL the unpacked kernel package. The archive is written here, entry by
entry, so that it needs neither root nor cpio, and every file in it belongs to root.
"""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
import sys
from pathlib import Path

LINKS = {"usr/bin/mkfs.ext4": "mke2fs", "usr/bin/fsck.ext4": "e2fsck", "bin/sh": "../usr/bin/dash"}
# ext4 computes its checksums with a driver that it asks for by name only.
MODULES = ["virtio_pci", "virtio_blk", "crc32c_generic", "crc32c_cryptoapi", "ext4", "qemu_fw_cfg"]


class Archive:
    """A cpio archive in the "newc" format, which the kernel unpacks (Documentation/driver-api/early-userspace)."""

    def __init__(self) -> None:
        self.data = bytearray()
        self._names: set[str] = set()

    def _entry(self, name: str, mode: int, data: bytes) -> None:
        if name in self._names:
            return
        self._names.add(name)
        encoded = name.encode() + b"\0"
        fields = [len(self._names), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0]
        self.data += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self.data += data
        self._pad()

    def _pad(self) -> None:
        self.data += bytes(-len(self.data) % 4)

    def folder(self, name: str) -> None:
        """Adds a folder and those above it."""
        parts = name.split("/")
        for count in range(1, len(parts) + 1):
            self._entry("/".join(parts[:count]), stat.S_IFDIR | 0o755, b"")

    def file(self, name: str, data: bytes, mode: int = 0o755) -> None:
        """Adds a regular file."""
        self.folder(name.rpartition("/")[0] or ".")
        self._entry(name, stat.S_IFREG | mode, data)

    def link(self, name: str, target: str) -> None:
        """Adds a symbolic link."""
        self._entry(name, stat.S_IFLNK | 0o777, target.encode())

    def end(self) -> bytes:
        """Closes the archive."""
        self._entry("TRAILER!!!", 0, b"")
        return bytes(self.data)


def find(folder: Path, name: str) -> Path:
    """The one program of this name in the unpacked packages."""
    for place in ("usr/bin", "usr/sbin", "bin", "sbin"):
        if (folder / place / name).exists():
            return folder / place / name
    raise SystemExit(f"initramfs: no {name} in the packages: Debian has moved it")


def libraries(loader: Path, folder: Path, program: Path) -> dict[str, Path]:
    """The libraries a program loads, by the name it loads them under."""
    # fio's engine for Ceph brings a library from a folder of its own; in the guest all lie in one.
    path = ":".join(str(folder / "usr/lib/x86_64-linux-gnu" / place) for place in ("", "ceph"))
    command = [str(loader), "--library-path", path, "--list", str(program)]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if "not found" in listing.stdout or listing.returncode:
        raise SystemExit(f"initramfs: {program.name} lacks libraries: {listing.stdout}{listing.stderr}")
    found = re.findall(r"^\s*(\S+) => (\S+)", listing.stdout, re.MULTILINE)
    return {Path(name).name: Path(file) for name, file in found if Path(name).name != loader.name}


def module_order(kernel: Path) -> list[tuple[str, bytes]]:
    """The modules wanted that are not built in, each after those it depends on, with their contents."""
    files = {file.name.split(".ko")[0].replace("-", "_"): file for file in kernel.rglob("*.ko*")}
    ordered: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in ordered or name not in files:
            return
        packed = files[name].read_bytes()
        data = lzma.decompress(packed) if files[name].suffix == ".xz" else packed
        depends = re.search(rb"\0depends=([^\0]*)\0", data)
        for other in depends[1].decode().replace("-", "_").split(",") if depends else []:
            add(other)
        ordered[name] = data

    for name in MODULES:
        add(name)
    return list(ordered.items())


def main(loader: Path, userland: Path, kernel: Path, init: Path, output: Path, *programs: Path) -> None:
    """Writes the archive to output, uncompressed: an emulated guest takes longer to inflate it than to read it."""
    archive = Archive()
    for folder in ("dev", "proc", "sys", "tmp", "mnt", "root", "etc", "bin", "usr/bin", "lib64", "lib/modules"):
        archive.folder(folder)
    archive.file("init", init.read_bytes())
    archive.file("bin/busybox", find(userland, "busybox").read_bytes())
    archive.file("lib64/ld-linux-x86-64.so.2", loader.read_bytes())
    archive.file("etc/mke2fs.conf", (userland / "etc/mke2fs.conf").read_bytes(), 0o644)
    for name in (program.name for program in programs):
        program = find(userland, name)
        archive.file(f"usr/bin/{name}", program.read_bytes())
        for library, file in libraries(loader, userland, program).items():
            archive.file(f"usr/lib/x86_64-linux-gnu/{library}", file.read_bytes())
    for name, target in LINKS.items():
        archive.link(name, target)
    modules = module_order(kernel)
    for name, data in modules:
        archive.file(f"lib/modules/{name}.ko", data, 0o644)
    archive.file("lib/modules/order", "".join(f"{name}\n" for name, _ in modules).encode(), 0o644)
    output.write_bytes(archive.end())


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
