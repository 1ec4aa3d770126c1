"""Where a server spends its time: perf beside a server that is driven; see benchmarks/profile --help."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.measure import served

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main", "profile"]

_FREQUENCY = 1999
"""Samples of each thread per second: odd, so as not to fall into step with what happens regularly."""


def profile(bench: Sequence[str], serve: Sequence[str], top: int) -> str:
    """The commands, what bench told, and a line for each symbol.  Raises RuntimeError of one line."""
    perf = shutil.which("perf")
    if perf is None:
        raise RuntimeError("perf is missing: apt-get install linux-perf")
    with tempfile.TemporaryDirectory(prefix="vmmblk-profile-") as folder, served(serve) as (pid, path):
        record = [perf, "record", "-q", "-F", str(_FREQUENCY), "-o", f"{folder}/data", "-p", str(pid), "--"]
        driven = _said(*record, sys.executable, "-m", "vmmblk", "bench", "--socket", str(path), *bench)
        report = [perf, "report", "-q", "-i", f"{folder}/data", "--stdio", "--no-children"]
        told = _said(*report, "-s", "comm,dso,symbol")
    # Two columns are of processors that tell more, and empty on others.
    symbols = [line.rstrip(" -") for line in told.splitlines() if line.strip()]
    commands = [f"$ vmmblk serve {shlex.join(serve)}", f"$ vmmblk bench {shlex.join(bench)}".rstrip()]
    return "\n".join([*commands, driven.strip(), "", *symbols[:top]])


def _said(*command: str) -> str:
    """A command's output; what it complains of goes to the user at once."""
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if result.returncode:
        name = " ".join((Path(command[0]).name, command[1]))
        raise RuntimeError(f"{name} ended with status {result.returncode}; the reason is above")
    return result.stdout


@click.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True}, add_help_option=False)
@click.option("--top", type=click.IntRange(min=1), default=25)
@click.pass_context
def main(context: click.Context, *, top: int) -> None:
    """See benchmarks/profile --help.  The context's object is what to serve, its other arguments are for bench."""
    if not context.obj:
        raise click.UsageError("write what to serve after --; see benchmarks/profile --help")
    try:
        click.echo(profile(context.args, context.obj, top))
    except (OSError, RuntimeError) as exc:
        raise click.ClickException(str(exc)) from exc


if __name__ == "__main__":
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    main(args=words[:cut], obj=words[cut + 1 :])
