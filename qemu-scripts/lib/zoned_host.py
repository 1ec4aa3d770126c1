"""Packs the modules of a guest that has a zoned disk of its own.

Run by get-zoned-host as ``zoned_host.py KERNEL OUTPUT``; KERNEL is the unpacked kernel package.  The archive goes after
those of a guest whose kernel may be another one: what init is to load is named anew.
"""

from __future__ import annotations

import sys
from pathlib import Path

from initramfs import Archive, Modules


def main(kernel: Path, output: Path) -> None:
    """Writes the archive: qemu_fw_cfg, which init reads its command with, and null_blk to be loaded by hand."""
    modules, archive = Modules(kernel), Archive()
    at_once = modules.ordered(["qemu_fw_cfg"])
    null_blk = modules.ordered(["null_blk"])
    for name in {**dict.fromkeys(at_once), **dict.fromkeys(null_blk)}:
        archive.file(f"lib/modules/{name}.ko", modules.data(name), 0o644)
    for list_, names in (("at-once", at_once), ("null-blk", null_blk)):
        archive.file(f"lib/modules/{list_}", "".join(f"lib/modules/{name}.ko\n" for name in names).encode(), 0o644)
    output.write_bytes(archive.end())


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
