"""Packs the modules of a guest that has a zoned disk of its own.

Run by get-zoned-host as ``zoned_host.py KERNEL OUTPUT``; KERNEL is the unpacked kernel package.  The archive goes after
those of a guest whose kernel may be another one: what init is to load is named anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from initramfs import Archive, Modules


def main(kernel: Path, output: Path) -> None:
    """Writes the archive: what init reads its command with, and what makes zoned disks, to be loaded by hand."""
    modules, archive = Modules(kernel), Archive()
    lists = {
        "at-once": modules.ordered(["qemu_fw_cfg"]),
        "zoned-disks": modules.ordered(["null_blk", "sd_mod", "scsi_debug"]),
    }
    for name in {name: None for names in lists.values() for name in names}:
        archive.file(f"lib/modules/{name}.ko", modules.data(name), 0o644)
    for file, names in lists.items():
        archive.file(f"lib/modules/{file}", "".join(f"lib/modules/{name}.ko\n" for name in names).encode(), 0o644)
    output.write_bytes(archive.end())


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
