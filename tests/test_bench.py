"""``vmmblk bench``: what it does to a device, what it notices, what it tells."""

from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from disks import Disk

from vmmblk.backends.memory import Memory
from vmmblk.cli.bench import bench
from vmmblk.cli.fio import PERCENTILES, report
from vmmblk.client import wire
from vmmblk.client.bench import Direction, Impossible, Kick, Outcome, Wait, Workload, is_indirect, run, shares
from vmmblk.client.connection import Connection, RegionInfo
from vmmblk.client.doorbells import mappable
from vmmblk.client.latency import Latencies, bucket_range
from vmmblk.engine import EngineOptions
from vmmblk.errors import Unknown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from conftest import Served

    from vmmblk.block import Buffers

    Serve = Callable[..., Served]

VMMBLK = [sys.executable, "-m", "vmmblk"]


class Flipping(Disk):
    """A disk that flips a bit in every twentieth read."""

    reads = 0

    async def read(self, sector_start: int, buffers: Buffers) -> None:
        """From memory, more or less."""
        await super().read(sector_start, buffers)
        self.reads += 1
        if self.reads % 20 == 0:
            buffers[0][100] ^= 4


class Forgetful(Disk):
    """A disk that forgets the writes to one block."""

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """To memory, but for a block."""
        if sector_start != 80:
            await super().write(sector_start, buffers)


class Failing(Disk):
    """A disk whose every third write fails half done."""

    writes = 0

    async def write(self, sector_start: int, buffers: Buffers) -> None:
        """To memory, with luck."""
        self.writes += 1
        if self.writes % 3 == 0:
            await super().write(sector_start, [buffers[0][:512]])
            raise Unknown("worn out")
        await super().write(sector_start, buffers)


