"""From samples to docs/performance.md.  Pure.

Every figure is the median of the rounds, with the least and the most beside it; a ratio is taken within each round,
where both sides were measured one right after the other, and then treated alike.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.cells import Cell

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from benchmarks.cells import Subject

__all__ = ["Run", "page", "size_text"]

Sample = dict[str, Any]

_HEAD = """\
# Performance

`benchmarks/run` has written this page; do not edit it. What is explained here stands in `benchmarks/notes.md`.

Each figure is the median of {rounds} rounds, with the least and the most of them in brackets. A round measures
everything once, for {seconds:g} s each, and each limit of the machine right after what it limits: ratios are taken
within a round. Disks have {size} MiB. The driver takes a processor for each queue, looking for completions all the
time; the server takes what its engine takes.
"""

_LIMITS = """\
The limit is one thread's memcpy between buffers and memory of the disk's size for RAM, and fio's io_uring engine on the
same file for files; both with one queue. CPU is microseconds of the server's processor time for each request.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured, as the raw file has it."""

    machine: dict[str, str]
    settings: dict[str, Any]
    samples: list[Sample]
    costs: list[Sample]
    guest: list[Sample]
    """Of fio in guests: not measured yet."""

    def values(self, subject: str, cell: Cell, key: str) -> list[float]:
        """A figure of one cell in every round that has it; "ratio" is the one to the limit."""
        found = [each for each in self.samples if each["subject"] == subject and _cell(each) == cell]
        return [value for each in found if (value := _figure(each, key)) is not None]

    def cost_values(self, subject: str, key: str) -> list[float]:
        """A figure of a server's cost in every round."""
        return [each[key] for each in self.costs if each["subject"] == subject]

    def cells(self, subject: str) -> list[Cell]:
        """The cells that were measured, in their order."""
        return list(dict.fromkeys(_cell(each) for each in self.samples if each["subject"] == subject))


