"""From samples to docs/performance.md.  Pure.

Every figure is the median of the rounds, with the least and the most beside it; a ratio is taken within each round,
where both sides were measured one right after the other, and then treated alike.
"""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.cells import BOTH, COSTED, GUEST_CELLS, PARTS, Cell, GuestCell, Server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

    from benchmarks.cells import Subject

__all__ = ["Run", "page", "size_text"]

Sample = dict[str, Any]

_HEAD = """\
# Performance

`benchmarks/run` has written this page; do not edit it. What is explained here stands in `benchmarks/notes.md`, with
profiles as `benchmarks/profile` prints them.

Each figure is the median of the rounds, with the least and the most of them in brackets. A round measures everything
once, and each limit of the machine right after what it limits: ratios are taken within a round.
"""

_LIMITS = """\
The driver takes a processor for each queue, looking for completions all the time; the server takes what its engine
takes. The limit is one thread's memcpy between buffers and memory of the disk's size for RAM (ordinary memory; the
disk has hugepages=on, and was filled before), and fio's io_uring engine on the same file for files; both with one
queue. Unless it says direct=on, a file is in the page cache when a measurement begins. CPU is microseconds of the
server's processor time for each request.

Depth, size and queues vary each by itself, while the others stand at depth 32, 4 KiB and one queue.
"""

_GUEST = """\
IOPS that fio (io_uring, direct) sees in one guest with all disks at once, each on an image of its own of 256 MiB at
most. They are measured one right after the other, and who comes first changes from round to round. Past the page cache
is `direct=on` of vmmblk and `cache=none` of QEMU; through it is how vmmblk opens a file unless told otherwise, and
`cache=writeback` of QEMU. QEMU's own virtio-blk has an iothread and `aio=io_uring`, and so has the storage daemon. The
depth is fio's; each job is measured for twice the seconds of the other parts.
"""

_COSTS = "Disks of memory are of 16 MiB here, which are in RssAnon if they have been written."

_MODES = {True: "past the page cache", False: "through the page cache"}


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured, as the raw file has it."""

    machine: dict[str, str]
    parts: dict[str, dict[str, Any]]
    """How and when each part was measured."""
    samples: list[Sample]
    costs: list[Sample]
    guest: list[Sample]
    """Of fio in the guest."""

    def values(self, subject: str, cell: Cell, key: str) -> list[float]:
        """A figure of one cell in every round that has it; "ratio" is the one to the limit."""
        found = [each for each in self.samples if each["subject"] == subject and _cell(each) == cell]
        return [value for each in found if (value := _figure(each, key)) is not None]

    def cost_values(self, subject: str, key: str) -> list[float]:
        """A figure of a server's cost in every round."""
        return [each[key] for each in self.costs if each["subject"] == subject]

    def guest_rates(self, server: Server, cell: GuestCell, *, direct: bool) -> dict[int, float]:
        """Requests per second that fio saw in the guest, by round."""
        key = {"server": server, "direct": direct, **asdict(cell)}
        return {each["round"]: each["iops"] for each in self.guest if key.items() <= each.items()}

    def guest_ratios(self, peer: Server, cell: GuestCell, *, direct: bool) -> list[float]:
        """Those of vmmblk to those of a peer, in every round that has both."""
        ours = self.guest_rates(Server.VMMBLK, cell, direct=direct)
        theirs = self.guest_rates(peer, cell, direct=direct)
        return [rate / theirs[number] for number, rate in ours.items() if theirs.get(number)]

    def cells(self, subject: str) -> list[Cell]:
        """The cells that were measured, in their order."""
        return list(dict.fromkeys(_cell(each) for each in self.samples if each["subject"] == subject))


def page(run: Run, subjects: Sequence[Subject], plots: Sequence[tuple[str, str]], notes: str = "") -> str:
    """The page; ``plots`` are title and path of each."""
    parts = [_HEAD, "## The machine", _table(["", ""], run.machine.items()), _conditions(run)]
    parts += ["## What was to be reached", *_verdicts(run)]
    parts += [notes.strip()] if notes.strip() else []
    parts += ["## Without a guest", _LIMITS]
    parts += [f"![{title}]({path})" for title, path in plots]
    for subject in subjects:
        if run.cells(subject.name):
            parts += [f"### {subject.title}", _disk(run, subject.name)]
    if run.guest:
        parts += ["## In a guest", _GUEST]
        parts += [
            part for direct, mode in _MODES.items() for part in (f"### {mode.capitalize()}", _guest(run, direct=direct))
        ]
    parts += ["## What a server costs", _COSTS, _costs(run, subjects)]
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
        return [self.title, wanted, _told(self.values, self.told) or "not measured", self.verdict()]

    def verdict(self) -> str:
        """Whether the median reaches it, or by which part of what is wanted not."""
        if not self.values:
            return ""
        by = (1 if self.at_least else -1) * (1 - statistics.median(self.values) / self.wanted)
        return f"**missed by {_short(100 * by)} %**" if by > 0 or (by == 0 and not self.at_least) else "met"


