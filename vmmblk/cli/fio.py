"""What was measured, laid out as fio's ``--output-format=json`` is, so that what reads fio's output reads ours.  Pure.

All queues make one job.  What fio has and a benchmark without files or submission has not is there with zeroes; what
fio has not is under "vmmblk".
"""

from __future__ import annotations

import importlib.metadata
import itertools
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from resource import struct_rusage

    from vmmblk.client.bench import Direction, Outcome, Workload
    from vmmblk.client.latency import Latencies

__all__ = ["PERCENTILES", "report"]

PERCENTILES = (1, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 99, 99.5, 99.9, 99.95, 99.99)
"""Those that fio gives unless told otherwise."""

_FORMAT = "fio-3.33"
_STEPS = (2, 4, 10, 20, 50, 100, 250, 500, 750, 1000)
_DEPTHS = (1, 2, 4, 8, 16, 32)


def report(
    outcome: Outcome, workload: Workload, options: Mapping[str, str], usage: struct_rusage, ended: float
) -> dict[str, Any]:
    """The document; ``options`` as they were given, ``usage`` of this process, ``ended`` in seconds since 1970."""
    return {
        "fio version": _FORMAT,
        "timestamp": int(ended),
        "timestamp_ms": int(ended * 1000),
        "time": time.ctime(ended),
        "global options": dict(options),
        "jobs": [_job(outcome, workload, options, usage)],
        "disk_util": [],
    }


def _job(outcome: Outcome, workload: Workload, options: Mapping[str, str], usage: struct_rusage) -> dict[str, Any]:
    run_ms = max(round(outcome.seconds * 1000), 1)
    nothing = _direction(type(outcome.read)(), 0)
    completed = outcome.read.latencies + outcome.write.latencies
    return {
        "jobname": "vmmblk",
        "groupid": 0,
        "job_start": int(outcome.began * 1000),
        "error": int(outcome.problem is not None or outcome.errors > 0 or outcome.corrupt > 0),
        "eta": 0,
        "elapsed": max(round(outcome.seconds), 1),
        "job options": dict(options),
        "read": _direction(outcome.read, outcome.seconds),
        "write": _direction(outcome.write, outcome.seconds),
        "trim": nothing,
        "sync": {"total_ios": 0, "lat_ns": _latency(type(completed)())},
        "job_runtime": run_ms * workload.queues,
        "usr_cpu": 100 * usage.ru_utime * 1000 / (run_ms * workload.queues),
        "sys_cpu": 100 * usage.ru_stime * 1000 / (run_ms * workload.queues),
        "ctx": usage.ru_nvcsw + usage.ru_nivcsw,
        "majf": usage.ru_majflt,
        "minf": usage.ru_minflt,
        "iodepth_level": _depths(workload.iodepth),
        "latency_ns": _between(completed, 1, 0, _STEPS),
        "latency_us": _between(completed, 1000, 1000, _STEPS),
        "latency_ms": _between(completed, 1_000_000, 1_000_000, (*_STEPS, 2000), more=">=2000"),
        "latency_depth": workload.iodepth,
        "latency_target": 0,
        "latency_percentile": 100.0,
        "latency_window": 0,
        "vmmblk": _ours(outcome, workload),
    }


def _ours(outcome: Outcome, workload: Workload) -> dict[str, Any]:
    return {
        "version": importlib.metadata.version("vmmblk"),
        "queues": workload.queues,
        "ring": "packed" if workload.packed else "split",
        "indirect": outcome.indirect,
        "kick": workload.kick.value,
        "wait": workload.wait.value,
        "seed": workload.seed,
        "errors": outcome.errors,
        "kicks": outcome.kicks,
        "interrupts": outcome.interrupts,
        "verified_blocks": outcome.verified,
        "corrupt_blocks": outcome.corrupt,
        "server_cpu_us_per_request": outcome.cpu_us,
        "interrupted": outcome.interrupted,
        "problem": outcome.problem,
    }


def _direction(direction: Direction, seconds: float) -> dict[str, Any]:
    """One of read, write and trim; a direction in which nothing was done has not run."""
    seconds = seconds if direction.requests else 0.0
    rate = 1 / seconds if seconds else 0.0
    whole = _latency(direction.latencies)
    samples = {f"bw_{name}": 0 for name in ("min", "max", "agg", "mean", "dev", "samples")}
    samples |= {f"iops_{name}": 0 for name in ("min", "max", "mean", "stddev", "samples")}
    return {
        "io_bytes": direction.bytes,
        "io_kbytes": direction.bytes >> 10,
        "bw_bytes": int(direction.bytes * rate),
        "bw": int(direction.bytes * rate) >> 10,
        "iops": direction.requests * rate,
        "runtime": round(seconds * 1000),
        "total_ios": direction.requests,
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": _latency(type(direction.latencies)()),
        "clat_ns": whole,
        "lat_ns": whole,
        **samples,
    }


def _latency(latencies: Latencies) -> dict[str, Any]:
    found: dict[str, Any] = {
        "min": latencies.minimum,
        "max": latencies.maximum,
        "mean": latencies.mean,
        "stddev": latencies.deviation,
        "N": latencies.count,
    }
    if latencies.count:
        found["percentile"] = {f"{each:f}": latencies.percentile(each) for each in PERCENTILES}
    return found


def _between(latencies: Latencies, unit: int, start: int, steps: tuple[int, ...], more: str = "") -> dict[str, float]:
    """Percent of the requests below each step (and not below the one before), from ``start`` nanoseconds on."""
    edges = [start, *(step * unit for step in steps)]
    parts = latencies.shares(edges)[1:]
    labels = [str(step) for step in steps]
    # the first step of microseconds and milliseconds is 2: what lies between 1 and 2 belongs to it
    named = dict(zip(labels, parts[: len(labels)], strict=True))
    return named | ({more: parts[-1]} if more else {})


def _depths(iodepth: int) -> dict[str, float]:
    """All of it was at one depth: the step that holds it."""
    labels = [*map(str, _DEPTHS), ">=64"]
    edges = [0, *itertools.islice(_DEPTHS, 1, None), 64, 1 << 32]
    return {label: 100.0 if edges[i] <= iodepth < edges[i + 1] else 0.0 for i, label in enumerate(labels)}
