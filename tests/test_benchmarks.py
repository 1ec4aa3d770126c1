"""``benchmarks/run``: what it measures, and what its page says."""

from __future__ import annotations

import asyncio
import ctypes
import json
import mmap
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner

import benchmarks.__main__ as command
from benchmarks.cells import (
    BOTH,
    COSTED,
    DEPTHS,
    GUEST_CELLS,
    GUEST_DISKS,
    PARTS,
    QUEUES,
    SIZES,
    Cell,
    GuestCell,
    GuestDisk,
    Limit,
    Plan,
    Server,
    Settings,
    Subject,
    cells,
    planned_seconds,
    quick_plan,
    subjects,
)
from benchmarks.guest import fetch, in_guest, jobs, parsed
from benchmarks.measure import conditions, cost, fio, guestless, image, machine, warm
from benchmarks.page import Run, page
from benchmarks.profile import main as profile
from vmmblk.check import check_block
from vmmblk.config import open_disk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

ROOT = Path(__file__).parents[1]
DISKS = ROOT / "benchmarks" / "disks"
EVERYTHING = subjects(Path("/disk"), Path("/memory"), DISKS)
FIGURES = {"p50_us": 5.0, "p99_us": 9.0, "cpu_us": 0.5, "kicks": 0.1}
NULL = Subject("null", "null", ("null:{size}",), cells=(Cell(),))


def sample(subject: str, cell: Cell, number: int, iops: float, limit: float | None = None) -> dict[str, Any]:
    """A measurement as the raw file has it."""
    rates = {"iops": iops} | ({} if limit is None else {"limit_iops": limit})
    return {"round": number, "subject": subject, **asdict(cell), **FIGURES, **rates}


def cost_sample(subject: str, number: int = 0) -> dict[str, Any]:
    """What a server costs."""
    figures = {"first_request_s": 0.25, "idle_attached": 0.001, "idle_alone": 0.0, "rss_anon_bytes": 20 << 20}
    return {"round": number, "subject": subject, **figures}


def guest_sample(disk: GuestDisk, cell: GuestCell, number: int, iops: float) -> dict[str, Any]:
    """What fio saw in the guest, as the raw file has it."""
    return {"round": number, **asdict(disk), **asdict(cell), "iops": iops}


def made(
    samples: list[dict[str, Any]], costs: list[dict[str, Any]] | None = None, guest: list[dict[str, Any]] | None = None
) -> Run:
    """A run with these figures."""
    part = {**asdict(Settings()), "vmmblk": "1234567", "begun": "2026-01-01 12:00", "load before": "0 0 0"}
    return Run({"kernel": "6.1"}, {"guestless": part, "guest": part}, samples, costs or [], guest or [])


# What is measured.


def test_every_depth_size_and_number_of_queues_is_measured_once() -> None:
    """For reads and for writes."""
    found = cells()
    assert len(found) == len(set(found))
    for rw in BOTH:
        assert {Cell(rw, iodepth=depth) for depth in DEPTHS} <= set(found)
        assert {Cell(rw, block_size=size) for size in SIZES} <= set(found)
        assert {Cell(rw, queues=count) for count in QUEUES} <= set(found)


def test_a_quick_run_has_every_kind_of_disk() -> None:
    """And little of each."""
    quick = quick_plan(EVERYTHING)
    assert {each.limit for each in quick.subjects} == set(Limit)
    assert all(len(each.cells) == 4 for each in quick.subjects)
    assert planned_seconds(quick, PARTS) < 120


def test_a_whole_run_takes_less_than_fifty_minutes() -> None:
    """As planned, with what passes between the measurements; a part by itself takes less."""
    whole = Plan(Settings(), EVERYTHING)
    assert 600 < planned_seconds(whole, PARTS) < 50 * 60
    assert sum(planned_seconds(whole, [part]) for part in PARTS) == pytest.approx(planned_seconds(whole, PARTS))


@pytest.mark.parametrize("disk", sorted(DISKS.glob("*.py")), ids=lambda path: path.stem)
def test_the_disks_keep_the_contract(disk: Path) -> None:
    """What is measured is a disk that works."""
    asyncio.run(check_block(lambda: open_disk(str(disk), ["size=64K"])))


