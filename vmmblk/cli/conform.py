"""``vmmblk conform``: check a virtio-blk server against the rules of VIRTIO."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, TextIO

import click

from vmmblk.cli.common import say

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rich.console import Console

    from vmmblk.conform.check import Check
    from vmmblk.conform.report import Report
    from vmmblk.conform.runner import Result
    from vmmblk.conform.target import Facts, Options

__all__ = ["conform"]

_SECONDS = click.FloatRange(min=0, min_open=True)
_STYLES = {"passed": "green", "broken": "bold red", "left open": "yellow"}


@click.command()
@click.option("--socket", "socket_path", type=click.Path(path_type=Path), help="Where the server is.")
@click.option(
    "--only",
    metavar="NAME,...",
    multiple=True,
    help="Only checks of an area (RING-PACKED), of a rule (BLK-004), or whose name begins so (block_erase).",
)
@click.option("--json", "json_file", type=click.File("w", lazy=False), help="Write it as JSON; - is standard output.")
@click.option("--junit", "junit_file", type=click.File("wb", lazy=False), help="Write JUnit's XML; - too.")
@click.option("--strict", is_flag=True, help="Fail, too, for what the specification leaves open or only advises.")
@click.option("--destructive", is_flag=True, help="Change, too, what cannot be put back: zones.")
@click.option("--timeout", type=_SECONDS, default=5.0, help="Seconds that an answer or a completion may take (5).")
@click.option("--limit", type=_SECONDS, default=60.0, help="Seconds that one check may take (60).")
@click.option("--resize-command", default="", metavar="SHELL", help="Makes the disk bigger while it is served.")
@click.option(
    "--power-cut-command",
    default="",
    metavar="SHELL",
    help="Cuts the power under the server and starts it again: afterwards the disk holds only what was durable.",
)
@click.option("--list", "listing", is_flag=True, help="Only list the checks and their rules.")
@click.option("-v", "--verbose", is_flag=True, help="Tell of every rule, not only of those that did not pass.")
def conform(
    *,
    socket_path: Path | None,
    only: tuple[str, ...],
    json_file: TextIO | None,
    junit_file: BinaryIO | None,
    strict: bool,
    listing: bool,
    verbose: bool,
    **options: object,
) -> int:
    """Check a vfio-user virtio-blk server, any, from the driver's side against the rules of VIRTIO 1.4.

    Needs nothing but the server's socket, with no VMM connected.  Checks write to the first 2 MiB and the last 64 KiB
    of the disk; what was there is put back in the end.

    The exit status is 0 if no rule is broken, 1 if one is, 2 if the server cannot be checked.
    """
    from vmmblk.conform.check import Outcome
    from vmmblk.conform.report import Report
    from vmmblk.conform.target import Options

    chosen = _chosen(only)
    if listing:
        return _list(chosen)
    if socket_path is None:
        raise click.UsageError("say where the server is, with --socket")
    settings = Options(**options)  # type: ignore[arg-type]
    facts, saved = _begin(socket_path, settings)
    report = Report(facts, [])
    whole = _run(socket_path, settings, chosen, report.results)
    restored = _put_back(socket_path, settings, saved)
    if json_file is not None:
        json_file.write(json.dumps(report.json() | {"whole": whole}, indent=2) + "\n")
    if junit_file is not None:
        junit_file.write(report.junit(strict=strict))
    taken = any(file is not None and file.name == "<stdout>" for file in (json_file, junit_file))
    _tell(report, _console(stderr=taken), verbose=verbose)
    if not whole:
        raise click.Abort
    return int(bool(report.count(Outcome.BROKEN) or (strict and report.count(Outcome.OPEN)) or not restored))


def _chosen(only: tuple[str, ...]) -> list[Check]:
    """The checks that are meant.  Raises UsageError for a name that means none."""
    from vmmblk.conform.check import checks

    everything = list(checks())
    names = [name for each in only for name in each.split(",")]
    for name in names:
        if not any(_means(name, each) for each in everything):
            raise click.UsageError(f"--only: no check is about {name!r}; --list tells what there is")
    return [each for each in everything if not names or any(_means(name, each) for name in names)]


def _means(name: str, each: Check) -> bool:
    area_or_rule = any(rule == name or rule.rpartition("-")[0] == name for rule in each.rules)
    return bool(name) and (area_or_rule or each.name.startswith(name))


def _list(chosen: list[Check]) -> int:
    from rich.table import Table

    table = Table("check", "what passes", "rules", box=None)
    for each in chosen:
        table.add_row(each.name, each.title, " ".join(each.rules))
    _console().print(table)
    return 0


def _begin(socket_path: Path, settings: Options) -> tuple[Facts, Mapping[int, bytes]]:
    """What the device says about itself, and what its disk holds.  Raises ClickException if it does not answer."""
    from vmmblk.client.errors import NeedsReset, StatusError
    from vmmblk.conform.runner import keep
    from vmmblk.conform.target import Target

    try:
        facts = Target(socket_path, settings).facts
        return facts, keep(socket_path, settings, facts)
    except (OSError, ValueError, NeedsReset, StatusError) as error:
        raise click.ClickException(
            f"{socket_path}: cannot check this server: {str(error) or type(error).__name__};"
            " start it with no VMM connected, and with a disk that can be read"
        ) from error


def _run(socket_path: Path, settings: Options, chosen: list[Check], results: list[Result]) -> bool:
    """Run the checks, with progress if somebody is watching, and collect their results; False if interrupted."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from vmmblk.conform.check import Outcome
    from vmmblk.conform.runner import run

    console = _console(stderr=True)
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(chosen))
        try:
            for result in run(socket_path, settings, chosen):
                results.append(result)
                if result.outcome is Outcome.BROKEN:
                    progress.console.print(_line(result), highlight=False)
                done = len({each.check.name for each in results})
                progress.update(task, completed=done, description=result.check.name)
        except KeyboardInterrupt:
            say("interrupted; what was seen until then:")
            return False
    return True


