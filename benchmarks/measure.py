"""Taking the measurements: servers, their cost, and what the machine does without them.

A sample is a dictionary, as it is kept in the raw file: what was measured, in which round, and the figures.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmmblk._core import lib

from benchmarks.cells import Limit
from vmmblk.client.bench import Workload, run
from vmmblk.client.driver import attach

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.cells import Cell, Subject
    from vmmblk.client.bench import Outcome

__all__ = ["Sample", "conditions", "cost", "guestless", "image", "machine", "served", "warm"]

Sample = dict[str, Any]

_SETTLE_SECONDS = 0.5
_CHUNK = 1 << 20
_COST_SIZE = 16 << 20
_FILL = 128 << 10
_WRITE = {"randwrite": True, "randread": False}


@contextlib.contextmanager
def image(folder: Path, size: int, *, cached: bool = True) -> Iterator[Path]:
    """A file without holes, on the disk and, if ``cached``, in the page cache; it is removed afterwards."""
    handle, name = tempfile.mkstemp(prefix="vmmblk-bench-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            for _ in range(size // _CHUNK):
                file.write(os.urandom(_CHUNK))
            file.flush()
            os.fsync(file.fileno())
            if not cached:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield path
    finally:
        path.unlink()


def warm(path: Path) -> None:
    """Read all of a file, so that it is in the page cache whatever happened since it was written."""
    piece = bytearray(_CHUNK)
    with path.open("rb", buffering=0) as file:
        while file.readinto(piece):
            pass


@contextlib.contextmanager
def served(arguments: Sequence[str], queues: int = 1) -> Iterator[tuple[int, Path]]:
    """A server in a process of its own: its number, and its socket."""
    with tempfile.TemporaryDirectory(prefix="vmmblk-bench-") as folder:
        path = Path(folder, "socket")
        command = [sys.executable, "-m", "vmmblk", "serve", "--socket", str(path), "--queues", str(queues), *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
            try:
                if server.stdout is None or not server.stdout.readline():  # it prints once it listens
                    raise RuntimeError("the server does not start; its message is above")
                yield server.pid, path
            finally:
                server.terminate()


# Without a guest, and without a device.


def guestless(subject: Subject, file: Path | None, size: int, seconds: float) -> Iterator[Sample]:
    """Each cell of a disk, and its limit right after it: what else happens on the machine falls on both."""
    arguments = [each.format(size=size, file=file) for each in subject.arguments]
    with served(arguments, max(cell.queues for cell in subject.cells)) as (_, path):
        if file is None:
            _fill(path, size)
        for cell in subject.cells:
            _warm(subject, file)
            sample = _driven(path, cell, seconds)
            _warm(subject, file)
            yield {"subject": subject.name, **asdict(cell), **sample, **_limit(subject, cell, file, size, seconds)}


def _warm(subject: Subject, file: Path | None) -> None:
    """Before everything that works on a cached file: a hypervisor may take pages back at any time."""
    if file is not None and not subject.direct:
        warm(file)


def _fill(path: Path, size: int) -> None:
    """Write all of a disk, so that its memory is there; a file has been written already."""
    _checked(run(path, Workload(0, random=False, block_size=_FILL, iodepth=8, requests=size // _FILL)))


def _checked(outcome: Outcome) -> Outcome:
    """The outcome, if it is one of all that was asked for."""
    if outcome.interrupted:
        raise KeyboardInterrupt
    if outcome.problem is not None or outcome.errors:
        raise RuntimeError(outcome.problem or f"{outcome.errors} requests failed")
    return outcome


def _driven(path: Path, cell: Cell, seconds: float) -> Sample:
    percent = 0 if _WRITE[cell.rw] else 100
    workload = Workload(percent, block_size=cell.block_size, iodepth=cell.iodepth, queues=cell.queues, runtime=seconds)
    outcome = _checked(run(path, workload))
    taken = outcome.read.latencies + outcome.write.latencies
    return {
        "iops": outcome.requests / outcome.seconds,
        "p50_us": taken.percentile(50) / 1000,
        "p99_us": taken.percentile(99) / 1000,
        "cpu_us": outcome.cpu_us,
        "kicks": outcome.kicks / outcome.requests,
    }


def _limit(subject: Subject, cell: Cell, file: Path | None, size: int, seconds: float) -> Sample:
    """The rate of the machine itself, for one queue: a limit of several would be several limits."""
    if cell.queues > 1:
        return {}
    if subject.limit is Limit.MEMCPY:
        return {"limit_iops": lib.vdrv_memcpy_rate(size, cell.block_size, _WRITE[cell.rw], int(seconds * 1e9))}
    if subject.limit is Limit.FIO and file is not None:
        return {"limit_iops": fio(file, cell, size, seconds, direct=subject.direct)}
    return {}


def fio(file: Path, cell: Cell, size: int, seconds: float, *, direct: bool) -> float:
    """Requests per second of fio's io_uring engine on a file, which stays in the page cache.  Raises RuntimeError."""
    command = ["fio", "--name=limit", f"--filename={file}", "--ioengine=io_uring", f"--rw={cell.rw}"]
    command += [f"--bs={cell.block_size}", f"--iodepth={cell.iodepth}", f"--size={size}", f"--direct={int(direct)}"]
    command += ["--time_based", f"--runtime={math.ceil(seconds)}", "--norandommap", "--randrepeat=0", "--invalidate=0"]
    command += ["--overwrite=1", "--fallocate=none", "--thread", "--output-format=json"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        [job] = json.loads(result.stdout)["jobs"]
    except (ValueError, KeyError) as exc:
        reason = (result.stderr or result.stdout).strip().splitlines()[:1]
        raise RuntimeError(f"fio failed: {''.join(reason) or result.returncode}") from exc
    if job["error"]:
        raise RuntimeError(f"fio failed with error {job['error']}")
    return float(job["write" if _WRITE[cell.rw] else "read"]["iops"])


# What a server costs.


def cost(subject: Subject, file: Path | None, size: int, seconds: float) -> Sample:
    """Time to the first request, what the idle server takes, and its memory after some work."""
    small = min(size, _COST_SIZE)  # what a disk of memory takes is not the server's
    arguments = [each.format(size=small, file=file) for each in subject.arguments]
    began = time.monotonic()
    with served(arguments) as (pid, path):
        with attach(path) as driver:
            driver.read(0, 4096)
            first = time.monotonic() - began
            waiting = _idle(pid, seconds)
        _checked(run(path, Workload(requests=1000)))
        return {
            "subject": subject.name,
            "first_request_s": first,
            "idle_attached": waiting,
            "idle_alone": _idle(pid, seconds),
            "rss_anon_bytes": _rss_anon(pid),
        }


def _idle(pid: int, seconds: float) -> float:
    """The share of a processor that a process takes while nobody wants anything of it."""
    time.sleep(_SETTLE_SECONDS)
    before, began = _cpu_ns(pid), time.monotonic_ns()
    time.sleep(seconds)
    return (_cpu_ns(pid) - before) / (time.monotonic_ns() - began)


def _cpu_ns(pid: int) -> int:
    """The time on processors of all threads, which must not come and go meanwhile."""
    return sum(int(task.read_text().split()[0]) for task in Path(f"/proc/{pid}/task").glob("*/schedstat"))


def _rss_anon(pid: int) -> int:
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(lines["RssAnon"].split()[0]) * 1024


# The machine.


def machine(folders: Sequence[Path]) -> dict[str, str]:
    """What it is, for whoever reads the figures."""
    cpu = [
        line.partition(":")[2].strip() for line in _text("/proc/cpuinfo").splitlines() if line.startswith("model name")
    ]
    flags = next((line for line in _text("/proc/cpuinfo").splitlines() if line.startswith("flags")), "")
    memory = next((line.split()[1] for line in _text("/proc/meminfo").splitlines()), "0")
    kernel = os.uname()
    found = {
        "processors": f"{len(os.sched_getaffinity(0))} of {cpu[0] if cpu else 'unknown kind'}",
        "virtual machine": "yes" if " hypervisor" in flags else "no",
        "memory": f"{int(memory) / (1 << 20):.1f} GiB",
        "kernel": kernel.release,
        "Python": sys.version.split()[0],
        "fio": _said("fio", "--version"),
        "file systems": ", ".join(
            f"{name} {_file_system(folder)}" for name, folder in zip(("file", "tmpfs"), folders, strict=True)
        ),
    }
    return {name: value for name, value in found.items() if value}


def conditions() -> dict[str, str]:
    """When something is measured, and of what state of the sources."""
    return {
        "vmmblk": _said("git", "describe", "--always", "--dirty"),
        "begun": time.strftime("%Y-%m-%d %H:%M"),
        "load before": " ".join(f"{each:.2f}" for each in os.getloadavg()),
    }


def _file_system(folder: Path) -> str:
    return _said("stat", "-f", "-c", "%T", str(folder))


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return ""


def _text(path: str) -> str:
    return Path(path).read_text()
