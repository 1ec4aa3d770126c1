"""Our server as ``vmmblk conform`` is run against it: set up in ways that together offer everything."""

from __future__ import annotations

import contextlib
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from guests import Served, make_image

from vmmblk.conform.target import Options

if TYPE_CHECKING:
    from collections.abc import Iterator

TESTS = Path(__file__).parents[1]
DISK = "conform_disk.py"
EXTRAS = "suspend=on,notification_data=on,notif_config_data=on,access_platform=on,order_platform=on"

FILES = {"FILE": "/var/tmp", "FILE IN MEMORY": "/dev/shm"}
"""What stands for a file of 16 MiB, and where that is: on a disk or not."""

NATIVE, PYTHON = ("--engine", "native"), ("--engine", "python")
"""Which is told so that the other one cannot do it unseen; what does not say is a disk of a user's, or has a filter."""

SETUPS = {
    "plain": [*NATIVE, "--queues", "1", "--features", "mq=off,packed=off,indirect=off,event_idx=off", "memory:64K"],
    "default": [*NATIVE, "--queues", "4", "memory:64M"],
    "default, in Python": [*PYTHON, "--queues", "4", "memory:64M"],
    "busy": [*NATIVE, "--poll-us", "busy", "--io-threads", "1", "--queues", "4", "memory:16M"],
    "file": [*NATIVE, "--queues", "4", "FILE"],
    "file, in Python": [*PYTHON, "--queues", "4", "FILE"],
    "file in memory": [*NATIVE, "--queues", "4", "--cache", "writethrough", "FILE IN MEMORY"],
    "direct": [*NATIVE, "--block-size", "4096", "--queues", "4", "FILE", "direct=on"],
    "bounced": [*NATIVE, "--block-size", "4096", "--queues", "4", "FILE", "direct=on", "bounce=on"],
    "everything": ["--queues", "4", "--features", EXTRAS, DISK],
    "in order": ["--queues", "2", "--queue-size", "16", "--features", f"in_order=on,{EXTRAS}", DISK],
    "read-only": [*NATIVE, "--read-only", "--serial", "twenty characters ok", "memory:16M"],
    "says it is read-only": [DISK, "read_write=off"],
    "4096": ["--cache", "writethrough", DISK, "sector_size=4096"],
    "zoned": ["--filter", "zoned:zone_size=1M,zone_capacity=768K,conventional=2,max_open=4,max_active=6", "memory:16M"],
    "failed zones": ["conform_zones.py"],
    "host-aware zones": ["conform_zones.py", "model=host-aware"],
    "read-only zones": ["conform_zones.py", "read_write=off"],
    "all at its largest": [*NATIVE, "--queues", "64", "--queue-size", "32768", "memory:5G"],
}


@contextlib.contextmanager
def serving(setup: str, folder: Path, tree: Path = TESTS.parent) -> Iterator[tuple[Served, Options]]:
    """``vmmblk serve``, of the sources in ``tree``, set up so, and how to check it; ``folder`` is for its files."""
    control = folder / "control"
    control.mkdir()
    arguments = [str(TESTS / each) if each.endswith(".py") else each for each in SETUPS[setup]]
    options = Options(destructive=True)
    if DISK in SETUPS[setup]:
        arguments.append(f"control={control}")
        options = Options(
            destructive=True, resize_command=_tell(control / "grow"), power_cut_command=_tell(control / "power-cut")
        )
    python = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(tree)!r}); from vmmblk.cli import main; main()",
    ]
    with contextlib.ExitStack() as stack:
        for name, place in FILES.items():
            image = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=place))) / "disk"
            make_image(image, 16 << 20)
            arguments = [str(image) if each == name else each for each in arguments]
        yield stack.enter_context(Served(folder / "s", *arguments, program=python)), options


def _tell(file: Path) -> str:
    """A shell command that asks something of the disk, and returns when it is done."""
    quoted = shlex.quote(str(file))
    return f"touch {quoted}; while [ -e {quoted} ]; do sleep 0.01; done"
