"""``vmmblk run``: serve a disk, start QEMU with it, end with QEMU."""

from __future__ import annotations

import shlex
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vmmblk.cli.common import POLL_SECONDS, DiskOptions, Signals, disk_options, leave, say, stop
from vmmblk.errors import ConfigError

if TYPE_CHECKING:
    from vmmblk.server import Server

__all__ = ["run"]

_COMMAND = "vmmblk.command"


class _WithCommand(click.Command):
    """A command line that ends in ``-- COMMAND ...``, which is kept away from the options before it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Put what follows the first ``--`` into ``ctx.meta``."""
        dashes = args.index("--") if "--" in args else len(args)
        ctx.meta[_COMMAND] = args[dashes + 1 :]
        return super().parse_args(ctx, args[:dashes])


@click.command(cls=_WithCommand, options_metavar="[OPTIONS]", epilog="QEMU's own command line follows --.")
@disk_options
@click.argument("disk")
@click.argument("parameters", metavar="[K=V]... -- qemu-system-x86_64 ...", nargs=-1)
@click.pass_context
def run(context: click.Context, /, disk: str, parameters: tuple[str, ...], **options: object) -> int:
    """Serve DISK, start QEMU with the device and shared memory added, and end with QEMU's exit status."""
    command: list[str] = context.meta[_COMMAND]
    if not command:
        raise click.UsageError("put the QEMU command after --, like: vmmblk run disk.img -- qemu-system-x86_64 -m 1G")
    settings = DiskOptions(**options)  # type: ignore[arg-type]
    from vmmblk.cli.qemu import added_arguments

    with (
        Signals.caught(signal.SIGTERM, signal.SIGINT, signal.SIGCHLD) as signals,
        tempfile.TemporaryDirectory(prefix="vmmblk-") as folder,  # mode 0700
    ):
        socket_path = Path(folder, "disk")
        added = added_arguments(command, socket_path, bootindex=settings.bootindex)
        server = settings.server(socket_path, disk, parameters)
        server.start()
        try:
            say(f"added to QEMU: {shlex.join(added)}")
            status = _follow([*command, *added], server, signals)
        finally:
            stopped = stop(server, settings.stop_timeout)
    return leave(status, stopped=stopped)


def _follow(command: list[str], server: Server, signals: Signals) -> int:
    """Run QEMU to its end, passing SIGTERM and SIGINT on; its exit status as a shell gives it."""
    try:
        child = subprocess.Popen(command)
    except OSError as exc:
        raise ConfigError(f"cannot start {command[0]}: {exc.strerror}; install it or give its path") from None
    told = False
    while child.poll() is None:
        for number in signals.wait(POLL_SECONDS):
            if number != signal.SIGCHLD:
                child.send_signal(number)
        if server.failed is not None and not told:
            told = True
            say(f"error: the server failed, the guest's disk is gone: {server.failed}")
    return child.returncode if child.returncode >= 0 else 128 - child.returncode
