"""Packs the initramfs of a test guest, in two archives: programs with their libraries and an init, and modules.

Run by get-guest as ``initramfs.py programs LOADER USERLAND INIT OUTPUT PROGRAM...`` and as ``initramfs.py modules
KERNEL OUTPUT SMALL-OUTPUT``. LOADER is the dynamic loader of the unpacked Debian packages in USERLAND, and KERNEL the
unpacked kernel packages. The archives are written here, entry by entry, so that it needs neither root nor cpio, and
every file in them belongs to root. They are not compressed: an emulated guest takes longer to inflate them than to
read them.
"""

from __future__ import annotations

import lzma
import re
import stat
import subprocess
import sys
from pathlib import Path

LINKS = {
    "usr/bin/mkfs.ext4": "mke2fs",
    "usr/bin/fsck.ext4": "e2fsck",
    "bin/sh": "../usr/bin/dash",
    "sbin/modprobe": "../bin/busybox",
}
# Loaded by init. ext4 computes its checksums with a driver that it asks for by name only.
AT_ONCE = ["virtio_pci", "virtio_blk", "crc32c_generic", "crc32c_cryptoapi", "ext4", "qemu_fw_cfg"]
# Loaded when they are mounted or asked for: some of them measure the processor first, which takes a while.
ON_DEMAND = ["xfs", "btrfs", "zonefs", "f2fs", "crc32_generic", "crc32_cryptoapi", "null_blk"]


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


class Modules:
    """The modules of an unpacked kernel."""

    def __init__(self, kernel: Path) -> None:
        self._files = {file.name.split(".ko")[0].replace("-", "_"): file for file in kernel.rglob("*.ko*")}
        self._data: dict[str, bytes] = {}
        # .../lib/modules/RELEASE/kernel/drivers/block/virtio_blk.ko
        self.release = self._files["virtio_blk"].parents[3].name

    def data(self, name: str) -> bytes:
        """The module, decompressed."""
        if name not in self._data:
            packed = self._files[name].read_bytes()
            self._data[name] = lzma.decompress(packed) if self._files[name].suffix == ".xz" else packed
        return self._data[name]

    def told(self, name: str, key: str) -> list[str]:
        """What the module says of itself under a key."""
        return [value.decode() for value in re.findall(rb"\0%b=([^\0]*)(?=\0)" % key.encode(), self.data(name))]

    def depends(self, name: str) -> list[str]:
        """The modules that must be there before this one."""
        return [other for value in self.told(name, "depends") for other in value.replace("-", "_").split(",") if other]

    def ordered(self, names: list[str]) -> list[str]:
        """Those of these modules that are not built in, each after those it depends on."""
        found: dict[str, None] = {}
        for name in names:
            if name in self._files and name not in found:
                found |= dict.fromkeys([*self.ordered(self.depends(name)), name])
        return list(found)


def pack_programs(loader: Path, userland: Path, init: Path, output: Path, *programs: Path) -> None:
    """Writes the archive of the programs, busybox and init."""
    archive = Archive()
    for folder in ("dev", "proc", "sys", "tmp", "mnt", "root", "etc", "bin", "sbin", "usr/bin", "lib64"):
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
    output.write_bytes(archive.end())


def pack_modules(kernel: Path, output: Path, small_output: Path) -> None:
    """Writes the archive of all modules, and a small one of those that init loads, with what modprobe reads."""
    modules = Modules(kernel)
    folder = f"lib/modules/{modules.release}"
    at_once = modules.ordered(AT_ONCE)
    for names, file in ((modules.ordered([*AT_ONCE, *ON_DEMAND]), output), (at_once, small_output)):
        archive = Archive()
        for name in names:
            archive.file(f"{folder}/{name}.ko", modules.data(name), 0o644)
        needed = {name: "".join(f" {other}.ko" for other in modules.ordered(modules.depends(name))) for name in names}
        depends = [f"{name}.ko:{needed[name]}\n" for name in names]
        aliases = [f"alias {alias} {name}\n" for name in names for alias in modules.told(name, "alias")]
        archive.file(f"{folder}/modules.dep", "".join(depends).encode(), 0o644)
        archive.file(f"{folder}/modules.alias", "".join(aliases).encode(), 0o644)
        archive.file("lib/modules/at-once", "".join(f"{folder}/{name}.ko\n" for name in at_once).encode(), 0o644)
        file.write_bytes(archive.end())


if __name__ == "__main__":
    kind, *paths = sys.argv[1:]
    if kind == "programs":
        pack_programs(*map(Path, paths))
    else:
        pack_modules(*map(Path, paths))
