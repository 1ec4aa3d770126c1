"""The C core by itself, compiled with sanitizers: threads, races, and the fuzzer's stored inputs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Sequence

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "vmmblk" / "csrc"
CORPUS = sorted((TESTS / "corpus" / "queue").iterdir())
FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-g", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread"]
MEMORY_AND_ARITHMETIC = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREADS = ["-fsanitize=thread", "-Wno-tsan"]  # it warns that it cannot see fences; the order they make is tested
ENVIRONMENT = {
    **os.environ,
    "ASAN_OPTIONS": "abort_on_error=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}


def build(target: Path, sanitizers: Sequence[str], *sources: Path, libraries: Sequence[str] = ()) -> Path:
    """Compile a program with the system's compiler."""
    command = ["cc", *FLAGS, *sanitizers, f"-I{CSRC}", *map(str, sources), "-o", str(target), *libraries]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return target


def run(program: Path, *arguments: str) -> str:
    """Run a program, which must end well and say nothing on stderr; returns its output."""
    result = subprocess.run(
        [program, *arguments], capture_output=True, text=True, timeout=120, check=False, env=ENVIRONMENT
    )
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize(
    ("sanitizers", "rounds"),
    [(["-O2"], 250_000), (MEMORY_AND_ARITHMETIC, 50_000), (THREADS, 4_000)],
    ids=["plain", "address", "thread"],
)
def test_threads_and_races(tmp_path: Path, sanitizers: list[str], rounds: int) -> None:
    """No doorbell is lost, no chain, no byte out of bounds, no data race, whoever acts between any two accesses.

    RING-SPLIT-012, -019, RING-EVENT-016, -024, RING-PACKED-027: wishes are read after a fence, what is used is whole.
    """
    names = ("memory.c", "chain.c", "device.c", "driver.c", "driver_packed.c")
    sources = [TESTS / "csrc" / "test_core.c", *(CSRC / name for name in names)]
    assert run(build(tmp_path / "test_core", sanitizers, *sources), str(rounds)) == "ok\n"


@pytest.mark.parametrize("sanitizers", [["-O2"], MEMORY_AND_ARITHMETIC], ids=["plain", "address"])
def test_a_driver_that_rewrites_what_the_device_reads(tmp_path: Path, sanitizers: list[str]) -> None:
    """HOSTILE-026, -027, -028, -059: whatever mixture the device finds, it stays in memory that chains may name.

    Not under the sanitizer of threads: two chains of a hostile driver may share a byte, and then its memory races.
    """
    names = ("memory.c", "queue.c", "chain.c", "split.c", "packed.c", "device.c", "driver.c", "driver_packed.c")
    sources = [TESTS / "csrc" / "race_driver.c", *(CSRC / name for name in names)]
    assert run(build(tmp_path / "race_driver", sanitizers, *sources), "1500") == "ok\n"


@pytest.mark.parametrize(
    ("sanitizers", "rounds"),
    [(["-O2"], 20_000), (MEMORY_AND_ARITHMETIC, 10_000), (THREADS, 3_000)],
    ids=["plain", "address", "thread"],
)
def test_the_engine_while_memory_comes_and_goes(tmp_path: Path, sanitizers: list[str], rounds: int) -> None:
    """Every request of every queue is answered once, with the right data, while memory is taken back and mapped anew.

    Memory, files that never wait, files by io_uring, with and without private memory, and files whose transfers are
    handed over.
    """
    names = ("memory.c", "queue.c", "chain.c", "split.c", "packed.c", "device.c", "driver.c", "driver_packed.c")
    sources = [
        TESTS / "csrc" / "test_engine.c",
        *(CSRC / name for name in (*names, "engine.c", "transfer.c", "ranges.c", "bounce.c")),
    ]
    program = build(tmp_path / "test_engine", sanitizers, *sources, libraries=["-luring"])
    for kind in ("memory", "inline", "uring", "bounce", "threads"):
        assert run(program, kind, str(rounds)) == "ok\n"


@pytest.mark.parametrize("sanitizers", [["-O2"], MEMORY_AND_ARITHMETIC], ids=["plain", "address"])
def test_a_thread_of_the_engine_sleeps_over_nothing(tmp_path: Path, sanitizers: list[str]) -> None:
    """Whenever chains come, it serves them or is woken; it looks for more while that pays, and wakes to interrupt."""
    names = ("memory.c", "chain.c", "device.c", "driver.c", "driver_packed.c", "transfer.c", "ranges.c", "bounce.c")
    sources = [TESTS / "csrc" / "test_polling.c", *(CSRC / name for name in names)]
    assert run(build(tmp_path / "test_polling", sanitizers, *sources, libraries=["-luring"])) == "ok\n"


def test_the_fuzzers_inputs(tmp_path: Path) -> None:
    """What the fuzzer found worth keeping: every invariant of fuzz_queue.c holds for each input."""
    names = ("memory.c", "queue.c", "chain.c", "split.c", "packed.c", "device.c")
    sources = [TESTS / "csrc" / "fuzz_queue.c", *(CSRC / name for name in names)]
    program = build(tmp_path / "fuzz_queue", MEMORY_AND_ARITHMETIC, *sources)
    assert len(CORPUS) > 100
    assert run(program, *map(str, CORPUS)) == f"{len(CORPUS)} inputs\n"
