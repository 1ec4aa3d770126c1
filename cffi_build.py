"""Builds vmmblk._core and vmmblk._vfu: the hatchling build hook, and a command (``python cffi_build.py``).

libvfio-user is looked for in this order: ``LIBVFIO_USER`` (an install prefix or a built source tree), the system, the
cache that ``qemu-scripts/get-libvfio-user`` fills.  It is linked statically where a static library exists, so that an
installed wheel runs without it.  ``VMMBLK_WERROR=1`` turns compiler warnings into errors.  What else is needed is
tried out beforehand, so that what is missing is told in one line, with what to install.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from cffi import FFI
from hatchling.builders.hooks.plugin.interface import BuildHookInterface

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "vmmblk" / "csrc"
# the files of a ring call one another for every descriptor, which the linker then sees through
CFLAGS = ["-std=c11", "-D_GNU_SOURCE", "-O2", "-flto=auto", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]

SYSTEM = (Path("/usr/local"), Path("/usr"))

CORE_RINGS = ["memory.c", "queue.c", "chain.c", "split.c", "packed.c", "device.c"]
CORE_SOURCES = [*CORE_RINGS, "driver.c", "driver_packed.c", "engine.c", "transfer.c", "ranges.c", "bounce.c", "bench.c"]
CORE_HEADERS = ["core.h", "driver.h", "engine.h", "bench.h"]
CORE_DECLARATIONS = ["core.cdef", "driver.cdef", "engine.cdef", "bench.cdef"]
VFU_SOURCES = ["vfu.c"]
VFU_HEADERS = ["vfu.h"]
VFU_DECLARATIONS = ["vfu.cdef"]


class Missing(Exception):
    """Something to build with was not found; the message says what to run or to install."""


class Library(NamedTuple):  # not a dataclass: hatchling runs this file without making it a module
    """Where libvfio-user is: its header's folder and what the linker is given."""

    include: Path
    link: list[str]


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vmmblk" / "libvfio-user"


def _find(folder: Path, name: str) -> Path | None:
    return next((p for p in sorted(folder.rglob(name)) if p.is_file()), None) if folder.is_dir() else None


def _json_c(near: Path) -> str:
    """libvfio-user needs json-c; a static one beside it wins, then the system's static one, then its shared one."""
    static = _find(near, "libjson-c.a") or next(iter(sorted(Path("/usr/lib").glob("*/libjson-c.a"))), None)
    return str(static) if static else "-ljson-c"


def _liburing() -> str:
    """The static library where there is one, so that an installed wheel runs without it."""
    static = next(iter(sorted(Path("/usr/lib").glob("*/liburing.a"))), None)
    return str(static) if static else "-luring"


def _library_in(place: Path) -> Library | None:
    """libvfio-user in an install prefix or in a built source tree."""
    folders = (place / "include/vfio-user", place / "include")
    header = next((folder for folder in folders if (folder / "libvfio-user.h").is_file()), None)
    if header is None:
        return None
    places = [place / "lib", place / "lib64", *sorted(place.glob("lib/*-linux-*")), *sorted(place.glob("build*"))]
    for folder in places:
        if static := _find(folder, "libvfio-user.a"):
            return Library(header, [str(static), _json_c(static.parent)])
    for folder in places:
        if shared := _find(folder, "libvfio-user.so"):
            return Library(header, [str(shared), f"-Wl,-rpath,{shared.parent}"])
    return None


def find_libvfio_user() -> Library:
    """Find libvfio-user.  Raises: Missing."""
    if chosen := os.environ.get("LIBVFIO_USER"):
        if found := _library_in(Path(chosen).expanduser().resolve()):
            return found
        raise Missing(f"LIBVFIO_USER={chosen} holds no built libvfio-user: run qemu-scripts/get-libvfio-user")
    for place in (*SYSTEM, _cache()):
        if found := _library_in(place):
            return found
    raise Missing("libvfio-user was not found: run qemu-scripts/get-libvfio-user, or set LIBVFIO_USER")


def _builds(*arguments: str) -> bool:
    """Whether the compiler that setuptools will take makes a library of an empty file with ``arguments``."""
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "empty.c", Path(scratch) / "empty.so"
        source.touch()
        command = [*compiler, "-shared", "-fPIC", "-o", str(target), str(source), *arguments]
        try:
            return subprocess.run(command, check=False, capture_output=True).returncode == 0
        except OSError:
            return False


def _check_packages(library: Library) -> None:
    """Try out what Debian has packages for.  Raises: Missing."""
    if not _builds():
        raise Missing("no C compiler works: install the Debian packages gcc and libc6-dev, or set CC")
    needs = {
        "python3-dev": ("-include", "Python.h", f"-I{sysconfig.get_path('include')}"),
        "liburing-dev": ("-include", "liburing.h", _liburing()),
        "libjson-c-dev": tuple(library.link[1:]),
    }
    if missing := [package for package, arguments in needs.items() if not _builds(*arguments)]:
        raise Missing(f"to build vmmblk, install what the Debian packages hold: {' '.join(missing)}")


def _compile(name: str, declarations: list[str], headers: list[str], sources: list[str], **options: Any) -> Path:
    ffi = FFI()
    for file in declarations:
        ffi.cdef((CSRC / file).read_text())
    flags = [*CFLAGS, *(["-Werror"] if os.environ.get("VMMBLK_WERROR") == "1" else [])]
    ffi.set_source(
        f"vmmblk.{name}",
        "".join(f'#include "{header}"\n' for header in headers),
        sources=[str(CSRC / source) for source in sources],
        include_dirs=[str(CSRC), *options.pop("include_dirs", [])],
        extra_compile_args=flags,
        depends=[str(p) for p in sorted(CSRC.iterdir())],
        **options,
    )
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(ffi.compile(tmpdir=scratch))
        target = ROOT / "vmmblk" / built.name
        shutil.copyfile(built, target.with_suffix(".new"))
        target.with_suffix(".new").replace(target)  # a running process keeps the old one
    return target


def build() -> list[Path]:
    """Compile both extensions into the package; returns their files.  Raises: Missing."""
    library = find_libvfio_user()
    _check_packages(library)
    core = _compile("_core", CORE_DECLARATIONS, CORE_HEADERS, CORE_SOURCES, extra_link_args=[_liburing()])
    where = {"include_dirs": [str(library.include)], "extra_link_args": library.link}
    vfu = _compile("_vfu", VFU_DECLARATIONS, VFU_HEADERS, VFU_SOURCES, **where)
    return [core, vfu]


class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """What hatchling calls for a wheel, editable or not."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        """Compile the extensions and add them to the wheel."""
        if self.target_name != "wheel":
            return
        try:
            files = build()
        except Missing as error:
            sys.exit(f"vmmblk: {error}")
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["artifacts"].extend(str(file.relative_to(ROOT)) for file in files)


if __name__ == "__main__":
    try:
        build()
    except Missing as error:
        sys.exit(f"vmmblk: {error}")
