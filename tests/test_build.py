"""The build: where libvfio-user is looked for, what is said when something is missing, what the extensions need."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import cffi_build  # noqa: E402
from vmmblk import _vfu  # noqa: E402


def make_prefix(place: Path, *, static: bool = True, header: str = "include/vfio-user") -> Path:
    """Something that looks like an installed or built libvfio-user."""
    (place / header).mkdir(parents=True)
    (place / header / "libvfio-user.h").touch()
    folder = place / ("build/lib" if header == "include" else "lib")
    folder.mkdir(parents=True)
    (folder / ("libvfio-user.a" if static else "libvfio-user.so")).touch()
    return place


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No libvfio-user anywhere but below ``tmp_path``: ``system`` and the cache."""
    monkeypatch.delenv("LIBVFIO_USER", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cffi_build, "SYSTEM", (tmp_path / "system",))
    return tmp_path


def test_the_order(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIBVFIO_USER comes before the system, the system before the cache."""
    cached = make_prefix(places / "cache/vmmblk/libvfio-user")
    assert cffi_build.find_libvfio_user().include == cached / "include/vfio-user"
    system = make_prefix(places / "system")
    assert cffi_build.find_libvfio_user().include == system / "include/vfio-user"
    chosen = make_prefix(places / "chosen")
    monkeypatch.setenv("LIBVFIO_USER", str(chosen))
    assert cffi_build.find_libvfio_user().include == chosen / "include/vfio-user"


def test_a_built_source_tree(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LIBVFIO_USER may be a checkout with a build folder in it."""
    tree = make_prefix(places / "tree", header="include")
    monkeypatch.setenv("LIBVFIO_USER", str(tree))
    found = cffi_build.find_libvfio_user()
    assert found.include == tree / "include"
    assert found.link[0] == str(tree / "build/lib/libvfio-user.a")


def test_static_wins(places: Path) -> None:
    """Where there is a static library it is linked; else the shared one, to be found again where it is."""
    prefix = make_prefix(places / "system", static=False)
    assert cffi_build.find_libvfio_user().link == [
        str(prefix / "lib/libvfio-user.so"),
        f"-Wl,-rpath,{prefix / 'lib'}",
    ]
    (prefix / "lib/libvfio-user.a").touch()
    assert cffi_build.find_libvfio_user().link[0] == str(prefix / "lib/libvfio-user.a")


@pytest.mark.parametrize("chosen", [None, "nowhere"])
def test_what_is_said_when_it_is_missing(chosen: str | None, places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line that names the script which gets it."""
    if chosen:
        monkeypatch.setenv("LIBVFIO_USER", str(places / chosen))
    with pytest.raises(cffi_build.Missing, match="run qemu-scripts/get-libvfio-user") as caught:
        cffi_build.find_libvfio_user()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lacks", "packages"),
    [
        ("", "gcc and libc6-dev"),
        ("Python.h", "python3-dev"),
        ("liburing.h", "liburing-dev"),
        ("json-c", "libjson-c-dev"),
        ("liburing.h*|*Python.h", "python3-dev liburing-dev"),
    ],
)
def test_what_is_said_when_a_package_is_missing(lacks: str, packages: str, tmp_path: Path) -> None:
    """The build ends with one line that names what to install, and nothing of the compiler's."""
    prefix = make_prefix(tmp_path / "prefix")
    compiler = tmp_path / "cc"
    compiler.write_text(f'#!/bin/sh\ncase "$*" in *{lacks}*) echo error >&2; exit 1; esac\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    environment = {**os.environ, "LIBVFIO_USER": str(prefix), "CC": str(compiler)}
    command = [sys.executable, str(ROOT / "cffi_build.py")]
    ended = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("vmmblk: ")
    assert ended.stderr.count("\n") == 1
    assert packages in ended.stderr


def test_an_installed_vmmblk_runs_without_the_library() -> None:
    """What was built links neither libvfio-user nor json-c dynamically."""
    needed = subprocess.run(["readelf", "-d", _vfu.__file__], check=True, capture_output=True, text=True).stdout
    assert "NEEDED" in needed
    assert "vfio-user" not in needed
    assert "json-c" not in needed