@contextmanager
def process(tmp_path: Path, *arguments: str) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A server in a process of its own, and its socket."""
    path = tmp_path / "p"
    with subprocess.Popen(
        [*VMMBLK, "serve", "--socket", str(path), *arguments], stdout=subprocess.PIPE, text=True
    ) as it:
        try:
            assert it.stdout is not None
            assert it.stdout.readline()  # it says so when it listens
            yield it, path
        finally:
            it.kill()


def refusal(*arguments: object) -> str:
    """What the command says on one line when it ends with status 2."""
    result = subprocess.run(
        [*VMMBLK, "bench", *map(str, arguments)], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    return result.stderr


# What it does to the device.


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("wait", Wait, ids=lambda wait: wait.value)
@pytest.mark.parametrize("engine", ["python", "native"])
def test_every_request_is_made_once(serve: Serve, *, packed: bool, wait: Wait, engine: str) -> None:
    """As many reads and writes as asked for, none of them failed, whatever the ring and the way to wait."""
    served = serve(Memory(2 << 20), engine=engine)
    outcome = run(served.path, Workload(read_percent=30, requests=500, packed=packed, wait=wait))
    assert outcome.requests == 500
    assert 0 < outcome.read.requests < outcome.write.requests
    assert (outcome.errors, outcome.corrupt, outcome.problem, outcome.interrupted) == (0, 0, None, False)
    assert outcome.read.bytes + outcome.write.bytes == 500 * 4096
    assert 0 < outcome.kicks <= 500
    assert (outcome.interrupts > 0) == (wait is Wait.INTERRUPT)


def test_queues_have_parts_of_their_own(serve: Serve) -> None:
    """All queues work, each in its part, and nothing outside of --offset and --size is touched."""
    served = serve(Disk(2048), queues=3)
    run(served.path, Workload(read_percent=50, requests=3000, queues=3, offset=64 << 10, size=513 << 10))
    touched = {call[1] for call in served.disk.calls if call[0] in ("read", "write")}
    assert touched == set(range(128, 128 + 1024, 8))


def test_sequential_requests_go_up_and_begin_again(serve: Serve) -> None:
    """--rw write at depth 1: block after block, and after the last the first."""
    served = serve(Disk(64))
    run(served.path, Workload(read_percent=0, random=False, iodepth=1, requests=20))
    written = [call[1] for call in served.disk.calls if call[0] == "write"]
    assert written == [8 * (i % 8) for i in range(20)]


def test_the_seed_makes_a_run_that_can_be_had_again(serve: Serve) -> None:
    """The same places in the same order; another seed, other places."""
    orders = []
    for seed in (1, 1, 2):
        served = serve(Disk())
        run(served.path, Workload(iodepth=1, requests=50, seed=seed))
        orders.append([call[1] for call in served.disk.calls if call[0] == "read"])
    assert orders[0] == orders[1] != orders[2]


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_depth_up_to_the_queue_size_is_reached(serve: Serve, *, packed: bool) -> None:
    """With indirect tables where three descriptors for each request do not fit, and correct data all the same."""
    served = serve(Disk(), queue_size=16)
    shallow = run(served.path, Workload(requests=50, iodepth=5, packed=packed))
    assert not shallow.indirect
    for depth in (6, 16):
        outcome = run(served.path, Workload(read_percent=0, requests=200, iodepth=depth, packed=packed, verify=True))
        assert outcome.indirect
        assert (outcome.corrupt, outcome.problem) == (0, None)
    with pytest.raises(Impossible, match="16 requests; use --iodepth 16 or less"):
        run(served.path, Workload(requests=200, packed=packed))


def test_a_server_that_looks_by_itself_needs_no_kick(serve: Serve) -> None:
    """--kick poll never notifies."""
    served = serve(Memory(1 << 20), io=EngineOptions(poll_us=None))
    outcome = run(served.path, Workload(requests=500, kick=Kick.POLL))
    assert (outcome.requests, outcome.kicks, outcome.problem) == (500, 0, None)


def test_the_runtime_ends_it(serve: Serve) -> None:
    """And what is watched meanwhile only grows."""
    seen: list[tuple[float, int]] = []
    served = serve(Memory(1 << 20))
    outcome = run(served.path, Workload(runtime=0.25), lambda *each: seen.append(each))
    assert 0.2 < outcome.seconds < 5
    assert seen == sorted(seen)
    assert seen[-1][1] == outcome.requests > 0


# Mapped doorbells.


def test_areas_that_may_be_mapped() -> None:
    """None without the flag or a descriptor, all of it without a list, what the list says with one, bounded."""
    areas = struct.pack("<HHIIIQQQQ", 1, 1, 0, 2, 0, 0x3000, 0x1000, 0x8000, 0x2000)
    other = struct.pack("<HHIQ", 2, 1, 48, 0)
    assert mappable(RegionInfo(32, 3, 0x4000, 0, b"", (1,))) == []
    assert mappable(RegionInfo(32, 7, 0x4000, 0, b"", ())) == []
    assert mappable(RegionInfo(32, 7, 0x4000, 0, b"", (1,))) == [(0, 0x4000)]
    assert mappable(RegionInfo(64, 15, 0x4000, 0, areas, (1,))) == [(0x3000, 0x1000), (0x8000, 0x2000)]
    assert mappable(RegionInfo(64, 15, 0x4000, 0, other + areas, (1,))) == [(0x3000, 0x1000), (0x8000, 0x2000)]
    assert mappable(RegionInfo(64, 15, 0x4000, 0, areas[:40], (1,))) == [(0x3000, 0x1000)]
    assert mappable(RegionInfo(64, 15, 0x4000, 0, areas[:10], (1,))) == []


def test_a_mapped_doorbell_is_stored_to(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queue's number, at its place, and no message: the server, which does not look there, completes nothing."""
    served = serve(engine="python")
    bar = os.memfd_create("bar")
    os.ftruncate(bar, 0x8000)
    os.pwrite(bar, b"\xff" * 0x8000, 0)
    area = struct.pack("<HHIIIQQ", 1, 1, 0, 1, 0, 0x3000, 0x1000)
    ask = Connection.region_info

    def region_info(self: Connection, index: int, argsz: int = 32) -> RegionInfo:
        served.settle()  # queues are looked at when they start
        return ask(self, index, argsz)._replace(flags=15, capabilities=area, fds=(os.dup(bar),))

    monkeypatch.setattr(Connection, "region_info", region_info)
    outcome = run(served.path, Workload(requests=4, kick=Kick.MMAP, timeout=0.2))
    page = os.pread(bar, 0x8000, 0)
    os.close(bar)
    assert page[0x3000:0x3002] == b"\0\0"
    assert page.count(b"\xff") == 0x8000 - 2
    assert (outcome.kicks, outcome.requests) == (1, 0)
    assert outcome.problem is not None
    assert "did not complete a request within 0.2 s" in outcome.problem