def _put_back(socket_path: Path, settings: Options, saved: Mapping[int, bytes]) -> bool:
    """Put back what the disk held; tells the user if that cannot be."""
    from vmmblk.client.errors import NeedsReset, StatusError
    from vmmblk.conform.runner import put_back

    try:
        put_back(socket_path, settings, saved)
    except (OSError, NeedsReset, StatusError) as error:
        reason = str(error) or type(error).__name__
        say(f"error: what the checks wrote to the disk stays there, the server does not take the old data: {reason}")
        return False
    return True


def _tell(report: Report, console: Console, *, verbose: bool) -> None:
    """The two tables: each area in numbers, and each rule worth a word."""
    from rich.table import Table
    from rich.text import Text

    from vmmblk.conform.check import Outcome
    from vmmblk.conform.rules import rules

    areas = Table("area", *(outcome.value for outcome in Outcome), box=None)
    for column in areas.columns[1:]:
        column.justify = "right"
    for area, counts in report.areas():
        areas.add_row(area, *(Text(str(counts[each] or "-"), _STYLES.get(each.value, "")) for each in Outcome))
    console.print(areas)
    for verdict in report.verdicts():
        if not verbose and verdict.outcome not in (Outcome.BROKEN, Outcome.OPEN):
            continue
        rule = rules()[verdict.rule]
        console.print()
        console.print(Text(f"{rule.id}  {verdict.outcome.value}", _STYLES.get(verdict.outcome.value, "")))
        console.print(f"  {rule.level}: {rule.requirement}", markup=False, highlight=False)
        for result in verdict.results:
            if result.outcome is verdict.outcome and result.detail:
                console.print(f"  {result.name}: {result.detail}", markup=False, highlight=False)
    console.print()
    told = ", ".join(f"{report.count(outcome)} {outcome.value}" for outcome in Outcome if report.count(outcome))
    console.print(f"{len(report.results)} checks: {told}", highlight=False)


def _line(result: Result) -> str:
    from rich.markup import escape

    return f"[bold red]broken[/] {escape(f'{result.name}: {result.detail}')}"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    watched = (sys.stderr if stderr else sys.stdout).isatty()
    return Console(stderr=stderr, soft_wrap=not watched)
