"""The plots of docs/performance.md, with matplotlib, which is an extra (``pip install 'vmmblk[plot]'``)."""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.cells import Cell
from benchmarks.page import size_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from benchmarks.cells import Subject
    from benchmarks.page import Run

__all__ = ["draw"]

_AXES = (("iodepth", "requests under way"), ("block_size", "bytes of a request"), ("queues", "queues"))


def draw(run: Run, subjects: Sequence[Subject], folder: Path) -> list[tuple[str, str]]:
    """Draw all of them into ``folder``; title and file name of each.  Raises ImportError without matplotlib."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "vmmblk"  # the same figures make the same file
    mpl.rcParams["axes.prop_cycle"] = mpl.cycler(color=mpl.colormaps["tab20"].colors)
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for axis, label in _AXES:
        for rw in ("randread", "randwrite"):
            path = folder / f"{rw}-{axis}.svg"
            _plot(run, subjects, path, rw, (axis, label))
            made.append((f"{rw} by {label}", path.name))
    return made


def _plot(run: Run, subjects: Sequence[Subject], path: Path, rw: str, words: tuple[str, str]) -> None:
    from matplotlib.figure import Figure

    axis, label = words
    bandwidth = axis == "block_size"
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes: Any = figure.add_subplot()
    places: set[int] = set()
    for number, subject in enumerate(subjects):
        every = [cell for cell in run.cells(subject.name) if replace(Cell(rw), **{axis: getattr(cell, axis)}) == cell]
        cells = sorted(every, key=lambda cell: int(getattr(cell, axis)))
        if len(cells) < 2:
            continue
        places.update(getattr(cell, axis) for cell in cells)
        _line(axes, run, subject, cells, axis, colour=f"C{number}", bandwidth=bandwidth)
    axes.set(title=f"{rw} by {label}", xlabel=label, ylabel="MiB/s" if bandwidth else "IOPS", yscale="log")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(places), labels=[size_text(place) if bandwidth else str(place) for place in sorted(places)])
    axes.grid(visible=True, alpha=0.3)
    if axes.lines:
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, metadata={"Date": None})


def _line(axes: Any, run: Run, subject: Subject, cells: list[Cell], axis: str, *, colour: str, bandwidth: bool) -> None:
    """The median with a bar from the least to the most, and the limit, if there is one, dashed in its colour."""

    def scaled(cell: Cell, key: str) -> list[float]:
        return [
            value * (cell.block_size / (1 << 20) if bandwidth else 1) for value in run.values(subject.name, cell, key)
        ]

    found = [scaled(cell, "iops") for cell in cells]
    middle = [statistics.median(values) for values in found]
    low = [at - min(values) for at, values in zip(middle, found, strict=True)]
    high = [max(values) - at for at, values in zip(middle, found, strict=True)]
    places = [getattr(cell, axis) for cell in cells]
    axes.errorbar(places, middle, yerr=[low, high], marker="o", capsize=3, label=subject.title, color=colour)
    limits = [
        (getattr(cell, axis), statistics.median(values)) for cell in cells if (values := scaled(cell, "limit_iops"))
    ]
    if limits:
        axes.plot(*zip(*limits, strict=True), linestyle="--", alpha=0.6, color=colour)
