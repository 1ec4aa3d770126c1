"""What is measured: the disks, and how each is driven.  Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["Cell", "Limit", "Subject", "quick_subjects", "subjects"]

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
    """Where its file is, if it has one."""
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
    """Everything; files lie in ``disk`` and, on tmpfs, in ``memory``, Python disks in ``ours``."""
    depths = cells(sizes=(), queues=())
    some = cells(sizes=(4096, 128 << 10), queues=(1, 2))
    busy = ("--poll-us", "busy")
    return [
        Subject("null", "null", ("null:{size}",), cells=cells()),
        Subject("null-busy", "null, busy polling", (*busy, "null:{size}"), cells=depths),
        Subject("ram", "RAM", ("memory:{size}",), Limit.MEMCPY, cells=cells()),
        Subject("ram-busy", "RAM, busy polling", (*busy, "memory:{size}"), Limit.MEMCPY, cells=depths),
        Subject("tmpfs", "file on tmpfs", ("{file}",), Limit.FIO, memory, cells=cells()),
        Subject("file", "file", ("{file}",), Limit.FIO, disk, cells=cells()),
        Subject("direct", "file, direct=on", ("{file}", "direct=on"), Limit.FIO, disk, direct=True, cells=some),
        Subject("python", "Python", (str(ours / "plain.py"), "size={size}"), cells=some),
        Subject("python-submit", "Python, submit", (str(ours / "batches.py"), "size={size}"), cells=some),
        Subject(
            "python-filter",
            "Python filter over RAM",
            ("--engine", "python", str(ours / "filtered.py"), "size={size}"),
            cells=some,
        ),
        Subject("python-busy", "Python, busy polling", (*busy, str(ours / "plain.py"), "size={size}"), cells=depths),
    ]


def quick_subjects(everything: Sequence[Subject]) -> list[Subject]:
    """The same disks, and only what shows that all of this works."""
    few = (Cell(), Cell("randwrite", iodepth=1), Cell(block_size=128 << 10), Cell(queues=2))
    return [
        Subject(each.name, each.title, each.arguments, each.limit, each.folder, each.direct, few)
        for each in everything
        if not each.name.endswith("-busy")
    ]
