"""``vmmblk serve``: serve one disk on a socket until told to stop."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmmblk.cli.common import POLL_SECONDS, DiskOptions, Signals, disk_options, leave, say, stop

if TYPE_CHECKING:
    from vmmblk.server import Server

__all__ = ["serve"]


@click.command()
@click.option("--socket", "socket_path", required=True, type=click.Path(path_type=Path), help="Where QEMU connects.")
@disk_options
@click.argument("disk")
@click.argument("parameters", metavar="[K=V]...", nargs=-1)
def serve(socket_path: Path, disk: str, parameters: tuple[str, ...], **options: object) -> int:
    """Serve DISK: a path, memory:SIZE, null:SIZE, or ./mydisk.py with its own K=V.

    Prints the QEMU arguments for it.  SIGTERM or Ctrl-C ends it: what the guest asked for is finished and flushed.
    """
    settings = DiskOptions(**options)  # type: ignore[arg-type]
    with Signals.caught(signal.SIGTERM, signal.SIGINT) as signals:
        server = settings.server(socket_path, disk, parameters)
        server.start()
        click.echo(_invitation(socket_path.absolute(), settings.bootindex))
        click.echo(f"engine: {server.engine}")
        status = _wait(server, signals)
        stopped = stop(server, settings.stop_timeout)
    return leave(status, stopped=stopped)


def _wait(server: Server, signals: Signals) -> int:
    """Wait for a signal, or for the server to fail; the exit status."""
    while server.failed is None:
        if signals.wait(POLL_SECONDS):
            return 0
    say(f"error: the server failed: {server.failed}")
    return 1


def _invitation(socket_path: Path, bootindex: int | None) -> str:
    from vmmblk.cli.qemu import device_argument, memory_arguments

    arguments = ["-m", "1G", *memory_arguments(1 << 30), *device_argument(socket_path, bootindex=bootindex)]
    return f"QEMU arguments (size= in bytes must equal -m):\n  {shlex.join(arguments)}"