def test_a_disk_without_a_guest() -> None:
    """One sample for each cell, with its figures."""
    [found] = guestless(NULL, None, 1 << 20, 0.1)
    assert found.keys() == sample("null", Cell(), 0, 1.0).keys() - {"round"}
    assert min(found["iops"], found["p50_us"], found["p99_us"]) > 0


def test_memory_has_memcpy_beside_it() -> None:
    """Measured for the same block and direction."""
    [found] = guestless(Subject("ram", "RAM", ("memory:{size}",), Limit.MEMCPY, cells=(Cell(),)), None, 1 << 20, 0.05)
    assert found["limit_iops"] > 0


def test_what_a_server_costs() -> None:
    """Seconds, shares of a processor, bytes."""
    found = cost(NULL, None, 1 << 20, 0.1)
    assert found.keys() == cost_sample("null").keys() - {"round"}
    assert 0 < found["first_request_s"] < 30
    assert 1 << 20 < found["rss_anon_bytes"] < 1 << 30


def test_a_server_that_does_not_start_is_told(tmp_path: Path) -> None:
    """Instead of being waited for."""
    missing = Subject("file", "file", ("{file}",), cells=(Cell(),))
    with pytest.raises(RuntimeError, match="the server does not start"):
        list(guestless(missing, tmp_path / "nothing", 1 << 20, 0.1))


def test_an_image_is_whole_and_goes_away(tmp_path: Path) -> None:
    """Without holes, which would be read faster than data."""
    with image(tmp_path, 2 << 20) as path:
        assert path.stat().st_size == 2 << 20
        assert path.stat().st_blocks * 512 >= 2 << 20
    assert list(tmp_path.iterdir()) == []


def resident(path: Path) -> float:
    """The share of a file's pages that is in the page cache (mincore(2))."""
    pages = -(-path.stat().st_size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        start = ctypes.c_char.from_buffer(mapped)
        mincore = ctypes.CDLL(None).mincore
        failed = mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(pages * mmap.PAGESIZE), found)
        del start
    assert not failed
    return sum(each & 1 for each in found) / pages


def test_a_file_is_brought_back_to_the_page_cache(tmp_path: Path) -> None:
    """Whatever threw it out: the next disk is measured in memory, not on the device."""
    with image(tmp_path, 2 << 20) as path:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        warm(path)
        assert resident(path) == 1


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ('{"jobs": [{"error": 0, "read": {"iops": 5.0}, "write": {"iops": 7.0}}]}', ""),
        ('{"jobs": [{"error": 5, "read": {"iops": 0}, "write": {"iops": 0}}]}', "fio failed with error 5"),
        ("fio: no such engine", "fio failed: fio: no such engine"),
    ],
    ids=["rates", "error", "no JSON"],
)
def test_fio_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, told: str) -> None:
    """Its rate in the direction of the cell, or its complaint."""
    program = tmp_path / "fio"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    if told:
        with pytest.raises(RuntimeError, match=told):
            fio(tmp_path / "f", Cell(), 1 << 20, 0.5, direct=False)
    else:
        assert fio(tmp_path / "f", Cell("randwrite"), 1 << 20, 0.5, direct=True) == 7.0


def test_the_machine_is_described(tmp_path: Path) -> None:
    """With what decides how fast it is, and what else it was doing."""
    assert {"processors", "memory", "kernel", "file systems"} <= machine((tmp_path, tmp_path)).keys()
    assert conditions().keys() == {"vmmblk", "begun", "load before"}


# In a guest.


def test_every_server_comes_first_in_some_round() -> None:
    """So that being first, or last, is nobody's privilege; all disks are measured in each round."""
    orders = [re.findall(r"--filename=\$disk(\d)", jobs(GUEST_CELLS[0], number, 1)[0]) for number in range(3)]
    assert all(sorted(order) == [str(index) for index in range(len(GUEST_DISKS))] for order in orders)
    assert {GUEST_DISKS[int(order[0])].server for order in orders} == set(Server)