def _verdicts(run: Run) -> list[str]:
    """How many are met, and each."""
    targets = list(_targets(run))
    met = sum(target.verdict() == "met" for target in targets)
    measured = sum(bool(target.values) for target in targets)
    count = f"{met} of {len(targets)} are met" + f", {measured - met} missed" * (measured > met)
    count += f", {len(targets) - measured} not measured" * (measured < len(targets))
    return [f"{count}.", _table(["", "wanted", "measured", ""], (target.row() for target in targets))]


def _targets(run: Run) -> Iterator[_Target]:
    for rw in BOTH:
        yield _Target(f"null, busy polling, {rw}, depth 32", 8e6, _rate, run.values("null-busy", Cell(rw), "iops"))
    for rw in BOTH:
        yield _Target(f"RAM, {rw}, depth 32, of memcpy", 0.85, _ratio, run.values("ram", Cell(rw), "ratio"))
    for rw in BOTH:
        yield _Target(f"RAM, {rw}, depth 1", 0.8e6, _rate, run.values("ram", Cell(rw, iodepth=1), "iops"))
    for name, title in (("tmpfs", "file on tmpfs"), ("file", "file"), ("direct", "file, direct=on")):
        for cell in (Cell(rw, size, depth) for rw in BOTH for size in (4096, 128 << 10) for depth in (1, 32)):
            what = f"{title}, {cell.rw}, {size_text(cell.block_size)}, depth {cell.iodepth}, of fio"
            yield _Target(what, 0.9, _ratio, run.values(name, cell, "ratio"))
    for name, title, depth, wanted in (
        ("python", "Python", 32, 250e3),
        ("python-submit", "Python, submit", 32, 400e3),
        ("python-busy", "Python, busy polling", 1, 100e3),
    ):
        for rw in BOTH:
            values = run.values(name, Cell(rw, iodepth=depth), "iops")
            yield _Target(f"{title}, {rw}, depth {depth}", wanted, _rate, values)
    for direct, mode in _MODES.items():
        for job in GUEST_CELLS:
            what = f"guest, {mode}, {_job(job)}, of QEMU's own virtio-blk"
            yield _Target(what, 1, _ratio, run.guest_ratios(Server.QEMU, job, direct=direct))
    for key, title, wanted, told in (
        ("idle_attached", "idle, of a processor", 0.005, _percent),
        ("rss_anon_bytes", "memory beside the disk", 60 << 20, _memory),
        ("first_request_s", "start to first request", 0.3, _seconds),
    ):
        for name in COSTED:
            yield _Target(f"{name}, {title}", wanted, told, run.cost_values(name, key), at_least=False)


# Tables.


def _conditions(run: Run) -> str:
    """How and when the parts were measured: they may be of several runs."""
    keys = ("rounds", "seconds", "size", "vmmblk", "begun", "load before")
    told = {"size": size_text, "seconds": "{:g}".format}
    rows = [[name, *(told.get(key, str)(run.parts[name][key]) for key in keys)] for name in PARTS if name in run.parts]
    return _table(["", *keys], rows)


def _guest(run: Run, *, direct: bool) -> str:
    """Every job, with the ratios to each peer; of the rounds' ratios, all."""
    peers = [server for server in Server if server is not Server.VMMBLK]
    rows = []
    for cell in GUEST_CELLS:
        rates = [list(run.guest_rates(server, cell, direct=direct).values()) for server in Server]
        row = [_job(cell), *(_told(found, _rate) for found in rates)]
        for peer in peers:
            ratios = run.guest_ratios(peer, cell, direct=direct)
            row += [_told(ratios, _ratio), " ".join(f"{ratio:.2f}" for ratio in ratios)]
        rows.append(row)
    return _table(["", *Server, *(head for peer in peers for head in (f"of {peer}", "in each round"))], rows)


def _job(cell: GuestCell) -> str:
    """A job's name."""
    return f"{cell.rw} {size_text(cell.block_size)}, depth {cell.iodepth}{', flushes' if cell.flush else ''}"


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