# What it notices.


def test_what_is_written_is_read_back(serve: Serve) -> None:
    """--verify reads every block that was written, once, in the end."""
    served = serve(Disk(2048), queues=2)
    outcome = run(served.path, Workload(read_percent=50, requests=2000, queues=2, verify=True))
    written = {call[1] for call in served.disk.calls if call[0] == "write"}
    assert (outcome.verified, outcome.corrupt, outcome.problem) == (len(written), 0, None)


def test_more_requests_than_blocks_do_not_disturb_each_other(serve: Serve) -> None:
    """With --verify no block is read or written while it is written: a sound disk is never found corrupt."""
    served = serve(Memory(16 << 10), queues=2)
    outcome = run(served.path, Workload(read_percent=60, requests=5000, block_size=512, queues=2, verify=True))
    assert (outcome.requests, outcome.corrupt, outcome.problem) == (5000, 0, None)


@pytest.mark.parametrize("disk", [Flipping, Forgetful])
def test_a_disk_that_corrupts_is_caught(serve: Serve, disk: type[Disk]) -> None:
    """Be it while reading or while writing; the exit status is 1."""
    served = serve(disk(256))
    arguments = ["--socket", str(served.path), "--rw", "randrw", "--requests", "400", "--verify"]
    arguments += ["--iodepth", "1", "--seed", "1"]  # always the same requests
    result = CliRunner().invoke(bench, arguments, standalone_mode=False)
    assert result.return_value == 1
    assert "found corrupt" in result.output
    assert " 0 found corrupt" not in result.output


def test_an_earlier_run_is_not_taken_for_this_one(serve: Serve) -> None:
    """A disk that forgets a write, after a run that wrote the same block, is caught by another seed."""
    served = serve(Disk(256))
    assert run(served.path, Workload(read_percent=0, random=False, requests=32, verify=True, seed=1)).corrupt == 0
    before = bytes(served.disk.data)
    assert run(served.path, Workload(read_percent=0, random=False, requests=32, verify=True, seed=2)).corrupt == 0
    assert all(before[at : at + 4096] != served.disk.data[at : at + 4096] for at in range(0, len(before), 4096))


def test_failed_requests_are_counted_and_not_corrupt(serve: Serve) -> None:
    """After a failed write the block may hold anything; the exit status is 1."""
    served = serve(Failing(256))
    outcome = run(served.path, Workload(read_percent=30, requests=300, verify=True))
    assert 0 < outcome.errors == outcome.write.errors < 300
    assert (outcome.corrupt, outcome.problem) == (0, None)
    assert outcome.write.bytes == (outcome.write.requests - outcome.errors) * 4096


def test_a_device_that_hangs_is_not_waited_for(serve: Serve) -> None:
    """The timeout ends it, with what was measured until then."""
    served = serve(Disk())
    served.disk.held.add("write")
    outcome = run(served.path, Workload(read_percent=50, iodepth=4, requests=200, timeout=0.3))
    served.disk.release()
    assert outcome.problem is not None
    assert "did not complete a request within 0.3 s" in outcome.problem
    assert outcome.requests < 200