def test_what_was_written_in_the_guest_is_flushed_before_others_are_measured() -> None:
    """Of every disk, after every job that writes."""
    for cell in GUEST_CELLS:
        flushes = sum("conv=fsync" in line for line in jobs(cell, 0, 1))
        assert flushes == (len(GUEST_DISKS) if "write" in cell.rw else 0)


def test_what_fio_says_in_the_guest() -> None:
    """The rate in the direction of the job, for each disk; fio says them in its order."""
    said = "\n".join(f"{index};{10 * index};{20 * index}" for index in (1, 2, 0, 4, 5, 3))
    assert dict(parsed(said, GuestCell("read")))[GUEST_DISKS[4]] == 40
    assert dict(parsed(said, GuestCell("randwrite")))[GUEST_DISKS[4]] == 80
    with pytest.raises(RuntimeError, match="did not measure every disk"):
        list(parsed(said.partition("\n")[2], GuestCell("read")))


@pytest.mark.guest
def test_disks_in_a_guest(tmp_path: Path) -> None:
    """Each has a rate, whoever serves it."""
    job = GuestCell("randwrite", iodepth=8, flush=True)
    found = list(in_guest([job], Settings(1, 0.1, 16 << 20), fetch(), tmp_path))
    assert [each.keys() for each in found] == [guest_sample(disk, job, 0, 1).keys() for disk in GUEST_DISKS]
    assert {GuestDisk(each["server"], each["direct"]) for each in found} == set(GUEST_DISKS)
    assert min(each["iops"] for each in found) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.guest
def test_a_guest_that_does_not_start_is_told_in_one_line(tmp_path: Path) -> None:
    """Here for want of a storage daemon: what QEMU says of it is the reason."""
    with pytest.raises(RuntimeError, match=r"^the guest ended too early; .*qemu-system-x86_64: .*$"):
        list(in_guest(GUEST_CELLS, Settings(1, 0.1, 1 << 20), Path("/bin/false"), tmp_path))


