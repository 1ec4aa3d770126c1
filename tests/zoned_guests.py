"""A guest that is itself the host of a zoned disk, with this Python, this vmmblk and these tests in it.

Nothing else has a zoned block device: the machine that runs the tests need not have one, nor the rights to make one.
"""

from __future__ import annotations

import importlib.metadata
import py_compile
import re
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import cache_from_source
from pathlib import Path
from typing import TYPE_CHECKING

from guests import Result, boot, scripts
from initramfs import Archive
from vmm import guest_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_REPOSITORY = scripts().parent
_ROOT = "host"  # where in the guest all of it lies, under the names that it has here
_SCSI_DISK = "zbc=managed dev_size_mb=32 zone_size_mb=2 zone_cap_mb=1 zone_nr_conv=2 zone_max_open=3 delay=0"
_NOT_NEEDED = re.compile(r"/(test|tests|idlelib|lib2to3|ensurepip|pydoc_data|distutils|tkinter|config-[^/]*)/")


def run_in_guest(program: Path, *arguments: str, folder: Path, timeout: float) -> Result:
    """Boots a guest and runs a Python program in it that has vmmblk; ``folder`` is for what it boots.

    The program finds what lies beside it, null_blk in the configfs of /sys/kernel/config, and a zoned SCSI disk.
    """
    script = subprocess.run([scripts() / "get-zoned-host"], stdout=subprocess.PIPE, text=True, check=True)
    zoned_host = Path(script.stdout.splitlines()[-1])
    initramfs = folder / "initramfs"
    parts = [
        (guest_folder() / "initramfs-small").read_bytes(),
        (zoned_host / "initramfs").read_bytes(),
        _archive(program),
    ]
    initramfs.write_bytes(b"".join(parts))
    paths = ":".join(str(path) for path in (_REPOSITORY, program.parent, sysconfig.get_path("purelib")))
    command = f"""set -e
        while read -r module; do
            case $module in
            */null_blk.ko) insmod "/$module" nr_devices=0 ;;
            */scsi_debug.ko) insmod "/$module" {_SCSI_DISK} ;;
            *) insmod "/$module" ;;
            esac
        done </lib/modules/zoned-disks
        for place in proc sys dev; do
            mount --rbind /$place /{_ROOT}/$place
        done
        mount -t configfs configfs /{_ROOT}/sys/kernel/config
        PYTHONPATH={paths} PYTHONDONTWRITEBYTECODE=1 chroot /{_ROOT} {_python()} {program} {" ".join(arguments)}"""
    return boot(command, "-kernel", f"{zoned_host}/vmlinuz", "-initrd", str(initramfs), memory="1G", timeout=timeout)


def _python() -> Path:
    return Path(getattr(sys, "_base_executable", sys.executable)).resolve()


def _archive(program: Path) -> bytes:
    archive = Archive()
    for folder in ("proc", "sys", "dev", "tmp"):
        archive.folder(f"{_ROOT}/{folder}")
    files = [_python(), *_standard_library(), *_packages()]
    for path in files:
        compiled = Path(cache_from_source(str(path)))
        if path.suffix == ".py" and compiled.exists():  # beside its place it is taken whatever the times of files
            archive.file(f"{_ROOT}{path}c", compiled.read_bytes())
        else:
            archive.file(f"{_ROOT}{path}", path.read_bytes())
    with tempfile.TemporaryDirectory() as folder:
        for path in (*(_REPOSITORY / "vmmblk").rglob("*.py"), *program.parent.glob("*.py")):
            compiled = Path(folder) / "compiled"
            py_compile.compile(str(path), cfile=str(compiled), doraise=True)
            archive.file(f"{_ROOT}{path}c", compiled.read_bytes())
    archive.file(f"{_ROOT}{program}", program.read_bytes())
    for path in (_REPOSITORY / "vmmblk").glob("*.so"):
        archive.file(f"{_ROOT}{path}", path.read_bytes())
    for library in _libraries(path for path in files if path.suffix == ".so" or path == _python()):
        archive.file(f"{_ROOT}{library}", library.read_bytes())
    return archive.end()


def _standard_library() -> Iterator[Path]:
    folder = Path(sysconfig.get_path("stdlib"))
    for path in folder.rglob("*"):
        if path.suffix in {".py", ".so"} and "-packages" not in str(path) and not _NOT_NEEDED.search(str(path)):
            yield path


def _packages() -> Iterator[Path]:
    """The files of all that vmmblk needs."""
    names, seen = ["vmmblk"], set()
    while names:
        name = names.pop()
        if name in seen:
            continue
        seen.add(name)
        distribution = importlib.metadata.distribution(name)
        names += [re.split(r"[^\w.-]", need)[0] for need in distribution.requires or [] if "extra ==" not in need]
        for file in distribution.files or []:
            if file.suffix in {".py", ".so"} or file.name == "METADATA":
                yield Path(str(distribution.locate_file(file)))


def _libraries(binaries: Iterable[Path]) -> set[Path]:
    """What binaries are linked with, and the loader."""
    listing = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False).stdout
    found = {Path(name) for name in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", listing, re.MULTILINE)}
    # what the C library loads itself, when a thread ends
    return found | {path for each in found if (path := each.with_name("libgcc_s.so.1")).exists()}
