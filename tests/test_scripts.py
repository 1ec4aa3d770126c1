"""The scripts in qemu-scripts, as a user runs them, and what they are made of."""

from __future__ import annotations

import os
import subprocess
import time
from typing import TYPE_CHECKING

import pytest
from guests import NO_STATUS, TIMED_OUT, CommandOutput, Setup, boot, kvm_works, make_boot_disk, scripts

if TYPE_CHECKING:
    from pathlib import Path

GETTERS = ["get-firmware", "get-guest", "get-libvfio-user", "get-qemu", "get-storage-daemon"]
OTHERS = [
    "../benchmarks/profile",
    "../benchmarks/run",
    "demo",
    "guest",
    "make-boot-disk",
    "../tests/guest-matrix",
    "../tests/run",
]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    return subprocess.run([scripts() / script, *arguments], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("script", [*GETTERS, *OTHERS])
def test_help(script: str) -> None:
    """--help tells how the script is used, on standard output, and does nothing else."""
    result = run(script, "--help")
    assert result.returncode == 0
    assert result.stdout.lower().startswith("usage: ")
    assert not result.stderr


@pytest.mark.parametrize("script", GETTERS)
def test_unknown_argument(script: str) -> None:
    """An argument that means nothing is one line on standard error and status 2."""
    result = run(script, "--bogus")
    assert result.returncode == 2
    assert result.stderr.splitlines() == [f"{script}: unknown argument --bogus; see --help"]


@pytest.mark.parametrize("script", GETTERS)
def test_second_run(script: str) -> None:
    """What is in the cache already is found at once and without a word."""
    before = time.monotonic()
    result = run(script)
    assert time.monotonic() - before < 10
    assert result.returncode == 0
    assert os.path.exists(result.stdout.strip())  # noqa: PTH110 - the path is a line of text here
    assert not result.stderr


def test_source_that_is_none(tmp_path: Path) -> None:
    """get-libvfio-user --source says so when the folder holds no libvfio-user."""
    result = run("get-libvfio-user", "--source", str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == f"get-libvfio-user: {tmp_path} is no checkout of libvfio-user\n"


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """A cache folder that cannot be made is one line that says what to do."""
    (tmp_path / "file").touch()
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")}
    script = scripts() / "get-qemu"
    result = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "set XDG_CACHE_HOME to a folder you can write to" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.guest
def test_guest_status() -> None:
    """The command's output and its status are the guest script's; standard error stays empty."""
    result = run("guest", "--command", "echo one; printf '\\n@@ two'; exit 3")
    assert (result.returncode, result.stdout, result.stderr) == (3, "one\n\n@@ two", "")


@pytest.mark.guest
@pytest.mark.parametrize(("cpus", "emulated"), [(1, "1,maxcpus=2"), (3, "3,maxcpus=3")])
def test_guest_processors(cpus: int, emulated: str, tmp_path: Path) -> None:
    """QEMU emulates memory barriers only where there can be two processors."""
    line = Setup(cpus=cpus).command_line(tmp_path, interactive=False)
    assert line[line.index("-smp") + 1] == (str(cpus) if kvm_works() else emulated)


@pytest.mark.guest
def test_guest_panic() -> None:
    """A guest that panics gives status 125, and the end of its console is shown."""
    result = run("guest", "--command", "echo c >/proc/sysrq-trigger")
    assert result.returncode == NO_STATUS
    assert "sysrq" in result.stderr


@pytest.mark.guest
def test_guest_timeout() -> None:
    """A guest that does not end in time is killed, with status 124."""
    result = run("guest", "--timeout", "5", "--command", "sleep 1000")
    assert result.returncode == TIMED_OUT
    assert "took too long" in result.stderr


@pytest.mark.guest
def test_guest_wrong_argument() -> None:
    """What QEMU says of its arguments is shown."""
    result = run("guest", "--", "-device", "nonsense")
    assert result.returncode == NO_STATUS
    assert "'nonsense' is not a valid device model name" in result.stderr


@pytest.mark.guest
@pytest.mark.parametrize("firmware", ["seabios", "ovmf"])
def test_boot_disk(tmp_path: Path, firmware: str) -> None:
    """The boot disk boots through either firmware, from a device of QEMU's own, and runs the command."""
    make_boot_disk(tmp_path / "disk")
    drive = f"file={tmp_path}/disk,format=raw,if=virtio"
    assert boot("cat /sys/class/block/vda2/size", "-drive", drive, firmware=firmware).output == "65536\n"


@pytest.mark.guest
def test_demo() -> None:
    """The demo verifies what it wrote, prints its table and succeeds."""
    result = run("demo", "--runtime", "0.5")
    assert result.returncode == 0, result.stderr
    assert "What the guest saw" in result.stdout
    assert result.stdout.count("vmmblk") >= 6
    assert "every byte read back" in " ".join(result.stdout.split())


@pytest.mark.guest
def test_demo_with_a_disk(tmp_path: Path) -> None:
    """With the user's image the demo compares what the guest reads, and leaves the image alone."""
    image = tmp_path / "my,disk.img"
    contents = os.urandom(2 << 20)
    image.write_bytes(contents)
    result = run("demo", "--runtime", "0.5", "--disk", str(image))
    assert result.returncode == 0, result.stderr
    assert "are the file's" in result.stdout
    assert image.read_bytes() == contents


def test_demo_with_no_disk(tmp_path: Path) -> None:
    """An image that is not there is one line, and a failure."""
    result = run("demo", "--disk", str(tmp_path / "missing"))
    assert result.returncode == 1
    assert "is no raw disk image" in " ".join(result.stdout.split())


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_command_output_in_pieces(size: int) -> None:
    """The command's output is told from what surrounds it, in whatever pieces it comes."""
    stream = b"firmware\n@@ command begins @@\nout\n@@\n\n@@ command e\nput\n@@ command ended: 12 @@\n"
    output = CommandOutput()
    known = b"".join(output.feed(stream[start : start + size]) for start in range(0, len(stream), size))
    assert known == bytes(output.text) == b"out\n@@\n\n@@ command e\nput"
    assert output.status == 12


def test_command_output_cut_short() -> None:
    """Without its last line the output has no status, and nothing of it is lost."""
    output = CommandOutput()
    output.feed(b"@@ command begins @@\nout\n@@ comm")
    output.end()
    assert bytes(output.text) == b"out\n@@ comm"
    assert output.status is None