def test_a_server_that_dies_is_told(tmp_path: Path) -> None:
    """At once, with what was measured until then."""
    with process(tmp_path, "memory:1M") as (server, path):

        def watch(_seconds: float, requests: int) -> None:
            if requests:
                server.kill()

        began = time.monotonic()
        outcome = run(path, Workload(runtime=50, timeout=50), watch)
        assert time.monotonic() - began < 25
    assert outcome.problem is not None
    assert outcome.problem.startswith("the server ended")
    assert outcome.requests > 0


def test_ctrl_c_ends_it(serve: Serve) -> None:
    """Requests under way are waited for, and what was measured until then is the outcome."""
    served = serve(Memory(1 << 20))

    def watch(_seconds: float, requests: int) -> None:
        if requests:
            raise KeyboardInterrupt

    outcome = run(served.path, Workload(runtime=50), watch)
    assert (outcome.interrupted, outcome.problem) == (True, None)
    assert 0 < outcome.seconds < 25
    assert outcome.requests > 0


def test_a_second_ctrl_c_does_not_wait(serve: Serve) -> None:
    """Not even for a disk that hangs."""
    served = serve(Disk())
    served.disk.held.add("read")
    calls = 0

    def watch(*_: float) -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    outcome = run(served.path, Workload(requests=8, timeout=50), watch)
    served.disk.release()
    assert (outcome.interrupted, outcome.problem, outcome.requests) == (True, None, 0)
    assert calls >= 2


# What is refused.


@pytest.mark.parametrize(
    ("workload", "complaint"),
    [
        ({"queues": 3}, "the device has 2 queues; use --queues 2 or less"),
        ({"packed": True}, "does not offer packed rings; use --ring split"),
        ({"read_percent": 0}, "the disk is read-only; use --rw read or randread"),
        ({"block_size": 512}, "--bs 512 is not a multiple of the disk's block of 4096 bytes; use --bs 4096"),
        ({"kick": Kick.MMAP}, "does not let its doorbells be mapped; use --kick write"),
        ({"size": 9 << 20}, "the disk ends at 8388608 bytes"),
    ],
    ids=["queues", "packed", "read-only", "block", "mmap", "size"],
)
def test_what_a_device_cannot_do_is_refused(serve: Serve, workload: dict[str, Any], complaint: str) -> None:
    """With what to ask for instead."""
    disk = Disk(2048, sector_size=4096, read_write=False)
    served = serve(disk, queues=2, features={"packed": False})
    with pytest.raises(Impossible, match=complaint):
        run(served.path, Workload(requests=1, **workload))
    assert disk.count("read") == disk.count("write") == 0


def test_shares_cover_what_is_asked_for() -> None:
    """Each block belongs to one queue; what is no whole block to none."""
    assert shares(Workload(queues=3, block_size=1024, offset=2048), 10 * 1024 + 512) == [(2, 2), (4, 3), (7, 3)]
    assert shares(Workload(block_size=512, size=1024), 4096) == [(0, 2)]
    with pytest.raises(Impossible, match="not a multiple of --bs"):
        shares(Workload(offset=512), 1 << 20)
    with pytest.raises(Impossible, match="no block of 4096 for each queue"):
        shares(Workload(queues=2), 4096)
    with pytest.raises(Impossible, match="the disk ends at"):
        shares(Workload(offset=8192), 4096)


def test_tables_are_used_only_where_they_must_be() -> None:
    """Three descriptors for each request as long as they fit."""
    assert not is_indirect(85, 256, negotiated=True)
    assert is_indirect(86, 256, negotiated=True)
    assert is_indirect(256, 256, negotiated=True)
    with pytest.raises(Impossible, match="--iodepth 85 or less"):
        is_indirect(86, 256, negotiated=False)


def test_mistakes_on_the_command_line_are_one_line(tmp_path: Path) -> None:
    """What to do instead, and exit status 2."""
    nowhere = tmp_path / "nowhere"
    assert "no server listens there" in refusal("--socket", nowhere)
    assert "--verify checks what is written" in refusal("--socket", nowhere, "--verify")
    assert "use a multiple of 512" in refusal("--socket", nowhere, "--bs", "1000")
    assert "Invalid value for '--size'" in refusal("--socket", nowhere, "--size", "many")


