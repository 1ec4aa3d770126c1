"""What is measured: the disks, how each is driven, and how long that takes.  Pure."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence
    from pathlib import Path

__all__ = [
    "BOTH",
    "COSTED",
    "GUEST_CELLS",
    "GUEST_DISKS",
    "PARTS",
    "Cell",
    "GuestCell",
    "GuestDisk",
    "Limit",
    "Plan",
    "Server",
    "Settings",
    "Subject",
    "guest_seconds",
    "planned_seconds",
    "quick_plan",
    "subjects",
]

PARTS = ("guestless", "cost", "guest")
COSTED = ("null", "ram", "file", "python")
"""The subjects whose server's cost is measured."""

DEPTHS = (1, 8, 32, 128)
SIZES = (512, 4096, 16 << 10, 64 << 10, 128 << 10, 1 << 20)
QUEUES = (1, 2, 4)
BOTH = ("randread", "randwrite")


class Limit(enum.Enum):
    """What the machine can do without a device in between."""

    NONE = "none"
    MEMCPY = "memcpy"
    """One thread that copies blocks at random between memory of the disk's size and buffers."""
    FIO = "fio"
    """fio's io_uring engine on the same file."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One way to drive a disk."""

    rw: str = "randread"
    block_size: int = 4096
    iodepth: int = 32
    queues: int = 1


@dataclass(frozen=True, slots=True)
class Subject:
    """A disk: ``arguments`` of ``vmmblk serve`` for it, ``{size}`` and ``{file}`` filled in by who starts it."""

    name: str
    title: str
    arguments: tuple[str, ...]
    limit: Limit = Limit.NONE
    folder: Path | None = None
    """Where its file is, if it has one; no other subject works on that file."""
    direct: bool = False
    cells: tuple[Cell, ...] = field(default=())


def cells(
    depths: Sequence[int] = DEPTHS, sizes: Sequence[int] = SIZES, queues: Sequence[int] = QUEUES
) -> tuple[Cell, ...]:
    """Reads and writes along each axis by itself: the others stand at 4 KiB, depth 32 and one queue.

    And 128 KiB at depth 1, which is nobody's neighbour.
    """
    found = [Cell(rw, iodepth=depth) for rw in BOTH for depth in depths]
    found += [Cell(rw, block_size=size) for rw in BOTH for size in sizes]
    found += [Cell(rw, queues=count) for rw in BOTH for count in queues]
    found += [Cell(rw, block_size=128 << 10, iodepth=1) for rw in BOTH if 128 << 10 in sizes]
    return tuple(dict.fromkeys(found))


def subjects(disk: Path, memory: Path, ours: Path) -> list[Subject]:
    """Everything, and of busy polling only the depths.

    Files lie in ``disk`` and, on tmpfs, in ``memory``, Python disks in ``ours``.
    """
    whole, depths = cells(), cells(sizes=(), queues=())
    busy = ("--poll-us", "busy")
    return [
        Subject("null", "null", ("null:{size}",), cells=whole),
        Subject("null-busy", "null, busy polling", (*busy, "null:{size}"), cells=depths),
        Subject("ram", "RAM", ("memory:{size}", "hugepages=on"), Limit.MEMCPY, cells=whole),
        Subject("ram-busy", "RAM, busy polling", (*busy, "memory:{size}", "hugepages=on"), Limit.MEMCPY, cells=depths),
        Subject("tmpfs", "file on tmpfs", ("{file}",), Limit.FIO, memory, cells=whole),
        Subject("file", "file", ("{file}",), Limit.FIO, disk, cells=whole),
        Subject("direct", "file, direct=on", ("{file}", "direct=on"), Limit.FIO, disk, direct=True, cells=whole),
        Subject("python", "Python", (str(ours / "plain.py"), "size={size}"), cells=whole),
        Subject("python-submit", "Python, submit", (str(ours / "batches.py"), "size={size}"), cells=whole),
        Subject(
            "python-filter",
            "Python filter over RAM",
            ("--engine", "python", str(ours / "filtered.py"), "size={size}"),
            cells=whole,
        ),
        Subject("python-busy", "Python, busy polling", (*busy, str(ours / "plain.py"), "size={size}"), cells=depths),
    ]


# In a guest.


class Server(enum.StrEnum):
    """What a guest's disk is served by."""

    VMMBLK = "vmmblk"
    QEMU = "QEMU's own virtio-blk"
    DAEMON = "qemu-storage-daemon's vhost-user-blk"


@dataclass(frozen=True, slots=True)
class GuestDisk:
    """A disk of the guest: each has an image of its own."""

    server: Server
    direct: bool
    """Past the page cache, which QEMU calls cache=none; otherwise through it, which QEMU calls cache=writeback."""


@dataclass(frozen=True, slots=True)
class GuestCell:
    """One job of fio in the guest."""

    rw: str
    block_size: int = 4096
    iodepth: int = 1
    flush: bool = False
    """Whether a flush follows each write."""


GUEST_DISKS = tuple(GuestDisk(server, direct) for direct in (True, False) for server in Server)
GUEST_CELLS = (
    *(GuestCell(rw, iodepth=depth) for rw in BOTH for depth in (1, 32)),
    *(GuestCell(rw, 128 << 10, 8) for rw in ("read", "write")),
    GuestCell("randwrite", flush=True),
)


def guest_seconds(seconds: float) -> float:
    """How long a job in the guest is measured: what emulates a processor needs time to warm up."""
    return 2 * seconds


# What is measured in one run.


@dataclass(frozen=True, slots=True)
class Settings:
    """How everything is measured: how often, for how many seconds, on disks of how many bytes."""

    rounds: int = 5
    seconds: float = 1.0
    size: int = 1 << 30


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured without a guest, and in one."""

    settings: Settings
    subjects: Sequence[Subject]
    guest: Sequence[GuestCell] = GUEST_CELLS


def quick_plan(everything: Sequence[Subject]) -> Plan:
    """The same disks, and only what shows that all of this works."""
    few = (Cell(), Cell("randwrite", iodepth=1), Cell(block_size=128 << 10), Cell(queues=2))
    chosen = [replace(each, cells=few) for each in everything if not each.name.endswith("-busy")]
    return Plan(Settings(rounds=1, seconds=0.2, size=16 << 20), chosen, (GUEST_CELLS[0], GUEST_CELLS[-1]))


# How long it takes, with what was seen to pass around each measurement.

_PER_SERVER = 1.0
_PER_CELL = 0.1
_PER_WARMED_CELL = 0.6
_PER_FIO = 0.5
_PER_COST = 2.0
_PER_JOB = 1.0
_BOOT = 30.0


def planned_seconds(plan: Plan, parts: Collection[str]) -> float:
    """About how long it takes to measure these parts."""
    seconds, a_round = plan.settings.seconds, 0.0
    for subject in plan.subjects:
        if "guestless" in parts:
            limits = {Limit.NONE: 0.0, Limit.MEMCPY: seconds, Limit.FIO: math.ceil(seconds) + _PER_FIO}
            limited = sum(cell.queues == 1 for cell in subject.cells) * limits[subject.limit]
            around = _PER_WARMED_CELL if subject.folder is not None and not subject.direct else _PER_CELL
            a_round += _PER_SERVER + len(subject.cells) * (seconds + around) + limited
        if "cost" in parts and subject.name in COSTED:
            a_round += _PER_COST + 2 * seconds
    if "guest" in parts:
        a_round += len(plan.guest) * len(GUEST_DISKS) * (guest_seconds(seconds) + _PER_JOB)
    return plan.settings.rounds * a_round + (_BOOT if "guest" in parts else 0)
