"""``vmmblk bench``: how fast a virtio-blk server is, with no guest."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from vmmblk.cli.common import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import Console

    from vmmblk.client.bench import Direction, Outcome, Workload

__all__ = ["bench"]

_MODES = {"randread": (100, True), "randwrite": (0, True), "randrw": (None, True)}
_MODES |= {"read": (100, False), "write": (0, False), "rw": (None, False)}
_DEFAULT_RUNTIME = 5.0
_SECONDS = click.FloatRange(min=0, min_open=True)


def _size(_context: click.Context, _parameter: click.Parameter, value: str | None) -> int | None:
    from vmmblk.config import parse_size
    from vmmblk.errors import ConfigError

    try:
        return None if value is None else parse_size(value)
    except ConfigError as exc:
        raise click.BadParameter(str(exc)) from None


def _block(context: click.Context, parameter: click.Parameter, value: str) -> int:
    size = _size(context, parameter, value)
    if size is None or not 512 <= size <= 1 << 30 or size % 512:
        raise click.BadParameter("use a multiple of 512, 1G at most")
    return size


@click.command()
@click.option("--socket", "socket_path", required=True, type=click.Path(path_type=Path), help="Where the server is.")
@click.option("--rw", type=click.Choice(list(_MODES)), default="randread", show_default=True, help="What to do.")
@click.option("--rwmixread", type=click.IntRange(0, 100), default=50, help="Percent of reads in rw and randrw (50).")
@click.option("--bs", default="4k", callback=_block, help="Bytes of a request (4k).")
@click.option("--iodepth", type=click.IntRange(1, 32768), default=32, help="Requests under way in each queue (32).")
@click.option("--queues", type=click.IntRange(1, 64), default=1, help="Virtqueues, with a thread for each (1).")
@click.option("--runtime", type=_SECONDS, help=f"Seconds ({_DEFAULT_RUNTIME:g}, if --requests does not end it).")
@click.option("--requests", type=click.IntRange(min=1), help="End after so many, of all queues together.")
@click.option("--size", callback=_size, help="Bytes of the disk that are used (all).")
@click.option("--offset", default="0", callback=_size, help="Where they begin (0).")
@click.option("--ring", type=click.Choice(["split", "packed"]), default="split", help="Format of the virtqueues.")
@click.option(
    "--kick",
    type=click.Choice(["write", "mmap", "eventfd", "poll"]),
    default="write",
    help="Notify by messages, stores into mapped doorbells, eventfds, or, if the server looks by itself, never (poll).",
)
@click.option(
    "--wait",
    type=click.Choice(["poll", "interrupt"]),
    default="poll",
    help="Look for completions all the time, or sleep until interrupted.",
)
@click.option("--verify", is_flag=True, help="Check that blocks read as they were last written, and all in the end.")
@click.option("--seed", type=click.IntRange(0, (1 << 63) - 1), help="Of places and data; by default another each time.")
@click.option("--timeout", type=_SECONDS, default=5.0, help="Seconds that an answer or a completion may take (5).")
@click.option(
    "--json", "json_file", type=click.File("w", lazy=False), help="Write it as fio does; - is standard output."
)
def bench(*, socket_path: Path, rw: str, rwmixread: int, json_file: TextIO | None, **options: object) -> int:
    """Measure a vfio-user virtio-blk server, any, with no VMM connected.

    As with fio, there is no question before a write: with --rw write, randwrite, rw or randrw what the disk holds
    between --offset and --offset plus --size is lost.  Nothing beyond is written.

    The exit status is 0; 1 if requests failed or blocks did not hold what was written; 2 if it cannot be measured, or
    not to the end.
    """
    import resource

    from vmmblk.cli.fio import report
    from vmmblk.client.bench import Impossible

    workload = _workload(rw, rwmixread, options)
    console = _console(stderr=json_file is not None and json_file.name == "<stdout>")
    try:
        outcome = _run(socket_path, workload)
    except Impossible as exc:
        raise click.ClickException(str(exc)) from exc
    except (FileNotFoundError, ConnectionRefusedError) as exc:
        raise click.ClickException(f"{socket_path}: no server listens there; start it, or mend --socket") from exc
    except OSError as exc:
        reason = str(exc) or type(exc).__name__
        raise click.ClickException(f"{socket_path}: {reason}; start the server with no VMM connected") from exc
    _tell(outcome, workload, rw, console)
    if json_file is not None:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        document = report(outcome, workload, _given(rw, rwmixread, workload), usage, time.time())
        json_file.write(json.dumps(document, indent=2) + "\n")
    if outcome.problem is not None:
        raise click.ClickException(f"{socket_path}: {outcome.problem}")
    if outcome.interrupted:
        raise click.Abort
    return int(bool(outcome.errors or outcome.corrupt))


def _workload(rw: str, rwmixread: int, options: dict[str, object]) -> Workload:
    from vmmblk.client.bench import Kick, Wait, Workload

    percent, random = _MODES[rw]
    if options["verify"] and percent == 100:
        raise click.UsageError("--verify checks what is written: use it with --rw write, randwrite, rw or randrw")
    if options["runtime"] is None and options["requests"] is None:
        options["runtime"] = _DEFAULT_RUNTIME
    if options["seed"] is None:
        options["seed"] = int.from_bytes(os.urandom(7), "little")
    return Workload(
        read_percent=rwmixread if percent is None else percent,
        random=random,
        block_size=options.pop("bs"),  # type: ignore[arg-type]
        packed=options.pop("ring") == "packed",
        kick=Kick(options.pop("kick")),
        wait=Wait(options.pop("wait")),
        **options,  # type: ignore[arg-type]
    )


def _given(rw: str, rwmixread: int, workload: Workload) -> Mapping[str, str]:
    """The options by fio's names; the engine is ours."""
    given = {
        "ioengine": "vmmblk",
        "rw": rw,
        "bs": str(workload.block_size),
        "iodepth": str(workload.iodepth),
        "numjobs": str(workload.queues),
        "group_reporting": "1",
        "randseed": str(workload.seed),
        "offset": str(workload.offset),
    }
    optional = {"size": workload.size, "runtime": workload.runtime, "number_ios": workload.requests}
    if _MODES[rw][0] is None:
        optional["rwmixread"] = rwmixread
    return given | {
        name: f"{value:g}" if isinstance(value, float) else str(value)
        for name, value in optional.items()
        if value is not None
    }


