"""``benchmarks/run``: what it measures, and what its page says."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.cells import BOTH, DEPTHS, QUEUES, SIZES, Cell, Limit, Subject, cells, quick_subjects, subjects
from benchmarks.measure import cost, fio, guestless, image, machine
from benchmarks.page import Run, page
from vmmblk.check import check_block
from vmmblk.config import open_disk

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


def made(samples: list[dict[str, Any]], costs: list[dict[str, Any]]) -> Run:
    """A run with these figures."""
    return Run({"kernel": "6.1"}, {"rounds": 3, "seconds": 1.0, "size": 1 << 30}, samples, costs, [])


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
    quick = quick_subjects(EVERYTHING)
    assert {each.limit for each in quick} == set(Limit)
    assert all(len(each.cells) == 4 for each in quick)


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
    """With what decides how fast it is."""
    assert {"processors", "memory", "kernel", "file systems", "load before"} <= machine((tmp_path, tmp_path)).keys()


# The page.


def test_a_ratio_is_taken_within_a_round() -> None:
    """A machine that is slow for a round is slow for both: the ratio does not see it."""
    rounds = [(100e3, 200e3), (50e3, 100e3), (10e3, 10e3)]
    samples = [sample("file", Cell(), n, iops, limit) for n, (iops, limit) in enumerate(rounds)]
    run = made(samples, [])
    assert run.values("file", Cell(), "ratio") == [0.5, 0.5, 1.0]
    written = page(run, EVERYTHING, [])
    assert "| randread | 4 KiB | 32 | 1 | 50 k [10 k, 100 k] | 195 | 5 | 9 | 0.5 |" in written.replace(
        " [5, 5]", ""
    ).replace(" [9, 9]", "").replace(" [0.5, 0.5]", "")
    assert "100 k [10 k, 200 k] | 0.50x [0.50x, 1.00x] |" in written


def test_a_whole_run_measures_every_target() -> None:
    """None of what was to be reached is left without a figure, and each says whether it was."""
    samples = [sample(each.name, cell, 0, 9e6, 10e6) for each in EVERYTHING for cell in each.cells]
    written = page(made(samples, [cost_sample("null")]), EVERYTHING, [])
    targets = written.partition("## What was to be reached")[2].partition("## Without a guest")[0]
    assert targets.count("| met |") == targets.count("\n| ") - 2
    assert "not measured" in page(made([], []), EVERYTHING, [])


def test_a_target_that_is_missed_says_by_how_much() -> None:
    """As a part of what was wanted."""
    written = page(made([sample("python", Cell(), 0, 125e3)], []), EVERYTHING, [])
    assert "| Python, depth 32 | at least 250 k | 125 k | 0.50x |" in written


def test_only_disks_with_a_limit_have_columns_for_it() -> None:
    """And only what was measured has a table."""
    written = page(made([sample("null", Cell(), 0, 1e6)], []), EVERYTHING, [("a plot", "performance/a.svg")], "Why so.")
    assert "### null\n" in written
    assert "### RAM\n" not in written
    assert "limit IOPS" not in written
    assert "![a plot](performance/a.svg)" in written
    assert "\nWhy so.\n" in written