def page(run: Run, subjects: Sequence[Subject], plots: Sequence[tuple[str, str]], notes: str = "") -> str:
    """The page; ``plots`` are title and path of each."""
    settings = run.settings
    parts = [_HEAD.format(rounds=settings["rounds"], seconds=settings["seconds"], size=settings["size"] >> 20)]
    parts += ["## The machine", _table(["", ""], run.machine.items())]
    parts += ["## What was to be reached", _table(["", "wanted", "measured", ""], _verdicts(run))]
    parts += [notes.strip()] if notes.strip() else []
    parts += ["## Without a guest", _LIMITS]
    parts += [f"![{title}]({path})" for title, path in plots]
    for subject in subjects:
        if run.cells(subject.name):
            parts += [f"### {subject.title}", _disk(run, subject.name)]
    parts += ["## What a server costs", _costs(run, subjects)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _cell(sample: Sample) -> Cell:
    return Cell(sample["rw"], sample["block_size"], sample["iodepth"], sample["queues"])


def _figure(sample: Sample, key: str) -> float | None:
    if key != "ratio":
        return sample.get(key)
    return sample["iops"] / sample["limit_iops"] if sample.get("limit_iops") else None


# What was to be reached.


@dataclass(frozen=True, slots=True)
class _Target:
    title: str
    wanted: float
    told: Callable[[float], str]
    values: list[float]
    at_least: bool = True

    def row(self) -> list[str]:
        """What was wanted, what there is, and by how much it is missed."""
        wanted = f"{'at least' if self.at_least else 'below'} {self.told(self.wanted)}"
        if not self.values:
            return [self.title, wanted, "not measured", ""]
        median = statistics.median(self.values)
        reached = median >= self.wanted if self.at_least else median < self.wanted
        return [self.title, wanted, _told(self.values, self.told), "met" if reached else f"{median / self.wanted:.2f}x"]


def _verdicts(run: Run) -> list[list[str]]:
    return [target.row() for target in _targets(run)]


def _targets(run: Run) -> Iterator[_Target]:
    yield _Target("null, busy polling, depth 32", 8e6, _rate, run.values("null-busy", Cell(), "iops"))
    for rw in ("randread", "randwrite"):
        yield _Target(f"RAM, {rw}, depth 32, of memcpy", 0.85, _ratio, run.values("ram", Cell(rw), "ratio"))
    yield _Target("RAM, randread, depth 1", 0.8e6, _rate, run.values("ram", Cell(iodepth=1), "iops"))
    for name, title in (("tmpfs", "file on tmpfs"), ("file", "file")):
        for cell in (
            Cell(rw, size, depth) for rw in ("randread", "randwrite") for size in (4096, 128 << 10) for depth in (1, 32)
        ):
            what = f"{title}, {cell.rw}, {size_text(cell.block_size)}, depth {cell.iodepth}, of fio"
            yield _Target(what, 0.9, _ratio, run.values(name, cell, "ratio"))
    yield _Target("Python, depth 32", 250e3, _rate, run.values("python", Cell(), "iops"))
    yield _Target("Python, submit, depth 32", 400e3, _rate, run.values("python-submit", Cell(), "iops"))
    yield _Target("Python, busy polling, depth 1", 100e3, _rate, run.values("python-busy", Cell(iodepth=1), "iops"))
    yield _Target("idle, of a processor", 0.005, _percent, run.cost_values("null", "idle_attached"), at_least=False)
    yield _Target(
        "memory beside the disk", 60 << 20, _memory, run.cost_values("null", "rss_anon_bytes"), at_least=False
    )
    yield _Target("start to first request", 0.3, _seconds, run.cost_values("null", "first_request_s"), at_least=False)


# Tables.


def _disk(run: Run, subject: str) -> str:
    heads = ["", "size", "depth", "queues", "IOPS", "MiB/s", "p50 us", "p99 us", "CPU us", "limit IOPS", "of the limit"]
    rows = []
    for cell in run.cells(subject):

        def told(key: str, told: Callable[[float], str], cell: Cell = cell) -> str:
            return _told(run.values(subject, cell, key), told)

        iops = run.values(subject, cell, "iops")
        bandwidth = f"{statistics.median(iops) * cell.block_size / (1 << 20):.0f}"
        row = [cell.rw, size_text(cell.block_size), str(cell.iodepth), str(cell.queues), told("iops", _rate), bandwidth]
        row += [told("p50_us", _short), told("p99_us", _short), told("cpu_us", _short)]
        rows.append([*row, told("limit_iops", _rate), told("ratio", _ratio)])
    return _table(heads, [row if any(row[9] for row in rows) else row[:9] for row in rows])


def _costs(run: Run, subjects: Sequence[Subject]) -> str:
    keys = (
        ("first_request_s", _seconds),
        ("idle_alone", _percent),
        ("idle_attached", _percent),
        ("rss_anon_bytes", _memory),
    )
    heads = ["", "start to first request", "idle, nobody there", "idle, driver attached", "RssAnon"]
    measured = [subject for subject in subjects if run.cost_values(subject.name, keys[0][0])]
    rows = [[each.title, *(_told(run.cost_values(each.name, key), told) for key, told in keys)] for each in measured]
    return _table(heads, rows)


def _table(heads: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    body = [list(row) for row in rows]
    width = len(body[0]) if body else len(heads)
    lines = [heads[:width], ["---"] * width, *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# Figures.


def _told(values: Sequence[float], told: Callable[[float], str]) -> str:
    """The median, with the least and the most; nothing if there is nothing."""
    if not values:
        return ""
    median = told(statistics.median(values))
    return median if len(values) == 1 else f"{median} [{told(min(values))}, {told(max(values))}]"


def _rate(value: float) -> str:
    for factor, unit in ((1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.3g} {unit}" if value < 1000 * factor else f"{value / factor:.0f} {unit}"
    return f"{value:.3g}"


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"


def _seconds(value: float) -> str:
    return f"{value:.2f} s"


def _memory(value: float) -> str:
    return f"{value / (1 << 20):.1f} MiB"


def size_text(size: int) -> str:
    """A number of bytes in the largest unit that leaves it whole."""
    for unit, name in ((1 << 20, " MiB"), (1 << 10, " KiB")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size}"