# The command.


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path | None]]:
    """The command measures nothing: it tells subjects and files here, and has one figure for everything."""
    seen: list[tuple[str, Path | None]] = []

    def guestless(subject: Subject, file: Path | None, *_: object) -> Iterator[dict[str, Any]]:
        seen.append((subject.name, file))
        yield sample(subject.name, Cell(), 0, 1e3)

    def in_guest(*_: object) -> Iterator[dict[str, Any]]:
        seen.append(("guest", None))
        yield from (guest_sample(disk, GUEST_CELLS[0], 0, 2e3) for disk in GUEST_DISKS)

    monkeypatch.setattr(command, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(command, "TMPFS", tmp_path)
    monkeypatch.setattr(command, "guestless", guestless)
    monkeypatch.setattr(command, "cost", lambda subject, *_: cost_sample(subject.name))
    monkeypatch.setattr(command, "fetch", lambda: Path("/daemon"))
    monkeypatch.setattr(command, "accelerator", dict)
    monkeypatch.setattr(command, "in_guest", in_guest)
    monkeypatch.setattr(command, "draw", lambda *_: [])
    return seen


def ran(folder: Path, *arguments: str) -> tuple[Result, Run]:
    """The command, on small disks, and what it has kept last."""
    result = CliRunner().invoke(command.main, ["--size", "1M", "--rounds", "2", "--output", str(folder), *arguments])
    return result, Run(**json.loads(max((folder / "kept").iterdir()).read_text()))


def test_each_disk_has_an_image_of_its_own(tmp_path: Path, measured: list[tuple[str, Path | None]]) -> None:
    """Direct writes throw a file out of the page cache, which another disk would be measured without."""
    result, run = ran(tmp_path)
    assert result.exit_code == 0, result.output
    files = {name: file for name, file in measured if file is not None}
    assert files.keys() == {"tmpfs", "file", "direct"}
    assert len(set(files.values())) == 3
    assert {name: part["rounds"] for name, part in run.parts.items()} == {"guestless": 2, "cost": 2, "guest": 1}
    assert [each["subject"] for each in run.costs] == [*COSTED] * 2


def test_a_part_that_fails_is_told_and_left_out(
    tmp_path: Path, measured: list[tuple[str, Path | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line, and the page has the rest."""

    def fetch() -> Path:
        raise RuntimeError("what led there\nno network")

    monkeypatch.setattr(command, "fetch", fetch)
    result, run = ran(tmp_path)
    assert result.exit_code == 1
    assert "\nError: guest: no network\n" in result.output
    assert "what led there" not in result.output
    assert run.samples
    assert run.costs
    written = (tmp_path / "performance.md").read_text()
    assert "### null\n" in written
    assert "## In a guest" not in written


def test_a_part_is_measured_anew(tmp_path: Path, measured: list[tuple[str, Path | None]]) -> None:
    """And the rest taken from an earlier run, whose file stays as it was."""
    disk = GUEST_DISKS[0]
    earlier = made([sample("null", Cell(), 0, 5e6)], [cost_sample("null")], [guest_sample(disk, GUEST_CELLS[1], 0, 1)])
    raw = tmp_path / "raw.json"
    raw.write_text(json.dumps(asdict(earlier)))
    result, run = ran(tmp_path, "--raw", str(raw), "--only", "guest")
    assert result.exit_code == 0, result.output
    assert measured == [("guest", None)]
    assert (run.samples, run.costs) == (earlier.samples, earlier.costs)
    assert run.guest_rates(disk.server, GUEST_CELLS[0], direct=disk.direct) == {0: 2e3}
    assert run.guest_rates(disk.server, GUEST_CELLS[1], direct=disk.direct) == {}
    assert Run(**json.loads(raw.read_text())) == earlier
    assert "| randread | 4 KiB | 32 | 1 | 5 M |" in (tmp_path / "performance.md").read_text()


def test_a_file_that_is_none_of_ours_is_told(tmp_path: Path, measured: list[tuple[str, Path | None]]) -> None:
    """And nothing is written."""
    (tmp_path / "raw.json").write_text("[1]")
    result = CliRunner().invoke(command.main, ["--raw", str(tmp_path / "raw.json"), "--output", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "raw.json is no file of an earlier run" in result.output
    assert not (tmp_path / "out").exists()


# The profile.


def test_a_profile_has_the_top_symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what was run and how fast it was."""
    perf = tmp_path / "perf"
    perf.write_text(
        "#!/bin/sh\n"
        'if [ $1 = record ]; then while [ $1 != -- ]; do shift; done; shift; exec "$@"; fi\n'
        "printf '\n 60.00%%  engine  libc.so  [.] copy    -      -\n 30.00%%  python  python  [.] eval  -  -\n'\n"
    )
    perf.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    options = ["--top", "1", "--requests", "10", "--iodepth", "2"]
    result = CliRunner().invoke(profile, options, obj=["--poll-us", "0", "null:1M"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("$ vmmblk serve --poll-us 0 null:1M\n$ vmmblk bench --requests 10 --iodepth 2\n")
    assert "10 requests" in result.output
    assert result.output.endswith("\n 60.00%  engine  libc.so  [.] copy\n")


@pytest.mark.parametrize(
    ("perf", "serve", "told"),
    [
        (None, ["null:1M"], "Error: perf is missing: apt-get install linux-perf\n"),
        ("exit 255", ["null:1M"], "Error: perf record ended with status 255; the reason is above\n"),
        ("exit 0", [], "Error: write what to serve after --; see benchmarks/profile --help\n"),
    ],
    ids=["no perf", "no permission", "nothing to serve"],
)
def test_a_profile_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, perf: str | None, serve: list[str], told: str
) -> None:
    """One line says why."""
    if perf is not None:
        (tmp_path / "perf").write_text(f"#!/bin/sh\n{perf}\n")
        (tmp_path / "perf").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(profile, [], obj=serve)
    assert result.exit_code
    assert result.output.endswith(told)


# The page.


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that is slow for a round is slow for both: the ratio does not see it."""
    rounds = [(100e3, 200e3), (50e3, 100e3), (10e3, 10e3)]
    samples = [sample("file", Cell(), n, iops, limit) for n, (iops, limit) in enumerate(rounds)]
    run = made(samples)
    assert run.values("file", Cell(), "ratio") == [0.5, 0.5, 1.0]
    written = page(run, EVERYTHING, [])
    assert "| randread | 4 KiB | 32 | 1 | 50 k [10 k, 100 k] | 195 | 5 | 9 | 0.5 |" in written.replace(
        " [5, 5]", ""
    ).replace(" [9, 9]", "").replace(" [0.5, 0.5]", "")
    assert "100 k [10 k, 200 k] | 0.50x [0.50x, 1.00x] |" in written


def test_a_whole_run_measures_every_target() -> None:
    """None of what was to be reached is left without a figure, and each says whether it was."""
    samples = [sample(each.name, cell, 0, 9e6, 10e6) for each in EVERYTHING for cell in each.cells]
    guest = [guest_sample(disk, cell, 0, 1e3) for disk in GUEST_DISKS for cell in GUEST_CELLS]
    written = page(made(samples, [cost_sample(name) for name in COSTED], guest), EVERYTHING, [])
    targets = written.partition("## What was to be reached")[2].partition("## Without a guest")[0]
    count = targets.count("\n| ") - 2
    assert targets.count("| met |") == count
    assert f"\n{count} of {count} are met.\n" in targets
    assert f"\n0 of {count} are met, {count} not measured.\n" in page(made([]), EVERYTHING, [])


def test_a_target_that_is_missed_says_by_how_much() -> None:
    """As a part of what was wanted."""
    written = page(
        made([sample("python", Cell(), 0, 125e3)], [cost_sample("null") | {"idle_attached": 0.01}]), EVERYTHING, []
    )
    assert "| Python, randread, depth 32 | at least 250 k | 125 k | **missed by 50 %** |" in written
    assert "| null, idle, of a processor | below 0.50 % | 1.00 % | **missed by 100 %** |" in written
    assert ", 2 missed, " in written


def test_the_guest_is_compared_within_a_round_and_a_cache_mode() -> None:
    """With every peer; each job is held against QEMU's own device."""
    job = GUEST_CELLS[0]
    rates = {Server.VMMBLK: (10e3, 60e3), Server.QEMU: (20e3, 40e3), Server.DAEMON: (5e3, 30e3)}
    guest = [
        guest_sample(GuestDisk(each, direct=True), job, number, iops)
        for each, both in rates.items()
        for number, iops in enumerate(both)
    ]
    guest.append(guest_sample(GuestDisk(Server.QEMU, direct=False), job, 0, 1.0))
    run = made([], guest=guest)
    assert run.guest_ratios(Server.QEMU, job, direct=True) == [0.5, 1.5]
    assert run.guest_ratios(Server.DAEMON, job, direct=True) == [2, 2]
    assert run.guest_ratios(Server.QEMU, job, direct=False) == []
    written = page(run, EVERYTHING, [])
    assert "1.00x [0.50x, 1.50x] | 0.50 1.50 | 2.00x [2.00x, 2.00x] | 2.00 2.00 |\n" in written
    assert (
        "randread 4 KiB, depth 1, of QEMU's own virtio-blk | at least 1.00x | 1.00x [0.50x, 1.50x] | met |" in written
    )


def test_the_page_says_when_each_part_was_measured() -> None:
    """They may be of different runs."""
    written = page(made([]), EVERYTHING, [])
    assert "| guest | 5 | 1 | 1024 MiB | 1234567 | 2026-01-01 12:00 | 0 0 0 |" in written


def test_only_disks_with_a_limit_have_columns_for_it() -> None:
    """And only what was measured has a table."""
    written = page(made([sample("null", Cell(), 0, 1e6)]), EVERYTHING, [("a plot", "performance/a.svg")], "Why so.")
    assert "### null\n" in written
    assert "### RAM\n" not in written
    assert "limit IOPS" not in written
    assert "![a plot](performance/a.svg)" in written
    assert "\nWhy so.\n" in written