def _run(socket_path: Path, workload: Workload) -> Outcome:
    """Do it, with progress if somebody is watching."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from vmmblk.client.bench import run

    console = _console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def update(done: float, rate: float) -> None:
            progress.update(task, completed=done, description=f"{_rate(rate)} IOPS")

        outcome = run(socket_path, workload, _watch(workload, update))
    if outcome.interrupted:
        say("interrupted; what was measured until then:")
    return outcome


def _watch(workload: Workload, update: Callable[[float, float], None]) -> Callable[[float, int], None]:
    """Tell ``update`` what part is done, and the requests per second since it was told last."""
    before = (0.0, 0)

    def watch(seconds: float, requests: int) -> None:
        nonlocal before
        parts = [seconds / workload.runtime if workload.runtime else 0.0]
        parts.append(requests / workload.requests if workload.requests else 0.0)
        passed = seconds - before[0]
        update(min(max(parts), 1.0), (requests - before[1]) / passed if passed > 0 else 0.0)
        before = (seconds, requests)

    return watch


def _tell(outcome: Outcome, workload: Workload, rw: str, console: Console) -> None:
    """A table of the directions, and a line of what both cost."""
    from rich.table import Table

    ring = f"{'packed' if workload.packed else 'split'} ring{'s' * (workload.queues > 1)}"
    depth = f"iodepth {workload.iodepth} x {workload.queues} queue{'s' * (workload.queues > 1)}"
    console.print(
        f"{rw}, {workload.block_size} bytes, {depth}, {ring}, kick {workload.kick.value}, wait {workload.wait.value},"
        f" {outcome.requests} requests in {outcome.seconds:.3g} s",
        highlight=False,
    )
    table = Table("", "IOPS", "MiB/s", "min us", "avg", "p50", "p99", "p99.9", "max", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, direction in (("read", outcome.read), ("write", outcome.write)):
        if direction.requests:
            table.add_row(name, *_cells(direction, outcome.seconds))
    console.print(table)
    console.print(", ".join(_costs(outcome)), highlight=False)


def _cells(direction: Direction, seconds: float) -> list[str]:
    taken = direction.latencies
    times = [taken.minimum, taken.mean, *(taken.percentile(each) for each in (50, 99, 99.9)), taken.maximum]
    speed = [_rate(direction.requests / seconds), f"{direction.bytes / seconds / (1 << 20):.4g}"]
    return [*speed, *(f"{each / 1000:.1f}" for each in times)]


def _costs(outcome: Outcome) -> list[str]:
    requests = outcome.requests or 1
    found = [f"per request: {outcome.kicks / requests:.3f} kicks", f"{outcome.interrupts / requests:.3f} interrupts"]
    if outcome.cpu_us is not None:
        found.append(f"{outcome.cpu_us:.2f} us of the server's CPU")
    if outcome.errors:
        found.append(f"{outcome.errors} requests failed")
    if outcome.verified or outcome.corrupt:
        found.append(f"{outcome.verified} blocks read back, {outcome.corrupt} found corrupt")
    return found


def _rate(per_second: float) -> str:
    for factor, unit in ((1e6, " M"), (1e3, " k")):
        if per_second >= factor:
            return f"{per_second / factor:.3f}{unit}"
    return f"{per_second:.1f}"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    watched = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, soft_wrap=not watched)
