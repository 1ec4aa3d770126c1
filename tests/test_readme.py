"""What the README promises: its disk, its commands and its options."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vmmblk.check import check_block
from vmmblk.cli import vmmblk
from vmmblk.config import open_disk

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DISK, CHECK, BATCH_DISK = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture
def mydisk(tmp_path: Path) -> Path:
    """The README's disk in a file."""
    path = tmp_path / "mydisk.py"
    path.write_text(DISK)
    return path


def test_the_disk_of_the_readme_keeps_the_contract(mydisk: Path) -> None:
    """With the parameters that the README gives it."""
    [parameters] = re.findall(r"\./mydisk\.py (size=.+)$", README, re.MULTILINE)
    assert open_disk(str(mydisk), parameters.split()).info.size_bytes == 64 << 20
    asyncio.run(check_block(lambda: open_disk(str(mydisk), ["size=8K"])))


def test_the_checks_of_the_readme_run(mydisk: Path) -> None:
    """As the user would run them, beside the disk."""
    (mydisk.parent / "check.py").write_text(CHECK)
    command = "import runpy, sys; sys.path[:0] = [sys.argv[1], '.']; runpy.run_path(sys.argv[1] + '/check.py')"
    subprocess.run([sys.executable, "-c", command, str(mydisk.parent)], check=True, cwd=ROOT)


def test_the_disk_of_the_readme_is_clean(mydisk: Path) -> None:
    """Who copies it starts with code that ruff and mypy accept."""
    subprocess.run([sys.executable, "-m", "mypy", "--strict", str(mydisk)], check=True, cwd=ROOT)


def test_the_disk_that_takes_batches_serves_them(mydisk: Path) -> None:
    """Beside the other, which it is made from."""
    path = mydisk.parent / "batchdisk.py"
    path.write_text(BATCH_DISK)
    code = (
        "import asyncio, sys; sys.path[:0] = [sys.argv[1], '.']; from vmmblk import Transfer;"
        "from batchdisk import BatchDisk; disk, room = BatchDisk(4096), bytearray(1024);"
        "asyncio.run(disk.submit([Transfer(True, False, 1, [b'a' * 512, b'b' * 512])]));"
        "asyncio.run(disk.submit([Transfer(False, False, 1, [memoryview(room)])])); print(room.decode())"
    )
    command = [sys.executable, "-c", code, str(mydisk.parent)]
    assert subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True).stdout.strip() == (
        "a" * 512 + "b" * 512
    )
    environment = {**os.environ, "MYPYPATH": str(mydisk.parent)}
    subprocess.run([sys.executable, "-m", "mypy", "--strict", str(path)], check=True, cwd=ROOT, env=environment)


@pytest.mark.parametrize("command", ["serve", "run"])
def test_the_readme_names_every_option(command: str) -> None:
    """And no option that does not exist."""
    named = set(re.findall(r"^\| `(--[a-z-]+)", README, re.MULTILINE))
    options = {
        name for parameter in vmmblk.commands[command].params for name in parameter.opts if name.startswith("--")
    }
    assert options - {"--socket"} == named


def test_the_links_of_the_readme_lead_somewhere() -> None:
    """Files beside it."""
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert links
    assert all((ROOT / link).exists() for link in links)