# What it tells.


def test_the_command(serve: Serve, tmp_path: Path) -> None:
    """One run in a process of its own: the lines for the user and the file for fio's tools."""
    served = serve(Memory(1 << 20))
    document = tmp_path / "bench.json"
    command = [*VMMBLK, "bench", "--socket", str(served.path), "--rw", "randrw", "--rwmixread", "70"]
    command += ["--requests", "1000", "--json", str(document)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    heading, columns, read, write, costs = result.stdout.splitlines()
    assert "1000 requests" in heading
    assert columns.split() == ["IOPS", "MiB/s", "min", "us", "avg", "p50", "p99", "p99.9", "max"]
    assert (read.split()[0], write.split()[0]) == ("read", "write")
    assert "us of the server's CPU" in costs
    [job] = json.loads(document.read_text())["jobs"]
    assert job["read"]["total_ios"] + job["write"]["total_ios"] == 1000
    assert job["vmmblk"]["server_cpu_us_per_request"] is not None
    assert job["job options"]["rwmixread"] == "70"


def outcome_of(read: Direction, **changes: Any) -> Outcome:
    """An outcome with these reads."""
    values: dict[str, Any] = {
        "began": 100.0,
        "seconds": 2.0,
        "read": read,
        "write": Direction(),
        "kicks": 1,
        "interrupts": 0,
        "verified": 0,
        "corrupt": 0,
        "indirect": False,
        "server_cpu": 0.5,
        "interrupted": False,
        "problem": None,
    }
    return Outcome(**(values | changes))


def test_the_layout_of_fio() -> None:
    """The fields that fio's tools look for, in fio's units: bytes, KiB/s, milliseconds, nanoseconds."""
    taken = Latencies(1500, 3_000_000, 1500 + 3_000_000, {_bucket(1500): 1, _bucket(3_000_000): 1})
    outcome = outcome_of(Direction(2, 8192, 0, taken))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    document = report(outcome, Workload(iodepth=32), {"rw": "randread"}, usage, 1000.5)
    assert document["fio version"].startswith("fio-3.")
    assert (document["timestamp"], document["timestamp_ms"]) == (1000, 1000500)
    [job] = document["jobs"]
    assert {"jobname", "groupid", "error", "usr_cpu", "sys_cpu", "ctx", "majf", "minf", "trim"} <= job.keys()
    read = job["read"]
    expected = {"io_bytes": 8192, "io_kbytes": 8, "bw_bytes": 4096, "bw": 4, "iops": 1.0, "runtime": 2000}
    expected |= {"total_ios": 2, "short_ios": 0, "drop_ios": 0}
    assert {name: read[name] for name in expected} == expected
    assert read["lat_ns"].keys() == {"min", "max", "mean", "stddev", "N", "percentile"}
    assert read["clat_ns"] == read["lat_ns"]
    assert [float(each) for each in read["lat_ns"]["percentile"]] == list(PERCENTILES)
    assert read["lat_ns"]["percentile"]["99.900000"] == 3_000_000
    assert job["write"]["total_ios"] == job["write"]["runtime"] == 0
    assert "percentile" not in job["write"]["lat_ns"]
    assert job["iodepth_level"] == {"1": 0, "2": 0, "4": 0, "8": 0, "16": 0, "32": 100, ">=64": 0}
    assert job["latency_us"]["2"] == 50.0
    assert job["latency_ms"]["4"] == 50.0
    levels = (*job["latency_ns"].values(), *job["latency_us"].values(), *job["latency_ms"].values())
    assert sum(levels) == 100.0
    assert job["vmmblk"]["server_cpu_us_per_request"] == 250_000
    json.dumps(document)


# Latencies.


def _bucket(nanoseconds: int) -> int:
    return next(bucket for bucket in range(2560) if bucket_range(bucket)[1] >= nanoseconds)


def test_buckets_follow_each_other_and_are_narrow() -> None:
    """Each begins where the one before ended, and is no wider than a sixty-fourth of what it counts."""
    following = 0
    for bucket in range(64 * 40):
        first, last = bucket_range(bucket)
        assert first == following
        assert (last - first + 1) * 64 <= max(first, 64)
        following = last + 1


def test_percentiles() -> None:
    """Of a hundred values each the one of its rank, to the width of a bucket; the ends are exact."""
    values = [1000 * rank for rank in range(1, 101)]
    buckets: dict[int, int] = {}
    for value in values:
        buckets[_bucket(value)] = buckets.get(_bucket(value), 0) + 1
    taken = Latencies(values[0], values[-1], sum(values), buckets)
    assert (taken.count, taken.mean) == (100, 50_500)
    for rank in (1, 50, 99):
        assert taken.percentile(rank) == pytest.approx(1000 * rank, rel=1 / 64)
    assert taken.percentile(100) == taken.maximum == 100_000
    assert taken.percentile(0) >= taken.minimum
    assert taken.deviation == pytest.approx(29_011, rel=0.01)
    assert Latencies().percentile(99) == Latencies().mean == Latencies().deviation == 0


def test_latencies_of_several_queues_add_up() -> None:
    """As if they had been counted together; none counts for nothing."""
    one, other = Latencies(5, 9, 14, {5: 1, 9: 1}), Latencies(2, 9, 11, {2: 1, 9: 1})
    assert one + other == Latencies(2, 9, 25, {2: 1, 5: 1, 9: 2})
    assert one + Latencies() == Latencies() + one == one


def test_shares_of_latencies() -> None:
    """Percent below each limit and not below the one before; the rest comes last."""
    taken = Latencies(1, 60, 94, {1: 1, 3: 1, 30: 1, 60: 1})
    assert taken.shares([2, 10, 50]) == [25.0, 25.0, 25.0, 25.0]
    assert Latencies().shares([5]) == [0.0, 0.0]


def test_the_counted_latencies_are_those_of_the_requests(serve: Serve) -> None:
    """As many as there were requests, between the least and the most."""
    served = serve(Memory(1 << 20))
    taken = run(served.path, Workload(requests=300)).read.latencies
    assert taken.count == 300
    assert bucket_range(min(taken.buckets))[0] <= taken.minimum <= bucket_range(min(taken.buckets))[1]
    assert bucket_range(max(taken.buckets))[0] <= taken.maximum <= bucket_range(max(taken.buckets))[1]
    assert 0 < taken.minimum <= taken.mean <= taken.maximum


def test_ctrl_c_in_the_command_prints_what_there_is(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table comes, then the exit status of an interrupted command."""
    served = serve(Memory(1 << 20))

    def interrupted(address: Path, workload: Workload, _watch: object) -> Outcome:
        def watch(_seconds: float, requests: int) -> None:
            if requests:
                raise KeyboardInterrupt

        return run(address, workload, watch)

    monkeypatch.setattr("vmmblk.client.bench.run", interrupted)
    result = CliRunner().invoke(bench, ["--socket", str(served.path), "--runtime", "50"])
    assert result.exit_code == 1  # click's own for an abort; vmmblk's main makes it 130
    assert "interrupted; what was measured until then:" in result.output
    assert " read " in result.output


def test_region_infos_are_asked_with_room_for_capabilities(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of areas would not fit into the bare structure."""
    served = serve()
    asked: list[int] = []
    ask = Connection.region_info

    def region_info(self: Connection, index: int, argsz: int = 32) -> RegionInfo:
        asked.append(argsz)
        return ask(self, index, argsz)

    monkeypatch.setattr(Connection, "region_info", region_info)
    with pytest.raises(Impossible):
        run(served.path, Workload(requests=1, kick=Kick.MMAP))
    assert min(asked) > wire.REGION_INFO.size
